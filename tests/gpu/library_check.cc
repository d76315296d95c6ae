// The wrappers of the vendor's libraries on a real GPU, without the rest of the program: products
// and convolutions of many shapes against sums in double of some of their elements; a row's bits in
// calls of other numbers of rows; repetitions; replays from a CUDA graph. Prints a line a shape and
// exits with 1 where anything is wrong.
//   library_check [product|convolution] [a part of the line's name]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "worker/device/cuda/blas.h"
#include "worker/device/cuda/dnn.h"
#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

int failures = 0;
std::string only;

void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

double Milliseconds(std::chrono::steady_clock::time_point since) {
  const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - since;
  return passed.count();
}

uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

// Values that all tensors are cut from, on both sides, as floats, as bf16, and as floats of bf16's
// values.
class Pool {
 public:
  explicit Pool(size_t size) : host_(size), rounded_(size), bf16_(size) {
    for (size_t i = 0; i < size; ++i) {
      host_[i] = static_cast<float>(static_cast<int64_t>(Mix(i) >> 40) - (1 << 23)) * 0x1p-23f;
      uint32_t bits;
      std::memcpy(&bits, &host_[i], 4);
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      bf16_[i] = static_cast<uint16_t>(bits);
      bits <<= 16;
      std::memcpy(&rounded_[i], &bits, 4);
    }
    device_ = Upload(host_);
    device_rounded_ = Upload(rounded_);
    device_bf16_ = Upload(bf16_);
  }
  const float* host(Factors factors, size_t at) const {
    return (factors == Factors::kBf16 ? rounded_ : host_).data() + at;
  }
  const void* device(Factors factors, bool floats, size_t at) const {
    if (factors != Factors::kBf16) return device_ + at;
    return floats ? static_cast<const void*>(device_rounded_ + at) : device_bf16_ + at;
  }

 private:
  template <class T>
  static T* Upload(const std::vector<T>& values) {
    T* memory = nullptr;
    Must(cudaMalloc(&memory, values.size() * sizeof(T)), "cudaMalloc");
    Must(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
         "cudaMemcpy");
    // From pageable memory it returns before all has arrived, and other streams do not wait for it.
    Must(cudaDeviceSynchronize(), "copying");
    return memory;
  }
  std::vector<float> host_, rounded_;
  std::vector<uint16_t> bf16_;
  float *device_ = nullptr, *device_rounded_ = nullptr;
  uint16_t* device_bf16_ = nullptr;
};

constexpr size_t kPoolSize = size_t{72} << 20;
constexpr size_t kResultFloats = size_t{64} << 20;
constexpr size_t kLibraryWorkspace = size_t{3} << 30;
// Where tensors begin in the pool, in elements: multiples of 64 bytes.
constexpr size_t kFirstAt = 0, kSecondAt = 32 * 12345, kBiasAt = 32 * 777;
constexpr size_t kMostCompared = size_t{4} << 20;

struct Machine {
  Pool pool{kPoolSize};
  Queue queue;
  std::string failure;
  void* workspace = nullptr;
  float *result = nullptr, *other = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;

