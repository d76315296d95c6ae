// Maps with a parameter, softmax, layer norm and embedding against double references and finite
// differences, between guards.
#include <cmath>
#include <limits>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using MapsTest = DeviceTest;

struct Map {
  const char* name;
  std::function<void(Device&, Stream&, int64_t, const float*, float*)> forward;
  // `from_x`: backward reads x instead of y.
  std::function<void(Device&, Stream&, int64_t, const float*, const float*, float*)> backward;
  bool from_x;
  std::function<double(double)> reference;
};

const Map kMaps[] = {
    {"leaky_relu",
     [](Device& d, Stream& s, int64_t n, const float* x, float* y) {
       d.LeakyReluForward(s, n, 0.25f, x, y);
     },
     [](Device& d, Stream& s, int64_t n, const float* y, const float* dy, float* dx) {
       d.LeakyReluBackward(s, n, 0.25f, y, dy, dx);
     },
     false, [](double x) { return x < 0 ? 0.25 * x : x; }},
    {"elu",
     [](Device& d, Stream& s, int64_t n, const float* x, float* y) {
       d.EluForward(s, n, 1.5f, x, y);
     },
     [](Device& d, Stream& s, int64_t n, const float* y, const float* dy, float* dx) {
       d.EluBackward(s, n, 1.5f, y, dy, dx);
     },
     false, [](double x) { return x < 0 ? 1.5 * std::expm1(x) : x; }},
    {"softplus",
     [](Device& d, Stream& s, int64_t n, const float* x, float* y) {
       d.SoftplusForward(s, n, x, y);
     },
     [](Device& d, Stream& s, int64_t n, const float* x, const float* dy, float* dx) {
       d.SoftplusBackward(s, n, x, dy, dx);
     },
     true, [](double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }},
};

// Everywhere within a few units in the last place, also where exponentials vanish or overflow.
TEST_P(MapsTest, ForwardIsPrecise) {
  std::vector<float> values = {0.0f,     -0.0f,  1e-30f, -1e-30f, 1e-8f,  -1e-8f, -0.5f,
                               -0.4999f, -88.0f, 88.0f,  -150.0f, 150.0f, 1e30f,  -1e30f};
  for (const float v : RandomFloats(5000, 71, -3, 3)) values.push_back(v);
  for (const float v : RandomFloats(2000, 72, -30, 30)) values.push_back(v);
  const auto x = In(values);
  for (const Map& map : kMaps) {
    const auto y = Out(values.size());
    map.forward(device(), stream(), static_cast<int64_t>(values.size()), x, y);
    const std::vector<float> actual = y.Read();
    for (size_t i = 0; i < values.size(); ++i) {
      const double expected = map.reference(values[i]);
      if (std::abs(expected) < std::numeric_limits<float>::min()) {
        EXPECT_NEAR(actual[i], expected, std::numeric_limits<float>::min()) << values[i];
        continue;
      }
      EXPECT_LE(UlpDistance(actual[i], expected), 4) << map.name << " of " << values[i];
    }
  }
}

TEST_P(MapsTest, NonFiniteValuesAreSeen) {
  const float inf = std::numeric_limits<float>::infinity();
  const auto x = In(std::vector<float>{std::nanf(""), inf});
  for (const Map& map : kMaps) {
    const auto y = Out(2);
    map.forward(device(), stream(), 2, x, y);
    EXPECT_TRUE(std::isnan(y.Read()[0])) << map.name;
    EXPECT_EQ(y.Read()[1], inf) << map.name;
  }
}

TEST_P(MapsTest, BackwardMatchesFiniteDifferencesAndCutsAnywhere) {
  for (const Map& map : kMaps) {
    for (int64_t size : kOddSizes) {
      std::vector<float> values = RandomFloats(size, 73, -4, 4);
      for (float& v : values) v += v < 0 ? -0.01f : 0.01f;  // off the kink
      const std::vector<float> gradient = RandomFloats(size, 74);
      const auto x = In(values), dy = In(gradient);
      const auto y = Out(size), dx = Out(size), cut = Out(size);
      map.forward(device(), stream(), size, x, y);
      const float* from = map.from_x ? x.data() : y.data();
      map.backward(device(), stream(), size, from, dy, dx);
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) {
            double sum = 0;
            for (int64_t i = 0; i < size; ++i) sum += map.reference(at[i]) * gradient[i];
            return sum;
          },
          ToDoubles(values), dx.Read()))
          << map.name;
      for (const int64_t at : {int64_t{0}, size / 3, size - 1}) {
        map.forward(device(), stream(), at, x, cut);
        map.forward(device(), stream(), size - at, x + at, cut + at);
        EXPECT_TRUE(SameBits(cut.Read(), y.Read())) << map.name;
        map.backward(device(), stream(), at, from, dy, cut);
        map.backward(device(), stream(), size - at, from + at, dy + at, cut + at);
        EXPECT_TRUE(SameBits(cut.Read(), dx.Read())) << map.name;
      }
      map.backward(device(), stream(), size, from, dy, dy);  // in place
      EXPECT_TRUE(SameBits(dy.Read(), dx.Read())) << map.name;
    }
  }
}

