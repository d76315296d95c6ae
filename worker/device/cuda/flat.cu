// Passes over flat vectors, and sums of columns.
#include <algorithm>

#include "common/digest.h"
#include "worker/device/cuda/flat_sums.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/cuda/row_reduction.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 32;  // of passes in which a block walks; fills a large GPU

unsigned WalkingBlocks(int64_t pieces) {
  return static_cast<unsigned>(std::min(CeilDiv(pieces, kThreads), kMostBlocks));
}

// ---- walking [0, n) by fours. Vectors that begin `lead` elements behind an aligned address are
// cut at aligned addresses: the first and the last piece may be shorter.

template <class... Pointers>
bool SameLead(const float* first, const Pointers*... others) {
  return ((LeadOf(first) == LeadOf(others)) && ...);
}

// Calls whole(i) for pieces of four elements from i, and element(i) for what is left; without
// kByFour only the latter.
template <bool kByFour, class Whole, class Element>
__device__ __forceinline__ void Walk(int64_t n, int lead, const Whole& whole,
                                     const Element& element) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  if constexpr (kByFour) {
    for (int64_t i = 4 * first - lead; i < n; i += 4 * step) {
      if (i >= 0 && i + 4 <= n) {
        whole(i);
      } else {
#pragma unroll 1
        for (int64_t j = i < 0 ? 0 : i; j < i + 4 && j < n; ++j) element(j);
      }
    }
  } else {
    for (int64_t i = first; i < n; i += step) element(i);
  }
}

// ---- optimizers.

// Five blocks of a multiprocessor: left to itself, the compiler takes fewer registers than the
// largest needs, and a stack.
template <OptimizerType kType, int kSlots, bool kByFour>
__global__ void __launch_bounds__(kThreads, 5)
    Update(OptimizerCoefficients coefficients, int64_t n, int lead, const StepScalars* scalars,
           const float* gradient, float* parameters, OptimizerSlots slots, StoredBf16* rounded) {
  WaitForPrevious();
  StepScalars* const shared = SharedMemory<StepScalars>();
  if (threadIdx.x == 0) *shared = *scalars;  // perhaps from memory of the host: once a block
  __syncthreads();
  const StepScalars s = *shared;
  if (s.apply == 0) return;
  const auto update = [&]<int kLanes>(int64_t i) {
    const Lanes<kLanes> g = LoadLanes<kLanes>(gradient + i);
    Lanes<kLanes> w = LoadLanes<kLanes>(parameters + i);
    Lanes<kLanes> slot[kMostSlots] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) slot[k] = LoadLanes<kLanes>(slots.at[k] + i);
#pragma unroll
    for (int v = 0; v < kLanes; ++v) {
      float of_element[kMostSlots] = {slot[0].at[v], slot[1].at[v], slot[2].at[v]};
      OptimizerStep<kType>(coefficients, s, g.at[v], w.at[v], of_element);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) slot[k].at[v] = of_element[k];
    }
    StoreLanes<kLanes>(parameters + i, w);
    if (rounded != nullptr) StoreLanes<kLanes>(rounded + i, w);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) StoreLanes<kLanes>(slots.at[k] + i, slot[k]);
  };
  Walk<kByFour>(
      n, lead, [&](int64_t i) { update.template operator()<4>(i); },
      [&](int64_t i) { update.template operator()<1>(i); });
}

template <OptimizerType kType>
void RunUpdate(const Queue& q, const OptimizerCoefficients& coefficients, int64_t n,
               const StepScalars* scalars, const float* gradient, float* parameters,
               const OptimizerSlots& slots, StoredBf16* rounded) {
  constexpr int kSlots = SlotCount(kType);
  bool by_four = SameLead(gradient, parameters);
  for (int k = 0; k < kSlots; ++k) by_four = by_four && SameLead(gradient, slots.at[k]);
  const int lead = LeadOf(gradient);
  if (rounded != nullptr) by_four = by_four && LeadOf(rounded) % 4 == lead;
  if (by_four) {
    Launch(q, dim3(WalkingBlocks(CeilDiv(n + lead, 4))), dim3(kThreads), sizeof(StepScalars),
           Update<kType, kSlots, true>, coefficients, n, lead, scalars, gradient, parameters, slots,
           rounded);
  } else {
    Launch(q, dim3(WalkingBlocks(n)), dim3(kThreads), sizeof(StepScalars),
           Update<kType, kSlots, false>, coefficients, n, 0, scalars, gradient, parameters, slots,
           rounded);
  }
}

