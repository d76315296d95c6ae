#include "worker/collective/device_all_reduce.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/collective/small_exchange.h"

namespace lockstep::collective {
namespace {

class DeviceAllReduce : public CanonicalAllReduce, private SmallExchange {
 public:
  DeviceAllReduce(device::Device& device, Communicator* communicator, Team* team,
                  Placement placement, int64_t size, std::vector<Bucket> buckets)
      : SmallExchange(communicator, team, std::move(placement)),
        device_(device),
        size_(size),
        buckets_(std::move(buckets)),
        on_device_(members_ > 1 && communicator->on_device()),
        // All members do or none, since what one has enqueued waits for the others.
        overlaps_(on_device_ && !placement_.in_passes &&
                  std::all_of(placement_.bounds.begin(), placement_.bounds.end(),
                              [](const auto& slots) { return slots.size() == 2; })),
        slots_(slots_count_),
        left_(buckets_.size()) {}

  static size_t VectorBytes(int64_t size) {
    return RoundUp(std::max<size_t>(1, sizeof(float) * static_cast<size_t>(size)));
  }

  absl::Status Initialize() {
    const int leaves = bounds_.back() - bounds_.front();
    ASSIGN_OR_RETURN(leaves_, device_.Allocate(VectorBytes() * std::max(leaves, 1)));
    ASSIGN_OR_RETURN(result_, device_.Allocate(VectorBytes()));
    for (int slot = 0; slot < slots_count_; ++slot) {
      const int most = bounds_[slot + 1] - bounds_[slot];
      slots_[slot].identity.resize(most);
      slots_[slot].no_combines.resize(most, 0);
    }
    if (members_ == 1) return absl::OkStatus();
    // Every member's parts, and the result, in memory that the others can be sent.
    for (const auto& parts : member_parts_) most_parts_ = std::max(most_parts_, parts.size());
    for (size_t part = 0; part < most_parts_; ++part) {
      ASSIGN_OR_RETURN(void* memory, communicator_->Allocate(VectorBytes()));
      offered_.push_back(static_cast<float*>(memory));
    }
    ASSIGN_OR_RETURN(void* memory, communicator_->Allocate(VectorBytes()));
    gathered_ = static_cast<float*>(memory);
    if (on_device_) {
      ASSIGN_OR_RETURN(side_, device_.MakeStream());
      return absl::OkStatus();
    }
    size_t parts = 0;
    for (const auto& member : member_parts_) parts += member.size();
    chunk_ = ChunkBegin(size_, members_, rank_ + 1) - ChunkBegin(size_, members_, rank_);
    ASSIGN_OR_RETURN(chunks_, device_.Allocate(sizeof(float) * std::max<int64_t>(chunk_, 1) *
                                               std::max<size_t>(parts, 1)));
    return absl::OkStatus();
  }

  absl::Status Begin(int slot, absl::Span<const uint8_t> present, absl::Time deadline) override {
    if (static_cast<int>(present.size()) != placement_.leaves ||
        std::none_of(present.begin(), present.end(), [](uint8_t p) { return p != 0; })) {
      return Fail(absl::InvalidArgumentError(
          absl::StrCat("a step over ", present.size(),
                       " leaves, of which at least one is present, of ", placement_.leaves)));
    }
    RETURN_IF_ERROR(failure());
    Slot& s = slots_[slot];
    s.present.assign(present.begin(), present.end());
    s.leaves.clear();
    for (int leaf = bounds_[slot]; leaf < bounds_[slot + 1]; ++leaf) {
      if (present[leaf] != 0) s.leaves.push_back(leaf);
    }
    const int count = static_cast<int>(s.leaves.size());
    for (int i = 0; i < count; ++i) s.identity[i] = i;
    s.fold = {count, s.identity.data(), s.no_combines.data(), nullptr, count, s.identity.data()};
    if (slot == 0 && members_ > 1) {
      BeginAcrossMembers(s);
      communicator_->Expect(deadline);
    }
    return absl::OkStatus();
  }

