#include "client/progress.h"

#include "client/summary.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class FakeClock : public Clock {
 public:
  absl::Time Now() override { return now_; }
  void Advance(absl::Duration duration) { now_ += duration; }

 private:
  absl::Time now_ = absl::FromUnixSeconds(1'000'000);
};

v1::JobEvent JobEventOf(v1::JobState state, const std::string& reason = "") {
  v1::JobEvent event;
  v1::Job& job = *event.mutable_job();
  job.set_id("mlp-1");
  job.set_state(state);
  job.set_reason(reason);
  job.set_total_steps(100);
  job.set_steps_per_epoch(50);
  return event;
}

// One step a tenth of a second, 64 samples each.
v1::JobEvent StepEvent(int64_t step, double loss = 0.5, double accuracy = 0.75) {
  v1::JobEvent event;
  v1::StepMetrics& metrics = *event.mutable_step();
  metrics.set_step(step);
  metrics.set_epoch((step - 1) / 50 + 1);
  metrics.mutable_train()->set_loss(loss);
  metrics.mutable_train()->set_accuracy(accuracy);
  metrics.mutable_train()->set_samples(64);
  metrics.set_seconds(0.1 * static_cast<double>(step));
  return event;
}

v1::JobEvent EvaluationEvent(int64_t step) {
  v1::JobEvent event;
  v1::Evaluation& evaluation = *event.mutable_evaluation();
  evaluation.set_step(step);
  evaluation.set_epoch(step / 50);
  evaluation.mutable_validation()->set_loss(0.25);
  evaluation.mutable_validation()->set_accuracy(0.875);
  return event;
}

TEST(JobView, MeansRatesAndTimeLeft) {
  JobView view;
  view.Add(JobEventOf(v1::RUNNING));
  EXPECT_EQ(view.total_steps(), 100);
  EXPECT_EQ(view.total_epochs(), 2);
  EXPECT_LT(view.seconds_left(), 0);
  view.Add(StepEvent(1, 1.0));
  EXPECT_EQ(view.samples_per_second(), 0);
  view.Add(StepEvent(2, 0.5));
  EXPECT_EQ(view.job().step(), 2);
  EXPECT_DOUBLE_EQ(view.epoch_score().loss(), 0.75);
  EXPECT_NEAR(view.samples_per_second(), 640, 1e-6);
  EXPECT_NEAR(view.seconds_left(), 9.8, 1e-6);
  EXPECT_DOUBLE_EQ(view.fraction(), 0.02);
}

TEST(JobView, ANewEpochStartsNewMeansAndKeepsTheOld) {
  JobView view;
  view.Add(JobEventOf(v1::RUNNING));
  view.Add(StepEvent(49, 3.0));
  view.Add(StepEvent(50, 1.0));
  EXPECT_DOUBLE_EQ(view.epoch_score_after(50).loss(), 2.0);
  view.Add(StepEvent(51, 0.5));
  EXPECT_DOUBLE_EQ(view.epoch_score().loss(), 0.5);
  EXPECT_DOUBLE_EQ(view.epoch_score_after(50).loss(), 2.0);
  EXPECT_EQ(view.epoch_score_after(17).samples(), 0);
}

TEST(JobView, AnOlderSnapshotDoesNotTurnTheStepBack) {
  JobView view;
  view.Add(JobEventOf(v1::RUNNING));
  view.Add(StepEvent(7));
  v1::Job old;
  old.set_id("mlp-1");
  old.set_state(v1::STOPPING);
  old.set_step(5);
  view.Update(old);
  EXPECT_EQ(view.job().step(), 7);
  EXPECT_EQ(view.job().state(), v1::STOPPING);
  EXPECT_EQ(view.total_steps(), 100);
}

JobView RunningView() {
  JobView view;
  view.Add(JobEventOf(v1::RUNNING));
  for (int step = 1; step <= 43; ++step) view.Add(StepEvent(step));
  return view;
}

