#include "worker/device/cuda/cuda_lstm.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/cuda_stream.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/parts.h"

namespace lockstep::device::cuda {
namespace {

// Samples stay samples: nothing is transposed. Of the reserve, each direction has gates {rows,
// steps, 4 hidden}, then c, tanh(c) and `h_before` {rows, steps, hidden}, which holds at a step
// what its recurrent product multiplies, h of the step before it or zero: so the gradients of both
// weights are products over all samples and steps. In bf16 factors are rounded where a kernel or
// another pass over them writes them; everything else is the same.
//
// Rows of all leaves are taken together: only weights have gradients for each leaf, and a leaf's
// samples lie together. Where the units are few, one kernel walks through all steps, and h_before
// is written as the products of the weights' gradients take it; in tf32 its products are fp32's.
// Else a step is a product and the cells behind it.
class CudaLstm : public Lstm {
 public:
  static absl::StatusOr<std::unique_ptr<Lstm>> Make(Device& device, Blas& blas,
                                                    const LstmShape& shape,
                                                    absl::Span<const int64_t> rows) {
    auto lstm = std::make_unique<CudaLstm>(shape, *std::max_element(rows.begin(), rows.end()));
    RETURN_IF_ERROR(lstm->ChooseWay());
    ASSIGN_OR_RETURN(lstm->memory_, device.Allocate(lstm->Place(nullptr)));
    lstm->Place(lstm->memory_->data());
    RETURN_IF_ERROR(lstm->MakeProducts(blas, rows));
    return lstm;
  }

  CudaLstm(const LstmShape& shape, int64_t most_listed) : s_(WithMostRows(shape, most_listed)) {}

  const LstmShape& shape() const override { return s_; }
  bool serves_any_rows() const override { return true; }

  size_t scratch_bytes() const override {
    return std::max(ForwardScratch(*this, s_.most_rows, nullptr).bytes,
                    BackwardScratch(*this, s_.most_rows, nullptr).bytes);
  }

  void Pack(Stream& stream, absl::Span<const LstmTensors<const float>> tensors,
            absl::Span<const LstmTensors<const uint16_t>> rounded) override {
    for (size_t d = 0; d < packed_.size(); ++d) {
      const LstmTensors<const float>& t = tensors[d];
      Packed& p = packed_[d];
      if (is_bf16()) {
        p.weight_ih = rounded[d].weight_ih;
        p.weight_hh = rounded[d].weight_hh;
      } else {
        p.weight_ih = t.weight_ih;
        p.weight_hh = t.weight_hh;
      }
      if (s_.bias) Add(QueueOf(stream), gates(), t.bias_ih, t.bias_hh, p.bias);
    }
  }

  void Forward(Stream& stream, int64_t rows, const float* x, float* y, float* reserve,
               void* scratch) override {
    const Queue& q = QueueOf(stream);
    if (!Accepts(q, rows)) return;
    const ForwardScratch use(*this, rows, scratch);
    const void* const inputs = Factor(q, rows * s_.steps * s_.in, x, use.x16);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Packed& p = packed_[static_cast<size_t>(d)];
      const Reserve r(s_, rows, d, reserve);
      Run(q, input_, rows * s_.steps, inputs, p.weight_ih, p.bias, r.gates, use.workspace);
      if (walks_) {
        LstmWalk walk = WalkOf(d, rows, r);
        walk.y = y + OutputOf(d, 0);
        LstmForwardWalk(q, walk, multiprocessors_);
      } else {
        ForwardSteps(q, d, rows, r, use, y);
      }
    }
  }

  void Backward(Stream& stream, int64_t rows, const float* x, const float* dy, float* reserve,
                absl::Span<const LstmTensors<float>> gradients, float* dx, void* scratch) override {
    BackwardLeaves(stream, Leaves(rows), x, dy, reserve, gradients, 0, dx, scratch);
  }

