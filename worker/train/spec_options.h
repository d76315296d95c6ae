// From the wire's JobSpec to the options of data and optim, and the arithmetic of a run's length.
// Pure.
#pragma once

#include <cstdint>
#include <string>

#include "common/spec/graph.h"
#include "lockstep/v1/spec.pb.h"
#include "worker/data/load.h"
#include "worker/data/values.h"
#include "worker/device/device.h"
#include "worker/optim/optimizer.h"

namespace lockstep::train {

// Gradient buckets are about this large: big enough that an exchange is worth its latency, small
// enough to overlap with the backward pass of earlier layers.
constexpr int64_t kBucketBytes = 1 << 20;
constexpr int64_t kGpuBucketBytes = 8 << 20;  // NCCL is slow with less

// The shape of a run: how steps, epochs and batches of a normalized spec follow from the data's
// size.
struct RunLength {
  int64_t samples = 0;  // of the training set
  int64_t batch = 0;
  int64_t steps_per_epoch = 0;  // the last batch of an epoch may be short
  int64_t total_steps = 0;

  int64_t EpochOf(int64_t step) const { return (step - 1) / steps_per_epoch + 1; }  // from 1
  bool EndsEpoch(int64_t step) const { return step % steps_per_epoch == 0; }
  int64_t BatchSize(int64_t step) const {
    const int64_t first = (step - 1) % steps_per_epoch * batch;
    return samples - first < batch ? samples - first : batch;
  }
};

RunLength MakeRunLength(const v1::JobSpec& spec, int64_t samples);

// `folder`: data.path, resolved on this host.
data::DataOptions MakeDataOptions(const v1::JobSpec& spec, const std::string& folder);
device::Augmentation MakeAugmentation(const v1::JobSpec& spec);
// What the model asks of its data: of an embedding that reads it, positions; of a cross-entropy
// that reproduces it, probabilities.
data::ValueRule MakeValueRule(const spec::Graph& graph);

device::OptimizerCoefficients MakeCoefficients(const v1::OptimizerSpec& spec);
optim::ScheduleOptions MakeSchedule(const v1::JobSpec& spec, const RunLength& length);

// Whether an action of every_steps / every_epochs is due after `step`.
bool Due(int64_t every_steps, int64_t every_epochs, const RunLength& length, int64_t step);

}  // namespace lockstep::train