TEST(ProgressLine, ShowsEverythingInEightyColumns) {
  const std::string line = ProgressLine(RunningView(), Terminal(), 79);
  EXPECT_THAT(line, HasSubstr("epoch 1/2"));
  EXPECT_THAT(line, HasSubstr("loss 0.5000"));
  EXPECT_THAT(line, HasSubstr("75.00%"));
  EXPECT_THAT(line, HasSubstr("640 samples/s"));
  EXPECT_THAT(line, HasSubstr("ETA 6 s"));
  EXPECT_THAT(line, HasSubstr("===-"));
}

TEST(ProgressLine, NeverExceedsTheWidth) {
  const JobView view = RunningView();
  Terminal utf8;
  utf8.utf8 = utf8.color = utf8.interactive = true;
  for (int width = 1; width <= 200; ++width) {
    EXPECT_LE(DisplayWidth(ProgressLine(view, Terminal(), width)), width);
    EXPECT_LE(DisplayWidth(ProgressLine(view, utf8, width)), width);
  }
  JobView waiting;
  waiting.Add(JobEventOf(v1::QUEUED, "wartet auf größere, weiße Rechner: ü…ü…ü"));
  for (int width = 1; width <= 80; ++width) {
    const std::string line = ProgressLine(waiting, utf8, width);
    EXPECT_LE(DisplayWidth(line), width);
    EXPECT_NO_THROW(nlohmann::json(line).dump()) << "cut inside a character at " << width;
  }
}

TEST(ProgressLine, BarGrowsWithTheSteps) {
  JobView view = RunningView();
  const auto full = [](const std::string& line) {
    return std::count(line.begin(), line.end(), '=');
  };
  const auto before = full(ProgressLine(view, Terminal(), 120));
  for (int step = 44; step <= 100; ++step) view.Add(StepEvent(step));
  const std::string end = ProgressLine(view, Terminal(), 120);
  EXPECT_GT(before, 0);
  EXPECT_LT(before, full(end));
  EXPECT_THAT(end, Not(HasSubstr("=-")));
}

class ProgressTest : public ::testing::Test {
 protected:
  Progress Make(bool interactive, absl::Duration patience = absl::ZeroDuration()) {
    Terminal terminal;
    terminal.interactive = interactive;
    return Progress(
        terminal, [this](const std::string& text) { output_ += text; }, clock_, patience);
  }
  std::string Take() { return std::exchange(output_, ""); }

  FakeClock clock_;
  std::string output_;
};

TEST_F(ProgressTest, PlainLinesForStatesAndEvaluations) {
  Progress progress = Make(false);
  progress.Add(JobEventOf(v1::QUEUED, "waits for 2 slots"));
  EXPECT_EQ(Take(), "mlp-1 QUEUED: waits for 2 slots\n");
  progress.Add(JobEventOf(v1::QUEUED, "waits for 2 slots"));
  EXPECT_EQ(Take(), "");
  progress.Add(JobEventOf(v1::RUNNING));
  EXPECT_EQ(Take(), "mlp-1 RUNNING\n");
  progress.Add(StepEvent(50));
  Take();
  progress.Add(StepEvent(51, 0.1));  // overtakes the evaluation
  Take();
  progress.Add(EvaluationEvent(50));
  EXPECT_EQ(Take(),
            "epoch 1/2  step 50  train loss 0.5000, accuracy 75.00%  validation loss 0.2500, "
            "accuracy 87.50%\n");
}

TEST_F(ProgressTest, PlainStepLinesAreRare) {
  Progress progress = Make(false);
  progress.Add(JobEventOf(v1::RUNNING));
  Take();
  int lines = 0;
  for (int step = 1; step <= 100; ++step) {
    progress.Add(StepEvent(step));
    lines += !Take().empty();
    clock_.Advance(absl::Milliseconds(100));
  }
  EXPECT_EQ(lines, 2);  // ten seconds, one line in five
}

TEST_F(ProgressTest, AStateIsToldOnceItHasLasted) {
  Progress progress = Make(false, absl::Seconds(1));
  progress.Add(JobEventOf(v1::QUEUED, "no worker"));
  progress.Tick();
  EXPECT_THAT(Take(), IsEmpty());
  clock_.Advance(absl::Milliseconds(1001));
  progress.Tick();
  EXPECT_EQ(Take(), "mlp-1 QUEUED: no worker\n");
}

