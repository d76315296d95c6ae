// The rendezvous of members that have GPUs: that of their hosts, and NCCL on top of it where it is
// to carry the gradients.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "worker/collective/rendezvous.h"

namespace lockstep::collective {

// Whether the gradients of `options.members`, which all have GPUs, go over NCCL.
bool UsesNccl(const RendezvousOptions& options);

// As OpenRendezvous, where UsesNccl; `host` is the members' rendezvous without NCCL, for small
// exchanges. NotFound: no NCCL on this machine.
absl::StatusOr<std::unique_ptr<Rendezvous>> OpenGpuRendezvous(const RendezvousOptions& options,
                                                              std::unique_ptr<Rendezvous> host);

}  // namespace lockstep::collective
