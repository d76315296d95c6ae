#include "worker/data/dataset.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"

namespace lockstep::data {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are hashed as they lie");

DatasetParts BytesInMemory(const SampleShape& shape, int64_t classes, std::vector<uint8_t> images,
                           std::vector<int32_t> labels, std::string source) {
  DatasetParts parts;
  parts.shape = shape;
  parts.classes = classes;
  const auto owner = std::make_shared<const std::vector<uint8_t>>(std::move(images));
  parts.data = std::shared_ptr<const void>(owner, owner->data());
  parts.labels = std::move(labels);
  parts.source = std::move(source);
  return parts;
}

std::string ComputeDigest(const Dataset& set) {
  const SampleShape& shape = set.shape();
  const bool floats = set.type() == SampleType::kFloat32;
  const int64_t element = floats ? sizeof(float) : 1;
  Sha256 hash;
  hash.Update(absl::StrCat(set.samples(), " ", shape.height, " ", shape.width, " ", shape.channels,
                           floats ? " float32\n" : "\n"));
  for (int64_t sample = 0; sample < set.samples(); ++sample) {
    hash.Update(static_cast<const uint8_t*>(set.data()) + set.OffsetOf(sample) * element,
                static_cast<size_t>(set.features() * element));
  }
  hash.Update(set.labels(), static_cast<size_t>(set.samples()) * sizeof(int32_t));
  return hash.FinishHex();
}

}  // namespace

Dataset::Dataset(DatasetParts parts) : parts_(std::move(parts)) {
  int64_t elements = parts_.offsets.empty() ? samples() * features() : 0;
  for (const int64_t offset : parts_.offsets) elements = std::max(elements, offset + features());
  data_bytes_ = static_cast<size_t>(elements) * (type() == SampleType::kUint8 ? 1 : sizeof(float));
  if (parts_.digest.empty()) parts_.digest = ComputeDigest(*this);
}

Dataset::Dataset(const SampleShape& shape, int64_t classes, std::vector<uint8_t> images,
                 std::vector<int32_t> labels, std::string source)
    : Dataset(
          BytesInMemory(shape, classes, std::move(images), std::move(labels), std::move(source))) {}

std::string CombinedDigest(const Dataset& train, const Dataset& validation) {
  return Sha256Hex(absl::StrCat(train.digest(), "\n", validation.digest(), "\n"));
}

}  // namespace lockstep::data
