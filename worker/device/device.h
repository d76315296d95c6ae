// The narrow waist: everything that layers, optimizers and the step loop may ask of a device.
//
// A Device is the CPU (worker/device/cpu) or one GPU (worker/device/cuda). Kernels are called on a
// Stream and are ordered by it. On the CPU a stream is the calling thread and a kernel has run when
// the call returns; on CUDA a call enqueues, pointers are device pointers, and only results placed
// in host-visible memory may be read, after Synchronize or an event. Nothing above the waist may
// depend on a kernel having run when the call returned, except through Synchronize. So that a step
// can be captured as a CUDA graph, no kernel call allocates, synchronizes or reads host data that
// changes between steps (such values, like the step number and learning rate, are passed through
// `StepScalars` in host-visible memory).
//
// Prepared operations (Dense, Conv2d, Lstm) are what oneDNN, cuBLASLt and cuDNN sit behind: an
// implementation is chosen by a fixed rule when the operation is made, never by timing, and reads
// the weights where they are, or keeps its own packed copy, refreshed by Pack behind the
// optimizer's pass. They are shared by the slots of one address space; each slot passes its own
// scratch memory.
//
// Exactness: a kernel's result for one call is a fixed function of its arguments' values, and
// elementwise kernels give an element the same bits wherever the range is cut. All tensors are
// NHWC, contiguous, and fp32, but for those that are `void` here: they are of the type that the
// shape says, which is fp32 on devices that do not say stores_bf16. `rows` is a number of samples.
// No alignment is assumed beyond that of an element; Allocate returns 64-byte alignment (256 on
// CUDA).
//
// Thread safety: a Device and its operations may be used by several threads, each with its own
// Stream and scratch. Errors: only making things can fail; a kernel called with arguments that its
// documentation forbids is our own bug.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/digest.h"
#include "common/philox.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device {

class Stream {
 public:
  virtual ~Stream() = default;
  // Returns when everything enqueued has run; on CUDA also reports what failed asynchronously.
  virtual absl::Status Synchronize() = 0;
  // The place that the stream has come to, and: returns when everything before that place has run.
  // A stream keeps its last kMarks places; an older one is waited for as the oldest of these.
  static constexpr int kMarks = 8;
  virtual int64_t Mark() { return 0; }
  virtual absl::Status WaitFor(int64_t /*mark*/) { return Synchronize(); }
};

// Owns device memory, zeroed when allocated.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* data() = 0;
  virtual size_t size() const = 0;
  float* floats() { return static_cast<float*>(data()); }
};

struct DenseShape {
  int64_t in = 0, out = 0;
  bool bias = false;
  Activation activation = Activation::kNone;  // fused into Forward
  Precision precision = Precision::kFp32;
  int64_t most_leaves = 1;  // that BackwardWeight is given at once
};

// y = act(x W^T + b): x {rows, in}, W {out, in}, b {out}, y {rows, out}.
class Dense {
 public:
  virtual ~Dense() = default;
  virtual size_t scratch_bytes() const = 0;  // that each of the calls below may use
  // Refreshes what is derived from `weight` (logical layout) and `rounded`, the same as bf16, which
  // operations in bf16 need on devices that say stores_bf16; else it may be null. Call after every
  // change of weights; both must stay, unchanged, until the next: they may be read where they are.
  virtual void Pack(Stream& stream, const float* weight, const uint16_t* rounded) = 0;
  virtual void Forward(Stream& stream, int64_t rows, const float* x, const float* bias, float* y,
                       void* scratch) = 0;
  // dx = dy W. `dy` is the gradient after the activation's own backward (ReluBackward).
  virtual void BackwardInput(Stream& stream, int64_t rows, const float* dy, float* dx,
                             void* scratch) = 0;
  // Forward, then the device's BatchNormForwardOfLeaves of y; and BackwardInput, then its
  // BatchNormBackwardOfLeaves of what that makes, which is kept nowhere: in one pass, with the bits
  // of both. False, and nothing was done, where there is no such pass: of leaves of many rows.
  virtual bool ForwardThenNorm(Stream&, const Leaves& /*leaves*/, const float* /*x*/,
                               const float* /*bias*/, float* /*y*/, const NormForward&) {
    return false;
  }
  virtual bool BackwardInputThenNorm(Stream&, const Leaves& /*leaves*/, const float* /*dy*/,
                                     const NormBackward&) {
    return false;
  }
  // Each leaf's dW = dy^T x in logical layout and db = column sums of dy, folded to dw[part] and
  // db[part] (null without bias). Overwrites. Leaf i has rows[i] samples x[i], dy[i]; memory of the
  // host, read when the call is made. db is computed on a stream of its own, which may be the same.
  virtual void BackwardWeight(Stream& stream, Stream& bias_stream, const LeafFold& fold,
                              const int64_t* rows, const float* const* x, const float* const* dy,
                              float* const* dw, float* const* db, void* scratch) = 0;
};

