#include "worker/device/cuda/cuda_dense.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/device/cuda/cuda_stream.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/parts.h"

namespace lockstep::device::cuda {
namespace {

// Gradients of all leaves together that are kept until they are folded in one pass; of larger ones
// only those that wait for their sibling.
constexpr int64_t kMostLeafBytes = int64_t{64} << 20;

int64_t CeilLog2(int64_t n) {
  int64_t log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

// Where each part of a fold has its leaves, if all parts are the canonical tree over theirs.
struct PartLeaves {
  int begin = 0, end = 0;
};
bool IsCanonical(const LeafFold& fold, PartLeaves* parts) {
  struct Value {
    PartLeaves leaves;
    bool canonical = false;
  };
  std::array<Value, kMostFoldBuffers> values;
  const FoldPair* combine = fold.combines;
  for (int leaf = 0; leaf < fold.leaves; ++leaf) {
    values[static_cast<size_t>(fold.buffer[leaf])] = {{leaf, leaf + 1}, true};
    for (int i = 0; i < fold.combine_count[leaf]; ++i, ++combine) {
      Value& left = values[static_cast<size_t>(combine->left)];
      const Value& right = values[static_cast<size_t>(combine->right)];
      const int n = right.leaves.end - left.leaves.begin;
      left.canonical = left.canonical && right.canonical && left.leaves.end == right.leaves.begin &&
                       left.leaves.end - left.leaves.begin == 1 << (CeilLog2(n) - 1);
      left.leaves.end = right.leaves.end;
    }
  }
  for (int part = 0; part < fold.parts; ++part) {
    const Value& value = values[static_cast<size_t>(fold.part_buffer[part])];
    if (!value.canonical || value.leaves.end - value.leaves.begin > kMostParts) return false;
    parts[part] = value.leaves;
  }
  return true;
}

class CudaDense : public Dense {
 public:
  static absl::StatusOr<std::unique_ptr<Dense>> Make(Blas& blas, const DenseShape& shape,
                                                     absl::Span<const int64_t> rows) {
    auto dense = std::make_unique<CudaDense>(shape, *std::max_element(rows.begin(), rows.end()));
    RETURN_IF_ERROR(dense->MakeProducts(blas, rows));
    return dense;
  }

  CudaDense(const DenseShape& shape, int64_t most_rows)
      : s_(shape),
        most_leaves_(std::max<int64_t>(1, shape.most_leaves)),
        most_leaf_rows_(most_rows),
        most_rows_(std::min(most_rows * most_leaves_, Limit())) {}

  size_t scratch_bytes() const override {
    return std::max(FactorScratch(*this, nullptr).bytes, WeightScratch(*this, nullptr).bytes);
  }

  void Pack(Stream&, const float* weight, const uint16_t* rounded) override {
    weight_ = is_bf16() ? static_cast<const void*>(rounded) : weight;
  }

  void Forward(Stream& stream, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) override {
    const FactorScratch use(*this, scratch);
    const Queue& q = QueueOf(stream);
    // A row has the same bits in any call.
    for (int64_t row = 0; row < rows; row += most_rows_) {
      const int64_t count = std::min(most_rows_, rows - row);
      const void* const factor = Factor(q, *forward_, count * s_.in, x + row * s_.in, use.rounded);
      forward_->Run(q, count, factor, weight_, s_.bias ? bias : nullptr, y + row * s_.out,
                    use.workspace);
    }
  }

  void BackwardInput(Stream& stream, int64_t rows, const float* dy, float* dx,
                     void* scratch) override {
    const FactorScratch use(*this, scratch);
    const Queue& q = QueueOf(stream);
    for (int64_t row = 0; row < rows; row += most_rows_) {
      const int64_t count = std::min(most_rows_, rows - row);
      const void* const factor =
          Factor(q, *backward_input_, count * s_.out, dy + row * s_.out, use.rounded);
      backward_input_->Run(q, count, factor, weight_, nullptr, dx + row * s_.in, use.workspace);
    }
  }

  // What rounds its factors by itself is given the floats as they are.
  bool ForwardThenNorm(Stream& stream, const Leaves& leaves, const float* x, const float* bias,
                       float* y, const NormForward& norm) override {
    return !Rounds(*forward_) && leaves.total() <= most_rows_ &&
           forward_->RunThenNorm(QueueOf(stream), leaves, x, weight_, s_.bias ? bias : nullptr, y,
                                 norm);
  }

  bool BackwardInputThenNorm(Stream& stream, const Leaves& leaves, const float* dy,
                             const NormBackward& norm) override {
    return !Rounds(*backward_input_) && leaves.total() <= most_rows_ &&
           backward_input_->RunThenNormBackward(QueueOf(stream), leaves, dy, weight_, norm);
  }

  void BackwardWeight(Stream& stream, Stream& bias_stream, const LeafFold& fold,
                      const int64_t* rows, const float* const* x, const float* const* dy,
                      float* const* dw, float* const* db, void* scratch) override {
    const Queue &q = QueueOf(stream), &bias_q = QueueOf(bias_stream);
    if (fold.leaves > most_leaves_) {
      return Fail(q, absl::StrCat("a dense layer was given ", fold.leaves,
                                  " leaves; it was made for ", most_leaves_));
    }
    for (int leaf = 0; leaf < fold.leaves; ++leaf) {
      if (backward_weight_.contains(rows[leaf])) continue;
      return Fail(q, absl::StrCat("a dense layer was called with ", rows[leaf],
                                  " rows, for which it was not made"));
    }
    const WeightScratch use(*this, scratch);
    if (IsIdentity(fold)) return LeavesApart(q, bias_q, fold.leaves, rows, x, dy, dw, db, use);
    std::array<PartLeaves, kMostFoldBuffers> parts;
    const bool canonical = fold.parts <= kMostFoldBuffers && IsCanonical(fold, parts.data());
    const auto product = [&](int leaf, float* gradient) {
      const int64_t n = rows[leaf];
      Product& weights = *backward_weight_.at(n);
      const void* const dy_factor = Factor(q, weights, n * s_.out, dy[leaf], use.dy);
      const void* const x_factor = Factor(q, weights, n * s_.in, x[leaf], use.x);
      weights.Run(q, s_.out, dy_factor, x_factor, nullptr, gradient, use.workspace);
    };
    if (canonical && KeepsLeaves()) {
      FoldTogether(q, fold, parts.data(), Weights(), use.gradients, dw, product);
    } else {
      FoldOneByOne(q, fold, Weights(), use.gradients, dw, product);
    }
    if (!s_.bias) return;
    const auto sums = [&](int leaf, float* gradient) {
      ColumnSums(bias_q, Leaves(rows[leaf]), s_.out, dy[leaf], gradient, 0);
    };
    if (canonical) {
      FoldTogether(bias_q, fold, parts.data(), s_.out, use.sums, db, sums);
    } else {
      FoldOneByOne(bias_q, fold, s_.out, use.sums, db, sums);
    }
  }

 private:
  struct FactorScratch {
    FactorScratch(const CudaDense& dense, void* scratch) {
      Parts parts(scratch);
      workspace = parts.Take(kProductWorkspaceBytes);
      const int64_t features = std::max(dense.Rounds(*dense.forward_) ? dense.s_.in : 0,
                                        dense.Rounds(*dense.backward_input_) ? dense.s_.out : 0);
      if (features > 0) rounded = parts.TakeBf16(dense.most_rows_ * features);
      bytes = parts.taken();
    }
    void* workspace;
    uint16_t* rounded = nullptr;
    size_t bytes;
  };
  struct WeightScratch {
    WeightScratch(const CudaDense& dense, void* scratch) {
      Parts parts(scratch);
      workspace = parts.Take(kProductWorkspaceBytes);
      const bool rounds =
          std::any_of(dense.backward_weight_.begin(), dense.backward_weight_.end(),
                      [&](const auto& product) { return dense.Rounds(*product.second); });
      if (rounds) {
        x = parts.TakeBf16(dense.most_leaf_rows_ * dense.most_leaves_ * dense.s_.in);
        dy = parts.TakeBf16(dense.most_leaf_rows_ * dense.most_leaves_ * dense.s_.out);
      }
      const int64_t leaves = dense.most_leaves_;
      // One leaf's is written where it is wanted. Of many, those that wait (tree.h): where the
      // leaves are cut is not known here.
      const int64_t waiting =
          std::min<int64_t>(std::min<int64_t>(leaves, kMostFoldBuffers), 2 * CeilLog2(leaves) + 1);
      const int64_t kept = leaves == 1 ? 0 : dense.KeepsLeaves() ? leaves : waiting;
      gradients = parts.TakeFloats(kept * Stride(dense.Weights()));
      if (dense.s_.bias && leaves > 1) {
        sums = parts.TakeFloats(std::max<int64_t>(leaves, kMostFoldBuffers) * Stride(dense.s_.out));
      }
      bytes = parts.taken();
    }
    void* workspace;
    uint16_t *x = nullptr, *dy = nullptr;
    float *gradients, *sums = nullptr;
    size_t bytes;
  };

  // From one gradient to the next, so that each is aligned.
  static int64_t Stride(int64_t n) { return (n + 63) / 64 * 64; }

  // All leaves' gradients, then each part's tree in one pass.
  template <class Compute>
  static void FoldTogether(const Queue& q, const LeafFold& fold, const PartLeaves* parts, int64_t n,
                           float* memory, float* const* results, const Compute& compute) {
    for (int part = 0; part < fold.parts; ++part) {
      const PartLeaves leaves = parts[part];
      const int count = leaves.end - leaves.begin;
      if (count == 1) {
        compute(leaves.begin, results[part]);
        continue;
      }
      std::array<const float*, kMostParts> values;
      for (int i = 0; i < count; ++i) {
        float* const value = memory + (leaves.begin + i) * Stride(n);
        compute(leaves.begin + i, value);
        values[static_cast<size_t>(i)] = value;
      }
      TreeSum(q, n, values.data(), count, results[part]);
    }
  }

  // In the order that the fold says. A buffer that becomes a part is that from the start.
  template <class Compute>
  static void FoldOneByOne(const Queue& q, const LeafFold& fold, int64_t n, float* memory,
                           float* const* results, const Compute& compute) {
    std::array<float*, kMostFoldBuffers> buffers = {};
    for (int part = 0; part < fold.parts; ++part) {
      buffers[static_cast<size_t>(fold.part_buffer[part])] = results[part];
    }
    const auto buffer = [&](int i) {
      float*& at = buffers[static_cast<size_t>(i)];
      if (at == nullptr) at = std::exchange(memory, memory + Stride(n));
      return at;
    };
    const FoldPair* combine = fold.combines;
    for (int leaf = 0; leaf < fold.leaves; ++leaf) {
      compute(leaf, buffer(fold.buffer[leaf]));
      for (int i = 0; i < fold.combine_count[leaf]; ++i, ++combine) {
        float* const left = buffer(combine->left);
        Add(q, n, left, buffer(combine->right), left);
      }
    }
  }

  static bool IsIdentity(const LeafFold& fold) {
    if (fold.parts != fold.leaves) return false;
    for (int i = 0; i < fold.leaves; ++i) {
      if (fold.combine_count[i] != 0 || fold.part_buffer[i] != fold.buffer[i]) return false;
    }
    return true;
  }

  // Leaves of as many rows each that lie one behind the other, with their gradients evenly spaced,
  // are one call of the library.
  void LeavesApart(const Queue& q, const Queue& bias_q, int count, const int64_t* rows,
                   const float* const* x, const float* const* dy, float* const* dw,
                   float* const* db, const WeightScratch& use) {
    for (int first = 0, next; first < count; first = next) {
      const int64_t n = rows[first];
      const int64_t stride = first + 1 < count ? dw[first + 1] - dw[first] : 0;
      Leaves leaves(n);
      next = first + 1;
      while (next < count && leaves.count < kMostLeaves && rows[next] == n &&
             x[next] == x[next - 1] + n * s_.in && dy[next] == dy[next - 1] + n * s_.out &&
             dw[next] == dw[next - 1] + stride && (!s_.bias || db[next] == db[next - 1] + stride)) {
        leaves.begin[leaves.count + 1] = leaves.begin[leaves.count] + n;
        ++leaves.count;
        ++next;
      }
      Product& weights = *backward_weight_.at(n);
      const void* const dy_factor = Factor(q, weights, leaves.total() * s_.out, dy[first], use.dy);
      const void* const x_factor = Factor(q, weights, leaves.total() * s_.in, x[first], use.x);
      weights.RunBatch(q, leaves.count, dy_factor, n * s_.out, x_factor, n * s_.in, dw[first],
                       stride, use.workspace);
      if (s_.bias) ColumnSums(bias_q, leaves, s_.out, dy[first], db[first], stride);
    }
  }

  bool is_bf16() const { return s_.precision == Precision::kBf16; }
  int64_t Weights() const { return s_.in * s_.out; }
  bool KeepsLeaves() const {
    return most_leaves_ * Stride(Weights()) * static_cast<int64_t>(sizeof(float)) <= kMostLeafBytes;
  }
  // Rows of a call of the library, whose matrices then have fewer than 2^31 elements.
  int64_t Limit() const {
    return std::max<int64_t>(1, std::numeric_limits<int32_t>::max() / std::max(s_.in, s_.out));
  }

  // Whether its factors are rounded before it.
  bool Rounds(const Product& product) const { return is_bf16() && !product.takes_floats(); }
  // n floats as a product takes them.
  const void* Factor(const Queue& q, const Product& product, int64_t n, const float* x,
                     uint16_t* rounded) const {
    if (!Rounds(product)) return x;
    RoundToBf16(q, n, x, rounded);
    return rounded;
  }

  absl::Status MakeProducts(Blas& blas, absl::Span<const int64_t> rows) {
    ProductShape base;
    base.factors = FactorsOf(s_.precision);
    base.floats = true;
    ProductShape shape = base;  // y = x W^T + b
    shape.transpose_b = true;
    shape.m = most_rows_;
    shape.n = s_.out;
    shape.k = s_.in;
    shape.bias = s_.bias;
    shape.relu = s_.activation == Activation::kRelu;
    ASSIGN_OR_RETURN(forward_, blas.MakeProduct(shape));
    shape = base;  // dx = dy W
    shape.m = most_rows_;
    shape.n = s_.in;
    shape.k = s_.out;
    ASSIGN_OR_RETURN(backward_input_, blas.MakeProduct(shape));
    for (const int64_t count : rows) {
      shape = base;  // dW = dy^T x
      shape.transpose_a = true;
      shape.m = s_.out;
      shape.n = s_.in;
      shape.k = count;
      ASSIGN_OR_RETURN(backward_weight_[count], blas.MakeProduct(shape));
    }
    return absl::OkStatus();
  }

  const DenseShape s_;
  const int64_t most_leaves_, most_leaf_rows_;
  const int64_t most_rows_;  // of one call of the library
  const void* weight_ = nullptr;
  std::unique_ptr<Product> forward_, backward_input_;
  std::map<int64_t, std::unique_ptr<Product>> backward_weight_;  // by rows
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dense>> MakeCudaDense(Blas& blas, const DenseShape& shape,
                                                     absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1 || rows.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("dense of ", shape.in, " inputs and ", shape.out,
                                                   " outputs; both must be positive"));
  }
  for (const int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("dense was asked for ", count, " rows; at least 1 is accepted"));
    }
  }
  return CudaDense::Make(blas, shape, rows);
}

}  // namespace lockstep::device::cuda
