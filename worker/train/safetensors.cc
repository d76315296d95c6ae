#include "worker/train/safetensors.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "nlohmann/json.hpp"

namespace lockstep::train {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are written as they lie");

using Json = nlohmann::json;

constexpr char kMetadata[] = "__metadata__";
constexpr int64_t kLargestHeader = 100'000'000;  // the format's own limit
constexpr int64_t kLengthBytes = 8;
constexpr size_t kDeepestHeader = 3;  // {"name": {"shape": [

// Elements of a tensor, or -1 where a size is negative or the bytes overflow.
int64_t CountElements(const std::vector<int64_t>& shape) {
  constexpr int64_t kMost =
      std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(float));
  int64_t count = 1;
  bool overflow = false;
  for (const int64_t size : shape) {
    if (size < 0) return -1;
    if (size == 0) {
      count = 0;
    } else if (count > kMost / size) {
      overflow = true;
    } else {
      count *= size;
    }
  }
  return overflow && count != 0 ? -1 : count;
}

std::string Quoted(const std::string& name) {
  return absl::StrCat("\"", absl::CHexEscape(name.substr(0, 100)), "\"");
}

}  // namespace

absl::StatusOr<FileHash> WriteSafetensors(FileSystem& fs, const std::string& path,
                                          absl::Span<const TensorToWrite> tensors,
                                          const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  int64_t end = 0;
  for (const TensorToWrite& tensor : tensors) {
    const int64_t begin = end;
    const int64_t elements = CountElements(tensor.shape);
    if (tensor.name.empty() || tensor.name == kMetadata || header.contains(tensor.name) ||
        elements < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("cannot write ", path, ": tensor ", Quoted(tensor.name), " of shape [",
                       absl::StrJoin(tensor.shape, ", "),
                       "] has a name that is empty, reserved or taken, or no "
                       "possible size"));
    }
    end += elements * static_cast<int64_t>(sizeof(float));
    header[tensor.name] = {
        {"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::type_error&) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write ", path, ": a tensor name is no UTF-8"));
  }
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');

  ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file, fs.Create(path));
  FileHash result;
  Sha256 hash;
  const auto append = [&](const void* data, size_t bytes) {
    hash.Update(data, bytes);
    result.bytes += static_cast<int64_t>(bytes);
    return file->Append(absl::string_view(static_cast<const char*>(data), bytes));
  };
  const uint64_t length = text.size();
  RETURN_IF_ERROR(append(&length, sizeof(length)));
  RETURN_IF_ERROR(append(text.data(), text.size()));
  for (const TensorToWrite& tensor : tensors) {
    const auto elements = static_cast<size_t>(CountElements(tensor.shape));
    if (elements > 0) RETURN_IF_ERROR(append(tensor.data, elements * sizeof(float)));
  }
  RETURN_IF_ERROR(file->Sync());
  RETURN_IF_ERROR(file->Close());
  result.sha256 = hash.FinishHex();
  return result;
}

