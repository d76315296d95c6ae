// Matrix products of small layers: blocks of a few rows and columns, so that a hundred rows are
// enough for a whole GPU, whose warps share the sum between them.
//
// Order, which is all that bits depend on: the k terms are cut into units of half a stage, the
// units into slices, as many as k says (SlicesOf). A slice is one chain, of FMAs or of the tensor
// core's products, in the order of its terms, its last unit filled up with zeros; slices are added
// in their order. In small tiles every slice has a warp of its own, in large ones warps take one
// slice behind the other: tiles do not matter, nor how many rows there are.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/tensor_core.h"
#include "worker/device/cuda/tensor_tiles.h"
#include "worker/device/cuda/windows.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

// As Bf16 of tensor_tiles.h. A row of kRowBytes is a stage's depth.
struct Fp32 {
  static constexpr int kDepth = 16;
  static constexpr int kQuads = kDepth / 4;
  using Quad = float4;
  static __device__ __forceinline__ Quad Round(float4 v) { return v; }
};
template <class Factor>
constexpr int kUnit = Factor::kDepth / 2;  // terms

constexpr int kMostSlices = 8;
// At least a stage each, where k has that.
int SlicesOf(int units) { return std::clamp(units / 2, 1, kMostSlices); }

// What a product is to its kernel.
struct Problem {
  int m, n, k;
  int a_row, b_row;
  int64_t c_row;
  int64_t a_stride, b_stride, c_stride;
  int column_tiles;
  int units, slices;
  bool wide_c;  // taken by four
  bool accumulate, relu;

  __device__ __forceinline__ int FirstUnit(int slice) const { return units * slice / slices; }
};

// ---- stages of factors.

// A factor's part of a stage, kCount rows of op(A) or columns of op(B). Both in memory and in the
// stage a row of it has terms or, kByTerms, a term of it has rows. kThreads load it; kWide: by
// four.
template <class Factor, class T, int kCount, bool kByTerms, bool kWide, int kThreads>
class Operand {
 public:
  static constexpr bool kTermByTerm = kByTerms;
  static constexpr int kBytes = kCount * kRowBytes;

  // `from`: the first of the kCount in memory, of which there are `count`; `row` elements from a
  // stored row to the next. Others than these are loaded as any of them: nobody asks for their
  // sums.
  __device__ __forceinline__ Operand(const T* __restrict__ from, int row, int count, int thread)
      : from_(from), row_(row), own_(thread / kAcross), quad_(thread % kAcross), count_(count) {
    if constexpr (kByTerms) {
      from_ += own_ * row + (kWide ? min(quad_ * 4, count - 4) : quad_ * 4);
    } else {
      from_ += quad_ * 4;
    }
  }

