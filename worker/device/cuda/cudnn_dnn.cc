#include <cuda_runtime.h>
#include <cudnn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "common/status_macros.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/dnn.h"

namespace lockstep::device::cuda {
namespace {

// What an engine may ask for at the number of rows for which it is chosen.
constexpr int64_t kMostWorkspaceBytes = int64_t{1} << 30;
// An engine for forward and the input's gradient is chosen for this many rows, or half of it, and
// so on, where tensors of so many have 2^31 elements or more.
constexpr int64_t kCanonicalRows = 128;
constexpr int64_t kMostKnobs = CUDNN_KNOB_TYPE_COUNTS;
// A trial of whether rows depend on their number takes this many, or fewer where tensors would have
// more elements than that.
constexpr int64_t kTrialRows = 64, kTrialElements = int64_t{1} << 26;

using cuda::ToStatus;
absl::Status ToStatus(cudnnStatus_t status, absl::string_view what) {
  if (status == CUDNN_STATUS_SUCCESS) return absl::OkStatus();
  std::array<char, 512> detail = {};
  cudnnGetLastErrorString(detail.data(), detail.size());
  return absl::InternalError(absl::StrCat("cuDNN: ", what, ": ", cudnnGetErrorString(status),
                                          detail[0] == 0 ? "" : ": ", detail.data()));
}

// ---- descriptors.

class Descriptor {
 public:
  Descriptor() = default;
  Descriptor(Descriptor&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(raw_, other.raw_);
    return *this;
  }
  ~Descriptor() {
    if (raw_ != nullptr) cudnnBackendDestroyDescriptor(raw_);
  }

  absl::Status Create(cudnnBackendDescriptorType_t type) {
    return ToStatus(cudnnBackendCreateDescriptor(type, &raw_), "creating a descriptor");
  }
  absl::Status Set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                   int64_t count, const void* values) {
    return ToStatus(cudnnBackendSetAttribute(raw_, name, type, count, values),
                    absl::StrCat("attribute ", static_cast<int>(name)));
  }
  absl::Status Set(cudnnBackendAttributeName_t name, int64_t value) {
    return Set(name, CUDNN_TYPE_INT64, 1, &value);
  }
  absl::Status Set(cudnnBackendAttributeName_t name, std::initializer_list<int64_t> values) {
    return Set(name, CUDNN_TYPE_INT64, static_cast<int64_t>(values.size()), values.begin());
  }
  absl::Status Set(cudnnBackendAttributeName_t name, cudnnDataType_t value) {
    return Set(name, CUDNN_TYPE_DATA_TYPE, 1, &value);
  }
  absl::Status Set(cudnnBackendAttributeName_t name, const Descriptor& value) {
    return Set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.raw_);
  }
  absl::Status Finalize(absl::string_view what) {
    return ToStatus(cudnnBackendFinalize(raw_), what);
  }
  absl::Status Get(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t most,
                   int64_t* count, void* values) const {
    return ToStatus(cudnnBackendGetAttribute(raw_, name, type, most, count, values),
                    absl::StrCat("attribute ", static_cast<int>(name)));
  }
  // Fills in descriptors that are made for the purpose, at most so many.
  absl::StatusOr<std::vector<Descriptor>> GetAll(cudnnBackendAttributeName_t name,
                                                 cudnnBackendDescriptorType_t type,
                                                 int64_t most) const {
    std::vector<Descriptor> all(static_cast<size_t>(most));
    std::vector<cudnnBackendDescriptor_t> raw;
    for (Descriptor& one : all) {
      RETURN_IF_ERROR(one.Create(type));
      raw.push_back(one.raw_);
    }
    int64_t count = 0;
    RETURN_IF_ERROR(Get(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, most, &count, raw.data()));
    all.resize(std::min(all.size(), static_cast<size_t>(count)));
    return all;
  }
  cudnnBackendDescriptor_t raw() const { return raw_; }

 private:
  cudnnBackendDescriptor_t raw_ = nullptr;
};

// ---- the problem.

constexpr int64_t kFirst = 1, kSecond = 2, kResult = 3, kSum = 4;  // ids of the tensors

struct Problem {
  ConvolutionPass pass = ConvolutionPass::kForward;
  Conv2dShape shape;
  Factors factors = Factors::kFp32;

  friend bool operator<(const Problem& a, const Problem& b) { return a.Key() < b.Key(); }
  std::tuple<ConvolutionPass, Factors, std::array<int64_t, 9>> Key() const {
    return {pass,
            factors,
            {shape.height, shape.width, shape.in, shape.out, shape.kernel, shape.stride,
             shape.padding, shape.dilation, shape.groups}};
  }

