#include "common/spec/problem.h"

namespace lockstep::spec {

const Location* Locate(const SourceMap& sources, std::string field) {
  while (true) {
    const auto it = sources.find(field);
    if (it != sources.end()) return &it->second;
    if (field.empty()) return nullptr;
    const size_t dot = field.rfind('.');
    field = dot == std::string::npos ? "" : field.substr(0, dot);
  }
}

absl::Status ToStatus(const std::string& where, const Problem& problem) {
  std::string message;
  for (const std::string* part : {&where, &problem.field, &problem.text}) {
    if (part->empty()) continue;
    if (!message.empty()) message += ": ";
    message += *part;
  }
  return absl::InvalidArgumentError(message);
}

}  // namespace lockstep::spec
