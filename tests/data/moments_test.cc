#include "worker/data/moments.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/data/float_set.h"
#include "worker/data/synthetic.h"

namespace lockstep::data {
namespace {

// Two channels, two samples of two pixels; closed form: 1 3 5 7 (of 255) and 10 10 20 20.
TEST(Moments, OfBytesAreExact) {
  SimulatedDisk disk;
  const Dataset set({1, 2, 2}, 2, {1, 10, 3, 10, 5, 20, 7, 20}, {0, 1});
  const auto moments = ComputeMoments(disk, "", set);
  ASSERT_EQ(moments.status(), absl::OkStatus());
  EXPECT_EQ(moments->mean, (std::vector<double>{16 / 1020.0, 60 / 1020.0}));
  EXPECT_EQ(moments->std, (std::vector<double>{std::sqrt(80.0) / 1020, std::sqrt(400.0) / 1020}));
}

TEST(Moments, OfFloatsKeepDigitsFarFromZero) {
  SimulatedDisk disk;
  std::vector<float> values;
  for (int i = 0; i < 4000; ++i) {
    values.push_back(1e6f + static_cast<float>(i % 4));
    values.push_back(static_cast<float>(i % 2) - 0.5f);
  }
  const auto moments = ComputeMoments(disk, "", FloatSet(values, {5, 4, 2}));
  ASSERT_EQ(moments.status(), absl::OkStatus());
  EXPECT_NEAR(moments->mean[0], 1e6 + 1.5, 1e-6);
  EXPECT_NEAR(moments->std[0], std::sqrt(1.25), 1e-9);
  EXPECT_NEAR(moments->mean[1], 0, 1e-12);
  EXPECT_NEAR(moments->std[1], 0.5, 1e-12);
}

TEST(Moments, AreComputedOnceForASet) {
  SimulatedDisk disk;
  const Dataset set({1, 2, 2}, 2, {1, 10, 3, 10, 5, 20, 7, 20}, {0, 1});
  const auto first = ComputeMoments(disk, "/home/cache", set);
  const auto second = ComputeMoments(disk, "/home/cache", set);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_FALSE(first->cached);
  EXPECT_TRUE(second->cached);
  EXPECT_EQ(second->mean, first->mean);  // bit by bit
  EXPECT_EQ(second->std, first->std);
  const Dataset other({1, 2, 2}, 2, {1, 10, 3, 10, 5, 20, 7, 21}, {0, 1});
  EXPECT_FALSE(ComputeMoments(disk, "/home/cache", other)->cached);
  // A damaged file is made anew.
  const std::string path = "/home/cache/moments-" + set.digest();
  const std::string good = ReadFile(disk, path, 1000).value();
  for (const std::string& bad :
       {std::string(), good.substr(0, good.size() / 2), good + "1 1\n", "x" + good}) {
    ASSERT_EQ(WriteFileAtomically(disk, path, bad), absl::OkStatus());
    const auto again = ComputeMoments(disk, "/home/cache", set);
    ASSERT_EQ(again.status(), absl::OkStatus());
    EXPECT_FALSE(again->cached) << bad;
    EXPECT_EQ(again->std, first->std);
    EXPECT_EQ(ReadFile(disk, path, 1000).value(), good);
  }
}

TEST(Moments, RefuseAChannelThatDoesNotVary) {
  SimulatedDisk disk;
  const Dataset set({1, 2, 2}, 2, {1, 10, 3, 10}, {0}, "x.npy");
  EXPECT_THAT(ComputeMoments(disk, "", set).status().message(),
              testing::AllOf(testing::HasSubstr("x.npy"), testing::HasSubstr("channel 1 is 0")));
}

TEST(Synthetic, IsAFunctionOfSeedSplitAndIndex) {
  const SyntheticOptions options = {.shape = {3, 4, 3}, .classes = 7, .samples = 20'000, .seed = 5};
  const auto set = MakeSynthetic(options), same = MakeSynthetic(options);
  EXPECT_EQ(set->digest(), same->digest());
  EXPECT_EQ(set->samples(), 20'000);
  SyntheticOptions more = options;
  more.samples = 30'000;
  const auto longer = MakeSynthetic(more);
  std::vector<int> counts(7);
  double sum = 0;
  for (int64_t i = 0; i < 20'000; ++i) {
    const auto* sample = static_cast<const uint8_t*>(set->data()) + set->OffsetOf(i);
    const auto* other = static_cast<const uint8_t*>(longer->data()) + longer->OffsetOf(i);
    ASSERT_EQ(std::memcmp(sample, other, 36), 0) << i;
    ASSERT_EQ(set->labels()[i], longer->labels()[i]);
    ++counts[static_cast<size_t>(set->labels()[i])];
    for (int k = 0; k < 36; ++k) sum += sample[k];
  }
  for (const int count : counts) EXPECT_NEAR(count, 20'000 / 7.0, 5 * 50);
  EXPECT_NEAR(sum / (20'000 * 36), 127.5, 1);
  std::vector<std::string> digests = {set->digest(), longer->digest()};
  for (const SyntheticOptions& o :
       {SyntheticOptions{.shape = {3, 4, 3}, .classes = 7, .samples = 20'000, .seed = 6},
        SyntheticOptions{.shape = {4, 3, 3}, .classes = 7, .samples = 20'000, .seed = 5},
        SyntheticOptions{.shape = {3, 4, 3}, .classes = 8, .samples = 20'000, .seed = 5},
        SyntheticOptions{.shape = {3, 4, 3},
        .classes = 7,
        .split = Split::kValidation,
        .samples = 20'000,
        .seed = 5}}) {
    digests.push_back(MakeSynthetic(o)->digest());
    EXPECT_NE(MakeSynthetic(o)->OffsetOf(0) == set->OffsetOf(0),
              o.seed != 5 || o.split != Split::kTrain);
  }
  for (size_t i = 0; i < digests.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(digests[i], digests[j]);
  }
}

}  // namespace
}  // namespace lockstep::data
