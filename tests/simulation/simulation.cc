#include "tests/simulation/simulation.h"

#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/core/core.h"
#include "tests/simulation/cluster.h"
#include "tests/simulation/invariants.h"

namespace lockstep::server {
namespace {

constexpr int kMostJobs = 40;

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : random_(seed), invariants_(options_, disk_), cluster_(random_, invariants_, happenings_) {
    StartCoordinator();
  }

  Outcome Run(int actions) {
    for (int i = 0; i < actions && fine(); ++i) Act();
    if (fine()) Recover();
    CountTransitions();
    return {events_, invariants_.violation(), transitions_, happenings_};
  }

 private:
  struct Call {
    bool submit = false;
    std::string name;  // request id, or job
  };

  bool fine() const { return invariants_.violation().empty(); }

  // ---- the coordinator's process ----

  void StartCoordinator() {
    invariants_.OnRestart();
    alarm_ = absl::InfiniteFuture();
    last_ticket_ = stored_ticket_ = told_ticket_ = 0;
    core_ = std::make_unique<Core>(options_, disk_.Load());
    Do(core_->Start(now_));
    invariants_.Check(*core_, now_);
  }

  void CrashCoordinator() {
    ++happenings_["coordinator crashes"];
    Store(random_.Below(static_cast<int64_t>(writes_.size()) + 1));
    writes_.clear();
    cluster_.DropAll();
    for (const auto& [id, call] : calls_) {
      if (call.submit) unanswered_.push_back(call.name);
    }
    calls_.clear();
    CountTransitions();
    StartCoordinator();
  }

  void StopCoordinator() {
    ++happenings_["coordinator stops"];
    Give(Shutdown());
    if (!fine()) return;
    Store(static_cast<int64_t>(writes_.size()));
    CrashCoordinator();
  }

  void CountTransitions() {
    const TransitionCounts& counts = core_->transitions();
    for (size_t from = 0; from < counts.job.size(); ++from) {
      for (size_t to = 0; to < counts.job.size(); ++to) {
        transitions_.job[from][to] += counts.job[from][to];
      }
    }
    for (size_t from = 0; from < counts.worker.size(); ++from) {
      for (size_t to = 0; to < counts.worker.size(); ++to) {
        transitions_.worker[from][to] += counts.worker[from][to];
      }
    }
  }

  void Give(const Event& event) {
    if (!fine()) return;
    ++events_;
    Do(core_->Step(event, now_));
    invariants_.Check(*core_, now_);
  }

  void Do(const std::vector<Action>& actions) {
    for (const Action& action : actions) {
      if (const auto* send = std::get_if<SendToWorker>(&action)) {
        auto found = cluster_.connections.find(send->stream);
        if (found == cluster_.connections.end() || found->second.closed) {
          invariants_.Violate("streams: a message to one that is closed");
        } else if (!found->second.abandoned) {
          found->second.down.push_back(send->message);
        }
      } else if (const auto* close = std::get_if<CloseStream>(&action)) {
        CloseConnection(close->stream);
      } else if (const auto* reply = std::get_if<Reply>(&action)) {
        TakeReply(*reply);
      } else if (const auto* write = std::get_if<Write>(&action)) {
        if (write->ticket != ++last_ticket_) invariants_.Violate("writes: a ticket is missing");
        invariants_.OnWrite(*write);
        writes_.push_back(*write);
      } else if (const auto* alarm = std::get_if<SetAlarm>(&action)) {
        alarm_ = alarm->at;
      }
    }
  }

  void CloseConnection(StreamId stream) {
    auto found = cluster_.connections.find(stream);
    if (found == cluster_.connections.end() || found->second.closed) {
      return invariants_.Violate("streams: one was closed twice");
    }
    found->second.closed = true;
    if (found->second.abandoned || found->second.worker < 0) cluster_.connections.erase(found);
  }