TEST_P(MapsTest, Multiply) {
  for (int64_t size : kOddSizes) {
    const std::vector<float> left = RandomFloats(size, 75), right = RandomFloats(size, 76);
    const auto a = In(left), b = In(right), out = Out(size);
    std::vector<float> expected(size);
    for (int64_t i = 0; i < size; ++i) expected[i] = left[i] * right[i];
    device().Multiply(stream(), size, a, b, out);
    EXPECT_TRUE(SameBits(out.Read(), expected));
    device().Multiply(stream(), size, a, b, a);
    EXPECT_TRUE(SameBits(a.Read(), expected));
  }
}

std::vector<double> SoftmaxOf(const std::vector<double>& x, int64_t features) {
  std::vector<double> y(x.size());
  for (size_t r = 0; r < x.size(); r += features) {
    double largest = x[r], sum = 0;
    for (int64_t i = 0; i < features; ++i) largest = std::max(largest, x[r + i]);
    for (int64_t i = 0; i < features; ++i) sum += std::exp(x[r + i] - largest);
    for (int64_t i = 0; i < features; ++i) y[r + i] = std::exp(x[r + i] - largest) / sum;
  }
  return y;
}

TEST_P(MapsTest, Softmax) {
  for (int64_t features : kOddSizes) {
    constexpr int64_t kN = 3;
    const std::vector<float> values = RandomFloats(kN * features, 77, -5, 90);
    const std::vector<float> gradient = RandomFloats(kN * features, 78);
    const auto x = In(values), dy = In(gradient);
    const auto y = Out(values.size()), dx = Out(values.size()), one = Out(values.size());
    device().SoftmaxForward(stream(), kN, features, x, y);
    const std::vector<double> expected = SoftmaxOf(ToDoubles(values), features);
    EXPECT_TRUE(Near(y.Read(), expected, 5e-7));
    device().SoftmaxBackward(stream(), kN, features, y, dy, dx);
    std::vector<double> expected_dx(values.size());
    for (int64_t r = 0; r < kN; ++r) {
      double sum = 0;
      for (int64_t i = r * features; i < (r + 1) * features; ++i) sum += expected[i] * gradient[i];
      for (int64_t i = r * features; i < (r + 1) * features; ++i) {
        expected_dx[i] = expected[i] * (gradient[i] - sum);
      }
      // A vector's bits do not depend on the others of the call.
      device().SoftmaxForward(stream(), 1, features, x + r * features, one + r * features);
    }
    EXPECT_TRUE(Near(dx.Read(), expected_dx, 1e-6));
    EXPECT_TRUE(SameBits(one.Read(), y.Read()));
    device().SoftmaxForward(stream(), kN, features, x, x);  // in place
    EXPECT_TRUE(SameBits(x.Read(), y.Read()));
    device().SoftmaxBackward(stream(), kN, features, y, dy, dy);
    EXPECT_TRUE(SameBits(dy.Read(), dx.Read()));
  }
}

constexpr float kEpsilon = 1e-3f;

double LayerNormDot(const std::vector<double>& x, const std::vector<double>& weight,
                    const std::vector<double>& bias, const std::vector<float>& dy) {
  const size_t features = weight.size();
  double dot = 0;
  for (size_t r = 0; r < x.size(); r += features) {
    double mean = 0, variance = 0;
    for (size_t i = 0; i < features; ++i) mean += x[r + i] / static_cast<double>(features);
    for (size_t i = 0; i < features; ++i) {
      variance += (x[r + i] - mean) * (x[r + i] - mean) / static_cast<double>(features);
    }
    for (size_t i = 0; i < features; ++i) {
      const double xhat = (x[r + i] - mean) / std::sqrt(variance + kEpsilon);
      dot += (xhat * weight[i] + bias[i]) * dy[r + i];
    }
  }
  return dot;
}

