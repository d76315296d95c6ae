#include "common/spec/parse.h"

#include <exception>
#include <map>
#include <variant>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/spec/layers.h"
#include "common/spec/schema.h"
#include "common/spec/text.h"
#include "common/spec/yaml_document.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

using Value = std::variant<absl::int128, double, bool, std::string>;

// Plain decimal notation only: 0x10, 010, 1_000 and 1e3 mean different things to different readers.
bool ReadInteger(const std::string& text, absl::int128* value) {
  const size_t sign = !text.empty() && (text[0] == '-' || text[0] == '+') ? 1 : 0;
  const size_t digits = text.size() - sign;
  if (digits == 0 || digits > 30 || (digits > 1 && text[sign] == '0')) return false;
  absl::int128 result = 0;
  for (size_t i = sign; i < text.size(); ++i) {
    if (text[i] < '0' || text[i] > '9') return false;
    result = result * 10 + (text[i] - '0');
  }
  *value = text[0] == '-' ? -result : result;
  return true;
}

// Decimal with an optional fraction and exponent. Refuses what absl would also take: inf, nan, hex.
bool ReadNumber(const std::string& text, double* value) {
  size_t i = !text.empty() && (text[0] == '-' || text[0] == '+') ? 1 : 0;
  const auto digits = [&] {
    const size_t begin = i;
    while (i < text.size() && absl::ascii_isdigit(text[i])) ++i;
    return i > begin;
  };
  const bool whole = digits();
  bool fraction = false;
  if (i < text.size() && text[i] == '.') {
    ++i;
    fraction = digits();
  }
  if (!whole && !fraction) return false;
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    if (i < text.size() && (text[i] == '-' || text[i] == '+')) ++i;
    if (!digits()) return false;
  }
  return i == text.size() && absl::SimpleAtod(text, value);
}

bool IsPlain(const YAML::Node& node) { return node.IsScalar() && node.Tag() != "!"; }

// What a person sees in the file, for "found ...".
std::string Found(const YAML::Node& node) {
  if (!node.IsDefined() || node.IsNull()) return "nothing";
  if (node.IsSequence()) return node.size() == 0 ? "an empty list" : "a list";
  if (node.IsMap()) return "a mapping";
  if (!IsPlain(node)) return "the string " + Quoted(node.Scalar());
  double number;
  return ReadNumber(node.Scalar(), &number) ? OneLine(node.Scalar()) : Quoted(node.Scalar());
}

// Explicit tags would change what a value means; no spec needs one.
bool HasForeignTag(const YAML::Node& node) {
  const std::string& tag = node.Tag();
  return !(tag.empty() || tag == "?" || tag == "!");
}

// Walks a YAML tree along a message's descriptor. Recursion is bounded by the nesting of the
// messages, so that neither deep nor aliased documents can make it long.
class Parser {
 public:
  Parser(std::string source, bool override, SourceMap* sources)
      : source_(std::move(source)), override_(override), sources_(*sources) {}

