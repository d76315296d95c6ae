// y and dx of convolutions in bf16 on tensor cores, as products of matrices that are not written
// out (implicit GEMM): x and dy that are fp32 in memory are rounded on their way to shared memory;
// weights come as bf16. The next tile is on its way while warps multiply the present one.
//
// Order, which is all that bits depend on: an element's terms run over (block of channels, kh, kw,
// channel of the block), or over (kh, kw, channel) where channels are not by fours, as one chain of
// the instruction's products. Tiles do not matter, nor how many rows there are.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/tensor_convolution.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

// ---- the order of terms, and weights packed in it.

template <class Factor>
Terms TermsOf(const Windows& s, int64_t groups) {
  const int channels = static_cast<int>(s.channels / groups);
  const int features = static_cast<int>(s.features / groups);
  Terms terms = {static_cast<int>(groups), channels, features, 0, 0, 0, 0, 0, 0, Divisor(channels)};
  if (channels % 4 == 0) {
    terms.shift = BlockShiftOf<Factor>(channels);
    terms.quads = 1 << terms.shift;
  }
  terms.slots = std::min(s.kernel, s.tap_step);
  terms.slot_taps = static_cast<int>(CeilDiv(s.kernel, s.tap_step));
  const int64_t taps = int64_t{terms.slot_taps} * terms.slot_taps;
  terms.steps = static_cast<int>(CeilDiv(taps * channels, Factor::kDepth));
  terms.padded =
      static_cast<int>(RoundUp(features, terms.quads == 0 ? std::min(FeaturesOfTile(features), 64)
                                                          : FeaturesOfTile(features)));
  return terms;
}

// Features stand in packed rows so that a lane gets four neighbours of its sums in two products.
__device__ __forceinline__ int FeatureOfRow(int row) {
  const int column = row % 8;
  return row / 16 * 16 + column / 2 * 4 + column % 2 + row / 8 % 2 * 2;
}

// What PackWeights writes one or two of: {group, slot, step, row of a feature, term}.
struct Packed {
  Terms terms;
  bool backward;
  int tap_step;
  void* to;
};

template <class Factor>
__device__ __forceinline__ void PackQuad(const Packed& p, int kernel,
                                         const StoredBf16* __restrict__ w, int slot_of_group,
                                         uint32_t index) {
  const Terms& t = p.terms;
  const int slots = t.slots * t.slots;
  if (slot_of_group >= t.groups * slots) return;
  // Eight rows by eight quads: reads of either order are near each other, and so are writes.
  const int low = static_cast<int>(index % (8 * Factor::kQuads));
  const uint32_t high = index / (8 * Factor::kQuads), eights = static_cast<uint32_t>(t.padded) / 8;
  const int row = static_cast<int>(high % eights) * 8 + low % 8;
  const int step = static_cast<int>(high / eights), quad = low / 8;
  if (step >= t.steps) return;
  const int group = slot_of_group / slots, slot = slot_of_group % slots;
  const int first_y = slot / t.slots, first_x = slot % t.slots;
  const int taps_y = (kernel - first_y + p.tap_step - 1) / p.tap_step;
  const int taps_x = (kernel - first_x + p.tap_step - 1) / p.tap_step;
  const int feature = FeatureOfRow(row);
  const auto element = [&](int i) -> const StoredBf16* {
    int tap, channel;
    if (t.quads == 0) {
      const int term = step * Factor::kDepth + quad * 4 + i;
      tap = term / t.channels;
      channel = term % t.channels;
      if (tap >= taps_y * taps_x) channel = t.channels;
    } else {
      const int at = step * Factor::kQuads + quad;
      const int of_blocks = at >> t.shift;
      tap = of_blocks % (taps_y * taps_x);
      channel = ((of_blocks / (taps_y * taps_x) << t.shift) + (at & (t.quads - 1))) * 4 + i;
    }
    if (channel >= t.channels || feature >= t.features) return nullptr;
    const int y = first_y + tap / taps_x * p.tap_step, x = first_x + tap % taps_x * p.tap_step;
    // w {out, taps, in of a group}.
    const int64_t out = p.backward ? group * t.channels + channel : group * t.features + feature;
    const int in = p.backward ? feature : channel, ins = p.backward ? t.features : t.channels;
    return w + ((out * kernel + y) * kernel + x) * ins + in;
  };
  const int64_t at = (static_cast<int64_t>(slot_of_group) * t.steps + step) * t.padded + row;
  static_cast<typename Factor::Quad*>(p.to)[at * Factor::kQuads + quad] =
      Factor::Round(GatherFour<StoredBf16>(element));
}

template <class Factor>
__global__ void __launch_bounds__(256)
    PackWeights(Packed first, Packed second, int kernel, const StoredBf16* __restrict__ w) {
  WaitForPrevious();
  const uint32_t index = blockIdx.x * 256 + threadIdx.x;
  if (blockIdx.z == 0) {
    PackQuad<Factor>(first, kernel, w, static_cast<int>(blockIdx.y), index);
  } else {
    PackQuad<Factor>(second, kernel, w, static_cast<int>(blockIdx.y), index);
  }
}

