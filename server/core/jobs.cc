// Core: a job from the queue to its end.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/core/core.h"
#include "server/core/planted_bugs.h"
#include "server/core/reason.h"

namespace lockstep::server {
namespace {

bool IsExact(const JobEntry& job) {
  const v1::TrainSpec& train = job.record.job.spec().train();
  return !train.has_exact() || train.exact();  // a job of an older version has none
}

}  // namespace

void Core::Schedule() {
  for (auto it = queue_.begin(); it != queue_.end();) {
    JobEntry& job = jobs_.at(*it);
    std::string waits_for;
    std::vector<MemberPlacement> places = PlaceJob(job, &waits_for);
    if (!places.empty()) {
      ++it;  // StartJob takes the job out of the queue
      StartJob(job, std::move(places));
      continue;
    }
    SetReason(job, waits_for);
    if (!Planted(PlantedBug::kQueueOvertaken)) break;
    ++it;
  }
}

std::vector<MemberPlacement> Core::PlaceJob(const JobEntry& job, std::string* waits_for) const {
  const v1::JobSpec& spec = job.record.job.spec();
  const std::string device = spec.resources().device().empty() ? "cpu" : spec.resources().device();
  const int shards = std::max(1, spec.train().shards());
  std::vector<FreeSlots> free;
  int free_count = 0;
  int exist = 0;
  for (const auto& [name, worker] : workers_) {
    if (worker.state == WorkerState::kLost) continue;
    if (worker.info.device() != device) continue;
    FreeSlots& slots = free.emplace_back();
    slots.worker = name;
    for (int slot = 0; slot < worker.info.slots(); ++slot) {
      if (worker.owner[slot] == 0) slots.slots.push_back(slot);
    }
    free_count += static_cast<int>(slots.slots.size());
    exist += worker.info.slots();
  }

  const bool given = spec.resources().has_slots() && spec.resources().slots() > 0;
  const int wanted = std::min(shards, given ? spec.resources().slots() : std::max(1, free_count));
  if (free_count >= wanted) return Place(std::move(free), wanted, shards);
  if (exist == 0) {
    *waits_for =
        absl::StrCat("waits for a worker of device ", device,
                     ": none is connected; start one: lockstep-worker --slots ", device, ":1");
  } else {
    *waits_for = absl::StrCat("waits for ", given ? absl::StrCat(wanted) : "at least 1",
                              wanted == 1 ? " slot" : " slots", " of device ", device, "; ",
                              free_count, free_count == 1 ? " is" : " are", " free, ", exist,
                              exist == 1 ? " exists" : " exist");
  }
  return {};
}

void Core::StartJob(JobEntry& job, std::vector<MemberPlacement> places) {
  v1::Job& record = job.record.job;
  Generation& generation = job.generation.emplace();
  generation.number = record.generation() + 1;
  generation.prepare_after = last_ticket_ + 1;  // of the write that this step makes
  record.set_generation(generation.number);
  record.set_started_unix_ms(absl::ToUnixMillis(now_));
  record.clear_reason();
  record.clear_placement();
  std::string where;
  for (MemberPlacement& place : places) {
    Worker& worker = workers_.at(place.worker);
    absl::StrAppend(&where, where.empty() ? "" : ", ", place.worker, " ",
                    DescribeSlots(place.slots), " (shards ", place.bounds.front(), " to ",
                    place.bounds.back() - 1, ")");
    for (size_t i = 0; i < place.slots.size(); ++i) {
      worker.owner[place.slots[i]] = job.record.number;
      v1::SlotPlacement* slot = record.add_placement();
      slot->set_worker(place.worker);
      slot->set_slot(place.slots[i]);
      slot->set_first_shard(place.bounds[i]);
      slot->set_last_shard(place.bounds[i + 1]);
    }
    Member& member = generation.members.emplace_back();
    member.incarnation = worker.info.incarnation();
    member.stream = worker.stream;
    member.place = std::move(place);
  }
  Move(job, v1::STARTING);
  Log(job.record.number, "INFO", absl::StrCat("generation ", generation.number, ": ", where));
  for (const Member& member : generation.members) SettleWorker(workers_.at(member.place.worker));
}

void Core::SendPrepare(JobEntry& job) {
  const v1::Job& record = job.record.job;
  Generation& generation = *job.generation;
  v1::CoordinatorMessage message;
  v1::Prepare& prepare = *message.mutable_prepare();
  prepare.set_job(record.id());
  prepare.set_generation(generation.number);
  *prepare.mutable_spec() = record.spec();
  prepare.set_resume_from(record.resume_from());
  prepare.set_output_dir(record.output_dir());
  *prepare.mutable_algorithms() = job.algorithms;
  for (const Member& member : generation.members) {
    const v1::Register& info = workers_.at(member.place.worker).info;
    v1::Member& m = *prepare.add_members();
    m.set_worker(info.name());
    m.set_incarnation(member.incarnation);
    m.set_host_id(info.host_id());
    m.set_address(info.address());
    m.set_gpu(info.gpu().uuid());
    m.mutable_bounds()->Add(member.place.bounds.begin(), member.place.bounds.end());
    m.mutable_slots()->Add(member.place.slots.begin(), member.place.slots.end());
  }
  for (size_t rank = 0; rank < generation.members.size(); ++rank) {
    prepare.set_rank(static_cast<int>(rank));
    generation.members[rank].prepared = true;
    actions_.emplace_back(SendToWorker{generation.members[rank].stream, message});
  }
  generation.ready_deadline = now_ + options_.ready_timeout;
}

// One line where the members cannot train together, else empty.
std::string Core::CompareReady(const JobEntry& job) const {
  const std::vector<Member>& members = job.generation->members;
  const Member& first = members[0];
  const bool exact = IsExact(job);
  for (const Member& member : members) {
    if (member.ready->data_digest() != first.ready->data_digest()) {
      return absl::StrCat("worker ", member.place.worker, " has other data than worker ",
                          first.place.worker, ": digest ", member.ready->data_digest(), " against ",
                          first.ready->data_digest(), "; every worker must read the same files");
    }
    if (exact && member.ready->fingerprint() != first.ready->fingerprint()) {
      return absl::StrCat(
          "worker ", member.place.worker, " computes otherwise than worker ", first.place.worker,
          ": fingerprint ", member.ready->fingerprint(), " against ", first.ready->fingerprint(),
          "; the workers of a job must have the same kind of device, unless its spec says "
          "train.exact: false");
    }
  }
  return "";
}

// The same of what they compute with the job's algorithms.
std::string Core::CompareProbes(const JobEntry& job) const {
  const Member& first = job.generation->members[0];
  for (const Member& member : job.generation->members) {
    if (member.ready->probe() == first.ready->probe()) continue;
    return absl::StrCat("worker ", member.place.worker, " computes otherwise than worker ",
                        first.place.worker, ": probe ", member.ready->probe(), " against ",
                        first.ready->probe(), ", both with fingerprint ",
                        first.ready->fingerprint(),
                        "; the workers of a job must have the same kind of device, unless its spec "
                        "says train.exact: false");
  }
  return "";
}

// The job's algorithms are those that it has, then its source's, then the others' by rank: of a
// problem the first counts. True where members that computed it otherwise have been told so.
bool Core::ShareAlgorithms(JobEntry& job, int source_rank) {
  Generation& generation = *job.generation;
  auto& algorithms = *job.algorithms.mutable_by_problem();
  const size_t known = algorithms.size();
  const auto add = [&](const Member& member) {
    for (const auto& [problem, algorithm] : member.ready->algorithms().by_problem()) {
      algorithms.insert({problem, algorithm});
    }
  };
  if (source_rank >= 0) add(generation.members[source_rank]);
  for (const Member& member : generation.members) add(member);
  if (algorithms.size() != known) write_.algorithms.push_back({job.record.number, job.algorithms});

  bool told = false;
  for (Member& member : generation.members) {
    const auto& own = member.ready->algorithms().by_problem();
    if (member.told_algorithms || std::all_of(own.begin(), own.end(), [&](const auto& entry) {
          return algorithms.at(entry.first) == entry.second;
        })) {
      continue;
    }
    Log(job.record.number, "INFO",
        absl::StrCat("worker ", member.place.worker, " chose other algorithms than the job has, ",
                     "and is told to use those"));
    v1::CoordinatorMessage message;
    v1::UseAlgorithms& use = *message.mutable_use_algorithms();
    use.set_job(job.record.job.id());
    use.set_generation(generation.number);
    *use.mutable_algorithms() = job.algorithms;
    actions_.emplace_back(SendToWorker{member.stream, std::move(message)});
    member.told_algorithms = true;
    member.ready.reset();
    told = true;
  }
  return told;
}

void Core::StartTraining(JobEntry& job) {
  Generation& generation = *job.generation;
  std::string difference = CompareReady(job);
  if (!difference.empty()) return Fail(job, OneLine(difference), Cause::kPrimary);

  int source_rank = -1;
  int64_t newest = -1;
  for (size_t rank = 0; rank < generation.members.size(); ++rank) {
    const v1::Ready& ready = *generation.members[rank].ready;
    if (ready.state_version() <= newest) continue;
    newest = ready.state_version();
    source_rank = static_cast<int>(rank);
  }
  if (IsExact(job) && !Planted(PlantedBug::kAlgorithmsNotShared)) {
    if (ShareAlgorithms(job, source_rank)) return;  // until they are ready again
    difference = CompareProbes(job);
    if (!difference.empty()) return Fail(job, OneLine(difference), Cause::kPrimary);
  }
  generation.ready_deadline = absl::InfiniteFuture();

  v1::CoordinatorMessage message;
  v1::Start& start = *message.mutable_start();
  start.set_job(job.record.job.id());
  start.set_generation(generation.number);
  start.set_source_rank(source_rank);
  for (const Member& member : generation.members) start.add_rendezvous(member.ready->rendezvous());
  if (newest < 0 && !job.record.job.resume_from().empty()) {
    return Fail(job,
                OneLine(absl::StrCat("no worker has a checkpoint to go on from at ",
                                     job.record.job.resume_from(),
                                     "; accepted: the folder of a run, its checkpoints folder, or "
                                     "one step-N folder, on some worker's host")),
                Cause::kPrimary);
  }
  WarnOfDamage(job, source_rank);
  for (const Member& member : generation.members) {
    actions_.emplace_back(SendToWorker{member.stream, message});
  }
  generation.started = true;
  Move(job, v1::RUNNING);
  for (const Member& member : generation.members) SettleWorker(workers_.at(member.place.worker));
}

// Tells people where damaged checkpoints made the job go on from an older one.
void Core::WarnOfDamage(JobEntry& job, int source_rank) {
  std::vector<std::string> notes;  // once each: hosts may share the folder
  for (const Member& member : job.generation->members) {
    for (const std::string& note : member.ready->notes()) {
      if (std::find(notes.begin(), notes.end(), note) == notes.end()) notes.push_back(note);
    }
  }
  if (notes.empty() || source_rank < 0) return;
  const v1::Ready& source = *job.generation->members[source_rank].ready;
  const std::string text =
      absl::StrCat(OneLine(absl::StrJoin(notes, "; ")), "; going on from ",
                   OneLine(source.checkpoint()), ", step ", source.state_version());
  job.record.job.add_warnings(text);
  Log(job.record.number, "WARNING", text);
}

void Core::StopPolitely(JobEntry& job) {
  const bool running = job.record.job.state() == v1::RUNNING;
  Move(job, v1::STOPPING);
  if (!running) return AbortMembers(job);
  v1::CoordinatorMessage message;
  message.mutable_control()->set_job(job.record.job.id());
  message.mutable_control()->set_generation(job.generation->number);
  message.mutable_control()->set_stop(true);
  for (const Member& member : job.generation->members) {
    if (!member.left) actions_.emplace_back(SendToWorker{member.stream, message});
  }
  job.generation->abort_at = now_ + options_.stop_grace;
}

// Does nothing to a job that is being cancelled, and to one that is failing only where the reason
// so far was an echo of this one.
void Core::Fail(JobEntry& job, const std::string& reason, Cause cause) {
  v1::Job& record = job.record.job;
  if (record.state() == v1::STOPPING) {
    std::optional<absl::Time>& since = job.generation->secondary_since;
    if (record.target() != v1::FAILED || !since.has_value()) return;
    if (cause == Cause::kSecondary ||
        (cause == Cause::kPrimary && now_ - *since > options_.primary_wait)) {
      return;
    }
    since.reset();
    write_.durable = true;
    return SetReason(job, reason);
  }
  record.set_reason(reason);
  record.set_target(v1::FAILED);
  if (cause == Cause::kSecondary) job.generation->secondary_since = now_;
  Move(job, v1::STOPPING);
  AbortMembers(job);
}

void Core::AbortMembers(JobEntry& job) {
  Generation& generation = *job.generation;
  generation.ready_deadline = absl::InfiniteFuture();
  generation.abort_at = absl::InfiniteFuture();
  generation.end_deadline = now_ + options_.end_timeout;
  v1::CoordinatorMessage message;
  message.mutable_abort()->set_job(job.record.job.id());
  message.mutable_abort()->set_generation(generation.number);
  message.mutable_abort()->set_reason(job.record.job.reason());
  for (Member& member : generation.members) {
    if (member.left) continue;
    if (!member.prepared) {
      Leave(job, member);
      continue;
    }
    actions_.emplace_back(SendToWorker{member.stream, message});
    if (Planted(PlantedBug::kSlotFreedAtAbort)) {
      std::replace(workers_.at(member.place.worker).owner.begin(),
                   workers_.at(member.place.worker).owner.end(), job.record.number, int64_t{0});
      slots_changed_ = true;
    }
  }
  FinishIfAllLeft(job);
}

void Core::Leave(JobEntry& job, Member& member) {
  member.left = true;
  Worker& worker = workers_.at(member.place.worker);
  std::replace(worker.owner.begin(), worker.owner.end(), job.record.number, int64_t{0});
  if (!Planted(PlantedBug::kNoScheduleAfterEnd)) slots_changed_ = true;
  SettleWorker(worker);
}

// Fails the job where the replicas of one step differ. `digests`: by rank. Named are those that
// differ from a strict majority; without one nobody can tell who is wrong, and all are named.
void Core::CompareDigests(JobEntry& job, int64_t step, const std::map<int, std::string>& digests) {
  std::map<std::string, int> votes;
  for (const auto& [rank, digest] : digests) {
    if (Planted(PlantedBug::kDigestOfNeighborsOnly) && rank > 1) continue;
    ++votes[digest];
  }
  if (votes.size() <= 1) return;
  const std::string* expected = nullptr;
  for (const auto& [digest, count] : votes) {
    if (2 * count > static_cast<int>(digests.size())) expected = &digest;
  }
  std::vector<std::string> named, theirs;
  for (const auto& [rank, digest] : digests) {
    if (expected != nullptr && digest == *expected) continue;
    const MemberPlacement& place = job.generation->members[rank].place;
    named.push_back(absl::StrCat(place.worker, " (", DescribeSlots(place.slots), ")"));
    theirs.push_back(digest);
  }
  std::string text = named.size() == 1 ? "worker " : "workers ";
  for (size_t i = 0; i < named.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : i + 1 == named.size() ? " and " : ", ", named[i]);
  }
  absl::StrAppend(&text, named.size() == 1 ? " differs" : " differ");
  if (expected != nullptr) absl::StrAppend(&text, " from the other replicas");
  absl::StrAppend(&text, " at step ", step, ": state digest ", absl::StrJoin(theirs, ", "));
  if (expected != nullptr) {
    absl::StrAppend(&text, ", theirs is ", *expected);
  } else if (digests.size() == 2) {
    text += "; two replicas cannot tell which is wrong";
  } else {
    text += "; no majority tells which is wrong";
  }
  Fail(job, OneLine(text), Cause::kDigests);
}

