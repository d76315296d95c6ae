// The promise through real processes: `lockstep run` on every placement of the list ends with the
// same digests and the same evaluation numbers.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/cluster/shell.h"

namespace lockstep {
namespace {

constexpr char kBin[] = LOCKSTEP_BIN_DIR;

// 1,030 samples in batches of 100 over 8 shards: shards of 13 and 12, and a short batch of 30.
constexpr char kRest[] = R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 1030, validation_samples: 1003}
train: {batch: 100, steps: 30, shards: 8, seed: 3, evaluate: {every_steps: 10}}
checkpoint: {every_steps: 13}
)";
constexpr char kMlp[] = R"(
name: mlp
model: {preset: mlp, hidden: [64, 32], sync: batch, dropout: 0.2}
optimizer: {type: nesterov, learning_rate: 0.05}
)";
constexpr char kCnn[] = R"(
name: cnn
model: {preset: fashion-cnn, sync: shard}
optimizer: {type: adam, learning_rate: 0.001}
)";

class Placement : public testing::TestWithParam<std::tuple<std::string, std::pair<int, int>>> {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "lockstep-placement-XXXXXX";
    ASSERT_NE(mkdtemp(folder_.data()), nullptr);
    std::ofstream(folder_ + "/spec.yaml")
        << (std::get<0>(GetParam()) == "mlp" ? kMlp : kCnn) << kRest;
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(folder_).ok()); }

  nlohmann::json RunOn(int workers, int slots, const std::string& arguments) {
    const std::string out = absl::StrCat(folder_, "/run", runs_++);
    return LastLine(OutputOf(absl::StrCat(kBin, "/lockstep run ", folder_, "/spec.yaml --workers ",
                                          workers, " --slots ", slots, " --out ", out, " -o json ",
                                          arguments, " 2>>", folder_, "/log")));
  }
  static void ExpectSameResult(const nlohmann::json& a, const nlohmann::json& b) {
    ASSERT_TRUE(a.is_object() && b.is_object());
    for (const char* key :
         {"state", "steps", "epochs", "train", "validation", "parameter_digest", "state_digest"}) {
      EXPECT_EQ(a[key], b[key]) << key;
    }
  }

  std::string folder_;
  int runs_ = 0;
};

TEST_P(Placement, GivesTheResultOfOneSlotAlsoThroughAResume) {
  const auto [workers, slots] = std::get<1>(GetParam());
  const nlohmann::json one = RunOn(1, 1, "");
  ExpectSameResult(RunOn(workers, slots, ""), one);
  // From the middle of the second epoch, on this placement, of a run made on one slot.
  ExpectSameResult(
      RunOn(workers, slots, absl::StrCat("--resume ", folder_, "/run0/checkpoints/step-00000013")),
      one);
  OutputOf(absl::StrCat(kBin, "/lockstep diff ", folder_, "/run0 ", folder_, "/run1"));
}

INSTANTIATE_TEST_SUITE_P(All, Placement,
                         testing::Combine(testing::Values("mlp", "cnn"),
                                          testing::Values(std::pair(1, 1), std::pair(1, 2),
                                                          std::pair(2, 1), std::pair(3, 1),
                                                          std::pair(2, 2), std::pair(5, 1),
                                                          std::pair(8, 1))),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_",
                                               std::get<1>(info.param).first, "x",
                                               std::get<1>(info.param).second);
                         });

}  // namespace
}  // namespace lockstep
