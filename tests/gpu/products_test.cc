// The products that are our own: against sums in double, the same bits whatever shares a call, and
// which they are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/gpu/kernels_fixture.h"
#include "worker/device/cuda/own_products.h"

namespace lockstep::device::cuda {
namespace {

// How factors come.
enum class Given { kFp32, kBf16, kRoundedOnTheWay };
constexpr Given kAllGiven[] = {Given::kFp32, Given::kBf16, Given::kRoundedOnTheWay};

SmallProduct ProductOf(bool transpose_a, bool transpose_b, Given given, int64_t m, int64_t n,
                       int64_t k) {
  SmallProduct p;
  p.transpose_a = transpose_a;
  p.transpose_b = transpose_b;
  p.m = m, p.n = n, p.k = k;
  p.a_row = transpose_a ? m : k;
  p.b_row = transpose_b ? k : n;
  p.c_row = n;
  p.bf16 = given != Given::kFp32;
  p.a_floats = given == Given::kRoundedOnTheWay;
  p.b_floats = p.a_floats && transpose_a;
  return p;
}
std::string Describe(const SmallProduct& p) {
  return absl::StrCat(p.m, "x", p.n, "x", p.k, p.transpose_a ? " A^T" : "",
                      p.transpose_b ? " B^T" : "", p.bf16 ? ", bf16" : "",
                      p.a_floats ? " of floats" : "", ", ", p.count, " at once");
}

uint16_t Bf16Of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A factor in device memory, `lead` elements behind an aligned address, and as it counts.
class Factor {
 public:
  Factor(int64_t size, uint32_t seed, bool bf16, bool floats, int lead = 0)
      : values_(RandomFloats(size, seed)) {
    if (!bf16 || floats) floats_ = std::make_unique<Buffer<float>>(values_, lead);
    if (!bf16) return;
    std::vector<uint16_t> rounded;
    for (float& value : values_) {
      rounded.push_back(Bf16Of(value));
      const uint32_t bits = uint32_t{rounded.back()} << 16;
      std::memcpy(&value, &bits, sizeof(value));
    }
    if (!floats) bf16_ = std::make_unique<Buffer<uint16_t>>(rounded, lead);
  }
  const void* From(int64_t element) const {
    return floats_ != nullptr ? static_cast<const void*>(*floats_ + element) : *bf16_ + element;
  }
  double At(int64_t element) const { return values_[static_cast<size_t>(element)]; }

 private:
  std::vector<float> values_;
  std::unique_ptr<Buffer<float>> floats_;
  std::unique_ptr<Buffer<uint16_t>> bf16_;
};

class ProductsTest : public KernelsTest {
 protected:
  // Of elements that are not to be written there must be none that was.
  static constexpr float kBefore = 12345.678f;

  void MatchesItsDefinition(const SmallProduct& p, bool with_bias, int lead) {
    SCOPED_TRACE(absl::StrCat(Describe(p), p.accumulate ? " +=" : "", with_bias ? " bias" : "",
                              p.relu ? " relu" : "", ", lead ", lead));
    const int64_t a_rows = p.transpose_a ? p.k : p.m, b_rows = p.transpose_b ? p.n : p.k;
    const Factor a(p.a_stride * (p.count - 1) + a_rows * p.a_row, 1, p.bf16, p.a_floats, lead),
        b(p.b_stride * (p.count - 1) + b_rows * p.b_row, 2, p.bf16, p.b_floats, lead);
    const std::vector<float> bias = RandomFloats(p.n, 3);
    const int64_t size = p.c_stride * (p.count - 1) + p.m * p.c_row;
    const std::vector<float> before =
        p.accumulate ? RandomFloats(size, 4) : std::vector<float>(size, kBefore);
    const Buffer<float> c(before, lead), device_bias(bias, lead);
    MultiplySmall(q(), p, a.From(0), b.From(0), with_bias ? +device_bias : nullptr, c);
    const std::vector<float> result = c.Read();
    std::vector<bool> written(result.size());
    for (int64_t at = 0; at < p.count * p.m * p.n; ++at) {
      const int64_t product = at / (p.m * p.n), i = at / p.n % p.m, j = at % p.n;
      const auto place = static_cast<size_t>(product * p.c_stride + i * p.c_row + j);
      written[place] = true;
      double sum = p.accumulate ? before[place] : 0, magnitude = std::abs(sum);
      for (int64_t t = 0; t < p.k; ++t) {
        const double term =
            a.At(product * p.a_stride + (p.transpose_a ? t * p.a_row + i : i * p.a_row + t)) *
            b.At(product * p.b_stride + (p.transpose_b ? j * p.b_row + t : t * p.b_row + j));
        sum += term;
        magnitude += std::abs(term);
      }
      if (with_bias) {
        sum += bias[static_cast<size_t>(j)];
        magnitude += std::abs(bias[static_cast<size_t>(j)]);
      }
      if (p.relu) sum = std::max(sum, 0.0);
      ASSERT_NEAR(result[place], sum, magnitude * (p.bf16 ? 0x1p-17 : 0x1p-20)) << i << ", " << j;
    }
    for (size_t i = 0; i < result.size(); ++i) {
      if (written[i]) continue;
      ASSERT_EQ(result[i], before[i]) << "written behind a row, at " << i;
    }
  }

