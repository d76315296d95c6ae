// All steps of one direction of an LSTM of few units, in one kernel. Samples do not meet: a block
// walks through the steps of its samples by itself, and keeps the recurrent weights where it
// computes, as persistent RNNs do (Diamos et al. 2016). A kernel for each step fetches them anew,
// and begins when all samples are through the step before.
//
// The order of a sum depends on the number of units alone, so a sample has the same bits however
// many share a block or a call.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kGates = 4;

__device__ __forceinline__ int TimeOf(const LstmWalk& w, int k) {
  return w.reversed ? w.steps - 1 - k : k;
}
// The element of {places, hidden} of a sample's unit at step k; those of the next sample and of the
// next step are RowOf and StepOf behind. Of {places, 4 hidden}, the unit's gate is element
// 4 * at + gate * hidden - 3 * unit.
__device__ __forceinline__ int64_t StateOf(const LstmWalk& w, int64_t row, int k, int unit) {
  return (row * w.steps + TimeOf(w, k)) * w.hidden + unit;
}
__device__ __forceinline__ int64_t RowOf(const LstmWalk& w) {
  return static_cast<int64_t>(w.steps) * w.hidden;
}
__device__ __forceinline__ int StepOf(const LstmWalk& w) {
  return w.reversed ? -w.hidden : w.hidden;
}
__device__ __forceinline__ bool HasOutput(const LstmWalk& w, int k) {
  return w.sequence || k + 1 == w.steps;
}
__device__ __forceinline__ int64_t OutputOf(const LstmWalk& w, int64_t row, int k) {
  return row * w.output_row + (w.sequence ? TimeOf(w, k) * w.output_step : 0);
}

// ---- fp32, on the ordinary units. Four lanes share a unit: lane `slice` has a quarter of the
// terms of the unit's sums. A thread's first weights are in registers, where there is room for
// about half of 128 units', the others in shared memory.
constexpr int kSlices = 4;
template <int kUnits, int kRows>
constexpr int kHeldForward = std::min(kUnits, kRows == 1 ? 64 : 48);
template <int kUnits, int kRows>
constexpr int kHeldBackward = std::min(kUnits, kRows == 1 ? 64 : 52);

__device__ __forceinline__ float DotFour(const float4& a, const float4& b, float sum) {
  sum = Fma(a.x, b.x, sum);
  sum = Fma(a.y, b.y, sum);
  sum = Fma(a.z, b.z, sum);
  return Fma(a.w, b.w, sum);
}
// The sum over the four lanes of what each has for gate `slice`.
__device__ __forceinline__ float SumForOwnGate(const float (&sums)[kGates], int slice) {
  const bool high = (slice & 2) != 0, odd = (slice & 1) != 0;
  const float even_gate =
      (high ? sums[2] : sums[0]) + __shfl_xor_sync(kAllLanes, high ? sums[0] : sums[2], 2);
  const float odd_gate =
      (high ? sums[3] : sums[1]) + __shfl_xor_sync(kAllLanes, high ? sums[1] : sums[3], 2);
  return (odd ? odd_gate : even_gate) + __shfl_xor_sync(kAllLanes, odd ? even_gate : odd_gate, 1);
}
__device__ __forceinline__ float4 FromSlices(float value) {
  return make_float4(
      __shfl_sync(kAllLanes, value, 0, kSlices), __shfl_sync(kAllLanes, value, 1, kSlices),
      __shfl_sync(kAllLanes, value, 2, kSlices), __shfl_sync(kAllLanes, value, 3, kSlices));
}

// What a sample hands to its next step, by slices of kTerms. The padding keeps the four places that
// a warp reads at once in different banks.
template <int kTerms>
struct Slices {
  static constexpr int kPlace = kTerms + 4;         // floats, from a slice to the next
  static constexpr int kSample = kSlices * kPlace;  // floats
  // Of a block with so many weights of each thread.
  static constexpr size_t SharedBytes(int threads, int rows, int weights) {
    return sizeof(float) * static_cast<size_t>(weights * threads + 2 * rows * kSample);
  }
};
__device__ __forceinline__ void FillWithZeros(float* p, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    p[i] = 0;
}

