#include "worker/collective/fold_program.h"

#include <algorithm>

namespace lockstep::collective {

FoldProgram::FoldProgram(const FoldSchedule& schedule, int inputs) {
  std::vector<int> output_of(inputs, -1);
  for (const int value : schedule.target_buffer) {
    if (value < 0) continue;
    output_of[value] = outputs_++;
    unchanged_.push_back(value);
  }
  std::vector<size_t> last_combine(inputs, 0);
  for (size_t i = 0; i < schedule.combines.size(); ++i) last_combine[schedule.combines[i].dst] = i;

  std::vector<Operand> value(inputs);
  for (int i = 0; i < inputs; ++i) value[i] = {Operand::kInput, i};
  std::vector<int> free_temporaries;
  for (size_t i = 0; i < schedule.combines.size(); ++i) {
    const Combine& combine = schedule.combines[i];
    Step step;
    step.left = value[combine.dst];
    step.right = value[combine.src];
    for (const Operand& operand : {step.left, step.right}) {
      if (operand.kind == Operand::kTemporary) free_temporaries.push_back(operand.index);
    }
    const int output = output_of[combine.dst];
    if (output >= 0 && last_combine[combine.dst] == i) {
      step.out = {Operand::kOutput, output};
      unchanged_[output] = -1;
    } else {
      if (free_temporaries.empty()) free_temporaries.push_back(temporaries_++);
      step.out = {Operand::kTemporary, free_temporaries.back()};
      free_temporaries.pop_back();
    }
    value[combine.dst] = step.out;
    steps_.push_back(step);
  }
}

void FoldProgram::Run(device::Device& device, device::Stream& stream,
                      absl::Span<const float* const> inputs, absl::Span<float* const> outputs,
                      int64_t n, float* scratch) const {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    const auto address = [&](const Operand& operand) -> float* {
      switch (operand.kind) {
        case Operand::kInput:
          return const_cast<float*>(inputs[operand.index]) + begin;  // only read
        case Operand::kTemporary:
          return scratch + operand.index * kBlock;
        case Operand::kOutput:
          break;
      }
      return outputs[operand.index] + begin;
    };
    for (const Step& step : steps_) {
      device.Add(stream, count, address(step.left), address(step.right), address(step.out));
    }
    for (int output = 0; output < outputs_; ++output) {
      const int input = unchanged_[output];
      if (input < 0 || inputs[input] == outputs[output]) continue;
      device.Copy(stream, inputs[input] + begin, outputs[output] + begin, count * sizeof(float));
    }
  }
}

}  // namespace lockstep::collective
