#include "worker/collective/all_reduce.h"

#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <memory>
#include <numeric>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "tests/collective/scenario.h"
#include "worker/collective/rendezvous.h"
#include "worker/collective/team.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::collective {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMillion = 1 << 20;

void ExpectExact(const Scenario& scenario, const std::vector<Outcome>& outcomes) {
  const std::vector<uint64_t> expected = Expected(scenario);
  ASSERT_EQ(outcomes.size(), scenario.members.size());
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_TRUE(outcomes[rank].status.ok()) << "member " << rank << ": " << outcomes[rank].status;
    EXPECT_EQ(outcomes[rank].digests, expected) << "member " << rank;
  }
}

// Members i % hosts, each host with its own loopback address.
Scenario Spread(Scenario scenario, int hosts) {
  for (size_t rank = 0; rank < scenario.members.size(); ++rank) {
    const std::string host = std::to_string(rank % hosts + 1);
    scenario.members[rank].host = "host" + host;
    scenario.members[rank].address = "127.0.0." + host;
  }
  return scenario;
}

// ---- the same bits, whoever holds the leaves

class Members : public testing::TestWithParam<int> {};

TEST_P(Members, ThreadsGiveTheSerialTreesBitsForEverySize) {
  for (const int64_t size : {0, 1, 15, 16, 17, 255, 1000, 65539}) {
    Scenario scenario = EvenScenario(9, GetParam(), 1, size);
    scenario.bucket_bytes = size;  // about four buckets
    ExpectExact(scenario, RunThreads(scenario));
  }
}

TEST_P(Members, ProcessesGiveThemThroughSharedMemory) {
  Scenario scenario = EvenScenario(9, GetParam(), 1, 30011);
  scenario.bucket_bytes = 16 << 10;
  scenario.presence = Presence::kRandom;
  scenario.steps = 5;
  ExpectExact(scenario, RunProcesses(scenario));
}

TEST_P(Members, ThreadsGiveThemOverGloo) {
  Scenario scenario = Spread(EvenScenario(9, GetParam(), 1, 1003), GetParam());
  scenario.bucket_bytes = 1 << 10;
  scenario.presence = Presence::kRandom;
  scenario.steps = 4;
  ExpectExact(scenario, RunRendezvous(scenario));
}

INSTANTIATE_TEST_SUITE_P(OneToNine, Members, testing::Range(1, 10));

TEST(AllReduce, AMillionFloatsOnThreads) {
  for (const int members : {1, 2, 3, 8}) {
    Scenario scenario = EvenScenario(8, members, 1, kMillion);
    ExpectExact(scenario, RunThreads(scenario));
  }
}

TEST(AllReduce, AMillionFloatsOnProcesses) {
  const Scenario scenario = EvenScenario(8, 3, 1, kMillion);
  ExpectExact(scenario, RunProcesses(scenario));
}

TEST(AllReduce, AMillionFloatsOverGloo) {
  const Scenario scenario = Spread(EvenScenario(8, 2, 1, kMillion), 2);
  ExpectExact(scenario, RunProcesses(scenario));
}

TEST(AllReduce, ProcessesOnTwoHostsMixSharedMemoryAndGloo) {
  Scenario scenario = Spread(EvenScenario(8, 5, 1, 40001), 2);
  scenario.bucket_bytes = 32 << 10;
  scenario.presence = Presence::kShort;
  scenario.steps = 6;
  ExpectExact(scenario, RunProcesses(scenario));
}

TEST(AllReduce, SlotsAndMembersOfEveryShape) {
  const std::pair<int, int> shapes[] = {{1, 1}, {1, 2}, {1, 3}, {1, 8}, {2, 1}, {3, 1},
                                        {2, 2}, {5, 1}, {3, 2}, {2, 4}, {8, 1}};
  std::vector<std::vector<uint64_t>> all;
  for (const auto& [members, slots] : shapes) {
    Scenario scenario = EvenScenario(8, members, slots, 5000);
    scenario.bucket_bytes = 4 << 10;
    scenario.presence = Presence::kRandom;
    scenario.steps = 6;
    ExpectExact(scenario, RunThreads(scenario));
  }
}

TEST(AllReduce, SlotsOfProcesses) {
  Scenario scenario = EvenScenario(8, 2, 2, 70000);
  scenario.bucket_bytes = 64 << 10;
  scenario.steps = 4;
  ExpectExact(scenario, RunProcesses(scenario));
  ExpectExact(Spread(scenario, 2), RunProcesses(Spread(scenario, 2)));
}

