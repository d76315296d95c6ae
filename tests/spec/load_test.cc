// Whole specs: what is wrong between fields, with file and line; overrides; files that are no
// specs.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "common/spec/spec.h"
#include "fmt/format.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "tests/spec/document.h"

namespace lockstep::spec {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string LoadMessage(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const auto spec = LoadText(text, "job.yaml", overrides);
  if (spec.ok()) return "accepted";
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(spec.status().message());
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  return message;
}

v1::JobSpec LoadOrDie(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const auto spec = LoadText(text, "job.yaml", overrides);
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *spec : v1::JobSpec();
}

// 1 name, 2 data, 3 model, 4 optimizer, 5 train.
std::string Compact(const std::string& model = "{preset: mlp}",
                    const std::string& optimizer = "{learning_rate: 0.1}",
                    const std::string& train = "{batch: 128, epochs: 1}",
                    const std::string& more = "") {
  return fmt::format("name: a\ndata: {{path: d}}\nmodel: {}\noptimizer: {}\ntrain: {}\n{}", model,
                     optimizer, train, more);
}

struct Case {
  std::string text, message;
};

void Check(const std::vector<Case>& cases) {
  for (const Case& c : cases) EXPECT_EQ(LoadMessage(c.text), c.message) << c.text;
}

const char kTop[] = "name, data, model, loss, optimizer, schedule, train, checkpoint, resources";

TEST(Load, RefusesUnknownFieldsAndSuggests) {
  Check({
      {Compact() + "trian: {}\n",
       std::string("job.yaml:6: trian: unknown field (did you mean \"train\"?); accepted: ") +
           kTop},
      {Compact() + "gpu: 1\n", std::string("job.yaml:6: gpu: unknown field; accepted: ") + kTop},
      {Compact() + "<<: {}\n", std::string("job.yaml:6: <<: unknown field; accepted: ") + kTop},
      {Compact("{preset: mlp}", "{lr: 0.1}"),
       "job.yaml:4: optimizer.lr: unknown field; accepted: type, learning_rate, momentum, beta1, "
       "beta2, epsilon, l2, weight_decay, rho, centered, clip_norm, clip_value"},
      {"train:\n  batch: 8\n  evaluate:\n    bacth: 8\n",
       "job.yaml:4: train.evaluate.bacth: unknown field (did you mean \"batch\"?); accepted: "
       "every_steps, every_epochs, batch"},
      {"model:\n  layers:\n    - type: dense\n      unit: 8\n",
       "job.yaml:4: model.layers.0.unit: unknown field (did you mean \"units\"?); accepted: name, "
       "type, inputs, units, filters, kernel, stride, padding, bias, rate, sync, momentum, "
       "epsilon, "
       "weight_init, bias_init, dilation, groups, channels_before, channels_after, slope, alpha, "
       "vocabulary, shape, order, ..."},
      {"\"a\\nb\\e\": 1\n",
       std::string("job.yaml:1: a\\nb\\x1b: unknown field; accepted: ") + kTop},
      {"? [a]\n: b\n",
       std::string("job.yaml:1: found a list as a field's name; accepted: ") + kTop},
  });
}

TEST(Load, RefusesDuplicateFields) {
  Check({
      {Compact() + "data: {path: e}\n",
       "job.yaml:6: data: found twice, first on line 2; accepted: each field once"},
      {"train:\n  batch: 8\n  steps: 3\n  batch: 8\n",
       "job.yaml:4: train.batch: found twice, first on line 2; accepted: each field once"},
  });
}

TEST(Load, NamesTheParentsLineOfAMissingField) {
  const std::string presets =
      "preset (mlp, fashion-cnn, lenet, resnet-20, resnet-32, resnet-44, resnet-56, resnet-110, "
      "plain-20, plain-32, plain-44, plain-56, plain-110, resnet-50, lstm-classifier) or layers";
  Check({
      {"\n# comment\nname: a\n",
       "job.yaml:3: data.path: missing; accepted: the folder of the data, absolute or below "
       "LOCKSTEP_DATA"},
      {"name: a\ndata:\n  classes: 10\n",
       "job.yaml:2: data.path: missing; accepted: the folder of the data, absolute or below "
       "LOCKSTEP_DATA"},
      {"name: a\ndata: {path: d}\n", "job.yaml:1: model: missing; accepted: " + presets},
      {Compact("{}"), "job.yaml:3: model: missing; accepted: " + presets},
      {Compact("{preset: mlp}", "{type: adam}"),
       "job.yaml:4: optimizer.learning_rate: missing; accepted: a number above 0 to 1000000"},
      {Compact("{preset: mlp}", "{learning_rate: 1}", "{epochs: 1}"),
       "job.yaml:5: train.batch: missing; accepted: an integer from 1 to 1048576"},
      {Compact("{preset: mlp}", "{learning_rate: 1}", "{batch: 8}"),
       "job.yaml:5: train: epochs and steps are missing; at least one of them is needed, the first "
       "reached ends the run"},
      {Compact() + "schedule:\n  type: step\n",
       "job.yaml:6: schedule: at_steps and at_epochs are missing; type step needs at least one of "
       "them"},
  });
}

TEST(Load, RefusesOptionsThatWouldBeIgnored) {
  const auto layer = [](const std::string& fields) {
    return Compact(fmt::format("{{layers: [{{type: flatten}}, {{{}}}]}}", fields));
  };
  const auto message = [](const std::string& field, const std::string& type,
                          const std::string& more) {
    return fmt::format(
        "job.yaml:3: model.layers.1.{}: does not belong to type {}; accepted with it: "
        "name, inputs{}",
        field, type, more);
  };
  const std::string conv =
      ", filters, kernel, stride, padding, dilation, groups, bias, weight_init, bias_init, "
      "learning_rate_multiplier, decay_multiplier";
  Check({
      {layer("type: conv2d, units: 3"), message("units", "conv2d", conv)},
      {layer("type: conv2d, rate: 0"), message("rate", "conv2d", conv)},
      {layer("type: dense, kernel: 3"),
       message(
           "kernel", "dense",
           ", units, bias, weight_init, bias_init, learning_rate_multiplier, decay_multiplier")},
      {layer("type: max_pool, filters: 3"),
       message("filters", "max_pool", ", kernel, stride, padding")},
      {layer("type: average_pool, bias: false"),
       message("bias", "average_pool", ", kernel, stride, padding")},
      {layer("type: global_average_pool, kernel: 2"), message("kernel", "global_average_pool", "")},
      {layer("type: batch_norm, rate: 0.5"),
       message("rate", "batch_norm",
               ", sync, statistics, momentum, epsilon, learning_rate_multiplier")},
      {layer("type: max_pool, kernel: 2, dilation: 2"),
       message("dilation", "max_pool", ", kernel, stride, padding")},
      {layer("type: elu, slope: 0.1"), message("slope", "elu", ", alpha")},
      {layer("type: leaky_relu, alpha: 1"), message("alpha", "leaky_relu", ", slope")},
      {layer("type: layer_norm, statistics: running"),
       message("statistics", "layer_norm", ", epsilon, learning_rate_multiplier")},
      {layer("type: layer_norm, decay_multiplier: 2"),
       message("decay_multiplier", "layer_norm", ", epsilon, learning_rate_multiplier")},
      {layer("type: embedding, bias: true"),
       message("bias", "embedding", ", vocabulary, units, weight_init, learning_rate_multiplier")},
      {layer("type: reshape, order: [0, 1]"), message("order", "reshape", ", shape")},
      {layer("type: transpose, shape: [4]"), message("shape", "transpose", ", order")},
      {layer("type: embedding, vocabulary: 3, units: 2, weight_init: {type: he}"),
       "job.yaml:3: model.layers.1.weight_init.type: found \"he\", which needs a weight's fan-in; "
       "accepted: zeros, normal, uniform"},
      {layer("type: relu, padding: 0"), message("padding", "relu", "")},
      {layer("type: tanh, epsilon: 0.1"), message("epsilon", "tanh", "")},
      {layer("type: sigmoid, sync: batch"), message("sync", "sigmoid", "")},
      {layer("type: add, momentum: 0.1"), message("momentum", "add", "")},
      {layer("type: flatten, stride: 2"), message("stride", "flatten", "")},
      {layer("type: dropout, weight_init: {type: he}"),
       message("weight_init", "dropout", ", rate")},
      {layer("type: lstm, units: 3"),
       message("units", "lstm",
               ", hidden, layers, bidirectional, output, dropout, bias, weight_init, bias_init, "
               "learning_rate_multiplier, decay_multiplier")},
      {layer("type: dense, units: 3, hidden: 3"),
       message(
           "hidden", "dense",
           ", units, bias, weight_init, bias_init, learning_rate_multiplier, decay_multiplier")},
      {layer("type: lstm, hidden: 3, dropout: 0.5"),
       "job.yaml:3: model.layers.1.dropout: found 0.5, but it acts between layers and there is "
       "one; "
       "accepted: 0, or layers of 2 or more"},
      {layer("type: lstm, hidden: 3, bias: false, bias_init: {type: zeros}"),
       "job.yaml:3: model.layers.1.bias_init: given for a layer with bias: false; accepted: only "
       "with bias: true"},
      {layer("type: dense, units: 3, bias: false, bias_init: {type: zeros}"),
       "job.yaml:3: model.layers.1.bias_init: given for a layer with bias: false; accepted: only "
       "with bias: true"},
      {layer("type: dense, units: 3, weight_init: {type: he, std: 1}"),
       "job.yaml:3: model.layers.1.weight_init.std: does not belong to type he; accepted with it: "
       "distribution"},
      {layer("type: dense, units: 3, weight_init: {type: zeros, limit: 1}"),
       "job.yaml:3: model.layers.1.weight_init.limit: does not belong to type zeros; accepted with "
       "it: nothing more"},
      {layer("type: dense, units: 3, weight_init: {type: normal, distribution: normal}"),
       "job.yaml:3: model.layers.1.weight_init.distribution: does not belong to type normal; "
       "accepted with it: std"},
      {layer("type: dense, units: 3, weight_init: {std: 1}"),
       "job.yaml:3: model.layers.1.weight_init.type: missing; accepted: zeros, normal, uniform, "
       "xavier, he"},
      {layer("type: dense, units: 3, bias_init: {type: xavier}"),
       "job.yaml:3: model.layers.1.bias_init.type: found \"xavier\", which needs a weight's "
       "fan-in; "
       "accepted: zeros, normal, uniform"},
      {Compact("{preset: fashion-cnn, hidden: [3]}"),
       "job.yaml:3: model.hidden: does not belong to preset fashion-cnn; accepted with it: sync, "
       "statistics, dropout"},
      {Compact("{preset: fashion-cnn, batch_norm: true}"),
       "job.yaml:3: model.batch_norm: does not belong to preset fashion-cnn; accepted with it: "
       "sync, statistics, dropout"},
      {Compact("{preset: lstm-classifier, hidden: [3]}"),
       "job.yaml:3: model.hidden: does not belong to preset lstm-classifier; accepted with it: "
       "lstm_hidden, lstm_layers, bidirectional, dropout"},
      {Compact("{preset: mlp, lstm_layers: 2}"),
       "job.yaml:3: model.lstm_layers: does not belong to preset mlp; accepted with it: hidden, "
       "sync, statistics, dropout, batch_norm"},
      {Compact("{preset: lstm-classifier, dropout: 0.2}"),
       "job.yaml:3: model.dropout: found 0.2, but it acts between lstm layers and there is one; "
       "accepted: 0, or lstm_layers of 2 or more"},
      {Compact("{preset: mlp, batch_norm: false, sync: shard}"),
       "job.yaml:3: model.sync: given with batch_norm: false; accepted: only with batch_norm: "
       "true"},
      {Compact("{preset: mlp, batch_norm: false, statistics: running}"),
       "job.yaml:3: model.statistics: given with batch_norm: false; accepted: only with "
       "batch_norm: true"},
      {Compact("{preset: mlp, layers: [{type: relu}]}"),
       "job.yaml:3: model.layers: found layers and the preset mlp; accepted: one of them"},
      {Compact("{dropout: 0.5, layers: [{type: relu}]}"),
       "job.yaml:3: model.dropout: belongs to presets; accepted with layers: nothing more"},
      {Compact("{preset: mlp}", "{learning_rate: 1, momentum: 0.9}"),
       "job.yaml:4: optimizer.momentum: does not belong to type sgd; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value"},
      {Compact("{preset: mlp}", "{type: adam, learning_rate: 1, momentum: 0.9}"),
       "job.yaml:4: optimizer.momentum: does not belong to type adam; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value, beta1, beta2, epsilon"},
      {Compact("{preset: mlp}", "{type: nesterov, learning_rate: 1, beta1: 0.9}"),
       "job.yaml:4: optimizer.beta1: does not belong to type nesterov; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value, momentum"},
      {Compact("{preset: mlp}", "{learning_rate: 1, clip_norm: 2, clip_value: 0.5}"),
       "job.yaml:4: optimizer.clip_value: found 0.5 with clip_norm 2; accepted: one of them above "
       "0"},
      {Compact("{preset: mlp}", "{type: adamw, learning_rate: 1, l2: 0.1}"),
       "job.yaml:4: optimizer.l2: does not belong to type adamw; accepted with it: "
       "learning_rate, weight_decay, clip_norm, clip_value, beta1, beta2, epsilon"},
      {Compact("{preset: mlp}", "{type: adagrad, learning_rate: 1, rho: 0.9}"),
       "job.yaml:4: optimizer.rho: does not belong to type adagrad; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value, epsilon"},
      {Compact("{preset: mlp}", "{type: adadelta, learning_rate: 1, centered: true}"),
       "job.yaml:4: optimizer.centered: does not belong to type adadelta; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value, rho, epsilon"},
      {Compact("{preset: mlp}", "{type: rmsprop, learning_rate: 1, beta2: 0.9}"),
       "job.yaml:4: optimizer.beta2: does not belong to type rmsprop; accepted with it: "
       "learning_rate, l2, weight_decay, clip_norm, clip_value, rho, epsilon, momentum, centered"},
      {Compact() + "loss: {target: label}\n",
       "job.yaml:6: loss.target: does not belong to type softmax_cross_entropy; accepted with it: "
       "label_smoothing"},
      {Compact() + "loss: {type: sigmoid_cross_entropy, label_smoothing: 0.1}\n",
       "job.yaml:6: loss.label_smoothing: does not belong to type sigmoid_cross_entropy; accepted "
       "with it: target"},
      {Compact() + "schedule: {factor: 0.5}\n",
       "job.yaml:6: schedule.factor: does not belong to type constant; accepted with it: "
       "warmup_steps"},
      {Compact() + "schedule: {type: cosine, at_steps: [3]}\n",
       "job.yaml:6: schedule.at_steps: does not belong to type cosine; accepted with it: "
       "warmup_steps, floor"},
      {Compact() + "schedule: {type: step, at_steps: [3], floor: 0}\n",
       "job.yaml:6: schedule.floor: does not belong to type step; accepted with it: warmup_steps, "
       "at_steps, at_epochs, factor"},
  });
}

TEST(Load, RefusesMissingAttributesOfLayers) {
  const auto layer = [](const std::string& fields) {
    return Compact(fmt::format("\n  layers:\n  - type: flatten\n  - {{{}}}", fields));
  };
  const std::string at = "job.yaml:6: model.layers.1";
  const std::string integer = "an integer from 1 to 2147483647";
  Check({
      {layer("name: x"),
       at + ".type: missing; accepted: dense, conv2d, max_pool, average_pool, global_average_pool, "
            "batch_norm, relu, tanh, sigmoid, add, flatten, dropout, pad, lstm, concat, multiply, "
            "leaky_relu, elu, "
            "softplus, softmax, layer_norm, embedding, reshape, transpose"},
      {layer("type: dense"), at + ".units: missing; dense needs " + integer},
      {layer("type: conv2d, kernel: 3"), at + ".filters: missing; conv2d needs " + integer},
      {layer("type: conv2d, filters: 3"), at + ".kernel: missing; conv2d needs " + integer},
      {layer("type: max_pool"), at + ".kernel: missing; max_pool needs " + integer},
      {layer("type: average_pool, stride: 2"),
       at + ".kernel: missing; average_pool needs " + integer},
      {layer("type: lstm"), at + ".hidden: missing; lstm needs " + integer},
      {layer("type: dropout"), at + ".rate: missing; dropout needs a number from 0 to below 1"},
      {layer("type: add"), at + ".inputs: missing; add needs the names of 2 or more layers"},
      {layer("type: multiply"),
       at + ".inputs: missing; multiply needs the names of 2 or more layers"},
      {layer("type: concat"), at + ".inputs: missing; concat needs the names of 2 or more layers"},
      {layer("type: concat, inputs: [data]"),
       at + ".inputs: found 1 input; accepted: 2 or more for concat"},
      {layer("type: embedding, units: 2"),
       at + ".vocabulary: missing; embedding needs an integer from 1 to 16777216"},
      {layer("type: embedding, vocabulary: 2"), at + ".units: missing; embedding needs " + integer},
      {layer("type: reshape"), at + ".shape: missing; reshape needs " + integer},
      {layer("type: transpose"), at + ".order: missing; transpose needs an integer from 0 to 2"},
  });
}

TEST(Load, ComparesBatchesAndShards) {
  const auto train = [](const std::string& fields) {
    return Compact("{preset: mlp}", "{learning_rate: 1}", "\n  epochs: 1\n" + fields);
  };
  Check({
      {train("  batch: 128\n  shards: 256\n"),
       "job.yaml:8: train.shards: 256 is more than train.batch (128); accepted: 1 to 128"},
      {train("  batch: 4\n"),
       "job.yaml:7: train.batch: 4 is less than train.shards (8, the default); accepted: 8 or "
       "more, "
       "or fewer shards"},
      {train("  batch: 128\n  shards: 64\n  evaluate: {batch: 32}\n"),
       "job.yaml:8: train.shards: 64 is more than train.evaluate.batch (32); accepted: 1 to 32"},
      {train("  batch: 128\n  evaluate:\n    batch: 7\n"),
       "job.yaml:9: train.evaluate.batch: 7 is less than train.shards (8, the default); accepted: "
       "8 "
       "or more, or fewer shards"},
      {train("  batch: 8\n  shards: 4\n"), "accepted"},
      {train("  batch: 128\n") + "resources:\n  slots: 9\n",
       "job.yaml:10: resources.slots: 9 is more than train.shards (8), the most slots that can "
       "have "
       "work; accepted: 1 to 8"},
  });
  // Of two, the override is blamed.
  EXPECT_EQ(LoadMessage(train("  batch: 128\n  shards: 64\n"), {"train.batch=32"}),
            "--set train.batch=32: train.batch: 32 is less than train.shards (64); accepted: 64 or "
            "more, or fewer shards");
  EXPECT_EQ(LoadMessage(train("  batch: 128\n  shards: 64\n"), {"train.shards=256"}),
            "--set train.shards=256: train.shards: 256 is more than train.batch (128); accepted: 1 "
            "to 128");
}

TEST(Load, ComparesTheBatchWithTheTrainingSetWhereItsSizeIsGiven) {
  const auto text = [](const char* samples) {
    return fmt::format(
        "data: {{path: d, shape: [28, 28, 1], train_samples: {}}}\nmodel: {{preset: mlp}}\n"
        "optimizer: {{learning_rate: 1}}\ntrain: {{batch: 64, steps: 1}}\n",
        samples);
  };
  EXPECT_EQ(LoadMessage(text("64")), "accepted");
  EXPECT_EQ(LoadMessage(text("63")),
            "job.yaml:4: train.batch: 64 is more than data.train_samples (63); accepted: 1 to 63");
  EXPECT_EQ(LoadMessage(text("64"), {"train.batch=65"}),
            "--set train.batch=65: train.batch: 65 is more than data.train_samples (64); accepted: "
            "1 to 64");
  EXPECT_EQ(LoadMessage(text("64"), {"data.train_samples=9"}),
            "--set data.train_samples=9: data.train_samples: 9 is less than one train.batch (64); "
            "accepted: 64 or more, or a smaller batch");
}

// Batch norm of one value is a constant, in the forms in which it can come about.
TEST(Load, RefusesABatchNormOfSingleValues) {
  const auto message = [](const std::string& sync, const std::string& train) {
    return LoadMessage(Compact("{preset: mlp, sync: " + sync + "}", "{learning_rate: 1}",
                               "{steps: 1, " + train + "}"));
  };
  const std::string refused =
      "job.yaml:3: model.preset: its layer batch_norm_1.sync: shard would normalize single values, "
      "and learn nothing: a ";
  EXPECT_EQ(message("shard", "batch: 15"),
            refused +
                "shard of batch 15 in 8 shards is 1 sample; accepted: sync: batch, a larger "
                "batch, or fewer shards");
  EXPECT_EQ(message("shard", "batch: 16"), "accepted");
  EXPECT_EQ(message("batch", "batch: 8"), "accepted");
  EXPECT_EQ(message("shard", "batch: 25, accumulate: 2"),
            refused +
                "microbatch of batch 25 in 8 shards and accumulate 2 is 1 sample; accepted: "
                "sync: batch, a larger batch, or fewer shards or microbatches");
  EXPECT_EQ(message("shard", "batch: 32, accumulate: 2"), "accepted");
  // The second microbatch is the ninth sample alone.
  EXPECT_EQ(message("batch", "batch: 9, accumulate: 2"),
            "job.yaml:3: model.preset: its layer batch_norm_1.sync: batch would normalize single "
            "values, and learn nothing: a microbatch of batch 9 in 8 shards and accumulate 2 is 1 "
            "sample; accepted: a larger batch, or fewer shards or microbatches");
  EXPECT_EQ(message("batch", "batch: 10, accumulate: 2"), "accepted");
  EXPECT_EQ(message("batch", "batch: 1, shards: 1").substr(0, refused.size() - 60),
            refused.substr(0, refused.size() - 60));
  // A convolution's channel has many values.
  EXPECT_EQ(LoadMessage(Compact("{preset: lenet, sync: shard}", "{learning_rate: 1}",
                                "{steps: 1, batch: 8}")),
            "accepted");
}

TEST(Load, RefusesStepsThatDoNotIncrease) {
  Check({
      {Compact() + "schedule:\n  type: step\n  at_steps:\n  - 5\n  - 5\n",
       "job.yaml:10: schedule.at_steps.1: found 5 after 5; accepted: increasing values"},
      {Compact() + "schedule:\n  type: step\n  at_epochs: [1.5, 1]\n",
       "job.yaml:8: schedule.at_epochs.1: found 1 after 1.5; accepted: increasing values"},
  });
}

TEST(Load, ErrorsOfTheModelNameTheLineOfTheLayersField) {
  const auto layers = [](const std::string& text) { return Compact("\n  layers:\n" + text); };
  Check({
      {layers("    - type: conv2d\n      filters: 4\n      kernel: 29\n"),
       "job.yaml:7: model.layers.0.kernel: found 29, larger than the padded input (28 by 28); "
       "accepted: 1 to 28"},
      {layers("    - {type: relu, name: a}\n    - type: relu\n      name: a\n"),
       "job.yaml:7: model.layers.1.name: \"a\" is also the name of layer 0; accepted: unique "
       "names"},
      {layers("    - {type: flatten}\n    - type: dense\n      units: 9\n"),
       "job.yaml:7: model.layers.1.units: the output is {9}; accepted: {10}, data.classes, for "
       "softmax_cross_entropy"},
      {layers("    - type: flatten\n    - type: dense\n      units: 10\n      inputs:\n        - "
              "flaten_1\n"),
       "job.yaml:9: model.layers.1.inputs.0: found \"flaten_1\", which is not a layer (did you "
       "mean "
       "\"flatten_1\"?); accepted: data, flatten_1, dense_1"},
  });
}

TEST(Load, RefusesWhatIsNotOneYamlMapping) {
  const std::string fields = std::string("a mapping of fields: ") + kTop;
  Check({
      {"", "job.yaml: the file is empty; accepted: " + fields},
      {"# nothing\n\n", "job.yaml: the file is empty; accepted: " + fields},
      {"---\n", "job.yaml: the file is empty; accepted: " + fields},
      {"- a\n", "job.yaml:1: found a list; accepted: " + fields},
      {"\nhello\n", "job.yaml:2: found \"hello\"; accepted: " + fields},
      {Compact() + "---\nname: b\n",
       "job.yaml:6: found more after the end of the first document; accepted: one document"},
      {Compact() + "]\n", "job.yaml:6: not YAML: illegal flow end (column 1)"},
      {",\n", "job.yaml:1: found more after the end of the first document; accepted: one document"},
      {"name: a\ndata: [1, 2\nmodel: {}\n",
       "job.yaml:3: not YAML: end of sequence flow not found "
       "(column 6)"},
      {"name: a\n\tdata: 3\n",
       "job.yaml:2: not YAML: illegal tab when looking for indentation (column 1)"},
      {"name: *nobody\n", "job.yaml:1: not YAML: the referenced anchor is not defined (column 7)"},
      {"name: \xff\n", "job.yaml: found bytes that are not UTF-8 text; accepted: YAML in UTF-8"},
      {std::string("name: a\0b\n", 10),
       "job.yaml: found bytes that are not UTF-8 text; accepted: YAML in UTF-8"},
      {"data:\n",
       "job.yaml:1: data: found nothing; accepted: a mapping of fields: format, path, "
       "shape, classes, normalize, train_samples, validation_samples, prefetch, augment, "
       "train_features, train_labels, validation_features, validation_labels"},
  });
}

TEST(Load, SurvivesHostileDocuments) {
  const std::string deep(900'000, '[');
  EXPECT_EQ(LoadMessage(deep),
            "job.yaml:1: found lists or mappings nested too deeply; accepted: at "
            "most 6 levels");
  // Ten levels of ten aliases are ten thousand million elements when expanded.
  std::string bomb = "a0: &a0 [x]\n";
  for (int i = 1; i <= 10; ++i) {
    bomb += fmt::format("a{}: &a{} [", i, i);
    for (int k = 0; k < 10; ++k) bomb += fmt::format("*a{}, ", i - 1);
    bomb += "]\n";
  }
  EXPECT_THAT(LoadMessage(bomb), StartsWith("job.yaml:1: a0: unknown field"));
  EXPECT_THAT(LoadMessage(Compact(), {"model.hidden=&a [*a, *a]"}),
              HasSubstr("model.hidden.0: found a list; accepted: an integer"));
  std::string layers = "model:\n  layers:\n    - &r {type: relu}\n";
  for (int i = 0; i < 5000; ++i) layers += "    - *r\n";
  EXPECT_EQ(LoadMessage(layers).substr(0, 80),
            "job.yaml:2: model.layers: found a list of 5001 elements; accepted: a list of 1 t");
  EXPECT_EQ(LoadMessage("#" + std::string(1 << 20, 'x')),
            "job.yaml: found more than 1048576 bytes; accepted: at most 1 MiB");
}

TEST(Load, AnAliasStandsForItsValue) {
  const auto spec = LoadOrDie(Compact() + "checkpoint: {every_steps: &n 20}\n", {});
  EXPECT_EQ(spec.checkpoint().every_steps(), 20);
  const auto twice = LoadOrDie(Compact("{preset: mlp, hidden: &h [30]}") +
                               "schedule: {type: step, at_steps: *h}\n");
  EXPECT_EQ(twice.schedule().at_steps(0), 30);
}

TEST(LoadFile, ReadsAFileAndNamesIt) {
  const std::string path = testing::TempDir() + fmt::format("/lockstep_spec_{}.yaml", getpid());
  std::ofstream(path) << Compact();
  const auto spec = LoadFile(path, {"name=b"});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->name(), "b");
  std::ofstream(path) << Compact() << "oops: 1\n";
  EXPECT_THAT(std::string(LoadFile(path, {}).status().message()),
              StartsWith(path + ":6: oops: unknown field"));
  std::filesystem::remove(path);
}

TEST(LoadFile, RefusesWhatCannotBeRead) {
  const auto missing = LoadFile("/no/such.yaml", {}).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(missing.message(), "/no/such.yaml: cannot be read: No such file or directory");
  EXPECT_EQ(LoadFile("/tmp", {}).status().message(), "/tmp: cannot be read: Is a directory");
}

TEST(LoadFile, TheReadySpecsAreValid) {
  for (const char* name : {"mlp", "fashion-cnn"}) {
    const auto spec =
        LoadFile(fmt::format("{}/deploy/jobs/{}.yaml", LOCKSTEP_SOURCE_DIR, name), {});
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->name(), name);
    EXPECT_EQ(spec->model().preset(), name);
    EXPECT_EQ(spec->train().batch(), 128);
    EXPECT_EQ(spec->train().shards(), 8);
    EXPECT_EQ(spec->data().path(), "/usr/share/datasets/fashion-mnist");
  }
}

TEST(LoadFile, TheReadySpecOfResNet20IsValidAndItsCommentToo) {
  const std::string path = LOCKSTEP_SOURCE_DIR "/deploy/jobs/resnet20-cifar10.yaml";
  const auto spec = LoadFile(path, {});
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->data().format(), "cifar10");
  EXPECT_TRUE(spec->data().normalize().compute());
  EXPECT_EQ(spec->data().augment().crop_padding(), 4);
  const auto published =
      LoadFile(path, {"train.epochs=164", "schedule={type: step, at_steps: [32000, 48000]}"});
  EXPECT_TRUE(published.ok()) << published.status();
}

