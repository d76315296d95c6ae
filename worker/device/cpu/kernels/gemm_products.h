// Matrix products whose every element is one chain of fused multiply-adds in ascending depth, and
// so has the same bits whatever the sizes of the matrices around it. Where the depth is walked in
// blocks, a chain is stored at the end of a block and goes on in the next: the same chain.
// Numbers: what the elements are (numbers.h); sizes of depth count them. Contracts are those of
// worker/device/cpu/kernels.h. Internal to worker/device/cpu/kernels.
#pragma once

#include "worker/device/cpu/kernels.h"
#include "worker/device/cpu/kernels/gemm_tile.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

// Columns of one tile's width, over all rows.
template <class Numbers, int kVectors, class M>
LOCKSTEP_SIMD void Columns(const GemmShape& s, const float* a, const float* b, const float* bias,
                           float* c, M m) {
  for (int64_t first = 0; first == 0 || first < s.depth; first += kDepthBlock) {
    const int64_t depth = s.depth - first < kDepthBlock ? s.depth - first : kDepthBlock;
    const bool last = first + depth >= s.depth;
    const float* const from = b + first * s.b_depth;
    ForEachTileOfRows<RowsOfTile(kVectors)>(s.rows, [&](int64_t r, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      Accumulators<kRows, kVectors> sum;
      float* const out = c + r * s.c_row;
      if (first == 0) {
        sum.Clear();
      } else {
        sum.Load(out, s.c_row, m);
      }
      sum.template Multiply<Numbers>(depth, a + r * s.a_row + first * s.a_depth, s.a_row, s.a_depth,
                                     from, s.b_depth, m);
      if (last && bias != nullptr) sum.AddRow(bias, m);
      sum.Store(out, s.c_row, m);
    });
  }
}

// The 16 x 16 elements from floats at `from` (rows `stride` apart; rows from `rows` and columns
// from `columns` on are zero), transposed.
template <class Numbers>
LOCKSTEP_SIMD void Transpose16(const float* from, int64_t stride, int64_t rows, int64_t columns,
                               float* to, int64_t to_stride) {
  F16 v[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    v[r] = r < rows ? Numbers::LoadElements(from + r * stride, columns) : F16(0.0f);
  }
  Transpose(v);
  const int64_t elements = Numbers::Elements(columns);
  for (int r = 0; r < kLanes && r < elements; ++r) Store(to + r * to_stride, v[r], All());
}

template <class Numbers>
void Product(const GemmShape& s, const float* a, const float* b, const float* bias, float* c) {
  static_assert(kGemmPanel % (kTileVectors * kLanes) == 0);
  for (int64_t j = 0; j < s.columns; j += kTileVectors * kLanes) {
    const float* const from = b + j / kGemmPanel * s.b_panel + j % kGemmPanel;
    const float* const shift = bias == nullptr ? nullptr : bias + j;
    ForTileOfColumns<kTileVectors>(s.columns - j, [&](auto vectors, auto m) {
      Columns<Numbers, decltype(vectors)::value>(s, a, from, shift, c + j, m);
    });
  }
}

