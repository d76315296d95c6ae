// A small CUDA toolkit for machines without a GPU: the dialect of kernels and the part of the
// runtime that worker/device/cuda uses, as plain C++, run by the SIMT emulator behind it
// (tests/gpu/emulator/emulator.h says how). What is not here, a kernel may not use: float atomics,
// warp masks that are found at run time, __shared__ variables of fixed size.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

// ---- the dialect.
#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define LOCKSTEP_EMULATED_VECTOR2(type, scalar, alignment) \
  struct alignas(alignment) type {                         \
    scalar x, y;                                           \
  };                                                       \
  [[maybe_unused]] constexpr type make_##type(scalar x, scalar y) { return {x, y}; }
#define LOCKSTEP_EMULATED_VECTOR4(type, scalar, alignment)                              \
  struct alignas(alignment) type {                                                      \
    scalar x, y, z, w;                                                                  \
  };                                                                                    \
  [[maybe_unused]] constexpr type make_##type(scalar x, scalar y, scalar z, scalar w) { \
    return {x, y, z, w};                                                                \
  }
LOCKSTEP_EMULATED_VECTOR2(float2, float, 8)
LOCKSTEP_EMULATED_VECTOR2(int2, int, 8)
LOCKSTEP_EMULATED_VECTOR2(uint2, unsigned, 8)
LOCKSTEP_EMULATED_VECTOR2(double2, double, 16)
LOCKSTEP_EMULATED_VECTOR2(longlong2, long long, 16)
LOCKSTEP_EMULATED_VECTOR2(ulonglong2, unsigned long long, 16)
LOCKSTEP_EMULATED_VECTOR2(ushort2, unsigned short, 4)
LOCKSTEP_EMULATED_VECTOR2(uchar2, unsigned char, 2)
LOCKSTEP_EMULATED_VECTOR4(float4, float, 16)
LOCKSTEP_EMULATED_VECTOR4(int4, int, 16)
LOCKSTEP_EMULATED_VECTOR4(uint4, unsigned, 16)
LOCKSTEP_EMULATED_VECTOR4(ushort4, unsigned short, 8)
LOCKSTEP_EMULATED_VECTOR4(uchar4, unsigned char, 4)
LOCKSTEP_EMULATED_VECTOR4(char4, signed char, 4)
#undef LOCKSTEP_EMULATED_VECTOR2
#undef LOCKSTEP_EMULATED_VECTOR4
struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr float3 make_float3(float x, float y, float z) { return {x, y, z}; }
constexpr int3 make_int3(int x, int y, int z) { return {x, y, z}; }

