// Memory, streams and identity of a device, and what only the CPU promises.
#include <cstdint>
#include <utility>

#include "tests/device/device_test_fixture.h"
#include "worker/device/cpu/cpu_device.h"
#include "worker/device/cpu/kernels.h"
#include "worker/device/cpu/onednn_call.h"

namespace lockstep::device {
namespace {

TEST_P(DeviceTest, MemoryIsZeroedAndAligned) {
  for (size_t bytes : {0, 1, 64, 100, 1 << 20}) {
    auto memory = device().Allocate(bytes);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_EQ((*memory)->size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*memory)->data()) % 64, 0u);
    std::vector<char> content(bytes, 1);
    device().Copy(stream(), (*memory)->data(), content.data(), bytes);
    ASSERT_TRUE(stream().Synchronize().ok());
    EXPECT_EQ(content, std::vector<char>(bytes, 0));
  }
}

TEST_P(DeviceTest, TooMuchMemoryIsAnErrorThatNamesTheSize) {
  for (size_t bytes : {SIZE_MAX, SIZE_MAX / 2}) {
    const absl::Status status = device().Allocate(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(status.message().find(std::to_string(bytes)), absl::string_view::npos) << status;
  }
}

TEST_P(DeviceTest, CopiesAndZeroes) {
  const auto from = In(RandomFloats(100, 80)), to = Out(100);
  device().Copy(stream(), from, to, 70 * sizeof(float));
  device().Zero(stream(), to + 60, 5 * sizeof(float));
  std::vector<float> expected = from.Read();
  for (int i = 60; i < 65; ++i) expected[i] = 0;
  for (int i = 70; i < 100; ++i) expected[i] = 12345.678f;
  EXPECT_TRUE(SameBits(to.Read(), expected));
}

TEST_P(DeviceTest, FingerprintIsStable) {
  auto again = GetParam().make();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->fingerprint(Precision::kFp32), device().fingerprint(Precision::kFp32));
  EXPECT_FALSE(device().fingerprint(Precision::kFp32).empty());
}

LOCKSTEP_DEVICE_TESTS(DeviceTest);

// Of the instruction sets that the processor has.
std::vector<const Bf16Kernels*> Bf16Tables() {
  std::vector<const Bf16Kernels*> tables = {&avx2::kBf16Kernels};
  if (MakeCpuDevice(CpuIsa::kAvx512).ok()) tables.push_back(&avx512::kBf16Kernels);
  if (MakeCpuDevice(CpuIsa::kAvx512Bf16).ok()) tables.push_back(&avx512bf16::kBf16Kernels);
  return tables;
}

TEST(CpuDeviceTest, FingerprintNamesInstructionsAndLibrary) {
  auto device = MakeCpuDevice(CpuIsa::kAvx2);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->fingerprint(Precision::kFp32).find("cpu avx2 onednn "), 0u)
      << (*device)->fingerprint(Precision::kFp32);
}

TEST(CpuDeviceTest, CallNumbersAreGivenAgainWithoutConfusion) {
  CallNumbers numbers;
  const CallNumbers::Number a = numbers.Take(), b = numbers.Take();
  EXPECT_NE(a.index, b.index);
  numbers.Return(a);
  const CallNumbers::Number c = numbers.Take();
  EXPECT_EQ(c.index, a.index);
  EXPECT_NE(c.serial, a.serial);
}

TEST(CpuDeviceTest, AStreamServesOperationsOfManyJobs) {
  auto device = MakeCpuDevice();
  ASSERT_TRUE(device.ok()) << device.status();
  auto stream = (*device)->MakeStream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  // Different layouts take over the numbers of earlier ones.
  for (int64_t job = 0; job < 20; ++job) {
    const int64_t in = 3 + job, out = 40 - job;
    auto op = (*device)->MakeConv2d({1, 1, in, out, 1}, {2});
    ASSERT_TRUE(op.ok()) << op.status();
    const std::vector<float> x(2 * in, 1), w(in * out, 2);
    std::vector<float> y(2 * out);
    std::vector<char> scratch((*op)->scratch_bytes());
    (*op)->Pack(**stream, w.data(), nullptr);
    (*op)->Forward(**stream, 2, x.data(), nullptr, y.data(), scratch.data());
    ASSERT_TRUE((*stream)->Synchronize().ok());
    EXPECT_EQ(y, std::vector<float>(2 * out, 2.0f * static_cast<float>(in)));
  }
}

