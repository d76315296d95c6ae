// Tensors that are stored as bf16, on devices that do so: every kernel against a reference in
// double on the same values, of which a result is the nearest bf16; and against the same kernel on
// floats, where that is what it rounds.
#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

constexpr float kEpsilon = 1e-5f;

// Values of bf16 as floats, and as they are stored.
struct Values {
  std::vector<float> floats;
  std::vector<uint16_t> stored;
  explicit Values(std::vector<float> of) : floats(Rounded(std::move(of), Precision::kBf16)) {
    for (const float value : floats) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      stored.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
};

std::vector<float> FloatsOf(const std::vector<uint16_t>& stored) {
  std::vector<float> values;
  for (const uint16_t value : stored) {
    const uint32_t bits = uint32_t{value} << 16;
    values.emplace_back();
    std::memcpy(&values.back(), &bits, sizeof(bits));
  }
  return values;
}

// The nearest bf16 of what is within the tolerance of the expected.
testing::AssertionResult NearestOf(const std::vector<float>& actual,
                                   const std::vector<double>& expected, double tolerance) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = tolerance * std::max(1.0, std::abs(expected[i]));
    const double most = std::max(std::abs(expected[i]) + error, 0x1p-126);
    const double limit = std::ldexp(1.0, std::ilogb(most) - 8) + error;
    if (!(std::abs(actual[i] - expected[i]) <= limit)) {
      return testing::AssertionFailure() << "element " << i << " of " << actual.size() << " is "
                                         << actual[i] << ", expected " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

class StoredBf16Test : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (!device().stores_bf16()) GTEST_SKIP() << "this device stores fp32";
  }
  Buffer<uint16_t> OutStored(size_t size) { return OutOf<uint16_t>(size); }
  // y of two samples against a reference; of a convolution that has a stride, dx, in phases.
  void CheckOneWay(Conv2dShape s);
};

// ---- convolutions.

std::vector<Conv2dShape> ConvShapes() {
  std::vector<Conv2dShape> shapes = {
      {.height = 9, .width = 8, .in = 3, .out = 17, .kernel = 7, .stride = 2, .padding = 3},
      {.height = 6, .width = 5, .in = 17, .out = 3, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 18, .width = 19, .in = 3, .out = 64, .kernel = 7, .stride = 2, .padding = 3},
      {.height = 9, .width = 150, .in = 4, .out = 128, .kernel = 3, .stride = 2},
      {.height = 12, .width = 10, .in = 1, .out = 64, .kernel = 8, .stride = 2, .padding = 1},
      {.height = 4, .width = 4, .in = 3, .out = 64, .kernel = 3, .stride = 2},
      {.height = 5, .width = 7, .in = 40, .out = 100, .kernel = 3, .padding = 1},
      {.height = 4, .width = 4, .in = 136, .out = 130, .kernel = 1},
      {.height = 6, .width = 6, .in = 128, .out = 256, .kernel = 1},
      {.height = 4, .width = 4, .in = 192, .out = 128, .kernel = 1},
      {.height = 7, .width = 6, .in = 64, .out = 128, .kernel = 1, .stride = 2},
      {.height = 6, .width = 6, .in = 96, .out = 128, .kernel = 3, .padding = 1},
      {.height = 5, .width = 5, .in = 64, .out = 192, .kernel = 3, .padding = 1},
      {.height = 5, .width = 4, .in = 520, .out = 256, .kernel = 1},
      {.height = 6, .width = 5, .in = 256, .out = 128, .kernel = 1},
      {.height = 6, .width = 5, .in = 128, .out = 64, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 4, .width = 5, .in = 256, .out = 256, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 7, .width = 5, .in = 128, .out = 64, .kernel = 3, .padding = 1},
      {.height = 2, .width = 126, .in = 64, .out = 64, .kernel = 3, .padding = 1},
      {.height = 2, .width = 127, .in = 64, .out = 64, .kernel = 3, .padding = 1},
      {.height = 9, .width = 9, .in = 16, .out = 16, .kernel = 3, .padding = 1},
      {.height = 9, .width = 9, .in = 16, .out = 32, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 7, .width = 7, .in = 64, .out = 64, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 5, .width = 6, .in = 64, .out = 132, .kernel = 3, .padding = 1},
      {.height = 7, .width = 9, .in = 32, .out = 20, .kernel = 3, .padding = 2, .dilation = 2},
      {.height = 9, .width = 5, .in = 16, .out = 56, .kernel = 5, .padding = 2},
      {.height = 2, .width = 70, .in = 32, .out = 64, .kernel = 3, .padding = 1},
      {.height = 6, .width = 7, .in = 64, .out = 16, .kernel = 2, .padding = 1, .dilation = 2},
      {.height = 5, .width = 7, .in = 16, .out = 64, .kernel = 2, .padding = 1, .dilation = 2},
      {.height = 8, .width = 8, .in = 64, .out = 64, .kernel = 3, .padding = 1, .groups = 2},
      {.height = 7, .width = 7, .in = 20, .out = 160, .kernel = 3, .stride = 3, .dilation = 2},
      {.height = 12, .width = 12, .in = 48, .out = 8, .kernel = 5, .stride = 2, .padding = 2},
      {.height = 6, .width = 6, .in = 34, .out = 16, .kernel = 3, .padding = 1, .groups = 2}};
  for (size_t i = 0; i < shapes.size(); ++i) {
    shapes[i].precision = Precision::kBf16;
    shapes[i].bias = i % 2 == 0;
    shapes[i].activation = i % 3 == 0 ? Activation::kRelu : Activation::kNone;
  }
  return shapes;
}