  // Terms [term, end), and zeros up to the whole stage.
  __device__ __forceinline__ void Load(int term, int end) {
    const T* const from = from_ + (kByTerms ? static_cast<int64_t>(term) * row_ : term);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int stored_row = own_ + i * kApart;
      if constexpr (kByTerms) {
        const int present = kWide ? 4 : count_ - quad_ * 4;
        next_[i] =
            LoadStored<kWide>(from + i * kApart * row_, stored_row < end - term ? present : 0);
      } else {
        next_[i] =
            LoadStored<kWide>(from + min(stored_row, count_ - 1) * row_, end - term - quad_ * 4);
      }
    }
  }

  __device__ __forceinline__ void Store(char* stage) const {
    constexpr int kBytesOfQuad = sizeof(typename Factor::Quad), kQuadsOfPiece = 16 / kBytesOfQuad;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int place = PlaceOf(i * kApart / 8 * 8, own_ + i * kApart % 8, quad_ / kQuadsOfPiece);
      *reinterpret_cast<typename Factor::Quad*>(
          stage + place + quad_ % kQuadsOfPiece * kBytesOfQuad) = Factor::Round(next_[i]);
    }
  }

  // Where 16 bytes of a stored row stand in the stage; the row as a multiple of 8 and the rest,
  // which alone says how pieces are exchanged.
  static __device__ __forceinline__ int PlaceOf(int eights, int rest, int piece) {
    constexpr int kPieces = kByTerms ? kBytes / Factor::kDepth / 16 : kRowBytes / 16;
    // Floats by terms are read row by row, which needs no exchange.
    constexpr bool kExchanged = !kByTerms || !std::is_same_v<Factor, Fp32>;
    return (eights * kPieces + rest * kPieces +
            (kExchanged ? PieceOf<kPieces>(rest, piece) : piece)) *
           16;
  }

 private:
  static constexpr int kAcross = kByTerms ? kCount / 4 : Factor::kQuads;  // quads of a stored row
  static constexpr int kApart =
      kThreads / kAcross;  // stored rows, from one of a thread to the next
  static constexpr int kLoads = kCount * Factor::kQuads / kThreads;
  static_assert(kThreads % kAcross == 0 && kCount * Factor::kQuads % kThreads == 0);

  const T* __restrict__ from_;
  const int row_, own_, quad_, count_;
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
                                           int column, int unit) {
    constexpr int kPieces = kUnit<Fp32> / 4;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      MultiplyPiece(stage_a, stage_b, row, column, unit * kPieces + piece);
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
    const char* const from = stage + Side::PlaceOf(term, 0, 0) + first * 4;
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
        Unpack(*reinterpret_cast<const float4*>(stage_a + A::PlaceOf(row + i * 8, Down(), piece)),
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
        // Four columns are half of what an exchange is the same for.
        const int eights = column + j / 2 * 8, rest = Across() + j % 2 * 4;
        Unpack(*reinterpret_cast<const float4*>(stage_b + B::PlaceOf(eights, rest, piece)), b);
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

  // A unit is the depth of one product.
  __device__ __forceinline__ void Multiply(const char* stage_a, const char* stage_b, int row,
                                           int column, int unit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int matrix = lane / 8, own = lane % 8;
    uint4 a[kDown];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      // Matrices: rows 0-7 and 8-15 of terms 0-7, then of terms 8-15.
      const int first = row + i * 16;
      if constexpr (A::kTermByTerm) {
        a[i] = LoadMatricesTransposed(
            stage_a + A::PlaceOf(unit * 16 + matrix / 2 * 8, own, first / 8 + matrix % 2));
      } else {
        a[i] =
            LoadMatrices(stage_a + A::PlaceOf(first + matrix % 2 * 8, own, unit * 2 + matrix / 2));
      }
    }
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      // Matrices: terms 0-7 and 8-15 of columns 0-7, then of columns 8-15.
      const int first = column + j * 8;
      uint4 b;
      if constexpr (B::kTermByTerm) {
        b = LoadMatricesTransposed(
            stage_b + B::PlaceOf(unit * 16 + matrix % 2 * 8, own, first / 8 + matrix / 2));
      } else {
        b = LoadMatrices(stage_b + B::PlaceOf(first + matrix / 2 * 8, own, unit * 2 + matrix % 2));
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        MultiplyBf16(sums_[i][j], a[i], b.x, b.y);
        MultiplyBf16(sums_[i][j + 1], a[i], b.z, b.w);
      }
    }
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
  float sums_[kDown][kAcross][4];
};

// ---- the kernel.

// kDown x kAcross warps make a tile of kRows x kColumns. kSerial: all slices of it, one behind the
// other; else a slice, and a block has so many warps (kDown = kAcross = 1) as there are slices.
template <int kRowsOf, int kColumnsOf, int kDownOf = 1, int kAcrossOf = 1, bool kSerialOf = false>
struct Tile {
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  static constexpr int kDown = kDownOf, kAcross = kAcrossOf;
  static constexpr bool kSerial = kSerialOf;
  static constexpr int kGroup = kDown * kAcross * kWarp;  // threads
  static constexpr int kMostThreads = kSerial ? kGroup : kMostSlices * kWarp;
  static constexpr int kStage = (kRows + kColumns) * kRowBytes;
  static_assert(kSerial || kGroup == kWarp);

  // Of a group: two stages, then, where slices follow each other, the sum of those before. All of
  // it is its sums behind the last product.
  static constexpr int kKeptAt = 2 * kStage;
  template <int kPitch>
  static constexpr int kGroupBytes =
      std::max(kKeptAt + (kSerial ? kRows * kColumns * static_cast<int>(sizeof(float)) : 0),
               kRows* kPitch* static_cast<int>(sizeof(float)));
};

