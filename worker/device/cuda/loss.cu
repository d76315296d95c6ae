// Losses. A team of threads takes a row; the sums of rows are added in an order that depends on
// their number alone: rows one after another in blocks of kBlockRows, then a tree over blocks.
#include <algorithm>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kBlockRows = 32;

struct RowResult {
  double loss = 0;
  int correct = 0;
};

// ---- a row's threads: a warp, or a block where a row is long. Reductions give all of them the
// same. Element i belongs to thread i / 4 % kThreads, whatever the alignment.

// A NaN is no largest; and which zero it is, of two, does not matter.
struct Larger {
  __device__ float operator()(float a, float b) const { return __builtin_fmaxf(a, b); }
};
struct Smaller {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};
struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

constexpr int kSpare = 2;  // of the fours of a thread that holds them

template <int kThreads>
class Team {
 public:
  // `shared` takes a double for each warp; not used by one warp.
  __device__ explicit Team(double* shared) : shared_(shared) {}

  __device__ int thread() const { return static_cast<int>(threadIdx.x) % kThreads; }

  template <class T, class Operation>
  __device__ __forceinline__ T Reduce(T value, const Operation& operation) const {
#pragma unroll
    for (int stride = kWarp / 2; stride > 0; stride /= 2) {
      value = operation(value, __shfl_xor_sync(kAllLanes, value, stride));
    }
    if constexpr (kThreads > kWarp) {
      T* const warps = reinterpret_cast<T*>(shared_);
      __syncthreads();  // what was reduced before has been read
      if (thread() % kWarp == 0) warps[thread() / kWarp] = value;
      __syncthreads();
      value = warps[0];
#pragma unroll
      for (int w = 1; w < kThreads / kWarp; ++w) value = operation(value, warps[w]);
    }
    return value;
  }
  // All have read what one of them is about to overwrite.
  __device__ __forceinline__ void Wait() const {
    if constexpr (kThreads > kWarp) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Calls take(which four, place, first element, count) for this thread's elements, of which it has
  // at most kHeld fours: each may be held in registers. Places count from the thread's first
  // element, so that they are constants where they can be. Of kHeld fours the last kSpare may not
  // be there: with kAll take is called for these too, with a count of 0 or less.
  template <int kHeld, bool kAll = false, class Take>
  __device__ __forceinline__ void ForEachHeld(int size, const Take& take) const {
    const int own = 4 * thread();
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int place = 4 * h * kThreads, i = own + place;
        if (kAll || h + kSpare < kHeld || i < size) {
          take(h, place, i, size - i < 4 ? size - i : 4);
        }
      }
    } else {
      for (int i = own; i < size; i += 4 * kThreads) {
        take(0, i - own, i, size - i < 4 ? size - i : 4);
      }
    }
  }
  // Calls take(first element, count) for this thread's elements, four at a time.
  template <class Take>
  __device__ __forceinline__ void ForEachFour(int64_t size, const Take& take) const {
    for (int64_t i = 4 * thread(); i < size; i += 4 * kThreads) {
      take(i, size - i < 4 ? static_cast<int>(size - i) : 4);
    }
  }

 private:
  double* const shared_;
};

// kAligned: every row begins on a 16-byte boundary and has a multiple of four elements. Those that
// are not there are `rest`.
template <bool kAligned>
__device__ __forceinline__ Lanes<4> LoadFour(const float* p, int count, float rest = 0) {
  if constexpr (kAligned) {
    return LoadLanes<4>(p);
  } else {
    Lanes<4> result = {{rest, rest, rest, rest}};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < count) result.at[k] = p[k];
    }
    return result;
  }
}
template <bool kAligned>
__device__ __forceinline__ void StoreFour(float* p, const Lanes<4>& v, int count) {
  if constexpr (kAligned) {
    StoreLanes<4>(p, v);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < count) p[k] = v.at[k];
    }
  }
}

template <bool kAligned, class T>
__device__ __forceinline__ float LargestOf(const T& team, int64_t size, const float* x) {
  float largest = -__builtin_inff();
  team.ForEachFour(size, [&](int64_t i, int count) {
    const Lanes<4> v = LoadFour<kAligned>(x + i, count);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (kAligned || k < count) largest = Larger()(v.at[k], largest);
    }
  });
  return team.Reduce(largest, Larger());
}

// ---- the losses: a struct with kLoss and kCorrect, what of a result it computes, `features` and
// Row<kAligned, kHeld>(team, row). kHolds: it can hold a row in registers, kHeld fours a thread
// (0: it reads the row again).

