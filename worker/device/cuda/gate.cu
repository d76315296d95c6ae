// The gate of a step: one block of threads adds up what the step came to and decides.
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kSumGroup == kWarp && kMostLeaves <= kWarp);

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

// `values` has room for two levels behind the first.
__global__ void __launch_bounds__(kThreads) Decide(StepGate gate, double* values) {
  WaitForPrevious();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // What the first thread needs in the end, part of it from memory of the host, is asked for first.
  double loss = 0;
  long long correct = 0;
  StepScalars scalars;
  uint64_t step = 0, place = 0;
  uint64_t latch = 0;
  uint32_t poison = 0;
  if (warp == 0) {
    if (lane == 0) {
      step = gate.current->step;
      place = step % static_cast<uint64_t>(gate.ring);
      scalars = gate.prepared[place];
      latch = gate.update->apply;
      // The host may be setting it.
      if (gate.poison != nullptr) poison = *static_cast<const volatile uint32_t*>(gate.poison);
    }
    if (lane < gate.leaves) {
      loss = gate.results[lane].loss_sum;
      correct = gate.results[lane].correct;
    }
    loss = TreeOfWarp(loss, gate.leaves);
    correct = TreeOfWarp(correct, gate.leaves);
  }
  if (values == nullptr) values = SharedMemory<double>();
  const double* from = gate.squares;
  const SumGroup* groups = gate.groups;
  double* to = values;
  double* other = values + gate.level_groups[0];
  for (int level = 0; level < gate.levels; ++level) {
    const int count = gate.level_groups[level];
    for (int g = warp; g < count; g += kWarps) {
      const SumGroup group = groups[g];
      const double value = lane < group.count ? from[group.begin + lane] : 0.0;
      const double sum = TreeOfWarp(value, group.count);
      if (lane == 0) to[g] = sum;
    }
    __syncthreads();
    groups += count;
    from = to;
    to = other;
    other = const_cast<double*>(from);  // our own
  }
  if (threadIdx.x != 0) return;
  const double norm = from == nullptr ? 0.0 : __builtin_sqrt(*from);
  const bool finite = IsFinite(loss) && IsFinite(norm);
  scalars.apply = finite && poison == 0 ? latch : 0;
  scalars.gradient_scale = static_cast<float>(ClipScale(norm, gate.clip_norm));
  *gate.update = scalars;
  gate.current->step = step + 1;
  StepOutcome outcome;
  outcome.step = step;
  outcome.loss_sum = loss;
  outcome.correct = correct;
  outcome.gradient_norm = norm;
  outcome.applied = scalars.apply;
  gate.outcomes[place] = outcome;
}

}  // namespace

void Gate(const Queue& q, const StepGate& gate) {
  constexpr size_t kMostShared = 32768;
  const size_t bytes = 2 * sizeof(double) * static_cast<size_t>(gate.level_groups[0]);
  const bool shared = bytes <= kMostShared;
  Launch(q, dim3(1), dim3(kThreads), shared ? bytes : 0, Decide, gate,
         shared ? nullptr : static_cast<double*>(q.workspace));
}

bool KernelsWait() {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, Decide) == cudaSuccess && attributes.ptxVersion >= 90;
}

}  // namespace lockstep::device::cuda
