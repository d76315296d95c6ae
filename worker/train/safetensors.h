// Files of named fp32 tensors in the safetensors format
// (https://github.com/huggingface/safetensors): 8 bytes of little-endian header length, a JSON
// header padded with spaces to a multiple of 8, then the tensors' bytes, row-major and
// little-endian, without holes.
//
// The reader believes nothing: a file that any of the format's rules refuses is refused, with one
// line that names the file and the tensor. Thread-safe: functions, and an immutable open file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/fs.h"
#include "common/sha256.h"

namespace lockstep::train {

struct TensorToWrite {
  std::string name;
  std::vector<int64_t> shape;
  const float* data = nullptr;
};

// Writes and syncs the file; tensors lie in the order given. Returns its size and SHA-256.
// InvalidArgument: a name twice, empty, reserved or no UTF-8; else what the file system reports.
absl::StatusOr<FileHash> WriteSafetensors(FileSystem& fs, const std::string& path,
                                          absl::Span<const TensorToWrite> tensors,
                                          const std::map<std::string, std::string>& metadata);

class SafetensorsFile {
 public:
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    int64_t elements = 0;
    int64_t offset = 0;  // of its first byte in the file
  };

  // DataLoss: not the format, or damaged. Unimplemented: holds a tensor that is not F32.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(FileSystem& fs,
                                                               const std::string& path);

  const std::vector<Tensor>& tensors() const { return tensors_; }  // by offset
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Null where there is none of the name.
  const Tensor* Find(const std::string& name) const;
  // `to` takes tensor.elements floats.
  absl::Status Read(const Tensor& tensor, float* to) const;

 private:
  explicit SafetensorsFile(std::string path) : path_(std::move(path)) {}
  absl::Status Damaged(const std::string& what) const;
  absl::Status ParseHeader(const std::string& header, int64_t data_bytes);

  const std::string path_;
  std::unique_ptr<ReadableFile> file_;
  std::vector<Tensor> tensors_;
  std::map<std::string, size_t> by_name_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace lockstep::train