TEST(Override, SetsScalarsListsElementsAndMappings) {
  const std::string text = Document::Valid().Set("model.layers.0.name", "flat").Text();
  const auto spec = LoadOrDie(
      text, {"train.batch=64", "train.batch=96", "optimizer={type: adam, learning_rate: 1e-3}",
             "data.shape=[8, 8, 1]", "data.shape.0=16", "model.layers.1.bias=false",
             "model.layers.flat.name=f", "model.layers.dense_1.units=12", "data.classes=12",
             "train.evaluate.every_steps=50", "data.path=a=b", "name=n"});
  EXPECT_EQ(spec.train().batch(), 96);
  EXPECT_EQ(spec.optimizer().type(), "adam");
  EXPECT_EQ(spec.optimizer().learning_rate(), 1e-3);
  EXPECT_EQ(spec.data().shape(0), 16);
  EXPECT_EQ(spec.data().shape(1), 8);
  EXPECT_FALSE(spec.model().layers(1).bias());
  EXPECT_EQ(spec.model().layers(0).name(), "f");
  EXPECT_EQ(spec.model().layers(1).units(), 12);
  EXPECT_EQ(spec.train().evaluate().every_steps(), 50);
  EXPECT_EQ(spec.train().evaluate().every_epochs(), 0);
  EXPECT_EQ(spec.data().path(), "a=b");
}

