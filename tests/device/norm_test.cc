#include <cmath>
#include <utility>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using NormTest = DeviceTest;

constexpr float kEpsilon = 1e-5f;

// Batch norm in double over {n, channels}.
struct NormReference {
  int64_t channels, n;
  std::vector<double> mean, m2;

  NormReference(int64_t channels, const std::vector<double>& x)
      : channels(channels), n(x.size() / channels), mean(channels, 0.0), m2(channels, 0.0) {
    for (size_t i = 0; i < x.size(); ++i) mean[i % channels] += x[i];
    for (double& value : mean) value /= static_cast<double>(n);
    for (size_t i = 0; i < x.size(); ++i) {
      const double d = x[i] - mean[i % channels];
      m2[i % channels] += d * d;
    }
  }
  double inv_std(int64_t c) const {
    return 1 / std::sqrt(m2[c] / static_cast<double>(n) + kEpsilon);
  }
  std::vector<double> Forward(const std::vector<double>& x, const std::vector<double>& weight,
                              const std::vector<double>& bias, bool relu) const {
    std::vector<double> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const int64_t c = i % channels;
      y[i] = (x[i] - mean[c]) * inv_std(c) * weight[c] + bias[c];
      if (relu && y[i] < 0) y[i] = 0;
    }
    return y;
  }
};

struct NormData {
  int64_t channels, n;
  std::vector<float> x, dy, weight, bias;
  NormData(int64_t channels, int64_t n)
      : channels(channels),
        n(n),
        x(RandomFloats(channels * n, 30, -2, 3)),
        dy(RandomFloats(channels * n, 31)),
        weight(RandomFloats(channels, 32, 0.5, 1.5)),
        bias(RandomFloats(channels, 33)) {}
};

TEST_P(NormTest, MomentsMatchTheReference) {
  for (int64_t channels : kOddSizes) {
    for (int64_t n : {1, 2, 16, 31, 32, 33, 64, 100, 784}) {
      const NormData d(channels, n);
      const auto x = In(d.x), mean = Out(channels), m2 = Out(channels);
      device().BatchNormMoments(stream(), {channels}, n, x, mean, m2);
      const NormReference expected(channels, ToDoubles(d.x));
      EXPECT_TRUE(Near(mean.Read(), expected.mean, 1e-6)) << channels << " channels, " << n;
      EXPECT_TRUE(Near(m2.Read(), expected.m2, 1e-6)) << channels << " channels, " << n;
    }
  }
}

TEST_P(NormTest, MomentsDoNotCancel) {
  // A mean 30,000 times the deviation: sums of squares would keep no correct digit.
  constexpr int64_t kChannels = 19, kN = 5000;
  std::vector<float> x = RandomFloats(kChannels * kN, 34);
  for (float& value : x) value = 20000 + value;
  const auto in = In(x), mean = Out(kChannels), m2 = Out(kChannels);
  device().BatchNormMoments(stream(), {kChannels}, kN, in, mean, m2);
  const NormReference expected(kChannels, ToDoubles(x));
  EXPECT_TRUE(Near(mean.Read(), expected.mean, 1e-7));
  EXPECT_TRUE(Near(m2.Read(), expected.m2, 1e-4));
}

