#include "tests/collective/scenario.h"

#include <signal.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "absl/time/clock.h"
#include "common/stable_hash.h"
#include "worker/collective/rendezvous.h"
#include "worker/collective/team.h"
#include "worker/device/cpu/cpu_device.h"
#include "worker/device/module/cuda_module.h"

namespace lockstep::collective {
namespace {

// Magnitudes over eight binades and both signs: sums round in every place.
float LeafValue(uint64_t seed, int step, int leaf, int64_t index) {
  const uint64_t bits = MixBits(seed * 0x9E3779B97F4A7C15ull + (uint64_t(step) << 52) +
                                (uint64_t(leaf) << 40) + uint64_t(index));
  const float mantissa = static_cast<float>(bits >> 40) / 16777216.0f - 0.5f;
  return mantissa * static_cast<float>(1 << (bits & 7));
}

struct Record {
  uint64_t hash = 0;
  uint64_t padding[4] = {};
};
Record LeafRecord(int step, int leaf) { return {MixBits(step * 1000 + leaf + 1), {}}; }
void FoldRecord(void* left, const void* right) {
  auto* l = static_cast<Record*>(left);
  l->hash = MixBits(3 * l->hash + static_cast<const Record*>(right)->hash);
}

std::vector<uint8_t> PresentIn(const Scenario& s, int step) {
  std::vector<uint8_t> present(s.leaves(), 1);
  if (s.presence == Presence::kAll) return present;
  const uint64_t random = MixBits(s.seed + 77 * step);
  if (s.presence == Presence::kShort) {
    const int kept = 1 + static_cast<int>(random % s.leaves());
    std::fill(present.begin() + kept, present.end(), 0);
    return present;
  }
  for (int leaf = 0; leaf < s.leaves(); ++leaf) present[leaf] = random >> (leaf % 60) & 1;
  present[random % s.leaves()] = 1;
  return present;
}

uint64_t Hash(const void* data, size_t bytes) {
  uint64_t hash = 0xCBF29CE484222325ull;
  const auto* words = static_cast<const uint32_t*>(data);
  for (size_t i = 0; i < bytes / 4; ++i) hash = (hash ^ words[i]) * 0x100000001B3ull + (hash >> 47);
  return MixBits(hash);
}

uint64_t StepDigest(const float* result, int64_t size, const Record& record,
                    const uint64_t* gathered, int members) {
  return Hash(result, size * sizeof(float)) ^ record.hash ^
         Hash(gathered, members * sizeof(uint64_t));
}

uint64_t Contribution(int step, int rank) { return MixBits(step * 64 + rank); }

// By the definition: a tree over n > 1 leaves splits at the largest power of two below n.
bool SerialTree(const Scenario& s, int step, const std::vector<uint8_t>& present, int begin,
                int end, std::vector<float>* sum, Record* record) {
  if (end - begin == 1) {
    if (!present[begin]) return false;
    sum->resize(s.size);
    for (int64_t i = 0; i < s.size; ++i) (*sum)[i] = LeafValue(s.seed, step, begin, i);
    *record = LeafRecord(step, begin);
    return true;
  }
  int half = 1;
  while (2 * half < end - begin) half *= 2;
  std::vector<float> other;
  Record other_record;
  const bool left = SerialTree(s, step, present, begin, begin + half, sum, record);
  const bool right = SerialTree(s, step, present, begin + half, end, left ? &other : sum,
                                left ? &other_record : record);
  if (left && right) {
    for (int64_t i = 0; i < s.size; ++i) (*sum)[i] += other[i];
    FoldRecord(record, &other_record);
  }
  return left || right;
}

// The flat vector's tensors, from which ranges and buckets are made.
std::vector<int64_t> Offsets(int64_t size) {
  std::vector<int64_t> offsets = {0};
  for (const int64_t part : {size / 7, size / 3, size / 2, size - size / 5}) {
    if (part > offsets.back() && part < size) offsets.push_back(part);
  }
  return offsets;
}

// What a slot's computation is where its device is a GPU: copies of what is in `sources`, which
// every step writes anew.
class GpuSlot {
 public:
  GpuSlot(const Scenario& s, device::Device& device, device::Stream& stream, int first, int last)
      : s_(s), device_(device), stream_(stream), first_(first), host_(s.size) {
    for (int leaf = first; leaf < last; ++leaf) {
      auto memory = device.Allocate(sizeof(float) * std::max<int64_t>(s.size, 1));
      if (memory.ok()) sources_.push_back(*std::move(memory));
    }
  }