// A block of threads for each piece.
template <OptimizerType kType, int kSlots>
__global__ void __launch_bounds__(kThreads)
    UpdatePieces(OptimizerCoefficients coefficients, const UpdatePiece* pieces,
                 const StepScalars* scalars, const float* gradient, float* parameters,
                 OptimizerSlots slots, StoredBf16* rounded) {
  WaitForPrevious();
  const UpdatePiece piece = pieces[blockIdx.x];
  const StepScalars s = *scalars;
  if (s.apply == 0) return;
  coefficients.l2 = piece.l2;
  coefficients.weight_decay = piece.weight_decay;
  coefficients.rate_multiplier = piece.rate_multiplier;
  const auto update = [&]<int kLanes>(int64_t i) {
    const Lanes<kLanes> g = LoadLanes<kLanes>(gradient + i);
    Lanes<kLanes> w = LoadLanes<kLanes>(parameters + i);
    Lanes<kLanes> slot[kMostSlots] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) slot[k] = LoadLanes<kLanes>(slots.at[k] + i);
#pragma unroll
    for (int v = 0; v < kLanes; ++v) {
      float of_element[kMostSlots] = {slot[0].at[v], slot[1].at[v], slot[2].at[v]};
      OptimizerStep<kType>(coefficients, s, g.at[v], w.at[v], of_element);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) slot[k].at[v] = of_element[k];
    }
    StoreLanes<kLanes>(parameters + i, w);
    if (rounded != nullptr) StoreLanes<kLanes>(rounded + i, w);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) StoreLanes<kLanes>(slots.at[k] + i, slot[k]);
  };
  for (int64_t i = piece.begin + 4 * threadIdx.x; i < piece.end; i += 4 * kThreads) {
    if (i + 4 <= piece.end && i % 4 == 0) {
      update.template operator()<4>(i);
    } else {
#pragma unroll 1
      for (int64_t j = i; j < i + 4 && j < piece.end; ++j) update.template operator()<1>(j);
    }
  }
}

// ---- norms.

__device__ __forceinline__ double BlockSquares(int64_t n, const float* x) {
  return SumOfSquares([n, x](int i) { return i < n ? x[i] : 0.0f; }, SharedMemory<double>());
}
static_assert(kThreads >= kSquaresThreads);

__global__ void __launch_bounds__(kThreads) SumSquares(int64_t n, const float* x, double* sums) {
  WaitForPrevious();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kNormBlock;
  const double sum = BlockSquares(n - first, x + first);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    SumSquaresOf(const NormBlock* blocks, const float* x, double* sums) {
  WaitForPrevious();
  const NormBlock block = blocks[blockIdx.x];
  const double sum = BlockSquares(block.length, x + block.begin);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// ---- flags.

__device__ __forceinline__ uint32_t BitsOf(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    FlagRange(int64_t n, int lead, const T* x, uint32_t* flag) {
  WaitForPrevious();
  constexpr uint32_t kExponent = 0x7F800000u;
  bool found = false;
  Walk<true>(
      n, lead,
      [&](int64_t i) {
        const Lanes<4> v = LoadLanes<4>(x + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) found |= (BitsOf(v.at[k]) & kExponent) == kExponent;
      },
      [&](int64_t i) { found |= (BitsOf(FloatOf(x[i])) & kExponent) == kExponent; });
  if (found) atomicOr(flag, 1u);
}

// ---- digests: sums modulo 2^128, which no order changes.

// Many elements' sum. Halves of the low word are summed apart, so that no element needs a carry
// from word to word: at most 2^32 elements.
struct MixedSum {
  uint64_t low = 0, high = 0;  // halves of Digest::lo
  uint64_t hi = 0;

  __device__ __forceinline__ void Add(uint64_t tensor_key, uint64_t index, float value) {
    const Digest mixed = MixElement(tensor_key, index, BitsOf(value));
    low += static_cast<uint32_t>(mixed.lo);
    high += mixed.lo >> 32;
    hi += mixed.hi;
  }
  __device__ __forceinline__ void Add(uint64_t tensor_key, uint64_t index, const Lanes<4>& values) {
    // By twos: three terms are one addition.
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const Digest a =
          MixElement(tensor_key, index + static_cast<uint64_t>(k), BitsOf(values.at[k]));
      const Digest b =
          MixElement(tensor_key, index + static_cast<uint64_t>(k + 1), BitsOf(values.at[k + 1]));
      low = low + static_cast<uint32_t>(a.lo) + static_cast<uint32_t>(b.lo);
      high = high + (a.lo >> 32) + (b.lo >> 32);
      hi = hi + a.hi + b.hi;
    }
  }
  __device__ __forceinline__ Digest Whole() const {
    Digest sum = {low, hi};
    sum += Digest{high << 32, high >> 32};
    return sum;
  }
};

// Sums over a block's kThreads threads by a tree; valid in thread 0. `shared` has an element each.
__device__ __forceinline__ Digest SumOfBlock(Digest value, Digest* shared) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    if (thread >= stride && thread < 2 * stride) shared[thread] = value;
    __syncthreads();
    if (thread < stride) value += shared[thread + stride];
  }
  return value;
}

