// y and dw of a bf16 convolution with stride 2 of images (fp32, up to four channels), as networks
// for large images begin with one, on GPUs with warpgroup products (9.0). Rows of an image come to
// shared memory rounded, with four channels a pixel: then two pixels are a piece of 16 bytes, the
// pieces of neighbouring windows lie one behind the other, and the tensor cores read windows where
// they are.
//
// Order, which is all that bits depend on: of y, terms run over (kh, kw to eight, channel to four);
// of dw, over the places of the output's rows, to whole 16 of a row. What is not there is
// multiplied as 0, so that a pixel that is not finite reaches windows beside it too.
#include "worker/device/cuda/tensor_convolution.h"
#include "worker/device/cuda/warpgroup.h"
#include "worker/device/cuda/weight_gradient.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;    // two warpgroups
constexpr int kPixel = 8;        // bytes
constexpr int kMostTaps = 8;     // along each dimension: 32 terms, 64 bytes
constexpr int kMostWidth = 128;  // places of a row of the output, at most
constexpr int kPixels = 2 * kMostWidth + kMostTaps;
constexpr int kRow = kPixels * kPixel;
constexpr int kRowsOut = 4;                                 // of a block of y
constexpr int kRowsIn = 2 * (kRowsOut - 1) + kMostTaps;     // which those meet
constexpr int kPacked = kMostTaps / 2 * 64 * kSwizzledRow;  // weights of 64 features
constexpr size_t kForwardBytes = kSwizzledAlignment + kPacked + kRowsIn * kRow;

// Of an image {height, width, channels}, row y from `first_x` on, what is outside as 0.
__device__ __forceinline__ void LoadPixel(const float* __restrict__ image, int height, int width,
                                          int channels, int y, int x, char* to) {
  float v[4] = {};
  if (static_cast<unsigned>(y) < static_cast<unsigned>(height) &&
      static_cast<unsigned>(x) < static_cast<unsigned>(width)) {
    const float* const from = image + (static_cast<int64_t>(y) * width + x) * channels;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < channels) v[c] = __ldg(from + c);
    }
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(TwoBf16(v[0], v[1]), TwoBf16(v[2], v[3]));
}

// A piece of a step of weights, {tile of 64 features, two rows of taps, row of a feature, piece}.
__global__ void __launch_bounds__(256)
    PackStem(int kernel, int channels, int features, const uint16_t* __restrict__ w,
             uint4* __restrict__ packed) {
  WaitForPrevious();
  const int at = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
  const int piece = at % 8, feature = at / 8 % features, step = at / 8 / features;
  if (step >= kMostTaps / 2) return;
  uint32_t two[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int y = step * 2 + piece / 4, x = piece % 4 * 2 + i / 4, c = i % 4;
    const bool there = y < kernel && x < kernel && c < channels;
    const uint32_t bits =
        there ? w[((static_cast<int64_t>(feature) * kernel + y) * kernel + x) * channels + c] : 0;
    two[i / 2] = i % 2 == 0 ? bits : two[i / 2] | bits << 16;
  }
  const int row = RowOfFeature(feature % 64);
  packed[((feature / 64 * (kMostTaps / 2) + step) * 64 + row) * 8 + (piece ^ (row & 7))] =
      make_uint4(two[0], two[1], two[2], two[3]);
}

