#include "worker/train/checkpoint.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "google/protobuf/util/json_util.h"
#include "worker/train/safetensors.h"

namespace lockstep::train {
namespace {

constexpr char kModelFile[] = "model.safetensors";
constexpr char kManifestFile[] = "manifest.json";
constexpr char kFinished[] = "step-";
constexpr char kWriting[] = ".writing-step-";    // being written
constexpr char kReplaced[] = ".replaced-step-";  // complete; another of its step takes its place
constexpr char kRemoving[] = ".removing-step-";  // being removed
constexpr int kFormatVersion = 1;
constexpr int64_t kLargestManifest = 64 << 20;

// ---- the manifest's own checksum: of its text, with zeros in the checksum's place.

constexpr char kChecksumKey[] = "\"manifest_sha256\": \"";
constexpr size_t kChecksumDigits = 64;

// Where the checksum's digits begin, or npos.
size_t FindChecksum(const std::string& text) {
  const size_t key = text.rfind(kChecksumKey);
  if (key == std::string::npos) return key;
  const size_t digits = key + sizeof(kChecksumKey) - 1;
  return digits + kChecksumDigits <= text.size() ? digits : std::string::npos;
}

absl::StatusOr<std::string> ManifestText(v1::CheckpointManifest manifest) {
  manifest.set_manifest_sha256(std::string(kChecksumDigits, '0'));
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(manifest, &text, options);
  const size_t digits = status.ok() ? FindChecksum(text) : std::string::npos;
  if (digits == std::string::npos) {
    return absl::InternalError("the checkpoint's manifest cannot be written as JSON");
  }
  return text.replace(digits, kChecksumDigits, Sha256Hex(text));
}

absl::StatusOr<v1::CheckpointManifest> ReadManifest(FileSystem& fs, const std::string& path) {
  ASSIGN_OR_RETURN(std::string text, ReadFile(fs, path, kLargestManifest));
  const size_t digits = FindChecksum(text);
  if (digits == std::string::npos) {
    return absl::DataLossError(
        absl::StrCat(path, ": truncated or no manifest: no manifest_sha256"));
  }
  const std::string checksum = text.substr(digits, kChecksumDigits);
  text.replace(digits, kChecksumDigits, std::string(kChecksumDigits, '0'));
  if (Sha256Hex(text) != checksum) {
    return absl::DataLossError(
        absl::StrCat(path, ": damaged: its SHA-256 is not the one it names"));
  }
  v1::CheckpointManifest manifest;
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;  // a later format is refused by its number
  const auto parsed = google::protobuf::util::JsonStringToMessage(text, &manifest, options);
  if (!parsed.ok()) return absl::DataLossError(absl::StrCat(path, ": is no manifest"));
  if (manifest.format_version() != kFormatVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": format_version ", manifest.format_version(),
                     "; accepted: ", kFormatVersion, " (use a newer Lockstep)"));
  }
  return manifest;
}

// The manifest of a checkpoint of which every byte is as it was written.
absl::StatusOr<v1::CheckpointManifest> Verify(FileSystem& fs, const std::string& path) {
  ASSIGN_OR_RETURN(v1::CheckpointManifest manifest,
                   ReadManifest(fs, JoinPath(path, kManifestFile)));
  bool has_model = false;
  for (const v1::FileDigest& file : manifest.files()) {
    const std::string file_path = JoinPath(path, file.name());
    if (file.name().empty() || absl::StrContains(file.name(), "/") || file.name() == "..") {
      return absl::DataLossError(absl::StrCat(path, ": its manifest names a file outside of it"));
    }
    ASSIGN_OR_RETURN(const FileHash found, HashFile(fs, file_path));
    if (found.bytes != file.bytes()) {
      return absl::DataLossError(
          absl::StrCat(file_path, ": ", found.bytes, " bytes, its manifest says ", file.bytes()));
    }
    if (found.sha256 != file.sha256()) {
      return absl::DataLossError(
          absl::StrCat(file_path, ": damaged: its SHA-256 is not the manifest's"));
    }
    has_model |= file.name() == kModelFile;
  }
  if (!has_model) {
    return absl::DataLossError(absl::StrCat(path, ": its manifest does not list ", kModelFile));
  }
  return manifest;
}

