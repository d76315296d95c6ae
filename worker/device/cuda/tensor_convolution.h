// What the kernels of bf16 convolutions for y and dx have in common: the order of terms, where a
// tile's pieces stand, and how its sums are written. tensor_convolution.cu says the order.
#pragma once

#include <cstdint>

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {

// Terms come in quads of channels: those of the taps of a block of at most kDepth channels, then of
// the next block, so that a block's pixels are read again while they are near. Channels that are
// not by fours come one by one.
struct Terms {
  int groups, channels, features;  // of a group
  int quads;                       // of a block, 1 << shift; 0: one by one
  int shift;
  int slots, slot_taps;  // sets of taps that phases meet, and their size, along each dimension
  int steps;             // rows of terms in a slot
  int padded;            // features of a group, to whole tiles
  Divisor by_channels;
  int64_t slot_bytes() const { return int64_t{steps} * padded * kRowBytes; }
};

// In a tile's row of kRowBytes, where its 16-byte pieces stand: eight rows of one piece, which an
// instruction loads, are in different banks.
__device__ __forceinline__ int PieceAt(int row, int piece) { return piece ^ (row >> 1 & 3); }

// Of place `index` of a phase that has `all`: its window's begin in the source, the taps that are
// inside, its begin in the result (below 0: it is none).
__device__ __forceinline__ int4 LookUp(const Windows& s, const Axis& axis_y, const Axis& axis_x,
                                       int phase_y, int phase_x, int all, int index) {
  int4 place = make_int4(0, 0, -1, 0);
  uint32_t at = static_cast<uint32_t>(index);
  if (index < all) {
    const int x = static_cast<int>(at % static_cast<uint32_t>(axis_x.count));
    at /= static_cast<uint32_t>(axis_x.count);
    const int y = static_cast<int>(at % static_cast<uint32_t>(axis_y.count));
    const int row = static_cast<int>(at / static_cast<uint32_t>(axis_y.count));
    const int from_y = y * axis_y.scale + axis_y.begin, from_x = x * axis_x.scale + axis_x.begin;
    place.x = ((row * s.source_height + from_y) * s.source_width + from_x) * s.channels;
    for (int tap = 0; tap < axis_y.taps; ++tap) {
      const bool inside =
          static_cast<unsigned>(from_y + tap * s.tap_move) < static_cast<unsigned>(s.source_height);
      place.y |= inside ? 1 << tap : 0;
    }
    for (int tap = 0; tap < axis_x.taps; ++tap) {
      const bool inside =
          static_cast<unsigned>(from_x + tap * s.tap_move) < static_cast<unsigned>(s.source_width);
      place.y |= inside ? 1 << (tap + 16) : 0;
    }
    place.z =
        ((row * s.height + y * s.phases + phase_y) * s.width + x * s.phases + phase_x) * s.features;
  }
  return place;
}

// Writes a warp's sums with bias and relu. first_feature is of the group; element(row) is where a
// row of the warp's begins in the result, below 0 where it is none.
template <int kTilesDown, int kTilesAcross, class Element>
__device__ __forceinline__ void Finish(const Windows& s, const Terms& terms, int group,
                                       int first_feature, const float* __restrict__ bias, bool relu,
                                       void* __restrict__ result,
                                       const float (&sums)[kTilesDown][2 * kTilesAcross][4],
                                       Element element) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // A lane has four neighbours of two rows in each pair of products.
#pragma unroll
  for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = element(i * 16 + half * 8 + lane / 4);
      if (at < 0) continue;
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        const int feature = first_feature + j * 16 + lane % 4 * 4;
        const int left = terms.features - feature;
        const int column = group * terms.features + feature;
        float v[4] = {sums[i][2 * j][2 * half], sums[i][2 * j][2 * half + 1],
                      sums[i][2 * j + 1][2 * half], sums[i][2 * j + 1][2 * half + 1]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (bias != nullptr && n < left) v[n] = v[n] + __ldg(bias + column + n);
          if (relu) v[n] = Relu(v[n]);
        }
        const float4 four = make_float4(v[0], v[1], v[2], v[3]);
        if (s.result_type == ElementType::kBf16) {
          StoreFour(static_cast<StoredBf16*>(result) + (at + column), s.wide_result, left, four);
        } else {
          StoreFour(static_cast<float*>(result) + (at + column), s.wide_result, left, four);
        }
      }
    }
  }
}

