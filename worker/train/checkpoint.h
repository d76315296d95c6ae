// Checkpoints: a folder per saved step with the state and everything needed to go on or to check
// it.
//
//   <run>/checkpoints/step-00000123/model.safetensors   every tensor of the state, fp32
//                                   manifest.json       CheckpointManifest in its JSON mapping
//
// A checkpoint is written under a hidden name, every file synced, the folder synced, renamed, and
// the parent synced; so after a crash at any point a step-N folder is complete. Whoever loads one
// verifies the SHA-256 and size of every file, of the manifest too, and never takes a damaged one.
//
// Readers change nothing, and may run while a job writes. One writer per folder. The file system
// outlives writers. Tensor names and layouts: see README.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/fs.h"
#include "lockstep/v1/checkpoint.pb.h"
#include "lockstep/v1/job.pb.h"

namespace lockstep::train {

struct CheckpointTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;  // row-major
};

// A copy of the state at one step. The writer adds the manifest's files and checksum.
struct CheckpointSnapshot {
  v1::CheckpointManifest manifest;
  std::vector<CheckpointTensor> tensors;
};

// Writes, replaces and retires the checkpoints of one folder. Not thread-safe.
class CheckpointStore {
 public:
  // `keep`: how many of the newest stay, at least 1; the one just written always stays.
  CheckpointStore(FileSystem& fs, std::string folder, int keep);

  // Durable when it returns. The first call clears away what a crashed writer left behind. An equal
  // step that is there already is replaced. On failure the folder is as it was before.
  // ResourceExhausted: the disk is full.
  absl::StatusOr<v1::CheckpointInfo> Write(const CheckpointSnapshot& snapshot);

 private:
  absl::Status ClearLeftovers();
  absl::Status WriteFiles(const CheckpointSnapshot& snapshot, const std::string& folder,
                          v1::CheckpointInfo* info);
  absl::Status Publish(int64_t step, const std::string& temporary);
  absl::Status Retire(int64_t just_written);
  std::string PathOf(const std::string& prefix, int64_t step) const;

  FileSystem& fs_;
  const std::string folder_;
  const int keep_;
  bool cleared_ = false;
};

// Writes in the background, one checkpoint at a time. Thread-safe.
class CheckpointWriter {
 public:
  struct Options {
    std::string folder;  // made where it is missing
    int keep = 3;
    // Called on the writer's thread after each durable checkpoint; must not call back. May be
    // empty.
    std::function<void(const v1::CheckpointInfo&)> written;
  };
  CheckpointWriter(FileSystem& fs, Options options);
  ~CheckpointWriter();  // finishes
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Takes the snapshot; waits while another is being written. The failure of an earlier one, and
  // then of every later call.
  absl::Status Start(CheckpointSnapshot snapshot);
  // Waits for what is being written; the first failure there was.
  absl::Status Finish();

 private:
  void Run();

  CheckpointStore store_;  // of the writer's thread alone
  const Options options_;
  absl::Mutex mutex_;
  std::optional<CheckpointSnapshot> pending_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

struct FoundCheckpoint {
  std::string path;
  v1::CheckpointManifest manifest;
  std::vector<std::string>
      notes;  // one line for each newer one that is damaged, naming what is wrong
};

// The newest checkpoint whose every byte is verified, in a run's folder (that holds checkpoints/),
// a folder of checkpoints, or the one checkpoint that `folder` itself is (then no other is tried).
// NotFound: there is none. DataLoss: all there are, are damaged; says how.
absl::StatusOr<FoundCheckpoint> FindNewestCheckpoint(FileSystem& fs, const std::string& folder);

struct CheckpointTensorSpec {
  std::string name;
  std::vector<int64_t> shape;
};

struct LoadedCheckpoint {
  std::string path;
  v1::CheckpointManifest manifest;
  std::vector<std::string> notes;
  std::vector<std::vector<float>> tensors;  // in the order expected
};

// FindNewestCheckpoint, then its tensors. FailedPrecondition: it does not hold exactly the tensors
// that are expected, with these shapes (another model or optimizer); names the first difference.
absl::StatusOr<LoadedCheckpoint> LoadNewestCheckpoint(
    FileSystem& fs, const std::string& folder, absl::Span<const CheckpointTensorSpec> expected);

}  // namespace lockstep::train
