#include "worker/data/cifar10.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/data/content_reader.h"

namespace lockstep::data {
namespace {

constexpr SampleShape kShape = {32, 32, 3};
constexpr int64_t kClasses = 10;
constexpr int64_t kPlane = 32 * 32;
constexpr int64_t kRowBytes = 1 + 3 * kPlane;
constexpr int64_t kTrainFiles = 5;

std::vector<std::string> NamesOf(Split split, int64_t file) {
  const std::string stem =
      split == Split::kTrain ? absl::StrCat("data_batch_", file + 1, ".bin") : "test_batch.bin";
  return {stem, stem + ".xz", stem + ".gz"};
}

// The first `rows` rows; where that is all of the file, nothing may follow them.
absl::Status ReadBatch(FileSystem& fs, const std::string& path, int64_t rows, int64_t file_rows,
                       uint8_t* images, int32_t* labels) {
  absl::StatusOr<std::unique_ptr<ContentReader>> reader = ContentReader::Open(fs, path);
  if (!reader.ok()) return reader.status();
  constexpr int64_t kBlock = 64;
  std::vector<uint8_t> block(kBlock * kRowBytes);
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t count = std::min(kBlock, rows - first);
    const absl::StatusOr<size_t> got =
        (*reader)->Read(block.data(), static_cast<size_t>(count * kRowBytes));
    if (!got.ok()) return got.status();
    const int64_t whole = static_cast<int64_t>(*got) / kRowBytes;
    for (int64_t row = first; row < first + whole; ++row) {
      const uint8_t* in = block.data() + (row - first) * kRowBytes;
      if (*in >= kClasses) {
        return absl::DataLossError(absl::StrCat(path, ": row ", row, " has label ", int{*in},
                                                "; accepted: 0 to ", kClasses - 1));
      }
      labels[row] = *in++;
      uint8_t* out = images + row * 3 * kPlane;
      for (int64_t pixel = 0; pixel < kPlane; ++pixel) {
        for (int64_t c = 0; c < 3; ++c) *out++ = in[c * kPlane + pixel];
      }
    }
    if (whole < count) {
      return Damaged(path, absl::StrCat("truncated: it ends in row ", first + whole, " of ",
                                        file_rows, " (", kRowBytes, " bytes each)"));
    }
  }
  if (rows < file_rows) return absl::OkStatus();
  uint8_t extra;
  const absl::StatusOr<size_t> got = (*reader)->Read(&extra, 1);
  if (!got.ok()) return got.status();
  if (*got != 0) {
    return Damaged(path, absl::StrCat("bytes follow row ", file_rows - 1, ", the last of ",
                                      file_rows, " (", kRowBytes, " bytes each)"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Dataset>> LoadCifar10(FileSystem& fs,
                                                           const Cifar10Options& options) {
  absl::Status status = CheckFolder(fs, options.folder, "CIFAR-10's binary batches");
  if (!status.ok()) return status;
  const int64_t file_rows = options.rows_per_file;
  const int64_t files_there = options.split == Split::kTrain ? kTrainFiles : 1;
  const absl::StatusOr<std::string> first = FindFile(fs, options.folder, NamesOf(options.split, 0));
  if (!first.ok()) return first.status();
  status = CheckLimit(options.folder, files_there * file_rows, options.split, options.max_samples);
  if (!status.ok()) return status;

  const int64_t samples = options.max_samples > 0 ? options.max_samples : files_there * file_rows;
  const int64_t files = (samples + file_rows - 1) / file_rows;
  std::vector<uint8_t> images(static_cast<size_t>(samples * kShape.features()));
  std::vector<int32_t> labels(static_cast<size_t>(samples));
  std::vector<absl::Status> statuses(static_cast<size_t>(files));
  const auto read = [&](int64_t file) -> absl::Status {
    const absl::StatusOr<std::string> path =
        FindFile(fs, options.folder, NamesOf(options.split, file));
    if (!path.ok()) return path.status();
    const int64_t begin = file * file_rows;
    return ReadBatch(fs, *path, std::min(file_rows, samples - begin), file_rows,
                     images.data() + begin * kShape.features(), labels.data() + begin);
  };
  std::vector<std::thread> threads;
  for (int64_t file = 0; file < files; ++file) {
    threads.emplace_back([&, file] { statuses[static_cast<size_t>(file)] = read(file); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& of_file : statuses) {
    if (!of_file.ok()) return of_file;
  }
  return std::make_shared<const Dataset>(kShape, kClasses, std::move(images), std::move(labels),
                                         *first);
}

}  // namespace lockstep::data