  absl::Status Run(int slot, int step, CanonicalAllReduce& reduce,
                   const std::vector<uint8_t>& present, const std::vector<int64_t>& offsets) {
    for (size_t i = 0; i < sources_.size(); ++i) {
      const int leaf = first_ + static_cast<int>(i);
      for (int64_t at = 0; at < s_.size; ++at) host_[at] = LeafValue(s_.seed, step, leaf, at);
      device_.Copy(stream_, host_.data(), sources_[i]->data(), sizeof(float) * host_.size());
    }
    const auto pass = [&] {
      for (size_t range = offsets.size() - 1; range-- > 0;) {
        const int64_t begin = offsets[range], end = offsets[range + 1];
        for (size_t i = 0; i < sources_.size(); ++i) {
          const int leaf = first_ + static_cast<int>(i);
          if (!present[leaf]) continue;
          device_.Copy(stream_, sources_[i]->floats() + begin, reduce.Leaf(slot, leaf) + begin,
                       sizeof(float) * (end - begin));
          reduce.Done(slot, stream_, leaf, begin, end);
        }
      }
      reduce.EndPass(slot, stream_);
      return absl::OkStatus();
    };
    if (step == 0 || s_.presence != Presence::kAll || sources_.empty()) return pass();
    if (recording_ == nullptr) {
      auto recording = device_.Record(stream_, pass);
      if (!recording.ok()) return recording.status();
      recording_ = *std::move(recording);
    }
    recording_->Replay(stream_);
    reduce.Repeated(slot);
    return absl::OkStatus();
  }

  absl::StatusOr<const float*> Read(const float* result) {
    device_.Copy(stream_, result, host_.data(), sizeof(float) * host_.size());
    const absl::Status read = stream_.Synchronize();
    if (!read.ok()) return read;
    return host_.data();
  }

