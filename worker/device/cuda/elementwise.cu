// Elementwise maps, dropout and rounding. An element's result depends on its own inputs only, so a
// range may be cut anywhere.
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of 16 bytes, of one thread: loads in flight
template <class T>
constexpr int64_t kBlockElements = int64_t{kWideLanes<T>} * kVectors* kThreads;

template <int kInputs, class T>
struct Inputs {
  const T* at[kInputs];
};

template <class Map>
__device__ __forceinline__ float Apply(const Map& map, const float (&x)[1]) {
  return map(x[0]);
}
template <class Map>
__device__ __forceinline__ float Apply(const Map& map, const float (&x)[2]) {
  return map(x[0], x[1]);
}

template <int kInputs, class Map, class T>
__device__ __forceinline__ void MapOne(const Map& map, const Inputs<kInputs, T>& in, int64_t i,
                                       T* y) {
  float x[kInputs];
  for (int k = 0; k < kInputs; ++k) x[k] = FloatOf(in.at[k][i]);
  StoreLanes<1>(y + i, {{Apply(map, x)}});
}

// All tensors begin `lead` elements behind an aligned address. Few enough blocks of a
// multiprocessor that a map's registers suffice.
template <int kInputs, class Map, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 6 : 4)
    MapVectors(int64_t n, int lead, Map map, Inputs<kInputs, T> in, T* y) {
  WaitForPrevious();
  constexpr int kLanes = kWideLanes<T>;
  constexpr int kStep = kLanes * kThreads;
  const int64_t first =
      blockIdx.x * kBlockElements<T> + kLanes * static_cast<int>(threadIdx.x) - lead;
  if (first < 0 || first + (kVectors - 1) * kStep + kLanes > n) {  // at the ends
#pragma unroll 1
    for (int j = 0; j < kLanes * kVectors; ++j) {
      const int64_t i = first + j / kLanes * kStep + j % kLanes;
      if (i >= 0 && i < n) MapOne(map, in, i, y);
    }
    return;
  }
  Lanes<kLanes> x[kVectors][kInputs];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kInputs; ++k) x[v][k] = LoadLanes<kLanes>(in.at[k] + first + v * kStep);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      float element[kInputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) element[k] = x[v][k].at[j];
      x[v][0].at[j] = Apply(map, element);
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) StoreLanes<kLanes>(y + first + v * kStep, x[v][0]);
}

template <int kInputs, class Map, class T>
__global__ void __launch_bounds__(kThreads)
    MapElements(int64_t n, Map map, Inputs<kInputs, T> in, T* y) {
  WaitForPrevious();
  const int64_t first = blockIdx.x * kBlockElements<T> + static_cast<int>(threadIdx.x);
  for (int k = 0; k < kWideLanes<T> * kVectors; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < n) MapOne(map, in, i, y);
  }
}

template <class Map, class T, class... Pointers>
void Run(const Queue& q, int64_t n, const Map& map, T* y, const Pointers*... inputs) {
  if (n == 0) return;
  constexpr int kInputs = sizeof...(Pointers);
  const Inputs<kInputs, T> in = {{inputs...}};
  const int lead = LeadOf(y);
  if (((LeadOf(inputs) == lead) && ...)) {
    const dim3 grid(static_cast<unsigned>(CeilDiv(n + lead, kBlockElements<T>)));
    Launch(q, grid, dim3(kThreads), 0, MapVectors<kInputs, Map, T>, n, lead, map, in, y);
  } else {
    const dim3 grid(static_cast<unsigned>(CeilDiv(n, kBlockElements<T>)));
    Launch(q, grid, dim3(kThreads), 0, MapElements<kInputs, Map, T>, n, map, in, y);
  }
}

// On tensors of the type.
template <class Map, class... Inputs>
void RunTyped(const Queue& q, ElementType type, int64_t n, const Map& map, void* y,
              const Inputs*... inputs) {
  WithElement(type, [&]<class T>() {
    Run(q, n, map, static_cast<T*>(y), static_cast<const T*>(inputs)...);
  });
}

struct ReluMap {
  __device__ __forceinline__ float operator()(float x) const { return Relu(x); }
};
struct ReluGradientMap {
  __device__ __forceinline__ float operator()(float y, float dy) const {
    return ReluGradient(y, dy);
  }
};
struct TanhMap {
  __device__ __forceinline__ float operator()(float x) const { return Tanh(x); }
};
struct TanhGradientMap {
  __device__ __forceinline__ float operator()(float y, float dy) const {
    return TanhGradient(y, dy);
  }
};
struct SigmoidMap {
  __device__ __forceinline__ float operator()(float x) const { return Sigmoid(x); }
};
struct SigmoidGradientMap {
  __device__ __forceinline__ float operator()(float y, float dy) const {
    return SigmoidGradient(y, dy);
  }
};
struct LeakyReluMap {
  float slope;
  __device__ __forceinline__ float operator()(float x) const { return LeakyRelu(x, slope); }
};
struct LeakyReluGradientMap {
  float slope;
  __device__ __forceinline__ float operator()(float y, float dy) const {
    return LeakyReluGradient(y, dy, slope);
  }
};
struct EluMap {
  float alpha;
  __device__ __forceinline__ float operator()(float x) const { return Elu(x, alpha); }
};
struct EluGradientMap {
  float alpha;
  __device__ __forceinline__ float operator()(float y, float dy) const {
    return EluGradient(y, dy, alpha);
  }
};
struct SoftplusMap {
  __device__ __forceinline__ float operator()(float x) const { return Softplus(x); }
};
struct SoftplusGradientMap {
  __device__ __forceinline__ float operator()(float x, float dy) const {
    return SoftplusGradient(x, dy);
  }
};
struct AddMap {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct MultiplyMap {
  __device__ __forceinline__ float operator()(float a, float b) const { return a * b; }
};

struct DropoutRule {
  PhiloxKey key;
  const StepScalars* scalars;
  uint64_t first;
  uint32_t smallest_kept;  // of words without their last 8 bits
  float scale;

