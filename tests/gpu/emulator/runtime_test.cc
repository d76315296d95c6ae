// The emulated runtime: streams, events and graphs, in every order that CUDA allows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "tests/gpu/emulator/emulator_fixture.h"

namespace lockstep::emulator {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

// ---- streams.

TEST_F(EmulatorTest, NothingHasRunBeforeItIsWaitedFor) {
  float* const x = Pinned(4, 1.0f);
  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(cudaStreamQuery(queue_.stream), cudaErrorNotReady);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(cudaStreamQuery(queue_.stream), cudaSuccess);
  EXPECT_EQ(x[0], 2.0f);

  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  cudaEvent_t const event = MakeEvent();
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);  // never recorded
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  Launch(queue_, dim3(1), dim3(4), 0, AddOne, 4, x);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(x[0], 2.0f);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_EQ(x[0], 3.0f);  // not what comes after the event
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(x[0], 4.0f);
}

TEST_F(EmulatorTest, QueriesDoNotWaitForADelay) {
  constexpr std::chrono::milliseconds kDelay(50);
  float* const x = Pinned(1, 1.0f);
  cudaStream_t const other = MakeStream();
  cudaEvent_t const event = MakeEvent(), of_other = MakeEvent();
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(of_other, other), cudaSuccess);
  const auto began = std::chrono::steady_clock::now();
  EXPECT_EQ(cudaEventQuery(of_other), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaErrorNotReady);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);
  int asked = 1;
  while (cudaEventQuery(of_other) == cudaErrorNotReady) {
    EXPECT_EQ(*x, 2.0f);  // what is before the delay has run
    ++asked;
  }
  EXPECT_GE(std::chrono::steady_clock::now() - began, kDelay);
  EXPECT_GT(asked, 1);
  EXPECT_EQ(*x, 4.0f);

  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  const auto again = std::chrono::steady_clock::now();
  while (cudaStreamQuery(queue_.stream) == cudaErrorNotReady) {
  }
  EXPECT_GE(std::chrono::steady_clock::now() - again, kDelay);
  cudaGetLastError();
  ASSERT_EQ(Delay(queue_.stream, kDelay), cudaSuccess);
  const auto last = std::chrono::steady_clock::now();
  EXPECT_EQ(Wait(), cudaSuccess);
  EXPECT_GE(std::chrono::steady_clock::now() - last, kDelay);
}

TEST_F(EmulatorTest, StreamsWaitOnlyForWhatTheyAreTold) {
  float* const x = Pinned(1, 0.0f);
  cudaStream_t const other = MakeStream();
  const Queue second = {other, nullptr};
  cudaEvent_t const event = MakeEvent();

  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(*x, 0.0f);  // doubled before one was added
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);

  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaEventRecord(event, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaStreamWaitEvent(other, event), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(other), cudaSuccess);
  EXPECT_EQ(*x, 4.0f);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);

  // What a destroyed stream holds still runs.
  Launch(second, dim3(1), dim3(1), 0, Double, 1, x);
  ASSERT_EQ(cudaStreamDestroy(other), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(other), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(*x, 5.0f);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(*x, 10.0f);
}

TEST_F(EmulatorTest, TheNullStreamAndBlockingStreamsWaitForEachOther) {
  float* const x = Pinned(1, 1.0f);
  const Queue blocking = {MakeStream(cudaStreamDefault), nullptr}, null;
  Launch(blocking, dim3(1), dim3(1), 0, AddOne, 1, x);
  Launch(null, dim3(1), dim3(1), 0, Double, 1, x);
  Launch(blocking, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(blocking.stream), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);
  // Ours is not one of them.
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(cudaStreamLegacy), cudaSuccess);
  EXPECT_EQ(*x, 5.0f);
}

