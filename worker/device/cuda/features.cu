// Softmax and layer norm over the last dimension. A vector is one warp's, or where it is long one
// block's; lane l of kThreads takes features 4 l .. 4 l + 3, then those 4 kThreads further, whether
// or not they can be loaded at once; sums are in double, over lanes by a tree. Where a lane's
// features fit its registers they are read once, all of them before the first is needed.
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/row_reduction.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;
constexpr int64_t kMostWarpFeatures = 1024;
constexpr float kNegativeInfinity = -__builtin_inff();

// The kThreads threads that share a vector: a warp, or all of the block. kAligned: features can be
// taken by four.
template <int kThreads, bool kAligned>
struct Team {
  static constexpr bool kIsBlock = kThreads == kBlockThreads;
  static constexpr int kVectors = kBlockThreads / kThreads;  // of a block

  __device__ __forceinline__ Team()
      : vector(int64_t{blockIdx.x} * kVectors + static_cast<int>(threadIdx.x) / kThreads),
        lane(static_cast<int>(threadIdx.x) % kThreads) {}

  // Calls body(which of this lane's fours, its place behind the lane's first, how many of four).
  // kHeld: the most fours of a lane, which are held in registers; 0: any, which are not.
  template <int kHeld, class Body>
  __device__ __forceinline__ void ForEach(int features, Body body) const {
    const int own = features - 4 * lane;  // from the lane's first on
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int i = 4 * h * kThreads;
        if (i < own) body(h, i, kAligned ? 4 : min(4, own - i));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < own; i += 4 * kThreads) body(0, i, kAligned ? 4 : min(4, own - i));
    }
  }
  // Where a lane's first feature of its vector is.
  template <class T>
  __device__ __forceinline__ T* Begin(T* tensor, int features) const {
    return tensor + (vector * features + 4 * lane);
  }

  // The result is in all lanes, and a barrier of the team is behind all that came before.
  template <class T, class Combine>
  __device__ __forceinline__ T Reduce(T value, Combine combine) const {
#pragma unroll
    for (int stride = kWarp / 2; stride > 0; stride /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, stride));
    }
    if constexpr (kIsBlock) {
      T* const warps = SharedMemory<T>();
      __syncthreads();  // the last reduction has been read
      if (lane % kWarp == 0) warps[lane / kWarp] = value;
      __syncthreads();
      value = warps[0];
      for (int w = 1; w < kBlockWarps; ++w) value = combine(value, warps[w]);
    }
    return value;
  }
  __device__ __forceinline__ double Sum(double value) const {
    return Reduce(value, [](double a, double b) { return a + b; });
  }
  // NaN only where all are; the sums that follow find the others.
  __device__ __forceinline__ float Largest(float value) const {
    return Reduce(value, [](float a, float b) { return Maximum(a, b); });
  }

  const int64_t vector;
  const int lane;
};

template <bool kAligned>
__device__ __forceinline__ Lanes<4> Load(const float* p, int count) {
  if constexpr (kAligned) {
    return LoadLanes<4>(p);
  } else {
    Lanes<4> result = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) result.at[j] = p[j];
    }
    return result;
  }
}
template <bool kAligned>
__device__ __forceinline__ void Store(float* p, const Lanes<4>& values, int count) {
  if constexpr (kAligned) {
    StoreLanes<4>(p, values);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) p[j] = values.at[j];
    }
  }
}

// A lane's features of one tensor: from registers, or read where they are.
template <int kThreads, bool kAligned, int kHeld>
struct Features {
  __device__ __forceinline__ Features(const Team<kThreads, kAligned>& team, int features,
                                      const float* from)
      : p(from) {
    if constexpr (kHeld > 0) {
      team.template ForEach<kHeld>(
          features, [&](int h, int i, int count) { held[h] = Load<kAligned>(p + i, count); });
    }
  }
  __device__ __forceinline__ Lanes<4> At(int h, int i, int count) const {
    if constexpr (kHeld > 0) {
      return held[h];
    } else {
      return Load<kAligned>(p + i, count);
    }
  }

