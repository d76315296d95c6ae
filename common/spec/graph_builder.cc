#include "common/spec/graph_builder.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <queue>

#include "fmt/format.h"
#include "fmt/ranges.h"

namespace lockstep::spec {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kLargestTensor = int64_t{1} << 31;
// A max_pool keeps the winner's place in its window in one byte (worker/device).
constexpr int64_t kLargestMaxPool = 16;

std::string Text(const Shape& shape) { return fmt::format("{{{}}}", fmt::join(shape, ", ")); }

// Product of non-negative factors, or -1 beyond the limit.
int64_t Product(std::initializer_list<int64_t> factors, int64_t limit) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > limit) return -1;
  }
  return product;
}

bool TooLarge(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t dimension : shape) {
    product = Product({product, dimension}, kLargestTensor);
    if (product < 0) return true;
  }
  return false;
}

// Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural
// networks", eq. 16: variance 2 / (fan_in + fan_out). He et al. 2015, "Delving Deep into
// Rectifiers", eq. 10: variance 2 / fan_in. Uniform on [-a, a) has variance a^2 / 3.
Initializer Resolve(const v1::InitializerSpec& init, int64_t fan_in, int64_t fan_out) {
  if (init.type() == "zeros") return {Initializer::Type::kZeros, 0};
  if (init.type() == "normal") return {Initializer::Type::kNormal, init.std()};
  if (init.type() == "uniform") return {Initializer::Type::kUniform, init.limit()};
  const double variance = init.type() == "he"
                              ? 2.0 / static_cast<double>(fan_in)
                              : 2.0 / (static_cast<double>(fan_in) + static_cast<double>(fan_out));
  if (init.distribution() == "normal") return {Initializer::Type::kNormal, std::sqrt(variance)};
  return {Initializer::Type::kUniform, std::sqrt(3 * variance)};
}

LayerType TypeOf(const std::string& name) {
  for (int i = 0; i < kLayerTypes; ++i) {
    const auto type = static_cast<LayerType>(i);
    if (name == LayerTypeName(type)) return type;
  }
  return LayerType::kDropout;  // unreachable: CheckValues accepts only names of types
}

class GraphBuilder {
 public:
  GraphBuilder(const v1::JobSpec& spec, const LayerList& layers, const LayerSource& source,
               Graph* graph)
      : spec_(spec), layers_(layers), source_(source), graph_(*graph) {}

  MaybeProblem Build() {
    graph_ = Graph{};
    graph_.data_shape.assign(spec_.data().shape().begin(), spec_.data().shape().end());
    graph_.classes = spec_.data().classes();
    const std::string& loss = spec_.loss().type();
    graph_.loss = loss == "mean_squared_error"      ? LossType::kMeanSquaredError
                  : loss == "sigmoid_cross_entropy" ? LossType::kSigmoidCrossEntropy
                                                    : LossType::kSoftmaxCrossEntropy;
    graph_.label_smoothing = spec_.loss().label_smoothing();
    const std::string& precision = spec_.train().precision();
    graph_.precision = precision == "bf16"   ? Precision::kBf16
                       : precision == "tf32" ? Precision::kTf32
                                             : Precision::kFp32;
    graph_.target = spec_.loss().target() == "input" ? Target::kInput : Target::kLabel;
    LOCKSTEP_RETURN_IF_PROBLEM(Sort());
    LOCKSTEP_RETURN_IF_PROBLEM(CheckOneOutput());
    int64_t flops = 0;
    for (const int index : order_) {
      LOCKSTEP_RETURN_IF_PROBLEM(AddLayer(index));
      if (__builtin_add_overflow(flops, graph_.layers.back().flops, &flops))
        return At(index, "", "the model needs more than 2^63 operations per sample");
    }
    return CheckOutput();
  }

 private:
  Problem At(int index, const std::string& attribute, const std::string& text) const {
    return source_.At(layers_, index, attribute, text);
  }

