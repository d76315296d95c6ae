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
// c, tanh(c) and h {steps, rows, hidden}. In bf16 a product's factors are rounded into pairs when
// they are needed, the recurrent ones step by step; everything else is the same.
class FusedLstm : public Lstm {
 public:
  // Packed weights and biases of one direction.
  struct Packed {
    float *input, *input_plain, *forward, *backward, *bias;
  };

  static bool IsBf16(const LstmShape& s) { return s.precision == Precision::kBf16; }
  // Elements of a product's depth.
  static int64_t Elements(const LstmShape& s, int64_t floats) {
    return IsBf16(s) ? (floats + 1) / 2 : floats;
  }

  static int64_t PackedFloats(const LstmShape& s) {
    const int64_t gates = 4 * s.hidden;
    return 2 * LstmStepShape::PackedSize(s.hidden) +
           AlignUp(PanelColumns(gates) * Elements(s, s.in)) + AlignUp(Elements(s, gates) * s.in) +
           AlignUp(gates);
  }
  // The weights in pairs, on their way into the packed layouts.
  static int64_t StagingFloats(const LstmShape& s) {
    return IsBf16(s) ? 4 * s.hidden * std::max(Elements(s, s.in), Elements(s, s.hidden)) : 0;
  }

  FusedLstm(const CpuKernels& kernels, const LstmShape& shape, int64_t most_rows,
            std::unique_ptr<Memory> memory)
      : k_(*kernels.fp32),
        b_(*kernels.bf16),
        s_(shape),
        gemm_(IsBf16(shape) ? b_.gemm : k_.gemm),
        forward_step_(IsBf16(shape) ? b_.lstm_forward_step : k_.lstm_forward_step),
        backward_step_(IsBf16(shape) ? b_.lstm_backward_step : k_.lstm_backward_step),
        most_rows_(most_rows),
        memory_(std::move(memory)) {
    float* at = memory_->floats();
    const auto take = [&at](int64_t floats) { return std::exchange(at, at + AlignUp(floats)); };
    const int64_t recurrent = LstmStepShape::PackedSize(s_.hidden);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      Packed packed;
      packed.forward = take(recurrent);
      packed.backward = take(recurrent);
      packed.input = take(PanelColumns(gates()) * Elements(s_.in));
      packed.input_plain = take(Elements(gates()) * s_.in);
      packed.bias = take(gates());
      packed_.push_back(packed);
    }
    staging_ = at;
  }

  const LstmShape& shape() const override { return s_; }

  // x by steps, or dx by steps; the gradient of c; and in bf16 a product's factors in pairs.
  size_t scratch_bytes() const override {
    const int64_t samples = most_rows_ * s_.steps;
    const int64_t forward = samples * Elements(s_.in) + most_rows_ * Elements(s_.hidden);
    const int64_t backward =
        Elements(samples) * (gates() + std::max(s_.in, s_.hidden)) + samples * Elements(gates());
    return static_cast<size_t>(samples * s_.in + most_rows_ * s_.hidden +
                               (IsBf16(s_) ? std::max(forward, backward) : 0)) *
           sizeof(float);
  }

  void Pack(Stream&, absl::Span<const LstmTensors<const float>> tensors,
            absl::Span<const LstmTensors<const uint16_t>>) override {
    const int64_t hidden = s_.hidden;
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const LstmTensors<const float>& t = tensors[d];
      const Packed& p = packed_[d];
      k_.lstm_pack_forward(hidden, Elements(hidden),
                           PairColumns(gates(), hidden, t.weight_hh, staging_), p.forward);
      k_.lstm_pack_backward(hidden, Elements(gates()),
                            PairRows(gates(), hidden, t.weight_hh, staging_), p.backward);
      k_.pack_transposed(gates(), Elements(s_.in),
                         PairColumns(gates(), s_.in, t.weight_ih, staging_), p.input);
      const float* const plain = PairRows(gates(), s_.in, t.weight_ih, p.input_plain);
      if (plain != p.input_plain) {
        std::memcpy(p.input_plain, plain, static_cast<size_t>(gates() * s_.in) * sizeof(float));
      }
      if (s_.bias) k_.add(gates(), t.bias_ih, t.bias_hh, p.bias);
    }
  }

  void Forward(Stream&, int64_t rows, const float* x, float* y, float* reserve,
               void* scratch) override {
    float* const x_by_steps = static_cast<float*>(scratch);
    float* const x_pairs = x_by_steps + rows * s_.steps * s_.in;
    float* const h_pairs = x_pairs + s_.steps * rows * Elements(s_.in);
    ToSteps(rows, s_.in, x, x_by_steps);
    const float* const factor = PairColumns(s_.steps * rows, s_.in, x_by_steps, x_pairs);
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Packed& p = packed_[d];
      const Reserve r = ReserveOf(rows, d, reserve);
      gemm_({.rows = s_.steps * rows,
             .columns = gates(),
             .depth = Elements(s_.in),
             .a_row = Elements(s_.in),
             .b_panel = Elements(s_.in) * kGemmPanel,
             .b_depth = kGemmPanel,
             .c_row = gates()},
            factor, p.input, s_.bias ? p.bias : nullptr, r.gates);
      const LstmStepShape step = {rows, s_.hidden, 0};
      const int64_t size = rows * s_.hidden;
      for (int64_t k = 0; k < s_.steps; ++k) {
        const int64_t t = Time(d, k), before = Time(d, k - 1);
        const float* const h_before =
            k == 0 ? nullptr : PairColumns(rows, s_.hidden, r.h + before * size, h_pairs);
        forward_step_(step, p.forward, h_before, k == 0 ? nullptr : r.c + before * size,
                      r.gates + 4 * t * size, r.c + t * size, r.tanh_c + t * size, r.h + t * size);
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
    float* const pairs = dc + size;
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
        const float* const dgates =
            last ? nullptr : PairColumns(rows, gates(), r.gates + 4 * after * size, pairs);
        backward_step_(step, packed_[d].backward, dgates, dh,
                       k == 0 ? nullptr : r.c + before * size, r.tanh_c + t * size,
                       r.gates + 4 * t * size, dc);
      }
      BackwardWeight(rows, d, by_steps, r, gradients[d], pairs);
    }
    if (dx == nullptr) return;
    // The directions' contributions, one after the other.
    for (int64_t d = 0; d < s_.directions(); ++d) {
      const Reserve r = ReserveOf(rows, d, reserve);
      gemm_({.rows = s_.steps * rows,
             .columns = s_.in,
             .depth = Elements(gates()),
             .a_row = Elements(gates()),
             .b_depth = s_.in,
             .c_row = s_.in},
            PairColumns(s_.steps * rows, gates(), r.gates, pairs), packed_[d].input_plain, nullptr,
            by_steps);
      FromSteps(rows, s_.in, by_steps, dx, /*add=*/d > 0);
    }
  }

 private:
  struct Reserve {
    float *gates, *c, *tanh_c, *h;
  };

  int64_t gates() const { return 4 * s_.hidden; }
  int64_t Elements(int64_t floats) const { return Elements(s_, floats); }

  // What a product reads of x {rows, columns}: in fp32 x itself, in bf16 `pairs`, written here.
  const float* PairColumns(int64_t rows, int64_t columns, const float* x, float* pairs) const {
    if (!IsBf16(s_)) return x;
    b_.pair_columns(rows, columns, x, pairs);
    return pairs;
  }
  const float* PairRows(int64_t rows, int64_t columns, const float* x, float* pairs) const {
    if (!IsBf16(s_)) return x;
    b_.pair_rows(rows, columns, x, pairs);
    return pairs;
  }
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
                      const LstmTensors<float>& gradient, float* pairs) const {
    const int64_t size = rows * s_.hidden, samples = s_.steps * rows;
    float* const right = pairs + Elements(samples) * gates();
    GemmShape product = {.rows = gates(),
                         .columns = s_.in,
                         .depth = Elements(samples),
                         .a_row = 1,
                         .a_depth = gates(),
                         .b_depth = s_.in,
                         .c_row = s_.in};
    gemm_(product, PairRows(samples, gates(), r.gates, pairs),
          PairRows(samples, s_.in, x_by_steps, right), nullptr, gradient.weight_ih);
    // Each step's gates against h of the step before it, which lies a step before or behind in
    // time.
    product.columns = product.b_depth = product.c_row = s_.hidden;
    product.depth = Elements(samples - rows);
    gemm_(product, PairRows(samples - rows, gates(), d == 0 ? r.gates + 4 * size : r.gates, pairs),
          PairRows(samples - rows, s_.hidden, d == 0 ? r.h : r.h + size, right), nullptr,
          gradient.weight_hh);
    if (!s_.bias) return;
    k_.column_sums(samples, gates(), r.gates, gradient.bias_ih);
    std::memcpy(gradient.bias_hh, gradient.bias_ih, static_cast<size_t>(gates()) * sizeof(float));
  }

  const Kernels& k_;
  const Bf16Kernels& b_;
  const LstmShape s_;
  // Of the precision.
  decltype(Kernels::gemm) const gemm_;
  decltype(Kernels::lstm_forward_step) const forward_step_;
  decltype(Kernels::lstm_backward_step) const backward_step_;
  const int64_t most_rows_;
  const std::unique_ptr<Memory> memory_;
  std::vector<Packed> packed_;  // by direction
  float* staging_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Lstm>> MakeFusedLstm(const CpuKernels& kernels,
                                                    const LstmShape& shape,
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
  const size_t bytes = static_cast<size_t>(shape.directions() * FusedLstm::PackedFloats(shape) +
                                           FusedLstm::StagingFloats(shape)) *
                       sizeof(float);
  std::unique_ptr<Memory> memory = AllocateHostMemory(bytes);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", bytes, " bytes of packed weights on the CPU"));
  }
  return std::make_unique<FusedLstm>(kernels, shape, most_rows, std::move(memory));
}

}  // namespace lockstep::device
