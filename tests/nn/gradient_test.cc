// Whole graphs through Plan against a double interpreter and its central differences.
//
// Tolerance: fp32 has 6e-8 of relative rounding per operation; a gradient of these graphs is a sum
// of at most a few hundred products through at most eight layers, normalized by standard deviations
// of about 1: 2e-5 of the tensor's largest gradient. The interpreter's own differences are good to
// 1e-9.
#include <algorithm>
#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/nn/cases.h"
#include "tests/nn/graph_maker.h"
#include "tests/nn/plan_runner.h"
#include "tests/nn/reference.h"

namespace lockstep::nn {
namespace {

constexpr double kTolerance = 2e-5;
// Random graphs stack norms over two samples, whose standard deviations may be small and divide
// what rounding left before them. A gradient lost or counted twice is off by a large part of
// itself.
constexpr double kRandomTolerance = 1e-3;
constexpr int kShards = 3;
constexpr int64_t kBatch = 7;  // shards of 3, 2 and 2 samples
constexpr int64_t kStep = 4;

Tensors TensorsOf(optim::FlatState& state) {
  Tensors tensors;
  for (const auto& named : state.named()) {
    if (named.kind == optim::FlatState::Named::Kind::kSlot) continue;
    tensors[named.name].assign(named.data, named.data + named.size);
  }
  return tensors;
}

ReferenceBatch ReferenceOf(const SampleBatch& batch, const std::vector<int64_t>& rows,
                           bool training) {
  ReferenceBatch reference;
  reference.data.assign(batch.data.begin(), batch.data.end());
  reference.labels = batch.labels;
  for (const int64_t r : rows) {
    if (r > 0) reference.rows.push_back(r);
  }
  reference.training = training;
  reference.seed = PlanRunner::Options().seed;
  reference.step = kStep;
  return reference;
}

double Largest(const std::vector<double>& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

void ExpectGradients(const spec::Graph& graph, int64_t size, double tolerance = kTolerance,
                     int shards = kShards, int64_t full = kBatch) {
  PlanRunner::Options options;
  options.shards = shards;
  options.batch = full;
  PlanRunner runner(graph, options);
  const SampleBatch batch = RandomBatch(graph, size, 11);
  const PlanRunner::Outcome outcome = runner.TrainStep(batch, kStep);
  const std::vector<float> gradient = runner.Gradient(outcome);
  const Tensors tensors = TensorsOf(runner.state());
  const ReferenceBatch reference = ReferenceOf(batch, outcome.rows, /*training=*/true);

  const ReferenceResult expected = Interpret(graph, tensors, reference);
  size_t present = 0;
  for (size_t s = 0; s < outcome.rows.size(); ++s) {
    if (outcome.rows[s] == 0) continue;
    EXPECT_NEAR(outcome.results[s].loss_sum, expected.shard_loss[present],
                1e-5 * (1 + expected.shard_loss[present]));
    if (graph.loss != spec::LossType::kMeanSquaredError || graph.target == spec::Target::kLabel) {
      EXPECT_EQ(outcome.results[s].correct, expected.shard_correct[present]);
    }
    ++present;
  }
  const Tensors wanted = DifferenceGradients(graph, tensors, reference);
  // A bias before a norm has no gradient but rounding: measured against the whole model's largest.
  double model = 0;
  for (const auto& [name, values] : wanted) model = std::max(model, Largest(values));
  ASSERT_GT(model, 1e-3) << "nothing would be tested";
  for (const optim::TensorView& view : runner.program().parameters().tensors) {
    const std::vector<double>& want = wanted.at(view.name);
    const double bound = tolerance * std::max(Largest(want), 0.1 * model);
    for (int64_t i = 0; i < view.size; ++i) {
      ASSERT_NEAR(gradient[view.offset + i], want[i], bound) << view.name << "[" << i << "]";
    }
  }
}

class GradientTest : public testing::TestWithParam<GraphCase> {};

TEST_P(GradientTest, FullBatch) { ExpectGradients(GetParam().graph, kBatch); }
// 3, 1 and no samples.
TEST_P(GradientTest, ShortBatchLeavesShardsPartlyFilledAndEmpty) {
  ExpectGradients(GetParam().graph, 4);
}

TEST_P(GradientTest, EvaluationUsesRunningAveragesAndNoDropout) {
  const spec::Graph& graph = GetParam().graph;
  PlanRunner::Options options;
  options.shards = kShards;
  options.batch = kBatch;
  PlanRunner runner(graph, options);
  // Averages that differ from a batch's moments.
  float* statistics = runner.state().statistics();
  for (int64_t i = 0; i < runner.program().statistics().size; ++i) {
    statistics[i] = 0.5f + 0.25f * static_cast<float>(i % 5);
  }
  const SampleBatch batch = RandomBatch(graph, 6, 12);
  const PlanRunner::Outcome outcome = runner.Evaluate(batch);
  const ReferenceResult expected = Interpret(graph, TensorsOf(runner.state()),
                                             ReferenceOf(batch, outcome.rows, /*training=*/false));
  ASSERT_EQ(expected.shard_loss.size(), 3u);
  for (size_t s = 0; s < 3; ++s) {
    EXPECT_NEAR(outcome.results[s].loss_sum, expected.shard_loss[s],
                1e-5 * (1 + expected.shard_loss[s]));
    if (graph.loss != spec::LossType::kMeanSquaredError || graph.target == spec::Target::kLabel) {
      EXPECT_EQ(outcome.results[s].correct, expected.shard_correct[s]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Graphs, GradientTest, testing::ValuesIn(GraphCases()),
                         [](const auto& info) { return info.param.name; });

class RandomGraphTest : public testing::TestWithParam<int> {};
TEST_P(RandomGraphTest, Gradients) {
  ExpectGradients(RandomGraph(static_cast<uint64_t>(GetParam()), 14), kBatch, kRandomTolerance);
}
INSTANTIATE_TEST_SUITE_P(Seeds, RandomGraphTest, testing::Range(1, 13));

TEST(MomentsTest, RecordsHoldEachShardsMeanAndSumOfSquares) {
  GraphMaker maker({3, 3, 2}, 3);
  maker.Conv2d(2, 2);
  const int norm = maker.BatchNorm(spec::Sync::kShard);
  maker.Flatten();
  maker.Dense(3);
  PlanRunner::Options options;
  options.shards = kShards;
  options.batch = kBatch;
  PlanRunner runner(maker.graph(), options);
  const SampleBatch batch = RandomBatch(maker.graph(), kBatch, 13);
  const PlanRunner::Outcome outcome = runner.TrainStep(batch, kStep);
  const ReferenceResult expected = Interpret(maker.graph(), TensorsOf(runner.state()),
                                             ReferenceOf(batch, outcome.rows, /*training=*/true));
  const MomentsSlice& slice = runner.program().moments().at(0);
  EXPECT_EQ(slice.layer, norm);
  EXPECT_EQ(slice.spatial, 4);
  for (int s = 0; s < kShards; ++s) {
    const auto& moments = expected.moments.at(norm)[s];
    const double n = static_cast<double>(outcome.rows[s] * slice.spatial);
    for (int64_t c = 0; c < slice.channels; ++c) {
      EXPECT_NEAR(outcome.moments[s][slice.offset + c], moments.mean[c], 1e-6);
      EXPECT_NEAR(outcome.moments[s][slice.offset + slice.channels + c], moments.variance[c] * n,
                  1e-5);
    }
  }
}

TEST(NormOfOneElementTest, ShardsOfOneSample) {
  GraphMaker maker({4}, 3);
  maker.Dense(5);
  maker.BatchNorm(spec::Sync::kShard);
  maker.Relu();
  maker.Dense(3);
  ExpectGradients(maker.graph(), 3, kTolerance, 3, 3);
}

}  // namespace
}  // namespace lockstep::nn
