#include "common/philox.h"

#include "common/stable_hash.h"

namespace lockstep {

PhiloxKey MakePhiloxKey(uint64_t seed, const std::string& purpose) {
  // For one purpose a bijection of the seed: no two seeds of a job share a stream.
  const uint64_t key = MixBits(StableHash(purpose) + MixBits(seed + 0x9E3779B97F4A7C15ull));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

}  // namespace lockstep
