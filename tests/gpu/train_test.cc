// Whole trainings on the CUDA device, by the same programs as on CPUs: at reduced shapes on the
// emulator, where they are part of the suite, and on a GPU, where the same file runs. A job's
// result is a function of its spec on this device too, and agrees with the CPU's within what
// rounding explains.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

struct Model {
  const char* name;
  const char* yaml;
  double tolerance;  // of a step's loss against the CPU's, relative
};

constexpr char kConvolutions[] = R"(
model:
  layers:
    - {name: conv1, type: conv2d, filters: 8, kernel: 3, padding: 1, stride: 2, bias: false}
    - {name: norm1, type: batch_norm}
    - {name: relu1, type: relu}
    - {name: conv2, type: conv2d, filters: 8, kernel: 3, padding: 1}
    - {name: relu2, type: relu}
    - {name: pool1, type: max_pool, kernel: 2, stride: 2}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.02}
)";

// Of layers that are stored as bf16 from the first convolution to the mean before the last.
constexpr char kResidual[] = R"(
model:
  layers:
    - {name: conv1, type: conv2d, filters: 8, kernel: 3, padding: 1, stride: 2, bias: false}
    - {name: norm1, type: batch_norm, sync: batch}
    - {name: relu1, type: relu}
    - {name: pool1, type: max_pool, kernel: 3, stride: 2, padding: 1}
    - {name: conv2, type: conv2d, filters: 8, kernel: 3, padding: 1, bias: false}
    - {name: norm2, type: batch_norm}
    - {name: sum1, type: add, inputs: [norm2, pool1]}
    - {name: relu2, type: relu}
    - {name: conv3, type: conv2d, filters: 16, kernel: 3, padding: 1, stride: 2}
    - {name: relu3, type: relu}
    - {name: conv4, type: conv2d, filters: 16, kernel: 1}
    - {name: sum2, type: add, inputs: [conv4, relu3]}
    - {name: mean, type: global_average_pool}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.02}
)";

constexpr char kLstm[] = R"(
model: {preset: lstm-classifier, lstm_hidden: 20}
optimizer: {type: adam, learning_rate: 0.002}
)";

// Each of at most 50,000 parameters. 6 steps an epoch, the last of 30 samples: 8 or 7 rows a shard,
// then 8, 8, 8, 6 and four empty shards.
constexpr Model kModels[] = {
    {"mlp", R"(
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 32}
    - {name: norm1, type: batch_norm, sync: batch}
    - {name: relu1, type: relu}
    - {name: drop1, type: dropout, rate: 0.2}
    - {name: dense2, type: dense, units: 24}
    - {name: relu2, type: relu}
    - {name: norm2, type: batch_norm, sync: batch}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05, l2: 0.0001}
)",
     1e-4},
    {"cnn", R"(
model:
  layers:
    - {name: conv1, type: conv2d, filters: 4, kernel: 3, padding: 1, stride: 2, bias: false}
    - {name: norm1, type: batch_norm}
    - {name: relu1, type: relu}
    - {name: pool1, type: max_pool, kernel: 2, stride: 2}
    - {name: conv2, type: conv2d, filters: 8, kernel: 3, padding: 1}
    - {name: relu2, type: relu}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
optimizer: {type: adam, learning_rate: 0.002, clip_norm: 1}
)",
     1e-4},
    {"lstm", kLstm, 1e-4},
    {"mlp_bf16", R"(
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 32}
    - {name: relu1, type: relu}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05}
)",
     2e-3},
    {"cnn_bf16", kConvolutions, 1e-2},
    {"lstm_bf16", kLstm, 2e-3},
    {"residual_bf16", kResidual, 1e-2},
    {"cnn_tf32", kConvolutions, 2e-3},
};

// Fashion-MNIST of Debian's package, or MNIST on machines without it.
std::string Images() {
  const char* folder = std::getenv("LOCKSTEP_TEST_IMAGES");
  return folder != nullptr ? folder : "/usr/share/datasets/fashion-mnist";
}

