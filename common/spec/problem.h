// What is wrong with a field of a spec, before it is known where the field was written. Validation
// works on the message and returns Problems; the loader turns one into a Status that names the line
// or the --set argument. Internal to common/spec. Plain data.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace lockstep::spec {

struct Problem {
  std::string field;  // full path, "model.layers.3.kernel"; "" is the spec itself
  std::string text;   // what was found and what is accepted
};
using MaybeProblem = std::optional<Problem>;

#define LOCKSTEP_RETURN_IF_PROBLEM(expression)                                 \
  do {                                                                         \
    if (::lockstep::spec::MaybeProblem problem = (expression)) return problem; \
  } while (false)

// "parent.child", or "child" at the top.
inline std::string Join(const std::string& parent, const std::string& child) {
  return parent.empty() ? child : parent + "." + child;
}

// Where a field was written.
struct Location {
  std::string text;  // "fashion.yaml:12" or "--set train.batch=4"
  bool override = false;
};

// From the path of each field that was written, lists and mappings included, to its place.
// Invariant: holds "" (the whole document) when the spec came from a file.
using SourceMap = std::map<std::string, Location>;

// The place of the field, or of the nearest enclosing one that was written; null in an empty map.
const Location* Locate(const SourceMap& sources, std::string field);

// InvalidArgument "where: field: text", leaving out what is empty; one line.
absl::Status ToStatus(const std::string& where, const Problem& problem);

}  // namespace lockstep::spec
