#include "server/rpc/published.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/core/reason.h"
#include "server/core/state.h"

namespace lockstep::server {

Published::Published(const std::vector<StoredJob>& jobs) {
  for (const StoredJob& job : jobs) {
    const int64_t number = job.record.number;
    const bool ended = HasEnded(job.record.job.state());
    jobs_[number] = Entry{job.record.job, Position{number, job.last_sequence, 0, ended}};
    numbers_[job.record.job.id()] = number;
  }
}

void Published::Apply(const std::vector<Write>& writes) {
  absl::MutexLock lock(&mutex_);
  for (const Write& write : writes) {
    for (const JobRecord& record : write.jobs) {
      Entry& entry = jobs_[record.number];
      entry.job = record.job;
      entry.position.number = record.number;
      entry.position.ended = HasEnded(record.job.state());
      numbers_[record.job.id()] = record.number;
    }
    for (const EventRecord& record : write.events) {
      jobs_[record.job].position.sequence = record.event.sequence();
    }
    for (const LogRecord& record : write.logs) ++jobs_[record.job].position.log_lines;
  }
  changed_.SignalAll();
}

void Published::Stop() {
  absl::MutexLock lock(&mutex_);
  stopped_ = true;
  changed_.SignalAll();
}

bool Published::stopped() const {
  absl::MutexLock lock(&mutex_);
  return stopped_;
}

absl::StatusOr<int64_t> Published::NumberOf(const std::string& id) const {
  auto found = numbers_.find(id);
  if (found == numbers_.end()) {
    return absl::NotFoundError(absl::StrCat("there is no job '", OneLine(id), "'"));
  }
  return found->second;
}

absl::StatusOr<v1::Job> Published::FindJob(const std::string& id) const {
  absl::MutexLock lock(&mutex_);
  absl::StatusOr<int64_t> number = NumberOf(id);
  if (!number.ok()) return number.status();
  return jobs_.at(*number).job;
}

absl::StatusOr<Published::Position> Published::FindPosition(const std::string& id) const {
  absl::MutexLock lock(&mutex_);
  absl::StatusOr<int64_t> number = NumberOf(id);
  if (!number.ok()) return number.status();
  return jobs_.at(*number).position;
}

std::vector<v1::Job> Published::Jobs() const {
  absl::MutexLock lock(&mutex_);
  std::vector<v1::Job> jobs;
  jobs.reserve(jobs_.size());
  for (const auto& [number, entry] : jobs_) jobs.push_back(entry.job);
  return jobs;
}

Published::Position Published::WaitForChange(const Position& seen, absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mutex_);
  while (true) {
    const Position& now = jobs_.at(seen.number).position;
    if (stopped_ || now.sequence != seen.sequence || now.log_lines != seen.log_lines ||
        now.ended != seen.ended || changed_.WaitWithDeadline(&mutex_, deadline)) {
      return jobs_.at(seen.number).position;
    }
  }
}

}  // namespace lockstep::server
