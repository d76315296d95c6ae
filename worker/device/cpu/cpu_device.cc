#include "worker/device/cpu/cpu_device.h"
#include "worker/device/augment.h"

#include <dnnl.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/device/cpu/fused_lstm.h"
#include "worker/device/cpu/gemm_dense.h"
#include "worker/device/cpu/host_memory.h"
#include "worker/device/cpu/kernels.h"
#include "worker/device/cpu/onednn_call.h"
#include "worker/device/cpu/onednn_conv2d.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device {
namespace {

void PrefetchLines(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

template <class Visit>
void ForEachLeaf(const Leaves& leaves, Visit visit) {
  for (int l = 0; l < leaves.count; ++l) {
    visit(l, leaves.begin[l], leaves.begin[l + 1] - leaves.begin[l]);
  }
}

// Of what may be absent.
template <class T>
T* Behind(T* p, int64_t at) {
  return p == nullptr ? nullptr : p + at;
}

// What devices that store bf16 have in other types is floats here.
float* Floats(void* p) { return static_cast<float*>(p); }
const float* Floats(const void* p) { return static_cast<const float*>(p); }

class BorrowedMemory : public Memory {
 public:
  BorrowedMemory(void* data, size_t size) : data_(data), size_(size) {}
  void* data() override { return data_; }
  size_t size() const override { return size_; }

 private:
  void* const data_;
  const size_t size_;
};

// The canonical tree over values[0, n).
double SumByTree(const double* values, int64_t n) {
  if (n == 1) return values[0];
  int64_t half = 1;
  while (half * 2 < n) half *= 2;
  const double left = SumByTree(values, half);
  return left + SumByTree(values + half, n - half);
}

class CpuDevice : public Device {
 public:
  CpuDevice(std::string fingerprint, OnednnContext context)
      : k_(*context.kernels.fp32),
        b_(*context.kernels.bf16),
        fingerprint_(std::move(fingerprint)),
        context_(std::move(context)) {}

  std::string name() const override { return "the CPU"; }
  std::string fingerprint(Precision precision) const override {
    if (precision == Precision::kFp32) return fingerprint_;
    return absl::StrCat(fingerprint_, context_.bf16 ? " bf16" : " bf16 rounded in fp32");
  }

  bool host_addressable() const override { return true; }
  absl::StatusOr<std::unique_ptr<Stream>> MakeStream() override {
    absl::Status status = UseOneThread();
    if (!status.ok()) return status;
    try {
      return std::make_unique<CpuStream>(context_.engine);
    } catch (const dnnl::error& e) {
      return absl::InternalError(absl::StrCat("oneDNN cannot make a stream: ", e.what()));
    }
  }
  absl::StatusOr<std::unique_ptr<Stream>> MakeCopyStream() override { return MakeStream(); }
  Room room() override { return {}; }
  size_t stream_bytes() const override { return 0; }
  absl::Status Check() override { return absl::OkStatus(); }
  absl::StatusOr<std::unique_ptr<Memory>> Allocate(size_t bytes) override {
    std::unique_ptr<Memory> memory = AllocateHostMemory(bytes);
    if (memory == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "no memory for ", bytes, " bytes on the CPU; use smaller shards or more hosts"));
    }
    return memory;
  }
  absl::StatusOr<std::unique_ptr<Memory>> AllocateHostVisible(size_t bytes) override {
    return Allocate(bytes);
  }
  absl::StatusOr<std::unique_ptr<Memory>> MakeResident(const void* data, size_t bytes,
                                                       size_t) override {
    return std::make_unique<BorrowedMemory>(const_cast<void*>(data), bytes);  // it is only read
  }
  void Follow(Stream&, Stream&) override {}  // calls are done when they return
  void Copy(Stream&, const void* from, void* to, size_t bytes) override {
    if (bytes > 0) std::memmove(to, from, bytes);
  }
  void Zero(Stream&, void* to, size_t bytes) override {
    if (bytes > 0) std::memset(to, 0, bytes);
  }

  absl::StatusOr<std::unique_ptr<Recording>> Record(Stream&,
                                                    absl::FunctionRef<absl::Status()>) override {
    return nullptr;
  }