  __device__ __forceinline__ float operator()(uint32_t word, float x) const {
    return word >> 8 >= smallest_kept ? x * scale : 0.0f;
  }
};

// A thread takes the elements of one block of random words. kAligned: they lie at an aligned
// address of both tensors.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    DropWords(int64_t n, DropoutRule rule, const float* x, float* y) {
  WaitForPrevious();
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t i = 4 * thread - static_cast<int64_t>(rule.first % 4);
  if (i >= n) return;
  const bool whole = i >= 0 && i + 4 <= n;
  Lanes<4> in = {};
  if (kAligned && whole) {
    in = LoadLanes<4>(x + i);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j >= 0 && i + j < n) in.at[j] = x[i + j];
    }
  }
  const PhiloxBlock words =
      Philox(rule.key, rule.first / 4 + static_cast<uint64_t>(thread), rule.scalars->step);
  Lanes<4> out;
#pragma unroll
  for (int j = 0; j < 4; ++j) out.at[j] = rule(words.x[j], in.at[j]);
  if (kAligned && whole) {
    StoreLanes<4>(y + i, out);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j >= 0 && i + j < n) y[i + j] = out.at[j];
    }
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    RoundElements(int64_t n, const float* __restrict__ x, StoredBf16* __restrict__ bf16) {
  WaitForPrevious();
  const int64_t i = 8 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (kAligned && i + 8 <= n) return StoreLanes<8>(bf16 + i, LoadLanes<8>(x + i));
  for (int64_t j = i; j < i + 8 && j < n; ++j) StoreLanes<1>(bf16 + j, {{x[j]}});
}

}  // namespace

void ReluForward(const Queue& q, int64_t n, const void* x, void* y, ElementType type) {
  RunTyped(q, type, n, ReluMap{}, y, x);
}
void ReluBackward(const Queue& q, int64_t n, const void* y, const void* dy, void* dx,
                  ElementType type) {
  RunTyped(q, type, n, ReluGradientMap{}, dx, y, dy);
}
void TanhForward(const Queue& q, int64_t n, const float* x, float* y) {
  Run(q, n, TanhMap{}, y, x);
}
void TanhBackward(const Queue& q, int64_t n, const float* y, const float* dy, float* dx) {
  Run(q, n, TanhGradientMap{}, dx, y, dy);
}
void SigmoidForward(const Queue& q, int64_t n, const float* x, float* y) {
  Run(q, n, SigmoidMap{}, y, x);
}
void SigmoidBackward(const Queue& q, int64_t n, const float* y, const float* dy, float* dx) {
  Run(q, n, SigmoidGradientMap{}, dx, y, dy);
}
void LeakyReluForward(const Queue& q, int64_t n, float slope, const float* x, float* y) {
  Run(q, n, LeakyReluMap{slope}, y, x);
}
void LeakyReluBackward(const Queue& q, int64_t n, float slope, const float* y, const float* dy,
                       float* dx) {
  Run(q, n, LeakyReluGradientMap{slope}, dx, y, dy);
}
void EluForward(const Queue& q, int64_t n, float alpha, const float* x, float* y) {
  Run(q, n, EluMap{alpha}, y, x);
}
void EluBackward(const Queue& q, int64_t n, float alpha, const float* y, const float* dy,
                 float* dx) {
  Run(q, n, EluGradientMap{alpha}, dx, y, dy);
}
void SoftplusForward(const Queue& q, int64_t n, const float* x, float* y) {
  Run(q, n, SoftplusMap{}, y, x);
}
void SoftplusBackward(const Queue& q, int64_t n, const float* x, const float* dy, float* dx) {
  Run(q, n, SoftplusGradientMap{}, dx, x, dy);
}
void Add(const Queue& q, int64_t n, const void* a, const void* b, void* out, ElementType type) {
  RunTyped(q, type, n, AddMap{}, out, a, b);
}
void Multiply(const Queue& q, int64_t n, const float* a, const float* b, float* out) {
  Run(q, n, MultiplyMap{}, out, a, b);
}

void Dropout(const Queue& q, int64_t n, const float* x, float rate, PhiloxKey key,
             const StepScalars* scalars, uint64_t first, float* y) {
  if (n == 0) return;
  // word >> 8 is the uniform number times 2^24, so comparing integers is comparing the numbers.
  const double exact = static_cast<double>(rate) * 0x1p24;
  uint32_t smallest_kept = static_cast<uint32_t>(exact);
  smallest_kept += static_cast<double>(smallest_kept) < exact ? 1 : 0;
  const DropoutRule rule = {key, scalars, first, smallest_kept, 1.0f / (1.0f - rate)};
  const int lead = static_cast<int>(first % 4);
  const dim3 grid(static_cast<unsigned>(CeilDiv(n + lead, int64_t{4} * kThreads)));
  const bool aligned = LeadOf(x) == lead && LeadOf(y) == lead;
  Launch(q, grid, dim3(kThreads), 0, aligned ? DropWords<true> : DropWords<false>, n, rule, x, y);
}

void RoundToBf16(const Queue& q, int64_t n, const float* x, uint16_t* bf16) {
  if (n == 0) return;
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, int64_t{8} * kThreads)));
  const bool aligned = IsAligned16(x) && IsAligned16(bf16);
  Launch(q, grid, dim3(kThreads), 0, aligned ? RoundElements<true> : RoundElements<false>, n, x,
         reinterpret_cast<StoredBf16*>(bf16));
}

}  // namespace lockstep::device::cuda