TEST_F(EmulatorTest, CopiesFollowTheirRules) {
  float* const x = Device<float>(4);
  std::vector<float> host(4, 1.0f);
  const auto copy = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, queue_.stream);
  };
  EXPECT_EQ(copy(x, host.data(), 16, cudaMemcpyHostToDevice), cudaSuccess);
  host.assign(4, 2.0f);  // was read when the call was made
  float* const pinned = Pinned(4, 0.0f);
  EXPECT_EQ(copy(pinned, x, 16, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(pinned[0], 0.0f);
  EXPECT_EQ(copy(host.data(), x, 16, cudaMemcpyDefault), cudaSuccess);
  EXPECT_THAT(host, Each(1.0f));  // is written when it returns
  EXPECT_EQ(pinned[0], 1.0f);
  EXPECT_EQ(copy(x, pinned, 16, cudaMemcpyDefault), cudaSuccess);
  pinned[3] = 7.0f;  // is read when the copy runs
  EXPECT_THAT(Read(x, 4), ElementsAre(1.0f, 1.0f, 1.0f, 7.0f));

  EXPECT_EQ(copy(x, host.data(), 17, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(copy(x + 1, host.data(), 16, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(copy(x, host.data(), 16, cudaMemcpyDeviceToHost), cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(copy(x, nullptr, 16, cudaMemcpyDefault), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(x, 0, 17, queue_.stream), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(host.data(), 0, 16, queue_.stream), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(x + 2, 0, 8, queue_.stream), cudaSuccess);
  EXPECT_THAT(Read(x, 4), ElementsAre(1.0f, 1.0f, 0.0f, 0.0f));
  cudaGetLastError();
  // The second and third column of two rows.
  std::vector<float> corner(4);
  EXPECT_EQ(cudaMemcpy2DAsync(corner.data(), 8, pinned, 8, 4, 2, cudaMemcpyDefault, queue_.stream),
            cudaSuccess);
  EXPECT_THAT(corner, ElementsAre(1.0f, 0.0f, 1.0f, 0.0f));
}

// Neither a copy to the device from pageable memory nor clearing is over when the call returns.
TEST_F(EmulatorTest, BlockingCallsDoNotAllWait) {
  const std::vector<float> host(4, 1.0f);
  float *const x = Device<float>(4), *const y = Device<float>(4);
  ASSERT_EQ(cudaMemcpy(x, host.data(), 16, cudaMemcpyDefault), cudaSuccess);
  ASSERT_EQ(cudaMemset(y, 0, 16), cudaSuccess);
  EXPECT_TRUE(std::isnan(Read(x, 1)[0]));
  EXPECT_TRUE(std::isnan(Read(y, 1)[0]));
  ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(Read(x, 1)[0], 1.0f);
  EXPECT_EQ(Read(y, 1)[0], 0.0f);
}

TEST_F(EmulatorTest, HostFunctionsRunInOrder) {
  std::vector<float>* const seen = new std::vector<float>;
  float* const x = Pinned(1, 1.0f);
  static float* watched;
  watched = x;
  const auto note = [](void* to) { static_cast<std::vector<float>*>(to)->push_back(*watched); };
  ASSERT_EQ(cudaLaunchHostFunc(queue_.stream, note, seen), cudaSuccess);
  Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaLaunchHostFunc(queue_.stream, note, seen), cudaSuccess);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_THAT(*seen, ElementsAre(1.0f, 2.0f));
  delete seen;
}

TEST_F(EmulatorTest, EventsMeasureTime) {
  cudaEvent_t begin = nullptr, end = nullptr;
  ASSERT_EQ(cudaEventCreate(&begin), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(begin, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(end, queue_.stream), cudaSuccess);
  float milliseconds = -1;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaErrorNotReady);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, begin, end), cudaSuccess);
  EXPECT_GE(milliseconds, 0.0f);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, MakeEvent(), end), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventDestroy(begin), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(begin), cudaErrorInvalidResourceHandle);
}

TEST_F(EmulatorTest, ThreadsHaveStreamsOfTheirOwn) {
  constexpr int kThreads = 4, kRounds = 20;
  std::vector<float> last(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&last, t] {
      Queue queue;
      cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking);
      for (int i = 0; i < kRounds; ++i) {
        float *x = nullptr, *sum = nullptr;
        cudaMalloc(&x, 256 * sizeof(float));
        cudaHostAlloc(&sum, sizeof(float), cudaHostAllocDefault);
        const std::vector<float> values(256, static_cast<float>(t + i));
        cudaMemcpyAsync(x, values.data(), 256 * sizeof(float), cudaMemcpyDefault, queue.stream);
        Launch(queue, dim3(1), dim3(256), 8 * sizeof(float), Sums, 256, x, sum);
        cudaStreamSynchronize(queue.stream);
        last[static_cast<size_t>(t)] = *sum;
        cudaFreeHost(sum);
        cudaFree(x);
      }
      cudaStreamDestroy(queue.stream);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < kThreads; ++t) {
    EXPECT_EQ(last[static_cast<size_t>(t)], 256.0f * static_cast<float>(t + kRounds - 1));
  }
  EXPECT_EQ(Count().live_allocations, 0);
  EXPECT_EQ(Count().launches, kThreads * kRounds);
}

// ---- graphs.

class GraphTest : public EmulatorTest {
 protected:
  // What `calls` enqueues, ready to be launched.
  template <class Calls>
  cudaGraphExec_t Capture(const Calls& calls) {
    EXPECT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    calls();
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), cudaSuccess);
    cudaGraphExec_t executable = nullptr;
    EXPECT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    return executable;
  }
  // What ends a capture in which `call` was made.
  template <class Call>
  cudaError_t EndOfCaptureWith(cudaError_t expected, const Call& call) {
    EXPECT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    EXPECT_EQ(call(), expected);
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(queue_.stream, &graph);
    EXPECT_EQ(graph == nullptr, error != cudaSuccess);
    cudaGetLastError();
    return error;
  }
};

