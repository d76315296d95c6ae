// Moments of leaves merged by the canonical tree (worker/collective/tree.h), a channel a thread.
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 128;

struct Record {
  int64_t count;
  float mean, m2;
};

__device__ __forceinline__ Record Merge(const Record& a, const Record& b) {
  Record out = {a.count + b.count, 0, 0};
  const double count_a = static_cast<double>(a.count), count_b = static_cast<double>(b.count);
  MergeChannel(count_b / (count_a + count_b), count_a * count_b / (count_a + count_b), a.mean, a.m2,
               b.mean, b.m2, out.mean, out.m2);
  return out;
}

// Of the channel that mean and m2 point to, by a binary counter: subtrees of 1, 2, 4, ... leaves.
__device__ __forceinline__ Record MergeTree(const Leaves& leaves, int64_t spatial,
                                            const float* mean, const float* m2, int64_t stride) {
  constexpr int kDepth = 6;  // of kMostLeaves = 32
  static_assert(kMostLeaves <= 1 << (kDepth - 1));
  Record waiting[kDepth] = {};
  float next_mean = mean[0], next_m2 = m2[0];
  for (int l = 0; l < leaves.count; ++l) {
    Record record = {(leaves.begin[l + 1] - leaves.begin[l]) * spatial, next_mean, next_m2};
    if (l + 1 < leaves.count) {  // on their way while this one is merged
      next_mean = mean[(l + 1) * stride];
      next_m2 = m2[(l + 1) * stride];
    }
    bool carry = true;
#pragma unroll
    for (int level = 0; level < kDepth; ++level) {
      if (!carry) continue;
      if ((l >> level & 1) != 0) {
        record = Merge(waiting[level], record);
      } else {
        waiting[level] = record;
        carry = false;
      }
    }
  }
  // What waits, from the smallest subtree, which is the last, to the largest.
  Record sum = {};
  bool any = false;
#pragma unroll
  for (int level = 0; level < kDepth; ++level) {
    if ((leaves.count >> level & 1) == 0) continue;
    sum = any ? Merge(waiting[level], sum) : waiting[level];
    any = true;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    MergeLeaves(int64_t channels, Leaves leaves, const float* mean, const float* m2, int64_t stride,
                float* merged_mean, float* merged_m2) {
  WaitForPrevious();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  const Record record = MergeTree(leaves, 1, mean + c, m2 + c, stride);
  merged_mean[c] = record.mean;
  merged_m2[c] = record.m2;
}

__global__ void __launch_bounds__(kThreads)
    MergeAll(const StatisticsSlice* slices, Leaves leaves, const float* records, int64_t stride,
             float* merged) {
  WaitForPrevious();
  const StatisticsSlice s = slices[blockIdx.y];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= s.channels) return;
  const float* mean = records + s.offset + c;
  const Record record = MergeTree(leaves, s.spatial, mean, mean + s.channels, stride);
  merged[s.offset + c] = record.mean;
  merged[s.offset + s.channels + c] = record.m2;
}

__global__ void __launch_bounds__(kThreads)
    UpdateAll(const StatisticsSlice* slices, int64_t rows, const float* merged,
              const StepScalars* scalars, float* statistics) {
  WaitForPrevious();
  const StatisticsSlice s = slices[blockIdx.y];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= s.channels || scalars->apply == 0) return;
  const float* mean = merged + s.offset + c;
  UpdateRunningAverage(rows * s.spatial, mean[0], mean[s.channels], s.momentum,
                       statistics[s.running_mean + c], statistics[s.running_var + c]);
}

unsigned Blocks(int64_t channels) { return static_cast<unsigned>(CeilDiv(channels, kThreads)); }

}  // namespace

void MergeLeafMoments(const Queue& q, int64_t channels, const Leaves& leaves, const float* mean,
                      const float* m2, int64_t stride, float* merged_mean, float* merged_m2) {
  Launch(q, dim3(Blocks(channels)), dim3(kThreads), 0, MergeLeaves, channels, leaves, mean, m2,
         stride, merged_mean, merged_m2);
}

void MergeStatistics(const Queue& q, int64_t count, const StatisticsSlice* slices,
                     int64_t most_channels, const Leaves& leaves, const float* records,
                     int64_t stride, float* merged) {
  if (count == 0) return;
  Launch(q, dim3(Blocks(most_channels), static_cast<unsigned>(count)), dim3(kThreads), 0, MergeAll,
         slices, leaves, records, stride, merged);
}

void UpdateStatistics(const Queue& q, int64_t count, const StatisticsSlice* slices,
                      int64_t most_channels, int64_t rows, const float* merged,
                      const StepScalars* scalars, float* statistics) {
  if (count == 0) return;
  Launch(q, dim3(Blocks(most_channels), static_cast<unsigned>(count)), dim3(kThreads), 0, UpdateAll,
         slices, rows, merged, scalars, statistics);
}

}  // namespace lockstep::device::cuda
