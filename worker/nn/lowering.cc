#include "worker/nn/lowering.h"

#include "common/spec/graph.h"

namespace lockstep::nn {
namespace {

using spec::LayerType;

class Lowerer {
 public:
  Lowerer(const Program& program, bool training, bool layerwise, bool stores_bf16)
      : program_(program),
        training_(training),
        always_layerwise_(layerwise),
        stored_(program.StoredTypes(stores_bf16)),
        outputs_(program.nodes().size(), kNoValue),
        gradients_(program.nodes().size(), kNoValue),
        extra_(program.nodes().size(), kNoValue),
        more_(program.nodes().size(), kNoValue),
        prefixes_(program.nodes().size()),
        lstm_inputs_(program.nodes().size()),
        reserves_(program.nodes().size()) {}

  Lowering Run() {
    const int nodes = static_cast<int>(program_.nodes().size());
    for (int node = 0; node < nodes; ++node) {
      BeginNode(node);
      Forward(node);
    }
    result_.forward_calls = static_cast<int>(result_.calls.size());
    const int last = nodes - 1;
    const bool backward = training_ && program_.nodes()[last].needs_output_gradient;
    gradients_[last] = Loss(last, backward);
    if (backward) {
      for (int node = last; node >= 0; --node) {
        if (!program_.nodes()[node].needs_output_gradient) continue;
        BeginNode(node);
        Backward(node);
      }
    }
    EndSegment(Exchange::kNone, -1);
    result_.weights_beside = training_ && always_layerwise_;
    return std::move(result_);
  }

 private:
  int64_t Elements(int node) const { return spec::ElementCount(program_.shape(node)); }
  int ValueOf(int node) const { return node == spec::kData ? kDataValue : outputs_[node]; }

  device::ElementType TypeOf(int node) const {
    return node == spec::kData ? device::ElementType::kFp32 : stored_[node];
  }
  int NewFloats(int64_t elements) { return NewElements(elements, device::ElementType::kFp32); }
  int NewElements(int64_t elements, device::ElementType type) {
    const int value = NewBytes(elements * device::ElementBytes(type));
    result_.value_types[value] = type;
    return value;
  }
  int NewBytes(int64_t bytes) {
    result_.value_bytes.push_back(bytes);
    result_.value_types.push_back(device::ElementType::kFp32);
    return static_cast<int>(result_.value_bytes.size()) - 1;
  }

  // Emits a call that makes a new value of the shape and type of `shape_of`'s output, and returns
  // the value.
  int Emit(CallType type, int node, int shape_of, int a, int b = kNoValue, int c = kNoValue) {
    const int out = NewElements(Elements(shape_of), TypeOf(shape_of));
    result_.calls.push_back({type, node, a, b, c, out});
    return out;
  }
  void EmitWithoutValue(CallType type, int node, int a, int b = kNoValue, int c = kNoValue) {
    result_.calls.push_back({type, node, a, b, c});
  }

  void EndSegment(Exchange exchange, int moments) {
    const int begin = result_.segments.empty() ? 0 : result_.segments.back().end;
    const int end = static_cast<int>(result_.calls.size());
    result_.segments.push_back({begin, end, exchange, moments, layerwise_});
  }

  // A new segment where the way to walk changes.
  void BeginNode(int node) {
    const bool layerwise = always_layerwise_ || (training_ && program_.nodes()[node].layerwise);
    if (layerwise == layerwise_) return;
    const int begin = result_.segments.empty() ? 0 : result_.segments.back().end;
    if (begin < static_cast<int>(result_.calls.size())) EndSegment(Exchange::kNone, -1);
    layerwise_ = layerwise;
  }

  bool IsSynchronized(int node) const { return program_.layer(node).sync == spec::Sync::kBatch; }
  // A norm whose two passes of a direction are one call: a launch where shards are small.
  bool IsWhole(int node) const { return always_layerwise_ && !IsSynchronized(node); }

