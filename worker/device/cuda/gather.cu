// Samples of a data set: normalized, cropped, mirrored and cut out in one pass. A block makes some
// rows of one sample; the sample's rows that it needs, which lie together, are brought into shared
// memory, so that each byte is read once, also from the host's memory. An element's bits are those
// of its own pixel, wherever it lies.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "worker/device/augment.h"
#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

// Of a block, or half of them where it makes few elements: what each does before is dear. Multiples
// of three channels too.
constexpr int kThreads = 192;
constexpr int64_t kFewElements = 4096;
constexpr int64_t kBlockElements = 8192;  // wanted: a block's beginning is dear
constexpr size_t kMostStagedBytes =
    40960;  // of a block's rows; longer ones are read where they are
constexpr size_t kChangeBytes = 64;
constexpr size_t kOffsetAt = kChangeBytes - sizeof(int64_t);  // in shared memory
static_assert(sizeof(SampleChange) <= kOffsetAt);

// b / 255 as the division rounds it, for each of the 256 values, without dividing: the product with
// the rounded reciprocal, and one correction by what is left.
__device__ __forceinline__ float ValueOf(uint32_t byte) {
  const float b = static_cast<float>(byte), reciprocal = 1.0f / 255.0f;
  const float quotient = b * reciprocal;
  return Fma(Fma(quotient, -255.0f, b), reciprocal, quotient);
}
__device__ __forceinline__ float ValueOf(float value) { return value; }
template <class T>
using Loaded = std::conditional_t<sizeof(T) == 1, uint32_t, float>;  // as it is in a register

struct Rows {
  int height, width, channels;
  int block_rows, blocks;  // of a sample
  bool staged;
  Divisor by_row, by_channels;  // elements of a row; channels
  // Threads that make fours of elements, so many that each always begins at the same channel, and
  // how much further in the block its next is.
  int makers, step_rows, step_elements;
};

// Of four neighbouring elements of a row, of which all that a thread makes have the same channels:
// where they lie in the source, besides what all of the row have in common, and normalization.
struct Four {
  __device__ __forceinline__ Four(const Rows& shape, bool flip, const float* mean_of,
                                  const float* inv_std_of) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t element = 4 * threadIdx.x + static_cast<uint32_t>(j);
      const int channel = static_cast<int>(shape.by_channels.TakeRemainder(element));
      source[j] = flip ? 2 * channel - j : j;
      mean[j] = mean_of[channel];
      inv_std[j] = inv_std_of[channel];
    }
  }
  int source[4];
  float mean[4], inv_std[4];
};

// Copies n elements to shared memory, 16 bytes at a time. They must lie alike to 16 bytes.
template <class T>
__device__ __forceinline__ void Stage(const T* from, int n, T* to) {
  constexpr int kVector = 16 / sizeof(T);
  const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lead = behind == 0 ? 0 : min(kVector - behind, n);
  const int vectors = (n - lead) / kVector, tail = lead + vectors * kVector;
  for (int v = thread; v < vectors; v += threads) {
    *reinterpret_cast<uint4*>(to + lead + v * kVector) =
        *reinterpret_cast<const uint4*>(from + lead + v * kVector);
  }
  if (thread < lead) to[thread] = from[thread];
  if (thread < n - tail) to[tail + thread] = from[tail + thread];
}

