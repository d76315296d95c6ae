// Small graphs that between them hold every layer, fusion and shape of DAG. Shared by the tests
// here.
#pragma once

#include <string>
#include <vector>

#include "common/spec/graph.h"

namespace lockstep::nn {

struct GraphCase {
  std::string name;
  spec::Graph graph;
};

const std::vector<GraphCase>& GraphCases();

// A random DAG over feature vectors and small images of `layers` layers or a few more.
spec::Graph RandomGraph(uint64_t seed, int layers);

}  // namespace lockstep::nn
