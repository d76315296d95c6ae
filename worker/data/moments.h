// Mean and standard deviation of each channel of a data set, computed exactly once: whoever
// computes them gets the same bits, and a file named after the set's digest spares everybody else
// the pass.
//
// Bytes are summed as integers, floats in double with a fixed order (Chan, Golub & LeVeque 1979:
// moments of each sample, merged in index order). Thread-safe.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/fs.h"
#include "worker/data/dataset.h"

namespace lockstep::data {

struct ChannelMoments {
  std::vector<double> mean, std;  // of byte / 255, or of the floats; std with divisor n
  bool cached = false;            // they were read, not computed
};

// `cache_folder` is made where it is missing; "": no cache. A damaged file is computed anew, and
// one that cannot be written is done without. InvalidArgument: a channel that does not vary.
absl::StatusOr<ChannelMoments> ComputeMoments(FileSystem& fs, const std::string& cache_folder,
                                              const Dataset& set);

// LOCKSTEP_CACHE, else XDG_CACHE_HOME/lockstep, else HOME/.cache/lockstep, else "".
std::string CacheFolder();

}  // namespace lockstep::data
