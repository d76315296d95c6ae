#include "worker/nn/memory_plan.h"

#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/nn/cases.h"
#include "tests/nn/graph_maker.h"
#include "worker/nn/plan.h"

namespace lockstep::nn {
namespace {

constexpr int64_t kRows = 3;
constexpr int64_t kShardRows[] = {3, 2};  // of the slot's two shards
constexpr int64_t kSlotRows = 5;

// Runs the calls, shards in the order in which a plan walks, on an arena whose bytes know which
// value of which shard they hold: every read must find its own value whole. Independent of how the
// plan was made.
class Arena {
 public:
  Arena(const Lowering& lowering, const MemoryPlan& plan)
      : lowering_(lowering), plan_(plan), owner_(plan.bytes, {-1, -1}) {}

  void Run(int index, int shard) {
    const Call& call = lowering_.calls[index];
    for (const int value : {call.a, call.b, call.c, call.d}) {
      if (value < 0) continue;
      ExpectHeld(value, shard, index);
      for (const int out : {call.out, call.out2}) {
        if (out < 0 || IsElementwise(call.type)) continue;
        const bool apart =
            Begin(out, shard) >= End(value, shard) || Begin(value, shard) >= End(out, shard);
        ASSERT_TRUE(apart) << "call " << index << " writes over what it reads";
      }
    }
    for (const int out : {call.out, call.out2}) {
      if (out < 0) continue;
      ASSERT_EQ(plan_.offsets[out] % kArenaAlignment, 0);
      for (int64_t i = Begin(out, shard); i < End(out, shard); ++i) owner_.at(i) = {out, shard};
    }
    if (call.out2 >= 0) ExpectHeld(call.out, shard, index);
    // What a product reads whose norm may be made with it.
    if (index > 0 && lowering_.calls[index - 1].then_norm && lowering_.calls[index - 1].a >= 0) {
      ExpectHeld(lowering_.calls[index - 1].a, shard, index);
    }
    // What a gradient of weights reads beside the calls behind it.
    if (lowering_.weights_beside && call.type == CallType::kLinearBackwardWeight) beside_ = index;
    if (beside_ < 0) return;
    for (const int value : {lowering_.calls[beside_].a, lowering_.calls[beside_].b}) {
      if (value >= 0) ExpectHeld(value, shard, index);
    }
  }

 private:
  int64_t Begin(int value, int shard) const {
    const int64_t first_row = plan_.of_slot[value] != 0 && shard == 1 ? kShardRows[0] : 0;
    return plan_.offsets[value] + first_row * lowering_.value_bytes[value];
  }
  int64_t End(int value, int shard) const {
    return Begin(value, shard) + kShardRows[shard] * lowering_.value_bytes[value];
  }
  void ExpectHeld(int value, int shard, int call) {
    for (int64_t i = Begin(value, shard); i < End(value, shard); ++i) {
      ASSERT_EQ(owner_.at(i), std::pair(value, shard)) << "call " << call << " byte " << i;
    }
  }

