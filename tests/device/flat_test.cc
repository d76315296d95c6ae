#include <algorithm>
#include <cmath>
#include <limits>

#include "common/digest.h"
#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using FlatTest = DeviceTest;

const OptimizerCoefficients kOptimizers[] = {
    {.type = OptimizerType::kSgd},
    {.type = OptimizerType::kSgd, .l2 = 0.01f, .weight_decay = 0.1f},
    {.type = OptimizerType::kMomentum, .momentum = 0.9f, .l2 = 0.01f},
    {.type = OptimizerType::kNesterov, .momentum = 0.9f, .l2 = 0.01f, .weight_decay = 0.1f},
    {.type = OptimizerType::kAdam, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f},
    {.type = OptimizerType::kAdam,
     .beta1 = 0.8f,
     .beta2 = 0.99f,
     .epsilon = 1e-4f,
     .l2 = 0.02f,
     .weight_decay = 0.05f},
    {.type = OptimizerType::kAdagrad, .epsilon = 1e-10f, .l2 = 0.02f},
    {.type = OptimizerType::kAdadelta, .rho = 0.9f, .epsilon = 1e-3f, .weight_decay = 0.05f},
    {.type = OptimizerType::kRmsProp, .rho = 0.99f, .epsilon = 1e-8f, .weight_decay = 0.05f},
    {.type = OptimizerType::kRmsPropMomentum, .momentum = 0.9f, .rho = 0.9f, .epsilon = 1e-4f},
    {.type = OptimizerType::kRmsPropCentered, .rho = 0.9f, .epsilon = 0.1f, .l2 = 0.02f},
    {.type = OptimizerType::kRmsPropCenteredMomentum,
     .momentum = 0.8f,
     .rho = 0.95f,
     .epsilon = 0.1f,
     .rate_multiplier = 0.5f},
    {.type = OptimizerType::kNesterov,
     .momentum = 0.9f,
     .clip_value = 0.2f,
     .l2 = 0.01f,
     .weight_decay = 0.1f,
     .rate_multiplier = 3.0f},
};

// Moments are in [0, 1) where the type divides by their root; a centered variance is above zero.
struct State {
  std::vector<float> gradient, parameters, slots[kMostSlots];
  State(OptimizerType type, int64_t n)
      : gradient(RandomFloats(n, 60)), parameters(RandomFloats(n, 61)) {
    using Type = OptimizerType;
    const bool signed_first =
        type == Type::kMomentum || type == Type::kNesterov || type == Type::kAdam;
    const bool centered = type == Type::kRmsPropCentered || type == Type::kRmsPropCenteredMomentum;
    slots[0] = RandomFloats(n, 62, signed_first ? -1 : centered ? 0.3f : 0, 1);
    slots[1] = RandomFloats(n, 63, centered ? -0.5f : 0, centered ? 0.5f : 1);
    slots[2] = RandomFloats(n, 64);
  }
};

const StepScalars kScalars{.step = 4,
                           .learning_rate = 0.05f,
                           .adam_correction1 = 0.3439f,
                           .adam_correction2 = 0.004f,
                           .gradient_scale = 0.7f};

