#include "worker/train/recorder.h"

#include <gtest/gtest.h>

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
  int64_t step = 0, evaluations = 0, early = 0;  // of what was sent
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
    EXPECT_EQ(recorder.status(), absl::OkStatus());
  }  // sends the rest
  EXPECT_EQ(step, kSteps);
  EXPECT_EQ(evaluations, kSteps);
  EXPECT_EQ(early, 0);
}

}  // namespace
}  // namespace lockstep::train
