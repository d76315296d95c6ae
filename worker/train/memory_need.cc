#include "worker/train/memory_need.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/status_macros.h"
#include "worker/collective/communicator.h"
#include "worker/collective/tree.h"
#include "worker/data/sampler.h"
#include "worker/nn/plan.h"

namespace lockstep::train {
namespace {

constexpr int64_t kFloat = sizeof(float);
// What an allocator loses between and at the ends of allocations, and CUDA graphs take.
constexpr int64_t kSlack = int64_t{32} << 20;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int MostShards(const JobCut& cut) {
  int most = 0;
  for (size_t i = 0; i + 1 < cut.bounds.size(); ++i) {
    most = std::max(most, cut.bounds[i + 1] - cut.bounds[i]);
  }
  return most;
}

// Rows of all the member's shards of a full batch.
int64_t LoadedRows(int64_t batch, const JobCut& cut) {
  int64_t rows = 0;
  for (int shard = cut.bounds.front(); shard < cut.bounds.back(); ++shard) {
    rows += data::RangeOfShard(batch, cut.shards, batch, shard).count;
  }
  return rows;
}

// Evenly over `slots` slots, those of the first member.
void PlaceEvenly(int slots, int own, JobCut* cut) {
  const int most = static_cast<int>(CeilDiv(cut->shards, slots));
  cut->bounds = {0};
  for (int slot = 0; slot < own; ++slot) {
    cut->bounds.push_back(std::min(cut->shards, cut->bounds.back() + most));
  }
}

bool Fits(const JobCut& cut, const MemoryFacts& facts, int64_t free) {
  const absl::StatusOr<MemoryNeed> need = NeedOf(cut, facts);
  return need.ok() && need->total + kSlack <= free;
}

// The largest multiple of `unit` from `least`, which is one, to below `now` that fits; 0: none.
template <class Try>
int64_t Largest(int64_t unit, int64_t least, int64_t now, Try fits) {
  const int64_t none = least / unit - 1;
  int64_t low = none, high = CeilDiv(now, unit);  // low fits or is none, high does not or is now
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle * unit) ? low : high) = middle;
  }
  return low == none ? 0 : low * unit;
}

// "1 shard", "8 shards".
std::string Count(int64_t count, const char* noun) {
  return absl::StrCat(count, " ", noun, count == 1 ? "" : "s");
}

}  // namespace

std::string SizeText(int64_t bytes) {
  const double mib = static_cast<double>(bytes) / (1 << 20);
  return mib < 1000 ? absl::StrFormat("%.1f MiB", mib) : absl::StrFormat("%.2f GiB", mib / 1024);
}

Rows RowsOf(const JobCut& cut, int64_t samples, int64_t evaluation_samples) {
  const data::BatchCut batch{cut.batch, cut.shards, cut.accumulate};
  Rows rows;
  rows.all = data::RowCounts(samples, batch, cut.bounds.front(), cut.bounds.back());
  rows.probe = data::RangeOfMicrobatch(batch, cut.batch, cut.shards - 1, 0).count;
  rows.all.push_back(rows.probe);
  rows.training = *std::max_element(rows.all.begin(), rows.all.end());
  const std::vector<int64_t> evaluation =
      data::RowCounts(evaluation_samples, {cut.evaluation_batch, cut.shards}, cut.bounds.front(),
                      cut.bounds.back());
  if (!evaluation.empty()) rows.evaluation = evaluation.back();
  rows.all.insert(rows.all.end(), evaluation.begin(), evaluation.end());
  std::sort(rows.all.begin(), rows.all.end());
  rows.all.erase(std::unique(rows.all.begin(), rows.all.end()), rows.all.end());
  return rows;
}

