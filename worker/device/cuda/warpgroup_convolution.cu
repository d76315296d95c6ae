// y and dx of bf16 convolutions on GPUs with warpgroup products (9.0), of tensors that are stored
// as bf16, with channels and features by 64: as tensor_convolution.cu has them, but that the tensor
// cores read both factors from shared memory by themselves, so that warps only copy.
//
// Order, which is all that bits depend on: an element's terms run over (block of 64 channels, kh,
// kw, channel of the block), as one chain of the instruction's products.
#include <algorithm>

#include "worker/device/cuda/tensor_convolution.h"
#include "worker/device/cuda/warpgroup.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kTerms = kSwizzledRow / 2;  // of a step
constexpr int kThreads = 256;             // two warpgroups

// ---- weights, packed as steps take them: {slot of a phase's taps, step, row of a feature, piece}.

struct Slots {
  int count, tap_step, kernel;  // along each dimension
  int features, channels;
  bool backward;
  __host__ __device__ int taps_from(int first) const {
    return (kernel - first + tap_step - 1) / tap_step;
  }
  __host__ __device__ int steps() const {  // of the slot that has most
    return taps_from(0) * taps_from(0) * (channels / kTerms);
  }
};
Slots SlotsOf(const Windows& s, bool backward) {
  return {std::min(s.kernel, s.tap_step), s.tap_step, s.kernel, s.features, s.channels, backward};
}

__global__ void __launch_bounds__(256)
    PackRows(Slots s, const uint16_t* __restrict__ w, uint4* __restrict__ packed) {
  WaitForPrevious();
  const int slot = static_cast<int>(blockIdx.y);
  const int first_y = slot / s.count, first_x = slot % s.count;
  const int taps_x = s.taps_from(first_x), taps = s.taps_from(first_y) * taps_x;
  // Neighbouring threads read neighbours of w {out, taps, in}.
  int at = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x);
  int piece, feature;
  if (s.backward) {
    feature = at % s.features, at /= s.features;
    piece = at % 8, at /= 8;
  } else {
    piece = at % 8, at /= 8;
    feature = at % s.features, at /= s.features;
  }
  const int step = at;
  if (step >= taps * (s.channels / kTerms)) return;
  const int tap = step % taps, channel = step / taps * kTerms + piece * 8;
  const int y = first_y + tap / taps_x * s.tap_step, x = first_x + tap % taps_x * s.tap_step;
  const int64_t own_tap = y * s.kernel + x, all_taps = s.kernel * s.kernel;
  uint32_t two[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t from = s.backward ? ((channel + i) * all_taps + own_tap) * s.features + feature
                                    : (feature * all_taps + own_tap) * s.channels + channel + i;
    const uint32_t bits = w[from];
    two[i / 2] = i % 2 == 0 ? bits : two[i / 2] | bits << 16;
  }
  const int row = RowOfFeature(feature);
  packed[((static_cast<int64_t>(slot) * s.steps() + step) * s.features + row) * 8 +
         (piece ^ (row & 7))] = make_uint4(two[0], two[1], two[2], two[3]);
}

// ---- y and dx.

// Where dx goes into another gradient: that, where a relu lets both through, and what they come to
// (device.h, Conv2d::BackwardInputInto).
struct Into {
  const StoredBf16* more;
  const uint8_t* above;
  StoredBf16* g;
};

// A block makes kPlaces x kFeatures, half of the places by each warpgroup. kAhead: how many steps'
// products may be under way when a step's are begun.
constexpr int kPlaces = 128;
template <int kFeatures, int kStages>
struct WarpgroupTile {
  static constexpr int kStage = (kPlaces + kFeatures) * kSwizzledRow;
  static constexpr size_t kBytes = kSwizzledAlignment + kStages * kStage + kPlaces * sizeof(int4);
};

// Writes a lane's sums, with what they go into: places of features, whose pieces are turned as
// those of matrices are.
template <int kTiles>
__device__ __forceinline__ void FinishInto(int first_feature, const char* __restrict__ more,
                                           const uint8_t* __restrict__ masks, const int4* places,
                                           StoredBf16* result, const float (&sums)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4, at = places[row].z;
    if (at < 0) continue;
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      const int piece = j + lane % 4;
      const uint32_t mask = masks[row * 16 + piece];
      Held<StoredBf16, 8> other;
      other.Load(
          reinterpret_cast<const StoredBf16*>(more + (row * kTiles + (piece ^ (row & 7))) * 16));
      Lanes<8> g;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float dx = AsStored<StoredBf16>(sums[j + n / 2][2 * half + n % 2]);
        const float sum = AsStored<StoredBf16>(other.At(n) + dx);
        g.at[n] = mask >> n & 1 ? sum : 0.0f;
      }
      StoreLanes<8>(result + (at + first_feature + piece * 8), g);
    }
  }
}

