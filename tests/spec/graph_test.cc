// The model as a graph: shapes, tensors, scales and FLOPs of each type, order, and what cannot be.
#include "common/spec/graph.h"

#include <cmath>
#include <map>
#include <string>

#include "common/spec/spec.h"
#include "fmt/format.h"
#include "gmock/gmock.h"

namespace lockstep::spec {
namespace {

using ::testing::ElementsAre;
using Shape = std::vector<int64_t>;

// layers: YAML flow mappings. The output must fit `more`, by default 10 classes.
absl::StatusOr<Graph> Build(const std::vector<std::string>& layers,
                            const std::string& data = "shape: [28, 28, 1]",
                            const std::string& more = "") {
  std::string text = fmt::format(
      "data: {{path: d, {}}}\noptimizer: {{learning_rate: 1}}\ntrain: {{batch: 16, steps: 1}}\n{}"
      "model:\n  layers:\n",
      data, more);
  for (const std::string& layer : layers) text += "    - {" + layer + "}\n";
  const auto spec = LoadText(text, "job.yaml", {});
  if (!spec.ok()) return spec.status();
  return BuildGraph(*spec);
}

// The message without file and line.
std::string Refused(const std::vector<std::string>& layers,
                    const std::string& data = "shape: [28, 28, 1]", const std::string& more = "") {
  const auto graph = Build(layers, data, more);
  if (graph.ok()) return "accepted";
  EXPECT_EQ(graph.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(graph.status().message());
  return message.substr(message.find(' ') + 1);
}

std::vector<std::string> Names(const Graph& graph) {
  std::vector<std::string> names;
  for (const Layer& layer : graph.layers) names.push_back(layer.name);
  return names;
}

const std::vector<std::string> kHead = {"type: flatten", "type: dense, units: 10"};
std::vector<std::string> WithHead(std::vector<std::string> layers) {
  layers.insert(layers.end(), kHead.begin(), kHead.end());
  return layers;
}

// The graph of one layer in front of flatten and dense, on data of 11 x 9 x 3.
Layer One(const std::string& layer, const std::string& data = "shape: [11, 9, 3]") {
  const auto graph = Build(WithHead({layer}), data);
  EXPECT_TRUE(graph.ok()) << graph.status();
  return graph.ok() ? graph->layers[0] : Layer();
}

TEST(Graph, Dense) {
  const auto graph = Build({"type: flatten", "type: dense, units: 10"}, "shape: [2, 3, 4]");
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->data_shape, (Shape{2, 3, 4}));
  EXPECT_EQ(graph->classes, 10);
  EXPECT_EQ(graph->layers[0].output, Shape{24});
  EXPECT_EQ(graph->layers[0].flops, 0);
  EXPECT_THAT(graph->layers[0].inputs, ElementsAre(kData));
  const Layer& dense = graph->layers[1];
  EXPECT_THAT(dense.inputs, ElementsAre(0));
  EXPECT_EQ(dense.type, LayerType::kDense);
  EXPECT_EQ(dense.output, Shape{10});
  EXPECT_TRUE(dense.bias);
  EXPECT_EQ(dense.flops, 2 * 24 * 10 + 10);
  ASSERT_EQ(dense.tensors.size(), 2u);
  EXPECT_EQ(dense.tensors[0].name, "dense_1.weight");
  EXPECT_EQ(dense.tensors[0].shape, (Shape{10, 24}));
  EXPECT_TRUE(dense.tensors[0].trainable);
  EXPECT_TRUE(dense.tensors[0].decays);
  EXPECT_EQ(dense.tensors[1].name, "dense_1.bias");
  EXPECT_EQ(dense.tensors[1].shape, Shape{10});
  EXPECT_TRUE(dense.tensors[1].trainable);
  EXPECT_FALSE(dense.tensors[1].decays);
  EXPECT_EQ(dense.tensors[1].init.type, Initializer::Type::kZeros);
}

TEST(Graph, Conv2d) {
  const Layer plain = One("type: conv2d, filters: 5, kernel: 3");
  EXPECT_EQ(plain.output, (Shape{9, 7, 5}));
  EXPECT_EQ(plain.kernel, 3);
  EXPECT_EQ(plain.stride, 1);
  EXPECT_EQ(plain.padding, 0);
  EXPECT_EQ(plain.tensors[0].shape, (Shape{5, 3, 3, 3}));
  EXPECT_EQ(plain.tensors[1].shape, Shape{5});
  EXPECT_EQ(plain.flops, 2 * 9 * 7 * 5 * 27 + 9 * 7 * 5);
  const Layer strided =
      One("type: conv2d, filters: 2, kernel: 4, stride: 3, padding: 1, bias: false");
  EXPECT_EQ(strided.output, (Shape{4, 3, 2}));  // (11 + 2 - 4) / 3 + 1, (9 + 2 - 4) / 3 + 1
  EXPECT_EQ(strided.tensors.size(), 1u);
  EXPECT_EQ(strided.flops, 2 * 4 * 3 * 2 * 48);
  EXPECT_EQ(One("type: conv2d, filters: 1, kernel: 11, padding: 1").output, (Shape{3, 1, 1}));
}

TEST(Graph, Pad) {
  const Layer pad = One("type: pad, padding: 2, channels_before: 1, channels_after: 4");
  EXPECT_EQ(pad.output, (Shape{15, 13, 8}));
  EXPECT_EQ(pad.padding, 2);
  EXPECT_EQ(pad.channels_before, 1);
  EXPECT_EQ(pad.channels_after, 4);
  EXPECT_EQ(pad.flops, 0);
  EXPECT_EQ(One("type: pad, channels_after: 4").output, (Shape{11, 9, 7}));
  EXPECT_EQ(One("type: pad, padding: 1").output, (Shape{13, 11, 3}));
  EXPECT_EQ(Refused(WithHead({"type: pad"})),
            "model.layers.0: pad adds nothing; accepted: padding, channels_before or "
            "channels_after above 0");
  EXPECT_EQ(Refused(WithHead({"type: pad, padding: 0, channels_before: 0"})),
            "model.layers.0: pad adds nothing; accepted: padding, channels_before or "
            "channels_after above 0");
  EXPECT_EQ(Refused({"type: flatten", "type: pad, padding: 1", "type: dense, units: 10"}),
            "model.layers.1: pad needs an input {height, width, channels}, but flatten_1 is {784}");
  EXPECT_EQ(Refused(WithHead({"type: pad, channels_after: 2147483647"})),
            "model.layers.0: its output {28, 28, 2147483648} has more than 2^31 elements per "
            "sample");
}

TEST(Graph, MultipliersReachEveryTensorOfTheirLayer) {
  const Layer conv = One(
      "type: conv2d, filters: 4, kernel: 2, learning_rate_multiplier: 0, decay_multiplier: 2.5");
  ASSERT_EQ(conv.tensors.size(), 2u);
  for (const TensorSpec& tensor : conv.tensors) {
    EXPECT_EQ(tensor.rate_multiplier, 0);
    EXPECT_EQ(tensor.decay_multiplier, 2.5);
  }
  const Layer norm = One("type: batch_norm, learning_rate_multiplier: 3");
  for (const TensorSpec& tensor : norm.tensors) {
    EXPECT_EQ(tensor.rate_multiplier, 3);
    EXPECT_EQ(tensor.decay_multiplier, 1);
  }
  const Layer layer_norm = One("type: layer_norm, learning_rate_multiplier: 0.5");
  ASSERT_EQ(layer_norm.tensors.size(), 2u);
  for (const TensorSpec& tensor : layer_norm.tensors) EXPECT_EQ(tensor.rate_multiplier, 0.5);
  const Layer table = One("type: embedding, vocabulary: 7, units: 5, learning_rate_multiplier: 0",
                          "shape: [4, 3, 1]");
  EXPECT_EQ(table.tensors[0].rate_multiplier, 0);
  const auto lstm =
      Build({"type: lstm, hidden: 3, layers: 2, learning_rate_multiplier: 2, decay_multiplier: 0",
             "type: dense, units: 10"});
  ASSERT_TRUE(lstm.ok()) << lstm.status();
  ASSERT_EQ(lstm->layers[0].tensors.size(), 8u);
  for (const TensorSpec& tensor : lstm->layers[0].tensors) {
    EXPECT_EQ(tensor.rate_multiplier, 2);
    EXPECT_EQ(tensor.decay_multiplier, 0);
  }
}

TEST(Graph, Conv2dDilatedAndGrouped) {
  const Layer dilated = One("type: conv2d, filters: 5, kernel: 3, dilation: 2, padding: 1");
  EXPECT_EQ(dilated.output, (Shape{9, 7, 5}));  // 11 + 2 - 5 + 1, 9 + 2 - 5 + 1
  EXPECT_EQ(dilated.tensors[0].shape, (Shape{5, 3, 3, 3}));
  const Layer grouped =
      One("type: conv2d, filters: 6, kernel: 3, groups: 3, weight_init: {type: he}");
  EXPECT_EQ(grouped.groups, 3);
  EXPECT_EQ(grouped.tensors[0].shape, (Shape{6, 3, 3, 1}));
  EXPECT_DOUBLE_EQ(grouped.tensors[0].init.scale, std::sqrt(2.0 / 9));
  EXPECT_EQ(grouped.flops, 2 * 9 * 7 * 6 * 9 + 9 * 7 * 6);
  EXPECT_EQ(Refused(WithHead({"type: conv2d, filters: 2, kernel: 3, dilation: 14"})),
            "model.layers.0.dilation: found 14: the window would reach beyond the padded input (28 "
            "by 28); accepted: 1 to 13");
  EXPECT_EQ(Refused(WithHead({"type: conv2d, filters: 2, kernel: 1, dilation: 2"})),
            "model.layers.0.dilation: found 2, which changes nothing with kernel 1; accepted: 1");
  EXPECT_EQ(
      Refused(WithHead({"type: conv2d, filters: 3, kernel: 3, groups: 2"}), "shape: [8, 8, 4]"),
      "model.layers.0.groups: found 2; accepted: a divisor of the input's channels (4) and of "
      "filters (3)");
}

TEST(Graph, Concat) {
  const auto graph = Build(WithHead({"name: a, type: conv2d, filters: 2, kernel: 1, inputs: [data]",
                                     "name: b, type: concat, inputs: [a, data, a]"}),
                           "shape: [4, 5, 3]");
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->layers[1].output, (Shape{4, 5, 7}));
  EXPECT_EQ(graph->layers[1].flops, 0);
  EXPECT_EQ(Refused(WithHead({"name: a, type: max_pool, kernel: 2",
                              "name: b, type: concat, inputs: [a, data]"})),
            "model.layers.1.inputs.1: a is {14, 14, 1} and data is {28, 28, 1}; accepted: inputs "
            "that differ in the last dimension only");
}

TEST(Graph, Multiply) {
  const auto graph =
      Build(WithHead({"name: a, type: tanh", "name: b, type: multiply, inputs: [a, data, a]"}),
            "shape: [4, 5, 3]");
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->layers[1].output, (Shape{4, 5, 3}));
  EXPECT_EQ(graph->layers[1].flops, 2 * 60);
  EXPECT_EQ(
      Refused(WithHead(
          {"name: a, type: max_pool, kernel: 2", "name: b, type: multiply, inputs: [a, data]"})),
      "model.layers.1.inputs.1: a is {14, 14, 1} and data is {28, 28, 1}; accepted: inputs of "
      "one shape");
}

