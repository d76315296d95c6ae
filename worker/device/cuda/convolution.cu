// Convolutions in fp32 as products of matrices that are not written out (implicit GEMM): tiles in
// shared memory, the next one on its way in registers while the threads multiply the present one.
//
// Orders, which are all that bits depend on:
//  - y and dx: an element's terms run over (kh, kw, channel) in steps of kDepth. The two halves of
//    a step are summed apart, by two groups of threads, and added in the end. Tiles do not matter,
//    nor how many rows there are.
//  - dw: a leaf's places (row, oh, ow) are cut into chunks by its rows and the shape, a chunk is
//    summed by as many groups of threads as the shape says, and chunks are added by SumChunks.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/leaf_chunks.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kDepth = 16;  // of a tile, in terms of the sum

__device__ __forceinline__ void Unpack(float4 v, float* to) {
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}

// ---- y and dx.

// A tile of shared memory has kDepth rows of columns; the columns of row k are exchanged in eights
// so that a quad of rows is written, and a row read, without conflicts of banks.
template <int kColumns>
__device__ __forceinline__ int Exchanged(int k, int column) {
  constexpr int kMask = kColumns >= 32 ? 3 : kColumns / 8 - 1;
  return column ^ (((k >> 2) & kMask) << 3);
}
template <int kColumns>
__device__ __forceinline__ void StoreDown(float* tile, int k, int column, float4 v) {
  float* const to = tile + k * kColumns + Exchanged<kColumns>(k, column);
  to[0] = v.x;
  to[kColumns] = v.y;
  to[2 * kColumns] = v.z;
  to[3 * kColumns] = v.w;
}

template <int kPlaces, int kFeatures, int kAcross>
struct WindowTile {
  static constexpr int kGroup = kPlaces / 8 * (kFeatures / kAcross);  // threads that make the tile
  static constexpr int kThreads = 2 * kGroup;
  static constexpr int kStage = kDepth * (kPlaces + kFeatures);
  // Of a multiprocessor; 0: as many as there are registers for.
  static constexpr int BlocksAtOnce(bool backward) { return kAcross == 8 && !backward ? 2 : 0; }
  static constexpr int kFloats = std::max(2 * kStage, kThreads* kAcross * 4);
  static constexpr size_t kBytes = kFloats * sizeof(float) + kPlaces * sizeof(int4);
};

