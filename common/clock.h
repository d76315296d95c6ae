// Time comes in through the constructor, so that tests and the simulation own it.
// Implementations are thread-safe. The caller keeps the clock alive.
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace lockstep {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;
};

// The machine's wall clock; lives as long as the process.
inline Clock& RealClock() {
  class WallClock : public Clock {
   public:
    absl::Time Now() override { return absl::Now(); }
  };
  static WallClock clock;
  return clock;
}

}  // namespace lockstep
