// The emulator itself: that it runs kernels as a GPU does, and finds what it is there to find.
#include "tests/gpu/emulator/emulator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "tests/gpu/emulator/fiber.h"  // LOCKSTEP_EMULATOR_ASAN
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"

namespace lockstep::emulator {
namespace {

using device::cuda::kWarp;
using device::cuda::Launch;
using device::cuda::Queue;
using device::cuda::SharedMemory;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

constexpr unsigned kAll = 0xffffffffu;
const std::vector<Order> kOrders = {
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

// ---- kernels.

__global__ void Index(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

// Sums of x by blocks: shuffles, shared memory and a barrier.
__global__ void Sums(int n, const float* x, float* sums) {
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

__global__ void Turn(bool barrier, float* x) {
  float* const shared = SharedMemory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void AddOne(int n, float* x) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += 1.0f;
}

__global__ void Double(int n, float* x) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] *= 2.0f;
}

TEST_F(EmulatorTest, EachThreadKnowsItsPlace) {
  const dim3 grid(3, 2, 2), block(4, 3, 2);
  auto* const out = Device<unsigned>(12 * 24);
  for (const Order& order : kOrders) {
    SetOrder(order);
    Launch(queue_, grid, block, 0, Index, out);
    std::vector<unsigned> expected;
    for (unsigned b = 0; b < 12; ++b) {
      for (unsigned t = 0; t < 24; ++t) expected.push_back(b * 1000 + t);
    }
    EXPECT_THAT(Read(out, 12 * 24), ElementsAreArray(expected));
  }
}

TEST_F(EmulatorTest, BlocksSumInEveryOrder) {
  for (const int threads : {32, 64, 256, 1024}) {
    std::vector<float> values(3000);
    std::iota(values.begin(), values.end(), 0.0f);
    const float* const x = Device(values);
    const int blocks = (3000 + threads - 1) / threads;
    float* const sums = Device<float>(static_cast<size_t>(blocks));
    for (const Order& order : kOrders) {
      SetOrder(order);
      Launch(queue_, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
             sizeof(float) * static_cast<size_t>(threads / kWarp), Sums, 3000, x, sums);
      const std::vector<float> result = Read(sums, static_cast<size_t>(blocks));
      EXPECT_EQ(std::accumulate(result.begin(), result.end(), 0.0), 2999.0 * 3000 / 2);
    }
  }
}

// A missing barrier shows: what another thread is to write is still garbage, in one order or the
// other.
TEST_F(EmulatorTest, AMissingBarrierChangesResults) {
  std::vector<float> values(64), turned(64);
  std::iota(values.begin(), values.end(), 0.0f);
  std::reverse_copy(values.begin(), values.end(), turned.begin());
  for (const bool barrier : {true, false}) {
    for (const Order& order : kOrders) {
      SetOrder(order);
      float* const x = Device(values);
      Launch(queue_, dim3(1), dim3(64), 64 * sizeof(float), Turn, barrier, x);
      EXPECT_EQ(Read(x, 64) == turned, barrier);
    }
  }
}

// Copies in the background come with the wait for their group, and not before: what was there is
// seen until then.
__global__ void CopyInGroups(const uint4* from, uint4* seen) {
  using namespace device::cuda;
  uint4* const shared = SharedMemory<uint4>();
  for (int i = 0; i < 3; ++i) shared[i] = make_uint4(7, 7, 7, 7);
  const auto look = [&] {
    for (int i = 0; i < 3; ++i) *seen++ = shared[i];
  };
  CopyInBackground(shared, from);
  CommitCopies();
  CopyOrZeroInBackground(shared + 1, from, false);
  CommitCopies();
  CopyInBackground(shared + 2, from + 1);
  WaitForGroups<1>();
  look();
  WaitForGroups<0>();
  look();
  WaitForCopies();
  look();
}

TEST_F(EmulatorTest, CopiesInTheBackgroundComeByGroups) {
  const uint4* const from = Device(std::vector<uint4>{{1, 1, 1, 1}, {2, 2, 2, 2}});
  uint4* const seen = Device<uint4>(9);
  Launch(queue_, dim3(1), dim3(1), 3 * sizeof(uint4), CopyInGroups, from, seen);
  std::vector<unsigned> first;
  for (const uint4& piece : Read(seen, 9)) first.push_back(piece.w);
  EXPECT_THAT(first, ElementsAreArray({1, 7, 7, 1, 0, 7, 1, 0, 2}));
}

struct Exchanged {
  int of_lane, up, down, across, in_half;
  unsigned ballot;
  int any, all;
  double wide;
};
__global__ void ExchangeAll(Exchanged* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Exchanged& e = out[threadIdx.x];
  e.of_lane = __shfl_sync(kAll, lane, 5);
  e.up = __shfl_up_sync(kAll, lane, 3);
  e.down = __shfl_down_sync(kAll, lane, 3);
  e.across = __shfl_xor_sync(kAll, lane, 9);
  e.in_half = __shfl_down_sync(kAll, lane, 4, 16);
  e.ballot = __ballot_sync(kAll, lane % 3 == 0);
  e.any = __any_sync(kAll, lane == 7);
  e.all = __all_sync(kAll, lane != 7);
  e.wide = __shfl_sync(kAll, 0.5 + lane, lane + 1);  // modulo the width
}

TEST_F(EmulatorTest, ExchangesFollowTheirDefinition) {
  auto* const out = Device<Exchanged>(96);
  for (const Order& order : kOrders) {
    SetOrder(order);
    Launch(queue_, dim3(1), dim3(96), 0, ExchangeAll, out);
    const std::vector<Exchanged> result = Read(out, 96);
    for (int t = 0; t < 96; ++t) {
      SCOPED_TRACE(t);
      const Exchanged& e = result[static_cast<size_t>(t)];
      const int lane = t % 32;
      EXPECT_EQ(e.of_lane, 5);
      EXPECT_EQ(e.up, lane < 3 ? lane : lane - 3);
      EXPECT_EQ(e.down, lane > 28 ? lane : lane + 3);
      EXPECT_EQ(e.across, lane ^ 9);
      EXPECT_EQ(e.in_half, lane % 16 > 11 ? lane : lane + 4);
      EXPECT_EQ(e.ballot, 0x49249249u);
      EXPECT_EQ(e.any, 1);
      EXPECT_EQ(e.all, 0);
      EXPECT_EQ(e.wide, 0.5 + (lane + 1) % 32);
    }
  }
}

// The halves of a warp go separate ways, with masks of their own.
__global__ void Halves(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int value = lane;
  if (lane < 16) {
    for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(0xffffu, value, step);
  } else {
    value = __shfl_sync(0xffff0000u, value, 20);
  }
  __syncwarp();
  out[lane] = value;
}

TEST_F(EmulatorTest, PartsOfAWarpExchangeByThemselves) {
  int* const out = Device<int>(32);
  for (const Order& order : kOrders) {
    SetOrder(order);
    Launch(queue_, dim3(1), dim3(32), 0, Halves, out);
    const std::vector<int> result = Read(out, 32);
    EXPECT_THAT(std::vector<int>(result.begin(), result.begin() + 16), Each(120));
    EXPECT_THAT(std::vector<int>(result.begin() + 16, result.end()), Each(20));
  }
}

__global__ void LastBlock(unsigned* arrived, int* last) {
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(arrived, 1u) == gridDim.x - 1) atomicAdd(last, 1);
  }
}

TEST_F(EmulatorTest, AtomicsCountBlocks) {
  auto* const arrived = Device<unsigned>(std::vector<unsigned>{0});
  auto* const last = Device<int>(std::vector<int>{0});
  SetOrder(kOrders[2]);
  Launch(queue_, dim3(100), dim3(64), 0, LastBlock, arrived, last);
  EXPECT_THAT(Read(arrived, 1), ElementsAre(100u));
  EXPECT_THAT(Read(last, 1), ElementsAre(1));
}

__global__ void CopyShared(float* out) { out[threadIdx.x] = SharedMemory<float>()[threadIdx.x]; }

TEST_F(EmulatorTest, MemoryHoldsGarbageUntilWritten) {
  float* const out = Device<float>(32);
  for (const float value : Read(out, 32)) EXPECT_TRUE(std::isnan(value));
  for (int i = 0; i < 2; ++i) {
    Launch(queue_, dim3(1), dim3(32), 128, CopyShared, out);
    for (const float value : Read(out, 32)) EXPECT_TRUE(std::isnan(value));
  }
  float* pinned = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, 4, cudaHostAllocDefault), cudaSuccess);
  EXPECT_TRUE(std::isnan(*pinned));
}