struct CrossEntropy {
  static constexpr bool kLoss = true, kCorrect = true, kHolds = true;
  int64_t features;
  const float* logits;
  const int32_t* labels;
  double share, rest;  // smoothing / classes, 1 - smoothing
  float scale;
  float* dlogits;

  template <bool kAligned, int kHeld, class T>
  __device__ __forceinline__ RowResult Row(const T& team, int64_t row) const {
    const float* const begin = logits + row * features;
    const float* const x = begin + 4 * team.thread();
    const int size = static_cast<int>(features), label = labels[row];
    constexpr float kLeast = -__builtin_inff();
    Lanes<4> held[kHeld > 0 ? kHeld : 1];
    if constexpr (kHeld > 0) {
      // What is not there is no largest, and its exponential is 0.
      team.template ForEachHeld<kHeld, true>(size, [&](int h, int place, int i, int count) {
        held[h] = {{kLeast, kLeast, kLeast, kLeast}};
        if (h + kSpare < kHeld || i < size) held[h] = LoadFour<kAligned>(x + place, count, kLeast);
      });
      // Else the compiler would sink loads to where they are needed, behind another's time.
      __syncwarp();
    }
    const auto values = [&](int h, int place, int count) {
      if constexpr (kHeld > 0) {
        return held[h];
      } else {
        return LoadFour<kAligned>(x + place, count, kLeast);
      }
    };
    const float own_logit = begin[label];
    float largest = kLeast;
    team.template ForEachHeld<kHeld, true>(size, [&](int h, int place, int, int count) {
      const Lanes<4> v = values(h, place, count);
#pragma unroll
      for (int k = 0; k < 4; ++k) largest = Larger()(v.at[k], largest);
    });
    largest = team.Reduce(largest, Larger());
    // Whether the label's is the first of the largest.
    int first = own_logit == largest ? label : size;
    if (first < size) {
      team.template ForEachHeld<kHeld>(size, [&](int h, int place, int i, int count) {
        const Lanes<4> v = values(h, place, count);
#pragma unroll
        for (int k = 3; k >= 0; --k) {
          if (v.at[k] == largest && i + k < first) first = i + k;
        }
      });
      first = team.Reduce(first, Smaller());
    }
    double sum = 0, differences = 0;
    if (share > 0) {
      team.template ForEachHeld<kHeld>(size, [&](int h, int place, int, int count) {
        const Lanes<4> v = values(h, place, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (kAligned || k < count) differences += static_cast<double>(v.at[k] - largest);
        }
      });
    }
    team.template ForEachHeld<kHeld, true>(size, [&](int h, int place, int, int count) {
      Lanes<4> v = values(h, place, count);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        v.at[k] = Exp<Range::kNotAbove0>(v.at[k] - largest);
        sum += static_cast<double>(v.at[k]);
      }
      if constexpr (kHeld > 0) held[h] = v;  // they are what the gradient needs
    });
    sum = team.Reduce(sum, Sum());
    const double at_label = static_cast<double>(own_logit) - static_cast<double>(largest);
    RowResult result = {Log(sum) - at_label, first == label ? 1 : 0};
    if (share > 0) {
      // -sum over classes of target * log softmax, log softmax = x - largest - log(sum).
      result.loss = Log(sum) - rest * at_label - share * team.Reduce(differences, Sum());
    }
    if (dlogits == nullptr) return result;
    team.Wait();  // dlogits may lie over logits
    const float inverse = static_cast<float>(1.0 / sum);
    const float others = static_cast<float>(share), own = static_cast<float>(rest + share);
    float* const d = dlogits + row * features + 4 * team.thread();
    team.template ForEachHeld<kHeld>(size, [&](int h, int place, int i, int count) {
      Lanes<4> p, v;
      if constexpr (kHeld > 0) {
        p = held[h];
      } else {
        p = LoadFour<kAligned>(x + place, count);
#pragma unroll
        for (int k = 0; k < 4; ++k) p.at[k] = Exp<Range::kNotAbove0>(p.at[k] - largest);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        p.at[k] = p.at[k] * inverse;
        v.at[k] = (p.at[k] - others) * scale;
      }
      if (static_cast<unsigned>(label - i) < 4) {  // once a row
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (i + k == label) v.at[k] = (p.at[k] - own) * scale;
        }
      }
      StoreFour<kAligned>(d + place, v, count);
    });
    return result;
  }
};