template <class Factor, class FactorA, class FactorB, class T>
using WarpSums =
    std::conditional_t<std::is_same_v<Factor, Fp32>,
                       FmaSums<FactorA, FactorB, T::kRows / T::kDown, T::kColumns / T::kAcross>,
                       TensorSums<FactorA, FactorB, T::kRows / T::kDown, T::kColumns / T::kAcross>>;

// How A and B are stored (op() as in ProductShape).
template <bool kTransposeAOf, bool kTransposeBOf>
struct Layout {
  static constexpr bool kTransposeA = kTransposeAOf, kTransposeB = kTransposeBOf;
};

// Blocks of a multiprocessor that there are to be registers for.
template <bool kWide, class L, class T>
constexpr int kBlocksAtOnce = T::kSerial ? (kWide && !L::kTransposeB ? 4 : 3)
                                         : (kWide&& T::kRows* T::kColumns <= 512 ? 2 : 1);

// As LoadFour, of memory that the kernel writes.
__device__ __forceinline__ float4 LoadResult(bool wide, const float* p, int count) {
  if (wide) return *reinterpret_cast<const float4*>(p);
  return make_float4(p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0);
}

template <class Factor, class TypeA, class TypeB, bool kWide, class L, class T>
__global__ void __launch_bounds__(T::kMostThreads, kBlocksAtOnce<kWide, L, T>)
    MultiplyTiles(Problem p, const TypeA* __restrict__ a, const TypeB* __restrict__ b,
                  const float* __restrict__ bias, float* __restrict__ c) {
  using FactorA = Operand<Factor, TypeA, T::kRows, L::kTransposeA, kWide, T::kGroup>;
  using FactorB = Operand<Factor, TypeB, T::kColumns, !L::kTransposeB, kWide, T::kGroup>;
  using Sums = WarpSums<Factor, FactorA, FactorB, T>;
  constexpr int kPitch = T::kColumns + Sums::kPad;
  constexpr int kGroupBytes = T::template kGroupBytes<kPitch>;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / T::kGroup, member = thread % T::kGroup;
  char* const stages = SharedMemory<char>() + group * kGroupBytes;

  const int first_row = static_cast<int>(blockIdx.x) / p.column_tiles * T::kRows;
  const int first_column = static_cast<int>(blockIdx.x) % p.column_tiles * T::kColumns;
  const int64_t product = blockIdx.z;
  a += product * p.a_stride + (L::kTransposeA ? 1 : int64_t{p.a_row}) * first_row;
  b += product * p.b_stride + (L::kTransposeB ? int64_t{p.b_row} : 1) * first_column;
  FactorA next_a(a, p.a_row, p.m - first_row, member);
  FactorB next_b(b, p.b_row, p.n - first_column, member);
  const int warp_row = member / kWarp % T::kDown * (T::kRows / T::kDown);
  const int warp_column = member / kWarp / T::kDown * (T::kColumns / T::kAcross);

  const auto synchronize = [] {
    if constexpr (T::kSerial) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };
  const auto load = [&](int unit, int end) {
    const int end_term = min(p.k, end * kUnit<Factor>);
    next_a.Load(unit * kUnit<Factor>, end_term);
    next_b.Load(unit * kUnit<Factor>, end_term);
  };
  const auto store = [&](char* stage) {
    next_a.Store(stage);
    next_b.Store(stage + FactorA::kBytes);
  };

  // Slices lie one behind the other, so that the next stage may be the first of the next slice.
  int slice = T::kSerial ? 0 : group;
  const int last_slice = T::kSerial ? p.slices - 1 : group;
  int unit = p.FirstUnit(slice), end = p.FirstUnit(slice + 1);
  Sums sums;
  sums.Clear();
  float4* const kept = reinterpret_cast<float4*>(stages + T::kKeptAt) + member;
  char *stage = stages, *other = stages + T::kStage;
  load(unit, end);
  store(stage);
  synchronize();
  while (true) {
    const bool ends_slice = unit + 2 >= end, is_last = ends_slice && slice == last_slice;
    const int next = ends_slice ? end : unit + 2;
    const int next_end = ends_slice && !is_last ? p.FirstUnit(slice + 2) : end;
    if (!is_last) load(next, next_end);
    sums.Multiply(stage, stage + FactorA::kBytes, warp_row, warp_column, 0);
    if (unit + 1 < end) {
      sums.Multiply(stage, stage + FactorA::kBytes, warp_row, warp_column, 1);
    }
    if (T::kSerial && ends_slice) {
      if (slice > 0) sums.AddTo(kept, T::kGroup);
      if (!is_last) {
        sums.Keep(kept, T::kGroup);
        sums.Clear();
      }
    }
    if (is_last) break;
    store(other);
    synchronize();
    char* const present = stage;
    stage = other;
    other = present;
    slice += ends_slice ? 1 : 0;
    unit = next;
    end = next_end;
  }
  synchronize();  // behind the last products
  sums.template Hand<kPitch>(reinterpret_cast<float*>(stages), warp_row, warp_column);
  __syncthreads();

  // The slices' sums, added in their order.
  c += product * p.c_stride + first_row * p.c_row + first_column;
  constexpr int kAcross = T::kColumns / 4;
  const int groups = T::kSerial ? 1 : p.slices;
  for (int i = thread; i < T::kRows * kAcross; i += static_cast<int>(blockDim.x)) {
    const int row = i / kAcross, column = i % kAcross * 4;
    const int left = p.n - first_column - column;
    if (first_row + row >= p.m || left <= 0) continue;
    const char* from = SharedMemory<char>() + (row * kPitch + column) * 4;
    float4 sum = *reinterpret_cast<const float4*>(from);
    for (int g = 1; g < groups; ++g) {
      from += kGroupBytes;
      const float4 more = *reinterpret_cast<const float4*>(from);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    float* const to = c + row * p.c_row + column;
    if (p.accumulate) {
      const float4 before = LoadResult(p.wide_c, to, left);
      sum = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
    }
    if (bias != nullptr) {
      const float4 more = LoadFour<false>(bias + first_column + column, left);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    if (p.relu) sum = make_float4(Relu(sum.x), Relu(sum.y), Relu(sum.z), Relu(sum.w));
    StoreFour(to, p.wide_c, left, sum);
  }
}

// ---- launches.

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension
constexpr int kMostProducts = 65535;                     // and of its third
constexpr int64_t kMostRows = int64_t{1} << 30;          // of a launch: 32 bits count them

template <class Factor, class TypeA, class TypeB, bool kWide, class L, class T>
void LaunchTiles(const Queue& q, Problem p, int64_t m, int count, const TypeA* a, const TypeB* b,
                 const float* bias, float* c) {
  using FactorA = Operand<Factor, TypeA, T::kRows, L::kTransposeA, kWide, T::kGroup>;
  using FactorB = Operand<Factor, TypeB, T::kColumns, !L::kTransposeB, kWide, T::kGroup>;
  constexpr int kPitch = T::kColumns + WarpSums<Factor, FactorA, FactorB, T>::kPad;
  const auto kernel = MultiplyTiles<Factor, TypeA, TypeB, kWide, L, T>;
  p.column_tiles = static_cast<int>(CeilDiv(p.n, T::kColumns));
  const int groups = T::kSerial ? 1 : p.slices;
  const size_t shared = static_cast<size_t>(groups) * T::template kGroupBytes<kPitch>;
  AllowShared(kernel, shared);
  const int64_t most = std::min(kMostRows, kMostBlocks / p.column_tiles * T::kRows);
  for (int first = 0; first < count; first += kMostProducts) {
    for (int64_t row = 0; row < m; row += most) {
      p.m = static_cast<int>(std::min(most, m - row));
      const dim3 grid(static_cast<uint32_t>(CeilDiv(p.m, T::kRows) * p.column_tiles), 1,
                      static_cast<uint32_t>(std::min(count - first, kMostProducts)));
      Launch(q, grid, dim3(static_cast<uint32_t>(groups * T::kGroup)), shared, kernel, p,
             a + first * p.a_stride + (L::kTransposeA ? 1 : p.a_row) * row, b + first * p.b_stride,
             bias, c + first * p.c_stride + row * p.c_row);
    }
  }
}

// Whether stored rows of so many elements can be taken by four.
template <class T>
bool IsWide(const T* at, int64_t elements, int64_t row, int64_t stride) {
  return reinterpret_cast<uintptr_t>(at) % (4 * sizeof(T)) == 0 && elements % 4 == 0 &&
         row % 4 == 0 && stride % 4 == 0;
}

template <class Factor, class TypeA, class TypeB, bool kWide, class L>
void MultiplyBy(const Queue& q, const SmallProduct& s, const Problem& p, const TypeA* a,
                const TypeB* b, const float* bias, float* c) {
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return CeilDiv(s.m, rows) * CeilDiv(s.n, columns) * s.count;
  };
  const auto launch = [&](auto tile) {
    LaunchTiles<Factor, TypeA, TypeB, kWide, L, decltype(tile)>(q, p, s.m, s.count, a, b, bias, c);
  };
  constexpr int64_t kMultiprocessors = 132;  // of any GPU: the tile does not change a bit
  if (tiles(64, 64) >= 3 * kMultiprocessors) return launch(Tile<64, 64, 2, 2, true>());
  // Loads one by one are slow in any tile.
  if constexpr (kWide) {
    if (tiles(32, 32) >= 2 * kMultiprocessors) return launch(Tile<32, 32>());
    if constexpr (std::is_same_v<Factor, Fp32>) {
      if (tiles(32, 16) < kMultiprocessors / 2) return launch(Tile<16, 16>());
    }
  }
  // In bf16 A, where it is floats, has twice the bytes of B.
  launch(std::conditional_t<std::is_same_v<Factor, Fp32>, Tile<32, 16>, Tile<16, 32>>());
}

template <class Factor, class TypeA, class TypeB, class L>
void MultiplyAs(const Queue& q, const SmallProduct& s, const void* untyped_a, const void* untyped_b,
                const float* bias, float* c) {
  const auto* const a = static_cast<const TypeA*>(untyped_a);
  const auto* const b = static_cast<const TypeB*>(untyped_b);
  const auto units = static_cast<int>(CeilDiv(s.k, kUnit<Factor>));
  const Problem p = {0,
                     static_cast<int>(s.n),
                     static_cast<int>(s.k),
                     static_cast<int>(s.a_row),
                     static_cast<int>(s.b_row),
                     s.c_row,
                     s.a_stride,
                     s.b_stride,
                     s.c_stride,
                     0,
                     units,
                     SlicesOf(units),
                     IsWide(c, s.n, s.c_row, s.c_stride),
                     s.accumulate,
                     s.relu};
  if (IsWide(a, L::kTransposeA ? s.m : s.k, s.a_row, s.a_stride) &&
      IsWide(b, L::kTransposeB ? s.k : s.n, s.b_row, s.b_stride)) {
    MultiplyBy<Factor, TypeA, TypeB, true, L>(q, s, p, a, b, bias, c);
  } else {
    MultiplyBy<Factor, TypeA, TypeB, false, L>(q, s, p, a, b, bias, c);
  }
}

using Forward = Layout<false, true>;
using InputGradient = Layout<false, false>;
using WeightGradient = Layout<true, false>;

}  // namespace

