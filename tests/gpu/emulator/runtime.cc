// The emulated machine: lazy streams, launches and faults.
#include "tests/gpu/emulator/runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/simt.h"

namespace lockstep::emulator {
namespace {

void Begin(Emulator& e, const Options& options) {
  for (auto& [memory, pinned] : e.pinned) {
    if (pinned.allocated) std::free(const_cast<char*>(memory));
  }
  for (const auto& weak : e.all_streams) {
    if (const auto stream = weak.lock()) {  // undoes circles of pointers
      stream->queue.clear();
      stream->capture = nullptr;
    }
  }
  e.options = options;
  e.streams.clear();
  e.events.clear();
  e.graphs.clear();
  e.executables.clear();
  e.pinned.clear();
  e.captures.clear();
  e.all_streams.clear();
  e.devices.clear();
  e.shared_limits.clear();
  e.fail_allocation = options.fail_allocation;
  e.allocation_error = cudaErrorMemoryAllocation;
  e.fail_host_allocation = e.fail_launch = e.fail_instantiation = 0;
  e.counters = {};
  e.launch_number = 0;
  ++e.generation;
  for (int d = 0; d < options.devices; ++d) {
    Device device;
    device.arena = std::make_unique<Arena>(options.memory);
    device.null_stream = std::make_shared<Stream>();
    device.null_stream->device = d;
    device.null_stream->null = device.null_stream->blocking = true;
    if (options.lost_gpu < 0 || options.lost_gpu == d) device.launches_left = options.lost_after;
    device.lost_with = options.lost_with;
    e.all_streams.push_back(device.null_stream);
    e.devices.push_back(std::move(device));
  }
  if (!options.protect) {
    for (Device& device : e.devices) device.arena->Open();
  }
}

// Runs until the stream has passed the record; false: no further than to a delay, where it may not
// `wait`. With `running` held, without `mutex`.
bool RunUntil(Emulator& e, Running& running, const std::shared_ptr<Record>& record, bool wait) {
  while (!record->done) {
    Operation operation;
    std::shared_ptr<Stream> stream;
    bool lost = false, busy;
    {
      const std::lock_guard<std::mutex> lock(e.mutex);
      stream = record->stream;
      busy = stream->busy;
      if (!busy) {
        operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        lost = e.devices[stream->device].lost != cudaSuccess;
        stream->busy = true;
      }
    }
    if (busy) {  // by another thread
      Running::Pause();
      continue;
    }
    bool held_up = false;
    switch (operation.kind) {
      case Operation::Kind::kWork:
        if (!lost) {
          running.Open();
          operation.work();
        }
        break;
      case Operation::Kind::kWait:
        held_up = !RunUntil(e, running, operation.record, wait);
        break;
      case Operation::Kind::kDelay:
        if (operation.ends == Clock::time_point()) operation.ends = Clock::now() + operation.takes;
        while (wait && !lost && Clock::now() < operation.ends) {
        }
        held_up = !lost && Clock::now() < operation.ends;
        break;
      case Operation::Kind::kRecord: {
        const std::lock_guard<std::mutex> lock(e.mutex);
        operation.record->time = Clock::now();
        operation.record->done = true;
        operation.record->stream = nullptr;
        break;
      }
    }
    const std::lock_guard<std::mutex> lock(e.mutex);
    stream->busy = false;
    if (held_up) {
      stream->queue.push_front(std::move(operation));
      return false;
    }
  }
  return true;
}

// Where order is permuted, other streams run a little before one is waited for: those of the
// thread's device, since other devices' run whatever this one's waits for.
void RunOthers(Emulator& e, Running& running, bool wait) {
  const int device = ThreadState().device;
  std::vector<std::shared_ptr<Record>> others;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    if (e.options.order.kind != Order::Kind::kPermuted) return;
    for (const auto& weak : e.all_streams) {
      const auto stream = weak.lock();
      if (stream == nullptr || stream->device != device) continue;
      if (stream->queue.empty() || Random(e) % 2 == 0) continue;
      auto record = std::make_shared<Record>();
      record->stream = stream;
      const size_t before = Random(e) % (stream->queue.size() + 1);
      stream->queue.insert(stream->queue.begin() + static_cast<ptrdiff_t>(before),
                           {Operation::Kind::kRecord, nullptr, record});
      others.push_back(std::move(record));
    }
  }
  for (const auto& record : others) RunUntil(e, running, record, wait);
}

// ---- launches.

// Whether the device still works at this launch.
bool CountLaunch(Emulator& e, int device) {
  const std::lock_guard<std::mutex> lock(e.mutex);
  Device& d = e.devices[device];
  if (d.lost != cudaSuccess) return false;
  if (d.launches_left == 0) {
    d.lost = d.lost_with;
    return false;
  }
  if (d.launches_left > 0) --d.launches_left;
  return true;
}

cudaError_t CheckLimits(Emulator& e, const KernelLaunch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || block.x > 1024 ||
      block.y > 1024 || block.z > 64 || uint64_t{block.x} * block.y * block.z > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = e.shared_limits.find(launch.function);
  const size_t most = limit == e.shared_limits.end() ? kSharedBytes : limit->second;
  return launch.shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

void CheckPointer(Emulator& e, const KernelLaunch& launch, int device, const void* pointer) {
  if (pointer == nullptr) return;
  Where where;
  int owner;
  Locate(e, pointer, 0, &where, &owner);
  char text[64];
  std::snprintf(text, sizeof(text), ": its argument %p ", pointer);
  if (where == Where::kPageable) {
    Fatal(Describe(launch) + text + "points neither to device nor to pinned memory");
  }
  if (where == Where::kDevice && owner != device && !e.devices[device].peers.contains(owner)) {
    Fatal(Describe(launch) + text + "points to memory of another device, without peer access");
  }
}

}  // namespace

Emulator& E() {
  static Emulator* const emulator = [] {
    auto* e = new Emulator;
    Begin(*e, OptionsOfEnvironment());
    return e;
  }();
  return *emulator;
}

thread_local Running* Running::current_ = nullptr;

// ---- errors of the calls.

cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess) ThreadState().last = error;
  return error;
}

