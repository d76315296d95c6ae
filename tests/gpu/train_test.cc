// Whole trainings on the CUDA device, by the same programs as on CPUs: at reduced shapes on the
// emulator, where they are part of the suite, and on a GPU, where the same file runs. A job's
// result is a function of its spec on this device too, and agrees with the CPU's within what
// rounding explains.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

struct Model {
  const char* name;
  const char* yaml;
  double tolerance;  // of a step's loss against the CPU's, relative
};

// Each of at most 50,000 parameters. 6 steps an epoch, the last of 30 samples: 8 or 7 rows a shard,
// then 8, 8, 8, 6 and four empty shards.
constexpr Model kModels[] = {
    {"mlp", R"(
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 32}
    - {name: norm1, type: batch_norm, sync: batch}
    - {name: relu1, type: relu}
    - {name: drop1, type: dropout, rate: 0.2}
    - {name: dense2, type: dense, units: 24}
    - {name: relu2, type: relu}
    - {name: norm2, type: batch_norm, sync: batch}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05, l2: 0.0001}
)",
     1e-4},
    {"cnn", R"(
model:
  layers:
    - {name: conv1, type: conv2d, filters: 4, kernel: 3, padding: 1, stride: 2, bias: false}
    - {name: norm1, type: batch_norm}
    - {name: relu1, type: relu}
    - {name: pool1, type: max_pool, kernel: 2, stride: 2}
    - {name: conv2, type: conv2d, filters: 8, kernel: 3, padding: 1}
    - {name: relu2, type: relu}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
optimizer: {type: adam, learning_rate: 0.002, clip_norm: 1}
)",
     1e-4},
    {"lstm", R"(
model: {preset: lstm-classifier, lstm_hidden: 20}
optimizer: {type: adam, learning_rate: 0.002}
)",
     1e-4},
    {"mlp_bf16", R"(
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 32}
    - {name: relu1, type: relu}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05}
)",
     2e-3},
};

std::string YamlOf(const Model& model, const std::string& device) {
  const bool bf16 = std::string_view(model.name).ends_with("_bf16");
  return absl::StrCat(R"(
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 330, validation_samples: 103,
       normalize: {mean: [0.286], std: [0.353]}}
checkpoint: {every_steps: 4, keep: 5}
train: {batch: 60, steps: 10, shards: 8, seed: 7, evaluate: {batch: 50, every_steps: 5}, )",
                      "precision: ", bf16 ? "bf16" : "fp32", "}\nresources: {device: ", device,
                      "}\n", model.yaml);
}

class CudaTraining : public testing::TestWithParam<Model> {};

TEST_P(CudaTraining, EveryNumberIsThatOfOneSlot) {
  const std::string yaml = YamlOf(GetParam(), "cuda");
  const Training expected = RunMembers(yaml, {.workers = 1, .slots = 1});
  const std::string digest = AgreedDigest(expected);
  ASSERT_EQ(expected.steps.size(), 10u);
  for (const auto& [workers, slots] : {std::pair(1, 2), std::pair(2, 1), std::pair(3, 1)}) {
    const Training actual = RunMembers(yaml, {.workers = workers, .slots = slots});
    EXPECT_EQ(AgreedDigest(actual), digest) << workers << " x " << slots;
    EXPECT_EQ(Numbers(actual), Numbers(expected)) << workers << " x " << slots;
  }
}

TEST_P(CudaTraining, AgreesWithTheCpu) {
  const Training gpu = RunMembers(YamlOf(GetParam(), "cuda"), {});
  const Training cpu = RunMembers(YamlOf(GetParam(), "cpu"), {});
  AgreedDigest(gpu);
  AgreedDigest(cpu);
  ASSERT_EQ(gpu.steps.size(), cpu.steps.size());
  for (size_t i = 0; i < cpu.steps.size(); ++i) {
    EXPECT_NEAR(gpu.steps[i].train().loss(), cpu.steps[i].train().loss(),
                GetParam().tolerance * std::abs(cpu.steps[i].train().loss()))
        << "step " << i + 1;
  }
  ASSERT_EQ(gpu.evaluations.size(), cpu.evaluations.size());
  for (size_t i = 0; i < cpu.evaluations.size(); ++i) {
    const double expected = cpu.evaluations[i].validation().loss();
    EXPECT_NEAR(gpu.evaluations[i].validation().loss(), expected, GetParam().tolerance * expected);
  }
}

// From the checkpoint of step 4, in mid-epoch, on another placement.
TEST_P(CudaTraining, ResumedItEndsWithTheSameBits) {
  const std::string yaml = YamlOf(GetParam(), "cuda");
  const std::string folder = TemporaryFolder();
  const std::string digest = AgreedDigest(RunMembers(yaml, {.output_dir = folder}));
  const Training resumed =
      RunMembers(yaml, {.slots = 2, .resume_from = folder + "/checkpoints/step-00000004"});
  EXPECT_EQ(AgreedDigest(resumed), digest);
}

INSTANTIATE_TEST_SUITE_P(All, CudaTraining, testing::ValuesIn(kModels),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace lockstep::train
