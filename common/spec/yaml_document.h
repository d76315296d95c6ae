// The door to yaml-cpp: text to one YAML tree, with its exceptions and its traps kept inside.
// Internal to common/spec. Thread-safe: pure functions.
#pragma once

#include <string>

#include "yaml-cpp/yaml.h"

namespace lockstep::spec {

// The largest spec file or override.
constexpr size_t kLargestText = 1 << 20;

struct YamlError {
  int line = 0;  // 0: of no line
  std::string text;
};

// The one document of the text, null where there is none. False, with the error: more than
// kLargestText bytes, not UTF-8, not YAML, nested too deeply, or more than one document.
bool ReadYaml(const std::string& text, YAML::Node* root, YamlError* error);

}  // namespace lockstep::spec