// kInto: dx goes into another gradient, which is copied to a stage as if it were one step more.
template <int kFeatures, int kStages, int kAhead, bool kInto = false>
__device__ __forceinline__ void MultiplyTile(const Windows& s, bool backward, const Slots& slots,
                                             const StoredBf16* __restrict__ source,
                                             const uint4* __restrict__ weights,
                                             const float* __restrict__ bias, bool relu,
                                             void* __restrict__ result, Into into = {}) {
  using Tile = WarpgroupTile<kFeatures, kStages>;
  constexpr int kRowsApart = kThreads / 8;
  constexpr int kRows = kPlaces / kRowsApart;        // a piece of which a thread copies
  constexpr int kCopied = kStages - 1 - kAhead;      // steps, before they are multiplied
  constexpr int kCopies = kFeatures * 8 / kThreads;  // of weights
  char* const stages = AlignMatrix(SharedMemory<char>());
  int4* const places = reinterpret_cast<int4*>(stages + kStages * Tile::kStage);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;

  const int phase_y = static_cast<int>(blockIdx.y), phase_x = static_cast<int>(blockIdx.z);
  const Axis axis_y = backward ? AxisOf<true>(s, s.height, phase_y) : AxisOf<false>(s, s.height, 0);
  const Axis axis_x = backward ? AxisOf<true>(s, s.width, phase_x) : AxisOf<false>(s, s.width, 0);
  const int tiles = s.features / kFeatures;
  const int first_feature = static_cast<int>(blockIdx.x) % tiles * kFeatures;
  const int first_place = static_cast<int>(blockIdx.x) / tiles * kPlaces;
  const int all = s.rows * axis_y.count * axis_x.count;
  if (first_place >= all) return;
  const int taps = axis_y.taps * axis_x.taps, steps = taps * (s.channels / kTerms);
  const int slot = axis_y.first * slots.count + axis_x.first;
  weights += ((static_cast<int64_t>(slot) * slots.steps()) * s.features + first_feature) * 8;
  const auto stage_of = [&](int step) { return stages + step % kStages * Tile::kStage; };
  const auto copy_weights = [&](int step) {
    char* const to = stage_of(step) + kPlaces * kSwizzledRow;
    const uint4* const from = weights + static_cast<int64_t>(step) * s.features * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int piece = thread + i * kThreads;
      CopyInBackground(to + piece * 16, from + piece);
    }
  };
