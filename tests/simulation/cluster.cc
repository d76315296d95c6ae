#include "tests/simulation/cluster.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace lockstep::server {

Cluster::Cluster(Random& random, Invariants& invariants, std::map<std::string, int64_t>& happenings)
    : random_(random), invariants_(invariants), happenings_(happenings) {
  const int count = 1 + static_cast<int>(random.Below(5));
  for (int i = 0; i < count; ++i) {
    SimulatedWorker& worker = workers.emplace_back();
    worker.name = absl::StrCat("w", i);
    worker.slots = 1 + static_cast<int>(random.Below(3));
    worker.algorithm = random.Chance(0.3) ? "in reverse" : "in order";
  }
}

StreamId Cluster::Connect(int index) {
  SimulatedWorker& worker = workers[index];
  Connection& connection = connections[++last_stream_];
  connection.id = last_stream_;
  connection.worker = index;
  worker.stream = last_stream_;
  worker.registered = false;
  v1::WorkerMessage message;
  v1::Register& reg = *message.mutable_register_();
  reg.set_name(worker.name);
  reg.set_incarnation(worker.incarnation);
  reg.set_host(worker.name);
  reg.set_device("cpu");
  reg.set_slots(worker.slots);
  connection.up.push_back(std::move(message));
  return last_stream_;
}

void Cluster::Disconnect(int index, bool silent) {
  SimulatedWorker& worker = workers[index];
  worker.parts.clear();
  worker.registered = false;
  auto found = connections.find(worker.stream);
  worker.stream = 0;
  if (found == connections.end()) return;
  found->second.abandoned = true;
  found->second.silent = silent;
  found->second.down.clear();
  if (found->second.closed) connections.erase(found);
}

void Cluster::Crash(int index, bool silent) {
  ++happenings_[silent ? "power cuts" : "worker crashes"];
  Disconnect(index, silent);
  workers[index].alive = false;
  workers[index].stalled = false;
}

void Cluster::Restart(int index) {
  workers[index].alive = true;
  workers[index].incarnation = ++last_incarnation_;
}

void Cluster::DropAll() {
  connections.clear();
  for (SimulatedWorker& worker : workers) {
    worker.parts.clear();
    worker.stream = 0;
    worker.registered = false;
  }
}

void Cluster::SendHeartbeats(absl::Time now) {
  for (SimulatedWorker& worker : workers) {
    if (!worker.alive || worker.stalled || !worker.registered || now < worker.next_heartbeat) {
      continue;
    }
    worker.next_heartbeat = now + absl::Seconds(1);
    v1::WorkerMessage message;
    message.mutable_heartbeat();
    Say(worker, std::move(message));
  }
}

void Cluster::Say(SimulatedWorker& worker, v1::WorkerMessage message) {
  auto found = connections.find(worker.stream);
  if (found != connections.end()) found->second.up.push_back(std::move(message));
}

void Cluster::Receive(int index, const v1::CoordinatorMessage& message, absl::Time now) {
  SimulatedWorker& worker = workers[index];
  const auto part = [&](const std::string& job, int64_t generation) -> Part* {
    auto found = worker.parts.find({job, generation});
    return found == worker.parts.end() ? nullptr : &found->second;
  };
  switch (message.message_case()) {
    case v1::CoordinatorMessage::kRegistered:
      worker.registered = true;
      worker.next_heartbeat = now;
      break;
    case v1::CoordinatorMessage::kPrepare:
      Prepare(worker, message.prepare(), worker.stream);
      break;
    case v1::CoordinatorMessage::kStart:
      if (Part* p = part(message.start().job(), message.start().generation())) {
        p->phase = Part::Phase::kTraining;
        Team& team = teams_[{message.start().job(), message.start().generation()}];
        if (!team.started.empty() && team.algorithm != p->algorithm) {
          invariants_.Violate(absl::StrCat("algorithms: members of job ", message.start().job(),
                                           " start with ", team.algorithm, " and ", p->algorithm));
        }
        team.started.insert(p->prepare.rank());
        team.algorithm = p->algorithm;
        if (team.total == 0) team.total = 1 + random_.Below(6);
      }
      break;
    case v1::CoordinatorMessage::kUseAlgorithms: {
      const v1::UseAlgorithms& use = message.use_algorithms();
      if (Part* p = part(use.job(), use.generation())) {
        ++happenings_["members told to use the job's algorithms"];
        p->algorithm = use.algorithms().by_problem().at("product");
        p->phase = Part::Phase::kPreparing;
      }
      break;
    }
    case v1::CoordinatorMessage::kControl:
      if (Part* p = part(message.control().job(), message.control().generation())) p->stop = true;
      break;
    case v1::CoordinatorMessage::kAbort:
      if (Part* p = part(message.abort().job(), message.abort().generation())) {
        p->abort = true;
        p->hangs = random_.Chance(0.03);
        if (p->hangs) ++happenings_["members that hang in abort"];
      }
      break;
    default:
      break;
  }
}

void Cluster::Prepare(SimulatedWorker& worker, const v1::Prepare& prepare, StreamId stream) {
  const v1::Member& me = prepare.members(prepare.rank());
  if (me.worker() != worker.name || me.incarnation() != worker.incarnation) {
    invariants_.Violate(absl::StrCat("members: ", worker.name, " was prepared as ", me.worker()));
  }
  for (const auto& [key, part] : worker.parts) {
    if (key.first == prepare.job()) {
      invariants_.Violate(
          absl::StrCat("generations: ", worker.name, " has two of job ", key.first));
    }
    const v1::Member& other = part.prepare.members(part.prepare.rank());
    for (int slot : me.slots()) {
      if (std::find(other.slots().begin(), other.slots().end(), slot) != other.slots().end()) {
        invariants_.Violate(absl::StrCat("slots: ", worker.name, " was given slot ", slot,
                                         ", which runs job ", key.first));
      }
    }
  }
  invariants_.OnPrepare(prepare, stream);
  Part& part = worker.parts[{prepare.job(), prepare.generation()}];
  part.prepare = prepare;
  part.algorithm = worker.algorithm;
}

