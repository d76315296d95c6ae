#include "worker/data/batch_loader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/data/allocation_count.h"
#include "worker/device/augment.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::data {
namespace {

using ::testing::HasSubstr;

// 53 samples of 2 x 2 pixels in `channels` channels, each with its own content and label.
std::shared_ptr<const Dataset> MakeSet(int64_t channels = 1, int64_t samples = 53) {
  const SampleShape shape = {2, 2, channels};
  std::vector<uint8_t> images;
  std::vector<int32_t> labels;
  for (int64_t i = 0; i < samples; ++i) {
    for (int64_t k = 0; k < shape.features(); ++k) {
      images.push_back(static_cast<uint8_t>(i * 5 + k * 37));
    }
    labels.push_back(static_cast<int32_t>(i));
  }
  return std::make_shared<const Dataset>(shape, samples, std::move(images), std::move(labels));
}

class BatchLoaderTest : public testing::Test {
 protected:
  BatchLoaderTest()
      : device_(device::MakeCpuDevice().value()), stream_(device_->MakeStream().value()) {
    options_.dataset = MakeSet();
    options_.batch = 10;
    options_.shards = 4;
    options_.last_shard = 4;
    options_.seed = 9;
  }

  std::unique_ptr<BatchLoader> Make() {
    auto loader = BatchLoader::Make(*device_, options_);
    EXPECT_EQ(loader.status(), absl::OkStatus());
    return loader.ok() ? *std::move(loader) : nullptr;
  }

  absl::StatusOr<const Batch*> Acquire(BatchLoader& loader, int64_t step, int first_shard = 0,
                                       int last_shard = 100) {
    return loader.Acquire(*stream_, step, first_shard, last_shard);
  }

  // What a batch says of some shards, as text: floats bit by bit.
  static std::string Describe(const Batch& batch, int64_t features, int first, int last) {
    std::string text = absl::StrCat(batch.step, " ", batch.epoch, " ", batch.samples);
    for (const ShardBatch& shard : batch.shards) {
      if (shard.shard < first || shard.shard >= last) continue;
      absl::StrAppend(&text, "\n", shard.shard, " ", shard.rows, " ", shard.first_position, ":");
      for (int64_t i = 0; i < shard.rows; ++i) absl::StrAppend(&text, " ", shard.labels[i]);
      for (int64_t i = 0; i < shard.rows * features; ++i) {
        absl::StrAppend(&text, " ", absl::Hex(absl::bit_cast<uint32_t>(shard.data[i])));
      }
    }
    return text;
  }

  std::vector<std::string> Take(BatchLoader& loader, int64_t first, int64_t last,
                                int first_shard = 0, int last_shard = 100) {
    std::vector<std::string> batches;
    for (int64_t step = first; step <= last; ++step) {
      const auto batch = Acquire(loader, step, first_shard, last_shard);
      EXPECT_EQ(batch.status(), absl::OkStatus());
      batches.push_back(Describe(**batch, options_.dataset->features(), first_shard, last_shard));
      loader.Release(step);
    }
    return batches;
  }

