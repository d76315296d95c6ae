#include "worker/device/cuda/cuda_stream.h"

#include <utility>

#include "absl/memory/memory.h"
#include "worker/device/cuda/cuda_status.h"

namespace lockstep::device::cuda {

cudaError_t UseGpu(int ordinal) {
  thread_local int current = -1;
  if (current == ordinal) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(ordinal);
  current = error == cudaSuccess ? ordinal : -1;
  return error;
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Make(int ordinal, size_t workspace_bytes) {
  auto stream = absl::WrapUnique(new CudaStream(ordinal));
  stream->queue_.failure = &stream->failure_;
  cudaError_t error = UseGpu(ordinal);
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithFlags(&stream->queue_.stream, cudaStreamNonBlocking);
  }
  if (error == cudaSuccess && workspace_bytes > 0) {
    error = cudaMalloc(&stream->queue_.workspace, workspace_bytes);
  }
  if (error == cudaSuccess) {
    error = cudaEventCreateWithFlags(&stream->place_, cudaEventDisableTiming);
  }
  for (cudaEvent_t& place : stream->places_) {
    // Who waits for them is ahead, and need not be woken at once.
    constexpr unsigned kFlags = cudaEventDisableTiming | cudaEventBlockingSync;
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&place, kFlags);
  }
  if (error != cudaSuccess) return ToStatus(error, "making a stream");
  return stream;
}

CudaStream::~CudaStream() {
  if (queue_.stream == nullptr) return;
  UseGpu(ordinal_);
  cudaStreamSynchronize(queue_.stream);
  cudaFree(queue_.workspace);
  if (place_ != nullptr) cudaEventDestroy(place_);
  for (cudaEvent_t place : places_) {
    if (place != nullptr) cudaEventDestroy(place);
  }
  cudaStreamDestroy(queue_.stream);
}

absl::Status CudaStream::Synchronize() { return Outcome(cudaStreamSynchronize(queue().stream)); }

int64_t CudaStream::Mark() {
  // What it fails with is the runtime's last error, which the next wait returns.
  static_cast<void>(cudaEventRecord(places_[marks_ % kMarks], queue().stream));
  return marks_++;
}

absl::Status CudaStream::WaitFor(int64_t mark) {
  queue();
  return Outcome(cudaEventSynchronize(places_[mark % kMarks]));
}

absl::Status CudaStream::Outcome(cudaError_t error) {
  // A launch that the runtime refused has left its error here.
  const cudaError_t launch = cudaGetLastError();
  if (error == cudaSuccess) error = launch;
  if (!failure_.empty()) return absl::InternalError(std::exchange(failure_, std::string()));
  return ToStatus(error, "running a step's kernels");
}

cudaError_t CudaStream::Follow(CudaStream& ahead) {
  const cudaError_t error = cudaEventRecord(ahead.place_, ahead.queue().stream);
  return error == cudaSuccess ? cudaStreamWaitEvent(queue().stream, ahead.place_, 0) : error;
}

const Queue& CudaStream::queue() const {
  static_cast<void>(UseGpu(ordinal_));  // what fails, the call that follows returns
  return queue_;
}

}  // namespace lockstep::device::cuda
