#include "common/spec/schema.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>

#include "common/spec/text.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

struct Rule {
  enum class Kind { kInteger, kNumber, kBool, kChoice, kJobName, kLayerName, kInput, kPath, kFile };
  Kind kind;
  // kInteger: both ends included.
  int64_t low = 0;
  uint64_t high = 0;
  // kNumber.
  double from = 0, to = 0;
  bool open_from = false, open_to = false;
  std::vector<std::string> choices = {};  // kChoice
};

Rule Integer(int64_t low, uint64_t high) { return {Rule::Kind::kInteger, low, high}; }
Rule Number(double from, double to, bool open_from = false, bool open_to = false) {
  Rule rule{Rule::Kind::kNumber};
  rule.from = from, rule.to = to, rule.open_from = open_from, rule.open_to = open_to;
  return rule;
}
Rule Choice(std::vector<std::string> choices) {
  Rule rule{Rule::Kind::kChoice};
  rule.choices = std::move(choices);
  return rule;
}

constexpr uint64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr uint64_t kManySteps = 1'000'000'000'000;  // leaves room for sums in int64
constexpr uint64_t kManyEpochs = 1'000'000;
constexpr uint64_t kLargestBatch = 1 << 20;
constexpr uint64_t kMostLstmLayers = 64;
constexpr int kLongestName = 64;

