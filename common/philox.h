// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). Everything random in a job is a pure function of
//   (job seed, purpose with layer name, step or epoch, element index)
// so that any worker computes the same numbers for the elements it happens to own.
// The functions are shared by the CPU and CUDA kernels. Thread-safe.
#pragma once

#include <cstdint>
#include <string>

#if defined(__CUDACC__)
#define LOCKSTEP_DEVICE __host__ __device__
#else
#define LOCKSTEP_DEVICE
#endif

namespace lockstep {

struct PhiloxKey {
  uint32_t k0 = 0, k1 = 0;
};

struct PhiloxBlock {
  uint32_t x[4];
};

// The key of one purpose of one job, e.g. MakePhiloxKey(seed, "dropout/drop1").
PhiloxKey MakePhiloxKey(uint64_t seed, const std::string& purpose);

LOCKSTEP_DEVICE inline PhiloxBlock Philox(PhiloxKey key, uint64_t block, uint64_t step) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t h0 = static_cast<uint32_t>(p0 >> 32), l0 = static_cast<uint32_t>(p0);
    const uint32_t h1 = static_cast<uint32_t>(p1 >> 32), l1 = static_cast<uint32_t>(p1);
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Element `index` of the stream (key, step): lane index % 4 of block index / 4.
LOCKSTEP_DEVICE inline uint32_t PhiloxAt(PhiloxKey key, uint64_t index, uint64_t step) {
  return Philox(key, index / 4, step).x[index % 4];
}

// Uniform on [0, 1) with 24 bits.
LOCKSTEP_DEVICE inline float ToUniform(uint32_t bits) {
  return static_cast<float>(bits >> 8) * 0x1p-24f;
}

}  // namespace lockstep
