// Matrix products: the vendor's library (cuBLASLt) behind a thin wrapper, which the SIMT emulator
// answers with reference code, and our own (own_products.h). Everything is row-major.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cuda/algorithm_book.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

// What the factors are stored and multiplied as; sums and results are fp32.
enum class Factors { kFp32, kTf32, kBf16 };
inline Factors FactorsOf(Precision precision) {
  if (precision == Precision::kBf16) return Factors::kBf16;
  return precision == Precision::kTf32 ? Factors::kTf32 : Factors::kFp32;
}

struct ProductShape {
  // C {m, n} = op(A) op(B): op(A) is {m, k}, stored {k, m} where transposed; op(B) {k, n} likewise.
  bool transpose_a = false, transpose_b = false;
  int64_t m = 0, n = 0, k = 0;
  int64_t a_row = 0, b_row = 0, c_row = 0;  // elements from a stored row to the next; 0: packed
  bool accumulate = false;                  // C += instead of C =
  bool bias = false;                        // + bias {n}
  bool relu = false;
  Factors factors = Factors::kFp32;
  // bf16 factors that are no weights, A and, where op(A) is transposed, B, may be given as fp32, if
  // the product says that it takes_floats(): it rounds them to nearest even.
  bool floats = false;
  // Bytes that divide the addresses of A, B and C, which are rows of flat vectors or activations;
  // a stored row's own size is taken into account.
  int64_t alignment = 16;
};

// One shape, made ready. Where op(A) is not transposed, an element's bits depend on its row of
// op(A), its column of op(B) and, of the shape, on everything but m: the library's algorithm is
// chosen by its heuristic for a fixed m, kept for all, and never splits along k. Where it is, rows
// of C are not samples, and m belongs to the shape. Thread-safe.
class Product {
 public:
  virtual ~Product() = default;
  // m is at most the shape's (equal to it where op(A) is transposed); `workspace` of
  // kProductWorkspaceBytes, 256-byte aligned.
  virtual void Run(const Queue& queue, int64_t m, const void* a, const void* b, const float* bias,
                   float* c, void* workspace) = 0;
  // `count` products of the whole shape whose factors and results lie so many elements apart, each
  // with the bits that it has alone.
  virtual void RunBatch(const Queue& queue, int count, const void* a, int64_t a_stride,
                        const void* b, int64_t b_stride, float* c, int64_t c_stride,
                        void* workspace) = 0;
  // Run and a batch norm of what it makes, as Dense::ForwardThenNorm and BackwardInputThenNorm.
  virtual bool RunThenNorm(const Queue&, const Leaves& /*leaves*/, const void* /*a*/,
                           const void* /*b*/, const float* /*bias*/, float* /*c*/,
                           const NormForward&) {
    return false;
  }
  virtual bool RunThenNormBackward(const Queue&, const Leaves& /*leaves*/, const void* /*a*/,
                                   const void* /*b*/, const NormBackward&) {
    return false;
  }
  // Whether it is given what the shape's `floats` offers, and nothing else.
  virtual bool takes_floats() const { return false; }
  // Names the chosen algorithm, for the fingerprint.
  virtual std::string algorithm() const = 0;
};
constexpr size_t kProductWorkspaceBytes = size_t{32} << 20;

class Blas {
 public:
  virtual ~Blas() = default;
  virtual std::string version() const = 0;  // "cublaslt 13.1.0"
  virtual absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape& shape) = 0;
};
// For the current device; Unavailable where the library cannot be used. Products are computed as
// the book says, and what is chosen for others is written there (null: a book of its own).
absl::StatusOr<std::unique_ptr<Blas>> MakeBlas(std::shared_ptr<AlgorithmBook> book = nullptr);

}  // namespace lockstep::device::cuda
