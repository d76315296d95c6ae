// Plain arguments of kernels, without any library: kernel sources that are compiled for a special
// instruction set or by nvcc include this instead of worker/device/device.h.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace lockstep::device {

// Written by the host before each step, read by kernels when they run.
struct StepScalars {
  uint64_t step = 0;  // Philox step of dropout: the update being computed, from 1
  float learning_rate = 0;
  float adam_correction1 = 1;  // 1 - beta1^t
  float adam_correction2 = 1;  // 1 - beta2^t
  float gradient_scale = 1;    // clipping by the global norm
  // 0: the gate is closed; kernels that change the state of the model leave it as it is.
  uint64_t apply = 1;
};
static_assert(sizeof(StepScalars) == 32, "no padding, whose bits nobody sets");

// How a slot's leaves become its subtrees (worker/collective/tree.h), for kernels that fold what
// they compute before it is written: leaves in order, each taking a buffer; then combines, in which
// the leaf's value, or what it has become, is the right operand and takes its left's buffer.
constexpr int kMostFoldBuffers = 26;  // of 4096 leaves, wherever they are cut
struct FoldPair {
  int left = 0, right = 0;  // buffers
};
struct LeafFold {
  int leaves = 0;
  const int* buffer = nullptr;         // by leaf
  const int* combine_count = nullptr;  // by leaf: how many of `combines` follow it
  const FoldPair* combines = nullptr;
  int parts = 0;                     // subtrees
  const int* part_buffer = nullptr;  // by part: where it is in the end
};

// What the loss of one leaf (or shard) comes to; a kernel leaves alone what it does not compute.
struct LeafResult {
  double loss_sum = 0;  // over samples
  int64_t correct = 0;  // 0 where the loss has no labels
};

// Leaves whose samples lie one behind the other: leaf l has rows (of a batch norm: elements a
// channel) [begin[l], begin[l + 1]). Kernels that must give each leaf something of its own take
// several at once; a leaf's results have the bits that it has alone.
constexpr int kMostLeaves = 32;
struct Leaves {
  int count = 1;
  int64_t begin[kMostLeaves + 1] = {0};
  Leaves() = default;
  Leaves(int64_t n) { begin[1] = n; }  // one leaf
  int64_t total() const { return begin[count]; }
};

// What normalizes leaf l: mean + l * stride and spread + l * stride; the variance is spread / n, n
// = divisor, or where that is 0 the leaf's own count. Stride 0: the same for all leaves.
struct Moments {
  const float* mean = nullptr;
  const float* spread = nullptr;
  int64_t stride = 0;
  int64_t divisor = 0;
};

// A leaf by itself.
inline constexpr int kFirstBuffer = 0, kNoCombines = 0;
inline constexpr LeafFold kOneLeaf = {1, &kFirstBuffer, &kNoCombines, nullptr, 1, &kFirstBuffer};

// Elements of a block of SquaredNorms: 16 KiB, so that small tensors are one block and a slot's
// share of a large one is even.
constexpr int64_t kNormBlock = 4096;

// ---- the gate of a step, on a device that works on its own.

// A block of a flat vector, in a table that kernels read.
struct NormBlock {
  int64_t begin = 0;
  int64_t length = 0;  // at most kNormBlock
};

// Of a level of values, those [begin, begin + count) that are summed into one of the next by the
// canonical tree.
constexpr int kSumGroup = 32;  // values at most
struct SumGroup {
  int32_t begin = 0, count = 0;
};

// What a step came to.
struct StepOutcome {
  uint64_t step = 0;
  double loss_sum = 0;  // over the batch
  int64_t correct = 0;
  double gradient_norm = 0;
  uint64_t applied = 0;  // 0: the gate is closed, by this step or an earlier one
};
static_assert(sizeof(StepOutcome) == 40, "no padding, whose bits nobody sets");

// What the blocks of threads of a gate leave for the one of them that decides.
struct GateNotes {
  StepScalars scalars;  // of the step
  uint64_t step = 0, latch = 0;
  double loss = 0;
  int64_t correct = 0;
  uint32_t poison = 0;
  uint32_t arrived = 0;  // blocks; 0 between two gates
};
static_assert(sizeof(GateNotes) == 72, "no padding, whose bits nobody sets");

// What Device::Gate works on; all memory is the kernels'. What is by step is at step % ring.
struct StepGate {
  static constexpr int kMostLevels = 12;
  // The gradient's blocks, memory for their sums of squares, and the tree over those: level by
  // level the groups that lie one behind the other in `groups`, each one value of the next level;
  // the last has one.
  int64_t block_count = 0;
  const NormBlock* blocks = nullptr;
  double* squares = nullptr;
  const SumGroup* groups = nullptr;
  int levels = 0;  // 0: there is one block or none
  int32_t level_groups[kMostLevels] = {0};
  const LeafResult* results = nullptr;  // of all leaves, in order
  const uint32_t* poison = nullptr;     // null, or a word of the host's: not 0 closes the gate
  int leaves = 0;                       // at most kMostLeaves
  double clip_norm = 0;                 // 0: none
  int64_t ring = 1;
  const StepScalars* prepared = nullptr;  // by step
  StepScalars* current = nullptr;         // of the step at hand; becomes that of the next
  StepScalars* update = nullptr;          // for what changes the state; holds the latch
  StepOutcome* outcomes = nullptr;        // by step
  GateNotes* notes = nullptr;             // zero before the first
};

