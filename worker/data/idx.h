// Reader of IDX, the format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist): a magic
// number, big-endian sizes, bytes. Files are plain or gzipped.
//
// Nothing in a file is believed before it is checked: sizes are compared with the bytes there are
// before memory is taken for them. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

struct IdxOptions {
  std::string folder;
  SampleShape shape;  // of one sample; one channel is read from idx3 files, more from idx4
  int64_t classes = 10;
  Split split = Split::kTrain;
  int64_t max_samples = 0;  // use the first n only; 0: all
};

// Reads {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, with '-' or '.' before
// "idx", plain or with .gz (in this order where several are there). Errors, each one line naming
// the file (and for a label the row, from 0):
//   NotFound            folder or file is missing
//   InvalidArgument     max_samples beyond the samples there are, shape that is not the file's
//   DataLoss            corrupt or truncated gzip, wrong magic, truncated file, bytes after the
//   end,
//                       no samples, sizes that cannot be, unequal counts, label out of range
//   ResourceExhausted   more than 64 GiB of pixels
absl::StatusOr<std::shared_ptr<const Dataset>> LoadIdx(FileSystem& fs, const IdxOptions& options);

}  // namespace lockstep::data