struct Candidate {
  int64_t step = 0;
  bool replaced = false;
  std::string name;
};

// The step of a name "<prefix>00000123", or -1.
int64_t StepOf(absl::string_view name, absl::string_view prefix) {
  int64_t step = 0;
  if (!absl::ConsumePrefix(&name, prefix) || name.empty() ||
      name.find_first_not_of("0123456789") != absl::string_view::npos ||
      !absl::SimpleAtoi(name, &step)) {
    return -1;
  }
  return step;
}

// Newest first; of one step, the one in its place first.
absl::StatusOr<std::vector<Candidate>> ListCandidates(FileSystem& fs, const std::string& folder) {
  ASSIGN_OR_RETURN(const std::vector<DirectoryEntry> entries, fs.List(folder));
  std::vector<Candidate> candidates;
  for (const DirectoryEntry& entry : entries) {
    for (const bool replaced : {false, true}) {
      const int64_t step = StepOf(entry.name, replaced ? kReplaced : kFinished);
      if (step >= 0) candidates.push_back({step, replaced, entry.name});
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) {
                     return std::pair(-a.step, a.replaced) < std::pair(-b.step, b.replaced);
                   });
  return candidates;
}

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Tells the person what to do, where something can be done.
absl::Status WriteFailure(int64_t step, const absl::Status& cause) {
  return absl::Status(cause.code(), absl::StrCat("checkpoint of step ", step, ": ", cause.message(),
                                                 absl::IsResourceExhausted(cause)
                                                     ? "; free some space or choose another --out"
                                                     : ""));
}

}  // namespace

// ---- writing

CheckpointStore::CheckpointStore(FileSystem& fs, std::string folder, int keep)
    : fs_(fs), folder_(std::move(folder)), keep_(std::max(keep, 1)) {}

std::string CheckpointStore::PathOf(const std::string& prefix, int64_t step) const {
  return JoinPath(folder_, absl::StrFormat("%s%08d", prefix, step));
}

absl::StatusOr<v1::CheckpointInfo> CheckpointStore::Write(const CheckpointSnapshot& snapshot) {
  const int64_t step = snapshot.manifest.step();
  const std::string temporary = PathOf(kWriting, step);
  v1::CheckpointInfo info;
  absl::Status status = ClearLeftovers();
  if (status.ok()) {
    status = WriteFiles(snapshot, temporary, &info);
    if (status.ok()) status = Publish(step, temporary);
    if (!status.ok()) RemoveTree(fs_, temporary).IgnoreError();  // the first failure is reported
  }
  if (status.ok()) status = Retire(step);
  if (!status.ok()) return WriteFailure(step, status);
  info.set_step(step);
  info.set_path(PathOf(kFinished, step));
  info.set_state_digest(snapshot.manifest.state_digest());
  return info;
}

absl::Status CheckpointStore::ClearLeftovers() {
  if (cleared_) return absl::OkStatus();
  RETURN_IF_ERROR(MakeDirectories(fs_, folder_));
  ASSIGN_OR_RETURN(const std::vector<DirectoryEntry> entries, fs_.List(folder_));
  for (const DirectoryEntry& entry : entries) {
    const int64_t replaced = StepOf(entry.name, kReplaced);
    const std::string path = JoinPath(folder_, entry.name);
    if (replaced >= 0 && !fs_.IsDirectory(PathOf(kFinished, replaced))) {
      RETURN_IF_ERROR(fs_.Rename(path, PathOf(kFinished, replaced)));
    } else if (replaced >= 0 || StepOf(entry.name, kWriting) >= 0 ||
               StepOf(entry.name, kRemoving) >= 0) {
      RETURN_IF_ERROR(RemoveTree(fs_, path));
    }
  }
  cleared_ = true;
  return absl::OkStatus();
}

