// A small product and a batch norm in one kernel, where each leaf normalizes by its own moments and
// has no more rows than a tile: a dense layer and the norm of what it makes, or what comes back
// through a dense layer and the backward of the norm before it.
//
// A block makes a tile of whole leaves' rows, then its norm: a warp takes a column of a leaf, a
// lane a row of it. Order: a product's is that of small_products.cu, and a norm's that of
// row_reduction.h, where such a leaf is one chunk whose lanes have a row each. So the bits are
// those of two calls.
#include <algorithm>
#include <cstdint>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/norm_passes.h"
#include "worker/device/cuda/small_product_tiles.h"
#include "worker/device/cuda/tensor_core.h"

namespace lockstep::device::cuda {
namespace {

using namespace small_products;

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
static_assert(kWarps >= kMostSlices && RowOrder<float>::kLanes == kWarp);

// A tile has the leaves from first[tile] to first[tile + 1]; leaf l the rows from row[l] to
// row[l + 1].
struct LeafTiles {
  int count = 0;
  int first[kMostLeaves + 1];
  int row[kMostLeaves + 1];
};

// Of a block: what it makes, and where its thread's four neighbours are.
template <class I>
struct OwnTile {
  static constexpr int kRows = I::Shape::kRows, kColumns = I::Shape::kColumns, kPitch = I::kPitch;
  static constexpr int kAcross = kColumns / 4;
  static_assert(kRows * kAcross <= kThreads);

  __device__ __forceinline__ OwnTile(const Problem& p, const LeafTiles& tiles)
      : row(static_cast<int>(threadIdx.x) / kAcross),
        column(static_cast<int>(threadIdx.x) % kAcross * 4) {
    const int tile = static_cast<int>(blockIdx.x) / p.column_tiles;
    first_column = static_cast<int>(blockIdx.x) % p.column_tiles * kColumns;
    columns = min(p.n - first_column, kColumns);
    first_leaf = tiles.first[tile];
    leaves = tiles.first[tile + 1] - first_leaf;
    first_row = tiles.row[first_leaf];
    rows = tiles.row[first_leaf + leaves] - first_row;
    here = row < rows && column < columns;
    at = (int64_t{first_row} + row) * p.n + first_column + column;
  }

  __device__ __forceinline__ float4* Four(float* tile) const {
    return reinterpret_cast<float4*>(tile + row * kPitch + column);
  }

  int row, column;  // of the four, in the tile
  int first_row, rows, first_column, columns, first_leaf, leaves;
  bool here;   // the four are in the result
  int64_t at;  // there
};

// A column of a leaf.
struct Column {
  int leaf, column;  // of the tile
  int begin, n;      // rows of the tile
  bool is_none;
};
template <class I>
__device__ __forceinline__ Column ColumnOf(const OwnTile<I>& own, const LeafTiles& tiles,
                                           int index) {
  const int leaf = index / own.kColumns, column = index % own.kColumns;
  const int* const row = tiles.row + own.first_leaf + leaf;
  return {leaf, column, row[0] - own.first_row, row[1] - row[0], column >= own.columns};
}

// The tree over a leaf's n rows, one a lane; it comes to lane 0.
template <class Combine>
__device__ __forceinline__ void ReduceLanes(int n, Partial<1, 2>* own, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int stride = kWarp / 2; stride > 0; stride /= 2) {
    Partial<1, 2> other;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      other.plane[plane].at[0] = __shfl_down_sync(0xFFFFFFFFu, own->plane[plane].at[0], stride);
    }
    const int count_a = (n + 2 * stride - 1 - lane) / (2 * stride);
    const int count_b = (n + stride - 1 - lane) / (2 * stride);
    if (lane < stride && count_b > 0) {
      combine(static_cast<float>(count_a), static_cast<float>(count_b), own, other);
    }
  }
}
__device__ __forceinline__ float FromFirstLane(float v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }

// Threads beyond the slices' only take part in the norm.
template <class I>
__device__ __forceinline__ void SumOwnTile(const Problem& p, const OwnTile<I>& own,
                                           const typename I::TypeA* __restrict__ a,
                                           const typename I::TypeB* __restrict__ b) {
  if (static_cast<int>(threadIdx.x) / kWarp >= p.slices) return;
  constexpr bool kTransposeB = I::Stored::kTransposeB;
  SumTile<I>(p, a + int64_t{p.a_row} * own.first_row,
             b + (kTransposeB ? int64_t{p.b_row} : 1) * own.first_column, own.rows,
             p.n - own.first_column);
}

