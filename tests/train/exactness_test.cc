// DESIGN section 1 as equalities: a job's result is a function of its spec, never of the cluster.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/train/members.h"
#include "worker/train/checkpoint.h"

namespace lockstep::train {
namespace {

class Exactness : public testing::TestWithParam<std::tuple<const char*, std::pair<int, int>>> {};

std::string YamlOf(const std::string& model) { return model == "mlp" ? MlpYaml() : CnnYaml(); }

std::string FileContent(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TEST_P(Exactness, EveryNumberIsThatOfOneSlot) {
  const auto [model, placement] = GetParam();
  const Cluster one{.workers = 1, .slots = 1, .output_dir = TemporaryFolder()};
  const Cluster many{
      .workers = placement.first, .slots = placement.second, .output_dir = TemporaryFolder()};
  const Training expected = RunMembers(YamlOf(model), one);
  const Training actual = RunMembers(YamlOf(model), many);
  ASSERT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 30u);
  ASSERT_EQ(expected.evaluations.size(), 5u);  // steps 7, 14, 21, 28 and the last, 30
  EXPECT_EQ(Numbers(actual), Numbers(expected));
  EXPECT_EQ(FileContent(many.output_dir + "/digests.jsonl"),
            FileContent(one.output_dir + "/digests.jsonl"));
  for (const char* step : {"step-00000013", "step-00000026", "step-00000030"}) {
    const std::string file = absl::StrCat("/checkpoints/", step, "/model.safetensors");
    EXPECT_TRUE(FileContent(many.output_dir + file) == FileContent(one.output_dir + file)) << file;
  }
}

// Each shard's forward and backward run exactly once a step across the cluster.
TEST_P(Exactness, EveryShardRunsOnceAStep) {
  const auto [model, placement] = GetParam();
  const Training run =
      RunMembers(YamlOf(model), {.workers = placement.first, .slots = placement.second});
  AgreedDigest(run);
  // 30 steps of 11 a epoch: the two short batches leave shards 3 to 7 empty.
  for (int shard = 0; shard < 8; ++shard) {
    int holders = 0;
    int64_t steps = 0;
    for (const v1::Ended& ended : run.ended) {
      ASSERT_EQ(ended.shard_steps_size(), 8);
      holders += ended.shard_steps(shard) > 0;
      steps += ended.shard_steps(shard);
    }
    EXPECT_EQ(holders, 1) << shard;
    EXPECT_EQ(steps, shard < 3 ? 30 : 28) << shard;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Exactness,
                         testing::Combine(testing::Values("mlp", "cnn"),
                                          testing::Values(std::pair(1, 1), std::pair(1, 2),
                                                          std::pair(2, 1), std::pair(3, 1),
                                                          std::pair(2, 2), std::pair(5, 1),
                                                          std::pair(8, 1))),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_",
                                               std::get<1>(info.param).first, "x",
                                               std::get<1>(info.param).second);
                         });

// Hosts exchange through Gloo, and two workers of three may share one: the digest does not know.
class Transports : public testing::TestWithParam<std::pair<const char*, std::vector<std::string>>> {
};

TEST_P(Transports, GiveTheSameDigest) {
  const std::vector<std::string>& hosts = GetParam().second;
  Cluster cluster{.workers = static_cast<int>(hosts.size()), .slots = 1, .host_ids = hosts};
  for (const std::string& host : hosts)
    cluster.addresses.push_back(host == "a" ? "127.0.0.1" : "127.0.0.2");
  EXPECT_EQ(AgreedDigest(RunMembers(MlpYaml(), cluster)), AgreedDigest(RunMembers(MlpYaml(), {})));
}

INSTANTIATE_TEST_SUITE_P(
    All, Transports,
    testing::Values(std::pair("TwoHosts", std::vector<std::string>{"a", "b"}),
                    std::pair("Mixed", std::vector<std::string>{"a", "a", "b"}),
                    std::pair("ThreeHosts", std::vector<std::string>{"a", "b", "c"})),
    [](const auto& info) { return info.param.first; });

// With one slot each and power-of-two placements, a member sends at most what a ring all-reduce
// sends.
TEST(Bytes, AreThoseOfARing) {
  for (int workers : {2, 4, 8}) {
    const std::string yaml = R"(
model: {preset: mlp, hidden: [500]}
optimizer: {learning_rate: 0.1}
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 640, validation_samples: 80}
train: {batch: 64, steps: 10, shards: 8}
)";
    const Training run = RunMembers(yaml, {.workers = workers, .slots = 1});
    AgreedDigest(run);
    // dense 784 x 500 without bias, batch_norm 2 x 500, dense 500 x 10 + 10; each begins on a cache
    // line.
    const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
    const int64_t gradient = 4 * (padded(784 * 500) + 2 * padded(500) + padded(5000) + padded(10));
    for (const v1::Ended& ended : run.ended) {
      EXPECT_GT(ended.gradient_bytes_sent(), 0);
      // Chunks end on cache lines: a member's own may be a line shorter than the mean, in every
      // bucket.
      EXPECT_LE(ended.gradient_bytes_sent(),
                10 * (2 * (workers - 1) * gradient / workers + 2 * 8 * 64 * workers))
          << workers;
    }
    int64_t total = 0;
    for (const v1::Ended& ended : run.ended) total += ended.gradient_bytes_sent();
    EXPECT_LE(total, 10 * 2 * (workers - 1) * gradient) << workers;
  }
}

