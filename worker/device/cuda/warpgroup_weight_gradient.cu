// dw of bf16 convolutions on GPUs with warpgroup products (9.0), of x and dy that are both stored
// as bf16, with channels by 64: rows of a place's channels come to shared memory as they are, and
// the tensor cores read both factors from there, transposed.
//
// Order, which is all that bits depend on: a chunk's places come one by one, as one chain of the
// instruction's products; chunks as in tensor_weight_gradient.cu.
#include "worker/device/cuda/warpgroup.h"
#include "worker/device/cuda/weight_gradient.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;                   // two warpgroups
constexpr int kPlaces = 64;                     // of a step
constexpr int kBlock = kPlaces * kSwizzledRow;  // bytes of 64 channels of a step

template <int kOut, int kColumns, int kStages>
struct WarpgroupGradientTile {
  static constexpr int kStage = (kOut + kColumns) / 64 * kBlock;
  static constexpr size_t kBytes = kSwizzledAlignment + kStages * kStage;
};

// Columns are {tap, channel}. Two warpgroups share kOut where that is 128, else kColumns.
template <int kOut, int kColumns, int kStages, int kAhead>
__device__ __forceinline__ void MultiplyPlaces(const WeightGradient& s, const Chunks& chunks,
                                               const StoredBf16* __restrict__ x,
                                               const StoredBf16* __restrict__ dy,
                                               float* __restrict__ results) {
  constexpr int kStage = WarpgroupGradientTile<kOut, kColumns, kStages>::kStage;
  constexpr int kOuts = kOut / 64, kColumnBlocks = kColumns / 64;
  constexpr int kOwnColumns = kOut == 128 ? kColumns : kColumns / 2;  // of a warpgroup
  constexpr int kRowsApart = kThreads / 8, kRows = kPlaces / kRowsApart;
  constexpr int kCopied = kStages - 1 - kAhead;  // steps, before they are multiplied
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int64_t first_row = mine.first_row;
  const int first_column = static_cast<int>(blockIdx.x) % s.column_tiles * kColumns;
  const int first_out = static_cast<int>(blockIdx.x) / s.column_tiles * kOut;
  x += first_row * s.height * s.width * s.in;
  dy += first_row * s.out_places * s.out + first_out;
  char* const stages = AlignMatrix(SharedMemory<char>());
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp, group = warp / 4;

  // This thread copies a piece of some places of each block of channels.
  const int own_row = thread / 8, own_piece = thread % 8;
  const int own_at = own_row * kSwizzledRow + (own_piece ^ (own_row & 7)) * 16;
  int move[kColumnBlocks], bits[kColumnBlocks];
#pragma unroll
  for (int b = 0; b < kColumnBlocks; ++b) {
    const int column = first_column + b * 64, tap = column / s.in;
    const int tap_y = tap / s.kernel, tap_x = tap % s.kernel;
    move[b] = (tap_y * s.width + tap_x) * s.dilation * s.in + column % s.in + own_piece * 8;
    bits[b] = 1 << tap_y | 1 << (tap_x + 16);
  }
  const bool plain = s.kernel == 1 && s.stride == 1 && s.padding == 0;
  const auto copy_piece = [&](char* to, const StoredBf16* from, bool copies) {
    if (s.wide) return CopyOrZeroInBackground(to, from, copies);
    const uint2 low = LoadStored<false>(from, copies ? 4 : 0);
    const uint2 high = LoadStored<false>(from + 4, copies ? 4 : 0);
    *reinterpret_cast<uint4*>(to) = make_uint4(low.x, low.y, high.x, high.y);
  };
  const auto copy = [&](int step) {
    char* const stage = stages + step % kStages * kStage + own_at;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int place = first + step * kPlaces + own_row + i * kRowsApart;
      const bool there = place < end;
      const StoredBf16* const from_dy =
          dy + (there ? static_cast<int64_t>(place) * s.out + own_piece * 8 : 0);
      char* const to = stage + i * kRowsApart * kSwizzledRow;
#pragma unroll
      for (int b = 0; b < kOuts; ++b) copy_piece(to + b * kBlock, from_dy + b * 64, there);
      int64_t begin = static_cast<int64_t>(place) * s.in;
      int inside = there ? -1 : 0;
      if (!plain) {
        const int4 window = WindowOfPlace(s, place, end);
        begin = BeginOf(window);
        inside = window.z;
      }
#pragma unroll
      for (int b = 0; b < kColumnBlocks; ++b) {
        const bool copies = (inside & bits[b]) == bits[b];
        copy_piece(to + (kOuts + b) * kBlock, x + (copies ? begin + move[b] : 0), copies);
      }
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  float sums[kOwnColumns / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kCopied; ++step) {
    if (step < steps) copy(step);
    CommitCopies();
  }
  const int own_out = kOut == 128 ? group * 64 : 0;
  const int own_column = kOut == 128 ? 0 : group * kOwnColumns;
  KeepSums(sums);
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kCopied - 1>();
    ShowToProducts();
    __syncthreads();  // and the stage that is copied to below is multiplied
    const char* const stage = stages + step % kStages * kStage;
    const SharedMatrix down = MatrixIn(stage + own_out / 64 * kBlock, kBlock);
    const SharedMatrix across = MatrixIn(stage + (kOuts + own_column / 64) * kBlock, kBlock);
    BeginProducts();
#pragma unroll
    for (int depth = 0; depth < kPlaces / 16; ++depth) {
      MultiplyWarpgroup<kOwnColumns, true>(sums, Behind(down, depth * 16 * kSwizzledRow),
                                           Behind(across, depth * 16 * kSwizzledRow));
    }
    CommitProducts();
    if (step + kCopied < steps) copy(step + kCopied);
    CommitCopies();
    WaitForProducts<kAhead>();
  }
  WaitForProducts<0>();
  KeepSums(sums);

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int out = first_out + own_out + warp % 4 * 16 + half * 8 + lane / 4;
    float* const row =
        results + static_cast<int64_t>(out) * s.columns + first_column + own_column + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kOwnColumns / 8; ++j) {
      const float* const two = sums[j] + 2 * half;
      if (s.wide_result) {
        *reinterpret_cast<float2*>(row + j * 8) = make_float2(two[0], two[1]);
      } else {
        row[j * 8] = two[0];
        row[j * 8 + 1] = two[1];
      }
    }
  }
}