// Microbatches of several shards written side by side: the same bits as by the definition.
TEST(AllReduce, LeavesWrittenInterleaved) {
  for (const int interleaved : {2, 3, 5}) {
    for (const auto& [members, slots] : {std::pair(1, 1), {1, 3}, {2, 1}, {3, 2}, {5, 1}}) {
      Scenario scenario = EvenScenario(8, members, slots, 3000);
      for (ScenarioMember& member : scenario.members) {
        for (int& bound : member.bounds) bound *= interleaved;
      }
      scenario.interleaved = interleaved;
      scenario.bucket_bytes = 4 << 10;
      for (const Presence presence : {Presence::kAll, Presence::kRandom, Presence::kShort}) {
        scenario.presence = presence;
        scenario.steps = 4;
        ExpectExact(scenario, RunThreads(scenario));
      }
    }
  }
}

TEST(AllReduce, UnevenPlacementsEmptySlotsAndEmptyMembers) {
  const std::vector<std::vector<std::vector<int>>> placements = {
      {{0, 1}, {1, 7}, {7, 8}},         {{0, 5}, {5, 6}, {6, 8}}, {{0, 0}, {0, 8}, {8, 8}},
      {{0, 0, 3}, {3, 3}, {3, 8, 8}},   {{0, 1, 6}, {6, 7, 13}},  {{0, 3, 7, 7}},
      {{0, 0}, {0, 1}, {1, 1}, {1, 1}}, {{0, 11}, {11, 12, 29}}};
  for (const auto& bounds : placements) {
    for (const Presence presence : {Presence::kAll, Presence::kRandom, Presence::kShort}) {
      Scenario scenario;
      for (const std::vector<int>& member : bounds) scenario.members.push_back({"h", "", member});
      scenario.size = 777;
      scenario.bucket_bytes = 1 << 10;
      scenario.presence = presence;
      scenario.steps = 8;
      ExpectExact(scenario, RunThreads(scenario));
    }
  }
}

TEST(AllReduce, ManyStepsWithAlternatingPresence) {
  Scenario scenario = EvenScenario(8, 3, 2, 900);
  scenario.bucket_bytes = 1 << 10;
  scenario.presence = Presence::kRandom;
  scenario.steps = 300;
  ExpectExact(scenario, RunThreads(scenario));
  scenario.members = EvenScenario(8, 4, 1, 900).members;
  ExpectExact(scenario, RunProcesses(scenario));
}

TEST(AllReduce, NineProcessesOnFewCores) {
  Scenario scenario = EvenScenario(16, 9, 1, 2000);
  scenario.bucket_bytes = 2 << 10;
  scenario.steps = 100;
  ExpectExact(scenario, RunProcesses(scenario));
}

// ---- what is sent

TEST(AllReduce, SendsNoMoreThanARing) {
  constexpr int64_t kSize = 1 << 16;
  for (const bool gloo : {false, true}) {
    for (const int members : {2, 4, 8}) {
      Scenario scenario = EvenScenario(8, members, 1, kSize);
      scenario.bucket_bytes = kSize;
      scenario.steps = 3;
      if (gloo) scenario = Spread(scenario, members);
      const std::vector<Outcome> outcomes = gloo ? RunRendezvous(scenario) : RunThreads(scenario);
      ExpectExact(scenario, outcomes);
      const uint64_t ring = 3 * 2 * (members - 1) * kSize * sizeof(float) / members;
      for (const Outcome& outcome : outcomes) {
        EXPECT_GT(outcome.traffic.exchange_bytes, 0u);
        EXPECT_GT(outcome.traffic.gather_bytes, 0u);
        // Buckets are cut at 16 elements, not evenly: the ring's bytes to within that.
        const uint64_t rounding = 3 * 5 * 2 * 16 * (members - 1) * sizeof(float);
        EXPECT_LE(outcome.traffic.exchange_bytes + outcome.traffic.gather_bytes, ring + rounding);
      }
    }
  }
}

TEST(AllReduce, SendsExactlyARingsBytesWhereChunksAreEqual) {
  for (const int members : {2, 4, 8}) {
    Scenario scenario = EvenScenario(8, members, 1, 1 << 14);
    scenario.steps = 1;  // one bucket
    for (const Outcome& outcome : RunThreads(scenario)) {
      const uint64_t half = (members - 1) * (uint64_t{1} << 16) / members;
      EXPECT_EQ(outcome.traffic.exchange_bytes, half);
      EXPECT_EQ(outcome.traffic.gather_bytes, half);
    }
  }
}

// ---- failures

