#include "common/sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"

namespace lockstep {

struct Sha256::State {
  EVP_MD_CTX* context;
};

// OpenSSL's own SHA-256 fails only when memory is exhausted, where operator new would already
// throw.
Sha256::Sha256() : state_(std::make_unique<State>(State{EVP_MD_CTX_new()})) {
  EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr);
}

Sha256::~Sha256() { EVP_MD_CTX_free(state_->context); }

void Sha256::Update(const void* data, size_t bytes) {
  EVP_DigestUpdate(state_->context, data, bytes);
}

std::string Sha256::FinishHex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_DigestFinal_ex(state_->context, digest, &size);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest), static_cast<size_t>(size)));
}

std::string Sha256Hex(absl::string_view text) {
  Sha256 hash;
  hash.Update(text);
  return hash.FinishHex();
}

absl::StatusOr<FileHash> HashFile(FileSystem& fs, const std::string& path) {
  absl::StatusOr<std::unique_ptr<ReadableFile>> file = fs.Open(path);
  if (!file.ok()) return file.status();
  Sha256 hash;
  std::vector<char> block(1 << 20);
  const int64_t size = (*file)->size();
  for (int64_t offset = 0; offset < size;) {
    const int64_t bytes = std::min<int64_t>(static_cast<int64_t>(block.size()), size - offset);
    const absl::Status status = (*file)->ReadAt(offset, block.data(), static_cast<size_t>(bytes));
    if (!status.ok()) return status;
    hash.Update(block.data(), static_cast<size_t>(bytes));
    offset += bytes;
  }
  return FileHash{size, hash.FinishHex()};
}

}  // namespace lockstep