  int64_t Inputs() const { return shape.height * shape.width * shape.in; }  // of a row
  int64_t Outputs() const { return shape.out_height() * shape.out_width() * shape.out; }
  int64_t Weights() const {
    return shape.out * shape.kernel * shape.kernel * (shape.in / shape.groups);
  }
  std::string Describe(int64_t rows) const {
    static constexpr std::array<absl::string_view, 3> kPasses = {"forward", "backward input",
                                                                 "backward weight"};
    static constexpr std::array<absl::string_view, 3> kFactors = {"fp32", "tf32", "bf16"};
    return absl::StrCat(kFactors[static_cast<size_t>(factors)], " convolution, ",
                        kPasses[static_cast<size_t>(pass)], ", of ", rows, " rows of ",
                        shape.height, "x", shape.width, "x", shape.in, " to ", shape.out,
                        " channels, kernel ", shape.kernel, ", stride ", shape.stride, ", padding ",
                        shape.padding, ", dilation ", shape.dilation, ", groups ", shape.groups);
  }
};

// An engine and its settings, which serve any number of rows.
struct Engine {
  int64_t index = -1;
  std::vector<std::pair<cudnnBackendKnobType_t, int64_t>> knobs;
  friend bool operator==(const Engine&, const Engine&) = default;
  std::string Name() const {
    std::string name = absl::StrCat("engine ", index);
    for (const auto& [type, value] : knobs) {
      absl::StrAppend(&name, " k", static_cast<int>(type), "=", value);
    }
    return name;
  }
};

// Four dimensions in the order N C H W, of which C is the innermost in memory.
absl::StatusOr<Descriptor> MakeTensor(int64_t id, cudnnDataType_t type,
                                      const std::array<int64_t, 4>& sizes) {
  const auto& [n, c, h, w] = sizes;
  Descriptor tensor;
  RETURN_IF_ERROR(tensor.Create(CUDNN_BACKEND_TENSOR_DESCRIPTOR));
  RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_DATA_TYPE, type));
  RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_DIMENSIONS, {n, c, h, w}));
  RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_STRIDES, {h * w * c, 1, w * c, c}));
  RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id));
  // Tensors begin at multiples of 64 bytes; rows that are taken out of them where they begin.
  const int64_t row_bytes = h * w * c * (type == CUDNN_DATA_FLOAT ? 4 : 2);
  RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, std::gcd(row_bytes, int64_t{16})));
  if (id == kSum) {
    const bool is_virtual = true;
    RETURN_IF_ERROR(tensor.Set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual));
  }
  RETURN_IF_ERROR(tensor.Finalize("a tensor"));
  return tensor;
}

// `to` = `from`, both floats.
absl::StatusOr<Descriptor> MakeIdentity(const Descriptor& from, const Descriptor& to) {
  Descriptor identity, operation;
  RETURN_IF_ERROR(identity.Create(CUDNN_BACKEND_POINTWISE_DESCRIPTOR));
  const cudnnPointwiseMode_t mode = CUDNN_POINTWISE_IDENTITY;
  RETURN_IF_ERROR(identity.Set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode));
  RETURN_IF_ERROR(identity.Set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_DATA_FLOAT));
  RETURN_IF_ERROR(identity.Finalize("the identity"));
  RETURN_IF_ERROR(operation.Create(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR));
  RETURN_IF_ERROR(operation.Set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, identity));
  RETURN_IF_ERROR(operation.Set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, from));
  RETURN_IF_ERROR(operation.Set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, to));
  RETURN_IF_ERROR(operation.Finalize("the identity's operation"));
  return operation;
}

// No engine for one operation has factors of bf16 and a result of floats; those that are compiled
// for a graph have, if something follows the convolution. Of a forward pass they are compiled for
// all shapes at once. Of a gradient they would be for each, which takes seconds; there, floats are
// multiplied by tensor cores as tf32, which holds a bf16 whole.
bool IsCompiled(cudnnDataType_t type) { return type == CUDNN_DATA_BFLOAT16; }

