// Rows of a table at positions that are floats; and labels as rows of the identity.
#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The row of a position, or -1.
__device__ __forceinline__ int RowOf(float x, int vocabulary) {
  const float last = static_cast<float>(vocabulary - 1);  // exact: at most 2^24
  if (!(x >= -0.5f && x <= last + 0.5f)) return -1;
  const int row = static_cast<int>(x + 0.5f);
  return row < vocabulary ? row : vocabulary - 1;
}

__device__ __forceinline__ uint32_t ThreadIndex() { return blockIdx.x * kThreads + threadIdx.x; }
dim3 GridOf(int64_t threads) { return dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))); }

template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    TakeRows(uint32_t threads, int vocabulary, int64_t features, Divisor by_units,
             const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  uint32_t position = index;
  const uint32_t unit = by_units.TakeRemainder(position);
  const int row = RowOf(x[position], vocabulary);
  Lanes<kLanes> values;
  if (row >= 0) {
    values = LoadLanes<kLanes>(weight + row * features + unit * kLanes);
  } else {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) values.at[k] = __builtin_nanf("");
  }
  StoreLanes<kLanes>(y + int64_t{index} * kLanes, values);
}

// Zeroes n elements of each leaf.
constexpr int kZeros = 8;  // of a thread
__global__ void __launch_bounds__(kThreads) ClearLeaves(int64_t n, float* to, int64_t stride) {
  WaitForPrevious();
  const int64_t first = int64_t{blockIdx.x} * kThreads * kZeros + threadIdx.x;
  to += blockIdx.y * stride;
#pragma unroll
  for (int k = 0; k < kZeros; ++k) {
    if (first + k * kThreads < n) to[first + k * kThreads] = 0.0f;
  }
}

// A warp for each position, and 32 vectors of its features. The first position of a row in a leaf
// sums those of the leaf that have the row.
template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    SumRows(int64_t positions, Leaves leaves, int vocabulary, int features,
            const float* __restrict__ x, const float* __restrict__ dy, float* __restrict__ dweight,
            int64_t stride) {
  WaitForPrevious();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t position =
      int64_t{blockIdx.x} * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  if (position >= positions) return;
  const int row = RowOf(x[position], vocabulary);
  if (row < 0) return;
  int leaf = 0;
  while (position >= leaves.begin[leaf + 1]) ++leaf;
  for (int64_t p = leaves.begin[leaf]; p < position; p += kWarp) {
    const bool is_same = p + lane < position && RowOf(x[p + lane], vocabulary) == row;
    if (__ballot_sync(kAllLanes, is_same) != 0) return;
  }
  const int feature = (static_cast<int>(blockIdx.y) * kWarp + lane) * kLanes;
  const bool inside = feature < features;
  const int64_t end = leaves.begin[leaf + 1];
  Lanes<kLanes> sum = {};
  for (int64_t p = position; p < end; p += kWarp) {
    const bool is_same = p + lane < end && RowOf(x[p + lane], vocabulary) == row;
    unsigned same = __ballot_sync(kAllLanes, is_same);
    while (same != 0) {
      constexpr int kLoads = 4;  // in flight
      Lanes<kLanes> values[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        values[k] = {};  // which adds nothing
        if (same == 0) continue;
        const int64_t from = p + __ffs(static_cast<int>(same)) - 1;
        same &= same - 1;
        if (inside) values[k] = LoadLanes<kLanes>(dy + from * features + feature);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) sum.at[j] = sum.at[j] + values[k].at[j];
      }
    }
  }
  if (!inside) return;
  StoreLanes<kLanes>(dweight + leaf * stride + int64_t{row} * features + feature, sum);
}

template <int kLanes>
void RunForward(const Queue& q, int64_t n, int64_t vocabulary, int64_t features, const float* x,
                const float* weight, float* y) {
  const Divisor by_units(features / kLanes);
  ForEachPart(n, features, [&](int64_t first, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * features / kLanes);
    Launch(q, GridOf(threads), dim3(kThreads), 0, TakeRows<kLanes>, threads, vocabulary, features,
           by_units, x + first, weight, y + first * features);
  });
}

__global__ void __launch_bounds__(kThreads)
    MarkLabels(uint32_t threads, Divisor by_classes, const int32_t* __restrict__ labels,
               float* __restrict__ out) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  uint32_t row = index;
  const auto column = static_cast<int32_t>(by_classes.TakeRemainder(row));
  out[index] = labels[row] == column ? 1.0f : 0.0f;
}

}  // namespace

void EmbeddingForward(const Queue& q, int64_t n, int64_t vocabulary, int64_t features,
                      const float* x, const float* weight, float* y) {
  const bool by_four = TakenByFour(features, weight, y);
  (by_four ? RunForward<4> : RunForward<1>)(q, n, vocabulary, features, x, weight, y);
}

void EmbeddingBackward(const Queue& q, const Leaves& leaves, int64_t vocabulary, int64_t features,
                       const float* x, const float* dy, float* dweight, int64_t stride) {
  const int64_t elements = vocabulary * features;
  const dim3 blocks(static_cast<unsigned>(CeilDiv(elements, int64_t{kThreads} * kZeros)),
                    static_cast<unsigned>(leaves.count));
  Launch(q, blocks, dim3(kThreads), 0, ClearLeaves, elements, dweight, stride);
  if (leaves.total() == 0) return;
  const bool by_four = TakenByFour(features, dy, dweight) && stride % 4 == 0;
  const int64_t tile = by_four ? 4 * kWarp : kWarp;
  const dim3 grid(static_cast<unsigned>(CeilDiv(leaves.total(), kThreads / kWarp)),
                  static_cast<unsigned>(CeilDiv(features, tile)));
  Launch(q, grid, dim3(kThreads), 0, by_four ? SumRows<4> : SumRows<1>, leaves.total(), leaves,
         vocabulary, features, x, dy, dweight, stride);
}

void OneHot(const Queue& q, int64_t rows, int64_t classes, const int32_t* labels, float* out) {
  ForEachPart(rows, classes, [&](int64_t first, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * classes);
    Launch(q, GridOf(threads), dim3(kThreads), 0, MarkLabels, threads, Divisor(classes),
           labels + first, out + first * classes);
  });
}

}  // namespace lockstep::device::cuda