TEST_P(NormTest, ChannelsDoNotDependOnTheirNeighbours) {
  constexpr int64_t kChannels = 117, kN = 70;  // tiles of 64, 32, 16 and 5 channels
  const NormData d(kChannels, kN);
  const auto x = In(d.x), dy = In(d.dy), mean = Out(kChannels), m2 = Out(kChannels);
  const auto sums = Out(kChannels), sums_x = Out(kChannels);
  device().BatchNormMoments(stream(), {kChannels}, kN, x, mean, m2);
  device().BatchNormGradient(stream(), {kChannels}, kN, x, nullptr, dy, nullptr, {mean, m2, 0, kN},
                             kEpsilon, nullptr, sums, sums_x);
  for (int64_t c = 0; c < kChannels; ++c) {
    std::vector<float> one(kN), one_dy(kN);
    for (int64_t i = 0; i < kN; ++i) {
      one[i] = d.x[i * kChannels + c];
      one_dy[i] = d.dy[i * kChannels + c];
    }
    const auto in = In(one), gradient = In(one_dy);
    const auto one_mean = Out(1), one_m2 = Out(1), one_sum = Out(1), one_sum_x = Out(1);
    device().BatchNormMoments(stream(), {1}, kN, in, one_mean, one_m2);
    device().BatchNormGradient(stream(), {1}, kN, in, nullptr, gradient, nullptr,
                               {one_mean, one_m2, 0, kN}, kEpsilon, nullptr, one_sum, one_sum_x);
    ASSERT_EQ(one_mean.Read()[0], mean.Read()[c]);
    ASSERT_EQ(one_m2.Read()[0], m2.Read()[c]);
    ASSERT_EQ(one_sum.Read()[0], sums.Read()[c]);
    ASSERT_EQ(one_sum_x.Read()[0], sums_x.Read()[c]);
  }
}

TEST_P(NormTest, MergedMomentsAreThoseOfTheUnion) {
  for (int64_t channels : kOddSizes) {
    const NormData a(channels, 37), b(channels, 5);
    std::vector<float> shifted = b.x;
    for (float& value : shifted) value += 3;
    const auto in_a = In(a.x), in_b = In(shifted);
    const auto moments = Out(4 * channels);
    const auto at = [&](int64_t i) { return moments + i * channels; };
    device().BatchNormMoments(stream(), {channels}, a.n, in_a, at(0), at(1));
    device().BatchNormMoments(stream(), {channels}, b.n, in_b, at(2), at(3));
    // Records are merged in memory of the host.
    const std::vector<float> records = moments.Read();
    using Record = std::pair<std::vector<float>, std::vector<float>>;  // mean, M2
    const auto record = [&](int64_t i) {
      const auto begin = records.begin() + i * channels;
      return Record({begin, begin + channels}, {begin + channels, begin + 2 * channels});
    };
    const Record of_a = record(0), of_b = record(2);
    Record out = of_a;
    const auto merge = [&](int64_t n_a, const Record& left, int64_t n_b, const Record& right) {
      device().MergeMoments(stream(), channels, n_a, left.first.data(), left.second.data(), n_b,
                            right.first.data(), right.second.data(), out.first.data(),
                            out.second.data());
      return out;
    };
    const Record aliased = merge(a.n, out, b.n, of_b), both = merge(a.n, of_a, b.n, of_b);
    std::vector<double> all = ToDoubles(a.x);
    all.insert(all.end(), shifted.begin(), shifted.end());
    const NormReference expected(channels, all);
    EXPECT_TRUE(Near(both.first, expected.mean, 1e-6));
    EXPECT_TRUE(Near(both.second, expected.m2, 2e-6));
    EXPECT_EQ(aliased, both);
    // Nothing added changes nothing.
    EXPECT_EQ(merge(42, both, 0, of_b), both);
    out = of_a;
    EXPECT_EQ(merge(0, of_b, 42, both), both);
  }
}

TEST_P(NormTest, ForwardMatchesTheReference) {
  for (bool relu : {false, true}) {
    for (int64_t channels : kOddSizes) {
      for (int64_t n : {1, 16, 33, 100}) {
        const NormData d(channels, n);
        const BatchNormShape shape{channels, relu};
        const auto x = In(d.x), weight = In(d.weight), bias = In(d.bias);
        const auto mean = Out(channels), m2 = Out(channels), y = Out(d.x.size());
        device().BatchNormMoments(stream(), shape, n, x, mean, m2);
        device().BatchNormForward(stream(), shape, n, x, {mean, m2, 0, n}, kEpsilon, weight, bias,
                                  nullptr, y);
        const NormReference reference(channels, ToDoubles(d.x));
        // With n = 1 the result is the bias; the deviation is sqrt(epsilon), which magnifies
        // rounding.
        EXPECT_TRUE(
            Near(y.Read(),
                 reference.Forward(ToDoubles(d.x), ToDoubles(d.weight), ToDoubles(d.bias), relu),
                 n == 1 ? 1e-4 : 5e-6));
      }
    }
  }
}

