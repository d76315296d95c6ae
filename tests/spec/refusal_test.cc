// What every single field refuses, with the exact message: in a file with its line, and as --set.
#include <functional>
#include <set>
#include <string>

#include "common/spec/schema.h"
#include "common/spec/spec.h"
#include "fmt/format.h"
#include "gmock/gmock.h"
#include "tests/spec/document.h"

namespace lockstep::spec {
namespace {

struct Refusal {
  std::string path, value, text;
};

std::string Integer(const std::string& found, const std::string& from, const std::string& to) {
  return fmt::format("found {}; accepted: an integer from {} to {}", found, from, to);
}
std::string Number(const std::string& found, const std::string& range) {
  return fmt::format("found {}; accepted: a number {}", found, range);
}

const char kInt32[] = "2147483647";
const char kMany[] = "1000000000000";
const char kJobName[] =
    "accepted: up to 64 letters, digits, '.', '_' and '-', the first a letter or digit";
const char kLayerName[] =
    "accepted: up to 64 letters, digits, '_' and '-', the first a letter, other than \"data\"";
const char kTypes[] =
    "accepted: dense, conv2d, max_pool, average_pool, global_average_pool, batch_norm, relu, tanh, "
    "sigmoid, add, flatten, dropout, pad, lstm, concat, multiply, leaky_relu, elu, softplus, "
    "softmax, "
    "layer_norm, embedding, reshape, transpose";
constexpr char kPresets[] =
    "mlp, fashion-cnn, lenet, resnet-20, resnet-32, resnet-44, resnet-56, resnet-110, plain-20, "
    "plain-32, plain-44, plain-56, plain-110, resnet-50, lstm-classifier";

std::vector<Refusal> Refusals() {
  const std::string layer = "model.layers.1.";
  return {
      {"name", "\"\"", std::string("found the string \"\"; ") + kJobName},
      {"name", "-x", std::string("found \"-x\"; ") + kJobName},
      {"name", "..", std::string("found \"..\"; ") + kJobName},
      {"name", "a/b", std::string("found \"a/b\"; ") + kJobName},
      {"name", "[a]", std::string("found a list; ") + kJobName},
      {"name", "{a: b}", std::string("found a mapping; ") + kJobName},
      {"name", "~", std::string("found nothing; ") + kJobName},
      {"data.format", "png", "found \"png\"; accepted: idx, cifar10, npy, synthetic"},
      {"data.path", "''",
       "found the string \"\"; accepted: a folder's path without control characters"},
      {"data.path", "\"a\\nb\"",
       "found the string \"a\\nb\"; accepted: a folder's path without control characters"},
      {"data.shape", "[28, 28]",
       "found a list of 2 elements; accepted: a list of 3 elements, each an integer from 1 to "
       "65536"},
      {"data.shape", "28",
       "found 28; accepted: a list of 3 elements, each an integer from 1 to 65536"},
      {"data.shape", "[65536, 65536, 1]",
       "a sample has more than 2^31 elements; accepted: at most that"},
      {"data.classes", "1", Integer("1", "2", "65536")},
      {"data.classes", "257", "found 257; accepted with format idx: an integer from 2 to 256"},
      {"data.train_features", "''",
       "found the string \"\"; accepted: a file's path without control characters"},
      {"data.train_labels", "[a]",
       "found a list; accepted: a file's path without control characters"},
      {"data.validation_features", "~",
       "found nothing; accepted: a file's path without control characters"},
      {"data.validation_labels", "\"\\t\"",
       "found the string \"\\t\"; accepted: a file's path without control characters"},
      {"data.train_labels", "a.npy",
       "does not belong to format idx; accepted with it: shape, classes, normalize, augment, "
       "train_samples, validation_samples, prefetch, path"},
      {"data.normalize.compute", "1", "found 1; accepted: true or false"},
      {"data.normalize.mean", "[]",
       "found a list of 0 elements; accepted: a list of 1 to 65536 elements, each a number from "
       "-1000000 to 1000000"},
      {"data.normalize.mean", "[0, 0]",
       "found a list of 2 elements; accepted: 1, or 1, the channels of data.shape"},
      {"data.normalize.std", "[1, 1]",
       "found a list of 2 elements; accepted: 1, or 1, the channels of data.shape"},
      {"data.augment", "true",
       "found \"true\"; accepted: a mapping of fields: crop_padding, flip, cutout"},
      {"data.augment.crop_padding", "-1", Integer("-1", "0", "65536")},
      {"data.augment.crop_padding", "29",
       "found 29; accepted: 0 to 28, the smaller side of data.shape"},
      {"data.augment.flip", "1", "found 1; accepted: true or false"},
      {"data.augment.cutout", "0.5", Integer("0.5", "0", "65536")},
      {"data.augment.cutout", "100",
       "found 100; accepted: 0 to 28, the smaller side of data.shape"},
      {"data.train_samples", "0", Integer("0", "1", kMany)},
      {"data.validation_samples", "-1", Integer("-1", "1", kMany)},
      {"data.prefetch", "0", Integer("0", "1", "1024")},
      {"model.preset", "cnn", "found \"cnn\"; accepted: " + std::string(kPresets)},
      {"model.preset", "mpl",
       "found \"mpl\" (did you mean \"mlp\"?); accepted: " + std::string(kPresets)},
      {"model.hidden", "500",
       fmt::format("found 500; accepted: a list of 1 to 256 elements, each an integer from 1 to {}",
                   kInt32)},
      {"model.sync", "none", "found \"none\"; accepted: batch, shard"},
      {"model.statistics", "batch", "found \"batch\"; accepted: running, population"},
      {"model.dropout", "1", Number("1", "from 0 to below 1")},
      {"model.dropout", "-0.1", Number("-0.1", "from 0 to below 1")},
      {"model.batch_norm", "yes", "found \"yes\"; accepted: true or false"},
      {"model.batch_norm", "\"true\"", "found the string \"true\"; accepted: true or false"},
      {"model.batch_norm", "1", "found 1; accepted: true or false"},
      {"model.lstm_hidden", "0", Integer("0", "1", kInt32)},
      {"model.lstm_layers", "65", Integer("65", "1", "64")},
      {"model.bidirectional", "both", "found \"both\"; accepted: true or false"},
      {layer + "name", "data", std::string("found \"data\"; ") + kLayerName},
      {layer + "name", "a.b", std::string("found \"a.b\"; ") + kLayerName},
      {layer + "name", "1st", std::string("found \"1st\"; ") + kLayerName},
      {layer + "name", std::string(65, 'x'),
       "found \"" + std::string(60, 'x') + "...\"; " + kLayerName},
      {layer + "type", "conv2",
       std::string("found \"conv2\" (did you mean \"conv2d\"?); ") + kTypes},
      {layer + "type", "gru", std::string("found \"gru\"; ") + kTypes},
      {layer + "inputs", "flatten_1",
       "found \"flatten_1\"; accepted: a list of 1 to 256 elements, each the name of a layer, or "
       "\"data\""},
      {layer + "units", "0", Integer("0", "1", kInt32)},
      {layer + "units", "2147483648", Integer("2147483648", "1", kInt32)},
      {layer + "filters", "1.5", Integer("1.5", "1", kInt32)},
      {layer + "kernel", "-3", Integer("-3", "1", kInt32)},
      {layer + "stride", "0", Integer("0", "1", kInt32)},
      {layer + "padding", "-1", Integer("-1", "0", kInt32)},
      {layer + "bias", "no", "found \"no\"; accepted: true or false"},
      {layer + "rate", "1.0", Number("1.0", "from 0 to below 1")},
      {layer + "sync", "world", "found \"world\"; accepted: batch, shard"},
      {layer + "momentum", "0", Number("0", "above 0 to 1")},
      {layer + "epsilon", "0", Number("0", "from 1e-12 to 1")},
      {layer + "hidden", "0", Integer("0", "1", kInt32)},
      {layer + "layers", "0", Integer("0", "1", "64")},
      {layer + "layers", "65", Integer("65", "1", "64")},
      {layer + "bidirectional", "1", "found 1; accepted: true or false"},
      {layer + "output", "first", "found \"first\"; accepted: last, sequence"},
      {layer + "dropout", "1", Number("1", "from 0 to below 1")},
      {layer + "weight_init", "he",
       "found \"he\"; accepted: a mapping of fields: type, std, limit, distribution"},
      {layer + "weight_init.type", "glorot",
       "found \"glorot\"; accepted: zeros, normal, uniform, xavier, he"},
      {layer + "weight_init.std", "0", Number("0", "above 0 to 1000000")},
      {layer + "weight_init.limit", "-1", Number("-1", "above 0 to 1000000")},
      {layer + "weight_init.distribution", "cauchy", "found \"cauchy\"; accepted: uniform, normal"},
      {layer + "bias_init.type", "ones",
       "found \"ones\"; accepted: zeros, normal, uniform, xavier, he"},
      {layer + "bias_init.std", "x", Number("\"x\"", "above 0 to 1000000")},
      {layer + "bias_init.limit", "true", Number("\"true\"", "above 0 to 1000000")},
      {layer + "bias_init.distribution", "''", "found the string \"\"; accepted: uniform, normal"},
      {layer + "channels_before", "-1", Integer("-1", "0", kInt32)},
      {layer + "channels_after", "0.5", Integer("0.5", "0", kInt32)},
      {layer + "learning_rate_multiplier", "-0.5", Number("-0.5", "from 0 to 1000000")},
      {layer + "decay_multiplier", "2e6", Number("2e6", "from 0 to 1000000")},
      {layer + "dilation", "0", Integer("0", "1", kInt32)},
      {layer + "groups", "0", Integer("0", "1", kInt32)},
      {layer + "slope", "1", Number("1", "from 0 to below 1")},
      {layer + "alpha", "0", Number("0", "above 0 to 1000")},
      {layer + "vocabulary", "16777217", Integer("16777217", "1", "16777216")},
      {layer + "shape", "[]",
       fmt::format("found a list of 0 elements; accepted: a list of 1 to 3 elements, each an "
                   "integer from 1 to {}",
                   kInt32)},
      {layer + "order", "[0]",
       "found a list of 1 element; accepted: a list of 2 to 3 elements, each an integer from 0 to "
       "2"},
      {layer + "statistics", "none", "found \"none\"; accepted: running, population"},
      {"loss.label_smoothing", "1", Number("1", "from 0 to below 1")},
      {"loss.type", "cross_entropy",
       "found \"cross_entropy\"; accepted: softmax_cross_entropy, mean_squared_error, "
       "sigmoid_cross_entropy"},
      {"loss.target", "labels",
       "found \"labels\" (did you mean \"label\"?); accepted: label, input"},
      {"optimizer.type", "Adam",
       "found \"Adam\" (did you mean \"adam\"?); accepted: sgd, momentum, nesterov, adam, adamw, "
       "adagrad, adadelta, rmsprop"},
      {"optimizer.learning_rate", "0", Number("0", "above 0 to 1000000")},
      {"optimizer.learning_rate", ".nan", Number("\".nan\"", "above 0 to 1000000")},
      {"optimizer.learning_rate", ".inf", Number("\".inf\"", "above 0 to 1000000")},
      {"optimizer.learning_rate", "nan", Number("\"nan\"", "above 0 to 1000000")},
      {"optimizer.learning_rate", "1e999", Number("1e999", "above 0 to 1000000")},
      {"optimizer.learning_rate", "'0.1'", Number("the string \"0.1\"", "above 0 to 1000000")},
      {"optimizer.learning_rate", "0.1f", Number("\"0.1f\"", "above 0 to 1000000")},
      {"optimizer.learning_rate", "0x1p-3", Number("\"0x1p-3\"", "above 0 to 1000000")},
      {"optimizer.momentum", "1", Number("1", "from 0 to below 1")},
      {"optimizer.beta1", "1", Number("1", "from 0 to below 1")},
      {"optimizer.beta1", "0.99999999999", Number("0.99999999999", "from 0 to below 1")},
      {"optimizer.learning_rate", "1e-50", Number("1e-50", "above 0 to 1000000")},
      {"optimizer.beta2", "-0.5", Number("-0.5", "from 0 to below 1")},
      {"optimizer.epsilon", "0", Number("0", "from 1e-30 to 1")},
      {"optimizer.l2", "-1e-4", Number("-1e-4", "from 0 to 1000000")},
      {"optimizer.weight_decay", "-1", Number("-1", "from 0 to 1000000")},
      {"optimizer.rho", "1", Number("1", "from 0 to below 1")},
      {"optimizer.centered", "1", "found 1; accepted: true or false"},
      {"optimizer.clip_norm", "-1", Number("-1", "from 0 to 1000000")},
      {"optimizer.clip_value", ".inf", Number("\".inf\"", "from 0 to 1000000")},
      {"schedule.type", "linear", "found \"linear\"; accepted: constant, step, cosine"},
      {"schedule.warmup_steps", "-1", Integer("-1", "0", kMany)},
      {"schedule.at_steps", "[]",
       "found a list of 0 elements; accepted: a list of 1 to 1024 elements, each an integer from 1 "
       "to 1000000000000"},
      {"schedule.at_epochs", "5",
       "found 5; accepted: a list of 1 to 1024 elements, each a number above 0 to 1000000"},
      {"schedule.factor", "0", Number("0", "above 0 to 1000000")},
      {"schedule.floor", "1.5", Number("1.5", "from 0 to 1")},
      {"train.batch", "0", Integer("0", "1", "1048576")},
      {"train.batch", "1e3", Integer("1e3", "1", "1048576")},
      {"train.batch", "128.0", Integer("128.0", "1", "1048576")},
      {"train.batch", "\"128\"", Integer("the string \"128\"", "1", "1048576")},
      {"train.batch", "0128", Integer("0128", "1", "1048576")},
      {"train.batch", "0x80", Integer("\"0x80\"", "1", "1048576")},
      {"train.batch", "1_000", Integer("\"1_000\"", "1", "1048576")},
      {"train.batch", "99999999999999999999999999999999999999",
       Integer("99999999999999999999999999999999999999", "1", "1048576")},
      {"train.batch", "true", Integer("\"true\"", "1", "1048576")},
      {"train.batch", "!!int 128",
       "found the tag tag:yaml.org,2002:int; accepted: values without a tag"},
      {"train.epochs", "0", Integer("0", "1", "1000000")},
      {"train.steps", "0", Integer("0", "1", kMany)},
      {"train.shards", "0", Integer("0", "1", "4096")},
      {"train.shards", "4097", Integer("4097", "1", "4096")},
      {"train.seed", "-1", Integer("-1", "0", "18446744073709551615")},
      {"train.seed", "18446744073709551616",
       Integer("18446744073709551616", "0", "18446744073709551615")},
      {"train.digest_every", "-1", Integer("-1", "0", kMany)},
      {"train.accumulate", "0", Integer("0", "1", "4096")},
      {"train.accumulate", "17",
       "17 is more than the samples of the largest shard (16, of train.batch 128 in 8 shards); "
       "accepted: 1 to 16"},
      {"train.precision", "fp16", "found \"fp16\"; accepted: fp32, tf32, bf16"},
      {"train.precision", "16", "found 16; accepted: fp32, tf32, bf16"},
      {"train.precision", "tf32",
       "tf32 is computed by GPUs, and resources.device is cpu; accepted there: fp32, bf16"},
      {"train.exact", "1", "found 1; accepted: true or false"},
      {"train.exact", "false",
       "false gives GPUs a faster sum of gradients, and resources.device is cpu; accepted there: "
       "true"},
      {"train.evaluate", "5",
       "found 5; accepted: a mapping of fields: every_steps, every_epochs, batch"},
      {"train.evaluate.every_steps", "-1", Integer("-1", "0", kMany)},
      {"train.evaluate.every_epochs", "0.5", Integer("0.5", "0", "1000000")},
      {"train.evaluate.batch", "0", Integer("0", "1", "1048576")},
      {"checkpoint.every_steps", "-1", Integer("-1", "0", kMany)},
      {"checkpoint.every_epochs", "-1", Integer("-1", "0", "1000000")},
      {"checkpoint.keep", "0", Integer("0", "1", kInt32)},
      {"resources.device", "gpu", "found \"gpu\" (did you mean \"cpu\"?); accepted: cpu, cuda"},
      {"resources.slots", "0", Integer("0", "1", "4096")},
  };
}

// The same for elements of lists.
std::vector<Refusal> ElementRefusals() {
  return {
      {"data.normalize.mean.0", ".inf", Number("\".inf\"", "from -1000000 to 1000000")},
      {"data.normalize.std.0", "0", Number("0", "from 1e-06 to 1000000")},
      {"model.hidden.0", "0", Integer("0", "1", kInt32)},
      {"model.layers.1.inputs.0", "7", "found 7; accepted: the name of a layer, or \"data\""},
      {"schedule.at_steps.0", "0", Integer("0", "1", kMany)},
      {"schedule.at_epochs.0", "0", Number("0", "above 0 to 1000000")},
  };
}

std::string Message(const Document& document, const std::vector<std::string>& overrides = {}) {
  const auto spec = LoadText(document.Text(), "job.yaml", overrides);
  if (spec.ok()) return "accepted";
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(spec.status().message());
}

TEST(Refusal, TheDocumentOfTheTestsIsValid) { EXPECT_EQ(Message(Document::Valid()), "accepted"); }

TEST(Refusal, InAFileNamesFileAndLine) {
  for (const auto& refusals : {Refusals(), ElementRefusals()}) {
    for (const Refusal& r : refusals) {
      Document document = Document::Valid();
      document.Set(r.path, r.value);
      const std::string text = document.Text();
      EXPECT_EQ(Message(document),
                fmt::format("job.yaml:{}: {}: {}", document.Line(r.path), r.path, r.text))
          << text;
    }
  }
}

TEST(Refusal, AsOverrideNamesTheArgument) {
  for (const Refusal& r : Refusals()) {
    const std::string argument = r.path + "=" + r.value;
    EXPECT_EQ(Message(Document::Valid(), {argument}),
              fmt::format("--set {}: {}: {}", argument, r.path, r.text));
  }
}

void EachScalar(const google::protobuf::Descriptor& message,
                const std::function<void(const google::protobuf::FieldDescriptor&)>& visit,
                std::set<std::string> seen = {}) {
  for (int i = 0; i < message.field_count(); ++i) {
    const auto* field = message.field(i);
    if (field->message_type() != nullptr) {
      EachScalar(*field->message_type(), visit, seen);
    } else {
      visit(*field);
    }
  }
}

TEST(Refusal, TheTableCoversEveryField) {
  std::set<std::string> covered;
  for (const auto& refusals : {Refusals(), ElementRefusals()}) {
    for (const Refusal& r : refusals) {
      // Resolves the path along the descriptors.
      const google::protobuf::Descriptor* message = v1::JobSpec::descriptor();
      const google::protobuf::FieldDescriptor* field = nullptr;
      std::string part;
      for (const char c : r.path + ".") {
        if (c != '.') {
          part += c;
          continue;
        }
        if (std::isdigit(static_cast<unsigned char>(part[0])) == 0) {
          field = message->FindFieldByName(part);
          ASSERT_NE(field, nullptr) << r.path;
          if (field->message_type() != nullptr) message = field->message_type();
        }
        part.clear();
      }
      covered.insert(field->full_name());
    }
  }
  EachScalar(*v1::JobSpec::descriptor(), [&](const google::protobuf::FieldDescriptor& field) {
    EXPECT_EQ(covered.count(field.full_name()), 1u) << field.full_name();
  });
}

TEST(Refusal, EveryFieldHasARuleAndNotGivenIsNeverAValue) {
  EachScalar(*v1::JobSpec::descriptor(), [](const google::protobuf::FieldDescriptor& field) {
    ASSERT_TRUE(HasRule(field)) << field.full_name();
    if (field.is_repeated() || field.has_presence()) return;
    using Field = google::protobuf::FieldDescriptor;
    if (field.cpp_type() == Field::CPPTYPE_STRING) {
      EXPECT_FALSE(AcceptsString(field, "")) << field.full_name();
    } else {
      ASSERT_EQ(field.cpp_type(), Field::CPPTYPE_INT32) << field.full_name();
      EXPECT_FALSE(AcceptsInteger(field, 0)) << field.full_name();
    }
  });
}

}  // namespace
}  // namespace lockstep::spec
