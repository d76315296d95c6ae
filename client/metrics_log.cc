#include "client/metrics_log.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/format.h"
#include "client/json.h"
#include "client/table.h"
#include "fmt/format.h"

namespace lockstep::client {

namespace {

constexpr char kHeader[] =
    "step,epoch,train_loss,train_accuracy,samples,learning_rate,gradient_norm,seconds,"
    "validation_loss,validation_accuracy,validation_samples,state_digest";

// The rows of steps before `first`, by step, under kHeader; a column that a file of an earlier
// version lacks is empty.
std::map<int64_t, std::string> RowsBefore(const std::string& csv, int64_t first) {
  const std::vector<std::string> columns = absl::StrSplit(kHeader, ',');
  const std::vector<std::string> lines = absl::StrSplit(csv, '\n');
  const std::vector<std::string> own_columns = absl::StrSplit(lines[0], ',');
  std::map<int64_t, std::string> rows;
  for (const std::string& line : lines) {
    const std::vector<std::string> cells = absl::StrSplit(line, ',');
    int64_t number = 0;
    if (!absl::SimpleAtoi(cells[0], &number) || number >= first) continue;
    std::vector<std::string> row;
    for (const std::string& column : columns) {
      const size_t at =
          std::find(own_columns.begin(), own_columns.end(), column) - own_columns.begin();
      row.push_back(at < cells.size() ? cells[at] : "");
    }
    rows.emplace(number, absl::StrCat(absl::StrJoin(row, ","), "\n"));
  }
  return rows;
}

}  // namespace

std::string MetricsLog::CsvAfter(const std::string& earlier) const {
  int64_t first = std::numeric_limits<int64_t>::max();
  for (const auto& [number, row] : rows_) {
    if (row.step.has_train()) first = std::min(first, number);
  }
  std::map<int64_t, std::string> lines = RowsBefore(earlier, first);
  for (const auto& [number, row] : rows_) {
    std::string csv;
    const bool trained = row.step.has_train();
    const bool evaluated = row.evaluation.has_validation();
    const v1::Score& train = row.step.train();
    const v1::Score& validation = row.evaluation.validation();
    csv += fmt::format("{},{}", number, trained ? row.step.epoch() : row.evaluation.epoch());
    csv += trained ? fmt::format(",{}", train.loss()) : ",";
    csv += trained && train.has_accuracy() ? fmt::format(",{}", train.accuracy()) : ",";
    csv += trained ? fmt::format(",{},{},{},{}", train.samples(), row.step.learning_rate(),
                                 row.step.gradient_norm(), row.step.seconds())
                   : ",,,,";
    csv += evaluated ? fmt::format(",{}", validation.loss()) : ",";
    csv += evaluated && validation.has_accuracy() ? fmt::format(",{}", validation.accuracy()) : ",";
    csv += evaluated ? fmt::format(",{}", validation.samples()) : ",";
    csv += "," + row.step.state_digest() + "\n";
    lines.emplace(number, std::move(csv));
  }
  std::string csv = absl::StrCat(kHeader, "\n");
  for (const auto& [number, line] : lines) csv += line;
  return csv;
}

std::string MetricsLog::TableText(const Terminal& terminal) const {
  constexpr Table::Align kRight = Table::Align::kRight;
  Table table({{"STEP", kRight},
               {"EPOCH", kRight},
               {"LOSS", kRight},
               {"ACCURACY", kRight},
               {"LEARNING RATE", kRight},
               {"SECONDS", kRight},
               {"VALIDATION LOSS", kRight},
               {"ACCURACY", kRight}});
  for (const auto& [number, row] : rows_) {
    const v1::Score& train = row.step.train();
    const v1::Score& validation = row.evaluation.validation();
    const bool trained = row.step.has_train();
    const bool evaluated = row.evaluation.has_validation();
    table.AddRow(
        {std::to_string(number),
         std::to_string(trained ? row.step.epoch() : row.evaluation.epoch()),
         trained ? FormatLoss(train.loss()) : "",
         trained && train.has_accuracy() ? FormatPercent(train.accuracy()) : "",
         trained ? fmt::format("{:.6g}", row.step.learning_rate()) : "",
         trained ? fmt::format("{:.2f}", row.step.seconds()) : "",
         evaluated ? FormatLoss(validation.loss()) : "",
         evaluated && validation.has_accuracy() ? FormatPercent(validation.accuracy()) : ""});
  }
  return table.Render(terminal);
}

nlohmann::ordered_json MetricsLog::Json(const std::string& job) const {
  nlohmann::ordered_json json;
  json["job"] = job;
  json["steps"] = nlohmann::ordered_json::array();
  json["evaluations"] = nlohmann::ordered_json::array();
  for (const auto& [number, row] : rows_) {
    if (row.step.has_train()) json["steps"].push_back(ToJson(row.step));
    if (row.evaluation.has_validation()) json["evaluations"].push_back(ToJson(row.evaluation));
  }
  return json;
}

}  // namespace lockstep::client
