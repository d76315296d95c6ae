#include "worker/collective/all_reduce.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/status_macros.h"
#include "worker/collective/fold_program.h"

namespace lockstep::collective {
namespace {

constexpr size_t kLine = 64;
constexpr size_t RoundUp(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
// Elements that are finished before they are written to the other members: they stay in the
// second-level cache in between.
constexpr int64_t kDelivery = 8 * FoldProgram::kBlock;

constexpr absl::Duration kGrace = absl::Seconds(1);

struct alignas(kLine) Line {
  std::byte bytes[kLine];
};

// One flat vector.
size_t VectorBytes(int64_t size) { return std::max(kLine, RoundUp(size * sizeof(float))); }

// Vectors that a slot needs when every leaf is there; fewer leaves never need more.
int SlotBuffers(const Placement& placement, int begin, int end) {
  const std::vector<uint8_t> present(placement.leaves, 1);
  return MakeStackSchedule(placement.leaves, begin, end, present, placement.interleaved).buffers;
}

int MemberBuffers(const Placement& placement, const std::vector<int>& bounds) {
  int buffers = 0;
  for (size_t slot = 0; slot + 1 < bounds.size(); ++slot) {
    buffers += SlotBuffers(placement, bounds[slot], bounds[slot + 1]);
  }
  return std::max(1, buffers);  // a member without leaves still holds the result
}

absl::Status CheckPlacement(const Placement& placement, int members, int rank, int slots) {
  if (static_cast<int>(placement.bounds.size()) != members) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement over ", placement.bounds.size(), " members, expected ", members));
  }
  int next = 0;
  for (const std::vector<int>& bounds : placement.bounds) {
    if (bounds.size() < 2 || bounds.front() != next ||
        !std::is_sorted(bounds.begin(), bounds.end())) {
      return absl::InvalidArgumentError(
          absl::StrCat("placement is not a list of adjoining ranges: a member's leaves begin at ",
                       bounds.empty() ? -1 : bounds.front(), ", expected ", next));
    }
    next = bounds.back();
  }
  if (next != placement.leaves || next == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement covers ", next, " leaves of ", placement.leaves));
  }
  if (placement.interleaved < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "placement has groups of ", placement.interleaved, " leaves; accepted: 1 or more"));
  }
  const int placed = static_cast<int>(placement.bounds[rank].size()) - 1;
  if (placed != slots) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement has ", placed, " slots here, the team ", slots));
  }
  return absl::OkStatus();
}

absl::Status CheckBuckets(const std::vector<Bucket>& buckets, int64_t size) {
  int64_t next = 0;
  for (const Bucket& bucket : buckets) {
    if (bucket.begin != next || bucket.end < bucket.begin) break;
    next = bucket.end;
  }
  if (next == size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("buckets do not partition [0, ", size, "): they stop at ", next));
}

// Small values of known subtrees, left to right, folded in place.
struct SmallValues {
  std::vector<Node> nodes;
  std::vector<std::byte*> values;  // null: absent

  // The value of `node`, whose parts are [first, last).
  std::byte* Fold(Node node, size_t first, size_t last,
                  const CanonicalAllReduce::Fold& fold) const {
    if (first == last) return nullptr;
    if (last - first == 1) return values[first];
    const int split = SplitPoint(node);
    size_t middle = first;
    while (middle < last && nodes[middle].begin < split) ++middle;
    std::byte* left = Fold({node.begin, split}, first, middle, fold);
    std::byte* right = Fold({split, node.end}, middle, last, fold);
    if (left == nullptr) return right;
    if (right != nullptr) fold(left, right);
    return left;
  }
};

class CanonicalOnCommunicator : public CanonicalAllReduce {
 public:
  CanonicalOnCommunicator(device::Device& device, Communicator* communicator, Team* team,
                          Placement placement, int64_t size, std::vector<Bucket> buckets)
      : device_(device),
        communicator_(communicator),
        team_(team),
        placement_(std::move(placement)),
        size_(size),
        buckets_(std::move(buckets)),
        members_(communicator == nullptr ? 1 : communicator->size()),
        rank_(communicator == nullptr ? 0 : communicator->rank()),
        bounds_(placement_.bounds[rank_]),
        slots_count_(static_cast<int>(bounds_.size()) - 1),
        slots_(slots_count_),
        arrivals_(buckets_.size()),
        folded_(buckets_.size()),
        tickets_(buckets_.size()),
        views_(buckets_.size()) {}

  absl::Status Initialize();

