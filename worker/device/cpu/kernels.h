// The hand-written CPU kernels as a table of functions, one table per instruction set. The sources
// in worker/device/cpu/kernels are built twice, with AVX2 and with AVX-512; everything they define
// lives in the namespace of the instruction set and nothing of theirs is linked elsewhere.
//
// Contracts of the kernels are those of the functions of the same name in worker/device/device.h.
// Thread-safe: pure functions.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device {

// c {rows, columns} = a {rows, depth} b {depth, columns} + bias {columns} (null: none). Element (i,
// k) of a is a[i * a_row + k * a_depth]; columns of b lie in panels of kGemmPanel: element (k, j)
// is b[j / kGemmPanel * b_panel + k * b_depth + j % kGemmPanel]. A plain matrix is b_panel =
// kGemmPanel.
constexpr int64_t kGemmPanel = 64;
constexpr int64_t kDenseScratchColumns = 64;
struct GemmShape {
  int64_t rows = 0, columns = 0, depth = 0;
  int64_t a_row = 0, a_depth = 1;
  int64_t b_panel = kGemmPanel, b_depth = 0;
  int64_t c_row = 0;
};

// One step of one direction of an LSTM, all arrays {rows, hidden} but gates {rows, 4 hidden}.
// Weights are packed for units in blocks of kLstmUnits, with zeros beyond the last.
constexpr int64_t kLstmUnits = 16;
struct LstmStepShape {
  int64_t rows = 0, hidden = 0;
  int64_t dh_row = 0;  // elements from a row of dh to the next
  // Floats of each packing of weight_hh; more than pairs need.
  static constexpr int64_t PackedSize(int64_t hidden) {
    return 4 * hidden * ((hidden + kGemmPanel - 1) / kGemmPanel * kGemmPanel);
  }
};

struct Kernels {
  // An element's bits depend on its row of a and its column of b only.
  void (*gemm)(const GemmShape& shape, const float* a, const float* b, const float* bias, float* c);
  // y {rows, out} = x {rows, in} w {out, in}^T + bias (null: none), then relu. An element's bits
  // depend on its rows of x and w only. `scratch`: out * kDenseScratchColumns floats.
  void (*dense_forward)(int64_t rows, int64_t in, int64_t out, const float* x, const float* w,
                        const float* bias, bool relu, float* y, float* scratch);
  // dw[part] {out, in}: dy[leaf]^T x[leaf] of leaves of rows[leaf] rows, folded.
  void (*dense_weight_gradient)(const LeafFold& fold, int64_t in, int64_t out, const int64_t* rows,
                                const float* const* x, const float* const* dy, float* const* dw);
  // w {rows, columns} as the b of a gemm with w's rows for columns: b_panel = columns * kGemmPanel,
  // b_depth = kGemmPanel. `packed` has whole panels; what lies beyond the rows is not written.
  void (*pack_transposed)(int64_t rows, int64_t columns, const float* w, float* packed);

  // weight_hh {4 hidden, hidden} packed for a step forward (blocks of units, in each by depth the
  // four gates of its units; depth is hidden) and backward (panels of kGemmPanel columns; depth is
  // 4 hidden). PackedSize floats each; what lies beyond the units is not written and must be zero.
  void (*lstm_pack_forward)(int64_t hidden, int64_t depth, const float* weight, float* packed);
  void (*lstm_pack_backward)(int64_t hidden, int64_t depth, const float* weight, float* packed);
  // gates: from W_ih x + b to activations; then c, tanh(c) and h. An element's bits depend on its
  // own row only. Null h_before and c_before: zero.
  void (*lstm_forward_step)(const LstmStepShape& shape, const float* weight, const float* h_before,
                            const float* c_before, float* gates, float* c, float* tanh_c, float* h);
  // gates: from activations to gradients of the pre-activations; dc: from the gradient of c through
  // the step behind to that of c_before. The gradient of h is dh (null: zero) and dgates_after
  // weight_hh; null dgates_after: the last step, dc counts as zero. Null c_before: zero.
  void (*lstm_backward_step)(const LstmStepShape& shape, const float* weight,
                             const float* dgates_after, const float* dh, const float* c_before,
                             const float* tanh_c, float* gates, float* dc);

