#include "common/spec/presets.h"

#include <string>

#include "fmt/format.h"

namespace lockstep::spec {
namespace {

// Appends layers in a chain, each fed by the one before. Layers without a name take their type and
// a number.
class Chain {
 public:
  explicit Chain(const v1::ModelSpec& model) : model_(model) {}

  Chain& Dense(int units, bool bias = true, const std::string& name = "") {
    v1::LayerSpec* layer = Add("dense", name);
    layer->set_units(units);
    layer->set_bias(bias);
    return *this;
  }
  // Keeps the size of the image, but for the stride: kernel is odd.
  Chain& Conv(int filters, int kernel, bool bias, int stride = 1, const std::string& name = "") {
    v1::LayerSpec* layer = Add("conv2d", name);
    layer->set_filters(filters);
    layer->set_kernel(kernel);
    layer->set_stride(stride);
    layer->set_padding(kernel / 2);
    layer->set_bias(bias);
    return *this;
  }
  Chain& MaxPool(int kernel, int stride, int padding = 0, const std::string& name = "") {
    v1::LayerSpec* layer = Add("max_pool", name);
    layer->set_kernel(kernel);
    layer->set_stride(stride);
    layer->set_padding(padding);
    return *this;
  }
  // Every stride-th pixel of every stride-th row.
  Chain& Subsample(int stride, const std::string& name) {
    v1::LayerSpec* layer = Add("average_pool", name);
    layer->set_kernel(1);
    layer->set_stride(stride);
    return *this;
  }
  Chain& PadChannels(int before, int after, const std::string& name) {
    v1::LayerSpec* layer = Add("pad", name);
    layer->set_channels_before(before);
    layer->set_channels_after(after);
    return *this;
  }
  Chain& BatchNorm(const std::string& name = "") {
    v1::LayerSpec* layer = Add("batch_norm", name);
    layer->set_sync(model_.sync());
    layer->set_statistics(model_.statistics());
    return *this;
  }
  Chain& Sum(const std::string& a, const std::string& b, const std::string& name) {
    v1::LayerSpec* layer = Add("add", name);
    layer->add_inputs(a);
    layer->add_inputs(b);
    return *this;
  }
  Chain& Dropout() {
    if (model_.dropout() > 0) Add("dropout", "")->set_rate(model_.dropout());
    return *this;
  }
  Chain& Lstm() {
    v1::LayerSpec* layer = Add("lstm", "");
    layer->set_hidden(model_.lstm_hidden());
    layer->set_layers(model_.lstm_layers());
    layer->set_bidirectional(model_.bidirectional());
    layer->set_dropout(model_.dropout());
    return *this;
  }
  Chain& Relu(const std::string& name = "") { return Plain("relu", name); }
  Chain& Flatten() { return Plain("flatten", ""); }
  Chain& GlobalAveragePool(const std::string& name) { return Plain("global_average_pool", name); }

  // The next layer is fed by `name`.
  Chain& From(const std::string& name) {
    from_ = name;
    return *this;
  }
  const std::string& Last() const { return layers_[layers_.size() - 1].name(); }

  LayerList Take() { return std::move(layers_); }

 private:
  Chain& Plain(const char* type, const std::string& name) {
    Add(type, name);
    return *this;
  }
  v1::LayerSpec* Add(const char* type, const std::string& name) {
    v1::LayerSpec* layer = layers_.Add();
    layer->set_type(type);
    layer->set_name(name);
    if (!from_.empty()) layer->add_inputs(from_);
    from_.clear();
    return layer;
  }