template <class I>
__global__ void __launch_bounds__(kThreads, I::kBlocks)
    MultiplyAndNormalize(Problem p, LeafTiles tiles, const typename I::TypeA* __restrict__ a,
                         const typename I::TypeB* __restrict__ b, const float* __restrict__ bias,
                         float* __restrict__ c, NormForward norm) {
  WaitForPrevious();
  const OwnTile<I> own(p, tiles);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const bool knows = thread < own.columns;
  const float weight = knows ? norm.weight[own.first_column + thread] : 0;
  const float shift = knows ? norm.bias[own.first_column + thread] : 0;
  SumOwnTile(p, own, a, b);
  __syncthreads();
  float* const tile = SharedMemory<float>();  // over the first slice's sums
  float* const weights = reinterpret_cast<float*>(SharedMemory<char>() + p.slices * I::kGroupBytes);
  float* const shifts = weights + own.kColumns;
  if (knows) weights[thread] = weight, shifts[thread] = shift;
  if (own.here) {
    const float4 sum =
        WithBiasAndRelu(p, bias == nullptr ? nullptr : bias + own.first_column + own.column, 4,
                        SumOfSlices<I>(p, own.row, own.column));
    *own.Four(tile) = sum;
    *reinterpret_cast<float4*>(c + own.at) = sum;
  }
  __syncthreads();
  using Moments = MomentsReduction<float>;
  for (int i = thread / kWarp; i < own.leaves * own.kColumns; i += kWarps) {
    const Column column = ColumnOf(own, tiles, i);
    if (column.is_none) continue;
    float* const from = tile + column.begin * own.kPitch + column.column;
    const bool has_row = lane < column.n;
    Held<float, 1> pivot, value[1];
    pivot.Load(from);
    value[0].Load(from + (has_row ? lane * own.kPitch : 0));
    Partial<1, 2> sum = {};
    if (has_row) Moments::AddGroup<true>(0, 1, value, pivot, &sum);
    ReduceLanes(column.n, &sum, Moments::Combine<1>);
    float mean, m2;
    Moments::MergeOne(column.n, pivot.At(0), sum, &mean, &m2);
    mean = FromFirstLane(mean), m2 = FromFirstLane(m2);
    if (lane == 0) {
      const int64_t at =
          (own.first_leaf + column.leaf) * norm.stride + own.first_column + column.column;
      norm.mean[at] = mean, norm.m2[at] = m2;
    }
    const float scale =
        InverseDeviation(m2 / static_cast<float>(column.n), norm.epsilon) * weights[column.column];
    if (!has_row) continue;
    const float y = Fma(value[0].At(0) - mean, scale, shifts[column.column]);
    from[lane * own.kPitch] = norm.relu ? Relu(y) : y;
  }
  __syncthreads();
  if (own.here) *reinterpret_cast<float4*>(norm.y + own.at) = *own.Four(tile);
}

