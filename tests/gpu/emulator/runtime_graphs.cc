// The CUDA runtime of the emulator: captures and graphs.
#include <algorithm>
#include <numeric>
#include <utility>

#include "tests/gpu/emulator/runtime.h"

namespace lockstep::emulator {
namespace {

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

}  // namespace
}  // namespace lockstep::emulator

using namespace lockstep::emulator;  // NOLINT: the runtime's functions have no namespace

using Lock = std::lock_guard<std::mutex>;

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

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t** before, const cudaGraphEdgeData**,
                                     size_t* count) {
  if (const cudaError_t error = cudaStreamIsCapturing(handle, status);
      error != cudaSuccess || *status != cudaStreamCaptureStatusActive) {
    return error;
  }
  Emulator& e = E();
  const Lock lock(e.mutex);
  std::shared_ptr<Stream> stream;
  if (const cudaError_t error = FindStream(e, handle, &stream); error != cudaSuccess) {
    return Return(error);
  }
  stream->told_last.clear();
  for (const int node : stream->captured_last) {
    stream->told_last.push_back(stream->capture->nodes[node].handle);
  }
  *before = stream->told_last.data();
  *count = stream->told_last.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t handle, cudaGraphNodeType* type) {
  Emulator& e = E();
  const Lock lock(e.mutex);
  for (const auto& capture : e.captures) {
    const auto node = std::find_if(capture->nodes.rbegin(), capture->nodes.rend(),
                                   [handle](const Node& n) { return n.handle == handle; });
    if (node == capture->nodes.rend()) continue;
    *type = node->kernel ? cudaGraphNodeTypeKernel : cudaGraphNodeTypeMemcpy;
    return cudaSuccess;
  }
  return Return(cudaErrorInvalidValue);
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
  if (FailsNow(&e.fail_instantiation)) return Return(e.instantiation_error);
  *executable = NewHandle<CUgraphExec_st>(e);
  e.executables[*executable] = {it->second, std::make_shared<std::atomic<int>>(0)};
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
  const Executable& launch = it->second;
  if (launch.launched->fetch_add(1) > 0) ++e.counters.graph_relaunches;
  return Return(Push(e, stream, [&e, launch] {
    Replay(e, *launch.graph);
    --*launch.launched;
  }));
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
