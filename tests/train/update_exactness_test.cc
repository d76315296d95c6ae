// The equalities of exactness_test.cc for every optimizer and everything else that shapes an
// update.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "nlohmann/json.hpp"
#include "tests/train/members.h"
#include "worker/train/offline.h"

namespace lockstep::train {
namespace {

struct Case {
  std::string optimizer = "{type: momentum, learning_rate: 0.05}";
  std::string slots = {};  // names of the checkpoint's slot vectors, with a blank behind each
  int accumulate = 1;
  bool ghost = false;  // batch norms with sync: shard
};

const std::map<std::string, Case>& Cases() {
  static const auto& cases = *new std::map<std::string, Case>{
      {"adamw", {"{type: adamw, learning_rate: 0.001}", "adam_m adam_v "}},
      {"adagrad", {"{type: adagrad, learning_rate: 0.01, l2: 0.0001}", "adagrad_v "}},
      {"adadelta", {"{type: adadelta, learning_rate: 1}", "adadelta_u adadelta_v "}},
      {"rmsprop", {"{type: rmsprop, learning_rate: 0.001, weight_decay: 0.01}", "rmsprop_v "}},
      {"rmsprop_momentum",
       {"{type: rmsprop, learning_rate: 0.001, momentum: 0.9}", "momentum rmsprop_v "}},
      {"rmsprop_centered",
       {"{type: rmsprop, learning_rate: 0.001, centered: true}", "rmsprop_m rmsprop_v "}},
      {"rmsprop_centered_momentum",
       {"{type: rmsprop, learning_rate: 0.001, centered: true, momentum: 0.5}",
        "momentum rmsprop_m rmsprop_v "}},
      {"clip_norm", {"{type: nesterov, learning_rate: 0.05, clip_norm: 0.3}", "momentum "}},
      {"clip_value", {"{learning_rate: 0.05, clip_value: 0.001}"}},
      // Shards of 13 and 12 samples: in uneven microbatches, in some that the smaller shards lack,
      // and in single samples. The last batch of an epoch fills only the first of its partial
      // shard.
      {"accumulate_3", {.slots = "momentum ", .accumulate = 3}},
      {"accumulate_13", {.slots = "momentum ", .accumulate = 13}},
      {"accumulate_3_ghost", {.slots = "momentum ", .accumulate = 3, .ghost = true}},
      {"accumulate_4_ghost_clipped",
       {.optimizer = "{type: adamw, learning_rate: 0.001, clip_norm: 0.5}",
        .slots = "adam_m adam_v ",
        .accumulate = 4,
        .ghost = true}},
  };
  return cases;
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string WithOptimizer(const std::string& optimizer) {
  std::string yaml = MlpYaml();
  const size_t begin = yaml.find("optimizer: {"), end = yaml.find('\n', begin);
  return yaml.replace(begin, end - begin, "optimizer: " + optimizer);
}

std::string YamlOf(const std::string& name) {
  const Case& c = Cases().at(name);
  std::string yaml = WithOptimizer(c.optimizer);
  if (c.ghost) yaml = Replaced(yaml, "sync: batch", "sync: shard");
  return Replaced(yaml, "train: {", absl::StrCat("train: {accumulate: ", c.accumulate, ", "));
}

using Placement = std::pair<int, int>;  // workers, slots

std::string NameOf(const testing::TestParamInfo<std::tuple<std::string, Placement>>& info) {
  const auto [workers, slots] = std::get<1>(info.param);
  return absl::StrCat(std::get<0>(info.param), "_", workers, "x", slots);
}

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const auto& [name, unused] : Cases()) names.push_back(name);
  return names;
}

class UpdateExactness : public testing::TestWithParam<std::tuple<std::string, Placement>> {};

TEST_P(UpdateExactness, EveryStepIsThatOfOneSlot) {
  const auto& [name, placement] = GetParam();
  const Training expected = RunMembers(YamlOf(name), {.workers = 1, .slots = 1});
  const Training actual =
      RunMembers(YamlOf(name), {.workers = placement.first, .slots = placement.second});
  EXPECT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 30u);
  EXPECT_EQ(Numbers(actual), Numbers(expected));
  EXPECT_LT(expected.steps.back().train().loss(), expected.steps.front().train().loss());
  for (const v1::StepMetrics& step : expected.steps) EXPECT_GT(step.gradient_norm(), 0);
}