// Survivors report before the test's own time limit, and name the victim.
void ExpectVictimNamed(Scenario scenario, absl::StatusCode code) {
  scenario.steps = 50;
  scenario.victim_step = 3;
  scenario.deadline_ms = 2000;
  const std::string name = "member " + std::to_string(scenario.victim) + " (worker-" +
                           std::to_string(scenario.victim) + ")";
  std::vector<Outcome> outcomes = RunProcesses(scenario);
  int direct = 0;
  std::string all;
  for (int rank = 0; rank < static_cast<int>(outcomes.size()); ++rank) {
    if (rank == scenario.victim) continue;
    const absl::Status& status = outcomes[rank].status;
    EXPECT_EQ(outcomes[rank].digests.size(), 3u);
    EXPECT_THAT(status.message(), HasSubstr(name)) << "member " << rank;
    // Some see it themselves, others are told or, where the victim is on their own host, run out of
    // time: its death is only seen at the other end of a connection.
    EXPECT_TRUE(status.code() == code || absl::IsAborted(status) ||
                absl::IsDeadlineExceeded(status))
        << status;
    direct += status.code() == code;
    absl::StrAppend(&all, "member ", rank, ": ", status.ToString(), "\n");
  }
  EXPECT_GE(direct, 1) << all;
}

TEST(AllReduceFailure, KilledMemberIsNamedThroughSharedMemory) {
  Scenario scenario = EvenScenario(8, 3, 1, 20000);
  scenario.victim = 1;
  scenario.signal = SIGKILL;
  ExpectVictimNamed(scenario, absl::StatusCode::kDeadlineExceeded);
}

TEST(AllReduceFailure, StoppedMemberIsNamedThroughSharedMemory) {
  Scenario scenario = EvenScenario(8, 4, 1, 20000);
  scenario.victim = 0;
  scenario.signal = SIGSTOP;
  ExpectVictimNamed(scenario, absl::StatusCode::kDeadlineExceeded);
}

TEST(AllReduceFailure, StoppedMemberOfSlotsIsNamed) {
  Scenario scenario = EvenScenario(8, 2, 2, 20000);
  scenario.victim = 1;
  scenario.signal = SIGSTOP;
  ExpectVictimNamed(scenario, absl::StatusCode::kDeadlineExceeded);
}

TEST(AllReduceFailure, KilledMemberIsNamedOverGloo) {
  Scenario scenario = Spread(EvenScenario(8, 3, 1, 20000), 3);
  scenario.victim = 2;
  scenario.signal = SIGKILL;
  ExpectVictimNamed(scenario, absl::StatusCode::kUnavailable);
}

TEST(AllReduceFailure, StoppedMemberIsNamedOverGloo) {
  Scenario scenario = Spread(EvenScenario(8, 3, 1, 20000), 3);
  scenario.victim = 0;
  scenario.signal = SIGSTOP;
  ExpectVictimNamed(scenario, absl::StatusCode::kDeadlineExceeded);
}

TEST(AllReduceFailure, KilledMemberIsNamedOnItsHostAndTheOther) {
  Scenario scenario = Spread(EvenScenario(8, 4, 1, 20000), 2);
  scenario.victim = 3;
  scenario.signal = SIGKILL;
  ExpectVictimNamed(scenario, absl::StatusCode::kUnavailable);
}

TEST(AllReduceFailure, AbortOfOneMemberReachesAllSlotsOfAll) {
  const Scenario scenario = EvenScenario(8, 2, 2, 100);
  auto communicators =
      MakeLocalCommunicators(2, CanonicalAllReduce::SharedBytes(scenario.placement(), 100));
  std::vector<Outcome> outcomes(2);
  // Member 1 never starts its step; the coordinator has it abort.
  std::thread other([&] { outcomes[0] = RunMember(scenario, 0, communicators[0].get()); });
  communicators[1]->Abort(absl::UnavailableError("worker-b was lost"));
  other.join();
  EXPECT_EQ(outcomes[0].status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(outcomes[0].status.message(), HasSubstr("worker-b was lost"));
}

TEST(AllReduceFailure, FinishWithoutAllDoneIsRefused) {
  auto device = device::MakeCpuDevice();
  ASSERT_TRUE(device.ok()) << device.status();
  auto stream = (*device)->MakeStream();
  Team team(1);
  Placement placement{2, {{0, 2}}};
  auto reduce =
      CanonicalAllReduce::Make(**device, nullptr, &team, placement, 64, {{0, 32}, {32, 64}});
  ASSERT_TRUE(reduce.ok()) << reduce.status();
  const std::vector<uint8_t> present = {1, 1};
  ASSERT_TRUE((*reduce)->Begin(0, present, absl::InfiniteFuture()).ok());
  for (const int leaf : {0, 1}) (*reduce)->Done(0, **stream, leaf, 0, 32);
  const absl::Status status = (*reduce)->Finish(0, **stream, absl::InfiniteFuture());
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("bucket 1"));
  EXPECT_EQ((*reduce)->Begin(0, present, absl::InfiniteFuture()), status);
}

