// Where each value of a Lowering lies in an arena: values whose lifetimes do not meet share memory,
// an elementwise call writes over an input that dies there. Internal to worker/nn. Pure;
// thread-safe.
//
// Shards walk through a segment one after another (or layer by layer, lowering.h), so what lives
// within such a segment is needed for one shard at a time and all shards take turns in it; what
// lives longer has its rows of all the slot's shards together, from the begin of the segment that
// writes it to the end of the last that reads it.
//
// Invariants:
//  1. Two values overlap only if one is dead before the other is written, or a chain of in-place
//     calls leads from one to the other. What a call reads that may run beside those behind it
//     (lowering.h) lives as long as it may run.
//  2. Offsets are multiples of kArenaAlignment.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/nn/lowering.h"

namespace lockstep::nn {

constexpr int64_t kArenaAlignment = 256;  // what CUDA's allocator gives; at least a cache line

struct MemoryPlan {
  std::vector<int64_t> offsets;  // bytes, by value
  std::vector<uint8_t> of_slot;  // by value: 1 where it holds all shards' rows together
  int64_t bytes = 0;             // of the arena
};

// For shards of at most `shard_rows` samples, `slot_rows` together. Greedy by size (Pisarchyk & Lee
// 2020, "Efficient memory management for deep neural net inference", section 5.2).
MemoryPlan PlanMemory(const Lowering& lowering, int64_t shard_rows, int64_t slot_rows);

}  // namespace lockstep::nn
