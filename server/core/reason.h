// The one-line reasons that a job carries: what happened, to whom, where and when.
//
// Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>

#include "server/core/placement.h"

namespace lockstep::server {

// `text` without line breaks and other control characters, cut at 1000 bytes.
std::string OneLine(const std::string& text);

// "worker w1 (slots 2-3) lost at step 117: connection closed". `running` is false before the first
// step.
std::string WorkerLost(const MemberPlacement& member, bool running, int64_t step,
                       const std::string& cause);

// "worker w1 (slots 2-3) failed at step 117: <error>"; slots and step only where `error` does not
// name its own.
std::string WorkerFailed(const MemberPlacement& member, bool running, int64_t step,
                         const std::string& error);

}  // namespace lockstep::server