// ---- what must not be.

__global__ void SomeReturn(int mine) {
  if (static_cast<int>(threadIdx.x) == mine) return;
  __syncthreads();
}
__global__ void TwoBarriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void LaneStaysAway() {
  if (threadIdx.x != 3) __shfl_sync(kAll, 1.0f, 0);
  __syncthreads();
}
__global__ void LaneReturns() {
  if (threadIdx.x == 3) return;
  __syncwarp();
}
__global__ void ReadsOutside(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xffffu, 1, 16);
}
__global__ void NotInItsMask() { __syncwarp(1); }

TEST_F(EmulatorDeathTest, DivergenceIsFound) {
  const auto run = [this](auto kernel, unsigned threads, auto... arguments) {
    Launch(queue_, dim3(2), dim3(threads), 0, kernel, arguments...);
    Wait();
  };
  for (const int mine : {0, 40, 63}) {
    EXPECT_DEATH(
        run(SomeReturn, 64, mine),
        "SomeReturn<<<.2, 1, 1., .64, 1, 1., 0>>>, block .0, 0, 0.(.|\n)*1 thread returned");
  }
  EXPECT_DEATH(run(TwoBarriers, 64), "different calls of __syncthreads(.|\n)*emulator_test.cc");
  EXPECT_DEATH(
      run(LaneStaysAway, 32),
      "deadlock(.|\n)*31 threads waiting in __shfl_sync(.|\n)*1 thread waiting in __syncthreads");
  EXPECT_DEATH(run(LaneReturns, 32), "__syncwarp at(.|\n)*returned .0x00000008");
  EXPECT_DEATH(run(ReadsOutside, 32, Device<int>(1)), "reads lane 16, which takes no part");
  EXPECT_DEATH(run(NotInItsMask, 32), "lane 1 is not in its mask 0x00000001");
}

