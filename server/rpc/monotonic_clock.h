// The wall clock as it was when the program began, advanced by the monotonic one: it shows the time
// of day, and never jumps, so that timeouts may be measured with it.
//
// Thread-safe.
#pragma once

#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/clock.h"

namespace lockstep::server {

class MonotonicClock : public Clock {
 public:
  absl::Time Now() override {
    return wall_ + absl::FromChrono(std::chrono::steady_clock::now() - steady_);
  }

 private:
  const absl::Time wall_ = absl::Now();
  const std::chrono::steady_clock::time_point steady_ = std::chrono::steady_clock::now();
};

}  // namespace lockstep::server