TEST(Override, AMappingReplacesWhatWasThere) {
  const auto spec =
      LoadOrDie(Compact("{preset: mlp, dropout: 0.5}"), {"model={preset: fashion-cnn}"});
  EXPECT_EQ(spec.model().dropout(), 0.3);
  const auto layer =
      LoadOrDie(Document::Valid().Text(), {"model.layers.1={type: dense, units: 10, bias: false}"});
  EXPECT_FALSE(layer.model().layers(1).bias());
}

TEST(Override, RefusalsNameTheArgument) {
  const std::string text = Document::Valid().Text();
  const std::vector<Case> cases = {
      {"train.batch", "found no path=value; accepted: for example train.batch=128"},
      {"=3", "found no path=value; accepted: for example train.batch=128"},
      {"trian.batch=1",
       std::string("trian: unknown field (did you mean \"train\"?); accepted: ") + kTop},
      {"train..batch=1",
       "train.: unknown field; accepted: batch, epochs, steps, shards, seed, evaluate, "
       "digest_every, accumulate, precision, exact"},
      {"train.batch.x=1", "train.batch.x: train.batch has no fields; accepted: train.batch itself"},
      {"train.batch=", "train.batch: found nothing; accepted: an integer from 1 to 1048576"},
      {"train.batch=[1", "train.batch: not YAML: end of sequence flow not found (column 1)"},
      // yaml-cpp's own LoadAll never returns from this one.
      {"data.shape=[8, 8, 1], 1",
       "data.shape: found more after the end of the first document; accepted: one document"},
      {"train=5",
       "train: found 5; accepted: a mapping of fields: batch, epochs, steps, shards, seed, "
       "evaluate, digest_every, accumulate, precision, exact"},
      {"model.layers.2.units=1", "model.layers: no element \"2\"; accepted: 0 to 1"},
      {"model.layers.-1.units=1", "model.layers: no element \"-1\"; accepted: 0 to 1"},
      {"model.layers.dense_2.units=1",
       "model.layers: no element \"dense_2\" (did you mean \"dense_1\"?); accepted: 0 to 1, "
       "flatten_1, dense_1"},
      {"data.shape.0=1", "data.shape: no element \"0\"; accepted: nothing, the list is empty"},
      {"data={classes: 3}",
       "data.path: missing; accepted: the folder of the data, absolute or below LOCKSTEP_DATA"},
      {"train={batch: 8, batch: 9}", "train.batch: found twice; accepted: each field once"},
      {"model.layers.1.units=11",
       "model.layers.1.units: the output is {11}; accepted: {10}, data.classes, for "
       "softmax_cross_entropy"},
  };
  for (const Case& c : cases)
    EXPECT_EQ(LoadMessage(text, {c.text}), "--set " + c.text + ": " + c.message);
}

