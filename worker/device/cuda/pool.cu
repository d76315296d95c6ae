// Pooling over NHWC, a thread per output (backward: per input, or per two by two of them) of one or
// four channels. Windows are walked in raster order; backward gathers from the windows that
// cover an input, in raster order.
#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;

struct Geometry {
  Geometry(const PoolShape& shape, int lanes, int64_t walked_height, int64_t walked_width)
      : height(static_cast<int>(shape.height)),
        width(static_cast<int>(shape.width)),
        out_height(static_cast<int>(shape.out_height())),
        out_width(static_cast<int>(shape.out_width())),
        channels(static_cast<int>(shape.channels)),
        kernel(static_cast<int>(shape.kernel)),
        stride(static_cast<int>(shape.stride)),
        padding(static_cast<int>(shape.padding)),
        by_units(shape.channels / lanes),
        by_width(walked_width),
        by_height(walked_height),
        by_stride(shape.stride) {}

  int height, width, out_height, out_width, channels, kernel, stride, padding;
  Divisor by_units, by_width, by_height;  // of what a thread walks: outputs or inputs
  Divisor by_stride;
};

// Where a thread is: a row's place (y, x) and its first channel.
struct Place {
  __device__ __forceinline__ Place(const Geometry& g, uint32_t index, int lanes) {
    channel = static_cast<int>(g.by_units.TakeRemainder(index)) * lanes;
    x = static_cast<int>(g.by_width.TakeRemainder(index));
    y = static_cast<int>(g.by_height.TakeRemainder(index));
    row = index;
  }
  uint32_t row;
  int y, x, channel;
};

__device__ __forceinline__ uint32_t ThreadIndex() { return blockIdx.x * kThreads + threadIdx.x; }

__device__ __forceinline__ int64_t InputAt(const Geometry& g, uint32_t row, int y, int x,
                                           int channel) {
  return ((int64_t{row} * g.height + y) * g.width + x) * g.channels + channel;
}

// Calls body(place in the window, values there) for every place of an output's window that lies
// inside the input. kKernel: its size, so that the loads of all places are in flight; 0: any.
template <int kLanes, int kKernel, class T, class Body>
__device__ __forceinline__ void ForEachPlace(const Geometry& g, const Place& output, const T* x,
                                             Body body) {
  const int top = output.y * g.stride - g.padding, left = output.x * g.stride - g.padding;
  if constexpr (kKernel > 0) {
    const auto is_inside = [&](int i, int j) {
      return top + i >= 0 && top + i < g.height && left + j >= 0 && left + j < g.width;
    };
    Lanes<kLanes> values[kKernel][kKernel];
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        values[i][j] = {};
        if (!is_inside(i, j)) continue;
        values[i][j] =
            LoadLanes<kLanes>(x + InputAt(g, output.row, top + i, left + j, output.channel));
      }
    }
#pragma unroll
    for (int i = 0; i < kKernel; ++i) {
#pragma unroll
      for (int j = 0; j < kKernel; ++j) {
        if (is_inside(i, j)) body(i * kKernel + j, values[i][j]);
      }
    }
  } else {
    const int y_begin = top < 0 ? -top : 0, x_begin = left < 0 ? -left : 0;
    for (int i = y_begin; i < g.kernel && top + i < g.height; ++i) {
      for (int j = x_begin; j < g.kernel && left + j < g.width; ++j) {
        body(i * g.kernel + j,
             LoadLanes<kLanes>(x + InputAt(g, output.row, top + i, left + j, output.channel)));
      }
    }
  }
}

