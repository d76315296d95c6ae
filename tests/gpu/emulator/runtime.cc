// The CUDA runtime of the emulator: devices, memory, lazy streams, events, graphs and faults.
//
// Two locks. `mutex` guards all state and is held briefly. `running` is held by whoever runs queued
// work or opens device memory, and may be held long; it is taken first. Work that waits for other
// threads' lets go of it meanwhile (Pause).
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/gpu/emulator/arena.h"
#include "tests/gpu/emulator/emulator.h"
#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/simt.h"

namespace lockstep::emulator {
namespace {

struct Stream;
struct Capture;
using Clock = std::chrono::steady_clock;

// A place in a stream that events and waits refer to.
struct Record {
  std::shared_ptr<Stream> stream;  // that has not come to it; null: it has
  std::atomic<bool> done = false;
  Clock::time_point time;
  int polls = 0;
  std::shared_ptr<Capture> capture;  // where it is one of a capture
  std::vector<int> nodes;            // that it stands for
};

// What a stream runs: work, a record that is passed, or one that is waited for.
struct Operation {
  enum class Kind { kWork, kRecord, kWait } kind = Kind::kWork;
  std::function<void()> work;
  std::shared_ptr<Record> record;
};

struct Node {
  std::function<void()> work;
  std::vector<int> after;
};

struct Capture {
  std::shared_ptr<Stream> origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool valid = true;
  std::vector<Node> nodes;
  std::vector<std::shared_ptr<Stream>> streams;
};

struct Stream {
  int device = 0;
  bool blocking = false;  // with the null stream
  bool null = false;
  std::deque<Operation> queue;
  bool busy = false;  // what was at its front runs, and may be in Pause
  std::shared_ptr<Capture> capture;
  std::vector<int> captured_last;  // nodes that what comes next must wait for
};

using Graph = std::shared_ptr<const std::vector<Node>>;

struct Event {
  int device = 0;
  bool timed = true;
  std::shared_ptr<Record> record;
};

struct Device {
  std::unique_ptr<Arena> arena;
  std::shared_ptr<Stream> null_stream;
  cudaError_t lost = cudaSuccess;
  int64_t launches_left = -1;  // until it is lost; -1: it stays
  cudaError_t lost_with = cudaErrorIllegalAddress;
  std::set<int> peers;
};

struct Pinned {
  size_t bytes = 0;
  bool allocated = false;  // else registered
};

struct Emulator {
  std::mutex running;
  std::mutex mutex;
  Options options;
  std::vector<Device> devices;
  std::map<CUstream_st*, std::shared_ptr<Stream>> streams;
  std::map<CUevent_st*, std::shared_ptr<Event>> events;
  std::map<CUgraph_st*, Graph> graphs;
  std::map<CUgraphExec_st*, Graph> executables;
  std::map<const char*, Pinned> pinned;
  std::vector<std::shared_ptr<Capture>> captures;  // that are going on
  std::vector<std::weak_ptr<Stream>> all_streams;  // destroyed ones with work included
  std::map<const void*, size_t> shared_limits;     // of kernels that may have more
  int fail_allocation = 0, fail_host_allocation = 0, fail_launch = 0;
  cudaError_t allocation_error = cudaSuccess, host_allocation_error = cudaSuccess,
              launch_error = cudaSuccess;
  Counters counters;
  uint64_t next_handle = 1, launch_number = 0, random = 0;
  int generation = 0;
};

void Begin(Emulator& e, const Options& options);

Emulator& E() {
  static Emulator* const emulator = [] {
    auto* e = new Emulator;
    Begin(*e, OptionsOfEnvironment());
    return e;
  }();
  return *emulator;
}

// Of the calling thread.
struct Local {
  int generation = 0;
  int device = 0;
  cudaError_t last = cudaSuccess;
};
Local& ThreadState() {
  thread_local Local local;
  if (local.generation != E().generation) local = {E().generation, 0, cudaSuccess};
  return local;
}

template <class T>
T* NewHandle(Emulator& e) {
  // Never an address of anything.
  return reinterpret_cast<T*>(uintptr_t{0x10} + 0x10 * e.next_handle++);
}

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
  e.fail_host_allocation = e.fail_launch = 0;
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

// Device memory may be touched while one of these lives. Takes `running`.
class Running {
 public:
  Running() : lock_(E().running), outer_(current_) { current_ = this; }
  ~Running() {
    current_ = outer_;
    Close();
  }
  // Lets others have it for a moment.
  static void Pause() {
    Running& self = *current_;
    const bool open = self.open_;
    self.Close();
    self.lock_.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    self.lock_.lock();
    if (open) self.Open();
  }
  void Open() {
    if (open_) return;
    open_ = true;
    for (Device& device : E().devices) device.arena->Open();
  }

