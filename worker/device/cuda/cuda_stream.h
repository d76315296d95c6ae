// The CUDA device's stream: a CUDA stream and the workspace of the kernels on it.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

class CudaStream : public Stream {
 public:
  // On GPU `ordinal`.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Make(int ordinal);
  ~CudaStream() override;
  absl::Status Synchronize() override;

  // Makes the stream's GPU the calling thread's.
  const Queue& queue() const;

 private:
  explicit CudaStream(int ordinal) : ordinal_(ordinal) {}

  const int ordinal_;
  std::string failure_;
  Queue queue_;
};

// Where a call of the device enqueues; `stream` is one of its own.
inline const Queue& QueueOf(Stream& stream) { return static_cast<CudaStream&>(stream).queue(); }

}  // namespace lockstep::device::cuda
