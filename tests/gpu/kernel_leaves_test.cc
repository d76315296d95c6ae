// What the contracts of worker/device/cuda/kernels.h promise beyond those of the device, whose
// tests run on it as on every other: leaves of one call have the bits that each has alone,
// addresses change nothing, many parts are summed by the canonical tree.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/kernels_fixture.h"
#include "worker/collective/tree.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/warpgroup.h"

namespace lockstep::device::cuda {
namespace {

constexpr float kEpsilon = 1e-5f;

using KernelLeavesTest = KernelsTest;

// ---- leaves.

// Around the sizes of lanes, chunks and blocks; one of them has many chunks.
const std::vector<int64_t> kManyRows = {1, 33, 128, 31, 129, 2, 700, 2100, 5};
const std::vector<int64_t> kFewRows = {1, 33, 16, 31, 129, 2, 64, 5};
const std::vector<int64_t> kColumns = {1, 3, 4, 10, 16, 64, 117};

// Runs `call` for all leaves at once, its outputs pre-filled, and for each leaf as if it were the
// only one; results must agree. An output has per_row elements for each row, or per_leaf ones.
struct OutputShape {
  int64_t per_row = 0, per_leaf = 0;
};
// The leaves of one call and where they begin: rows, leaves.
struct Call {
  Leaves leaves;
  int64_t row = 0;
  int leaf = 0;
};
using Outputs = std::vector<std::unique_ptr<Buffer<float>>>;

void ExpectLeavesAlone(const std::vector<int64_t>& rows, const std::vector<OutputShape>& shapes,
                       const std::function<void(const Call&, const std::vector<float*>&)>& run) {
  const Leaves leaves = LeavesOf(rows);
  const auto size_of = [&](const OutputShape& shape) {
    return static_cast<size_t>(shape.per_row * leaves.total() + shape.per_leaf * leaves.count);
  };
  Outputs together, alone;
  std::vector<float*> at;
  for (const OutputShape& shape : shapes) {
    together.push_back(std::make_unique<Buffer<float>>(size_of(shape), 12345.678f));
    alone.push_back(std::make_unique<Buffer<float>>(size_of(shape), 12345.678f));
    at.push_back(*together.back());
  }
  run({leaves, 0, 0}, at);
  for (int l = 0; l < leaves.count; ++l) {
    const int64_t row = leaves.begin[l];
    for (size_t i = 0; i < shapes.size(); ++i) {
      at[i] = *alone[i] + shapes[i].per_row * row + shapes[i].per_leaf * l;
    }
    run({Leaves(leaves.begin[l + 1] - row), row, l}, at);
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    EXPECT_TRUE(SameBytes(together[i]->Read(), alone[i]->Read())) << "output " << i;
  }
}

TEST_F(KernelLeavesTest, BatchNormLeavesHaveTheBitsThatTheyHaveAlone) {
  const int64_t n = LeavesOf(kManyRows).total();
  for (int64_t c : kColumns) {
    SCOPED_TRACE(c);
    const Buffer<float> x(RandomFloats(n * c, 1, 1, 4)), dy(RandomFloats(n * c, 2)),
        output(RandomFloats(n * c, 3)), more(RandomFloats(n * c, 4)),
        weight(RandomFloats(c, 5, 0.5, 1.5)), bias(RandomFloats(c, 6));
    ExpectLeavesAlone(kManyRows, {{0, c}, {0, c}},
                      [&](const Call& call, const std::vector<float*>& out) {
                        BatchNormMoments(q(), c, call.leaves, x + call.row * c, out[0], out[1], c);
                      });
    const Buffer<float> mean(RandomFloats(n * c, 7)), spread(RandomFloats(n * c, 8, 1, 2)),
        sums(RandomFloats(n * c, 9)), sums_x(RandomFloats(n * c, 10));
    for (bool relu : {false, true}) {
      for (bool shared : {false, true}) {  // moments, by all leaves
        const int64_t stride = shared ? 0 : c + 1;
        const auto moments_of = [&](const Call& call) {
          return Moments{mean + call.leaf * stride, spread + call.leaf * stride, stride,
                         shared ? 100 : 0};
        };
        ExpectLeavesAlone(
            kManyRows, {{c, 0}, {c, 0}}, [&](const Call& call, const std::vector<float*>& out) {
              for (bool residual : {false, true}) {
                BatchNormForward(q(), {c, relu}, call.leaves, x + call.row * c, moments_of(call),
                                 kEpsilon, weight, bias, residual ? more + call.row * c : nullptr,
                                 out[residual]);
              }
            });
        ExpectLeavesAlone(
            kManyRows, {{0, c}, {0, c}, {c, 0}, {0, c}, {0, c}},
            [&](const Call& call, const std::vector<float*>& out) {
              const int64_t at = call.row * c;
              BatchNormGradient(q(), {c, relu}, call.leaves, x + at, output + at, dy + at, nullptr,
                                moments_of(call), kEpsilon, nullptr, out[0], out[1], c);
              BatchNormGradient(q(), {c, relu}, call.leaves, x + at, output + at, dy + at,
                                more + at, moments_of(call), kEpsilon, out[2], out[3], out[4], c);
            });
        ExpectLeavesAlone(
            kManyRows, {{c, 0}}, [&](const Call& call, const std::vector<float*>& out) {
              const int64_t at = call.row * c;
              BatchNormBackward(q(), {c, relu}, call.leaves, x + at, output + at, dy + at,
                                moments_of(call), kEpsilon, weight, sums + call.leaf * stride,
                                sums_x + call.leaf * stride, stride, out[0]);
            });
      }
    }
  }
}

// Alone, a leaf's chunks are a block's each; together a block takes several, one after another.
TEST_F(KernelLeavesTest, LeavesOfManyChunksHaveTheBitsThatTheyHaveAlone) {
  constexpr int64_t kChannels = 72;
  const auto check = [&]<class T>(ElementType type, const Buffer<T>& x,
                                  const std::vector<int64_t>& rows) {
    ExpectLeavesAlone(rows, {{0, kChannels}, {0, kChannels}, {0, kChannels}},
                      [&](const Call& call, const std::vector<float*>& out) {
                        const T* const at = x + call.row * kChannels;
                        BatchNormMoments(q(), kChannels, call.leaves, at, out[0], out[1], kChannels,
                                         type);
                        ColumnSums(q(), call.leaves, kChannels, at, out[2], kChannels, type);
                      });
  };
  std::vector<int64_t> rows(30, 2100);
  rows[3] = 0, rows[4] = 17, rows[5] = 2179, rows[7] = 20000;
  const Buffer<float> x(RandomFloats(LeavesOf(rows).total() * kChannels, 1, -2, 4));
  check(ElementType::kFp32, x, rows);
  const std::vector<int64_t> longer = {4200, 4097, 0, 300, 8333, 4300, 4200, 9000, 4351};
  Buffer<uint16_t> rounded(static_cast<size_t>(LeavesOf(longer).total() * kChannels), uint16_t{0});
  RoundToBf16(q(), LeavesOf(longer).total() * kChannels, x, rounded);
  check(ElementType::kBf16, rounded, longer);
}

// Of a norm's two passes: where leaves are small in one launch, which may write over what it reads.
TEST_F(KernelLeavesTest, NormsOfLeavesHaveTheBitsOfTwoPasses) {
  const auto check = [&]<class T>(ElementType type, const std::vector<T>& some,
                                  const std::vector<int64_t>& rows, int64_t c, int lead) {
    const Leaves leaves = LeavesOf(rows);
    const int64_t stride = 2 * c + 1;
    const auto elements = static_cast<size_t>(leaves.total() * c);
    const auto part = [&](size_t first) {
      return std::vector<T>(some.begin() + static_cast<ptrdiff_t>(first),
                            some.begin() + static_cast<ptrdiff_t>(first + elements));
    };
    const std::vector<T> xs = part(0), others = part(7), gradients = part(11);
    const Buffer<T> x(xs, lead), more(others, lead), dy(gradients, lead);
    const Buffer<float> weight(RandomFloats(c, 5, 0.5, 1.5)), bias(RandomFloats(c, 6));
    for (const bool relu : {false, true}) {
      const BatchNormShape shape = {c, relu, type};
      for (const bool adds : {false, true}) {
        SCOPED_TRACE(absl::StrCat("relu ", relu, ", residual ", adds));
        T* const residual = adds ? static_cast<T*>(more) : nullptr;
        const size_t records = static_cast<size_t>(stride) * rows.size();
        const Buffer<float> moments(records, -1.0f), whole_moments(records, -1.0f);
        const Buffer<T> y(elements, T(), lead), in_place(xs, lead);
        BatchNormMoments(q(), c, leaves, x, moments, moments + c, stride, type);
        BatchNormForward(q(), shape, leaves, x, {moments, moments + c, stride}, kEpsilon, weight,
                         bias, residual, y);
        BatchNormForwardOfLeaves(q(), shape, leaves, in_place, whole_moments, whole_moments + c,
                                 stride, kEpsilon, weight, bias, residual, in_place);
        EXPECT_TRUE(SameBytes(whole_moments.Read(), moments.Read()));
        EXPECT_TRUE(SameBytes(in_place.Read(), y.Read()));

        const Moments own = {moments, moments + c, stride};
        const Buffer<float> sums(records, -1.0f), whole_sums(records, -1.0f);
        const Buffer<T> dx(elements, T(), lead), over(gradients, lead);
        BatchNormGradient(q(), shape, leaves, x, y, dy, nullptr, own, kEpsilon, nullptr, sums,
                          sums + c, stride);
        BatchNormBackward(q(), shape, leaves, x, y, dy, own, kEpsilon, weight, sums, sums + c,
                          stride, dx);
        BatchNormBackwardOfLeaves(q(), shape, leaves, x, y, over, own, kEpsilon, weight, whole_sums,
                                  whole_sums + c, stride, over);
        EXPECT_TRUE(SameBytes(whole_sums.Read(), sums.Read()));
        EXPECT_TRUE(SameBytes(over.Read(), dx.Read()));
        if (relu && adds && type == ElementType::kBf16 && c % 8 == 0 && lead == 0) {
          // Where y is above 0, is said by forward.
          const Buffer<uint8_t> above(elements / 8, 0xA5), whole_above(elements / 8, 0x5A);
          BatchNormForward(q(), shape, leaves, x, own, kEpsilon, weight, bias, residual, y, above);
          BatchNormForwardOfLeaves(q(), shape, leaves, x, whole_moments, whole_moments + c, stride,
                                   kEpsilon, weight, bias, residual, in_place, whole_above);
          EXPECT_TRUE(SameBytes(whole_above.Read(), above.Read()));
          EXPECT_TRUE(SameBytes(in_place.Read(), y.Read()));
          for (T* const second : {static_cast<T*>(nullptr), +more}) {
            const Buffer<T> g(elements, T(), lead), said_g(gradients, lead);
            const Buffer<float> said_sums(records, -1.0f);
            BatchNormGradient(q(), shape, leaves, x, y, dy, second, own, kEpsilon, g, sums,
                              sums + c, stride);
            BatchNormGradient(q(), shape, leaves, x, nullptr, said_g, second, own, kEpsilon, said_g,
                              said_sums, said_sums + c, stride, nullptr, nullptr, above);
            EXPECT_TRUE(SameBytes(said_g.Read(), g.Read()));
            EXPECT_TRUE(SameBytes(said_sums.Read(), sums.Read()));
          }
        }
        if (!relu || adds) continue;
        // Where y is above 0, is computed again.
        const Buffer<T> again(elements, T(), lead), g(elements, T(), lead),
            same_g(elements, T(), lead);
        const Buffer<float> same_sums(records, -1.0f);
        BatchNormGradient(q(), shape, leaves, x, nullptr, dy, nullptr, own, kEpsilon, nullptr,
                          same_sums, same_sums + c, stride, weight, bias);
        EXPECT_TRUE(SameBytes(same_sums.Read(), sums.Read()));
        BatchNormGradient(q(), shape, leaves, x, y, dy, more, own, kEpsilon, g, sums, sums + c,
                          stride);
        BatchNormGradient(q(), shape, leaves, x, nullptr, dy, more, own, kEpsilon, same_g,
                          same_sums, same_sums + c, stride, weight, bias);
        EXPECT_TRUE(SameBytes(same_g.Read(), g.Read()));
        EXPECT_TRUE(SameBytes(same_sums.Read(), sums.Read()));
        BatchNormGradient(q(), shape, leaves, x, y, dy, nullptr, own, kEpsilon, nullptr, sums,
                          sums + c, stride);
        BatchNormBackward(q(), shape, leaves, x, nullptr, dy, own, kEpsilon, weight, sums, sums + c,
                          stride, again, bias);
        EXPECT_TRUE(SameBytes(again.Read(), dx.Read()));
      }
    }
  };
  for (const std::vector<int64_t>& rows :
       {std::vector<int64_t>{16, 16, 16, 14}, {1}, {128, 2, 77}, {33, 129}, {256, 5}}) {
    for (const int64_t c : {1, 3, 4, 40, 117}) {
      for (const int lead : {0, 1}) {
        if (lead > 0 && c % 4 != 0) continue;  // they are taken one by one anyhow
        SCOPED_TRACE(absl::StrCat(rows.front(), " rows and more, ", c, " channels, by ", lead));
        const int64_t count = LeavesOf(rows).total() * c + 11;
        const std::vector<float> floats = RandomFloats(count, 1, -1, 4);
        std::vector<uint16_t> bf16;
        for (const float value : floats) {
          bf16.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
        }
        check(ElementType::kFp32, floats, rows, c, lead);
        check(ElementType::kBf16, bf16, rows, c, lead);
      }
    }
  }
}

TEST_F(KernelLeavesTest, SumsOfLeavesHaveTheBitsThatTheyHaveAlone) {
  const int64_t n = LeavesOf(kManyRows).total();
  for (int64_t c : kColumns) {
    SCOPED_TRACE(c);
    const Buffer<float> x(RandomFloats(n * c, 11)), dy(RandomFloats(n * c, 12)),
        stats(RandomFloats(n * 2, 13, 0.5, 2));
    ExpectLeavesAlone(kManyRows, {{0, c + 2}},
                      [&](const Call& call, const std::vector<float*>& out) {
                        ColumnSums(q(), call.leaves, c, x + call.row * c, out[0], c + 2);
                      });
    ExpectLeavesAlone(kManyRows, {{0, c}, {0, c}},
                      [&](const Call& call, const std::vector<float*>& out) {
                        const int64_t at = call.row * c;
                        LayerNormBackwardWeight(q(), call.leaves, c, x + at, stats + 2 * call.row,
                                                dy + at, out[0], out[1], c);
                      });
  }
  constexpr int64_t kVocabulary = 19, kFeatures = 6;
  std::vector<float> tokens = RandomFloats(n, 14, 0, kVocabulary - 1);
  for (float& token : tokens) token = std::floor(token);
  const Buffer<float> x(tokens), dy(RandomFloats(n * kFeatures, 15));
  ExpectLeavesAlone(kManyRows, {{0, kVocabulary * kFeatures}},
                    [&](const Call& call, const std::vector<float*>& out) {
                      EmbeddingBackward(q(), call.leaves, kVocabulary, kFeatures, x + call.row,
                                        dy + call.row * kFeatures, out[0], kVocabulary * kFeatures);
                    });
}

// By quads of channels and one by one, with steps and holes, windows of one place, groups.
std::vector<Conv2dShape> Convolutions() {
  return {{.height = 6, .width = 7, .in = 16, .out = 16, .kernel = 3, .padding = 1},
          {.height = 8, .width = 8, .in = 32, .out = 64, .kernel = 3, .stride = 2, .padding = 1},
          {.height = 6, .width = 6, .in = 3, .out = 32, .kernel = 3, .padding = 1},
          {.height = 9,
           .width = 8,
           .in = 12,
           .out = 20,
           .kernel = 3,
           .stride = 2,
           .padding = 2,
           .dilation = 2},
          {.height = 5, .width = 5, .in = 64, .out = 36, .kernel = 1, .stride = 2},
          {.height = 5, .width = 5, .in = 5, .out = 7, .kernel = 3, .padding = 1},
          {.height = 6, .width = 6, .in = 12, .out = 18, .kernel = 3, .padding = 1, .groups = 3}};
}
// Those of tensor cores: odd channels and windows, tiles that are full and that are not.
std::vector<Conv2dShape> Bf16Convolutions() {
  std::vector<Conv2dShape> shapes = {
      {.height = 9, .width = 8, .in = 3, .out = 17, .kernel = 7, .stride = 2, .padding = 3},
      {.height = 7, .width = 9, .in = 5, .out = 33, .kernel = 5, .padding = 2, .dilation = 2},
      {.height = 6, .width = 5, .in = 17, .out = 3, .kernel = 3, .stride = 2, .padding = 1},
      {.height = 5, .width = 7, .in = 40, .out = 100, .kernel = 3, .padding = 1},
      {.height = 4, .width = 4, .in = 136, .out = 130, .kernel = 1},
      // Of one size, by runs of pixels.
      {.height = 5, .width = 6, .in = 64, .out = 132, .kernel = 3, .padding = 1},
      {.height = 7, .width = 9, .in = 32, .out = 20, .kernel = 3, .padding = 2, .dilation = 2},
      {.height = 9, .width = 5, .in = 16, .out = 50, .kernel = 5, .padding = 2},
      {.height = 2, .width = 70, .in = 32, .out = 64, .kernel = 3, .padding = 1},
      {.height = 6, .width = 7, .in = 64, .out = 16, .kernel = 2, .padding = 1, .dilation = 2},
      {.height = 5, .width = 7, .in = 16, .out = 64, .kernel = 2, .padding = 1, .dilation = 2},
      {.height = 8, .width = 8, .in = 64, .out = 64, .kernel = 3, .padding = 1, .groups = 2},
      {.height = 7, .width = 7, .in = 20, .out = 160, .kernel = 3, .stride = 3, .dilation = 2},
      {.height = 12, .width = 12, .in = 48, .out = 8, .kernel = 5, .stride = 2, .padding = 2},
      {.height = 6, .width = 6, .in = 34, .out = 16, .kernel = 3, .padding = 1, .groups = 2},
      {.height = 6, .width = 7, .in = 32, .out = 80, .kernel = 3, .stride = 2, .groups = 2}};
  for (const Conv2dShape& shape : Convolutions()) shapes.push_back(shape);
  for (Conv2dShape& shape : shapes) shape.precision = Precision::kBf16;
  return shapes;
}
std::vector<Conv2dShape> AllConvolutions() {
  std::vector<Conv2dShape> shapes = Convolutions();
  for (const Conv2dShape& shape : Bf16Convolutions()) shapes.push_back(shape);
  return shapes;
}
struct ConvolutionSizes {
  int64_t x, y, w;  // x and y of a row
};
ConvolutionSizes SizesOf(const Conv2dShape& s) {
  return {s.height * s.width * s.in, s.out_height() * s.out_width() * s.out,
          s.out * s.kernel * s.kernel * (s.in / s.groups)};
}

std::string Describe(const Conv2dShape& s) {
  return std::string(s.precision == Precision::kBf16 ? "bf16, " : "fp32, ") + std::to_string(s.in) +
         " to " + std::to_string(s.out) + " channels, kernel " + std::to_string(s.kernel);
}

// The passes of a convolution, by the kernels that its precision has.
class Convolution {
 public:
  Convolution(const Queue& q, const Conv2dShape& shape, const float* w)
      : q_(q),
        s_(shape),
        w_(w),
        tensor_(s_.precision == Precision::kBf16 && FitsTensorCores(s_)),
        packed_(tensor_ ? PackedWeightBytes(s_) : 0, 0xCD) {
    if (!tensor_) return;
    EXPECT_EQ(cudaMalloc(&scratch_, TensorScratchBytes(s_)), cudaSuccess);
    const int64_t weights = SizesOf(s_).w;
    const Buffer<uint16_t> rounded(static_cast<size_t>(weights), 0);
    RoundToBf16(q_, weights, w_, rounded);
    PackTensorWeights(q_, s_, rounded, packed_);
    EXPECT_EQ(cudaStreamSynchronize(q_.stream), cudaSuccess);  // it goes
  }
  ~Convolution() { EXPECT_EQ(cudaFree(scratch_), cudaSuccess); }
  Convolution(const Convolution&) = delete;
  Convolution& operator=(const Convolution&) = delete;

