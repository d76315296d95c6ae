// What a slot of the step loop has: for its own files.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/device/upload.h"
#include "worker/train/run_ahead.h"
#include "worker/train/step_loop.h"

namespace lockstep::train {

// A slot's own memory, all of it allocated before the first step.
struct StepLoop::Slot final : nn::GradientSink, nn::MomentExchange {
  Slot(StepLoop* loop, int index)
      : loop(loop), index(index), ring(loop->runs_ahead() ? RunAhead::kMost : 1) {}
  // What a failed loop has left on the device has run before it goes.
  ~Slot() override {
    if (stream != nullptr) stream->Synchronize().IgnoreError();
    if (loop->parts_.communicator != nullptr) loop->parts_.communicator->PoisonOnFailure(nullptr);
  }

  // ---- nn::GradientSink
  float* Leaf(int shard) override { return loop->parts_.all_reduce->Leaf(index, shard); }
  void Done(int shard, int64_t begin, int64_t end) override {
    loop->parts_.all_reduce->Done(index, *stream, shard, begin, end);
  }

  // A pass over some of the leaves cannot fold all.
  const device::LeafFold* Fold() override {
    return loop->options_.accumulate > 1 ? nullptr : loop->parts_.all_reduce->LeafFold(index);
  }
  float* Part(int part) override { return loop->parts_.all_reduce->Part(index, part); }
  void DoneFolded(int64_t begin, int64_t end) override {
    loop->parts_.all_reduce->DoneFolded(index, *stream, begin, end);
  }
  bool LeavesStay() const override { return loop->parts_.all_reduce->LeavesStay(); }
  void EndPass() override {
    loop->parts_.all_reduce->EndPass(index, *stream);
    if (loop->runs_ahead()) updated = loop->Update(*this);
  }
  void Repeated() override { loop->parts_.all_reduce->Repeated(index); }

  // ---- nn::MomentExchange
  const Batch* OnDevice() const override { return loop->runs_ahead() ? &batch : nullptr; }
  absl::Status Gather(void* records, size_t bytes) override {
    std::vector<int64_t> bounds;
    for (const std::vector<int>& member : loop->options_.members) {
      bounds.push_back(std::min(member.front(), batch.shards.count) * static_cast<int64_t>(bytes));
    }
    bounds.push_back(batch.shards.count * static_cast<int64_t>(bytes));
    loop->parts_.all_reduce->JoinExchanges(*stream);
    return loop->parts_.communicator
        ->EnqueueGatherBlocks(*stream, collective::Lane::kMoments, records, bounds)
        .status();
  }
  absl::StatusOr<const float*> Combine(Kind kind, int64_t channels, int64_t spatial,
                                       absl::Span<const nn::ShardInput> shards,
                                       absl::Span<const float* const> leaf_records,
                                       int64_t* rows) override {
    const size_t bytes = sizeof(int64_t) + sizeof(float) * 2 * channels;
    std::fill(record_pointers.begin(), record_pointers.end(), nullptr);
    for (size_t i = 0; i < shards.size(); ++i) {
      uint8_t* record = exchange_records.data() + i * exchange_stride;
      std::memcpy(record, &shards[i].rows, sizeof(int64_t));
      std::memcpy(record + sizeof(int64_t), leaf_records[i], sizeof(float) * 2 * channels);
      record_pointers[shards[i].shard - first_leaf] = record;
    }
    device::Device& device = *loop->parts_.device;
    const auto fold = [&](void* left, const void* right) {
      auto* rows_left = static_cast<int64_t*>(left);
      const auto* rows_right = static_cast<const int64_t*>(right);
      auto* a = reinterpret_cast<float*>(rows_left + 1);
      const auto* b = reinterpret_cast<const float*>(rows_right + 1);
      if (kind == Kind::kMoments) {
        device.MergeMoments(*stream, channels, *rows_left * spatial, a, a + channels,
                            *rows_right * spatial, b, b + channels, a, a + channels);
      } else {
        for (int64_t i = 0; i < 2 * channels; ++i) a[i] += b[i];
      }
      *rows_left += *rows_right;
    };
    ASSIGN_OR_RETURN(const void* root, loop->parts_.all_reduce->MergeSmall(
                                           index, record_pointers, bytes, fold, loop->Deadline()));
    *rows = *static_cast<const int64_t*>(root);
    return reinterpret_cast<const float*>(static_cast<const int64_t*>(root) + 1);
  }

