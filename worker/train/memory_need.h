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
  std::vector<int> bounds;  // slot i of the member has shards [bounds[i], bounds[i + 1])
};

// And what stays.
struct MemoryFacts {
  const nn::Program* program = nullptr;
  int64_t samples = 0, evaluation_samples = 0;  // of the data sets
  int optimizer_vectors = 0;                    // of the parameters' size
  int slots = 1, members = 1;                   // of this member; of the job
  bool training = true;
  bool exchanges_on_gpu = false;  // members' gradients go over NCCL
  int64_t stream_bytes = 0;
  int64_t sample_bytes = 0;  // as the data set has it
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
  int64_t behind_data = 0;  // bytes of them that are allocated when the data's loaders are made
  int64_t staging = 0;      // beyond them, where the data set does not fit beside them
};

// Every number of rows that a shard can have, ascending, for nn::Operations; the rows of the
// largest in training, in evaluation, and of the probe, which is the same on every member.
struct Rows {
  std::vector<int64_t> all;
  int64_t training = 0, evaluation = 0, probe = 0;
};
Rows RowsOf(const JobCut& cut, int64_t samples, int64_t evaluation_samples);

absl::StatusOr<MemoryNeed> NeedOf(const JobCut& cut, const MemoryFacts& facts);

// "train.batch=448 (now 512), train.shards=4 (now 8), or 2 workers of a GPU each": each by itself
// fits into `free`, with something to spare, and is the nearest to what is now. Empty: none does.
std::string WhatFits(const JobCut& cut, const MemoryFacts& facts, int64_t free);

// "1.25 GiB".
std::string SizeText(int64_t bytes);

}  // namespace lockstep::train
