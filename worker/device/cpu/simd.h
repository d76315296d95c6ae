// Sixteen lanes, whatever the instruction set: one AVX-512 register or two of AVX2. Both builds of
// the kernels do the same operations on the same lanes in the same order, so they give equal bits.
//
// Everything is always inlined and lives in a namespace per instruction set (LOCKSTEP_ISA, set by
// the build), so that no code of one build can be linked into another. Thread-safe: pure functions.
//
// Loads and stores come in two forms, of all lanes (All) and of the first lanes under a Mask, which
// never touch memory of the lanes that are off.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "worker/device/kernel_math.h"

#define LOCKSTEP_SIMD [[gnu::always_inline]] inline

namespace lockstep::device::LOCKSTEP_ISA {

constexpr int kLanes = 16;

struct All {};

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};
struct F16 {
  __m512 v;
  F16() = default;
  LOCKSTEP_SIMD F16(float x) : v(_mm512_set1_ps(x)) {}
  LOCKSTEP_SIMD explicit F16(__m512 x) : v(x) {}
};
struct I16 {
  __m512i v;
  I16() = default;
  LOCKSTEP_SIMD I16(int32_t x) : v(_mm512_set1_epi32(x)) {}
  LOCKSTEP_SIMD explicit I16(__m512i x) : v(x) {}
};
struct D16 {
  __m512d lo, hi;
  D16() = default;
  LOCKSTEP_SIMD D16(double x) : lo(_mm512_set1_pd(x)), hi(lo) {}
  LOCKSTEP_SIMD D16(__m512d a, __m512d b) : lo(a), hi(b) {}
};
// Eight 64-bit lanes.
struct U8 {
  __m512i v;
  U8() = default;
  LOCKSTEP_SIMD U8(uint64_t x) : v(_mm512_set1_epi64(static_cast<int64_t>(x))) {}
  LOCKSTEP_SIMD explicit U8(__m512i x) : v(x) {}
};

LOCKSTEP_SIMD Mask FirstLanes(int64_t n) {  // 0 <= n <= 16
  return {static_cast<__mmask16>((uint32_t{1} << n) - 1)};
}
LOCKSTEP_SIMD Mask LastLanes(int64_t first) { return {static_cast<__mmask16>(0xFFFFu << first)}; }
LOCKSTEP_SIMD Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
LOCKSTEP_SIMD Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
LOCKSTEP_SIMD uint32_t Bits(Mask a) { return a.m; }

LOCKSTEP_SIMD F16 Load(const float* p, All) { return F16(_mm512_loadu_ps(p)); }
LOCKSTEP_SIMD F16 Load(const float* p, Mask m) { return F16(_mm512_maskz_loadu_ps(m.m, p)); }
LOCKSTEP_SIMD void Store(float* p, F16 x, All) { _mm512_storeu_ps(p, x.v); }
LOCKSTEP_SIMD void Store(float* p, F16 x, Mask m) { _mm512_mask_storeu_ps(p, m.m, x.v); }
LOCKSTEP_SIMD I16 LoadBytes(const uint8_t* p, All) {
  return I16(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
LOCKSTEP_SIMD I16 LoadBytes(const uint8_t* p, Mask m) {
  return I16(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m.m, p)));
}
LOCKSTEP_SIMD void StoreBytes(uint8_t* p, I16 x, All) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
LOCKSTEP_SIMD void StoreBytes(uint8_t* p, I16 x, Mask m) {
  _mm_mask_storeu_epi8(p, m.m, _mm512_cvtepi32_epi8(x.v));
}

