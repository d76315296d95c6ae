// Batch norm over {n, channels}. A thread has neighbouring channels and walks down rows.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/row_reduction.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

// Per-channel values, which lie anywhere.
template <int kVector>
__device__ __forceinline__ Lanes<kVector> LoadChannels(const float* p) {
  Lanes<kVector> result;
#pragma unroll
  for (int v = 0; v < kVector; ++v) result.at[v] = p[v];
  return result;
}

// `n` is the leaf's own count.
__device__ __forceinline__ float DivisorOf(const Moments& moments, int64_t n) {
  return static_cast<float>(moments.divisor != 0 ? moments.divisor : n);
}

// ---- moments.

// (mean, M2) by Chan, Golub & LeVeque (1983). Means are relative to the leaf's first row, so that
// where the mean is far from zero they are as precise as the deviations. Sums of a few bf16 are as
// good as exact: a group's are taken as they are, its mean then relative to the leaf's first row.
template <class T>
struct MomentsReduction {
  using Order = RowOrder<T>;
  static constexpr int kPlanes = 2;
  static constexpr int kMostThreads = Order::kFloat ? 1024 : 768;
  // Rows in registers: their mean, then their deviations from it.
  static constexpr int kGroup = Order::kFloat ? 4 : 8;
  static constexpr int kRest = 4;  // of the last rows

  const T* x;
  int64_t channels;
  float* mean;
  float* m2;
  int64_t stride;

  // b's share of a + b rows. The usual quotients of equal counts need no division.
  __device__ __forceinline__ static float ShareOf(float a, float b) {
    return a == 0.0f ? 1.0f : a == b ? 0.5f : b / (a + b);
  }

  // kFull: count is kRows.
  template <bool kFull, int kVector, int kRows>
  __device__ __forceinline__ static void AddGroup(int before, int count,
                                                  const Held<T, kVector> (&row)[kRows],
                                                  const Held<T, kVector>& pivot,
                                                  Partial<kVector, 2>* sum) {
    const float rows = kFull ? static_cast<float>(kRows) : static_cast<float>(count);
    const float earlier = static_cast<float>(before), inverse = 1.0f / rows;
    const float share = ShareOf(earlier, rows), cross = earlier * share;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float value[kRows], centre = 0, square = 0;
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        value[k] = Order::kFloat ? row[k].At(v) - pivot.At(v) : row[k].At(v);
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) centre += kFull || k < count ? value[k] : 0.0f;
      centre *= inverse;
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float d = kFull || k < count ? value[k] - centre : 0.0f;
        square = Fma(d, d, square);
      }
      float& sum_mean = sum->plane[0].at[v];
      float& sum_m2 = sum->plane[1].at[v];
      if constexpr (!Order::kFloat) centre -= pivot.At(v);
      const float delta = centre - sum_mean;
      sum_mean = Fma(delta, share, sum_mean);
      sum_m2 = Fma(delta * delta, cross, sum_m2 + square);
    }
  }

  template <int kVector>
  __device__ __forceinline__ void Accumulate(const LaneRows& rows, int64_t column,
                                             Partial<kVector, 2>* sum) const {
    Held<T, kVector> pivot;
    pivot.Load(x + rows.leaf_first * channels + column);
    const T* from = x + rows.first * channels + column;
    const int64_t step = Order::kLanes * channels;
    const auto load = [&]<int kRows>(Held<T, kVector>(&row)[kRows], int count) {
#pragma unroll
      for (int k = 0; k < kRows; ++k, from += step) {
        if (k < count) row[k].Load(from);
      }
    };
    int done = 0;
#pragma unroll 1
    for (; done + kGroup <= rows.count; done += kGroup) {
      Held<T, kVector> row[kGroup];
      load(row, kGroup);
      AddGroup<true>(done, kGroup, row, pivot, sum);
    }
#pragma unroll 1
    for (; done < rows.count; done += kRest) {
      Held<T, kVector> row[kRest];
      const int count = rows.count - done < kRest ? rows.count - done : kRest;
      load(row, count);
      AddGroup<false>(done, count, row, pivot, sum);
    }
  }

  template <int kVector>
  __device__ __forceinline__ static void Combine(float count_a, float count_b,
                                                 Partial<kVector, 2>* a,
                                                 const Partial<kVector, 2>& b) {
    const float share = ShareOf(count_a, count_b), cross = count_a * share;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float& mean_a = a->plane[0].at[v];
      float& m2_a = a->plane[1].at[v];
      const float delta = b.plane[0].at[v] - mean_a;
      mean_a = Fma(delta, share, mean_a);
      m2_a = Fma(delta * delta, cross, m2_a + b.plane[1].at[v]);
    }
  }

  // The mean of the means, then deviations from it: nothing cancels here either.
  template <int kVector>
  __device__ __forceinline__ void Merge(const LeafOfChunks& chunks,
                                        LaneSum<kVector, Order::kLanes> lanes,
                                        int64_t column) const {
    double centre[kVector] = {}, square[kVector] = {};
    lanes.template ForEachChunk<2>([&](double rows, const Partial<kVector, 2>& chunk) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        centre[v] += rows * static_cast<double>(chunk.plane[0].at[v]);
      }
    });
    lanes.Sum(centre);
    lanes.Broadcast(centre);
    const double n = static_cast<double>(chunks.n > 0 ? chunks.n : 1);