const std::map<std::string, Rule>& Rules() {
  static const auto& rules = *new std::map<std::string, Rule>{
      {"JobSpec.name", {Rule::Kind::kJobName}},
      {"DataSpec.format", Choice({"idx", "cifar10", "npy", "synthetic"})},
      {"DataSpec.path", {Rule::Kind::kPath}},
      {"DataSpec.shape", Integer(1, 65536)},
      {"DataSpec.classes", Integer(2, 65536)},
      {"DataSpec.train_features", {Rule::Kind::kFile}},
      {"DataSpec.train_labels", {Rule::Kind::kFile}},
      {"DataSpec.validation_features", {Rule::Kind::kFile}},
      {"DataSpec.validation_labels", {Rule::Kind::kFile}},
      {"DataSpec.train_samples", Integer(1, kManySteps)},
      {"DataSpec.validation_samples", Integer(1, kManySteps)},
      {"DataSpec.prefetch", Integer(1, 1024)},
      {"AugmentSpec.crop_padding", Integer(0, 65536)},
      {"AugmentSpec.flip", {Rule::Kind::kBool}},
      {"AugmentSpec.cutout", Integer(0, 65536)},
      {"NormalizeSpec.mean", Number(-1e6, 1e6)},
      {"NormalizeSpec.std", Number(1e-6, 1e6)},
      {"NormalizeSpec.compute", {Rule::Kind::kBool}},
      {"ModelSpec.preset",
       Choice({"mlp", "fashion-cnn", "lenet", "resnet-20", "resnet-32", "resnet-44", "resnet-56",
               "resnet-110", "plain-20", "plain-32", "plain-44", "plain-56", "plain-110",
               "resnet-50", "lstm-classifier"})},
      {"ModelSpec.hidden", Integer(1, kInt32Max)},
      {"ModelSpec.sync", Choice({"batch", "shard"})},
      {"ModelSpec.dropout", Number(0, 1, false, true)},
      {"ModelSpec.batch_norm", {Rule::Kind::kBool}},
      {"ModelSpec.lstm_hidden", Integer(1, kInt32Max)},
      {"ModelSpec.lstm_layers", Integer(1, kMostLstmLayers)},
      {"ModelSpec.bidirectional", {Rule::Kind::kBool}},
      {"ModelSpec.statistics", Choice({"running", "population"})},
      {"LayerSpec.name", {Rule::Kind::kLayerName}},
      {"LayerSpec.type",
       Choice({"dense",      "conv2d",     "max_pool", "average_pool", "global_average_pool",
               "batch_norm", "relu",       "tanh",     "sigmoid",      "add",
               "flatten",    "dropout",    "pad",      "lstm",         "concat",
               "multiply",   "leaky_relu", "elu",      "softplus",     "softmax",
               "layer_norm", "embedding",  "reshape",  "transpose"})},
      {"LayerSpec.inputs", {Rule::Kind::kInput}},
      {"LayerSpec.units", Integer(1, kInt32Max)},
      {"LayerSpec.filters", Integer(1, kInt32Max)},
      {"LayerSpec.kernel", Integer(1, kInt32Max)},
      {"LayerSpec.stride", Integer(1, kInt32Max)},
      {"LayerSpec.padding", Integer(0, kInt32Max)},
      {"LayerSpec.bias", {Rule::Kind::kBool}},
      {"LayerSpec.rate", Number(0, 1, false, true)},
      {"LayerSpec.sync", Choice({"batch", "shard"})},
      {"LayerSpec.momentum", Number(0, 1, true)},
      {"LayerSpec.epsilon", Number(1e-12, 1)},
      {"LayerSpec.dilation", Integer(1, kInt32Max)},
      {"LayerSpec.groups", Integer(1, kInt32Max)},
      {"LayerSpec.channels_before", Integer(0, kInt32Max)},
      {"LayerSpec.channels_after", Integer(0, kInt32Max)},
      {"LayerSpec.slope", Number(0, 1, false, true)},
      {"LayerSpec.alpha", Number(0, 1e3, true)},
      {"LayerSpec.vocabulary", Integer(1, 1 << 24)},  // positions are floats
      {"LayerSpec.shape", Integer(1, kInt32Max)},
      {"LayerSpec.order", Integer(0, 2)},
      {"LayerSpec.statistics", Choice({"running", "population"})},
      {"LayerSpec.hidden", Integer(1, kInt32Max)},
      {"LayerSpec.layers", Integer(1, kMostLstmLayers)},
      {"LayerSpec.bidirectional", {Rule::Kind::kBool}},
      {"LayerSpec.output", Choice({"last", "sequence"})},
      {"LayerSpec.dropout", Number(0, 1, false, true)},
      {"LayerSpec.learning_rate_multiplier", Number(0, 1e6)},
      {"LayerSpec.decay_multiplier", Number(0, 1e6)},
      {"InitializerSpec.type", Choice({"zeros", "normal", "uniform", "xavier", "he"})},
      {"InitializerSpec.std", Number(0, 1e6, true)},
      {"InitializerSpec.limit", Number(0, 1e6, true)},
      {"InitializerSpec.distribution", Choice({"uniform", "normal"})},
      {"LossSpec.type",
       Choice({"softmax_cross_entropy", "mean_squared_error", "sigmoid_cross_entropy"})},
      {"LossSpec.target", Choice({"label", "input"})},
      {"LossSpec.label_smoothing", Number(0, 1, false, true)},
      {"OptimizerSpec.type",
       Choice({"sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "adadelta", "rmsprop"})},
      {"OptimizerSpec.learning_rate", Number(0, 1e6, true)},
      {"OptimizerSpec.momentum", Number(0, 1, false, true)},
      {"OptimizerSpec.beta1", Number(0, 1, false, true)},
      {"OptimizerSpec.beta2", Number(0, 1, false, true)},
      {"OptimizerSpec.epsilon", Number(1e-30, 1)},  // representable in float
      {"OptimizerSpec.l2", Number(0, 1e6)},
      {"OptimizerSpec.weight_decay", Number(0, 1e6)},
      {"OptimizerSpec.rho", Number(0, 1, false, true)},
      {"OptimizerSpec.centered", {Rule::Kind::kBool}},
      {"OptimizerSpec.clip_norm", Number(0, 1e6)},
      {"OptimizerSpec.clip_value", Number(0, 1e6)},
      {"ScheduleSpec.type", Choice({"constant", "step", "cosine"})},
      {"ScheduleSpec.warmup_steps", Integer(0, kManySteps)},
      {"ScheduleSpec.at_steps", Integer(1, kManySteps)},
      {"ScheduleSpec.at_epochs", Number(0, kManyEpochs, true)},
      {"ScheduleSpec.factor", Number(0, 1e6, true)},
      {"ScheduleSpec.floor", Number(0, 1)},
      {"TrainSpec.batch", Integer(1, kLargestBatch)},
      {"TrainSpec.epochs", Integer(1, kManyEpochs)},
      {"TrainSpec.steps", Integer(1, kManySteps)},
      {"TrainSpec.shards", Integer(1, 4096)},
      {"TrainSpec.seed", Integer(0, std::numeric_limits<uint64_t>::max())},
      {"TrainSpec.digest_every", Integer(0, kManySteps)},
      {"TrainSpec.accumulate", Integer(1, 4096)},
      {"TrainSpec.precision", Choice({"fp32", "tf32", "bf16"})},
      {"TrainSpec.exact", {Rule::Kind::kBool}},
      {"EvaluateSpec.every_steps", Integer(0, kManySteps)},
      {"EvaluateSpec.every_epochs", Integer(0, kManyEpochs)},
      {"EvaluateSpec.batch", Integer(1, kLargestBatch)},
      {"CheckpointSpec.every_steps", Integer(0, kManySteps)},
      {"CheckpointSpec.every_epochs", Integer(0, kManyEpochs)},
      {"CheckpointSpec.keep", Integer(1, kInt32Max)},
      {"ResourceSpec.device", Choice({"cpu", "cuda"})},
      {"ResourceSpec.slots", Integer(1, 4096)},
  };
  return rules;
}

struct Count {
  int low, high;
};

Count CountOf(const std::string& key) {
  static const auto& counts = *new std::map<std::string, Count>{
      {"DataSpec.shape", {3, 3}},           {"NormalizeSpec.mean", {1, 65536}},
      {"NormalizeSpec.std", {1, 65536}},    {"ModelSpec.hidden", {1, 256}},
      {"ModelSpec.layers", {1, 4096}},      {"LayerSpec.inputs", {1, 256}},
      {"LayerSpec.shape", {1, 3}},          {"LayerSpec.order", {2, 3}},
      {"ScheduleSpec.at_steps", {1, 1024}}, {"ScheduleSpec.at_epochs", {1, 1024}},
  };
  const auto it = counts.find(key);
  return it == counts.end() ? Count{1, std::numeric_limits<int>::max()} : it->second;
}

std::string Key(const FieldDescriptor& field) {
  return field.containing_type()->name() + "." + field.name();
}

const Rule* FindRule(const FieldDescriptor& field) {
  const auto it = Rules().find(Key(field));
  return it == Rules().end() ? nullptr : &it->second;
}

bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

bool IsJobName(const std::string& name) {
  return !name.empty() && name.size() <= kLongestName && (IsLetter(name[0]) || IsDigit(name[0])) &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return IsLetter(c) || IsDigit(c) || c == '.' || c == '_' || c == '-';
         });
}

// No dot: tensors are named <layer>.weight, and --set splits paths at dots.
bool IsLayerName(const std::string& name) {
  return !name.empty() && name.size() <= kLongestName && IsLetter(name[0]) &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return IsLetter(c) || IsDigit(c) || c == '_' || c == '-'; });
}