  Machine() {
    Must(cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking), "a stream");
    Must(cudaMalloc(&queue.workspace, kWorkspaceBytes), "cudaMalloc");
    Must(cudaMalloc(&workspace, kLibraryWorkspace), "cudaMalloc");
    Must(cudaMalloc(&result, kResultFloats * 4), "cudaMalloc");
    Must(cudaMalloc(&other, kResultFloats * 4), "cudaMalloc");
    Must(cudaEventCreate(&begin), "an event");
    Must(cudaEventCreate(&end), "an event");
    queue.failure = &failure;
  }
  void Synchronize() {
    Must(cudaStreamSynchronize(queue.stream), "running");
    Must(cudaGetLastError(), "launching");
  }
  void Fill(float* memory, size_t floats) {
    Must(cudaMemsetAsync(memory, 0x7b, floats * 4, queue.stream), "cudaMemset");
  }
  std::vector<float> Read(const float* memory, size_t floats) {
    Synchronize();
    std::vector<float> values(floats);
    Must(cudaMemcpy(values.data(), memory, floats * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }
  // Of one call.
  template <class Call>
  double Time(const Call& call) {
    float once = 0, all = 0;
    const auto run = [&](int times, float* passed) {
      Must(cudaEventRecord(begin, queue.stream), "an event");
      for (int i = 0; i < times; ++i) call();
      Must(cudaEventRecord(end, queue.stream), "an event");
      Must(cudaEventSynchronize(end), "running");
      Must(cudaEventElapsedTime(passed, begin, end), "an event");
    };
    run(1, &once);
    const int times = std::clamp(static_cast<int>(6 / std::max(once, 0.01f)), 3, 50);
    run(times, &all);
    return static_cast<double>(all) / times;
  }
  // The bits of a call that is replayed from a graph, which has run eagerly before.
  template <class Call>
  bool Captures(const Call& call) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    bool ok = cudaStreamBeginCapture(queue.stream, cudaStreamCaptureModeRelaxed) == cudaSuccess;
    call();
    ok = cudaStreamEndCapture(queue.stream, &graph) == cudaSuccess && ok;
    ok = ok && cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess &&
         cudaGraphLaunch(executable, queue.stream) == cudaSuccess;
    ok = cudaStreamSynchronize(queue.stream) == cudaSuccess && ok;
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (cudaGetLastError() != cudaSuccess) ok = false;
    return ok;
  }
};

bool SameBits(const float* a, const float* b, size_t n) { return std::memcmp(a, b, n * 4) == 0; }

// How far sums may be off, in parts of the sum of their terms' magnitudes.
double Tolerance(Factors factors) {
  switch (factors) {
    case Factors::kFp32:
      return 0x1p-20;
    case Factors::kTf32:
      return 0x1p-9;
    case Factors::kBf16:
      return 0x1p-16;
  }
  return 0;
}
constexpr const char* kFactorNames[] = {"fp32", "tf32", "bf16"};

struct Line {
  std::string name;
  std::string algorithm, wrong;
  double error = 0, make_ms = 0, run_ms = 0, flops = 0;
  void Wrong(const std::string& what) { wrong += (wrong.empty() ? "" : ", ") + what; }
  void Print() const {
    std::printf("%-58s %s err %.1e make %.0f ms run %.4f ms %.1f TFLOP/s [%s]%s%s\n", name.c_str(),
                wrong.empty() ? "ok    " : "FAILED", error, make_ms, run_ms,
                run_ms > 0 ? flops / run_ms / 1e9 : 0.0, algorithm.c_str(),
                wrong.empty() ? "" : " WRONG: ", wrong.c_str());
    std::fflush(stdout);
    if (!wrong.empty()) ++failures;
  }
};

// One element of a result: its sum in double and that of its terms' magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  void Add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// Compares some elements; returns the largest error in parts of the magnitude.
template <class Reference>
double LargestError(const std::vector<float>& result, int64_t columns, size_t terms,
                    const Reference& reference) {
  const size_t samples =
      std::min<size_t>(result.size(), std::clamp<size_t>((size_t{4} << 20) / terms, 24, 2000));
  double largest = 0;
  for (size_t i = 0; i < samples; ++i) {
    // The last elements, then any.
    const size_t at = i < 8 ? result.size() - 1 - i % result.size() : Mix(i + 99) % result.size();
    const auto index = static_cast<int64_t>(at);
    const Sum sum = reference(index / columns, index % columns);
    const double error = std::abs(static_cast<double>(result[at]) - sum.value);
    if (!(error <= sum.magnitude)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, error / std::max(sum.magnitude, 1e-30));
  }
  return largest;
}

// ---- products.

struct ProductCase {
  const char* name;
  ProductShape shape;
};

