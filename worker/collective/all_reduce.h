// The canonical all-reduce, written once on top of Communicator and Team.
//
// CanonicalAllReduce: gradients. Slots write leaf gradients into partial buffers that the stack
// schedule names, fold them layer by layer while they lie in cache, and once a bucket's last leaf
// is done the bucket is exchanged: chunk c of a bucket goes to member c, which finishes the tree
// (its slots splitting the chunk), and finished chunks are gathered. With power-of-two placements a
// member sends 2 (W-1)/W of the gradient's bytes, in two hops.
//
// MergeSmall: batch-norm records and the step's trailer. Records are folded to the member's
// subtrees, all-gathered, and every member folds the rest itself.
//
// SPMD: every slot thread of every member makes the same calls in the same order. Any failure is
// sticky: the Team and Communicator are aborted with it and all slots return it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/collective/communicator.h"
#include "worker/collective/team.h"
#include "worker/collective/tree.h"
#include "worker/device/device.h"

namespace lockstep::collective {

// Who owns which leaf: member m's slot i has leaves [bounds[m][i], bounds[m][i+1]).
struct Placement {
  int leaves = 0;
  std::vector<std::vector<int>> bounds;
  int interleaved = 1;  // the order in which a slot writes its leaves (tree.h, WriteOrder)
  // A slot may write its leaves in several passes, each of which ends for itself.
  bool in_passes = false;
  // False: members on devices may be summed by their library (NCCL) in any order, so that bits
  // follow the placement.
  bool exact = true;
};

struct Bucket {
  int64_t begin = 0, end = 0;  // elements of the flat vector
};
// Cuts [0, size) into buckets of about `bytes`, at the given tensor offsets (ascending).
std::vector<Bucket> MakeBuckets(int64_t size, const std::vector<int64_t>& offsets, int64_t bytes);

class CanonicalAllReduce {
 public:
  // Bytes of Communicator memory that an instance will allocate, on a device whose memory the host
  // addresses or not; for RendezvousOptions::shared_bytes.
  static size_t SharedBytes(const Placement& placement, int64_t size, bool host_addressable = true);

  // RendezvousOptions::staging_bytes of a member.
  static size_t StagingBytes(const Placement& placement, int rank, int64_t size);

  static absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> Make(
      device::Device& device, Communicator* communicator, Team* team, const Placement& placement,
      int64_t size, std::vector<Bucket> buckets);
  virtual ~CanonicalAllReduce() = default;

  // Begins a step in which only the leaves with present[leaf] exist (at least one does). Each slot
  // calls it; no buffer of the previous step's result may be in use any more (put a barrier
  // before).
  virtual absl::Status Begin(int slot, absl::Span<const uint8_t> present, absl::Time deadline) = 0;
  // Where the leaf's vector (whole flat vector) is to be written; and that [begin, end) of it is.
  // Leaves of a slot in the placement's order for every range; ranges partition [0, size).
  virtual float* Leaf(int slot, int leaf) = 0;
  virtual void Done(int slot, device::Stream& stream, int leaf, int64_t begin, int64_t end) = 0;
  // The other way, for a kernel that folds a range itself, over all of a slot's present leaves at
  // once: how, where each of the parts lies (a whole flat vector), and that [begin, end) of all
  // parts is complete. A range goes one way or the other. The fold is null for a slot without
  // leaves or with interleaved ones, and valid until the next Begin.
  virtual const device::LeafFold* LeafFold(int slot) = 0;
  virtual float* Part(int slot, int part) = 0;
  virtual void DoneFolded(int slot, device::Stream& stream, int64_t begin, int64_t end) = 0;
  // Leaves and parts have memory of their own until Finish, so that what was written can be read
  // again; the padding in it is zero.
  virtual bool LeavesStay() const { return false; }
  // Where the calls of one pass over all of a slot's present leaves are recorded or repeated
  // (Device::Record): EndPass is the last of them, and Repeated says that all were made again. Both
  // say nothing where there are several passes.
  virtual void EndPass(int /*slot*/, device::Stream& /*stream*/) {}
  // What is enqueued on the stream next, runs behind the buckets that are being exchanged beside
  // it. To be called before the members exchange something else on the stream.
  virtual void JoinExchanges(device::Stream& /*stream*/) {}
  virtual void Repeated(int /*slot*/) {}
  // Completes all buckets. Afterwards result() holds the sum, the same bits in every member; a slot
  // may read all of it. On a device it does so in the order of the stream, and where the
  // Communicator is on_device too, if that then settles. Where the caller takes `left`, the last
  // sum may be left to a pass of its own over the gradient, behind this on the stream: result() is
  // then to become the tree (Device::TreeSum) over those vectors, which are valid until the next
  // Begin; if they are none, it is complete.
  virtual absl::Status Finish(int slot, device::Stream& stream, absl::Time deadline,
                              std::vector<const float*>* left = nullptr) = 0;
  virtual float* result() const = 0;

  // Folds small records: `fold(left, right)` combines into left in place. `records[leaf -
  // bounds[slot]]` (null where absent) of `bytes` each, on any of this slot's leaves; returns the
  // root's record (valid until the slot's next call), or null where no leaf is present. On
  // Lane::kMoments.
  using Fold = absl::FunctionRef<void(void* left, const void* right)>;
  virtual absl::StatusOr<const void*> MergeSmall(int slot, absl::Span<const void* const> records,
                                                 size_t bytes, const Fold& fold,
                                                 absl::Time deadline) = 0;

  // Fixed blocks of bytes from every member, the same on all: block m at m * bytes. `mine` of slot
  // 0 counts. Valid until the slot's next call.
  virtual absl::StatusOr<const void*> AllGather(int slot, const void* mine, size_t bytes,
                                                absl::Time deadline) = 0;
};

}  // namespace lockstep::collective
