#include "tests/bench/gpu_products.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/gpu_must.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/own_products.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kLeafCount = 8;
constexpr int64_t kElements = int64_t{16} << 20;  // of a tensor, at most

enum class Pass { kForward, kInputGradient, kWeightGradient };
constexpr const char* kPassNames[] = {"forward", "input gradient", "weight gradient of 8 leaves"};

class Products {
 public:
  Products() {
    Must(cudaStreamCreateWithFlags(&q_.stream, cudaStreamNonBlocking), "a stream");
    q_.failure = &failure_;
    x_ = Allocate(kElements), w_ = Allocate(kElements), y_ = Allocate(kElements);
    x16_ = Allocate(kElements), w16_ = Allocate(kElements);
    workspace_ = Allocate(kProductWorkspaceBytes / 4);
    std::vector<float> values(kElements);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<int32_t>(i * 2654435761u)) * 0x1p-31f;
    }
    for (float* const to : {x_, w_}) {
      Must(cudaMemcpy(to, values.data(), values.size() * 4, cudaMemcpyHostToDevice), "copying");
    }
    Must(cudaDeviceSynchronize(), "copying");
    RoundToBf16(q_, kElements, w_, Bf16(w16_));
  }

  // Of a call, in microseconds; 0 where it failed.
  double Time(Blas& blas, Pass pass, Factors factors, int64_t rows, int64_t in, int64_t out) {
    ProductShape s;
    s.factors = factors;
    s.floats = true;
    const int64_t leaf = rows / kLeafCount;
    if (pass == Pass::kForward) {
      s.transpose_b = s.bias = true;
      s.m = rows, s.n = out, s.k = in;
    } else if (pass == Pass::kInputGradient) {
      s.m = rows, s.n = in, s.k = out;
    } else {
      s.transpose_a = true;
      s.m = out, s.n = in, s.k = leaf;
    }
    const auto product = blas.MakeProduct(s);
    if (!product.ok()) return 0;
    const bool rounds = factors == Factors::kBf16 && !(*product)->takes_floats();
    const void* const a = rounds ? x16_ : x_;
    const bool weights = pass == Pass::kWeightGradient;
    const void* const b = !weights && factors == Factors::kBf16 ? w16_ : weights ? a : w_;
    return TimeOfCall([&] {
      if (rounds) RoundToBf16(q_, rows * (pass == Pass::kForward ? in : out), x_, Bf16(x16_));
      if (!weights) return (*product)->Run(q_, rows, a, b, s.bias ? w_ : nullptr, y_, workspace_);
      if (rounds) RoundToBf16(q_, rows * in, x_, Bf16(x16_));
      (*product)->RunBatch(q_, kLeafCount, a, leaf * out, b, leaf * in, y_, in * out, workspace_);
    });
  }

 private:
  static float* Allocate(int64_t floats) {
    void* memory = nullptr;
    Must(cudaMalloc(&memory, static_cast<size_t>(floats) * 4), "cudaMalloc");
    return static_cast<float*>(memory);
  }
  static uint16_t* Bf16(float* memory) { return reinterpret_cast<uint16_t*>(memory); }

  // The best of several replays.
  double TimeOfCall(const std::function<void()>& call) {
    constexpr int kCalls = 50, kReplays = 5;
    call();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    Must(cudaStreamBeginCapture(q_.stream, cudaStreamCaptureModeRelaxed), "capturing");
    for (int i = 0; i < kCalls; ++i) call();
    Must(cudaStreamEndCapture(q_.stream, &graph), "capturing");
    Must(cudaGraphInstantiate(&executable, graph, 0), "a graph");
    double best = 1e30;
    for (int i = 0; i < kReplays; ++i) {
      Must(cudaStreamSynchronize(q_.stream), "running");
      const auto begin = std::chrono::steady_clock::now();
      Must(cudaGraphLaunch(executable, q_.stream), "a graph");
      Must(cudaStreamSynchronize(q_.stream), "running");
      const std::chrono::duration<double, std::micro> passed =
          std::chrono::steady_clock::now() - begin;
      best = std::min(best, passed.count() / kCalls);
    }
    Must(cudaGraphExecDestroy(executable), "a graph");
    Must(cudaGraphDestroy(graph), "a graph");
    if (failure_.empty()) return best;
    std::fprintf(stderr, "gpu_floor: %s\n", failure_.c_str());
    return 0;
  }

  Queue q_;
  std::string failure_;
  float *x_, *w_, *y_, *x16_, *w16_;
  float* workspace_;
};

}  // namespace

int PrintSmallProducts(double seconds) {
  struct Layer {
    int64_t rows, in, out;
  };
  // Those of the mlp; of a batch that fills a GPU by itself; around the rule's limit.
  const std::vector<Layer> layers = {{128, 784, 500},  {128, 500, 500},   {128, 500, 10},
                                     {8192, 784, 500}, {128, 1024, 1024}, {8192, 1024, 1024}};
  auto vendor = MakeBlas(), wrapped = MakeBlas();
  if (!vendor.ok() || !wrapped.ok()) {
    std::fprintf(stderr, "gpu_floor: %s\n", vendor.status().ToString().c_str());
    return 1;
  }
  const std::unique_ptr<Blas> own = WithOwnProducts(*std::move(wrapped));
  Products products;
  int failures = 0;
  const auto since = std::chrono::steady_clock::now();
  for (const Layer& layer : layers) {
    for (const Factors factors : {Factors::kFp32, Factors::kBf16}) {
      for (const Pass pass : {Pass::kForward, Pass::kInputGradient, Pass::kWeightGradient}) {
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - since;
        if (passed.count() > seconds) return failures;
        const auto& [rows, in, out] = layer;
        const double us = products.Time(*own, pass, factors, rows, in, out);
        const double vendor_us = products.Time(**vendor, pass, factors, rows, in, out);
        failures += us > 0 && vendor_us > 0 ? 0 : 1;
        std::printf(
            "{\"what\": \"small product\", \"name\": \"%s %s %dx%dx%d\", \"us\": %.3f, "
            "\"vendor_us\": %.3f}\n",
            factors == Factors::kBf16 ? "bf16" : "fp32", kPassNames[static_cast<int>(pass)],
            static_cast<int>(rows), static_cast<int>(in), static_cast<int>(out), us, vendor_us);
      }
    }
  }
  return failures;
}

}  // namespace lockstep::device::cuda