__global__ void WriteAt(float* x, int i) { x[i] = 1.0f; }
__global__ void WriteShared(int i) { SharedMemory<float>()[i] = 1.0f; }

TEST_F(EmulatorDeathTest, WritesOutsideOfMemoryAreFound) {
  float* const x = Device<float>(5);
  Device<float>(5);
  for (const int i : {-1, 5, 100, 1000}) {
    const auto run = [&] {
      Launch(queue_, dim3(1), dim3(1), 0, WriteAt, x, i);
      Wait();
      cudaFree(x);
    };
#if defined(LOCKSTEP_EMULATOR_ASAN)
    EXPECT_DEATH(run(), "use-after-poison(.|\n)*WriteAt");
#else
    EXPECT_DEATH(run(), "bytes around the device allocation .* of 20 bytes have been written");
#endif
  }
  for (const int i : {5, 6, 200}) {
    const auto run = [&] {
      Launch(queue_, dim3(1), dim3(1), 5 * sizeof(float), WriteShared, i);
      Wait();
    };
#if defined(LOCKSTEP_EMULATOR_ASAN)
    EXPECT_DEATH(run(), "use-after-poison(.|\n)*WriteShared");
#else
    EXPECT_DEATH(run(), "WriteShared(.|\n)*wrote behind the block's shared memory");
#endif
  }
  // At the last element there is nothing to find.
  Launch(queue_, dim3(1), dim3(1), 0, WriteAt, x, 4);
  Launch(queue_, dim3(1), dim3(1), 5 * sizeof(float), WriteShared, 4);
  EXPECT_EQ(Wait(), cudaSuccess);
  EXPECT_TRUE(GuardsIntact(x));
}

TEST_F(EmulatorDeathTest, ReadsOfFreedMemoryAreFound) {
  float* const x = Device(std::vector<float>(100, 1.0f));
  float* const y = Device<float>(1);
  ASSERT_EQ(cudaFree(x), cudaSuccess);
  const auto run = [&] {
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    Wait();
  };
  EXPECT_DEATH(run(), "AddOne<<<.*points neither to device nor to pinned memory");
  static_cast<void>(y);
}

TEST_F(EmulatorDeathTest, TheHostCannotTouchDeviceMemory) {
  float* const x = Device(std::vector<float>(8, 1.0f));
  ASSERT_EQ(Wait(), cudaSuccess);
  const volatile float* const touched = x;
  EXPECT_DEATH(static_cast<void>(*touched), "");
  Options options;
  options.protect = false;
  Begin(options);
  const volatile float* const open = Device(std::vector<float>(8, 1.0f));
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*open, 1.0f);
}

TEST_F(EmulatorDeathTest, PointersToOtherMemoryAreFound) {
  std::vector<float> host(8);
  const auto run = [&](float* x) {
    Launch(queue_, dim3(1), dim3(8), 0, AddOne, 8, x);
    Wait();
  };
  EXPECT_DEATH(run(host.data()), "points neither to device nor to pinned memory");
  ASSERT_EQ(cudaHostRegister(host.data(), 32, cudaHostRegisterDefault), cudaSuccess);
  run(host.data());
  EXPECT_THAT(host, Each(1.0f));
  ASSERT_EQ(cudaHostUnregister(host.data()), cudaSuccess);
  EXPECT_EQ(cudaHostUnregister(host.data()), cudaErrorHostMemoryNotRegistered);
}

TEST_F(EmulatorTest, LaunchesBeyondTheLimitsAreRefused) {
  float* const x = Device<float>(8);
  const auto launch = [&](dim3 grid, dim3 block, size_t shared) {
    Launch(queue_, grid, block, shared, AddOne, 0, x);
    return cudaGetLastError();
  };
  EXPECT_EQ(launch(dim3(1), dim3(1024), size_t{48} << 10), cudaSuccess);
  EXPECT_EQ(launch(dim3(1), dim3(1025), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(32, 33), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(0), dim3(1), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1, 65536), dim3(1), 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), dim3(1), (size_t{48} << 10) + 1), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(AddOne, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10),
            cudaSuccess);
  EXPECT_EQ(launch(dim3(1), dim3(1), size_t{227} << 10), cudaSuccess);
  EXPECT_EQ(
      cudaFuncSetAttribute(AddOne, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1),
      cudaErrorInvalidValue);
  EXPECT_EQ(Wait(), cudaSuccess);
}

