#include "worker/device/cpu/onednn_conv2d.h"

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

// The primitives of one number of rows; BackwardWeight writes `dw_layout`, which a reorder brings
// into the logical layout.
struct RowSet {
  std::unique_ptr<Call> forward, backward_input, backward_weight, reorder_dw;
  size_t forward_weight = 0, backward_weight_copy = 0;  // index of the packed copy
  size_t dw_bytes = 0;                                  // 0: written in place
};

class OnednnConv2d : public Conv2d {
 public:
  OnednnConv2d(const OnednnContext& context, const Conv2dShape& shape)
      : context_(context),
        s_(shape),
        weight_dims_(WeightDims(shape)),
        weight_(Floats(weight_dims_, shape.groups > 1 ? Tag::abdec : Tag::ohwi)) {}

  // Makes what `rows` rows need. Throws dnnl::error.
  void Add(int64_t rows) {
    if (sets_.contains(rows)) return;
    constexpr dnnl::algorithm kDirect = dnnl::algorithm::convolution_direct;
    const memory::desc x = Floats({rows, s_.in, s_.height, s_.width}, Tag::nhwc);
    const memory::desc y = Floats({rows, s_.out, s_.out_height(), s_.out_width()}, Tag::nhwc);
    const memory::desc bias = Floats({s_.out}, Tag::a);
    const memory::desc any = Floats(weight_dims_, Tag::any);
    const Dims strides = {s_.stride, s_.stride}, padding = {s_.padding, s_.padding};
    const Dims dilation = {s_.dilation - 1, s_.dilation - 1};
    // Less than the padding where the last rows or columns are reached by no window.
    const Dims far = {(s_.out_height() - 1) * s_.stride + s_.extent() - s_.height - s_.padding,
                      (s_.out_width() - 1) * s_.stride + s_.extent() - s_.width - s_.padding};
    const dnnl::primitive_attr attributes = Attributes();
    RowSet set;

    using ForwardPrimitive = dnnl::convolution_forward;
    const auto kind = dnnl::prop_kind::forward_training;
    const ForwardPrimitive::primitive_desc forward(
        s_.bias ? ForwardPrimitive::desc(kind, kDirect, x, any, bias, y, strides, dilation, padding,
                                         far)
                : ForwardPrimitive::desc(kind, kDirect, x, any, y, strides, dilation, padding, far),
        attributes, context_.engine);
    set.forward_weight = CopyFor(forward.weights_desc());
    std::vector<Call::Argument> arguments = {{DNNL_ARG_SRC, x},
                                             {DNNL_ARG_WEIGHTS, forward.weights_desc()},
                                             {DNNL_ARG_DST, y},
                                             {DNNL_ARG_SCRATCHPAD, forward.scratchpad_desc()}};
    if (s_.bias) arguments.push_back({DNNL_ARG_BIAS, bias});
    set.forward = MakeCall(ForwardPrimitive(forward), std::move(arguments));

    using InputPrimitive = dnnl::convolution_backward_data;
    const InputPrimitive::primitive_desc input(
        InputPrimitive::desc(kDirect, x, any, y, strides, dilation, padding, far), attributes,
        context_.engine, forward);
    set.backward_weight_copy = CopyFor(input.weights_desc());
    set.backward_input =
        MakeCall(InputPrimitive(input), {{DNNL_ARG_DIFF_DST, y},
                                         {DNNL_ARG_WEIGHTS, input.weights_desc()},
                                         {DNNL_ARG_DIFF_SRC, x},
                                         {DNNL_ARG_SCRATCHPAD, input.scratchpad_desc()}});

    using WeightPrimitive = dnnl::convolution_backward_weights;
    const WeightPrimitive::primitive_desc weight(
        s_.bias ? WeightPrimitive::desc(kDirect, x, any, bias, y, strides, dilation, padding, far)
                : WeightPrimitive::desc(kDirect, x, any, y, strides, dilation, padding, far),
        attributes, context_.engine, forward);
    arguments = {{DNNL_ARG_SRC, x},
                 {DNNL_ARG_DIFF_DST, y},
                 {DNNL_ARG_DIFF_WEIGHTS, weight.diff_weights_desc()},
                 {DNNL_ARG_SCRATCHPAD, weight.scratchpad_desc()}};
    if (s_.bias) arguments.push_back({DNNL_ARG_DIFF_BIAS, bias});
    set.backward_weight = MakeCall(WeightPrimitive(weight), std::move(arguments));
    size_t reorder_scratchpad = 0;
    if (weight.diff_weights_desc() != weight_) {
      set.dw_bytes = RoundUp(weight.diff_weights_desc().get_size());
      set.reorder_dw = MakeReorder(weight.diff_weights_desc(), weight_, &reorder_scratchpad);
    }
    const size_t scratchpad =
        std::max({forward.scratchpad_desc().get_size(), input.scratchpad_desc().get_size(),
                  weight.scratchpad_desc().get_size(), reorder_scratchpad});
    scratch_bytes_ = std::max(scratch_bytes_, kAlignment + set.dw_bytes + RoundUp(scratchpad));
    sets_.emplace(rows, std::move(set));
  }

