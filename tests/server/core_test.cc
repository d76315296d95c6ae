#include "server/core/core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/server/core_harness.h"

namespace lockstep::server {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;
using Message = v1::CoordinatorMessage;

class CoreTest : public testing::Test, public CoreHarness {};

TEST_F(CoreTest, ASubmissionIsAnsweredWhenItIsStored) {
  v1::SubmitJobRequest request;
  request.mutable_spec()->set_name("fashion");
  const CallId call = Ask(Submit{0, request});
  EXPECT_EQ(replies.count(call), 0u);
  Persist();
  ASSERT_TRUE(replies.at(call).ok());
  EXPECT_EQ(replies.at(call)->id(), "fashion-1");
  EXPECT_EQ(replies.at(call)->state(), v1::QUEUED);
  EXPECT_EQ(replies.at(call)->reason(),
            "waits for a worker of device cpu: none is connected; start one: lockstep-worker "
            "--slots cpu:1");
  EXPECT_EQ(disk.at(1).record.job.id(), "fashion-1");
}

TEST_F(CoreTest, ARepeatedRequestIdIsTheSameJob) {
  v1::SubmitJobRequest request;
  request.set_request_id("r");
  const CallId first = Ask(Submit{0, request});
  const CallId second = Ask(Submit{0, request});
  EXPECT_EQ(replies.size(), 0u);
  Persist();
  EXPECT_EQ(replies.at(first)->id(), "job-1");
  EXPECT_EQ(replies.at(second)->id(), "job-1");
  Restart();
  const CallId third = Ask(Submit{0, request});
  Persist();
  EXPECT_EQ(replies.at(third)->id(), "job-1");
  EXPECT_EQ(core->jobs().size(), 1u);
}

TEST_F(CoreTest, NumbersGoOnAfterARestart) {
  EXPECT_EQ(SubmitJob(1), "fashion-1");
  Restart();
  EXPECT_EQ(SubmitJob(1), "fashion-2");
}

TEST_F(CoreTest, AQueuedJobSaysWhatItWaitsFor) {
  AddWorker("w0", 2);
  const std::string large = SubmitJob(4);
  EXPECT_EQ(job(large).reason(), "waits for 4 slots of device cpu; 2 are free, 2 exist");
  const std::string next = SubmitJob(1);
  EXPECT_EQ(job(next).state(), v1::QUEUED);
  EXPECT_EQ(job(next).reason(), "waits for the jobs ahead of it in the queue");
  AddWorker("w1", 2);
  Persist();
  EXPECT_EQ(job(large).state(), v1::STARTING);
  EXPECT_EQ(job(next).reason(), "waits for 1 slot of device cpu; 0 are free, 4 exist");
}

TEST_F(CoreTest, AJobForAGpuWaitsForAWorkerThatHasOne) {
  AddWorker("w0", 4);
  v1::SubmitJobRequest request;
  request.mutable_spec()->mutable_train()->set_shards(8);
  request.mutable_spec()->mutable_resources()->set_device("cuda");
  Ask(Submit{0, request});
  Persist();
  EXPECT_EQ(job("job-1").state(), v1::QUEUED);
  EXPECT_EQ(job("job-1").reason(),
            "waits for a worker of device cuda: none is connected; start one: lockstep-worker "
            "--slots cuda:1");
  v1::Gpu gpu;
  gpu.set_name("NVIDIA H200");
  gpu.set_memory_bytes(uint64_t{139} << 30);
  gpu.set_ordinal(1);
  AddWorker("w1", 1, 2, &gpu);
  Persist();
  EXPECT_EQ(job("job-1").state(), v1::STARTING);
  ASSERT_EQ(job("job-1").placement_size(), 1);
  EXPECT_EQ(job("job-1").placement(0).worker(), "w1");
  request.mutable_spec()->mutable_resources()->set_slots(2);
  Ask(Submit{0, request});
  EXPECT_EQ(job("job-2").reason(), "waits for 2 slots of device cuda; 0 are free, 1 exists");
}

TEST_F(CoreTest, AWorkersGpuIsShown) {
  v1::Gpu gpu;
  gpu.set_name("NVIDIA H200");
  gpu.set_memory_bytes(uint64_t{139} << 30);
  gpu.set_ordinal(1);
  AddWorker("w0", 4);
  AddWorker("w1", 1, 2, &gpu);
  const std::vector<v1::WorkerInfo> workers = core->DescribeWorkers();
  ASSERT_EQ(workers.size(), 2u);
  EXPECT_EQ(workers[0].device(), "cpu");
  EXPECT_FALSE(workers[0].has_gpu());
  EXPECT_EQ(workers[1].device(), "cuda");
  EXPECT_EQ(workers[1].gpu().name(), "NVIDIA H200");
  EXPECT_EQ(workers[1].gpu().memory_bytes(), uint64_t{139} << 30);
  EXPECT_EQ(workers[1].gpu().ordinal(), 1);
}

TEST_F(CoreTest, WithoutANumberOfSlotsAJobTakesWhatIsFreeAndAtMostItsShards) {
  AddWorker("w0", 3);
  const std::string first = SubmitJob(0);
  EXPECT_EQ(job(first).placement_size(), 3);
  const std::string second = SubmitJob(0);
  EXPECT_EQ(job(second).reason(), "waits for at least 1 slot of device cpu; 0 are free, 3 exist");
  AddWorker("w1", 12);
  EXPECT_EQ(job(second).placement_size(), 8);
  EXPECT_EQ(job(SubmitJob(100)).reason(), "waits for 8 slots of device cpu; 4 are free, 15 exist");
}

TEST_F(CoreTest, PrepareIsSentWhenThePlacementIsStored) {
  const StreamId w0 = AddWorker("w0", 4);
  v1::SubmitJobRequest request;
  request.mutable_spec()->mutable_train()->set_shards(8);
  request.mutable_spec()->mutable_resources()->set_slots(2);
  request.set_output_dir("/out");
  Ask(Submit{0, request});
  EXPECT_EQ(job("job-1").state(), v1::STARTING);
  EXPECT_FALSE(Last(w0, Message::kPrepare).has_prepare());
  EXPECT_EQ(FreeSlots(), 2);
  Persist();
  const v1::Prepare prepare = Last(w0, Message::kPrepare).prepare();
  EXPECT_EQ(prepare.job(), "job-1");
  EXPECT_EQ(prepare.generation(), 1);
  EXPECT_EQ(prepare.output_dir(), "/out");
  ASSERT_EQ(prepare.members_size(), 1);
  EXPECT_THAT(prepare.members(0).bounds(), testing::ElementsAre(0, 4, 8));
  EXPECT_THAT(prepare.members(0).slots(), testing::ElementsAre(0, 1));
}

TEST_F(CoreTest, TwoJobsShareAWorkerInDifferentSlots) {
  const StreamId w0 = AddWorker("w0", 3);
  SubmitJob(1);
  SubmitJob(2);
  std::vector<int> slots;
  for (const Message& message : sent[w0]) {
    if (!message.has_prepare()) continue;
    for (int slot : message.prepare().members(0).slots()) slots.push_back(slot);
  }
  EXPECT_THAT(slots, testing::ElementsAre(0, 1, 2));
  EXPECT_EQ(core->DescribeWorkers()[0].state(), "ASSIGNED");
}

TEST_F(CoreTest, AJobRunsFromReadyToSuccess) {
  std::string id;
  const auto w = RunningJob(2, &id);
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  EXPECT_EQ(Last(w[0], Message::kStart).start().source_rank(), -1);
  EXPECT_EQ(Last(w[1], Message::kStart).start().rendezvous_size(), 2);
  EXPECT_EQ(core->DescribeWorkers()[0].state(), "TRAINING");
  SayStep(w[0], id, 1);
  SayStep(w[1], id, 9);  // not from rank 0: not counted
  SayStep(w[0], id, 2);
  SayStep(w[0], id, 2);  // said again
  EXPECT_EQ(job(id).step(), 2);
  SayEnded(w[1], id, v1::Ended::COMPLETED);
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  SayEnded(w[0], id, v1::Ended::COMPLETED);
  EXPECT_EQ(job(id).state(), v1::SUCCEEDED);
  EXPECT_EQ(job(id).reason(), "");
  EXPECT_EQ(job(id).result().steps(), 2);
  EXPECT_EQ(FreeSlots(), 2);
  EXPECT_EQ(core->DescribeWorkers()[0].state(), "IDLE");
  Persist();
  int64_t sequence = 0;
  int steps = 0;
  for (const v1::JobEvent& event : events.at(1)) {
    EXPECT_EQ(event.sequence(), ++sequence);
    steps += event.has_step();
  }
  EXPECT_EQ(steps, 2);
  EXPECT_EQ(events.at(1).back().job().state(), v1::SUCCEEDED);
}

TEST_F(CoreTest, TheResultAddsUpWhatTheMembersDid) {
  std::string id;
  const auto w = RunningJob(2, &id);
  for (int rank = 0; rank < 2; ++rank) {
    v1::WorkerMessage message;
    v1::Ended& ended = *message.mutable_ended();
    ended.set_job(id);
    ended.set_generation(1);
    ended.set_outcome(v1::Ended::COMPLETED);
    for (int shard = 0; shard < 8; ++shard) ended.add_shard_steps(shard / 4 == rank ? 30 : 0);
    ended.set_gradient_bytes_sent(1000 + rank);
    Give(WorkerSaid{w[rank], message});
  }
  EXPECT_THAT(job(id).result().shard_steps(), testing::ElementsAre(30, 30, 30, 30, 30, 30, 30, 30));
  EXPECT_THAT(job(id).result().gradient_bytes_sent(), testing::ElementsAre(1000, 1001));
}

TEST_F(CoreTest, TheRankWithTheNewestStateIsTheSource) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2, "/old");
  SayReady(w0, id);
  v1::Ready ready = MakeReady(id);
  ready.set_state_version(40);
  Say(w1, ready);
  EXPECT_EQ(Last(w0, Message::kStart).start().source_rank(), 1);
}