std::string YamlOf(const Model& model, const std::string& device) {
  const auto is = [&](const char* end) { return std::string_view(model.name).ends_with(end); };
  // CPUs have no tf32: what it is compared with is fp32.
  const char* const precision = is("_bf16")                      ? "bf16"
                                : is("_tf32") && device != "cpu" ? "tf32"
                                                                 : "fp32";
  return absl::StrCat(R"(
data: {path: )",
                      Images(), R"(, train_samples: 330, validation_samples: 103,
       normalize: {mean: [0.286], std: [0.353]}}
checkpoint: {every_steps: 4, keep: 5}
train: {batch: 60, steps: 10, shards: 8, seed: 7, evaluate: {batch: 50, every_steps: 5}, )",
                      "precision: ", precision, "}\nresources: {device: ", device, "}\n",
                      model.yaml);
}

class CudaTraining : public testing::TestWithParam<Model> {};

TEST_P(CudaTraining, EveryNumberIsThatOfOneSlot) {
  const std::string yaml = YamlOf(GetParam(), "cuda");
  const Training expected = RunMembers(yaml, {.workers = 1, .slots = 1});
  const std::string digest = AgreedDigest(expected);
  ASSERT_EQ(expected.steps.size(), 10u);
  for (const auto& [workers, slots] : {std::pair(1, 2), std::pair(2, 1), std::pair(3, 1)}) {
    const Training actual = RunMembers(yaml, {.workers = workers, .slots = slots});
    EXPECT_EQ(AgreedDigest(actual), digest) << workers << " x " << slots;
    EXPECT_EQ(Numbers(actual), Numbers(expected)) << workers << " x " << slots;
  }
}

TEST_P(CudaTraining, AgreesWithTheCpu) {
  const Training gpu = RunMembers(YamlOf(GetParam(), "cuda"), {});
  const Training cpu = RunMembers(YamlOf(GetParam(), "cpu"), {});
  AgreedDigest(gpu);
  AgreedDigest(cpu);
  ASSERT_EQ(gpu.steps.size(), cpu.steps.size());
  for (size_t i = 0; i < cpu.steps.size(); ++i) {
    EXPECT_NEAR(gpu.steps[i].train().loss(), cpu.steps[i].train().loss(),
                GetParam().tolerance * std::abs(cpu.steps[i].train().loss()))
        << "step " << i + 1;
  }
  ASSERT_EQ(gpu.evaluations.size(), cpu.evaluations.size());
  for (size_t i = 0; i < cpu.evaluations.size(); ++i) {
    const double expected = cpu.evaluations[i].validation().loss();
    EXPECT_NEAR(gpu.evaluations[i].validation().loss(), expected, GetParam().tolerance * expected);
  }
}

// From the checkpoint of step 4, in mid-epoch, on another placement.
TEST_P(CudaTraining, ResumedItEndsWithTheSameBits) {
  const std::string yaml = YamlOf(GetParam(), "cuda");
  const std::string folder = TemporaryFolder();
  const std::string digest = AgreedDigest(RunMembers(yaml, {.output_dir = folder}));
  const Training resumed =
      RunMembers(yaml, {.slots = 2, .resume_from = folder + "/checkpoints/step-00000004"});
  EXPECT_EQ(AgreedDigest(resumed), digest);
}

INSTANTIATE_TEST_SUITE_P(All, CudaTraining, testing::ValuesIn(kModels),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- where one slot has all shards, the host runs ahead of the device: many steps that nobody
// looks at, in epochs with a short batch at their end.

std::string LongYaml(const std::string& model, int64_t steps, const std::string& train = "",
                     const std::string& device = "cuda") {
  return absl::StrCat(R"(
data: {path: )",
                      Images(), R"(, train_samples: 330, validation_samples: 103,
       normalize: {mean: [0.286], std: [0.353]}}
checkpoint: {every_steps: 16, every_epochs: 0, keep: 5}
resources: {device: )",
                      device, "}\ntrain: {batch: 60, steps: ", steps, ", shards: 8, seed: 7, ",
                      train.empty() ? "evaluate: {batch: 50, every_steps: 0, every_epochs: 0}" : "",
                      train, "}\n", model);
}