  // Kahn's algorithm, the earliest in the list first, so that a sorted list stays as it is.
  MaybeProblem Sort() {
    std::map<std::string, int> by_name;
    for (int i = 0; i < layers_.size(); ++i) by_name[layers_[i].name()] = i;
    inputs_.resize(layers_.size());
    consumers_.resize(layers_.size());
    std::vector<int> missing(layers_.size(), 0);
    for (int i = 0; i < layers_.size(); ++i) {
      for (const std::string& name : layers_[i].inputs()) {
        const int input = name == "data" ? kData : by_name.at(name);
        inputs_[i].push_back(input);
        if (input == kData) continue;
        consumers_[input].push_back(i);
        ++missing[i];
      }
    }
    std::priority_queue<int, std::vector<int>, std::greater<int>> ready;
    for (int i = 0; i < layers_.size(); ++i) {
      if (missing[i] == 0) ready.push(i);
    }
    position_.assign(layers_.size(), -1);
    while (!ready.empty()) {
      const int index = ready.top();
      ready.pop();
      position_[index] = static_cast<int>(order_.size());
      order_.push_back(index);
      for (const int consumer : consumers_[index]) {
        if (--missing[consumer] == 0) ready.push(consumer);
      }
    }
    if (static_cast<int>(order_.size()) == layers_.size()) return std::nullopt;
    return CycleProblem();
  }

  // Walks back along unsorted inputs until a layer repeats.
  Problem CycleProblem() const {
    int at = 0;
    while (position_[at] >= 0) ++at;
    std::vector<int> path;
    while (std::find(path.begin(), path.end(), at) == path.end()) {
      path.push_back(at);
      at = *std::find_if(inputs_[at].begin(), inputs_[at].end(),
                         [&](int input) { return input != kData && position_[input] < 0; });
    }
    std::vector<int> cycle(std::find(path.begin(), path.end(), at), path.end());
    std::reverse(cycle.begin(), cycle.end());
    // Begins with the first in the list, so that the message does not depend on the walk.
    std::rotate(cycle.begin(), std::min_element(cycle.begin(), cycle.end()), cycle.end());
    constexpr size_t kShown = 24;
    std::string names;
    for (size_t i = 0; i < std::min(cycle.size(), kShown); ++i)
      names += layers_[cycle[i]].name() + " -> ";
    if (cycle.size() > kShown) names += "... -> ";
    return At(cycle[0], "inputs",
              fmt::format("found the cycle {}{}; accepted: inputs without one", names,
                          layers_[cycle[0]].name()));
  }

  // A layer that nothing consumes is the output; the last in the list is taken as the meant one.
  MaybeProblem CheckOneOutput() const {
    int output = -1, unused = -1;
    for (int i = 0; i < layers_.size(); ++i) {
      if (!consumers_[i].empty()) continue;
      unused = output;
      output = i;
    }
    if (unused < 0) return std::nullopt;
    return At(unused, "",
              fmt::format("nothing uses its output ({}), and {} is an output too; accepted: one "
                          "output, the last layer",
                          layers_[unused].name(), layers_[output].name()));
  }

  const Shape& InputShape(int index, int k = 0) const {
    const int input = inputs_[index][k];
    return input == kData ? graph_.data_shape : graph_.layers[position_[input]].output;
  }

  MaybeProblem AddLayer(int index) {
    const v1::LayerSpec& spec = layers_[index];
    Layer layer;
    layer.name = spec.name();
    layer.type = TypeOf(spec.type());
    for (const int input : inputs_[index])
      layer.inputs.push_back(input == kData ? kData : position_[input]);
    LOCKSTEP_RETURN_IF_PROBLEM(Infer(index, &layer));
    for (TensorSpec& tensor : layer.tensors) {
      if (spec.has_learning_rate_multiplier())
        tensor.rate_multiplier = spec.learning_rate_multiplier();
      if (spec.has_decay_multiplier()) tensor.decay_multiplier = spec.decay_multiplier();
    }
    if (TooLarge(layer.output)) {
      return At(
          index, "",
          fmt::format("its output {} has more than 2^31 elements per sample", Text(layer.output)));
    }
    for (const TensorSpec& tensor : layer.tensors) {
      if (!TooLarge(tensor.shape)) continue;
      return At(
          index,
          layer.type == LayerType::kConv2d      ? "filters"
          : layer.type == LayerType::kLstm      ? "hidden"
          : layer.type == LayerType::kEmbedding ? "vocabulary"
                                                : "units",
          fmt::format("the weight {} would have more than 2^31 elements", Text(tensor.shape)));
    }
    LOCKSTEP_RETURN_IF_PROBLEM(CountFlops(index, &layer));
    graph_.layers.push_back(std::move(layer));
    return std::nullopt;
  }

