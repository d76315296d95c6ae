// Runs a Program through real Plans on the CPU device for tests: shards split over slots (a thread
// each) as the test says, leaf gradients kept apart, batch-norm exchanges folded by the canonical
// tree. Shared by tests/nn and tests/numerics.
#pragma once

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/philox.h"
#include "worker/device/cpu/cpu_device.h"
#include "worker/nn/plan.h"
#include "worker/optim/optimizer.h"

namespace lockstep::nn {

// The CPU device of the test program; a test that cannot have one fails by exception.
inline device::Device& TestDevice() {
  static device::Device* device = device::MakeCpuDevice().value().release();
  return *device;
}

// DESIGN.md: of a full batch the first `batch mod shards` shards have ceil(batch / shards) samples,
// the others floor; a short batch of `size` fills the same shards in order.
inline std::vector<int64_t> ShardRows(int64_t batch, int shards, int64_t size) {
  std::vector<int64_t> rows;
  for (int i = 0; i < shards; ++i) {
    const int64_t capacity = batch / shards + (i < batch % shards ? 1 : 0);
    rows.push_back(std::min(capacity, size));
    size -= rows.back();
  }
  return rows;
}

// The canonical tree over [begin, end): splits at the largest power of two below its size;
// `present` leaves only. combine(left leaf, right leaf) folds into the left. Returns the leaf that
// holds it, or -1.
inline int FoldTree(int begin, int end, const std::function<bool(int)>& present,
                    const std::function<void(int, int)>& combine) {
  if (end - begin == 1) return present(begin) ? begin : -1;
  int half = 1;
  while (half * 2 < end - begin) half *= 2;
  const int left = FoldTree(begin, begin + half, present, combine);
  const int right = FoldTree(begin + half, end, present, combine);
  if (left < 0 || right < 0) return left < 0 ? right : left;
  combine(left, right);
  return left;
}

struct SampleBatch {
  std::vector<float> data;      // {size, data shape}
  std::vector<int32_t> labels;  // {size}
  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

// Pixels uniform on [-1, 1), whole numbers from 0 to 2 where an embedding reads them; labels
// uniform.
inline SampleBatch RandomBatch(const spec::Graph& graph, int64_t size, uint64_t seed) {
  SampleBatch batch;
  const PhiloxKey data = MakePhiloxKey(seed, "data"), labels = MakePhiloxKey(seed, "labels");
  bool positions = false;
  for (const spec::Layer& layer : graph.layers) {
    positions |= layer.type == spec::LayerType::kEmbedding;
  }
  for (int64_t i = 0; i < size * spec::ElementCount(graph.data_shape); ++i) {
    const uint32_t word = PhiloxAt(data, i, 0);
    batch.data.push_back(positions ? static_cast<float>(word % 3) : 2 * ToUniform(word) - 1);
  }
  for (int64_t i = 0; i < size; ++i) {
    batch.labels.push_back(static_cast<int32_t>(PhiloxAt(labels, i, 0) % graph.classes));
  }
  return batch;
}

class PlanRunner {
 public:
  struct Options {
    int shards = 1;
    int64_t batch = 1;        // of a full batch
    std::vector<int> bounds;  // slot i has shards [bounds[i], bounds[i+1]); empty: one slot
    uint64_t seed = 5;
    device::OptimizerCoefficients optimizer;
    // Leaves stay where they are, and what is announced is taken away, with NaN in its place.
    bool takes_leaves = false;
  };
  struct Outcome {
    std::vector<int64_t> rows;               // by shard, as all below
    std::vector<std::vector<float>> leaves;  // poisoned with NaN before they are written
    std::vector<std::vector<std::pair<int64_t, int64_t>>> done;  // in the order announced
    std::vector<ShardResult> results;
    std::vector<std::vector<float>> moments;
  };

  PlanRunner(const spec::Graph& graph, Options options)
      : options_(std::move(options)),
        device_(TestDevice()),
        program_(Program::Compile(graph).value()),
        optimizer_(options_.optimizer, program_->parameters()) {
    if (options_.bounds.empty()) options_.bounds = {0, options_.shards};
    state_ = optim::FlatState::Make(device_, program_->parameters(), program_->statistics(),
                                    options_.optimizer.type)
                 .value();
    optim::Initialize(program_->parameters(), options_.seed, state_->parameters());
    optim::Initialize(program_->statistics(), options_.seed, state_->statistics());
    std::vector<int64_t> rows;
    const int64_t most = ShardRows(options_.batch, options_.shards, options_.batch)[0];
    for (int64_t r = 1; r <= most; ++r) rows.push_back(r);
    operations_ = Operations::Make(program_, device_, rows, options_.shards).value();
    for (size_t i = 0; i + 1 < options_.bounds.size(); ++i) {
      slots_.push_back(std::make_unique<Slot>(this));
      Slot& slot = *slots_.back();
      Plan::Options plan;
      for (int s = options_.bounds[i]; s < options_.bounds[i + 1]; ++s) plan.shards.push_back(s);
      plan.max_rows = most;
      plan.seed = options_.seed;
      slot.plan = Plan::Make(program_, device_, *operations_, plan).value();
      slot.stream = device_.MakeStream().value();
    }
    staged_.resize(options_.shards);
    staged_rows_.resize(options_.shards);
    Pack();
  }