// Lanes are rows of x, whose transposed block is the matrix that a tile walks; the weights, read
// where they are, are what it broadcasts.
template <class Numbers>
void ForwardProduct(int64_t rows, int64_t in, int64_t out, const float* x, const float* w,
                    const float* bias, bool relu, float* y, float* scratch) {
  constexpr int64_t kBlockRows = kDenseScratchColumns;
  const int64_t elements = Numbers::Elements(in);  // of a row
  alignas(64) float block[kDepthBlock * kBlockRows];
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    for (int64_t first = 0; first < elements; first += kDepthBlock) {
      const int64_t depth = elements - first < kDepthBlock ? elements - first : kDepthBlock;
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t k = 0; k < depth; k += kLanes) {
          const int64_t column = (first + k) * (Numbers::kFloats / kLanes);
          Transpose16<Numbers>(x + (row + v * kLanes) * in + column, in, count - v * kLanes,
                               in - column < Numbers::kFloats ? in - column : Numbers::kFloats,
                               block + k * kBlockRows + v * kLanes, kBlockRows);
        }
      }
      for (int64_t v = 0; v < vectors; v += kTileVectors) {
        ForTileOfColumns<kTileVectors>((vectors - v) * kLanes, [&](auto width, auto m) {
          constexpr int kVectors = decltype(width)::value;
          ForEachTileOfRows<RowsOfTile(kVectors)>(out, [&](int64_t r, auto tile_rows) {
            Accumulators<decltype(tile_rows)::value, kVectors> sum;
            float* const to = scratch + r * kBlockRows + v * kLanes;
            if (first == 0) {
              sum.Clear();
            } else {
              sum.Load(to, kBlockRows, m);
            }
            sum.template Multiply<Numbers>(depth, w + r * elements + first, elements, 1,
                                           block + v * kLanes, kBlockRows, m);
            sum.Store(to, kBlockRows, m);
          });
        });
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lanes = count - v * kLanes < kLanes ? count - v * kLanes : kLanes;
      for (int64_t o = 0; o < out; o += kLanes) {
        const int64_t width = out - o < kLanes ? out - o : kLanes;
        F16 tile[kLanes];
        for (int k = 0; k < kLanes; ++k) {
          tile[k] =
              k < width ? Load(scratch + (o + k) * kBlockRows + v * kLanes, All()) : F16(0.0f);
        }
        Transpose(tile);
        const Mask m = FirstLanes(width);
        for (int r = 0; r < lanes; ++r) {
          F16 value = tile[r];
          if (bias != nullptr) value = value + Load(bias + o, m);
          if (relu) value = Relu(value);
          Store(y + (row + v * kLanes + r) * out + o, value, m);
        }
      }
    }
  }
}

// A leaf has few rows, so that storing its sums until they are combined would cost much beside its
// products: two leaves that are combined at once both stay in registers.
template <class Numbers>
void WeightGradient(const LeafFold& fold, int64_t in, int64_t out, const int64_t* rows,
                    const float* const* x, const float* const* dy, float* const* dw) {
  using Tile = LeafTile<Numbers>;
  alignas(64) float waiting[kMostFoldBuffers][Tile::kRows * Tile::kVectors * kLanes];
  for (int64_t j = 0; j < in; j += Tile::kVectors * kLanes) {
    ForTileOfColumns<Tile::kVectors>(in - j, [&](auto vectors, auto m) {
      constexpr int64_t kStride = decltype(vectors)::value * kLanes;
      ForEachTileOfRows<Tile::kRows>(out, [&](int64_t r, auto tile_rows) {
        using Sums = Accumulators<decltype(tile_rows)::value, decltype(vectors)::value>;
        // A few lines a row, which those before do not foretell: they come while the tile is
        // computed.
        for (int row = 0; row < decltype(tile_rows)::value; ++row) {
          for (int v = 0; v < decltype(vectors)::value; ++v)
            __builtin_prefetch(dw[0] + (r + row) * in + j + v * kLanes, 1);
        }
        const FoldPair* combine = fold.combines;
        for (int leaf = 0; leaf < fold.leaves; ++leaf) {
          Sums sum;
          int current = fold.buffer[leaf], combines = fold.combine_count[leaf];
          if (Tile::kTwo && combines == 0 && leaf + 1 < fold.leaves &&
              fold.combine_count[leaf + 1] > 0) {
            Sums left;
            left.template Product<Numbers>(Numbers::Elements(rows[leaf]), dy[leaf] + r, out,
                                           x[leaf] + j, in, m);
            ++leaf;
            sum.template Product<Numbers>(Numbers::Elements(rows[leaf]), dy[leaf] + r, out,
                                          x[leaf] + j, in, m);
            sum.AddLeft(left);
            current = combine->left;
            combines = fold.combine_count[leaf] - 1;
            ++combine;
          } else {
            sum.template Product<Numbers>(Numbers::Elements(rows[leaf]), dy[leaf] + r, out,
                                          x[leaf] + j, in, m);
          }
          for (; combines > 0; --combines, ++combine) {
            sum.AddFromLeft(waiting[combine->left], kStride, All());
            current = combine->left;
          }
          if (leaf + 1 < fold.leaves || fold.parts > 1) {
            sum.Store(waiting[current], kStride, All());
          } else {
            sum.Store(dw[0] + r * in + j, in, m);
          }
        }
        if (fold.parts == 1) return;
        for (int part = 0; part < fold.parts; ++part) {
          Sums sum;
          sum.Load(waiting[fold.part_buffer[part]], kStride, All());
          sum.Store(dw[part] + r * in + j, in, m);
        }
      });
    });
  }
}

}  // namespace
}  // namespace lockstep::device::LOCKSTEP_ISA
