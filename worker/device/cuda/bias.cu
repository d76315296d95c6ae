// What surrounds a library's product: factors rounded before it, bias and relu behind it.
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // in flight, of one thread
constexpr int64_t kMostBlocks = 132 * 16;

int BlocksFor(int64_t vectors) {
  const int64_t blocks = CeilDiv(vectors, kThreads * kLoads);
  return static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// n and channels in vectors of kLanes. A thread walks by a fixed step, and through the channels by
// what that leaves of them. y may be x.
template <int kLanes, bool kBias, bool kRelu>
__global__ void __launch_bounds__(kThreads) AddBias(int64_t n, uint32_t channels, const float* x,
                                                    const float* __restrict__ bias, float* y) {
  WaitForPrevious();
  const uint32_t step = gridDim.x * kThreads;
  const uint32_t channel_step = step % channels;
  const uint32_t first = blockIdx.x * kThreads + threadIdx.x;
  uint32_t channel = first % channels;
  for (int64_t i = first; i < n; i += static_cast<int64_t>(step) * kLoads) {
    Lanes<kLanes> v[kLoads], b[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = i + static_cast<int64_t>(step) * k;
      if (at < n) {
        v[k] = LoadLanes<kLanes>(x + at * kLanes);
        if (kBias) b[k] = LoadLanes<kLanes>(bias + static_cast<int64_t>(channel) * kLanes);
      }
      channel += channel_step;
      if (channel >= channels) channel -= channels;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = i + static_cast<int64_t>(step) * k;
      if (at >= n) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        float value = v[k].at[j];
        if (kBias) value = value + b[k].at[j];
        v[k].at[j] = kRelu ? Relu(value) : value;
      }
      StoreLanes<kLanes>(y + at * kLanes, v[k]);
    }
  }
}

template <int kLanes>
void AddBiasBy(const Queue& q, int64_t n, int64_t channels, const float* x, const float* bias,
               bool relu, float* y) {
  const int64_t vectors = n / kLanes;
  const auto kernel = bias == nullptr ? AddBias<kLanes, false, true>
                      : relu          ? AddBias<kLanes, true, true>
                                      : AddBias<kLanes, true, false>;
  Launch(q, dim3(static_cast<uint32_t>(BlocksFor(vectors))), dim3(kThreads), 0, kernel, vectors,
         static_cast<uint32_t>(channels / kLanes), x, bias, y);
}

__device__ __forceinline__ float InFloat(float x) {
  const uint32_t bits = Bf16Of(x) << 16;
  float rounded;
  memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
}

// n in vectors of kLanes. y may be x.
template <int kLanes>
__global__ void __launch_bounds__(kThreads) Round(int64_t n, const float* x, float* y) {
  WaitForPrevious();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < n; i += step * kLoads) {
    Lanes<kLanes> v[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + step * k < n) v[k] = LoadLanes<kLanes>(x + (i + step * k) * kLanes);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + step * k >= n) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) v[k].at[j] = InFloat(v[k].at[j]);
      StoreLanes<kLanes>(y + (i + step * k) * kLanes, v[k]);
    }
  }
}

template <int kLanes>
void RoundBy(const Queue& q, int64_t n, const float* x, float* y) {
  if (n == 0) return;
  Launch(q, dim3(static_cast<uint32_t>(BlocksFor(n))), dim3(kThreads), 0, Round<kLanes>, n, x, y);
}

}  // namespace

void BiasForward(const Queue& q, int64_t n, int64_t channels, const float* x, const float* bias,
                 bool relu, float* y) {
  if (n == 0) return;
  if (bias == nullptr) {
    // Any number of channels will do: one that can be taken by four, as far as n goes.
    const bool by_four = TakenByFour(n, x, y);
    if (!relu) {
      if (y != x) {
        static_cast<void>(cudaMemcpyAsync(y, x, static_cast<size_t>(n) * sizeof(float),
                                          cudaMemcpyDeviceToDevice, q.stream));
      }
    } else if (by_four) {
      AddBiasBy<4>(q, n, 4, x, nullptr, true, y);
    } else {
      AddBiasBy<1>(q, n, 1, x, nullptr, true, y);
    }
  } else if (TakenByFour(channels, x, bias, y)) {
    AddBiasBy<4>(q, n, channels, x, bias, relu, y);
  } else {
    AddBiasBy<1>(q, n, channels, x, bias, relu, y);
  }
}

void RoundInFloats(const Queue& q, int64_t n, const float* x, float* y) {
  if (TakenByFour(0, x, y)) {
    const int64_t whole = n / 4 * 4;
    RoundBy<4>(q, n / 4, x, y);
    RoundBy<1>(q, n - whole, x + whole, y + whole);
  } else {
    RoundBy<1>(q, n, x, y);
  }
}

}  // namespace lockstep::device::cuda
