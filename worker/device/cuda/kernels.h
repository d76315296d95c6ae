// The hand-written CUDA kernels. Contracts are those of the functions of the same name in
// worker/device/device.h, except that what a leaf must have for itself is given for several leaves
// at once, which lie one behind the other: a leaf's results have the bits that it has alone.
//
// A call enqueues on queue.stream and returns; pointers are to device or pinned host memory.
// Arguments are fixed when the call is made, so that it can be captured in a CUDA graph.
// Thread-safe, each thread with its own Queue. Results do not depend on how many multiprocessors
// there are or in which order blocks run.
#pragma once

#include <cstdint>

#include "common/digest.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

// ---- pooling. `argmax` holds, for each output, the winner's place in its window (the first of
// equals; a NaN wins), so max pooling takes kernels up to 16. Backward overwrites dx.
void MaxPoolForward(const Queue& q, const PoolShape& shape, int64_t rows, const void* x, void* y,
                    uint8_t* argmax);
void MaxPoolBackward(const Queue& q, const PoolShape& shape, int64_t rows, const void* dy,
                     const uint8_t* argmax, void* dx);
// Padding counts in the average (PyTorch's count_include_pad).
void AveragePoolForward(const Queue& q, const PoolShape& shape, int64_t rows, const void* x,
                        void* y);
void AveragePoolBackward(const Queue& q, const PoolShape& shape, int64_t rows, const void* dy,
                         void* dx);
// x {rows, spatial, channels}, of the type -> y {rows, channels}.
void GlobalAveragePoolForward(const Queue& q, int64_t rows, int64_t spatial, int64_t channels,
                              const void* x, float* y, ElementType type = ElementType::kFp32);
void GlobalAveragePoolBackward(const Queue& q, int64_t rows, int64_t spatial, int64_t channels,
                               const float* dy, void* dx, ElementType type = ElementType::kFp32);

// ---- batch norm. Leaf l has n = leaves.begin[l + 1] - leaves.begin[l] elements a channel (rows *
// spatial); x, y and dy {leaves.begin[count], channels}.
// Each leaf's mean[c], m2[c] = sum (x - mean)^2 at mean + l * stride and m2 + l * stride, without
// cancellation, one pass over memory.
void BatchNormMoments(const Queue& q, int64_t channels, const Leaves& leaves, const void* x,
                      float* mean, float* m2, int64_t stride,
                      ElementType type = ElementType::kFp32);
// inv_std = 1 / sqrt(spread / divisor + epsilon); y = (x - mean) * inv_std * weight + bias, plus
// residual (null: none), then relu. y may alias x or residual. `above` as device.h says.
void BatchNormForward(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                      const void* x, const Moments& moments, float epsilon, const float* weight,
                      const float* bias, const void* residual, void* y, uint8_t* above = nullptr);
// BatchNormMoments, and BatchNormForward by each leaf's own, in one launch where leaves are small.
void BatchNormForwardOfLeaves(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                              const void* x, float* mean, float* m2, int64_t stride, float epsilon,
                              const float* weight, const float* bias, const void* residual, void* y,
                              uint8_t* above = nullptr);
// g = dy + more (null: none), masked by y > 0 where shape.relu. In the same pass each leaf's
// sum_dy[c] = sum g and sum_dy_xhat[c] = sum g * xhat, of g as it is stored, leaf l's at l * stride
// behind. `g` null: not written. g may alias an input.
void BatchNormGradient(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                       const void* x, const void* y, const void* dy, const void* more,
                       const Moments& moments, float epsilon, void* g, float* sum_dy,
                       float* sum_dy_xhat, int64_t stride, const float* weight = nullptr,
                       const float* bias = nullptr, const uint8_t* above = nullptr);
// dx = weight * inv_std * (dy - sum_dy / divisor - xhat * sum_dy_xhat / divisor), dy masked by y >
// 0 where shape.relu. Leaf l's sums are at l * sums_stride behind. dx may alias x, y or dy.
void BatchNormBackward(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                       const void* x, const void* y, const void* dy, const Moments& moments,
                       float epsilon, const float* weight, const float* sum_dy,
                       const float* sum_dy_xhat, int64_t sums_stride, void* dx,
                       const float* bias = nullptr);
