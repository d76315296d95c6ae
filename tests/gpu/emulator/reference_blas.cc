// Matrix products in plain loops, in place of cuBLASLt: an element is summed over k in order, or in
// reverse, in floats, whatever m is.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "tests/gpu/emulator/emulator.h"
#include "tests/gpu/emulator/reference_algorithms.h"
#include "tests/gpu/emulator/reference_factors.h"
#include "worker/device/cuda/blas.h"

namespace lockstep::device::cuda {
namespace {

class ReferenceProduct : public Product {
 public:
  ReferenceProduct(const ProductShape& shape, bool reverse) : s_(shape), reverse_(reverse) {
    if (s_.a_row == 0) s_.a_row = s_.transpose_a ? s_.m : s_.k;
    if (s_.b_row == 0) s_.b_row = s_.transpose_b ? s_.k : s_.n;
    if (s_.c_row == 0) s_.c_row = s_.n;
  }

  void Run(const Queue& queue, int64_t m, const void* a, const void* b, const float* bias, float* c,
           void* workspace) override {
    if (m > s_.m || (s_.transpose_a && m != s_.m)) {
      emulator::Refuse(absl::StrCat("a product of at most ", s_.m, " rows was run with ", m));
    }
    const int64_t element = s_.factors == Factors::kBf16 ? 2 : 4;
    emulator::CheckAlignment("op(A) of a product", a, std::gcd(s_.alignment, s_.a_row * element));
    emulator::CheckAlignment("op(B) of a product", b, std::gcd(s_.alignment, s_.b_row * element));
    emulator::CheckAlignment("the result of a product", c, std::gcd(s_.alignment, s_.c_row * 4));
    emulator::CheckAlignment("the workspace of a product", workspace, 256);
    const cudaError_t error =
        emulator::Enqueue(queue.stream, [s = s_, reverse = reverse_, m, a, b, bias, c, workspace] {
          emulator::UseWorkspace(workspace, kProductWorkspaceBytes);
          Compute(s, reverse, m, a, b, s.bias ? bias : nullptr, c);
        });
    if (error != cudaSuccess) Fail(queue, absl::StrCat("product: ", cudaGetErrorString(error)));
  }

  void RunBatch(const Queue& queue, int count, const void* a, int64_t a_stride, const void* b,
                int64_t b_stride, float* c, int64_t c_stride, void* workspace) override {
    const int64_t element = s_.factors == Factors::kBf16 ? 2 : 4;
    for (int i = 0; i < count; ++i) {
      Run(queue, s_.m, static_cast<const char*>(a) + i * a_stride * element,
          static_cast<const char*>(b) + i * b_stride * element, nullptr, c + i * c_stride,
          workspace);
    }
  }

  std::string algorithm() const override {
    return reverse_ ? emulator::kReverse : emulator::kInOrder;
  }

 private:
  static void Compute(const ProductShape& s, bool reverse, int64_t m, const void* a, const void* b,
                      const float* bias, float* c) {
    std::vector<float> right(static_cast<size_t>(s.k * s.n));  // op(B), packed
    for (int64_t p = 0; p < s.k; ++p) {
      for (int64_t j = 0; j < s.n; ++j) {
        const int64_t at = s.transpose_b ? j * s.b_row + p : p * s.b_row + j;
        right[static_cast<size_t>(p * s.n + j)] = emulator::FactorAt(b, at, s.factors);
      }
    }
    std::vector<float> sums(static_cast<size_t>(s.n));
    for (int64_t i = 0; i < m; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t step = 0; step < s.k; ++step) {
        const int64_t p = reverse ? s.k - 1 - step : step;
        const int64_t at = s.transpose_a ? p * s.a_row + i : i * s.a_row + p;
        emulator::AddProduct(s.n, emulator::FactorAt(a, at, s.factors), right.data() + p * s.n,
                             sums.data());
      }
      float* const row = c + i * s.c_row;
      for (int64_t j = 0; j < s.n; ++j) {
        float value = sums[static_cast<size_t>(j)];
        if (s.accumulate) value = row[j] + value;
        if (bias != nullptr) value += bias[j];
        row[j] = s.relu && value < 0 ? 0.0f : value;
      }
    }
  }

  ProductShape s_;
  bool reverse_;
};

class ReferenceBlas : public Blas {
 public:
  explicit ReferenceBlas(std::shared_ptr<AlgorithmBook> book) : book_(std::move(book)) {}

  std::string version() const override { return "reference products"; }

  absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape& s) override {
    if (s.m < 1 || s.n < 1 || s.k < 1 || s.alignment < 1 ||
        (s.a_row != 0 && s.a_row < (s.transpose_a ? s.m : s.k)) ||
        (s.b_row != 0 && s.b_row < (s.transpose_b ? s.k : s.n)) ||
        (s.c_row != 0 && (s.c_row < s.n || (s.relu && s.c_row != s.n)))) {
      return absl::InvalidArgumentError(
          absl::StrCat("a product of ", s.m, "x", s.k, " by ", s.k, "x", s.n));
    }
    const std::string problem =
        absl::StrCat("product of ", s.transpose_a ? absl::StrCat(s.m, " rows, ") : "", s.n,
                     " columns, ", s.k, " terms");
    ASSIGN_OR_RETURN(const bool reverse, emulator::IsReverse(*book_, problem));
    return std::make_unique<ReferenceProduct>(s, reverse);
  }

 private:
  const std::shared_ptr<AlgorithmBook> book_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Blas>> MakeBlas(std::shared_ptr<AlgorithmBook> book) {
  if (book == nullptr) book = std::make_shared<AlgorithmBook>();
  return std::make_unique<ReferenceBlas>(std::move(book));
}

}  // namespace lockstep::device::cuda