  void Forward(int64_t rows, const float* x, const float* bias, bool relu, float* y) {
    if (tensor_) return TensorConvolutionForward(q_, s_, rows, x, packed_, bias, relu, y);
    ConvolutionForward(q_, s_, rows, x, w_, bias, relu, y);
  }
  void BackwardInput(int64_t rows, const float* dy, float* dx) {
    if (tensor_) return TensorConvolutionBackwardInput(q_, s_, rows, dy, packed_, dx);
    ConvolutionBackwardInput(q_, s_, rows, dy, w_, dx);
  }
  void BackwardInput(int64_t rows, const uint16_t* dy, uint16_t* dx) {
    TensorConvolutionBackwardInput(q_, s_, rows, dy, packed_, dx);
  }
  bool BackwardInputInto(int64_t rows, const uint16_t* dy, const uint16_t* more,
                         const uint8_t* above, uint16_t* g) {
    return TensorConvolutionBackwardInputInto(q_, s_, rows, dy, packed_, more, above, g);
  }
  void BackwardWeight(const Leaves& leaves, const float* x, const float* dy, float* dw,
                      int64_t stride) {
    if (tensor_) {
      return TensorConvolutionBackwardWeight(q_, s_, leaves, x, dy, dw, stride, scratch_);
    }
    ConvolutionBackwardWeight(q_, s_, leaves, x, dy, dw, stride);
  }

