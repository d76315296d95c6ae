// Writes when each kernel of a process began and ended on the GPU: a library that the CUDA driver
// loads into the process where CUDA_INJECTION64_PATH names it, and that asks CUPTI. Kernels that a
// CUDA graph launches are among them. A line `BEGIN END NAME` each, in nanoseconds, in the order in
// which CUPTI hands them over, to the file that LOCKSTEP_TRACE names, with the process's number
// behind it. It makes launches dearer: shares of time are what it is for.
#include <cupti.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

constexpr size_t kBufferBytes = size_t{4} << 20;
constexpr uint32_t kFlushMs = 100;  // programs may end without a word

std::FILE* file = nullptr;

void CUPTIAPI MakeBuffer(uint8_t** buffer, size_t* size, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer == nullptr ? 0 : kBufferBytes;
  *most_records = 0;  // as many as fit
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  CUpti_Activity* record = nullptr;
  while (valid > 0 && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* const kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    std::fprintf(file, "%" PRIu64 " %" PRIu64 " %s\n", kernel->start, kernel->end, kernel->name);
  }
  std::fflush(file);
  std::free(buffer);
}

}  // namespace

// Called by the driver when it starts in the process.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* const path = std::getenv("LOCKSTEP_TRACE");
  if (path == nullptr) return 1;
  file = std::fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "w");
  if (file == nullptr) return 0;
  if (cuptiActivityRegisterCallbacks(MakeBuffer, TakeBuffer) != CUPTI_SUCCESS ||
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) {
    std::fprintf(stderr, "gpu_trace: CUPTI refuses to record kernels\n");
    return 0;
  }
  static_cast<void>(cuptiActivityFlushPeriod(kFlushMs));
  std::atexit([] { static_cast<void>(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED)); });
  return 1;
}
