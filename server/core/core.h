// The coordinator's logic as a deterministic state machine: Step(event, now) -> actions (DESIGN.md,
// section 5). No gRPC, thread, clock or disk; the same events at the same times give the same
// actions.
//
// Thread-compatible: one thread drives it. It owns all that it knows; events and actions are
// values.
//
// Invariants:
//  1. A slot belongs to one job at most, from the placement until its member has left: has said
//  Ended
//     for the generation, or is lost.
//  2. A job has one live generation at most. Generations count up and STARTING is stored before the
//     first Prepare is sent, so that no number is ever used twice, not even after a crash.
//  3. A request is answered only when all that was decided up to it is stored.
//  4. Jobs start in the order of their submission; the first of the queue holds up the others.
//  5. Sequence numbers of a job's events start at 1 and have no holes.
//  6. The state of a job that has ended never changes.
//  7. A member that has not left is connected, under the incarnation it was placed with.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/core/events.h"
#include "server/core/placement.h"
#include "server/core/state.h"

namespace lockstep::server {

struct CoreOptions {
  absl::Duration heartbeat = absl::Seconds(1);
  absl::Duration expiry = absl::Seconds(6);             // silence after which a worker is LOST
  absl::Duration register_timeout = absl::Seconds(10);  // from the stream's begin to Register
  absl::Duration ready_timeout = absl::Seconds(60);     // from Prepare to everybody's Ready
  absl::Duration stop_grace = absl::Seconds(1);         // from Control.stop to Abort
  absl::Duration end_timeout = absl::Seconds(10);       // from Abort to everybody's Ended
  // How long after a failure that only echoes another one the other's report still becomes the
  // reason.
  absl::Duration primary_wait = absl::Seconds(2);
};

// Where a member stands in its generation.
struct Member {
  MemberPlacement place;
  uint64_t incarnation = 0;
  StreamId stream = 0;
  bool prepared = false;  // Prepare was sent
  bool left = false;      // holds nothing of the generation any more
  std::optional<v1::Ready> ready;
  bool told_algorithms = false;  // UseAlgorithms was sent
  std::optional<v1::Ended> ended;
};

struct Generation {
  int64_t number = 0;
  std::vector<Member> members;  // by rank
  Ticket prepare_after = 0;     // send Prepare when this is stored
  absl::Time ready_deadline = absl::InfiniteFuture();
  absl::Time abort_at = absl::InfiniteFuture();      // a polite stop becomes an Abort
  absl::Time end_deadline = absl::InfiniteFuture();  // members that have not left by then are LOST
  bool started = false;                              // Start was sent
  std::optional<absl::Time> secondary_since;  // the reason so far is the echo of another failure
  std::map<int64_t, std::map<int, std::string>> digests;  // of replicas: step -> rank -> digest
};

struct JobEntry {
  JobRecord record;
  v1::Algorithms algorithms;  // that its members compute with
  int64_t last_sequence = 0;
  std::optional<Generation> generation;  // exactly in STARTING, RUNNING and STOPPING
};

struct Worker {
  v1::Register info;
  WorkerState state = WorkerState::kIdle;
  StreamId stream = 0;
  absl::Time last_seen;
  std::vector<int64_t> owner;             // by slot: number of the job that has it, or 0
  std::optional<v1::GpuUsage> gpu_usage;  // as it told last
};

class Core {
 public:
  // `stored`: all jobs that were ever stored. Start() must be called next, once.
  Core(const CoreOptions& options, std::vector<StoredJob> stored);

  // Goes on after a (re)start: queued jobs stay queued, jobs that ran end FAILED and say why.
  std::vector<Action> Start(absl::Time now);

  // `now` must not go back; a step back counts as no time passed.
  std::vector<Action> Step(const Event& event, absl::Time now);

  std::vector<v1::WorkerInfo> DescribeWorkers() const;  // by name
  const std::map<int64_t, JobEntry>& jobs() const { return jobs_; }
  const std::map<std::string, Worker>& workers() const { return workers_; }
  const TransitionCounts& transitions() const { return transitions_; }