// Cross-correlation: x {rows, h, w, in}, W {out, kh, kw, in / groups}, y {rows, oh, ow, out}.
class Conv2d {
 public:
  virtual ~Conv2d() = default;
  virtual size_t scratch_bytes() const = 0;
  virtual void Pack(Stream& stream, const float* weight, const uint16_t* rounded) = 0;
  virtual void Forward(Stream& stream, int64_t rows, const void* x, const float* bias, void* y,
                       void* scratch) = 0;
  virtual void BackwardInput(Stream& stream, int64_t rows, const void* dy, void* dx,
                             void* scratch) = 0;
  // BackwardInput, then the device's BatchNormGradient of what that makes, which is kept nowhere:
  // g = dx + more where `above` says so (BatchNormForward), else 0, but for its sums; the bits of
  // both. g may be `more`. False, and nothing was done, where there is no such pass.
  virtual bool BackwardInputInto(Stream&, int64_t /*rows*/, const void* /*dy*/,
                                 const void* /*more*/, const uint8_t* /*above*/, void* /*g*/) {
    return false;
  }
  virtual void BackwardWeight(Stream& stream, int64_t rows, const void* x, const void* dy,
                              float* dw, float* db, void* scratch) = 0;

  virtual const Conv2dShape& shape() const = 0;
  // Forward and BackwardInput take any number of rows, with the bits that each row has alone. Where
  // not, rows are as listed.
  virtual bool serves_any_rows() const { return false; }
  // BackwardWeight of leaves of rows; leaf l's gradients are `stride` floats behind leaf l - 1's.
  virtual void BackwardWeights(Stream& stream, const Leaves& leaves, const void* x, const void* dy,
                               float* dw, float* db, int64_t stride, void* scratch) {
    const Conv2dShape& s = shape();
    const int64_t inputs = s.height * s.width * s.in * ElementBytes(s.x_type);
    const int64_t outputs = s.out_height() * s.out_width() * s.out * ElementBytes(s.y_type);
    for (int leaf = 0; leaf < leaves.count; ++leaf) {
      const int64_t first = leaves.begin[leaf];
      BackwardWeight(stream, leaves.begin[leaf + 1] - first,
                     static_cast<const char*>(x) + first * inputs,
                     static_cast<const char*>(dy) + first * outputs, dw + leaf * stride,
                     db == nullptr ? nullptr : db + leaf * stride, scratch);
    }
  }
};

// One layer of long short-term memory (Hochreiter & Schmidhuber 1997; the forget gate of Gers,
// Schmidhuber & Cummins 2000), as torch.nn.LSTM computes it. With s the logistic function, per
// step:
//   i, f, o = s(W_ih x + b_ih + W_hh h + b_hh), g = tanh(the same), in the order i f g o of rows;
//   c = f c + i g;  h = o tanh(c);  h and c are zero before the first step.
// The second direction walks from the last step to the first, and its h stands behind the first's.
struct LstmShape {
  int64_t steps = 0, in = 0, hidden = 0;
  bool bidirectional = false;
  bool bias = false;
  bool sequence = false;  // y is h of every step, else of each direction's last step
  Precision precision = Precision::kFp32;
  int64_t most_rows = 0;  // of one call; 0: the largest number that is listed
  int64_t directions() const { return bidirectional ? 2 : 1; }
  int64_t out() const { return directions() * hidden; }  // features of a step of y
  int64_t outputs() const { return sequence ? steps * out() : out(); }
  // Floats a row that Forward leaves for Backward, on every device: gates, c, tanh(c) and h.
  int64_t reserve() const { return steps * directions() * 7 * hidden; }
};