  std::vector<float> Multiply(const SmallProduct& p, const void* a, const void* b) {
    const Buffer<float> c(static_cast<size_t>(p.c_stride * (p.count - 1) + p.m * p.c_row), kBefore);
    MultiplySmall(q(), p, a, b, nullptr, c);
    return c.Read();
  }
};

constexpr std::pair<bool, bool> kLayouts[] = {{false, true}, {false, false}, {true, false}};

TEST_F(ProductsTest, MatchTheirDefinition) {
  struct Size {
    int64_t m, n, k;
  };
  // Around what tiles, stages and slices are made of; many small tiles, and the large ones.
  const std::vector<Size> sizes = {{1, 1, 1},       {3, 5, 7},      {17, 31, 15},   {16, 16, 16},
                                   {33, 10, 64},    {40, 68, 100},  {64, 36, 33},   {2, 17, 300},
                                   {5, 132, 31},    {300, 140, 12}, {700, 400, 20}, {1284, 1285, 3},
                                   {1300, 1284, 40}};
  for (const auto& [transpose_a, transpose_b] : kLayouts) {
    for (const Given given : kAllGiven) {
      for (size_t i = 0; i < sizes.size(); ++i) {
        const auto& [m, n, k] = sizes[i];
        SmallProduct p = ProductOf(transpose_a, transpose_b, given, m, n, k);
        MatchesItsDefinition(p, false, 0);
        if (m * n > 100000) continue;
        // Rows with something between them, by four and not; what else is done with the sums.
        const int apart = i % 2 == 0 ? 4 : 3;
        p.a_row += apart, p.b_row += apart, p.c_row += apart;
        p.accumulate = i % 3 == 0;
        MatchesItsDefinition(p, i % 2 == 0, i % 3 == 1 ? 1 : 0);
        p = ProductOf(transpose_a, transpose_b, given, m, n, k);
        p.relu = true;
        MatchesItsDefinition(p, true, i % 2 == 0 ? 0 : 3);
        p.count = 3;
        p.a_stride = p.a_row * (transpose_a ? k : m) + 4;
        p.b_stride = p.b_row * (transpose_b ? n : k) + 8;
        p.c_stride = m * n + (i % 2 == 0 ? 4 : 1);
        p.relu = false;
        MatchesItsDefinition(p, false, 0);
      }
    }
  }
}

// Those that are given as fp32 have the bits of rounding first.
TEST_F(ProductsTest, RoundOnTheWay) {
  for (const auto& [transpose_a, transpose_b] : kLayouts) {
    for (const auto& [m, n, k] : {std::tuple{33, 36, 100}, {7, 13, 45}, {1300, 1284, 24}}) {
      const SmallProduct rounded = ProductOf(transpose_a, transpose_b, Given::kBf16, m, n, k);
      const SmallProduct p = ProductOf(transpose_a, transpose_b, Given::kRoundedOnTheWay, m, n, k);
      SCOPED_TRACE(Describe(p));
      const Factor a(m * k, 5, true, false), b(k * n, 6, true, false),
          a_floats(m * k, 5, true, true), b_floats(k * n, 6, true, p.b_floats);
      EXPECT_TRUE(SameBytes(Multiply(p, a_floats.From(0), b_floats.From(0)),
                            Multiply(rounded, a.From(0), b.From(0))));
    }
  }
}

// The tile, which the number of rows chooses, does not change a row's bits.
TEST_F(ProductsTest, RowsDoNotDependOnTheirNumber) {
  constexpr int64_t kN = 132, kMost = 8500;
  for (const bool transpose_b : {false, true}) {
    for (const Given given : {Given::kFp32, Given::kBf16}) {
      // Of nine stages: the first slice has two of them.
      const int64_t k = given == Given::kFp32 ? 140 : 260;
      SmallProduct p = ProductOf(false, transpose_b, given, kMost, kN, k);
      const Factor a(kMost * k, 7, p.bf16, p.a_floats), b(kN * k, 8, p.bf16, p.b_floats);
      const std::vector<float> whole = Multiply(p, a.From(0), b.From(0));
      // From the smallest tile to the largest, and on either side of each step.
      for (const int64_t m : {1, 15, 17, 224, 225, 1664, 1665, 8384, 8385}) {
        p.m = m;
        SCOPED_TRACE(Describe(p));
        const int64_t first = m % 7 * 4;
        const auto begin = whole.begin() + first * kN;
        EXPECT_TRUE(SameBytes(Multiply(p, a.From(first * k), b.From(0)),
                              std::vector<float>(begin, begin + m * kN)));
      }
    }
  }
}

// Nor do the leaves of a call change each other's.
TEST_F(ProductsTest, LeavesDoNotDependOnEachOther) {
  constexpr int64_t kM = 68, kN = 132;
  for (const Given given : kAllGiven) {
    for (const int64_t k : {5, 16, 130}) {
      SmallProduct p = ProductOf(true, false, given, kM, kN, k);
      p.a_stride = kM * k, p.b_stride = kN * k, p.c_stride = kM * kN + 4;
      constexpr int kMost = 70;
      const Factor a(kMost * p.a_stride, 9, p.bf16, p.a_floats),
          b(kMost * p.b_stride, 10, p.bf16, p.b_floats);
      const auto alone = [&](int leaf) {
        p.count = 1;
        return Multiply(p, a.From(leaf * p.a_stride), b.From(leaf * p.b_stride));
      };
      for (const int count : {2, 8, 9, kMost}) {
        p.count = count;
        SCOPED_TRACE(Describe(p));
        const std::vector<float> together = Multiply(p, a.From(0), b.From(0));
        for (const int leaf : {0, 1, count - 1}) {
          const auto begin = together.begin() + leaf * p.c_stride;
          EXPECT_TRUE(SameBytes(alone(leaf), std::vector<float>(begin, begin + kM * kN)));
        }
      }
    }
  }
}

TEST_F(ProductsTest, ReluKeepsNan) {
  std::vector<float> values(16, -1.0f);
  values[5] = NAN;
  const Buffer<float> a(values), b(std::vector<float>(16, 1.0f));
  SmallProduct p = ProductOf(false, true, Given::kFp32, 4, 4, 4);
  p.relu = true;
  const std::vector<float> y = Multiply(p, a, b);
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 4 == 1) << i;
}

// ---- which products are ours.

class NoBlas : public Blas {
 public:
  std::string version() const override { return "the vendor's"; }
  absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape&) override {
    return absl::UnimplementedError("the vendor's");
  }
};