  absl::Status Begin(int slot, absl::Span<const uint8_t> present, absl::Time deadline) override;
  float* Leaf(int slot, int leaf) override;
  void Done(int slot, device::Stream& stream, int leaf, int64_t begin, int64_t end) override;
  const device::LeafFold* LeafFold(int slot) override;
  float* Part(int slot, int part) override;
  void DoneFolded(int slot, device::Stream& stream, int64_t begin, int64_t end) override;
  absl::Status Finish(int slot, device::Stream& stream, absl::Time deadline) override;
  const float* result() const override { return result_.load(std::memory_order_relaxed); }
  absl::StatusOr<const void*> MergeSmall(int slot, absl::Span<const void* const> records,
                                         size_t bytes, const Fold& fold,
                                         absl::Time deadline) override;
  absl::StatusOr<const void*> AllGather(int slot, const void* mine, size_t bytes,
                                        absl::Time deadline) override;

 private:
  // A slot's StackSchedule without what is absent, as kernels take it.
  struct SlotFold {
    explicit SlotFold(const StackSchedule& stack);
    SlotFold(const SlotFold&) = delete;
    std::vector<int> buffer, combine_count, part_buffer;
    std::vector<device::FoldPair> combines;
    device::LeafFold fold;
  };
  // What follows from the set of leaves that exist in a step.
  struct Pattern {
    std::vector<uint8_t> present;
    std::vector<StackSchedule> stacks;               // of our slots
    std::vector<std::unique_ptr<SlotFold>> folds;    // of our slots
    std::vector<int> last_leaf;                      // that each slot writes, -1: none
    FoldProgram member_fold;                         // our slots' subtrees -> our member's
    std::vector<int> member_inputs, member_outputs;  // buffers
    bool member_trivial = true;                      // nothing to add or move
    std::vector<int> parts;                          // that each member offers
    FoldProgram root_fold;                           // all members' parts -> the root
  };
  struct alignas(kLine) Slot {
    uint64_t step = 0;
    const Pattern* pattern = nullptr;
    int64_t elements_left = 0;         // of the last leaf
    std::vector<int64_t> bucket_left;  // the same by bucket
    std::unique_ptr<device::Memory> scratch;
    std::vector<const float*> inputs;
    std::vector<float*> outputs;
    std::vector<Line> stack;  // MergeSmall: records in progress
  };

  absl::Status Fail(const absl::Status& failure);
  absl::Status Barrier(int slot, absl::Time deadline);
  // Where other slots wait for slot 0, which waits for other members with the same deadline.
  absl::Status BarrierAfterMembers(int slot, absl::Time deadline);
  float* Buffer(int index) const {
    return reinterpret_cast<float*>(memory_ + index * VectorBytes(size_));
  }
  const Pattern& FindPattern(absl::Span<const uint8_t> present);
  // Our slot's parts are there for [begin, end).
  void Complete(int slot, device::Stream& stream, int64_t begin, int64_t end);
  void Arrive(int slot, device::Stream* stream, size_t bucket);
  void FoldMember(Slot& s, device::Stream* stream, int64_t begin, int64_t end);
  void PostReady(uint64_t step, const Pattern& pattern);
  absl::Status FinishAcrossMembers(int slot, device::Stream& stream, absl::Time deadline);
  void FinishChunk(int slot, device::Stream& stream, size_t bucket);
  absl::Status EnqueueGather(size_t bucket, Ticket* ticket);
  std::byte* FoldRecord(Slot& s, int begin, Node node, absl::Span<const void* const> records,
                        size_t bytes, const Fold& fold, size_t top);
  absl::Status MergeMembers(size_t bytes, const Fold& fold, absl::Time deadline);

  device::Device& device_;
  Communicator* const communicator_;
  Team* const team_;
  const Placement placement_;
  const int64_t size_;
  const std::vector<Bucket> buckets_;
  const int members_;
  const int rank_;
  const std::vector<int>& bounds_;
  const int slots_count_;

  std::unique_ptr<device::Memory> owned_;  // where no other member reads it
  std::byte* memory_ = nullptr;
  std::vector<int> first_buffer_;  // of each slot
  std::vector<float*> mapped_;     // the result in members that we can write to
  std::vector<Slot> slots_;

