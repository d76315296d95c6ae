#include "worker/nn/program.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/nn/cases.h"
#include "tests/nn/graph_maker.h"

namespace lockstep::nn {
namespace {

using spec::LayerType;
using spec::Sync;
using testing::ElementsAre;
using testing::HasSubstr;

std::shared_ptr<const Program> MustCompile(const GraphMaker& maker) {
  return Program::Compile(const_cast<GraphMaker&>(maker).graph()).value();
}

TEST(ProgramTest, FusesReluOnlyIntoAProducerThatNothingElseReads) {
  GraphMaker m({4, 4, 1}, 3);
  m.Conv2d(2, 3, 1, 1);
  m.Relu();  // fused
  m.BatchNorm(Sync::kShard);
  m.Relu();  // fused
  m.Flatten();
  const int dense = m.Dense(3);
  const int relu = m.Relu(dense);  // dense is read twice
  const int tanh = m.Tanh(dense);
  m.Relu(tanh);  // nothing to fuse with
  m.AddLayers({relu, m.Last()});
  const auto program = MustCompile(m);
  std::vector<int> layers, fused;
  for (const Program::Node& node : program->nodes()) {
    layers.push_back(node.layer);
    fused.push_back(node.fused_relu);
  }
  EXPECT_THAT(layers, ElementsAre(0, 2, 4, 5, 6, 7, 8, 9));
  EXPECT_THAT(fused, ElementsAre(1, 3, -1, -1, -1, -1, -1, -1));
  EXPECT_EQ(program->node_name(0), "layer1");
  EXPECT_EQ(program->node_name(3), "layer5");
  EXPECT_THAT(program->nodes()[1].inputs, ElementsAre(0));
  EXPECT_THAT(program->nodes()[7].inputs, ElementsAre(4, 6));
}

// 'b' where a node is stored as bf16, 'f' where as fp32; in the order of nodes.
std::string StoredTypes(GraphMaker& m, bool stores_bf16 = true,
                        spec::Precision precision = spec::Precision::kBf16) {
  m.graph().precision = precision;
  std::string types;
  for (const device::ElementType type : MustCompile(m)->StoredTypes(stores_bf16)) {
    types += type == device::ElementType::kBf16 ? 'b' : 'f';
  }
  return types;
}

TEST(ProgramTest, StoresBf16WhereEveryLayerThatTouchesItTakesItSo) {
  GraphMaker residual({8, 8, 3}, 3);
  residual.Conv2d(8, 3, 1, 1);  // of the image, which is fp32
  residual.BatchNorm(Sync::kBatch);
  const int relu = residual.Relu();
  residual.MaxPool(2, 2);
  residual.Conv2d(8, 1);
  const int norm = residual.BatchNorm(Sync::kShard);
  residual.AddLayers({norm, residual.AveragePool(2, 2, 0, relu)});
  residual.Relu();
  residual.GlobalAveragePool();  // to fp32
  residual.Dense(3);
  EXPECT_EQ(StoredTypes(residual), "bbbbbbbbff");
  EXPECT_EQ(StoredTypes(residual, false), "ffffffffff");
  EXPECT_EQ(StoredTypes(residual, true, spec::Precision::kFp32), "ffffffffff");
  EXPECT_EQ(StoredTypes(residual, true, spec::Precision::kTf32), "ffffffffff");

  // A dense layer behind views takes fp32, and so do all up to the convolution.
  GraphMaker chain({8, 8, 1}, 3);
  chain.Conv2d(4, 3, 1, 1);
  chain.MaxPool(2, 2);
  chain.Conv2d(4, 3, 1, 1);
  chain.MaxPool(2, 2);
  chain.Flatten();
  chain.Dense(3);
  EXPECT_EQ(StoredTypes(chain), "bbffff");

  // Of two readers one is enough; and a convolution by single channels keeps both sides fp32.
  GraphMaker mixed({8, 8, 3}, 3);
  const int conv = mixed.Conv2d(8, 3, 1, 1);
  mixed.Multiply({mixed.Tanh(conv), mixed.Conv2d(8, 3, 1, 1, true, conv)});
  mixed.Conv2dOfParts(8, 3, 1, 1, 8);
  mixed.Conv2d(8, 3, 1, 1);
  mixed.GlobalAveragePool();
  mixed.Dense(3);
  EXPECT_EQ(StoredTypes(mixed), "fffffbff");
}

TEST(ProgramTest, FusesAResidualIntoTheNormThatNothingElseReads) {
  GraphMaker m({4, 4, 2}, 3);
  const int stem = m.Conv2d(2, 3, 1, 1);  // node 0
  const int first = m.BatchNorm(Sync::kShard);
  const int projected = m.BatchNorm(Sync::kShard, stem);  // node 1
  m.AddLayers({projected, first});                        // takes the later of two norms: node 2
  const int relu = m.Relu();
  const int norm = m.BatchNorm(Sync::kShard);
  m.AddLayers({norm, relu});                             // node 3, without a relu
  const int read_twice = m.BatchNorm(Sync::kShard);      // node 4
  m.AddLayers({read_twice, relu});                       // node 5
  m.AddLayers({read_twice, m.Last()});                   // node 6
  m.AddLayers({m.BatchNorm(Sync::kShard), relu, stem});  // of three: nodes 7, 8
  m.GlobalAveragePool();
  m.Dense(3);
  const auto program = MustCompile(m);
  std::vector<std::vector<int>> nodes;
  for (const Program::Node& node : program->nodes()) {
    nodes.push_back({node.layer, node.fused_add, node.fused_relu});
  }
  EXPECT_THAT(nodes,
              ElementsAre(ElementsAre(0, -1, -1), ElementsAre(1, -1, -1), ElementsAre(2, 3, 4),
                          ElementsAre(5, 6, -1), ElementsAre(7, -1, -1), ElementsAre(8, -1, -1),
                          ElementsAre(9, -1, -1), ElementsAre(10, -1, -1), ElementsAre(11, -1, -1),
                          ElementsAre(12, -1, -1), ElementsAre(13, -1, -1)));
  EXPECT_THAT(program->nodes()[2].inputs, ElementsAre(0, 1));
  EXPECT_THAT(program->nodes()[3].inputs, ElementsAre(2, 2));
  EXPECT_EQ(program->node_name(2), "layer4");
  EXPECT_EQ(program->node_name(3), "layer6");
}

TEST(ProgramTest, ParametersLieInTheOrderOfBackwardAndAreAligned) {
  GraphMaker m({5}, 3);
  m.Dense(7);
  m.BatchNorm(Sync::kShard);
  m.Dense(3, /*bias=*/false);
  const auto program = MustCompile(m);
  std::vector<std::string> names;
  int64_t end = 0;
  for (const optim::TensorView& view : program->parameters().tensors) {
    names.push_back(view.name);
    EXPECT_EQ(view.offset % optim::FlatLayout::kAlignment, 0);
    EXPECT_GE(view.offset, end);
    EXPECT_EQ(view.digest_key, TensorKey(view.name));
    end = view.offset + view.size;
  }
  EXPECT_THAT(names, ElementsAre("layer2.weight", "layer1.weight", "layer1.bias", "layer0.weight",
                                 "layer0.bias"));
  EXPECT_EQ(program->parameters().size, 32 + 16 + 16 + 48 + 16);
  EXPECT_TRUE(program->parameters().tensors[0].decays);
  EXPECT_FALSE(program->parameters().tensors[1].decays);
  // The nodes' ranges partition the vector, the last node first.
  int64_t at = 0;
  for (int i = 2; i >= 0; --i) {
    EXPECT_EQ(program->nodes()[i].parameters_begin, at);
    at = program->nodes()[i].parameters_end;
  }
  EXPECT_EQ(at, program->parameters().size);
}

TEST(ProgramTest, StatisticsAndMomentsFollowTheLayers) {
  GraphMaker m({4, 4, 1}, 3);
  m.Conv2d(2, 3);
  m.BatchNorm(Sync::kShard);
  m.Flatten();
  m.Dense(3);
  m.BatchNorm(Sync::kBatch);
  const auto program = MustCompile(m);
  EXPECT_TRUE(program->has_synchronized_norm());
  ASSERT_EQ(program->moments().size(), 2u);
  const MomentsSlice &first = program->moments()[0], &second = program->moments()[1];
  EXPECT_EQ(first.channels, 2);
  EXPECT_EQ(first.spatial, 4);
  EXPECT_EQ(first.offset, 0);
  EXPECT_EQ(second.channels, 3);
  EXPECT_EQ(second.spatial, 1);
  EXPECT_EQ(second.offset, 4);
  EXPECT_EQ(program->moments_size(), 10);
  EXPECT_EQ(program->statistics().tensors[3].name, "layer4.running_var");
  EXPECT_EQ(second.running_var, program->statistics().tensors[3].offset);
  EXPECT_EQ(second.running_mean, program->statistics().tensors[2].offset);
}

TEST(ProgramTest, NoGradientIsWantedBeforeTheFirstParameters) {
  GraphMaker m({4, 4, 1}, 3);
  const int pool = m.MaxPool(2, 2);
  const int conv = m.Conv2d(1, 1, 1, 0, true, pool);
  m.AddLayers({pool, conv});
  m.Flatten();
  m.Dense(3);
  const auto program = MustCompile(m);
  std::vector<bool> input, output;
  for (const Program::Node& node : program->nodes()) {
    input.push_back(node.needs_input_gradient);
    output.push_back(node.needs_output_gradient);
  }
  EXPECT_THAT(input, ElementsAre(false, false, true, true, true));
  EXPECT_THAT(output, ElementsAre(false, true, true, true, true));
}

TEST(ProgramTest, TheLayoutIsAFunctionOfTheGraph) {
  for (const GraphCase& graph_case : GraphCases()) {
    const auto a = Program::Compile(graph_case.graph).value();
    const auto b = Program::Compile(graph_case.graph).value();
    ASSERT_EQ(a->parameters().tensors.size(), b->parameters().tensors.size());
    for (size_t i = 0; i < a->parameters().tensors.size(); ++i) {
      EXPECT_EQ(a->parameters().tensors[i].name, b->parameters().tensors[i].name);
      EXPECT_EQ(a->parameters().tensors[i].offset, b->parameters().tensors[i].offset);
    }
  }
}

// By layer of the lstm, then by direction, each on a cache line.
TEST(ProgramTest, TensorsOfAnLstm) {
  GraphMaker m({4, 3, 1}, 3);
  m.Lstm(3, {.layers = 2, .bidirectional = true});
  m.Dense(3);
  const auto program = MustCompile(m);
  const Program::Node& node = program->nodes()[0];
  ASSERT_EQ(node.tensors.size(), 16u);
  EXPECT_EQ(node.weight, node.tensors[0]);
  EXPECT_EQ(node.bias, node.tensors[1]);
  const auto& views = program->parameters().tensors;  // after the dense layer's two
  for (size_t i = 0; i < node.tensors.size(); ++i) EXPECT_EQ(views[i + 2].offset, node.tensors[i]);
  EXPECT_EQ(views[2].name, "layer0.weight_ih_l0");
  EXPECT_EQ(views[9].name, "layer0.bias_hh_l0_reverse");
  EXPECT_EQ(views[10].name, "layer0.weight_ih_l1");
  EXPECT_EQ(views[10].shape, (std::vector<int64_t>{12, 6}));
  EXPECT_EQ(node.parameters_end, program->parameters().size);
}

TEST(ProgramTest, RefusesABrokenLstm) {
  const std::vector<std::function<void(spec::Layer&)>> damages = {
      [](spec::Layer& l) { l.hidden = 0; },
      [](spec::Layer& l) { l.layers = 0; },
      [](spec::Layer& l) { l.layers = 1; },
      [](spec::Layer& l) { l.bidirectional = false; },
      [](spec::Layer& l) { l.sequence = true; },
      [](spec::Layer& l) { l.bias = false; },
      [](spec::Layer& l) { l.rate = 1; },
      [](spec::Layer& l) { l.output = {4}; },
      [](spec::Layer& l) { l.tensors.pop_back(); },
      [](spec::Layer& l) {
        l.tensors[8].shape = {12, 3};
      },
      [](spec::Layer& l) { l.tensors[3].trainable = false; },
  };
  for (size_t i = 0; i < damages.size(); ++i) {
    GraphMaker m({4, 3, 1}, 3);
    m.Lstm(3, {.layers = 2, .bidirectional = true});
    m.Dense(3);
    ASSERT_TRUE(Program::Compile(m.graph()).ok());
    damages[i](m.graph().layers[0]);
    const absl::Status status = Program::Compile(m.graph()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << i;
    EXPECT_THAT(std::string(status.message()), HasSubstr("layer0")) << i;
  }
  GraphMaker flat({6}, 3);
  flat.Lstm(3, {});
  EXPECT_EQ(Program::Compile(flat.graph()).status().code(), absl::StatusCode::kInvalidArgument);
}

// Every broken invariant of graph.h is refused with the layer's name.
struct Broken {
  std::string name;
  std::function<void(spec::Graph&)> damage;
  std::string error;
};
class BrokenGraphTest : public testing::TestWithParam<Broken> {};
TEST_P(BrokenGraphTest, IsRefused) {
  GraphMaker m({4, 4, 2}, 3);
  m.Conv2d(2, 3);              // 0
  m.BatchNorm(Sync::kBatch);   // 1
  m.MaxPool(2, 2);             // 2
  m.Flatten();                 // 3
  const int a = m.Dense(3);    // 4
  m.Dropout(0.5);              // 5
  m.AddLayers({a, m.Last()});  // 6
  ASSERT_TRUE(Program::Compile(m.graph()).ok());
  GetParam().damage(m.graph());
  const auto program = Program::Compile(m.graph());
  ASSERT_EQ(program.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(program.status().message()), HasSubstr(GetParam().error));
}
INSTANTIATE_TEST_SUITE_P(
    Damages, BrokenGraphTest,
    testing::Values(
        Broken{"NoLayer", [](spec::Graph& g) { g.layers.clear(); }, "no layer"},
        Broken{"NoData",
               [](spec::Graph& g) {
                 g.data_shape = {4, 0, 2};
               },
               "data"},
        Broken{"LaterInput", [](spec::Graph& g) { g.layers[1].inputs = {2}; }, "layer1"},
        Broken{"NoInput", [](spec::Graph& g) { g.layers[1].inputs = {}; }, "layer1"},
        Broken{"TwoInputs",
               [](spec::Graph& g) {
                 g.layers[2].inputs = {1, 1};
               },
               "layer2"},
        Broken{"WrongOutput",
               [](spec::Graph& g) {
                 g.layers[0].output = {3, 2, 2};
               },
               "layer0"},
        Broken{"WindowTooLarge", [](spec::Graph& g) { g.layers[2].kernel = 9; }, "layer2"},
        Broken{"StrideZero", [](spec::Graph& g) { g.layers[2].stride = 0; }, "layer2"},
        Broken{"PaddingTooLarge", [](spec::Graph& g) { g.layers[2].padding = 2; }, "layer2"},
        Broken{"WrongWeight",
               [](spec::Graph& g) {
                 g.layers[4].tensors[0].shape = {3, 9};
               },
               "layer4"},
        Broken{"MissingBias", [](spec::Graph& g) { g.layers[4].tensors.pop_back(); }, "layer4"},
        Broken{"NoTensor", [](spec::Graph& g) { g.layers[4].tensors.clear(); }, "layer4"},
        Broken{"TrainableAverage", [](spec::Graph& g) { g.layers[1].tensors[2].trainable = true; },
               "layer1"},
        Broken{"Rate", [](spec::Graph& g) { g.layers[5].rate = 1; }, "layer5"},
        Broken{"Unused",
               [](spec::Graph& g) {
                 g.layers[6].inputs = {4, 4};
               },
               "layer5"},
        Broken{"ShapesToAdd",
               [](spec::Graph& g) {
                 g.layers[6].inputs = {4, 5, 3};
               },
               "layer6"},
        Broken{"Classes", [](spec::Graph& g) { g.classes = 4; }, "layer6"},
        Broken{"InputTarget",
               [](spec::Graph& g) {
                 g.loss = spec::LossType::kMeanSquaredError;
                 g.target = spec::Target::kInput;
               },
               "layer6"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lockstep::nn