// Saved in mid-epoch, stopped, resumed on another placement: the bits of the undisturbed run.
class Resume : public testing::TestWithParam<std::tuple<const char*, std::pair<int, int>>> {};

TEST_P(Resume, OnAnotherPlacementGivesTheBitsOfTheUndisturbedRun) {
  const auto [model, placement] = GetParam();
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const Training undisturbed = RunMembers(YamlOf(model), whole);
  const std::string digest = AgreedDigest(undisturbed);
  Cluster rest{.workers = placement.first, .slots = placement.second};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000013";
  rest.output_dir = TemporaryFolder();
  const Training resumed = RunMembers(YamlOf(model), rest);
  EXPECT_EQ(AgreedDigest(resumed), digest);
  ASSERT_EQ(resumed.steps.size(), 17u);
  EXPECT_EQ(resumed.steps.front().step(), 14);
  // The epoch's means are those of the whole epoch, not of the part after the resume.
  EXPECT_EQ(resumed.ended[0].result().train().SerializeAsString(),
            undisturbed.ended[0].result().train().SerializeAsString());
}

INSTANTIATE_TEST_SUITE_P(All, Resume,
                         testing::Combine(testing::Values("mlp", "cnn"),
                                          testing::Values(std::pair(1, 1), std::pair(1, 3),
                                                          std::pair(3, 1))),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param), "_",
                                               std::get<1>(info.param).first, "x",
                                               std::get<1>(info.param).second);
                         });

// A run that goes on from its own end trains nothing: it scores and saves once more, and reports
// what the undisturbed run did.
TEST(ResumeAtTheEnd, ReportsWhatTheWholeRunDid) {
  const Cluster whole{.workers = 1, .slots = 2, .output_dir = TemporaryFolder()};
  const Training undisturbed = RunMembers(MlpYaml(), whole);
  const std::string digest = AgreedDigest(undisturbed);
  const Training again =
      RunMembers(MlpYaml(), {.workers = 2, .slots = 1, .resume_from = whole.output_dir});
  EXPECT_EQ(AgreedDigest(again), digest);
  EXPECT_TRUE(again.steps.empty());
  ASSERT_EQ(again.evaluations.size(), 1u);
  ASSERT_EQ(again.checkpoints.size(), 1u);
  EXPECT_EQ(again.checkpoints[0].step(), 30);
  EXPECT_EQ(again.checkpoints[0].state_digest(), digest);
  const v1::JobResult& expected = undisturbed.ended[0].result();
  const v1::JobResult& result = again.ended[0].result();
  EXPECT_EQ(result.steps(), 30);
  EXPECT_EQ(result.epochs(), 2);
  EXPECT_EQ(result.train().SerializeAsString(), expected.train().SerializeAsString());
  EXPECT_EQ(result.validation().SerializeAsString(), expected.validation().SerializeAsString());
  EXPECT_EQ(result.parameter_digest(), expected.parameter_digest());
}

