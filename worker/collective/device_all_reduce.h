// The canonical all-reduce of a device whose memory the host does not address, such as a GPU. Every
// leaf of a member has a vector of its own there, so that kernels write all leaves of a layer in
// one call and may read again what they wrote; one pass then sums the tree: of a member alone it
// may be the caller's. Between members the subtrees go through the Communicator's memory. Where
// that is the device's (on_device), a member of one slot exchanges a bucket on a stream of its own
// as soon as its leaves are there, while the slot's stream computes those of earlier layers; all of
// it can be recorded with the pass. Where it is the host's, buckets make no difference.
//
// The slots of a member are streams of one device.
#pragma once

#include <memory>
#include <vector>

#include "worker/collective/all_reduce.h"

namespace lockstep::collective {

size_t DeviceAllReduceSharedBytes(const Placement& placement, int64_t size);
size_t DeviceAllReduceStagingBytes(const Placement& placement, int rank, int64_t size);

// As CanonicalAllReduce::Make, of valid arguments.
absl::StatusOr<std::unique_ptr<CanonicalAllReduce>> MakeDeviceAllReduce(
    device::Device& device, Communicator* communicator, Team* team, const Placement& placement,
    int64_t size, std::vector<Bucket> buckets);

}  // namespace lockstep::collective
