// The stream of the CUDA device on the emulator: who waits for it sleeps, whatever the driver does,
// and hears of what has failed meanwhile; and how many replays of a recording a stream takes.
#include "worker/device/cuda/cuda_stream.h"

#include <gtest/gtest.h>
#include <time.h>

#include <chrono>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/gpu/emulator/emulator.h"
#include "worker/device/cuda/cuda_device.h"

namespace lockstep::device::cuda {
namespace {

absl::Duration ProcessorTime() {
  timespec now;
  EXPECT_EQ(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now), 0);
  return absl::DurationFromTimespec(now);
}

class StreamTest : public testing::Test {
 protected:
  void SetUp() override {
    emulator::Configure({});
    device_ = MakeCudaDevice(0).value();
    stream_ = device_->MakeStream().value();
    flags_memory_ = device_->AllocateHostVisible(2 * sizeof(int)).value();
    flags_ = static_cast<int*>(flags_memory_->data());
  }
  void TearDown() override {
    flags_memory_.reset();
    stream_.reset();
    device_.reset();
  }
  const Queue& queue() { return QueueOf(*stream_); }
  // What a call that waits, with as much before it on the stream, costs its thread, at most.
  void ExpectSleeps(absl::FunctionRef<absl::Status()> wait) {
    const absl::Time began = absl::Now();
    const absl::Duration before = ProcessorTime();
    ASSERT_TRUE(wait().ok());
    const absl::Duration busy = ProcessorTime() - before, waited = absl::Now() - began;
    EXPECT_GE(waited, absl::FromChrono(kLong));
    EXPECT_LT(busy, waited / 4) << waited;
  }
  absl::StatusOr<std::unique_ptr<Recording>> Record(int calls) {
    return device_->Record(*stream_, [&] {
      for (int i = 0; i < calls; ++i) device_->Zero(*stream_, flags_, sizeof(int));
      return absl::OkStatus();
    });
  }
  void Set(int flag) {
    ASSERT_EQ(emulator::Enqueue(queue().stream, [this, flag] { flags_[flag] = 1; }), cudaSuccess);
  }