  const Program& program() const { return *program_; }
  optim::FlatState& state() { return *state_; }
  Plan& plan(int slot) { return *slots_[slot]->plan; }
  device::Stream& stream() { return *slots_[0]->stream; }
  // After every change of parameters.
  void Pack() { operations_->Pack(stream(), *state_, 0, 1); }

  Outcome TrainStep(const SampleBatch& batch, int64_t step) {
    scalars_.step = static_cast<uint64_t>(step);
    return Run(batch, [&](Slot& slot) {
      return slot.plan->TrainStep(*slot.stream, *state_, &scalars_, batch.size(), slot.shards, slot,
                                  slot);
    });
  }
  Outcome Evaluate(const SampleBatch& batch) {
    return Run(batch, [&](Slot& slot) {
      slot.plan->Evaluate(*slot.stream, *state_, slot.shards);
      return absl::OkStatus();
    });
  }
  // What each slot's plan answers, after a TrainStep of the same batch.
  std::vector<std::string> FindNonFinite(const SampleBatch& batch, int64_t step) {
    scalars_.step = static_cast<uint64_t>(step);
    Run(batch, [&](Slot& slot) {
      auto found = slot.plan->FindNonFinite(*slot.stream, *state_, &scalars_, slot.shards, slot);
      slot.found = found.ok() ? *found : "";
      return found.status();
    });
    std::vector<std::string> found;
    for (const auto& slot : slots_) found.push_back(slot->found);
    return found;
  }

  // The canonical sum of the leaves.
  std::vector<float> Gradient(const Outcome& outcome) {
    std::vector<std::vector<float>> leaves = outcome.leaves;
    const int root = FoldTree(
        0, options_.shards, [&](int i) { return outcome.rows[i] > 0; },
        [&](int a, int b) {
          device_.Add(stream(), leaves[a].size(), leaves[a].data(), leaves[b].data(),
                      leaves[a].data());
        });
    return leaves[root];
  }
  // One optimizer update and the running averages' update, as a step does.
  void Update(const Outcome& outcome, const optim::ScheduleOptions& schedule, int64_t step) {
    const std::vector<float> gradient = Gradient(outcome);
    device::StepScalars scalars;
    optimizer_.Prepare(schedule, step, &scalars);
    optimizer_.Update(device_, stream(), 0, static_cast<int64_t>(gradient.size()), &scalars,
                      gradient.data(), *state_);
    for (const MomentsSlice& s : program_->moments()) {
      std::vector<std::vector<float>> moments = outcome.moments;
      std::vector<int64_t> rows = outcome.rows;
      const int root = FoldTree(
          0, options_.shards, [&](int i) { return rows[i] > 0; },
          [&](int a, int b) {
            float *left = &moments[a][s.offset], *right = &moments[b][s.offset];
            device_.MergeMoments(stream(), s.channels, rows[a] * s.spatial, left, left + s.channels,
                                 rows[b] * s.spatial, right, right + s.channels, left,
                                 left + s.channels);
            rows[a] += rows[b];
          });
      float* record = &moments[root][s.offset];
      device_.UpdateRunningAverages(
          stream(), s.channels, rows[root] * s.spatial, record, record + s.channels, s.momentum,
          state_->statistics() + s.running_mean, state_->statistics() + s.running_var);
    }
    Pack();
  }

 private:
  struct Slot final : GradientSink, MomentExchange {
    explicit Slot(PlanRunner* runner) : runner(runner) {}
    float* Leaf(int shard) override { return runner->outcome_.leaves[shard].data(); }
    void Done(int shard, int64_t begin, int64_t end) override {
      runner->outcome_.done[shard].push_back({begin, end});
      if (!runner->options_.takes_leaves) return;
      const auto leaf = runner->outcome_.leaves[shard].begin();
      std::copy(leaf + begin, leaf + end, runner->taken_[shard].begin() + begin);
      std::fill(leaf + begin, leaf + end, std::numeric_limits<float>::quiet_NaN());
    }
    bool LeavesStay() const override { return runner->options_.takes_leaves; }
    absl::StatusOr<const float*> Combine(Kind kind, int64_t channels, int64_t spatial,
                                         absl::Span<const ShardInput> inputs,
                                         absl::Span<const float* const> records,
                                         int64_t* rows) override {
      merged = runner->Combine(*stream, kind, channels, spatial, inputs, records, rows);
      return merged.data();
    }
    PlanRunner* const runner;
    std::unique_ptr<Plan> plan;
    std::unique_ptr<device::Stream> stream;
    std::vector<ShardInput> shards;
    std::vector<float> merged;
    std::string found;
    absl::Status status;
  };