// The update in double.
void Reference(const OptimizerCoefficients& c, const StepScalars& s, double g, double& w, double& a,
               double& b, double& d) {
  const double rate = static_cast<double>(s.learning_rate) * c.rate_multiplier;
  g = std::clamp<double>(g * s.gradient_scale, -c.clip_value, c.clip_value);
  g += static_cast<double>(c.l2) * w;
  w -= rate * c.weight_decay * w;
  switch (c.type) {
    case OptimizerType::kSgd:
      w -= rate * g;
      break;
    case OptimizerType::kMomentum:
      a = c.momentum * a + g;
      w -= rate * a;
      break;
    case OptimizerType::kNesterov:
      a = c.momentum * a + g;
      w -= rate * (g + c.momentum * a);
      break;
    case OptimizerType::kAdam:
      a = c.beta1 * a + (1.0 - c.beta1) * g;
      b = c.beta2 * b + (1.0 - c.beta2) * g * g;
      w -= rate * (a / s.adam_correction1) / (std::sqrt(b / s.adam_correction2) + c.epsilon);
      break;
    case OptimizerType::kAdagrad:
      a += g * g;
      w -= rate * g / (std::sqrt(a) + c.epsilon);
      break;
    case OptimizerType::kAdadelta: {
      a = c.rho * a + (1.0 - c.rho) * g * g;
      const double step = std::sqrt(b + c.epsilon) / std::sqrt(a + c.epsilon) * g;
      b = c.rho * b + (1.0 - c.rho) * step * step;
      w -= rate * step;
      break;
    }
    case OptimizerType::kRmsProp:
      a = c.rho * a + (1.0 - c.rho) * g * g;
      w -= rate * g / (std::sqrt(a) + c.epsilon);
      break;
    case OptimizerType::kRmsPropMomentum:
      a = c.rho * a + (1.0 - c.rho) * g * g;
      b = c.momentum * b + g / (std::sqrt(a) + c.epsilon);
      w -= rate * b;
      break;
    case OptimizerType::kRmsPropCentered:
    case OptimizerType::kRmsPropCenteredMomentum: {
      a = c.rho * a + (1.0 - c.rho) * g * g;
      b = c.rho * b + (1.0 - c.rho) * g;
      double step = g / (std::sqrt(a - b * b) + c.epsilon);
      if (c.type == OptimizerType::kRmsPropCenteredMomentum) step = d = c.momentum * d + step;
      w -= rate * step;
      break;
    }
  }
}

// The slots that the type has, from element `at` on.
OptimizerSlots SlotsAt(OptimizerType type, float* a, float* b, float* d, int64_t at) {
  OptimizerSlots slots;
  float* const all[kMostSlots] = {a, b, d};
  for (int i = 0; i < SlotCount(type); ++i) slots.at[i] = all[i] + at;
  return slots;
}

TEST_P(FlatTest, OptimizersMatchTheReference) {
  const auto scalars = In(std::vector<StepScalars>{kScalars});
  for (const OptimizerCoefficients& c : kOptimizers) {
    for (int64_t n : kOddSizes) {
      const State state(c.type, n);
      const auto gradient = In(state.gradient), parameters = In(state.parameters);
      const auto a = In(state.slots[0]), b = In(state.slots[1]), d = In(state.slots[2]);
      device().OptimizerUpdate(stream(), c, n, scalars, gradient, parameters,
                               SlotsAt(c.type, a, b, d, 0));
      std::vector<double> w = ToDoubles(state.parameters), wa = ToDoubles(state.slots[0]),
                          wb = ToDoubles(state.slots[1]), wd = ToDoubles(state.slots[2]);
      for (int64_t i = 0; i < n; ++i) {
        Reference(c, kScalars, state.gradient[i], w[i], wa[i], wb[i], wd[i]);
      }
      const int type = static_cast<int>(c.type);
      EXPECT_TRUE(Near(parameters.Read(), w, 1e-6)) << type;
      EXPECT_TRUE(Near(a.Read(), wa, 3e-7)) << type;
      // Adadelta's step and RMSProp's momentum pass through a root and a quotient.
      EXPECT_TRUE(Near(b.Read(), wb, c.type == OptimizerType::kAdam ? 3e-7 : 3e-6)) << type;
      EXPECT_TRUE(Near(d.Read(), wd, 3e-6)) << type;
    }
  }
}

TEST_P(FlatTest, AnyCutOfAnUpdateGivesTheSameBits) {
  const auto scalars = In(std::vector<StepScalars>{kScalars});
  constexpr int64_t kSize = 70;
  for (const OptimizerCoefficients& c : kOptimizers) {
    const State state(c.type, kSize);
    const auto gradient = In(state.gradient);
    const auto update = [&](int64_t at, float* w, const OptimizerSlots& slots, int64_t n) {
      device().OptimizerUpdate(stream(), c, n, scalars, gradient + at, w + at, slots);
    };
    const auto w = In(state.parameters);
    const auto a = In(state.slots[0]), b = In(state.slots[1]), d = In(state.slots[2]);
    update(0, w, SlotsAt(c.type, a, b, d, 0), kSize);
    for (int64_t at = 0; at <= kSize; ++at) {
      const auto w2 = In(state.parameters);
      const auto a2 = In(state.slots[0]), b2 = In(state.slots[1]), d2 = In(state.slots[2]);
      update(at, w2, SlotsAt(c.type, a2, b2, d2, at), kSize - at);
      update(0, w2, SlotsAt(c.type, a2, b2, d2, 0), at);
      ASSERT_TRUE(SameBits(w2.Read(), w.Read())) << "cut at " << at;
      ASSERT_TRUE(SameBits(a2.Read(), a.Read())) << "cut at " << at;
      ASSERT_TRUE(SameBits(b2.Read(), b.Read())) << "cut at " << at;
      ASSERT_TRUE(SameBits(d2.Read(), d.Read())) << "cut at " << at;
    }
  }
}