absl::Status CheckpointStore::WriteFiles(const CheckpointSnapshot& snapshot,
                                         const std::string& folder, v1::CheckpointInfo* info) {
  RETURN_IF_ERROR(RemoveTree(fs_, folder));
  RETURN_IF_ERROR(fs_.MakeDirectory(folder));
  std::vector<TensorToWrite> tensors;
  for (const CheckpointTensor& tensor : snapshot.tensors) {
    tensors.push_back({tensor.name, tensor.shape, tensor.values.data()});
  }
  ASSIGN_OR_RETURN(const FileHash model,
                   WriteSafetensors(fs_, JoinPath(folder, kModelFile), tensors,
                                    {{"format", "pt"},
                                     {"step", absl::StrCat(snapshot.manifest.step())},
                                     {"state_digest", snapshot.manifest.state_digest()}}));
  v1::CheckpointManifest manifest = snapshot.manifest;
  manifest.set_format_version(kFormatVersion);
  manifest.clear_files();
  v1::FileDigest* file = manifest.add_files();
  file->set_name(kModelFile);
  file->set_bytes(model.bytes);
  file->set_sha256(model.sha256);
  ASSIGN_OR_RETURN(const std::string text, ManifestText(std::move(manifest)));
  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> out,
                   fs_.Create(JoinPath(folder, kManifestFile)));
  RETURN_IF_ERROR(out->Append(text));
  RETURN_IF_ERROR(out->Sync());
  RETURN_IF_ERROR(out->Close());
  info->set_bytes(model.bytes + static_cast<int64_t>(text.size()));
  return fs_.SyncDirectory(folder);
}

absl::Status CheckpointStore::Publish(int64_t step, const std::string& temporary) {
  const std::string finished = PathOf(kFinished, step), replaced = PathOf(kReplaced, step);
  const bool replaces = fs_.IsDirectory(finished);
  if (replaces) {
    RETURN_IF_ERROR(RemoveTree(fs_, replaced));
    RETURN_IF_ERROR(fs_.Rename(finished, replaced));
  }
  if (const absl::Status renamed = fs_.Rename(temporary, finished); !renamed.ok()) {
    if (replaces) fs_.Rename(replaced, finished).IgnoreError();  // the first failure is reported
    return renamed;
  }
  RETURN_IF_ERROR(fs_.SyncDirectory(folder_));
  return replaces ? RemoveTree(fs_, replaced) : absl::OkStatus();
}

absl::Status CheckpointStore::Retire(int64_t just_written) {
  ASSIGN_OR_RETURN(const std::vector<Candidate> candidates, ListCandidates(fs_, folder_));
  // Renamed before anything in it is removed: a step-N folder is never half there.
  std::vector<std::string> retired;
  int kept = 1;  // the one just written, even where a former run left later ones
  for (const Candidate& candidate : candidates) {
    if (candidate.replaced || candidate.step == just_written || kept++ < keep_) continue;
    const std::string to = PathOf(kRemoving, candidate.step);
    RETURN_IF_ERROR(RemoveTree(fs_, to));
    RETURN_IF_ERROR(fs_.Rename(JoinPath(folder_, candidate.name), to));
    retired.push_back(to);
  }
  if (retired.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(fs_.SyncDirectory(folder_));
  for (const std::string& path : retired) RETURN_IF_ERROR(RemoveTree(fs_, path));
  return absl::OkStatus();
}

CheckpointWriter::CheckpointWriter(FileSystem& fs, Options options)
    : store_(fs, options.folder, options.keep),
      options_(std::move(options)),
      thread_(&CheckpointWriter::Run, this) {}

CheckpointWriter::~CheckpointWriter() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  thread_.join();
}

absl::Status CheckpointWriter::Start(CheckpointSnapshot snapshot) {
  absl::MutexLock lock(&mutex_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return !pending_.has_value() && !writing_;
  };
  mutex_.Await(absl::Condition(&idle));
  if (failure_.ok()) pending_ = std::move(snapshot);
  return failure_;
}

absl::Status CheckpointWriter::Finish() {
  absl::MutexLock lock(&mutex_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return !pending_.has_value() && !writing_;
  };
  mutex_.Await(absl::Condition(&idle));
  return failure_;
}