  absl::StatusOr<std::unique_ptr<Dense>> MakeDense(const DenseShape& shape,
                                                   absl::Span<const int64_t> rows) override {
    return MakeGemmDense(context_.kernels, shape, rows);
  }
  absl::StatusOr<std::unique_ptr<Conv2d>> MakeConv2d(const Conv2dShape& shape,
                                                     absl::Span<const int64_t> rows) override {
    return MakeOnednnConv2d(context_, shape, rows);
  }
  absl::StatusOr<std::unique_ptr<Lstm>> MakeLstm(const LstmShape& shape,
                                                 absl::Span<const int64_t> rows) override {
    return MakeFusedLstm(context_.kernels, shape, rows);
  }

  void MaxPoolForward(Stream&, const PoolShape& shape, int64_t rows, const void* x, void* y,
                      uint8_t* argmax) override {
    k_.max_pool_forward(shape, rows, Floats(x), Floats(y), argmax);
  }
  void MaxPoolBackward(Stream&, const PoolShape& shape, int64_t rows, const void* dy,
                       const uint8_t* argmax, void* dx) override {
    k_.max_pool_backward(shape, rows, Floats(dy), argmax, Floats(dx));
  }
  void AveragePoolForward(Stream&, const PoolShape& shape, int64_t rows, const void* x,
                          void* y) override {
    k_.average_pool_forward(shape, rows, Floats(x), Floats(y));
  }
  void AveragePoolBackward(Stream&, const PoolShape& shape, int64_t rows, const void* dy,
                           void* dx) override {
    k_.average_pool_backward(shape, rows, Floats(dy), Floats(dx));
  }
  void GlobalAveragePoolForward(Stream&, int64_t rows, int64_t spatial, int64_t channels,
                                const void* x, float* y, ElementType) override {
    k_.global_average_pool_forward(rows, spatial, channels, Floats(x), y);
  }
  void GlobalAveragePoolBackward(Stream&, int64_t rows, int64_t spatial, int64_t channels,
                                 const float* dy, void* dx, ElementType) override {
    k_.global_average_pool_backward(rows, spatial, channels, dy, Floats(dx));
  }

