#include "common/spec/spec.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/spec/normalize.h"
#include "common/spec/parse.h"
#include "common/spec/problem.h"
#include "common/spec/text.h"
#include "common/spec/yaml_document.h"
#include "fmt/format.h"

namespace lockstep::spec {
namespace {

absl::StatusOr<std::string> ReadText(const std::string& path) {
  const auto fail = [&](const std::string& text) {
    return ToStatus(OneLine(path, 400), {"", text});
  };
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return fail(fmt::format("cannot be read: {}", std::strerror(errno)));
  std::string text(kLargestText + 1, '\0');
  errno = 0;
  text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (std::ferror(file.get()) != 0)
    return fail(fmt::format("cannot be read: {}", std::strerror(errno)));
  return text;
}

}  // namespace

absl::StatusOr<v1::JobSpec> LoadFile(const std::string& path,
                                     const std::vector<std::string>& overrides) {
  absl::StatusOr<std::string> text = ReadText(path);
  if (!text.ok()) return text.status();
  return LoadText(*text, path, overrides);
}

absl::StatusOr<v1::JobSpec> LoadText(const std::string& text, const std::string& file_name,
                                     const std::vector<std::string>& overrides) {
  v1::JobSpec spec;
  SourceMap sources;
  absl::Status status = ParseDocument(text, file_name, &spec, &sources);
  if (!status.ok()) return status;
  for (const std::string& argument : overrides) {
    status = ApplyOverride(argument, &spec, &sources);
    if (!status.ok()) return status;
  }
  Graph graph;
  if (const MaybeProblem problem = Complete(sources, &spec, &graph)) {
    const Location* location = Locate(sources, problem->field);
    return ToStatus(location == nullptr ? file_name : location->text, *problem);
  }
  return spec;
}

absl::StatusOr<v1::JobSpec> Normalize(const v1::JobSpec& spec) {
  v1::JobSpec complete = spec;
  Graph graph;
  if (const MaybeProblem problem = Complete({}, &complete, &graph)) return ToStatus("", *problem);
  return complete;
}

absl::StatusOr<Graph> BuildGraph(const v1::JobSpec& spec) {
  v1::JobSpec complete = spec;
  Graph graph;
  if (const MaybeProblem problem = Complete({}, &complete, &graph)) return ToStatus("", *problem);
  return graph;
}

absl::StatusOr<std::string> ResolveDataPath(const std::string& path) {
  if (!path.empty() && path[0] == '/') return path;
  const char* root = std::getenv("LOCKSTEP_DATA");
  if (root == nullptr || *root == '\0') {
    return absl::FailedPreconditionError(fmt::format(
        "data.path: {} is relative and LOCKSTEP_DATA is not set; set LOCKSTEP_DATA to the "
        "folder that holds it, or give an absolute path",
        Quoted(path)));
  }
  std::string resolved = root;
  if (resolved.back() != '/') resolved += '/';
  return resolved + path;
}

}  // namespace lockstep::spec