TEST(Override, OfAPresetsLayerSaysWhatToDo) {
  const std::string text =
      Document::Valid().Remove("model").Set("model.preset", "fashion-cnn").Text();
  EXPECT_EQ(
      LoadMessage(text, {"model.layers.conv1.filters=8"}),
      "--set model.layers.conv1.filters=8: model.layers: no element \"conv1\": model.preset is "
      "fashion-cnn; accepted: the preset's own fields, or, in place of the preset, the layers "
      "that `lockstep explain` shows");
}

TEST(Override, AnErrorInTheFileStillNamesItsLine) {
  EXPECT_EQ(LoadMessage(Compact("{preset: mlp}", "{learning_rate: 1, beta1: 0.5}"),
                        {"optimizer.type=momentum"}),
            "job.yaml:4: optimizer.beta1: does not belong to type momentum; accepted with it: "
            "learning_rate, l2, weight_decay, clip_norm, clip_value, momentum");
}

TEST(Normalize, FillsEveryDefault) {
  const auto spec = LoadOrDie(Compact());
  v1::JobSpec expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(R"(
    name: "a"
    data { format: "idx" path: "d" shape: [28, 28, 1] classes: 10
           normalize { mean: 0 std: 1 compute: false } prefetch: 2
           augment { crop_padding: 0 flip: false cutout: 0 } }
    model { preset: "mlp" hidden: [500, 500] sync: "shard" dropout: 0 batch_norm: true
            statistics: "running" }
    loss { type: "softmax_cross_entropy" label_smoothing: 0 }
    optimizer { type: "sgd" learning_rate: 0.1 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0 }
    schedule { type: "constant" warmup_steps: 0 }
    train { batch: 128 epochs: 1 shards: 8 seed: 1
            evaluate { every_steps: 0 every_epochs: 1 batch: 128 } digest_every: 1
            accumulate: 1, precision: "fp32" exact: true }
    checkpoint { every_steps: 0 every_epochs: 1 keep: 3 }
    resources { device: "cpu" })",
                                                            &expected));
  EXPECT_EQ(spec.DebugString(), expected.DebugString());
}

