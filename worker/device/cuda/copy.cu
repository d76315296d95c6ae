// Copies between layouts: padding, cropping, subsampling, concatenation, transposition.
#include <algorithm>
#include <utility>

#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostAxes = 4;                       // a row's three and the rows
constexpr int64_t kMostMerged = int64_t{1} << 28;  // elements of an axis, which a launch can count

struct Axis {
  int64_t size = 1, from = 0, to = 0;
};

// The elements of a copy, innermost axis first, in the order in which they lie in the target, with
// axes that lie behind each other in both merged: neighbouring threads then write neighbours.
struct Walk {
  Walk(const StridedCopy& copy, int64_t rows) {
    const Axis given[kMostAxes] = {{copy.size[2], copy.from[2], copy.to[2]},
                                   {copy.size[1], copy.from[1], copy.to[1]},
                                   {copy.size[0], copy.from[0], copy.to[0]},
                                   {rows, copy.from_row, copy.to_row}};
    for (const Axis& axis : given) {
      if (axis.size != 1) axes[count++] = axis;
    }
    std::stable_sort(axes, axes + count,
                     [](const Axis& a, const Axis& b) { return std::abs(a.to) < std::abs(b.to); });
    int merged = 0;
    for (int i = 1; i < count; ++i) {
      Axis& inner = axes[merged];
      if (inner.size * axes[i].size <= kMostMerged && axes[i].from == inner.from * inner.size &&
          axes[i].to == inner.to * inner.size) {
        inner.size *= axes[i].size;
      } else {
        axes[++merged] = axes[i];
      }
    }
    if (count > 0) count = merged + 1;
    std::fill(axes + count, axes + kMostAxes, Axis());
    // Launches are cut along the last.
    if (count > 1) std::swap(axes[count - 1], axes[kMostAxes - 1]);
  }

  // Whether all runs of four neighbours lie at aligned addresses of both.
  bool IsByFour() const {
    if (axes[0].from != 1 || axes[0].to != 1 || axes[0].size % 4 != 0) return false;
    return std::all_of(axes + 1, axes + kMostAxes,
                       [](const Axis& axis) { return axis.from % 4 == 0 && axis.to % 4 == 0; });
  }

  int count = 0;
  Axis axes[kMostAxes];
};

// Strides are of elements; by_size[0] counts lanes' worth of them.
struct Strides {
  Divisor by_size[kMostAxes - 1];
  int64_t from[kMostAxes], to[kMostAxes];
};

template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    CopyElements(uint32_t threads, Strides strides, const float* __restrict__ x,
                 float* __restrict__ y) {
  WaitForPrevious();
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  if (thread >= threads) return;
  uint32_t index = thread;
  int64_t from = 0, to = 0;
#pragma unroll
  for (int axis = 0; axis < kMostAxes; ++axis) {
    const int64_t at = axis + 1 < kMostAxes ? strides.by_size[axis].TakeRemainder(index) : index;
    from += at * strides.from[axis];
    to += at * strides.to[axis];
  }
  StoreLanes<kLanes>(y + to, LoadLanes<kLanes>(x + from));
}

template <int kLanes>
void RunCopy(const Queue& q, const Axis (&axes)[kMostAxes], const float* x, float* y) {
  const Strides strides = {
      {Divisor(axes[0].size / kLanes), Divisor(axes[1].size), Divisor(axes[2].size)},
      {axes[0].from * kLanes, axes[1].from, axes[2].from, axes[3].from},
      {axes[0].to * kLanes, axes[1].to, axes[2].to, axes[3].to}};
  const int64_t inner = axes[0].size / kLanes * axes[1].size * axes[2].size;
  ForEachPart(axes[3].size, inner, [&](int64_t first, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * inner);
    Launch(q, dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))), dim3(kThreads), 0,
           CopyElements<kLanes>, threads, strides, x + first * axes[3].from,
           y + first * axes[3].to);
  });
}

}  // namespace

void CopyStrided(const Queue& q, const StridedCopy& copy, int64_t rows, const float* x, float* y) {
  if (rows == 0 || copy.elements() == 0) return;
  const Walk walk(copy, rows);
  x += copy.from_begin;
  y += copy.to_begin;
  const bool by_four = walk.IsByFour() && IsAligned16(x) && IsAligned16(y);
  (by_four ? RunCopy<4> : RunCopy<1>)(q, walk.axes, x, y);
}

}  // namespace lockstep::device::cuda