constexpr int kMixed = 4;                        // vectors of a thread whose loads are in flight
constexpr int64_t kMostDigestBlocks = 132 * 16;  // whose sums one block adds up

// Four blocks of a multiprocessor: no more, so that registers suffice for loads in flight.
__global__ void __launch_bounds__(kThreads, 4)
    DigestRange(int64_t n, int lead, const float* x, uint64_t tensor_key, uint64_t first_index,
                Digest* block_sums) {
  WaitForPrevious();
  MixedSum mixed;
  const int64_t step = 4 * static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) - lead;
  const auto part = [&](int64_t begin, int64_t end) {
#pragma unroll 1
    for (int64_t j = begin; j < end; ++j) {
      mixed.Add(tensor_key, first_index + static_cast<uint64_t>(j), x[j]);
    }
  };
  if (i < 0) {
    part(0, i + 4 < n ? i + 4 : n);
    i += step;
  }
  for (; i + (kMixed - 1) * step + 4 <= n; i += kMixed * step) {
    Lanes<4> values[kMixed];
#pragma unroll
    for (int k = 0; k < kMixed; ++k) values[k] = LoadLanes<4>(x + i + k * step);
#pragma unroll
    for (int k = 0; k < kMixed; ++k) {
      mixed.Add(tensor_key, first_index + static_cast<uint64_t>(i + k * step), values[k]);
    }
  }
#pragma unroll 1
  for (; i + 4 <= n; i += step) {
    mixed.Add(tensor_key, first_index + static_cast<uint64_t>(i), LoadLanes<4>(x + i));
  }
  if (i < n) part(i, n);
  const Digest sum = SumOfBlock(mixed.Whole(), SharedMemory<Digest>());
  if (threadIdx.x == 0) block_sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    AddDigests(int count, const Digest* block_sums, Digest* digest) {
  WaitForPrevious();
  Digest sum;
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) sum += block_sums[i];
  sum = SumOfBlock(sum, SharedMemory<Digest>());
  if (threadIdx.x == 0) *digest += sum;
}

// A block of threads for each piece.
__global__ void __launch_bounds__(kThreads, 4) SumPieces(const DigestPiece* pieces, Digest* digests,
                                                         const StepScalars* scalars, int64_t ring) {
  WaitForPrevious();
  const DigestPiece piece = pieces[blockIdx.x];
  MixedSum mixed;
  const int64_t fours = LeadOf(piece.data) == 0 ? piece.count / 4 : 0;
  int64_t i = threadIdx.x;
  for (; i + (kMixed - 1) * kThreads < fours; i += kMixed * kThreads) {
    Lanes<4> values[kMixed];
#pragma unroll
    for (int k = 0; k < kMixed; ++k) {
      values[k] = LoadLanes<4>(piece.data + 4 * (i + k * kThreads));
    }
#pragma unroll
    for (int k = 0; k < kMixed; ++k) {
      mixed.Add(piece.tensor_key, piece.first_index + static_cast<uint64_t>(4 * (i + k * kThreads)),
                values[k]);
    }
  }
#pragma unroll 1
  for (; i < fours; i += kThreads) {
    mixed.Add(piece.tensor_key, piece.first_index + static_cast<uint64_t>(4 * i),
              LoadLanes<4>(piece.data + 4 * i));
  }
#pragma unroll 1
  for (i = 4 * fours + threadIdx.x; i < piece.count; i += kThreads) {
    mixed.Add(piece.tensor_key, piece.first_index + static_cast<uint64_t>(i), piece.data[i]);
  }
  const Digest sum = SumOfBlock(mixed.Whole(), SharedMemory<Digest>());
  if (threadIdx.x != 0) return;
  const uint64_t place = scalars == nullptr ? 0 : scalars->step % static_cast<uint64_t>(ring);
  digests[place * gridDim.x + blockIdx.x] = sum;
}