TEST_F(GraphTest, IsReplayedWithTheValuesOfItsTime) {
  float* const x = Pinned(1, 1.0f);
  float* const copy = Pinned(1, 0.0f);
  cudaGraphExec_t const graph = Capture([&] {
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    Launch(queue_, dim3(1), dim3(1), 0, Double, 1, x);
    cudaMemcpyAsync(copy, x, sizeof(float), cudaMemcpyDefault, queue_.stream);
  });
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);  // capturing runs nothing
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  EXPECT_EQ(*x, 1.0f);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 4.0f);
  *x = 10.0f;
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_EQ(*x, 46.0f);
  EXPECT_EQ(*copy, 46.0f);
  EXPECT_EQ(Count().graph_launches, 3);
  EXPECT_EQ(Count().graph_relaunches, 1);
  EXPECT_EQ(cudaGraphExecDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaErrorInvalidValue);
}

TEST_F(GraphTest, TakesInStreamsThatForkAndJoin) {
  float *const x = Pinned(1, 1.0f), *const y = Pinned(1, 1.0f);
  const Queue side = {MakeStream(), nullptr};
  cudaEvent_t const fork = MakeEvent(), join = MakeEvent();
  cudaGraphExec_t const graph = Capture([&] {
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, y);
    ASSERT_EQ(cudaEventRecord(fork, queue_.stream), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(side.stream, fork), cudaSuccess);
    Launch(side, dim3(1), dim3(1), 0, Double, 1, y);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    cudaStreamCaptureStatus status;
    ASSERT_EQ(cudaStreamIsCapturing(side.stream, &status), cudaSuccess);
    EXPECT_EQ(status, cudaStreamCaptureStatusActive);
    ASSERT_EQ(cudaEventRecord(join, side.stream), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(queue_.stream, join), cudaSuccess);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, y);
  });
  float expected = 1.0f;
  for (const Order& order : kOrders) {
    SetOrder(order);
    ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
    ASSERT_EQ(Wait(), cudaSuccess);
    expected = (expected + 1.0f) * 2.0f + 1.0f;
    EXPECT_EQ(*y, expected);
  }
  EXPECT_EQ(*x, 5.0f);
  // The side stream is an ordinary one again.
  Launch(side, dim3(1), dim3(1), 0, AddOne, 1, x);
  ASSERT_EQ(cudaStreamSynchronize(side.stream), cudaSuccess);
  EXPECT_EQ(*x, 6.0f);
}

// Branches that should wait for each other and do not differ between orders.
TEST_F(GraphTest, AMissingDependencyChangesResults) {
  float* const x = Pinned(1, 0.0f);
  const Queue side = {MakeStream(), nullptr};
  cudaEvent_t const fork = MakeEvent(), join = MakeEvent();
  cudaGraphExec_t const graph = Capture([&] {
    cudaEventRecord(fork, queue_.stream);
    cudaStreamWaitEvent(side.stream, fork);
    Launch(queue_, dim3(1), dim3(1), 0, AddOne, 1, x);
    Launch(side, dim3(1), dim3(1), 0, Double, 1, x);
    cudaEventRecord(join, side.stream);
    cudaStreamWaitEvent(queue_.stream, join);
  });
  std::vector<float> results;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SetOrder({Order::Kind::kPermuted, seed});
    *x = 1.0f;
    ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
    ASSERT_EQ(Wait(), cudaSuccess);
    results.push_back(*x);
  }
  EXPECT_THAT(results, testing::Contains(3.0f));
  EXPECT_THAT(results, testing::Contains(4.0f));
}

__global__ void PatientlyAddOne(float* x) {
  device::cuda::WaitForPrevious();
  *x += 1.0f;
}
__global__ void HastilyAddOne(float* x) {
  const float before = *x;
  device::cuda::WaitForPrevious();
  *x = before + 1.0f;
}
__global__ void SometimesAddOne(float* x) {
  if (threadIdx.x == 1) return;
  device::cuda::WaitForPrevious();
  *x += 1.0f;
}