constexpr char kDropout[] = R"(
model:
  layers:
    - {name: flat, type: flatten}
    - {name: dense1, type: dense, units: 16}
    - {name: norm1, type: batch_norm}
    - {name: relu1, type: relu}
    - {name: drop1, type: dropout, rate: 0.2}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05, clip_norm: 0.5}
schedule: {type: step, at_steps: [5, 11, 20], factor: 0.5}
)";

std::string WithPopulation(std::string model) {
  const std::string norm = "type: batch_norm";
  return model.replace(model.find(norm), norm.size(), norm + ", statistics: population");
}

std::string DigestLines(const std::string& folder) {
  std::ifstream file(folder + "/digests.jsonl");
  return std::string(std::istreambuf_iterator<char>(file), {});
}

class RunningAhead : public testing::TestWithParam<std::tuple<const char*, std::string>> {};

TEST_P(RunningAhead, EveryNumberIsThatOfTwoSlots) {
  const std::string yaml = LongYaml(std::get<1>(GetParam()), 30, std::get<0>(GetParam()));
  const std::string one = TemporaryFolder(), two = TemporaryFolder();
  const Training ahead = RunMembers(yaml, {.slots = 1, .output_dir = one});
  const Training expected = RunMembers(yaml, {.slots = 2, .output_dir = two});
  EXPECT_EQ(AgreedDigest(ahead), AgreedDigest(expected));
  ASSERT_EQ(ahead.steps.size(), 30u);
  EXPECT_EQ(Numbers(ahead), Numbers(expected));
  EXPECT_EQ(DigestLines(one), DigestLines(two));
  EXPECT_EQ(ahead.ended[0].shard_steps(0), 30);
  EXPECT_EQ(ahead.ended[0].shard_steps(7), 25) << "short batches have four shards";
  EXPECT_EQ(ahead.ended[0].result().train().ShortDebugString(),
            expected.ended[0].result().train().ShortDebugString());
}

INSTANTIATE_TEST_SUITE_P(
    All, RunningAhead,
    testing::Combine(
        testing::Values("", "digest_every: 3, evaluate: {batch: 50, every_steps: 7}",
                        "digest_every: 0, evaluate: {batch: 50, every_steps: 0, every_epochs: 0}"),
        testing::Values(std::string(kDropout), WithPopulation(kDropout))));

TEST(RunningAheadTest, ResumedItEndsWithTheSameBits) {
  const std::string yaml = LongYaml(kDropout, 30), folder = TemporaryFolder();
  const std::string digest = AgreedDigest(RunMembers(yaml, {.output_dir = folder}));
  const Training resumed = RunMembers(yaml, {.resume_from = folder + "/checkpoints/step-00000016"});
  EXPECT_EQ(AgreedDigest(resumed), digest);
}

