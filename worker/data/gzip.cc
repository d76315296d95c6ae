#include "worker/data/gzip.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep::data {
namespace {
constexpr int kGzipOnly = 16 + MAX_WBITS;  // zlib's way to ask for the gzip format
}  // namespace

bool IsGzip(absl::string_view bytes) {
  return bytes.size() >= 2 && bytes[0] == '\x1f' && bytes[1] == '\x8b';
}

GzipReader::GzipReader(absl::string_view compressed, std::string name)
    : name_(std::move(name)), remaining_(compressed.size()) {
  stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(compressed.data()));
  if (inflateInit2(&stream_, kGzipOnly) != Z_OK) {
    status_ = absl::ResourceExhaustedError(absl::StrCat("no memory to decompress ", name_));
  }
}

GzipReader::~GzipReader() { inflateEnd(&stream_); }

absl::Status GzipReader::Corrupt(const std::string& what) const {
  return absl::DataLossError(absl::StrCat(name_, ": ", what, "; fetch the file again"));
}

absl::StatusOr<size_t> GzipReader::Read(void* to, size_t bytes) {
  constexpr size_t kMost = std::numeric_limits<uInt>::max();
  Bytef* next = static_cast<Bytef*>(to);
  size_t produced = 0;
  while (status_.ok() && produced < bytes) {
    const size_t input = std::min(remaining_, kMost), output = std::min(bytes - produced, kMost);
    if (!in_member_) {
      if (remaining_ == 0) return produced;
      if (!IsGzip({reinterpret_cast<const char*>(stream_.next_in), remaining_})) {
        status_ = Corrupt("bytes follow the end of the gzip data");
        break;
      }
      inflateReset2(&stream_, kGzipOnly);
      in_member_ = true;
    }
    stream_.avail_in = static_cast<uInt>(input);
    stream_.next_out = next + produced;
    stream_.avail_out = static_cast<uInt>(output);
    const int result = inflate(&stream_, Z_NO_FLUSH);
    remaining_ -= input - stream_.avail_in;
    produced += output - stream_.avail_out;
    if (result == Z_STREAM_END) {
      in_member_ = false;
    } else if (result == Z_BUF_ERROR || (result == Z_OK && remaining_ == 0 && produced < bytes)) {
      status_ = Corrupt("the gzip data is truncated");
    } else if (result == Z_MEM_ERROR) {
      status_ = absl::ResourceExhaustedError(absl::StrCat("no memory to decompress ", name_));
    } else if (result != Z_OK) {
      status_ = Corrupt(absl::StrCat("the gzip data is corrupt (",
                                     stream_.msg == nullptr ? "zlib error" : stream_.msg, ")"));
    }
  }
  if (!status_.ok()) return status_;
  return produced;
}

int64_t GzipReader::LargestContent(int64_t compressed_bytes) {
  constexpr int64_t kBytesPerByte = 258 * 4;
  return compressed_bytes > std::numeric_limits<int64_t>::max() / kBytesPerByte
             ? std::numeric_limits<int64_t>::max()
             : compressed_bytes * kBytesPerByte;
}

}  // namespace lockstep::data