 private:
  void Close() {
    if (open_ && E().options.protect) {
      for (Device& device : E().devices) device.arena->Close();
    }
    open_ = false;
  }

  static thread_local Running* current_;
  std::unique_lock<std::mutex> lock_;
  Running* const outer_;
  bool open_ = false;
};

thread_local Running* Running::current_ = nullptr;

// ---- errors of the calls.

cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) ThreadState().last = error;
  return error;
}

// What every call returns that needs a device; `device`: -1: the thread's.
cudaError_t Usable(Emulator& e, int device = -1) {
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) return cudaErrorInsufficientDriver;
  if (e.devices.empty()) return cudaErrorNoDevice;
  return e.devices[device < 0 ? ThreadState().device : device].lost;
}

// ---- captures.

void Invalidate(Capture& capture) { capture.valid = false; }

// Calls that CUDA forbids while anything of that mode is captured.
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

// For calls that wait for a stream.
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

// The null stream and the blocking streams of a device wait for each other.
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

cudaError_t Push(Emulator& e, const std::shared_ptr<Stream>& stream, std::function<void()> work) {
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
    capture.nodes.push_back({std::move(work), stream->captured_last});
    stream->captured_last = {static_cast<int>(capture.nodes.size()) - 1};
    return cudaSuccess;
  }
  OrderWithNullStream(e, stream);
  stream->queue.push_back({Operation::Kind::kWork, std::move(work), nullptr});
  return cudaSuccess;
}

// Runs until the stream has passed the record. With `running` held, without `mutex`.
void RunUntil(Emulator& e, Running& running, const std::shared_ptr<Record>& record) {
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
    switch (operation.kind) {
      case Operation::Kind::kWork:
        if (!lost) {
          running.Open();
          operation.work();
        }
        break;
      case Operation::Kind::kWait:
        RunUntil(e, running, operation.record);
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
  }
}