// Beside the parameters, wherever either lies: the bits that RoundToBf16 makes of them, and nothing
// else; with and without it, the same parameters and slots.
TEST_P(FlatTest, UpdatesRoundTheParameters) {
  const auto scalars = In(std::vector<StepScalars>{kScalars});
  constexpr uint16_t kUntouched = 77;
  for (const OptimizerCoefficients& c : kOptimizers) {
    for (const int64_t n : kOddSizes) {
      for (const auto& [lead, rounded_lead] :
           {std::pair<int64_t, int64_t>(0, 0), {3, 3}, {1, 5}, {0, 1}, {2, 0}, {4, 4}}) {
        const int64_t size = lead + n, rounded_size = rounded_lead + n + 3;
        SCOPED_TRACE("type " + std::to_string(static_cast<int>(c.type)) + ", " + std::to_string(n) +
                     " from " + std::to_string(lead) + " and " + std::to_string(rounded_lead));
        const State state(c.type, size);
        const auto in = [&](const std::vector<float>& values) {
          return In(values, Guard::kBefore);
        };
        const auto gradient = in(state.gradient), w = in(state.parameters),
                   plain = in(state.parameters);
        const auto a = in(state.slots[0]), b = in(state.slots[1]), d = in(state.slots[2]),
                   a2 = in(state.slots[0]), b2 = in(state.slots[1]), d2 = in(state.slots[2]);
        const auto rounded = In(std::vector<uint16_t>(rounded_size, kUntouched), Guard::kBefore);
        device().OptimizerUpdate(stream(), c, n, scalars, gradient + lead, w + lead,
                                 SlotsAt(c.type, a, b, d, lead), rounded + rounded_lead);
        device().OptimizerUpdate(stream(), c, n, scalars, gradient + lead, plain + lead,
                                 SlotsAt(c.type, a2, b2, d2, lead));
        ASSERT_TRUE(SameBits(w.Read(), plain.Read()));
        ASSERT_TRUE(SameBits(a.Read(), a2.Read()));
        ASSERT_TRUE(SameBits(b.Read(), b2.Read()));
        ASSERT_TRUE(SameBits(d.Read(), d2.Read()));
        const auto of_new = OutOf<uint16_t>(n);
        device().RoundToBf16(stream(), n, plain + lead, of_new);
        std::vector<uint16_t> expected(rounded_lead, kUntouched);
        const std::vector<uint16_t> bits = of_new.Read();
        expected.insert(expected.end(), bits.begin(), bits.end());
        expected.resize(rounded_size, kUntouched);
        ASSERT_EQ(rounded.Read(), expected);
      }
    }
  }
}

TEST_P(FlatTest, UpdatesOfPiecesRoundTheParameters) {
  const auto scalars = In(std::vector<StepScalars>{kScalars});
  constexpr int64_t kSize = 1100;
  // Of a vector of which elements 3 and 41 to 43 are in none.
  const std::vector<UpdatePiece> pieces = {
      {0, 3, 0, 0, 1}, {4, 41, 0.01f, 0, 1}, {44, 1093, 0, 0.1f, 2}, {1093, kSize, 0, 0, 1}};
  const auto table = In(pieces);
  for (const OptimizerCoefficients& c : kOptimizers) {
    const State state(c.type, kSize);
    const auto in = [&](const std::vector<float>& values) { return In(values, Guard::kBefore); };
    const auto gradient = in(state.gradient), w = in(state.parameters), a = in(state.slots[0]),
               b = in(state.slots[1]), d = in(state.slots[2]);
    const auto rounded = In(std::vector<uint16_t>(kSize, 77), Guard::kBefore);
    device().OptimizerUpdatePieces(stream(), c, std::ssize(pieces), table, scalars, gradient, w,
                                   SlotsAt(c.type, a, b, d, 0), rounded);
    std::vector<uint16_t> expected = InBf16(w).Read();
    for (const int64_t none : {3, 41, 42, 43}) expected[none] = 77;
    EXPECT_EQ(rounded.Read(), expected) << static_cast<int>(c.type);
  }
}

