#include "worker/device/cpu/onednn_operations.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/device/cpu/host_memory.h"

namespace lockstep::device {
namespace {

using dnnl::memory;
using Dims = memory::dims;
using Tag = memory::format_tag;

constexpr size_t kAlignment = 64;

size_t RoundUp(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

char* Aligned(void* scratch) {
  return reinterpret_cast<char*>(RoundUp(reinterpret_cast<uintptr_t>(scratch)));
}

memory::desc Floats(const Dims& dims, Tag tag) { return {dims, memory::data_type::f32, tag}; }

dnnl::primitive_attr Attributes() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  attributes.set_fpmath_mode(dnnl::fpmath_mode::strict);  // whatever the environment says
  return attributes;
}

// The layouts of a layer's tensors; oneDNN is free to choose that of weight_any.
struct Layouts {
  memory::desc x, weight, weight_any, y, bias;
  bool has_bias;
};

// The primitives of one number of rows; BackwardWeight writes `dw_layout`, which a reorder brings
// into the logical layout.
struct RowSet {
  std::unique_ptr<Call> forward, backward_input, backward_weight, reorder_dw;
  size_t forward_weight = 0, backward_weight_copy = 0;  // index of the packed copy
  size_t dw_bytes = 0;                                  // 0: written in place
  size_t scratchpad = 0;
};

// What Dense and Conv2d share: packed weights, calls per number of rows, scratch.
class Layer {
 public:
  // y_per_row: elements of one row's output.
  Layer(const OperationContext& context, bool relu, int64_t y_per_row)
      : context_(context), relu_(relu), y_per_row_(y_per_row) {}

  template <class Traits>
  void Add(const Traits& traits, int64_t rows) {
    if (sets_.contains(rows)) return;
    const Layouts l = traits.LayoutsOf(rows);
    logical_weight_ = l.weight;
    const dnnl::primitive_attr attributes = Attributes();
    RowSet set;

    const typename Traits::Forward::primitive_desc forward(traits.ForwardDesc(l), attributes,
                                                           context_.engine);
    set.forward_weight = CopyFor(forward.weights_desc());
    std::vector<Call::Argument> arguments = {{DNNL_ARG_SRC, l.x},
                                             {DNNL_ARG_WEIGHTS, forward.weights_desc()},
                                             {DNNL_ARG_DST, l.y},
                                             {DNNL_ARG_SCRATCHPAD, forward.scratchpad_desc()}};
    if (l.has_bias) arguments.push_back({DNNL_ARG_BIAS, l.bias});
    set.forward = MakeCall(typename Traits::Forward(forward), std::move(arguments));

    const typename Traits::BackwardInput::primitive_desc input(
        traits.BackwardInputDesc(l), attributes, context_.engine, forward);
    set.backward_weight_copy = CopyFor(input.weights_desc());
    set.backward_input = MakeCall(typename Traits::BackwardInput(input),
                                  {{DNNL_ARG_DIFF_DST, l.y},
                                   {DNNL_ARG_WEIGHTS, input.weights_desc()},
                                   {DNNL_ARG_DIFF_SRC, l.x},
                                   {DNNL_ARG_SCRATCHPAD, input.scratchpad_desc()}});

    const typename Traits::BackwardWeight::primitive_desc weight(
        traits.BackwardWeightDesc(l), attributes, context_.engine, forward);
    arguments = {{DNNL_ARG_SRC, l.x},
                 {DNNL_ARG_DIFF_DST, l.y},
                 {DNNL_ARG_DIFF_WEIGHTS, weight.diff_weights_desc()},
                 {DNNL_ARG_SCRATCHPAD, weight.scratchpad_desc()}};
    if (l.has_bias) arguments.push_back({DNNL_ARG_DIFF_BIAS, l.bias});
    set.backward_weight = MakeCall(typename Traits::BackwardWeight(weight), std::move(arguments));
    size_t reorder_scratchpad = 0;
    if (weight.diff_weights_desc() != l.weight) {
      set.dw_bytes = RoundUp(weight.diff_weights_desc().get_size());
      set.reorder_dw = MakeReorder(weight.diff_weights_desc(), l.weight, &reorder_scratchpad);
    }
    set.scratchpad =
        std::max({forward.scratchpad_desc().get_size(), input.scratchpad_desc().get_size(),
                  weight.scratchpad_desc().get_size(), reorder_scratchpad});
    scratch_bytes_ = std::max(scratch_bytes_, kAlignment + set.dw_bytes + RoundUp(set.scratchpad));
    sets_.emplace(rows, std::move(set));
  }

  size_t scratch_bytes() const { return scratch_bytes_; }

  void Pack(Stream& stream, const float* weight) {
    for (const Packed& packed : copies_) {
      packed.pack->Run(Cpu(stream), {weight, packed.weights->data(), packed.scratchpad->data()});
    }
  }

