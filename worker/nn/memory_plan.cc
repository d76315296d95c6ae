#include "worker/nn/memory_plan.h"

#include <algorithm>
#include <numeric>

namespace lockstep::nn {
namespace {

// Values that in-place calls chain together, alive from the first call to the last, both included.
struct Block {
  int64_t bytes = 0;
  int begin = 0, end = 0;
  int64_t offset = 0;
};

}  // namespace

MemoryPlan PlanMemory(const Lowering& lowering, int64_t rows) {
  const size_t values = lowering.value_bytes.size();
  const int calls = static_cast<int>(lowering.calls.size());
  std::vector<int> last_use(values, -1);
  for (int i = 0; i < calls; ++i) {
    const Call& call = lowering.calls[i];
    for (const int value : {call.a, call.b, call.c, call.d, call.out, call.out2}) {
      if (value >= 0) last_use[value] = i;
    }
  }

  std::vector<Block> blocks;
  std::vector<int> block_of(values, -1);
  for (int i = 0; i < calls; ++i) {
    const Call& call = lowering.calls[i];
    for (const int out : {call.out, call.out2}) {
      if (out < 0) continue;
      for (const int in : {call.a, call.b, call.c, call.d}) {
        if (IsElementwise(call.type) && in >= 0 && last_use[in] == i) {
          block_of[out] = block_of[in];
          break;
        }
      }
      if (block_of[out] < 0) {
        block_of[out] = static_cast<int>(blocks.size());
        const int64_t bytes = lowering.value_bytes[out] * rows;
        blocks.push_back({(bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment, i});
      }
      Block& block = blocks[block_of[out]];
      block.end = std::max(block.end, last_use[out]);
    }
  }

  std::vector<int> order(blocks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return blocks[a].bytes > blocks[b].bytes; });
  MemoryPlan plan;
  std::vector<const Block*> placed;  // by offset
  for (const int index : order) {
    Block& block = blocks[index];
    int64_t offset = 0;
    for (const Block* other : placed) {
      const bool meet = other->begin <= block.end && block.begin <= other->end;
      if (!meet) continue;
      if (offset + block.bytes <= other->offset) break;  // fits into the hole before it
      offset = std::max(offset, other->offset + other->bytes);
    }
    block.offset = offset;
    plan.bytes = std::max(plan.bytes, offset + block.bytes);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), &block,
                         [](const Block* a, const Block* b) { return a->offset < b->offset; }),
        &block);
  }
  for (size_t value = 0; value < values; ++value) {
    plan.offsets.push_back(block_of[value] < 0 ? 0 : blocks[block_of[value]].offset);
  }
  return plan;
}

}  // namespace lockstep::nn