// A block makes kPlaces x kFeatures, a thread 8 x kAcross in half of the terms. kFlat: steps run
// through taps and channels without a seam, element by element; else a step is in one tap, by four
// channels. The order differs, so it is the shape that decides.
template <int kPlaces, int kFeatures, int kAcross, bool kBackward, bool kFlat>
__global__ void __launch_bounds__(WindowTile<kPlaces, kFeatures, kAcross>::kThreads,
                                  WindowTile<kPlaces, kFeatures, kAcross>::BlocksAtOnce(kBackward))
    MultiplyWindows(Windows s, const float* __restrict__ source, const float* __restrict__ weights,
                    const float* __restrict__ bias, bool relu, float* __restrict__ result) {
  WaitForPrevious();
  using Tile = WindowTile<kPlaces, kFeatures, kAcross>;
  constexpr int kThreads = Tile::kThreads, kGroup = Tile::kGroup, kStage = Tile::kStage;
  float* const shared = SharedMemory<float>();
  // By place: where its window begins in the source (element, y, x), and its element of the result.
  int4* const places = reinterpret_cast<int4*>(shared + Tile::kFloats);
  const int thread = static_cast<int>(threadIdx.x);
  const int phase_y = kBackward ? static_cast<int>(blockIdx.z) / s.phases : 0;
  const int phase_x = kBackward ? static_cast<int>(blockIdx.z) % s.phases : 0;
  const Axis axis_y = AxisOf<kBackward>(s, s.height, phase_y);
  const Axis axis_x = AxisOf<kBackward>(s, s.width, phase_x);
  const int all = s.rows * axis_y.count * axis_x.count;
  const int first_place = static_cast<int>(blockIdx.x) * kPlaces;
  if (first_place >= all) return;
  const int first_feature = static_cast<int>(blockIdx.y) * kFeatures;

  for (int i = thread; i < kPlaces; i += kThreads) {
    int4 place = make_int4(0, -(1 << 29), 0, -1);
    int at = first_place + i;
    if (at < all) {
      const int x = at % axis_x.count;
      at /= axis_x.count;
      const int y = at % axis_y.count, row = at / axis_y.count;
      place.y = y * axis_y.scale + axis_y.begin;
      place.z = x * axis_x.scale + axis_x.begin;
      place.x = ((row * s.source_height + place.y) * s.source_width + place.z) * s.channels;
      place.w = ((row * s.height + y * s.phases + phase_y) * s.width + x * s.phases + phase_x) *
                s.features;
    }
    places[i] = place;
  }
  __syncthreads();

  // What is on its way of the next tile.
  constexpr int kSourceQuads = kPlaces * 4 / kThreads;
  constexpr int kWeightQuads = (kFeatures * 4 + kThreads - 1) / kThreads;
  static_assert(kPlaces * 4 % kThreads == 0 && (!kFlat || kThreads % kPlaces == 0));
  float4 next_source[kSourceQuads];
  float4 next_weights[kWeightQuads];
  const int terms = s.kernel * s.kernel * s.channels;  // of a feature's weights
  const int tiles = kFlat ? (terms + kDepth - 1) / kDepth
                          : axis_y.taps * axis_x.taps * ((s.channels + kDepth - 1) / kDepth);
  int tap_y = 0, tap_x = 0, channel = 0, term = 0;  // of the next tile

  const auto load_by = [&](auto is_wide) {
    constexpr bool kWide = decltype(is_wide)::value;
    if constexpr (kFlat) {
      constexpr int kApart = kThreads / kPlaces;  // terms, from one of a thread to the next
      const int4 place = places[thread % kPlaces];
      float elements[kSourceQuads * 4];
#pragma unroll
      for (int i = 0; i < kSourceQuads * 4; ++i) {
        const int k = term + thread / kPlaces + i * kApart;
        uint32_t rest = static_cast<uint32_t>(k);
        const int c = static_cast<int>(s.by_channels.TakeRemainder(rest));
        const int kx = static_cast<int>(s.by_kernel.TakeRemainder(rest));
        const int move_y = static_cast<int>(rest) * s.dilation, move_x = kx * s.dilation;
        elements[i] = 0;
        if (k < terms && static_cast<unsigned>(place.y + move_y) < unsigned(s.source_height) &&
            static_cast<unsigned>(place.z + move_x) < unsigned(s.source_width)) {
          elements[i] =
              __ldg(source + (place.x + (move_y * s.source_width + move_x) * s.channels + c));
        }
      }
#pragma unroll
      for (int i = 0; i < kSourceQuads; ++i) {
        next_source[i] = make_float4(elements[4 * i], elements[4 * i + 1], elements[4 * i + 2],
                                     elements[4 * i + 3]);
      }
    } else {
      const int move_y = tap_y * s.tap_move, move_x = tap_x * s.tap_move;
      const int c = channel + thread % 4 * 4;
      const int move = (move_y * s.source_width + move_x) * s.channels + c;
#pragma unroll
      for (int i = 0; i < kSourceQuads; ++i) {
        const int4 place = places[thread / 4 + i * (kThreads / 4)];
        const bool inside = static_cast<unsigned>(place.y + move_y) < unsigned(s.source_height) &&
                            static_cast<unsigned>(place.z + move_x) < unsigned(s.source_width) &&
                            c < s.channels;
        next_source[i] = LoadFour<kWide>(source + (place.x + move), inside ? 4 : 0);
      }
    }
    const int tap =
        kFlat ? 0
              : (axis_y.first + tap_y * s.tap_step) * s.kernel + axis_x.first + tap_x * s.tap_step;
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int quad = thread + i * kThreads;
      if (quad >= kFeatures * 4) continue;
      if constexpr (kBackward) {
        const int feature = first_feature + quad % (kFeatures / 4) * 4;
        const int c = channel + quad / (kFeatures / 4);
        next_weights[i] = LoadFour<kWide>(
            weights + (static_cast<int64_t>(c) * s.kernel * s.kernel + tap) * s.features + feature,
            c < s.channels ? s.features - feature : 0);
      } else {
        const int feature = first_feature + quad / 4;
        const int k = kFlat ? term + quad % 4 * 4 : tap * s.channels + channel + quad % 4 * 4;
        const int left = kFlat ? terms - k : s.channels - (channel + quad % 4 * 4);
        next_weights[i] = LoadFour<kWide>(weights + static_cast<int64_t>(feature) * terms + k,
                                          feature < s.features ? left : 0);
      }
    }
  };
  const auto load = [&]() {
    if (!kFlat && s.wide) {
      load_by(std::true_type());
    } else {
      load_by(std::false_type());
    }
    term += kDepth;
    channel += kDepth;
    if (channel >= s.channels) {
      channel = 0;
      if (++tap_x == axis_x.taps) {
        tap_x = 0;
        ++tap_y;
      }
    }
  };
  const auto store = [&](float* stage) {
    if constexpr (kFlat) {
      constexpr int kApart = kThreads / kPlaces;
#pragma unroll
      for (int i = 0; i < kSourceQuads; ++i) {
        float elements[4];
        Unpack(next_source[i], elements);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int k = thread / kPlaces + (i * 4 + j) * kApart;
          stage[k * kPlaces + Exchanged<kPlaces>(k, thread % kPlaces)] = elements[j];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSourceQuads; ++i) {
        StoreDown<kPlaces>(stage, thread % 4 * 4, thread / 4 + i * (kThreads / 4), next_source[i]);
      }
    }
    float* const weight_stage = stage + kDepth * kPlaces;
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int quad = thread + i * kThreads;
      if (quad >= kFeatures * 4) continue;
      if constexpr (kBackward) {
        const int k = quad / (kFeatures / 4), column = quad % (kFeatures / 4) * 4;
        *reinterpret_cast<float4*>(weight_stage + k * kFeatures + Exchanged<kFeatures>(k, column)) =
            next_weights[i];
      } else {
        StoreDown<kFeatures>(weight_stage, quad % 4 * 4, quad / 4, next_weights[i]);
      }
    }
  };

  // A warp makes 8 by 4 of the threads' pieces.
  const int group = thread / kGroup, member = thread % kGroup;
  const int piece_down = member % 8 + member / 32 % (kPlaces / 64) * 8;
  const int piece_across = member / 8 % 4 + member / 32 / (kPlaces / 64) * 4;
  float sums[8][kAcross] = {};
  const auto multiply = [&](const float* stage) {
    const float* const place_stage = stage + group * (kDepth / 2) * kPlaces;
    const float* const weight_stage = stage + kDepth * kPlaces + group * (kDepth / 2) * kFeatures;
#pragma unroll
    for (int half = 0; half < kDepth / 2; half += 4) {
      const int k_of_exchange = group * (kDepth / 2) + half;
      const int down = Exchanged<kPlaces>(k_of_exchange, piece_down * 4);
      const int across = Exchanged<kFeatures>(k_of_exchange, piece_across * 4);
#pragma unroll
      for (int k = half; k < half + 4; ++k) {
        float a[8], b[kAcross];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Unpack(*reinterpret_cast<const float4*>(place_stage + k * kPlaces + i * (kPlaces / 2) +
                                                  down),
                 a + 4 * i);
        }
#pragma unroll
        for (int i = 0; i < kAcross / 4; ++i) {
          Unpack(*reinterpret_cast<const float4*>(weight_stage + k * kFeatures +
                                                  i * (kFeatures / 2) + across),
                 b + 4 * i);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) sums[i][j] = Fma(a[i], b[j], sums[i][j]);
        }
      }
    }
  };

  if (tiles > 0) {
    load();
    store(shared);
    __syncthreads();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load();
    multiply(shared + tile % 2 * kStage);
    if (tile + 1 < tiles) store(shared + (tile + 1) % 2 * kStage);
    __syncthreads();
  }

  // Each group gives the other its sums of one half of the places and finishes the other half.
  float4* const handed = reinterpret_cast<float4*>(shared);
  const auto hand = [&](auto first_row) {
    constexpr int kFirst = decltype(first_row)::value;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross / 4; ++j) {
        const float* const v = sums[kFirst + i] + 4 * j;
        handed[(group * kAcross + i * (kAcross / 4) + j) * kGroup + member] =
            make_float4(v[0], v[1], v[2], v[3]);
      }
    }
  };
  const auto finish = [&](auto first_row) {
    constexpr int kFirst = decltype(first_row)::value;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = places[kFirst / 4 * (kPlaces / 2) + piece_down * 4 + i].w;
      if (at < 0) continue;
#pragma unroll
      for (int j = 0; j < kAcross / 4; ++j) {
        const int feature = first_feature + j * (kFeatures / 2) + piece_across * 4;
        const float4 other =
            handed[((1 - group) * kAcross + i * (kAcross / 4) + j) * kGroup + member];
        float v[4], theirs[4];
        Unpack(other, theirs);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          v[n] = sums[kFirst + i][4 * j + n] + theirs[n];
          if (bias != nullptr && feature + n < s.features) v[n] = v[n] + __ldg(bias + feature + n);
          if (relu) v[n] = Relu(v[n]);
        }
        StoreFour(result + (at + feature), s.wide_result, s.features - feature,
                  make_float4(v[0], v[1], v[2], v[3]));
      }
    }
  };
  const std::integral_constant<int, 0> upper;
  const std::integral_constant<int, 4> lower;
  if (group == 0) {
    hand(lower);
  } else {
    hand(upper);
  }
  __syncthreads();
  if (group == 0) {
    finish(upper);
  } else {
    finish(lower);
  }
}

