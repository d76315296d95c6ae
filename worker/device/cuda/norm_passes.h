// What a pass of a batch norm over {n, channels} does: reductions of a leaf's rows to moments and
// to what backward sums, and maps of elements by these. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/row_reduction.h"
#include "worker/device/kernel_math.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

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

  // The same of a leaf of n rows that is one chunk.
  __device__ __forceinline__ static void MergeOne(int n, float pivot, const Partial<1, 2>& chunk,
                                                  float* mean, float* m2) {
    const double rows = n, own = static_cast<double>(chunk.plane[0].at[0]);
    const double centre = (0.0 + rows * own) / rows, d = own - centre;
    *mean = static_cast<float>(static_cast<double>(pivot) + centre);
    *m2 = static_cast<float>(static_cast<double>(chunk.plane[1].at[0]) + rows * (d * d));
  }
};

// ---- what backward sums.

// Where dy goes on: everywhere, where y is above 0, where y would be if it were computed again, or
// where forward has said that it is.
enum class Mask { kNone, kRead, kComputed, kSaid };
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
  static constexpr int kGroup = kMask == Mask::kNone || !kMore ? 4 : kMask == Mask::kSaid ? 3 : 2;
  using Output = std::conditional_t<kMask == Mask::kSaid, uint8_t, T>;

  const T* x;
  const Output* y;  // or where it is above 0
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
    [[maybe_unused]] uint32_t above[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k >= count) continue;
      row[k].Load(x + at + k * step);
      gradient[k].Load(dy + at + k * step);
      if constexpr (kMore) second[k].Load(more + at + k * step);
      if constexpr (kMask == Mask::kRead) output[k].Load(y + at + k * step);
      if constexpr (kMask == Mask::kSaid) above[k] = y[(at + k * step) / 8];
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
        if constexpr (kMask == Mask::kSaid) value = above[k] >> v & 1 ? value : 0.0f;
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

// ---- maps. What one knows of a channel, kConstants floats, is made of kInputs others (Read,
// Know).

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
  uint8_t* above;  // of rows that are taken by eight; null: not wanted

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
      if constexpr (kRelu && kResidual && kVector == 8) {
        if (map.above == nullptr) return;
        uint32_t bits = 0;
#pragma unroll
        for (int v = 0; v < 8; ++v) bits |= y.at[v] > kStoredAsZero<T> ? 1u << v : 0;
        map.above[at / 8] = static_cast<uint8_t>(bits);
      }
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

}  // namespace lockstep::device::cuda
