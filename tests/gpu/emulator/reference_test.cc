// The reference products and convolutions, against their definitions in doubles.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/emulator/emulator.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/cuda/dnn.h"

namespace lockstep::device::cuda {
namespace {

std::vector<float> RandomFloats(int64_t size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = static_cast<float>(generator() >> 8) * 0x1p-23f - 1.0f;
  return values;
}

// Pinned memory, which the host can compare.
template <class T>
T* Pinned(const std::vector<T>& values) {
  T* memory = nullptr;
  EXPECT_EQ(cudaHostAlloc(&memory, values.size() * sizeof(T), cudaHostAllocDefault), cudaSuccess);
  std::copy(values.begin(), values.end(), memory);
  return memory;
}

class ReferenceTest : public testing::Test {
 protected:
  void SetUp() override {
    emulator::Configure({});
    ASSERT_EQ(cudaStreamCreateWithFlags(&queue_.stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaMalloc(&workspace_, kProductWorkspaceBytes), cudaSuccess);
    queue_.failure = &failure_;
  }
  void TearDown() override {
    EXPECT_EQ(failure_, "");
    emulator::Configure({});
  }

  Queue queue_;
  std::string failure_;
  void* workspace_ = nullptr;
};
using ReferenceDeathTest = ReferenceTest;

TEST_F(ReferenceTest, ProductsMatchTheirDefinition) {
  const auto blas = MakeBlas();
  ASSERT_TRUE(blas.ok());
  constexpr int64_t kM = 5, kN = 7, kK = 6, kRow = 9;
  const std::vector<float> a = RandomFloats(kRow * kRow, 1), b = RandomFloats(kRow * kRow, 2),
                           bias = RandomFloats(kN, 3), before = RandomFloats(kM * kRow, 4);
  const float *const device_a = Pinned(a), *const device_b = Pinned(b),
                     *const device_bias = Pinned(bias);
  for (int options = 0; options < 16; ++options) {
    SCOPED_TRACE(options);
    ProductShape s;
    s.transpose_a = (options & 1) != 0;
    s.transpose_b = (options & 2) != 0;
    s.accumulate = (options & 4) != 0;
    s.bias = (options & 8) != 0;
    s.m = kM;
    s.n = kN;
    s.k = kK;
    s.a_row = s.b_row = s.c_row = kRow;
    s.alignment = 4;
    const auto product = (*blas)->MakeProduct(s);
    ASSERT_TRUE(product.ok()) << product.status();
    float* const c = Pinned(before);
    (*product)->Run(queue_, kM, device_a, device_b, device_bias, c, workspace_);
    ASSERT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
    for (int64_t i = 0; i < kM; ++i) {
      for (int64_t j = 0; j < kRow; ++j) {
        double expected = before[static_cast<size_t>(i * kRow + j)];
        if (j < kN) {
          if (!s.accumulate) expected = 0;
          for (int64_t p = 0; p < kK; ++p) {
            expected +=
                double{a[static_cast<size_t>(s.transpose_a ? p * kRow + i : i * kRow + p)]} *
                b[static_cast<size_t>(s.transpose_b ? j * kRow + p : p * kRow + j)];
          }
          if (s.bias) expected += bias[static_cast<size_t>(j)];
        }
        EXPECT_NEAR(c[i * kRow + j], expected, 1e-5);
      }
    }
  }
}

TEST_F(ReferenceTest, FactorsAreRounded) {
  const auto blas = MakeBlas();
  ASSERT_TRUE(blas.ok());
  ProductShape s;
  s.m = s.n = s.k = 1;
  s.alignment = 2;
  float *const one = Pinned<float>({1.0f}), *const c = Pinned<float>({0.0f});
  const auto rounded = [&](float value) {
    s.factors = Factors::kTf32;
    const auto product = (*blas)->MakeProduct(s);
    (*product)->Run(queue_, 1, Pinned<float>({value}), one, nullptr, c, workspace_);
    EXPECT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
    return *c;
  };
  EXPECT_EQ(rounded(1.0f + 0x1p-10f), 1.0f + 0x1p-10f);
  EXPECT_EQ(rounded(1.0f + 0x1p-11f), 1.0f);  // a tie, to even
  EXPECT_EQ(rounded(1.0f + 0x3p-11f), 1.0f + 0x1p-9f);
  EXPECT_EQ(rounded(1.0f + 0x1.1p-11f), 1.0f + 0x1p-10f);
  EXPECT_TRUE(std::isnan(rounded(NAN)));
  EXPECT_TRUE(std::isinf(rounded(INFINITY)));

  s.factors = Factors::kBf16;
  s.relu = true;
  const auto product = (*blas)->MakeProduct(s);
  const auto* const two = Pinned<uint16_t>({0x4000});
  (*product)->Run(queue_, 1, two, Pinned<uint16_t>({0x3FC0}), nullptr, c, workspace_);
  EXPECT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
  EXPECT_EQ(*c, 3.0f);
  (*product)->Run(queue_, 1, two, Pinned<uint16_t>({0xBFC0}), nullptr, c, workspace_);
  EXPECT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
  EXPECT_EQ(*c, 0.0f);
}

TEST_F(ReferenceDeathTest, BrokenPromisesAreFound) {
  const auto blas = MakeBlas();
  ASSERT_TRUE(blas.ok());
  ProductShape s;
  s.m = s.n = s.k = 4;
  const auto product = (*blas)->MakeProduct(s);
  float* const x = Pinned(RandomFloats(64, 1));
  EXPECT_DEATH((*product)->Run(queue_, 4, x + 1, x, nullptr, x, workspace_), "not aligned to 16");
  EXPECT_DEATH((*product)->Run(queue_, 4, x, x, nullptr, x, x + 1), "not aligned to 256");
  EXPECT_DEATH((*product)->Run(queue_, 5, x, x, nullptr, x, workspace_), "was run with 5");
}

double Dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
  return sum;
}

TEST_F(ReferenceTest, ConvolutionsMatchTheirDefinitionAndTheirGradientsThem) {
  const auto dnn = MakeDnn();
  ASSERT_TRUE(dnn.ok());
  const auto shape = [](int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                        int64_t groups) {
    Conv2dShape s;
    s.height = 7;
    s.width = 6;
    s.in = 6;
    s.out = 9;
    s.kernel = kernel;
    s.stride = stride;
    s.padding = padding;
    s.dilation = dilation;
    s.groups = groups;
    return s;
  };
  constexpr int64_t kRows = 2;
  for (const Conv2dShape& s : {shape(1, 1, 0, 1, 1), shape(3, 1, 1, 1, 1), shape(3, 2, 1, 1, 3),
                               shape(2, 1, 2, 3, 1), shape(3, 2, 0, 2, 3)}) {
    const int64_t in = s.in / s.groups, out = s.out / s.groups;
    const int64_t xs = kRows * s.height * s.width * s.in, ws = s.out * s.kernel * s.kernel * in,
                  ys = kRows * s.out_height() * s.out_width() * s.out;
    float *const x = Pinned(RandomFloats(xs, 1)), *const w = Pinned(RandomFloats(ws, 2)),
                 *const dy = Pinned(RandomFloats(ys, 3));
    float *const y = Pinned(RandomFloats(ys, 4)), *const dx = Pinned(RandomFloats(xs, 5)),
                 *const dw = Pinned(RandomFloats(ws, 6));
    const auto run = [&](ConvolutionPass pass, const float* first, const float* second,
                         float* result) {
      const auto convolution = (*dnn)->MakeConvolution(pass, s, kRows, Factors::kFp32);
      ASSERT_TRUE(convolution.ok());
      ASSERT_LE((*convolution)->workspace_bytes(), kProductWorkspaceBytes);
      (*convolution)->Run(queue_, first, second, result, workspace_);
      ASSERT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
    };
    run(ConvolutionPass::kForward, x, w, y);
    run(ConvolutionPass::kBackwardInput, dy, w, dx);
    run(ConvolutionPass::kBackwardWeight, dy, x, dw);
    int64_t i = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t oh = 0; oh < s.out_height(); ++oh) {
        for (int64_t ow = 0; ow < s.out_width(); ++ow) {
          for (int64_t o = 0; o < s.out; ++o, ++i) {
            double expected = 0;
            for (int64_t k = 0; k < s.kernel * s.kernel; ++k) {
              const int64_t ih = oh * s.stride - s.padding + k / s.kernel * s.dilation;
              const int64_t iw = ow * s.stride - s.padding + k % s.kernel * s.dilation;
              if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
              expected += Dot(x + ((row * s.height + ih) * s.width + iw) * s.in + o / out * in,
                              w + (o * s.kernel * s.kernel + k) * in, in);
            }
            ASSERT_NEAR(y[i], expected, 1e-5);
          }
        }
      }
    }
    // The map is linear in x and in w, and the gradients are its adjoints.
    EXPECT_NEAR(Dot(dx, x, xs), Dot(dy, y, ys), 1e-4);
    EXPECT_NEAR(Dot(dw, w, ws), Dot(dy, y, ys), 1e-4);
  }
}

}  // namespace
}  // namespace lockstep::device::cuda