TEST_F(CoreTest, ADamagedCheckpointIsAWarningThatNamesTheOneUsed) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2, "/old");
  v1::Ready ready = MakeReady(id);
  ready.set_state_version(12);
  ready.set_checkpoint("/old/checkpoints/step-00000012");
  ready.add_notes("checkpoint step-00000016 is not used: damaged");
  Say(w0, ready);  // two workers that see one folder say the same
  Say(w1, ready);
  ASSERT_EQ(job(id).state(), v1::RUNNING);
  ASSERT_EQ(job(id).warnings_size(), 1);
  EXPECT_EQ(job(id).warnings(0),
            "checkpoint step-00000016 is not used: damaged; going on from "
            "/old/checkpoints/step-00000012, step 12");
}

TEST_F(CoreTest, AResumeThatNobodyCanSupplyFails) {
  const StreamId w0 = AddWorker("w0", 1);
  const std::string id = SubmitJob(1, "/old");
  SayReady(w0, id);
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_THAT(job(id).reason(),
              HasSubstr("no worker has a checkpoint to go on from at /old; accepted: the folder of "
                        "a run"));
}

TEST_F(CoreTest, OtherDataOrAnotherDeviceFailsAndNamesBoth) {
  for (const bool data : {true, false}) {
    CoreHarness h;
    const StreamId w0 = h.AddWorker("w0", 1);
    const StreamId w1 = h.AddWorker("w1", 1);
    const std::string id = h.SubmitJob(2);
    h.SayReady(w0, id);
    v1::Ready ready = h.MakeReady(id);
    data ? ready.set_data_digest("d1") : ready.set_fingerprint("avx2");
    h.Say(w1, ready);
    EXPECT_EQ(h.job(id).state(), v1::STOPPING);
    EXPECT_THAT(h.job(id).reason(), HasSubstr("worker w1"));
    EXPECT_THAT(h.job(id).reason(), HasSubstr("worker w0"));
    EXPECT_THAT(h.job(id).reason(), HasSubstr(data ? "d1 against d0" : "avx2 against avx512"));
    EXPECT_TRUE(h.Last(w0, Message::kAbort).has_abort());
    h.SayEnded(w0, id, v1::Ended::STOPPED);
    h.SayEnded(w1, id, v1::Ended::STOPPED);
    EXPECT_EQ(h.job(id).state(), v1::FAILED);
  }
}

