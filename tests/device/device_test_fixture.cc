#include "tests/device/device_test_fixture.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lockstep::device {

void DeviceTest::SetUp() {
  auto device = GetParam().make();
  ASSERT_TRUE(device.ok()) << device.status();
  device_ = *std::move(device);
  auto stream = device_->MakeStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  stream_ = *std::move(stream);
}

std::vector<float> RandomFloats(size_t size, uint32_t seed, float low, float high) {
  std::mt19937 generator(seed);
  std::vector<float> values(size);
  for (float& value : values) {
    value = low + (high - low) * static_cast<float>(generator() >> 8) * 0x1p-24f;
  }
  return values;
}

float RoundedToBf16(float value) {
  // bf16 has 8 significant bits.
  int exponent;
  const float fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}

std::vector<float> Rounded(std::vector<float> values, Precision precision) {
  if (precision == Precision::kBf16) {
    for (float& value : values) value = RoundedToBf16(value);
  }
  return values;
}

std::vector<double> ToDoubles(const std::vector<float>& values) {
  return std::vector<double>(values.begin(), values.end());
}

testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<double>& expected,
                              double tolerance) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << actual.size() << " values, expected " << expected.size();
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double limit = tolerance * std::max(1.0, std::abs(expected[i]));
    if (!(std::abs(actual[i] - expected[i]) <= limit)) {
      return testing::AssertionFailure()
             << "element " << i << " of " << actual.size() << " is " << actual[i] << ", expected "
             << expected[i] << " within " << limit;
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult SameBits(const std::vector<float>& actual,
                                  const std::vector<float>& expected) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << actual.size() << " values, expected " << expected.size();
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(float)) != 0) {
      return testing::AssertionFailure() << "element " << i << " of " << actual.size() << " is "
                                         << actual[i] << ", expected the bits of " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

double UlpDistance(float actual, double expected) {
  if (std::isnan(actual) || std::isnan(expected)) {
    return std::isnan(actual) && std::isnan(expected) ? 0 : std::numeric_limits<double>::infinity();
  }
  const float nearest = static_cast<float>(expected);
  if (std::isinf(nearest) || std::isinf(actual)) {
    return actual == nearest ? 0 : std::numeric_limits<double>::infinity();
  }
  const double magnitude = std::max(std::abs(expected), 0x1p-126);
  const double ulp = std::ldexp(1.0, std::ilogb(magnitude) - 23);
  return std::abs(actual - expected) / ulp;
}

testing::AssertionResult MatchesFiniteDifferences(
    const std::function<double(const std::vector<double>&)>& f, std::vector<double> x,
    const std::vector<float>& gradient, double tolerance) {
  std::vector<double> expected(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    constexpr double kStep = 1e-5;
    const double at = x[i];
    x[i] = at + kStep;
    const double above = f(x);
    x[i] = at - kStep;
    const double below = f(x);
    x[i] = at;
    expected[i] = (above - below) / (2 * kStep);
  }
  return Near(gradient, expected, tolerance);
}

double Dot(const std::vector<double>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace lockstep::device
