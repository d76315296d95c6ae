// What `lockstep doctor` prints: what this machine can compute on, what is in the way of the rest,
// and the command to try next.
//
// The worker itself (`lockstep-worker --probe`, worker/machine/machine.h) looks, since it is who
// will compute. Thread-safe: pure functions.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "client/terminal.h"
#include "nlohmann/json.hpp"

namespace lockstep::client {

// Internal: `machine` is not such an object. The functions below need one that is.
absl::Status CheckMachine(const nlohmann::ordered_json& machine);

// Why `device` (cpu, cuda) cannot be used and what to do, on one line; "" where it can.
std::string WhyUnusable(const nlohmann::ordered_json& machine, const std::string& device);

// For people. `device`: what they mean to use; "": whatever there is.
std::string MachineText(const nlohmann::ordered_json& machine, const std::string& device,
                        const Terminal& terminal);

}  // namespace lockstep::client