  Outcome Run(const SampleBatch& batch, const std::function<absl::Status(Slot&)>& body) {
    outcome_ = Outcome();
    outcome_.rows = ShardRows(options_.batch, options_.shards, batch.size());
    const float unwritten = options_.takes_leaves ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    outcome_.leaves.assign(options_.shards,
                           std::vector<float>(program_->parameters().size, unwritten));
    taken_ = outcome_.leaves;
    outcome_.done.resize(options_.shards);
    outcome_.results.resize(options_.shards);
    outcome_.moments.resize(options_.shards);
    const int64_t features = spec::ElementCount(program_->graph().data_shape);
    int64_t first = 0;
    int shard = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
      slots_[i]->shards.clear();
      for (; shard < options_.bounds[i + 1]; ++shard) {
        const int64_t rows = outcome_.rows[shard];
        if (rows > 0) {
          slots_[i]->shards.push_back({shard, rows, batch.data.data() + first * features,
                                       batch.labels.data() + first, first});
        }
        first += rows;
      }
    }
    std::vector<std::thread> threads;
    for (size_t i = 1; i < slots_.size(); ++i) {
      threads.emplace_back([&, i] { slots_[i]->status = body(*slots_[i]); });
    }
    slots_[0]->status = body(*slots_[0]);
    for (std::thread& thread : threads) thread.join();
    for (const auto& slot : slots_) {
      if (!slot->status.ok()) throw std::runtime_error(slot->status.ToString());
      for (size_t p = 0; p < slot->shards.size(); ++p) {
        const int s = slot->shards[p].shard;
        outcome_.results[s] = slot->plan->result(static_cast<int>(p));
        const float* moments = slot->plan->moments(static_cast<int>(p));
        outcome_.moments[s].assign(moments, moments + program_->moments_size());
      }
    }
    if (options_.takes_leaves) outcome_.leaves = taken_;
    return std::move(outcome_);
  }

  std::vector<float> Combine(device::Stream& stream, MomentExchange::Kind kind, int64_t channels,
                             int64_t spatial, absl::Span<const ShardInput> shards,
                             absl::Span<const float* const> records, int64_t* rows) {
    absl::MutexLock lock(&mutex_);
    for (size_t i = 0; i < shards.size(); ++i) {
      staged_[shards[i].shard].assign(records[i], records[i] + 2 * channels);
      staged_rows_[shards[i].shard] = shards[i].rows;
    }
    if (++arrived_ < slots_.size()) {
      const int64_t generation = generation_;
      auto moved_on = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return generation_ != generation;
      };
      mutex_.Await(absl::Condition(&moved_on));
    } else {
      const int root = FoldTree(
          0, options_.shards, [&](int i) { return staged_rows_[i] > 0; },
          [&](int a, int b) {
            float *left = staged_[a].data(), *right = staged_[b].data();
            if (kind == MomentExchange::Kind::kMoments) {
              device_.MergeMoments(stream, channels, staged_rows_[a] * spatial, left,
                                   left + channels, staged_rows_[b] * spatial, right,
                                   right + channels, left, left + channels);
            } else {
              device_.Add(stream, 2 * channels, left, right, left);
            }
            staged_rows_[a] += staged_rows_[b];
          });
      merged_ = staged_[root];
      merged_rows_ = staged_rows_[root];
      std::fill(staged_rows_.begin(), staged_rows_.end(), 0);
      arrived_ = 0;
      ++generation_;
    }
    *rows = merged_rows_;
    return merged_;
  }

  Options options_;
  device::Device& device_;
  std::shared_ptr<const Program> program_;
  optim::Optimizer optimizer_;
  std::unique_ptr<optim::FlatState> state_;
  std::unique_ptr<Operations> operations_;
  std::vector<std::unique_ptr<Slot>> slots_;
  device::StepScalars scalars_;
  std::vector<std::vector<float>> taken_;  // by shard, where leaves are taken
  Outcome outcome_;

  absl::Mutex mutex_;
  size_t arrived_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t generation_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<std::vector<float>> staged_;  // guarded by mutex_ once slots run
  std::vector<int64_t> staged_rows_;
  std::vector<float> merged_ ABSL_GUARDED_BY(mutex_);
  int64_t merged_rows_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace lockstep::nn
