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
#include "worker/data/gzip.h"

namespace lockstep::data {
namespace {

constexpr int64_t kLargestContent = int64_t{64} << 30;
constexpr size_t kReadBlock = size_t{16} << 20;

absl::Status Damaged(const std::string& path, const std::string& what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, "; fetch the file again"));
}

// The content of a file, decompressed where it is gzip, from front to back.
class ByteSource {
 public:
  static absl::StatusOr<std::unique_ptr<ByteSource>> Open(FileSystem& fs, const std::string& path) {
    auto source = std::unique_ptr<ByteSource>(new ByteSource(path));
    absl::StatusOr<std::unique_ptr<ReadableFile>> file = fs.Open(path);
    if (!file.ok()) return file.status();
    source->file_ = *std::move(file);
    char magic[2];
    if (source->file_->size() < 2 || !source->file_->ReadAt(0, magic, 2).ok() ||
        !IsGzip({magic, 2})) {
      return source;
    }
    absl::StatusOr<std::string> compressed = ReadFile(fs, path, kLargestContent);
    if (!compressed.ok()) return compressed.status();
    source->compressed_ = *std::move(compressed);
    source->gzip_ = std::make_unique<GzipReader>(source->compressed_, path);
    return source;
  }

  const std::string& path() const { return path_; }

  // Fewer than `bytes` only at the end.
  absl::StatusOr<size_t> Read(void* to, size_t bytes) {
    if (gzip_ != nullptr) return gzip_->Read(to, bytes);
    const auto left = static_cast<size_t>(file_->size() - offset_);
    const size_t count = std::min(bytes, left);
    const absl::Status status = file_->ReadAt(offset_, to, count);
    if (!status.ok()) return status;
    offset_ += static_cast<int64_t>(count);
    return count;
  }

  // Whether that much content can be there, without reading it.
  bool CanHold(int64_t bytes) const {
    return bytes <= (gzip_ == nullptr
                         ? file_->size()
                         : GzipReader::LargestContent(static_cast<int64_t>(compressed_.size())));
  }

 private:
  explicit ByteSource(std::string path) : path_(std::move(path)) {}

  const std::string path_;
  std::unique_ptr<ReadableFile> file_;
  int64_t offset_ = 0;
  std::string compressed_;
  std::unique_ptr<GzipReader> gzip_;
};

// "images" or "labels" of a split: every name under which people keep the file.
absl::StatusOr<std::string> FindFile(FileSystem& fs, const IdxOptions& options, const char* what,
                                     int dimensions) {
  const char* split = options.split == Split::kTrain ? "train" : "t10k";
  std::vector<std::string> names;
  for (const char* separator : {"-", "."}) {
    for (const char* suffix : {"", ".gz"}) {
      names.push_back(
          absl::StrCat(split, "-", what, separator, "idx", dimensions, "-ubyte", suffix));
    }
  }
  for (const std::string& name : names) {
    const std::string path = JoinPath(options.folder, name);
    const absl::Status opened = fs.Open(path).status();
    if (!absl::IsNotFound(opened))
      return path;  // one that cannot be read is reported by its reader
  }
  return absl::NotFoundError(
      absl::StrCat(options.folder, ": no ", names[0],
                   " in this folder; accepted: ", absl::StrJoin(names, ", ")));
}

// Reads magic number and sizes; the first size is the number of samples.
absl::StatusOr<std::vector<int64_t>> ReadHeader(ByteSource& source, int dimensions) {
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
absl::StatusOr<std::vector<uint8_t>> ReadContent(ByteSource& source, int64_t size) {
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

std::string ShapeText(const SampleShape& shape) {
  return absl::StrFormat("%d x %d x %d", shape.height, shape.width, shape.channels);
}

absl::StatusOr<std::vector<uint8_t>> ReadImages(ByteSource& source, const IdxOptions& options,
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

absl::StatusOr<std::vector<int32_t>> ReadLabels(ByteSource& source, const IdxOptions& options) {
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
  if (!fs.IsDirectory(options.folder)) {
    return absl::NotFoundError(
        absl::StrCat(options.folder,
                     ": no such folder; data.path names the folder of the IDX files, "
                     "relative paths start at LOCKSTEP_DATA"));
  }
  const int dimensions = shape.channels == 1 ? 3 : 4;
  const absl::StatusOr<std::string> image_path = FindFile(fs, options, "images", dimensions);
  if (!image_path.ok()) return image_path.status();
  const absl::StatusOr<std::string> label_path = FindFile(fs, options, "labels", 1);
  if (!label_path.ok()) return label_path.status();

  absl::StatusOr<std::unique_ptr<ByteSource>> image_source = ByteSource::Open(fs, *image_path);
  if (!image_source.ok()) return image_source.status();
  int64_t samples = 0;
  absl::StatusOr<std::vector<uint8_t>> images =
      ReadImages(**image_source, options, dimensions, &samples);
  if (!images.ok()) return images.status();
  absl::StatusOr<std::unique_ptr<ByteSource>> label_source = ByteSource::Open(fs, *label_path);
  if (!label_source.ok()) return label_source.status();
  absl::StatusOr<std::vector<int32_t>> labels = ReadLabels(**label_source, options);
  if (!labels.ok()) return labels.status();
  if (static_cast<int64_t>(labels->size()) != samples) {
    return absl::DataLossError(absl::StrCat(*image_path, " has ", samples, " images, but ",
                                            *label_path, " has ", labels->size(), " labels"));
  }
  if (options.max_samples > samples) {
    return absl::InvalidArgumentError(absl::StrCat(
        *image_path, " has ", samples, " samples, but ",
        options.split == Split::kTrain ? "data.train_samples" : "data.validation_samples",
        " asks for ", options.max_samples));
  }
  if (options.max_samples > 0) {
    images->resize(static_cast<size_t>(options.max_samples * shape.features()));
    images->shrink_to_fit();
    labels->resize(static_cast<size_t>(options.max_samples));
  }
  return std::make_shared<const Dataset>(shape, options.classes, *std::move(images),
                                         *std::move(labels));
}

}  // namespace lockstep::data
