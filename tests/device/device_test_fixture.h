// One body of kernel tests for every device. A device under test is named by a factory; the list of
// factories is the only place that knows which devices exist.
//
// Buffers are guarded: on the CPU a buffer ends at (or begins behind) a page that may not be
// touched, so that a read or write beyond it kills the test, and the bytes on its other side hold a
// pattern that is checked when the buffer goes.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/device/device.h"

namespace lockstep::device {

// Memory that a device can address, with guards on both sides.
class GuardedMemory {
 public:
  virtual ~GuardedMemory() = default;
  virtual void* data() = 0;
  virtual bool guards_intact() const = 0;
};

// Which side of the buffer is the page that may not be touched.
enum class Guard { kBehind, kBefore };

struct DeviceFactory {
  std::string name;
  std::function<absl::StatusOr<std::unique_ptr<Device>>()> make;
  std::function<std::unique_ptr<GuardedMemory>(size_t bytes, Guard guard)> allocate;
};

const std::vector<DeviceFactory>& DeviceFactories();
inline void PrintTo(const DeviceFactory& factory, std::ostream* out) { *out << factory.name; }

class DeviceTest : public testing::TestWithParam<DeviceFactory> {
 protected:
  void SetUp() override;

  template <class T>
  class Buffer {
   public:
    Buffer(DeviceTest* test, size_t size, Guard guard = Guard::kBehind)
        : test_(test), size_(size), memory_(test->GetParam().allocate(size * sizeof(T), guard)) {}
    Buffer(DeviceTest* test, const std::vector<T>& values, Guard guard = Guard::kBehind)
        : Buffer(test, values.size(), guard) {
      Write(values);
    }
    ~Buffer() {
      if (memory_ == nullptr) return;
      EXPECT_TRUE(memory_->guards_intact()) << "bytes outside the buffer changed";
    }
    Buffer(Buffer&&) noexcept = default;
    Buffer& operator=(Buffer&&) = delete;

    T* data() const { return static_cast<T*>(memory_->data()); }
    operator T*() const { return data(); }
    size_t size() const { return size_; }
    void Write(const std::vector<T>& values) {
      test_->device().Copy(test_->stream(), values.data(), data(), values.size() * sizeof(T));
      EXPECT_TRUE(test_->stream().Synchronize().ok());
    }
    std::vector<T> Read() const {
      std::vector<T> values(size_);
      test_->device().Copy(test_->stream(), data(), values.data(), size_ * sizeof(T));
      EXPECT_TRUE(test_->stream().Synchronize().ok());
      return values;
    }

   private:
    DeviceTest* test_;
    size_t size_;
    std::unique_ptr<GuardedMemory> memory_;
  };

  Device& device() { return *device_; }
  Stream& stream() { return *stream_; }

  template <class T>
  Buffer<T> In(const std::vector<T>& values, Guard guard = Guard::kBehind) {
    return Buffer<T>(this, values, guard);
  }
  // Filled with a pattern that no result has.
  Buffer<float> Out(size_t size, Guard guard = Guard::kBehind) {
    return Buffer<float>(this, std::vector<float>(size, 12345.678f), guard);
  }
  template <class T>
  Buffer<T> OutOf(size_t size) {
    return Buffer<T>(this, std::vector<T>(size, T{77}));
  }
  // As bf16: what operations in that precision are given beside their weights.
  Buffer<uint16_t> InBf16(const Buffer<float>& x) {
    Buffer<uint16_t> rounded = OutOf<uint16_t>(x.size());
    device().RoundToBf16(stream(), static_cast<int64_t>(x.size()), x, rounded);
    return rounded;
  }
  Buffer<char> Scratch(size_t size) { return Buffer<char>(this, std::vector<char>(size, '\x5a')); }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

#define LOCKSTEP_DEVICE_TESTS(suite)                 \
  INSTANTIATE_TEST_SUITE_P(                          \
      , suite, testing::ValuesIn(DeviceFactories()), \
      [](const testing::TestParamInfo<DeviceFactory>& parameter) { return parameter.param.name; })

// ---- data and comparisons.

// Uniform on [low, high), a function of the seed.
std::vector<float> RandomFloats(size_t size, uint32_t seed, float low = -1, float high = 1);
std::vector<double> ToDoubles(const std::vector<float>& values);
// The nearest bf16, ties to even, of finite values.
float RoundedToBf16(float value);
// As the factors of a product in that precision are.
std::vector<float> Rounded(std::vector<float> values, Precision precision);

// |actual - expected| <= tolerance * max(1, |expected|) everywhere.
testing::AssertionResult Near(const std::vector<float>& actual, const std::vector<double>& expected,
                              double tolerance);
// Equal bit by bit.
testing::AssertionResult SameBits(const std::vector<float>& actual,
                                  const std::vector<float>& expected);
// The distance to the nearest float below and above, in units of the last place of a float.
double UlpDistance(float actual, double expected);

// Compares `gradient` with central differences of f at x.
testing::AssertionResult MatchesFiniteDifferences(
    const std::function<double(const std::vector<double>&)>& f, std::vector<double> x,
    const std::vector<float>& gradient, double tolerance = 2e-4);

double Dot(const std::vector<double>& a, const std::vector<float>& b);

// Sizes around those of vectors and blocks.
inline const std::vector<int64_t> kOddSizes = {1, 3, 15, 16, 17, 31, 33, 64, 65, 100};

}  // namespace lockstep::device
