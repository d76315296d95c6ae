#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

// The rows of op(A) that an algorithm is chosen for where their number varies.
constexpr int64_t kCanonicalRows = 128;
constexpr int kCandidates = 32;

absl::Status ToStatus(cublasStatus_t status, absl::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cuBLASLt: ", what, ": ", cublasLtGetStatusString(status)));
}

// Shared by the products, which may outlive the Blas that made them.
class Library {
 public:
  explicit Library(cublasLtHandle_t handle) : handle_(handle) {}
  ~Library() { cublasLtDestroy(handle_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  cublasLtHandle_t handle() const { return handle_; }

 private:
  const cublasLtHandle_t handle_;
};

ProductShape Packed(ProductShape s) {
  if (s.a_row == 0) s.a_row = s.transpose_a ? s.m : s.k;
  if (s.b_row == 0) s.b_row = s.transpose_b ? s.k : s.n;
  if (s.c_row == 0) s.c_row = s.n;
  return s;
}

std::string Describe(const ProductShape& s) {
  return absl::StrCat(s.m, "x", s.k, s.transpose_a ? " (transposed)" : "", " by ", s.k, "x", s.n,
                      s.transpose_b ? " (transposed)" : "");
}

// Several products in one call.
struct Batch {
  int count = 1;
  int64_t a = 0, b = 0, c = 0;  // elements from one to the next, of our A, B and C
};

// A row-major matrix is a column-major one that is transposed: the library is asked for C^T {n, m}
// = op(B)^T op(A)^T, so that its A is our B.
struct Problem {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, c;

  absl::Status Init(const ProductShape& s, int64_t m, const void* bias, const Batch& batch = {}) {
    const cublasComputeType_t compute =
        s.factors == Factors::kTf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    RETURN_IF_ERROR(ToStatus(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F), "a product"));
    const cublasOperation_t op_a = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSA, op_a));
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSB, op_b));
    if (bias != nullptr) {
      RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS));
      RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias));
    }
    const cudaDataType_t type = s.factors == Factors::kBf16 ? CUDA_R_16BF : CUDA_R_32F;
    RETURN_IF_ERROR(s.transpose_b ? Layout(&a, type, s.k, s.n, s.b_row)
                                  : Layout(&a, type, s.n, s.k, s.b_row));
    RETURN_IF_ERROR(s.transpose_a ? Layout(&b, type, m, s.k, s.a_row)
                                  : Layout(&b, type, s.k, m, s.a_row));
    RETURN_IF_ERROR(Layout(&c, CUDA_R_32F, s.n, m, s.c_row));
    if (batch.count == 1) return absl::OkStatus();
    RETURN_IF_ERROR(Repeat(&a, batch.count, batch.b));
    RETURN_IF_ERROR(Repeat(&b, batch.count, batch.a));
    return Repeat(&c, batch.count, batch.c);
  }

 private:
  template <class T>
  absl::Status Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    return ToStatus(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value)),
                    "describing a product");
  }
  static absl::Status Repeat(cublasLtMatrixLayout_t layout, int32_t count, int64_t stride) {
    RETURN_IF_ERROR(ToStatus(cublasLtMatrixLayoutSetAttribute(
                                 layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
                             "describing matrices"));
    return ToStatus(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                         &stride, sizeof(stride)),
        "describing matrices");
  }
  static absl::Status Layout(cublasLtMatrixLayout_t layout, cudaDataType_t type, int64_t rows,
                             int64_t columns, int64_t leading) {
    return ToStatus(cublasLtMatrixLayoutInit(layout, type, static_cast<uint64_t>(rows),
                                             static_cast<uint64_t>(columns), leading),
                    "describing a matrix");
  }
};

template <class T>
T ConfigOf(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value = {};
  size_t written = 0;
  static_cast<void>(
      cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written));
  return value;
}

// Its arithmetic is what the factors say: fp32 not by way of narrower types.
bool IsFit(const cublasLtMatmulAlgo_t& algorithm, const ProductShape& s) {
  if (s.factors == Factors::kFp32) {
    uint64_t flags = 0;
    size_t written = 0;
    if (cublasLtMatmulAlgoCapGetAttribute(&algorithm, CUBLASLT_ALGO_CAP_NUMERICAL_IMPL_FLAGS,
                                          &flags, sizeof(flags),
                                          &written) != CUBLAS_STATUS_SUCCESS ||
        (flags & CUBLASLT_NUMERICAL_IMPL_FLAGS_TENSOR_OP_MASK) != 0) {
      return false;
    }
  }
  const auto splits = ConfigOf<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return s.transpose_a || splits == 0 || splits == 1;
}

