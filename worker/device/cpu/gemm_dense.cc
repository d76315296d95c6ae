#include "worker/device/cpu/gemm_dense.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace lockstep::device {
namespace {

// Reads the weights where they are: no copy of them is kept.
class GemmDense : public Dense {
 public:
  GemmDense(const Kernels& kernels, const DenseShape& shape) : k_(kernels), s_(shape) {}

  size_t scratch_bytes() const override {
    static_assert(kDenseScratchColumns >= kMostFoldBuffers);
    return static_cast<size_t>(s_.out * kDenseScratchColumns) * sizeof(float);
  }

  void Pack(Stream&, const float* weight) override { weight_ = weight; }

  void Forward(Stream&, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) override {
    k_.dense_forward(rows, s_.in, s_.out, x, weight_, s_.bias ? bias : nullptr,
                     s_.activation == Activation::kRelu, y, static_cast<float*>(scratch));
  }

  void BackwardInput(Stream&, int64_t rows, const float* dy, float* dx, void*) override {
    k_.gemm({.rows = rows,
             .columns = s_.in,
             .depth = s_.out,
             .a_row = s_.out,
             .b_depth = s_.in,
             .c_row = s_.in},
            dy, weight_, nullptr, dx);
  }

  void BackwardWeight(Stream&, const LeafFold& fold, const int64_t* rows, const float* const* x,
                      const float* const* dy, float* const* dw, float* const* db,
                      void* scratch) override {
    k_.dense_weight_gradient(fold, s_.in, s_.out, rows, x, dy, dw);
    if (!s_.bias) return;
    const auto buffer = [&](int i) { return static_cast<float*>(scratch) + i * s_.out; };
    const FoldPair* combine = fold.combines;
    for (int leaf = 0; leaf < fold.leaves; ++leaf) {
      k_.column_sums(rows[leaf], s_.out, dy[leaf], buffer(fold.buffer[leaf]));
      for (int i = 0; i < fold.combine_count[leaf]; ++i, ++combine) {
        k_.add(s_.out, buffer(combine->left), buffer(combine->right), buffer(combine->left));
      }
    }
    for (int part = 0; part < fold.parts; ++part) {
      const float* const sums = buffer(fold.part_buffer[part]);
      std::copy(sums, sums + s_.out, db[part]);
    }
  }

 private:
  const Kernels& k_;
  const DenseShape s_;
  const float* weight_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dense>> MakeGemmDense(const Kernels& kernels,
                                                     const DenseShape& shape,
                                                     absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1) {
    return absl::InvalidArgumentError(absl::StrCat("dense of ", shape.in, " inputs and ", shape.out,
                                                   " outputs; both must be positive"));
  }
  for (int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("dense was asked for ", count, " rows; at least 1 is accepted"));
    }
  }
  return std::make_unique<GemmDense>(kernels, shape);
}

}  // namespace lockstep::device
