// A FoldSchedule made ready to run over vectors in memory that must not be written (other members'
// parts): sums in progress live in small blocks that stay in the first-level cache, and a vector is
// read once and written once however many parts there are.
//
// Immutable after construction; thread-safe, each thread with its own scratch. Bits do not depend
// on where a range is cut.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "worker/collective/tree.h"
#include "worker/device/device.h"

namespace lockstep::collective {

class FoldProgram {
 public:
  // Elements of one block: 8 KiB, so that two operands and a result fit in the first-level cache.
  static constexpr int64_t kBlock = 2048;

  FoldProgram() = default;
  // `inputs`: number of values that the schedule combines. Absent targets produce no output.
  FoldProgram(const FoldSchedule& schedule, int inputs);

  int outputs() const { return outputs_; }                   // targets that are present
  int64_t scratch() const { return temporaries_ * kBlock; }  // floats
  // The inputs that pass to output i unchanged, or -1 where something is added.
  int unchanged(int output) const { return unchanged_[output]; }

  // outputs[t][i] = the fold of inputs[...][i], i in [0, n). An output may be one of the inputs
  // that are folded into it (or the same memory), but no other's.
  void Run(device::Device& device, device::Stream& stream, absl::Span<const float* const> inputs,
           absl::Span<float* const> outputs, int64_t n, float* scratch) const;

 private:
  struct Operand {
    enum Kind : uint8_t { kInput, kTemporary, kOutput } kind = kInput;
    int index = 0;
  };
  struct Step {
    Operand left, right, out;
  };

  std::vector<Step> steps_;
  std::vector<int> unchanged_;
  int temporaries_ = 0;
  int outputs_ = 0;
};

}  // namespace lockstep::collective