#pragma unroll
  for (int step = 0; step < kCopied; ++step) {
    if (step < steps) copy_weights(step);
  }
  // Where windows are single places of the source, one after the other, nothing is looked up.
  const bool plain = s.kernel == 1 && s.stride == 1 && s.padding == 0;
  for (int i = thread; i < kPlaces; i += kThreads) {
    const int place = first_place + i;
    places[i] = plain ? make_int4(place * s.channels, place < all ? -1 : 0,
                                  place < all ? place * s.features : -1, 0)
                      : LookUp(s, axis_y, axis_x, phase_y, phase_x, all, place);
  }
  __syncthreads();
  const int own_row = thread / 8, own_piece = thread % 8;
  const int own_at = own_row * kSwizzledRow + (own_piece ^ (own_row & 7)) * 16;
  int begin[kRows], inside[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int4 place = places[own_row + i * kRowsApart];
    begin[i] = place.x + own_piece * 8;
    inside[i] = place.y;
  }

  int tap_y = 0, tap_x = 0, block = 0;  // of the next step that is copied
  const auto copy_places = [&](int step) {
    char* const to = stage_of(step) + own_at;
    const int move = (tap_y * s.source_width + tap_x) * s.tap_move * s.channels + block;
    const int bits = 1 << tap_y | 1 << (tap_x + 16);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool copies = (inside[i] & bits) == bits;
      const StoredBf16* const from = source + (copies ? begin[i] + move : 0);
      if (s.wide) {
        CopyOrZeroInBackground(to + i * kRowsApart * kSwizzledRow, from, copies);
      } else {
        const uint2 low = LoadStored<false>(from, copies ? 4 : 0);
        const uint2 high = LoadStored<false>(from + 4, copies ? 4 : 0);
        *reinterpret_cast<uint4*>(to + i * kRowsApart * kSwizzledRow) =
            make_uint4(low.x, low.y, high.x, high.y);
      }
    }
    if (++tap_x < axis_x.taps) return;
    tap_x = 0;
    if (++tap_y < axis_y.taps) return;
    tap_y = 0;
    block += kTerms;
  };

  constexpr int kPieces = kFeatures / 8;  // of a place's features
  static_assert(!kInto || kFeatures * 2 * kPlaces <= Tile::kStage);
  const auto copy_into = [&](int step) {
    char* const to = stage_of(step);
#pragma unroll
    for (int i = 0; i < kPlaces * kPieces / kThreads; ++i) {
      const int row = (thread + i * kThreads) / kPieces, piece = thread % kPieces;
      const int at = places[row].z;
      if (at < 0) continue;
      CopyInBackground(to + (row * kPieces + (piece ^ (row & 7))) * 16,
                       into.more + (at + first_feature + piece * 8));
    }
  };
  // On their way while products are made: a place's bits.
  uint2 above[kFeatures / 64] = {};
  if constexpr (kInto) {
    const int at = thread < kPlaces ? places[thread].z : -1;
#pragma unroll
    for (int i = 0; i < kFeatures / 64 && at >= 0; ++i) {
      above[i] = *reinterpret_cast<const uint2*>(into.above + (at + first_feature) / 8 + i * 8);
    }
  }

  float sums[kFeatures / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kCopied; ++step) {
    if (step < steps) {
      copy_places(step);
    } else if (kInto && step == steps) {
      copy_into(step);
    }
    CommitCopies();
  }
  KeepSums(sums);
  for (int step = 0; step < steps; ++step) {
    WaitForGroups<kCopied - 1>();
    ShowToProducts();
    __syncthreads();  // and the stage that is copied to below is multiplied
    const char* const stage = stage_of(step);
    const SharedMatrix down = MatrixIn(stage + warp / 4 * 64 * kSwizzledRow);
    const SharedMatrix across = MatrixIn(stage + kPlaces * kSwizzledRow);
    BeginProducts();
#pragma unroll
    for (int depth = 0; depth < kTerms / 16; ++depth) {
      MultiplyWarpgroup<kFeatures>(sums, Behind(down, depth * 32), Behind(across, depth * 32));
    }
    CommitProducts();
    if (step + kCopied < steps) {
      copy_weights(step + kCopied);
      copy_places(step + kCopied);
    } else if (kInto && step + kCopied == steps) {
      copy_into(step + kCopied);
    }
    CommitCopies();
    WaitForProducts<kAhead>();
  }
  WaitForProducts<0>();
  KeepSums(sums);

  if constexpr (kInto) {
    // Nothing else is there, nor has been read there since the last barrier.
    uint2* const bits = reinterpret_cast<uint2*>(stage_of(steps + 1));
    if (thread < kPlaces) {
#pragma unroll
      for (int i = 0; i < kFeatures / 64; ++i) bits[thread * 2 + i] = above[i];
    }
    WaitForGroups<0>();
    __syncthreads();
    const auto* const masks = reinterpret_cast<const uint8_t*>(bits);
    FinishInto(first_feature, stage_of(steps), masks, places, into.g, sums);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = places[warp * 16 + half * 8 + lane / 4].z;
      if (at >= 0) FinishPlace(s, first_feature, bias, relu, result, sums, half, at);
    }
  }
}

template <int kFeatures, int kStages, int kAhead, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    MultiplyByWarpgroups(Windows s, bool backward, Slots slots,
                         const StoredBf16* __restrict__ source, const uint4* __restrict__ weights,
                         const float* __restrict__ bias, bool relu, void* __restrict__ result) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) {
    MultiplyTile<kFeatures, kStages, kAhead>(s, backward, slots, source, weights, bias, relu,
                                             result);
  }
}

template <int kFeatures, int kStages, int kAhead, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    MultiplyIntoByWarpgroups(Windows s, Slots slots, const StoredBf16* __restrict__ source,
                             const uint4* __restrict__ weights, Into into) {
  WaitForPrevious();
  if constexpr (kHasWarpgroups) {
    MultiplyTile<kFeatures, kStages, kAhead, true>(s, true, slots, source, weights, nullptr, false,
                                                   nullptr, into);
  }
}

template <int kFeatures, int kStages, int kAhead, int kBlocks>
void LaunchTiles(const Queue& q, const Windows& s, bool backward, int64_t tiles_of_places,
                 const StoredBf16* source, const uint4* weights, const float* bias, bool relu,
                 void* result) {
  constexpr size_t kBytes = WarpgroupTile<kFeatures, kStages>::kBytes;
  const auto tiles = static_cast<uint32_t>(tiles_of_places * (s.features / kFeatures));
  const uint32_t phases = static_cast<uint32_t>(s.phases);
  const auto kernel = MultiplyByWarpgroups<kFeatures, kStages, kAhead, kBlocks>;
  AllowShared(kernel, kBytes);
  Launch(q, dim3(tiles, phases, phases), dim3(kThreads), kBytes, kernel, s, backward,
         SlotsOf(s, backward), source, weights, bias, relu, result);
}

}  // namespace

