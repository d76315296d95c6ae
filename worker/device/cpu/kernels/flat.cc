// Passes over flat vectors.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

template <OptimizerType kType>
LOCKSTEP_SIMD void UpdateRange(const OptimizerCoefficients& coefficients, int64_t n,
                               const StepScalars& scalars, const float* gradient, float* parameters,
                               const OptimizerSlots& slots) {
  constexpr int kSlots = SlotCount(kType);
  const OptimizerCoefficients c = coefficients;
  const StepScalars s = scalars;
  const OptimizerSlots p = slots;
  ForEachVector(n, [&](int64_t i, auto m) {
    F16 w = Load(parameters + i, m);
    F16 slot[kMostSlots] = {F16(0.0f), F16(0.0f), F16(0.0f)};
    for (int k = 0; k < kSlots; ++k) slot[k] = Load(p.at[k] + i, m);
    OptimizerStep<kType>(c, s, Load(gradient + i, m), w, slot);
    Store(parameters + i, w, m);
    for (int k = 0; k < kSlots; ++k) Store(p.at[k] + i, slot[k], m);
  });
}

LOCKSTEP_SIMD void AddDigest(uint64_t lo, uint64_t hi, uint64_t* sum_lo, uint64_t* sum_hi) {
  *sum_lo += lo;
  *sum_hi += hi + (*sum_lo < lo ? 1 : 0);
}

// MixElement (common/digest.h) of eight elements.
LOCKSTEP_SIMD void Mix(U8 start, U8 bits, U8* lo, U8* hi) {
  U8 z = start + bits;
  z = Multiply(z ^ ShiftRight<30>(z), U8(0xBF58476D1CE4E5B9ull));
  z = z ^ ShiftRight<27>(z);
  *lo = z ^ ShiftLeft<32>(bits);
  const U8 y = Multiply(z, U8(0x94D049BB133111EBull));
  *hi = y ^ ShiftRight<31>(y);
}

}  // namespace

void OptimizerUpdate(const OptimizerCoefficients& coefficients, int64_t n,
                     const StepScalars& scalars, const float* gradient, float* parameters,
                     const OptimizerSlots& slots) {
  const auto update = [&]<OptimizerType kType>() {
    UpdateRange<kType>(coefficients, n, scalars, gradient, parameters, slots);
  };
  using Type = OptimizerType;
  switch (coefficients.type) {
    case Type::kSgd:
      return update.operator()<Type::kSgd>();
    case Type::kMomentum:
      return update.operator()<Type::kMomentum>();
    case Type::kNesterov:
      return update.operator()<Type::kNesterov>();
    case Type::kAdam:
      return update.operator()<Type::kAdam>();
    case Type::kAdagrad:
      return update.operator()<Type::kAdagrad>();
    case Type::kAdadelta:
      return update.operator()<Type::kAdadelta>();
    case Type::kRmsProp:
      return update.operator()<Type::kRmsProp>();
    case Type::kRmsPropMomentum:
      return update.operator()<Type::kRmsPropMomentum>();
    case Type::kRmsPropCentered:
      return update.operator()<Type::kRmsPropCentered>();
    case Type::kRmsPropCenteredMomentum:
      return update.operator()<Type::kRmsPropCenteredMomentum>();
  }
}

void SquaredNorms(int64_t n, const float* x, double* sums) {
  constexpr int kChains = 4;  // sums in progress, so that one does not wait for the other
  for (int64_t begin = 0; begin < n; begin += kNormBlock, ++sums) {
    const float* block = x + begin;
    const int64_t size = n - begin < kNormBlock ? n - begin : kNormBlock;
    D16 sum[kChains] = {D16(0.0), D16(0.0), D16(0.0), D16(0.0)};
    const auto add = [&](F16 values, int chain) {
      const D16 wide = ToDouble(values);
      sum[chain] = Fma(wide, wide, sum[chain]);
    };
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
      for (int chain = 0; chain < kChains; ++chain) {
        add(Load(block + i + chain * kLanes, All()), chain);
      }
    }
    ForEachVector(size - i, [&](int64_t at, auto m) { add(Load(block + i + at, m), 0); });
    alignas(64) double lanes[kLanes];
    Store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    *sums = lanes[0];
  }
}

bool HasNonFinite(int64_t n, const float* x) {
  const I16 exponent(0x7F800000);
  uint32_t found = 0;
  ForEachVector(n, [&](int64_t i, auto m) {
    found |= Bits(Equal(AsBits(Load(x + i, m)) & exponent, exponent));
  });
  return found != 0;
}

void AccumulateDigest(int64_t n, const float* x, uint64_t tensor_key, uint64_t first_index,
                      uint64_t* lo, uint64_t* hi) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  alignas(64) uint64_t words[8];
  for (uint64_t lane = 0; lane < 8; ++lane)
    words[lane] = tensor_key + (first_index + lane) * kGolden;
  U8 start = LoadWords(words);
  const U8 eight(8 * kGolden), low_half(0xFFFFFFFFull);
  // The sums of the halves of `lo` cannot overflow: a call covers less than 2^35 elements.
  U8 lo_low(0), lo_high(0), hi_sum(0);
  const auto take = [&](U8 bits, U8 keep) {
    U8 a, b;
    Mix(start, bits, &a, &b);
    a = a & keep;
    lo_low = lo_low + (a & low_half);
    lo_high = lo_high + ShiftRight<32>(a);
    hi_sum = hi_sum + (b & keep);
    start = start + eight;
  };
  const U8 every(~uint64_t{0});
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I16 bits = AsBits(Load(x + i, All()));
    take(LowLanes(bits), every);
    take(HighLanes(bits), every);
  }
  if (i < n) {
    const I16 bits = AsBits(Load(x + i, FirstLanes(n - i)));
    alignas(64) uint64_t keep[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) keep[lane] = lane < n - i ? ~uint64_t{0} : 0;
    take(LowLanes(bits), LoadWords(keep));
    take(HighLanes(bits), LoadWords(keep + 8));
  }
  alignas(64) uint64_t high[8], top[8];
  Store(words, lo_low);
  Store(high, lo_high);
  Store(top, hi_sum);
  for (int lane = 0; lane < 8; ++lane) {
    AddDigest(words[lane], top[lane], lo, hi);
    AddDigest(high[lane] << 32, high[lane] >> 32, lo, hi);
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
