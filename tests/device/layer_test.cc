// Dense and Conv2d against double references.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

// ---- references: x, weight, bias, y in the layouts of device.h.

std::vector<double> DenseForward(const DenseShape& s, const std::vector<double>& x,
                                 const std::vector<double>& w, const std::vector<double>& b) {
  const int64_t rows = x.size() / s.in;
  std::vector<double> y(rows * s.out);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < s.out; ++o) {
      double sum = s.bias ? b[o] : 0;
      for (int64_t i = 0; i < s.in; ++i) sum += x[r * s.in + i] * w[o * s.in + i];
      y[r * s.out + o] = s.activation == Activation::kRelu && sum < 0 ? 0 : sum;
    }
  }
  return y;
}

// Calls visit(index of y, index of x, index of weight) for every product.
template <class Visit>
void ForEachProduct(const Conv2dShape& s, int64_t rows, Visit visit) {
  const int64_t oh_end = s.out_height(), ow_end = s.out_width();
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t oh = 0; oh < oh_end; ++oh)
      for (int64_t ow = 0; ow < ow_end; ++ow)
        for (int64_t kh = 0; kh < s.kernel; ++kh)
          for (int64_t kw = 0; kw < s.kernel; ++kw) {
            const int64_t h = oh * s.stride - s.padding + kh * s.dilation;
            const int64_t w = ow * s.stride - s.padding + kw * s.dilation;
            if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
            const int64_t y = ((n * oh_end + oh) * ow_end + ow) * s.out;
            const int64_t x = ((n * s.height + h) * s.width + w) * s.in;
            for (int64_t o = 0; o < s.out; ++o) {
              const int64_t part = s.in / s.groups;
              const int64_t weight = ((o * s.kernel + kh) * s.kernel + kw) * part;
              const int64_t first = o / (s.out / s.groups) * part;
              for (int64_t i = 0; i < part; ++i) visit(y + o, x + first + i, weight + i);
            }
          }
}

std::vector<double> ConvForward(const Conv2dShape& s, const std::vector<double>& x,
                                const std::vector<double>& w, const std::vector<double>& b) {
  const int64_t rows = x.size() / (s.height * s.width * s.in);
  std::vector<double> y(rows * s.out_height() * s.out_width() * s.out, 0.0);
  ForEachProduct(s, rows, [&](int64_t yi, int64_t xi, int64_t wi) { y[yi] += x[xi] * w[wi]; });
  for (size_t i = 0; i < y.size(); ++i) {
    if (s.bias) y[i] += b[i % s.out];
    if (s.activation == Activation::kRelu && y[i] < 0) y[i] = 0;
  }
  return y;
}

// What the tests need of either kind of layer.
struct DenseKind {
  using Shape = DenseShape;
  using Op = Dense;
  static int64_t In(const Shape& s) { return s.in; }
  static int64_t Out(const Shape& s) { return s.out; }
  static int64_t Weights(const Shape& s) { return s.in * s.out; }
  static auto Make(Device& device, const Shape& s, absl::Span<const int64_t> rows) {
    return device.MakeDense(s, rows);
  }
  static void BackwardWeight(Op& op, Stream& stream, int64_t rows, const float* x, const float* dy,
                             float* dw, float* db, void* scratch) {
    op.BackwardWeight(stream, stream, kOneLeaf, &rows, &x, &dy, &dw, &db, scratch);
  }
  static auto Reference(const Shape& s, const std::vector<double>& x, const std::vector<double>& w,
                        const std::vector<double>& b) {
    return DenseForward(s, x, w, b);
  }
  template <class Visit>
  static void Products(const Shape& s, int64_t rows, Visit visit) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t o = 0; o < s.out; ++o)
        for (int64_t i = 0; i < s.in; ++i) visit(r * s.out + o, r * s.in + i, o * s.in + i);
  }
  static std::string Describe(const Shape& s) {
    return std::to_string(s.in) + " to " + std::to_string(s.out) + (s.bias ? " with bias" : "");
  }
  static std::vector<Shape> Shapes() {
    std::vector<Shape> shapes;
    for (int64_t in : {1, 3, 16, 31, 33, 100}) {
      for (int64_t out : {1, 10, 15, 17, 64}) shapes.push_back({in, out, (in + out) % 3 != 0});
    }
    shapes.push_back({3136, 128, true});
    shapes.push_back({128, 10, true, Activation::kRelu});
    shapes.push_back({785, 33, false, Activation::kRelu});
    return shapes;
  }
  static std::vector<Shape> SmallShapes() {
    return {{5, 3, true}, {17, 4, false}, {6, 17, true, Activation::kRelu}};
  }
};

