#include "worker/optim/optimizer.h"

#include <algorithm>
#include <cmath>
#include "worker/device/upload.h"

namespace lockstep::optim {
namespace {

bool SameOfRange(const device::OptimizerCoefficients& a, const device::OptimizerCoefficients& b) {
  return a.l2 == b.l2 && a.weight_decay == b.weight_decay && a.rate_multiplier == b.rate_multiplier;
}

}  // namespace

double LearningRate(const ScheduleOptions& options, int64_t step) {
  const double rate = options.learning_rate;
  if (step <= options.warmup_steps) {
    return rate * static_cast<double>(step) / static_cast<double>(options.warmup_steps);
  }
  switch (options.type) {
    case ScheduleOptions::Type::kConstant:
      return rate;
    case ScheduleOptions::Type::kStep: {
      double scaled = rate;
      for (const int64_t at : options.at_steps) {
        if (step > at) scaled *= options.factor;
      }
      return scaled;
    }
    case ScheduleOptions::Type::kCosine: {
      const double length = static_cast<double>(options.total_steps - options.warmup_steps);
      const double done = static_cast<double>(step - options.warmup_steps);
      const double progress = length > 0 ? std::min(1.0, done / length) : 1.0;
      const double wave = 0.5 * (1.0 + std::cos(M_PI * progress));
      return rate * (options.floor + (1.0 - options.floor) * wave);
    }
  }
  return rate;
}

Optimizer::Optimizer(const device::OptimizerCoefficients& coefficients, const FlatLayout& layout)
    : coefficients_(coefficients) {
  for (size_t i = 0; i < layout.tensors.size(); ++i) {
    const bool last = i + 1 == layout.tensors.size();
    const TensorView& tensor = layout.tensors[i];
    Range range{tensor.offset, last ? layout.size : layout.tensors[i + 1].offset, coefficients};
    const float decay = tensor.decays ? static_cast<float>(tensor.decay_multiplier) : 0.0f;
    range.coefficients.l2 *= decay;
    range.coefficients.weight_decay *= decay;
    range.coefficients.rate_multiplier = static_cast<float>(tensor.rate_multiplier);
    if (!ranges_.empty() && SameOfRange(ranges_.back().coefficients, range.coefficients)) {
      ranges_.back().end = range.end;
    } else {
      ranges_.push_back(range);
    }
  }
}

void Optimizer::Prepare(const ScheduleOptions& schedule, int64_t step,
                        device::StepScalars* scalars) const {
  scalars->step = static_cast<uint64_t>(step);
  scalars->learning_rate = static_cast<float>(LearningRate(schedule, step));
  if (coefficients_.type == device::OptimizerType::kAdam) {
    const double t = static_cast<double>(step);
    scalars->adam_correction1 = static_cast<float>(1.0 - std::pow(double{coefficients_.beta1}, t));
    scalars->adam_correction2 = static_cast<float>(1.0 - std::pow(double{coefficients_.beta2}, t));
  }
}

void Optimizer::Update(device::Device& device, device::Stream& stream, int64_t begin, int64_t end,
                       const device::StepScalars* scalars, const float* gradient,
                       FlatState& state) const {
  for (const Range& range : ranges_) {
    const int64_t first = std::max(begin, range.begin), last = std::min(end, range.end);
    if (first >= last) continue;
    device::OptimizerSlots slots;
    for (int i = 0; i < state.slot_count(); ++i) slots.at[i] = state.slot(i) + first;
    device.OptimizerUpdate(stream, range.coefficients, last - first, scalars, gradient + first,
                           state.parameters() + first, slots,
                           state.rounded() == nullptr ? nullptr : state.rounded() + first);
  }
}

absl::StatusOr<Optimizer::Pieces> Optimizer::MakePieces(device::Device& device, int64_t begin,
                                                        int64_t end) const {
  // Of a small vector, pieces that a block of threads updates in one go are on a GPU all at once.
  constexpr int64_t kSmall = int64_t{1} << 20, kSmallPiece = 1024;
  const int64_t most = end - begin <= kSmall ? kSmallPiece : device::kUpdatePiece;
  static_assert(kSmallPiece <= device::kUpdatePiece);
  std::vector<device::UpdatePiece> pieces;
  for (const Range& range : ranges_) {
    const device::OptimizerCoefficients& own = range.coefficients;
    const int64_t last = std::min(end, range.end);
    for (int64_t at = std::max(begin, range.begin); at < last; at += most) {
      pieces.push_back(
          {at, std::min(last, at + most), own.l2, own.weight_decay, own.rate_multiplier});
    }
  }
  ASSIGN_OR_RETURN(auto table, device::Upload(device, pieces));
  return Pieces(std::move(table), static_cast<int64_t>(pieces.size()));
}

void Optimizer::Update(device::Device& device, device::Stream& stream, const Pieces& pieces,
                       const device::StepScalars* scalars, const float* gradient,
                       FlatState& state) const {
  device::OptimizerSlots slots;
  for (int i = 0; i < state.slot_count(); ++i) slots.at[i] = state.slot(i);
  device.OptimizerUpdatePieces(stream, coefficients_, pieces.count_,
                               static_cast<const device::UpdatePiece*>(pieces.table_->data()),
                               scalars, gradient, state.parameters(), slots, state.rounded());
}

}  // namespace lockstep::optim