// Calls visit(index of y, index of x, index of weight) for every product.
template <class Visit>
void ForEachProduct(const Conv2dShape& s, int64_t rows, Visit visit) {
  const int64_t own_in = s.in / s.groups, own_out = s.out / s.groups;
  const int64_t places = s.out_height() * s.out_width();
  for (int64_t place = 0; place < rows * places; ++place) {
    const int64_t row = place / places;
    for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap) {
      const int64_t h =
          place % places / s.out_width() * s.stride - s.padding + tap / s.kernel * s.dilation;
      const int64_t w = place % s.out_width() * s.stride - s.padding + tap % s.kernel * s.dilation;
      if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
      const int64_t x = ((row * s.height + h) * s.width + w) * s.in;
      for (int64_t o = 0; o < s.out; ++o) {
        for (int64_t i = 0; i < own_in; ++i) {
          visit(place * s.out + o, x + o / own_out * own_in + i,
                (o * s.kernel * s.kernel + tap) * own_in + i);
        }
      }
    }
  }
}

void StoredBf16Test::CheckOneWay(Conv2dShape s) {
  constexpr int64_t kRows = 2;
  SCOPED_TRACE(std::to_string(s.in) + " to " + std::to_string(s.out) + ", kernel " +
               std::to_string(s.kernel));
  s.precision = Precision::kBf16;
  s.x_type = s.y_type = ElementType::kBf16;
  const int64_t inputs = kRows * s.height * s.width * s.in,
                outputs = kRows * s.out_height() * s.out_width() * s.out;
  const bool backward = s.stride > 1;  // dx of it, in phases
  const Values of_source(RandomFloats(backward ? outputs : inputs, 48)),
      of_w(RandomFloats(s.out * s.kernel * s.kernel * s.in, 49));
  auto conv = device().MakeConv2d(s, {kRows});
  ASSERT_TRUE(conv.ok()) << conv.status();
  const auto source = In(of_source.stored), result = OutStored(backward ? inputs : outputs);
  const auto w = In(of_w.floats);
  const auto scratch = Scratch((*conv)->scratch_bytes());
  const auto rounded = InBf16(w);
  (*conv)->Pack(stream(), w, rounded);
  if (backward) {
    (*conv)->BackwardInput(stream(), kRows, source, result, scratch);
  } else {
    (*conv)->Forward(stream(), kRows, source, nullptr, result, scratch);
  }
  std::vector<double> expected(result.size(), 0.0);
  ForEachProduct(s, kRows, [&](int64_t at_y, int64_t at_x, int64_t at_w) {
    expected[backward ? at_x : at_y] +=
        static_cast<double>(of_source.floats[backward ? at_y : at_x]) * of_w.floats[at_w];
  });
  EXPECT_TRUE(NearestOf(FloatsOf(result.Read()), expected, 2e-5));
}