LOCKSTEP_SIMD F16 operator+(F16 a, F16 b) { return F16(_mm512_add_ps(a.v, b.v)); }
LOCKSTEP_SIMD F16 operator-(F16 a, F16 b) { return F16(_mm512_sub_ps(a.v, b.v)); }
LOCKSTEP_SIMD F16 operator*(F16 a, F16 b) { return F16(_mm512_mul_ps(a.v, b.v)); }
LOCKSTEP_SIMD F16 operator/(F16 a, F16 b) { return F16(_mm512_div_ps(a.v, b.v)); }
LOCKSTEP_SIMD F16 Fma(F16 a, F16 b, F16 c) { return F16(_mm512_fmadd_ps(a.v, b.v, c.v)); }
LOCKSTEP_SIMD F16 Sqrt(F16 x) { return F16(_mm512_sqrt_ps(x.v)); }
LOCKSTEP_SIMD F16 Abs(F16 x) { return F16(_mm512_abs_ps(x.v)); }
LOCKSTEP_SIMD F16 Maximum(F16 a, F16 b) { return F16(_mm512_max_ps(a.v, b.v)); }
LOCKSTEP_SIMD Mask Less(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LOCKSTEP_SIMD Mask Equal(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
LOCKSTEP_SIMD Mask IsNan(F16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
LOCKSTEP_SIMD F16 Select(Mask m, F16 a, F16 b) { return F16(_mm512_mask_blend_ps(m.m, b.v, a.v)); }
LOCKSTEP_SIMD I16 Select(Mask m, I16 a, I16 b) {
  return I16(_mm512_mask_blend_epi32(m.m, b.v, a.v));
}
LOCKSTEP_SIMD F16 RoundToInt(F16 x) {
  return F16(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LOCKSTEP_SIMD F16 ScaleByPowerOfTwo(F16 x, F16 n) { return F16(_mm512_scalef_ps(x.v, n.v)); }

// v[r] lane c becomes v[c] lane r.
LOCKSTEP_SIMD void Transpose(F16 (&v)[kLanes]) {
  __m512 t[kLanes], u[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + 2 + k]);
      u[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // u[4 g + c] holds columns c, c + 4, c + 8, c + 12 (a quarter each) of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xDD);
    const __m512 high_odd = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xDD);
    v[c] = F16(_mm512_shuffle_f32x4(low, high, 0x88));
    v[c + 8] = F16(_mm512_shuffle_f32x4(low, high, 0xDD));
    v[c + 4] = F16(_mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    v[c + 12] = F16(_mm512_shuffle_f32x4(low_odd, high_odd, 0xDD));
  }
}

LOCKSTEP_SIMD I16 AsBits(F16 x) { return I16(_mm512_castps_si512(x.v)); }
LOCKSTEP_SIMD F16 ToFloat(I16 x) { return F16(_mm512_cvtepi32_ps(x.v)); }
LOCKSTEP_SIMD I16 operator&(I16 a, I16 b) { return I16(_mm512_and_si512(a.v, b.v)); }
template <int kBits>
LOCKSTEP_SIMD I16 ShiftRight(I16 a) {
  return I16(_mm512_srli_epi32(a.v, kBits));
}
LOCKSTEP_SIMD Mask Equal(I16 a, I16 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
LOCKSTEP_SIMD Mask Less(I16 a, I16 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }

LOCKSTEP_SIMD D16 ToDouble(F16 x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))};
}
LOCKSTEP_SIMD F16 ToFloat(D16 x) {
  return F16(
      _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.lo)), _mm512_cvtpd_ps(x.hi), 1));
}
LOCKSTEP_SIMD D16 operator+(D16 a, D16 b) {
  return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)};
}
LOCKSTEP_SIMD D16 operator-(D16 a, D16 b) {
  return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)};
}
LOCKSTEP_SIMD D16 operator*(D16 a, D16 b) {
  return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)};
}
LOCKSTEP_SIMD D16 operator/(D16 a, D16 b) {
  return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)};
}
LOCKSTEP_SIMD D16 Fma(D16 a, D16 b, D16 c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
LOCKSTEP_SIMD void Store(double* p, D16 x) {
  _mm512_storeu_pd(p, x.lo);
  _mm512_storeu_pd(p + 8, x.hi);
}

LOCKSTEP_SIMD U8 LoadWords(const uint64_t* p) { return U8(_mm512_loadu_si512(p)); }
LOCKSTEP_SIMD void Store(uint64_t* p, U8 x) { _mm512_storeu_si512(p, x.v); }
LOCKSTEP_SIMD U8 operator+(U8 a, U8 b) { return U8(_mm512_add_epi64(a.v, b.v)); }
LOCKSTEP_SIMD U8 operator^(U8 a, U8 b) { return U8(_mm512_xor_si512(a.v, b.v)); }
LOCKSTEP_SIMD U8 operator&(U8 a, U8 b) { return U8(_mm512_and_si512(a.v, b.v)); }
LOCKSTEP_SIMD U8 operator|(U8 a, U8 b) { return U8(_mm512_or_si512(a.v, b.v)); }
template <int kBits>
LOCKSTEP_SIMD U8 ShiftRight(U8 a) {
  return U8(_mm512_srli_epi64(a.v, kBits));
}
template <int kBits>
LOCKSTEP_SIMD U8 ShiftLeft(U8 a) {
  return U8(_mm512_slli_epi64(a.v, kBits));
}
LOCKSTEP_SIMD U8 Multiply(U8 a, U8 b) { return U8(_mm512_mullo_epi64(a.v, b.v)); }
// Product of the low halves of the lanes.
LOCKSTEP_SIMD U8 MultiplyLow(U8 a, U8 b) { return U8(_mm512_mul_epu32(a.v, b.v)); }
LOCKSTEP_SIMD U8 LowLanes(I16 x) { return U8(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(x.v))); }
LOCKSTEP_SIMD U8 HighLanes(I16 x) {
  return U8(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(x.v, 1)));
}
// The low halves of four vectors, whose lanes are blocks 0 4 1 5 2 6 3 7, as the elements of blocks
// 0..3 (first) and 4..7 (second), four to a block.
LOCKSTEP_SIMD void Interleave(U8 x0, U8 x1, U8 x2, U8 x3, I16* first, I16* second) {
  const __m512i a = _mm512_mask_blend_epi32(0xAAAA, x0.v, _mm512_slli_epi64(x1.v, 32));
  const __m512i b = _mm512_mask_blend_epi32(0xAAAA, x2.v, _mm512_slli_epi64(x3.v, 32));
  *first = I16(_mm512_unpacklo_epi64(a, b));
  *second = I16(_mm512_unpackhi_epi64(a, b));
}

