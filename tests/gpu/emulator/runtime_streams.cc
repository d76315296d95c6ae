// The CUDA runtime of the emulator: streams and events.
#include "tests/gpu/emulator/runtime.h"

using namespace lockstep::emulator;  // NOLINT: the runtime's functions have no namespace

using Lock = std::lock_guard<std::mutex>;

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
  std::shared_ptr<Record> record;
  {
    const Lock lock(e.mutex);
    if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
      return Return(error);
    }
    if (const cudaError_t error = WaitingInCapture(*stream); error != cudaSuccess) {
      return Return(error);
    }
    if (stream->queue.empty() && !stream->busy) return cudaSuccess;
    // Not at once: a caller that asks only once must not find its work done.
    if (stream->queue.empty() || stream->queue.back().kind != Operation::Kind::kRecord) {
      Mark(stream);
      return Return(cudaErrorNotReady);
    }
    record = stream->queue.back().record;
  }
  if (!IsPassed(e, record)) return Return(cudaErrorNotReady);
  const Lock lock(e.mutex);
  return Return(Usable(e, stream->device));
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
  std::shared_ptr<Record> record;
  int device;
  {
    const Lock lock(e.mutex);
    ++e.counters.queries;
    const auto event = e.events.find(handle);
    if (event == e.events.end()) return Return(cudaErrorInvalidResourceHandle);
    device = event->second->device;
    if (const cudaError_t error = Usable(e, device); error != cudaSuccess) return Return(error);
    if (const cudaError_t error = UnsafeInCapture(e); error != cudaSuccess) return Return(error);
    record = event->second->record;
    if (record == nullptr || record->done) return cudaSuccess;
    if (record->capture != nullptr) return Return(cudaErrorCapturedEvent);
    // Not at once: a caller that asks only once must not find its work done.
    if (record->polls++ == 0) return Return(cudaErrorNotReady);
  }
  if (!IsPassed(e, record)) return Return(cudaErrorNotReady);
  const Lock lock(e.mutex);
  return Return(Usable(e, device));
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
  if (!a->second->record->done || !b->second->record->done) return Return(cudaErrorNotReady);
  *milliseconds =
      std::chrono::duration<float, std::milli>(b->second->record->time - a->second->record->time)
          .count();
  return cudaSuccess;
}