  static constexpr std::chrono::milliseconds kLong{200};
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Memory> flags_memory_;
  int* flags_ = nullptr;
};

TEST_F(StreamTest, WhoWaitsForAPlaceSleeps) {
  ASSERT_EQ(emulator::Delay(queue().stream, kLong), cudaSuccess);
  Set(0);
  const int64_t mark = stream_->Mark();
  Set(1);
  ExpectSleeps([&] { return stream_->WaitFor(mark); });
  EXPECT_EQ(flags_[0], 1);
  EXPECT_EQ(flags_[1], 0);
}

// The first wait asks again and again; those that follow sleep for as long as it took, and sooner
// or later notice that waits have become short.
TEST_F(StreamTest, AWaitIsLikeTheOneBefore) {
  const auto asked = [&](std::chrono::milliseconds delay) {
    EXPECT_EQ(emulator::Delay(queue().stream, delay), cudaSuccess);
    for (int i = 0; i < 2; ++i) cudaStreamQuery(queue().stream);  // the delay begins
    const int64_t mark = stream_->Mark(), before = emulator::Count().queries;
    EXPECT_TRUE(stream_->WaitFor(mark).ok());
    return emulator::Count().queries - before;
  };
  EXPECT_GT(asked(std::chrono::milliseconds(40)), 10);
  EXPECT_LE(asked(std::chrono::milliseconds(40)), 8);
  for (int i = 0; i < 20; ++i) asked(std::chrono::milliseconds(0));
  const absl::Time began = absl::Now();
  asked(std::chrono::milliseconds(0));
  EXPECT_LT(absl::Now() - began, absl::Milliseconds(20));
}

TEST_F(StreamTest, WhoWaitsForAllSleeps) {
  ASSERT_EQ(emulator::Delay(queue().stream, kLong), cudaSuccess);
  Set(0);
  stream_->Mark();
  Set(1);
  ExpectSleeps([&] { return stream_->Synchronize(); });
  EXPECT_EQ(flags_[0], 1);
  EXPECT_EQ(flags_[1], 1);
}

TEST_F(StreamTest, MarksAreOfTheirPlaces) {
  int64_t marks[Stream::kMarks];
  for (int64_t& mark : marks) {
    ASSERT_EQ(emulator::Enqueue(queue().stream, [this] { ++flags_[0]; }), cudaSuccess);
    mark = stream_->Mark();
  }
  for (int place = 0; place < Stream::kMarks; ++place) {
    ASSERT_TRUE(stream_->WaitFor(marks[place]).ok());
    EXPECT_EQ(flags_[0], place + 1);
  }
}

TEST_F(StreamTest, AWaitReportsALaunchThatWasRefused) {
  emulator::FailLaunch(1);
  device_->OneHot(*stream_, 1, 1, nullptr, nullptr);
  // Before it a wait is told that the stream is not ready yet.
  Set(0);
  EXPECT_FALSE(stream_->WaitFor(stream_->Mark()).ok());
  Set(0);
  EXPECT_TRUE(stream_->WaitFor(stream_->Mark()).ok()) << "reported once";

  emulator::FailLaunch(1);
  device_->OneHot(*stream_, 1, 1, nullptr, nullptr);
  Set(0);
  EXPECT_FALSE(stream_->Synchronize().ok());
  Set(0);
  EXPECT_TRUE(stream_->Synchronize().ok()) << "reported once";
}

TEST_F(StreamTest, AWaitEndsWhenTheDeviceIsLost) {
  emulator::LoseDevice(0, 0, cudaErrorECCUncorrectable);
  ASSERT_EQ(emulator::Delay(queue().stream, std::chrono::milliseconds(5)), cudaSuccess);
  Set(0);
  const absl::Status of_place = stream_->WaitFor(stream_->Mark()), of_all = stream_->Synchronize();
  for (const absl::Status& status : {of_place, of_all}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_NE(status.message().find("ECC"), std::string::npos) << status;
  }
  EXPECT_EQ(flags_[0], 0);
}

TEST_F(StreamTest, TakesAsManyReplaysAsTheirCallsAllow) {
  for (const auto& [calls, ahead] : std::initializer_list<std::pair<int, int>>{
           {1, 8}, {125, 8}, {126, 7}, {333, 3}, {334, 2}, {500, 2}, {1500, 2}}) {
    const auto recording = Record(calls).value();
    EXPECT_EQ(recording->most_ahead(), ahead) << calls << " calls";
    // None of them is a launch of what has not run; one more is.
    const int64_t before = emulator::Count().graph_relaunches;
    for (int i = 0; i < ahead; ++i) recording->Replay(*stream_);
    EXPECT_EQ(emulator::Count().graph_relaunches, before);
    recording->Replay(*stream_);
    EXPECT_EQ(emulator::Count().graph_relaunches, before + 1);
    ASSERT_TRUE(stream_->Synchronize().ok());
  }
}

TEST_F(StreamTest, KernelsOfARecordingBeginEarlyWhereTheGpuCan) {
  const auto early_launches = [] {
    const auto device = MakeCudaDevice(0).value();
    const auto stream = device->MakeStream().value();
    const auto labels = device->Allocate(sizeof(int32_t)).value();
    const auto one_hot = device->Allocate(sizeof(float)).value();
    const int64_t before = emulator::Count().early_launches;
    const auto launch = [&] {
      device->OneHot(*stream, 1, 1, static_cast<const int32_t*>(labels->data()),
                     static_cast<float*>(one_hot->data()));
    };
    const auto recording = device->Record(*stream, [&] {
      for (int i = 0; i < 3; ++i) launch();
      return absl::OkStatus();
    });
    EXPECT_TRUE(recording.ok()) << recording.status();
    launch();  // outside of it none does
    EXPECT_TRUE(stream->Synchronize().ok());
    // Nor does one that waits for another stream's.
    const auto other = device->MakeStream().value();
    const int64_t before_fork = emulator::Count().early_launches;
    const auto forked = device->Record(*stream, [&] {
      launch();
      device->Follow(*other, *stream);
      device->OneHot(*other, 1, 1, static_cast<const int32_t*>(labels->data()),
                     static_cast<float*>(one_hot->data()));
      device->Follow(*stream, *other);
      return absl::OkStatus();
    });
    EXPECT_TRUE(forked.ok()) << forked.status();
    EXPECT_EQ(emulator::Count().early_launches, before_fork);
    return emulator::Count().early_launches - before;
  };
  EXPECT_EQ(early_launches(), 2);
  setenv("LOCKSTEP_CUDA_EARLY_LAUNCH", "0", /*overwrite=*/1);
  EXPECT_EQ(early_launches(), 0);
  unsetenv("LOCKSTEP_CUDA_EARLY_LAUNCH");
  TearDown();
  emulator::Options older;
  older.major = 8;
  emulator::Configure(older);
  EXPECT_EQ(early_launches(), 0);
}

TEST_F(StreamTest, OneExecutableIsEnough) {
  emulator::FailInstantiation(1);
  EXPECT_EQ(Record(1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(stream_->Synchronize().ok()) << "reported once";
  emulator::FailInstantiation(3);
  const auto recording = Record(1).value();
  const int64_t before = emulator::Count().graph_relaunches;
  for (int i = 0; i < 4; ++i) recording->Replay(*stream_);
  EXPECT_EQ(emulator::Count().graph_relaunches, before + 2);
  EXPECT_TRUE(stream_->Synchronize().ok());
}

}  // namespace
}  // namespace lockstep::device::cuda