TEST_P(StoredBf16Test, ConvolutionsMatchTheReference) {
  int64_t rows = 0;
  for (Conv2dShape s : ConvShapes()) {
    rows = rows % 5 + 1;
    for (const auto& [x_type, y_type] : {std::pair(ElementType::kBf16, ElementType::kBf16),
                                         std::pair(ElementType::kFp32, ElementType::kBf16),
                                         std::pair(ElementType::kBf16, ElementType::kFp32)}) {
      s.x_type = x_type;
      s.y_type = y_type;
      const bool x_stored = x_type == ElementType::kBf16, y_stored = y_type == ElementType::kBf16;
      SCOPED_TRACE(std::to_string(s.in) + " to " + std::to_string(s.out) + ", kernel " +
                   std::to_string(s.kernel) + (x_stored ? ", x stored" : "") +
                   (y_stored ? ", y stored" : ""));
      const int64_t places = s.out_height() * s.out_width();
      const Values of_x(RandomFloats(rows * s.height * s.width * s.in, 40)),
          of_dy(RandomFloats(rows * places * s.out, 41)),
          of_w(RandomFloats(s.out * s.kernel * s.kernel * (s.in / s.groups), 42));
      const std::vector<float> of_bias = RandomFloats(s.out, 43);
      auto conv = device().MakeConv2d(s, {rows});
      ASSERT_TRUE(conv.ok()) << conv.status();
      const auto x = In(of_x.floats), dy = In(of_dy.floats), w = In(of_w.floats),
                 bias = In(of_bias);
      const auto stored_x = In(of_x.stored), stored_dy = In(of_dy.stored);
      const auto y = Out(of_dy.floats.size()), dx = Out(of_x.floats.size()),
                 dw = Out(of_w.floats.size()), db = Out(s.out);
      const auto stored_y = OutStored(y.size()), stored_dx = OutStored(dx.size());
      const auto scratch = Scratch((*conv)->scratch_bytes());
      const auto any = [](bool stored, const auto& of_bf16, const auto& of_floats) {
        return stored ? static_cast<void*>(of_bf16.data()) : of_floats.data();
      };
      void* const in_x = any(x_stored, stored_x, x);
      void* const in_dy = any(y_stored, stored_dy, dy);
      const auto rounded = InBf16(w);
      (*conv)->Pack(stream(), w, rounded);
      (*conv)->Forward(stream(), rows, in_x, s.bias ? bias.data() : nullptr,
                       any(y_stored, stored_y, y), scratch);
      (*conv)->BackwardInput(stream(), rows, in_dy, any(x_stored, stored_dx, dx), scratch);
      (*conv)->BackwardWeight(stream(), rows, in_x, in_dy, dw, s.bias ? db.data() : nullptr,
                              scratch);
      ASSERT_TRUE(stream().Synchronize().ok());

      std::vector<double> expected_y(y.size(), 0.0), expected_dx(dx.size(), 0.0),
          expected_dw(dw.size(), 0.0), expected_db(s.out, 0.0);
      ForEachProduct(s, rows, [&](int64_t at_y, int64_t at_x, int64_t at_w) {
        const double vx = of_x.floats[at_x], vdy = of_dy.floats[at_y], vw = of_w.floats[at_w];
        expected_y[at_y] += vx * vw;
        expected_dx[at_x] += vdy * vw;
        expected_dw[at_w] += vdy * vx;
      });
      for (size_t i = 0; i < y.size(); ++i) {
        if (s.bias) expected_y[i] += of_bias[i % s.out];
        if (s.activation == Activation::kRelu) expected_y[i] = std::max(expected_y[i], 0.0);
        expected_db[i % s.out] += of_dy.floats[i];
      }
      constexpr double kTolerance = 5e-5;  // of sums of 2000 products; tensor cores drop low bits
      EXPECT_TRUE(y_stored ? NearestOf(FloatsOf(stored_y.Read()), expected_y, kTolerance)
                           : Near(y.Read(), expected_y, kTolerance));
      EXPECT_TRUE(x_stored ? NearestOf(FloatsOf(stored_dx.Read()), expected_dx, kTolerance)
                           : Near(dx.Read(), expected_dx, kTolerance));
      EXPECT_TRUE(Near(dw.Read(), expected_dw, kTolerance));
      if (!s.bias) continue;
      EXPECT_TRUE(Near(db.Read(), expected_db, kTolerance));
    }
  }
}

// Kernels are others where there are so many tiles that they occupy a GPU: larger tiles, or blocks
// that make several.
TEST_P(StoredBf16Test, ConvolutionsOfManyTilesMatchTheReference) {
  constexpr int64_t kOut = 132 * 128;
  for (const Conv2dShape& s : std::initializer_list<Conv2dShape>{
           {.height = 1, .width = 2, .in = 160, .out = kOut, .kernel = 1},
           {.height = 1, .width = 2, .in = 520, .out = kOut, .kernel = 1},
           {.height = 1, .width = 2, .in = 32, .out = kOut, .kernel = 3, .padding = 1},
           {.height = 185, .width = 184, .in = 40, .out = 136, .kernel = 1},
           {.height = 190, .width = 190, .in = 8, .out = 128, .kernel = 3, .dilation = 2},
           {.height = 259, .width = 261, .in = 136, .out = 16, .kernel = 1, .stride = 2}}) {
    CheckOneWay(s);
  }
}

// Larger tiles too, of a GPU with few multiprocessors.
TEST_P(StoredBf16Test, ConvolutionsOfManyTermsMatchTheReference) {
  for (const Conv2dShape& s : std::initializer_list<Conv2dShape>{
           {.height = 12, .width = 12, .in = 1024, .out = 256, .kernel = 1},
           {.height = 10, .width = 10, .in = 128, .out = 256, .kernel = 3, .padding = 1},
           {.height = 24, .width = 24, .in = 256, .out = 1024, .kernel = 1, .stride = 2}}) {
    CheckOneWay(s);
  }
}