 private:
  const Queue q_;
  const Conv2dShape s_;
  const float* const w_;
  const bool tensor_;
  const Buffer<uint8_t> packed_;
  void* scratch_ = nullptr;
};

TEST_F(KernelLeavesTest, ConvolutionsOfLeavesHaveTheBitsThatTheyHaveAlone) {
  const std::vector<int64_t> rows = {1, 9, 2, 5, 16};
  for (const Conv2dShape& s : AllConvolutions()) {
    SCOPED_TRACE(Describe(s));
    const int64_t n = LeavesOf(rows).total();
    const ConvolutionSizes size = SizesOf(s);
    const Buffer<float> x(RandomFloats(n * size.x, 16)), dy(RandomFloats(n * size.y, 17)),
        w(RandomFloats(size.w, 18)), bias(RandomFloats(s.out, 19));
    Convolution convolution(q(), s, w);
    ExpectLeavesAlone(rows, {{size.y, 0}, {size.x, 0}, {0, size.w + 2}},
                      [&](const Call& call, const std::vector<float*>& out) {
                        const float* const own_x = x + call.row * size.x;
                        const float* const own_dy = dy + call.row * size.y;
                        const int64_t count = call.leaves.total();
                        convolution.Forward(count, own_x, bias, true, out[0]);
                        convolution.BackwardInput(count, own_dy, out[1]);
                        convolution.BackwardWeight(call.leaves, own_x, own_dy, out[2], size.w + 2);
                      });
  }
}

// A leaf that is cut into several chunks, beside short ones and one of no rows.
TEST_F(KernelLeavesTest, LongLeavesOfConvolutionsHaveTheBitsThatTheyHaveAlone) {
  const std::vector<int64_t> rows = {3, 70, 0, 33};
  for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
    for (const int64_t in : {3, 16}) {
      const Conv2dShape s = {.height = 8,
                             .width = 8,
                             .in = in,
                             .out = 16,
                             .kernel = 3,
                             .padding = 1,
                             .precision = precision};
      SCOPED_TRACE(Describe(s));
      const ConvolutionSizes size = SizesOf(s);
      const int64_t n = LeavesOf(rows).total();
      const Buffer<float> x(RandomFloats(n * size.x, 26)), dy(RandomFloats(n * size.y, 27)),
          w(RandomFloats(size.w, 28));
      Convolution convolution(q(), s, w);
      ExpectLeavesAlone(rows, {{0, size.w}}, [&](const Call& call, const std::vector<float*>& out) {
        convolution.BackwardWeight(call.leaves, x + call.row * size.x, dy + call.row * size.y,
                                   out[0], size.w);
      });
    }
  }
}

// Factors rounded to bf16, and nothing else: products are exact, and sums in fp32.
TEST_F(KernelLeavesTest, Bf16ConvolutionsMatchTheReference) {
  const auto rounded = [&](const std::vector<float>& values) {
    const Buffer<float> buffer(values);
    RoundInFloats(q(), static_cast<int64_t>(values.size()), buffer, buffer);
    return buffer.Read();
  };
  int64_t rows = 0;
  for (const Conv2dShape& s : Bf16Convolutions()) {
    rows = rows % 7 + 1;
    SCOPED_TRACE(Describe(s) + ", rows " + std::to_string(rows));
    const ConvolutionSizes size = SizesOf(s);
    const auto of_x = RandomFloats(rows * size.x, 30), of_dy = RandomFloats(rows * size.y, 31),
               of_w = RandomFloats(size.w, 32), of_bias = RandomFloats(s.out, 33);
    const Buffer<float> x(of_x), dy(of_dy), w(of_w), bias(of_bias);
    const Buffer<float> y(of_dy.size(), -7.0f), dx(of_x.size(), -7.0f), dw(of_w.size(), -7.0f);
    Convolution convolution(q(), s, w);
    convolution.Forward(rows, x, bias, false, y);
    convolution.BackwardInput(rows, dy, dx);
    convolution.BackwardWeight(rows, x, dy, dw, 0);

    // Sums, and the sums of their terms' magnitudes.
    const auto fx = rounded(of_x), fdy = rounded(of_dy), fw = rounded(of_w);
    std::vector<double> sums[3], magnitudes[3];
    for (int i = 0; i < 3; ++i) {
      const size_t elements = i == 0 ? of_dy.size() : i == 1 ? of_x.size() : of_w.size();
      sums[i].resize(elements);
      magnitudes[i].resize(elements);
    }
    for (size_t i = 0; i < of_dy.size(); ++i) {
      sums[0][i] = of_bias[i % static_cast<size_t>(s.out)];
      magnitudes[0][i] = std::abs(sums[0][i]);
    }
    const int64_t own_in = s.in / s.groups, own_out = s.out / s.groups;
    const auto add = [&](int of, int64_t at, float a, float b) {
      sums[of][static_cast<size_t>(at)] += static_cast<double>(a) * b;
      magnitudes[of][static_cast<size_t>(at)] += std::abs(static_cast<double>(a) * b);
    };
    for (int64_t at_y = 0; at_y < rows * size.y; ++at_y) {
      const int64_t out = at_y % s.out, place = at_y / s.out;
      const int64_t out_x = place % s.out_width(), out_y = place / s.out_width() % s.out_height();
      const int64_t row = place / s.out_width() / s.out_height();
      for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap) {
        const int64_t from_y = out_y * s.stride - s.padding + tap / s.kernel * s.dilation;
        const int64_t from_x = out_x * s.stride - s.padding + tap % s.kernel * s.dilation;
        if (from_y < 0 || from_y >= s.height || from_x < 0 || from_x >= s.width) continue;
        for (int64_t c = 0; c < own_in; ++c) {
          const int64_t at_x =
              ((row * s.height + from_y) * s.width + from_x) * s.in + out / own_out * own_in + c;
          const int64_t at_w = (out * s.kernel * s.kernel + tap) * own_in + c;
          const float vx = fx[static_cast<size_t>(at_x)], vw = fw[static_cast<size_t>(at_w)],
                      vdy = fdy[static_cast<size_t>(at_y)];
          add(0, at_y, vx, vw);
          add(1, at_x, vdy, vw);
          add(2, at_w, vdy, vx);
        }
      }
    }
    const std::vector<float> results[3] = {y.Read(), dx.Read(), dw.Read()};
    for (int i = 0; i < 3; ++i) {
      for (size_t j = 0; j < sums[i].size(); ++j) {
        ASSERT_NEAR(results[i][j], sums[i][j], 0x1p-16 * magnitudes[i][j])
            << "result " << i << ", element " << j;
      }
    }
  }
}