  // Of the last call, a whole norm of `node` that reads `value`: the one before it may have made
  // that, of a dense.
  void JoinToProduct(CallType type, int node, int value) {
    if (result_.calls.size() < 2) return;
    Call& product = result_.calls[result_.calls.size() - 2];
    const std::vector<int64_t>& shape = program_.shape(node);
    product.then_norm = product.type == type && product.out == value &&
                        program_.layer(product.node).type == LayerType::kDense &&
                        spec::ElementCount(shape) == shape.back() &&
                        TypeOf(node) == device::ElementType::kFp32;
  }

  // Of the last call, a norm's gradient that adds `value`: the one before it may have made that, of
  // a convolution.
  void JoinToConvolution(int value) {
    Call& product = result_.calls[result_.calls.size() - 2];
    product.then_norm = product.type == CallType::kLinearBackwardInput && product.out == value &&
                        program_.layer(product.node).type == LayerType::kConv2d;
  }

  // Whether a norm's forward writes where its relu lets through, a bit an element, for a backward
  // that would else read all of y: where it adds a residual, so that it is not computed again.
  bool KeepsAbove(int node) const {
    const Program::Node& n = program_.nodes()[node];
    return training_ && n.fused_add >= 0 && n.fused_relu >= 0 && NeedsGradient(n.inputs[1]) &&
           TypeOf(node) == device::ElementType::kBf16 && program_.shape(node).back() % 8 == 0;
  }

  void Forward(int node) {
    const Program::Node& n = program_.nodes()[node];
    const int x = ValueOf(n.inputs[0]);
    int& y = outputs_[node];
    switch (program_.layer(node).type) {
      case LayerType::kDense:
      case LayerType::kConv2d:
        y = Emit(CallType::kLinearForward, node, node, x);
        break;
      case LayerType::kMaxPool:
        y = Emit(CallType::kMaxPoolForward, node, node, x);
        extra_[node] = result_.calls.back().out2 = NewBytes(Elements(node));
        break;
      case LayerType::kAveragePool:
        y = Emit(CallType::kAveragePoolForward, node, node, x);
        break;
      case LayerType::kGlobalAveragePool:
        y = Emit(CallType::kGlobalAveragePoolForward, node, node, x);
        break;
      case LayerType::kBatchNorm:
        if (training_ && !IsWhole(node)) {
          EmitWithoutValue(CallType::kBatchNormMoments, node, x);
          if (IsSynchronized(node)) EndSegment(Exchange::kMoments, n.moments);
        }
        if (n.fused_add >= 0) {
          y = Emit(training_ ? CallType::kBatchNormAddForward : CallType::kBatchNormAddInference,
                   node, node, x, ValueOf(n.inputs[1]));
        } else {
          y = Emit(training_ ? CallType::kBatchNormForward : CallType::kBatchNormInference, node,
                   node, x);
        }
        if (KeepsAbove(node))
          extra_[node] = result_.calls.back().out2 = NewBytes(Elements(node) / 8);
        if (training_ && IsWhole(node)) {
          result_.calls.back().whole = true;
          if (n.fused_add < 0) JoinToProduct(CallType::kLinearForward, node, x);
        }
        break;
      case LayerType::kRelu:
        y = Emit(CallType::kReluForward, node, node, x);
        break;
      case LayerType::kTanh:
        y = Emit(CallType::kTanhForward, node, node, x);
        break;
      case LayerType::kSigmoid:
        y = Emit(CallType::kSigmoidForward, node, node, x);
        break;
      case LayerType::kAdd:
        y = x;
        for (size_t i = 1; i < n.inputs.size(); ++i) {
          y = Emit(CallType::kAdd, node, node, y, ValueOf(n.inputs[i]));
        }
        break;
      case LayerType::kMultiply:
        y = x;
        for (size_t i = 1; i < n.inputs.size(); ++i) {
          prefixes_[node].push_back(y);
          y = Emit(CallType::kMultiply, node, node, y, ValueOf(n.inputs[i]));
        }
        break;
      case LayerType::kConcat:
        y = Emit(CallType::kCopyForward, node, node, x);
        for (size_t i = 1; i < n.inputs.size(); ++i) {
          EmitWithoutValue(CallType::kCopyForward, node, ValueOf(n.inputs[i]));
          result_.calls.back().out = y;
          result_.calls.back().part = static_cast<int>(i);
        }
        break;
      case LayerType::kLeakyRelu:
        y = Emit(CallType::kLeakyReluForward, node, node, x);
        break;
      case LayerType::kElu:
        y = Emit(CallType::kEluForward, node, node, x);
        break;
      case LayerType::kSoftplus:
        y = Emit(CallType::kSoftplusForward, node, node, x);
        break;
      case LayerType::kSoftmax:
        y = Emit(CallType::kSoftmaxForward, node, node, x);
        break;
      case LayerType::kLayerNorm:
        y = Emit(CallType::kLayerNormForward, node, node, x);
        extra_[node] = result_.calls.back().out2 =
            NewFloats(2 * Elements(node) / program_.shape(node).back());
        break;
      case LayerType::kEmbedding:
        y = Emit(CallType::kEmbeddingForward, node, node, x);
        break;
      case LayerType::kFlatten:
      case LayerType::kReshape:
        y = x;
        break;
      case LayerType::kDropout:
        y = Drops(node) ? Emit(CallType::kDropout, node, node, x) : x;
        break;
      case LayerType::kPad:
      case LayerType::kTranspose:
        y = Emit(CallType::kCopyForward, node, node, x);
        break;
      case LayerType::kLstm:
        y = LstmForward(node, x);
        break;
    }
  }