// The operation graph of one convolution with factors of `type`.
absl::StatusOr<Descriptor> MakeGraph(cudnnHandle_t handle, const Problem& p, int64_t rows,
                                     cudnnDataType_t type) {
  const Conv2dShape& s = p.shape;
  Descriptor convolution;
  RETURN_IF_ERROR(convolution.Create(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR));
  const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, 2));
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_DATA_FLOAT));
  RETURN_IF_ERROR(
      convolution.Set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode));
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, {s.padding, s.padding}));
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, {s.padding, s.padding}));
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_DILATIONS, {s.dilation, s.dilation}));
  RETURN_IF_ERROR(convolution.Set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, {s.stride, s.stride}));
  RETURN_IF_ERROR(convolution.Finalize("a convolution"));

  // Which of x, w and y are which of the factors and the result.
  enum Tensor { kX, kW, kY };
  struct Names {
    cudnnBackendDescriptorType_t operation;
    cudnnBackendAttributeName_t alpha, beta, convolution;
    std::array<cudnnBackendAttributeName_t, 3> tensors;
    std::array<int64_t, 3> ids;
  };
  static constexpr std::array<Names, 3> kNames = {
      Names{CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
            {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
             CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y},
            {kFirst, kSecond, kResult}},
      Names{CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
            {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
             CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
             CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY},
            {kResult, kSecond, kFirst}},
      Names{CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
            {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
             CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
             CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY},
            {kSecond, kResult, kFirst}}};
  const Names& names = kNames[static_cast<size_t>(p.pass)];
  // The channels of a filter say how many groups there are.
  const std::array<std::array<int64_t, 4>, 3> sizes = {
      {{rows, s.in, s.height, s.width},
       {s.out, s.in / s.groups, s.kernel, s.kernel},
       {rows, s.out, s.out_height(), s.out_width()}}};
  Descriptor operation, result, identity;
  RETURN_IF_ERROR(operation.Create(names.operation));
  const float alpha = 1, beta = 0;
  RETURN_IF_ERROR(operation.Set(names.alpha, CUDNN_TYPE_FLOAT, 1, &alpha));
  RETURN_IF_ERROR(operation.Set(names.beta, CUDNN_TYPE_FLOAT, 1, &beta));
  RETURN_IF_ERROR(operation.Set(names.convolution, convolution));
  for (const Tensor tensor : {kX, kW, kY}) {
    const int64_t id = names.ids[tensor];
    const bool is_sum = id == kResult && IsCompiled(type);
    ASSIGN_OR_RETURN(
        const Descriptor made,
        MakeTensor(is_sum ? kSum : id, id == kResult ? CUDNN_DATA_FLOAT : type, sizes[tensor]));
    RETURN_IF_ERROR(operation.Set(names.tensors[tensor], made));
    if (!is_sum) continue;
    ASSIGN_OR_RETURN(result, MakeTensor(kResult, CUDNN_DATA_FLOAT, sizes[tensor]));
    ASSIGN_OR_RETURN(identity, MakeIdentity(made, result));
  }
  RETURN_IF_ERROR(operation.Finalize("the operation"));

  Descriptor graph;
  RETURN_IF_ERROR(graph.Create(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR));
  RETURN_IF_ERROR(graph.Set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle));
  const std::array<cudnnBackendDescriptor_t, 2> operations = {operation.raw(), identity.raw()};
  RETURN_IF_ERROR(graph.Set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                            identity.raw() == nullptr ? 1 : 2, operations.data()));
  if (IsCompiled(type)) {
    const bool any_shape = true;
    RETURN_IF_ERROR(graph.Set(CUDNN_ATTR_OPERATIONGRAPH_IS_DYNAMIC_SHAPE_ENABLED,
                              CUDNN_TYPE_BOOLEAN, 1, &any_shape));
  }
  RETURN_IF_ERROR(graph.Finalize("the operation graph"));
  return graph;
}

// ---- engines.

// The engine of a configuration, if its results are a function of its arguments and round nothing
// more than the factors say. Fast transforms and Winograd's round the factors once more, and spread
// what is infinite or NaN over a tile; products of another library are chosen by that one for each
// number of rows.
absl::StatusOr<Engine> FitEngine(const Descriptor& configuration, const Problem& problem) {
  Descriptor engine;
  RETURN_IF_ERROR(engine.Create(CUDNN_BACKEND_ENGINE_DESCRIPTOR));
  cudnnBackendDescriptor_t raw = engine.raw();
  int64_t count = 0;
  RETURN_IF_ERROR(configuration.Get(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1,
                                    &count, &raw));
  std::array<cudnnBackendNumericalNote_t, CUDNN_NUMERICAL_NOTE_TYPE_COUNT> notes;
  RETURN_IF_ERROR(engine.Get(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                             static_cast<int64_t>(notes.size()), &count, notes.data()));
  for (int64_t i = 0; i < count; ++i) {
    switch (notes[static_cast<size_t>(i)]) {
      case CUDNN_NUMERICAL_NOTE_TENSOR_CORE:
        if (problem.factors != Factors::kFp32) break;
        [[fallthrough]];
      case CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC:
      case CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS:
      case CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION:
      case CUDNN_NUMERICAL_NOTE_FFT:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_4x4:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_6x6:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13:
        return absl::NotFoundError("unfit");
      default:
        break;
    }
  }
  std::array<cudnnBackendBehaviorNote_t, CUDNN_BEHAVIOR_NOTE_TYPE_COUNT> behavior;
  RETURN_IF_ERROR(engine.Get(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, CUDNN_TYPE_BEHAVIOR_NOTE,
                             static_cast<int64_t>(behavior.size()), &count, behavior.data()));
  if (problem.pass != ConvolutionPass::kBackwardWeight &&
      std::find(behavior.begin(), behavior.begin() + count,
                CUDNN_BEHAVIOR_NOTE_CUBLASLT_DEPENDENCY) != behavior.begin() + count) {
    return absl::NotFoundError("unfit");
  }
  Engine result;
  RETURN_IF_ERROR(
      engine.Get(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &count, &result.index));
  ASSIGN_OR_RETURN(const std::vector<Descriptor> choices,
                   configuration.GetAll(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES,
                                        CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, kMostKnobs));
  for (const Descriptor& choice : choices) {
    std::pair<cudnnBackendKnobType_t, int64_t> knob;
    RETURN_IF_ERROR(
        choice.Get(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &count, &knob.first));
    RETURN_IF_ERROR(
        choice.Get(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, 1, &count, &knob.second));
    result.knobs.push_back(knob);
  }
  return result;
}

