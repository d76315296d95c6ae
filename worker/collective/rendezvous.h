// Making the Communicator of a generation in two phases, as the protocol's Prepare -> Ready -> Start:
// each member opens its end and describes it in opaque bytes, the coordinator passes everybody's bytes
// round, and each member connects. Peers with the same host id exchange through shared memory (a
// memfd, so nothing is left behind whatever dies), others through Gloo over TCP.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/collective/communicator.h"

namespace lockstep::collective {

struct MemberInfo {
  std::string name;      // for messages
  std::string host_id;   // equal where processes can share memory
};

struct RendezvousOptions {
  int rank = 0;
  std::vector<MemberInfo> members;
  std::string address;   // local IP address that peers on other hosts reach us by, without port
  size_t shared_bytes = 0;  // at least the sum of what will be passed to Allocate (plus its alignment to 64)
};

class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  // Our end, to be sent with Ready.
  virtual std::string bytes() const = 0;
  // Joins; by_rank[r] is member r's bytes. Once. Unavailable names the member that did not answer.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Connect(const std::vector<std::string>& by_rank,
                                                                absl::Time deadline) = 0;
};

absl::StatusOr<std::unique_ptr<Rendezvous>> OpenRendezvous(const RendezvousOptions& options);

// The members of one process, each to be used by its own thread (GPU slots of a worker; tests).
std::vector<std::unique_ptr<Communicator>> MakeLocalCommunicators(int size, size_t shared_bytes);

}  // namespace lockstep::collective