TEST_F(KernelLeavesTest, LossesOfLeavesHaveTheBitsThatTheyHaveAlone) {
  // By warps in one launch; by warps in two; by blocks.
  for (int64_t features : {1, 3, 10, 16, 33, 1000, 1100}) {
    for (bool many : {false, true}) {
      if (many && features != 10 && features != 16) continue;
      SCOPED_TRACE(features);
      const std::vector<int64_t>& rows = many ? kManyRows : kFewRows;
      const Leaves leaves = LeavesOf(rows);
      const int64_t n = leaves.total();
      std::vector<int32_t> label_of_row(n);
      for (int64_t r = 0; r < n; ++r) label_of_row[r] = static_cast<int32_t>(r * 7 % features);
      const Buffer<float> x(RandomFloats(n * features, 16, -4, 4)),
          target(RandomFloats(n * features, 17, 0, 1));
      const Buffer<int32_t> labels(label_of_row);
      const auto expect = [&](bool writes_loss, bool writes_correct, const auto& run) {
        const LeafResult before{.loss_sum = -77, .correct = -78};
        const Buffer<LeafResult> together(rows.size(), before), alone(rows.size(), before);
        ExpectLeavesAlone(
            rows, {{features, 0}}, [&](const Call& call, const std::vector<float*>& out) {
              run(call, call.leaves.count == 1 ? alone + call.leaf : +together, out[0]);
            });
        const auto a = together.Read(), b = alone.Read();
        for (size_t l = 0; l < rows.size(); ++l) {
          EXPECT_EQ(a[l].loss_sum, b[l].loss_sum) << "leaf " << l;
          EXPECT_EQ(a[l].correct, b[l].correct) << "leaf " << l;
          EXPECT_EQ(a[l].loss_sum == before.loss_sum, !writes_loss);
          EXPECT_EQ(a[l].correct == before.correct, !writes_correct);
        }
      };
      for (float smoothing : {0.0f, 0.1f}) {
        expect(true, true, [&](const Call& call, LeafResult* results, float* dx) {
          SoftmaxCrossEntropy(q(), call.leaves, features, x + call.row * features,
                              labels + call.row, smoothing, 0.25f, results, dx);
        });
      }
      expect(true, false, [&](const Call& call, LeafResult* results, float* dx) {
        const int64_t at = call.row * features;
        SigmoidCrossEntropy(q(), call.leaves, features, x + at, target + at, 0.25f, results, dx);
      });
      expect(true, false, [&](const Call& call, LeafResult* results, float* dx) {
        const int64_t at = call.row * features;
        MeanSquaredError(q(), call.leaves, features, x + at, target + at, 0.25f, results, dx);
      });
      expect(false, true, [&](const Call& call, LeafResult* results, float*) {
        CountCorrect(q(), call.leaves, features, x + call.row * features, labels + call.row,
                     results);
      });
    }
  }
}