  absl::Status Parse(const YAML::Node& node, const std::string& path, int line, Message* message) {
    if (HasForeignTag(node)) return RefuseTag(node, path, line);
    if (!node.IsMap()) {
      std::string accepted =
          "a mapping of fields: " + JoinList(FieldNames(*message->GetDescriptor()));
      return Refuse(line, path, fmt::format("found {}; accepted: {}", Found(node), accepted));
    }
    std::map<std::string, int> first_lines;
    for (const auto& entry : node) {
      const int key_line = LineOf(entry.first, line);
      if (!entry.first.IsScalar()) {
        return Refuse(key_line, path,
                      fmt::format("found {} as a field's name; accepted: {}", Found(entry.first),
                                  JoinList(FieldNames(*message->GetDescriptor()))));
      }
      const std::string name = entry.first.Scalar();
      const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
      if (field == nullptr) return RefuseUnknown(key_line, path, name, *message->GetDescriptor());
      const std::string at = Join(path, name);
      const auto [first, inserted] = first_lines.emplace(name, key_line);
      if (!inserted) {
        const std::string where = override_ ? "" : fmt::format(", first on line {}", first->second);
        return Refuse(key_line, at, fmt::format("found twice{}; accepted: each field once", where));
      }
      absl::Status status = ParseField(entry.second, at, key_line, *field, message);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // Replaces the field, whatever it held.
  absl::Status ParseField(const YAML::Node& node, const std::string& path, int line,
                          const FieldDescriptor& field, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    reflection.ClearField(message, &field);
    Remember(path, line);
    if (!field.is_repeated()) return ParseElement(node, path, line, field, -1, message);
    if (HasForeignTag(node)) return RefuseTag(node, path, line);
    if (!node.IsSequence()) {
      return Refuse(line, path,
                    fmt::format("found {}; accepted: {}", Found(node), AcceptedList(field)));
    }
    if (!AcceptsCount(field, static_cast<int>(node.size()))) {
      return Refuse(
          line, path,
          fmt::format("found {}; accepted: {}", FoundList(node.size()), AcceptedList(field)));
    }
    int index = 0;
    for (const YAML::Node& element : node) {
      const std::string at = Join(path, std::to_string(index));
      const int element_line = LineOf(element, line);
      Remember(at, element_line);
      AddElement(field, message);
      absl::Status status = ParseElement(element, at, element_line, field, index, message);
      if (!status.ok()) return status;
      ++index;
    }
    return absl::OkStatus();
  }

  // index: of the element of a repeated field, which exists; -1: a singular field.
  absl::Status ParseElement(const YAML::Node& node, const std::string& path, int line,
                            const FieldDescriptor& field, int index, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      Message* child = index < 0 ? reflection.MutableMessage(message, &field)
                                 : reflection.MutableRepeatedMessage(message, &field, index);
      child->Clear();
      return Parse(node, path, line, child);
    }
    if (HasForeignTag(node)) return RefuseTag(node, path, line);
    Value value;
    if (!ReadValue(node, field, &value)) {
      std::string hint;
      if (node.IsScalar() && field.cpp_type() == FieldDescriptor::CPPTYPE_STRING)
        hint = ChoiceHint(field, node.Scalar());
      return Refuse(line, path,
                    fmt::format("found {}{}; accepted: {}", Found(node), hint, Accepted(field)));
    }
    Store(value, field, index, message);
    return absl::OkStatus();
  }

  absl::Status Refuse(int line, const std::string& path, const std::string& text) const {
    return ToStatus(At(line).text, {path, text});
  }

  absl::Status RefuseUnknown(int line, const std::string& path, const std::string& name,
                             const Descriptor& message) const {
    const std::vector<std::string> names = FieldNames(message);
    return Refuse(
        line, Join(path, OneLine(name)),
        fmt::format("unknown field{}; accepted: {}", NearestHint(name, names), JoinList(names)));
  }

  void Remember(const std::string& path, int line) {
    // What lay inside was written elsewhere and is replaced.
    const std::string inside = path + ".";
    auto it = sources_.lower_bound(inside);
    while (it != sources_.end() && it->first.compare(0, inside.size(), inside) == 0)
      it = sources_.erase(it);
    sources_[path] = At(line);
  }

  static int LineOf(const YAML::Node& node, int fallback) {
    const int line = node.Mark().line;
    return line < 0 ? fallback : line + 1;
  }

 private:
  Location At(int line) const {
    return {override_ ? source_ : fmt::format("{}:{}", source_, line), override_};
  }

  absl::Status RefuseTag(const YAML::Node& node, const std::string& path, int line) const {
    return Refuse(
        line, path,
        fmt::format("found the tag {}; accepted: values without a tag", OneLine(node.Tag())));
  }

  static bool ReadValue(const YAML::Node& node, const FieldDescriptor& field, Value* value) {
    if (!node.IsScalar()) return false;
    const std::string& text = node.Scalar();
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        *value = text;
        return AcceptsString(field, text);
      case FieldDescriptor::CPPTYPE_BOOL:
        *value = text == "true";
        return IsPlain(node) && (text == "true" || text == "false");
      case FieldDescriptor::CPPTYPE_DOUBLE: {
        double number;
        if (!IsPlain(node) || !ReadNumber(text, &number)) return false;
        *value = number;
        return AcceptsNumber(field, number);
      }
      default: {
        absl::int128 number;
        if (!IsPlain(node) || !ReadInteger(text, &number)) return false;
        *value = number;
        return AcceptsInteger(field, number);
      }
    }
  }