std::string NameOf(const ProductCase& c) {
  const ProductShape& s = c.shape;
  return std::string("product ") + kFactorNames[static_cast<int>(s.factors)] + " " + c.name + " " +
         std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k) +
         (s.transpose_a ? " A^T" : "") + (s.transpose_b ? " B^T" : "") + (s.bias ? " bias" : "") +
         (s.relu ? " relu" : "") + (s.accumulate ? " +=" : "");
}

void CheckProduct(Machine& gpu, Blas& blas, const ProductCase& c) {
  const ProductShape& s = c.shape;
  Line line;
  line.name = NameOf(c);
  if (line.name.find(only) == std::string::npos) return;
  line.flops = 2.0 * static_cast<double>(s.m * s.n) * static_cast<double>(s.k);
  const auto since = std::chrono::steady_clock::now();
  auto product = blas.MakeProduct(s);
  line.make_ms = Milliseconds(since);
  if (!product.ok()) {
    line.Wrong(product.status().ToString());
    return line.Print();
  }
  line.algorithm = (*product)->algorithm();
  const int64_t a_row = s.a_row != 0 ? s.a_row : s.transpose_a ? s.m : s.k;
  const int64_t b_row = s.b_row != 0 ? s.b_row : s.transpose_b ? s.k : s.n;
  const int64_t c_row = s.c_row != 0 ? s.c_row : s.n;
  const float* const host_a = gpu.pool.host(s.factors, kFirstAt);
  const float* const host_b = gpu.pool.host(s.factors, kSecondAt);
  const float* const host_bias = gpu.pool.host(Factors::kFp32, kBiasAt);
  const auto* const bias =
      static_cast<const float*>(gpu.pool.device(Factors::kFp32, true, kBiasAt));
  const auto run_into = [&](float* result, int64_t first_row, int64_t m) {
    (*product)->Run(
        gpu.queue, m,
        gpu.pool.device(s.factors, false, kFirstAt + static_cast<size_t>(first_row * a_row)),
        gpu.pool.device(s.factors, false, kSecondAt), s.bias ? bias : nullptr, result,
        gpu.workspace);
  };
  const auto floats = static_cast<size_t>(s.m * c_row);
  const auto clear = [&](float* memory) {
    if (s.accumulate) {
      Must(cudaMemsetAsync(memory, 0, floats * 4, gpu.queue.stream), "cudaMemset");
    } else {
      gpu.Fill(memory, floats);
    }
  };
  clear(gpu.result);
  run_into(gpu.result, 0, s.m);
  std::vector<float> result = gpu.Read(gpu.result, floats);
  if (!gpu.failure.empty()) {
    line.Wrong(std::exchange(gpu.failure, ""));
    return line.Print();
  }
  if (c_row == s.n) {
    line.error = LargestError(result, s.n, static_cast<size_t>(s.k), [&](int64_t i, int64_t j) {
      Sum sum;
      for (int64_t k = 0; k < s.k; ++k) {
        const float a = s.transpose_a ? host_a[k * a_row + i] : host_a[i * a_row + k];
        const float b = s.transpose_b ? host_b[j * b_row + k] : host_b[k * b_row + j];
        sum.Add(static_cast<double>(a) * b);
      }
      if (s.bias) sum.Add(host_bias[j]);
      if (s.relu) sum.value = std::max(sum.value, 0.0);
      return sum;
    });
    if (!(line.error <= Tolerance(s.factors))) line.Wrong("values");
  }
  clear(gpu.other);
  run_into(gpu.other, 0, s.m);
  if (!SameBits(gpu.Read(gpu.other, floats).data(), result.data(), floats)) line.Wrong("repeated");
  if (!s.transpose_a) {
    // Fewer rows, from the first on and from others.
    for (const int64_t m : {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{33}, s.m / 2, s.m - 1}) {
      if (m < 1 || m >= s.m) continue;
      for (const int64_t first : {int64_t{0}, s.m - m, (s.m - m) / 2}) {
        clear(gpu.other);
        run_into(gpu.other, first, m);
        const auto count = static_cast<size_t>(m * c_row);
        const std::vector<float> rows = gpu.Read(gpu.other, count);
        const float* const whole = result.data() + first * c_row;
        bool same = true;
        for (int64_t i = 0; i < m; ++i) {
          same = same &&
                 SameBits(rows.data() + i * c_row, whole + i * c_row, static_cast<size_t>(s.n));
        }
        if (!same) line.Wrong(std::to_string(m) + " rows from " + std::to_string(first));
      }
    }
  }
  if (s.accumulate) {
    // Once more on top: as an addition of the two would be.
    Must(cudaMemcpyAsync(gpu.other, gpu.pool.device(Factors::kFp32, true, 0), floats * 4,
                         cudaMemcpyDeviceToDevice, gpu.queue.stream),
         "cudaMemcpy");
    run_into(gpu.other, 0, s.m);
    const std::vector<float> sum = gpu.Read(gpu.other, floats);
    const float* const before = gpu.pool.host(Factors::kFp32, 0);
    bool same = true;
    for (size_t i = 0; i < floats; ++i) same = same && sum[i] == before[i] + result[i];
    if (!same) line.Wrong("+= is not an addition behind it");
  }
  clear(gpu.other);
  gpu.Synchronize();
  if (!gpu.Captures([&] { run_into(gpu.other, 0, s.m); }) ||
      !SameBits(gpu.Read(gpu.other, floats).data(), result.data(), floats)) {
    line.Wrong("from a graph");
  }
  line.run_ms = gpu.Time([&] { run_into(gpu.result, 0, s.m); });
  if (!gpu.failure.empty()) line.Wrong(std::exchange(gpu.failure, ""));
  line.Print();
}

