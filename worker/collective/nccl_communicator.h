// The Communicator of GPU members: gradients over NCCL, small exchanges of the host's memory over
// another Communicator of the same members.
//
// NCCL's communicators, one for each lane, are nonblocking. A watching thread polls them while
// something is expected; where one fails, a deadline passes, or Abort is called, in this order
// (NCCL 2.28's rules): the gate is poisoned and nothing more is enqueued, the watching thread
// aborts NCCL's communicators, by which what waits on a stream for other members ends, so that
// streams can be synchronized and graphs destroyed, and the destructor joins. An abort that takes
// longer than NcclOptions::most_abort ends the process: its owner may wait on a stream meanwhile,
// and nothing else frees the GPU.
//
// Destroy what recorded its operations (graphs) before it.
#pragma once

#include <nccl.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "worker/collective/nccl_api.h"
#include "worker/collective/nccl_module.h"

namespace lockstep::collective {

class NcclCommunicator : public Communicator {
 public:
  static absl::StatusOr<std::unique_ptr<Communicator>> Connect(const NcclOptions& options,
                                                               std::unique_ptr<Communicator> host,
                                                               absl::Time deadline,
                                                               Aborted aborted);
  ~NcclCommunicator() override;

  int rank() const override { return options_.rank; }
  int size() const override { return static_cast<int>(options_.names.size()); }
  bool on_device() const override { return true; }
  absl::StatusOr<void*> Allocate(size_t bytes) override;
  void* Peer(int, void*) override { return nullptr; }
  absl::StatusOr<Ticket> EnqueueExchange(device::Stream* stream, Lane lane,
                                         absl::Span<const float* const> mine,
                                         absl::Span<const int> parts, int64_t count,
                                         std::vector<std::vector<const float*>>* views) override;
  absl::StatusOr<Ticket> EnqueueGather(device::Stream* stream, Lane lane, float* data,
                                       int64_t count, bool delivered) override;
  absl::StatusOr<Ticket> EnqueueAllGather(device::Stream* stream, Lane lane, const void* mine,
                                          size_t bytes, void* all) override;
  absl::StatusOr<Ticket> EnqueueBroadcast(device::Stream* stream, Lane lane, int root, void* data,
                                          size_t bytes) override;
  absl::StatusOr<Ticket> EnqueueGatherBlocks(device::Stream& stream, Lane lane, void* data,
                                             absl::Span<const int64_t> bounds) override;
  absl::StatusOr<Ticket> EnqueueLibrarySum(device::Stream& stream, Lane lane, float* data,
                                           int64_t count) override;
  void PoisonOnFailure(uint32_t* word) override;
  absl::Status Wait(const Ticket& ticket, absl::Time deadline) override;
  void Expect(absl::Time deadline) override;
  absl::Status Settle() override;
  void Abort(const absl::Status& cause) override;
  Traffic traffic() const override;

 private:
  NcclCommunicator(const NcclApi& api, NcclOptions options, std::unique_ptr<Communicator> host);

  absl::Status Initialize(absl::Time deadline, Aborted aborted);
  // Takes memory of the device that other members' GPUs may reach; zeroed.
  absl::StatusOr<float*> TakeMemory(size_t bytes);
  // Enqueues a group of calls, which together make one operation.
  absl::Status Group(Lane lane, absl::FunctionRef<ncclResult_t(ncclComm_t)> calls);
  // In place, as EnqueueGatherBlocks, of elements of a type.
  absl::Status GatherInPlace(device::Stream& stream, Lane lane, std::byte* data,
                             absl::Span<const int64_t> bounds, ncclDataType_t type,
                             int64_t element_bytes);
  // What a communicator says of itself.
  ncclResult_t AskFor(ncclComm_t comm) ABSL_EXCLUSIVE_LOCKS_REQUIRED(calls_);
  using Comms = std::array<ncclComm_t, kLanes>;
  absl::Status ToStatus(ncclResult_t result, absl::string_view what);
  void Watch();
  void AbortAll();
  // Of what is on streams, after `waited`.
  absl::Status TimedOut(absl::Duration waited);
  // Who does not answer, after `problem`.
  absl::Status NameMissing(const absl::Status& problem);
  void Fail(const absl::Status& failure);
  absl::Status failure() const;
  bool Owns(const void* memory, int64_t bytes) const;

  const NcclApi& api_;
  const NcclOptions options_;
  const std::unique_ptr<Communicator> host_;
  std::byte* memory_ = nullptr;
  size_t allocated_ = 0;
  float* staging_ = nullptr;
  std::vector<std::pair<void*, void*>> registered_;  // memory, NCCL's handle or null
  Traffic sent_;                                     // by the thread that enqueues

  absl::Mutex calls_;                         // held during a call of NCCL on a communicator
  Comms comms_ ABSL_GUARDED_BY(calls_) = {};  // by lane
  std::atomic<bool> moments_{false};          // have been exchanged, maybe in a recording

  mutable absl::Mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  uint32_t* poison_ ABSL_GUARDED_BY(mutex_) = nullptr;
  absl::Time expected_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  absl::Time expected_since_ ABSL_GUARDED_BY(mutex_);
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread watcher_;
};

}  // namespace lockstep::collective
