// ToYaml: a normalized spec as YAML that a person would write.
#include <algorithm>
#include <cctype>

#include "absl/strings/ascii.h"
#include "common/spec/normalize.h"
#include "common/spec/spec.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr size_t kColumns = 100;

// Plain where every YAML reader takes it as this string, else double-quoted.
std::string Scalar(const std::string& text) {
  const std::string lower = absl::AsciiStrToLower(text);
  const bool plain =
      !text.empty() && (std::isalpha(static_cast<unsigned char>(text[0])) != 0 || text[0] == '/') &&
      std::all_of(text.begin(), text.end(), [](char c) {
        return absl::ascii_isalnum(c) || c == '/' || c == '.' || c == '_' || c == '-';
      });
  for (const char* word : {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}) {
    if (lower == word) return '"' + text + '"';
  }
  if (plain) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      quoted += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

std::string ScalarOf(const Message& message, const FieldDescriptor& field, int index) {
  const Reflection& reflection = *message.GetReflection();
  const bool one = index < 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return fmt::format("{}", one ? reflection.GetInt32(message, &field)
                                   : reflection.GetRepeatedInt32(message, &field, index));
    case FieldDescriptor::CPPTYPE_INT64:
      return fmt::format("{}", one ? reflection.GetInt64(message, &field)
                                   : reflection.GetRepeatedInt64(message, &field, index));
    case FieldDescriptor::CPPTYPE_UINT64:
      return fmt::format("{}", reflection.GetUInt64(message, &field));
    case FieldDescriptor::CPPTYPE_DOUBLE:  // the shortest text that reads back to the same double
      return fmt::format("{}", one ? reflection.GetDouble(message, &field)
                                   : reflection.GetRepeatedDouble(message, &field, index));
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.GetBool(message, &field) ? "true" : "false";
    default:
      return Scalar(one ? reflection.GetString(message, &field)
                        : reflection.GetRepeatedString(message, &field, index));
  }
}

std::vector<const FieldDescriptor*> SetFields(const Message& message) {
  std::vector<const FieldDescriptor*> fields;
  message.GetReflection()->ListFields(message, &fields);
  return fields;
}

std::string Flow(const Message& message);

// "[28, 28, 1]" or "idx" or "{type: he}".
std::string FlowValue(const Message& message, const FieldDescriptor& field) {
  const Reflection& reflection = *message.GetReflection();
  const bool is_message = field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
  if (!field.is_repeated()) {
    return is_message ? Flow(reflection.GetMessage(message, &field)) : ScalarOf(message, field, -1);
  }
  std::string out = "[";
  for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
    if (i > 0) out += ", ";
    out += is_message ? Flow(reflection.GetRepeatedMessage(message, &field, i))
                      : ScalarOf(message, field, i);
  }
  return out + "]";
}

std::string Flow(const Message& message) {
  std::string out = "{";
  for (const FieldDescriptor* field : SetFields(message)) {
    if (out.size() > 1) out += ", ";
    out += field->name() + ": " + FlowValue(message, *field);
  }
  return out + "}";
}

// One entry of a list of layers: on one line where it fits.
void WriteElement(const Message& message, const std::string& indent, std::string* out) {
  const std::string flow = Flow(message);
  if (indent.size() + 2 + flow.size() <= kColumns) {
    *out += indent + "- " + flow + "\n";
    return;
  }
  std::string lead = "- ";
  for (const FieldDescriptor* field : SetFields(message)) {
    *out += indent + lead + field->name() + ": " + FlowValue(message, *field) + "\n";
    lead = "  ";
  }
}

void WriteBlock(const Message& message, const std::string& indent, std::string* out) {
  const Reflection& reflection = *message.GetReflection();
  for (const FieldDescriptor* field : SetFields(message)) {
    const std::string head = indent + field->name() + ":";
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      *out += head + " " + FlowValue(message, *field) + "\n";
    } else if (field->is_repeated()) {
      *out += head + "\n";
      for (int i = 0; i < reflection.FieldSize(message, field); ++i)
        WriteElement(reflection.GetRepeatedMessage(message, field, i), indent + "  ", out);
    } else {
      const Message& child = reflection.GetMessage(message, field);
      if (SetFields(child).empty()) continue;
      *out += head + "\n";
      WriteBlock(child, indent + "  ", out);
    }
  }
}

}  // namespace

std::string ToYaml(const v1::JobSpec& spec, bool expand) {
  v1::JobSpec shown = spec;
  v1::ModelSpec* model = shown.mutable_model();
  if (expand && !model->preset().empty()) {
    const LayerList layers = CompleteLayerList(spec);
    model->Clear();
    model->mutable_layers()->CopyFrom(layers);
  }
  std::string before = "data";
  for (v1::LayerSpec& layer : *model->mutable_layers()) {
    // The layer before is the default. An add has none.
    if (layer.inputs_size() == 1 && layer.inputs(0) == before) layer.clear_inputs();
    before = layer.name();
  }
  std::string out;
  WriteBlock(shown, "", &out);
  return out;
}

}  // namespace lockstep::spec
