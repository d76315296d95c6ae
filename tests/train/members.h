// Runs a job's members as the coordinator would, each MemberJob on threads of its own in this
// process: Prepare all, pass the rendezvous bytes round, Run all. Everything below the coordinator
// is real.
#pragma once

#include <string>
#include <vector>

#include "lockstep/v1/worker.pb.h"

namespace lockstep::train {

struct Training {
  std::vector<v1::Ended> ended;        // by rank
  std::vector<v1::StepMetrics> steps;  // rank 0's reports, in order
  std::vector<v1::Evaluation> evaluations;
  std::vector<v1::CheckpointInfo> checkpoints;
  std::vector<v1::ReplicaDigest> digests;  // of all ranks
  std::string prepare_error;               // of the first member whose Prepare failed
  std::vector<int64_t> offered;            // state versions of the members' Ready, by rank
  std::vector<std::string> notes;          // of all members' Ready
};

struct Cluster {
  int workers = 1;
  int slots = 1;                            // of each worker
  std::vector<std::string> host_ids = {};   // by rank; default: all one host
  std::vector<std::string> addresses = {};  // by rank; default 127.0.0.1
  std::string resume_from = {};
  int resume_rank = -1;          // the only rank that sees resume_from; default: all do
  std::string output_dir = {};   // default: a fresh folder
  int64_t flip_bit_at_step = 0;  // of the last rank
  // Members are told to stop when rank 0 has reported an evaluation.
  bool stop_after_evaluation = false;
};

// `yaml` must be a valid spec. The folder of a default output_dir is removed with the process.
Training RunMembers(const std::string& yaml, const Cluster& cluster);

// The state digest that all members ended with; fails the test where they differ or did not
// complete.
std::string AgreedDigest(const Training& run);

// Everything that was reported of steps and evaluations but how long they took.
std::string Numbers(const Training& run);

std::string TemporaryFolder();

// The specs of the digest list: 30 steps, batches that 8 shards do not divide, a short last
// batch with a partial and empty shards, evaluations with an uneven end.
std::string MlpYaml(const std::string& extra = "");
std::string CnnYaml(const std::string& extra = "");

}  // namespace lockstep::train
