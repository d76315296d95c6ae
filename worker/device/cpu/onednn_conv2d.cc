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

constexpr memory::data_type kFloat = memory::data_type::f32, kBf16 = memory::data_type::bf16;

// What the primitives of bf16 take: their factors in bf16, or the same values in floats where the
// library has only its generic code for that shape. A function of the shape and the rows.
enum class Factors { kFloats, kBf16, kRoundedFloats };

template <class Descriptor>
bool IsGeneric(const Descriptor& descriptor) {
  const std::string name = descriptor.impl_info_str();
  return name.rfind("jit", 0) != 0 && name.rfind("brg", 0) != 0;
}

dnnl::primitive_attr Attributes() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  attributes.set_fpmath_mode(dnnl::fpmath_mode::strict);  // whatever the environment says
  return attributes;
}

// The primitives of one number of rows; BackwardWeight writes `dw_layout`, which a reorder brings
// into the logical layout.
struct RowSet {
  Factors factors = Factors::kFloats;
  size_t x_bytes = 0, dy_bytes = 0;  // of the rounded factors, in scratch
  std::unique_ptr<Call> forward, backward_input, backward_weight, reorder_dw;
  size_t forward_weight = 0, backward_weight_copy = 0;  // index of the packed copy
  size_t dw_bytes = 0;                                  // 0: written in place
};

class OnednnConv2d : public Conv2d {
 public:
  // `rounded_weight`: WeightBytes where the precision is bf16, else null.
  OnednnConv2d(const OnednnContext& context, const Conv2dShape& shape,
               std::unique_ptr<Memory> rounded_weight)
      : context_(context),
        s_(shape),
        weight_dims_(WeightDims(shape)),
        weight_(weight_dims_, kFloat, shape.groups > 1 ? Tag::abdec : Tag::ohwi),
        rounded_weight_(std::move(rounded_weight)) {}

  const Conv2dShape& shape() const override { return s_; }

  static size_t WeightBytes(const Conv2dShape& s) {
    return static_cast<size_t>(s.out * s.kernel * s.kernel * (s.in / s.groups)) * sizeof(float);
  }

  // Makes what `rows` rows need. Throws dnnl::error.
  void Add(int64_t rows) {
    if (sets_.contains(rows)) return;
    if (s_.precision == Precision::kFp32) {
      AddWith(rows, Factors::kFloats);
    } else if (!context_.bf16 || Mistaken() || !AddWith(rows, Factors::kBf16)) {
      AddWith(rows, Factors::kRoundedFloats);
    }
  }

  // What oneDNN 2.6 gets wrong in bf16: its weight gradients of narrow dilated groups are not those
  // of the definition, or read beyond their arrays.
  bool Mistaken() const { return s_.groups > 1 || s_.dilation > 1; }