// Of the thread that runs. Only one does, under one lock, so these are plain variables.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- what kernels call. Where threads wait for each other the engine keeps the place in the
// source: all must wait at the same.
namespace lockstep::emulator {

struct Site {
  const char* file;
  int line;
  const char* function;
};
enum class Exchange {
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kTogether
};
void BlockBarrier(Site site);
void GridDependency(Site site);
// What the calling lane gets when all lanes of the mask have come.
uint64_t WarpExchange(Exchange exchange, unsigned mask, uint64_t value, int source, int width,
                      Site site);

template <class T>
inline T Shuffle(Exchange exchange, unsigned mask, T value, int source, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = WarpExchange(exchange, mask, bits, source, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace lockstep::emulator

#define LOCKSTEP_EMULATED_SITE                                      \
  const char *file = __builtin_FILE(), int line = __builtin_LINE(), \
             const char *function = __builtin_FUNCTION()
#define LOCKSTEP_EMULATED_HERE \
  ::lockstep::emulator::Site { file, line, function }

inline void __syncthreads(LOCKSTEP_EMULATED_SITE) {
  lockstep::emulator::BlockBarrier(LOCKSTEP_EMULATED_HERE);
}
inline void cudaGridDependencySynchronize(LOCKSTEP_EMULATED_SITE) {
  lockstep::emulator::GridDependency(LOCKSTEP_EMULATED_HERE);
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void __syncwarp(unsigned mask = 0xffffffffu, LOCKSTEP_EMULATED_SITE) {
  lockstep::emulator::WarpExchange(lockstep::emulator::Exchange::kSyncWarp, mask, 0, 0, warpSize,
                                   LOCKSTEP_EMULATED_HERE);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
                     LOCKSTEP_EMULATED_SITE) {
  return lockstep::emulator::Shuffle(lockstep::emulator::Exchange::kShuffle, mask, value, source,
                                     width, LOCKSTEP_EMULATED_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                        LOCKSTEP_EMULATED_SITE) {
  return lockstep::emulator::Shuffle(lockstep::emulator::Exchange::kShuffleUp, mask, value,
                                     static_cast<int>(delta), width, LOCKSTEP_EMULATED_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                          LOCKSTEP_EMULATED_SITE) {
  return lockstep::emulator::Shuffle(lockstep::emulator::Exchange::kShuffleDown, mask, value,
                                     static_cast<int>(delta), width, LOCKSTEP_EMULATED_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                         LOCKSTEP_EMULATED_SITE) {
  return lockstep::emulator::Shuffle(lockstep::emulator::Exchange::kShuffleXor, mask, value,
                                     lane_mask, width, LOCKSTEP_EMULATED_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, LOCKSTEP_EMULATED_SITE) {
  return static_cast<unsigned>(
      lockstep::emulator::WarpExchange(lockstep::emulator::Exchange::kBallot, mask, predicate != 0,
                                       0, warpSize, LOCKSTEP_EMULATED_HERE));
}
inline int __any_sync(unsigned mask, int predicate, LOCKSTEP_EMULATED_SITE) {
  return static_cast<int>(lockstep::emulator::WarpExchange(lockstep::emulator::Exchange::kAny, mask,
                                                           predicate != 0, 0, warpSize,
                                                           LOCKSTEP_EMULATED_HERE));
}
inline int __all_sync(unsigned mask, int predicate, LOCKSTEP_EMULATED_SITE) {
  return static_cast<int>(lockstep::emulator::WarpExchange(lockstep::emulator::Exchange::kAll, mask,
                                                           predicate != 0, 0, warpSize,
                                                           LOCKSTEP_EMULATED_HERE));
}
#undef LOCKSTEP_EMULATED_SITE
#undef LOCKSTEP_EMULATED_HERE

// Threads take turns only where they wait, so what is plain here is atomic among them; atomic
// instructions all the same, because the host may look at pinned memory.
#define LOCKSTEP_EMULATED_ATOMICS(T)                                                              \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }            \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }              \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }            \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }          \
  inline T atomicCAS(T* p, T expected, T v) {                                                     \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);      \
    return expected;                                                                              \
  }                                                                                               \
  inline T atomicMax(T* p, T v) {                                                                 \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                 \
    while (old < v &&                                                                             \
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                             \
    return old;                                                                                   \
  }                                                                                               \
  inline T atomicMin(T* p, T v) {                                                                 \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                 \
    while (v < old &&                                                                             \
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                             \
    return old;                                                                                   \
  }
LOCKSTEP_EMULATED_ATOMICS(int)
LOCKSTEP_EMULATED_ATOMICS(unsigned)
LOCKSTEP_EMULATED_ATOMICS(unsigned long long)
#undef LOCKSTEP_EMULATED_ATOMICS

inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __threadfence_system() { asm volatile("" ::: "memory"); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}

#define LOCKSTEP_EMULATED_MINMAX(T)                   \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
LOCKSTEP_EMULATED_MINMAX(int)
LOCKSTEP_EMULATED_MINMAX(unsigned)
LOCKSTEP_EMULATED_MINMAX(long)
LOCKSTEP_EMULATED_MINMAX(unsigned long)
LOCKSTEP_EMULATED_MINMAX(long long)
LOCKSTEP_EMULATED_MINMAX(unsigned long long)
#undef LOCKSTEP_EMULATED_MINMAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }

// ---- the runtime.
enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorCudartUnloading = 4,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorPeerAccessUnsupported = 217,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorPeerAccessAlreadyEnabled = 704,
  cudaErrorPeerAccessNotEnabled = 705,
  cudaErrorAssert = 710,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotPermitted = 800,
  cudaErrorNotSupported = 801,
  cudaErrorSystemNotReady = 802,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureMerge = 902,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorStreamCaptureImplicit = 906,
  cudaErrorCapturedEvent = 907,
  cudaErrorStreamCaptureWrongThread = 908,
  cudaErrorUnknown = 999,
};
using cudaError_t = cudaError;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
using cudaGraphNode_t = struct CUgraphNode_st*;
using cudaHostFn_t = void (*)(void*);

#define CUDART_VERSION 13000
#define CUDART_CB
// The null stream by a name of its own.
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(uintptr_t{1}))

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaDeviceScheduleAuto = 0, cudaDeviceScheduleSpin = 1,
                   cudaDeviceScheduleYield = 2, cudaDeviceScheduleBlockingSync = 4;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
constexpr unsigned cudaEventRecordDefault = 0, cudaEventWaitDefault = 0;
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2,
                   cudaHostAllocWriteCombined = 4;
constexpr unsigned cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1,
                   cudaHostRegisterMapped = 2, cudaHostRegisterReadOnly = 8;
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};
enum cudaGraphNodeType {
  cudaGraphNodeTypeKernel = 0,
  cudaGraphNodeTypeMemcpy = 1,
  cudaGraphNodeTypeEmpty = 5,
};
struct cudaGraphEdgeData;  // of no edge that is captured there is any
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrIntegrated = 18,
  cudaDevAttrEccEnabled = 32,
  cudaDevAttrPciBusId = 33,
  cudaDevAttrPciDeviceId = 34,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrPciDomainId = 50,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrPageableMemoryAccess = 88,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct cudaUUID_t {
  char bytes[16];
};
struct cudaDeviceProp {
  char name[256];
  cudaUUID_t uuid;
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  size_t sharedMemPerBlockOptin;
  size_t sharedMemPerMultiprocessor;
  size_t reservedSharedMemPerBlock;
  int regsPerBlock;
  int warpSize;
  int maxThreadsPerBlock;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int maxThreadsPerMultiProcessor;
  int major, minor;
  int multiProcessorCount;
  int l2CacheSize;
  int pciBusID, pciDeviceID, pciDomainID;
  int ECCEnabled;
  int integrated;
  int canMapHostMemory;
  int unifiedAddressing;
  int concurrentKernels;
  int asyncEngineCount;
  int memoryBusWidth;
  int pageableMemoryAccess;
};
enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3,
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
  void* hostPointer;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaSetDeviceFlags(unsigned flags);
cudaError_t cudaInitDevice(int device, unsigned device_flags, unsigned flags);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaDeviceDisablePeerAccess(int peer);

cudaError_t cudaMemGetInfo(size_t* available, size_t* total);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* memory);
cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned flags);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
template <class T>
inline cudaError_t cudaMalloc(T** memory, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
template <class T>
inline cudaError_t cudaHostAlloc(T** memory, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(memory), bytes, flags);
}
template <class T>
inline cudaError_t cudaMallocHost(T** memory, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(memory), bytes);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** before,
                                     const cudaGraphEdgeData** edges, size_t* count);
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type);
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);

struct cudaFuncAttributes {
  int ptxVersion;
  int binaryVersion;
};
// Of the code of the newest architecture that the thread's GPU runs.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function);
template <class... Parameters>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes,
                                         void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
template <class... Parameters>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                        int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace lockstep::emulator {

// `body` is what one thread runs. Pointers among the arguments are given to be checked.
cudaError_t LaunchKernel(const cudaLaunchConfig_t& config, const void* function,
                         std::function<void()> body, const void* const* pointers,
                         int pointer_count);

template <class T>
inline void CollectPointer(const T& argument, const void** pointers, int* count) {
  if constexpr (std::is_pointer_v<T>) pointers[(*count)++] = argument;
}

}  // namespace lockstep::emulator

template <class... Parameters, class... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                                      void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what every architecture takes");
  const void* pointers[sizeof...(Parameters) + 1] = {};
  int count = 0;
  const auto prepare = [&](Parameters... values) {
    (lockstep::emulator::CollectPointer(values, pointers, &count), ...);
    return std::function<void()>([kernel, values...] { kernel(values...); });
  };
  std::function<void()> body = prepare(std::forward<Arguments>(arguments)...);
  return lockstep::emulator::LaunchKernel(*config, reinterpret_cast<const void*>(kernel),
                                          std::move(body), pointers, count);
}