// The fit ones that a heuristic proposes for the graph, best first.
absl::StatusOr<std::vector<Engine>> Propose(const Descriptor& graph, cudnnBackendHeurMode_t mode,
                                            const Problem& problem) {
  Descriptor heuristic;
  RETURN_IF_ERROR(heuristic.Create(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR));
  RETURN_IF_ERROR(heuristic.Set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph));
  RETURN_IF_ERROR(heuristic.Set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode));
  RETURN_IF_ERROR(heuristic.Finalize("a heuristic"));
  int64_t count = 0;
  RETURN_IF_ERROR(heuristic.Get(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0,
                                &count, nullptr));
  ASSIGN_OR_RETURN(
      const std::vector<Descriptor> configurations,
      heuristic.GetAll(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, count));
  std::vector<Engine> engines;
  for (const Descriptor& configuration : configurations) {
    absl::StatusOr<Engine> engine = FitEngine(configuration, problem);
    if (engine.ok()) engines.push_back(*std::move(engine));
  }
  return engines;
}

// An engine, set up for a graph.
struct ExecutionPlan {
  Descriptor plan;
  int64_t workspace_bytes = 0;
};

// `kernels`: a cache of compiled ones, or null.
absl::StatusOr<ExecutionPlan> MakeExecutionPlan(cudnnHandle_t handle, const Descriptor& graph,
                                                const Engine& chosen, const Descriptor* kernels) {
  Descriptor engine;
  RETURN_IF_ERROR(engine.Create(CUDNN_BACKEND_ENGINE_DESCRIPTOR));
  RETURN_IF_ERROR(engine.Set(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, graph));
  RETURN_IF_ERROR(engine.Set(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, chosen.index));
  RETURN_IF_ERROR(engine.Finalize("an engine"));
  std::vector<Descriptor> choices(chosen.knobs.size());
  std::vector<cudnnBackendDescriptor_t> raw;
  for (size_t i = 0; i < choices.size(); ++i) {
    RETURN_IF_ERROR(choices[i].Create(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR));
    RETURN_IF_ERROR(choices[i].Set(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1,
                                   &chosen.knobs[i].first));
    RETURN_IF_ERROR(choices[i].Set(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, chosen.knobs[i].second));
    RETURN_IF_ERROR(choices[i].Finalize("a knob's choice"));
    raw.push_back(choices[i].raw());
  }
  Descriptor configuration;
  RETURN_IF_ERROR(configuration.Create(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR));
  RETURN_IF_ERROR(configuration.Set(CUDNN_ATTR_ENGINECFG_ENGINE, engine));
  if (!raw.empty()) {
    RETURN_IF_ERROR(configuration.Set(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES,
                                      CUDNN_TYPE_BACKEND_DESCRIPTOR,
                                      static_cast<int64_t>(raw.size()), raw.data()));
  }
  RETURN_IF_ERROR(configuration.Finalize("an engine's configuration"));
  ExecutionPlan result;
  RETURN_IF_ERROR(result.plan.Create(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR));
  RETURN_IF_ERROR(result.plan.Set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle));
  RETURN_IF_ERROR(result.plan.Set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configuration));
  if (kernels != nullptr) {
    RETURN_IF_ERROR(result.plan.Set(CUDNN_ATTR_EXECUTION_PLAN_KERNEL_CACHE, *kernels));
  }
  RETURN_IF_ERROR(result.plan.Finalize("an execution plan"));
  int64_t count = 0;
  RETURN_IF_ERROR(result.plan.Get(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                                  &count, &result.workspace_bytes));
  return result;
}

