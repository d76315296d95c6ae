// Which slots a job gets and which shards each of them runs: a pure function of what is free.
//
// Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::server {

struct FreeSlots {
  std::string worker;
  std::vector<int> slots;  // numbers of the worker's free slots, ascending
};

// One member of a job. Invariant: slots is ascending, bounds has one element more, and slot
// slots[i] runs the shards [bounds[i], bounds[i + 1]).
struct MemberPlacement {
  std::string worker;
  std::vector<int> slots;
  std::vector<int32_t> bounds;
};

// Places `slots` slots (1 <= slots <= shards): workers with the most free slots are filled first,
// of equal ones the first by name. Members are in rank order, which is shard order: slot i of n has
// the shards [floor(i * shards / n), floor((i + 1) * shards / n)), so every shard is run exactly
// once. Empty where fewer slots are free.
std::vector<MemberPlacement> Place(std::vector<FreeSlots> free, int slots, int shards);

// Slot numbers for people: "slot 2", "slots 0-3", "slots 0,2-3".
std::string DescribeSlots(const std::vector<int>& slots);

}  // namespace lockstep::server
