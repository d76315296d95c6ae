#include "client/job_client.h"

#include <grpcpp/client_context.h>

#include <chrono>
#include <set>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/rpc/status.h"
#include "lockstep/v1/client.grpc.pb.h"

namespace lockstep::client {
namespace {

constexpr absl::Duration kCallTimeout = absl::Seconds(10);

}  // namespace

class JobClient::Impl {
 public:
  explicit Impl(const std::string& address)
      : address_(address), stub_(v1::JobService::NewStub(rpc::MakeChannel(address))) {}

  // The context of one call, which Stop can end.
  class Call {
   public:
    Call(Impl& impl, absl::Duration timeout) : impl_(impl) {
      if (timeout < absl::InfiniteDuration()) {
        context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
      }
      absl::MutexLock lock(&impl_.mutex_);
      impl_.calls_.insert(&context_);
      if (impl_.stopped_) context_.TryCancel();
    }
    ~Call() {
      absl::MutexLock lock(&impl_.mutex_);
      impl_.calls_.erase(&context_);
    }
    grpc::ClientContext* context() { return &context_; }

   private:
    Impl& impl_;
    grpc::ClientContext context_;
  };

  absl::Status Result(const grpc::Status& status) {
    const absl::Status result = rpc::FromGrpc(status);
    if (result.ok()) return result;
    if (stopped()) return absl::CancelledError("interrupted");
    if (absl::IsUnavailable(result)) {
      return absl::UnavailableError(absl::StrCat(
          "no coordinator answers at ", address_, "; start one (lockstep-server --listen ",
          address_, " --data-dir DIR) or name another with --coordinator HOST:PORT"));
    }
    if (absl::IsDeadlineExceeded(result)) {
      return absl::DeadlineExceededError(
          absl::StrCat("the coordinator at ", address_, " did not answer within ",
                       absl::FormatDuration(kCallTimeout), "; see its log, or try again"));
    }
    if (absl::IsUnimplemented(result)) {
      return absl::UnimplementedError(
          absl::StrCat("what answers at ", address_, " is not a lockstep-server of this version"));
    }
    return result;
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> Unary(grpc::Status (v1::JobService::Stub::*method)(grpc::ClientContext*,
                                                                              const Request&,
                                                                              Response*),
                                 const Request& request, absl::Duration timeout) {
    Call call(*this, timeout);
    Response response;
    const absl::Status status = Result((stub_.get()->*method)(call.context(), request, &response));
    if (!status.ok()) return status;
    return response;
  }

  // Reads a stream to its end.
  template <typename Request, typename Message>
  absl::Status Stream(std::unique_ptr<grpc::ClientReader<Message>> (v1::JobService::Stub::*method)(
                          grpc::ClientContext*, const Request&),
                      const Request& request, absl::Duration timeout,
                      const std::function<void(const Message&)>& on_message) {
    Call call(*this, timeout);
    auto reader = (stub_.get()->*method)(call.context(), request);
    Message message;
    while (reader->Read(&message)) on_message(message);
    return Result(reader->Finish());
  }

  void Stop() {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    for (grpc::ClientContext* context : calls_) context->TryCancel();
  }

  bool stopped() {
    absl::MutexLock lock(&mutex_);
    return stopped_;
  }

  // False where Stop was called.
  bool Pause(absl::Duration duration) {
    absl::MutexLock lock(&mutex_);
    return !mutex_.AwaitWithTimeout(absl::Condition(&stopped_), duration);
  }

 private:
  const std::string address_;
  const std::unique_ptr<v1::JobService::Stub> stub_;
  absl::Mutex mutex_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<grpc::ClientContext*> calls_ ABSL_GUARDED_BY(mutex_);
};

JobClient::JobClient(const std::string& address) : impl_(std::make_unique<Impl>(address)) {}
JobClient::~JobClient() = default;

absl::StatusOr<v1::Job> JobClient::Submit(const v1::SubmitJobRequest& request) {
  auto response = impl_->Unary(&v1::JobService::Stub::SubmitJob, request, kCallTimeout);
  if (!response.ok()) return response.status();
  return response->job();
}

absl::StatusOr<v1::Job> JobClient::Get(const std::string& job) {
  v1::GetJobRequest request;
  request.set_job(job);
  return impl_->Unary(&v1::JobService::Stub::GetJob, request, kCallTimeout);
}

absl::StatusOr<v1::ListJobsResponse> JobClient::Jobs() {
  return impl_->Unary(&v1::JobService::Stub::ListJobs, v1::ListJobsRequest(), kCallTimeout);
}

absl::StatusOr<v1::Job> JobClient::Cancel(const std::string& job, absl::Duration timeout) {
  v1::CancelJobRequest request;
  request.set_job(job);
  return impl_->Unary(&v1::JobService::Stub::CancelJob, request, timeout);
}

absl::StatusOr<v1::ListWorkersResponse> JobClient::Workers() {
  return impl_->Unary(&v1::JobService::Stub::ListWorkers, v1::ListWorkersRequest(), kCallTimeout);
}

absl::Status JobClient::Metrics(const std::string& job,
                                const std::function<void(const v1::MetricsChunk&)>& on_chunk) {
  v1::GetMetricsRequest request;
  request.set_job(job);
  return impl_->Stream(&v1::JobService::Stub::GetMetrics, request, absl::Minutes(5), on_chunk);
}

absl::Status JobClient::Logs(const std::string& job, bool follow,
                             const std::function<void(const v1::LogChunk&)>& on_chunk) {
  v1::GetLogsRequest request;
  request.set_job(job);
  request.set_follow(follow);
  return impl_->Stream(&v1::JobService::Stub::GetLogs, request,
                       follow ? absl::InfiniteDuration() : absl::Minutes(5), on_chunk);
}

absl::Status JobClient::Watch(const std::string& job, int64_t after_sequence,
                              absl::Duration patience,
                              const std::function<void(const v1::JobEvent&)>& on_event) {
  absl::Time answered = absl::Now();
  bool ever = false;
  while (true) {
    v1::WatchJobRequest request;
    request.set_job(job);
    request.set_after_sequence(after_sequence);
    const std::function<void(const v1::JobEvent&)> on_message = [&](const v1::JobEvent& event) {
      ever = true;
      answered = absl::Now();
      if (event.sequence() <= after_sequence) return;
      after_sequence = event.sequence();
      on_event(event);
    };
    const absl::Time called = absl::Now();
    const absl::Status status = impl_->Stream(&v1::JobService::Stub::WatchJob, request,
                                              absl::InfiniteDuration(), on_message);
    if (!absl::IsUnavailable(status)) return status;
    // A stream that lasted was answered by the connection's probes, events or not.
    if (ever && absl::Now() - called > absl::Seconds(2)) answered = absl::Now();
    if (!ever || absl::Now() - answered > patience) return status;
    if (!impl_->Pause(absl::Milliseconds(200))) return absl::CancelledError("interrupted");
  }
}

void JobClient::Stop() { impl_->Stop(); }

}  // namespace lockstep::client