void CheckReluKeepsNan(Machine& gpu, Blas& blas) {
  Line line;
  line.name = "product relu of NaN";
  auto product =
      blas.MakeProduct({.transpose_b = true, .m = 4, .n = 8, .k = 4, .bias = true, .relu = true});
  if (!product.ok()) {
    line.Wrong(product.status().ToString());
    return line.Print();
  }
  std::vector<float> a(16, 1.0f);
  a[5] = std::numeric_limits<float>::quiet_NaN();
  Must(cudaMemcpy(gpu.other, a.data(), 64, cudaMemcpyHostToDevice), "cudaMemcpy");
  Must(cudaDeviceSynchronize(), "copying");
  const void* const b = gpu.pool.device(Factors::kFp32, true, 0);
  (*product)->Run(gpu.queue, 4, gpu.other, b, static_cast<const float*>(b), gpu.result,
                  gpu.workspace);
  const std::vector<float> y = gpu.Read(gpu.result, 32);
  for (size_t i = 0; i < 32; ++i) {
    if (std::isnan(y[i]) != (i / 8 == 1)) line.Wrong("element " + std::to_string(i));
  }
  line.Print();
}

void CheckProducts(Machine& gpu) {
  auto blas = MakeBlas();
  if (!blas.ok()) {
    std::printf("FAILED: %s\n", blas.status().ToString().c_str());
    ++failures;
    return;
  }
  std::printf("%s\n", (*blas)->version().c_str());
  CheckReluKeepsNan(gpu, **blas);
  struct Layer {
    const char* name;
    int64_t rows, in, out;
  };
  const std::vector<Layer> layers = {
      {"mlp", 128, 784, 512},
      {"mlp", 4096, 784, 512},
      {"mlp", 256, 512, 10},
      {"lenet", 128, 400, 120},
      {"lenet", 64, 84, 10},
      {"resnet50", 256, 2048, 1000},
      {"large", 4096, 4096, 4096},
      {"odd", 100, 33, 17},
      {"odd", 37, 27, 10},
      {"odd", 130, 785, 1},
      {"odd", 65, 1, 31},
      {"lstm", 2048, 128, 512},
      {"odd", 1, 5, 3},
  };
  for (const Factors factors : {Factors::kFp32, Factors::kTf32, Factors::kBf16}) {
    for (const Layer& l : layers) {
      ProductShape shape;
      shape.factors = factors;
      shape.transpose_b = true;
      shape.m = l.rows;
      shape.n = l.out;
      shape.k = l.in;
      shape.bias = true;
      shape.relu = l.out % 2 == 0;
      CheckProduct(gpu, **blas, {l.name, shape});
      shape.relu = false;
      shape.bias = l.out % 2 == 0;
      CheckProduct(gpu, **blas, {l.name, shape});
      shape = {};
      shape.factors = factors;
      shape.m = l.rows;
      shape.n = l.in;
      shape.k = l.out;
      CheckProduct(gpu, **blas, {l.name, shape});
      shape.accumulate = true;
      CheckProduct(gpu, **blas, {l.name, shape});
      shape = {};
      shape.factors = factors;
      shape.transpose_a = true;
      shape.m = l.out;
      shape.n = l.in;
      shape.k = l.rows;
      CheckProduct(gpu, **blas, {l.name, shape});
      shape.accumulate = true;
      CheckProduct(gpu, **blas, {l.name, shape});
    }
    // Rows with something between them.
    ProductShape shape;
    shape.factors = factors;
    shape.transpose_b = true;
    shape.m = 96;
    shape.n = 256;
    shape.k = 64;
    shape.a_row = 28 * 64;
    shape.c_row = 28 * 256;
    shape.alignment = 4;
    CheckProduct(gpu, **blas, {"strided", shape});
  }
}