// A block makes four rows of an image's output, of 64 features.
__device__ __forceinline__ void MultiplyRows(const Windows& s, const float* __restrict__ source,
                                             const uint4* __restrict__ weights,
                                             const float* __restrict__ bias, bool relu,
                                             void* __restrict__ result) {
  char* const packed = AlignMatrix(SharedMemory<char>());
  char* const rows = packed + kPacked;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int tiles = s.features / 64, bands = (s.height + kRowsOut - 1) / kRowsOut;
  int block = static_cast<int>(blockIdx.x);
  const int first_feature = block % tiles * 64;
  block /= tiles;
  const int first_y = block % bands * kRowsOut, row = block / bands;

  weights += first_feature / 64 * (kPacked / 16);
  for (int i = thread; i < kPacked / 16; i += kThreads) {
    CopyInBackground(packed + i * 16, weights + i);
  }
  const float* const image =
      source + static_cast<int64_t>(row) * s.source_height * s.source_width * s.channels;
  for (int i = thread; i < kRowsIn * kPixels; i += kThreads) {
    LoadPixel(image, s.source_height, s.source_width, s.channels,
              2 * first_y - s.padding + i / kPixels, i % kPixels - s.padding, rows + i * kPixel);
  }
  WaitForCopies();
  ShowToProducts();
  __syncthreads();

  for (int own = warp / 4; own < kRowsOut; own += 2) {
    const int y = first_y + own;
    if (y >= s.height) return;
    for (int first = 0; first < s.width; first += 64) {
      float sums[8][4] = {};
      KeepSums(sums);
      BeginProducts();
      for (int tap = 0; tap < s.kernel; ++tap) {
        const char* const from = rows + (2 * own + tap) * kRow + first * 16;
        const SharedMatrix across =
            Behind(MatrixIn(packed + tap / 2 * 64 * kSwizzledRow), tap % 2 * 64);
#pragma unroll
        for (int depth = 0; depth < 2; ++depth) {
          MultiplyWarpgroup<64>(sums, MatrixOfPieces(from + depth * 32, 128, 16),
                                Behind(across, depth * 32));
        }
      }
      CommitProducts();
      WaitForProducts<0>();
      KeepSums(sums);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int x = first + warp % 4 * 16 + half * 8 + lane / 4;
        if (x >= s.width) continue;
        FinishPlace(s, first_feature, bias, relu, result, sums, half,
                    ((row * s.height + y) * s.width + x) * s.features);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 3)
    MultiplyStem(Windows s, const float* __restrict__ source, const uint4* __restrict__ weights,
                 const float* __restrict__ bias, bool relu, void* __restrict__ result) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) MultiplyRows(s, source, weights, bias, relu, result);
}

// ---- dw.

constexpr int kRing = 2 * kMostTaps;                   // rows of an image: those of two windows
constexpr int kGradients = kMostWidth * kSwizzledRow;  // bytes of a row of dy, of 64 features
constexpr size_t kGradientBytes = kSwizzledAlignment + 2 * kGradients + kRing * kRow;

// A block makes 64 outs of all taps: each warpgroup four rows of them.
__device__ __forceinline__ void MultiplyRowsOfPlaces(const WeightGradient& s, const Chunks& chunks,
                                                     const float* __restrict__ x,
                                                     const StoredBf16* __restrict__ dy,
                                                     float* __restrict__ results, int out_width) {
  // Rows of the output.
  const int out_height = s.out_places / out_width;
  const OwnChunk mine = ChunkOfBlock(chunks, out_height, out_width);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int64_t first_row = mine.first_row;
  const int first_out = static_cast<int>(blockIdx.x) * 64;
  x += first_row * s.height * s.width * s.in;
  dy += first_row * s.out_places * s.out + first_out;
  char* const gradients = AlignMatrix(SharedMemory<char>());
  char* const ring = gradients + 2 * kGradients;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp, group = warp / 4;

  int base = 0;  // in the ring, of the window of the row that is loaded last
  const auto load = [&](int row) {
    char* const to = gradients + (row & 1) * kGradients;
    const StoredBf16* const from = dy + static_cast<int64_t>(row) * out_width * s.out;
    for (int i = thread; i < kMostWidth * 8; i += kThreads) {
      const int place = i / 8, piece = i % 8;
      const bool there = place < out_width;
      const StoredBf16* const own = from + (there ? place * s.out + piece * 8 : 0);
      char* const at = to + place * kSwizzledRow + (piece ^ (place & 7)) * 16;
      if (s.wide) {
        CopyOrZeroInBackground(at, own, there);
      } else {
        const uint2 low = LoadStored<false>(own, there ? 4 : 0);
        const uint2 high = LoadStored<false>(own + 4, there ? 4 : 0);
        *reinterpret_cast<uint4*>(at) = make_uint4(low.x, low.y, high.x, high.y);
      }
    }
    // The next row's window has two new rows, that of another image only such.
    const int y = row % out_height;
    const bool fresh = row == first || y == 0;
    const int new_rows = fresh ? s.kernel : 2 < s.kernel ? 2 : s.kernel;
    base += row == first ? 0 : fresh ? kMostTaps : 2;
    const float* const image =
        x + static_cast<int64_t>(row / out_height) * s.height * s.width * s.in;
    for (int i = thread; i < new_rows * kPixels; i += kThreads) {
      const int tap = s.kernel - new_rows + i / kPixels, pixel = i % kPixels;
      LoadPixel(image, s.height, s.width, s.in, 2 * y - s.padding + tap, pixel - s.padding,
                ring + ((base + tap) & (kRing - 1)) * kRow + pixel * kPixel);
    }
    CommitCopies();
  };

  float sums[4][4][4] = {};
  const auto keep = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) KeepSums(sums[i]);
  };
  if (first < end) load(first);
  keep();
  for (int row = first; row < end; ++row) {
    WaitForCopies();
    ShowToProducts();
    __syncthreads();  // and the products of the row before are made
    const char* const stage = gradients + (row & 1) * kGradients;
    const int own_base = base;
    BeginProducts();
    for (int depth = 0; depth < (out_width + 15) / 16; ++depth) {
      const SharedMatrix down = Behind(MatrixIn(stage, kGradients), depth * 16 * kSwizzledRow);
      // Taps that the kernel does not have are made too, and not written: no product is to wait.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tap = group * 4 + i;
        const char* const from = ring + ((own_base + tap) & (kRing - 1)) * kRow + depth * 16 * 16;
        MultiplyWarpgroup<32, true>(sums[i], down, MatrixOfPieces(from, 16, 128));
      }
    }
    CommitProducts();
    if (row + 1 < end) load(row + 1);
    WaitForProducts<0>();
  }
  keep();

  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tap_y = group * 4 + i;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int out = first_out + warp % 4 * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
        const int tap_x = column / 4, channel = column % 4;
        if (tap_y >= s.kernel || tap_x >= s.kernel || channel >= s.in) continue;
        results[static_cast<int64_t>(out) * s.columns + (tap_y * s.kernel + tap_x) * s.in +
                channel] = sums[i][j / 2][2 * half + j % 2];
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    MultiplyStemGradients(WeightGradient s, Chunks chunks, const float* __restrict__ x,
                          const StoredBf16* __restrict__ dy, float* __restrict__ results,
                          int out_width) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) MultiplyRowsOfPlaces(s, chunks, x, dy, results, out_width);
}

}  // namespace

