// Reducing the rows of each leaf of x {rows, columns} to one row: sums, moments.
//
// The order is a function of the leaf's n rows and of how they are stored, so a column's bits
// depend neither on other columns nor on other leaves, nor on how a launch is cut. Rows are cut
// into chunks of ChunkRows(n). In a chunk lane l of kLanes takes rows l, l + kLanes, ... in order,
// in float; lanes are combined by a tree, strides kLanes / 2, ..., 2, 1. Chunks are merged in
// double: lane k % kLanes takes chunk k, in order, then the same tree.
//
// A block is {columns of a tile, kLanes, chunks}. Where a block holds all chunks of a leaf it
// merges them itself; otherwise a second launch does, from partial results in the workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/philox.h"  // LOCKSTEP_DEVICE
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

// Of rows that are stored as T. Those of bf16 bring half the bytes, and twice the columns to a
// thread: its lanes take more of them, for the time of a tree.
template <class T>
struct RowOrder {
  static constexpr bool kFloat = sizeof(T) == sizeof(float);
  static constexpr int kLanes = kFloat ? 32 : 16;
  static constexpr int64_t kChunkRows = kFloat ? 128 : 256;  // the fewest; a multiple of kLanes
  static constexpr int64_t kMostChunks = 128;

  LOCKSTEP_DEVICE static int64_t ChunkRows(int64_t n) {
    constexpr int64_t kStep = kChunkRows * kMostChunks;
    return kChunkRows * ((n + kStep - 1) / kStep);
  }
};

// What a lane, or a chunk, knows of its columns.
template <int kVector, int kPlanes>
struct Partial {
  Lanes<kVector> plane[kPlanes];
};

// The rows that a lane takes: `count` rows, kLanes apart, from `first` of the call's rows.
struct LaneRows {
  int leaf = 0;
  int64_t n = 0;           // rows of the leaf
  int64_t leaf_first = 0;  // row of the call
  int64_t first = 0;
  int count = 0;
};

// A reduction is a struct with
//   Order, a RowOrder; static constexpr int kPlanes, kMostThreads (of a block);
//   Accumulate(rows, column, Partial*): of a lane; at least one row;
//   Combine(count_a, count_b, Partial* a, b): a takes b in; counts of rows, not 0;
//   Merge(chunks, LaneSum, column): writes what all of a leaf's chunks come to. All threads of
//   the block call it.

// The part of a call that one launch covers, so that its partial results fit the workspace.
struct ReductionPart {
  int first_leaf = 0;
  int64_t first_column = 0;
  int columns = 0;
  int chunks = 0;  // at most, of a leaf: the partial results that a leaf has room for
};

// What is merged: a leaf's chunks.
struct LeafOfChunks {
  int leaf = 0;
  int64_t leaf_first = 0, n = 0, chunk_rows = 0;  // rows
  const float* partials = nullptr;                // {chunks, planes, columns}, at the first column
  int columns = 0;
};

// Sums over the kLanes lanes of a block, by a tree in shared memory. All threads of the block
// take part in barriers, those that are `active` in sums.
template <int kVector, int kLanes>
class LaneSum {
 public:
  __device__ LaneSum(const LeafOfChunks& chunks, double* shared, bool active)
      : chunks_(chunks), shared_(shared), active_(active) {}

  // Calls take(rows, Partial) for the chunks of this lane.
  template <int kPlanes, class Take>
  __device__ __forceinline__ void ForEachChunk(const Take& take) const {
    if (!active_) return;
    constexpr int kGroup = kVector == 1 ? 4 : 1;  // whose loads are in flight
    const int64_t size = static_cast<int64_t>(kPlanes) * chunks_.columns;
    const int64_t step = kLanes * chunks_.chunk_rows;
    int64_t left = chunks_.n - static_cast<int>(threadIdx.y) * chunks_.chunk_rows;  // rows
    const float* from = chunks_.partials + static_cast<int>(threadIdx.y) * size;
    for (; left > 0; left -= kGroup * step, from += kGroup * kLanes * size) {
      Partial<kVector, kPlanes> chunk[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (k * step >= left) continue;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            chunk[k].plane[plane].at[v] = from[k * kLanes * size + plane * chunks_.columns + v];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const int64_t rows = left - k * step;
        if (rows <= 0) continue;
        take(static_cast<double>(rows < chunks_.chunk_rows ? rows : chunks_.chunk_rows), chunk[k]);
      }
    }
  }