// ---- y and dx.

template <int kPlaces, int kFeatures, int kDown, int kAcross>
struct WindowTile {
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kStage = (kPlaces + kFeatures) * kRowBytes;
  static constexpr size_t kBytes = 2 * kStage + kPlaces * sizeof(int4);
  // Of a multiprocessor: registers for so many.
  static constexpr int kBlocks = kFeatures >= 128 ? 2 : kFeatures >= 32 ? 3 : 4;
};

// A block of kDown x kAcross warps makes kPlaces x kFeatures. kFlat: terms one by one.
template <class Factor, class T, int kPlaces, int kFeatures, int kDown, int kAcross, bool kFlat>
__global__ void __launch_bounds__(WindowTile<kPlaces, kFeatures, kDown, kAcross>::kThreads,
                                  WindowTile<kPlaces, kFeatures, kDown, kAcross>::kBlocks)
    MultiplyWindows(Windows s, Terms terms, bool backward, const T* __restrict__ source,
                    const uint4* __restrict__ weights, const float* __restrict__ bias, bool relu,
                    void* __restrict__ result) {
  WaitForPrevious();
  using Tile = WindowTile<kPlaces, kFeatures, kDown, kAcross>;
  constexpr int kThreads = Tile::kThreads, kStage = Tile::kStage, kQuads = Factor::kQuads;
  constexpr int kRows = kPlaces * kQuads / kThreads;      // of the tile, that a thread loads from
  constexpr int kRowsApart = kThreads / kQuads;           // from one to the next
  constexpr int kPieces = kFeatures * 4;                  // of 16 bytes, of the weights' tile
  constexpr int kTilesDown = kPlaces / kDown / 16;        // of the instruction, of a warp
  constexpr int kTilesAcross = kFeatures / kAcross / 16;  // twice the instruction's
  static_assert(kRowsApart % 8 == 0 && kPlaces % kRowsApart == 0);
  char* const shared = SharedMemory<char>();
  int4* const places = reinterpret_cast<int4*>(shared + 2 * kStage);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  const int phase_y = static_cast<int>(blockIdx.y), phase_x = static_cast<int>(blockIdx.z);
  const Axis axis_y = backward ? AxisOf<true>(s, s.height, phase_y) : AxisOf<false>(s, s.height, 0);
  const Axis axis_x = backward ? AxisOf<true>(s, s.width, phase_x) : AxisOf<false>(s, s.width, 0);
  const int tiles_of_group = terms.padded / kFeatures;
  const int tiles_of_places = tiles_of_group * terms.groups;
  const int own_tile = static_cast<int>(blockIdx.x) % tiles_of_places;
  const int group = own_tile / tiles_of_group;
  const int first_feature = own_tile % tiles_of_group * kFeatures;  // of the group
  const int first_place = static_cast<int>(blockIdx.x) / tiles_of_places * kPlaces;
  const int all = s.rows * axis_y.count * axis_x.count;
  if (first_place >= all) return;
  source += group * terms.channels;

  for (int i = thread; i < kPlaces; i += kThreads) {
    places[i] = LookUp(s, axis_y, axis_x, phase_y, phase_x, all, first_place + i);
  }
  __syncthreads();

  const int taps = axis_y.taps * axis_x.taps;
  const int steps = (taps * terms.channels + Factor::kDepth - 1) / Factor::kDepth;
  const int slot = axis_y.first * terms.slots + axis_x.first;
  if (steps > 0) {
    weights += ((static_cast<int64_t>(group) * terms.slots * terms.slots + slot) * terms.steps *
                    terms.padded +
                first_feature) *
               4;
  }

  // This thread loads one quad of some rows, in each step.
  const int own_row = thread / kQuads, own_quad = thread % kQuads;
  int begin[kRows], inside[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int4 place = places[own_row + i * kRowsApart];
    begin[i] = place.x;
    inside[i] = place.y;
  }
  // Of the next step: the quad's tap and channel, or its first term.
  int tap_y = 0, tap_x = 0, channel = 0, term = own_quad * 4;
  const auto move_by = [&](int count) {  // of taps
    tap_x += count;
    while (tap_x >= axis_x.taps) {
      tap_x -= axis_x.taps;
      if (++tap_y < axis_y.taps) continue;
      tap_y = 0;
      channel += 4 << terms.shift;
    }
  };
  if (!kFlat && steps > 0) {
    channel = (own_quad & (terms.quads - 1)) * 4;
    move_by(own_quad >> terms.shift);
  }

  Four<T> next[kRows];
  const auto load_by = [&](auto is_wide) {
    if constexpr (kFlat) {
      int moves[4], bits[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t tap = static_cast<uint32_t>(term + j);
        const int c = static_cast<int>(terms.by_channels.TakeRemainder(tap));
        const int y = static_cast<int>(tap) / axis_x.taps;
        const int x = static_cast<int>(tap) - y * axis_x.taps;
        moves[j] = (y * s.source_width + x) * s.tap_move * s.channels + c;
        bits[j] = static_cast<int>(tap) < taps ? 1 << y | 1 << (x + 16) : -1;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        next[i] = GatherFour<T>([&](int j) {
          return (inside[i] & bits[j]) == bits[j] ? source + (begin[i] + moves[j]) : nullptr;
        });
      }
    } else {
      constexpr bool kWide = decltype(is_wide)::value;
      const int move = (tap_y * s.source_width + tap_x) * s.tap_move * s.channels + channel;
      const int bits = channel < terms.channels ? 1 << tap_y | 1 << (tap_x + 16) : -1;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        next[i] = LoadStored<kWide>(source + (begin[i] + move), (inside[i] & bits) == bits ? 4 : 0);
      }
    }
  };
  const auto load = [&](int step, char* stage) {
    char* const to = stage + kPlaces * kRowBytes;
    const uint4* const from = weights + static_cast<int64_t>(step) * terms.padded * 4;
#pragma unroll
    for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
      const int piece = thread + i * kThreads;
      if (kPieces % kThreads != 0 && piece >= kPieces) continue;
      CopyInBackground(to + (piece / 4 * 4 + PieceAt(piece / 4, piece % 4)) * 16, from + piece);
    }
    if (kFlat || !s.wide) {
      load_by(std::false_type());
    } else {
      load_by(std::true_type());
    }
    if constexpr (kFlat) {
      term += Factor::kDepth;
    } else {
      move_by(kQuads >> terms.shift);
    }
  };
  using Quad = typename Factor::Quad;
  const int own_bytes = own_quad * static_cast<int>(sizeof(Quad));
  const int store_at = own_row * kRowBytes + PieceAt(own_row, own_bytes / 16) * 16 + own_bytes % 16;
  const auto store = [&](char* stage) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      *reinterpret_cast<Quad*>(stage + store_at + i * kRowsApart * kRowBytes) =
          Factor::Round(next[i]);
    }
  };

  // A row of either tile that this lane names to the instruction that loads.
  const int warp_down = warp % kDown * (kPlaces / kDown);
  const int warp_across = warp / kDown * (kFeatures / kAcross);
  const int down_row = warp_down + lane % 16, across_row = warp_across + lane / 16 * 8 + lane % 8;
  const int down_at = down_row * kRowBytes + PieceAt(down_row, lane / 16) * 16;
  const int across_at =
      kPlaces * kRowBytes + across_row * kRowBytes + PieceAt(across_row, lane / 8 % 2) * 16;
  float sums[kTilesDown][2 * kTilesAcross][4] = {};
  const auto multiply = [&](const char* stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        down[i] = LoadMatrices(stage + (down_at ^ half * 32) + i * 16 * kRowBytes);
      }
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        across[j] = LoadMatrices(stage + (across_at ^ half * 32) + j * 16 * kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          Factor::Multiply(sums[i][2 * j], down[i], across[j].x, across[j].y);
          Factor::Multiply(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  };

  if (steps > 0) {
    load(0, shared);
    store(shared);
    WaitForCopies();
    __syncthreads();
  }
  for (int step = 0; step < steps; ++step) {
    char* const after = shared + ((step + 1) & 1) * kStage;
    if (step + 1 < steps) load(step + 1, after);
    multiply(shared + (step & 1) * kStage);
    if (step + 1 < steps) store(after);
    WaitForCopies();
    __syncthreads();
  }

  Finish<kTilesDown, kTilesAcross>(s, terms, group, first_feature + warp_across, bias, relu, result,
                                   sums, [&](int row) { return places[warp_down + row].z; });
}