TEST(OwnProductsTest, FollowTheRule) {
  const std::unique_ptr<Blas> blas = WithOwnProducts(std::make_unique<NoBlas>());
  EXPECT_EQ(blas->version(), "the vendor's");
  const auto is_own = [&](const ProductShape& s) {
    const auto product = blas->MakeProduct(s);
    EXPECT_EQ(product.ok(), IsOwnProduct(s));
    EXPECT_TRUE(!product.ok() || (*product)->algorithm() == "own small product");
    return product.ok();
  };
  const ProductShape forward = {.transpose_b = true, .m = 128, .n = 1024, .k = 1024};
  const auto with = [](ProductShape s, const auto& change) {
    change(s);
    return s;
  };
  for (const int64_t m : {1, 128, 100000}) {  // samples
    EXPECT_TRUE(is_own(with(forward, [&](ProductShape& s) { s.m = m; })));
    EXPECT_FALSE(is_own(with(forward, [&](ProductShape& s) { s.m = m, s.n = 1025; })));
    EXPECT_FALSE(is_own(with(forward, [&](ProductShape& s) { s.m = m, s.k = 1025; })));
  }
  EXPECT_TRUE(is_own(with(forward, [](ProductShape& s) { s.transpose_b = false; })));
  EXPECT_FALSE(is_own(with(forward, [](ProductShape& s) { s.factors = Factors::kTf32; })));
  EXPECT_FALSE(is_own(with(forward, [](ProductShape& s) { s.transpose_a = true; })));
  EXPECT_FALSE(is_own(with(forward, [](ProductShape& s) { s.a_row = kMostOwnRow + 1; })));
  EXPECT_TRUE(is_own(with(forward, [](ProductShape& s) { s.factors = Factors::kBf16; })));
  const ProductShape gradient = {.transpose_a = true, .m = 1024, .n = 1024, .k = 2048};
  EXPECT_TRUE(is_own(gradient));
  EXPECT_TRUE(is_own(with(gradient, [](ProductShape& s) { s.k = 1; })));
  EXPECT_FALSE(is_own(with(gradient, [](ProductShape& s) { s.k = 2049; })));
  EXPECT_FALSE(is_own(with(gradient, [](ProductShape& s) { s.m = 1025; })));
  EXPECT_FALSE(is_own(with(gradient, [](ProductShape& s) { s.n = 1025; })));
  // What is wrong is the vendor's to say.
  EXPECT_FALSE(is_own(with(forward, [](ProductShape& s) { s.n = 0; })));
  EXPECT_FALSE(is_own(with(forward, [](ProductShape& s) { s.a_row = 1023; })));
}

