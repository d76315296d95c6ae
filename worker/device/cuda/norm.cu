// Batch norm over {n, channels}. A thread has neighbouring channels and walks down rows.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/norm_passes.h"
#include "worker/device/cuda/row_reduction.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

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
  if (kMask == Mask::kSaid && !aligned) {
    Fail(q, "a batch norm was told where it is above 0, of what is not taken by eight");
  }
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
                    void* y, uint8_t* above, const Run& run) {
  const auto with = [&]<bool kRelu, bool kResidual, class T>() {
    run(ForwardMap<kRelu, kResidual, T>{static_cast<const T*>(x), moments, epsilon, weight, bias,
                                        static_cast<const T*>(residual), static_cast<T*>(y),
                                        above});
  };
  WithKind(shape, residual != nullptr, with);
}

template <bool kRelu, bool kResidual, class T>
bool IsWide(const Queue& q, const ForwardMap<kRelu, kResidual, T>& map, int64_t channels) {
  const bool wide = TakenWide(channels, map.x, map.residual, map.y);
  if (map.above != nullptr && !(wide && kRelu && kResidual && kWideLanes<T> == 8)) {
    Fail(q, "a batch norm was asked where it is above 0, of what is not taken by eight");
  }
  return wide;
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
                      const float* bias, const void* residual, void* y, uint8_t* above) {
  WithForwardMap(shape, x, moments, epsilon, weight, bias, residual, y, above,
                 [&](const auto& map) {
                   RunMap(q, shape.channels, leaves, IsWide(q, map, shape.channels), map);
                 });
}

void BatchNormForwardOfLeaves(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                              const void* x, float* mean, float* m2, int64_t stride, float epsilon,
                              const float* weight, const float* bias, const void* residual, void* y,
                              uint8_t* above) {
  const Moments moments = {mean, m2, stride};
  const int64_t c = shape.channels;
  WithForwardMap(shape, x, moments, epsilon, weight, bias, residual, y, above,
                 [&](const auto& map) {
                   using T = typename std::decay_t<decltype(map)>::Element;
                   if (!AreOneChunk<T>(leaves)) {
                     BatchNormMoments(q, c, leaves, x, mean, m2, stride, shape.type);
                     return RunMap(q, c, leaves, IsWide(q, map, c), map);
                   }
                   RunReduceAndMap(q, c, leaves, IsWide(q, map, c),
                                   MomentsReduction<T>{map.x, c, mean, m2, stride}, map);
                 });
}

void BatchNormGradient(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                       const void* x, const void* y, const void* dy, const void* more,
                       const Moments& moments, float epsilon, void* g, float* sum_dy,
                       float* sum_dy_xhat, int64_t stride, const float* weight, const float* bias,
                       const uint8_t* above) {
  const auto with = [&]<Mask kMask, class T>() {
    const auto elements = [](const void* p) { return static_cast<const T*>(p); };
    const auto run = [&]<bool kMore>() {
      using Reduction = GradientReduction<kMask, kMore, T>;
      const void* const output = kMask == Mask::kSaid ? above : y;
      RunGradient(q, leaves,
                  Reduction{elements(x), static_cast<const typename Reduction::Output*>(output),
                            elements(dy), elements(more), shape.channels, moments, epsilon,
                            static_cast<T*>(g), sum_dy, sum_dy_xhat, stride, weight, bias});
    };
    more != nullptr ? run.template operator()<true>() : run.template operator()<false>();
  };
  if (above == nullptr) return WithMask(shape, bias, with);
  with.template operator()<Mask::kSaid, StoredBf16>();
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