#pragma unroll
    for (int v = 0; v < kVector; ++v) centre[v] /= n;
    lanes.template ForEachChunk<2>([&](double rows, const Partial<kVector, 2>& chunk) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const double d = static_cast<double>(chunk.plane[0].at[v]) - centre[v];
        square[v] += static_cast<double>(chunk.plane[1].at[v]) + rows * (d * d);
      }
    });
    lanes.Sum(square);
    if (!lanes.is_first()) return;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const double pivot =
          chunks.n > 0 ? static_cast<double>(FloatOf(x[chunks.leaf_first * channels + column + v]))
                       : 0.0;
      mean[chunks.leaf * stride + column + v] = static_cast<float>(pivot + centre[v]);
      m2[chunks.leaf * stride + column + v] = static_cast<float>(square[v]);
    }
  }
};

// ---- what backward sums.

// Where dy goes on: everywhere, where y is above 0, or where y would be if it were computed again.
enum class Mask { kNone, kRead, kComputed };
// Below it, what is above 0 is stored as 0.
template <class T>
constexpr float kStoredAsZero = sizeof(T) == sizeof(float) ? 0.0f : 0x1p-134f;

template <Mask kMask, bool kMore, class T>
struct GradientReduction {
  using Order = RowOrder<T>;
  static constexpr int kPlanes = 2;
  static constexpr int kMostThreads = Order::kFloat ? 512 : 640;
  static constexpr bool kComputes = kMask == Mask::kComputed;
  // Rows whose loads are in flight.
  static constexpr int kGroup = kMask != Mask::kNone && kMore ? 2 : 4;

  const T* x;
  const T* y;
  const T* dy;
  const T* more;
  int64_t channels;
  Moments moments;
  float epsilon;
  T* g;
  float* sum_dy;
  float* sum_dy_xhat;
  int64_t stride;
  const float* weight;
  const float* bias;

  // What a lane knows of its channels; scale and shift are ForwardMap's.
  template <int kVector>
  struct Known {
    Lanes<kVector> centre, scale, shift;
  };

