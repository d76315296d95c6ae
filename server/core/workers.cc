// Core: the workers' streams and what comes over them.
#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/core/core.h"
#include "server/core/reason.h"

namespace lockstep::server {
namespace {

constexpr int kMostSlots = 1024;
constexpr size_t kLongestName = 128;
constexpr size_t kLongestRendezvous = 64 << 10;
constexpr size_t kLargestAlgorithms = 1 << 20;
constexpr size_t kLongestLogLine = 4 << 10;
constexpr size_t kMostLostWorkers = 256;
constexpr size_t kMostPendingDigests = 64;

bool IsName(const std::string& name) {
  return !name.empty() && name.size() <= kLongestName &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
         });
}

absl::Status CheckRegister(const v1::Register& message) {
  if (!IsName(message.name())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", OneLine(message.name()),
        "' is no name of a worker; accepted: 1 to 128 letters, digits, '.', '_', '-'"));
  }
  if (message.slots() < 1 || message.slots() > kMostSlots) {
    return absl::InvalidArgumentError(absl::StrCat("worker ", message.name(), " has ",
                                                   message.slots(), " slots; accepted: 1 to ",
                                                   kMostSlots));
  }
  if (message.incarnation() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("worker ", message.name(), " has incarnation 0; accepted: any other number"));
  }
  if (!IsName(message.device())) {
    return absl::InvalidArgumentError(
        absl::StrCat("worker ", message.name(), " names no device; accepted: cpu, cuda"));
  }
  return absl::OkStatus();
}

}  // namespace

void Core::On(const StreamOpened& event) { streams_[event.stream] = Stream{"", now_}; }

void Core::On(const StreamLost& event) {
  auto found = streams_.find(event.stream);
  if (found == streams_.end()) return;
  if (found->second.worker.empty()) {
    streams_.erase(found);
  } else {
    LoseWorker(workers_.at(found->second.worker), event.cause);
  }
}

void Core::On(const WorkerSaid& event) {
  auto found = streams_.find(event.stream);
  if (found == streams_.end()) return;  // closed by us; its last messages were under way
  if (found->second.worker.empty()) {
    if (event.message.message_case() == v1::WorkerMessage::kRegister) {
      return OnRegister(event.stream, event.message.register_());
    }
    streams_.erase(found);
    actions_.emplace_back(
        CloseStream{event.stream,
                    absl::InvalidArgumentError("the first message of a worker must be Register")});
    return;
  }

  Worker& worker = workers_.at(found->second.worker);
  worker.last_seen = now_;
  switch (event.message.message_case()) {
    case v1::WorkerMessage::kReady:
      return OnReady(worker, event.message.ready());
    case v1::WorkerMessage::kProgress:
      return OnProgress(worker, event.message.progress());
    case v1::WorkerMessage::kEnded:
      return OnEnded(worker, event.message.ended());
    case v1::WorkerMessage::kLog:
      return OnLog(worker, event.message.log());
    case v1::WorkerMessage::kDigest:
      return OnDigest(worker, event.message.digest());
    case v1::WorkerMessage::kRegister: {
      const std::string cause = "it registered twice on one stream";
      actions_.emplace_back(CloseStream{event.stream, absl::InvalidArgumentError(cause)});
      return LoseWorker(worker, cause);
    }
    case v1::WorkerMessage::kHeartbeat:
      if (event.message.heartbeat().has_gpu_usage()) {
        worker.gpu_usage = event.message.heartbeat().gpu_usage();
      }
      return;
    case v1::WorkerMessage::MESSAGE_NOT_SET:  // of a newer worker
      return;
  }
}

