// y and dx of bf16 convolutions that keep the size (tensor_convolution.cu): place i of the result
// is the middle of its window, pixel i of the source. The pixels round a tile's places are a run,
// of which a block of channels is kept in shared memory, and every tap multiplies rows of it. In
// the order of MultiplyWindows. What is stored as bf16 goes there as it is, in the background.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/tensor_convolution.h"

namespace lockstep::device::cuda {
namespace {

template <class T, int kFeatures, int kDown, int kAcross, int kHalves>
struct RunTile {
  static constexpr int kPlaces = 128;
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kSteps = 128 / kFeatures;  // rows of terms of the weights, of a stage
  static constexpr int kStage = kSteps * kFeatures * kRowBytes;
  static constexpr int kBlocks = kFeatures >= 128                               ? 2
                                 : kFeatures == 64 || kFeatures * kHalves == 64 ? 3
                                 : kFeatures * kHalves == 16                    ? 5
                                                                                : 4;
  // Stages of weights in memory, at most: so many that the next block's run, which is copied beside
  // the first stage of the present one, is waited for in time.
  static constexpr bool kStored = sizeof(T) < sizeof(float);
  static constexpr int kBuffers = kStored && kFeatures >= 32 ? 4 : 2;
  // Of a thread at once, of the next block's run beside a stage.
  static constexpr int kLoads = kFeatures >= 128 ? 2 : kFeatures == 64 ? 4 : 8;
};

// What of a run a shape makes, and its memory.
struct Runs {
  int pixels;           // of a run
  int reach;            // pixels in front of the first place
  int stages, buffers;  // of weights: in a block of channels, in memory
  int loads;            // of a thread, of a run
  int runs_at, zeros_at, taps_at, bytes;
};

// kHalves: of a row of terms, that a pixel's channels of a block fill.
template <class Factor, class T, int kFeatures, int kDown, int kAcross, int kHalves>
__global__ void __launch_bounds__(RunTile<T, kFeatures, kDown, kAcross, kHalves>::kThreads,
                                  RunTile<T, kFeatures, kDown, kAcross, kHalves>::kBlocks)
    MultiplyRuns(Windows s, Terms terms, Runs runs, bool backward, const T* __restrict__ source,
                 const uint4* __restrict__ weights, const float* __restrict__ bias, bool relu,
                 void* __restrict__ result) {
  WaitForPrevious();
  using Tile = RunTile<T, kFeatures, kDown, kAcross, kHalves>;
  constexpr int kThreads = Tile::kThreads, kPlaces = Tile::kPlaces, kSteps = Tile::kSteps;
  constexpr int kPixelBytes = kHalves * kRowBytes / 2, kPixelQuads = kHalves * Factor::kQuads / 2;
  constexpr int kPieces = kFeatures * 4;  // of 16 bytes, of a row of terms of the weights
  constexpr int kTilesDown = kPlaces / kDown / 16, kTilesAcross = kFeatures / kAcross / 16;
  using Quad = typename Factor::Quad;
  char* const shared = SharedMemory<char>();
  char* const run = shared + runs.runs_at;
  int* const inside_of = reinterpret_cast<int*>(shared + runs.taps_at);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const int tiles_of_group = terms.padded / kFeatures;
  const int tiles_of_places = tiles_of_group * terms.groups;
  const int own_tile = static_cast<int>(blockIdx.x) % tiles_of_places;
  const int group = own_tile / tiles_of_group;
  const int first_feature = own_tile % tiles_of_group * kFeatures;  // of the group
  const int first_place = static_cast<int>(blockIdx.x) / tiles_of_places * kPlaces;
  const int all = s.rows * s.height * s.width;
  const int first_pixel = first_place - runs.reach;
  source += group * terms.channels;
  weights += (static_cast<int64_t>(group) * terms.steps * terms.padded + first_feature) * 4;

  const int taps = s.kernel * s.kernel;
  const int blocks = terms.channels >> (terms.shift + 2);
  const int steps_of_block = kHalves == 2 ? taps : (taps + 1) / 2;
  const int stages = blocks * runs.stages;

  // This thread's pieces of a stage of weights: `kStepsApart` steps or part of one from each other.
  constexpr int kOfStep = kPieces > kThreads ? kPieces / kThreads : 1;
  constexpr int kStepsApart = kPieces > kThreads ? 1 : kThreads / kPieces;
  const int step_pieces = terms.padded * 4, own_step = thread / kPieces;
  weights += own_step * step_pieces + thread % kPieces;
  const int weights_at = (thread / 4 * 4 + PieceAt(thread / 4, thread % 4)) * 16;
  const auto copy_weights = [&](int stage, int first_step, int steps) {
    char* const to = shared + (stage & (runs.buffers - 1)) * Tile::kStage + weights_at;
    const uint4* const from = weights + static_cast<int64_t>(first_step) * step_pieces;
#pragma unroll
    for (int i = 0; i < kSteps * kPieces / kThreads; ++i) {
      const int step = i / kOfStep * kStepsApart;
      if (step + own_step >= steps) continue;
      CopyInBackground(to + i * kThreads * 16,
                       from + (step * step_pieces + i % kOfStep * kThreads));
    }
  };
  // The step that a stage begins with, and how many are left of its block.
  const auto copy_stage = [&](int stage) {
    const int first_step = stage % runs.stages * kSteps;
    copy_weights(stage, stage / runs.stages * steps_of_block + first_step,
                 steps_of_block - first_step);
  };
  // Eight pixels of one piece, wherever they begin, are in different banks.
  const auto at_pixel = [](int pixel, int piece) {
    const int turned = kHalves == 2 ? piece ^ (pixel >> 1 & 3) : piece ^ (pixel >> 2 & 1);
    return pixel * kPixelBytes + turned * 16;
  };
  // Loads `first` and on of this thread's, of the run of a block of channels.
  constexpr int kPixelsApart = kThreads / kPixelQuads;  // which turns no piece
  const int own_pixel = thread / kPixelQuads, own_quad = thread % kPixelQuads;
  const int own_bytes = own_quad * static_cast<int>(sizeof(Quad));
  char* const own_run = run + at_pixel(own_pixel, own_bytes / 16) + own_bytes % 16;
  const auto load_run_by = [&](auto is_wide, auto& next, int block, int first, int count) {
    constexpr int kCount = static_cast<int>(sizeof(next) / sizeof(next[0]));
    const int pixel = own_pixel + first * kPixelsApart, at = first_pixel + pixel;
    const int begin = at * s.channels + (block * kPixelQuads + own_quad) * 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool inside = i < count && pixel + i * kPixelsApart < runs.pixels &&
                          static_cast<unsigned>(at + i * kPixelsApart) < static_cast<unsigned>(all);
      next[i] = LoadStored<decltype(is_wide)::value>(
          source + (begin + i * kPixelsApart * s.channels), inside ? 4 : 0);
    }
  };
  const auto load_run = [&](auto& next, int block, int first, int count) {
    if (s.wide) {
      load_run_by(std::true_type(), next, block, first, count);
    } else {
      load_run_by(std::false_type(), next, block, first, count);
    }
  };
  const auto store_run = [&](const auto& next, int block, int first, int count) {
    constexpr int kCount = static_cast<int>(sizeof(next) / sizeof(next[0]));
    const int pixel = own_pixel + first * kPixelsApart;
    char* const to = own_run + ((block & 1) * runs.pixels + first * kPixelsApart) * kPixelBytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count || pixel + i * kPixelsApart >= runs.pixels) continue;
      *reinterpret_cast<Quad*>(to + i * kPixelsApart * kPixelBytes) = Factor::Round(next[i]);
    }
  };
  static_assert(kPixelsApart % 8 == 0);
  // All of it, as it is stored.
  const auto copy_run = [&](int block) {
    constexpr int kPixelPieces = kPixelBytes / 16;
    char* const to = run + (block & 1) * runs.pixels * kPixelBytes;
    for (int i = thread; i < runs.pixels * kPixelPieces; i += kThreads) {
      const int pixel = i / kPixelPieces, piece = i % kPixelPieces, at = first_pixel + pixel;
      const bool inside = static_cast<unsigned>(at) < static_cast<unsigned>(all);
      const int from = at * s.channels + (block * kPixelPieces + piece) * 8;
      CopyOrZeroInBackground(to + at_pixel(pixel, piece), source + (inside ? from : 0), inside);
    }
  };

  if constexpr (Tile::kStored) {
    copy_run(0);
#pragma unroll
    for (int stage = 0; stage < Tile::kBuffers - 1; ++stage) {
      if (stage < stages) copy_stage(stage);
      CommitCopies();
    }
  } else {
    copy_weights(0, 0, steps_of_block);
    constexpr int kLoads = kFeatures >= 64 ? 16 : 8;  // at once
    for (int first = 0; first < runs.loads; first += kLoads) {
      Four<T> next[kLoads];
      load_run(next, 0, first, runs.loads - first);
      store_run(next, 0, first, runs.loads - first);
    }
  }
  const int begin = backward ? s.padding : -s.padding;
  {
    static_assert(kThreads == kPlaces);
    const uint32_t at = static_cast<uint32_t>(first_place + thread);
    const int x = static_cast<int>(at % static_cast<uint32_t>(s.width)) + begin;
    const int y =
        static_cast<int>(at / static_cast<uint32_t>(s.width) % static_cast<uint32_t>(s.height)) +
        begin;
    int inside = 0;
    for (int tap = 0; tap < s.kernel; ++tap) {
      const int move = tap * s.tap_move;
      if (static_cast<unsigned>(y + move) < static_cast<unsigned>(s.height)) inside |= 1 << tap;
      if (static_cast<unsigned>(x + move) < static_cast<unsigned>(s.width)) {
        inside |= 1 << (tap + 16);
      }
    }
    inside_of[thread] = inside;
  }
  if (thread < kRowBytes / 4) reinterpret_cast<int*>(shared + runs.zeros_at)[thread] = 0;
  if constexpr (!Tile::kStored) WaitForCopies();
  __syncthreads();

  // The places, and the row of the weights, that this lane names to the instruction that loads.
  const int warp_down = warp % kDown * (kPlaces / kDown);
  const int warp_across = warp / kDown * (kFeatures / kAcross);
  const int own_place = warp_down + lane % 16, own_piece = lane / 16;
  int inside[kTilesDown];