  void Forward(Stream& stream, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) const {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    set->forward->Run(Cpu(stream),
                      {x, copies_[set->forward_weight].weights->data(), y, Aligned(scratch), bias});
    // Not oneDNN's fused relu: that one turns NaN into 0 and so hides what went wrong.
    if (relu_) context_.kernels->relu_forward(rows * y_per_row_, y, y);
  }

  void BackwardInput(Stream& stream, int64_t rows, const float* dy, float* dx,
                     void* scratch) const {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    set->backward_input->Run(Cpu(stream), {dy, copies_[set->backward_weight_copy].weights->data(),
                                           dx, Aligned(scratch)});
  }

  void BackwardWeight(Stream& stream, int64_t rows, const float* x, const float* dy, float* dw,
                      float* db, void* scratch) const {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    char* const work = Aligned(scratch);
    void* const target = set->dw_bytes > 0 ? static_cast<void*>(work) : dw;
    char* const scratchpad = work + set->dw_bytes;
    set->backward_weight->Run(Cpu(stream), {x, dy, target, scratchpad, db});
    if (set->dw_bytes > 0) set->reorder_dw->Run(Cpu(stream), {target, dw, scratchpad});
  }

 private:
  struct Packed {
    memory::desc layout;
    std::unique_ptr<Memory> weights, scratchpad;
    std::unique_ptr<Call> pack;
  };

  static CpuStream& Cpu(Stream& stream) { return static_cast<CpuStream&>(stream); }

  const RowSet* Find(Stream& stream, int64_t rows) const {
    const auto it = sets_.find(rows);
    if (it != sets_.end()) return &it->second;
    Cpu(stream).Fail(absl::InternalError(
        absl::StrCat("an operation was called with ", rows, " rows, for which it was not made")));
    return nullptr;
  }

  std::unique_ptr<Call> MakeCall(dnnl::primitive primitive, std::vector<Call::Argument> arguments) {
    return std::make_unique<Call>(context_.numbers, context_.engine, std::move(primitive),
                                  std::move(arguments));
  }

  std::unique_ptr<Call> MakeReorder(const memory::desc& from, const memory::desc& to,
                                    size_t* scratchpad) {
    const dnnl::reorder::primitive_desc desc(context_.engine, from, context_.engine, to,
                                             Attributes());
    *scratchpad = desc.scratchpad_desc().get_size();
    return MakeCall(
        dnnl::reorder(desc),
        {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}, {DNNL_ARG_SCRATCHPAD, desc.scratchpad_desc()}});
  }

  // The packed copy with that layout, made where it is new.
  size_t CopyFor(const memory::desc& layout) {
    for (size_t i = 0; i < copies_.size(); ++i) {
      if (copies_[i].layout == layout) return i;
    }
    Packed packed;
    packed.layout = layout;
    packed.weights = AllocateHostMemory(layout.get_size());
    size_t scratchpad = 0;
    packed.pack = MakeReorder(logical_weight_, layout, &scratchpad);
    packed.scratchpad = AllocateHostMemory(scratchpad);
    if (packed.weights == nullptr || packed.scratchpad == nullptr) {
      throw dnnl::error(dnnl_out_of_memory, "no memory for packed weights");
    }
    copies_.push_back(std::move(packed));
    return copies_.size() - 1;
  }

  const OperationContext context_;
  const bool relu_;
  const int64_t y_per_row_;
  memory::desc logical_weight_;
  std::map<int64_t, RowSet> sets_;
  std::vector<Packed> copies_;
  size_t scratch_bytes_ = 0;
};

struct DenseTraits {
  using Forward = dnnl::inner_product_forward;
  using BackwardInput = dnnl::inner_product_backward_data;
  using BackwardWeight = dnnl::inner_product_backward_weights;
  DenseShape shape;

  Layouts LayoutsOf(int64_t rows) const {
    const Dims weight = {shape.out, shape.in};
    return {Floats({rows, shape.in}, Tag::ab), Floats(weight, Tag::ab),
            Floats(weight, Tag::any),          Floats({rows, shape.out}, Tag::ab),
            Floats({shape.out}, Tag::a),       shape.bias};
  }
  Forward::desc ForwardDesc(const Layouts& l) const {
    const auto kind = dnnl::prop_kind::forward_training;
    if (!shape.bias) return {kind, l.x, l.weight_any, l.y};
    return {kind, l.x, l.weight_any, l.bias, l.y};
  }
  BackwardInput::desc BackwardInputDesc(const Layouts& l) const { return {l.x, l.weight_any, l.y}; }
  BackwardWeight::desc BackwardWeightDesc(const Layouts& l) const {
    if (!shape.bias) return {l.x, l.weight_any, l.y};
    return {l.x, l.weight_any, l.bias, l.y};
  }
};

struct Conv2dTraits {
  using Forward = dnnl::convolution_forward;
  using BackwardInput = dnnl::convolution_backward_data;
  using BackwardWeight = dnnl::convolution_backward_weights;
  static constexpr dnnl::algorithm kDirect = dnnl::algorithm::convolution_direct;
  Conv2dShape shape;

