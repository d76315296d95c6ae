#include "server/store/committer.h"

#include <spdlog/spdlog.h>

#include <utility>

#include "absl/time/clock.h"

namespace lockstep::server {
namespace {

constexpr absl::Duration kRetryEvery = absl::Milliseconds(500);

}  // namespace

Committer::Committer(std::unique_ptr<Store> store, absl::Duration patience, Committed committed,
                     Failed failed)
    : store_(std::move(store)),
      patience_(patience),
      committed_(std::move(committed)),
      failed_(std::move(failed)),
      thread_([this] { Loop(); }) {}

Committer::~Committer() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void Committer::Enqueue(Write write) {
  absl::MutexLock lock(&mutex_);
  queue_.push_back(std::move(write));
}

void Committer::Drain() {
  const auto idle = [this]()
                        ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return queue_.empty() && !busy_; };
  absl::MutexLock lock(&mutex_, absl::Condition(&idle));
}

absl::Status Committer::CommitPatiently(const std::vector<Write>& writes) {
  const absl::Time give_up = absl::Now() + patience_;
  while (true) {
    absl::Status status = store_->Commit(writes);
    if (status.ok()) return status;
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_ || absl::Now() >= give_up) return status;
    }
    spdlog::warn("{}; trying again", std::string(status.message()));
    absl::MutexLock lock(&mutex_);
    mutex_.AwaitWithTimeout(absl::Condition(&stopping_), kRetryEvery);
  }
}

void Committer::Loop() {
  bool failed = false;
  while (true) {
    std::vector<Write> writes;
    {
      const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return !queue_.empty() || stopping_;
      };
      absl::MutexLock lock(&mutex_, absl::Condition(&ready));
      if (queue_.empty()) return;
      writes.swap(queue_);
      busy_ = true;
    }
    if (!failed) {
      const absl::Status status = CommitPatiently(writes);
      if (status.ok()) {
        committed_(writes);
      } else {
        failed = true;
        failed_(status);
      }
    }
    absl::MutexLock lock(&mutex_);
    busy_ = false;
  }
}

}  // namespace lockstep::server