  std::unique_ptr<device::Device> device_;
  std::unique_ptr<device::Stream> stream_;  // the CPU's does nothing: slots may share it
  BatchLoaderOptions options_;
};

// Every value of three epochs against the definition: permutation, shards, (pixel / 255 - mean) /
// std.
TEST_F(BatchLoaderTest, HoldsTheRightSamples) {
  options_.dataset = MakeSet(3);
  options_.mean = {0.1, 0.2, 0.3};
  options_.std = {0.5, 0.25, 2.0};
  for (const bool shuffle : {true, false}) {
    options_.shuffle = shuffle;
    const auto loader = Make();
    const Dataset& set = *options_.dataset;
    for (int64_t step = 1; step <= 18; ++step) {
      const auto batch = Acquire(*loader, step);
      ASSERT_EQ(batch.status(), absl::OkStatus());
      const int64_t epoch = (step - 1) / 6 + 1, first = (step - 1) % 6 * 10;
      EXPECT_EQ((*batch)->step, step);
      EXPECT_EQ((*batch)->epoch, epoch);
      EXPECT_EQ((*batch)->samples, first == 50 ? 3 : 10);
      const std::vector<int64_t> order = Permutation(9, epoch, 53);
      ASSERT_EQ((*batch)->shards.size(), 4u);
      int64_t position = 0;
      for (const ShardBatch& shard : (*batch)->shards) {
        EXPECT_EQ(shard.first_position, position);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(shard.data) % 64, 0u);
        for (int64_t row = 0; row < shard.rows; ++row, ++position) {
          const int64_t sample =
              shuffle ? order[static_cast<size_t>(first + position)] : first + position;
          ASSERT_EQ(shard.labels[row], set.labels()[sample]);
          for (int64_t k = 0; k < 12; ++k) {
            const auto c = static_cast<size_t>(k % 3);
            const double expected =
                (static_cast<const uint8_t*>(set.data())[sample * 12 + k] / 255.0 -
                 options_.mean[c]) /
                options_.std[c];
            ASSERT_NEAR(shard.data[row * 12 + k], expected, 1e-6 * (1 + std::abs(expected)));
          }
        }
      }
      EXPECT_EQ(position, (*batch)->samples);
      loader->Release(step);
    }
  }
}

// The changes are those of the step and the position in the global batch.
TEST_F(BatchLoaderTest, AugmentsByStepAndPosition) {
  options_.augmentation = MakeAugmentation(9, 1, true, 1);
  options_.shuffle = false;
  const auto loader = Make();
  const Dataset& set = *options_.dataset;
  const auto* bytes = static_cast<const uint8_t*>(set.data());
  int changed = 0;
  for (int64_t step = 1; step <= 18; ++step) {
    const auto batch = Acquire(*loader, step);
    ASSERT_EQ(batch.status(), absl::OkStatus());
    for (const ShardBatch& shard : (*batch)->shards) {
      for (int64_t row = 0; row < shard.rows; ++row) {
        const int64_t position = shard.first_position + row;
        const int64_t sample = (step - 1) % 6 * 10 + position;
        const device::SampleChange change =
            device::DrawChange(options_.augmentation, set.shape(), static_cast<uint64_t>(step),
                               static_cast<uint64_t>(position));
        for (int64_t y = 0; y < 2; ++y) {
          for (int64_t x = 0; x < 2; ++x) {
            const int64_t from_y = y + change.shift_y;
            const int64_t from_x = (change.flip ? 1 - x : x) + change.shift_x;
            const bool empty = from_y < 0 || from_y > 1 || from_x < 0 || from_x > 1 ||
                               (y == change.cut_top && x == change.cut_left);
            const uint8_t byte = empty ? 0 : bytes[sample * 4 + from_y * 2 + from_x];
            ASSERT_EQ(shard.data[row * 4 + y * 2 + x], static_cast<float>(byte) / 255.0f);
            changed += byte != bytes[sample * 4 + y * 2 + x];
          }
        }
      }
    }
    loader->Release(step);
  }
  EXPECT_GT(changed, 300);
  // Another epoch of the same samples in the same places is changed otherwise.
  const std::vector<std::string> batches = Take(*Make(), 1, 12);
  for (size_t i = 0; i < 6; ++i) EXPECT_NE(batches[i].substr(5), batches[i + 6].substr(5));
}

TEST_F(BatchLoaderTest, ContentDoesNotDependOnDepthOrStart) {
  options_.augmentation = MakeAugmentation(9, 1, true, 1);
  const std::vector<std::string> whole = Take(*Make(), 1, 20);
  for (const int depth : {1, 5}) {
    options_.depth = depth;
    for (const int64_t first : {1, 4, 6, 7, 15}) {  // in mid-epoch, at its last batch, at a new one
      options_.first_step = first;
      const std::vector<std::string> part = Take(*Make(), first, 20);
      ASSERT_EQ(part, std::vector<std::string>(whole.begin() + first - 1, whole.end()));
    }
  }
}

