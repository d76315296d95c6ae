// dw of bf16 convolutions of 3 x 3 kernels that keep the size, on GPUs with warpgroup products
// (9.0), of x and dy that are both stored as bf16, with channels by 64. Pixels stand in shared
// memory as if a pixel of zeros followed each row of an image, and a row of them each image: then
// what a tap meets is a fixed number of pixels away, wherever it is, and the tensor cores read it
// there. A ring of pixels round the present places is kept, each loaded once.
//
// Order, which is all that bits depend on: a chunk's places, zeros included, come one by one, as
// one chain of the instruction's products; chunks are of whole rows.
#include "worker/device/cuda/warpgroup.h"
#include "worker/device/cuda/weight_gradient.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kTaps = 3;  // along each dimension; a warpgroup has a row of them
constexpr int kThreads = kTaps * 128;
constexpr int kPlaces = 64;                     // of a step
constexpr int kBlock = kPlaces * kSwizzledRow;  // bytes of 64 channels of a step
constexpr int kStages = 4, kAhead = 1;          // of dy; steps whose products may be under way
constexpr int kCopied = kStages - 1 - kAhead;   // steps, before they are multiplied
constexpr int kRing = 512;                      // pixels, and so many once more behind:
constexpr int kMirrored = 16;                   // what an instruction reads is not cut
constexpr int kBytes = kSwizzledAlignment + kStages * kBlock + (kRing + kMirrored) * kSwizzledRow;
// Those of the products under way, and those that are copied meanwhile, are all there.
constexpr int kMostWidth = (kRing - (kCopied + 1 + kAhead) * kPlaces) / 2 - 2;

__device__ __forceinline__ void MultiplyRuns(const WeightGradient& s, const Chunks& chunks,
                                             const StoredBf16* __restrict__ x,
                                             const StoredBf16* __restrict__ dy,
                                             float* __restrict__ results, const Divisor& by_width,
                                             const Divisor& by_height) {
  const OwnChunk mine = ChunkOfBlock(chunks, s.height, s.width);  // of rows of pixels
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first_y = mine.first, end_y = mine.end;
  const int64_t first_row = mine.first_row;
  const int rows = static_cast<int>(chunks.begin[leaf + 1] - first_row);
  const int width = s.width + 1, reach = width + 1;  // a row, with its zero; from a place to a tap
  const auto begin_of = [&](int y) { return (y + y / s.height) * width; };  // with rows of zeros
  const int first = begin_of(first_y);
  const int end = first_y < end_y ? begin_of(end_y - 1) + s.width : first;
  const int first_channel = static_cast<int>(blockIdx.x) % (s.in / 64) * 64;
  const int first_out = static_cast<int>(blockIdx.x) / (s.in / 64) * 64;
  x += first_row * s.height * s.width * s.in + first_channel;
  dy += first_row * s.height * s.width * s.out + first_out;
  char* const gradients = AlignMatrix(SharedMemory<char>());
  char* const ring = gradients + kStages * kBlock;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp, group = warp / 4;

  // Of the tensor's pixels, which stands at a place; below 0: zeros.
  const auto pixel_at = [&](int place) {
    uint32_t rest = static_cast<uint32_t>(place);
    const int column = static_cast<int>(by_width.TakeRemainder(rest));
    const int row = static_cast<int>(by_height.TakeRemainder(rest)), image = static_cast<int>(rest);
    const bool there = place >= 0 && column < s.width && row < s.height && image < rows;
    return there ? (image * s.height + row) * s.width + column : -1;
  };
  const auto copy_piece = [&](char* to, const StoredBf16* from, bool copies) {
    if (s.wide) return CopyOrZeroInBackground(to, from, copies);
    const uint2 low = LoadStored<false>(from, copies ? 4 : 0);
    const uint2 high = LoadStored<false>(from + 4, copies ? 4 : 0);
    *reinterpret_cast<uint4*>(to) = make_uint4(low.x, low.y, high.x, high.y);
  };
  // Pixels of the ring, from 0, which is `reach` in front of the chunk's first place.
  const auto copy_pixel = [&](int at, int piece) {
    const int pixel = pixel_at(first - reach + at), slot = at & (kRing - 1);
    const StoredBf16* const from =
        x + (pixel < 0 ? 0 : static_cast<int64_t>(pixel) * s.in + piece * 8);
    char* const to = ring + slot * kSwizzledRow + (piece ^ (slot & 7)) * 16;
    copy_piece(to, from, pixel >= 0);
    if (slot < kMirrored) copy_piece(to + kRing * kSwizzledRow, from, pixel >= 0);
  };
  const auto copy = [&](int step) {
    for (int i = thread; i < kPlaces * 16; i += kThreads) {
      const int row = i / 8 % kPlaces, piece = i % 8;
      if (i >= kPlaces * 8) {
        copy_pixel(step * kPlaces + 2 * reach + row, piece);
        continue;
      }
      const int place = first + step * kPlaces + row;
      const int pixel = place < end ? pixel_at(place) : -1;
      copy_piece(
          gradients + step % kStages * kBlock + row * kSwizzledRow + (piece ^ (row & 7)) * 16,
          dy + (pixel < 0 ? 0 : static_cast<int64_t>(pixel) * s.out + piece * 8), pixel >= 0);
    }
  };

  const int steps = (end - first + kPlaces - 1) / kPlaces;
  if (steps > 0) {
    for (int i = thread; i < 2 * reach * 8; i += kThreads) copy_pixel(i / 8, i % 8);
  }
#pragma unroll
  for (int step = 0; step < kCopied; ++step) {
    if (step < steps) copy(step);
    CommitCopies();
  }
  float sums[kTaps][8][4] = {};
  const auto keep = [&] {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) KeepSums(sums[i]);
  };
  keep();
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kCopied - 1>();
    ShowToProducts();
    __syncthreads();  // and what is copied over below is multiplied
    const SharedMatrix down = MatrixIn(gradients + step % kStages * kBlock, kBlock);
    BeginProducts();
