// Counts the program's calls of operator new, so that a test can show that a path allocates
// nothing. Thread-safe.
#pragma once

#include <cstdint>

namespace lockstep {

int64_t AllocationCount();

}  // namespace lockstep