TEST_F(KernelLeavesTest, EmptyLeavesComeToNothing) {
  const std::vector<int64_t> rows = {3, 0, 140, 0};
  const Leaves leaves = LeavesOf(rows);
  const int64_t n = leaves.total();
  for (int64_t c : {4, 5}) {
    const Buffer<float> x(RandomFloats(n * c, 18)), mean(4 * c, 7.0f), m2(4 * c, 7.0f),
        sums(4 * c, 7.0f);
    const Buffer<LeafResult> results(4, LeafResult{.loss_sum = 7, .correct = 7});
    BatchNormMoments(q(), c, leaves, x, mean, m2, c);
    ColumnSums(q(), leaves, c, x, sums, c);
    MeanSquaredError(q(), leaves, c, x, x, 1.0f, results, nullptr);
    for (int l : {1, 3}) {
      EXPECT_EQ(results.Read()[l].loss_sum, 0);
      for (int64_t i = l * c; i < (l + 1) * c; ++i) {
        EXPECT_EQ(mean.Read()[i], 0);
        EXPECT_EQ(m2.Read()[i], 0);
        EXPECT_EQ(sums.Read()[i], 0);
      }
    }
  }
}

// Longer chunks, and many of them.
TEST_F(KernelLeavesTest, MomentsOfManyRowsMatchTheReference) {
  constexpr int64_t kRows = 40001;
  for (int64_t c : {1, 4}) {
    const std::vector<float> x = RandomFloats(kRows * c, 19, 5000, 5001);
    const Buffer<float> in(x), mean(c, 0.0f), m2(c, 0.0f);
    BatchNormMoments(q(), c, kRows, in, mean, m2, 0);
    for (int64_t i = 0; i < c; ++i) {
      double sum = 0, squares = 0;
      for (int64_t r = 0; r < kRows; ++r) sum += x[r * c + i];
      for (int64_t r = 0; r < kRows; ++r) squares += std::pow(x[r * c + i] - sum / kRows, 2);
      EXPECT_EQ(mean.Read()[i], static_cast<float>(sum / kRows));
      EXPECT_NEAR(m2.Read()[i], squares, 1e-6 * squares);
    }
  }
}

