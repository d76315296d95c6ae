#include "tests/simulation/invariants.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace lockstep::server {
namespace {

bool IsActive(v1::JobState state) {
  return state == v1::STARTING || state == v1::RUNNING || state == v1::STOPPING;
}

int WantedSlots(const v1::JobSpec& spec, int free) {
  const int wanted = spec.resources().has_slots() && spec.resources().slots() > 0
                         ? spec.resources().slots()
                         : std::max(1, free);
  return std::min(wanted, spec.train().shards());
}

}  // namespace

std::vector<StoredJob> Disk::Load() const {
  std::vector<StoredJob> stored;
  for (const auto& [number, record] : jobs) {
    const auto found = algorithms.find(number);
    stored.push_back({record, last_sequences.at(number),
                      found == algorithms.end() ? v1::Algorithms() : found->second});
  }
  return stored;
}

void Invariants::Violate(const std::string& what) {
  if (violation_.empty()) violation_ = what;
}

void Invariants::OnRestart() {
  sequences_ = disk_.last_sequences;
  since_.clear();
  ended_in_memory_.clear();
}

void Invariants::OnWrite(const Write& write) {
  for (const EventRecord& record : write.events) {
    const int64_t expected = ++sequences_[record.job];
    if (record.event.sequence() != expected) {
      Violate(absl::StrCat("events: job ", record.job, " has event ", record.event.sequence(),
                           " where ", expected, " comes next"));
    }
  }
}

void Invariants::OnPrepare(const v1::Prepare& prepare, StreamId stream) {
  std::set<int64_t>& generations = prepared_[prepare.job()];
  std::set<StreamId>& streams = prepare_streams_[prepare.job()];
  if (generations.insert(prepare.generation()).second) {
    streams.clear();
    if (*generations.rbegin() != prepare.generation()) {
      Violate(absl::StrCat("generations: job ", prepare.job(), " goes back to generation ",
                           prepare.generation()));
    }
  }
  if (!streams.insert(stream).second) {
    Violate(absl::StrCat("generations: generation ", prepare.generation(), " of job ",
                         prepare.job(), " is prepared twice"));
  }
  const bool stored = std::any_of(disk_.jobs.begin(), disk_.jobs.end(), [&](const auto& entry) {
    return entry.second.job.id() == prepare.job() &&
           entry.second.job.generation() >= prepare.generation();
  });
  if (!stored) {
    Violate(absl::StrCat("generations: generation ", prepare.generation(), " of job ",
                         prepare.job(), " is prepared before it is stored"));
  }
  int32_t next = 0;
  for (const v1::Member& member : prepare.members()) {
    if (member.bounds_size() != member.slots_size() + 1 || member.bounds(0) != next) {
      Violate(absl::StrCat("placement: members of job ", prepare.job(), " do not join at shard ",
                           next));
      return;
    }
    next = member.bounds(member.bounds_size() - 1);
  }
  if (next != prepare.spec().train().shards()) {
    Violate(absl::StrCat("placement: members of job ", prepare.job(), " end at shard ", next));
  }
}

void Invariants::OnSubmitted(const v1::Job& job, const std::string& request_id) {
  const bool stored = std::any_of(disk_.jobs.begin(), disk_.jobs.end(), [&](const auto& entry) {
    return entry.second.job.id() == job.id();
  });
  if (!stored) {
    Violate(absl::StrCat("acknowledged: job ", job.id(), " is answered before it is stored"));
  }
  submitted_[job.id()] = request_id;
}

void Invariants::OnCancelled(const v1::Job& job) {
  for (const auto& [number, record] : disk_.jobs) {
    if (record.job.id() != job.id()) continue;
    if (record.job.state() != v1::CANCELLED && record.job.target() != v1::CANCELLED) {
      Violate(absl::StrCat("acknowledged: the cancellation of job ", job.id(),
                           " is answered before it is stored"));
    }
  }
  cancelled_.insert(job.id());
}

void Invariants::OnDigest(const std::string& job, int64_t step, const std::string& digest) {
  told_[job].digests[step].insert(digest);
}

void Invariants::OnEnded(const std::string& job, int rank, const v1::Ended& ended) {
  told_[job].ended[rank] = ended;
}

void Invariants::Check(const Core& core, absl::Time now) {
  if (core.transitions().refused > 0) Violate("transitions: one that is not in the table");
  CheckSlots(core);
  CheckQueue(core);
  for (const auto& [number, entry] : core.jobs()) CheckJob(core, entry, now);
  CheckAcknowledged(core);
  for (const auto& [number, record] : disk_.jobs) {
    if (!HasEnded(record.job.state())) {
      if (ended_on_disk_.count(number) > 0) {
        Violate(absl::StrCat("final: job ", record.job.id(), " had ended and is alive on disk"));
      }
      continue;
    }
    const auto [first, inserted] = ended_on_disk_.emplace(number, record.job.state());
    if (first->second != record.job.state()) {
      Violate(absl::StrCat("final: job ", record.job.id(), " ended twice on disk"));
    }
  }
}

