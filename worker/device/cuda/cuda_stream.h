// The CUDA device's stream: a CUDA stream and the workspace of the kernels on it. A thread that
// waits for it sleeps: the driver's own waits may keep a processor busy all the while, whatever is
// asked of them. For that its timer slack is set to a few microseconds.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/device.h"

namespace lockstep::device::cuda {

// Makes GPU `ordinal` the calling thread's. Whoever in this process drives several GPUs from a
// thread goes through it, since it knows what it did last.
cudaError_t UseGpu(int ordinal);

class CudaStream : public Stream {
 public:
  // On GPU `ordinal`, with a workspace of so many bytes.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Make(int ordinal, size_t workspace_bytes);
  ~CudaStream() override;
  absl::Status Synchronize() override;
  int64_t Mark() override;
  absl::Status WaitFor(int64_t mark) override;

  // Makes the stream's GPU the calling thread's.
  const Queue& queue() const;
  // What is enqueued from now on runs after what is on `ahead` now; what failed there, has
  // failed here.
  cudaError_t Follow(CudaStream& ahead);

 private:
  explicit CudaStream(int ordinal) : ordinal_(ordinal) {}
  // Returns when `ask` no longer says cudaErrorNotReady, and what has failed until then.
  struct Patience;
  absl::Status Await(const Patience& patience, absl::FunctionRef<cudaError_t()> ask);

  const int ordinal_;
  std::string failure_;
  Queue queue_;
  cudaEvent_t place_ = nullptr;      // in this stream
  cudaEvent_t places_[kMarks] = {};  // of marks, mark m at m % kMarks
  int64_t marks_ = 0;
  absl::Duration last_wait_;  // of WaitFor
};

// Where a call of the device enqueues; `stream` is one of its own.
inline const Queue& QueueOf(Stream& stream) { return static_cast<CudaStream&>(stream).queue(); }

}  // namespace lockstep::device::cuda
