// What worker/device/cuda/tensor_core.h declares, on the SIMT emulator. Products are exact and are
// added in their order, in fp32; copies in the background come with the wait for them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lockstep::device::cuda {

#define LOCKSTEP_EMULATED_SITE                                      \
  const char *file = __builtin_FILE(), int line = __builtin_LINE(), \
             const char *function = __builtin_FUNCTION()

uint32_t TwoBf16(float low, float high);
void MultiplyBf16(float (&sums)[4], const uint4& a, uint32_t b0, uint32_t b1,
                  LOCKSTEP_EMULATED_SITE);
uint4 LoadMatrices(const void* row, LOCKSTEP_EMULATED_SITE);
uint4 LoadMatricesTransposed(const void* row, LOCKSTEP_EMULATED_SITE);
void CopyInBackground(void* shared, const void* global);
void CopyOrZeroInBackground(void* shared, const void* global, bool copies);
void WaitForCopies();
void CommitCopies();
void WaitForGroups(int but);
template <int kBut>
void WaitForGroups() {
  WaitForGroups(kBut);
}

#undef LOCKSTEP_EMULATED_SITE

}  // namespace lockstep::device::cuda