// ---- the same by warpgroups (warpgroup.h).

// Features stand in the weights' rows so that a lane has eight neighbours of its sums, 16 bytes.
__device__ __forceinline__ int RowOfFeature(int feature) {
  const int own = feature % 32;
  return feature - own + own % 8 / 2 * 8 + own / 8 * 2 + own % 2;
}

// Writes a lane's sums of a place, which begins at `at` in the result: those of one half.
template <int kTiles>
__device__ __forceinline__ void FinishPlace(const Windows& s, int first_feature,
                                            const float* __restrict__ bias, bool relu,
                                            void* __restrict__ result,
                                            const float (&sums)[kTiles][4], int half, int at) {
#pragma unroll
  for (int j = 0; j < kTiles; j += 4) {
    const int feature = first_feature + j * 8 + static_cast<int>(threadIdx.x) % 4 * 8;
    float v[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      v[n] = sums[j + n / 2][2 * half + n % 2];
      if (bias != nullptr) v[n] = v[n] + __ldg(bias + feature + n);
      if (relu) v[n] = Relu(v[n]);
    }
    const float4 low = make_float4(v[0], v[1], v[2], v[3]);
    const float4 high = make_float4(v[4], v[5], v[6], v[7]);
    if (s.result_type == ElementType::kFp32) {
      float* const to = static_cast<float*>(result) + (at + feature);
      StoreFour(to, s.wide_result, 4, low);
      StoreFour(to + 4, s.wide_result, 4, high);
      continue;
    }
    StoredBf16* const to = static_cast<StoredBf16*>(result) + (at + feature);
    if (s.wide_result) {
      *reinterpret_cast<uint4*>(to) = make_uint4(TwoBf16(v[0], v[1]), TwoBf16(v[2], v[3]),
                                                 TwoBf16(v[4], v[5]), TwoBf16(v[6], v[7]));
    } else {
      StoreFour(to, false, 4, low);
      StoreFour(to + 4, false, 4, high);
    }
  }
}

// ---- other ways.

// Convolutions that keep the size, by runs of pixels (tensor_runs.cu), in tiles of 16, 32, 64 or
// 128 features; of a source of T, float or StoredBf16, a block of whose channels fills kHalves
// halves of a row of terms. False, and nothing was launched: the shape does not go so.
template <class T, int kHalves>
bool LaunchRunsOf(int tile, const Queue& q, const Windows& s, const Terms& terms, bool backward,
                  const T* source, const uint4* weights, const float* bias, bool relu,
                  void* result);

// Convolutions by warpgroups (warpgroup_convolution.cu), whose bits are others: whether they take a
// shape depends on it and on this thread's GPU alone.
bool GoesByWarpgroups(const Windows& s, int64_t groups, ElementType source_type);
int64_t WarpgroupWeightBytes(const Windows& s);
void PackForWarpgroups(const Queue& q, const Windows& s, bool backward, const uint16_t* w,
                       void* packed);
void MultiplyAllByWarpgroups(const Queue& q, Windows s, bool backward, int64_t rows,
                             const StoredBf16* source, const uint4* weights, const float* bias,
                             bool relu, void* result);
// dx into another gradient: g = dx + more where `above` says so (Conv2d::BackwardInputInto), which
// may be `more`. False, and nothing was done: they do not lie on 16 bytes.
bool MultiplyAllIntoByWarpgroups(const Queue& q, Windows s, int64_t rows, const StoredBf16* source,
                                 const uint4* weights, const StoredBf16* more, const uint8_t* above,
                                 StoredBf16* g);
// The same of y of images, with a stride of 2 (warpgroup_stem.cu).
bool GoesAsStem(const Conv2dShape& s);
int64_t StemWeightBytes(const Conv2dShape& s);
void PackForStem(const Queue& q, const Conv2dShape& s, const uint16_t* w, void* packed);
void MultiplyAllOfStem(const Queue& q, Windows s, int64_t rows, const float* x,
                       const uint4* weights, const float* bias, bool relu, void* y);

}  // namespace lockstep::device::cuda
