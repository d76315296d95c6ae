// Matrix products whose every element is one chain of fused multiply-adds in ascending depth, and
// so has the same bits whatever the sizes of the matrices around it.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

// The accumulators of a tile fill the register file.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 1;  // of two registers
#endif

// rows x vectors of c; the last vector under `m`.
template <int kRows, int kVectors, class M>
void Tile(const GemmShape& s, const float* a, const float* b, const float* bias, float* c, M m) {
  F16 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = F16(0.0f);
  }
  for (int64_t k = 0; k < s.depth; ++k) {
    F16 column[kVectors];
    for (int v = 0; v + 1 < kVectors; ++v) column[v] = Load(b + v * kLanes, All());
    column[kVectors - 1] = Load(b + (kVectors - 1) * kLanes, m);
    for (int r = 0; r < kRows; ++r) {
      const F16 factor(a[r * s.a_row]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(factor, column[v], sum[r][v]);
    }
    a += s.a_depth;
    b += s.b_depth;
  }
  if (bias != nullptr) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * kLanes;
      const F16 shift = v + 1 < kVectors ? Load(bias + at, All()) : Load(bias + at, m);
      for (int r = 0; r < kRows; ++r) sum[r][v] = sum[r][v] + shift;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* const row = c + r * s.c_row;
    for (int v = 0; v + 1 < kVectors; ++v) Store(row + v * kLanes, sum[r][v], All());
    Store(row + (kVectors - 1) * kLanes, sum[r][kVectors - 1], m);
  }
}

template <int kRows, class M>
LOCKSTEP_SIMD void TileOfVectors(int vectors, const GemmShape& s, const float* a, const float* b,
                                 const float* bias, float* c, M m) {
  if constexpr (kTileVectors > 1) {
    if (vectors == 2) return Tile<kRows, 2>(s, a, b, bias, c, m);
    if (vectors == 3) return Tile<kRows, 3>(s, a, b, bias, c, m);
    if (vectors == 4) return Tile<kRows, 4>(s, a, b, bias, c, m);
  }
  Tile<kRows, 1>(s, a, b, bias, c, m);
}

// All rows of `vectors` vectors of columns.
template <class M>
LOCKSTEP_SIMD void Columns(int vectors, const GemmShape& s, const float* a, const float* b,
                           const float* bias, float* c, M m) {
  int64_t r = 0;
  for (; r + kTileRows <= s.rows; r += kTileRows) {
    TileOfVectors<kTileRows>(vectors, s, a + r * s.a_row, b, bias, c + r * s.c_row, m);
  }
  a += r * s.a_row;
  c += r * s.c_row;
  switch (s.rows - r) {
    case 5:
      return TileOfVectors<5>(vectors, s, a, b, bias, c, m);
    case 4:
      return TileOfVectors<4>(vectors, s, a, b, bias, c, m);
    case 3:
      return TileOfVectors<3>(vectors, s, a, b, bias, c, m);
    case 2:
      return TileOfVectors<2>(vectors, s, a, b, bias, c, m);
    case 1:
      return TileOfVectors<1>(vectors, s, a, b, bias, c, m);
    default:
      return;
  }
}

}  // namespace

void Gemm(const GemmShape& s, const float* a, const float* b, const float* bias, float* c) {
  constexpr int64_t kTileColumns = kTileVectors * kLanes;
  static_assert(kGemmPanel % kTileColumns == 0);
  for (int64_t j = 0; j < s.columns; j += kTileColumns) {
    const float* const from = b + j / kGemmPanel * s.b_panel + j % kGemmPanel;
    const float* const shift = bias == nullptr ? nullptr : bias + j;
    const int64_t left = s.columns - j;
    if (left >= kTileColumns) {
      Columns(kTileVectors, s, a, from, shift, c + j, All());
    } else {
      const int vectors = static_cast<int>((left + kLanes - 1) / kLanes);
      Columns(vectors, s, a, from, shift, c + j, FirstLanes(left - (vectors - 1) * kLanes));
    }
  }
}

void PackTransposed(int64_t rows, int64_t columns, const float* w, float* packed) {
  for (int64_t first = 0; first < rows; first += kGemmPanel) {
    const int64_t width = rows - first < kGemmPanel ? rows - first : kGemmPanel;
    for (int64_t k = 0; k < columns; ++k, packed += kGemmPanel) {
      for (int64_t j = 0; j < width; ++j) packed[j] = w[(first + j) * columns + k];
    }
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
