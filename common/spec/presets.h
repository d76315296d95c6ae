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
//   fashion-cnn: {conv 3x3, batch_norm, relu, max_pool 2} with 32, 64 and 128 filters, flatten,
//     dropout, dense(128), relu, dropout, dense(classes).
//   lenet: {conv 3x3 with bias, batch_norm, relu, max_pool 2} with 32 and 64 filters, flatten,
//     dense(128), relu, dense(classes).
//   resnet-{6n+2}: conv 3x3 of 16 filters, n blocks of two 3x3 convolutions with each of 16, 32 and
//     64 filters, the first of 32 and 64 with stride 2, global average, dense(classes). Shortcuts
//     are option A: every second pixel, zeros for the new channels, half of them on either side.
//   plain-{6n+2}: the same without shortcuts.
//   resnet-50: conv 7x7, max_pool 3; 3, 4, 6, 3 bottlenecks of 1x1, 3x3, 1x1 convolutions with 64,
//     128, 256, 512 filters and four times as many at their end; projections as shortcuts where the
//     shape changes. Strides are in the 3x3 convolutions, as in PyTorch's.
//   lstm-classifier: lstm (its last output), dense(classes); dropout is that between lstm layers.
// Dropout layers are there only if the rate is above 0.
LayerList ExpandPreset(const v1::ModelSpec& model, int classes);

}  // namespace lockstep::spec