// Of a problem the lowest rank's algorithm is the job's; what only others have is added.
TEST_F(CoreTest, MembersUseTheAlgorithmsOfOne) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const StreamId w2 = AddWorker("w2", 1);
  const std::string id = SubmitJob(3);
  const auto ready_with = [&](const std::map<std::string, std::string>& algorithms,
                              const std::string& probe) {
    v1::Ready ready = MakeReady(id);
    for (const auto& [problem, algorithm] : algorithms) {
      (*ready.mutable_algorithms()->mutable_by_problem())[problem] = algorithm;
    }
    ready.set_probe(probe);
    return ready;
  };
  Say(w0, ready_with({{"a", "1"}}, "x"));
  Say(w1, ready_with({{"a", "1"}, {"b", "5"}}, "x"));
  Say(w2, ready_with({{"a", "2"}, {"b", "5"}}, "y"));
  EXPECT_EQ(job(id).state(), v1::STARTING);
  EXPECT_FALSE(Last(w0, Message::kUseAlgorithms).has_use_algorithms());
  EXPECT_FALSE(Last(w1, Message::kUseAlgorithms).has_use_algorithms());
  const v1::UseAlgorithms use = Last(w2, Message::kUseAlgorithms).use_algorithms();
  EXPECT_EQ(use.job(), id);
  EXPECT_EQ(use.generation(), 1);
  EXPECT_EQ(use.algorithms().by_problem().size(), 2u);
  EXPECT_EQ(use.algorithms().by_problem().at("a"), "1");
  Persist();
  EXPECT_EQ(disk.begin()->second.algorithms.by_problem().at("b"), "5");
  Say(w2, ready_with({{"a", "1"}, {"b", "5"}}, "x"));
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  EXPECT_TRUE(Last(w2, Message::kStart).has_start());
}

// Where the state comes from a checkpoint, so do the algorithms.
TEST_F(CoreTest, AlgorithmsAreThoseOfTheSource) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2, "/runs/one");
  v1::Ready ready = MakeReady(id);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "1";
  Say(w0, ready);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "2";
  ready.set_state_version(40);
  Say(w1, ready);
  EXPECT_EQ(Last(w0, Message::kUseAlgorithms).use_algorithms().algorithms().by_problem().at("a"),
            "2");
  EXPECT_FALSE(Last(w1, Message::kUseAlgorithms).has_use_algorithms());
  ready.set_state_version(-1);
  Say(w0, ready);
  EXPECT_EQ(Last(w1, Message::kStart).start().source_rank(), 1);
}