void Core::FinishIfAllLeft(JobEntry& job) {
  if (!job.generation.has_value()) return;
  const std::vector<Member>& members = job.generation->members;
  if (!std::all_of(members.begin(), members.end(), [](const Member& m) { return m.left; })) return;
  v1::Job& record = job.record.job;
  if (record.state() == v1::RUNNING) {  // everybody completed; else it would be STOPPING
    for (const auto& [step, digests] : std::exchange(job.generation->digests, {})) {
      CompareDigests(job, step, digests);
      if (record.state() != v1::RUNNING) return;  // ended by the comparison
    }
    std::map<int, std::string> digests;
    for (size_t rank = 0; rank < members.size(); ++rank) {
      digests[static_cast<int>(rank)] = members[rank].ended->state_digest();
    }
    CompareDigests(job, record.step(), digests);
    if (record.state() == v1::RUNNING) End(job, v1::SUCCEEDED);
  } else if (record.state() == v1::STOPPING) {
    End(job, record.target());
  }
}

void Core::End(JobEntry& job, v1::JobState state) {
  v1::Job& record = job.record.job;
  v1::JobResult& result = *record.mutable_result();
  if (job.generation.has_value()) {
    const std::vector<Member>& members = job.generation->members;
    if (members[0].ended.has_value() && members[0].ended->has_result()) {
      result = members[0].ended->result();
    }
    result.clear_shard_steps();
    result.clear_gradient_bytes_sent();
    for (const Member& member : members) {
      const v1::Ended& ended = member.ended.has_value() ? *member.ended : v1::Ended();
      result.add_gradient_bytes_sent(ended.gradient_bytes_sent());
      result.set_data_wait_share(
          std::max(result.data_wait_share(), ended.result().data_wait_share()));
      for (int shard = 0; shard < ended.shard_steps_size(); ++shard) {
        if (shard >= record.spec().train().shards()) break;
        if (shard == result.shard_steps_size()) result.add_shard_steps(0);
        result.set_shard_steps(shard, result.shard_steps(shard) + ended.shard_steps(shard));
      }
    }
  }
  if (result.steps() == 0) {  // nobody could sum it up
    result.set_steps(record.step());
    result.set_epochs(record.steps_per_epoch() > 0 ? record.step() / record.steps_per_epoch() : 0);
    if (record.has_last_step()) {
      *result.mutable_train() = record.last_step().train();
      result.set_seconds(record.last_step().seconds());
    }
    if (record.has_last_evaluation()) {
      *result.mutable_validation() = record.last_evaluation().validation();
    }
  }
  record.set_step(std::max(record.step(), result.steps()));
  if (state == v1::CANCELLED && job.generation.has_value() && job.generation->started) {
    record.set_reason(absl::StrCat("cancelled on request after step ", record.step()));
  }
  record.set_target(v1::JOB_STATE_UNSPECIFIED);
  record.set_ended_unix_ms(absl::ToUnixMillis(now_));
  job.generation.reset();
  Move(job, state);
  Log(job.record.number, state == v1::FAILED ? "ERROR" : "INFO",
      record.reason().empty() ? Name(state) : absl::StrCat(Name(state), ": ", record.reason()));
}