std::string NameOf(const cublasLtMatmulAlgo_t& a) {
  return absl::StrCat("algorithm ", ConfigOf<int32_t>(a, CUBLASLT_ALGO_CONFIG_ID), " tile ",
                      ConfigOf<uint32_t>(a, CUBLASLT_ALGO_CONFIG_TILE_ID), " stages ",
                      ConfigOf<uint32_t>(a, CUBLASLT_ALGO_CONFIG_STAGES_ID), " splits ",
                      ConfigOf<int32_t>(a, CUBLASLT_ALGO_CONFIG_SPLITK_NUM), " reduction ",
                      ConfigOf<uint32_t>(a, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME), " swizzle ",
                      ConfigOf<uint32_t>(a, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING), " option ",
                      ConfigOf<uint32_t>(a, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION), " inner ",
                      ConfigOf<uint16_t>(a, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID), " cluster ",
                      ConfigOf<uint16_t>(a, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID));
}

// Outputs of a block, and how well its threads are used, on a scale of our own.
struct Tile {
  uint32_t id;
  int64_t rows, columns;
  double efficiency;
};
constexpr Tile kTiles[] = {
    {CUBLASLT_MATMUL_TILE_32x32, 32, 32, 0.35},    {CUBLASLT_MATMUL_TILE_32x64, 32, 64, 0.5},
    {CUBLASLT_MATMUL_TILE_64x32, 64, 32, 0.5},     {CUBLASLT_MATMUL_TILE_64x64, 64, 64, 0.7},
    {CUBLASLT_MATMUL_TILE_64x128, 64, 128, 0.85},  {CUBLASLT_MATMUL_TILE_128x64, 128, 64, 0.85},
    {CUBLASLT_MATMUL_TILE_128x128, 128, 128, 1.0}, {CUBLASLT_MATMUL_TILE_256x128, 256, 128, 1.0},
    {CUBLASLT_MATMUL_TILE_128x256, 128, 256, 1.0}};

// Of a problem, all that its algorithm may depend on; m is of the shape where op(A) is transposed.
std::string KeyOf(const ProductShape& s) {
  return absl::StrCat("cublaslt ", cublasLtGetVersion(), " factors ", static_cast<int>(s.factors),
                      s.transpose_a ? absl::StrCat(" m ", s.m, "t") : "", " n ", s.n,
                      s.transpose_b ? "t" : "", " k ", s.k, " rows ", s.a_row, " ", s.b_row, " ",
                      s.c_row, s.accumulate ? " accumulate" : "", s.bias ? " bias" : "",
                      s.relu ? " relu" : "", " alignment ", s.alignment);
}

class LtProduct : public Product {
 public:
  LtProduct(std::shared_ptr<const Library> library, const ProductShape& shape)
      : library_(std::move(library)), s_(Packed(shape)) {}

