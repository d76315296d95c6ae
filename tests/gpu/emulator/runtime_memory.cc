// The CUDA runtime of the emulator: memory.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "tests/gpu/emulator/runtime.h"
#include "tests/gpu/emulator/simt.h"

namespace lockstep::emulator {

bool Locate(Emulator& e, const void* memory, size_t bytes, Where* where, int* device) {
  const char* begin;
  size_t size;
  const char* const at = static_cast<const char*>(memory);
  for (size_t d = 0; d < e.devices.size(); ++d) {
    if (!e.devices[d].arena->Find(memory, &begin, &size)) continue;
    *where = Where::kDevice;
    *device = static_cast<int>(d);
    return static_cast<size_t>(begin + size - at) >= bytes;
  }
  *device = -1;
  auto it = e.pinned.upper_bound(at);
  if (it != e.pinned.begin() && (--it, at <= it->first + it->second.bytes)) {
    // One past the end of pinned memory is also the begin of what follows it.
    if (at < it->first + it->second.bytes || bytes == 0) {
      *where = Where::kPinned;
      return static_cast<size_t>(it->first + it->second.bytes - at) >= bytes;
    }
  }
  *where = Where::kPageable;
  return true;
}

namespace {

uint64_t Hash(const char* bytes, size_t count) {
  uint64_t hash = count;
  for (size_t i = 0; i < count; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min<size_t>(8, count - i));
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 32;
  }
  return hash;
}

cudaError_t Copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                 size_t height, cudaMemcpyKind kind, cudaStream_t handle, bool wait) {
  Emulator& e = E();
  std::vector<std::shared_ptr<Record>> records;
  Where to_where, from_where;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    std::shared_ptr<Stream> stream;
    if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
      return error;
    }
    if (width == 0 || height == 0) return cudaSuccess;
    if (to_pitch < width || from_pitch < width) return cudaErrorInvalidValue;
    int to_device, from_device;
    if (to == nullptr || from == nullptr ||
        !Locate(e, to, to_pitch * (height - 1) + width, &to_where, &to_device) ||
        !Locate(e, from, from_pitch * (height - 1) + width, &from_where, &from_device)) {
      return cudaErrorInvalidValue;
    }
    const bool to_is_device = to_where == Where::kDevice,
               from_is_device = from_where == Where::kDevice;
    if (kind != cudaMemcpyDefault &&
        (to_is_device != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) ||
         from_is_device != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice))) {
      return cudaErrorInvalidMemcpyDirection;
    }
    if (wait && stream->capture == nullptr) {
      if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return error;
    }
    const bool pageable = to_where == Where::kPageable || from_where == Where::kPageable;
    if (stream->capture != nullptr && (wait || pageable)) return WaitingInCapture(*stream);
    std::shared_ptr<char[]> staged;
    if (from_where == Where::kPageable) {  // is read when the call is made
      staged.reset(new char[width * height]);
      for (size_t row = 0; row < height; ++row) {
        std::memcpy(staged.get() + row * width, static_cast<const char*>(from) + row * from_pitch,
                    width);
      }
      from = staged.get();
      from_pitch = width;
    }
    const cudaError_t error = Push(e, stream, [=] {
      static_cast<void>(staged);
      if (to_pitch == width && from_pitch == width) {
        std::memmove(to, from, width * height);
      } else {
        for (size_t row = 0; row < height; ++row) {
          std::memmove(static_cast<char*>(to) + row * to_pitch,
                       static_cast<const char*>(from) + row * from_pitch, width);
        }
      }
    });
    if (error != cudaSuccess) return error;
    // As CUDA documents it: to pageable memory every copy is waited for; a copy that should wait
    // does not where it is to the device from there or from pageable memory.
    if (wait) wait = !to_is_device || from_where == Where::kPinned;
    if (!wait && to_where != Where::kPageable) return cudaSuccess;
    records.push_back(Mark(stream));
  }
  WaitFor(e, records);
  const std::lock_guard<std::mutex> lock(e.mutex);
  if (to_where == Where::kPageable) {
    for (size_t row = 0; row < height; ++row) {
      e.counters.read += Hash(static_cast<const char*>(to) + row * to_pitch, width);
    }
  }
  return Usable(e);
}

cudaError_t Set(void* to, int value, size_t bytes, cudaStream_t handle) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  Where where;
  int device;
  if (!Locate(e, to, bytes, &where, &device) || where == Where::kPageable) {
    return cudaErrorInvalidValue;
  }
  return Push(e, stream, [=] { std::memset(to, value, bytes); });
}

}  // namespace
}  // namespace lockstep::emulator

