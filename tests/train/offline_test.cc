// The worker's modes without a coordinator: explain and evaluate.
#include "worker/train/offline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "common/spec/spec.h"
#include "nlohmann/json.hpp"
#include "tests/train/members.h"
#include "worker/data/sampler.h"
#include "worker/device/cpu/cpu_device.h"
#include "worker/nn/plan.h"
#include "worker/nn/program.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

std::string WithBatch(int64_t batch) {
  std::string yaml = CnnYaml();
  yaml.replace(yaml.find("batch: 100"), 10, absl::StrCat("batch: ", batch));
  const std::string samples = "train_samples: 1030";
  return yaml.replace(yaml.find(samples), samples.size(),
                      absl::StrCat("train_samples: ", std::max<int64_t>(1030, batch)));
}

TEST(Explain, ShowsTheMemoryThatAPlanTakes) {
  const absl::StatusOr<std::string> text = ExplainSpec(WithBatch(100));
  ASSERT_TRUE(text.ok()) << text.status();
  const json explained = json::parse(*text);
  const v1::JobSpec spec = *spec::LoadText(WithBatch(100), "spec", {});
  auto program = *nn::Program::Compile(*spec::BuildGraph(spec));
  auto device = *device::MakeCpuDevice();
  auto operations = *nn::Operations::Make(program, *device, {13}, 8);
  nn::Plan::Options options;
  for (int shard = 0; shard < 8; ++shard) options.shards.push_back(shard);
  options.max_rows = 13;
  const auto plan = *nn::Plan::Make(program, *device, *operations, options);
  EXPECT_EQ(explained["memory"]["activations_bytes"], plan->activation_bytes());
  EXPECT_EQ(explained["segments"], plan->segments());
}

// As far as it can be known without one.
TEST(Explain, ShowsWhatAGpuNeedsWithoutOne) {
  setenv("LOCKSTEP_CUDA_MODULE", "/nowhere", 1);
  const absl::StatusOr<std::string> text =
      ExplainSpec(WithBatch(100) + "resources: {device: cuda}\n");
  unsetenv("LOCKSTEP_CUDA_MODULE");
  ASSERT_TRUE(text.ok()) << text.status();
  const json memory = json::parse(*text)["memory"];
  // Every leaf's, and their sum.
  EXPECT_EQ(memory["gradients_bytes"].get<int64_t>(),
            (8 + 1) * memory["parameters_bytes"].get<int64_t>());
  int64_t total = 0;
  bool same_gradients = false;
  for (const json& part : memory["parts"]) {
    total += part["bytes"].get<int64_t>();
    same_gradients |=
        part["what"] == "gradients of 8 shards" && part["bytes"] == memory["gradients_bytes"];
  }
  EXPECT_TRUE(same_gradients) << memory;
  EXPECT_EQ(memory["total_bytes"], total);
  EXPECT_EQ(memory["at_least"], true);
  EXPECT_THAT(memory["not_counted"][0].get<std::string>(),
              AllOf(HasSubstr("only a GPU can say"), HasSubstr("/nowhere")));
}

// What needs more memory than there is, is explained, not tried.
TEST(Explain, TakesNoMemoryOfItsOwn) {
  const absl::StatusOr<std::string> text = ExplainSpec(WithBatch(1048576));
  ASSERT_TRUE(text.ok()) << text.status();
  const int64_t planned = json::parse(*text)["memory"]["activations_bytes"];
  EXPECT_GT(planned, int64_t{4} << 30);
  rusage usage;
  ASSERT_EQ(getrusage(RUSAGE_SELF, &usage), 0);
  EXPECT_LT(usage.ru_maxrss, int64_t{2} << 20);  // KiB
}

class Evaluate : public testing::Test {
 protected:
  void SetUp() override {
    run_ = RunMembers(MlpYaml(), {.workers = 1, .slots = 2, .output_dir = folder_});
    AgreedDigest(run_);
  }
  const std::string folder_ = TemporaryFolder();
  Training run_;
};

TEST_F(Evaluate, SaysWhatItPassedOver) {
  const std::string newest = folder_ + "/checkpoints/step-00000030/model.safetensors";
  std::ofstream(newest, std::ios::binary | std::ios::app) << "x";
  const absl::StatusOr<std::string> text = EvaluateCheckpoint(folder_, "", 2);
  ASSERT_TRUE(text.ok()) << text.status();
  const json scored = json::parse(*text);
  EXPECT_EQ(scored["step"], 26);
  ASSERT_EQ(scored["notes"].size(), 1u);
  EXPECT_THAT(scored["notes"][0].get<std::string>(), HasSubstr("step-00000030 is not used"));
}

TEST_F(Evaluate, ReadsRelativeDataBelowLockstepData) {
  setenv("LOCKSTEP_DATA", "/usr/share/datasets", 1);
  const absl::StatusOr<std::string> text = EvaluateCheckpoint(folder_, "fashion-mnist", 2);
  unsetenv("LOCKSTEP_DATA");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(json::parse(*text)["validation"]["loss"].get<double>(),
            run_.ended[0].result().validation().loss());
  EXPECT_FALSE(json::parse(*text).contains("notes"));
  EXPECT_THAT(EvaluateCheckpoint(folder_, "fashion-mnist", 2).status().message(),
              AllOf(HasSubstr("fashion-mnist"), HasSubstr("LOCKSTEP_DATA")));
}

}  // namespace
}  // namespace lockstep::train
