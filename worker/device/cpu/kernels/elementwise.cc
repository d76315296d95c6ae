// Elementwise maps and dropout. An element's result depends on its own inputs only, so a range may
// be cut anywhere.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

void ReluForward(int64_t n, const float* x, float* y) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(y + i, Relu(Load(x + i, m)), m); });
}

void ReluBackward(int64_t n, const float* y, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, ReluGradient(Load(y + i, m), Load(dy + i, m)), m);
  });
}

void TanhForward(int64_t n, const float* x, float* y) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(y + i, Tanh(Load(x + i, m)), m); });
}

void TanhBackward(int64_t n, const float* y, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, TanhGradient(Load(y + i, m), Load(dy + i, m)), m);
  });
}

void SigmoidForward(int64_t n, const float* x, float* y) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(y + i, Sigmoid(Load(x + i, m)), m); });
}

void SigmoidBackward(int64_t n, const float* y, const float* dy, float* dx) {
  ForEachVector(n, [=](int64_t i, auto m) {
    Store(dx + i, SigmoidGradient(Load(y + i, m), Load(dy + i, m)), m);
  });
}

void Add(int64_t n, const float* a, const float* b, float* out) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(out + i, Load(a + i, m) + Load(b + i, m), m); });
}

namespace {

constexpr int kBlocks = 8;              // of Philox, at once
constexpr int kElements = 4 * kBlocks;  // two vectors

alignas(64) constexpr uint64_t kBlockOrder[kBlocks] = {0, 4, 1, 5, 2, 6, 3, 7};

struct RoundKeys {
  uint64_t k0[10], k1[10];
};

// The 32 random words of blocks [block, block + 8). In 64-bit lanes of which only the low halves
// count: a multiplication reads low halves and leaves the words of the next round in its two
// halves.
LOCKSTEP_SIMD void RandomWords(const RoundKeys& keys, uint64_t block, uint64_t step, I16* first,
                               I16* second) {
  U8 c0 = U8(block) + LoadWords(kBlockOrder);
  U8 c1 = ShiftRight<32>(c0);
  U8 c2(step), c3(step >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const U8 p0 = MultiplyLow(c0, U8(uint64_t{0xD2511F53u}));
    const U8 p1 = MultiplyLow(c2, U8(uint64_t{0xCD9E8D57u}));
    c0 = ShiftRight<32>(p1) ^ c1 ^ U8(keys.k0[round]);
    c1 = p1;
    c2 = ShiftRight<32>(p0) ^ c3 ^ U8(keys.k1[round]);
    c3 = p0;
  }
  Interleave(c0, c1, c2, c3, first, second);
}

}  // namespace

void Dropout(int64_t n, const float* x, float rate, PhiloxKey key, uint64_t step, uint64_t first,
             float* y) {
  if (n == 0) return;
  RoundKeys keys;
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round) {
    keys.k0[round] = k0;
    keys.k1[round] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // word >> 8 is the uniform number times 2^24, so comparing integers is comparing the numbers.
  const double exact = static_cast<double>(rate) * 0x1p24;
  int32_t smallest_kept = static_cast<int32_t>(exact);
  smallest_kept += static_cast<double>(smallest_kept) < exact ? 1 : 0;
  const I16 last_dropped(smallest_kept - 1);
  const F16 scale(1.0f / (1.0f - rate));
  const auto apply = [&](I16 words, int64_t i, auto m) {
    const Mask keep = Less(last_dropped, ShiftRight<8>(words));
    Store(y + i, Select(keep, Load(x + i, m) * scale, F16(0.0f)), m);
  };
  // Element i is word first % 4 + i of the blocks from first / 4 on.
  const int64_t lead = static_cast<int64_t>(first % 4);
  uint64_t block = first / 4;
  I16 low, high;
  int64_t i = -lead;
  if (lead > 0) {
    RandomWords(keys, block, step, &low, &high);
    const int64_t left = n + lead;  // words until the end
    apply(low, i, LastLanes(lead) & FirstLanes(left < kLanes ? left : kLanes));
    if (left > kLanes) {
      apply(high, i + kLanes, FirstLanes(left - kLanes < kLanes ? left - kLanes : kLanes));
    }
    i += kElements;
    block += kBlocks;
  }
  for (; i + kElements <= n; i += kElements, block += kBlocks) {
    RandomWords(keys, block, step, &low, &high);
    apply(low, i, All());
    apply(high, i + kLanes, All());
  }
  if (i < n) {
    RandomWords(keys, block, step, &low, &high);
    const int64_t left = n - i;
    apply(low, i, FirstLanes(left < kLanes ? left : kLanes));
    if (left > kLanes) apply(high, i + kLanes, FirstLanes(left - kLanes));
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
