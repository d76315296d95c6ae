// ToYaml: what is written reads back to the same message, and looks as a person would write it.
#include <cmath>
#include <random>
#include <string>

#include "common/spec/spec.h"
#include "fmt/format.h"
#include "gmock/gmock.h"

namespace lockstep::spec {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// A valid spec drawn from `random`, that exercises every section.
std::string RandomSpec(std::mt19937_64& random) {
  const auto pick = [&](std::vector<std::string> choices) {
    return choices[random() % choices.size()];
  };
  const auto real = [&] {
    return fmt::format("{}", std::ldexp(static_cast<double>(random() >> 11) + 1, -53));
  };
  const auto number = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  const std::string activation = pick({"relu", "tanh", "sigmoid"});
  const std::string model =
      pick({fmt::format("{{preset: mlp, hidden: [{}, {}], dropout: {}}}", number(1, 900),
                        number(1, 9), real()),
            "{preset: mlp, batch_norm: false}",
            fmt::format("{{preset: fashion-cnn, sync: {}}}", pick({"batch", "shard"})),
            fmt::format(R"(
  layers:
    - {{name: out, type: dense, units: 10, inputs: [flat]}}
    - {{name: flat, type: flatten, inputs: [sum]}}
    - {{type: conv2d, inputs: [data], filters: {0}, kernel: 3, padding: 1, weight_init: {{type: {1}}}}}
    - {{type: {2}}}
    - {{type: batch_norm, momentum: {3}}}
    - {{name: "null", type: conv2d, inputs: [data], filters: {0}, kernel: 1, bias: false}}
    - {{type: dropout, rate: {4}}}
    - {{name: sum, type: add, inputs: [batch_norm_1, dropout_1]}})",
                        number(1, 40), pick({"he", "xavier", "normal", "uniform", "zeros"}),
                        activation, real(), real())});
  const std::string optimizer = pick({"sgd", "momentum", "nesterov", "adam", "adagrad",
                                      "adadelta, rho: 0.3", "rmsprop, centered: true"}) +
                                ", learning_rate: " + real();
  const std::string schedule =
      pick({"{type: constant}", fmt::format("{{type: cosine, floor: {}, warmup_steps: 7}}", real()),
            fmt::format("{{type: step, at_epochs: [{}, 2, 3.5], factor: {}}}", real(), real()),
            "{type: step, at_steps: [1, 1000000000000]}"});
  const std::string path =
      pick({"/data", "\"a \\\"b\\\" \\\\ c: #d\"", "'~'", "\"null\"", "'- x'", "é/ü", "\"1e3\""});
  return fmt::format(
      "name: {}\ndata: {{path: {}, normalize: {{mean: [{}], std: [{}]}}, train_samples: {}, "
      "augment: {{crop_padding: {}, flip: true, cutout: 3}}}}\n"
      "model: {}\noptimizer: {{type: {}, l2: {}}}\nschedule: {}\n"
      "train: {{batch: {}, epochs: {}, seed: {}, shards: {}, evaluate: {{every_steps: {}}}}}\n"
      "resources: {{slots: 1}}\n",
      pick({"a", "\"null\"", "true", "1", "1.5", "yes"}), path, real(), real(), number(1000, 60000),
      number(0, 28), model, optimizer, real(), schedule, number(16, 1000), number(1, 9), random(),
      number(1, 8), number(0, 9));
}

TEST(ToYaml, ReadsBackToTheSameSpec) {
  std::mt19937_64 random(20240);
  for (int i = 0; i < 300; ++i) {
    const std::string text = RandomSpec(random);
    const auto spec = LoadText(text, "first", {});
    ASSERT_TRUE(spec.ok()) << spec.status() << "\n" << text;
    const auto again = Normalize(*spec);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->SerializeAsString(), spec->SerializeAsString()) << text;

    const std::string yaml = ToYaml(*spec, /*expand=*/false);
    const auto back = LoadText(yaml, "second", {});
    ASSERT_TRUE(back.ok()) << back.status() << "\n" << yaml;
    EXPECT_EQ(back->DebugString(), spec->DebugString()) << yaml;
    EXPECT_EQ(back->SerializeAsString(), spec->SerializeAsString()) << yaml;
  }
}