// A block's rows, by fours that lie in one row and are aligned. Element r of a row comes from
// element r + shift of a row of the source; mirrored, from (width - 1 + shift) - r + 2 c, all in
// elements, c its channel: no element needs a division.
template <class T>
__device__ __forceinline__ void MakeRows(const Rows& shape, const SampleChange& change, int y_begin,
                                         int y_end, const Four& four, const T* from, int from_begin,
                                         float* to) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= shape.makers) return;
  const int channels = shape.channels, row_elements = shape.width * channels;
  const int shift_y = static_cast<int>(change.shift_y);
  const bool flip = change.flip;
  const int moved = (static_cast<int>(change.shift_x) + (flip ? shape.width - 1 : 0)) * channels;
  const int cut_top = static_cast<int>(change.cut_top);
  const unsigned cut_rows = static_cast<unsigned>(change.cut_bottom - change.cut_top);
  const int cut_begin = static_cast<int>(change.cut_left) * channels;
  const unsigned cut_elements =
      static_cast<unsigned>(change.cut_right - change.cut_left) * static_cast<unsigned>(channels);
  const int lowest = min(min(four.source[0], four.source[1]), min(four.source[2], four.source[3]));
  const int highest = max(max(four.source[0], four.source[1]), max(four.source[2], four.source[3]));
  uint32_t row = static_cast<uint32_t>(4 * thread);
  int r = static_cast<int>(shape.by_row.TakeRemainder(row));
  int y = y_begin + static_cast<int>(row);
  to += 4 * thread;
  while (y < y_end) {
    const int from_y = y + shift_y;
    const int inside = from_y >= 0 && from_y < shape.height ? row_elements : 0;
    const int base = moved + (flip ? -r : r);
    const T* const line = from + (from_y * row_elements - from_begin + base);
    const bool whole = base + lowest >= 0 && base + highest < inside;
    const auto is_inside = [&](int j) {
      return static_cast<unsigned>(base + four.source[j]) < static_cast<unsigned>(inside);
    };
    Loaded<T> raw[4];
    if (whole) {
#pragma unroll
      for (int j = 0; j < 4; ++j) raw[j] = line[four.source[j]];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        raw[j] = 0;
        if (is_inside(j)) raw[j] = line[four.source[j]];
      }
    }
    Lanes<4> values;
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] = (ValueOf(raw[j]) - four.mean[j]) * four.inv_std[j];
    const bool may_be_cut = static_cast<unsigned>(y - cut_top) < cut_rows;
    if (!whole || may_be_cut) {  // seldom
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool cut = may_be_cut && static_cast<unsigned>(r + j - cut_begin) < cut_elements;
        if (cut || !is_inside(j)) values.at[j] = 0;
      }
    }
    StoreLanes<4>(to, values);
    to += 4 * shape.makers;
    y += shape.step_rows;
    r += shape.step_elements;
    if (r >= row_elements) {
      r -= row_elements;
      ++y;
    }
  }
}

// kByFour: MakeRows serves.
template <class T, bool kByFour>
__global__ void __launch_bounds__(kThreads, kByFour ? 6 : 5)
    GatherRows(Rows shape, const T* data, const int64_t* offsets, const float* mean,
               const float* inv_std, Augmentation augmentation, uint64_t step,
               uint64_t first_position, float* __restrict__ out, const int32_t* labels,
               int32_t* labels_out) {
  WaitForPrevious();
  SampleChange& drawn = *SharedMemory<SampleChange>();
  const int64_t sample = blockIdx.x / static_cast<unsigned>(shape.blocks);
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(shape.blocks));
  const int thread = static_cast<int>(threadIdx.x);
  // Perhaps from memory of the host: once a block, while another warp draws.
  int64_t& offset = *reinterpret_cast<int64_t*>(SharedMemory<unsigned char>() + kOffsetAt);
  if (thread == kWarp) {
    offset = offsets[sample];
    if (block == 0 && labels_out != nullptr) labels_out[sample] = labels[sample];
  }
  if (thread == 0) {
    drawn = DrawChange(augmentation, {shape.height, shape.width, shape.channels}, step,
                       first_position + static_cast<uint64_t>(sample));
  }
  __syncthreads();
  const int shift_y = static_cast<int>(drawn.shift_y), shift_x = static_cast<int>(drawn.shift_x);
  const int cut_top = static_cast<int>(drawn.cut_top), cut_left = static_cast<int>(drawn.cut_left);
  const int cut_bottom = static_cast<int>(drawn.cut_bottom);
  const int cut_right = static_cast<int>(drawn.cut_right);
  const bool flip = drawn.flip;

  const int row_elements = shape.width * shape.channels;
  const int y_begin = block * shape.block_rows;
  const int y_end = min(y_begin + shape.block_rows, shape.height);
  float* const to = out + (sample * shape.height + y_begin) * row_elements;
  const T* from = data + offset;
  int from_begin = 0;  // the element of the sample that lies at `from`
  if (shape.staged) {
    const int begin = min(max(y_begin + shift_y, 0), shape.height) * row_elements;
    const int end = min(max(y_end + shift_y, 0), shape.height) * row_elements;
    const auto behind = reinterpret_cast<uintptr_t>(from + begin) % 16;
    T* const staged = reinterpret_cast<T*>(SharedMemory<unsigned char>() + kChangeBytes + behind);
    if constexpr (kByFour) {
      const Four four(shape, flip, mean, inv_std);
      Stage(from + begin, end - begin, staged);
      __syncthreads();
      return MakeRows(shape, drawn, y_begin, y_end, four, staged, begin, to);
    }
    Stage(from + begin, end - begin, staged);
    __syncthreads();
    from = staged;
    from_begin = begin;
  } else if constexpr (kByFour) {
    return MakeRows(shape, drawn, y_begin, y_end, Four(shape, flip, mean, inv_std), from, 0, to);
  }

  // Vectors of four lie at aligned addresses of the output; the first and last may be parts.
  const int n = (y_end - y_begin) * row_elements;
  const int lead = LeadOf(to);
  for (int first = 4 * thread - lead; first < n; first += 4 * static_cast<int>(blockDim.x)) {
    const int begin = max(first, 0), end = min(first + 4, n);
    uint32_t at = static_cast<uint32_t>(begin);
    int c = static_cast<int>(shape.by_row.TakeRemainder(at));
    int y = y_begin + static_cast<int>(at);
    at = static_cast<uint32_t>(c);
    c = static_cast<int>(shape.by_channels.TakeRemainder(at));
    int x = static_cast<int>(at);
    Lanes<4> values = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + j < begin || first + j >= end) continue;
      const int from_y = y + shift_y, from_x = (flip ? shape.width - 1 - x : x) + shift_x;
      const bool inside =
          from_y >= 0 && from_y < shape.height && from_x >= 0 && from_x < shape.width;
      const bool cut = y >= cut_top && y < cut_bottom && x >= cut_left && x < cut_right;
      if (inside && !cut) {
        const int element = (from_y * shape.width + from_x) * shape.channels + c;
        values.at[j] = (ValueOf(Loaded<T>{from[element - from_begin]}) - mean[c]) * inv_std[c];
      }
      if (++c == shape.channels) {
        c = 0;
        if (++x == shape.width) {
          x = 0;
          ++y;
        }
      }
    }
    if (end - begin == 4) {
      StoreLanes<4>(to + first, values);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= begin && first + j < end) to[first + j] = values.at[j];
      }
    }
  }
}