  template <int kVector>
  __device__ __forceinline__ void AddRows(int count, int64_t at, int64_t step,
                                          const Known<kVector>& known,
                                          Partial<kVector, 2>* sum) const {
    Held<T, kVector> row[kGroup], gradient[kGroup], second[kGroup], output[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k >= count) continue;
      row[k].Load(x + at + k * step);
      gradient[k].Load(dy + at + k * step);
      if constexpr (kMore) second[k].Load(more + at + k * step);
      if constexpr (kMask == Mask::kRead) output[k].Load(y + at + k * step);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k >= count) continue;
      Lanes<kVector> written;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float value = gradient[k].At(v);
        if constexpr (kMore) value = AsStored<T>(value + second[k].At(v));
        const float centred = row[k].At(v) - known.centre.at[v];
        if constexpr (kMask == Mask::kRead) value = ReluGradient(output[k].At(v), value);
        if constexpr (kComputes) {
          const float y = Fma(centred, known.scale.at[v], known.shift.at[v]);
          value = y > kStoredAsZero<T> ? value : 0.0f;
        }
        float& sum_g = sum->plane[0].at[v];
        float& sum_x = sum->plane[1].at[v];
        sum_g += value;
        sum_x = Fma(value, centred, sum_x);
        written.at[v] = value;
      }
      // Over an input of these very elements, perhaps; all of them have been read.
      if (g != nullptr) StoreLanes<kVector>(g + at + k * step, written);
    }
  }

  template <int kVector>
  __device__ __forceinline__ void Accumulate(const LaneRows& rows, int64_t column,
                                             Partial<kVector, 2>* sum) const {
    Known<kVector> known;
    const int64_t own = rows.leaf * moments.stride + column;
    known.centre = LoadChannels<kVector>(moments.mean + own);
    if constexpr (kComputes) {
      const float divisor = DivisorOf(moments, rows.n);
      known.scale = LoadChannels<kVector>(weight + column);
      known.shift = LoadChannels<kVector>(bias + column);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        known.scale.at[v] =
            InverseDeviation(moments.spread[own + v] / divisor, epsilon) * known.scale.at[v];
      }
    }
    const int64_t step = Order::kLanes * channels;
    int64_t at = rows.first * channels + column;
    int left = rows.count;
    for (; left >= kGroup; left -= kGroup, at += kGroup * step) {
      AddRows<kVector>(kGroup, at, step, known, sum);
    }
    if (left > 0) AddRows<kVector>(left, at, step, known, sum);
  }

  template <int kVector>
  __device__ __forceinline__ static void Combine(float, float, Partial<kVector, 2>* a,
                                                 const Partial<kVector, 2>& b) {
    AddPartial(a, b);
  }

  template <int kVector>
  __device__ __forceinline__ void Merge(const LeafOfChunks& chunks,
                                        LaneSum<kVector, Order::kLanes> lanes,
                                        int64_t column) const {
    double total[2][kVector];
    SumChunks(lanes, total);
    if (!lanes.is_first()) return;
    const float divisor = DivisorOf(moments, chunks.n);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int64_t at = column + v;
      const float spread = moments.spread[chunks.leaf * moments.stride + at];
      sum_dy[chunks.leaf * stride + at] = static_cast<float>(total[0][v]);
      sum_dy_xhat[chunks.leaf * stride + at] =
          static_cast<float>(total[1][v]) * InverseDeviation(spread / divisor, epsilon);
    }
  }
};

// ---- passes over the elements.

constexpr int kThreads = 256;

