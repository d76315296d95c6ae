// What a client asks of a coordinator, one call a function, each with a deadline of 30 seconds.
//
// Thread-safe.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/rpc/channel.h"
#include "common/rpc/status.h"
#include "lockstep/v1/client.grpc.pb.h"

namespace lockstep::server {

// The smallest spec that is valid.
inline v1::JobSpec SmallSpec(int slots = 1) {
  v1::JobSpec spec;
  spec.set_name("small");
  spec.mutable_data()->set_path("mnist");
  spec.mutable_model()->set_preset("mlp");
  spec.mutable_optimizer()->set_learning_rate(0.1);
  spec.mutable_train()->set_batch(32);
  spec.mutable_train()->set_steps(1000);
  if (slots > 0) spec.mutable_resources()->set_slots(slots);
  return spec;
}

class Client {
 public:
  explicit Client(const std::string& address)
      : stub_(v1::JobService::NewStub(rpc::MakeChannel(address))) {}

  absl::StatusOr<v1::Job> Submit(const v1::JobSpec& spec, const std::string& request_id = "") {
    v1::SubmitJobRequest request;
    *request.mutable_spec() = spec;
    request.set_request_id(request_id);
    v1::SubmitJobResponse response;
    const Context context;
    const absl::Status status = rpc::FromGrpc(stub_->SubmitJob(context.get(), request, &response));
    if (!status.ok()) return status;
    return response.job();
  }

  absl::StatusOr<v1::Job> Get(const std::string& job) {
    v1::GetJobRequest request;
    request.set_job(job);
    v1::Job response;
    const Context context;
    const absl::Status status = rpc::FromGrpc(stub_->GetJob(context.get(), request, &response));
    if (!status.ok()) return status;
    return response;
  }

  absl::StatusOr<v1::Job> Cancel(const std::string& job) {
    v1::CancelJobRequest request;
    request.set_job(job);
    v1::Job response;
    const Context context;
    const absl::Status status = rpc::FromGrpc(stub_->CancelJob(context.get(), request, &response));
    if (!status.ok()) return status;
    return response;
  }

  std::vector<v1::Job> List() {
    v1::ListJobsResponse response;
    const Context context;
    stub_->ListJobs(context.get(), {}, &response);
    return {response.jobs().begin(), response.jobs().end()};
  }

  std::vector<v1::WorkerInfo> Workers() {
    v1::ListWorkersResponse response;
    const Context context;
    stub_->ListWorkers(context.get(), {}, &response);
    return {response.workers().begin(), response.workers().end()};
  }

  // Events until the stream ends, or until `until` is true of one (then OK).
  absl::Status Watch(const std::string& job, int64_t after, std::vector<v1::JobEvent>* events,
                     const std::function<bool(const v1::JobEvent&)>& until = nullptr) {
    v1::WatchJobRequest request;
    request.set_job(job);
    request.set_after_sequence(after);
    const Context context;
    auto reader = stub_->WatchJob(context.get(), request);
    v1::JobEvent event;
    while (reader->Read(&event)) {
      events->push_back(event);
      if (until != nullptr && until(event)) {
        context.get()->TryCancel();
        (void)reader->Finish();
        return absl::OkStatus();
      }
    }
    return rpc::FromGrpc(reader->Finish());
  }

  // Waits until the job is in that state (true), or has ended in another.
  bool WaitFor(const std::string& job, v1::JobState state) {
    std::vector<v1::JobEvent> events;
    (void)Watch(job, 0, &events, [state](const v1::JobEvent& event) {
      return event.has_job() && event.job().state() == state;
    });
    return !events.empty() && events.back().has_job() && events.back().job().state() == state;
  }

  absl::StatusOr<v1::MetricsChunk> Metrics(const std::string& job, int64_t first = 0,
                                           int64_t last = 0) {
    v1::GetMetricsRequest request;
    request.set_job(job);
    request.set_first_step(first);
    request.set_last_step(last);
    const Context context;
    auto reader = stub_->GetMetrics(context.get(), request);
    v1::MetricsChunk all;
    v1::MetricsChunk chunk;
    while (reader->Read(&chunk)) all.MergeFrom(chunk);
    const absl::Status status = rpc::FromGrpc(reader->Finish());
    if (!status.ok()) return status;
    return all;
  }

  absl::StatusOr<std::vector<v1::LogLine>> Logs(const std::string& job, bool follow) {
    v1::GetLogsRequest request;
    request.set_job(job);
    request.set_follow(follow);
    const Context context;
    auto reader = stub_->GetLogs(context.get(), request);
    std::vector<v1::LogLine> lines;
    v1::LogChunk chunk;
    while (reader->Read(&chunk))
      lines.insert(lines.end(), chunk.lines().begin(), chunk.lines().end());
    const absl::Status status = rpc::FromGrpc(reader->Finish());
    if (!status.ok()) return status;
    return lines;
  }

 private:
  class Context {
   public:
    Context() : context_(std::make_unique<grpc::ClientContext>()) {
      context_->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
      context_->set_wait_for_ready(true);
    }
    grpc::ClientContext* get() const { return context_.get(); }

   private:
    std::unique_ptr<grpc::ClientContext> context_;
  };

  std::unique_ptr<v1::JobService::Stub> stub_;
};

}  // namespace lockstep::server
