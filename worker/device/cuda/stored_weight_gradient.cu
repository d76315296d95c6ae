// dw of convolutions in bf16 on tensor cores where x and dy are both stored as bf16, with channels
// by eight: pieces of 16 bytes go to shared memory as they are, in the background and some steps
// ahead. In the order of the general kernels (tensor_weight_gradient.cu), so with their bits.
#include <algorithm>

#include "worker/device/cuda/weight_gradient.h"
#include "worker/device/cuda/windows.h"

namespace lockstep::device::cuda {
namespace {

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
  WaitForPrevious();
  using Tile = StoredGradientTile<kOut, kColumns, kDown, kAcross, kGroups>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStages = Tile::kStages;
  constexpr int kColumnPieces = kColumns / 8, kOutPieces = kOut / 8;
  constexpr int kColumnApart = kThreads / kColumnPieces, kOutApart = kThreads / kOutPieces;
  constexpr int kColumnCopies = (kPlaces + kColumnApart - 1) / kColumnApart;
  constexpr int kOutCopies = (kPlaces + kOutApart - 1) / kOutApart;
  constexpr int kTilesDown = kOut / kDown / 16, kTilesAcross = kColumns / kAcross / 16;
  constexpr int kDepths = kPlaces / kGroups / 16;
  static_assert(kThreads % kColumnPieces == 0 && kThreads % kOutPieces == 0);
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

// ---- by runs.

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
  WaitForPrevious();
  using Tile = GradientRunTile<kOut, kHalves>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelPieces = kHalves * 2, kOutPieces = kOut / 8;
  constexpr int kOutCopies = (kPlaces * kOutPieces + kThreads - 1) / kThreads;
  constexpr int kPixelCopies = (kPlaces * kPixelPieces + kThreads - 1) / kThreads;
  constexpr int kTilesDown = kOut / 16, kRingAt = kRunStages * kStage;
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
  WaitForPrevious();
  using Tile = NineTapsTile<kOut>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kStage = Tile::kStage;
  constexpr int kPixelPieces = 4, kOutPieces = kOut / 8, kTilesDown = 4, kTilesAcross = 3;
  constexpr int kOutCopies = (kPlaces * kOutPieces + kThreads - 1) / kThreads;
  constexpr int kPixelCopies = (kPlaces * kPixelPieces + kThreads - 1) / kThreads;
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int all = mine.all;
  const int64_t first_row = mine.first_row;
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

using LaunchTile = void (*)(const Queue&, WeightGradient, const Chunks&, uint32_t,
                            const StoredBf16*, const StoredBf16*, float*);
LaunchTile TileOf(const GradientTiles& tiles) {
  switch (tiles.columns) {
    case 144:
      return tiles.outs == 16 ? LaunchStoredGradients<16, 144, 1, 9, 1>
                              : LaunchStoredGradients<32, 144, 1, 9, 1>;
    case 64:
      return tiles.outs == 16   ? LaunchStoredGradients<16, 64, 1, 2, 2>
             : tiles.outs == 32 ? LaunchStoredGradients<32, 64, 1, 2, 2>
             : tiles.outs == 64 ? LaunchStoredGradients<64, 64, 2, 2, 1>
                                : LaunchStoredGradients<128, 64, 2, 2, 1>;
    default:
      return tiles.outs == 16   ? LaunchStoredGradients<16, 128, 1, 4, 1>
             : tiles.outs == 32 ? LaunchStoredGradients<32, 128, 1, 4, 1>
             : tiles.outs == 64 ? LaunchStoredGradients<64, 128, 2, 2, 1>
                                : LaunchStoredGradients<128, 128, 2, 2, 1>;
  }
}

}  // namespace

bool LaunchStoredWeightGradient(const Queue& q, const Conv2dShape& shape, const WeightGradient& s,
                                const GradientTiles& tiles, const Chunks& leaves, uint32_t chunks,
                                const StoredBf16* x, const StoredBf16* dy, float* results) {
  if (!tiles.by_runs) {
    const bool wide = tiles.outs == 128 && RoundUp(s.columns, 256) == RoundUp(s.columns, 128);
    const LaunchTile launch = wide ? LaunchStoredGradients<128, 256, 2, 4, 1> : TileOf(tiles);
    launch(q, s, leaves, chunks, x, dy, results);
    return true;
  }
  if (s.kernel == 3 && tiles.halves == 2 && s.own_out > 32) {
    const int ring = StoredRingOf(shape, 64);
    const bool wide = RoundUp(s.own_out, 128) == RoundUp(s.own_out, 64);
    if (wide && NineTapsTile<128>::bytes(ring) <= kMostStoredShared) {
      LaunchNineTaps<128>(q, s, leaves, chunks, ring, x, dy, results);
      return true;
    }
    if (NineTapsTile<64>::bytes(ring) <= kMostStoredShared) {
      LaunchNineTaps<64>(q, s, leaves, chunks, ring, x, dy, results);
      return true;
    }
  }
  const int ring = StoredRingOf(shape, PlacesOfGradientRun(tiles.outs, tiles.halves));
  if (BytesOfStoredRun(tiles.outs, tiles.halves, ring) > kMostStoredShared) return false;
  const bool two = tiles.halves == 2;
  const auto launch = tiles.outs == 16 ? (two ? LaunchStoredRuns<16, 2> : LaunchStoredRuns<16, 1>)
                      : tiles.outs == 32
                          ? (two ? LaunchStoredRuns<32, 2> : LaunchStoredRuns<32, 1>)
                          : (two ? LaunchStoredRuns<64, 2> : LaunchStoredRuns<64, 1>);
  launch(q, s, leaves, chunks, ring, x, dy, results);
  return true;
}

}  // namespace lockstep::device::cuda