bool GoesAsStem(const Conv2dShape& s) {
  return s.x_type == ElementType::kFp32 && s.groups == 1 && s.in <= 4 && s.out % 64 == 0 &&
         s.stride == 2 && s.dilation == 1 && s.kernel <= kMostTaps && s.out_width() <= kMostWidth &&
         WarpgroupProcessors() > 0;
}

int64_t StemWeightBytes(const Conv2dShape& s) { return s.out / 64 * kPacked; }

void PackForStem(const Queue& q, const Conv2dShape& s, const uint16_t* w, void* packed) {
  const auto pieces = static_cast<uint32_t>(StemWeightBytes(s) / 16);
  Launch(q, dim3(pieces / 256), dim3(256), 0, PackStem, static_cast<int>(s.kernel),
         static_cast<int>(s.in), static_cast<int>(s.out), w, static_cast<uint4*>(packed));
}

// Any number of rows.
void MultiplyAllOfStem(const Queue& q, Windows s, int64_t rows, const float* x,
                       const uint4* weights, const float* bias, bool relu, void* y) {
  const int64_t source_row = int64_t{s.source_height} * s.source_width * s.channels;
  const int64_t result_row = int64_t{s.height} * s.width * s.features;
  s.wide_result = IsAligned16(y);
  AllowShared(MultiplyStem, kForwardBytes);
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(source_row, result_row));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    const int64_t blocks = s.rows * CeilDiv(s.height, kRowsOut) * (s.features / 64);
    Launch(q, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), kForwardBytes, MultiplyStem, s,
           x + row * source_row, weights, bias, relu,
           static_cast<char*>(y) + row * result_row * ElementBytes(s.result_type));
  }
}

void LaunchStemWeightGradient(const Queue& q, const WeightGradient& s, int64_t out_width,
                              const Chunks& leaves, uint32_t chunks, const float* x,
                              const StoredBf16* dy, float* results) {
  AllowShared(MultiplyStemGradients, kGradientBytes);
  Launch(q, dim3(static_cast<uint32_t>(s.out / 64), chunks, static_cast<uint32_t>(leaves.count)),
         dim3(kThreads), kGradientBytes, MultiplyStemGradients, s, leaves, x, dy, results,
         static_cast<int>(out_width));
}

}  // namespace lockstep::device::cuda
