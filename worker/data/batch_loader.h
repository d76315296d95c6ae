// Chooses the samples of batches ahead of the step, on a thread of its own, and brings those of a
// mapped file into memory; each slot then decodes the shards that it computes, on its own stream,
// when it takes the batch: into memory that only it writes and reads, so that the samples lie in
// the caches of the core that needs them, and no core is asked to decode while others wait for it.
// A job has two: training (a new permutation every epoch) and validation (index order, over and
// over: evaluation k begins at step (k - 1) * StepsPerEpoch + 1).
//
// Use is SPMD: every one of the process's slot threads calls Acquire(s) for its own shards and then
// Release(s) for s = first_step, first_step + 1, ...; a batch's place is filled anew when all slots
// have released it. A slot's samples stay until its next Acquire. No thread may acquire more than
// `depth` batches beyond one that it still holds.
//
// On CUDA GatherSamples reads a set that is resident on the slot's GPU; it is ordered before the
// step by the stream alone, and Acquire does not wait for that. What was chosen is read there while
// the batch is held, and a batch that is may be acquired once more, which decodes it again. Of a
// set that does not fit there, the loader's thread brings a batch's samples together in pinned
// memory, and a stream of its own copies them to one of two places on the GPU, while the step
// before computes. Where it is told to decode ahead, that stream makes the next batch's samples,
// too, in a second place beside those of the step that computes.
//
// Thread-safe. Owns its thread and buffers; the device and clock outlive it. Nothing is allocated
// after Make. Takes no lock.
//
// Invariants:
//  1. A batch's content is a function of (data set, options, step): not of depth, slots, or
//  first_step.
//  2. depth + 1 buffers; where a shard's samples and labels lie never changes, or `ahead` follows
//  from whether the step is even.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "worker/data/dataset.h"
#include "worker/data/sampler.h"
#include "worker/device/device.h"

namespace lockstep::data {

struct BatchLoaderOptions {
  std::shared_ptr<const Dataset> dataset;
  int64_t batch = 0;    // global
  int shards = 1;       // of the job
  int first_shard = 0;  // this process owns [first_shard, last_shard)
  int last_shard = 1;
  int slots = 1;  // threads that acquire every batch
  int depth = 2;  // batches chosen ahead, at least 1
  // On a device with memory of its own: a batch that is chosen is decoded while the step before it
  // computes, up to that of `last_step`.
  bool ahead = false;
  int64_t last_step = std::numeric_limits<int64_t>::max();
  bool shuffle = true;
  uint64_t seed = 0;       // of the job
  int64_t first_step = 1;  // anywhere: in mid-epoch too
  std::vector<double> mean = {
      0};                         // x = (value - mean) / std, the value of a byte being byte / 255;
  std::vector<double> std = {1};  // one number serves every channel
  device::Augmentation augmentation;  // of training (MakeAugmentation); none where it is validation
  size_t spare_bytes = 0;             // of the device, for others, beside a copy of the data set
  Clock* clock = &RealClock();        // for WaitTime
};

// One shard's samples, in memory that the device reads.
struct ShardBatch {
  int shard = 0;
  int64_t rows = 0;             // 0: the shard is empty in this batch
  const float* data = nullptr;  // {rows, h, w, c}, 64-byte aligned; of the slot that acquired it
  const int32_t* labels = nullptr;  // {rows}; as data
  int64_t first_position = 0;       // of its first sample in the global batch
};

struct Batch {
  int64_t step = 0;
  int64_t epoch = 0;               // from 1
  int64_t samples = 0;             // of the global batch
  std::vector<ShardBatch> shards;  // first_shard..last_shard-1, empty ones included
};

class BatchLoader {
 public:
  // Starts choosing. InvalidArgument names an option that makes no sense; what the device reports
  // where it lacks memory.
  static absl::StatusOr<std::unique_ptr<BatchLoader>> Make(device::Device& device,
                                                           BatchLoaderOptions options);
  ~BatchLoader();  // stops; no thread may still hold a batch
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  // Waits until the batch is chosen and decodes its shards [first_shard, last_shard) on the stream;
  // they are valid until this thread's next Acquire, the batch until this thread releases it.
  // Cancelled: Stop was called; FailedPrecondition: the step was released already.
  absl::StatusOr<const Batch*> Acquire(device::Stream& stream, int64_t step, int first_shard,
                                       int last_shard);
  void Release(int64_t step);

