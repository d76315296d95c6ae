// Our own kernels for the products that the vendor's library is slow at, those of small layers,
// behind the same interface. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>

#include "worker/device/cuda/blas.h"

namespace lockstep::device::cuda {

// The rule: products in fp32 and bf16 of at most so many weights, which are B or, where op(A) is
// transposed, C; not those of two transposed factors, nor of more terms than a block can sum up in
// time where op(A) is transposed, which the vendor's may split. Rows that are samples do not
// matter.
constexpr int64_t kMostOwnWeights = int64_t{1} << 20;
constexpr int64_t kMostOwnTerms = 2048;
constexpr int64_t kMostOwnRow = int64_t{1} << 20;  // elements from a stored row to the next
bool IsOwnProduct(const ProductShape& shape);

// Makes what the rule says of ours, and all else of the vendor's.
std::unique_ptr<Blas> WithOwnProducts(std::unique_ptr<Blas> vendor);

}  // namespace lockstep::device::cuda