template <class T, int kPlaces, int kFeatures, int kDown, int kAcross, bool kFlat>
void LaunchWindows(const Queue& q, const Windows& s, const Terms& terms, bool backward,
                   const T* source, const uint4* weights, const float* bias, bool relu,
                   void* result) {
  using Tile = WindowTile<kPlaces, kFeatures, kDown, kAcross>;
  // Of the first phase, the largest.
  const int64_t places = int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases);
  const int64_t tiles = CeilDiv(places, kPlaces) * (terms.padded / kFeatures) * terms.groups;
  const uint32_t phases = static_cast<uint32_t>(s.phases);
  Launch(q, dim3(static_cast<uint32_t>(tiles), phases, phases), dim3(Tile::kThreads), Tile::kBytes,
         MultiplyWindows<Bf16, T, kPlaces, kFeatures, kDown, kAcross, kFlat>, s, terms, backward,
         source, weights, bias, relu, result);
}

// ---- the same of a source that is stored as bf16, whose channels are by eight: pieces of 16 bytes
// go to shared memory as they are, in the background and some stages ahead. In the same order.

// What a thread copies of the source: one piece of kRows rows of each step, step by step.
template <int kRows, int kRowsApart>
class PieceCopier {
 public:
  __device__ __forceinline__ PieceCopier(const Windows& s, const Terms& terms, const Axis& axis_y,
                                         const Axis& axis_x, const int4* places, int thread)
      : s_(s), terms_(terms), taps_y_(axis_y.taps), taps_x_(axis_x.taps) {
    static_assert(kRowsApart % 8 == 0);
    const int row = thread / 4, piece = thread % 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int4 place = places[row + i * kRowsApart];
      begin_[i] = place.x;
      inside_[i] = place.y;
    }
    at_ = row * kRowBytes + PieceAt(row, piece) * 16;
    channel_ = (piece * 2 & (terms.quads - 1)) * 4;
    if (taps_y_ * taps_x_ > 0) MoveBy(piece * 2 >> terms.shift);
  }
  __device__ __forceinline__ void CopyNext(const StoredBf16* __restrict__ source, char* rows) {
    const int move = (tap_y_ * s_.source_width + tap_x_) * s_.tap_move * s_.channels + channel_;
    const int bits = channel_ < terms_.channels ? 1 << tap_y_ | 1 << (tap_x_ + 16) : -1;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = (inside_[i] & bits) == bits;
      CopyOrZeroInBackground(rows + at_ + i * kRowsApart * kRowBytes,
                             source + (inside ? begin_[i] + move : 0), inside);
    }
    MoveBy(Bf16::kQuads >> terms_.shift);
  }

 private:
  __device__ __forceinline__ void MoveBy(int taps) {
    tap_x_ += taps;
    while (tap_x_ >= taps_x_) {
      tap_x_ -= taps_x_;
      if (++tap_y_ < taps_y_) continue;
      tap_y_ = 0;
      channel_ += 4 << terms_.shift;
    }
  }
  const Windows& s_;
  const Terms& terms_;
  const int taps_y_, taps_x_;
  int begin_[kRows], inside_[kRows];
  int tap_y_ = 0, tap_x_ = 0, channel_, at_;  // of the next step
};

