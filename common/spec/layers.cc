#include "common/spec/layers.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "common/spec/schema.h"
#include "common/spec/text.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

constexpr int kMostLinks = 1 << 20;  // of a whole model: inputs of all layers together

bool HasWeights(const v1::LayerSpec& layer) {
  return layer.type() == "dense" || layer.type() == "conv2d" || layer.type() == "lstm";
}

// add, multiply and concat take as many inputs as they are given, but two at least.
bool TakesSeveral(const v1::LayerSpec& layer) {
  return layer.type() == "add" || layer.type() == "multiply" || layer.type() == "concat";
}

std::string AcceptedTypes() {
  return Accepted(*v1::LayerSpec::descriptor()->FindFieldByName("type"));
}

Problem Missing(const LayerSource& source, const LayerList& layers, int index,
                const std::string& attribute) {
  const auto* field = v1::LayerSpec::descriptor()->FindFieldByName(attribute);
  return source.At(layers, index, attribute,
                   fmt::format("missing; {} needs {}", layers[index].type(), Accepted(*field)));
}

MaybeProblem CompleteInitializer(const LayerSource& source, const LayerList& layers, int index,
                                 const std::string& attribute, v1::InitializerSpec* init) {
  const auto at = [&](const std::string& field, const std::string& text) {
    return source.At(layers, index, Join(attribute, field), text);
  };
  const bool bias = attribute == "bias_init";
  const bool no_fan = bias || layers[index].type() == "embedding";
  const std::string accepted =
      no_fan ? "zeros, normal, uniform"
             : Accepted(*v1::InitializerSpec::descriptor()->FindFieldByName("type"));
  if (init->type().empty()) return at("type", "missing; accepted: " + accepted);
  const bool scaled = init->type() == "xavier" || init->type() == "he";
  if (no_fan && scaled) {
    return at("type", fmt::format("found \"{}\", which needs a weight's fan-in; accepted: {}",
                                  init->type(), accepted));
  }
  std::vector<std::string> fields;
  if (init->type() == "normal") fields = {"std"};
  if (init->type() == "uniform") fields = {"limit"};
  if (scaled) fields = {"distribution"};
  if (MaybeProblem problem = CheckApplicable(*init, "", "type", init->type(), {}, fields))
    return at(problem->field, problem->text);
  if (init->type() == "normal" && !init->has_std()) init->set_std(0.01);
  if (init->type() == "uniform" && !init->has_limit()) init->set_limit(0.05);
  if (scaled && init->distribution().empty())
    init->set_distribution(init->type() == "he" ? "normal" : "uniform");
  return std::nullopt;
}