// Also where they lie anywhere: a row begins at an odd element.
TEST_P(StoredBf16Test, RowsOfConvolutionsHaveTheBitsThatTheyHaveAlone) {
  constexpr int64_t kRows = 5;
  for (Conv2dShape s : ConvShapes()) {
    s.bias = false;
    s.x_type = s.y_type = ElementType::kBf16;
    SCOPED_TRACE(std::to_string(s.in) + " to " + std::to_string(s.out) + ", kernel " +
                 std::to_string(s.kernel));
    const int64_t x_row = s.height * s.width * s.in, y_row = s.out_height() * s.out_width() * s.out;
    const Values of_x(RandomFloats(kRows * x_row, 44)), of_dy(RandomFloats(kRows * y_row, 45));
    auto conv = device().MakeConv2d(s, {1, kRows});
    ASSERT_TRUE(conv.ok()) << conv.status();
    const auto x = In(of_x.stored), dy = In(of_dy.stored);
    const auto w = In(RandomFloats(s.out * s.kernel * s.kernel * (s.in / s.groups), 46)),
               bias = In(RandomFloats(s.out, 47));
    const auto scratch = Scratch((*conv)->scratch_bytes());
    const auto rounded = InBf16(w);
    (*conv)->Pack(stream(), w, rounded);
    const auto y = OutStored(kRows * y_row), dx = OutStored(kRows * x_row);
    (*conv)->Forward(stream(), kRows, x, bias, y, scratch);
    (*conv)->BackwardInput(stream(), kRows, dy, dx, scratch);
    std::vector<uint16_t> moved_x(1), moved_dy(1);  // by one element
    moved_x.insert(moved_x.end(), of_x.stored.begin(), of_x.stored.end());
    moved_dy.insert(moved_dy.end(), of_dy.stored.begin(), of_dy.stored.end());
    const auto odd_x = In(moved_x), odd_dy = In(moved_dy);
    const auto own_y = OutStored(kRows * y_row + 1), own_dx = OutStored(kRows * x_row + 1);
    for (int64_t row = 0; row < kRows; ++row) {
      (*conv)->Forward(stream(), 1, odd_x + 1 + row * x_row, bias, own_y + 1 + row * y_row,
                       scratch);
      (*conv)->BackwardInput(stream(), 1, odd_dy + 1 + row * y_row, own_dx + 1 + row * x_row,
                             scratch);
    }
    // Leaves of one call, of which one has no rows, and each as if it were the only one.
    Leaves leaves;
    leaves.count = 3;
    leaves.begin[1] = leaves.begin[2] = 3;
    leaves.begin[3] = kRows;
    const auto dw = Out(3 * w.size()), own_dw = Out(3 * w.size());
    (*conv)->BackwardWeights(stream(), leaves, x, dy, dw, nullptr, w.size(), scratch);
    for (int leaf = 0; leaf < 3; ++leaf) {
      const int64_t first = leaves.begin[leaf];
      (*conv)->BackwardWeight(stream(), leaves.begin[leaf + 1] - first, odd_x + 1 + first * x_row,
                              odd_dy + 1 + first * y_row, own_dw + leaf * w.size(), nullptr,
                              scratch);
    }
    EXPECT_TRUE(SameBits(own_dw.Read(), dw.Read()));
    std::vector<uint16_t> alone_y = own_y.Read(), alone_dx = own_dx.Read();
    alone_y.erase(alone_y.begin());
    alone_dx.erase(alone_dx.begin());
    EXPECT_EQ(alone_y, y.Read());
    EXPECT_EQ(alone_dx, dx.Read());
  }
}

// The same of images, which are floats.
TEST_P(StoredBf16Test, RowsOfImagesHaveTheBitsThatTheyHaveAlone) {
  constexpr int64_t kRows = 5;
  for (Conv2dShape s : ConvShapes()) {
    if (s.in > 4) continue;
    s.bias = false;
    s.y_type = ElementType::kBf16;
    SCOPED_TRACE(std::to_string(s.in) + " to " + std::to_string(s.out) + ", kernel " +
                 std::to_string(s.kernel));
    const int64_t x_row = s.height * s.width * s.in, y_row = s.out_height() * s.out_width() * s.out;
    const Values of_dy(RandomFloats(kRows * y_row, 51));
    auto conv = device().MakeConv2d(s, {1, kRows});
    ASSERT_TRUE(conv.ok()) << conv.status();
    const auto x = In(RandomFloats(kRows * x_row, 50));
    const auto w = In(RandomFloats(s.out * s.kernel * s.kernel * s.in, 52));
    const auto scratch = Scratch((*conv)->scratch_bytes());
    const auto rounded = InBf16(w);
    (*conv)->Pack(stream(), w, rounded);
    const auto y = OutStored(kRows * y_row), own_y = OutStored(kRows * y_row + 1);
    (*conv)->Forward(stream(), kRows, x, nullptr, y, scratch);
    std::vector<uint16_t> moved_dy(1);  // by one element
    moved_dy.insert(moved_dy.end(), of_dy.stored.begin(), of_dy.stored.end());
    const auto dy = In(of_dy.stored), odd_dy = In(moved_dy);
    for (int64_t row = 0; row < kRows; ++row) {
      (*conv)->Forward(stream(), 1, x + row * x_row, nullptr, own_y + 1 + row * y_row, scratch);
    }
    Leaves leaves;  // of which one has no rows
    leaves.count = 3;
    leaves.begin[1] = leaves.begin[2] = 3;
    leaves.begin[3] = kRows;
    const auto dw = Out(3 * w.size()), own_dw = Out(3 * w.size());
    (*conv)->BackwardWeights(stream(), leaves, x, dy, dw, nullptr, w.size(), scratch);
    for (int leaf = 0; leaf < 3; ++leaf) {
      const int64_t first = leaves.begin[leaf];
      (*conv)->BackwardWeight(stream(), leaves.begin[leaf + 1] - first, x + first * x_row,
                              odd_dy + 1 + first * y_row, own_dw + leaf * w.size(), nullptr,
                              scratch);
    }
    EXPECT_TRUE(SameBits(own_dw.Read(), dw.Read()));
    std::vector<uint16_t> alone_y = own_y.Read();
    alone_y.erase(alone_y.begin());
    EXPECT_EQ(alone_y, y.Read());
  }
}