  Dims strides() const { return {shape.stride, shape.stride}; }
  Dims padding() const { return {shape.padding, shape.padding}; }
  // Less than the padding where the last rows or columns are reached by no window.
  Dims far_padding() const {
    return {(shape.out_height() - 1) * shape.stride + shape.kernel - shape.height - shape.padding,
            (shape.out_width() - 1) * shape.stride + shape.kernel - shape.width - shape.padding};
  }
  Layouts LayoutsOf(int64_t rows) const {
    const Dims weight = {shape.out, shape.in, shape.kernel, shape.kernel};
    return {Floats({rows, shape.in, shape.height, shape.width}, Tag::nhwc),
            Floats(weight, Tag::ohwi),
            Floats(weight, Tag::any),
            Floats({rows, shape.out, shape.out_height(), shape.out_width()}, Tag::nhwc),
            Floats({shape.out}, Tag::a),
            shape.bias};
  }
  Forward::desc ForwardDesc(const Layouts& l) const {
    const auto kind = dnnl::prop_kind::forward_training;
    if (!shape.bias) {
      return {kind, kDirect, l.x, l.weight_any, l.y, strides(), padding(), far_padding()};
    }
    return {kind, kDirect, l.x, l.weight_any, l.bias, l.y, strides(), padding(), far_padding()};
  }
  BackwardInput::desc BackwardInputDesc(const Layouts& l) const {
    return {kDirect, l.x, l.weight_any, l.y, strides(), padding(), far_padding()};
  }
  BackwardWeight::desc BackwardWeightDesc(const Layouts& l) const {
    if (!shape.bias) return {kDirect, l.x, l.weight_any, l.y, strides(), padding(), far_padding()};
    return {kDirect, l.x, l.weight_any, l.bias, l.y, strides(), padding(), far_padding()};
  }
};

// Dense or Conv2d over a Layer.
template <class Interface>
class Operation : public Interface {
 public:
  explicit Operation(Layer layer) : layer_(std::move(layer)) {}
  size_t scratch_bytes() const override { return layer_.scratch_bytes(); }
  void Pack(Stream& stream, const float* weight) override { layer_.Pack(stream, weight); }
  void Forward(Stream& stream, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) override {
    layer_.Forward(stream, rows, x, bias, y, scratch);
  }
  void BackwardInput(Stream& stream, int64_t rows, const float* dy, float* dx,
                     void* scratch) override {
    layer_.BackwardInput(stream, rows, dy, dx, scratch);
  }
  void BackwardWeight(Stream& stream, int64_t rows, const float* x, const float* dy, float* dw,
                      float* db, void* scratch) override {
    layer_.BackwardWeight(stream, rows, x, dy, dw, db, scratch);
  }

 private:
  Layer layer_;
};

template <class Interface, class Traits>
absl::StatusOr<std::unique_ptr<Interface>> MakeOperation(Layer layer, const Traits& traits,
                                                         absl::Span<const int64_t> rows) {
  absl::Status status = UseOneThread();
  if (!status.ok()) return status;
  for (int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("an operation was asked for ", count, " rows; at least 1 is accepted"));
    }
    try {
      layer.Add(traits, count);
    } catch (const dnnl::error& e) {
      return absl::InternalError(
          absl::StrCat("oneDNN refused an operation of ", count, " rows: ", e.what()));
    }
  }
  return std::make_unique<Operation<Interface>>(std::move(layer));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Dense>> MakeOnednnDense(const OperationContext& context,
                                                       const DenseShape& shape,
                                                       absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1) {
    return absl::InvalidArgumentError(absl::StrCat("dense of ", shape.in, " inputs and ", shape.out,
                                                   " outputs; both must be positive"));
  }
  return MakeOperation<Dense>(Layer(context, shape.activation == Activation::kRelu, shape.out),
                              DenseTraits{shape}, rows);
}

absl::StatusOr<std::unique_ptr<Conv2d>> MakeOnednnConv2d(const OperationContext& context,
                                                         const Conv2dShape& shape,
                                                         absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1 || shape.kernel < 1 || shape.stride < 1 || shape.padding < 0 ||
      shape.height + 2 * shape.padding < shape.kernel ||
      shape.width + 2 * shape.padding < shape.kernel) {
    return absl::InvalidArgumentError(absl::StrCat(
        "conv2d of ", shape.height, "x", shape.width, "x", shape.in, " to ", shape.out,
        " channels with kernel ", shape.kernel, ", stride ", shape.stride, ", padding ",
        shape.padding, "; sizes must be positive and the window must fit into the padded input"));
  }
  return MakeOperation<Conv2d>(Layer(context, shape.activation == Activation::kRelu,
                                     shape.out_height() * shape.out_width() * shape.out),
                               Conv2dTraits{shape}, rows);
}

}  // namespace lockstep::device
