// The ready models: each preset as the list of layers it stands for. Internal to common/spec.
// Thread-safe: pure functions.
#pragma once

#include "common/spec/layers.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

// Fields of ModelSpec that the preset has, besides preset.
const std::vector<std::string>& PresetFields(const std::string& preset);

// Makes the preset's fields explicit: the defaults live here.
void CompletePreset(v1::ModelSpec* model);

// The layers of a complete model.preset, with the names they will show. classes: of the data.
//   mlp: flatten, {dense, batch_norm, relu, dropout} for each hidden width, dense(classes).
//   fashion-cnn: {conv 3x3, batch_norm, relu, max_pool 2} with 32 and 64 filters, flatten, dropout,
//     dense(128), relu, dropout, dense(classes).
// Dropout layers are there only if the rate is above 0.
LayerList ExpandPreset(const v1::ModelSpec& model, int classes);

}  // namespace lockstep::spec