TEST_P(StoredBf16Test, ConvolutionsThatCannotBeStoredSoAreRefused) {
  Conv2dShape s = {.height = 8, .width = 8, .in = 8, .out = 8, .kernel = 3, .padding = 1};
  s.x_type = ElementType::kBf16;
  EXPECT_FALSE(device().MakeConv2d(s, {1}).ok()) << "in fp32";
  s.precision = Precision::kBf16;
  EXPECT_TRUE(device().MakeConv2d(s, {1}).ok());
  s.groups = 8;
  EXPECT_FALSE(device().MakeConv2d(s, {1}).ok()) << "by channels";
}

// ---- batch norm.

struct NormCase {
  int64_t channels, n;
};
const NormCase kNorms[] = {{1, 7},    {3, 33},   {8, 1},    {8, 130},  {12, 31},
                           {16, 301}, {64, 784}, {120, 90}, {264, 40}, {35, 129}};

TEST_P(StoredBf16Test, NormsMatchTheReference) {
  for (const NormCase& c : kNorms) {
    for (const bool relu : {false, true}) {
      for (const bool more : {false, true}) {
        SCOPED_TRACE(std::to_string(c.channels) + " channels, " + std::to_string(c.n) +
                     (relu ? ", relu" : "") + (more ? ", two gradients" : ""));
        const size_t size = static_cast<size_t>(c.channels * c.n);
        const Values of_x(RandomFloats(size, 50, -2, 3)), of_dy(RandomFloats(size, 51)),
            of_more(RandomFloats(size, 52)), of_residual(RandomFloats(size, 53));
        const std::vector<float> of_weight = RandomFloats(c.channels, 54, 0.5, 1.5),
                                 of_bias = RandomFloats(c.channels, 55);
        const BatchNormShape shape = {c.channels, relu, ElementType::kBf16},
                             floats = {c.channels, relu},
                             unmasked = {c.channels, false, ElementType::kBf16};
        const auto x = In(of_x.stored), dy = In(of_dy.stored), second = In(of_more.stored),
                   residual = In(of_residual.stored);
        const auto weight = In(of_weight), bias = In(of_bias);
        const auto mean = Out(c.channels), m2 = Out(c.channels), sum = Out(c.channels),
                   sum_xhat = Out(c.channels);
        const auto y = OutStored(size), g = OutStored(size), dx = OutStored(size);
        device().BatchNormMoments(stream(), shape, c.n, x, mean, m2);
        const Moments moments = {mean, m2, 0, c.n};
        device().BatchNormForward(stream(), shape, c.n, x, moments, kEpsilon, weight, bias,
                                  more ? residual.data() : nullptr, y);
        device().BatchNormGradient(stream(), shape, c.n, x, y, dy, more ? second.data() : nullptr,
                                   moments, kEpsilon, g, sum, sum_xhat);
        device().BatchNormBackward(stream(), unmasked, c.n, x, nullptr, g, moments, kEpsilon,
                                   weight, sum, sum_xhat, 0, dx);

        std::vector<double> of_mean(c.channels, 0.0), of_m2(c.channels, 0.0);
        const double n = static_cast<double>(c.n);
        for (size_t i = 0; i < size; ++i) of_mean[i % c.channels] += of_x.floats[i] / n;
        for (size_t i = 0; i < size; ++i) {
          const double d = of_x.floats[i] - of_mean[i % c.channels];
          of_m2[i % c.channels] += d * d;
        }
        EXPECT_TRUE(Near(mean.Read(), of_mean, 1e-6));
        EXPECT_TRUE(Near(m2.Read(), of_m2, 2e-6));
        const auto deviation = [&](int64_t channel) {
          return std::sqrt(of_m2[channel] / n + kEpsilon);
        };
        std::vector<double> expected_y(size), expected_dx(size), expected_g(size),
            expected_sum(c.channels, 0.0), expected_sum_xhat(c.channels, 0.0);
        const std::vector<float> mask = FloatsOf(y.Read()), stored_g = FloatsOf(g.Read());
        const auto xhat = [&](size_t i) {
          return (of_x.floats[i] - of_mean[i % c.channels]) / deviation(i % c.channels);
        };
        for (size_t i = 0; i < size; ++i) {
          const int64_t channel = i % c.channels;
          expected_y[i] = xhat(i) * of_weight[channel] + of_bias[channel];
          if (more) expected_y[i] += of_residual.floats[i];
          if (relu) expected_y[i] = std::max(expected_y[i], 0.0);
          expected_g[i] = of_dy.floats[i] + (more ? of_more.floats[i] : 0.0);
          if (relu && !(mask[i] > 0)) expected_g[i] = 0;
          expected_sum[channel] += stored_g[i];
          expected_sum_xhat[channel] += stored_g[i] * xhat(i);
        }
        const double tolerance = c.n == 1 ? 1e-4 : 1e-5;
        EXPECT_TRUE(NearestOf(mask, expected_y, tolerance));
        EXPECT_TRUE(NearestOf(stored_g, expected_g, 1e-7));
        EXPECT_TRUE(Near(sum.Read(), expected_sum, 1e-5));
        EXPECT_TRUE(Near(sum_xhat.Read(), expected_sum_xhat, c.n == 1 ? 1e-3 : 1e-5));
        if (c.n == 1) continue;  // a difference of equals
        for (size_t i = 0; i < size; ++i) {
          const int64_t channel = i % c.channels;
          expected_dx[i] =
              of_weight[channel] / deviation(channel) *
              (stored_g[i] - expected_sum[channel] / n - xhat(i) * expected_sum_xhat[channel] / n);
        }
        EXPECT_TRUE(NearestOf(FloatsOf(dx.Read()), expected_dx, 1e-5));

        // What is rounded is what the kernels of floats make of it.
        const auto float_x = In(of_x.floats), float_residual = In(of_residual.floats),
                   float_y = Out(size);
        device().BatchNormForward(stream(), floats, c.n, float_x, moments, kEpsilon, weight, bias,
                                  more ? float_residual.data() : nullptr, float_y);
        EXPECT_TRUE(SameBits(mask, Rounded(float_y.Read(), Precision::kBf16)));
      }
    }
  }
}

