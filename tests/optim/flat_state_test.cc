#include "worker/optim/flat_state.h"

#include <cmath>
#include <cstring>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::optim {
namespace {

using Type = spec::Initializer::Type;
using testing::ElementsAre;

device::Device& TestDevice() {
  static device::Device* device = device::MakeCpuDevice().value().release();
  return *device;
}

// Tensors of the given sizes at aligned offsets.
FlatLayout MakeLayout(const std::vector<std::pair<std::string, int64_t>>& tensors,
                      const spec::Initializer& init) {
  FlatLayout layout;
  for (const auto& [name, size] : tensors) {
    layout.tensors.push_back({name, {size}, layout.size, size, false, init, TensorKey(name)});
    layout.size += (size + 15) / 16 * 16;
  }
  return layout;
}

std::unique_ptr<FlatState> MakeState(device::OptimizerType type) {
  const spec::Initializer uniform{Type::kUniform, 1};
  auto state = FlatState::Make(TestDevice(), MakeLayout({{"a.weight", 37}, {"a.bias", 3}}, uniform),
                               MakeLayout({{"n.running_mean", 5}}, uniform), type)
                   .value();
  Initialize(state->parameter_layout(), 1, state->parameters());
  Initialize(state->statistics_layout(), 1, state->statistics());
  for (int i = 0; i < state->slot_count(); ++i) {
    Initialize(state->parameter_layout(), 2 + static_cast<uint64_t>(i), state->slot(i));
  }
  return state;
}

std::vector<Digest> DigestIn(FlatState& state, int parts) {
  auto stream = TestDevice().MakeStream().value();
  std::vector<Digest> sum(state.named().size());
  for (int part = 0; part < parts; ++part) {
    std::vector<Digest> digests(sum.size());
    state.AccumulateDigests(TestDevice(), *stream, part, parts, absl::MakeSpan(digests));
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += digests[i];
  }
  return sum;
}

TEST(FlatStateTest, NamesEveryTensorInDigestOrder) {
  auto names = [](device::OptimizerType type) {
    std::vector<std::string> names;
    const auto state = MakeState(type);
    for (const auto& named : state->named()) names.push_back(named.name);
    return names;
  };
  EXPECT_THAT(names(device::OptimizerType::kSgd),
              ElementsAre("a.weight", "a.bias", "n.running_mean"));
  EXPECT_THAT(
      names(device::OptimizerType::kNesterov),
      ElementsAre("a.weight", "a.bias", "momentum/a.weight", "momentum/a.bias", "n.running_mean"));
  EXPECT_THAT(names(device::OptimizerType::kAdam),
              ElementsAre("a.weight", "a.bias", "adam_m/a.weight", "adam_m/a.bias",
                          "adam_v/a.weight", "adam_v/a.bias", "n.running_mean"));
  EXPECT_THAT(names(device::OptimizerType::kRmsPropCenteredMomentum),
              ElementsAre("a.weight", "a.bias", "rmsprop_v/a.weight", "rmsprop_v/a.bias",
                          "rmsprop_m/a.weight", "rmsprop_m/a.bias", "momentum/a.weight",
                          "momentum/a.bias", "n.running_mean"));
}

TEST(FlatStateTest, EverySlotOfATypeHasItsOwnName) {
  for (int i = 0; i < device::kOptimizerTypes; ++i) {
    const auto type = static_cast<device::OptimizerType>(i);
    const std::vector<std::string> names = SlotNames(type);
    EXPECT_EQ(names.size(), static_cast<size_t>(device::SlotCount(type))) << i;
    EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size()) << i;
  }
}

TEST(FlatStateTest, BeginsAllZero) {
  auto state = FlatState::Make(TestDevice(), MakeLayout({{"w", 20}}, {}), MakeLayout({}, {}),
                               device::OptimizerType::kAdam)
                   .value();
  for (const auto& named : state->named()) {
    for (int64_t i = 0; i < named.size; ++i) EXPECT_EQ(named.data[i], 0);
  }
}

