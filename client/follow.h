// Following a job to its end. Thread-safe as far as its arguments are.
#pragma once

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/job_client.h"
#include "client/progress.h"

namespace lockstep::client {

// Shows every event of the job, from its first, and hands it to `on_event`; returns the job as it
// ended. Errors are JobClient's; a coordinator that went away is waited for during `patience`.
absl::StatusOr<v1::Job> FollowJob(JobClient& client, const std::string& job,
                                  absl::Duration patience, Progress& progress,
                                  const std::function<void(const v1::JobEvent&)>& on_event);

}  // namespace lockstep::client