  void TakeReply(const Reply& reply) {
    auto found = calls_.find(reply.call);
    if (found == calls_.end()) return invariants_.Violate("replies: nobody asked");
    const Call call = found->second;
    calls_.erase(found);
    if (!reply.job.ok()) return;
    if (call.submit) {
      ++happenings_["acknowledged submissions"];
      invariants_.OnSubmitted(*reply.job, call.name);
      const auto [known, fresh] = jobs_by_request_.emplace(call.name, reply.job->id());
      if (known->second != reply.job->id()) {
        invariants_.Violate("acknowledged: one request made two jobs");
      }
      if (fresh) known_jobs_.push_back(reply.job->id());
    } else {
      ++happenings_["acknowledged cancellations"];
      invariants_.OnCancelled(*reply.job);
    }
  }

  // ---- the disk ----

  void Store(int64_t count) {
    for (; count > 0; --count) {
      const Write& write = writes_.front();
      for (const JobRecord& record : write.jobs) {
        disk_.jobs[record.number] = record;
        disk_.last_sequences.emplace(record.number, 0);
      }
      for (const AlgorithmsRecord& record : write.algorithms) {
        disk_.algorithms[record.job] = record.algorithms;
      }
      for (const EventRecord& record : write.events) {
        disk_.last_sequences[record.job] = record.event.sequence();
      }
      stored_ticket_ = write.ticket;
      writes_.pop_front();
    }
  }

  void TellStored() {
    if (told_ticket_ == stored_ticket_) return;
    told_ticket_ = stored_ticket_;
    Give(Persisted{stored_ticket_});
  }

  // ---- clients ----

  void SubmitJob(const std::string& request_id) {
    v1::SubmitJobRequest request;
    request.set_request_id(request_id);
    request.mutable_spec()->set_name("job");
    request.mutable_spec()->mutable_train()->set_shards(1 + static_cast<int>(random_.Below(8)));
    if (random_.Chance(0.8)) {
      request.mutable_spec()->mutable_resources()->set_slots(1 +
                                                             static_cast<int>(random_.Below(5)));
    }
    if (random_.Chance(0.1)) request.set_resume_from("/old");
    const CallId call = ++last_call_;
    calls_[call] = {true, request_id};
    Give(Submit{call, std::move(request)});
  }

  void CancelJob(const std::string& job) {
    invariants_.OnCancelAsked(job);
    const CallId call = ++last_call_;
    calls_[call] = {false, job};
    Give(Cancel{call, job});
  }

  // ---- the network ----

  void DeliverUp(Connection& connection) {
    if (connection.up.empty()) {
      if (!connection.abandoned || connection.silent) return;
      const StreamId id = connection.id;
      cluster_.connections.erase(id);
      return Give(StreamLost{id, "connection closed"});
    }
    v1::WorkerMessage message = std::move(connection.up.front());
    connection.up.pop_front();
    if (!connection.closed) TellInvariants(connection, message);
    Give(WorkerSaid{connection.id, std::move(message)});
  }

  // What a running job's members say counts, in the order in which the core hears it.
  void TellInvariants(const Connection& connection, const v1::WorkerMessage& message) {
    const bool ended = message.has_ended();
    if (!ended && !message.has_digest()) return;
    const std::string& job = ended ? message.ended().job() : message.digest().job();
    for (const auto& [number, entry] : core_->jobs()) {
      if (entry.record.job.id() != job || entry.record.job.state() != v1::RUNNING) continue;
      const std::vector<Member>& members = entry.generation->members;
      for (size_t rank = 0; rank < members.size(); ++rank) {
        if (members[rank].stream != connection.id) continue;
        if (ended) {
          invariants_.OnEnded(job, static_cast<int>(rank), message.ended());
        } else {
          invariants_.OnDigest(job, message.digest().step(), message.digest().state_digest());
        }
      }
    }
  }

  void DeliverDown(Connection& connection) {
    const int worker = connection.worker;
    if (worker < 0 || connection.abandoned || cluster_.workers[worker].stalled) return;
    if (!connection.down.empty()) {
      const v1::CoordinatorMessage message = std::move(connection.down.front());
      connection.down.pop_front();
      cluster_.Receive(worker, message, now_);
    } else if (connection.closed) {
      cluster_.Disconnect(worker, false);
    }
  }

