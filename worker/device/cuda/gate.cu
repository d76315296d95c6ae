// The end of a step before its update: one pass sums the gradient's parts, and their squares on the
// way; the last block of threads that is done with its own adds up what the step came to and
// decides.
#include "worker/device/cuda/flat_sums.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

// Two blocks of threads fit a multiprocessor's registers: one sums while the other adds up, and of
// a small gradient all are there at once.
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kSumGroup == kWarp && kMostLeaves <= kWarp);

// A block's elements, and places of SumOfSquares; then, of the block that decides, the tree's
// groups and two levels of it.
constexpr size_t kElementBytes = sizeof(float) * kNormBlock;
constexpr size_t kSharedBytes = kElementBytes + sizeof(double) * kSquaresThreads;
constexpr int kGroupsEach = 2;  // of a thread
constexpr int kSharedGroups = kGroupsEach * kThreads;
constexpr int kSharedValues = 512;  // of a level
static_assert(sizeof(SumGroup) * kSharedGroups + 2 * sizeof(double) * kSharedValues <=
              kElementBytes);

// The canonical tree over the values of the first `count` lanes; valid in the first. Neighbours are
// added, then neighbouring pairs, and so on; what has no neighbour passes unchanged: the tree that
// splits at the largest power of two.
template <class T>
__device__ __forceinline__ T TreeOfWarp(T value, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int stride = 1; stride < kWarp; stride *= 2) {
    const T right = __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(stride));
    if (lane % (2 * stride) == 0 && lane + stride < count) value = value + right;
  }
  return value;
}

// What the decision needs besides the norm, part of it from memory of the host: noted by one warp
// while the others sum.
__device__ __forceinline__ void TakeNotes(const StepGate& gate) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kWarp) return;
  double loss = 0;
  long long correct = 0;
  if (lane < gate.leaves) {
    loss = gate.results[lane].loss_sum;
    correct = gate.results[lane].correct;
  }
  loss = TreeOfWarp(loss, gate.leaves);
  correct = TreeOfWarp(correct, gate.leaves);
  if (lane != 0) return;
  GateNotes& notes = *gate.notes;
  const uint64_t step = gate.current->step;
  notes.scalars = gate.prepared[step % static_cast<uint64_t>(gate.ring)];
  notes.step = step;
  notes.latch = gate.update->apply;
  notes.loss = loss;
  notes.correct = correct;
  // The host may be setting it.
  notes.poison = gate.poison == nullptr ? 0 : *static_cast<const volatile uint32_t*>(gate.poison);
}

// Whether the block is the last of the grid to come here, and so sees what all have written before.
// `shared` is a place that no thread reads any more.
__device__ __forceinline__ bool IsLastToArrive(uint32_t* arrived, uint32_t* shared) {
  if (threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;  // for the next launch
    __threadfence();
    *shared = last ? 1 : 0;
  }
  __syncthreads();
  return *shared != 0;
}

// The tree over the squares, whose groups and values are in shared memory, or in these places of
// global memory where they are too many; `own` are the thread's.
__device__ __forceinline__ double SumOfLevels(const StepGate& gate,
                                              const SumGroup (&own)[kGroupsEach], double* values) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const SumGroup* groups = gate.groups;
  if (values == nullptr) {
    auto* const shared = SharedMemory<SumGroup>();
#pragma unroll
    for (int k = 0; k < kGroupsEach; ++k) shared[threadIdx.x + k * kThreads] = own[k];
    groups = shared;
    values = reinterpret_cast<double*>(shared + kSharedGroups);
    __syncthreads();
  }
  const double* from = gate.squares;
  double* to = values;
  double* other = values + gate.level_groups[0];
  for (int level = 0; level < gate.levels; ++level) {
    const int count = gate.level_groups[level];
    for (int g = warp; g < count; g += kWarps) {
      const SumGroup of = groups[g];
      const double value = lane < of.count ? from[of.begin + lane] : 0.0;
      const double sum = TreeOfWarp(value, of.count);
      if (lane == 0) to[g] = sum;
    }
    __syncthreads();
    groups += count;
    from = to;
    to = other;
    other = const_cast<double*>(from);  // our own
  }
  return gate.block_count == 0 ? 0.0 : *from;
}

