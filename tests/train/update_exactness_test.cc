// The equalities of exactness_test.cc for every optimizer and everything else that shapes an
// update.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

struct Case {
  std::string optimizer;
  std::string slots = {};  // names of the checkpoint's slot vectors, with a blank behind each
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
  };
  return cases;
}

std::string YamlOf(const std::string& name) {
  std::string yaml = MlpYaml();
  const size_t begin = yaml.find("optimizer: {"), end = yaml.find('\n', begin);
  return yaml.replace(begin, end - begin, "optimizer: " + Cases().at(name).optimizer);
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

std::string Numbers(const Training& run) {
  std::string text;
  for (v1::StepMetrics s : run.steps) {
    s.clear_seconds();
    absl::StrAppend(&text, s.ShortDebugString(), "\n");
  }
  return text;
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
}

INSTANTIATE_TEST_SUITE_P(All, UpdateExactness,
                         testing::Combine(testing::ValuesIn(Names()),
                                          testing::Values(Placement(1, 1), Placement(1, 2),
                                                          Placement(2, 1), Placement(3, 1),
                                                          Placement(5, 1))),
                         NameOf);

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
