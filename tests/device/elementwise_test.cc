#include <cmath>
#include <limits>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Map = void (*)(Device&, Stream&, int64_t, const float*, float*);
using Pair = void (*)(Device&, Stream&, int64_t, const float*, const float*, float*);
// A function of the device, on floats.
template <auto kFunction, class... Arguments>
void Call(Device& device, Stream& stream, int64_t n, Arguments... arguments) {
  if constexpr (requires { (device.*kFunction)(stream, n, arguments...); }) {
    (device.*kFunction)(stream, n, arguments...);
  } else {
    (device.*kFunction)(stream, n, arguments..., ElementType::kFp32);
  }
}

struct MapCase {
  const char* name;
  Map map;
  double (*reference)(double);
  double ulps;
};
const MapCase kMaps[] = {
    {"relu", Call<&Device::ReluForward>,
     [](double x) { return x > 0           ? x
                           : std::isnan(x) ? x
                                           : 0.0; }, 0},
    {"tanh", Call<&Device::TanhForward>, [](double x) { return std::tanh(x); }, 2},
    {"sigmoid", Call<&Device::SigmoidForward>, [](double x) { return 1 / (1 + std::exp(-x)); }, 3},
};

struct PairCase {
  const char* name;
  Pair pair;
  double (*reference)(double, double);
};
const PairCase kPairs[] = {
    {"relu_backward", Call<&Device::ReluBackward>,
     [](double y, double dy) { return y > 0 ? dy : 0.0; }},
    {"tanh_backward", Call<&Device::TanhBackward>,
     [](double y, double dy) { return dy * (1 - y * y); }},
    {"sigmoid_backward", Call<&Device::SigmoidBackward>,
     [](double y, double dy) { return dy * y * (1 - y); }},
    {"add", Call<&Device::Add>, [](double a, double b) { return a + b; }},
};

using ElementwiseTest = DeviceTest;

TEST_P(ElementwiseTest, MapsAreAccurateOverTheWholeRange) {
  std::vector<float> x;
  for (float magnitude = 1e-42f; magnitude < 1e38f; magnitude *= 1.0173f) {
    x.push_back(magnitude);
    x.push_back(-magnitude);
  }
  for (float special : {0.0f, -0.0f, 0.625f, -0.625f, 88.0f, -88.0f, -103.9f, -104.5f, kInfinity,
                        -kInfinity, kNan}) {
    x.push_back(special);
  }
  const std::vector<float> dense = RandomFloats(20000, 1, -12, 12);
  x.insert(x.end(), dense.begin(), dense.end());
  const auto in = In(x);
  for (const MapCase& c : kMaps) {
    const auto out = Out(x.size());
    c.map(device(), stream(), x.size(), in, out);
    const std::vector<float> y = out.Read();
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_LE(UlpDistance(y[i], c.reference(x[i])), c.ulps)
          << c.name << " of " << x[i] << " is " << y[i];
    }
  }
}

TEST_P(ElementwiseTest, PairsMatchTheirFormulas) {
  for (int64_t n : kOddSizes) {
    const std::vector<float> a = RandomFloats(n, 2), b = RandomFloats(n, 3);
    const auto in_a = In(a), in_b = In(b);
    for (const PairCase& c : kPairs) {
      const auto out = Out(n);
      c.pair(device(), stream(), n, in_a, in_b, out);
      std::vector<double> expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = c.reference(a[i], b[i]);
      EXPECT_TRUE(Near(out.Read(), expected, 2e-7)) << c.name;
    }
  }
}

TEST_P(ElementwiseTest, GradientsMatchFiniteDifferences) {
  const std::vector<float> x = RandomFloats(33, 4, -2, 2), dy = RandomFloats(33, 5);
  const auto check = [&](const MapCase& map, Pair backward) {
    const auto in = In(x), gradient = In(dy), y = Out(x.size()), dx = Out(x.size());
    map.map(device(), stream(), x.size(), in, y);
    backward(device(), stream(), x.size(), y, gradient, dx);
    const auto loss = [&](std::vector<double> at) {
      for (double& value : at) value = map.reference(value);
      return Dot(at, dy);
    };
    EXPECT_TRUE(MatchesFiniteDifferences(loss, ToDoubles(x), dx.Read())) << map.name;
  };
  check(kMaps[0], Call<&Device::ReluBackward>);
  check(kMaps[1], Call<&Device::TanhBackward>);
  check(kMaps[2], Call<&Device::SigmoidBackward>);
}

