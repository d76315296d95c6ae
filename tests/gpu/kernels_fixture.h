// What tests of the kernels of worker/device/cuda/kernels.h share.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {

inline std::vector<float> RandomFloats(int64_t size, uint32_t seed, float low = -1,
                                       float high = 1) {
  std::mt19937 generator(seed);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) {
    value = low + (high - low) * static_cast<float>(generator() >> 8) * 0x1p-24f;
  }
  return values;
}

inline Leaves LeavesOf(const std::vector<int64_t>& rows) {
  Leaves leaves;
  leaves.count = static_cast<int>(rows.size());
  for (size_t l = 0; l < rows.size(); ++l) leaves.begin[l + 1] = leaves.begin[l] + rows[l];
  return leaves;
}

// Device memory whose elements begin `lead` behind an aligned address.
template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values, int lead = 0) : size_(values.size()), lead_(lead) {
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data_), (size_ + lead_ + 1) * sizeof(T)),
              cudaSuccess);
    Write(values);
  }
  Buffer(size_t size, T value, int lead = 0) : Buffer(std::vector<T>(size, value), lead) {}
  ~Buffer() { EXPECT_EQ(cudaFree(data_), cudaSuccess); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  operator T*() const { return data_ + lead_; }
  void Write(const std::vector<T>& values) {
    EXPECT_EQ(cudaMemcpy(*this, values.data(), size_ * sizeof(T), cudaMemcpyDefault), cudaSuccess);
    // From pageable memory the call need not wait for the copy, and other streams do not.
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(values.data(), *this, size_ * sizeof(T), cudaMemcpyDefault), cudaSuccess);
    return values;
  }

 private:
  const size_t size_;
  const int lead_;
  T* data_ = nullptr;
};

template <class T>
testing::AssertionResult SameBytes(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
      return testing::AssertionFailure() << "element " << i << " of " << a.size() << " differs";
    }
  }
  return testing::AssertionSuccess();
}

// Kernels by themselves, on one stream.
class KernelsTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaMalloc(&queue_.workspace, kWorkspaceBytes), cudaSuccess);
    ASSERT_EQ(cudaStreamCreateWithFlags(&queue_.stream, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    EXPECT_EQ(cudaStreamSynchronize(queue_.stream), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(queue_.stream), cudaSuccess);
    EXPECT_EQ(cudaFree(queue_.workspace), cudaSuccess);
  }
  const Queue& q() const { return queue_; }

 private:
  Queue queue_;
};

}  // namespace lockstep::device::cuda