struct ConvKind {
  using Shape = Conv2dShape;
  using Op = Conv2d;
  static int64_t In(const Shape& s) { return s.height * s.width * s.in; }
  static int64_t Out(const Shape& s) { return s.out_height() * s.out_width() * s.out; }
  static int64_t Weights(const Shape& s) { return s.out * s.kernel * s.kernel * s.in / s.groups; }
  static auto Make(Device& device, const Shape& s, absl::Span<const int64_t> rows) {
    return device.MakeConv2d(s, rows);
  }
  static void BackwardWeight(Op& op, Stream& stream, int64_t rows, const float* x, const float* dy,
                             float* dw, float* db, void* scratch) {
    op.BackwardWeight(stream, rows, x, dy, dw, db, scratch);
  }
  static auto Reference(const Shape& s, const std::vector<double>& x, const std::vector<double>& w,
                        const std::vector<double>& b) {
    return ConvForward(s, x, w, b);
  }
  template <class Visit>
  static void Products(const Shape& s, int64_t rows, Visit visit) {
    ForEachProduct(s, rows, visit);
  }
  static std::string Describe(const Shape& s) {
    return std::to_string(s.height) + "x" + std::to_string(s.width) + "x" + std::to_string(s.in) +
           " to " + std::to_string(s.out) + " kernel " + std::to_string(s.kernel) + " stride " +
           std::to_string(s.stride) + " padding " + std::to_string(s.padding) + " dilation " +
           std::to_string(s.dilation) + " groups " + std::to_string(s.groups);
  }
  static std::vector<Shape> Shapes() {
    constexpr Activation kNone = Activation::kNone, kRelu = Activation::kRelu;
    return {{28, 28, 1, 32, 3, 1, 1, false},
            {14, 14, 32, 64, 3, 1, 1, false},
            {5, 7, 1, 1, 3, 1, 1, true},
            {6, 5, 1, 17, 3, 2, 1, true},
            {8, 8, 3, 16, 3, 1, 1, true, Activation::kRelu},
            {9, 7, 3, 33, 5, 2, 2, false},
            {7, 7, 15, 31, 3, 1, 0, true},
            {6, 6, 16, 16, 1, 1, 0, true},
            {6, 6, 17, 33, 1, 2, 0, false},
            {7, 9, 33, 15, 3, 2, 1, true, Activation::kRelu},
            {4, 4, 2, 64, 4, 4, 0, true},
            {3, 3, 4, 5, 3, 1, 2, false},
            {32, 32, 3, 32, 3, 1, 1, true},
            {10, 10, 1, 48, 5, 1, 2, true},
            {11, 3, 1, 100, 3, 1, 1, false},
            {9, 11, 3, 16, 3, 1, 2, true, kNone, 2},
            {13, 12, 5, 7, 3, 2, 1, false, kNone, 3},
            {8, 8, 16, 32, 3, 1, 1, true, kRelu, 1, 2},
            {7, 6, 6, 9, 3, 1, 1, false, kNone, 1, 3},
            {8, 8, 32, 32, 3, 1, 1, true, kNone, 1, 32},
            {9, 7, 10, 20, 3, 2, 2, true, kRelu, 2, 10},
            {6, 6, 64, 64, 1, 1, 0, false, kNone, 1, 4},
            // Wide ones, for which libraries have other code.
            {32, 32, 8, 8, 3, 1, 2, false, kNone, 2, 8},
            {32, 32, 16, 16, 3, 1, 2, false, kNone, 2, 2},
            {34, 34, 8, 8, 3, 1, 0, true, kNone, 3, 1}};
  }
  static std::vector<Shape> SmallShapes() {
    return {{4, 5, 1, 3, 3, 1, 1, true},
            {5, 4, 2, 3, 3, 2, 1, false},
            {3, 3, 17, 2, 2, 1, 0, true, Activation::kRelu},
            {5, 6, 2, 3, 2, 1, 1, true, Activation::kNone, 2},
            {4, 4, 4, 6, 3, 1, 1, true, Activation::kNone, 1, 2},
            {5, 5, 3, 3, 2, 2, 1, false, Activation::kNone, 2, 3}};
  }
};