#pragma unroll
  for (int i = 0; i < kTilesDown; ++i) inside[i] = inside_of[own_place + i * 16];
  const int across_row = warp_across + lane / 16 * 8 + lane % 8;
  const int across_at = across_row * kRowBytes + PieceAt(across_row, lane / 8 % 2) * 16;

  float sums[kTilesDown][2 * kTilesAcross][4] = {};
  int tap_y = 0, tap_x = 0;
  const auto multiply = [&](int run_at, const char* stage) {
    int down_at[kTilesDown];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || kHalves == 1) {
        const int move = ((begin + tap_y * s.tap_move) * s.width + begin + tap_x * s.tap_move) +
                         runs.reach + own_place;
        // Behind the last tap none is inside.
        const int bits = tap_y < s.kernel ? 1 << tap_y | 1 << (tap_x + 16) : -1;
#pragma unroll
        for (int i = 0; i < kTilesDown; ++i) {
          down_at[i] = (inside[i] & bits) == bits ? run_at + at_pixel(move + i * 16, own_piece)
                                                  : runs.zeros_at + own_piece * 16;
        }
        if (++tap_x == s.kernel) {
          tap_x = 0;
          ++tap_y;
        }
      }
      uint4 down[kTilesDown], across[kTilesAcross];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        const bool second = kHalves == 2 && half == 1;
        down[i] = LoadMatrices(shared + (down_at[i] ^ (second ? 32 : 0)));
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

  const int loads_of_stage = (runs.loads + runs.stages - 1) / runs.stages;
  int block = 0, of_block = 0;  // the stage in its block
  for (int stage = 0; stage < stages; ++stage) {
    const int left = steps_of_block - of_block * kSteps;  // steps, of the block
    const int first_load = of_block * loads_of_stage;
    const int loads = block + 1 < blocks ? min(loads_of_stage, runs.loads - first_load) : 0;
    Four<T> next[Tile::kLoads] = {};
    if constexpr (Tile::kStored) {
      WaitForGroups<Tile::kBuffers - 2>();
      __syncthreads();
      if (stage + Tile::kBuffers - 1 < stages) copy_stage(stage + Tile::kBuffers - 1);
      if (of_block == 0 && block + 1 < blocks) copy_run(block + 1);
      CommitCopies();
    } else {
      if (stage + 1 < stages) copy_stage(stage + 1);
      if (loads > 0) load_run(next, block + 1, first_load, loads);
    }
    const char* const now = shared + (stage & (runs.buffers - 1)) * Tile::kStage;
    const int run_at = runs.runs_at + (block & 1) * (runs.pixels * kPixelBytes);
    for (int step = 0; step < min(kSteps, left); ++step) {
      multiply(run_at, now + step * kFeatures * kRowBytes);
    }
    if constexpr (!Tile::kStored) {
      if (loads > 0) store_run(next, block + 1, first_load, loads);
      WaitForCopies();
      __syncthreads();
    }
    if (++of_block == runs.stages) {
      of_block = 0;
      ++block;
      tap_y = tap_x = 0;
    }
  }

  Finish<kTilesDown, kTilesAcross>(s, terms, group, first_feature + warp_across, bias, relu, result,
                                   sums, [&](int row) {
                                     const int place = first_place + warp_down + row;
                                     return place < all ? place * s.features : -1;
                                   });
}

