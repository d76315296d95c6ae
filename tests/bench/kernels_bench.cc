// One row for each kernel, at the sizes of fashion-cnn with 16 samples in a shard; prepared
// operations in both precisions.
//   kernels_bench --benchmark_filter=Conv
// FLOP/s counts a multiply-add as two; bytes/s counts each array read or written once.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "worker/device/cpu/cpu_device.h"

namespace lockstep::device {
namespace {

constexpr int64_t kRows = 16;

class Bench {
 public:
  Bench() : device_(MakeCpuDevice().value()), stream_(device_->MakeStream().value()) {}
  Device& device() { return *device_; }
  Stream& stream() { return *stream_; }
  // Small numbers of both signs.
  float* Floats(int64_t n) {
    memory_.push_back(device_->Allocate(n * sizeof(float)).value());
    float* const x = memory_.back()->floats();
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(i * 7919 % 1000) / 500 - 1;
    return x;
  }
  void* Bytes(int64_t n) {
    memory_.push_back(device_->Allocate(n).value());
    return memory_.back()->data();
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::unique_ptr<Memory>> memory_;
};

void ReportFlops(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(flops * static_cast<double>(state.iterations()),
                                                benchmark::Counter::kIsRate);
}
void ReportBytes(benchmark::State& state, double elements, double bytes_per_element) {
  const double times = static_cast<double>(state.iterations());
  state.counters["bytes/s"] =
      benchmark::Counter(elements * bytes_per_element * times, benchmark::Counter::kIsRate);
  state.counters["elements/s"] = benchmark::Counter(elements * times, benchmark::Counter::kIsRate);
}

enum Pass { kForward, kInput, kWeight, kPack };

// Of prepared operations: the argument is the precision of the products.
void InBoth(benchmark::internal::Benchmark* rows) { rows->ArgName("bf16")->Arg(0)->Arg(1); }
Precision PrecisionOf(const benchmark::State& state) {
  return state.range(0) == 0 ? Precision::kFp32 : Precision::kBf16;
}

void BackwardWeight(Conv2d& op, Stream& stream, const float* x, const float* dy, float* dw,
                    float* db, void* scratch) {
  op.BackwardWeight(stream, kRows, x, dy, dw, db, scratch);
}
void BackwardWeight(Dense& op, Stream& stream, const float* x, const float* dy, float* dw,
                    float* db, void* scratch) {
  op.BackwardWeight(stream, stream, kOneLeaf, &kRows, &x, &dy, &dw, &db, scratch);
}

template <class Op>
void RunPass(benchmark::State& state, Bench& b, Op& op, Pass pass, double products, const float* w,
             float* x, float* y, float* dw, float* vector) {
  void* const scratch = b.Bytes(op.scratch_bytes());
  op.Pack(b.stream(), w, nullptr);
  for (auto _ : state) {
    if (pass == kForward) op.Forward(b.stream(), kRows, x, vector, y, scratch);
    if (pass == kInput) op.BackwardInput(b.stream(), kRows, y, x, scratch);
    if (pass == kWeight) BackwardWeight(op, b.stream(), x, y, dw, vector, scratch);
    if (pass == kPack) op.Pack(b.stream(), w, nullptr);
    benchmark::ClobberMemory();
  }
  if (pass != kPack) ReportFlops(state, 2 * products);
  if (!b.stream().Synchronize().ok()) state.SkipWithError("a kernel failed");
}

void Conv(benchmark::State& state, Conv2dShape s, Pass pass) {
  Bench b;
  s.precision = PrecisionOf(state);
  auto op = b.device().MakeConv2d(s, {kRows}).value();
  const int64_t pixels = kRows * s.out_height() * s.out_width(),
                weights = s.out * s.kernel * s.kernel * s.in / s.groups;
  RunPass(state, b, *op, pass, static_cast<double>(pixels * weights), b.Floats(weights),
          b.Floats(kRows * s.height * s.width * s.in), b.Floats(pixels * s.out), b.Floats(weights),
          b.Floats(s.out));
}
constexpr Conv2dShape kConv1{28, 28, 1, 32, 3, 1, 1}, kConv2{14, 14, 32, 64, 3, 1, 1};
constexpr Conv2dShape kGrouped{
    .height = 14, .width = 14, .in = 64, .out = 64, .kernel = 3, .padding = 1, .groups = 4};
constexpr Conv2dShape kDilated{
    .height = 14, .width = 14, .in = 32, .out = 64, .kernel = 3, .padding = 2, .dilation = 2};
BENCHMARK_CAPTURE(Conv, conv1_forward, kConv1, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, conv1_weight, kConv1, kWeight)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, conv2_forward, kConv2, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, conv2_input, kConv2, kInput)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, conv2_weight, kConv2, kWeight)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, grouped_forward, kGrouped, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, grouped_input, kGrouped, kInput)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, grouped_weight, kGrouped, kWeight)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, dilated_forward, kDilated, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, dilated_input, kDilated, kInput)->Apply(InBoth);
BENCHMARK_CAPTURE(Conv, dilated_weight, kDilated, kWeight)->Apply(InBoth);

