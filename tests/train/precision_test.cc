// The promise of DESIGN section 1 in both precisions: bf16 rounds factors, and rounds them alike on
// every placement. With ResNet-20, whose row this is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/fs.h"
#include "tests/data/cifar10_files.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

// The official CIFAR-10 where LOCKSTEP_DATA has it, else a folder in its format.
const std::string& Cifar10() {
  static const std::string& folder = *new std::string([] {
    if (data::HasOfficialCifar10()) return std::string("cifar10");
    std::string path = TemporaryFolder();
    EXPECT_TRUE(WriteFileAtomically(path + "/data_batch_1.bin", data::CifarBatch(0, 130)).ok());
    EXPECT_TRUE(WriteFileAtomically(path + "/test_batch.bin", data::CifarBatch(200, 61)).ok());
    return path;
  }());
  return folder;
}

// Batches that 8 shards do not divide, and a short last one with empty shards.
std::string Yaml(const std::string& precision, const std::string& data, const std::string& model,
                 const std::string& extra = "") {
  return absl::StrCat("data: {", data, ", train_samples: 130, validation_samples: 61}\n", model,
                      "optimizer: {type: momentum, learning_rate: 0.02}\n",
                      "train: {batch: 20, steps: 9, shards: 8, seed: 7, precision: ", precision,
                      extra, ", evaluate: {every_steps: 4}}\ncheckpoint: {every_steps: 5}\n");
}

std::string Fashion(const std::string& precision, const std::string& model,
                    const std::string& extra = "") {
  return Yaml(precision, "path: /usr/share/datasets/fashion-mnist", model, extra);
}

const std::map<std::string, std::string>& Cases() {
  static const auto& cases = *new std::map<std::string, std::string>{
      {"bf16_mlp",
       Fashion("bf16", "model: {preset: mlp, hidden: [520, 33], dropout: 0.2, sync: batch}\n")},
      {"bf16_mlp_accumulate",
       absl::StrReplaceAll(
           Fashion("bf16", "model: {preset: mlp, hidden: [520, 33], dropout: 0.2, sync: shard}\n",
                   ", accumulate: 2"),
           {{"batch: 20", "batch: 37"}})},
      {"bf16_lenet", Fashion("bf16", "model: {preset: lenet}\n")},
      {"bf16_lstm", Fashion("bf16", R"(model:
  layers:
    - {name: below, type: lstm, hidden: 20, output: sequence, bias: false}
    - {name: stack, type: lstm, hidden: 17, layers: 2, bidirectional: true, dropout: 0.3}
    - {name: out, type: dense, units: 10}
)")},
      {"bf16_resnet20", Yaml("bf16", "format: cifar10, path: " + Cifar10(),
                             "model: {preset: resnet-20, sync: batch}\n")},
      {"fp32_resnet20", Yaml("fp32", "format: cifar10, path: " + Cifar10(),
                             "model: {preset: resnet-20, sync: shard}\n")},
  };
  return cases;
}

using Placement = std::pair<int, int>;  // workers, slots

class Precision : public testing::TestWithParam<std::tuple<std::string, Placement>> {};

TEST_P(Precision, EveryNumberIsThatOfOneSlot) {
  const auto& [name, placement] = GetParam();
  static auto& alone = *new std::map<std::string, Training>();
  if (!alone.contains(name)) {
    alone[name] = RunMembers(Cases().at(name), {.workers = 1, .slots = 1});
  }
  const Training& expected = alone[name];
  const Training actual =
      RunMembers(Cases().at(name), {.workers = placement.first, .slots = placement.second});
  ASSERT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 9u);
  ASSERT_EQ(expected.evaluations.size(), 3u);  // steps 4, 8 and the last
  EXPECT_EQ(Numbers(actual), Numbers(expected));
}

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const auto& [name, unused] : Cases()) names.push_back(name);
  return names;
}

std::string NameOf(const testing::TestParamInfo<std::tuple<std::string, Placement>>& info) {
  const auto [workers, slots] = std::get<1>(info.param);
  return absl::StrCat(std::get<0>(info.param), "_", workers, "x", slots);
}

INSTANTIATE_TEST_SUITE_P(All, Precision,
                         testing::Combine(testing::ValuesIn(Names()),
                                          testing::Values(Placement(1, 1), Placement(1, 2),
                                                          Placement(2, 1), Placement(3, 1),
                                                          Placement(5, 1))),
                         NameOf);

// oneDNN 2.6 has bf16 code for these, whose weight gradients were wrong by their own size.
TEST(PrecisionOfAConvolution, InDilatedGroupsIsNearThatOfFp32) {
  const auto norm = [](const std::string& precision) {
    const Training run = RunMembers(
        absl::StrCat("data: {format: synthetic, shape: [32, 32, 3], train_samples: 64, "
                     "validation_samples: 9}\n"
                     "model:\n  layers:\n"
                     "    - {type: conv2d, filters: 8, kernel: 3, padding: 1}\n"
                     "    - {type: conv2d, filters: 8, kernel: 3, groups: 8, padding: 2, "
                     "dilation: 2, bias: false}\n"
                     "    - {type: global_average_pool}\n    - {type: dense, units: 10}\n"
                     "optimizer: {type: sgd, learning_rate: 1, clip_norm: 1000}\n"
                     "train: {batch: 64, steps: 1, shards: 4, precision: ",
                     precision, "}\n"),
        {.workers = 1, .slots = 1});
    AgreedDigest(run);
    return run.steps.at(0).gradient_norm();
  };
  EXPECT_NEAR(norm("bf16") / norm("fp32"), 1, 0.01);
}

TEST(PrecisionOfACheckpoint, ARunDoesNotGoOnWithAnother) {
  const std::string model = "model: {preset: mlp, hidden: [16]}\n";
  const Cluster whole{.workers = 1, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(Fashion("bf16", model), whole));
  Cluster rest{.workers = 2, .slots = 1};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000005";
  EXPECT_EQ(AgreedDigest(RunMembers(Fashion("bf16", model), rest)), digest);
  EXPECT_THAT(RunMembers(Fashion("fp32", model), rest).prepare_error,
              testing::HasSubstr("it was made with train.precision bf16, the spec says fp32"));
}

}  // namespace
}  // namespace lockstep::train
