#include "worker/nn/plan.h"

#include <cmath>
#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/nn/cases.h"
#include "tests/nn/graph_maker.h"
#include "tests/nn/plan_runner.h"
#include "worker/nn/lowering.h"

namespace lockstep::nn {
namespace {

using spec::Sync;
using testing::Each;
using testing::ElementsAre;

PlanRunner::Options OptionsOf(int shards, int64_t batch, std::vector<int> bounds = {}) {
  PlanRunner::Options options;
  options.shards = shards;
  options.batch = batch;
  options.bounds = std::move(bounds);
  return options;
}

// Bit by bit, so that -0 and NaN count.
void ExpectSameBits(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  if (a.empty()) return;
  ASSERT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
}

void ExpectSameOutcome(const PlanRunner::Outcome& a, const PlanRunner::Outcome& b) {
  ASSERT_EQ(a.rows, b.rows);
  for (size_t s = 0; s < a.rows.size(); ++s) {
    SCOPED_TRACE(testing::Message() << "shard " << s);
    ExpectSameBits(a.leaves[s], b.leaves[s]);
    ExpectSameBits(a.moments[s], b.moments[s]);
    EXPECT_EQ(a.results[s].loss_sum, b.results[s].loss_sum);
    EXPECT_EQ(a.results[s].correct, b.results[s].correct);
  }
}

class PlanTest : public testing::TestWithParam<GraphCase> {};
INSTANTIATE_TEST_SUITE_P(Graphs, PlanTest, testing::ValuesIn(GraphCases()),
                         [](const auto& info) { return info.param.name; });

// What is announced may be exchanged, and added to, at once.
TEST_P(PlanTest, ReadsNoGradientThatIsAnnounced) {
  const spec::Graph& graph = GetParam().graph;
  const SampleBatch batch = RandomBatch(graph, 13, 3);
  PlanRunner::Options options = OptionsOf(5, 13);
  const PlanRunner::Outcome expected = PlanRunner(graph, options).TrainStep(batch, 2);
  options.takes_leaves = true;
  const PlanRunner::Outcome taken = PlanRunner(graph, options).TrainStep(batch, 2);
  for (size_t s = 0; s < expected.leaves.size(); ++s) {
    SCOPED_TRACE(testing::Message() << "shard " << s);
    for (const auto& [begin, end] : expected.done[s]) {
      const auto part = [&, from = begin, to = end](const std::vector<float>& leaf) {
        return std::vector<float>(leaf.begin() + from, leaf.begin() + to);
      };
      ExpectSameBits(part(taken.leaves[s]), part(expected.leaves[s]));
    }
  }
}

// 13 samples in 5 shards (3, 3, 3, 2, 2), and 7 (3, 3, 1, 0, 0): also slots without a sample.
TEST_P(PlanTest, ShardsHaveTheSameBitsOnAnySplitOverPlans) {
  const spec::Graph& graph = GetParam().graph;
  for (const int64_t size : {13, 7}) {
    SCOPED_TRACE(size);
    const SampleBatch batch = RandomBatch(graph, size, 3);
    PlanRunner one(graph, OptionsOf(5, 13));
    const PlanRunner::Outcome expected = one.TrainStep(batch, 2);
    const PlanRunner::Outcome evaluated = one.Evaluate(batch);
    for (const std::vector<int>& bounds :
         std::vector<std::vector<int>>{{0, 2, 5}, {0, 1, 3, 5}, {0, 1, 2, 3, 4, 5}, {0, 0, 4, 5}}) {
      SCOPED_TRACE(testing::PrintToString(bounds));
      PlanRunner split(graph, OptionsOf(5, 13, bounds));
      ExpectSameOutcome(split.TrainStep(batch, 2), expected);
      const PlanRunner::Outcome other = split.Evaluate(batch);
      for (int s = 0; s < 5; ++s) {
        EXPECT_EQ(other.results[s].loss_sum, evaluated.results[s].loss_sum);
        EXPECT_EQ(other.results[s].correct, evaluated.results[s].correct);
      }
    }
  }
}

// Whatever an earlier step or evaluation left in the arenas, records and scratch.
TEST_P(PlanTest, AStepDoesNotReadWhatAnEarlierOneLeft) {
  const spec::Graph& graph = GetParam().graph;
  const SampleBatch batch = RandomBatch(graph, 6, 4);
  PlanRunner fresh(graph, OptionsOf(2, 8));
  const PlanRunner::Outcome expected = fresh.TrainStep(batch, 9);
  PlanRunner used(graph, OptionsOf(2, 8));
  SampleBatch poison = RandomBatch(graph, 8, 5);
  poison.data.assign(poison.data.size(), std::numeric_limits<float>::quiet_NaN());
  used.TrainStep(poison, 8);
  ExpectSameOutcome(used.TrainStep(batch, 9), expected);
  used.Evaluate(poison);
  ExpectSameOutcome(used.TrainStep(batch, 9), expected);
}

TEST_P(PlanTest, LeavesAreWrittenWholeAndAnnouncedOnceFromTheFront) {
  const spec::Graph& graph = GetParam().graph;
  PlanRunner runner(graph, OptionsOf(3, 7));
  const PlanRunner::Outcome outcome = runner.TrainStep(RandomBatch(graph, 5, 6), 1);
  std::vector<uint8_t> padding(runner.program().parameters().size, 1);
  for (const optim::TensorView& view : runner.program().parameters().tensors) {
    std::fill_n(padding.begin() + view.offset, view.size, 0);
  }
  for (int s = 0; s < 3; ++s) {
    int64_t at = 0;
    for (const auto& [begin, end] : outcome.done[s]) {
      EXPECT_EQ(begin, at);
      EXPECT_GT(end, begin);
      at = end;
    }
    EXPECT_EQ(at, outcome.rows[s] > 0 ? runner.program().parameters().size : 0);
    if (outcome.rows[s] == 0) continue;
    for (size_t i = 0; i < padding.size(); ++i) {
      EXPECT_TRUE(std::isfinite(outcome.leaves[s][i])) << i;
      if (padding[i] != 0) {
        EXPECT_EQ(outcome.leaves[s][i], 0) << i;
      }
    }
  }
}

TEST_P(PlanTest, FindsNothingWhereAllIsFinite) {
  const spec::Graph& graph = GetParam().graph;
  PlanRunner runner(graph, OptionsOf(3, 7, {0, 1, 3}));
  const SampleBatch batch = RandomBatch(graph, 7, 6);
  const PlanRunner::Outcome outcome = runner.TrainStep(batch, 1);
  EXPECT_THAT(runner.FindNonFinite(batch, 1), Each(""));
  ExpectSameOutcome(runner.TrainStep(batch, 1), outcome);
}

// A relu or a pool that took a NaN for 0 would train on as if nothing had happened.
TEST_P(PlanTest, NoLayerHidesANaN) {
  const spec::Graph& graph = GetParam().graph;
  PlanRunner runner(graph, OptionsOf(1, 4));
  SampleBatch batch = RandomBatch(graph, 4, 6);
  batch.data.assign(batch.data.size(), std::numeric_limits<float>::quiet_NaN());
  EXPECT_FALSE(std::isfinite(runner.TrainStep(batch, 1).results[0].loss_sum));
  EXPECT_THAT(runner.FindNonFinite(batch, 1), ElementsAre(testing::Ne("")));
  EXPECT_FALSE(std::isfinite(runner.Evaluate(batch).results[0].loss_sum));
}

TEST(PlanSegmentsTest, EndAtSynchronizedNormsOnly) {
  auto segments = [](const std::string& name) {
    for (const GraphCase& graph_case : GraphCases()) {
      if (graph_case.name != name) continue;
      PlanRunner runner(graph_case.graph, OptionsOf(2, 4));
      return runner.plan(0).segments();
    }
    return -1;
  };
  EXPECT_EQ(segments("dense_relu"), 1);
  EXPECT_EQ(segments("norm_relu_shard"), 1);
  EXPECT_EQ(segments("norm_relu_batch"), 3);     // one exchange forward, one backward
  EXPECT_EQ(segments("norm_of_data_batch"), 2);  // nothing before it wants a gradient
  EXPECT_EQ(segments("parallel_norms_batch"), 5);
  EXPECT_EQ(segments("norms_of_both_kinds"), 3);
}

TEST(PlanMemoryTest, ShardsTakeTurnsUnlessANormWaitsForAll) {
  auto bytes = [](Sync sync, int shards) {
    GraphMaker m({5}, 3);
    m.Dense(40);
    m.BatchNorm(sync);
    m.Relu();
    m.Dense(3);
    PlanRunner runner(m.graph(), OptionsOf(shards, 4 * shards));
    EXPECT_EQ(runner.plan(0).activation_bytes(),
              PlannedActivationBytes(runner.program(), shards, 4, true, /*gpu=*/false));
    return runner.plan(0).activation_bytes();
  };
  EXPECT_EQ(bytes(Sync::kShard, 1), bytes(Sync::kShard, 6));
  // What crosses the norm's two exchanges: its input, its output and its gradient (40 values each),
  // the loss's gradient aside; the rest is needed for one shard at a time.
  EXPECT_GT(bytes(Sync::kBatch, 6), 5 * 3 * 40 * 4 * 4);
  EXPECT_LT(bytes(Sync::kBatch, 6), 6 * bytes(Sync::kBatch, 1));
}

TEST(PlanErrorsTest, RefusesMoreShardsOrRowsThanItWasMadeFor) {
  const spec::Graph& graph = GraphCases()[0].graph;
  PlanRunner runner(graph, OptionsOf(1, 2));
  struct Nowhere final : GradientSink, MomentExchange {
    float* Leaf(int) override { return leaf; }
    void Done(int, int64_t, int64_t) override {}
    absl::StatusOr<const float*> Combine(Kind, int64_t, int64_t, absl::Span<const ShardInput>,
                                         absl::Span<const float* const>, int64_t*) override {
      return absl::InternalError("no norm here");
    }
    float leaf[64];
  } nowhere;
  const SampleBatch batch = RandomBatch(graph, 3, 1);
  const ShardInput wide{0, 3, batch.data.data(), batch.labels.data(), 0};
  const ShardInput narrow{0, 1, batch.data.data(), batch.labels.data(), 0};
  const device::StepScalars scalars;
  auto run = [&](std::vector<ShardInput> shards) {
    return runner.plan(0)
        .TrainStep(runner.stream(), runner.state(), &scalars, 3, shards, nowhere, nowhere)
        .code();
  };
  EXPECT_EQ(run({wide}), absl::StatusCode::kInternal);
  EXPECT_EQ(run({narrow, narrow}), absl::StatusCode::kInternal);
  EXPECT_EQ(run({narrow}), absl::StatusCode::kOk);
}

TEST(PlanErrorsTest, AnExchangeThatFailsEndsTheStep) {
  GraphMaker m({5}, 3);
  m.Dense(3);
  m.BatchNorm(Sync::kBatch);
  PlanRunner runner(m.graph(), OptionsOf(1, 2));
  struct Failing final : GradientSink, MomentExchange {
    float* Leaf(int) override { return leaf; }
    void Done(int, int64_t, int64_t) override { ++done; }
    absl::StatusOr<const float*> Combine(Kind, int64_t, int64_t, absl::Span<const ShardInput>,
                                         absl::Span<const float* const>, int64_t*) override {
      return absl::UnavailableError("member 3 left");
    }
    float leaf[128];
    int done = 0;
  } failing;
  const SampleBatch batch = RandomBatch(m.graph(), 2, 1);
  const ShardInput shard{0, 2, batch.data.data(), batch.labels.data(), 0};
  const device::StepScalars scalars;
  const absl::Status status = runner.plan(0).TrainStep(runner.stream(), runner.state(), &scalars, 2,
                                                       {&shard, 1}, failing, failing);
  EXPECT_EQ(status, absl::UnavailableError("member 3 left"));
  EXPECT_EQ(failing.done, 0);
}

// ---- dropout

TEST(DropoutTest, KeepsTheRightShareAndBackwardHasTheSameMask) {
  // An identity, a dropout and the squared distance to the input of ones: the loss counts what was
  // dropped, the gradient of the identity's weights what was passed back.
  constexpr int64_t kFeatures = 64, kSamples = 200;
  constexpr double kRate = 0.3;
  GraphMaker m({kFeatures}, kFeatures);
  m.Dense(kFeatures, /*bias=*/false);
  m.Dropout(kRate);
  m.MeanSquaredError(spec::Target::kInput);
  PlanRunner runner(m.graph(), OptionsOf(4, kSamples));
  float* weight = runner.state().parameters();
  for (int64_t i = 0; i < kFeatures; ++i) {
    for (int64_t j = 0; j < kFeatures; ++j) weight[i * kFeatures + j] = i == j ? 1.0f : 0.0f;
  }
  runner.Pack();
  SampleBatch batch;
  batch.data.assign(kSamples * kFeatures, 1.0f);
  batch.labels.assign(kSamples, 0);
  const PhiloxKey key = MakePhiloxKey(PlanRunner::Options().seed, "dropout/layer1");
  constexpr int64_t kStep = 7;
  const PlanRunner::Outcome outcome = runner.TrainStep(batch, kStep);

  // y is 0 or 1 / (1 - rate).
  int64_t kept = 0;
  double loss = 0;
  std::vector<int64_t> kept_of(kFeatures, 0);
  for (int64_t i = 0; i < kSamples * kFeatures; ++i) {
    const bool keep = ToUniform(PhiloxAt(key, i, kStep)) >= static_cast<float>(kRate);
    kept += keep;
    kept_of[i % kFeatures] += keep;
    const double error = (keep ? 1 / (1 - kRate) : 0) - 1;
    loss += error * error / kFeatures;
  }
  const double n = kSamples * kFeatures;
  EXPECT_NEAR(kept / n, 1 - kRate, 5 * std::sqrt(kRate * (1 - kRate) / n));  // five standard errors
  double loss_sum = 0;
  for (const ShardResult& result : outcome.results) loss_sum += result.loss_sum;
  EXPECT_NEAR(loss_sum, loss, 1e-4 * loss);
  const std::vector<float> gradient = runner.Gradient(outcome);
  const double each = 2 * (1 / (1 - kRate) - 1) / kFeatures / (1 - kRate) / kSamples;
  for (int64_t i = 0; i < kFeatures; ++i) {
    EXPECT_NEAR(gradient[i * kFeatures], each * static_cast<double>(kept_of[i]), 1e-6) << i;
  }
}

TEST(DropoutTest, TheMaskChangesWithStepAndLayerAndNotWithTheShards) {
  GraphMaker m({16}, 3);
  m.Dropout(0.5);
  m.Dense(3);
  const SampleBatch batch = RandomBatch(m.graph(), 8, 2);
  PlanRunner runner(m.graph(), OptionsOf(2, 8));
  const double first = runner.TrainStep(batch, 1).results[0].loss_sum;
  EXPECT_NE(runner.TrainStep(batch, 2).results[0].loss_sum, first);
  EXPECT_EQ(runner.TrainStep(batch, 1).results[0].loss_sum, first);
  // The same positions of the global batch in other shards.
  PlanRunner eight(m.graph(), OptionsOf(8, 8));
  const PlanRunner::Outcome outcome = eight.TrainStep(batch, 1);
  double sum = 0;
  for (int s = 0; s < 4; ++s) sum += outcome.results[s].loss_sum;
  EXPECT_NEAR(sum, first, 1e-6 * std::abs(first));
}

// ---- FindNonFinite

class FindNonFiniteTest : public testing::Test {
 protected:
  FindNonFiniteTest() : maker_({4}, 3) {
    maker_.Dense(4);
    maker_.Tanh();
    maker_.BatchNorm(Sync::kBatch);
    maker_.Tanh();
    maker_.Dense(3);
  }
  GraphMaker maker_;
};

TEST_F(FindNonFiniteTest, NamesTheFirstParameterBeforeAnyOutput) {
  PlanRunner runner(maker_.graph(), OptionsOf(2, 4, {0, 1, 2}));
  for (const auto& named : runner.state().named()) {
    if (named.name == "layer2.bias" || named.name == "layer0.weight") {
      named.data[1] = std::numeric_limits<float>::infinity();
    }
  }
  runner.Pack();
  const SampleBatch batch = RandomBatch(maker_.graph(), 4, 1);
  runner.TrainStep(batch, 1);
  EXPECT_THAT(runner.FindNonFinite(batch, 1), Each("layer2.bias"));  // the first in layout order
}

// Also where shards walk layer by layer in memory that a convolution's segment shares.
TEST(FindNonFiniteWideTest, NamesTheFirstOutputOfEitherWalk) {
  GraphMaker maker({4, 4, 2}, 3);
  maker.Conv2d(8, 3, 1, 1);
  maker.Tanh();
  maker.Flatten();
  maker.Dense(260);
  maker.BatchNorm(Sync::kShard);
  maker.Tanh();
  maker.Dense(3);
  PlanRunner runner(maker.graph(), OptionsOf(4, 12));
  ASSERT_EQ(runner.plan(0).segments(), 3);
  SampleBatch batch = RandomBatch(maker.graph(), 12, 1);
  EXPECT_THAT(runner.FindNonFinite(batch, 1), ElementsAre(""));
  batch.data[4 * 4 * 2 * 4] = std::numeric_limits<float>::quiet_NaN();  // of shard 1
  EXPECT_THAT(runner.FindNonFinite(batch, 1), ElementsAre("layer0"));
  SampleBatch finite = RandomBatch(maker.graph(), 12, 2);
  for (const auto& named : runner.state().named()) {
    if (named.name == "layer6.weight") std::fill_n(named.data, named.size, 3e38f);
  }
  runner.Pack();
  EXPECT_THAT(runner.FindNonFinite(finite, 1), ElementsAre("layer6"));
}

TEST_F(FindNonFiniteTest, NamesTheFirstOutputOfTheSlotsShards) {
  PlanRunner runner(maker_.graph(), OptionsOf(2, 4, {0, 1, 2}));
  SampleBatch batch = RandomBatch(maker_.graph(), 4, 1);
  batch.data[3 * 4] = std::numeric_limits<float>::quiet_NaN();  // of the last sample, in shard 1
  runner.TrainStep(batch, 1);
  const std::vector<std::string> found = runner.FindNonFinite(batch, 1);
  EXPECT_EQ(found[0], "layer2");  // only where the norm mixes the samples
  EXPECT_EQ(found[1], "layer0");
}

}  // namespace
}  // namespace lockstep::nn