TEST_P(StoredBf16Test, NormsGiveTheSameBitsWhereverTheyLie) {
  for (const NormCase& c : kNorms) {
    const size_t size = static_cast<size_t>(c.channels * c.n);
    const Values of_x(RandomFloats(size, 56, -2, 3)), of_dy(RandomFloats(size, 57));
    const auto weight = In(RandomFloats(c.channels, 58)), bias = In(RandomFloats(c.channels, 59));
    std::vector<uint16_t> results[2];
    std::vector<float> sums[2];
    for (const int lead : {0, 1}) {
      const auto moved = [&](const std::vector<uint16_t>& stored) {
        std::vector<uint16_t> all(lead);
        all.insert(all.end(), stored.begin(), stored.end());
        return all;
      };
      const BatchNormShape shape = {c.channels, true, ElementType::kBf16};
      const auto x = In(moved(of_x.stored)), dy = In(moved(of_dy.stored));
      const auto y = OutStored(size + lead), dx = OutStored(size + lead);
      const auto record = Out(4 * c.channels);
      const auto part = [&](int64_t i) { return record + i * c.channels; };
      device().BatchNormMoments(stream(), shape, c.n, x + lead, part(0), part(1));
      const Moments moments = {part(0), part(1), 0, c.n};
      device().BatchNormForward(stream(), shape, c.n, x + lead, moments, kEpsilon, weight, bias,
                                nullptr, y + lead);
      device().BatchNormGradient(stream(), shape, c.n, x + lead, y + lead, dy + lead, nullptr,
                                 moments, kEpsilon, nullptr, part(2), part(3));
      device().BatchNormBackward(stream(), shape, c.n, x + lead, y + lead, dy + lead, moments,
                                 kEpsilon, weight, part(2), part(3), 0, dx + lead);
      for (const auto* of : {&y, &dx}) {
        const std::vector<uint16_t> all = of->Read();
        results[lead].insert(results[lead].end(), all.begin() + lead, all.end());
      }
      sums[lead] = record.Read();
    }
    EXPECT_EQ(results[0], results[1]) << c.channels << " channels, " << c.n;
    EXPECT_TRUE(SameBits(sums[0], sums[1])) << c.channels << " channels, " << c.n;
  }
}

