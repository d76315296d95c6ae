// dw of convolutions in bf16 on tensor cores: the product of dy and windows of x, over the places
// (row, oh, ow) of a leaf; what of them is fp32 in memory is rounded on its way to shared memory.
//
// Order, which is all that bits depend on: a leaf's places are cut into chunks by its rows and the
// shape, a chunk's places are summed in their order by as many groups of warps as the shape says,
// and chunks are added by SumChunks.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"
#include "worker/device/cuda/windows.h"

namespace lockstep::device::cuda {
namespace {

struct WeightGradient {
  int height, width, in, out;   // channels, of all groups
  int groups, own_in, own_out;  // of a group
  int kernel, stride, padding, dilation;
  int out_places;  // of a row
  int columns;     // taps and channels
  int shift;       // of the quads of a block of channels
  int out_tiles, column_tiles;
  bool wide, wide_result;             // x and dy; the result, by two
  int64_t leaf_stride, chunk_stride;  // of results, in floats
  Divisor by_width, by_height;        // of the output
};

// In a row of kPieces 16-byte pieces: as PieceAt, for rows of any length.
template <int kPieces>
__device__ __forceinline__ int PieceOf(int row, int piece) {
  if constexpr (kPieces % 8 == 0) return piece ^ (row & 7);
  if constexpr (kPieces % 8 == 4) return piece ^ (row >> 1 & 3);
  return piece ^ (row >> 2 & 1);
}

constexpr int kSpan = 128;  // places whose windows are looked up at once

// Of a place of the leaf, below `end`: its window's begin in x, in 64 bits, and the taps that are
// inside.
__device__ __forceinline__ int4 WindowOfPlace(const WeightGradient& s, int at, int end) {
  int4 place = make_int4(0, 0, 0, 0);
  if (at >= end) return place;
  uint32_t rest = static_cast<uint32_t>(at);
  const int from_x = static_cast<int>(s.by_width.TakeRemainder(rest)) * s.stride - s.padding;
  const int from_y = static_cast<int>(s.by_height.TakeRemainder(rest)) * s.stride - s.padding;
  const int64_t begin =
      ((static_cast<int64_t>(rest) * s.height + from_y) * s.width + from_x) * s.in;
  place.x = static_cast<int>(static_cast<uint32_t>(begin));
  place.y = static_cast<int>(begin >> 32);
  for (int tap = 0; tap < s.kernel; ++tap) {
    const int move = tap * s.dilation;
    if (static_cast<unsigned>(from_y + move) < static_cast<unsigned>(s.height)) {
      place.z |= 1 << tap;
    }
    if (static_cast<unsigned>(from_x + move) < static_cast<unsigned>(s.width)) {
      place.z |= 1 << (tap + 16);
    }
  }
  return place;
}
__device__ __forceinline__ int64_t BeginOf(const int4& window) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(window.y)) << 32 |
                              static_cast<uint32_t>(window.x));
}

// A column as its tap's bits, -1 where it is none, and its move in x and place in the result.
struct Column {
  int bits, move, at;
};
template <bool kFlat>
__device__ __forceinline__ Column ColumnOf(const WeightGradient& s, int column) {
  int tap, c;
  if constexpr (kFlat) {
    tap = column / s.own_in;
    c = column % s.own_in;
  } else {
    const int quad = column / 4, of_blocks = quad >> s.shift, taps = s.kernel * s.kernel;
    tap = of_blocks % taps;
    c = ((of_blocks / taps << s.shift) + (quad & ((1 << s.shift) - 1))) * 4 + column % 4;
  }
  const int y = tap / s.kernel, x = tap % s.kernel;
  if (column >= s.columns) return {-1, 0, -1};
  return {1 << y | 1 << (x + 16), (y * s.width + x) * s.dilation * s.in + c, tap * s.own_in + c};
}

// Writes two neighbouring sums where they belong, of the group's outs and columns.
template <bool kFlat>
__device__ __forceinline__ void WriteTwo(const WeightGradient& s, int group, int out, int column,
                                         float first_sum, float second_sum, float* results) {
  if (out >= s.own_out || column >= s.columns) return;
  float* const row = results + static_cast<int64_t>(group * s.own_out + out) * s.columns;
  float* const to = row + ColumnOf<kFlat>(s, column).at;
  if (!kFlat && s.wide_result) {
    *reinterpret_cast<float2*>(to) = make_float2(first_sum, second_sum);
    return;
  }
  *to = first_sum;
  if (column + 1 < s.columns) row[ColumnOf<kFlat>(s, column + 1).at] = second_sum;
}

// Writes a block's tile; several groups' sums are added in their order, through shared memory.
template <int kOut, int kColumns, int kDown, int kAcross, int kGroups, bool kFlat, int kTilesDown,
          int kTilesAcross2>