absl::StatusOr<MemoryNeed> NeedOf(const JobCut& cut, const MemoryFacts& facts) {
  const nn::Program& program = *facts.program;
  const Rows rows = RowsOf(cut, facts.samples, facts.evaluation_samples);
  ASSIGN_OR_RETURN(const int64_t scratch, facts.scratch(rows.all, MostShards(cut)));
  const int64_t evaluation_rows = rows.evaluation == 0 ? rows.training : rows.evaluation;
  const int64_t record = kFloat * program.moments_size();
  const auto activations = [&](int shards, int together, int64_t training, int64_t evaluation) {
    const int64_t inference =
        nn::PlannedActivationBytes(program, shards, evaluation, /*training=*/false, true);
    if (!facts.training) return inference;
    return std::max(inference, nn::PlannedActivationBytes(program, together, training, true, true));
  };

  MemoryNeed need;
  const auto add = [&need](std::string what, int64_t bytes) {
    need.parts.push_back({std::move(what), bytes});
    need.total += bytes;
  };
  const bool passes = cut.accumulate > 1 && !program.has_synchronized_norm();
  for (int slot = 0; slot < facts.slots; ++slot) {
    const int shards = cut.bounds[slot + 1] - cut.bounds[slot];
    const int together = passes ? std::min(shards, 1) : shards;
    add(absl::StrCat("the plan of slot ", slot, ": activations of ", Count(shards, "shard"), " (",
                     Count(together * rows.training, "sample"), " at once)"),
        activations(shards, together, rows.training, evaluation_rows));
    // Over NCCL a plan has the records of all of the job's shards.
    const int records = facts.exchanges_on_gpu ? 2 * cut.shards : shards;
    // Gradients of weights are computed beside the rest, on a stream and a scratch of their own.
    const int64_t beside = facts.training ? scratch + facts.stream_bytes : 0;
    add(absl::StrCat("the plan of slot ", slot, ": scratch"),
        scratch + beside + record * (records + 1));
  }
  const int64_t vector = kFloat * program.parameters().size;
  // Which products in bf16 read.
  const int64_t rounded = program.precision() == device::Precision::kBf16 ? vector / 2 : 0;
  add("parameters and the optimizer's state",
      vector * (1 + facts.optimizer_vectors) + rounded + kFloat * program.statistics().size);

  // Either of these is there at a time: what the loop has, and the probe's.
  const int shards_here = cut.bounds.back() - cut.bounds.front();
  const int leaves = shards_here * cut.accumulate;
  int64_t gradients = vector * (leaves + 1);
  if (facts.members > 1) {
    const int all = cut.shards * cut.accumulate;
    const auto parts =
        static_cast<int64_t>(collective::MaximalSubtrees(all, 0, std::min(all, leaves)).size());
    // A chunk of every member's parts; over NCCL our own parts and the sum too, of which the hosts
    // have memory otherwise.
    gradients += vector * parts;
    if (facts.exchanges_on_gpu) gradients += vector * (parts + 1);
  }
  const int64_t row = kFloat * spec::ElementCount(program.graph().data_shape) +
                      static_cast<int64_t>(sizeof(int32_t));
  const int loaders = program.has_population_norm() && facts.training ? 2 : 1;
  const int64_t loaded =
      LoadedRows(cut.evaluation_batch, cut) + loaders * LoadedRows(cut.batch, cut);
  // Of training, the next batch's are decoded while a step computes.
  const bool ahead = facts.training && cut.accumulate == 1;
  const int64_t samples = (loaded + (ahead ? LoadedRows(cut.batch, cut) : 0)) * row;
  need.staging = 2 * loaded * facts.sample_bytes;
  const int64_t workspaces =
      (facts.slots + 1 + (facts.exchanges_on_gpu ? 1 : 0)) * facts.stream_bytes;
  const int64_t probe = facts.stream_bytes + 2 * vector + rounded +
                        kFloat * program.statistics().size +
                        activations(1, 1, rows.probe, rows.probe) + scratch + 2 * record;
  need.behind_data = samples + workspaces;
  if (probe > gradients + samples + workspaces) {
    add("the probe of one shard", probe);
  } else {
    add(absl::StrCat("gradients of ", Count(leaves, cut.accumulate > 1 ? "leaf" : "shard")),
        gradients);
    add("the batches' samples", samples);
    add("workspaces", workspaces);
  }
  std::stable_sort(need.parts.begin(), need.parts.end(),
                   [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  return need;
}

std::string WhatFits(const JobCut& cut, const MemoryFacts& facts, int64_t free) {
  std::vector<std::string> found;
  const auto with = [&](auto change) {
    JobCut other = cut;
    change(other);
    return other;
  };
  // Both batches where evaluation's alone is too large.
  for (const bool evaluation_too : {false, true}) {
    const auto smaller = [&](int64_t batch) {
      return with([&](JobCut& c) {
        c.batch = batch;
        if (evaluation_too) c.evaluation_batch = std::min(c.evaluation_batch, batch);
      });
    };
    const int64_t unit = int64_t{cut.shards} * cut.accumulate;
    const int64_t batch =
        Largest(unit, unit, cut.batch, [&](int64_t b) { return Fits(smaller(b), facts, free); });
    if (batch == 0) continue;
    found.push_back(absl::StrCat("train.batch=", batch, " (now ", cut.batch, ")"));
    if (evaluation_too && cut.evaluation_batch > batch) {
      absl::StrAppend(&found.back(), " with train.evaluate.batch=", batch, " (now ",
                      cut.evaluation_batch, ")");
    }
    break;
  }
  for (int64_t a = cut.accumulate + 1; a <= std::min<int64_t>(64, cut.batch / cut.shards); ++a) {
    const JobCut other = with([&](JobCut& c) { c.accumulate = static_cast<int>(a); });
    if (!Fits(other, facts, free)) continue;
    found.push_back(absl::StrCat("train.accumulate=", a, " (now ", cut.accumulate, ")"));
    break;
  }
  const int all_slots = facts.slots * facts.members;
  const auto with_shards = [&](int64_t shards) {
    return with([&](JobCut& c) {
      c.shards = static_cast<int>(shards);
      PlaceEvenly(all_slots, facts.slots, &c);
    });
  };
  const int64_t shards = Largest(1, all_slots, cut.shards,
                                 [&](int64_t s) { return Fits(with_shards(s), facts, free); });
  if (shards > 0) {
    found.push_back(absl::StrCat("train.shards=", shards, " (now ", cut.shards, ")"));
  }
  for (int gpus = facts.members + 1; gpus <= cut.shards; ++gpus) {
    MemoryFacts more = facts;
    more.members = gpus;
    more.slots = 1;
    more.exchanges_on_gpu = true;
    if (!Fits(with([&](JobCut& c) { PlaceEvenly(gpus, 1, &c); }), more, free)) continue;
    found.push_back(absl::StrCat(gpus, " workers with a GPU each"));
    break;
  }
  std::string text;
  for (size_t i = 0; i < found.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : i + 1 < found.size() ? ", " : ", or ", found[i]);
  }
  return text;
}

}  // namespace lockstep::train