#elif defined(__AVX2__)

struct Mask {
  __m256i lo, hi;
};
struct F16 {
  __m256 lo, hi;
  F16() = default;
  LOCKSTEP_SIMD F16(float x) : lo(_mm256_set1_ps(x)), hi(lo) {}
  LOCKSTEP_SIMD F16(__m256 a, __m256 b) : lo(a), hi(b) {}
};
struct I16 {
  __m256i lo, hi;
  I16() = default;
  LOCKSTEP_SIMD I16(int32_t x) : lo(_mm256_set1_epi32(x)), hi(lo) {}
  LOCKSTEP_SIMD I16(__m256i a, __m256i b) : lo(a), hi(b) {}
};
struct D16 {
  __m256d q0, q1, q2, q3;
  D16() = default;
  LOCKSTEP_SIMD D16(double x) : q0(_mm256_set1_pd(x)), q1(q0), q2(q0), q3(q0) {}
  LOCKSTEP_SIMD D16(__m256d a, __m256d b, __m256d c, __m256d d) : q0(a), q1(b), q2(c), q3(d) {}
};
struct U8 {
  __m256i lo, hi;
  U8() = default;
  LOCKSTEP_SIMD U8(uint64_t x) : lo(_mm256_set1_epi64x(static_cast<int64_t>(x))), hi(lo) {}
  LOCKSTEP_SIMD U8(__m256i a, __m256i b) : lo(a), hi(b) {}
};

