// Reader of pairs of NPY files (NumPy Enhancement Proposal 1, versions 1 and 2): features, of which
// the first dimension counts samples, and labels. Features are mapped into memory, not read: the
// set may be larger than memory, and what is not used is not loaded (it is read once when the job
// starts, for its digest).
//
// Nothing in a file is believed before it is checked. Thread-safe: pure functions. The files must
// stay as they are while the set lives.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

struct NpyOptions {
  std::string features, labels;  // paths
  // Of one sample: the array's further dimensions, where those of size 1 do not count.
  SampleShape shape;
  int64_t classes = 10;
  Split split = Split::kTrain;
  int64_t max_samples = 0;  // use the first n only; 0: all
};

// Features are uint8 or float32, labels integers of any size; both little-endian and in C order.
// Errors, each one line naming the file (and for a label the row, from 0):
//   NotFound         a file is missing
//   InvalidArgument  another type, order or shape; max_samples beyond the samples there are
//   DataLoss         no NPY header, truncated file, bytes after the end, no samples, unequal
//   counts,
//                    label out of range
absl::StatusOr<std::shared_ptr<const Dataset>> LoadNpy(FileSystem& fs, const NpyOptions& options);

}  // namespace lockstep::data