uint64_t Random(Emulator& e) {
  uint64_t z = (e.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Waits for records. Where order is permuted, other streams run a little first.
void WaitFor(Emulator& e, const std::vector<std::shared_ptr<Record>>& records) {
  Running running;
  std::vector<std::shared_ptr<Record>> others;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    ++e.counters.waits;
    if (e.options.order.kind == Order::Kind::kPermuted) {
      for (const auto& weak : e.all_streams) {
        const auto stream = weak.lock();
        if (stream == nullptr || stream->queue.empty() || Random(e) % 2 == 0) continue;
        auto record = std::make_shared<Record>();
        record->stream = stream;
        const size_t before = Random(e) % (stream->queue.size() + 1);
        stream->queue.insert(stream->queue.begin() + static_cast<ptrdiff_t>(before),
                             {Operation::Kind::kRecord, nullptr, record});
        others.push_back(std::move(record));
      }
    }
  }
  for (const auto& record : others) RunUntil(e, running, record);
  for (const auto& record : records) RunUntil(e, running, record);
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

enum class Where { kPageable, kPinned, kDevice };
// Of [memory, memory + bytes); false: it goes beyond an allocation. Empty ranges may be anywhere.
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

// Runs what was captured: each node after those that it waits for, else in the emulator's order.
void Replay(Emulator& e, const std::vector<Node>& nodes) {
  std::vector<int> order;
  std::vector<char> ran(nodes.size(), 0);
  Order::Kind kind;
  {
    const std::lock_guard<std::mutex> lock(e.mutex);
    kind = e.options.order.kind;
  }
  if (kind == Order::Kind::kNatural) {  // as late as can be, for what other branches wait for
    std::vector<std::pair<int, size_t>> stack;
    const auto visit = [&](int root) {
      if (ran[root]) return;
      stack.push_back({root, 0});
      while (!stack.empty()) {
        auto& [node, next] = stack.back();
        if (next < nodes[node].after.size()) {
          const int before = nodes[node].after[next++];
          if (!ran[before]) stack.push_back({before, 0});
          continue;
        }
        if (!ran[node]) order.push_back(node);
        ran[node] = 1;
        stack.pop_back();
      }
    };
    std::vector<char> needed(nodes.size(), 0);
    for (const Node& node : nodes) {
      for (const int before : node.after) needed[before] = 1;
    }
    for (size_t n = 0; n < nodes.size(); ++n) {
      if (!needed[n]) visit(static_cast<int>(n));
    }
  } else if (kind == Order::Kind::kReversed) {  // as it was captured
    order.resize(nodes.size());
    std::iota(order.begin(), order.end(), 0);
  } else {
    std::vector<int> waits(nodes.size(), 0), ready;
    std::vector<std::vector<int>> then(nodes.size());
    for (size_t n = 0; n < nodes.size(); ++n) {
      waits[n] = static_cast<int>(nodes[n].after.size());
      for (const int before : nodes[n].after) then[before].push_back(static_cast<int>(n));
      if (waits[n] == 0) ready.push_back(static_cast<int>(n));
    }
    while (!ready.empty()) {
      const std::lock_guard<std::mutex> lock(e.mutex);
      std::swap(ready[Random(e) % ready.size()], ready.back());
      const int node = ready.back();
      ready.pop_back();
      order.push_back(node);
      for (const int next : then[node]) {
        if (--waits[next] == 0) ready.push_back(next);
      }
    }
  }
  for (const int node : order) nodes[node].work();
}

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

// Waits for everything on a device, for calls that free.
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

// Counts down to a planted failure.
bool FailsNow(int* countdown) { return *countdown > 0 && --*countdown == 0; }

}  // namespace

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
  if (FailsNow(&e.fail_launch)) return Return(e.launch_error);
  for (int p = 0; p < pointer_count; ++p) CheckPointer(e, *launch, stream->device, pointers[p]);
  ++e.counters.launches;
  const int device = stream->device;
  return Return(Push(e, stream, [&e, device, launch] {
    if (!CountLaunch(e, device)) return;
    Order order;
    uint64_t number;
    {
      const std::lock_guard<std::mutex> order_lock(e.mutex);
      order = e.options.order;
      number = e.launch_number++;
    }
    RunKernel(*launch, order, number);
  }));
}

}  // namespace lockstep::emulator

using namespace lockstep::emulator;  // NOLINT: the runtime's functions have no namespace

using Lock = std::lock_guard<std::mutex>;

// ---- errors and devices.

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  ThreadState().last = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const Local& local = ThreadState();
  if (static_cast<size_t>(local.device) < e.devices.size() &&
      e.devices[local.device].lost != cudaSuccess) {
    return e.devices[local.device].lost;
  }
  return local.last;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = E().options.driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *count = 0;
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (e.devices.empty()) return Return(cudaErrorNoDevice);
  *count = static_cast<int>(e.devices.size());
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (e.devices.empty()) return Return(cudaErrorNoDevice);
  if (device < 0 || static_cast<size_t>(device) >= e.devices.size()) {
    return Return(cudaErrorInvalidDevice);
  }
  ThreadState().device = device;
  return Return(e.devices[device].lost);
}

cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }

cudaError_t cudaGetDevice(int* device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *device = ThreadState().device;
  const cudaError_t error = Usable(e);
  return Return(error);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (e.options.driver_version < CUDART_VERSION / 1000 * 1000) {
    return Return(cudaErrorInsufficientDriver);
  }
  if (device < 0 || static_cast<size_t>(device) >= e.devices.size()) {
    return Return(cudaErrorInvalidDevice);
  }
  *properties = {};
  std::string name = e.options.name;
  if (e.devices.size() > 1) name += " " + std::to_string(device);
  std::snprintf(properties->name, sizeof(properties->name), "%s", name.c_str());
  properties->uuid.bytes[0] = 'E';
  properties->uuid.bytes[15] = static_cast<char>(device);
  properties->totalGlobalMem = e.options.memory;
  properties->sharedMemPerBlock = kSharedBytes;
  properties->sharedMemPerBlockOptin = kMostSharedBytes;
  properties->sharedMemPerMultiprocessor = kMostSharedBytes + 1024;
  properties->reservedSharedMemPerBlock = 1024;
  properties->regsPerBlock = 65536;
  properties->warpSize = warpSize;
  properties->maxThreadsPerBlock = kMostThreads;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->major = e.options.major;
  properties->minor = e.options.minor;
  properties->multiProcessorCount = e.options.multiprocessors;
  properties->l2CacheSize = 50 << 20;
  properties->pciBusID = device + 1;
  properties->ECCEnabled = 1;
  properties->canMapHostMemory = 1;
  properties->unifiedAddressing = 1;
  properties->concurrentKernels = 1;
  properties->asyncEngineCount = 3;
  properties->memoryBusWidth = 5120;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  const auto give = [value](auto v) {
    *value = static_cast<int>(v);
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return give(p.maxThreadsPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return give(p.sharedMemPerBlock);
    case cudaDevAttrWarpSize:
      return give(p.warpSize);
    case cudaDevAttrMultiProcessorCount:
      return give(p.multiProcessorCount);
    case cudaDevAttrIntegrated:
      return give(p.integrated);
    case cudaDevAttrEccEnabled:
      return give(p.ECCEnabled);
    case cudaDevAttrPciBusId:
      return give(p.pciBusID);
    case cudaDevAttrPciDeviceId:
      return give(p.pciDeviceID);
    case cudaDevAttrL2CacheSize:
      return give(p.l2CacheSize);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return give(p.maxThreadsPerMultiProcessor);
    case cudaDevAttrPciDomainId:
      return give(p.pciDomainID);
    case cudaDevAttrComputeCapabilityMajor:
      return give(p.major);
    case cudaDevAttrComputeCapabilityMinor:
      return give(p.minor);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return give(p.sharedMemPerMultiprocessor);
    case cudaDevAttrPageableMemoryAccess:
      return give(p.pageableMemoryAccess);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return give(p.sharedMemPerBlockOptin);
  }
  return Return(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) {
    return error;
  }
  std::snprintf(id, static_cast<size_t>(length), "%08X:%02X:%02X.0", p.pciDomainID, p.pciBusID,
                p.pciDeviceID);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Emulator& e = E();
  int device;
  {
    const Lock lock(e.mutex);
    device = ThreadState().device;
    if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  }
  return Return(Quiet(e, device));
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const int devices = static_cast<int>(e.devices.size());
  if (device < 0 || peer < 0 || device >= devices || peer >= devices) {
    return Return(cudaErrorInvalidDevice);
  }
  *can = device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  const int device = ThreadState().device;
  if (peer < 0 || static_cast<size_t>(peer) >= e.devices.size() || peer == device) {
    return Return(cudaErrorInvalidDevice);
  }
  if (flags != 0) return Return(cudaErrorInvalidValue);
  return Return(e.devices[device].peers.insert(peer).second ? cudaSuccess
                                                            : cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  return Return(e.devices[ThreadState().device].peers.erase(peer) > 0
                    ? cudaSuccess
                    : cudaErrorPeerAccessNotEnabled);
}

// ---- memory.

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

// ---- streams and events.

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (flags > cudaStreamNonBlocking) return Return(cudaErrorInvalidValue);
  auto stream = std::make_shared<Stream>();
  stream->device = ThreadState().device;
  stream->blocking = flags == cudaStreamDefault;
  *handle = NewHandle<CUstream_st>(e);
  e.all_streams.push_back(stream);
  e.streams[*handle] = std::move(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

// What is queued still runs when something waits for the device, or for an event in it.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  const cudaError_t error = FindStream(e, handle, &stream);
  if (stream == nullptr || stream->null) return Return(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) Invalidate(*stream->capture);
  e.streams.erase(handle);
  // Its last operation keeps the stream until it has run.
  if (!stream->queue.empty()) Mark(stream);
  return Return(error);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Emulator& e = E();
  std::shared_ptr<Stream> stream;
  std::vector<std::shared_ptr<Record>> records;
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
      return Return(error);
    }
    if (const cudaError_t error = WaitingInCapture(*stream); error != cudaSuccess) {
      return Return(error);
    }
    OrderWithNullStream(e, stream);
    records.push_back(Mark(stream));
  }
  WaitFor(e, records);
  const Lock lock(e.mutex);
  return Return(Usable(e, stream->device));
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Emulator& e = E();
  std::shared_ptr<Stream> stream;
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
      return Return(error);
    }
    if (const cudaError_t error = WaitingInCapture(*stream); error != cudaSuccess) {
      return Return(error);
    }
    if (stream->queue.empty()) return cudaSuccess;
    // Not at once: a caller that asks only once must not find its work done.
    if (stream->queue.back().kind != Operation::Kind::kRecord) {
      Mark(stream);
      return cudaErrorNotReady;
    }
  }
  return cudaStreamSynchronize(handle);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  const auto event = e.events.find(event_handle);
  if (event == e.events.end()) return Return(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Record> record = event->second->record;
  if (record == nullptr) return cudaSuccess;  // never recorded
  if (record->capture != nullptr) {
    const auto& capture = record->capture;
    if (std::find(e.captures.begin(), e.captures.end(), capture) == e.captures.end()) {
      return Return(cudaErrorCapturedEvent);
    }
    if (stream->capture != nullptr && stream->capture != capture) {
      Invalidate(*stream->capture);
      Invalidate(*capture);
      return Return(cudaErrorStreamCaptureMerge);
    }
    if (!capture->valid) return Return(cudaErrorStreamCaptureInvalidated);
    if (stream->null) {
      Invalidate(*capture);
      return Return(cudaErrorStreamCaptureImplicit);
    }
    if (stream->capture == nullptr) {
      stream->capture = capture;
      stream->captured_last.clear();
      capture->streams.push_back(stream);
    }
    for (const int node : record->nodes) {
      auto& last = stream->captured_last;
      if (std::find(last.begin(), last.end(), node) == last.end()) last.push_back(node);
    }
    return cudaSuccess;
  }
  if (stream->capture != nullptr) {
    Invalidate(*stream->capture);
    return Return(cudaErrorStreamCaptureIsolation);
  }
  OrderWithNullStream(e, stream);
  if (!record->done) stream->queue.push_back({Operation::Kind::kWait, nullptr, record});
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  return Return(Push(e, stream, [=] { function(data); }));
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  auto event = std::make_shared<Event>();
  event->device = ThreadState().device;
  event->timed = (flags & cudaEventDisableTiming) == 0;
  *handle = NewHandle<CUevent_st>(e);
  e.events[*handle] = std::move(event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  return Return(e.events.erase(event) > 0 ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  const auto event = e.events.find(event_handle);
  if (event == e.events.end() || event->second->device != stream->device) {
    return Return(cudaErrorInvalidResourceHandle);
  }
  if (stream->capture != nullptr) {
    if (!stream->capture->valid) return Return(cudaErrorStreamCaptureInvalidated);
    auto record = std::make_shared<Record>();
    record->capture = stream->capture;
    record->nodes = stream->captured_last;
    event->second->record = std::move(record);
    return cudaSuccess;
  }
  OrderWithNullStream(e, stream);
  event->second->record = Mark(stream);
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Emulator& e = E();
  {
    const Lock lock(e.mutex);
    const auto event = e.events.find(handle);
    if (event == e.events.end()) return Return(cudaErrorInvalidResourceHandle);
    if (const cudaError_t error = Usable(e, event->second->device); error != cudaSuccess) {
      return Return(error);
    }
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
    const auto& record = event->second->record;
    if (record == nullptr || record->done) return cudaSuccess;
    if (record->capture != nullptr) return Return(cudaErrorCapturedEvent);
    // Not at once: a caller that asks only once must not find its work done.
    if (record->polls++ == 0) return cudaErrorNotReady;
  }
  return cudaEventSynchronize(handle);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Emulator& e = E();
  std::shared_ptr<Record> record;
  int device;
  {
    const Lock lock(e.mutex);
    const auto event = e.events.find(handle);
    if (event == e.events.end()) return Return(cudaErrorInvalidResourceHandle);
    device = event->second->device;
    if (const cudaError_t error = Usable(e, device); error != cudaSuccess) return Return(error);
    record = event->second->record;
    if (record == nullptr) return cudaSuccess;
    if (record->capture != nullptr) {
      Invalidate(*record->capture);
      return Return(cudaErrorCapturedEvent);
    }
  }
  WaitFor(e, {record});
  const Lock lock(e.mutex);
  return Return(Usable(e, device));
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const auto a = e.events.find(begin), b = e.events.find(end);
  if (a == e.events.end() || b == e.events.end() || !a->second->timed || !b->second->timed ||
      a->second->record == nullptr || b->second->record == nullptr) {
    return Return(cudaErrorInvalidResourceHandle);
  }
  if (!a->second->record->done || !b->second->record->done) return cudaErrorNotReady;
  *milliseconds =
      std::chrono::duration<float, std::milli>(b->second->record->time - a->second->record->time)
          .count();
  return cudaSuccess;
}

// ---- graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  if (stream->null) return Return(cudaErrorStreamCaptureUnsupported);
  if (stream->capture != nullptr) return Return(cudaErrorIllegalState);
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->streams.push_back(stream);
  stream->capture = capture;
  stream->captured_last.clear();
  e.captures.push_back(std::move(capture));
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *graph = nullptr;
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr) return Return(cudaErrorIllegalState);
  if (capture->origin != stream) {
    Invalidate(*capture);
    return Return(cudaErrorStreamCaptureUnmatched);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed &&
      capture->thread != std::this_thread::get_id()) {
    Invalidate(*capture);
    return Return(cudaErrorStreamCaptureWrongThread);
  }
  // Every node must come before the end of the stream that began.
  std::vector<char> joined(capture->nodes.size(), 0);
  std::vector<int> stack = stream->captured_last;
  while (!stack.empty()) {
    const int node = stack.back();
    stack.pop_back();
    if (joined[node]) continue;
    joined[node] = 1;
    for (const int before : capture->nodes[node].after) stack.push_back(before);
  }
  for (const auto& captured : capture->streams) {
    captured->capture = nullptr;
    captured->captured_last.clear();
  }
  std::erase(e.captures, capture);
  if (!capture->valid) return Return(cudaErrorStreamCaptureInvalidated);
  if (std::find(joined.begin(), joined.end(), 0) != joined.end()) {
    return Return(cudaErrorStreamCaptureUnjoined);
  }
  *graph = NewHandle<CUgraph_st>(e);
  e.graphs[*graph] = std::make_shared<const std::vector<Node>>(std::move(capture->nodes));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->capture->valid   ? cudaStreamCaptureStatusActive
                                       : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  const auto it = e.graphs.find(graph);
  if (it == e.graphs.end() || nodes != nullptr) return Return(cudaErrorInvalidValue);
  *count = it->second->size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  *executable = nullptr;
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
  const auto it = e.graphs.find(graph);
  if (it == e.graphs.end()) return Return(cudaErrorInvalidValue);
  *executable = NewHandle<CUgraphExec_st>(e);
  e.executables[*executable] = it->second;
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t handle) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  return Return(e.executables.contains(executable) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  const auto it = e.executables.find(executable);
  if (it == e.executables.end()) return Return(cudaErrorInvalidValue);
  ++e.counters.graph_launches;
  return Return(Push(e, stream, [&e, nodes = it->second] { Replay(e, *nodes); }));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  return Return(e.executables.erase(executable) > 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  return Return(e.graphs.erase(graph) > 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  if (const cudaError_t error = Usable(e); error != cudaSuccess) return Return(error);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostSharedBytes) {
    return Return(cudaErrorInvalidValue);
  }
  e.shared_limits[function] = static_cast<size_t>(value);
  return cudaSuccess;
}