// ---- streams.

TEST_F(EmulatorTest, NothingHasRunBeforeItIsWaitedFor) {
  float* const x = Pinned(4, 1.0f);
  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(cudaStreamQuery(queue_.stream), cudaErrorNotReady);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(cudaStreamQuery(queue_.stream), cudaSuccess);
  EXPECT_EQ(x[0], 2.0f);

  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  cudaEvent_t const event = MakeEvent();
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);  // never recorded
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(x[0], 2.0f);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_EQ(x[0], 3.0f);  // not what comes after the event
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(x[0], 4.0f);
}

TEST_F(EmulatorTest, QueriesDoNotWaitForADelay) {
  constexpr std::chrono::milliseconds kDelay(50);
  float* const x = Pinned(1, 1.0f);
  cudaStream_t const other = MakeStream();
  cudaEvent_t const event = MakeEvent(), of_other = MakeEvent();
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(of_other, other), cudaSuccess);
  const auto began = std::chrono::steady_clock::now();
  EXPECT_EQ(cudaEventQuery(of_other), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);
  int asked = 1;
  while (cudaEventQuery(of_other) == cudaErrorNotReady) {
    EXPECT_EQ(*x, 2.0f);  // what is before the delay has run
    ++asked;
  }
  EXPECT_GE(std::chrono::steady_clock::now() - began, kDelay);
  EXPECT_GT(asked, 1);
  EXPECT_EQ(*x, 4.0f);

  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  const auto again = std::chrono::steady_clock::now();
  while (cudaStreamQuery(queue_.stream) == cudaErrorNotReady) {
  }
  EXPECT_GE(std::chrono::steady_clock::now() - again, kDelay);
  cudaGetLastError();
  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  const auto last = std::chrono::steady_clock::now();
  EXPECT_EQ(Wait(), cudaSuccess);
  EXPECT_GE(std::chrono::steady_clock::now() - last, kDelay);
}

TEST_F(EmulatorTest, StreamsWaitOnlyForWhatTheyAreTold) {
  float* const x = Pinned(1, 0.0f);
  cudaStream_t const other = MakeStream();
  const Queue second = {other, nullptr};
  cudaEvent_t const event = MakeEvent();

  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(*x, 0.0f);  // doubled before one was added
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);

  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(*x, 4.0f);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);

  // What a destroyed stream holds still runs.
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamDestroy(other), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(other), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(*x, 5.0f);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(*x, 10.0f);
}

TEST_F(EmulatorTest, TheNullStreamAndBlockingStreamsWaitForEachOther) {
  float* const x = Pinned(1, 1.0f);
  const Queue blocking = {MakeStream(cudaStreamDefault), nullptr}, null;
  Launch(blocking, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(null, dim3(1), dim3(1), 0, Double, 1, x);
  Launch(blocking, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(blocking.stream), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);
  // Ours is not one of them.
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(cudaStreamLegacy), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);
}

