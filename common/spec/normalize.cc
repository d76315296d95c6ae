#include "common/spec/normalize.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>

#include "common/spec/graph_builder.h"
#include "common/spec/presets.h"
#include "common/spec/schema.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

std::string AcceptedFor(const google::protobuf::Message& message, const std::string& field) {
  return Accepted(*message.GetDescriptor()->FindFieldByName(field));
}

MaybeProblem CompleteNormalize(int channels, v1::NormalizeSpec* normalize) {
  if (!normalize->has_compute()) normalize->set_compute(false);
  if (normalize->compute()) {
    const bool mean = !normalize->mean().empty();
    if (!mean && normalize->std().empty()) return std::nullopt;
    return Problem{mean ? "data.normalize.mean" : "data.normalize.std",
                   "given with compute: true; accepted: only with compute: false"};
  }
  if (normalize->mean().empty()) normalize->add_mean(0);
  if (normalize->std().empty()) normalize->add_std(1);
  const auto check = [&](const std::string& name, int count) -> MaybeProblem {
    if (count == 1 || count == channels) return std::nullopt;
    return Problem{"data.normalize." + name,
                   fmt::format("found {}; accepted: 1, or {}, the channels of "
                               "data.shape",
                               FoundList(count), channels)};
  };
  LOCKSTEP_RETURN_IF_PROBLEM(check("mean", normalize->mean_size()));
  return check("std", normalize->std_size());
}

MaybeProblem CompleteAugment(const v1::DataSpec& data, v1::AugmentSpec* augment) {
  if (!augment->has_crop_padding()) augment->set_crop_padding(0);
  if (!augment->has_flip()) augment->set_flip(false);
  if (!augment->has_cutout()) augment->set_cutout(0);
  const int side = std::min(data.shape(0), data.shape(1));
  const auto check = [&](const std::string& name, int pixels) -> MaybeProblem {
    if (pixels <= side) return std::nullopt;
    return Problem{
        "data.augment." + name,
        fmt::format("found {}; accepted: 0 to {}, the smaller side of data.shape", pixels, side)};
  };
  LOCKSTEP_RETURN_IF_PROBLEM(check("crop_padding", augment->crop_padding()));
  return check("cutout", augment->cutout());
}

// CIFAR-10 has one shape and one number of classes.
MaybeProblem CheckCifar10(const v1::DataSpec& data) {
  constexpr int kShape[] = {32, 32, 3};
  if (!std::equal(data.shape().begin(), data.shape().end(), std::begin(kShape), std::end(kShape))) {
    return Problem{"data.shape",
                   fmt::format("found [{}, {}, {}]; accepted with format cifar10: [32, 32, 3]",
                               data.shape(0), data.shape(1), data.shape(2))};
  }
  if (data.classes() == 10) return std::nullopt;
  return Problem{"data.classes",
                 fmt::format("found {}; accepted with format cifar10: 10", data.classes())};
}

// Fields of the formats, besides those that all have.
std::vector<std::string> FormatFields(const std::string& format) {
  if (format == "synthetic") return {};
  if (format != "npy") return {"path"};
  return {"path", "train_features", "train_labels", "validation_features", "validation_labels"};
}

MaybeProblem CompleteSource(v1::DataSpec* data) {
  const std::string& format = data->format();
  const bool npy = format == "npy", synthetic = format == "synthetic";
  LOCKSTEP_RETURN_IF_PROBLEM(CheckApplicable(*data, "data", "format", format,
                                             {"shape", "classes", "normalize", "augment",
                                              "train_samples", "validation_samples", "prefetch"},
                                             FormatFields(format)));
  if (!synthetic && data->path().empty()) {
    return Problem{"data.path",
                   "missing; accepted: the folder of the data, absolute or below LOCKSTEP_DATA"};
  }
  for (const char* field : {"train_samples", "validation_samples"}) {
    const auto* descriptor = data->GetDescriptor()->FindFieldByName(field);
    if (!synthetic || data->GetReflection()->HasField(*data, descriptor)) continue;
    return Problem{fmt::format("data.{}", field),
                   "missing, which format synthetic needs; accepted: " + Accepted(*descriptor)};
  }
  if (!npy) return std::nullopt;
  if (data->train_features().empty()) data->set_train_features("train_features.npy");
  if (data->train_labels().empty()) data->set_train_labels("train_labels.npy");
  if (data->validation_features().empty()) data->set_validation_features("validation_features.npy");
  if (data->validation_labels().empty()) data->set_validation_labels("validation_labels.npy");
  return std::nullopt;
}

