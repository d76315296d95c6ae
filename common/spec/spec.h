// Loading and validating job specs (proto/lockstep/v1/spec.proto) from YAML.
//
// Every error is InvalidArgument with one line:
//   fashion.yaml:12: train.shards: 256 is more than train.batch (128); accepted: 1 to 128
// or, for a field that an override set,
//   --set train.shards=256: train.shards: ...
// A field that is missing is reported at the line of the mapping that lacks it. Files are at most 1
// MiB. Thread-safe: pure functions (LoadFile reads the file, ResolveDataPath the environment).
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/spec/graph.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

// Reads, applies overrides ("path.to.field=YAML value", list elements by number:
// model.layers.0.units=5; or by name: model.layers.conv1.filters=8) in order, fills in defaults,
// validates everything that can be known without the data. The result has every scalar default
// explicit, layers' names, inputs and initializers too, and a preset still as preset.
absl::StatusOr<v1::JobSpec> LoadFile(const std::string& path,
                                     const std::vector<std::string>& overrides);
absl::StatusOr<v1::JobSpec> LoadText(const std::string& text, const std::string& file_name,
                                     const std::vector<std::string>& overrides);

// Fills in defaults and validates a spec that came over the wire; errors name the field only.
// Normalize(Normalize(x)) is Normalize(x).
absl::StatusOr<v1::JobSpec> Normalize(const v1::JobSpec& spec);

// The model as a graph, presets expanded, shapes inferred. Needs a spec that Normalize or Load
// returned.
absl::StatusOr<Graph> BuildGraph(const v1::JobSpec& spec);

// A normalized spec as YAML that LoadText reads back to an equal message; with `expand`, a preset
// as its layers, which read back to the same graph.
std::string ToYaml(const v1::JobSpec& spec, bool expand);

// data.path on this host: a relative one is below the folder that LOCKSTEP_DATA names. Called where
// the data is opened, so that a spec does not depend on the host it was written on.
// FailedPrecondition: relative and LOCKSTEP_DATA is not set.
absl::StatusOr<std::string> ResolveDataPath(const std::string& path);

}  // namespace lockstep::spec