alignas(64) static constexpr int32_t kMaskWindow[48] = {
    0,  0,  0,  0,  0,  0,  0,  0,  0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1,
    -1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0,  0,  0,  0,  0,  0,  0};

LOCKSTEP_SIMD Mask MaskAt(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
LOCKSTEP_SIMD Mask FirstLanes(int64_t n) { return MaskAt(kMaskWindow + 32 - n); }
LOCKSTEP_SIMD Mask LastLanes(int64_t first) { return MaskAt(kMaskWindow + 16 - first); }
LOCKSTEP_SIMD Mask operator&(Mask a, Mask b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
LOCKSTEP_SIMD Mask operator|(Mask a, Mask b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
LOCKSTEP_SIMD uint32_t Bits(Mask a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a.lo))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a.hi))) << 8;
}

LOCKSTEP_SIMD F16 Load(const float* p, All) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LOCKSTEP_SIMD F16 Load(const float* p, Mask m) {
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
LOCKSTEP_SIMD void Store(float* p, F16 x, All) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
LOCKSTEP_SIMD void Store(float* p, F16 x, Mask m) {
  _mm256_maskstore_ps(p, m.lo, x.lo);
  _mm256_maskstore_ps(p + 8, m.hi, x.hi);
}
LOCKSTEP_SIMD I16 LoadBytes(const uint8_t* p, All) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
LOCKSTEP_SIMD I16 LoadBytes(const uint8_t* p, Mask m) {
  alignas(16) uint8_t bytes[kLanes] = {};
  const int n = __builtin_popcount(Bits(m));
  for (int i = 0; i < n; ++i) bytes[i] = p[i];
  return LoadBytes(bytes, All());
}
LOCKSTEP_SIMD void StoreBytes(uint8_t* p, I16 x, All) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.lo, x.hi), 0xD8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
LOCKSTEP_SIMD void StoreBytes(uint8_t* p, I16 x, Mask m) {
  alignas(16) uint8_t bytes[kLanes];
  StoreBytes(bytes, x, All());
  const int n = __builtin_popcount(Bits(m));
  for (int i = 0; i < n; ++i) p[i] = bytes[i];
}

LOCKSTEP_SIMD F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
LOCKSTEP_SIMD F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
LOCKSTEP_SIMD F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
LOCKSTEP_SIMD F16 operator/(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
LOCKSTEP_SIMD F16 Fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LOCKSTEP_SIMD F16 Sqrt(F16 x) { return {_mm256_sqrt_ps(x.lo), _mm256_sqrt_ps(x.hi)}; }
LOCKSTEP_SIMD F16 Abs(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
LOCKSTEP_SIMD F16 Maximum(F16 a, F16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
template <int kPredicate>
LOCKSTEP_SIMD Mask Compare(F16 a, F16 b) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, kPredicate)),
          _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, kPredicate))};
}
LOCKSTEP_SIMD Mask Less(F16 a, F16 b) { return Compare<_CMP_LT_OQ>(a, b); }
LOCKSTEP_SIMD Mask Equal(F16 a, F16 b) { return Compare<_CMP_EQ_OQ>(a, b); }
LOCKSTEP_SIMD Mask IsNan(F16 a) { return Compare<_CMP_UNORD_Q>(a, a); }
LOCKSTEP_SIMD F16 Select(Mask m, F16 a, F16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(m.lo)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(m.hi))};
}
LOCKSTEP_SIMD I16 Select(Mask m, I16 a, I16 b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, m.lo), _mm256_blendv_epi8(b.hi, a.hi, m.hi)};
}
LOCKSTEP_SIMD F16 RoundToInt(F16 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kMode), _mm256_round_ps(x.hi, kMode)};
}
LOCKSTEP_SIMD __m256 PowerOfTwo(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
LOCKSTEP_SIMD F16 ScaleByPowerOfTwo(F16 x, F16 n) {
  const F16 half = RoundToInt(n * F16(0.5f)), rest = n - half;
  return {_mm256_mul_ps(_mm256_mul_ps(x.lo, PowerOfTwo(half.lo)), PowerOfTwo(rest.lo)),
          _mm256_mul_ps(_mm256_mul_ps(x.hi, PowerOfTwo(half.hi)), PowerOfTwo(rest.hi))};
}

LOCKSTEP_SIMD void Transpose8(__m256 (&v)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0x44);
      u[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0xEE);
    }
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    v[c + 4] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
// v[r] lane c becomes v[c] lane r.
LOCKSTEP_SIMD void Transpose(F16 (&v)[kLanes]) {
  __m256 quarter[4][8];
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = v[i].lo;
    quarter[1][i] = v[i].hi;
    quarter[2][i] = v[i + 8].lo;
    quarter[3][i] = v[i + 8].hi;
  }
  for (auto& q : quarter) Transpose8(q);
  for (int i = 0; i < 8; ++i) {
    v[i] = {quarter[0][i], quarter[2][i]};
    v[i + 8] = {quarter[1][i], quarter[3][i]};
  }
}