// A batch stays while the next is decoded; acquired again behind later ones, it is decoded again.
TEST_F(BatchLoaderTest, DecodesTheNextBatchInAnotherPlace) {
  options_.augmentation = MakeAugmentation(9, 1, true, 1);
  options_.depth = 5;
  const std::vector<std::string> expected = Take(*Make(), 1, 20);
  options_.ahead = true;
  EXPECT_EQ(Take(*Make(), 1, 20), expected);
  const auto loader = Make();
  const auto describe = [&](const Batch& batch) {
    return Describe(batch, options_.dataset->features(), 0, 100);
  };
  const float* places[2] = {};
  for (int64_t step = 1; step <= 12; ++step) {
    const Batch* const batch = Acquire(*loader, step).value();
    EXPECT_EQ(describe(*batch), expected[static_cast<size_t>(step - 1)]);
    const float*& place = places[step % 2];
    EXPECT_TRUE(place == nullptr || place == batch->shards[0].data);
    place = batch->shards[0].data;
    for (const int64_t later : {1, 2, 3}) {
      const Batch* const next = Acquire(*loader, step + later).value();
      EXPECT_EQ(describe(*next), expected[static_cast<size_t>(step + later - 1)]);
    }
    const Batch* const again = Acquire(*loader, step).value();
    EXPECT_EQ(describe(*again), expected[static_cast<size_t>(step - 1)]);
    loader->Release(step);
  }
  EXPECT_NE(places[0], places[1]);
}

TEST_F(BatchLoaderTest, DecodesNothingBehindTheLastStep) {
  options_.depth = 5;
  options_.ahead = true;
  for (const int64_t last : {2, 3}) {
    options_.last_step = last;
    const auto loader = Make();
    ASSERT_EQ(Acquire(*loader, 4).status(), absl::OkStatus());  // all before it are chosen
    const ShardBatch shard = Acquire(*loader, 1).value()->shards[0];
    const auto samples = [&] {
      return std::vector<float>(shard.data, shard.data + shard.rows * options_.dataset->features());
    };
    const std::vector<float> first = samples();
    ASSERT_EQ(Acquire(*loader, 2).status(), absl::OkStatus());
    EXPECT_EQ(samples() == first, last == 2) << "where the third batch goes";
  }
}

TEST_F(BatchLoaderTest, ContentDoesNotDependOnTheShardsOwned) {
  options_.augmentation = MakeAugmentation(9, 1, true, 1);
  const auto whole = Make();
  options_.first_shard = 1;
  options_.last_shard = 3;
  const auto part = Make();
  EXPECT_EQ(Take(*part, 1, 14), Take(*whole, 1, 14, 1, 3));
  options_.first_shard = options_.last_shard = 2;  // a process that only helps otherwise
  EXPECT_EQ(Take(*Make(), 1, 2), (std::vector<std::string>{"1 1 10", "2 1 10"}));
}

TEST_F(BatchLoaderTest, SlotsDecodeTheirShards) {
  std::vector<std::vector<std::string>> expected, seen(4);
  for (int shard = 0; shard < 4; ++shard) {
    expected.push_back(Take(*Make(), 1, 200, shard, shard + 1));
  }
  options_.slots = 4;
  const auto loader = Make();
  std::vector<std::thread> slots;
  for (int shard = 0; shard < 4; ++shard) {
    slots.emplace_back([&, shard] { seen[shard] = Take(*loader, 1, 200, shard, shard + 1); });
  }
  for (std::thread& slot : slots) slot.join();
  EXPECT_EQ(seen, expected);
}