struct FirstLargest {
  static constexpr bool kLoss = false, kCorrect = true, kHolds = false;
  int64_t features;
  const float* scores;
  const int32_t* labels;

  template <bool kAligned, int, class T>
  __device__ __forceinline__ RowResult Row(const T& team, int64_t row) const {
    const float* x = scores + row * features;
    const float largest = LargestOf<kAligned>(team, features, x);
    int first = static_cast<int>(features);
    team.ForEachFour(features, [&](int64_t i, int count) {
      const Lanes<4> v = LoadFour<kAligned>(x + i, count);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!kAligned && k >= count) continue;
        if (v.at[k] == largest && first == features) first = static_cast<int>(i) + k;
      }
    });
    return {0, team.Reduce(first, Smaller()) == labels[row] ? 1 : 0};
  }
};

// The mean over features of what Element says of input and target.
struct SigmoidElement {
  float factor;
  __device__ __forceinline__ double Loss(float x, float t) const {
    return static_cast<double>(Softplus(x)) - static_cast<double>(x) * static_cast<double>(t);
  }
  __device__ __forceinline__ float Gradient(float x, float t) const {
    return (Sigmoid(x) - t) * factor;
  }
};
struct SquareElement {
  float factor;
  __device__ __forceinline__ double Loss(float y, float t) const {
    const double d = static_cast<double>(y - t);
    return d * d;
  }
  __device__ __forceinline__ float Gradient(float y, float t) const { return (y - t) * factor; }
};

template <class Element>
struct ElementLoss {
  static constexpr bool kLoss = true, kCorrect = false, kHolds = false;
  int64_t features;
  const float* x;
  const float* target;
  Element element;
  float* dx;

  template <bool kAligned, int, class T>
  __device__ __forceinline__ RowResult Row(const T& team, int64_t row) const {
    const int64_t begin = row * features;
    double sum = 0;
    team.ForEachFour(features, [&](int64_t i, int count) {
      Lanes<4> v = LoadFour<kAligned>(x + begin + i, count);
      const Lanes<4> t = LoadFour<kAligned>(target + begin + i, count);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!kAligned && k >= count) continue;
        sum += element.Loss(v.at[k], t.at[k]);
        if (dx != nullptr) v.at[k] = element.Gradient(v.at[k], t.at[k]);
      }
      if (dx != nullptr) StoreFour<kAligned>(dx + begin + i, v, count);
    });
    return {team.Reduce(sum, Sum()) / static_cast<double>(features), 0};
  }
};

// ---- launches.

template <class Loss>
__device__ __forceinline__ void WriteResult(double loss, int64_t correct, bool add,
                                            LeafResult* result) {
  if constexpr (Loss::kLoss) result->loss_sum = add ? result->loss_sum + loss : loss;
  if constexpr (Loss::kCorrect) result->correct = add ? result->correct + correct : correct;
}

constexpr int kLeafWarps = 32;
constexpr int kLeafBlocks = 4;  // of rows, that one block of threads may take

// A leaf each block, a row each warp.
template <class Loss, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kWarp* kLeafWarps, 1)
    SmallLeaves(Loss loss, Leaves leaves, LeafResult* results) {
  WaitForPrevious();
  const int leaf = static_cast<int>(blockIdx.x);
  const int64_t begin = leaves.begin[leaf];
  const int rows = static_cast<int>(leaves.begin[leaf + 1] - begin);
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp,
            warps = static_cast<int>(blockDim.x) / kWarp;
  RowResult* const row_results = SharedMemory<RowResult>();
  const Team<kWarp> team(nullptr);
  for (int r = warp; r < rows; r += warps) {
    const RowResult result = loss.template Row<kAligned, kHeld>(team, begin + r);
    if (lane == 0) row_results[r] = result;
  }
  __syncthreads();
  if (warp > 0) return;
  double sum = 0;
  int correct = 0;
  const int first = lane * kBlockRows, end = first + kBlockRows < rows ? first + kBlockRows : rows;
  for (int r = first; r < end; ++r) {
    sum += row_results[r].loss;
    correct += row_results[r].correct;
  }
#pragma unroll
  for (int stride = kWarp / 2; stride > 0; stride /= 2) {
    sum += __shfl_down_sync(kAllLanes, sum, stride);
    correct += __shfl_down_sync(kAllLanes, correct, stride);
  }
  if (lane == 0) WriteResult<Loss>(sum, correct, false, &results[leaf]);
}

