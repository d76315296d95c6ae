// What the kernels of small products have in common (small_products.cu says the order of a sum):
// stages of factors in shared memory, a warp's sums, and the tile that a block makes of them.
// Thread-safe: pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda::small_products {

// As Bf16 of tensor_tiles.h. A row of kRowBytes is a stage's depth.
struct Fp32 {
  static constexpr int kDepth = 16;
  static constexpr int kQuads = kDepth / 4;
  using Quad = float4;
  static __device__ __forceinline__ Quad Round(float4 v) { return v; }
};

constexpr int kMostSlices = 8;
inline int SlicesOf(int stages) { return std::min(stages, kMostSlices); }

// What a product is to its kernel.
struct Problem {
  int m, n, k;
  int a_row, b_row;
  int64_t c_row;
  int64_t a_stride, b_stride, c_stride;
  int column_tiles;
  int stages, slices;  // of the sum
  int least, longer;   // stages of a slice; the first slices, which have one more
  bool wide_c;         // taken by four
  bool accumulate, relu;

  __device__ __forceinline__ int FirstStage(int slice) const {
    return least * slice + min(slice, longer);
  }
};

// ---- stages of factors.

// A factor's part of a stage, kCount rows of op(A) or columns of op(B). Both in memory and in the
// stage a row of it has terms or, kByTerms, a term of it has rows. kThreads load it; kWide: by
// four.
template <class Factor, class T, int kCount, bool kByTerms, bool kWide, int kThreads>
class Operand {
 public:
  static constexpr bool kTermByTerm = kByTerms;
  // Of a stored row in the stage, with one piece of 16 bytes to spare where a piece of eight rows
  // is read at once: they are then in different banks.
  static constexpr int kPitch =
      !kByTerms ? kRowBytes + 16
                : kCount * kRowBytes / Factor::kDepth + (std::is_same_v<Factor, Fp32> ? 0 : 16);
  static constexpr int kBytes = (kByTerms ? Factor::kDepth : kCount) * kPitch;

  // `from`: the first of the kCount in memory, of which there are `count`; `row` elements from a
  // stored row to the next. In place of what there is none of the last is loaded, whose sums nobody
  // asks for.
  __device__ __forceinline__ Operand(const T* __restrict__ from, int row, int count, int thread)
      : from_(reinterpret_cast<const char*>(from)),
        row_bytes_(static_cast<uint32_t>(row) * sizeof(T)),
        own_(OwnRow(thread / kAcross)),
        quad_(thread % kAcross),
        count_(count) {
    if constexpr (kByTerms) from_ += (kWide ? min(quad_ * 4, count - 4) : quad_ * 4) * sizeof(T);
  }

  // The terms from `term` on, of k, to be stored with zeros behind them.
  __device__ __forceinline__ void Load(int term, int k) {
    left_ = k - term;
    if constexpr (kByTerms) {
      const char* const from = from_ + static_cast<uint64_t>(term) * row_bytes_;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int stored_row = own_ + i * kApart;
        next_[i] = LoadQuad(from + min(stored_row, left_ - 1) * row_bytes_,
                            stored_row < left_ ? count_ - quad_ * 4 : 0);
      }
    } else {
      const int at = term + quad_ * 4;
      const char* const from =
          from_ + static_cast<uint32_t>(kWide ? min(at, k - 4) : at) * sizeof(T);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        next_[i] = LoadQuad(from + min(own_ + i * kApart, count_ - 1) * row_bytes_, k - at);
      }
    }
  }

  __device__ __forceinline__ void Store(char* stage) {
    if (kWide && left_ < Factor::kDepth) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if ((kByTerms ? own_ + i * kApart : quad_ * 4) >= left_) next_[i] = {};
      }
    }
    char* const to = stage + PlaceOf(own_, 0) + quad_ * static_cast<int>(sizeof(Quad));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      *reinterpret_cast<Quad*>(to + PlaceOf(i * kApart, 0)) = Factor::Round(next_[i]);
    }
  }

  // Where 16 bytes of a stored row stand in the stage.
  static __device__ __forceinline__ int PlaceOf(int stored_row, int piece) {
    return stored_row * kPitch + piece * 16;
  }

 private:
  using Quad = typename Factor::Quad;
  static constexpr int kAcross = kByTerms ? kCount / 4 : Factor::kQuads;  // quads of a stored row
  static constexpr int kApart =
      kThreads / kAcross;  // stored rows, from one of a thread to the next
  static constexpr int kLoads = kCount * Factor::kQuads / kThreads;
  static_assert(kThreads % kAcross == 0 && kCount * Factor::kQuads % kThreads == 0);

  // Rows of terms that are written at once are four apart, which is in different banks.
  static __device__ __forceinline__ int OwnRow(int index) {
    if constexpr (kByTerms || kApart % 8 != 0) return index;
    return index / 8 * 8 + index % 2 * 4 + index % 8 / 2;
  }
  // Four of which `present` are there; all, if they are wide.
  static __device__ __forceinline__ Four<T> LoadQuad(const char* from, int present) {
    return LoadStored<kWide>(reinterpret_cast<const T*>(from), kWide ? 4 : present);
  }

  const char* from_;
  const uint32_t row_bytes_;
  const int own_, quad_, count_;
  int left_ = 0;
  Four<T> next_[kLoads];
};

