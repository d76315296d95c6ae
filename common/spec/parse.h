// YAML to JobSpec, driven by the message's descriptor, remembering where each field was written.
// Checks what can be checked of one value: known field, type, range, choice, given once, not empty.
// Internal to common/spec. Thread-safe: pure functions.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "common/spec/problem.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

// InvalidArgument, one line that names `file_name`, and the line where there is one.
absl::Status ParseDocument(const std::string& text, const std::string& file_name, v1::JobSpec* spec,
                           SourceMap* sources);

// Applies "path=value" to what was parsed before: replaces a scalar, a list, one element of a list
// or a whole mapping. InvalidArgument, one line that names the argument.
absl::Status ApplyOverride(const std::string& argument, v1::JobSpec* spec, SourceMap* sources);

}  // namespace lockstep::spec
