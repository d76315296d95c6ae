// What passes over flat vectors add up on their way: the canonical tree over parts
// (worker/collective/tree.h), an element at a time, and the squares of a block of the norm.
// Thread-safe: functions of their arguments.
#pragma once

#include <algorithm>
#include <cstdint>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

// ---- the canonical tree.

struct TreeParts {
  const float* at[kMostParts];
};

template <int kLanes>
__device__ __forceinline__ Lanes<kLanes> operator+(const Lanes<kLanes>& a, const Lanes<kLanes>& b) {
  Lanes<kLanes> sum;
#pragma unroll
  for (int v = 0; v < kLanes; ++v) sum.at[v] = a.at[v] + b.at[v];
  return sum;
}

// Of kParts parts, a power of two, from the first on.
template <int kLanes, int kParts>
__device__ __forceinline__ Lanes<kLanes> FullTree(const float* const* parts, int64_t i) {
  if constexpr (kParts == 1) {
    return LoadLanes<kLanes>(parts[0] + i);
  } else {
    const Lanes<kLanes> left = FullTree<kLanes, kParts / 2>(parts, i);
    return left + FullTree<kLanes, kParts / 2>(parts + kParts / 2, i);
  }
}

// kTail = parts % 8. A tree of n leaves is the full tree of the largest power of two in n, plus the
// tree of the rest; full trees of eight are counted up in binary.
template <int kLanes, int kTail>
__device__ __forceinline__ Lanes<kLanes> Tree(const TreeParts& parts, int eights, int64_t i) {
  Lanes<kLanes> one = {}, two = {}, four = {};  // so many eights
  Lanes<kLanes> sum = {};
  for (int e = 0; e < eights; ++e) {
    sum = FullTree<kLanes, 8>(parts.at + 8 * e, i);
    if (e % 2 == 0) {
      one = sum;
      continue;
    }
    sum = one + sum;
    if (e / 2 % 2 == 0) {
      two = sum;
      continue;
    }
    sum = two + sum;
    if (e / 4 % 2 == 0) {
      four = sum;
      continue;
    }
    sum = four + sum;  // all kMostParts
  }
  if (kTail == 0 && (eights & (eights - 1)) == 0) return sum;
  const float* const* rest = parts.at + 8 * eights;
  bool any = kTail > 0;
  if constexpr (kTail == 1) sum = FullTree<kLanes, 1>(rest, i);
  if constexpr (kTail == 2) sum = FullTree<kLanes, 2>(rest, i);
  if constexpr (kTail == 3) {
    sum = FullTree<kLanes, 2>(rest, i) + FullTree<kLanes, 1>(rest + 2, i);
  }
  if constexpr (kTail == 4) sum = FullTree<kLanes, 4>(rest, i);
  if constexpr (kTail == 5) {
    sum = FullTree<kLanes, 4>(rest, i) + FullTree<kLanes, 1>(rest + 4, i);
  }
  if constexpr (kTail == 6) {
    sum = FullTree<kLanes, 4>(rest, i) + FullTree<kLanes, 2>(rest + 4, i);
  }
  if constexpr (kTail == 7) {
    sum = FullTree<kLanes, 4>(rest, i) +
          (FullTree<kLanes, 2>(rest + 4, i) + FullTree<kLanes, 1>(rest + 6, i));
  }
  if (eights & 1) sum = any ? one + sum : one, any = true;
  if (eights & 2) sum = any ? two + sum : two, any = true;
  if (eights & 4) sum = any ? four + sum : four;
  return sum;
}

// Calls run with the tail of so many parts, and them.
template <class Run>
void WithTree(const float* const* parts, int count, const Run& run) {
  TreeParts all = {};
  std::copy(parts, parts + count, all.at);
  switch (count % 8) {
    case 0:
      return run.template operator()<0>(all);
    case 1:
      return run.template operator()<1>(all);
    case 2:
      return run.template operator()<2>(all);
    case 3:
      return run.template operator()<3>(all);
    case 4:
      return run.template operator()<4>(all);
    case 5:
      return run.template operator()<5>(all);
    case 6:
      return run.template operator()<6>(all);
    case 7:
      return run.template operator()<7>(all);
  }
}

// ---- squares.

constexpr int kSquaresThreads = 256;  // that add up a block

// The sum of element(i)^2 over the kNormBlock elements of a block, those that it lacks as zeros;
// valid in thread 0. All threads of the block call it, of which the first kSquaresThreads add:
// thread t elements t, t + kSquaresThreads, ..., then the tree over threads that halves them.
// `shared` has kSquaresThreads places.
template <class Element>
__device__ __forceinline__ double SumOfSquares(const Element& element, double* shared) {
  constexpr int kEach = kNormBlock / kSquaresThreads;
  constexpr int kWarps = kSquaresThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kSquaresThreads) {
    float value[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) value[k] = element(thread + k * kSquaresThreads);
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const double wide = static_cast<double>(value[k]);
      sum = __builtin_fma(wide, wide, sum);
    }
    shared[thread] = sum;
  }
  __syncthreads();
  if (thread >= kWarp) return 0;
  double sum[kWarps];
#pragma unroll
  for (int k = 0; k < kWarps; ++k) sum[k] = shared[thread + k * kWarp];
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) sum[k] += sum[k + half];
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sum[0] += __shfl_down_sync(0xffffffffu, sum[0], static_cast<unsigned>(half));
  }
  return sum[0];
}

}  // namespace lockstep::device::cuda