TEST_F(EmulatorTest, CopiesFollowTheirRules) {
  float* const x = Device<float>(4);
  std::vector<float> host(4, 1.0f);
  const auto copy = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, queue_.stream);
  };
  EXPECT_EQ(copy(x, host.data(), 16, cudaMemcpyHostToDevice), cudaSuccess);
  host.assign(4, 2.0f);  // was read when the call was made
  float* const pinned = Pinned(4, 0.0f);
  EXPECT_EQ(copy(pinned, x, 16, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(pinned[0], 0.0f);
  EXPECT_EQ(copy(host.data(), x, 16, cudaMemcpyDefault), cudaSuccess);
  EXPECT_THAT(host, Each(1.0f));  // is written when it returns
  EXPECT_EQ(pinned[0], 1.0f);
  EXPECT_EQ(copy(x, pinned, 16, cudaMemcpyDefault), cudaSuccess);
  pinned[3] = 7.0f;  // is read when the copy runs
  EXPECT_THAT(Read(x, 4), ElementsAre(1.0f, 1.0f, 1.0f, 7.0f));

  EXPECT_EQ(copy(x, host.data(), 17, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(copy(x + 1, host.data(), 16, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(copy(x, host.data(), 16, cudaMemcpyDeviceToHost), cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(copy(x, nullptr, 16, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(x, 0, 17, queue_.stream), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(host.data(), 0, 16, queue_.stream), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(x + 2, 0, 8, queue_.stream), cudaSuccess);
  EXPECT_THAT(Read(x, 4), ElementsAre(1.0f, 1.0f, 0.0f, 0.0f));
  cudaGetLastError();
  // The second and third column of two rows.
  std::vector<float> corner(4);
  EXPECT_EQ(cudaMemcpy2DAsync(corner.data(), 8, pinned, 8, 4, 2, cudaMemcpyDefault, queue_.stream),
            cudaSuccess);
  EXPECT_THAT(corner, ElementsAre(1.0f, 0.0f, 1.0f, 0.0f));
}

// Neither a copy to the device from pageable memory nor clearing is over when the call returns.
TEST_F(EmulatorTest, BlockingCallsDoNotAllWait) {
  const std::vector<float> host(4, 1.0f);
  float *const x = Device<float>(4), *const y = Device<float>(4);
  ASSERT_EQ(cudaMemcpy(x, host.data(), 16, cudaMemcpyDefault), cudaSuccess);
  ASSERT_EQ(cudaMemset(y, 0, 16), cudaSuccess);
  EXPECT_TRUE(std::isnan(Read(x, 1)[0]));
  EXPECT_TRUE(std::isnan(Read(y, 1)[0]));
  ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(Read(x, 1)[0], 1.0f);
  EXPECT_EQ(Read(y, 1)[0], 0.0f);
}

TEST_F(EmulatorTest, HostFunctionsRunInOrder) {
  std::vector<float>* const seen = new std::vector<float>;
  float* const x = Pinned(1, 1.0f);
  static float* watched;
  watched = x;
  const auto note = [](void* to) { static_cast<std::vector<float>*>(to)->push_back(*watched); };
  ASSERT_EQ(cudaLaunchHostFunc(queue_.stream, note, seen), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaLaunchHostFunc(queue_.stream, note, seen), cudaSuccess);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_THAT(*seen, ElementsAre(1.0f, 2.0f));
  delete seen;
}

TEST_F(EmulatorTest, EventsMeasureTime) {
  cudaEvent_t begin = nullptr, end = nullptr;
  ASSERT_EQ(cudaEventCreate(&begin), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(begin, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(end, queue_.stream), cudaSuccess);
  float milliseconds = -1;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaErrorNotReady);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaSuccess);
  EXPECT_GE(milliseconds, 0.0f);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, MakeEvent(), end), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventDestroy(begin), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(begin), cudaErrorInvalidResourceHandle);
}

TEST_F(EmulatorTest, ThreadsHaveStreamsOfTheirOwn) {
  constexpr int kThreads = 4, kRounds = 20;
  std::vector<float> last(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&last, t] {
      Queue queue;
      cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking);
      for (int i = 0; i < kRounds; ++i) {
        float *x = nullptr, *sum = nullptr;
        cudaMalloc(&x, 256 * sizeof(float));
        cudaHostAlloc(&sum, sizeof(float), cudaHostAllocDefault);
        const std::vector<float> values(256, static_cast<float>(t + i));
        cudaMemcpyAsync(x, values.data(), 256 * sizeof(float), cudaMemcpyDefault, queue.stream);
        Launch(queue, dim3(1), dim3(256), 8 * sizeof(float), Sums, 256, x, sum);
        cudaStreamSynchronize(queue.stream);
        last[static_cast<size_t>(t)] = *sum;
        cudaFreeHost(sum);
        cudaFree(x);
      }
      cudaStreamDestroy(queue.stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < kThreads; ++t) {
    EXPECT_EQ(last[static_cast<size_t>(t)], 256.0f * static_cast<float>(t + kRounds - 1));
  }
  EXPECT_EQ(Count().live_allocations, 0);
  EXPECT_EQ(Count().launches, kThreads * kRounds);
}

// ---- graphs.

class GraphTest : public EmulatorTest {
 protected:
  // What `calls` enqueues, ready to be launched.
  template <class Calls>
  cudaGraphExec_t Capture(const Calls& calls) {
    EXPECT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    calls();
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), cudaSuccess);
    cudaGraphExec_t executable = nullptr;
    EXPECT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    return executable;
  }
  // What ends a capture in which `call` was made.
  template <class Call>
  cudaError_t EndOfCaptureWith(cudaError_t expected, const Call& call) {
    EXPECT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    EXPECT_EQ(call(), expected);
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(queue_.stream, &graph);
    EXPECT_EQ(graph == nullptr, error != cudaSuccess);
    cudaGetLastError();
    return error;
  }
};

TEST_F(GraphTest, IsReplayedWithTheValuesOfItsTime) {
  float* const x = Pinned(1, 1.0f);
  float* const copy = Pinned(1, 0.0f);
  cudaGraphExec_t const graph = Capture([&] {
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    Launch(queue_, dim3(1), dim3(1), 0, Double, 1, x);
    cudaMemcpyAsync(copy, x, sizeof(float), cudaMemcpyDefault, queue_.stream);
  });
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);  // capturing runs nothing
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 4.0f);
  *x = 10.0f;
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 46.0f);
  EXPECT_EQ(*copy, 46.0f);
  EXPECT_EQ(Count().graph_launches, 3);
  EXPECT_EQ(Count().graph_relaunches, 1);
  EXPECT_EQ(cudaGraphExecDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaErrorInvalidValue);
}

