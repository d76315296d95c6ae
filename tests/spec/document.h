// A spec for tests as a list of path = value, written as block YAML with one scalar per line, so
// that a test can change one field and know its line.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace lockstep::spec {

class Document {
 public:
  // A valid spec with two explicit layers.
  static Document Valid();

  // Replaces the value, or adds the field at the end of its mapping.
  Document& Set(const std::string& path, const std::string& value);
  // Removes the field and what is inside it.
  Document& Remove(const std::string& path);

  std::string Text() const;
  int Line(const std::string& path) const;  // of the field's key; 0 where there is none

 private:
  void Render(std::string* text, std::vector<std::pair<std::string, int>>* lines) const;
  std::vector<std::pair<std::string, std::string>> fields_;
};

}  // namespace lockstep::spec
