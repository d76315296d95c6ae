// The slot threads of one member: a barrier with a deadline that an abort wakes. Slots outnumber
// cores in tests and on small machines, so waiting spins (only where every slot can have a
// core) and then sleeps (futex).
// Thread-safe. After a failure the team is dead: every later Barrier returns that failure.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace lockstep::collective {

class Team {
 public:
  explicit Team(int slots);
  ~Team();
  int slots() const { return slots_; }
  // Returns when all slots have arrived. Aborted with the cause; DeadlineExceeded names the slots
  // missing.
  absl::Status Barrier(int slot, absl::Time deadline);
  // The first cause wins.
  void Abort(const absl::Status& cause);

 private:
  struct State;
  absl::Status Fail(const absl::Status& failure);

  const int slots_;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep::collective