absl::Status Execute(cudnnHandle_t handle, const ExecutionPlan& execution, const void* first,
                     const void* second, float* result, void* workspace) {
  Descriptor pack;
  RETURN_IF_ERROR(pack.Create(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR));
  const std::array<const void*, 3> pointers = {first, second, result};
  RETURN_IF_ERROR(pack.Set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, {kFirst, kSecond, kResult}));
  RETURN_IF_ERROR(
      pack.Set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, 3, pointers.data()));
  RETURN_IF_ERROR(pack.Set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace));
  RETURN_IF_ERROR(pack.Finalize("a call's arguments"));
  return ToStatus(cudnnBackendExecute(handle, execution.plan.raw(), pack.raw()),
                  "cudnnBackendExecute");
}

// ---- the library.

// A handle for each stream: what a handle holds of the library (streams and memory of its own) is
// then ordered like the stream. Made at the first call on a stream, which is not a captured one.
class Handles {
 public:
  ~Handles() {
    for (const auto& [stream, handle] : by_stream_) cudnnDestroy(handle);
  }
  absl::StatusOr<cudnnHandle_t> Of(cudaStream_t stream) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    cudnnHandle_t& handle = by_stream_[stream];
    if (handle == nullptr) {
      RETURN_IF_ERROR(ToStatus(cudnnCreate(&handle), "a handle"));
      RETURN_IF_ERROR(ToStatus(cudnnSetStream(handle, stream), "a handle's stream"));
    }
    return handle;
  }

 private:
  absl::Mutex mutex_;
  std::map<cudaStream_t, cudnnHandle_t> by_stream_ ABSL_GUARDED_BY(mutex_);
};

// What is shared by all convolutions of one problem and number of rows. Immutable.
struct Plan {
  Problem problem;
  int64_t rows = 0;
  // Factors of bf16 are floats of the same values.
  bool takes_floats = false;
  Engine engine;
  ExecutionPlan execution;

  cudnnDataType_t type() const {
    return problem.factors == Factors::kBf16 && !takes_floats ? CUDNN_DATA_BFLOAT16
                                                              : CUDNN_DATA_FLOAT;
  }

  // What is chosen of it, for the book: "1 29 7=2 23=4" is floats, the engine, and its knobs.
  std::string Choice() const {
    std::string text = absl::StrCat(takes_floats ? 1 : 0, " ", engine.index);
    for (const auto& [knob, value] : engine.knobs) {
      absl::StrAppend(&text, " ", static_cast<int>(knob), "=", value);
    }
    return text;
  }
  // False: it is no choice.
  bool TakeChoice(absl::string_view text) {
    const std::vector<absl::string_view> words = absl::StrSplit(text, ' ');
    int floats = 0;
    if (words.size() < 2 || !absl::SimpleAtoi(words[0], &floats) ||
        !absl::SimpleAtoi(words[1], &engine.index)) {
      return false;
    }
    takes_floats = floats != 0;
    engine.knobs.clear();
    for (size_t i = 2; i < words.size(); ++i) {
      const std::pair<absl::string_view, absl::string_view> parts =
          absl::StrSplit(words[i], absl::MaxSplits('=', 1));
      int knob = 0;
      int64_t value = 0;
      if (!absl::SimpleAtoi(parts.first, &knob) || !absl::SimpleAtoi(parts.second, &value)) {
        return false;
      }
      engine.knobs.emplace_back(static_cast<cudnnBackendKnobType_t>(knob), value);
    }
    return true;
  }
};

class CudnnConvolution : public Convolution {
 public:
  CudnnConvolution(std::shared_ptr<Handles> handles, std::shared_ptr<const Plan> plan)
      : handles_(std::move(handles)), plan_(std::move(plan)) {}

  size_t workspace_bytes() const override {
    return static_cast<size_t>(plan_->execution.workspace_bytes);
  }
  bool takes_floats() const override { return plan_->takes_floats; }

  void Run(const Queue& queue, const void* first, const void* second, float* result,
           void* workspace) override {
    const absl::Status status = Execute(queue, first, second, result, workspace);
    if (status.ok()) return;
    Fail(queue, absl::StrCat(status.message(), "; in a ", plan_->problem.Describe(plan_->rows)));
  }

  std::string algorithm() const override {
    return absl::StrCat(plan_->engine.Name(), plan_->type() == CUDNN_DATA_BFLOAT16 ? " on bf16"
                                              : plan_->takes_floats ? " on bf16 in floats"
                                                                    : "");
  }

 private:
  absl::Status Execute(const Queue& queue, const void* first, const void* second, float* result,
                       void* workspace) const {
    ASSIGN_OR_RETURN(const cudnnHandle_t handle, handles_->Of(queue.stream));
    return cuda::Execute(handle, plan_->execution, first, second, result, workspace);
  }

  const std::shared_ptr<Handles> handles_;
  const std::shared_ptr<const Plan> plan_;
};