TEST_F(CoreTest, AMemberThatComputesOtherwiseByTheSameAlgorithmsFailsTheJob) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2);
  v1::Ready ready = MakeReady(id);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "1";
  ready.set_probe("p0");
  Say(w0, ready);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "2";
  ready.set_probe("p1");
  Say(w1, ready);
  ASSERT_TRUE(Last(w1, Message::kUseAlgorithms).has_use_algorithms());
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "1";
  Say(w1, ready);
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_THAT(job(id).reason(),
              HasSubstr("worker w1 computes otherwise than worker w0: probe p1 against p0"));
}

TEST_F(CoreTest, AMemberThatIsNotReadyAgainFailsTheJob) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2);
  v1::Ready ready = MakeReady(id);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "1";
  Say(w0, ready);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "2";
  Say(w1, ready);
  for (int second = 0; second < 61; ++second) {
    Heartbeat(w0);
    Heartbeat(w1);
    Advance(absl::Seconds(1));
  }
  EXPECT_EQ(job(id).reason(), "worker w1 (slot 0) not ready within 1m");
}

TEST_F(CoreTest, DevicesMayDifferWhereTheSpecSaysSo) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  exact = false;
  const std::string id = SubmitJob(2);
  SayReady(w0, id);
  v1::Ready ready = MakeReady(id);
  ready.set_fingerprint("cuda sm_80");
  ready.set_probe("another");
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = "another";
  Say(w1, ready);
  EXPECT_EQ(job(id).state(), v1::RUNNING);
}

TEST_F(CoreTest, AMemberThatIsNeverReadyFailsTheJob) {
  const StreamId w0 = AddWorker("w0", 1);
  const StreamId w1 = AddWorker("w1", 1);
  const std::string id = SubmitJob(2);
  SayReady(w0, id);
  for (int second = 0; second < 61; ++second) {
    Heartbeat(w0);
    Heartbeat(w1);
    Advance(absl::Seconds(1));
  }
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_EQ(job(id).reason(), "worker w1 (slot 0) not ready within 1m");
}

TEST_F(CoreTest, ALostConnectionFailsTheJobWhenTheSurvivorsHaveLeft) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayStep(w[0], id, 117);
  Give(StreamLost{w[1], "connection closed"});
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_EQ(job(id).target(), v1::FAILED);
  EXPECT_EQ(job(id).reason(), "worker w1 (slot 0) lost at step 117: connection closed");
  EXPECT_EQ(Last(w[0], Message::kAbort).abort().reason(), job(id).reason());
  SayEnded(w[0], id, v1::Ended::STOPPED);
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(id).result().steps(), 117);
  EXPECT_EQ(core->DescribeWorkers()[1].state(), "LOST");
}

// Its slots are not given to what waits: the process ends.
TEST_F(CoreTest, AWorkerThatLeavesIsLostAtOnceAndGetsNoJob) {
  std::string id;
  const auto w = RunningJob(2, &id);
  const std::string next = SubmitJob(2);
  v1::WorkerMessage message;
  v1::Ended& ended = *message.mutable_ended();
  ended.set_job(id);
  ended.set_generation(1);
  ended.set_outcome(v1::Ended::ERRORED);
  ended.set_error("GPU 0 is lost");
  ended.set_leaves(true);
  Give(WorkerSaid{w[1], message});
  EXPECT_EQ(job(id).reason(), "worker w1 (slot 0) failed at step 0: GPU 0 is lost");
  EXPECT_EQ(core->DescribeWorkers()[1].state(), "LOST");
  EXPECT_EQ(closed.at(w[1]).code(), absl::StatusCode::kAborted);
  SayEnded(w[0], id, v1::Ended::STOPPED);
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(next).state(), v1::QUEUED);
  AddWorker("w1", 1, /*incarnation=*/2);
  EXPECT_EQ(job(next).state(), v1::STARTING);
}

// Of two jobs on it, the other one is lost with it.
TEST_F(CoreTest, AWorkerThatLeavesFailsItsOtherJobs) {
  const StreamId w0 = AddWorker("w0", 2);
  const std::string a = SubmitJob(1), b = SubmitJob(1);
  SayReady(w0, a);
  SayReady(w0, b);
  Persist();
  v1::WorkerMessage message;
  v1::Ended& ended = *message.mutable_ended();
  ended.set_job(a);
  ended.set_generation(1);
  ended.set_outcome(v1::Ended::ERRORED);
  ended.set_error("GPU 0 is lost");
  ended.set_leaves(true);
  Give(WorkerSaid{w0, message});
  EXPECT_EQ(job(a).state(), v1::FAILED);
  EXPECT_EQ(job(b).state(), v1::FAILED);
  EXPECT_EQ(job(b).reason(), "worker w0 (slot 1) lost at step 0: its process ends: GPU 0 is lost");
}

// As where another GPU of its process is lost.
TEST_F(CoreTest, AWorkerThatLeavesForNoJobSaysWhyToAllOfThem) {
  std::string id;
  const auto w = RunningJob(1, &id);
  v1::WorkerMessage message;
  message.mutable_ended()->set_outcome(v1::Ended::ERRORED);
  message.mutable_ended()->set_error("GPU 1 is lost");
  message.mutable_ended()->set_leaves(true);
  Give(WorkerSaid{w[0], message});
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(id).reason(), "worker w0 (slot 0) lost at step 0: its process ends: GPU 1 is lost");
  EXPECT_EQ(core->DescribeWorkers()[0].state(), "LOST");
  EXPECT_EQ(closed.at(w[0]).code(), absl::StatusCode::kAborted);
}