  void (*relu_forward)(int64_t n, const float* x, float* y);
  void (*relu_backward)(int64_t n, const float* y, const float* dy, float* dx);
  void (*tanh_forward)(int64_t n, const float* x, float* y);
  void (*tanh_backward)(int64_t n, const float* y, const float* dy, float* dx);
  void (*sigmoid_forward)(int64_t n, const float* x, float* y);
  void (*sigmoid_backward)(int64_t n, const float* y, const float* dy, float* dx);
  void (*add)(int64_t n, const float* a, const float* b, float* out);
  void (*dropout)(int64_t n, const float* x, float rate, PhiloxKey key, uint64_t step,
                  uint64_t first, float* y);

  void (*max_pool_forward)(const PoolShape& shape, int64_t rows, const float* x, float* y,
                           uint8_t* argmax);
  void (*max_pool_backward)(const PoolShape& shape, int64_t rows, const float* dy,
                            const uint8_t* argmax, float* dx);
  void (*average_pool_forward)(const PoolShape& shape, int64_t rows, const float* x, float* y);
  void (*average_pool_backward)(const PoolShape& shape, int64_t rows, const float* dy, float* dx);
  void (*global_average_pool_forward)(int64_t rows, int64_t spatial, int64_t channels,
                                      const float* x, float* y);
  void (*global_average_pool_backward)(int64_t rows, int64_t spatial, int64_t channels,
                                       const float* dy, float* dx);

  void (*batch_norm_moments)(int64_t channels, int64_t n, const float* x, float* mean, float* m2);
  void (*merge_moments)(int64_t channels, int64_t count_a, const float* mean_a, const float* m2_a,
                        int64_t count_b, const float* mean_b, const float* m2_b, float* mean,
                        float* m2);
  // variance = spread / divisor: (m2, count), or (running variance, 1).
  void (*batch_norm_forward)(const BatchNormShape& shape, int64_t n, const float* x,
                             const float* mean, const float* spread, float divisor, float epsilon,
                             const float* weight, const float* bias, float* y);
  void (*batch_norm_backward_sums)(const BatchNormShape& shape, int64_t n, const float* x,
                                   const float* y, const float* dy, const float* mean,
                                   const float* m2, int64_t moments_n, float epsilon, float* sum_dy,
                                   float* sum_dy_xhat);
  void (*batch_norm_backward)(const BatchNormShape& shape, int64_t n, const float* x,
                              const float* y, const float* dy, const float* mean, const float* m2,
                              int64_t moments_n, float epsilon, const float* weight,
                              const float* sum_dy, const float* sum_dy_xhat, float* dx);
  void (*update_running_averages)(int64_t channels, int64_t n, const float* mean, const float* m2,
                                  float momentum, float* running_mean, float* running_var);
  // sums[c] = sum over rows of x {rows, columns}.
  void (*column_sums)(int64_t rows, int64_t columns, const float* x, float* sums);
  // `spread` and `divisor` as in batch_norm_forward.
  void (*batch_norm_add_forward)(const BatchNormShape& shape, int64_t n, const float* x,
                                 const float* mean, const float* spread, float divisor,
                                 float epsilon, const float* weight, const float* bias,
                                 const float* residual, float* y);
  void (*batch_norm_gradient)(const BatchNormShape& shape, int64_t n, const float* x,
                              const float* y, const float* dy, const float* more, const float* mean,
                              const float* m2, int64_t moments_n, float epsilon, float* g,
                              float* sum_dy, float* sum_dy_xhat);
  void (*copy_strided)(const StridedCopy& copy, int64_t rows, const float* x, float* y);

  void (*softmax_cross_entropy)(int64_t rows, int64_t classes, const float* logits,
                                const int32_t* labels, float scale, double* loss_sum,
                                int64_t* correct, float* dlogits);
  void (*mean_squared_error)(int64_t rows, int64_t features, const float* y, const float* target,
                             float scale, double* loss_sum, float* dy);
  void (*count_correct)(int64_t rows, int64_t classes, const float* scores, const int32_t* labels,
                        int64_t* correct);