void DenseLayer(benchmark::State& state, DenseShape s, Pass pass) {
  Bench b;
  s.precision = PrecisionOf(state);
  auto op = b.device().MakeDense(s, {kRows}).value();
  RunPass(state, b, *op, pass, static_cast<double>(kRows * s.in * s.out), b.Floats(s.in * s.out),
          b.Floats(kRows * s.in), b.Floats(kRows * s.out), b.Floats(s.in * s.out), b.Floats(s.out));
}
constexpr DenseShape kDense1{3136, 128, true}, kDense2{128, 10, true};
BENCHMARK_CAPTURE(DenseLayer, dense1_forward, kDense1, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense1_input, kDense1, kInput)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense1_weight, kDense1, kWeight)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense1_pack, kDense1, kPack)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense2_forward, kDense2, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense2_input, kDense2, kInput)->Apply(InBoth);
BENCHMARK_CAPTURE(DenseLayer, dense2_weight, kDense2, kWeight)->Apply(InBoth);

// Of 64 samples: one leaf of them all, or the four leaves of a slot that has four shards, folded by
// the canonical tree. Their difference is what the tree costs a layer, which exactness/ of cpu.py
// has mixed with what smaller shards gain.
void DenseGradient(benchmark::State& state, int64_t in, int64_t out) {
  Bench b;
  const auto leaves = static_cast<int>(state.range(1));
  constexpr int64_t kSamples = 4 * kRows;
  constexpr int kBuffers[] = {0, 1, 1, 2}, kCombineCounts[] = {0, 1, 0, 2};
  constexpr FoldPair kCombines[] = {{0, 1}, {1, 2}, {0, 1}};
  const LeafFold fold =
      leaves == 1 ? kOneLeaf : LeafFold{4, kBuffers, kCombineCounts, kCombines, 1, &kFirstBuffer};
  const DenseShape shape{
      .in = in, .out = out, .bias = true, .precision = PrecisionOf(state), .most_leaves = leaves};
  auto op = b.device().MakeDense(shape, {kSamples}).value();
  const std::vector<int64_t> rows(leaves, kSamples / leaves);
  const float *x = b.Floats(kSamples * in), *dy = b.Floats(kSamples * out);
  std::vector<const float*> leaf_x, leaf_dy;
  for (int leaf = 0; leaf < leaves; ++leaf) {
    leaf_x.push_back(x + leaf * rows[leaf] * in);
    leaf_dy.push_back(dy + leaf * rows[leaf] * out);
  }
  float *dw = b.Floats(in * out), *db = b.Floats(out);
  void* const scratch = b.Bytes(static_cast<int64_t>(op->scratch_bytes()));
  op->Pack(b.stream(), b.Floats(in * out), nullptr);
  for (auto _ : state) {
    op->BackwardWeight(b.stream(), b.stream(), fold, rows.data(), leaf_x.data(), leaf_dy.data(),
                       &dw, &db, scratch);
    benchmark::ClobberMemory();
  }
  ReportFlops(state, 2 * static_cast<double>(kSamples * in * out));
}
void OfLeaves(benchmark::internal::Benchmark* rows) {
  rows->ArgNames({"bf16", "leaves"})->ArgsProduct({{0, 1}, {1, 4}});
}
BENCHMARK_CAPTURE(DenseGradient, 784x500, 784, 500)->Apply(OfLeaves);
BENCHMARK_CAPTURE(DenseGradient, 500x500, 500, 500)->Apply(OfLeaves);