// The batch stays as it is while one slot still holds it, however far the others have come.
TEST_F(BatchLoaderTest, ABatchStaysUntilTheLastSlotReleasesIt) {
  options_.slots = 2;
  options_.depth = 3;
  const auto loader = Make();
  const Batch* held = Acquire(*loader, 1, 0, 2).value();
  const std::string before = Describe(*held, 4, 0, 2);
  for (int64_t step = 1; step <= 4; ++step) {  // the other slot, as far as the buffers go
    ASSERT_TRUE(Acquire(*loader, step, 2, 4).ok());
    loader->Release(step);
  }
  EXPECT_EQ(Describe(*held, 4, 0, 2), before);
  loader->Release(1);
  EXPECT_TRUE(Acquire(*loader, 5, 2, 4).ok());
}

// Of a set that is mapped: every page of the samples chosen is in memory before a slot decodes
// them, and no other.
TEST_F(BatchLoaderTest, BringsChosenSamplesToMemory) {
  constexpr int64_t kSamples = 40, kPages = 3;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = kSamples * kPages * page;
  void* pages = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(pages, MAP_FAILED);
  madvise(pages, bytes, MADV_NOHUGEPAGE);  // fails where there are none
  DatasetParts parts;
  parts.shape = {kPages, static_cast<int64_t>(page), 1};
  parts.classes = 1;
  parts.data = std::shared_ptr<const void>(pages, [bytes](void* p) { munmap(p, bytes); });
  parts.mapped = true;
  parts.labels.resize(kSamples);
  parts.digest = "none";  // computing it would read all
  options_.dataset = std::make_shared<const Dataset>(std::move(parts));
  options_.depth = 1;
  const auto loader = Make();
  ASSERT_TRUE(Acquire(*loader, 2, 0, 0).ok());  // both buffers are full, nothing is decoded
  std::vector<uint8_t> resident(kSamples * kPages);
  ASSERT_EQ(mincore(pages, bytes, resident.data()), 0);
  const std::vector<int64_t> order = Permutation(9, 1, kSamples);
  for (int64_t at = 0; at < kSamples; ++at) {
    for (int64_t k = 0; k < kPages; ++k) {
      EXPECT_EQ(resident[static_cast<size_t>(order[at] * kPages + k)] & 1, at < 20 ? 1 : 0)
          << "sample " << at << ", page " << k;
    }
  }
}

// A slot's memory is its own: the others' samples stay as they are, whoever acquires what.
TEST_F(BatchLoaderTest, DecodesOnlyTheShardsAskedFor) {
  const auto loader = Make();
  const ShardBatch& shard = Acquire(*loader, 1).value()->shards.front();
  const std::vector<float> before(shard.data, shard.data + shard.rows * 4);
  loader->Release(1);
  ASSERT_TRUE(Acquire(*loader, 2, 1, 4).ok());
  EXPECT_EQ(std::vector<float>(shard.data, shard.data + before.size()), before);
  loader->Release(2);
  ASSERT_TRUE(Acquire(*loader, 3).ok());
  EXPECT_NE(std::vector<float>(shard.data, shard.data + before.size()), before);
}

TEST_F(BatchLoaderTest, AllocatesNothingInTheStep) {
  const auto loader = Make();
  for (int64_t step = 1; step <= 3; ++step) {
    ASSERT_TRUE(Acquire(*loader, step).ok());
    loader->Release(step);
  }
  const int64_t before = AllocationCount();
  bool ok = true;
  for (int64_t step = 4; step <= 100; ++step) {
    ok = ok && Acquire(*loader, step).ok();
    loader->Release(step);
  }
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_TRUE(ok);
}

// A second passes whenever the time is asked for; tells when that happens.
class TickingClock : public Clock {
 public:
  absl::Time Now() override {
    const int64_t now = seconds_.fetch_add(1);
    if (notify_.exchange(false)) asked_.Notify();
    return absl::FromUnixSeconds(now);
  }
  void NotifyWhenAsked() { notify_ = true; }
  void WaitUntilAsked() { asked_.WaitForNotification(); }