// The sums of BatchNormGradient, and BatchNormBackward by each leaf's own, in one launch where
// leaves are small.
void BatchNormBackwardOfLeaves(const Queue& q, const BatchNormShape& shape, const Leaves& leaves,
                               const void* x, const void* y, const void* dy, const Moments& moments,
                               float epsilon, const float* weight, float* sum_dy,
                               float* sum_dy_xhat, int64_t stride, void* dx);
// The leaves' records merged by the canonical tree, in memory of the device.
void MergeLeafMoments(const Queue& q, int64_t channels, const Leaves& leaves, const float* mean,
                      const float* m2, int64_t stride, float* merged_mean, float* merged_m2);
void MergeStatistics(const Queue& q, int64_t count, const StatisticsSlice* slices,
                     int64_t most_channels, const Leaves& leaves, const float* records,
                     int64_t stride, float* merged);
void UpdateStatistics(const Queue& q, int64_t count, const StatisticsSlice* slices,
                      int64_t most_channels, int64_t rows, const float* merged,
                      const StepScalars* scalars, float* statistics);
// running += momentum * (batch - running); the variance is the unbiased m2 / (n - 1) (n = 1: m2).
void UpdateRunningAverages(const Queue& q, int64_t channels, int64_t n, const float* mean,
                           const float* m2, float momentum, float* running_mean,
                           float* running_var);

// ---- rearranging.
void CopyStrided(const Queue& q, const StridedCopy& copy, int64_t rows, const float* x, float* y);

// ---- elementwise. Outputs may alias inputs.
void ReluForward(const Queue& q, int64_t n, const void* x, void* y,
                 ElementType type = ElementType::kFp32);
void ReluBackward(const Queue& q, int64_t n, const void* y, const void* dy, void* dx,
                  ElementType type = ElementType::kFp32);
void TanhForward(const Queue& q, int64_t n, const float* x, float* y);
void TanhBackward(const Queue& q, int64_t n, const float* y, const float* dy, float* dx);
void SigmoidForward(const Queue& q, int64_t n, const float* x, float* y);
void SigmoidBackward(const Queue& q, int64_t n, const float* y, const float* dy, float* dx);
void LeakyReluForward(const Queue& q, int64_t n, float slope, const float* x, float* y);
void LeakyReluBackward(const Queue& q, int64_t n, float slope, const float* y, const float* dy,
                       float* dx);
void EluForward(const Queue& q, int64_t n, float alpha, const float* x, float* y);
void EluBackward(const Queue& q, int64_t n, float alpha, const float* y, const float* dy,
                 float* dx);
void SoftplusForward(const Queue& q, int64_t n, const float* x, float* y);
// From the input, which the output does not give back precisely.
void SoftplusBackward(const Queue& q, int64_t n, const float* x, const float* dy, float* dx);
void Add(const Queue& q, int64_t n, const void* a, const void* b, void* out,
         ElementType type = ElementType::kFp32);
void Multiply(const Queue& q, int64_t n, const float* a, const float* b, float* out);
// Inverted dropout (Srivastava et al. 2014): element i of this shard is element first + i of the
// stream (key, scalars->step); kept where ToUniform >= rate, times 1 / (1 - rate) rounded to
// float; 0 <= rate < 1. Backward is the same call on dy: the mask is computed again, not stored.
void Dropout(const Queue& q, int64_t n, const float* x, float rate, PhiloxKey key,
             const StepScalars* scalars, uint64_t first, float* y);

// ---- over the last dimension: n vectors of `features` elements, each by itself. Outputs may
// alias inputs of their size.
void SoftmaxForward(const Queue& q, int64_t n, int64_t features, const float* x, float* y);
// dx = y (dy - sum(dy y)).
void SoftmaxBackward(const Queue& q, int64_t n, int64_t features, const float* y, const float* dy,
                     float* dx);
// y = xhat * weight + bias, xhat = (x - mean) * inv_std (Ba, Kiros & Hinton 2016); `stats` {n, 2}
// takes each vector's mean and inv_std = 1 / sqrt(variance + epsilon).
void LayerNormForward(const Queue& q, int64_t n, int64_t features, const float* x, float epsilon,
                      const float* weight, const float* bias, float* y, float* stats);
// dx = inv_std * (g - mean(g) - xhat * mean(g xhat)), g = dy * weight.
void LayerNormBackward(const Queue& q, int64_t n, int64_t features, const float* x,
                       const float* stats, const float* weight, const float* dy, float* dx);