  // The fewest samples that a batch norm sees at once in a full batch: a microbatch of a shard, or
  // with sync: batch one microbatch of all shards.
  int64_t FewestRows(Sync sync) const {
    const v1::TrainSpec& train = spec_.train();
    const int64_t base = train.batch() / train.shards(), larger = train.batch() % train.shards();
    int64_t fewest = train.batch();
    for (int64_t m = 0; m < train.accumulate(); ++m) {
      const auto rows = [&](int64_t shard) {
        return shard / train.accumulate() + (m < shard % train.accumulate() ? 1 : 0);
      };
      const int64_t all = larger * rows(base + 1) + (train.shards() - larger) * rows(base);
      const int64_t one = rows(base) > 0 || larger == 0 ? rows(base) : rows(base + 1);
      const int64_t seen = sync == Sync::kBatch ? all : one;
      if (seen > 0) fewest = std::min(fewest, seen);
    }
    return fewest;
  }

  // Normalized by itself, a single value is 0 whatever it is, and has no gradient.
  MaybeProblem CheckSeveralValues(int index, const Layer& layer) const {
    if (FewestRows(layer.sync) * (ElementCount(layer.output) / layer.output.back()) > 1)
      return std::nullopt;
    const v1::TrainSpec& train = spec_.train();
    const bool shard = layer.sync == Sync::kShard;
    return At(
        index, "sync",
        fmt::format(
            "{} would normalize single values, and learn nothing: a {} of batch {} "
            "in {} shards{} is 1 sample; accepted: {}a larger batch, or fewer shards{}",
            shard ? "shard" : "batch",
            train.accumulate() > 1 ? "microbatch"
            : shard                ? "shard"
                                   : "batch",
            train.batch(), train.shards(),
            train.accumulate() > 1 ? fmt::format(" and accumulate {}", train.accumulate()) : "",
            shard ? "sync: batch, " : "", train.accumulate() > 1 ? " or microbatches" : ""));
  }

  MaybeProblem Infer(int index, Layer* layer) const {
    const v1::LayerSpec& spec = layers_[index];
    const Shape& input = InputShape(index);
    switch (layer->type) {
      case LayerType::kDense:
        return InferDense(index, spec, layer);
      case LayerType::kConv2d:
      case LayerType::kMaxPool:
      case LayerType::kAveragePool:
        return InferWindow(index, spec, layer);
      case LayerType::kGlobalAveragePool:
        LOCKSTEP_RETURN_IF_PROBLEM(NeedsImage(index));
        layer->output = {input[2]};
        return std::nullopt;
      case LayerType::kBatchNorm: {
        layer->output = input;
        layer->sync = spec.sync() == "shard" ? Sync::kShard : Sync::kBatch;
        layer->statistics =
            spec.statistics() == "population" ? Statistics::kPopulation : Statistics::kRunning;
        layer->momentum = spec.momentum();
        layer->epsilon = spec.epsilon();
        LOCKSTEP_RETURN_IF_PROBLEM(CheckSeveralValues(index, *layer));
        const Shape channels = {input.back()};
        const Initializer ones{Initializer::Type::kOnes, 0}, zeros;
        layer->tensors = {{layer->name + ".weight", channels, ones},
                          {layer->name + ".bias", channels, zeros},
                          {layer->name + ".running_mean", channels, zeros, /*trainable=*/false},
                          {layer->name + ".running_var", channels, ones, /*trainable=*/false}};
        return std::nullopt;
      }
      case LayerType::kAdd:
      case LayerType::kMultiply:
        for (int k = 1; k < static_cast<int>(inputs_[index].size()); ++k) {
          if (InputShape(index, k) == input) continue;
          return At(
              index, fmt::format("inputs.{}", k),
              fmt::format("{} is {} and {} is {}; accepted: inputs of one shape", spec.inputs(0),
                          Text(input), spec.inputs(k), Text(InputShape(index, k))));
        }
        layer->output = input;
        return std::nullopt;
      case LayerType::kFlatten:
        layer->output = {ElementCount(input)};
        return std::nullopt;
      case LayerType::kLstm:
        return InferLstm(index, spec, layer);
      case LayerType::kDropout:
        layer->rate = spec.rate();
        layer->output = input;
        return std::nullopt;
      case LayerType::kPad:
        return InferPad(index, spec, layer);
      case LayerType::kConcat:
        return InferConcat(index, layer);
      case LayerType::kReshape:
        return InferReshape(index, spec, layer);
      case LayerType::kTranspose:
        return InferTranspose(index, spec, layer);
      case LayerType::kEmbedding:
        return InferEmbedding(index, spec, layer);
      case LayerType::kLayerNorm: {
        layer->output = input;
        layer->epsilon = spec.epsilon();
        const Initializer ones{Initializer::Type::kOnes, 0}, zeros;
        layer->tensors = {{layer->name + ".weight", {input.back()}, ones},
                          {layer->name + ".bias", {input.back()}, zeros}};
        return std::nullopt;
      }
      case LayerType::kLeakyRelu:
        layer->slope = spec.slope();
        layer->output = input;
        return std::nullopt;
      case LayerType::kElu:
        layer->alpha = spec.alpha();
        layer->output = input;
        return std::nullopt;
      case LayerType::kRelu:
      case LayerType::kTanh:
      case LayerType::kSigmoid:
      case LayerType::kSoftplus:
      case LayerType::kSoftmax:
        layer->output = input;
        return std::nullopt;
    }
    return std::nullopt;
  }