TEST_P(StoredBf16Test, LeavesOfNormsHaveTheBitsThatTheyHaveAlone) {
  const std::vector<int64_t> rows = {1, 33, 700, 2, 2100, 129};
  Leaves leaves;
  leaves.count = static_cast<int>(rows.size());
  for (size_t l = 0; l < rows.size(); ++l) leaves.begin[l + 1] = leaves.begin[l] + rows[l];
  for (const int64_t channels : {3, 8, 64, 120}) {
    for (const bool more : {false, true}) {
      SCOPED_TRACE(std::to_string(channels) + " channels" + (more ? ", two gradients" : ""));
      const size_t size = static_cast<size_t>(leaves.total() * channels);
      const auto x = In(Values(RandomFloats(size, 70)).stored),
                 dy = In(Values(RandomFloats(size, 71)).stored),
                 second = In(Values(RandomFloats(size, 72)).stored);
      const auto weight = In(RandomFloats(channels, 73)), bias = In(RandomFloats(channels, 74));
      const BatchNormShape shape = {channels, true, ElementType::kBf16},
                           unmasked = {channels, false, ElementType::kBf16};
      const int64_t stride = 4 * channels;
      // Into `own` from row `first` and record `leaf` on.
      struct Results {
        Buffer<uint16_t> y, g, dx;
        Buffer<float> records;
      };
      const auto make = [&] {
        return Results{OutStored(size), OutStored(size), OutStored(size),
                       Out(rows.size() * stride)};
      };
      const auto run = [&](const Leaves& of, int64_t first, int64_t leaf, const Results& own) {
        const int64_t at = first * channels;
        float* const record = own.records + leaf * stride;
        const Moments moments = {record, record + channels, stride, 0};
        device().BatchNormMoments(stream(), shape, of, x + at, record, record + channels, stride);
        device().BatchNormForward(stream(), shape, of, x + at, moments, kEpsilon, weight, bias,
                                  more ? second + at : nullptr, own.y + at);
        device().BatchNormGradient(stream(), shape, of, x + at, own.y + at, dy + at,
                                   more ? second + at : nullptr, moments, kEpsilon, own.g + at,
                                   record + 2 * channels, record + 3 * channels, stride);
        device().BatchNormBackward(stream(), unmasked, of, x + at, nullptr, own.g + at, moments,
                                   kEpsilon, weight, record + 2 * channels, record + 3 * channels,
                                   stride, own.dx + at);
      };
      const Results together = make(), alone = make();
      run(leaves, 0, 0, together);
      for (size_t l = 0; l < rows.size(); ++l) {
        run(rows[l], leaves.begin[l], static_cast<int64_t>(l), alone);
      }
      EXPECT_EQ(together.y.Read(), alone.y.Read());
      EXPECT_EQ(together.g.Read(), alone.g.Read());
      EXPECT_EQ(together.dx.Read(), alone.dx.Read());
      EXPECT_TRUE(SameBits(together.records.Read(), alone.records.Read()));
    }
  }
}

// ---- pools and maps round what they are on floats.

TEST_P(StoredBf16Test, PoolsRoundWhatTheyAreOnFloats) {
  const PoolShape shapes[] = {
      {.height = 8, .width = 6, .channels = 16, .kernel = 2, .stride = 2},
      {.height = 5, .width = 7, .channels = 3, .kernel = 2, .stride = 2},
      {.height = 7, .width = 5, .channels = 20, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 9, .width = 8, .channels = 15, .kernel = 4, .stride = 3}};
  constexpr int64_t kRows = 3;
  for (const PoolShape& s : shapes) {
    SCOPED_TRACE(std::to_string(s.channels) + " channels, kernel " + std::to_string(s.kernel));
    PoolShape stored = s;
    stored.type = ElementType::kBf16;
    const size_t in = kRows * s.height * s.width * s.channels,
                 out = kRows * s.out_height() * s.out_width() * s.channels;
    const Values of_x(RandomFloats(in, 60)), of_dy(RandomFloats(out, 61));
    const auto x = In(of_x.stored), dy = In(of_dy.stored), y = OutStored(out), dx = OutStored(in);
    const auto float_x = In(of_x.floats), float_dy = In(of_dy.floats), float_y = Out(out),
               float_dx = Out(in);
    const auto argmax = OutOf<uint8_t>(out), float_argmax = OutOf<uint8_t>(out);
    const auto expect_rounded = [&] {
      EXPECT_TRUE(SameBits(FloatsOf(y.Read()), Rounded(float_y.Read(), Precision::kBf16)));
      EXPECT_TRUE(SameBits(FloatsOf(dx.Read()), Rounded(float_dx.Read(), Precision::kBf16)));
    };
    device().MaxPoolForward(stream(), stored, kRows, x, y, argmax);
    device().MaxPoolBackward(stream(), stored, kRows, dy, argmax, dx);
    device().MaxPoolForward(stream(), s, kRows, float_x, float_y, float_argmax);
    device().MaxPoolBackward(stream(), s, kRows, float_dy, float_argmax, float_dx);
    expect_rounded();
    EXPECT_EQ(argmax.Read(), float_argmax.Read());
    device().AveragePoolForward(stream(), stored, kRows, x, y);
    device().AveragePoolBackward(stream(), stored, kRows, dy, dx);
    device().AveragePoolForward(stream(), s, kRows, float_x, float_y);
    device().AveragePoolBackward(stream(), s, kRows, float_dy, float_dx);
    expect_rounded();
  }
}