TEST_P(FlatTest, RoundsToTheNearestBf16) {
  for (const int64_t n : kOddSizes) {
    for (const int64_t lead : {0, 1, 2, 5, 8}) {
      std::vector<float> x = RandomFloats(lead + n, 66, -3, 3);
      x[lead] = 0x1.01p0f;  // between two, the lower even
      if (n > 1) x[lead + 1] = 0x1.03p0f;
      if (n > 2) x[lead + 2] = -std::numeric_limits<float>::infinity();
      const auto in = In(x, Guard::kBefore);
      const auto out = In(std::vector<uint16_t>(lead + n + 1, 77), Guard::kBefore);
      device().RoundToBf16(stream(), n, in + lead, out + lead);
      std::vector<uint16_t> expected(lead + n + 1, 77);
      for (int64_t i = lead; i < lead + n; ++i) {
        const float nearest = std::isfinite(x[i]) ? RoundedToBf16(x[i]) : x[i];
        uint32_t bits;
        std::memcpy(&bits, &nearest, sizeof(bits));
        expected[i] = static_cast<uint16_t>(bits >> 16);
      }
      EXPECT_EQ(out.Read(), expected) << n << " from " << lead;
    }
  }
  const auto nan = In(std::vector<float>(20, std::numeric_limits<float>::quiet_NaN()));
  for (const uint16_t bits : InBf16(nan).Read()) EXPECT_GT(bits & 0x7FFF, 0x7F80);
}

// With a constant gradient the mean of squares and the square of the mean differ by roundings
// alone, in either direction.
TEST_P(FlatTest, ACenteredVarianceIsNeverBelowZero) {
  const auto scalars = In(std::vector<StepScalars>{kScalars});
  for (const OptimizerType type :
       {OptimizerType::kRmsPropCentered, OptimizerType::kRmsPropCenteredMomentum}) {
    const OptimizerCoefficients c{.type = type, .momentum = 0.5f, .rho = 0.7f, .epsilon = 1.0f};
    constexpr int64_t kSize = 200;
    const auto gradient = In(RandomFloats(kSize, 65)), w = In(std::vector<float>(kSize));
    const auto a = In(std::vector<float>(kSize)), b = In(std::vector<float>(kSize)),
               d = In(std::vector<float>(kSize));
    for (int step = 0; step < 100; ++step) {
      device().OptimizerUpdate(stream(), c, kSize, scalars, gradient, w, SlotsAt(type, a, b, d, 0));
    }
    int below = 0;
    for (int64_t i = 0; i < kSize; ++i) {
      below += std::fma(-b.Read()[i], b.Read()[i], a.Read()[i]) < 0;
      ASSERT_TRUE(std::isfinite(w.Read()[i])) << i;
    }
    EXPECT_GT(below, 0) << "the test must reach what it is about";
  }
}

TEST_P(FlatTest, SquaredNormsMatchTheReference) {
  for (int64_t n : {1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 8192, 9000}) {
    const std::vector<float> x = RandomFloats(n, 68);
    const auto in = In(x);
    const auto sums = OutOf<double>((n + kNormBlock - 1) / kNormBlock);
    device().SquaredNorms(stream(), n, in, sums);
    const std::vector<double> actual = sums.Read();
    for (size_t b = 0; b < actual.size(); ++b) {
      double expected = 0;
      for (int64_t i = b * kNormBlock; i < std::min<int64_t>(n, (b + 1) * kNormBlock); ++i) {
        expected += double{x[i]} * x[i];
      }
      EXPECT_NEAR(actual[b], expected, 1e-13 * expected) << b << " of " << n;
    }
  }
}