// ---- convolutions.

struct ConvolutionCase {
  const char* name;
  Conv2dShape shape;
  int64_t rows;
  bool timed;  // of a size that is worth a look
};

constexpr const char* kPassNames[] = {"forward", "dx", "dw"};

std::string NameOf(const ConvolutionCase& c, ConvolutionPass pass, Factors factors) {
  const Conv2dShape& s = c.shape;
  return std::string("convolution ") + kFactorNames[static_cast<int>(factors)] + " " +
         kPassNames[static_cast<int>(pass)] + " " + c.name + " " + std::to_string(c.rows) + "x" +
         std::to_string(s.height) + "x" + std::to_string(s.width) + "x" + std::to_string(s.in) +
         "-" + std::to_string(s.out) + " k" + std::to_string(s.kernel) + " s" +
         std::to_string(s.stride) + " p" + std::to_string(s.padding) +
         (s.dilation > 1 ? " d" + std::to_string(s.dilation) : "") +
         (s.groups > 1 ? " g" + std::to_string(s.groups) : "");
}

struct Geometry {
  explicit Geometry(const Conv2dShape& shape)
      : s(shape),
        oh(shape.out_height()),
        ow(shape.out_width()),
        part(shape.in / shape.groups),
        filters(shape.out / shape.groups) {}
  int64_t Inputs() const { return s.height * s.width * s.in; }
  int64_t Outputs() const { return oh * ow * s.out; }
  int64_t Weights() const { return s.out * s.kernel * s.kernel * part; }
  bool Inside(int64_t h, int64_t w) const {
    return h >= 0 && h < s.height && w >= 0 && w < s.width;
  }
  int64_t X(int64_t n, int64_t h, int64_t w, int64_t c) const {
    return ((n * s.height + h) * s.width + w) * s.in + c;
  }
  int64_t Y(int64_t n, int64_t h, int64_t w, int64_t k) const {
    return ((n * oh + h) * ow + w) * s.out + k;
  }
  int64_t W(int64_t k, int64_t r, int64_t q, int64_t c) const {
    return ((k * s.kernel + r) * s.kernel + q) * part + c;
  }
  Sum Forward(const float* x, const float* w, int64_t i) const {
    const int64_t k = i % s.out, q = i / s.out % ow, p = i / s.out / ow % oh, n = i / Outputs();
    Sum sum;
    for (int64_t r = 0; r < s.kernel; ++r) {
      for (int64_t t = 0; t < s.kernel; ++t) {
        const int64_t h = p * s.stride - s.padding + r * s.dilation;
        const int64_t v = q * s.stride - s.padding + t * s.dilation;
        if (!Inside(h, v)) continue;
        for (int64_t c = 0; c < part; ++c) {
          sum.Add(static_cast<double>(x[X(n, h, v, k / filters * part + c)]) * w[W(k, r, t, c)]);
        }
      }
    }
    return sum;
  }
  Sum Input(const float* dy, const float* w, int64_t i) const {
    const int64_t c = i % s.in, v = i / s.in % s.width, h = i / s.in / s.width % s.height,
                  n = i / Inputs();
    Sum sum;
    for (int64_t r = 0; r < s.kernel; ++r) {
      for (int64_t t = 0; t < s.kernel; ++t) {
        const int64_t a = h + s.padding - r * s.dilation, b = v + s.padding - t * s.dilation;
        if (a < 0 || b < 0 || a % s.stride != 0 || b % s.stride != 0 || a / s.stride >= oh ||
            b / s.stride >= ow) {
          continue;
        }
        for (int64_t k = c / part * filters; k < (c / part + 1) * filters; ++k) {
          sum.Add(static_cast<double>(dy[Y(n, a / s.stride, b / s.stride, k)]) *
                  w[W(k, r, t, c % part)]);
        }
      }
    }
    return sum;
  }
  Sum Weight(const float* dy, const float* x, int64_t rows, int64_t i) const {
    const int64_t c = i % part, t = i / part % s.kernel, r = i / part / s.kernel % s.kernel,
                  k = i / part / s.kernel / s.kernel;
    Sum sum;
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t p = 0; p < oh; ++p) {
        for (int64_t q = 0; q < ow; ++q) {
          const int64_t h = p * s.stride - s.padding + r * s.dilation;
          const int64_t v = q * s.stride - s.padding + t * s.dilation;
          if (!Inside(h, v)) continue;
          sum.Add(static_cast<double>(dy[Y(n, p, q, k)]) * x[X(n, h, v, k / filters * part + c)]);
        }
      }
    }
    return sum;
  }
  Conv2dShape s;
  int64_t oh, ow, part, filters;
};