  // Takes the algorithm from the book, where it has one.
  absl::Status Init(AlgorithmBook& book) {
    const std::string key = KeyOf(s_);
    const std::optional<std::string> given = book.Find(key);
    if (!given.has_value()) {
      RETURN_IF_ERROR(Choose());
      book.Add(key, std::string(reinterpret_cast<const char*>(&algorithm_), sizeof(algorithm_)));
      return absl::OkStatus();
    }
    const bool whole = given->size() == sizeof(algorithm_);
    if (whole) std::memcpy(&algorithm_, given->data(), sizeof(algorithm_));
    if (whole && Serves(algorithm_, s_.m)) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        "this GPU cannot compute a product of ", Describe(s_), " by the job's algorithm",
        whole ? absl::StrCat(", ", NameOf(algorithm_)) : " (which is not one)"));
  }

  void Run(const Queue& queue, int64_t m, const void* a, const void* b, const float* bias, float* c,
           void* workspace) override {
    const absl::Status status = Enqueue(queue, m, a, b, bias, c, workspace);
    if (!status.ok()) {
      Fail(queue, absl::StrCat(status.message(), "; in a product of ", Describe(s_)));
    }
    // Not the library's own relu: that one turns NaN into 0 and so hides what went wrong.
    if (s_.relu) BiasForward(queue, m * s_.n, s_.n, c, s_.bias ? bias : nullptr, true, c);
  }

  void RunBatch(const Queue& queue, int count, const void* a, int64_t a_stride, const void* b,
                int64_t b_stride, float* c, int64_t c_stride, void* workspace) override {
    if (count > 1 && ServesBatch(count, a_stride, b_stride, c_stride)) {
      const absl::Status status =
          Enqueue(queue, s_.m, a, b, nullptr, c, workspace, {count, a_stride, b_stride, c_stride});
      if (!status.ok()) Fail(queue, std::string(status.message()));
      return;
    }
    const int64_t bytes = s_.factors == Factors::kBf16 ? 2 : 4;
    for (int i = 0; i < count; ++i) {
      Run(queue, s_.m, static_cast<const char*>(a) + i * a_stride * bytes,
          static_cast<const char*>(b) + i * b_stride * bytes, nullptr, c + i * c_stride, workspace);
    }
  }

  std::string algorithm() const override { return NameOf(algorithm_); }

 private:
  absl::Status Choose() {
    cublasLtMatmulPreferenceOpaque_t preference;
    RETURN_IF_ERROR(Prefer(&preference));
    const int64_t canonical = s_.transpose_a ? s_.m : kCanonicalRows;
    Problem problem;
    RETURN_IF_ERROR(problem.Init(s_, canonical, AnyBias()));
    std::array<cublasLtMatmulHeuristicResult_t, kCandidates> candidates;
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        library_->handle(), &problem.operation, &problem.a, &problem.b, &problem.c, &problem.c,
        &preference, kCandidates, candidates.data(), &count);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) {
      return ToStatus(status, absl::StrCat("choosing an algorithm for ", Describe(s_)));
    }
    double least = 0;
    const auto consider = [&](const cublasLtMatmulAlgo_t& algorithm) {
      if (!IsFit(algorithm, s_) || !Serves(algorithm, s_.m)) return;
      if (!s_.transpose_a && (!Serves(algorithm, 1) || !Serves(algorithm, canonical))) return;
      const double cost = Cost(algorithm, canonical);
      if (least > 0 && cost >= least) return;
      algorithm_ = algorithm;
      least = cost;
    };
    for (int i = 0; i < count; ++i) {
      const cublasLtMatmulHeuristicResult_t& candidate = candidates[static_cast<size_t>(i)];
      if (candidate.state != CUBLAS_STATUS_SUCCESS) continue;
      consider(candidate.algo);
      if (least > 0 && s_.factors != Factors::kFp32) return absl::OkStatus();
      if (s_.factors != Factors::kFp32) continue;
      // The library has tiles in mind that fill a GPU when they split along k, or are many.
      for (const Tile& tile : kTiles) {
        cublasLtMatmulAlgo_t changed = candidate.algo;
        const uint32_t id = tile.id;
        if (cublasLtMatmulAlgoConfigSetAttribute(&changed, CUBLASLT_ALGO_CONFIG_TILE_ID, &id,
                                                 sizeof(id)) == CUBLAS_STATUS_SUCCESS) {
          consider(changed);
        }
      }
    }
    if (least > 0) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat("cuBLASLt ", cublasLtGetVersion(), ": none of ",
                                                 count, " algorithms computes a product of ",
                                                 Describe(s_), " for every number of rows"));
  }

  // What it takes of a GPU of fixed size: blocks run in waves, each as long as a block's work. Of
  // tiles that are not in the table nothing is known: last.
  double Cost(const cublasLtMatmulAlgo_t& algorithm, int64_t m) const {
    constexpr int64_t kMultiprocessors = 132;
    const auto id = ConfigOf<uint32_t>(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID);
    const auto splits = std::max(1, ConfigOf<int32_t>(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM));
    for (const Tile& tile : kTiles) {
      if (tile.id != id) continue;
      const int64_t tiles = CeilDiv(s_.n, tile.rows) * CeilDiv(m, tile.columns) * splits;
      return static_cast<double>(CeilDiv(tiles, kMultiprocessors) * tile.rows * tile.columns) *
             (static_cast<double>(s_.k) / splits + (splits > 1 ? 64 : 0)) / tile.efficiency;
    }
    return 1e300;
  }

  bool ServesBatch(int count, int64_t a, int64_t b, int64_t c) const {
    Problem problem;
    cublasLtMatmulHeuristicResult_t result = {};
    return problem.Init(s_, s_.m, AnyBias(), {count, a, b, c}).ok() &&
           cublasLtMatmulAlgoCheck(library_->handle(), &problem.operation, &problem.a, &problem.b,
                                   &problem.c, &problem.c, &algorithm_,
                                   &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kProductWorkspaceBytes;
  }

  // Whether the library adds the bias.
  bool HasEpilogue() const { return s_.bias && !s_.relu; }

  absl::Status Enqueue(const Queue& queue, int64_t m, const void* a, const void* b,
                       const float* bias, float* c, void* workspace,
                       const Batch& batch = {}) const {
    Problem problem;
    RETURN_IF_ERROR(problem.Init(s_, m, HasEpilogue() ? bias : nullptr, batch));
    const float alpha = 1, beta = s_.accumulate ? 1 : 0;
    return ToStatus(cublasLtMatmul(library_->handle(), &problem.operation, &alpha, b, &problem.a, a,
                                   &problem.b, &beta, c, &problem.c, c, &problem.c, &algorithm_,
                                   workspace, kProductWorkspaceBytes, queue.stream),
                    "cublasLtMatmul");
  }

  // Stands for a bias where only its alignment matters.
  const void* AnyBias() const {
    return HasEpilogue() ? reinterpret_cast<const void*>(uintptr_t{FloatAlignment(s_.alignment)})
                         : nullptr;
  }

  absl::Status Prefer(cublasLtMatmulPreference_t preference) const {
    RETURN_IF_ERROR(ToStatus(cublasLtMatmulPreferenceInit(preference), "preferences"));
    const auto set = [preference](cublasLtMatmulPreferenceAttributes_t attribute,
                                  const auto& value) {
      return ToStatus(
          cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
          "preferences");
    };
    const uint64_t workspace = kProductWorkspaceBytes;
    RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace));
    const uint32_t reductions =
        s_.transpose_a ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions));
    const int64_t bytes = s_.factors == Factors::kBf16 ? 2 : 4;
    RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, Alignment(s_.b_row * bytes)));
    RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, Alignment(s_.a_row * bytes)));
    const uint32_t c = FloatAlignment(Alignment(s_.c_row * static_cast<int64_t>(sizeof(float))));
    RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c));
    return set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c);
  }
  // What is promised of bf16 may be less than floats always have.
  static uint32_t FloatAlignment(int64_t promised) {
    return static_cast<uint32_t>(std::max<int64_t>(promised, sizeof(float)));
  }
  // Of a matrix that may begin at any row of its memory.
  uint32_t Alignment(int64_t row_bytes) const {
    return static_cast<uint32_t>(std::gcd(s_.alignment, row_bytes));
  }

  bool Serves(const cublasLtMatmulAlgo_t& algorithm, int64_t m) const {
    Problem problem;
    cublasLtMatmulHeuristicResult_t result = {};
    return problem.Init(s_, m, AnyBias()).ok() &&
           cublasLtMatmulAlgoCheck(library_->handle(), &problem.operation, &problem.a, &problem.b,
                                   &problem.c, &problem.c, &algorithm,
                                   &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kProductWorkspaceBytes;
  }

  const std::shared_ptr<const Library> library_;
  const ProductShape s_;
  cublasLtMatmulAlgo_t algorithm_ = {};
};