// Whether the shape, of Windows of one phase, goes by runs, and how.
template <class T, int kFeatures, int kDown, int kAcross, int kHalves>
bool MakeRuns(const Windows& s, const Terms& terms, Runs* runs) {
  using Tile = RunTile<T, kFeatures, kDown, kAcross, kHalves>;
  const int64_t reach = int64_t{s.padding} * (s.width + 1);
  const int64_t pixels = Tile::kPlaces + 2 * reach;
  const int taps = s.kernel * s.kernel;
  const int steps = kHalves == 2 ? taps : (taps + 1) / 2,
            blocks = terms.channels >> (terms.shift + 2);
  runs->stages = static_cast<int>(CeilDiv(steps, Tile::kSteps));
  runs->buffers = blocks * runs->stages > 1 ? Tile::kBuffers : 1;
  runs->reach = static_cast<int>(reach);
  const int64_t run_bytes = pixels * kHalves * kRowBytes / 2;
  // Stages lie a whole stage apart.
  const int weight_steps =
      runs->buffers > 1 ? runs->buffers * Tile::kSteps : std::min(steps, Tile::kSteps);
  const int weight_bytes = weight_steps * kFeatures * kRowBytes;
  const int64_t bytes = weight_bytes + (blocks > 1 ? 2 : 1) * run_bytes + kRowBytes +
                        Tile::kPlaces * static_cast<int64_t>(sizeof(int));
  if (bytes > (Tile::kStored ? kMostStoredShared : kMostShared)) return false;
  runs->pixels = static_cast<int>(pixels);
  runs->loads = static_cast<int>(CeilDiv(pixels * kHalves * Bf16::kQuads / 2, Tile::kThreads));
  runs->runs_at = weight_bytes;
  runs->zeros_at = static_cast<int>(bytes) - kRowBytes - Tile::kPlaces * 4;
  runs->taps_at = static_cast<int>(bytes) - Tile::kPlaces * 4;
  runs->bytes = static_cast<int>(bytes);
  if (Tile::kStored) return blocks == 1 || runs->stages >= Tile::kBuffers - 1;
  return blocks == 1 || CeilDiv(runs->loads, runs->stages) <= Tile::kLoads;
}