  void BatchNormMoments(Stream&, const BatchNormShape& shape, const Leaves& leaves, const void* x,
                        float* mean, float* m2, int64_t stride) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      k_.batch_norm_moments(shape.channels, n, Floats(x) + begin * shape.channels,
                            mean + l * stride, m2 + l * stride);
    });
  }
  void MergeMoments(Stream&, int64_t channels, int64_t count_a, const float* mean_a,
                    const float* m2_a, int64_t count_b, const float* mean_b, const float* m2_b,
                    float* mean, float* m2) override {
    k_.merge_moments(channels, count_a, mean_a, m2_a, count_b, mean_b, m2_b, mean, m2);
  }
  void BatchNormForward(Stream&, const BatchNormShape& shape, const Leaves& leaves, const void* x,
                        const Moments& moments, float epsilon, const float* weight,
                        const float* bias, const void* residual, void* y, uint8_t*) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * shape.channels;
      const float* mean = moments.mean + l * moments.stride;
      const float* spread = moments.spread + l * moments.stride;
      const auto divisor = static_cast<float>(moments.divisor > 0 ? moments.divisor : n);
      if (residual == nullptr) {
        k_.batch_norm_forward(shape, n, Floats(x) + at, mean, spread, divisor, epsilon, weight,
                              bias, Floats(y) + at);
      } else {
        k_.batch_norm_add_forward(shape, n, Floats(x) + at, mean, spread, divisor, epsilon, weight,
                                  bias, Floats(residual) + at, Floats(y) + at);
      }
    });
  }
  void BatchNormGradient(Stream&, const BatchNormShape& shape, const Leaves& leaves, const void* x,
                         const void* y, const void* dy, const void* more, const Moments& moments,
                         float epsilon, void* g, float* sum_dy, float* sum_dy_xhat, int64_t stride,
                         const float*, const float*, const uint8_t*) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * shape.channels;
      const float* mean = moments.mean + l * moments.stride;
      const float* spread = moments.spread + l * moments.stride;
      const int64_t divisor = moments.divisor > 0 ? moments.divisor : n;
      if (g == nullptr) {
        k_.batch_norm_backward_sums(shape, n, Floats(x) + at, Behind(Floats(y), at),
                                    Floats(dy) + at, mean, spread, divisor, epsilon,
                                    sum_dy + l * stride, sum_dy_xhat + l * stride);
      } else {
        k_.batch_norm_gradient(shape, n, Floats(x) + at, Behind(Floats(y), at), Floats(dy) + at,
                               Behind(Floats(more), at), mean, spread, divisor, epsilon,
                               Floats(g) + at, sum_dy + l * stride, sum_dy_xhat + l * stride);
      }
    });
  }
  void BatchNormBackward(Stream&, const BatchNormShape& shape, const Leaves& leaves, const void* x,
                         const void* y, const void* dy, const Moments& moments, float epsilon,
                         const float* weight, const float* sum_dy, const float* sum_dy_xhat,
                         int64_t stride, void* dx, const float*) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * shape.channels;
      k_.batch_norm_backward(shape, n, Floats(x) + at, Behind(Floats(y), at), Floats(dy) + at,
                             moments.mean + l * moments.stride, moments.spread + l * moments.stride,
                             moments.divisor > 0 ? moments.divisor : n, epsilon, weight,
                             sum_dy + l * stride, sum_dy_xhat + l * stride, Floats(dx) + at);
    });
  }
  void UpdateRunningAverages(Stream&, int64_t channels, int64_t n, const float* mean,
                             const float* m2, float momentum, float* running_mean,
                             float* running_var) override {
    k_.update_running_averages(channels, n, mean, m2, momentum, running_mean, running_var);
  }

  void CopyStrided(Stream&, const StridedCopy& copy, int64_t rows, const float* x,
                   float* y) override {
    k_.copy_strided(copy, rows, x, y);
  }

  void ReluForward(Stream&, int64_t n, const void* x, void* y, ElementType) override {
    k_.relu_forward(n, Floats(x), Floats(y));
  }
  void ReluBackward(Stream&, int64_t n, const void* y, const void* dy, void* dx,
                    ElementType) override {
    k_.relu_backward(n, Floats(y), Floats(dy), Floats(dx));
  }
  void TanhForward(Stream&, int64_t n, const float* x, float* y) override {
    k_.tanh_forward(n, x, y);
  }
  void TanhBackward(Stream&, int64_t n, const float* y, const float* dy, float* dx) override {
    k_.tanh_backward(n, y, dy, dx);
  }
  void SigmoidForward(Stream&, int64_t n, const float* x, float* y) override {
    k_.sigmoid_forward(n, x, y);
  }
  void SigmoidBackward(Stream&, int64_t n, const float* y, const float* dy, float* dx) override {
    k_.sigmoid_backward(n, y, dy, dx);
  }
  void Add(Stream&, int64_t n, const void* a, const void* b, void* out, ElementType) override {
    k_.add(n, Floats(a), Floats(b), Floats(out));
  }
  void Dropout(Stream&, int64_t n, const float* x, float rate, PhiloxKey key,
               const StepScalars* scalars, uint64_t first, float* y) override {
    k_.dropout(n, x, rate, key, scalars->step, first, y);
  }

  void SoftmaxCrossEntropy(Stream&, const Leaves& leaves, int64_t classes, const float* logits,
                           const int32_t* labels, float smoothing, float scale, LeafResult* results,
                           float* dlogits) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * classes;
      LeafResult& r = results[l];
      if (smoothing > 0) {
        k_.smoothed_cross_entropy(n, classes, logits + at, labels + begin, smoothing, scale,
                                  &r.loss_sum, &r.correct, Behind(dlogits, at));
      } else {
        k_.softmax_cross_entropy(n, classes, logits + at, labels + begin, scale, &r.loss_sum,
                                 &r.correct, Behind(dlogits, at));
      }
    });
  }
  void SigmoidCrossEntropy(Stream&, const Leaves& leaves, int64_t features, const float* x,
                           const float* target, float scale, LeafResult* results,
                           float* dx) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * features;
      k_.sigmoid_cross_entropy(n, features, x + at, target + at, scale, &results[l].loss_sum,
                               Behind(dx, at));
    });
  }
  void MeanSquaredError(Stream&, const Leaves& leaves, int64_t features, const float* y,
                        const float* target, float scale, LeafResult* results, float* dy) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      const int64_t at = begin * features;
      k_.mean_squared_error(n, features, y + at, target + at, scale, &results[l].loss_sum,
                            Behind(dy, at));
    });
  }
  void CountCorrect(Stream&, const Leaves& leaves, int64_t classes, const float* scores,
                    const int32_t* labels, LeafResult* results) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      k_.count_correct(n, classes, scores + begin * classes, labels + begin, &results[l].correct);
    });
  }
  void OneHot(Stream&, int64_t rows, int64_t classes, const int32_t* labels, float* out) override {
    std::fill_n(out, rows * classes, 0.0f);
    for (int64_t r = 0; r < rows; ++r) out[r * classes + labels[r]] = 1.0f;
  }

  void LeakyReluForward(Stream&, int64_t n, float slope, const float* x, float* y) override {
    k_.leaky_relu_forward(n, slope, x, y);
  }
  void LeakyReluBackward(Stream&, int64_t n, float slope, const float* y, const float* dy,
                         float* dx) override {
    k_.leaky_relu_backward(n, slope, y, dy, dx);
  }
  void EluForward(Stream&, int64_t n, float alpha, const float* x, float* y) override {
    k_.elu_forward(n, alpha, x, y);
  }
  void EluBackward(Stream&, int64_t n, float alpha, const float* y, const float* dy,
                   float* dx) override {
    k_.elu_backward(n, alpha, y, dy, dx);
  }
  void SoftplusForward(Stream&, int64_t n, const float* x, float* y) override {
    k_.softplus_forward(n, x, y);
  }
  void SoftplusBackward(Stream&, int64_t n, const float* x, const float* dy, float* dx) override {
    k_.softplus_backward(n, x, dy, dx);
  }
  void Multiply(Stream&, int64_t n, const float* a, const float* b, float* out) override {
    k_.multiply(n, a, b, out);
  }
  void SoftmaxForward(Stream&, int64_t n, int64_t features, const float* x, float* y) override {
    k_.softmax_forward(n, features, x, y);
  }
  void SoftmaxBackward(Stream&, int64_t n, int64_t features, const float* y, const float* dy,
                       float* dx) override {
    k_.softmax_backward(n, features, y, dy, dx);
  }
  void LayerNormForward(Stream&, int64_t n, int64_t features, const float* x, float epsilon,
                        const float* weight, const float* bias, float* y, float* stats) override {
    k_.layer_norm_forward(n, features, x, epsilon, weight, bias, y, stats);
  }
  void LayerNormBackward(Stream&, int64_t n, int64_t features, const float* x, const float* stats,
                         const float* weight, const float* dy, float* dx) override {
    k_.layer_norm_backward(n, features, x, stats, weight, dy, dx);
  }
  void LayerNormBackwardWeight(Stream&, const Leaves& leaves, int64_t features, const float* x,
                               const float* stats, const float* dy, float* dweight, float* dbias,
                               int64_t stride) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      k_.layer_norm_backward_weight(n, features, x + begin * features, stats + 2 * begin,
                                    dy + begin * features, dweight + l * stride,
                                    dbias + l * stride);
    });
  }
  void EmbeddingForward(Stream&, int64_t n, int64_t vocabulary, int64_t features, const float* x,
                        const float* weight, float* y) override {
    k_.embedding_forward(n, vocabulary, features, x, weight, y);
  }
  void EmbeddingBackward(Stream&, const Leaves& leaves, int64_t vocabulary, int64_t features,
                         const float* x, const float* dy, float* dweight, int64_t stride) override {
    ForEachLeaf(leaves, [&](int l, int64_t begin, int64_t n) {
      k_.embedding_backward(n, vocabulary, features, x + begin, dy + begin * features,
                            dweight + l * stride);
    });
  }

  void TreeSum(Stream&, int64_t n, absl::Span<const float* const> parts, float* out) override {
    constexpr int64_t kBlock = 2048;
    float stack[7][kBlock];  // of a binary counter over kMostParts
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t length = std::min(kBlock, n - at);
      int top = 0;
      for (size_t part = 0; part < parts.size(); ++part) {
        std::copy_n(parts[part] + at, length, stack[top++]);
        // As many subtrees are whole as the number of parts has trailing zeros; the last closes
        // all.
        size_t whole = part + 1;
        for (; top > 1 && (whole % 2 == 0 || part + 1 == parts.size()); whole /= 2, --top) {
          k_.add(length, stack[top - 2], stack[top - 1], stack[top - 2]);
        }
      }
      std::copy_n(stack[0], length, out + at);
    }
  }
  void OptimizerUpdate(Stream&, const OptimizerCoefficients& coefficients, int64_t n,
                       const StepScalars* scalars, const float* gradient, float* parameters,
                       const OptimizerSlots& slots, uint16_t* rounded) override {
    if (scalars->apply == 0) return;
    k_.optimizer_update(coefficients, n, *scalars, gradient, parameters, slots);
    if (rounded != nullptr) b_.round(n, parameters, rounded);
  }
  void RoundToBf16(Stream&, int64_t n, const float* x, uint16_t* rounded) override {
    b_.round(n, x, rounded);
  }
  void SquaredNorms(Stream&, int64_t n, const float* x, double* sums) override {
    k_.squared_norms(n, x, sums);
  }
  void MergeLeafMoments(Stream&, int64_t channels, const Leaves& leaves, const float* mean,
                        const float* m2, int64_t stride, float* merged_mean,
                        float* merged_m2) override {
    MergeTree(channels, leaves, 1, mean, m2, stride, merged_mean, merged_m2);
  }
  void MergeStatistics(Stream&, int64_t count, const StatisticsSlice* slices, int64_t,
                       const Leaves& leaves, const float* records, int64_t stride,
                       float* merged) override {
    for (int64_t i = 0; i < count; ++i) {
      const StatisticsSlice& s = slices[i];
      const float* record = records + s.offset;
      MergeTree(s.channels, leaves, s.spatial, record, record + s.channels, stride,
                merged + s.offset, merged + s.offset + s.channels);
    }
  }
  void UpdateStatistics(Stream& stream, int64_t count, const StatisticsSlice* slices, int64_t,
                        int64_t rows, const float* merged, const StepScalars* scalars,
                        float* statistics) override {
    if (scalars->apply == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const StatisticsSlice& s = slices[i];
      const float* mean = merged + s.offset;
      UpdateRunningAverages(stream, s.channels, rows * s.spatial, mean, mean + s.channels,
                            s.momentum, statistics + s.running_mean, statistics + s.running_var);
    }
  }
  void OptimizerUpdatePieces(Stream& stream, const OptimizerCoefficients& coefficients,
                             int64_t count, const UpdatePiece* pieces, const StepScalars* scalars,
                             const float* gradient, float* parameters, const OptimizerSlots& slots,
                             uint16_t* rounded) override {
    for (int64_t i = 0; i < count; ++i) {
      const UpdatePiece& piece = pieces[i];
      OptimizerCoefficients own = coefficients;
      own.l2 = piece.l2;
      own.weight_decay = piece.weight_decay;
      own.rate_multiplier = piece.rate_multiplier;
      OptimizerSlots at;
      for (int k = 0; k < kMostSlots; ++k) at.at[k] = Behind(slots.at[k], piece.begin);
      OptimizerUpdate(stream, own, piece.end - piece.begin, scalars, gradient + piece.begin,
                      parameters + piece.begin, at, Behind(rounded, piece.begin));
    }
  }
  void SquaredNormsOf(Stream&, int64_t count, const NormBlock* blocks, const float* x,
                      double* sums) override {
    for (int64_t i = 0; i < count; ++i) {
      k_.squared_norms(blocks[i].length, x + blocks[i].begin, sums + i);
    }
  }
  void DigestPieces(Stream&, int64_t count, const DigestPiece* pieces, Digest* digests,
                    const StepScalars* scalars, int64_t ring) override {
    if (scalars != nullptr) {
      digests += static_cast<int64_t>(scalars->step % static_cast<uint64_t>(ring)) * count;
    }
    for (int64_t i = 0; i < count; ++i) {
      const DigestPiece& piece = pieces[i];
      digests[i] = Digest();
      k_.accumulate_digest(piece.count, piece.data, piece.tensor_key, piece.first_index,
                           &digests[i].lo, &digests[i].hi);
    }
  }
  void Gate(Stream& stream, const StepGate& gate, absl::Span<const float* const> parts,
            float* gradient) override {
    std::vector<const float*> of_block;
    for (int64_t b = 0; b < gate.block_count && !parts.empty(); ++b) {
      const NormBlock& block = gate.blocks[b];
      of_block.clear();
      for (const float* part : parts) of_block.push_back(part + block.begin);
      TreeSum(stream, block.length, of_block, gradient + block.begin);
    }
    SquaredNormsOf(stream, gate.block_count, gate.blocks, gradient, gate.squares);
    StepOutcome outcome{.step = gate.current->step};
    // In place, level by level: what a group is summed to lies before what is still to be read.
    std::vector<double> values(gate.squares, gate.squares + gate.block_count);
    const SumGroup* group = gate.groups;
    for (int level = 0; level < gate.levels; ++level) {
      for (int32_t g = 0; g < gate.level_groups[level]; ++g, ++group) {
        values[g] = SumByTree(values.data() + group->begin, group->count);
      }
    }
    outcome.gradient_norm = values.empty() ? 0 : std::sqrt(values[0]);
    double losses[kMostLeaves];
    for (int leaf = 0; leaf < gate.leaves; ++leaf) {
      losses[leaf] = gate.results[leaf].loss_sum;
      outcome.correct += gate.results[leaf].correct;
    }
    outcome.loss_sum = SumByTree(losses, gate.leaves);
    const bool finite = IsFinite(outcome.loss_sum) && IsFinite(outcome.gradient_norm);
    const bool poisoned = gate.poison != nullptr && *gate.poison != 0;
    outcome.applied = finite && !poisoned ? gate.update->apply : 0;
    const auto place = static_cast<int64_t>(outcome.step % static_cast<uint64_t>(gate.ring));
    *gate.update = gate.prepared[place];
    gate.update->gradient_scale =
        static_cast<float>(ClipScale(outcome.gradient_norm, gate.clip_norm));
    gate.update->apply = outcome.applied;
    ++gate.current->step;
    gate.outcomes[place] = outcome;
  }
  void FlagNonFinite(Stream&, int64_t n, const void* x, uint32_t* flag, ElementType) override {
    // Slots may share the flag.
    if (k_.has_non_finite(n, Floats(x))) std::atomic_ref<uint32_t>(*flag).fetch_or(1);
  }
  void AccumulateDigest(Stream&, int64_t n, const float* x, uint64_t tensor_key,
                        uint64_t first_index, Digest* digest) override {
    k_.accumulate_digest(n, x, tensor_key, first_index, &digest->lo, &digest->hi);
  }
  void GatherSamples(Stream&, const SampleShape& shape, int64_t count, SampleType type,
                     const void* data, const int64_t* offsets, const float* mean,
                     const float* inv_std, const Augmentation& augmentation, uint64_t step,
                     uint64_t first_position, float* out, const int32_t* labels,
                     int32_t* labels_out) override {
    if (labels_out != nullptr) std::copy_n(labels, count, labels_out);
    const int64_t bytes = type == SampleType::kUint8 ? 1 : sizeof(float);
    const auto sample = [&](int64_t i) {
      return static_cast<const uint8_t*>(data) + offsets[i] * bytes;
    };
    for (int64_t i = 0; i < count; ++i) {
      // Samples lie anywhere; past its first kilobytes the processor has seen where a sample leads.
      constexpr int64_t kAhead = 4096;
      if (i + 1 < count) PrefetchLines(sample(i + 1), std::min(kAhead, shape.features() * bytes));
      const SampleChange change =
          DrawChange(augmentation, shape, step, first_position + static_cast<uint64_t>(i));
      k_.gather_sample(shape, type, sample(i), change, mean, inv_std, out + i * shape.features());
    }
  }

 private:
  // Records of n = rows * spatial elements a channel, merged as collective/tree.h has it.
  void MergeTree(int64_t channels, const Leaves& leaves, int64_t spatial, const float* mean,
                 const float* m2, int64_t stride, float* merged_mean, float* merged_m2) const {
    struct Part {
      std::vector<float> mean, m2;
      int64_t count = 0;
    };
    std::vector<Part> stack;
    for (int l = 0; l < leaves.count; ++l) {
      const float *from = mean + l * stride, *from_m2 = m2 + l * stride;
      stack.push_back({{from, from + channels},
                       {from_m2, from_m2 + channels},
                       (leaves.begin[l + 1] - leaves.begin[l]) * spatial});
      const bool last = l + 1 == leaves.count;
      for (int whole = l + 1; stack.size() > 1 && (whole % 2 == 0 || last); whole /= 2) {
        const Part right = std::move(stack.back());
        stack.pop_back();
        Part& left = stack.back();
        k_.merge_moments(channels, left.count, left.mean.data(), left.m2.data(), right.count,
                         right.mean.data(), right.m2.data(), left.mean.data(), left.m2.data());
        left.count += right.count;
      }
    }
    std::copy_n(stack[0].mean.data(), channels, merged_mean);
    std::copy_n(stack[0].m2.data(), channels, merged_m2);
  }

  const Kernels& k_;
  const Bf16Kernels& b_;
  const std::string fingerprint_;
  const OnednnContext context_;
};