  const float* const p;
  Lanes<4> held[kHeld > 0 ? kHeld : 1];
};

// Blocks of a multiprocessor: no more, so that registers suffice for loads in flight.
template <int kHeld>
constexpr int kBlocksOfOne = kHeld == 8 ? 3 : 4;  // that read one tensor by itself
template <int kHeld>
constexpr int kBlocksOfMore = kHeld == 8 ? 2 : 3;

template <int kThreads, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kBlockThreads, kBlocksOfOne<kHeld>)
    ForwardSoftmax(int64_t n, int features, const float* x, float* y) {
  WaitForPrevious();
  const Team<kThreads, kAligned> team;
  if (team.vector >= n) return;
  Features<kThreads, kAligned, kHeld> input(team, features, team.Begin(x, features));
  y = team.Begin(y, features);
  float largest = kNegativeInfinity;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    const Lanes<4> values = input.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) largest = Maximum(values.at[j], largest);
    }
  });
  largest = team.Largest(largest);
  double sum = 0;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    Lanes<4> values = input.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values.at[j] = Exp(values.at[j] - largest);
      if (j < count) sum = sum + static_cast<double>(values.at[j]);
    }
    if constexpr (kHeld > 0) {
      input.held[h] = values;
    } else {
      Store<kAligned>(y + i, values, count);
    }
  });
  const float inverse = static_cast<float>(1.0 / team.Sum(sum));
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    Lanes<4> values;
    if constexpr (kHeld > 0) {
      values = input.held[h];
    } else {
      values = Load<kAligned>(y + i, count);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] = values.at[j] * inverse;
    Store<kAligned>(y + i, values, count);
  });
}

template <int kThreads, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kBlockThreads, kBlocksOfMore<kHeld>)
    BackwardSoftmax(int64_t n, int features, const float* y, const float* dy, float* dx) {
  WaitForPrevious();
  const Team<kThreads, kAligned> team;
  if (team.vector >= n) return;
  const Features<kThreads, kAligned, kHeld> outputs(team, features, team.Begin(y, features));
  const Features<kThreads, kAligned, kHeld> gradients(team, features, team.Begin(dy, features));
  dx = team.Begin(dx, features);
  double products = 0;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    const Lanes<4> output = outputs.At(h, i, count);
    const Lanes<4> gradient = gradients.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Exact: a product of two floats.
      products = products + static_cast<double>(output.at[j]) * static_cast<double>(gradient.at[j]);
    }
  });
  const float sum = static_cast<float>(team.Sum(products));
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    Lanes<4> output = outputs.At(h, i, count);
    const Lanes<4> gradient = gradients.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) output.at[j] = output.at[j] * (gradient.at[j] - sum);
    Store<kAligned>(dx + i, output, count);
  });
}

template <int kThreads, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kBlockThreads, kBlocksOfMore<kHeld>)
    ForwardNorm(int64_t n, int features, const float* x, float epsilon,
                const float* __restrict__ weight, const float* __restrict__ bias, float* y,
                float* __restrict__ stats) {
  WaitForPrevious();
  const Team<kThreads, kAligned> team;
  if (team.vector >= n) return;
  const Features<kThreads, kAligned, kHeld> input(team, features, team.Begin(x, features));
  y = team.Begin(y, features);
  weight += 4 * team.lane;
  bias += 4 * team.lane;
  const double share = static_cast<double>(features);
  double sum = 0;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    const Lanes<4> values = input.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = sum + static_cast<double>(values.at[j]);
  });
  const float mean = static_cast<float>(team.Sum(sum) / share);
  double squares = 0;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    const Lanes<4> values = input.At(h, i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const double d = static_cast<double>(values.at[j] - mean);
      if (j < count) squares = squares + d * d;
    }
  });
  const float inverse = InverseDeviation(static_cast<float>(team.Sum(squares) / share), epsilon);
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    Lanes<4> values = input.At(h, i, count);
    const Lanes<4> scale = Load<kAligned>(weight + i, count);
    const Lanes<4> shift = Load<kAligned>(bias + i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values.at[j] = Fma((values.at[j] - mean) * inverse, scale.at[j], shift.at[j]);
    }
    Store<kAligned>(y + i, values, count);
  });
  if (team.lane == 0) {
    stats[2 * team.vector] = mean;
    stats[2 * team.vector + 1] = inverse;
  }
}

