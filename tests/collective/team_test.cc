#include "worker/collective/team.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace lockstep::collective {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

absl::Time Soon() { return absl::Now() + absl::Minutes(1); }

TEST(Team, OfOneNeverWaits) {
  Team team(1);
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(team.Barrier(0, absl::InfinitePast()).ok());
}

TEST(Team, BarrierSeparatesRounds) {
  for (const int slots : {2, 3, 9}) {
    Team team(slots);
    constexpr int kRounds = 2000;
    std::vector<int> plain(slots);  // a missing edge is a data race, too
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int slot = 0; slot < slots; ++slot) {
      threads.emplace_back([&, slot] {
        for (int round = 1; round <= kRounds; ++round) {
          plain[slot] = round;
          if (!team.Barrier(slot, Soon()).ok()) ++wrong;
          for (const int value : plain) wrong += value != round;
          if (!team.Barrier(slot, Soon()).ok()) ++wrong;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
  }
}

TEST(Team, DeadlineNamesTheMissingSlotsAndStays) {
  Team team(4);
  std::thread other([&] {
    EXPECT_EQ(team.Barrier(2, absl::InfiniteFuture()).code(), absl::StatusCode::kDeadlineExceeded);
  });
  // Whether or not slot 2 has come yet, 1 and 3 are missing.
  const absl::Status status = team.Barrier(0, absl::Now() + absl::Milliseconds(200));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("1"), HasSubstr("3"), Not(HasSubstr("0"))));
  other.join();
  EXPECT_EQ(team.Barrier(1, Soon()), status);
}

TEST(Team, AbortWakesAllWithTheFirstCause) {
  Team team(3);
  std::vector<absl::Status> statuses(2);
  std::vector<std::thread> threads;
  for (int slot = 0; slot < 2; ++slot) {
    threads.emplace_back(
        [&, slot] { statuses[slot] = team.Barrier(slot, absl::InfiniteFuture()); });
  }
  team.Abort(absl::UnavailableError("the coordinator lost worker-b"));
  team.Abort(absl::UnavailableError("something later"));
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status, absl::AbortedError("the coordinator lost worker-b"));
  }
  EXPECT_EQ(team.Barrier(2, Soon()).code(), absl::StatusCode::kAborted);
}

}  // namespace
}  // namespace lockstep::collective