TEST(Load, TakesEachDevice) {
  const std::string head =
      "name: tiny\ndata: {path: /d}\nmodel: {preset: mlp}\n"
      "optimizer: {learning_rate: 0.1}\ntrain: {batch: 64, epochs: 1}\nresources: ";
  for (const char* device : {"cpu", "cuda"}) {
    const auto spec = LoadText(head + "{device: " + device + "}\n", "job.yaml", {});
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->resources().device(), device);
  }
}

// torch.optim's of version 2.15.
TEST(Normalize, FillsTheDefaultsOfEveryOptimizer) {
  const std::pair<const char*, const char*> cases[] = {
      {"sgd", "l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"momentum", "momentum: 0.9 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"nesterov", "momentum: 0.9 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"adam",
       "beta1: 0.9 beta2: 0.999 epsilon: 1e-8 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"adamw",
       "beta1: 0.9 beta2: 0.999 epsilon: 1e-8 weight_decay: 0.01 clip_norm: 0 clip_value: 0"},
      {"adagrad", "epsilon: 1e-10 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"adadelta", "rho: 0.9 epsilon: 1e-6 l2: 0 weight_decay: 0 clip_norm: 0 clip_value: 0"},
      {"rmsprop",
       "rho: 0.99 epsilon: 1e-8 momentum: 0 centered: false l2: 0 weight_decay: 0 clip_norm: 0 "
       "clip_value: 0"},
  };
  for (const auto& [type, defaults] : cases) {
    v1::OptimizerSpec expected;
    ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
        fmt::format("type: \"{}\" learning_rate: 1 {}", type, defaults), &expected));
    const auto spec =
        LoadOrDie(Compact("{preset: mlp}", fmt::format("{{type: {}, learning_rate: 1}}", type)));
    EXPECT_EQ(spec.optimizer().DebugString(), expected.DebugString());
  }
}

