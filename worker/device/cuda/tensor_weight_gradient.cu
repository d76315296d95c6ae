// dw of convolutions in bf16 on tensor cores: the product of dy and windows of x, over the places
// (row, oh, ow) of a leaf; what of them is fp32 in memory is rounded on its way to shared memory.
//
// Order, which is all that bits depend on: a leaf's places are cut into chunks by its rows and the
// shape, a chunk's places are summed in their order by as many groups of warps as the shape says,
// and chunks are added by SumChunks.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/tensor_convolution.h"
#include "worker/device/cuda/warpgroup.h"
#include "worker/device/cuda/weight_gradient.h"
#include "worker/device/cuda/windows.h"

namespace lockstep::device::cuda {
namespace {

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
  WaitForPrevious();
  using Tile = GradientTile<kOut, kColumns, kDown, kAcross, kGroups, kDepths>;
  constexpr int kThreads = Tile::kThreads, kStage = Tile::kStage, kPlaces = Tile::kPlaces;
  constexpr int kColumnQuads = kColumns / 4, kOutQuads = kOut / 4;
  constexpr int kColumnApart = kThreads / kColumnQuads, kOutApart = kThreads / kOutQuads;
  constexpr int kColumnLoads = (kPlaces + kColumnApart - 1) / kColumnApart;
  constexpr int kOutLoads = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kTilesDown = kOut / kDown / 16, kTilesAcross = kColumns / kAcross / 16;
  static_assert(kThreads % kColumnQuads == 0 && kThreads % kOutQuads == 0 && kThreads >= 64 &&
                kSpan % kPlaces == 0 && kSpan / kPlaces >= 2);
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int64_t first_row = mine.first_row;
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

// ---- dw of convolutions that keep the size, as y and dx of them: a ring of pixels round the
// present places is kept in shared memory, each loaded once, and every tap multiplies rows of it.

template <class X, class Y, int kOut, int kHalves>
__global__ void __launch_bounds__(GradientRunTile<kOut, kHalves>::kThreads,
                                  GradientRunTile<kOut, kHalves>::kBlocks)
    MultiplyGradientRuns(WeightGradient s, Chunks chunks, int ring, const X* __restrict__ x,
                         const Y* __restrict__ dy, float* __restrict__ results) {
  WaitForPrevious();
  using Tile = GradientRunTile<kOut, kHalves>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelQuads = kHalves * 4, kOutQuads = kOut / 4, kOutPieces = kOut / 8;
  constexpr int kOutApart = kThreads / kOutQuads;
  constexpr int kOutLoads = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kPixelLoads = (kPlaces * kPixelQuads + kThreads - 1) / kThreads;
  constexpr int kTilesDown = kOut / 16;
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int all = mine.all;
  const int64_t first_row = mine.first_row;
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

// The tile of a shape and what launches it.
template <class X, class Y>
struct GradientPlan {
  int out_tile, column_tile;
  void (*launch)(const Queue&, WeightGradient, const Chunks&, uint32_t, const X*, const Y*, float*);
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
                           : LaunchGradients<X, Y, 32, 144, 1, 9, 1, 2, false>};
  }
  if (columns <= 256 && RoundUp(columns, 128) > narrow) {
    return {out_tile, 64,
            out_tile == 16   ? LaunchGradients<X, Y, 16, 64, 1, 2, 2, 1, false>
            : out_tile == 32 ? LaunchGradients<X, Y, 32, 64, 1, 2, 2, 1, false>
            : out_tile == 64 ? LaunchGradients<X, Y, 64, 64, 2, 2, 1, 2, false>
                             : LaunchGradients<X, Y, 128, 64, 2, 2, 1, 2, false>};
  }
  return {out_tile, 128,
          out_tile == 16   ? LaunchGradients<X, Y, 16, 128, 1, 4, 1, 2, false>
          : out_tile == 32 ? LaunchGradients<X, Y, 32, 128, 1, 4, 1, 2, false>
          : out_tile == 64 ? LaunchGradients<X, Y, 64, 128, 2, 2, 1, 2, false>
                           : LaunchGradients<X, Y, 128, 128, 2, 2, 1, 1, false>};
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
  // Of those with warpgroup products, one, by the shape and the GPU.
  constexpr bool kStored = sizeof(X) == 2 && sizeof(Y) == 2;
  const bool as_stem = sizeof(X) == 4 && sizeof(Y) == 2 && GoesAsStem(s);
  const bool by_warpgroup_runs = kStored && GoesByWarpgroupRuns(s);
  const bool by_warpgroups = kStored && !by_warpgroup_runs && !by_runs && own_in % 64 == 0 &&
                             own_out % 64 == 0 && (own_out % 128 == 0 || columns % 128 == 0) &&
                             s.groups == 1 && WarpgroupProcessors() > 0;
  const GradientTiles warpgroup_tiles = WarpgroupGradientTiles(own_out, columns);
  if (by_warpgroups) {
    plan.out_tile = warpgroup_tiles.outs;
    column_tiles = columns / warpgroup_tiles.columns;
  }
  if (by_warpgroup_runs) column_tiles = own_in / 64, plan.out_tile = 64;
  const int64_t out_tiles = CeilDiv(own_out, plan.out_tile);
  // So that 16 rows make so many blocks, of not too few places.
  const int64_t tiles = s.groups * out_tiles * column_tiles;
  const bool large = elements >= tiles * 8192;
  const int64_t blocks = by_warpgroup_runs ? 8 : by_warpgroups ? 16 : large ? 32 : 64;
  const int64_t wanted = as_stem ? std::max(s.out_width(), out_places / 4)
                                 : std::max<int64_t>(128, out_places * tiles * 16 / blocks);
  const int64_t depth = as_stem || by_warpgroup_runs ? s.out_width() : 64;
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
  const auto multiply = [&](const Chunks& part, uint32_t chunks, float* results,
                            int64_t leaf_stride) {
    g.leaf_stride = leaf_stride;
    g.wide_result = !flat && leaf_stride % 2 == 0 && reinterpret_cast<uintptr_t>(results) % 8 == 0;
    if constexpr (sizeof(X) == 4 && sizeof(Y) == 2) {
      if (as_stem) {
        g.wide = IsAligned16(dy);
        return LaunchStemWeightGradient(q, g, s.out_width(), part, chunks, x, dy, results);
      }
    }
    if constexpr (sizeof(X) == 2 && sizeof(Y) == 2) {
      if (by_warpgroup_runs) {
        g.wide = IsAligned16(x) && IsAligned16(dy);
        return LaunchWarpgroupRuns(q, g, part, chunks, x, dy, results);
      }
      if (by_warpgroups) {
        g.wide = IsAligned16(x) && IsAligned16(dy);
        return LaunchWarpgroupWeightGradient(q, g, warpgroup_tiles, part, chunks, x, dy, results);
      }
      // Which of the kernels below it is changes no bit.
      const bool by_pieces =
          own_in % 8 == 0 && own_out % 8 == 0 && IsAligned16(x) && IsAligned16(dy);
      const GradientTiles cut = {plan.out_tile, plan.column_tile, by_runs, halves};
      if (by_pieces && LaunchStoredWeightGradient(q, s, g, cut, part, chunks, x, dy, results)) {
        return;
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
  SumOverPlaces(q, leaves, out_places, wanted, depth, elements, partial, dw, stride, multiply);
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