// Calls body(place in the window, element of y) for every output whose window covers an input.
template <class Body>
__device__ __forceinline__ void ForEachCover(const Geometry& g, const Place& input, Body body) {
  const int y = input.y + g.padding, x = input.x + g.padding;
  const auto first = [&g](int at) {
    return at < g.kernel ? 0
                         : static_cast<int>(g.by_stride.Quotient(
                               static_cast<uint32_t>(at - g.kernel + g.stride)));
  };
  const int x_first = first(x);
  for (int oy = first(y); oy < g.out_height && oy * g.stride <= y; ++oy) {
    for (int ox = x_first; ox < g.out_width && ox * g.stride <= x; ++ox) {
      const int64_t output = (int64_t{input.row} * g.out_height + oy) * g.out_width + ox;
      body((y - oy * g.stride) * g.kernel + x - ox * g.stride, output * g.channels + input.channel);
    }
  }
}

template <int kLanes>
__device__ __forceinline__ uint32_t LoadBytes(const uint8_t* p) {
  if constexpr (kLanes == 4) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else {
    return *p;
  }
}
template <int kLanes>
__device__ __forceinline__ void StoreBytes(uint8_t* p, uint32_t bytes) {
  if constexpr (kLanes == 4) {
    *reinterpret_cast<uint32_t*>(p) = bytes;
  } else {
    *p = static_cast<uint8_t>(bytes);
  }
}

template <int kLanes, int kKernel, class T>
__global__ void __launch_bounds__(kThreads)
    MaxForward(uint32_t threads, Geometry g, const T* __restrict__ x, T* __restrict__ y,
               uint8_t* __restrict__ argmax) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  Lanes<kLanes> best = {};
  int place[kLanes] = {};
  bool begun = false;
  const Place output(g, index, kLanes);
  ForEachPlace<kLanes, kKernel>(g, output, x, [&](int at, const Lanes<kLanes>& value) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const bool wins = !begun || Less(best.at[k], value.at[k]) || IsNan(value.at[k]);
      best.at[k] = wins ? value.at[k] : best.at[k];
      place[k] = wins ? at : place[k];
    }
    begun = true;
  });
  uint32_t places = 0;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) places |= static_cast<uint32_t>(place[k]) << (8 * k);
  StoreLanes<kLanes>(y + int64_t{index} * kLanes, best);
  StoreBytes<kLanes>(argmax + int64_t{index} * kLanes, places);
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads)
    MaxBackward(uint32_t threads, Geometry g, const T* __restrict__ dy,
                const uint8_t* __restrict__ argmax, T* __restrict__ dx) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  Lanes<kLanes> sum = {};
  ForEachCover(g, Place(g, index, kLanes), [&](int at, int64_t element) {
    Held<T, kLanes> gradient;
    gradient.Load(dy + element);
    const uint32_t winners = LoadBytes<kLanes>(argmax + element);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const bool won = ((winners >> (8 * k)) & 0xFFu) == static_cast<uint32_t>(at);
      sum.at[k] = sum.at[k] + (won ? gradient.At(k) : 0.0f);
    }
  });
  StoreLanes<kLanes>(dx + int64_t{index} * kLanes, sum);
}

// Of stride 2, a thread for each cell of two by two inputs, counted with the padding: the windows
// that cover one begin at this cell or, where they are larger, at those before it. They are read
// once, all at the same time, and their places in them are known.
template <int kLanes, int kKernel, class T>
__global__ void __launch_bounds__(kThreads)
    MaxBackwardCells(uint32_t threads, Geometry g, const T* __restrict__ dy,
                     const uint8_t* __restrict__ argmax, T* __restrict__ dx) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  constexpr int kStride = 2, kReach = (kKernel + kStride - 1) / kStride;
  const Place cell(g, index, kLanes);
  uint32_t winners[kReach][kReach];
  Held<T, kLanes> gradient[kReach][kReach];
#pragma unroll
  for (int i = 0; i < kReach; ++i) {
#pragma unroll
    for (int j = 0; j < kReach; ++j) {
      const int y = cell.y - (kReach - 1) + i, x = cell.x - (kReach - 1) + j;
      // Where there is no window, another's, of which nothing is taken.
      const int from_y = min(max(y, 0), g.out_height - 1);
      const int from_x = min(max(x, 0), g.out_width - 1);
      const uint32_t element =
          ((cell.row * g.out_height + from_y) * g.out_width + from_x) * g.channels + cell.channel;
      gradient[i][j].Load(dy + element);
      winners[i][j] = LoadBytes<kLanes>(argmax + element);
      if (y != from_y || x != from_x) winners[i][j] = ~0u;
    }
  }
  Lanes<kLanes> sum[kStride][kStride] = {};