  // False where the library has only generic code for factors of bf16.
  bool AddWith(int64_t rows, Factors factors) {
    const memory::data_type type = factors == Factors::kBf16 ? kBf16 : kFloat;
    constexpr dnnl::algorithm kDirect = dnnl::algorithm::convolution_direct;
    const Dims x_dims = {rows, s_.in, s_.height, s_.width};
    const Dims y_dims = {rows, s_.out, s_.out_height(), s_.out_width()};
    const memory::desc x(x_dims, type, Tag::nhwc), dx(x_dims, kFloat, Tag::nhwc);
    const memory::desc y(y_dims, kFloat, Tag::nhwc), dy(y_dims, type, Tag::nhwc);
    const memory::desc bias({s_.out}, kFloat, Tag::a);
    const memory::desc any(weight_dims_, type, Tag::any), dw(weight_dims_, kFloat, Tag::any);
    const Dims strides = {s_.stride, s_.stride}, padding = {s_.padding, s_.padding};
    const Dims dilation = {s_.dilation - 1, s_.dilation - 1};
    // Less than the padding where the last rows or columns are reached by no window.
    const Dims far = {(s_.out_height() - 1) * s_.stride + s_.extent() - s_.height - s_.padding,
                      (s_.out_width() - 1) * s_.stride + s_.extent() - s_.width - s_.padding};
    const dnnl::primitive_attr attributes = Attributes();
    using ForwardPrimitive = dnnl::convolution_forward;
    const auto kind = dnnl::prop_kind::forward_training;
    const ForwardPrimitive::primitive_desc forward(
        s_.bias ? ForwardPrimitive::desc(kind, kDirect, x, any, bias, y, strides, dilation, padding,
                                         far)
                : ForwardPrimitive::desc(kind, kDirect, x, any, y, strides, dilation, padding, far),
        attributes, context_.engine);
    using InputPrimitive = dnnl::convolution_backward_data;
    const InputPrimitive::primitive_desc input(
        InputPrimitive::desc(kDirect, dx, any, dy, strides, dilation, padding, far), attributes,
        context_.engine, forward);
    using WeightPrimitive = dnnl::convolution_backward_weights;
    const WeightPrimitive::primitive_desc weight(
        s_.bias ? WeightPrimitive::desc(kDirect, x, dw, bias, dy, strides, dilation, padding, far)
                : WeightPrimitive::desc(kDirect, x, dw, dy, strides, dilation, padding, far),
        attributes, context_.engine, forward);
    if (factors == Factors::kBf16 &&
        (IsGeneric(forward) || IsGeneric(input) || IsGeneric(weight))) {
      return false;
    }

    RowSet set;
    set.factors = factors;
    if (factors != Factors::kFloats) {
      set.x_bytes = RoundUp(x.get_size());
      set.dy_bytes = RoundUp(dy.get_size());
    }
    set.forward_weight = CopyFor(forward.weights_desc());
    std::vector<Call::Argument> arguments = {{DNNL_ARG_SRC, x},
                                             {DNNL_ARG_WEIGHTS, forward.weights_desc()},
                                             {DNNL_ARG_DST, y},
                                             {DNNL_ARG_SCRATCHPAD, forward.scratchpad_desc()}};
    if (s_.bias) arguments.push_back({DNNL_ARG_BIAS, bias});
    set.forward = MakeCall(ForwardPrimitive(forward), std::move(arguments));
    set.backward_weight_copy = CopyFor(input.weights_desc());
    set.backward_input =
        MakeCall(InputPrimitive(input), {{DNNL_ARG_DIFF_DST, dy},
                                         {DNNL_ARG_WEIGHTS, input.weights_desc()},
                                         {DNNL_ARG_DIFF_SRC, dx},
                                         {DNNL_ARG_SCRATCHPAD, input.scratchpad_desc()}});
    arguments = {{DNNL_ARG_SRC, x},
                 {DNNL_ARG_DIFF_DST, dy},
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
    scratch_bytes_ = std::max(scratch_bytes_, kAlignment + set.x_bytes + set.dy_bytes +
                                                  set.dw_bytes + RoundUp(scratchpad));
    sets_.emplace(rows, std::move(set));
    return true;
  }

  size_t scratch_bytes() const override { return scratch_bytes_; }

  void Pack(Stream& stream, const float* weight, const uint16_t*) override {
    if (rounded_weight_ != nullptr) {
      const auto weights = static_cast<int64_t>(WeightBytes(s_) / sizeof(float));
      context_.kernels.bf16->round_in_floats(weights, weight, rounded_weight_->floats());
      weight = rounded_weight_->floats();
    }
    for (const Packed& packed : copies_) {
      packed.pack->Run(Cpu(stream), {weight, packed.weights->data(), packed.scratchpad->data()});
    }
  }

  void Forward(Stream& stream, int64_t rows, const void* x, const float* bias, void* y,
               void* scratch) override {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    char* work = Aligned(scratch);
    const void* const factor =
        Factor(*set, static_cast<const float*>(x), rows * InputSize(), set->x_bytes, &work);
    set->forward->Run(Cpu(stream),
                      {factor, copies_[set->forward_weight].weights->data(), y, work, bias});
    // Not oneDNN's fused relu: that one turns NaN into 0 and so hides what went wrong.
    if (s_.activation == Activation::kRelu) {
      auto* const floats = static_cast<float*>(y);
      context_.kernels.fp32->relu_forward(rows * OutputSize(), floats, floats);
    }
  }

  void BackwardInput(Stream& stream, int64_t rows, const void* dy, void* dx,
                     void* scratch) override {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    char* work = Aligned(scratch);
    const void* const factor =
        Factor(*set, static_cast<const float*>(dy), rows * OutputSize(), set->dy_bytes, &work);
    set->backward_input->Run(
        Cpu(stream), {factor, copies_[set->backward_weight_copy].weights->data(), dx, work});
  }

  void BackwardWeight(Stream& stream, int64_t rows, const void* x, const void* dy, float* dw,
                      float* db, void* scratch) override {
    const RowSet* set = Find(stream, rows);
    if (set == nullptr) return;
    char* work = Aligned(scratch);
    const void* const x_factor =
        Factor(*set, static_cast<const float*>(x), rows * InputSize(), set->x_bytes, &work);
    const void* const dy_factor =
        Factor(*set, static_cast<const float*>(dy), rows * OutputSize(), set->dy_bytes, &work);
    void* const target = set->dw_bytes > 0 ? static_cast<void*>(work) : dw;
    char* const scratchpad = work + set->dw_bytes;
    set->backward_weight->Run(Cpu(stream), {x_factor, dy_factor, target, scratchpad, db});
    if (set->dw_bytes > 0) set->reorder_dw->Run(Cpu(stream), {target, dw, scratchpad});
  }

 private:
  struct Packed {
    memory::desc layout;
    std::unique_ptr<Memory> weights, scratchpad;
    std::unique_ptr<Call> pack;
  };

  int64_t InputSize() const { return s_.height * s_.width * s_.in; }
  int64_t OutputSize() const { return s_.out_height() * s_.out_width() * s_.out; }

  // n floats at `from` as the set's primitives take them: where they are, or rounded at *work,
  // which is moved behind them.
  const void* Factor(const RowSet& set, const float* from, int64_t n, size_t bytes,
                     char** work) const {
    if (set.factors == Factors::kFloats) return from;
    char* const to = std::exchange(*work, *work + bytes);
    if (set.factors == Factors::kBf16) {
      context_.kernels.bf16->round(n, from, reinterpret_cast<uint16_t*>(to));
    } else {
      context_.kernels.bf16->round_in_floats(n, from, reinterpret_cast<float*>(to));
    }
    return to;
  }

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
  const memory::desc weight_;               // in the logical layout
  std::unique_ptr<Memory> rounded_weight_;  // in bf16's values
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
  if (shape.x_type != ElementType::kFp32 || shape.y_type != ElementType::kFp32) {
    return absl::InvalidArgumentError("conv2d of tensors stored as bf16; CPUs take fp32");
  }
  absl::Status status = UseOneThread();
  if (!status.ok()) return status;
  std::unique_ptr<Memory> rounded;
  if (shape.precision == Precision::kBf16) {
    rounded = AllocateHostMemory(OnednnConv2d::WeightBytes(shape));
    if (rounded == nullptr) return absl::ResourceExhaustedError("no memory for rounded weights");
  }
  auto conv = std::make_unique<OnednnConv2d>(context, shape, std::move(rounded));
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
