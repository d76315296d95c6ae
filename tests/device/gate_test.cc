#include <cmath>
#include <limits>

#include "tests/device/device_test_fixture.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device {
namespace {

constexpr int64_t kRing = 3;

double TreeSum(const double* values, size_t n) {
  if (n == 1) return values[0];
  size_t half = 1;
  while (half * 2 < n) half *= 2;
  const double left = TreeSum(values, half);
  return left + TreeSum(values + half, n - half);
}

std::vector<double> RandomSquares(size_t n, uint32_t seed) {
  std::vector<double> values;
  for (const float x : RandomFloats(n, seed)) values.push_back(static_cast<double>(x) * x / 3.0);
  return values;
}

class GateTest : public DeviceTest {
 protected:
  // Of one tensor of so many blocks.
  void MakeLevels(size_t blocks) {
    groups_.clear();
    gate_.levels = 0;
    for (auto left = static_cast<int32_t>(blocks); left > 1;) {
      const size_t before = groups_.size();
      for (int32_t at = 0; at < left; at += kSumGroup) {
        groups_.push_back({at, std::min(kSumGroup, left - at)});
      }
      left = gate_.level_groups[gate_.levels++] = static_cast<int32_t>(groups_.size() - before);
    }
  }

  // From step 5 on, with an open gate.
  std::vector<StepOutcome> Run(const std::vector<std::vector<double>>& squares,
                               const std::vector<std::vector<LeafResult>>& results,
                               double clip_norm) {
    std::vector<StepScalars> prepared(kRing);
    const auto current = In(std::vector<StepScalars>{{.step = 5}});
    const auto update = In(std::vector<StepScalars>{{}});
    const auto outcomes = In(std::vector<StepOutcome>(kRing));
    std::vector<StepOutcome> all;
    updates_.clear();
    for (size_t i = 0; i < squares.size(); ++i) {
      const uint64_t step = 5 + i;
      prepared[step % kRing] = {.step = step, .learning_rate = 0.5f + static_cast<float>(i)};
      const auto prepared_here = In(prepared);
      MakeLevels(squares[i].size());
      const auto groups = In(groups_);
      const auto squares_here = In(squares[i]);
      const auto results_here = In(results[i]);
      gate_.squares = squares[i].empty() ? nullptr : squares_here.data();
      gate_.groups = groups;
      gate_.results = results_here;
      gate_.leaves = static_cast<int>(results[i].size());
      gate_.clip_norm = clip_norm;
      gate_.ring = kRing;
      gate_.prepared = prepared_here;
      gate_.current = current;
      gate_.update = update;
      gate_.outcomes = outcomes;
      device().Gate(stream(), gate_);
      all.push_back(outcomes.Read()[step % kRing]);
      updates_.push_back(update.Read()[0]);
      EXPECT_EQ(current.Read()[0].step, step + 1);
    }
    return all;
  }

  StepGate gate_;
  std::vector<SumGroup> groups_;
  std::vector<StepScalars> updates_;
};

TEST_P(GateTest, SumsByTheCanonicalTree) {
  for (const size_t blocks : {0, 1, 2, 3, 31, 32, 33, 100, 1024, 1025, 2100}) {
    for (const size_t leaves : {1, 2, 3, 7, 8, 31, 32}) {
      const std::vector<double> squares = RandomSquares(blocks, 3);
      const std::vector<double> losses = RandomSquares(leaves, 4);
      std::vector<LeafResult> results;
      for (const double loss : losses) {
        results.push_back({loss, static_cast<int64_t>(results.size())});
      }
      const StepOutcome outcome = Run({squares}, {results}, 0)[0];
      const double norm = blocks == 0 ? 0 : std::sqrt(TreeSum(squares.data(), blocks));
      EXPECT_EQ(outcome.gradient_norm, norm) << blocks;
      EXPECT_EQ(outcome.loss_sum, TreeSum(losses.data(), leaves)) << leaves;
      EXPECT_EQ(outcome.correct, static_cast<int64_t>(leaves * (leaves - 1) / 2));
      EXPECT_EQ(outcome.step, 5u);
      EXPECT_EQ(outcome.applied, 1u);
    }
  }
}

TEST_P(GateTest, ScalesByTheNormAndStaysClosed) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<LeafResult> good = {{1.5, 2}, {2.5, 3}};
  const std::vector<double> squares = {9, 16};
  const struct {
    std::vector<double> squares;
    std::vector<LeafResult> results;
  } bad[] = {{{9, kInfinity}, good},
             {{kNan, 16}, good},
             {squares, {{1.5, 2}, {kNan, 3}}},
             {squares, {{kInfinity, 2}, {2.5, 3}}}};
  for (const auto& one : bad) {
    const std::vector<StepOutcome> outcomes =
        Run({squares, one.squares, squares}, {good, one.results, good}, 2);
    EXPECT_EQ(outcomes[0].applied, 1u);
    EXPECT_EQ(outcomes[1].applied, 0u);
    EXPECT_EQ(outcomes[2].applied, 0u);
    EXPECT_EQ(outcomes[2].gradient_norm, 5);
    EXPECT_EQ(outcomes[2].loss_sum, 4);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(outcomes[i].step, 5 + i);
      EXPECT_EQ(updates_[i].apply, outcomes[i].applied);
      EXPECT_EQ(updates_[i].step, 5 + i);
      EXPECT_EQ(updates_[i].learning_rate, 0.5f + static_cast<float>(i));
    }
    EXPECT_EQ(updates_[0].gradient_scale, static_cast<float>(ClipScale(5, 2)));
  }
}

