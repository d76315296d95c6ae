// The folder of a local run: logs/, server/ (the coordinator's store), worker-<i>/, spec.yaml,
// metrics.csv, result.json, and what the workers write (checkpoints, digests.jsonl).
//
// Invariants:
//  1. One process uses a folder at a time (it is locked while this lives).
//  2. An earlier run that lies there is never overwritten: it is moved to <folder>.<number>, unless
//  this
//     run goes on from it.
// Not thread-safe.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace lockstep::client {

class RunFolder {
 public:
  // `path` empty: runs/<job>-<UTC time> below the current folder, with a number added where that
  // exists. `resume` is the run or checkpoint to go on from, or empty; absolute.
  // InvalidArgument: the folder is in use, or cannot be made.
  static absl::StatusOr<RunFolder> Open(const std::string& path, const std::string& job_name,
                                        const std::string& resume, absl::Time now);
  RunFolder(RunFolder&& other) noexcept;
  RunFolder& operator=(RunFolder&&) = delete;
  ~RunFolder();

  const std::string& path() const { return path_; }  // absolute
  const std::string& moved() const {
    return moved_;
  }  // where an earlier run went; empty: there was none

 private:
  RunFolder(std::string path, std::string moved, int lock)
      : path_(std::move(path)), moved_(std::move(moved)), lock_(lock) {}

  std::string path_, moved_;
  int lock_ = -1;
};

}  // namespace lockstep::client