// Lane `slice` of a unit has terms [slice * kTerms, (slice + 1) * kTerms) of all its gates, then
// the whole of gate `slice`.
template <int kUnits, int kRows>
__global__ void __launch_bounds__(kUnits* kSlices, 1) ForwardWalk(const LstmWalk w, bool wide) {
  WaitForPrevious();
  constexpr int kTerms = kUnits / kSlices, kHeld = kHeldForward<kUnits, kRows> / kGates;
  using S = Slices<kTerms>;
  const int threads = static_cast<int>(blockDim.x), hidden = w.hidden;
  const int slice = static_cast<int>(threadIdx.x) % kSlices;
  const int unit = static_cast<int>(threadIdx.x) / kSlices;
  float4* const weights = SharedMemory<float4>();  // {quads of terms, gates, threads}
  float* const states = reinterpret_cast<float*>(weights + (kTerms - kHeld) * threads);

  const auto weight_quad = [&](int gate, int i) {
    const int first = slice * kTerms + i;
    const float* const p = static_cast<const float*>(w.weight) +
                           (static_cast<int64_t>(gate) * hidden + unit) * hidden + first;
    const int count = unit < hidden ? hidden - first : 0;
    return wide ? LoadFour<true>(p, count) : LoadFour<false>(p, count);
  };
  float4 held[kHeld / 4][kGates];
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) {  // a lane's terms of it are one line of the cache
#pragma unroll
    for (int i = 0; i < kHeld / 4; ++i) held[i][gate] = weight_quad(gate, 4 * i);
    for (int i = 0; i < (kTerms - kHeld) / 4; ++i) {
      weights[(i * kGates + gate) * threads + static_cast<int>(threadIdx.x)] =
          weight_quad(gate, kHeld + 4 * i);
    }
  }
  FillWithZeros(states, 2 * kRows * S::kSample);
  __syncthreads();

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto is_real = [&](int r) { return unit < hidden && first_row + r < w.rows; };
  float* const gates = w.gates + (slice * hidden - 3 * unit);
  int64_t at = StateOf(w, first_row, 0, unit);
  float cell[kRows] = {}, state[kRows] = {}, input[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    input[r] = is_real(r) ? gates[kGates * (at + r * RowOf(w))] : 0.0f;
  }
  for (int k = 0; k < w.steps; ++k, at += StepOf(w)) {
    const float* const before = states + k % 2 * kRows * S::kSample + slice * S::kPlace;
    float* const after = states + (k + 1) % 2 * kRows * S::kSample;
    float sums[kRows][kGates] = {};
    const auto multiply = [&](int i, const float4(&weight)[kGates]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 h = *reinterpret_cast<const float4*>(before + r * S::kSample + 4 * i);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          sums[r][gate] = DotFour(weight[gate], h, sums[r][gate]);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld / 4; ++i) multiply(i, held[i]);
#pragma unroll 2
    for (int i = 0; i < (kTerms - kHeld) / 4; ++i) {
      float4 weight[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        weight[gate] = weights[(i * kGates + gate) * threads + static_cast<int>(threadIdx.x)];
      }
      multiply(kHeld / 4 + i, weight);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = SumForOwnGate(sums[r], slice) + input[r];
      const float gate = slice == 2 ? Tanh(sum) : Sigmoid(sum);
      const float4 all = FromSlices(gate);
      const float h_before = state[r];
      float tanh_cell;
      LstmState(all.x, all.y, all.z, all.w, cell[r], cell[r], tanh_cell, state[r]);
      if (!is_real(r)) continue;
      const int64_t of_row = at + r * RowOf(w);
      gates[kGates * of_row] = gate;
      if (k + 1 < w.steps) input[r] = gates[kGates * (of_row + StepOf(w))];
      if (slice == 0) {
        after[r * S::kSample + unit / kTerms * S::kPlace + unit % kTerms] = state[r];
        w.c[of_row] = cell[r];
      } else if (slice == 1) {
        w.tanh_c[of_row] = tanh_cell;
      } else if (slice == 2) {
        static_cast<float*>(w.h_before)[of_row] = h_before;
      } else if (HasOutput(w, k)) {
        w.y[OutputOf(w, first_row + r, k) + unit] = state[r];
      }
    }
    __syncthreads();
  }
}