TEST_P(NormTest, InferenceUsesTheRunningAverages) {
  for (int64_t channels : kOddSizes) {
    const NormData d(channels, 9);
    const std::vector<float> running_mean = RandomFloats(channels, 35);
    const std::vector<float> running_var = RandomFloats(channels, 36, 0.5, 2);
    const auto x = In(d.x), weight = In(d.weight), bias = In(d.bias), mean = In(running_mean),
               variance = In(running_var), y = Out(d.x.size());
    device().BatchNormForward(stream(), {channels, false}, d.n, x, {mean, variance, 0, 1}, kEpsilon,
                              weight, bias, nullptr, y);
    std::vector<double> expected(d.x.size());
    for (size_t i = 0; i < d.x.size(); ++i) {
      const int64_t c = i % channels;
      expected[i] = (d.x[i] - static_cast<double>(running_mean[c])) /
                        std::sqrt(running_var[c] + static_cast<double>(kEpsilon)) * d.weight[c] +
                    d.bias[c];
    }
    EXPECT_TRUE(Near(y.Read(), expected, 1e-6));
  }
}

TEST_P(NormTest, ForwardGivesTheSameBitsForAnyCutOfRows) {
  constexpr int64_t kChannels = 35, kN = 20;
  const NormData d(kChannels, kN);
  const BatchNormShape shape{kChannels, true};
  const auto x = In(d.x), weight = In(d.weight), bias = In(d.bias);
  const auto mean = Out(kChannels), m2 = Out(kChannels), whole = Out(d.x.size()),
             cut = Out(d.x.size());
  device().BatchNormMoments(stream(), shape, kN, x, mean, m2);
  device().BatchNormForward(stream(), shape, kN, x, {mean, m2, 0, kN}, kEpsilon, weight, bias,
                            nullptr, whole);
  for (int64_t at = 0; at <= kN; ++at) {
    const int64_t offset = at * kChannels;
    device().BatchNormForward(stream(), shape, at, x, {mean, m2, 0, kN}, kEpsilon, weight, bias,
                              nullptr, cut);
    device().BatchNormForward(stream(), shape, kN - at, x + offset, {mean, m2, 0, kN}, kEpsilon,
                              weight, bias, nullptr, cut + offset);
    ASSERT_TRUE(SameBits(cut.Read(), whole.Read())) << "cut at " << at;
  }
}

TEST_P(NormTest, BackwardMatchesFiniteDifferences) {
  for (bool relu : {false, true}) {
    for (int64_t channels : {1, 3, 17}) {
      constexpr int64_t kN = 12;
      const NormData d(channels, kN);
      const BatchNormShape shape{channels, relu};
      const auto x = In(d.x), dy = In(d.dy), weight = In(d.weight), bias = In(d.bias);
      const auto mean = Out(channels), m2 = Out(channels), y = Out(d.x.size()),
                 dx = Out(d.x.size());
      const auto sum_dy = Out(channels), sum_dy_xhat = Out(channels);
      device().BatchNormMoments(stream(), shape, kN, x, mean, m2);
      device().BatchNormForward(stream(), shape, kN, x, {mean, m2, 0, kN}, kEpsilon, weight, bias,
                                nullptr, y);
      device().BatchNormGradient(stream(), shape, kN, x, y, dy, nullptr, {mean, m2, 0, kN},
                                 kEpsilon, nullptr, sum_dy, sum_dy_xhat);
      device().BatchNormBackward(stream(), shape, kN, x, y, dy, {mean, m2, 0, kN}, kEpsilon, weight,
                                 sum_dy, sum_dy_xhat, 0, dx);
      const std::vector<double> at_x = ToDoubles(d.x), at_weight = ToDoubles(d.weight),
                                at_bias = ToDoubles(d.bias);
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) {
            return Dot(NormReference(channels, at).Forward(at, at_weight, at_bias, relu), d.dy);
          },
          at_x, dx.Read()));
      const NormReference reference(channels, at_x);
      // The sums are the gradients of bias and weight.
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) {
            return Dot(reference.Forward(at_x, at_weight, at, relu), d.dy);
          },
          at_bias, sum_dy.Read()));
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) {
            return Dot(reference.Forward(at_x, at, at_bias, relu), d.dy);
          },
          at_weight, sum_dy_xhat.Read()));
    }
  }
}

