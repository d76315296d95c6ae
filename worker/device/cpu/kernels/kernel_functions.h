// Declarations of the kernels of one instruction set, from which its table is made.
// Internal to worker/device/cpu/kernels.
#pragma once

#include <cstdint>

#include "worker/device/cpu/kernels.h"

namespace lockstep::device::LOCKSTEP_ISA {

// gemm.cc
void Gemm(const GemmShape& shape, const float* a, const float* b, const float* bias, float* c);
void DenseForward(int64_t rows, int64_t in, int64_t out, const float* x, const float* w,
                  const float* bias, bool relu, float* y, float* scratch);
void DenseWeightGradient(const LeafFold& fold, int64_t in, int64_t out, const int64_t* rows,
                         const float* const* x, const float* const* dy, float* const* dw);
void PackTransposed(int64_t rows, int64_t columns, const float* w, float* packed);

// lstm.cc
void LstmPackForward(int64_t hidden, int64_t depth, const float* weight, float* packed);
void LstmPackBackward(int64_t hidden, int64_t depth, const float* weight, float* packed);
void LstmForwardStep(const LstmStepShape& shape, const float* weight, const float* h_before,
                     const float* c_before, float* gates, float* c, float* tanh_c, float* h);
void LstmBackwardStep(const LstmStepShape& shape, const float* weight, const float* dgates_after,
                      const float* dh, const float* c_before, const float* tanh_c, float* gates,
                      float* dc);

// elementwise.cc
void ReluForward(int64_t n, const float* x, float* y);
void ReluBackward(int64_t n, const float* y, const float* dy, float* dx);
void TanhForward(int64_t n, const float* x, float* y);
void TanhBackward(int64_t n, const float* y, const float* dy, float* dx);
void SigmoidForward(int64_t n, const float* x, float* y);
void SigmoidBackward(int64_t n, const float* y, const float* dy, float* dx);
void Add(int64_t n, const float* a, const float* b, float* out);
void Dropout(int64_t n, const float* x, float rate, PhiloxKey key, uint64_t step, uint64_t first,
             float* y);

// pool.cc
void MaxPoolForward(const PoolShape& shape, int64_t rows, const float* x, float* y,
                    uint8_t* argmax);
void MaxPoolBackward(const PoolShape& shape, int64_t rows, const float* dy, const uint8_t* argmax,
                     float* dx);
void AveragePoolForward(const PoolShape& shape, int64_t rows, const float* x, float* y);
void AveragePoolBackward(const PoolShape& shape, int64_t rows, const float* dy, float* dx);
void GlobalAveragePoolForward(int64_t rows, int64_t spatial, int64_t channels, const float* x,
                              float* y);
void GlobalAveragePoolBackward(int64_t rows, int64_t spatial, int64_t channels, const float* dy,
                               float* dx);

// norm.cc
void BatchNormMoments(int64_t channels, int64_t n, const float* x, float* mean, float* m2);
void MergeMoments(int64_t channels, int64_t count_a, const float* mean_a, const float* m2_a,
                  int64_t count_b, const float* mean_b, const float* m2_b, float* mean, float* m2);
void BatchNormForward(const BatchNormShape& shape, int64_t n, const float* x, const float* mean,
                      const float* spread, float divisor, float epsilon, const float* weight,
                      const float* bias, float* y);
void BatchNormBackwardSums(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                           const float* dy, const float* mean, const float* m2, int64_t moments_n,
                           float epsilon, float* sum_dy, float* sum_dy_xhat);
void BatchNormBackward(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                       const float* dy, const float* mean, const float* m2, int64_t moments_n,
                       float epsilon, const float* weight, const float* sum_dy,
                       const float* sum_dy_xhat, float* dx);
void UpdateRunningAverages(int64_t channels, int64_t n, const float* mean, const float* m2,
                           float momentum, float* running_mean, float* running_var);
void ColumnSums(int64_t rows, int64_t columns, const float* x, float* sums);

// norm_residual.cc
void BatchNormAddForward(const BatchNormShape& shape, int64_t n, const float* x, const float* mean,
                         const float* spread, float divisor, float epsilon, const float* weight,
                         const float* bias, const float* residual, float* y);
void BatchNormGradient(const BatchNormShape& shape, int64_t n, const float* x, const float* y,
                       const float* dy, const float* more, const float* mean, const float* m2,
                       int64_t moments_n, float epsilon, float* g, float* sum_dy,
                       float* sum_dy_xhat);

// copy.cc
void CopyStrided(const StridedCopy& copy, int64_t rows, const float* x, float* y);

// maps.cc
void LeakyReluForward(int64_t n, float slope, const float* x, float* y);
void LeakyReluBackward(int64_t n, float slope, const float* y, const float* dy, float* dx);
void EluForward(int64_t n, float alpha, const float* x, float* y);
void EluBackward(int64_t n, float alpha, const float* y, const float* dy, float* dx);
void SoftplusForward(int64_t n, const float* x, float* y);
void SoftplusBackward(int64_t n, const float* x, const float* dy, float* dx);
void Multiply(int64_t n, const float* a, const float* b, float* out);

// features.cc
void SoftmaxForward(int64_t n, int64_t features, const float* x, float* y);
void SoftmaxBackward(int64_t n, int64_t features, const float* y, const float* dy, float* dx);
void LayerNormForward(int64_t n, int64_t features, const float* x, float epsilon,
                      const float* weight, const float* bias, float* y, float* stats);
void LayerNormBackward(int64_t n, int64_t features, const float* x, const float* stats,
                       const float* weight, const float* dy, float* dx);
void LayerNormBackwardWeight(int64_t n, int64_t features, const float* x, const float* stats,
                             const float* dy, float* dweight, float* dbias);

// embedding.cc
void EmbeddingForward(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                      const float* weight, float* y);
void EmbeddingBackward(int64_t n, int64_t vocabulary, int64_t features, const float* x,
                       const float* dy, float* dweight);

// smoothed_loss.cc
void SmoothedCrossEntropy(int64_t rows, int64_t classes, const float* logits, const int32_t* labels,
                          float smoothing, float scale, double* loss_sum, int64_t* correct,
                          float* dlogits);
void SigmoidCrossEntropy(int64_t rows, int64_t features, const float* x, const float* target,
                         float scale, double* loss_sum, float* dx);

// loss.cc
void SoftmaxCrossEntropy(int64_t rows, int64_t classes, const float* logits, const int32_t* labels,
                         float scale, double* loss_sum, int64_t* correct, float* dlogits);
void MeanSquaredError(int64_t rows, int64_t features, const float* y, const float* target,
                      float scale, double* loss_sum, float* dy);
void CountCorrect(int64_t rows, int64_t classes, const float* scores, const int32_t* labels,
                  int64_t* correct);

// flat.cc
void OptimizerUpdate(const OptimizerCoefficients& coefficients, int64_t n,
                     const StepScalars& scalars, const float* gradient, float* parameters,
                     const OptimizerSlots& slots);
void SquaredNorms(int64_t n, const float* x, double* sums);
bool HasNonFinite(int64_t n, const float* x);
void AccumulateDigest(int64_t n, const float* x, uint64_t tensor_key, uint64_t first_index,
                      uint64_t* lo, uint64_t* hi);

// gather.cc
void GatherSample(const SampleShape& shape, SampleType type, const void* sample,
                  const SampleChange& change, const float* mean, const float* inv_std, float* out);

}  // namespace lockstep::device::LOCKSTEP_ISA
