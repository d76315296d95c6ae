#include "client/table.h"

#include <algorithm>

namespace lockstep::client {

std::string Table::Render(const Terminal& terminal, const std::string& indent) const {
  size_t count = columns_.size();
  for (const auto& row : rows_) count = std::max(count, row.size());
  std::vector<int> widths(count, 0);
  for (size_t i = 0; i < columns_.size(); ++i) widths[i] = DisplayWidth(columns_[i].title);
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], DisplayWidth(row[i]));
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string text = indent;
    for (size_t i = 0; i < cells.size(); ++i) {
      const std::string blanks(widths[i] - DisplayWidth(cells[i]), ' ');
      const bool right = i < columns_.size() && columns_[i].align == Align::kRight;
      if (i > 0) text += "  ";
      text += right ? blanks + cells[i] : cells[i] + blanks;
    }
    while (!text.empty() && text.back() == ' ') text.pop_back();
    return text + "\n";
  };
  std::string out;
  if (!columns_.empty()) {
    std::vector<std::string> titles;
    for (const Column& column : columns_) {
      titles.push_back(terminal.Paint(Color::kBold, column.title));
    }
    out += line(titles);
  }
  for (const auto& row : rows_) out += line(row);
  return out;
}

}  // namespace lockstep::client