TEST_F(CoreTest, ASilentWorkerIsLostAfterSixSeconds) {
  std::string id;
  const auto w = RunningJob(1, &id);
  Advance(absl::Milliseconds(5999));
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  Advance(absl::Milliseconds(1));
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(id).reason(), "worker w0 (slot 0) lost at step 0: no heartbeat for 6s");
  EXPECT_EQ(closed.at(w[0]).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(CoreTest, ACoordinatorThatWasItselfStoppedLosesNobody) {
  std::string id;
  const auto w = RunningJob(1, &id);
  now += absl::Hours(1);  // a suspended laptop: the alarm comes late
  Give(AlarmFired());
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  Advance(absl::Seconds(7));
  EXPECT_EQ(job(id).state(), v1::FAILED);
}

TEST_F(CoreTest, ThePrimaryCauseReplacesTheEchoThatCameFirst) {
  std::string id;
  const auto w = RunningJob(3, &id);
  SayEnded(w[0], id, v1::Ended::ERRORED, "connection to w1 closed", true);
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_THAT(job(id).reason(), HasSubstr("connection to w1 closed"));
  Advance(absl::Seconds(1));
  SayEnded(w[1], id, v1::Ended::ERRORED, "slot 0, step 5: the loss is not finite: fc.weight");
  EXPECT_EQ(job(id).reason(),
            "worker w1 failed: slot 0, step 5: the loss is not finite: fc.weight");
  Give(StreamLost{w[2], "connection closed"});
  EXPECT_THAT(job(id).reason(), HasSubstr("not finite"));
  EXPECT_EQ(job(id).state(), v1::FAILED);
}

TEST_F(CoreTest, ALossExplainsAnEchoHoweverLate) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayEnded(w[0], id, v1::Ended::ERRORED, "no data from w1", true);
  Advance(absl::Seconds(5));
  Give(StreamLost{w[1], "connection closed"});
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_THAT(job(id).reason(), HasSubstr("worker w1 (slot 0) lost"));
}

TEST_F(CoreTest, AnErrorAfterTheWaitDoesNotReplaceTheReason) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayEnded(w[0], id, v1::Ended::ERRORED, "no data from w1", true);
  Advance(absl::Seconds(3));
  SayEnded(w[1], id, v1::Ended::ERRORED, "aborted");
  EXPECT_THAT(job(id).reason(), HasSubstr("no data from w1"));
}

TEST_F(CoreTest, AMemberThatDoesNotLeaveIsLostAfterTenSeconds) {
  std::string id;
  const auto w = RunningJob(2, &id);
  Give(StreamLost{w[1], "connection closed"});
  for (int second = 0; second < 10; ++second) {
    EXPECT_EQ(job(id).state(), v1::STOPPING);
    Heartbeat(w[0]);
    Advance(absl::Seconds(1));
  }
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_THAT(job(id).reason(), HasSubstr("worker w1 (slot 0) lost"));
  EXPECT_EQ(closed.at(w[0]),
            absl::DeadlineExceededError("this worker did not leave job " + id + " within 10s"));
  EXPECT_EQ(core->DescribeWorkers()[0].state(), "LOST");
}

TEST_F(CoreTest, ACancelledJobStopsPolitelyThenByAbort) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayStep(w[0], id, 3);
  const CallId call = Ask(Cancel{0, id});
  EXPECT_EQ(replies.count(call), 0u);
  Persist();
  EXPECT_EQ(replies.at(call)->target(), v1::CANCELLED);
  SayStep(w[0], id, 5);  // that the members agreed to stop after
  EXPECT_TRUE(Last(w[0], Message::kControl).control().stop());
  EXPECT_FALSE(Last(w[0], Message::kAbort).has_abort());
  SayEnded(w[0], id, v1::Ended::STOPPED);
  Advance(absl::Seconds(1));
  EXPECT_FALSE(Last(w[0], Message::kAbort).has_abort());
  EXPECT_TRUE(Last(w[1], Message::kAbort).has_abort());
  SayEnded(w[1], id, v1::Ended::STOPPED, "", false, "another step's");
  EXPECT_EQ(job(id).state(), v1::CANCELLED);
  EXPECT_EQ(job(id).reason(), "cancelled on request after step 5");
  EXPECT_EQ(FreeSlots(), 2);
}

TEST_F(CoreTest, ACancelledJobStaysCancelledWhateverItsMembersSay) {
  std::string id;
  const auto w = RunningJob(2, &id);
  Ask(Cancel{0, id});
  SayEnded(w[0], id, v1::Ended::ERRORED, "out of memory");
  Give(StreamLost{w[1], "connection closed"});
  EXPECT_EQ(job(id).state(), v1::CANCELLED);
}