  // The sum over lanes, in lane 0.
  __device__ __forceinline__ void Sum(double (&value)[kVector]) {
    const int lane = static_cast<int>(threadIdx.y);
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) {
      if (stride * chunks_.chunk_rows >= chunks_.n) continue;  // those lanes had no chunk
      if (active_ && lane >= stride && lane < 2 * stride) Write(lane, value);
      __syncthreads();
      if (active_ && lane < stride) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) value[v] += At(lane + stride)[v];
      }
    }
  }
  // From lane 0 to all lanes.
  __device__ __forceinline__ void Broadcast(double (&value)[kVector]) {
    if (chunks_.n <= chunks_.chunk_rows) return;       // only lane 0 had one
    if (active_ && threadIdx.y == 0) Write(0, value);  // a place that Sum does not use
    __syncthreads();
    if (!active_) return;
#pragma unroll
    for (int v = 0; v < kVector; ++v) value[v] = At(0)[v];
  }
  __device__ bool is_first() const { return active_ && threadIdx.y == 0; }

  static size_t bytes(int64_t width) {
    return sizeof(double) * kLanes * kVector * static_cast<size_t>(width);
  }

 private:
  __device__ double* At(int lane) const {
    return shared_ +
           (lane * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
  }
  __device__ void Write(int lane, const double (&value)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) At(lane)[v] = value[v];
  }

  const LeafOfChunks chunks_;
  double* const shared_;
  const bool active_;
};

// For reductions that add.
template <int kVector, int kPlanes>
__device__ __forceinline__ void AddPartial(Partial<kVector, kPlanes>* a,
                                           const Partial<kVector, kPlanes>& b) {
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) a->plane[plane].at[v] += b.plane[plane].at[v];
  }
}
template <int kVector, int kLanes, int kPlanes>
__device__ __forceinline__ void SumChunks(LaneSum<kVector, kLanes>& lanes,
                                          double (&total)[kPlanes][kVector]) {
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) total[plane][v] = 0;
  }
  lanes.template ForEachChunk<kPlanes>([&](double, const Partial<kVector, kPlanes>& chunk) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        total[plane][v] += static_cast<double>(chunk.plane[plane].at[v]);
      }
    }
  });
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    if (plane > 0) __syncthreads();
    lanes.Sum(total[plane]);
  }
}

constexpr int kMergeColumns = 32;  // of a block

// What a chunk of a leaf of n rows, `rows` rows of the call from `first` on, comes to, in lane 0 of
// its part of the block; `here`: the thread has columns, from `column` of the call on. All threads
// of the block call it.
template <int kVector, class Reduction>
__device__ __forceinline__ void ReduceChunk(const Reduction& reduction, int leaf, int64_t n,
                                            int64_t leaf_first, int64_t first, int rows,
                                            int64_t column, bool here,
                                            Partial<kVector, Reduction::kPlanes>* sum) {
  constexpr int kPlanes = Reduction::kPlanes, kLanes = Reduction::Order::kLanes;
  const int lane = static_cast<int>(threadIdx.y), width = static_cast<int>(blockDim.x);
  Partial<kVector, kPlanes>& values = *sum;
  values = {};
  const int own = (rows + kLanes - 1 - lane) / kLanes;
  if (here && own > 0) {
    reduction.Accumulate({leaf, n, leaf_first, first + lane, own}, column, &values);
  }
  const int x = static_cast<int>(threadIdx.x), z = static_cast<int>(threadIdx.z);
  auto* slots = SharedMemory<Partial<kVector, kPlanes>>() + z * kLanes * width + x;
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    if (lane >= stride && lane < 2 * stride) slots[lane * width] = values;
    __syncthreads();
    if (lane >= stride) continue;
    // Here a lane stands for the rows that are the lane, modulo twice the stride.
    const int count_a = (rows + 2 * stride - 1 - lane) / (2 * stride);
    const int count_b = (rows + stride - 1 - lane) / (2 * stride);
    if (count_b > 0) {
      Reduction::Combine(static_cast<float>(count_a), static_cast<float>(count_b), &values,
                         slots[(lane + stride) * width]);
    }
  }
}

