#include "worker/train/step_loop.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"
#include "worker/device/upload.h"

namespace lockstep::train {
namespace {

using collective::CanonicalAllReduce;

// The part of [0, n) that slot `i` of `k` works on, cut at cache lines.
int64_t PartBegin(int64_t n, int k, int i) { return collective::ChunkBegin(n, k, i); }

void MergeTrailers(Trailer& left, const Trailer& right) {
  left.rows += right.rows;
  left.loss_sum += right.loss_sum;
  left.correct += right.correct;
  left.stop |= right.stop;
}

}  // namespace

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

StepLoop::StepLoop(Options options, Parts parts, CheckpointSink* checkpoints)
    : options_(std::move(options)),
      parts_(std::move(parts)),
      checkpoints_(checkpoints),
      runs_ahead_(CanRunAhead()),
      tensor_digests_(parts_.state->named().size()),
      epoch_(options_.epoch),
      last_epoch_(options_.last_epoch),
      evaluation_(options_.last_evaluation),
      shard_steps_(options_.shards, 0) {
  result_.set_steps(options_.first_step - 1);
  result_.set_epochs(result_.steps() / options_.length.steps_per_epoch);
  SummarizeTraining();
  if (evaluation_.has_value()) *result_.mutable_validation() = evaluation_->validation();
}

StepLoop::~StepLoop() = default;

absl::StatusOr<std::unique_ptr<StepLoop>> StepLoop::Make(Options options, Parts parts,
                                                         CheckpointSink* checkpoints) {
  std::unique_ptr<StepLoop> loop(new StepLoop(std::move(options), std::move(parts), checkpoints));
  const Options& o = loop->options_;
  const Parts& p = loop->parts_;
  int64_t& widest_norm = loop->widest_norm_;
  for (const nn::MomentsSlice& slice : p.program->moments()) {
    widest_norm = std::max(widest_norm, slice.channels);
  }
  const auto round_up = [](size_t n) { return (n + 63) / 64 * 64; };
  for (int i = 0; i + 1 < static_cast<int>(o.bounds.size()); ++i) {
    auto slot = std::make_unique<Slot>(loop.get(), i);
    slot->first_shard = o.bounds[i];
    slot->shard_count = o.bounds[i + 1] - o.bounds[i];
    slot->first_leaf = slot->first_shard * o.accumulate;
    slot->leaf_count = slot->shard_count * o.accumulate;
    slot->plan = p.plans[i];
    ASSIGN_OR_RETURN(slot->stream, p.device->MakeStream());
    ASSIGN_OR_RETURN(slot->shared_memory, p.device->AllocateHostVisible(sizeof(Slot::Shared)));
    slot->shared = new (slot->shared_memory->data()) Slot::Shared();
    slot->scalars = slot->device_scalars = slot->gated_scalars = slot->ScalarsOf(o.first_step);
    const size_t tensors = p.state->named().size();
    ASSIGN_OR_RETURN(slot->digests_memory, p.device->AllocateHostVisible(sizeof(Digest) * tensors));
    slot->digests = absl::MakeSpan(static_cast<Digest*>(slot->digests_memory->data()), tensors);
    slot->present.resize(o.shards * o.accumulate);
    slot->shards.reserve(slot->shard_count);
    slot->leaves.reserve(slot->leaf_count);
    slot->passes.reserve(std::max(slot->leaf_count, o.accumulate));
    slot->record_pointers.resize(slot->leaf_count);
    slot->record_bytes = round_up(sizeof(Trailer) + sizeof(float) * p.program->moments_size());
    slot->records.resize(slot->record_bytes * slot->leaf_count);
    if (!p.device->host_addressable()) {
      ASSIGN_OR_RETURN(slot->device_scalars_memory,
                       p.device->Allocate(sizeof(device::StepScalars)));
      slot->device_scalars = slot->gated_scalars =
          static_cast<device::StepScalars*>(slot->device_scalars_memory->data());
      ASSIGN_OR_RETURN(slot->device_record, p.device->Allocate(slot->record_bytes));
      const int slots = static_cast<int>(o.bounds.size()) - 1;
      const int64_t size = p.program->parameters().size;
      ASSIGN_OR_RETURN(slot->update, p.optimizer->MakePieces(*p.device, PartBegin(size, slots, i),
                                                             PartBegin(size, slots, i + 1)));
      ASSIGN_OR_RETURN(slot->digest_table, optim::FlatState::DigestTable::Make(
                                               *p.device, *p.state, i, slots, slot->ring));
      std::vector<device::StatisticsSlice> slices;
      for (const nn::MomentsSlice& s : p.program->moments()) {
        if (s.population) continue;
        slices.push_back(
            {s.offset, s.channels, s.spatial, s.running_mean, s.running_var, s.momentum});
      }
      slot->statistics_count = static_cast<int64_t>(slices.size());
      ASSIGN_OR_RETURN(slot->statistics_table, device::Upload(*p.device, slices));
    }
    if (loop->runs_ahead()) RETURN_IF_ERROR(loop->MakeGate(*slot));
    if (p.population != nullptr) slot->population_record.resize(slot->record_bytes);
    slot->exchange_stride = round_up(sizeof(int64_t) + sizeof(float) * 2 * widest_norm);
    slot->exchange_records.resize(slot->exchange_stride * slot->shard_count);
    slot->shard_loss.resize(slot->shard_count);
    slot->shard_correct.resize(slot->shard_count);
    slot->shard_rows.resize(slot->shard_count);
    loop->slots_.push_back(std::move(slot));
  }
  return loop;
}

// The gate's latch begins open.
absl::Status StepLoop::MakeGate(Slot& slot) {
  struct Gated {
    device::StepScalars scalars;
    device::GateNotes notes;
  };
  const Gated open;
  ASSIGN_OR_RETURN(slot.gated_memory, parts_.device->Allocate(sizeof(open)));
  auto* const gated = static_cast<Gated*>(slot.gated_memory->data());
  slot.gated_scalars = &gated->scalars;
  slot.gate.notes = &gated->notes;
  parts_.device->Copy(*slot.stream, &open, gated, sizeof(open));
  parts_.norm->Describe(&slot.gate);
  slot.gate.results = slot.plan->device_results();
  if (parts_.communicator != nullptr) {
    parts_.communicator->PoisonOnFailure(&slot.shared->poison);
    slot.gate.poison = &slot.shared->poison;
  }
  slot.gate.clip_norm = options_.clip_norm;
  slot.gate.ring = slot.ring;
  slot.gate.prepared = slot.shared->scalars;
  slot.gate.current = slot.device_scalars;
  slot.gate.update = slot.gated_scalars;
  slot.gate.outcomes = slot.shared->outcomes;
  return slot.stream->Synchronize();
}

absl::Status StepLoop::Run(int index) {
  Slot& slot = *slots_[index];
  const int k = parts_.team->slots();
  const int64_t size = parts_.program->parameters().size;
  parts_.state->RoundParameters(*parts_.device, *slot.stream, PartBegin(size, k, index),
                                PartBegin(size, k, index + 1));
  RETURN_IF_ERROR(Barrier(slot));
  parts_.operations->Pack(*slot.stream, *parts_.state, index, k);
  RETURN_IF_ERROR(Barrier(slot));
  if (index == 0) started_ = absl::Now();
  slot.step = slot.committed = options_.first_step - 1;
  if (options_.evaluate_only) {
    RETURN_IF_ERROR(Evaluate(slot));
    return DigestState(slot);
  }
  if (slot.step == options_.length.total_steps) {  // resumed at its end, perhaps for another folder
    RETURN_IF_ERROR(Evaluate(slot));
    RETURN_IF_ERROR(Checkpoint(slot));
  }
  // ---- the step loop --------------------------------------------------------------------------
  for (slot.step = options_.first_step; slot.step <= options_.length.total_steps; ++slot.step) {
    RETURN_IF_ERROR(NextShards(slot));
    RETURN_IF_ERROR(ForwardBackward(slot));
    if (!runs_ahead()) RETURN_IF_ERROR(Update(slot));  // else recorded with ForwardBackward
    RETURN_IF_ERROR(Commit(slot));
    RETURN_IF_ERROR(Report(slot));
    RETURN_IF_ERROR(Evaluate(slot));
    RETURN_IF_ERROR(Checkpoint(slot));
    if (IsStopped(slot)) break;
  }
  // ---------------------------------------------------------------------------------------------
  slot.step = std::min(slot.step, options_.length.total_steps);
  RETURN_IF_ERROR(DigestState(slot));
  if (index == 0) {
    stopped_ = slot.step < options_.length.total_steps;
    result_.set_seconds(absl::ToDoubleSeconds(absl::Now() - started_));
    const absl::Duration of_slots = training_time_ * parts_.team->slots();
    if (of_slots > absl::ZeroDuration()) {
      result_.set_data_wait_share(
          std::min(1.0, absl::FDivDuration(parts_.train->WaitTime(), of_slots)));
    }
  }
  return Barrier(slot);
}

// From the shards' gradients to the next state.
absl::Status StepLoop::Update(Slot& slot) {
  if (runs_ahead()) MergeStatistics(slot);
  RETURN_IF_ERROR(FinishReduce(slot));
  RETURN_IF_ERROR(Gate(slot));
  Clip(slot);
  if (!runs_ahead()) {  // Commit packs, when all slots are here
    Optimize(slot);
    UpdateStatistics(slot);
    return absl::OkStatus();
  }
  device::Stream& beside = StatisticsStream(slot);  // neither reads what the other writes
  if (&beside != slot.stream.get()) parts_.device->Follow(beside, *slot.stream);
  UpdateStatisticsAhead(slot, beside);
  Optimize(slot);
  if (&beside != slot.stream.get()) parts_.device->Follow(*slot.stream, beside);
  parts_.operations->Pack(*slot.stream, *parts_.state, 0, 1);
  if (options_.digest_every == 1) {
    slot.digest_table->Enqueue(*parts_.device, *slot.stream, slot.gated_scalars);
  }
  return absl::OkStatus();
}

absl::Status StepLoop::NextShards(Slot& slot) {
  if (slot.committed == slot.step - 1) slot.step_began = absl::Now();
  ASSIGN_OR_RETURN(const data::Batch* batch, Acquire(slot, *parts_.train, slot.step));
  for (int leaf = 0; leaf < options_.shards * options_.accumulate; ++leaf) {
    slot.present[leaf] =
        Microbatch(batch->samples, leaf / options_.accumulate, leaf % options_.accumulate).count >
        0;
  }
  TakeMicrobatches(slot, *batch);
  ASSIGN_OR_RETURN(const bool stop, AgreeToStop(slot));
  slot.ahead.Of(slot.step) = {batch->samples, stop, false};
  slot.scalars = slot.ScalarsOf(slot.step);
  parts_.optimizer->Prepare(options_.schedule, slot.step, slot.scalars);
  ShowScalars(slot);
  return parts_.all_reduce->Begin(slot.index, slot.present, Deadline());
}

// This slot's shards of a loader's batch.
absl::StatusOr<const data::Batch*> StepLoop::Acquire(Slot& slot, data::BatchLoader& loader,
                                                     int64_t step) {
  return loader.Acquire(*slot.stream, step, slot.first_shard, slot.first_shard + slot.shard_count);
}

data::ShardRange StepLoop::Microbatch(int64_t samples, int shard, int microbatch) const {
  return data::RangeOfMicrobatch({options_.length.batch, options_.shards, options_.accumulate},
                                 samples, shard, microbatch);
}

// This slot's microbatches that have samples, as passes. Interleaved, a pass is one microbatch of
// all shards, the same on every slot: also one that has nothing in it takes part in its exchanges.
// Otherwise it is one microbatch, and a shard's follow each other: gradients then need few partial
// sums.
void StepLoop::TakeMicrobatches(Slot& slot, const data::Batch& batch) {
  const int64_t features = spec::ElementCount(parts_.program->graph().data_shape);
  slot.leaves.clear();
  slot.passes.clear();
  const auto take = [&](const data::ShardBatch& s, int microbatch) {
    const int local = s.shard - slot.first_shard;
    const data::ShardRange range = Microbatch(batch.samples, s.shard, microbatch);
    if (range.count == 0 || local < 0 || local >= slot.shard_count) return false;
    slot.leaves.push_back({s.shard * options_.accumulate + microbatch, range.count,
                           s.data + range.first * features, s.labels + range.first,
                           s.first_position + range.first});
    return true;
  };
  const auto end_pass = [&] { slot.passes.push_back(static_cast<int>(slot.leaves.size())); };
  if (runs_ahead()) {
    device::Leaves& shards = slot.batch.shards;
    shards.count = 0;
    for (int shard = 0; shard < options_.shards; ++shard) {
      const int64_t rows = Microbatch(batch.samples, shard, 0).count;
      if (rows == 0) break;  // nor has any behind it
      shards.begin[shard + 1] = shards.begin[shard] + rows;
      shards.count = shard + 1;
    }
    slot.batch.first = std::min(slot.first_shard, shards.count);
    slot.batch.elsewhere = members() > 1;
  }
  if (options_.accumulate == 1 || options_.interleaved) {
    // No shard has more microbatches than the first.
    for (int m = 0; m < options_.accumulate && Microbatch(batch.samples, 0, m).count > 0; ++m) {
      for (const data::ShardBatch& s : batch.shards) take(s, m);
      end_pass();
    }
  } else {
    for (const data::ShardBatch& s : batch.shards) {
      for (int m = 0; m < options_.accumulate; ++m) {
        if (take(s, m)) end_pass();
      }
    }
  }
}

// This slot's shards of a batch that have samples.
void StepLoop::TakeShards(Slot& slot, const data::Batch& batch) {
  slot.shards.clear();
  for (const data::ShardBatch& s : batch.shards) {
    const int local = s.shard - slot.first_shard;
    if (s.rows > 0 && local >= 0 && local < slot.shard_count) {
      slot.shards.push_back({s.shard, s.rows, s.data, s.labels, s.first_position});
    }
  }
}

absl::Status StepLoop::ForwardBackward(Slot& slot) {
  int begin = 0;
  for (const int end : slot.passes) {
    const auto leaves = absl::MakeConstSpan(slot.leaves).subspan(begin, end - begin);
    RETURN_IF_ERROR(slot.plan->TrainStep(*slot.stream, *parts_.state, slot.device_scalars,
                                         options_.length.BatchSize(slot.step), leaves, slot, slot));
    if (runs_ahead()) {
      slot.device_step = slot.step + 1;  // the gate counts on
      return slot.updated;
    }
    RETURN_IF_ERROR(slot.stream->Synchronize());
    KeepRecords(slot, leaves);
    begin = end;
  }
  return absl::OkStatus();
}

// The next pass reuses the plan's memory.
void StepLoop::KeepRecords(Slot& slot, absl::Span<const nn::ShardInput> leaves) {
  const size_t moments_bytes = sizeof(float) * parts_.program->moments_size();
  for (size_t i = 0; i < leaves.size(); ++i) {
    const int leaf = leaves[i].shard;
    uint8_t* record = slot.records.data() + (leaf - slot.first_leaf) * slot.record_bytes;
    const nn::ShardResult& result = slot.plan->result(static_cast<int>(i));
    new (record) Trailer{leaves[i].rows, result.loss_sum, result.correct,
                         stop_requested_.load(std::memory_order_relaxed) ? 1 : 0};
    if (moments_bytes > 0) {
      std::memcpy(record + sizeof(Trailer), slot.plan->moments(static_cast<int>(i)), moments_bytes);
    }
    if (leaf % options_.accumulate == 0) ++shard_steps_[leaf / options_.accumulate];
  }
}

absl::Status StepLoop::FinishReduce(Slot& slot) {
  // Trailers and moments stay on the device.
  if (runs_ahead()) {
    return parts_.all_reduce->Finish(slot.index, *slot.stream, Deadline(), &slot.left);
  }
  std::fill(slot.record_pointers.begin(), slot.record_pointers.end(), nullptr);
  for (const nn::ShardInput& leaf : slot.leaves) {
    const int local = leaf.shard - slot.first_leaf;
    slot.record_pointers[local] = slot.records.data() + local * slot.record_bytes;
  }
  const auto fold = [&](void* left, const void* right) { MergeRecords(slot, left, right); };
  ASSIGN_OR_RETURN(const void* root,
                   parts_.all_reduce->MergeSmall(slot.index, slot.record_pointers,
                                                 slot.record_bytes, fold, Deadline()));
  slot.trailer = static_cast<const Trailer*>(root);
  return parts_.all_reduce->Finish(slot.index, *slot.stream, Deadline());
}

// Two leaves' trailers and, behind them, moments.
void StepLoop::MergeRecords(const Slot& slot, void* left, const void* right) const {
  auto* a = static_cast<Trailer*>(left);
  const auto* b = static_cast<const Trailer*>(right);
  auto* moments_a = reinterpret_cast<float*>(a + 1);
  const auto* moments_b = reinterpret_cast<const float*>(b + 1);
  for (const nn::MomentsSlice& s : parts_.program->moments()) {
    float* mean = moments_a + s.offset;
    const float* other = moments_b + s.offset;
    parts_.device->MergeMoments(*slot.stream, s.channels, a->rows * s.spatial, mean,
                                mean + s.channels, b->rows * s.spatial, other, other + s.channels,
                                mean, mean + s.channels);
  }
  MergeTrailers(*a, *b);
}

absl::Status StepLoop::Gate(Slot& slot) {
  if (runs_ahead()) {
    slot.gate.leaves = slot.batch.shards.count;
    parts_.device->Gate(*slot.stream, slot.gate, slot.left, parts_.all_reduce->result());
    return absl::OkStatus();
  }
  const int k = parts_.team->slots();
  parts_.norm->Sum(*parts_.device, *slot.stream, slot.index, k, parts_.all_reduce->result());
  RETURN_IF_ERROR(Synchronize(slot));
  std::atomic<uint32_t>& latch = non_finite_[slot.step % 2];
  if (!std::isfinite(slot.trailer->loss_sum) || !parts_.norm->IsFinite(slot.index, k)) latch = 1;
  RETURN_IF_ERROR(Barrier(slot));
  if (slot.index == 0) non_finite_[(slot.step + 1) % 2] = 0;
  return latch == 0 ? absl::OkStatus() : NameNonFinite(slot);
}

void StepLoop::Clip(Slot& slot) {
  if (runs_ahead()) return;  // as the gate did
  slot.gradient_norm = parts_.norm->Value();
  slot.scalars->gradient_scale =
      static_cast<float>(optim::ClipScale(slot.gradient_norm, options_.clip_norm));
  if (options_.clip_norm > 0) ShowScalars(slot);
}

void StepLoop::Optimize(Slot& slot) {
  if (slot.update.has_value()) {
    return parts_.optimizer->Update(*parts_.device, *slot.stream, *slot.update, slot.gated_scalars,
                                    parts_.all_reduce->result(), *parts_.state);
  }
  const int k = parts_.team->slots();
  const int64_t size = parts_.program->parameters().size;
  parts_.optimizer->Update(*parts_.device, *slot.stream, PartBegin(size, k, slot.index),
                           PartBegin(size, k, slot.index + 1), slot.gated_scalars,
                           parts_.all_reduce->result(), *parts_.state);
}

device::Stream& StepLoop::StatisticsStream(Slot& slot) {
  device::Stream* const beside = slot.statistics_count > 0 ? slot.plan->beside() : nullptr;
  return beside != nullptr ? *beside : *slot.stream;
}

// Beside the gate: what waits for that is then short.
void StepLoop::MergeStatistics(Slot& slot) {
  device::Stream& beside = StatisticsStream(slot);
  if (&beside != slot.stream.get()) parts_.device->Follow(beside, *slot.stream);
  parts_.device->MergeStatistics(beside, slot.statistics_count, slot.statistics_slices(),
                                 widest_norm_, slot.batch.shards, slot.plan->device_moments(),
                                 parts_.program->moments_size(), slot.device_record->floats());
}

void StepLoop::UpdateStatisticsAhead(Slot& slot, device::Stream& stream) {
  parts_.device->UpdateStatistics(stream, slot.statistics_count, slot.statistics_slices(),
                                  widest_norm_, slot.batch.shards.total(),
                                  slot.device_record->floats(), slot.gated_scalars,
                                  parts_.state->statistics());
}

void StepLoop::UpdateStatistics(Slot& slot) {
  const std::vector<nn::MomentsSlice>& moments = parts_.program->moments();
  const float* merged = OnDevice(slot, reinterpret_cast<const float*>(slot.trailer + 1));
  float* statistics = parts_.state->statistics();
  for (size_t i = slot.index; i < moments.size(); i += parts_.team->slots()) {
    const nn::MomentsSlice& s = moments[i];
    if (s.population) continue;  // GatherPopulation's
    parts_.device->UpdateRunningAverages(*slot.stream, s.channels, slot.trailer->rows * s.spatial,
                                         merged + s.offset, merged + s.offset + s.channels,
                                         s.momentum, statistics + s.running_mean,
                                         statistics + s.running_var);
  }
}

absl::Status StepLoop::Commit(Slot& slot) {
  if (runs_ahead()) {
    RETURN_IF_ERROR(Collect(slot));
    if (slot.committed < slot.step) return Barrier(slot);  // which an abort ends
  } else {
    parts_.train->Release(slot.step);
    slot.committed = slot.step;
  }
  if (slot.step == options_.flip_bit_at_step && slot.index == 0) {
    uint32_t bits = 0;
    parts_.device->Copy(*slot.stream, parts_.state->parameters(), &bits, sizeof(bits));
    RETURN_IF_ERROR(slot.stream->Synchronize());
    bits ^= 1;
    parts_.device->Copy(*slot.stream, &bits, parts_.state->parameters(), sizeof(bits));
    parts_.state->RoundParameters(*parts_.device, *slot.stream, 0, 1);
  }
  RETURN_IF_ERROR(Barrier(slot));  // all parameters are updated
  parts_.operations->Pack(*slot.stream, *parts_.state, slot.index, parts_.team->slots());
  // Before the digest, which covers what the pass makes of the statistics.
  if (PopulationDue(slot.step)) RETURN_IF_ERROR(GatherPopulation(slot));
  if (DigestDue(slot.step)) {
    return DigestState(slot);  // its barriers also order packing before the next forward
  }
  return Barrier(slot);
}

// Takes what steps on the device have come to, in order, and reports those before the one at hand;
// waits for all of them where that is due, and else for some where too many are unknown.
absl::Status StepLoop::Collect(Slot& slot) {
  int64_t last = slot.step;
  if (StateIsLookedAt(slot)) {
    RETURN_IF_ERROR(Synchronize(slot));
  } else {
    const bool digested = slot.ahead.Of(slot.step).digested = DigestDue(slot.step);
    if (digested && options_.digest_every != 1) {
      slot.digest_table->Enqueue(*parts_.device, *slot.stream, slot.gated_scalars);
    }
    ASSIGN_OR_RETURN(last, slot.ahead.Enqueued(*slot.stream, slot.step, slot.committed));
    if (last == slot.committed) return absl::OkStatus();
    RETURN_IF_ERROR(Settle());  // what a failure has poisoned came to nothing
  }
  while (slot.committed < last) {
    RETURN_IF_ERROR(TakeOutcome(slot, slot.committed + 1));
    if (slot.committed < slot.step) RETURN_IF_ERROR(ReportStep(slot, slot.committed));
  }
  return absl::OkStatus();
}

// Of a step that has run; it is the next one.
absl::Status StepLoop::TakeOutcome(Slot& slot, int64_t step) {
  const device::StepOutcome& outcome = slot.shared->outcomes[step % slot.ring];
  const RunAhead::Step& enqueued = slot.ahead.Of(step);
  if (outcome.step != static_cast<uint64_t>(step)) {
    return absl::InternalError(
        absl::StrCat("step ", step, " has not run; its place has that of ", outcome.step));
  }
  slot.collected = {enqueued.samples, outcome.loss_sum, outcome.correct, enqueued.stop ? 1 : 0};
  slot.trailer = &slot.collected;
  slot.gradient_norm = outcome.gradient_norm;
  for (int shard = slot.first_shard; shard < slot.first_shard + slot.shard_count; ++shard) {
    if (Microbatch(enqueued.samples, shard, 0).count > 0) ++shard_steps_[shard];
  }
  if (outcome.applied == 0) return MakeAgain(slot, step);
  parts_.train->Release(step);
  slot.committed = step;
  if (enqueued.digested) {
    slot.digest_table->Collect(slot.digests, step);
    SumDigests(step);
  }
  return absl::OkStatus();
}

// A step that was not applied: those behind it, which were not either, have replaced its samples
// and its gradient.
absl::Status StepLoop::MakeAgain(Slot& slot, int64_t step) {
  slot.step = step;
  RETURN_IF_ERROR(NextShards(slot));
  RETURN_IF_ERROR(ForwardBackward(slot));
  RETURN_IF_ERROR(Synchronize(slot));
  return NameNonFinite(slot);
}

// Whether more is done with the state after the step at hand than the next step.
bool StepLoop::StateIsLookedAt(Slot& slot) const {
  return EvaluationDue(slot.step) || CheckpointDue(slot.step) ||
         slot.step == options_.flip_bit_at_step || slot.ahead.Of(slot.step).stop;
}

bool StepLoop::IsStopped(const Slot& slot) {
  return slot.trailer != nullptr && slot.trailer->stop != 0;
}

bool StepLoop::DigestDue(int64_t step) const {
  return (options_.digest_every > 0 && step % options_.digest_every == 0) || CheckpointDue(step);
}

bool StepLoop::PopulationDue(int64_t step) const {
  return parts_.population != nullptr && (EvaluationDue(step) || CheckpointDue(step));
}

bool StepLoop::EvaluationDue(int64_t step) const {
  return step == options_.length.total_steps || options_.evaluate_only ||
         Due(options_.evaluate_every_steps, options_.evaluate_every_epochs, options_.length, step);
}

// Replaces the averages of the norms with `statistics: population` by the moments of the whole
// training set under the parameters of now: each leaf's are merged over its batches in their order,
// then leaves by the canonical tree.
absl::Status StepLoop::GatherPopulation(Slot& slot) {
  const absl::Time began = absl::Now();
  RETURN_IF_ERROR(Barrier(slot));  // every part of the weights is packed
  ShowScalars(slot);               // a gate has counted on
  // The exchanges below reuse the trailer's memory, and its moments are used up.
  slot.evaluated = *slot.trailer;
  slot.trailer = &slot.evaluated;
  const size_t moments_bytes = sizeof(float) * parts_.program->moments_size();
  // Of the batch at hand, in the form that MergeRecords takes.
  uint8_t* batch_record = slot.population_record.data();
  const auto record_of = [&](int local) { return slot.records.data() + local * slot.record_bytes; };
  for (int i = 0; i < slot.leaf_count; ++i) new (record_of(i)) Trailer();
  for (int64_t b = 1; b <= options_.length.steps_per_epoch; ++b) {
    const int64_t ticket = ++slot.population_batches;
    ASSIGN_OR_RETURN(const data::Batch* batch, Acquire(slot, *parts_.population, ticket));
    TakeMicrobatches(slot, *batch);
    int begin = 0;
    for (const int end : slot.passes) {
      const auto leaves = absl::MakeConstSpan(slot.leaves).subspan(begin, end - begin);
      ExpectOthers();
      RETURN_IF_ERROR(
          slot.plan->GatherMoments(*slot.stream, *parts_.state, slot.device_scalars, leaves, slot));
      RETURN_IF_ERROR(Synchronize(slot));
      for (size_t i = 0; i < leaves.size(); ++i) {
        uint8_t* record = record_of(leaves[i].shard - slot.first_leaf);
        const bool first = reinterpret_cast<const Trailer*>(record)->rows == 0;
        uint8_t* target = first ? record : batch_record;
        new (target) Trailer{leaves[i].rows, 0, 0, 0};
        std::memcpy(target + sizeof(Trailer), slot.plan->moments(static_cast<int>(i)),
                    moments_bytes);
        if (!first) MergeRecords(slot, record, batch_record);
      }
      begin = end;
    }
    parts_.population->Release(ticket);
  }
  std::fill(slot.record_pointers.begin(), slot.record_pointers.end(), nullptr);
  for (int i = 0; i < slot.leaf_count; ++i) {
    const uint8_t* record = record_of(i);
    if (reinterpret_cast<const Trailer*>(record)->rows > 0) slot.record_pointers[i] = record;
  }
  const auto fold = [&](void* left, const void* right) { MergeRecords(slot, left, right); };
  ASSIGN_OR_RETURN(const void* root,
                   parts_.all_reduce->MergeSmall(slot.index, slot.record_pointers,
                                                 slot.record_bytes, fold, Deadline()));
  const int64_t rows = static_cast<const Trailer*>(root)->rows;
  const float* merged =
      OnDevice(slot, reinterpret_cast<const float*>(static_cast<const Trailer*>(root) + 1));
  const std::vector<nn::MomentsSlice>& moments = parts_.program->moments();
  float* statistics = parts_.state->statistics();
  for (size_t i = slot.index; i < moments.size(); i += parts_.team->slots()) {
    const nn::MomentsSlice& s = moments[i];
    if (!s.population) continue;
    // An average that begins at zero and takes all of the new value is the value.
    const size_t bytes = sizeof(float) * static_cast<size_t>(s.channels);
    parts_.device->Zero(*slot.stream, statistics + s.running_mean, bytes);
    parts_.device->Zero(*slot.stream, statistics + s.running_var, bytes);
    parts_.device->UpdateRunningAverages(*slot.stream, s.channels, rows * s.spatial,
                                         merged + s.offset, merged + s.offset + s.channels,
                                         /*momentum=*/1, statistics + s.running_mean,
                                         statistics + s.running_var);
  }
  slot.step_began += absl::Now() - began;  // no time of training
  return Barrier(slot);
}

absl::Status StepLoop::Report(Slot& slot) {
  const bool known = slot.committed == slot.step;  // else when it is collected
  return slot.index == 0 && known ? ReportStep(slot, slot.step) : absl::OkStatus();
}

absl::Status StepLoop::ReportStep(Slot& slot, int64_t step) {
  const absl::Time now = absl::Now();
  training_time_ += now - slot.step_began;
  slot.step_began = now;
  const Trailer& t = *slot.trailer;
  trained_samples_ += t.rows;
  epoch_.loss_sum += t.loss_sum;
  epoch_.correct += t.correct;
  epoch_.samples += t.rows;
  result_.set_steps(step);
  result_.set_seconds(absl::ToDoubleSeconds(now - started_));
  result_.set_samples_per_second(static_cast<double>(trained_samples_) /
                                 absl::ToDoubleSeconds(training_time_));
  result_.set_epochs(step / options_.length.steps_per_epoch);
  if (options_.length.EndsEpoch(step)) {
    last_epoch_ = epoch_;
    epoch_ = EpochSums();
  }
  SummarizeTraining();
  if (parts_.recorder == nullptr) return absl::OkStatus();
  StepRecord record;
  record.step = step;
  record.epoch = options_.length.EpochOf(step);
  record.loss = t.loss_sum / static_cast<double>(t.rows);
  record.accuracy = static_cast<double>(t.correct) / static_cast<double>(t.rows);
  record.has_accuracy = options_.has_accuracy;
  record.samples = t.rows;
  record.learning_rate = slot.ScalarsOf(step)->learning_rate;
  record.gradient_norm = slot.gradient_norm;
  record.seconds = absl::ToDoubleSeconds(now - started_);
  record.has_digests = digested_step_ == step;
  record.state = state_digest_;
  record.parameters = parameter_digest_;
  parts_.recorder->PushStep(record, record.has_digests ? absl::MakeConstSpan(tensor_digests_)
                                                       : absl::Span<const Digest>());
  return parts_.recorder->status();
}

void StepLoop::SummarizeTraining() {
  const EpochSums& sums = last_epoch_.samples > 0 ? last_epoch_ : epoch_;
  if (sums.samples == 0) return;
  v1::Score& score = *result_.mutable_train();
  score.set_loss(sums.loss_sum / static_cast<double>(sums.samples));
  score.set_samples(sums.samples);
  if (options_.has_accuracy) {
    score.set_accuracy(static_cast<double>(sums.correct) / static_cast<double>(sums.samples));
  }
}

absl::Status StepLoop::Evaluate(Slot& slot) {
  if (!EvaluationDue(slot.step)) return absl::OkStatus();
  const absl::Time began = absl::Now();
  std::fill(slot.shard_loss.begin(), slot.shard_loss.end(), 0.0);
  std::fill(slot.shard_correct.begin(), slot.shard_correct.end(), 0);
  std::fill(slot.shard_rows.begin(), slot.shard_rows.end(), 0);
  for (int64_t b = 1; b <= options_.evaluation.steps_per_epoch; ++b) {
    // The loader counts on through all evaluations, each an "epoch" in index order.
    const int64_t ticket = ++slot.evaluation_batches;
    ASSIGN_OR_RETURN(const data::Batch* batch, Acquire(slot, *parts_.validation, ticket));
    TakeShards(slot, *batch);
    slot.plan->Evaluate(*slot.stream, *parts_.state, slot.shards);
    RETURN_IF_ERROR(slot.stream->Synchronize());
    for (size_t i = 0; i < slot.shards.size(); ++i) {
      const int local = slot.shards[i].shard - slot.first_shard;
      const nn::ShardResult& result = slot.plan->result(static_cast<int>(i));
      slot.shard_loss[local] += result.loss_sum;
      slot.shard_correct[local] += result.correct;
      slot.shard_rows[local] += slot.shards[i].rows;
    }
    parts_.validation->Release(ticket);
  }
  std::fill(slot.record_pointers.begin(), slot.record_pointers.end(), nullptr);
  for (int i = 0; i < slot.shard_count; ++i) {
    if (slot.shard_rows[i] == 0) continue;
    const int leaf = i * options_.accumulate;  // the shard's first stands for it
    uint8_t* record = slot.records.data() + leaf * slot.record_bytes;
    new (record) Trailer{slot.shard_rows[i], slot.shard_loss[i], slot.shard_correct[i], 0};
    slot.record_pointers[leaf] = record;
  }
  const auto fold = [](void* left, const void* right) {
    auto* a = static_cast<Trailer*>(left);
    const auto* b = static_cast<const Trailer*>(right);
    a->rows += b->rows;
    a->loss_sum += b->loss_sum;
    a->correct += b->correct;
  };
  const int64_t stop = slot.trailer != nullptr ? slot.trailer->stop : 0;
  ASSIGN_OR_RETURN(const void* root,
                   parts_.all_reduce->MergeSmall(slot.index, slot.record_pointers, sizeof(Trailer),
                                                 fold, Deadline()));
  const auto* total = static_cast<const Trailer*>(root);
  if (slot.index == 0) {
    v1::Evaluation evaluation;
    evaluation.set_step(slot.step);
    const int64_t per_epoch = options_.length.steps_per_epoch;
    evaluation.set_epoch((slot.step + per_epoch - 1) / per_epoch);
    evaluation.mutable_validation()->set_loss(total->loss_sum / static_cast<double>(total->rows));
    evaluation.mutable_validation()->set_samples(total->rows);
    if (options_.has_accuracy) {
      evaluation.mutable_validation()->set_accuracy(static_cast<double>(total->correct) /
                                                    static_cast<double>(total->rows));
    }
    evaluation.set_seconds(absl::ToDoubleSeconds(absl::Now() - began));
    *result_.mutable_validation() = evaluation.validation();
    evaluation_ = evaluation;
    if (parts_.recorder != nullptr) parts_.recorder->PushEvaluation(evaluation);
  }
  // The root of this merge replaced the step's trailer; what the loop still needs of it is the stop
  // word.
  slot.evaluated = Trailer{total->rows, total->loss_sum, total->correct, stop};
  slot.trailer = &slot.evaluated;
  return absl::OkStatus();
}

bool StepLoop::CheckpointDue(int64_t step) const {
  return step == options_.length.total_steps ||
         Due(options_.checkpoint_every_steps, options_.checkpoint_every_epochs, options_.length,
             step);
}

absl::Status StepLoop::Checkpoint(Slot& slot) {
  if (!CheckpointDue(slot.step)) return absl::OkStatus();
  if (slot.index == 0 && parts_.recorder != nullptr) parts_.recorder->SendSoon();
  RETURN_IF_ERROR(DigestState(slot));
  if (slot.index == 0) checkpoints_->ReplicaDigest(slot.step, state_digest_);
  RETURN_IF_ERROR(CompareReplicas(slot));
  if (slot.index == 0) {
    RETURN_IF_ERROR(checkpoints_->Checkpoint(slot.step, epoch_, last_epoch_, evaluation_,
                                             tensor_digests_, parameter_digest_, state_digest_));
  }
  return Barrier(slot);  // the state may change again
}

// Aborted, which makes it an echo: the coordinator has all digests and names the replica to blame.
absl::Status StepLoop::CompareReplicas(Slot& slot) {
  const std::string mine = ToHex(state_digest_);
  ASSIGN_OR_RETURN(const void* all,
                   parts_.all_reduce->AllGather(slot.index, mine.data(), mine.size(), Deadline()));
  std::vector<absl::string_view> digests;
  for (int m = 0; m < parts_.communicator->size(); ++m) {
    digests.emplace_back(static_cast<const char*>(all) + m * mine.size(), mine.size());
  }
  if (std::all_of(digests.begin(), digests.end(), [&](auto d) { return d == mine; })) {
    return absl::OkStatus();
  }
  return absl::AbortedError(absl::StrCat("step ", slot.step,
                                         ": the replicas differ, so no checkpoint"
                                         " was written; state digests by rank: ",
                                         absl::StrJoin(digests, ", ")));
}

// Collective within the member. The digest is a sum over parts, so slots take disjoint parts.
absl::Status StepLoop::DigestState(Slot& slot) {
  RETURN_IF_ERROR(
      Barrier(slot));  // everybody's updates are done, and everybody has read the last digest
  if (digested_step_ == slot.step) return Barrier(slot);
  if (slot.digest_table != nullptr) {
    slot.digest_table->Enqueue(*parts_.device, *slot.stream);
    RETURN_IF_ERROR(slot.stream->Synchronize());
    slot.digest_table->Collect(slot.digests);
  } else {
    std::fill(slot.digests.begin(), slot.digests.end(), Digest());
    parts_.state->AccumulateDigests(*parts_.device, *slot.stream, slot.index, parts_.team->slots(),
                                    slot.digests);
    RETURN_IF_ERROR(slot.stream->Synchronize());
  }
  RETURN_IF_ERROR(Barrier(slot));
  if (slot.index == 0) SumDigests(slot.step);
  return Barrier(slot);
}

// The digests of the state after `step` from the slots' parts.
void StepLoop::SumDigests(int64_t step) {
  state_digest_ = parameter_digest_ = Digest();
  const auto& named = parts_.state->named();
  for (size_t i = 0; i < named.size(); ++i) {
    Digest sum;
    for (const auto& slot : slots_) sum += slot->digests[i];
    tensor_digests_[i] = sum;
    state_digest_ += sum;
    if (named[i].kind == optim::FlatState::Named::Kind::kParameter) parameter_digest_ += sum;
  }
  digested_step_ = step;
  result_.set_state_digest(ToHex(state_digest_));
  result_.set_parameter_digest(ToHex(parameter_digest_));
}

// Every replica saw the same non-finite sum; each looks for the first tensor that is to blame among
// its own shards, and the earliest in execution order of all is named.
absl::Status StepLoop::NameNonFinite(Slot& slot) {
  ShowScalars(slot);  // a gate has counted on
  // The exchanges below reuse the trailer's memory.
  const double loss = slot.trailer->loss_sum / static_cast<double>(slot.trailer->rows);
  std::vector<std::string> order;
  for (const optim::TensorView& t : parts_.program->parameters().tensors) order.push_back(t.name);
  for (size_t i = 0; i < parts_.program->nodes().size(); ++i) {
    order.push_back(parts_.program->node_name(static_cast<int>(i)));
  }
  slot.blamed = static_cast<int64_t>(order.size());
  int begin = 0;
  for (const int end : slot.passes) {
    const auto leaves = absl::MakeConstSpan(slot.leaves).subspan(begin, end - begin);
    ExpectOthers();
    ASSIGN_OR_RETURN(
        const std::string found,
        slot.plan->FindNonFinite(*slot.stream, *parts_.state, slot.device_scalars, leaves, slot));
    slot.blamed = std::min<int64_t>(slot.blamed,
                                    std::find(order.begin(), order.end(), found) - order.begin());
    begin = end;
  }
  RETURN_IF_ERROR(Synchronize(slot));
  RETURN_IF_ERROR(Barrier(slot));
  int64_t first = static_cast<int64_t>(order.size());
  for (const auto& other : slots_) first = std::min(first, other->blamed);
  ASSIGN_OR_RETURN(const void* all,
                   parts_.all_reduce->AllGather(slot.index, &first, sizeof(first), Deadline()));
  for (int m = 0; m < parts_.communicator->size(); ++m) {
    first = std::min(first, static_cast<const int64_t*>(all)[m]);
  }
  std::string name = "the loss";
  if (first < static_cast<int64_t>(order.size())) {
    name = order[first];
  } else {
    for (const optim::TensorView& t : parts_.program->parameters().tensors) {
      uint32_t& flag = slot.shared->non_finite = 0;
      parts_.device->FlagNonFinite(*slot.stream, t.size, parts_.all_reduce->result() + t.offset,
                                   &flag);
      RETURN_IF_ERROR(slot.stream->Synchronize());
      if (flag != 0) {
        name = absl::StrCat("the gradient of ", t.name);
        break;
      }
    }
  }
  return absl::OutOfRangeError(
      absl::StrCat("step ", slot.step, ": the ",
                   std::isfinite(loss) ? "gradient" : absl::StrCat("loss (", loss, ")"),
                   " is not finite; the first tensor that is not finite is ", name,
                   "; the step was not applied. Try a smaller optimizer.learning_rate"));
}

// What a slot has done before it is there for all of them behind it.
absl::Status StepLoop::Barrier(const Slot& slot) {
  const bool asynchronous = !parts_.device->host_addressable();
  if (asynchronous && parts_.team->slots() > 1) RETURN_IF_ERROR(slot.stream->Synchronize());
  return parts_.team->Barrier(slot.index, Deadline());
}

// The same on all members.
bool StepLoop::CanRunAhead() const {
  if (parts_.device->host_addressable() || options_.accumulate > 1 ||
      options_.shards > device::kMostLeaves || parts_.team->slots() > 1) {
    return false;
  }
  return members() == 1 ||
         (parts_.communicator->on_device() &&
          std::all_of(options_.members.begin(), options_.members.end(),
                      [](const std::vector<int>& slots) { return slots.size() == 2; }));
}

void StepLoop::ExpectOthers() {
  if (members() > 1) parts_.communicator->Expect(Deadline());
}
absl::Status StepLoop::Settle() {
  return members() > 1 ? parts_.communicator->Settle() : absl::OkStatus();
}
absl::Status StepLoop::Synchronize(Slot& slot) {
  RETURN_IF_ERROR(slot.stream->Synchronize());
  return Settle();
}

// Whether the step at hand is the last. Where the host runs ahead it does not see the trailer in
// time, so that members ask each other, and how many steps their devices take.
absl::StatusOr<bool> StepLoop::AgreeToStop(Slot& slot) {
  const RunAhead::Word mine = {stop_requested_, static_cast<uint8_t>(slot.plan->most_ahead())};
  if (!runs_ahead()) return mine.stop != 0;
  if (members() == 1) return slot.ahead.Agree({&mine, 1});
  if (slot.step % RunAhead::kAsksEvery != 0) return false;
  ASSIGN_OR_RETURN(const void* all,
                   parts_.all_reduce->AllGather(slot.index, &mine, sizeof(mine), Deadline()));
  return slot.ahead.Agree(absl::MakeConstSpan(static_cast<const RunAhead::Word*>(all), members()));
}

// The step's scalars as they are now, to the kernels behind this.
void StepLoop::ShowScalars(Slot& slot) {
  if (slot.device_scalars == slot.scalars) return;
  // Forward and backward read the step's number alone, and the gate counts it.
  if (runs_ahead() && slot.device_step == slot.step) return;
  slot.device_step = slot.step;
  const device::StepScalars now = *slot.scalars;
  parts_.device->Copy(*slot.stream, &now, slot.device_scalars, sizeof(now));
}

// A merged moments record where kernels can read it, until the next.
const float* StepLoop::OnDevice(Slot& slot, const float* record) {
  if (slot.device_record == nullptr) return record;
  parts_.device->Copy(*slot.stream, record, slot.device_record->data(),
                      sizeof(float) * static_cast<size_t>(parts_.program->moments_size()));
  return slot.device_record->floats();
}

void StepLoop::Abort(const absl::Status& cause) {
  parts_.train->Stop();
  parts_.validation->Stop();
  if (parts_.population != nullptr) parts_.population->Stop();
  parts_.team->Abort(cause);
  parts_.communicator->Abort(cause);
}

}  // namespace lockstep::train
