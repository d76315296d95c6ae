// The slot threads of one member: a barrier with a deadline that an abort wakes. Slots outnumber
// cores in tests and on small machines, so waiting spins briefly and then sleeps (futex).
// Thread-safe. After a failure the team is dead.
#pragma once

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace lockstep::collective {

class Team {
 public:
  explicit Team(int slots);
  ~Team();
  int slots() const { return slots_; }
  // Returns when all slots have arrived. Aborted with the cause; DeadlineExceeded names the slots missing.
  absl::Status Barrier(int slot, absl::Time deadline);
  void Abort(const absl::Status& cause);

 private:
  const int slots_;
  struct State;
  State* state_;
};

}  // namespace lockstep::collective