// Merges a leaf of n rows whose chunks are all in the block, one a part of it; `stores`: the thread
// has in `values` what one came to. All threads of the block call it.
template <int kVector, class Reduction>
__device__ __forceinline__ void MergeBlock(const Reduction& reduction, int leaf, int64_t leaf_first,
                                           int64_t n, int64_t chunk_rows, int64_t column, bool here,
                                           bool stores,
                                           const Partial<kVector, Reduction::kPlanes>& values) {
  constexpr int kPlanes = Reduction::kPlanes, kLanes = Reduction::Order::kLanes;
  const int x = static_cast<int>(threadIdx.x), z = static_cast<int>(threadIdx.z),
            width = static_cast<int>(blockDim.x);
  // The partial results go to shared memory, behind what sums need.
  __syncthreads();
  double* const sums = SharedMemory<double>();
  float* const chunks = reinterpret_cast<float*>(sums + kLanes * kVector * width);
  const int tile = kVector * width;
  if (stores) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        chunks[(z * kPlanes + plane) * tile + x * kVector + v] = values.plane[plane].at[v];
      }
    }
  }
  __syncthreads();
  const LeafOfChunks all = {leaf, leaf_first, n, chunk_rows, chunks + x * kVector, tile};
  reduction.template Merge<kVector>(all, LaneSum<kVector, kLanes>(all, sums, z == 0 && here),
                                    column);
}

// Bytes of shared memory that both take, of a block of so many columns' threads and chunks.
template <int kVector, class Reduction>
size_t ReductionBytes(int64_t width, int chunks) {
  constexpr int kLanes = Reduction::Order::kLanes;
  constexpr size_t kPartial = sizeof(Partial<kVector, Reduction::kPlanes>);
  const size_t partials = kPartial * static_cast<size_t>(width * chunks);
  return std::max(kLanes * partials, LaneSum<kVector, kLanes>::bytes(width) + partials);
}

template <class Reduction, int kVector>
__global__ void __launch_bounds__(Reduction::kMostThreads)
    ReduceChunks(Reduction reduction, Leaves leaves, ReductionPart part, float* partials) {
  WaitForPrevious();
  using Order = typename Reduction::Order;
  constexpr int kPlanes = Reduction::kPlanes;
  const int local_leaf = static_cast<int>(blockIdx.z), leaf = part.first_leaf + local_leaf;
  const int64_t leaf_first = leaves.begin[leaf], n = leaves.begin[leaf + 1] - leaf_first;
  const int64_t chunk_rows = Order::ChunkRows(n);
  const int first_chunk = static_cast<int>(blockIdx.y * blockDim.z);
  if (first_chunk > 0 && first_chunk * chunk_rows >= n) return;
  const int x = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.y),
            z = static_cast<int>(threadIdx.z), width = static_cast<int>(blockDim.x);
  const int column = (static_cast<int>(blockIdx.x) * width + x) * kVector;
  const bool here = column < part.columns;
  const int chunk = first_chunk + z;
  const int64_t chunk_first = chunk * chunk_rows;
  const int64_t behind = n - chunk_first;
  const int rows = static_cast<int>(behind < 0 ? 0 : behind < chunk_rows ? behind : chunk_rows);

  Partial<kVector, kPlanes> values;
  ReduceChunk<kVector>(reduction, leaf, n, leaf_first, leaf_first + chunk_first, rows,
                       part.first_column + column, here, &values);
  const bool stores = lane == 0 && here && rows > 0;
  if (gridDim.y > 1) {  // MergeChunks does the rest
    if (!stores) return;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const int64_t at = (static_cast<int64_t>(local_leaf) * part.chunks + chunk) * kPlanes + plane;
      StoreLanes<kVector>(partials + at * part.columns + column, values.plane[plane]);
    }
    return;
  }
  MergeBlock<kVector>(reduction, leaf, leaf_first, n, chunk_rows, part.first_column + column, here,
                      stores, values);
}

template <class Reduction>
__global__ void __launch_bounds__(kMergeColumns* Reduction::Order::kLanes)
    MergeChunks(Reduction reduction, Leaves leaves, ReductionPart part, const float* partials) {
  WaitForPrevious();
  using Order = typename Reduction::Order;
  const int local_leaf = static_cast<int>(blockIdx.y), leaf = part.first_leaf + local_leaf;
  const int64_t leaf_first = leaves.begin[leaf], n = leaves.begin[leaf + 1] - leaf_first;
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int64_t before = static_cast<int64_t>(local_leaf) * part.chunks * Reduction::kPlanes;
  const LeafOfChunks all = {
      leaf,        leaf_first, n, Order::ChunkRows(n), partials + before * part.columns + column,
      part.columns};
  reduction.template Merge<1>(
      all, LaneSum<1, Order::kLanes>(all, SharedMemory<double>(), column < part.columns),
      part.first_column + column);
}