__device__ __forceinline__ void WriteTile(const WeightGradient& s, int group, int first_out,
                                          int first_column,
                                          const float (&sums)[kTilesDown][kTilesAcross2][4],
                                          float* results) {
  constexpr int kThreads = kDown * kAcross * kGroups * kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int warp_group = warp / (kDown * kAcross), member = warp % (kDown * kAcross);
  const int warp_down = member % kDown * (kOut / kDown);
  const int warp_across = member / kDown * (kColumns / kAcross);
  const auto write = [&](int own_out, int own_column, float first_sum, float second_sum) {
    WriteTwo<kFlat>(s, group, first_out + own_out, first_column + own_column, first_sum, second_sum,
                    results);
  };
  if constexpr (kGroups > 1) {
    // The groups' sums, added in their order.
    __syncthreads();  // behind the last products
    float2* const handed = SharedMemory<float2>();
#pragma unroll
    for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesAcross2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_down + i * 16 + half * 8 + lane / 4;
          const int pair = (warp_across + j * 8) / 2 + lane % 4;
          handed[(warp_group * kOut + row) * (kColumns / 2) + pair] =
              make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < kOut * kColumns / 2; i += kThreads) {
      float2 sum = handed[i];
#pragma unroll
      for (int g = 1; g < kGroups; ++g) {
        const float2 more = handed[g * kOut * kColumns / 2 + i];
        sum = make_float2(sum.x + more.x, sum.y + more.y);
      }
      write(i / (kColumns / 2), i % (kColumns / 2) * 2, sum.x, sum.y);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kTilesAcross2; ++j) {
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          write(warp_down + i * 16 + half * 8 + lane / 4, warp_across + j * 8 + lane % 4 * 2,
                sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }
}

// kDown x kAcross warps make the tile, kGroups such groups of them each in its places of a step.
template <int kOut, int kColumns, int kDown, int kAcross, int kGroups, int kDepths>
struct GradientTile {
  static constexpr int kThreads = kDown * kAcross * kGroups * kWarp;
  static constexpr int kPlaces = kGroups * kDepths * 16;  // of a step
  static constexpr int kSums = kOut * kColumns * kGroups / kThreads;
  static constexpr int kBlocks = kThreads > 128 || kSums >= 64 ? 2 : kSums >= 32 ? 3 : 4;
  static constexpr int kStage = kPlaces * (kOut + kColumns) * 2;
  static constexpr int kHanded = kGroups > 1 ? kGroups* kOut* kColumns * 4 : 0;
  static constexpr int kTable = std::max(2 * kStage, kHanded);  // where it begins
  static constexpr size_t kBytes = kTable + 2 * kSpan * sizeof(int4);
};

// A block makes kOut x kColumns of one chunk of a leaf. Columns are (block of channels, kh, kw,
// channel of the block), or where kFlat (kh, kw, channel).
template <class X, class Y, int kOut, int kColumns, int kDown, int kAcross, int kGroups,
          int kDepths, bool kFlat>
__global__ void __launch_bounds__(
    GradientTile<kOut, kColumns, kDown, kAcross, kGroups, kDepths>::kThreads,
    GradientTile<kOut, kColumns, kDown, kAcross, kGroups, kDepths>::kBlocks)
    MultiplyGradients(WeightGradient s, Chunks chunks, const X* __restrict__ x,
                      const Y* __restrict__ dy, float* __restrict__ results) {
  using Tile = GradientTile<kOut, kColumns, kDown, kAcross, kGroups, kDepths>;
  constexpr int kThreads = Tile::kThreads, kStage = Tile::kStage, kPlaces = Tile::kPlaces;
  constexpr int kColumnQuads = kColumns / 4, kOutQuads = kOut / 4;
  constexpr int kColumnApart = kThreads / kColumnQuads, kOutApart = kThreads / kOutQuads;
  constexpr int kColumnLoads = (kPlaces + kColumnApart - 1) / kColumnApart;
  constexpr int kOutLoads = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kTilesDown = kOut / kDown / 16, kTilesAcross = kColumns / kAcross / 16;
  static_assert(kThreads % kColumnQuads == 0 && kThreads % kOutQuads == 0 && kThreads >= 64 &&
                kSpan % kPlaces == 0 && kSpan / kPlaces >= 2);
  const int leaf = static_cast<int>(blockIdx.z), chunk = static_cast<int>(blockIdx.y);
  const int64_t first_row = chunks.begin[leaf];
  const int all = static_cast<int>(chunks.begin[leaf + 1] - first_row) * s.out_places;
  const int64_t first_of_chunk = int64_t{chunk} * chunks.places[leaf];
  if (chunk > 0 && first_of_chunk >= all) return;
  const int first = static_cast<int>(first_of_chunk);
  const int end = all - first < chunks.places[leaf] ? all : first + chunks.places[leaf];
  int tile = static_cast<int>(blockIdx.x);
  const int first_column = tile % s.column_tiles * kColumns;
  tile /= s.column_tiles;
  const int first_out = tile % s.out_tiles * kOut, group = tile / s.out_tiles;  // of the group
  x += first_row * s.height * s.width * s.in + group * s.own_in;
  dy += first_row * s.out_places * s.out + group * s.own_out;
  char* const shared = SharedMemory<char>();
  // By place: its window's begin in x, in 64 bits, and the taps that are inside.
  int4* const table = reinterpret_cast<int4*>(shared + Tile::kTable);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  const auto look_up = [&](int span) {
    for (int i = thread; i < kSpan; i += kThreads) {
      table[(span & 1) * kSpan + i] = WindowOfPlace(s, first + span * kSpan + i, end);
    }
  };
  const auto column_of = [&](int column) { return ColumnOf<kFlat>(s, column); };

  // What this thread loads: a quad of columns of some places of each step, and one of dy.
  constexpr int kElements = kFlat ? 4 : 1;
  const int column_place = thread / kColumnQuads, column_quad = thread % kColumnQuads;
  const int out_place = thread / kOutQuads, out_quad = thread % kOutQuads;
  int bits[kElements], moves[kElements];
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const Column column = column_of(first_column + column_quad * 4 + j);
    bits[j] = column.bits;
    moves[j] = column.move;
  }
  const int own_outs = s.own_out - (first_out + out_quad * 4);
  Four<X> next_x[kColumnLoads];
  Four<Y> next_dy[kOutLoads];
  const auto load_by = [&](auto is_wide, int step) {
    constexpr bool kWide = decltype(is_wide)::value;
    const int4* const windows = table + (step * kPlaces & (2 * kSpan - 1));
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int own = column_place + i * kColumnApart;
      if (kPlaces % kColumnApart != 0 && own >= kPlaces) continue;
      const int4 window = windows[own];
      const X* const from = x + BeginOf(window);
      if constexpr (kFlat) {
        next_x[i] = GatherFour<X>(
            [&](int j) { return (window.z & bits[j]) == bits[j] ? from + moves[j] : nullptr; });
      } else {
        next_x[i] = LoadStored<kWide>(from + moves[0], (window.z & bits[0]) == bits[0] ? 4 : 0);
      }
    }
    const int place = first + step * kPlaces + out_place;
    const Y* const from = dy + static_cast<int64_t>(place) * s.out + (first_out + out_quad * 4);
#pragma unroll
    for (int i = 0; i < kOutLoads; ++i) {
      if (kPlaces % kOutApart != 0 && out_place + i * kOutApart >= kPlaces) continue;
      next_dy[i] = LoadStored<kWide>(from + static_cast<int64_t>(i * kOutApart) * s.out,
                                     place + i * kOutApart < end ? own_outs : 0);
    }
  };
  const auto load = [&](int step) {
    if (s.wide) {
      load_by(std::true_type(), step);
    } else {
      load_by(std::false_type(), step);
    }
  };
  constexpr int kOutPieces = kOut / 8, kColumnPieces = kColumns / 8;
  const auto store = [&](char* stage) {
#pragma unroll
    for (int i = 0; i < kOutLoads; ++i) {
      const int row = out_place + i * kOutApart;
      if (kPlaces % kOutApart != 0 && row >= kPlaces) continue;
      char* const to = stage + row * kOut * 2 + PieceOf<kOutPieces>(row, out_quad / 2) * 16;
      *reinterpret_cast<uint2*>(to + out_quad % 2 * 8) = Bf16::Round(next_dy[i]);
    }
#pragma unroll
    for (int i = 0; i < kColumnLoads; ++i) {
      const int row = column_place + i * kColumnApart;
      if (kPlaces % kColumnApart != 0 && row >= kPlaces) continue;
      char* const to = stage + kPlaces * kOut * 2 + row * kColumns * 2 +
                       PieceOf<kColumnPieces>(row, column_quad / 2) * 16;
      *reinterpret_cast<uint2*>(to + column_quad % 2 * 8) = Bf16::Round(next_x[i]);
    }
  };

  const int warp_group = warp / (kDown * kAcross), member = warp % (kDown * kAcross);
  const int warp_down = member % kDown * (kOut / kDown);
  const int warp_across = member / kDown * (kColumns / kAcross);
  float sums[kTilesDown][2 * kTilesAcross][4] = {};
  const auto multiply = [&](const char* stage) {
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
      const int first_place = (warp_group * kDepths + depth) * 16;
      // Places go down in the tiles, so they are transposed on their way.
      const int down_row = first_place + lane / 16 * 8 + lane % 8;
      const int across_row = first_place + lane % 16;
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        const int piece = warp_down / 8 + i * 2 + lane / 8 % 2;
        down[i] = LoadMatricesTransposed(stage + down_row * kOut * 2 +
                                         PieceOf<kOutPieces>(down_row, piece) * 16);
      }
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        const int piece = warp_across / 8 + j * 2 + lane / 16;
        across[j] = LoadMatricesTransposed(stage + kPlaces * kOut * 2 + across_row * kColumns * 2 +
                                           PieceOf<kColumnPieces>(across_row, piece) * 16);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          MultiplyBf16(sums[i][2 * j], down[i], across[j].x, across[j].y);
          MultiplyBf16(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  constexpr int kStepsOfSpan = kSpan / kPlaces;
  if (steps > 0) {
    look_up(0);
    __syncthreads();
    load(0);
    store(shared);
    __syncthreads();
  }
  for (int step = 0; step < steps; ++step) {
    if ((step & (kStepsOfSpan - 1)) == 0) look_up(step / kStepsOfSpan + 1);
    if (step + 1 < steps) load(step + 1);
    multiply(shared + (step & 1) * kStage);
    if (step + 1 < steps) store(shared + ((step + 1) & 1) * kStage);
    __syncthreads();
  }

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
  WriteTile<kOut, kColumns, kDown, kAcross, kGroups, kFlat>(s, group, first_out, first_column, sums,
                                                            results);
}

template <class X, class Y, int kOut, int kColumns, int kDown, int kAcross, int kGroups,
          int kDepths, bool kFlat>
