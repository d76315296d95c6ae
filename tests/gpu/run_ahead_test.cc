// How seldom a training whose host runs ahead waits for the device, counted by the emulator.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/gpu/emulator/emulator.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

constexpr char kShallow[] = R"(
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 16}
    - {name: norm1, type: batch_norm, sync: batch}
    - {name: relu1, type: relu}
    - {name: drop1, type: dropout, rate: 0.2}
    - {name: out, type: dense, units: 10}
)";

emulator::Counters CountOf(int64_t steps, const std::string& layers = kShallow) {
  const std::string yaml = absl::StrCat(R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 330, validation_samples: 50,
       normalize: {mean: [0.286], std: [0.353]}}
checkpoint: {every_epochs: 0}
resources: {device: cuda}
train: {batch: 60, shards: 8, evaluate: {batch: 50, every_epochs: 0}, steps: )",
                                        steps, R"(}
model:
  layers:)",
                                        layers, R"(
optimizer: {type: momentum, learning_rate: 0.05, clip_norm: 0.5}
)");
  const emulator::Counters before = emulator::Count();
  AgreedDigest(RunMembers(yaml, {}));
  emulator::Counters counters = emulator::Count();
  counters.waits -= before.waits;
  counters.launches -= before.launches;
  counters.graph_launches -= before.graph_launches;
  counters.graph_relaunches -= before.graph_relaunches;
  return counters;
}

TEST(RunAheadTest, TheHostSeldomWaits) {
  constexpr int64_t kFew = 30, kMany = 70;
  const emulator::Counters few = CountOf(kFew), many = CountOf(kMany);
  // But the first of a full batch in each of two places, and the first of a short one, which are
  // all in the second.
  EXPECT_EQ(few.graph_launches, kFew - 3);
  EXPECT_EQ(many.graph_launches, kMany - 3);
  // Every fourth step.
  EXPECT_EQ(many.waits - few.waits, (kMany - kFew) / 4);
  // Besides, the gather.
  EXPECT_EQ(many.launches - few.launches, kMany - kFew);
  // Launches of what has not run yet may wait.
  EXPECT_EQ(many.graph_relaunches, 0);
}

// A long step: of more there would be more calls at once than the device takes.
TEST(RunAheadTest, OfLongStepsFewAreAhead) {
  std::string layers = "\n    - {name: flat, type: flatten}\n";
  for (int i = 0; i < 24; ++i) {
    absl::StrAppend(&layers, "    - {name: dense", i, ", type: dense, units: 4}\n    - {name: norm",
                    i, ", type: layer_norm}\n    - {name: tanh", i, ", type: tanh}\n");
  }
  absl::StrAppend(&layers, "    - {name: out, type: dense, units: 10}\n");
  constexpr int64_t kFew = 16, kMany = 26;
  const emulator::Counters few = CountOf(kFew, layers), many = CountOf(kMany, layers);
  EXPECT_EQ(many.waits - few.waits, kMany - kFew);
  EXPECT_EQ(many.graph_relaunches, 0);
}

}  // namespace
}  // namespace lockstep::train