// ---- sums of columns.

template <class T>
struct ColumnReduction {
  using Order = RowOrder<T>;
  static constexpr int kPlanes = 1, kMostThreads = Order::kFloat ? 1024 : 512;
  static constexpr int kGroup = Order::kFloat ? 4 : 8;  // rows whose loads are in flight

  const T* x;
  int64_t columns;
  float* sums;
  int64_t stride;

  template <int kVector>
  __device__ __forceinline__ void Accumulate(const LaneRows& rows, int64_t column,
                                             Partial<kVector, 1>* sum) const {
    const T* from = x + rows.first * columns + column;
    const int64_t step = Order::kLanes * columns;
    for (int left = rows.count; left > 0; left -= kGroup) {
      Held<T, kVector> row[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k, from += step) {
        if (k < left) row[k].Load(from);
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (k >= left) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum->plane[0].at[v] += row[k].At(v);
      }
    }
  }
  template <int kVector>
  __device__ __forceinline__ static void Combine(float, float, Partial<kVector, 1>* a,
                                                 const Partial<kVector, 1>& b) {
    AddPartial(a, b);
  }
  template <int kVector>
  __device__ __forceinline__ void Merge(const LeafOfChunks& chunks,
                                        LaneSum<kVector, Order::kLanes> lanes,
                                        int64_t column) const {
    double total[1][kVector];
    SumChunks(lanes, total);
    if (!lanes.is_first()) return;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[chunks.leaf * stride + column + v] = static_cast<float>(total[0][v]);
    }
  }
};

// ---- the canonical tree.

template <int kTail, bool kByFour>
__global__ void __launch_bounds__(kThreads)
    SumParts(int64_t n, int lead, TreeParts parts, int eights, float* out) {
  WaitForPrevious();
  Walk<kByFour>(
      n, lead, [&](int64_t i) { StoreLanes<4>(out + i, Tree<4, kTail>(parts, eights, i)); },
      [&](int64_t i) { StoreLanes<1>(out + i, Tree<1, kTail>(parts, eights, i)); });
}

template <int kTail>
void RunTreeSum(const Queue& q, int64_t n, const TreeParts& parts, int count, float* out) {
  bool by_four = true;
  for (int p = 0; p < count; ++p) by_four = by_four && SameLead(out, parts.at[p]);
  const int lead = LeadOf(out);
  if (by_four) {
    Launch(q, dim3(WalkingBlocks(CeilDiv(n + lead, 4))), dim3(kThreads), 0, SumParts<kTail, true>,
           n, lead, parts, count / 8, out);
  } else {
    Launch(q, dim3(WalkingBlocks(n)), dim3(kThreads), 0, SumParts<kTail, false>, n, 0, parts,
           count / 8, out);
  }
}

}  // namespace

namespace {

template <class Update>
void ForType(OptimizerType type, const Update& update) {
  using Type = OptimizerType;
  switch (type) {
    case Type::kSgd:
      return update.template operator()<Type::kSgd>();
    case Type::kMomentum:
      return update.template operator()<Type::kMomentum>();
    case Type::kNesterov:
      return update.template operator()<Type::kNesterov>();
    case Type::kAdam:
      return update.template operator()<Type::kAdam>();
    case Type::kAdagrad:
      return update.template operator()<Type::kAdagrad>();
    case Type::kAdadelta:
      return update.template operator()<Type::kAdadelta>();
    case Type::kRmsProp:
      return update.template operator()<Type::kRmsProp>();
    case Type::kRmsPropMomentum:
      return update.template operator()<Type::kRmsPropMomentum>();
    case Type::kRmsPropCentered:
      return update.template operator()<Type::kRmsPropCentered>();
    case Type::kRmsPropCenteredMomentum:
      return update.template operator()<Type::kRmsPropCenteredMomentum>();
  }
}

}  // namespace