// Where a kernel is all that it waits for; not where that is a copy, or more than one thing.
TEST_F(GraphTest, AKernelMayBeginBeforeTheOneBeforeHasEnded) {
  queue_.early = true;
  Queue side = queue_;
  side.stream = MakeStream();
  float *const x = Device<float>(1), *const y = Device<float>(1);
  cudaEvent_t const fork = MakeEvent(), join = MakeEvent();
  int64_t before = 0;
  const auto add = [&before](const Queue& queue, float* to) {
    before = Count().early_launches;
    Launch(queue, dim3(1), dim3(1), 0, PatientlyAddOne, to);
    return Count().early_launches > before;
  };
  cudaGraphExec_t const graph = Capture([&] {
    EXPECT_FALSE(add(queue_, x));  // the first
    EXPECT_TRUE(add(queue_, x));
    cudaMemsetAsync(x, 0, sizeof(float), queue_.stream);
    EXPECT_FALSE(add(queue_, x));
    cudaEventRecord(fork, queue_.stream);
    cudaStreamWaitEvent(side.stream, fork);
    EXPECT_TRUE(add(side, y));
    EXPECT_TRUE(add(queue_, x));
    cudaEventRecord(join, side.stream);
    cudaStreamWaitEvent(queue_.stream, join);
    EXPECT_FALSE(add(queue_, x));
  });
  EXPECT_FALSE(add(queue_, x));  // in no graph
  ASSERT_EQ(cudaMemsetAsync(y, 0, sizeof(float), queue_.stream), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(graph, queue_.stream), cudaSuccess);
  const std::vector<float> xs = Read(x, 1), ys = Read(y, 1);
  ASSERT_EQ(Wait(), cudaSuccess);
  EXPECT_THAT(xs, testing::ElementsAre(3.0f));
  EXPECT_THAT(ys, testing::ElementsAre(1.0f));
}

using GraphDeathTest = GraphTest;

TEST_F(GraphDeathTest, AKernelThatDoesNotWaitForTheOneBeforeIsFound) {
  queue_.early = true;
  float* const x = Device<float>(1);
  const auto run = [&](void (*kernel)(float*)) {
    cudaGraphExec_t const graph = Capture([&] {
      Launch(queue_, dim3(1), dim3(1), 0, PatientlyAddOne, x);
      Launch(queue_, dim3(2), dim3(2), 0, kernel, x);
    });
    cudaGraphLaunch(graph, queue_.stream);
    return Wait();
  };
  EXPECT_EQ(run(PatientlyAddOne), cudaSuccess);
  EXPECT_DEATH(run(HastilyAddOne), "");  // as the host that touches device memory
  EXPECT_DEATH(run(SometimesAddOne),
               "SometimesAddOne<<<(.|\n)*returned without waiting for the kernel before");
}

TEST_F(GraphTest, RefusesWhatCannotBeCaptured) {
  constexpr cudaError_t kUnsupported = cudaErrorStreamCaptureUnsupported;
  constexpr cudaError_t kInvalidated = cudaErrorStreamCaptureInvalidated;
  EXPECT_EQ(EndOfCaptureWith(cudaSuccess, [] { return cudaSuccess; }), cudaSuccess);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return Wait(); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [] { return cudaDeviceSynchronize(); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaStreamQuery(queue_.stream); }),
            kInvalidated);
  void* memory = nullptr;
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaMalloc(&memory, 16); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaFree(memory); }), kInvalidated);
  EXPECT_EQ(EndOfCaptureWith(kUnsupported, [&] { return cudaMallocHost(&memory, 16); }),
            kInvalidated);
  float* const x = Device<float>(4);
  std::vector<float> host(4);
  EXPECT_EQ(
      EndOfCaptureWith(
          kUnsupported,
          [&] { return cudaMemcpyAsync(x, host.data(), 16, cudaMemcpyDefault, queue_.stream); }),
      kInvalidated);
  // Work that was not captured cannot be waited for.
  cudaStream_t const other = MakeStream();
  cudaEvent_t const event = MakeEvent();
  ASSERT_EQ(cudaEventRecord(event, other), cudaSuccess);
  EXPECT_EQ(EndOfCaptureWith(cudaErrorStreamCaptureIsolation,
                             [&] { return cudaStreamWaitEvent(queue_.stream, event); }),
            kInvalidated);
  // A branch that does not come back.
  EXPECT_EQ(EndOfCaptureWith(cudaSuccess,
                             [&] {
                               cudaEventRecord(event, queue_.stream);
                               cudaStreamWaitEvent(other, event);
                               return cudaMemsetAsync(x, 0, 16, other);
                             }),
            cudaErrorStreamCaptureUnjoined);
  EXPECT_EQ(cudaEventSynchronize(event), cudaErrorCapturedEvent);
  // After an illegal call nothing more is captured.
  ASSERT_EQ(cudaStreamBeginCapture(queue_.stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&memory, 16), cudaSuccess);  // relaxed
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_EQ(Wait(), kUnsupported);
  EXPECT_EQ(cudaMemsetAsync(x, 0, 16, queue_.stream), kInvalidated);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), kInvalidated);
  EXPECT_EQ(cudaStreamEndCapture(queue_.stream, &graph), cudaErrorIllegalState);
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeRelaxed), kUnsupported);
}

}  // namespace
}  // namespace lockstep::emulator