__device__ __forceinline__ void Decide(const StepGate& gate, const GateNotes& notes,
                                       double square) {
  const double norm = __builtin_sqrt(square);
  const bool finite = IsFinite(notes.loss) && IsFinite(norm);
  StepScalars scalars = notes.scalars;
  scalars.apply = finite && notes.poison == 0 ? notes.latch : 0;
  scalars.gradient_scale = static_cast<float>(ClipScale(norm, gate.clip_norm));
  *gate.update = scalars;
  gate.current->step = notes.step + 1;
  StepOutcome outcome;
  outcome.step = notes.step;
  outcome.loss_sum = notes.loss;
  outcome.correct = notes.correct;
  outcome.gradient_norm = norm;
  outcome.applied = scalars.apply;
  gate.outcomes[notes.step % static_cast<uint64_t>(gate.ring)] = outcome;
}

// The first block takes notes, each other sums one of the gradient's. `out` takes the sums (null:
// the one part is the gradient); by_four: all parts and it are aligned. `values` has room for two
// levels behind the first, where shared memory has not.
template <int kTail>
__global__ void __launch_bounds__(kThreads, 2)
    SumAndDecide(StepGate gate, TreeParts parts, int eights, bool by_four, float* out,
                 int group_count, double* values) {
  WaitForPrevious();
  const int thread = static_cast<int>(threadIdx.x);
  float* const elements = SharedMemory<float>();
  SumGroup groups[kGroupsEach];  // on their way meanwhile
#pragma unroll
  for (int k = 0; k < kGroupsEach; ++k) {
    if (thread + k * kThreads < group_count) groups[k] = gate.groups[thread + k * kThreads];
  }
  if (blockIdx.x == 0) {
    TakeNotes(gate);
  } else {
    const NormBlock block = gate.blocks[blockIdx.x - 1];
    const bool wide = by_four && block.begin % 4 == 0;
    float* const to = out == nullptr ? nullptr : out + block.begin;
#pragma unroll 1
    for (int e = 4 * thread; e < kNormBlock; e += 4 * kThreads) {
      if (wide && e + 4 <= block.length) {
        const Lanes<4> sum = Tree<4, kTail>(parts, eights, block.begin + e);
        if (to != nullptr) StoreLanes<4>(to + e, sum);
        StoreLanes<4>(elements + e, sum);
        continue;
      }
#pragma unroll 1
      for (int k = e; k < e + 4; ++k) {
        Lanes<1> sum = {};
        if (k < block.length) {
          sum = Tree<1, kTail>(parts, eights, block.begin + k);
          if (to != nullptr) StoreLanes<1>(to + k, sum);
        }
        elements[k] = sum.at[0];
      }
    }
    __syncthreads();
    const double sum = SumOfSquares([elements](int e) { return elements[e]; },
                                    reinterpret_cast<double*>(elements + kNormBlock));
    if (thread == 0) gate.squares[blockIdx.x - 1] = sum;
  }
  if (!IsLastToArrive(&gate.notes->arrived, reinterpret_cast<uint32_t*>(elements))) return;
  __syncthreads();  // all have read that
  GateNotes notes;
  if (thread == 0) notes = *gate.notes;  // on their way meanwhile
  const double square = SumOfLevels(gate, groups, values);
  if (thread == 0) Decide(gate, notes, square);
}

}  // namespace

void Gate(const Queue& q, const StepGate& gate, const float* const* parts, int count,
          float* gradient) {
  int groups = 0;
  for (int level = 0; level < gate.levels; ++level) groups += gate.level_groups[level];
  const bool shared = groups <= kSharedGroups && gate.level_groups[0] <= kSharedValues;
  double* const values = shared ? nullptr : static_cast<double*>(q.workspace);
  const float* const whole = gradient;
  float* const out = count == 0 ? nullptr : gradient;
  if (count == 0) parts = &whole, count = 1;
  bool by_four = IsAligned16(gradient);
  for (int p = 0; p < count; ++p) by_four = by_four && IsAligned16(parts[p]);
  WithTree(parts, count, [&]<int kTail>(const TreeParts& all) {
    Launch(q, dim3(static_cast<unsigned>(gate.block_count + 1)), dim3(kThreads), kSharedBytes,
           SumAndDecide<kTail>, gate, all, count / 8, by_four, out, shared ? groups : 0, values);
  });
}

bool KernelsWait() {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, SumAndDecide<0>) == cudaSuccess &&
         attributes.ptxVersion >= 90;
}

}  // namespace lockstep::device::cuda
