// The emulated machine: its devices and their memory, planted faults, and what it is told by the
// environment.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/gpu/emulator/emulator_fixture.h"

namespace lockstep::emulator {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

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
       "sums=reversed nccl=hangs-aborting"},
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
  EXPECT_EQ(options.nccl, NcclFault::kHangsAborting);
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
  EXPECT_DEATH(options_with(faults, "nccl=late"), "is late; accepted: dies-connecting");
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