// What is written may lie over what of the norm is read: a block's own.
template <class I>
__global__ void __launch_bounds__(kThreads, I::kBlocks)
    MultiplyAndGoBack(Problem p, LeafTiles tiles, const typename I::TypeA* __restrict__ a,
                      const typename I::TypeB* __restrict__ b, NormBackward norm) {
  WaitForPrevious();
  const OwnTile<I> own(p, tiles);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  // On their way while the sum is made: the thread's four of x and y, and the constants of the
  // first channels.
  float* const inputs = reinterpret_cast<float*>(SharedMemory<char>() + p.slices * I::kGroupBytes);
  float* const outputs = inputs + own.kRows * own.kPitch;
  if (own.here) {
    CopyInBackground(own.Four(inputs), norm.x + own.at);
    if (norm.y != nullptr) CopyInBackground(own.Four(outputs), norm.y + own.at);
  }
  const int all = own.leaves * own.kColumns;
  float mean = 0, m2 = 0;
  const auto load = [&](int i) {
    const Column column = ColumnOf(own, tiles, i);
    if (column.is_none) return;
    const int64_t at =
        (own.first_leaf + column.leaf) * norm.moments.stride + own.first_column + column.column;
    mean = norm.moments.mean[at], m2 = norm.moments.spread[at];
  };
  if (thread < all) load(thread);
  const bool knows = thread < own.columns;
  const float weight = knows ? norm.weight[own.first_column + thread] : 0;
  SumOwnTile(p, own, a, b);
  __syncthreads();
  float* const tile = SharedMemory<float>();  // over the first slice's sums
  float* const centres = outputs + own.kRows * own.kPitch;
  float* const inverses = centres + all;
  float* const weights = inverses + all;
  if (knows) weights[thread] = weight;
  if (own.here) {
    float4 g = SumOfSlices<I>(p, own.row, own.column);
    WaitForCopies();
    if (norm.y != nullptr) {
      const float4 y = *own.Four(outputs);
      g = make_float4(ReluGradient(y.x, g.x), ReluGradient(y.y, g.y), ReluGradient(y.z, g.z),
                      ReluGradient(y.w, g.w));
    }
    *own.Four(tile) = g;
  }
  for (int i = thread; i < all; i += kThreads) {
    if (i >= kThreads) load(i);
    const int n = ColumnOf(own, tiles, i).n;
    centres[i] = mean;
    inverses[i] = InverseDeviation(m2 / static_cast<float>(n), norm.epsilon);
  }
  __syncthreads();
  for (int i = thread / kWarp; i < all; i += kWarps) {
    const Column column = ColumnOf(own, tiles, i);
    if (column.is_none) continue;
    const bool has_row = lane < column.n;
    const int at = (column.begin + (has_row ? lane : 0)) * own.kPitch + column.column;
    const float g = tile[at], centred = inputs[at] - centres[i], inverse = inverses[i];
    Partial<1, 2> sum = {};
    if (has_row) {
      sum.plane[0].at[0] += g;
      sum.plane[1].at[0] = Fma(g, centred, sum.plane[1].at[0]);
    }
    ReduceLanes(column.n, &sum, [](float, float, Partial<1, 2>* into, const Partial<1, 2>& more) {
      AddPartial(into, more);
    });
    const float sum_dy = FromFirstLane(sum.plane[0].at[0]);
    const float sum_dy_xhat = FromFirstLane(sum.plane[1].at[0]) * inverse;
    if (lane == 0) {
      const int64_t to =
          (own.first_leaf + column.leaf) * norm.stride + own.first_column + column.column;
      norm.sum_dy[to] = sum_dy, norm.sum_dy_xhat[to] = sum_dy_xhat;
    }
    if (!has_row) continue;
    const float n = static_cast<float>(column.n), scale = inverse * weights[column.column];
    const float slope = inverse * (sum_dy_xhat / n);
    tile[at] = scale * Fma(0.0f - centred, slope, g - sum_dy / n);
  }
  __syncthreads();
  if (own.here) *reinterpret_cast<float4*>(norm.dx + own.at) = *own.Four(tile);
}

// ---- launches.

// The most leaves that a tile of so many rows takes, one tile behind the other.
LeafTiles TilesOf(const Leaves& leaves, int rows) {
  LeafTiles tiles;
  for (int leaf = 0; leaf < leaves.count; ++leaf) {
    const int64_t end = leaves.begin[leaf + 1];
    if (leaf == 0 || end - tiles.row[tiles.first[tiles.count - 1]] > rows) {
      tiles.first[tiles.count++] = leaf;
    }
    tiles.row[leaf] = static_cast<int>(leaves.begin[leaf]);
    tiles.row[leaf + 1] = static_cast<int>(end);
  }
  tiles.first[tiles.count] = leaves.count;
  return tiles;
}

