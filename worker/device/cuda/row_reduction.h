// Reducing the rows of each leaf of x {rows, columns} to one row: sums, moments.
//
// The order is a function of the leaf's n rows and of how they are stored, so a column's bits
// depend neither on other columns nor on other leaves, nor on how a launch is cut. Rows are cut
// into chunks of ChunkRows(n). In a chunk lane l of kLanes takes rows l, l + kLanes, ... in order,
// in float; lanes are combined by a tree, strides kLanes / 2, ..., 2, 1. Chunks are merged in
// double: lane k % kLanes takes chunk k, in order, then the same tree.
//
// A block is {columns of a tile, kLanes, chunks}. Where a block holds all chunks of a leaf it
// merges them itself; otherwise a second launch does, from partial results in the workspace. Of one
// tensor, a block takes chunk after chunk then, whose rows are on their way while it adds others.
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
constexpr int kMostChunks = 128;
template <class T>
struct RowOrder {
  static constexpr bool kFloat = sizeof(T) == sizeof(float);
  static constexpr int kLanes = kFloat ? 32 : 16;
  static constexpr int64_t kChunkRows = kFloat ? 128 : 256;  // the fewest; a multiple of kLanes

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
//   Accumulate(rows, column, Partial*): of a lane; at least one row; or, of one tensor,
//     const Element* x, int64_t columns, static constexpr int kGroup: rows that a lane adds at
//     once; Origin<kVector>(leaf_first, column): what it has to know of the leaf;
//     AddRows<kFull>(before, count, row[kGroup or kRest], origin, Partial*): rows behind `before`
//     others; kFull: kGroup of them;
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
    // Whose loads are in flight: all of a lane's, as a rule.
    constexpr int kGroup = kVector == 1 ? kMostChunks / kLanes : 1;
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

constexpr int kMergeColumns = 16;  // of a block

// Of one tensor: a lane's next kGroup rows, from at(k) on.
template <int kVector, class Reduction, class At, class Origin>
__device__ __forceinline__ void AddGroup(const Reduction& reduction, int before, const At& at,
                                         const Origin& origin,
                                         Partial<kVector, Reduction::kPlanes>* sum) {
  Held<typename Reduction::Element, kVector> row[Reduction::kGroup];
#pragma unroll
  for (int k = 0; k < Reduction::kGroup; ++k) row[k].Load(at(k));
  reduction.template AddRows<true>(before, Reduction::kGroup, row, origin, sum);
}
// And its last, fewer.
template <int kVector, class Reduction, class At, class Origin>
__device__ __forceinline__ void AddRest(const Reduction& reduction, int before, int count,
                                        const At& at, const Origin& origin,
                                        Partial<kVector, Reduction::kPlanes>* sum) {
  constexpr int kRest = Reduction::kRest;
#pragma unroll 1
  for (int done = 0; done < count; done += kRest) {
    Held<typename Reduction::Element, kVector> row[kRest];
    const int rows = count - done < kRest ? count - done : kRest;
#pragma unroll
    for (int k = 0; k < kRest; ++k) {
      if (k < rows) row[k].Load(at(done + k));
    }
    reduction.template AddRows<false>(before + done, rows, row, origin, sum);
  }
}

template <class Reduction>
concept OfOneTensor = requires {
  Reduction::kGroup;
  typename Reduction::Element;
};

template <int kVector, class Reduction>
__device__ __forceinline__ void AccumulateLane(const Reduction& reduction, const LaneRows& rows,
                                               int64_t column,
                                               Partial<kVector, Reduction::kPlanes>* sum) {
  if constexpr (OfOneTensor<Reduction>) {
    const auto origin = reduction.template Origin<kVector>(rows.leaf_first, column);
    const int64_t step = Reduction::Order::kLanes * reduction.columns;
    const auto* from = reduction.x + rows.first * reduction.columns + column;
    const auto at = [&](int k) { return from + k * step; };
    int done = 0;
#pragma unroll 1
    for (; done + Reduction::kGroup <= rows.count; done += Reduction::kGroup) {
      AddGroup<kVector>(reduction, done, at, origin, sum);
      from += Reduction::kGroup * step;
    }
    AddRest<kVector>(reduction, done, rows.count - done, at, origin, sum);
  } else {
    reduction.Accumulate(rows, column, sum);
  }
}

// Combines what the lanes of a chunk of `rows` rows know, into lane 0. All threads of the block
// call it.
template <int kVector, class Reduction>
__device__ __forceinline__ void CombineLanes(int rows, void* shared,
                                             Partial<kVector, Reduction::kPlanes>* values) {
  using Values = Partial<kVector, Reduction::kPlanes>;
  constexpr int kLanes = Reduction::Order::kLanes;
  const int lane = static_cast<int>(threadIdx.y), width = static_cast<int>(blockDim.x);
  const int x = static_cast<int>(threadIdx.x), z = static_cast<int>(threadIdx.z);
  Values* const slots = static_cast<Values*>(shared) + z * kLanes * width + x;
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    if (lane >= stride && lane < 2 * stride) slots[lane * width] = *values;
    __syncthreads();
    if (lane >= stride) continue;
    // Here a lane stands for the rows that are the lane, modulo twice the stride.
    const int count_a = (rows + 2 * stride - 1 - lane) / (2 * stride);
    const int count_b = (rows + stride - 1 - lane) / (2 * stride);
    if (count_b > 0) {
      Reduction::Combine(static_cast<float>(count_a), static_cast<float>(count_b), values,
                         slots[(lane + stride) * width]);
    }
  }
}