cudaError_t Usable(Emulator& e, int device) {
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) return cudaErrorInsufficientDriver;
  if (e.devices.empty()) return cudaErrorNoDevice;
  return e.devices[device < 0 ? ThreadState().device : device].lost;
}

// ---- captures.

cudaError_t UnsafeInCapture(Emulator& e) {
  cudaError_t error = cudaSuccess;
  for (const auto& capture : e.captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeThreadLocal &&
        capture->thread != std::this_thread::get_id()) {
      continue;
    }
    Invalidate(*capture);
    error = cudaErrorStreamCaptureUnsupported;
  }
  return error;
}

cudaError_t WaitingInCapture(const Stream& stream) {
  if (stream.capture == nullptr) return cudaSuccess;
  Invalidate(*stream.capture);
  return cudaErrorStreamCaptureUnsupported;
}

// ---- streams.

cudaError_t FindStream(Emulator& e, cudaStream_t handle, std::shared_ptr<Stream>* stream) {
  if (handle == nullptr || handle == cudaStreamLegacy) {
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return error;
    *stream = e.devices[ThreadState().device].null_stream;
    return cudaSuccess;
  }
  const auto it = e.streams.find(handle);
  if (it == e.streams.end()) {
    const cudaError_t error = Usable(e);
    return error != cudaSuccess ? error : cudaErrorInvalidResourceHandle;
  }
  *stream = it->second;
  return Usable(e, (*stream)->device);
}

std::shared_ptr<Record> Mark(const std::shared_ptr<Stream>& stream) {
  auto record = std::make_shared<Record>();
  record->stream = stream;
  stream->queue.push_back({Operation::Kind::kRecord, nullptr, record});
  return record;
}