void Core::OnRegister(StreamId stream, const v1::Register& message) {
  absl::Status status = CheckRegister(message);
  if (status.ok() && shutdown_) status = absl::UnavailableError("the coordinator is stopping");
  auto known = workers_.find(message.name());
  if (status.ok() && known != workers_.end() && known->second.state != WorkerState::kLost) {
    Worker& worker = known->second;
    if (worker.info.incarnation() == message.incarnation()) {
      // It lost its old connection before we noticed.
      actions_.emplace_back(
          CloseStream{worker.stream, absl::AbortedError("the worker connected again")});
      LoseWorker(worker, "it connected again");
    } else {
      status = absl::AlreadyExistsError(absl::StrCat(
          "a worker named ", message.name(), " is connected already, from host ",
          OneLine(worker.info.host()), "; give this one another name, or try again in ",
          absl::FormatDuration(options_.expiry), " if that one died"));
    }
  }
  if (!status.ok()) {
    streams_.erase(stream);
    actions_.emplace_back(CloseStream{stream, status});
    return;
  }

  if (known == workers_.end()) {
    ForgetOldWorkers();
    known = workers_.emplace(message.name(), Worker()).first;
  } else {
    Move(known->second, WorkerState::kIdle);
  }
  Worker& worker = known->second;
  worker.info = message;
  worker.gpu_usage.reset();
  worker.stream = stream;
  worker.last_seen = now_;
  worker.owner.assign(message.slots(), 0);
  streams_[stream].worker = message.name();
  slots_changed_ = true;

  v1::CoordinatorMessage reply;
  reply.mutable_registered()->set_heartbeat_ms(absl::ToInt64Milliseconds(options_.heartbeat));
  reply.mutable_registered()->set_expiry_ms(absl::ToInt64Milliseconds(options_.expiry));
  actions_.emplace_back(SendToWorker{stream, std::move(reply)});
}

// Lost workers are shown to people; names that come and go for ever must not fill the memory.
void Core::ForgetOldWorkers() {
  size_t lost = 0;
  auto oldest = workers_.end();
  for (auto it = workers_.begin(); it != workers_.end(); ++it) {
    if (it->second.state != WorkerState::kLost) continue;
    ++lost;
    if (oldest == workers_.end() || it->second.last_seen < oldest->second.last_seen) oldest = it;
  }
  if (lost >= kMostLostWorkers) workers_.erase(oldest);
}

Core::WorkerOfJob Core::FindMember(const Worker& worker, const std::string& job,
                                   int64_t generation) {
  auto found = numbers_by_id_.find(job);
  if (found == numbers_by_id_.end()) return {};
  JobEntry& entry = jobs_.at(found->second);
  if (!entry.generation.has_value() || entry.generation->number != generation) return {};
  std::vector<Member>& members = entry.generation->members;
  for (size_t rank = 0; rank < members.size(); ++rank) {
    const Member& member = members[rank];
    if (member.place.worker == worker.info.name() && member.prepared && !member.left) {
      return {&entry, static_cast<int>(rank)};
    }
  }
  return {};
}

void Core::RefuseStale(const Worker& worker, const std::string& job, int64_t generation) {
  v1::CoordinatorMessage message;
  message.mutable_abort()->set_job(job);
  message.mutable_abort()->set_generation(generation);
  message.mutable_abort()->set_reason("the coordinator knows no such generation to live");
  actions_.emplace_back(SendToWorker{worker.stream, std::move(message)});
}

void Core::OnReady(Worker& worker, const v1::Ready& message) {
  const auto [job, rank] = FindMember(worker, message.job(), message.generation());
  if (job == nullptr) return RefuseStale(worker, message.job(), message.generation());
  if (job->record.job.state() != v1::STARTING) return;
  Member& member = job->generation->members[rank];
  if (member.ready.has_value()) return;
  const size_t algorithms = message.algorithms().ByteSizeLong();
  std::string refused;
  if (message.rendezvous().size() > kLongestRendezvous) {
    refused = absl::StrCat("its rendezvous has ", message.rendezvous().size(),
                           " bytes; accepted: at most ", kLongestRendezvous);
  } else if (algorithms > kLargestAlgorithms) {
    refused = absl::StrCat("its algorithms have ", algorithms, " bytes; accepted: at most ",
                           kLargestAlgorithms);
  }
  if (!refused.empty()) {
    return Fail(*job, WorkerFailed(member.place, false, 0, refused), Cause::kPrimary);
  }
  member.ready = message;
  const std::vector<Member>& members = job->generation->members;
  if (std::all_of(members.begin(), members.end(),
                  [](const Member& m) { return m.ready.has_value(); })) {
    StartTraining(*job);
  }
}