template <int kPlaces, int kFeatures, int kAcross, bool kBackward, bool kFlat>
void LaunchWindows(const Queue& q, const Windows& s, const float* source, const float* weights,
                   const float* bias, bool relu, float* result) {
  using Tile = WindowTile<kPlaces, kFeatures, kAcross>;
  // Of the first phase, the largest.
  const int64_t places = int64_t{s.rows} * CeilDiv(s.height, s.phases) * CeilDiv(s.width, s.phases);
  const dim3 grid(static_cast<uint32_t>(CeilDiv(places, kPlaces)),
                  static_cast<uint32_t>(CeilDiv(s.features, kFeatures)),
                  static_cast<uint32_t>(s.phases * s.phases));
  Launch(q, grid, dim3(Tile::kThreads), Tile::kBytes,
         MultiplyWindows<kPlaces, kFeatures, kAcross, kBackward, kFlat>, s, source, weights, bias,
         relu, result);
}

// Any number of rows. The tile does not change a bit.
template <bool kBackward, bool kFlat>
void MultiplyAllWindows(const Queue& q, Windows s, int64_t rows, const float* source,
                        const float* weights, const float* bias, bool relu, float* result) {
  const int64_t source_row = int64_t{s.source_height} * s.source_width * s.channels;
  const int64_t result_row = int64_t{s.height} * s.width * s.features;
  const int64_t weight_row = kBackward ? s.features : int64_t{s.kernel} * s.kernel * s.channels;
  s.wide = TakenByFour(weight_row, source, weights);
  s.wide_result = TakenByFour(s.features, result);
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(source_row, result_row));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    const float* const from = source + row * source_row;
    float* const to = result + row * result_row;
    const int64_t places = s.rows * int64_t{s.height} * s.width;
    if (s.features <= 16) {
      LaunchWindows<128, 16, 4, kBackward, kFlat>(q, s, from, weights, bias, relu, to);
    } else if (s.features <= 32) {
      LaunchWindows<128, 32, 4, kBackward, kFlat>(q, s, from, weights, bias, relu, to);
    } else if (kFlat || places / 128 * CeilDiv(s.features, 64) < 3 * 132) {
      LaunchWindows<64, 64, 4, kBackward, kFlat>(q, s, from, weights, bias, relu, to);
    } else if constexpr (!kFlat) {
      LaunchWindows<128, 64, 8, kBackward, kFlat>(q, s, from, weights, bias, relu, to);
    }
  }
}

