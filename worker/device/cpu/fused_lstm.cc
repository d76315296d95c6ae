#include "worker/device/cpu/fused_lstm.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/device/cpu/host_memory.h"

namespace lockstep::device {
namespace {

int64_t PanelColumns(int64_t columns) {
  return (columns + kGemmPanel - 1) / kGemmPanel * kGemmPanel;
}
// Every packed matrix begins on a cache line.
int64_t AlignUp(int64_t floats) { return (floats + 15) / 16 * 16; }

// Inside, time is the outer axis: a step's rows lie together, and so do all steps of the operands
// of the weight gradients. Of the reserve, each direction has gates {steps, rows, 4 hidden}, then
// c, tanh(c) and h {steps, rows, hidden}.
class FusedLstm : public Lstm {
 public:
  // Packed weights and biases of one direction.
  struct Packed {
    float *input, *input_plain, *forward, *backward, *bias;
  };

  static int64_t PackedFloats(const LstmShape& s) {
    const int64_t gates = 4 * s.hidden;
    return 2 * LstmStepShape::PackedSize(s.hidden) + PanelColumns(gates) * s.in +
           AlignUp(gates * s.in) + AlignUp(gates);
  }

  FusedLstm(const Kernels& kernels, const LstmShape& shape, int64_t most_rows,
            std::unique_ptr<Memory> memory)
      : k_(kernels), s_(shape), most_rows_(most_rows), memory_(std::move(memory)) {
    float* at = memory_->floats();
    const auto take = [&at](int64_t floats) { return std::exchange(at, at + AlignUp(floats)); };
    const int64_t recurrent = LstmStepShape::PackedSize(s_.hidden);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      Packed packed;
      packed.forward = take(recurrent);
      packed.backward = take(recurrent);
      packed.input = take(PanelColumns(gates()) * s_.in);
      packed.input_plain = take(gates() * s_.in);
      packed.bias = take(gates());
      packed_.push_back(packed);
    }
  }

  // x by steps, or dx by steps; and the gradient of c.
  size_t scratch_bytes() const override {
    return static_cast<size_t>(most_rows_ * (s_.steps * s_.in + s_.hidden)) * sizeof(float);
  }

  void Pack(Stream&, absl::Span<const LstmTensors<const float>> tensors) override {
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const LstmTensors<const float>& t = tensors[d];
      const Packed& p = packed_[d];
      k_.lstm_pack(s_.hidden, t.weight_hh, p.forward, p.backward);
      k_.pack_transposed(gates(), s_.in, t.weight_ih, p.input);
      std::memcpy(p.input_plain, t.weight_ih, static_cast<size_t>(gates() * s_.in) * sizeof(float));
      if (s_.bias) k_.add(gates(), t.bias_ih, t.bias_hh, p.bias);
    }
  }

