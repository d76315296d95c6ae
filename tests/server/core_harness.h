// The core with its actions caught: what it sends, answers and stores, for scenario tests.
//
// Thread-compatible.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/core/core.h"

namespace lockstep::server {

class CoreHarness {
 public:
  CoreHarness() { Restart(); }

  // A new core over what is stored.
  void Restart() {
    std::vector<StoredJob> jobs;
    for (const auto& [number, job] : disk) jobs.push_back(job);
    writes.clear();
    alarm = absl::InfiniteFuture();
    core = std::make_unique<Core>(options, jobs);
    Do(core->Start(now));
  }

  void Give(const Event& event) { Do(core->Step(event, now)); }

  void Advance(absl::Duration by) {
    const absl::Time target = now + by;
    while (alarm <= target) {
      now = std::max(now, alarm);
      alarm = absl::InfiniteFuture();
      Give(AlarmFired());
    }
    now = target;
  }

  // Stores all that is written and says so.
  void Persist() {
    while (!writes.empty()) {
      Ticket last = 0;
      for (const Write& write : std::exchange(writes, {})) {
        for (const JobRecord& record : write.jobs) disk[record.number].record = record;
        for (const AlgorithmsRecord& record : write.algorithms) {
          disk[record.job].algorithms = record.algorithms;
        }
        for (const EventRecord& record : write.events) {
          disk[record.job].last_sequence = record.event.sequence();
          events[record.job].push_back(record.event);
        }
        for (const LogRecord& record : write.logs) logs.push_back(record);
        last = write.ticket;
      }
      Give(Persisted{last});
    }
  }

  // A connected worker; its stream.
  StreamId AddWorker(const std::string& name, int slots, uint64_t incarnation = 1,
                     const v1::Gpu* gpu = nullptr) {
    const StreamId stream = ++last_stream_;
    Give(StreamOpened{stream});
    v1::WorkerMessage message;
    v1::Register& reg = *message.mutable_register_();
    reg.set_name(name);
    reg.set_incarnation(incarnation);
    reg.set_host(absl::StrCat("host-of-", name));
    reg.set_device(gpu == nullptr ? "cpu" : "cuda");
    if (gpu != nullptr) *reg.mutable_gpu() = *gpu;
    reg.set_slots(slots);
    Give(WorkerSaid{stream, message});
    return stream;
  }

  // Submits a job of `slots` slots (0: not given) and 8 shards, stores it, and returns its id.
  bool exact = true;  // of the jobs submitted
  std::string SubmitJob(int slots, const std::string& resume_from = "") {
    v1::SubmitJobRequest request;
    request.mutable_spec()->set_name("fashion");
    request.mutable_spec()->mutable_train()->set_shards(8);
    if (!exact) request.mutable_spec()->mutable_train()->set_exact(false);
    if (slots > 0) request.mutable_spec()->mutable_resources()->set_slots(slots);
    request.set_resume_from(resume_from);
    const CallId call = Ask(Submit{0, request});
    Persist();
    return replies.at(call).value().id();
  }

  CallId Ask(Submit submit) {
    submit.call = ++last_call_;
    Give(submit);
    return last_call_;
  }
  CallId Ask(Cancel cancel) {
    cancel.call = ++last_call_;
    Give(cancel);
    return last_call_;
  }

  v1::Ready MakeReady(const std::string& job, int64_t generation = 1) {
    v1::Ready ready;
    ready.set_job(job);
    ready.set_generation(generation);
    ready.set_state_version(-1);
    ready.set_fingerprint("avx512");
    ready.set_data_digest("d0");
    return ready;
  }
  void Say(StreamId stream, const v1::Ready& ready) {
    v1::WorkerMessage message;
    *message.mutable_ready() = ready;
    Give(WorkerSaid{stream, message});
  }
  void SayReady(StreamId stream, const std::string& job) { Say(stream, MakeReady(job)); }