void LaunchGradients(const Queue& q, WeightGradient s, const Chunks& leaves, uint32_t chunks,
                     const X* x, const Y* dy, float* results) {
  using Tile = GradientTile<kOut, kColumns, kDown, kAcross, kGroups, kDepths>;
  const dim3 grid(static_cast<uint32_t>(s.groups * s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  Launch(q, grid, dim3(Tile::kThreads), Tile::kBytes,
         MultiplyGradients<X, Y, kOut, kColumns, kDown, kAcross, kGroups, kDepths, kFlat>, s,
         leaves, x, dy, results);
}

// ---- the same of x and dy that are both stored as bf16, with channels by eight: pieces of 16
// bytes go to shared memory as they are, in the background and some steps ahead. In the same order.

template <int kOut, int kColumns, int kDown, int kAcross, int kGroups>
struct StoredGradientTile {
  static constexpr int kThreads = kDown * kAcross * kGroups * kWarp;
  static constexpr int kPlaces = 32;  // of a step
  static constexpr int kStages = kOut * kColumns > 128 * 128 ? 3 : 4;
  static constexpr int kSums = kOut * kColumns * kGroups / kThreads;
  static constexpr int kBlocks = kSums >= 128                    ? 256 / kThreads
                                 : kThreads > 128 || kSums >= 64 ? 2
                                                                 : 4;
  static constexpr int kStage = kPlaces * (kOut + kColumns) * 2;
  static constexpr int kHanded = kGroups > 1 ? kGroups* kOut* kColumns * 4 : 0;
  static constexpr int kTable = std::max(kStages * kStage, kHanded);  // where it begins
  static constexpr size_t kBytes = kTable + 2 * kSpan * sizeof(int4);
  // A step that is copied is one of the present span of places, or of the next.
  static_assert(kStages <= kSpan / kPlaces);
};

template <int kOut, int kColumns, int kDown, int kAcross, int kGroups>
__global__ void __launch_bounds__(
    StoredGradientTile<kOut, kColumns, kDown, kAcross, kGroups>::kThreads,
    StoredGradientTile<kOut, kColumns, kDown, kAcross, kGroups>::kBlocks)
    MultiplyStoredGradients(WeightGradient s, Chunks chunks, const StoredBf16* __restrict__ x,
                            const StoredBf16* __restrict__ dy, float* __restrict__ results) {
  using Tile = StoredGradientTile<kOut, kColumns, kDown, kAcross, kGroups>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStages = Tile::kStages;
  constexpr int kColumnPieces = kColumns / 8, kOutPieces = kOut / 8;
  constexpr int kColumnApart = kThreads / kColumnPieces, kOutApart = kThreads / kOutPieces;
  constexpr int kColumnCopies = (kPlaces + kColumnApart - 1) / kColumnApart;
  constexpr int kOutCopies = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kTilesDown = kOut / kDown / 16, kTilesAcross = kColumns / kAcross / 16;
  constexpr int kDepths = kPlaces / kGroups / 16;
  static_assert(kThreads % kColumnPieces == 0 && kThreads % kOutPieces == 0);
  const int leaf = static_cast<int>(blockIdx.z), chunk = static_cast<int>(blockIdx.y);
  const int64_t first_row = chunks.begin[leaf];
  const int all = static_cast<int>(chunks.begin[leaf + 1] - first_row) * s.out_places;
  const int64_t first_of_chunk = int64_t{chunk} * chunks.places[leaf];
  if (chunk > 0 && first_of_chunk >= all) return;
  const int first = static_cast<int>(first_of_chunk);
  const int end = all - first < chunks.places[leaf] ? all : first + chunks.places[leaf];
  int tile = static_cast<int>(blockIdx.x);
  const int first_column = tile % s.column_tiles * kColumns;
  tile /= s.column_tiles;
  const int first_out = tile % s.out_tiles * kOut, group = tile / s.out_tiles;  // of the group
  x += first_row * s.height * s.width * s.in + group * s.own_in;
  dy += first_row * s.out_places * s.out + group * s.own_out;
  char* const shared = SharedMemory<char>();
  int4* const table = reinterpret_cast<int4*>(shared + Tile::kTable);  // WindowOfPlace
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const auto look_up = [&](int span) {
    for (int i = thread; i < kSpan; i += kThreads) {
      table[(span & 1) * kSpan + i] = WindowOfPlace(s, first + span * kSpan + i, end);
    }
  };

  // What this thread copies: a piece of columns of some places of each step, and one of dy.
  const int column_place = thread / kColumnPieces, column_piece = thread % kColumnPieces;
  const int out_place = thread / kOutPieces, out_piece = thread % kOutPieces;
  const Column column = ColumnOf<false>(s, first_column + column_piece * 8);
  const bool has_outs = first_out + out_piece * 8 < s.own_out;
  const StoredBf16* const from_x = x + column.move;
  const StoredBf16* const from_dy =
      dy + (static_cast<int64_t>(first + out_place) * s.out + first_out + out_piece * 8);
  const auto copy = [&](int step) {
    char* const stage = shared + step % kStages * Tile::kStage;
    const int4* const windows = table + (step * kPlaces & (2 * kSpan - 1));
#pragma unroll
    for (int i = 0; i < kOutCopies; ++i) {
      const int row = out_place + i * kOutApart, at = step * kPlaces + row;
      if (kPlaces % kOutApart != 0 && row >= kPlaces) continue;
      const bool inside = has_outs && first + at < end;
      const int64_t move = static_cast<int64_t>(step * kPlaces + i * kOutApart) * s.out;
      CopyOrZeroInBackground(stage + row * kOut * 2 + PieceOf<kOutPieces>(row, out_piece) * 16,
                             inside ? from_dy + move : dy, inside);
    }
#pragma unroll
    for (int i = 0; i < kColumnCopies; ++i) {
      const int row = column_place + i * kColumnApart;
      if (kPlaces % kColumnApart != 0 && row >= kPlaces) continue;
      const int4 window = windows[row];
      const bool inside = (window.z & column.bits) == column.bits;
      CopyOrZeroInBackground(stage + kPlaces * kOut * 2 + row * kColumns * 2 +
                                 PieceOf<kColumnPieces>(row, column_piece) * 16,
                             inside ? from_x + BeginOf(window) : x, inside);
    }
  };

  const int warp_group = warp / (kDown * kAcross), member = warp % (kDown * kAcross);
  const int warp_down = member % kDown * (kOut / kDown);
  const int warp_across = member / kDown * (kColumns / kAcross);
  float sums[kTilesDown][2 * kTilesAcross][4] = {};
  const auto multiply = [&](const char* stage) {
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
      const int first_place = (warp_group * kDepths + depth) * 16;
      // Places go down in the tiles, so they are transposed on their way.
      const int down_row = first_place + lane / 16 * 8 + lane % 8;
      const int across_row = first_place + lane % 16;
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        const int piece = warp_down / 8 + i * 2 + lane / 8 % 2;
        down[i] = LoadMatricesTransposed(stage + down_row * kOut * 2 +
                                         PieceOf<kOutPieces>(down_row, piece) * 16);
      }
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        const int piece = warp_across / 8 + j * 2 + lane / 16;
        across[j] = LoadMatricesTransposed(stage + kPlaces * kOut * 2 + across_row * kColumns * 2 +
                                           PieceOf<kColumnPieces>(across_row, piece) * 16);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          MultiplyBf16(sums[i][2 * j], down[i], across[j].x, across[j].y);
          MultiplyBf16(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  constexpr int kStepsOfSpan = kSpan / kPlaces;
  look_up(0);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step);
    CommitCopies();
  }
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    CommitCopies();
    if ((step & (kStepsOfSpan - 1)) == 0) look_up(step / kStepsOfSpan + 1);
    multiply(shared + step % kStages * Tile::kStage);
  }

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
  WriteTile<kOut, kColumns, kDown, kAcross, kGroups, false>(s, group, first_out, first_column, sums,
                                                            results);
}

