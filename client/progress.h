// What a person sees of a job while it runs: on a terminal one line redrawn in place (epoch, loss,
// accuracy, samples/s, time left) with evaluations above it; elsewhere plain lines.
//
// Thread-safe: events come from a stream's thread, Tick and Print from the main thread.
#pragma once

#include <functional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/job_view.h"
#include "client/terminal.h"
#include "common/clock.h"

namespace lockstep::client {

// The line of a terminal, at most `width` columns: parts that do not fit are left out, the bar
// first.
std::string ProgressLine(const JobView& view, const Terminal& terminal, int width);

// The plain line of a step, of an evaluation.
std::string StepLine(const JobView& view);
std::string EvaluationLine(const JobView& view, const v1::Evaluation& evaluation);

class Progress {
 public:
  using Writer = std::function<void(const std::string&)>;  // text as it is, without buffering
  // `terminal` is what the writer writes to. A state is told once it has lasted `state_patience` (a
  // local run passes through waiting and starting in a moment; needs Tick). The clock must outlive
  // it.
  Progress(const Terminal& terminal, Writer writer, Clock& clock,
           absl::Duration state_patience = absl::ZeroDuration());

  void Add(const v1::JobEvent& event);
  void Update(const v1::Job& job);
  // Redraws where that is due; at most ten times a second.
  void Tick();
  // A line of text, above the progress line.
  // Calls `print`, which writes elsewhere on the same screen, with the bar out of its way.
  void Aside(const std::function<void()>& print);
  void Print(const std::string& line);
  // The last state of the line stays; nothing is drawn after it.
  void Finish();

  JobView view() const;  // a copy
  int64_t total_steps() const;

 private:
  void ShowState() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Line(const std::string& text) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Redraw(bool force) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Terminal terminal_;
  const Writer writer_;
  Clock& clock_;
  const absl::Duration state_patience_;
  mutable absl::Mutex mutex_;
  JobView view_ ABSL_GUARDED_BY(mutex_);
  std::string state_ ABSL_GUARDED_BY(mutex_), shown_state_ ABSL_GUARDED_BY(mutex_);
  absl::Time state_since_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Time drawn_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Time stepped_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  bool line_open_ ABSL_GUARDED_BY(mutex_) = false;
  bool changed_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace lockstep::client