TEST_P(NormTest, BackwardMatchesTheReference) {
  for (bool relu : {false, true}) {
    for (int64_t channels : kOddSizes) {
      for (int64_t n : {31, 64, 301}) {
        const NormData d(channels, n);
        const BatchNormShape shape{channels, relu};
        const auto x = In(d.x), dy = In(d.dy), weight = In(d.weight), bias = In(d.bias);
        const auto mean = Out(channels), m2 = Out(channels), y = Out(d.x.size()),
                   dx = Out(d.x.size());
        const auto sum_dy = Out(channels), sum_dy_xhat = Out(channels);
        device().BatchNormMoments(stream(), shape, n, x, mean, m2);
        device().BatchNormForward(stream(), shape, n, x, {mean, m2, 0, n}, kEpsilon, weight, bias,
                                  nullptr, y);
        device().BatchNormGradient(stream(), shape, n, x, y, dy, nullptr, {mean, m2, 0, n},
                                   kEpsilon, nullptr, sum_dy, sum_dy_xhat);
        device().BatchNormBackward(stream(), shape, n, x, y, dy, {mean, m2, 0, n}, kEpsilon, weight,
                                   sum_dy, sum_dy_xhat, 0, dx);
        const NormReference r(channels, ToDoubles(d.x));
        const std::vector<float> mask = y.Read();
        std::vector<double> g(d.x.size()), sum(channels, 0.0), sum_x(channels, 0.0),
            expected(d.x.size());
        for (size_t i = 0; i < d.x.size(); ++i) {
          const int64_t c = i % channels;
          g[i] = relu && !(mask[i] > 0) ? 0.0 : d.dy[i];
          sum[c] += g[i];
          sum_x[c] += g[i] * (d.x[i] - r.mean[c]) * r.inv_std(c);
        }
        for (size_t i = 0; i < d.x.size(); ++i) {
          const int64_t c = i % channels;
          const double xhat = (d.x[i] - r.mean[c]) * r.inv_std(c), count = static_cast<double>(n);
          expected[i] =
              d.weight[c] * r.inv_std(c) * (g[i] - sum[c] / count - xhat * sum_x[c] / count);
        }
        EXPECT_TRUE(Near(sum_dy.Read(), sum, 3e-6));
        EXPECT_TRUE(Near(sum_dy_xhat.Read(), sum_x, 3e-6));
        EXPECT_TRUE(Near(dx.Read(), expected, 3e-6));
      }
    }
  }
}