bool IsPath(const std::string& path) {
  return !path.empty() && path.size() <= 4096 && IsValidUtf8(path) &&
         std::none_of(path.begin(), path.end(),
                      [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
}

std::string RangeText(const Rule& rule) {
  std::string from =
      rule.open_from ? fmt::format("above {}", rule.from) : fmt::format("from {}", rule.from);
  return rule.open_to ? fmt::format("{} to below {}", from, rule.to)
                      : fmt::format("{} to {}", from, rule.to);
}

MaybeProblem CheckElement(const Message& message, const FieldDescriptor& field, int index,
                          const std::string& path) {
  const Reflection& reflection = *message.GetReflection();
  const bool repeated = field.is_repeated();
  const auto refuse = [&](const std::string& found, const std::string& hint = "") {
    return Problem{path, fmt::format("found {}{}; accepted: {}", found, hint, Accepted(field))};
  };
  const auto integer = [&](absl::int128 value, const std::string& found) -> MaybeProblem {
    if (AcceptsInteger(field, value)) return std::nullopt;
    return refuse(found);
  };
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32: {
      const int32_t v = repeated ? reflection.GetRepeatedInt32(message, &field, index)
                                 : reflection.GetInt32(message, &field);
      return integer(v, fmt::format("{}", v));
    }
    case FieldDescriptor::CPPTYPE_INT64: {
      const int64_t v = repeated ? reflection.GetRepeatedInt64(message, &field, index)
                                 : reflection.GetInt64(message, &field);
      return integer(v, fmt::format("{}", v));
    }
    case FieldDescriptor::CPPTYPE_UINT64: {
      const uint64_t v = repeated ? reflection.GetRepeatedUInt64(message, &field, index)
                                  : reflection.GetUInt64(message, &field);
      return integer(v, fmt::format("{}", v));
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      const double v = repeated ? reflection.GetRepeatedDouble(message, &field, index)
                                : reflection.GetDouble(message, &field);
      if (!AcceptsNumber(field, v)) return refuse(FoundNumber(v));
      return std::nullopt;
    }
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string v = repeated ? reflection.GetRepeatedString(message, &field, index)
                                     : reflection.GetString(message, &field);
      if (!AcceptsString(field, v)) return refuse(FoundString(v), ChoiceHint(field, v));
      return std::nullopt;
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return CheckValues(repeated ? reflection.GetRepeatedMessage(message, &field, index)
                                  : reflection.GetMessage(message, &field),
                         path);
    default:
      return std::nullopt;
  }
}

}  // namespace