 private:
  std::atomic<int64_t> seconds_{0};
  std::atomic<bool> notify_{false};
  absl::Notification asked_;
};

TEST_F(BatchLoaderTest, ReportsTheTimeWaited) {
  TickingClock clock;
  options_.clock = &clock;
  options_.depth = 1;
  const auto loader = Make();
  ASSERT_TRUE(Acquire(*loader, 1).ok());
  ASSERT_TRUE(Acquire(*loader, 2).ok());
  const absl::Duration before = loader->WaitTime();
  ASSERT_TRUE(Acquire(*loader, 2).ok());
  EXPECT_EQ(loader->WaitTime(), before);  // it was there
  clock.NotifyWhenAsked();
  std::thread slot([&] { EXPECT_TRUE(Acquire(*loader, 3).ok()); });  // both buffers are held
  clock.WaitUntilAsked();
  loader->Release(1);
  slot.join();
  EXPECT_EQ(loader->WaitTime() - before, absl::Seconds(1));
}

TEST_F(BatchLoaderTest, StopWakesEveryone) {
  TickingClock clock;
  options_.clock = &clock;
  options_.depth = 1;
  const auto loader = Make();
  ASSERT_TRUE(Acquire(*loader, 1).ok());
  ASSERT_TRUE(Acquire(*loader, 2).ok());
  clock.NotifyWhenAsked();
  std::vector<std::thread> slots;
  for (int i = 0; i < 3; ++i) {
    slots.emplace_back([&] { EXPECT_TRUE(absl::IsCancelled(Acquire(*loader, 3).status())); });
  }
  clock.WaitUntilAsked();
  loader->Stop();
  for (std::thread& slot : slots) slot.join();
  EXPECT_TRUE(absl::IsCancelled(Acquire(*loader, 3).status()));
}

TEST_F(BatchLoaderTest, RefusesStepsThatAreGone) {
  options_.first_step = 5;
  options_.depth = 1;
  const auto loader = Make();
  EXPECT_THAT(Acquire(*loader, 4).status().message(), HasSubstr("the loader begins at 5"));
  Take(*loader, 5, 6);
  ASSERT_TRUE(Acquire(*loader, 7).ok());  // in the buffer that held step 5
  EXPECT_TRUE(absl::IsFailedPrecondition(Acquire(*loader, 5).status()));
}

TEST_F(BatchLoaderTest, RefusesOptionsThatMakeNoSense) {
  const BatchLoaderOptions good = options_;
  const auto expect_refused = [&](const std::function<void(BatchLoaderOptions&)>& change,
                                  const std::string& text) {
    BatchLoaderOptions options = good;
    change(options);
    const absl::Status status = BatchLoader::Make(*device_, options).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(text));
  };
  expect_refused([](auto& o) { o.dataset = nullptr; }, "no data set");
  expect_refused([](auto& o) { o.shards = 11; }, "11 shards");
  expect_refused([](auto& o) { o.batch = 0; }, "a batch of 0");
  expect_refused([](auto& o) { o.last_shard = 5; }, "not within 0 to 4");
  expect_refused([](auto& o) { o.first_shard = 4, o.last_shard = 3; }, "shards 4 to 3");
  expect_refused([](auto& o) { o.slots = 0; }, "0 slots");
  expect_refused([](auto& o) { o.depth = 0; }, "depth 0");
  expect_refused([](auto& o) { o.first_step = 0; }, "first step 0");
  expect_refused([](auto& o) { o.mean = {0, 0}; }, "data.normalize.mean has 2 values; accepted: 1");
  expect_refused([](auto& o) { o.std = {}; }, "data.normalize.std has 0 values");
  expect_refused([](auto& o) { o.std = {0}; }, "data.normalize.std is 0");
}

TEST_F(BatchLoaderTest, EndsWhileChoosingOrWaiting) {
  for (int round = 0; round < 50; ++round) Make();
}

}  // namespace
}  // namespace lockstep::data
