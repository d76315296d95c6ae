#include "worker/nn/memory_plan.h"

#include <algorithm>

namespace lockstep::nn {
namespace {

// Values that in-place calls chain together, alive from the first call to the last, both included.
struct Block {
  int64_t bytes = 0;  // of one sample
  int begin = 0, end = 0;
  bool of_slot = false;
  int64_t offset = 0;
};

// Gives the blocks that are of a slot, or those that are not, offsets from `base` on, and returns
// where they end.
int64_t Place(bool of_slot, int64_t base, std::vector<Block>* blocks) {
  std::vector<int> order;
  for (size_t i = 0; i < blocks->size(); ++i) {
    if ((*blocks)[i].of_slot == of_slot) order.push_back(static_cast<int>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return (*blocks)[a].bytes > (*blocks)[b].bytes; });
  int64_t end = base;
  std::vector<const Block*> placed;  // by offset
  for (const int index : order) {
    Block& block = (*blocks)[index];
    int64_t offset = base;
    for (const Block* other : placed) {
      const bool meet = other->begin <= block.end && block.begin <= other->end;
      if (!meet) continue;
      if (offset + block.bytes <= other->offset) break;  // fits into the hole before it
      offset = std::max(offset, other->offset + other->bytes);
    }
    block.offset = offset;
    end = std::max(end, offset + block.bytes);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), &block,
                         [](const Block* a, const Block* b) { return a->offset < b->offset; }),
        &block);
  }
  return end;
}

}  // namespace

MemoryPlan PlanMemory(const Lowering& lowering, int64_t shard_rows, int64_t slot_rows) {
  const size_t values = lowering.value_bytes.size();
  const int calls = static_cast<int>(lowering.calls.size());
  // Of calls in their order, and of those that may run beside them: until they are waited for.
  std::vector<int> last_use(values, -1), beside_until(values, -1);
  for (int i = 0; i < calls; ++i) {
    const Call& call = lowering.calls[i];
    for (const int value : {call.a, call.b, call.c, call.d, call.out, call.out2}) {
      if (value >= 0) last_use[value] = std::max(last_use[value], i + (call.then_norm ? 1 : 0));
    }
  }

  if (lowering.weights_beside) {
    int next = calls - 1;
    for (int i = calls - 1; i >= 0; --i) {
      const Call& call = lowering.calls[i];
      if (call.type != CallType::kLinearBackwardWeight) continue;
      for (const int value : {call.a, call.b}) {
        if (value >= 0) beside_until[value] = std::max(beside_until[value], next);
      }
      next = i;
    }
  }

  std::vector<Block> blocks;
  std::vector<int> block_of(values, -1);
  for (int i = 0; i < calls; ++i) {
    const Call& call = lowering.calls[i];
    for (const int out : {call.out, call.out2}) {
      if (out < 0) continue;
      for (const int in : {call.a, call.b, call.c, call.d}) {
        if (IsElementwise(call.type) && in >= 0 && last_use[in] == i && beside_until[in] < i &&
            lowering.value_bytes[in] == lowering.value_bytes[out]) {
          block_of[out] = block_of[in];
          break;
        }
      }
      if (block_of[out] < 0) {
        block_of[out] = static_cast<int>(blocks.size());
        blocks.push_back({lowering.value_bytes[out], i});
      }
      Block& block = blocks[block_of[out]];
      block.end = std::max({block.end, last_use[out], beside_until[out]});
    }
  }

  for (Block& block : blocks) {
    const auto segment_of = [&](int call) {
      return *std::find_if(lowering.segments.begin(), lowering.segments.end(),
                           [&](const Segment& segment) { return call < segment.end; });
    };
    const Segment first = segment_of(block.begin), last = segment_of(block.end);
    block.of_slot = first.layerwise || last.layerwise || first.begin != last.begin;
    if (block.of_slot && !first.layerwise) block.begin = first.begin;
    if (block.of_slot && !last.layerwise) block.end = last.end - 1;
    const int64_t bytes = block.bytes * (block.of_slot ? slot_rows : shard_rows);
    block.bytes = (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
  }
  MemoryPlan plan;
  plan.bytes = Place(false, Place(true, 0, &blocks), &blocks);
  for (size_t value = 0; value < values; ++value) {
    const Block* block = block_of[value] < 0 ? nullptr : &blocks[block_of[value]];
    plan.offsets.push_back(block == nullptr ? 0 : block->offset);
    plan.of_slot.push_back(block != nullptr && block->of_slot ? 1 : 0);
  }
  return plan;
}

}  // namespace lockstep::nn
