#include "worker/agent/agent.h"

#include <arpa/inet.h>
#include <grpcpp/grpcpp.h>
#include <malloc.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/rpc/address.h"
#include "common/rpc/channel.h"
#include "common/rpc/status.h"
#include "lockstep/v1/worker.grpc.pb.h"
#include "spdlog/spdlog.h"

namespace lockstep::agent {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(100);
constexpr absl::Duration kLastBackoff = absl::Seconds(1);
// A killed predecessor of the same name may still be known to the coordinator for a moment.
constexpr absl::Duration kNamePatience = absl::Seconds(8);
constexpr absl::Duration kComplaintInterval = absl::Seconds(30);
// For a coordinator to hear the last words.
constexpr absl::Duration kGoodbyePatience = absl::Seconds(2);

uint64_t RandomIncarnation() {
  std::random_device source;
  return (uint64_t{source()} << 32 | source()) | 1;
}

// The address that packets to the coordinator leave from; no packet is sent.
std::string LocalAddressTowards(const std::string& host_port) {
  const size_t colon = host_port.rfind(':');
  if (colon == std::string::npos) return "127.0.0.1";
  std::string host = host_port.substr(0, colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  std::string address = "127.0.0.1";
  if (getaddrinfo(host.c_str(), host_port.substr(colon + 1).c_str(), &hints, &found) != 0) {
    return address;
  }
  const int fd = socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sockaddr_storage local{};
  socklen_t length = sizeof(local);
  if (fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&local), &length) == 0) {
    char text[NI_MAXHOST];
    if (getnameinfo(reinterpret_cast<sockaddr*>(&local), length, text, sizeof(text), nullptr, 0,
                    NI_NUMERICHOST) == 0) {
      address = text;
    }
  }
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  return address;
}

v1::WorkerMessage EndedMessage(const v1::Prepare& prepare, v1::Ended ended) {
  ended.set_job(prepare.job());
  ended.set_generation(prepare.generation());
  v1::WorkerMessage message;
  *message.mutable_ended() = std::move(ended);
  return message;
}

}  // namespace

class Agent::Impl {
 public:
  Impl(AgentOptions options, JobFactory factory)
      : options_(std::move(options)),
        factory_(std::move(factory)),
        incarnation_(RandomIncarnation()) {}

