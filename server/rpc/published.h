// What clients may be shown: the jobs as they are stored. Nothing that a crash could take back is
// in it.
//
// Thread-safe. The store's thread applies writes once they are committed; handlers read and wait.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/core/events.h"

namespace lockstep::server {

class Published {
 public:
  // How far a job has come in the store.
  struct Position {
    int64_t number = 0;
    int64_t sequence = 0;   // of its last event
    int64_t log_lines = 0;  // since this process began
    bool ended = false;
  };

  explicit Published(const std::vector<StoredJob>& jobs);

  void Apply(const std::vector<Write>& writes) ABSL_LOCKS_EXCLUDED(mutex_);
  // Wakes all who wait, for good.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_);
  bool stopped() const ABSL_LOCKS_EXCLUDED(mutex_);

  // NotFound: no such job.
  absl::StatusOr<v1::Job> FindJob(const std::string& id) const ABSL_LOCKS_EXCLUDED(mutex_);
  absl::StatusOr<Position> FindPosition(const std::string& id) const ABSL_LOCKS_EXCLUDED(mutex_);
  std::vector<v1::Job> Jobs() const ABSL_LOCKS_EXCLUDED(mutex_);  // in the order of submission

  // Until the job is further than `seen`, or Stop, or the timeout; where it is then.
  Position WaitForChange(const Position& seen, absl::Duration timeout) const
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Entry {
    v1::Job job;
    Position position;
  };
  absl::StatusOr<int64_t> NumberOf(const std::string& id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  mutable absl::CondVar changed_;
  std::map<int64_t, Entry> jobs_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int64_t> numbers_ ABSL_GUARDED_BY(mutex_);
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace lockstep::server
