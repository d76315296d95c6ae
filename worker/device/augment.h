// The draws of augmentation, written once for the CPU and the CUDA kernels: pure functions of a
// key, the step and the sample's position in the global batch, so that a sample is changed in the
// same way wherever it is computed. Thread-safe.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device {

// Uniform on [0, bound) to within bound / 2^32.
LOCKSTEP_DEVICE inline int64_t DrawBelow(uint32_t bits, int64_t bound) {
  return static_cast<int64_t>((static_cast<uint64_t>(bits) * static_cast<uint64_t>(bound)) >> 32);
}

LOCKSTEP_DEVICE inline SampleChange DrawChange(const Augmentation& augmentation,
                                               const SampleShape& shape, uint64_t step,
                                               uint64_t position) {
  SampleChange change;
  if (augmentation.crop_padding > 0) {
    const PhiloxBlock bits = Philox(augmentation.crop_key, position, step);
    const int64_t places = 2 * augmentation.crop_padding + 1;
    change.shift_y = DrawBelow(bits.x[0], places) - augmentation.crop_padding;
    change.shift_x = DrawBelow(bits.x[1], places) - augmentation.crop_padding;
  }
  if (augmentation.flip) {
    change.flip = Philox(augmentation.flip_key, position, step).x[0] >> 31 != 0;
  }
  if (augmentation.cutout > 0) {
    const PhiloxBlock bits = Philox(augmentation.cutout_key, position, step);
    const int64_t top = DrawBelow(bits.x[0], shape.height) - augmentation.cutout / 2;
    const int64_t left = DrawBelow(bits.x[1], shape.width) - augmentation.cutout / 2;
    const int64_t bottom = top + augmentation.cutout, right = left + augmentation.cutout;
    change.cut_top = top < 0 ? 0 : top;
    change.cut_left = left < 0 ? 0 : left;
    change.cut_bottom = bottom < shape.height ? bottom : shape.height;
    change.cut_right = right < shape.width ? right : shape.width;
  }
  return change;
}

}  // namespace lockstep::device