void CheckConvolution(Machine& gpu, Dnn& dnn, const ConvolutionCase& c, ConvolutionPass pass,
                      Factors factors) {
  const Geometry g(c.shape);
  const bool forward = pass == ConvolutionPass::kForward;
  const bool weight = pass == ConvolutionPass::kBackwardWeight;
  Line line;
  line.name = NameOf(c, pass, factors);
  if (line.name.find(only) == std::string::npos) return;
  line.flops = 2.0 * static_cast<double>(c.rows * g.Outputs()) *
               static_cast<double>(g.part * g.s.kernel * g.s.kernel);
  const auto make = [&](int64_t rows) -> std::unique_ptr<Convolution> {
    auto convolution = dnn.MakeConvolution(pass, c.shape, rows, factors);
    if (!convolution.ok()) {
      line.Wrong(convolution.status().ToString());
      return nullptr;
    }
    if ((*convolution)->workspace_bytes() > kLibraryWorkspace) {
      line.Wrong("workspace");
      return nullptr;
    }
    return *std::move(convolution);
  };
  const auto since = std::chrono::steady_clock::now();
  const auto whole = make(c.rows);
  line.make_ms = Milliseconds(since);
  if (whole == nullptr) return line.Print();
  line.algorithm = whole->algorithm();
  const int64_t first_row = forward ? g.Inputs() : g.Outputs();
  const int64_t result_row = forward ? g.Outputs() : g.Inputs();
  const auto run_into = [&](Convolution& convolution, float* result, int64_t row) {
    convolution.Run(gpu.queue,
                    gpu.pool.device(factors, convolution.takes_floats(),
                                    kFirstAt + static_cast<size_t>(row * first_row)),
                    gpu.pool.device(factors, convolution.takes_floats(), kSecondAt), result,
                    gpu.workspace);
  };
  const auto floats = static_cast<size_t>(weight ? g.Weights() : c.rows * result_row);
  // Of large results the last part.
  const size_t compared = std::min(floats, kMostCompared), skipped = floats - compared;
  gpu.Fill(gpu.result, floats);
  run_into(*whole, gpu.result, 0);
  const std::vector<float> result = gpu.Read(gpu.result + skipped, compared);
  if (!gpu.failure.empty()) {
    line.Wrong(std::exchange(gpu.failure, ""));
    return line.Print();
  }
  const float* const first = gpu.pool.host(factors, kFirstAt);
  const float* const second = gpu.pool.host(factors, kSecondAt);
  const size_t terms = static_cast<size_t>(
      weight ? c.rows * g.oh * g.ow : g.s.kernel * g.s.kernel * (forward ? g.part : g.filters));
  line.error = LargestError(result, 1, terms, [&](int64_t i, int64_t) {
    i += static_cast<int64_t>(skipped);
    return forward  ? g.Forward(first, second, i)
           : weight ? g.Weight(first, second, c.rows, i)
                    : g.Input(first, second, i);
  });
  if (!(line.error <= Tolerance(factors))) line.Wrong("values");
  for (int i = 0; i < 2; ++i) {
    gpu.Fill(gpu.other, floats);
    run_into(*whole, gpu.other, 0);
    if (!SameBits(gpu.Read(gpu.other + skipped, compared).data(), result.data(), compared)) {
      line.Wrong("repeated");
    }
  }
  if (!weight) {
    for (const int64_t rows : {int64_t{1}, int64_t{3}, c.rows / 2}) {
      if (rows < 1 || rows >= c.rows) continue;
      const auto part = make(rows);
      if (part == nullptr) continue;
      if (part->algorithm() != line.algorithm) line.Wrong("another algorithm");
      const auto n = static_cast<size_t>(rows * result_row);
      for (const int64_t row : {c.rows - rows, c.rows - rows - 1, int64_t{0}}) {
        if (row < 0) continue;
        const auto at = static_cast<size_t>(row * result_row);
        if (at < skipped) continue;
        gpu.Fill(gpu.other, n);
        run_into(*part, gpu.other, row);
        if (!SameBits(gpu.Read(gpu.other, n).data(), result.data() + (at - skipped), n)) {
          line.Wrong(std::to_string(rows) + " rows from " + std::to_string(row));
        }
      }
    }
  }
  gpu.Fill(gpu.other, floats);
  gpu.Synchronize();
  if (!gpu.Captures([&] { run_into(*whole, gpu.other, 0); }) ||
      !SameBits(gpu.Read(gpu.other + skipped, compared).data(), result.data(), compared)) {
    line.Wrong("from a graph");
  }
  if (c.timed) line.run_ms = gpu.Time([&] { run_into(*whole, gpu.result, 0); });
  if (!gpu.failure.empty()) line.Wrong(std::exchange(gpu.failure, ""));
  line.Print();
}

