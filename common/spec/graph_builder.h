// Layers to Graph: order, shapes, tensors, initial scales, FLOPs. The one shape inference of the
// project. Internal to common/spec. Thread-safe: pure functions.
#pragma once

#include "common/spec/graph.h"
#include "common/spec/layers.h"
#include "common/spec/problem.h"
#include "lockstep/v1/spec.pb.h"

namespace lockstep::spec {

// layers: as CompleteLayers left them. Reads data.shape, data.classes and loss of a complete spec.
// Refuses cycles, layers that feed nothing, shapes that do not fit, tensors and outputs of more
// than 2^31 elements, and an output that the loss cannot compare with its target.
MaybeProblem MakeGraph(const v1::JobSpec& spec, const LayerList& layers, const LayerSource& source,
                       Graph* graph);

}  // namespace lockstep::spec