template <int kPlaces, int kFeatures, int kDown, int kAcross>
struct StoredTile {
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kStages = kPlaces > 128 ? 3 : 4;
  static constexpr int kStage = (kPlaces + kFeatures) * kRowBytes;
  static constexpr size_t kBytes = kStages * kStage + kPlaces * sizeof(int4);
  static constexpr int kBlocks = kFeatures >= 128 ? 256 / kThreads : 4;
};

template <class Factor, int kPlaces, int kFeatures, int kDown, int kAcross>
__global__ void __launch_bounds__(StoredTile<kPlaces, kFeatures, kDown, kAcross>::kThreads,
                                  StoredTile<kPlaces, kFeatures, kDown, kAcross>::kBlocks)
    MultiplyStored(Windows s, Terms terms, bool backward, const StoredBf16* __restrict__ source,
                   const uint4* __restrict__ weights, const float* __restrict__ bias, bool relu,
                   void* __restrict__ result) {
  WaitForPrevious();
  using Tile = StoredTile<kPlaces, kFeatures, kDown, kAcross>;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages;
  constexpr int kRowsApart = kThreads / 4, kRows = kPlaces / kRowsApart;  // that a thread copies to
  constexpr int kPieces = kFeatures * 4;  // of 16 bytes, of the weights' tile
  constexpr int kTilesDown = kPlaces / kDown / 16, kTilesAcross = kFeatures / kAcross / 16;
  static_assert(kRowsApart % 8 == 0 && kPlaces % kRowsApart == 0);
  char* const shared = SharedMemory<char>();
  int4* const places = reinterpret_cast<int4*>(shared + kStages * Tile::kStage);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  const int phase_y = static_cast<int>(blockIdx.y), phase_x = static_cast<int>(blockIdx.z);
  const Axis axis_y = backward ? AxisOf<true>(s, s.height, phase_y) : AxisOf<false>(s, s.height, 0);
  const Axis axis_x = backward ? AxisOf<true>(s, s.width, phase_x) : AxisOf<false>(s, s.width, 0);
  const int tiles_of_group = terms.padded / kFeatures;
  const int tiles_of_places = tiles_of_group * terms.groups;
  const int own_tile = static_cast<int>(blockIdx.x) % tiles_of_places;
  const int group = own_tile / tiles_of_group;
  const int first_feature = own_tile % tiles_of_group * kFeatures;  // of the group
  const int first_place = static_cast<int>(blockIdx.x) / tiles_of_places * kPlaces;
  const int all = s.rows * axis_y.count * axis_x.count;
  if (first_place >= all) return;
  source += group * terms.channels;

  const int taps = axis_y.taps * axis_x.taps;
  const int steps = (taps * terms.channels + Factor::kDepth - 1) / Factor::kDepth;
  const int slot = axis_y.first * terms.slots + axis_x.first;
  weights += ((static_cast<int64_t>(group) * terms.slots * terms.slots + slot) * terms.steps *
                  terms.padded +
              first_feature) *
             4;
  const auto stage_of = [&](int step) { return shared + step % kStages * Tile::kStage; };
  const auto copy_weights = [&](int step) {
    char* const to = stage_of(step) + kPlaces * kRowBytes;
    const uint4* const from = weights + static_cast<int64_t>(step) * terms.padded * 4;
#pragma unroll
    for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
      const int piece = thread + i * kThreads;
      if (kPieces % kThreads != 0 && piece >= kPieces) continue;
      CopyInBackground(to + (piece / 4 * 4 + PieceAt(piece / 4, piece % 4)) * 16, from + piece);
    }
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy_weights(step);
  }
  for (int i = thread; i < kPlaces; i += kThreads) {
    places[i] = LookUp(s, axis_y, axis_x, phase_y, phase_x, all, first_place + i);
  }
  __syncthreads();

  PieceCopier<kRows, kRowsApart> copier(s, terms, axis_y, axis_x, places, thread);

  // A row of either tile that this lane names to the instruction that loads.
  const int warp_down = warp % kDown * (kPlaces / kDown);
  const int warp_across = warp / kDown * (kFeatures / kAcross);
  const int down_row = warp_down + lane % 16, across_row = warp_across + lane / 16 * 8 + lane % 8;
  const int down_at = down_row * kRowBytes + PieceAt(down_row, lane / 16) * 16;
  const int across_at =
      kPlaces * kRowBytes + across_row * kRowBytes + PieceAt(across_row, lane / 8 % 2) * 16;
  float sums[kTilesDown][2 * kTilesAcross][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copier.CopyNext(source, stage_of(step));
    CommitCopies();
  }
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kStages - 2>();
    __syncthreads();
    const int ahead = step + kStages - 1;
    if (ahead < steps) {
      copy_weights(ahead);
      copier.CopyNext(source, stage_of(ahead));
    }
    CommitCopies();
    const char* const stage = stage_of(step);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        down[i] = LoadMatrices(stage + (down_at ^ half * 32) + i * 16 * kRowBytes);
      }