MaybeProblem CompleteAttributes(const LayerSource& source, int index, LayerList* layers) {
  v1::LayerSpec& layer = *layers->Mutable(index);
  const auto missing = [&](const std::string& attribute) {
    return Missing(source, *layers, index, attribute);
  };
  const std::vector<std::string>& fields = LayerFields(layer.type());
  const auto takes = [&](const std::string& field) {
    return std::find(fields.begin(), fields.end(), field) != fields.end();
  };
  if (layer.type() == "dense" && layer.units() == 0) return missing("units");
  if (layer.type() == "conv2d" && layer.filters() == 0) return missing("filters");
  const bool pool = layer.type() == "max_pool" || layer.type() == "average_pool";
  if (pool || layer.type() == "conv2d") {
    if (layer.kernel() == 0) return missing("kernel");
    if (layer.stride() == 0) layer.set_stride(pool ? layer.kernel() : 1);
    if (!layer.has_padding()) layer.set_padding(0);
  }
  if (takes("learning_rate_multiplier") && !layer.has_learning_rate_multiplier())
    layer.set_learning_rate_multiplier(1);
  if (takes("decay_multiplier") && !layer.has_decay_multiplier()) layer.set_decay_multiplier(1);
  if (layer.type() == "conv2d") {
    if (layer.dilation() == 0) layer.set_dilation(1);
    if (layer.groups() == 0) layer.set_groups(1);
  }
  if (layer.type() == "leaky_relu" && !layer.has_slope()) layer.set_slope(0.01);
  if (layer.type() == "elu" && !layer.has_alpha()) layer.set_alpha(1);
  if (layer.type() == "layer_norm" && !layer.has_epsilon()) layer.set_epsilon(1e-5);
  if (layer.type() == "reshape" && layer.shape().empty()) return missing("shape");
  if (layer.type() == "transpose" && layer.order().empty()) return missing("order");
  if (layer.type() == "embedding") {
    if (layer.vocabulary() == 0) return missing("vocabulary");
    if (layer.units() == 0) return missing("units");
    if (!layer.has_weight_init()) layer.mutable_weight_init()->set_type("uniform");
    LOCKSTEP_RETURN_IF_PROBLEM(
        CompleteInitializer(source, *layers, index, "weight_init", layer.mutable_weight_init()));
  }
  if (HasWeights(layer)) {
    if (!layer.has_bias()) layer.set_bias(true);
    if (layer.has_bias_init() && !layer.bias()) {
      return source.At(*layers, index, "bias_init",
                       "given for a layer with bias: false; accepted: only with bias: true");
    }
  }
  if (layer.type() == "dropout" && !layer.has_rate()) return missing("rate");
  if (layer.type() == "pad") {
    if (!layer.has_padding()) layer.set_padding(0);
    if (!layer.has_channels_before()) layer.set_channels_before(0);
    if (!layer.has_channels_after()) layer.set_channels_after(0);
    if (layer.padding() == 0 && layer.channels_before() == 0 && layer.channels_after() == 0) {
      return source.At(*layers, index, "",
                       "pad adds nothing; accepted: padding, channels_before or channels_after "
                       "above 0");
    }
  }
  if (layer.type() == "lstm") {
    if (layer.hidden() == 0) return missing("hidden");
    if (layer.layers() == 0) layer.set_layers(1);
    if (!layer.has_bidirectional()) layer.set_bidirectional(false);
    if (layer.output().empty()) layer.set_output("last");
    if (!layer.has_dropout()) layer.set_dropout(0);
    if (layer.dropout() > 0 && layer.layers() == 1) {
      return source.At(*layers, index, "dropout",
                       fmt::format("found {}, but it acts between layers and there is one; "
                                   "accepted: 0, or layers of 2 or more",
                                   layer.dropout()));
    }
  }
  if (layer.type() == "batch_norm") {
    if (layer.sync().empty()) layer.set_sync("batch");
    if (layer.statistics().empty()) layer.set_statistics("running");
    if (layer.statistics() == "population") {
      if (layer.has_momentum()) {
        return source.At(*layers, index, "momentum",
                         "given with statistics: population, which keeps no running averages; "
                         "accepted: only with statistics: running");
      }
    } else if (!layer.has_momentum()) {
      layer.set_momentum(0.1);
    }
    if (!layer.has_epsilon()) layer.set_epsilon(1e-5);
  }
  return std::nullopt;
}

MaybeProblem CompleteInputs(const LayerSource& source, const std::map<std::string, int>& by_name,
                            LayerList* layers) {
  std::vector<std::string> accepted = {"data"};
  for (const v1::LayerSpec& layer : *layers) accepted.push_back(layer.name());
  int links = 0;
  for (int i = 0; i < layers->size(); ++i) {
    v1::LayerSpec& layer = *layers->Mutable(i);
    if (layer.inputs().empty()) {
      if (TakesSeveral(layer)) {
        return source.At(
            *layers, i, "inputs",
            fmt::format("missing; {} needs the names of 2 or more layers", layer.type()));
      }
      layer.add_inputs(i == 0 ? "data" : layers->Get(i - 1).name());
    }
    const int count = layer.inputs_size();
    if (TakesSeveral(layer) ? count < 2 : count != 1) {
      return source.At(
          *layers, i, "inputs",
          fmt::format("found {} input{}; accepted: {} for {}", count, count == 1 ? "" : "s",
                      TakesSeveral(layer) ? "2 or more" : "1", layer.type()));
    }
    for (int k = 0; k < count; ++k) {
      const std::string& input = layer.inputs(k);
      if (input == "data" || by_name.count(input) != 0) continue;
      return source.At(*layers, i, fmt::format("inputs.{}", k),
                       fmt::format("found {}, which is not a layer{}; accepted: {}", Quoted(input),
                                   NearestHint(input, accepted), JoinList(accepted)));
    }
    links += count;
    if (links > kMostLinks) {
      return source.At(
          *layers, i, "inputs",
          fmt::format("the model has more than {} inputs in all; accepted: at most that",
                      kMostLinks));
    }
  }
  return std::nullopt;
}

// PyTorch's default for every tensor of an LSTM.
void CompleteLstmInitializers(v1::LayerSpec* layer) {
  const double limit = 1 / std::sqrt(static_cast<double>(layer->hidden()));
  const auto complete = [limit](v1::InitializerSpec* init) {
    init->set_type("uniform");
    init->set_limit(limit);
  };
  if (!layer->has_weight_init()) complete(layer->mutable_weight_init());
  if (layer->bias() && !layer->has_bias_init()) complete(layer->mutable_bias_init());
}

