// Convolutions through the vendor's library (cuDNN, graph API): a thin wrapper that the SIMT
// emulator answers with reference code.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

enum class ConvolutionPass { kForward, kBackwardInput, kBackwardWeight };

// One pass of one shape and number of rows (device.h, Conv2d: NHWC; no bias, no activation), by a
// deterministic engine that the library's heuristic chooses when it is made; of those that round
// nothing more than `factors` says. Forward's and BackwardInput's is chosen at a fixed number of
// rows and kept for all, so that a row has the same bits in any. Operands are fp32, or bf16 where
// factors are; results are fp32. Thread-safe.
class Convolution {
 public:
  virtual ~Convolution() = default;
  virtual size_t workspace_bytes() const = 0;  // 256-byte aligned
  // Operands that are to be bf16 are given as floats of bf16's values.
  virtual bool takes_floats() const { return false; }
  // Forward: x, w -> y. BackwardInput: dy, w -> dx. BackwardWeight: dy, x -> dw.
  virtual void Run(const Queue& queue, const void* first, const void* second, float* result,
                   void* workspace) = 0;
  virtual std::string algorithm() const = 0;
};

class Dnn {
 public:
  virtual ~Dnn() = default;
  virtual std::string version() const = 0;  // "cudnn 9.19.0"
  // Unimplemented where no engine can compute it so.
  virtual absl::StatusOr<std::unique_ptr<Convolution>> MakeConvolution(ConvolutionPass pass,
                                                                       const Conv2dShape& shape,
                                                                       int64_t rows,
                                                                       Factors factors) = 0;
};
// As MakeBlas.
absl::StatusOr<std::unique_ptr<Dnn>> MakeDnn(std::shared_ptr<AlgorithmBook> book = nullptr);

}  // namespace lockstep::device::cuda