TEST_P(ElementwiseTest, AnyCutGivesTheSameBits) {
  constexpr int64_t kSize = 100;
  const std::vector<float> a = RandomFloats(kSize, 6, -4, 4), b = RandomFloats(kSize, 7);
  const auto in_a = In(a), in_b = In(b), whole = Out(kSize), cut = Out(kSize);
  for (int64_t at = 0; at <= kSize; ++at) {
    for (const MapCase& c : kMaps) {
      c.map(device(), stream(), kSize, in_a, whole);
      c.map(device(), stream(), at, in_a, cut);
      c.map(device(), stream(), kSize - at, in_a + at, cut + at);
      ASSERT_TRUE(SameBits(cut.Read(), whole.Read())) << c.name << " cut at " << at;
    }
    for (const PairCase& c : kPairs) {
      c.pair(device(), stream(), kSize, in_a, in_b, whole);
      c.pair(device(), stream(), at, in_a, in_b, cut);
      c.pair(device(), stream(), kSize - at, in_a + at, in_b + at, cut + at);
      ASSERT_TRUE(SameBits(cut.Read(), whole.Read())) << c.name << " cut at " << at;
    }
  }
}

TEST_P(ElementwiseTest, OutputsMayAliasInputs) {
  constexpr int64_t kSize = 67;
  const std::vector<float> a = RandomFloats(kSize, 8, -3, 3), b = RandomFloats(kSize, 9);
  for (const MapCase& c : kMaps) {
    const auto in = In(a), apart = Out(kSize);
    c.map(device(), stream(), kSize, in, apart);
    c.map(device(), stream(), kSize, in, in);
    EXPECT_TRUE(SameBits(in.Read(), apart.Read())) << c.name;
  }
  for (const PairCase& c : kPairs) {
    const auto in_a = In(a), in_b = In(b), apart = Out(kSize);
    c.pair(device(), stream(), kSize, in_a, in_b, apart);
    const auto first = In(a), second = In(b);
    c.pair(device(), stream(), kSize, first, in_b, first);
    c.pair(device(), stream(), kSize, in_a, second, second);
    EXPECT_TRUE(SameBits(first.Read(), apart.Read())) << c.name << " onto its first";
    EXPECT_TRUE(SameBits(second.Read(), apart.Read())) << c.name << " onto its second";
  }
}

LOCKSTEP_DEVICE_TESTS(ElementwiseTest);

// ---- dropout

using DropoutTest = DeviceTest;

std::vector<float> DropoutReference(const std::vector<float>& x, float rate, PhiloxKey key,
                                    uint64_t step, uint64_t first) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const bool kept = ToUniform(PhiloxAt(key, first + i, step)) >= rate;
    y[i] = kept ? x[i] * (1.0f / (1.0f - rate)) : 0.0f;
  }
  return y;
}

TEST(PhiloxTest, KnownAnswers) {
  // philox4x32-10 of kat_vectors, Random123 1.09 (D. E. Shaw Research).
  struct Answer {
    uint32_t counter[4], key[2], expected[4];
  };
  const Answer answers[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Answer& a : answers) {
    const uint64_t block = a.counter[0] | uint64_t{a.counter[1]} << 32;
    const uint64_t step = a.counter[2] | uint64_t{a.counter[3]} << 32;
    const PhiloxBlock actual = Philox({a.key[0], a.key[1]}, block, step);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(actual.x[i], a.expected[i]);
  }
}