// Lane `slice` of a unit has the terms of gate `slice`: those of the gradients behind, which all
// units hand each other.
template <int kUnits, int kRows>
__global__ void __launch_bounds__(kUnits* kSlices, 1) BackwardWalk(const LstmWalk w) {
  WaitForPrevious();
  constexpr int kHeld = kHeldBackward<kUnits, kRows>;
  using S = Slices<kUnits>;
  const int threads = static_cast<int>(blockDim.x), hidden = w.hidden;
  const int slice = static_cast<int>(threadIdx.x) % kSlices;
  const int unit = static_cast<int>(threadIdx.x) / kSlices;
  float4* const weights = SharedMemory<float4>();  // {quads of terms, threads}
  float* const gradients = reinterpret_cast<float*>(weights + (kUnits - kHeld) / 4 * threads);

  const auto weight_quad = [&](int i) {
    const auto at = [&](int term) {
      return term < hidden && unit < hidden
                 ? __ldg(static_cast<const float*>(w.weight) +
                         (static_cast<int64_t>(slice) * hidden + term) * hidden + unit)
                 : 0.0f;
    };
    return make_float4(at(i), at(i + 1), at(i + 2), at(i + 3));
  };
  float4 held[kHeld / 4];
#pragma unroll
  for (int i = 0; i < kHeld / 4; ++i) held[i] = weight_quad(4 * i);
  for (int i = 0; i < (kUnits - kHeld) / 4; ++i) {
    weights[i * threads + static_cast<int>(threadIdx.x)] = weight_quad(kHeld + 4 * i);
  }
  FillWithZeros(gradients, 2 * kRows * S::kSample);
  __syncthreads();

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto is_real = [&](int r) { return unit < hidden && first_row + r < w.rows; };
  float* const gates = w.gates + (slice * hidden - 3 * unit);
  int64_t at = StateOf(w, first_row, w.steps - 1, unit);
  struct Loaded {
    float gate, c_before, tanh_c, dy;
  };
  const auto load = [&](int r, int k, int64_t of_row) {
    return Loaded{gates[kGates * of_row], k == 0 ? 0.0f : w.c[of_row - StepOf(w)], w.tanh_c[of_row],
                  HasOutput(w, k) ? __ldg(w.dy + OutputOf(w, first_row + r, k) + unit) : 0.0f};
  };
  float cell_gradient[kRows] = {};
  Loaded loaded[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (is_real(r)) loaded[r] = load(r, w.steps - 1, at + r * RowOf(w));
  }
  for (int k = w.steps - 1; k >= 0; --k, at -= StepOf(w)) {
    const float* const behind = gradients + k % 2 * kRows * S::kSample + slice * S::kPlace;
    float* const own = gradients + (k + 1) % 2 * kRows * S::kSample + slice * S::kPlace;
    float4 sums[kRows] = {};
    const auto multiply = [&](int i, const float4& weight) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 g = *reinterpret_cast<const float4*>(behind + r * S::kSample + 4 * i);
        sums[r].x = Fma(weight.x, g.x, sums[r].x);
        sums[r].y = Fma(weight.y, g.y, sums[r].y);
        sums[r].z = Fma(weight.z, g.z, sums[r].z);
        sums[r].w = Fma(weight.w, g.w, sums[r].w);
      }
    };
#pragma unroll
    for (int i = 0; i < kHeld / 4; ++i) multiply(i, held[i]);
#pragma unroll 4
    for (int i = 0; i < (kUnits - kHeld) / 4; ++i) {
      multiply(kHeld / 4 + i, weights[i * threads + static_cast<int>(threadIdx.x)]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = (sums[r].x + sums[r].y) + (sums[r].z + sums[r].w);
      sum = sum + __shfl_xor_sync(kAllLanes, sum, 1);
      sum = sum + __shfl_xor_sync(kAllLanes, sum, 2);
      float4 g = FromSlices(loaded[r].gate);
      LstmCellGradient(g.x, g.y, g.z, g.w, loaded[r].c_before, loaded[r].tanh_c, loaded[r].dy + sum,
                       cell_gradient[r]);
      if (!is_real(r)) continue;
      const float gradient = slice == 0 ? g.x : slice == 1 ? g.y : slice == 2 ? g.z : g.w;
      own[r * S::kSample + unit] = gradient;
      const int64_t of_row = at + r * RowOf(w);
      gates[kGates * of_row] = gradient;
      if (k > 0) loaded[r] = load(r, k - 1, of_row - StepOf(w));
    }
    __syncthreads();
  }
}