// Calls Row::Load and then Row::Store for the rows of a block's share of a leaf. What a map knows
// of a channel, kConstants floats, takes divisions and a root of kInputs others: a block's threads
// share them out, while their first rows are on their way.
template <class Map, int kVector>
__global__ void __launch_bounds__(kThreads, Map::kBlocks)
    MapRows(Map map, Leaves leaves, int64_t channels, int64_t block_rows) {
  WaitForPrevious();
  const int leaf = static_cast<int>(blockIdx.z);
  const int64_t leaf_end = leaves.begin[leaf + 1];
  const int64_t first = leaves.begin[leaf] + blockIdx.y * block_rows;
  if (first >= leaf_end) return;
  const int width = static_cast<int>(blockDim.x), height = static_cast<int>(blockDim.y);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int tile = width * kVector, first_column = static_cast<int>(blockIdx.x) * tile;
  const int column = first_column + x * kVector;
  const int64_t end = first + block_rows < leaf_end ? first + block_rows : leaf_end;
  // Rows that are left from the thread's next one.
  int left = column < channels ? static_cast<int>(end - first) - y : 0;
  const int64_t step = height * channels;
  int64_t at = (first + y) * channels + column;
  typename Map::template Row<kVector> rows[Map::kUnroll];
  const auto load = [&] {
#pragma unroll
    for (int k = 0; k < Map::kUnroll; ++k) {
      if (k * height < left) rows[k].Load(map, at + k * step);
    }
  };
  load();
  float* const constants = SharedMemory<float>();
  const int64_t n = leaf_end - leaves.begin[leaf];
  const int threads = width * height, mine = y * width + x;
  for (int c = mine; c < tile && first_column + c < channels; c += threads) {
    float known[Map::kInputs];
    map.Read(leaf, first_column + c, known);
#pragma unroll
    for (int i = 0; i < Map::kInputs; ++i) constants[i * tile + c] = known[i];
  }
  // Else the compiler would sink each load to where it is needed, behind another's time.
  __syncthreads();
  for (int c = mine; c < tile && first_column + c < channels; c += threads) {
    float known[Map::kInputs];
#pragma unroll
    for (int i = 0; i < Map::kInputs; ++i) known[i] = constants[i * tile + c];
    map.Know(n, known);
#pragma unroll
    for (int i = 0; i < Map::kConstants; ++i) constants[i * tile + c] = known[i];
  }
  __syncthreads();
  if (left <= 0) return;
  Lanes<kVector> known[Map::kConstants];
#pragma unroll
  for (int i = 0; i < Map::kConstants; ++i) {
    known[i] = LoadLanes<kVector>(constants + i * tile + x * kVector);
  }
  for (;;) {
#pragma unroll
    for (int k = 0; k < Map::kUnroll; ++k) {
      if (k * height < left) rows[k].Store(map, known, at + k * step);
    }
    left -= Map::kUnroll * height;
    if (left <= 0) return;
    at += Map::kUnroll * step;
    load();
  }
}

template <bool kRelu, bool kResidual, class T>
struct ForwardMap {
  using Element = T;
  static constexpr int kUnroll = kResidual ? 2 : 4;  // rows whose loads are in flight
  static constexpr int kBlocks = 3;                  // at least, of a multiprocessor
  static constexpr int kConstants = 3, kInputs = 4;

  const T* x;
  Moments moments;
  float epsilon;
  const float* weight;
  const float* bias;
  const T* residual;
  T* y;

  __device__ __forceinline__ void Read(int leaf, int column, float (&known)[kInputs]) const {
    const int64_t at = leaf * moments.stride + column;
    known[0] = moments.mean[at];
    known[1] = moments.spread[at];
    known[2] = bias[column];
    known[3] = weight[column];
  }
  // Centre, scale and shift.
  __device__ __forceinline__ void Know(int64_t n, float (&known)[kInputs]) const {
    known[1] = InverseDeviation(known[1] / DivisorOf(moments, n), epsilon) * known[3];
  }

  template <int kVector>
  struct Row {
    Held<T, kVector> x, residual;
    __device__ __forceinline__ void Load(const ForwardMap& map, int64_t at) {
      x.Load(map.x + at);
      if constexpr (kResidual) residual.Load(map.residual + at);
    }
    __device__ __forceinline__ void Store(const ForwardMap& map,
                                          const Lanes<kVector> (&known)[kConstants],
                                          int64_t at) const {
      Lanes<kVector> y;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float value = Fma(x.At(v) - known[0].at[v], known[1].at[v], known[2].at[v]);
        if constexpr (kResidual) value += residual.At(v);
        if constexpr (kRelu) value = Relu(value);
        y.at[v] = value;
      }
      StoreLanes<kVector>(map.y + at, y);
    }
  };
};

template <Mask kMask, class T>
struct BackwardMap {
  using Element = T;
  static constexpr int kUnroll = 2;  // rows whose loads are in flight
  static constexpr int kBlocks = 3;  // at least, of a multiprocessor
  static constexpr bool kComputes = kMask == Mask::kComputed;
  static constexpr int kConstants = kComputes ? 5 : 4, kInputs = kComputes ? 6 : 5;

  const T* x;
  const T* y;
  const T* dy;
  Moments moments;
  float epsilon;
  const float* weight;
  const float* sum_dy;
  const float* sum_dy_xhat;
  int64_t sums_stride;
  T* dx;
  const float* bias;

