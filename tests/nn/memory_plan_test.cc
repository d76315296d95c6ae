#include "worker/nn/memory_plan.h"

#include <map>

#include "gtest/gtest.h"
#include "tests/nn/cases.h"
#include "tests/nn/graph_maker.h"

namespace lockstep::nn {
namespace {

constexpr int64_t kRows = 3;

// Runs the calls on an arena whose bytes know which value they hold: every read must find its own
// value whole. Independent of how the plan was made.
void ExpectEveryReadFindsItsValue(const Lowering& lowering, const MemoryPlan& plan) {
  std::vector<int> owner(plan.bytes, -1);
  auto expect_held = [&](int value, int call) {
    if (value < 0) return;
    for (int64_t i = 0; i < lowering.value_bytes[value] * kRows; ++i) {
      ASSERT_EQ(owner.at(plan.offsets[value] + i), value) << "call " << call << " byte " << i;
    }
  };
  for (size_t i = 0; i < lowering.calls.size(); ++i) {
    const Call& call = lowering.calls[i];
    for (const int value : {call.a, call.b, call.c, call.d}) {
      expect_held(value, static_cast<int>(i));
      for (const int out : {call.out, call.out2}) {
        if (out < 0 || value < 0 || IsElementwise(call.type)) continue;
        const bool apart =
            plan.offsets[out] >= plan.offsets[value] + lowering.value_bytes[value] * kRows ||
            plan.offsets[value] >= plan.offsets[out] + lowering.value_bytes[out] * kRows;
        ASSERT_TRUE(apart) << "call " << i << " writes over what it reads";
      }
    }
    for (const int out : {call.out, call.out2}) {
      if (out < 0) continue;
      ASSERT_EQ(plan.offsets[out] % kArenaAlignment, 0);
      for (int64_t b = 0; b < lowering.value_bytes[out] * kRows; ++b) {
        owner.at(plan.offsets[out] + b) = out;
      }
    }
    if (call.out2 >= 0) expect_held(call.out, static_cast<int>(i));
  }
}

void ExpectSound(const spec::Graph& graph) {
  const auto program = Program::Compile(graph).value();
  for (const bool training : {true, false}) {
    const Lowering lowering = Lower(*program, training);
    ExpectEveryReadFindsItsValue(lowering, PlanMemory(lowering, kRows));
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

TEST(MemoryPlanTest, EveryReadFindsItsValueInRandomGraphs) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(seed);
    ExpectSound(RandomGraph(seed, 20));
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
  EXPECT_EQ(PlanMemory(inference, kRows).bytes, 2 * kBuffer);
  // Training keeps each tanh's output (it is written over the dense's own) and, at the end of
  // forward, the logits and their gradient; backward finds its buffers among those.
  EXPECT_LE(PlanMemory(train, kRows).bytes, (kDepth + 2) * kBuffer);
  EXPECT_GT(Sum(train), 3 * kDepth * kBuffer);
}

TEST(MemoryPlanTest, AnElementwiseCallWritesOverAnInputThatDies) {
  GraphMaker m({8}, 8);
  const int a = m.Dense(8);
  const int b = m.Dropout(0.5);  // a lives on: the sum reads it
  m.AddLayers({a, b});           // in place
  m.Dropout(0.5);                // in place
  const Lowering lowering = Lower(*Program::Compile(m.graph()).value(), true);
  const MemoryPlan plan = PlanMemory(lowering, kRows);
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
