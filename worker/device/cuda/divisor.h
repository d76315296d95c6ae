// Division by a number that is known when a kernel is launched, as one multiplication (Granlund &
// Montgomery 1994): indices of kernels are taken apart by it. Thread-safe: immutable.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace lockstep::device::cuda {

// Exact for dividends below 2^31.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << (shift_ - 31)) < divisor_) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor_ - 1) / divisor_);
  }
  __device__ __forceinline__ uint32_t Quotient(uint32_t x) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(x) * multiplier_) >> shift_);
  }
  // Leaves the quotient in x.
  __device__ __forceinline__ uint32_t TakeRemainder(uint32_t& x) const {
    const uint32_t quotient = Quotient(x), remainder = x - quotient * divisor_;
    x = quotient;
    return remainder;
  }

 private:
  uint32_t divisor_, multiplier_;
  int shift_ = 31;
};

// Calls body(first row, rows) for parts of a tensor that have at most 2^31 elements each, so that
// indices inside a part are 32 bits wide.
template <class Body>
void ForEachPart(int64_t rows, int64_t row_elements, Body body) {
  const int64_t most = std::max<int64_t>(1, (int64_t{1} << 31) / row_elements);
  for (int64_t row = 0; row < rows; row += most) body(row, std::min(most, rows - row));
}

}  // namespace lockstep::device::cuda
