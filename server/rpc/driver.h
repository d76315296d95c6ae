// The thread that owns the coordinator's core: takes events in their order, steps the core, carries
// out its actions, keeps its alarm.
//
// Thread-safe. Knows no gRPC: streams and the store come in as interfaces, which are called on the
// driver's thread and must not block.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "server/core/core.h"

namespace lockstep::server {

// The workers' connections. Unknown streams are ignored: they are closed already.
class WorkerStreams {
 public:
  virtual ~WorkerStreams() = default;
  virtual void Send(StreamId stream, const v1::CoordinatorMessage& message) = 0;
  virtual void Close(StreamId stream, const absl::Status& status) = 0;
  // The core has taken the last message of the stream; the next may be read.
  virtual void Consumed(StreamId stream) = 0;
};

class Driver {
 public:
  // Takes the core over; `streams`, `clock` and what `store` needs must live until Stop.
  Driver(std::unique_ptr<Core> core, Clock& clock, WorkerStreams& streams,
         std::function<void(Write)> store);
  ~Driver() { Stop(); }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  void Start();  // once
  // Does what was posted and ends the thread. What is posted later is never done.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_);

  void Post(Event event) ABSL_LOCKS_EXCLUDED(mutex_);

  // Posts a Submit or Cancel (its `call` is set here) and waits for the reply. DeadlineExceeded:
  // none came in time; the request may still be carried out.
  absl::StatusOr<v1::Job> Call(std::variant<Submit, Cancel> request, absl::Duration timeout)
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Runs `read` on the driver's thread after the events posted before, and waits for it. Between
  // Start and Stop only.
  void Read(const std::function<void(const Core&)>& read) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  using Task = std::variant<Event, std::function<void()>>;

  void Loop() ABSL_LOCKS_EXCLUDED(mutex_);
  void Do(const std::vector<Action>& actions) ABSL_LOCKS_EXCLUDED(mutex_);
  void LogWrite(const Write& write);

  const std::unique_ptr<Core> core_;           // of the driver's thread
  absl::Time alarm_ = absl::InfiniteFuture();  // of the driver's thread
  Clock& clock_;
  WorkerStreams& streams_;
  const std::function<void(Write)> store_;
  absl::Mutex mutex_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  std::map<CallId, std::optional<absl::StatusOr<v1::Job>>> calls_
      ABSL_GUARDED_BY(mutex_);  // that wait; the reply once it came
  CallId last_call_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace lockstep::server
