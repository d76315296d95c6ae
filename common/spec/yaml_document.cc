#include "common/spec/yaml_document.h"

#include <exception>
#include <sstream>

#include "common/spec/text.h"
#include "fmt/format.h"
#include "yaml-cpp/depthguard.h"
#include "yaml-cpp/eventhandler.h"

namespace lockstep::spec {
namespace {

// Remembers where the newest document began.
class DocumentStarts : public YAML::EventHandler {
 public:
  int line() const { return line_; }

  void OnDocumentStart(const YAML::Mark& mark) override { line_ = mark.line + 1; }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t,
                const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}

 private:
  int line_ = 0;
};

// YAML::Load drops whatever follows the first document, and YAML::LoadAll never ends on a stray
// comma
// ("[8], 1": yaml-cpp 0.7 reads empty documents for ever): so the events of at most two documents
// are read first.
bool IsOneDocument(const std::string& text, YamlError* error) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  DocumentStarts starts;
  for (int count = 0; parser.HandleNextDocument(starts); ++count) {
    if (count == 0) continue;
    error->line = starts.line();
    error->text = "found more after the end of the first document; accepted: one document";
    return false;
  }
  return true;
}

}  // namespace

bool ReadYaml(const std::string& text, YAML::Node* root, YamlError* error) {
  if (text.size() > kLargestText) {
    error->text = fmt::format("found more than {} bytes; accepted: at most 1 MiB", kLargestText);
    return false;
  }
  if (text.find('\0') != std::string::npos || !IsValidUtf8(text)) {
    error->text = "found bytes that are not UTF-8 text; accepted: YAML in UTF-8";
    return false;
  }
  try {
    if (!IsOneDocument(text, error)) return false;
    root->reset(YAML::Load(text));
    return true;
  } catch (const YAML::DeepRecursion& e) {
    error->line = e.mark.line + 1;
    error->text = "found lists or mappings nested too deeply; accepted: at most 6 levels";
  } catch (const YAML::Exception& e) {
    error->line = e.mark.line + 1;
    error->text = fmt::format("not YAML: {} (column {})", OneLine(e.msg, 200), e.mark.column + 1);
  } catch (const std::exception& e) {
    error->text = fmt::format("not YAML: {}", OneLine(e.what(), 200));
  }
  return false;
}

}  // namespace lockstep::spec
