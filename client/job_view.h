// A job as its events tell it: what the progress display and the final table show.
//
// Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>

#include "client/metrics_log.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::client {

class JobView {
 public:
  // Events in order. The job's own fields (state, steps, ...) come from Job events and are advanced
  // by the step events after them.
  void Add(const v1::JobEvent& event);
  // The job as a call to GetJob returned it, newer than the events so far.
  void Update(const v1::Job& job);

  const v1::Job& job() const { return job_; }
  const MetricsLog& metrics() const { return metrics_; }
  // 0 while unknown.
  int64_t total_steps() const { return job_.total_steps(); }
  int64_t total_epochs() const;
  double fraction() const;  // of the steps, 0 while their number is unknown

  // Means over the current epoch so far; no samples before its first step.
  v1::Score epoch_score() const;
  // The same as it was after `step`, which is the last step or the last of the epoch before;
  // otherwise no samples. (The next epoch's first steps may overtake the evaluation of this one.)
  v1::Score epoch_score_after(int64_t step) const;
  // Over the last seconds of training; 0 before the second step.
  double samples_per_second() const;
  // Seconds left by the pace of the run so far, evaluations included; negative while unknown.
  double seconds_left() const;

 private:
  v1::Job job_;
  MetricsLog metrics_;
  double loss_sum_ = 0, correct_sum_ = 0;  // of the current epoch, weighted by samples
  int64_t epoch_ = 0, epoch_samples_ = 0;
  bool has_accuracy_ = false;
  v1::Score epoch_before_;
  int64_t epoch_before_end_ = 0;  // its last step
  struct Point {
    double seconds;
    int64_t step, samples;  // of this run up to here
  };
  std::deque<Point> recent_;
  Point first_{0, 0, 0};
  int64_t samples_ = 0;
};

}  // namespace lockstep::client