template <int kOut, int kColumns, int kStages, int kAhead, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    MultiplyGradientsByWarpgroups(WeightGradient s, Chunks chunks, const StoredBf16* __restrict__ x,
                                  const StoredBf16* __restrict__ dy, float* __restrict__ results) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) {
    MultiplyPlaces<kOut, kColumns, kStages, kAhead>(s, chunks, x, dy, results);
  }
}

template <int kOut, int kColumns, int kStages, int kAhead, int kBlocks>
void LaunchTile(const Queue& q, const WeightGradient& s, const Chunks& leaves, uint32_t chunks,
                const StoredBf16* x, const StoredBf16* dy, float* results) {
  constexpr size_t kBytes = WarpgroupGradientTile<kOut, kColumns, kStages>::kBytes;
  const dim3 grid(static_cast<uint32_t>(s.out_tiles * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  const auto kernel = MultiplyGradientsByWarpgroups<kOut, kColumns, kStages, kAhead, kBlocks>;
  AllowShared(kernel, kBytes);
  Launch(q, grid, dim3(kThreads), kBytes, kernel, s, leaves, x, dy, results);
}

}  // namespace

GradientTiles WarpgroupGradientTiles(int64_t outs, int64_t columns) {
  GradientTiles tiles;
  tiles.outs = outs % 128 == 0 ? 128 : 64;
  tiles.columns = columns % 128 != 0 ? 64 : columns % 256 != 0 || tiles.outs == 64 ? 128 : 256;
  return tiles;
}

void LaunchWarpgroupWeightGradient(const Queue& q, const WeightGradient& s,
                                   const GradientTiles& tiles, const Chunks& leaves,
                                   uint32_t chunks, const StoredBf16* x, const StoredBf16* dy,
                                   float* results) {
  const auto launch = tiles.outs == 64       ? LaunchTile<64, 128, 4, 0, 2>
                      : tiles.columns == 64  ? LaunchTile<128, 64, 4, 0, 2>
                      : tiles.columns == 128 ? LaunchTile<128, 128, 3, 0, 2>
                                             : LaunchTile<128, 256, 4, 1, 1>;
  launch(q, s, leaves, chunks, x, dy, results);
}

}  // namespace lockstep::device::cuda