TEST(Normalize, KnowsTheShapeOfCifar10) {
  const std::string head = "name: a\ndata: {path: d, format: cifar10";
  const std::string rest =
      "}\nmodel: {preset: mlp}\noptimizer: {learning_rate: 1}\ntrain: {batch: 16, epochs: 1}\n";
  const auto spec = LoadOrDie(head + rest);
  EXPECT_THAT(spec.data().shape(), testing::ElementsAre(32, 32, 3));
  EXPECT_EQ(spec.data().classes(), 10);
  EXPECT_EQ(LoadMessage(head + ", shape: [28, 28, 3]" + rest),
            "job.yaml:2: data.shape: found [28, 28, 3]; accepted with format cifar10: [32, 32, 3]");
  EXPECT_EQ(LoadMessage(head + ", classes: 100" + rest),
            "job.yaml:2: data.classes: found 100; accepted with format cifar10: 10");
  EXPECT_EQ(LoadMessage(head + ", normalize: {mean: [0, 0]}" + rest),
            "job.yaml:2: data.normalize.mean: found a list of 2 elements; accepted: 1, or 3, the "
            "channels of data.shape");
}

TEST(Normalize, KnowsWhatFormatsNeed) {
  const auto message = [](const std::string& data) {
    return LoadMessage("name: a\ndata: {" + data +
                       "}\nmodel: {preset: mlp}\noptimizer: {learning_rate: 1}\n"
                       "train: {batch: 16, epochs: 1}\n");
  };
  const std::string synthetic =
      "format: synthetic, shape: [4, 4, 2], train_samples: 19, validation_samples: 9";
  EXPECT_EQ(message(synthetic), "accepted");
  EXPECT_EQ(message(synthetic + ", classes: 1000, normalize: {compute: true}"), "accepted");
  EXPECT_EQ(message(synthetic + ", path: d"),
            "job.yaml:2: data.path: does not belong to format synthetic; accepted with it: shape, "
            "classes, normalize, augment, train_samples, validation_samples, prefetch");
  EXPECT_EQ(message("format: synthetic, shape: [4, 4, 2], train_samples: 19"),
            "job.yaml:2: data.validation_samples: missing, which format synthetic needs; accepted: "
            "an integer from 1 to 1000000000000");
  EXPECT_EQ(message("format: npy, path: d"),
            "job.yaml:2: data.shape: missing, which format npy needs; accepted: a list of 3 "
            "elements, each an integer from 1 to 65536");
  EXPECT_EQ(message("format: npy, shape: [1, 1, 5]"),
            "job.yaml:2: data.path: missing; accepted: the folder of the data, absolute or below "
            "LOCKSTEP_DATA");
  EXPECT_EQ(message("format: npy, path: d, shape: [1, 1, 5], train_labels: y.npy"), "accepted");
  EXPECT_EQ(
      message("path: d, normalize: {compute: true, std: [2]}"),
      "job.yaml:2: data.normalize.std: given with compute: true; accepted: only with compute: "
      "false");
}

