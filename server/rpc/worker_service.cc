#include "server/rpc/worker_service.h"

#include <deque>
#include <utility>

#include "common/rpc/status.h"

namespace lockstep::server {
namespace {

// What may wait for a worker that reads slowly.
constexpr size_t kMostQueuedMessages = 1024;
constexpr size_t kMostQueuedBytes = 16 << 20;

}  // namespace

// Lives until gRPC says OnDone, at least; the service's map and calls under way share it.
class WorkerStream : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>,
                     public std::enable_shared_from_this<WorkerStream> {
 public:
  WorkerStream(StreamId id, WorkerService& service, grpc::CallbackServerContext* context)
      : id_(id), service_(service), context_(context) {}

  void Begin() {
    service_.driver_->Post(StreamOpened{id_});
    Read();
  }

  void Read() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (!finished_) StartRead(&incoming_);
  }

  void Send(const v1::CoordinatorMessage& message) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (finished_ || closing_) return;
    outgoing_.push_back(message);
    queued_bytes_ += message.ByteSizeLong();
    if (outgoing_.size() > kMostQueuedMessages || queued_bytes_ > kMostQueuedBytes) {
      CloseLocked(absl::ResourceExhaustedError("the worker does not read its messages"));
      context_->TryCancel();  // a write that never ends would hold up the status
      return;
    }
    if (!writing_) WriteFirst();
  }

  // After what is queued has been written.
  void Close(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    CloseLocked(status);
  }

  void OnReadDone(bool ok) override {
    if (ok) {
      service_.driver_->Post(WorkerSaid{id_, std::move(incoming_)});
      return;
    }
    // The worker's goodbye, its death, or bytes that are no message: gRPC does not tell them apart.
    // To a message that is too large it answers RESOURCE_EXHAUSTED by itself.
    service_.driver_->Post(StreamLost{id_, "connection closed"});
    Close(absl::InvalidArgumentError("the stream ended, or what came is no WorkerMessage"));
  }

  void OnWriteDone(bool ok) override ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    queued_bytes_ -= outgoing_.front().ByteSizeLong();
    outgoing_.pop_front();
    if (!ok) outgoing_.clear();
    if (!outgoing_.empty()) {
      WriteFirst();
    } else if (closing_) {
      FinishLocked();
    }
  }

  void OnCancel() override {
    service_.driver_->Post(StreamLost{id_, "connection closed"});
    Close(absl::CancelledError("the connection was closed"));
  }

  void OnDone() override { service_.Remove(id_); }

 private:
  void WriteFirst() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    writing_ = true;
    StartWrite(&outgoing_.front());
  }

  void CloseLocked(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (closing_) return;
    closing_ = true;
    status_ = status;
    if (!writing_) FinishLocked();
  }

  void FinishLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finished_) return;
    finished_ = true;
    Finish(rpc::ToGrpc(status_));
  }

  const StreamId id_;
  WorkerService& service_;
  grpc::CallbackServerContext* const context_;
  v1::WorkerMessage incoming_;  // of the read under way
  absl::Mutex mutex_;
  std::deque<v1::CoordinatorMessage> outgoing_
      ABSL_GUARDED_BY(mutex_);  // the first is being written
  size_t queued_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;   // Finish when the queue is written
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // Finish was called: no new operation may start
};

WorkerService::WorkerService() = default;
WorkerService::~WorkerService() = default;

grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* WorkerService::Connect(
    grpc::CallbackServerContext* context) {
  std::shared_ptr<WorkerStream> stream;
  {
    absl::MutexLock lock(&mutex_);
    const StreamId id = ++last_stream_;
    stream = std::make_shared<WorkerStream>(id, *this, context);
    streams_[id] = stream;
  }
  stream->Begin();
  return stream.get();
}

std::shared_ptr<WorkerStream> WorkerService::Find(StreamId id) {
  absl::MutexLock lock(&mutex_);
  auto found = streams_.find(id);
  return found == streams_.end() ? nullptr : found->second;
}

void WorkerService::Remove(StreamId id) {
  std::shared_ptr<WorkerStream> last;  // destroyed outside the lock
  absl::MutexLock lock(&mutex_);
  auto found = streams_.find(id);
  if (found == streams_.end()) return;
  last = std::move(found->second);
  streams_.erase(found);
}

void WorkerService::Send(StreamId stream, const v1::CoordinatorMessage& message) {
  if (auto found = Find(stream)) found->Send(message);
}

void WorkerService::Close(StreamId stream, const absl::Status& status) {
  if (auto found = Find(stream)) found->Close(status);
}

void WorkerService::Consumed(StreamId stream) {
  if (auto found = Find(stream)) found->Read();
}

}  // namespace lockstep::server
