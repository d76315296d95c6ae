#include "client/progress.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "client/format.h"
#include "fmt/format.h"

namespace lockstep::client {
namespace {

constexpr absl::Duration kRedrawInterval = absl::Milliseconds(100);
constexpr absl::Duration kStepInterval = absl::Seconds(5);
constexpr int kMinBar = 8, kMaxBar = 40;

std::string Bar(double fraction, int width, const Terminal& terminal) {
  const int full = std::clamp(static_cast<int>(fraction * width), 0, width);
  std::string done, rest;
  for (int i = 0; i < width; ++i) {
    if (i < full) {
      done += terminal.utf8 ? "━" : "=";
    } else {
      rest += terminal.utf8 ? "─" : "-";
    }
  }
  return terminal.Paint(Color::kGreen, done) + terminal.Paint(Color::kDim, rest);
}

std::string Position(const JobView& view) {
  const v1::Job& job = view.job();
  if (view.total_steps() == 0) return fmt::format("step {}", FormatCount(job.step()));
  return fmt::format("epoch {}/{}  step {}/{}", std::max<int64_t>(1, job.epoch()),
                     view.total_epochs(), FormatCount(job.step()), FormatCount(view.total_steps()));
}

std::string Rate(const JobView& view) {
  return FormatCount(static_cast<int64_t>(view.samples_per_second())) + " samples/s";
}

// What stands beside the bar, as much as fits.
std::string Numbers(const JobView& view, bool wide, int width) {
  const v1::Job& job = view.job();
  std::vector<std::string> parts;
  if (wide || view.total_steps() == 0) {
    parts.push_back(Position(view));
  } else {
    parts.push_back(
        fmt::format("epoch {}/{}", std::max<int64_t>(1, job.epoch()), view.total_epochs()));
  }
  const v1::Score score = view.epoch_score();
  if (score.samples() > 0) {
    parts.push_back("loss " + FormatLoss(score.loss()));
    if (score.has_accuracy()) {
      parts.push_back((wide ? "accuracy " : "acc ") + FormatPercent(score.accuracy()));
    }
  }
  if (view.samples_per_second() > 0) parts.push_back(Rate(view));
  if (job.state() == v1::STOPPING) {
    parts.push_back("stopping");
  } else if (view.seconds_left() >= 0) {
    const double left = view.seconds_left();
    parts.push_back("ETA " + (left < 60 ? fmt::format("{:.0f} s", left) : FormatDuration(left)));
  }
  std::string line;
  for (const std::string& part : parts) {
    const std::string longer = line.empty() ? part : line + "  " + part;
    if (DisplayWidth(longer) > width) break;
    line = longer;
  }
  return line;
}

}  // namespace

std::string ProgressLine(const JobView& view, const Terminal& terminal, int width) {
  const v1::Job& job = view.job();
  if (job.step() == 0 || job.state() == v1::QUEUED || job.state() == v1::STARTING) {
    std::string text = job.id() + " " + StateName(job.state());
    if (!job.reason().empty()) text += ": " + OneLine(job.reason());
    // Cut by characters, never inside one.
    while (DisplayWidth(text) > width) {
      do {
        const bool inside = (static_cast<unsigned char>(text.back()) & 0xC0) == 0x80;
        text.pop_back();
        if (!inside) break;
      } while (!text.empty());
    }
    return text;
  }
  std::string line = Numbers(view, /*wide=*/true, width);
  if (width - DisplayWidth(line) - 2 < kMinBar) line = Numbers(view, /*wide=*/false, width);
  const int room = width - DisplayWidth(line) - 2;
  if (room >= kMinBar && view.total_steps() > 0) {
    line = Bar(view.fraction(), std::min(room, kMaxBar), terminal) + "  " + line;
  }
  return line;
}

std::string StepLine(const JobView& view) {
  std::string line = Position(view) + "  " + FormatScore(view.epoch_score());
  if (view.samples_per_second() > 0) line += "  " + Rate(view);
  if (view.seconds_left() >= 0) line += "  ETA " + FormatDuration(view.seconds_left());
  return line;
}

std::string EvaluationLine(const JobView& view, const v1::Evaluation& evaluation) {
  std::string line = fmt::format("step {}", FormatCount(evaluation.step()));
  if (evaluation.epoch() > 0) {
    line =
        fmt::format("epoch {}{}  {}", evaluation.epoch(),
                    view.total_epochs() > 0 ? fmt::format("/{}", view.total_epochs()) : "", line);
  }
  const v1::Score train = view.epoch_score_after(evaluation.step());
  if (train.samples() > 0) line += "  train " + FormatScore(train);
  return line + "  validation " + FormatScore(evaluation.validation());
}

Progress::Progress(const Terminal& terminal, Writer writer, Clock& clock,
                   absl::Duration state_patience)
    : terminal_(terminal),
      writer_(std::move(writer)),
      clock_(clock),
      state_patience_(state_patience) {}

void Progress::Add(const v1::JobEvent& event) {
  absl::MutexLock lock(&mutex_);
  view_.Add(event);
  changed_ = true;
  switch (event.event_case()) {
    case v1::JobEvent::kJob:
      ShowState();
      drawn_ = absl::InfinitePast();  // no event may follow for long
      break;
    case v1::JobEvent::kEvaluation:
      Line(EvaluationLine(view_, event.evaluation()));
      stepped_ = clock_.Now();
      break;
    case v1::JobEvent::kStep:
      if (!terminal_.interactive && clock_.Now() - stepped_ >= kStepInterval) {
        // The first step says that training has begun, and nothing yet about its pace.
        Line(StepLine(view_));
        stepped_ = clock_.Now();
      }
      break;
    default:
      break;
  }
  Redraw(/*force=*/false);
}

void Progress::Update(const v1::Job& job) {
  absl::MutexLock lock(&mutex_);
  view_.Update(job);
  changed_ = true;
  ShowState();
}

void Progress::Tick() {
  absl::MutexLock lock(&mutex_);
  ShowState();
  Redraw(/*force=*/false);
}

void Progress::Print(const std::string& line) {
  absl::MutexLock lock(&mutex_);
  Line(line);
}

void Progress::Aside(const std::function<void()>& print) {
  absl::MutexLock lock(&mutex_);
  if (line_open_) writer_("\r\x1b[K");
  line_open_ = false;
  changed_ = true;
  print();
}

void Progress::Finish() {
  absl::MutexLock lock(&mutex_);
  Redraw(/*force=*/true);
  finished_ = true;
  if (line_open_) writer_("\n");
  line_open_ = false;
}

JobView Progress::view() const {
  absl::MutexLock lock(&mutex_);
  return view_;
}

int64_t Progress::total_steps() const {
  absl::MutexLock lock(&mutex_);
  return view_.total_steps();
}

void Progress::ShowState() {
  const v1::Job& job = view_.job();
  // A terminal shows the state in its line; the final table says the last one.
  if (terminal_.interactive || job.id().empty() || IsFinal(job.state())) return;
  std::string text = job.id() + " " + StateName(job.state());
  if (!job.reason().empty()) text += ": " + OneLine(job.reason());
  if (text != state_) {
    state_ = text;
    state_since_ = clock_.Now();
  }
  if (state_ == shown_state_ || clock_.Now() - state_since_ < state_patience_) return;
  shown_state_ = state_;
  if (job.state() == v1::RUNNING && state_patience_ > absl::ZeroDuration())
    return;  // its steps tell
  Line(state_);
}

void Progress::Line(const std::string& text) {
  if (finished_) return;
  writer_(line_open_ ? "\r\x1b[K" + text + "\n" : text + "\n");
  line_open_ = false;
  changed_ = true;
}

void Progress::Redraw(bool force) {
  if (!terminal_.interactive || finished_ || !changed_ || view_.job().id().empty()) return;
  const absl::Time now = clock_.Now();
  if (!force && now - drawn_ < kRedrawInterval) return;
  drawn_ = now;
  changed_ = false;
  // The last column stays free: writing there makes some terminals wrap.
  writer_("\r" + ProgressLine(view_, terminal_, terminal_.Width() - 1) + "\x1b[K");
  line_open_ = true;
}

}  // namespace lockstep::client