  absl::Status Run() {
    const absl::StatusOr<std::string> warning =
        rpc::CheckPlaintext(options_.coordinator, options_.insecure);
    if (!warning.ok()) return warning.status();
    if (!warning->empty()) spdlog::warn("{}", *warning);
    auto stub = v1::WorkerService::NewStub(rpc::MakeChannel(options_.coordinator));
    absl::Duration backoff = kFirstBackoff;
    absl::Time complained = absl::InfinitePast();
    absl::Time refused_since = absl::InfiniteFuture();
    while (!Stopping()) {
      bool registered = false;
      const absl::Status status = Serve(stub.get(), &registered);
      AbandonJobs(absl::StrCat("the connection to the coordinator was lost: ", status.message()));
      if (Stopping()) break;
      if (const absl::Status broken = Broken(); !broken.ok()) return broken;
      if (registered) {
        backoff = kFirstBackoff;
        refused_since = absl::InfiniteFuture();
        complained = absl::InfinitePast();
      }
      if (absl::IsInvalidArgument(status)) return absl::FailedPreconditionError(status.message());
      if (absl::IsAlreadyExists(status)) {
        if (refused_since == absl::InfiniteFuture()) refused_since = absl::Now();
        if (absl::Now() - refused_since > kNamePatience) {
          return absl::FailedPreconditionError(status.message());
        }
      } else if (absl::Now() - complained > kComplaintInterval) {
        complained = absl::Now();
        spdlog::warn(
            "{} {}: {}; trying again",
            registered ? "the connection has ended to the coordinator at" : "no coordinator at",
            options_.coordinator, std::string(status.message()));
      }
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&stopping_), backoff);
      backoff = std::min(backoff * 2, kLastBackoff);
    }
    return absl::OkStatus();
  }

  void Shutdown() {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
  }

  void Leave(const absl::Status& why) {
    v1::WorkerMessage message;  // of no job
    message.mutable_ended()->set_outcome(v1::Ended::ERRORED);
    message.mutable_ended()->set_error(std::string(why.message()));
    message.mutable_ended()->set_leaves(true);
    SendLast(why, std::move(message));
    absl::MutexLock lock(&mutex_);
    mutex_.AwaitWithTimeout(absl::Condition(
                                +[](Impl* a) ABSL_EXCLUSIVE_LOCKS_REQUIRED(a->mutex_) {
                                  return a->closed_ || a->context_ == nullptr;
                                },
                                this),
                            kGoodbyePatience);
  }

 private:
  using Stream = grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>;

  class Queue : public Outbox {
   public:
    void Send(v1::WorkerMessage message) override {
      absl::MutexLock lock(&mutex_);
      if (open_ && !last_) messages_.push_back(std::move(message));
    }
    void Open() {
      absl::MutexLock lock(&mutex_);
      open_ = true;
      last_ = false;
    }
    void Close() {
      absl::MutexLock lock(&mutex_);
      open_ = false;
      messages_.clear();
    }
    // The message is the last that Next returns.
    void SendLast(v1::WorkerMessage message) {
      absl::MutexLock lock(&mutex_);
      if (!open_) return;
      messages_.push_back(std::move(message));
      last_ = true;
    }
    // False: closed, or the last has been returned. Otherwise the next message, or a heartbeat
    // after `patience` without one.
    bool Next(absl::Duration patience, v1::WorkerMessage* message) {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(
                                  +[](Queue* q) ABSL_EXCLUSIVE_LOCKS_REQUIRED(q->mutex_) {
                                    return !q->open_ || q->last_ || !q->messages_.empty();
                                  },
                                  this),
                              patience);
      if (!open_ || (last_ && messages_.empty())) return false;
      if (messages_.empty()) {
        message->mutable_heartbeat();
      } else {
        *message = std::move(messages_.front());
        messages_.pop_front();
      }
      return true;
    }

   private:
    absl::Mutex mutex_;
    bool open_ ABSL_GUARDED_BY(mutex_) = false;
    bool last_ ABSL_GUARDED_BY(mutex_) = false;
    std::deque<v1::WorkerMessage> messages_ ABSL_GUARDED_BY(mutex_);
  };

  // One generation of a job here, and the thread that takes part in it.
  struct Running {
    v1::Prepare prepare;
    absl::Mutex mutex;
    std::unique_ptr<Job> job ABSL_GUARDED_BY(mutex);  // null once it has ended
    bool started ABSL_GUARDED_BY(mutex) = false;
    bool aborted ABSL_GUARDED_BY(mutex) = false;
    v1::Start start ABSL_GUARDED_BY(mutex);
    std::optional<v1::Algorithms> algorithms ABSL_GUARDED_BY(mutex);  // to be ready with again
    std::atomic<bool> done = false;
    std::thread thread;
  };

  // From here on nothing is obeyed, and nothing else is sent.
  void SendLast(const absl::Status& broken, v1::WorkerMessage message) {
    {
      absl::MutexLock lock(&mutex_);
      if (broken_.ok()) broken_ = absl::AbortedError(broken.message());
    }
    outbox_.SendLast(std::move(message));
  }
  bool Stopping() {
    absl::MutexLock lock(&mutex_);
    return stopping_;
  }
  absl::Status Broken() {
    absl::MutexLock lock(&mutex_);
    return broken_;
  }

  // One connection, from Register until it breaks.
  absl::Status Serve(v1::WorkerService::Stub* stub, bool* registered) {
    grpc::ClientContext context;
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return absl::CancelledError("shutting down");
      context_ = &context;
    }
    {
      absl::MutexLock lock(&mutex_);
      closed_ = false;
    }
    std::unique_ptr<Stream> stream = stub->Connect(&context);
    v1::WorkerMessage hello;
    v1::Register* registration = hello.mutable_register_();
    registration->set_name(options_.name);
    registration->set_incarnation(incarnation_);
    registration->set_host(options_.host);
    registration->set_host_id(options_.host_id);
    registration->set_address(options_.advertise.empty() ? LocalAddressTowards(options_.coordinator)
                                                         : options_.advertise);
    registration->set_device(options_.device);
    if (options_.gpu.has_value()) *registration->mutable_gpu() = *options_.gpu;
    registration->set_slots(options_.slots);
    registration->set_version(options_.version);
    v1::CoordinatorMessage message;
    if (stream->Write(hello) && stream->Read(&message) && message.has_registered()) {
      *registered = true;
      spdlog::info("registered with {} as {}, {} slots", options_.coordinator, options_.name,
                   options_.slots);
      outbox_.Open();
      const absl::Duration heartbeat =
          absl::Milliseconds(std::max(message.registered().heartbeat_ms(), 50));
      std::thread writer([&] {
        v1::WorkerMessage next;
        absl::Time told = absl::InfinitePast();
        while (outbox_.Next(heartbeat, &next)) {
          // Also while other messages stand for heartbeats.
          std::optional<v1::GpuUsage> usage;
          if (options_.gpu_usage != nullptr && absl::Now() - told >= heartbeat) {
            told = absl::Now();
            usage = options_.gpu_usage();
          }
          if (usage.has_value() && !next.has_heartbeat()) {
            v1::WorkerMessage more;
            *more.mutable_heartbeat()->mutable_gpu_usage() = *usage;
            if (!stream->Write(more)) break;
          } else if (usage.has_value()) {
            *next.mutable_heartbeat()->mutable_gpu_usage() = *usage;
          }
          if (!stream->Write(next)) break;
          next.Clear();
        }
        if (Broken().ok()) return;
        // The coordinator closes the connection when it has read everything.
        stream->WritesDone();
        absl::MutexLock lock(&mutex_);
        if (!mutex_.AwaitWithTimeout(absl::Condition(&closed_), kGoodbyePatience)) {
          context.TryCancel();
        }
      });
      while (stream->Read(&message)) {
        if (Broken().ok()) Obey(message);
      }
      {
        absl::MutexLock lock(&mutex_);
        closed_ = true;
      }
      outbox_.Close();
      writer.join();
    } else if (message.message_case() != v1::CoordinatorMessage::MESSAGE_NOT_SET) {
      context.TryCancel();  // a greeting that we do not know; else the stream has ended by itself
    }
    const absl::Status status = rpc::FromGrpc(stream->Finish());
    absl::MutexLock lock(&mutex_);
    context_ = nullptr;
    return status.ok() ? absl::UnavailableError("the coordinator closed the connection") : status;
  }

  void Obey(const v1::CoordinatorMessage& message) {
    ReapJobs();
    switch (message.message_case()) {
      case v1::CoordinatorMessage::kPrepare:
        StartJob(message.prepare());
        break;
      case v1::CoordinatorMessage::kStart:
        if (Running* r = Find(message.start().job(), message.start().generation())) {
          absl::MutexLock lock(&r->mutex);
          r->start = message.start();
          r->started = true;
        }
        break;
      case v1::CoordinatorMessage::kUseAlgorithms:
        if (Running* r =
                Find(message.use_algorithms().job(), message.use_algorithms().generation())) {
          absl::MutexLock lock(&r->mutex);
          r->algorithms = message.use_algorithms().algorithms();
        }
        break;
      case v1::CoordinatorMessage::kAbort:
        if (Running* r = Find(message.abort().job(), message.abort().generation())) {
          AbortJob(*r, message.abort().reason());
        }
        break;
      case v1::CoordinatorMessage::kControl:
        if (Running* r = Find(message.control().job(), message.control().generation());
            r != nullptr && message.control().stop()) {
          absl::MutexLock lock(&r->mutex);
          if (r->job != nullptr) r->job->Stop();
        }
        break;
      default:
        break;
    }
  }

  Running* Find(const std::string& job, int64_t generation) {
    const auto found = jobs_.find(job);
    return found != jobs_.end() && found->second->prepare.generation() == generation
               ? found->second.get()
               : nullptr;
  }

  void StartJob(const v1::Prepare& prepare) {
    // The coordinator forms a new generation only after the old one's Ended; this is for one that
    // lost it.
    if (const auto old = jobs_.find(prepare.job()); old != jobs_.end()) {
      AbortJob(*old->second, "a newer generation was formed");
      old->second->thread.join();
      jobs_.erase(old);
    }
    spdlog::info("job {} generation {}: preparing as rank {} of {}", prepare.job(),
                 prepare.generation(), prepare.rank(), prepare.members_size());
    auto running = std::make_unique<Running>();
    Running* r = running.get();
    r->prepare = prepare;
    {
      absl::MutexLock lock(&r->mutex);
      r->job = factory_(prepare, outbox_);
    }
    r->thread = std::thread([this, r] { TakePart(*r); });
    jobs_[prepare.job()] = std::move(running);
  }

  void TakePart(Running& r) {
    Job* job;
    {
      absl::MutexLock lock(&r.mutex);
      job = r.job.get();
    }
    v1::Ended ended;
    absl::StatusOr<v1::Ready> ready = job->Prepare();
    while (true) {
      if (!ready.ok()) {
        ended.set_outcome(v1::Ended::ERRORED);
        ended.set_error(std::string(ready.status().message()));
        break;
      }
      ready->set_job(r.prepare.job());
      ready->set_generation(r.prepare.generation());
      v1::WorkerMessage message;
      *message.mutable_ready() = *std::move(ready);
      outbox_.Send(std::move(message));
      v1::Start start;
      bool aborted;
      std::optional<v1::Algorithms> algorithms;
      {
        absl::MutexLock lock(&r.mutex);
        r.mutex.Await(absl::Condition(
            +[](Running* running) ABSL_EXCLUSIVE_LOCKS_REQUIRED(running->mutex) {
              return running->started || running->aborted || running->algorithms.has_value();
            },
            &r));
        start = r.start;
        aborted = r.aborted;
        algorithms = std::exchange(r.algorithms, std::nullopt);
      }
      if (aborted) {
        ended.set_outcome(v1::Ended::STOPPED);
      } else if (algorithms.has_value()) {
        ready = job->UseAlgorithms(*algorithms);
        continue;
      } else {
        ended = job->Run(start);
      }
      break;
    }
    const absl::Status broken = job->broken();
    std::unique_ptr<Job> finished;
    bool aborted;
    {
      absl::MutexLock lock(&r.mutex);
      finished = std::move(r.job);
      aborted = r.aborted;
    }
    finished.reset();
    malloc_trim(0);  // a worker serves job after job without growing
    if (aborted && broken.ok() && ended.outcome() == v1::Ended::ERRORED) {
      ended.set_outcome(v1::Ended::STOPPED);  // the echo of the abort
    }
    if (ended.outcome() == v1::Ended::ERRORED) {
      spdlog::error("job {} generation {}: {}", r.prepare.job(), r.prepare.generation(),
                    ended.error());
    } else {
      spdlog::info("job {} generation {}: {}", r.prepare.job(), r.prepare.generation(),
                   ended.outcome() == v1::Ended::COMPLETED ? "completed" : "stopped");
    }
    if (broken.ok()) {
      outbox_.Send(EndedMessage(r.prepare, std::move(ended)));
    } else {
      ended.set_leaves(true);
      SendLast(broken, EndedMessage(r.prepare, std::move(ended)));
    }
    r.done = true;
  }

  static void AbortJob(Running& r, const std::string& reason) {
    absl::MutexLock lock(&r.mutex);
    r.aborted = true;
    if (r.job != nullptr) r.job->Abort(reason);
  }

  void ReapJobs() {
    for (auto it = jobs_.begin(); it != jobs_.end();) {
      if (it->second->done) {
        it->second->thread.join();
        it = jobs_.erase(it);
      } else {
        ++it;
      }
    }
  }

  void AbandonJobs(const std::string& reason) {
    for (auto& [id, running] : jobs_) AbortJob(*running, reason);
    for (auto& [id, running] : jobs_) running->thread.join();
    jobs_.clear();
  }

  const AgentOptions options_;
  const JobFactory factory_;
  const uint64_t incarnation_;
  Queue outbox_;
  std::map<std::string, std::unique_ptr<Running>> jobs_;  // Run's thread only

  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status broken_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // by the coordinator
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;
};

Agent::Agent(AgentOptions options, JobFactory factory)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(factory))) {}
Agent::~Agent() = default;
absl::Status Agent::Run() { return impl_->Run(); }
void Agent::Shutdown() { impl_->Shutdown(); }
void Agent::Leave(const absl::Status& why) { impl_->Leave(why); }

}  // namespace lockstep::agent
