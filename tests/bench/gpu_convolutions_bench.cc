// Convolutions of ResNet-20 (batch 128 in leaves of 16) and ResNet-50 (batch 256 in leaves of 32)
// on a GPU: our kernels in bf16, of tensors stored as bf16 (images as fp32) or as fp32, and in
// fp32, and cuDNN in bf16 (operands rounded beforehand), which takes all rows in one call for y and
// dx and each leaf by itself for dw. Prints a line of JSON for each layer, pass and way, and at the
// end each way's sum over the layers of a network.
//   gpu_convolutions_bench [seconds after which cuDNN is left out]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/gpu_must.h"
#include "worker/device/cuda/dnn.h"
#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

struct Layer {
  int count;  // in the network
  int64_t size, in, out, kernel, stride;
  Conv2dShape shape() const {
    return {.height = size,
            .width = size,
            .in = in,
            .out = out,
            .kernel = kernel,
            .stride = stride,
            .padding = kernel / 2};
  }
};
struct Network {
  std::string name;
  int64_t rows;
  std::vector<Layer> layers;
};
constexpr int kLeaves = 8;

std::vector<Network> Networks() {
  return {{"resnet20",
           128,
           {{1, 32, 3, 16, 3, 1},
            {6, 32, 16, 16, 3, 1},
            {1, 32, 16, 32, 3, 2},
            {5, 16, 32, 32, 3, 1},
            {1, 16, 32, 64, 3, 2},
            {5, 8, 64, 64, 3, 1}}},
          {"resnet50",
           256,
           {{1, 224, 3, 64, 7, 2},    {1, 56, 64, 64, 1, 1},     {3, 56, 64, 64, 3, 1},
            {4, 56, 64, 256, 1, 1},   {2, 56, 256, 64, 1, 1},    {1, 56, 256, 128, 1, 1},
            {1, 56, 128, 128, 3, 2},  {1, 56, 256, 512, 1, 2},   {4, 28, 128, 512, 1, 1},
            {3, 28, 512, 128, 1, 1},  {3, 28, 128, 128, 3, 1},   {1, 28, 512, 256, 1, 1},
            {1, 28, 256, 256, 3, 2},  {1, 28, 512, 1024, 1, 2},  {6, 14, 256, 1024, 1, 1},
            {5, 14, 1024, 256, 1, 1}, {5, 14, 256, 256, 3, 1},   {1, 14, 1024, 512, 1, 1},
            {1, 14, 512, 512, 3, 2},  {1, 14, 1024, 2048, 1, 2}, {3, 7, 512, 2048, 1, 1},
            {2, 7, 2048, 512, 1, 1},  {2, 7, 512, 512, 3, 1}}}};
}

template <class T>
T* Allocate(int64_t count) {
  T* memory = nullptr;
  Must(cudaMalloc(reinterpret_cast<void**>(&memory), static_cast<size_t>(count) * sizeof(T)),
       "cudaMalloc");
  return memory;
}

class Bench {
 public:
  explicit Bench(double most_seconds) : most_seconds_(most_seconds) {
    Must(cudaStreamCreateWithFlags(&queue_.stream, cudaStreamNonBlocking), "a stream");
    Must(cudaEventCreate(&begin_), "an event");
    Must(cudaEventCreate(&end_), "an event");
    queue_.workspace = Allocate<char>(kWorkspaceBytes);
    queue_.failure = &failure_;
    auto dnn = MakeDnn();
    if (dnn.ok()) {
      dnn_ = *std::move(dnn);
    } else {
      std::fprintf(stderr, "no cuDNN: %s\n", dnn.status().ToString().c_str());
    }
    int64_t x = 0, y = 0, w = 0;
    for (const Network& network : Networks()) {
      for (const Layer& layer : network.layers) {
        const Conv2dShape s = layer.shape();
        x = std::max(x, network.rows * Inputs(s));
        y = std::max(y, network.rows * Outputs(s));
        w = std::max(w, Weights(s));
      }
    }
    x_ = MakeTensor(x, 1);
    y_ = MakeTensor(y, 2);
    w_ = MakeTensor(w, 3);
    result_ = Allocate<float>(std::max({x, y, kLeaves * w}));
    packed_ = Allocate<char>(64 << 20);
    library_workspace_ = Allocate<char>(kLibraryWorkspace);
  }