  float* Leaf(int, int leaf) override { return LeafVector(leaf); }
  void Done(int slot, device::Stream& stream, int, int64_t begin, int64_t end) override {
    Complete(slots_[slot], stream, 1, begin, end);
  }
  // Nothing is folded on the way: each leaf is a part.
  const device::LeafFold* LeafFold(int slot) override {
    const device::LeafFold& fold = slots_[slot].fold;
    const bool fits = fold.leaves > 0 && fold.leaves <= device::kMostFoldBuffers;
    return fits && placement_.interleaved == 1 ? &fold : nullptr;
  }
  float* Part(int slot, int part) override { return LeafVector(slots_[slot].leaves[part]); }
  void DoneFolded(int slot, device::Stream& stream, int64_t begin, int64_t end) override {
    Slot& s = slots_[slot];
    Complete(s, stream, static_cast<int>(s.leaves.size()), begin, end);
  }
  bool LeavesStay() const override { return true; }
  void EndPass(int slot, device::Stream& stream) override {
    if (!overlaps_) return;
    ExchangeComplete(slots_[slot], stream);  // where that has waited for the end
    JoinExchanges(stream);
  }
  void JoinExchanges(device::Stream& stream) override {
    if (std::exchange(beside_, false)) device_.Follow(stream, *side_);
  }
  void Repeated(int) override {
    if (overlaps_) next_ = -1;
  }

  absl::Status Finish(int slot, device::Stream& stream, absl::Time deadline,
                      std::vector<const float*>* left) override {
    Slot& s = slots_[slot];
    if (left != nullptr) left->clear();
    if (overlaps_) {
      for (; next_ >= 0; --next_) ExchangeBucket(s, stream, buckets_[next_]);
      return failure();
    }
    const bool alone = members_ == 1 && slots_count_ == 1;
    // Other streams' leaves are there only when those have run.
    if (!alone) RETURN_IF_ERROR(stream.Synchronize());
    RETURN_IF_ERROR(Barrier(slot, deadline));
    if (alone && left != nullptr && TakeParts(s, {0, placement_.leaves}, 0)) {
      *left = s.parts;
      return absl::OkStatus();
    }
    if (members_ == 1) {
      Sum(s, stream, {0, placement_.leaves}, ChunkBegin(size_, slots_count_, slot),
          ChunkBegin(size_, slots_count_, slot + 1), result_->floats());
      if (alone) return absl::OkStatus();
      RETURN_IF_ERROR(stream.Synchronize());
      return Barrier(slot, deadline);
    }
    if (slot == 0) {
      const absl::Status status =
          on_device_ ? FinishOnDevice(s, stream) : FinishAcrossMembers(s, stream, deadline);
      if (!status.ok()) return Fail(status);
    }
    return BarrierAfterMembers(slot, deadline);
  }
  float* result() const override { return on_device_ ? gathered_ : result_->floats(); }

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
  struct Slot {
    std::vector<uint8_t> present;
    std::vector<int> leaves;  // of ours that are present
    std::vector<int> identity, no_combines;
    device::LeafFold fold;
    std::vector<const float*> parts;
  };

  size_t VectorBytes() const { return VectorBytes(size_); }
  float* LeafVector(int leaf) const {
    return leaves_->floats() + (leaf - bounds_.front()) * (VectorBytes() / sizeof(float));
  }

  // Takes from `begin` on what is present of `node`, whose leaves are ours; whether a pass over
  // these sums the tree.
  bool TakeParts(Slot& s, Node node, int64_t begin) {
    s.parts.clear();
    bool gap = false, gaps = false;
    for (int leaf = node.begin; leaf < node.end; ++leaf) {
      if (s.present[leaf] != 0) {
        gaps = gaps || gap;
        s.parts.push_back(LeafVector(leaf) + begin);
      } else {
        gap = true;
      }
    }
    // Leaves that are absent at the end leave the tree over the others as it is.
    return !gaps && s.parts.size() <= device::Device::kMostParts;
  }