// ---- addresses.

// Runs `call` on inputs and outputs at all kinds of addresses; results must agree. `lead(i)` is
// what a call's tensor i has.
void ExpectSameAnywhere(
    const std::function<std::vector<std::vector<float>>(const std::function<int(int)>&)>& run) {
  const auto expected = run([](int) { return 0; });
  for (int shift : {1, 2, 3}) {
    const auto together = run([&](int) { return shift; });
    const auto apart = run([&](int i) { return (shift * i + i / 4) % 4; });
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(SameBytes(together[i], expected[i])) << "output " << i << ", all by " << shift;
      EXPECT_TRUE(SameBytes(apart[i], expected[i])) << "output " << i << ", apart by " << shift;
    }
  }
}

TEST_F(KernelLeavesTest, BatchNormIsTheSameAtAnyAddress) {
  constexpr int64_t kRows = 2200;
  for (int64_t c : {4, 16, 100}) {
    SCOPED_TRACE(c);
    const std::vector<float> data = RandomFloats(kRows * c, 20, 1, 3),
                             gradient = RandomFloats(kRows * c, 21),
                             output = RandomFloats(kRows * c, 22);
    ExpectSameAnywhere([&](const std::function<int(int)>& lead) {
      const Buffer<float> x(data, lead(0)), dy(gradient, lead(1)), y(output, lead(2)),
          weight(RandomFloats(c, 23), lead(3)), bias(RandomFloats(c, 24), lead(4));
      const Buffer<float> mean(c, 0.0f, lead(5)), m2(c, 0.0f, lead(6)), sum(c, 0.0f, lead(7)),
          sum_x(c, 0.0f, lead(8)), normalized(kRows * c, 0.0f, lead(9)),
          g(kRows * c, 0.0f, lead(10)), dx(kRows * c, 0.0f, lead(11)), sums(c, 0.0f, lead(12));
      BatchNormMoments(q(), c, kRows, x, mean, m2, 0);
      BatchNormForward(q(), {c, true}, kRows, x, {mean, m2}, kEpsilon, weight, bias, dy,
                       normalized);
      BatchNormGradient(q(), {c, true}, kRows, x, y, dy, normalized, {mean, m2}, kEpsilon, g, sum,
                        sum_x, 0);
      BatchNormBackward(q(), {c, true}, kRows, x, y, dy, {mean, m2}, kEpsilon, weight, sum, sum_x,
                        0, dx);
      ColumnSums(q(), kRows, c, x, sums, 0);
      return std::vector<std::vector<float>>{mean.Read(),       m2.Read(), sum.Read(), sum_x.Read(),
                                             normalized.Read(), g.Read(),  dx.Read(),  sums.Read()};
    });
  }
}