class LtBlas : public Blas {
 public:
  LtBlas(std::shared_ptr<const Library> library, std::shared_ptr<AlgorithmBook> book)
      : library_(std::move(library)), book_(std::move(book)) {}

  std::string version() const override {
    const size_t version = cublasLtGetVersion();
    return absl::StrCat("cublaslt ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  }

  absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape& shape) override {
    const ProductShape s = Packed(shape);
    if (s.m < 1 || s.n < 1 || s.k < 1 || s.alignment < 1 || s.a_row < (s.transpose_a ? s.m : s.k) ||
        s.b_row < (s.transpose_b ? s.k : s.n) || s.c_row < s.n || (s.relu && s.c_row != s.n)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a product of ", Describe(s), "; sizes must be positive and rows fit their strides"));
    }
    auto product = std::make_unique<LtProduct>(library_, s);
    RETURN_IF_ERROR(product->Init(*book_));
    return product;
  }

 private:
  const std::shared_ptr<const Library> library_;
  const std::shared_ptr<AlgorithmBook> book_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Blas>> MakeBlas(std::shared_ptr<AlgorithmBook> book) {
  cublasLtHandle_t handle = nullptr;
  const cublasStatus_t status = cublasLtCreate(&handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return absl::UnavailableError(
        absl::StrCat("cuBLASLt cannot be used: ", cublasLtGetStatusString(status)));
  }
  if (book == nullptr) book = std::make_shared<AlgorithmBook>();
  return std::make_unique<LtBlas>(std::make_shared<const Library>(handle), std::move(book));
}

}  // namespace lockstep::device::cuda
