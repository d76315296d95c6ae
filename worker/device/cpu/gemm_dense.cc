#include "worker/device/cpu/gemm_dense.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/device/cpu/host_memory.h"

namespace lockstep::device {
namespace {

class GemmDense : public Dense {
 public:
  GemmDense(const Kernels& kernels, const DenseShape& shape, std::unique_ptr<Memory> panels,
            std::unique_ptr<Memory> plain)
      : k_(kernels), s_(shape), panels_(std::move(panels)), plain_(std::move(plain)) {}

  size_t scratch_bytes() const override { return 0; }

  void Pack(Stream&, const float* weight) override {
    k_.pack_transposed(s_.out, s_.in, weight, panels_->floats());
    std::memcpy(plain_->data(), weight, static_cast<size_t>(s_.in * s_.out) * sizeof(float));
  }

  void Forward(Stream&, int64_t rows, const float* x, const float* bias, float* y, void*) override {
    k_.gemm({.rows = rows,
             .columns = s_.out,
             .depth = s_.in,
             .a_row = s_.in,
             .b_panel = s_.in * kGemmPanel,
             .b_depth = kGemmPanel,
             .c_row = s_.out},
            x, panels_->floats(), s_.bias ? bias : nullptr, y);
    if (s_.activation == Activation::kRelu) k_.relu_forward(rows * s_.out, y, y);
  }

  void BackwardInput(Stream&, int64_t rows, const float* dy, float* dx, void*) override {
    k_.gemm({.rows = rows,
             .columns = s_.in,
             .depth = s_.out,
             .a_row = s_.out,
             .b_depth = s_.in,
             .c_row = s_.in},
            dy, plain_->floats(), nullptr, dx);
  }

  void BackwardWeight(Stream&, int64_t rows, const float* x, const float* dy, float* dw, float* db,
                      void*) override {
    k_.gemm({.rows = s_.out,
             .columns = s_.in,
             .depth = rows,
             .a_row = 1,
             .a_depth = s_.out,
             .b_depth = s_.in,
             .c_row = s_.in},
            dy, x, nullptr, dw);
    if (s_.bias) k_.column_sums(rows, s_.out, dy, db);
  }

 private:
  const Kernels& k_;
  const DenseShape s_;
  const std::unique_ptr<Memory> panels_, plain_;  // of the weights: transposed, and as they are
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
  const int64_t columns = (shape.out + kGemmPanel - 1) / kGemmPanel * kGemmPanel;
  const size_t bytes = static_cast<size_t>(shape.in * columns) * sizeof(float);
  std::unique_ptr<Memory> panels = AllocateHostMemory(bytes), plain = AllocateHostMemory(bytes);
  if (panels == nullptr || plain == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", 2 * bytes, " bytes of packed weights on the CPU"));
  }
  return std::make_unique<GemmDense>(kernels, shape, std::move(panels), std::move(plain));
}

}  // namespace lockstep::device
