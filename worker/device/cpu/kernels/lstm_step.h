// One step of an LSTM: the recurrent product, tile by tile, with the cell's arithmetic on each tile
// while it lies in the nearest cache. Every sum is one chain of fused multiply-adds in ascending
// depth, so a row has the same bits however many rows share the call. Numbers: what the elements of
// the product are (numbers.h). Contracts are those of worker/device/cpu/kernels.h. Internal to
// worker/device/cpu/kernels.
#pragma once

#include "worker/device/cpu/kernels.h"
#include "worker/device/cpu/kernels/numbers.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

constexpr int kGates = 4;
static_assert(kLstmUnits == kLanes && kGemmPanel == kGates * kLanes);

// The accumulators of a tile fill the register file.
#if defined(__AVX512F__)
constexpr int kForwardRows = 6;
constexpr int kBackwardRows = 6, kBackwardVectors = 4;
#else
constexpr int kForwardRows = 1;  // a vector is two registers
constexpr int kBackwardRows = 6, kBackwardVectors = 1;
#endif

// sum += a b over `depth`; rows of b are kGemmPanel apart.
template <class Numbers, int kRows, int kVectors>
LOCKSTEP_SIMD void Accumulate(int64_t depth, const float* a, int64_t a_row, const float* b,
                              F16 (&sum)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k, b += kGemmPanel) {
    F16 column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = Load(b + v * kLanes, All());
    for (int r = 0; r < kRows; ++r) {
      const F16 factor(a[r * a_row + k]);
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = Numbers::MultiplyAdd(factor, column[v], sum[r][v]);
    }
  }
}

struct ForwardStep {
  int64_t hidden;
  const float *weight, *h_before, *c_before;
  float *gates, *c, *tanh_c, *h;
};

// Rows [row, row + kRows) of units [unit, unit + 16), under m.
template <class Numbers, int kRows, class M>
void ForwardTile(const ForwardStep& s, int64_t row, int64_t unit, M m) {
  float* const gates = s.gates + row * kGates * s.hidden + unit;
  F16 sum[kRows][kGates];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kGates; ++v) sum[r][v] = Load(gates + (r * kGates + v) * s.hidden, m);
  }
  if (s.h_before != nullptr) {
    const int64_t depth = Numbers::Elements(s.hidden);
    Accumulate<Numbers>(depth, s.h_before + row * depth, depth, s.weight + unit * kGates * depth,
                        sum);
  }
  alignas(64) float tile[kRows][kGates][kLanes];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kGates; ++v) Store(tile[r][v], sum[r][v], All());
  }
  for (int r = 0; r < kRows; ++r) {
    F16 gate[kGates], c, tanh_c, h;
    for (int v = 0; v < kGates; ++v) gate[v] = Load(tile[r][v], All());
    const int64_t at = (row + r) * s.hidden + unit;
    const F16 c_before = s.c_before != nullptr ? Load(s.c_before + at, m) : F16(0.0f);
    LstmCell(gate[0], gate[1], gate[2], gate[3], c_before, c, tanh_c, h);
    for (int v = 0; v < kGates; ++v) Store(gates + (r * kGates + v) * s.hidden, gate[v], m);
    Store(s.c + at, c, m);
    Store(s.tanh_c + at, tanh_c, m);
    Store(s.h + at, h, m);
  }
}

struct BackwardStep {
  int64_t hidden, dh_row;
  const float *weight, *dgates_after, *dh, *c_before, *tanh_c;
  float *gates, *dc;
};