TEST_F(GraphTest, TakesInStreamsThatForkAndJoin) {
  float *const x = Pinned(1, 1.0f), *const y = Pinned(1, 1.0f);
  const Queue side = {MakeStream(), nullptr};
  cudaEvent_t const fork = MakeEvent(), join = MakeEvent();
  cudaGraphExec_t const graph = Capture([&] {
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, y);
    ASSERT_EQ(cudaEventRecord(fork, queue_.stream), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(side.stream, fork), cudaSuccess);
    Launch(side, dim3(1), dim3(1), 0, Double, 1, y);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    cudaStreamCaptureStatus status;
    ASSERT_EQ(cudaStreamIsCapturing(side.stream, &status), cudaSuccess);
    EXPECT_EQ(status, cudaStreamCaptureStatusActive);
    ASSERT_EQ(cudaEventRecord(join, side.stream), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(queue_.stream, join), cudaSuccess);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, y);
  });
  float expected = 1.0f;
  for (const Order& order : kOrders) {
    SetOrder(order);
    ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
    ASSERT_EQ(Wait(), cudaSuccess);
    expected = (expected + 1.0f) * 2.0f + 1.0f;
    EXPECT_EQ(*y, expected);
  }
  EXPECT_EQ(*x, 5.0f);
  // The side stream is an ordinary one again.
  Launch(side, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(side.stream), cudaSuccess);
  EXPECT_EQ(*x, 6.0f);
}

// Branches that should wait for each other and do not differ between orders.
TEST_F(GraphTest, AMissingDependencyChangesResults) {
  float* const x = Pinned(1, 0.0f);
  const Queue side = {MakeStream(), nullptr};
  cudaEvent_t const fork = MakeEvent(), join = MakeEvent();
  cudaGraphExec_t const graph = Capture([&] {
    cudaEventRecord(fork, queue_.stream);
    cudaStreamWaitEvent(side.stream, fork);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    Launch(side, dim3(1), dim3(1), 0, Double, 1, x);
    cudaEventRecord(join, side.stream);
    cudaStreamWaitEvent(queue_.stream, join);
  });
  std::vector<float> results;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SetOrder({Order::Kind::kPermuted, seed});
    *x = 1.0f;
    ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
    ASSERT_EQ(Wait(), cudaSuccess);
    results.push_back(*x);
  }
  EXPECT_THAT(results, testing::Contains(3.0f));
  EXPECT_THAT(results, testing::Contains(4.0f));
}

TEST_F(GraphTest, RefusesWhatCannotBeCaptured) {
  constexpr cudaError_t kUnsupported = cudaErrorStreamCaptureUnsupported;
  constexpr cudaError_t kInvalidated = cudaErrorStreamCaptureInvalidated;
  EXPECT_EQ(EndOfCaptureWith(cudaSuccess, [] { return cudaSuccess; }), cudaSuccess);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return Wait(); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [] { return cudaDeviceSynchronize(); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaStreamQuery(queue_.stream); }),
            kInvalidated);
  void* memory = nullptr;
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaMalloc(&memory, 16); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaFree(memory); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaMallocHost(&memory, 16); }),
            kInvalidated);
  float* const x = Device<float>(4);
  std::vector<float> host(4);
  EXPECT_EQ(
      EndOfCaptureWith(
          kUnsupported,
          [&] { return cudaMemcpyAsync(x, host.data(), 16, cudaMemcpyDefault, queue_.stream); }),
      kInvalidated);
  // Work that was not captured cannot be waited for.
  cudaStream_t const other = MakeStream();
  cudaEvent_t const event = MakeEvent();
  ASSERT_EQ(cudaEventRecord(event, other), cudaSuccess);
  EXPECT_EQ(EndOfCaptureWith(cudaErrorStreamCaptureIsolation,
                             [&] { return cudaStreamWaitEvent(queue_.stream, event); }),
            kInvalidated);
  // A branch that does not come back.
  EXPECT_EQ(EndOfCaptureWith(cudaSuccess,
                             [&] {
                               cudaEventRecord(event, queue_.stream);
                               cudaStreamWaitEvent(other, event);
                               return cudaMemsetAsync(x, 0, 16, other);
                             }),
            cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(cudaEventSynchronize(event), cudaErrorCapturedEvent);
  // After an illegal call nothing more is captured.
  ASSERT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaSuccess);  // relaxed
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(Wait(), kUnsupported);
  EXPECT_EQ(cudaMemsetAsync(x, 0, 16, queue_.stream), kInvalidated);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), kInvalidated);
  EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), cudaErrorIllegalState);
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeRelaxed), kUnsupported);
}

// ---- devices and faults.

