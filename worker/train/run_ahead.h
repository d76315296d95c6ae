// How far a slot's host is ahead of its device: the steps that it has enqueued and does not know
// the outcome of. It enqueues steps until there are as many as the device takes at once, then
// sleeps until half of them have run, of which it need not hear at once: so it works for a small
// part of the time, and the device always has something to do.
//
// Invariant: where a step's outcome is taken, every member has enqueued the same steps, since one
// that has to be made again exchanges with those of the others behind them. So members have as many
// steps ahead as they have agreed on, the least of what each of their devices takes.
//
// Not thread-safe: it is its slot's. No call allocates.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/device.h"

namespace lockstep::train {

class RunAhead {
 public:
  static constexpr int64_t kLeast = device::Recording::kLeastAhead;
  static constexpr int64_t kMost = device::Recording::kMostAhead;
  static constexpr int64_t kAsksEvery = 4;  // steps from one agreement to the next

  // What is known of a step when it is enqueued.
  struct Step {
    int64_t samples = 0;
    bool stop = false;      // somebody was told to stop: it is the last
    bool digested = false;  // its digests are in the digest table's ring
  };
  // What members tell each other.
  struct Word {
    uint8_t stop = 0;
    uint8_t most = kLeast;  // steps that may be ahead
  };

  // Of the last kMost steps.
  Step& Of(int64_t step) { return steps_[step % kMost]; }
  // All members' words: whether one is told to stop. From now on so many steps are ahead at most as
  // the least of them says.
  bool Agree(absl::Span<const Word> words);
  // `step` is on the stream, and the outcomes of those up to `known` have been taken. Waits where
  // too many are ahead. Returns the last step that has run, as far as is known; fails as the stream
  // does.
  absl::StatusOr<int64_t> Enqueued(device::Stream& stream, int64_t step, int64_t known);

 private:
  Step steps_[kMost];
  int64_t marks_[kMost] = {};  // of the stream behind each
  int64_t most_ = kLeast;
};

}  // namespace lockstep::train