constexpr int kRowThreads = 256;

// Of a block, which another takes the place of when all of its rows are done: few.
template <int kTeam>
constexpr int kTeamThreads = kTeam == kWarp ? 4 * kWarp : kRowThreads;
// Blocks of a multiprocessor: no more, so that registers suffice for loads in flight.
template <int kTeam, int kHeld>
constexpr int kRowBlocks = (kHeld > 4 ? 768 : 1024) / kTeamThreads<kTeam>;

template <class Loss, int kTeam, bool kAligned, int kHeld>
__global__ void __launch_bounds__(kTeamThreads<kTeam>, (kRowBlocks<kTeam, kHeld>))
    LossOfRows(Loss loss, int64_t first, int64_t rows, RowResult* row_results) {
  WaitForPrevious();
  constexpr int kTeams = kTeamThreads<kTeam> / kTeam;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kTeam;
  if (row >= rows) return;  // a team, as a whole
  const Team<kTeam> team(SharedMemory<double>());
  const RowResult result = loss.template Row<kAligned, kHeld>(team, first + row);
  if (team.thread() == 0) row_results[row] = result;
}

constexpr int kSumThreads = 1024;

// The leaves' rows begin at row `first` of the call; adds to results where `add`.
template <class Loss>
__global__ void __launch_bounds__(kSumThreads)
    SumRows(Leaves leaves, int64_t first, const RowResult* row_results, bool add,
            LeafResult* results) {
  WaitForPrevious();
  const int leaf = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const RowResult* const from = row_results + (leaves.begin[leaf] - first);
  const int64_t rows = leaves.begin[leaf + 1] - leaves.begin[leaf];
  double sum = 0;
  int64_t correct = 0;
  for (int64_t block = thread; block * kBlockRows < rows; block += kSumThreads) {
    const int64_t begin = block * kBlockRows;
    const int count = static_cast<int>(rows - begin < kBlockRows ? rows - begin : kBlockRows);
    double block_sum = 0;
#pragma unroll 8
    for (int r = 0; r < count; ++r) {
      block_sum += from[begin + r].loss;
      correct += from[begin + r].correct;
    }
    sum += block_sum;
  }
  double* const sums = SharedMemory<double>();
  int64_t* const corrects = reinterpret_cast<int64_t*>(sums + kSumThreads);
  sums[thread] = sum;
  corrects[thread] = correct;
  for (int stride = kSumThreads / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (thread >= stride) continue;
    sums[thread] += sums[thread + stride];
    corrects[thread] += corrects[thread + stride];
  }
  if (thread == 0) WriteResult<Loss>(sums[0], corrects[0], add, &results[leaf]);
}

template <class Loss, int kTeam, bool kAligned, int kHeld>
void RunRows(const Queue& q, const Loss& loss, const Leaves& leaves, int64_t first, bool add,
             LeafResult* results) {
  const int64_t rows = leaves.total() - first;
  auto* const row_results = static_cast<RowResult*>(q.workspace);
  if (rows > 0) {
    constexpr int kThreads = kTeamThreads<kTeam>;
    Launch(q, dim3(static_cast<unsigned>(CeilDiv(rows, kThreads / kTeam))), dim3(kThreads),
           sizeof(double) * kThreads / kWarp, LossOfRows<Loss, kTeam, kAligned, kHeld>, loss, first,
           rows, row_results);
  }
  Launch(q, dim3(static_cast<unsigned>(leaves.count)), dim3(kSumThreads),
         (sizeof(double) + sizeof(int64_t)) * kSumThreads, SumRows<Loss>, leaves, first,
         row_results, add, results);
}

// Rows of so many fours a thread, all held. Else `run`.
template <class Loss, int kTeam, class Run>
Run HoldingRows(int64_t fours, Run run) {
  return fours <= 2   ? RunRows<Loss, kTeam, true, 2>
         : fours <= 4 ? RunRows<Loss, kTeam, true, 4>
         : fours <= 6 ? RunRows<Loss, kTeam, true, 6>
         : fours <= 8 ? RunRows<Loss, kTeam, true, 8>
                      : run;
}