template <class I, class... Norm>
void LaunchTiles(const Queue& q, Problem p, const Leaves& leaves, const void* a, const void* b,
                 void (*kernel)(Problem, LeafTiles, const typename I::TypeA*,
                                const typename I::TypeB*, Norm...),
                 Norm... norm) {
  using T = typename I::Shape;
  p.m = static_cast<int>(leaves.total());
  p.column_tiles = static_cast<int>(CeilDiv(p.n, T::kColumns));
  const LeafTiles tiles = TilesOf(leaves, T::kRows);
  // A tile has no more leaves than rows.
  constexpr size_t kOfNorm =
      (2 * T::kRows * I::kPitch + (2 * T::kRows + 2) * T::kColumns) * sizeof(float);
  const size_t shared = static_cast<size_t>(p.slices) * I::kGroupBytes + kOfNorm;
  AllowShared(kernel, shared);
  Launch(q, dim3(static_cast<uint32_t>(tiles.count * p.column_tiles)), dim3(kThreads), shared,
         kernel, p, tiles, static_cast<const typename I::TypeA*>(a),
         static_cast<const typename I::TypeB*>(b), norm...);
}

constexpr int kMostLeafRows = 32;

// Whether a product of these leaves' rows and its norm are one launch: else a norm has more to
// share among blocks, or the product larger tiles.
bool AreSmall(const SmallProduct& s, const Leaves& leaves) {
  for (int leaf = 0; leaf < leaves.count; ++leaf) {
    const int64_t rows = leaves.begin[leaf + 1] - leaves.begin[leaf];
    if (rows < 1 || rows > kMostLeafRows) return false;
  }
  return leaves.count > 0 && !s.transpose_a && s.count == 1 && !s.accumulate && s.c_row == s.n &&
         s.n % 4 == 0 && s.bf16 == s.a_floats &&
         CeilDiv(leaves.total(), 32) * CeilDiv(s.n, 32) < 2 * kMultiprocessors;
}

// Calls run with the kernels' instance.
template <class L, bool kWide, class Run>
void WithTile(const SmallProduct& s, const Leaves& leaves, const Run& run) {
  if (!s.bf16) {
    return run.template operator()<Instance<Fp32, float, float, kWide, L, Tile<32, 16>>>();
  }
  for (int leaf = 0; leaf < leaves.count; ++leaf) {
    if (leaves.begin[leaf + 1] - leaves.begin[leaf] <= 16) continue;
    return run.template operator()<Instance<Bf16, float, StoredBf16, kWide, L, Tile<32, 32>>>();
  }
  run.template operator()<Instance<Bf16, float, StoredBf16, kWide, L, Tile<16, 32>>>();
}

template <class L>
bool FactorsAreWide(const SmallProduct& s, const void* a, const void* b) {
  const auto* const floats = static_cast<const float*>(a);
  return s.bf16 ? AreWide<L>(s, floats, static_cast<const StoredBf16*>(b))
                : AreWide<L>(s, floats, static_cast<const float*>(b));
}

}  // namespace

bool MultiplySmallThenNorm(const Queue& q, const SmallProduct& s, const Leaves& leaves,
                           const void* a, const void* b, const float* bias, float* c,
                           const NormForward& norm) {
  if (!AreSmall(s, leaves) || !s.transpose_b || !FactorsAreWide<Forward>(s, a, b) ||
      !IsAligned16(c) || !IsAligned16(norm.y)) {
    return false;
  }
  WithTile<Forward, true>(s, leaves, [&]<class I>() {
    LaunchTiles<I>(q, ProblemOf<typename I::Factor>(s, true), leaves, a, b, MultiplyAndNormalize<I>,
                   bias, c, norm);
  });
  return true;
}

bool MultiplySmallThenNormBackward(const Queue& q, const SmallProduct& s, const Leaves& leaves,
                                   const void* a, const void* b, const NormBackward& norm) {
  if (!AreSmall(s, leaves) || s.transpose_b || s.relu || norm.moments.divisor != 0 ||
      !IsAligned16(norm.x) || !IsAligned16(norm.y) || !IsAligned16(norm.dx)) {
    return false;
  }
  const auto launch = [&]<class I>() {
    LaunchTiles<I>(q, ProblemOf<typename I::Factor>(s, true), leaves, a, b, MultiplyAndGoBack<I>,
                   norm);
  };
  // The rows of A are as long as the number of classes, perhaps.
  if (FactorsAreWide<InputGradient>(s, a, b)) {
    WithTile<InputGradient, true>(s, leaves, launch);
  } else {
    WithTile<InputGradient, false>(s, leaves, launch);
  }
  return true;
}

}  // namespace lockstep::device::cuda