template <int kOut, int kColumns, int kDown, int kAcross, int kGroups>
void LaunchStoredGradients(const Queue& q, WeightGradient s, const Chunks& leaves, uint32_t chunks,
                           const StoredBf16* x, const StoredBf16* dy, float* results) {
  using Tile = StoredGradientTile<kOut, kColumns, kDown, kAcross, kGroups>;
  s.column_tiles = static_cast<int>(CeilDiv(s.columns, kColumns));
  const dim3 grid(static_cast<uint32_t>(s.groups * s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  const auto kernel = MultiplyStoredGradients<kOut, kColumns, kDown, kAcross, kGroups>;
  AllowShared(kernel, Tile::kBytes);
  Launch(q, grid, dim3(Tile::kThreads), Tile::kBytes, kernel, s, leaves, x, dy, results);
}

// ---- dw of convolutions that keep the size, as y and dx of them: a ring of pixels round the
// present places is kept in shared memory, each loaded once, and every tap multiplies rows of it.

constexpr int kTapsOfTile = 9;

constexpr int PlacesOfGradientRun(int out_tile, int halves) {
  return out_tile * halves > 64 ? 64 : 32;
}
int64_t BytesOfGradientRun(int out_tile, int halves, int64_t ring) {
  const int places = PlacesOfGradientRun(out_tile, halves);
  return 2 * places * (out_tile * 2 + 4) + ring * halves * 32 + kRowBytes;
}

// Of a place of the leaf, below `end`.
__device__ __forceinline__ int TapsInside(const WeightGradient& s, int place, int end) {
  int inside = 0;
  if (place >= end) return inside;
  uint32_t rest = static_cast<uint32_t>(place);
  const int from_x = static_cast<int>(s.by_width.TakeRemainder(rest)) - s.padding;
  const int from_y = static_cast<int>(s.by_height.TakeRemainder(rest)) - s.padding;
  for (int t = 0; t < s.kernel; ++t) {
    const int move = t * s.dilation;
    if (static_cast<unsigned>(from_y + move) < static_cast<unsigned>(s.height)) inside |= 1 << t;
    if (static_cast<unsigned>(from_x + move) < static_cast<unsigned>(s.width)) {
      inside |= 1 << (t + 16);
    }
  }
  return inside;
}

// Writes a warp's sums of a tap.
template <int kTilesDown, int kAcross>
__device__ __forceinline__ void WriteTap(const WeightGradient& s, int group, int first_out, int tap,
                                         int first_channel,
                                         const float (&sums)[kTilesDown][kAcross][4],
                                         float* results) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int out = first_out + i * 16 + half * 8 + lane / 4;
      if (out >= s.own_out) continue;
      float* const to = results + static_cast<int64_t>(group * s.own_out + out) * s.columns +
                        tap * s.own_in + first_channel + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const float* const v = sums[i][j] + 2 * half;
        if (s.wide_result) {
          *reinterpret_cast<float2*>(to + j * 8) = make_float2(v[0], v[1]);
        } else {
          to[j * 8] = v[0];
          to[j * 8 + 1] = v[1];
        }
      }
    }
  }
}

// A warp makes kOut x kHalves * 16 channels of one tap.
template <int kOut, int kHalves>
struct GradientRunTile {
  static constexpr int kThreads = kTapsOfTile * kWarp;
  static constexpr int kPlaces = PlacesOfGradientRun(kOut, kHalves);  // of a step
  static constexpr int kBlocks = kOut * kHalves > 64 ? 1 : 2;         // of a multiprocessor
  static constexpr int kStage = kPlaces * kOut * 2;
  static constexpr int kPixelBytes = kHalves * 32;
  static constexpr int kRingAt = 2 * kStage;
};