template <class T>
void Run(const Queue& q, const SampleShape& shape, int64_t count, const T* data,
         const int64_t* offsets, const float* mean, const float* inv_std,
         const Augmentation& augmentation, uint64_t step, uint64_t first_position, float* out,
         const int32_t* labels, int32_t* labels_out) {
  const int64_t row = shape.width * shape.channels;
  const int64_t block_rows = std::clamp<int64_t>(kBlockElements / row, 1, shape.height);
  const size_t bytes = static_cast<size_t>(block_rows * row) * sizeof(T) + 16;
  const int64_t threads = block_rows * row <= kFewElements ? kThreads / 2 : kThreads;
  // So many that each keeps its channels, and if it can be that each line of 128 bytes is one
  // warp's.
  int64_t same_channels = std::lcm(shape.channels, int64_t{32}) / 4;
  if (same_channels > threads) same_channels = std::lcm(shape.channels, int64_t{4}) / 4;
  const int64_t makers = threads / same_channels * same_channels;
  const Rows rows = {static_cast<int>(shape.height),
                     static_cast<int>(shape.width),
                     static_cast<int>(shape.channels),
                     static_cast<int>(block_rows),
                     static_cast<int>(CeilDiv(shape.height, block_rows)),
                     bytes <= kMostStagedBytes,
                     Divisor(row),
                     Divisor(shape.channels),
                     static_cast<int>(makers),
                     static_cast<int>(4 * makers / row),
                     static_cast<int>(4 * makers % row)};
  const bool by_four = makers > 0 && row % 4 == 0 && IsAligned16(out);
  const size_t shared = kChangeBytes + (rows.staged ? bytes : 0);
  const auto kernel = by_four ? GatherRows<T, true> : GatherRows<T, false>;
  ForEachPart(count, rows.blocks, [&](int64_t first, int64_t samples) {
    Launch(q, dim3(static_cast<unsigned>(samples * rows.blocks)),
           dim3(static_cast<unsigned>(threads)), shared, kernel, rows, data, offsets + first, mean,
           inv_std, augmentation, step, first_position + static_cast<uint64_t>(first),
           out + first * shape.features(), labels_out == nullptr ? nullptr : labels + first,
           labels_out == nullptr ? nullptr : labels_out + first);
  });
}

}  // namespace

void GatherSamples(const Queue& q, const SampleShape& shape, int64_t count, SampleType type,
                   const void* data, const int64_t* offsets, const float* mean,
                   const float* inv_std, const Augmentation& augmentation, uint64_t step,
                   uint64_t first_position, float* out, const int32_t* labels,
                   int32_t* labels_out) {
  if (type == SampleType::kUint8) {
    Run(q, shape, count, static_cast<const uint8_t*>(data), offsets, mean, inv_std, augmentation,
        step, first_position, out, labels, labels_out);
  } else {
    Run(q, shape, count, static_cast<const float*>(data), offsets, mean, inv_std, augmentation,
        step, first_position, out, labels, labels_out);
  }
}

}  // namespace lockstep::device::cuda