template <bool kAligned, class Loss>
void RunAligned(const Queue& q, const Loss& loss, const Leaves& leaves, LeafResult* results) {
  constexpr int64_t kWarpFeatures = 1024;       // of a row that one warp takes
  constexpr int64_t kLeafElements = 32 * 1024;  // of a leaf that one block of threads takes
  constexpr int64_t kMostRows = kWorkspaceBytes / sizeof(RowResult);
  const bool by_warp = loss.features <= kWarpFeatures;
  constexpr int kFew = Loss::kHolds ? 1 : 0;
  const bool few = Loss::kHolds && loss.features <= 4 * kWarp;  // one four of a thread
  int64_t most = 0;
  for (int l = 0; l < leaves.count; ++l) {
    most = std::max(most, leaves.begin[l + 1] - leaves.begin[l]);
  }
  if (by_warp && most <= kLeafBlocks * kBlockRows && most * loss.features <= kLeafElements) {
    const int64_t warps = std::clamp<int64_t>(most, 1, kLeafWarps);
    Launch(q, dim3(static_cast<unsigned>(leaves.count)), dim3(static_cast<unsigned>(warps * kWarp)),
           sizeof(RowResult) * static_cast<size_t>(std::max<int64_t>(most, 1)),
           few ? SmallLeaves<Loss, kAligned, kFew> : SmallLeaves<Loss, kAligned, 0>, loss, leaves,
           results);
    return;
  }
  auto run = by_warp ? RunRows<Loss, kWarp, kAligned, 0> : RunRows<Loss, kRowThreads, kAligned, 0>;
  if (few) run = RunRows<Loss, kWarp, kAligned, kFew>;
  if constexpr (Loss::kHolds && kAligned) {
    const int64_t fours = CeilDiv(loss.features, 4 * (by_warp ? kWarp : kRowThreads));
    if (!by_warp) {
      run = HoldingRows<Loss, kRowThreads>(fours, run);
    } else if (!few) {
      run = HoldingRows<Loss, kWarp>(fours, run);
    }
  }
  if (leaves.total() - leaves.begin[0] <= kMostRows) {
    return run(q, loss, leaves, leaves.begin[0], false, results);
  }
  for (int l = 0; l < leaves.count; ++l) {
    Leaves part;
    part.begin[0] = leaves.begin[l];
    do {
      part.begin[1] = std::min(part.begin[0] + kMostRows, leaves.begin[l + 1]);
      run(q, loss, part, part.begin[0], part.begin[0] > leaves.begin[l], results + l);
      part.begin[0] = part.begin[1];
    } while (part.begin[0] < leaves.begin[l + 1]);
  }
}

template <class Loss>
void Run(const Queue& q, const Loss& loss, const Leaves& leaves, bool aligned,
         LeafResult* results) {
  if (aligned) {
    RunAligned<true>(q, loss, leaves, results);
  } else {
    RunAligned<false>(q, loss, leaves, results);
  }
}

}  // namespace

void SoftmaxCrossEntropy(const Queue& q, const Leaves& leaves, int64_t classes, const float* logits,
                         const int32_t* labels, float smoothing, float scale, LeafResult* results,
                         float* dlogits) {
  const double share = static_cast<double>(smoothing) / static_cast<double>(classes);
  const double rest = 1.0 - static_cast<double>(smoothing);
  Run(q, CrossEntropy{classes, logits, labels, share, rest, scale, dlogits}, leaves,
      TakenByFour(classes, logits, dlogits), results);
}

void SigmoidCrossEntropy(const Queue& q, const Leaves& leaves, int64_t features, const float* x,
                         const float* target, float scale, LeafResult* results, float* dx) {
  const double count = static_cast<double>(features);
  const SigmoidElement element = {static_cast<float>(static_cast<double>(scale) / count)};
  Run(q, ElementLoss<SigmoidElement>{features, x, target, element, dx}, leaves,
      TakenByFour(features, x, target, dx), results);
}

void MeanSquaredError(const Queue& q, const Leaves& leaves, int64_t features, const float* y,
                      const float* target, float scale, LeafResult* results, float* dy) {
  const double count = static_cast<double>(features);
  const SquareElement element = {static_cast<float>(2.0 / count * static_cast<double>(scale))};
  Run(q, ElementLoss<SquareElement>{features, y, target, element, dy}, leaves,
      TakenByFour(features, y, target, dy), results);
}

void CountCorrect(const Queue& q, const Leaves& leaves, int64_t classes, const float* scores,
                  const int32_t* labels, LeafResult* results) {
  Run(q, FirstLargest{classes, scores, labels}, leaves, TakenByFour(classes, scores), results);
}

}  // namespace lockstep::device::cuda