// ---- tables of pieces of flat vectors, which kernels read: one call for all tensors of a model.

// What is its own of a range of an optimizer's coefficients (OptimizerCoefficients).
struct UpdatePiece {
  int64_t begin = 0, end = 0;
  float l2 = 0, weight_decay = 0, rate_multiplier = 1;
};
constexpr int64_t kUpdatePiece = 4096;  // elements at most
// A piece of a tensor of the state, beginning at element first_index of it.
struct DigestPiece {
  const float* data = nullptr;
  int64_t count = 0;
  uint64_t tensor_key = 0, first_index = 0;
};
constexpr int64_t kDigestPiece = 16384;  // elements at most
// A batch norm's part of a leaf's moments record, and of the vector of running averages.
struct StatisticsSlice {
  int64_t offset = 0, channels = 0;  // mean[channels], then M2[channels] from offset on
  int64_t spatial = 0;               // elements a row
  int64_t running_mean = 0, running_var = 0;
  float momentum = 0;
};

// How a tensor's elements lie in memory, gradients of it included. Kernels compute in fp32 all the
// same: what is stored as bf16 is rounded to nearest even then.
enum class ElementType { kFp32, kBf16 };
constexpr int64_t ElementBytes(ElementType type) { return type == ElementType::kBf16 ? 2 : 4; }

struct PoolShape {
  int64_t height = 0, width = 0, channels = 0;  // of the input
  int64_t kernel = 0, stride = 0, padding = 0;  // square; padding < kernel
  ElementType type = ElementType::kFp32;
  int64_t out_height() const { return (height + 2 * padding - kernel) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel) / stride + 1; }
};

enum class Activation { kNone, kRelu };

// Of the factors of a product. Its sum is fp32 always: bf16 rounds what is multiplied (to nearest
// even), in forward and both backward products; so does tf32, to fp32's range with 10 bits behind
// the point, as NVIDIA's tensor cores take it.
enum class Precision { kFp32, kTf32, kBf16 };

struct Conv2dShape {
  int64_t height = 0, width = 0, in = 0, out = 0;  // of the input
  int64_t kernel = 0, stride = 1, padding = 0;
  bool bias = false;
  Activation activation = Activation::kNone;
  int64_t dilation = 1;  // steps between the places of a window
  int64_t groups = 1;    // divides in and out
  Precision precision = Precision::kFp32;
  ElementType x_type = ElementType::kFp32, y_type = ElementType::kFp32;
  int64_t extent() const { return dilation * (kernel - 1) + 1; }  // of a window
  int64_t out_height() const { return (height + 2 * padding - extent()) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - extent()) / stride + 1; }
};

// Whether a device that stores bf16 does so on either side of the convolution: what its tensor
// cores take of any size, so that the answer is the same wherever it is asked.
inline bool CanStoreBf16(const Conv2dShape& s) {
  constexpr int64_t kMostKernel = 15, kMostStride = 64, kMostGroups = 256;
  constexpr int64_t kMostWeights = int64_t{1} << 24;
  return s.precision == Precision::kBf16 && s.kernel <= kMostKernel && s.stride <= kMostStride &&
         s.groups <= kMostGroups &&
         (s.groups == 1 || (s.in / s.groups >= 8 && s.out / s.groups >= 8)) &&
         s.out * s.kernel * s.kernel * (s.in / s.groups) <= kMostWeights;
}

// ---- samples of a data set.

enum class SampleType { kUint8, kFloat32 };

struct SampleShape {
  int64_t height = 0, width = 0, channels = 0;
  int64_t features() const { return height * width * channels; }
  friend bool operator==(const SampleShape&, const SampleShape&) = default;
};

// Random changes of a training sample, in this order, each a Philox function of (its key, step,
// position in the global batch). What they leave empty is 0 after normalization: the mean.
struct Augmentation {
  // The sample, padded by so many pixels on every side, is cropped to its size at a random place.
  int64_t crop_padding = 0;
  bool flip = false;  // half of the samples are mirrored left to right
  int64_t cutout =
      0;  // a square of this side round a random pixel is emptied (DeVries & Taylor 2017)
  PhiloxKey crop_key, flip_key, cutout_key;
};

// What was drawn for one sample (worker/device/augment.h). Pixel (y, x) of the crop is the sample's
// (y + shift_y, x + shift_x); the flip mirrors the crop; the cut is [top, bottom) x [left, right).
struct SampleChange {
  int64_t shift_y = 0, shift_x = 0;
  bool flip = false;
  int64_t cut_top = 0, cut_bottom = 0, cut_left = 0, cut_right = 0;
};