// Device memory of a trial.
class TrialMemory {
 public:
  ~TrialMemory() { cudaFree(data_); }
  absl::Status Allocate(int64_t bytes) {
    return ToStatus(cudaMalloc(&data_, static_cast<size_t>(bytes)),
                    absl::StrCat("allocating ", bytes, " bytes for a trial of a convolution"));
  }
  char* data() const { return static_cast<char*>(data_); }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
};

// Fills memory with values of [-1, 1) that are bf16, as such or as floats.
absl::Status FillForTrial(cudnnDataType_t type, const TrialMemory& memory, int64_t bytes,
                          cudaStream_t stream) {
  // Of a length that rows are no multiple of.
  constexpr size_t kPattern = 1000003;
  std::vector<uint32_t> floats(kPattern);
  uint64_t state = 1;
  for (uint32_t& bits : floats) {
    state = state * 6364136223846793005 + 1442695040888963407;
    const float value =
        static_cast<float>(static_cast<int64_t>(state >> 40) - (1 << 23)) * 0x1p-23f;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= 0xffff0000u;
  }
  std::vector<uint16_t> halves;
  for (const uint32_t bits : floats) halves.push_back(static_cast<uint16_t>(bits >> 16));
  const bool bf16 = type == CUDNN_DATA_BFLOAT16;
  const void* const pattern = bf16 ? static_cast<const void*>(halves.data()) : floats.data();
  const auto size = static_cast<size_t>(bytes);
  size_t filled = std::min(size, kPattern * (bf16 ? sizeof(uint16_t) : sizeof(float)));
  cudaError_t error = cudaMemcpyAsync(memory.data(), pattern, filled, cudaMemcpyDefault, stream);
  while (error == cudaSuccess && filled < size) {
    const size_t more = std::min(filled, size - filled);
    error = cudaMemcpyAsync(memory.data() + filled, memory.data(), more, cudaMemcpyDefault, stream);
    filled += more;
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  return ToStatus(error, "filling a trial's memory");
}

class CudnnDnn : public Dnn {
 public:
  // Of the handle's stream.
  CudnnDnn(cudnnHandle_t handle, cudaStream_t stream, std::shared_ptr<AlgorithmBook> book)
      : handle_(handle), stream_(stream), book_(std::move(book)) {}
  ~CudnnDnn() override {
    plans_.clear();
    cudnnDestroy(handle_);
    cudaStreamDestroy(stream_);
  }

  std::string version() const override {
    const size_t version = cudnnGetVersion();
    return absl::StrCat("cudnn ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  }

  absl::StatusOr<std::unique_ptr<Convolution>> MakeConvolution(ConvolutionPass pass,
                                                               const Conv2dShape& shape,
                                                               int64_t rows,
                                                               Factors factors) override {
    const Problem problem = {pass, shape, factors};
    if (rows < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("a ", problem.Describe(rows), "; at least 1 row is accepted"));
    }
    absl::MutexLock lock(&mutex_);
    ASSIGN_OR_RETURN(std::shared_ptr<const Plan> plan, PlanOf(problem, rows));
    return std::make_unique<CudnnConvolution>(handles_, std::move(plan));
  }

 private:
  absl::StatusOr<std::shared_ptr<const Plan>> PlanOf(const Problem& problem, int64_t rows)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const int64_t canonical = CanonicalRows(problem, rows);
    const std::string key =
        absl::StrCat("cudnn ", cudnnGetVersion(), " ", problem.Describe(canonical));
    const std::optional<std::string> given = book_->Find(key);
    const auto it = plans_.find({problem, rows});
    if (it != plans_.end() && it->second->Choice() == given) return it->second;
    auto plan = std::make_shared<Plan>();
    plan->problem = problem;
    plan->rows = rows;
    if (rows == canonical && given.has_value()) {
      RETURN_IF_ERROR(Take(*given, plan.get()));
    } else if (rows == canonical) {
      RETURN_IF_ERROR(Choose(plan.get()));
      book_->Add(key, plan->Choice());
    } else {
      ASSIGN_OR_RETURN(const std::shared_ptr<const Plan> chosen, PlanOf(problem, canonical));
      plan->takes_floats = chosen->takes_floats;
      plan->engine = chosen->engine;
      absl::StatusOr<ExecutionPlan> execution = Build(*plan);
      if (!execution.ok()) {
        return absl::UnimplementedError(absl::StrCat(
            version(), ": ", plan->engine.Name(), ", chosen at ", canonical, " rows, cannot do a ",
            problem.Describe(rows), ": ", execution.status().message()));
      }
      plan->execution = *std::move(execution);
    }
    plans_[{problem, rows}] = plan;
    return plan;
  }

  // Fills in the engine that the book names.
  absl::Status Take(const std::string& choice, Plan* plan) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto refuse = [&](absl::string_view why) {
      return absl::FailedPreconditionError(
          absl::StrCat("this GPU cannot compute a ", plan->problem.Describe(plan->rows),
                       " by the job's algorithm, ", plan->engine.Name(), ": ", why));
    };
    if (!plan->TakeChoice(choice)) return refuse("its description does not parse");
    absl::StatusOr<ExecutionPlan> execution = Build(*plan);
    if (!execution.ok()) return refuse(execution.status().message());
    ASSIGN_OR_RETURN(const bool independent, RowsAreIndependent(*plan));
    if (!independent) return refuse("a row's bits depend on how many there are");
    plan->execution = *std::move(execution);
    return absl::OkStatus();
  }

  // The number of rows for which the engine is chosen. A weight gradient's bits depend on its rows
  // anyway.
  static int64_t CanonicalRows(const Problem& problem, int64_t rows) {
    if (problem.pass == ConvolutionPass::kBackwardWeight) return rows;
    int64_t canonical = kCanonicalRows;
    const int64_t widest = std::max(problem.Inputs(), problem.Outputs());
    while (canonical > 1 && canonical * widest >= int64_t{1} << 31) canonical /= 2;
    return canonical;
  }

  // Fills in the first fit engine, and how it takes its factors.
  absl::Status Choose(Plan* plan) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::string reasons;
    const bool bf16 = plan->problem.factors == Factors::kBf16;
    const bool compiled = plan->problem.pass == ConvolutionPass::kForward;
    for (const bool takes_floats :
         bf16 ? compiled ? std::vector<bool>{false, true} : std::vector<bool>{true}
              : std::vector<bool>{false}) {
      plan->takes_floats = takes_floats;
      ASSIGN_OR_RETURN(const Descriptor graph, Graph(*plan));
      ASSIGN_OR_RETURN(const Descriptor* const kernels, KernelsFor(*plan, graph));
      std::vector<Engine> tried;
      for (const cudnnBackendHeurMode_t mode :
           {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_B, CUDNN_HEUR_MODE_FALLBACK}) {
        absl::StatusOr<std::vector<Engine>> engines = Propose(graph, mode, plan->problem);
        if (!engines.ok()) {
          absl::StrAppend(&reasons, "; ", engines.status().message());
          continue;
        }
        for (const Engine& engine : *engines) {
          if (std::find(tried.begin(), tried.end(), engine) != tried.end()) continue;
          tried.push_back(engine);
          absl::StatusOr<ExecutionPlan> execution =
              MakeExecutionPlan(handle_, graph, engine, kernels);
          if (!execution.ok() || execution->workspace_bytes > kMostWorkspaceBytes) continue;
          plan->engine = engine;
          ASSIGN_OR_RETURN(const bool independent, RowsAreIndependent(*plan));
          if (!independent) continue;
          plan->execution = *std::move(execution);
          return absl::OkStatus();
        }
      }
      absl::StrAppend(&reasons, "; none of ", tried.size(), " fit engines takes ",
                      plan->type() == CUDNN_DATA_BFLOAT16 ? "bf16" : "floats",
                      " and gives a row the same bits in every call");
    }
    return absl::UnimplementedError(
        absl::StrCat(version(), ": a ", plan->problem.Describe(plan->rows), reasons));
  }

  // Whether the plan's engine gives rows the same bits in calls of other numbers of rows. Some, of
  // tensor cores, add up in an order that depends on which block has a row, and do not say so: they
  // are tried.
  absl::StatusOr<bool> RowsAreIndependent(const Plan& plan) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Problem& problem = plan.problem;
    if (problem.pass == ConvolutionPass::kBackwardWeight) return true;
    const bool forward = problem.pass == ConvolutionPass::kForward;
    const int64_t factor_row = forward ? problem.Inputs() : problem.Outputs();
    const int64_t result_row = forward ? problem.Outputs() : problem.Inputs();
    const int64_t all =
        std::clamp(kTrialElements / std::max(factor_row, result_row), int64_t{2}, kTrialRows);
    std::vector<int64_t> counts = {all, all / 2, 3, 1};
    counts.erase(std::remove_if(counts.begin() + 1, counts.end(),
                                [all](int64_t rows) { return rows >= all; }),
                 counts.end());
    std::vector<ExecutionPlan> executions;
    int64_t workspace_bytes = 0;
    for (const int64_t rows : counts) {
      Plan part;
      part.problem = problem;
      part.rows = rows;
      part.takes_floats = plan.takes_floats;
      part.engine = plan.engine;
      absl::StatusOr<ExecutionPlan> execution = Build(part);
      if (!execution.ok()) return false;
      workspace_bytes = std::max(workspace_bytes, execution->workspace_bytes);
      executions.push_back(*std::move(execution));
    }
    const int64_t bytes = plan.type() == CUDNN_DATA_BFLOAT16 ? 2 : 4;
    const int64_t row_bytes = result_row * static_cast<int64_t>(sizeof(float));
    TrialMemory factor, weights, whole, part, workspace;
    RETURN_IF_ERROR(factor.Allocate(all * factor_row * bytes));
    RETURN_IF_ERROR(weights.Allocate(problem.Weights() * bytes));
    RETURN_IF_ERROR(whole.Allocate(all * row_bytes));
    RETURN_IF_ERROR(part.Allocate(all * row_bytes));
    RETURN_IF_ERROR(workspace.Allocate(std::max<int64_t>(workspace_bytes, 1)));
    RETURN_IF_ERROR(FillForTrial(plan.type(), factor, all * factor_row * bytes, stream_));
    RETURN_IF_ERROR(FillForTrial(plan.type(), weights, problem.Weights() * bytes, stream_));
    const auto run = [&](const ExecutionPlan& execution, int64_t row, float* result) {
      return Execute(handle_, execution, factor.data() + row * factor_row * bytes, weights.data(),
                     result, workspace.data());
    };
    const auto read = [&](const TrialMemory& memory, int64_t row, std::vector<uint32_t>* values) {
      values->resize(static_cast<size_t>(result_row));
      cudaError_t error =
          cudaMemcpyAsync(values->data(), memory.data() + row * row_bytes,
                          static_cast<size_t>(row_bytes), cudaMemcpyDefault, stream_);
      if (error == cudaSuccess) error = cudaStreamSynchronize(stream_);
      return ToStatus(error, "trying a convolution");
    };
    RETURN_IF_ERROR(run(executions[0], 0, whole.floats()));
    std::vector<uint32_t> expected, actual;
    for (size_t i = 1; i < counts.size(); ++i) {
      const int64_t rows = counts[i];
      for (const int64_t first : {all - rows, all - rows - 1, int64_t{0}}) {
        RETURN_IF_ERROR(run(executions[i], first, part.floats()));
        for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
          RETURN_IF_ERROR(read(part, row, &actual));
          RETURN_IF_ERROR(read(whole, first + row, &expected));
          if (actual != expected) return false;
        }
      }
    }
    return true;
  }

  absl::StatusOr<Descriptor> Graph(const Plan& plan) const {
    return MakeGraph(handle_, plan.problem, plan.rows, plan.type());
  }
  absl::StatusOr<ExecutionPlan> Build(const Plan& plan) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ASSIGN_OR_RETURN(const Descriptor graph, Graph(plan));
    ASSIGN_OR_RETURN(const Descriptor* const kernels, KernelsFor(plan, graph));
    return MakeExecutionPlan(handle_, graph, plan.engine, kernels);
  }
  // The cache of compiled kernels, where the plan takes part in it.
  absl::StatusOr<const Descriptor*> KernelsFor(const Plan& plan, const Descriptor& graph)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!IsCompiled(plan.type())) return nullptr;
    if (kernels_.raw() == nullptr) {
      Descriptor kernels;
      RETURN_IF_ERROR(kernels.Create(CUDNN_BACKEND_KERNEL_CACHE_DESCRIPTOR));
      RETURN_IF_ERROR(kernels.Set(CUDNN_ATTR_KERNEL_CACHE_OPERATION_GRAPH, graph));
      RETURN_IF_ERROR(kernels.Finalize("a cache of kernels"));
      kernels_ = std::move(kernels);
    }
    return &kernels_;
  }

  // For making plans and trials.
  const cudnnHandle_t handle_;
  const cudaStream_t stream_;
  const std::shared_ptr<AlgorithmBook> book_;
  const std::shared_ptr<Handles> handles_ = std::make_shared<Handles>();
  absl::Mutex mutex_;
  Descriptor kernels_ ABSL_GUARDED_BY(mutex_);
  // Layers of equal shapes share theirs.
  std::map<std::pair<Problem, int64_t>, std::shared_ptr<const Plan>> plans_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dnn>> MakeDnn(std::shared_ptr<AlgorithmBook> book) {
  cudaStream_t stream = nullptr;
  RETURN_IF_ERROR(
      ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream"));
  cudnnHandle_t handle = nullptr;
  cudnnStatus_t status = cudnnCreate(&handle);
  if (status == CUDNN_STATUS_SUCCESS) status = cudnnSetStream(handle, stream);
  if (status != CUDNN_STATUS_SUCCESS) {
    if (handle != nullptr) cudnnDestroy(handle);
    cudaStreamDestroy(stream);
    return absl::UnavailableError(
        absl::StrCat("cuDNN cannot be used: ", cudnnGetErrorString(status)));
  }
  if (book == nullptr) book = std::make_shared<AlgorithmBook>();
  return std::make_unique<CudnnDnn>(handle, stream, std::move(book));
}

}  // namespace lockstep::device::cuda