#pragma unroll
  for (int window = 0; window < kReach * kReach; ++window) {
    const int i = window / kReach, j = window % kReach;
#pragma unroll
    for (int input = 0; input < kStride * kStride; ++input) {
      const int y = kStride * (kReach - 1 - i) + input / kStride;
      const int x = kStride * (kReach - 1 - j) + input % kStride;
      if (y >= kKernel || x >= kKernel) continue;
      Lanes<kLanes>& to = sum[input / kStride][input % kStride];
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        const uint32_t place = (winners[i][j] >> (8 * k)) & 0xFFu;
        // A sum is never -0, which 0 would change.
        if (place == static_cast<uint32_t>(y * kKernel + x)) {
          to.at[k] = to.at[k] + gradient[i][j].At(k);
        }
      }
    }
  }
  const int top = kStride * cell.y - g.padding, left = kStride * cell.x - g.padding;
  const uint32_t first = ((cell.row * g.height + top) * g.width + left) * g.channels + cell.channel;
#pragma unroll
  for (int i = 0; i < kStride; ++i) {
#pragma unroll
    for (int j = 0; j < kStride; ++j) {
      if (top + i < 0 || top + i >= g.height || left + j < 0 || left + j >= g.width) continue;
      const uint32_t element = first + (i * g.width + j) * g.channels;
      StoreLanes<kLanes>(dx + element, sum[i][j]);
    }
  }
}

template <int kLanes, int kKernel, class T>
__global__ void __launch_bounds__(kThreads)
    AverageForward(uint32_t threads, Geometry g, float share, const T* __restrict__ x,
                   T* __restrict__ y) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  Lanes<kLanes> sum = {};
  const Place output(g, index, kLanes);
  ForEachPlace<kLanes, kKernel>(g, output, x, [&](int, const Lanes<kLanes>& value) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) sum.at[k] = sum.at[k] + value.at[k];
  });
#pragma unroll
  for (int k = 0; k < kLanes; ++k) sum.at[k] = sum.at[k] * share;
  StoreLanes<kLanes>(y + int64_t{index} * kLanes, sum);
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads)
    AverageBackward(uint32_t threads, Geometry g, float share, const T* __restrict__ dy,
                    T* __restrict__ dx) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  Lanes<kLanes> sum = {};
  ForEachCover(g, Place(g, index, kLanes), [&](int, int64_t element) {
    const Lanes<kLanes> gradient = LoadLanes<kLanes>(dy + element);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) sum.at[k] = sum.at[k] + gradient.at[k] * share;
  });
  StoreLanes<kLanes>(dx + int64_t{index} * kLanes, sum);
}

// ---- global averages. Sum p of kSums of a channel takes the places p, p + kSums, ... of the
// sample, in float over kRun of them and then in double; the sums are added in order.
constexpr int kSums = 8;
constexpr int kRun = 8;

// Adds what a run's places come to, to the sum of runs.
template <int kLanes>
__device__ __forceinline__ void AddRun(const Lanes<kLanes> (&values)[kRun],
                                       double (&total)[kLanes]) {
  Lanes<kLanes> sum = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k) sum.at[k] = sum.at[k] + values[i].at[k];
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) total[k] = total[k] + static_cast<double>(sum.at[k]);
}