  static void AddElement(const FieldDescriptor& field, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_MESSAGE:
        reflection.AddMessage(message, &field);
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        reflection.AddString(message, &field, "");
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        reflection.AddDouble(message, &field, 0);
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        reflection.AddInt64(message, &field, 0);
        break;
      default:
        reflection.AddInt32(message, &field, 0);
    }
  }

  static void Store(const Value& value, const FieldDescriptor& field, int index, Message* message) {
    const Reflection& reflection = *message->GetReflection();
    const bool one = index < 0;
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING: {
        const auto& text = std::get<std::string>(value);
        one ? reflection.SetString(message, &field, text)
            : reflection.SetRepeatedString(message, &field, index, text);
        break;
      }
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection.SetBool(message, &field, std::get<bool>(value));
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE: {
        const double number = std::get<double>(value);
        one ? reflection.SetDouble(message, &field, number)
            : reflection.SetRepeatedDouble(message, &field, index, number);
        break;
      }
      case FieldDescriptor::CPPTYPE_UINT64:
        reflection.SetUInt64(message, &field, static_cast<uint64_t>(std::get<absl::int128>(value)));
        break;
      case FieldDescriptor::CPPTYPE_INT64: {
        const auto number = static_cast<int64_t>(std::get<absl::int128>(value));
        one ? reflection.SetInt64(message, &field, number)
            : reflection.SetRepeatedInt64(message, &field, index, number);
        break;
      }
      default: {
        const auto number = static_cast<int32_t>(std::get<absl::int128>(value));
        one ? reflection.SetInt32(message, &field, number)
            : reflection.SetRepeatedInt32(message, &field, index, number);
      }
    }
  }

  const std::string source_;
  const bool override_;
  SourceMap& sources_;
};

// Runs what reads YAML nodes; yaml-cpp's exceptions end here.
template <typename Read>
absl::Status Guarded(const std::string& where, Read read) {
  try {
    return read();
  } catch (const std::exception& e) {
    return ToStatus(where, {"", fmt::format("not YAML: {}", OneLine(e.what(), 200))});
  }
}

// One step down an override's path.
struct Cursor {
  Message* message = nullptr;
  const FieldDescriptor* field = nullptr;
  int index = -1;
  std::string path = {};
};

// The element of a list that a path component names: a number, or a layer's name.
absl::Status ResolveElement(const Parser& parser, const std::string& component, Cursor* cursor) {
  const Message& message = *cursor->message;
  const int size = message.GetReflection()->FieldSize(message, cursor->field);
  const auto refuse = [&](const std::string& accepted, const std::string& hint = "") {
    return parser.Refuse(
        0, cursor->path,
        fmt::format("no element {}{}; accepted: {}", Quoted(component), hint, accepted));
  };
  const auto* model = dynamic_cast<const v1::ModelSpec*>(&message);
  if (model != nullptr && cursor->field->name() == "layers" && size == 0 &&
      !model->preset().empty()) {
    return parser.Refuse(
        0, cursor->path,
        fmt::format("no element {}: model.preset is {}; accepted: the preset's own "
                    "fields, or, in place of the preset, the layers that "
                    "`lockstep explain` shows",
                    Quoted(component), model->preset()));
  }
  const std::string numbers =
      size == 0 ? "nothing, the list is empty" : fmt::format("0 to {}", size - 1);
  absl::int128 number;
  if (ReadInteger(component, &number)) {
    if (number < 0 || number >= size) return refuse(numbers);
    cursor->index = static_cast<int>(number);
  } else {
    if (model == nullptr || cursor->field->name() != "layers" || size == 0) return refuse(numbers);
    const std::vector<std::string> names = LayerNames(*model);
    for (int i = 0; i < size; ++i) {
      if (names[i] == component) cursor->index = i;
    }
    if (cursor->index < 0)
      return refuse(numbers + ", " + JoinList(names), NearestHint(component, names));
  }
  cursor->path = Join(cursor->path, std::to_string(cursor->index));
  return absl::OkStatus();
}