// The step is asked for late; which it is follows from when, and its state is that of a run of so
// many steps.
TEST(RunningAheadTest, AStopTakesEffectAfterAWholeStep) {
  const char* const evaluations = "evaluate: {batch: 50, every_steps: 13}";
  const std::string folder = TemporaryFolder();
  const Training stopped = RunMembers(LongYaml(kDropout, 100000, evaluations),
                                      {.output_dir = folder, .stop_after_evaluation = true});
  ASSERT_EQ(stopped.ended.size(), 1u);
  ASSERT_EQ(stopped.ended[0].outcome(), v1::Ended::STOPPED) << stopped.ended[0].error();
  const int64_t step = stopped.ended[0].result().steps();
  ASSERT_GE(step, 13);
  ASSERT_EQ(static_cast<int64_t>(stopped.steps.size()), step);
  const Training whole = RunMembers(LongYaml(kDropout, step, evaluations), {.slots = 2});
  EXPECT_EQ(stopped.ended[0].state_digest(), AgreedDigest(whole));
  if (step < 16) return;  // nothing to go on from
  const Training further = RunMembers(LongYaml(kDropout, step + 5, evaluations), {.slots = 2});
  const Training resumed =
      RunMembers(LongYaml(kDropout, step + 5, evaluations), {.resume_from = folder});
  EXPECT_EQ(AgreedDigest(resumed), AgreedDigest(further));
}

TEST(RunningAheadTest, ABitThatIsFlippedIsInTheStepsBehindIt) {
  const std::string yaml = LongYaml(kDropout, 30);
  const Training good = RunMembers(yaml, {});
  const Training bad = RunMembers(yaml, {.flip_bit_at_step = 10});
  ASSERT_EQ(good.steps.size(), 30u);
  ASSERT_EQ(bad.steps.size(), 30u);
  for (size_t i = 0; i < 30; ++i) {
    EXPECT_EQ(good.steps[i].state_digest() == bad.steps[i].state_digest(), i + 1 < 10)
        << "step " << i + 1;
  }
}

// Found when later steps are on the device already: the same line as where each step is waited for,
// and the state before it.
TEST(RunningAheadTest, AStepThatIsNotFiniteIsNamedAndNotApplied) {
  // Weights grow by a factor a step.
  for (const char* factor : {"7", "21", "90", "1000", "1000000"}) {
    SCOPED_TRACE(factor);
    std::string model = kDropout;
    for (const auto& [from, to] :
         {std::pair<std::string, std::string>("momentum, learning_rate: 0.05, clip_norm: 0.5",
                                              absl::StrCat("sgd, learning_rate: 1, l2: ", factor)),
          {"{name: norm1, type: batch_norm}", "{name: act1, type: leaky_relu}"},
          {"type: step, at_steps: [5, 11, 20], factor: 0.5", "type: constant"}}) {
      model.replace(model.find(from), from.size(), to);
    }
    const std::string one = TemporaryFolder(), two = TemporaryFolder();
    const Training ahead = RunMembers(LongYaml(model, 60), {.slots = 1, .output_dir = one});
    const Training waited = RunMembers(LongYaml(model, 60), {.slots = 2, .output_dir = two});
    const Training cpu = RunMembers(LongYaml(model, 60, "", "cpu"), {});
    const auto line = [](const Training& run) {
      const std::string& error = run.ended.at(0).error();
      return error.substr(std::min(error.size(), error.find("step ")));
    };
    const auto tensor = [&](const Training& run) {
      const std::string text = line(run);
      const size_t at = text.find("the first tensor");
      return text.substr(0, text.find(':')) + (at == std::string::npos ? "" : text.substr(at));
    };
    ASSERT_EQ(waited.ended.at(0).outcome(), v1::Ended::ERRORED);
    ASSERT_EQ(ahead.ended.at(0).outcome(), v1::Ended::ERRORED);
    std::cout << line(ahead) << "\n";
    EXPECT_EQ(line(ahead), line(waited));
    EXPECT_EQ(tensor(ahead), tensor(cpu));
    EXPECT_EQ(Numbers(ahead), Numbers(waited));
    EXPECT_EQ(DigestLines(one), DigestLines(two));
    EXPECT_EQ(ahead.ended[0].result().steps(), waited.ended[0].result().steps());
    EXPECT_EQ(ahead.ended[0].state_digest(), waited.ended[0].state_digest());
    EXPECT_EQ(ahead.ended[0].shard_steps(0), waited.ended[0].shard_steps(0));
  }
}

}  // namespace
}  // namespace lockstep::train
