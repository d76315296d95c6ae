// The tensors of one layer of an lstm node, by direction, in a vector of the parameters' layout:
// the parameters themselves, their bf16, or a leaf's gradients. Internal to worker/nn. Allocates
// nothing.
#pragma once

#include <array>
#include <cstdint>

#include "absl/types/span.h"
#include "worker/device/device.h"
#include "worker/nn/program.h"

namespace lockstep::nn {

template <class Float>
class LstmTensors {
 public:
  LstmTensors(const Program& program, int node, int part, Float* flat) {
    const spec::Layer& layer = program.layer(node);
    count_ = layer.bidirectional ? 2 : 1;
    const int64_t each = layer.bias ? 4 : 2;
    const int64_t* offset = program.nodes()[node].tensors.data() + part * count_ * each;
    for (int64_t d = 0; d < count_; ++d, offset += each) {
      tensors_[d].weight_ih = flat + offset[0];
      tensors_[d].weight_hh = flat + offset[1];
      if (!layer.bias) continue;
      tensors_[d].bias_ih = flat + offset[2];
      tensors_[d].bias_hh = flat + offset[3];
    }
  }

  absl::Span<const device::LstmTensors<Float>> directions() const {
    return absl::MakeConstSpan(tensors_.data(), static_cast<size_t>(count_));
  }

 private:
  int64_t count_ = 0;
  std::array<device::LstmTensors<Float>, 2> tensors_;
};

}  // namespace lockstep::nn