  void BackwardLeaves(Stream& stream, const Leaves& leaves, const float* x, const float* dy,
                      float* reserve, absl::Span<const LstmTensors<float>> gradients,
                      int64_t stride, float* dx, void* scratch) override {
    const Queue& q = QueueOf(stream);
    const int64_t rows = leaves.total();
    if (!Accepts(q, rows) || !AcceptsLeaves(q, leaves)) return;
    const BackwardScratch use(*this, rows, scratch);
    const int64_t samples = rows * s_.steps;
    const void* const inputs = Factor(q, samples * s_.in, x, use.x16);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Packed& p = packed_[static_cast<size_t>(d)];
      const Reserve r(s_, rows, d, reserve);
      if (walks_) {
        LstmWalk walk = WalkOf(d, rows, r);
        walk.dy = dy + OutputOf(d, 0);
        walk.gates16 = use.gates16;
        LstmBackwardWalk(q, walk, multiprocessors_);
      } else {
        BackwardSteps(q, d, rows, r, use, dy);
      }
      const void* const dgates = FactorsOfGates(r, use);
      const LstmTensors<float>& gradient = gradients[static_cast<size_t>(d)];
      WeightGradients(q, leaves, &WeightProducts::input, dgates, inputs, s_.in, use,
                      gradient.weight_ih, stride);
      const void* const states =
          walks_ ? r.h_before : Factor(q, samples * s_.hidden, r.h_before, use.h16);
      WeightGradients(q, leaves, &WeightProducts::recurrent, dgates, states, s_.hidden, use,
                      gradient.weight_hh, stride);
      if (s_.bias) {
        ColumnSums(q, SamplesOf(leaves), gates(), r.gates, gradient.bias_ih, stride);
        const StridedCopy same = {.size = {1, 1, gates()},
                                  .from = {0, 0, 1},
                                  .from_row = stride,
                                  .to = {0, 0, 1},
                                  .to_row = stride};
        CopyStrided(q, same, leaves.count, gradient.bias_ih, gradient.bias_hh);
      }
      if (dx == nullptr) continue;
      Run(q, d == 0 ? input_gradient_ : input_gradient_more_, samples, dgates, p.weight_ih, nullptr,
          dx, use.workspace);
    }
  }

 private:
  // Of one direction: weights as factors, where they are, and the sum of the biases.
  struct Packed {
    const void *weight_ih = nullptr, *weight_hh = nullptr;
    float* bias = nullptr;
  };
  struct Reserve {
    Reserve(const LstmShape& s, int64_t rows, int64_t d, float* reserve) {
      const int64_t size = rows * s.steps * s.hidden;
      gates = reserve + d * 7 * size;
      c = gates + 4 * size;
      tanh_c = c + size;
      h_before = tanh_c + size;
    }
    float *gates, *c, *tanh_c, *h_before;
  };
  struct ForwardScratch {
    ForwardScratch(const CudaLstm& lstm, int64_t rows, void* scratch) {
      const LstmShape& s = lstm.s_;
      Parts parts(scratch);
      workspace = parts.Take(kProductWorkspaceBytes);
      if (lstm.is_bf16()) {
        x16 = parts.TakeBf16(rows * s.steps * s.in);
        if (!lstm.walks_) h16 = parts.TakeBf16(rows * s.hidden);
      }
      bytes = parts.taken();
    }
    void* workspace;
    uint16_t *x16 = nullptr, *h16 = nullptr;
    size_t bytes;
  };
  struct BackwardScratch {
    BackwardScratch(const CudaLstm& lstm, int64_t rows, void* scratch) {
      const LstmShape& s = lstm.s_;
      const int64_t samples = rows * s.steps;
      Parts parts(scratch);
      workspace = parts.Take(kProductWorkspaceBytes);
      if (!lstm.walks_) {
        dc = parts.TakeFloats(rows * s.hidden);
        dh_after = parts.TakeFloats(rows * s.hidden);
      }
      weight = parts.TakeFloats(lstm.gates() * std::max(s.in, s.hidden));
      if (lstm.is_bf16()) {
        x16 = parts.TakeBf16(samples * s.in);
        if (!lstm.walks_) h16 = parts.TakeBf16(samples * s.hidden);
        gates16 = parts.TakeBf16(samples * lstm.gates());
      }
      bytes = parts.taken();
    }
    void* workspace;
    float *dc = nullptr, *dh_after = nullptr, *weight;
    uint16_t *x16 = nullptr, *h16 = nullptr, *gates16 = nullptr;
    size_t bytes;
  };
  // A product whose rows are rows of the call.
  struct RowProduct {
    std::unique_ptr<Product> product;
    int64_t most = 0;              // rows of a call of the library
    int64_t a_row = 0, c_row = 0;  // elements from a row to the next
  };
  struct WeightProducts {
    std::unique_ptr<Product> input, recurrent;
  };