TEST_F(CoreTest, CancellingBeforePrepareIsSentNeedsNoWorker) {
  AddWorker("w0", 1);
  Ask(Submit{0, {}});
  Ask(Cancel{0, "job-1"});
  EXPECT_EQ(job("job-1").state(), v1::CANCELLED);
  Persist();
  EXPECT_EQ(sent.at(1).size(), 1u);  // Registered
  EXPECT_EQ(FreeSlots(), 1);
}

TEST_F(CoreTest, CancellingTheHeadStartsTheNext) {
  AddWorker("w0", 1);
  const std::string large = SubmitJob(2);
  const std::string small = SubmitJob(1);
  Ask(Cancel{0, large});
  EXPECT_EQ(job(large).state(), v1::CANCELLED);
  EXPECT_EQ(job(small).state(), v1::STARTING);
}

TEST_F(CoreTest, WhatCannotBeCancelledSaysWhy) {
  const CallId none = Ask(Cancel{0, "nothing-9"});
  EXPECT_EQ(replies.at(none).status().code(), absl::StatusCode::kNotFound);
  const std::string id = SubmitJob(1);
  Ask(Cancel{0, id});
  Persist();
  const CallId again = Ask(Cancel{0, id});
  EXPECT_EQ(replies.at(again).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(replies.at(again).status().message()), HasSubstr("CANCELLED"));
}

TEST_F(CoreTest, TheReplicaThatDiffersFromTheMajorityIsNamed) {
  std::string id;
  const auto w = RunningJob(3, &id);
  SayDigest(w[0], id, 10, "bad");
  SayDigest(w[1], id, 10, "good");
  EXPECT_EQ(job(id).state(), v1::RUNNING);
  SayDigest(w[2], id, 10, "good");
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  EXPECT_EQ(job(id).reason(),
            "worker w0 (slot 0) differs from the other replicas at step 10: state digest bad, "
            "theirs is good");
}

TEST_F(CoreTest, AllAreNamedWhereThereIsNoMajority) {
  std::string id;
  auto w = RunningJob(2, &id);
  SayDigest(w[1], id, 10, "b");
  SayDigest(w[0], id, 10, "a");
  EXPECT_EQ(
      job(id).reason(),
      "workers w0 (slot 0) and w1 (slot 0) differ at step 10: state digest a, b; two replicas "
      "cannot tell which is wrong");
  EXPECT_EQ(job(id).target(), v1::FAILED);
}

TEST_F(CoreTest, AHalfIsNoMajority) {
  std::string id;
  const auto w = RunningJob(4, &id);
  for (int rank = 0; rank < 4; ++rank) SayDigest(w[rank], id, 2, rank < 2 ? "a" : "b");
  EXPECT_EQ(job(id).reason(),
            "workers w0 (slot 0), w1 (slot 0), w2 (slot 0) and w3 (slot 0) differ at step 2: state "
            "digest a, a, b, b; no majority tells which is wrong");
}

TEST_F(CoreTest, EveryReplicaThatDiffersFromTheMajorityIsNamed) {
  std::string id;
  const auto w = RunningJob(5, &id);
  for (int rank = 0; rank < 5; ++rank) {
    SayDigest(w[rank], id, 2, rank == 1 ? "x" : rank == 4 ? "y" : "good");
  }
  EXPECT_EQ(job(id).reason(),
            "workers w1 (slot 0) and w4 (slot 0) differ from the other replicas at step 2: state "
            "digest x, y, theirs is good");
}

// The members compare too: their own errors may be the first that the coordinator hears of it, and
// whole seconds before the last digest.
TEST_F(CoreTest, TheReplicaIsNamedAlsoWhenAMembersErrorComesFirst) {
  std::string id;
  const auto w = RunningJob(3, &id);
  SayDigest(w[0], id, 10, "good");
  SayDigest(w[1], id, 10, "good");
  SayEnded(w[0], id, v1::Ended::ERRORED, "step 10: the replicas differ", /*secondary=*/true);
  EXPECT_EQ(job(id).state(), v1::STOPPING);
  now += options.primary_wait + absl::Seconds(1);
  SayDigest(w[2], id, 10, "bad");
  SayEnded(w[2], id, v1::Ended::ERRORED, "step 10: the replicas differ", /*secondary=*/true);
  SayEnded(w[1], id, v1::Ended::STOPPED);
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(id).reason(),
            "worker w2 (slot 0) differs from the other replicas at step 10: state digest bad, "
            "theirs is good");
}

TEST_F(CoreTest, ReplicasThatDifferAtTheEndDoNotSucceed) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayStep(w[0], id, 7);
  SayEnded(w[0], id, v1::Ended::COMPLETED, "", false, "a");
  SayEnded(w[1], id, v1::Ended::COMPLETED, "", false, "b");
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_THAT(job(id).reason(), HasSubstr("workers w0 (slot 0) and w1 (slot 0) differ at step 7"));
}

TEST_F(CoreTest, AMemberThatEndsOutOfTurnFailsTheJob) {
  std::string id;
  auto w = RunningJob(1, &id);
  SayEnded(w[0], id, v1::Ended::STOPPED);
  EXPECT_EQ(job(id).reason(),
            "worker w0 (slot 0) failed at step 0: it stopped without being told to");
  const std::string second = SubmitJob(1);
  SayEnded(w[0], second, v1::Ended::COMPLETED);
  EXPECT_EQ(job(second).state(), v1::FAILED);
  EXPECT_THAT(job(second).reason(), HasSubstr("completed before it was started"));
}