// Few threads read much each: the next run is on its way while one is added, and registers for both
// are worth more than blocks.
template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads, 2)
    GlobalAverage(int spatial, int channels, int tiles, int tile_units, float share,
                  const T* __restrict__ x, float* __restrict__ y) {
  WaitForPrevious();
  double* const sums = SharedMemory<double>();  // {kSums, tile_units, kLanes}
  const int64_t row = blockIdx.x / static_cast<unsigned>(tiles);
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles));
  const int thread = static_cast<int>(threadIdx.x);
  const int unit = thread % tile_units, part = thread / tile_units;
  const int channel = (tile * tile_units + unit) * kLanes;
  const bool inside = channel < channels;
  double total[kLanes] = {};
  if (inside) {
    const int64_t step = int64_t{kSums} * channels;  // of a sum's places
    const T* from = x + (row * spatial + part) * channels + channel;
    const auto load = [&](Lanes<kLanes>(&values)[kRun]) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = LoadLanes<kLanes>(from + i * step);
      from += kRun * step;
    };
    int left = (spatial - part + kSums - 1) / kSums;  // places
    Lanes<kLanes> values[kRun], more[kRun];
    if (left >= kRun) {
      load(values);
#pragma unroll 1
      for (; left >= 3 * kRun; left -= 2 * kRun) {
        load(more);
        AddRun(values, total);
        load(values);
        AddRun(more, total);
      }
      if (left >= 2 * kRun) {
        load(more);
        AddRun(values, total);
        AddRun(more, total);
        left -= 2 * kRun;
      } else {
        AddRun(values, total);
        left -= kRun;
      }
    }
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        values[i] = {};  // which adds nothing
        if (i < left) values[i] = LoadLanes<kLanes>(from + i * step);
      }
      AddRun(values, total);
    }
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) sums[thread * kLanes + k] = total[k];
  __syncthreads();
  if (part > 0 || !inside) return;
  Lanes<kLanes> average;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    double sum = sums[unit * kLanes + k];
    for (int p = 1; p < kSums; ++p) sum = sum + sums[(p * tile_units + unit) * kLanes + k];
    average.at[k] = static_cast<float>(sum) * share;
  }
  StoreLanes<kLanes>(y + row * channels + channel, average);
}

template <int kLanes, class T>
__global__ void __launch_bounds__(kThreads)
    GlobalAverageSpread(uint32_t threads, int channels, Divisor by_units, Divisor by_spatial,
                        float share, const float* __restrict__ dy, T* __restrict__ dx) {
  WaitForPrevious();
  const uint32_t index = ThreadIndex();
  if (index >= threads) return;
  uint32_t row = index;
  const uint32_t unit = by_units.TakeRemainder(row);
  row = by_spatial.Quotient(row);
  Lanes<kLanes> value = LoadLanes<kLanes>(dy + int64_t{row} * channels + unit * kLanes);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) value.at[k] = value.at[k] * share;
  StoreLanes<kLanes>(dx + int64_t{index} * kLanes, value);
}

dim3 GridOf(int64_t threads) { return dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))); }

int64_t InputOf(const PoolShape& shape) { return shape.height * shape.width * shape.channels; }
int64_t OutputOf(const PoolShape& shape) {
  return shape.out_height() * shape.out_width() * shape.channels;
}

// Calls launch(first row, geometry, threads) for parts of the rows; a thread for `lanes` elements
// of y, of x, or of cells of two by two places of x with its padding.
enum class Walk { kOutputs, kInputs, kCells };
template <class LaunchPart>
void ForEachPartOf(Walk walk, const PoolShape& shape, int64_t rows, int lanes, LaunchPart launch) {
  const auto places = [&](int64_t in, int64_t out) {
    return walk == Walk::kOutputs ? out : walk == Walk::kInputs ? in : (in + shape.padding + 1) / 2;
  };
  const int64_t height = places(shape.height, shape.out_height()),
                width = places(shape.width, shape.out_width());
  const Geometry geometry(shape, lanes, height, width);
  ForEachPart(rows, std::max(InputOf(shape), OutputOf(shape)), [&](int64_t row, int64_t count) {
    launch(row, geometry, static_cast<uint32_t>(count * height * width * (shape.channels / lanes)));
  });
}