// With plain SGD at rate 1 an update is the gradient.
TEST(Clipping, BoundsTheUpdate) {
  const auto first_loss_and_norm = [](const std::string& optimizer) {
    const Training run = RunMembers(WithOptimizer(optimizer), {.workers = 1, .slots = 2});
    AgreedDigest(run);
    return std::pair(run.steps[0].gradient_norm(), run.steps[1].train().loss());
  };
  const auto [norm, loss] = first_loss_and_norm("{learning_rate: 0.05}");
  // The reported norm is the unclipped one; a bound above it changes nothing, one below it does.
  EXPECT_EQ(first_loss_and_norm(absl::StrCat("{learning_rate: 0.05, clip_norm: ", norm * 2, "}")),
            std::pair(norm, loss));
  const auto [clipped_norm, clipped_loss] =
      first_loss_and_norm(absl::StrCat("{learning_rate: 0.05, clip_norm: ", norm / 2, "}"));
  EXPECT_EQ(clipped_norm, norm);
  EXPECT_NE(clipped_loss, loss);
  // Half the gradient is half the rate, but for two roundings.
  EXPECT_NEAR(clipped_loss, first_loss_and_norm("{learning_rate: 0.025}").second, 1e-5);
  EXPECT_NE(first_loss_and_norm("{learning_rate: 0.05, clip_value: 0.001}").second, loss);
}

// A frozen layer keeps its initial bits; the others do not.
TEST(Multipliers, OfALayerReachItsTensors) {
  std::string yaml = MlpYaml();
  const std::string dense = "{name: dense1, type: dense, units: 64";
  yaml.replace(yaml.find(dense), dense.size(), dense + ", learning_rate_multiplier: 0");
  const Cluster one{.workers = 1, .slots = 1, .output_dir = TemporaryFolder()};
  const Cluster three{.workers = 3, .slots = 1};
  EXPECT_EQ(AgreedDigest(RunMembers(yaml, three)), AgreedDigest(RunMembers(yaml, one)));
  const auto digests = ReadFile(one.output_dir + "/digests.jsonl", 16 << 20);
  ASSERT_TRUE(digests.ok()) << digests.status();
  std::map<std::string, std::set<std::string>> values;  // that a tensor's digest took
  for (const char* name : {"\"dense1.weight\":\"", "\"dense1.bias\":\"", "\"dense2.weight\":\""}) {
    for (size_t at = digests->find(name); at != std::string::npos;
         at = digests->find(name, at + 1)) {
      values[name].insert(digests->substr(at + std::string(name).size(), 32));
    }
  }
  ASSERT_EQ(values.size(), 3u) << digests->substr(0, 400);
  EXPECT_EQ(values["\"dense1.weight\":\""].size(), 1u);
  EXPECT_EQ(values["\"dense1.bias\":\""].size(), 1u);
  EXPECT_EQ(values["\"dense2.weight\":\""].size(), 30u);
}

INSTANTIATE_TEST_SUITE_P(All, UpdateExactness,
                         testing::Combine(testing::ValuesIn(Names()),
                                          testing::Values(Placement(1, 1), Placement(1, 2),
                                                          Placement(2, 1), Placement(3, 1),
                                                          Placement(5, 1))),
                         NameOf);

// With power-of-two cuts, leaves are the same whether shards or microbatches make them: 8 shards of
// 16 are 4 of 2 or 2 of 4 microbatches, to the last bit of every tensor, statistics too.
TEST(Accumulation, OfMicrobatchesIsThatOfAsManyShards) {
  const auto digest = [](int shards, int accumulate, int samples) {
    std::string yaml = Replaced(MlpYaml(), "sync: batch", "sync: shard");
    yaml = Replaced(
        yaml, "batch: 100, steps: 30, shards: 8",
        absl::StrCat("batch: 128, steps: 20, shards: ", shards, ", accumulate: ", accumulate));
    yaml = Replaced(yaml, "train_samples: 1030", absl::StrCat("train_samples: ", samples));
    const Training run = RunMembers(yaml, {.workers = 1, .slots = 2});
    std::string losses;
    for (const v1::StepMetrics& step : run.steps)
      absl::StrAppend(&losses, step.train().loss(), " ");
    return std::pair(AgreedDigest(run), losses);
  };
  // The last batch of 500 is short: 116 samples, 7 leaves and a quarter of one.
  for (const int samples : {1024, 500}) {
    const auto shards = digest(8, 1, samples);
    EXPECT_EQ(digest(4, 2, samples), shards);
    EXPECT_EQ(digest(2, 4, samples), shards);
    EXPECT_NE(digest(4, 1, samples), shards);
  }
}

