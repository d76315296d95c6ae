// A job of a few steps that every test of collectives runs: leaf vectors of random floats (so that
// any other order of additions gives other bits), the canonical reduction, a merge of small records
// whose fold is neither commutative nor associative, and an all-gather; on threads, on threads that
// met through a rendezvous, or on processes. What comes out is one digest per step, to be compared
// with Expected(), which adds up serially by the definition of the tree.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/collective/all_reduce.h"
#include "worker/collective/communicator.h"

namespace lockstep::collective {

struct ScenarioMember {
  std::string host = "here";
  std::string address = "127.0.0.1";
  std::vector<int> bounds;  // of its slots
  std::string gpu = "gpu";  // where members have GPUs
};

enum class Presence { kAll, kRandom, kShort };  // kShort: fewer leading leaves in every step

struct Scenario {
  std::vector<ScenarioMember> members;
  int64_t size = 1000;
  int64_t bucket_bytes = 1 << 20;
  int steps = 2;
  Presence presence = Presence::kAll;
  int interleaved = 1;  // of the placement; RunThreads only
  bool exact = true;    // of the placement
  uint64_t seed = 1;
  // Member `victim` sends itself `signal` in the middle of step `victim_step`; the others then have
  // `deadline_ms` (else a minute).
  int victim = -1, signal = 0, victim_step = 0;
  int deadline_ms = 60000;
  int most_abort_ms = 30000;  // RendezvousOptions::most_abort
  int abort_ms = -1;          // so long after their connecting began, members abort it; -1: never
  // Members have GPUs that the CUDA module shows, one each or all the same, and exchange over NCCL;
  // RunProcesses only. From the second step on, a slot's computation and exchange are recorded once
  // and repeated, where all leaves are there.
  bool gpus = false;

  int leaves() const { return members.back().bounds.back(); }
  Placement placement() const;
};

// Members with equal slots over `leaves`, all on one host.
Scenario EvenScenario(int leaves, int members, int slots, int64_t size);

struct Outcome {
  absl::Status status;
  std::vector<uint64_t> digests;  // of the steps completed
  Traffic traffic;
};

std::vector<uint64_t> Expected(const Scenario& scenario);

Outcome RunMember(const Scenario& scenario, int rank, Communicator* communicator);
std::vector<Outcome> RunThreads(const Scenario& scenario);
std::vector<Outcome> RunRendezvous(const Scenario& scenario);
std::vector<Outcome> RunProcesses(const Scenario& scenario);

// The main of a member process of RunProcesses.
int MemberMain(const std::string& encoded, int rank);

}  // namespace lockstep::collective
