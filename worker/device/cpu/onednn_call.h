// Calling oneDNN without allocating: a Call is a primitive with the layouts of its arguments, made
// once; a CpuStream keeps the library's memory objects for the calls it has made, and a run only
// points them at the data.
//
// A Call is immutable and may be run by several streams at once. A CpuStream belongs to one thread
// at a time. oneDNN's own OpenMP teams are switched off for every thread that makes or runs a Call.
#pragma once

#include <dnnl.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "worker/device/device.h"

namespace lockstep::device {

// Makes oneDNN run in the calling thread alone. FailedPrecondition where its OpenMP library cannot
// be found.
absl::Status UseOneThread();

// Small numbers for living calls, given again after a call has ended, so that streams stay small in
// a worker that serves job after job. Thread-safe.
class CallNumbers {
 public:
  struct Number {
    size_t index = 0;
    uint64_t serial = 0;  // never given twice
  };
  Number Take();
  void Return(Number number);

 private:
  absl::Mutex mutex_;
  std::vector<size_t> free_ ABSL_GUARDED_BY(mutex_);
  size_t next_index_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t next_serial_ ABSL_GUARDED_BY(mutex_) = 1;
};

class CpuStream;

class Call {
 public:
  static constexpr int kMostArguments = 6;
  struct Argument {
    int name;  // DNNL_ARG_...
    dnnl::memory::desc layout;
  };
  // At most kMostArguments.
  Call(std::shared_ptr<CallNumbers> numbers, const dnnl::engine& engine, dnnl::primitive primitive,
       std::vector<Argument> arguments);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // pointers[i] is the data of argument i (of an empty scratchpad: anything). A failure is
  // remembered by the stream.
  void Run(CpuStream& stream, std::initializer_list<const void*> pointers) const;

 private:
  friend class CpuStream;
  const std::shared_ptr<CallNumbers> numbers_;
  const CallNumbers::Number number_;
  const dnnl::engine engine_;
  const dnnl::primitive primitive_;
  const std::vector<Argument> arguments_;
};

class CpuStream : public Stream {
 public:
  explicit CpuStream(const dnnl::engine& engine) : stream_(engine) {}
  // The first failure of a kernel since the last call.
  absl::Status Synchronize() override;
  void Fail(absl::Status status);

 private:
  friend class Call;
  struct Handles {
    uint64_t serial = 0;
    std::vector<dnnl::memory> memories;
  };
  std::vector<dnnl::memory>& MemoriesOf(const Call& call);

  dnnl::stream stream_;
  std::vector<Handles> handles_;  // by number
  absl::Status status_;
};

}  // namespace lockstep::device