__device__ __forceinline__ void Unpack(float4 v, float* to) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// ---- a warp's sums, kRows x kColumns of the tile, from (row, column) on.

// On the ordinary units: a lane makes a row in eight and a column in four.
template <class A, class B, int kRows, int kColumns>
class FmaSums {
 public:
  static constexpr int kPad = 4;  // floats between rows that are handed on, for the banks' sake

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums_[i][j] = 0;
    }
  }
  // To and from memory of the thread's own, `apart` fours from one to the next.
  __device__ __forceinline__ void Keep(float4* at, int apart) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; j += 4) {
        *at = make_float4(sums_[i][j], sums_[i][j + 1], sums_[i][j + 2], sums_[i][j + 3]);
        at += apart;
      }
    }
  }
  __device__ __forceinline__ void AddTo(const float4* kept, int apart) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; j += 4) {
        float before[4];
        Unpack(*kept, before);
#pragma unroll
        for (int n = 0; n < 4; ++n) sums_[i][j + n] = before[n] + sums_[i][j + n];
        kept += apart;
      }
    }
  }

  __device__ __forceinline__ void Multiply(const char* stage_a, const char* stage_b, int row,
                                           int column) {
#pragma unroll
    for (int piece = 0; piece < Fp32::kDepth / 4; ++piece) {
      MultiplyPiece(stage_a, stage_b, row, column, piece);
    }
  }

  // Writes them to a tile of shared memory.
  template <int kPitch>
  __device__ __forceinline__ void Hand(float* tile, int row, int column) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      float* const to = tile + (row + OwnRow(i)) * kPitch + column;
      if constexpr (B::kTermByTerm) {
#pragma unroll
        for (int j = 0; j < kAcross; j += 4) {
          *reinterpret_cast<float4*>(to + OwnColumn(j)) =
              make_float4(sums_[i][j], sums_[i][j + 1], sums_[i][j + 2], sums_[i][j + 3]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) to[OwnColumn(j)] = sums_[i][j];
      }
    }
  }

 private:
  static constexpr int kDown = kRows / 8, kAcross = kColumns / 4;
  static constexpr int kRun = kDown < 4 ? kDown : 4;  // neighbours, where A lies term by term

  static __device__ __forceinline__ int Down() { return static_cast<int>(threadIdx.x) % kWarp / 4; }
  static __device__ __forceinline__ int Across() { return static_cast<int>(threadIdx.x) % 4; }
  static __device__ __forceinline__ int OwnRow(int i) {
    return A::kTermByTerm ? i / kRun * (8 * kRun) + Down() * kRun + i % kRun : Down() + i * 8;
  }
  static __device__ __forceinline__ int OwnColumn(int j) {
    return B::kTermByTerm ? j / 4 * 16 + Across() * 4 + j % 4 : Across() + j * 4;
  }
  // The lane's of one term: by kNeighbours, between which those of kLanes - 1 others lie.
  template <class Side, int kOwn, int kNeighbours, int kLanes>
  static __device__ __forceinline__ void LoadTerm(const char* stage, int first, int term,
                                                  float* to) {
    const char* const from = stage + Side::PlaceOf(term, 0) + first * 4;
#pragma unroll
    for (int i = 0; i < kOwn; i += kNeighbours) {
      if constexpr (kNeighbours == 4) {
        Unpack(*reinterpret_cast<const float4*>(from + i * kLanes * 4), to + i);
      } else {
        const float2 v = *reinterpret_cast<const float2*>(from + i * kLanes * 4);
        to[i] = v.x, to[i + 1] = v.y;
      }
    }
  }

  // Four terms.
  __device__ __forceinline__ void MultiplyPiece(const char* stage_a, const char* stage_b, int row,
                                                int column, int piece) {
    [[maybe_unused]] float a[kDown][4];
    if constexpr (!A::kTermByTerm) {
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        Unpack(*reinterpret_cast<const float4*>(stage_a + A::PlaceOf(row + OwnRow(i), piece)),
               a[i]);
      }
    }
    if constexpr (B::kTermByTerm) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float a_of_term[kDown], b_of_term[kAcross];
        if constexpr (A::kTermByTerm) {
          LoadTerm<A, kDown, kRun, 8>(stage_a, row + OwnRow(0), piece * 4 + t, a_of_term);
        } else {
#pragma unroll
          for (int i = 0; i < kDown; ++i) a_of_term[i] = a[i][t];
        }
        LoadTerm<B, kAcross, 4, 4>(stage_b, column + OwnColumn(0), piece * 4 + t, b_of_term);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) {
            sums_[i][j] = Fma(a_of_term[i], b_of_term[j], sums_[i][j]);
          }
        }
      }
    } else {
      static_assert(!A::kTermByTerm);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        float b[4];
        Unpack(*reinterpret_cast<const float4*>(stage_b + B::PlaceOf(column + OwnColumn(j), piece)),
               b);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int i = 0; i < kDown; ++i) sums_[i][j] = Fma(a[i][t], b[t], sums_[i][j]);
        }
      }
    }
  }

  float sums_[kDown][kAcross];
};