  // Buckets. A bucket's arrivals count up for ever: `slots` more in each step.
  std::vector<std::atomic<uint64_t>> arrivals_;
  std::vector<std::atomic<uint64_t>>
      folded_;                        // the last step in which our member's parts were ready
  std::atomic<bool> posting_{false};  // guards the next four
  uint64_t posting_step_ = 0;
  std::atomic<size_t> next_post_{0};
  std::vector<const float*> offered_;
  std::vector<Ticket> tickets_;
  std::vector<std::vector<std::vector<const float*>>> views_;
  std::atomic<const float*> result_{nullptr};

  absl::Mutex mutex_;
  std::vector<std::unique_ptr<Pattern>> patterns_ ABSL_GUARDED_BY(mutex_);
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> failed_{false};  // failure_ is set

  // MergeSmall and AllGather; written by slot 0 between barriers.
  std::vector<std::vector<Node>> slot_parts_;    // of our slots
  std::vector<std::vector<Node>> member_parts_;  // of all members
  size_t most_parts_ = 0;
  SmallValues slot_values_, root_values_;
  std::vector<Line> block_, blocks_, small_result_;
  bool small_present_ = false;
  std::vector<Line> gathered_[2];
  std::vector<uint64_t> gathers_;  // of each slot
};

absl::Status CanonicalOnCommunicator::Initialize() {
  int buffers = 0;
  for (int slot = 0; slot < slots_count_; ++slot) {
    first_buffer_.push_back(buffers);
    buffers += SlotBuffers(placement_, bounds_[slot], bounds_[slot + 1]);
    slots_[slot].bucket_left.resize(buckets_.size());
    // A fold of n values needs at most ceil(log2 n) blocks; there are fewer values than leaves.
    int64_t blocks = 2;
    while ((int64_t{1} << blocks) < placement_.leaves) ++blocks;
    ASSIGN_OR_RETURN(slots_[slot].scratch,
                     device_.Allocate((blocks + 1) * FoldProgram::kBlock * sizeof(float)));
    slot_parts_.push_back(MaximalSubtrees(placement_.leaves, bounds_[slot], bounds_[slot + 1]));
  }
  if (members_ > 1) {
    ASSIGN_OR_RETURN(void* memory, communicator_->Allocate(SharedBytes(placement_, size_)));
    memory_ = static_cast<std::byte*>(memory);
    for (int member = 0; member < members_; ++member) {
      if (member == rank_) continue;
      void* peer = communicator_->Peer(member, Buffer(0));
      if (peer != nullptr) mapped_.push_back(static_cast<float*>(peer));
    }
  } else {
    ASSIGN_OR_RETURN(owned_, device_.Allocate(std::max(1, buffers) * VectorBytes(size_)));
    memory_ = static_cast<std::byte*>(owned_->data());
  }
  for (const std::vector<int>& bounds : placement_.bounds) {
    member_parts_.push_back(MaximalSubtrees(placement_.leaves, bounds.front(), bounds.back()));
    most_parts_ = std::max(most_parts_, member_parts_.back().size());
    root_values_.nodes.insert(root_values_.nodes.end(), member_parts_.back().begin(),
                              member_parts_.back().end());
  }
  root_values_.values.resize(root_values_.nodes.size());
  for (const std::vector<Node>& parts : slot_parts_) {
    slot_values_.nodes.insert(slot_values_.nodes.end(), parts.begin(), parts.end());
  }
  slot_values_.values.resize(slot_values_.nodes.size());
  gathers_.resize(slots_count_);
  result_ = Buffer(0);
  return absl::OkStatus();
}

absl::Status CanonicalOnCommunicator::Fail(const absl::Status& failure) {
  absl::Status first;
  {
    absl::MutexLock lock(&mutex_);
    if (failure_.ok()) failure_ = failure;
    first = failure_;
  }
  failed_.store(true, std::memory_order_release);
  if (team_ != nullptr) team_->Abort(first);
  if (communicator_ != nullptr) communicator_->Abort(first);
  return first;
}

absl::Status CanonicalOnCommunicator::Barrier(int slot, absl::Time deadline) {
  if (team_ == nullptr) return absl::OkStatus();
  const absl::Status status = team_->Barrier(slot, deadline);
  return status.ok() ? status : Fail(status);
}

absl::Status CanonicalOnCommunicator::BarrierAfterMembers(int slot, absl::Time deadline) {
  // Slot 0 is to be the one that reports, since it can name the member that is missing.
  return Barrier(slot, members_ > 1 && slot != 0 ? deadline + kGrace : deadline);
}

// ---- the step

