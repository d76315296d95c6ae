#include "tests/spec/document.h"

#include <algorithm>
#include <cctype>

namespace lockstep::spec {
namespace {

std::vector<std::string> Split(const std::string& path) {
  std::vector<std::string> parts(1);
  for (const char c : path) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool Inside(const std::string& path, const std::string& parent) {
  return path == parent || path.rfind(parent + ".", 0) == 0;
}

}  // namespace

Document Document::Valid() {
  Document document;
  document.fields_ = {{"name", "test"},
                      {"data.path", "/data"},
                      {"model.layers.0.type", "flatten"},
                      {"model.layers.1.type", "dense"},
                      {"model.layers.1.units", "10"},
                      {"optimizer.learning_rate", "0.1"},
                      {"train.batch", "128"},
                      {"train.epochs", "2"}};
  return document;
}

Document& Document::Set(const std::string& path, const std::string& value) {
  for (auto& [name, old] : fields_) {
    if (name == path) {
      old = value;
      return *this;
    }
  }
  // After the last field that shares the longest prefix, so that each mapping stays in one piece.
  std::string parent = path;
  while (!parent.empty()) {
    const size_t dot = parent.rfind('.');
    parent = dot == std::string::npos ? "" : parent.substr(0, dot);
    const auto last = std::find_if(fields_.rbegin(), fields_.rend(), [&](const auto& field) {
      return parent.empty() || Inside(field.first, parent);
    });
    if (last == fields_.rend()) continue;
    fields_.insert(last.base(), {path, value});
    return *this;
  }
  fields_.emplace_back(path, value);
  return *this;
}

Document& Document::Remove(const std::string& path) {
  fields_.erase(std::remove_if(fields_.begin(), fields_.end(),
                               [&](const auto& field) { return Inside(field.first, path); }),
                fields_.end());
  return *this;
}

void Document::Render(std::string* text, std::vector<std::pair<std::string, int>>* lines) const {
  std::vector<std::string> open;
  int line = 0;
  for (const auto& [path, value] : fields_) {
    const std::vector<std::string> parts = Split(path);
    size_t shared = 0;
    while (shared < open.size() && shared + 1 < parts.size() && open[shared] == parts[shared])
      ++shared;
    std::string at;
    for (size_t i = 0; i < parts.size(); ++i) {
      at += (i == 0 ? "" : ".") + parts[i];
      if (i < shared) continue;
      const bool element = std::isdigit(static_cast<unsigned char>(parts[i][0])) != 0;
      *text += std::string(2 * i, ' ') + (element ? "-" : parts[i] + ":");
      if (i + 1 == parts.size()) *text += " " + value;
      *text += "\n";
      lines->emplace_back(at, ++line);
    }
    open = parts;
    open.pop_back();
  }
}

std::string Document::Text() const {
  std::string text;
  std::vector<std::pair<std::string, int>> lines;
  Render(&text, &lines);
  return text;
}

int Document::Line(const std::string& path) const {
  std::string text;
  std::vector<std::pair<std::string, int>> lines;
  Render(&text, &lines);
  for (const auto& [name, line] : lines) {
    if (name == path) return line;
  }
  return 0;
}

}  // namespace lockstep::spec
