#include "worker/data/dataset.h"

#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"

namespace lockstep::data {
namespace {

std::string ComputeDigest(const SampleShape& shape, const std::vector<uint8_t>& images,
                          const std::vector<int32_t>& labels) {
  static_assert(std::endian::native == std::endian::little, "labels are hashed as they lie");
  Sha256 hash;
  hash.Update(
      absl::StrCat(labels.size(), " ", shape.height, " ", shape.width, " ", shape.channels, "\n"));
  hash.Update(images.data(), images.size());
  hash.Update(labels.data(), labels.size() * sizeof(int32_t));
  return hash.FinishHex();
}

}  // namespace

Dataset::Dataset(const SampleShape& shape, int64_t classes, std::vector<uint8_t> images,
                 std::vector<int32_t> labels)
    : shape_(shape),
      classes_(classes),
      images_(std::move(images)),
      labels_(std::move(labels)),
      digest_(ComputeDigest(shape_, images_, labels_)) {}

std::string CombinedDigest(const Dataset& train, const Dataset& validation) {
  return Sha256Hex(absl::StrCat(train.digest(), "\n", validation.digest(), "\n"));
}

}  // namespace lockstep::data
