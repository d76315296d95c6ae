#include "worker/data/idx.h"

#include <algorithm>
#include <array>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "worker/data/content_reader.h"

namespace lockstep::data {
namespace {

constexpr int64_t kLargestContent = int64_t{64} << 30;
constexpr size_t kReadBlock = size_t{16} << 20;

// "images" or "labels" of a split: every name under which people keep the file.
absl::StatusOr<std::string> FindIdx(FileSystem& fs, const IdxOptions& options, const char* what,
                                    int dimensions) {
  const char* split = options.split == Split::kTrain ? "train" : "t10k";
  std::vector<std::string> names;
  for (const char* separator : {"-", "."}) {
    for (const char* suffix : {"", ".gz"}) {
      names.push_back(
          absl::StrCat(split, "-", what, separator, "idx", dimensions, "-ubyte", suffix));
    }
  }
  return FindFile(fs, options.folder, names);
}

// Reads magic number and sizes; the first size is the number of samples.
absl::StatusOr<std::vector<int64_t>> ReadHeader(ContentReader& source, int dimensions) {
  std::array<uint8_t, 4 * 5> bytes;
  const auto word = [&](int i) {
    return static_cast<uint32_t>(bytes[4 * i]) << 24 |
           static_cast<uint32_t>(bytes[4 * i + 1]) << 16 |
           static_cast<uint32_t>(bytes[4 * i + 2]) << 8 | static_cast<uint32_t>(bytes[4 * i + 3]);
  };
  const size_t size = 4 * static_cast<size_t>(dimensions + 1);
  const absl::StatusOr<size_t> got = source.Read(bytes.data(), size);
  if (!got.ok()) return got.status();
  const uint32_t expected = 0x0800u + static_cast<uint32_t>(dimensions);  // 08: unsigned bytes
  if (*got >= 4 && word(0) != expected) {
    return Damaged(source.path(),
                   absl::StrFormat("magic number 0x%08x; accepted: 0x%08x", word(0), expected));
  }
  if (*got < size) {
    return Damaged(source.path(),
                   absl::StrCat("truncated: ", *got, " bytes, its header has ", size));
  }
  std::vector<int64_t> sizes;
  absl::int128 total = 1;
  for (int i = 1; i <= dimensions; ++i) {
    sizes.push_back(word(i));
    if (sizes.back() == 0) {
      return Damaged(source.path(), i == 1 ? std::string("no samples")
                                           : absl::StrCat("size ", i, " of its header is 0"));
    }
    total *= word(i);
    if (total > kLargestContent) {
      return absl::ResourceExhaustedError(absl::StrCat(source.path(), ": its header says ",
                                                       absl::StrJoin(sizes, " x "),
                                                       " or more bytes; accepted: up to 64 GiB"));
    }
  }
  if (!source.CanHold(static_cast<int64_t>(total) + static_cast<int64_t>(size))) {
    return Damaged(source.path(),
                   absl::StrCat("truncated: its header says ", absl::StrJoin(sizes, " x "),
                                " bytes, more than the file can hold"));
  }
  return sizes;
}

// The `size` bytes after the header, which must be all there are.
absl::StatusOr<std::vector<uint8_t>> ReadContent(ContentReader& source, int64_t size) {
  std::vector<uint8_t> content;
  try {
    content.reserve(static_cast<size_t>(size));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(
        absl::StrCat(source.path(), ": no memory for its ", size, " bytes"));
  }
  // Grown as bytes arrive, so that a header that lies touches no memory.
  while (static_cast<int64_t>(content.size()) < size) {
    const size_t begin = content.size();
    const size_t block = std::min(kReadBlock, static_cast<size_t>(size) - begin);
    content.resize(begin + block);
    const absl::StatusOr<size_t> got = source.Read(content.data() + begin, block);
    if (!got.ok()) return got.status();
    if (*got < block) {
      return Damaged(source.path(), absl::StrCat("truncated: ", begin + *got,
                                                 " bytes after the header, which says ", size));
    }
  }
  uint8_t extra;
  const absl::StatusOr<size_t> got = source.Read(&extra, 1);
  if (!got.ok()) return got.status();
  if (*got != 0) {
    return Damaged(source.path(), absl::StrCat("bytes follow the ", size, " that its header says"));
  }
  return content;
}

absl::StatusOr<std::vector<uint8_t>> ReadImages(ContentReader& source, const IdxOptions& options,
                                                int dimensions, int64_t* samples) {
  absl::StatusOr<std::vector<int64_t>> sizes = ReadHeader(source, dimensions);
  if (!sizes.ok()) return sizes.status();
  const SampleShape found = {(*sizes)[1], (*sizes)[2], dimensions == 4 ? (*sizes)[3] : 1};
  if (found != options.shape) {
    return absl::InvalidArgumentError(absl::StrCat(source.path(), ": its images are ",
                                                   ShapeText(found), ", but data.shape is ",
                                                   ShapeText(options.shape)));
  }
  *samples = (*sizes)[0];
  return ReadContent(source, *samples * found.features());
}

absl::StatusOr<std::vector<int32_t>> ReadLabels(ContentReader& source, const IdxOptions& options) {
  absl::StatusOr<std::vector<int64_t>> sizes = ReadHeader(source, 1);
  if (!sizes.ok()) return sizes.status();
  absl::StatusOr<std::vector<uint8_t>> bytes = ReadContent(source, (*sizes)[0]);
  if (!bytes.ok()) return bytes.status();
  for (size_t row = 0; row < bytes->size(); ++row) {
    if ((*bytes)[row] >= options.classes) {
      return absl::DataLossError(absl::StrCat(source.path(), ": row ", row, " has label ",
                                              int{(*bytes)[row]}, "; accepted: 0 to ",
                                              options.classes - 1, " (data.classes)"));
    }
  }
  return std::vector<int32_t>(bytes->begin(), bytes->end());
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Dataset>> LoadIdx(FileSystem& fs, const IdxOptions& options) {
  const SampleShape& shape = options.shape;
  if (shape.height < 1 || shape.width < 1 || shape.channels < 1 || options.classes < 1 ||
      options.max_samples < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("data.shape ", ShapeText(shape), ", data.classes ", options.classes,
                     " and a sample limit of ", options.max_samples, " make no data set"));
  }
  absl::Status status = CheckFolder(fs, options.folder, "the IDX files");
  if (!status.ok()) return status;
  const int dimensions = shape.channels == 1 ? 3 : 4;
  const absl::StatusOr<std::string> image_path = FindIdx(fs, options, "images", dimensions);
  if (!image_path.ok()) return image_path.status();
  const absl::StatusOr<std::string> label_path = FindIdx(fs, options, "labels", 1);
  if (!label_path.ok()) return label_path.status();

  absl::StatusOr<std::unique_ptr<ContentReader>> image_source =
      ContentReader::Open(fs, *image_path);
  if (!image_source.ok()) return image_source.status();
  int64_t samples = 0;
  absl::StatusOr<std::vector<uint8_t>> images =
      ReadImages(**image_source, options, dimensions, &samples);
  if (!images.ok()) return images.status();
  absl::StatusOr<std::unique_ptr<ContentReader>> label_source =
      ContentReader::Open(fs, *label_path);
  if (!label_source.ok()) return label_source.status();
  absl::StatusOr<std::vector<int32_t>> labels = ReadLabels(**label_source, options);
  if (!labels.ok()) return labels.status();
  if (static_cast<int64_t>(labels->size()) != samples) {
    return absl::DataLossError(absl::StrCat(*image_path, " has ", samples, " images, but ",
                                            *label_path, " has ", labels->size(), " labels"));
  }
  status = CheckLimit(*image_path, samples, options.split, options.max_samples);
  if (!status.ok()) return status;
  if (options.max_samples > 0) {
    images->resize(static_cast<size_t>(options.max_samples * shape.features()));
    images->shrink_to_fit();
    labels->resize(static_cast<size_t>(options.max_samples));
  }
  return std::make_shared<const Dataset>(shape, options.classes, *std::move(images),
                                         *std::move(labels), *image_path);
}

}  // namespace lockstep::data