template <class T, int kFeatures, int kDown, int kAcross, int kHalves>
bool LaunchRuns(const Queue& q, const Windows& s, const Terms& terms, bool backward,
                const T* source, const uint4* weights, const float* bias, bool relu, void* result) {
  using Tile = RunTile<T, kFeatures, kDown, kAcross, kHalves>;
  Runs runs;
  if (!MakeRuns<T, kFeatures, kDown, kAcross, kHalves>(s, terms, &runs)) return false;
  const int64_t places = int64_t{s.rows} * s.height * s.width;
  const int64_t tiles = CeilDiv(places, Tile::kPlaces) * (terms.padded / kFeatures) * terms.groups;
  const auto kernel = MultiplyRuns<Bf16, T, kFeatures, kDown, kAcross, kHalves>;
  AllowShared(kernel, static_cast<size_t>(runs.bytes));
  Launch(q, dim3(static_cast<uint32_t>(tiles)), dim3(Tile::kThreads),
         static_cast<size_t>(runs.bytes), kernel, s, terms, runs, backward, source, weights, bias,
         relu, result);
  return true;
}

}  // namespace

template <class T, int kHalves>
bool LaunchRunsOf(int tile, const Queue& q, const Windows& s, const Terms& terms, bool backward,
                  const T* source, const uint4* weights, const float* bias, bool relu,
                  void* result) {
  const auto launch = tile == 16   ? LaunchRuns<T, 16, 4, 1, kHalves>
                      : tile == 32 ? LaunchRuns<T, 32, 4, 1, kHalves>
                      : tile == 64 ? LaunchRuns<T, 64, 2, 2, kHalves>
                                   : LaunchRuns<T, 128, 2, 2, kHalves>;
  return launch(q, s, terms, backward, source, weights, bias, relu, result);
}

template bool LaunchRunsOf<float, 1>(int, const Queue&, const Windows&, const Terms&, bool,
                                     const float*, const uint4*, const float*, bool, void*);
template bool LaunchRunsOf<float, 2>(int, const Queue&, const Windows&, const Terms&, bool,
                                     const float*, const uint4*, const float*, bool, void*);
template bool LaunchRunsOf<StoredBf16, 1>(int, const Queue&, const Windows&, const Terms&, bool,
                                          const StoredBf16*, const uint4*, const float*, bool,
                                          void*);
template bool LaunchRunsOf<StoredBf16, 2>(int, const Queue&, const Windows&, const Terms&, bool,
                                          const StoredBf16*, const uint4*, const float*, bool,
                                          void*);

}  // namespace lockstep::device::cuda