TEST(Graph, MapsAndNormsOverTheLastDimension) {
  EXPECT_EQ(One("type: leaky_relu").slope, 0.01);
  EXPECT_EQ(One("type: leaky_relu, slope: 0").slope, 0);
  EXPECT_EQ(One("type: elu").alpha, 1);
  EXPECT_EQ(One("type: elu, alpha: 2").alpha, 2);
  for (const char* type : {"leaky_relu", "elu", "softplus"}) {
    const Layer map = One(fmt::format("type: {}", type));
    EXPECT_STREQ(LayerTypeName(map.type), type);
    EXPECT_EQ(map.output, (Shape{11, 9, 3}));
    EXPECT_EQ(map.flops, 11 * 9 * 3);
  }
  EXPECT_EQ(One("type: softmax").flops, 3 * 11 * 9 * 3);
  const Layer norm = One("type: layer_norm, epsilon: 1e-3");
  EXPECT_EQ(norm.epsilon, 1e-3);
  EXPECT_EQ(norm.flops, 5 * 11 * 9 * 3);
  ASSERT_EQ(norm.tensors.size(), 2u);
  EXPECT_EQ(norm.tensors[0].name, "layer_norm_1.weight");
  EXPECT_EQ(norm.tensors[0].shape, Shape{3});
  EXPECT_EQ(norm.tensors[0].init.type, Initializer::Type::kOnes);
  EXPECT_EQ(norm.tensors[1].init.type, Initializer::Type::kZeros);
  EXPECT_FALSE(norm.tensors[0].decays);
}