  absl::Status ChooseWay() {
    int device = 0, shared_bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error =
          cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device);
    }
    walks_ = WalksLstm(s_.hidden, shared_bytes);
    return ToStatus(error, "asking about the GPU");
  }

  static LstmShape WithMostRows(LstmShape shape, int64_t most_listed) {
    shape.most_rows = std::max(shape.most_rows, most_listed);
    return shape;
  }

  void ForwardSteps(const Queue& q, int64_t d, int64_t rows, const Reserve& r,
                    const ForwardScratch& use, float* y) const {
    const Packed& p = packed_[static_cast<size_t>(d)];
    const StridedCopy first = {.size = {1, 1, s_.hidden},
                               .from = {0, 0, 1},
                               .to_begin = Time(d, 0) * s_.hidden,
                               .to = {0, 0, 1},
                               .to_row = state_row()};
    CopyStrided(q, first, rows, zeros_, r.h_before);
    for (int64_t k = 0; k < s_.steps; ++k) {
      const int64_t t = Time(d, k), before = Time(d, k - 1), after = Time(d, k + 1);
      float* const gate = r.gates + t * gates();
      if (k > 0) {
        const float* const h = r.h_before + t * s_.hidden;
        Run(q, recurrent_, rows, is_bf16() ? static_cast<const void*>(use.h16) : h, p.weight_hh,
            nullptr, gate, use.workspace);
      }
      const bool last = k + 1 == s_.steps;
      LstmForwardStep(q, rows, s_.hidden, gate, gates_row(),
                      k == 0 ? nullptr : r.c + before * s_.hidden, r.c + t * s_.hidden,
                      r.tanh_c + t * s_.hidden, state_row(),
                      last ? y + OutputOf(d, t) : r.h_before + after * s_.hidden,
                      last ? s_.outputs() : state_row(), use.h16);
    }
    if (!s_.sequence || s_.steps == 1) return;
    // The other steps' outputs are what the steps behind them began with.
    const int64_t begin = d == 0 ? 0 : 1;  // in time
    const StridedCopy others = {.size = {1, s_.steps - 1, s_.hidden},
                                .from_begin = (1 - begin) * s_.hidden,
                                .from = {0, s_.hidden, 1},
                                .from_row = state_row(),
                                .to_begin = OutputOf(d, begin),
                                .to = {0, s_.out(), 1},
                                .to_row = s_.outputs()};
    CopyStrided(q, others, rows, r.h_before, y);
  }
  void BackwardSteps(const Queue& q, int64_t d, int64_t rows, const Reserve& r,
                     const BackwardScratch& use, const float* dy) const {
    const Packed& p = packed_[static_cast<size_t>(d)];
    const void* const dgates = FactorsOfGates(r, use);
    for (int64_t k = s_.steps - 1; k >= 0; --k) {
      const int64_t t = Time(d, k), before = Time(d, k - 1), after = Time(d, k + 1);
      const bool last = k + 1 == s_.steps;
      if (!last) {
        Run(q, recurrent_gradient_, rows, FactorAt(dgates, after * gates()), p.weight_hh, nullptr,
            use.dh_after, use.workspace);
      }
      LstmBackwardStep(q, rows, s_.hidden, r.gates + t * gates(), gates_row(),
                       k == 0 ? nullptr : r.c + before * s_.hidden, r.tanh_c + t * s_.hidden,
                       state_row(), s_.sequence || last ? dy + OutputOf(d, t) : nullptr,
                       s_.outputs(), last ? nullptr : use.dh_after, last, use.dc,
                       is_bf16() ? use.gates16 + t * gates() : nullptr);
    }
  }
  LstmWalk WalkOf(int64_t d, int64_t rows, const Reserve& r) const {
    LstmWalk walk;
    walk.rows = rows;
    walk.steps = static_cast<int>(s_.steps);
    walk.hidden = static_cast<int>(s_.hidden);
    walk.reversed = d == 1;
    walk.bf16 = is_bf16();
    walk.weight = packed_[static_cast<size_t>(d)].weight_hh;
    walk.gates = r.gates;
    walk.c = r.c;
    walk.tanh_c = r.tanh_c;
    walk.h_before = r.h_before;
    walk.sequence = s_.sequence;
    walk.output_row = s_.outputs();
    walk.output_step = s_.out();
    return walk;
  }
  // The gradients of the gates, as factors of products.
  const void* FactorsOfGates(const Reserve& r, const BackwardScratch& use) const {
    return is_bf16() ? static_cast<const void*>(use.gates16) : r.gates;
  }

  bool is_bf16() const { return s_.precision == Precision::kBf16; }
  int64_t gates() const { return 4 * s_.hidden; }
  // Elements from a sample to the next.
  int64_t gates_row() const { return s_.steps * gates(); }
  int64_t state_row() const { return s_.steps * s_.hidden; }
  // The time of a direction's step k.
  int64_t Time(int64_t d, int64_t k) const { return d == 0 ? k : s_.steps - 1 - k; }
  // Where a sample's y has a direction's h of a time.
  int64_t OutputOf(int64_t d, int64_t t) const {
    return (s_.sequence ? t * s_.out() : 0) + d * s_.hidden;
  }

  // Divides the memory of the sums and of zeros; returns its size.
  size_t Place(void* memory) {
    Parts parts(memory);
    packed_.resize(static_cast<size_t>(s_.directions()));
    for (Packed& p : packed_) {
      if (s_.bias) p.bias = parts.TakeFloats(gates());
    }
    zeros_ = parts.TakeFloats(s_.hidden);
    return parts.taken();
  }

  absl::Status MakeProducts(Blas& blas, absl::Span<const int64_t> rows) {
    const int64_t most = s_.most_rows, most_samples = most * s_.steps;
    ProductShape base;
    base.factors = FactorsOf(s_.precision);
    // A step of the reserve, or of what is like it, begins at a multiple of a state.
    base.alignment = std::gcd<int64_t>(16, s_.hidden * (is_bf16() ? 2 : 4));

    ProductShape shape = base;  // gates = x W_ih^T + b
    shape.transpose_b = true;
    shape.m = most_samples;
    shape.n = gates();
    shape.k = s_.in;
    shape.bias = s_.bias;
    RETURN_IF_ERROR(MakeRowProduct(blas, shape, input_));

    if (!walks_) {
      shape = base;  // gates += h W_hh^T
      shape.transpose_b = true;
      shape.m = most;
      shape.n = gates();
      shape.k = s_.hidden;
      shape.a_row = is_bf16() ? 0 : state_row();
      shape.c_row = gates_row();
      shape.accumulate = true;
      RETURN_IF_ERROR(MakeRowProduct(blas, shape, recurrent_));

      shape = base;  // dh = dgates W_hh
      shape.m = most;
      shape.n = s_.hidden;
      shape.k = gates();
      shape.a_row = gates_row();
      RETURN_IF_ERROR(MakeRowProduct(blas, shape, recurrent_gradient_));
    }

    shape = base;  // dx = dgates W_ih
    shape.m = most_samples;
    shape.n = s_.in;
    shape.k = gates();
    RETURN_IF_ERROR(MakeRowProduct(blas, shape, input_gradient_));
    if (s_.bidirectional) {
      shape.accumulate = true;
      RETURN_IF_ERROR(MakeRowProduct(blas, shape, input_gradient_more_));
    }

    for (const int64_t count : rows) {
      WeightProducts& weights = weight_gradients_[count];
      if (weights.input != nullptr) continue;
      shape = base;  // dW = dgates^T x, dgates^T h
      shape.transpose_a = true;
      shape.m = gates();
      shape.n = s_.in;
      shape.k = count * s_.steps;
      ASSIGN_OR_RETURN(weights.input, blas.MakeProduct(shape));
      shape.n = s_.hidden;
      ASSIGN_OR_RETURN(weights.recurrent, blas.MakeProduct(shape));
    }
    return absl::OkStatus();
  }

  // In calls of the library whose matrices have fewer than 2^31 elements.
  static absl::Status MakeRowProduct(Blas& blas, ProductShape shape, RowProduct& made) {
    if (shape.a_row == 0) shape.a_row = shape.k;
    if (shape.c_row == 0) shape.c_row = shape.n;
    const int64_t limit = std::numeric_limits<int32_t>::max() / std::max(shape.a_row, shape.c_row);
    shape.m = std::min(shape.m, std::max<int64_t>(1, limit));
    made.most = shape.m;
    made.a_row = shape.a_row;
    made.c_row = shape.c_row;
    ASSIGN_OR_RETURN(made.product, blas.MakeProduct(shape));
    return absl::OkStatus();
  }
  void Run(const Queue& q, const RowProduct& p, int64_t rows, const void* a, const void* b,
           const float* bias, float* c, void* workspace) const {
    for (int64_t row = 0; row < rows; row += p.most) {
      p.product->Run(q, std::min(p.most, rows - row), FactorAt(a, row * p.a_row), b, bias,
                     c + row * p.c_row, workspace);
    }
  }

  bool Accepts(const Queue& q, int64_t rows) const {
    if (rows <= s_.most_rows) return true;
    Fail(q,
         absl::StrCat("an lstm was called with ", rows, " rows; it was made for ", s_.most_rows));
    return false;
  }
  bool AcceptsLeaves(const Queue& q, const Leaves& leaves) const {
    for (int leaf = 0; leaf < leaves.count; ++leaf) {
      if (weight_gradients_.contains(RowsOf(leaves, leaf))) continue;
      Fail(q, absl::StrCat("an lstm was called with a leaf of ", RowsOf(leaves, leaf),
                           " rows, for which it was not made"));
      return false;
    }
    return true;
  }
  static int64_t RowsOf(const Leaves& leaves, int leaf) {
    return leaves.begin[leaf + 1] - leaves.begin[leaf];
  }
  Leaves SamplesOf(Leaves leaves) const {
    for (int i = 0; i <= leaves.count; ++i) leaves.begin[i] *= s_.steps;
    return leaves;
  }

  static void CopyFloats(const Queue& q, int64_t n, const float* from, float* to) {
    static_cast<void>(cudaMemcpyAsync(to, from, static_cast<size_t>(n) * sizeof(float),
                                      cudaMemcpyDeviceToDevice, q.stream));
  }
  // What a product reads of x: in fp32 x itself, in bf16 `rounded`, written here.
  const void* Factor(const Queue& q, int64_t n, const float* x, uint16_t* rounded) const {
    if (!is_bf16()) return x;
    RoundToBf16(q, n, x, rounded);
    return rounded;
  }
  // Element i of factors.
  const void* FactorAt(const void* factors, int64_t i) const {
    return static_cast<const std::byte*>(factors) + i * (is_bf16() ? 2 : 4);
  }
  // dW = dgates^T factor of each leaf: leaves of as many rows are one call of the library.
  // Gradients that do not lie as products want them go there by way of the scratch.
  void WeightGradients(const Queue& q, const Leaves& leaves,
                       std::unique_ptr<Product> WeightProducts::*which, const void* dgates,
                       const void* factor, int64_t columns, const BackwardScratch& use,
                       float* gradient, int64_t stride) const {
    const bool aligned = IsAligned16(gradient) && stride % 4 == 0;
    for (int first = 0, next; first < leaves.count; first = next) {
      const int64_t begin = leaves.begin[first] * s_.steps, rows = RowsOf(leaves, first);
      const int64_t samples = rows * s_.steps;
      next = first + 1;
      while (aligned && next < leaves.count && RowsOf(leaves, next) == rows) ++next;
      Product& product = *(weight_gradients_.at(rows).*which);
      const void* const a = FactorAt(dgates, begin * gates());
      const void* const b = FactorAt(factor, begin * columns);
      float* const to = gradient + first * stride;
      if (aligned) {
        product.RunBatch(q, next - first, a, samples * gates(), b, samples * columns, to, stride,
                         use.workspace);
      } else {
        product.Run(q, gates(), a, b, nullptr, use.weight, use.workspace);
        CopyFloats(q, gates() * columns, use.weight, to);
      }
    }
  }

  const LstmShape s_;  // with most_rows
  int multiprocessors_ = 0;
  bool walks_ = false;  // through all steps in one kernel
  std::unique_ptr<Memory> memory_;
  std::vector<Packed> packed_;    // by direction
  const float* zeros_ = nullptr;  // a state
  RowProduct input_, recurrent_, recurrent_gradient_, input_gradient_, input_gradient_more_;
  std::map<int64_t, WeightProducts> weight_gradients_;  // by rows
};

}  // namespace

absl::StatusOr<std::unique_ptr<Lstm>> MakeCudaLstm(Device& device, Blas& blas,
                                                   const LstmShape& shape,
                                                   absl::Span<const int64_t> rows) {
  if (shape.steps < 1 || shape.in < 1 || shape.hidden < 1) {
    return absl::InvalidArgumentError(absl::StrCat("lstm of ", shape.steps, " steps, ", shape.in,
                                                   " inputs and ", shape.hidden,
                                                   " hidden units; all must be positive"));
  }
  if (rows.empty()) return absl::InvalidArgumentError("lstm was asked for no number of rows");
  for (const int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("lstm was asked for ", count, " rows; at least 1 is accepted"));
    }
  }
  return CudaLstm::Make(device, blas, shape, rows);
}

}  // namespace lockstep::device::cuda
