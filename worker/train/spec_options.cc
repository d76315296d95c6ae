#include "worker/train/spec_options.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "worker/data/sampler.h"

namespace lockstep::train {

RunLength MakeRunLength(const v1::JobSpec& spec, int64_t samples) {
  RunLength length;
  length.samples = samples;
  length.batch = spec.train().batch();
  length.steps_per_epoch = (samples + length.batch - 1) / length.batch;
  int64_t total = std::numeric_limits<int64_t>::max();
  if (spec.train().has_epochs() && spec.train().epochs() > 0) {
    total = std::min(total, spec.train().epochs() * length.steps_per_epoch);
  }
  if (spec.train().has_steps() && spec.train().steps() > 0) {
    total = std::min<int64_t>(total, spec.train().steps());
  }
  length.total_steps = total;
  return length;
}

namespace {

device::OptimizerType TypeOf(const v1::OptimizerSpec& spec) {
  using Type = device::OptimizerType;
  const std::string& type = spec.type();
  if (type == "momentum") return Type::kMomentum;
  if (type == "nesterov") return Type::kNesterov;
  if (type == "adam" || type == "adamw") return Type::kAdam;
  if (type == "adagrad") return Type::kAdagrad;
  if (type == "adadelta") return Type::kAdadelta;
  if (type == "rmsprop") {
    if (spec.momentum() > 0) {
      return spec.centered() ? Type::kRmsPropCenteredMomentum : Type::kRmsPropMomentum;
    }
    return spec.centered() ? Type::kRmsPropCentered : Type::kRmsProp;
  }
  return Type::kSgd;
}

}  // namespace

data::DataOptions MakeDataOptions(const v1::JobSpec& spec, const std::string& folder) {
  const v1::DataSpec& data = spec.data();
  data::DataOptions options;
  options.format = data.format() == "cifar10"     ? data::Format::kCifar10
                   : data.format() == "npy"       ? data::Format::kNpy
                   : data.format() == "synthetic" ? data::Format::kSynthetic
                                                  : data::Format::kIdx;
  options.folder = folder;
  options.shape = {data.shape(0), data.shape(1), data.shape(2)};
  options.classes = data.classes();
  options.train_samples = data.train_samples();
  options.validation_samples = data.validation_samples();
  options.batch = spec.train().batch();
  options.seed = spec.train().seed();
  options.train_features = data.train_features();
  options.train_labels = data.train_labels();
  options.validation_features = data.validation_features();
  options.validation_labels = data.validation_labels();
  return options;
}

device::Augmentation MakeAugmentation(const v1::JobSpec& spec) {
  const v1::AugmentSpec& augment = spec.data().augment();
  return data::MakeAugmentation(spec.train().seed(), augment.crop_padding(), augment.flip(),
                                augment.cutout());
}

data::ValueRule MakeValueRule(const spec::Graph& graph) {
  using spec::LayerType;
  for (const spec::Layer& layer : graph.layers) {
    if (layer.type != LayerType::kEmbedding) continue;
    // Layers that move values and leave them as they are.
    int input = layer.inputs[0];
    while (input != spec::kData) {
      const LayerType type = graph.layers[input].type;
      if (type != LayerType::kFlatten && type != LayerType::kReshape &&
          type != LayerType::kTranspose) {
        break;
      }
      input = graph.layers[input].inputs[0];
    }
    if (input != spec::kData) continue;
    return {0, static_cast<double>(layer.tensors[0].shape[0] - 1), true,
            absl::StrCat("the embedding ", layer.name)};
  }
  if (graph.loss == spec::LossType::kSigmoidCrossEntropy && graph.target == spec::Target::kInput) {
    return {0, 1, false, "sigmoid_cross_entropy with target: input"};
  }
  return {};
}

device::OptimizerCoefficients MakeCoefficients(const v1::OptimizerSpec& spec) {
  device::OptimizerCoefficients c;
  c.type = TypeOf(spec);
  c.momentum = static_cast<float>(spec.momentum());
  c.beta1 = static_cast<float>(spec.beta1());
  c.beta2 = static_cast<float>(spec.beta2());
  c.rho = static_cast<float>(spec.rho());
  c.epsilon = static_cast<float>(spec.epsilon());
  c.l2 = static_cast<float>(spec.l2());
  c.weight_decay = static_cast<float>(spec.weight_decay());
  if (spec.clip_value() > 0) c.clip_value = static_cast<float>(spec.clip_value());
  return c;
}

optim::ScheduleOptions MakeSchedule(const v1::JobSpec& spec, const RunLength& length) {
  using Type = optim::ScheduleOptions::Type;
  const v1::ScheduleSpec& s = spec.schedule();
  optim::ScheduleOptions options;
  options.type = s.type() == "step"     ? Type::kStep
                 : s.type() == "cosine" ? Type::kCosine
                                        : Type::kConstant;
  options.learning_rate = spec.optimizer().learning_rate();
  options.warmup_steps = s.warmup_steps();
  for (int64_t step : s.at_steps()) options.at_steps.push_back(step);
  for (double epoch : s.at_epochs()) {
    options.at_steps.push_back(std::llround(epoch * static_cast<double>(length.steps_per_epoch)));
  }
  std::sort(options.at_steps.begin(), options.at_steps.end());
  options.factor = s.factor();
  options.floor = s.floor();
  options.total_steps = length.total_steps;
  return options;
}

bool Due(int64_t every_steps, int64_t every_epochs, const RunLength& length, int64_t step) {
  if (every_steps > 0 && step % every_steps == 0) return true;
  return every_epochs > 0 && step % (every_epochs * length.steps_per_epoch) == 0;
}

}  // namespace lockstep::train
