#include "tests/simulation/simulation.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "server/core/planted_bugs.h"

namespace lockstep::server {
namespace {

constexpr uint64_t kSeeds = 1200;
constexpr int kActions = 2000;

void Add(const Outcome& one, Outcome* sum) {
  sum->events += one.events;
  for (size_t from = 0; from < one.transitions.job.size(); ++from) {
    for (size_t to = 0; to < one.transitions.job.size(); ++to) {
      sum->transitions.job[from][to] += one.transitions.job[from][to];
    }
  }
  for (int from = 0; from < kWorkerStates; ++from) {
    for (int to = 0; to < kWorkerStates; ++to) {
      sum->transitions.worker[from][to] += one.transitions.worker[from][to];
    }
  }
  for (const auto& [what, count] : one.happenings) sum->happenings[what] += count;
}

TEST(SimulationTest, InvariantsHoldThroughEveryFault) {
  Outcome sum;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Outcome outcome = Simulate(seed, kActions);
    ASSERT_EQ(outcome.violation, "") << "seed " << seed << ", after event " << outcome.events;
    Add(outcome, &sum);
  }
  std::printf("%lld events over %llu seeds\n", static_cast<long long>(sum.events),
              static_cast<unsigned long long>(kSeeds));
  for (const auto& [what, count] : sum.happenings) {
    std::printf("%9lld %s\n", static_cast<long long>(count), what.c_str());
    EXPECT_GT(count, 0);
  }
  std::printf("transitions of jobs:\n");
  for (const auto& [from, to] : kJobEdges) {
    std::printf("%9lld %s -> %s\n", static_cast<long long>(sum.transitions.job[from][to]),
                Name(from).c_str(), Name(to).c_str());
    EXPECT_GT(sum.transitions.job[from][to], 0) << Name(from) << " -> " << Name(to);
  }
  std::printf("transitions of workers:\n");
  for (const auto& [from, to] : kWorkerEdges) {
    const int64_t count = sum.transitions.worker[static_cast<int>(from)][static_cast<int>(to)];
    std::printf("%9lld %s -> %s\n", static_cast<long long>(count), Name(from), Name(to));
    EXPECT_GT(count, 0) << Name(from) << " -> " << Name(to);
  }
  EXPECT_GE(sum.events, 200'000);
}

TEST(SimulationTest, TheSameSeedGivesTheSameEvents) {
  const Outcome a = Simulate(7, kActions);
  const Outcome b = Simulate(7, kActions);
  EXPECT_EQ(a.events, b.events);
  EXPECT_EQ(a.transitions.job, b.transitions.job);
  EXPECT_EQ(a.happenings, b.happenings);
}

struct BugCase {
  PlantedBug bug;
  const char* name;
  const char* invariant;  // a violation of it begins with one of these words, "|" between them
};

class PlantedBugTest : public testing::TestWithParam<BugCase> {
 protected:
  void SetUp() override { planted_bug = GetParam().bug; }
  void TearDown() override { planted_bug = PlantedBug::kNone; }
};

TEST_P(PlantedBugTest, IsFound) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Outcome outcome = Simulate(seed, kActions);
    if (outcome.violation.empty()) continue;
    std::printf("seed %llu, after %lld events: %s\n", static_cast<unsigned long long>(seed),
                static_cast<long long>(outcome.events), outcome.violation.c_str());
    const std::string word = outcome.violation.substr(0, outcome.violation.find(':'));
    EXPECT_NE(std::string(GetParam().invariant).find(word), std::string::npos)
        << "found by another invariant: " << outcome.violation;
    return;
  }
  FAIL() << "no invariant found it";
}

INSTANTIATE_TEST_SUITE_P(
    All, PlantedBugTest,
    testing::Values(
        BugCase{PlantedBug::kSlotFreedAtAbort, "SlotFreedAtAbort", "slots|members"},
        BugCase{PlantedBug::kReplyBeforePersisted, "ReplyBeforePersisted", "acknowledged"},
        BugCase{PlantedBug::kNoScheduleAfterEnd, "NoScheduleAfterEnd", "stuck"},
        BugCase{PlantedBug::kQueueOvertaken, "QueueOvertaken", "queue"},
        BugCase{PlantedBug::kDigestOfNeighborsOnly, "DigestOfNeighborsOnly", "digests"},
        BugCase{PlantedBug::kRestartForgetsRunning, "RestartForgetsRunning", "generations"},
        BugCase{PlantedBug::kShardGap, "ShardGap", "placement"},
        BugCase{PlantedBug::kAlgorithmsNotShared, "AlgorithmsNotShared", "algorithms"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace lockstep::server