void Invariants::CheckSlots(const Core& core) {
  std::map<std::pair<std::string, int>, int64_t> holders;
  for (const auto& [number, entry] : core.jobs()) {
    if (!entry.generation.has_value()) continue;
    for (const Member& member : entry.generation->members) {
      if (member.left) continue;
      auto worker = core.workers().find(member.place.worker);
      if (worker == core.workers().end() || worker->second.state == WorkerState::kLost ||
          worker->second.info.incarnation() != member.incarnation ||
          worker->second.stream != member.stream) {
        Violate(absl::StrCat("members: job ", number, " has the member ", member.place.worker,
                             ", which is not connected"));
        continue;
      }
      for (int slot : member.place.slots) {
        const auto [holder, free] = holders.emplace(std::pair(member.place.worker, slot), number);
        if (!free) {
          Violate(absl::StrCat("slots: slot ", slot, " of ", member.place.worker,
                               " belongs to the jobs ", holder->second, " and ", number));
        }
        if (slot < 0 || slot >= worker->second.info.slots()) {
          Violate(absl::StrCat("slots: ", member.place.worker, " has no slot ", slot));
        }
      }
    }
  }
  for (const auto& [name, worker] : core.workers()) {
    bool assigned = false;
    bool training = false;
    for (int slot = 0; slot < worker.info.slots(); ++slot) {
      auto holder = holders.find({name, slot});
      if (holder == holders.end()) continue;
      assigned = true;
      training = training || core.jobs().at(holder->second).generation->started;
    }
    if (worker.state == WorkerState::kLost) continue;  // a holder is reported above
    const WorkerState expected = training   ? WorkerState::kTraining
                                 : assigned ? WorkerState::kAssigned
                                            : WorkerState::kIdle;
    if (worker.state != expected) {
      Violate(
          absl::StrCat("workers: ", name, " is ", Name(worker.state), " and not ", Name(expected)));
    }
  }
}

void Invariants::CheckQueue(const Core& core) {
  const JobEntry* head = nullptr;
  for (const auto& [number, entry] : core.jobs()) {
    if (entry.record.job.state() == v1::QUEUED) {
      if (head == nullptr) head = &entry;
    } else if (head != nullptr && IsActive(entry.record.job.state())) {
      Violate(absl::StrCat("queue: job ", number, " started before job ", head->record.number));
    }
  }
  if (head == nullptr) return;
  int free = 0;
  for (const auto& [name, worker] : core.workers()) {
    if (worker.state != WorkerState::kLost) free += worker.info.slots();
  }
  for (const auto& [number, entry] : core.jobs()) {
    if (!entry.generation.has_value()) continue;
    for (const Member& member : entry.generation->members) {
      if (!member.left) free -= static_cast<int>(member.place.slots.size());
    }
  }
  const v1::Job& job = head->record.job;
  if (free >= WantedSlots(job.spec(), free)) {
    Violate(absl::StrCat("stuck: job ", job.id(), " waits while ", free, " slots are free"));
  }
  if (job.reason().empty()) {
    Violate(absl::StrCat("reason: job ", job.id(), " does not say what it waits for"));
  }
}