template <int kLanes, class T>
void RunMaxForward(const Queue& q, const PoolShape& shape, int64_t rows, const T* x, T* y,
                   uint8_t* argmax) {
  const auto kernel = shape.kernel == 2   ? MaxForward<kLanes, 2, T>
                      : shape.kernel == 3 ? MaxForward<kLanes, 3, T>
                                          : MaxForward<kLanes, 0, T>;
  ForEachPartOf(Walk::kOutputs, shape, rows, kLanes, [&](int64_t row, auto& g, uint32_t threads) {
    Launch(q, GridOf(threads), dim3(kThreads), 0, kernel, threads, g, x + row * InputOf(shape),
           y + row * OutputOf(shape), argmax + row * OutputOf(shape));
  });
}

template <int kLanes, class T>
void RunMaxBackward(const Queue& q, const PoolShape& shape, int64_t rows, const T* dy,
                    const uint8_t* argmax, T* dx) {
  const bool cells = shape.stride == 2 && (shape.kernel == 2 || shape.kernel == 3);
  const auto kernel = !cells              ? MaxBackward<kLanes, T>
                      : shape.kernel == 2 ? MaxBackwardCells<kLanes, 2, T>
                                          : MaxBackwardCells<kLanes, 3, T>;
  const Walk walk = cells ? Walk::kCells : Walk::kInputs;
  ForEachPartOf(walk, shape, rows, kLanes, [&](int64_t row, auto& g, uint32_t threads) {
    Launch(q, GridOf(threads), dim3(kThreads), 0, kernel, threads, g, dy + row * OutputOf(shape),
           argmax + row * OutputOf(shape), dx + row * InputOf(shape));
  });
}

float ShareOf(const PoolShape& shape) {
  return 1.0f / static_cast<float>(shape.kernel * shape.kernel);
}

template <int kLanes, class T>
void RunAverageForward(const Queue& q, const PoolShape& shape, int64_t rows, const T* x, T* y) {
  const auto kernel = shape.kernel == 2   ? AverageForward<kLanes, 2, T>
                      : shape.kernel == 3 ? AverageForward<kLanes, 3, T>
                                          : AverageForward<kLanes, 0, T>;
  ForEachPartOf(Walk::kOutputs, shape, rows, kLanes, [&](int64_t row, auto& g, uint32_t threads) {
    Launch(q, GridOf(threads), dim3(kThreads), 0, kernel, threads, g, ShareOf(shape),
           x + row * InputOf(shape), y + row * OutputOf(shape));
  });
}

template <int kLanes, class T>
void RunAverageBackward(const Queue& q, const PoolShape& shape, int64_t rows, const T* dy, T* dx) {
  ForEachPartOf(Walk::kInputs, shape, rows, kLanes, [&](int64_t row, auto& g, uint32_t threads) {
    Launch(q, GridOf(threads), dim3(kThreads), 0, AverageBackward<kLanes, T>, threads, g,
           ShareOf(shape), dy + row * OutputOf(shape), dx + row * InputOf(shape));
  });
}

template <int kLanes, class T>
void RunGlobalAverage(const Queue& q, int64_t rows, int64_t spatial, int64_t channels, const T* x,
                      float* y) {
  const int64_t units = channels / kLanes;
  int tile_units = kThreads / kSums;
  while (tile_units / 2 >= units) tile_units /= 2;
  // Blocks for all of a large GPU, but of whole lines of 128 bytes.
  constexpr int64_t kFill = 132 * 4, kLineUnits = 32 / kLanes;
  while (tile_units / 2 >= kLineUnits && rows * CeilDiv(units, tile_units) < kFill) tile_units /= 2;
  const int64_t tiles = CeilDiv(units, tile_units);
  const int threads = tile_units * kSums;
  ForEachPart(rows, tiles, [&](int64_t row, int64_t count) {
    Launch(q, dim3(static_cast<unsigned>(count * tiles)), dim3(static_cast<unsigned>(threads)),
           static_cast<size_t>(threads * kLanes) * sizeof(double), GlobalAverage<kLanes, T>,
           spatial, channels, tiles, tile_units, 1.0f / static_cast<float>(spatial),
           x + row * spatial * channels, y + row * channels);
  });
}

