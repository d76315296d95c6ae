#include "server/core/placement.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "server/core/reason.h"

namespace lockstep::server {
namespace {

TEST(PlacementTest, ASlotOfNHasTheShardsBetweenItsTwoFloors) {
  for (int shards = 1; shards <= 17; ++shards) {
    for (int slots = 1; slots <= shards; ++slots) {
      const auto members =
          Place({{"a", {0, 1, 2, 3, 4, 5}}, {"b", {0, 1, 2, 3, 4, 5}}, {"c", {0, 1, 2, 3, 4, 5}}},
                slots, shards);
      int slot = 0;
      for (const MemberPlacement& member : members) {
        ASSERT_EQ(member.bounds.size(), member.slots.size() + 1);
        for (size_t i = 0; i < member.slots.size(); ++i, ++slot) {
          EXPECT_EQ(member.bounds[i], slot * shards / slots);
          EXPECT_EQ(member.bounds[i + 1], (slot + 1) * shards / slots);
          EXPECT_LT(member.bounds[i], member.bounds[i + 1]);
        }
      }
      EXPECT_EQ(slot, slots);
    }
  }
}

TEST(PlacementTest, FillsTheWorkersWithMostFreeSlotsFirstAndEqualOnesByName) {
  const auto members = Place({{"c", {1}}, {"b", {0, 3, 4}}, {"a", {2, 5, 6}}}, 5, 8);
  ASSERT_EQ(members.size(), 2u);
  EXPECT_EQ(members[0].worker, "a");
  EXPECT_EQ(members[0].slots, (std::vector<int>{2, 5, 6}));
  EXPECT_EQ(members[0].bounds, (std::vector<int32_t>{0, 1, 3, 4}));
  EXPECT_EQ(members[1].worker, "b");
  EXPECT_EQ(members[1].slots, (std::vector<int>{0, 3}));
  EXPECT_EQ(members[1].bounds, (std::vector<int32_t>{4, 6, 8}));
}

TEST(PlacementTest, IsEmptyWhereTooFewSlotsAreFree) {
  EXPECT_TRUE(Place({{"a", {0, 1}}, {"b", {}}}, 3, 8).empty());
  EXPECT_TRUE(Place({}, 1, 8).empty());
}

TEST(PlacementTest, SlotsAreDescribedAsRanges) {
  EXPECT_EQ(DescribeSlots({2}), "slot 2");
  EXPECT_EQ(DescribeSlots({0, 1, 2, 3}), "slots 0-3");
  EXPECT_EQ(DescribeSlots({0, 2, 3, 7}), "slots 0,2-3,7");
}

TEST(ReasonTest, NamesWorkerSlotsStepAndCause) {
  const MemberPlacement member{"w1", {2, 3}, {4, 6, 8}};
  EXPECT_EQ(WorkerLost(member, true, 117, "connection closed"),
            "worker w1 (slots 2-3) lost at step 117: connection closed");
  EXPECT_EQ(WorkerLost(member, false, 0, "connection closed"),
            "worker w1 (slots 2-3) lost while starting: connection closed");
  EXPECT_EQ(WorkerFailed(member, true, 117, "out of memory"),
            "worker w1 (slots 2-3) failed at step 117: out of memory");
}

TEST(ReasonTest, KeepsTheSlotAndStepThatTheErrorNames) {
  const MemberPlacement member{"w1", {2, 3}, {4, 6, 8}};
  EXPECT_EQ(WorkerFailed(member, true, 117, "slot 3, step 118: loss is nan"),
            "worker w1 failed: slot 3, step 118: loss is nan");
  EXPECT_EQ(WorkerFailed(member, true, 117, "no slots left, in one step"),
            "worker w1 (slots 2-3) failed at step 117: no slots left, in one step");
  EXPECT_EQ(WorkerFailed(member, true, 117, "step 9 of slots"),
            "worker w1 (slots 2-3) failed: step 9 of slots");
}

TEST(ReasonTest, IsOneLineWhateverTheWorkerSays) {
  EXPECT_EQ(OneLine("a\nb\r\tc"), "a b  c");
  EXPECT_EQ(OneLine(std::string(5000, 'x')).size(), 1003u);
}

}  // namespace
}  // namespace lockstep::server
