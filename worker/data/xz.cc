#include "worker/data/xz.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep::data {
namespace {

constexpr uint64_t kMostMemory = uint64_t{256} << 20;  // xz -9 needs 65 MiB

}  // namespace

bool IsXz(absl::string_view bytes) {
  constexpr absl::string_view kMagic(
      "\xfd"
      "7zXZ\0",
      6);
  return bytes.substr(0, kMagic.size()) == kMagic;
}

XzReader::XzReader(absl::string_view compressed, std::string name) : name_(std::move(name)) {
  stream_.next_in = reinterpret_cast<const uint8_t*>(compressed.data());
  stream_.avail_in = compressed.size();
  if (lzma_stream_decoder(&stream_, kMostMemory, LZMA_CONCATENATED) != LZMA_OK) {
    status_ = absl::ResourceExhaustedError(absl::StrCat("no memory to decompress ", name_));
  }
}

XzReader::~XzReader() { lzma_end(&stream_); }

absl::StatusOr<size_t> XzReader::Read(void* to, size_t bytes) {
  stream_.next_out = static_cast<uint8_t*>(to);
  stream_.avail_out = bytes;
  const auto corrupt = [&](const char* what) {
    return absl::DataLossError(absl::StrCat(name_, ": ", what, "; fetch the file again"));
  };
  while (status_.ok() && !ended_ && stream_.avail_out > 0) {
    switch (lzma_code(&stream_, LZMA_FINISH)) {
      case LZMA_OK:
        break;
      case LZMA_STREAM_END:
        ended_ = true;
        break;
      case LZMA_BUF_ERROR:
        status_ = corrupt("the xz data is truncated");
        break;
      case LZMA_MEM_ERROR:
      case LZMA_MEMLIMIT_ERROR:
        status_ = absl::ResourceExhaustedError(
            absl::StrCat("decompressing ", name_, " needs more memory than there is or than ",
                         kMostMemory >> 20, " MiB"));
        break;
      default:
        status_ = corrupt("the xz data is corrupt");
    }
  }
  if (!status_.ok()) return status_;
  return bytes - stream_.avail_out;
}

}  // namespace lockstep::data