TEST(Graph, ReshapeAndTranspose) {
  EXPECT_EQ(One("type: reshape, shape: [3, 99]").output, (Shape{3, 99}));
  EXPECT_EQ(One("type: transpose, order: [2, 0, 1]").output, (Shape{3, 11, 9}));
  const auto graph = Build({"type: reshape, shape: [28, 28]", "type: transpose, order: [1, 0]",
                            "type: flatten", "type: dense, units: 10"});
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->layers[1].output, (Shape{28, 28}));
  EXPECT_EQ(
      Refused(WithHead({"type: reshape, shape: [28, 27]"})),
      "model.layers.0.shape: found {28, 27}, but data is {28, 28, 1}; accepted: 784 elements");
  EXPECT_EQ(Refused(WithHead({"type: transpose, order: [0, 1]"})),
            "model.layers.0.order: found [0, 1], but data is {28, 28, 1}; accepted: 0 to 2, each "
            "once");
  EXPECT_EQ(
      Refused(WithHead({"type: transpose, order: [0, 1, 1]"})),
      "model.layers.0.order: found [0, 1, 1], but data is {28, 28, 1}; accepted: 0 to 2, each "
      "once");
  EXPECT_EQ(
      Refused({"type: flatten", "type: transpose, order: [1, 0]", "type: dense, units: 10"}),
      "model.layers.1.order: found [1, 0], but flatten_1 is {784}; accepted: an input of 2 or "
      "3 dimensions");
}

TEST(Graph, Embedding) {
  const Layer table = One("type: embedding, vocabulary: 7, units: 5", "shape: [4, 3, 1]");
  EXPECT_EQ(table.output, (Shape{4, 3, 5}));
  EXPECT_EQ(table.flops, 0);
  ASSERT_EQ(table.tensors.size(), 1u);
  EXPECT_EQ(table.tensors[0].name, "embedding_1.weight");
  EXPECT_EQ(table.tensors[0].shape, (Shape{7, 5}));
  EXPECT_EQ(table.tensors[0].init.type, Initializer::Type::kUniform);
  EXPECT_EQ(table.tensors[0].init.scale, 0.05);
  EXPECT_FALSE(table.tensors[0].decays);
  const auto graph = Build({"type: flatten", "type: embedding, vocabulary: 256, units: 2",
                            "type: flatten", "type: dense, units: 10"});
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->layers[1].output, (Shape{784, 2}));
  EXPECT_EQ(
      Refused(WithHead({"type: embedding, vocabulary: 7, units: 5"}), "shape: [4, 3, 2]"),
      "model.layers.0: embedding needs an input {n}, {n, m} or {height, width, 1}, but data is "
      "{4, 3, 2}; put a reshape before it");
  EXPECT_EQ(Refused(WithHead({"type: relu", "type: embedding, vocabulary: 7, units: 5"})),
            "model.layers.1.inputs.0: found relu_1, a relu; accepted: data, or a flatten, reshape "
            "or transpose of it");
}

TEST(Graph, LossesAndStatistics) {
  const auto smooth = Build(kHead, "shape: [4, 4, 1]", "loss: {label_smoothing: 0.1}\n");
  ASSERT_TRUE(smooth.ok()) << smooth.status();
  EXPECT_EQ(smooth->label_smoothing, 0.1);
  const auto sigmoid = Build(kHead, "shape: [4, 4, 1]", "loss: {type: sigmoid_cross_entropy}\n");
  ASSERT_TRUE(sigmoid.ok()) << sigmoid.status();
  EXPECT_EQ(sigmoid->loss, LossType::kSigmoidCrossEntropy);
  EXPECT_EQ(sigmoid->target, Target::kLabel);
  EXPECT_EQ(One("type: batch_norm").statistics, Statistics::kRunning);
  EXPECT_EQ(One("type: batch_norm, statistics: population").statistics, Statistics::kPopulation);
}