  __device__ __forceinline__ void Read(int leaf, int column, float (&known)[kInputs]) const {
    const int64_t at = leaf * moments.stride + column, sums = leaf * sums_stride + column;
    known[0] = moments.mean[at];
    known[1] = moments.spread[at];
    known[2] = sum_dy[sums];
    known[3] = sum_dy_xhat[sums];
    known[4] = weight[column];
    if constexpr (kComputes) known[5] = bias[column];
  }
  // Centre, scale, offset and slope, and the shift of y.
  __device__ __forceinline__ void Know(int64_t n, float (&known)[kInputs]) const {
    const float divisor = DivisorOf(moments, n);
    const float inverse = InverseDeviation(known[1] / divisor, epsilon);
    known[1] = inverse * known[4];
    known[2] = known[2] / divisor;
    known[3] = inverse * (known[3] / divisor);
    if constexpr (kComputes) known[4] = known[5];
  }

  template <int kVector>
  struct Row {
    Held<T, kVector> x, y, dy;
    __device__ __forceinline__ void Load(const BackwardMap& map, int64_t at) {
      x.Load(map.x + at);
      dy.Load(map.dy + at);
      if constexpr (kMask == Mask::kRead) y.Load(map.y + at);
    }
    __device__ __forceinline__ void Store(const BackwardMap& map,
                                          const Lanes<kVector> (&known)[kConstants],
                                          int64_t at) const {
      Lanes<kVector> dx;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float g = dy.At(v);
        const float centred = x.At(v) - known[0].at[v];
        if constexpr (kMask == Mask::kRead) g = ReluGradient(y.At(v), g);
        if constexpr (kComputes) {
          const float y = Fma(centred, known[1].at[v], known[4].at[v]);
          g = y > kStoredAsZero<T> ? g : 0.0f;
        }
        dx.at[v] = known[1].at[v] * Fma(0.0f - centred, known[3].at[v], g - known[2].at[v]);
      }
      StoreLanes<kVector>(map.dx + at, dx);
    }
  };
};

template <int kVector, class Map>
void RunMapBy(const Queue& q, int64_t channels, const Leaves& leaves, const Map& map) {
  int64_t n = 0;
  for (int l = 0; l < leaves.count; ++l) n = std::max(n, leaves.begin[l + 1] - leaves.begin[l]);
  if (n == 0) return;
  const int64_t vectors = channels / kVector, tiles = CeilDiv(vectors, 32);
  const int64_t width = CeilDiv(vectors, tiles);
  const int64_t height = std::min<int64_t>(kThreads / width, n);
  // What a block knows of its channels is worth several groups of rows where there are many.
  constexpr int64_t kFill = kVector > 4 ? 132 * 12 : 132 * 16, kMostGroups = kVector > 4 ? 16 : 8;
  constexpr int64_t kMostGrid = 65535;
  const int64_t groups = CeilDiv(n, height * Map::kUnroll);
  int64_t group_rows = std::clamp<int64_t>(groups * tiles * leaves.count / kFill, 1, kMostGroups);
  group_rows = std::max(group_rows, CeilDiv(groups, kMostGrid));
  Launch(q,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(CeilDiv(groups, group_rows)),
              static_cast<unsigned>(leaves.count)),
         dim3(static_cast<unsigned>(width), static_cast<unsigned>(height)),
         sizeof(float) * Map::kInputs * static_cast<size_t>(width * kVector), MapRows<Map, kVector>,
         map, leaves, channels, height * Map::kUnroll * group_rows);
}

template <class Map>
void RunMap(const Queue& q, int64_t channels, const Leaves& leaves, bool aligned, const Map& map) {
  if (channels == 0) return;
  if (aligned) {
    RunMapBy<kWideLanes<typename Map::Element>>(q, channels, leaves, map);
  } else {
    RunMapBy<1>(q, channels, leaves, map);
  }
}

