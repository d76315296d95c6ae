#include "worker/nn/executor.h"

#include <type_traits>
#include <utility>

#include "common/philox.h"
#include "worker/nn/copies.h"
#include "worker/nn/lstm_tensors.h"

namespace lockstep::nn {
Executor::Executor(std::shared_ptr<const Program> program, device::Device& device,
                   const Operations& operations, uint64_t seed, Lowering lowering,
                   MemoryPlan memory, void* scratch, int most_shards)
    : program_(std::move(program)),
      device_(device),
      operations_(operations),
      lowering_(std::move(lowering)),
      memory_(std::move(memory)),
      scratch_(scratch),
      leaf_rows_(most_shards),
      leaf_x_(most_shards),
      leaf_dy_(most_shards),
      part_dw_(device::kMostFoldBuffers),
      part_db_(device::kMostFoldBuffers) {
  for (int i = 0; i < static_cast<int>(program_->nodes().size()); ++i) {
    const Program::Node& node = program_->nodes()[i];
    const spec::Layer& layer = program_->layer(i);
    const std::vector<int64_t>& input = program_->shape(node.inputs[0]);
    NodeConstants c;
    c.in = spec::ElementCount(input);
    c.out = spec::ElementCount(node.output);
    c.channels = input.back();
    c.spatial = c.in / c.channels;
    if (input.size() == 3) {
      c.pool = {input[0], input[1], input[2], layer.kernel, layer.stride, layer.padding};
    }
    c.norm = {c.channels, node.fused_relu >= 0};
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

const float* Executor::Output(int call, const Frame& frame, int64_t* elements) const {
  const Call& c = lowering_.calls[call];
  if (c.out < 0) return nullptr;
  const size_t parts = constants_[c.node].copies.size();
  if (c.part + 1 < static_cast<int>(parts)) return nullptr;  // not yet whole
  *elements =
      lowering_.value_bytes[c.out] / static_cast<int64_t>(sizeof(float)) * frame.input->rows;
  return Floats(c.out, frame);
}

void Executor::Run(int index, const StepContext& context, const Merged& merged,
                   const Frame& frame) const {
  const Call& call = lowering_.calls[index];
  const NodeConstants& c = constants_[call.node];
  device::Stream& stream = *context.stream;
  const int64_t rows = frame.input->rows;
  const float* a = Input(call.a, frame);
  const float* b = Input(call.b, frame);
  float* out = Floats(call.out, frame);
  switch (call.type) {
    case CallType::kLinearForward:
    case CallType::kLinearBackwardInput:
    case CallType::kLinearBackwardWeight:
      return RunLinear(call, context, frame);
    case CallType::kMaxPoolForward:
      return device_.MaxPoolForward(stream, c.pool, rows, a, out, Bytes(call.out2, frame));
    case CallType::kMaxPoolBackward:
      return device_.MaxPoolBackward(stream, c.pool, rows, a, Bytes(call.b, frame), out);
    case CallType::kAveragePoolForward:
      return device_.AveragePoolForward(stream, c.pool, rows, a, out);
    case CallType::kAveragePoolBackward:
      return device_.AveragePoolBackward(stream, c.pool, rows, a, out);
    case CallType::kGlobalAveragePoolForward:
      return device_.GlobalAveragePoolForward(stream, rows, c.spatial, c.channels, a, out);
    case CallType::kGlobalAveragePoolBackward:
      return device_.GlobalAveragePoolBackward(stream, rows, c.spatial, c.channels, a, out);
    case CallType::kBatchNormMoments:
    case CallType::kBatchNormForward:
    case CallType::kBatchNormInference:
    case CallType::kBatchNormBackwardSums:
    case CallType::kBatchNormBackward:
    case CallType::kBatchNormAddForward:
    case CallType::kBatchNormAddInference:
    case CallType::kBatchNormGradient:
      return RunBatchNorm(call, context, merged, frame);
    case CallType::kCopyForward:
    case CallType::kCopyBackward:
      return RunCopy(call, context, frame);
    case CallType::kReluForward:
      return device_.ReluForward(stream, rows * c.out, a, out);
    case CallType::kReluBackward:
      return device_.ReluBackward(stream, rows * c.out, a, b, out);
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
      return RunLayerNorm(call, context, frame);
    case CallType::kEmbeddingForward:
    case CallType::kEmbeddingBackward:
      return RunEmbedding(call, context, frame);
    case CallType::kAdd:
      return device_.Add(stream, rows * c.out, a, b, out);
    case CallType::kMultiply:
      return device_.Multiply(stream, rows * c.out, a, b, out);
    case CallType::kDropout:
      return device_.Dropout(stream, rows * c.out, a, c.rate, c.key, context.scalars,
                             static_cast<uint64_t>(frame.input->first_position * c.out), out);
    case CallType::kLstmForward:
    case CallType::kLstmBackward:
      return RunLstm(call, context, frame);
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
      return RunLoss(call, context, frame);
  }
}

void Executor::RunAll(int index, const StepContext& context, const Merged& merged,
                      absl::Span<const Frame> frames) {
  const Call& call = lowering_.calls[index];
  if (operations_.dense(call.node) != nullptr) {
    if (call.type == CallType::kLinearBackwardWeight && context.sink->Fold() != nullptr) {
      return RunFoldedGradient(call, context, frames);
    }
    const bool rows_are_independent =
        call.type == CallType::kLinearForward || call.type == CallType::kLinearBackwardInput;
    if (rows_are_independent && IsContiguous(call.a, frames)) {
      ShardInput input = *frames[0].input;
      input.rows = 0;
      for (const Frame& frame : frames) input.rows += frame.input->rows;
      Frame together = frames[0];
      together.input = &input;
      return RunLinear(call, context, together);
    }
  }
  for (const Frame& frame : frames) Run(index, context, merged, frame);
}

// Values in the arena are; the data loader's shards may have gaps between them.
bool Executor::IsContiguous(int value, absl::Span<const Frame> frames) const {
  if (value != kDataValue) return true;
  const int64_t features = spec::ElementCount(program_->graph().data_shape);
  for (size_t i = 0; i + 1 < frames.size(); ++i) {
    const ShardInput& input = *frames[i].input;
    if (input.data + input.rows * features != frames[i + 1].input->data) return false;
  }
  return true;
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
    ZeroPadding(call.node, context, gradient);
  }
  operations_.dense(call.node)->BackwardWeight(*context.stream, fold, leaf_rows_.data(),
                                               leaf_x_.data(), leaf_dy_.data(), part_dw_.data(),
                                               part_db_.data(), scratch_);
  context.sink->DoneFolded(node.parameters_begin, node.parameters_end);
}

void Executor::RunLinear(const Call& call, const StepContext& context, const Frame& frame) const {
  const Program::Node& node = program_->nodes()[call.node];
  const int64_t rows = frame.input->rows;
  device::Stream& stream = *context.stream;
  auto run = [&](auto* operation) {
    const float* a = Input(call.a, frame);
    if (call.type == CallType::kLinearForward) {
      const float* bias = node.bias < 0 ? nullptr : context.state->parameters() + node.bias;
      operation->Forward(stream, rows, a, bias, Floats(call.out, frame), scratch_);
    } else if (call.type == CallType::kLinearBackwardInput) {
      operation->BackwardInput(stream, rows, a, Floats(call.out, frame), scratch_);
    } else {
      const float* dy = Floats(call.b, frame);
      float* dw = frame.leaf + node.weight;
      float* db = node.bias < 0 ? nullptr : frame.leaf + node.bias;
      if constexpr (std::is_same_v<decltype(operation), device::Dense*>) {
        operation->BackwardWeight(stream, device::kOneLeaf, &rows, &a, &dy, &dw, &db, scratch_);
      } else {
        operation->BackwardWeight(stream, rows, a, dy, dw, db, scratch_);
      }
      FinishLeaf(call.node, context, frame);
    }
  };
  if (device::Dense* dense = operations_.dense(call.node)) {
    run(dense);
  } else {
    run(operations_.conv2d(call.node));
  }
}

void Executor::RunLstm(const Call& call, const StepContext& context, const Frame& frame) const {
  device::Lstm* const lstm = operations_.lstm(call.node, call.part);
  device::Stream& stream = *context.stream;
  const int64_t rows = frame.input->rows;
  const float* x = Input(call.a, frame);
  float* out = Floats(call.out, frame);
  if (call.type == CallType::kLstmForward) {
    return lstm->Forward(stream, rows, x, out, Floats(call.out2, frame), scratch_);
  }
  const LstmTensors<float> leaf(*program_, call.node, call.part, frame.leaf);
  lstm->Backward(stream, rows, x, Floats(call.b, frame), Floats(call.c, frame), leaf.directions(),
                 out, scratch_);
  if (call.part == 0) FinishLeaf(call.node, context, frame);  // backward ends with the first layer
}

void Executor::RunBatchNorm(const Call& call, const StepContext& context, const Merged& merged,
                            const Frame& frame) const {
  const Program::Node& node = program_->nodes()[call.node];
  const NodeConstants& c = constants_[call.node];
  const MomentsSlice& slice = program_->moments()[node.moments];
  device::Stream& stream = *context.stream;
  const int64_t n = frame.input->rows * slice.spatial;
  const float* x = Input(call.a, frame);
  float* out = Floats(call.out, frame);
  if (call.type == CallType::kBatchNormMoments) {
    float* mean = frame.moments + slice.offset;
    return device_.BatchNormMoments(stream, c.norm, n, x, mean, mean + slice.channels);
  }
  const float* weight = context.state->parameters() + node.weight;
  const float* bias = context.state->parameters() + node.bias;
  const float* residual = Input(call.b, frame);  // of the calls that add
  if (call.type == CallType::kBatchNormInference || call.type == CallType::kBatchNormAddInference) {
    const float* statistics = context.state->statistics();
    if (call.type == CallType::kBatchNormAddInference) {
      return device_.BatchNormAddInference(stream, c.norm, n, x, statistics + slice.running_mean,
                                           statistics + slice.running_var, c.epsilon, weight, bias,
                                           residual, out);
    }
    return device_.BatchNormInference(stream, c.norm, n, x, statistics + slice.running_mean,
                                      statistics + slice.running_var, c.epsilon, weight, bias, out);
  }
  // The moments that normalize: the shard's own, or the whole batch's.
  const float* mean = (c.synchronized ? merged.moments : frame.moments) + slice.offset;
  const float* m2 = mean + slice.channels;
  const int64_t moments_n = c.synchronized ? merged.rows[node.moments] * slice.spatial : n;
  if (call.type == CallType::kBatchNormForward) {
    return device_.BatchNormForward(stream, c.norm, n, x, mean, m2, moments_n, c.epsilon, weight,
                                    bias, out);
  }
  if (call.type == CallType::kBatchNormAddForward) {
    return device_.BatchNormAddForward(stream, c.norm, n, x, mean, m2, moments_n, c.epsilon, weight,
                                       bias, residual, out);
  }
  const float* y = Floats(call.b, frame);
  const float* dy = Floats(call.c, frame);
  const device::BatchNormShape masked = {c.channels, call.b != kNoValue};
  if (call.type == CallType::kBatchNormBackwardSums || call.type == CallType::kBatchNormGradient) {
    float* sum_dy = frame.sums;
    float* sum_dy_xhat = sum_dy + slice.channels;
    if (call.type == CallType::kBatchNormGradient) {
      device_.BatchNormGradient(stream, masked, n, x, y, dy, Floats(call.d, frame), mean, m2,
                                moments_n, c.epsilon, out, sum_dy, sum_dy_xhat);
    } else {
      device_.BatchNormBackwardSums(stream, masked, n, x, y, dy, mean, m2, moments_n, c.epsilon,
                                    sum_dy, sum_dy_xhat);
    }
    // Leaves only add, so a leaf's share of the gradient is its own sums, also with whole-batch
    // moments.
    const size_t bytes = sizeof(float) * static_cast<size_t>(slice.channels);
    device_.Copy(stream, sum_dy_xhat, frame.leaf + node.weight, bytes);
    device_.Copy(stream, sum_dy, frame.leaf + node.bias, bytes);
    return FinishLeaf(call.node, context, frame);
  }
  const float* sums = c.synchronized ? merged.sums : frame.sums;
  device_.BatchNormBackward(stream, masked, n, x, y, dy, mean, m2, moments_n, c.epsilon, weight,
                            sums, sums + slice.channels, out);
}

void Executor::RunLayerNorm(const Call& call, const StepContext& context,
                            const Frame& frame) const {
  const Program::Node& node = program_->nodes()[call.node];
  const NodeConstants& c = constants_[call.node];
  const int64_t n = frame.input->rows * c.spatial;
  const float* x = Input(call.a, frame);
  const float* weight = context.state->parameters() + node.weight;
  device::Stream& stream = *context.stream;
  float* out = Floats(call.out, frame);
  if (call.type == CallType::kLayerNormForward) {
    return device_.LayerNormForward(stream, n, c.channels, x, c.epsilon, weight,
                                    context.state->parameters() + node.bias, out,
                                    Floats(call.out2, frame));
  }
  const float* stats = Floats(call.b, frame);
  const float* dy = Floats(call.c, frame);
  if (call.type == CallType::kLayerNormBackward) {
    return device_.LayerNormBackward(stream, n, c.channels, x, stats, weight, dy, out);
  }
  device_.LayerNormBackwardWeight(stream, n, c.channels, x, stats, dy, frame.leaf + node.weight,
                                  frame.leaf + node.bias);
  FinishLeaf(call.node, context, frame);
}

void Executor::RunEmbedding(const Call& call, const StepContext& context,
                            const Frame& frame) const {
  const Program::Node& node = program_->nodes()[call.node];
  const std::vector<int64_t>& table = program_->layer(call.node).tensors[0].shape;
  const int64_t n = frame.input->rows * constants_[call.node].in;
  const float* x = Input(call.a, frame);
  if (call.type == CallType::kEmbeddingForward) {
    return device_.EmbeddingForward(*context.stream, n, table[0], table[1], x,
                                    context.state->parameters() + node.weight,
                                    Floats(call.out, frame));
  }
  device_.EmbeddingBackward(*context.stream, n, table[0], table[1], x, Floats(call.b, frame),
                            frame.leaf + node.weight);
  FinishLeaf(call.node, context, frame);
}

void Executor::RunCopy(const Call& call, const StepContext& context, const Frame& frame) const {
  const NodeConstants& c = constants_[call.node];
  const int64_t rows = frame.input->rows;
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

void Executor::RunLoss(const Call& call, const StepContext& context, const Frame& frame) const {
  const int64_t rows = frame.input->rows, features = constants_[call.node].out;
  device::Stream& stream = *context.stream;
  const int32_t* labels = frame.input->labels;
  const float* y = Input(call.a, frame);
  float* out = Floats(call.out, frame);
  switch (call.type) {
    case CallType::kSoftmaxCrossEntropy:
      if (program_->graph().label_smoothing > 0) {
        return device_.SmoothedCrossEntropy(stream, rows, features, y, labels,
                                            static_cast<float>(program_->graph().label_smoothing),
                                            context.loss_scale, &frame.result->loss_sum,
                                            &frame.result->correct, out);
      }
      return device_.SoftmaxCrossEntropy(stream, rows, features, y, labels, context.loss_scale,
                                         &frame.result->loss_sum, &frame.result->correct, out);
    case CallType::kOneHot:
      return device_.OneHot(stream, rows, features, labels, out);
    case CallType::kCountCorrect:
      return device_.CountCorrect(stream, rows, features, y, labels, &frame.result->correct);
    case CallType::kSigmoidCrossEntropy:
      return device_.SigmoidCrossEntropy(stream, rows, features, y, Input(call.b, frame),
                                         context.loss_scale, &frame.result->loss_sum, out);
    default:
      return device_.MeanSquaredError(stream, rows, features, y, Input(call.b, frame),
                                      context.loss_scale, &frame.result->loss_sum, out);
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

void Executor::FinishLeaf(int index, const StepContext& context, const Frame& frame) const {
  ZeroPadding(index, context, frame.leaf);
  const Program::Node& node = program_->nodes()[index];
  context.sink->Done(frame.input->shard, node.parameters_begin, node.parameters_end);
}

}  // namespace lockstep::nn
