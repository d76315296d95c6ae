// The state digest: a 128-bit sum, modulo 2^128, of mix(tensor, logical index, bits) over all
// elements. Being a sum, any partition of the state among slots, chunks or workers gives the same
// digest, and a tensor's digest is the sum over its own elements alone. It detects differences
// between honest replicas; it is no defence against forgery (files carry SHA-256).
// Thread-safe. The mixing is shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>
#include <string>

#include "common/philox.h"  // LOCKSTEP_DEVICE

namespace lockstep {

struct Digest {
  uint64_t lo = 0, hi = 0;
  LOCKSTEP_DEVICE Digest& operator+=(const Digest& other) {
    lo += other.lo;
    hi += other.hi + (lo < other.lo ? 1 : 0);
    return *this;
  }
  friend bool operator==(const Digest&, const Digest&) = default;
};

// 32 lower-case hex digits, most significant first; and back (false: malformed).
std::string ToHex(const Digest& digest);
bool FromHex(const std::string& hex, Digest* digest);

// The key of a tensor: a 64-bit hash of its name.
uint64_t TensorKey(const std::string& tensor_name);

// Two independent 64-bit finalizers (the constants of SplitMix64, Steele et al., OOPSLA 2014) over
// index and bits, keyed by the tensor.
LOCKSTEP_DEVICE inline Digest MixElement(uint64_t tensor_key, uint64_t index, uint32_t bits) {
  uint64_t z = tensor_key + (index * 0x9E3779B97F4A7C15ull) + bits;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z ^= z >> 27;
  const uint64_t lo = z ^ (uint64_t{bits} << 32);
  const uint64_t y = z * 0x94D049BB133111EBull;
  return {lo, y ^ (y >> 31)};
}

}  // namespace lockstep