std::string Cluster::Digest(const Part& part, int64_t step) {
  return absl::StrCat("state after ", step, " of ", part.prepare.job(),
                      part.diverged ? absl::StrCat(", but for ", part.prepare.rank()) : "");
}

void Cluster::End(SimulatedWorker& worker, const PartKey& key, v1::Ended::Outcome outcome,
                  const std::string& error, bool secondary) {
  const Part& part = worker.parts.at(key);
  v1::WorkerMessage message;
  v1::Ended& ended = *message.mutable_ended();
  ended.set_job(key.first);
  ended.set_generation(key.second);
  ended.set_outcome(outcome);
  ended.set_error(error);
  ended.set_secondary(secondary);
  if (outcome != v1::Ended::ERRORED) ended.set_state_digest(Digest(part, teams_[key].step));
  if (outcome == v1::Ended::COMPLETED) ended.mutable_result()->set_steps(teams_[key].step);
  worker.parts.erase(key);
  Say(worker, std::move(message));
}

void Cluster::Work(int index, bool faults) {
  SimulatedWorker& worker = workers[index];
  if (worker.parts.empty()) return;
  auto it = worker.parts.begin();
  std::advance(it, random_.Below(static_cast<int64_t>(worker.parts.size())));
  const PartKey key = it->first;
  WorkOn(worker, key, it->second, faults);
}

void Cluster::WorkOn(SimulatedWorker& worker, const PartKey& key, Part& part, bool faults) {
  if (part.hangs && faults) return;
  if (part.abort) return End(worker, key, v1::Ended::STOPPED, "", false);
  if (part.phase == Part::Phase::kReady) return;
  if (part.phase == Part::Phase::kPreparing) {
    if (faults && random_.Chance(0.02)) {
      ++happenings_["errors while preparing"];
      return End(worker, key, v1::Ended::ERRORED, "cannot open train-images", false);
    }
    v1::WorkerMessage message;
    v1::Ready& ready = *message.mutable_ready();
    ready.set_job(key.first);
    ready.set_generation(key.second);
    ready.set_state_version(part.prepare.resume_from().empty() ? -1 : random_.Below(4) - 1);
    ready.set_fingerprint(faults && random_.Chance(0.01) ? "avx2" : "avx512");
    ready.set_data_digest(faults && random_.Chance(0.01) ? "other data" : "data");
    ready.set_rendezvous(worker.name);
    (*ready.mutable_algorithms()->mutable_by_problem())["product"] = part.algorithm;
    ready.set_probe(part.algorithm);
    part.phase = Part::Phase::kReady;
    return Say(worker, std::move(message));
  }

  Team& team = teams_[key];
  bool complete = true;  // every member can be reached
  for (const v1::Member& member : part.prepare.members()) {
    const auto peer = std::find_if(workers.begin(), workers.end(), [&](const auto& w) {
      return w.name == member.worker() && w.incarnation == member.incarnation();
    });
    const bool there = peer != workers.end() && peer->alive && peer->parts.count(key) > 0;
    if (there && peer->stalled) return;  // nothing comes from it, nor an error
    complete = complete && there;
  }
  team.stopping = team.stopping || part.stop;
  if (team.step >= team.total) return End(worker, key, v1::Ended::COMPLETED, "", false);
  if (team.stopping) return End(worker, key, v1::Ended::STOPPED, "", false);
  if (!complete) {
    ++happenings_["echoes of a peer's failure"];
    return End(worker, key, v1::Ended::ERRORED, "connection to a peer closed", true);
  }
  if (faults && random_.Chance(0.01)) {
    ++happenings_["errors in training"];
    return End(worker, key, v1::Ended::ERRORED, "step 3: the loss is not finite", false);
  }
  if (static_cast<int>(team.started.size()) < part.prepare.members_size()) return;
  if (faults && random_.Chance(0.02)) {
    ++happenings_["replicas that diverge"];
    part.diverged = true;
  }
  TakeStep(worker, key, part, team);
}

// All members take it together; the one that the lot fell on only sets the moment.
void Cluster::TakeStep(SimulatedWorker&, const PartKey& key, Part& part, Team& team) {
  ++team.step;
  const v1::Prepare prepare = part.prepare;
  for (const v1::Member& member : prepare.members()) {
    const auto peer = std::find_if(workers.begin(), workers.end(),
                                   [&](const auto& w) { return w.name == member.worker(); });
    const Part& its = peer->parts.at(key);
    if (its.prepare.rank() == 0) {
      v1::WorkerMessage message;
      v1::Progress& progress = *message.mutable_progress();
      progress.set_job(key.first);
      progress.set_generation(key.second);
      progress.set_total_steps(team.total);
      progress.set_steps_per_epoch(2);
      v1::StepMetrics& step = *progress.add_steps();
      step.set_step(team.step);
      step.set_epoch((team.step + 1) / 2);
      if (team.step % 2 == 0) {
        progress.add_evaluations()->set_step(team.step);
        progress.add_checkpoints()->set_step(team.step);
      }
      Say(*peer, std::move(message));
    }
    if (team.step % 2 == 0) {
      v1::WorkerMessage message;
      v1::ReplicaDigest& digest = *message.mutable_digest();
      digest.set_job(key.first);
      digest.set_generation(key.second);
      digest.set_step(team.step);
      digest.set_state_digest(Digest(its, team.step));
      Say(*peer, std::move(message));
    }
  }
}

}  // namespace lockstep::server