absl::Status Descend(const Parser& parser, const std::string& component, Cursor* cursor) {
  if (cursor->field != nullptr && cursor->field->is_repeated() && cursor->index < 0)
    return ResolveElement(parser, component, cursor);
  if (cursor->field != nullptr) {
    if (cursor->field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      return parser.Refuse(
          0, Join(cursor->path, OneLine(component)),
          fmt::format("{} has no fields; accepted: {} itself", cursor->path, cursor->path));
    }
    const Reflection& reflection = *cursor->message->GetReflection();
    cursor->message = cursor->index < 0 ? reflection.MutableMessage(cursor->message, cursor->field)
                                        : reflection.MutableRepeatedMessage(
                                              cursor->message, cursor->field, cursor->index);
    cursor->index = -1;
  }
  cursor->field = cursor->message->GetDescriptor()->FindFieldByName(component);
  if (cursor->field == nullptr) {
    return parser.RefuseUnknown(0, cursor->path, component, *cursor->message->GetDescriptor());
  }
  cursor->path = Join(cursor->path, component);
  return absl::OkStatus();
}

}  // namespace

absl::Status ParseDocument(const std::string& text, const std::string& file_name, v1::JobSpec* spec,
                           SourceMap* sources) {
  const std::string file = OneLine(file_name, 400);
  YAML::Node root;
  YamlError error;
  if (!ReadYaml(text, &root, &error)) {
    return ToStatus(error.line > 0 ? fmt::format("{}:{}", file, error.line) : file,
                    {"", error.text});
  }
  return Guarded(file, [&]() -> absl::Status {
    Parser parser(file, /*override=*/false, sources);
    if (root.IsNull()) {
      return ToStatus(file, {"", "the file is empty; accepted: a mapping of fields: " +
                                     JoinList(FieldNames(*spec->GetDescriptor()))});
    }
    const int line = Parser::LineOf(root, 1);
    parser.Remember("", line);
    return parser.Parse(root, "", line, spec);
  });
}

absl::Status ApplyOverride(const std::string& argument, v1::JobSpec* spec, SourceMap* sources) {
  const std::string source = "--set " + OneLine(argument, 200);
  Parser parser(source, /*override=*/true, sources);
  const size_t equals = argument.find('=');
  if (equals == std::string::npos || equals == 0) {
    return ToStatus(source, {"", "found no path=value; accepted: for example train.batch=128"});
  }
  const std::string path = argument.substr(0, equals);
  Cursor cursor{spec};
  const std::vector<std::string> components = absl::StrSplit(path, '.');
  for (const std::string& component : components) {
    absl::Status status = Descend(parser, component, &cursor);
    if (!status.ok()) return status;
  }
  YAML::Node value;
  YamlError error;
  if (!ReadYaml(argument.substr(equals + 1), &value, &error)) {
    return ToStatus(source, {cursor.path, error.text});
  }
  return Guarded(source, [&]() -> absl::Status {
    if (cursor.index < 0)
      return parser.ParseField(value, cursor.path, 0, *cursor.field, cursor.message);
    parser.Remember(cursor.path, 0);
    return parser.ParseElement(value, cursor.path, 0, *cursor.field, cursor.index, cursor.message);
  });
}

}  // namespace lockstep::spec
