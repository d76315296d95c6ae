// Calls to a coordinator's JobService, each with a deadline; streams live as long as the connection
// answers its probes (common/rpc/channel.h) and until Stop.
//
// Errors are the coordinator's own. Unavailable and DeadlineExceeded say how to start a coordinator
// or name another; Cancelled: Stop was called. Thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "lockstep/v1/client.pb.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::client {

class JobClient {
 public:
  // To "host:port" (see CheckPlaintext); connects with the first call.
  explicit JobClient(const std::string& address);
  ~JobClient();
  JobClient(const JobClient&) = delete;

  absl::StatusOr<v1::Job> Submit(const v1::SubmitJobRequest& request);
  absl::StatusOr<v1::Job> Get(const std::string& job);
  absl::StatusOr<v1::ListJobsResponse> Jobs();
  absl::StatusOr<v1::Job> Cancel(const std::string& job, absl::Duration timeout);
  absl::StatusOr<v1::ListWorkersResponse> Workers();
  absl::Status Metrics(const std::string& job,
                       const std::function<void(const v1::MetricsChunk&)>& on_chunk);
  absl::Status Logs(const std::string& job, bool follow,
                    const std::function<void(const v1::LogChunk&)>& on_chunk);

  // Calls `on_event` for every event of the job after `after_sequence`, on this thread, and returns
  // OK when the job has ended. A lost connection is made again for `patience` since it last
  // answered; no event is repeated or missed.
  absl::Status Watch(const std::string& job, int64_t after_sequence, absl::Duration patience,
                     const std::function<void(const v1::JobEvent&)>& on_event);

  // Ends every call in progress and all later ones with Cancelled. For good.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::client