TEST(Graph, PoolsRoundDown) {
  for (const char* type : {"max_pool", "average_pool"}) {
    const Layer pool = One(fmt::format("type: {}, kernel: 2", type));
    EXPECT_STREQ(LayerTypeName(pool.type), type);
    EXPECT_EQ(pool.output, (Shape{5, 4, 3}));
    EXPECT_EQ(pool.stride, 2);
    EXPECT_EQ(pool.flops, 5 * 4 * 3 * 4);
    EXPECT_TRUE(pool.tensors.empty());
    EXPECT_EQ(One(fmt::format("type: {}, kernel: 3, stride: 2, padding: 1", type)).output,
              (Shape{6, 5, 3}));
  }
}

TEST(Graph, GlobalAveragePool) {
  const auto graph = Build({"type: global_average_pool"}, "shape: [4, 5, 10]");
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_EQ(graph->layers[0].output, Shape{10});
  EXPECT_EQ(graph->layers[0].flops, 200);
}

TEST(Graph, BatchNorm) {
  const Layer norm = One("type: batch_norm, sync: shard, momentum: 0.2, epsilon: 1e-3");
  EXPECT_EQ(norm.output, (Shape{11, 9, 3}));
  EXPECT_EQ(norm.sync, Sync::kShard);
  EXPECT_EQ(norm.momentum, 0.2);
  EXPECT_EQ(norm.epsilon, 1e-3);
  EXPECT_EQ(norm.flops, 2 * 11 * 9 * 3);
  const auto one = Initializer::Type::kOnes, zero = Initializer::Type::kZeros;
  const std::vector<std::tuple<std::string, Initializer::Type, bool>> expected = {
      {"batch_norm_1.weight", one, true},
      {"batch_norm_1.bias", zero, true},
      {"batch_norm_1.running_mean", zero, false},
      {"batch_norm_1.running_var", one, false}};
  ASSERT_EQ(norm.tensors.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(norm.tensors[i].name, std::get<0>(expected[i]));
    EXPECT_EQ(norm.tensors[i].init.type, std::get<1>(expected[i]));
    EXPECT_EQ(norm.tensors[i].trainable, std::get<2>(expected[i]));
    EXPECT_EQ(norm.tensors[i].shape, Shape{3});
    EXPECT_FALSE(norm.tensors[i].decays);
  }
  EXPECT_EQ(One("type: batch_norm").sync, Sync::kBatch);
  EXPECT_EQ(Refused(WithHead({"type: batch_norm, statistics: population, momentum: 0.1"})),
            "model.layers.0.momentum: given with statistics: population, which keeps no running "
            "averages; accepted: only with statistics: running");
  const auto flat = Build({"type: flatten", "type: dense, units: 10", "type: batch_norm"});
  ASSERT_TRUE(flat.ok()) << flat.status();
  EXPECT_EQ(flat->layers[2].tensors[0].shape, Shape{10});
}

TEST(Graph, Elementwise) {
  for (const char* type : {"relu", "tanh", "sigmoid", "dropout"}) {
    const Layer layer =
        One(fmt::format("type: {}{}", type, std::string(type) == "dropout" ? ", rate: 0.25" : ""));
    EXPECT_STREQ(LayerTypeName(layer.type), type);
    EXPECT_EQ(layer.output, (Shape{11, 9, 3}));
    EXPECT_EQ(layer.flops, 297);
    EXPECT_EQ(layer.rate, std::string(type) == "dropout" ? 0.25 : 0);
    EXPECT_TRUE(layer.tensors.empty());
  }
}

TEST(Graph, Lstm) {
  const auto one = Build({"type: lstm, hidden: 6", "type: dense, units: 10"}, "shape: [11, 9, 3]");
  ASSERT_TRUE(one.ok()) << one.status();
  const Layer& last = one->layers[0];
  EXPECT_EQ(last.type, LayerType::kLstm);
  EXPECT_EQ(last.output, Shape{6});
  EXPECT_EQ(last.layers, 1);
  EXPECT_FALSE(last.bidirectional);
  EXPECT_FALSE(last.sequence);
  EXPECT_TRUE(last.bias);
  // 11 rows of 9 * 3 features. A unit: 4 gates of 27 + 6 multiply-adds, their bias, and 9 more.
  EXPECT_EQ(last.flops, 11 * 6 * (4 * 2 * (27 + 6) + 4 + 9));
  const std::vector<std::pair<std::string, Shape>> expected = {{"lstm_1.weight_ih_l0", {24, 27}},
                                                               {"lstm_1.weight_hh_l0", {24, 6}},
                                                               {"lstm_1.bias_ih_l0", {24}},
                                                               {"lstm_1.bias_hh_l0", {24}}};
  ASSERT_EQ(last.tensors.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(last.tensors[i].name, expected[i].first);
    EXPECT_EQ(last.tensors[i].shape, expected[i].second);
    EXPECT_EQ(last.tensors[i].decays, i < 2);
    EXPECT_EQ(last.tensors[i].init.type, Initializer::Type::kUniform);
    EXPECT_DOUBLE_EQ(last.tensors[i].init.scale, 1 / std::sqrt(6.0));
  }

  const Layer deep = One(
      "type: lstm, name: a, hidden: 5, layers: 2, bidirectional: true, output: sequence, dropout: "
      "0.25, bias: false, weight_init: {type: xavier}");
  EXPECT_EQ(deep.output, (Shape{11, 10}));
  EXPECT_TRUE(deep.sequence);
  EXPECT_EQ(deep.rate, 0.25);
  EXPECT_EQ(deep.flops, 11 * 10 * (8 * (27 + 5) + 9) + 11 * 10 * (8 * (10 + 5) + 9));
  std::vector<std::string> names;
  for (const TensorSpec& tensor : deep.tensors) names.push_back(tensor.name);
  EXPECT_THAT(names, ElementsAre("a.weight_ih_l0", "a.weight_hh_l0", "a.weight_ih_l0_reverse",
                                 "a.weight_hh_l0_reverse", "a.weight_ih_l1", "a.weight_hh_l1",
                                 "a.weight_ih_l1_reverse", "a.weight_hh_l1_reverse"));
  EXPECT_EQ(deep.tensors[0].shape, (Shape{20, 27}));
  EXPECT_EQ(deep.tensors[4].shape, (Shape{20, 10}));
  EXPECT_EQ(deep.tensors[5].shape, (Shape{20, 5}));
  EXPECT_DOUBLE_EQ(deep.tensors[0].init.scale, std::sqrt(6.0 / (27 + 5)));
  EXPECT_DOUBLE_EQ(deep.tensors[1].init.scale, std::sqrt(6.0 / (5 + 5)));

  // A sequence feeds the next.
  const auto chain = Build({"type: lstm, hidden: 4, output: sequence", "type: lstm, hidden: 10"});
  ASSERT_TRUE(chain.ok()) << chain.status();
  EXPECT_EQ(chain->layers[0].output, (Shape{28, 4}));
  EXPECT_EQ(chain->layers[1].tensors[0].shape, (Shape{40, 4}));
}