  const Lowering& lowering_;
  const MemoryPlan& plan_;
  int beside_ = -1;  // the last such call
  std::vector<std::pair<int, int>> owner_;
};

void ExpectEveryReadFindsItsValue(const Lowering& lowering, const MemoryPlan& plan) {
  Arena arena(lowering, plan);
  for (const Segment& segment : lowering.segments) {
    if (segment.layerwise) {
      for (int call = segment.begin; call < segment.end; ++call) {
        for (const int shard : {0, 1}) arena.Run(call, shard);
      }
    } else {
      for (const int shard : {0, 1}) {
        for (int call = segment.begin; call < segment.end; ++call) arena.Run(call, shard);
      }
    }
  }
}

void ExpectSound(spec::Graph graph) {
  graph.precision = spec::Precision::kBf16;
  const auto program = Program::Compile(graph).value();
  for (const auto& [training, stores_bf16] :
       {std::pair(true, false), std::pair(false, false), std::pair(true, true)}) {
    const Lowering lowering = Lower(*program, training, /*layerwise=*/stores_bf16, stores_bf16);
    ExpectEveryReadFindsItsValue(lowering, PlanMemory(lowering, kRows, kSlotRows));
    int at = 0;
    for (const Segment& segment : lowering.segments) {
      EXPECT_EQ(segment.begin, at);
      at = segment.end;
    }
    EXPECT_EQ(at, static_cast<int>(lowering.calls.size()));
  }
}

TEST(MemoryPlanTest, EveryReadFindsItsValue) {
  for (const GraphCase& graph_case : GraphCases()) {
    SCOPED_TRACE(graph_case.name);
    ExpectSound(graph_case.graph);
  }
}

// Convolutions shard by shard, then dense layers with many weights layer by layer, and back.
TEST(MemoryPlanTest, EveryReadFindsItsValueWhereTheWayToWalkChanges) {
  for (const spec::Sync sync : {spec::Sync::kShard, spec::Sync::kBatch}) {
    GraphMaker m({6, 6, 2}, 7);
    m.Conv2d(4, 3, 1, 1);
    m.BatchNorm(sync);
    m.Relu();
    m.Flatten();
    m.Dense(260);
    m.BatchNorm(sync);
    m.Relu();
    m.Dropout(0.5);
    m.Dense(7);
    const Lowering lowering = Lower(*Program::Compile(m.graph()).value(), true);
    int layerwise = 0;
    for (const Segment& segment : lowering.segments) layerwise += segment.layerwise;
    EXPECT_EQ(layerwise, sync == spec::Sync::kShard ? 1 : 3);
    EXPECT_FALSE(lowering.segments.front().layerwise);
    EXPECT_FALSE(lowering.segments.back().layerwise);
    ExpectSound(m.graph());
  }
}

TEST(MemoryPlanTest, EveryReadFindsItsValueInRandomGraphs) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(seed);
    ExpectSound(RandomGraph(seed, 20));
  }
}

// The layers whose norms may be made with the product before them: in forward, then in backward.
std::vector<std::string> NormsOfProducts(GraphMaker& m) {
  const auto program = Program::Compile(m.graph()).value();
  const Lowering lowering = Lower(*program, true, /*layerwise=*/true);
  std::vector<std::string> names;
  for (size_t i = 0; i + 1 < lowering.calls.size(); ++i) {
    if (!lowering.calls[i].then_norm) continue;
    EXPECT_TRUE(lowering.calls[i + 1].whole);
    names.push_back(program->layer(lowering.calls[i + 1].node).name);
  }
  return names;
}

TEST(MemoryPlanTest, ADenseIsFollowedByItsNorm) {
  GraphMaker m({3, 3, 2}, 5);
  const auto name = [&](int layer) { return m.graph().layers[layer].name; };
  m.Conv2d(4, 3, 1, 1);
  m.BatchNorm(spec::Sync::kShard);  // of a convolution; and its channels are no dense's inputs
  m.Flatten();
  m.Dense(8);
  const int norm = m.BatchNorm(spec::Sync::kShard);
  m.Relu();
  m.Dense(8);
  m.BatchNorm(spec::Sync::kBatch);
  m.Relu();
  m.Dense(8);
  const int read_twice = m.BatchNorm(spec::Sync::kShard);  // backward adds two gradients
  m.AddLayers({read_twice, m.Dense(8)});
  m.Dense(5);
  EXPECT_THAT(NormsOfProducts(m), testing::ElementsAre(name(norm), name(read_twice), name(norm)));

  GraphMaker residual({8}, 5);
  const int first = residual.Dense(8);
  residual.Dense(8);
  residual.AddLayers({residual.BatchNorm(spec::Sync::kShard), first});
  residual.Dense(5);
  EXPECT_THAT(NormsOfProducts(residual), testing::IsEmpty());
}

TEST(MemoryPlanTest, AConvolutionsGradientGoesIntoThatOfANorm) {
  for (const int64_t channels : {8, 4}) {
    GraphMaker m({6, 6, channels}, 5);
    const auto block = [&](int from) {
      m.Conv2d(channels, 3, 1, 1, true, from);
      const int norm = m.BatchNorm(spec::Sync::kShard);
      m.AddLayers({norm, from});
      m.Relu();
      return norm;
    };
    m.Conv2d(channels, 3, 1, 1);
    m.BatchNorm(spec::Sync::kShard);  // its relu is computed again
    const int begin = m.Relu();
    const int first = block(begin);
    block(m.Last());  // whose output goes into no convolution
    m.GlobalAveragePool();
    m.Dense(5);
    m.graph().precision = spec::Precision::kBf16;
    const auto program = Program::Compile(m.graph()).value();
    const Lowering lowering = Lower(*program, true, /*layerwise=*/true, /*stores_bf16=*/true);
    std::vector<std::string> joined, told;
    for (size_t i = 0; i < lowering.calls.size(); ++i) {
      const Call& call = lowering.calls[i];
      if (call.then_norm) joined.push_back(program->layer(lowering.calls[i + 1].node).name);
      if (call.above) told.push_back(program->layer(call.node).name);
    }
    const std::string name = m.graph().layers[first].name;
    if (channels == 8) {
      EXPECT_THAT(joined, testing::ElementsAre(name));
      EXPECT_THAT(told, testing::ElementsAre(testing::Ne(name), name));
    } else {  // no bytes of bits
      EXPECT_THAT(joined, testing::IsEmpty());
      EXPECT_THAT(told, testing::IsEmpty());
    }
  }
}

