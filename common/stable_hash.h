// A 64-bit hash of a name that never changes between versions, machines or compilers: names of
// tensors and purposes are keys of recorded digests and random streams. Not for security.
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>

namespace lockstep {

// The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): a bijection.
constexpr uint64_t MixBits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// FNV-1a over the bytes, then MixBits.
inline uint64_t StableHash(const std::string& name) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const char c : name) {
    hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3ull;
  }
  return MixBits(hash);
}

}  // namespace lockstep
