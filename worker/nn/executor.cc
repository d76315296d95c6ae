#include "worker/nn/executor.h"

#include <type_traits>
#include <utility>

#include "common/philox.h"
#include "worker/nn/copies.h"
#include "worker/nn/lstm_tensors.h"

namespace lockstep::nn {

Executor::Executor(std::shared_ptr<const Program> program, device::Device& device,
                   const Operations& operations, uint64_t seed, Lowering lowering,
                   MemoryPlan memory, void* scratch, Beside beside, int most_shards)
    : program_(std::move(program)),
      device_(device),
      operations_(operations),
      lowering_(std::move(lowering)),
      memory_(std::move(memory)),
      scratch_(scratch),
      beside_(beside),
      leaf_rows_(most_shards),
      leaf_x_(most_shards),
      leaf_dy_(most_shards),
      part_dw_(device::kMostFoldBuffers),
      part_db_(device::kMostFoldBuffers) {
  const std::vector<device::ElementType> stored = program_->StoredTypes(device_.stores_bf16());
  for (int i = 0; i < static_cast<int>(program_->nodes().size()); ++i) {
    const Program::Node& node = program_->nodes()[i];
    const spec::Layer& layer = program_->layer(i);
    const std::vector<int64_t>& input = program_->shape(node.inputs[0]);
    NodeConstants c;
    c.in = spec::ElementCount(input);
    c.out = spec::ElementCount(node.output);
    c.channels = input.back();
    c.spatial = c.in / c.channels;
    c.out_type = stored[i];
    if (node.inputs[0] != spec::kData) c.in_type = stored[node.inputs[0]];
    if (input.size() == 3) {
      c.pool = {input[0],     input[1],      input[2],  layer.kernel,
                layer.stride, layer.padding, c.out_type};
    }
    c.norm = {c.channels, node.fused_relu >= 0, c.out_type};
    c.copies = CopiesOf(*program_, i);
    int64_t copied = 0;
    for (const device::StridedCopy& copy : c.copies) copied += copy.elements();
    c.fills = copied == c.out;
    c.slope = static_cast<float>(layer.slope);
    c.alpha = static_cast<float>(layer.alpha);
    c.synchronized = layer.sync == spec::Sync::kBatch;
    c.epsilon = static_cast<float>(layer.epsilon);
    c.rate = static_cast<float>(layer.rate);
    c.key = MakePhiloxKey(seed, "dropout/" + layer.name);
    if (layer.type == spec::LayerType::kLstm) {
      for (int part = 0; part < layer.layers; ++part) {
        c.part_outputs.push_back(LstmShapeOf(*program_, i, part).outputs());
        // A layer's name has no dot.
        c.part_keys.push_back(
            MakePhiloxKey(seed, "dropout/" + layer.name + ".l" + std::to_string(part)));
      }
    }
    constants_.push_back(c);
  }
}

const void* Executor::Output(int call, const Frame& frame, int64_t* elements,
                             device::ElementType* type) const {
  const Call& c = lowering_.calls[call];
  if (c.out < 0) return nullptr;
  const size_t parts = constants_[c.node].copies.size();
  if (c.part + 1 < static_cast<int>(parts)) return nullptr;  // not yet whole
  *type = lowering_.value_types[c.out];
  *elements = lowering_.value_bytes[c.out] / device::ElementBytes(*type) * frame.input->rows;
  return Bytes(c.out, frame);
}

Joint Joint::Of(absl::Span<const Frame> frames, int64_t features, bool leaves_stay) {
  Joint joint;
  joint.leaves = leaves_stay;
  if (frames.size() > 1) joint.leaf_stride = frames[1].leaf - frames[0].leaf;
  for (size_t i = 0; i + 1 < frames.size(); ++i) {
    const ShardInput &one = *frames[i].input, &next = *frames[i + 1].input;
    joint.data = joint.data && one.data + one.rows * features == next.data;
    joint.labels = joint.labels && one.labels + one.rows == next.labels;
    joint.positions = joint.positions && one.first_position + one.rows == next.first_position;
    joint.leaves = joint.leaves && frames[i + 1].leaf - frames[i].leaf == joint.leaf_stride;
  }
  return joint;
}

namespace {

int64_t RowsOf(absl::Span<const Frame> frames) {
  int64_t rows = 0;
  for (const Frame& frame : frames) rows += frame.input->rows;
  return rows;
}

// `each` of a row.
device::Leaves LeavesOf(absl::Span<const Frame> frames, int64_t each) {
  device::Leaves leaves;
  leaves.count = static_cast<int>(frames.size());
  for (size_t i = 0; i < frames.size(); ++i) {
    leaves.begin[i + 1] = leaves.begin[i] + frames[i].input->rows * each;
  }
  return leaves;
}

}  // namespace

void Executor::RunGroup(const Call& call, const StepContext& context, const Merged& merged,
                        absl::Span<const Frame> frames, int64_t leaf_stride) const {
  const NodeConstants& c = constants_[call.node];
  device::Stream& stream = *context.stream;
  const Frame& frame = frames[0];
  const int64_t rows = RowsOf(frames);
  const float* a = Input(call.a, frame);
  const float* b = Input(call.b, frame);
  float* out = Floats(call.out, frame);
  // The same of whatever type.
  const void* const any_a = InputBytes(call.a, frame);
  const void* const any_b = InputBytes(call.b, frame);
  void* const any_out = Bytes(call.out, frame);
  switch (call.type) {
    case CallType::kLinearForward:
    case CallType::kLinearBackwardInput:
    case CallType::kLinearBackwardWeight:
      return RunLinear(call, context, frames, leaf_stride);
    case CallType::kMaxPoolForward:
      return device_.MaxPoolForward(stream, c.pool, rows, any_a, any_out, Bytes(call.out2, frame));
    case CallType::kMaxPoolBackward:
      return device_.MaxPoolBackward(stream, c.pool, rows, any_a, Bytes(call.b, frame), any_out);
    case CallType::kAveragePoolForward:
      return device_.AveragePoolForward(stream, c.pool, rows, any_a, any_out);
    case CallType::kAveragePoolBackward:
      return device_.AveragePoolBackward(stream, c.pool, rows, any_a, any_out);
    case CallType::kGlobalAveragePoolForward:
      return device_.GlobalAveragePoolForward(stream, rows, c.spatial, c.channels, any_a, out,
                                              c.in_type);
    case CallType::kGlobalAveragePoolBackward:
      return device_.GlobalAveragePoolBackward(stream, rows, c.spatial, c.channels, a, any_out,
                                               c.in_type);
    case CallType::kBatchNormMoments:
    case CallType::kBatchNormForward:
    case CallType::kBatchNormInference:
    case CallType::kBatchNormBackwardSums:
    case CallType::kBatchNormBackward:
    case CallType::kBatchNormAddForward:
    case CallType::kBatchNormAddInference:
    case CallType::kBatchNormGradient:
      return RunBatchNorm(call, context, merged, frames, leaf_stride);
    case CallType::kCopyForward:
    case CallType::kCopyBackward:
      return RunCopy(call, context, frame, rows);
    case CallType::kReluForward:
      return device_.ReluForward(stream, rows * c.out, any_a, any_out, c.out_type);
    case CallType::kReluBackward:
      return device_.ReluBackward(stream, rows * c.out, any_a, any_b, any_out, c.out_type);
    case CallType::kTanhForward:
      return device_.TanhForward(stream, rows * c.out, a, out);
    case CallType::kTanhBackward:
      return device_.TanhBackward(stream, rows * c.out, a, b, out);
    case CallType::kSigmoidForward:
      return device_.SigmoidForward(stream, rows * c.out, a, out);
    case CallType::kSigmoidBackward:
      return device_.SigmoidBackward(stream, rows * c.out, a, b, out);
    case CallType::kLeakyReluForward:
      return device_.LeakyReluForward(stream, rows * c.out, c.slope, a, out);
    case CallType::kLeakyReluBackward:
      return device_.LeakyReluBackward(stream, rows * c.out, c.slope, a, b, out);
    case CallType::kEluForward:
      return device_.EluForward(stream, rows * c.out, c.alpha, a, out);
    case CallType::kEluBackward:
      return device_.EluBackward(stream, rows * c.out, c.alpha, a, b, out);
    case CallType::kSoftplusForward:
      return device_.SoftplusForward(stream, rows * c.out, a, out);
    case CallType::kSoftplusBackward:
      return device_.SoftplusBackward(stream, rows * c.out, a, b, out);
    case CallType::kSoftmaxForward:
      return device_.SoftmaxForward(stream, rows * c.spatial, c.channels, a, out);
    case CallType::kSoftmaxBackward:
      return device_.SoftmaxBackward(stream, rows * c.spatial, c.channels, a, b, out);
    case CallType::kLayerNormForward:
    case CallType::kLayerNormBackwardWeight:
    case CallType::kLayerNormBackward:
      return RunLayerNorm(call, context, frames, leaf_stride);
    case CallType::kEmbeddingForward:
    case CallType::kEmbeddingBackward:
      return RunEmbedding(call, context, frames, leaf_stride);
    case CallType::kAdd:
      return device_.Add(stream, rows * c.out, any_a, any_b, any_out, c.out_type);
    case CallType::kMultiply:
      return device_.Multiply(stream, rows * c.out, a, b, out);
    case CallType::kDropout:
      return device_.Dropout(stream, rows * c.out, a, c.rate, c.key, context.scalars,
                             static_cast<uint64_t>(frame.input->first_position * c.out), out);
    case CallType::kLstmForward:
    case CallType::kLstmBackward:
      return RunLstm(call, context, frames, leaf_stride);
    case CallType::kLstmDropout: {
      const int64_t outputs = c.part_outputs[call.part];
      return device_.Dropout(stream, rows * outputs, a, c.rate, c.part_keys[call.part],
                             context.scalars,
                             static_cast<uint64_t>(frame.input->first_position * outputs), out);
    }
    case CallType::kSoftmaxCrossEntropy:
    case CallType::kOneHot:
    case CallType::kMeanSquaredError:
    case CallType::kSigmoidCrossEntropy:
    case CallType::kCountCorrect:
      return RunLoss(call, context, frames);
  }
}

bool Executor::CanRunTogether(const Call& call, const StepContext& context,
                              const Joint& joint) const {
  if (!joint.data && (call.a == kDataValue || call.b == kDataValue)) return false;
  switch (call.type) {
    case CallType::kLinearForward:
    case CallType::kLinearBackwardInput:
      return operations_.dense(call.node) != nullptr ||
             operations_.conv2d(call.node)->serves_any_rows();
    case CallType::kLinearBackwardWeight:
      return operations_.dense(call.node) == nullptr && joint.leaves;
    case CallType::kLstmForward:
    case CallType::kLstmBackward:
      // Both or neither: what one leaves for the other is of all rows.
      return operations_.lstm(call.node, call.part)->serves_any_rows() &&
             (context.sink == nullptr || joint.leaves);
    case CallType::kBatchNormBackwardSums:
    case CallType::kBatchNormGradient:
    case CallType::kBatchNormBackward:
      return !context.leaves_stay || joint.leaves;
    case CallType::kLayerNormBackwardWeight:
    case CallType::kEmbeddingBackward:
      return joint.leaves;
    case CallType::kDropout:
    case CallType::kLstmDropout:
      return joint.positions;
    case CallType::kSoftmaxCrossEntropy:
    case CallType::kOneHot:
    case CallType::kCountCorrect:
      return joint.labels;
    default:
      return true;
  }
}

int Executor::RunAll(int index, const StepContext& context, const Merged& merged,
                     absl::Span<const Frame> frames, const Joint& joint) {
  const Call& call = lowering_.calls[index];
  if (RunsBeside(call, context)) {
    JoinBeside(context);
    device_.Follow(*beside_.stream, *context.stream);
    beside_call_ = &call;
    beside_frames_ = frames;
  }
  if (IsFolded(call, context)) {
    RunFoldedGradient(call, context, frames);
    return 1;
  }
  const Call* const norm = call.then_norm ? &lowering_.calls[index + 1] : nullptr;
  const bool together = CanRunTogether(call, context, joint) &&
                        (norm == nullptr || CanRunTogether(*norm, context, joint));
  const size_t most = together ? device::kMostLeaves : 1;
  for (size_t at = 0; at < frames.size(); at += most) {
    const absl::Span<const Frame> group = frames.subspan(at, most);
    if (norm == nullptr) {
      RunGroup(call, context, merged, group, joint.leaf_stride);
    } else {
      RunBatchNorm(*norm, context, merged, group, joint.leaf_stride, &call);
    }
  }
  return norm == nullptr ? 1 : 2;
}

void Executor::JoinBeside(const StepContext& context) {
  if (beside_call_ == nullptr) return;
  const Call& call = *std::exchange(beside_call_, nullptr);
  device_.Follow(*context.stream, *beside_.stream);
  if (IsFolded(call, context)) {
    const Program::Node& node = program_->nodes()[call.node];
    context.sink->DoneFolded(node.parameters_begin, node.parameters_end);
  } else {
    FinishLeaves(call.node, context, beside_frames_);
  }
}

void Executor::RunFoldedGradient(const Call& call, const StepContext& context,
                                 absl::Span<const Frame> frames) {
  const Program::Node& node = program_->nodes()[call.node];
  const device::LeafFold& fold = *context.sink->Fold();
  for (size_t i = 0; i < frames.size(); ++i) {
    leaf_rows_[i] = frames[i].input->rows;
    leaf_x_[i] = Input(call.a, frames[i]);
    leaf_dy_[i] = Floats(call.b, frames[i]);
  }
  for (int part = 0; part < fold.parts; ++part) {
    float* const gradient = context.sink->Part(part);
    part_dw_[part] = gradient + node.weight;
    part_db_[part] = node.bias < 0 ? nullptr : gradient + node.bias;
    if (!context.sink->LeavesStay()) ZeroPadding(call.node, context, gradient);
  }
  const bool beside = RunsBeside(call, context);
  // Behind the last call the step's own stream has nothing to do but wait.
  const bool last = &call == &lowering_.calls.back();
  device::Stream& stream = beside ? *beside_.stream : *context.stream;
  operations_.dense(call.node)->BackwardWeight(
      stream, last ? *context.stream : stream, fold, leaf_rows_.data(), leaf_x_.data(),
      leaf_dy_.data(), part_dw_.data(), part_db_.data(), beside ? beside_.scratch : scratch_);
  if (!beside) context.sink->DoneFolded(node.parameters_begin, node.parameters_end);
}

void Executor::RunLinear(const Call& call, const StepContext& context,
                         absl::Span<const Frame> frames, int64_t leaf_stride) const {
  const Program::Node& node = program_->nodes()[call.node];
  const Frame& frame = frames[0];
  const int64_t rows = RowsOf(frames);
  const bool beside = RunsBeside(call, context);
  device::Stream& stream = beside ? *beside_.stream : *context.stream;
  void* const scratch = beside ? beside_.scratch : scratch_;
  // What they take: floats, or whatever type the convolution is of.
  auto run = [&](auto* operation, auto* a, auto* dy, auto* out) {
    if (call.type == CallType::kLinearForward) {
      const float* bias = node.bias < 0 ? nullptr : context.state->parameters() + node.bias;
      operation->Forward(stream, rows, a, bias, out, scratch);
    } else if (call.type == CallType::kLinearBackwardInput) {
      operation->BackwardInput(stream, rows, a, out, scratch);
    } else {
      float* dw = frame.leaf + node.weight;
      float* db = node.bias < 0 ? nullptr : frame.leaf + node.bias;
      if constexpr (std::is_same_v<decltype(operation), device::Dense*>) {
        operation->BackwardWeight(stream, stream, device::kOneLeaf, &rows, &a, &dy, &dw, &db,
                                  scratch);
      } else {
        operation->BackwardWeights(stream, LeavesOf(frames, 1), a, dy, dw, db, leaf_stride,
                                   scratch);
      }
      if (!beside) FinishLeaves(call.node, context, frames);
    }
  };
  if (device::Dense* dense = operations_.dense(call.node)) {
    run(dense, Input(call.a, frame), Input(call.b, frame), Floats(call.out, frame));
  } else {
    run(operations_.conv2d(call.node), InputBytes(call.a, frame), InputBytes(call.b, frame),
        static_cast<void*>(Bytes(call.out, frame)));
  }
}

void Executor::RunLstm(const Call& call, const StepContext& context, absl::Span<const Frame> frames,
                       int64_t leaf_stride) const {
  device::Lstm* const lstm = operations_.lstm(call.node, call.part);
  device::Stream& stream = *context.stream;
  const Frame& frame = frames[0];
  const float* x = Input(call.a, frame);
  float* out = Floats(call.out, frame);
  if (call.type == CallType::kLstmForward) {
    return lstm->Forward(stream, RowsOf(frames), x, out, Floats(call.out2, frame), scratch_);
  }
  const LstmTensors<float> leaf(*program_, call.node, call.part, frame.leaf);
  lstm->BackwardLeaves(stream, LeavesOf(frames, 1), x, Floats(call.b, frame), Floats(call.c, frame),
                       leaf.directions(), leaf_stride, out, scratch_);
  // Backward ends with the first layer.
  if (call.part == 0) FinishLeaves(call.node, context, frames);
}

void Executor::RunBatchNorm(const Call& call, const StepContext& context, const Merged& merged,
                            absl::Span<const Frame> frames, int64_t leaf_stride,
                            const Call* product) const {
  const Program::Node& node = program_->nodes()[call.node];
  const NodeConstants& c = constants_[call.node];
  const MomentsSlice& slice = program_->moments()[node.moments];
  device::Stream& stream = *context.stream;
  const Frame& frame = frames[0];
  const device::Leaves leaves = LeavesOf(frames, slice.spatial);
  const void* x = InputBytes(call.a, frame);
  void* out = Bytes(call.out, frame);
  const int64_t moments_stride = program_->moments_size();
  const float* weight = context.state->parameters() + node.weight;
  const float* bias = context.state->parameters() + node.bias;
  if (call.type == CallType::kBatchNormInference || call.type == CallType::kBatchNormAddInference) {
    const float* statistics = context.state->statistics();
    return device_.BatchNormForward(
        stream, c.norm, leaves, x,
        {statistics + slice.running_mean, statistics + slice.running_var, 0, /*divisor=*/1},
        c.epsilon, weight, bias, InputBytes(call.b, frame), out);
  }
  float* const own_mean = frame.moments + slice.offset;
  float* const own_m2 = own_mean + slice.channels;
  if (call.type == CallType::kBatchNormMoments) {
    return device_.BatchNormMoments(stream, c.norm, leaves, x, own_mean, own_m2, moments_stride);
  }
  // The moments that normalize: the shards' own, or the whole batch's.
  device::Moments moments;
  moments.mean = c.synchronized ? merged.moments + slice.offset : own_mean;
  moments.spread = moments.mean + slice.channels;
  if (c.synchronized) {
    moments.divisor = merged.rows[node.moments] * slice.spatial;
  } else {
    moments.stride = moments_stride;
  }
  if (call.type == CallType::kBatchNormForward || call.type == CallType::kBatchNormAddForward) {
    uint8_t* const above = Bytes(call.out2, frame);
    if (product != nullptr) {
      const int64_t at = program_->nodes()[product->node].bias;
      if (operations_.dense(product->node)
              ->ForwardThenNorm(stream, leaves, Input(product->a, frame),
                                at < 0 ? nullptr : context.state->parameters() + at,
                                Floats(product->out, frame),
                                {c.norm.relu, c.epsilon, weight, bias, own_mean, own_m2,
                                 moments_stride, Floats(call.out, frame)})) {
        return;
      }
      RunLinear(*product, context, frames, leaf_stride);
    }
    if (call.whole) {
      return device_.BatchNormForwardOfLeaves(stream, c.norm, leaves, x, own_mean, own_m2,
                                              moments_stride, c.epsilon, weight, bias,
                                              InputBytes(call.b, frame), out, above);
    }
    return device_.BatchNormForward(stream, c.norm, leaves, x, moments, c.epsilon, weight, bias,
                                    InputBytes(call.b, frame), out, above);
  }
  const uint8_t* const above = call.above ? Bytes(call.b, frame) : nullptr;
  const void* y = call.above ? nullptr : Bytes(call.b, frame);
  const void* dy = Bytes(call.c, frame);
  const device::BatchNormShape masked = {c.channels, call.b != kNoValue, c.norm.type};
  const float* const own_bias = node.fused_add < 0 ? bias : nullptr;
  // Leaves only add, so a leaf's share of the gradient is its own sums, also with whole-batch
  // moments.
  const bool in_leaf = context.leaves_stay && !c.synchronized;
  float* sum_dy = in_leaf ? frame.leaf + node.bias : frame.sums;
  float* sum_dy_xhat = in_leaf ? frame.leaf + node.weight : sum_dy + slice.channels;
  const int64_t stride = in_leaf             ? leaf_stride
                         : frames.size() > 1 ? frames[1].sums - frames[0].sums
                                             : 0;
  const bool sums_alone =
      call.type == CallType::kBatchNormBackwardSums || call.type == CallType::kBatchNormGradient;
  if (sums_alone || call.whole) {
    if (product != nullptr && sums_alone &&
        operations_.conv2d(product->node)
            ->BackwardInputInto(stream, RowsOf(frames), InputBytes(product->a, frame), dy, above,
                                out)) {
      device_.BatchNormGradient(stream, {c.channels, false, c.norm.type}, leaves, x, nullptr, out,
                                nullptr, moments, c.epsilon, nullptr, sum_dy, sum_dy_xhat, stride);
    } else if (sums_alone) {
      if (product != nullptr) RunLinear(*product, context, frames, leaf_stride);
      device_.BatchNormGradient(stream, masked, leaves, x, y, dy, Bytes(call.d, frame), moments,
                                c.epsilon, out, sum_dy, sum_dy_xhat, stride, weight, own_bias,
                                above);
    } else if (product == nullptr ||
               !operations_.dense(product->node)
                    ->BackwardInputThenNorm(
                        stream, leaves, Floats(product->a, frame),
                        {Floats(call.a, frame), Floats(call.b, frame), moments, c.epsilon, weight,
                         sum_dy, sum_dy_xhat, stride, Floats(call.out, frame)})) {
      if (product != nullptr) RunLinear(*product, context, frames, leaf_stride);
      device_.BatchNormBackwardOfLeaves(stream, masked, leaves, x, y, dy, moments, c.epsilon,
                                        weight, sum_dy, sum_dy_xhat, stride, out);
    }
    // What is announced may be exchanged at once, and added to.
    if (in_leaf && call.goes_on) return;
    const size_t bytes = sizeof(float) * static_cast<size_t>(slice.channels);
    for (const Frame& f : frames) {
      if (!in_leaf) {
        device_.Copy(stream, f.sums, f.leaf + node.bias, bytes);
        device_.Copy(stream, f.sums + slice.channels, f.leaf + node.weight, bytes);
      }
      // Before the next: leaves may take turns in one buffer.
      FinishLeaves(call.node, context, absl::MakeConstSpan(&f, 1));
    }
    return;
  }
  if (c.synchronized) {
    device_.BatchNormBackward(stream, masked, leaves, x, y, dy, moments, c.epsilon, weight,
                              merged.sums, merged.sums + slice.channels, 0, out, own_bias);
  } else {
    device_.BatchNormBackward(stream, masked, leaves, x, y, dy, moments, c.epsilon, weight, sum_dy,
                              sum_dy_xhat, stride, out, own_bias);
    if (in_leaf) FinishLeaves(call.node, context, frames);
  }
}

void Executor::RunLayerNorm(const Call& call, const StepContext& context,
                            absl::Span<const Frame> frames, int64_t leaf_stride) const {
  const Program::Node& node = program_->nodes()[call.node];
  const NodeConstants& c = constants_[call.node];
  const Frame& frame = frames[0];
  const device::Leaves leaves = LeavesOf(frames, c.spatial);
  const float* x = Input(call.a, frame);
  const float* weight = context.state->parameters() + node.weight;
  device::Stream& stream = *context.stream;
  float* out = Floats(call.out, frame);
  if (call.type == CallType::kLayerNormForward) {
    return device_.LayerNormForward(stream, leaves.total(), c.channels, x, c.epsilon, weight,
                                    context.state->parameters() + node.bias, out,
                                    Floats(call.out2, frame));
  }
  const float* stats = Floats(call.b, frame);
  const float* dy = Floats(call.c, frame);
  if (call.type == CallType::kLayerNormBackward) {
    return device_.LayerNormBackward(stream, leaves.total(), c.channels, x, stats, weight, dy, out);
  }
  device_.LayerNormBackwardWeight(stream, leaves, c.channels, x, stats, dy,
                                  frame.leaf + node.weight, frame.leaf + node.bias, leaf_stride);
  FinishLeaves(call.node, context, frames);
}

void Executor::RunEmbedding(const Call& call, const StepContext& context,
                            absl::Span<const Frame> frames, int64_t leaf_stride) const {
  const Program::Node& node = program_->nodes()[call.node];
  const std::vector<int64_t>& table = program_->layer(call.node).tensors[0].shape;
  const Frame& frame = frames[0];
  const device::Leaves leaves = LeavesOf(frames, constants_[call.node].in);
  const float* x = Input(call.a, frame);
  if (call.type == CallType::kEmbeddingForward) {
    return device_.EmbeddingForward(*context.stream, leaves.total(), table[0], table[1], x,
                                    context.state->parameters() + node.weight,
                                    Floats(call.out, frame));
  }
  device_.EmbeddingBackward(*context.stream, leaves, table[0], table[1], x, Floats(call.b, frame),
                            frame.leaf + node.weight, leaf_stride);
  FinishLeaves(call.node, context, frames);
}

void Executor::RunCopy(const Call& call, const StepContext& context, const Frame& frame,
                       int64_t rows) const {
  const NodeConstants& c = constants_[call.node];
  const bool forward = call.type == CallType::kCopyForward;
  float* out = Floats(call.out, frame);
  const device::StridedCopy& copy = c.copies[call.part];
  if (forward ? !c.fills : copy.elements() != copy.from_row) {
    const int64_t elements = rows * (forward ? copy.to_row : copy.from_row);
    device_.Zero(*context.stream, out, sizeof(float) * static_cast<size_t>(elements));
  }
  device_.CopyStrided(*context.stream, forward ? copy : copy.Reversed(), rows, Input(call.a, frame),
                      out);
}

void Executor::RunLoss(const Call& call, const StepContext& context,
                       absl::Span<const Frame> frames) const {
  const Frame& frame = frames[0];
  const device::Leaves leaves = LeavesOf(frames, 1);
  const int64_t features = constants_[call.node].out;
  device::Stream& stream = *context.stream;
  const int32_t* labels = frame.input->labels;
  const float* y = Input(call.a, frame);
  float* out = Floats(call.out, frame);
  switch (call.type) {
    case CallType::kSoftmaxCrossEntropy:
      return device_.SoftmaxCrossEntropy(stream, leaves, features, y, labels,
                                         static_cast<float>(program_->graph().label_smoothing),
                                         context.loss_scale, frame.result, out);
    case CallType::kOneHot:
      return device_.OneHot(stream, leaves.total(), features, labels, out);
    case CallType::kCountCorrect:
      return device_.CountCorrect(stream, leaves, features, y, labels, frame.result);
    case CallType::kSigmoidCrossEntropy:
      return device_.SigmoidCrossEntropy(stream, leaves, features, y, Input(call.b, frame),
                                         context.loss_scale, frame.result, out);
    default:
      return device_.MeanSquaredError(stream, leaves, features, y, Input(call.b, frame),
                                      context.loss_scale, frame.result, out);
  }
}

// A leaf's range is whole with its padding, which stays zero.
void Executor::ZeroPadding(int index, const StepContext& context, float* gradient) const {
  const Program::Node& node = program_->nodes()[index];
  const std::vector<spec::TensorSpec>& tensors = program_->layer(index).tensors;
  for (size_t i = 0; i < node.tensors.size(); ++i) {
    const int64_t begin = node.tensors[i] + spec::ElementCount(tensors[i].shape);
    const int64_t end = i + 1 < node.tensors.size() ? node.tensors[i + 1] : node.parameters_end;
    if (begin < end) {
      device_.Zero(*context.stream, gradient + begin,
                   sizeof(float) * static_cast<size_t>(end - begin));
    }
  }
}

void Executor::FinishLeaves(int index, const StepContext& context,
                            absl::Span<const Frame> frames) const {
  const Program::Node& node = program_->nodes()[index];
  for (const Frame& frame : frames) {
    if (!context.sink->LeavesStay()) ZeroPadding(index, context, frame.leaf);
    context.sink->Done(frame.input->shard, node.parameters_begin, node.parameters_end);
  }
}

}  // namespace lockstep::nn