std::string Accepted(const FieldDescriptor& field) {
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE)
    return "a mapping of fields: " + JoinList(FieldNames(*field.message_type()));
  const Rule& rule = *FindRule(field);
  switch (rule.kind) {
    case Rule::Kind::kInteger:
      return fmt::format("an integer from {} to {}", rule.low, rule.high);
    case Rule::Kind::kNumber:
      return "a number " + RangeText(rule);
    case Rule::Kind::kBool:
      return "true or false";
    case Rule::Kind::kChoice:
      return JoinList(rule.choices);
    case Rule::Kind::kJobName:
      return "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit";
    case Rule::Kind::kLayerName:
      return "up to 64 letters, digits, '_' and '-', the first a letter, other than \"data\"";
    case Rule::Kind::kInput:
      return "the name of a layer, or \"data\"";
    case Rule::Kind::kPath:
      return "a folder's path without control characters";
    case Rule::Kind::kFile:
      return "a file's path without control characters";
  }
  return "";
}

std::string AcceptedList(const FieldDescriptor& field) {
  const Count count = CountOf(Key(field));
  const std::string length = count.low == count.high
                                 ? fmt::format("{}", count.low)
                                 : fmt::format("{} to {}", count.low, count.high);
  return fmt::format("a list of {} elements, each {}", length, Accepted(field));
}

bool HasRule(const FieldDescriptor& field) { return FindRule(field) != nullptr; }

bool AcceptsInteger(const FieldDescriptor& field, absl::int128 value) {
  const Rule& rule = *FindRule(field);
  return value >= rule.low && value <= absl::int128(rule.high);
}

bool AcceptsNumber(const FieldDescriptor& field, double value) {
  const Rule& rule = *FindRule(field);
  // Kernels take floats: what is not the end of an open range must not become it.
  const auto rounded = static_cast<float>(value);
  const bool above = rule.open_from ? rounded > rule.from : value >= rule.from;
  const bool below = rule.open_to ? rounded < rule.to : value <= rule.to;
  return above && below;
}

bool AcceptsString(const FieldDescriptor& field, const std::string& value) {
  const Rule& rule = *FindRule(field);
  switch (rule.kind) {
    case Rule::Kind::kChoice:
      return std::find(rule.choices.begin(), rule.choices.end(), value) != rule.choices.end();
    case Rule::Kind::kJobName:
      return IsJobName(value);
    case Rule::Kind::kLayerName:
      return IsLayerName(value) && value != "data";
    case Rule::Kind::kInput:
      return IsLayerName(value);
    case Rule::Kind::kPath:
    case Rule::Kind::kFile:
      return IsPath(value);
    default:
      return false;
  }
}

bool AcceptsCount(const FieldDescriptor& field, int count) {
  const Count range = CountOf(Key(field));
  return count >= range.low && count <= range.high;
}

