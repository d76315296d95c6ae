#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/kernels/lstm_step.h"

namespace lockstep::device::LOCKSTEP_ISA {

void LstmPackForward(int64_t hidden, int64_t depth, const float* weight, float* packed) {
  for (int64_t unit = 0; unit < hidden; unit += kLanes) {
    const int64_t units = hidden - unit < kLanes ? hidden - unit : kLanes;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t v = 0; v < kGates; ++v, packed += kLanes) {
        for (int64_t j = 0; j < units; ++j) {
          packed[j] = weight[(v * hidden + unit + j) * depth + k];
        }
      }
    }
  }
}

void LstmPackBackward(int64_t hidden, int64_t depth, const float* weight, float* packed) {
  for (int64_t unit = 0; unit < hidden; unit += kGemmPanel) {
    const int64_t units = hidden - unit < kGemmPanel ? hidden - unit : kGemmPanel;
    for (int64_t k = 0; k < depth; ++k, packed += kGemmPanel) {
      for (int64_t j = 0; j < units; ++j) packed[j] = weight[k * hidden + unit + j];
    }
  }
}

void LstmForwardStep(const LstmStepShape& shape, const float* weight, const float* h_before,
                     const float* c_before, float* gates, float* c, float* tanh_c, float* h) {
  ForwardStepOf<Floats>(shape, weight, h_before, c_before, gates, c, tanh_c, h);
}

void LstmBackwardStep(const LstmStepShape& shape, const float* weight, const float* dgates_after,
                      const float* dh, const float* c_before, const float* tanh_c, float* gates,
                      float* dc) {
  BackwardStepOf<Floats>(shape, weight, dgates_after, dh, c_before, tanh_c, gates, dc);
}

}  // namespace lockstep::device::LOCKSTEP_ISA
