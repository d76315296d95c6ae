// The global norm of a gradient and clipping by it (Pascanu, Mikolov & Bengio 2013, algorithm 1).
//
// Sums of squares of fixed blocks of every tensor, in double, are added by a tree over a tensor's
// blocks (which splits at the largest power of two below their number) and then one over the
// tensors, so the norm is the same bits however the slots of an address space share the blocks. The
// pass tells on its way whether the gradient is finite.
//
// Thread-safe: disjoint parts may be summed at once; Value reads all parts.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/device/device.h"
#include "worker/device/kernel_math.h"
#include "worker/optim/flat_state.h"

namespace lockstep::optim {

class GradientNorm {
 public:
  // ResourceExhausted where the device lacks memory.
  static absl::StatusOr<std::unique_ptr<GradientNorm>> Make(device::Device& device,
                                                            const FlatLayout& layout);

  // Sums the blocks of part `part` of `parts`. `gradient` is a whole vector of the layout.
  void Sum(device::Device& device, device::Stream& stream, int part, int parts,
           const float* gradient);
  // Of what Sum of this part saw, once the stream is synchronized.
  bool IsFinite(int part, int parts) const;
  // Of all parts, once their streams are synchronized.
  double Value() const;

  // On a device whose memory the host does not address, tells its gate of all blocks, whose sums
  // stay there.
  void Describe(device::StepGate* gate) const;

 private:
  GradientNorm() = default;
  double* sums() const { return static_cast<double*>(sums_->data()); }

  std::vector<int64_t> first_blocks_;      // by tensor
  std::unique_ptr<device::Memory> table_;  // a NormBlock for each block
  int64_t blocks_ = 0;
  std::unique_ptr<device::Memory> sums_;  // a double for each block, host-visible
  // For the gate, else null.
  std::unique_ptr<device::Memory> device_sums_, groups_;
  std::vector<int32_t> level_groups_;
};

using device::ClipScale;

}  // namespace lockstep::optim