  void ConnectWorker(int index) {
    SimulatedWorker& worker = cluster_.workers[index];
    if (!worker.alive) cluster_.Restart(index);
    if (worker.stream == 0 && !worker.stalled) Give(StreamOpened{cluster_.Connect(index)});
  }

  // Whoever connects to the port and says what no worker says; or a worker that speaks of a
  // generation that nobody knows.
  void Rubbish() {
    ++happenings_["rubbish from the network"];
    const StreamId id = (StreamId{1} << 40) + static_cast<StreamId>(events_);
    v1::WorkerMessage message;
    switch (random_.Below(5)) {
      case 0:
        message.mutable_heartbeat();
        break;
      case 1:
        message.mutable_register_()->set_name("a b");
        break;
      case 2: {  // another process with the name of a worker
        v1::Register& reg = *message.mutable_register_();
        reg.set_name(random_.Pick(cluster_.workers).name);
        reg.set_incarnation(uint64_t{1} << 50);
        reg.set_device("cpu");
        reg.set_slots(1);
        break;
      }
      default: {  // a generation long gone, from a real worker
        SimulatedWorker& worker = random_.Pick(cluster_.workers);
        auto found = cluster_.connections.find(worker.stream);
        if (found == cluster_.connections.end() || known_jobs_.empty()) return;
        const std::string& job = random_.Pick(known_jobs_);
        if (random_.Chance(0.5)) {
          message.mutable_ended()->set_job(job);
          message.mutable_ended()->set_generation(random_.Below(2) * 7);
        } else {
          message.mutable_ready()->set_job(job);
          message.mutable_ready()->set_generation(9);
        }
        found->second.up.push_back(std::move(message));
        return;
      }
    }
    Connection& connection = cluster_.connections[id];
    connection.id = id;
    connection.abandoned = true;  // it goes as soon as it has spoken
    if (random_.Chance(0.7)) connection.up.push_back(std::move(message));
    Give(StreamOpened{id});
  }

  // ---- time ----

  void Advance(absl::Duration by) {
    const absl::Time target = now_ + by;
    while (fine() && alarm_ <= target) {
      now_ = std::max(now_, alarm_);
      alarm_ = absl::InfiniteFuture();
      Give(AlarmFired());
    }
    now_ = target;
    cluster_.SendHeartbeats(now_);
  }

  // Time passes, heartbeats flow, and nobody works: what has a deadline runs into it.
  void LongWait() {
    ++happenings_["long waits"];
    for (int64_t seconds = 5 + random_.Below(60); seconds > 0 && fine(); --seconds) {
      Advance(absl::Seconds(1));
      std::vector<StreamId> ids;
      for (const auto& [id, connection] : cluster_.connections) ids.push_back(id);
      for (StreamId id : ids) {
        for (int i = 0; i < 3 && fine(); ++i) {
          auto found = cluster_.connections.find(id);
          if (found != cluster_.connections.end()) DeliverUp(found->second);
        }
      }
    }
  }

  // ---- what happens next ----