#pragma unroll
      for (int j = 0; j < kTilesAcross; ++j) {
        across[j] = LoadMatrices(stage + (across_at ^ half * 32) + j * 16 * kRowBytes);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          Factor::Multiply(sums[i][2 * j], down[i], across[j].x, across[j].y);
          Factor::Multiply(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
        }
      }
    }
  }

  Finish<kTilesDown, kTilesAcross>(s, terms, group, first_feature + warp_across, bias, relu, result,
                                   sums, [&](int row) { return places[warp_down + row].z; });
}

template <int kPlaces, int kFeatures, int kDown, int kAcross>
void LaunchStored(const Queue& q, const Windows& s, const Terms& terms, bool backward,
                  const StoredBf16* source, const uint4* weights, const float* bias, bool relu,
                  void* result) {
  using Tile = StoredTile<kPlaces, kFeatures, kDown, kAcross>;
  // Of the first phase, the largest.
  const int64_t places = int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases);
  const int64_t tiles = CeilDiv(places, kPlaces) * (terms.padded / kFeatures) * terms.groups;
  const uint32_t phases = static_cast<uint32_t>(s.phases);
  const auto kernel = MultiplyStored<Bf16, kPlaces, kFeatures, kDown, kAcross>;
  AllowShared(kernel, Tile::kBytes);
  Launch(q, dim3(static_cast<uint32_t>(tiles), phases, phases), dim3(Tile::kThreads), Tile::kBytes,
         kernel, s, terms, backward, source, weights, bias, relu, result);
}

// The same of few terms, whose time is that of bytes: a block keeps all terms of its places, and
// makes one tile of features after another while the next one's weights are on their way.
struct ResidentTile {
  static constexpr int kPlaces = 128, kFeatures = 64, kDown = 2, kAcross = 2;
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kMostSteps = 4, kBlocks = 4;
  static size_t bytes(int steps) {
    return static_cast<size_t>(steps) * (kPlaces + 2 * kFeatures) * kRowBytes +
           kPlaces * sizeof(int4);
  }
};

