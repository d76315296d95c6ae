// DESIGN section 1 as equalities for the LSTM: stacked, in both directions, with dropout between
// its layers, read row by row from images, on every placement.
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

// 11 steps an epoch, the last of 30 samples: 13, 13, 4 and five empty shards.
std::string LstmYaml(const std::string& model) {
  return absl::StrCat(R"(
name: lstm
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 1030, validation_samples: 203,
       normalize: {mean: [0.286], std: [0.353]}}
train: {batch: 100, steps: 15, shards: 8, seed: 7, evaluate: {every_steps: 7}}
checkpoint: {every_steps: 6, keep: 5}
optimizer: {type: adam, learning_rate: 0.002, l2: 0.0001}
)",
                      model);
}

constexpr char kPreset[] = "model: {preset: lstm-classifier, lstm_hidden: 40}\n";
constexpr char kStacked[] = R"(
model:
  layers:
    - {name: below, type: lstm, hidden: 20, output: sequence, bias: false}
    - {name: stack, type: lstm, hidden: 17, layers: 2, bidirectional: true, dropout: 0.3}
    - {name: out, type: dense, units: 10}
)";

class LstmExactness : public testing::TestWithParam<std::tuple<const char*, std::pair<int, int>>> {
};

TEST_P(LstmExactness, EveryNumberIsThatOfOneSlot) {
  const auto& [model, placement] = GetParam();
  const std::string yaml = LstmYaml(model);
  const Training expected = RunMembers(yaml, {.workers = 1, .slots = 1});
  const Training actual = RunMembers(yaml, {.workers = placement.first, .slots = placement.second});
  ASSERT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 15u);
  ASSERT_EQ(expected.evaluations.size(), 3u);  // steps 7, 14 and the last
  EXPECT_EQ(Numbers(actual), Numbers(expected));
}

INSTANTIATE_TEST_SUITE_P(All, LstmExactness,
                         testing::Combine(testing::Values(kPreset, kStacked),
                                          testing::Values(std::pair(1, 1), std::pair(1, 2),
                                                          std::pair(2, 1), std::pair(3, 1),
                                                          std::pair(5, 1))),
                         [](const auto& info) {
                           return absl::StrCat(
                               std::get<0>(info.param) == kPreset ? "preset" : "stacked", "_",
                               std::get<1>(info.param).first, "x", std::get<1>(info.param).second);
                         });

// Saved in mid-epoch, resumed on another placement: the bits of the undisturbed run.
TEST(LstmResume, OnAnotherPlacementGivesTheBitsOfTheUndisturbedRun) {
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(LstmYaml(kStacked), whole));
  Cluster rest{.workers = 1, .slots = 3};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000006";
  const Training resumed = RunMembers(LstmYaml(kStacked), rest);
  EXPECT_EQ(AgreedDigest(resumed), digest);
  EXPECT_EQ(resumed.steps.size(), 9u);
}

}  // namespace
}  // namespace lockstep::train
