#include "worker/train/step_loop.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"
#include "worker/train/step_slot.h"

namespace lockstep::train {
namespace {

// The part of [0, n) that slot `i` of `k` works on, cut at cache lines.
int64_t PartBegin(int64_t n, int k, int i) { return collective::ChunkBegin(n, k, i); }

void MergeTrailers(Trailer& left, const Trailer& right) {
  left.rows += right.rows;
  left.loss_sum += right.loss_sum;
  left.correct += right.correct;
  left.stop |= right.stop;
}

}  // namespace

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