void Core::OnProgress(Worker& worker, const v1::Progress& message) {
  const auto [job, rank] = FindMember(worker, message.job(), message.generation());
  if (job == nullptr) return RefuseStale(worker, message.job(), message.generation());
  v1::Job& record = job->record.job;
  if (rank != 0 || record.state() == v1::STARTING) return;

  if (message.total_steps() != record.total_steps() ||
      message.steps_per_epoch() != record.steps_per_epoch()) {
    record.set_total_steps(message.total_steps());
    record.set_steps_per_epoch(message.steps_per_epoch());
    Publish(*job);
  }
  v1::JobEvent event;
  for (const v1::StepMetrics& step : message.steps()) {
    if (step.step() <= record.step()) continue;
    record.set_step(step.step());
    record.set_epoch(step.epoch());
    *record.mutable_last_step() = step;
    *event.mutable_step() = step;
    AddEvent(*job, event);
  }
  for (const v1::Evaluation& evaluation : message.evaluations()) {
    if (record.has_last_evaluation() && evaluation.step() <= record.last_evaluation().step()) {
      continue;
    }
    *record.mutable_last_evaluation() = evaluation;
    *event.mutable_evaluation() = evaluation;
    AddEvent(*job, event);
  }
  for (const v1::CheckpointInfo& checkpoint : message.checkpoints()) {
    *record.add_checkpoints() = checkpoint;
    *event.mutable_checkpoint() = checkpoint;
    AddEvent(*job, event);
    write_.durable = true;
  }
  // The worker deletes the older ones.
  const int keep =
      std::max(1, record.spec().checkpoint().has_keep() ? record.spec().checkpoint().keep() : 3);
  if (record.checkpoints_size() > keep) {
    record.mutable_checkpoints()->DeleteSubrange(0, record.checkpoints_size() - keep);
  }
  changed_jobs_.insert(job->record.number);
}

void Core::OnDigest(Worker& worker, const v1::ReplicaDigest& message) {
  const auto [job, rank] = FindMember(worker, message.job(), message.generation());
  if (job == nullptr) return RefuseStale(worker, message.job(), message.generation());
  // Members that find a difference themselves may have failed the job before all have reported it.
  if (job->record.job.state() == v1::STARTING) return;
  auto& digests = job->generation->digests;
  digests[message.step()][rank] = message.state_digest();
  if (digests[message.step()].size() == job->generation->members.size()) {
    const std::map<int, std::string> all = std::move(digests[message.step()]);
    digests.erase(message.step());
    CompareDigests(*job, message.step(), all);
  } else if (digests.size() > kMostPendingDigests) {
    digests.erase(digests.begin());
  }
}

void Core::OnEnded(Worker& worker, const v1::Ended& message) {
  const auto [job, rank] = FindMember(worker, message.job(), message.generation());
  if (job != nullptr) OnEnded(*job, job->generation->members[rank], message);
  if (!message.leaves() || worker.state == WorkerState::kLost) return;
  actions_.emplace_back(
      CloseStream{worker.stream, absl::AbortedError("the worker's process ends")});
  LoseWorker(worker, absl::StrCat("its process ends: ", message.error()));
}