template <class Kind>
struct LayerData {
  std::vector<float> x, w, b, dy;
  LayerData(const typename Kind::Shape& s, int64_t rows)
      : x(RandomFloats(rows * Kind::In(s), 70)),
        w(RandomFloats(Kind::Weights(s), 71)),
        b(RandomFloats(s.out, 72)),
        dy(RandomFloats(rows * Kind::Out(s), 73)) {}
};

// A running sum of `terms` random products grows with their square root, and so does the number of
// its roundings that add up: the error grows with `terms`. A product left out would show as 0.1.
double Tolerance(int64_t terms) { return 4e-8 * static_cast<double>(terms) + 2e-6; }

class LayerTest : public DeviceTest {
 protected:
  // In bf16 the factors are rounded and nothing else is: products of bf16 are exact in fp32.
  template <class Kind>
  void MatchesReference(Precision precision = Precision::kFp32) {
    for (auto s : Kind::Shapes()) {
      s.precision = precision;
      for (int64_t rows : {1, 3, 16}) {
        SCOPED_TRACE(Kind::Describe(s) + ", " + std::to_string(rows) + " rows");
        const LayerData<Kind> d(s, rows);
        auto op = Kind::Make(device(), s, {rows});
        ASSERT_TRUE(op.ok()) << op.status();
        const auto x = In(d.x), w = In(d.w), b = In(d.b), dy = In(d.dy);
        const auto y = Out(d.dy.size()), dx = Out(d.x.size()), dw = Out(d.w.size()),
                   db = Out(s.out);
        const auto scratch = Scratch((*op)->scratch_bytes());
        float* const bias = s.bias ? b.data() : nullptr;
        const auto rounded = InBf16(w);
        (*op)->Pack(stream(), w, rounded);
        (*op)->Forward(stream(), rows, x, bias, y, scratch);
        (*op)->BackwardInput(stream(), rows, dy, dx, scratch);
        Kind::BackwardWeight(**op, stream(), rows, x, dy, dw, s.bias ? db.data() : nullptr,
                             scratch);
        ASSERT_TRUE(stream().Synchronize().ok());
        const int64_t terms = Kind::Weights(s) / s.out;
        const std::vector<float> fx = Rounded(d.x, precision), fw = Rounded(d.w, precision),
                                 fdy = Rounded(d.dy, precision);
        EXPECT_TRUE(Near(y.Read(), Kind::Reference(s, ToDoubles(fx), ToDoubles(fw), ToDoubles(d.b)),
                         Tolerance(terms)))
            << "forward";
        std::vector<double> expected_dx(d.x.size(), 0.0), expected_dw(d.w.size(), 0.0);
        Kind::Products(s, rows, [&](int64_t yi, int64_t xi, int64_t wi) {
          expected_dx[xi] += static_cast<double>(fdy[yi]) * fw[wi];
          expected_dw[wi] += static_cast<double>(fdy[yi]) * fx[xi];
        });
        EXPECT_TRUE(Near(dx.Read(), expected_dx, Tolerance(Kind::Weights(s) / s.out * s.out)))
            << "input";
        const int64_t pixels = rows * Kind::Out(s) / s.out;
        EXPECT_TRUE(Near(dw.Read(), expected_dw, Tolerance(pixels))) << "weight";
        if (!s.bias) continue;
        std::vector<double> expected_db(s.out, 0.0);
        // That of a bf16 convolution may be summed from the rounded gradients.
        for (size_t i = 0; i < d.dy.size(); ++i) expected_db[i % s.out] += d.dy[i];
        const double rounding = precision == Precision::kBf16 ? 0x1p-9 * pixels : 0;
        EXPECT_TRUE(Near(db.Read(), expected_db, Tolerance(pixels) + rounding)) << "bias";
      }
    }
  }