TEST_P(StoredBf16Test, GlobalAveragesAreThoseOfFloats) {
  constexpr int64_t kRows = 3;
  for (const int64_t channels : {1, 8, 20, 35}) {
    for (const int64_t spatial : {1, 7, 49, 100}) {
      const Values of_x(RandomFloats(kRows * spatial * channels, 62));
      const std::vector<float> of_dy = RandomFloats(kRows * channels, 63);
      const auto x = In(of_x.stored), dx = OutStored(of_x.stored.size());
      const auto float_x = In(of_x.floats), float_dx = Out(of_x.floats.size()), dy = In(of_dy),
                 y = Out(of_dy.size()), float_y = Out(of_dy.size());
      device().GlobalAveragePoolForward(stream(), kRows, spatial, channels, x, y,
                                        ElementType::kBf16);
      device().GlobalAveragePoolForward(stream(), kRows, spatial, channels, float_x, float_y);
      EXPECT_TRUE(SameBits(y.Read(), float_y.Read()));
      device().GlobalAveragePoolBackward(stream(), kRows, spatial, channels, dy, dx,
                                         ElementType::kBf16);
      device().GlobalAveragePoolBackward(stream(), kRows, spatial, channels, dy, float_dx);
      EXPECT_TRUE(SameBits(FloatsOf(dx.Read()), Rounded(float_dx.Read(), Precision::kBf16)));
    }
  }
}

TEST_P(StoredBf16Test, MapsRoundWhatTheyAreOnFloats) {
  for (const int64_t n : {1, 7, 8, 9, 16, 100, 5000}) {
    const Values of_a(RandomFloats(n, 64, -4, 4)), of_b(RandomFloats(n, 65));
    const auto a = In(of_a.stored), b = In(of_b.stored), out = OutStored(n);
    const auto float_a = In(of_a.floats), float_b = In(of_b.floats), float_out = Out(n);
    const auto expect_rounded = [&](const char* name) {
      EXPECT_TRUE(SameBits(FloatsOf(out.Read()), Rounded(float_out.Read(), Precision::kBf16)))
          << name << " of " << n;
    };
    device().ReluForward(stream(), n, a, out, ElementType::kBf16);
    device().ReluForward(stream(), n, float_a, float_out);
    expect_rounded("relu");
    device().ReluBackward(stream(), n, a, b, out, ElementType::kBf16);
    device().ReluBackward(stream(), n, float_a, float_b, float_out);
    expect_rounded("relu's gradient");
    device().Add(stream(), n, a, b, out, ElementType::kBf16);
    device().Add(stream(), n, float_a, float_b, float_out);
    expect_rounded("add");
    // Cut anywhere, and over an input.
    const std::vector<uint16_t> whole = out.Read();
    for (const int64_t at : {int64_t{0}, n / 3, n / 2, n}) {
      const auto in_place = In(of_a.stored);
      device().Add(stream(), at, in_place, b, in_place, ElementType::kBf16);
      device().Add(stream(), n - at, in_place + at, b + at, in_place + at, ElementType::kBf16);
      EXPECT_EQ(in_place.Read(), whole) << n << " cut at " << at;
    }
  }
}

TEST_P(StoredBf16Test, WhatIsNotFiniteIsFound) {
  for (const uint16_t special : {uint16_t{0x7F80}, uint16_t{0xFF80}, uint16_t{0x7FC0}}) {
    for (const size_t at : {0, 1, 6, 7, 30}) {
      std::vector<uint16_t> of_x(31, uint16_t{0x7F7F});  // the largest
      const auto flag = In(std::vector<uint32_t>{0});
      auto x = In(of_x);
      device().FlagNonFinite(stream(), 31, x, flag, ElementType::kBf16);
      EXPECT_EQ(flag.Read()[0], 0u);
      of_x[at] = special;
      x.Write(of_x);
      device().FlagNonFinite(stream(), 31, x, flag, ElementType::kBf16);
      EXPECT_EQ(flag.Read()[0], 1u) << special << " at " << at;
    }
  }
}

LOCKSTEP_DEVICE_TESTS(StoredBf16Test);

}  // namespace
}  // namespace lockstep::device
