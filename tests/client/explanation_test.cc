#include "client/explanation.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Place, CutsAsTheDesignSays) {
  // 8 shards on 3 slots: floor(i * 8 / 3).
  const std::vector<SlotShards> three = Place(128, 8, 3);
  ASSERT_EQ(three.size(), 3u);
  EXPECT_EQ(three[0].first_shard, 0);
  EXPECT_EQ(three[0].last_shard, 2);
  EXPECT_EQ(three[1].last_shard, 5);
  EXPECT_EQ(three[2].last_shard, 8);
  EXPECT_EQ(three[0].samples, 32);
  EXPECT_EQ(three[1].samples, 48);
}

TEST(Place, EveryShardAndSampleExactlyOnce) {
  for (int shards = 1; shards <= 20; ++shards) {
    for (int slots = 1; slots <= 24; ++slots) {
      for (const int64_t batch : {20, 37, 128}) {
        int next = 0;
        int64_t samples = 0;
        for (const SlotShards& slot : Place(batch, shards, slots)) {
          if (slot.first_shard == slot.last_shard) continue;
          EXPECT_EQ(slot.first_shard, next);
          next = slot.last_shard;
          samples += slot.samples;
        }
        EXPECT_EQ(next, shards);
        EXPECT_EQ(samples, batch);
      }
    }
  }
}

TEST(Place, TheFirstShardsHaveOneMore) {
  EXPECT_EQ(ShardSamples(10, 4, 0), 3);
  EXPECT_EQ(ShardSamples(10, 4, 1), 3);
  EXPECT_EQ(ShardSamples(10, 4, 2), 2);
  EXPECT_EQ(ShardSamples(10, 4, 3), 2);
}

TEST(Place, UsualCounts) {
  EXPECT_THAT(UsualSlotCounts(1), ElementsAre(1));
  EXPECT_THAT(UsualSlotCounts(8), ElementsAre(1, 2, 4, 8));
  EXPECT_THAT(UsualSlotCounts(6), ElementsAre(1, 2, 4, 6));
}

v1::JobSpec Spec() {
  v1::JobSpec spec;
  spec.set_name("tiny");
  spec.mutable_train()->set_batch(10);
  spec.mutable_train()->set_shards(4);
  return spec;
}

ordered_json Worker() {
  return ordered_json::parse(R"({
    "layers": [
      {"name":"flatten_1","type":"flatten","inputs":["data"],"output":[784],"parameters":0,"flops":0,
       "activation_bytes":0},
      {"name":"dense_1","type":"dense","inputs":["flatten_1"],"output":[10],"parameters":7850,
       "flops":15690,"activation_bytes":2048}],
    "parameters":7850, "flops":15690, "tensors":[],
    "memory":{"parameters_bytes":31400,"gradients_bytes":31400,"optimizer_bytes":0,
              "activations_bytes":2048,"total_bytes":64848},
    "segments":2, "buckets":1})");
}

TEST(Explanation, ShowsGraphMemoryAndShards) {
  const auto json = ExplanationJson(Spec(), Worker(), {1, 3});
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ((*json)["shard_samples"], ordered_json({3, 3, 2, 2}));
  EXPECT_EQ((*json)["placements"][1]["slots"], 3);
  EXPECT_EQ((*json)["placements"][1]["holds"][2]["first_shard"], 2);
  const std::string text = ExplanationText(*json, "name: tiny\n", Terminal());
  EXPECT_THAT(text, HasSubstr("dense_1    dense    flatten_1  10           7,850  15.69 k"));
  EXPECT_THAT(text, HasSubstr("total        63.3 KiB"));
  EXPECT_THAT(text, HasSubstr("3 samples in the first 2, 2 in the others"));
  EXPECT_THAT(text, HasSubstr("3  0, 1, 2-3"));
  EXPECT_THAT(text, HasSubstr("name: tiny"));
}

TEST(Explanation, ShowsTheMemoryOfAGpuPartByPart) {
  ordered_json worker = Worker();
  worker["memory"].update(ordered_json::parse(R"({
    "total_bytes":3145728, "at_least":true, "not_counted":["scratch", "a copy"],
    "parts":[{"what":"activations","bytes":2097152},{"what":"gradients","bytes":1048576}]})"));
  const auto json = ExplanationJson(Spec(), worker, {1});
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_THAT(ExplanationText(*json, "name: tiny\n", Terminal()),
              HasSubstr("Memory of one GPU with all shards (2 segments, 1 gradient buckets)\n"
                        "  activations      2.0 MiB\n"
                        "  gradients        1.0 MiB\n"
                        "  total, at least  3.0 MiB\n"
                        "  not counted: scratch\n"
                        "  not counted: a copy\n"));
  for (const char* missing : {"at_least", "not_counted"}) {
    ordered_json less = worker;
    less["memory"].erase(missing);
    EXPECT_FALSE(ExplanationJson(Spec(), less, {1}).ok()) << missing;
  }
}

TEST(Explanation, RefusesWhatIsNone) {
  for (const char* missing : {"layers", "parameters", "memory", "segments"}) {
    ordered_json worker = Worker();
    worker.erase(missing);
    EXPECT_EQ(ExplanationJson(Spec(), worker, {1}).status().code(),
              absl::StatusCode::kInvalidArgument)
        << missing;
  }
  ordered_json worker = Worker();
  worker["layers"][0]["output"] = "784";
  EXPECT_FALSE(ExplanationJson(Spec(), worker, {1}).ok());
  EXPECT_FALSE(ExplanationJson(Spec(), ordered_json::array(), {1}).ok());
}

}  // namespace
}  // namespace lockstep::client
