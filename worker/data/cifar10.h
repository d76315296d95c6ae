// Reader of CIFAR-10's official binary version (Krizhevsky 2009,
// https://www.cs.toronto.edu/~kriz/cifar.html): data_batch_1.bin to data_batch_5.bin and
// test_batch.bin, each 10,000 rows of one label byte and 3,072 pixel bytes, three planes of 32
// x 32. Files are plain, xz or gzip. The planes become {height, width, channels}.
//
// Nothing in a file is believed before it is checked. Thread-safe: pure functions; the batches of a
// split are decompressed in parallel.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

struct Cifar10Options {
  std::string folder;
  Split split = Split::kTrain;
  int64_t max_samples = 0;        // use, and read, the first n only; 0: all
  int64_t rows_per_file = 10000;  // fewer in tests
};

// Errors, each one line naming the file and, of a row, its number from 0:
//   NotFound            folder or file is missing
//   InvalidArgument     max_samples beyond the samples of the split
//   DataLoss            corrupt or truncated compression, truncated file, bytes after the last row,
//                       label above 9
absl::StatusOr<std::shared_ptr<const Dataset>> LoadCifar10(FileSystem& fs,
                                                           const Cifar10Options& options);

}  // namespace lockstep::data
