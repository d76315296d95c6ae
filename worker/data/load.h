// The one place where a data set is loaded, whatever its format.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

enum class Format { kIdx, kCifar10, kNpy, kSynthetic };

// spec.data, resolved on this host.
struct DataOptions {
  Format format = Format::kIdx;
  std::string folder;  // of files
  // npy: names below the folder, or absolute paths.
  std::string train_features, train_labels, validation_features, validation_labels;
  SampleShape shape;
  int64_t classes = 10;
  int64_t train_samples = 0, validation_samples = 0;  // use the first n only; 0: all
  int64_t batch = 0;                                  // of training
  uint64_t seed = 0;                                  // of the job, for synthetic
};

// The errors of the format's reader; InvalidArgument where the training set is smaller than one
// batch. Thread-safe.
absl::StatusOr<std::shared_ptr<const Dataset>> LoadDataset(FileSystem& fs,
                                                           const DataOptions& options, Split split);

}  // namespace lockstep::data
