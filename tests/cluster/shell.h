// Shell commands in tests. Not thread-safe where a test's own folder is not.
#pragma once

#include <string>

#include "nlohmann/json.hpp"

namespace lockstep {

// Standard output of a shell command; the test fails where it does not end with 0.
std::string OutputOf(const std::string& command);

// The last line of a program's output as JSON; discarded() where it is none.
nlohmann::json LastLine(const std::string& text);

}  // namespace lockstep