template <class X, class Y, int kOut, int kHalves>
__global__ void __launch_bounds__(GradientRunTile<kOut, kHalves>::kThreads,
                                  GradientRunTile<kOut, kHalves>::kBlocks)
    MultiplyGradientRuns(WeightGradient s, Chunks chunks, int ring, const X* __restrict__ x,
                         const Y* __restrict__ dy, float* __restrict__ results) {
  using Tile = GradientRunTile<kOut, kHalves>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelQuads = kHalves * 4, kOutQuads = kOut / 4, kOutPieces = kOut / 8;
  constexpr int kOutApart = kThreads / kOutQuads;
  constexpr int kOutLoads = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kPixelLoads = (kPlaces * kPixelQuads + kThreads - 1) / kThreads;
  constexpr int kTilesDown = kOut / 16;
  const int leaf = static_cast<int>(blockIdx.z), chunk = static_cast<int>(blockIdx.y);
  const int64_t first_row = chunks.begin[leaf];
  const int all = static_cast<int>(chunks.begin[leaf + 1] - first_row) * s.out_places;
  const int64_t first_of_chunk = int64_t{chunk} * chunks.places[leaf];
  if (chunk > 0 && first_of_chunk >= all) return;
  const int first = static_cast<int>(first_of_chunk);
  const int end = all - first < chunks.places[leaf] ? all : first + chunks.places[leaf];
  const int taps = s.kernel * s.kernel;
  const int tap_tiles = (taps + kTapsOfTile - 1) / kTapsOfTile;
  int tile = static_cast<int>(blockIdx.x);
  const int first_tap = tile % tap_tiles * kTapsOfTile;
  tile /= tap_tiles;
  const int channel_tiles = s.column_tiles / tap_tiles;
  const int first_channel = tile % channel_tiles * (kHalves * 16);
  tile /= channel_tiles;
  const int first_out = tile % s.out_tiles * kOut, group = tile / s.out_tiles;  // of the group
  x += first_row * s.out_places * s.in + group * s.own_in + first_channel;
  dy += first_row * s.out_places * s.out + group * s.own_out + first_out;
  const int reach = s.padding * (s.width + 1);  // pixels in front of the first place

  char* const shared = SharedMemory<char>();
  const int zeros_at = Tile::kRingAt + ring * Tile::kPixelBytes;
  int* const inside_of = reinterpret_cast<int*>(shared + zeros_at + kRowBytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int tap = first_tap + warp, tap_y = tap / s.kernel, tap_x = tap % s.kernel;
  const int bits = 1 << tap_y | 1 << (tap_x + 16);

  // Pixels of the run, from 0, which is `reach` in front of the chunk's first place.
  const auto load_pixel = [&](auto is_wide, int pixel, int quad) {
    const int at = first - reach + pixel;
    const bool inside = static_cast<unsigned>(at) < static_cast<unsigned>(all);
    const X* const from = x + (static_cast<int64_t>(at) * s.in + quad * 4);
    return LoadStored<decltype(is_wide)::value>(from, inside ? 4 : 0);
  };
  // Eight pixels of one piece, wherever they begin, are in different banks.
  const auto at_pixel = [&](int pixel, int piece) {
    pixel &= ring - 1;
    const int turned = kHalves == 2 ? piece ^ (pixel >> 1 & 3) : piece ^ (pixel >> 2 & 1);
    return Tile::kRingAt + pixel * Tile::kPixelBytes + turned * 16;
  };
  const auto store_pixel = [&](int pixel, int quad, Four<X> v) {
    *reinterpret_cast<uint2*>(shared + at_pixel(pixel, quad / 2) + quad % 2 * 8) = Bf16::Round(v);
  };
  // The taps that are inside of the input, of a place of a step.
  const auto look_up = [&](int step, int own) {
    inside_of[(step & 1) * kPlaces + own] = TapsInside(s, first + step * kPlaces + own, end);
  };
  const int out_place = thread / kOutQuads, out_quad = thread % kOutQuads;
  const int own_outs = s.own_out - (first_out + out_quad * 4);
  Four<Y> next_dy[kOutLoads];
  const auto load_dy = [&](auto is_wide, int step) {
    const int place = first + step * kPlaces + out_place;
    const Y* const from = dy + (static_cast<int64_t>(place) * s.out + out_quad * 4);
#pragma unroll
    for (int i = 0; i < kOutLoads; ++i) {
      const int count =
          out_place + i * kOutApart < kPlaces && place + i * kOutApart < end ? own_outs : 0;
      next_dy[i] = LoadStored<decltype(is_wide)::value>(
          from + static_cast<int64_t>(i * kOutApart) * s.out, count);
    }
  };
  const auto store_dy = [&](int step) {
#pragma unroll
    for (int i = 0; i < kOutLoads; ++i) {
      const int row = out_place + i * kOutApart;
      if (row >= kPlaces) continue;
      char* const to = shared + (step & 1) * kStage + row * kOut * 2 +
                       PieceOf<kOutPieces>(row, out_quad / 2) * 16;
      *reinterpret_cast<uint2*>(to + out_quad % 2 * 8) = Bf16::Round(next_dy[i]);
    }
  };

  float sums[kTilesDown][2 * kHalves][4] = {};
  const int move = tap_y * s.dilation * s.width + tap_x * s.dilation;  // from the window's begin
  const auto multiply = [&](int step) {
#pragma unroll
    for (int depth = 0; depth < kPlaces / 16; ++depth) {
      // Places go down in the tiles, so they are transposed on their way.
      const int down_row = depth * 16 + lane / 16 * 8 + lane % 8, place = depth * 16 + lane % 16;
      uint4 down[kTilesDown], across[kHalves];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        down[i] = LoadMatricesTransposed(shared + (step & 1) * kStage + down_row * kOut * 2 +
                                         PieceOf<kOutPieces>(down_row, i * 2 + lane / 8 % 2) * 16);
      }
      const bool inside = (inside_of[(step & 1) * kPlaces + place] & bits) == bits;
      const int at =
          inside ? at_pixel(step * kPlaces + place + move, lane / 16) : zeros_at + lane / 16 * 16;
#pragma unroll
      for (int j = 0; j < kHalves; ++j) {
        across[j] = LoadMatricesTransposed(shared + (at ^ j * 32));
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kHalves; ++j) {
          MultiplyBf16(sums[i][2 * j], down[i], across[j].x, across[j].y);
          MultiplyBf16(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  const int ahead =
      2 * reach;  // of a step's first place, of the pixels that it is the last to need
  const auto look_up_all = [&](int step) {
    if (warp < kTapsOfTile - kPlaces / kWarp) return;  // the last warps, which load least
    look_up(step, thread - (kThreads - kPlaces));
  };
  constexpr int kStepQuads = kPlaces * kPixelQuads;
  Four<X> next[kPixelLoads];
  const auto load = [&](auto is_wide, int step) {
    load_dy(is_wide, step);
#pragma unroll
    for (int i = 0; i < kPixelLoads; ++i) {
      const unsigned index = static_cast<unsigned>(thread + i * kThreads);
      if (kStepQuads % kThreads != 0 && index >= kStepQuads) continue;
      next[i] = load_pixel(is_wide, step * kPlaces + ahead + static_cast<int>(index / kPixelQuads),
                           static_cast<int>(index % kPixelQuads));
    }
  };
  const auto store = [&](int step) {
    store_dy(step);
#pragma unroll
    for (int i = 0; i < kPixelLoads; ++i) {
      const unsigned index = static_cast<unsigned>(thread + i * kThreads);
      if (kStepQuads % kThreads != 0 && index >= kStepQuads) continue;
      store_pixel(step * kPlaces + ahead + static_cast<int>(index / kPixelQuads),
                  static_cast<int>(index % kPixelQuads), next[i]);
    }
  };
  const auto load_as_it_lies = [&](int step) {
    if (s.wide) {
      load(std::true_type(), step);
    } else {
      load(std::false_type(), step);
    }
  };
  if (steps > 0) {
    load_as_it_lies(0);
    look_up_all(0);
    if (thread < kRowBytes / 4) reinterpret_cast<int*>(shared + zeros_at)[thread] = 0;
#pragma unroll 4
    for (int i = thread; i < ahead * kPixelQuads; i += kThreads) {
      const int pixel = i / kPixelQuads, quad = i % kPixelQuads;
      store_pixel(pixel, quad,
                  s.wide ? load_pixel(std::true_type(), pixel, quad)
                         : load_pixel(std::false_type(), pixel, quad));
    }
    store(0);
    __syncthreads();
  }
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load_as_it_lies(step + 1);
      look_up_all(step + 1);
    }
    if (tap < taps) multiply(step);
    if (step + 1 < steps) store(step + 1);
    __syncthreads();
  }

  if (tap >= taps) return;
  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
  WriteTap(s, group, first_out, tap, first_channel, sums, results);
}

// The same of x and dy that are both stored as bf16, with outs by eight: pieces of 16 bytes go
// there as they are, in the background and some steps ahead. In the same order.
constexpr int kRunStages = 4;
int64_t BytesOfStoredRun(int out_tile, int halves, int64_t ring) {
  const int places = PlacesOfGradientRun(out_tile, halves);
  return kRunStages * places * out_tile * 2 + ring * halves * 32 + kRowBytes + 2 * places * 4;
}
// Pixels of its ring: those of the steps that are there or on their way.
int StoredRingOf(const Conv2dShape& s, int places) {
  int64_t ring = 128;
  while (ring < 2 * s.padding * (s.width + 1) + kRunStages * places && ring < (1 << 20)) ring *= 2;
  return static_cast<int>(ring);
}

template <int kOut, int kHalves>
__global__ void __launch_bounds__(GradientRunTile<kOut, kHalves>::kThreads,
                                  GradientRunTile<kOut, kHalves>::kBlocks)
    MultiplyStoredGradientRuns(WeightGradient s, Chunks chunks, int ring,
                               const StoredBf16* __restrict__ x, const StoredBf16* __restrict__ dy,
                               float* __restrict__ results) {
  using Tile = GradientRunTile<kOut, kHalves>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelPieces = kHalves * 2, kOutPieces = kOut / 8;
  constexpr int kOutCopies = (kPlaces * kOutPieces + kThreads - 1) / kThreads;
  constexpr int kPixelCopies = (kPlaces * kPixelPieces + kThreads - 1) / kThreads;
  constexpr int kTilesDown = kOut / 16, kRingAt = kRunStages * kStage;
  const int leaf = static_cast<int>(blockIdx.z), chunk = static_cast<int>(blockIdx.y);
  const int64_t first_row = chunks.begin[leaf];
  const int all = static_cast<int>(chunks.begin[leaf + 1] - first_row) * s.out_places;
  const int64_t first_of_chunk = int64_t{chunk} * chunks.places[leaf];
  if (chunk > 0 && first_of_chunk >= all) return;
  const int first = static_cast<int>(first_of_chunk);
  const int end = all - first < chunks.places[leaf] ? all : first + chunks.places[leaf];
  const int taps = s.kernel * s.kernel;
  const int tap_tiles = (taps + kTapsOfTile - 1) / kTapsOfTile;
  int tile = static_cast<int>(blockIdx.x);
  const int first_tap = tile % tap_tiles * kTapsOfTile;
  tile /= tap_tiles;
  const int channel_tiles = s.column_tiles / tap_tiles;
  const int first_channel = tile % channel_tiles * (kHalves * 16);
  tile /= channel_tiles;
  const int first_out = tile % s.out_tiles * kOut, group = tile / s.out_tiles;  // of the group
  x += first_row * s.out_places * s.in + group * s.own_in + first_channel;
  dy += first_row * s.out_places * s.out + group * s.own_out + first_out;
  const int reach = s.padding * (s.width + 1);  // pixels in front of the first place

  char* const shared = SharedMemory<char>();
  const int zeros_at = kRingAt + ring * Tile::kPixelBytes;
  int* const inside_of = reinterpret_cast<int*>(shared + zeros_at + kRowBytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int tap = first_tap + warp, tap_y = tap / s.kernel, tap_x = tap % s.kernel;
  const int bits = 1 << tap_y | 1 << (tap_x + 16);

  // Eight pixels of one piece, wherever they begin, are in different banks.
  const auto at_pixel = [&](int pixel, int piece) {
    pixel &= ring - 1;
    const int turned = kHalves == 2 ? piece ^ (pixel >> 1 & 3) : piece ^ (pixel >> 2 & 1);
    return kRingAt + pixel * Tile::kPixelBytes + turned * 16;
  };
  // Pixels of the run, from 0, which is `reach` in front of the chunk's first place.
  const auto copy_pixel = [&](int pixel, int piece) {
    const int at = first - reach + pixel;
    const bool inside = static_cast<unsigned>(at) < static_cast<unsigned>(all);
    CopyOrZeroInBackground(shared + at_pixel(pixel, piece),
                           x + (inside ? static_cast<int64_t>(at) * s.in + piece * 8 : 0), inside);
  };
  const int ahead =
      2 * reach;  // of a step's first place, of the pixels that it is the last to need
  const auto copy = [&](int step) {
#pragma unroll
    for (int i = 0; i < kOutCopies; ++i) {
      const int index = thread + i * kThreads;
      if (kPlaces * kOutPieces % kThreads != 0 && index >= kPlaces * kOutPieces) continue;
      const int row = index / kOutPieces, piece = index % kOutPieces;
      const int place = first + step * kPlaces + row;
      const bool inside = place < end && first_out + piece * 8 < s.own_out;
      CopyOrZeroInBackground(shared + (step & (kRunStages - 1)) * kStage + row * kOut * 2 +
                                 PieceOf<kOutPieces>(row, piece) * 16,
                             dy + (inside ? static_cast<int64_t>(place) * s.out + piece * 8 : 0),
                             inside);
    }
#pragma unroll
    for (int i = 0; i < kPixelCopies; ++i) {
      const int index = thread + i * kThreads;
      if (kPlaces * kPixelPieces % kThreads != 0 && index >= kPlaces * kPixelPieces) continue;
      copy_pixel(step * kPlaces + ahead + index / kPixelPieces, index % kPixelPieces);
    }
  };
  const auto look_up = [&](int step) {
    if (warp < kTapsOfTile - kPlaces / kWarp) return;  // the last warps, which copy least
    const int own = thread - (kThreads - kPlaces);
    inside_of[(step & 1) * kPlaces + own] = TapsInside(s, first + step * kPlaces + own, end);
  };

  float sums[kTilesDown][2 * kHalves][4] = {};
  const int move = tap_y * s.dilation * s.width + tap_x * s.dilation;  // from the window's begin
  const auto multiply = [&](int step) {
    const char* const stage = shared + (step & (kRunStages - 1)) * kStage;
#pragma unroll
    for (int depth = 0; depth < kPlaces / 16; ++depth) {
      // Places go down in the tiles, so they are transposed on their way.
      const int down_row = depth * 16 + lane / 16 * 8 + lane % 8, place = depth * 16 + lane % 16;
      uint4 down[kTilesDown], across[kHalves];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        down[i] = LoadMatricesTransposed(stage + down_row * kOut * 2 +
                                         PieceOf<kOutPieces>(down_row, i * 2 + lane / 8 % 2) * 16);
      }
      const bool inside = (inside_of[(step & 1) * kPlaces + place] & bits) == bits;
      const int at =
          inside ? at_pixel(step * kPlaces + place + move, lane / 16) : zeros_at + lane / 16 * 16;
#pragma unroll
      for (int j = 0; j < kHalves; ++j) {
        across[j] = LoadMatricesTransposed(shared + (at ^ j * 32));
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kHalves; ++j) {
          MultiplyBf16(sums[i][2 * j], down[i], across[j].x, across[j].y);
          MultiplyBf16(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  for (int i = thread; i < ahead * kPixelPieces; i += kThreads) {
    copy_pixel(i / kPixelPieces, i % kPixelPieces);
  }
  look_up(0);
  if (thread < kRowBytes / 4) reinterpret_cast<int*>(shared + zeros_at)[thread] = 0;
#pragma unroll
  for (int step = 0; step < kRunStages - 1; ++step) {
    if (step < steps) copy(step);
    CommitCopies();
  }
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kRunStages - 2>();
    __syncthreads();
    if (step + kRunStages - 1 < steps) copy(step + kRunStages - 1);
    CommitCopies();
    if (step + 1 < steps) look_up(step + 1);
    if (tap < taps) multiply(step);
  }
  if (steps == 0) WaitForCopies();  // of pixels that nothing needed

  if (tap >= taps) return;
  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
  WriteTap(s, group, first_out, tap, first_channel, sums, results);
}

// Pixels of the ring: those of the present step and the next, of at most 64 places.
int RingOf(const Conv2dShape& s) {
  int64_t ring = 128;
  while (ring < 2 * s.padding * (s.width + 1) + 128 && ring < (1 << 20)) ring *= 2;
  return static_cast<int>(ring);
}
bool KeepsSize(const Conv2dShape& s) {
  return s.stride == 1 && s.kernel > 1 && 2 * s.padding == s.extent() - 1;
}

template <class X, class Y, int kOut, int kHalves>
void LaunchGradientRuns(const Queue& q, const WeightGradient& s, const Chunks& leaves,
                        uint32_t chunks, int ring, const X* x, const Y* dy, float* results) {
  using Tile = GradientRunTile<kOut, kHalves>;
  const dim3 grid(static_cast<uint32_t>(s.groups * s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  Launch(q, grid, dim3(Tile::kThreads),
         static_cast<size_t>(BytesOfGradientRun(kOut, kHalves, ring)),
         MultiplyGradientRuns<X, Y, kOut, kHalves>, s, leaves, ring, x, dy, results);
}

// The same of 3 x 3 taps and many outs: two by six warps, or one by six, each of which makes 64
// outs by three halves of the 32 channels of taps, so that as much is multiplied for what is loaded
// from shared memory as there are registers for.
template <int kOut>
struct NineTapsTile {
  static constexpr int kDown = kOut / 64, kAcross = 6;
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kPlaces = 64;         // of a step
  static constexpr int kBlocks = 2 / kDown;  // of a multiprocessor
  static constexpr int kStage = kPlaces * kOut * 2;
  static constexpr int kPixelBytes = 64;
  static constexpr int kRingAt = kRunStages * kStage;
  static int64_t bytes(int64_t ring) {
    return kRingAt + ring * kPixelBytes + kRowBytes + 2 * kPlaces * 4;
  }
};

template <int kOut>
__global__ void __launch_bounds__(NineTapsTile<kOut>::kThreads, NineTapsTile<kOut>::kBlocks)
    MultiplyNineTaps(WeightGradient s, Chunks chunks, int ring, const StoredBf16* __restrict__ x,
                     const StoredBf16* __restrict__ dy, float* __restrict__ results) {
  using Tile = NineTapsTile<kOut>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelPieces = 4, kOutPieces = kOut / 8, kTilesDown = 4, kTilesAcross = 3;
  constexpr int kOutCopies = (kPlaces * kOutPieces + kThreads - 1) / kThreads;
  constexpr int kPixelCopies = (kPlaces * kPixelPieces + kThreads - 1) / kThreads;
  const int leaf = static_cast<int>(blockIdx.z), chunk = static_cast<int>(blockIdx.y);
  const int64_t first_row = chunks.begin[leaf];
  const int all = static_cast<int>(chunks.begin[leaf + 1] - first_row) * s.out_places;
  const int64_t first_of_chunk = int64_t{chunk} * chunks.places[leaf];
  if (chunk > 0 && first_of_chunk >= all) return;
  const int first = static_cast<int>(first_of_chunk);
  const int end = all - first < chunks.places[leaf] ? all : first + chunks.places[leaf];
  int tile = static_cast<int>(blockIdx.x);
  const int first_channel = tile % s.column_tiles * 32;
  tile /= s.column_tiles;
  const int first_out = tile % s.out_tiles * kOut, group = tile / s.out_tiles;  // of the group
  x += first_row * s.out_places * s.in + group * s.own_in + first_channel;
  dy += first_row * s.out_places * s.out + group * s.own_out + first_out;
  const int reach = s.padding * (s.width + 1);  // pixels in front of the first place

  char* const shared = SharedMemory<char>();
  const int zeros_at = Tile::kRingAt + ring * Tile::kPixelBytes;
  int* const inside_of = reinterpret_cast<int*>(shared + zeros_at + kRowBytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  // Eight pixels of one piece, wherever they begin, are in different banks.
  const auto at_pixel = [&](int pixel, int piece) {
    pixel &= ring - 1;
    return Tile::kRingAt + pixel * Tile::kPixelBytes + (piece ^ (pixel >> 1 & 3)) * 16;
  };
  // Pixels of the run, from 0, which is `reach` in front of the chunk's first place.
  const auto copy_pixel = [&](int pixel, int piece) {
    const int at = first - reach + pixel;
    const bool inside = static_cast<unsigned>(at) < static_cast<unsigned>(all);
    CopyOrZeroInBackground(shared + at_pixel(pixel, piece),
                           x + (inside ? static_cast<int64_t>(at) * s.in + piece * 8 : 0), inside);
  };
  const int ahead =
      2 * reach;  // of a step's first place, of the pixels that it is the last to need
  const auto copy = [&](int step) {
    char* const stage = shared + (step & (kRunStages - 1)) * kStage;
#pragma unroll
    for (int i = 0; i < kOutCopies; ++i) {
      const int index = thread + i * kThreads;
      if (kPlaces * kOutPieces % kThreads != 0 && index >= kPlaces * kOutPieces) continue;
      const int row = index / kOutPieces, piece = index % kOutPieces;
      const int place = first + step * kPlaces + row;
      const bool inside = place < end && first_out + piece * 8 < s.own_out;
      CopyOrZeroInBackground(stage + row * kOut * 2 + PieceOf<kOutPieces>(row, piece) * 16,
                             dy + (inside ? static_cast<int64_t>(place) * s.out + piece * 8 : 0),
                             inside);
    }
#pragma unroll
    for (int i = 0; i < kPixelCopies; ++i) {
      const int index = thread + i * kThreads;
      if (kPlaces * kPixelPieces % kThreads != 0 && index >= kPlaces * kPixelPieces) continue;
      copy_pixel(step * kPlaces + ahead + index / kPixelPieces, index % kPixelPieces);
    }
  };
  const auto look_up = [&](int step) {
    const int own = thread - (kThreads - kPlaces);
    if (own < 0) return;
    inside_of[(step & 1) * kPlaces + own] = TapsInside(s, first + step * kPlaces + own, end);
  };

  // This warp's outs, and its halves of taps: their bits, moves from the window's begin, and the
  // pieces that this lane names to the instruction that loads.
  const int warp_down = warp % Tile::kDown * 64;
  const int first_half = warp / Tile::kDown * kTilesAcross;
  int bits[kTilesAcross], moves[kTilesAcross], pieces[kTilesAcross];
#pragma unroll
  for (int j = 0; j < kTilesAcross; ++j) {
    const int tap = (first_half + j) / 2, y = tap / 3, x_of = tap % 3;
    bits[j] = 1 << y | 1 << (x_of + 16);
    moves[j] = (y * s.width + x_of) * s.dilation;
    pieces[j] = (first_half + j) % 2 * 2 + lane / 16;
  }
  float sums[kTilesDown][2 * kTilesAcross][4] = {};
  // Places go down in the tiles, so they are transposed on their way.
  const int down_row = lane / 16 * 8 + lane % 8;
  const int down_at =
      down_row * kOut * 2 + PieceOf<kOutPieces>(down_row, warp_down / 8 + lane / 8 % 2) * 16;
  const auto multiply = [&](int step) {
    const char* const stage = shared + (step & (kRunStages - 1)) * kStage;
#pragma unroll 1  // for the registers
    for (int depth = 0; depth < kPlaces / 16; ++depth) {
      const int place = depth * 16 + lane % 16;
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        down[i] = LoadMatricesTransposed(stage + depth * (16 * kOut * 2) + (down_at ^ i * 32));
      }
      const int inside = inside_of[(step & 1) * kPlaces + place];
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        const int at = (inside & bits[j]) == bits[j]
                           ? at_pixel(step * kPlaces + place + moves[j], pieces[j])
                           : zeros_at + lane / 16 * 16;
        across[j] = LoadMatricesTransposed(shared + at);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          MultiplyBf16(sums[i][2 * j], down[i], across[j].x, across[j].y);
          MultiplyBf16(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  for (int i = thread; i < ahead * kPixelPieces; i += kThreads) {
    copy_pixel(i / kPixelPieces, i % kPixelPieces);
  }
  look_up(0);
  if (thread < kRowBytes / 4) reinterpret_cast<int*>(shared + zeros_at)[thread] = 0;
#pragma unroll
  for (int step = 0; step < kRunStages - 1; ++step) {
    if (step < steps) copy(step);
    CommitCopies();
  }
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kRunStages - 2>();
    __syncthreads();
    if (step + kRunStages - 1 < steps) copy(step + kRunStages - 1);
    CommitCopies();
    if (step + 1 < steps) look_up(step + 1);
    multiply(step);
  }
  if (steps == 0) WaitForCopies();  // of pixels that nothing needed

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
#pragma unroll
  for (int j = 0; j < kTilesAcross; ++j) {
    float own[kTilesDown][2][4];
#pragma unroll
    for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
      for (int v = 0; v < 8; ++v) own[i][v / 4][v % 4] = sums[i][2 * j + v / 4][v % 4];
    }
    WriteTap(s, group, first_out + warp_down, (first_half + j) / 2,
             first_channel + (first_half + j) % 2 * 16, own, results);
  }
}

template <int kOut, int kHalves>
void LaunchStoredRuns(const Queue& q, const WeightGradient& s, const Chunks& leaves,
                      uint32_t chunks, int ring, const StoredBf16* x, const StoredBf16* dy,
                      float* results) {
  using Tile = GradientRunTile<kOut, kHalves>;
  const dim3 grid(static_cast<uint32_t>(s.groups * s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  const auto kernel = MultiplyStoredGradientRuns<kOut, kHalves>;
  const auto bytes = static_cast<size_t>(BytesOfStoredRun(kOut, kHalves, ring));
  AllowShared(kernel, bytes);
  Launch(q, grid, dim3(Tile::kThreads), bytes, kernel, s, leaves, ring, x, dy, results);
}

template <int kOut>
void LaunchNineTaps(const Queue& q, WeightGradient s, const Chunks& leaves, uint32_t chunks,
                    int ring, const StoredBf16* x, const StoredBf16* dy, float* results) {
  using Tile = NineTapsTile<kOut>;
  s.out_tiles = static_cast<int>(CeilDiv(s.own_out, kOut));
  const dim3 grid(static_cast<uint32_t>(s.groups * s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  const auto kernel = MultiplyNineTaps<kOut>;
  const auto bytes = static_cast<size_t>(Tile::bytes(ring));
  AllowShared(kernel, bytes);
  Launch(q, grid, dim3(Tile::kThreads), bytes, kernel, s, leaves, ring, x, dy, results);
}

// The tile of a shape and what launches it.
template <class X, class Y>
struct GradientPlan {
  int out_tile, column_tile;
  void (*launch)(const Queue&, WeightGradient, const Chunks&, uint32_t, const X*, const Y*, float*);
  // Where both are stored as bf16, by pieces, of the same tile.
  void (*launch_stored)(const Queue&, WeightGradient, const Chunks&, uint32_t, const StoredBf16*,
                        const StoredBf16*, float*) = nullptr;
};
template <class X, class Y>
GradientPlan<X, Y> PlanOf(int64_t outs, int64_t columns, bool flat) {
  const int out_tile = std::min(FeaturesOfTile(outs), flat ? 64 : 128);
  if (flat) {
    if (columns <= 32) {
      return {out_tile, 32,
              out_tile == 16   ? LaunchGradients<X, Y, 16, 32, 1, 1, 4, 1, true>
              : out_tile == 32 ? LaunchGradients<X, Y, 32, 32, 1, 1, 4, 1, true>
                               : LaunchGradients<X, Y, 64, 32, 2, 1, 2, 1, true>};
    }
    return {out_tile, 160,
            out_tile == 16   ? LaunchGradients<X, Y, 16, 160, 1, 5, 1, 2, true>
            : out_tile == 32 ? LaunchGradients<X, Y, 32, 160, 1, 5, 1, 2, true>
                             : LaunchGradients<X, Y, 64, 160, 1, 5, 1, 1, true>};
  }
  // As for features: the fewest columns to spare, then the widest.
  const int64_t narrow = RoundUp(columns, 64);
  if (out_tile <= 32 && RoundUp(columns, 144) <= narrow) {
    return {out_tile, 144,
            out_tile == 16 ? LaunchGradients<X, Y, 16, 144, 1, 9, 1, 2, false>
                           : LaunchGradients<X, Y, 32, 144, 1, 9, 1, 2, false>,
            out_tile == 16 ? LaunchStoredGradients<16, 144, 1, 9, 1>
                           : LaunchStoredGradients<32, 144, 1, 9, 1>};
  }
  if (columns <= 256 && RoundUp(columns, 128) > narrow) {
    return {out_tile, 64,
            out_tile == 16   ? LaunchGradients<X, Y, 16, 64, 1, 2, 2, 1, false>
            : out_tile == 32 ? LaunchGradients<X, Y, 32, 64, 1, 2, 2, 1, false>
            : out_tile == 64 ? LaunchGradients<X, Y, 64, 64, 2, 2, 1, 2, false>
                             : LaunchGradients<X, Y, 128, 64, 2, 2, 1, 2, false>,
            out_tile == 16   ? LaunchStoredGradients<16, 64, 1, 2, 2>
            : out_tile == 32 ? LaunchStoredGradients<32, 64, 1, 2, 2>
            : out_tile == 64 ? LaunchStoredGradients<64, 64, 2, 2, 1>
                             : LaunchStoredGradients<128, 64, 2, 2, 1>};
  }
  return {out_tile, 128,
          out_tile == 16   ? LaunchGradients<X, Y, 16, 128, 1, 4, 1, 2, false>
          : out_tile == 32 ? LaunchGradients<X, Y, 32, 128, 1, 4, 1, 2, false>
          : out_tile == 64 ? LaunchGradients<X, Y, 64, 128, 2, 2, 1, 2, false>
                           : LaunchGradients<X, Y, 128, 128, 2, 2, 1, 1, false>,
          out_tile == 16   ? LaunchStoredGradients<16, 128, 1, 4, 1>
          : out_tile == 32 ? LaunchStoredGradients<32, 128, 1, 4, 1>
          : out_tile == 64 ? LaunchStoredGradients<64, 128, 2, 2, 1>
                           : LaunchStoredGradients<128, 128, 2, 2, 1>};
}

}  // namespace

size_t TensorScratchBytes(const Conv2dShape& s) {
  constexpr int64_t kMostBytes = int64_t{64} << 20, kChunks = 1024;
  const int64_t elements = s.out * s.kernel * s.kernel * (s.in / s.groups);
  return static_cast<size_t>(std::min(kMostBytes, elements * 4 * kChunks));
}

namespace {

template <class X, class Y>
void BackwardWeight(const Queue& q, const Conv2dShape& s, const Leaves& leaves, const X* x,
                    const Y* dy, float* dw, int64_t stride, void* scratch) {
  const int64_t own_in = s.in / s.groups, own_out = s.out / s.groups;
  const int64_t columns = s.kernel * s.kernel * own_in, elements = s.out * columns;
  const int64_t out_places = s.out_height() * s.out_width();
  const bool flat = own_in % 4 != 0;
  // By runs, where channels fill tiles and the ring fits. With x alone stored as bf16 a wider tile
  // has too few registers.
  constexpr int kWidest = sizeof(X) < sizeof(Y) ? 32 : 64;
  const int run_out_tile = std::min(FeaturesOfTile(own_out), kWidest), ring = RingOf(s);
  const int halves =
      own_in % 32 == 0 && BytesOfGradientRun(run_out_tile, 2, ring) <= kMostShared ? 2 : 1;
  const bool by_runs = KeepsSize(s) && own_in % 16 == 0 &&
                       BytesOfGradientRun(run_out_tile, halves, ring) <= kMostShared;
  GradientPlan<X, Y> plan = PlanOf<X, Y>(own_out, columns, flat);
  int64_t column_tiles = CeilDiv(columns, plan.column_tile);
  if (by_runs) {
    plan.out_tile = run_out_tile;
    column_tiles = own_in / (16 * halves) * CeilDiv(s.kernel * s.kernel, kTapsOfTile);
  }
  const int64_t out_tiles = CeilDiv(own_out, plan.out_tile);
  // So that 16 rows make some 64 blocks, of not too few places; 32 of large ones.
  const int64_t tiles = s.groups * out_tiles * column_tiles;
  const bool large = elements >= tiles * 8192;
  const int64_t wanted = std::max<int64_t>(128, out_places * tiles / (large ? 2 : 4));
  WeightGradient g = {static_cast<int>(s.height),
                      static_cast<int>(s.width),
                      static_cast<int>(s.in),
                      static_cast<int>(s.out),
                      static_cast<int>(s.groups),
                      static_cast<int>(own_in),
                      static_cast<int>(own_out),
                      static_cast<int>(s.kernel),
                      static_cast<int>(s.stride),
                      static_cast<int>(s.padding),
                      static_cast<int>(s.dilation),
                      static_cast<int>(out_places),
                      static_cast<int>(columns),
                      BlockShiftOf<Bf16>(own_in),
                      static_cast<int>(out_tiles),
                      static_cast<int>(column_tiles),
                      (flat || TakenByFour(own_in, x)) && TakenByFour(own_out, dy),
                      false,
                      0,
                      elements,
                      Divisor(s.out_width()),
                      Divisor(s.out_height())};
  // Which kernel it is changes no bit; chunks follow from the shape alone.
  constexpr bool kStored = sizeof(X) == 2 && sizeof(Y) == 2;
  const bool by_pieces =
      kStored && own_in % 8 == 0 && own_out % 8 == 0 && IsAligned16(x) && IsAligned16(dy);
  const int stored_ring = StoredRingOf(s, PlacesOfGradientRun(plan.out_tile, halves));
  const int64_t stored_bytes = BytesOfStoredRun(plan.out_tile, halves, stored_ring);
  const auto multiply = [&](const Chunks& part, uint32_t chunks, float* results,
                            int64_t leaf_stride) {
    g.leaf_stride = leaf_stride;
    g.wide_result = !flat && leaf_stride % 2 == 0 && reinterpret_cast<uintptr_t>(results) % 8 == 0;
    if constexpr (kStored) {
      if (by_pieces && !by_runs) {
        const bool wide = plan.out_tile == 128 && RoundUp(columns, 256) == RoundUp(columns, 128);
        return wide ? LaunchStoredGradients<128, 256, 2, 4, 1>(q, g, part, chunks, x, dy, results)
                    : plan.launch_stored(q, g, part, chunks, x, dy, results);
      }
      if (by_pieces && s.kernel == 3 && halves == 2 && own_out > 32) {
        const int nine_ring = StoredRingOf(s, 64);
        const bool wide = RoundUp(own_out, 128) == RoundUp(own_out, 64);
        if (wide && NineTapsTile<128>::bytes(nine_ring) <= kMostStoredShared) {
          return LaunchNineTaps<128>(q, g, part, chunks, nine_ring, x, dy, results);
        }
        if (NineTapsTile<64>::bytes(nine_ring) <= kMostStoredShared) {
          return LaunchNineTaps<64>(q, g, part, chunks, nine_ring, x, dy, results);
        }
      }
      if (by_pieces && stored_bytes <= kMostStoredShared) {
        const auto launch = plan.out_tile == 16
                                ? (halves == 2 ? LaunchStoredRuns<16, 2> : LaunchStoredRuns<16, 1>)
                            : plan.out_tile == 32
                                ? (halves == 2 ? LaunchStoredRuns<32, 2> : LaunchStoredRuns<32, 1>)
                                : (halves == 2 ? LaunchStoredRuns<64, 2> : LaunchStoredRuns<64, 1>);
        return launch(q, g, part, chunks, stored_ring, x, dy, results);
      }
    }
    if (!by_runs) return plan.launch(q, g, part, chunks, x, dy, results);
    const auto launch =
        plan.out_tile == 16
            ? (halves == 2 ? LaunchGradientRuns<X, Y, 16, 2> : LaunchGradientRuns<X, Y, 16, 1>)
        : plan.out_tile == 32
            ? (halves == 2 ? LaunchGradientRuns<X, Y, 32, 2> : LaunchGradientRuns<X, Y, 32, 1>)
            : (halves == 2 ? LaunchGradientRuns<X, Y, kWidest, 2>
                           : LaunchGradientRuns<X, Y, kWidest, 1>);
    launch(q, g, part, chunks, ring, x, dy, results);
  };
  const int64_t floats = static_cast<int64_t>(TensorScratchBytes(s) / sizeof(float));
  const PartialSums partial = {static_cast<float*>(scratch), floats, floats / 4};
  SumOverPlaces(q, leaves, out_places, wanted, 64, elements, partial, dw, stride, multiply);
}

}  // namespace

void TensorConvolutionBackwardWeight(const Queue& q, const Conv2dShape& s, const Leaves& leaves,
                                     const void* x, const void* dy, float* dw, int64_t stride,
                                     void* scratch) {
  WithElement(s.x_type, [&]<class X>() {
    WithElement(s.y_type, [&]<class Y>() {
      BackwardWeight(q, s, leaves, static_cast<const X*>(x), static_cast<const Y*>(dy), dw, stride,
                     scratch);
    });
  });
}

}  // namespace lockstep::device::cuda
