// Every layer and loss, and the population's statistics, as equalities over placements.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/train/members.h"
#include "worker/train/safetensors.h"

namespace lockstep::train {
namespace {

// 230 samples in batches of 40: shards of 5 and a short last batch of 30 with two empty ones.
std::string Yaml(const std::string& layers, const std::string& extra = "",
                 const std::string& normalize = "{mean: [0.286], std: [0.353]}") {
  return absl::StrCat("model:\n  layers:\n", layers,
                      "optimizer: {type: momentum, learning_rate: 0.02, l2: 0.0001}\n", extra,
                      "data: {path: /usr/share/datasets/fashion-mnist, train_samples: 230,\n"
                      "       validation_samples: 103, normalize: ",
                      normalize,
                      "}\n"
                      "train: {batch: 40, steps: 14, shards: 8, seed: 7, evaluate: {every_steps: "
                      "5}}\ncheckpoint: {every_steps: 8, keep: 5}\n");
}

std::string Accumulating(std::string yaml) {
  const std::string train = "train: {";
  return yaml.replace(yaml.find(train), train.size(), train + "accumulate: 2, ");
}

std::string Residual(const std::string& norm) {
  return absl::StrCat(R"(
    - {name: conv0, type: conv2d, filters: 6, kernel: 3, stride: 2, padding: 1, bias: false}
    - {name: norm0, type: batch_norm, )",
                      norm, R"(}
    - {name: relu0, type: relu}
    - {name: conv1, type: conv2d, filters: 10, kernel: 3, stride: 2, padding: 1, bias: false}
    - {name: norm1, type: batch_norm, )",
                      norm, R"(}
    - {name: relu1, type: relu}
    - {name: conv2, type: conv2d, filters: 10, kernel: 3, padding: 1, bias: false}
    - {name: norm2, type: batch_norm, )",
                      norm, R"(}
    - {name: every_second, type: average_pool, kernel: 1, stride: 2, inputs: [relu0]}
    - {name: pad, type: pad, channels_before: 2, channels_after: 2}
    - {name: sum, type: add, inputs: [norm2, pad]}
    - {name: relu2, type: relu}
    - {name: conv3, type: conv2d, filters: 10, kernel: 3, padding: 1, bias: false}
    - {name: norm3, type: batch_norm, )",
                      norm, R"(}
    - {name: sum3, type: add, inputs: [relu2, norm3]}
    - {name: relu3, type: relu}
    - {name: pool, type: global_average_pool}
    - {name: drop, type: dropout, rate: 0.1}
    - {name: out, type: dense, units: 10}
)");
}

const std::map<std::string, std::string>& Cases() {
  static const auto& cases = *new std::map<std::string, std::string>{
      {"residual_shard", Yaml(Residual("sync: shard"))},
      {"residual_batch", Yaml(Residual("sync: batch"))},
      {"population_shard", Yaml(Residual("sync: shard, statistics: population"))},
      {"population_batch", Yaml(Residual("sync: batch, statistics: population"))},
      // Microbatches of 3 and 2 samples, one by one or across all shards.
      {"population_shard_accumulate",
       Accumulating(Yaml(Residual("sync: shard, statistics: population")))},
      {"population_batch_accumulate",
       Accumulating(Yaml(Residual("sync: batch, statistics: population")))},
      // Wide enough to be walked layer by layer.
      {"population_dense", Accumulating(Yaml(R"(
    - {name: flat, type: flatten}
    - {name: wide1, type: dense, units: 512, bias: false}
    - {name: norm1, type: batch_norm, sync: shard, statistics: population}
    - {name: relu1, type: relu}
    - {name: wide2, type: dense, units: 512, bias: false}
    - {name: norm2, type: batch_norm, sync: shard, statistics: population}
    - {name: relu2, type: relu}
    - {name: out, type: dense, units: 10}
)"))},
      {"images", Yaml(R"(
    - {name: small, type: average_pool, kernel: 4}
    - {name: wide, type: conv2d, filters: 8, kernel: 3, padding: 2, dilation: 2}
    - {name: leaky, type: leaky_relu, slope: 0.1}
    - {name: grouped, type: conv2d, filters: 8, kernel: 3, padding: 1, groups: 4}
    - {name: elu, type: elu}
    - {name: both, type: concat, inputs: [leaky, elu, small]}
    - {name: norm, type: layer_norm}
    - {name: turned, type: transpose, order: [2, 0, 1]}
    - {name: flat, type: reshape, shape: [833]}
    - {name: value, type: dense, units: 24}
    - {name: soft, type: softplus}
    - {name: gate, type: dense, units: 24, inputs: [flat]}
    - {name: share, type: softmax}
    - {name: product, type: multiply, inputs: [soft, share, value]}
    - {name: out, type: dense, units: 10}
)",
                      "loss: {label_smoothing: 0.1}\n")},
      {"embedding", Yaml(R"(
    - {name: table, type: embedding, vocabulary: 256, units: 3}
    - {name: pool, type: average_pool, kernel: 4}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
)",
                         "loss: {type: sigmoid_cross_entropy}\n", "{std: [0.00392156862745098]}")},
      {"autoencoder", Yaml(R"(
    - {name: flat, type: flatten}
    - {name: code, type: dense, units: 16}
    - {name: elu, type: elu}
    - {name: out, type: dense, units: 784}
)",
                           "loss: {type: sigmoid_cross_entropy, target: input}\n", "{mean: [0]}")},
  };
  return cases;
}

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const auto& [name, unused] : Cases()) names.push_back(name);
  return names;
}