// ---- bf16, on tensor cores: the weights are the first factor, nearly all in registers, and the
// samples' states the columns of the second, eight of an instruction. Where kRows is 4, four of
// them are none, and the lanes that would have these take over half of the others' cells.
constexpr int kColumns = 8;
// Of a warp's tiles of weights, those that its registers hold: nearly all of 128 units'.
template <int kUnits>
constexpr int kTilesForward = kUnits / 8;
template <int kUnits>
constexpr int kTilesBackward = kUnits / 4;
template <int kUnits>
constexpr int kHeldTilesForward = std::min(kTilesForward<kUnits>, 14);
template <int kUnits>
constexpr int kHeldTilesBackward = std::min(kTilesBackward<kUnits>, 26);
// What a sample hands to its next step; from a sample to the next, so that what lanes read at once
// is in different banks: 16 bytes of two samples forward, of eight backward.
template <int kUnits>
constexpr int kSampleForward = kUnits % 64 == 32 ? kUnits : kUnits + 32;
template <int kUnits>
constexpr int kSampleBackward = kGates* kUnits + 8;

// The row of a lane's cell j, of kRows / 4, behind a block's first.
template <int kRows>
__device__ __forceinline__ int RowOfCell(int t, int j) {
  if constexpr (kRows == kColumns) return 2 * t + j;
  return t < 2 ? 2 * t : 2 * t - 3;
}
// Of a lane's sums of one unit, columns 2t and 2t + 1, that of its cell j.
template <int kRows>
__device__ __forceinline__ float SumOfCell(float even, float odd, int t, int j) {
  if constexpr (kRows == kColumns) return j == 0 ? even : odd;
  const float other = __shfl_xor_sync(kAllLanes, odd, 2);
  return t < 2 ? even : other;
}
// Neighbours, of which those from `count` on are none (0); wide: they lie right for one access, and
// are all or none.
__device__ __forceinline__ uint32_t LoadTwo(const uint16_t* p, int count, bool wide) {
  if (wide) return count > 0 ? __ldg(reinterpret_cast<const uint32_t*>(p)) : 0u;
  const uint32_t low = count > 0 ? __ldg(p) : 0u, high = count > 1 ? __ldg(p + 1) : 0u;
  return low | high << 16;
}
__device__ __forceinline__ uint4 LoadEight(const uint16_t* p, int count, bool wide) {
  if (wide && count > 0) return __ldg(reinterpret_cast<const uint4*>(p));
  return make_uint4(LoadTwo(p, count, false), LoadTwo(p + 2, count - 2, false),
                    LoadTwo(p + 4, count - 4, false), LoadTwo(p + 6, count - 6, false));
}
__device__ __forceinline__ void FillWithZeros(uint16_t* p, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    p[i] = 0;
}