std::string ChoiceHint(const FieldDescriptor& field, const std::string& value) {
  return NearestHint(value, FindRule(field)->choices);
}

std::string FoundList(size_t count) {
  return fmt::format("a list of {} element{}", count, count == 1 ? "" : "s");
}
std::string FoundNumber(double value) { return fmt::format("{}", value); }
std::string FoundString(const std::string& value) { return Quoted(value); }

MaybeProblem CheckValues(const Message& message, const std::string& path) {
  const Reflection& reflection = *message.GetReflection();
  const auto& unknown = reflection.GetUnknownFields(message);
  if (!unknown.empty()) {
    return Problem{path, fmt::format("found field number {}, which this version does not know; "
                                     "accepted: {}",
                                     unknown.field(0).number(),
                                     JoinList(FieldNames(*message.GetDescriptor())))};
  }
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string at = Join(path, field->name());
    if (!field->is_repeated()) {
      LOCKSTEP_RETURN_IF_PROBLEM(CheckElement(message, *field, -1, at));
      continue;
    }
    const int count = reflection.FieldSize(message, field);
    if (!AcceptsCount(*field, count)) {
      return Problem{at,
                     fmt::format("found {}; accepted: {}", FoundList(count), AcceptedList(*field))};
    }
    for (int i = 0; i < count; ++i) {
      LOCKSTEP_RETURN_IF_PROBLEM(CheckElement(message, *field, i, Join(at, std::to_string(i))));
    }
  }
  return std::nullopt;
}

MaybeProblem CheckApplicable(const Message& message, const std::string& path,
                             const std::string& selector, const std::string& type,
                             const std::vector<std::string>& always,
                             const std::vector<std::string>& fields) {
  const auto holds = [](const std::vector<std::string>& list, const std::string& name) {
    return std::find(list.begin(), list.end(), name) != list.end();
  };
  std::vector<const FieldDescriptor*> given;
  message.GetReflection()->ListFields(message, &given);
  for (const FieldDescriptor* field : given) {
    if (field->name() == selector || holds(always, field->name()) || holds(fields, field->name()))
      continue;
    std::vector<std::string> accepted = always;
    accepted.insert(accepted.end(), fields.begin(), fields.end());
    return Problem{Join(path, field->name()),
                   fmt::format("does not belong to {} {}; accepted with it: {}", selector, type,
                               accepted.empty() ? "nothing more" : JoinList(accepted))};
  }
  return std::nullopt;
}

const std::vector<std::string>& LayerFields(const std::string& type) {
  static const auto& fields = *new std::map<std::string, std::vector<std::string>>{
      {"dense",
       {"units", "bias", "weight_init", "bias_init", "learning_rate_multiplier",
        "decay_multiplier"}},
      {"conv2d",
       {"filters", "kernel", "stride", "padding", "dilation", "groups", "bias", "weight_init",
        "bias_init", "learning_rate_multiplier", "decay_multiplier"}},
      {"max_pool", {"kernel", "stride", "padding"}},
      {"average_pool", {"kernel", "stride", "padding"}},
      {"batch_norm", {"sync", "statistics", "momentum", "epsilon", "learning_rate_multiplier"}},
      {"dropout", {"rate"}},
      {"pad", {"padding", "channels_before", "channels_after"}},
      {"lstm",
       {"hidden", "layers", "bidirectional", "output", "dropout", "bias", "weight_init",
        "bias_init", "learning_rate_multiplier", "decay_multiplier"}},
      {"leaky_relu", {"slope"}},
      {"elu", {"alpha"}},
      {"layer_norm", {"epsilon", "learning_rate_multiplier"}},
      {"embedding", {"vocabulary", "units", "weight_init", "learning_rate_multiplier"}},
      {"reshape", {"shape"}},
      {"transpose", {"order"}},
  };
  static const auto& none = *new std::vector<std::string>;
  const auto it = fields.find(type);
  return it == fields.end() ? none : it->second;
}

std::vector<std::string> FieldNames(const Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); ++i) names.push_back(message.field(i)->name());
  return names;
}

}  // namespace lockstep::spec
