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
#include "worker/collective/device_all_reduce.h"
#include "worker/collective/fold_program.h"
#include "worker/collective/small_exchange.h"

namespace lockstep::collective {
namespace {

constexpr size_t kLine = 64;
constexpr size_t RoundUp(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
// Elements that are finished before they are written to the other members: they stay in the
// second-level cache in between.
constexpr int64_t kDelivery = 8 * FoldProgram::kBlock;

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

class CanonicalOnCommunicator : public CanonicalAllReduce, private SmallExchange {
 public:
  CanonicalOnCommunicator(device::Device& device, Communicator* communicator, Team* team,
                          Placement placement, int64_t size, std::vector<Bucket> buckets)
      : SmallExchange(communicator, team, std::move(placement)),
        device_(device),
        size_(size),
        buckets_(std::move(buckets)),
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
  absl::Status Finish(int slot, device::Stream& stream, absl::Time deadline,
                      std::vector<const float*>* left) override;
  float* result() const override { return result_.load(std::memory_order_relaxed); }
  absl::StatusOr<const void*> MergeSmall(int slot, absl::Span<const void* const> records,
                                         size_t bytes, const Fold& fold,
                                         absl::Time deadline) override {
    return SmallExchange::MergeSmall(slot, records, bytes, fold, deadline);
  }
  absl::StatusOr<const void*> AllGather(int slot, const void* mine, size_t bytes,
                                        absl::Time deadline) override {
    return SmallExchange::AllGather(slot, mine, bytes, deadline);
  }

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
  struct alignas(64) Slot {
    uint64_t step = 0;
    const Pattern* pattern = nullptr;
    int64_t elements_left = 0;         // of the last leaf
    std::vector<int64_t> bucket_left;  // the same by bucket
    std::unique_ptr<device::Memory> scratch;
    std::vector<const float*> inputs;
    std::vector<float*> outputs;
  };

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

  device::Device& device_;
  const int64_t size_;
  const std::vector<Bucket> buckets_;

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
  std::atomic<float*> result_{nullptr};

  absl::Mutex mutex_;
  std::vector<std::unique_ptr<Pattern>> patterns_ ABSL_GUARDED_BY(mutex_);
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
  result_ = Buffer(0);
  return absl::OkStatus();
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
  RETURN_IF_ERROR(failure());
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

absl::Status CanonicalOnCommunicator::Finish(int slot, device::Stream& stream, absl::Time deadline,
                                             std::vector<const float*>* left) {
  if (left != nullptr) left->clear();
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

size_t CanonicalAllReduce::SharedBytes(const Placement& placement, int64_t size,
                                       bool host_addressable) {
  if (!host_addressable) return DeviceAllReduceSharedBytes(placement, size);
  if (placement.bounds.size() < 2) return 0;
  int buffers = 0;
  for (const std::vector<int>& bounds : placement.bounds) {
    buffers = std::max(buffers, MemberBuffers(placement, bounds));
  }
  return buffers * VectorBytes(size);
}

size_t CanonicalAllReduce::StagingBytes(const Placement& placement, int rank, int64_t size) {
  return DeviceAllReduceStagingBytes(placement, rank, size);
}

absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> CanonicalAllReduce::Make(
    device::Device& device, Communicator* communicator, Team* team, const Placement& placement,
    int64_t size, std::vector<Bucket> buckets) {
  const int members = communicator == nullptr ? 1 : communicator->size();
  RETURN_IF_ERROR(CheckPlacement(placement, members,
                                 communicator == nullptr ? 0 : communicator->rank(),
                                 team == nullptr ? 1 : team->slots()));
  RETURN_IF_ERROR(CheckBuckets(buckets, size));
  if (!device.host_addressable()) {
    return MakeDeviceAllReduce(device, communicator, team, placement, size, std::move(buckets));
  }
  auto reduce = std::make_unique<CanonicalOnCommunicator>(device, communicator, team, placement,
                                                          size, std::move(buckets));
  RETURN_IF_ERROR(reduce->Initialize());
  return reduce;
}

}  // namespace lockstep::collective