  const v1::ModelSpec& model_;
  LayerList layers_;
  std::string from_;
};

LayerList Mlp(const v1::ModelSpec& model, int classes) {
  Chain chain(model);
  chain.Flatten();
  for (const int width : model.hidden()) {
    // The norm subtracts any bias before it.
    chain.Dense(width, /*bias=*/!model.batch_norm());
    if (model.batch_norm()) chain.BatchNorm();
    chain.Relu().Dropout();
  }
  return chain.Dense(classes).Take();
}

LayerList FashionCnn(const v1::ModelSpec& model, int classes) {
  Chain chain(model);
  for (const int filters : {32, 64, 128})
    chain.Conv(filters, 3, /*bias=*/false).BatchNorm().Relu().MaxPool(2, 2);
  return chain.Flatten().Dropout().Dense(128).Relu().Dropout().Dense(classes).Take();
}

LayerList LeNet(const v1::ModelSpec& model, int classes) {
  Chain chain(model);
  for (const int filters : {32, 64})
    chain.Conv(filters, 3, /*bias=*/true).BatchNorm().Relu().MaxPool(2, 2);
  return chain.Flatten().Dense(128).Relu().Dense(classes).Take();
}

LayerList CifarNet(const v1::ModelSpec& model, int depth, bool shortcuts, int classes) {
  Chain chain(model);
  chain.Conv(16, 3, /*bias=*/false, 1, "stem_conv").BatchNorm("stem_norm").Relu("stem_relu");
  int channels = 16;
  for (int stage = 1; stage <= 3; ++stage) {
    const int filters = 8 << stage;
    for (int block = 1; block <= (depth - 2) / 6; ++block) {
      const std::string at = fmt::format("stage{}_block{}_", stage, block);
      const int stride = filters == channels ? 1 : 2;
      std::string shortcut = chain.Last();
      chain.Conv(filters, 3, /*bias=*/false, stride, at + "conv1")
          .BatchNorm(at + "norm1")
          .Relu(at + "relu1")
          .Conv(filters, 3, /*bias=*/false, 1, at + "conv2")
          .BatchNorm(at + "norm2");
      if (shortcuts) {
        const std::string branch = chain.Last();
        if (stride > 1) {
          const int more = filters - channels;
          chain.From(shortcut).Subsample(stride, at + "subsample");
          chain.PadChannels(more / 2, more - more / 2, at + "pad");
          shortcut = chain.Last();
        }
        chain.Sum(branch, shortcut, at + "add");
      }
      chain.Relu(at + "relu2");
      channels = filters;
    }
  }
  return chain.GlobalAveragePool("pool").Dense(classes, /*bias=*/true, "dense").Take();
}

LayerList ResNet50(const v1::ModelSpec& model, int classes) {
  Chain chain(model);
  chain.Conv(64, 7, /*bias=*/false, 2, "stem_conv").BatchNorm("stem_norm").Relu("stem_relu");
  chain.MaxPool(3, 2, 1, "stem_pool");
  constexpr int kBlocks[] = {3, 4, 6, 3};
  for (int stage = 1; stage <= 4; ++stage) {
    const int filters = 32 << stage;
    for (int block = 1; block <= kBlocks[stage - 1]; ++block) {
      const std::string at = fmt::format("stage{}_block{}_", stage, block);
      const int stride = stage > 1 && block == 1 ? 2 : 1;
      std::string shortcut = chain.Last();
      chain.Conv(filters, 1, /*bias=*/false, 1, at + "conv1")
          .BatchNorm(at + "norm1")
          .Relu(at + "relu1")
          .Conv(filters, 3, /*bias=*/false, stride, at + "conv2")
          .BatchNorm(at + "norm2")
          .Relu(at + "relu2")
          .Conv(4 * filters, 1, /*bias=*/false, 1, at + "conv3")
          .BatchNorm(at + "norm3");
      const std::string branch = chain.Last();
      if (block == 1) {
        chain.From(shortcut).Conv(4 * filters, 1, /*bias=*/false, stride, at + "projection");
        chain.BatchNorm(at + "projection_norm");
        shortcut = chain.Last();
      }
      chain.Sum(branch, shortcut, at + "add").Relu(at + "relu3");
    }
  }
  return chain.GlobalAveragePool("pool").Dense(classes, /*bias=*/true, "dense").Take();
}

LayerList LstmClassifier(const v1::ModelSpec& model, int classes) {
  return Chain(model).Lstm().Dense(classes).Take();
}

}  // namespace

const std::vector<std::string>& PresetFields(const std::string& preset) {
  static const auto& mlp =
      *new std::vector<std::string>{"hidden", "sync", "statistics", "dropout", "batch_norm"};
  static const auto& fashion_cnn = *new std::vector<std::string>{"sync", "statistics", "dropout"};
  static const auto& others = *new std::vector<std::string>{"sync", "statistics"};
  static const auto& lstm =
      *new std::vector<std::string>{"lstm_hidden", "lstm_layers", "bidirectional", "dropout"};
  if (preset == "lstm-classifier") return lstm;
  return preset == "mlp" ? mlp : preset == "fashion-cnn" ? fashion_cnn : others;
}

void CompletePreset(v1::ModelSpec* model) {
  if (model->preset() == "lstm-classifier") {
    if (model->lstm_hidden() == 0) model->set_lstm_hidden(128);
    if (model->lstm_layers() == 0) model->set_lstm_layers(1);
    if (!model->has_bidirectional()) model->set_bidirectional(false);
    if (!model->has_dropout()) model->set_dropout(0);
    return;
  }
  const bool mlp = model->preset() == "mlp";
  if (mlp && !model->has_dropout()) model->set_dropout(0);
  if (model->preset() == "fashion-cnn" && !model->has_dropout()) model->set_dropout(0.3);
  if (mlp && !model->has_batch_norm()) model->set_batch_norm(true);
  if (mlp && model->hidden().empty()) {
    model->add_hidden(500);
    model->add_hidden(500);
  }
  const bool norms = !mlp || model->batch_norm();
  if (norms && model->sync().empty()) model->set_sync("shard");
  if (norms && model->statistics().empty()) model->set_statistics("running");
}

LayerList ExpandPreset(const v1::ModelSpec& model, int classes) {
  const std::string& preset = model.preset();
  if (preset == "mlp") return Mlp(model, classes);
  if (preset == "fashion-cnn") return FashionCnn(model, classes);
  if (preset == "lenet") return LeNet(model, classes);
  if (preset == "lstm-classifier") return LstmClassifier(model, classes);
  if (preset == "resnet-50") return ResNet50(model, classes);
  const int depth = std::stoi(preset.substr(preset.find('-') + 1));
  return CifarNet(model, depth, /*shortcuts=*/preset.starts_with("resnet"), classes);
}

}  // namespace lockstep::spec