// ---- dw: the product of dy and windows of x, over a chunk of the places of a leaf.

struct WeightGradient {
  int height, width, in, out;  // channels
  int kernel, stride, padding, dilation;
  int out_places;  // of a row
  int column_tiles;
  int columns;                        // taps and channels
  bool wide, wide_result;             // x and dy; the result
  int64_t leaf_stride, chunk_stride;  // of results, in floats
  Divisor by_width, by_height;        // of the output
  Divisor by_channels, by_kernel;
};

template <int kOut, int kColumns>
struct GradientTile {
  static constexpr int kThreads = kColumns % 9 == 0 ? 288 : 256;
  static constexpr int kGroup = kOut / 8 * (kColumns / 4);  // threads that make the tile
  static constexpr int kGroups = kThreads / kGroup;         // each in its part of a step's places
  static constexpr int kStage = kDepth * (kOut + kColumns);
  static constexpr size_t kBytes = std::max(2 * kStage, kThreads * 32) * sizeof(float);
  static_assert(kThreads % kGroup == 0 && kDepth % kGroups == 0);
};

// A block makes kOut x kColumns of one chunk of a leaf, a thread 8 x 4 of a part of its places.
// kFlat: columns are loaded one by one, where four are not channels of one tap.
template <int kOut, int kColumns, bool kFlat>
__global__ void __launch_bounds__(GradientTile<kOut, kColumns>::kThreads)
    MultiplyGradients(WeightGradient s, Chunks chunks, const float* __restrict__ x,
                      const float* __restrict__ dy, float* __restrict__ results) {
  WaitForPrevious();
  using Tile = GradientTile<kOut, kColumns>;
  constexpr int kThreads = Tile::kThreads, kGroup = Tile::kGroup, kGroups = Tile::kGroups;
  constexpr int kLoaders = kThreads / kDepth;  // of one place
  constexpr int kWidth = kFlat ? 1 : 4;        // of a load of x
  constexpr int kLoads = kColumns / kWidth / kLoaders;
  static_assert(kColumns / kWidth % kLoaders == 0 && kOut / 4 <= kLoaders);
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  if (mine.is_none) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int64_t first_row = mine.first_row;
  const int first_out = static_cast<int>(blockIdx.x) / s.column_tiles * kOut;
  const int first_column = static_cast<int>(blockIdx.x) % s.column_tiles * kColumns;
  x += first_row * s.height * s.width * s.in;
  dy += first_row * s.out_places * s.out;
  float* const shared = SharedMemory<float>();
  const int thread = static_cast<int>(threadIdx.x);

  // What this thread loads: of one place of each step, some columns, and a quad of dy.
  const int own_place = thread / kLoaders, loader = thread % kLoaders;
  int move_y[kLoads], move_x[kLoads], move[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int column = first_column + (loader + i * kLoaders) * kWidth;
    uint32_t rest = static_cast<uint32_t>(column);
    const int c = static_cast<int>(s.by_channels.TakeRemainder(rest));
    const int tap_x = static_cast<int>(s.by_kernel.TakeRemainder(rest));
    move_x[i] = tap_x * s.dilation;
    // A column that is none lies outside of the input.
    move_y[i] = column < s.columns ? static_cast<int>(rest) * s.dilation : 1 << 29;
    move[i] = column < s.columns ? (move_y[i] * s.width + move_x[i]) * s.in + c : 0;
  }
  const int own_out = first_out + loader * 4;
  const bool loads_dy = loader < kOut / 4;
  float4 next_dy, next_x[kLoads];
  const auto load_by = [&](auto is_wide, int place) {
    constexpr bool kWide = decltype(is_wide)::value;
    place += own_place;
    const bool is_place = place < end;
    uint32_t rest = static_cast<uint32_t>(is_place ? place : 0);
    const int out_x = static_cast<int>(s.by_width.TakeRemainder(rest));
    const int out_y = static_cast<int>(s.by_height.TakeRemainder(rest));
    const int y = is_place ? out_y * s.stride - s.padding : -(1 << 29);
    const int at_x = out_x * s.stride - s.padding;
    const float* const row = x + static_cast<int64_t>(rest) * (s.height * s.width * s.in);
    const int at = is_place ? (y * s.width + at_x) * s.in : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool inside = static_cast<unsigned>(y + move_y[i]) < static_cast<unsigned>(s.height) &&
                          static_cast<unsigned>(at_x + move_x[i]) < static_cast<unsigned>(s.width);
      if constexpr (kFlat) {
        next_x[i].x = inside ? __ldg(row + (at + move[i])) : 0.0f;
      } else {
        next_x[i] = LoadFour<kWide>(row + (at + move[i]), inside ? 4 : 0);
      }
    }
    if (loads_dy) {
      next_dy = LoadFour<kWide>(dy + static_cast<int64_t>(place) * s.out + own_out,
                                is_place ? s.out - own_out : 0);
    }
  };
  const auto load = [&](int place) {
    if (s.wide) {
      load_by(std::true_type(), place);
    } else {
      load_by(std::false_type(), place);
    }
  };
  const auto store = [&](float* stage) {
    float* const column_stage = stage + kDepth * kOut + own_place * kColumns;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = (loader + i * kLoaders) * kWidth;
      if constexpr (kFlat) {
        column_stage[column] = next_x[i].x;
      } else {
        *reinterpret_cast<float4*>(column_stage + column) = next_x[i];
      }
    }
    if (loads_dy) *reinterpret_cast<float4*>(stage + own_place * kOut + loader * 4) = next_dy;
  };

  constexpr int kOwnDepth = kDepth / kGroups;
  const int group = thread / kGroup, member = thread % kGroup;
  const int piece_down = member % (kOut / 8), piece_across = member / (kOut / 8);
  float sums[8][4] = {};
  const auto multiply = [&](const float* stage) {
    const float* const out_stage = stage + group * kOwnDepth * kOut + piece_down * 4;
    const float* const column_stage =
        stage + kDepth * kOut + group * kOwnDepth * kColumns + piece_across * 4;
#pragma unroll
    for (int k = 0; k < kOwnDepth; ++k) {
      float a[8], b[4];
      Unpack(*reinterpret_cast<const float4*>(out_stage + k * kOut), a);
      Unpack(*reinterpret_cast<const float4*>(out_stage + k * kOut + kOut / 2), a + 4);
      Unpack(*reinterpret_cast<const float4*>(column_stage + k * kColumns), b);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = Fma(a[i], b[j], sums[i][j]);
      }
    }
  };

  const int steps = (end - first + kDepth - 1) / kDepth;
  if (steps > 0) {
    load(first);
    store(shared);
    __syncthreads();
  }
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(first + (step + 1) * kDepth);
    multiply(shared + step % 2 * Tile::kStage);
    if (step + 1 < steps) store(shared + (step + 1) % 2 * Tile::kStage);
    __syncthreads();
  }

  // The groups' sums, added in their order.
  float4* const handed = reinterpret_cast<float4*>(shared);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    handed[(group * 8 + i) * kGroup + member] =
        make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
  __syncthreads();
  results += leaf * s.leaf_stride + chunk * s.chunk_stride;
  constexpr int kQuads = kColumns / 4;
  for (int i = thread; i < kOut * kQuads; i += kThreads) {
    const int own_row = i / kQuads, across = i % kQuads;
    const int down = own_row % (kOut / 2) / 4;
    const int own_quad = own_row / (kOut / 2) * 4 + own_row % 4;
    const int from = own_quad * kGroup + across * (kOut / 8) + down;
    float4 sum = handed[from];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
      const float4 more = handed[g * 8 * kGroup + from];
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    const int out = first_out + own_row, column = first_column + across * 4;
    if (out >= s.out) continue;
    StoreFour(results + static_cast<int64_t>(out) * s.columns + column, s.wide_result,
              s.columns - column, sum);
  }
}