  StepLoop* const loop;
  const int index;
  const int64_t ring;  // what is by step is at step % ring
  int first_shard = 0, shard_count = 0;
  int first_leaf = 0, leaf_count = 0;
  nn::Plan* plan = nullptr;
  std::unique_ptr<device::Stream> stream;
  // Host-visible: written by the host and read by kernels, or the other way round.
  struct Shared {
    device::StepScalars scalars[RunAhead::kMost];   // by step
    device::StepOutcome outcomes[RunAhead::kMost];  // by step
    uint32_t non_finite = 0;
    uint32_t poison = 0;  // of the gate
  };
  std::unique_ptr<device::Memory> shared_memory, digests_memory;
  Shared* shared = nullptr;
  device::StepScalars* scalars = nullptr;  // of the step
  device::StepScalars* ScalarsOf(int64_t of) const { return &shared->scalars[of % ring]; }
  // What kernels read, of host memory or where they cannot read that itself, of the device: in
  // forward and backward, and in what changes the state.
  std::unique_ptr<device::Memory> device_scalars_memory, gated_memory, device_record;
  device::StepScalars* device_scalars = nullptr;
  device::StepScalars* gated_scalars = nullptr;
  // One call each, of a device that works on its own; else null.
  std::optional<optim::Optimizer::Pieces> update;
  std::unique_ptr<optim::FlatState::DigestTable> digest_table;
  std::unique_ptr<device::Memory> statistics_table;
  int64_t statistics_count = 0;
  const device::StatisticsSlice* statistics_slices() const {
    return static_cast<const device::StatisticsSlice*>(statistics_table->data());
  }
  absl::Span<Digest> digests;                // this slot's part of every tensor's
  std::vector<uint8_t> present;              // by leaf of the job
  std::vector<nn::ShardInput> shards;        // of the current evaluation batch
  std::vector<nn::ShardInput> leaves;        // of the current batch, in the order of computation
  std::vector<int> passes;                   // where each forward and backward pass ends in it
  std::vector<const void*> record_pointers;  // by own leaf
  std::vector<uint8_t> records;              // trailers with moments, by own leaf
  size_t record_bytes = 0;
  std::vector<uint8_t> exchange_records;
  size_t exchange_stride = 0;
  std::vector<double> shard_loss;  // evaluation sums by own shard
  std::vector<int64_t> shard_correct, shard_rows;

  int64_t step = 0;
  int64_t committed = 0;  // the last step that is known to be
  double gradient_norm = 0;
  absl::Time step_began;
  const Trailer* trailer = nullptr;
  Trailer evaluated;               // stands in for the trailer once an evaluation replaced it
  int64_t evaluation_batches = 0;  // taken from the validation loader so far
  int64_t population_batches = 0;  // from the population loader
  std::vector<uint8_t> population_record;
  int64_t blamed = 0;  // place in execution order of this slot's first non-finite tensor

  // ---- of a loop that runs ahead.
  RunAhead ahead;
  int64_t device_step = 0;  // that device_scalars are of when what is enqueued has run
  device::StepGate gate;
  std::vector<const float*> left;  // whose sum the gate makes the gradient
  Batch batch;                     // at hand
  absl::Status updated;            // what Update returned within a pass
  Trailer collected;               // of the step whose outcome was taken last
};

}  // namespace lockstep::train
