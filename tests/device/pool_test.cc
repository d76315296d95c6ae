#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using PoolTest = DeviceTest;

const PoolShape kShapes[] = {
    {.height = 4, .width = 6, .channels = 1, .kernel = 2, .stride = 2},
    {.height = 28, .width = 28, .channels = 32, .kernel = 2, .stride = 2},
    {.height = 5, .width = 7, .channels = 3, .kernel = 2, .stride = 2},
    {.height = 7, .width = 5, .channels = 17, .kernel = 3, .stride = 2, .padding = 1},
    {.height = 6, .width = 6, .channels = 33, .kernel = 3, .stride = 1, .padding = 2},
    {.height = 9, .width = 8, .channels = 15, .kernel = 2, .stride = 3},
    {.height = 16, .width = 16, .channels = 2, .kernel = 16, .stride = 1},
};

std::string Describe(const PoolShape& s) {
  return std::to_string(s.height) + "x" + std::to_string(s.width) + "x" +
         std::to_string(s.channels) + " kernel " + std::to_string(s.kernel) + " stride " +
         std::to_string(s.stride) + " padding " + std::to_string(s.padding);
}

int64_t InSize(const PoolShape& s, int64_t rows) { return rows * s.height * s.width * s.channels; }
int64_t OutSize(const PoolShape& s, int64_t rows) {
  return rows * s.out_height() * s.out_width() * s.channels;
}

// Calls visit(index of the output, index of the input, place in the window).
template <class Visit>
void ForEachPlace(const PoolShape& s, int64_t rows, Visit visit) {
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t oh = 0; oh < s.out_height(); ++oh)
      for (int64_t ow = 0; ow < s.out_width(); ++ow)
        for (int64_t kh = 0; kh < s.kernel; ++kh)
          for (int64_t kw = 0; kw < s.kernel; ++kw)
            for (int64_t c = 0; c < s.channels; ++c) {
              const int64_t h = oh * s.stride - s.padding + kh, w = ow * s.stride - s.padding + kw;
              if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
              visit(((n * s.out_height() + oh) * s.out_width() + ow) * s.channels + c,
                    ((n * s.height + h) * s.width + w) * s.channels + c, kh * s.kernel + kw);
            }
}

struct MaxResult {
  std::vector<double> y;
  std::vector<uint8_t> argmax;
};

MaxResult MaxReference(const PoolShape& s, int64_t rows, const std::vector<double>& x) {
  const double none = -std::numeric_limits<double>::infinity();
  MaxResult result{std::vector<double>(OutSize(s, rows), none),
                   std::vector<uint8_t>(OutSize(s, rows), 0)};
  std::vector<bool> seen(OutSize(s, rows), false);
  ForEachPlace(s, rows, [&](int64_t out, int64_t in, int64_t place) {
    if (seen[out] && !(x[in] > result.y[out])) return;
    seen[out] = true;
    result.y[out] = x[in];
    result.argmax[out] = static_cast<uint8_t>(place);
  });
  return result;
}

std::vector<double> AverageReference(const PoolShape& s, int64_t rows,
                                     const std::vector<double>& x) {
  std::vector<double> y(OutSize(s, rows), 0.0);
  ForEachPlace(s, rows, [&](int64_t out, int64_t in, int64_t) {
    y[out] += x[in] / static_cast<double>(s.kernel * s.kernel);
  });
  return y;
}

TEST_P(PoolTest, MaxMatchesTheReference) {
  for (const PoolShape& s : kShapes) {
    for (int64_t rows : {1, 3}) {
      std::vector<float> x = RandomFloats(InSize(s, rows), 20);
      for (float& value : x) value = std::round(value * 4) / 4;  // ties
      const auto in = In(x), y = Out(OutSize(s, rows));
      const auto argmax = OutOf<uint8_t>(OutSize(s, rows));
      device().MaxPoolForward(stream(), s, rows, in, y, argmax);
      const MaxResult expected = MaxReference(s, rows, ToDoubles(x));
      EXPECT_TRUE(Near(y.Read(), expected.y, 0)) << Describe(s);
      EXPECT_EQ(argmax.Read(), expected.argmax) << Describe(s);

      const std::vector<float> dy = RandomFloats(OutSize(s, rows), 21);
      const auto gradient = In(dy), dx = Out(InSize(s, rows));
      device().MaxPoolBackward(stream(), s, rows, gradient, argmax, dx);
      std::vector<double> expected_dx(InSize(s, rows), 0.0);
      ForEachPlace(s, rows, [&](int64_t out, int64_t in_index, int64_t place) {
        if (expected.argmax[out] == place) expected_dx[in_index] += dy[out];
      });
      EXPECT_TRUE(Near(dx.Read(), expected_dx, 1e-6)) << Describe(s);
    }
  }
}

TEST_P(PoolTest, MaxGradientMatchesFiniteDifferences) {
  const PoolShape s{.height = 5, .width = 5, .channels = 3, .kernel = 3, .stride = 2, .padding = 1};
  std::vector<float> x(InSize(s, 2));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 37 % 151) / 100;  // no ties
  const std::vector<float> dy = RandomFloats(OutSize(s, 2), 22);
  const auto in = In(x), gradient = In(dy), y = Out(dy.size()), dx = Out(x.size());
  const auto argmax = OutOf<uint8_t>(dy.size());
  device().MaxPoolForward(stream(), s, 2, in, y, argmax);
  device().MaxPoolBackward(stream(), s, 2, gradient, argmax, dx);
  EXPECT_TRUE(MatchesFiniteDifferences(
      [&](const std::vector<double>& at) { return Dot(MaxReference(s, 2, at).y, dy); },
      ToDoubles(x), dx.Read()));
}