  // out[begin, end) = the tree over `node`, whose leaves are ours. False: none is present.
  bool Sum(Slot& s, device::Stream& stream, Node node, int64_t begin, int64_t end, float* out) {
    const bool one_pass = TakeParts(s, node, begin);
    if (s.parts.empty()) return false;
    if (begin == end) return true;
    if (one_pass) {
      device_.TreeSum(stream, end - begin, s.parts, out + begin);
      return true;
    }
    std::vector<Node> nodes;
    for (int leaf = node.begin; leaf < node.end; ++leaf) {
      if (s.present[leaf] != 0) nodes.push_back({leaf, leaf + 1});
    }
    const FoldSchedule schedule =
        MakeFoldSchedule(placement_.leaves, nodes, absl::MakeConstSpan(&node, 1));
    for (const Combine& combine : schedule.combines) {
      float* left = const_cast<float*>(s.parts[combine.dst]);  // our own
      device_.Add(stream, end - begin, left, s.parts[combine.src], left);
    }
    device_.Copy(stream, s.parts[schedule.target_buffer[0]], out + begin,
                 sizeof(float) * static_cast<size_t>(end - begin));
    return true;
  }

  // What the members' exchange of this step is made of.
  void BeginAcrossMembers(const Slot& s) {
    parts_.clear();
    nodes_.clear();
    for (const auto& member : member_parts_) {
      parts_.push_back(0);
      for (const Node& node : member) {
        const auto begin = s.present.begin();
        if (std::none_of(begin + node.begin, begin + node.end, [](uint8_t p) { return p != 0; })) {
          continue;
        }
        nodes_.push_back(node);
        ++parts_.back();
      }
    }
    const Node root{0, placement_.leaves};
    root_ = MakeFoldSchedule(placement_.leaves, nodes_, absl::MakeConstSpan(&root, 1));
    // Whether it is the tree over as many leaves as there are parts.
    const int count = static_cast<int>(nodes_.size());
    std::vector<Node> leaves;
    for (int i = 0; i < count; ++i) leaves.push_back({i, i + 1});
    const Node all{0, count};
    const FoldSchedule plain = MakeFoldSchedule(count, leaves, absl::MakeConstSpan(&all, 1));
    const auto equal = [](const Combine& a, const Combine& b) {
      return a.dst == b.dst && a.src == b.src;
    };
    root_is_plain_ = count <= device::Device::kMostParts &&
                     std::equal(root_.combines.begin(), root_.combines.end(),
                                plain.combines.begin(), plain.combines.end(), equal);
    // Who has no leaves comes to no bucket on the way: then nobody exchanges any before the pass
    // has ended, so that all come to both of the communicator's lanes in one order.
    waits_ =
        std::any_of(placement_.bounds.begin(), placement_.bounds.end(), [&](const auto& slots) {
          const auto begin = s.present.begin();
          return std::none_of(begin + slots.front(), begin + slots.back(),
                              [](uint8_t p) { return p != 0; });
        });
    next_ = static_cast<int>(buckets_.size()) - 1;
    for (size_t b = 0; b < buckets_.size(); ++b) {
      left_[b] = (buckets_[b].end - buckets_[b].begin) * static_cast<int64_t>(s.leaves.size());
    }
  }

  // [begin, end) of `leaves` of the slot's leaves is complete. Members exchange buckets in one
  // order, that in which backward comes to them: the last first.
  void Complete(Slot& s, device::Stream& stream, int leaves, int64_t begin, int64_t end) {
    if (!overlaps_ || begin == end) return;
    size_t b = std::upper_bound(buckets_.begin(), buckets_.end(), begin,
                                [](int64_t at, const Bucket& one) { return at < one.end; }) -
               buckets_.begin();
    for (; b < buckets_.size() && buckets_[b].begin < end; ++b) {
      left_[b] -= leaves * (std::min(end, buckets_[b].end) - std::max(begin, buckets_[b].begin));
    }
    if (!waits_) ExchangeComplete(s, stream);
  }
  void ExchangeComplete(Slot& s, device::Stream& stream) {
    for (; next_ >= 0 && left_[next_] == 0; --next_) {
      device_.Follow(*side_, stream);
      beside_ = true;
      ExchangeBucket(s, *side_, buckets_[next_]);
    }
  }