// On tensor cores.
template <class A, class B, int kRows, int kColumns>
class TensorSums {
 public:
  static constexpr int kPad = 8;

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int at = 0; at < 4; ++at) sums_[i][j][at] = 0;
      }
    }
  }
  __device__ __forceinline__ void Keep(float4* at, int apart) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        *at = make_float4(sums_[i][j][0], sums_[i][j][1], sums_[i][j][2], sums_[i][j][3]);
        at += apart;
      }
    }
  }
  __device__ __forceinline__ void AddTo(const float4* kept, int apart) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        float before[4];
        Unpack(*kept, before);
#pragma unroll
        for (int n = 0; n < 4; ++n) sums_[i][j][n] = before[n] + sums_[i][j][n];
        kept += apart;
      }
    }
  }

  __device__ __forceinline__ void Multiply(const char* stage_a, const char* stage_b, int row,
                                           int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) MultiplyHalf(stage_a, stage_b, row, column, half);
  }

  template <int kPitch>
  __device__ __forceinline__ void Hand(float* tile, int row, int column) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to =
            tile + (row + i * 16 + half * 8 + lane / 4) * kPitch + column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          *reinterpret_cast<float2*>(to + j * 8) =
              make_float2(sums_[i][j][2 * half], sums_[i][j][2 * half + 1]);
        }
      }
    }
  }

 private:
  static constexpr int kDown = kRows / 16, kAcross = kColumns / 8;

  // The depth of one of the instruction's products.
  __device__ __forceinline__ void MultiplyHalf(const char* stage_a, const char* stage_b, int row,
                                               int column, int half) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int matrix = lane / 8, own = lane % 8;
    uint4 a[kDown];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      // Matrices: rows 0-7 and 8-15 of terms 0-7, then of terms 8-15.
      const int first = row + i * 16;
      if constexpr (A::kTermByTerm) {
        a[i] = LoadMatricesTransposed(
            stage_a + A::PlaceOf(half * 16 + matrix / 2 * 8 + own, first / 8 + matrix % 2));
      } else {
        a[i] =
            LoadMatrices(stage_a + A::PlaceOf(first + matrix % 2 * 8 + own, half * 2 + matrix / 2));
      }
    }
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      // Matrices: terms 0-7 and 8-15 of columns 0-7, then of columns 8-15.
      const int first = column + j * 8;
      uint4 b;
      if constexpr (B::kTermByTerm) {
        b = LoadMatricesTransposed(
            stage_b + B::PlaceOf(half * 16 + matrix % 2 * 8 + own, first / 8 + matrix / 2));
      } else {
        b = LoadMatrices(stage_b + B::PlaceOf(first + matrix / 2 * 8 + own, half * 2 + matrix % 2));
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        MultiplyBf16(sums_[i][j], a[i], b.x, b.y);
        MultiplyBf16(sums_[i][j + 1], a[i], b.z, b.w);
      }
    }
  }

  float sums_[kDown][kAcross][4];
};

