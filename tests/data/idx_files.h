// Makes IDX files, whole or wrong, for tests of their reader. Thread-safe: pure functions.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep::data {

inline std::string IdxHeader(uint32_t magic, const std::vector<uint32_t>& sizes) {
  std::string bytes;
  const auto append = [&](uint32_t word) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<char>(word >> shift));
  };
  append(magic);
  for (const uint32_t size : sizes) append(size);
  return bytes;
}

// Pixel i of the whole file is (i * 7 + 3) % 256.
inline std::string IdxImages(uint32_t samples, uint32_t height, uint32_t width,
                             uint32_t channels = 1) {
  std::string bytes = channels == 1 ? IdxHeader(0x803, {samples, height, width})
                                    : IdxHeader(0x804, {samples, height, width, channels});
  const uint32_t pixels = samples * height * width * channels;
  for (uint32_t i = 0; i < pixels; ++i) bytes.push_back(static_cast<char>(i * 7 + 3));
  return bytes;
}

inline std::string IdxLabels(const std::string& labels) {
  return IdxHeader(0x801, {static_cast<uint32_t>(labels.size())}) + labels;
}

// Label of sample i is i % classes.
inline std::string IdxLabels(uint32_t samples, uint32_t classes) {
  std::string labels;
  for (uint32_t i = 0; i < samples; ++i) labels.push_back(static_cast<char>(i % classes));
  return IdxLabels(labels);
}

inline std::string Gzip(const std::string& content) {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string bytes(deflateBound(&stream, content.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
  stream.avail_in = static_cast<uInt>(content.size());
  stream.next_out = reinterpret_cast<Bytef*>(bytes.data());
  stream.avail_out = static_cast<uInt>(bytes.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  bytes.resize(stream.total_out);
  deflateEnd(&stream);
  return bytes;
}

}  // namespace lockstep::data