MaybeProblem CompleteData(v1::DataSpec* data) {
  if (data->format().empty()) data->set_format("idx");
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteSource(data));
  const bool idx = data->format() == "idx", cifar10 = data->format() == "cifar10";
  if (data->shape().empty()) {
    if (!idx && !cifar10) {
      return Problem{"data.shape",
                     fmt::format("missing, which format {} needs; accepted: {}", data->format(),
                                 AcceptedList(*data->GetDescriptor()->FindFieldByName("shape")))};
    }
    for (const int size : cifar10 ? std::array{32, 32, 3} : std::array{28, 28, 1})
      data->add_shape(size);
  }
  if (data->classes() == 0) data->set_classes(10);
  if (cifar10) LOCKSTEP_RETURN_IF_PROBLEM(CheckCifar10(*data));
  if (idx && data->classes() > 256) {  // a label is one byte of the file
    return Problem{"data.classes",
                   fmt::format("found {}; accepted with format idx: an integer from 2 to 256",
                               data->classes())};
  }
  if (data->prefetch() == 0) data->set_prefetch(2);
  int64_t elements = int64_t{data->shape(0)} * data->shape(1);  // at most 65536 each
  constexpr int64_t kMost = int64_t{1} << 31;
  if (elements > kMost || elements * data->shape(2) > kMost)
    return Problem{"data.shape", "a sample has more than 2^31 elements; accepted: at most that"};
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteAugment(*data, data->mutable_augment()));
  return CompleteNormalize(data->shape(2), data->mutable_normalize());
}

MaybeProblem CompleteModel(v1::ModelSpec* model) {
  const bool layers = !model->layers().empty();
  if (model->preset().empty() && !layers) {
    return Problem{"model", fmt::format("missing; accepted: preset ({}) or layers",
                                        AcceptedFor(*model, "preset"))};
  }
  if (!model->preset().empty() && layers) {
    return Problem{"model.layers", fmt::format("found layers and the preset {}; accepted: one of "
                                               "them",
                                               model->preset())};
  }
  if (layers) {
    if (MaybeProblem problem = CheckApplicable(*model, "model", "layers", "", {}, {})) {
      problem->text = "belongs to presets; accepted with layers: nothing more";
      return problem;
    }
    return CompleteLayers(LayerSource(/*preset=*/false), model->mutable_layers());
  }
  LOCKSTEP_RETURN_IF_PROBLEM(CheckApplicable(*model, "model", "preset", model->preset(), {},
                                             PresetFields(model->preset())));
  if (model->has_batch_norm() && !model->batch_norm()) {
    const std::string text = "given with batch_norm: false; accepted: only with batch_norm: true";
    if (!model->sync().empty()) return Problem{"model.sync", text};
    if (!model->statistics().empty()) return Problem{"model.statistics", text};
  }
  CompletePreset(model);
  if (model->preset() == "lstm-classifier" && model->dropout() > 0 && model->lstm_layers() == 1) {
    return Problem{"model.dropout",
                   fmt::format("found {}, but it acts between lstm layers and there is one; "
                               "accepted: 0, or lstm_layers of 2 or more",
                               model->dropout())};
  }
  return std::nullopt;
}