using namespace lockstep::emulator;  // NOLINT: the runtime's functions have no namespace

using Lock = std::lock_guard<std::mutex>;

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  const Arena& arena = *e.devices[ThreadState().device].arena;
  *total = arena.capacity();
  *available = arena.capacity() - arena.used();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  Emulator& e = E();
  Running running;
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
    if (FailsNow(&e.fail_allocation)) return Return(e.allocation_error);
  }
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  running.Open();
  const Lock lock(e.mutex);
  *memory = e.devices[ThreadState().device].arena->Allocate(bytes);
  if (*memory == nullptr) return Return(cudaErrorMemoryAllocation);
  ++e.counters.allocations;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  Emulator& e = E();
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  }
  if (memory == nullptr) return cudaSuccess;
  Quiet(e, -1);  // peers may be using it
  Running running;
  running.Open();
  const Lock lock(e.mutex);
  for (Device& device : e.devices) {
    const char* begin;
    size_t bytes;
    if (!device.arena->Find(memory, &begin, &bytes)) continue;
    if (device.arena->Free(memory)) return Return(Usable(e));
  }
  return Return(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  if (FailsNow(&e.fail_host_allocation)) return Return(e.host_allocation_error);
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(memory, 4096, bytes) != 0) return Return(cudaErrorMemoryAllocation);
  FillWithGarbage(*memory, bytes);
  e.pinned[static_cast<char*>(*memory)] = {bytes, true};
  ++e.counters.allocations;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  return cudaHostAlloc(memory, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void* memory) {
  Emulator& e = E();
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
    if (memory == nullptr) return cudaSuccess;
    const auto it = e.pinned.find(static_cast<char*>(memory));
    if (it == e.pinned.end() || !it->second.allocated) return Return(cudaErrorInvalidValue);
  }
  Quiet(e, -1);
  const Lock lock(e.mutex);
  e.pinned.erase(static_cast<char*>(memory));
  std::free(memory);
  return Return(Usable(e));
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  if (memory == nullptr || bytes == 0) return Return(cudaErrorInvalidValue);
  if (FailsNow(&e.fail_host_allocation)) return Return(e.host_allocation_error);
  const char* const begin = static_cast<char*>(memory);
  auto next = e.pinned.lower_bound(begin);
  const bool overlaps =
      (next != e.pinned.end() && next->first < begin + bytes) ||
      (next != e.pinned.begin() && std::prev(next)->first + std::prev(next)->second.bytes > begin);
  if (overlaps) return Return(cudaErrorHostMemoryAlreadyRegistered);
  e.pinned[begin] = {bytes, false};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
  Emulator& e = E();
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    const auto it = e.pinned.find(static_cast<char*>(memory));
    if (it == e.pinned.end() || it->second.allocated) {
      return Return(cudaErrorHostMemoryNotRegistered);
    }
  }
  Quiet(e, -1);
  const Lock lock(e.mutex);
  e.pinned.erase(static_cast<char*>(memory));
  return Return(Usable(e));
}

cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* host_pointer, unsigned) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  Where where;
  int device;
  Locate(e, host_pointer, 0, &where, &device);
  if (where != Where::kPinned) return Return(cudaErrorInvalidValue);
  *device_pointer = host_pointer;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  Where where;
  int device;
  Locate(e, pointer, 0, &where, &device);
  auto* const p = const_cast<void*>(pointer);
  switch (where) {
    case Where::kPageable:
      *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, p};
      break;
    case Where::kPinned:
      *attributes = {cudaMemoryTypeHost, ThreadState().device, p, p};
      break;
    case Where::kDevice:
      *attributes = {cudaMemoryTypeDevice, device, p, nullptr};
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return Return(Copy(to, bytes, from, bytes, bytes, 1, kind, nullptr, true));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return Return(Copy(to, bytes, from, bytes, bytes, 1, kind, stream, false));
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return Return(Copy(to, to_pitch, from, from_pitch, width, height, kind, stream, false));
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                cudaStream_t stream) {
  return Return(Copy(to, bytes, from, bytes, bytes, 1, cudaMemcpyDeviceToDevice, stream, false));
}

// Waits for nothing, as CUDA's does not for device memory.
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return Return(Set(to, value, bytes, nullptr));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return Return(Set(to, value, bytes, stream));
}
