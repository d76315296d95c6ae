#include "worker/data/npy.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "worker/data/content_reader.h"

namespace lockstep::data {
namespace {

constexpr int64_t kLargestHeader = 1 << 20;

struct Header {
  std::string type;  // "<f4"
  bool fortran_order = false;
  std::vector<int64_t> shape;
};

// The header's Python dictionary, of which NumPy writes exactly three entries.
class HeaderParser {
 public:
  explicit HeaderParser(absl::string_view text) : left_(text) {}

  bool Parse(Header* header) {
    bool type = false, order = false, shape = false;
    if (!Take("{")) return false;
    while (!Take("}")) {
      std::string key;
      if (!String(&key) || !Take(":")) return false;
      bool* seen = key == "descr" ? &type : key == "fortran_order" ? &order : &shape;
      if (*seen) return false;
      *seen = true;
      const bool parsed = key == "descr"           ? String(&header->type)
                          : key == "fortran_order" ? Bool(&header->fortran_order)
                                                   : key == "shape" && Tuple(&header->shape);
      if (!parsed) return false;
      if (!Take(",")) {
        if (!Take("}")) return false;
        break;
      }
    }
    Skip();
    return left_.empty() && type && order && shape;
  }

 private:
  void Skip() {
    while (!left_.empty() && absl::ascii_isspace(static_cast<unsigned char>(left_[0])))
      left_.remove_prefix(1);
  }
  bool Take(absl::string_view token) {
    Skip();
    if (left_.substr(0, token.size()) != token) return false;
    left_.remove_prefix(token.size());
    return true;
  }
  bool String(std::string* value) {
    Skip();
    if (left_.empty() || (left_[0] != '\'' && left_[0] != '"')) return false;
    const size_t end = left_.find(left_[0], 1);
    if (end == absl::string_view::npos) return false;
    *value = std::string(left_.substr(1, end - 1));
    left_.remove_prefix(end + 1);
    return true;
  }
  bool Bool(bool* value) {
    *value = Take("True");
    return *value || Take("False");
  }
  bool Tuple(std::vector<int64_t>* values) {
    if (!Take("(")) return false;
    while (!Take(")")) {
      Skip();
      size_t digits = 0;
      while (digits < left_.size() &&
             absl::ascii_isdigit(static_cast<unsigned char>(left_[digits])))
        ++digits;
      int64_t value;
      if (!absl::SimpleAtoi(left_.substr(0, digits), &value)) return false;
      values->push_back(value);
      left_.remove_prefix(digits);
      if (!Take(",")) return Take(")");
    }
    return true;
  }

  absl::string_view left_;
};

struct Array {
  Header header;
  std::shared_ptr<const char> data;  // behind the header
  int64_t header_bytes = 0;
  int64_t rows() const { return header.shape[0]; }
};

// A mapped array in C order whose elements have one of the `types` and are all there.
absl::StatusOr<Array> OpenArray(FileSystem& fs, const std::string& path,
                                const std::vector<std::string>& types,
                                const std::string& accepted) {
  absl::StatusOr<std::unique_ptr<ReadableFile>> file = fs.Open(path);
  if (!file.ok()) return file.status();
  const int64_t size = (*file)->size();
  uint8_t start[12] = {};
  const auto got = static_cast<size_t>(std::min<int64_t>(size, sizeof(start)));
  absl::Status status = (*file)->ReadAt(0, start, got);
  if (!status.ok()) return status;
  const int version = start[6];
  if (got < sizeof(start) || std::memcmp(start, "\x93NUMPY", 6) != 0) {
    return absl::DataLossError(absl::StrCat(path, ": it does not begin as an NPY file does"));
  }
  if (version < 1 || version > 3) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": NPY version ", version, "; accepted: 1 to 3"));
  }
  const int64_t prefix = version == 1 ? 10 : 12;
  int64_t length = start[8] | start[9] << 8;
  if (version > 1) length |= int64_t{start[10]} << 16 | int64_t{start[11]} << 24;
  if (length > kLargestHeader || prefix + length > size) {
    return Damaged(path, absl::StrCat("truncated: its header has ", length, " bytes"));
  }
  std::string text(static_cast<size_t>(length), '\0');
  status = (*file)->ReadAt(prefix, text.data(), text.size());
  if (!status.ok()) return status;
  Array array;
  if (!HeaderParser(text).Parse(&array.header)) {
    return Damaged(path, "its header is not that of an NPY file");
  }
  const Header& header = array.header;
  if (std::find(types.begin(), types.end(), header.type) == types.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": its elements have type '", header.type, "'; accepted: ", accepted));
  }
  if (header.fortran_order) {
    return absl::InvalidArgumentError(
        absl::StrCat(path,
                     ": its elements are in Fortran order; accepted: C order, which "
                     "numpy.ascontiguousarray makes"));
  }
  if (header.shape.empty() || header.shape[0] == 0) return Damaged(path, "no samples");
  const int64_t element = header.type.back() - '0';
  absl::int128 row = element;
  for (size_t i = 1; i < header.shape.size(); ++i) {
    row *= header.shape[i];
    if (header.shape[i] == 0 || row > std::numeric_limits<int64_t>::max()) {
      return Damaged(path, absl::StrCat("its header says ", absl::StrJoin(header.shape, " x ")));
    }
  }
  array.header_bytes = prefix + length;
  const int64_t there = size - array.header_bytes;
  const absl::int128 needed = row * header.shape[0];
  if (there < needed) {
    return Damaged(path, absl::StrCat("truncated: it ends in row ",
                                      there / static_cast<int64_t>(row), " of ", header.shape[0]));
  }
  if (there > needed) {
    return Damaged(path, absl::StrCat("bytes follow row ", header.shape[0] - 1, ", the last of ",
                                      header.shape[0]));
  }
  if (array.header_bytes % element != 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": its elements begin at byte ",
                                                   array.header_bytes, "; accepted: a multiple of ",
                                                   element, ", as NumPy writes them"));
  }
  absl::StatusOr<std::shared_ptr<const char>> mapped = (*file)->Map();
  if (!mapped.ok()) return mapped.status();
  array.data = std::shared_ptr<const char>(*mapped, mapped->get() + array.header_bytes);
  return array;
}

