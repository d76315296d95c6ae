#include "worker/data/values.h"

#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/data/float_set.h"

namespace lockstep::data {
namespace {

const ValueRule kAny;
const ValueRule kPositions{0, 9, true, "the embedding e"};
const ValueRule kProbabilities{0, 1, false, "a loss"};

std::string Check(const Dataset& set, const ValueRule& rule, double mean = 0, double std = 1) {
  const absl::Status status = CheckValues(set, {mean}, {std}, rule);
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  return std::string(status.message());
}

TEST(Values, OfFloatsMustBeFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Check(FloatSet({-1e38f, 0, 1e-40f, 3e38f}, {1, 2, 1}), kAny), "");
  EXPECT_EQ(Check(FloatSet({0, 1, 2, nan}, {1, 2, 1}), kAny),
            "floats.npy: row 1 has the value nan; accepted: finite numbers");
  EXPECT_EQ(Check(FloatSet({-infinity, 1, 2, 3}, {1, 2, 1}), kAny),
            "floats.npy: row 0 has the value -inf; accepted: finite numbers");
  EXPECT_NE(Check(FloatSet({0, nan}, {1, 2, 1}), kProbabilities), "");
}

TEST(Values, ArePositionsOrProbabilitiesAfterNormalization) {
  EXPECT_EQ(Check(FloatSet({0, 9, 3, 4}, {1, 2, 1}), kPositions), "");
  EXPECT_EQ(Check(FloatSet({0, 9, 3, 10}, {1, 2, 1}), kPositions),
            "floats.npy: row 1 has the value 10; accepted: whole numbers from 0 to 9 for the "
            "embedding e");
  EXPECT_NE(Check(FloatSet({0, -1, 3, 4}, {1, 2, 1}), kPositions), "");
  EXPECT_NE(Check(FloatSet({0, 3.5f, 3, 4}, {1, 2, 1}), kPositions), "");
  EXPECT_EQ(Check(FloatSet({0, 18, 6, 8}, {1, 2, 1}), kPositions, 0, 2), "");
  EXPECT_EQ(Check(FloatSet({0, 0.5f, 1, 0.25f}, {2, 2, 1}), kProbabilities), "");
  EXPECT_EQ(Check(FloatSet({0, 0.5f, 1, 0.25f}, {2, 2, 1}), kProbabilities, 0.5),
            "floats.npy: row 0 has the value 0, normalized -0.5; accepted: numbers from 0 to 1 for "
            "a loss");
}

TEST(Values, OfBytesAreThoseOver255) {
  const Dataset set({1, 2, 1}, 2, {0, 3, 9, 10}, {0, 1}, "bytes");
  EXPECT_EQ(Check(set, kAny), "");
  EXPECT_EQ(Check(set, kProbabilities), "");
  EXPECT_EQ(Check(set, kPositions, 0, 1 / 255.0),
            "bytes: row 1 has the value 10; accepted: whole numbers from 0 to 9 for "
            "the embedding e");
  EXPECT_EQ(Check(set, {0, 10, true, "e"}, 0, 1 / 255.0), "");
  EXPECT_NE(Check(set, kPositions), "");
}

// Each channel by its own mean and deviation.
TEST(Values, AreNormalizedByTheirChannel) {
  const Dataset set = FloatSet({1, 30, 2, 40}, {1, 1, 2});
  EXPECT_EQ(CheckValues(set, {0, 0}, {1, 10}, kPositions), absl::OkStatus());
  EXPECT_FALSE(CheckValues(set, {0, 0}, {10, 1}, kPositions).ok());
}

}  // namespace
}  // namespace lockstep::data