  // Through the activation, by ReluBackward as a plan does it.
  template <class Kind>
  void MatchesDifferences() {
    for (const auto& s : Kind::SmallShapes()) {
      SCOPED_TRACE(Kind::Describe(s));
      constexpr int64_t kRows = 2;
      const LayerData<Kind> d(s, kRows);
      auto op = Kind::Make(device(), s, {kRows});
      ASSERT_TRUE(op.ok()) << op.status();
      const auto x = In(d.x), w = In(d.w), b = In(d.b), dy = In(d.dy);
      const auto y = Out(d.dy.size()), dx = Out(d.x.size()), dw = Out(d.w.size()), db = Out(s.out);
      const auto scratch = Scratch((*op)->scratch_bytes());
      float* const bias = s.bias ? b.data() : nullptr;
      (*op)->Pack(stream(), w, nullptr);
      (*op)->Forward(stream(), kRows, x, bias, y, scratch);
      if (s.activation == Activation::kRelu) device().ReluBackward(stream(), dy.size(), y, dy, dy);
      (*op)->BackwardInput(stream(), kRows, dy, dx, scratch);
      Kind::BackwardWeight(**op, stream(), kRows, x, dy, dw, s.bias ? db.data() : nullptr, scratch);
      const auto at_x = ToDoubles(d.x), at_w = ToDoubles(d.w), at_b = ToDoubles(d.b);
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const auto& at) { return Dot(Kind::Reference(s, at, at_w, at_b), d.dy); }, at_x,
          dx.Read()));
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const auto& at) { return Dot(Kind::Reference(s, at_x, at, at_b), d.dy); }, at_w,
          dw.Read()));
      if (!s.bias) continue;
      EXPECT_TRUE(MatchesFiniteDifferences(
          [&](const auto& at) { return Dot(Kind::Reference(s, at_x, at_w, at), d.dy); }, at_b,
          db.Read()));
    }
  }

  // A row's output and input gradient have the same bits however many rows share the call.
  template <class Kind>
  void RowsAreIndependent(typename Kind::Shape s, int64_t most) {
    for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
      s.precision = precision;
      RowsAreIndependentInIts<Kind>(s, most);
    }
  }
  template <class Kind>
  void RowsAreIndependentInIts(const typename Kind::Shape& s, int64_t most) {
    SCOPED_TRACE(Kind::Describe(s) + (s.precision == Precision::kBf16 ? ", bf16" : ", fp32"));
    const LayerData<Kind> d(s, most);
    std::vector<int64_t> counts;
    for (int64_t rows = 1; rows <= most; ++rows) counts.push_back(rows);
    auto op = Kind::Make(device(), s, counts);
    ASSERT_TRUE(op.ok()) << op.status();
    const auto x = In(d.x), w = In(d.w), b = In(d.b), dy = In(d.dy);
    const auto scratch = Scratch((*op)->scratch_bytes());
    const auto rounded = InBf16(w);
    (*op)->Pack(stream(), w, rounded);
    std::vector<float> y_whole, dx_whole;
    for (int64_t rows = most; rows >= 1; --rows) {
      const auto y = Out(rows * Kind::Out(s)), dx = Out(rows * Kind::In(s));
      (*op)->Forward(stream(), rows, x, s.bias ? b.data() : nullptr, y, scratch);
      (*op)->BackwardInput(stream(), rows, dy, dx, scratch);
      ASSERT_TRUE(stream().Synchronize().ok());
      if (rows == most) y_whole = y.Read(), dx_whole = dx.Read();
      y_whole.resize(y.size());
      dx_whole.resize(dx.size());
      ASSERT_TRUE(SameBits(y.Read(), y_whole)) << rows << " rows, forward";
      ASSERT_TRUE(SameBits(dx.Read(), dx_whole)) << rows << " rows, input gradient";
    }
  }

  // Several threads, each with its own stream and scratch, get the bits of one.
  template <class Kind>
  void ThreadsAgree(typename Kind::Shape s, Precision precision = Precision::kFp32) {
    SCOPED_TRACE(Kind::Describe(s));
    s.precision = precision;
    constexpr int64_t kRows = 16;
    constexpr int kThreads = 4, kRepeats = 5;
    const LayerData<Kind> d(s, kRows);
    auto op = Kind::Make(device(), s, {kRows});
    ASSERT_TRUE(op.ok()) << op.status();
    const auto x = In(d.x), w = In(d.w), b = In(d.b), dy = In(d.dy);
    float* const bias = s.bias ? b.data() : nullptr;
    const auto rounded = InBf16(w);
    (*op)->Pack(stream(), w, rounded);
    ASSERT_TRUE(stream().Synchronize().ok());  // the threads' streams do not wait for it
    struct Result {
      Buffer<float> y, dx, dw, db;
    };
    std::vector<Result> results;
    for (int i = 0; i < kThreads * kRepeats; ++i) {
      results.push_back(
          {Out(d.dy.size()), Out(d.x.size()), Out(d.w.size()), Out(static_cast<size_t>(s.out))});
    }
    std::vector<absl::Status> statuses(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        auto mine = device().MakeStream();
        if (!mine.ok()) {
          statuses[t] = mine.status();
          return;
        }
        const auto scratch = device().Allocate((*op)->scratch_bytes() + 1);
        if (!scratch.ok()) {
          statuses[t] = scratch.status();
          return;
        }
        void* const at = (*scratch)->data();
        for (int k = 0; k < kRepeats; ++k) {
          Result& r = results[static_cast<size_t>(t * kRepeats + k)];
          (*op)->Forward(**mine, kRows, x, bias, r.y, at);
          (*op)->BackwardInput(**mine, kRows, dy, r.dx, at);
          Kind::BackwardWeight(**op, **mine, kRows, x, dy, r.dw, s.bias ? r.db.data() : nullptr,
                               at);
        }
        statuses[t] = (*mine)->Synchronize();
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const absl::Status& status : statuses) ASSERT_TRUE(status.ok()) << status;
    for (const Result& r : results) {
      ASSERT_TRUE(SameBits(r.y.Read(), results[0].y.Read()));
      ASSERT_TRUE(SameBits(r.dx.Read(), results[0].dx.Read()));
      ASSERT_TRUE(SameBits(r.dw.Read(), results[0].dw.Read()));
      ASSERT_TRUE(SameBits(r.db.Read(), results[0].db.Read()));
    }
  }
};