template <int kThreads, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kBlockThreads, kBlocksOfMore<kHeld>)
    BackwardNorm(int64_t n, int features, const float* x, const float* __restrict__ stats,
                 const float* __restrict__ weight, const float* dy, float* dx) {
  WaitForPrevious();
  const Team<kThreads, kAligned> team;
  if (team.vector >= n) return;
  const Features<kThreads, kAligned, kHeld> input(team, features, team.Begin(x, features));
  const Features<kThreads, kAligned, kHeld> gradients(team, features, team.Begin(dy, features));
  dx = team.Begin(dx, features);
  weight += 4 * team.lane;
  const float mean = stats[2 * team.vector], inverse = stats[2 * team.vector + 1];
  double sum = 0, sum_x = 0;
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    const Lanes<4> values = input.At(h, i, count);
    const Lanes<4> gradient = gradients.At(h, i, count);
    const Lanes<4> scale = Load<kAligned>(weight + i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const double g = static_cast<double>(gradient.at[j] * scale.at[j]);
      if (j >= count) continue;
      sum = sum + g;
      sum_x = sum_x + g * static_cast<double>((values.at[j] - mean) * inverse);
    }
  });
  const double share = static_cast<double>(features);
  const float offset = static_cast<float>(team.Sum(sum) / share);
  const float slope = static_cast<float>(team.Sum(sum_x) / share);
  team.template ForEach<kHeld>(features, [&](int h, int i, int count) {
    Lanes<4> values = input.At(h, i, count);
    const Lanes<4> gradient = gradients.At(h, i, count);
    const Lanes<4> scale = Load<kAligned>(weight + i, count);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float g = gradient.at[j] * scale.at[j], xhat = (values.at[j] - mean) * inverse;
      values.at[j] = inverse * Fma(0.0f - xhat, slope, g - offset);
    }
    Store<kAligned>(dx + i, values, count);
  });
}

// The kernel `choose` has for a length and alignment, on all vectors.
template <class Choose, class... Arguments>
void Run(const Queue& q, int64_t n, int64_t features, bool aligned, Choose choose,
         Arguments... arguments) {
  if (n == 0) return;
  const bool warps = features <= kMostWarpFeatures;
  const dim3 grid(static_cast<unsigned>(warps ? CeilDiv(n, kBlockWarps) : n));
  const auto launch = [&]<int kThreads, bool kAligned, int kHeld>() {
    Launch(q, grid, dim3(kBlockThreads), warps ? 0 : kBlockWarps * sizeof(double),
           choose(std::integral_constant<int, kThreads>(), std::bool_constant<kAligned>(),
                  std::integral_constant<int, kHeld>()),
           n, features, arguments...);
  };
  const auto fours = [&](int threads) { return CeilDiv(features, 4 * threads); };
  if (warps && fours(kWarp) == 1) {
    aligned ? launch.template operator()<kWarp, true, 1>()
            : launch.template operator()<kWarp, false, 1>();
  } else if (!aligned) {
    warps ? launch.template operator()<kWarp, false, 0>()
          : launch.template operator()<kBlockThreads, false, 0>();
  } else if (warps) {
    fours(kWarp) <= 4 ? launch.template operator()<kWarp, true, 4>()
                      : launch.template operator()<kWarp, true, 8>();
  } else if (fours(kBlockThreads) <= 4) {
    launch.template operator()<kBlockThreads, true, 4>();
  } else if (fours(kBlockThreads) <= 8) {
    launch.template operator()<kBlockThreads, true, 8>();
  } else {
    launch.template operator()<kBlockThreads, true, 0>();
  }
}

