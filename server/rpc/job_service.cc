#include "server/rpc/job_service.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/status.h"
#include "common/spec/spec.h"
#include "common/status_macros.h"
#include "server/store/store.h"

namespace lockstep::server {
namespace {

constexpr absl::Duration kLongestCall = absl::Seconds(30);  // where the client set no deadline
constexpr absl::Duration kLookForCancelEvery = absl::Milliseconds(500);
constexpr int kEventsPerRead = 256;
constexpr int kStepsPerChunk = 1000;  // about 150 bytes each
constexpr int kLinesPerChunk = 200;   // at most 4 KiB each

absl::Duration TimeLeft(const grpc::ServerContext* context) {
  const absl::Duration left = absl::FromChrono(context->deadline()) - absl::Now();
  return std::clamp(left, absl::ZeroDuration(), kLongestCall);
}

absl::Status ClientGone() { return absl::CancelledError("the client went away"); }

}  // namespace

grpc::Status JobService::SubmitJob(grpc::ServerContext* context,
                                   const v1::SubmitJobRequest* request,
                                   v1::SubmitJobResponse* response) {
  absl::StatusOr<v1::JobSpec> spec = spec::Normalize(request->spec());
  if (!spec.ok()) return rpc::ToGrpc(spec.status());
  const absl::Status fits = spec::BuildGraph(*spec).status();
  if (!fits.ok()) return rpc::ToGrpc(fits);
  Submit submit{0, *request};
  *submit.request.mutable_spec() = *std::move(spec);
  absl::StatusOr<v1::Job> job = driver_.Call(std::move(submit), TimeLeft(context));
  if (!job.ok()) return rpc::ToGrpc(job.status());
  *response->mutable_job() = *std::move(job);
  return grpc::Status::OK;
}

grpc::Status JobService::GetJob(grpc::ServerContext*, const v1::GetJobRequest* request,
                                v1::Job* response) {
  absl::StatusOr<v1::Job> job = published_.FindJob(request->job());
  if (job.ok()) *response = *std::move(job);
  return rpc::ToGrpc(job.status());
}

grpc::Status JobService::ListJobs(grpc::ServerContext*, const v1::ListJobsRequest*,
                                  v1::ListJobsResponse* response) {
  for (v1::Job& job : published_.Jobs()) *response->add_jobs() = std::move(job);
  return grpc::Status::OK;
}

grpc::Status JobService::CancelJob(grpc::ServerContext* context,
                                   const v1::CancelJobRequest* request, v1::Job* response) {
  absl::StatusOr<v1::Job> job = driver_.Call(Cancel{0, request->job()}, TimeLeft(context));
  if (job.ok()) *response = *std::move(job);
  return rpc::ToGrpc(job.status());
}

grpc::Status JobService::ListWorkers(grpc::ServerContext*, const v1::ListWorkersRequest*,
                                     v1::ListWorkersResponse* response) {
  driver_.Read([response](const Core& core) {
    for (v1::WorkerInfo& info : core.DescribeWorkers()) *response->add_workers() = std::move(info);
  });
  return grpc::Status::OK;
}

grpc::Status JobService::WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                                  grpc::ServerWriter<v1::JobEvent>* writer) {
  return rpc::ToGrpc(Watch(context, *request, writer));
}

grpc::Status JobService::GetMetrics(grpc::ServerContext*, const v1::GetMetricsRequest* request,
                                    grpc::ServerWriter<v1::MetricsChunk>* writer) {
  return rpc::ToGrpc(SendMetrics(*request, writer));
}

grpc::Status JobService::GetLogs(grpc::ServerContext* context, const v1::GetLogsRequest* request,
                                 grpc::ServerWriter<v1::LogChunk>* writer) {
  return rpc::ToGrpc(SendLogs(context, *request, writer));
}

absl::Status JobService::StillWanted(grpc::ServerContext* context) const {
  if (context->IsCancelled()) return ClientGone();
  if (published_.stopped()) return absl::UnavailableError("the coordinator is stopping");
  return absl::OkStatus();
}

absl::Status JobService::Watch(grpc::ServerContext* context, const v1::WatchJobRequest& request,
                               grpc::ServerWriter<v1::JobEvent>* writer) {
  ASSIGN_OR_RETURN(Published::Position position, published_.FindPosition(request.job()));
  ASSIGN_OR_RETURN(std::unique_ptr<StoreReader> reader, StoreReader::Open(data_dir_));
  int64_t sent = std::max<int64_t>(0, request.after_sequence());
  while (true) {
    while (sent < position.sequence) {
      ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events,
                       reader->Events(position.number, sent, kEventsPerRead));
      if (events.empty()) break;
      for (const v1::JobEvent& event : events) {
        if (!writer->Write(event)) return ClientGone();
        sent = event.sequence();
      }
    }
    if (position.ended) return absl::OkStatus();
    RETURN_IF_ERROR(StillWanted(context));
    position = published_.WaitForChange(position, kLookForCancelEvery);
  }
}

absl::Status JobService::SendMetrics(const v1::GetMetricsRequest& request,
                                     grpc::ServerWriter<v1::MetricsChunk>* writer) {
  ASSIGN_OR_RETURN(const Published::Position position, published_.FindPosition(request.job()));
  ASSIGN_OR_RETURN(std::unique_ptr<StoreReader> reader, StoreReader::Open(data_dir_));
  const int64_t last =
      request.last_step() > 0 ? request.last_step() : std::numeric_limits<int64_t>::max();
  int64_t next = std::max<int64_t>(0, request.first_step());
  while (next <= last) {
    ASSIGN_OR_RETURN(std::vector<v1::StepMetrics> steps,
                     reader->Steps(position.number, next, last, kStepsPerChunk));
    if (steps.empty()) break;
    v1::MetricsChunk chunk;
    next = steps.back().step() + 1;
    for (v1::StepMetrics& step : steps) *chunk.add_steps() = std::move(step);
    if (!writer->Write(chunk)) return ClientGone();
  }
  ASSIGN_OR_RETURN(std::vector<v1::Evaluation> evaluations,
                   reader->Evaluations(position.number, request.first_step(), last));
  v1::MetricsChunk chunk;
  for (v1::Evaluation& evaluation : evaluations) {
    *chunk.add_evaluations() = std::move(evaluation);
    if (chunk.evaluations_size() < kStepsPerChunk) continue;
    if (!writer->Write(chunk)) return ClientGone();
    chunk.Clear();
  }
  if (chunk.evaluations_size() > 0 && !writer->Write(chunk)) return ClientGone();
  return absl::OkStatus();
}

absl::Status JobService::SendLogs(grpc::ServerContext* context, const v1::GetLogsRequest& request,
                                  grpc::ServerWriter<v1::LogChunk>* writer) {
  ASSIGN_OR_RETURN(Published::Position position, published_.FindPosition(request.job()));
  ASSIGN_OR_RETURN(std::unique_ptr<StoreReader> reader, StoreReader::Open(data_dir_));
  int64_t cursor = 0;
  while (true) {
    while (true) {
      ASSIGN_OR_RETURN(std::vector<v1::LogLine> lines,
                       reader->Logs(position.number, &cursor, kLinesPerChunk));
      if (lines.empty()) break;
      v1::LogChunk chunk;
      for (v1::LogLine& line : lines) *chunk.add_lines() = std::move(line);
      if (!writer->Write(chunk)) return ClientGone();
    }
    if (!request.follow() || position.ended) return absl::OkStatus();
    RETURN_IF_ERROR(StillWanted(context));
    position = published_.WaitForChange(position, kLookForCancelEvery);
  }
}

}  // namespace lockstep::server