// Behind a closed gate the state stays.
TEST_P(GateTest, UpdatesObeyIt) {
  constexpr int64_t kSize = 70;
  const std::vector<float> values = RandomFloats(kSize, 5);
  const auto closed = In(std::vector<StepScalars>{{.step = 3, .learning_rate = 1, .apply = 0}});
  const OptimizerCoefficients momentum{.type = OptimizerType::kMomentum, .momentum = 0.9f};
  const auto gradient = In(values), parameters = In(values), slot = In(values);
  const OptimizerSlots slots{{slot, nullptr, nullptr}};
  const auto pieces = In(std::vector<UpdatePiece>{{0, kSize, 0, 0, 1}});
  const auto rounded = OutOf<uint16_t>(kSize);
  device().OptimizerUpdate(stream(), momentum, kSize, closed, gradient, parameters, slots, rounded);
  device().OptimizerUpdatePieces(stream(), momentum, 1, pieces, closed, gradient, parameters, slots,
                                 rounded);
  EXPECT_TRUE(SameBits(parameters.Read(), values));
  EXPECT_TRUE(SameBits(slot.Read(), values));
  EXPECT_EQ(rounded.Read(), std::vector<uint16_t>(kSize, 77));

  const auto statistics = In(values);
  const auto slices = In(std::vector<StatisticsSlice>{{0, 10, 4, 0, 10, 0.1f}});
  const auto update = [&](const StepScalars* scalars) {
    device().UpdateStatistics(stream(), 1, slices, 10, Leaves(5), gradient, 20, scalars,
                              statistics);
  };
  update(closed);
  EXPECT_TRUE(SameBits(statistics.Read(), values));
  const auto open = In(std::vector<StepScalars>{{.step = 3}});
  update(open);
  EXPECT_FALSE(SameBits(statistics.Read(), values));
}

// Digests of a step are in its place of the ring.
TEST_P(GateTest, DigestsGoToTheirStepsPlace) {
  const auto values = In(RandomFloats(50, 6));
  const auto pieces = In(std::vector<DigestPiece>{{values, 20, 11, 0}, {values + 20, 30, 11, 20}});
  const auto scalars = In(std::vector<StepScalars>{{.step = 7}});
  const auto digests = In(std::vector<Digest>(2 * kRing)), plain = In(std::vector<Digest>(2));
  device().DigestPieces(stream(), 2, pieces, plain, nullptr, 1);
  device().DigestPieces(stream(), 2, pieces, digests, scalars, kRing);
  const std::vector<Digest> expected = plain.Read(), actual = digests.Read();
  EXPECT_NE(expected[0], Digest());
  for (int64_t place = 0; place < kRing; ++place) {
    for (int64_t i = 0; i < 2; ++i) {
      EXPECT_EQ(actual[place * 2 + i], place == 7 % kRing ? expected[i] : Digest());
    }
  }
}

LOCKSTEP_DEVICE_TESTS(GateTest);

}  // namespace
}  // namespace lockstep::device