CanonicalOnCommunicator::SlotFold::SlotFold(const StackSchedule& stack) {
  for (const StackSchedule::Leaf& leaf : stack.leaves) {
    if (leaf.buffer < 0) continue;
    buffer.push_back(leaf.buffer);
    combine_count.push_back(static_cast<int>(leaf.combines.size()));
    for (const Combine& combine : leaf.combines) combines.push_back({combine.dst, combine.src});
  }
  for (const int at : stack.part_buffer) {
    if (at >= 0) part_buffer.push_back(at);
  }
  fold = {static_cast<int>(buffer.size()),
          buffer.data(),
          combine_count.data(),
          combines.data(),
          static_cast<int>(part_buffer.size()),
          part_buffer.data()};
}

const CanonicalOnCommunicator::Pattern& CanonicalOnCommunicator::FindPattern(
    absl::Span<const uint8_t> present) {
  absl::MutexLock lock(&mutex_);
  for (const auto& pattern : patterns_) {
    if (absl::MakeConstSpan(pattern->present) == present) return *pattern;
  }
  auto pattern = std::make_unique<Pattern>();
  pattern->present.assign(present.begin(), present.end());

  // Our slots, and from their subtrees our member's.
  std::vector<Node> inputs;
  for (int slot = 0; slot < slots_count_; ++slot) {
    StackSchedule stack = MakeStackSchedule(placement_.leaves, bounds_[slot], bounds_[slot + 1],
                                            present, placement_.interleaved);
    int last = -1;
    for (int leaf : WriteOrder(bounds_[slot], bounds_[slot + 1], placement_.interleaved)) {
      if (present[leaf]) last = leaf;
    }
    pattern->last_leaf.push_back(last);
    for (size_t part = 0; part < slot_parts_[slot].size(); ++part) {
      if (stack.part_buffer[part] < 0) continue;
      inputs.push_back(slot_parts_[slot][part]);
      pattern->member_inputs.push_back(first_buffer_[slot] + stack.part_buffer[part]);
    }
    pattern->folds.push_back(std::make_unique<SlotFold>(stack));
    pattern->stacks.push_back(std::move(stack));
  }
  const FoldSchedule member = MakeFoldSchedule(placement_.leaves, inputs, member_parts_[rank_]);
  pattern->member_fold = FoldProgram(member, static_cast<int>(inputs.size()));
  for (const int value : member.target_buffer) {
    if (value >= 0) pattern->member_outputs.push_back(pattern->member_inputs[value]);
  }
  for (int output = 0; output < pattern->member_fold.outputs(); ++output) {
    pattern->member_trivial &= pattern->member_fold.unchanged(output) >= 0;
  }

  // All members.
  std::vector<Node> offered;
  for (const std::vector<Node>& parts : member_parts_) {
    int count = 0;
    for (const Node& part : parts) {
      const auto* begin = present.data();
      if (std::none_of(begin + part.begin, begin + part.end, [](uint8_t p) { return p != 0; })) {
        continue;
      }
      offered.push_back(part);
      ++count;
    }
    pattern->parts.push_back(count);
  }
  const Node root{0, placement_.leaves};
  pattern->root_fold =
      FoldProgram(MakeFoldSchedule(placement_.leaves, offered, absl::MakeConstSpan(&root, 1)),
                  static_cast<int>(offered.size()));
  patterns_.push_back(std::move(pattern));
  return *patterns_.back();
}

absl::Status CanonicalOnCommunicator::Begin(int slot, absl::Span<const uint8_t> present,
                                            absl::Time /*deadline*/) {
  Slot& s = slots_[slot];
  if (static_cast<int>(present.size()) != placement_.leaves ||
      std::none_of(present.begin(), present.end(), [](uint8_t p) { return p != 0; })) {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("a step over ", present.size(),
                     " leaves, of which at least one is present, of ", placement_.leaves)));
  }
  if (failed_.load(std::memory_order_acquire)) {
    absl::MutexLock lock(&mutex_);
    return failure_;
  }
  if (s.pattern == nullptr || absl::MakeConstSpan(s.pattern->present) != present) {
    s.pattern = &FindPattern(present);
  }
  ++s.step;
  s.elements_left = size_;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    s.bucket_left[bucket] = buckets_[bucket].end - buckets_[bucket].begin;
  }
  const bool idle = s.pattern->last_leaf[slot] < 0;
  if (idle) s.elements_left = 0;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    if (idle || s.bucket_left[bucket] == 0) Arrive(slot, nullptr, bucket);
  }
  return absl::OkStatus();
}