TEST_F(CoreTest, ACompletedMemberMayGoWhileOthersFinish) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayEnded(w[1], id, v1::Ended::COMPLETED);
  Give(StreamLost{w[1], "connection closed"});
  SayEnded(w[0], id, v1::Ended::COMPLETED);
  EXPECT_EQ(job(id).state(), v1::SUCCEEDED);
}

TEST_F(CoreTest, StaleGenerationsAreRefused) {
  std::string id;
  const auto w = RunningJob(1, &id);
  v1::Ready stale = MakeReady(id, 7);
  Say(w[0], stale);
  EXPECT_EQ(Last(w[0], Message::kAbort).abort().generation(), 7);
  Say(w[0], MakeReady("unknown-5"));
  EXPECT_EQ(Last(w[0], Message::kAbort).abort().job(), "unknown-5");
  EXPECT_EQ(job(id).state(), v1::RUNNING);
}

TEST_F(CoreTest, ARestartEndsWhatRanAndKeepsWhatWaits) {
  std::string running;
  const auto w = RunningJob(1, &running);
  SayStep(w[0], running, 42);
  v1::WorkerMessage message;
  v1::CheckpointInfo& checkpoint = *message.mutable_progress()->add_checkpoints();
  message.mutable_progress()->set_job(running);
  message.mutable_progress()->set_generation(1);
  checkpoint.set_step(40);
  checkpoint.set_host("h");
  checkpoint.set_path("/out/step-40");
  Give(WorkerSaid{w[0], message});
  const std::string waiting = SubmitJob(1);
  Restart();
  Persist();
  EXPECT_EQ(job(running).state(), v1::FAILED);
  EXPECT_EQ(job(running).reason(),
            "the coordinator was restarted at step 42; its checkpoint of step 40 is on h in "
            "/out/step-40");
  EXPECT_EQ(job(waiting).state(), v1::QUEUED);
  AddWorker("w0", 1);
  Persist();
  EXPECT_EQ(job(waiting).state(), v1::STARTING);
  int64_t sequence = 0;
  for (const v1::JobEvent& event : events.at(1)) EXPECT_EQ(event.sequence(), ++sequence);
}

TEST_F(CoreTest, ARestartKeepsTheCauseOfAJobThatWasStopping) {
  std::string id;
  const auto w = RunningJob(2, &id);
  Give(StreamLost{w[1], "connection closed"});
  Persist();
  Restart();
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_THAT(job(id).reason(), HasSubstr("worker w1 (slot 0) lost"));

  CoreHarness h;
  const auto v = h.RunningJob(1, &id);
  h.Ask(Cancel{0, id});
  h.Persist();
  h.Restart();
  EXPECT_EQ(h.job(id).state(), v1::CANCELLED);
}

TEST_F(CoreTest, AnUnstoredJobIsForgottenAndWasNeverAcknowledged) {
  const CallId call = Ask(Submit{0, {}});
  Restart();
  EXPECT_TRUE(core->jobs().empty());
  EXPECT_EQ(replies.count(call), 0u);
}

TEST_F(CoreTest, ASecondLiveWorkerOfANameIsRefused) {
  AddWorker("w0", 1, 1);
  const StreamId second = AddWorker("w0", 4, 2);
  EXPECT_EQ(closed.at(second).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(closed.at(second).message()), HasSubstr("host-of-w0"));
  EXPECT_EQ(FreeSlots(), 1);
}

TEST_F(CoreTest, AReturningProcessIsUsableAtOnce) {
  const StreamId first = AddWorker("w0", 1, 1);
  Give(StreamLost{first, "connection closed"});
  AddWorker("w0", 2, 2);
  EXPECT_EQ(FreeSlots(), 2);
  EXPECT_EQ(core->workers().at("w0").state, WorkerState::kIdle);
}

