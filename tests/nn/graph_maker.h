// Builds Graphs by hand for tests: shapes and tensors inferred as BuildGraph does, every tensor
// drawn at random so that no gradient vanishes by symmetry.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "common/spec/graph.h"

namespace lockstep::nn {

class GraphMaker {
 public:
  using Shape = std::vector<int64_t>;

  GraphMaker(Shape data_shape, int64_t classes) {
    graph_.data_shape = std::move(data_shape);
    graph_.classes = classes;
  }

  // Each returns the layer's number. `input` defaults to the layer before.
  static constexpr int kPrevious = -2;
  int Dense(int64_t units, bool bias = true, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kDense, {input});
    const int64_t in = spec::ElementCount(ShapeOf(layer.inputs[0]));
    layer.bias = bias;
    layer.output = {units};
    AddWeights({units, in}, in);
    return Last();
  }
  int Conv2d(int64_t filters, int64_t kernel, int64_t stride = 1, int64_t padding = 0,
             bool bias = true, int input = kPrevious) {
    spec::Layer& layer = Window(spec::LayerType::kConv2d, kernel, stride, padding, input);
    const int64_t in = ShapeOf(layer.inputs[0])[2];
    layer.bias = bias;
    layer.output[2] = filters;
    AddWeights({filters, kernel, kernel, in}, kernel * kernel * in);
    return Last();
  }
  int Conv2dOfParts(int64_t filters, int64_t kernel, int64_t padding, int64_t dilation,
                    int64_t groups, bool bias = true, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kConv2d, {input});
    const int64_t in = ShapeOf(layer.inputs[0])[2];
    layer.kernel = kernel;
    layer.padding = padding;
    layer.dilation = dilation;
    layer.groups = groups;
    layer.bias = bias;
    for (int axis = 0; axis < 2; ++axis) layer.output[axis] += 2 * padding - layer.extent() + 1;
    layer.output[2] = filters;
    AddWeights({filters, kernel, kernel, in / groups}, kernel * kernel * in / groups);
    return Last();
  }
  int MaxPool(int64_t kernel, int64_t stride, int64_t padding = 0, int input = kPrevious) {
    Window(spec::LayerType::kMaxPool, kernel, stride, padding, input);
    return Last();
  }
  int AveragePool(int64_t kernel, int64_t stride, int64_t padding = 0, int input = kPrevious) {
    Window(spec::LayerType::kAveragePool, kernel, stride, padding, input);
    return Last();
  }
  int GlobalAveragePool(int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kGlobalAveragePool, {input});
    layer.output = {ShapeOf(layer.inputs[0])[2]};
    return Last();
  }
  int BatchNorm(spec::Sync sync, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kBatchNorm, {input});
    layer.sync = sync;
    const Shape channels = {layer.output.back()};
    const spec::Initializer uniform{spec::Initializer::Type::kUniform, 1.5};
    const spec::Initializer zeros, ones{spec::Initializer::Type::kOnes, 0};
    layer.tensors = {{layer.name + ".weight", channels, uniform},
                     {layer.name + ".bias", channels, uniform},
                     {layer.name + ".running_mean", channels, zeros, /*trainable=*/false},
                     {layer.name + ".running_var", channels, ones, /*trainable=*/false}};
    return Last();
  }
  int Relu(int input = kPrevious) { return Plain(spec::LayerType::kRelu, {input}); }
  int Tanh(int input = kPrevious) { return Plain(spec::LayerType::kTanh, {input}); }
  int Sigmoid(int input = kPrevious) { return Plain(spec::LayerType::kSigmoid, {input}); }
  int AddLayers(std::vector<int> inputs) { return Plain(spec::LayerType::kAdd, std::move(inputs)); }
  int Flatten(int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kFlatten, {input});
    layer.output = {spec::ElementCount(layer.output)};
    return Last();
  }
  int Pad(int64_t padding, int64_t before, int64_t after, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kPad, {input});
    layer.padding = padding;
    layer.channels_before = before;
    layer.channels_after = after;
    layer.output[0] += 2 * padding;
    layer.output[1] += 2 * padding;
    layer.output[2] += before + after;
    return Last();
  }
  int Multiply(std::vector<int> inputs) {
    return Plain(spec::LayerType::kMultiply, std::move(inputs));
  }
  int Concat(std::vector<int> inputs) {
    spec::Layer& layer = Add(spec::LayerType::kConcat, std::move(inputs));
    layer.output.back() = 0;
    for (const int input : layer.inputs) layer.output.back() += ShapeOf(input).back();
    return Last();
  }
  int LeakyRelu(double slope, int input = kPrevious) {
    Add(spec::LayerType::kLeakyRelu, {input}).slope = slope;
    return Last();
  }
  int Elu(double alpha, int input = kPrevious) {
    Add(spec::LayerType::kElu, {input}).alpha = alpha;
    return Last();
  }
  int Softplus(int input = kPrevious) { return Plain(spec::LayerType::kSoftplus, {input}); }
  int Softmax(int input = kPrevious) { return Plain(spec::LayerType::kSoftmax, {input}); }
  int LayerNorm(int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kLayerNorm, {input});
    const spec::Initializer uniform{spec::Initializer::Type::kUniform, 1.5};
    layer.tensors = {{layer.name + ".weight", {layer.output.back()}, uniform},
                     {layer.name + ".bias", {layer.output.back()}, uniform}};
    return Last();
  }
  int Embedding(int64_t vocabulary, int64_t features, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kEmbedding, {input});
    if (layer.output.size() == 3) layer.output.pop_back();
    layer.output.push_back(features);
    layer.tensors = {
        {layer.name + ".weight", {vocabulary, features}, {spec::Initializer::Type::kUniform, 1.0}}};
    return Last();
  }
  int Reshape(Shape shape, int input = kPrevious) {
    Add(spec::LayerType::kReshape, {input}).output = std::move(shape);
    return Last();
  }
  int Transpose(Shape order, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kTranspose, {input});
    const Shape in = layer.output;
    for (size_t d = 0; d < order.size(); ++d) layer.output[d] = in[order[d]];
    layer.order = std::move(order);
    return Last();
  }
  int Dropout(double rate, int input = kPrevious) {
    Add(spec::LayerType::kDropout, {input}).rate = rate;
    return Last();
  }

  struct LstmOptions {
    int64_t layers = 1;
    bool bidirectional = false, sequence = false, bias = true;
    double dropout = 0;
  };
  int Lstm(int64_t hidden, const LstmOptions& options, int input = kPrevious) {
    spec::Layer& layer = Add(spec::LayerType::kLstm, {input});
    layer.hidden = hidden;
    layer.layers = options.layers;
    layer.bidirectional = options.bidirectional;
    layer.sequence = options.sequence;
    layer.bias = options.bias;
    layer.rate = options.dropout;
    const Shape from = layer.output;
    const int64_t out = (options.bidirectional ? 2 : 1) * hidden;
    layer.output = options.sequence ? Shape{from[0], out} : Shape{out};
    int64_t in = spec::ElementCount(from) / from[0];
    for (int64_t k = 0; k < options.layers; ++k, in = out) {
      for (const std::string end : {"", "_reverse"}) {
        if (!end.empty() && !options.bidirectional) continue;
        const std::string tail = "_l" + std::to_string(k) + end;
        const auto add = [&](const std::string& name, Shape shape, double limit, bool decays) {
          layer.tensors.push_back({layer.name + name + tail,
                                   std::move(shape),
                                   {spec::Initializer::Type::kUniform, limit},
                                   /*trainable=*/true,
                                   decays});
        };
        add(".weight_ih", {4 * hidden, in}, std::sqrt(3.0 / static_cast<double>(in)), true);
        add(".weight_hh", {4 * hidden, hidden}, std::sqrt(3.0 / static_cast<double>(hidden)), true);
        if (!options.bias) continue;
        add(".bias_ih", {4 * hidden}, 0.5, false);
        add(".bias_hh", {4 * hidden}, 0.5, false);
      }
    }
    return Last();
  }

  GraphMaker& MeanSquaredError(spec::Target target) {
    graph_.loss = spec::LossType::kMeanSquaredError;
    graph_.target = target;
    return *this;
  }
  GraphMaker& SigmoidCrossEntropy(spec::Target target) {
    graph_.loss = spec::LossType::kSigmoidCrossEntropy;
    graph_.target = target;
    return *this;
  }
  GraphMaker& SmoothLabels(double smoothing) {
    graph_.label_smoothing = smoothing;
    return *this;
  }
  const Shape& ShapeOf(int layer) const {
    return layer == spec::kData ? graph_.data_shape : graph_.layers[layer].output;
  }
  int Last() const { return static_cast<int>(graph_.layers.size()) - 1; }
  spec::Graph& graph() { return graph_; }

 private:
  // Its output is its first input's until the caller says otherwise.
  spec::Layer& Add(spec::LayerType type, std::vector<int> inputs) {
    for (int& input : inputs) {
      if (input == kPrevious) input = Last() < 0 ? spec::kData : Last();
    }
    spec::Layer layer;
    layer.type = type;
    layer.name = "layer" + std::to_string(graph_.layers.size());
    layer.inputs = std::move(inputs);
    layer.output = ShapeOf(layer.inputs[0]);
    graph_.layers.push_back(std::move(layer));
    return graph_.layers.back();
  }
  int Plain(spec::LayerType type, std::vector<int> inputs) {
    Add(type, std::move(inputs));
    return Last();
  }
  spec::Layer& Window(spec::LayerType type, int64_t kernel, int64_t stride, int64_t padding,
                      int input) {
    spec::Layer& layer = Add(type, {input});
    layer.kernel = kernel;
    layer.stride = stride;
    layer.padding = padding;
    for (int axis = 0; axis < 2; ++axis) {
      layer.output[axis] = (layer.output[axis] + 2 * padding - kernel) / stride + 1;
    }
    return layer;
  }
  void AddWeights(Shape weight, int64_t fan_in) {
    spec::Layer& layer = graph_.layers.back();
    const double limit = std::sqrt(3.0 / static_cast<double>(fan_in));
    layer.tensors = {{layer.name + ".weight",
                      weight,
                      {spec::Initializer::Type::kUniform, limit},
                      /*trainable=*/true,
                      /*decays=*/true}};
    if (layer.bias) {
      layer.tensors.push_back(
          {layer.name + ".bias", {weight[0]}, {spec::Initializer::Type::kUniform, 0.5}});
    }
  }

  spec::Graph graph_;
};

}  // namespace lockstep::nn