float* CanonicalOnCommunicator::Leaf(int slot, int leaf) {
  const int buffer = slots_[slot].pattern->stacks[slot].leaves[leaf - bounds_[slot]].buffer;
  return buffer < 0 ? nullptr : Buffer(first_buffer_[slot] + buffer);
}

void CanonicalOnCommunicator::Done(int slot, device::Stream& stream, int leaf, int64_t begin,
                                   int64_t end) {
  Slot& s = slots_[slot];
  const auto& combines = s.pattern->stacks[slot].leaves[leaf - bounds_[slot]].combines;
  if (combines.size() == 1) {
    float* left = Buffer(first_buffer_[slot] + combines[0].dst) + begin;
    device_.Add(stream, end - begin, left, Buffer(first_buffer_[slot] + combines[0].src) + begin,
                left);
  } else if (!combines.empty()) {
    for (int64_t at = begin; at < end; at += FoldProgram::kBlock) {
      const int64_t count = std::min(FoldProgram::kBlock, end - at);
      for (const Combine& combine : combines) {
        float* left = Buffer(first_buffer_[slot] + combine.dst) + at;
        device_.Add(stream, count, left, Buffer(first_buffer_[slot] + combine.src) + at, left);
      }
    }
  }
  if (leaf == s.pattern->last_leaf[slot]) Complete(slot, stream, begin, end);
}

const device::LeafFold* CanonicalOnCommunicator::LeafFold(int slot) {
  const device::LeafFold& fold = slots_[slot].pattern->folds[slot]->fold;
  return fold.leaves == 0 || placement_.interleaved > 1 ? nullptr : &fold;
}

float* CanonicalOnCommunicator::Part(int slot, int part) {
  return Buffer(first_buffer_[slot] + slots_[slot].pattern->folds[slot]->part_buffer[part]);
}

void CanonicalOnCommunicator::DoneFolded(int slot, device::Stream& stream, int64_t begin,
                                         int64_t end) {
  Complete(slot, stream, begin, end);
}

void CanonicalOnCommunicator::Complete(int slot, device::Stream& stream, int64_t begin,
                                       int64_t end) {
  if (begin == end) return;
  Slot& s = slots_[slot];
  s.elements_left -= end - begin;
  size_t bucket = std::upper_bound(buckets_.begin(), buckets_.end(), begin,
                                   [](int64_t at, const Bucket& b) { return at < b.end; }) -
                  buckets_.begin();
  for (; bucket < buckets_.size() && buckets_[bucket].begin < end; ++bucket) {
    const int64_t covered =
        std::min(end, buckets_[bucket].end) - std::max(begin, buckets_[bucket].begin);
    if (covered <= 0) continue;
    s.bucket_left[bucket] -= covered;
    if (s.bucket_left[bucket] == 0) Arrive(slot, &stream, bucket);
  }
}

// The last slot of the member to be done with a bucket folds it and starts its exchange, unless it
// has nothing else left to compute: then all slots will be free, and share the work in Finish. So
// they do where there is nothing to exchange: the last slot is the one that is behind.
void CanonicalOnCommunicator::Arrive(int slot, device::Stream* stream, size_t bucket) {
  Slot& s = slots_[slot];
  const uint64_t all = s.step * static_cast<uint64_t>(slots_count_);
  if (arrivals_[bucket].fetch_add(1, std::memory_order_acq_rel) + 1 != all) return;
  if (!s.pattern->member_trivial) {
    if (members_ == 1 || s.elements_left <= 0 || stream == nullptr) return;
    FoldMember(s, stream, buckets_[bucket].begin, buckets_[bucket].end);
  }
  folded_[bucket].store(s.step, std::memory_order_seq_cst);
  if (members_ > 1) PostReady(s.step, *s.pattern);
}

void CanonicalOnCommunicator::FoldMember(Slot& s, device::Stream* stream, int64_t begin,
                                         int64_t end) {
  const Pattern& pattern = *s.pattern;
  s.inputs.clear();
  s.outputs.clear();
  for (const int buffer : pattern.member_inputs) s.inputs.push_back(Buffer(buffer) + begin);
  for (const int buffer : pattern.member_outputs) s.outputs.push_back(Buffer(buffer) + begin);
  pattern.member_fold.Run(device_, *stream, s.inputs, s.outputs, end - begin, s.scratch->floats());
}