  MaybeProblem NeedsImage(int index) const {
    if (InputShape(index).size() == 3) return std::nullopt;
    return At(
        index, "",
        fmt::format("{} needs an input {{height, width, channels}}, but {} is {}",
                    layers_[index].type(), layers_[index].inputs(0), Text(InputShape(index))));
  }

  static void AddWeights(const v1::LayerSpec& spec, Shape weight, int64_t fan_in, int64_t fan_out,
                         Layer* layer) {
    const int64_t channels = weight[0];
    layer->bias = spec.bias();
    layer->tensors.push_back({layer->name + ".weight", std::move(weight),
                              Resolve(spec.weight_init(), fan_in, fan_out), /*trainable=*/true,
                              /*decays=*/true});
    if (!spec.bias()) return;
    layer->tensors.push_back(
        {layer->name + ".bias", {channels}, Resolve(spec.bias_init(), fan_in, fan_out)});
  }

  MaybeProblem InferDense(int index, const v1::LayerSpec& spec, Layer* layer) const {
    const Shape& input = InputShape(index);
    if (input.size() != 1) {
      return At(index, "",
                fmt::format("dense needs an input {{features}}, but {} is {}; put a "
                            "flatten before it",
                            spec.inputs(0), Text(input)));
    }
    layer->output = {spec.units()};
    AddWeights(spec, {spec.units(), input[0]}, input[0], spec.units(), layer);
    return std::nullopt;
  }

  // Tensors by layer, then by direction, under torch.nn.LSTM's names.
  MaybeProblem InferLstm(int index, const v1::LayerSpec& spec, Layer* layer) const {
    const Shape& input = InputShape(index);
    if (input.size() < 2) {
      return At(index, "",
                fmt::format("lstm needs an input {{time, features}} or an image {{height, width, "
                            "channels}}, whose rows are the steps, but {} is {}",
                            spec.inputs(0), Text(input)));
    }
    layer->hidden = spec.hidden();
    layer->layers = spec.layers();
    layer->bidirectional = spec.bidirectional();
    layer->sequence = spec.output() == "sequence";
    layer->bias = spec.bias();
    layer->rate = spec.dropout();
    const int64_t hidden = layer->hidden, gates = 4 * hidden;
    const int64_t out = (layer->bidirectional ? 2 : 1) * hidden;
    layer->output = layer->sequence ? Shape{input[0], out} : Shape{out};
    int64_t in = ElementCount(input) / input[0];
    for (int64_t k = 0; k < layer->layers; ++k, in = out) {
      for (const char* direction : {"", "_reverse"}) {
        if (*direction != 0 && !layer->bidirectional) continue;
        const auto name = [&](const char* tensor) {
          return fmt::format("{}.{}_l{}{}", layer->name, tensor, k, direction);
        };
        for (const auto& [tensor, fan_in] :
             {std::pair("weight_ih", in), std::pair("weight_hh", hidden)}) {
          layer->tensors.push_back({name(tensor),
                                    {gates, fan_in},
                                    Resolve(spec.weight_init(), fan_in, hidden),
                                    /*trainable=*/true,
                                    /*decays=*/true});
        }
        if (!layer->bias) continue;
        for (const char* tensor : {"bias_ih", "bias_hh"}) {
          layer->tensors.push_back({name(tensor), {gates}, Resolve(spec.bias_init(), 1, hidden)});
        }
      }
    }
    return std::nullopt;
  }

