// The probe: one forward and backward pass of a compiled program, with its initial parameters, over
// samples drawn from Philox. Devices whose probes digest differently would train differently;
// members of a job compare it before they start (DESIGN section 1, fingerprint).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/device/device.h"
#include "worker/nn/plan.h"

namespace lockstep::train {

// Hex digest of the gradient of one shard of `rows` samples, a row count that `operations` was made
// for. Repacks `operations` with the initial parameters of `seed`.
absl::StatusOr<std::string> ProbeDigest(std::shared_ptr<const nn::Program> program,
                                        device::Device& device, nn::Operations& operations,
                                        int64_t rows, uint64_t seed);

}  // namespace lockstep::train