  // From our leaves to everybody's sum, in the order of the stream.
  void ExchangeBucket(Slot& s, device::Stream& stream, const Bucket& bucket) {
    if (!placement_.exact) return SumBucket(s, stream, bucket);
    std::vector<const float*> mine;
    for (const Node& node : member_parts_[rank_]) {
      float* const offered = offered_[mine.size()];
      if (Sum(s, stream, node, bucket.begin, bucket.end, offered)) {
        mine.push_back(offered + bucket.begin);
      }
    }
    const int64_t count = bucket.end - bucket.begin;
    const int64_t chunk = ChunkBegin(count, members_, rank_);
    const int64_t length = ChunkBegin(count, members_, rank_ + 1) - chunk;
    const auto exchanged =
        communicator_->EnqueueExchange(&stream, Lane::kGradients, mine, parts_, count, &views_);
    if (!exchanged.ok()) return static_cast<void>(Fail(exchanged.status()));
    std::vector<const float*> chunks;
    for (const auto& member : views_) chunks.insert(chunks.end(), member.begin(), member.end());
    float* const out = gathered_ + bucket.begin + chunk;
    if (length > 0 && root_is_plain_) {
      device_.TreeSum(stream, length, chunks, out);
    } else if (length > 0) {
      for (const Combine& combine : root_.combines) {
        float* left = const_cast<float*>(chunks[combine.dst]);  // that nobody else reads any more
        device_.Add(stream, length, left, chunks[combine.src], left);
      }
      device_.Copy(stream, chunks[root_.target_buffer[0]], out,
                   sizeof(float) * static_cast<size_t>(length));
    }
    const auto gathered =
        communicator_->EnqueueGather(&stream, Lane::kGradients, gathered_ + bucket.begin, count);
    if (!gathered.ok()) static_cast<void>(Fail(gathered.status()));
  }

  // The same in the library's order.
  void SumBucket(Slot& s, device::Stream& stream, const Bucket& bucket) {
    float* const out = gathered_ + bucket.begin;
    const int64_t count = bucket.end - bucket.begin;
    std::vector<const float*> parts;
    bool any = false;
    for (int leaf = bounds_.front(); leaf < bounds_.back(); ++leaf) {
      if (s.present[leaf] != 0) parts.push_back(LeafVector(leaf) + bucket.begin);
      if (parts.empty() ||
          (leaf + 1 < bounds_.back() && parts.size() < device::Device::kMostParts)) {
        continue;
      }
      device_.TreeSum(stream, count, parts, out);
      any = true;
      parts = {out};  // before the next leaves
    }
    if (!any) device_.Zero(stream, out, sizeof(float) * static_cast<size_t>(count));
    const auto summed = communicator_->EnqueueLibrarySum(stream, Lane::kGradients, out, count);
    if (!summed.ok()) static_cast<void>(Fail(summed.status()));
  }

  absl::Status FinishOnDevice(Slot& s, device::Stream& stream) {
    for (; next_ >= 0; --next_) ExchangeBucket(s, stream, buckets_[next_]);
    RETURN_IF_ERROR(stream.Synchronize());
    return communicator_->Settle();
  }