  size_t scratch_bytes() const override { return scratch_bytes_; }

  void Pack(Stream& stream, const float* weight) override {
    for (const Packed& packed : copies_) {
      packed.pack->Run(Cpu(stream), {weight, packed.weights->data(), packed.scratchpad->data()});
    }
  }

  void Forward(Stream& stream, int64_t rows, const float* x, const float* bias, float* y,
               void* scratch) override {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    set->forward->Run(Cpu(stream),
                      {x, copies_[set->forward_weight].weights->data(), y, Aligned(scratch), bias});
    // Not oneDNN's fused relu: that one turns NaN into 0 and so hides what went wrong.
    if (s_.activation == Activation::kRelu) {
      context_.kernels->relu_forward(rows * s_.out_height() * s_.out_width() * s_.out, y, y);
    }
  }

  void BackwardInput(Stream& stream, int64_t rows, const float* dy, float* dx,
                     void* scratch) override {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    set->backward_input->Run(Cpu(stream), {dy, copies_[set->backward_weight_copy].weights->data(),
                                           dx, Aligned(scratch)});
  }

  void BackwardWeight(Stream& stream, int64_t rows, const float* x, const float* dy, float* dw,
                      float* db, void* scratch) override {
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
    packed.pack = MakeReorder(weight_, layout, &scratchpad);
    packed.scratchpad = AllocateHostMemory(scratchpad);
    if (packed.weights == nullptr || packed.scratchpad == nullptr) {
      throw dnnl::error(dnnl_out_of_memory, "no memory for packed weights");
    }
    copies_.push_back(std::move(packed));
    return copies_.size() - 1;
  }

  const OnednnContext context_;
  // Filters of a group, then their weights: oneDNN has a dimension more where there are groups.
  static Dims WeightDims(const Conv2dShape& s) {
    if (s.groups == 1) return {s.out, s.in, s.kernel, s.kernel};
    return {s.groups, s.out / s.groups, s.in / s.groups, s.kernel, s.kernel};
  }

  const Conv2dShape s_;
  const Dims weight_dims_;
  const memory::desc weight_;  // in the logical layout
  std::map<int64_t, RowSet> sets_;
  std::vector<Packed> copies_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Conv2d>> MakeOnednnConv2d(const OnednnContext& context,
                                                         const Conv2dShape& shape,
                                                         absl::Span<const int64_t> rows) {
  if (shape.in < 1 || shape.out < 1 || shape.kernel < 1 || shape.stride < 1 || shape.padding < 0 ||
      shape.dilation < 1 || shape.groups < 1 || shape.in % shape.groups != 0 ||
      shape.out % shape.groups != 0 || shape.height + 2 * shape.padding < shape.extent() ||
      shape.width + 2 * shape.padding < shape.extent()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "conv2d of ", shape.height, "x", shape.width, "x", shape.in, " to ", shape.out,
        " channels with kernel ", shape.kernel, ", stride ", shape.stride, ", padding ",
        shape.padding, ", dilation ", shape.dilation, ", groups ", shape.groups,
        "; sizes must be positive, the window must fit into the padded input, and groups divide "
        "the "
        "channels"));
  }
  absl::Status status = UseOneThread();
  if (!status.ok()) return status;
  auto conv = std::make_unique<OnednnConv2d>(context, shape);
  for (int64_t count : rows) {
    if (count < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("conv2d was asked for ", count, " rows; at least 1 is accepted"));
    }
    try {
      conv->Add(count);
    } catch (const dnnl::error& e) {
      return absl::InternalError(
          absl::StrCat("oneDNN refused a conv2d of ", count, " rows: ", e.what()));
    }
  }
  return conv;
}

}  // namespace lockstep::device