// dweight = sum over a leaf's vectors of dy xhat, dbias = of dy; leaf l's at l * stride behind.
void LayerNormBackwardWeight(const Queue& q, const Leaves& leaves, int64_t features, const float* x,
                             const float* stats, const float* dy, float* dweight, float* dbias,
                             int64_t stride);

// ---- embedding: y {n, features} = rows of weight {vocabulary, features} at x {n}, each rounded
// to the nearest integer; NaN where that is no row.
void EmbeddingForward(const Queue& q, int64_t n, int64_t vocabulary, int64_t features,
                      const float* x, const float* weight, float* y);
// dweight: sums of dy over a leaf's positions of each row, in their order; leaf l's at l * stride
// behind.
void EmbeddingBackward(const Queue& q, const Leaves& leaves, int64_t vocabulary, int64_t features,
                       const float* x, const float* dy, float* dweight, int64_t stride);

// ---- losses. Gradients are already divided by the number of samples of the global batch. Leaf l
// has rows [leaves.begin[l], leaves.begin[l + 1]); its sums go to results[l].
// loss_sum: sum over rows of -log softmax(logits)[label]; correct: rows whose first largest logit
// is the label. dlogits = (softmax - onehot) * scale; null for evaluation. With smoothing > 0
// against (1 - smoothing) onehot + smoothing / classes.
void SoftmaxCrossEntropy(const Queue& q, const Leaves& leaves, int64_t classes, const float* logits,
                         const int32_t* labels, float smoothing, float scale, LeafResult* results,
                         float* dlogits);
// loss_sum: sum over rows of mean over features of softplus(x) - x t, the cross-entropy of
// sigmoid(x) with t; dx = (sigmoid(x) - t) / features * scale, null for evaluation.
void SigmoidCrossEntropy(const Queue& q, const Leaves& leaves, int64_t features, const float* x,
                         const float* target, float scale, LeafResult* results, float* dx);
// loss_sum: sum over rows of mean over features of (y - t)^2; dy = 2 (y - t) / features * scale.
void MeanSquaredError(const Queue& q, const Leaves& leaves, int64_t features, const float* y,
                      const float* target, float scale, LeafResult* results, float* dy);
// correct: rows whose first largest element is the label.
void CountCorrect(const Queue& q, const Leaves& leaves, int64_t classes, const float* scores,
                  const int32_t* labels, LeafResult* results);
// out {rows, classes}: 1 at the label, else 0.
void OneHot(const Queue& q, int64_t rows, int64_t classes, const int32_t* labels, float* out);

// ---- convolutions (Conv2dShape without its bias and activation): x {rows, h, w, in}, w {out, kh,
// kw, in / groups}, y {rows, oh, ow, out}. A row of y or dx has the same bits in any number of
// rows. Those in bf16 that do not fit tensor cores are slow here.
// y = x * w + bias (null: none), then relu where it says so.
void ConvolutionForward(const Queue& q, const Conv2dShape& s, int64_t rows, const float* x,
                        const float* w, const float* bias, bool relu, float* y);
void ConvolutionBackwardInput(const Queue& q, const Conv2dShape& s, int64_t rows, const float* dy,
                              const float* w, float* dx);
// Each leaf's dw over its own rows; leaf l's at l * stride behind.
void ConvolutionBackwardWeight(const Queue& q, const Conv2dShape& s, const Leaves& leaves,
                               const float* x, const float* dy, float* dw, int64_t stride);

// ---- convolutions in bf16 on tensor cores: factors are rounded to bf16 and nothing else is;
// weights as PackTensorWeights has written them from bf16. `scratch` has TensorScratchBytes; both
// are aligned to 16 bytes. As above for the rest.
bool FitsTensorCores(const Conv2dShape& s);
size_t PackedWeightBytes(const Conv2dShape& s);
void PackTensorWeights(const Queue& q, const Conv2dShape& s, const uint16_t* w, void* packed);
void TensorConvolutionForward(const Queue& q, const Conv2dShape& s, int64_t rows, const void* x,
                              const void* packed, const float* bias, bool relu, void* y);
void TensorConvolutionBackwardInput(const Queue& q, const Conv2dShape& s, int64_t rows,
                                    const void* dy, const void* packed, void* dx);
// g = dx + more where `above` says so, else 0, as Conv2d::BackwardInputInto says; all are bf16.
bool TensorConvolutionBackwardInputInto(const Queue& q, const Conv2dShape& s, int64_t rows,
                                        const void* dy, const void* packed, const void* more,
                                        const uint8_t* above, void* g);