TEST_P(LayerTest, DenseMatchesTheReference) { MatchesReference<DenseKind>(); }
TEST_P(LayerTest, ConvMatchesTheReference) { MatchesReference<ConvKind>(); }
TEST_P(LayerTest, Bf16DenseMatchesTheReference) { MatchesReference<DenseKind>(Precision::kBf16); }
TEST_P(LayerTest, Bf16ConvMatchesTheReference) { MatchesReference<ConvKind>(Precision::kBf16); }
TEST_P(LayerTest, DenseMatchesFiniteDifferences) { MatchesDifferences<DenseKind>(); }
TEST_P(LayerTest, ConvMatchesFiniteDifferences) { MatchesDifferences<ConvKind>(); }

TEST_P(LayerTest, DenseRowsDoNotDependOnTheirNumber) {
  RowsAreIndependent<DenseKind>({784, 256, true}, 40);
  RowsAreIndependent<DenseKind>({3136, 128, true}, 40);
  RowsAreIndependent<DenseKind>({128, 10, true}, 40);
  RowsAreIndependent<DenseKind>({33, 17, false}, 40);
}

TEST_P(LayerTest, ConvRowsDoNotDependOnTheirNumber) {
  RowsAreIndependent<ConvKind>({28, 28, 1, 32, 3, 1, 1, false}, 20);
  RowsAreIndependent<ConvKind>({14, 14, 32, 64, 3, 1, 1, false}, 20);
  RowsAreIndependent<ConvKind>({7, 7, 17, 15, 3, 2, 1, true}, 20);
  constexpr Activation kNone = Activation::kNone;
  RowsAreIndependent<ConvKind>({14, 14, 16, 32, 3, 1, 2, true, kNone, 2}, 20);
  RowsAreIndependent<ConvKind>({14, 14, 32, 32, 3, 1, 1, false, kNone, 1, 32}, 20);
  RowsAreIndependent<ConvKind>({7, 7, 12, 18, 3, 1, 1, true, kNone, 1, 3}, 20);
}