// Leaves of one chunk: a block reduces the rows of its columns, and maps them by what they came to.
template <class Reduction, class Map, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    ReduceAndMap(Reduction reduction, Map map, Leaves leaves, int64_t channels) {
  WaitForPrevious();
  constexpr int kLanes = Reduction::Order::kLanes;
  const int leaf = static_cast<int>(blockIdx.z), lane = static_cast<int>(threadIdx.y);
  const int64_t first = leaves.begin[leaf];
  const int n = static_cast<int>(leaves.begin[leaf + 1] - first);
  const int64_t column =
      (int64_t{blockIdx.x} * blockDim.x + static_cast<int>(threadIdx.x)) * kVector;
  const bool here = column < channels;
  Partial<kVector, Reduction::kPlanes> values;
  ReduceChunk<kVector>(reduction, leaf, n, first, first, n, column, here, &values);
  MergeBlock<kVector>(reduction, leaf, first, n, Reduction::Order::kChunkRows, column, here,
                      lane == 0 && here && n > 0, values);
  __syncthreads();  // what lane 0 has written is read by all
  if (!here) return;
  Lanes<kVector> known[Map::kConstants];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    float channel[Map::kInputs];
    map.Read(leaf, static_cast<int>(column) + v, channel);
    map.Know(n, channel);
#pragma unroll
    for (int i = 0; i < Map::kConstants; ++i) known[i].at[v] = channel[i];
  }
  const int64_t step = kLanes * channels;
  int64_t at = (first + lane) * channels + column;
  for (int left = n - lane; left > 0; left -= Map::kUnroll * kLanes, at += Map::kUnroll * step) {
    typename Map::template Row<kVector> rows[Map::kUnroll];
#pragma unroll
    for (int k = 0; k < Map::kUnroll; ++k) {
      if (k * kLanes < left) rows[k].Load(map, at + k * step);
    }
#pragma unroll
    for (int k = 0; k < Map::kUnroll; ++k) {
      if (k * kLanes < left) rows[k].Store(map, known, at + k * step);
    }
  }
}

// Whether ReduceAndMap takes the leaves, of rows that are stored as T.
template <class T>
bool AreOneChunk(const Leaves& leaves) {
  for (int l = 0; l < leaves.count; ++l) {
    if (leaves.begin[l + 1] - leaves.begin[l] > RowOrder<T>::kChunkRows) return false;
  }
  return true;
}

template <int kVector, class Reduction, class Map>
void RunReduceAndMapBy(const Queue& q, int64_t channels, const Leaves& leaves,
                       const Reduction& reduction, const Map& map) {
  constexpr int kLanes = Reduction::Order::kLanes;
  constexpr int64_t kFill = 132;  // blocks that occupy a large GPU
  // A row of a tile has the 32 bytes of a sector, or more where there are blocks enough.
  constexpr int64_t kSector = kVector > 1 ? 2 : 8;
  const int64_t vectors = channels / kVector;
  int64_t width = kThreads / kLanes;
  while (width > kSector && CeilDiv(vectors, width) * leaves.count < kFill) width /= 2;
  const int64_t tiles = CeilDiv(vectors, width);
  width = CeilDiv(vectors, tiles);
  Launch(q, dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(leaves.count)),
         dim3(static_cast<unsigned>(width), kLanes), ReductionBytes<kVector, Reduction>(width, 1),
         ReduceAndMap<Reduction, Map, kVector>, reduction, map, leaves, channels);
}

template <class Reduction, class Map>
void RunReduceAndMap(const Queue& q, int64_t channels, const Leaves& leaves, bool aligned,
                     const Reduction& reduction, const Map& map) {
  if (channels == 0 || leaves.count == 0) return;
  if (aligned) {
    RunReduceAndMapBy<kWideLanes<typename Map::Element>>(q, channels, leaves, reduction, map);
  } else {
    RunReduceAndMapBy<1>(q, channels, leaves, reduction, map);
  }
}

__global__ void __launch_bounds__(kThreads)
    UpdateAverages(int64_t channels, float divisor, const float* mean, const float* m2,
                   float momentum, float* running_mean, float* running_var) {
  WaitForPrevious();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  const float old_mean = running_mean[c], old_var = running_var[c];
  running_mean[c] = Fma(momentum, mean[c] - old_mean, old_mean);
  running_var[c] = Fma(momentum, m2[c] / divisor - old_var, old_var);
}

