#include "worker/device/cpu/gemm_dense.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/device/cpu/host_memory.h"

namespace lockstep::device {
namespace {

// Each leaf's sums over its rows, folded; `buffers` holds kMostFoldBuffers * out floats.
void BackwardBias(const Kernels& k, int64_t out, const LeafFold& fold, const int64_t* rows,
                  const float* const* dy, float* const* db, float* buffers) {
  const auto buffer = [&](int i) { return buffers + i * out; };
  const FoldPair* combine = fold.combines;
  for (int leaf = 0; leaf < fold.leaves; ++leaf) {
    k.column_sums(rows[leaf], out, dy[leaf], buffer(fold.buffer[leaf]));
    for (int i = 0; i < fold.combine_count[leaf]; ++i, ++combine) {
      k.add(out, buffer(combine->left), buffer(combine->right), buffer(combine->left));
    }
  }
  for (int part = 0; part < fold.parts; ++part) {
    const float* const sums = buffer(fold.part_buffer[part]);
    std::copy(sums, sums + out, db[part]);
  }
}

// Reads the weights where they are: no copy of them is kept.
class GemmDense : public Dense {
 public:
  GemmDense(const Kernels& kernels, const DenseShape& shape) : k_(kernels), s_(shape) {}

  size_t scratch_bytes() const override {
    static_assert(kDenseScratchColumns >= kMostFoldBuffers);
    return static_cast<size_t>(s_.out * kDenseScratchColumns) * sizeof(float);
  }

  void Pack(Stream&, const float* weight, const uint16_t*) override { weight_ = weight; }

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

  void BackwardWeight(Stream&, Stream&, const LeafFold& fold, const int64_t* rows,
                      const float* const* x, const float* const* dy, float* const* dw,
                      float* const* db, void* scratch) override {
    k_.dense_weight_gradient(fold, s_.in, s_.out, rows, x, dy, dw);
    if (s_.bias) BackwardBias(k_, s_.out, fold, rows, dy, db, static_cast<float*>(scratch));
  }

 private:
  const Kernels& k_;
  const DenseShape s_;
  const float* weight_ = nullptr;
};

// Two packed copies of the weights, in pairs along either of their axes. Gradients and samples are
// rounded when they are needed, each once a call.
class Bf16Dense : public Dense {
 public:
  static int64_t Pairs(int64_t floats) { return (floats + 1) / 2; }
  static size_t PackedBytes(const DenseShape& s) {
    return static_cast<size_t>(s.out * Pairs(s.in) + Pairs(s.out) * s.in) * sizeof(float);
  }

  Bf16Dense(const CpuKernels& kernels, const DenseShape& shape, int64_t most_rows,
            std::unique_ptr<Memory> packed)
      : k_(*kernels.fp32),
        b_(*kernels.bf16),
        s_(shape),
        most_rows_(most_rows),
        memory_(std::move(packed)),
        by_in_(memory_->floats()),
        by_out_(by_in_ + s_.out * Pairs(s_.in)) {}

  size_t scratch_bytes() const override {
    // BackwardWeight: two pointers a leaf, and its x and dy in pairs.
    const int64_t leaf = static_cast<int64_t>(2 * sizeof(float*) / sizeof(float)) +
                         Pairs(most_rows_) * (s_.in + s_.out);
    const int64_t floats = std::max(s_.out * kDenseScratchColumns, s_.most_leaves * leaf);
    return static_cast<size_t>(floats) * sizeof(float) + alignof(const float*);
  }

  void Pack(Stream&, const float* weight, const uint16_t*) override {
    b_.pair_columns(s_.out, s_.in, weight, by_in_);
    b_.pair_rows(s_.out, s_.in, weight, by_out_);
  }

  void Forward(Stream&, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) override {
    b_.dense_forward(rows, s_.in, s_.out, x, by_in_, s_.bias ? bias : nullptr,
                     s_.activation == Activation::kRelu, y, static_cast<float*>(scratch));
  }

  void BackwardInput(Stream&, int64_t rows, const float* dy, float* dx, void* scratch) override {
    float* const pairs = static_cast<float*>(scratch);
    for (int64_t row = 0; row < rows; row += kDenseScratchColumns) {
      const int64_t count = std::min(kDenseScratchColumns, rows - row);
      b_.pair_columns(count, s_.out, dy + row * s_.out, pairs);
      b_.gemm({.rows = count,
               .columns = s_.in,
               .depth = Pairs(s_.out),
               .a_row = Pairs(s_.out),
               .b_depth = s_.in,
               .c_row = s_.in},
              pairs, by_out_, nullptr, dx + row * s_.in);
    }
  }

  void BackwardWeight(Stream&, Stream&, const LeafFold& fold, const int64_t* rows,
                      const float* const* x, const float* const* dy, float* const* dw,
                      float* const* db, void* scratch) override {
    if (s_.bias) BackwardBias(k_, s_.out, fold, rows, dy, db, static_cast<float*>(scratch));
    const uintptr_t mask = alignof(const float*) - 1;
    const float** const x_pairs =
        reinterpret_cast<const float**>((reinterpret_cast<uintptr_t>(scratch) + mask) & ~mask);
    const float** const dy_pairs = x_pairs + fold.leaves;
    float* next = reinterpret_cast<float*>(dy_pairs + fold.leaves);
    const auto paired = [&](int64_t count, int64_t columns, const float* from) {
      float* const to = std::exchange(next, next + Pairs(count) * columns);
      b_.pair_rows(count, columns, from, to);
      return to;
    };
    for (int leaf = 0; leaf < fold.leaves; ++leaf) {
      x_pairs[leaf] = paired(rows[leaf], s_.in, x[leaf]);
      dy_pairs[leaf] = paired(rows[leaf], s_.out, dy[leaf]);
    }
    b_.dense_weight_gradient(fold, s_.in, s_.out, rows, x_pairs, dy_pairs, dw);
  }

 private:
  const Kernels& k_;
  const Bf16Kernels& b_;
  const DenseShape s_;
  const int64_t most_rows_;
  const std::unique_ptr<Memory> memory_;
  float *const by_in_, *const by_out_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dense>> MakeGemmDense(const CpuKernels& kernels,
                                                     const DenseShape& shape,
                                                     absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1) {
    return absl::InvalidArgumentError(absl::StrCat("dense of ", shape.in, " inputs and ", shape.out,
                                                   " outputs; both must be positive"));
  }
  int64_t most_rows = 0;
  for (int64_t count : rows) {
    most_rows = std::max(most_rows, count);
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("dense was asked for ", count, " rows; at least 1 is accepted"));
    }
  }
  if (shape.precision == Precision::kFp32) {
    return std::make_unique<GemmDense>(*kernels.fp32, shape);
  }
  std::unique_ptr<Memory> packed = AllocateHostMemory(Bf16Dense::PackedBytes(shape));
  if (packed == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "no memory for ", Bf16Dense::PackedBytes(shape), " bytes of packed weights on the CPU"));
  }
  return std::make_unique<Bf16Dense>(kernels, shape, most_rows, std::move(packed));
}

}  // namespace lockstep::device