// ---- groups, and what else there is no tile for: a thread an element.

// A factor, or its bf16 in a float.
template <bool kBf16>
__device__ __forceinline__ float FactorOf(float x) {
  return kBf16 ? RoundedToBf16(x) : x;
}

template <bool kBackward, bool kBf16>
__global__ void __launch_bounds__(256)
    ConvolveDirectly(Windows s, int groups, const float* __restrict__ source,
                     const float* __restrict__ weights, const float* __restrict__ bias, bool relu,
                     float* __restrict__ result) {
  WaitForPrevious();
  const int64_t element = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (element >= static_cast<int64_t>(s.rows) * s.height * s.width * s.features) return;
  uint32_t rest = static_cast<uint32_t>(element);
  const uint32_t features = static_cast<uint32_t>(s.features);
  const uint32_t width = static_cast<uint32_t>(s.width), height = static_cast<uint32_t>(s.height);
  const int feature = static_cast<int>(rest % features);
  rest /= features;
  const int at_x = static_cast<int>(rest % width);
  rest /= width;
  const int at_y = static_cast<int>(rest % height), row = static_cast<int>(rest / height);
  const int own_features = s.features / groups, own_channels = s.channels / groups;
  const int group = feature / own_features;
  float sum = 0;
  for (int ky = 0; ky < s.kernel; ++ky) {
    int y = kBackward ? at_y + s.padding - ky * s.dilation
                      : at_y * s.stride - s.padding + ky * s.dilation;
    if (kBackward && y % s.stride != 0) continue;
    if (kBackward) y /= s.stride;
    if (y < 0 || y >= s.source_height) continue;
    for (int kx = 0; kx < s.kernel; ++kx) {
      int at = kBackward ? at_x + s.padding - kx * s.dilation
                         : at_x * s.stride - s.padding + kx * s.dilation;
      if (kBackward && at % s.stride != 0) continue;
      if (kBackward) at /= s.stride;
      if (at < 0 || at >= s.source_width) continue;
      const float* const pixel = source +
                                 ((row * s.source_height + y) * s.source_width + at) * s.channels +
                                 group * own_channels;
      const int tap = ky * s.kernel + kx, taps = s.kernel * s.kernel;
      // w {out, taps, in of a group}.
      const float* w =
          kBackward
              ? weights + (static_cast<int64_t>(group * own_channels) * taps + tap) * own_features +
                    feature % own_features
              : weights + (static_cast<int64_t>(feature) * taps + tap) * own_channels;
      const int64_t step = kBackward ? int64_t{taps} * own_features : 1;
      for (int c = 0; c < own_channels; ++c, w += step) {
        sum = Fma(FactorOf<kBf16>(pixel[c]), FactorOf<kBf16>(*w), sum);
      }
    }
  }
  if (bias != nullptr) sum = sum + bias[feature];
  result[element] = relu ? Relu(sum) : sum;
}