TEST_P(MapsTest, LayerNormMatchesFiniteDifferences) {
  for (int64_t features : {1, 2, 3, 15, 16, 17, 33, 65}) {
    for (int64_t n : {1, 5, 40}) {
      const std::vector<float> values = RandomFloats(n * features, 81, -1, 3);
      const std::vector<float> w = RandomFloats(features, 82, 0.5f, 2),
                               b = RandomFloats(features, 83);
      const std::vector<float> gradient = RandomFloats(values.size(), 84);
      const auto x = In(values), weight = In(w), bias = In(b), dy = In(gradient);
      const auto y = Out(values.size()), stats = Out(2 * n), dx = Out(values.size()),
                 dw = Out(features), db = Out(features), one = Out(values.size()),
                 one_stats = Out(2 * n);
      device().LayerNormForward(stream(), n, features, x, kEpsilon, weight, bias, y, stats);
      // y by the dot product with each unit vector would be slow: with the gradient it is one sum.
      const std::vector<float> out = y.Read();
      double dot = 0;
      for (size_t i = 0; i < out.size(); ++i) dot += static_cast<double>(out[i]) * gradient[i];
      const std::vector<double> at_x = ToDoubles(values), at_w = ToDoubles(w), at_b = ToDoubles(b);
      EXPECT_NEAR(dot, LayerNormDot(at_x, at_w, at_b, gradient), 1e-5 * (1 + std::abs(dot)));
      device().LayerNormBackward(stream(), n, features, x, stats, weight, dy, dx);
      device().LayerNormBackwardWeight(stream(), n, features, x, stats, dy, dw, db);
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) { return LayerNormDot(at, at_w, at_b, gradient); },
          at_x, dx.Read()));
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) { return LayerNormDot(at_x, at, at_b, gradient); },
          at_w, dw.Read()));
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const std::vector<double>& at) { return LayerNormDot(at_x, at_w, at, gradient); },
          at_b, db.Read()));
      for (int64_t r = 0; r < n; ++r) {
        device().LayerNormForward(stream(), 1, features, x + r * features, kEpsilon, weight, bias,
                                  one + r * features, one_stats + 2 * r);
      }
      EXPECT_TRUE(SameBits(one.Read(), out));
      EXPECT_TRUE(SameBits(one_stats.Read(), stats.Read()));
    }
  }
}

// Values far from zero do not lose their variance.
TEST_P(MapsTest, LayerNormKeepsSmallVariances) {
  constexpr int64_t kFeatures = 50;
  std::vector<float> values(kFeatures);
  for (int64_t i = 0; i < kFeatures; ++i) values[i] = 4096.0f + static_cast<float>(i % 2);
  const auto x = In(values), weight = In(std::vector<float>(kFeatures, 1)),
             bias = In(std::vector<float>(kFeatures, 0)), y = Out(kFeatures), stats = Out(2);
  device().LayerNormForward(stream(), 1, kFeatures, x, 1e-12f, weight, bias, y, stats);
  for (int64_t i = 0; i < kFeatures; ++i) EXPECT_NEAR(y.Read()[i], i % 2 == 0 ? -1 : 1, 1e-5);
}

TEST_P(MapsTest, EmbeddingTakesRowsAndAddsTheirGradientsInOrder) {
  constexpr int64_t kVocabulary = 5;
  for (int64_t features : kOddSizes) {
    const std::vector<float> positions = {4, 0, 2.4f, 1.6f, 4, -0.4f, 0};
    const std::vector<int64_t> rows = {4, 0, 2, 2, 4, 0, 0};
    const auto n = static_cast<int64_t>(positions.size());
    const std::vector<float> table = RandomFloats(kVocabulary * features, 91),
                             gradient = RandomFloats(n * features, 92);
    const auto x = In(positions), weight = In(table), dy = In(gradient);
    const auto y = Out(n * features), dw = Out(table.size());
    device().EmbeddingForward(stream(), n, kVocabulary, features, x, weight, y);
    device().EmbeddingBackward(stream(), n, kVocabulary, features, x, dy, dw);
    std::vector<float> expected(n * features), expected_dw(table.size(), 0.0f);
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t i = 0; i < features; ++i) {
        expected[p * features + i] = table[rows[p] * features + i];
        expected_dw[rows[p] * features + i] += gradient[p * features + i];
      }
    }
    EXPECT_TRUE(SameBits(y.Read(), expected));
    EXPECT_TRUE(SameBits(dw.Read(), expected_dw));
  }
}