  absl::Status FinishAcrossMembers(Slot& s, device::Stream& stream, absl::Time deadline) {
    std::vector<const float*> mine;
    const size_t bytes = sizeof(float) * static_cast<size_t>(size_);
    for (const Node& node : member_parts_[rank_]) {
      if (!Sum(s, stream, node, 0, size_, result_->floats())) continue;
      float* offered = offered_[mine.size()];
      device_.Copy(stream, result_->floats(), offered, bytes);
      mine.push_back(offered);
    }
    RETURN_IF_ERROR(stream.Synchronize());
    ASSIGN_OR_RETURN(
        const Ticket exchange,
        communicator_->EnqueueExchange(nullptr, Lane::kGradients, mine, parts_, size_, &views_));
    RETURN_IF_ERROR(communicator_->Wait(exchange, deadline));
    std::vector<float*> chunks;
    for (const auto& member : views_) {
      for (const float* view : member) {
        float* chunk = chunks_->floats() + static_cast<int64_t>(chunks.size()) * chunk_;
        device_.Copy(stream, view, chunk, sizeof(float) * static_cast<size_t>(chunk_));
        chunks.push_back(chunk);
      }
    }
    for (const Combine& combine : root_.combines) {
      device_.Add(stream, chunk_, chunks[combine.dst], chunks[combine.src], chunks[combine.dst]);
    }
    float* const whole = gathered_;
    device_.Copy(stream, chunks[root_.target_buffer[0]], whole + ChunkBegin(size_, members_, rank_),
                 sizeof(float) * static_cast<size_t>(chunk_));
    RETURN_IF_ERROR(stream.Synchronize());
    ASSIGN_OR_RETURN(const Ticket gather,
                     communicator_->EnqueueGather(nullptr, Lane::kGradients, whole, size_));
    RETURN_IF_ERROR(communicator_->Wait(gather, deadline));
    device_.Copy(stream, whole, result_->floats(), bytes);
    return stream.Synchronize();
  }

  device::Device& device_;
  const int64_t size_;
  const std::vector<Bucket> buckets_;
  const bool on_device_, overlaps_;
  std::vector<Slot> slots_;
  std::unique_ptr<device::Memory> leaves_, result_, chunks_;
  size_t most_parts_ = 0;
  int64_t chunk_ = 0;  // elements of ours
  std::vector<float*> offered_;
  float* gathered_ = nullptr;
  // Of the step, by slot 0.
  std::vector<int> parts_;   // of each member that are there
  std::vector<Node> nodes_;  // which
  FoldSchedule root_;
  bool root_is_plain_ = false;
  std::vector<std::vector<const float*>> views_;
  // Of exchanges beside the slot's computation.
  std::unique_ptr<device::Stream> side_;
  std::vector<int64_t> left_;  // by bucket: elements of leaves to come
  int next_ = -1;              // bucket to exchange; those above it are on their way
  bool beside_ = false;        // something is on `side_` that the slot's stream does not follow
  bool waits_ = false;         // buckets are exchanged at the end of the pass
};

}  // namespace

size_t DeviceAllReduceSharedBytes(const Placement& placement, int64_t size) {
  if (placement.bounds.size() < 2) return 0;
  size_t parts = 0;
  for (const std::vector<int>& bounds : placement.bounds) {
    parts =
        std::max(parts, MaximalSubtrees(placement.leaves, bounds.front(), bounds.back()).size());
  }
  return (parts + 1) * DeviceAllReduce::VectorBytes(size);
}

size_t DeviceAllReduceStagingBytes(const Placement& placement, int rank, int64_t size) {
  const int members = static_cast<int>(placement.bounds.size());
  int64_t parts = 0;
  for (int member = 0; member < members; ++member) {
    if (member == rank) continue;
    const std::vector<int>& bounds = placement.bounds[member];
    parts += std::ssize(MaximalSubtrees(placement.leaves, bounds.front(), bounds.back()));
  }
  // A chunk is a granule longer than the equal part, at most.
  const int64_t chunk = size / std::max(members, 1) + 32;
  return sizeof(float) * static_cast<size_t>(parts * chunk);
}

absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> MakeDeviceAllReduce(
    device::Device& device, Communicator* communicator, Team* team, const Placement& placement,
    int64_t size, std::vector<Bucket> buckets) {
  auto reduce = std::make_unique<DeviceAllReduce>(device, communicator, team, placement, size,
                                                  std::move(buckets));
  RETURN_IF_ERROR(reduce->Initialize());
  return reduce;
}

}  // namespace lockstep::collective