template <bool kBackward>
void ConvolveAllDirectly(const Queue& q, Windows s, bool bf16, int64_t groups, int64_t rows,
                         const float* source, const float* weights, const float* bias, bool relu,
                         float* result) {
  const int64_t source_row = int64_t{s.source_height} * s.source_width * s.channels;
  const int64_t result_row = int64_t{s.height} * s.width * s.features;
  const int64_t most = std::max<int64_t>(1, kPartElements / std::max(source_row, result_row));
  for (int64_t row = 0; row < rows; row += most) {
    s.rows = static_cast<int>(std::min(most, rows - row));
    Launch(q, dim3(static_cast<uint32_t>(CeilDiv(s.rows * result_row, 256))), dim3(256), 0,
           bf16 ? ConvolveDirectly<kBackward, true> : ConvolveDirectly<kBackward, false>, s,
           static_cast<int>(groups), source + row * source_row, weights, bias, relu,
           result + row * result_row);
  }
}

template <bool kBf16>
__global__ void __launch_bounds__(256)
    GradientsDirectly(WeightGradient s, Chunks chunks, int groups, const float* __restrict__ x,
                      const float* __restrict__ dy, float* __restrict__ results) {
  WaitForPrevious();
  const OwnChunk mine = ChunkOfBlock(chunks, s.out_places);
  const int element = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  if (mine.is_none || element >= s.out * s.columns) return;
  const int leaf = mine.leaf, chunk = mine.chunk, first = mine.first, end = mine.end;
  const int64_t first_row = mine.first_row;
  const int out = element / s.columns;
  uint32_t rest = static_cast<uint32_t>(element % s.columns);
  const int own_in = s.in / groups;
  const int c =
      static_cast<int>(s.by_channels.TakeRemainder(rest)) + out / (s.out / groups) * own_in;
  const int move_x = static_cast<int>(s.by_kernel.TakeRemainder(rest)) * s.dilation - s.padding;
  const int move_y = static_cast<int>(rest) * s.dilation - s.padding;
  x += first_row * s.height * s.width * s.in + c;
  dy += first_row * s.out_places * s.out + out;
  float sum = 0;
  for (int place = first; place < end; ++place) {
    uint32_t at = static_cast<uint32_t>(place);
    const int at_x = static_cast<int>(s.by_width.TakeRemainder(at)) * s.stride + move_x;
    const int at_y = static_cast<int>(s.by_height.TakeRemainder(at)) * s.stride + move_y;
    if (at_y < 0 || at_y >= s.height || at_x < 0 || at_x >= s.width) continue;
    const int64_t pixel = (static_cast<int64_t>(at) * s.height + at_y) * s.width + at_x;
    sum = Fma(FactorOf<kBf16>(dy[static_cast<int64_t>(place) * s.out]),
              FactorOf<kBf16>(x[pixel * s.in]), sum);
  }
  results[leaf * s.leaf_stride + chunk * s.chunk_stride + element] = sum;
}

