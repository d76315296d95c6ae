#include "worker/train/recorder.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "absl/time/clock.h"
#include "tests/common/temporary_folder.h"

namespace lockstep::train {
namespace {

// What shows an evaluation shows the training loss of its step beside it. Steps and evaluations are
// pushed while others are formatted, but slowly enough that the ring never fills: a push that
// waited for the recorder would not come in between.
TEST(Recorder, AnEvaluationGoesOutWithItsStepOrLater) {
  const lockstep::TemporaryFolder folder;
  constexpr int64_t kSteps = 1000;
  std::atomic<int64_t> step = 0, evaluations = 0, early = 0;  // of what was sent
  {
    Recorder::Options options;
    options.digest_path = folder / "digests.jsonl";
    options.tensor_names.assign(20, "dense_1.weight");
    options.send = [&](const v1::Progress& progress) {
      if (progress.steps_size() > 0) step = progress.steps().rbegin()->step();
      evaluations += progress.evaluations_size();
      for (const v1::Evaluation& evaluation : progress.evaluations()) {
        early += evaluation.step() > step;
      }
    };
    Recorder recorder(std::move(options));
    const std::vector<Digest> digests(20);
    StepRecord record;
    record.has_digests = true;
    v1::Evaluation evaluation;
    while (record.step < kSteps) {
      evaluation.set_step(++record.step);
      recorder.PushStep(record, digests);
      recorder.PushEvaluation(evaluation);
      absl::SleepFor(absl::Microseconds(250));
    }
    while (step < kSteps || evaluations < kSteps) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_EQ(recorder.status(), absl::OkStatus());
  }
  EXPECT_EQ(step, kSteps);
  EXPECT_EQ(evaluations, kSteps);
  EXPECT_EQ(early, 0);
}

// Steps wait for others to go with, but for the first, and for what a checkpoint must not outlive;
// none is lost where they come faster than they are taken.
TEST(Recorder, SendsStepsTogether) {
  std::atomic<int64_t> messages = 0, steps = 0;
  StepRecord record;
  const auto push = [&](Recorder& recorder, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      ++record.step;
      recorder.PushStep(record, {});
    }
  };
  const auto wait_for = [&](int64_t count) {
    while (steps < count) absl::SleepFor(absl::Milliseconds(1));
  };
  {
    Recorder::Options options;
    options.send = [&](const v1::Progress& progress) {
      ++messages;
      steps += progress.steps_size();
    };
    Recorder recorder(std::move(options));
    push(recorder, 1);
    wait_for(1);
    EXPECT_EQ(messages, 1);
    const absl::Time began = absl::Now();
    for (int round = 1; round <= 40; ++round) {
      push(recorder, 1);
      absl::SleepFor(absl::Milliseconds(10));
    }
    wait_for(41);
    const int64_t most = 2 + (absl::Now() - began) / absl::Milliseconds(200);
    EXPECT_LE(messages - 1, most);
    push(recorder, 1);
    recorder.SendSoon();
    wait_for(42);
    push(recorder, 1000);  // four times what the ring holds
  }
  EXPECT_EQ(steps, 1042);
}

}  // namespace
}  // namespace lockstep::train