TEST_F(KernelLeavesTest, ConvolutionsAreTheSameAtAnyAddress) {
  constexpr int64_t kRows = 5;
  for (const Conv2dShape& s : AllConvolutions()) {
    SCOPED_TRACE(Describe(s));
    const ConvolutionSizes size = SizesOf(s);
    ExpectSameAnywhere([&](const std::function<int(int)>& lead) {
      const Buffer<float> x(RandomFloats(kRows * size.x, 20), lead(0)),
          dy(RandomFloats(kRows * size.y, 21), lead(1)), w(RandomFloats(size.w, 22), lead(2)),
          bias(RandomFloats(s.out, 23), lead(3));
      const Buffer<float> y(kRows * size.y, 0.0f, lead(4)), dx(kRows * size.x, 0.0f, lead(5)),
          dw(size.w, 0.0f, lead(6));
      Convolution convolution(q(), s, w);
      convolution.Forward(kRows, x, bias, false, y);
      convolution.BackwardInput(kRows, dy, dx);
      convolution.BackwardWeight(kRows, x, dy, dw, 0);
      return std::vector<std::vector<float>>{y.Read(), dx.Read(), dw.Read()};
    });
  }
}

TEST_F(KernelLeavesTest, LossesAreTheSameAtAnyAddress) {
  constexpr int64_t kRows = 37;
  for (int64_t features : {4, 16, 100, 1000, 1100}) {
    SCOPED_TRACE(features);
    std::vector<int32_t> label_of_row(kRows);
    for (int64_t r = 0; r < kRows; ++r) label_of_row[r] = static_cast<int32_t>(r * 5 % features);
    const Buffer<int32_t> labels(label_of_row);
    ExpectSameAnywhere([&](const std::function<int(int)>& lead) {
      const int64_t n = kRows * features;
      const Buffer<float> x(RandomFloats(n, 25, -4, 4), lead(0)),
          target(RandomFloats(n, 26, 0, 1), lead(1)), d_softmax(n, 0.0f, lead(2)),
          d_sigmoid(n, 0.0f, lead(3)), d_square(n, 0.0f, lead(4));
      const Buffer<LeafResult> results(4, LeafResult());
      SoftmaxCrossEntropy(q(), kRows, features, x, labels, 0.1f, 0.5f, results, d_softmax);
      SigmoidCrossEntropy(q(), kRows, features, x, target, 0.5f, results + 1, d_sigmoid);
      MeanSquaredError(q(), kRows, features, x, target, 0.5f, results + 2, d_square);
      CountCorrect(q(), kRows, features, x, labels, results + 3);
      std::vector<float> bits(4 * sizeof(LeafResult) / sizeof(float));
      const auto values = results.Read();
      std::memcpy(bits.data(), values.data(), 4 * sizeof(LeafResult));
      return std::vector<std::vector<float>>{bits, d_softmax.Read(), d_sigmoid.Read(),
                                             d_square.Read()};
    });
  }
}

TEST_F(KernelLeavesTest, FlatPassesAreTheSameAtAnyAddress) {
  const Buffer<StepScalars> scalars(1, StepScalars{.step = 3,
                                                   .learning_rate = 0.1f,
                                                   .adam_correction1 = 0.3f,
                                                   .adam_correction2 = 0.2f,
                                                   .gradient_scale = 0.9f});
  for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 1023, 4099}) {
    SCOPED_TRACE(n);
    ExpectSameAnywhere([&](const std::function<int(int)>& lead) {
      std::vector<std::vector<float>> results;
      for (int type = 0; type < kOptimizerTypes; ++type) {
        const OptimizerCoefficients coefficients{.type = static_cast<OptimizerType>(type),
                                                 .momentum = 0.9f,
                                                 .beta1 = 0.9f,
                                                 .beta2 = 0.99f,
                                                 .rho = 0.9f,
                                                 .epsilon = 0.1f,
                                                 .l2 = 0.01f,
                                                 .weight_decay = 0.1f};
        const Buffer<float> g(RandomFloats(n, 27), lead(0)), w(RandomFloats(n, 28), lead(1));
        const Buffer<float> a(RandomFloats(n, 29, 0.5, 1), lead(2)),
            b(RandomFloats(n, 30, 0, 0.5), lead(3)), c(RandomFloats(n, 31), lead(4));
        OptimizerSlots slots;
        float* const all[] = {a, b, c};
        for (int k = 0; k < SlotCount(coefficients.type); ++k) slots.at[k] = all[k];
        OptimizerUpdate(q(), coefficients, n, scalars, g, w, slots);
        for (const auto* buffer : {&w, &a, &b, &c}) results.push_back(buffer->Read());
      }
      std::vector<float> x = RandomFloats(n, 32);
      const Buffer<float> in(x, lead(5));
      const Buffer<double> norms(static_cast<size_t>((n + kNormBlock - 1) / kNormBlock), 0.0);
      const Buffer<Digest> digest(1, Digest{~uint64_t{0}, 1});
      SquaredNorms(q(), n, in, norms);
      AccumulateDigest(q(), n, in, 12345, 678, digest);
      double total = 0;
      for (double norm : norms.Read()) total += norm;
      float words[6];
      std::memcpy(words, &total, sizeof(total));
      std::memcpy(words + 2, digest.Read().data(), sizeof(Digest));
      results.emplace_back(words, words + 6);
      const Buffer<uint32_t> flag(1, 0u);
      x[n / 2] = std::nanf("");
      const Buffer<float> bad(x, lead(6));
      FlagNonFinite(q(), n, in, flag);
      EXPECT_EQ(flag.Read()[0], 0u);
      FlagNonFinite(q(), n, bad, flag);
      EXPECT_EQ(flag.Read()[0], 1u);
      return results;
    });
  }
}