void MultiplySmall(const Queue& q, const SmallProduct& s, const void* a, const void* b,
                   const float* bias, float* c) {
  if (s.m == 0 || s.count == 0) return;
  const auto multiply = [&](auto multiply_as) { multiply_as(q, s, a, b, bias, c); };
  if (!s.bf16) {
    multiply(s.transpose_a   ? MultiplyAs<Fp32, float, float, WeightGradient>
             : s.transpose_b ? MultiplyAs<Fp32, float, float, Forward>
                             : MultiplyAs<Fp32, float, float, InputGradient>);
  } else if (s.transpose_a) {
    multiply(s.a_floats ? MultiplyAs<Bf16, float, float, WeightGradient>
                        : MultiplyAs<Bf16, StoredBf16, StoredBf16, WeightGradient>);
  } else if (s.a_floats) {
    multiply(s.transpose_b ? MultiplyAs<Bf16, float, StoredBf16, Forward>
                           : MultiplyAs<Bf16, float, StoredBf16, InputGradient>);
  } else {
    multiply(s.transpose_b ? MultiplyAs<Bf16, StoredBf16, StoredBf16, Forward>
                           : MultiplyAs<Bf16, StoredBf16, StoredBf16, InputGradient>);
  }
}

}  // namespace lockstep::device::cuda
