#include "worker/train/memory_need.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/spec/spec.h"
#include "worker/nn/program.h"

namespace lockstep::train {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr int64_t kMib = 1 << 20;
constexpr char kWide[] = R"(
name: wide
data: {format: synthetic, shape: [16, 16, 3], train_samples: 3000, validation_samples: 3000}
model:
  layers:
    - {type: conv2d, filters: 16, kernel: 3, padding: 1}
    - {type: batch_norm, sync: batch}
    - {type: relu}
    - {type: conv2d, filters: 16, kernel: 3, padding: 1}
    - {type: global_average_pool}
    - {type: dense, units: 10}
optimizer: {type: adam, learning_rate: 0.01}
train: {batch: 1000, steps: 1}
)";

class Memory : public testing::Test {
 protected:
  void SetUp() override {
    const absl::StatusOr<v1::JobSpec> spec = spec::LoadText(kWide, "spec", {});
    ASSERT_TRUE(spec.ok()) << spec.status();
    program_ = *nn::Program::Compile(*spec::BuildGraph(*spec));
    facts_.program = program_.get();
    facts_.samples = facts_.evaluation_samples = 3000;
    facts_.optimizer_vectors = 2;
    facts_.stream_bytes = 16 * kMib;
    facts_.data_bytes = facts_.samples * 3072;
    facts_.scratch = [](const std::vector<int64_t>& rows, int) -> absl::StatusOr<int64_t> {
      return 1024 * *std::max_element(rows.begin(), rows.end());
    };
  }
  // In 7 shards, on one GPU.
  static JobCut Cut(int64_t batch, int64_t evaluation_batch = 64) {
    return {batch, evaluation_batch, 7, 1, {{0, 7}}, 0};
  }
  static JobCut OnGpus(int gpus, JobCut cut) {
    cut.members.clear();
    for (int i = 0; i < gpus; ++i) {
      cut.members.push_back({i * cut.shards / gpus, (i + 1) * cut.shards / gpus});
    }
    return cut;
  }
  // Whether a job would be begun, on every member.
  bool Begins(JobCut cut, int64_t free) const {
    MemoryFacts facts = facts_;
    facts.exchanges_on_gpu = cut.members.size() > 1;
    for (cut.rank = 0; cut.rank < std::ssize(cut.members); ++cut.rank) {
      if (NeedWithin(cut, facts, free)->total > free) return false;
    }
    return true;
  }
  std::string Activations(const JobCut& cut) const {
    const MemoryNeed need = *NeedOf(cut, facts_, false);
    for (const MemoryNeed::Part& part : need.parts) {
      if (part.what.find("activations of ") != std::string::npos) return part.what;
    }
    return "";
  }

  std::shared_ptr<const nn::Program> program_;
  MemoryFacts facts_;
};

TEST_F(Memory, SaysHowManySamplesThereAreAtOnce) {
  constexpr char kOf[] = "the plan of slot 0: activations of ";
  EXPECT_EQ(Activations(Cut(1000)), absl::StrCat(kOf, "7 shards (1000 samples at once)"));
  EXPECT_EQ(Activations(Cut(200)), absl::StrCat(kOf, "7 shards (200 samples at once)"));
  // A batch is of what there is.
  EXPECT_EQ(Activations(Cut(7000)), absl::StrCat(kOf, "7 shards (3000 samples at once)"));
  // A synchronized norm takes a microbatch of every shard.
  JobCut accumulated = Cut(1000);
  accumulated.accumulate = 2;
  EXPECT_EQ(Activations(accumulated), absl::StrCat(kOf, "7 shards (503 samples at once)"));
  JobCut last = OnGpus(2, Cut(1000));
  last.rank = 1;
  EXPECT_EQ(Activations(last), absl::StrCat(kOf, "4 shards (571 samples at once)"));
  EXPECT_EQ(Activations(Cut(100, 3000)),
            absl::StrCat(kOf, "evaluation, 7 shards (3000 samples at once)"));
}

// What is advised begins, and nothing nearer to what is now would.
TEST_F(Memory, AdviceIsWhatWouldBegin) {
  const JobCut cut = Cut(1000);
  const int64_t need = NeedOf(cut, facts_, true)->total;
  EXPECT_TRUE(Begins(cut, need));
  int advised = 0;
  for (int64_t free = need - 1; free > 40 * kMib; free -= 2 * kMib) {
    SCOPED_TRACE(free);
    ASSERT_FALSE(Begins(cut, free));
    const std::string fits = WhatFits(cut, facts_, free);
    int64_t batch = 994;
    while (batch > 0 && !Begins(Cut(batch), free)) batch -= 7;
    if (batch > 0) {
      EXPECT_THAT(fits, HasSubstr(absl::StrCat("train.batch=", batch, " (now 1000)")));
      ++advised;
    }
    int gpus = 2;
    while (gpus <= 7 && !Begins(OnGpus(gpus, cut), free)) ++gpus;
    if (gpus <= 7) {
      EXPECT_THAT(fits, HasSubstr(absl::StrCat(gpus, " workers with a GPU each")));
    }
  }
  EXPECT_GT(advised, 10);
}

TEST_F(Memory, OnlyEvaluationsBatchIsMadeSmallerWhereThatIsEnough) {
  const JobCut cut = Cut(100, 3000);
  const int64_t free = NeedOf(Cut(100, 700), facts_, true)->total;
  const std::string fits = WhatFits(cut, facts_, free);
  EXPECT_THAT(fits, HasSubstr("train.evaluate.batch=700 (now 3000)"));
  EXPECT_THAT(fits, Not(HasSubstr("train.batch=")));
}

// Where neither is enough by itself.
TEST_F(Memory, MoreGpusAndASmallerBatchAreAdvisedTogether) {
  // The scratch is what the shards of a GPU make it.
  facts_.scratch = [](const std::vector<int64_t>& rows, int shards) -> absl::StatusOr<int64_t> {
    return kMib * (shards * 10 + rows.back());
  };
  const int64_t free = 216 * kMib;
  const std::string fits = WhatFits(Cut(1000), facts_, free);
  EXPECT_THAT(fits, testing::MatchesRegex(
                        "[2-7] workers with a GPU each and train.batch=[0-9]+ \\(now 1000\\)"));
  EXPECT_EQ(WhatFits(Cut(1000), facts_, kMib), "");
}

// Of the probe and the loop's memory one is there at a time; the staging is the loop's.
TEST_F(Memory, TheProbeIsNotBesideTheStaging) {
  facts_.scratch = [](const std::vector<int64_t>&, int) -> absl::StatusOr<int64_t> {
    return 100 * kMib;
  };
  const MemoryNeed need = *NeedOf(Cut(70), facts_, false);
  ASSERT_GT(need.total, need.stepping + need.staging);
  EXPECT_EQ(NeedOf(Cut(70), facts_, true)->total, need.total);
}

}  // namespace
}  // namespace lockstep::train