// Chunks of a leaf that one block takes; more where one stream is read than where three are.
constexpr int kMomentsChunks = 16, kGradientChunks = 8;

template <Mask kMask, bool kMore, class T>
void RunGradient(const Queue& q, const Leaves& leaves,
                 const GradientReduction<kMask, kMore, T>& r) {
  bool aligned = TakenWide(r.channels, r.x, r.dy, r.g);
  if constexpr (kMask == Mask::kRead) aligned = aligned && IsAligned16(r.y);
  if constexpr (kMore) aligned = aligned && IsAligned16(r.more);
  ReduceRows<kWideLanes<T>>(q, r, leaves, r.channels, aligned, kGradientChunks);
}

// Calls run<whether there is a relu, whether another tensor is added, type of the elements>().
template <class Run>
void WithKind(const BatchNormShape& shape, bool adds, const Run& run) {
  WithElement(shape.type, [&]<class T>() {
    if (shape.relu) {
      adds ? run.template operator()<true, true, T>() : run.template operator()<true, false, T>();
    } else {
      adds ? run.template operator()<false, true, T>() : run.template operator()<false, false, T>();
    }
  });
}

// Calls run(ForwardMap) with the map of these operands.
template <class Run>
void WithForwardMap(const BatchNormShape& shape, const void* x, const Moments& moments,
                    float epsilon, const float* weight, const float* bias, const void* residual,
                    void* y, const Run& run) {
  const auto with = [&]<bool kRelu, bool kResidual, class T>() {
    run(ForwardMap<kRelu, kResidual, T>{static_cast<const T*>(x), moments, epsilon, weight, bias,
                                        static_cast<const T*>(residual), static_cast<T*>(y)});
  };
  WithKind(shape, residual != nullptr, with);
}

// Calls run<mask, type of the elements>(); bias null: y is read.
template <class Run>
void WithMask(const BatchNormShape& shape, const float* bias, const Run& run) {
  WithElement(shape.type, [&]<class T>() {
    if (!shape.relu) return run.template operator()<Mask::kNone, T>();
    bias == nullptr ? run.template operator()<Mask::kRead, T>()
                    : run.template operator()<Mask::kComputed, T>();
  });
}

// Calls run(BackwardMap) with the map of these operands.
template <class Run>
void WithBackwardMap(const BatchNormShape& shape, const void* x, const void* y, const void* dy,
                     const Moments& moments, float epsilon, const float* weight,
                     const float* sum_dy, const float* sum_dy_xhat, int64_t sums_stride, void* dx,
                     const float* bias, const Run& run) {
  const auto with = [&]<Mask kMask, class T>() {
    const auto elements = [](const void* p) { return static_cast<const T*>(p); };
    run(BackwardMap<kMask, T>{elements(x), elements(y), elements(dy), moments, epsilon, weight,
                              sum_dy, sum_dy_xhat, sums_stride, static_cast<T*>(dx), bias});
  };
  WithMask(shape, bias, with);
}
template <Mask kMask, class T>
bool IsWide(const BackwardMap<kMask, T>& map, int64_t channels) {
  return TakenWide(channels, map.x, map.dy, map.dx) && (kMask != Mask::kRead || IsAligned16(map.y));
}

}  // namespace

void BatchNormMoments(const Queue& q, int64_t channels, const Leaves& leaves, const void* x,
                      float* mean, float* m2, int64_t stride, ElementType type) {
  WithElement(type, [&]<class T>() {
    const T* const elements = static_cast<const T*>(x);
    ReduceRows<kWideLanes<T>>(q, MomentsReduction<T>{elements, channels, mean, m2, stride}, leaves,
                              channels, TakenWide(channels, elements), kMomentsChunks);
  });
}

void BatchNormForward(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                      const void* x, const Moments& moments, float epsilon, const float* weight,
                      const float* bias, const void* residual, void* y) {
  WithForwardMap(shape, x, moments, epsilon, weight, bias, residual, y, [&](const auto& map) {
    RunMap(q, shape.channels, leaves, TakenWide(shape.channels, map.x, map.residual, map.y), map);
  });
}