// Whether a layer's output reaches a relu directly or through batch_norm and add.
bool ReachesRelu(const LayerList& layers, const std::vector<std::vector<int>>& consumers,
                 int index) {
  std::vector<int> pending = consumers[index];
  std::set<int> seen;
  while (!pending.empty()) {
    const int next = pending.back();
    pending.pop_back();
    if (!seen.insert(next).second) continue;
    if (layers[next].type() == "relu") return true;
    if (layers[next].type() == "batch_norm" || layers[next].type() == "add")
      pending.insert(pending.end(), consumers[next].begin(), consumers[next].end());
  }
  return false;
}

}  // namespace

std::vector<std::string> LayerNames(const v1::ModelSpec& model) {
  std::set<std::string> taken;
  for (const v1::LayerSpec& layer : model.layers()) taken.insert(layer.name());
  std::map<std::string, int> last_number;
  std::vector<std::string> names;
  for (const v1::LayerSpec& layer : model.layers()) {
    std::string name = layer.name();
    int& number = last_number[layer.type()];
    ++number;
    if (name.empty()) {
      while (taken.count(name = fmt::format("{}_{}", layer.type(), number)) != 0) ++number;
      taken.insert(name);
    }
    names.push_back(name);
  }
  return names;
}

Problem LayerSource::At(const LayerList& layers, int index, const std::string& attribute,
                        const std::string& text) const {
  if (preset_) {
    const std::string name = layers[index].name();
    return {"model.preset", fmt::format("its layer {}{}{}: {}", name, attribute.empty() ? "" : ".",
                                        attribute, text)};
  }
  return {attribute.empty() ? fmt::format("model.layers.{}", index)
                            : fmt::format("model.layers.{}.{}", index, attribute),
          text};
}

MaybeProblem CompleteLayers(const LayerSource& source, LayerList* layers) {
  for (int i = 0; i < layers->size(); ++i) {
    const v1::LayerSpec& layer = layers->Get(i);
    if (layer.type().empty())
      return source.At(*layers, i, "type", "missing; accepted: " + AcceptedTypes());
    if (MaybeProblem problem = CheckApplicable(layer, "", "type", layer.type(), {"name", "inputs"},
                                               LayerFields(layer.type())))
      return source.At(*layers, i, problem->field, problem->text);
    LOCKSTEP_RETURN_IF_PROBLEM(CompleteAttributes(source, i, layers));
  }
  v1::ModelSpec model;
  model.mutable_layers()->CopyFrom(*layers);
  const std::vector<std::string> names = LayerNames(model);
  std::map<std::string, int> by_name;
  for (int i = 0; i < layers->size(); ++i) {
    const auto [first, inserted] = by_name.emplace(names[i], i);
    if (!inserted) {
      return source.At(*layers, i, "name",
                       fmt::format("\"{}\" is also the name of layer {}; accepted: unique names",
                                   names[i], first->second));
    }
    layers->Mutable(i)->set_name(names[i]);
  }
  LOCKSTEP_RETURN_IF_PROBLEM(CompleteInputs(source, by_name, layers));

  std::vector<std::vector<int>> consumers(layers->size());
  for (int i = 0; i < layers->size(); ++i) {
    for (const std::string& input : layers->Get(i).inputs()) {
      if (input != "data") consumers[by_name.at(input)].push_back(i);
    }
  }
  for (int i = 0; i < layers->size(); ++i) {
    v1::LayerSpec& layer = *layers->Mutable(i);
    if (!HasWeights(layer)) continue;
    if (layer.type() == "lstm") CompleteLstmInitializers(&layer);
    if (!layer.has_weight_init()) {
      const bool he = ReachesRelu(*layers, consumers, i);
      layer.mutable_weight_init()->set_type(he ? "he" : "xavier");
    }
    LOCKSTEP_RETURN_IF_PROBLEM(
        CompleteInitializer(source, *layers, i, "weight_init", layer.mutable_weight_init()));
    if (!layer.bias()) continue;
    if (!layer.has_bias_init()) layer.mutable_bias_init()->set_type("zeros");
    LOCKSTEP_RETURN_IF_PROBLEM(
        CompleteInitializer(source, *layers, i, "bias_init", layer.mutable_bias_init()));
  }
  return std::nullopt;
}

}  // namespace lockstep::spec
