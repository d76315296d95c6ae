// The store's thread: commits what is enqueued, as many writes in one transaction as have come
// meanwhile, and says so.
//
// Thread-safe. `committed` and `failed` are called on the store's thread.
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/core/events.h"
#include "server/store/store.h"

namespace lockstep::server {

class Committer {
 public:
  // After each commit, in order.
  using Committed = std::function<void(const std::vector<Write>&)>;
  // Once, when commits have failed for `patience`; nothing is committed after it.
  using Failed = std::function<void(const absl::Status&)>;

  Committer(std::unique_ptr<Store> store, absl::Duration patience, Committed committed,
            Failed failed);
  ~Committer();  // commits what is enqueued
  Committer(const Committer&) = delete;
  Committer& operator=(const Committer&) = delete;

  void Enqueue(Write write) ABSL_LOCKS_EXCLUDED(mutex_);

  // Until all that was enqueued is committed, or the store has failed.
  void Drain() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void Loop() ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status CommitPatiently(const std::vector<Write>& writes) ABSL_LOCKS_EXCLUDED(mutex_);

  const std::unique_ptr<Store> store_;  // of the store's thread
  const absl::Duration patience_;
  const Committed committed_;
  const Failed failed_;
  absl::Mutex mutex_;
  std::vector<Write> queue_ ABSL_GUARDED_BY(mutex_);
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace lockstep::server
