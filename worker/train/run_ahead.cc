#include "worker/train/run_ahead.h"

#include <algorithm>

#include "common/status_macros.h"

namespace lockstep::train {

static_assert(RunAhead::kMost <= device::Stream::kMarks);

bool RunAhead::Agree(absl::Span<const Word> words) {
  bool stop = false;
  most_ = kMost;
  for (const Word& word : words) {
    stop = stop || word.stop != 0;
    most_ = std::clamp<int64_t>(word.most, kLeast, most_);
  }
  return stop;
}

absl::StatusOr<int64_t> RunAhead::Enqueued(device::Stream& stream, int64_t step, int64_t known) {
  marks_[step % kMost] = stream.Mark();
  if (step - known < most_) return known;
  const int64_t last = step - (most_ + 1) / 2;  // for less time than what is behind it takes
  RETURN_IF_ERROR(stream.WaitFor(marks_[last % kMost]));
  return last;
}

}  // namespace lockstep::train
