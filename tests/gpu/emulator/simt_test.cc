// The emulator itself: that it runs kernels as a GPU does, and finds what it is there to find.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "tests/gpu/emulator/emulator_fixture.h"
#include "tests/gpu/emulator/fiber.h"  // LOCKSTEP_EMULATOR_ASAN
#include "worker/device/cuda/tensor_core.h"

namespace lockstep::emulator {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

__global__ void Index(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

__global__ void Turn(bool barrier, float* x) {
  float* const shared = SharedMemory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
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
  EXPECT_DEATH(run(TwoBarriers, 64), "different calls of __syncthreads(.|\n)*simt_test.cc");
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

// Of two threads that launch one kernel with several sizes.
TEST_F(EmulatorTest, AllowingLessSharedMemoryTakesNothingAway) {
  constexpr size_t kMore = size_t{80} << 10, kLess = size_t{60} << 10;
  float* const x = Device<float>(8);
  device::cuda::AllowShared(Double, kMore);
  device::cuda::AllowShared(Double, kLess);
  Launch(queue_, dim3(1), dim3(8), kMore, Double, 8, x);
  EXPECT_EQ(Wait(), cudaSuccess);
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

}  // namespace
}  // namespace lockstep::emulator