TEST(Graph, AddAndAnyOrder) {
  // Written backwards, with the branch in the middle.
  const auto graph =
      Build({"name: out, type: dense, units: 10, inputs: [flat]",
             "name: flat, type: flatten, inputs: [sum]",
             "name: sum, type: add, inputs: [left, right, data]",
             "name: right, type: tanh, inputs: [data]", "name: left, type: relu, inputs: [data]"},
            "shape: [2, 3, 4]");
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(Names(*graph), ElementsAre("right", "left", "sum", "flat", "out"));
  EXPECT_THAT(graph->layers[2].inputs, ElementsAre(1, 0, kData));
  EXPECT_EQ(graph->layers[2].output, (Shape{2, 3, 4}));
  EXPECT_EQ(graph->layers[2].flops, 48);
}

TEST(Graph, ASortedListStaysAsItIs) {
  const auto graph =
      Build({"name: b, type: relu", "name: a, type: tanh, inputs: [data]",
             "name: d, type: sigmoid, inputs: [b]", "name: c, type: add, inputs: [a, d]",
             "type: flatten", "type: dense, units: 10"});
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(Names(*graph), ElementsAre("b", "a", "d", "c", "flatten_1", "dense_1"));
}

TEST(Graph, ScalesOfInitializers) {
  const auto init = [](const std::string& weight_init) {
    return One("type: conv2d, filters: 5, kernel: 2, weight_init: " + weight_init).tensors[0].init;
  };
  const double fan_in = 2 * 2 * 3, fan_out = 2 * 2 * 5;
  const auto uniform = Initializer::Type::kUniform, normal = Initializer::Type::kNormal;
  const auto expect = [&](const std::string& text, Initializer::Type type, double scale) {
    EXPECT_EQ(init(text).type, type) << text;
    EXPECT_DOUBLE_EQ(init(text).scale, scale) << text;
  };
  expect("{type: xavier}", uniform, std::sqrt(6 / (fan_in + fan_out)));
  expect("{type: xavier, distribution: normal}", normal, std::sqrt(2 / (fan_in + fan_out)));
  expect("{type: he}", normal, std::sqrt(2 / fan_in));
  expect("{type: he, distribution: uniform}", uniform, std::sqrt(6 / fan_in));
  expect("{type: normal, std: 0.3}", normal, 0.3);
  expect("{type: uniform, limit: 0.2}", uniform, 0.2);
  expect("{type: zeros}", Initializer::Type::kZeros, 0);
}

TEST(Graph, HeBeforeReluElseXavier) {
  const auto graph = Build(
      {"name: direct, type: conv2d, filters: 4, kernel: 1", "type: relu",
       "name: norm, type: conv2d, filters: 4, kernel: 1", "type: batch_norm", "type: batch_norm",
       "type: relu", "name: tanh, type: conv2d, filters: 4, kernel: 1", "type: tanh",
       "name: pool, type: conv2d, filters: 4, kernel: 1", "type: max_pool, kernel: 2", "type: relu",
       "type: flatten", "name: last, type: dense, units: 10"});
  ASSERT_TRUE(graph.ok()) << graph.status();
  for (const Layer& layer : graph->layers) {
    if (layer.tensors.empty() || layer.type == LayerType::kBatchNorm) continue;
    const bool he = layer.name == "direct" || layer.name == "norm";
    EXPECT_EQ(layer.tensors[0].init.type,
              he ? Initializer::Type::kNormal : Initializer::Type::kUniform)
        << layer.name;
  }
}