LOCKSTEP_SIMD I16 AsBits(F16 x) { return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)}; }
LOCKSTEP_SIMD F16 ToFloat(I16 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
LOCKSTEP_SIMD I16 operator&(I16 a, I16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int kBits>
LOCKSTEP_SIMD I16 ShiftRight(I16 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
LOCKSTEP_SIMD Mask Equal(I16 a, I16 b) {
  return {_mm256_cmpeq_epi32(a.lo, b.lo), _mm256_cmpeq_epi32(a.hi, b.hi)};
}
LOCKSTEP_SIMD Mask Less(I16 a, I16 b) {
  return {_mm256_cmpgt_epi32(b.lo, a.lo), _mm256_cmpgt_epi32(b.hi, a.hi)};
}

LOCKSTEP_SIMD D16 ToDouble(F16 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x.lo)),
          _mm256_cvtps_pd(_mm256_extractf128_ps(x.lo, 1)),
          _mm256_cvtps_pd(_mm256_castps256_ps128(x.hi)),
          _mm256_cvtps_pd(_mm256_extractf128_ps(x.hi, 1))};
}
LOCKSTEP_SIMD F16 ToFloat(D16 x) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(x.q1), _mm256_cvtpd_ps(x.q0)),
          _mm256_set_m128(_mm256_cvtpd_ps(x.q3), _mm256_cvtpd_ps(x.q2))};
}
LOCKSTEP_SIMD D16 operator+(D16 a, D16 b) {
  return {_mm256_add_pd(a.q0, b.q0), _mm256_add_pd(a.q1, b.q1), _mm256_add_pd(a.q2, b.q2),
          _mm256_add_pd(a.q3, b.q3)};
}
LOCKSTEP_SIMD D16 operator-(D16 a, D16 b) {
  return {_mm256_sub_pd(a.q0, b.q0), _mm256_sub_pd(a.q1, b.q1), _mm256_sub_pd(a.q2, b.q2),
          _mm256_sub_pd(a.q3, b.q3)};
}
LOCKSTEP_SIMD D16 operator*(D16 a, D16 b) {
  return {_mm256_mul_pd(a.q0, b.q0), _mm256_mul_pd(a.q1, b.q1), _mm256_mul_pd(a.q2, b.q2),
          _mm256_mul_pd(a.q3, b.q3)};
}
LOCKSTEP_SIMD D16 operator/(D16 a, D16 b) {
  return {_mm256_div_pd(a.q0, b.q0), _mm256_div_pd(a.q1, b.q1), _mm256_div_pd(a.q2, b.q2),
          _mm256_div_pd(a.q3, b.q3)};
}
LOCKSTEP_SIMD D16 Fma(D16 a, D16 b, D16 c) {
  return {_mm256_fmadd_pd(a.q0, b.q0, c.q0), _mm256_fmadd_pd(a.q1, b.q1, c.q1),
          _mm256_fmadd_pd(a.q2, b.q2, c.q2), _mm256_fmadd_pd(a.q3, b.q3, c.q3)};
}
LOCKSTEP_SIMD void Store(double* p, D16 x) {
  _mm256_storeu_pd(p, x.q0);
  _mm256_storeu_pd(p + 4, x.q1);
  _mm256_storeu_pd(p + 8, x.q2);
  _mm256_storeu_pd(p + 12, x.q3);
}