TEST_P(DropoutTest, MatchesScalarPhiloxFromAnyFirstElement) {
  const PhiloxKey key{0x12345678, 0x9abcdef0};
  for (uint64_t base :
       {uint64_t{0}, uint64_t{1000003}, (uint64_t{1} << 34) - 40, uint64_t{1} << 40}) {
    for (uint64_t offset = 0; offset < 5; ++offset) {
      for (int64_t n : {1,  2,  3,  4,  5,  12, 13, 14, 15, 16,  17, 27,
                        28, 29, 30, 31, 32, 33, 61, 64, 65, 100, 257}) {
        for (Guard guard : {Guard::kBehind, Guard::kBefore}) {
          const std::vector<float> x = RandomFloats(n, 10);
          const StepScalars host_scalars{.step = 0x100000007ull + n};
          const auto scalars = In(std::vector<StepScalars>{host_scalars});
          const auto in = In(x, guard), out = Out(n, guard);
          device().Dropout(stream(), n, in, 0.3f, key, scalars, base + offset, out);
          ASSERT_TRUE(SameBits(out.Read(),
                               DropoutReference(x, 0.3f, key, host_scalars.step, base + offset)))
              << n << " elements from " << base + offset;
        }
      }
    }
  }
}

TEST_P(DropoutTest, ComparesAsTheScalarDoesForEveryRate) {
  constexpr int64_t kSize = 4096;
  const PhiloxKey key{7, 11};
  const StepScalars host_scalars{.step = 3};
  const auto scalars = In(std::vector<StepScalars>{host_scalars});
  const std::vector<float> x(kSize, 1.0f);
  const auto in = In(x), out = Out(kSize);
  // Among them a rate that is exactly the uniform number of an element, and its neighbours.
  const float exact = ToUniform(PhiloxAt(key, 100, host_scalars.step));
  for (float rate : {0.0f, 1e-9f, 0.1f, 0.25f, 0.5f, 0.999f, exact, std::nextafter(exact, 0.0f),
                     std::nextafter(exact, 1.0f)}) {
    device().Dropout(stream(), kSize, in, rate, key, scalars, 0, out);
    ASSERT_TRUE(SameBits(out.Read(), DropoutReference(x, rate, key, host_scalars.step, 0))) << rate;
  }
}

TEST_P(DropoutTest, AnyCutGivesTheSameBitsInPlaceToo) {
  constexpr int64_t kSize = 200;
  const PhiloxKey key{5, 6};
  const StepScalars host_scalars{.step = 9};
  const auto scalars = In(std::vector<StepScalars>{host_scalars});
  const std::vector<float> x = RandomFloats(kSize, 11);
  const auto in = In(x), whole = Out(kSize);
  device().Dropout(stream(), kSize, in, 0.5f, key, scalars, 77, whole);
  for (int64_t at = 0; at <= kSize; ++at) {
    const auto cut = In(x);
    device().Dropout(stream(), at, cut, 0.5f, key, scalars, 77, cut);
    device().Dropout(stream(), kSize - at, cut + at, 0.5f, key, scalars, 77 + at, cut + at);
    ASSERT_TRUE(SameBits(cut.Read(), whole.Read())) << "cut at " << at;
  }
}

TEST_P(DropoutTest, DropsTheRateAndKeepsTheMean) {
  constexpr int64_t kSize = 1 << 18;
  const StepScalars host_scalars{.step = 1};
  const auto scalars = In(std::vector<StepScalars>{host_scalars});
  const auto in = In(std::vector<float>(kSize, 1.0f)), out = Out(kSize);
  device().Dropout(stream(), kSize, in, 0.25f, {1, 2}, scalars, 0, out);
  double sum = 0, zeros = 0;
  for (float y : out.Read()) {
    sum += y;
    zeros += y == 0 ? 1 : 0;
  }
  // Five standard deviations of the binomial count.
  EXPECT_NEAR(zeros / kSize, 0.25, 5 * std::sqrt(0.25 * 0.75 / kSize));
  EXPECT_NEAR(sum / kSize, 1.0, 5 * std::sqrt(0.25 / 0.75 / kSize));
}

LOCKSTEP_DEVICE_TESTS(DropoutTest);

}  // namespace
}  // namespace lockstep::device