void Invariants::CheckJob(const Core& core, const JobEntry& entry, absl::Time now) {
  const v1::Job& job = entry.record.job;
  if (job.reason().find('\n') != std::string::npos) Violate("reason: more than one line");
  const bool active = IsActive(job.state());
  if (active != entry.generation.has_value()) {
    Violate(absl::StrCat("generations: job ", job.id(), " is ", Name(job.state()),
                         active ? " without a live generation" : " with a live generation"));
    return;
  }
  if (active) {
    CheckPlacement(job);
    const std::vector<Member>& members = entry.generation->members;
    if (std::all_of(members.begin(), members.end(), [](const Member& m) { return m.left; })) {
      Violate(absl::StrCat("stuck: every member of job ", job.id(), " has left and it is ",
                           Name(job.state())));
    }
    if (job.state() == v1::STOPPING && job.target() != v1::FAILED &&
        job.target() != v1::CANCELLED) {
      Violate(absl::StrCat("stopping: job ", job.id(), " has no target"));
    }
    const bool prepared = members[0].prepared;
    Since& since = since_[entry.record.number];
    if (since.state != job.state() || since.prepared != prepared) {
      since = {job.state(), prepared, now};
    }
    absl::Duration longest = absl::InfiniteDuration();
    if (job.state() == v1::STARTING && prepared) longest = options_.ready_timeout;
    if (job.state() == v1::STOPPING) longest = options_.stop_grace + options_.end_timeout;
    if (now - since.time > longest) {
      Violate(absl::StrCat("stuck: job ", job.id(), " is ", Name(job.state()), " for ",
                           absl::FormatDuration(now - since.time)));
    }
    for (const Member& member : members) {
      if (member.left) continue;
      const Worker& worker = core.workers().at(member.place.worker);
      if (now - worker.last_seen > options_.expiry) {
        Violate(
            absl::StrCat("stuck: job ", job.id(), " has the silent member ", member.place.worker));
      }
    }
  }
  if (!HasEnded(job.state())) {
    if (ended_in_memory_.count(entry.record.number) > 0) {
      Violate(absl::StrCat("final: job ", job.id(), " had ended and is ", Name(job.state())));
    }
    return;
  }
  const auto [first, inserted] = ended_in_memory_.emplace(entry.record.number, job.state());
  if (first->second != job.state()) {
    Violate(absl::StrCat("final: job ", job.id(), " was ", Name(first->second), " and is ",
                         Name(job.state())));
  }
  if (!inserted) return;
  if (job.state() == v1::SUCCEEDED) CheckSuccess(job);
  if (job.state() == v1::FAILED && job.reason().empty()) {
    Violate(absl::StrCat("reason: job ", job.id(), " FAILED without one"));
  }
  if (job.state() == v1::CANCELLED && cancel_asked_.count(job.id()) == 0) {
    Violate(absl::StrCat("cancel: job ", job.id(), " is CANCELLED and nobody asked"));
  }
}

void Invariants::CheckPlacement(const v1::Job& job) {
  int32_t next = 0;
  std::string worker;
  std::set<std::string> workers;
  for (const v1::SlotPlacement& slot : job.placement()) {
    if (slot.first_shard() != next || slot.last_shard() <= slot.first_shard()) {
      Violate(absl::StrCat("placement: job ", job.id(), " has a slot of the shards ",
                           slot.first_shard(), " to ", slot.last_shard(), " where ", next,
                           " comes next"));
      return;
    }
    next = slot.last_shard();
    if (slot.worker() != worker && !workers.insert(slot.worker()).second) {
      Violate(absl::StrCat("placement: worker ", slot.worker(), " of job ", job.id(),
                           " has shards that are not contiguous"));
    }
    worker = slot.worker();
  }
  if (next != job.spec().train().shards()) {
    Violate(absl::StrCat("placement: job ", job.id(), " has ", next, " shards placed"));
  }
  if (job.spec().resources().has_slots() && job.placement_size() != WantedSlots(job.spec(), 0)) {
    Violate(absl::StrCat("placement: job ", job.id(), " has ", job.placement_size(), " slots"));
  }
}

void Invariants::CheckSuccess(const v1::Job& job) {
  std::set<std::string> workers;
  for (const v1::SlotPlacement& slot : job.placement()) workers.insert(slot.worker());
  const Told& told = told_[job.id()];
  std::set<std::string> final_digests;
  for (const auto& [rank, ended] : told.ended) {
    if (ended.outcome() == v1::Ended::COMPLETED) final_digests.insert(ended.state_digest());
  }
  if (told.ended.size() != workers.size() || final_digests.size() != 1) {
    Violate(absl::StrCat("digests: job ", job.id(), " SUCCEEDED with ", told.ended.size(), " of ",
                         workers.size(), " members completed and ", final_digests.size(),
                         " different replicas"));
  }
  for (const auto& [step, digests] : told.digests) {
    if (digests.size() > 1) {
      Violate(absl::StrCat("digests: job ", job.id(), " SUCCEEDED, its replicas differed at step ",
                           step));
    }
  }
}

void Invariants::CheckAcknowledged(const Core& core) {
  std::map<std::string, const JobEntry*> jobs;
  for (const auto& [number, entry] : core.jobs()) jobs[entry.record.job.id()] = &entry;
  for (const auto& [job, request_id] : submitted_) {
    auto found = jobs.find(job);
    if (found == jobs.end() || found->second->record.request_id != request_id) {
      Violate(absl::StrCat("acknowledged: job ", job, " was forgotten"));
    }
  }
  for (const std::string& job : cancelled_) {
    auto found = jobs.find(job);
    if (found == jobs.end()) continue;  // reported above
    const v1::Job& record = found->second->record.job;
    if (record.state() != v1::CANCELLED && record.target() != v1::CANCELLED) {
      Violate(absl::StrCat("acknowledged: the cancelled job ", job, " is ", Name(record.state())));
    }
  }
}

}  // namespace lockstep::server
