// Philox against Random123's published vectors, keys, and the digest's algebra.
#include <algorithm>
#include <array>
#include <bit>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "common/digest.h"
#include "common/philox.h"
#include "common/stable_hash.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

// kat_vectors of Random123 1.14, philox4x32 with 10 rounds.
TEST(Philox, MatchesRandom123) {
  struct Vector {
    std::array<uint32_t, 4> counter;
    PhiloxKey key;
    std::array<uint32_t, 4> expected;
  };
  const Vector vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Vector& v : vectors) {
    const PhiloxBlock block = Philox(v.key, uint64_t{v.counter[1]} << 32 | v.counter[0],
                                     uint64_t{v.counter[3]} << 32 | v.counter[2]);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(block.x[i], v.expected[i]);
  }
}

TEST(Philox, ElementsAreLanesOfBlocks) {
  const PhiloxKey key = MakePhiloxKey(7, "dropout/a");
  for (uint64_t i = 0; i < 16; ++i) {
    EXPECT_EQ(PhiloxAt(key, i, 3), Philox(key, i / 4, 3).x[i % 4]);
  }
}

TEST(Philox, KeysDifferBySeedAndPurpose) {
  std::set<std::pair<uint32_t, uint32_t>> keys;
  int made = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    for (const char* purpose : {"shuffle", "dropout/a", "dropout/b", "initialize/w", ""}) {
      const PhiloxKey key = MakePhiloxKey(seed, purpose);
      keys.insert({key.k0, key.k1});
      ++made;
    }
  }
  EXPECT_EQ(static_cast<int>(keys.size()), made);
}

// Recorded digests and random streams outlive a version: these may never change.
TEST(Philox, KeysAreStable) {
  EXPECT_EQ(StableHash(""), MixBits(0xCBF29CE484222325ull));
  EXPECT_EQ(StableHash("a"), MixBits(0xAF63DC4C8601EC8Cull));  // FNV-1a 64 of "a", from its authors
  EXPECT_EQ(MixBits(0x9E3779B97F4A7C15ull), 0xE220A8397B1DCDAFull);  // SplitMix64, seed 0, first
  const PhiloxKey key = MakePhiloxKey(1, "shuffle");
  const uint64_t expected = MixBits(StableHash("shuffle") + MixBits(1 + 0x9E3779B97F4A7C15ull));
  EXPECT_EQ(uint64_t{key.k1} << 32 | key.k0, expected);
}

TEST(Philox, UniformIsInRange) {
  EXPECT_EQ(ToUniform(0), 0.0f);
  EXPECT_LT(ToUniform(0xffffffffu), 1.0f);
}

Digest DigestOf(const std::vector<float>& values, uint64_t key, size_t begin, size_t end) {
  Digest digest;
  for (size_t i = begin; i < end; ++i)
    digest += MixElement(key, i, std::bit_cast<uint32_t>(values[i]));
  return digest;
}

TEST(Digest, AnyPartitionGivesTheSameSum) {
  const uint64_t key = TensorKey("conv1.weight");
  std::vector<float> values;
  for (int i = 0; i < 1000; ++i) values.push_back(ToUniform(PhiloxAt({1, 2}, i, 0)) - 0.5f);
  const Digest whole = DigestOf(values, key, 0, values.size());
  for (const size_t cut : {0, 1, 333, 999, 1000}) {
    Digest parts = DigestOf(values, key, cut, values.size());
    parts += DigestOf(values, key, 0, cut);
    EXPECT_EQ(parts, whole) << cut;
  }
}

TEST(Digest, SeesEveryKindOfDifference) {
  const uint64_t key = TensorKey("w");
  std::vector<float> values(64, 0.0f);
  values[3] = 1.0f;
  const Digest digest = DigestOf(values, key, 0, 64);
  for (int bit = 0; bit < 32; ++bit) {  // one flipped bit
    std::vector<float> other = values;
    other[5] = std::bit_cast<float>(std::bit_cast<uint32_t>(other[5]) ^ (1u << bit));
    EXPECT_NE(DigestOf(other, key, 0, 64), digest) << bit;
  }
  std::vector<float> swapped = values;
  std::swap(swapped[3], swapped[4]);
  EXPECT_NE(DigestOf(swapped, key, 0, 64), digest);
  EXPECT_NE(DigestOf(values, TensorKey("v"), 0, 64), digest);
}

TEST(Digest, AdditionCarries) {
  Digest digest{~0ull, 1};
  digest += Digest{1, 0};
  EXPECT_EQ(digest, (Digest{0, 2}));
  digest = {~0ull, ~0ull};
  digest += Digest{1, 0};
  EXPECT_EQ(digest, Digest{});
}

TEST(Digest, HexGoesBothWays) {
  const Digest digest{0x0123456789abcdefull, 0xfedcba9876543210ull};
  EXPECT_EQ(ToHex(digest), "fedcba98765432100123456789abcdef");
  Digest back;
  ASSERT_TRUE(FromHex(ToHex(digest), &back));
  EXPECT_EQ(back, digest);
  for (const char* bad :
       {"", "12", "fedcba98765432100123456789abcdeg", "FEDCBA98765432100123456789ABCDEF",
        "fedcba98765432100123456789abcdef0"}) {
    EXPECT_FALSE(FromHex(bad, &back)) << bad;
  }
}

}  // namespace
}  // namespace lockstep