bool Supports(CpuIsa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == CpuIsa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == CpuIsa::kAvx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

CpuKernels KernelsOf(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx2:
      return {&avx2::kKernels, &avx2::kBf16Kernels};
    case CpuIsa::kAvx512:
      return {&avx512::kKernels, &avx512::kBf16Kernels};
    case CpuIsa::kAvx512Bf16:
      return {&avx512::kKernels, &avx512bf16::kBf16Kernels};
  }
  return {};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice() {
  for (const CpuIsa isa : {CpuIsa::kAvx512Bf16, CpuIsa::kAvx512}) {
    if (Supports(isa)) return MakeCpuDevice(isa);
  }
  return MakeCpuDevice(CpuIsa::kAvx2);
}

absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(CpuIsa isa) {
  const bool wide = isa != CpuIsa::kAvx2;
  if (!Supports(isa)) {
    return absl::UnimplementedError(
        absl::StrCat("the processor lacks ",
                     isa == CpuIsa::kAvx512Bf16 ? "AVX512_BF16"
                     : wide                     ? "AVX-512 (F, BW, DQ, VL)"
                                                : "AVX2 and FMA",
                     ", which the CPU device needs; use another machine"));
  }
  absl::Status status = UseOneThread();
  if (!status.ok()) return status;
  // Newer instruction sets than the one we name would change the bits. Only the first call in a
  // process, before any primitive, can succeed. What AVX512_BF16 brings is of use to bf16 alone.
  const dnnl::cpu_isa wanted = isa == CpuIsa::kAvx512Bf16 ? dnnl::cpu_isa::avx512_core_bf16
                               : wide                     ? dnnl::cpu_isa::avx512_core
                                                          : dnnl::cpu_isa::avx2;
  dnnl::set_max_cpu_isa(wanted);
  const dnnl_version_t* version = dnnl::version();
  std::string fingerprint = absl::StrCat("cpu ", wide ? "avx512" : "avx2", " onednn ",
                                         version->major, ".", version->minor, ".", version->patch);
  const dnnl::cpu_isa effective = dnnl::get_effective_cpu_isa();
  const bool bf16 = effective == dnnl::cpu_isa::avx512_core_bf16;
  if (effective != wanted && !(wide && bf16)) {
    absl::StrAppend(&fingerprint, " isa 0x", absl::Hex(static_cast<int>(effective)));
  }
  try {
    return std::make_unique<CpuDevice>(
        std::move(fingerprint),
        OnednnContext{dnnl::engine(dnnl::engine::kind::cpu, 0), std::make_shared<CallNumbers>(),
                      KernelsOf(isa), bf16 && isa == CpuIsa::kAvx512Bf16});
  } catch (const dnnl::error& e) {
    return absl::InternalError(absl::StrCat("oneDNN cannot use the CPU: ", e.what()));
  }
}

}  // namespace lockstep::device