TEST(AllReduceFailure, BadArgumentsAreNamed) {
  auto device = device::MakeCpuDevice();
  ASSERT_TRUE(device.ok()) << device.status();
  Team team(1);
  const auto make = [&](Placement placement, std::vector<Bucket> buckets) {
    return CanonicalAllReduce::Make(**device, nullptr, &team, placement, 64, buckets).status();
  };
  EXPECT_TRUE(make({2, {{0, 2}}}, {{0, 64}}).ok());
  EXPECT_THAT(make({2, {{0, 1}}}, {{0, 64}}).message(), HasSubstr("covers 1 leaves of 2"));
  EXPECT_THAT(make({2, {{1, 2}}}, {{0, 64}}).message(), HasSubstr("begin at 1, expected 0"));
  EXPECT_THAT(make({2, {{0, 1, 2}}}, {{0, 64}}).message(), HasSubstr("2 slots here, the team 1"));
  EXPECT_THAT(make({2, {{0, 1}, {1, 2}}}, {{0, 64}}).message(), HasSubstr("over 2 members"));
  EXPECT_THAT(make({2, {{0, 2}}}, {{0, 32}, {33, 64}}).message(), HasSubstr("stop at 32"));
}

// ---- a lone slot copies nothing

TEST(AllReduce, ResultOfALoneSlotIsTheBufferOfTheFirstLeaf) {
  auto device = device::MakeCpuDevice();
  ASSERT_TRUE(device.ok()) << device.status();
  auto stream = (*device)->MakeStream();
  Team team(1);
  auto reduce = CanonicalAllReduce::Make(**device, nullptr, &team, {4, {{0, 4}}}, 100, {{0, 100}});
  ASSERT_TRUE(reduce.ok()) << reduce.status();
  const std::vector<uint8_t> present = {1, 1, 1, 1};
  ASSERT_TRUE((*reduce)->Begin(0, present, absl::InfiniteFuture()).ok());
  float* first = (*reduce)->Leaf(0, 0);
  for (int leaf = 0; leaf < 4; ++leaf) {
    float* to = (*reduce)->Leaf(0, leaf);
    std::fill(to, to + 100, 1.0f + leaf);
    (*reduce)->Done(0, **stream, leaf, 0, 100);
  }
  ASSERT_TRUE((*reduce)->Finish(0, **stream, absl::InfiniteFuture()).ok());
  EXPECT_EQ((*reduce)->result(), first);
  EXPECT_EQ((*reduce)->result()[99], 10.0f);
}

TEST(MakeBuckets, CutAtTensorsAndCoverAll) {
  const auto cut = [](int64_t size, const std::vector<int64_t>& offsets, int64_t bytes) {
    std::vector<int64_t> ends;
    int64_t next = 0;
    for (const Bucket& bucket : MakeBuckets(size, offsets, bytes)) {
      EXPECT_EQ(bucket.begin, next);
      next = bucket.end;
      ends.push_back(next);
    }
    return ends;
  };
  EXPECT_EQ(cut(100, {0, 10, 50, 60}, 1), (std::vector<int64_t>{10, 50, 60, 100}));
  EXPECT_EQ(cut(100, {0, 10, 50, 60}, 100), (std::vector<int64_t>{50, 100}));
  EXPECT_EQ(cut(100, {0, 10, 50, 60}, 4000), (std::vector<int64_t>{100}));
  EXPECT_EQ(cut(0, {}, 4000), (std::vector<int64_t>{}));
}

TEST(AllReduce, LeavesNothingInSharedMemory) {
  const Scenario scenario = EvenScenario(8, 3, 1, 5000);
  ExpectExact(scenario, RunProcesses(scenario));
  DIR* folder = opendir("/dev/shm");
  if (folder == nullptr) return;  // no such folder: nothing in it
  while (const dirent* entry = readdir(folder)) {
    EXPECT_THAT(std::string(entry->d_name), testing::Not(HasSubstr("lockstep")));
  }
  closedir(folder);
}

}  // namespace
}  // namespace lockstep::collective
