// The canonical tree over leaves 0..n-1: a tree over n > 1 leaves splits at the largest power of
// two below n. All reductions of a job combine their leaves in this order and no other, so a result
// does not depend on who held which leaf. An absent leaf (an empty shard) has no value and its
// sibling passes unchanged. Pure functions; thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace lockstep::collective {

// The subtree over leaves [begin, end).
struct Node {
  int begin = 0, end = 0;
  friend bool operator==(const Node&, const Node&) = default;
};

// Where a subtree of at least two leaves splits.
int SplitPoint(Node node);

// The fewest subtrees of the tree over `leaves` that cover exactly [begin, end), left to right.
std::vector<Node> MaximalSubtrees(int leaves, int begin, int end);

// buffer[dst] = buffer[dst] + buffer[src]; dst holds the left operand and src is free afterwards.
struct Combine {
  int dst = 0, src = 0;
};

// The order in which the owner of leaves [begin, end) writes them: ascending; or, where groups of
// `interleaved` adjoining leaves are written side by side (the microbatches of several shards), the
// first leaf of every group before the second of any: by leaf % interleaved, then ascending.
std::vector<int> WriteOrder(int begin, int end, int interleaved);

// How the owner of leaves [begin, end) folds them, in the order in which it writes them, with as
// few buffers as whole vectors allow: one for each finished subtree that waits for its sibling, as
// in a binary counter. In ascending order at most ceil(log2 n) + 1 of n leaves where `begin` is a
// multiple of the next power of two (as for slots that own equal powers of two), at most 2
// ceil(log2 n) + 1 for any range; interleaved, that many for each group.
struct StackSchedule {
  struct Leaf {
    int buffer = -1;                // where leaf begin + i is written; -1: absent
    std::vector<Combine> combines;  // to do once it is written
  };
  int buffers = 0;
  std::vector<Leaf> leaves;  // of [begin, end)
  std::vector<int>
      part_buffer;  // for each MaximalSubtrees(leaves, begin, end): where it ends up; -1: absent
};
// present[i] != 0: leaf i of 0..leaves-1 exists. `interleaved` as in WriteOrder.
StackSchedule MakeStackSchedule(int leaves, int begin, int end, absl::Span<const uint8_t> present,
                                int interleaved = 1);

// Folds values that stand for `parts` (disjoint subtrees, left to right, absent ones already left
// out) up to the subtrees `targets`; part i is buffer i. Each target's value ends in target_buffer
// (-1: absent).
struct FoldSchedule {
  std::vector<Combine> combines;
  std::vector<int> target_buffer;
};
FoldSchedule MakeFoldSchedule(int leaves, absl::Span<const Node> parts,
                              absl::Span<const Node> targets);

}  // namespace lockstep::collective