// ---- the chunks of a leaf, added up.

constexpr int kSlices = 8;  // of the chunks: chunk c is of slice c % kSlices

// A block has kWarp vectors of a leaf's gradient, and a warp a slice of the chunks.
template <int kLanes>
__global__ void __launch_bounds__(kWarp* kSlices)
    AddChunks(Chunks chunks, int out_places, int vectors, int64_t leaf_stride, int64_t chunk_stride,
              const float* __restrict__ partial, float* __restrict__ dw, int64_t stride) {
  WaitForPrevious();
  const int leaf = static_cast<int>(blockIdx.y);
  const int64_t places = (chunks.begin[leaf + 1] - chunks.begin[leaf]) * out_places;
  const int count = static_cast<int>((places + chunks.places[leaf] - 1) / chunks.places[leaf]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int slice = static_cast<int>(threadIdx.x) / kWarp;
  const int vector = static_cast<int>(blockIdx.x) * kWarp + lane;
  Lanes<kLanes>* const handed = SharedMemory<Lanes<kLanes>>();
  Lanes<kLanes> sum = {};
  if (vector < vectors) {
    const float* const from = partial + leaf * leaf_stride + static_cast<int64_t>(vector) * kLanes;
#pragma unroll 4
    for (int chunk = slice; chunk < count; chunk += kSlices) {
      const Lanes<kLanes> v = LoadLanes<kLanes>(from + chunk * chunk_stride);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) sum.at[j] = sum.at[j] + v.at[j];
    }
  }
  handed[slice * kWarp + lane] = sum;
  __syncthreads();
  if (slice > 0 || vector >= vectors) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) {
    const Lanes<kLanes> v = handed[other * kWarp + lane];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) sum.at[j] = sum.at[j] + v.at[j];
  }
  StoreLanes<kLanes>(dw + leaf * stride + static_cast<int64_t>(vector) * kLanes, sum);
}

template <int kOut, int kColumns, bool kFlat>
void LaunchGradients(const Queue& q, WeightGradient s, const Chunks& leaves, uint32_t chunks,
                     const float* x, const float* dy, float* results) {
  s.column_tiles = static_cast<int>(CeilDiv(s.columns, kColumns));
  const dim3 grid(static_cast<uint32_t>(CeilDiv(s.out, kOut) * s.column_tiles), chunks,
                  static_cast<uint32_t>(leaves.count));
  using Tile = GradientTile<kOut, kColumns>;
  Launch(q, grid, dim3(Tile::kThreads), Tile::kBytes, MultiplyGradients<kOut, kColumns, kFlat>, s,
         leaves, x, dy, results);
}

template <int kColumns, bool kFlat>
void LaunchGradientsBy(const Queue& q, int rows_of_tile, const WeightGradient& s,
                       const Chunks& leaves, uint32_t chunks, const float* x, const float* dy,
                       float* results) {
  const auto launch = rows_of_tile == 16   ? LaunchGradients<16, kColumns, kFlat>
                      : rows_of_tile == 32 ? LaunchGradients<32, kColumns, kFlat>
                                           : LaunchGradients<64, kColumns, kFlat>;
  launch(q, s, leaves, chunks, x, dy, results);
}

}  // namespace

void SumChunks(const Queue& q, const Chunks& chunks, int64_t out_places, int64_t elements,
               const float* partial, int64_t leaf_stride, float* dw, int64_t stride) {
  const bool by_four = TakenByFour(elements, dw) && stride % 4 == 0;
  const int64_t vectors = by_four ? elements / 4 : elements;
  Launch(q,
         dim3(static_cast<uint32_t>(CeilDiv(vectors, kWarp)), static_cast<uint32_t>(chunks.count)),
         dim3(kWarp * kSlices), kWarp * kSlices * (by_four ? 16 : 4),
         by_four ? AddChunks<4> : AddChunks<1>, chunks, static_cast<int>(out_places),
         static_cast<int>(vectors), leaf_stride, elements, partial, dw, stride);
}

