// Decompression of gzip (RFC 1952) files in memory, bounded by the caller. Internal to worker/data.
// Not thread-safe: one thread drives one stream.
#pragma once

#include <zlib.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace lockstep::data {

bool IsGzip(absl::string_view bytes);

class GzipReader {
 public:
  // `compressed` outlives the reader; `name` is the file's, for messages.
  GzipReader(absl::string_view compressed, std::string name);
  ~GzipReader();
  GzipReader(const GzipReader&) = delete;
  GzipReader& operator=(const GzipReader&) = delete;

  // Up to `bytes` bytes; fewer only at the end of the last member. DataLoss: corrupt, truncated, or
  // followed by something that is no gzip member.
  absl::StatusOr<size_t> Read(void* to, size_t bytes);

  // The most that deflate can make of the compressed bytes (each of its symbols yields at most 258
  // bytes and takes at least 2 bits).
  static int64_t LargestContent(int64_t compressed_bytes);

 private:
  absl::Status Corrupt(const std::string& what) const;

  const std::string name_;
  z_stream stream_ = {};
  size_t remaining_;  // of the input, not yet given to zlib
  bool in_member_ = true;
  absl::Status status_;  // the first failure; it stays
};

}  // namespace lockstep::data