// Exchanges are enqueued in the order of the buckets, by whichever slot comes when the next is
// ready.
void CanonicalOnCommunicator::PostReady(uint64_t step, const Pattern& pattern) {
  const auto ready = [&](size_t bucket) {
    return bucket < buckets_.size() && folded_[bucket].load(std::memory_order_seq_cst) == step;
  };
  for (;;) {
    if (posting_.exchange(true, std::memory_order_seq_cst)) return;  // who holds it looks again
    if (posting_step_ != step) {
      posting_step_ = step;
      next_post_ = 0;
    }
    while (ready(next_post_)) {
      const Bucket& bucket = buckets_[next_post_];
      offered_.clear();
      for (const int buffer : pattern.member_outputs) {
        offered_.push_back(Buffer(buffer) + bucket.begin);
      }
      const auto ticket =
          communicator_->EnqueueExchange(nullptr, Lane::kGradients, offered_, pattern.parts,
                                         bucket.end - bucket.begin, &views_[next_post_]);
      if (!ticket.ok()) {
        Fail(ticket.status()).IgnoreError();
      } else {
        tickets_[next_post_] = *ticket;
      }
      next_post_ = next_post_ + 1;
    }
    posting_.store(false, std::memory_order_seq_cst);
    if (!ready(next_post_)) return;
  }
}

absl::Status CanonicalOnCommunicator::Finish(int slot, device::Stream& stream,
                                             absl::Time deadline) {
  Slot& s = slots_[slot];
  if (slot == 0 && members_ == 1) {
    result_.store(Buffer(s.pattern->member_outputs[0]), std::memory_order_relaxed);
  }
  RETURN_IF_ERROR(Barrier(slot, deadline));
  bool shared_work = false;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    if (arrivals_[bucket].load(std::memory_order_acquire) != s.step * slots_count_) {
      return Fail(absl::FailedPreconditionError(absl::StrCat(
          "bucket ", bucket, " is not complete: every slot must call Done for all of [0, ", size_,
          ") of each of its leaves before Finish")));
    }
    if (folded_[bucket].load(std::memory_order_seq_cst) == s.step) continue;
    shared_work = true;
    const Bucket& b = buckets_[bucket];
    FoldMember(s, &stream, b.begin + ChunkBegin(b.end - b.begin, slots_count_, slot),
               b.begin + ChunkBegin(b.end - b.begin, slots_count_, slot + 1));
  }
  if (shared_work) {
    RETURN_IF_ERROR(Barrier(slot, deadline));
    if (slot == 0) {
      for (auto& folded : folded_) folded.store(s.step, std::memory_order_seq_cst);
      if (members_ > 1) PostReady(s.step, *s.pattern);
    }
  }
  if (members_ == 1) return absl::OkStatus();
  return FinishAcrossMembers(slot, stream, deadline);
}

absl::Status CanonicalOnCommunicator::FinishAcrossMembers(int slot, device::Stream& stream,
                                                          absl::Time deadline) {
  Ticket gather;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    if (slot == 0) {
      const absl::Status status = communicator_->Wait(tickets_[bucket], deadline);
      if (!status.ok()) return Fail(status);
    }
    RETURN_IF_ERROR(
        BarrierAfterMembers(slot, deadline));  // the views are there, the bucket before is finished
    if (slot == 0 && slots_count_ > 1 && bucket > 0) {
      RETURN_IF_ERROR(EnqueueGather(bucket - 1, &gather));
    }
    FinishChunk(slot, stream, bucket);
    if (slots_count_ == 1) RETURN_IF_ERROR(EnqueueGather(bucket, &gather));
  }
  if (slots_count_ > 1) RETURN_IF_ERROR(BarrierAfterMembers(slot, deadline));
  if (slot == 0 && !buckets_.empty()) {
    if (slots_count_ > 1) RETURN_IF_ERROR(EnqueueGather(buckets_.size() - 1, &gather));
    const absl::Status status = communicator_->Wait(gather, deadline);
    if (!status.ok()) return Fail(status);
  }
  return BarrierAfterMembers(slot, deadline);
}

absl::Status CanonicalOnCommunicator::EnqueueGather(size_t bucket, Ticket* ticket) {
  const Bucket& b = buckets_[bucket];
  const auto enqueued = communicator_->EnqueueGather(nullptr, Lane::kGradients, Buffer(0) + b.begin,
                                                     b.end - b.begin, /*delivered=*/true);
  if (!enqueued.ok()) return Fail(enqueued.status());
  *ticket = *enqueued;
  return absl::OkStatus();
}