 private:
  const Scenario& s_;
  device::Device& device_;
  device::Stream& stream_;
  const int first_;
  std::vector<float> host_;
  std::vector<std::unique_ptr<device::Memory>> sources_;
  std::unique_ptr<device::Recording> recording_;
};

absl::Status RunSlot(const Scenario& s, int rank, int slot, Team& team, CanonicalAllReduce& reduce,
                     device::Device& device, Communicator* communicator,
                     std::vector<uint64_t>* digests) {
  const std::vector<int>& bounds = s.members[rank].bounds;
  auto stream = device.MakeStream();
  if (!stream.ok()) return stream.status();
  std::vector<int64_t> offsets = Offsets(s.size);
  offsets.push_back(s.size);
  const std::vector<int> order = WriteOrder(bounds[slot], bounds[slot + 1], s.interleaved);
  std::unique_ptr<GpuSlot> gpu;
  if (s.gpus) {
    gpu = std::make_unique<GpuSlot>(s, device, **stream, bounds[slot], bounds[slot + 1]);
  }
  for (int step = 0; step < s.steps; ++step) {
    const bool last_chance = s.victim >= 0 && step >= s.victim_step;
    const absl::Time deadline =
        absl::Now() + (last_chance ? absl::Milliseconds(s.deadline_ms) : absl::Minutes(1));
    const std::vector<uint8_t> present = PresentIn(s, step);
    absl::Status status = reduce.Begin(slot, present, deadline);
    if (!status.ok()) return status;
    const auto write = [&](int leaf, size_t range) {
      if (!present[leaf]) return;
      float* to = reduce.Leaf(slot, leaf);
      for (int64_t i = offsets[range]; i < offsets[range + 1]; ++i) {
        to[i] = LeafValue(s.seed, step, leaf, i);
      }
      reduce.Done(slot, **stream, leaf, offsets[range], offsets[range + 1]);
    };
    // Segment by segment over all leaves, or leaf by leaf: both happen.
    if (s.gpus) {
      status = gpu->Run(slot, step, reduce, present, offsets);
      if (!status.ok()) return status;
    } else if (step % 2 == 0) {
      for (size_t range = 0; range + 1 < offsets.size(); ++range) {
        for (const int leaf : order) write(leaf, range);
      }
    } else {
      for (const int leaf : order) {
        for (size_t range = 0; range + 1 < offsets.size(); ++range) write(leaf, range);
      }
    }
    if (rank == s.victim && step == s.victim_step && slot == 0) raise(s.signal);
    status = reduce.Finish(slot, **stream, deadline);
    if (status.ok() && s.gpus) status = (*stream)->Synchronize();
    if (status.ok() && s.gpus && communicator->on_device()) status = communicator->Settle();
    if (!status.ok()) return status;

    std::vector<Record> records(bounds[slot + 1] - bounds[slot]);
    std::vector<const void*> pointers;
    for (int leaf = bounds[slot]; leaf < bounds[slot + 1]; ++leaf) {
      records[leaf - bounds[slot]] = LeafRecord(step, leaf);
      pointers.push_back(present[leaf] ? &records[leaf - bounds[slot]] : nullptr);
    }
    const auto merged = reduce.MergeSmall(slot, pointers, sizeof(Record), FoldRecord, deadline);
    if (!merged.ok()) return merged.status();
    const uint64_t mine = Contribution(step, rank);
    const auto gathered = reduce.AllGather(slot, &mine, sizeof(mine), deadline);
    if (!gathered.ok()) return gathered.status();
    const float* result = reduce.result();
    if (s.gpus) {
      const auto read = gpu->Read(result);
      if (!read.ok()) return read.status();
      result = *read;
    }
    digests->push_back(StepDigest(result, s.size, *static_cast<const Record*>(*merged),
                                  static_cast<const uint64_t*>(*gathered),
                                  static_cast<int>(s.members.size())));
    status = team.Barrier(slot, deadline);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<device::Device>> MakeDevice(const Scenario& s) {
  if (!s.gpus) return device::MakeCpuDevice();
  const auto module = device::LoadCudaModule();
  if (!module.ok()) return module.status();
  return (*module)->make_device(0);
}

}  // namespace

Placement Scenario::placement() const {
  Placement placement;
  placement.leaves = leaves();
  for (const ScenarioMember& member : members) placement.bounds.push_back(member.bounds);
  placement.interleaved = interleaved;
  placement.exact = exact;
  return placement;
}

Scenario EvenScenario(int leaves, int members, int slots, int64_t size) {
  Scenario s;
  s.size = size;
  const int total = members * slots;
  for (int member = 0; member < members; ++member) {
    ScenarioMember one;
    for (int slot = 0; slot <= slots; ++slot) {
      one.bounds.push_back(leaves * (member * slots + slot) / total);
    }
    s.members.push_back(one);
  }
  return s;
}

std::vector<uint64_t> Expected(const Scenario& s) {
  std::vector<uint64_t> digests;
  const int members = static_cast<int>(s.members.size());
  for (int step = 0; step < s.steps; ++step) {
    std::vector<float> sum;
    Record record;
    SerialTree(s, step, PresentIn(s, step), 0, s.leaves(), &sum, &record);
    std::vector<uint64_t> gathered;
    for (int rank = 0; rank < members; ++rank) gathered.push_back(Contribution(step, rank));
    digests.push_back(StepDigest(sum.data(), s.size, record, gathered.data(), members));
  }
  return digests;
}

Outcome RunMember(const Scenario& s, int rank, Communicator* communicator) {
  Outcome outcome;
  auto device = MakeDevice(s);
  if (!device.ok()) return {device.status(), {}, {}};
  const int slots = static_cast<int>(s.members[rank].bounds.size()) - 1;
  Team team(slots);
  auto reduce = CanonicalAllReduce::Make(**device, communicator, &team, s.placement(), s.size,
                                         MakeBuckets(s.size, Offsets(s.size), s.bucket_bytes));
  if (!reduce.ok()) {
    if (communicator != nullptr) communicator->Abort(reduce.status());
    return {reduce.status(), {}, {}};
  }
  std::vector<absl::Status> statuses(slots);
  std::vector<std::vector<uint64_t>> digests(slots);
  std::vector<std::thread> threads;
  for (int slot = 0; slot < slots; ++slot) {
    threads.emplace_back([&, slot] {
      statuses[slot] =
          RunSlot(s, rank, slot, team, **reduce, **device, communicator, &digests[slot]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  outcome.status = statuses[0];
  outcome.digests = digests[0];
  for (int slot = 1; slot < slots; ++slot) {
    if (statuses[slot] != statuses[0] || digests[slot] != digests[0]) {
      outcome.status =
          absl::InternalError("slots of one member do not agree: " + statuses[0].ToString() +
                              " and " + statuses[slot].ToString());
    }
  }
  if (communicator != nullptr) outcome.traffic = communicator->traffic();
  return outcome;
}

std::vector<Outcome> RunThreads(const Scenario& s) {
  const int size = static_cast<int>(s.members.size());
  auto communicators =
      MakeLocalCommunicators(size, CanonicalAllReduce::SharedBytes(s.placement(), s.size));
  std::vector<Outcome> outcomes(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back(
        [&, rank] { outcomes[rank] = RunMember(s, rank, communicators[rank].get()); });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

std::vector<Outcome> RunRendezvous(const Scenario& s) {
  const int size = static_cast<int>(s.members.size());
  std::vector<Outcome> outcomes(size);
  std::vector<std::unique_ptr<Rendezvous>> ends;
  std::vector<std::string> bytes;
  RendezvousOptions options;
  for (int rank = 0; rank < size; ++rank) {
    options.members.push_back({"worker-" + std::to_string(rank), s.members[rank].host});
  }
  options.shared_bytes = CanonicalAllReduce::SharedBytes(s.placement(), s.size);
  for (int rank = 0; rank < size; ++rank) {
    options.rank = rank;
    options.address = s.members[rank].address;
    options.slots = static_cast<int>(s.members[rank].bounds.size()) - 1;
    auto end = OpenRendezvous(options);
    if (!end.ok()) {
      std::fill(outcomes.begin(), outcomes.end(), Outcome{end.status(), {}, {}});
      return outcomes;
    }
    bytes.push_back((*end)->bytes());
    ends.push_back(*std::move(end));
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      auto communicator = ends[rank]->Connect(bytes, absl::Now() + absl::Minutes(1));
      if (!communicator.ok()) {
        outcomes[rank].status = communicator.status();
        return;
      }
      outcomes[rank] = RunMember(s, rank, communicator->get());
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

}  // namespace lockstep::collective
