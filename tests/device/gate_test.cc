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

std::vector<LeafResult> Results(size_t leaves) {
  std::vector<LeafResult> results;
  for (const float loss : RandomFloats(leaves, 4)) {
    results.push_back({static_cast<double>(loss) / 3.0, static_cast<int64_t>(results.size())});
  }
  return results;
}

class GateTest : public DeviceTest {
 protected:
  // Of one tensor's blocks; or of as many tensors, beside which another's blocks need a level.
  void MakeLevels(size_t blocks, bool alone) {
    groups_.clear();
    gate_.levels = 0;
    if (alone) {
      for (size_t i = 0; i < blocks; ++i) groups_.push_back({static_cast<int32_t>(i), 1});
      gate_.level_groups[gate_.levels++] = static_cast<int32_t>(blocks);
    }
    for (auto left = static_cast<int32_t>(blocks); left > 1;) {
      const size_t before = groups_.size();
      for (int32_t at = 0; at < left; at += kSumGroup) {
        groups_.push_back({at, std::min(kSumGroup, left - at)});
      }
      left = gate_.level_groups[gate_.levels++] = static_cast<int32_t>(groups_.size() - before);
    }
  }

  // From step 5 on, with an open gate: one with each of the gradients, in these blocks.
  std::vector<StepOutcome> Run(const std::vector<std::vector<float>>& gradients,
                               const std::vector<NormBlock>& blocks,
                               const std::vector<std::vector<LeafResult>>& results,
                               double clip_norm, bool alone = false) {
    std::vector<StepScalars> prepared(kRing);
    const auto current = In(std::vector<StepScalars>{{.step = 5}});
    const auto update = In(std::vector<StepScalars>{{}});
    const auto outcomes = In(std::vector<StepOutcome>(kRing));
    const auto notes = In(std::vector<GateNotes>(1));
    MakeLevels(blocks.size(), alone);
    const auto groups = In(groups_);
    const auto blocks_here = In(blocks);
    const auto squares = OutOf<double>(blocks.size());
    gate_.block_count = std::ssize(blocks);
    gate_.blocks = blocks_here;
    gate_.squares = squares;
    gate_.groups = groups;
    gate_.clip_norm = clip_norm;
    gate_.ring = kRing;
    gate_.current = current;
    gate_.update = update;
    gate_.outcomes = outcomes;
    gate_.notes = notes;
    std::vector<StepOutcome> all;
    updates_.clear();
    for (size_t i = 0; i < gradients.size(); ++i) {
      const uint64_t step = 5 + i;
      prepared[step % kRing] = {.step = step, .learning_rate = 0.5f + static_cast<float>(i)};
      const auto prepared_here = In(prepared);
      const auto results_here = In(results[i]);
      const auto gradient = In(gradients[i]);
      gate_.results = results_here;
      gate_.leaves = static_cast<int>(results[i].size());
      gate_.prepared = prepared_here;
      device().Gate(stream(), gate_, {}, gradient);
      all.push_back(outcomes.Read()[step % kRing]);
      updates_.push_back(update.Read()[0]);
      EXPECT_EQ(current.Read()[0].step, step + 1);
      EXPECT_TRUE(SameBits(gradient.Read(), gradients[i]));
    }
    squares_ = squares.Read();
    return all;
  }

  StepGate gate_;
  std::vector<SumGroup> groups_;
  std::vector<StepScalars> updates_;
  std::vector<double> squares_;  // of the last
};

std::vector<NormBlock> BlocksOfOne(size_t count) {
  std::vector<NormBlock> blocks;
  for (size_t i = 0; i < count; ++i) blocks.push_back({static_cast<int64_t>(i), 1});
  return blocks;
}

TEST_P(GateTest, SumsByTheCanonicalTree) {
  const auto expect = [&](size_t blocks, size_t leaves, bool alone = false) {
    const std::vector<float> gradient = RandomFloats(blocks, 3);
    const std::vector<LeafResult> results = Results(leaves);
    std::vector<double> squares, losses;
    for (const float x : gradient) squares.push_back(static_cast<double>(x) * x);
    for (const LeafResult& result : results) losses.push_back(result.loss_sum);
    const StepOutcome outcome = Run({gradient}, BlocksOfOne(blocks), {results}, 0, alone)[0];
    const double norm = blocks == 0 ? 0 : std::sqrt(TreeSum(squares.data(), blocks));
    EXPECT_EQ(outcome.gradient_norm, norm) << blocks;
    EXPECT_EQ(outcome.loss_sum, TreeSum(losses.data(), leaves)) << leaves;
    EXPECT_EQ(outcome.correct, static_cast<int64_t>(leaves * (leaves - 1) / 2));
    EXPECT_EQ(outcome.step, 5u);
    EXPECT_EQ(outcome.applied, 1u);
  };
  for (const size_t blocks : {0, 1, 2, 3, 31, 32, 33, 100, 1024, 1025}) expect(blocks, 8);
  for (const size_t leaves : {1, 2, 3, 7, 31, 32}) expect(5, leaves);
  for (const size_t blocks : {512, 513}) expect(blocks, 8, true);
}