  void (*leaky_relu_forward)(int64_t n, float slope, const float* x, float* y);
  void (*leaky_relu_backward)(int64_t n, float slope, const float* y, const float* dy, float* dx);
  void (*elu_forward)(int64_t n, float alpha, const float* x, float* y);
  void (*elu_backward)(int64_t n, float alpha, const float* y, const float* dy, float* dx);
  void (*softplus_forward)(int64_t n, const float* x, float* y);
  void (*softplus_backward)(int64_t n, const float* x, const float* dy, float* dx);
  void (*multiply)(int64_t n, const float* a, const float* b, float* out);
  void (*softmax_forward)(int64_t n, int64_t features, const float* x, float* y);
  void (*softmax_backward)(int64_t n, int64_t features, const float* y, const float* dy, float* dx);
  void (*layer_norm_forward)(int64_t n, int64_t features, const float* x, float epsilon,
                             const float* weight, const float* bias, float* y, float* stats);
  void (*layer_norm_backward)(int64_t n, int64_t features, const float* x, const float* stats,
                              const float* weight, const float* dy, float* dx);
  void (*layer_norm_backward_weight)(int64_t n, int64_t features, const float* x,
                                     const float* stats, const float* dy, float* dweight,
                                     float* dbias);
  void (*embedding_forward)(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                            const float* weight, float* y);
  void (*embedding_backward)(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                             const float* dy, float* dweight);
  void (*smoothed_cross_entropy)(int64_t rows, int64_t classes, const float* logits,
                                 const int32_t* labels, float smoothing, float scale,
                                 double* loss_sum, int64_t* correct, float* dlogits);
  void (*sigmoid_cross_entropy)(int64_t rows, int64_t features, const float* x, const float* target,
                                float scale, double* loss_sum, float* dx);

  void (*optimizer_update)(const OptimizerCoefficients& coefficients, int64_t n,
                           const StepScalars& scalars, const float* gradient, float* parameters,
                           const OptimizerSlots& slots);
  void (*squared_norms)(int64_t n, const float* x, double* sums);
  bool (*has_non_finite)(int64_t n, const float* x);
  // *lo and *hi are the digest's words; 128-bit addition.
  void (*accumulate_digest)(int64_t n, const float* x, uint64_t tensor_key, uint64_t first_index,
                            uint64_t* lo, uint64_t* hi);
  // One sample of GatherSamples.
  void (*gather_sample)(const SampleShape& shape, SampleType type, const void* sample,
                        const SampleChange& change, const float* mean, const float* inv_std,
                        float* out);
};

// The kernels whose products are of bf16. A pair is 32 bits, stored as a float is: two bf16 that
// are neighbours in depth, the first in the low half. Rounding is to nearest even; what is denormal
// counts as zero. Every set of instructions gives the same bits.
struct Bf16Kernels {
  // x {rows, columns} -> {rows, ceil(columns / 2)} pairs of neighbours in a row, the last with zero
  // where columns is odd.
  void (*pair_columns)(int64_t rows, int64_t columns, const float* x, float* pairs);
  // x {rows, columns} -> {ceil(rows / 2), columns} pairs of neighbours in a column, the last with
  // zero where rows is odd.
  void (*pair_rows)(int64_t rows, int64_t columns, const float* x, float* pairs);
  void (*round)(int64_t n, const float* x, uint16_t* bf16);
  void (*round_in_floats)(int64_t n, const float* x, float* rounded);

  // As those of Kernels: a and b, the weights of dense and LSTM, x and dy of the weight gradient, h
  // and dgates_after are pairs, and depths count pairs. Of `dense_forward`, x is floats, and its
  // weights are in pairs of columns; of the weight gradient x and dy are in pairs of rows.
  void (*gemm)(const GemmShape& shape, const float* a, const float* b, const float* bias, float* c);
  void (*dense_forward)(int64_t rows, int64_t in, int64_t out, const float* x, const float* w,
                        const float* bias, bool relu, float* y, float* scratch);
  void (*dense_weight_gradient)(const LeafFold& fold, int64_t in, int64_t out, const int64_t* rows,
                                const float* const* x, const float* const* dy, float* const* dw);
  void (*lstm_forward_step)(const LstmStepShape& shape, const float* weight, const float* h_before,
                            const float* c_before, float* gates, float* c, float* tanh_c, float* h);
  void (*lstm_backward_step)(const LstmStepShape& shape, const float* weight,
                             const float* dgates_after, const float* dh, const float* c_before,
                             const float* tanh_c, float* gates, float* dc);
};

namespace avx2 {
extern const Kernels kKernels;
extern const Bf16Kernels kBf16Kernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kKernels;
extern const Bf16Kernels kBf16Kernels;
}  // namespace avx512
namespace avx512bf16 {
extern const Bf16Kernels kBf16Kernels;
}

// What a device of one instruction set computes with.
struct CpuKernels {
  const Kernels* fp32 = nullptr;
  const Bf16Kernels* bf16 = nullptr;
};

}  // namespace lockstep::device