// Tensors of one direction, their bf16, or their gradients: weight_ih {4 hidden, in}, weight_hh {4
// hidden, hidden}, biases {4 hidden} (null without).
template <class Float>
struct LstmTensors {
  Float* weight_ih = nullptr;
  Float* weight_hh = nullptr;
  Float* bias_ih = nullptr;
  Float* bias_hh = nullptr;
};

// x {rows, steps, in}, y {rows, steps, out} or {rows, out}. Spans have one element a direction.
class Lstm {
 public:
  virtual ~Lstm() = default;
  virtual const LstmShape& shape() const = 0;
  virtual size_t scratch_bytes() const = 0;  // that each of the calls below may use
  // Forward takes any number of rows up to shape().most_rows, with the bits that each row has
  // alone, and leaves are worth taking together. Where not, rows are as listed.
  virtual bool serves_any_rows() const { return false; }
  // As Dense's, and refreshes the summed biases; empty where Dense's may be null. Of `rounded` only
  // the weights are read.
  virtual void Pack(Stream& stream, absl::Span<const LstmTensors<const float>> tensors,
                    absl::Span<const LstmTensors<const uint16_t>> rounded) = 0;
  // `reserve` has rows * shape.reserve() floats.
  virtual void Forward(Stream& stream, int64_t rows, const float* x, float* y, float* reserve,
                       void* scratch) = 0;
  // The gradients of the tensors (overwritten) and of x (dx; null: not wanted). The reserve is that
  // of a Forward of the same rows and x, and is used up.
  virtual void Backward(Stream& stream, int64_t rows, const float* x, const float* dy,
                        float* reserve, absl::Span<const LstmTensors<float>> gradients, float* dx,
                        void* scratch) = 0;
  // Backward of leaves of rows, each with the bits that it has alone. `gradients` are the first
  // leaf's, leaf l's `stride` floats behind leaf l - 1's. The reserve is that of one Forward of all
  // rows where serves_any_rows, else of one for each leaf, one behind the other.
  virtual void BackwardLeaves(Stream& stream, const Leaves& leaves, const float* x, const float* dy,
                              float* reserve, absl::Span<const LstmTensors<float>> gradients,
                              int64_t stride, float* dx, void* scratch);
};

inline void Lstm::BackwardLeaves(Stream& stream, const Leaves& leaves, const float* x,
                                 const float* dy, float* reserve,
                                 absl::Span<const LstmTensors<float>> gradients, int64_t stride,
                                 float* dx, void* scratch) {
  const LstmShape& s = shape();
  for (int leaf = 0; leaf < leaves.count; ++leaf) {
    const int64_t first = leaves.begin[leaf], inputs = first * s.steps * s.in;
    std::array<LstmTensors<float>, 2> own;
    for (size_t d = 0; d < gradients.size(); ++d) {
      const auto of_leaf = [&](float* tensor) {
        return tensor == nullptr ? nullptr : tensor + leaf * stride;
      };
      const LstmTensors<float>& t = gradients[d];
      own[d] = {of_leaf(t.weight_ih), of_leaf(t.weight_hh), of_leaf(t.bias_ih), of_leaf(t.bias_hh)};
    }
    Backward(stream, leaves.begin[leaf + 1] - first, x + inputs, dy + first * s.outputs(),
             reserve + first * s.reserve(), absl::MakeConstSpan(own.data(), gradients.size()),
             dx == nullptr ? nullptr : dx + inputs, scratch);
  }
}

// Calls of the device that can be made again, with the arguments they had: a CUDA graph. It must
// not outlive what the calls use.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void Replay(Stream& stream) = 0;
  // How many replays that have not run a stream should have at most, of [kLeastAhead, kMostAhead]:
  // with more, calls may keep their thread busy until there is room for what they enqueue.
  static constexpr int kLeastAhead = 2, kMostAhead = 8;
  virtual int most_ahead() const = 0;
};

