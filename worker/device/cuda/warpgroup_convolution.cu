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

// A block makes kPlaces x kFeatures, half of the places by each warpgroup. kAhead: how many steps'
// products may be under way when a step's are begun.
constexpr int kPlaces = 128;
template <int kFeatures, int kStages>
struct WarpgroupTile {
  static constexpr int kStage = (kPlaces + kFeatures) * kSwizzledRow;
  static constexpr size_t kBytes = kSwizzledAlignment + kStages * kStage + kPlaces * sizeof(int4);
};

template <int kFeatures, int kStages, int kAhead>
__device__ __forceinline__ void MultiplyTile(const Windows& s, bool backward, const Slots& slots,
                                             const StoredBf16* __restrict__ source,
                                             const uint4* __restrict__ weights,
                                             const float* __restrict__ bias, bool relu,
                                             void* __restrict__ result) {
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

  float sums[kFeatures / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kCopied; ++step) {
    if (step < steps) copy_places(step);
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
    }
    CommitCopies();
    WaitForProducts<kAhead>();
  }
  WaitForProducts<0>();
  KeepSums(sums);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = places[warp * 16 + half * 8 + lane / 4].z;
    if (at >= 0) FinishPlace(s, first_feature, bias, relu, result, sums, half, at);
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

// Any number of rows.
void MultiplyAllByWarpgroups(const Queue& q, Windows s, bool backward, int64_t rows,
                             const StoredBf16* source, const uint4* weights, const float* bias,
                             bool relu, void* result) {
  const int64_t source_row = int64_t{s.source_height} * s.source_width * s.channels;
  const int64_t result_row = int64_t{s.height} * s.width * s.features;
  const int steps = SlotsOf(s, backward).steps();
  s.wide = IsAligned16(source);
  s.wide_result = IsAligned16(result);
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(source_row, result_row));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    // Of the first phase, the largest.
    const int64_t tiles = CeilDiv(
        int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases), kPlaces);
    // Of many terms it is what comes to shared memory that takes the time, which is less for a wide
    // tile; but each multiprocessor is to have two.
    const bool wide = s.features % 256 == 0 && steps >= 16 &&
                      tiles * (s.features / 256) >= 2 * WarpgroupProcessors();
    const auto launch = s.features % 128 != 0 ? LaunchTiles<64, 3, 0, 3>
                        : wide                ? LaunchTiles<256, 4, 1, 1>
                                              : LaunchTiles<128, 3, 0, 2>;
    launch(q, s, backward, tiles, source + row * source_row, weights, bias, relu,
           static_cast<char*>(result) + row * result_row * ElementBytes(s.result_type));
  }
}

}  // namespace lockstep::device::cuda