MaybeProblem CompleteLoss(v1::LossSpec* loss) {
  if (loss->type().empty()) loss->set_type("softmax_cross_entropy");
  const bool classes = loss->type() == "softmax_cross_entropy";
  const std::vector<std::string> fields = {classes ? "label_smoothing" : "target"};
  LOCKSTEP_RETURN_IF_PROBLEM(CheckApplicable(*loss, "loss", "type", loss->type(), {}, fields));
  if (classes && !loss->has_label_smoothing()) loss->set_label_smoothing(0);
  if (!classes && loss->target().empty()) loss->set_target("label");
  return std::nullopt;
}

// The fields of an optimizer's type beside those that every type has.
std::vector<std::string> OptimizerFields(const std::string& type) {
  if (type == "momentum" || type == "nesterov") return {"momentum"};
  if (type == "adam" || type == "adamw") return {"beta1", "beta2", "epsilon"};
  if (type == "adagrad") return {"epsilon"};
  if (type == "adadelta") return {"rho", "epsilon"};
  if (type == "rmsprop") return {"rho", "epsilon", "momentum", "centered"};
  return {};
}

MaybeProblem CompleteOptimizer(v1::OptimizerSpec* optimizer) {
  if (optimizer->type().empty()) optimizer->set_type("sgd");
  const std::string type = optimizer->type();
  const bool adamw = type == "adamw", rmsprop = type == "rmsprop";
  const std::vector<std::string> fields = OptimizerFields(type);
  std::vector<std::string> always = {"learning_rate", "weight_decay", "clip_norm", "clip_value"};
  if (!adamw) always.insert(always.begin() + 1, "l2");
  LOCKSTEP_RETURN_IF_PROBLEM(
      CheckApplicable(*optimizer, "optimizer", "type", type, always, fields));
  if (!optimizer->has_learning_rate()) {
    return Problem{"optimizer.learning_rate",
                   "missing; accepted: " + AcceptedFor(*optimizer, "learning_rate")};
  }
  const auto lacks = [&](const std::string& field, bool given) {
    return !given && std::find(fields.begin(), fields.end(), field) != fields.end();
  };
  if (lacks("momentum", optimizer->has_momentum())) optimizer->set_momentum(rmsprop ? 0 : 0.9);
  if (lacks("beta1", optimizer->has_beta1())) optimizer->set_beta1(0.9);
  if (lacks("beta2", optimizer->has_beta2())) optimizer->set_beta2(0.999);
  if (lacks("rho", optimizer->has_rho())) optimizer->set_rho(rmsprop ? 0.99 : 0.9);
  if (lacks("centered", optimizer->has_centered())) optimizer->set_centered(false);
  if (lacks("epsilon", optimizer->has_epsilon())) {
    optimizer->set_epsilon(type == "adagrad" ? 1e-10 : type == "adadelta" ? 1e-6 : 1e-8);
  }
  if (!adamw && !optimizer->has_l2()) optimizer->set_l2(0);
  if (!optimizer->has_weight_decay()) optimizer->set_weight_decay(adamw ? 0.01 : 0);
  if (!optimizer->has_clip_norm()) optimizer->set_clip_norm(0);
  if (!optimizer->has_clip_value()) optimizer->set_clip_value(0);
  if (optimizer->clip_norm() > 0 && optimizer->clip_value() > 0) {
    return Problem{"optimizer.clip_value",
                   fmt::format("found {} with clip_norm {}; accepted: one of them above 0",
                               optimizer->clip_value(), optimizer->clip_norm())};
  }
  return std::nullopt;
}

template <typename List>
MaybeProblem CheckIncreasing(const List& list, const std::string& path) {
  for (int i = 1; i < list.size(); ++i) {
    if (list[i] > list[i - 1]) continue;
    return Problem{
        fmt::format("{}.{}", path, i),
        fmt::format("found {} after {}; accepted: increasing values", list[i], list[i - 1])};
  }
  return std::nullopt;
}