TEST_P(MapsTest, EmbeddingOfNoRowIsNotANumber) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> positions = {-0.6f, 4.6f, -1, 5, 1e30f, -1e30f, inf, -inf, NAN, 4.4f};
  const auto n = static_cast<int64_t>(positions.size());
  const auto x = In(positions), weight = In(std::vector<float>(15, 1.0f)), y = Out(n * 3),
             dw = Out(15);
  device().EmbeddingForward(stream(), n, 5, 3, x, weight, y);
  const std::vector<float> actual = y.Read();
  for (int64_t p = 0; p < n; ++p) EXPECT_EQ(std::isnan(actual[3 * p]), p < n - 1) << positions[p];
  const auto dy = In(std::vector<float>(n * 3, 1.0f));
  device().EmbeddingBackward(stream(), n, 5, 3, x, dy, dw);
  for (int64_t i = 0; i < 15; ++i) EXPECT_EQ(dw.Read()[i], i >= 12 ? 1.0f : 0.0f);
}

TEST_P(MapsTest, SmoothedCrossEntropy) {
  constexpr float kSmoothing = 0.1f, kScale = 0.25f;
  for (int64_t classes : kOddSizes) {
    constexpr int64_t kRows = 4;
    const std::vector<float> values = RandomFloats(kRows * classes, 93, -4, 4);
    std::vector<int32_t> labels;
    for (int64_t r = 0; r < kRows; ++r) labels.push_back(static_cast<int32_t>(r * 7 % classes));
    const auto loss = [&](const std::vector<double>& x) {
      const std::vector<double> y = SoftmaxOf(x, classes);
      double sum = 0;
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t i = 0; i < classes; ++i) {
          const double target = (1.0 - kSmoothing) * (i == labels[r] ? 1 : 0) +
                                static_cast<double>(kSmoothing) / static_cast<double>(classes);
          sum -= target * std::log(y[r * classes + i]);
        }
      }
      return sum;
    };
    const auto x = In(values), dx = Out(values.size());
    const auto given = In(labels);
    const auto sum = OutOf<LeafResult>(1);
    const auto plain = OutOf<LeafResult>(1);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, x, given, kSmoothing, kScale, sum, dx);
    const double expected = loss(ToDoubles(values));
    EXPECT_NEAR(sum.Read()[0].loss_sum, expected, 1e-5 * (1 + expected));
    EXPECT_TRUE(
        MatchesFiniteDifferences([&](const std::vector<double>& at) { return kScale * loss(at); },
                                 ToDoubles(values), dx.Read()));
    const auto again = OutOf<LeafResult>(1);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, x, given, kSmoothing, kScale, again,
                                 nullptr);
    EXPECT_EQ(again.Read()[0].loss_sum, sum.Read()[0].loss_sum);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, x, given, 0, kScale, plain, nullptr);
    EXPECT_EQ(again.Read()[0].correct, plain.Read()[0].correct);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, x, given, kSmoothing, kScale, sum,
                                 x);  // in place
    EXPECT_TRUE(SameBits(x.Read(), dx.Read()));
  }
}

TEST_P(MapsTest, SigmoidCrossEntropy) {
  constexpr float kScale = 0.25f;
  for (int64_t features : kOddSizes) {
    constexpr int64_t kRows = 3;
    std::vector<float> values = RandomFloats(kRows * features, 94, -6, 6);
    values[0] = 200;  // e^x overflows
    values.back() = -200;
    const std::vector<float> wanted = RandomFloats(values.size(), 95, 0, 1);
    const auto loss = [&](const std::vector<double>& x) {
      double sum = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        sum += (std::max(x[i], 0.0) + std::log1p(std::exp(-std::abs(x[i]))) - x[i] * wanted[i]) /
               static_cast<double>(features);
      }
      return sum;
    };
    const auto x = In(values), target = In(wanted), dx = Out(values.size());
    const auto sum = OutOf<LeafResult>(1), again = OutOf<LeafResult>(1);
    device().SigmoidCrossEntropy(stream(), kRows, features, x, target, kScale, sum, dx);
    const double expected = loss(ToDoubles(values));
    EXPECT_NEAR(sum.Read()[0].loss_sum, expected, 1e-6 * (1 + expected));
    EXPECT_TRUE(
        MatchesFiniteDifferences([&](const std::vector<double>& at) { return kScale * loss(at); },
                                 ToDoubles(values), dx.Read()));
    device().SigmoidCrossEntropy(stream(), kRows, features, x, target, kScale, again, nullptr);
    EXPECT_EQ(again.Read()[0].loss_sum, sum.Read()[0].loss_sum);
  }
}

LOCKSTEP_DEVICE_TESTS(MapsTest);

}  // namespace
}  // namespace lockstep::device