TEST(Graph, Losses) {
  const std::string squared = "loss: {type: mean_squared_error}\n";
  const auto label = Build(kHead, "shape: [28, 28, 1]", squared);
  ASSERT_TRUE(label.ok()) << label.status();
  EXPECT_EQ(label->loss, LossType::kMeanSquaredError);
  EXPECT_EQ(label->target, Target::kLabel);
  const std::string input = "loss: {type: mean_squared_error, target: input}\n";
  const auto coder = Build({"type: flatten", "type: dense, units: 6", "type: dense, units: 24"},
                           "shape: [2, 3, 4]", input);
  ASSERT_TRUE(coder.ok()) << coder.status();
  EXPECT_EQ(coder->target, Target::kInput);
  EXPECT_TRUE(Build({"type: relu"}, "shape: [2, 3, 4]", input).ok());
  EXPECT_EQ(Refused(kHead, "shape: [2, 3, 4]", input),
            "model.layers.1.units: the output {10} has 10 elements, but the data {2, 3, 4} has 24; "
            "accepted: as many, loss.target is input");
  EXPECT_EQ(Refused({"type: flatten"}, "shape: [2, 3, 4]", squared),
            "model.layers.0: the output is {24}; accepted: {10}, data.classes, for "
            "mean_squared_error");
  EXPECT_EQ(Refused({"type: relu"}, "shape: [1, 1, 10]"),
            "model.layers.0: the output is {1, 1, 10}; accepted: {10}, data.classes, for "
            "softmax_cross_entropy; put a flatten or global_average_pool before the end");
}

TEST(Graph, RefusesShapesThatDoNotFit) {
  struct Case {
    std::vector<std::string> layers;
    std::string message;
  };
  const std::vector<Case> cases = {
      {{"type: dense, units: 10"},
       "model.layers.0: dense needs an input {features}, but data is {28, 28, 1}; put a flatten "
       "before it"},
      {{"type: flatten", "type: conv2d, filters: 3, kernel: 3"},
       "model.layers.1: conv2d needs an input {height, width, channels}, but flatten_1 is {784}"},
      {{"type: flatten", "type: max_pool, kernel: 2"},
       "model.layers.1: max_pool needs an input {height, width, channels}, but flatten_1 is {784}"},
      {{"type: flatten", "type: global_average_pool"},
       "model.layers.1: global_average_pool needs an input {height, width, channels}, but "
       "flatten_1 "
       "is {784}"},
      {{"type: flatten", "type: lstm, hidden: 10"},
       "model.layers.1: lstm needs an input {time, features} or an image {height, width, "
       "channels}, whose rows are the steps, but flatten_1 is {784}"},
      {{"type: lstm, hidden: 10, output: sequence", "type: dense, units: 10"},
       "model.layers.1: dense needs an input {features}, but lstm_1 is {28, 10}; put a flatten "
       "before it"},
      {{"type: lstm, hidden: 10, output: sequence", "type: conv2d, filters: 3, kernel: 3"},
       "model.layers.1: conv2d needs an input {height, width, channels}, but lstm_1 is {28, 10}"},
      {{"type: average_pool, kernel: 29"},
       "model.layers.0.kernel: found 29, larger than the padded input (28 by 28); accepted: 1 to "
       "28"},
      {{"type: conv2d, filters: 1, kernel: 31, padding: 1"},
       "model.layers.0.kernel: found 31, larger than the padded input (30 by 30); accepted: 1 to "
       "30"},
      {{"type: max_pool, kernel: 17"},
       "model.layers.0.kernel: found 17; accepted: 1 to 16 for max_pool"},
      {{"type: average_pool, kernel: 2, padding: 2"},
       "model.layers.0.padding: found 2; accepted: 0 to 1, less than the kernel"},
      {{"type: relu", "type: max_pool, kernel: 2", "type: add, inputs: [relu_1, max_pool_1]"},
       "model.layers.2.inputs.1: relu_1 is {28, 28, 1} and max_pool_1 is {14, 14, 1}; accepted: "
       "inputs of one shape"},
      {{"type: relu", "type: add, inputs: [relu_1]"},
       "model.layers.1.inputs: found 1 input; accepted: 2 or more for add"},
      {{"type: relu", "type: tanh, inputs: [relu_1, data]"},
       "model.layers.1.inputs: found 2 inputs; accepted: 1 for tanh"},
  };
  for (const Case& c : cases) EXPECT_EQ(Refused(c.layers), c.message);
}

TEST(Graph, RefusesTensorsBeyondTheCap) {
  EXPECT_EQ(
      Refused({"type: flatten", "type: dense, units: 2147483647"}),
      "model.layers.1.units: the weight {2147483647, 784} would have more than 2^31 elements");
  EXPECT_EQ(
      Refused({"type: lstm, hidden: 2147483647"}),
      "model.layers.0.hidden: the weight {8589934588, 28} would have more than 2^31 elements");
  EXPECT_EQ(Refused({"type: lstm, hidden: 1000000"}),
            "model.layers.0.hidden: the weight {4000000, 1000000} would have more than 2^31 "
            "elements");
  EXPECT_EQ(Refused({"type: conv2d, filters: 2147483647, kernel: 28"}),
            "model.layers.0.filters: the weight {2147483647, 28, 28, 1} would have more than 2^31 "
            "elements");
  EXPECT_EQ(
      Refused({"type: conv2d, filters: 2147483647, kernel: 1"}),
      "model.layers.0: its output {28, 28, 2147483647} has more than 2^31 elements per sample");
  EXPECT_EQ(
      Refused({"type: conv2d, filters: 1, kernel: 1, padding: 2147483647"}),
      "model.layers.0: its output {4294967322, 4294967322, 1} has more than 2^31 elements per "
      "sample");
  EXPECT_EQ(Refused({"type: conv2d, filters: 1, kernel: 2147483647, padding: 2147483647"}),
            "model.layers.0.kernel: the weight {1, 2147483647, 2147483647, 1} would have more than "
            "2^31 elements");
  // 28 x 28 outputs, each from almost 2^62 elements.
  EXPECT_EQ(Refused({"type: average_pool, kernel: 2147483647, padding: 1073741823, stride: 1"}),
            "model.layers.0: needs more than 2^63 operations per sample");
}

