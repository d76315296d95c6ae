// Where each value of a Lowering lies in an arena: values whose lifetimes do not meet share memory,
// an elementwise call writes over an input that dies there. Internal to worker/nn. Pure;
// thread-safe.
//
// Invariants:
//  1. Two values overlap only if one is dead before the other is written, or a chain of in-place
//  calls
//     leads from one to the other.
//  2. Offsets are multiples of kArenaAlignment.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/nn/lowering.h"

namespace lockstep::nn {

constexpr int64_t kArenaAlignment = 256;  // what CUDA's allocator gives; at least a cache line

struct MemoryPlan {
  std::vector<int64_t> offsets;  // bytes, by value
  int64_t bytes = 0;             // of one arena
};

// For shards of at most `rows` samples. Greedy by size (Pisarchyk & Lee 2020, "Efficient memory
// management for deep neural net inference", section 5.2).
MemoryPlan PlanMemory(const Lowering& lowering, int64_t rows);

}  // namespace lockstep::nn
