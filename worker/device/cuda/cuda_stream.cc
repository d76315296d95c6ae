#include "worker/device/cuda/cuda_stream.h"

#include <utility>

#include "absl/memory/memory.h"
#include "worker/device/cuda/cuda_status.h"

namespace lockstep::device::cuda {

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Make(int ordinal) {
  auto stream = absl::WrapUnique(new CudaStream(ordinal));
  stream->queue_.failure = &stream->failure_;
  cudaError_t error = cudaSetDevice(ordinal);
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithFlags(&stream->queue_.stream, cudaStreamNonBlocking);
  }
  if (error == cudaSuccess) error = cudaMalloc(&stream->queue_.workspace, kWorkspaceBytes);
  if (error != cudaSuccess) return ToStatus(error, "making a stream");
  return stream;
}

CudaStream::~CudaStream() {
  if (queue_.stream == nullptr) return;
  cudaSetDevice(ordinal_);
  cudaStreamSynchronize(queue_.stream);
  cudaFree(queue_.workspace);
  cudaStreamDestroy(queue_.stream);
}

absl::Status CudaStream::Synchronize() {
  cudaError_t error = cudaStreamSynchronize(queue().stream);
  // A launch that the runtime refused has left its error here.
  const cudaError_t launch = cudaGetLastError();
  if (error == cudaSuccess) error = launch;
  if (!failure_.empty()) return absl::InternalError(std::exchange(failure_, std::string()));
  return ToStatus(error, "running a step's kernels");
}

const Queue& CudaStream::queue() const {
  thread_local int current = -1;
  if (current != ordinal_) {
    cudaSetDevice(ordinal_);
    current = ordinal_;
  }
  return queue_;
}

}  // namespace lockstep::device::cuda
