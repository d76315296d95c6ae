// Which samples a step sees, and which of them belong to which shard: pure functions, so that every
// worker knows without asking, and a resumed job goes on exactly where it was (DESIGN section 1).
// Steps and epochs count from 1, samples, batch positions and shards from 0. Thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/philox.h"
#include "worker/device/kernel_types.h"

namespace lockstep::data {

// Fills `order` with a uniform permutation of 0..order.size()-1, a function of (seed, epoch, size):
// Fisher-Yates (Durstenfeld, CACM 1964), each draw from its own Philox counter.
void FillPermutation(uint64_t seed, int64_t epoch, absl::Span<int64_t> order);
std::vector<int64_t> Permutation(uint64_t seed, int64_t epoch, int64_t size);

// Uniform on [0, bound), bound >= 1, without bias: Lemire, "Fast random integer generation in an
// interval" (TOMACS 2019), on 64 bits. Draw number `index` of the stream (key, step); index < 2^48.
uint64_t UniformBelow(PhiloxKey key, uint64_t index, uint64_t step, uint64_t bound);

// Batches of an epoch: ceil(samples / batch); the last may be short.
int64_t StepsPerEpoch(int64_t samples, int64_t batch);

// The keys of a job's augmentation.
device::Augmentation MakeAugmentation(uint64_t seed, int64_t crop_padding, bool flip,
                                      int64_t cutout);

struct BatchRange {
  int64_t epoch = 0;  // from 1
  int64_t first = 0;  // position in the epoch's order of the batch's first sample
  int64_t count = 0;  // samples, 1..batch
};
BatchRange RangeOfStep(int64_t step, int64_t samples, int64_t batch);

// Positions within a batch.
struct ShardRange {
  int64_t first = 0;
  int64_t count = 0;
  friend bool operator==(const ShardRange&, const ShardRange&) = default;
};
// Of a full batch the first batch % shards shards have ceil(batch / shards) samples, the others
// floor. A batch of `actual` <= batch samples fills the same shards in order: full ones, at most
// one partial, the rest empty. Requires 0 <= shard < shards; with more shards than samples the last
// are always empty.
ShardRange RangeOfShard(int64_t batch, int64_t shards, int64_t actual, int64_t shard);

// How a batch is cut: into shards, and each of those in the same way into microbatches.
struct BatchCut {
  int64_t batch = 0, shards = 1, microbatches = 1;
};
// Positions within the shard.
ShardRange RangeOfMicrobatch(const BatchCut& cut, int64_t actual, int64_t shard,
                             int64_t microbatch);

// Every number of rows above 0 that a microbatch of one of the shards [first_shard, last_shard) can
// have while batches of `samples` samples are walked through, ascending: what prepared operations
// must be made for.
std::vector<int64_t> RowCounts(int64_t samples, const BatchCut& cut, int64_t first_shard,
                               int64_t last_shard);

}  // namespace lockstep::data
