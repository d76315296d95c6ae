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
                  Placement placement, int64_t size)
      : SmallExchange(communicator, team, std::move(placement)),
        device_(device),
        size_(size),
        slots_(slots_count_) {}

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
    size_t parts = 0;
    for (const auto& member : member_parts_) parts += member.size();
    chunk_ = ChunkBegin(size_, members_, rank_ + 1) - ChunkBegin(size_, members_, rank_);
    ASSIGN_OR_RETURN(chunks_, device_.Allocate(sizeof(float) * std::max<int64_t>(chunk_, 1) *
                                               std::max<size_t>(parts, 1)));
    return absl::OkStatus();
  }

  absl::Status Begin(int slot, absl::Span<const uint8_t> present, absl::Time) override {
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
    return absl::OkStatus();
  }

  float* Leaf(int, int leaf) override { return LeafVector(leaf); }
  void Done(int, device::Stream&, int, int64_t, int64_t) override {}
  // Nothing is folded on the way: each leaf is a part.
  const device::LeafFold* LeafFold(int slot) override {
    const device::LeafFold& fold = slots_[slot].fold;
    const bool fits = fold.leaves > 0 && fold.leaves <= device::kMostFoldBuffers;
    return fits && placement_.interleaved == 1 ? &fold : nullptr;
  }
  float* Part(int slot, int part) override { return LeafVector(slots_[slot].leaves[part]); }
  void DoneFolded(int, device::Stream&, int64_t, int64_t) override {}
  bool LeavesStay() const override { return true; }

  absl::Status Finish(int slot, device::Stream& stream, absl::Time deadline) override {
    Slot& s = slots_[slot];
    const bool alone = members_ == 1 && slots_count_ == 1;
    // Other streams' leaves are there only when those have run.
    if (!alone) RETURN_IF_ERROR(stream.Synchronize());
    RETURN_IF_ERROR(Barrier(slot, deadline));
    if (members_ == 1) {
      Sum(s, stream, {0, placement_.leaves}, ChunkBegin(size_, slots_count_, slot),
          ChunkBegin(size_, slots_count_, slot + 1), result_->floats());
      if (alone) return absl::OkStatus();
      RETURN_IF_ERROR(stream.Synchronize());
      return Barrier(slot, deadline);
    }
    if (slot == 0) {
      const absl::Status status = FinishAcrossMembers(s, stream, deadline);
      if (!status.ok()) return Fail(status);
    }
    return BarrierAfterMembers(slot, deadline);
  }
  const float* result() const override { return result_->floats(); }

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

  // out[begin, end) = the tree over `node`, whose leaves are ours. False: none is present.
  bool Sum(Slot& s, device::Stream& stream, Node node, int64_t begin, int64_t end, float* out) {
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
    if (s.parts.empty()) return false;
    if (begin == end) return true;
    // Leaves that are absent at the end leave the tree over the others as it is.
    if (!gaps && s.parts.size() <= device::Device::kMostParts) {
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
    std::vector<int> parts;
    std::vector<Node> nodes;
    for (const auto& member : member_parts_) {
      parts.push_back(0);
      for (const Node& node : member) {
        const auto begin = s.present.begin();
        if (std::none_of(begin + node.begin, begin + node.end, [](uint8_t p) { return p != 0; })) {
          continue;
        }
        nodes.push_back(node);
        ++parts.back();
      }
    }
    std::vector<std::vector<const float*>> views;
    ASSIGN_OR_RETURN(
        const Ticket exchange,
        communicator_->EnqueueExchange(nullptr, Lane::kGradients, mine, parts, size_, &views));
    RETURN_IF_ERROR(communicator_->Wait(exchange, deadline));
    std::vector<float*> chunks;
    for (const auto& member : views) {
      for (const float* view : member) {
        float* chunk = chunks_->floats() + static_cast<int64_t>(chunks.size()) * chunk_;
        device_.Copy(stream, view, chunk, sizeof(float) * static_cast<size_t>(chunk_));
        chunks.push_back(chunk);
      }
    }
    const Node root{0, placement_.leaves};
    const FoldSchedule schedule =
        MakeFoldSchedule(placement_.leaves, nodes, absl::MakeConstSpan(&root, 1));
    for (const Combine& combine : schedule.combines) {
      device_.Add(stream, chunk_, chunks[combine.dst], chunks[combine.src], chunks[combine.dst]);
    }
    float* const whole = gathered_;
    device_.Copy(stream, chunks[schedule.target_buffer[0]],
                 whole + ChunkBegin(size_, members_, rank_),
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
  std::vector<Slot> slots_;
  std::unique_ptr<device::Memory> leaves_, result_, chunks_;
  size_t most_parts_ = 0;
  int64_t chunk_ = 0;  // elements of ours
  std::vector<float*> offered_;
  float* gathered_ = nullptr;
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

absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> MakeDeviceAllReduce(device::Device& device,
                                                                        Communicator* communicator,
                                                                        Team* team,
                                                                        const Placement& placement,
                                                                        int64_t size) {
  auto reduce = std::make_unique<DeviceAllReduce>(device, communicator, team, placement, size);
  RETURN_IF_ERROR(reduce->Initialize());
  return reduce;
}

}  // namespace lockstep::collective
