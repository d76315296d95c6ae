// What a GPU can do at best, to judge everything else by: device copies by 16-byte accesses and by
// cudaMemcpy, matrix products of cuBLASLt in each precision, the time of a launch; how long
// products of small layers take, ours and cuBLASLt's; and how near to the copy each of our kernels
// comes whose time is that of moving its bytes. Their tensors are larger than any cache, and about
// 200 MB at least, so that a launch's beginning and end are little of it. Names are unique. A line
// of JSON each:
//   {"what": "copy", "how": "kernel", "gb_per_second": 4300}         bytes read and bytes written
//   {"what": "product", "precision": "bf16", "tflops": 790}          of 8192 x 8192 x 8192, random
//   {"what": "launch", "how": "graph", "us": 1.3}
//   {"what": "small product", ...}                                   gpu_products.h
//   {"what": "kernel", "name": "TreeSum", ..., "gb_per_second": 4100, "of_copy": 0.95}
// The best of several bursts, since whatever disturbs one can only make it slower.
//   gpu_floor [seconds of each figure, default 0.02]
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "tests/bench/gpu_must.h"
#include "tests/bench/gpu_products.h"
#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

int failures = 0;

template <class T>
T* Allocate(int64_t count) {
  void* memory = nullptr;
  Must(cudaMalloc(&memory, static_cast<size_t>(count) * sizeof(T)), "cudaMalloc");
  Must(cudaMemset(memory, 0, static_cast<size_t>(count) * sizeof(T)), "cudaMemset");
  Must(cudaDeviceSynchronize(), "clearing");  // the stream of the kernels does not wait for it
  return static_cast<T*>(memory);
}

template <class T>
T* Upload(const std::vector<T>& values) {
  T* const memory = Allocate<T>(static_cast<int64_t>(values.size()));
  Must(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
       "cudaMemcpy");
  Must(cudaDeviceSynchronize(), "copying");
  return memory;
}

// Four loads in flight for each thread.
__global__ void __launch_bounds__(256) CopyKernel(int64_t n, const float4* from, float4* to) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    const float4 a = from[i], b = from[i + stride], c = from[i + 2 * stride],
                 d = from[i + 3 * stride];
    to[i] = a, to[i + stride] = b, to[i + 2 * stride] = c, to[i + 3 * stride] = d;
  }
  for (; i < n; i += stride) to[i] = from[i];
}

__global__ void NothingKernel(int* nothing) {
  if (nothing != nullptr) *nothing = 1;
}

constexpr int64_t kRows = 64, kSpatial = 56 * 56, kChannels = 256;
constexpr int64_t kElements = kRows * kSpatial * kChannels;  // 196 MiB
constexpr int64_t kOrder = 8192;
constexpr int kLeafCount = 8;
constexpr size_t kBlasWorkspace = size_t{32} << 20;

class Floor {
 public:
  explicit Floor(double seconds) : seconds_(seconds) {
    Must(cudaStreamCreateWithFlags(&q_.stream, cudaStreamNonBlocking), "a stream");
    Must(cudaEventCreate(&begin_), "an event");
    Must(cudaEventCreate(&end_), "an event");
    q_.workspace = Allocate<char>(kWorkspaceBytes);
    a_ = Random(kElements), b_ = Random(kElements), c_ = Random(kElements), d_ = Random(kElements);
    out_ = Allocate<float>(kElements);
  }

