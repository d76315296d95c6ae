// Optimizers and learning-rate schedules over the flat state. One fused pass over any range; bits
// do not depend on how the vector is cut into ranges. Thread-safe: disjoint ranges may be updated
// at once.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

#include "worker/device/device.h"
#include "worker/optim/flat_state.h"

namespace lockstep::optim {

struct ScheduleOptions {
  enum class Type { kConstant, kStep, kCosine } type = Type::kConstant;
  double learning_rate = 0;
  int64_t warmup_steps = 0;  // linear: step s of the warm-up has rate * s / warmup_steps
  std::vector<int64_t>
      at_steps;  // kStep: the rate is multiplied by factor from the step after each
  double factor = 0.1;
  double floor = 0;         // kCosine: fraction of the rate at the end
  int64_t total_steps = 0;  // kCosine (Loshchilov & Hutter 2017, one cycle)
};

// The learning rate of update `step`, from 1. Computed in double, a pure function.
double LearningRate(const ScheduleOptions& options, int64_t step);

class Optimizer {
 public:
  // `coefficients` with l2 and weight_decay as the spec gives them: they apply to tensors that
  // decay, times a tensor's multiplier.
  Optimizer(const device::OptimizerCoefficients& coefficients, const FlatLayout& layout);

  // Fills in everything about `step` that the kernels read.
  void Prepare(const ScheduleOptions& schedule, int64_t step, device::StepScalars* scalars) const;

  // Updates elements [begin, end) of the flat parameters (and slots) from `gradient` (whole
  // vector).
  void Update(device::Device& device, device::Stream& stream, int64_t begin, int64_t end,
              const device::StepScalars* scalars, const float* gradient, FlatState& state) const;

  // The same in one call, from a table of the pieces of [begin, end) that is made once.
  class Pieces {
   public:
    Pieces(std::unique_ptr<device::Memory> table, int64_t count)
        : table_(std::move(table)), count_(count) {}

   private:
    friend class Optimizer;
    std::unique_ptr<device::Memory> table_;
    int64_t count_;
  };
  absl::StatusOr<Pieces> MakePieces(device::Device& device, int64_t begin, int64_t end) const;
  void Update(device::Device& device, device::Stream& stream, const Pieces& pieces,
              const device::StepScalars* scalars, const float* gradient, FlatState& state) const;

 private:
  struct Range {
    int64_t begin, end;
    device::OptimizerCoefficients coefficients;
  };
  device::OptimizerCoefficients coefficients_;
  std::vector<Range> ranges_;  // ascending, cover the whole vector; padding goes with its tensor
};

}  // namespace lockstep::optim