absl::Status SafetensorsFile::Damaged(const std::string& what) const {
  return absl::DataLossError(absl::StrCat(path_, ": not a valid safetensors file: ", what));
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(FileSystem& fs,
                                                                       const std::string& path) {
  auto result = std::unique_ptr<SafetensorsFile>(new SafetensorsFile(path));
  ASSIGN_OR_RETURN(result->file_, fs.Open(path));
  const int64_t size = result->file_->size();
  if (size < kLengthBytes) {
    return result->Damaged(absl::StrCat(size, " bytes, shorter than its header's length"));
  }
  uint64_t length = 0;
  RETURN_IF_ERROR(result->file_->ReadAt(0, &length, sizeof(length)));
  const int64_t limit = std::min(kLargestHeader, size - kLengthBytes);
  if (length > static_cast<uint64_t>(limit)) {
    return result->Damaged(absl::StrCat("a header of ", length, " bytes; accepted: up to ", limit));
  }
  std::string header(static_cast<size_t>(length), '\0');
  RETURN_IF_ERROR(result->file_->ReadAt(kLengthBytes, header.data(), header.size()));
  RETURN_IF_ERROR(
      result->ParseHeader(header, size - kLengthBytes - static_cast<int64_t>(header.size())));
  return result;
}

absl::Status SafetensorsFile::ParseHeader(const std::string& header, int64_t data_bytes) {
  if (header.empty() || header[0] != '{') return Damaged("its header does not begin with '{'");
  // The parser keeps the last of equal keys without a word, so keys are watched as they come.
  std::vector<std::set<std::string>> keys(kDeepestHeader + 2);
  std::string problem;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    const auto level = static_cast<size_t>(depth);
    const bool opens =
        event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
    if (opens && level >= kDeepestHeader) {
      if (problem.empty()) problem = "its header is nested too deeply";
      return false;
    }
    if (opens) keys[level + 1].clear();
    if (event == Json::parse_event_t::key) {
      const std::string& key = value.get_ref<const std::string&>();
      if (!keys[level].insert(key).second && problem.empty()) {
        problem = absl::StrCat(Quoted(key), " is there twice");
      }
    }
    return true;
  };
  const Json json = Json::parse(header, watch, /*allow_exceptions=*/false);
  if (!problem.empty()) return Damaged(problem);
  if (json.is_discarded() || !json.is_object()) return Damaged("its header is no JSON object");

  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(header.size());
  for (const auto& item : json.items()) {
    const std::string& name = item.key();
    const Json& entry = item.value();
    if (name == kMetadata) {
      if (!entry.is_object()) return Damaged("__metadata__ is no object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          return Damaged(absl::StrCat("__metadata__ ", Quoted(key), " is no string"));
        }
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    const auto wrong = [&](const std::string& what) {
      return Damaged(absl::StrCat("tensor ", Quoted(name), " ", what));
    };
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
        !entry.contains("shape") || !entry.contains("data_offsets")) {
      return wrong("does not have exactly dtype, shape and data_offsets");
    }
    const Json& dtype = entry["dtype"];
    if (!dtype.is_string()) return wrong("has a dtype that is no string");
    if (dtype.get_ref<const std::string&>() != "F32") {
      return absl::UnimplementedError(absl::StrCat(path_, ": tensor ", Quoted(name), " has dtype ",
                                                   Quoted(dtype.get<std::string>()),
                                                   "; accepted: F32"));
    }
    const auto sizes_of = [&](const Json& list, std::vector<int64_t>* sizes) {
      if (!list.is_array()) return false;
      for (const Json& value : list) {
        if (!value.is_number_unsigned() ||
            value.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
          return false;
        }
        sizes->push_back(value.get<int64_t>());
      }
      return true;
    };
    Tensor tensor;
    tensor.name = name;
    std::vector<int64_t> offsets;
    if (!sizes_of(entry["shape"], &tensor.shape)) {
      return wrong("has a shape that is no list of sizes");
    }
    tensor.elements = CountElements(tensor.shape);
    if (tensor.elements < 0) return wrong("has an impossible shape");
    if (!sizes_of(entry["data_offsets"], &offsets) || offsets.size() != 2 ||
        offsets[0] > offsets[1] || offsets[1] > data_bytes) {
      return wrong(absl::StrCat("has data_offsets that are no range within the ", data_bytes,
                                " bytes of data"));
    }
    if (offsets[1] - offsets[0] != tensor.elements * static_cast<int64_t>(sizeof(float))) {
      return wrong(absl::StrCat("has ", offsets[1] - offsets[0], " bytes, its shape needs ",
                                tensor.elements * static_cast<int64_t>(sizeof(float))));
    }
    tensor.offset = data_begin + offsets[0];
    tensors_.push_back(std::move(tensor));
  }
  std::sort(tensors_.begin(), tensors_.end(), [](const Tensor& a, const Tensor& b) {
    return std::pair(a.offset, a.elements) < std::pair(b.offset, b.elements);
  });
  int64_t end = data_begin;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    if (tensor.offset != end) {
      return Damaged(absl::StrCat(
          "tensor ", Quoted(tensor.name),
          tensor.offset < end ? " overlaps the one before it" : " leaves a hole before it"));
    }
    end += tensor.elements * static_cast<int64_t>(sizeof(float));
    by_name_[tensor.name] = i;
  }
  if (end != data_begin + data_bytes) {
    return Damaged(absl::StrCat(data_begin + data_bytes - end, " bytes follow the last tensor"));
  }
  return absl::OkStatus();
}

const SafetensorsFile::Tensor* SafetensorsFile::Find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

absl::Status SafetensorsFile::Read(const Tensor& tensor, float* to) const {
  return file_->ReadAt(tensor.offset, to, static_cast<size_t>(tensor.elements) * sizeof(float));
}

}  // namespace lockstep::train