// A batch norm over n = rows * spatial elements per channel (Ioffe & Szegedy 2015).
struct BatchNormShape {
  int64_t channels = 0;
  bool relu = false;                      // y = relu(normalized); backward masks by y > 0
  ElementType type = ElementType::kFp32;  // of x, y, the residual and gradients of them
};

// What Device::BatchNormForwardOfLeaves is given behind x, but for a residual; all is fp32.
struct NormForward {
  bool relu = false;
  float epsilon = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float* mean = nullptr;
  float* m2 = nullptr;
  int64_t stride = 0;
  float* y = nullptr;
};
// And BatchNormBackwardOfLeaves, but for dy. y null: there is no relu.
struct NormBackward {
  const float* x = nullptr;
  const float* y = nullptr;
  Moments moments;
  float epsilon = 0;
  const float* weight = nullptr;
  float* sum_dy = nullptr;
  float* sum_dy_xhat = nullptr;
  int64_t stride = 0;
  float* dx = nullptr;
};

// For each row: y[to_begin + sum to[d] i[d]] = x[from_begin + sum from[d] i[d]] for all i below
// size. Rows lie from_row and to_row elements apart. x and y do not overlap.
struct StridedCopy {
  int64_t size[3] = {1, 1, 1};
  int64_t from_begin = 0, from[3] = {0, 0, 0}, from_row = 0;
  int64_t to_begin = 0, to[3] = {0, 0, 0}, to_row = 0;
  int64_t elements() const { return size[0] * size[1] * size[2]; }  // of a row
  // The same elements the other way.
  StridedCopy Reversed() const {
    return {{size[0], size[1], size[2]}, to_begin, {to[0], to[1], to[2]}, to_row, from_begin,
            {from[0], from[1], from[2]}, from_row};
  }
};

enum class OptimizerType {
  kSgd,
  kMomentum,
  kNesterov,
  kAdam,
  kAdagrad,
  kAdadelta,
  kRmsProp,
  kRmsPropMomentum,
  kRmsPropCentered,
  kRmsPropCenteredMomentum,
};
constexpr int kOptimizerTypes = 10;

// g' = clamp(scale * g, -clip_value, clip_value) + l2 * w, scale of StepScalars; lr is the step's
// rate times rate_multiplier; decoupled: w -= lr * weight_decay * w before the update (Loshchilov &
// Hutter 2019).
//   sgd:      w -= lr g'
//   momentum: v = mu v + g';  w -= lr v                    (PyTorch's form)
//   nesterov: v = mu v + g';  w -= lr (g' + mu v)
//   adam:     m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2;
//             w -= lr * (m / c1) / (sqrt(v / c2) + eps)    (Kingma & Ba 2015, algorithm 1)
//   adagrad:  v = v + g'^2;  w -= lr * g' / (sqrt(v) + eps)              (Duchi, Hazan & Singer
//   2011) adadelta: v = rho v + (1-rho) g'^2;  d = sqrt(u + eps) / sqrt(v + eps) * g';
//             u = rho u + (1-rho) d^2;  w -= lr d                        (Zeiler 2012, algorithm 1)
//   rmsprop:  v = rho v + (1-rho) g'^2;  d = g' / (sqrt(v) + eps);  w -= lr d   (Tieleman & Hinton
//   2012)
//     centered: m = rho m + (1-rho) g';  d = g' / (sqrt(v - m^2) + eps)         (Graves 2013, eq.
//     38-40) with momentum: b = mu b + d;  w -= lr b                                   (PyTorch's
//     form)
struct OptimizerCoefficients {
  OptimizerType type = OptimizerType::kSgd;
  float momentum = 0, beta1 = 0, beta2 = 0, rho = 0, epsilon = 0;
  float clip_value = __builtin_inff();
  // Of this range of the vector.
  float l2 = 0, weight_decay = 0;  // zero where the tensor does not decay
  float rate_multiplier = 1;
};

// An optimizer's vectors beside the parameters: momentum's v; adam's m, v; adagrad's v; adadelta's
// v, u; rmsprop's v, then m, then b where the type has them. Those beyond SlotCount(type) are null.
constexpr int kMostSlots = 3;
struct OptimizerSlots {
  float* at[kMostSlots] = {nullptr, nullptr, nullptr};
};

constexpr int SlotCount(OptimizerType type) {
  switch (type) {
    case OptimizerType::kSgd:
      return 0;
    case OptimizerType::kMomentum:
    case OptimizerType::kNesterov:
    case OptimizerType::kAdagrad:
    case OptimizerType::kRmsProp:
      return 1;
    case OptimizerType::kAdam:
    case OptimizerType::kAdadelta:
    case OptimizerType::kRmsPropMomentum:
    case OptimizerType::kRmsPropCentered:
      return 2;
    case OptimizerType::kRmsPropCenteredMomentum:
      return 3;
  }
  return 0;
}

}  // namespace lockstep::device