void OrderWithNullStream(Emulator& e, const std::shared_ptr<Stream>& stream) {
  if (!stream->blocking) return;
  for (const auto& weak : e.all_streams) {
    const auto other = weak.lock();
    if (other == nullptr || other == stream || other->device != stream->device ||
        !other->blocking || other->null == stream->null || other->queue.empty()) {
      continue;
    }
    stream->queue.push_back({Operation::Kind::kWait, nullptr, Mark(other)});
  }
}

cudaError_t Push(Emulator& e, const std::shared_ptr<Stream>& stream, std::function<void()> work,
                 bool kernel) {
  if (stream->null) {
    for (const auto& capture : e.captures) {
      for (const auto& captured : capture->streams) {
        if (captured->device == stream->device && captured->blocking) {
          Invalidate(*capture);
          return cudaErrorStreamCaptureImplicit;
        }
      }
    }
  }
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (!capture.valid) return cudaErrorStreamCaptureInvalidated;
    capture.nodes.push_back(
        {std::move(work), stream->captured_last, kernel, NewHandle<CUgraphNode_st>(e)});
    stream->captured_last = {static_cast<int>(capture.nodes.size()) - 1};
    return cudaSuccess;
  }
  OrderWithNullStream(e, stream);
  stream->queue.push_back({Operation::Kind::kWork, std::move(work), nullptr});
  return cudaSuccess;
}

uint64_t Random(Emulator& e) {
  uint64_t z = (e.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void WaitFor(Emulator& e, const std::vector<std::shared_ptr<Record>>& records) {
  Running running;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    ++e.counters.waits;
  }
  RunOthers(e, running, /*wait=*/true);
  for (const auto& record : records) RunUntil(e, running, record, /*wait=*/true);
}

bool IsPassed(Emulator& e, const std::shared_ptr<Record>& record) {
  Running running;
  RunOthers(e, running, /*wait=*/false);
  if (!RunUntil(e, running, record, /*wait=*/false)) return false;
  const std::lock_guard<std::mutex> lock(e.mutex);
  ++e.counters.waits;
  return true;
}

std::vector<std::shared_ptr<Record>> MarkAll(Emulator& e, int device) {
  std::vector<std::shared_ptr<Record>> records;
  std::erase_if(e.all_streams, [](const auto& weak) { return weak.expired(); });
  for (const auto& weak : e.all_streams) {
    const auto stream = weak.lock();
    if (stream != nullptr && stream->device == device && !stream->queue.empty()) {
      records.push_back(Mark(stream));
    }
  }
  return records;
}

cudaError_t Quiet(Emulator& e, int device) {
  std::vector<std::shared_ptr<Record>> records;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    if (device < 0) {
      for (size_t d = 0; d < e.devices.size(); ++d) {
        for (auto& record : MarkAll(e, static_cast<int>(d))) records.push_back(std::move(record));
      }
    } else {
      records = MarkAll(e, device);
    }
  }
  WaitFor(e, records);
  const std::lock_guard<std::mutex> lock(e.mutex);
  return Usable(e, device);
}

// ---- controls.

void Pause() { Running::Pause(); }

void Configure(const Options& options) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> running(e.running);
  const std::lock_guard<std::mutex> lock(e.mutex);
  Begin(e, options);
}

void SetOrder(Order order) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.options.order = order;
  e.random = order.seed;
}

Sums CurrentSums() {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  return e.options.sums;
}

NcclFault CurrentNcclFault() {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  return e.options.nccl;
}

void FailAllocation(int nth, cudaError_t error) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.fail_allocation = nth;
  e.allocation_error = error;
}

void FailHostAllocation(int nth, cudaError_t error) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.fail_host_allocation = nth;
  e.host_allocation_error = error;
}

