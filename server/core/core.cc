#include "server/core/core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/planted_bugs.h"
#include "server/core/reason.h"

namespace lockstep::server {
namespace {

constexpr size_t kLongestText = 4096;  // of a path or id in a request

// What a job of which the coordinator lost track ends with.
std::string RestartReason(const v1::Job& job) {
  std::string reason = absl::StrCat("the coordinator was restarted at step ", job.step());
  if (job.checkpoints().empty()) return absl::StrCat(reason, "; the job had no checkpoint yet");
  const v1::CheckpointInfo& last = job.checkpoints(job.checkpoints_size() - 1);
  return OneLine(absl::StrCat(reason, "; its checkpoint of step ", last.step(), " is on ",
                              last.host(), " in ", last.path()));
}

}  // namespace

Core::Core(const CoreOptions& options, std::vector<StoredJob> stored) : options_(options) {
  for (StoredJob& job : stored) {
    const int64_t number = job.record.number;
    numbers_by_id_[job.record.job.id()] = number;
    if (!job.record.request_id.empty()) numbers_by_request_[job.record.request_id] = number;
    jobs_[number] =
        JobEntry{std::move(job.record), std::move(job.algorithms), job.last_sequence, std::nullopt};
  }
}

std::vector<Action> Core::Start(absl::Time now) {
  now_ = now;
  for (auto& [number, job] : jobs_) {
    v1::Job& record = job.record.job;
    switch (record.state()) {
      case v1::QUEUED:
        queue_.insert(number);
        break;
      case v1::STARTING:
      case v1::RUNNING:
        if (Planted(PlantedBug::kRestartForgetsRunning)) break;
        record.set_reason(RestartReason(record));
        record.set_target(v1::FAILED);
        Move(job, v1::STOPPING);
        End(job, v1::FAILED);
        break;
      case v1::STOPPING:
        End(job, record.target() == v1::CANCELLED ? v1::CANCELLED : v1::FAILED);
        break;
      default:
        break;
    }
  }
  slots_changed_ = true;
  return Flush();
}

std::vector<Action> Core::Step(const Event& event, absl::Time now) {
  now_ = std::max(now_, now);
  std::visit([this](const auto& e) { On(e); }, event);
  return Flush();
}

std::vector<Action> Core::Flush() {
  if (slots_changed_ && !shutdown_) Schedule();
  slots_changed_ = false;

  for (int64_t number : changed_jobs_) write_.jobs.push_back(jobs_.at(number).record);
  changed_jobs_.clear();
  if (!write_.jobs.empty() || !write_.algorithms.empty() || !write_.events.empty() ||
      !write_.logs.empty()) {
    write_.ticket = ++last_ticket_;
    actions_.emplace_back(std::move(write_));
    write_ = Write();
  }

  for (auto& [call, answer] : answers_) {
    Reply reply{call, v1::Job()};
    if (answer.ok()) {
      reply.job = jobs_.at(*answer).record.job;
    } else {
      reply.job = answer.status();
    }
    if (last_ticket_ <= persisted_ || Planted(PlantedBug::kReplyBeforePersisted)) {
      actions_.emplace_back(std::move(reply));
    } else {
      pending_replies_.push_back({last_ticket_, std::move(reply)});
    }
  }
  answers_.clear();

  // An alarm that rings too early costs one look; it is not moved for every heartbeat.
  const absl::Time deadline = NextDeadline();
  if (deadline < alarm_) {
    alarm_ = deadline;
    actions_.emplace_back(SetAlarm{deadline});
  }
  return std::exchange(actions_, {});
}

void Core::Answer(CallId call, absl::Status error) {
  answers_.emplace_back(call, std::move(error));
}

void Core::Answer(CallId call, int64_t job) { answers_.emplace_back(call, job); }

void Core::On(const Submit& event) {
  const v1::SubmitJobRequest& request = event.request;
  if (shutdown_) return Answer(event.call, absl::UnavailableError("the coordinator is stopping"));
  for (const std::string* text :
       {&request.resume_from(), &request.output_dir(), &request.request_id()}) {
    if (text->size() > kLongestText) {
      return Answer(event.call, absl::InvalidArgumentError(absl::StrCat(
                                    "resume_from, output_dir and request_id have at most ",
                                    kLongestText, " bytes; one has ", text->size())));
    }
  }
  if (!request.request_id().empty()) {
    auto known = numbers_by_request_.find(request.request_id());
    if (known != numbers_by_request_.end()) return Answer(event.call, known->second);
  }

  const int64_t number = jobs_.empty() ? 1 : jobs_.rbegin()->first + 1;
  JobEntry& job = jobs_[number];
  job.record.number = number;
  job.record.request_id = request.request_id();
  v1::Job& record = job.record.job;
  const std::string& name = request.spec().name();
  record.set_id(absl::StrCat(name.empty() ? "job" : name, "-", number));
  *record.mutable_spec() = request.spec();
  record.set_state(v1::QUEUED);
  record.set_resume_from(request.resume_from());
  record.set_output_dir(request.output_dir());
  record.set_created_unix_ms(absl::ToUnixMillis(now_));
  if (!queue_.empty()) record.set_reason("waits for the jobs ahead of it in the queue");
  numbers_by_id_[record.id()] = number;
  if (!request.request_id().empty()) numbers_by_request_[request.request_id()] = number;
  queue_.insert(number);
  slots_changed_ = true;
  write_.durable = true;
  Publish(job);
  Answer(event.call, number);
}

void Core::On(const Cancel& event) {
  auto found = numbers_by_id_.find(event.job);
  if (found == numbers_by_id_.end()) {
    return Answer(event.call,
                  absl::NotFoundError(absl::StrCat("there is no job '", OneLine(event.job), "'")));
  }
  JobEntry& job = jobs_.at(found->second);
  v1::Job& record = job.record.job;
  if (HasEnded(record.state())) {
    return Answer(event.call,
                  absl::FailedPreconditionError(absl::StrCat(
                      "job ", record.id(), " has ended already: ", Name(record.state()))));
  }
  if (record.state() == v1::STOPPING && record.target() != v1::CANCELLED) {
    return Answer(event.call, absl::FailedPreconditionError(absl::StrCat(
                                  "job ", record.id(), " is failing: ", record.reason())));
  }
  if (record.state() == v1::QUEUED) {
    record.set_reason("cancelled on request before it started");
    End(job, v1::CANCELLED);
  } else if (record.state() != v1::STOPPING) {
    // Which step it stops after, its members agree on; End says it.
    record.set_reason(record.state() == v1::RUNNING ? "cancelled on request"
                                                    : "cancelled on request while starting");
    record.set_target(v1::CANCELLED);
    StopPolitely(job);
  }
  Answer(event.call, found->second);
}

void Core::On(const Persisted& event) {
  persisted_ = std::max(persisted_, event.ticket);
  size_t ready = 0;
  while (ready < pending_replies_.size() && pending_replies_[ready].after <= persisted_) {
    actions_.emplace_back(std::move(pending_replies_[ready++].reply));
  }
  pending_replies_.erase(pending_replies_.begin(), pending_replies_.begin() + ready);
  for (int64_t number : active_) {
    JobEntry& job = jobs_.at(number);
    if (job.record.job.state() == v1::STARTING && !job.generation->members[0].prepared &&
        job.generation->prepare_after <= persisted_) {
      SendPrepare(job);
    }
  }
}

absl::Time Core::NextDeadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [id, stream] : streams_) {
    next = std::min(next, stream.worker.empty()
                              ? stream.opened + options_.register_timeout
                              : workers_.at(stream.worker).last_seen + options_.expiry);
  }
  for (int64_t number : active_) {
    const auto& generation = jobs_.at(number).generation;
    if (!generation.has_value()) continue;
    next = std::min(
        {next, generation->ready_deadline, generation->abort_at, generation->end_deadline});
  }
  return next;
}