// Algorithms of a vendor's libraries by the problem that each is for: bytes that only devices of
// the same fingerprint can read.
using Algorithms = std::map<std::string, std::string>;

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;  // "GPU 0 (NVIDIA H200)", "the CPU": for messages
  // "cpu avx512 onednn 2.6.3"; devices with equal strings give equal bits in that precision.
  virtual std::string fingerprint(Precision precision) const = 0;
  // The host may read and write what Allocate returns, and kernels all memory of the host. Where
  // not, only host-visible memory is shared, and other memory of the host is for Copy alone.
  virtual bool host_addressable() const = 0;
  // Operands of kernels may be stored as bf16 where they are `void` below; of convolutions,
  // CanStoreBf16.
  virtual bool stores_bf16() const { return false; }
  virtual absl::StatusOr<std::unique_ptr<Stream>> MakeStream() = 0;
  // For Copy, Zero and GatherSamples alone; takes no memory of the device.
  virtual absl::StatusOr<std::unique_ptr<Stream>> MakeCopyStream() = 0;
  // ResourceExhausted names the size.
  virtual absl::StatusOr<std::unique_ptr<Memory>> Allocate(size_t bytes) = 0;
  // What Allocate can still give, of all that the device has; {0, 0} where that is not known.
  struct Room {
    size_t free = 0, total = 0;
  };
  virtual Room room() = 0;
  virtual size_t stream_bytes() const = 0;  // of that, what a stream takes
  // Where the device is lost to this process, and nothing works on it any more: Internal, which
  // names it and says why, in one line. To ask costs little and waits for nothing.
  virtual absl::Status Check() = 0;
  // Memory that both host and kernels address (pinned on CUDA).
  virtual absl::StatusOr<std::unique_ptr<Memory>> AllocateHostVisible(size_t bytes) = 0;
  // Memory in which kernels find the `bytes` at `data`, which is memory of the host: that itself
  // where they read it (it must stay, unchanged), or a copy on the device where it fits in a part
  // of what is free beyond `spare`; else null.
  virtual absl::StatusOr<std::unique_ptr<Memory>> MakeResident(const void* data, size_t bytes,
                                                               size_t spare = 0) = 0;
  // What is enqueued on `behind` from now on runs after what is on `ahead` now, whose failures it
  // returns, too. Both are of this device; where one is being recorded, so is the other.
  virtual void Follow(Stream& behind, Stream& ahead) = 0;
  // From and to any memory of device or host. The host's, where it is not host-visible, may be
  // reused at once if it is the source, and is valid after Synchronize if it is the target.
  virtual void Copy(Stream& stream, const void* from, void* to, size_t bytes) = 0;
  virtual void Zero(Stream& stream, void* to, size_t bytes) = 0;

  // Records what `calls` calls on the stream, instead of running it; calls that allocate or wait
  // are forbidden in it, and it should have run once before. Null where the device has no use for
  // it: then nothing is called. Fails where something in it cannot be recorded.
  virtual absl::StatusOr<std::unique_ptr<Recording>> Record(
      Stream& stream, absl::FunctionRef<absl::Status()> calls) = 0;

  // `rows` lists every number of rows that will be asked for; primitives are made here, none later.
  virtual absl::StatusOr<std::unique_ptr<Dense>> MakeDense(const DenseShape& shape,
                                                           absl::Span<const int64_t> rows) = 0;
  virtual absl::StatusOr<std::unique_ptr<Conv2d>> MakeConv2d(const Conv2dShape& shape,
                                                             absl::Span<const int64_t> rows) = 0;
  virtual absl::StatusOr<std::unique_ptr<Lstm>> MakeLstm(const LstmShape& shape,
                                                         absl::Span<const int64_t> rows) = 0;

  // ---- pooling. `argmax` holds, for each output, the winner's place in its window (the first of
  // equals; a NaN wins), so max pooling takes kernels up to 16. Backward overwrites dx.
  virtual void MaxPoolForward(Stream& stream, const PoolShape& shape, int64_t rows, const void* x,
                              void* y, uint8_t* argmax) = 0;
  virtual void MaxPoolBackward(Stream& stream, const PoolShape& shape, int64_t rows, const void* dy,
                               const uint8_t* argmax, void* dx) = 0;
  // Padding counts in the average (PyTorch's count_include_pad).
  virtual void AveragePoolForward(Stream& stream, const PoolShape& shape, int64_t rows,
                                  const void* x, void* y) = 0;
  virtual void AveragePoolBackward(Stream& stream, const PoolShape& shape, int64_t rows,
                                   const void* dy, void* dx) = 0;
  // x {rows, spatial, channels}, of the type -> y {rows, channels}.
  virtual void GlobalAveragePoolForward(Stream& stream, int64_t rows, int64_t spatial,
                                        int64_t channels, const void* x, float* y,
                                        ElementType type = ElementType::kFp32) = 0;
  virtual void GlobalAveragePoolBackward(Stream& stream, int64_t rows, int64_t spatial,
                                         int64_t channels, const float* dy, void* dx,
                                         ElementType type = ElementType::kFp32) = 0;

  // ---- batch norm. n = rows * spatial of a leaf; x, y and dy {leaves.total(), channels}. What a
  // leaf has for itself, leaf l has `stride` floats behind leaf l - 1's.
  // mean[c], m2[c] = sum (x - mean)^2, without cancellation, one pass over memory.
  virtual void BatchNormMoments(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                const void* x, float* mean, float* m2, int64_t stride = 0) = 0;
  // (count, mean, M2) of the union (Chan, Golub & LeVeque 1983); `out` may alias a. On every device
  // of records in memory of the host, at once: they come from other members.
  virtual void MergeMoments(Stream& stream, int64_t channels, int64_t count_a, const float* mean_a,
                            const float* m2_a, int64_t count_b, const float* mean_b,
                            const float* m2_b, float* mean, float* m2) = 0;
  // inv_std = 1 / sqrt(spread / n + epsilon); y = (x - mean) * inv_std * weight + bias, plus
  // residual (null: none), then relu where shape says so. y may alias x or residual. Inference is
  // the same with the running averages for moments, and 1 for their divisor. `above` (null: not
  // wanted) takes where y is above 0: of element i, bit i % 8 of byte i / 8. Only of a relu behind
  // a residual, of bf16 with channels by 8, where tensors are aligned to 16 bytes.
  virtual void BatchNormForward(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                const void* x, const Moments& moments, float epsilon,
                                const float* weight, const float* bias, const void* residual,
                                void* y, uint8_t* above = nullptr) = 0;
  // BatchNormMoments, then BatchNormForward by each leaf's own: the same bits.
  virtual void BatchNormForwardOfLeaves(Stream& stream, const BatchNormShape& shape,
                                        const Leaves& leaves, const void* x, float* mean, float* m2,
                                        int64_t stride, float epsilon, const float* weight,
                                        const float* bias, const void* residual, void* y,
                                        uint8_t* above = nullptr) {
    BatchNormMoments(stream, shape, leaves, x, mean, m2, stride);
    BatchNormForward(stream, shape, leaves, x, {mean, m2, stride}, epsilon, weight, bias, residual,
                     y, above);
  }
  // g = dy + more (null: none), masked by y > 0 where shape.relu: what reaches the residual, and
  // the dy of BatchNormBackward with a shape without relu. g null: not wanted. In the same pass
  // sum_dy[c] = sum g, sum_dy_xhat[c] = sum g * xhat, of g as it is stored. g may alias an input.
  // weight and bias (null: not told) are told where y is BatchNormForward's by them and the same
  // moments, without a residual: a device may then compute again where it is above 0, rather than
  // read it. Nor is it read where forward has said it: `above` (null: it has not).
  virtual void BatchNormGradient(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                 const void* x, const void* y, const void* dy, const void* more,
                                 const Moments& moments, float epsilon, void* g, float* sum_dy,
                                 float* sum_dy_xhat, int64_t stride = 0,
                                 const float* weight = nullptr, const float* bias = nullptr,
                                 const uint8_t* above = nullptr) = 0;
  // dx = weight * inv_std * (dy - sum_dy / n - xhat * sum_dy_xhat / n), n that of the moments, dy
  // masked by y > 0 where shape.relu. dx may alias x, y or dy. bias (null: not told) as above.
  virtual void BatchNormBackward(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                 const void* x, const void* y, const void* dy,
                                 const Moments& moments, float epsilon, const float* weight,
                                 const float* sum_dy, const float* sum_dy_xhat, int64_t stride,
                                 void* dx, const float* bias = nullptr) = 0;
  // The sums of BatchNormGradient, then BatchNormBackward by each leaf's own: the same bits.
  virtual void BatchNormBackwardOfLeaves(Stream& stream, const BatchNormShape& shape,
                                         const Leaves& leaves, const void* x, const void* y,
                                         const void* dy, const Moments& moments, float epsilon,
                                         const float* weight, float* sum_dy, float* sum_dy_xhat,
                                         int64_t stride, void* dx) {
    BatchNormGradient(stream, shape, leaves, x, y, dy, nullptr, moments, epsilon, nullptr, sum_dy,
                      sum_dy_xhat, stride);
    BatchNormBackward(stream, shape, leaves, x, y, dy, moments, epsilon, weight, sum_dy,
                      sum_dy_xhat, stride, dx);
  }
  // The leaves' records merged by the canonical tree into one, in memory of the device; leaves are
  // of n = rows * spatial elements a channel.
  virtual void MergeLeafMoments(Stream& stream, int64_t channels, const Leaves& leaves,
                                const float* mean, const float* m2, int64_t stride,
                                float* merged_mean, float* merged_m2) = 0;
  // The same for all norms at once: `slices` is a table that kernels read, leaves are of rows,
  // records lie `stride` apart, and `merged` is one more.
  virtual void MergeStatistics(Stream& stream, int64_t count, const StatisticsSlice* slices,
                               int64_t most_channels, const Leaves& leaves, const float* records,
                               int64_t stride, float* merged) = 0;
  // UpdateRunningAverages of them all by the record of so many rows. Of `scalars` only `apply` is
  // read.
  virtual void UpdateStatistics(Stream& stream, int64_t count, const StatisticsSlice* slices,
                                int64_t most_channels, int64_t rows, const float* merged,
                                const StepScalars* scalars, float* statistics) = 0;
  // running += momentum * (batch - running); the variance is the unbiased m2 / (n - 1) (n = 1: m2).
  virtual void UpdateRunningAverages(Stream& stream, int64_t channels, int64_t n, const float* mean,
                                     const float* m2, float momentum, float* running_mean,
                                     float* running_var) = 0;

  // ---- rearranging.
  virtual void CopyStrided(Stream& stream, const StridedCopy& copy, int64_t rows, const float* x,
                           float* y) = 0;

  // ---- elementwise. Outputs may alias inputs.
  virtual void ReluForward(Stream& stream, int64_t n, const void* x, void* y,
                           ElementType type = ElementType::kFp32) = 0;
  virtual void ReluBackward(Stream& stream, int64_t n, const void* y, const void* dy, void* dx,
                            ElementType type = ElementType::kFp32) = 0;
  virtual void TanhForward(Stream& stream, int64_t n, const float* x, float* y) = 0;
  virtual void TanhBackward(Stream& stream, int64_t n, const float* y, const float* dy,
                            float* dx) = 0;
  virtual void SigmoidForward(Stream& stream, int64_t n, const float* x, float* y) = 0;
  virtual void SigmoidBackward(Stream& stream, int64_t n, const float* y, const float* dy,
                               float* dx) = 0;
  virtual void LeakyReluForward(Stream& stream, int64_t n, float slope, const float* x,
                                float* y) = 0;
  virtual void LeakyReluBackward(Stream& stream, int64_t n, float slope, const float* y,
                                 const float* dy, float* dx) = 0;
  virtual void EluForward(Stream& stream, int64_t n, float alpha, const float* x, float* y) = 0;
  virtual void EluBackward(Stream& stream, int64_t n, float alpha, const float* y, const float* dy,
                           float* dx) = 0;
  virtual void SoftplusForward(Stream& stream, int64_t n, const float* x, float* y) = 0;
  // From the input, which the output does not give back precisely.
  virtual void SoftplusBackward(Stream& stream, int64_t n, const float* x, const float* dy,
                                float* dx) = 0;
  virtual void Add(Stream& stream, int64_t n, const void* a, const void* b, void* out,
                   ElementType type = ElementType::kFp32) = 0;
  virtual void Multiply(Stream& stream, int64_t n, const float* a, const float* b, float* out) = 0;
  // Inverted dropout (Srivastava et al. 2014): element i of this shard is element first + i of the
  // stream (key, scalars->step); kept where ToUniform >= rate, times 1 / (1 - rate) rounded to
  // float; 0 <= rate < 1. Backward is the same call on dy: the mask is computed again, not stored.
  virtual void Dropout(Stream& stream, int64_t n, const float* x, float rate, PhiloxKey key,
                       const StepScalars* scalars, uint64_t first, float* y) = 0;

  // ---- over the last dimension: n vectors of `features` elements, each by itself. Outputs may
  // alias inputs of their size.
  virtual void SoftmaxForward(Stream& stream, int64_t n, int64_t features, const float* x,
                              float* y) = 0;
  // dx = y (dy - sum(dy y)).
  virtual void SoftmaxBackward(Stream& stream, int64_t n, int64_t features, const float* y,
                               const float* dy, float* dx) = 0;
  // y = xhat * weight + bias, xhat = (x - mean) * inv_std (Ba, Kiros & Hinton 2016); `stats` {n, 2}
  // takes each vector's mean and inv_std = 1 / sqrt(variance + epsilon).
  virtual void LayerNormForward(Stream& stream, int64_t n, int64_t features, const float* x,
                                float epsilon, const float* weight, const float* bias, float* y,
                                float* stats) = 0;
  // dx = inv_std * (g - mean(g) - xhat * mean(g xhat)), g = dy * weight.
  virtual void LayerNormBackward(Stream& stream, int64_t n, int64_t features, const float* x,
                                 const float* stats, const float* weight, const float* dy,
                                 float* dx) = 0;
  // dweight = sum over a leaf's vectors of dy xhat, dbias = of dy.
  virtual void LayerNormBackwardWeight(Stream& stream, const Leaves& leaves, int64_t features,
                                       const float* x, const float* stats, const float* dy,
                                       float* dweight, float* dbias, int64_t stride = 0) = 0;

  // ---- embedding: y {n, features} = rows of weight {vocabulary, features} at x {n}, each rounded
  // to the nearest integer; NaN where that is no row.
  virtual void EmbeddingForward(Stream& stream, int64_t n, int64_t vocabulary, int64_t features,
                                const float* x, const float* weight, float* y) = 0;
  // dweight: sums of dy over a leaf's positions of each row, in their order.
  virtual void EmbeddingBackward(Stream& stream, const Leaves& leaves, int64_t vocabulary,
                                 int64_t features, const float* x, const float* dy, float* dweight,
                                 int64_t stride = 0) = 0;

  // ---- losses. Gradients are already divided by the number of samples of the global batch; leaf
  // l's sums go to results[l].
  // loss_sum: sum over rows of -log softmax(logits)[label]; correct: rows whose first largest logit
  // is the label. dlogits = (softmax - onehot) * scale; null for evaluation. With smoothing > 0,
  // below 1, against (1 - smoothing) onehot + smoothing / classes.
  virtual void SoftmaxCrossEntropy(Stream& stream, const Leaves& leaves, int64_t classes,
                                   const float* logits, const int32_t* labels, float smoothing,
                                   float scale, LeafResult* results, float* dlogits) = 0;
  // loss_sum: sum over rows of mean over features of softplus(x) - x t, the cross-entropy of
  // sigmoid(x) with t; dx = (sigmoid(x) - t) / features * scale, null for evaluation.
  virtual void SigmoidCrossEntropy(Stream& stream, const Leaves& leaves, int64_t features,
                                   const float* x, const float* target, float scale,
                                   LeafResult* results, float* dx) = 0;
  // loss_sum: sum over rows of mean over features of (y - t)^2; dy = 2 (y - t) / features * scale.
  virtual void MeanSquaredError(Stream& stream, const Leaves& leaves, int64_t features,
                                const float* y, const float* target, float scale,
                                LeafResult* results, float* dy) = 0;
  // correct: rows whose first largest element is the label.
  virtual void CountCorrect(Stream& stream, const Leaves& leaves, int64_t classes,
                            const float* scores, const int32_t* labels, LeafResult* results) = 0;
  // out {rows, classes}: 1 at the label, else 0.
  virtual void OneHot(Stream& stream, int64_t rows, int64_t classes, const int32_t* labels,
                      float* out) = 0;

  // ---- flat vectors.
  // out[i] = the canonical tree (worker/collective/tree.h) over parts[0][i], parts[1][i], ... At
  // most kMostParts; out may be one of them.
  static constexpr int kMostParts = 64;
  virtual void TreeSum(Stream& stream, int64_t n, absl::Span<const float* const> parts,
                       float* out) = 0;
  // One fused pass over [0, n) of the given pointers; none where the scalars say not to apply it.
  // `rounded` takes the new parameters as RoundToBf16 has them (null: not wanted).
  virtual void OptimizerUpdate(Stream& stream, const OptimizerCoefficients& coefficients, int64_t n,
                               const StepScalars* scalars, const float* gradient, float* parameters,
                               const OptimizerSlots& slots, uint16_t* rounded = nullptr) = 0;
  // The same for pieces with coefficients of their own, of at most kUpdatePiece elements, in a
  // table that kernels read. Pointers are those of whole vectors.
  virtual void OptimizerUpdatePieces(Stream& stream, const OptimizerCoefficients& coefficients,
                                     int64_t count, const UpdatePiece* pieces,
                                     const StepScalars* scalars, const float* gradient,
                                     float* parameters, const OptimizerSlots& slots,
                                     uint16_t* rounded = nullptr) = 0;
  // To nearest even; NaN stays NaN.
  virtual void RoundToBf16(Stream& stream, int64_t n, const float* x, uint16_t* rounded) = 0;
  // sums[b] = the sum of squares of block b of kNormBlock elements (the last may be shorter), in an
  // order that depends on the block's length alone. In double, where no finite float overflows: a
  // sum is finite exactly where all elements of its block are.
  virtual void SquaredNorms(Stream& stream, int64_t n, const float* x, double* sums) = 0;
  // The same of blocks of x anywhere, in a table that kernels read.
  virtual void SquaredNormsOf(Stream& stream, int64_t count, const NormBlock* blocks,
                              const float* x, double* sums) = 0;
  // *flag |= 1 where any element is infinite or NaN.
  virtual void FlagNonFinite(Stream& stream, int64_t n, const void* x, uint32_t* flag,
                             ElementType type = ElementType::kFp32) = 0;
  // *digest += sum of MixElement(tensor_key, first_index + i, bits of x[i]).
  virtual void AccumulateDigest(Stream& stream, int64_t n, const float* x, uint64_t tensor_key,
                                uint64_t first_index, Digest* digest) = 0;
  // digests[i] = the sum over piece i of a table that kernels read, of at most kDigestPiece
  // elements each. With scalars (null: none), into the place of their step in a ring of so many
  // times `count` digests.
  virtual void DigestPieces(Stream& stream, int64_t count, const DigestPiece* pieces,
                            Digest* digests, const StepScalars* scalars, int64_t ring) = 0;
  // One pass over a step's gradient, in the gate's blocks: gradient = TreeSum of `parts` (empty: it
  // is there), of which SquaredNormsOf. Then decides whether the step is applied: where its loss
  // and its gradient's norm are finite, it is not poisoned, and every step before it was. From
  // *current's step on: update = prepared[step], with the scale that clips the gradient (ClipScale)
  // and the latch `apply`, which stays 0 once it is; outcomes[step]; and ++current->step.
  // `update->apply` is 1 before the first.
  virtual void Gate(Stream& stream, const StepGate& gate, absl::Span<const float* const> parts,
                    float* gradient) = 0;

  // ---- samples.
  // Gather, normalize and augment in one pass: out {count, height, width, channels} = (x - mean[c])
  // * inv_std[c], x = u8 / 255 or the float itself, of the samples that begin at elements
  // offsets[i] of `data`, each changed by what `augmentation` draws for `step` and position
  // first_position + i (worker/device/augment.h); and labels_out[i] = labels[i], where that is not
  // null. Offsets and labels are read once, so they may be in memory of the host. On CUDA `data` is
  // a set that is resident on the device, or the batch's part of one, and the draws are made in the
  // kernel; it runs on the slot's stream before the step and is not captured, so step and position
  // are plain arguments.
  virtual void GatherSamples(Stream& stream, const SampleShape& shape, int64_t count,
                             SampleType type, const void* data, const int64_t* offsets,
                             const float* mean, const float* inv_std,
                             const Augmentation& augmentation, uint64_t step,
                             uint64_t first_position, float* out, const int32_t* labels = nullptr,
                             int32_t* labels_out = nullptr) = 0;

  // ---- algorithms. Those that what was made so far computes with: chosen by a rule, and kept, so
  // that equal problems have one. A device that chooses none has none.
  virtual Algorithms algorithms() const { return {}; }
  // From now on problems are given these, and one is chosen only for a problem that is not among
  // them; what was made before keeps its own. Making something then fails with FailedPrecondition
  // where this device cannot compute it so.
  virtual void UseAlgorithms(const Algorithms&) {}
};

}  // namespace lockstep::device
