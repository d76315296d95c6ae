// NCCL as the programs know it: part of the CUDA module (worker/device/module), which is loaded at
// run time; null where a build has none.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/collective/communicator.h"

namespace lockstep::collective {

struct NcclOptions {
  int rank = 0;
  std::vector<std::string> names;  // of the members, for messages
  std::string unique_id;           // NcclModule::new_unique_id of one member, of this generation
  int gpu = 0;
  size_t memory_bytes = 0;   // that Allocate gives in all
  size_t staging_bytes = 0;  // of what one exchange brings from others
  // Of an abort; one that takes longer hangs, and ends the process.
  absl::Duration most_abort = absl::Seconds(30);
};

struct NcclModule {
  // "2.28.9". NotFound where its library was not.
  absl::StatusOr<std::string> (*version)();
  // Opaque bytes that make a communicator (NCCL's, one for each lane), once.
  absl::StatusOr<std::string> (*new_unique_id)();
  // Before the first of the calls below: several members have the same GPU, which NCCL allows only
  // to what it takes for different hosts. `host` must differ among them. Slow; for correctness.
  void (*share_gpu)(const std::string& host);
  // Members connect together. Small exchanges, and what has no stream, go over `host`, a connected
  // Communicator of the same members. Unavailable: no connection by the deadline.
  absl::StatusOr<std::unique_ptr<Communicator>> (*connect)(const NcclOptions& options,
                                                           std::unique_ptr<Communicator> host,
                                                           absl::Time deadline, Aborted aborted);
};

}  // namespace lockstep::collective
