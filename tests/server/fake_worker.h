// A worker on the wire without training: a raw stream to a coordinator.
//
// Thread-compatible. Every wait ends with the stream's deadline of 30 seconds.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <string>

#include "common/rpc/channel.h"
#include "common/rpc/status.h"
#include "lockstep/v1/worker.grpc.pb.h"

namespace lockstep::server {

class FakeWorker {
 public:
  explicit FakeWorker(const std::string& address)
      : stub_(v1::WorkerService::NewStub(rpc::MakeChannel(address))) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    stream_ = stub_->Connect(&context_);
  }

  // Registered, when it returns.
  FakeWorker(const std::string& address, const std::string& name, int slots,
             uint64_t incarnation = 1)
      : FakeWorker(address) {
    SayRegister(name, slots, incarnation);
    Expect(v1::CoordinatorMessage::kRegistered);
  }

  ~FakeWorker() {
    context_.TryCancel();
    if (!finished_) (void)Finish();
  }

  bool SayRegister(const std::string& name, int slots, uint64_t incarnation) {
    v1::WorkerMessage message;
    v1::Register& reg = *message.mutable_register_();
    reg.set_name(name);
    reg.set_incarnation(incarnation);
    reg.set_host("here");
    reg.set_device("cpu");
    reg.set_slots(slots);
    return Say(message);
  }

  bool Say(const v1::WorkerMessage& message) { return stream_->Write(message); }

  // The next message of that kind; the others are passed over. Default-constructed at the stream's
  // end.
  v1::CoordinatorMessage Expect(v1::CoordinatorMessage::MessageCase kind) {
    v1::CoordinatorMessage message;
    while (stream_->Read(&message)) {
      if (message.message_case() == kind) return message;
    }
    return {};
  }

  bool SayReady(const v1::Prepare& prepare) {
    v1::WorkerMessage message;
    v1::Ready& ready = *message.mutable_ready();
    ready.set_job(prepare.job());
    ready.set_generation(prepare.generation());
    ready.set_state_version(-1);
    return Say(message);
  }

  bool SaySteps(const v1::Prepare& prepare, int64_t first, int64_t last) {
    v1::WorkerMessage message;
    v1::Progress& progress = *message.mutable_progress();
    progress.set_job(prepare.job());
    progress.set_generation(prepare.generation());
    progress.set_total_steps(1000);
    progress.set_steps_per_epoch(100);
    for (int64_t step = first; step <= last; ++step) {
      progress.add_steps()->set_step(step);
      progress.mutable_steps(progress.steps_size() - 1)->mutable_train()->set_loss(1.0);
    }
    progress.add_evaluations()->set_step(last);
    return Say(message);
  }

  bool SayLog(const v1::Prepare& prepare, const std::string& text) {
    v1::WorkerMessage message;
    message.mutable_log()->set_job(prepare.job());
    message.mutable_log()->add_lines()->set_text(text);
    return Say(message);
  }

  bool SayEnded(const v1::Prepare& prepare, v1::Ended::Outcome outcome,
                const std::string& error = "") {
    v1::WorkerMessage message;
    v1::Ended& ended = *message.mutable_ended();
    ended.set_job(prepare.job());
    ended.set_generation(prepare.generation());
    ended.set_outcome(outcome);
    ended.set_error(error);
    return Say(message);
  }

  // Prepare -> Ready -> Start of the next job.
  v1::Prepare StartJob() {
    const v1::Prepare prepare = Expect(v1::CoordinatorMessage::kPrepare).prepare();
    SayReady(prepare);
    Expect(v1::CoordinatorMessage::kStart);
    return prepare;
  }

  // As if the process were killed.
  void Die() { context_.TryCancel(); }

  absl::Status Finish() {
    finished_ = true;
    return rpc::FromGrpc(stream_->Finish());
  }

 private:
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>> stream_;
  bool finished_ = false;
};

}  // namespace lockstep::server