MaybeProblem CompleteSchedule(v1::ScheduleSpec* schedule) {
  if (schedule->type().empty()) schedule->set_type("constant");
  const bool step = schedule->type() == "step", cosine = schedule->type() == "cosine";
  std::vector<std::string> fields;
  if (step) fields = {"at_steps", "at_epochs", "factor"};
  if (cosine) fields = {"floor"};
  LOCKSTEP_RETURN_IF_PROBLEM(
      CheckApplicable(*schedule, "schedule", "type", schedule->type(), {"warmup_steps"}, fields));
  if (!schedule->has_warmup_steps()) schedule->set_warmup_steps(0);
  if (cosine && !schedule->has_floor()) schedule->set_floor(0);
  if (!step) return std::nullopt;
  if (schedule->at_steps().empty() && schedule->at_epochs().empty()) {
    return Problem{"schedule",
                   "at_steps and at_epochs are missing; type step needs at least one of them"};
  }
  if (!schedule->has_factor()) schedule->set_factor(0.1);
  LOCKSTEP_RETURN_IF_PROBLEM(CheckIncreasing(schedule->at_steps(), "schedule.at_steps"));
  return CheckIncreasing(schedule->at_epochs(), "schedule.at_epochs");
}

bool IsOverride(const SourceMap& sources, const std::string& field) {
  const Location* location = Locate(sources, field);
  return location != nullptr && location->override;
}

// Of a batch and the shards that do not fit it, the one that was written is blamed; of two, the
// override.
MaybeProblem CheckShards(const SourceMap& sources, const std::string& batch_field, int batch,
                         bool shards_given, int shards) {
  if (shards <= batch) return std::nullopt;
  const std::string shards_field = "train.shards";
  const bool blame_shards =
      shards_given && (IsOverride(sources, shards_field) || !IsOverride(sources, batch_field));
  if (blame_shards) {
    return Problem{shards_field, fmt::format("{} is more than {} ({}); accepted: 1 to {}", shards,
                                             batch_field, batch, batch)};
  }
  return Problem{batch_field,
                 fmt::format("{} is less than train.shards ({}{}); accepted: {} or more, or fewer "
                             "shards",
                             batch, shards, shards_given ? "" : ", the default", shards)};
}

// The rule of `every_steps` and `every_epochs`: each epoch, unless steps are given.
template <typename Spec>
void CompleteInterval(Spec* spec) {
  if (!spec->has_every_epochs()) spec->set_every_epochs(spec->has_every_steps() ? 0 : 1);
  if (!spec->has_every_steps()) spec->set_every_steps(0);
}

MaybeProblem CompleteTrain(const SourceMap& sources, v1::TrainSpec* train) {
  if (train->batch() == 0)
    return Problem{"train.batch", "missing; accepted: " + AcceptedFor(*train, "batch")};
  if (!train->has_epochs() && !train->has_steps()) {
    return Problem{"train",
                   "epochs and steps are missing; at least one of them is needed, the "
                   "first reached ends the run"};
  }
  const bool shards_given = train->shards() != 0;
  if (!shards_given) train->set_shards(8);
  LOCKSTEP_RETURN_IF_PROBLEM(
      CheckShards(sources, "train.batch", train->batch(), shards_given, train->shards()));
  if (train->accumulate() == 0) train->set_accumulate(1);
  const int largest = (train->batch() + train->shards() - 1) / train->shards();
  if (train->accumulate() > largest) {
    return Problem{
        "train.accumulate",
        fmt::format("{} is more than the samples of the largest shard ({}, of "
                    "train.batch {} in {} shards); accepted: 1 to {}",
                    train->accumulate(), largest, train->batch(), train->shards(), largest)};
  }
  if (train->precision().empty()) train->set_precision("fp32");
  if (!train->has_seed()) train->set_seed(1);
  if (!train->has_digest_every()) train->set_digest_every(1);
  if (!train->has_exact()) train->set_exact(true);
  v1::EvaluateSpec* evaluate = train->mutable_evaluate();
  CompleteInterval(evaluate);
  if (!evaluate->has_batch()) evaluate->set_batch(train->batch());
  return CheckShards(sources, "train.evaluate.batch", evaluate->batch(), shards_given,
                     train->shards());
}