  // Emits a call of one layer of an lstm; a negative number of elements: without a value.
  int EmitPart(CallType type, int node, int part, int64_t elements, int a, int b = kNoValue,
               int c = kNoValue) {
    const int out = elements < 0 ? kNoValue : NewFloats(elements);
    result_.calls.push_back({type, node, a, b, c, out});
    result_.calls.back().part = part;
    return out;
  }

  int LstmForward(int node, int x) {
    const int layers = static_cast<int>(program_.layer(node).layers);
    for (int part = 0; part < layers; ++part) {
      const device::LstmShape shape = LstmShapeOf(program_, node, part);
      lstm_inputs_[node].push_back(x);
      x = EmitPart(CallType::kLstmForward, node, part, shape.outputs(), x);
      reserves_[node].push_back(result_.calls.back().out2 = NewFloats(shape.reserve()));
      if (part + 1 < layers && Drops(node)) {
        x = EmitPart(CallType::kLstmDropout, node, part, shape.outputs(), x);
      }
    }
    return x;
  }

  void LstmBackward(int node, int dy) {
    const Program::Node& n = program_.nodes()[node];
    for (int part = static_cast<int>(program_.layer(node).layers) - 1; part >= 0; --part) {
      const device::LstmShape shape = LstmShapeOf(program_, node, part);
      const int64_t inputs = shape.steps * shape.in;
      dy = EmitPart(CallType::kLstmBackward, node, part,
                    part > 0 || n.needs_input_gradient ? inputs : -1, lstm_inputs_[node][part], dy,
                    reserves_[node][part]);
      if (part > 0 && Drops(node)) {
        dy = EmitPart(CallType::kLstmDropout, node, part - 1, inputs, dy);
      }
    }
    if (n.needs_input_gradient) Contribute(n.inputs[0], dy);
  }

  bool Drops(int node) const { return training_ && program_.layer(node).rate > 0; }

  // Returns the gradient of the output.
  int Loss(int last, bool backward) {
    const spec::Graph& graph = program_.graph();
    const int y = outputs_[last];
    const int gradient = backward ? NewFloats(Elements(last)) : kNoValue;
    if (graph.loss == spec::LossType::kSoftmaxCrossEntropy) {
      EmitWithoutValue(CallType::kSoftmaxCrossEntropy, last, y);
      result_.calls.back().out = gradient;
      return gradient;
    }
    int target = kDataValue;
    if (graph.target == spec::Target::kLabel) {
      target = Emit(CallType::kOneHot, last, last, kNoValue);
      EmitWithoutValue(CallType::kCountCorrect, last, y);
    }
    EmitWithoutValue(graph.loss == spec::LossType::kSigmoidCrossEntropy
                         ? CallType::kSigmoidCrossEntropy
                         : CallType::kMeanSquaredError,
                     last, y, target);
    result_.calls.back().out = gradient;
    return gradient;
  }

