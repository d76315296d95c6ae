#include "worker/data/sampler.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace lockstep::data {

uint64_t UniformBelow(PhiloxKey key, uint64_t index, uint64_t step, uint64_t bound) {
  using Wide = unsigned __int128;
  const uint64_t threshold = -bound % bound;  // 2^64 mod bound draws are one too many
  for (uint64_t attempt = 0;; ++attempt) {
    const PhiloxBlock block = Philox(key, attempt << 48 | index, step);
    for (int half = 0; half < 2; ++half) {
      const uint64_t bits = static_cast<uint64_t>(block.x[2 * half + 1]) << 32 | block.x[2 * half];
      const Wide product = static_cast<Wide>(bits) * bound;
      if (static_cast<uint64_t>(product) >= threshold) return static_cast<uint64_t>(product >> 64);
    }
  }
}

void FillPermutation(uint64_t seed, int64_t epoch, absl::Span<int64_t> order) {
  const PhiloxKey key = MakePhiloxKey(seed, "shuffle");
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[UniformBelow(key, i - 1, static_cast<uint64_t>(epoch), i)]);
  }
}

std::vector<int64_t> Permutation(uint64_t seed, int64_t epoch, int64_t size) {
  std::vector<int64_t> order(static_cast<size_t>(size));
  FillPermutation(seed, epoch, absl::MakeSpan(order));
  return order;
}

device::Augmentation MakeAugmentation(uint64_t seed, int64_t crop_padding, bool flip,
                                      int64_t cutout) {
  device::Augmentation augmentation;
  augmentation.crop_padding = crop_padding;
  augmentation.flip = flip;
  augmentation.cutout = cutout;
  augmentation.crop_key = MakePhiloxKey(seed, "augment/crop");
  augmentation.flip_key = MakePhiloxKey(seed, "augment/flip");
  augmentation.cutout_key = MakePhiloxKey(seed, "augment/cutout");
  return augmentation;
}

int64_t StepsPerEpoch(int64_t samples, int64_t batch) { return (samples + batch - 1) / batch; }

BatchRange RangeOfStep(int64_t step, int64_t samples, int64_t batch) {
  const int64_t per_epoch = StepsPerEpoch(samples, batch);
  const int64_t first = (step - 1) % per_epoch * batch;
  return {(step - 1) / per_epoch + 1, first, std::min(batch, samples - first)};
}

ShardRange RangeOfShard(int64_t batch, int64_t shards, int64_t actual, int64_t shard) {
  const int64_t base = batch / shards, larger = batch % shards;
  const int64_t first = shard * base + std::min(shard, larger);
  const int64_t full = base + (shard < larger ? 1 : 0);
  return {std::min(first, actual), std::clamp<int64_t>(actual - first, 0, full)};
}

ShardRange RangeOfMicrobatch(const BatchCut& cut, int64_t actual, int64_t shard,
                             int64_t microbatch) {
  const int64_t full = RangeOfShard(cut.batch, cut.shards, cut.batch, shard).count;
  const int64_t rows = RangeOfShard(cut.batch, cut.shards, actual, shard).count;
  return RangeOfShard(full, cut.microbatches, rows, microbatch);
}

std::vector<int64_t> RowCounts(int64_t samples, const BatchCut& cut, int64_t first_shard,
                               int64_t last_shard) {
  std::vector<int64_t> counts;
  // Only the last batch differs from the others.
  for (const int64_t actual : {std::min(cut.batch, samples), (samples - 1) % cut.batch + 1}) {
    for (int64_t shard = first_shard; shard < last_shard; ++shard) {
      for (int64_t microbatch = 0; microbatch < cut.microbatches; ++microbatch) {
        const int64_t count = RangeOfMicrobatch(cut, actual, shard, microbatch).count;
        if (count > 0) counts.push_back(count);
      }
    }
  }
  std::sort(counts.begin(), counts.end());
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  return counts;
}

}  // namespace lockstep::data
