// What the elements of a matrix product are. Internal to worker/device/cpu/kernels. Pure functions.
//
// Floats, or pairs of bf16: 32 bits that hold two neighbours in depth, the first in the low half,
// stored as floats are. The product of pairs is that of VDPBF16PS (Intel SDM): two fused
// multiply-adds in fp32, of the high halves and then of the low ones, where what is denormal counts
// as zero; a processor without it gets the same bits by two instructions.
#pragma once

#include <cstdint>

#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {

#if defined(__AVX512F__)
LOCKSTEP_SIMD I16 operator|(I16 a, I16 b) { return I16(_mm512_or_si512(a.v, b.v)); }
LOCKSTEP_SIMD I16 operator+(I16 a, I16 b) { return I16(_mm512_add_epi32(a.v, b.v)); }
LOCKSTEP_SIMD I16 HighToLow(I16 a) { return I16(_mm512_srli_epi32(a.v, 16)); }
LOCKSTEP_SIMD I16 LowToHigh(I16 a) { return I16(_mm512_slli_epi32(a.v, 16)); }
LOCKSTEP_SIMD F16 FromBits(I16 a) { return F16(_mm512_castsi512_ps(a.v)); }
// The lanes of even and of odd places of 32 neighbours.
LOCKSTEP_SIMD void Deal(F16 first, F16 second, F16* even, F16* odd) {
  const __m512i places =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = F16(_mm512_permutex2var_ps(first.v, places, second.v));
  *odd = F16(
      _mm512_permutex2var_ps(first.v, _mm512_add_epi32(places, _mm512_set1_epi32(1)), second.v));
}
#else
LOCKSTEP_SIMD I16 operator|(I16 a, I16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
LOCKSTEP_SIMD I16 operator+(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
LOCKSTEP_SIMD I16 HighToLow(I16 a) {
  return {_mm256_srli_epi32(a.lo, 16), _mm256_srli_epi32(a.hi, 16)};
}
LOCKSTEP_SIMD I16 LowToHigh(I16 a) {
  return {_mm256_slli_epi32(a.lo, 16), _mm256_slli_epi32(a.hi, 16)};
}
LOCKSTEP_SIMD F16 FromBits(I16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
template <int kPlaces>
LOCKSTEP_SIMD __m256 EveryOther(__m256 a, __m256 b) {
  const __m256d quarters = _mm256_castps_pd(_mm256_shuffle_ps(a, b, kPlaces));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(quarters, 0xD8));
}
LOCKSTEP_SIMD void Deal(F16 first, F16 second, F16* even, F16* odd) {
  *even = {EveryOther<0x88>(first.lo, first.hi), EveryOther<0x88>(second.lo, second.hi)};
  *odd = {EveryOther<0xDD>(first.lo, first.hi), EveryOther<0xDD>(second.lo, second.hi)};
}
#endif

constexpr int32_t kHighHalf = static_cast<int32_t>(0xFFFF0000u);

// To the nearest bf16, ties to even: the bits in the high half, zeros in the low one. What is
// denormal becomes zero, a NaN quiet.
LOCKSTEP_SIMD I16 RoundToBf16(F16 x) {
  const I16 bits = AsBits(x);
  const I16 up = bits + (I16(0x7FFF) + (HighToLow(bits) & I16(1)));
  I16 rounded = Select(IsNan(x), bits | I16(0x400000), up);
  rounded = Select(Equal(bits & I16(0x7F800000), I16(0)), bits & I16(INT32_MIN), rounded);
  return rounded & I16(kHighHalf);
}

#if defined(__AVX512BF16__)
// Lane i: (low[i], high[i]).
LOCKSTEP_SIMD F16 PairUp(F16 low, F16 high) {
  alignas(64) static constexpr int16_t kPlaces[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  return F16(_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), both)));
}
// Lane i: elements 2 i and 2 i + 1 of 32 neighbours.
LOCKSTEP_SIMD F16 PairNeighbours(F16 first, F16 second) {
  return F16(_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second.v, first.v)));
}
LOCKSTEP_SIMD F16 MultiplyAddPairs(F16 a, F16 b, F16 sum) {
  return F16(_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v));
}
#else
LOCKSTEP_SIMD F16 PairUp(F16 low, F16 high) {
  return FromBits(HighToLow(RoundToBf16(low)) | RoundToBf16(high));
}
LOCKSTEP_SIMD F16 PairNeighbours(F16 first, F16 second) {
  F16 even, odd;
  Deal(first, second, &even, &odd);
  return PairUp(even, odd);
}
LOCKSTEP_SIMD F16 FlushDenormal(F16 x) {
  return Select(Less(Abs(x), F16(0x1p-126f)), x * F16(0.0f), x);
}
LOCKSTEP_SIMD F16 MultiplyAddPairs(F16 a, F16 b, F16 sum) {
  const I16 high(kHighHalf);
  sum = FlushDenormal(
      Fma(FromBits(AsBits(a) & high), FromBits(AsBits(b) & high), FlushDenormal(sum)));
  return FlushDenormal(Fma(FromBits(LowToHigh(AsBits(a))), FromBits(LowToHigh(AsBits(b))), sum));
}
#endif

struct Floats {
  static constexpr int64_t Elements(int64_t floats) { return floats; }
  static constexpr int kFloats = kLanes;  // that LoadElements takes
  LOCKSTEP_SIMD static F16 LoadElements(const float* p, int64_t n) {
    return n >= kFloats ? Load(p, All()) : Load(p, FirstLanes(n));
  }
  LOCKSTEP_SIMD static F16 MultiplyAdd(F16 a, F16 b, F16 sum) { return Fma(a, b, sum); }
};

struct Pairs {
  static constexpr int64_t Elements(int64_t floats) { return (floats + 1) / 2; }
  static constexpr int kFloats = 2 * kLanes;
  // From n neighbouring floats; zeros beyond.
  LOCKSTEP_SIMD static F16 LoadElements(const float* p, int64_t n) {
    if (n >= kFloats) return PairNeighbours(Load(p, All()), Load(p + kLanes, All()));
    if (n <= kLanes) return PairNeighbours(Load(p, FirstLanes(n)), F16(0.0f));
    return PairNeighbours(Load(p, All()), Load(p + kLanes, FirstLanes(n - kLanes)));
  }
  LOCKSTEP_SIMD static F16 MultiplyAdd(F16 a, F16 b, F16 sum) {
    return MultiplyAddPairs(a, b, sum);
  }
};

}  // namespace lockstep::device::LOCKSTEP_ISA