void ConvolutionForward(const Queue& q, const Conv2dShape& s, int64_t rows, const float* x,
                        const float* w, const float* bias, bool relu, float* y) {
  const Windows windows = WindowsOf(s);
  const bool bf16 = s.precision == Precision::kBf16;
  if (s.groups > 1 || bf16) {
    ConvolveAllDirectly<false>(q, windows, bf16, s.groups, rows, x, w, bias, relu, y);
  } else if (s.in % 4 == 0) {
    MultiplyAllWindows<false, false>(q, windows, rows, x, w, bias, relu, y);
  } else {
    MultiplyAllWindows<false, true>(q, windows, rows, x, w, bias, relu, y);
  }
}

void ConvolutionBackwardInput(const Queue& q, const Conv2dShape& s, int64_t rows, const float* dy,
                              const float* w, float* dx) {
  const Windows windows = BackwardWindowsOf(s);
  const bool bf16 = s.precision == Precision::kBf16;
  if (s.groups > 1 || bf16 || s.out % 4 != 0 || s.stride > 64) {
    ConvolveAllDirectly<true>(q, windows, bf16, s.groups, rows, dy, w, nullptr, false, dx);
  } else {
    MultiplyAllWindows<true, false>(q, windows, rows, dy, w, nullptr, false, dx);
  }
}

void ConvolutionBackwardWeight(const Queue& q, const Conv2dShape& s, const Leaves& leaves,
                               const float* x, const float* dy, float* dw, int64_t stride) {
  const int64_t own_in = s.in / s.groups;
  const int64_t columns = s.kernel * s.kernel * own_in, elements = s.out * columns;
  const int64_t out_places = s.out_height() * s.out_width();

  // The tile, and from it how far a leaf is cut, so that 16 rows make some 32 blocks.
  const bool bf16 = s.precision == Precision::kBf16;
  const bool direct = s.groups > 1 || bf16, flat = s.in % 4 != 0;
  const int out_tile = s.out <= 16 ? 16 : s.out <= 32 ? 32 : 64;
  const bool by_nines = !flat && RoundUp(columns, 144) <= RoundUp(columns, 64);
  const int column_tile = flat ? 32 : by_nines ? 144 : 64;
  const int64_t tiles =
      direct ? CeilDiv(elements, 256) : CeilDiv(s.out, out_tile) * CeilDiv(columns, column_tile);
  const int64_t wanted = std::max<int64_t>(64, direct ? out_places / 8 : out_places * tiles / 2);
  WeightGradient g = {static_cast<int>(s.height),
                      static_cast<int>(s.width),
                      static_cast<int>(s.in),
                      static_cast<int>(s.out),
                      static_cast<int>(s.kernel),
                      static_cast<int>(s.stride),
                      static_cast<int>(s.padding),
                      static_cast<int>(s.dilation),
                      static_cast<int>(out_places),
                      0,
                      static_cast<int>(columns),
                      (flat || IsAligned16(x)) && TakenByFour(s.out, dy),
                      false,
                      0,
                      elements,
                      Divisor(s.out_width()),
                      Divisor(s.out_height()),
                      Divisor(own_in),
                      Divisor(s.kernel)};
  const auto multiply = [&](const Chunks& part, uint32_t chunks, float* results,
                            int64_t leaf_stride) {
    g.leaf_stride = leaf_stride;
    g.wide_result = columns % 4 == 0 && leaf_stride % 4 == 0 && IsAligned16(results);
    if (direct) {
      const dim3 grid(static_cast<uint32_t>(tiles), chunks, static_cast<uint32_t>(part.count));
      Launch(q, grid, dim3(256), 0, bf16 ? GradientsDirectly<true> : GradientsDirectly<false>, g,
             part, static_cast<int>(s.groups), x, dy, results);
    } else if (flat) {
      LaunchGradientsBy<32, true>(q, out_tile, g, part, chunks, x, dy, results);
    } else if (by_nines) {
      LaunchGradientsBy<144, false>(q, out_tile, g, part, chunks, x, dy, results);
    } else {
      LaunchGradientsBy<64, false>(q, out_tile, g, part, chunks, x, dy, results);
    }
  };
  constexpr int64_t kFloats = kWorkspaceBytes / sizeof(float);
  const PartialSums partial = {static_cast<float*>(q.workspace), kFloats, kFloats};
  SumOverPlaces(q, leaves, out_places, wanted, kDepth, elements, partial, dw, stride, multiply);
}

}  // namespace lockstep::device::cuda