// ---- a block's tile.

// kDown x kAcross warps make a tile of kRows x kColumns. kSerial: all slices of it, one behind the
// other; else a slice, and a block has so many warps (kDown = kAcross = 1) as there are slices.
template <int kRowsOf, int kColumnsOf, int kDownOf = 1, int kAcrossOf = 1, bool kSerialOf = false>
struct Tile {
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  static constexpr int kDown = kDownOf, kAcross = kAcrossOf;
  static constexpr bool kSerial = kSerialOf;
  static constexpr int kGroup = kDown * kAcross * kWarp;  // threads
  static constexpr int kMostThreads = kSerial ? kGroup : kMostSlices * kWarp;
  static_assert(kSerial || kGroup == kWarp);
};

// How A and B are stored (op() as in ProductShape).
template <bool kTransposeAOf, bool kTransposeBOf>
struct Layout {
  static constexpr bool kTransposeA = kTransposeAOf, kTransposeB = kTransposeBOf;
};

template <class FactorOf, class A, class B, bool kWide, class L, class T>
struct Instance {
  using Factor = FactorOf;
  using Stored = L;
  using Shape = T;
  using TypeA = A;
  using TypeB = B;
  using OperandA = Operand<Factor, A, T::kRows, L::kTransposeA, kWide, T::kGroup>;
  using OperandB = Operand<Factor, B, T::kColumns, !L::kTransposeB, kWide, T::kGroup>;
  static constexpr int kWarpRows = T::kRows / T::kDown, kWarpColumns = T::kColumns / T::kAcross;
  using Sums = std::conditional_t<std::is_same_v<Factor, Fp32>,
                                  FmaSums<OperandA, OperandB, kWarpRows, kWarpColumns>,
                                  TensorSums<OperandA, OperandB, kWarpRows, kWarpColumns>>;
  // Of a multiprocessor that there are to be registers for.
  static constexpr int kBlocks = T::kSerial ? (!kWide           ? 2
                                               : L::kTransposeB ? 3
                                                                : 4)
                                            : (kWide && T::kRows * T::kColumns <= 512 ? 2 : 1);
  // A group's shared memory: two stages, then, where slices follow each other, the sum of those
  // before. All of it is for its sums behind the last product.
  static constexpr int kStage = OperandA::kBytes + OperandB::kBytes;
  static constexpr int kKeptAt = 2 * kStage;
  static constexpr int kPitch = T::kColumns + Sums::kPad;
  static constexpr int kGroupBytes =
      std::max(kKeptAt + (T::kSerial ? T::kRows * T::kColumns * 4 : 0), T::kRows* kPitch * 4);
};

