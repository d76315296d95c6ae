// A cluster in one thread: the real core of the coordinator, and simulated workers, connections,
// clients, disk and time, all random from one seed.
//
// Thread-compatible. The same seed gives the same events.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "server/core/state.h"

namespace lockstep::server {

struct Outcome {
  int64_t events = 0;     // that the core was given
  std::string violation;  // the first; empty: every invariant held
  TransitionCounts transitions;
  std::map<std::string, int64_t> happenings;  // what was simulated, for people
};

// Takes `actions` random actions, then lets the cluster recover and everything end. Stops at the
// first violation.
Outcome Simulate(uint64_t seed, int actions);

}  // namespace lockstep::server
