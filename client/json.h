// The JSON that `-o json` prints: the wire's field names in snake_case, numbers as numbers (also 64
// bits), accuracies as fractions of 1, non-finite numbers as null.
//
// Thread-safe: pure functions.
#pragma once

#include <google/protobuf/message.h>

#include <string>

#include "lockstep/v1/job.pb.h"
#include "nlohmann/json.hpp"

namespace lockstep::client {

// Every field that is set, and every plain field that has no notion of being set; enums by name.
nlohmann::ordered_json ToJson(const google::protobuf::Message& message);

// The object that ends `run -o json`, `submit --follow -o json` and `watch -o json`:
//   job, name, state, reason, steps, epochs, train{loss, accuracy, samples},
//   validation{loss, accuracy, samples}, samples_per_second, data_wait_share, seconds,
//   parameter_digest, state_digest, checkpoint (path of the newest; "" for none), out
// Of a job without a result what is known: the last step and evaluation; scores that do not exist
// are null.
nlohmann::ordered_json ResultJson(const v1::Job& job, const std::string& out);

// As in ToJson, with the number of the job under "job", as everywhere.
nlohmann::ordered_json JobJson(const v1::Job& job);

// On one line; bytes that are no UTF-8 (in a reason, say) are replaced rather than refused.
std::string Dump(const nlohmann::ordered_json& json);

}  // namespace lockstep::client