// Products on a CPU round as they pack.
TEST(FlatStateTest, RoundsNothingOnADeviceThatStoresFloats) {
  auto state = FlatState::Make(TestDevice(), MakeLayout({{"w", 20}}, {}), MakeLayout({}, {}),
                               device::OptimizerType::kAdam, device::Precision::kBf16)
                   .value();
  EXPECT_EQ(state->rounded(), nullptr);
  auto stream = TestDevice().MakeStream().value();
  state->RoundParameters(TestDevice(), *stream, 0, 32);
}

TEST(FlatStateTest, DigestsAreTheSumOverElementsHoweverItIsCut) {
  auto state = MakeState(device::OptimizerType::kAdam);
  const std::vector<Digest> whole = DigestIn(*state, 1);
  for (size_t i = 0; i < whole.size(); ++i) {
    const auto& named = state->named()[i];
    Digest expected;
    for (int64_t e = 0; e < named.size; ++e) {
      uint32_t bits;
      std::memcpy(&bits, named.data + e, sizeof(bits));
      expected += MixElement(TensorKey(named.name), static_cast<uint64_t>(e), bits);
    }
    EXPECT_EQ(whole[i], expected) << named.name;
  }
  for (const int parts : {2, 3, 7, 64}) EXPECT_EQ(DigestIn(*state, parts), whole) << parts;
}

TEST(FlatStateTest, ADigestSeesEveryBitAndNothingBetweenTensors) {
  auto state = MakeState(device::OptimizerType::kMomentum);
  const std::vector<Digest> before = DigestIn(*state, 3);
  state->parameters()[37] = 1;  // padding
  EXPECT_EQ(DigestIn(*state, 3), before);
  for (size_t i = 0; i < before.size(); ++i) {
    float* last = state->named()[i].data + state->named()[i].size - 1;
    uint32_t bits;
    std::memcpy(&bits, last, sizeof(bits));
    bits ^= 1;
    std::memcpy(last, &bits, sizeof(bits));
    const std::vector<Digest> after = DigestIn(*state, 3);
    for (size_t j = 0; j < before.size(); ++j) EXPECT_EQ(after[j] == before[j], j > i);
  }
}

// ---- Initialize

std::vector<float> Draw(Type type, double scale, int64_t size, uint64_t seed = 3,
                        const std::string& name = "w") {
  const FlatLayout layout = MakeLayout({{name, size}}, {type, scale});
  std::vector<float> values(layout.size, -77);
  Initialize(layout, seed, values.data());
  for (int64_t i = size; i < layout.size; ++i) EXPECT_EQ(values[i], -77) << "padding was written";
  values.resize(size);
  return values;
}

struct Moments {
  double mean = 0, variance = 0, kurtosis = 0;
};
Moments MomentsOf(const std::vector<float>& values) {
  Moments m;
  const double n = static_cast<double>(values.size());
  for (const double v : values) m.mean += v / n;
  for (const double v : values) m.variance += (v - m.mean) * (v - m.mean) / n;
  for (const double v : values) m.kurtosis += std::pow(v - m.mean, 4) / n;
  m.kurtosis /= m.variance * m.variance;
  return m;
}

// Bounds are five standard errors: of a mean sqrt(variance / n), of a variance variance sqrt((k -
// 1) / n), k the kurtosis (Cramer 1946, 27.4 and 28.3).
constexpr int64_t kMany = 1 << 20;

TEST(InitializeTest, NormalHasItsMoments) {
  constexpr double kStd = 0.3;
  const Moments m = MomentsOf(Draw(Type::kNormal, kStd, kMany));
  EXPECT_NEAR(m.mean, 0, 5 * kStd / std::sqrt(kMany));
  EXPECT_NEAR(m.variance, kStd * kStd, 5 * kStd * kStd * std::sqrt(2.0 / kMany));
  EXPECT_NEAR(m.kurtosis, 3, 5 * std::sqrt(24.0 / kMany));
}