// One pass gives what BatchNormForward, Add and ReluForward give, also over its inputs.
TEST_P(NormTest, AddForwardGivesTheBitsOfThreePasses) {
  for (bool relu : {false, true}) {
    for (int64_t channels : kOddSizes) {
      constexpr int64_t kN = 37;
      const NormData d(channels, kN);
      const BatchNormShape shape{channels, relu}, plain{channels, false};
      const std::vector<float> other = RandomFloats(d.x.size(), 51, -2, 2);
      const auto x = In(d.x), weight = In(d.weight), bias = In(d.bias), residual = In(other),
                 var = In(RandomFloats(channels, 52, 0.5f, 2));
      const auto mean = Out(channels), m2 = Out(channels), apart = Out(d.x.size()),
                 fused = Out(d.x.size());
      device().BatchNormMoments(stream(), shape, kN, x, mean, m2);
      for (bool inference : {false, true}) {
        const auto over_x = In(d.x), over_residual = In(other);
        const auto run = [&](const float* from, const float* added, float* to) {
          if (inference) {
            device().BatchNormForward(stream(), shape, kN, from, {mean, var, 0, 1}, kEpsilon,
                                      weight, bias, added, to);
          } else {
            device().BatchNormForward(stream(), shape, kN, from, {mean, m2, 0, kN}, kEpsilon,
                                      weight, bias, added, to);
          }
        };
        if (inference) {
          device().BatchNormForward(stream(), plain, kN, x, {mean, var, 0, 1}, kEpsilon, weight,
                                    bias, nullptr, apart);
        } else {
          device().BatchNormForward(stream(), plain, kN, x, {mean, m2, 0, kN}, kEpsilon, weight,
                                    bias, nullptr, apart);
        }
        const auto n = static_cast<int64_t>(d.x.size());
        device().Add(stream(), n, apart, residual, apart);
        if (relu) device().ReluForward(stream(), n, apart, apart);
        run(x, residual, fused);
        run(over_x, residual, over_x);
        run(x, over_residual, over_residual);
        ASSERT_TRUE(SameBits(fused.Read(), apart.Read()));
        ASSERT_TRUE(SameBits(over_x.Read(), apart.Read()));
        ASSERT_TRUE(SameBits(over_residual.Read(), apart.Read()));
      }
    }
  }
}

// The gradient is that of Add and ReluBackward, the sums are its sums; also over its inputs.
TEST_P(NormTest, GradientMatchesSeparatePasses) {
  for (bool relu : {false, true}) {
    for (bool two : {false, true}) {
      for (int64_t channels : kOddSizes) {
        for (int64_t n : {1, 31, 301}) {
          const NormData d(channels, n);
          const BatchNormShape shape{channels, relu};
          const auto size = static_cast<int64_t>(d.x.size());
          const std::vector<float> second = RandomFloats(d.x.size(), 53),
                                   output = RandomFloats(d.x.size(), 54);
          const auto x = In(d.x), dy = In(d.dy), more = In(second), y = In(output);
          const auto mean = Out(channels), m2 = Out(channels), g = Out(d.x.size()),
                     apart = Out(d.x.size()), sum_dy = Out(channels), sum_dy_xhat = Out(channels);
          device().BatchNormMoments(stream(), shape, n, x, mean, m2);
          const auto run = [&](const float* from, const float* a, const float* b, float* to) {
            device().BatchNormGradient(stream(), shape, n, from, relu ? y.data() : nullptr, a,
                                       two ? b : nullptr, {mean, m2, 0, n}, kEpsilon, to, sum_dy,
                                       sum_dy_xhat);
          };
          device().Copy(stream(), dy.data(), apart.data(), d.x.size() * sizeof(float));
          if (two) device().Add(stream(), size, apart, more, apart);
          if (relu) device().ReluBackward(stream(), size, y, apart, apart);
          run(x, dy, more, g);
          const std::vector<float> expected = apart.Read(), sums = sum_dy.Read(),
                                   sums_x = sum_dy_xhat.Read();
          ASSERT_TRUE(SameBits(g.Read(), expected));
          const NormReference r(channels, ToDoubles(d.x));
          std::vector<double> sum(channels, 0.0), sum_x(channels, 0.0);
          for (size_t i = 0; i < d.x.size(); ++i) {
            const int64_t c = i % channels;
            sum[c] += expected[i];
            sum_x[c] += expected[i] * (d.x[i] - r.mean[c]) * r.inv_std(c);
          }
          EXPECT_TRUE(Near(sums, sum, 3e-6));
          EXPECT_TRUE(Near(sums_x, sum_x, 2e-5));  // up to 301 terms that cancel
          const auto over_x = In(d.x), over_dy = In(d.dy), over_more = In(second);
          run(over_x, dy, more, over_x);
          ASSERT_TRUE(SameBits(over_x.Read(), expected));
          ASSERT_TRUE(SameBits(sum_dy_xhat.Read(), sums_x));
          run(x, over_dy, more, over_dy);
          ASSERT_TRUE(SameBits(over_dy.Read(), expected));
          if (!two) continue;
          run(x, dy, over_more, over_more);
          ASSERT_TRUE(SameBits(over_more.Read(), expected));
        }
      }
    }
  }
}