// Our share of the member's chunk: its tree is finished in our result, and written on to the
// members that we reach through memory. Only we read this chunk of their parts, so theirs may be
// overwritten.
void CanonicalOnCommunicator::FinishChunk(int slot, device::Stream& stream, size_t bucket) {
  Slot& s = slots_[slot];
  const Bucket& b = buckets_[bucket];
  const int64_t count = b.end - b.begin;
  const int64_t chunk = ChunkBegin(count, members_, rank_);
  const int64_t length = ChunkBegin(count, members_, rank_ + 1) - chunk;
  const int64_t end = ChunkBegin(length, slots_count_, slot + 1);
  for (int64_t at = ChunkBegin(length, slots_count_, slot); at < end; at += kDelivery) {
    const int64_t n = std::min(kDelivery, end - at);
    const int64_t place = b.begin + chunk + at;
    s.inputs.clear();
    for (const auto& parts : views_[bucket]) {
      for (const float* part : parts) s.inputs.push_back(part + at);
    }
    float* out = Buffer(0) + place;
    s.pattern->root_fold.Run(device_, stream, s.inputs, absl::MakeConstSpan(&out, 1), n,
                             s.scratch->floats());
    for (float* mapped : mapped_) device_.Copy(stream, out, mapped + place, n * sizeof(float));
  }
}

// ---- small records

std::byte* CanonicalOnCommunicator::FoldRecord(Slot& s, int begin, Node node,
                                               absl::Span<const void* const> records, size_t bytes,
                                               const Fold& fold, size_t top) {
  if (node.end - node.begin == 1) {
    const void* record = records[node.begin - begin];
    if (record == nullptr) return nullptr;
    std::byte* copy = s.stack[top * (RoundUp(bytes) / kLine)].bytes;
    memcpy(copy, record, bytes);
    return copy;
  }
  const int split = SplitPoint(node);
  std::byte* left = FoldRecord(s, begin, {node.begin, split}, records, bytes, fold, top);
  std::byte* right = FoldRecord(s, begin, {split, node.end}, records, bytes, fold,
                                left == nullptr ? top : top + 1);
  if (left == nullptr) return right;
  if (right != nullptr) fold(left, right);
  return left;
}

absl::StatusOr<const void*> CanonicalOnCommunicator::MergeSmall(
    int slot, absl::Span<const void* const> records, size_t bytes, const Fold& fold,
    absl::Time deadline) {
  Slot& s = slots_[slot];
  const int begin = bounds_[slot], leaves = bounds_[slot + 1] - begin;
  const size_t stride = RoundUp(bytes);
  if (bytes == 0 || static_cast<int>(records.size()) != leaves ||
      stride * most_parts_ + RoundUp(most_parts_) > Communicator::kSmallBytes) {
    return Fail(absl::InvalidArgumentError(
        absl::StrCat("merge of ", records.size(), " records of ", bytes, " bytes: expected ",
                     leaves, " records, of 1 to ",
                     (Communicator::kSmallBytes - RoundUp(most_parts_)) / most_parts_, " bytes")));
  }
  // Our leaves; every part that is there takes one place of the stack for good.
  const std::vector<Node>& parts = slot_parts_[slot];
  size_t depth = 2;
  while ((1 << depth) < leaves) ++depth;
  if (s.stack.size() < (parts.size() + depth + 1) * stride / kLine) {
    s.stack.resize((parts.size() + depth + 1) * stride / kLine);
  }
  size_t top = 0, first_value = 0;
  for (int other = 0; other < slot; ++other) first_value += slot_parts_[other].size();
  for (size_t part = 0; part < parts.size(); ++part) {
    std::byte* value = FoldRecord(s, begin, parts[part], records, bytes, fold, top);
    slot_values_.values[first_value + part] = value;
    if (value != nullptr) ++top;
  }
  RETURN_IF_ERROR(Barrier(slot, deadline));
  if (slot == 0) {
    const absl::Status status = MergeMembers(bytes, fold, deadline);
    if (!status.ok()) return Fail(status);
  }
  RETURN_IF_ERROR(BarrierAfterMembers(slot, deadline));
  return small_present_ ? small_result_.data() : nullptr;
}

