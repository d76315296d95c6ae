// Division of one piece of memory (scratch, packed weights) into parts. Thread-compatible.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lockstep::device::cuda {

// Hands out parts of one piece of memory, each 256-byte aligned as that is; without memory it
// counts them.
class Parts {
 public:
  explicit Parts(void* memory = nullptr) : memory_(static_cast<std::byte*>(memory)) {}
  void* Take(int64_t bytes) {
    std::byte* const part = memory_ == nullptr ? nullptr : memory_ + taken_;
    taken_ += (static_cast<size_t>(bytes) + 255) / 256 * 256;
    return part;
  }
  float* TakeFloats(int64_t count) { return static_cast<float*>(Take(count * 4)); }
  uint16_t* TakeBf16(int64_t count) { return static_cast<uint16_t*>(Take(count * 2)); }
  size_t taken() const { return taken_; }

 private:
  std::byte* const memory_;
  size_t taken_ = 0;
};

}  // namespace lockstep::device::cuda