TEST_F(ProgressTest, RedrawsAtMostTenTimesASecond) {
  Progress progress = Make(true);
  progress.Add(JobEventOf(v1::RUNNING));
  int draws = 0;
  for (int step = 1; step <= 100; ++step) {
    progress.Add(StepEvent(step));
    draws += !Take().empty();
    clock_.Advance(absl::Milliseconds(10));
  }
  EXPECT_GE(draws, 9);
  EXPECT_LE(draws, 11);
}

TEST_F(ProgressTest, ATickDrawsWhatAnEventLeftUndrawn) {
  setenv("COLUMNS", "200", 1);
  Progress progress = Make(true);
  progress.Add(JobEventOf(v1::RUNNING));
  progress.Add(StepEvent(1));
  progress.Add(StepEvent(2));
  Take();
  progress.Tick();
  EXPECT_EQ(Take(), "");
  clock_.Advance(absl::Milliseconds(101));
  progress.Tick();
  EXPECT_THAT(Take(), HasSubstr("step 2/100"));
  clock_.Advance(absl::Milliseconds(101));
  progress.Tick();
  EXPECT_EQ(Take(), "");  // nothing changed
}

TEST_F(ProgressTest, LinesGoAboveTheBarAndNothingAfterTheEnd) {
  Progress progress = Make(true);
  progress.Add(JobEventOf(v1::RUNNING));
  progress.Add(StepEvent(50));
  Take();
  progress.Print("hello");
  EXPECT_EQ(Take(), "\r\x1b[Khello\n");
  progress.Finish();
  const std::string end = Take();
  EXPECT_EQ(end.front(), '\r');
  EXPECT_EQ(end.back(), '\n');
  progress.Add(StepEvent(51));
  progress.Print("late");
  progress.Tick();
  EXPECT_EQ(Take(), "");
}

TEST_F(ProgressTest, TheBarMakesRoomForWhatOthersWrite) {
  Progress progress = Make(true);
  progress.Add(JobEventOf(v1::RUNNING));
  progress.Add(StepEvent(50));
  Take();
  std::string before;
  progress.Aside([&] { before = Take(); });
  EXPECT_EQ(before, "\r\x1b[K");
  clock_.Advance(absl::Milliseconds(101));
  progress.Tick();
  EXPECT_THAT(Take(), HasSubstr("step 50/100"));  // and comes back
}

TEST(Summary, NamesScoresAndDigests) {
  v1::Job job;
  job.set_id("mlp-1");
  job.set_state(v1::SUCCEEDED);
  job.mutable_result()->set_steps(938);
  job.mutable_result()->set_epochs(2);
  job.mutable_result()->mutable_validation()->set_loss(0.3853);
  job.mutable_result()->mutable_validation()->set_accuracy(0.8615);
  job.mutable_result()->set_samples_per_second(4236.7);
  job.mutable_result()->set_data_wait_share(0.0123);
  job.mutable_result()->set_seconds(28.9);
  job.mutable_result()->set_state_digest("9871");
  EXPECT_EQ(SummaryText(job, Terminal()),
            "mlp-1 SUCCEEDED\n"
            "  epochs            2\n"
            "  steps             938\n"
            "  validation        loss 0.3853        accuracy 86.15%\n"
            "  speed             4,236 samples/s\n"
            "  waiting for data  1.23% of training\n"
            "  time              28.9 s\n"
            "  state digest      9871\n");
}

TEST(Description, NamesPlacementAndHostAndPathOfCheckpoints) {
  v1::Job job;
  job.set_id("mlp-1");
  job.set_state(v1::RUNNING);
  v1::SlotPlacement& slot = *job.add_placement();
  slot.set_worker("w3");
  slot.set_slot(1);
  slot.set_first_shard(4);
  slot.set_last_shard(8);
  v1::CheckpointInfo& checkpoint = *job.add_checkpoints();
  checkpoint.set_step(469);
  checkpoint.set_host("alpha");
  checkpoint.set_path("/data/step-00000469");
  const std::string text = DescriptionText(job, Terminal());
  EXPECT_THAT(text, HasSubstr("w3         1  4-7"));
  EXPECT_THAT(text, HasSubstr("469  alpha"));
  EXPECT_THAT(text, HasSubstr("/data/step-00000469"));
}

}  // namespace
}  // namespace lockstep::client
