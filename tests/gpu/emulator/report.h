// How the emulator ends the process when it finds a bug in what it runs. Thread-safe.
#pragma once

#include <string>

namespace lockstep::emulator {

[[noreturn]] void Fatal(const std::string& message);

// The name of the function at an address of this program, demangled; the address where it has none.
std::string FunctionName(const void* address);

}  // namespace lockstep::emulator
