// The state of the emulated machine, and what the runtime's calls are made of (runtime_*.cc).
// Internal to the emulator.
//
// Two locks. `mutex` guards all state and is held briefly: by the callers of what takes an
// Emulator&, but where it says otherwise. `running` is held by whoever runs queued work or opens
// device memory, and may be held long; it is taken first. Work that waits for other threads' lets
// go of it meanwhile (Pause).
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "tests/gpu/emulator/arena.h"
#include "tests/gpu/emulator/emulator.h"

namespace lockstep::emulator {

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

// What a stream runs: work, a record that is passed, one that is waited for, or a delay.
struct Operation {
  enum class Kind { kWork, kRecord, kWait, kDelay } kind = Kind::kWork;
  std::function<void()> work;
  std::shared_ptr<Record> record;
  Clock::duration takes = {};
  Clock::time_point ends = {};  // of a delay that has begun
};

struct Node {
  std::function<void()> work;
  std::vector<int> after;
  bool kernel = false;
  cudaGraphNode_t handle = nullptr;
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
  std::vector<int> captured_last;          // nodes that what comes next must wait for
  std::vector<cudaGraphNode_t> told_last;  // as the last call was told
};

using Graph = std::shared_ptr<const std::vector<Node>>;

struct Executable {
  Graph graph;
  std::shared_ptr<std::atomic<int>> launched;  // that have not run
};

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
  std::map<CUgraphExec_st*, Executable> executables;
  std::map<const char*, Pinned> pinned;
  std::vector<std::shared_ptr<Capture>> captures;  // that are going on
  std::vector<std::weak_ptr<Stream>> all_streams;  // destroyed ones with work included
  std::map<const void*, size_t> shared_limits;     // of kernels that may have more
  int fail_allocation = 0, fail_host_allocation = 0, fail_launch = 0, fail_instantiation = 0;
  cudaError_t allocation_error = cudaSuccess, host_allocation_error = cudaSuccess,
              launch_error = cudaSuccess, instantiation_error = cudaSuccess;
  Counters counters;
  uint64_t next_handle = 1, launch_number = 0, random = 0;
  int generation = 0;
};

Emulator& E();

// Of the calling thread.
struct Local {
  int generation = 0;
  int device = 0;
  cudaError_t last = cudaSuccess;
};
inline Local& ThreadState() {
  thread_local Local local;
  if (local.generation != E().generation) local = {E().generation, 0, cudaSuccess};
  return local;
}

template <class T>
T* NewHandle(Emulator& e) {
  // Never an address of anything.
  return reinterpret_cast<T*>(uintptr_t{0x10} + 0x10 * e.next_handle++);
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
  // For a while, device memory may not be touched by the work that runs.
  static void Shut() { current_->Close(); }
  static void Reopen() { current_->Open(); }

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

// ---- errors of the calls.

// What a call returns, which the thread's cudaGetLastError then tells.
cudaError_t Return(cudaError_t error);
// What every call returns that needs a device; `device`: -1: the thread's.
cudaError_t Usable(Emulator& e, int device = -1);
// Counts down to a planted failure.
inline bool FailsNow(int* countdown) { return *countdown > 0 && --*countdown == 0; }

// ---- captures.

inline void Invalidate(Capture& capture) { capture.valid = false; }
// Calls that CUDA forbids while anything of that mode is captured.
cudaError_t UnsafeInCapture(Emulator& e);
// For calls that wait for a stream.
cudaError_t WaitingInCapture(const Stream& stream);

// ---- streams.

cudaError_t FindStream(Emulator& e, cudaStream_t handle, std::shared_ptr<Stream>* stream);
// The place that the stream has come to.
std::shared_ptr<Record> Mark(const std::shared_ptr<Stream>& stream);
// The null stream and the blocking streams of a device wait for each other.
void OrderWithNullStream(Emulator& e, const std::shared_ptr<Stream>& stream);
// Work for a stream, or a node of what it captures, perhaps a kernel's.
cudaError_t Push(Emulator& e, const std::shared_ptr<Stream>& stream, std::function<void()> work,
                 bool kernel = false);
// Waits for records. Where order is permuted, other streams run a little first. Without `mutex`, as
// what follows.
void WaitFor(Emulator& e, const std::vector<std::shared_ptr<Record>>& records);
// Whether the record is passed, once everything before it has run that no delay holds up.
bool IsPassed(Emulator& e, const std::shared_ptr<Record>& record);
// Waits for everything on a device (-1: on all), for calls that free.
cudaError_t Quiet(Emulator& e, int device);
// Marks of the streams of a device that have something to run; with `mutex`.
std::vector<std::shared_ptr<Record>> MarkAll(Emulator& e, int device);
uint64_t Random(Emulator& e);

// ---- memory.

enum class Where { kPageable, kPinned, kDevice };
// Of [memory, memory + bytes); false: it goes beyond an allocation. Empty ranges may be anywhere.
bool Locate(Emulator& e, const void* memory, size_t bytes, Where* where, int* device);

}  // namespace lockstep::emulator
