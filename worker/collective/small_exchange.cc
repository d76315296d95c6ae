#include "worker/collective/small_exchange.h"

#include <string.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace lockstep::collective {
namespace {

constexpr absl::Duration kGrace = absl::Seconds(1);

}  // namespace

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

SmallExchange::SmallExchange(Communicator* communicator, Team* team, Placement placement)
    : communicator_(communicator),
      team_(team),
      placement_(std::move(placement)),
      members_(communicator == nullptr ? 1 : communicator->size()),
      rank_(communicator == nullptr ? 0 : communicator->rank()),
      bounds_(placement_.bounds[rank_]),
      slots_count_(static_cast<int>(bounds_.size()) - 1),
      stacks_(slots_count_),
      gathers_(slots_count_) {
  for (int slot = 0; slot < slots_count_; ++slot) {
    slot_parts_.push_back(MaximalSubtrees(placement_.leaves, bounds_[slot], bounds_[slot + 1]));
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
}

absl::Status SmallExchange::Fail(const absl::Status& failure) {
  absl::Status first;
  {
    absl::MutexLock lock(&failure_mutex_);
    if (failure_.ok()) failure_ = failure;
    first = failure_;
  }
  failed_.store(true, std::memory_order_release);
  if (team_ != nullptr) team_->Abort(first);
  if (communicator_ != nullptr) communicator_->Abort(first);
  return first;
}

absl::Status SmallExchange::Barrier(int slot, absl::Time deadline) {
  if (team_ == nullptr) return absl::OkStatus();
  const absl::Status status = team_->Barrier(slot, deadline);
  return status.ok() ? status : Fail(status);
}

absl::Status SmallExchange::BarrierAfterMembers(int slot, absl::Time deadline) {
  // Slot 0 is to be the one that reports, since it can name the member that is missing.
  return Barrier(slot, members_ > 1 && slot != 0 ? deadline + kGrace : deadline);
}

absl::Status SmallExchange::failure() const {
  if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
  absl::MutexLock lock(&failure_mutex_);
  return failure_;
}

std::byte* SmallExchange::SmallValues::FoldNode(Node node, size_t first, size_t last,
                                                const CanonicalAllReduce::Fold& fold) const {
  if (first == last) return nullptr;
  if (last - first == 1) return values[first];
  const int split = SplitPoint(node);
  size_t middle = first;
  while (middle < last && nodes[middle].begin < split) ++middle;
  std::byte* left = FoldNode({node.begin, split}, first, middle, fold);
  std::byte* right = FoldNode({split, node.end}, middle, last, fold);
  if (left == nullptr) return right;
  if (right != nullptr) fold(left, right);
  return left;
}

std::byte* SmallExchange::FoldRecord(std::vector<Line>& stack, int begin, Node node,
                                     absl::Span<const void* const> records, size_t bytes,
                                     const CanonicalAllReduce::Fold& fold, size_t top) {
  if (node.end - node.begin == 1) {
    const void* record = records[node.begin - begin];
    if (record == nullptr) return nullptr;
    std::byte* copy = stack[top * (RoundUp(bytes) / kLine)].bytes;
    memcpy(copy, record, bytes);
    return copy;
  }
  const int split = SplitPoint(node);
  std::byte* left = FoldRecord(stack, begin, {node.begin, split}, records, bytes, fold, top);
  std::byte* right = FoldRecord(stack, begin, {split, node.end}, records, bytes, fold,
                                left == nullptr ? top : top + 1);
  if (left == nullptr) return right;
  if (right != nullptr) fold(left, right);
  return left;
}

absl::StatusOr<const void*> SmallExchange::MergeSmall(int slot,
                                                      absl::Span<const void* const> records,
                                                      size_t bytes,
                                                      const CanonicalAllReduce::Fold& fold,
                                                      absl::Time deadline) {
  std::vector<Line>& stack = stacks_[slot];
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
  if (stack.size() < (parts.size() + depth + 1) * stride / kLine) {
    stack.resize((parts.size() + depth + 1) * stride / kLine);
  }
  size_t top = 0, first_value = 0;
  for (int other = 0; other < slot; ++other) first_value += slot_parts_[other].size();
  for (size_t part = 0; part < parts.size(); ++part) {
    std::byte* value = FoldRecord(stack, begin, parts[part], records, bytes, fold, top);
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
absl::Status SmallExchange::MergeMembers(size_t bytes, const CanonicalAllReduce::Fold& fold,
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
    const std::byte* value = slot_values_.FoldNode(node, first, last, fold);
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
      root_values_.FoldNode({0, placement_.leaves}, 0, root_values_.nodes.size(), fold);
  small_present_ = root != nullptr;
  if (small_present_) memcpy(small_result_.data(), root, bytes);
  return absl::OkStatus();
}

absl::StatusOr<const void*> SmallExchange::AllGather(int slot, const void* mine, size_t bytes,
                                                     absl::Time deadline) {
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

}  // namespace lockstep::collective