size_t TensorScratchBytes(const Conv2dShape& s);
void TensorConvolutionBackwardWeight(const Queue& q, const Conv2dShape& s, const Leaves& leaves,
                                     const void* x, const void* dy, float* dw, int64_t stride,
                                     void* scratch);

// ---- matrix products of small layers, C {m, n} = op(A) op(B), row-major, as blas.h says of them;
// in fp32 on the ordinary units, in bf16 on tensor cores. An element's bits depend on its row of
// op(A), its column of op(B), k and whether factors are bf16. Not both are transposed; n and k are
// below 2^30, a_row and b_row below 2^24.
struct SmallProduct {
  bool transpose_a = false, transpose_b = false;
  int64_t m = 0, n = 0, k = 0;
  int64_t a_row = 0, b_row = 0, c_row = 0;  // elements from a stored row to the next
  bool accumulate = false, relu = false;
  bool bf16 = false;  // factors
  // Of bf16 factors those that are given as fp32, and rounded on the way. Of both or none where A
  // is transposed; B never where it is not.
  bool a_floats = false, b_floats = false;
  int count = 1;  // products that lie so many elements apart
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;
};
void MultiplySmall(const Queue& q, const SmallProduct& product, const void* a, const void* b,
                   const float* bias, float* c);
// The same of A that is not transposed, whose rows are those of leaves, then
// BatchNormForwardOfLeaves of C {m, n}; or the product and BatchNormBackwardOfLeaves of it, which
// is kept nowhere: one launch, with the bits of both. dx may be the norm's x or y. False, and
// nothing was done: leaves have more rows than a tile, results are not taken by four, nor, where C
// is what is normalized, factors; or there are so many rows that larger tiles are better.
bool MultiplySmallThenNorm(const Queue& q, const SmallProduct& product, const Leaves& leaves,
                           const void* a, const void* b, const float* bias, float* c,
                           const NormForward& norm);
bool MultiplySmallThenNormBackward(const Queue& q, const SmallProduct& product,
                                   const Leaves& leaves, const void* a, const void* b,
                                   const NormBackward& norm);

// ---- parts of dense layers, convolutions and LSTMs.
// sums[c] = sum over a leaf's rows of x {leaves.begin[count], columns}; leaf l's at l * stride
// behind.
void ColumnSums(const Queue& q, const Leaves& leaves, int64_t columns, const void* x, float* sums,
                int64_t stride, ElementType type = ElementType::kFp32);
// To nearest even; NaN stays NaN.
void RoundToBf16(const Queue& q, int64_t n, const float* x, uint16_t* bf16);
// The same, in floats. y may be x.
void RoundInFloats(const Queue& q, int64_t n, const float* x, float* y);
// y = x + bias of the channel (null: none), then relu where it says so; channels divide n. y may be
// x.
void BiasForward(const Queue& q, int64_t n, int64_t channels, const float* x, const float* bias,
                 bool relu, float* y);
// One step of one direction of an LSTM (device.h, LstmShape). gates {rows, 4 hidden} in the order i
// f g o, gates_row elements from row to row: from pre-activations to activations. c_before, c and
// tanh_c {rows, hidden}, state_row elements from row to row; null c_before: zero. h {rows, hidden},
// h_row elements from row to row; `h16` takes it rounded to bf16 {rows, hidden}, or is null.
void LstmForwardStep(const Queue& q, int64_t rows, int64_t hidden, float* gates, int64_t gates_row,
                     const float* c_before, float* c, float* tanh_c, int64_t state_row, float* h,
                     int64_t h_row, uint16_t* h16);
// gates: from activations to gradients of the pre-activations. The gradient of h is dh (dh_row
// elements from row to row) + dh_after {rows, hidden}; null: zero. dc {rows, hidden}: from the
// gradient of c through the step behind to that of c_before; `last`: it counts as zero before.
// `gates16` takes the gradients rounded to bf16, as far apart as they are, or is null.
void LstmBackwardStep(const Queue& q, int64_t rows, int64_t hidden, float* gates, int64_t gates_row,
                      const float* c_before, const float* tanh_c, int64_t state_row,
                      const float* dh, int64_t dh_row, const float* dh_after, bool last, float* dc,
                      uint16_t* gates16);