// A norm that is made with the product, of leaves with a few rows: the bits of two calls.
TEST_F(ProductsTest, NormsBesideThemHaveTheBitsOfTwoCalls) {
  constexpr float kEpsilon = 1e-5f;
  const auto check = [&](Given given, const std::vector<int64_t>& rows, int64_t n, int64_t k,
                         bool relu, bool joins_forward) {
    SCOPED_TRACE(absl::StrCat(rows.size(), " leaves from ", rows[0], " rows, relu ", relu));
    const Leaves leaves = LeavesOf(rows);
    const int64_t m = leaves.total(), stride = 2 * n + 3;
    const auto elements = static_cast<size_t>(m * n);
    const auto records = static_cast<size_t>(stride * leaves.count);
    const BatchNormShape shape = {n, relu, ElementType::kFp32};
    const Buffer<float> bias(RandomFloats(n, 21)), weight(RandomFloats(n, 22, 0.5, 1.5)),
        shift(RandomFloats(n, 23));

    SmallProduct p = ProductOf(false, true, given, m, n, k);
    SCOPED_TRACE(Describe(p));
    const Factor x(m * k, 24, p.bf16, p.a_floats), w(n * k, 25, p.bf16, false);
    Buffer<float> c(elements, kBefore), y(elements, kBefore), apart(elements, kBefore);
    const Buffer<float> moments(records, kBefore);
    MultiplySmall(q(), p, x.From(0), w.From(0), bias, c);
    BatchNormForwardOfLeaves(q(), shape, leaves, c, moments, moments + n, stride, kEpsilon, weight,
                             shift, nullptr, y);
    const Buffer<float> own_c(elements, kBefore), own_y(elements, kBefore),
        own_moments(records, kBefore);
    ASSERT_EQ(MultiplySmallThenNorm(
                  q(), p, leaves, x.From(0), w.From(0), bias, own_c,
                  {relu, kEpsilon, weight, shift, own_moments, own_moments + n, stride, own_y}),
              joins_forward);
    if (joins_forward) {
      EXPECT_TRUE(SameBytes(own_c.Read(), c.Read()));
      EXPECT_TRUE(SameBytes(own_moments.Read(), moments.Read()));
      EXPECT_TRUE(SameBytes(own_y.Read(), y.Read()));
    }

    p = ProductOf(false, false, given, m, n, k);
    const Factor dy(m * k, 26, p.bf16, p.a_floats), back(k * n, 27, p.bf16, false);
    const Moments own = {moments, moments + n, stride};
    const Buffer<float> g(elements, kBefore), dx(elements, kBefore), sums(records, kBefore);
    MultiplySmall(q(), p, dy.From(0), back.From(0), nullptr, g);
    BatchNormBackwardOfLeaves(q(), shape, leaves, c, y, g, own, kEpsilon, weight, sums, sums + n,
                              stride, dx);
    const std::vector<float> expected = dx.Read(), xs = c.Read(), ys = y.Read();
    const Buffer<float> own_sums(records, kBefore);
    for (const auto* to : {&apart, &c, &y}) {  // also over what it reads
      ASSERT_TRUE(MultiplySmallThenNormBackward(
          q(), p, leaves, dy.From(0), back.From(0),
          {c, relu ? +y : nullptr, own, kEpsilon, weight, own_sums, own_sums + n, stride, *to}));
      EXPECT_TRUE(SameBytes(to->Read(), expected));
      EXPECT_TRUE(SameBytes(own_sums.Read(), sums.Read()));
      c.Write(xs), y.Write(ys);
    }
  };
  // Around a tile's rows, columns and leaves, and the slices of a sum; factors not by four.
  const std::vector<std::vector<int64_t>> leaves = {
      {16, 16, 16, 14}, {1}, {32, 32, 5}, std::vector<int64_t>(32, 1), {31, 1, 1, 30, 2}, {17, 15}};
  struct Size {
    int64_t n, k;
    bool wide;
  };
  const std::vector<Size> sizes = {{4, 4, true}, {36, 10, false}, {68, 300, true}, {16, 1, false}};
  for (const Given given : {Given::kFp32, Given::kRoundedOnTheWay}) {
    for (size_t l = 0; l < leaves.size(); ++l) {
      for (size_t i = 0; i < sizes.size(); ++i) {
        const auto& [n, k, wide] = sizes[i];
        check(given, leaves[l], n, k, (i + l) % 2 == 0, wide);
      }
    }
  }
}

