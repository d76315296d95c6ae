// What the reference products and convolutions share. Thread-safe.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "worker/device/cuda/blas.h"

namespace lockstep::emulator {

// Element i of factors as they are multiplied.
inline float FactorAt(const void* factors, int64_t i, device::cuda::Factors type) {
  uint32_t bits;
  if (type == device::cuda::Factors::kBf16) {
    bits = static_cast<uint32_t>(static_cast<const uint16_t*>(factors)[i]) << 16;
  } else {
    bits = __builtin_bit_cast(uint32_t, static_cast<const float*>(factors)[i]);
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    if (type == device::cuda::Factors::kTf32 && finite) {  // 10 bits behind the point, ties to even
      bits = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
    }
  }
  return __builtin_bit_cast(float, bits);
}

// sums += factor * row, element by element.
inline void AddProduct(int64_t n, float factor, const float* __restrict__ row,
                       float* __restrict__ sums) {
  for (int64_t j = 0; j < n; ++j) sums[j] += factor * row[j];
}

// End the process where a caller broke a contract.
[[noreturn]] void Refuse(const std::string& message);
void CheckAlignment(const char* what, const void* address, int64_t bytes);
// Overwrites both ends, which must be the caller's to give.
void UseWorkspace(void* workspace, size_t bytes);

}  // namespace lockstep::emulator