// ---- the canonical tree.

float TreeOf(const std::vector<std::vector<float>>& parts, collective::Node node, int64_t i) {
  if (node.end - node.begin == 1) return parts[node.begin][i];
  const int split = collective::SplitPoint(node);
  const float left = TreeOf(parts, {node.begin, split}, i);
  return left + TreeOf(parts, {split, node.end}, i);
}

TEST_F(KernelLeavesTest, PartsAreSummedByTheCanonicalTree) {
  std::vector<int> counts = {24, 31, 32, 33, 40, 47, 63, kMostParts};
  for (int count = 1; count <= 17; ++count) counts.push_back(count);
  for (int count : counts) {
    SCOPED_TRACE(count);
    for (int64_t n : {1, 5, 1030}) {
      std::vector<std::vector<float>> parts;
      for (int p = 0; p < count; ++p) parts.push_back(RandomFloats(n, 33 + p));
      if (n > 1) {
        for (auto& part : parts) part[1] = -0.0f;  // stays: nothing is added that is not there
      }
      std::vector<float> expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = TreeOf(parts, {0, count}, i);
      for (int lead : {0, 3, -1}) {  // -1: another for each
        std::vector<std::unique_ptr<Buffer<float>>> buffers;
        std::vector<const float*> pointers;
        for (int p = 0; p < count; ++p) {
          buffers.push_back(std::make_unique<Buffer<float>>(parts[p], lead < 0 ? p % 4 : lead));
          pointers.push_back(*buffers.back());
        }
        const Buffer<float> out(n, 0.0f, std::max(lead, 0));
        TreeSum(q(), n, pointers.data(), count, out);
        EXPECT_TRUE(SameBytes(out.Read(), expected));
        const Buffer<float>& over = *buffers[count / 2];
        TreeSum(q(), n, pointers.data(), count, over);
        EXPECT_TRUE(SameBytes(over.Read(), expected)) << "over a part";
      }
    }
  }
}

// A gradient that goes into another, and through a relu, on the way: the bits of two calls.
TEST_F(KernelLeavesTest, GradientsGoIntoOthersAsTheyDoInTwoCalls) {
  struct Case {
    int64_t size, in, out, kernel, stride, padding, rows;
    bool joins;
  };
  const bool warpgroups = WarpgroupProcessors() > 0;
  // Tiles of 64 and of 128 features, one step and several; phases, of which some have no taps;
  // tiles that are not full; what warpgroups do not take.
  for (const Case& c : std::initializer_list<Case>{{7, 64, 64, 1, 1, 0, 5, warpgroups},
                                                   {5, 128, 64, 1, 1, 0, 6, warpgroups},
                                                   {6, 192, 128, 1, 2, 0, 3, warpgroups},
                                                   {5, 64, 64, 3, 1, 1, 2, warpgroups},
                                                   {5, 128, 64, 3, 2, 1, 2, warpgroups},
                                                   {4, 256, 320, 1, 1, 0, 2, warpgroups},
                                                   {5, 40, 64, 1, 1, 0, 2, false}}) {
    Conv2dShape s = {c.size, c.size, c.in, c.out, c.kernel, c.stride, c.padding};
    s.precision = Precision::kBf16;
    s.x_type = s.y_type = ElementType::kBf16;
    SCOPED_TRACE(Describe(s));
    const ConvolutionSizes sizes = SizesOf(s);
    const auto n = static_cast<size_t>(c.rows * sizes.x);
    const auto rounded = [](const std::vector<float>& floats) {
      std::vector<uint16_t> bits;
      for (const float value : floats) {
        bits.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
      }
      return bits;
    };
    const Buffer<float> w(RandomFloats(sizes.w, 31));
    const Buffer<uint16_t> dy(rounded(RandomFloats(c.rows * sizes.y, 32)));
    const std::vector<uint16_t> others = rounded(RandomFloats(static_cast<int64_t>(n), 33, -8, 8));
    std::vector<uint8_t> bits(n / 8);
    std::mt19937 generator(34);
    for (uint8_t& byte : bits) byte = static_cast<uint8_t>(generator());
    const Buffer<uint8_t> above(bits);
    const Buffer<uint16_t> dx(n, uint16_t{0}), sum(n, uint16_t{0}), more(others), g(n, uint16_t{7});
    Convolution convolution(q(), s, w);
    convolution.BackwardInput(c.rows, dy, dx);
    Add(q(), static_cast<int64_t>(n), more, dx, sum, ElementType::kBf16);
    std::vector<uint16_t> expected = sum.Read();
    for (size_t i = 0; i < n; ++i) {
      if ((bits[i / 8] >> i % 8 & 1) == 0) expected[i] = 0;
    }
    ASSERT_EQ(convolution.BackwardInputInto(c.rows, dy, more, above, g), c.joins);
    if (!c.joins) continue;
    EXPECT_TRUE(SameBytes(g.Read(), expected));
    ASSERT_TRUE(convolution.BackwardInputInto(c.rows, dy, more, above, more));  // over it
    EXPECT_TRUE(SameBytes(more.Read(), expected));
  }
}

}  // namespace
}  // namespace lockstep::device::cuda
