// How much memory of a GPU a member of a job needs, part by part, and what of its spec would fit
// into less: so that a job that cannot run is refused before it begins, with advice that holds.
//
// Counted is what is allocated at the same time, from when the operations exist; not what CUDA,
// NCCL and other libraries take for themselves, nor a copy of the data set, which is made only
// where there is room. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/nn/program.h"

namespace lockstep::train {

// Of a job, what decides about memory and can be changed.
struct JobCut {
  int64_t batch = 0, evaluation_batch = 0;
  int shards = 1, accumulate = 1;
  // Slot i of member m has shards [members[m][i], members[m][i + 1]).
  std::vector<std::vector<int>> members;
  int rank = 0;  // of the member whose memory it is
  const std::vector<int>& bounds() const { return members[rank]; }
};

// And what stays.
struct MemoryFacts {
  const nn::Program* program = nullptr;
  int64_t samples = 0, evaluation_samples = 0;  // of the data sets
  int optimizer_vectors = 0;                    // of the parameters' size
  bool training = true;
  bool exchanges_on_gpu = false;  // members' gradients go over NCCL
  int64_t stream_bytes = 0;
  int64_t data_bytes = 0;  // of the training set
  // Operations::scratch_bytes of those for these rows and shards of a slot.
  std::function<absl::StatusOr<int64_t>(const std::vector<int64_t>& rows, int most_shards)> scratch;
};

struct MemoryNeed {
  struct Part {
    std::string what;  // "the plan of slot 0: activations of 8 shards (512 samples at once)"
    int64_t bytes = 0;
  };
  std::vector<Part> parts;  // the largest first
  int64_t total = 0;
  int64_t stepping = 0;     // of the total, while steps are computed: without the probe
  int64_t behind_data = 0;  // bytes of them that are allocated when the data's loaders are made
  int64_t staging = 0;      // of batches as the data set has them, where it is not on the GPU
};

// Every number of rows that a shard can have, ascending, for nn::Operations; the rows of the
// largest in training, in evaluation, and of the probe, which is the same on every member.
struct Rows {
  std::vector<int64_t> all;
  int64_t training = 0, evaluation = 0, probe = 0;
};
Rows RowsOf(const JobCut& cut, int64_t samples, int64_t evaluation_samples);

// `staged`: with the staging.
absl::StatusOr<MemoryNeed> NeedOf(const JobCut& cut, const MemoryFacts& facts, bool staged);
// Staged where the data set will not be copied beside the rest in `free` bytes. The job fits where
// this total does.
absl::StatusOr<MemoryNeed> NeedWithin(const JobCut& cut, const MemoryFacts& facts, int64_t free);

// "train.batch=448 (now 512), train.shards=4 (now 8), or 2 workers with a GPU each": with each by
// itself, every member fits into `free`, and it is the nearest to what is now. Where nothing fits
// by itself, both more workers and a smaller batch. Empty: nothing does.
std::string WhatFits(const JobCut& cut, const MemoryFacts& facts, int64_t free);

// "1.25 GiB".
std::string SizeText(int64_t bytes);

}  // namespace lockstep::train
