#include "worker/collective/shared_peers.h"

#include <string.h>

#include <algorithm>

#include "worker/collective/futex.h"

namespace lockstep::collective {

SharedPeers::SharedPeers(int rank, std::vector<std::shared_ptr<Segment>> segments, int spin)
    : rank_(rank), segments_(std::move(segments)), spin_(spin) {
  for (int member = 0; member < static_cast<int>(segments_.size()); ++member) {
    if (member != rank_ && segments_[member] != nullptr) peers_.push_back(member);
  }
}

void SharedPeers::Raise(Lane lane, Mark mark, uint64_t sequence) {
  LaneControl& mine = own().lane(lane);
  std::atomic<uint32_t>& word = mark == Mark::kPosted ? mine.posted : mine.finished;
  // Sequentially consistent with Await: either we see that a peer sleeps, or it sees the mark.
  word.store(static_cast<uint32_t>(sequence), std::memory_order_seq_cst);
  for (const int member : peers_) {
    LaneControl& theirs = peer(member).lane(lane);
    if (theirs.awaiting.load(std::memory_order_seq_cst) == static_cast<uint32_t>(rank_ + 1)) {
      theirs.bell.fetch_add(1, std::memory_order_seq_cst);
      FutexWakeAll(theirs.bell, own().shared());
    }
  }
}

bool SharedPeers::Reached(Lane lane, int member, Mark mark, uint64_t sequence) {
  const LaneControl& theirs = peer(member).lane(lane);
  const std::atomic<uint32_t>& word = mark == Mark::kPosted ? theirs.posted : theirs.finished;
  // Sequence numbers wrap; members are never 2^31 apart.
  return static_cast<int32_t>(word.load(std::memory_order_seq_cst) -
                              static_cast<uint32_t>(sequence)) >= 0;
}

SharedPeers::Outcome SharedPeers::Await(Lane lane, int member, Mark mark, uint64_t sequence,
                                        absl::Time deadline) {
  for (int round = 0; round <= spin_; ++round) {
    if (Reached(lane, member, mark, sequence)) return Outcome::kReached;
    Pause();
  }
  LaneControl& mine = own().lane(lane);
  mine.awaiting.store(static_cast<uint32_t>(member + 1), std::memory_order_seq_cst);
  Outcome outcome = Outcome::kReached;
  for (;;) {
    const uint32_t bell = mine.bell.load(std::memory_order_seq_cst);
    if (Reached(lane, member, mark, sequence)) break;
    if (AnyGaveUp()) {
      outcome = Outcome::kGaveUp;
      break;
    }
    if (FutexWait(mine.bell, bell, deadline, own().shared())) continue;
    if (!Reached(lane, member, mark, sequence)) outcome = Outcome::kDeadline;
    break;
  }
  mine.awaiting.store(0, std::memory_order_seq_cst);
  return outcome;
}

SharedPeers::Outcome SharedPeers::AwaitAll(Lane lane, Mark mark, uint64_t sequence,
                                           absl::Time deadline, std::vector<int>* missing) {
  for (const int member : peers_) {
    const Outcome outcome = Await(lane, member, mark, sequence, deadline);
    if (outcome == Outcome::kReached) continue;
    for (const int other : peers_) {
      if (!Reached(lane, other, mark, sequence)) missing->push_back(other);
    }
    // Came between the last two looks.
    if (outcome == Outcome::kDeadline && missing->empty()) return Outcome::kReached;
    return outcome;
  }
  return Outcome::kReached;
}

bool SharedPeers::AnyGaveUp() {
  return std::any_of(segments_.begin(), segments_.end(), [](const auto& segment) {
    return segment != nullptr && segment->control().gave_up.load(std::memory_order_seq_cst) == 2;
  });
}

std::optional<SharedPeers::Cause> SharedPeers::PeerGaveUp() {
  for (const int member : peers_) {
    SegmentControl& control = peer(member).control();
    if (control.gave_up.load(std::memory_order_seq_cst) != 2) continue;
    const size_t length = strnlen(control.reason, SegmentControl::kReasonBytes);
    return Cause{control.origin, std::string(control.reason, length)};
  }
  return std::nullopt;
}

void SharedPeers::GiveUp(int origin, const std::string& reason) {
  SegmentControl& control = own().control();
  uint32_t expected = 0;
  if (!control.gave_up.compare_exchange_strong(expected, 1)) return;
  control.origin = origin;
  const size_t length = std::min(reason.size(), SegmentControl::kReasonBytes);
  memcpy(control.reason, reason.data(), length);
  control.gave_up.store(2, std::memory_order_seq_cst);
  for (const auto& segment : segments_) {
    if (segment == nullptr) continue;
    for (LaneControl& lane : segment->control().lanes) {
      lane.bell.fetch_add(1, std::memory_order_seq_cst);
      FutexWakeAll(lane.bell, own().shared());
    }
  }
}

}  // namespace lockstep::collective