template <class Factor>
__global__ void __launch_bounds__(ResidentTile::kThreads, ResidentTile::kBlocks)
    MultiplyResident(Windows s, Terms terms, int most_steps, bool backward,
                     const StoredBf16* __restrict__ source, const uint4* __restrict__ weights,
                     const float* __restrict__ bias, bool relu, void* __restrict__ result) {
  WaitForPrevious();
  using Tile = ResidentTile;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kFeatures = Tile::kFeatures;
  constexpr int kRowsApart = kThreads / 4, kRows = kPlaces / kRowsApart;
  constexpr int kTilesDown = kPlaces / Tile::kDown / 16;
  constexpr int kTilesAcross = kFeatures / Tile::kAcross / 16;
  char* const shared = SharedMemory<char>();
  int4* const places = reinterpret_cast<int4*>(shared);
  char* const rows = shared + kPlaces * sizeof(int4);
  char* const packed = rows + most_steps * kPlaces * kRowBytes;  // two tiles
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  const int phase_y = static_cast<int>(blockIdx.y), phase_x = static_cast<int>(blockIdx.z);
  const Axis axis_y = backward ? AxisOf<true>(s, s.height, phase_y) : AxisOf<false>(s, s.height, 0);
  const Axis axis_x = backward ? AxisOf<true>(s, s.width, phase_x) : AxisOf<false>(s, s.width, 0);
  const int group = static_cast<int>(blockIdx.x) % terms.groups;
  const int first_place = static_cast<int>(blockIdx.x) / terms.groups * kPlaces;
  const int all = s.rows * axis_y.count * axis_x.count;
  if (first_place >= all) return;
  source += group * terms.channels;

  const int taps = axis_y.taps * axis_x.taps;
  const int steps = (taps * terms.channels + Factor::kDepth - 1) / Factor::kDepth;
  const int slot = axis_y.first * terms.slots + axis_x.first;
  weights += (static_cast<int64_t>(group) * terms.slots * terms.slots + slot) * terms.steps *
             terms.padded * 4;
  const int tiles = terms.padded / kFeatures;
  const auto copy_weights = [&](int tile) {
    char* const to = packed + (tile & 1) * most_steps * kFeatures * kRowBytes;
    for (int i = thread; i < steps * kFeatures * 4; i += kThreads) {
      const int row = i / 4, step = row / kFeatures, feature = tile * kFeatures + row % kFeatures;
      CopyInBackground(to + row * kRowBytes + PieceAt(row, i % 4) * 16,
                       weights + (static_cast<int64_t>(step) * terms.padded + feature) * 4 + i % 4);
    }
  };
  copy_weights(0);
  for (int i = thread; i < kPlaces; i += kThreads) {
    places[i] = LookUp(s, axis_y, axis_x, phase_y, phase_x, all, first_place + i);
  }
  __syncthreads();
  PieceCopier<kRows, kRowsApart> copier(s, terms, axis_y, axis_x, places, thread);
  for (int step = 0; step < steps; ++step) {
    copier.CopyNext(source, rows + step * kPlaces * kRowBytes);
  }
  CommitCopies();
  if (tiles > 1) copy_weights(1);
  CommitCopies();

  // A row of either that this lane names to the instruction that loads.
  const int warp_down = warp % Tile::kDown * (kPlaces / Tile::kDown);
  const int warp_across = warp / Tile::kDown * (kFeatures / Tile::kAcross);
  const int down_row = warp_down + lane % 16, across_row = warp_across + lane / 16 * 8 + lane % 8;
  const int down_at = down_row * kRowBytes + PieceAt(down_row, lane / 16) * 16;
  const int across_at = across_row * kRowBytes + PieceAt(across_row, lane / 8 % 2) * 16;
  for (int tile = 0; tile < tiles; ++tile) {
    WaitForGroups<1>();
    __syncthreads();
    float sums[kTilesDown][2 * kTilesAcross][4] = {};
    const char* const tile_at = packed + (tile & 1) * most_steps * kFeatures * kRowBytes;
    for (int step = 0; step < steps; ++step) {
      const char* const down_rows = rows + step * kPlaces * kRowBytes;
      const char* const across_rows = tile_at + step * kFeatures * kRowBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
        for (int i = 0; i < kTilesDown; ++i) {
          down[i] = LoadMatrices(down_rows + (down_at ^ half * 32) + i * 16 * kRowBytes);
        }
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j) {
          across[j] = LoadMatrices(across_rows + (across_at ^ half * 32) + j * 16 * kRowBytes);
        }
#pragma unroll
        for (int i = 0; i < kTilesDown; ++i) {
#pragma unroll
          for (int j = 0; j < kTilesAcross; ++j) {
            Factor::Multiply(sums[i][2 * j], down[i], across[j].x, across[j].y);
            Factor::Multiply(sums[i][2 * j + 1], down[i], across[j].z, across[j].w);
          }
        }
      }
    }
    __syncthreads();
    if (tile + 2 < tiles) copy_weights(tile + 2);
    CommitCopies();
    Finish<kTilesDown, kTilesAcross>(s, terms, group, tile * kFeatures + warp_across, bias, relu,
                                     result, sums,
                                     [&](int row) { return places[warp_down + row].z; });
  }
}

void LaunchResident(const Queue& q, const Windows& s, const Terms& terms, bool backward,
                    const StoredBf16* source, const uint4* weights, const float* bias, bool relu,
                    void* result) {
  using Tile = ResidentTile;
  // Of the first phase, the largest.
  const int64_t places = int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases);
  const auto blocks = static_cast<uint32_t>(CeilDiv(places, Tile::kPlaces) * terms.groups);
  const uint32_t phases = static_cast<uint32_t>(s.phases);
  AllowShared(MultiplyResident<Bf16>, Tile::bytes(terms.steps));
  Launch(q, dim3(blocks, phases, phases), dim3(Tile::kThreads), Tile::bytes(terms.steps),
         MultiplyResident<Bf16>, s, terms, terms.steps, backward, source, weights, bias, relu,
         result);
}

