#include "tests/gpu/emulator/reference_factors.h"

#include <algorithm>

#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/simt.h"

namespace lockstep::emulator {

void Refuse(const std::string& message) { Fatal(message); }

void CheckAlignment(const char* what, const void* address, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0) return;
  Fatal(std::string(what) + " is not aligned to " + std::to_string(bytes) +
        " bytes, as was promised");
}

void UseWorkspace(void* workspace, size_t bytes) {
  const size_t end = std::min<size_t>(bytes, 1024);
  FillWithGarbage(workspace, end);
  FillWithGarbage(static_cast<char*>(workspace) + bytes - end, end);
}

}  // namespace lockstep::emulator