TEST_P(PoolTest, MaxKeepsNanAndNegativeInfinity) {
  const PoolShape s{.height = 2, .width = 2, .channels = 17, .kernel = 2, .stride = 2};
  for (int place = 0; place < 4; ++place) {
    std::vector<float> x(InSize(s, 1), -std::numeric_limits<float>::infinity());
    for (int c = 0; c < 17; c += 2) x[place * 17 + c] = std::numeric_limits<float>::quiet_NaN();
    const auto in = In(x), y = Out(17);
    const auto argmax = OutOf<uint8_t>(17);
    device().MaxPoolForward(stream(), s, 1, in, y, argmax);
    const std::vector<float> values = y.Read();
    for (int c = 0; c < 17; ++c) {
      EXPECT_EQ(std::isnan(values[c]), c % 2 == 0);
      EXPECT_EQ(argmax.Read()[c], c % 2 == 0 ? place : 0);
    }
  }
}

TEST_P(PoolTest, AverageMatchesTheReference) {
  for (const PoolShape& s : kShapes) {
    const std::vector<float> x = RandomFloats(InSize(s, 2), 23),
                             dy = RandomFloats(OutSize(s, 2), 24);
    const auto in = In(x), gradient = In(dy), y = Out(dy.size()), dx = Out(x.size());
    device().AveragePoolForward(stream(), s, 2, in, y);
    EXPECT_TRUE(Near(y.Read(), AverageReference(s, 2, ToDoubles(x)), 1e-6)) << Describe(s);
    device().AveragePoolBackward(stream(), s, 2, gradient, dx);
    std::vector<double> expected(x.size(), 0.0);
    ForEachPlace(s, 2, [&](int64_t out, int64_t in_index, int64_t) {
      expected[in_index] += dy[out] / static_cast<double>(s.kernel * s.kernel);
    });
    EXPECT_TRUE(Near(dx.Read(), expected, 1e-6)) << Describe(s);
  }
}

TEST_P(PoolTest, AverageGradientMatchesFiniteDifferences) {
  const PoolShape s{.height = 4, .width = 5, .channels = 3, .kernel = 3, .stride = 1, .padding = 1};
  const std::vector<float> x = RandomFloats(InSize(s, 2), 25), dy = RandomFloats(OutSize(s, 2), 26);
  const auto gradient = In(dy), dx = Out(x.size());
  device().AveragePoolBackward(stream(), s, 2, gradient, dx);
  EXPECT_TRUE(MatchesFiniteDifferences(
      [&](const std::vector<double>& at) { return Dot(AverageReference(s, 2, at), dy); },
      ToDoubles(x), dx.Read()));
}

TEST_P(PoolTest, GlobalAverageMatchesTheReference) {
  for (int64_t channels : kOddSizes) {
    for (int64_t spatial : {1, 7, 49, 100}) {
      constexpr int64_t kRows = 3;
      const std::vector<float> x = RandomFloats(kRows * spatial * channels, 27);
      const std::vector<float> dy = RandomFloats(kRows * channels, 28);
      const auto in = In(x), gradient = In(dy), y = Out(dy.size()), dx = Out(x.size());
      device().GlobalAveragePoolForward(stream(), kRows, spatial, channels, in, y);
      device().GlobalAveragePoolBackward(stream(), kRows, spatial, channels, gradient, dx);
      std::vector<double> expected(dy.size(), 0.0), expected_dx(x.size());
      for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
        const int64_t out = i / (spatial * channels) * channels + i % channels;
        expected[out] += x[i] / static_cast<double>(spatial);
        expected_dx[i] = dy[out] / static_cast<double>(spatial);
      }
      EXPECT_TRUE(Near(y.Read(), expected, 1e-6));
      EXPECT_TRUE(Near(dx.Read(), expected_dx, 1e-6));
    }
  }
}

TEST_P(PoolTest, RowsDoNotDependOnTheirNumber) {
  const PoolShape s = kShapes[3];
  constexpr int64_t kRows = 5;
  const std::vector<float> x = RandomFloats(InSize(s, kRows), 29);
  const int64_t in_row = InSize(s, 1), out_row = OutSize(s, 1);
  const auto in = In(x), whole = Out(out_row * kRows), alone = Out(out_row * kRows);
  const auto argmax = OutOf<uint8_t>(out_row * kRows);
  device().MaxPoolForward(stream(), s, kRows, in, whole, argmax);
  for (int64_t r = 0; r < kRows; ++r) {
    device().MaxPoolForward(stream(), s, 1, in + r * in_row, alone + r * out_row,
                            argmax + r * out_row);
  }
  EXPECT_TRUE(SameBits(alone.Read(), whole.Read()));
  device().AveragePoolForward(stream(), s, kRows, in, whole);
  for (int64_t r = 0; r < kRows; ++r) {
    device().AveragePoolForward(stream(), s, 1, in + r * in_row, alone + r * out_row);
  }
  EXPECT_TRUE(SameBits(alone.Read(), whole.Read()));
}

LOCKSTEP_DEVICE_TESTS(PoolTest);

}  // namespace
}  // namespace lockstep::device
