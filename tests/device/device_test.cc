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
  EXPECT_EQ((*again)->fingerprint(), device().fingerprint());
  EXPECT_FALSE(device().fingerprint().empty());
}

LOCKSTEP_DEVICE_TESTS(DeviceTest);

TEST(CpuDeviceTest, FingerprintNamesInstructionsAndLibrary) {
  auto device = MakeCpuDevice(CpuIsa::kAvx2);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->fingerprint().find("cpu avx2 onednn "), 0u) << (*device)->fingerprint();
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
    (*op)->Pack(**stream, w.data());
    (*op)->Forward(**stream, 2, x.data(), nullptr, y.data(), scratch.data());
    ASSERT_TRUE((*stream)->Synchronize().ok());
    EXPECT_EQ(y, std::vector<float>(2 * out, 2.0f * static_cast<float>(in)));
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