TEST_F(EmulatorTest, MemoryIsLimited) {
  Options options;
  options.memory = size_t{1} << 20;
  Begin(options);
  size_t available = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  EXPECT_EQ(total, size_t{1} << 20);
  EXPECT_EQ(available, total);
  void *a = nullptr, *b = nullptr;
  ASSERT_EQ(cudaMalloc(&a, 600 << 10), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&b, 600 << 10), cudaErrorMemoryAllocation);
  EXPECT_EQ(b, nullptr);
  EXPECT_EQ(cudaPeekAtLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  ASSERT_EQ(cudaFree(a), cudaSuccess);
  EXPECT_EQ(cudaFree(a), cudaErrorInvalidValue);
  ASSERT_EQ(cudaMalloc(&b, size_t{1} << 20), cudaSuccess);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b) % 256, 0u);
  EXPECT_EQ(cudaFree(b), cudaSuccess);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
}

// Allocations of many sizes come and go, and keep what is theirs.
TEST_F(EmulatorTest, AllocationsDoNotOverlap) {
  Options options;
  options.memory = size_t{8} << 20;
  Begin(options);
  std::vector<std::pair<unsigned char*, size_t>> live;
  uint32_t random = 1;
  for (int i = 0; i < 300; ++i) {
    random = random * 1664525 + 1013904223;
    const size_t bytes = 1 + (random >> 12) % 200000;
    unsigned char* memory = nullptr;
    if (live.size() < 30 && cudaMalloc(&memory, bytes) == cudaSuccess) {
      ASSERT_EQ(cudaMemsetAsync(memory, static_cast<int>(bytes & 255), bytes, queue_.stream),
                cudaSuccess);
      live.emplace_back(memory, bytes);
      continue;
    }
    const size_t which = random % live.size();
    const auto [at, size] = live[which];
    const std::vector<unsigned char> values = Read(at, size);
    const auto filling = static_cast<unsigned char>(size & 255);
    ASSERT_EQ(std::count(values.begin(), values.end(), filling), static_cast<ptrdiff_t>(size));
    ASSERT_TRUE(GuardsIntact(at));
    ASSERT_EQ(cudaFree(at), cudaSuccess);
    live.erase(live.begin() + static_cast<ptrdiff_t>(which));
  }
  for (const auto& [at, size] : live) ASSERT_EQ(cudaFree(at), cudaSuccess);
  EXPECT_EQ(Count().live_bytes, 0u);
}

TEST_F(EmulatorTest, PlantedFailuresHappenOnce) {
  void* memory = nullptr;
  FailAllocation(2);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaSuccess);
  FailHostAllocation(1);
  EXPECT_EQ(cudaHostAlloc(&memory, 16, cudaHostAllocDefault), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaHostAlloc(&memory, 16, cudaHostAllocDefault), cudaSuccess);
  cudaGetLastError();
  float* const x = Pinned(1, 0.0f);
  FailLaunch(2);
  for (int i = 0; i < 3; ++i) Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchOutOfResources);
  EXPECT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 2.0f);
}

TEST_F(EmulatorTest, ALostDeviceStaysLost) {
  float* const x = Pinned(1, 0.0f);
  LoseDevice(0, 2, cudaErrorECCUncorrectable);
  for (int i = 0; i < 4; ++i) Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);  // it is found when they run
  EXPECT_EQ(Wait(), cudaErrorECCUncorrectable);
  EXPECT_EQ(*x, 2.0f);
  EXPECT_EQ(Wait(), cudaErrorECCUncorrectable);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaErrorECCUncorrectable);
  EXPECT_EQ(cudaFreeHost(x), cudaErrorECCUncorrectable);
  EXPECT_EQ(cudaGetLastError(), cudaErrorECCUncorrectable);
  EXPECT_EQ(cudaGetLastError(), cudaErrorECCUncorrectable);
  Options options;
  options.devices = 2;
  options.lost_after = 0;
  Begin(options);
  LoseDevice(1, -1);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(Enqueue(queue_.stream, [] {}), cudaSuccess);
  EXPECT_EQ(Wait(), cudaErrorIllegalAddress);
}

TEST_F(EmulatorDeathTest, DevicesAreApart) {
  Options options;
  options.devices = 2;
  Begin(options);
  int count = 0;
  ASSERT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
  EXPECT_EQ(count, 2);
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  float* const x = Device(std::vector<float>(4, 1.0f));
  ASSERT_EQ(Wait(), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  const Queue other = {MakeStream(), nullptr};
  // The first device's stream is not for the second's launches.
  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
  const auto run = [&] {
    Launch(other, dim3(1), dim3(4), 0, AddOne, 4, x);
    return cudaStreamSynchronize(other.stream);
  };
  EXPECT_DEATH(run(), "memory of another device, without peer access");
  int can = 0;
  EXPECT_EQ(cudaDeviceCanAccessPeer(&can, 1, 0), cudaSuccess);
  EXPECT_EQ(can, 1);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaSuccess);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(0, 0), cudaErrorPeerAccessAlreadyEnabled);
  EXPECT_EQ(run(), cudaSuccess);
  EXPECT_THAT(Read(x, 4), Each(2.0f));
  cudaPointerAttributes attributes;
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, x), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  EXPECT_EQ(attributes.device, 0);
}