// Rounding to nearest even, and what is no ordinary number.
TEST(CpuDeviceTest, RoundsToBf16) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const std::vector<std::pair<float, uint16_t>> cases = {
      {0.0f, 0x0000},          {-0.0f, 0x8000},
      {1.0f, 0x3F80},          {-2.5f, 0xC020},
      {0x1.01p0f, 0x3F80},     {0x1.03p0f, 0x3F82},
      {0x1.010002p0f, 0x3F81}, {0x1.fffffep127f, 0x7F80},
      {inf, 0x7F80},           {-inf, 0xFF80},
      {nan, 0x7FC0},           {0x1p-126f, 0x0080},
      {0x1.fp-127f, 0x0000},   {-0x1p-149f, 0x8000}};
  for (const Bf16Kernels* k : Bf16Tables()) {
    for (size_t count = 1; count <= 40; ++count) {
      std::vector<float> x;
      for (size_t i = 0; i < count; ++i) x.push_back(cases[i % cases.size()].first);
      std::vector<uint16_t> bf16(count);
      std::vector<float> floats(count);
      k->round(static_cast<int64_t>(count), x.data(), bf16.data());
      k->round_in_floats(static_cast<int64_t>(count), x.data(), floats.data());
      for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(bf16[i], cases[i % cases.size()].second) << x[i];
        EXPECT_EQ(std::bit_cast<uint32_t>(floats[i]), uint32_t{bf16[i]} << 16) << x[i];
      }
    }
  }
}

// A processor with an instruction for products of bf16 gives the bits of one without.
TEST(CpuDeviceTest, AllInstructionSetsGiveEqualBitsInBf16) {
  const std::vector<const Bf16Kernels*> tables = Bf16Tables();
  if (tables.size() < 2) GTEST_SKIP() << "the processor has nothing to compare AVX2 with";
  constexpr int64_t kRows = 19, kIn = 75, kOut = 37, kHidden = 33;
  // Also small enough that products and sums are denormal.
  for (const float scale : {1.0f, 1e-17f, 3e-20f}) {
    const std::vector<float> x = RandomFloats(kRows * kIn, 84, -scale, scale),
                             w = RandomFloats(kOut * kIn, 85, -scale, scale),
                             dy = RandomFloats(kRows * kOut, 86, -scale, scale),
                             h = RandomFloats(4 * kHidden * 64 * kHidden, 87, -scale, scale);
    const auto run = [&](const Bf16Kernels& k) {
      std::vector<float> out(100000);
      float* next = out.data();
      const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
      constexpr int64_t kPairs = (kIn + 1) / 2, kRowPairs = (kRows + 1) / 2;
      float *w_in = take(kOut * kPairs), *x_in = take(kRows * kPairs);
      float *x_rows = take(kRowPairs * kIn), *dy_rows = take(kRowPairs * kOut);
      k.pair_columns(kOut, kIn, w.data(), w_in);
      k.pair_columns(kRows, kIn, x.data(), x_in);
      k.pair_rows(kRows, kIn, x.data(), x_rows);
      k.pair_rows(kRows, kOut, dy.data(), dy_rows);
      float* const scratch = take(kOut * kDenseScratchColumns);
      std::fill(scratch, next, 0.0f);
      k.dense_forward(kRows, kIn, kOut, x.data(), w_in, w.data(), true, take(kRows * kOut),
                      scratch);
      k.gemm({.rows = kIn,
              .columns = kOut,
              .depth = kRowPairs,
              .a_row = 1,
              .a_depth = kIn,
              .b_depth = kOut,
              .c_row = kOut},
             x_rows, dy_rows, nullptr, take(kIn * kOut));
      const int64_t rows = kRows;
      float* const dw = take(kIn * kOut);
      const float *xs = x_rows, *dys = dy_rows;
      k.dense_weight_gradient(kOneLeaf, kIn, kOut, &rows, &xs, &dys, &dw);
      // Packed weights of any order do: pairs of what h holds.
      std::vector<float> packed(LstmStepShape::PackedSize(kHidden));
      k.pair_columns(1,
                     2 * static_cast<int64_t>(packed.size()) < static_cast<int64_t>(h.size())
                         ? 2 * static_cast<int64_t>(packed.size())
                         : static_cast<int64_t>(h.size()),
                     h.data(), packed.data());
      float *gates = take(kRows * 4 * kHidden), *c = take(kRows * kHidden),
            *tanh_c = take(kRows * kHidden), *h_out = take(kRows * kHidden);
      std::copy(h.begin(), h.begin() + kRows * 4 * kHidden, gates);
      const LstmStepShape shape = {kRows, kHidden, kHidden};
      k.lstm_forward_step(shape, packed.data(), x_in, h.data(), gates, c, tanh_c, h_out);
      float* const dgates = take(kRows * 2 * kHidden);
      k.pair_columns(kRows, 4 * kHidden, gates, dgates);
      k.lstm_backward_step(shape, packed.data(), dgates, h.data(), c, tanh_c, gates, c);
      EXPECT_LE(next, out.data() + out.size());
      return out;
    };
    const std::vector<float> expected = run(*tables[0]);
    for (size_t i = 1; i < tables.size(); ++i) {
      EXPECT_TRUE(SameBits(run(*tables[i]), expected)) << "table " << i << ", scale " << scale;
    }
  }
}

