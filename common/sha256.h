// SHA-256 (FIPS 180-4) of memory and files, as 64 lower-case hex digits. A Sha256 is used by one
// thread; the functions are thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/fs.h"

namespace lockstep {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(const void* data, size_t bytes);
  void Update(absl::string_view text) { Update(text.data(), text.size()); }
  // The digest of everything so far. Call once; nothing may follow.
  std::string FinishHex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string Sha256Hex(absl::string_view text);

struct FileHash {
  int64_t bytes = 0;
  std::string sha256;
};
// Reads the file in blocks. Errors as FileSystem::Open and ReadAt.
absl::StatusOr<FileHash> HashFile(FileSystem& fs, const std::string& path);

}  // namespace lockstep