template <class T>
int64_t Element(const char* data, int64_t i) {
  T value;
  std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  // What int64 cannot hold is out of every range.
  if (static_cast<T>(static_cast<int64_t>(value)) != value ||
      (value > 0 && static_cast<int64_t>(value) < 0))
    return -1;
  return static_cast<int64_t>(value);
}

int64_t LabelAt(const Array& labels, int64_t row) {
  const char* data = labels.data.get();
  const bool is_signed = labels.header.type[1] == 'i';
  switch (labels.header.type[2]) {
    case '1':
      return is_signed ? Element<int8_t>(data, row) : Element<uint8_t>(data, row);
    case '2':
      return is_signed ? Element<int16_t>(data, row) : Element<uint16_t>(data, row);
    case '4':
      return is_signed ? Element<int32_t>(data, row) : Element<uint32_t>(data, row);
    default:
      return is_signed ? Element<int64_t>(data, row) : Element<uint64_t>(data, row);
  }
}

std::string LabelText(const Array& labels, int64_t row) {
  if (labels.header.type != "<u8") return absl::StrCat(LabelAt(labels, row));
  uint64_t value;
  std::memcpy(&value, labels.data.get() + row * static_cast<int64_t>(sizeof(value)), sizeof(value));
  return absl::StrCat(value);
}

// The dimensions of one sample, without those of size 1.
std::vector<int64_t> Essential(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Dataset>> LoadNpy(FileSystem& fs, const NpyOptions& options) {
  absl::StatusOr<Array> features =
      OpenArray(fs, options.features, {"|u1", "<f4"}, "uint8 ('|u1') and float32 ('<f4')");
  if (!features.ok()) return features.status();
  absl::StatusOr<Array> labels =
      OpenArray(fs, options.labels, {"|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"},
                "little-endian integers ('<i8', '|u1', ...)");
  if (!labels.ok()) return labels.status();

  const std::vector<int64_t>& shape = features->header.shape;
  const std::vector<int64_t> sample(shape.begin() + 1, shape.end());
  if (Essential(sample) !=
      Essential({options.shape.height, options.shape.width, options.shape.channels})) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.features, ": its samples are ",
                     sample.empty() ? std::string("single numbers") : absl::StrJoin(sample, " x "),
                     ", but data.shape is ", ShapeText(options.shape)));
  }
  const std::vector<int64_t> label(labels->header.shape.begin() + 1, labels->header.shape.end());
  if (!Essential(label).empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.labels, ": its rows are ",
                                                   absl::StrJoin(label, " x "),
                                                   "; accepted: one label a row"));
  }
  if (features->rows() != labels->rows()) {
    return absl::DataLossError(absl::StrCat(options.features, " has ", features->rows(),
                                            " samples, but ", options.labels, " has ",
                                            labels->rows(), " labels"));
  }
  const absl::Status limit =
      CheckLimit(options.features, features->rows(), options.split, options.max_samples);
  if (!limit.ok()) return limit;

  DatasetParts parts;
  parts.shape = options.shape;
  parts.classes = options.classes;
  parts.type = features->header.type == "<f4" ? SampleType::kFloat32 : SampleType::kUint8;
  parts.data = features->data;
  parts.mapped = true;
  parts.labels.resize(
      static_cast<size_t>(options.max_samples > 0 ? options.max_samples : features->rows()));
  for (size_t row = 0; row < parts.labels.size(); ++row) {
    const int64_t value = LabelAt(*labels, static_cast<int64_t>(row));
    if (value < 0 || value >= options.classes) {
      return absl::DataLossError(absl::StrCat(options.labels, ": row ", row, " has label ",
                                              LabelText(*labels, static_cast<int64_t>(row)),
                                              "; accepted: 0 to ", options.classes - 1,
                                              " (data.classes)"));
    }
    parts.labels[row] = static_cast<int32_t>(value);
  }
  parts.source = options.features;
  return std::make_shared<const Dataset>(std::move(parts));
}

}  // namespace lockstep::data