#pragma unroll
    for (int depth = 0; depth < kPlaces / 16; ++depth) {
      const int at = step * kPlaces + depth * 16 + group * width;  // of the row's first tap
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        MultiplyWarpgroup<64, true>(
            sums[i], Behind(down, depth * 16 * kSwizzledRow),
            MatrixIn(ring + ((at + i) & (kRing - 1)) * kSwizzledRow, kBlock));
      }
    }
    CommitProducts();
    if (step + kCopied < steps) copy(step + kCopied);
    CommitCopies();
    WaitForProducts<kAhead>();
  }
  WaitForProducts<0>();
  keep();

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int out = first_out + warp % 4 * 16 + half * 8 + lane / 4;
      float* const to = results + static_cast<int64_t>(out) * s.columns +
                        (group * kTaps + i) * s.in + first_channel + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* const two = sums[i][j] + 2 * half;
        if (s.wide_result) {
          *reinterpret_cast<float2*>(to + j * 8) = make_float2(two[0], two[1]);
        } else {
          to[j * 8] = two[0];
          to[j * 8 + 1] = two[1];
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    MultiplyRunsByWarpgroups(WeightGradient s, Chunks chunks, const StoredBf16* __restrict__ x,
                             const StoredBf16* __restrict__ dy, float* __restrict__ results,
                             Divisor by_width, Divisor by_height) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) MultiplyRuns(s, chunks, x, dy, results, by_width, by_height);
}

}  // namespace

bool GoesByWarpgroupRuns(const Conv2dShape& s) {
  return s.x_type == ElementType::kBf16 && s.y_type == ElementType::kBf16 && s.groups == 1 &&
         s.in % 64 == 0 && s.out % 64 == 0 && s.kernel == kTaps && s.stride == 1 &&
         s.padding == 1 && s.dilation == 1 && s.width <= kMostWidth && WarpgroupProcessors() > 0;
}

void LaunchWarpgroupRuns(const Queue& q, const WeightGradient& s, const Chunks& leaves,
                         uint32_t chunks, const StoredBf16* x, const StoredBf16* dy,
                         float* results) {
  AllowShared(MultiplyRunsByWarpgroups, kBytes);
  Launch(q,
         dim3(static_cast<uint32_t>(s.in / 64 * (s.out / 64)), chunks,
              static_cast<uint32_t>(leaves.count)),
         dim3(kThreads), kBytes, MultiplyRunsByWarpgroups, s, leaves, x, dy, results,
         Divisor(s.width + 1), Divisor(s.height + 1));
}

}  // namespace lockstep::device::cuda