// The same bits as the passes one by one; what is in no block stays.
TEST_P(GateTest, SumsPartsOnTheWay) {
  constexpr int64_t kSize = 2 * kNormBlock + 1100;
  const std::vector<NormBlock> blocks = {{0, kNormBlock},
                                         {kNormBlock, 1001},
                                         {kNormBlock + 1008, 7},
                                         {kNormBlock + 1017, kNormBlock - 1},
                                         {kSize - 60, 60}};
  const std::vector<double> none(blocks.size());
  for (const size_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 24, 29, 64}) {
    for (const size_t lead : {0, 1}) {  // elements behind an aligned address
      if (lead != 0 && count > 8) continue;
      SCOPED_TRACE(std::to_string(count) + " parts, lead " + std::to_string(lead));
      std::vector<Buffer<float>> parts;
      std::vector<const float*> pointers;
      for (size_t p = 0; p < count; ++p) {
        parts.push_back(In(RandomFloats(lead + kSize, static_cast<uint32_t>(100 + p))));
        pointers.push_back(parts.back() + lead);
      }
      const auto expected = Out(lead + kSize), gradient = Out(lead + kSize);
      for (const NormBlock& block : blocks) {
        std::vector<const float*> of_block;
        for (const float* part : pointers) of_block.push_back(part + block.begin);
        device().TreeSum(stream(), block.length, of_block, expected + lead + block.begin);
      }
      const auto blocks_here = In(blocks);
      const auto squares = In(none);
      device().SquaredNormsOf(stream(), std::ssize(blocks), blocks_here, expected + lead, squares);
      const std::vector<float> sums = expected.Read();
      const StepOutcome separate = Run({{sums.begin() + static_cast<int64_t>(lead), sums.end()}},
                                       blocks, {Results(3)}, 0)[0];

      const auto scalars = In(std::vector<StepScalars>(3));
      const auto outcome = In(std::vector<StepOutcome>(1));
      const auto notes = In(std::vector<GateNotes>(1));
      const auto fused_squares = In(none);
      const auto groups = In(groups_);
      const auto of_leaves = In(Results(3));
      gate_.blocks = blocks_here;
      gate_.squares = fused_squares;
      gate_.groups = groups;
      gate_.results = of_leaves;
      gate_.ring = 1;
      gate_.prepared = scalars;
      gate_.current = scalars + 1;
      gate_.update = scalars + 2;
      gate_.outcomes = outcome;
      gate_.notes = notes;
      device().Gate(stream(), gate_, pointers, gradient + lead);
      EXPECT_TRUE(SameBits(gradient.Read(), sums));
      EXPECT_EQ(fused_squares.Read(), squares.Read());
      EXPECT_EQ(squares_, squares.Read());
      EXPECT_EQ(outcome.Read()[0].gradient_norm, separate.gradient_norm);
      EXPECT_EQ(outcome.Read()[0].loss_sum, separate.loss_sum);
    }
  }
}

TEST_P(GateTest, ScalesByTheNormAndStaysClosed) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<LeafResult> good = {{1.5, 2}, {2.5, 3}};
  const std::vector<float> gradient = {3, 4};
  const struct {
    std::vector<float> gradient;
    std::vector<LeafResult> results;
  } bad[] = {{{3, kInfinity}, good},
             {{kNan, 4}, good},
             {gradient, {{1.5, 2}, {kNan, 3}}},
             {gradient, {{kInfinity, 2}, {2.5, 3}}}};
  for (const auto& one : bad) {
    const std::vector<StepOutcome> outcomes =
        Run({gradient, one.gradient, gradient}, BlocksOfOne(2), {good, one.results, good}, 2);
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
    device().UpdateStatistics(stream(), 1, slices, 10, 5, gradient, scalars, statistics);
  };
  update(closed);
  EXPECT_TRUE(SameBits(statistics.Read(), values));
  const auto open = In(std::vector<StepScalars>{{.step = 3}});
  update(open);
  EXPECT_FALSE(SameBits(statistics.Read(), values));
}

// All norms' records at once, as norm by norm.
TEST_P(GateTest, MergesStatisticsOfAllNorms) {
  constexpr int64_t kStride = 80;
  Leaves leaves;
  leaves.count = 5;
  for (int l = 0; l < leaves.count; ++l) leaves.begin[l + 1] = leaves.begin[l] + 3 + l;
  const std::vector<StatisticsSlice> slices = {{0, 10, 4, 0, 10, 0.1f}, {20, 30, 1, 20, 50, 0.3f}};
  const std::vector<float> before = RandomFloats(kStride, 8);
  const auto table = In(slices);
  const auto records = In(RandomFloats(kStride * leaves.count, 9, 0, 1));
  const auto merged = Out(kStride), expected_merged = Out(kStride);
  const auto statistics = In(before), expected = In(before);
  const auto open = In(std::vector<StepScalars>(1));
  device().MergeStatistics(stream(), 2, table, 30, leaves, records, kStride, merged);
  device().UpdateStatistics(stream(), 2, table, 30, leaves.total(), merged, open, statistics);
  const std::vector<float> got = merged.Read();
  for (const StatisticsSlice& s : slices) {
    Leaves elements = leaves;
    for (int64_t& begin : elements.begin) begin *= s.spatial;
    const float* mean = records + s.offset;
    float* const to = expected_merged + s.offset;
    device().MergeLeafMoments(stream(), s.channels, elements, mean, mean + s.channels, kStride, to,
                              to + s.channels);
    device().UpdateRunningAverages(stream(), s.channels, elements.total(), to, to + s.channels,
                                   s.momentum, expected + s.running_mean, expected + s.running_var);
  }
  EXPECT_TRUE(SameBits(got, expected_merged.Read()));
  EXPECT_TRUE(SameBits(statistics.Read(), expected.Read()));
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