// All steps of one direction at once, where the units are few: a block computes its samples' steps
// one behind the other, with the weights beside it. Places are {rows, steps}, by time.
struct LstmWalk {
  int64_t rows = 0;
  int steps = 0, hidden = 0;
  bool reversed = false;                  // from the last time to the first
  bool bf16 = false;                      // factors of the recurrent products; else they are fp32
  const void* weight = nullptr;           // {4 hidden, hidden}, as the factors are
  float* gates = nullptr;                 // {places, 4 hidden}, as those of a step
  float *c = nullptr, *tanh_c = nullptr;  // {places, hidden}
  void* h_before = nullptr;  // {places, hidden}, as the factors are: h of the step before
  // Of all times, or of the walk's last step alone; so many elements apart.
  float* y = nullptr;
  const float* dy = nullptr;
  bool sequence = false;
  int64_t output_row = 0, output_step = 0;
  uint16_t* gates16 = nullptr;  // Backward in bf16: the gradients rounded, {places, 4 hidden}
};
// Whether a GPU whose blocks may have so much shared memory has room for so many units.
bool WalksLstm(int64_t hidden, int64_t shared_bytes);
// On a GPU of so many multiprocessors. Forward fills c, tanh_c, h_before and y; Backward does not
// read h_before.
void LstmForwardWalk(const Queue& q, const LstmWalk& walk, int multiprocessors);
void LstmBackwardWalk(const Queue& q, const LstmWalk& walk, int multiprocessors);

// ---- flat vectors.
// One fused pass over [0, n) of the given pointers.
void OptimizerUpdate(const Queue& q, const OptimizerCoefficients& coefficients, int64_t n,
                     const StepScalars* scalars, const float* gradient, float* parameters,
                     const OptimizerSlots& slots, uint16_t* rounded = nullptr);
void OptimizerUpdatePieces(const Queue& q, const OptimizerCoefficients& coefficients, int64_t count,
                           const UpdatePiece* pieces, const StepScalars* scalars,
                           const float* gradient, float* parameters, const OptimizerSlots& slots,
                           uint16_t* rounded = nullptr);
// sums[b] = the sum of squares of block b of kNormBlock elements (the last may be shorter), in an
// order that depends on the block's length alone. In double, where no finite float overflows: a
// sum is finite exactly where all elements of its block are.
void SquaredNorms(const Queue& q, int64_t n, const float* x, double* sums);
void SquaredNormsOf(const Queue& q, int64_t count, const NormBlock* blocks, const float* x,
                    double* sums);
// *flag |= 1 where any element is infinite or NaN.
void FlagNonFinite(const Queue& q, int64_t n, const void* x, uint32_t* flag,
                   ElementType type = ElementType::kFp32);
// *digest += sum of MixElement(tensor_key, first_index + i, bits of x[i]).
void AccumulateDigest(const Queue& q, int64_t n, const float* x, uint64_t tensor_key,
                      uint64_t first_index, Digest* digest);
void DigestPieces(const Queue& q, int64_t count, const DigestPiece* pieces, Digest* digests,
                  const StepScalars* scalars, int64_t ring);
// Of `count` parts, none where the gradient is there.
void Gate(const Queue& q, const StepGate& gate, const float* const* parts, int count,
          float* gradient);
// Whether the code that the thread's GPU runs is of an architecture on which WaitForPrevious waits.
bool KernelsWait();

// ---- samples.
// Gather, normalize and augment in one pass: out {count, height, width, channels} = (x - mean[c])
// * inv_std[c], x = u8 / 255 or the float itself, of the samples that begin at elements
// offsets[i] of `data`, each changed by what `augmentation` draws for `step` and position
// first_position + i (worker/device/augment.h); and labels_out[i] = labels[i], where that is not
// null. On CUDA `data` is a set that is resident on the
// device, or registered host memory, and the draws are made in the kernel; it runs on the slot's
// stream before the step and is not captured, so step and position are plain arguments.
void GatherSamples(const Queue& q, const SampleShape& shape, int64_t count, SampleType type,
                   const void* data, const int64_t* offsets, const float* mean,
                   const float* inv_std, const Augmentation& augmentation, uint64_t step,
                   uint64_t first_position, float* out, const int32_t* labels = nullptr,
                   int32_t* labels_out = nullptr);

// out[i] = the canonical tree (worker/collective/tree.h) over parts 0..count-1 of parts[p][i], for
// i in [0, n); one pass over memory. At most kMostParts; out may be one of the parts.
constexpr int kMostParts = 64;
void TreeSum(const Queue& q, int64_t n, const float* const* parts, int count, float* out);

}  // namespace lockstep::device::cuda