  bool NeedsGradient(int node) const {
    return node != spec::kData && program_.nodes()[node].needs_output_gradient;
  }

  // Adds a contribution to the gradient of a node's output.
  void Contribute(int node, int value) {
    if (!NeedsGradient(node)) return;
    int &gradient = gradients_[node], &more = more_[node];
    if (gradient == kNoValue) {
      gradient = value;
    } else if (program_.layer(node).type != LayerType::kBatchNorm) {
      gradient = Emit(CallType::kAdd, node, node, gradient, value);
    } else {
      if (more != kNoValue) gradient = Emit(CallType::kAdd, node, node, gradient, more);
      more = value;
    }
  }

  void Backward(int node) {
    const Program::Node& n = program_.nodes()[node];
    const int input = n.inputs[0];
    const int x = ValueOf(input), y = outputs_[node];
    int dy = gradients_[node];
    auto contribute = [&](CallType type, int a, int b = kNoValue, int c = kNoValue) {
      if (n.needs_input_gradient) Contribute(input, Emit(type, node, input, a, b, c));
    };
    switch (program_.layer(node).type) {
      case LayerType::kDense:
      case LayerType::kConv2d:
        if (n.fused_relu >= 0) dy = Emit(CallType::kReluBackward, node, node, y, dy);
        EmitWithoutValue(CallType::kLinearBackwardWeight, node, x, dy);
        contribute(CallType::kLinearBackwardInput, dy);
        break;
      case LayerType::kMaxPool:
        contribute(CallType::kMaxPoolBackward, dy, extra_[node]);
        break;
      case LayerType::kAveragePool:
        contribute(CallType::kAveragePoolBackward, dy);
        break;
      case LayerType::kGlobalAveragePool:
        contribute(CallType::kGlobalAveragePoolBackward, dy);
        break;
      case LayerType::kBatchNorm: {
        int mask = n.fused_relu >= 0 ? y : kNoValue;
        const bool residual = n.fused_add >= 0 && NeedsGradient(n.inputs[1]);
        bool whole = false;
        if (more_[node] != kNoValue || (residual && mask != kNoValue)) {
          const bool above = KeepsAbove(node);
          const int masked =
              Emit(CallType::kBatchNormGradient, node, node, x, above ? extra_[node] : mask, dy);
          result_.calls.back().above = above;
          result_.calls.back().d = more_[node];
          if (above) JoinToConvolution(more_[node]);
          dy = masked;
          mask = kNoValue;
        } else if (IsWhole(node) && NeedsGradient(input)) {
          whole = true;
        } else {
          EmitWithoutValue(CallType::kBatchNormBackwardSums, node, x, mask, dy);
        }
        if (!whole) result_.calls.back().goes_on = NeedsGradient(input);
        if (residual) Contribute(n.inputs[1], dy);
        if (NeedsGradient(input) && IsSynchronized(node)) EndSegment(Exchange::kSums, n.moments);
        if (NeedsGradient(input)) {
          const int dx = Emit(CallType::kBatchNormBackward, node, input, x, mask, dy);
          result_.calls.back().whole = whole;
          if (whole && !residual) JoinToProduct(CallType::kLinearBackwardInput, node, dy);
          Contribute(input, dx);
        }
        break;
      }
      case LayerType::kRelu:
        contribute(CallType::kReluBackward, y, dy);
        break;
      case LayerType::kTanh:
        contribute(CallType::kTanhBackward, y, dy);
        break;
      case LayerType::kSigmoid:
        contribute(CallType::kSigmoidBackward, y, dy);
        break;
      case LayerType::kAdd:
        for (const int from : n.inputs) Contribute(from, dy);
        break;
      case LayerType::kMultiply:
        for (size_t i = n.inputs.size() - 1; i > 0; --i) {
          const int before = prefixes_[node][i - 1];
          if (NeedsGradient(n.inputs[i])) {
            Contribute(n.inputs[i], Emit(CallType::kMultiply, node, node, dy, before));
          }
          dy = Emit(CallType::kMultiply, node, node, dy, ValueOf(n.inputs[i]));
        }
        Contribute(input, dy);
        break;
      case LayerType::kConcat:
        for (size_t i = 0; i < n.inputs.size(); ++i) {
          if (!NeedsGradient(n.inputs[i])) continue;
          const int part = Emit(CallType::kCopyBackward, node, n.inputs[i], dy);
          result_.calls.back().part = static_cast<int>(i);
          Contribute(n.inputs[i], part);
        }
        break;
      case LayerType::kLeakyRelu:
        contribute(CallType::kLeakyReluBackward, y, dy);
        break;
      case LayerType::kElu:
        contribute(CallType::kEluBackward, y, dy);
        break;
      case LayerType::kSoftplus:
        contribute(CallType::kSoftplusBackward, x, dy);
        break;
      case LayerType::kSoftmax:
        contribute(CallType::kSoftmaxBackward, y, dy);
        break;
      case LayerType::kLayerNorm:
        EmitWithoutValue(CallType::kLayerNormBackwardWeight, node, x, extra_[node], dy);
        contribute(CallType::kLayerNormBackward, x, extra_[node], dy);
        break;
      case LayerType::kEmbedding:
        EmitWithoutValue(CallType::kEmbeddingBackward, node, x, dy);
        break;
      case LayerType::kFlatten:
      case LayerType::kReshape:
        Contribute(input, dy);
        break;
      case LayerType::kTranspose:
      case LayerType::kPad:
        contribute(CallType::kCopyBackward, dy);
        break;
      case LayerType::kDropout:
        if (Drops(node)) {
          contribute(CallType::kDropout, dy);
        } else {
          Contribute(input, dy);
        }
        break;
      case LayerType::kLstm:
        LstmBackward(node, dy);
        break;
    }
  }

