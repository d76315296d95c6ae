// What the canonical all-reduce over NCCL does where NCCL itself does not do its part: faults that
// only the emulator has.
#include <signal.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/collective/scenario.h"

namespace lockstep::collective {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

class NcclFaults : public testing::Test {
 protected:
  void TearDown() override { unsetenv("LOCKSTEP_EMULATOR_FAULTS"); }

  static std::vector<Outcome> RunWith(const char* fault, const Scenario& scenario) {
    setenv("LOCKSTEP_EMULATOR_FAULTS", fault, 1);
    return RunProcesses(scenario);
  }
};

Scenario TwoOnGpus() {
  Scenario scenario = EvenScenario(8, 2, 1, 20000);
  scenario.gpus = true;
  return scenario;
}

TEST_F(NcclFaults, MembersThatConnectLeaveWhenTheyAreAborted) {
  Scenario scenario = TwoOnGpus();
  scenario.abort_ms = 300;
  const absl::Time began = absl::Now();
  for (const Outcome& outcome : RunWith("nccl=hangs-connecting", scenario)) {
    EXPECT_EQ(outcome.status, absl::AbortedError("the job is over"));
  }
  EXPECT_LT(absl::Now() - began, absl::Seconds(30));  // NCCL's own deadline is a minute
}

TEST_F(NcclFaults, AnExchangeThatHangsSaysWhatHasTakenHowLong) {
  Scenario scenario = TwoOnGpus();
  scenario.victim_step = 0;  // from which on the deadline holds
  scenario.victim = 2;       // nobody
  scenario.deadline_ms = 2000;
  const auto all_answer = HasSubstr(
      "the exchange of gradients over NCCL has not ended within 2 s; all members answer; look at "
      "the members' GPUs");
  std::vector<std::string> messages;
  for (const Outcome& outcome : RunWith("nccl=hangs-exchanging", scenario)) {
    EXPECT_EQ(outcome.digests.size(), 0u);
    messages.emplace_back(outcome.status.message());
  }
  EXPECT_THAT(messages, Contains(all_answer));
}

// Its slot waits on a stream for a member that is gone, and only the abort would end that.
TEST_F(NcclFaults, AnAbortThatHangsEndsTheProcess) {
  Scenario scenario = TwoOnGpus();
  scenario.victim = 1;
  scenario.signal = SIGKILL;
  scenario.deadline_ms = 2000;
  scenario.most_abort_ms = 500;
  const std::vector<Outcome> outcomes = RunWith("nccl=hangs-aborting", scenario);
  EXPECT_THAT(std::string(outcomes[0].status.message()), HasSubstr("exit code 70"));
}

}  // namespace
}  // namespace lockstep::collective