void FailLaunch(int nth, cudaError_t error) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.fail_launch = nth;
  e.launch_error = error;
}

void FailInstantiation(int nth, cudaError_t error) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.fail_instantiation = nth;
  e.instantiation_error = error;
}

void LoseDevice(int device, int64_t launches, cudaError_t error) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  Device& d = e.devices.at(static_cast<size_t>(device));
  d.lost_with = error;
  if (launches < 0) {
    d.lost = error;
  } else {
    d.launches_left = launches;
  }
}

cudaError_t Enqueue(cudaStream_t handle, std::function<void()> work) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  if (FailsNow(&e.fail_launch)) return Return(e.launch_error);
  ++e.counters.launches;
  const int device = stream->device;
  return Return(Push(e, stream, [&e, device, work = std::move(work)] {
    if (CountLaunch(e, device)) work();
  }));
}

cudaError_t Delay(cudaStream_t handle, std::chrono::nanoseconds takes) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  if (const cudaError_t error = WaitingInCapture(*stream); error != cudaSuccess) {
    return Return(error);
  }
  stream->queue.push_back({Operation::Kind::kDelay, nullptr, nullptr, takes});
  return cudaSuccess;
}

bool GuardsIntact(const void* allocation) {
  Emulator& e = E();
  Running running;
  running.Open();
  const std::lock_guard<std::mutex> lock(e.mutex);
  for (const Device& device : e.devices) {
    const char* begin;
    size_t bytes;
    if (device.arena->Find(allocation, &begin, &bytes)) return device.arena->GuardsIntact(begin);
  }
  return false;
}

Counters Count() {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  Counters counters = e.counters;
  counters.live_allocations = static_cast<int64_t>(e.pinned.size());
  for (const Device& device : e.devices) {
    counters.live_allocations += static_cast<int64_t>(device.arena->allocations());
    counters.live_bytes += device.arena->used();
  }
  return counters;
}

cudaError_t LaunchKernel(const cudaLaunchConfig_t& config, const void* function,
                         std::function<void()> body, const void* const* pointers,
                         int pointer_count) {
  Emulator& e = E();
  const std::lock_guard<std::mutex> lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, config.stream, &stream); error != cudaSuccess) {
    return Return(error);
  }
  if (stream->device != ThreadState().device) return Return(cudaErrorInvalidResourceHandle);
  auto launch = std::make_shared<KernelLaunch>();
  launch->function = function;
  launch->grid = config.gridDim;
  launch->block = config.blockDim;
  launch->shared_bytes = config.dynamicSmemBytes;
  launch->body = std::move(body);
  if (const cudaError_t error = CheckLimits(e, *launch); error != cudaSuccess) {
    return Return(error);
  }
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    launch->early |= config.attrs[a].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                     config.attrs[a].val.programmaticStreamSerializationAllowed != 0;
  }
  if (launch->early) {
    if (e.options.major < 9) return Return(cudaErrorNotSupported);
    // Of other edges of a graph CUDA's documents do not say what becomes.
    if (stream->capture != nullptr && (stream->captured_last.size() != 1 ||
                                       !stream->capture->nodes[stream->captured_last[0]].kernel)) {
      return Return(cudaErrorNotSupported);
    }
    ++e.counters.early_launches;
  }
  if (FailsNow(&e.fail_launch)) return Return(e.launch_error);
  for (int p = 0; p < pointer_count; ++p) CheckPointer(e, *launch, stream->device, pointers[p]);
  ++e.counters.launches;
  const int device = stream->device;
  const auto run = [&e, device, launch] {
    if (!CountLaunch(e, device)) return;
    Order order;
    uint64_t number;
    {
      const std::lock_guard<std::mutex> order_lock(e.mutex);
      order = e.options.order;
      number = e.launch_number++;
    }
    RunKernel(*launch, order, number);
  };
  return Return(Push(e, stream, run, /*kernel=*/true));
}

}  // namespace lockstep::emulator