// Each leaf's gradient by itself, folded by Add in the order that the fold says, has the bits of
// the kernel that folds in its tiles: a power of two, leaves that make several subtrees, uneven
// rows.
TEST_P(LayerTest, DenseFoldsTheGradientsOfLeaves) {
  struct Case {
    std::vector<int64_t> rows;
    std::vector<int> buffer, combine_count;
    std::vector<FoldPair> combines;
    std::vector<int> part_buffer;
  };
  const std::vector<Case> cases = {
      {{16, 16, 16, 16}, {0, 1, 1, 2}, {0, 1, 0, 2}, {{0, 1}, {1, 2}, {0, 1}}, {0}},
      {{3, 1, 7}, {0, 1, 2}, {0, 0, 1}, {{1, 2}}, {0, 1}},
      {{2, 5}, {0, 1}, {0, 0}, {}, {0, 1}},
      {{100}, {0}, {0}, {}, {0}},
  };
  constexpr Precision kFp32 = Precision::kFp32, kBf16 = Precision::kBf16;
  for (const DenseShape& s : {DenseShape{784, 50, true, Activation::kNone, kFp32, 4},
                              DenseShape{70, 500, false, Activation::kNone, kFp32, 4},
                              DenseShape{17, 10, true, Activation::kNone, kFp32, 4},
                              DenseShape{50, 1, true, Activation::kNone, kFp32, 4},
                              DenseShape{784, 50, true, Activation::kNone, kBf16, 4},
                              DenseShape{33, 17, false, Activation::kNone, kBf16, 4}}) {
    for (const Case& c : cases) {
      SCOPED_TRACE(DenseKind::Describe(s) + ", " + std::to_string(c.rows.size()) + " leaves");
      const LeafFold fold = {static_cast<int>(c.rows.size()),
                             c.buffer.data(),
                             c.combine_count.data(),
                             c.combines.data(),
                             static_cast<int>(c.part_buffer.size()),
                             c.part_buffer.data()};
      auto op = device().MakeDense(s, c.rows);
      ASSERT_TRUE(op.ok()) << op.status();
      const auto scratch = Scratch((*op)->scratch_bytes());
      std::vector<Buffer<float>> x, dy, dw, db, leaf_dw, leaf_db;
      std::vector<const float*> xs, dys;
      std::vector<float*> dws, dbs;
      for (int i = 0; i < fold.leaves; ++i) {
        const LayerData<DenseKind> d(s, c.rows[i] + 1000 * i);  // other values in each
        const auto cut = [&](const std::vector<float>& v, int64_t n) {
          return std::vector<float>(v.end() - n, v.end());
        };
        x.push_back(In(cut(d.x, c.rows[i] * s.in)));
        dy.push_back(In(cut(d.dy, c.rows[i] * s.out)));
        xs.push_back(x.back());
        dys.push_back(dy.back());
      }
      // One by one: each leaf into its buffer, and the adds.
      const int buffers = 1 + *std::max_element(c.buffer.begin(), c.buffer.end());
      for (int i = 0; i < buffers; ++i) {
        leaf_dw.push_back(Out(s.in * s.out));
        leaf_db.push_back(Out(s.out));
      }
      const FoldPair* combine = fold.combines;
      for (int i = 0; i < fold.leaves; ++i) {
        float *w = leaf_dw[c.buffer[i]], *b = s.bias ? leaf_db[c.buffer[i]].data() : nullptr;
        (*op)->BackwardWeight(stream(), stream(), kOneLeaf, &c.rows[i], &xs[i], &dys[i], &w, &b,
                              scratch);
        for (int k = 0; k < c.combine_count[i]; ++k, ++combine) {
          float *left = leaf_dw[combine->left], *left_db = leaf_db[combine->left];
          device().Add(stream(), s.in * s.out, left, leaf_dw[combine->right], left);
          device().Add(stream(), s.out, left_db, leaf_db[combine->right], left_db);
        }
      }
      for (int p = 0; p < fold.parts; ++p) {
        dw.push_back(Out(s.in * s.out));
        db.push_back(Out(s.out));
        dws.push_back(dw.back());
        dbs.push_back(s.bias ? db.back().data() : nullptr);
      }
      (*op)->BackwardWeight(stream(), stream(), fold, c.rows.data(), xs.data(), dys.data(),
                            dws.data(), dbs.data(), scratch);
      ASSERT_TRUE(stream().Synchronize().ok());
      for (int p = 0; p < fold.parts; ++p) {
        EXPECT_TRUE(SameBits(dw[p].Read(), leaf_dw[c.part_buffer[p]].Read())) << p;
        if (!s.bias) continue;
        EXPECT_TRUE(SameBits(db[p].Read(), leaf_db[c.part_buffer[p]].Read())) << p;
      }
    }
  }
}