template <int kLanes, class T>
void RunGlobalAverageSpread(const Queue& q, int64_t rows, int64_t spatial, int64_t channels,
                            const float* dy, T* dx) {
  const Divisor by_units(channels / kLanes), by_spatial(spatial);
  ForEachPart(rows, spatial * channels, [&](int64_t row, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * spatial * channels / kLanes);
    Launch(q, GridOf(threads), dim3(kThreads), 0, GlobalAverageSpread<kLanes, T>, threads, channels,
           by_units, by_spatial, 1.0f / static_cast<float>(spatial), dy + row * channels,
           dx + row * spatial * channels);
  });
}

bool IsAligned4(const void* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; }

}  // namespace

void MaxPoolForward(const Queue& q, const PoolShape& shape, int64_t rows, const void* x, void* y,
                    uint8_t* argmax) {
  const bool by_four = TakenByFour(shape.channels, x, y) && IsAligned4(argmax);
  WithElement(shape.type, [&]<class T>() {
    (by_four ? RunMaxForward<4, T> : RunMaxForward<1, T>)(q, shape, rows, static_cast<const T*>(x),
                                                          static_cast<T*>(y), argmax);
  });
}

void MaxPoolBackward(const Queue& q, const PoolShape& shape, int64_t rows, const void* dy,
                     const uint8_t* argmax, void* dx) {
  const bool by_four = TakenByFour(shape.channels, dy, dx) && IsAligned4(argmax);
  WithElement(shape.type, [&]<class T>() {
    (by_four ? RunMaxBackward<4, T> : RunMaxBackward<1, T>)(q, shape, rows,
                                                            static_cast<const T*>(dy), argmax,
                                                            static_cast<T*>(dx));
  });
}

void AveragePoolForward(const Queue& q, const PoolShape& shape, int64_t rows, const void* x,
                        void* y) {
  const bool by_four = TakenByFour(shape.channels, x, y);
  WithElement(shape.type, [&]<class T>() {
    (by_four ? RunAverageForward<4, T> : RunAverageForward<1, T>)(q, shape, rows,
                                                                  static_cast<const T*>(x),
                                                                  static_cast<T*>(y));
  });
}

void AveragePoolBackward(const Queue& q, const PoolShape& shape, int64_t rows, const void* dy,
                         void* dx) {
  const bool by_four = TakenByFour(shape.channels, dy, dx);
  WithElement(shape.type, [&]<class T>() {
    (by_four ? RunAverageBackward<4, T> : RunAverageBackward<1, T>)(q, shape, rows,
                                                                    static_cast<const T*>(dy),
                                                                    static_cast<T*>(dx));
  });
}

void GlobalAveragePoolForward(const Queue& q, int64_t rows, int64_t spatial, int64_t channels,
                              const void* x, float* y, ElementType type) {
  const bool by_four = TakenByFour(channels, x, y);
  WithElement(type, [&]<class T>() {
    (by_four ? RunGlobalAverage<4, T> : RunGlobalAverage<1, T>)(q, rows, spatial, channels,
                                                                static_cast<const T*>(x), y);
  });
}

void GlobalAveragePoolBackward(const Queue& q, int64_t rows, int64_t spatial, int64_t channels,
                               const float* dy, void* dx, ElementType type) {
  const bool by_four = TakenByFour(channels, dy, dx);
  WithElement(type, [&]<class T>() {
    (by_four ? RunGlobalAverageSpread<4, T>
             : RunGlobalAverageSpread<1, T>)(q, rows, spatial, channels, dy, static_cast<T*>(dx));
  });
}

}  // namespace lockstep::device::cuda