 private:
  struct Stream {
    std::string worker;  // empty: has not registered
    absl::Time opened;
  };
  // How a failure weighs when another one is known already. The replicas' digests are evidence
  // however late they come; what else is primary must come soon after its echo.
  enum class Cause { kPrimary, kSecondary, kLost, kDigests };
  struct PendingReply {
    Ticket after;
    Reply reply;
  };
  struct WorkerOfJob {
    JobEntry* job = nullptr;  // null: no live generation of that number with this member
    int rank = 0;
  };

  // core.cc: requests, time, what is stored
  void On(const Submit& event);
  void On(const Cancel& event);
  void On(const AlarmFired& event);
  void On(const Persisted& event);
  void On(const Shutdown& event);
  void Answer(CallId call, absl::Status error);
  void Answer(CallId call, int64_t job);
  absl::Time NextDeadline() const;
  std::vector<Action> Flush();
  void Log(int64_t job, const std::string& severity, const std::string& text);

  // workers.cc: streams and what comes over them
  void On(const StreamOpened& event);
  void On(const StreamLost& event);
  void On(const WorkerSaid& event);
  void OnRegister(StreamId stream, const v1::Register& message);
  void OnReady(Worker& worker, const v1::Ready& message);
  void OnProgress(Worker& worker, const v1::Progress& message);
  void OnDigest(Worker& worker, const v1::ReplicaDigest& message);
  void OnEnded(Worker& worker, const v1::Ended& message);
  void OnEnded(JobEntry& job, Member& member, const v1::Ended& message);
  void OnLog(Worker& worker, const v1::LogLines& message);
  WorkerOfJob FindMember(const Worker& worker, const std::string& job, int64_t generation);
  void RefuseStale(const Worker& worker, const std::string& job, int64_t generation);
  void LoseWorker(Worker& worker, const std::string& cause);
  void SettleWorker(Worker& worker);
  void ForgetOldWorkers();

  // jobs.cc: a job from the queue to its end
  void Schedule();
  std::vector<MemberPlacement> PlaceJob(const JobEntry& job, std::string* waits_for) const;
  void StartJob(JobEntry& job, std::vector<MemberPlacement> places);
  void SendPrepare(JobEntry& job);
  void StartTraining(JobEntry& job);
  std::string CompareReady(const JobEntry& job) const;
  std::string CompareProbes(const JobEntry& job) const;
  bool ShareAlgorithms(JobEntry& job, int source_rank);
  void WarnOfDamage(JobEntry& job, int source_rank);
  void StopPolitely(JobEntry& job);
  void Fail(JobEntry& job, const std::string& reason, Cause cause);
  void AbortMembers(JobEntry& job);
  void Leave(JobEntry& job, Member& member);
  void CompareDigests(JobEntry& job, int64_t step, const std::map<int, std::string>& digests);
  void FinishIfAllLeft(JobEntry& job);
  void End(JobEntry& job, v1::JobState state);
  void Move(JobEntry& job, v1::JobState to);
  void Move(Worker& worker, WorkerState to);
  void SetReason(JobEntry& job, const std::string& reason);
  void Publish(JobEntry& job);  // adds an event with the job as it is now
  void AddEvent(JobEntry& job, v1::JobEvent event);

  const CoreOptions options_;
  absl::Time now_ = absl::InfinitePast();
  std::map<int64_t, JobEntry> jobs_;  // by number
  std::map<std::string, int64_t> numbers_by_id_;
  std::map<std::string, int64_t> numbers_by_request_;
  std::set<int64_t> queue_;   // QUEUED
  std::set<int64_t> active_;  // STARTING, RUNNING, STOPPING
  std::map<std::string, Worker> workers_;
  std::map<StreamId, Stream> streams_;
  TransitionCounts transitions_;

  bool slots_changed_ = false;  // look at the queue before this step ends
  bool shutdown_ = false;
  absl::Time alarm_ = absl::InfiniteFuture();
  Ticket last_ticket_ = 0;
  Ticket persisted_ = 0;
  std::vector<PendingReply> pending_replies_;  // by ticket

  // Of the step that runs.
  std::vector<Action> actions_;
  Write write_;
  std::set<int64_t> changed_jobs_;
  std::vector<std::pair<CallId, absl::StatusOr<int64_t>>> answers_;
};

}  // namespace lockstep::server