void CheckConvolutions(Machine& gpu) {
  auto dnn = MakeDnn();
  if (!dnn.ok()) {
    std::printf("FAILED: %s\n", dnn.status().ToString().c_str());
    ++failures;
    return;
  }
  std::printf("%s\n", (*dnn)->version().c_str());
  const auto shape = [](int64_t height, int64_t width, int64_t in, int64_t out, int64_t kernel,
                        int64_t stride, int64_t padding, int64_t dilation = 1, int64_t groups = 1) {
    Conv2dShape s;
    s.height = height, s.width = width, s.in = in, s.out = out, s.kernel = kernel;
    s.stride = stride, s.padding = padding, s.dilation = dilation, s.groups = groups;
    return s;
  };
  const std::vector<ConvolutionCase> cases = {
      {"lenet", shape(28, 28, 1, 6, 5, 1, 2), 128, true},
      {"lenet", shape(14, 14, 6, 16, 5, 1, 0), 128, true},
      {"mnist", shape(28, 28, 1, 32, 3, 1, 1), 20, false},
      {"mnist", shape(14, 14, 32, 64, 3, 1, 1), 20, false},
      {"resnet20", shape(32, 32, 3, 16, 3, 1, 1), 128, true},
      {"resnet20", shape(32, 32, 16, 16, 3, 1, 1), 128, true},
      {"resnet20", shape(32, 32, 16, 32, 3, 2, 1), 128, true},
      {"resnet20", shape(32, 32, 16, 32, 1, 2, 0), 128, false},
      {"resnet20", shape(8, 8, 64, 64, 3, 1, 1), 128, true},
      {"resnet50", shape(224, 224, 3, 64, 7, 2, 3), 64, true},
      {"resnet50", shape(56, 56, 64, 64, 1, 1, 0), 64, true},
      {"resnet50", shape(56, 56, 64, 64, 3, 1, 1), 64, true},
      {"resnet50", shape(56, 56, 64, 256, 1, 1, 0), 64, true},
      {"resnet50", shape(56, 56, 128, 128, 3, 2, 1), 64, true},
      {"resnet50", shape(56, 56, 256, 512, 1, 2, 0), 64, true},
      {"resnet50", shape(14, 14, 256, 256, 3, 1, 1), 64, true},
      {"resnet50", shape(7, 7, 512, 512, 3, 1, 1), 64, true},
      {"resnet50", shape(7, 7, 512, 2048, 1, 1, 0), 64, true},
      {"odd", shape(5, 7, 1, 1, 3, 1, 1), 9, false},
      {"odd", shape(9, 7, 3, 33, 5, 2, 2), 9, false},
      {"odd", shape(7, 9, 33, 15, 3, 2, 1), 9, false},
      {"odd", shape(4, 4, 2, 64, 4, 4, 0), 9, false},
      {"odd", shape(3, 3, 4, 5, 3, 1, 2), 9, false},
      {"odd", shape(1, 1, 5, 9, 1, 1, 0), 9, false},
      {"dilated", shape(14, 14, 16, 32, 3, 1, 2, 2), 20, false},
      {"dilated", shape(13, 12, 5, 7, 3, 2, 1, 3), 9, false},
      {"grouped", shape(7, 7, 12, 18, 3, 1, 1, 1, 3), 9, false},
      {"grouped", shape(14, 14, 32, 32, 3, 1, 1, 1, 32), 20, false},
      {"grouped", shape(14, 14, 256, 256, 3, 1, 1, 1, 32), 64, true},
  };
  for (const ConvolutionCase& c : cases) {
    for (const ConvolutionPass pass : {ConvolutionPass::kForward, ConvolutionPass::kBackwardInput,
                                       ConvolutionPass::kBackwardWeight}) {
      for (const Factors factors : {Factors::kFp32, Factors::kTf32, Factors::kBf16}) {
        CheckConvolution(gpu, **dnn, c, pass, factors);
      }
    }
  }
}

int Main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (count > 2) only = arguments[2];
  cudaDeviceProp properties;
  Must(cudaGetDeviceProperties(&properties, 0), "the GPU");
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  Machine gpu;
  if (what != "convolution") CheckProducts(gpu);
  if (what != "product") CheckConvolutions(gpu);
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace lockstep::device::cuda

int main(int count, char** arguments) { return lockstep::device::cuda::Main(count, arguments); }
