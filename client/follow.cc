#include "client/follow.h"

#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/format.h"

namespace lockstep::client {

absl::StatusOr<v1::Job> FollowJob(JobClient& client, const std::string& job,
                                  absl::Duration patience, Progress& progress,
                                  const std::function<void(const v1::JobEvent&)>& on_event) {
  absl::Time asked = absl::InfinitePast();
  int warned = 0;
  const auto warn = [&](const v1::Job& now) {
    for (; warned < now.warnings_size(); ++warned) {
      progress.Aside([&] { Warn(now.warnings(warned)); });
    }
  };
  const absl::Status status = client.Watch(job, 0, patience, [&](const v1::JobEvent& event) {
    if (event.has_job()) warn(event.job());
    progress.Add(event);
    on_event(event);
    // The number of steps is known once the data is read, after the last event about the job
    // itself.
    if (event.has_step() && progress.total_steps() == 0 && absl::Now() - asked > absl::Seconds(1)) {
      asked = absl::Now();
      if (const absl::StatusOr<v1::Job> now = client.Get(job); now.ok() && !IsFinal(now->state())) {
        progress.Update(*now);
      }
    }
  });
  if (!status.ok()) return status;
  absl::StatusOr<v1::Job> ended = client.Get(job);
  if (ended.ok()) progress.Update(*ended);
  return ended;
}

}  // namespace lockstep::client
