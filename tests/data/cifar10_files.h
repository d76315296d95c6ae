// Makes CIFAR-10 batches, whole or wrong, for tests; finds the official ones. Thread-safe.
#pragma once

#include <lzma.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "gtest/gtest.h"

namespace lockstep::data {

constexpr int64_t kCifarRow = 3073;

// The byte of sample i (over all files of a split) in plane c at a pixel, 0..1023.
inline uint8_t CifarPixel(int64_t sample, int64_t c, int64_t pixel) {
  return static_cast<uint8_t>(sample * 5 + c * 83 + pixel * 7 + pixel / 32);
}

// Rows of the samples [first, first + rows); the label of sample i is i * 3 % 10.
inline std::string CifarBatch(int64_t first, int64_t rows) {
  std::string bytes;
  bytes.reserve(static_cast<size_t>(rows * kCifarRow));
  for (int64_t i = first; i < first + rows; ++i) {
    bytes.push_back(static_cast<char>(i * 3 % 10));
    for (int64_t c = 0; c < 3; ++c) {
      for (int64_t p = 0; p < 1024; ++p) bytes.push_back(static_cast<char>(CifarPixel(i, c, p)));
    }
  }
  return bytes;
}

inline std::string Xz(const std::string& content) {
  std::string bytes(lzma_stream_buffer_bound(content.size()), '\0');
  size_t size = 0;
  EXPECT_EQ(lzma_easy_buffer_encode(
                0, LZMA_CHECK_CRC64, nullptr, reinterpret_cast<const uint8_t*>(content.data()),
                content.size(), reinterpret_cast<uint8_t*>(bytes.data()), &size, bytes.size()),
            LZMA_OK);
  bytes.resize(size);
  return bytes;
}

// Whether LOCKSTEP_DATA holds cifar10/, plain or compressed.
inline bool HasOfficialCifar10() {
  const char* root = std::getenv("LOCKSTEP_DATA");
  if (root == nullptr) return false;
  const std::string batch = std::string(root) + "/cifar10/test_batch.bin";
  const auto exists = [&](const char* suffix) { return std::filesystem::exists(batch + suffix); };
  return exists("") || exists(".xz") || exists(".gz");
}

}  // namespace lockstep::data