LOCKSTEP_SIMD U8 LoadWords(const uint64_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 4))};
}
LOCKSTEP_SIMD void Store(uint64_t* p, U8 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 4), x.hi);
}
LOCKSTEP_SIMD U8 operator+(U8 a, U8 b) {
  return {_mm256_add_epi64(a.lo, b.lo), _mm256_add_epi64(a.hi, b.hi)};
}
LOCKSTEP_SIMD U8 operator^(U8 a, U8 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
LOCKSTEP_SIMD U8 operator&(U8 a, U8 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
LOCKSTEP_SIMD U8 operator|(U8 a, U8 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
template <int kBits>
LOCKSTEP_SIMD U8 ShiftRight(U8 a) {
  return {_mm256_srli_epi64(a.lo, kBits), _mm256_srli_epi64(a.hi, kBits)};
}
template <int kBits>
LOCKSTEP_SIMD U8 ShiftLeft(U8 a) {
  return {_mm256_slli_epi64(a.lo, kBits), _mm256_slli_epi64(a.hi, kBits)};
}
LOCKSTEP_SIMD U8 MultiplyLow(U8 a, U8 b) {
  return {_mm256_mul_epu32(a.lo, b.lo), _mm256_mul_epu32(a.hi, b.hi)};
}
LOCKSTEP_SIMD U8 Multiply(U8 a, U8 b) {
  const U8 cross = MultiplyLow(ShiftRight<32>(a), b) + MultiplyLow(a, ShiftRight<32>(b));
  return MultiplyLow(a, b) + ShiftLeft<32>(cross);
}
LOCKSTEP_SIMD U8 LowLanes(I16 x) {
  return {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(x.lo)),
          _mm256_cvtepu32_epi64(_mm256_extracti128_si256(x.lo, 1))};
}
LOCKSTEP_SIMD U8 HighLanes(I16 x) {
  return {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(x.hi)),
          _mm256_cvtepu32_epi64(_mm256_extracti128_si256(x.hi, 1))};
}
LOCKSTEP_SIMD void Interleave(U8 x0, U8 x1, U8 x2, U8 x3, I16* first, I16* second) {
  const U8 high1 = ShiftLeft<32>(x1), high3 = ShiftLeft<32>(x3);
  const __m256i a_lo = _mm256_blend_epi32(x0.lo, high1.lo, 0xAA);
  const __m256i a_hi = _mm256_blend_epi32(x0.hi, high1.hi, 0xAA);
  const __m256i b_lo = _mm256_blend_epi32(x2.lo, high3.lo, 0xAA);
  const __m256i b_hi = _mm256_blend_epi32(x2.hi, high3.hi, 0xAA);
  *first = {_mm256_unpacklo_epi64(a_lo, b_lo), _mm256_unpacklo_epi64(a_hi, b_hi)};
  *second = {_mm256_unpackhi_epi64(a_lo, b_lo), _mm256_unpackhi_epi64(a_hi, b_hi)};
}

#endif

// Sums of the lanes in one fixed order.
LOCKSTEP_SIMD double SumLanes(D16 x) {
  double v[kLanes];
  Store(v, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}
LOCKSTEP_SIMD float MaximumLane(F16 x) {
  float v[kLanes];
  Store(v, x, All());
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Calls body(i, All) for each whole vector of [0, n) and body(i, Mask) for the rest.
template <class Body>
LOCKSTEP_SIMD void ForEachVector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, All());
  if (i < n) body(i, FirstLanes(n - i));
}

}  // namespace lockstep::device::LOCKSTEP_ISA
