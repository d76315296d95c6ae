// What the layers that only rearrange (pad, concat, transpose) are to the device: one StridedCopy
// for each input. Internal to worker/nn. Pure; thread-safe.
#pragma once

#include <vector>

#include "worker/device/kernel_types.h"
#include "worker/nn/program.h"

namespace lockstep::nn {

// From input k into the output, rows included; empty for other layers. Reversed, the gradient's
// way.
std::vector<device::StridedCopy> CopiesOf(const Program& program, int node);

}  // namespace lockstep::nn
