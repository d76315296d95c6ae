#include "worker/device/cuda/own_products.h"

#include <string>
#include <utility>

#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

class OwnProduct : public Product {
 public:
  explicit OwnProduct(const ProductShape& s) : m_(s.m) {
    p_.transpose_a = s.transpose_a;
    p_.transpose_b = s.transpose_b;
    p_.n = s.n;
    p_.k = s.k;
    p_.a_row = s.a_row != 0 ? s.a_row : s.transpose_a ? s.m : s.k;
    p_.b_row = s.b_row != 0 ? s.b_row : s.transpose_b ? s.k : s.n;
    p_.c_row = s.c_row != 0 ? s.c_row : s.n;
    p_.accumulate = s.accumulate;
    p_.relu = s.relu;
    p_.bf16 = s.factors == Factors::kBf16;
    p_.a_floats = p_.bf16 && s.floats;
    p_.b_floats = p_.a_floats && s.transpose_a;
    has_bias_ = s.bias;
  }

  void Run(const Queue& queue, int64_t m, const void* a, const void* b, const float* bias, float* c,
           void*) override {
    SmallProduct p = p_;
    p.m = m;
    MultiplySmall(queue, p, a, b, has_bias_ ? bias : nullptr, c);
  }

  bool RunThenNorm(const Queue& queue, const Leaves& leaves, const void* a, const void* b,
                   const float* bias, float* c, const NormForward& norm) override {
    SmallProduct p = p_;
    p.m = leaves.total();
    return MultiplySmallThenNorm(queue, p, leaves, a, b, has_bias_ ? bias : nullptr, c, norm);
  }
  bool RunThenNormBackward(const Queue& queue, const Leaves& leaves, const void* a, const void* b,
                           const NormBackward& norm) override {
    SmallProduct p = p_;
    p.m = leaves.total();
    return MultiplySmallThenNormBackward(queue, p, leaves, a, b, norm);
  }

  void RunBatch(const Queue& queue, int count, const void* a, int64_t a_stride, const void* b,
                int64_t b_stride, float* c, int64_t c_stride, void*) override {
    SmallProduct p = p_;
    p.m = m_;
    p.count = count;
    p.a_stride = a_stride;
    p.b_stride = b_stride;
    p.c_stride = c_stride;
    MultiplySmall(queue, p, a, b, nullptr, c);
  }

  bool takes_floats() const override { return p_.a_floats; }
  std::string algorithm() const override { return "own small product"; }

 private:
  const int64_t m_;
  SmallProduct p_;
  bool has_bias_ = false;
};

class OwnBlas : public Blas {
 public:
  explicit OwnBlas(std::unique_ptr<Blas> vendor) : vendor_(std::move(vendor)) {}
  std::string version() const override { return vendor_->version(); }
  absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape& shape) override {
    if (IsOwnProduct(shape)) return std::make_unique<OwnProduct>(shape);
    return vendor_->MakeProduct(shape);
  }

 private:
  const std::unique_ptr<Blas> vendor_;
};

// Whether all sizes are positive and rows fit their strides; the vendor's says what is wrong.
bool IsSound(const ProductShape& s) {
  const auto fits = [](int64_t row, int64_t elements) { return row == 0 || row >= elements; };
  return s.m >= 1 && s.n >= 1 && s.k >= 1 && s.alignment >= 1 &&
         fits(s.a_row, s.transpose_a ? s.m : s.k) && fits(s.b_row, s.transpose_b ? s.k : s.n) &&
         fits(s.c_row, s.n) && (!s.relu || s.c_row == 0 || s.c_row == s.n);
}

}  // namespace

bool IsOwnProduct(const ProductShape& s) {
  if (!IsSound(s) || s.factors == Factors::kTf32) return false;
  if (s.a_row > kMostOwnRow || s.b_row > kMostOwnRow) return false;
  if (!s.transpose_a) return s.n <= kMostOwnWeights / s.k;
  return !s.transpose_b && s.n <= kMostOwnWeights / s.m && s.k <= kMostOwnTerms;
}

std::unique_ptr<Blas> WithOwnProducts(std::unique_ptr<Blas> vendor) {
  return std::make_unique<OwnBlas>(std::move(vendor));
}

}  // namespace lockstep::device::cuda