// A warp has 8 units: the rows of its two tiles of sums are gates i and f of them, and g and o.
// Which terms of a sum an instruction takes is the same for both factors: of 32, lane t has eight
// neighbours.
template <int kUnits, int kRows>
__global__ void __launch_bounds__(kUnits / 8 * kWarp, 1)
    ForwardWalkBf16(const LstmWalk w, bool wide) {
  WaitForPrevious();
  constexpr int kTiles = kUnits / 16, kSample = kSampleForward<kUnits>, kCells = kRows / 4;
  constexpr int kHeld = kHeldTilesForward<kUnits>;
  const int hidden = w.hidden;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int unit = warp * 8 + g;
  const int threads = static_cast<int>(blockDim.x);
  uint4* const tiles = SharedMemory<uint4>() + threadIdx.x;  // {those not held, threads}
  uint16_t* const states = reinterpret_cast<uint16_t*>(      // {2, columns, kSample}
      SharedMemory<uint4>() + (kTilesForward<kUnits> - kHeld) * threads);

  uint4 held[kHeld];
  const auto keep = [&](int tile, const uint4& v) {
    (tile < kHeld ? held[tile < kHeld ? tile : 0] : tiles[(tile - kHeld) * threads]) = v;
  };
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    const int term = 16 * i + 8 * t;
    const auto eight = [&](int gate) {
      return LoadEight(static_cast<const uint16_t*>(w.weight) +
                           (static_cast<int64_t>(gate) * hidden + unit) * hidden + term,
                       unit < hidden ? hidden - term : 0, wide);
    };
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint4 first = eight(2 * m), second = eight(2 * m + 1);
      keep(2 * i + m, make_uint4(first.x, second.x, first.y, second.y));
      keep(2 * i + 2 + m, make_uint4(first.z, second.z, first.w, second.w));
    }
  }
  const auto weight = [&](int tile) {
    return tile < kHeld ? held[tile < kHeld ? tile : 0] : tiles[(tile - kHeld) * threads];
  };
  FillWithZeros(states, 2 * kColumns * kSample);
  __syncthreads();

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto row_of = [&](int j) { return RowOfCell<kRows>(t, j); };
  const auto is_real = [&](int j) { return unit < hidden && first_row + row_of(j) < w.rows; };
  float* const gates = w.gates - 3 * unit;
  const auto load = [&](int64_t of_cell, float(&input)[kGates]) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) input[gate] = gates[kGates * of_cell + gate * hidden];
  };
  int64_t at = StateOf(w, first_row + row_of(0), 0, unit);
  float cell[kCells] = {}, input[kCells][kGates] = {};
  uint16_t state[kCells] = {};
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    if (is_real(j)) load(at + j * RowOf(w), input[j]);
  }
  for (int k = 0; k < w.steps; ++k, at += StepOf(w)) {
    const uint16_t* const before = states + k % 2 * kColumns * kSample;
    uint16_t* const after = states + (k + 1) % 2 * kColumns * kSample;
    float sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      const uint4 h = *reinterpret_cast<const uint4*>(before + g * kSample + 16 * i + 8 * t);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        MultiplyBf16(sums[m], weight(2 * i + m), h.x, h.y);
        MultiplyBf16(sums[m], weight(2 * i + 2 + m), h.z, h.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      float values[kGates];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float(&tile)[4] = sums[gate / 2];
        const int half = gate % 2;
        values[gate] = SumOfCell<kRows>(tile[2 * half], tile[2 * half + 1], t, j) + input[j][gate];
      }
      float tanh_cell, h;
      LstmCell(values[0], values[1], values[2], values[3], cell[j], cell[j], tanh_cell, h);
      if (!is_real(j)) continue;
      const int64_t of_cell = at + j * RowOf(w);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        gates[kGates * of_cell + gate * hidden] = values[gate];
      }
      if (k + 1 < w.steps) load(of_cell + StepOf(w), input[j]);
      w.c[of_cell] = cell[j];
      w.tanh_c[of_cell] = tanh_cell;
      static_cast<uint16_t*>(w.h_before)[of_cell] = state[j];
      state[j] = static_cast<uint16_t>(Bf16Of(h));
      after[row_of(j) * kSample + unit] = state[j];
      if (HasOutput(w, k)) w.y[OutputOf(w, first_row + row_of(j), k) + unit] = h;
    }
    __syncthreads();
  }
}

