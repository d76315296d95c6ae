#include "worker/data/sampler.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::data {
namespace {

TEST(Permutation, HoldsEverySampleOnce) {
  for (const int64_t size : {1, 2, 3, 10, 1000, 60'000}) {
    std::vector<int64_t> order = Permutation(1, 1, size);
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < size; ++i) ASSERT_EQ(order[static_cast<size_t>(i)], i);
  }
  EXPECT_TRUE(Permutation(1, 1, 0).empty());
}

TEST(Permutation, IsAFunctionOfSeedAndEpoch) {
  const std::vector<int64_t> order = Permutation(1, 1, 1000);
  EXPECT_EQ(Permutation(1, 1, 1000), order);
  EXPECT_NE(Permutation(1, 2, 1000), order);
  EXPECT_NE(Permutation(2, 1, 1000), order);
  int64_t fixed = 0;  // neighbouring epochs are independent: about one sample keeps its place
  const std::vector<int64_t> next = Permutation(1, 2, 1000);
  for (size_t i = 0; i < 1000; ++i) fixed += order[i] == next[i];
  EXPECT_LT(fixed, 10);
}

// All 24 orders of 4 samples, 24,000 draws: chi-squared with 23 degrees of freedom is above 70.3
// with probability 1e-6 where they are uniform; "swap with any" (the usual mistake) gives
// thousands.
TEST(Permutation, IsUniform) {
  std::map<std::vector<int64_t>, int> counts;
  for (uint64_t seed = 0; seed < 120; ++seed) {
    for (int64_t epoch = 1; epoch <= 200; ++epoch) ++counts[Permutation(seed, epoch, 4)];
  }
  ASSERT_EQ(counts.size(), 24u);
  double chi_squared = 0;
  for (const auto& [order, count] : counts)
    chi_squared += (count - 1000.0) * (count - 1000.0) / 1000.0;
  EXPECT_LT(chi_squared, 70.3);
}

TEST(UniformBelow, IsBelowAndUniformAlsoWhereHalfOfTheDrawsAreRejected) {
  const PhiloxKey key = MakePhiloxKey(3, "test");
  for (uint64_t i = 0; i < 100; ++i) EXPECT_EQ(UniformBelow(key, i, 1, 1), 0u);

  std::array<int, 3> small = {};
  for (uint64_t i = 0; i < 30'000; ++i) ++small[UniformBelow(key, i, 1, 3)];
  EXPECT_THAT(small,
              testing::Each(testing::AllOf(testing::Gt(9600), testing::Lt(10'400))));  // 5 sigma

  // Without rejection every other value of such a bound would come twice as often.
  const uint64_t bound = (uint64_t{1} << 63) + 1;
  std::set<uint64_t> seen;
  int lower = 0;
  for (uint64_t i = 0; i < 20'000; ++i) {
    const uint64_t value = UniformBelow(key, i, 2, bound);
    ASSERT_LT(value, bound);
    lower += value < bound / 2;
    seen.insert(value);
  }
  EXPECT_NEAR(lower, 10'000, 360);
  EXPECT_EQ(seen.size(), 20'000u);  // the draws of an index never reach into another's
}

// The rejection itself, against Lemire's definition: of the 2^64 products' low words, those below
// 2^64 mod bound are dropped, and then the next draw counts.
TEST(UniformBelow, RejectsAsDefined) {
  const PhiloxKey key = MakePhiloxKey(3, "test");
  const uint64_t bound = (uint64_t{1} << 63) + 1;
  const uint64_t threshold = (~uint64_t{0} % bound + 1) % bound;
  int rejected = 0;
  for (uint64_t index = 0; index < 200; ++index) {
    uint64_t expected = 0;
    for (uint64_t draw = 0;; ++draw) {
      const PhiloxBlock block = Philox(key, (draw / 2) << 48 | index, 9);
      const uint64_t bits = draw % 2 == 0 ? uint64_t{block.x[1]} << 32 | block.x[0]
                                          : uint64_t{block.x[3]} << 32 | block.x[2];
      const auto product = static_cast<unsigned __int128>(bits) * bound;
      if (static_cast<uint64_t>(product) >= threshold) {
        expected = static_cast<uint64_t>(product >> 64);
        break;
      }
      ++rejected;
    }
    ASSERT_EQ(UniformBelow(key, index, 9, bound), expected);
  }
  EXPECT_GT(rejected, 100);
}

TEST(RangeOfStep, WalksThroughEpochs) {
  for (const auto& [samples, batch] :
       std::vector<std::pair<int64_t, int64_t>>{{10, 3}, {9, 3}, {1, 1}, {5, 8}, {60'000, 128}}) {
    const int64_t per_epoch = StepsPerEpoch(samples, batch);
    EXPECT_EQ(per_epoch, samples % batch == 0 ? samples / batch : samples / batch + 1);
    int64_t step = 1;
    for (int64_t epoch = 1; epoch <= 3; ++epoch) {
      int64_t next = 0;
      for (int64_t i = 0; i < per_epoch; ++i, ++step) {
        const BatchRange range = RangeOfStep(step, samples, batch);
        ASSERT_EQ(range.epoch, epoch);
        ASSERT_EQ(range.first, next);
        ASSERT_GE(range.count, 1);
        ASSERT_LE(range.count, batch);
        ASSERT_TRUE(range.count == batch || i + 1 == per_epoch);
        next += range.count;
      }
      ASSERT_EQ(next, samples);
    }
  }
}

// Every batch up to 24, every number of shards, every short batch, against the rule in words.
TEST(RangeOfShard, FollowsTheRule) {
  for (int64_t batch = 1; batch <= 24; ++batch) {
    for (int64_t shards = 1; shards <= batch; ++shards) {
      for (int64_t actual = 1; actual <= batch; ++actual) {
        int64_t next = 0, partial = 0;
        bool ended = false;
        for (int64_t shard = 0; shard < shards; ++shard) {
          const int64_t full =
              shard < batch % shards ? (batch + shards - 1) / shards : batch / shards;
          const ShardRange range = RangeOfShard(batch, shards, actual, shard);
          ASSERT_EQ(range.first, next);
          ASSERT_LE(range.count, full);
          ASSERT_TRUE(!ended || range.count == 0);
          if (range.count < full) ended = true;
          partial += range.count > 0 && range.count < full;
          next += range.count;
        }
        ASSERT_EQ(next, actual);  // nothing padded, repeated or dropped
        ASSERT_LE(partial, 1);
      }
    }
  }
}

TEST(RangeOfShard, Examples) {
  // 10 samples in 4 shards: 3 3 2 2; of a batch of 7: 3 3 1 0.
  const auto counts = [](int64_t actual) {
    std::vector<int64_t> result;
    for (int shard = 0; shard < 4; ++shard)
      result.push_back(RangeOfShard(10, 4, actual, shard).count);
    return result;
  };
  EXPECT_THAT(counts(10), testing::ElementsAre(3, 3, 2, 2));
  EXPECT_THAT(counts(7), testing::ElementsAre(3, 3, 1, 0));
  EXPECT_THAT(counts(6), testing::ElementsAre(3, 3, 0, 0));
  EXPECT_THAT(counts(1), testing::ElementsAre(1, 0, 0, 0));
}

// Each shard's samples are in exactly one microbatch, in order, and a partial shard fills the same.
TEST(RangeOfMicrobatch, CutsAShardAsAShardCutsABatch) {
  for (const auto& [batch, shards, microbatches] :
       {std::tuple<int64_t, int64_t, int64_t>{100, 8, 3}, {100, 8, 13}, {7, 7, 1}, {64, 4, 16}}) {
    for (int64_t actual = 1; actual <= batch; ++actual) {
      for (int64_t shard = 0; shard < shards; ++shard) {
        int64_t next = 0;
        for (int64_t m = 0; m < microbatches; ++m) {
          const BatchCut cut{batch, shards, microbatches};
          const ShardRange range = RangeOfMicrobatch(cut, actual, shard, m);
          const ShardRange full = RangeOfMicrobatch(cut, batch, shard, m);
          ASSERT_EQ(range.first, next);
          ASSERT_LE(range.count, full.count);
          if (range.count > 0) {
            ASSERT_EQ(range.first, full.first);
          }
          next += range.count;
        }
        ASSERT_EQ(next, RangeOfShard(batch, shards, actual, shard).count);
      }
    }
  }
  const auto counts = [](int64_t actual, int64_t shard) {
    std::vector<int64_t> result;
    for (int64_t m = 0; m < 3; ++m) {
      result.push_back(RangeOfMicrobatch({100, 8, 3}, actual, shard, m).count);
    }
    return result;
  };
  EXPECT_THAT(counts(100, 0), testing::ElementsAre(5, 4, 4));
  EXPECT_THAT(counts(100, 7), testing::ElementsAre(4, 4, 4));
  EXPECT_THAT(counts(30, 2), testing::ElementsAre(4, 0, 0));
  EXPECT_THAT(counts(33, 2), testing::ElementsAre(5, 2, 0));
}

TEST(RowCounts, OfMicrobatches) {
  EXPECT_THAT(RowCounts(1030, {100, 8, 3}, 0, 8), testing::ElementsAre(4, 5));
  EXPECT_THAT(RowCounts(1033, {100, 8, 3}, 2, 3), testing::ElementsAre(2, 4, 5));
}

TEST(RowCounts, AreExactlyThoseThatOccur) {
  for (int64_t samples = 1; samples <= 30; ++samples) {
    for (int64_t batch = 1; batch <= 12; ++batch) {
      for (int64_t shards = 1; shards <= batch; ++shards) {
        for (const auto& [first, last] :
             {std::pair<int64_t, int64_t>(0, shards), {shards / 2, shards}}) {
          std::set<int64_t> expected;
          for (int64_t step = 1; step <= StepsPerEpoch(samples, batch); ++step) {
            const int64_t actual = RangeOfStep(step, samples, batch).count;
            for (int64_t shard = first; shard < last; ++shard) {
              expected.insert(RangeOfShard(batch, shards, actual, shard).count);
            }
          }
          expected.erase(0);
          ASSERT_EQ(RowCounts(samples, {batch, shards}, first, last),
                    std::vector<int64_t>(expected.begin(), expected.end()))
              << samples << " " << batch << " " << shards;
        }
      }
    }
  }
}

}  // namespace
}  // namespace lockstep::data