// A block holds a byte for each part of its member (1: there) and then the parts.
absl::Status CanonicalOnCommunicator::MergeMembers(size_t bytes, const Fold& fold,
                                                   absl::Time deadline) {
  const size_t stride = RoundUp(bytes), flags = RoundUp(most_parts_);
  const size_t block = flags + stride * most_parts_;
  if (block_.size() < block / kLine) block_.resize(block / kLine);
  if (blocks_.size() < members_ * block / kLine) blocks_.resize(members_ * block / kLine);
  if (small_result_.size() < stride / kLine) small_result_.resize(stride / kLine);
  memset(block_.data(), 0, flags);
  size_t first = 0;
  for (size_t part = 0; part < member_parts_[rank_].size(); ++part) {
    const Node& node = member_parts_[rank_][part];
    size_t last = first;
    while (last < slot_values_.nodes.size() && slot_values_.nodes[last].end <= node.end) ++last;
    const std::byte* value = slot_values_.Fold(node, first, last, fold);
    first = last;
    if (value == nullptr) continue;
    block_[0].bytes[part] = std::byte{1};
    memcpy(reinterpret_cast<std::byte*>(block_.data()) + flags + part * stride, value, bytes);
  }
  std::byte* all = reinterpret_cast<std::byte*>(block_.data());
  if (members_ > 1) {
    all = reinterpret_cast<std::byte*>(blocks_.data());
    ASSIGN_OR_RETURN(const Ticket ticket, communicator_->EnqueueAllGather(
                                              nullptr, Lane::kMoments, block_.data(), block, all));
    RETURN_IF_ERROR(communicator_->Wait(ticket, deadline));
  }
  size_t index = 0;
  for (int member = 0; member < members_; ++member) {
    for (size_t part = 0; part < member_parts_[member].size(); ++part, ++index) {
      std::byte* base = all + member * block;
      const bool there = base[part] != std::byte{0};
      root_values_.values[index] = there ? base + flags + part * stride : nullptr;
    }
  }
  const std::byte* root =
      root_values_.Fold({0, placement_.leaves}, 0, root_values_.nodes.size(), fold);
  small_present_ = root != nullptr;
  if (small_present_) memcpy(small_result_.data(), root, bytes);
  return absl::OkStatus();
}

absl::StatusOr<const void*> CanonicalOnCommunicator::AllGather(int slot, const void* mine,
                                                               size_t bytes, absl::Time deadline) {
  // Two buffers in turn: who still reads one has not passed the barrier that lets it be written
  // again.
  std::vector<Line>& all = gathered_[gathers_[slot]++ % 2];
  if (slot == 0) {
    const size_t lines = RoundUp(members_ * bytes) / kLine;
    if (all.size() < lines) all.resize(lines);
    if (members_ == 1) {
      if (bytes > 0) memcpy(all.data(), mine, bytes);
    } else {
      auto ticket =
          communicator_->EnqueueAllGather(nullptr, Lane::kMoments, mine, bytes, all.data());
      const absl::Status status =
          ticket.ok() ? communicator_->Wait(*ticket, deadline) : ticket.status();
      if (!status.ok()) return Fail(status);
    }
  }
  RETURN_IF_ERROR(BarrierAfterMembers(slot, deadline));
  return all.data();
}

}  // namespace

std::vector<Bucket> MakeBuckets(int64_t size, const std::vector<int64_t>& offsets, int64_t bytes) {
  std::vector<Bucket> buckets;
  int64_t begin = 0;
  for (const int64_t offset : offsets) {
    if (offset >= size) break;
    if ((offset - begin) * static_cast<int64_t>(sizeof(float)) < bytes) continue;
    buckets.push_back({begin, offset});
    begin = offset;
  }
  if (begin < size) buckets.push_back({begin, size});
  return buckets;
}

size_t CanonicalAllReduce::SharedBytes(const Placement& placement, int64_t size) {
  if (placement.bounds.size() < 2) return 0;
  int buffers = 0;
  for (const std::vector<int>& bounds : placement.bounds) {
    buffers = std::max(buffers, MemberBuffers(placement, bounds));
  }
  return buffers * VectorBytes(size);
}

absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> CanonicalAllReduce::Make(
    device::Device& device, Communicator* communicator, Team* team, const Placement& placement,
    int64_t size, std::vector<Bucket> buckets) {
  const int members = communicator == nullptr ? 1 : communicator->size();
  RETURN_IF_ERROR(CheckPlacement(placement, members,
                                 communicator == nullptr ? 0 : communicator->rank(),
                                 team == nullptr ? 1 : team->slots()));
  RETURN_IF_ERROR(CheckBuckets(buckets, size));
  auto reduce = std::make_unique<CanonicalOnCommunicator>(device, communicator, team, placement,
                                                          size, std::move(buckets));
  RETURN_IF_ERROR(reduce->Initialize());
  return reduce;
}

}  // namespace lockstep::collective