// A warp has 16 units, which are the rows of its tiles of sums, one tile for each gate, then added:
// lane g has two neighbours.
template <int kUnits, int kRows>
__global__ void __launch_bounds__(kUnits / 16 * kWarp, 1)
    BackwardWalkBf16(const LstmWalk w, bool wide) {
  WaitForPrevious();
  constexpr int kTiles = kUnits / 16, kSample = kSampleBackward<kUnits>;
  constexpr int kHeld = kHeldTilesBackward<kUnits>;
  constexpr int kRowCells = kRows / 4, kCells = 2 * kRowCells;  // of each half of the units
  const int hidden = w.hidden;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int threads = static_cast<int>(blockDim.x);
  uint4* const tiles = SharedMemory<uint4>() + threadIdx.x;  // {those not held, threads}
  uint16_t* const gradients = reinterpret_cast<uint16_t*>(   // {2, columns, kSample}
      SharedMemory<uint4>() + (kTilesBackward<kUnits> - kHeld) * threads);

  const int first_unit = warp * 16 + 2 * g;

  uint4 held[kHeld];
#pragma unroll
  for (int tile = 0; tile < kTilesBackward<kUnits>; ++tile) {
    const int gate = tile % kGates, first_term = tile / kGates * 16 + 2 * t;
    const auto two = [&](int term) {
      return LoadTwo(static_cast<const uint16_t*>(w.weight) +
                         (static_cast<int64_t>(gate) * hidden + term) * hidden + first_unit,
                     term < hidden ? hidden - first_unit : 0, wide);
    };
    const uint32_t a = two(first_term), b = two(first_term + 1);
    const uint32_t c = two(first_term + 8), d = two(first_term + 9);
    (tile < kHeld ? held[tile < kHeld ? tile : 0] : tiles[(tile - kHeld) * threads]) =
        make_uint4((a & 0xFFFFu) | b << 16, a >> 16 | (b & 0xFFFF0000u), (c & 0xFFFFu) | d << 16,
                   c >> 16 | (d & 0xFFFF0000u));
  }
  const auto weight = [&](int tile) {
    return tile < kHeld ? held[tile < kHeld ? tile : 0] : tiles[(tile - kHeld) * threads];
  };
  FillWithZeros(gradients, 2 * kColumns * kSample);
  __syncthreads();

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto row_of = [&](int cell) { return RowOfCell<kRows>(t, cell % kRowCells); };
  const auto half_of = [&](int cell) { return cell / kRowCells; };
  const auto is_real = [&](int cell) {
    return first_unit + half_of(cell) < hidden && first_row + row_of(cell) < w.rows;
  };
  // From the lane's first cell.
  const auto place_of = [&](int cell) { return cell % kRowCells * RowOf(w) + half_of(cell); };
  struct Loaded {
    float gates[kGates], c_before, tanh_c, dy;
  };
  // Of the step that the lane's first cell has `at`; gates are where its first gate is.
  const auto gate_of = [&](int cell, int64_t at) {
    return kGates * (at + place_of(cell)) - 3 * (first_unit + half_of(cell));
  };
  const auto load = [&](int cell, int k, int64_t at) {
    Loaded v;
    const float* const gates = w.gates + gate_of(cell, at);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) v.gates[gate] = gates[gate * hidden];
    const int64_t of_cell = at + place_of(cell);
    v.c_before = k == 0 ? 0.0f : w.c[of_cell - StepOf(w)];
    v.tanh_c = w.tanh_c[of_cell];
    v.dy = HasOutput(w, k)
               ? __ldg(w.dy + OutputOf(w, first_row + row_of(cell), k) + first_unit + half_of(cell))
               : 0.0f;
    return v;
  };
  int64_t at = StateOf(w, first_row + row_of(0), w.steps - 1, first_unit);
  float cell_gradient[kCells] = {};
  Loaded loaded[kCells] = {};
#pragma unroll
  for (int cell = 0; cell < kCells; ++cell) {
    if (is_real(cell)) loaded[cell] = load(cell, w.steps - 1, at);
  }
  for (int k = w.steps - 1; k >= 0; --k, at -= StepOf(w)) {
    const uint16_t* const behind = gradients + k % 2 * kColumns * kSample;
    uint16_t* const own = gradients + (k + 1) % 2 * kColumns * kSample;
    float sums[kGates][4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const uint4 d =
            LoadMatrices(behind + lane % 8 * kSample + gate * kUnits + 16 * i + lane / 8 * 8);
        MultiplyBf16(sums[gate], weight(kGates * i + gate), d.x, d.y);
        MultiplyBf16(sums[gate], weight(kGates * (i + 1) + gate), d.z, d.w);
      }
    }
    float sum[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = (sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e]);
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const int half = cell / kRowCells;
      const float dh = SumOfCell<kRows>(sum[2 * half], sum[2 * half + 1], t, cell % kRowCells);
      Loaded& v = loaded[cell];
      LstmCellGradient(v.gates[0], v.gates[1], v.gates[2], v.gates[3], v.c_before, v.tanh_c,
                       v.dy + dh, cell_gradient[cell]);
      if (!is_real(cell)) continue;
      const int64_t first_gate = gate_of(cell, at);
      uint16_t* const sample = own + row_of(cell) * kSample + first_unit + half_of(cell);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const auto rounded = static_cast<uint16_t>(Bf16Of(v.gates[gate]));
        w.gates[first_gate + gate * hidden] = v.gates[gate];
        w.gates16[first_gate + gate * hidden] = rounded;
        sample[gate * kUnits] = rounded;
      }
      if (k > 0) v = load(cell, k - 1, at - StepOf(w));
    }
    __syncthreads();
  }
}