TEST(Graph, NamesTheLayersOfACycle) {
  EXPECT_EQ(
      Refused({"name: a, type: relu, inputs: [c]", "name: b, type: relu, inputs: [a]",
               "name: c, type: relu, inputs: [b]"}),
      "model.layers.0.inputs: found the cycle a -> b -> c -> a; accepted: inputs without one");
  EXPECT_EQ(Refused({"name: a, type: relu, inputs: [a]"}),
            "model.layers.0.inputs: found the cycle a -> a; accepted: inputs without one");
  // What hangs on the cycle, before and after, is not named.
  EXPECT_EQ(Refused({"name: out, type: relu, inputs: [z]", "name: in, type: tanh, inputs: [data]",
                     "name: y, type: add, inputs: [in, z]", "name: z, type: relu, inputs: [y]"}),
            "model.layers.2.inputs: found the cycle y -> z -> y; accepted: inputs without one");
}

TEST(Graph, RefusesASecondOutput) {
  EXPECT_EQ(
      Refused(WithHead({"name: lost, type: relu", "type: tanh, inputs: [data]"})),
      "model.layers.0: nothing uses its output (lost), and dense_1 is an output too; accepted: "
      "one output, the last layer");
}

TEST(Graph, DefaultNamesKeepClearOfGivenOnes) {
  const auto graph = Build(WithHead({"type: relu", "name: relu_3, type: tanh",
                                     "name: x, type: relu", "type: relu", "type: relu"}));
  ASSERT_TRUE(graph.ok()) << graph.status();
  EXPECT_THAT(Names(*graph),
              ElementsAre("relu_1", "relu_3", "x", "relu_4", "relu_5", "flatten_1", "dense_1"));
}

Graph Preset(const std::string& model, const std::string& data = "path: d") {
  const auto spec = LoadText(
      fmt::format(
          "data: {{{}}}\nmodel: {{{}}}\noptimizer: {{learning_rate: 1}}\ntrain: {{batch: 16, "
          "steps: 1}}\n",
          data, model),
      "job.yaml", {});
  EXPECT_TRUE(spec.ok()) << spec.status();
  const auto graph = BuildGraph(*spec);
  EXPECT_TRUE(graph.ok()) << graph.status();
  return *graph;
}

int64_t Parameters(const Graph& graph) {
  int64_t count = 0;
  for (const Layer& layer : graph.layers) {
    for (const TensorSpec& tensor : layer.tensors) {
      if (tensor.trainable) count += ElementCount(tensor.shape);
    }
  }
  return count;
}

TEST(Preset, Mlp) {
  const Graph graph = Preset("preset: mlp, hidden: [30, 20], dropout: 0.2, sync: batch");
  EXPECT_THAT(Names(graph),
              ElementsAre("flatten_1", "dense_1", "batch_norm_1", "relu_1", "dropout_1", "dense_2",
                          "batch_norm_2", "relu_2", "dropout_2", "dense_3"));
  EXPECT_FALSE(graph.layers[1].bias);
  EXPECT_EQ(graph.layers[1].tensors[0].init.type, Initializer::Type::kNormal);
  EXPECT_DOUBLE_EQ(graph.layers[1].tensors[0].init.scale, std::sqrt(2.0 / 784));
  EXPECT_EQ(graph.layers[2].sync, Sync::kBatch);
  EXPECT_EQ(graph.layers[4].rate, 0.2);
  EXPECT_TRUE(graph.layers.back().bias);
  EXPECT_EQ(Parameters(graph), 784 * 30 + 60 + 30 * 20 + 40 + 20 * 10 + 10);
  EXPECT_THAT(Names(Preset("preset: mlp, hidden: [30], batch_norm: false")),
              ElementsAre("flatten_1", "dense_1", "relu_1", "dense_2"));
  EXPECT_TRUE(Preset("preset: mlp, batch_norm: false").layers[1].bias);
  EXPECT_EQ(Preset("preset: mlp", "path: d, classes: 7").layers.back().output, Shape{7});
}

TEST(Preset, FashionCnn) {
  const Graph graph = Preset("preset: fashion-cnn");
  EXPECT_THAT(
      Names(graph),
      ElementsAre("conv2d_1", "batch_norm_1", "relu_1", "max_pool_1", "conv2d_2", "batch_norm_2",
                  "relu_2", "max_pool_2", "conv2d_3", "batch_norm_3", "relu_3", "max_pool_3",
                  "flatten_1", "dropout_1", "dense_1", "relu_4", "dropout_2", "dense_2"));
  EXPECT_EQ(graph.layers[3].output, (Shape{14, 14, 32}));
  EXPECT_EQ(graph.layers[12].output, Shape{1152});
  EXPECT_EQ(graph.layers[1].sync, Sync::kShard);
  EXPECT_EQ(graph.layers[13].rate, 0.3);
  EXPECT_EQ(Parameters(graph),
            9 * 32 + 64 + 9 * 32 * 64 + 128 + 9 * 64 * 128 + 256 + 1152 * 128 + 128 + 1290);
  for (const Layer& layer : Preset("preset: fashion-cnn, dropout: 0").layers)
    EXPECT_NE(layer.type, LayerType::kDropout);
}

// The model of the PyTorch benchmark: 32 and 64 filters with biases.
TEST(Preset, LeNet) {
  const Graph graph = Preset("preset: lenet, sync: batch");
  EXPECT_THAT(Names(graph), ElementsAre("conv2d_1", "batch_norm_1", "relu_1", "max_pool_1",
                                        "conv2d_2", "batch_norm_2", "relu_2", "max_pool_2",
                                        "flatten_1", "dense_1", "relu_3", "dense_2"));
  EXPECT_EQ(graph.layers[1].sync, Sync::kBatch);
  EXPECT_EQ(graph.layers[1].statistics, Statistics::kRunning);
  EXPECT_EQ(Preset("preset: lenet, statistics: population").layers[5].statistics,
            Statistics::kPopulation);
  EXPECT_EQ(graph.layers[8].output, Shape{64 * 49});
  EXPECT_EQ(Parameters(graph),
            9 * 32 + 32 + 64 + 9 * 32 * 64 + 64 + 128 + 64 * 49 * 128 + 128 + 128 * 10 + 10);
}

