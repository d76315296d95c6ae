// Mutated specs: the loader never crashes, and answers OK or InvalidArgument with one line. What it
// accepts must build, be stable under Normalize, and read back.
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "common/spec/spec.h"
#include "fmt/format.h"
#include "gtest/gtest.h"

namespace lockstep::spec {
namespace {

constexpr char kLayers[] = R"(name: seed
data: {path: d, shape: [8, 8, 1], classes: 3, normalize: {mean: [0.5], std: [2], compute: false},
       augment: {crop_padding: 2, flip: true, cutout: 3}}
model:
  layers:
    - {name: c1, type: conv2d, filters: 4, kernel: 3, padding: 1, weight_init: {type: he}}
    - {name: n1, type: batch_norm, sync: shard, momentum: 0.2, epsilon: 1e-4, learning_rate_multiplier: 2}
    - {type: relu}
    - {name: c2, type: conv2d, filters: 4, kernel: 1, inputs: [data], bias: false}
    - {name: s, type: add, inputs: [relu_1, c2]}
    - {type: conv2d, filters: 4, kernel: 3, padding: 2, dilation: 2, groups: 2}
    - {type: leaky_relu, slope: 0.2}
    - {name: k, type: concat, inputs: [s, leaky_relu_1]}
    - {type: pad, padding: 1, channels_after: 2}
    - {type: average_pool, kernel: 3, stride: 2}
    - {type: dropout, rate: 0.25}
    - {type: lstm, hidden: 5, layers: 2, bidirectional: true, dropout: 0.1, output: sequence}
    - {type: flatten}
    - {type: dense, units: 3, bias_init: {type: uniform, limit: 0.1}}
loss: {type: mean_squared_error, target: label}
optimizer: {type: adam, learning_rate: 1e-3, beta1: 0.8, weight_decay: 0.01}
schedule: {type: step, at_epochs: [1, 2.5], factor: 0.5, warmup_steps: 10}
train: {batch: 16, epochs: 3, steps: 100, shards: 4, seed: 7, evaluate: {every_steps: 10, batch: 8}}
checkpoint: {every_steps: 20, keep: 2}
resources: {device: cpu, slots: 2}
)";

constexpr char kSmall[] = R"(data: {path: d}
model: {preset: mlp, hidden: [8]}
optimizer: {type: rmsprop, learning_rate: 1e-3, rho: 0.9, momentum: 0.5, centered: true, clip_norm: 2}
train: {batch: 32, steps: 100, accumulate: 2, precision: bf16}
)";

std::vector<std::string> Seeds() {
  std::vector<std::string> seeds = {kLayers, kSmall};
  for (const char* name : {"mlp", "fashion-cnn", "lstm-mnist"}) {
    std::ifstream file(fmt::format("{}/deploy/jobs/{}.yaml", LOCKSTEP_SOURCE_DIR, name));
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    EXPECT_FALSE(seeds.back().empty());
  }
  return seeds;
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  std::string Mutate(std::string text) {
    for (size_t count = 1 + random_() % 4; count > 0; --count) Once(&text);
    return text;
  }
  size_t Below(size_t n) { return n == 0 ? 0 : random_() % n; }

 private:
  void Once(std::string* text) {
    static constexpr const char* kPieces[] = {
        "[",           "]",           "{",        "}",          ":",
        ": ",          "\n",          "- ",       "*a",         "&a ",
        "~",           "null",        "!!int ",   "\"",         "'",
        "#",           "---\n",       "\t",       "0",          "-1",
        ".nan",        ".inf",        "1e999",    "2147483647", "99999999999999999999",
        "true",        "? ",          "| ",       "> ",         "<<: *a",
        "%YAML 1.2\n", "\xff",        "\xc3\xa9", "data",       "add",
        "conv2d",      "inputs: [s]", "...\n",    ",",          "\r\n"};
    const size_t at = Below(text->size()), length = Below(12);
    switch (random_() % 7) {
      case 0:
        if (!text->empty()) (*text)[at] = static_cast<char>(random_());
        break;
      case 1:
        text->erase(at, length);
        break;
      case 2:
        text->insert(at, kPieces[Below(std::size(kPieces))]);
        break;
      case 3:  // repeat a piece somewhere else
        text->insert(Below(text->size()), text->substr(at, length));
        break;
      case 4: {  // repeat a line
        const size_t begin = text->rfind('\n', at), end = text->find('\n', at);
        if (begin != std::string::npos && end != std::string::npos && end > begin)
          text->insert(end, text->substr(begin, end - begin));
        break;
      }
      case 5:  // another digit: mostly still a valid document
        for (size_t i = at; i < text->size(); ++i) {
          if ((*text)[i] < '0' || (*text)[i] > '9') continue;
          (*text)[i] = static_cast<char>('0' + Below(10));
          break;
        }
        break;
      default:
        text->resize(at);
    }
  }

  std::mt19937_64 random_;
};