// Calls run with the least of 32, 64 and 128 units that are enough, as a type.
template <class Run>
void WithUnits(int64_t hidden, const Run& run) {
  if (hidden <= 32) return run(std::integral_constant<int, 32>());
  if (hidden <= 64) return run(std::integral_constant<int, 64>());
  run(std::integral_constant<int, 128>());
}
// Calls run with the samples of a block, as a type: one, or two where there are more samples than
// multiprocessors, which have room for one block.
template <class Run>
void WithRows(int64_t rows, int multiprocessors, const Run& run) {
  if (rows <= multiprocessors) return run(std::integral_constant<int, 1>());
  run(std::integral_constant<int, 2>());
}
size_t SharedBytesBf16(int threads, int tiles, int sample) {
  return sizeof(uint4) * static_cast<size_t>(tiles * threads) +
         sizeof(uint16_t) * static_cast<size_t>(2 * kColumns * sample);
}
template <class... Parameters, class... Arguments>
void LaunchWalk(const Queue& q, const LstmWalk& w, int rows, int threads, size_t shared_bytes,
                void (*kernel)(Parameters...), Arguments... arguments) {
  AllowShared(kernel, shared_bytes);
  Launch(q, dim3(static_cast<unsigned>(CeilDiv(w.rows, rows))),
         dim3(static_cast<unsigned>(threads)), shared_bytes, kernel, w, arguments...);
}

}  // namespace

bool WalksLstm(int64_t hidden, int64_t shared_bytes) {
  // The most that a block takes: in fp32, forward, of 128 units and two samples.
  constexpr size_t kMost = Slices<32>::SharedBytes(128 * kSlices, 2, 128 - kHeldForward<128, 2>);
  return hidden <= 128 && shared_bytes >= static_cast<int64_t>(kMost);
}

void LstmForwardWalk(const Queue& q, const LstmWalk& w, int multiprocessors) {
  WithUnits(w.hidden, [&](auto units) {
    constexpr int kUnits = units();
    const int threads = static_cast<int>(CeilDiv(w.hidden, 8)) * kWarp;
    if (w.bf16) {
      const size_t shared = SharedBytesBf16(
          threads, kTilesForward<kUnits> - kHeldTilesForward<kUnits>, kSampleForward<kUnits>);
      const bool wide = w.hidden % 8 == 0 && IsAligned16(w.weight);
      if (w.rows <= 4 * multiprocessors) {
        LaunchWalk(q, w, 4, threads, shared, ForwardWalkBf16<kUnits, 4>, wide);
      } else {
        LaunchWalk(q, w, 8, threads, shared, ForwardWalkBf16<kUnits, 8>, wide);
      }
      return;
    }
    const bool wide = w.hidden % 4 == 0 && IsAligned16(w.weight);
    WithRows(w.rows, multiprocessors, [&](auto rows) {
      const size_t shared = Slices<kUnits / kSlices>::SharedBytes(
          threads, rows(), kUnits - kHeldForward<kUnits, rows()>);
      LaunchWalk(q, w, rows(), threads, shared, ForwardWalk<kUnits, rows()>, wide);
    });
  });
}

void LstmBackwardWalk(const Queue& q, const LstmWalk& w, int multiprocessors) {
  WithUnits(w.hidden, [&](auto units) {
    constexpr int kUnits = units();
    if (w.bf16) {
      const int threads = static_cast<int>(CeilDiv(w.hidden, 16)) * kWarp;
      const size_t shared = SharedBytesBf16(
          threads, kTilesBackward<kUnits> - kHeldTilesBackward<kUnits>, kSampleBackward<kUnits>);
      const bool wide = w.hidden % 2 == 0 && reinterpret_cast<uintptr_t>(w.weight) % 4 == 0;
      if (w.rows <= 4 * multiprocessors) {
        LaunchWalk(q, w, 4, threads, shared, BackwardWalkBf16<kUnits, 4>, wide);
      } else {
        LaunchWalk(q, w, 8, threads, shared, BackwardWalkBf16<kUnits, 8>, wide);
      }
      return;
    }
    const int threads = static_cast<int>(CeilDiv(w.hidden, 8)) * kWarp;
    WithRows(w.rows, multiprocessors, [&](auto rows) {
      const size_t shared =
          Slices<kUnits>::SharedBytes(threads, rows(), kUnits - kHeldBackward<kUnits, rows()>);
      LaunchWalk(q, w, rows(), threads, shared, BackwardWalk<kUnits, rows()>);
    });
  });
}

}  // namespace lockstep::device::cuda