// Both builds of the hand-written kernels do the same operations on the same sixteen lanes.
TEST(CpuDeviceTest, BothInstructionSetsGiveEqualBits) {
  if (!MakeCpuDevice(CpuIsa::kAvx512).ok()) {
    GTEST_SKIP() << "the processor has no AVX-512 to compare with";
  }
  constexpr int64_t kN = 75, kChannels = 37;
  const std::vector<float> x = RandomFloats(kN * kChannels, 81, -8, 8),
                           dy = RandomFloats(x.size(), 82);
  const int64_t size = static_cast<int64_t>(x.size());
  const std::vector<float> weight = RandomFloats(kChannels, 83);
  const auto run = [&](const Kernels& k) {
    std::vector<float> out(34 * size + 64 * kChannels + kN * kN);
    float* next = out.data();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    k.tanh_forward(size, x.data(), take(size));
    k.sigmoid_forward(size, x.data(), take(size));
    k.dropout(size, x.data(), 0.4f, {1, 2}, 3, 5, take(size));
    float *mean = take(kChannels), *m2 = take(kChannels), *sum = take(kChannels),
          *sum_x = take(kChannels);
    float *y = take(size), *dx = take(size);
    const BatchNormShape shape{kChannels, true};
    k.batch_norm_moments(kChannels, kN, x.data(), mean, m2);
    k.batch_norm_forward(shape, kN, x.data(), mean, m2, kN, 1e-5f, weight.data(), weight.data(), y);
    k.batch_norm_backward_sums(shape, kN, x.data(), y, dy.data(), mean, m2, kN, 1e-5f, sum, sum_x);
    k.batch_norm_backward(shape, kN, x.data(), y, dy.data(), mean, m2, kN, 1e-5f, weight.data(),
                          sum, sum_x, dx);
    k.column_sums(kN, kChannels, x.data(), take(kChannels));
    k.gemm({.rows = kN,
            .columns = kN,
            .depth = kChannels,
            .a_row = kChannels,
            .b_depth = kN,
            .c_row = kN},
           x.data(), dy.data(), nullptr, take(kN * kN));
    std::vector<int32_t> labels(kN, 3);
    double losses[2];
    int64_t correct;
    k.softmax_cross_entropy(kN, kChannels, x.data(), labels.data(), 0.1f, &losses[0], &correct,
                            take(size));
    k.mean_squared_error(kN, kChannels, x.data(), dy.data(), 0.1f, &losses[1], take(size));
    double norm;
    k.squared_norms(size, x.data(), &norm);
    for (double value : {losses[0], losses[1], norm}) {  // as it is, in two floats
      std::memcpy(take(2), &value, sizeof(value));
    }
    OptimizerCoefficients optimizer{.momentum = 0.9f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.99f,
                                    .rho = 0.95f,
                                    .epsilon = 1e-8f,
                                    .l2 = 0.1f};
    const StepScalars scalars{
        .step = 1, .learning_rate = 0.1f, .adam_correction1 = 0.1f, .adam_correction2 = 0.01f};
    for (int type = 0; type < kOptimizerTypes; ++type) {
      optimizer.type = static_cast<OptimizerType>(type);
      float* w = take(size);
      OptimizerSlots slots;
      for (int i = 0; i < SlotCount(optimizer.type); ++i) slots.at[i] = take(size);
      for (int step = 0; step < 2; ++step) {
        k.optimizer_update(optimizer, size, scalars, dy.data(), w, slots);
      }
    }
    return out;
  };
  EXPECT_TRUE(SameBits(run(avx2::kKernels), run(avx512::kKernels)));
}

}  // namespace
}  // namespace lockstep::device