  // Both products, the sum of the biases, five activations and four products and sums a unit and
  // step; -1 beyond the limit.
  static int64_t LstmFlops(const Layer& layer, const Shape& input, int64_t limit) {
    const int64_t directions = layer.bidirectional ? 2 : 1;
    const int64_t out = directions * layer.hidden;
    int64_t flops = 0, in = ElementCount(input) / input[0];
    for (int64_t k = 0; k < layer.layers; ++k, in = out) {
      const int64_t unit = 8 * (in + layer.hidden) + 9 + (layer.bias ? 4 : 0);
      const int64_t part = Product({input[0], out, unit}, limit);
      if (part < 0 || __builtin_add_overflow(flops, part, &flops)) return -1;
    }
    return flops;
  }

  // conv2d and the two pools with a window.
  MaybeProblem InferWindow(int index, const v1::LayerSpec& spec, Layer* layer) const {
    LOCKSTEP_RETURN_IF_PROBLEM(NeedsImage(index));
    const bool convolution = layer->type == LayerType::kConv2d;
    const Shape& input = InputShape(index);
    const int64_t kernel = spec.kernel(), stride = spec.stride(), padding = spec.padding();
    if (layer->type == LayerType::kMaxPool && kernel > kLargestMaxPool) {
      return At(index, "kernel",
                fmt::format("found {}; accepted: 1 to {} for max_pool", kernel, kLargestMaxPool));
    }
    // A window that lay in the padding alone would have no maximum.
    if (!convolution && padding >= kernel) {
      return At(
          index, "padding",
          fmt::format("found {}; accepted: 0 to {}, less than the kernel", padding, kernel - 1));
    }
    const int64_t padded = std::min(input[0], input[1]) + 2 * padding;
    if (kernel > padded) {
      return At(index, "kernel",
                fmt::format("found {}, larger than the padded input ({} by {}); accepted: 1 to {}",
                            kernel, input[0] + 2 * padding, input[1] + 2 * padding, padded));
    }
    layer->kernel = kernel;
    layer->stride = stride;
    layer->padding = padding;
    if (convolution) {
      layer->dilation = spec.dilation();
      layer->groups = spec.groups();
      if (kernel == 1 && layer->dilation > 1) {
        return At(index, "dilation",
                  fmt::format("found {}, which changes nothing with kernel 1; accepted: 1",
                              layer->dilation));
      }
      if (kernel > 1 && layer->dilation > (padded - 1) / (kernel - 1)) {
        return At(index, "dilation",
                  fmt::format("found {}: the window would reach beyond the padded input ({} by "
                              "{}); accepted: 1 to {}",
                              spec.dilation(), input[0] + 2 * padding, input[1] + 2 * padding,
                              (padded - 1) / (kernel - 1)));
      }
      if (input[2] % layer->groups != 0 || spec.filters() % layer->groups != 0) {
        return At(index, "groups",
                  fmt::format("found {}; accepted: a divisor of the input's channels ({}) and of "
                              "filters ({})",
                              layer->groups, input[2], spec.filters()));
      }
    }
    const int64_t extent = layer->extent();
    // Rounds down: a window that would reach beyond the padding is left out.
    const auto out = [&](int64_t in) { return (in + 2 * padding - extent) / stride + 1; };
    layer->output = {out(input[0]), out(input[1]), convolution ? spec.filters() : input[2]};
    if (!convolution) return std::nullopt;
    const Shape weight = {spec.filters(), kernel, kernel, input[2] / layer->groups};
    if (TooLarge(weight)) {
      const bool kernel_alone = TooLarge({kernel, kernel, input[2]});
      return At(index, kernel_alone ? "kernel" : "filters",
                fmt::format("the weight {} would have more than 2^31 elements", Text(weight)));
    }
    const int64_t window = kernel * kernel;
    AddWeights(spec, weight, window * weight[3], window * (spec.filters() / layer->groups), layer);
    return std::nullopt;
  }