  const Program& program_;
  const bool training_;
  const bool always_layerwise_;
  const std::vector<device::ElementType> stored_;  // by node
  Lowering result_;
  bool layerwise_ = false;                // of the segment being made
  std::vector<int> outputs_, gradients_;  // by node
  std::vector<int> extra_;  // by node: a max pool's argmax, a layer norm's statistics, where a
                            // norm's relu lets through
  std::vector<int> more_;   // by node: a second gradient, which a batch_norm adds itself
  std::vector<std::vector<int>> prefixes_;  // by node: of a multiply, products of its first inputs
  std::vector<std::vector<int>> lstm_inputs_, reserves_;  // by node and layer of an lstm
};

}  // namespace

bool IsElementwise(CallType type) {
  switch (type) {
    case CallType::kReluForward:
    case CallType::kReluBackward:
    case CallType::kTanhForward:
    case CallType::kTanhBackward:
    case CallType::kSigmoidForward:
    case CallType::kSigmoidBackward:
    case CallType::kLeakyReluForward:
    case CallType::kLeakyReluBackward:
    case CallType::kEluForward:
    case CallType::kEluBackward:
    case CallType::kSoftplusForward:
    case CallType::kSoftplusBackward:
    case CallType::kSoftmaxForward:
    case CallType::kSoftmaxBackward:
    case CallType::kMultiply:
    case CallType::kAdd:
    case CallType::kDropout:
    case CallType::kBatchNormBackward:
    case CallType::kBatchNormAddForward:
    case CallType::kBatchNormAddInference:
    case CallType::kBatchNormInference:
    case CallType::kBatchNormGradient:
    case CallType::kLstmDropout:
      return true;
    default:
      return false;
  }
}

device::LstmShape LstmShapeOf(const Program& program, int node, int part) {
  const spec::Layer& layer = program.layer(node);
  const std::vector<int64_t>& input = program.shape(program.nodes()[node].inputs[0]);
  device::LstmShape shape;
  shape.steps = input[0];
  shape.hidden = layer.hidden;
  shape.bidirectional = layer.bidirectional;
  shape.bias = layer.bias;
  shape.sequence = layer.sequence || part + 1 < layer.layers;
  shape.in = part == 0 ? spec::ElementCount(input) / input[0] : shape.out();
  shape.precision = program.precision();
  return shape;
}

Lowering Lower(const Program& program, bool training, bool layerwise, bool stores_bf16) {
  return Lowerer(program, training, layerwise, stores_bf16).Run();
}

}  // namespace lockstep::nn