// Sums over a leaf's vectors: of dy xhat, and of dy.
struct WeightReduction {
  using Order = RowOrder<float>;
  static constexpr int kPlanes = 2;
  static constexpr int kMostThreads = 512;
  static constexpr int kGroup = 4;  // vectors whose loads are in flight

  const float* x;
  const float* stats;
  const float* dy;
  int64_t features;
  float* dweight;
  float* dbias;
  int64_t stride;

  template <int kVector>
  __device__ __forceinline__ void Accumulate(const LaneRows& rows, int64_t column,
                                             Partial<kVector, 2>* sum) const {
    const int64_t step = Order::kLanes * features;
    int64_t at = rows.first * features + column;
    const float* of_row = stats + 2 * rows.first;
    for (int left = rows.count; left > 0; left -= kGroup) {
      Lanes<kVector> values[kGroup], gradient[kGroup];
      float mean[kGroup], inverse[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k, at += step, of_row += 2 * Order::kLanes) {
        if (k >= left) continue;
        values[k] = LoadLanes<kVector>(x + at);
        gradient[k] = LoadLanes<kVector>(dy + at);
        mean[k] = of_row[0];
        inverse[k] = of_row[1];
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (k >= left) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float g = gradient[k].at[v], xhat = (values[k].at[v] - mean[k]) * inverse[k];
          sum->plane[0].at[v] = Fma(g, xhat, sum->plane[0].at[v]);
          sum->plane[1].at[v] = sum->plane[1].at[v] + g;
        }
      }
    }
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
    const int64_t at = chunks.leaf * stride + column;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      dweight[at + v] = static_cast<float>(total[0][v]);
      dbias[at + v] = static_cast<float>(total[1][v]);
    }
  }
};

}  // namespace

void SoftmaxForward(const Queue& q, int64_t n, int64_t features, const float* x, float* y) {
  Run(
      q, n, features, TakenByFour(features, x, y),
      [](auto threads, auto aligned, auto held) {
        return ForwardSoftmax<threads(), aligned(), held()>;
      },
      x, y);
}

void SoftmaxBackward(const Queue& q, int64_t n, int64_t features, const float* y, const float* dy,
                     float* dx) {
  Run(
      q, n, features, TakenByFour(features, y, dy, dx),
      [](auto threads, auto aligned, auto held) {
        return BackwardSoftmax<threads(), aligned(), held()>;
      },
      y, dy, dx);
}

void LayerNormForward(const Queue& q, int64_t n, int64_t features, const float* x, float epsilon,
                      const float* weight, const float* bias, float* y, float* stats) {
  Run(
      q, n, features, TakenByFour(features, x, weight, bias, y),
      [](auto threads, auto aligned, auto held) {
        return ForwardNorm<threads(), aligned(), held()>;
      },
      x, epsilon, weight, bias, y, stats);
}

void LayerNormBackward(const Queue& q, int64_t n, int64_t features, const float* x,
                       const float* stats, const float* weight, const float* dy, float* dx) {
  Run(
      q, n, features, TakenByFour(features, x, weight, dy, dx),
      [](auto threads, auto aligned, auto held) {
        return BackwardNorm<threads(), aligned(), held()>;
      },
      x, stats, weight, dy, dx);
}

void LayerNormBackwardWeight(const Queue& q, const Leaves& leaves, int64_t features, const float* x,
                             const float* stats, const float* dy, float* dweight, float* dbias,
                             int64_t stride) {
  ReduceRows(q, WeightReduction{x, stats, dy, features, dweight, dbias, stride}, leaves, features,
             TakenByFour(features, x, dy), /*most_chunks_a_block=*/4);
}

}  // namespace lockstep::device::cuda