void Core::OnEnded(JobEntry& job, Member& member, const v1::Ended& message) {
  member.ended = message;
  const v1::Job& record = job.record.job;
  Leave(job, member);

  std::string error;
  switch (message.outcome()) {
    case v1::Ended::COMPLETED:
      if (record.state() == v1::STARTING) error = "it completed before it was started";
      break;
    case v1::Ended::STOPPED:
      if (record.state() != v1::STOPPING) error = "it stopped without being told to";
      break;
    case v1::Ended::ERRORED:
      error = message.error().empty() ? "it gave no reason" : message.error();
      break;
    default:
      error = "it ended without an outcome";
      break;
  }
  if (!error.empty()) {
    Fail(job, WorkerFailed(member.place, record.state() != v1::STARTING, record.step(), error),
         message.secondary() ? Cause::kSecondary : Cause::kPrimary);
  }
  if (job.generation.has_value()) FinishIfAllLeft(job);
}

void Core::OnLog(Worker& worker, const v1::LogLines& message) {
  auto found = numbers_by_id_.find(message.job());
  if (found == numbers_by_id_.end()) return;
  for (const v1::LogLine& line : message.lines()) {
    LogRecord record{found->second, line};
    record.line.set_worker(worker.info.name());
    if (line.unix_ms() <= 0) record.line.set_unix_ms(absl::ToUnixMillis(now_));
    if (line.text().size() > kLongestLogLine) {
      record.line.set_text(absl::StrCat(line.text().substr(0, kLongestLogLine), "..."));
    }
    write_.logs.push_back(std::move(record));
  }
}

void Core::LoseWorker(Worker& worker, const std::string& cause) {
  streams_.erase(worker.stream);
  Move(worker, WorkerState::kLost);
  slots_changed_ = true;
  const std::set<int64_t> owners(worker.owner.begin(), worker.owner.end());
  for (int64_t number : owners) {
    if (number == 0) continue;
    JobEntry& job = jobs_.at(number);
    for (Member& member : job.generation->members) {
      if (member.left || member.place.worker != worker.info.name()) continue;
      const v1::Job& record = job.record.job;
      const std::string reason =
          WorkerLost(member.place, record.state() != v1::STARTING, record.step(), cause);
      Leave(job, member);
      Fail(job, reason, Cause::kLost);
      break;
    }
    if (job.generation.has_value()) FinishIfAllLeft(job);
  }
}

void Core::SettleWorker(Worker& worker) {
  if (worker.state == WorkerState::kLost) return;
  WorkerState state = WorkerState::kIdle;
  for (int64_t number : worker.owner) {
    if (number == 0) continue;
    if (jobs_.at(number).generation->started) {
      state = WorkerState::kTraining;
      break;
    }
    state = WorkerState::kAssigned;
  }
  if (state != worker.state) Move(worker, state);
}

std::vector<v1::WorkerInfo> Core::DescribeWorkers() const {
  std::vector<v1::WorkerInfo> infos;
  for (const auto& [name, worker] : workers_) {
    v1::WorkerInfo& info = infos.emplace_back();
    info.set_name(name);
    info.set_host(worker.info.host());
    info.set_address(worker.info.address());
    info.set_incarnation(worker.info.incarnation());
    info.set_state(Name(worker.state));
    info.set_device(worker.info.device());
    if (worker.info.has_gpu()) *info.mutable_gpu() = worker.info.gpu();
    info.set_slots(worker.info.slots());
    info.set_version(worker.info.version());
    info.set_last_seen_unix_ms(absl::ToUnixMillis(worker.last_seen));
    if (worker.state == WorkerState::kLost) continue;
    if (worker.gpu_usage.has_value()) *info.mutable_gpu_usage() = *worker.gpu_usage;
    info.set_free_slots(std::count(worker.owner.begin(), worker.owner.end(), 0));
    const std::set<int64_t> owners(worker.owner.begin(), worker.owner.end());
    for (int64_t number : owners) {
      if (number != 0) info.add_jobs(jobs_.at(number).record.job.id());
    }
  }
  return infos;
}

}  // namespace lockstep::server