void Core::Move(JobEntry& job, v1::JobState to) {
  v1::Job& record = job.record.job;
  const v1::JobState from = record.state();
  v1::JobState state = from;
  if (!Transition(&state, to).ok()) {
    ++transitions_.refused;
    return;
  }
  ++transitions_.job[from][to];
  record.set_state(to);
  if (from == v1::QUEUED) {
    queue_.erase(job.record.number);
    slots_changed_ = true;  // another one is the head of the queue
  }
  if (to == v1::STARTING) active_.insert(job.record.number);
  if (HasEnded(to)) active_.erase(job.record.number);
  write_.durable = true;
  Publish(job);
}

void Core::Move(Worker& worker, WorkerState to) {
  const WorkerState from = worker.state;
  if (!Transition(&worker.state, to).ok()) {
    ++transitions_.refused;
    return;
  }
  ++transitions_.worker[static_cast<int>(from)][static_cast<int>(to)];
}

void Core::SetReason(JobEntry& job, const std::string& reason) {
  if (job.record.job.reason() == reason) return;
  job.record.job.set_reason(reason);
  Publish(job);
}

void Core::Publish(JobEntry& job) {
  v1::JobEvent event;
  *event.mutable_job() = job.record.job;
  AddEvent(job, std::move(event));
}

void Core::AddEvent(JobEntry& job, v1::JobEvent event) {
  event.set_sequence(++job.last_sequence);
  event.set_unix_ms(absl::ToUnixMillis(now_));
  write_.events.push_back({job.record.number, std::move(event)});
  changed_jobs_.insert(job.record.number);
}

}  // namespace lockstep::server
