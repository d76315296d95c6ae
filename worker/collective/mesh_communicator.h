// The Communicator of CPU members: every peer is reached by a link of its own, through shared
// memory where it runs on our host (SharedPeers), otherwise over Gloo (GlooPeers). Operations of a
// lane are numbered alike in all members; a number is posted when the member's input is ready to be
// read, and finished when it has read the others'. An operation that cannot be posted yet (a peer
// still reads the staging memory it needs) is posted by Wait.
//
// Thread safety, ownership and errors: see communicator.h.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "worker/collective/communicator.h"
#include "worker/collective/gloo_peers.h"
#include "worker/collective/rendezvous.h"
#include "worker/collective/segment.h"
#include "worker/collective/shared_peers.h"

namespace lockstep::collective {

class MeshCommunicator : public Communicator {
 public:
  // segments[m]: member m's, attached; null where it is reached through `gloo` (which is null where
  // no member is).
  MeshCommunicator(int rank, std::vector<MemberInfo> members,
                   std::vector<std::shared_ptr<Segment>> segments, int spin,
                   std::unique_ptr<GlooPeers> gloo);

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }
  absl::StatusOr<void*> Allocate(size_t bytes) override;
  void* Peer(int rank, void* mine) override;
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
  absl::Status Wait(const Ticket& ticket, absl::Time deadline) override;
  void Abort(const absl::Status& cause) override;
  Traffic traffic() const override;

 private:
  enum class Kind : uint32_t { kExchange = 1, kGather, kDelivered, kAllGather, kBroadcast };

  // One enqueued operation; the objects are recycled.
  struct Operation {
    Kind kind = Kind::kExchange;
    uint64_t first = 0,
             last = 0;  // its sequence numbers: one, or one for each piece of a broadcast
    bool posted = false;
    int64_t count = 0;  // floats, or bytes
    int root = 0;
    const void* mine = nullptr;
    void* data = nullptr;
    std::vector<const float*> offered;
    std::vector<int> parts;
    std::vector<std::vector<const float*>>* views = nullptr;
    std::vector<float> received;  // of an exchange, from other hosts
    std::unique_ptr<GlooPeers::Transfers> transfers;
  };
  struct LaneState {
    uint64_t enqueued = 0;  // sequence numbers given out
    uint64_t completed = 0;
    uint64_t staged[2] = {0, 0};  // the last number that used each half of our staging
    // Short, first in first out; deques would allocate now and then.
    std::vector<std::unique_ptr<Operation>> queue;
    std::vector<std::unique_ptr<Operation>> viewed;  // exchanges whose views are in use
    std::vector<std::unique_ptr<Operation>> spare;
  };

  LaneState& state(Lane lane) { return lanes_[static_cast<int>(lane)]; }
  bool Owns(const void* begin, int64_t bytes) const;
  uint64_t Offset(const void* mine) const;
  std::string Name(int member) const;

  std::unique_ptr<Operation> NewOperation(Lane lane, Kind kind, uint64_t numbers);
  Ticket Enqueue(Lane lane, std::unique_ptr<Operation> operation);
  // The number that all peers must have finished before `sequence` may be posted.
  uint64_t MustBeFinished(Lane lane, const Operation& operation, uint64_t sequence);
  bool MayPost(Lane lane, const Operation& operation, uint64_t sequence);
  absl::Status AwaitMayPost(Lane lane, const Operation& operation, uint64_t sequence,
                            absl::Time deadline);
  void Describe(Lane lane, const Operation& operation, uint64_t sequence);
  void Post(Lane lane, Operation& operation);
  void PostToOtherHosts(Lane lane, Operation& operation);

  absl::Status Complete(Lane lane, Operation& operation, absl::Time deadline);
  absl::Status CompleteExchange(Lane lane, Operation& operation, absl::Time deadline);
  absl::Status CompleteGather(Lane lane, Operation& operation, absl::Time deadline);
  absl::Status CompleteAllGather(Lane lane, Operation& operation, absl::Time deadline);
  absl::Status CompleteBroadcast(Lane lane, Operation& operation, absl::Time deadline);
  // Until all peers on this host, or one member, have posted `sequence` of the same operation.
  absl::Status AwaitPosted(Lane lane, const Operation& operation, absl::Time deadline);
  absl::Status AwaitPosted(Lane lane, int member, const Operation& operation, uint64_t sequence,
                           absl::Time deadline);
  absl::Status CheckSame(Lane lane, int member, const Operation& operation, uint64_t sequence);
  absl::Status AwaitOtherHosts(Lane lane, Operation& operation, absl::Time deadline);
  absl::Status Missing(Lane lane, SharedPeers::Outcome outcome, const std::vector<int>& members);

  absl::Status Fail(const absl::Status& failure, int origin, const std::string& reason);
  absl::Status Failure() const;

  const int rank_;
  const std::vector<MemberInfo> members_;
  SharedPeers shared_;
  const std::unique_ptr<GlooPeers> gloo_;
  size_t allocated_ = 0;
  LaneState lanes_[kLanes];

  std::atomic<bool> failed_{false};
  mutable absl::Mutex mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);

  struct Sent {
    std::atomic<uint64_t> exchange{0}, gather{0}, small{0}, broadcast{0};
  } sent_;
};

}  // namespace lockstep::collective