int64_t Sum(const Lowering& lowering) {
  int64_t bytes = 0;
  for (const int64_t b : lowering.value_bytes) bytes += b * kRows;
  return bytes;
}

TEST(MemoryPlanTest, ReusesMemory) {
  GraphMaker m({64}, 64);
  constexpr int kDepth = 30;
  for (int i = 0; i < kDepth; ++i) {
    m.Dense(64);
    m.Tanh();
  }
  m.Dense(64);
  const auto program = Program::Compile(m.graph()).value();
  const Lowering train = Lower(*program, true), inference = Lower(*program, false);
  // Inference needs two buffers at a time, whatever the depth.
  constexpr int64_t kBuffer = 64 * 4 * kRows;
  EXPECT_EQ(PlanMemory(inference, kRows, kRows).bytes, 2 * kBuffer);
  // Training keeps each tanh's output (it is written over the dense's own) and, at the end of
  // forward, the logits and their gradient; backward finds its buffers among those.
  EXPECT_LE(PlanMemory(train, kRows, kRows).bytes, (kDepth + 2) * kBuffer);
  EXPECT_GT(Sum(train), 3 * kDepth * kBuffer);
}

TEST(MemoryPlanTest, Bf16TakesHalf) {
  GraphMaker m({8, 8, 8}, 8);
  for (int i = 0; i < 6; ++i) {
    m.Conv2d(8, 3, 1, 1);
    m.BatchNorm(spec::Sync::kShard);
    m.Relu();
  }
  m.GlobalAveragePool();
  m.Dense(8);
  m.graph().precision = spec::Precision::kBf16;
  const auto program = Program::Compile(m.graph()).value();
  const auto bytes = [&](bool training, bool stores_bf16) {
    return PlanMemory(Lower(*program, training, true, stores_bf16), kRows, kSlotRows).bytes;
  };
  // But for what lies between the mean and the loss.
  constexpr int64_t kEnd = 4 * kArenaAlignment;
  EXPECT_NEAR(bytes(true, true), bytes(true, false) / 2, kEnd);
  EXPECT_NEAR(bytes(false, true), bytes(false, false) / 2, kEnd);
  EXPECT_EQ(PlannedActivationBytes(*program, 1, kRows, true, /*gpu=*/true),
            PlanMemory(Lower(*program, true, true, true), kRows, kRows).bytes);
}

TEST(MemoryPlanTest, AnElementwiseCallWritesOverAnInputThatDies) {
  GraphMaker m({8}, 8);
  const int a = m.Dense(8);
  const int b = m.Dropout(0.5);  // a lives on: the sum reads it
  m.AddLayers({a, b});           // in place
  m.Dropout(0.5);                // in place
  const Lowering lowering = Lower(*Program::Compile(m.graph()).value(), true);
  const MemoryPlan plan = PlanMemory(lowering, kRows, kRows);
  ASSERT_EQ(lowering.calls[1].type, CallType::kDropout);
  ASSERT_EQ(lowering.calls[2].type, CallType::kAdd);
  ASSERT_EQ(lowering.calls[3].type, CallType::kDropout);
  auto offset = [&](int value) { return plan.offsets[value]; };
  EXPECT_NE(offset(lowering.calls[1].out), offset(lowering.calls[1].a));
  EXPECT_EQ(offset(lowering.calls[2].out), offset(lowering.calls[2].a));
  EXPECT_EQ(offset(lowering.calls[3].out), offset(lowering.calls[3].a));
}

}  // namespace
}  // namespace lockstep::nn