template <class Reduction, int kVector>
void ReduceRowsBy(const Queue& q, const Reduction& reduction, const Leaves& leaves, int64_t columns,
                  int most_chunks_a_block) {
  using Order = typename Reduction::Order;
  constexpr int kPlanes = Reduction::kPlanes, kLanes = Order::kLanes;
  int64_t chunks = 1;
  for (int l = 0; l < leaves.count; ++l) {
    const int64_t n = leaves.begin[l + 1] - leaves.begin[l];
    if (n > 0) chunks = std::max(chunks, CeilDiv(n, Order::ChunkRows(n)));
  }
  constexpr int kGroups = Reduction::kMostThreads / kLanes;  // of lanes, in a block
  // A row of a tile has at least the 32 bytes of a sector, at most a line's 128.
  constexpr int kVectorBytes = kVector > 4 ? 16 : 4 * kVector;  // by eight, they are bf16
  constexpr int kNarrowest = 32 / kVectorBytes, kWidest = std::min(128 / kVectorBytes, kGroups);
  constexpr int kOrdinaryGroups = 8;
  constexpr int64_t kFill = 132;  // blocks that occupy a large GPU
  const int64_t vectors = columns / kVector;
  const bool fits = chunks <= std::min(most_chunks_a_block, kGroups / kNarrowest);
  int width = kWidest;
  while (fits && width > kNarrowest &&
         (width * chunks > kGroups || CeilDiv(vectors, width) * leaves.count < kFill)) {
    width /= 2;
  }
  const int64_t tiles = CeilDiv(vectors, width);
  width = static_cast<int>(CeilDiv(vectors, tiles));
  const int depth = static_cast<int>(
      fits ? chunks : std::min<int64_t>(chunks, std::max(1, kOrdinaryGroups / width)));
  const bool one_stage = depth == chunks;  // as the kernel sees it by its grid

  const size_t shared = ReductionBytes<kVector, Reduction>(width, depth);
  const auto launch = [&](const ReductionPart& part, int part_leaves) {
    const auto part_tiles = static_cast<unsigned>(CeilDiv(part.columns, width * kVector));
    const auto grid_leaves = static_cast<unsigned>(part_leaves);
    float* const partials = static_cast<float*>(q.workspace);
    Launch(q, dim3(part_tiles, static_cast<unsigned>(CeilDiv(chunks, depth)), grid_leaves),
           dim3(static_cast<unsigned>(width), kLanes, static_cast<unsigned>(depth)), shared,
           ReduceChunks<Reduction, kVector>, reduction, leaves, part, partials);
    if (one_stage) return;
    const int merged = std::min(part.columns, kMergeColumns);
    Launch(q, dim3(static_cast<unsigned>(CeilDiv(part.columns, merged)), grid_leaves),
           dim3(static_cast<unsigned>(merged), kLanes), LaneSum<1, kLanes>::bytes(merged),
           MergeChunks<Reduction>, reduction, leaves, part, partials);
  };
  ReductionPart part;
  part.chunks = static_cast<int>(chunks);
  if (one_stage) {
    part.columns = static_cast<int>(columns);
    return launch(part, leaves.count);
  }
  constexpr int64_t kRoom = kWorkspaceBytes / sizeof(float) / kPlanes;
  const int64_t most_columns = kRoom / chunks / 8 * 8;
  for (; part.first_column < columns; part.first_column += most_columns) {
    part.columns = static_cast<int>(std::min(most_columns, columns - part.first_column));
    const int most_leaves = static_cast<int>(
        std::min<int64_t>(leaves.count, std::max<int64_t>(1, kRoom / chunks / part.columns)));
    for (part.first_leaf = 0; part.first_leaf < leaves.count; part.first_leaf += most_leaves) {
      launch(part, std::min(most_leaves, leaves.count - part.first_leaf));
    }
  }
}

// `aligned`: what is read and written row by row lies on 16-byte boundaries. Leaves of at most
// `most_chunks_a_block` chunks take one launch: more than a few pay where little is read.
template <int kWide = 4, class Reduction>
void ReduceRows(const Queue& q, const Reduction& reduction, const Leaves& leaves, int64_t columns,
                bool aligned, int most_chunks_a_block) {
  if (columns == 0) return;
  if (aligned && columns % kWide == 0) {
    ReduceRowsBy<Reduction, kWide>(q, reduction, leaves, columns, most_chunks_a_block);
  } else {
    ReduceRowsBy<Reduction, 1>(q, reduction, leaves, columns, most_chunks_a_block);
  }
}

}  // namespace lockstep::device::cuda
