#include "worker/collective/tree.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>

namespace lockstep::collective {
namespace {

// The definition, on strings; empty: absent.
std::string Definition(int begin, int end, const std::vector<uint8_t>& present) {
  if (end - begin == 1) return present[begin] ? std::to_string(begin) : "";
  int half = 1;
  while (2 * half < end - begin) half *= 2;
  const std::string left = Definition(begin, begin + half, present);
  const std::string right = Definition(begin + half, end, present);
  if (left.empty() || right.empty()) return left + right;
  return "(" + left + "+" + right + ")";
}

bool IsNode(Node node, int begin, int end) {
  if (node.begin == begin && node.end == end) return true;
  if (end - begin == 1) return false;
  int half = 1;
  while (2 * half < end - begin) half *= 2;
  return node.end <= begin + half ? IsNode(node, begin, begin + half)
                                  : IsNode(node, begin + half, end);
}

void Apply(const Combine& combine, std::vector<std::string>* buffers) {
  auto& b = *buffers;
  ASSERT_FALSE(b[combine.dst].empty());
  ASSERT_FALSE(b[combine.src].empty());
  b[combine.dst] = "(" + b[combine.dst] + "+" + b[combine.src] + ")";
  b[combine.src].clear();
}

std::vector<uint8_t> RandomPresence(int leaves, std::mt19937* random) {
  std::vector<uint8_t> present(leaves);
  const unsigned density = (*random)() % 4;
  for (uint8_t& p : present) p = density == 3 || (*random)() % 4 <= density;
  return present;
}

TEST(Tree, IsThatOfTheDefinition) {
  EXPECT_EQ(Definition(0, 7, std::vector<uint8_t>(7, 1)), "(((0+1)+(2+3))+((4+5)+6))");
}

TEST(Tree, MaximalSubtreesCoverEveryRangeWithTheFewestNodes) {
  for (int n = 1; n <= 70; ++n) {
    for (int begin = 0; begin <= n; ++begin) {
      for (int end = begin; end <= n; ++end) {
        const std::vector<Node> parts = MaximalSubtrees(n, begin, end);
        int next = begin;
        for (size_t i = 0; i < parts.size(); ++i) {
          ASSERT_EQ(parts[i].begin, next);
          next = parts[i].end;
          ASSERT_TRUE(IsNode(parts[i], 0, n)) << n << " " << begin << " " << end;
          // Neighbours that formed a node together would be one.
          ASSERT_FALSE(i > 0 && IsNode({parts[i - 1].begin, parts[i].end}, 0, n));
        }
        ASSERT_EQ(next, end);
      }
    }
  }
}

// Plays the schedule in the order of writing.
void ExpectCanonical(int n, int begin, int end, const std::vector<uint8_t>& present,
                     int interleaved) {
  const StackSchedule schedule = MakeStackSchedule(n, begin, end, present, interleaved);
  const std::vector<Node> parts = MaximalSubtrees(n, begin, end);
  std::vector<std::string> buffers(schedule.buffers);
  ASSERT_EQ(schedule.leaves.size(), static_cast<size_t>(end - begin));
  for (const int leaf : WriteOrder(begin, end, interleaved)) {
    const StackSchedule::Leaf& step = schedule.leaves[leaf - begin];
    ASSERT_EQ(step.buffer >= 0, present[leaf] != 0);
    if (step.buffer < 0) {
      ASSERT_TRUE(step.combines.empty());
      continue;
    }
    ASSERT_TRUE(buffers[step.buffer].empty()) << "overwrites a value that is needed";
    buffers[step.buffer] = std::to_string(leaf);
    for (const Combine& combine : step.combines) Apply(combine, &buffers);
  }
  ASSERT_EQ(schedule.part_buffer.size(), parts.size());
  for (size_t part = 0; part < parts.size(); ++part) {
    const std::string expected = Definition(parts[part].begin, parts[part].end, present);
    const int buffer = schedule.part_buffer[part];
    ASSERT_EQ(buffer < 0 ? "" : buffers[buffer], expected);
  }
}

TEST(Tree, StackScheduleFoldsEveryRangeInCanonicalOrder) {
  std::mt19937 random(7);
  for (int n = 1; n <= 70; ++n) {
    for (int begin = 0; begin < n; ++begin) {
      for (int end = begin; end <= n; ++end) {
        ExpectCanonical(n, begin, end, RandomPresence(n, &random), 1);
        if (HasFatalFailure()) FAIL() << n << " " << begin << " " << end;
      }
    }
  }
}

TEST(Tree, AnInterleavedScheduleFoldsToTheSame) {
  std::mt19937 random(13);
  for (const int interleaved : {2, 3, 4, 7}) {
    for (int groups = 1; groups <= 9; ++groups) {
      const int n = groups * interleaved;
      for (int begin = 0; begin < groups; ++begin) {
        for (int end = begin; end <= groups; ++end) {
          const std::vector<uint8_t> present = RandomPresence(n, &random), all(n, 1);
          ExpectCanonical(n, begin * interleaved, end * interleaved, present, interleaved);
          if (HasFatalFailure()) FAIL() << interleaved << " " << n << " " << begin << " " << end;
          // Absent leaves never need more.
          const auto buffers = [&](const std::vector<uint8_t>& leaves) {
            return MakeStackSchedule(n, begin * interleaved, end * interleaved, leaves, interleaved)
                .buffers;
          };
          ASSERT_LE(buffers(present), buffers(all));
        }
      }
    }
  }
}

TEST(Tree, WritesTheFirstOfEveryGroupBeforeTheSecondOfAny) {
  EXPECT_EQ(WriteOrder(3, 7, 1), (std::vector<int>{3, 4, 5, 6}));
  EXPECT_EQ(WriteOrder(3, 9, 3), (std::vector<int>{3, 6, 4, 7, 5, 8}));
  EXPECT_TRUE(WriteOrder(4, 4, 2).empty());
}

TEST(Tree, StackSchedulesUseAsFewBuffersAsABinaryCounter) {
  for (int n = 1; n <= 70; ++n) {
    const std::vector<uint8_t> all(n, 1);
    for (int begin = 0; begin < n; ++begin) {
      for (int end = begin + 1; end <= n; ++end) {
        const int buffers = MakeStackSchedule(n, begin, end, all).buffers;
        const int length = end - begin;
        const int log = static_cast<int>(std::ceil(std::log2(length)));
        const bool aligned = begin % (1 << log) == 0;
        ASSERT_LE(buffers, aligned ? log + 1 : 2 * log + 1) << n << " " << begin << " " << end;
        // Absent leaves never need more.
        std::mt19937 random(n * 70 + begin);
        const std::vector<uint8_t> some = RandomPresence(n, &random);
        ASSERT_LE(MakeStackSchedule(n, begin, end, some).buffers, buffers);
      }
    }
  }
}

TEST(Tree, FoldScheduleFinishesWhatAnyPlacementOffers) {
  std::mt19937 random(11);
  for (int n = 1; n <= 70; ++n) {
    for (int repeat = 0; repeat < 40; ++repeat) {
      const std::vector<uint8_t> present = RandomPresence(n, &random);
      // A random placement; and a coarser one as targets, as slots are to members.
      std::vector<Node> parts, targets;
      for (int begin = 0; begin < n;) {
        const int end = begin + 1 + static_cast<int>(random() % (n - begin));
        for (const Node& target : MaximalSubtrees(n, begin, end)) targets.push_back(target);
        for (int from = begin; from < end;) {
          const int to = from + 1 + static_cast<int>(random() % (end - from));
          for (const Node& part : MaximalSubtrees(n, from, to)) {
            if (!Definition(part.begin, part.end, present).empty()) parts.push_back(part);
          }
          from = to;
        }
        begin = end;
      }
      if (repeat % 2 == 0) targets = {{0, n}};
      const FoldSchedule schedule = MakeFoldSchedule(n, parts, targets);
      std::vector<std::string> buffers;
      for (const Node& part : parts) buffers.push_back(Definition(part.begin, part.end, present));
      for (const Combine& combine : schedule.combines) Apply(combine, &buffers);
      ASSERT_EQ(schedule.target_buffer.size(), targets.size());
      for (size_t i = 0; i < targets.size(); ++i) {
        const int buffer = schedule.target_buffer[i];
        ASSERT_EQ(buffer < 0 ? "" : buffers[buffer],
                  Definition(targets[i].begin, targets[i].end, present));
      }
    }
  }
}

}  // namespace
}  // namespace lockstep::collective