TEST_P(LayerTest, ThreadsAndRepetitionsAgree) {
  ThreadsAgree<DenseKind>({3136, 128, true});
  ThreadsAgree<DenseKind>({128, 10, true});
  ThreadsAgree<ConvKind>({28, 28, 1, 32, 3, 1, 1, true});
  ThreadsAgree<ConvKind>({14, 14, 32, 64, 3, 1, 1, true});
  ThreadsAgree<DenseKind>({3136, 128, true}, Precision::kBf16);
  ThreadsAgree<ConvKind>({28, 28, 1, 32, 3, 1, 1, true}, Precision::kBf16);
  ThreadsAgree<ConvKind>({14, 14, 32, 64, 3, 1, 1, true}, Precision::kBf16);
}

TEST_P(LayerTest, PackTakesTheNewWeights) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    const DenseShape s{.in = 20, .out = 7, .precision = precision};
    auto op = device().MakeDense(s, {2});
    ASSERT_TRUE(op.ok()) << op.status();
    const LayerData<DenseKind> d(s, 2);
    std::vector<float> other = d.w;
    for (float& value : other) value = -value;
    const auto x = In(d.x), w = In(d.w), w2 = In(other), y = Out(14), y2 = Out(14), dx = Out(40),
               dx2 = Out(40), dy = In(d.dy);
    const auto rounded = InBf16(w), rounded2 = InBf16(w2);
    const auto scratch = Scratch((*op)->scratch_bytes());
    (*op)->Pack(stream(), w, rounded);
    (*op)->Forward(stream(), 2, x, nullptr, y, scratch);
    (*op)->BackwardInput(stream(), 2, dy, dx, scratch);
    (*op)->Pack(stream(), w2, rounded2);
    (*op)->Forward(stream(), 2, x, nullptr, y2, scratch);
    (*op)->BackwardInput(stream(), 2, dy, dx2, scratch);
    std::vector<float> y_minus = y2.Read(), dx_minus = dx2.Read();
    for (float& value : y_minus) value = -value;
    for (float& value : dx_minus) value = -value;
    EXPECT_TRUE(SameBits(y_minus, y.Read()));
    EXPECT_TRUE(SameBits(dx_minus, dx.Read()));
  }
}

TEST_P(LayerTest, FusedReluKeepsNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto x = In(std::vector<float>{1, nan, 1, 1}), w = In(std::vector<float>(12, -1)),
             b = In(std::vector<float>(3, 0)), y = Out(3);
  const auto check = [&](auto op) {
    ASSERT_TRUE(op.ok()) << op.status();
    const auto scratch = Scratch((*op)->scratch_bytes());
    (*op)->Pack(stream(), w, nullptr);
    (*op)->Forward(stream(), 1, x, b, y, scratch);
    for (float value : y.Read()) EXPECT_TRUE(std::isnan(value));
  };
  check(device().MakeDense({4, 3, true, Activation::kRelu}, {1}));
  check(device().MakeConv2d({2, 2, 1, 3, 2, 1, 0, true, Activation::kRelu}, {1}));
}

TEST_P(LayerTest, UnknownRowCountIsReportedByTheStream) {
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    const Conv2dShape s{
        .height = 2, .width = 2, .in = 8, .out = 8, .kernel = 1, .precision = precision};
    auto op = device().MakeConv2d(s, {2});
    ASSERT_TRUE(op.ok()) << op.status();
    const auto x = In(std::vector<float>(96, 1)), w = In(std::vector<float>(64, 1)), y = Out(96);
    const auto scratch = Scratch((*op)->scratch_bytes());
    const auto rounded = InBf16(w);
    (*op)->Pack(stream(), w, rounded);
    (*op)->Forward(stream(), 3, x, nullptr, y, scratch);
    const absl::Status status = stream().Synchronize();
    if ((*op)->serves_any_rows()) {
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(y.Read(), std::vector<float>(96, 8));
    } else {
      EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
      EXPECT_NE(status.message().find("3 rows"), absl::string_view::npos) << status;
    }
    EXPECT_TRUE(stream().Synchronize().ok()) << "reported once";
  }
}

TEST_P(LayerTest, RefusesShapesThatAreNone) {
  EXPECT_EQ(device().MakeDense({0, 3}, {1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(device().MakeDense({3, 3}, {0}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(device().MakeConv2d({2, 2, 1, 1, 3}, {1}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

LOCKSTEP_DEVICE_TESTS(LayerTest);

}  // namespace
}  // namespace lockstep::device
