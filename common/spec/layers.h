// A model's list of layers before shapes: names, inputs and per-type defaults made explicit, and
// what does not belong to a layer's type refused. Internal to common/spec. Thread-safe: pure.
#pragma once

#include <string>
#include <vector>

#include "common/spec/problem.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

using LayerList = google::protobuf::RepeatedPtrField<v1::LayerSpec>;

// The name of every layer in the order of the list: its own, or its type and the first free number
// ("conv2d_1").
std::vector<std::string> LayerNames(const v1::ModelSpec& model);

// Where the list comes from, so that a problem names a field that a person wrote.
class LayerSource {
 public:
  explicit LayerSource(bool preset) : preset_(preset) {}
  // A problem with an attribute ("kernel"; "": the layer itself) of layers[index].
  Problem At(const LayerList& layers, int index, const std::string& attribute,
             const std::string& text) const;

 private:
  bool preset_;
};

// Makes names, inputs and the attributes of each type explicit, initializers included: weights
// whose consumer is a relu (directly or through batch_norm and add) default to He, others to
// Xavier, those of an lstm to PyTorch's uniform. Idempotent. Checks types, required attributes,
// unique names, known inputs and their number.
MaybeProblem CompleteLayers(const LayerSource& source, LayerList* layers);

}  // namespace lockstep::spec
