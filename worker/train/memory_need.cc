#include "worker/train/memory_need.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/status_macros.h"
#include "worker/collective/all_reduce.h"
#include "worker/data/sampler.h"
#include "worker/nn/plan.h"

namespace lockstep::train {
namespace {

constexpr int64_t kFloat = sizeof(float);

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int MostShards(const std::vector<int>& bounds) {
  int most = 0;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) most = std::max(most, bounds[i + 1] - bounds[i]);
  return most;
}

// Rows of all the member's shards of a full batch.
int64_t LoadedRows(int64_t batch, const JobCut& cut) {
  int64_t rows = 0;
  for (int shard = cut.bounds().front(); shard < cut.bounds().back(); ++shard) {
    rows += data::RangeOfShard(batch, cut.shards, batch, shard).count;
  }
  return rows;
}

// Of the largest batch of `samples`, those of shards [begin, end) that are computed with at once:
// a microbatch of every shard, or of one.
int64_t SamplesAtOnce(const data::BatchCut& batch, int64_t samples, int begin, int end, bool one) {
  int64_t sum = 0, most = 0;
  for (int shard = begin; shard < end; ++shard) {
    const int64_t rows =
        data::RangeOfMicrobatch(batch, std::min(batch.batch, samples), shard, 0).count;
    sum += rows;
    most = std::max(most, rows);
  }
  return one ? most : sum;
}

// As the coordinator places shards: evenly over all slots, each member having as many as in
// `slots`.
void PlaceEvenly(const std::vector<int>& slots, JobCut* cut) {
  int64_t all = 0, slot = 0;
  for (const int count : slots) all += count;
  cut->members.clear();
  for (const int count : slots) {
    std::vector<int>& bounds = cut->members.emplace_back();
    for (int i = 0; i <= count; ++i) {
      bounds.push_back(static_cast<int>((slot + i) * cut->shards / all));
    }
    slot += count;
  }
}

// Every member into as much.
bool Fits(JobCut cut, const MemoryFacts& facts, int64_t free) {
  for (cut.rank = 0; cut.rank < std::ssize(cut.members); ++cut.rank) {
    const absl::StatusOr<MemoryNeed> need = NeedWithin(cut, facts, free);
    if (!need.ok() || need->total > free) return false;
  }
  return true;
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
  rows.all = data::RowCounts(samples, batch, cut.bounds().front(), cut.bounds().back());
  rows.probe = data::RangeOfMicrobatch(batch, cut.batch, cut.shards - 1, 0).count;
  rows.all.push_back(rows.probe);
  rows.training = *std::max_element(rows.all.begin(), rows.all.end());
  const std::vector<int64_t> evaluation =
      data::RowCounts(evaluation_samples, {cut.evaluation_batch, cut.shards}, cut.bounds().front(),
                      cut.bounds().back());
  if (!evaluation.empty()) rows.evaluation = evaluation.back();
  rows.all.insert(rows.all.end(), evaluation.begin(), evaluation.end());
  std::sort(rows.all.begin(), rows.all.end());
  rows.all.erase(std::unique(rows.all.begin(), rows.all.end()), rows.all.end());
  return rows;
}

absl::StatusOr<MemoryNeed> NeedOf(const JobCut& cut, const MemoryFacts& facts, bool staged) {
  const nn::Program& program = *facts.program;
  const std::vector<int>& bounds = cut.bounds();
  const int slots = static_cast<int>(bounds.size()) - 1;
  const Rows rows = RowsOf(cut, facts.samples, facts.evaluation_samples);
  ASSIGN_OR_RETURN(const int64_t scratch, facts.scratch(rows.all, MostShards(bounds)));
  const int64_t evaluation_rows = rows.evaluation == 0 ? rows.training : rows.evaluation;
  const int64_t record = kFloat * program.moments_size();
  const auto inference = [&](int shards, int64_t most) {
    return nn::PlannedActivationBytes(program, shards, most, /*training=*/false, true);
  };
  const auto training = [&](int shards, int64_t most) {
    return facts.training ? nn::PlannedActivationBytes(program, shards, most, true, true) : 0;
  };

  MemoryNeed need;
  const auto add = [&need](std::string what, int64_t bytes) {
    need.parts.push_back({std::move(what), bytes});
    need.total += bytes;
  };
  const bool passes = cut.accumulate > 1 && !program.has_synchronized_norm();
  for (int slot = 0; slot < slots; ++slot) {
    const int begin = bounds[slot], end = bounds[slot + 1], shards = end - begin;
    const int64_t of_evaluation = inference(shards, evaluation_rows);
    const int64_t of_training = training(passes ? std::min(shards, 1) : shards, rows.training);
    // They share memory.
    const bool evaluating = of_evaluation > of_training;
    const int64_t together = evaluating ? SamplesAtOnce({cut.evaluation_batch, cut.shards},
                                                        facts.evaluation_samples, begin, end, false)
                                        : SamplesAtOnce({cut.batch, cut.shards, cut.accumulate},
                                                        facts.samples, begin, end, passes);
    add(absl::StrCat("the plan of slot ", slot, ": activations of ",
                     evaluating ? "evaluation, " : "", Count(shards, "shard"), " (",
                     Count(together, "sample"), " at once)"),
        std::max(of_training, of_evaluation));
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
  add("the stream that the state is made and copied on", facts.stream_bytes);

  // Either of these is there at a time: what the loop has, and the probe's.
  const int leaves = (bounds.back() - bounds.front()) * cut.accumulate;
  int64_t gradients = vector * (leaves + 1);
  if (cut.members.size() > 1) {
    collective::Placement placement;
    placement.leaves = cut.shards * cut.accumulate;
    placement.bounds = cut.members;
    for (std::vector<int>& of_member : placement.bounds) {
      for (int& bound : of_member) bound *= cut.accumulate;
    }
    // What others are sent is in memory of the hosts, except over NCCL; what they send is here.
    using collective::CanonicalAllReduce;
    const int64_t size = program.parameters().size;
    const int apart = facts.exchanges_on_gpu ? cut.rank : -1;
    gradients += static_cast<int64_t>(CanonicalAllReduce::StagingBytes(placement, apart, size));
    if (facts.exchanges_on_gpu) {
      gradients += static_cast<int64_t>(CanonicalAllReduce::SharedBytes(placement, size, false));
    }
  }
  const int64_t row = kFloat * spec::ElementCount(program.graph().data_shape) +
                      static_cast<int64_t>(sizeof(int32_t));
  const int loaders = program.has_population_norm() && facts.training ? 2 : 1;
  const int64_t loaded =
      LoadedRows(cut.evaluation_batch, cut) + loaders * LoadedRows(cut.batch, cut);
  // Of training, the next batch's are decoded while a step computes.
  const bool ahead = facts.training && cut.accumulate == 1;
  const int64_t samples = (loaded + (ahead ? LoadedRows(cut.batch, cut) : 0)) * row;
  need.staging = 2 * loaded * (facts.data_bytes / std::max<int64_t>(facts.samples, 1));
  const int64_t workspaces = (slots + 1 + (facts.exchanges_on_gpu ? 1 : 0)) * facts.stream_bytes;
  const int64_t probe =
      facts.stream_bytes + 2 * vector + rounded + kFloat * program.statistics().size +
      std::max(inference(1, rows.probe), training(1, rows.probe)) + scratch + 2 * record;
  need.behind_data = samples + workspaces;
  const int64_t staging = staged ? need.staging : 0;
  need.stepping = need.total + gradients + samples + staging + workspaces;
  if (need.total + probe > need.stepping) {
    add("the probe of one shard", probe);
  } else {
    add(absl::StrCat("gradients of ", Count(leaves, cut.accumulate > 1 ? "leaf" : "shard")),
        gradients);
    add("the batches' samples", samples + staging);
    add("workspaces", workspaces);
  }
  std::stable_sort(need.parts.begin(), need.parts.end(),
                   [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  return need;
}

absl::StatusOr<MemoryNeed> NeedWithin(const JobCut& cut, const MemoryFacts& facts, int64_t free) {
  ASSIGN_OR_RETURN(MemoryNeed need, NeedOf(cut, facts, /*staged=*/false));
  // Device::MakeResident copies no more than a quarter of what is left.
  if (4 * facts.data_bytes <= free - need.stepping - need.staging) return need;
  return NeedOf(cut, facts, /*staged=*/true);
}

std::string WhatFits(const JobCut& cut, const MemoryFacts& all_facts, int64_t free) {
  // What is asked again and again, of every member and cut.
  std::map<std::pair<std::vector<int64_t>, int>, absl::StatusOr<int64_t>> asked;
  MemoryFacts facts = all_facts;
  facts.scratch = [&](const std::vector<int64_t>& rows, int shards) -> absl::StatusOr<int64_t> {
    const auto found = asked.find({rows, shards});
    if (found != asked.end()) return found->second;
    return asked.emplace(std::pair(rows, shards), all_facts.scratch(rows, shards)).first->second;
  };
  MemoryFacts apart = facts;
  apart.exchanges_on_gpu = true;

  std::vector<std::string> found;
  const auto with = [&](auto change) {
    JobCut other = cut;
    change(other);
    return other;
  };
  const int64_t evaluation_batch =
      Largest(cut.shards, cut.shards, cut.evaluation_batch, [&](int64_t b) {
        return Fits(with([&](JobCut& c) { c.evaluation_batch = b; }), facts, free);
      });
  if (evaluation_batch > 0) {
    found.push_back(absl::StrCat("train.evaluate.batch=", evaluation_batch, " (now ",
                                 cut.evaluation_batch, ")"));
  }
  const int64_t unit = int64_t{cut.shards} * cut.accumulate;
  // Evaluation's batch too, but where that alone is enough.
  const auto with_batch = [&](JobCut c, int64_t batch, bool evaluation_too) {
    c.batch = batch;
    if (evaluation_too) c.evaluation_batch = std::min(c.evaluation_batch, batch);
    return c;
  };
  const auto batch_text = [&](int64_t batch, bool evaluation_too) {
    std::string text = absl::StrCat("train.batch=", batch, " (now ", cut.batch, ")");
    if (evaluation_too && cut.evaluation_batch > batch) {
      absl::StrAppend(&text, " with train.evaluate.batch=", batch, " (now ", cut.evaluation_batch,
                      ")");
    }
    return text;
  };
  for (const bool evaluation_too : {false, true}) {
    if (evaluation_too && evaluation_batch > 0) break;
    const int64_t batch = Largest(unit, unit, cut.batch, [&](int64_t b) {
      return Fits(with_batch(cut, b, evaluation_too), facts, free);
    });
    if (batch == 0) continue;
    found.push_back(batch_text(batch, evaluation_too));
    break;
  }
  for (int64_t a = cut.accumulate + 1; a <= std::min<int64_t>(64, cut.batch / cut.shards); ++a) {
    const JobCut other = with([&](JobCut& c) { c.accumulate = static_cast<int>(a); });
    if (!Fits(other, facts, free)) continue;
    found.push_back(absl::StrCat("train.accumulate=", a, " (now ", cut.accumulate, ")"));
    break;
  }
  std::vector<int> slots;  // of each member
  int all_slots = 0;
  for (const std::vector<int>& bounds : cut.members) {
    slots.push_back(static_cast<int>(bounds.size()) - 1);
    all_slots += slots.back();
  }
  const auto with_shards = [&](int64_t shards) {
    return with([&](JobCut& c) {
      c.shards = static_cast<int>(shards);
      PlaceEvenly(slots, &c);
    });
  };
  const int64_t shards = Largest(1, all_slots, cut.shards,
                                 [&](int64_t s) { return Fits(with_shards(s), facts, free); });
  if (shards > 0) {
    found.push_back(absl::StrCat("train.shards=", shards, " (now ", cut.shards, ")"));
  }
  const auto with_gpus = [&](int gpus) {
    return with([&](JobCut& c) { PlaceEvenly(std::vector<int>(gpus, 1), &c); });
  };
  const int now = static_cast<int>(cut.members.size());
  for (int gpus = now + 1; gpus <= cut.shards; ++gpus) {
    if (!Fits(with_gpus(gpus), apart, free)) continue;
    found.push_back(absl::StrCat(gpus, " workers with a GPU each"));
    break;
  }
  for (int gpus = now + 1; found.empty() && gpus <= cut.shards; ++gpus) {
    const int64_t batch = Largest(unit, unit, cut.batch, [&](int64_t b) {
      return Fits(with_batch(with_gpus(gpus), b, true), apart, free);
    });
    if (batch == 0) continue;
    found.push_back(absl::StrCat(gpus, " workers with a GPU each and ", batch_text(batch, true)));
  }
  std::string text;
  for (size_t i = 0; i < found.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : i + 1 < found.size() ? ", " : ", or ", found[i]);
  }
  return text;
}

}  // namespace lockstep::train
