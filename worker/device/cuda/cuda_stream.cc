#include "worker/device/cuda/cuda_stream.h"

#include <sys/prctl.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/kernels.h"

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
  const char* const early = std::getenv("LOCKSTEP_CUDA_EARLY_LAUNCH");
  if (early != nullptr && std::string_view(early) != "0" && std::string_view(early) != "1") {
    return absl::InvalidArgumentError(
        absl::StrCat("LOCKSTEP_CUDA_EARLY_LAUNCH is ", early, "; accepted: 0 or 1"));
  }
  stream->queue_.early =
      error == cudaSuccess && KernelsWait() && (early == nullptr || std::string_view(early) != "0");
  if (error == cudaSuccess && workspace_bytes > 0) {
    error = cudaMalloc(&stream->queue_.workspace, workspace_bytes);
  }
  if (error == cudaSuccess) {
    error = cudaEventCreateWithFlags(&stream->place_, cudaEventDisableTiming);
  }
  for (cudaEvent_t& place : stream->places_) {
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&place, cudaEventDisableTiming);
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it does not break the context, and is not the next launch's
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return ToStatus(error, absl::StrCat("making a stream with ", workspace_bytes, " bytes on GPU ",
                                        ordinal, ", of which ", free, " of ", total,
                                        " are free (nvidia-smi shows who has the rest)"));
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

// A thread that waits sleeps for a part of the time that it has waited so far before it asks again,
// and so is late by no larger part of the whole.
struct CudaStream::Patience {
  absl::Duration awake;              // at first it asks without sleeping
  absl::Duration first;              // its first sleep, at least
  absl::Duration shortest, longest;  // of its sleeps
  int part;
};

absl::Status CudaStream::Await(const Patience& patience, absl::FunctionRef<cudaError_t()> ask) {
  // Ends of sleeps are put off by it, by 50 us where nobody says otherwise.
  constexpr unsigned long kTimerSlack = 2000;  // NOLINT: nanoseconds, in the type of prctl
  [[maybe_unused]] thread_local const int slack = prctl(PR_SET_TIMERSLACK, kTimerSlack);
  // A launch that the runtime refused has left its error here, whose place cudaErrorNotReady takes:
  // also that of a library which asked before.
  cudaError_t launch = cudaGetLastError();
  if (launch == cudaErrorNotReady) launch = cudaSuccess;
  const absl::Time began = absl::Now();
  cudaError_t error;
  bool slept = false;
  while ((error = ask()) == cudaErrorNotReady) {
    const absl::Duration waited = absl::Now() - began;
    if (waited < patience.awake) continue;
    const absl::Duration part =
        std::clamp(waited / patience.part, patience.shortest, patience.longest);
    absl::SleepFor(std::exchange(slept, true) ? part : std::max(part, patience.first));
  }
  static_cast<void>(cudaGetLastError());
  if (error == cudaSuccess) error = launch;
  if (!failure_.empty()) return absl::InternalError(std::exchange(failure_, std::string()));
  return ToStatus(error, "running a step's kernels");
}

// Nothing is behind what is waited for: the device idles until the thread wakes.
absl::Status CudaStream::Synchronize() {
  constexpr Patience kPrompt = {absl::Microseconds(20), absl::ZeroDuration(),
                                absl::Microseconds(20), absl::Milliseconds(1), 32};
  return Await(kPrompt, [this] { return cudaStreamQuery(queue().stream); });
}

int64_t CudaStream::Mark() {
  // What it fails with is the runtime's last error, which the next wait returns.
  static_cast<void>(cudaEventRecord(places_[marks_ % kMarks], queue().stream));
  return marks_++;
}

// Who waits for a place is ahead: the device has as much work behind it (RunAhead) as before it. As
// steps are alike, so are waits: most of what the last one took is slept through at once. A sleep
// that was too long makes the next one shorter.
absl::Status CudaStream::WaitFor(int64_t mark) {
  constexpr absl::Duration kLongestFirst = absl::Milliseconds(50);
  const Patience ahead = {absl::ZeroDuration(), std::min(last_wait_ * 3 / 4, kLongestFirst),
                          absl::Microseconds(50), std::max(absl::Milliseconds(1), last_wait_ / 8),
                          2};
  const absl::Time began = absl::Now();
  const absl::Status status =
      Await(ahead, [this, mark] { return cudaEventQuery(places_[mark % kMarks]); });
  last_wait_ = absl::Now() - began;
  return status;
}

cudaError_t CudaStream::Follow(CudaStream& ahead) {
  if (failure_.empty()) failure_ = ahead.failure_;
  queue_.joined = true;
  const cudaError_t error = cudaEventRecord(ahead.place_, ahead.queue().stream);
  return error == cudaSuccess ? cudaStreamWaitEvent(queue().stream, ahead.place_, 0) : error;
}

const Queue& CudaStream::queue() const {
  static_cast<void>(UseGpu(ordinal_));  // what fails, the call that follows returns
  return queue_;
}

}  // namespace lockstep::device::cuda
