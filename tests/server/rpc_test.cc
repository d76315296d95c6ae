// A real server on a loopback port, with workers and clients that speak to it over the wire.
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/rpc/monotonic_clock.h"
#include "server/rpc/server.h"
#include "tests/common/temporary_folder.h"
#include "tests/server/client.h"
#include "tests/server/fake_worker.h"

namespace lockstep::server {
namespace {

using testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

class RpcTest : public testing::Test {
 protected:
  RpcTest() { StartServer(); }

  void StartServer() {
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    options.data_dir = folder_.path();
    options.core.expiry = absl::Minutes(1);  // a FakeWorker sends no heartbeats
    auto server = Server::Start(options, clock_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    client_ = std::make_unique<Client>(address());
  }

  std::string address() const { return server_->address(); }

  std::string SubmitSmall(int slots = 1) {
    const auto job = client_->Submit(SmallSpec(slots));
    EXPECT_TRUE(job.ok()) << job.status();
    return job.ok() ? job->id() : "";
  }

  // One request of raw bytes to any method, streaming or not.
  absl::Status CallRaw(const std::string& method, const std::string& bytes, std::string* response) {
    grpc::GenericStub stub(rpc::MakeChannel(address()));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    grpc::Slice slice(bytes);
    grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer reply;
    grpc::CompletionQueue queue;
    auto call = stub.PrepareUnaryCall(&context, method, request, &queue);
    call->StartCall();
    grpc::Status status;
    call->Finish(&reply, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    std::vector<grpc::Slice> slices;
    if (response != nullptr && status.ok() && reply.Dump(&slices).ok()) {
      for (const grpc::Slice& s : slices) response->append(s.begin(), s.end());
    }
    return rpc::FromGrpc(status);
  }

  TemporaryFolder folder_;
  MonotonicClock clock_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(RpcTest, AJobGoesFromSubmissionToMetrics) {
  FakeWorker worker(address(), "w0", 2);
  const std::string job = SubmitSmall(2);
  std::vector<v1::JobEvent> events;
  absl::Status watched;
  std::thread watcher([&] { watched = client_->Watch(job, 0, &events); });
  const v1::Prepare prepare = worker.StartJob();
  EXPECT_EQ(prepare.spec().train().shards(), 8) << "the spec's defaults are filled in";
  worker.SaySteps(prepare, 1, 1500);
  worker.SayLog(prepare, "half way");
  worker.SaySteps(prepare, 1501, 3000);
  worker.SayEnded(prepare, v1::Ended::COMPLETED);
  watcher.join();

  EXPECT_EQ(watched, absl::OkStatus());
  int64_t sequence = 0;
  int64_t steps = 0;
  for (const v1::JobEvent& event : events) {
    EXPECT_EQ(event.sequence(), ++sequence);
    if (!event.has_step()) continue;
    EXPECT_EQ(event.step().step(), ++steps);
  }
  EXPECT_EQ(steps, 3000);
  EXPECT_EQ(events.back().job().state(), v1::SUCCEEDED);
  EXPECT_EQ(client_->Get(job)->state(), v1::SUCCEEDED);

  const auto metrics = client_->Metrics(job);
  ASSERT_TRUE(metrics.ok()) << metrics.status();
  ASSERT_EQ(metrics->steps_size(), 3000);
  EXPECT_EQ(metrics->steps(2999).step(), 3000);
  EXPECT_EQ(metrics->evaluations_size(), 2);
  EXPECT_EQ(client_->Metrics(job, 10, 12)->steps_size(), 3);
  EXPECT_EQ(client_->Metrics(job, 2999)->steps_size(), 2);

  const auto lines = client_->Logs(job, true);
  ASSERT_TRUE(lines.ok()) << lines.status();
  EXPECT_EQ(lines->front().text(), "generation 1: w0 slots 0-1 (shards 0 to 7)");
  EXPECT_EQ((*lines)[1].text(), "half way");
  EXPECT_EQ((*lines)[1].worker(), "w0");
  EXPECT_EQ(lines->back().text(), "SUCCEEDED");
}

TEST_F(RpcTest, WatchingGoesOnWhereItStopped) {
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  const v1::Prepare prepare = worker.StartJob();
  worker.SaySteps(prepare, 1, 50);
  worker.SayEnded(prepare, v1::Ended::COMPLETED);
  std::vector<v1::JobEvent> all;
  ASSERT_EQ(client_->Watch(job, 0, &all), absl::OkStatus());
  std::vector<v1::JobEvent> rest;
  ASSERT_EQ(client_->Watch(job, all[20].sequence(), &rest), absl::OkStatus());
  ASSERT_EQ(rest.size(), all.size() - 21);
  EXPECT_EQ(rest.front().sequence(), all[21].sequence());
  rest.clear();
  EXPECT_EQ(client_->Watch(job, 1'000'000, &rest), absl::OkStatus());
  EXPECT_TRUE(rest.empty());
}

TEST_F(RpcTest, FollowedLogsEndWithTheJob) {
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  absl::StatusOr<std::vector<v1::LogLine>> lines = absl::UnknownError("");
  std::thread follower([&] { lines = client_->Logs(job, true); });
  const v1::Prepare prepare = worker.StartJob();
  worker.SayLog(prepare, "only line");
  worker.SayEnded(prepare, v1::Ended::ERRORED, "slot 0: disk full");
  follower.join();
  ASSERT_TRUE(lines.ok()) << lines.status();
  ASSERT_EQ(lines->size(), 3u);
  EXPECT_EQ((*lines)[2].severity(), "ERROR");
  EXPECT_THAT((*lines)[2].text(), HasSubstr("worker w0 failed at step 0: slot 0: disk full"));
}

TEST_F(RpcTest, AWrongSpecIsRefusedWithItsField) {
  v1::JobSpec spec = SmallSpec();
  spec.mutable_train()->set_batch(-3);
  const auto job = client_->Submit(spec);
  EXPECT_EQ(job.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(job.status()), HasSubstr("train.batch"));

  spec = SmallSpec();
  spec.mutable_model()->clear_preset();
  spec.mutable_model()->add_layers()->set_type("dense");
  spec.mutable_model()->mutable_layers(0)->set_units(10);
  spec.mutable_model()->mutable_layers(0)->add_inputs("nowhere");
  EXPECT_EQ(client_->Submit(spec).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(client_->List().empty());
}

TEST_F(RpcTest, ARepeatedRequestIsOneJob) {
  const auto first = client_->Submit(SmallSpec(), "retry");
  const auto second = client_->Submit(SmallSpec(), "retry");
  EXPECT_EQ(first->id(), second->id());
  EXPECT_EQ(client_->List().size(), 1u);
}

TEST_F(RpcTest, AnUnknownJobIsNotFoundEverywhere) {
  std::vector<v1::JobEvent> events;
  for (const absl::Status& status :
       {client_->Get("x-1").status(), client_->Cancel("x-1").status(),
        client_->Watch("x-1", 0, &events), client_->Metrics("x-1").status(),
        client_->Logs("x-1", true).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(Message(status), "there is no job 'x-1'");
  }
}

TEST_F(RpcTest, CancellingFreesTheSlots) {
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  const v1::Prepare prepare = worker.StartJob();
  const std::string next = SubmitSmall();
  EXPECT_THAT(client_->Get(next)->reason(), HasSubstr("waits for 1 slot of device cpu"));
  const auto cancelled = client_->Cancel(job);
  ASSERT_TRUE(cancelled.ok()) << cancelled.status();
  EXPECT_EQ(cancelled->target(), v1::CANCELLED);
  EXPECT_TRUE(worker.Expect(v1::CoordinatorMessage::kControl).control().stop());
  worker.SayEnded(prepare, v1::Ended::STOPPED);
  EXPECT_EQ(worker.StartJob().job(), next);
  EXPECT_EQ(client_->Get(job)->state(), v1::CANCELLED);
}

TEST_F(RpcTest, ADyingWorkerFailsItsJobAndIsUsableWhenItReturns) {
  const std::string job = SubmitSmall();
  {
    FakeWorker worker(address(), "w0", 1);
    const v1::Prepare prepare = worker.StartJob();
    worker.SaySteps(prepare, 1, 7);
    ASSERT_TRUE(client_->WaitFor(job, v1::RUNNING));
    std::vector<v1::JobEvent> events;
    ASSERT_EQ(
        client_->Watch(job, 0, &events, [](const v1::JobEvent& e) { return e.step().step() == 7; }),
        absl::OkStatus());
    worker.Die();
    EXPECT_TRUE(client_->WaitFor(job, v1::FAILED));
  }
  EXPECT_EQ(client_->Get(job)->reason(), "worker w0 (slot 0) lost at step 7: connection closed");
  EXPECT_EQ(client_->Workers()[0].state(), "LOST");
  FakeWorker again(address(), "w0", 1, 2);
  const std::string next = SubmitSmall();
  EXPECT_EQ(again.StartJob().job(), next);
}

TEST_F(RpcTest, TwoWorkersOfOneNameCannotBothConnect) {
  FakeWorker first(address(), "w0", 1, 1);
  FakeWorker second(address());
  second.SayRegister("w0", 1, 2);
  second.Expect(v1::CoordinatorMessage::kRegistered);
  const absl::Status status = second.Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(Message(status), HasSubstr("a worker named w0 is connected already"));
  EXPECT_EQ(client_->Workers().size(), 1u);
}

TEST_F(RpcTest, TheFirstMessageMustBeRegister) {
  FakeWorker worker(address());
  v1::WorkerMessage message;
  message.mutable_heartbeat();
  worker.Say(message);
  worker.Expect(v1::CoordinatorMessage::kRegistered);
  EXPECT_EQ(worker.Finish().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(RpcTest, MalformedBytesAreAnErrorAndHarmNobody) {
  const std::string garbage = "\xff\xff\xff\xff not a message";
  for (const char* method :
       {"/lockstep.v1.WorkerService/Connect", "/lockstep.v1.JobService/SubmitJob",
        "/lockstep.v1.JobService/WatchJob", "/lockstep.v1.JobService/Nonsense"}) {
    EXPECT_FALSE(CallRaw(method, garbage, nullptr).ok()) << method;
  }
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  EXPECT_EQ(worker.StartJob().job(), job);
}

TEST_F(RpcTest, OversizedMessagesAreRefused) {
  v1::JobSpec spec = SmallSpec();
  spec.mutable_data()->set_path(std::string(5 << 20, 'x'));
  EXPECT_EQ(client_->Submit(spec).status().code(), absl::StatusCode::kResourceExhausted);

  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  const v1::Prepare prepare = worker.StartJob();
  worker.SayLog(prepare, std::string(5 << 20, 'x'));
  worker.Expect(v1::CoordinatorMessage::kControl);
  EXPECT_EQ(worker.Finish().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(client_->WaitFor(job, v1::FAILED));
}

// It says things that are answered and never reads an answer.
TEST_F(RpcTest, AWorkerThatDoesNotReadIsCutOff) {
  FakeWorker worker(address(), "deaf", 1);
  v1::WorkerMessage message;
  message.mutable_ready()->set_job(std::string(1000, 'x'));
  message.mutable_ready()->set_generation(1);
  int64_t said = 0;
  while (said < 200'000 && worker.Say(message)) ++said;
  EXPECT_LT(said, 200'000);
  // Until the coordinator has seen the end of the connection, the job may go to the deaf one.
  const auto lost = [this] {
    const std::vector<v1::WorkerInfo> workers = client_->Workers();
    return workers.size() == 1 && workers[0].state() == "LOST";
  };
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!lost() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_TRUE(lost());
  FakeWorker other(address(), "w0", 1);
  const std::string job = SubmitSmall();
  EXPECT_EQ(other.StartJob().job(), job);
}

TEST_F(RpcTest, AWatcherThatDoesNotReadHoldsUpNobody) {
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  auto stub = v1::JobService::NewStub(rpc::MakeChannel(address()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  v1::WatchJobRequest request;
  request.set_job(job);
  auto deaf = stub->WatchJob(&context, request);
  const v1::Prepare prepare = worker.StartJob();
  for (int64_t step = 1; step < 20'000; step += 1000) worker.SaySteps(prepare, step, step + 999);
  worker.SayEnded(prepare, v1::Ended::COMPLETED);
  EXPECT_TRUE(client_->WaitFor(job, v1::SUCCEEDED));
  EXPECT_EQ(client_->Metrics(job)->steps_size(), 20'000);
  context.TryCancel();
  v1::JobEvent event;
  while (deaf->Read(&event)) {
  }
  deaf->Finish();
}

TEST_F(RpcTest, WhatIsStoredIsThereAfterARestart) {
  std::string done;
  {
    FakeWorker worker(address(), "w0", 1);
    done = SubmitSmall();
    const v1::Prepare prepare = worker.StartJob();
    worker.SaySteps(prepare, 1, 30);
    worker.SayEnded(prepare, v1::Ended::COMPLETED);
    ASSERT_TRUE(client_->WaitFor(done, v1::SUCCEEDED));
  }
  const std::string waiting = SubmitSmall(2);  // more slots than the worker had
  server_.reset();
  StartServer();
  EXPECT_EQ(client_->Get(done)->state(), v1::SUCCEEDED);
  EXPECT_EQ(client_->Metrics(done)->steps_size(), 30);
  EXPECT_EQ(client_->Logs(done, true)->size(), 2u);
  EXPECT_EQ(client_->Get(waiting)->state(), v1::QUEUED);
  FakeWorker worker(address(), "w0", 2);
  EXPECT_EQ(worker.StartJob().job(), waiting);
}

TEST_F(RpcTest, ShutdownTellsWorkersAndWatchers) {
  FakeWorker worker(address(), "w0", 1);
  const std::string job = SubmitSmall();
  const v1::Prepare prepare = worker.StartJob();
  const std::string waiting = SubmitSmall();
  absl::Status watched;
  std::vector<v1::JobEvent> events;
  absl::Notification watching;
  std::thread watcher([&] {
    watched = client_->Watch(waiting, 0, &events, [&](const v1::JobEvent&) {
      if (!watching.HasBeenNotified()) watching.Notify();
      return false;
    });
  });
  watching.WaitForNotification();
  server_->Shutdown();
  worker.Expect(v1::CoordinatorMessage::kControl);
  EXPECT_EQ(worker.Finish().code(), absl::StatusCode::kUnavailable);
  watcher.join();
  EXPECT_EQ(watched.code(), absl::StatusCode::kUnavailable) << watched;
  server_.reset();
  StartServer();
  EXPECT_EQ(client_->Get(job)->reason(), "the coordinator was stopped at step 0");
}

TEST_F(RpcTest, APortInUseIsAnError) {
  TemporaryFolder other;
  ServerOptions options;
  options.listen = address();
  options.data_dir = other.path();
  const auto second = Server::Start(options, clock_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Message(second.status()), absl::StrCat("cannot listen on ", address(),
                                                   ": Address already in use; choose another "
                                                   "--listen"));
}

TEST_F(RpcTest, HealthAndReflectionAnswer) {
  std::string health;
  EXPECT_EQ(CallRaw("/grpc.health.v1.Health/Check", "", &health), absl::OkStatus());
  EXPECT_EQ(health, "\x08\x01");  // SERVING
  std::string reflection;
  const std::string list_services("\x3a\x00", 2);
  EXPECT_EQ(CallRaw("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", list_services,
                    &reflection),
            absl::OkStatus());
  EXPECT_THAT(reflection, HasSubstr("lockstep.v1.JobService"));
  EXPECT_THAT(reflection, HasSubstr("lockstep.v1.WorkerService"));
}

}  // namespace
}  // namespace lockstep::server