  void Act() {
    const int worker = static_cast<int>(random_.Below(cluster_.workers.size()));
    SimulatedWorker& w = cluster_.workers[worker];
    const int64_t dice = random_.Below(10'000);
    if (dice < 3'000) {
      if (!cluster_.connections.empty()) DeliverUp(random_.Pick(cluster_.connections).second);
    } else if (dice < 5'000) {
      if (!cluster_.connections.empty()) DeliverDown(random_.Pick(cluster_.connections).second);
    } else if (dice < 7'200) {
      if (w.alive && !w.stalled) cluster_.Work(worker, true);
    } else if (dice < 7'900) {
      Store(random_.Below(static_cast<int64_t>(writes_.size()) + 1));
    } else if (dice < 8'600) {
      TellStored();
    } else if (dice < 9'200) {
      Advance(absl::Milliseconds(1 + random_.Below(300)));
    } else if (dice < 9'320) {
      if (!unanswered_.empty()) {  // the client tries again
        const std::string request = unanswered_.front();
        unanswered_.pop_front();
        SubmitJob(request);
      } else if (core_->jobs().size() < kMostJobs) {
        SubmitJob(absl::StrCat("request-", ++last_request_));
      }
    } else if (dice < 9'350) {
      if (!known_jobs_.empty()) CancelJob(random_.Pick(known_jobs_));
    } else if (dice < 9'750) {
      ConnectWorker(worker);
    } else if (dice < 9'770) {
      if (w.alive) cluster_.Crash(worker, random_.Chance(0.2));
    } else if (dice < 9'785) {
      if (w.alive && w.stream != 0) {
        ++happenings_["connections lost"];
        cluster_.Disconnect(worker, random_.Chance(0.3));
      }
    } else if (dice < 9'800) {
      if (w.alive) ++happenings_["workers stopped"];
      w.stalled = w.alive;
    } else if (dice < 9'920) {
      w.stalled = false;
    } else if (dice < 9'980) {
      Rubbish();
    } else if (dice < 9'990) {
      LongWait();
    } else if (dice < 9'997) {
      CrashCoordinator();
    } else {
      StopCoordinator();
    }
  }

  // No more faults: every job must end, but for those that wait for more slots than there are.
  void Recover() {
    for (SimulatedWorker& worker : cluster_.workers) worker.stalled = false;
    for (int round = 0; round < 400 && fine(); ++round) {
      for (int w = 0; w < static_cast<int>(cluster_.workers.size()); ++w) {
        ConnectWorker(w);
        for (int i = 0; i < 4; ++i) cluster_.Work(w, false);
      }
      std::vector<StreamId> ids;
      for (const auto& [id, connection] : cluster_.connections) ids.push_back(id);
      for (StreamId id : ids) {
        for (int i = 0; i < 12 && fine(); ++i) {
          auto found = cluster_.connections.find(id);
          if (found != cluster_.connections.end()) DeliverUp(found->second);
          found = cluster_.connections.find(id);
          if (found != cluster_.connections.end()) DeliverDown(found->second);
        }
      }
      Store(static_cast<int64_t>(writes_.size()));
      TellStored();
      Advance(absl::Milliseconds(250));
      if (round > 50 && Settled()) break;
    }
    if (!fine()) return;
    if (!calls_.empty()) invariants_.Violate("replies: a call was never answered");
    if (!Settled()) invariants_.Violate("stuck: not every job ended when all faults were over");
  }

  // The queue may wait for a job that needs more slots than exist; the invariants say that it must.
  bool Settled() const {
    for (const auto& [number, entry] : core_->jobs()) {
      const v1::JobState state = entry.record.job.state();
      if (!HasEnded(state) && state != v1::QUEUED) return false;
    }
    return true;
  }

  const CoreOptions options_;
  Random random_;
  Disk disk_;
  Invariants invariants_;
  std::map<std::string, int64_t> happenings_;
  Cluster cluster_;
  std::unique_ptr<Core> core_;
  TransitionCounts transitions_;  // of the coordinators before
  int64_t events_ = 0;
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  absl::Time alarm_ = absl::InfiniteFuture();

  std::deque<Write> writes_;  // not yet on the disk
  Ticket last_ticket_ = 0;
  Ticket stored_ticket_ = 0;
  Ticket told_ticket_ = 0;

  std::map<CallId, Call> calls_;
  CallId last_call_ = 0;
  int64_t last_request_ = 0;
  std::deque<std::string> unanswered_;  // request ids
  std::map<std::string, std::string> jobs_by_request_;
  std::vector<std::string> known_jobs_;
};

}  // namespace

Outcome Simulate(uint64_t seed, int actions) { return Simulation(seed).Run(actions); }

}  // namespace lockstep::server
