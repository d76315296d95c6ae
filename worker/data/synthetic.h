// A made-up data set of any shape, for benchmarks and tests: a pure Philox function of (seed,
// index).
//
// Cheap however many samples there are: 16 MiB of random bytes and one sample more are made once,
// when the set is, and sample i is the window that begins at a random place of them, so that
// nothing is computed when it is drawn. Windows overlap, and labels are uniform and say nothing
// about the bytes: there is nothing to learn. Thread-safe: a pure function.
#pragma once

#include <cstdint>
#include <memory>

#include "worker/data/dataset.h"

namespace lockstep::data {

struct SyntheticOptions {
  SampleShape shape;
  int64_t classes = 10;
  Split split = Split::kTrain;  // other windows and labels, the same bytes
  int64_t samples = 0;
  uint64_t seed = 0;
};

// Its digest is that of the options: they say all that there is.
std::shared_ptr<const Dataset> MakeSynthetic(const SyntheticOptions& options);

}  // namespace lockstep::data
