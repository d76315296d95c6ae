#include "common/digest.h"

#include "absl/strings/str_format.h"
#include "common/stable_hash.h"

namespace lockstep {

std::string ToHex(const Digest& digest) {
  return absl::StrFormat("%016x%016x", digest.hi, digest.lo);
}

bool FromHex(const std::string& hex, Digest* digest) {
  if (hex.size() != 32) return false;
  uint64_t halves[2] = {0, 0};
  for (size_t i = 0; i < 32; ++i) {
    const char c = hex[i];
    int value;
    if (c >= '0' && c <= '9') {
      value = c - '0';
    } else if (c >= 'a' && c <= 'f') {
      value = c - 'a' + 10;
    } else {
      return false;
    }
    halves[i / 16] = halves[i / 16] << 4 | static_cast<uint64_t>(value);
  }
  digest->hi = halves[0];
  digest->lo = halves[1];
  return true;
}

uint64_t TensorKey(const std::string& tensor_name) { return StableHash(tensor_name); }

}  // namespace lockstep
