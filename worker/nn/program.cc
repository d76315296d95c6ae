#include "worker/nn/program.h"

#include <algorithm>
#include <utility>

#include "absl/memory/memory.h"
#include "common/digest.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "fmt/ranges.h"

namespace lockstep::nn {
namespace {

using spec::ElementCount;
using spec::Graph;
using spec::Layer;
using spec::LayerType;
using Shape = std::vector<int64_t>;

// A max pool keeps the winner's place in its window in one byte.
constexpr int64_t kLargestMaxPoolWindow = 256;

// From here on dense weights, read once a shard, cost more than activations that leave the cache.
constexpr int64_t kManyWeights = 1 << 15;

absl::Status Bad(const Layer& layer, const std::string& text) {
  return absl::InvalidArgumentError(fmt::format("layer {}: {}", layer.name, text));
}

int64_t AlignUp(int64_t n) {
  constexpr int64_t kAlignment = optim::FlatLayout::kAlignment;
  return (n + kAlignment - 1) / kAlignment * kAlignment;
}

bool IsPositive(const Shape& shape) {
  return !shape.empty() && std::all_of(shape.begin(), shape.end(), [](int64_t d) { return d > 0; });
}

// The shape that `layer` makes of its first input, empty where it cannot.
Shape InferOutput(const Layer& layer, const Shape& input) {
  switch (layer.type) {
    case LayerType::kDense:
    case LayerType::kConv2d:
    case LayerType::kMaxPool:
    case LayerType::kAveragePool: {
      if (layer.type == LayerType::kDense) {
        return layer.tensors.empty() || layer.tensors[0].shape.empty()
                   ? Shape()
                   : Shape{layer.tensors[0].shape[0]};
      }
      if (input.size() != 3 || layer.kernel < 1 || layer.stride < 1 || layer.padding < 0) return {};
      if (layer.dilation < 1) return {};
      const int64_t height = input[0] + 2 * layer.padding - layer.extent();
      const int64_t width = input[1] + 2 * layer.padding - layer.extent();
      if (height < 0 || width < 0) return {};
      int64_t channels = input[2];
      if (layer.type == LayerType::kConv2d) {
        if (layer.tensors.empty() || layer.tensors[0].shape.empty()) return {};
        if (layer.groups < 1 || channels % layer.groups != 0 ||
            layer.tensors[0].shape[0] % layer.groups != 0) {
          return {};
        }
        channels = layer.tensors[0].shape[0];
      } else if (layer.padding >= layer.kernel) {
        return {};
      }
      return {height / layer.stride + 1, width / layer.stride + 1, channels};
    }
    case LayerType::kGlobalAveragePool:
      return input.size() == 3 ? Shape{input[2]} : Shape();
    case LayerType::kPad:
      if (input.size() != 3 || layer.padding < 0 || layer.channels_before < 0 ||
          layer.channels_after < 0) {
        return {};
      }
      return {input[0] + 2 * layer.padding, input[1] + 2 * layer.padding,
              layer.channels_before + input[2] + layer.channels_after};
    case LayerType::kFlatten:
      return {ElementCount(input)};
    case LayerType::kLstm: {
      if (input.size() < 2 || layer.hidden < 1 || layer.layers < 1) return {};
      const int64_t out = (layer.bidirectional ? 2 : 1) * layer.hidden;
      return layer.sequence ? Shape{input[0], out} : Shape{out};
    }
    case LayerType::kReshape:
      return ElementCount(layer.output) == ElementCount(input) ? layer.output : Shape();
    case LayerType::kTranspose: {
      Shape sorted = layer.order, output;
      std::sort(sorted.begin(), sorted.end());
      for (size_t d = 0; d < sorted.size(); ++d) {
        if (sorted[d] != static_cast<int64_t>(d)) return {};
      }
      if (sorted.size() != input.size()) return {};
      for (const int64_t from : layer.order) output.push_back(input[from]);
      return output;
    }
    case LayerType::kEmbedding: {
      if (layer.tensors.empty() || layer.tensors[0].shape.size() != 2) return {};
      Shape output = input;
      if (input.size() == 3 && input[2] == 1) output.pop_back();
      output.push_back(layer.tensors[0].shape[1]);
      return output.size() <= 3 ? output : Shape();
    }
    case LayerType::kBatchNorm:
    case LayerType::kRelu:
    case LayerType::kTanh:
    case LayerType::kSigmoid:
    case LayerType::kAdd:
    case LayerType::kMultiply:
    case LayerType::kConcat:  // of its first input; CheckLayer adds the others
    case LayerType::kDropout:
    case LayerType::kLeakyRelu:
    case LayerType::kElu:
    case LayerType::kSoftplus:
    case LayerType::kSoftmax:
    case LayerType::kLayerNorm:
      return input;
  }
  return {};
}

bool TakesSeveral(LayerType type) {
  return type == LayerType::kAdd || type == LayerType::kMultiply || type == LayerType::kConcat;
}

// The tensors that `layer` must have.
std::vector<Shape> InferTensors(const Layer& layer, const Shape& input) {
  switch (layer.type) {
    case LayerType::kDense:
    case LayerType::kConv2d: {
      const int64_t out = layer.output.back();
      std::vector<Shape> shapes = {
          layer.type == LayerType::kDense
              ? Shape{out, ElementCount(input)}
              : Shape{out, layer.kernel, layer.kernel, input.back() / layer.groups}};
      if (layer.bias) shapes.push_back({out});
      return shapes;
    }
    case LayerType::kBatchNorm:
      return std::vector<Shape>(4, Shape{input.back()});
    case LayerType::kLstm: {
      const int64_t directions = layer.bidirectional ? 2 : 1, gates = 4 * layer.hidden;
      std::vector<Shape> shapes;
      for (int64_t i = 0; i < layer.layers * directions; ++i) {
        const int64_t in =
            i < directions ? ElementCount(input) / input[0] : directions * layer.hidden;
        shapes.insert(shapes.end(), {{gates, in}, {gates, layer.hidden}});
        if (layer.bias) shapes.insert(shapes.end(), 2, {gates});
      }
      return shapes;
    }
    case LayerType::kLayerNorm:
      return std::vector<Shape>(2, Shape{input.back()});
    case LayerType::kEmbedding:
      return {layer.tensors[0].shape};
    default:
      return {};
  }
}

absl::Status CheckLayer(const Graph& graph, int index) {
  const Layer& layer = graph.layers[index];
  const size_t wanted = TakesSeveral(layer.type) ? std::max<size_t>(layer.inputs.size(), 1) : 1;
  if (layer.inputs.size() != wanted) {
    return Bad(layer, fmt::format("found {} inputs; accepted: {}", layer.inputs.size(), wanted));
  }
  for (const int input : layer.inputs) {
    if (input != spec::kData && (input < 0 || input >= index)) {
      return Bad(layer, fmt::format("found input {}; accepted: layers before it", input));
    }
  }
  auto input_shape = [&](size_t i) -> const Shape& {
    const int input = layer.inputs[i];
    return input == spec::kData ? graph.data_shape : graph.layers[input].output;
  };
  const Shape& input = input_shape(0);
  Shape output = InferOutput(layer, input);
  for (size_t i = 1; i < layer.inputs.size(); ++i) {
    Shape other = input_shape(i);
    if (layer.type == LayerType::kConcat) {
      output.back() += other.back();
      other.back() = input.back();
    }
    if (other != input) return Bad(layer, "accepted: inputs of one shape");
  }
  if (!IsPositive(output) || output != layer.output) {
    return Bad(layer, fmt::format("found output {{{}}} of input {{{}}}; accepted: {{{}}}",
                                  fmt::join(layer.output, ", "), fmt::join(input, ", "),
                                  fmt::join(output, ", ")));
  }
  const std::vector<Shape> tensors = InferTensors(layer, input);
  bool same = layer.tensors.size() == tensors.size();
  for (size_t i = 0; same && i < tensors.size(); ++i) {
    const bool trainable = layer.type != LayerType::kBatchNorm || i < 2;
    same = layer.tensors[i].shape == tensors[i] && layer.tensors[i].trainable == trainable;
  }
  if (!same) return Bad(layer, "its tensors do not fit its shapes");
  if (layer.type == LayerType::kMaxPool && layer.kernel * layer.kernel > kLargestMaxPoolWindow) {
    return Bad(layer, fmt::format("found kernel {}; accepted: 1 to 16", layer.kernel));
  }
  if ((layer.type == LayerType::kDropout || layer.type == LayerType::kLstm) &&
      !(layer.rate >= 0 && layer.rate < 1)) {
    return Bad(layer, fmt::format("found rate {}; accepted: 0 to below 1", layer.rate));
  }
  return absl::OkStatus();
}

absl::Status CheckGraph(const Graph& graph) {
  if (graph.layers.empty()) return absl::InvalidArgumentError("the graph has no layer");
  if (!IsPositive(graph.data_shape)) return absl::InvalidArgumentError("the data has no shape");
  std::vector<int> uses(graph.layers.size(), 0);
  for (size_t i = 0; i < graph.layers.size(); ++i) {
    RETURN_IF_ERROR(CheckLayer(graph, static_cast<int>(i)));
    for (const int input : graph.layers[i].inputs) {
      if (input != spec::kData) ++uses[input];
    }
  }
  for (size_t i = 0; i + 1 < graph.layers.size(); ++i) {
    if (uses[i] == 0)
      return Bad(graph.layers[i], "nothing uses its output, and it is not the last");
  }
  const int64_t output = ElementCount(graph.layers.back().output);
  const bool labels =
      graph.loss == spec::LossType::kSoftmaxCrossEntropy || graph.target == spec::Target::kLabel;
  const int64_t wanted = labels ? graph.classes : ElementCount(graph.data_shape);
  if (output != wanted) {
    return Bad(graph.layers.back(),
               fmt::format("found {} outputs; accepted: {} to fit the loss", output, wanted));
  }
  return absl::OkStatus();
}

// Appends a tensor and returns its offset.
int64_t Append(const spec::TensorSpec& tensor, optim::FlatLayout* layout) {
  const int64_t offset = layout->size, size = ElementCount(tensor.shape);
  layout->tensors.push_back({tensor.name, tensor.shape, offset, size, tensor.decays, tensor.init,
                             TensorKey(tensor.name), tensor.rate_multiplier,
                             tensor.decay_multiplier});
  layout->size = AlignUp(offset + size);
  return offset;
}

bool CanFuseRelu(LayerType type) {
  return type == LayerType::kDense || type == LayerType::kConv2d || type == LayerType::kBatchNorm;
}

// By layer: for a batch_norm that ends in an add's pass, the add's index, otherwise -1. Of two
// norms the later one.
std::vector<int> FindResiduals(const std::vector<Layer>& layers, const std::vector<int>& uses) {
  std::vector<int> add_of(layers.size(), -1);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& add = layers[i];
    if (add.type != LayerType::kAdd || add.inputs.size() != 2) continue;
    const int input = std::max(add.inputs[0], add.inputs[1]);
    if (input != spec::kData && layers[input].type == LayerType::kBatchNorm && uses[input] == 1) {
      add_of[input] = static_cast<int>(i);
    }
  }
  return add_of;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Program>> Program::Compile(spec::Graph graph) {
  RETURN_IF_ERROR(CheckGraph(graph));
  auto program = absl::WrapUnique(new Program());
  program->graph_ = std::move(graph);
  const std::vector<Layer>& layers = program->graph_.layers;

  std::vector<int> uses(layers.size(), 0);
  for (const Layer& layer : layers) {
    for (const int input : layer.inputs) {
      if (input != spec::kData) ++uses[input];
    }
  }
  const std::vector<int> add_of = FindResiduals(layers, uses);
  std::vector<int> norm_of(layers.size(), -1);  // of an add that ends a norm's pass, the norm
  for (size_t i = 0; i < layers.size(); ++i) {
    if (add_of[i] >= 0) norm_of[add_of[i]] = static_cast<int>(i);
  }
  std::vector<int> node_of(layers.size(), -1);
  std::vector<Node>& nodes = program->nodes_;
  for (size_t at = 0; at < layers.size(); ++at) {
    if (add_of[at] >= 0) continue;  // where the add stands
    const size_t i = norm_of[at] >= 0 ? static_cast<size_t>(norm_of[at]) : at;
    const Layer& layer = layers[i];
    const int input = layer.inputs[0];
    if (layer.type == LayerType::kRelu && input != spec::kData && uses[input] == 1 &&
        (CanFuseRelu(layers[input].type) || norm_of[input] >= 0)) {
      node_of[i] = node_of[input];
      nodes[node_of[i]].fused_relu = static_cast<int>(i);
      continue;
    }
    Node node;
    node.layer = static_cast<int>(i);
    node.output = layer.output;
    node.needs_input_gradient = false;
    std::vector<int> inputs = layer.inputs;
    if (i != at) {
      node.fused_add = static_cast<int>(at);
      const std::vector<int>& sum = layers[at].inputs;
      inputs.push_back(sum[0] == static_cast<int>(i) ? sum[1] : sum[0]);
    }
    for (const int from : inputs) {
      node.inputs.push_back(from == spec::kData ? spec::kData : node_of[from]);
      node.needs_input_gradient |=
          from != spec::kData && nodes[node_of[from]].needs_output_gradient;
    }
    node.needs_output_gradient = node.needs_input_gradient || !layer.tensors.empty();
    if (layer.type == LayerType::kBatchNorm) {
      MomentsSlice slice;
      slice.layer = static_cast<int>(i);
      slice.channels = layer.output.back();
      slice.spatial = ElementCount(layer.output) / slice.channels;
      slice.offset = program->moments_size_;
      slice.momentum = static_cast<float>(layer.momentum);
      slice.running_mean = Append(layer.tensors[2], &program->statistics_);
      slice.running_var = Append(layer.tensors[3], &program->statistics_);
      node.moments = static_cast<int>(program->moments_.size());
      slice.population = layer.statistics == spec::Statistics::kPopulation;
      program->moments_.push_back(slice);
      program->moments_size_ += 2 * slice.channels;
      program->has_synchronized_norm_ |= layer.sync == spec::Sync::kBatch;
      program->has_population_norm_ |= slice.population;
    }
    node_of[at] = static_cast<int>(nodes.size());
    nodes.push_back(std::move(node));
  }
  // The longest run of flat nodes at the end, if it has the weights that make it worth while.
  int64_t weights = 0;
  size_t first_flat = nodes.size();
  while (first_flat > 0 && nodes[first_flat - 1].output.size() == 1) {
    const Layer& layer = layers[nodes[--first_flat].layer];
    if (layer.type == LayerType::kDense) weights += ElementCount(layer.tensors[0].shape);
  }
  for (size_t i = first_flat; weights >= kManyWeights && i < nodes.size(); ++i) {
    nodes[i].layerwise = true;
  }
  // Backward finishes the last node first.
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
    const std::vector<spec::TensorSpec>& tensors = layers[node->layer].tensors;
    node->parameters_begin = program->parameters_.size;
    for (const spec::TensorSpec& tensor : tensors) {
      if (tensor.trainable) node->tensors.push_back(Append(tensor, &program->parameters_));
    }
    if (!node->tensors.empty()) node->weight = node->tensors[0];
    if (node->tensors.size() > 1) node->bias = node->tensors[1];
    node->parameters_end = program->parameters_.size;
  }
  return std::shared_ptr<const Program>(std::move(program));
}

device::Conv2dShape Program::Conv2dShapeOf(int node,
                                           const std::vector<device::ElementType>& stored) const {
  const Node& n = nodes_[node];
  const spec::Layer& of = layer(node);
  const std::vector<int64_t>& input = shape(n.inputs[0]);
  device::Conv2dShape result;
  result.height = input[0];
  result.width = input[1];
  result.in = input[2];
  result.out = n.output[2];
  result.kernel = of.kernel;
  result.stride = of.stride;
  result.padding = of.padding;
  result.dilation = of.dilation;
  result.groups = of.groups;
  result.bias = of.bias;
  if (n.fused_relu >= 0) result.activation = device::Activation::kRelu;
  result.precision = precision();
  if (n.inputs[0] != spec::kData) result.x_type = stored[n.inputs[0]];
  result.y_type = stored[node];
  return result;
}

std::vector<device::ElementType> Program::StoredTypes(bool stores_bf16) const {
  using device::ElementType;
  const bool some = stores_bf16 && precision() == device::Precision::kBf16;
  std::vector<ElementType> types(nodes_.size(), some ? ElementType::kBf16 : ElementType::kFp32);
  if (!some) return types;
  bool changed = true;
  const auto be_fp32 = [&](int node) {
    if (node == spec::kData || types[node] == ElementType::kFp32) return;
    types[node] = ElementType::kFp32;
    changed = true;
  };
  const auto is_fp32 = [&](int node) {
    return node == spec::kData || types[node] == ElementType::kFp32;
  };
  be_fp32(static_cast<int>(nodes_.size()) - 1);  // the loss reads it
  while (changed) {
    changed = false;
    for (int node = 0; node < static_cast<int>(nodes_.size()); ++node) {
      const Node& n = nodes_[node];
      switch (layer(node).type) {
        case spec::LayerType::kConv2d:
          if (device::CanStoreBf16(Conv2dShapeOf(node, types))) break;  // on either side by itself
          be_fp32(n.inputs[0]);
          be_fp32(node);
          break;
        case spec::LayerType::kGlobalAveragePool:
          be_fp32(node);
          break;
        case spec::LayerType::kBatchNorm:
        case spec::LayerType::kMaxPool:
        case spec::LayerType::kAveragePool:
        case spec::LayerType::kRelu:
        case spec::LayerType::kAdd:
        case spec::LayerType::kFlatten:
        case spec::LayerType::kReshape: {
          bool all = is_fp32(node);
          for (const int input : n.inputs) all = all || is_fp32(input);
          if (!all) break;
          be_fp32(node);
          for (const int input : n.inputs) be_fp32(input);
          break;
        }
        default:
          be_fp32(node);
          for (const int input : n.inputs) be_fp32(input);
      }
    }
  }
  return types;
}

const std::string& Program::node_name(int node) const {
  const Node& n = nodes_[node];
  return graph_.layers[std::max({n.layer, n.fused_add, n.fused_relu})].name;
}

}  // namespace lockstep::nn