void OptimizerUpdate(const Queue& q, const OptimizerCoefficients& coefficients, int64_t n,
                     const StepScalars* scalars, const float* gradient, float* parameters,
                     const OptimizerSlots& slots, uint16_t* rounded) {
  if (n == 0) return;
  ForType(coefficients.type, [&]<OptimizerType kType>() {
    RunUpdate<kType>(q, coefficients, n, scalars, gradient, parameters, slots,
                     reinterpret_cast<StoredBf16*>(rounded));
  });
}

void OptimizerUpdatePieces(const Queue& q, const OptimizerCoefficients& coefficients, int64_t count,
                           const UpdatePiece* pieces, const StepScalars* scalars,
                           const float* gradient, float* parameters, const OptimizerSlots& slots,
                           uint16_t* rounded) {
  if (count == 0) return;
  ForType(coefficients.type, [&]<OptimizerType kType>() {
    Launch(q, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0,
           UpdatePieces<kType, SlotCount(kType)>, coefficients, pieces, scalars, gradient,
           parameters, slots, reinterpret_cast<StoredBf16*>(rounded));
  });
}

void SquaredNorms(const Queue& q, int64_t n, const float* x, double* sums) {
  if (n == 0) return;
  Launch(q, dim3(static_cast<unsigned>(CeilDiv(n, kNormBlock))), dim3(kThreads),
         sizeof(double) * kSquaresThreads, SumSquares, n, x, sums);
}

void SquaredNormsOf(const Queue& q, int64_t count, const NormBlock* blocks, const float* x,
                    double* sums) {
  if (count == 0) return;
  Launch(q, dim3(static_cast<unsigned>(count)), dim3(kThreads), sizeof(double) * kSquaresThreads,
         SumSquaresOf, blocks, x, sums);
}

void FlagNonFinite(const Queue& q, int64_t n, const void* x, uint32_t* flag, ElementType type) {
  if (n == 0) return;
  WithElement(type, [&]<class T>() {
    const T* const elements = static_cast<const T*>(x);
    const int lead = LeadOf(elements) % 4;
    Launch(q, dim3(WalkingBlocks(CeilDiv(n + lead, 4))), dim3(kThreads), 0, FlagRange<T>, n, lead,
           elements, flag);
  });
}

void AccumulateDigest(const Queue& q, int64_t n, const float* x, uint64_t tensor_key,
                      uint64_t first_index, Digest* digest) {
  if (n == 0) return;
  static_assert(sizeof(Digest) * kMostDigestBlocks <= kWorkspaceBytes);
  const int lead = LeadOf(x);
  const auto blocks =
      static_cast<unsigned>(std::min(CeilDiv(n + lead, int64_t{4} * kThreads), kMostDigestBlocks));
  auto* const block_sums = static_cast<Digest*>(q.workspace);
  constexpr size_t kShared = sizeof(Digest) * kThreads;
  Launch(q, dim3(blocks), dim3(kThreads), kShared, DigestRange, n, lead, x, tensor_key, first_index,
         block_sums);
  Launch(q, dim3(1), dim3(kThreads), kShared, AddDigests, static_cast<int>(blocks), block_sums,
         digest);
}

void DigestPieces(const Queue& q, int64_t count, const DigestPiece* pieces, Digest* digests,
                  const StepScalars* scalars, int64_t ring) {
  if (count == 0) return;
  Launch(q, dim3(static_cast<unsigned>(count)), dim3(kThreads), sizeof(Digest) * kThreads,
         SumPieces, pieces, digests, scalars, ring);
}

void ColumnSums(const Queue& q, const Leaves& leaves, int64_t columns, const void* x, float* sums,
                int64_t stride, ElementType type) {
  constexpr int kOneBlockChunks = 16;
  WithElement(type, [&]<class T>() {
    const T* const elements = static_cast<const T*>(x);
    ReduceRows<kWideLanes<T>>(q, ColumnReduction<T>{elements, columns, sums, stride}, leaves,
                              columns, TakenWide(columns, elements), kOneBlockChunks);
  });
}

void TreeSum(const Queue& q, int64_t n, const float* const* parts, int count, float* out) {
  if (n == 0) return;
  WithTree(parts, count,
           [&]<int kTail>(const TreeParts& all) { RunTreeSum<kTail>(q, n, all, count, out); });
}

}  // namespace lockstep::device::cuda
