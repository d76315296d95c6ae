// Defaults and validation of a whole spec. Internal to common/spec. Thread-safe: pure functions.
#pragma once

#include "common/spec/graph.h"
#include "common/spec/layers.h"
#include "common/spec/problem.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

// Makes every default of `spec` explicit and checks it, the model's graph included, which it
// returns in `graph`. Idempotent. `sources` (may be empty) only decides which of two fields that
// disagree is blamed: the one that an override set.
MaybeProblem Complete(const SourceMap& sources, v1::JobSpec* spec, Graph* graph);

// The complete layers of a complete model: its own, or what its preset expands to.
LayerList CompleteLayerList(const v1::JobSpec& spec);

}  // namespace lockstep::spec