// True if accepted.
bool CheckLoad(const std::string& text, const std::vector<std::string>& overrides) {
  const auto spec = LoadText(text, "job.yaml", overrides);
  if (!spec.ok()) {
    const std::string message(spec.status().message());
    EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_TRUE(message.rfind("job.yaml", 0) == 0 || message.rfind("--set ", 0) == 0) << message;
    EXPECT_LT(message.size(), 3000u) << message;
    return false;
  }
  EXPECT_TRUE(BuildGraph(*spec).ok());
  const auto again = Normalize(*spec);
  EXPECT_TRUE(again.ok()) << again.status();
  if (again.ok()) {
    EXPECT_EQ(again->SerializeAsString(), spec->SerializeAsString());
  }
  const auto back = LoadText(ToYaml(*spec, /*expand=*/false), "back", {});
  EXPECT_TRUE(back.ok()) << back.status();
  if (back.ok()) {
    EXPECT_EQ(back->SerializeAsString(), spec->SerializeAsString());
  }
  return true;
}

TEST(Mutation, OfFilesIsRefusedInOneLineOrAccepted) {
  const std::vector<std::string> seeds = Seeds();
  for (const std::string& seed : seeds) ASSERT_TRUE(CheckLoad(seed, {}));
  Mutator mutator(3);
  int accepted = 0;
  constexpr int kRounds = 4000;
  for (int i = 0; i < kRounds; ++i) {
    const std::string text = mutator.Mutate(seeds[i % seeds.size()]);
    accepted += CheckLoad(text, {}) ? 1 : 0;
    if (HasFailure()) FAIL() << "round " << i << "\n" << text;
  }
  // Both answers are common, or the mutations test nothing.
  EXPECT_GT(accepted, kRounds / 20);
  EXPECT_LT(accepted, kRounds * 19 / 20);
}

TEST(Mutation, OfOverridesIsRefusedInOneLineOrAccepted) {
  const std::vector<std::string> seeds = {"train.batch=32",
                                          "model.layers.c1.bias=false",
                                          "data.shape=[8, 8, 1]",
                                          "model.layers.0.bias=true",
                                          "optimizer={type: sgd, learning_rate: 0.1}",
                                          "data.shape.0=9",
                                          "train.evaluate.batch=64",
                                          "schedule.at_epochs.1=4"};
  for (const std::string& seed : seeds) ASSERT_TRUE(CheckLoad(kLayers, {seed})) << seed;
  Mutator mutator(5);
  int accepted = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::string argument = mutator.Mutate(seeds[mutator.Below(seeds.size())]);
    accepted += CheckLoad(kLayers, {argument}) ? 1 : 0;
    if (HasFailure()) FAIL() << "round " << i << "\n" << argument;
  }
  EXPECT_GT(accepted, 100);
}

}  // namespace
}  // namespace lockstep::spec
