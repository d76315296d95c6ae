#include "client/job_view.h"

#include <algorithm>

#include "client/format.h"

namespace lockstep::client {
namespace {

constexpr double kWindowSeconds = 5;

}  // namespace

void JobView::Add(const v1::JobEvent& event) {
  switch (event.event_case()) {
    case v1::JobEvent::kJob:
      Update(event.job());
      break;
    case v1::JobEvent::kStep: {
      const v1::StepMetrics& step = event.step();
      metrics_.Add(step);
      if (step.epoch() != epoch_) {
        epoch_before_ = epoch_score();
        epoch_before_end_ = step.step() - 1;
        epoch_ = step.epoch();
        loss_sum_ = correct_sum_ = 0;
        epoch_samples_ = 0;
      }
      loss_sum_ += step.train().loss() * step.train().samples();
      correct_sum_ += step.train().accuracy() * step.train().samples();
      epoch_samples_ += step.train().samples();
      has_accuracy_ = step.train().has_accuracy();
      samples_ += step.train().samples();
      const Point point{step.seconds(), step.step(), samples_};
      if (recent_.empty() || point.seconds < recent_.back().seconds) {
        recent_.clear();
        first_ = point;
      }
      recent_.push_back(point);
      while (recent_.size() > 2 && recent_.front().seconds < point.seconds - kWindowSeconds) {
        recent_.pop_front();
      }
      *job_.mutable_last_step() = step;
      job_.set_step(step.step());
      job_.set_epoch(step.epoch());
      break;
    }
    case v1::JobEvent::kEvaluation:
      metrics_.Add(event.evaluation());
      *job_.mutable_last_evaluation() = event.evaluation();
      break;
    case v1::JobEvent::kCheckpoint:
      *job_.add_checkpoints() = event.checkpoint();
      break;
    case v1::JobEvent::EVENT_NOT_SET:
      break;
  }
}

void JobView::Update(const v1::Job& job) {
  // A view that has seen a later step keeps it: the store may be a moment behind the stream.
  const v1::Job before = job_;
  job_ = job;
  if (before.step() > job.step()) {
    job_.set_step(before.step());
    job_.set_epoch(before.epoch());
    *job_.mutable_last_step() = before.last_step();
  }
  if (before.total_steps() > 0 && job.total_steps() == 0) {
    job_.set_total_steps(before.total_steps());
    job_.set_steps_per_epoch(before.steps_per_epoch());
  }
}

int64_t JobView::total_epochs() const {
  if (job_.steps_per_epoch() == 0) return 0;
  return (job_.total_steps() + job_.steps_per_epoch() - 1) / job_.steps_per_epoch();
}

double JobView::fraction() const {
  if (total_steps() == 0) return 0;
  return std::min(1.0, static_cast<double>(job_.step()) / static_cast<double>(total_steps()));
}

v1::Score JobView::epoch_score() const {
  v1::Score score;
  score.set_samples(epoch_samples_);
  if (epoch_samples_ == 0) return score;
  score.set_loss(loss_sum_ / static_cast<double>(epoch_samples_));
  if (has_accuracy_) score.set_accuracy(correct_sum_ / static_cast<double>(epoch_samples_));
  return score;
}

v1::Score JobView::epoch_score_after(int64_t step) const {
  if (step == job_.step()) return epoch_score();
  return step == epoch_before_end_ ? epoch_before_ : v1::Score();
}

double JobView::samples_per_second() const {
  if (recent_.size() < 2) return 0;
  const double seconds = recent_.back().seconds - recent_.front().seconds;
  if (seconds <= 0) return 0;
  return static_cast<double>(recent_.back().samples - recent_.front().samples) / seconds;
}

double JobView::seconds_left() const {
  if (total_steps() == 0 || recent_.empty() || recent_.back().step <= first_.step) return -1;
  const double pace = (recent_.back().seconds - first_.seconds) /
                      static_cast<double>(recent_.back().step - first_.step);
  return pace * static_cast<double>(std::max<int64_t>(0, total_steps() - job_.step()));
}

}  // namespace lockstep::client
