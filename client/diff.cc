#include "client/diff.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/digest.h"
#include "common/fs.h"
#include "common/status_macros.h"

namespace lockstep::client {
namespace {

using nlohmann::ordered_json;

// Read at once: a thousand steps of a hundred tensors take 6 MB.
constexpr int64_t kMaxBytes = int64_t{2} << 30;

struct Record {
  std::string state, parameters;
  std::vector<std::pair<std::string, std::string>> tensors;
};

bool ReadDigest(const ordered_json& value, std::string* to) {
  Digest digest;
  if (!value.is_string() || !FromHex(value.get_ref<const std::string&>(), &digest)) return false;
  *to = value.get<std::string>();
  return true;
}

// False where the line is no record.
bool ParseLine(const std::string& line, int64_t* step, Record* record) {
  const ordered_json value = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object() || !value.contains("step") || !value["step"].is_number_integer() ||
      !value.contains("state") || !ReadDigest(value["state"], &record->state) ||
      !value.contains("parameters") || !ReadDigest(value["parameters"], &record->parameters) ||
      !value.contains("tensors") || !value["tensors"].is_object()) {
    return false;
  }
  *step = value["step"].get<int64_t>();
  for (const auto& [name, digest] : value["tensors"].items()) {
    record->tensors.emplace_back(name, "");
    if (!ReadDigest(digest, &record->tensors.back().second)) return false;
  }
  return *step >= 0;
}

absl::StatusOr<std::map<int64_t, Record>> ReadRun(const std::string& run) {
  FileSystem& fs = RealFileSystem();
  const std::string path = fs.IsDirectory(run) ? JoinPath(run, "digests.jsonl") : run;
  absl::StatusOr<std::string> text = ReadFile(path, kMaxBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        absl::StrCat(path, " does not exist; give the folder of a run (`lockstep run --out DIR`)"));
  }
  if (!text.ok()) return text.status();
  std::map<int64_t, Record> records;
  int64_t number = 0;
  for (size_t begin = 0; begin < text->size();) {
    const size_t newline = text->find('\n', begin);
    const size_t end = newline == std::string::npos ? text->size() : newline;
    const std::string line = text->substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.empty()) continue;
    int64_t step = 0;
    Record record;
    if (!ParseLine(line, &step, &record)) {
      // A run that was killed while it wrote leaves half a line at the end; that is no damage.
      if (newline == std::string::npos) break;
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", number, ": not a record of digests; expected ",
                       R"({"step":N,"state":"<32 hex>","parameters":"<32 hex>","tensors":{...}})"));
    }
    records[step] = std::move(record);
  }
  if (records.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path,
                     " holds no complete record; did the run commit a step (with "
                     "train.digest_every: 0, write a checkpoint)?"));
  }
  return records;
}

std::vector<RunDifference::Tensor> DifferentTensors(const Record& a, const Record& b) {
  std::map<std::string, std::string> others(b.tensors.begin(), b.tensors.end());
  std::vector<RunDifference::Tensor> tensors;
  for (const auto& [name, digest] : a.tensors) {
    const auto other = others.find(name);
    if (other == others.end()) {
      tensors.push_back({name, digest, ""});
    } else {
      if (other->second != digest) tensors.push_back({name, digest, other->second});
      others.erase(other);
    }
  }
  for (const auto& [name, digest] : others) tensors.push_back({name, "", digest});
  return tensors;
}

}  // namespace

absl::StatusOr<RunDifference> CompareRuns(const std::string& a, const std::string& b) {
  ASSIGN_OR_RETURN(const auto records_a, ReadRun(a));
  ASSIGN_OR_RETURN(const auto records_b, ReadRun(b));
  RunDifference result;
  for (const auto& [step, record] : records_b) result.only_b += records_a.count(step) == 0;
  for (const auto& [step, record_a] : records_a) {
    const auto found = records_b.find(step);
    if (found == records_b.end()) {
      ++result.only_a;
      continue;
    }
    if (result.differ) continue;  // the rest is counted, not compared
    const Record& record_b = found->second;
    if (result.steps_compared++ == 0) result.first_step = step;
    result.last_step = step;
    result.tensors = DifferentTensors(record_a, record_b);
    if (record_a.state != record_b.state || record_a.parameters != record_b.parameters ||
        !result.tensors.empty()) {
      result.differ = true;
      result.step = step;
      result.state_a = record_a.state;
      result.state_b = record_b.state;
    }
  }
  if (result.steps_compared == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the runs have no step in common: ", a, " recorded steps ",
                     records_a.begin()->first, " to ", records_a.rbegin()->first, ", ", b,
                     " steps ", records_b.begin()->first, " to ", records_b.rbegin()->first));
  }
  return result;
}

ordered_json DifferenceJson(const RunDifference& difference) {
  ordered_json json;
  json["equal"] = !difference.differ;
  json["steps_compared"] = difference.steps_compared;
  json["first_step"] = difference.first_step;
  json["last_step"] = difference.last_step;
  json["only_a"] = difference.only_a;
  json["only_b"] = difference.only_b;
  if (difference.differ) {
    json["step"] = difference.step;
    json["state"] = {{"a", difference.state_a}, {"b", difference.state_b}};
    json["tensors"] = ordered_json::array();
    for (const auto& tensor : difference.tensors) {
      json["tensors"].push_back({{"name", tensor.name}, {"a", tensor.a}, {"b", tensor.b}});
    }
  }
  return json;
}

}  // namespace lockstep::client
