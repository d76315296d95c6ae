// Decompression of xz files in memory, bounded by the caller. Internal to worker/data.
// Not thread-safe: one thread drives one stream.
#pragma once

#include <lzma.h>

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace lockstep::data {

bool IsXz(absl::string_view bytes);

class XzReader {
 public:
  // `compressed` outlives the reader; `name` is the file's, for messages.
  XzReader(absl::string_view compressed, std::string name);
  ~XzReader();
  XzReader(const XzReader&) = delete;
  XzReader& operator=(const XzReader&) = delete;

  // Up to `bytes` bytes; fewer only at the end of the last stream. DataLoss: corrupt, which is also
  // what bytes behind the last stream are, or truncated.
  absl::StatusOr<size_t> Read(void* to, size_t bytes);

 private:
  const std::string name_;
  lzma_stream stream_ = LZMA_STREAM_INIT;
  bool ended_ = false;
  absl::Status status_;  // the first failure; it stays
};

}  // namespace lockstep::data