void BatchNormForwardOfLeaves(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                              const void* x, float* mean, float* m2, int64_t stride, float epsilon,
                              const float* weight, const float* bias, const void* residual,
                              void* y) {
  const Moments moments = {mean, m2, stride};
  WithForwardMap(shape, x, moments, epsilon, weight, bias, residual, y, [&](const auto& map) {
    using T = typename std::decay_t<decltype(map)>::Element;
    const int64_t c = shape.channels;
    if (!AreOneChunk<T>(leaves)) {
      BatchNormMoments(q, c, leaves, x, mean, m2, stride, shape.type);
      return RunMap(q, c, leaves, TakenWide(c, map.x, map.residual, map.y), map);
    }
    RunReduceAndMap(q, c, leaves, TakenWide(c, map.x, map.residual, map.y),
                    MomentsReduction<T>{map.x, c, mean, m2, stride}, map);
  });
}

void BatchNormGradient(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                       const void* x, const void* y, const void* dy, const void* more,
                       const Moments& moments, float epsilon, void* g, float* sum_dy,
                       float* sum_dy_xhat, int64_t stride, const float* weight, const float* bias) {
  WithMask(shape, bias, [&]<Mask kMask, class T>() {
    const auto elements = [](const void* p) { return static_cast<const T*>(p); };
    const auto run = [&]<bool kMore>() {
      RunGradient(
          q, leaves,
          GradientReduction<kMask, kMore, T>{elements(x), elements(y), elements(dy), elements(more),
                                             shape.channels, moments, epsilon, static_cast<T*>(g),
                                             sum_dy, sum_dy_xhat, stride, weight, bias});
    };
    more != nullptr ? run.template operator()<true>() : run.template operator()<false>();
  });
}

void BatchNormBackward(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                       const void* x, const void* y, const void* dy, const Moments& moments,
                       float epsilon, const float* weight, const float* sum_dy,
                       const float* sum_dy_xhat, int64_t sums_stride, void* dx, const float* bias) {
  WithBackwardMap(shape, x, y, dy, moments, epsilon, weight, sum_dy, sum_dy_xhat, sums_stride, dx,
                  bias, [&](const auto& map) {
                    RunMap(q, shape.channels, leaves, IsWide(map, shape.channels), map);
                  });
}

void BatchNormBackwardOfLeaves(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                               const void* x, const void* y, const void* dy, const Moments& moments,
                               float epsilon, const float* weight, float* sum_dy,
                               float* sum_dy_xhat, int64_t stride, void* dx) {
  const int64_t c = shape.channels;
  WithBackwardMap(shape, x, y, dy, moments, epsilon, weight, sum_dy, sum_dy_xhat, stride, dx,
                  nullptr, [&]<Mask kMask, class T>(const BackwardMap<kMask, T>& map) {
                    if constexpr (kMask != Mask::kComputed) {
                      const GradientReduction<kMask, false, T> sums = {
                          map.x,   map.y,  map.dy,      nullptr, c,      moments, epsilon,
                          nullptr, sum_dy, sum_dy_xhat, stride,  weight, nullptr};
                      if (!AreOneChunk<T>(leaves)) {
                        RunGradient(q, leaves, sums);
                        return RunMap(q, c, leaves, IsWide(map, c), map);
                      }
                      RunReduceAndMap(q, c, leaves, IsWide(map, c), sums, map);
                    }
                  });
}

void UpdateRunningAverages(const Queue& q, int64_t channels, int64_t n, const float* mean,
                           const float* m2, float momentum, float* running_mean,
                           float* running_var) {
  const float divisor = static_cast<float>(n > 1 ? n - 1 : 1);
  Launch(q, dim3(static_cast<unsigned>(CeilDiv(channels, kThreads))), dim3(kThreads), 0,
         UpdateAverages, channels, divisor, mean, m2, momentum, running_mean, running_var);
}

}  // namespace lockstep::device::cuda