TEST_F(CoreTest, TheSameIncarnationTakesItsNameOver) {
  std::string id;
  const auto w = RunningJob(1, &id);
  const StreamId again = AddWorker("w0", 1, 1);
  EXPECT_EQ(closed.at(w[0]).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(FreeSlots(), 1);
  EXPECT_TRUE(Last(again, Message::kRegistered).has_registered());
}

TEST_F(CoreTest, WhoeverIsNoWorkerIsClosed) {
  struct Case {
    void (*make)(v1::WorkerMessage&);
    const char* says;
  };
  const Case cases[] = {
      {[](v1::WorkerMessage& m) { m.mutable_heartbeat(); }, "must be Register"},
      {[](v1::WorkerMessage&) {}, "must be Register"},
      {[](v1::WorkerMessage& m) { m.mutable_register_()->set_name("a/b"); }, "no name"},
      {[](v1::WorkerMessage& m) { m.mutable_register_()->set_name(std::string(200, 'a')); },
       "no name"},
      {[](v1::WorkerMessage& m) { m.mutable_register_()->set_name("a"); }, "0 slots"},
      {[](v1::WorkerMessage& m) {
         m.mutable_register_()->set_name("a");
         m.mutable_register_()->set_slots(1 << 30);
       },
       "slots; accepted: 1 to 1024"},
      {[](v1::WorkerMessage& m) {
         m.mutable_register_()->set_name("a");
         m.mutable_register_()->set_slots(1);
       },
       "incarnation 0"},
      {[](v1::WorkerMessage& m) {
         m.mutable_register_()->set_name("a");
         m.mutable_register_()->set_slots(1);
         m.mutable_register_()->set_incarnation(1);
       },
       "no device"},
  };
  StreamId stream = 1000;
  for (const Case& c : cases) {
    v1::WorkerMessage message;
    c.make(message);
    Give(StreamOpened{++stream});
    Give(WorkerSaid{stream, message});
    ASSERT_EQ(closed.count(stream), 1u) << c.says;
    EXPECT_EQ(closed.at(stream).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(closed.at(stream).message()), HasSubstr(c.says));
  }
  EXPECT_TRUE(core->workers().empty());
}

TEST_F(CoreTest, AStreamThatNeverRegistersIsClosed) {
  Give(StreamOpened{5});
  Advance(absl::Seconds(10));
  EXPECT_EQ(closed.at(5).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(CoreTest, AnOversizedRendezvousFailsTheJob) {
  const StreamId w0 = AddWorker("w0", 1);
  const std::string id = SubmitJob(1);
  v1::Ready ready = MakeReady(id);
  ready.set_rendezvous(std::string(100'000, 'x'));
  Say(w0, ready);
  EXPECT_THAT(job(id).reason(), HasSubstr("rendezvous has 100000 bytes; accepted: at most 65536"));
}

TEST_F(CoreTest, AlgorithmsOfMoreThanAMebibyteFailTheJob) {
  const StreamId w0 = AddWorker("w0", 1);
  const std::string id = SubmitJob(1);
  v1::Ready ready = MakeReady(id);
  (*ready.mutable_algorithms()->mutable_by_problem())["a"] = std::string(1 << 20, 'x');
  Say(w0, ready);
  EXPECT_THAT(job(id).reason(), ContainsRegex("its algorithms have 10[0-9]+ bytes; accepted: at "
                                              "most 1048576"));
}

TEST_F(CoreTest, CheckpointsAreKeptAsTheSpecSays) {
  std::string id;
  const auto w = RunningJob(1, &id);
  for (int step = 1; step <= 5; ++step) {
    v1::WorkerMessage message;
    message.mutable_progress()->set_job(id);
    message.mutable_progress()->set_generation(1);
    message.mutable_progress()->add_checkpoints()->set_step(step);
    Give(WorkerSaid{w[0], message});
  }
  ASSERT_EQ(job(id).checkpoints_size(), 3);
  EXPECT_EQ(job(id).checkpoints(0).step(), 3);
  EXPECT_EQ(job(id).checkpoints(2).step(), 5);
}

TEST_F(CoreTest, LogsOfWorkersAreKeptUnderTheirName) {
  std::string id;
  const auto w = RunningJob(1, &id);
  v1::WorkerMessage message;
  message.mutable_log()->set_job(id);
  message.mutable_log()->add_lines()->set_text("hello");
  message.mutable_log()->mutable_lines(0)->set_worker("somebody else");
  message.mutable_log()->add_lines()->set_text(std::string(10'000, 'x'));
  Give(WorkerSaid{w[0], message});
  Persist();
  std::vector<v1::LogLine> lines;
  for (const LogRecord& record : logs) {
    if (!record.line.worker().empty()) lines.push_back(record.line);
  }
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].worker(), "w0");
  EXPECT_EQ(lines[0].unix_ms(), absl::ToUnixMillis(now));
  EXPECT_EQ(lines[1].text().size(), 4096u + 3);
}

TEST_F(CoreTest, ShutdownFailsWhatRunsAndTellsEverybody) {
  std::string id;
  const auto w = RunningJob(2, &id);
  SayStep(w[0], id, 5);
  const std::string waiting = SubmitJob(1);
  Give(Shutdown());
  EXPECT_EQ(job(id).state(), v1::FAILED);
  EXPECT_EQ(job(id).reason(), "the coordinator was stopped at step 5");
  EXPECT_EQ(job(waiting).state(), v1::QUEUED);
  EXPECT_EQ(closed.at(w[0]).code(), absl::StatusCode::kUnavailable);
  const CallId late = Ask(Submit{0, {}});
  Persist();
  EXPECT_EQ(replies.at(late).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(CoreTest, LostWorkersAreForgottenWhenTheyAreMany) {
  for (int i = 0; i < 400; ++i) {
    Give(StreamLost{AddWorker(absl::StrCat("w", i), 1), "connection closed"});
    now += absl::Seconds(1);
  }
  EXPECT_LE(core->workers().size(), 257u);
  EXPECT_EQ(core->workers().count("w399"), 1u);
  EXPECT_EQ(core->workers().count("w0"), 0u);
}

}  // namespace
}  // namespace lockstep::server
