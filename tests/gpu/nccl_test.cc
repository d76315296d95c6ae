// The canonical all-reduce of GPU members over NCCL: processes of their own, as tests/collective
// has them, on the emulator's GPU or (cuda_nccl_test) on a real one that they share. Digests are
// those of serial sums by the definition of the tree.
#include <signal.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/collective/scenario.h"

namespace lockstep::collective {
namespace {

using ::testing::HasSubstr;

Scenario OnGpus(Scenario scenario) {
  scenario.gpus = true;
  return scenario;
}

void ExpectTreesBits(const Scenario& scenario, const std::string& what) {
  const std::vector<uint64_t> expected = Expected(scenario);
  for (const Outcome& outcome : RunProcesses(scenario)) {
    EXPECT_TRUE(outcome.status.ok()) << what << ": " << outcome.status;
    EXPECT_EQ(outcome.digests, expected) << what;
  }
}

TEST(Nccl, ProcessesGiveTheSerialTreesBits) {
  for (const int members : {2, 3, 5}) {
    for (const int64_t size : {1, 100, 1000, 20001}) {
      Scenario scenario = OnGpus(EvenScenario(8, members, 1, size));
      scenario.steps = 4;  // as it is, recorded, repeated twice
      scenario.bucket_bytes = 16000;
      ExpectTreesBits(scenario, absl::StrCat(members, " members, ", size, " floats"));
    }
  }
}

TEST(Nccl, SlotsOfProcesses) {
  Scenario scenario = OnGpus(EvenScenario(8, 2, 2, 5000));
  scenario.bucket_bytes = 4000;
  ExpectTreesBits(scenario, "two slots each");
}

TEST(Nccl, UnevenPlacementsAndLeavesThatAreAbsent) {
  for (const Presence presence : {Presence::kAll, Presence::kRandom, Presence::kShort}) {
    Scenario scenario = OnGpus(EvenScenario(7, 3, 1, 3000));
    scenario.members[0].bounds = {0, 1};
    scenario.members[1].bounds = {1, 1};
    scenario.members[2].bounds = {1, 7};
    scenario.presence = presence;
    scenario.steps = 6;
    scenario.bucket_bytes = 2000;
    ExpectTreesBits(scenario, absl::StrCat("presence ", static_cast<int>(presence)));
  }
}

TEST(Nccl, SendsExactlyARingsBytesWhereChunksAreEqual) {
  constexpr int64_t kSize = 4096;
  Scenario scenario = OnGpus(EvenScenario(4, 4, 1, kSize));
  scenario.steps = 1;
  for (const Outcome& outcome : RunProcesses(scenario)) {
    ASSERT_TRUE(outcome.status.ok()) << outcome.status;
    EXPECT_EQ(outcome.traffic.exchange_bytes + outcome.traffic.gather_bytes,
              2 * 3 * kSize * sizeof(float) / 4);
  }
}

// All members have the same sum, and it is not the tree's.
TEST(Nccl, ALibrarysSumIsTheSameEverywhere) {
  for (const int leaves : {10, 200}) {  // 200: more than a call sums
    for (const Presence presence : {Presence::kAll, Presence::kShort}) {
      Scenario scenario = OnGpus(EvenScenario(leaves, 2, 1, 3000));
      scenario.presence = presence;
      scenario.exact = false;
      scenario.bucket_bytes = 5000;
      scenario.steps = 3;
      const std::vector<Outcome> outcomes = RunProcesses(scenario);
      for (const Outcome& outcome : outcomes) {
        ASSERT_TRUE(outcome.status.ok()) << outcome.status;
        EXPECT_EQ(outcome.digests, outcomes[0].digests);
      }
      EXPECT_NE(outcomes[0].digests, Expected(scenario));
    }
  }
}

void ExpectVictimNamed(Scenario scenario, int signal) {
  scenario.victim = 1;
  scenario.signal = signal;
  scenario.steps = 4;
  scenario.victim_step = 2;
  scenario.deadline_ms = 2000;
  const std::vector<Outcome> outcomes = RunProcesses(scenario);
  std::string all;
  bool named = false;
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    if (static_cast<int>(rank) == scenario.victim) continue;
    EXPECT_FALSE(outcomes[rank].status.ok());
    EXPECT_EQ(outcomes[rank].digests.size(), 2u);
    const std::string message(outcomes[rank].status.message());
    named = named || absl::StrContains(message, "member 1 (worker-1)");
    absl::StrAppend(&all, "member ", rank, ": ", outcomes[rank].status.ToString(), "\n");
  }
  EXPECT_TRUE(named) << all;
}

TEST(NcclFailure, KilledMemberIsNamed) {
  ExpectVictimNamed(OnGpus(EvenScenario(8, 3, 1, 20000)), SIGKILL);
}

TEST(NcclFailure, StoppedMemberIsNamedWhenTheDeadlineHasPassed) {
  ExpectVictimNamed(OnGpus(EvenScenario(8, 3, 1, 20000)), SIGSTOP);
}

}  // namespace
}  // namespace lockstep::collective
