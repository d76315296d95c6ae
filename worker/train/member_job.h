// One member's part in one generation of a job: everything between Prepare and Ended. Prepare loads
// data, compiles the Program, makes state, operations and plans, and opens the communicator's end;
// Run connects, takes or makes the initial state, drives one thread per slot through the StepLoop,
// and writes checkpoints (rank 0).
//
// Files, under the output folder (rank 0): digests.jsonl, checkpoints/step-N/.
//
// Thread safety: Prepare, UseAlgorithms, Run and broken from one thread; Stop and Abort from any
// thread at any time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "lockstep/v1/worker.pb.h"
#include "worker/collective/rendezvous.h"

namespace lockstep::train {

using collective::GradientPath;

struct MemberOptions {
  v1::Prepare prepare;
  std::string host;      // for people, in CheckpointInfo
  std::string address;   // local IP address that peers on other hosts reach us by
  std::string work_dir;  // output folder <work_dir>/<job> where Prepare gives none
  std::string version;
  std::string data_path;  // replaces the spec's where not empty
  int gpu = 0;            // which of the machine's, for a spec with resources.device cuda
  GradientPath gradients = GradientPath::kAutomatic;      // between members with GPUs
  absl::Duration collective_timeout = absl::Minutes(10);  // that members wait for each other
  bool evaluate_only =
      false;  // Run evaluates the checkpoint of prepare.resume_from and trains nothing
  int64_t flip_bit_at_step = 0;  // fault injection, see StepLoop
  // Progress, ReplicaDigest and LogLines, with job and generation set. Thread-safe.
  std::function<void(v1::WorkerMessage)> send;
};

class MemberJob {
 public:
  explicit MemberJob(MemberOptions options);
  ~MemberJob();
  MemberJob(const MemberJob&) = delete;

  // Everything but job and generation is set. Errors are one line that names the file or field.
  absl::StatusOr<v1::Ready> Prepare();
  // After Prepare: makes operations and plans again, with these. FailedPrecondition: the device
  // cannot compute something so.
  absl::StatusOr<v1::Ready> UseAlgorithms(const v1::Algorithms& algorithms);
  v1::Ended Run(const v1::Start& start);
  // OK; after an error of either of them: why this process can serve no job any more (its GPU is
  // lost to it, device::Device::Check).
  absl::Status broken() const;
  void Stop();
  void Abort(const std::string& reason);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::train