constexpr int64_t kFill = 132;  // blocks that occupy a large GPU
int64_t TilesOf(const Terms& terms, int64_t places, int tile_places, int tile_features) {
  return CeilDiv(places, tile_places) * (terms.padded / tile_features) * terms.groups;
}

// Of few terms it is bytes that take the time: smaller tiles, of which there are more at once. Of
// many it is what comes to shared memory, which is less for a larger tile.
auto StoredLauncher(int tile, const Terms& terms, int64_t places) {
  constexpr int kFewTerms = ResidentTile::kMostSteps * Bf16::kDepth, kManyTerms = 512;
  const int most_terms = terms.slot_taps * terms.slot_taps * terms.channels;
  if (tile == 16) return LaunchStored<128, 16, 4, 1>;
  if (tile == 32) return LaunchStored<128, 32, 4, 1>;
  // Each block is to have several tiles of features, and there are to be blocks enough.
  const bool few = most_terms <= kFewTerms && terms.padded >= 128 &&
                   CeilDiv(places, ResidentTile::kPlaces) * terms.groups >= 4 * kFill;
  if (few) return LaunchResident;
  if (tile == 64 || most_terms <= kFewTerms) return LaunchStored<128, 64, 2, 2>;
  const bool many = most_terms >= kManyTerms && TilesOf(terms, places, 256, 128) >= kFill;
  return many ? LaunchStored<256, 128, 4, 2> : LaunchStored<128, 128, 2, 2>;
}

// Any number of rows.
template <class T>
void MultiplyAllWindows(const Queue& q, Windows s, int64_t groups, bool backward, int64_t rows,
                        const T* source, const void* packed, const float* bias, bool relu,
                        void* result) {
  const Terms terms = TermsOf<Bf16>(s, groups);
  const int64_t source_row = int64_t{s.source_height} * s.source_width * s.channels;
  const int64_t result_row = int64_t{s.height} * s.width * s.features;
  s.wide = TakenByFour(terms.channels, source);
  s.wide_result = TakenByFour(terms.features, result);
  const bool flat = terms.quads == 0;
  const bool keeps_size =
      s.stride == 1 && s.kernel > 1 && s.height == s.source_height && s.width == s.source_width;
  const int tile = std::min(FeaturesOfTile(terms.features), flat ? 64 : 128);
  const auto launch =
      tile == 16
          ? (flat ? LaunchWindows<T, 128, 16, 4, 1, true> : LaunchWindows<T, 128, 16, 4, 1, false>)
      : tile == 32
          ? (flat ? LaunchWindows<T, 128, 32, 4, 1, true> : LaunchWindows<T, 128, 32, 4, 1, false>)
      : tile == 64
          ? (flat ? LaunchWindows<T, 128, 64, 2, 2, true> : LaunchWindows<T, 128, 64, 2, 2, false>)
          : LaunchWindows<T, 128, 128, 2, 2, false>;
  constexpr bool kIsFloat = sizeof(T) == sizeof(float);
  const bool by_pieces = !kIsFloat && terms.quads >= 2 && IsAligned16(source);
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(source_row, result_row));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    const T* const from = source + row * source_row;
    const uint4* const weights = static_cast<const uint4*>(packed);
    void* const to = static_cast<char*>(result) + row * result_row * ElementBytes(s.result_type);
    const bool whole = terms.quads == Bf16::kQuads;
    const bool half = terms.channels == Bf16::kDepth / 2;
    const auto launch_runs = whole ? LaunchRunsOf<T, 2> : LaunchRunsOf<T, 1>;
    // A tile of 128 features only where such tiles occupy the GPU.
    const int64_t places = int64_t{s.rows} * s.height * s.width;
    const bool narrow = by_pieces && tile == 128 && TilesOf(terms, places, 128, 128) < kFill;
    const bool by_runs =
        keeps_size && (whole || half) && (kIsFloat || by_pieces) &&
        launch_runs(narrow ? 64 : tile, q, s, terms, backward, from, weights, bias, relu, to);
    if (by_runs) continue;
    if constexpr (!kIsFloat) {
      if (by_pieces) {
        StoredLauncher(narrow ? 64 : tile, terms, places)(q, s, terms, backward, from, weights,
                                                          bias, relu, to);
        continue;
      }
    }
    launch(q, s, terms, backward, from, weights, bias, relu, to);
  }
}