  MaybeProblem InferPad(int index, const v1::LayerSpec& spec, Layer* layer) const {
    LOCKSTEP_RETURN_IF_PROBLEM(NeedsImage(index));
    const Shape& input = InputShape(index);
    layer->padding = spec.padding();
    layer->channels_before = spec.channels_before();
    layer->channels_after = spec.channels_after();
    layer->output = {input[0] + 2 * layer->padding, input[1] + 2 * layer->padding,
                     layer->channels_before + input[2] + layer->channels_after};
    return std::nullopt;
  }

  MaybeProblem InferConcat(int index, Layer* layer) const {
    const v1::LayerSpec& spec = layers_[index];
    layer->output = InputShape(index);
    for (size_t k = 1; k < inputs_[index].size(); ++k) {
      Shape other = InputShape(index, static_cast<int>(k));
      const int64_t channels = other.back();
      other.back() = InputShape(index).back();
      if (other != InputShape(index)) {
        return At(index, fmt::format("inputs.{}", k),
                  fmt::format("{} is {} and {} is {}; accepted: inputs that differ in the last "
                              "dimension only",
                              spec.inputs(0), Text(InputShape(index)), spec.inputs(k),
                              Text(InputShape(index, static_cast<int>(k)))));
      }
      layer->output.back() += channels;
    }
    return std::nullopt;
  }

  MaybeProblem InferReshape(int index, const v1::LayerSpec& spec, Layer* layer) const {
    const Shape& input = InputShape(index);
    layer->output.assign(spec.shape().begin(), spec.shape().end());
    if (!TooLarge(layer->output) && ElementCount(layer->output) == ElementCount(input)) {
      return std::nullopt;
    }
    return At(index, "shape",
              fmt::format("found {}, but {} is {}; accepted: {} elements", Text(layer->output),
                          spec.inputs(0), Text(input), ElementCount(input)));
  }

  MaybeProblem InferTranspose(int index, const v1::LayerSpec& spec, Layer* layer) const {
    const Shape& input = InputShape(index);
    layer->order.assign(spec.order().begin(), spec.order().end());
    Shape sorted = layer->order, all(input.size());
    std::sort(sorted.begin(), sorted.end());
    for (size_t d = 0; d < all.size(); ++d) all[d] = static_cast<int64_t>(d);
    if (sorted != all) {
      return At(index, "order",
                fmt::format("found [{}], but {} is {}; accepted: {}", fmt::join(layer->order, ", "),
                            spec.inputs(0), Text(input),
                            all.size() < 2 ? "an input of 2 or 3 dimensions"
                                           : fmt::format("0 to {}, each once", all.size() - 1)));
    }
    for (const int64_t from : layer->order) layer->output.push_back(input[from]);
    return std::nullopt;
  }

  MaybeProblem InferEmbedding(int index, const v1::LayerSpec& spec, Layer* layer) const {
    // Its gradient ends here: nothing with weights may be before it.
    int before = inputs_[index][0];
    while (before != kData) {
      const Layer& view = graph_.layers[position_[before]];
      if (view.type != LayerType::kFlatten && view.type != LayerType::kReshape &&
          view.type != LayerType::kTranspose) {
        return At(index, "inputs.0",
                  fmt::format("found {}, a {}; accepted: data, or a flatten, reshape or transpose "
                              "of it",
                              layers_[before].name(), LayerTypeName(view.type)));
      }
      before = inputs_[before][0];
    }
    const Shape& input = InputShape(index);
    layer->output = input;
    if (input.size() == 3) {
      if (input[2] != 1) {
        return At(
            index, "",
            fmt::format("embedding needs an input {{n}}, {{n, m}} or {{height, width, 1}}, but "
                        "{} is {}; put a reshape before it",
                        spec.inputs(0), Text(input)));
      }
      layer->output.back() = spec.units();
    } else {
      layer->output.push_back(spec.units());
    }
    layer->tensors = {{layer->name + ".weight",
                       {spec.vocabulary(), spec.units()},
                       Resolve(spec.weight_init(), 1, 1)}};
    return std::nullopt;
  }