// What a chunk of a leaf of n rows, `rows` rows of the call from `first` on, comes to, in lane 0 of
// its part of the block; `here`: the thread has columns, from `column` of the call on. All threads
// of the block call it.
template <int kVector, class Reduction>
__device__ __forceinline__ void ReduceChunk(const Reduction& reduction, int leaf, int64_t n,
                                            int64_t leaf_first, int64_t first, int rows,
                                            int64_t column, bool here,
                                            Partial<kVector, Reduction::kPlanes>* sum) {
  constexpr int kLanes = Reduction::Order::kLanes;
  const int lane = static_cast<int>(threadIdx.y);
  *sum = {};
  const int own = (rows + kLanes - 1 - lane) / kLanes;
  if (here && own > 0) {
    AccumulateLane<kVector>(reduction, {leaf, n, leaf_first, first + lane, own}, column, sum);
  }
  CombineLanes<kVector, Reduction>(rows, SharedMemory<unsigned char>(), sum);
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

// For MergeChunks.
template <int kVector, int kPlanes>
__device__ __forceinline__ void StoreChunk(const ReductionPart& part, int local_leaf, int chunk,
                                           int column, const Partial<kVector, kPlanes>& values,
                                           float* partials) {
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    const int64_t at = (static_cast<int64_t>(local_leaf) * part.chunks + chunk) * kPlanes + plane;
    StoreLanes<kVector>(partials + at * part.columns + column, values.plane[plane]);
  }
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
    if (stores) StoreChunk(part, local_leaf, chunk, column, values, partials);
    return;
  }
  MergeBlock<kVector>(reduction, leaf, leaf_first, n, chunk_rows, part.first_column + column, here,
                      stores, values);
}

constexpr int kOrdinaryGroups = 8;  // of lanes, in a block that does not merge
constexpr int kStages = 3;          // groups of rows, of which one is added
constexpr int kStreamBlocks = 3;    // of a multiprocessor