  void Run(const Network& network) {
    for (const Layer& layer : network.layers) {
      Measure(network, layer, "forward");
      Measure(network, layer, "dx");
      Measure(network, layer, "dw");
    }
    for (const auto& [way, ms] : sums_) {
      std::printf("{\"network\": \"%s\", \"way\": \"%s\", \"sum_ms\": %.4f}\n",
                  network.name.c_str(), way.c_str(), ms);
    }
    sums_.clear();
  }

 private:
  static constexpr size_t kLibraryWorkspace = size_t{2} << 30;

  struct Tensor {
    float* floats;
    uint16_t* bf16;
    float* rounded;  // floats of bf16's values
  };

  static int64_t Inputs(const Conv2dShape& s) { return s.height * s.width * s.in; }
  static int64_t Outputs(const Conv2dShape& s) { return s.out_height() * s.out_width() * s.out; }
  static int64_t Weights(const Conv2dShape& s) { return s.out * s.kernel * s.kernel * s.in; }

  Tensor MakeTensor(int64_t count, uint64_t seed) {
    constexpr int64_t kPattern = int64_t{1} << 20;
    std::vector<float> values(static_cast<size_t>(std::min(count, kPattern)));
    for (size_t i = 0; i < values.size(); ++i) {
      uint64_t bits = (seed << 32 | i) * 0x9E3779B97F4A7C15ull;
      bits ^= bits >> 31;
      values[i] =
          static_cast<float>(static_cast<int32_t>(bits * 0xBF58476D1CE4E5B9ull >> 32)) * 0x1p-31f;
    }
    Tensor tensor = {Allocate<float>(count), Allocate<uint16_t>(count), Allocate<float>(count)};
    for (int64_t at = 0; at < count; at += kPattern) {
      const size_t floats = static_cast<size_t>(std::min(kPattern, count - at));
      Must(cudaMemcpy(tensor.floats + at, values.data(), floats * 4, cudaMemcpyHostToDevice),
           "cudaMemcpy");
    }
    RoundToBf16(queue_, count, tensor.floats, tensor.bf16);
    RoundInFloats(queue_, count, tensor.floats, tensor.rounded);
    Must(cudaStreamSynchronize(queue_.stream), "rounding");
    return tensor;
  }

  // Of one call, in milliseconds.
  double Time(const std::function<void()>& call) {
    float passed = 0;
    const auto run = [&](int times) {
      Must(cudaEventRecord(begin_, queue_.stream), "an event");
      for (int i = 0; i < times; ++i) call();
      Must(cudaEventRecord(end_, queue_.stream), "an event");
      Must(cudaEventSynchronize(end_), "running");
      Must(cudaEventElapsedTime(&passed, begin_, end_), "an event");
      Must(cudaGetLastError(), "launching");
    };
    run(1);
    run(1);
    const int times = std::clamp(static_cast<int>(4 / std::max(passed, 0.01f)), 2, 50);
    run(times);
    return static_cast<double>(passed) / times;
  }

