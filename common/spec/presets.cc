#include "common/spec/presets.h"

namespace lockstep::spec {
namespace {

// Appends layers in a chain, each fed by the one before.
class Chain {
 public:
  explicit Chain(const v1::ModelSpec& model) : model_(model) {}

  Chain& Dense(int units, bool bias = true) {
    v1::LayerSpec* layer = Add("dense");
    layer->set_units(units);
    layer->set_bias(bias);
    return *this;
  }
  Chain& Conv3x3(int filters, bool bias) {
    v1::LayerSpec* layer = Add("conv2d");
    layer->set_filters(filters);
    layer->set_kernel(3);
    layer->set_padding(1);
    layer->set_bias(bias);
    return *this;
  }
  Chain& MaxPool(int kernel) {
    Add("max_pool")->set_kernel(kernel);
    return *this;
  }
  Chain& BatchNorm() {
    Add("batch_norm")->set_sync(model_.sync());
    return *this;
  }
  Chain& Dropout() {
    if (model_.dropout() > 0) Add("dropout")->set_rate(model_.dropout());
    return *this;
  }
  Chain& Relu() { return Plain("relu"); }
  Chain& Flatten() { return Plain("flatten"); }

  LayerList Take() { return std::move(layers_); }

 private:
  Chain& Plain(const char* type) {
    Add(type);
    return *this;
  }
  v1::LayerSpec* Add(const char* type) {
    v1::LayerSpec* layer = layers_.Add();
    layer->set_type(type);
    return layer;
  }

  const v1::ModelSpec& model_;
  LayerList layers_;
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
    chain.Conv3x3(filters, /*bias=*/false).BatchNorm().Relu().MaxPool(2);
  return chain.Flatten().Dropout().Dense(128).Relu().Dropout().Dense(classes).Take();
}

}  // namespace

const std::vector<std::string>& PresetFields(const std::string& preset) {
  static const auto& mlp = *new std::vector<std::string>{"hidden", "sync", "dropout", "batch_norm"};
  static const auto& cnn = *new std::vector<std::string>{"sync", "dropout"};
  return preset == "mlp" ? mlp : cnn;
}

void CompletePreset(v1::ModelSpec* model) {
  const bool mlp = model->preset() == "mlp";
  if (!model->has_dropout()) model->set_dropout(mlp ? 0.0 : 0.3);
  if (mlp && !model->has_batch_norm()) model->set_batch_norm(true);
  if (mlp && model->hidden().empty()) {
    model->add_hidden(500);
    model->add_hidden(500);
  }
  const bool norms = !mlp || model->batch_norm();
  if (norms && model->sync().empty()) model->set_sync("shard");
}

LayerList ExpandPreset(const v1::ModelSpec& model, int classes) {
  return model.preset() == "mlp" ? Mlp(model, classes) : FashionCnn(model, classes);
}

}  // namespace lockstep::spec
