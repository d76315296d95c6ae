#include "tests/nn/cases.h"

#include <functional>
#include <random>

#include "tests/nn/graph_maker.h"

namespace lockstep::nn {
namespace {

using spec::kData;
using spec::Sync;
using spec::Target;

GraphCase Make(const std::string& name, std::vector<int64_t> data, int64_t classes,
               const std::function<void(GraphMaker&)>& build) {
  GraphMaker maker(std::move(data), classes);
  build(maker);
  return {name, maker.graph()};
}

std::vector<GraphCase> MakeCases() {
  std::vector<GraphCase> cases;
  auto add = [&](const std::string& name, std::vector<int64_t> data, int64_t classes,
                 const std::function<void(GraphMaker&)>& build) {
    cases.push_back(Make(name, std::move(data), classes, build));
  };
  add("softmax_regression", {5}, 3, [](GraphMaker& m) { m.Dense(3); });
  add("dense_relu", {5}, 3, [](GraphMaker& m) {
    m.Dense(7);
    m.Relu();
    m.Dense(3, /*bias=*/false);
  });
  add("tanh_sigmoid", {4}, 3, [](GraphMaker& m) {
    m.Dense(6);
    m.Tanh();
    m.Dense(5);
    m.Sigmoid();
    m.Dense(3);
  });
  add("relu_is_the_output", {4}, 3, [](GraphMaker& m) {
    m.Dense(3);
    m.Relu();
    m.MeanSquaredError(Target::kLabel);
  });
  add("conv_relu", {5, 6, 2}, 3, [](GraphMaker& m) {
    m.Conv2d(3, 3, 2, 1);
    m.Relu();
    m.Conv2d(2, 2, 1, 0, /*bias=*/false);
    m.Flatten();
    m.Dense(3);
  });
  add("pad", {3, 4, 2}, 3, [](GraphMaker& m) {
    m.Pad(1, 0, 0);
    m.Conv2d(2, 2);
    m.Pad(2, 1, 3);
    m.Tanh();
    m.Pad(0, 0, 1);
    m.Flatten();
    m.Dense(3);
  });
  add("dilated_conv", {7, 8, 2}, 3, [](GraphMaker& m) {
    m.Conv2dOfParts(3, 3, 2, 2, 1);
    m.Relu();
    m.Conv2dOfParts(2, 2, 0, 3, 1, /*bias=*/false);
    m.Flatten();
    m.Dense(3);
  });
  add("grouped_conv", {4, 5, 4}, 3, [](GraphMaker& m) {
    m.Conv2dOfParts(6, 3, 1, 1, 2);
    m.Tanh();
    m.Conv2dOfParts(6, 3, 2, 2, 6, /*bias=*/false);
    m.GlobalAveragePool();
    m.Dense(3);
  });
  add("concat", {3, 4, 2}, 3, [](GraphMaker& m) {
    const int a = m.Conv2d(3, 3, 1, 1);
    const int b = m.Tanh();
    m.Concat({a, kData, b, a});
    m.Conv2d(2, 3, 1, 1);
    m.Flatten();
    const int x = m.Dense(2);
    const int y = m.Sigmoid();
    m.Concat({x, y});
    m.Dense(3);
  });
  add("multiply", {4}, 3, [](GraphMaker& m) {
    const int a = m.Dense(4);
    const int b = m.Sigmoid();
    const int c = m.Dense(4, true, kData);
    m.Multiply({a, kData, b, c});
    const int d = m.Multiply({m.Last(), c});
    m.Multiply({d, d});
    m.Dense(3);
  });
  add("multiply_of_data_first", {4}, 4, [](GraphMaker& m) {
    const int a = m.Dense(4);
    m.Multiply({kData, kData, a});
  });
  add("maps", {5}, 3, [](GraphMaker& m) {
    m.Dense(6);
    m.LeakyRelu(0.2);
    m.Dense(6);
    m.Elu(1.3);
    m.Dense(6);
    const int s = m.Softplus();
    m.Dense(6);
    m.LeakyRelu(0);
    m.AddLayers({s, m.Last()});
    m.Elu(0.5);
    m.Dense(3);
  });
  add("softmax", {3, 2, 2}, 3, [](GraphMaker& m) {
    m.Conv2d(4, 2, 1, 1);
    m.Softmax();
    m.Flatten();
    m.Dense(5);
    m.Softmax();
    m.Dense(3);
  });
  add("layer_norm", {3, 2, 3}, 3, [](GraphMaker& m) {
    m.LayerNorm();
    m.Conv2d(5, 2, 1, 1);
    const int x = m.LayerNorm();
    m.Tanh();
    m.AddLayers({x, m.Last()});
    m.Flatten();
    m.Dense(6, /*bias=*/false);
    m.LayerNorm();
    m.Relu();
    m.Dense(2);
    m.LayerNorm();
    m.Dense(3);
  });
  add("embedding", {6, 1, 1}, 3, [](GraphMaker& m) {
    m.Embedding(4, 5);
    m.LayerNorm();
    m.Flatten();
    m.Dense(3);
  });
  add("embedding_of_a_view", {2, 3, 2}, 3, [](GraphMaker& m) {
    m.Reshape({4, 3});
    m.Transpose({1, 0});
    m.Embedding(3, 2);
    m.Transpose({2, 0, 1});
    m.Flatten();
    m.Dense(3);
  });
  add("reshape_and_transpose", {3, 4, 2}, 3, [](GraphMaker& m) {
    const int a = m.Conv2d(2, 3, 1, 1);
    m.Transpose({1, 2, 0});
    m.Tanh();
    m.Reshape({6, 4});
    m.Transpose({1, 0});
    m.Reshape({3, 4, 2});
    m.AddLayers({a, m.Last()});
    m.Flatten();
    m.Dense(3);
  });
  add("smoothed_labels", {5}, 4, [](GraphMaker& m) {
    m.Dense(4);
    m.SmoothLabels(0.1);
  });
  add("sigmoid_cross_entropy_of_labels", {5}, 4, [](GraphMaker& m) {
    m.Dense(4);
    m.SigmoidCrossEntropy(Target::kLabel);
  });
  add("sigmoid_cross_entropy_of_data", {2, 2, 2}, 3, [](GraphMaker& m) {
    m.Flatten();
    m.Dense(3);
    m.Softplus();
    m.Dense(8);
    m.SigmoidCrossEntropy(Target::kInput);
  });
  add("max_pool", {6, 5, 1}, 3, [](GraphMaker& m) {
    m.Conv2d(3, 2);
    m.MaxPool(3, 2, 1);
    m.Flatten();
    m.Dense(3);
  });
  add("average_pool", {6, 5, 1}, 3, [](GraphMaker& m) {
    m.Conv2d(3, 2);
    m.AveragePool(3, 2, 1);
    m.Relu();
    m.Flatten();
    m.Dense(3);
  });
  add("pools_of_data", {6, 6, 2}, 2, [](GraphMaker& m) {
    const int largest = m.MaxPool(2, 2, 0, kData);
    const int mean = m.AveragePool(2, 2, 0, kData);
    m.AddLayers({largest, mean});
    m.Conv2d(3, 2);
    m.GlobalAveragePool();
    m.Dense(2);
  });
  for (const Sync sync : {Sync::kShard, Sync::kBatch}) {
    const std::string which = sync == Sync::kShard ? "_shard" : "_batch";
    add("norm_relu" + which, {5}, 3, [&](GraphMaker& m) {
      m.Dense(6, /*bias=*/false);
      m.BatchNorm(sync);
      m.Relu();
      m.Dense(3);
    });
    add("relu_norm" + which, {4, 4, 1}, 3, [&](GraphMaker& m) {
      m.Conv2d(3, 3, 1, 1);
      m.Relu();
      m.BatchNorm(sync);
      m.Flatten();
      m.Dense(3);
    });
    add("norm_of_data" + which, {3, 3, 2}, 3, [&](GraphMaker& m) {
      m.BatchNorm(sync);
      m.Tanh();
      m.Flatten();
      m.Dense(3);
    });
    add("norm_is_the_output" + which, {4}, 3, [&](GraphMaker& m) {
      m.Dense(3);
      m.BatchNorm(sync);
    });
    add("residual" + which, {5, 5, 2}, 3, [&](GraphMaker& m) {
      m.Conv2d(3, 3, 1, 1, /*bias=*/false);
      m.BatchNorm(sync);
      const int trunk = m.Relu();
      m.Conv2d(3, 3, 1, 1, /*bias=*/false);
      m.BatchNorm(sync);
      m.Relu();
      m.Conv2d(3, 3, 1, 1, /*bias=*/false);
      const int branch = m.BatchNorm(sync);
      m.AddLayers({branch, trunk});
      m.Relu();
      m.GlobalAveragePool();
      m.Dense(3);
    });
    add("residual_of_narrower" + which, {6, 5, 2}, 3, [&](GraphMaker& m) {
      m.Conv2d(2, 3, 1, 1, /*bias=*/false);
      m.BatchNorm(sync);
      const int trunk = m.Relu();
      m.Conv2d(5, 3, 2, 1, /*bias=*/false);
      m.BatchNorm(sync);
      m.Relu();
      m.Conv2d(5, 3, 1, 1, /*bias=*/false);
      const int branch = m.BatchNorm(sync);
      m.AveragePool(1, 2, 0, trunk);
      const int shortcut = m.Pad(0, 1, 2);
      m.AddLayers({branch, shortcut});
      const int end = m.Relu();
      m.Conv2d(5, 3, 1, 1, /*bias=*/false);
      m.BatchNorm(sync);
      m.AddLayers({end, m.Last()});
      m.GlobalAveragePool();
      m.Dense(3);
    });
    add("residual_of_projection" + which, {4, 4, 2}, 3, [&](GraphMaker& m) {
      const int trunk = m.Conv2d(2, 3, 1, 1, /*bias=*/false);
      m.BatchNorm(sync);
      const int branch = m.Relu();
      m.Conv2d(3, 1, 2, 0, /*bias=*/false, trunk);
      const int projected = m.BatchNorm(sync);
      m.Conv2d(3, 3, 2, 1, /*bias=*/false, branch);
      const int norm = m.BatchNorm(sync);
      m.AddLayers({projected, norm});
      m.Relu();
      m.Flatten();
      m.Dense(3);
    });
    add("residual_of_data" + which, {4}, 4, [&](GraphMaker& m) {
      m.Dense(4);
      m.BatchNorm(sync);
      m.AddLayers({kData, m.Last()});
      const int sum = m.Relu();
      const int norm = m.BatchNorm(sync);
      m.AddLayers({m.Tanh(norm), m.Sigmoid(norm), sum, norm});
    });
    add("norm_of_constant_data_in_a_residual" + which, {4}, 4, [&](GraphMaker& m) {
      const int dense = m.Dense(4);
      const int norm = m.BatchNorm(sync, kData);
      m.AddLayers({norm, dense});
      m.Relu();
    });
    add("parallel_norms" + which, {5}, 3, [&](GraphMaker& m) {
      const int trunk = m.Dense(4);
      m.BatchNorm(sync, trunk);
      const int left = m.Relu();
      const int right = m.BatchNorm(sync, trunk);
      m.AddLayers({left, right, trunk});
      m.Dense(3);
    });
  }
  add("norms_of_both_kinds", {5}, 3, [](GraphMaker& m) {
    m.Dense(4, /*bias=*/false);
    m.BatchNorm(Sync::kShard);
    m.Relu();
    m.Dense(4, /*bias=*/false);
    m.BatchNorm(Sync::kBatch);
    m.Tanh();
    m.Dense(3);
  });
  add("dropout", {6}, 3, [](GraphMaker& m) {
    m.Dropout(0.25);
    m.Dense(8);
    m.Relu();
    m.Dropout(0.5);
    m.Dense(6);
    m.Dropout(0);
    m.Tanh();
    m.Dropout(0.3);
    m.Dense(3);
  });
  add("mean_squared_error_of_labels", {5}, 4, [](GraphMaker& m) {
    m.Dense(4);
    m.Sigmoid();
    m.MeanSquaredError(Target::kLabel);
  });
  add("autoencoder", {2, 2, 2}, 3, [](GraphMaker& m) {
    m.Flatten();
    m.Dense(3);
    m.Tanh();
    m.Dense(8);
    m.MeanSquaredError(Target::kInput);
  });
  // Whose last call of backward is that of a norm, and reads what a gradient of weights reads.
  add("norm_of_data_read_twice", {4, 4, 2}, 3, [](GraphMaker& m) {
    m.BatchNorm(Sync::kShard, kData);
    const int y = m.Relu();
    const int a = m.Conv2d(2, 3, 1, 1, true, y);
    const int b = m.Conv2d(2, 3, 1, 1, true, y);
    m.AddLayers({a, b});
    m.Flatten();
    m.Dense(3);
  });
  add("norm_of_data_around_a_convolution", {4, 4, 2}, 3, [](GraphMaker& m) {
    const int y = m.BatchNorm(Sync::kBatch, kData);
    const int a = m.Conv2d(2, 3, 1, 1, true, y);
    m.AddLayers({y, a});
    m.Flatten();
    m.Dense(3);
  });
  add("add_to_itself", {4}, 3, [](GraphMaker& m) {
    const int x = m.Dense(3);
    m.AddLayers({x, x});
    m.Tanh();
  });
  add("add_of_data", {3}, 3, [](GraphMaker& m) {
    const int x = m.Dense(3);
    const int y = m.AddLayers({kData, x, kData});
    const int z = m.Dense(3, true, y);
    m.AddLayers({y, z});
  });
  // Outputs that their own backward needs meet consumers that would like to write over them.
  add("outputs_with_several_consumers", {5}, 3, [](GraphMaker& m) {
    m.Dense(4);
    const int t = m.Tanh();
    const int r = m.Relu(t);
    const int s = m.Sigmoid(t);
    const int d = m.Dropout(0.4, t);
    const int e = m.Dense(4, true, r);
    const int f = m.Relu(e);
    m.AddLayers({r, s, d, f, t});
    m.Relu();
    m.Dense(3);
  });
  add("view_and_viewed_both_used", {3, 3, 2}, 3, [](GraphMaker& m) {
    const int c = m.Conv2d(2, 3, 1, 1);
    const int flat = m.Flatten(c);
    const int a = m.Dense(4, true, flat);
    const int pooled = m.GlobalAveragePool(c);
    const int b = m.Dense(4, true, pooled);
    const int t = m.Tanh(flat);
    const int e = m.Dense(4, true, t);
    m.AddLayers({a, b, e});
    m.Dense(3);
  });
  add("relu_chains", {4}, 3, [](GraphMaker& m) {
    m.Dense(5);
    m.Relu();
    m.Relu();
    m.Dropout(0.2);
    m.Relu();
    m.Dense(3);
  });
  add("lstm_last", {5, 3, 1}, 3, [](GraphMaker& m) {
    m.Lstm(4, {});
    m.Dense(3);
  });
  add("lstm_is_the_output", {4, 2, 2}, 3, [](GraphMaker& m) { m.Lstm(3, {.bias = false}); });
  add("lstm_of_one_step", {1, 3, 1}, 3, [](GraphMaker& m) {
    m.Lstm(4, {.bidirectional = true});
    m.Dense(3);
  });
  add("lstm_sequence", {4, 3}, 3, [](GraphMaker& m) {
    m.Lstm(5, {.sequence = true});
    m.Tanh();
    m.Flatten();
    m.Dense(3);
  });
  add("lstm_bidirectional", {4, 3, 2}, 3, [](GraphMaker& m) {
    m.Conv2d(2, 2);
    m.Relu();
    m.Lstm(3, {.bidirectional = true, .sequence = true});
    m.Flatten();
    m.Dense(3);
  });
  add("lstm_stacked", {4, 3, 1}, 3, [](GraphMaker& m) {
    m.Lstm(3, {.layers = 3, .bidirectional = true, .dropout = 0.4});
    m.Dense(3);
  });
  add("lstm_stacked_without_dropout", {3, 3, 1}, 3, [](GraphMaker& m) {
    m.Lstm(4, {.layers = 2, .sequence = true, .bias = false});
    const int first = m.Lstm(2, {.layers = 2, .dropout = 0.5});
    m.Dense(3, true, first);
  });
  add("lstms_of_one_sequence", {4, 3, 1}, 3, [](GraphMaker& m) {
    const int trunk = m.Lstm(4, {.sequence = true}, kData);
    const int a = m.Lstm(4, {}, trunk);
    const int b = m.Lstm(2, {.bidirectional = true}, trunk);
    const int c = m.Dense(4, true, m.Flatten(trunk));
    m.AddLayers({a, b, c});
    m.Dense(3);
  });
  return cases;
}

}  // namespace

const std::vector<GraphCase>& GraphCases() {
  static const auto& cases = *new std::vector<GraphCase>(MakeCases());
  return cases;
}

spec::Graph RandomGraph(uint64_t seed, int layers) {
  std::mt19937_64 random(seed);
  auto pick = [&](int n) { return static_cast<int>(random() % n); };
  GraphMaker m({4, 4, 2}, 3);
  std::vector<int> images = {kData}, vectors;  // all images {4, 4, 2}, all vectors {5}
  if (pick(3) == 0) images = {m.BatchNorm(pick(2) == 0 ? Sync::kBatch : Sync::kShard, kData)};
  vectors.push_back(m.Dense(5, true, images.front()));
  while (m.Last() + 1 < layers) {
    const Sync sync = pick(2) == 0 ? Sync::kBatch : Sync::kShard;
    const int image = images[pick(images.size())], vector = vectors[pick(vectors.size())];
    switch (pick(21)) {
      case 0:
        images.push_back(m.Conv2d(2, 3, 1, 1, pick(2) == 0, image));
        break;
      case 1:
        images.push_back(m.MaxPool(3, 1, 1, image));
        break;
      case 2:
        images.push_back(m.AveragePool(3, 1, 1, image));
        break;
      case 3:
        images.push_back(m.BatchNorm(sync, image));
        break;
      case 4:
        images.push_back(m.Relu(image));
        break;
      case 5:
        images.push_back(m.Tanh(image));
        break;
      case 6:
        images.push_back(m.AddLayers({image, images[pick(images.size())]}));
        break;
      case 7:
        vectors.push_back(m.Dense(5, true, m.Flatten(image)));
        break;
      case 8:
        vectors.push_back(m.Dense(5, pick(2) == 0, vector));
        break;
      case 9:
        vectors.push_back(m.Relu(vector));
        break;
      case 10:
        vectors.push_back(m.Dropout(0.25, vector));
        break;
      case 11:
        vectors.push_back(m.BatchNorm(sync, vector));
        break;
      case 12:
        vectors.push_back(m.Sigmoid(vector));
        break;
      case 13:
        vectors.push_back(m.AddLayers({vector, vectors[pick(vectors.size())], vector}));
        break;
      case 14:
        images.push_back(m.Conv2dOfParts(2, 3, 2, 2, 2, pick(2) == 0, image));
        break;
      case 15:
        m.Concat({image, images[pick(images.size())]});
        images.push_back(m.Conv2d(2, 1));
        break;
      case 16:
        images.push_back(m.Transpose({1, 0, 2}, image));
        break;
      case 17:
        vectors.push_back(m.Multiply({vector, vectors[pick(vectors.size())]}));
        break;
      case 18:
        vectors.push_back(m.Softmax(vector));
        break;
      case 19:
        vectors.push_back(m.LayerNorm(vector));
        break;
      case 20:
        images.push_back(m.Elu(0.7, m.LeakyRelu(0.1, m.Softplus(image))));
        break;
    }
  }
  // Everything unused ends in one sum.
  std::vector<int> used(m.Last() + 1, 0);
  for (const spec::Layer& layer : m.graph().layers) {
    for (const int input : layer.inputs) {
      if (input != kData) used[input] = 1;
    }
  }
  std::vector<int> ends;
  for (size_t i = 0; i < used.size(); ++i) {
    if (used[i] != 0) continue;
    const int layer = static_cast<int>(i);
    ends.push_back(m.ShapeOf(layer).size() == 3 ? m.Dense(5, true, m.Flatten(layer)) : layer);
  }
  m.Dense(3, true, m.AddLayers(ends));
  return m.graph();
}

}  // namespace lockstep::nn
