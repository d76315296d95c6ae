// A labelled set of images in memory: what every format's reader produces and the loader draws
// from.
//
// Immutable, so thread-safe; shared by the loaders of a process. Pixels stay bytes: normalization
// runs on the device in GatherNormalize, whose `data` is images(). On a GPU the loader registers
// that memory with the driver, or copies it to the device once, when it is made.
//
// Invariants:
//  1. At least one sample; images().size() == samples() * features().
//  2. 0 <= label < classes().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace lockstep::data {

struct SampleShape {
  int64_t height = 0, width = 0, channels = 0;
  int64_t features() const { return height * width * channels; }
  friend bool operator==(const SampleShape&, const SampleShape&) = default;
};

class Dataset {
 public:
  // `images` {samples, height, width, channels}; the caller has checked the invariants.
  Dataset(const SampleShape& shape, int64_t classes, std::vector<uint8_t> images,
          std::vector<int32_t> labels);

  int64_t samples() const { return static_cast<int64_t>(labels_.size()); }
  int64_t features() const { return shape_.features(); }
  const SampleShape& shape() const { return shape_; }
  int64_t classes() const { return classes_; }
  const uint8_t* images() const { return images_.data(); }  // contiguous {n, h, w, c}
  const int32_t* labels() const { return labels_.data(); }

  // SHA-256 in hex over "n h w c\n", the images, and the labels as little-endian int32.
  const std::string& digest() const { return digest_; }

 private:
  const SampleShape shape_;
  const int64_t classes_;
  const std::vector<uint8_t> images_;
  const std::vector<int32_t> labels_;
  const std::string digest_;
};

// One digest of the two sets a job uses; what workers compare when it starts.
std::string CombinedDigest(const Dataset& train, const Dataset& validation);

}  // namespace lockstep::data
