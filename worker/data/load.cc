#include "worker/data/load.h"

#include <new>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/data/cifar10.h"
#include "worker/data/content_reader.h"
#include "worker/data/idx.h"
#include "worker/data/npy.h"
#include "worker/data/synthetic.h"

namespace lockstep::data {
namespace {

absl::StatusOr<std::shared_ptr<const Dataset>> Load(FileSystem& fs, const DataOptions& options,
                                                    Split split) {
  const int64_t limit = split == Split::kTrain ? options.train_samples : options.validation_samples;
  switch (options.format) {
    case Format::kIdx:
      return LoadIdx(fs, {.folder = options.folder,
                          .shape = options.shape,
                          .classes = options.classes,
                          .split = split,
                          .max_samples = limit});
    case Format::kCifar10:
      return LoadCifar10(fs, {.folder = options.folder, .split = split, .max_samples = limit});
    case Format::kNpy: {
      const bool train = split == Split::kTrain;
      const auto path = [&](const std::string& name) {
        return name[0] == '/' ? name : JoinPath(options.folder, name);
      };
      const absl::Status status = CheckFolder(fs, options.folder, "the NPY files");
      if (!status.ok()) return status;
      return LoadNpy(
          fs, {.features = path(train ? options.train_features : options.validation_features),
               .labels = path(train ? options.train_labels : options.validation_labels),
               .shape = options.shape,
               .classes = options.classes,
               .split = split,
               .max_samples = limit});
    }
    case Format::kSynthetic:
      return MakeSynthetic({.shape = options.shape,
                            .classes = options.classes,
                            .split = split,
                            .samples = limit,
                            .seed = options.seed});
  }
  return absl::InternalError("a data set of an unknown format was asked for");
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Dataset>> LoadDataset(FileSystem& fs,
                                                           const DataOptions& options,
                                                           Split split) {
  absl::StatusOr<std::shared_ptr<const Dataset>> set;
  try {
    set = Load(fs, options, split);
  } catch (const std::bad_alloc&) {  // of as many samples as the spec asks for
    return absl::ResourceExhaustedError(absl::StrCat(
        "no memory on this host for the ", split == Split::kTrain ? "training" : "validation",
        " set", options.folder.empty() ? "" : absl::StrCat(" of ", options.folder)));
  }
  if (!set.ok() || split != Split::kTrain || (*set)->samples() >= options.batch) return set;
  return absl::InvalidArgumentError(
      absl::StrCat((*set)->source(), ": the training set ends after row ", (*set)->samples() - 1,
                   ", smaller than one batch of ", options.batch, "; accepted: train.batch up to ",
                   (*set)->samples()));
}

}  // namespace lockstep::data