// Rows [row, row + kRows) of kVectors vectors of units from `unit` on, the last under m.
template <class Numbers, int kRows, int kVectors, class M>
void BackwardTile(const BackwardStep& s, int64_t row, int64_t unit, M m) {
  const auto each_vector = [&](auto body) {
    for (int v = 0; v + 1 < kVectors; ++v) body(v, All());
    body(kVectors - 1, m);
  };
  F16 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    each_vector([&](int v, auto mask) {
      sum[r][v] =
          s.dh != nullptr ? Load(s.dh + (row + r) * s.dh_row + unit + v * kLanes, mask) : F16(0.0f);
    });
  }
  if (s.dgates_after != nullptr) {
    const int64_t depth = Numbers::Elements(kGates * s.hidden);
    const float* const panel =
        s.weight + unit / kGemmPanel * kGemmPanel * depth + unit % kGemmPanel;
    Accumulate<Numbers>(depth, s.dgates_after + row * depth, depth, panel, sum);
  }
  alignas(64) float tile[kRows][kVectors][kLanes];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) Store(tile[r][v], sum[r][v], All());
  }
  for (int r = 0; r < kRows; ++r) {
    each_vector([&](int v, auto mask) {
      const int64_t at = (row + r) * s.hidden + unit + v * kLanes;
      float* const gates = s.gates + (row + r) * kGates * s.hidden + unit + v * kLanes;
      F16 gate[kGates];
      for (int k = 0; k < kGates; ++k) gate[k] = Load(gates + k * s.hidden, mask);
      const F16 c_before = s.c_before != nullptr ? Load(s.c_before + at, mask) : F16(0.0f);
      F16 dc = s.dgates_after != nullptr ? Load(s.dc + at, mask) : F16(0.0f);
      LstmCellGradient(gate[0], gate[1], gate[2], gate[3], c_before, Load(s.tanh_c + at, mask),
                       Load(tile[r][v], All()), dc);
      for (int k = 0; k < kGates; ++k) Store(gates + k * s.hidden, gate[k], mask);
      Store(s.dc + at, dc, mask);
    });
  }
}

// Calls tile(std::integral_constant-like Rows<n>, first row) for tiles of at most kMost rows.
template <int kRows>
struct Rows {
  static constexpr int kValue = kRows;
};
template <int kMost, class Tile>
LOCKSTEP_SIMD void ForEachTile(int64_t rows, Tile tile) {
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) tile(Rows<kMost>(), row);
  const int64_t left = rows - row;
  if constexpr (kMost > 5) {
    if (left == 5) return tile(Rows<5>(), row);
  }
  if constexpr (kMost > 4) {
    if (left == 4) return tile(Rows<4>(), row);
  }
  if constexpr (kMost > 3) {
    if (left == 3) return tile(Rows<3>(), row);
  }
  if constexpr (kMost > 2) {
    if (left == 2) return tile(Rows<2>(), row);
  }
  if constexpr (kMost > 1) {
    if (left == 1) return tile(Rows<1>(), row);
  }
}

template <class Numbers, int kVectors, class M>
LOCKSTEP_SIMD void BackwardUnits(const BackwardStep& s, int64_t rows, int64_t unit, M m) {
  ForEachTile<kBackwardRows>(rows, [&](auto n, int64_t row) {
    BackwardTile<Numbers, decltype(n)::kValue, kVectors>(s, row, unit, m);
  });
}

template <class Numbers>
void ForwardStepOf(const LstmStepShape& shape, const float* weight, const float* h_before,
                   const float* c_before, float* gates, float* c, float* tanh_c, float* h) {
  const ForwardStep s = {shape.hidden, weight, h_before, c_before, gates, c, tanh_c, h};
  ForEachVector(shape.hidden, [&](int64_t unit, auto m) {
    ForEachTile<kForwardRows>(shape.rows, [&](auto n, int64_t row) {
      ForwardTile<Numbers, decltype(n)::kValue>(s, row, unit, m);
    });
  });
}

template <class Numbers>
void BackwardStepOf(const LstmStepShape& shape, const float* weight, const float* dgates_after,
                    const float* dh, const float* c_before, const float* tanh_c, float* gates,
                    float* dc) {
  const BackwardStep s = {shape.hidden, shape.dh_row, weight, dgates_after, dh, c_before,
                          tanh_c,       gates,        dc};
  constexpr int64_t kTileUnits = kBackwardVectors * kLanes;
  static_assert(kGemmPanel % kTileUnits == 0);
  int64_t unit = 0;
  for (; unit + kTileUnits <= shape.hidden; unit += kTileUnits) {
    BackwardUnits<Numbers, kBackwardVectors>(s, shape.rows, unit, All());
  }
  const int64_t left = shape.hidden - unit;
  if (left == 0) return;
  const int vectors = static_cast<int>((left + kLanes - 1) / kLanes);
  const Mask m = FirstLanes(left - (vectors - 1) * kLanes);
  if constexpr (kBackwardVectors > 1) {
    if (vectors == 4) return BackwardUnits<Numbers, 4>(s, shape.rows, unit, m);
    if (vectors == 3) return BackwardUnits<Numbers, 3>(s, shape.rows, unit, m);
    if (vectors == 2) return BackwardUnits<Numbers, 2>(s, shape.rows, unit, m);
  }
  BackwardUnits<Numbers, 1>(s, shape.rows, unit, m);
}

}  // namespace
}  // namespace lockstep::device::LOCKSTEP_ISA