// The training set where the spec tells its size; the override is blamed, or the batch.
MaybeProblem CheckOneBatch(const SourceMap& sources, const v1::JobSpec& spec) {
  const int64_t samples = spec.data().train_samples(), batch = spec.train().batch();
  if (samples == 0 || batch <= samples) return std::nullopt;
  const std::string samples_field = "data.train_samples", batch_field = "train.batch";
  if (IsOverride(sources, samples_field) && !IsOverride(sources, batch_field)) {
    return Problem{samples_field, fmt::format("{} is less than one train.batch ({}); accepted: {} "
                                              "or more, or a smaller batch",
                                              samples, batch, batch)};
  }
  return Problem{batch_field,
                 fmt::format("{} is more than data.train_samples ({}); accepted: 1 to {}", batch,
                             samples, samples)};
}

MaybeProblem CheckPrecision(const v1::JobSpec& spec) {
  if (spec.train().precision() != "tf32" || spec.resources().device() == "cuda") {
    return std::nullopt;
  }
  return Problem{
      "train.precision",
      fmt::format("tf32 is computed by GPUs, and resources.device is {}; accepted there: "
                  "fp32, bf16",
                  spec.resources().device())};
}

MaybeProblem CheckExact(const v1::JobSpec& spec) {
  if (spec.train().exact() || spec.resources().device() == "cuda") return std::nullopt;
  return Problem{"train.exact",
                 fmt::format("false gives GPUs a faster sum of gradients, and resources.device is "
                             "{}; accepted there: true",
                             spec.resources().device())};
}

void CompleteCheckpoint(v1::CheckpointSpec* checkpoint) {
  CompleteInterval(checkpoint);
  if (!checkpoint->has_keep()) checkpoint->set_keep(3);
}

MaybeProblem CompleteResources(int shards, v1::ResourceSpec* resources) {
  if (resources->device().empty()) resources->set_device("cpu");
  if (resources->slots() <= shards) return std::nullopt;
  return Problem{
      "resources.slots",
      fmt::format("{} is more than train.shards ({}), the most slots that can have work; "
                  "accepted: 1 to {}",
                  resources->slots(), shards, shards)};
}

}  // namespace

LayerList CompleteLayerList(const v1::JobSpec& spec) {
  if (spec.model().preset().empty()) return spec.model().layers();
  LayerList layers = ExpandPreset(spec.model(), spec.data().classes());
  // Cannot fail for what ExpandPreset makes; tests/spec shows it for every preset.
  (void)CompleteLayers(LayerSource(/*preset=*/true), &layers);
  return layers;
}

MaybeProblem Complete(const SourceMap& sources, v1::JobSpec* spec, Graph* graph) {
  LOCKSTEP_RETURN_IF_PROBLEM(CheckValues(*spec, ""));
  if (spec->name().empty()) spec->set_name("job");
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteData(spec->mutable_data()));
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteModel(spec->mutable_model()));
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteLoss(spec->mutable_loss()));
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteOptimizer(spec->mutable_optimizer()));
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteSchedule(spec->mutable_schedule()));
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteTrain(sources, spec->mutable_train()));
  LOCKSTEP_RETURN_IF_PROBLEM(CheckOneBatch(sources, *spec));
  CompleteCheckpoint(spec->mutable_checkpoint());
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteResources(spec->train().shards(), spec->mutable_resources()));
  LOCKSTEP_RETURN_IF_PROBLEM(CheckPrecision(*spec));
  LOCKSTEP_RETURN_IF_PROBLEM(CheckExact(*spec));
  return MakeGraph(*spec, CompleteLayerList(*spec), LayerSource(!spec->model().preset().empty()),
                   graph);
}

}  // namespace lockstep::spec