TEST(Normalize, FillsDefaultsOfTheChosenTypes) {
  auto spec = LoadOrDie(Compact("{preset: fashion-cnn}", "{type: adam, learning_rate: 1}") +
                        "schedule: {type: step, at_epochs: [1]}\ncheckpoint: {every_steps: 5}\n");
  EXPECT_EQ(spec.model().dropout(), 0.3);
  EXPECT_EQ(spec.model().sync(), "shard");
  EXPECT_FALSE(spec.model().has_batch_norm());
  EXPECT_EQ(spec.optimizer().beta1(), 0.9);
  EXPECT_EQ(spec.optimizer().beta2(), 0.999);
  EXPECT_EQ(spec.optimizer().epsilon(), 1e-8);
  EXPECT_FALSE(spec.optimizer().has_momentum());
  EXPECT_EQ(spec.schedule().factor(), 0.1);
  EXPECT_EQ(spec.checkpoint().every_epochs(), 0);
  spec = LoadOrDie(Compact("{preset: mlp}", "{type: nesterov, learning_rate: 1}") +
                   "schedule: {type: cosine}\n");
  EXPECT_EQ(spec.optimizer().momentum(), 0.9);
  EXPECT_TRUE(spec.schedule().has_floor());
  spec = LoadOrDie(Compact("{layers: [{type: flatten}, {type: dense, units: 10}]}") +
                   "loss: {type: mean_squared_error}\n");
  EXPECT_EQ(spec.loss().target(), "label");
}