// Of one direction: which kernels make it, and its weights as they take them.
enum class Way { kGeneral, kWarpgroups, kStem };
struct Packing {
  Windows windows;
  Terms terms;
  Way way;
  int64_t bytes;
};
Packing PackingOf(const Conv2dShape& s, bool backward) {
  Windows windows = backward ? BackwardWindowsOf(s) : WindowsOf(s);
  windows.result_type = backward ? s.x_type : s.y_type;
  const Terms terms = TermsOf<Bf16>(windows, s.groups);
  if (GoesByWarpgroups(windows, s.groups, backward ? s.y_type : s.x_type)) {
    return {windows, terms, Way::kWarpgroups, WarpgroupWeightBytes(windows)};
  }
  if (!backward && GoesAsStem(s)) return {windows, terms, Way::kStem, StemWeightBytes(s)};
  return {windows, terms, Way::kGeneral,
          terms.groups * terms.slots * terms.slots * terms.slot_bytes()};
}
int64_t BackwardAt(const Conv2dShape& s) { return RoundUp(PackingOf(s, false).bytes, 256); }

void MultiplyAll(const Queue& q, const Conv2dShape& s, bool backward, int64_t rows,
                 const void* source, const void* packed, const float* bias, bool relu,
                 void* result) {
  const Packing packing = PackingOf(s, backward);
  const auto* const weights = static_cast<const uint4*>(packed);
  if (packing.way == Way::kWarpgroups) {
    return MultiplyAllByWarpgroups(q, packing.windows, backward, rows,
                                   static_cast<const StoredBf16*>(source), weights, bias, relu,
                                   result);
  }
  if (packing.way == Way::kStem) {
    return MultiplyAllOfStem(q, packing.windows, rows, static_cast<const float*>(source), weights,
                             bias, relu, result);
  }
  WithElement(backward ? s.y_type : s.x_type, [&]<class T>() {
    MultiplyAllWindows(q, packing.windows, s.groups, backward, rows, static_cast<const T*>(source),
                       packed, bias, relu, result);
  });
}

}  // namespace

bool FitsTensorCores(const Conv2dShape& s) {
  if (s.kernel > kMostKernel || s.stride > 64) return false;
  if (s.groups > 1 && std::min(s.in, s.out) / s.groups < 8) return false;  // mostly padding
  for (const bool backward : {false, true}) {
    constexpr int64_t kMostBytes = int64_t{1} << 33;
    const Packing packing = PackingOf(s, backward);
    const Terms& terms = packing.terms;
    if (int64_t{terms.groups} * terms.slots * terms.slots > 65535) return false;
    if (packing.bytes > kMostBytes) return false;
  }
  return true;
}

size_t PackedWeightBytes(const Conv2dShape& s) {
  return static_cast<size_t>(BackwardAt(s) + PackingOf(s, true).bytes);
}

void PackTensorWeights(const Queue& q, const Conv2dShape& s, const uint16_t* w, void* packed) {
  std::vector<Packed> ways;  // of PackWeights, which takes one or both
  int64_t blocks = 0, slots = 0;
  for (const bool backward : {false, true}) {
    const Packing packing = PackingOf(s, backward);
    void* const to = static_cast<char*>(packed) + (backward ? BackwardAt(s) : 0);
    if (packing.way == Way::kWarpgroups) PackForWarpgroups(q, packing.windows, backward, w, to);
    if (packing.way == Way::kStem) PackForStem(q, s, w, to);
    if (packing.way != Way::kGeneral) continue;
    const Terms& terms = packing.terms;
    ways.push_back({terms, backward, packing.windows.tap_step, to});
    blocks = std::max<int64_t>(blocks, CeilDiv(terms.slot_bytes(), 256 * sizeof(Bf16::Quad)));
    slots = std::max(slots, int64_t{terms.groups} * terms.slots * terms.slots);
  }
  if (ways.empty()) return;
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(slots),
                  static_cast<uint32_t>(ways.size()));
  Launch(q, grid, dim3(256), 0, PackWeights<Bf16>, ways.front(), ways.back(),
         static_cast<int>(s.kernel), reinterpret_cast<const StoredBf16*>(w));
}

void TensorConvolutionForward(const Queue& q, const Conv2dShape& s, int64_t rows, const void* x,
                              const void* packed, const float* bias, bool relu, void* y) {
  MultiplyAll(q, s, false, rows, x, packed, bias, relu, y);
}

void TensorConvolutionBackwardInput(const Queue& q, const Conv2dShape& s, int64_t rows,
                                    const void* dy, const void* packed, void* dx) {
  MultiplyAll(q, s, true, rows, dy, static_cast<const char*>(packed) + BackwardAt(s), nullptr,
              false, dx);
}

bool TensorConvolutionBackwardInputInto(const Queue& q, const Conv2dShape& s, int64_t rows,
                                        const void* dy, const void* packed, const void* more,
                                        const uint8_t* above, void* g) {
  const Packing packing = PackingOf(s, true);
  if (packing.way != Way::kWarpgroups || s.x_type != ElementType::kBf16) return false;
  const void* const weights = static_cast<const char*>(packed) + BackwardAt(s);
  return MultiplyAllIntoByWarpgroups(q, packing.windows, rows, static_cast<const StoredBf16*>(dy),
                                     static_cast<const uint4*>(weights),
                                     static_cast<const StoredBf16*>(more), above,
                                     static_cast<StoredBf16*>(g));
}

}  // namespace lockstep::device::cuda