TEST_P(NormTest, BackwardMayLieOverItsInputs) {
  constexpr int64_t kChannels = 35, kN = 37;
  const NormData d(kChannels, kN);
  const BatchNormShape shape{kChannels, true};
  const std::vector<float> output = RandomFloats(d.x.size(), 55);
  const auto weight = In(d.weight);
  auto x = In(d.x), y = In(output), dy = In(d.dy);
  const auto mean = Out(kChannels), m2 = Out(kChannels), sum_dy = Out(kChannels),
             sum_dy_xhat = Out(kChannels), dx = Out(d.x.size());
  device().BatchNormMoments(stream(), shape, kN, x, mean, m2);
  device().BatchNormGradient(stream(), shape, kN, x, y, dy, nullptr, {mean, m2, 0, kN}, kEpsilon,
                             nullptr, sum_dy, sum_dy_xhat);
  const auto run = [&](const float* a, const float* b, const float* c, float* to) {
    device().BatchNormBackward(stream(), shape, kN, a, b, c, {mean, m2, 0, kN}, kEpsilon, weight,
                               sum_dy, sum_dy_xhat, 0, to);
  };
  run(x, y, dy, dx);
  const std::vector<float> expected = dx.Read();
  run(x, y, dy, dy);
  EXPECT_TRUE(SameBits(dy.Read(), expected));
  dy.Write(d.dy);
  run(x, y, dy, y);
  EXPECT_TRUE(SameBits(y.Read(), expected));
  y.Write(output);
  run(x, y, dy, x);
  EXPECT_TRUE(SameBits(x.Read(), expected));
}

TEST_P(NormTest, RunningAveragesFollowTheUnbiasedVariance) {
  for (int64_t channels : kOddSizes) {
    for (int64_t n : {1, 2, 100}) {
      const std::vector<float> mean = RandomFloats(channels, 37),
                               m2 = RandomFloats(channels, 38, 0, 50);
      const std::vector<float> old_mean = RandomFloats(channels, 39),
                               old_var = RandomFloats(channels, 40);
      const auto in_mean = In(mean), in_m2 = In(m2), running_mean = In(old_mean),
                 running_var = In(old_var);
      device().UpdateRunningAverages(stream(), channels, n, in_mean, in_m2, 0.1f, running_mean,
                                     running_var);
      std::vector<double> expected_mean(channels), expected_var(channels);
      const double rate = 0.1f;
      for (int64_t c = 0; c < channels; ++c) {
        const double variance = m2[c] / static_cast<double>(n > 1 ? n - 1 : 1);
        expected_mean[c] = old_mean[c] + rate * (static_cast<double>(mean[c]) - old_mean[c]);
        expected_var[c] = old_var[c] + rate * (variance - old_var[c]);
      }
      EXPECT_TRUE(Near(running_mean.Read(), expected_mean, 3e-7));
      EXPECT_TRUE(Near(running_var.Read(), expected_var, 3e-7));
    }
  }
}

LOCKSTEP_DEVICE_TESTS(NormTest);

}  // namespace
}  // namespace lockstep::device
