#include "server/rpc/driver.h"

#include <spdlog/spdlog.h>

#include <optional>
#include <utility>

namespace lockstep::server {

Driver::Driver(std::unique_ptr<Core> core, Clock& clock, WorkerStreams& streams,
               std::function<void(Write)> store)
    : core_(std::move(core)), clock_(clock), streams_(streams), store_(std::move(store)) {}

void Driver::Start() {
  thread_ = std::thread([this] { Loop(); });
}

void Driver::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void Driver::Post(Event event) {
  absl::MutexLock lock(&mutex_);
  tasks_.emplace_back(std::in_place_type<Event>, std::move(event));
}

absl::StatusOr<v1::Job> Driver::Call(std::variant<Submit, Cancel> request, absl::Duration timeout) {
  absl::MutexLock lock(&mutex_);
  const CallId id = ++last_call_;
  std::optional<absl::StatusOr<v1::Job>>& reply = calls_[id];
  Event event = std::visit(
      [id](auto& r) {
        r.call = id;
        return Event(std::move(r));
      },
      request);
  tasks_.emplace_back(std::in_place_type<Event>, std::move(event));
  const auto replied = [&reply] { return reply.has_value(); };
  absl::StatusOr<v1::Job> answer = absl::DeadlineExceededError(
      "the request was not stored in time and may still be carried out; look before repeating it");
  if (mutex_.AwaitWithTimeout(absl::Condition(&replied), timeout)) answer = *std::move(reply);
  calls_.erase(id);
  return answer;
}

void Driver::Read(const std::function<void(const Core&)>& read) {
  bool done = false;
  absl::MutexLock lock(&mutex_);
  tasks_.emplace_back(std::in_place_type<std::function<void()>>, [&] {
    read(*core_);
    absl::MutexLock inner(&mutex_);
    done = true;
  });
  mutex_.Await(absl::Condition(&done));
}

void Driver::Loop() {
  Do(core_->Start(clock_.Now()));
  while (true) {
    std::deque<Task> tasks;
    {
      const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return !tasks_.empty() || stopping_;
      };
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&ready), alarm_ - clock_.Now());
      if (tasks_.empty() && stopping_) return;
      tasks.swap(tasks_);
    }
    for (const Task& task : tasks) {
      if (const auto* run = std::get_if<std::function<void()>>(&task)) {
        (*run)();
        continue;
      }
      const Event& event = std::get<Event>(task);
      Do(core_->Step(event, clock_.Now()));
      if (const auto* said = std::get_if<WorkerSaid>(&event)) streams_.Consumed(said->stream);
    }
    // After what has come meanwhile: a heartbeat that waits in the queue is not a missing one.
    if (clock_.Now() >= alarm_) {
      alarm_ = absl::InfiniteFuture();
      Do(core_->Step(AlarmFired(), clock_.Now()));
    }
  }
}

void Driver::Do(const std::vector<Action>& actions) {
  for (const Action& action : actions) {
    if (const auto* send = std::get_if<SendToWorker>(&action)) {
      streams_.Send(send->stream, send->message);
    } else if (const auto* close = std::get_if<CloseStream>(&action)) {
      spdlog::warn("closed the connection of a worker: {}", std::string(close->status.message()));
      streams_.Close(close->stream, close->status);
    } else if (const auto* write = std::get_if<Write>(&action)) {
      LogWrite(*write);
      store_(*write);
    } else if (const auto* alarm = std::get_if<SetAlarm>(&action)) {
      alarm_ = alarm->at;
    } else if (const auto* reply = std::get_if<Reply>(&action)) {
      absl::MutexLock lock(&mutex_);
      auto call = calls_.find(reply->call);
      if (call != calls_.end()) call->second = reply->job;  // else it gave up
    }
  }
}

void Driver::LogWrite(const Write& write) {
  for (const LogRecord& record : write.logs) {
    if (!record.line.worker().empty()) continue;
    const auto level = record.line.severity() == "ERROR" ? spdlog::level::err : spdlog::level::info;
    spdlog::log(level, "job {}: {}", core_->jobs().at(record.job).record.job.id(),
                record.line.text());
  }
}

}  // namespace lockstep::server
