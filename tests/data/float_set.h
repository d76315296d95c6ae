// A set of floats in memory, for tests. Pure.
#pragma once

#include <memory>
#include <vector>

#include "worker/data/dataset.h"

namespace lockstep::data {

// Samples of `shape` one after the other, all of class 0 of two.
inline Dataset FloatSet(const std::vector<float>& values, const SampleShape& shape) {
  DatasetParts parts;
  parts.shape = shape;
  parts.classes = 2;
  parts.type = SampleType::kFloat32;
  const auto owner = std::make_shared<const std::vector<float>>(values);
  parts.data = std::shared_ptr<const void>(owner, owner->data());
  parts.labels.resize(values.size() / static_cast<size_t>(shape.features()));
  parts.source = "floats.npy";
  return Dataset(std::move(parts));
}

}  // namespace lockstep::data