// The numbers of parameters that github.com/akamaster/pytorch_resnet_cifar10 lists for option A.
TEST(Preset, ResNetsForCifar) {
  const std::string cifar = "path: d, shape: [32, 32, 3]";
  const std::map<int, int64_t> parameters = {
      {20, 269722}, {32, 464154}, {44, 658586}, {56, 853018}, {110, 1727962}};
  for (const auto& [depth, count] : parameters) {
    const Graph residual = Preset(fmt::format("preset: resnet-{}", depth), cifar);
    EXPECT_EQ(Parameters(residual), count) << depth;
    const Graph plain = Preset(fmt::format("preset: plain-{}", depth), cifar);
    EXPECT_EQ(Parameters(plain), count) << depth;
    // Layers with weights on the longest path.
    int weighted = 0, sums = 0;
    for (const Layer& layer : residual.layers) {
      const bool dense = layer.type == LayerType::kDense;
      weighted += dense || layer.type == LayerType::kConv2d;
      sums += layer.type == LayerType::kAdd;
      if (dense || layer.type != LayerType::kConv2d) continue;
      EXPECT_FALSE(layer.bias);
      EXPECT_DOUBLE_EQ(layer.tensors[0].init.scale,
                       std::sqrt(2.0 / (9.0 * static_cast<double>(layer.tensors[0].shape[3]))));
    }
    EXPECT_EQ(weighted, depth);
    EXPECT_EQ(sums, (depth - 2) / 2);
    for (const Layer& layer : plain.layers) {
      EXPECT_NE(layer.type, LayerType::kAdd);
      EXPECT_NE(layer.type, LayerType::kPad);
    }
  }
  const Graph graph = Preset("preset: resnet-20", cifar);
  std::map<std::string, const Layer*> by_name;
  for (const Layer& layer : graph.layers) by_name[layer.name] = &layer;
  EXPECT_EQ(by_name.at("stage2_block1_subsample")->output, (Shape{16, 16, 16}));
  EXPECT_EQ(by_name.at("stage2_block1_pad")->output, (Shape{16, 16, 32}));
  EXPECT_EQ(by_name.at("stage2_block1_pad")->channels_before, 8);
  EXPECT_EQ(by_name.at("stage2_block1_pad")->channels_after, 8);
  EXPECT_EQ(by_name.at("stage3_block3_relu2")->output, (Shape{8, 8, 64}));
  EXPECT_EQ(by_name.at("dense")->output, Shape{10});
  int64_t flops = 0;
  for (const Layer& layer : graph.layers)
    if (layer.type == LayerType::kConv2d) flops += layer.flops;
  EXPECT_EQ(flops / 2, 40550400);
}

// torchvision's resnet50 has 25,557,032 parameters with 1000 classes and 4.09 billion multiply-adds
// at 224 by 224.
TEST(Preset, ResNet50) {
  const Graph graph = Preset("preset: resnet-50", "path: d, shape: [224, 224, 3], classes: 200");
  EXPECT_EQ(Parameters(graph), 25557032 - 800 * 2049);
  std::map<std::string, const Layer*> by_name;
  int64_t flops = 0;
  for (const Layer& layer : graph.layers) {
    by_name[layer.name] = &layer;
    if (layer.type == LayerType::kConv2d) flops += layer.flops;
  }
  EXPECT_EQ(by_name.at("stem_pool")->output, (Shape{56, 56, 64}));
  EXPECT_EQ(by_name.at("stage1_block3_relu3")->output, (Shape{56, 56, 256}));
  EXPECT_EQ(by_name.at("stage4_block3_relu3")->output, (Shape{7, 7, 2048}));
  EXPECT_EQ(by_name.at("stage3_block1_conv2")->stride, 2);
  EXPECT_EQ(flops / 2, 4087136256);
}

TEST(Preset, LstmClassifier) {
  const Graph graph = Preset("preset: lstm-classifier");
  EXPECT_THAT(Names(graph), ElementsAre("lstm_1", "dense_1"));
  EXPECT_EQ(graph.layers[0].output, Shape{128});
  // torch.nn.LSTM(28, 128) and torch.nn.Linear(128, 10).
  EXPECT_EQ(Parameters(graph), 4 * 128 * (28 + 128 + 2) + 1290);
  const Graph deep = Preset(
      "preset: lstm-classifier, lstm_hidden: 20, lstm_layers: 2, bidirectional: true, dropout: "
      "0.1");
  EXPECT_EQ(deep.layers[0].output, Shape{40});
  EXPECT_EQ(deep.layers[0].layers, 2);
  EXPECT_EQ(deep.layers[0].rate, 0.1);
}

TEST(Preset, AProblemOfItsLayersNamesThePreset) {
  const auto spec = LoadText(
      "data: {path: d, shape: [2, 2, 1]}\nmodel:\n  preset: fashion-cnn\noptimizer: "
      "{learning_rate: "
      "1}\ntrain: {batch: 16, steps: 1}\n",
      "job.yaml", {});
  EXPECT_EQ(
      spec.status().message(),
      "job.yaml:3: model.preset: its layer max_pool_2.kernel: found 2, larger than the padded "
      "input (1 by 1); accepted: 1 to 1");
}

}  // namespace
}  // namespace lockstep::spec
