// The workers' side of the wire: one stream per connected worker, its messages handed to the driver
// one at a time (the next is read when the core has taken the last), its answers queued and
// written.
//
// Thread-safe. A stream that does not read what it is sent is cut off when its queue is full, so
// that nobody can make the coordinator wait or grow.
#pragma once

#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "lockstep/v1/worker.grpc.pb.h"
#include "server/rpc/driver.h"

namespace lockstep::server {

class WorkerStream;

class WorkerService : public v1::WorkerService::CallbackService, public WorkerStreams {
 public:
  WorkerService();
  ~WorkerService() override;

  // Before the first connection. The driver must outlive the connections.
  void SetDriver(Driver* driver) { driver_ = driver; }

  grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* Connect(
      grpc::CallbackServerContext* context) override ABSL_LOCKS_EXCLUDED(mutex_);

  void Send(StreamId stream, const v1::CoordinatorMessage& message) override
      ABSL_LOCKS_EXCLUDED(mutex_);
  void Close(StreamId stream, const absl::Status& status) override ABSL_LOCKS_EXCLUDED(mutex_);
  void Consumed(StreamId stream) override ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  friend class WorkerStream;
  std::shared_ptr<WorkerStream> Find(StreamId id) ABSL_LOCKS_EXCLUDED(mutex_);
  void Remove(StreamId id) ABSL_LOCKS_EXCLUDED(mutex_);

  Driver* driver_ = nullptr;
  absl::Mutex mutex_;
  StreamId last_stream_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<StreamId, std::shared_ptr<WorkerStream>> streams_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace lockstep::server