// Images row by row. Backward uses up what forward left, so it is measured with it.
void LstmLayer(benchmark::State& state, LstmShape s, Pass pass) {
  Bench b;
  s.precision = PrecisionOf(state);
  auto op = b.device().MakeLstm(s, {kRows}).value();
  const int64_t gates = 4 * s.hidden, from_x = gates * s.in, from_h = gates * s.hidden;
  const std::vector<LstmTensors<const float>> tensors(
      s.directions(), {b.Floats(from_x), b.Floats(from_h), b.Floats(gates), b.Floats(gates)});
  const std::vector<LstmTensors<float>> gradients(
      s.directions(), {b.Floats(from_x), b.Floats(from_h), b.Floats(gates), b.Floats(gates)});
  float *x = b.Floats(kRows * s.steps * s.in), *y = b.Floats(kRows * s.outputs()),
        *reserve = b.Floats(kRows * s.reserve());
  void* const scratch = b.Bytes(static_cast<int64_t>(op->scratch_bytes()));
  op->Pack(b.stream(), tensors, {});
  for (auto _ : state) {
    if (pass == kPack) {
      op->Pack(b.stream(), tensors, {});
    } else {
      op->Forward(b.stream(), kRows, x, y, reserve, scratch);
    }
    if (pass == kWeight)
      op->Backward(b.stream(), kRows, x, y, reserve, gradients, nullptr, scratch);
    benchmark::ClobberMemory();
  }
  const auto steps = static_cast<double>(kRows * s.steps * s.directions());
  const auto forward = static_cast<double>(from_x + from_h);
  const double backward = pass == kWeight ? forward + static_cast<double>(from_h) : 0;
  if (pass != kPack) ReportFlops(state, 2 * steps * (forward + backward));
}
constexpr LstmShape kLstm{.steps = 28, .in = 28, .hidden = 128, .bias = true};
BENCHMARK_CAPTURE(LstmLayer, lstm_forward, kLstm, kForward)->Apply(InBoth);
BENCHMARK_CAPTURE(LstmLayer, lstm_forward_and_backward, kLstm, kWeight)->Apply(InBoth);
BENCHMARK_CAPTURE(LstmLayer, lstm_pack, kLstm, kPack)->Apply(InBoth);

void Embedding(benchmark::State& state) {
  Bench b;
  const int64_t n = kRows * 64, vocabulary = 10000, features = 128;
  float *x = b.Floats(n), *y = b.Floats(n * features), *w = b.Floats(vocabulary * features);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(i * 7919 % vocabulary);
  const bool backward = state.range(0) != 0;
  for (auto _ : state) {
    if (backward) {
      b.device().EmbeddingBackward(b.stream(), n, vocabulary, features, x, y, w);
    } else {
      b.device().EmbeddingForward(b.stream(), n, vocabulary, features, x, w, y);
    }
    benchmark::ClobberMemory();
  }
  // Backward writes the gradient of every word.
  ReportBytes(state, static_cast<double>((backward ? n + vocabulary : 2 * n) * features), 4);
}
BENCHMARK(Embedding)->ArgName("backward")->Arg(0)->Arg(1);

void BatchNorm(benchmark::State& state) {
  Bench b;
  const int64_t channels = state.range(0), n = kRows * state.range(1), size = n * channels;
  const BatchNormShape shape{channels, true};
  float *x = b.Floats(size), *y = b.Floats(size), *dy = b.Floats(size), *dx = b.Floats(size);
  float *mean = b.Floats(channels), *m2 = b.Floats(channels), *w = b.Floats(channels);
  float *sum = b.Floats(channels), *sum_x = b.Floats(channels);
  b.device().BatchNormMoments(b.stream(), shape, n, x, mean, m2);
  const int64_t stage = state.range(2);
  for (auto _ : state) {
    if (stage == 0) b.device().BatchNormMoments(b.stream(), shape, n, x, mean, m2);
    if (stage == 1)
      b.device().BatchNormForward(b.stream(), shape, n, x, {mean, m2, 0, n}, 1e-5f, w, w, nullptr,
                                  y);
    if (stage == 2) {
      b.device().BatchNormGradient(b.stream(), shape, n, x, y, dy, nullptr, {mean, m2, 0, n}, 1e-5f,
                                   nullptr, sum, sum_x);
    }
    if (stage == 3) {
      b.device().BatchNormBackward(b.stream(), shape, n, x, y, dy, {mean, m2, 0, n}, 1e-5f, w, sum,
                                   sum_x, 0, dx);
    }
    // At the end of a residual block.
    if (stage == 4) {
      b.device().BatchNormForward(b.stream(), shape, n, x, {mean, m2, 0, n}, 1e-5f, w, w, dy, y);
    }
    if (stage == 5) {
      b.device().BatchNormGradient(b.stream(), shape, n, x, y, dy, dx, {mean, m2, 0, n}, 1e-5f, dx,
                                   sum, sum_x);
    }
    benchmark::ClobberMemory();
  }
  constexpr double kBytes[] = {4, 8, 12, 16, 12, 20};
  ReportBytes(state, static_cast<double>(size), kBytes[stage]);
}
BENCHMARK(BatchNorm)
    ->ArgNames({"channels", "pixels", "stage"})
    ->ArgsProduct({{32}, {784}, {0, 1, 2, 3, 4, 5}})
    ->ArgsProduct({{64}, {196}, {0, 1, 2, 3, 4, 5}});