  void SayStep(StreamId stream, const std::string& job, int64_t step) {
    v1::WorkerMessage message;
    v1::Progress& progress = *message.mutable_progress();
    progress.set_job(job);
    progress.set_generation(1);
    progress.set_total_steps(100);
    progress.set_steps_per_epoch(10);
    v1::StepMetrics& metrics = *progress.add_steps();
    metrics.set_step(step);
    metrics.set_epoch((step + 9) / 10);
    metrics.mutable_train()->set_loss(1.0 / static_cast<double>(step));
    Give(WorkerSaid{stream, message});
  }

  void SayDigest(StreamId stream, const std::string& job, int64_t step, const std::string& digest) {
    v1::WorkerMessage message;
    message.mutable_digest()->set_job(job);
    message.mutable_digest()->set_generation(1);
    message.mutable_digest()->set_step(step);
    message.mutable_digest()->set_state_digest(digest);
    Give(WorkerSaid{stream, message});
  }

  void SayEnded(StreamId stream, const std::string& job, v1::Ended::Outcome outcome,
                const std::string& error = "", bool secondary = false,
                const std::string& digest = "s") {
    v1::WorkerMessage message;
    v1::Ended& ended = *message.mutable_ended();
    ended.set_job(job);
    ended.set_generation(1);
    ended.set_outcome(outcome);
    ended.set_error(error);
    ended.set_secondary(secondary);
    if (outcome != v1::Ended::ERRORED) ended.set_state_digest(digest);
    Give(WorkerSaid{stream, message});
  }

  void Heartbeat(StreamId stream) {
    v1::WorkerMessage message;
    message.mutable_heartbeat();
    Give(WorkerSaid{stream, message});
  }

  // A job that runs on workers "w0", "w1", ... of one slot each; their streams.
  std::vector<StreamId> RunningJob(int members, std::string* job) {
    std::vector<StreamId> streams;
    for (int i = 0; i < members; ++i) streams.push_back(AddWorker(absl::StrCat("w", i), 1));
    *job = SubmitJob(members);
    for (StreamId stream : streams) SayReady(stream, *job);
    Persist();
    return streams;
  }

  const v1::Job& job(const std::string& id) const {
    for (const auto& [number, entry] : core->jobs()) {
      if (entry.record.job.id() == id) return entry.record.job;
    }
    static const v1::Job none;
    return none;
  }
  int FreeSlots() const {
    int free = 0;
    for (const v1::WorkerInfo& info : core->DescribeWorkers()) free += info.free_slots();
    return free;
  }
  // The last message of that kind sent to the stream; default-constructed where there is none.
  v1::CoordinatorMessage Last(StreamId stream, v1::CoordinatorMessage::MessageCase kind) const {
    v1::CoordinatorMessage last;
    auto found = sent.find(stream);
    if (found == sent.end()) return last;
    for (const v1::CoordinatorMessage& message : found->second) {
      if (message.message_case() == kind) last = message;
    }
    return last;
  }

  CoreOptions options;
  absl::Time now = absl::FromUnixSeconds(1'700'000'000);
  std::unique_ptr<Core> core;
  absl::Time alarm = absl::InfiniteFuture();
  std::vector<Write> writes;  // not yet stored
  std::map<int64_t, StoredJob> disk;
  std::map<int64_t, std::vector<v1::JobEvent>> events;  // stored
  std::vector<LogRecord> logs;                          // stored
  std::map<CallId, absl::StatusOr<v1::Job>> replies;
  std::map<StreamId, std::vector<v1::CoordinatorMessage>> sent;
  std::map<StreamId, absl::Status> closed;

 private:
  void Do(const std::vector<Action>& actions) {
    for (const Action& action : actions) {
      if (const auto* send = std::get_if<SendToWorker>(&action)) {
        sent[send->stream].push_back(send->message);
      } else if (const auto* close = std::get_if<CloseStream>(&action)) {
        closed[close->stream] = close->status;
      } else if (const auto* reply = std::get_if<Reply>(&action)) {
        replies.emplace(reply->call, reply->job);
      } else if (const auto* write = std::get_if<Write>(&action)) {
        writes.push_back(*write);
      } else if (const auto* set = std::get_if<SetAlarm>(&action)) {
        alarm = set->at;
      }
    }
  }

  StreamId last_stream_ = 0;
  CallId last_call_ = 0;
};

}  // namespace lockstep::server