  void Measure(const Network& network, const Layer& layer, const std::string& pass) {
    Conv2dShape s = layer.shape();
    const int64_t rows = network.rows;
    Leaves leaves(rows / kLeaves);
    for (leaves.count = 1; leaves.count < kLeaves;) {
      ++leaves.count;
      leaves.begin[leaves.count] = leaves.begin[leaves.count - 1] + rows / kLeaves;
    }
    const auto print = [&](const std::string& way, double ms) {
      sums_[way] += ms * layer.count;
      sums_[way + " " + pass] += ms * layer.count;
      const double flops =
          2.0 * static_cast<double>(rows * s.out_height() * s.out_width()) * Weights(s);
      std::printf(
          "{\"network\": \"%s\", \"layer\": \"%dx%dx%d to %d, kernel %d, stride %d\", \"count\": "
          "%d, \"pass\": \"%s\", \"way\": \"%s\", \"ms\": %.4f, \"tflops\": %.1f}\n",
          network.name.c_str(), static_cast<int>(s.height), static_cast<int>(s.width),
          static_cast<int>(s.in), static_cast<int>(s.out), static_cast<int>(s.kernel),
          static_cast<int>(s.stride), layer.count, pass.c_str(), way.c_str(), ms, flops / ms / 1e9);
      std::fflush(stdout);
    };

    s.precision = Precision::kBf16;
    const auto measure = [&](const std::string& way, const void* x, const void* y) {
      PackTensorWeights(queue_, s, w_.bf16, packed_);  // as the types of its tensors want them
      print(way, Time([&] {
              if (pass == "forward") {
                TensorConvolutionForward(queue_, s, rows, x, packed_, nullptr, false, result_);
              } else if (pass == "dx") {
                TensorConvolutionBackwardInput(queue_, s, rows, y, packed_, result_);
              } else {
                TensorConvolutionBackwardWeight(queue_, s, leaves, x, y, result_, Weights(s),
                                                library_workspace_);
              }
            }));
    };
    measure("bf16", x_.floats, y_.floats);
    const bool image = s.in == 3;
    if (!image) s.x_type = ElementType::kBf16;
    s.y_type = ElementType::kBf16;
    measure("bf16 stored", image ? static_cast<const void*>(x_.floats) : x_.bf16, y_.bf16);
    if (pass == "forward") {
      print("bf16 pack", Time([&] { PackTensorWeights(queue_, s, w_.bf16, packed_); }));
    }
    s.x_type = s.y_type = ElementType::kFp32;
    s.precision = Precision::kFp32;
    print("fp32", Time([&] {
            if (pass == "forward") {
              ConvolutionForward(queue_, s, rows, x_.floats, w_.floats, nullptr, false, result_);
            } else if (pass == "dx") {
              ConvolutionBackwardInput(queue_, s, rows, y_.floats, w_.floats, result_);
            } else {
              ConvolutionBackwardWeight(queue_, s, leaves, x_.floats, y_.floats, result_,
                                        Weights(s));
            }
          }));
    if (dnn_ != nullptr && Seconds() < most_seconds_) MeasureLibrary(s, rows, pass, print);
  }

  template <class Print>
  void MeasureLibrary(const Conv2dShape& s, int64_t rows, const std::string& pass,
                      const Print& print) {
    const bool weight = pass == "dw";
    const int64_t own_rows = weight ? rows / kLeaves : rows;
    auto made = dnn_->MakeConvolution(weight              ? ConvolutionPass::kBackwardWeight
                                      : pass == "forward" ? ConvolutionPass::kForward
                                                          : ConvolutionPass::kBackwardInput,
                                      s, own_rows, Factors::kBf16);
    if (!made.ok() || (*made)->workspace_bytes() > kLibraryWorkspace) return;
    Convolution& convolution = **made;
    const auto factor = [&](const Tensor& tensor, int64_t at) {
      return convolution.takes_floats() ? static_cast<const void*>(tensor.rounded + at)
                                        : tensor.bf16 + at;
    };
    print("cudnn bf16", Time([&] {
            if (!weight) {
              convolution.Run(queue_, factor(pass == "forward" ? x_ : y_, 0), factor(w_, 0),
                              result_, library_workspace_);
              return;
            }
            for (int leaf = 0; leaf < kLeaves; ++leaf) {
              convolution.Run(queue_, factor(y_, leaf * own_rows * Outputs(s)),
                              factor(x_, leaf * own_rows * Inputs(s)), result_ + leaf * Weights(s),
                              library_workspace_);
            }
          }));
    if (!failure_.empty()) std::fprintf(stderr, "cuDNN: %s\n", failure_.c_str());
    failure_.clear();
    // What rounding its operands takes.
    print("cudnn rounding", Time([&] {
            if (pass != "dx") RoundToBf16(queue_, rows * Inputs(s), x_.floats, x_.bf16);
            if (pass != "forward") RoundToBf16(queue_, rows * Outputs(s), y_.floats, y_.bf16);
          }));
  }

  double Seconds() const {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start_;
    return passed.count();
  }

  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  const double most_seconds_;
  Queue queue_;
  std::string failure_;
  std::unique_ptr<Dnn> dnn_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  Tensor x_, y_, w_;
  float* result_ = nullptr;
  char *packed_ = nullptr, *library_workspace_ = nullptr;
  std::map<std::string, double> sums_;
};

}  // namespace
}  // namespace lockstep::device::cuda

int main(int argc, char** argv) {
  namespace cuda = lockstep::device::cuda;
  cuda::Bench bench(argc > 1 ? std::atof(argv[1]) : 18);
  for (const cuda::Network& network : cuda::Networks()) bench.Run(network);
  return 0;
}
