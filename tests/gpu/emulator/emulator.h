// Controls of the SIMT emulator: what runs worker/device/cuda on a machine without a GPU, in order
// to find what is wrong with it. The CUDA runtime of include/cuda_runtime.h is this emulator's.
//
// How it runs:
//  - Streams are lazy: what is enqueued runs when something waits for it, in stream order and after
//    the events that it waits for, and only what must; so that a host that reads results without
//    waiting sees old ones, and a stream that does not wait for another runs too early or too late.
//  - A kernel's blocks run one by one, its threads as fibers that switch only where they wait for
//    each other. The order of both can be changed; results must not.
//  - A kernel that may begin before the one before it has ended (programmatic dependent launch)
//    cannot touch device memory until all threads of its first block wait for that; a thread that
//    returns without waiting ends the process.
//  - A barrier or shuffle that not all threads reach, or reach at different places, ends the
//    process with a report; so does a launch with a pointer that is neither to device nor to pinned
//    memory.
//  - Device memory, shared memory of a block and pinned memory hold kGarbage until written. Under
//    ASan what lies outside of allocations and of a block's shared memory is poisoned; otherwise
//    both are followed by guard bytes that are checked. While no emulated work runs, device memory
//    cannot be touched: the host crashes that tries.
//
// Thread-safe. All work runs under one lock, on the thread that waits for it; no two operations of
// a stream at once.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace lockstep::emulator {

// Two bytes, repeated: a NaN as a bf16, a float and a double, an unlikely integer.
constexpr uint16_t kGarbage = 0xFFC7;

struct Order {
  enum class Kind { kNatural, kReversed, kPermuted } kind = Kind::kNatural;
  uint64_t seed = 0;  // of a permutation, another for each launch and block
};

// How the reference libraries add up: what they propose, and whether they could do otherwise.
enum class Sums { kInOrder, kReversed, kOnlyInOrder };

// What NCCL does instead of working.
enum class NcclFault { kNone, kDiesConnecting, kHangsConnecting, kHangsExchanging, kHangsAborting };

struct Options {
  int devices = 1;
  size_t memory = size_t{4} << 30;  // bytes of each device
  int driver_version = 13000;       // 0: no driver
  int major = 9, minor = 0;
  int multiprocessors = 132;
  std::string name = "Emulated GPU";  // with the ordinal behind it where there are several
  Order order;
  bool protect = true;      // device memory from the host
  int64_t lost_after = -1;  // a device is lost at its launch of this number, from 0; -1: never
  int lost_gpu = -1;        // which; -1: each
  cudaError_t lost_with = cudaErrorIllegalAddress;
  int fail_allocation = 0;  // FailAllocation; 0: none
  Sums sums = Sums::kInOrder;
  NcclFault nccl = NcclFault::kNone;
};

// What the environment says, with which the emulator begins:
//   LOCKSTEP_EMULATED_GPUS=2
//   LOCKSTEP_EMULATOR_FAULTS="driver=12040 memory=BYTES architecture=7.0 allocation=NTH
//                             lost-at=LAUNCH gpu=1 error=cudaErrorECCUncorrectable
//                             sums=in-order|reversed|only-in-order
//                             nccl=dies-connecting|hangs-connecting|hangs-exchanging|
//                                  hangs-aborting"
//   LOCKSTEP_EMULATOR_ORDER=natural|reversed|SEED
//   LOCKSTEP_EMULATOR_PROTECT=0|1
// Other names and values end the process, which says what is accepted.
Options OptionsOfEnvironment();
// Begins anew: memory, streams, events, faults and errors that exist are forgotten. No other thread
// may be using the emulator.
void Configure(const Options& options);
// Of what runs from now on.
void SetOrder(Order order);
Sums CurrentSums();
NcclFault CurrentNcclFault();

// ---- faults.
// The nth cudaMalloc from now (1: the next) fails once.
void FailAllocation(int nth, cudaError_t error = cudaErrorMemoryAllocation);
// The same of cudaHostAlloc and cudaMallocHost.
void FailHostAllocation(int nth, cudaError_t error = cudaErrorMemoryAllocation);
// The nth launch of a kernel from now is refused, with an error that is not sticky.
void FailLaunch(int nth, cudaError_t error = cudaErrorLaunchOutOfResources);
// The nth cudaGraphInstantiate from now fails once.
void FailInstantiation(int nth, cudaError_t error = cudaErrorMemoryAllocation);
// The device is lost when the launch after the next `launches` is run (-1: now): neither that nor
// anything after it has an effect, and every call that concerns the device returns the error.
void LoseDevice(int device, int64_t launches, cudaError_t error = cudaErrorIllegalAddress);

// ---- for code that stands in for a vendor's library.
// Runs `work`, which may touch device memory, on the stream: captured and replayed like a kernel.
cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work);
// What is behind it on the stream runs so much later, by the clock: a delay begins when something
// asks for what is behind it. Queries do not wait for its end; calls that wait keep their thread
// busy meanwhile, as a driver may.
cudaError_t Delay(cudaStream_t stream, std::chrono::nanoseconds takes);
// Within such work that waits for what another thread of the process enqueued: lets that run.
void Pause();

// ---- for tests.
// Whether the guard bytes around a device allocation are what they were (always, under ASan).
bool GuardsIntact(const void* allocation);
struct Counters {
  int64_t launches = 0;        // enqueued or captured, Enqueue included
  int64_t early_launches = 0;  // of these, that may begin before the one before has ended
  int64_t graph_launches = 0;
  int64_t graph_relaunches = 0;  // of an executable whose launch before has not run
  int64_t allocations = 0;       // of any memory, that succeeded
  int64_t waits = 0;             // calls that wait for work
  int64_t queries = 0;           // of an event
  int64_t live_allocations = 0;
  size_t live_bytes = 0;  // of devices
  uint64_t read = 0;      // a hash of what each copy brought to pageable memory, in any order
};
Counters Count();

}  // namespace lockstep::emulator
