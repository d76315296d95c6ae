// What goes wrong in a member ends it with one line that says what and where.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::string Replace(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

// A learning rate that overflows: the step is named, the first tensor is named, and it is the same
// line for every placement.
TEST(NonFinite, NamesStepAndFirstTensorWhateverThePlacement) {
  const std::string yaml = Replace(MlpYaml(), "learning_rate: 0.05", "learning_rate: 1000000");
  std::string expected;
  for (const auto& [workers, slots] : {std::pair(1, 1), std::pair(1, 2), std::pair(3, 1)}) {
    const Training run = RunMembers(yaml, {.workers = workers, .slots = slots});
    ASSERT_FALSE(run.ended.empty());
    int causes = 0;
    for (const v1::Ended& ended : run.ended) {
      ASSERT_EQ(ended.outcome(), v1::Ended::ERRORED);
      if (ended.secondary()) continue;  // was told of the first's failure before it said its own
      ++causes;
      EXPECT_THAT(ended.error(),
                  AllOf(HasSubstr("step "), HasSubstr("is not finite"), Not(HasSubstr("\n"))));
      const std::string message =
          ended.error().substr(std::min(ended.error().size(), ended.error().find("step ")));
      if (expected.empty()) expected = message;
      EXPECT_EQ(message, expected);
    }
    EXPECT_GE(causes, 1);
  }
}

TEST(Data, MissingFolderIsNamed) {
  const Training run = RunMembers(
      Replace(MlpYaml(), "/usr/share/datasets/fashion-mnist", "/nowhere/at/all"), {.workers = 1});
  EXPECT_THAT(run.prepare_error, HasSubstr("/nowhere/at/all"));
}

TEST(Data, LabelOutOfRangeIsNamed) {
  const Training run = RunMembers(
      Replace(Replace(MlpYaml(), "data: {", "data: {classes: 9, "), "units: 10", "units: 9"),
      {.workers = 1});
  EXPECT_THAT(run.prepare_error, AllOf(HasSubstr("label"), HasSubstr("train-labels")));
}

TEST(Checkpoints, AFolderThatCannotBeMadeIsNamed) {
  const std::string file = TemporaryFolder() + "/file";
  ASSERT_TRUE(WriteFileAtomically(file, "in the way").ok());
  const Training run = RunMembers(MlpYaml(), {.workers = 1, .output_dir = file});
  ASSERT_EQ(run.ended.size(), 1u);
  EXPECT_EQ(run.ended[0].outcome(), v1::Ended::ERRORED);
  EXPECT_THAT(run.ended[0].error(), HasSubstr(file));
}

class ResumeRefused : public testing::Test {
 protected:
  void SetUp() override {
    Cluster cluster{.workers = 1, .slots = 2, .output_dir = folder_};
    AgreedDigest(RunMembers(MlpYaml(), cluster));
  }
  std::string ErrorOf(const std::string& yaml) {
    return RunMembers(yaml, {.workers = 1, .resume_from = folder_}).prepare_error;
  }
  const std::string folder_ = TemporaryFolder();
};

TEST_F(ResumeRefused, WithAnotherBatchSeedShardsModelOptimizerOrData) {
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "batch: 100", "batch: 50")),
              AllOf(HasSubstr("train.batch 100"), HasSubstr("50")));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "shards: 8", "shards: 4")), HasSubstr("train.shards 8"));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "seed: 7", "seed: 8")), HasSubstr("train.seed 7"));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "units: 32", "units: 33")),
              HasSubstr("out.weight has shape [10, 32], expected [10, 33]"));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "type: momentum", "type: sgd")), HasSubstr("momentum"));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "type: relu", "type: elu")),
              HasSubstr("its model is not the spec's: modified: layers["));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "type: momentum", "type: momentum, clip_norm: 0.5")),
              HasSubstr("its optimizer is not the spec's: modified: clip_norm: 0 -> 0.5"));
  EXPECT_THAT(ErrorOf(MlpYaml() + "loss: {label_smoothing: 0.1}\n"),
              HasSubstr("its loss is not the spec's: "));
  EXPECT_THAT(ErrorOf(MlpYaml() + "schedule: {type: cosine}\n"),
              HasSubstr("its schedule is not the spec's: modified: type: \"constant\""));
  EXPECT_THAT(ErrorOf(Replace(MlpYaml(), "train_samples: 1030", "train_samples: 1031")),
              HasSubstr("other data"));
}

// A member that sees no checkpoint offers none; the coordinator knows whether another does.
TEST_F(ResumeRefused, NotByAMemberThatSeesNoCheckpoint) {
  const Training run = RunMembers(
      MlpYaml(), {.workers = 2, .host_ids = {"a", "b"}, .resume_from = folder_, .resume_rank = 1});
  EXPECT_EQ(run.prepare_error, "");
  EXPECT_THAT(run.offered, testing::ElementsAre(-1, 30));
}

// The newest checkpoint is damaged: the one before it is used, and the end is that of the
// undisturbed run.
TEST_F(ResumeRefused, NotWhereOnlyTheNewestIsDamaged) {
  const std::string newest = folder_ + "/checkpoints/step-00000030/model.safetensors";
  std::string content = *ReadFile(newest, 1 << 28);
  content[content.size() / 2] ^= 1;
  std::ofstream(newest, std::ios::binary) << content;
  const Training run = RunMembers(MlpYaml(), {.workers = 1, .resume_from = folder_});
  ASSERT_EQ(run.prepare_error, "");
  ASSERT_EQ(run.steps.size(), 4u);  // from step 26
  ASSERT_EQ(run.notes.size(), 1u);
  EXPECT_THAT(run.notes[0], AllOf(HasSubstr("step-00000030 is not used"), HasSubstr(newest)));
  EXPECT_EQ(AgreedDigest(run), AgreedDigest(RunMembers(MlpYaml(), {.workers = 1})));
}

}  // namespace
}  // namespace lockstep::train