// Whatever the microbatches, a shard is one step's work and its samples count once.
TEST(Accumulation, CountsShardsAndSamplesOnce) {
  const Training run = RunMembers(YamlOf("accumulate_3"), {.workers = 2, .slots = 2});
  AgreedDigest(run);
  EXPECT_EQ(run.steps[0].train().samples(), 100);
  EXPECT_EQ(run.steps[10].train().samples(), 30);
  for (int shard = 0; shard < 8; ++shard) {
    int64_t steps = 0;
    for (const v1::Ended& ended : run.ended) steps += ended.shard_steps(shard);
    EXPECT_EQ(steps, shard < 3 ? 30 : 28) << shard;
  }
}

TEST(Accumulation, TakesTheActivationMemoryOfAMicrobatch) {
  const auto activations = [](const std::string& yaml) {
    const absl::StatusOr<std::string> text = ExplainSpec(yaml);
    EXPECT_TRUE(text.ok()) << text.status();
    return nlohmann::json::parse(*text)["memory"]["activations_bytes"].get<int64_t>();
  };
  for (const char* sync : {"batch", "shard"}) {
    const auto yaml = [&](int accumulate) {
      return absl::StrCat(
          "data: {path: d}\nmodel: {preset: fashion-cnn, sync: ", sync,
          "}\noptimizer: {learning_rate: 0.1}\n",
          "train: {batch: 512, steps: 1, evaluate: {batch: 8}, accumulate: ", accumulate, "}\n");
    };
    // But for the alignment of small tensors; one microbatch at a time may need even less.
    const auto whole = static_cast<double>(activations(yaml(1)));
    EXPECT_LE(4.0 * static_cast<double>(activations(yaml(4))), 1.01 * whole) << sync;
  }
}

// A checkpoint goes on only with the cut that it was made with.
TEST(Accumulation, ARunDoesNotGoOnWithAnother) {
  const Cluster whole{.workers = 1, .slots = 2, .output_dir = TemporaryFolder()};
  AgreedDigest(RunMembers(YamlOf("accumulate_3"), whole));
  Cluster rest{.workers = 1, .slots = 1};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000013";
  EXPECT_THAT(RunMembers(MlpYaml(), rest).prepare_error,
              testing::HasSubstr("it was made with train.accumulate 3, the spec says 1"));
}

// Saved in mid-epoch and resumed on another placement: the bits of the undisturbed run.
class UpdateResume : public testing::TestWithParam<std::string> {};

TEST_P(UpdateResume, OnAnotherPlacementGivesTheBitsOfTheUndisturbedRun) {
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(YamlOf(GetParam()), whole));
  Cluster rest{.workers = 1, .slots = 3};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000013";
  const Training resumed = RunMembers(YamlOf(GetParam()), rest);
  EXPECT_EQ(AgreedDigest(resumed), digest);
  ASSERT_EQ(resumed.steps.size(), 17u);
  EXPECT_EQ(resumed.steps.front().step(), 14);

  // The checkpoint holds the documented slots of a tensor, and no others.
  const auto file = ReadFile(rest.resume_from + "/manifest.json", 1 << 20);
  ASSERT_TRUE(file.ok()) << file.status();
  std::string slots;
  for (const char* slot : {"adadelta_u", "adadelta_v", "adagrad_v", "adam_m", "adam_v", "momentum",
                           "rmsprop_m", "rmsprop_v"}) {
    if (file->find(absl::StrCat("\"", slot, "/dense1.weight\"")) != std::string::npos) {
      absl::StrAppend(&slots, slot, " ");
    }
  }
  EXPECT_EQ(slots, Cases().at(GetParam()).slots);
}

INSTANTIATE_TEST_SUITE_P(All, UpdateResume, testing::ValuesIn(Names()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace lockstep::train