  // Wakes everyone that waits; Acquire fails from then on, except for batches that are ready.
  void Stop();

  // How long slots waited for data, the sum over slots.
  absl::Duration WaitTime() const;

 private:
  struct Buffer {
    Batch batch;
    std::unique_ptr<device::Memory> labels, offsets;  // int32_t; int64_t, for GatherSamples
    std::unique_ptr<device::Memory> staged;           // the samples, of a set that is not resident
    std::atomic<int64_t> ready_step{0};
    std::atomic<int> holders{0};
  };

  // A slot's way of samples to its device, beside its computation.
  struct Stage {
    std::atomic<const device::Stream*> of{nullptr};  // the slot's
    std::unique_ptr<device::Stream> beside;
    // Whose samples are at step % 2, or will be behind `beside`: as the set has them, and decoded.
    int64_t copied[2] = {0, 0}, decoded[2] = {0, 0};
  };

  BatchLoader(device::Device& device, BatchLoaderOptions options);
  absl::Status Allocate();
  void Run();
  void Wake();
  template <typename Condition>
  void WaitFor(Condition condition);
  absl::StatusOr<Buffer*> WaitForStep(int64_t step);
  void Choose(int64_t step, Buffer& buffer);
  void BringToMemory(int64_t sample) const;
  int64_t SampleBytes() const;
  Stage& StageOf(const device::Stream& stream);
  void CopyAhead(Stage& stage, device::Stream& stream, int64_t step, int first_shard,
                 int last_shard);
  void DecodeAhead(Stage& stage, device::Stream& stream, int64_t step, int first_shard,
                   int last_shard);
  void Decode(device::Stream& stream, int64_t step, int first_shard, int last_shard);
  bool IsChosen(int64_t step) {
    return BufferOf(step).ready_step.load(std::memory_order_acquire) == step;
  }
  // Of `samples_` and `device_labels_`.
  size_t PlaceOf(int64_t step) const { return options_.ahead ? static_cast<size_t>(step % 2) : 0; }
  Buffer& BufferOf(int64_t step) {
    return *buffers_[static_cast<size_t>(step % static_cast<int64_t>(buffers_.size()))];
  }

  device::Device& device_;
  const BatchLoaderOptions options_;
  std::unique_ptr<device::Memory> mean_, inv_std_;
  std::unique_ptr<device::Memory> data_;        // the data set's, for kernels; null: not resident
  std::unique_ptr<device::Memory> samples_[2];  // decoded; a shard's part is its slot's
  // A buffer's, of the batches that are decoded, for a device with memory of its own; else null.
  std::unique_ptr<device::Memory> device_labels_[2];
  // Where each owned shard begins: in a buffer's labels and offsets, and in samples_.
  std::vector<int64_t> first_rows_, first_floats_;
  std::vector<std::unique_ptr<Buffer>> buffers_;  // step s is in buffer s % size
  // Where the set is not resident: on the device, like Buffer::staged.
  std::unique_ptr<device::Memory> places_[2];
  std::vector<std::unique_ptr<Stage>> stages_;  // empty: nothing is done beside

  // Of the loader's thread alone.
  std::vector<int64_t> order_;  // the permutation of order_epoch_
  int64_t order_epoch_ = 0;

  std::atomic<bool> ended_{false};
  // Slots release steps in order, so this many steps from first_step on are free.
  std::atomic<int64_t> released_{0};
  std::atomic<int64_t> waited_{0};  // nanoseconds
  std::atomic<int> events_{0};      // counts what somebody may wait for: no lock in a step

  std::thread thread_;  // last: runs on everything above
};

}  // namespace lockstep::data