void Core::On(const AlarmFired&) {
  // A process that was itself stopped (a suspended machine) must not take its own silence for the
  // workers': what they sent meanwhile is still in the sockets.
  if (now_ - alarm_ > options_.expiry / 2) {
    for (auto& [name, worker] : workers_) worker.last_seen = now_;
  }
  alarm_ = absl::InfiniteFuture();

  std::vector<StreamId> silent;
  for (const auto& [id, stream] : streams_) {
    const bool overdue = stream.worker.empty()
                             ? stream.opened + options_.register_timeout <= now_
                             : workers_.at(stream.worker).last_seen + options_.expiry <= now_;
    if (overdue) silent.push_back(id);
  }
  for (StreamId id : silent) {
    const Stream stream = streams_.at(id);
    const std::string cause =
        stream.worker.empty()
            ? absl::StrCat("no Register came within ",
                           absl::FormatDuration(options_.register_timeout))
            : absl::StrCat("no heartbeat for ", absl::FormatDuration(options_.expiry));
    actions_.emplace_back(CloseStream{id, absl::DeadlineExceededError(cause)});
    if (stream.worker.empty()) {
      streams_.erase(id);
    } else {
      LoseWorker(workers_.at(stream.worker), cause);
    }
  }

  const std::vector<int64_t> active(active_.begin(), active_.end());
  for (int64_t number : active) {
    JobEntry& job = jobs_.at(number);
    if (!job.generation.has_value()) continue;
    if (job.generation->ready_deadline <= now_) {
      std::string late;
      for (const Member& member : job.generation->members) {
        if (member.ready.has_value()) continue;
        absl::StrAppend(&late, late.empty() ? "worker " : ", ", member.place.worker, " (",
                        DescribeSlots(member.place.slots), ")");
      }
      Fail(job,
           absl::StrCat(late, " not ready within ", absl::FormatDuration(options_.ready_timeout)),
           Cause::kPrimary);
    }
    if (job.generation.has_value() && job.generation->abort_at <= now_) AbortMembers(job);
    if (!job.generation.has_value() || job.generation->end_deadline > now_) continue;
    std::vector<std::string> stuck;
    for (const Member& member : job.generation->members) {
      if (!member.left) stuck.push_back(member.place.worker);
    }
    const std::string late = absl::StrCat(" did not leave job ", job.record.job.id(), " within ",
                                          absl::FormatDuration(options_.end_timeout));
    for (const std::string& name : stuck) {
      Worker& worker = workers_.at(name);
      actions_.emplace_back(CloseStream{
          worker.stream, absl::DeadlineExceededError(absl::StrCat("this worker", late))});
      LoseWorker(worker, absl::StrCat("it", late));
    }
  }
}

void Core::On(const Shutdown&) {
  shutdown_ = true;
  const std::vector<int64_t> active(active_.begin(), active_.end());
  for (int64_t number : active) {
    JobEntry& job = jobs_.at(number);
    Fail(job, absl::StrCat("the coordinator was stopped at step ", job.record.job.step()),
         Cause::kPrimary);
  }
  const std::map<StreamId, Stream> streams = streams_;
  for (const auto& [id, stream] : streams) {
    actions_.emplace_back(CloseStream{id, absl::UnavailableError("the coordinator is stopping")});
    if (!stream.worker.empty()) {
      LoseWorker(workers_.at(stream.worker), "the coordinator is stopping");
    }
  }
  streams_.clear();
}

void Core::Log(int64_t job, const std::string& severity, const std::string& text) {
  LogRecord record;
  record.job = job;
  record.line.set_unix_ms(absl::ToUnixMillis(now_));
  record.line.set_severity(severity);
  record.line.set_text(text);
  write_.logs.push_back(std::move(record));
}

}  // namespace lockstep::server
