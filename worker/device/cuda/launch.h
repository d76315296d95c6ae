// The one seam through which hand-written kernels are launched. <cuda_runtime.h> is the toolkit's,
// or the header of the same name of the SIMT emulator (tests/gpu/emulator), which runs the same
// sources as plain C++: nothing here or in a kernel asks which.
//
// Rules that keep the emulator able to check a kernel:
//  - shared memory is dynamic, through SharedMemory(), never a __shared__ variable: its size is
//    that of the launch, beyond which an access is an error, and it holds garbage at block start;
//  - no inline assembly, no cooperative groups: __syncthreads, __syncwarp, __shfl_*_sync,
//    __ballot_sync, integer atomics, __threadfence and vector types;
//  - a kernel begins with WaitForPrevious();
//  - a barrier or shuffle is reached by all threads (lanes of the mask) that take part;
//  - the result must not depend on the order in which blocks and threads run: no float atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "worker/device/gpu_workspace.h"

namespace lockstep::device::cuda {

// Where a kernel is put, and memory for what one call's kernels hand each other: at least
// kWorkspaceBytes, 256-byte aligned, used by nothing else while they run (a stream runs in order).
constexpr size_t kWorkspaceBytes = kGpuWorkspaceBytes;
struct Queue {
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  // Takes the text of a library call's first failure, which Stream::Synchronize returns; null:
  // lost.
  std::string* failure = nullptr;
  // In a graph, a kernel may be put on the multiprocessors while the one before it still runs: on
  // the same stream, without another stream to wait for since that.
  bool early = false;
  mutable bool joined = false;  // it waits for another since its last kernel
};

inline void Fail(const Queue& queue, const std::string& text) {
  if (queue.failure != nullptr && queue.failure->empty()) *queue.failure = text;
}

// Whether what the stream captures next has one kernel to wait for, and nothing else: then that
// wait may be the kernel's own (programmatic dependent launch, CUDA C++ Programming Guide).
inline bool FollowsKernel(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* before = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &before, &edges, &count);
#else
  const cudaError_t error =
      cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, nullptr, &before, &edges, &count);
#endif
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive && count == 1 &&
         cudaGraphNodeGetType(before[0], &type) == cudaSuccess && type == cudaGraphNodeTypeKernel;
}

// A failure is kept by the runtime and returned by Stream::Synchronize.
template <class... Parameters, class... Arguments>
void Launch(const Queue& queue, dim3 grid, dim3 block, size_t shared_bytes,
            void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = queue.stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (queue.early && !std::exchange(queue.joined, false) && FollowsKernel(queue.stream)) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Before a launch with more shared memory than every kernel may have. The limit is the GPU's, not
// the launch's: another thread's launch of the same kernel may need more.
template <class... Parameters>
void AllowShared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= size_t{48} << 10) return;
  int device = 0, most = 0;
  static_cast<void>(cudaGetDevice(&device));
  static_cast<void>(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  static_cast<void>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// A kernel's first statement: behind it, what is before the kernel on its stream is done, and its
// writes are seen. The kernel behind this one may be put beside it from here on, to wait in turn:
// by then all of this one's blocks are on multiprocessors, whose rest it takes.
__device__ __forceinline__ void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* SharedMemory() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

constexpr int kWarp = 32;

inline bool IsAligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lockstep::device::cuda
