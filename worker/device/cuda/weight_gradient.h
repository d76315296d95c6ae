// What the kernels of dw of bf16 convolutions on tensor cores share (tensor_weight_gradient.cu,
// stored_weight_gradient.cu).
#pragma once

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"

namespace lockstep::device::cuda {

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

// ---- of convolutions that keep the size, as y and dx of them: a ring of pixels round the present
// places is kept in shared memory, each loaded once, and every tap multiplies rows of it.

constexpr int kTapsOfTile = 9;

constexpr int PlacesOfGradientRun(int out_tile, int halves) {
  return out_tile * halves > 64 ? 64 : 32;
}
inline int64_t BytesOfGradientRun(int out_tile, int halves, int64_t ring) {
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

// ---- x and dy that are both stored as bf16.

// How a weight gradient is cut.
struct GradientTiles {
  int outs = 0, columns = 0;  // of a block
  bool by_runs = false;       // a ring of pixels, of `halves` times 16 channels of a block
  int halves = 0;
};
// Multiplies chunks where channels lie by eight, in 16-byte pieces, with the bits of the general
// kernels. False where none of these kernels has the room.
bool LaunchStoredWeightGradient(const Queue& q, const Conv2dShape& shape, const WeightGradient& s,
                                const GradientTiles& tiles, const Chunks& leaves, uint32_t chunks,
                                const StoredBf16* x, const StoredBf16* dy, float* results);

// The same on GPUs with warpgroup products (warpgroup_weight_gradient.cu), whose bits are others:
// outs and columns by 64, no groups; at any address, but that s.wide says whether x and dy are
// aligned to 16 bytes.
GradientTiles WarpgroupGradientTiles(int64_t outs, int64_t columns);
void LaunchWarpgroupWeightGradient(const Queue& q, const WeightGradient& s,
                                   const GradientTiles& tiles, const Chunks& leaves,
                                   uint32_t chunks, const StoredBf16* x, const StoredBf16* dy,
                                   float* results);
// And of 3 x 3 kernels that keep the size (warpgroup_runs.cu); chunks are of whole rows.
bool GoesByWarpgroupRuns(const Conv2dShape& s);
void LaunchWarpgroupRuns(const Queue& q, const WeightGradient& s, const Chunks& leaves,
                         uint32_t chunks, const StoredBf16* x, const StoredBf16* dy,
                         float* results);
// And of images that GoesAsStem; chunks are of whole rows of the output.
void LaunchStemWeightGradient(const Queue& q, const WeightGradient& s, int64_t out_width,
                              const Chunks& leaves, uint32_t chunks, const float* x,
                              const StoredBf16* dy, float* results);

}  // namespace lockstep::device::cuda
