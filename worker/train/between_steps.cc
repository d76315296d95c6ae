// What the step loop does between steps: populations' statistics, evaluation, checkpoints and the
// digests that they want; and, where a step cannot be applied, why.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"
#include "worker/train/step_loop.h"
#include "worker/train/step_slot.h"

namespace lockstep::train {

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

bool StepLoop::CheckpointDue(int64_t step) const {
  return step == options_.length.total_steps ||
         Due(options_.checkpoint_every_steps, options_.checkpoint_every_epochs, options_.length,
             step);
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

}  // namespace lockstep::train
