#include <cuda_runtime.h>

namespace {

struct Text {
  const char* name;
  const char* text;
};

Text TextOf(cudaError_t error) {
#define LOCKSTEP_TEXT(name, text) \
  case name:                      \
    return {#name, text};
  switch (error) {
    LOCKSTEP_TEXT(cudaSuccess, "no error")
    LOCKSTEP_TEXT(cudaErrorInvalidValue, "invalid argument")
    LOCKSTEP_TEXT(cudaErrorMemoryAllocation, "out of memory")
    LOCKSTEP_TEXT(cudaErrorInitializationError, "initialization error")
    LOCKSTEP_TEXT(cudaErrorCudartUnloading, "driver shutting down")
    LOCKSTEP_TEXT(cudaErrorInvalidConfiguration, "invalid configuration argument")
    LOCKSTEP_TEXT(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy")
    LOCKSTEP_TEXT(cudaErrorInsufficientDriver,
                  "CUDA driver version is insufficient for CUDA runtime version")
    LOCKSTEP_TEXT(cudaErrorDevicesUnavailable, "CUDA-capable device(s) is/are busy or unavailable")
    LOCKSTEP_TEXT(cudaErrorInvalidDeviceFunction, "invalid device function")
    LOCKSTEP_TEXT(cudaErrorNoDevice, "no CUDA-capable device is detected")
    LOCKSTEP_TEXT(cudaErrorInvalidDevice, "invalid device ordinal")
    LOCKSTEP_TEXT(cudaErrorNoKernelImageForDevice,
                  "no kernel image is available for execution on the device")
    LOCKSTEP_TEXT(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered")
    LOCKSTEP_TEXT(cudaErrorPeerAccessUnsupported,
                  "peer access is not supported between these two devices")
    LOCKSTEP_TEXT(cudaErrorInvalidResourceHandle, "invalid resource handle")
    LOCKSTEP_TEXT(cudaErrorIllegalState, "the operation cannot be performed in the present state")
    LOCKSTEP_TEXT(cudaErrorNotReady, "device not ready")
    LOCKSTEP_TEXT(cudaErrorIllegalAddress, "an illegal memory access was encountered")
    LOCKSTEP_TEXT(cudaErrorLaunchOutOfResources, "too many resources requested for launch")
    LOCKSTEP_TEXT(cudaErrorLaunchTimeout, "the launch timed out and was terminated")
    LOCKSTEP_TEXT(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled")
    LOCKSTEP_TEXT(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled")
    LOCKSTEP_TEXT(cudaErrorAssert, "device-side assert triggered")
    LOCKSTEP_TEXT(cudaErrorHostMemoryAlreadyRegistered,
                  "part or all of the requested memory range is already mapped")
    LOCKSTEP_TEXT(cudaErrorHostMemoryNotRegistered,
                  "pointer does not correspond to a registered memory region")
    LOCKSTEP_TEXT(cudaErrorHardwareStackError, "hardware stack error")
    LOCKSTEP_TEXT(cudaErrorIllegalInstruction, "an illegal instruction was encountered")
    LOCKSTEP_TEXT(cudaErrorMisalignedAddress, "misaligned address")
    LOCKSTEP_TEXT(cudaErrorLaunchFailure, "unspecified launch failure")
    LOCKSTEP_TEXT(cudaErrorNotPermitted, "operation not permitted")
    LOCKSTEP_TEXT(cudaErrorNotSupported, "operation not supported")
    LOCKSTEP_TEXT(cudaErrorSystemNotReady, "system not yet initialized")
    LOCKSTEP_TEXT(cudaErrorSystemDriverMismatch,
                  "system has unsupported display driver / cuda driver combination")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureUnsupported,
                  "operation not permitted when stream is capturing")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureInvalidated,
                  "operation failed due to a previous error during capture")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureMerge,
                  "operation would result in a merge of separate capture sequences")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureUnmatched,
                  "capture was not ended in the same stream as it began")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureIsolation,
                  "dependency created on uncaptured work in another stream")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureImplicit,
                  "operation would make the legacy stream depend on a capturing blocking stream")
    LOCKSTEP_TEXT(cudaErrorCapturedEvent,
                  "operation not permitted on an event last recorded in a capturing stream")
    LOCKSTEP_TEXT(cudaErrorStreamCaptureWrongThread,
                  "attempt to terminate a thread-local capture sequence from another thread")
    LOCKSTEP_TEXT(cudaErrorUnknown, "unknown error")
  }
#undef LOCKSTEP_TEXT
  return {"unrecognized error code", "unrecognized error code"};
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) { return TextOf(error).name; }

const char* cudaGetErrorString(cudaError_t error) { return TextOf(error).text; }
