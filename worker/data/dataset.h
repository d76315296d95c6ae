// A labelled set of samples: what every format's reader produces and the loader draws from.
//
// Immutable, so thread-safe; shared by the loaders of a process. Features stay as they are stored,
// bytes or floats: normalization and augmentation run on the device in GatherSamples, whose `data`
// is data(). They may lie in a file that is mapped into memory: a set may be larger than memory. On
// a GPU the loader registers that memory with the driver, or copies it to the device once, when it
// is made.
//
// Invariants:
//  1. At least one sample; every sample's features() elements lie in data(), from OffsetOf on.
//  2. 0 <= label < classes().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "worker/device/kernel_types.h"

namespace lockstep::data {

using device::SampleShape;
using device::SampleType;

enum class Split { kTrain, kValidation };

// What a reader hands over; it has checked the invariants.
struct DatasetParts {
  SampleShape shape;
  int64_t classes = 0;
  SampleType type = SampleType::kUint8;
  std::shared_ptr<const void> data;  // {samples, height, width, channels}, unless offsets are given
  bool mapped = false;               // data lies in a file, and not all of it in memory
  std::vector<int64_t> offsets;      // of each sample, in elements; empty: one after the other
  std::vector<int32_t> labels;
  std::string source;  // the file that decides the number of samples, for messages
  std::string digest;  // in hex; empty: computed
};

class Dataset {
 public:
  explicit Dataset(DatasetParts parts);
  // Bytes in memory, {samples, height, width, channels}.
  Dataset(const SampleShape& shape, int64_t classes, std::vector<uint8_t> images,
          std::vector<int32_t> labels, std::string source = "");

  int64_t samples() const { return static_cast<int64_t>(parts_.labels.size()); }
  int64_t features() const { return parts_.shape.features(); }
  const SampleShape& shape() const { return parts_.shape; }
  int64_t classes() const { return parts_.classes; }
  SampleType type() const { return parts_.type; }
  const void* data() const { return parts_.data.get(); }
  size_t data_bytes() const { return data_bytes_; }  // from data() on, of all samples
  bool mapped() const { return parts_.mapped; }
  int64_t OffsetOf(int64_t sample) const {
    return parts_.offsets.empty() ? sample * features()
                                  : parts_.offsets[static_cast<size_t>(sample)];
  }
  const int32_t* labels() const { return parts_.labels.data(); }
  const std::string& source() const { return parts_.source; }

  // Unless the reader gave another: SHA-256 in hex over "n h w c\n" ("n h w c float32\n"), the
  // samples in order, and the labels as little-endian int32.
  const std::string& digest() const { return parts_.digest; }

 private:
  DatasetParts parts_;
  size_t data_bytes_ = 0;
};

// One digest of the two sets a job uses; what workers compare when it starts.
std::string CombinedDigest(const Dataset& train, const Dataset& validation);

}  // namespace lockstep::data