void MaxPool(benchmark::State& state) {
  Bench b;
  const PoolShape s{.height = 28, .width = 28, .channels = 32, .kernel = 2, .stride = 2};
  const int64_t in = kRows * 28 * 28 * 32;
  float *x = b.Floats(in), *y = b.Floats(in / 4);
  uint8_t* const argmax = static_cast<uint8_t*>(b.Bytes(in / 4));
  b.device().MaxPoolForward(b.stream(), s, kRows, x, y, argmax);
  for (auto _ : state) {
    if (state.range(0) == 0) {
      b.device().MaxPoolForward(b.stream(), s, kRows, x, y, argmax);
    } else {
      b.device().MaxPoolBackward(b.stream(), s, kRows, y, argmax, x);
    }
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(in), 5.25);
}
BENCHMARK(MaxPool)->ArgName("backward")->Arg(0)->Arg(1);

void Pad(benchmark::State& state) {
  Bench b;
  // Every second pixel of 32 x 32 x 16, or 16 channels into the middle of 32.
  const bool subsample = state.range(0) == 0;
  const StridedCopy copy = subsample ? StridedCopy{.size = {16, 16, 16},
                                                   .from = {1024, 32, 1},
                                                   .from_row = 16384,
                                                   .to = {256, 16, 1},
                                                   .to_row = 4096}
                                     : StridedCopy{.size = {16, 16, 16},
                                                   .from = {256, 16, 1},
                                                   .from_row = 4096,
                                                   .to_begin = 8,
                                                   .to = {512, 32, 1},
                                                   .to_row = 8192};
  float *x = b.Floats(kRows * 16384), *y = b.Floats(kRows * 8192);
  for (auto _ : state) {
    b.device().CopyStrided(b.stream(), copy, kRows, x, y);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(kRows * copy.elements()), 8);
}
BENCHMARK(Pad)->ArgName("channels")->Arg(0)->Arg(1);

void Map(benchmark::State& state) {
  Bench b;
  const int64_t n = 1 << 16, features = 256;
  float *x = b.Floats(n), *y = b.Floats(n), *w = b.Floats(features), *stats = b.Floats(n);
  const auto which = state.range(0);
  for (auto _ : state) {
    if (which == 0) b.device().LeakyReluForward(b.stream(), n, 0.1f, x, y);
    if (which == 1) b.device().EluForward(b.stream(), n, 1.0f, x, y);
    if (which == 2) b.device().SoftplusForward(b.stream(), n, x, y);
    if (which == 3) b.device().SoftmaxForward(b.stream(), n / features, features, x, y);
    if (which == 4) {
      b.device().LayerNormForward(b.stream(), n / features, features, x, 1e-5f, w, w, y, stats);
    }
    if (which == 5) {
      b.device().LayerNormBackward(b.stream(), n / features, features, x, stats, w, x, y);
    }
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 8);
}
BENCHMARK(Map)->ArgName("leaky_elu_softplus_softmax_norm_back")->DenseRange(0, 5);

void Dropout(benchmark::State& state) {
  Bench b;
  const int64_t n = kRows * 3136;
  const StepScalars scalars{.step = 1};
  float *x = b.Floats(n), *y = b.Floats(n);
  for (auto _ : state) {
    b.device().Dropout(b.stream(), n, x, 0.25f, {1, 2}, &scalars,
                       static_cast<uint64_t>(state.range(0)), y);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 8);
}
BENCHMARK(Dropout)->ArgName("first")->Arg(0)->Arg(3);