using Placement = std::pair<int, int>;  // workers, slots

class LayerExactness : public testing::TestWithParam<std::tuple<std::string, Placement>> {};

TEST_P(LayerExactness, EveryStepAndEvaluationIsThatOfOneSlot) {
  const auto& [name, placement] = GetParam();
  const std::string& yaml = Cases().at(name);
  const Training expected = RunMembers(yaml, {.workers = 1, .slots = 1});
  const Training actual = RunMembers(yaml, {.workers = placement.first, .slots = placement.second});
  EXPECT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 14u);
  ASSERT_EQ(actual.steps.size(), 14u);
  for (size_t i = 0; i < expected.steps.size(); ++i) {
    EXPECT_EQ(actual.steps[i].train().loss(), expected.steps[i].train().loss()) << i;
    EXPECT_TRUE(std::isfinite(expected.steps[i].train().loss())) << i;
  }
  ASSERT_EQ(expected.evaluations.size(), 3u);  // steps 5, 10 and 14
  ASSERT_EQ(actual.evaluations.size(), 3u);
  for (size_t i = 0; i < expected.evaluations.size(); ++i) {
    EXPECT_EQ(actual.evaluations[i].validation().SerializeAsString(),
              expected.evaluations[i].validation().SerializeAsString());
  }
  // It learns something.
  EXPECT_LT(expected.evaluations[2].validation().loss(),
            expected.evaluations[0].validation().loss());
}

std::string NameOf(const testing::TestParamInfo<std::tuple<std::string, Placement>>& info) {
  const auto [workers, slots] = std::get<1>(info.param);
  return absl::StrCat(std::get<0>(info.param), "_", workers, "x", slots);
}

INSTANTIATE_TEST_SUITE_P(All, LayerExactness,
                         testing::Combine(testing::ValuesIn(Names()),
                                          testing::Values(Placement(1, 2), Placement(2, 1),
                                                          Placement(3, 1), Placement(5, 1))),
                         NameOf);

std::map<std::string, std::vector<float>> Statistics(const std::string& folder,
                                                     const std::string& step) {
  const auto file = SafetensorsFile::Open(
      RealFileSystem(), absl::StrCat(folder, "/checkpoints/", step, "/model.safetensors"));
  EXPECT_TRUE(file.ok()) << file.status();
  std::map<std::string, std::vector<float>> values;
  for (const auto& tensor : (*file)->tensors()) {
    if (tensor.name.find("running_") == std::string::npos) continue;
    std::vector<float>& to = values[tensor.name];
    to.resize(static_cast<size_t>(tensor.elements));
    const absl::Status read = (*file)->Read(tensor, to.data());
    EXPECT_TRUE(read.ok()) << read;
  }
  return values;
}

// A norm of the data sees what no parameter changes: after any number of steps, over any batches
// and shards, its statistics are the moments of the whole training set, which one batch in one
// shard gives in one call.
TEST(Population, IsTheWholeTrainingSet) {
  const std::string layers = R"(
    - {name: norm, type: batch_norm, sync: shard, statistics: population}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
)";
  const Cluster cut{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  AgreedDigest(RunMembers(Yaml(layers), cut));
  std::string whole = Yaml(layers);
  const std::string train = "batch: 40, steps: 14, shards: 8";
  whole.replace(whole.find(train), train.size(), "batch: 230, steps: 1, shards: 1");
  const Cluster one{.workers = 1, .slots = 1, .output_dir = TemporaryFolder()};
  AgreedDigest(RunMembers(whole, one));
  const auto expected = Statistics(one.output_dir, "step-00000001");
  ASSERT_EQ(expected.size(), 2u);
  for (const char* step : {"step-00000008", "step-00000014"}) {
    const auto actual = Statistics(cut.output_dir, step);
    ASSERT_EQ(actual.size(), 2u);
    for (const auto& [name, values] : expected) {
      ASSERT_EQ(actual.at(name).size(), 1u);
      EXPECT_NEAR(actual.at(name)[0], values[0], 1e-6) << name;
      EXPECT_NE(values[0], 0) << name;
      EXPECT_NE(values[0], 1) << name;
    }
  }
}

// Statistics that a checkpoint holds go on into the resumed run.
TEST(Population, ResumesOnAnotherPlacement) {
  const std::string& yaml = Cases().at("population_shard");
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(yaml, whole));
  Cluster rest{.workers = 3, .slots = 1, .output_dir = TemporaryFolder()};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000008";
  EXPECT_EQ(AgreedDigest(RunMembers(yaml, rest)), digest);
}

}  // namespace
}  // namespace lockstep::train