TEST(InitializeTest, NormalHasItsTails) {
  const std::vector<float> values = Draw(Type::kNormal, 1, kMany);
  for (const double z : {0.5, 1.0, 2.0, 3.0}) {
    const double p = std::erfc(z / std::sqrt(2.0));
    int64_t beyond = 0;
    for (const float v : values) beyond += std::abs(v) > z;
    EXPECT_NEAR(static_cast<double>(beyond) / kMany, p, 5 * std::sqrt(p * (1 - p) / kMany)) << z;
  }
}

TEST(InitializeTest, NeighboursOfANormalAreNotCorrelated) {
  const std::vector<float> values = Draw(Type::kNormal, 1, kMany);
  for (const int lag : {1, 2, 3, 4}) {
    double sum = 0;
    for (int64_t i = 0; i + lag < kMany; ++i) sum += double{values[i]} * values[i + lag];
    EXPECT_NEAR(sum / kMany, 0, 5 / std::sqrt(kMany)) << lag;
  }
}

TEST(InitializeTest, UniformFillsItsInterval) {
  constexpr double kLimit = 0.2;
  const std::vector<float> values = Draw(Type::kUniform, kLimit, kMany);
  const Moments m = MomentsOf(values);
  EXPECT_NEAR(m.mean, 0, 5 * kLimit / std::sqrt(3.0 * kMany));
  EXPECT_NEAR(m.variance, kLimit * kLimit / 3, 5 * kLimit * kLimit / 3 * std::sqrt(0.8 / kMany));
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  EXPECT_GE(*least, -static_cast<float>(kLimit));
  EXPECT_LE(*most, static_cast<float>(kLimit));
  EXPECT_LT(*least, -kLimit * 0.9999);
  EXPECT_GT(*most, kLimit * 0.9999);
}

TEST(InitializeTest, ConstantsAreExact) {
  EXPECT_THAT(Draw(Type::kZeros, 5, 9), testing::Each(0.0f));
  EXPECT_THAT(Draw(Type::kOnes, 5, 9), testing::Each(1.0f));
}

// Element i depends on (seed, name, i) alone, not on the tensor's size or place.
TEST(InitializeTest, IsAPureFunctionOfSeedNameAndIndex) {
  for (const Type type : {Type::kNormal, Type::kUniform}) {
    const std::vector<float> values = Draw(type, 1, 101);
    const std::vector<float> longer = Draw(type, 1, 1000);
    EXPECT_TRUE(std::equal(values.begin(), values.end(), longer.begin()));
    EXPECT_NE(Draw(type, 1, 101, 4), values);
    EXPECT_NE(Draw(type, 1, 101, 3, "v"), values);
    const FlatLayout layout = MakeLayout({{"other", 50}, {"w", 101}}, {type, 1});
    std::vector<float> both(layout.size);
    Initialize(layout, 3, both.data());
    EXPECT_TRUE(std::equal(values.begin(), values.end(), both.begin() + 64));
  }
}

TEST(InitializeTest, FollowsTheGenerator) {
  const PhiloxKey key = MakePhiloxKey(3, "initialize/w");
  const std::vector<float> uniform = Draw(Type::kUniform, 0.5, 6),
                           normal = Draw(Type::kNormal, 2, 6);
  for (uint64_t i = 0; i < 6; ++i) {
    EXPECT_EQ(uniform[i], 0.5f * (2 * ToUniform(PhiloxAt(key, i, 0)) - 1));
    const double u = (PhiloxAt(key, i & ~1ull, 0) + 1.0) / 4294967296.0;
    const double v = PhiloxAt(key, i | 1, 0) / 4294967296.0;
    const double radius = std::sqrt(-2 * std::log(u)), angle = 2 * M_PI * v;
    EXPECT_NEAR(normal[i], 2 * radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle)), 1e-6);
  }
}

}  // namespace
}  // namespace lockstep::optim
