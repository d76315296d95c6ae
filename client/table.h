// Text in aligned columns.
//
//   JOB    STATE    STEP
//   job-1  RUNNING    12
//
// Not thread-safe. Cells may hold UTF-8 and color codes; they align by what is seen.
#pragma once

#include <string>
#include <vector>

#include "client/terminal.h"

namespace lockstep::client {

class Table {
 public:
  enum class Align { kLeft, kRight };
  struct Column {
    std::string title;
    Align align = Align::kLeft;
  };

  // An empty list of titles makes a table without a header line: columns of the first row, left.
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // Cells beyond the columns are kept, left-aligned; missing ones are empty.
  void AddRow(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  bool empty() const { return rows_.empty(); }

  // Every line ends with a line break and has no trailing blanks; each starts with `indent`.
  std::string Render(const Terminal& terminal, const std::string& indent = "") const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace lockstep::client
