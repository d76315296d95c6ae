// The exchange of small records and blocks between the slots of all members, which every kind of
// all-reduce shares: records are folded to the member's subtrees, all-gathered, and every member
// folds the rest itself. Everything is memory of the host.
//
// Any failure is sticky: the Team and Communicator are aborted with it and all slots return it.
// Thread safety: SPMD, as CanonicalAllReduce.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "worker/collective/all_reduce.h"

namespace lockstep::collective {

// InvalidArgument where the placement is not one of `leaves` over these members and slots.
absl::Status CheckPlacement(const Placement& placement, int members, int rank, int slots);

class SmallExchange {
 public:
  // Null communicator: one member; null team: one slot.
  SmallExchange(Communicator* communicator, Team* team, Placement placement);

  // As those of CanonicalAllReduce.
  absl::StatusOr<const void*> MergeSmall(int slot, absl::Span<const void* const> records,
                                         size_t bytes, const CanonicalAllReduce::Fold& fold,
                                         absl::Time deadline);
  absl::StatusOr<const void*> AllGather(int slot, const void* mine, size_t bytes,
                                        absl::Time deadline);

 protected:
  static constexpr size_t kLine = 64;
  static constexpr size_t RoundUp(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  // Aborts everything; returns the first failure.
  absl::Status Fail(const absl::Status& failure);
  absl::Status failure() const;  // OK before the first
  absl::Status Barrier(int slot, absl::Time deadline);
  // Where other slots wait for slot 0, which waits for other members with the same deadline.
  absl::Status BarrierAfterMembers(int slot, absl::Time deadline);

  Communicator* const communicator_;
  Team* const team_;
  const Placement placement_;
  const int members_;
  const int rank_;
  const std::vector<int>& bounds_;
  const int slots_count_;
  std::vector<std::vector<Node>> slot_parts_;    // of our slots
  std::vector<std::vector<Node>> member_parts_;  // of all members

 private:
  struct alignas(kLine) Line {
    std::byte bytes[kLine];
  };
  // Small values of known subtrees, left to right, folded in place.
  struct SmallValues {
    std::vector<Node> nodes;
    std::vector<std::byte*> values;  // null: absent
    // The value of `node`, whose parts are [first, last).
    std::byte* FoldNode(Node node, size_t first, size_t last,
                        const CanonicalAllReduce::Fold& fold) const;
  };

  std::byte* FoldRecord(std::vector<Line>& stack, int begin, Node node,
                        absl::Span<const void* const> records, size_t bytes,
                        const CanonicalAllReduce::Fold& fold, size_t top);
  absl::Status MergeMembers(size_t bytes, const CanonicalAllReduce::Fold& fold,
                            absl::Time deadline);

  mutable absl::Mutex failure_mutex_;
  absl::Status failure_ ABSL_GUARDED_BY(failure_mutex_);
  std::atomic<bool> failed_{false};  // failure_ is set

  std::vector<std::vector<Line>> stacks_;  // by slot: records in progress
  // Written by slot 0 between barriers.
  size_t most_parts_ = 0;
  SmallValues slot_values_, root_values_;
  std::vector<Line> block_, blocks_, small_result_;
  bool small_present_ = false;
  std::vector<Line> gathered_[2];
  std::vector<uint64_t> gathers_;  // of each slot
};

}  // namespace lockstep::collective