  void Forward(Stream&, int64_t rows, const float* x, float* y, float* reserve,
               void* scratch) override {
    float* const x_by_steps = static_cast<float*>(scratch);
    ToSteps(rows, s_.in, x, x_by_steps);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Packed& p = packed_[d];
      const Reserve r = ReserveOf(rows, d, reserve);
      k_.gemm({.rows = s_.steps * rows,
               .columns = gates(),
               .depth = s_.in,
               .a_row = s_.in,
               .b_panel = s_.in * kGemmPanel,
               .b_depth = kGemmPanel,
               .c_row = gates()},
              x_by_steps, p.input, s_.bias ? p.bias : nullptr, r.gates);
      const LstmStepShape step = {rows, s_.hidden, 0};
      const int64_t size = rows * s_.hidden;
      for (int64_t k = 0; k < s_.steps; ++k) {
        const int64_t t = Time(d, k), before = Time(d, k - 1);
        k_.lstm_forward_step(step, p.forward, k == 0 ? nullptr : r.h + before * size,
                             k == 0 ? nullptr : r.c + before * size, r.gates + 4 * t * size,
                             r.c + t * size, r.tanh_c + t * size, r.h + t * size);
        if (s_.sequence) {
          CopyRows(rows, s_.hidden, r.h + t * size, s_.hidden, y + t * s_.out() + d * s_.hidden,
                   s_.steps * s_.out());
        }
      }
      if (!s_.sequence) {
        CopyRows(rows, s_.hidden, r.h + Time(d, s_.steps - 1) * size, s_.hidden, y + d * s_.hidden,
                 s_.out());
      }
    }
  }

  void Backward(Stream&, int64_t rows, const float* x, const float* dy, float* reserve,
                absl::Span<const LstmTensors<float>> gradients, float* dx, void* scratch) override {
    float* const by_steps = static_cast<float*>(scratch);
    float* const dc = by_steps + rows * s_.steps * s_.in;
    const int64_t size = rows * s_.hidden;
    ToSteps(rows, s_.in, x, by_steps);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Reserve r = ReserveOf(rows, d, reserve);
      const LstmStepShape step = {rows, s_.hidden, s_.outputs()};
      for (int64_t k = s_.steps - 1; k >= 0; --k) {
        const int64_t t = Time(d, k), before = Time(d, k - 1), after = Time(d, k + 1);
        const bool last = k == s_.steps - 1;
        const float* dh = nullptr;
        if (s_.sequence) {
          dh = dy + t * s_.out() + d * s_.hidden;
        } else if (last) {
          dh = dy + d * s_.hidden;
        }
        k_.lstm_backward_step(step, packed_[d].backward,
                              last ? nullptr : r.gates + 4 * after * size, dh,
                              k == 0 ? nullptr : r.c + before * size, r.tanh_c + t * size,
                              r.gates + 4 * t * size, dc);
      }
      BackwardWeight(rows, d, by_steps, r, gradients[d]);
    }
    if (dx == nullptr) return;
    // The directions' contributions, one after the other.
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Reserve r = ReserveOf(rows, d, reserve);
      k_.gemm({.rows = s_.steps * rows,
               .columns = s_.in,
               .depth = gates(),
               .a_row = gates(),
               .b_depth = s_.in,
               .c_row = s_.in},
              r.gates, packed_[d].input_plain, nullptr, by_steps);
      FromSteps(rows, s_.in, by_steps, dx, /*add=*/d > 0);
    }
  }

 private:
  struct Reserve {
    float *gates, *c, *tanh_c, *h;
  };

  int64_t gates() const { return 4 * s_.hidden; }
  // The time of a direction's step k.
  int64_t Time(int64_t d, int64_t k) const { return d == 0 ? k : s_.steps - 1 - k; }

  Reserve ReserveOf(int64_t rows, int64_t d, float* reserve) const {
    const int64_t size = s_.steps * rows * s_.hidden;
    float* const at = reserve + d * 7 * size;
    return {at, at + 4 * size, at + 5 * size, at + 6 * size};
  }

  static void CopyRows(int64_t rows, int64_t columns, const float* from, int64_t from_row,
                       float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * to_row, from + r * from_row,
                  static_cast<size_t>(columns) * sizeof(float));
    }
  }
  // {rows, steps, columns} -> {steps, rows, columns}, and back.
  void ToSteps(int64_t rows, int64_t columns, const float* from, float* to) const {
    for (int64_t t = 0; t < s_.steps; ++t) {
      CopyRows(rows, columns, from + t * columns, s_.steps * columns, to + t * rows * columns,
               columns);
    }
  }
  void FromSteps(int64_t rows, int64_t columns, const float* from, float* to, bool add) const {
    for (int64_t t = 0; t < s_.steps; ++t) {
      const float* const step = from + t * rows * columns;
      float* const out = to + t * columns;
      if (!add) {
        CopyRows(rows, columns, step, columns, out, s_.steps * columns);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = out + r * s_.steps * columns;
        k_.add(columns, row, step + r * columns, row);
      }
    }
  }

  void BackwardWeight(int64_t rows, int64_t d, const float* x_by_steps, const Reserve& r,
                      const LstmTensors<float>& gradient) const {
    const int64_t size = rows * s_.hidden;
    GemmShape product = {.rows = gates(),
                         .columns = s_.in,
                         .depth = s_.steps * rows,
                         .a_row = 1,
                         .a_depth = gates(),
                         .b_depth = s_.in,
                         .c_row = s_.in};
    k_.gemm(product, r.gates, x_by_steps, nullptr, gradient.weight_ih);
    // Each step's gates against h of the step before it, which lies a step before or behind in
    // time.
    product.columns = product.b_depth = product.c_row = s_.hidden;
    product.depth = (s_.steps - 1) * rows;
    k_.gemm(product, d == 0 ? r.gates + 4 * size : r.gates, d == 0 ? r.h : r.h + size, nullptr,
            gradient.weight_hh);
    if (!s_.bias) return;
    k_.column_sums(s_.steps * rows, gates(), r.gates, gradient.bias_ih);
    std::memcpy(gradient.bias_hh, gradient.bias_ih, static_cast<size_t>(gates()) * sizeof(float));
  }

  const Kernels& k_;
  const LstmShape s_;
  const int64_t most_rows_;
  const std::unique_ptr<Memory> memory_;
  std::vector<Packed> packed_;  // by direction
};

}  // namespace

absl::StatusOr<std::unique_ptr<Lstm>> MakeFusedLstm(const Kernels& kernels, const LstmShape& shape,
                                                    absl::Span<const int64_t> rows) {
  if (shape.steps < 1 || shape.in < 1 || shape.hidden < 1) {
    return absl::InvalidArgumentError(absl::StrCat("lstm of ", shape.steps, " steps, ", shape.in,
                                                   " inputs and ", shape.hidden,
                                                   " hidden units; all must be positive"));
  }
  int64_t most_rows = 0;
  for (int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("lstm was asked for ", count, " rows; at least 1 is accepted"));
    }
    most_rows = std::max(most_rows, count);
  }
  const size_t bytes =
      static_cast<size_t>(shape.directions() * FusedLstm::PackedFloats(shape)) * sizeof(float);
  std::unique_ptr<Memory> memory = AllocateHostMemory(bytes);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", bytes, " bytes of packed weights on the CPU"));
  }
  return std::make_unique<FusedLstm>(kernels, shape, most_rows, std::move(memory));
}

}  // namespace lockstep::device