TEST(Normalize, FillsDefaultsOfLayers) {
  const auto spec = LoadOrDie(Compact(R"(
  layers:
    - {type: conv2d, filters: 4, kernel: 3}
    - {type: batch_norm}
    - {type: relu, name: conv2d_2}
    - {type: max_pool, kernel: 2}
    - {type: conv2d, filters: 4, kernel: 3, bias: false, weight_init: {type: uniform}}
    - {type: tanh}
    - {type: flatten}
    - {type: dense, units: 10, weight_init: {type: he}, bias_init: {type: normal}}
)"));
  v1::ModelSpec expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(R"(
    layers { name: "conv2d_1" type: "conv2d" inputs: "data" filters: 4 kernel: 3 stride: 1 padding: 0
             bias: true weight_init { type: "he" distribution: "normal" }
             bias_init { type: "zeros" } dilation: 1 groups: 1 learning_rate_multiplier: 1
             decay_multiplier: 1 }
    layers { name: "batch_norm_1" type: "batch_norm" inputs: "conv2d_1" sync: "batch" momentum: 0.1
             epsilon: 1e-5 statistics: "running" learning_rate_multiplier: 1 }
    layers { name: "conv2d_2" type: "relu" inputs: "batch_norm_1" }
    layers { name: "max_pool_1" type: "max_pool" inputs: "conv2d_2" kernel: 2 stride: 2 padding: 0 }
    layers { name: "conv2d_3" type: "conv2d" inputs: "max_pool_1" filters: 4 kernel: 3 stride: 1
             padding: 0 bias: false weight_init { type: "uniform" limit: 0.05 }
             dilation: 1 groups: 1 learning_rate_multiplier: 1 decay_multiplier: 1 }
    layers { name: "tanh_1" type: "tanh" inputs: "conv2d_3" }
    layers { name: "flatten_1" type: "flatten" inputs: "tanh_1" }
    layers { name: "dense_1" type: "dense" inputs: "flatten_1" units: 10 bias: true
             weight_init { type: "he" distribution: "normal" }
             bias_init { type: "normal" std: 0.01 }
             learning_rate_multiplier: 1 decay_multiplier: 1 })",
                                                            &expected));
  EXPECT_EQ(spec.model().DebugString(), expected.DebugString());
}

TEST(Normalize, OfTheWireNamesTheFieldOnly) {
  v1::JobSpec spec = LoadOrDie(Compact());
  spec.mutable_train()->set_shards(256);
  EXPECT_EQ(Normalize(spec).status().message(),
            "train.shards: 256 is more than train.batch (128); accepted: 1 to 128");
  spec.mutable_train()->set_shards(-1);
  EXPECT_EQ(Normalize(spec).status().message(),
            "train.shards: found -1; accepted: an integer from 1 to 4096");
  spec.mutable_train()->set_shards(8);
  spec.mutable_optimizer()->set_learning_rate(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(Normalize(spec).status().message(),
            "optimizer.learning_rate: found nan; accepted: a number above 0 to 1000000");
  EXPECT_EQ(BuildGraph(spec).status().message(), Normalize(spec).status().message());
  EXPECT_EQ(
      Normalize({}).status().message(),
      "data.path: missing; accepted: the folder of the data, absolute or below LOCKSTEP_DATA");
}

TEST(Normalize, RefusesFieldsOfANewerVersion) {
  v1::JobSpec spec = LoadOrDie(Compact());
  spec.mutable_train()
      ->GetReflection()
      ->MutableUnknownFields(spec.mutable_train())
      ->AddVarint(99, 1);
  EXPECT_EQ(
      Normalize(spec).status().message(),
      "train: found field number 99, which this version does not know; accepted: batch, epochs, "
      "steps, shards, seed, evaluate, digest_every, accumulate, precision, exact");
}

TEST(ResolveDataPath, ResolvesRelativePathsBelowLockstepData) {
  ::unsetenv("LOCKSTEP_DATA");
  EXPECT_EQ(*ResolveDataPath("/a/b"), "/a/b");
  const auto unset = ResolveDataPath("mnist").status();
  EXPECT_EQ(unset.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(
      unset.message(),
      "data.path: \"mnist\" is relative and LOCKSTEP_DATA is not set; set LOCKSTEP_DATA to the "
      "folder that holds it, or give an absolute path");
  ::setenv("LOCKSTEP_DATA", "/srv/data", 1);
  EXPECT_EQ(*ResolveDataPath("mnist"), "/srv/data/mnist");
  ::setenv("LOCKSTEP_DATA", "/srv/data/", 1);
  EXPECT_EQ(*ResolveDataPath("mnist"), "/srv/data/mnist");
  EXPECT_EQ(*ResolveDataPath("/a/b"), "/a/b");
  ::unsetenv("LOCKSTEP_DATA");
}

}  // namespace
}  // namespace lockstep::spec
