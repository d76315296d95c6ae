// Who may include whom (DESIGN section 3), as data. Thread-safe: pure functions.
#pragma once

#include <string>
#include <vector>

namespace lockstep::layering {

// The folder that governs a file, "worker/device/cpu" of "worker/device/cpu/kernels/pool.cc"; ""
// where no rule names one.
std::string LayerOf(const std::string& path);

// One line for each #include of the file that is forbidden: "path:line: "header": why".
// `path` is relative to the root of the repository.
std::vector<std::string> FindForbidden(const std::string& path, const std::string& content);

// Rules contradict themselves where two layers may include each other, directly or round a corner;
// names one such circle, or "".
std::string FindCircle();

}  // namespace lockstep::layering