bool Equal(const Layer& a, const Layer& b) {
  if (a.tensors.size() != b.tensors.size()) return false;
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    const TensorSpec &x = a.tensors[i], &y = b.tensors[i];
    if (x.name != y.name || x.shape != y.shape || x.init.type != y.init.type ||
        x.init.scale != y.init.scale || x.trainable != y.trainable || x.decays != y.decays ||
        x.rate_multiplier != y.rate_multiplier || x.decay_multiplier != y.decay_multiplier)
      return false;
  }
  return a.name == b.name && a.type == b.type && a.inputs == b.inputs && a.output == b.output &&
         a.kernel == b.kernel && a.stride == b.stride && a.padding == b.padding &&
         a.bias == b.bias && a.rate == b.rate && a.sync == b.sync && a.momentum == b.momentum &&
         a.epsilon == b.epsilon && a.flops == b.flops;
}

TEST(ToYaml, AnExpandedPresetIsTheSameGraph) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 100; ++i) {
    const std::string text = RandomSpec(random);
    const auto spec = LoadText(text, "first", {});
    ASSERT_TRUE(spec.ok()) << spec.status();
    const std::string yaml = ToYaml(*spec, /*expand=*/true);
    EXPECT_THAT(yaml, Not(HasSubstr("preset")));
    const auto expanded = LoadText(yaml, "second", {});
    ASSERT_TRUE(expanded.ok()) << expanded.status() << "\n" << yaml;
    const auto a = BuildGraph(*spec), b = BuildGraph(*expanded);
    ASSERT_TRUE(a.ok() && b.ok());
    ASSERT_EQ(a->layers.size(), b->layers.size());
    for (size_t k = 0; k < a->layers.size(); ++k)
      EXPECT_TRUE(Equal(a->layers[k], b->layers[k])) << a->layers[k].name << "\n" << yaml;
  }
}

TEST(ToYaml, IsReadable) {
  const auto spec = LoadText(
      "data: {path: d}\nmodel: {preset: mlp, hidden: [8]}\noptimizer: {learning_rate: 0.1}\n"
      "train: {batch: 128, epochs: 1}\n",
      "job.yaml", {});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(ToYaml(*spec, /*expand=*/true), R"(name: job
data:
  format: idx
  path: d
  shape: [28, 28, 1]
  classes: 10
  normalize:
    mean: [0]
    std: [1]
    compute: false
  prefetch: 2
  augment:
    crop_padding: 0
    flip: false
    cutout: 0
model:
  layers:
    - {name: flatten_1, type: flatten}
    - name: dense_1
      type: dense
      units: 8
      bias: false
      weight_init: {type: he, distribution: normal}
      learning_rate_multiplier: 1
      decay_multiplier: 1
    - name: batch_norm_1
      type: batch_norm
      sync: shard
      momentum: 0.1
      epsilon: 1e-05
      statistics: running
      learning_rate_multiplier: 1
    - {name: relu_1, type: relu}
    - name: dense_2
      type: dense
      units: 10
      bias: true
      weight_init: {type: xavier, distribution: uniform}
      bias_init: {type: zeros}
      learning_rate_multiplier: 1
      decay_multiplier: 1
loss:
  type: softmax_cross_entropy
  label_smoothing: 0
optimizer:
  type: sgd
  learning_rate: 0.1
  l2: 0
  weight_decay: 0
  clip_norm: 0
  clip_value: 0
schedule:
  type: constant
  warmup_steps: 0
train:
  batch: 128
  epochs: 1
  shards: 8
  seed: 1
  evaluate:
    every_steps: 0
    every_epochs: 1
    batch: 128
  digest_every: 1
  accumulate: 1
  precision: fp32
  exact: true
checkpoint:
  every_steps: 0
  every_epochs: 1
  keep: 3
resources:
  device: cpu
)");
}

}  // namespace
}  // namespace lockstep::spec