TEST_F(EmulatorTest, ShowsTheMachineThatItIsTold) {
  int count = -1, version = 0;
  Options options;
  options.devices = 0;
  Configure(options);
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorNoDevice);
  EXPECT_EQ(count, 0);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaErrorNoDevice);

  options.devices = 1;
  options.driver_version = 12040;
  Configure(options);
  ASSERT_EQ(cudaDriverGetVersion(&version), cudaSuccess);
  EXPECT_EQ(version, 12040);
  EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorInsufficientDriver);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaErrorInsufficientDriver);

  options = {};
  options.major = 7;
  options.minor = 5;
  options.name = "Small GPU";
  Configure(options);
  cudaDeviceProp properties;
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  EXPECT_STREQ(properties.name, "Small GPU");
  EXPECT_EQ(properties.major * 10 + properties.minor, 75);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice");
  EXPECT_STREQ(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
}

TEST_F(EmulatorTest, TakesOptionsFromTheEnvironment) {
  const std::vector<std::pair<const char*, const char*>> variables = {
      {"LOCKSTEP_EMULATED_GPUS", "3"},
      {"LOCKSTEP_EMULATOR_FAULTS",
       "driver=0, memory=1000 architecture=8.6 lost-at=9 gpu=2 error=cudaErrorECCUncorrectable "
       "sums=reversed"},
      {"LOCKSTEP_EMULATOR_ORDER", "17"},
      {"LOCKSTEP_EMULATOR_PROTECT", "0"}};
  for (const auto& [name, value] : variables) setenv(name, value, 1);
  const Options options = OptionsOfEnvironment();
  for (const auto& [name, value] : variables) unsetenv(name);
  EXPECT_EQ(options.devices, 3);
  EXPECT_EQ(options.memory, 1000u);
  EXPECT_EQ(options.driver_version, 0);
  EXPECT_EQ(options.major * 10 + options.minor, 86);
  EXPECT_EQ(options.order.kind, Order::Kind::kPermuted);
  EXPECT_EQ(options.order.seed, 17u);
  EXPECT_FALSE(options.protect);
  EXPECT_EQ(options.lost_after, 9);
  EXPECT_EQ(options.lost_gpu, 2);
  EXPECT_EQ(options.lost_with, cudaErrorECCUncorrectable);
  EXPECT_EQ(options.sums, Sums::kReversed);
}

TEST_F(EmulatorTest, RefusesWhatItDoesNotUnderstandInTheEnvironment) {
  const auto options_with = [](const char* name, const char* value) {
    setenv(name, value, 1);
    OptionsOfEnvironment();
  };
  const char* const faults = "LOCKSTEP_EMULATOR_FAULTS";
  EXPECT_DEATH(options_with(faults, "memory=1000 lost=3"), "lost=3; accepted: driver=");
  EXPECT_DEATH(options_with(faults, "lost-at"), "is lost-at; accepted: driver=");
  EXPECT_DEATH(options_with(faults, "memory=1000MB"), "memory in .* is 1000MB; accepted: a number");
  EXPECT_DEATH(options_with(faults, "architecture=7"), "accepted: a compute capability");
  EXPECT_DEATH(options_with(faults, "error=cudaErrorNone"), "cudaErrorNone; accepted: a name such");
  EXPECT_DEATH(options_with(faults, "sums=sideways"), "is sideways; accepted: in-order, rev");
  EXPECT_DEATH(options_with("LOCKSTEP_EMULATED_GPUS", "two"), "is two; accepted: a number");
  EXPECT_DEATH(options_with("LOCKSTEP_EMULATOR_FAULT", "x"),
               "no variable LOCKSTEP_EMULATOR_FAULT;");
}

TEST_F(EmulatorTest, ShowsSeveralGpusThatDiffer) {
  Options options;
  options.devices = 2;
  options.lost_gpu = 1;
  options.lost_after = 0;
  Configure(options);
  cudaDeviceProp first, second;
  ASSERT_EQ(cudaGetDeviceProperties(&first, 0), cudaSuccess);
  ASSERT_EQ(cudaGetDeviceProperties(&second, 1), cudaSuccess);
  EXPECT_STRNE(first.name, second.name);
  EXPECT_NE(std::memcmp(first.uuid.bytes, second.uuid.bytes, sizeof(first.uuid.bytes)), 0);
  EXPECT_NE(first.pciBusID, second.pciBusID);
  for (int device = 0; device < 2; ++device) {
    ASSERT_EQ(cudaSetDevice(device), cudaSuccess);
    ASSERT_EQ(Enqueue(nullptr, [] {}), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), device == 0 ? cudaSuccess : cudaErrorIllegalAddress);
  }
}

}  // namespace
}  // namespace lockstep::emulator