TEST_P(FlatTest, ABlocksNormHasTheSameBitsWhereverTheCallBegins) {
  constexpr int64_t kBlocks = 3, kSize = 2 * kNormBlock + 777;
  const std::vector<float> x = RandomFloats(kSize + 1, 69);
  const auto whole = OutOf<double>(kBlocks), parts = OutOf<double>(kBlocks);
  device().SquaredNorms(stream(), kSize, In(x), whole);
  const std::vector<float> shifted(x.begin(), x.end() - 1);
  const auto in = In(shifted);
  for (int64_t b = 0; b < kBlocks; ++b) {
    const int64_t begin = b * kNormBlock;
    device().SquaredNorms(stream(), std::min(kNormBlock, kSize - begin), in + begin, parts + b);
  }
  EXPECT_EQ(parts.Read(), whole.Read());
}

TEST_P(FlatTest, ANormIsFiniteExactlyWhereItsBlockIs) {
  constexpr float kBad[] = {std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()};
  for (const int64_t size : {int64_t{70}, kNormBlock}) {
    const int64_t n = kNormBlock + size;
    std::vector<float> x(n, std::numeric_limits<float>::max());
    const auto sums = OutOf<double>(2);
    device().SquaredNorms(stream(), n, In(x), sums);
    for (double sum : sums.Read()) EXPECT_TRUE(std::isfinite(sum));
    for (int64_t at = n - size; at < n; at += size < 100 ? 1 : 101) {
      x[at] = kBad[at % 3];
      device().SquaredNorms(stream(), n, In(x), sums);
      EXPECT_TRUE(std::isfinite(sums.Read()[0]));
      EXPECT_FALSE(std::isfinite(sums.Read()[1])) << at << " of " << n;
      x[at] = std::numeric_limits<float>::max();
    }
  }
}

TEST_P(FlatTest, FlagsEachNonFiniteElement) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    for (int64_t n : {1, 15, 16, 17, 50}) {
      const auto flag = In(std::vector<uint32_t>{2});
      const std::vector<float> fine(n, std::numeric_limits<float>::max());
      const auto in = In(fine);
      device().FlagNonFinite(stream(), n, in, flag);
      EXPECT_EQ(flag.Read()[0], 2u) << "nothing to flag";
      for (int64_t at = 0; at < n; ++at) {
        std::vector<float> x = fine;
        x[at] = bad;
        const auto one_bad = In(x);
        const auto raised = In(std::vector<uint32_t>{2});
        device().FlagNonFinite(stream(), n, one_bad, raised);
        ASSERT_EQ(raised.Read()[0], 3u) << bad << " at " << at << " of " << n;
      }
    }
  }
}

Digest DigestReference(const std::vector<float>& x, uint64_t key, uint64_t first) {
  Digest digest{.lo = 0xfffffffffffffff0ull, .hi = 5};  // the next addition carries
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], sizeof(bits));
    digest += MixElement(key, first + i, bits);
  }
  return digest;
}

TEST_P(FlatTest, DigestMatchesTheScalarSum) {
  for (int64_t n : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000}) {
    std::vector<float> x = RandomFloats(n, 64);
    if (n > 2) x[1] = -0.0f, x[2] = std::numeric_limits<float>::quiet_NaN();
    const auto in = In(x);
    for (uint64_t first : {uint64_t{0}, uint64_t{13}, uint64_t{1} << 33, ~uint64_t{0} - 5}) {
      const auto digest = In(std::vector<Digest>{{.lo = 0xfffffffffffffff0ull, .hi = 5}});
      device().AccumulateDigest(stream(), n, in, 0x0123456789abcdefull, first, digest);
      EXPECT_EQ(digest.Read()[0], DigestReference(x, 0x0123456789abcdefull, first))
          << n << " " << first;
    }
  }
}

TEST_P(FlatTest, DigestIsTheSameForAnyCut) {
  constexpr int64_t kSize = 80;
  const std::vector<float> x = RandomFloats(kSize, 65);
  const auto in = In(x);
  const auto whole = In(std::vector<Digest>(1));
  device().AccumulateDigest(stream(), kSize, in, 99, 1000, whole);
  for (int64_t at = 0; at <= kSize; ++at) {
    const auto cut = In(std::vector<Digest>(1));
    device().AccumulateDigest(stream(), kSize - at, in + at, 99, 1000 + at, cut);
    device().AccumulateDigest(stream(), at, in, 99, 1000, cut);
    ASSERT_EQ(cut.Read()[0], whole.Read()[0]) << "cut at " << at;
  }
}

LOCKSTEP_DEVICE_TESTS(FlatTest);

}  // namespace
}  // namespace lockstep::device