  void Machine() {
    const auto* const from = reinterpret_cast<const float4*>(a_);
    auto* const to = reinterpret_cast<float4*>(out_);
    int processors = 0;
    Must(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0), "the GPU");
    for (const int blocks : {4, 8, 16, 64}) {
      const double ms = Time([&] {
        Launch(q_, dim3(static_cast<unsigned>(processors * blocks)), dim3(256), 0, CopyKernel,
               kElements / 4, from, to);
      });
      copy_ = std::max(copy_, kElements * 8 / ms / 1e6);
    }
    std::printf("{\"what\": \"copy\", \"how\": \"kernel\", \"gb_per_second\": %.1f}\n", copy_);
    const double ms = Time([&] {
      Must(cudaMemcpyAsync(out_, a_, kElements * 4, cudaMemcpyDeviceToDevice, q_.stream),
           "cudaMemcpy");
    });
    std::printf("{\"what\": \"copy\", \"how\": \"cudaMemcpy\", \"gb_per_second\": %.1f}\n",
                kElements * 8 / ms / 1e6);
    copy_ = std::max(copy_, kElements * 8 / ms / 1e6);
    Launches();
    for (const char* precision : {"bf16", "tf32", "fp32"}) Product(precision);
    std::fflush(stdout);
  }

  void Kernels() {
    BatchNorms(ElementType::kFp32);
    BatchNorms(ElementType::kBf16);
    Maps();
    Flat();
    Samples();
  }

 private:
  // In milliseconds, of one call.
  double Time(const std::function<void()>& call) {
    float passed = 0;
    const auto burst = [&](int times) {
      Must(cudaEventRecord(begin_, q_.stream), "an event");
      for (int i = 0; i < times; ++i) call();
      Must(cudaEventRecord(end_, q_.stream), "an event");
      Must(cudaEventSynchronize(end_), "running");
      Must(cudaEventElapsedTime(&passed, begin_, end_), "an event");
      Must(cudaGetLastError(), "launching");
    };
    burst(1);
    burst(1);
    const int times =
        std::clamp(static_cast<int>(seconds_ * 200 / std::max(passed, 0.001f)), 2, 2000);
    double best = 1e30;
    for (int i = 0; i < 5; ++i) {
      burst(times);
      best = std::min(best, static_cast<double>(passed) / times);
    }
    return best;
  }

  // In [-1, 1), the same pattern again and again.
  float* Random(int64_t count) {
    constexpr int64_t kPattern = int64_t{1} << 20;
    std::vector<float> values(kPattern);
    for (size_t i = 0; i < values.size(); ++i) {
      uint64_t bits = (++seed_ << 32 | i) * 0x9E3779B97F4A7C15ull;
      bits = (bits ^ (bits >> 31)) * 0xBF58476D1CE4E5B9ull;
      values[i] = static_cast<float>(static_cast<int32_t>(bits >> 32)) * 0x1p-31f;
    }
    float* const memory = Allocate<float>(count);
    for (int64_t at = 0; at < count; at += kPattern) {
      Must(cudaMemcpy(memory + at, values.data(),
                      static_cast<size_t>(std::min(kPattern, count - at)) * 4,
                      cudaMemcpyHostToDevice),
           "cudaMemcpy");
    }
    Must(cudaDeviceSynchronize(), "copying");
    return memory;
  }

  void Launches() {
    const double eager =
        Time([&] { Launch(q_, dim3(1), dim3(32), 0, NothingKernel, static_cast<int*>(nullptr)); });
    std::printf("{\"what\": \"launch\", \"how\": \"stream\", \"us\": %.3f}\n", eager * 1e3);
    constexpr int kNodes = 200;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    Must(cudaStreamBeginCapture(q_.stream, cudaStreamCaptureModeRelaxed), "capturing");
    for (int i = 0; i < kNodes; ++i) {
      Launch(q_, dim3(1), dim3(32), 0, NothingKernel, static_cast<int*>(nullptr));
    }
    Must(cudaStreamEndCapture(q_.stream, &graph), "capturing");
    Must(cudaGraphInstantiate(&executable, graph, 0), "a graph");
    const double ms = Time([&] { Must(cudaGraphLaunch(executable, q_.stream), "a graph"); });
    std::printf("{\"what\": \"launch\", \"how\": \"graph\", \"us\": %.3f}\n", ms * 1e3 / kNodes);
    Must(cudaGraphExecDestroy(executable), "a graph");
    Must(cudaGraphDestroy(graph), "a graph");
  }

  // The fastest of what the library's heuristic offers.
  void Product(const std::string& precision) {
    const bool bf16 = precision == "bf16";
    const cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
    const cublasComputeType_t compute =
        precision == "tf32" ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    const auto must = [](cublasStatus_t status) {
      if (status == CUBLAS_STATUS_SUCCESS) return;
      std::fprintf(stderr, "gpu_floor: cuBLASLt: %s\n", cublasLtGetStatusString(status));
      std::exit(1);
    };
    constexpr int64_t kSize = kOrder * kOrder;
    float* const a = Random(kSize);
    float* const b = Random(kSize);
    auto* const c = Allocate<float>(kSize);
    void* const workspace = Allocate<char>(kBlasWorkspace);
    if (bf16) {  // in place of the first half of the floats
      auto* const narrow = Allocate<uint16_t>(kSize);
      for (float* const x : {a, b}) {
        RoundToBf16(q_, kSize, x, narrow);
        Must(cudaMemcpyAsync(x, narrow, kSize * 2, cudaMemcpyDeviceToDevice, q_.stream),
             "cudaMemcpy");
      }
      Must(cudaStreamSynchronize(q_.stream), "rounding");
      Must(cudaFree(narrow), "cudaFree");
    }
    cublasLtHandle_t handle = nullptr;
    must(cublasLtCreate(&handle));
    cublasLtMatmulDescOpaque_t operation;
    must(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    must(cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                        sizeof(transposed)));
    cublasLtMatrixLayoutOpaque_t factor, result;
    must(cublasLtMatrixLayoutInit(&factor, type, kOrder, kOrder, kOrder));
    must(cublasLtMatrixLayoutInit(&result, type, kOrder, kOrder, kOrder));
    cublasLtMatmulPreferenceOpaque_t preference;
    must(cublasLtMatmulPreferenceInit(&preference));
    must(cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &kBlasWorkspace, sizeof(kBlasWorkspace)));
    constexpr int kMost = 4;
    cublasLtMatmulHeuristicResult_t found[kMost];
    int count = 0;
    must(cublasLtMatmulAlgoGetHeuristic(handle, &operation, &factor, &factor, &result, &result,
                                        &preference, kMost, found, &count));
    const float one = 1, zero = 0;
    double best = 0;
    for (int i = 0; i < count; ++i) {
      const double ms = Time([&] {
        must(cublasLtMatmul(handle, &operation, &one, a, &factor, b, &factor, &zero, c, &result, c,
                            &result, &found[i].algo, workspace, kBlasWorkspace, q_.stream));
      });
      best = std::max(best, 2.0 * kOrder * kOrder * kOrder / ms / 1e9);
    }
    std::printf("{\"what\": \"product\", \"precision\": \"%s\", \"tflops\": %.1f}\n",
                precision.c_str(), best);
    must(cublasLtDestroy(handle));
    for (void* const memory :
         {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c), workspace}) {
      Must(cudaFree(memory), "cudaFree");
    }
  }

  // `bytes` that a call must read and write, each once.
  void Kernel(const std::string& name, const std::string& shape, double bytes,
              const std::function<void()>& call) {
    const double rate = bytes / Time(call) / 1e6;
    std::printf(
        "{\"what\": \"kernel\", \"name\": \"%s\", \"shape\": \"%s\", \"mbytes\": %.1f, "
        "\"gb_per_second\": %.1f, \"of_copy\": %.3f}\n",
        name.c_str(), shape.c_str(), bytes / 1e6, rate, rate / copy_);
    std::fflush(stdout);
    failures += !(rate > 0);
  }

  static Leaves EightLeaves(int64_t total) {
    Leaves leaves(total / kLeafCount);
    for (leaves.count = 1; leaves.count < kLeafCount; ++leaves.count) {
      leaves.begin[leaves.count + 1] = leaves.begin[leaves.count] + total / kLeafCount;
    }
    return leaves;
  }

  void BatchNorms(ElementType type) {
    const bool stored = type == ElementType::kBf16;
    const std::string shape = std::string("64x56x56x256 in 8 leaves") + (stored ? ", bf16" : "");
    const auto named = [stored](const char* name) {
      return std::string(name) + (stored ? ", bf16" : "");
    };
    const Leaves leaves = EightLeaves(kRows * kSpatial);
    const double pass = static_cast<double>(kElements * ElementBytes(type));
    const void* inputs[] = {a_, b_, c_, d_};
    for (const void*& input : inputs) {
      if (!stored) break;
      auto* const bf16 = Allocate<uint16_t>(kElements);
      RoundToBf16(q_, kElements, static_cast<const float*>(input), bf16);
      input = bf16;
    }
    const auto [a, b, c, d] = inputs;
    auto* const mean = Allocate<float>(kLeafCount * kChannels);
    auto* const m2 = Random(kLeafCount * kChannels);
    auto* const sum_dy = Allocate<float>(kLeafCount * kChannels);
    auto* const sum_dy_xhat = Allocate<float>(kLeafCount * kChannels);
    auto* const weight = Random(kChannels);
    Kernel(named("BatchNormMoments"), shape, pass,
           [&] { BatchNormMoments(q_, kChannels, leaves, a, mean, m2, kChannels, type); });
    const Moments moments = {mean, m2, kChannels, 0};
    const BatchNormShape relu = {kChannels, true, type};
    Kernel(named("BatchNormForward relu"), shape, 2 * pass, [&] {
      BatchNormForward(q_, relu, leaves, a, moments, 1e-5f, weight, weight, nullptr, out_);
    });
    Kernel(named("BatchNormForward residual relu"), shape, 3 * pass,
           [&] { BatchNormForward(q_, relu, leaves, a, moments, 1e-5f, weight, weight, b, out_); });
    Kernel(named("BatchNormGradient relu"), shape, 3 * pass, [&] {
      BatchNormGradient(q_, relu, leaves, a, b, c, nullptr, moments, 1e-5f, nullptr, sum_dy,
                        sum_dy_xhat, kChannels);
    });
    Kernel(named("BatchNormGradient relu, more, written"), shape, 5 * pass, [&] {
      BatchNormGradient(q_, relu, leaves, a, b, c, d, moments, 1e-5f, out_, sum_dy, sum_dy_xhat,
                        kChannels);
    });
    Kernel(named("BatchNormBackward relu"), shape, 4 * pass, [&] {
      BatchNormBackward(q_, relu, leaves, a, b, c, moments, 1e-5f, weight, sum_dy, sum_dy_xhat,
                        kChannels, out_);
    });
    Kernel(named("ColumnSums"), shape, pass,
           [&] { ColumnSums(q_, leaves, kChannels, a, sum_dy, kChannels, type); });
    if (stored) {
      for (const void* const input : inputs) Must(cudaFree(const_cast<void*>(input)), "cudaFree");
      return;
    }
    Kernel("BiasForward relu", shape, 2 * pass,
           [&] { BiasForward(q_, kElements, kChannels, a_, weight, true, out_); });
  }

  void Maps() {
    const std::string shape = "51380224";
    constexpr double kPass = kElements * 4.0;
    auto* const scalars = Allocate<StepScalars>(1);
    Kernel("ReluForward", shape, 2 * kPass, [&] { ReluForward(q_, kElements, a_, out_); });
    Kernel("ReluBackward", shape, 3 * kPass, [&] { ReluBackward(q_, kElements, a_, b_, out_); });
    Kernel("TanhForward", shape, 2 * kPass, [&] { TanhForward(q_, kElements, a_, out_); });
    Kernel("SigmoidForward", shape, 2 * kPass, [&] { SigmoidForward(q_, kElements, a_, out_); });
    Kernel("Add", shape, 3 * kPass, [&] { Add(q_, kElements, a_, b_, out_); });
    Kernel("Multiply", shape, 3 * kPass, [&] { Multiply(q_, kElements, a_, b_, out_); });
    Kernel("Dropout", shape, 2 * kPass,
           [&] { Dropout(q_, kElements, a_, 0.4f, {}, scalars, 0, out_); });
    Kernel("RoundToBf16", shape, 1.5 * kPass,
           [&] { RoundToBf16(q_, kElements, a_, reinterpret_cast<uint16_t*>(out_)); });
    constexpr int64_t kFeatures = 1024, kVectors = kElements / kFeatures;
    Kernel("SoftmaxForward", "50176x1024", 2 * kPass,
           [&] { SoftmaxForward(q_, kVectors, kFeatures, a_, out_); });
    auto* const stats = Allocate<float>(2 * kVectors);
    Kernel("LayerNormForward", "50176x1024", 2 * kPass,
           [&] { LayerNormForward(q_, kVectors, kFeatures, a_, 1e-5f, b_, c_, out_, stats); });
    Kernel("SoftmaxBackward", "50176x1024", 3 * kPass,
           [&] { SoftmaxBackward(q_, kVectors, kFeatures, a_, b_, out_); });
    Kernel("LayerNormBackward", "50176x1024", 3 * kPass,
           [&] { LayerNormBackward(q_, kVectors, kFeatures, a_, stats, b_, c_, out_); });
    auto* const labels = Allocate<int32_t>(kElements / 1000);
    auto* const results = Allocate<LeafResult>(kLeafCount);
    Kernel("SoftmaxCrossEntropy", "50176x1024 in 8 leaves", 2 * kPass, [&] {
      SoftmaxCrossEntropy(q_, EightLeaves(kVectors), kFeatures, a_, labels, 0, 1, results, out_);
    });
    constexpr int64_t kClasses = 1000,
                      kRowsOfClasses = kElements / kClasses / kLeafCount * kLeafCount;
    Kernel("SoftmaxCrossEntropy 1000 classes", "51376x1000 in 8 leaves",
           2 * kRowsOfClasses * kClasses * 4.0, [&] {
             SoftmaxCrossEntropy(q_, EightLeaves(kRowsOfClasses), kClasses, a_, labels, 0, 1,
                                 results, out_);
           });
    const PoolShape pool = {56, 56, kChannels, 2, 2, 0};
    auto* const argmax = Allocate<uint8_t>(kElements / 4);
    Kernel("MaxPoolForward 2/2", "64x56x56x256", kPass * (1 + 0.25 + 0.0625),
           [&] { MaxPoolForward(q_, pool, kRows, a_, out_, argmax); });
    Kernel("MaxPoolBackward 2/2", "64x56x56x256", kPass * (1 + 0.25 + 0.0625),
           [&] { MaxPoolBackward(q_, pool, kRows, b_, argmax, out_); });
    const PoolShape stem = {112, 112, 64, 3, 2, 1};  // as many elements
    Kernel("MaxPoolForward 3/2", "64x112x112x64", kPass * (1 + 0.25 + 0.0625),
           [&] { MaxPoolForward(q_, stem, kRows, a_, out_, argmax); });
    Kernel("MaxPoolBackward 3/2", "64x112x112x64", kPass * (1 + 0.25 + 0.0625),
           [&] { MaxPoolBackward(q_, stem, kRows, b_, argmax, out_); });
    Kernel("GlobalAveragePoolForward", "64x56x56x256", kPass,
           [&] { GlobalAveragePoolForward(q_, kRows, kSpatial, kChannels, a_, out_); });
    Kernel("GlobalAveragePoolForward 7x7", "512x7x7x2048", kPass,
           [&] { GlobalAveragePoolForward(q_, 512, 49, 2048, a_, out_); });
  }

  void Flat() {
    const std::string shape = "51380224";
    constexpr double kPass = kElements * 4.0;
    const StepScalars* const scalars = Upload(std::vector<StepScalars>(1));
    OptimizerCoefficients momentum;
    momentum.type = OptimizerType::kMomentum;
    momentum.momentum = 0.9f;
    OptimizerSlots slots;
    slots.at[0] = out_;
    Kernel("OptimizerUpdate momentum", shape, 5 * kPass,
           [&] { OptimizerUpdate(q_, momentum, kElements, scalars, a_, b_, slots); });
    // The bf16 of the parameters too.
    Kernel("OptimizerUpdate momentum, rounded", shape, 5.5 * kPass, [&] {
      OptimizerUpdate(q_, momentum, kElements, scalars, a_, b_, slots,
                      reinterpret_cast<uint16_t*>(c_));
    });
    OptimizerCoefficients adam;
    adam.type = OptimizerType::kAdam;
    adam.beta1 = 0.9f, adam.beta2 = 0.999f, adam.epsilon = 1e-8f;
    slots.at[1] = c_;
    Must(cudaMemsetAsync(c_, 0, kElements * 4, q_.stream), "cudaMemset");
    Kernel("OptimizerUpdate adam", shape, 7 * kPass,
           [&] { OptimizerUpdate(q_, adam, kElements, scalars, a_, b_, slots); });
    auto* const sums = Allocate<double>(CeilDiv(kElements, kNormBlock));
    Kernel("SquaredNorms", shape, kPass, [&] { SquaredNorms(q_, kElements, a_, sums); });
    auto* const flag = Allocate<uint32_t>(1);
    Kernel("FlagNonFinite", shape, kPass, [&] { FlagNonFinite(q_, kElements, a_, flag); });
    auto* const digest = Allocate<Digest>(1);
    Kernel("AccumulateDigest", shape, kPass,
           [&] { AccumulateDigest(q_, kElements, a_, 7, 0, digest); });
    const float* parts[kLeafCount];
    constexpr int64_t kPart = kElements / kLeafCount;
    for (int i = 0; i < kLeafCount; ++i) parts[i] = a_ + i * kPart;
    Kernel("TreeSum", "8 parts of 6422528", kPass * (1 + 1.0 / kLeafCount),
           [&] { TreeSum(q_, kPart, parts, kLeafCount, out_); });
    GateOf(parts, kPart, "8 parts of 6422528");
    GateOf(parts, 655360, "8 parts of 655360");
  }

  void GateOf(const float* const* parts, int64_t elements, const char* text) {
    std::vector<NormBlock> blocks;
    for (int64_t at = 0; at < elements; at += kNormBlock) {
      blocks.push_back({at, std::min(kNormBlock, elements - at)});
    }
    StepGate gate;
    gate.block_count = static_cast<int64_t>(blocks.size());
    std::vector<SumGroup> groups;
    for (auto left = static_cast<int32_t>(blocks.size()); left > 1;) {
      const size_t before = groups.size();
      for (int32_t at = 0; at < left; at += kSumGroup) {
        groups.push_back({at, std::min(kSumGroup, left - at)});
      }
      left = gate.level_groups[gate.levels++] = static_cast<int32_t>(groups.size() - before);
    }
    gate.blocks = Upload(blocks);
    gate.groups = Upload(groups);
    gate.squares = Allocate<double>(gate.block_count);
    gate.results = Upload(std::vector<LeafResult>(kLeafCount));
    gate.leaves = kLeafCount;
    StepScalars* const scalars = Upload(std::vector<StepScalars>(3));
    gate.prepared = scalars;
    gate.current = scalars + 1;
    gate.update = scalars + 2;
    gate.outcomes = Allocate<StepOutcome>(1);
    gate.notes = Upload(std::vector<GateNotes>(1));
    Kernel("Gate", text, 4.0 * static_cast<double>(elements) * (kLeafCount + 1),
           [&] { Gate(q_, gate, parts, kLeafCount, out_); });
  }

  void Samples() {
    SamplesOf("GatherSamples", {224, 224, 3}, 256, "256x224x224x3");
    SamplesOf("GatherSamples 32x32", {32, 32, 3}, 16384, "16384x32x32x3");
  }

  void SamplesOf(const std::string& name, const SampleShape& shape, int64_t count,
                 const char* text) {
    const int64_t features = shape.features();
    auto* const data = Allocate<uint8_t>(count * features);
    std::vector<int64_t> host(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) host[static_cast<size_t>(i)] = i * 97 % count * features;
    const int64_t* const offsets = Upload(host);
    auto* const mean = Allocate<float>(3);
    auto* const inv_std = Random(3);
    const double bytes = 5.0 * static_cast<double>(count * features);
    Kernel(name.c_str(), text, bytes, [&] {
      GatherSamples(q_, shape, count, SampleType::kUint8, data, offsets, mean, inv_std, {}, 1, 0,
                    out_);
    });
    Augmentation augmentation;
    augmentation.crop_padding = 4;
    augmentation.flip = true;
    Kernel((name + " crop flip").c_str(), text, bytes, [&] {
      GatherSamples(q_, shape, count, SampleType::kUint8, data, offsets, mean, inv_std,
                    augmentation, 1, 0, out_);
    });
  }

  const double seconds_;
  Queue q_;
  uint64_t seed_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  double copy_ = 0;  // GB/s
  float *a_ = nullptr, *b_ = nullptr, *c_ = nullptr, *d_ = nullptr, *out_ = nullptr;
};

}  // namespace
}  // namespace lockstep::device::cuda

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.02;
  if (seconds <= 0) {
    std::fprintf(stderr, "usage: gpu_floor [seconds of each figure]\n");
    return 2;
  }
  lockstep::device::cuda::Floor floor(seconds);
  floor.Machine();
  const int failed = lockstep::device::cuda::PrintSmallProducts(500 * seconds);
  floor.Kernels();
  return lockstep::device::cuda::failures + failed == 0 ? 0 : 1;
}