bool GoesByWarpgroups(const Windows& s, int64_t groups, ElementType source_type) {
  if (source_type != ElementType::kBf16 || groups != 1) return false;
  if (s.channels % kTerms != 0 || s.features % 64 != 0) return false;
  return WarpgroupProcessors() > 0;
}

int64_t WarpgroupWeightBytes(const Windows& s) {
  const Slots slots = SlotsOf(s, false);
  return int64_t{slots.count} * slots.count * slots.steps() * s.features * kSwizzledRow;
}

void PackForWarpgroups(const Queue& q, const Windows& s, bool backward, const uint16_t* w,
                       void* packed) {
  const Slots slots = SlotsOf(s, backward);
  const int64_t pieces = int64_t{slots.steps()} * s.features * 8;
  Launch(q,
         dim3(static_cast<uint32_t>(CeilDiv(pieces, 256)),
              static_cast<uint32_t>(slots.count * slots.count)),
         dim3(256), 0, PackRows, slots, w, static_cast<uint4*>(packed));
}

namespace {

int64_t SourceRow(const Windows& s) {
  return int64_t{s.source_height} * s.source_width * s.channels;
}
int64_t ResultRow(const Windows& s) { return int64_t{s.height} * s.width * s.features; }

// Calls launch(windows, first row, tiles of places) for any number of rows, in parts.
template <class Launch>
void ForEachPart(Windows s, int64_t rows, const Launch& launch) {
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(SourceRow(s), ResultRow(s)));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    // Of the first phase, the largest.
    const int64_t places =
        int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases);
    launch(s, row, CeilDiv(places, kPlaces));
  }
}

template <int kFeatures, int kBlocks>
void LaunchInto(const Queue& q, const Windows& s, int64_t tiles_of_places, const StoredBf16* source,
                const uint4* weights, const Into& into) {
  constexpr int kStages = 3;
  constexpr size_t kBytes = WarpgroupTile<kFeatures, kStages>::kBytes;
  const auto tiles = static_cast<uint32_t>(tiles_of_places * (s.features / kFeatures));
  const uint32_t phases = static_cast<uint32_t>(s.phases);
  const auto kernel = MultiplyIntoByWarpgroups<kFeatures, kStages, 0, kBlocks>;
  AllowShared(kernel, kBytes);
  Launch(q, dim3(tiles, phases, phases), dim3(kThreads), kBytes, kernel, s, SlotsOf(s, true),
         source, weights, into);
}

}  // namespace

void MultiplyAllByWarpgroups(const Queue& q, Windows s, bool backward, int64_t rows,
                             const StoredBf16* source, const uint4* weights, const float* bias,
                             bool relu, void* result) {
  const int steps = SlotsOf(s, backward).steps();
  s.wide = IsAligned16(source);
  s.wide_result = IsAligned16(result);
  ForEachPart(s, rows, [&](const Windows& part, int64_t row, int64_t tiles) {
    // Of many terms it is what comes to shared memory that takes the time, which is less for a wide
    // tile; but each multiprocessor is to have two.
    const bool wide = s.features % 256 == 0 && steps >= 16 &&
                      tiles * (s.features / 256) >= 2 * WarpgroupProcessors();
    const auto launch = s.features % 128 != 0 ? LaunchTiles<64, 3, 0, 3>
                        : wide                ? LaunchTiles<256, 4, 1, 1>
                                              : LaunchTiles<128, 3, 0, 2>;
    launch(q, part, backward, tiles, source + row * SourceRow(s), weights, bias, relu,
           static_cast<char*>(result) + row * ResultRow(s) * ElementBytes(s.result_type));
  });
}

bool MultiplyAllIntoByWarpgroups(const Queue& q, Windows s, int64_t rows, const StoredBf16* source,
                                 const uint4* weights, const StoredBf16* more, const uint8_t* above,
                                 StoredBf16* g) {
  if (!IsAligned16(more) || !IsAligned16(g) || reinterpret_cast<uintptr_t>(above) % 8 != 0) {
    return false;
  }
  s.wide = IsAligned16(source);
  ForEachPart(s, rows, [&](const Windows& part, int64_t row, int64_t tiles) {
    const int64_t at = row * ResultRow(s);
    const auto launch = s.features % 128 != 0 ? LaunchInto<64, 3> : LaunchInto<128, 2>;
    launch(q, part, tiles, source + row * SourceRow(s), weights,
           {more + at, above + at / 8, g + at});
  });
  return true;
}

}  // namespace lockstep::device::cuda