// Leaves of many rows or none, channels not by four, many rows, factors that are rounded before.
TEST_F(ProductsTest, NormsThatAreNotMadeBesideThem) {
  const auto joins = [&](Given given, const std::vector<int64_t>& rows, int64_t n) {
    const Leaves leaves = LeavesOf(rows);
    const SmallProduct p = ProductOf(false, false, given, leaves.total(), n, 4);
    const Factor a(leaves.total() * 4, 31, p.bf16, p.a_floats), b(4 * n, 32, p.bf16, false);
    const Buffer<float> memory(static_cast<size_t>((leaves.total() + 1) * n), 0.0f);
    return MultiplySmallThenNormBackward(
        q(), p, leaves, a.From(0), b.From(0),
        {memory, nullptr, {memory, memory, n}, 1e-5f, memory, memory, memory, n, memory});
  };
  EXPECT_TRUE(joins(Given::kFp32, {32, 1}, 8));
  EXPECT_FALSE(joins(Given::kFp32, {32, 33}, 8));
  EXPECT_FALSE(joins(Given::kFp32, {2, 0}, 8));
  EXPECT_FALSE(joins(Given::kFp32, {4, 4}, 7));
  EXPECT_FALSE(joins(Given::kFp32, std::vector<int64_t>(32, 32), 288));
  EXPECT_FALSE(joins(Given::kBf16, {4}, 8));
}

TEST_F(ProductsTest, AreRunThroughTheInterface) {
  const std::unique_ptr<Blas> blas = WithOwnProducts(std::make_unique<NoBlas>());
  constexpr int64_t kM = 5, kN = 6, kK = 7, kStride = 60;
  const Buffer<float> bias(RandomFloats(kN, 13));
  for (const Given given : kAllGiven) {
    ProductShape shape = {.m = kM, .n = kN, .k = kK};
    shape.factors = given == Given::kFp32 ? Factors::kFp32 : Factors::kBf16;
    shape.floats = given != Given::kBf16;
    ProductShape forward = shape, gradient = shape;
    forward.transpose_b = forward.bias = forward.relu = true;
    gradient.transpose_a = true;
    const auto rows = blas->MakeProduct(forward), weights = blas->MakeProduct(gradient);
    ASSERT_TRUE(rows.ok() && weights.ok());
    EXPECT_EQ((*rows)->takes_floats(), given == Given::kRoundedOnTheWay);
    EXPECT_EQ((*weights)->takes_floats(), given == Given::kRoundedOnTheWay);
    const Buffer<float> expected(2 * kStride, kBefore), c(2 * kStride, kBefore);

    SmallProduct p = ProductOf(false, true, given, kM - 1, kN, kK);
    p.relu = true;
    SCOPED_TRACE(Describe(p));
    const Factor a(2 * kStride, 11, p.bf16, p.a_floats), b(2 * kStride, 12, p.bf16, false);
    MultiplySmall(q(), p, a.From(0), b.From(0), bias, expected);
    (*rows)->Run(q(), kM - 1, a.From(0), b.From(0), bias, c, nullptr);
    EXPECT_TRUE(SameBytes(c.Read(), expected.Read()));

    p = ProductOf(true, false, given, kM, kN, kK);
    p.count = 2;
    p.a_stride = p.b_stride = p.c_stride = kStride;
    const Factor x(2 * kStride, 14, p.bf16, p.b_floats);
    MultiplySmall(q(), p, a.From(0), x.From(0), nullptr, expected);
    (*weights)->RunBatch(q(), 2, a.From(0), kStride, x.From(0), kStride, c, kStride, nullptr);
    EXPECT_TRUE(SameBytes(c.Read(), expected.Read()));
  }
}

}  // namespace
}  // namespace lockstep::device::cuda
