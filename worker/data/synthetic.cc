#include "worker/data/synthetic.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/philox.h"
#include "common/sha256.h"

namespace lockstep::data {
namespace {

constexpr int kPlaceBits = 24;  // 16 MiB

}  // namespace

std::shared_ptr<const Dataset> MakeSynthetic(const SyntheticOptions& options) {
  const char* split = options.split == Split::kTrain ? "train" : "validation";
  const SampleShape& shape = options.shape;
  constexpr int64_t kBlock = sizeof(PhiloxBlock);
  const int64_t blocks = ((int64_t{1} << kPlaceBits) + shape.features() + kBlock - 1) / kBlock;
  auto bytes = std::make_shared<std::vector<uint8_t>>(static_cast<size_t>(blocks * kBlock));
  const PhiloxKey byte_key = MakePhiloxKey(options.seed, "synthetic/bytes");
  for (int64_t block = 0; block < blocks; ++block) {
    const PhiloxBlock random = Philox(byte_key, static_cast<uint64_t>(block), 0);
    std::memcpy(bytes->data() + block * kBlock, random.x, kBlock);
  }

  DatasetParts parts;
  parts.shape = shape;
  parts.classes = options.classes;
  parts.data = std::shared_ptr<const void>(bytes, bytes->data());
  parts.offsets.resize(static_cast<size_t>(options.samples));
  parts.labels.resize(static_cast<size_t>(options.samples));
  const PhiloxKey key = MakePhiloxKey(options.seed, absl::StrCat("synthetic/", split));
  for (size_t i = 0; i < parts.labels.size(); ++i) {
    const PhiloxBlock random = Philox(key, i, 0);
    parts.offsets[i] = random.x[0] >> (32 - kPlaceBits);
    parts.labels[i] =
        static_cast<int32_t>((random.x[1] * static_cast<uint64_t>(options.classes)) >> 32);
  }
  parts.source = absl::StrCat("synthetic ", split, " set");
  parts.digest = Sha256Hex(absl::StrCat("synthetic 1\n", options.seed, " ", split, " ",
                                        options.samples, " ", shape.height, " ", shape.width, " ",
                                        shape.channels, " ", options.classes, "\n"));
  return std::make_shared<const Dataset>(std::move(parts));
}

}  // namespace lockstep::data