// The same of one tensor, chunk after chunk of a leaf and never all of them. A thread copies the
// rows that it adds, so that no other has to wait for them.
template <class Reduction, int kVector>
__global__ void __launch_bounds__(kOrdinaryGroups* Reduction::Order::kLanes, kStreamBlocks)
    StreamChunks(Reduction reduction, Leaves leaves, ReductionPart part, float* partials) {
  WaitForPrevious();
  using Order = typename Reduction::Order;
  using Element = typename Reduction::Element;
  constexpr int kLanes = Order::kLanes, kGroup = Reduction::kGroup, kGroupRows = kGroup * kLanes;
  const int local_leaf = static_cast<int>(blockIdx.z), leaf = part.first_leaf + local_leaf;
  const int64_t leaf_first = leaves.begin[leaf], n = leaves.begin[leaf + 1] - leaf_first;
  const int64_t chunk_rows = Order::ChunkRows(n);
  const int groups = static_cast<int>(chunk_rows / kGroupRows);
  const int first_chunk = static_cast<int>(blockIdx.y * blockDim.z);
  const int x = static_cast<int>(threadIdx.x), lane = static_cast<int>(threadIdx.y),
            z = static_cast<int>(threadIdx.z), width = static_cast<int>(blockDim.x),
            depth = static_cast<int>(blockDim.z), threads = width * kLanes * depth;
  const int column = (static_cast<int>(blockIdx.x) * width + x) * kVector;
  const bool here = column < part.columns;
  const int chunk_step = static_cast<int>(gridDim.y) * depth;
  uint4* const ring = SharedMemory<uint4>() + ((z * kLanes + lane) * width + x);
  uint4* const tree = SharedMemory<uint4>() + kStages * kGroup * threads;

  // The group that is copied next: from the thread's row, of as many that are left in the leaf.
  int64_t left = n - (first_chunk + z) * chunk_rows - lane;
  const Element* from =
      reduction.x + (leaf_first + n - left) * reduction.columns + part.first_column + column;
  int ahead = 0, ahead_stage = 0;
  const int64_t row_step = kLanes * reduction.columns, group_step = kGroup * row_step;
  const int64_t jump_rows = kGroupRows + (chunk_step - 1) * chunk_rows;  // behind a chunk
  const int64_t jump = jump_rows * reduction.columns;
  const auto fetch = [&] {
    uint4* const to = ring + ahead_stage * kGroup * threads;
    if (here && left > kGroupRows - kLanes) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) CopyInBackground(to + k * threads, from + k * row_step);
    } else if (here) {
#pragma unroll 1
      for (int k = 0; k * kLanes < left; ++k) {
        CopyInBackground(to + k * threads, from + k * row_step);
      }
    }
    CommitCopies();
    ahead_stage = ahead_stage + 1 == kStages ? 0 : ahead_stage + 1;
    const bool jumps = ++ahead == groups;
    if (jumps) ahead = 0;
    left -= jumps ? jump_rows : kGroupRows;
    from += jumps ? jump : group_step;
  };

  if (first_chunk * chunk_rows >= n) return;
  for (int i = 0; i < kStages - 1; ++i) fetch();
  const auto origin =
      reduction.template Origin<kVector>(leaf_first, part.first_column + (here ? column : 0));
  int stage = 0;
#pragma unroll 1
  for (int chunk = first_chunk; chunk * chunk_rows < n; chunk += chunk_step) {
    const int64_t behind = n - (chunk + z) * chunk_rows;
    const int rows = static_cast<int>(behind < 0 ? 0 : behind < chunk_rows ? behind : chunk_rows);
    const int own = here ? (rows + kLanes - 1 - lane) / kLanes : 0;
    Partial<kVector, Reduction::kPlanes> values = {};
#pragma unroll 1
    for (int done = 0; done < groups * kGroup; done += kGroup) {
      fetch();
      WaitForGroups<kStages - 1>();
      const uint4* const rows_here = ring + stage * kGroup * threads;
      const auto at = [&](int k) {
        return reinterpret_cast<const Element*>(rows_here + k * threads);
      };
      if (done + kGroup <= own) {
        AddGroup<kVector>(reduction, done, at, origin, &values);
      } else {
        AddRest<kVector>(reduction, done, own - done, at, origin, &values);
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    CombineLanes<kVector, Reduction>(rows, tree, &values);
    if (lane == 0 && here && rows > 0) {
      StoreChunk(part, local_leaf, chunk + z, column, values, partials);
    }
  }
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
    auto* kernel = ReduceChunks<Reduction, kVector>;
    int64_t parts = CeilDiv(chunks, depth);  // of a leaf
    size_t bytes = shared;
    if constexpr (OfOneTensor<Reduction> && kVector > 1) {
      if (!one_stage) {
        // As many blocks as there is room for at once, all with as many chunks; or many more.
        constexpr int64_t kRoom = kFill * kStreamBlocks;
        const int64_t most = kRoom / (int64_t{part_tiles} * part_leaves);
        const int64_t rounds = most > 0 ? CeilDiv(parts, most) : 4;
        parts = CeilDiv(parts, rounds);
        kernel = StreamChunks<Reduction, kVector>;
        bytes = (kStages * Reduction::kGroup * sizeof(uint4) + sizeof(Partial<kVector, kPlanes>)) *
                static_cast<size_t>(width * kLanes * depth);
        AllowShared(kernel, bytes);
      }
    }
    Launch(q, dim3(part_tiles, static_cast<unsigned>(parts), grid_leaves),
           dim3(static_cast<unsigned>(width), kLanes, static_cast<unsigned>(depth)), bytes, kernel,
           reduction, leaves, part, partials);
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
