// Matrix products through the vendor's library (cuBLASLt): a thin wrapper that the SIMT emulator
// answers with reference code. Everything is row-major.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/device/cuda/launch.h"

namespace lockstep::device::cuda {

// What the factors are stored and multiplied as; sums and results are fp32.
enum class Factors { kFp32, kTf32, kBf16 };

struct ProductShape {
  // C {m, n} = op(A) op(B): op(A) is {m, k}, stored {k, m} where transposed; op(B) {k, n} likewise.
  bool transpose_a = false, transpose_b = false;
  int64_t m = 0, n = 0, k = 0;
  int64_t a_row = 0, b_row = 0, c_row = 0;  // elements from a stored row to the next; 0: packed
  bool accumulate = false;                  // C += instead of C =
  bool bias = false;                        // + bias {n}
  bool relu = false;
  Factors factors = Factors::kFp32;
};

// One shape, made ready. An element's bits depend on its row of op(A), its column of op(B) and, of
// the shape, on everything but m: the algorithm is chosen by the library's heuristic for a fixed m
// and kept for all. Never split along k. Thread-safe.
class Product {
 public:
  virtual ~Product() = default;
  // m is at most the shape's; `workspace` of kProductWorkspaceBytes.
  virtual void Run(const Queue& queue, int64_t m, const void* a, const void* b, const float* bias,
                   float* c, void* workspace) = 0;
  // Names the chosen algorithm, for the fingerprint.
  virtual std::string algorithm() const = 0;
};
constexpr size_t kProductWorkspaceBytes = size_t{32} << 20;

class Blas {
 public:
  virtual ~Blas() = default;
  virtual absl::StatusOr<std::unique_ptr<Product>> MakeProduct(const ProductShape& shape) = 0;
};
// For the current device; Unavailable where the library cannot be used.
absl::StatusOr<std::unique_ptr<Blas>> MakeBlas();

}  // namespace lockstep::device::cuda