  MaybeProblem CountFlops(int index, Layer* layer) const {
    const int64_t n = ElementCount(layer->output);
    constexpr int64_t kLimit = std::numeric_limits<int64_t>::max();
    int64_t flops = 0;
    switch (layer->type) {
      case LayerType::kDense:
        flops = Product({2, n, InputShape(index)[0]}, kLimit);
        break;
      case LayerType::kConv2d:
        flops = Product({2, n, layer->kernel, layer->kernel, InputShape(index)[2] / layer->groups},
                        kLimit);
        break;
      case LayerType::kMaxPool:
      case LayerType::kAveragePool:
        flops = Product({n, layer->kernel, layer->kernel}, kLimit);
        break;
      case LayerType::kGlobalAveragePool:
        flops = ElementCount(InputShape(index));
        break;
      case LayerType::kBatchNorm:
        flops = 2 * n;  // as in inference: one multiply-add
        break;
      case LayerType::kAdd:
      case LayerType::kMultiply:
        flops = n * (static_cast<int64_t>(layer->inputs.size()) - 1);
        break;
      case LayerType::kRelu:
      case LayerType::kTanh:
      case LayerType::kSigmoid:
      case LayerType::kDropout:
      case LayerType::kLeakyRelu:
      case LayerType::kElu:
      case LayerType::kSoftplus:
        flops = n;
        break;
      case LayerType::kLstm:
        flops = LstmFlops(*layer, InputShape(index), kLimit);
        break;
      case LayerType::kSoftmax:
        flops = 3 * n;  // exponential, sum, division
        break;
      case LayerType::kLayerNorm:
        flops = 5 * n;  // mean, squares, and the multiply-add of each
        break;
      case LayerType::kFlatten:
      case LayerType::kPad:
      case LayerType::kConcat:
      case LayerType::kEmbedding:
      case LayerType::kReshape:
      case LayerType::kTranspose:
        break;
    }
    if (flops >= 0 && layer->bias && layer->type != LayerType::kLstm)
      flops += flops <= kLimit - n ? n : -1 - flops;
    if (flops < 0) return At(index, "", "needs more than 2^63 operations per sample");
    layer->flops = flops;
    return std::nullopt;
  }

  MaybeProblem CheckOutput() const {
    const int last = order_.back();
    const Shape& output = graph_.layers.back().output;
    const std::string loss = spec_.loss().type();
    const bool dense = graph_.layers.back().type == LayerType::kDense;
    const std::string attribute = dense ? "units" : "";
    if (graph_.target == Target::kInput) {
      const int64_t count = ElementCount(graph_.data_shape);
      if (ElementCount(output) == count) return std::nullopt;
      return At(last, attribute,
                fmt::format("the output {} has {} elements, but the data {} has {}; accepted: as "
                            "many, loss.target is input",
                            Text(output), ElementCount(output), Text(graph_.data_shape), count));
    }
    const Shape wanted = {graph_.classes};
    if (output == wanted) return std::nullopt;
    const bool flat = output.size() == 1;
    return At(last, attribute,
              fmt::format("the output is {}; accepted: {}, data.classes, for {}{}", Text(output),
                          Text(wanted), loss,
                          flat ? "" : "; put a flatten or global_average_pool before the end"));
  }

  const v1::JobSpec& spec_;
  const LayerList& layers_;
  const LayerSource& source_;
  Graph& graph_;
  std::vector<std::vector<int>> inputs_, consumers_;  // by index in the list
  std::vector<int> order_;                            // list indices, sorted
  std::vector<int> position_;                         // list index -> place in order_
};

}  // namespace

MaybeProblem MakeGraph(const v1::JobSpec& spec, const LayerList& layers, const LayerSource& source,
                       Graph* graph) {
  return GraphBuilder(spec, layers, source, graph).Build();
}

}  // namespace lockstep::spec
