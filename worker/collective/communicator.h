// A Communicator joins the members of one generation of a job. A member is one address space that
// holds a flat state: on CPUs a worker process (whose slots are threads of one Team), on GPUs one
// slot. It belongs to its generation: after an error or Abort it is dead and a new generation makes
// a new one.
//
// Operations are enqueued on a lane; operations of one lane complete in order, lanes are
// independent, so that small exchanges never queue behind gradient buckets. Every member enqueues
// the same operations with the same sizes in the same order per lane. Enqueue reports argument
// errors only; failures come from Wait, which names the members missing (DeadlineExceeded: "no
// answer from member 2 (worker-b) on lane gradients"), or the cause given to Abort (Aborted).
//
// On CPUs `stream` is ignored: shared memory posts flags and peers read each other's memory without
// a copy; Gloo posts sends and receives on unbound buffers.
//
// Where on_device() (NCCL, which has a communicator of its own for each lane), Allocate gives
// memory of the device, and operations that are given a stream take and leave such memory in the
// order of that stream, also while it is being recorded: Wait has nothing to do for them.
// EnqueueExchange is a group of ncclSend and ncclRecv of chunks into staging memory of the
// Communicator, to which `views` point at once, until the next exchange on the stream;
// EnqueueGather is ncclAllGather (equal chunks) or such a group. There lanes are no reason for two
// operations to run at the same time: a GPU need not run what two streams have, nor in one order
// (NCCL user guide, "Using multiple NCCL communicators concurrently"), so whoever enqueues makes
// one follow the other, the same on all members. What is given no stream is between the hosts, as
// on CPUs.
//
// Thread safety: one thread at a time per lane; Abort from any thread, any number of times.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/device/device.h"

namespace lockstep::collective {

enum class Lane { kGradients = 0, kMoments = 1 };
constexpr int kLanes = 2;

// Elements [ChunkBegin(n, size, r), ChunkBegin(n, size, r + 1)) of n belong to member r; boundaries
// are multiples of 16 elements.
inline int64_t ChunkBegin(int64_t count, int size, int rank) {
  constexpr int64_t kGranule = 16;
  const int64_t granules = (count + kGranule - 1) / kGranule;
  return std::min(count, granules * rank / size * kGranule);
}

struct Ticket {
  Lane lane = Lane::kGradients;
  uint64_t sequence = 0;
};

// Bytes that this member has sent to others (or that others have read from its memory), per kind.
struct Traffic {
  uint64_t exchange_bytes = 0, gather_bytes = 0, small_bytes = 0, broadcast_bytes = 0;
};

// Asked now and then while members connect: what is not OK ends that, and is returned.
using Aborted = absl::FunctionRef<absl::Status()>;
inline absl::Status NeverAborted() { return absl::OkStatus(); }

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual bool on_device() const { return false; }

  // Memory that may be passed to the operations below; zeroed. Symmetric: all members allocate the
  // same sizes in the same order, before the first operation. Freed with the Communicator.
  // ResourceExhausted beyond what was announced.
  virtual absl::StatusOr<void*> Allocate(size_t bytes) = 0;

  // Where member `rank` holds the memory that we hold at `mine` (Allocate'd), if it can be read and
  // written from here (same host); else null.
  virtual void* Peer(int rank, void* mine) = 0;

  // Each member m offers parts[m] vectors of `count` floats (`mine`, in Allocate'd memory).
  // Afterwards views[m][p] points to this member's chunk of part p of member m, readable until the
  // gather that goes with it completes (the k-th exchange of a lane goes with its k-th gather);
  // only then may the member write to what it offered, except its own chunk. Members may offer
  // different numbers of parts, also none. `views` must stay until Wait.
  virtual absl::StatusOr<Ticket> EnqueueExchange(device::Stream* stream, Lane lane,
                                                 absl::Span<const float* const> mine,
                                                 absl::Span<const int> parts, int64_t count,
                                                 std::vector<std::vector<const float*>>* views) = 0;
  // data {count} in Allocate'd memory: this member's chunk is finished; fills in the others'.
  // `delivered` (all members say the same): each has written its chunk through Peer() into all
  // members that have one, so that only members of other hosts are sent anything.
  virtual absl::StatusOr<Ticket> EnqueueGather(device::Stream* stream, Lane lane, float* data,
                                               int64_t count, bool delivered = false) = 0;
  // all {size() * bytes}: block m is member m's `mine`. Any memory, which must stay until Wait;
  // bytes at most kSmallBytes. One byte makes a barrier.
  static constexpr size_t kSmallBytes = 4 << 20;
  virtual absl::StatusOr<Ticket> EnqueueAllGather(device::Stream* stream, Lane lane,
                                                  const void* mine, size_t bytes, void* all) = 0;
  // Any memory, which must stay until Wait.
  virtual absl::StatusOr<Ticket> EnqueueBroadcast(device::Stream* stream, Lane lane, int root,
                                                  void* data, size_t bytes) = 0;

  // ---- where on_device(): of any memory of the device, in the order of the stream.
  // In place: `data` has a block of every member, m's at bytes [bounds[m], bounds[m + 1]); ours is
  // filled before, all are afterwards.
  virtual absl::StatusOr<Ticket> EnqueueGatherBlocks(device::Stream& stream, Lane lane, void* data,
                                                     absl::Span<const int64_t> bounds);
  // data {count} becomes the sum over the members, added in whatever order the library likes.
  virtual absl::StatusOr<Ticket> EnqueueLibrarySum(device::Stream& stream, Lane lane, float* data,
                                                   int64_t count);
  // A failure sets `word`, host-visible memory that kernels read, before it makes what waits for
  // other members on streams end; null: none is there any more.
  virtual void PoisonOnFailure(uint32_t* /*word*/) {}

  // Returns when the operation (and so all before it on its lane) is complete.
  virtual absl::Status Wait(const Ticket& ticket, absl::Time deadline) = 0;

  // Where on_device(): what is on streams may wait for other members from now until Settle, at most
  // until `deadline`. Then, or when the transport reports a failure, the Communicator fails: what
  // is on streams ends soon, with results that mean nothing.
  virtual void Expect(absl::Time /*deadline*/) {}
  // With the streams synchronized: OK, or the failure, of which their results are part.
  virtual absl::Status Settle() { return absl::OkStatus(); }

  // Wakes every Wait here with Aborted(cause) and lets peers that wait for us fail too, where the
  // transport can. The first cause wins.
  virtual void Abort(const absl::Status& cause) = 0;

  virtual Traffic traffic() const = 0;
};

inline absl::StatusOr<Ticket> Communicator::EnqueueGatherBlocks(device::Stream&, Lane, void*,
                                                                absl::Span<const int64_t>) {
  return absl::UnimplementedError("blocks are gathered on devices alone");
}
inline absl::StatusOr<Ticket> Communicator::EnqueueLibrarySum(device::Stream&, Lane, float*,
                                                              int64_t) {
  return absl::UnimplementedError("a library sums on devices alone");
}

}  // namespace lockstep::collective
