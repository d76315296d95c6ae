// Matrix products of small layers: blocks of a few rows and columns, so that a hundred rows are
// enough for a whole GPU, whose warps share the sum between them.
//
// Order, which is all that bits depend on: the k terms are cut into stages, filled up with zeros,
// and the stages into slices, as many as k says (SlicesOf). A slice is one chain, of FMAs or of the
// tensor core's products, in the order of its terms; slices are added in their order. In small
// tiles every slice has a warp of its own, in large ones warps take one slice behind the other:
// tiles do not matter, nor how many rows there are.
#include <algorithm>
#include <type_traits>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/small_product_tiles.h"

namespace lockstep::device::cuda {
namespace {

using namespace small_products;

// As LoadFour, of memory that the kernel writes.
__device__ __forceinline__ float4 LoadResult(bool wide, const float* p, int count) {
  if (wide) return *reinterpret_cast<const float4*>(p);
  return make_float4(p[0], count > 1 ? p[1] : 0, count > 2 ? p[2] : 0, count > 3 ? p[3] : 0);
}

template <class I>
__global__ void __launch_bounds__(I::Shape::kMostThreads, I::kBlocks)
    MultiplyTiles(Problem p, const typename I::TypeA* __restrict__ a,
                  const typename I::TypeB* __restrict__ b, const float* __restrict__ bias,
                  float* __restrict__ c) {
  WaitForPrevious();
  using T = typename I::Shape;
  using L = typename I::Stored;
  const int first_row = static_cast<int>(blockIdx.x) / p.column_tiles * T::kRows;
  const int first_column = static_cast<int>(blockIdx.x) % p.column_tiles * T::kColumns;
  const int64_t product = blockIdx.z;
  a += product * p.a_stride + (L::kTransposeA ? 1 : int64_t{p.a_row}) * first_row;
  b += product * p.b_stride + (L::kTransposeB ? int64_t{p.b_row} : 1) * first_column;
  SumTile<I>(p, a, b, p.m - first_row, p.n - first_column);
  __syncthreads();

  c += product * p.c_stride + first_row * p.c_row + first_column;
  constexpr int kAcross = T::kColumns / 4;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < T::kRows * kAcross; i += static_cast<int>(blockDim.x)) {
    const int row = i / kAcross, column = i % kAcross * 4;
    const int left = p.n - first_column - column;
    if (first_row + row >= p.m || left <= 0) continue;
    float4 sum = SumOfSlices<I>(p, row, column);
    float* const to = c + row * p.c_row + column;
    if (p.accumulate) {
      const float4 before = LoadResult(p.wide_c, to, left);
      sum = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
    }
    sum = WithBiasAndRelu(p, bias == nullptr ? nullptr : bias + first_column + column, left, sum);
    StoreFour(to, p.wide_c, left, sum);
  }
}

// ---- launches.

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension
constexpr int kMostProducts = 65535;                     // and of its third
constexpr int64_t kMostRows = int64_t{1} << 30;          // of a launch: 32 bits count them

template <class I>
void LaunchTiles(const Queue& q, Problem p, int64_t m, int count, const typename I::TypeA* a,
                 const typename I::TypeB* b, const float* bias, float* c) {
  using T = typename I::Shape;
  constexpr bool kTransposeA = I::Stored::kTransposeA;
  const auto kernel = MultiplyTiles<I>;
  p.column_tiles = static_cast<int>(CeilDiv(p.n, T::kColumns));
  const int groups = T::kSerial ? 1 : p.slices;
  const size_t shared = static_cast<size_t>(groups) * I::kGroupBytes;
  AllowShared(kernel, shared);
  const int64_t most = std::min(kMostRows, kMostBlocks / p.column_tiles * T::kRows);
  for (int first = 0; first < count; first += kMostProducts) {
    for (int64_t row = 0; row < m; row += most) {
      p.m = static_cast<int>(std::min(most, m - row));
      const dim3 grid(static_cast<uint32_t>(CeilDiv(p.m, T::kRows) * p.column_tiles), 1,
                      static_cast<uint32_t>(std::min(count - first, kMostProducts)));
      Launch(q, grid, dim3(static_cast<uint32_t>(groups * T::kGroup)), shared, kernel, p,
             a + first * p.a_stride + (kTransposeA ? 1 : p.a_row) * row, b + first * p.b_stride,
             bias, c + first * p.c_stride + row * p.c_row);
    }
  }
}

template <class Factor, class TypeA, class TypeB, bool kWide, class L>
void MultiplyBy(const Queue& q, const SmallProduct& s, const Problem& p, const TypeA* a,
                const TypeB* b, const float* bias, float* c) {
  const auto tiles = [&](int64_t rows, int64_t columns) {
    return CeilDiv(s.m, rows) * CeilDiv(s.n, columns) * s.count;
  };
  const auto launch = [&](auto tile) {
    LaunchTiles<Instance<Factor, TypeA, TypeB, kWide, L, decltype(tile)>>(q, p, s.m, s.count, a, b,
                                                                          bias, c);
  };
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
  const Problem p = ProblemOf<Factor>(s, IsWide(c, s.n, s.c_row, s.c_stride));
  if (AreWide<L>(s, a, b)) {
    MultiplyBy<Factor, TypeA, TypeB, true, L>(q, s, p, a, b, bias, c);
  } else {
    MultiplyBy<Factor, TypeA, TypeB, false, L>(q, s, p, a, b, bias, c);
  }
}

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