void CheckpointWriter::Run() {
  while (true) {
    std::optional<CheckpointSnapshot> snapshot;
    {
      absl::MutexLock lock(&mutex_);
      const auto work = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return pending_.has_value() || stop_;
      };
      mutex_.Await(absl::Condition(&work));
      if (!pending_.has_value()) return;
      snapshot.swap(pending_);
      writing_ = true;
    }
    const absl::StatusOr<v1::CheckpointInfo> info = store_.Write(*snapshot);
    snapshot.reset();
    if (info.ok() && options_.written) options_.written(*info);
    absl::MutexLock lock(&mutex_);
    if (!info.ok()) failure_ = info.status();
    writing_ = false;
  }
}

// ---- reading

absl::StatusOr<FoundCheckpoint> FindNewestCheckpoint(FileSystem& fs, const std::string& folder) {
  const auto none = [&](const char* why) {
    return absl::NotFoundError(
        absl::StrCat("no checkpoint in ", folder, ": ", why,
                     "; accepted: a run's folder, its checkpoints folder, or one step-N folder"));
  };
  if (!fs.IsDirectory(folder)) return none("no such folder");
  const std::string trimmed(absl::StripSuffix(folder, "/"));
  const std::string name = trimmed.substr(trimmed.rfind('/') + 1);
  if (StepOf(name, kFinished) >= 0 || fs.Open(JoinPath(folder, kManifestFile)).ok()) {
    ASSIGN_OR_RETURN(v1::CheckpointManifest manifest, Verify(fs, folder));
    return FoundCheckpoint{folder, std::move(manifest), {}};
  }
  const std::string inner = JoinPath(folder, "checkpoints");
  const std::string parent = fs.IsDirectory(inner) ? inner : folder;
  ASSIGN_OR_RETURN(const std::vector<Candidate> candidates, ListCandidates(fs, parent));
  if (candidates.empty()) return none("it holds none");
  FoundCheckpoint found;
  for (const Candidate& candidate : candidates) {
    found.path = JoinPath(parent, candidate.name);
    absl::StatusOr<v1::CheckpointManifest> manifest = Verify(fs, found.path);
    if (manifest.ok()) {
      found.manifest = *std::move(manifest);
      return found;
    }
    found.notes.push_back(
        absl::StrCat("checkpoint ", candidate.name, " is not used: ", manifest.status().message()));
  }
  return absl::DataLossError(
      absl::StrCat("no valid checkpoint in ", parent, ": ", absl::StrJoin(found.notes, "; ")));
}

absl::StatusOr<LoadedCheckpoint> LoadNewestCheckpoint(
    FileSystem& fs, const std::string& folder, absl::Span<const CheckpointTensorSpec> expected) {
  ASSIGN_OR_RETURN(FoundCheckpoint found, FindNewestCheckpoint(fs, folder));
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file,
                   SafetensorsFile::Open(fs, JoinPath(found.path, kModelFile)));
  const auto differs = [&](const std::string& name, const std::string& what) {
    return absl::FailedPreconditionError(
        absl::StrCat(found.path, ": tensor ", name, " ", what,
                     "; it was made with another model or optimizer than the spec's"));
  };
  LoadedCheckpoint loaded;
  for (const CheckpointTensorSpec& want : expected) {
    const SafetensorsFile::Tensor* tensor = file->Find(want.name);
    if (tensor == nullptr) return differs(want.name, "is missing");
    if (tensor->shape != want.shape) {
      return differs(want.name, absl::StrCat("has shape ", ShapeText(tensor->shape), ", expected ",
                                             ShapeText(want.shape)));
    }
    std::vector<float> values(static_cast<size_t>(tensor->elements));
    RETURN_IF_ERROR(file->Read(*tensor, values.data()));
    loaded.tensors.push_back(std::move(values));
  }
  if (file->tensors().size() != expected.size()) {
    for (const SafetensorsFile::Tensor& tensor : file->tensors()) {
      const auto same = [&](const CheckpointTensorSpec& want) { return want.name == tensor.name; };
      if (std::none_of(expected.begin(), expected.end(), same)) {
        return differs(tensor.name, "is not expected");
      }
    }
  }
  loaded.path = std::move(found.path);
  loaded.manifest = std::move(found.manifest);
  loaded.notes = std::move(found.notes);
  return loaded;
}

}  // namespace lockstep::train
