// Making the Communicator of a generation in two phases, as the protocol's Prepare -> Ready ->
// Start: each member opens its end and describes it in opaque bytes, the coordinator passes
// everybody's bytes round, and each member connects. Peers with the same host id exchange through
// shared memory (a memfd, so nothing is left behind whatever dies), others through Gloo over TCP;
// the gradients of members with GPUs go over NCCL (GradientPath).
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
  std::string gpu = "";  // its identity, which no other has; empty: the member is of CPUs
};

// How members with GPUs exchange gradients.
enum class GradientPath {
  kAutomatic,  // over NCCL where every member has a GPU of its own, else through the hosts' memory
  kNccl,       // also where members share a GPU: slow there, and meant for tests
  kHost,
};

struct RendezvousOptions {
  int rank = 0;
  std::vector<MemberInfo> members;
  std::string address;  // local IP address that peers on other hosts reach us by, without port
  int slots = 1;  // threads of this member: waiting spins only where all of a host can have a core
  // At least the sum of what will be passed to Allocate, each rounded up to 64.
  size_t shared_bytes = 0;
  // Of members that all have GPUs.
  int gpu = 0;  // ours, of the process's
  GradientPath gradients = GradientPath::kAutomatic;
  size_t staging_bytes = 0;  // over NCCL: at least what an exchange brings from other members
  // Of NCCL's communicators; one that takes longer hangs, and ends the process.
  absl::Duration most_abort = absl::Seconds(30);
};

class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  // Our end, to be sent with Ready. A few hundred bytes a member; made for this process and once.
  virtual std::string bytes() const = 0;
  // Joins; by_rank[r] is member r's bytes. Once. Unavailable names the members that did not answer;
  // FailedPrecondition the one whose bytes are of another rendezvous, InvalidArgument the one whose
  // bytes are damaged. NCCL connects behind the hosts, and has a deadline of its own.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Connect(
      const std::vector<std::string>& by_rank, absl::Time deadline,
      Aborted aborted = NeverAborted) = 0;
};

// InvalidArgument; ResourceExhausted (shared memory); Unavailable (the address is not ours);
// NotFound (NCCL).
absl::StatusOr<std::unique_ptr<Rendezvous>> OpenRendezvous(const RendezvousOptions& options);

// Empty where there is no memory. The members of one process, each to be used by its own thread
// (GPU slots of a worker; tests).
std::vector<std::unique_ptr<Communicator>> MakeLocalCommunicators(int size, size_t shared_bytes);

}  // namespace lockstep::collective
