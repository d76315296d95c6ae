// What tests of the emulator have in common: the calls that most of them make, and some kernels.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/gpu/emulator/emulator.h"
#include "worker/device/cuda/launch.h"

namespace lockstep::emulator {

using device::cuda::kWarp;
using device::cuda::Launch;
using device::cuda::Queue;
using device::cuda::SharedMemory;

constexpr unsigned kAll = 0xffffffffu;

inline const std::vector<Order> kOrders = {
    {},
    {Order::Kind::kReversed, 0},
    {Order::Kind::kPermuted, 1},
    {Order::Kind::kPermuted, 2},
};

class EmulatorTest : public testing::Test {
 protected:
  void SetUp() override { Begin({}); }
  void TearDown() override { Configure({}); }

  void Begin(const Options& options) {
    Configure(options);
    ASSERT_EQ(cudaStreamCreateWithFlags(&queue_.stream, cudaStreamNonBlocking), cudaSuccess);
  }
  cudaStream_t MakeStream(unsigned flags = cudaStreamNonBlocking) {
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, flags), cudaSuccess);
    return stream;
  }
  cudaEvent_t MakeEvent() {
    cudaEvent_t event = nullptr;
    EXPECT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
    return event;
  }
  template <class T>
  T* Device(size_t count) {
    T* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, count * sizeof(T)), cudaSuccess);
    return memory;
  }
  template <class T>
  T* Device(const std::vector<T>& values) {
    T* const memory = Device<T>(values.size());
    EXPECT_EQ(cudaMemcpyAsync(memory, values.data(), values.size() * sizeof(T), cudaMemcpyDefault,
                              queue_.stream),
              cudaSuccess);
    return memory;
  }
  template <class T>
  T* Pinned(size_t count, T value) {
    T* memory = nullptr;
    EXPECT_EQ(cudaHostAlloc(&memory, count * sizeof(T), cudaHostAllocDefault), cudaSuccess);
    std::fill(memory, memory + count, value);
    return memory;
  }
  // After what is on the stream.
  template <class T>
  std::vector<T> Read(const T* memory, size_t count) {
    std::vector<T> values(count);
    EXPECT_EQ(
        cudaMemcpyAsync(values.data(), memory, count * sizeof(T), cudaMemcpyDefault, queue_.stream),
        cudaSuccess);
    return values;
  }
  cudaError_t Wait() { return cudaStreamSynchronize(queue_.stream); }

  Queue queue_;
};
using EmulatorDeathTest = EmulatorTest;

// Sums of x by blocks: shuffles, shared memory and a barrier.
inline __global__ void Sums(int n, const float* x, float* sums) {
  float* const of_warp = SharedMemory<float>();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float sum = i < n ? x[i] : 0.0f;
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : 0.0f;
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, step);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

inline __global__ void AddOne(int n, float* x) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += 1.0f;
}

inline __global__ void Double(int n, float* x) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] *= 2.0f;
}

}  // namespace lockstep::emulator