// The sum of a tile's products, of which a group of threads makes a slice: behind a barrier,
// SumOfSlices has it. `a` and `b` begin at the tile's first row and column, of which there are
// `rows` and `columns`.
template <class I>
__device__ __forceinline__ void SumTile(const Problem& p, const typename I::TypeA* __restrict__ a,
                                        const typename I::TypeB* __restrict__ b, int rows,
                                        int columns) {
  using T = typename I::Shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / T::kGroup, member = thread % T::kGroup;
  char* const stages = SharedMemory<char>() + group * I::kGroupBytes;
  typename I::OperandA next_a(a, p.a_row, rows, member);
  typename I::OperandB next_b(b, p.b_row, columns, member);
  const int warp_row = member / kWarp % T::kDown * I::kWarpRows;
  const int warp_column = member / kWarp / T::kDown * I::kWarpColumns;

  const auto synchronize = [] {
    if constexpr (T::kSerial) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };
  const auto load = [&](int at) {
    next_a.Load(at * I::Factor::kDepth, p.k);
    next_b.Load(at * I::Factor::kDepth, p.k);
  };
  const auto store = [&](char* stage) {
    next_a.Store(stage);
    next_b.Store(stage + I::OperandA::kBytes);
  };

  typename I::Sums sums;
  sums.Clear();
  float4* const kept = reinterpret_cast<float4*>(stages + I::kKeptAt) + member;
  char *stage = stages, *other = stages + I::kStage;
  const auto multiply = [&] {
    sums.Multiply(stage, stage + I::OperandA::kBytes, warp_row, warp_column);
  };
  int slice = T::kSerial ? 0 : group, end = p.FirstStage(slice + 1);
  int at = p.FirstStage(slice);
  const int last = T::kSerial ? p.stages - 1 : end - 1;
  load(at);
  store(stage);
  synchronize();
  for (; at < last; ++at) {
    load(at + 1);
    multiply();
    if (T::kSerial && at + 1 == end) {
      if (slice > 0) sums.AddTo(kept, T::kGroup);
      sums.Keep(kept, T::kGroup);
      sums.Clear();
      end = p.FirstStage(++slice + 1);
    }
    store(other);
    synchronize();
    char* const present = stage;
    stage = other;
    other = present;
  }
  multiply();
  if (T::kSerial && slice > 0) sums.AddTo(kept, T::kGroup);
  synchronize();  // behind the last products
  sums.template Hand<I::kPitch>(reinterpret_cast<float*>(stages), warp_row, warp_column);
}

// Four neighbours of a row of the tile: the slices' sums, added in their order.
template <class I>
__device__ __forceinline__ float4 SumOfSlices(const Problem& p, int row, int column) {
  const char* from = SharedMemory<char>() + (row * I::kPitch + column) * 4;
  float4 sum = *reinterpret_cast<const float4*>(from);
  const int groups = I::Shape::kSerial ? 1 : p.slices;
  for (int g = 1; g < groups; ++g) {
    from += I::kGroupBytes;
    const float4 more = *reinterpret_cast<const float4*>(from);
    sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
  }
  return sum;
}

// With the bias that begins at the four's first (null: none), of which `left` are there, and relu.
__device__ __forceinline__ float4 WithBiasAndRelu(const Problem& p, const float* __restrict__ bias,
                                                  int left, float4 sum) {
  if (bias != nullptr) {
    const float4 more = LoadFour<false>(bias, left);
    sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
  }
  if (p.relu) sum = make_float4(Relu(sum.x), Relu(sum.y), Relu(sum.z), Relu(sum.w));
  return sum;
}

// ---- for launches.

// Whether stored rows of so many elements can be taken by four.
template <class T>
bool IsWide(const T* at, int64_t elements, int64_t row, int64_t stride) {
  return reinterpret_cast<uintptr_t>(at) % (4 * sizeof(T)) == 0 && elements % 4 == 0 &&
         row % 4 == 0 && stride % 4 == 0;
}
template <class L, class TypeA, class TypeB>
bool AreWide(const SmallProduct& s, const TypeA* a, const TypeB* b) {
  return IsWide(a, L::kTransposeA ? s.m : s.k, s.a_row, s.a_stride) &&
         IsWide(b, L::kTransposeB ? s.k : s.n, s.b_row, s.b_stride);
}

// But for m and column_tiles, which are a launch's.
template <class Factor>
Problem ProblemOf(const SmallProduct& s, bool wide_c) {
  const auto stages = static_cast<int>(CeilDiv(s.k, Factor::kDepth));
  const int slices = SlicesOf(stages);
  return {0,
          static_cast<int>(s.n),
          static_cast<int>(s.k),
          static_cast<int>(s.a_row),
          static_cast<int>(s.b_row),
          s.c_row,
          s.a_stride,
          s.b_stride,
          s.c_stride,
          0,
          stages,
          slices,
          stages / slices,
          stages % slices,
          wide_c,
          s.accumulate,
          s.relu};
}

using Forward = Layout<false, true>;
using InputGradient = Layout<false, false>;
using WeightGradient = Layout<true, false>;
constexpr int64_t kMultiprocessors = 132;  // of any GPU: the tile does not change a bit

}  // namespace lockstep::device::cuda::small_products