void Optimizer(benchmark::State& state) {
  Bench b;
  const int64_t n = 1 << 16;
  const OptimizerCoefficients c{.type = static_cast<OptimizerType>(state.range(0)),
                                .momentum = 0.9f,
                                .beta1 = 0.9f,
                                .beta2 = 0.999f,
                                .rho = 0.9f,
                                .epsilon = 1e-8f,
                                .l2 = 1e-4f};
  const StepScalars scalars{.step = 1, .learning_rate = 1e-6f};
  float *g = b.Floats(n), *w = b.Floats(n);
  const int count = SlotCount(c.type);
  OptimizerSlots slots;
  for (int i = 0; i < count; ++i) slots.at[i] = b.Floats(n);
  for (int i = 0; i < count; ++i) std::fill_n(slots.at[i], n, 1.0f);
  for (auto _ : state) {
    b.device().OptimizerUpdate(b.stream(), c, n, &scalars, g, w, slots);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 12 + 8 * count);
}
BENCHMARK(Optimizer)->ArgName("type")->DenseRange(0, kOptimizerTypes - 1);

void NormOf(benchmark::State& state) {
  Bench b;
  const int64_t n = 1 << 16;
  const float* x = b.Floats(n);
  std::vector<double> sums(n / kNormBlock);
  for (auto _ : state) {
    b.device().SquaredNorms(b.stream(), n, x, sums.data());
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 4);
}
BENCHMARK(NormOf);

void NonFiniteIn(benchmark::State& state) {
  Bench b;
  const int64_t n = 1 << 16;
  const float* x = b.Floats(n);
  uint32_t flag = 0;
  for (auto _ : state) {
    b.device().FlagNonFinite(b.stream(), n, x, &flag);
    benchmark::DoNotOptimize(flag);
  }
  ReportBytes(state, static_cast<double>(n), 4);
}
BENCHMARK(NonFiniteIn);

void DigestOf(benchmark::State& state) {
  Bench b;
  const int64_t n = 1 << 15;
  float* const x = b.Floats(n);
  Digest digest;
  for (auto _ : state) {
    b.device().AccumulateDigest(b.stream(), n, x, 1, 2, &digest);
    benchmark::DoNotOptimize(digest);
  }
  ReportBytes(state, static_cast<double>(n), 4);
}
BENCHMARK(DigestOf);

template <class Run>
void Map(benchmark::State& state, Run run) {
  Bench b;
  const int64_t n = 1 << 15;
  float *x = b.Floats(n), *y = b.Floats(n);
  for (auto _ : state) {
    run(b.device(), b.stream(), n, x, y);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 8);
}
BENCHMARK_CAPTURE(Map, relu, [](Device& d, auto&... arguments) { d.ReluForward(arguments...); });
BENCHMARK_CAPTURE(Map, tanh, [](Device& d, auto&... arguments) { d.TanhForward(arguments...); });
BENCHMARK_CAPTURE(Map, sigmoid,
                  [](Device& d, auto&... arguments) { d.SigmoidForward(arguments...); });

void Softmax(benchmark::State& state) {
  Bench b;
  const int64_t classes = state.range(0), n = kRows * classes;
  float *x = b.Floats(n), *dx = b.Floats(n);
  const std::vector<int32_t> labels(kRows, 1);
  LeafResult result;
  for (auto _ : state) {
    b.device().SoftmaxCrossEntropy(b.stream(), kRows, classes, x, labels.data(), 0, 0.1f, &result,
                                   dx);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(n), 8);
}
BENCHMARK(Softmax)->ArgName("classes")->Arg(10)->Arg(1000);

void Gather(benchmark::State& state) {
  Bench b;
  const SampleShape shape = {28, 28, state.range(0)};
  const int64_t channels = shape.channels, features = shape.features();
  Augmentation augmentation;
  if (state.range(1) != 0) {
    augmentation = {
        4, true, 8, MakePhiloxKey(1, "crop"), MakePhiloxKey(1, "flip"), MakePhiloxKey(1, "cutout")};
  }
  const std::vector<uint8_t> data(1000 * features, 7);
  std::vector<int64_t> offsets(kRows);
  for (int64_t i = 0; i < kRows; ++i) offsets[i] = i * 37 % 1000 * features;
  float *mean = b.Floats(channels), *inv_std = b.Floats(channels),
        *out = b.Floats(kRows * features);
  for (auto _ : state) {
    b.device().GatherSamples(b.stream(), shape, kRows, SampleType::kUint8, data.data(),
                             offsets.data(), mean, inv_std, augmentation, 1, 0, out);
    benchmark::ClobberMemory();
  }
  ReportBytes(state, static_cast<double>(kRows * features), 5);
}
BENCHMARK(Gather)->ArgNames({"channels", "augment"})->ArgsProduct({{1, 3}, {0, 1}});

}  // namespace
}  // namespace lockstep::device