// 11 steps an epoch: those inside an epoch belong to it.
TEST(Evaluations, NameTheEpochTheyAreIn) {
  const Training run = RunMembers(MlpYaml(), {.workers = 1, .slots = 2});
  std::vector<std::pair<int64_t, int64_t>> epochs;
  for (const v1::Evaluation& e : run.evaluations) epochs.emplace_back(e.step(), e.epoch());
  EXPECT_THAT(epochs, testing::ElementsAre(std::pair(7, 1), std::pair(14, 2), std::pair(21, 2),
                                           std::pair(28, 3), std::pair(30, 3)));
}

// digest_every: 0 records the steps of checkpoints, and no other.
TEST(Digest, IsRecordedWithEveryCheckpoint) {
  std::string yaml = MlpYaml();
  yaml.replace(yaml.find("seed: 7"), 7, "seed: 7, digest_every: 0");
  const std::string out = TemporaryFolder();
  const Training run = RunMembers(yaml, {.workers = 1, .slots = 2, .output_dir = out});
  std::ifstream file(out + "/digests.jsonl");
  std::vector<std::string> steps;
  for (std::string line; std::getline(file, line);) steps.push_back(line.substr(0, line.find(',')));
  EXPECT_THAT(steps, testing::ElementsAre("{\"step\":13", "{\"step\":26", "{\"step\":30"));
  ASSERT_EQ(run.steps.size(), 30u);
  EXPECT_EQ(run.steps[12].state_digest(), run.checkpoints[0].state_digest());
  EXPECT_EQ(run.steps[11].state_digest(), "");
}

// The checkpoint lies on the second host alone: its worker hands the state to the first.
TEST(ResumeOnTwoHosts, TakesTheCheckpointFromWhoeverHasIt) {
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(MlpYaml(), whole));
  const Training resumed =
      RunMembers(MlpYaml(), {.workers = 2,
                             .host_ids = {"a", "b"},
                             .addresses = {"127.0.0.1", "127.0.0.2"},
                             .resume_from = whole.output_dir + "/checkpoints/step-00000013",
                             .resume_rank = 1});
  EXPECT_THAT(resumed.offered, testing::ElementsAre(-1, 13));
  EXPECT_EQ(AgreedDigest(resumed), digest);
  EXPECT_EQ(resumed.steps.size(), 17u);
}

TEST(Digest, IsTheSameRunAfterRunAndAnotherForAnotherSeed) {
  const std::string first = AgreedDigest(RunMembers(MlpYaml(), {.workers = 1, .slots = 2}));
  EXPECT_EQ(AgreedDigest(RunMembers(MlpYaml(), {.workers = 1, .slots = 2})), first);
  std::string other = MlpYaml();
  other.replace(other.find("seed: 7"), 7, "seed: 8");
  EXPECT_NE(AgreedDigest(RunMembers(other, {.workers = 1, .slots = 2})), first);
}

// One flipped bit in one replica shows in its digest at the next checkpoint, which nobody writes.
TEST(Digest, ShowsAFlippedBit) {
  const std::string out = TemporaryFolder();
  const Training run =
      RunMembers(MlpYaml(), {.workers = 2, .slots = 2, .output_dir = out, .flip_bit_at_step = 15});
  ASSERT_EQ(run.ended.size(), 2u);
  for (const v1::Ended& ended : run.ended) {
    EXPECT_EQ(ended.outcome(), v1::Ended::ERRORED);
    EXPECT_TRUE(ended.secondary());  // the coordinator's line names who
  }
  EXPECT_NE(run.ended[0].state_digest(), run.ended[1].state_digest());
  std::map<int64_t, std::vector<std::string>> by_step;
  for (const v1::ReplicaDigest& d : run.digests) by_step[d.step()].push_back(d.state_digest());
  ASSERT_EQ(by_step[13].size(), 2u);
  EXPECT_EQ(by_step[13][0], by_step[13][1]);
  ASSERT_EQ(by_step[26].size(), 2u);
  EXPECT_NE(by_step[26][0], by_step[26][1]);
  ASSERT_EQ(run.checkpoints.size(), 1u);
  EXPECT_EQ(run.checkpoints[0].step(), 13);
  const auto found = FindNewestCheckpoint(RealFileSystem(), out);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->manifest.step(), 13);
}

}  // namespace
}  // namespace lockstep::train
