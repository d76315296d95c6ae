// What clients ask: each handler validates, asks the driver or what is published and stored, and
// converts the status.
//
// Thread-safe. Handlers run on gRPC's threads and may block: on the store, or on a client that
// reads slowly.
#pragma once

#include <string>

#include "lockstep/v1/client.grpc.pb.h"
#include "server/rpc/driver.h"
#include "server/rpc/published.h"

namespace lockstep::server {

class JobService : public v1::JobService::Service {
 public:
  // Both must outlive the calls.
  JobService(std::string data_dir, Driver& driver, const Published& published)
      : data_dir_(std::move(data_dir)), driver_(driver), published_(published) {}

  grpc::Status SubmitJob(grpc::ServerContext* context, const v1::SubmitJobRequest* request,
                         v1::SubmitJobResponse* response) override;
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::Job* response) override;
  grpc::Status ListJobs(grpc::ServerContext* context, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override;
  grpc::Status CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                         v1::Job* response) override;
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::JobEvent>* writer) override;
  grpc::Status GetMetrics(grpc::ServerContext* context, const v1::GetMetricsRequest* request,
                          grpc::ServerWriter<v1::MetricsChunk>* writer) override;
  grpc::Status GetLogs(grpc::ServerContext* context, const v1::GetLogsRequest* request,
                       grpc::ServerWriter<v1::LogChunk>* writer) override;
  grpc::Status ListWorkers(grpc::ServerContext* context, const v1::ListWorkersRequest* request,
                           v1::ListWorkersResponse* response) override;

 private:
  absl::Status Watch(grpc::ServerContext* context, const v1::WatchJobRequest& request,
                     grpc::ServerWriter<v1::JobEvent>* writer);
  absl::Status SendMetrics(const v1::GetMetricsRequest& request,
                           grpc::ServerWriter<v1::MetricsChunk>* writer);
  absl::Status SendLogs(grpc::ServerContext* context, const v1::GetLogsRequest& request,
                        grpc::ServerWriter<v1::LogChunk>* writer);
  // OK where waiting may go on.
  absl::Status StillWanted(grpc::ServerContext* context) const;

  const std::string data_dir_;
  Driver& driver_;
  const Published& published_;
};

}  // namespace lockstep::server
