// The tile of a matrix product: accumulators that fill the register file, and how rows and columns
// are cut into tiles. Internal to worker/device/cpu/kernels. Pure functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "worker/device/cpu/kernels/numbers.h"

namespace lockstep::device::LOCKSTEP_ISA {

// Depth walked at once: this many rows of a tile's columns stay in the first-level cache while all
// tiles of rows pass over them.
constexpr int64_t kDepthBlock = 64;

#if defined(__AVX512F__)
constexpr int kTileVectors = 4;  // at most, of a tile's columns
constexpr int kTileAccumulators = 24;
#else
constexpr int kTileVectors = 1;  // of two registers
constexpr int kTileAccumulators = 6;
#endif

// Tiles of a leaf's product, which is few steps deep: where registers are many, they hold the tiles
// of two leaves. The shapes are the fastest of those that were measured.
template <class Numbers>
struct LeafTile {
#if defined(__AVX512F__)
  static constexpr bool kTwo = true;
  static constexpr bool kFloats = std::is_same_v<Numbers, Floats>;
  static constexpr int kRows = kFloats ? 14 : 4, kVectors = kFloats ? 1 : 3;
#else
  static constexpr bool kTwo = false;
  static constexpr int kRows = kTileAccumulators, kVectors = kTileVectors;
#endif
};

constexpr int RowsOfTile(int vectors) { return kTileAccumulators / vectors; }

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <int kRows, int kVectors>
struct Accumulators {
  F16 sum[kRows][kVectors];

  LOCKSTEP_SIMD void Clear() {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = F16(0.0f);
    }
  }
  // sum += a(r, k) b(k, .), k ascending. Rows of a lie a_row apart, steps of the depth a_depth and
  // b_depth; the last vector of b is read under `m`.
  template <class Numbers, class M>
  LOCKSTEP_SIMD void Multiply(int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                              const float* b, int64_t b_depth, M m) {
    for (int64_t k = 0; k < depth; ++k) {
      F16 column[kVectors];
      for (int v = 0; v + 1 < kVectors; ++v) column[v] = LOCKSTEP_ISA::Load(b + v * kLanes, All());
      column[kVectors - 1] = LOCKSTEP_ISA::Load(b + (kVectors - 1) * kLanes, m);
      for (int r = 0; r < kRows; ++r) {
        const F16 factor(a[r * a_row]);
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] = Numbers::MultiplyAdd(factor, column[v], sum[r][v]);
      }
      a += a_depth;
      b += b_depth;
    }
  }
  // sum = a(k, r) b(k, .), k ascending.
  template <class Numbers, class M>
  LOCKSTEP_SIMD void Product(int64_t depth, const float* a, int64_t a_depth, const float* b,
                             int64_t b_depth, M m) {
    Clear();
    Multiply<Numbers>(depth, a, 1, a_depth, b, b_depth, m);
  }
  template <class M>
  LOCKSTEP_SIMD void Load(const float* c, int64_t c_row, M m) {
    ForEach(m, [&](int r, int v, auto mask) {
      sum[r][v] = LOCKSTEP_ISA::Load(c + r * c_row + v * kLanes, mask);
    });
  }
  template <class M>
  LOCKSTEP_SIMD void Store(float* c, int64_t c_row, M m) const {
    ForEach(m, [&](int r, int v, auto mask) {
      LOCKSTEP_ISA::Store(c + r * c_row + v * kLanes, sum[r][v], mask);
    });
  }
  // sum = left + sum.
  template <class M>
  LOCKSTEP_SIMD void AddFromLeft(const float* left, int64_t left_row, M m) {
    ForEach(m, [&](int r, int v, auto mask) {
      sum[r][v] = LOCKSTEP_ISA::Load(left + r * left_row + v * kLanes, mask) + sum[r][v];
    });
  }
  LOCKSTEP_SIMD void AddLeft(const Accumulators& left) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = left.sum[r][v] + sum[r][v];
    }
  }
  template <class M>
  LOCKSTEP_SIMD void AddRow(const float* row, M m) {
    ForEach(m, [&](int r, int v, auto mask) {
      sum[r][v] = sum[r][v] + LOCKSTEP_ISA::Load(row + v * kLanes, mask);
    });
  }

 private:
  template <class M, class Body>
  LOCKSTEP_SIMD static void ForEach(M m, Body body) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v + 1 < kVectors; ++v) body(r, v, All());
      body(r, kVectors - 1, m);
    }
  }
};

// body(first row, Constant<rows>) for tiles that cover `rows`: of kRows, and smaller ones at the
// end.
template <int kRows, class Body>
LOCKSTEP_SIMD void ForEachTileOfRows(int64_t rows, Body body, int64_t first = 0) {
  for (; first + kRows <= rows; first += kRows) body(first, Constant<kRows>());
  if constexpr (kRows > 1) {
    if (first < rows) ForEachTileOfRows<kRows / 2>(rows, body, first);
  }
}

// body(Constant<vectors>, mask of the last) for a tile over the first of `columns` columns, of at
// most kVectors.
template <int kVectors, class Body>
LOCKSTEP_SIMD void ForTileOfColumns(int64_t columns, Body body) {
  if (columns >= kVectors * kLanes) return body(Constant<kVectors>(), All());
  if constexpr (kVectors > 1) {
    if (columns > (kVectors - 1) * kLanes) {
      return body(Constant<kVectors>(), FirstLanes(columns - (kVectors - 1) * kLanes));
    }
    ForTileOfColumns<kVectors - 1>(columns, body);
  } else {
    body(Constant<1>(), FirstLanes(columns));
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
