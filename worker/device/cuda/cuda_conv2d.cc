#include "worker/device/cuda/cuda_conv2d.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/device/cuda/cuda_stream.h"
#include "worker/device/cuda/kernels.h"

namespace lockstep::device::cuda {
namespace {

// Whether the vendor's library computes it, which serves listed rows alone, and each leaf by
// itself.
bool UsesLibrary(const Conv2dShape& shape) { return shape.precision == Precision::kTf32; }

// Of what only tensor cores take otherwise.
const float* Floats(const void* p) { return static_cast<const float*>(p); }
float* Floats(void* p) { return static_cast<float*>(p); }

class CudaConv2d : public Conv2d {
 public:
  static absl::StatusOr<std::unique_ptr<Conv2d>> Make(Device& device, Dnn& dnn,
                                                      const Conv2dShape& shape,
                                                      absl::Span<const int64_t> rows) {
    auto conv = std::make_unique<CudaConv2d>(shape);
    if (conv->kernels_ == Kernels::kPlain) return conv;
    if (conv->kernels_ == Kernels::kTensor) {
      ASSIGN_OR_RETURN(conv->packed_, device.Allocate(PackedWeightBytes(shape)));
      conv->scratch_bytes_ = TensorScratchBytes(shape);
      return conv;
    }
    for (const int64_t count : rows) RETURN_IF_ERROR(conv->Add(dnn, count));
    return conv;
  }

  explicit CudaConv2d(const Conv2dShape& shape)
      : s_(shape),
        kernels_(UsesLibrary(shape)                    ? Kernels::kLibrary
                 : shape.precision != Precision::kBf16 ? Kernels::kPlain
                 : FitsTensorCores(shape)              ? Kernels::kTensor
                                                       : Kernels::kPlain) {}

  const Conv2dShape& shape() const override { return s_; }
  size_t scratch_bytes() const override { return scratch_bytes_; }
  bool serves_any_rows() const override { return kernels_ != Kernels::kLibrary; }

  void Pack(Stream& stream, const float* weight, const uint16_t* rounded) override {
    weight_ = weight;
    if (kernels_ == Kernels::kTensor) {
      PackTensorWeights(QueueOf(stream), s_, rounded, packed_->data());
    }
  }

  void Forward(Stream& stream, int64_t rows, const void* x, const float* bias, void* y,
               void* scratch) override {
    const Queue& q = QueueOf(stream);
    const bool relu = s_.activation == Activation::kRelu;
    if (!s_.bias) bias = nullptr;
    if (kernels_ == Kernels::kPlain) {
      return ConvolutionForward(q, s_, rows, Floats(x), weight_, bias, relu, Floats(y));
    }
    if (kernels_ == Kernels::kTensor) {
      return TensorConvolutionForward(q, s_, rows, x, packed_->data(), bias, relu, y);
    }
    const Plans* const plans = Find(q, rows);
    if (plans == nullptr) return;
    plans->forward->Run(q, x, weight_, Floats(y), scratch);
    if (s_.bias || relu) {
      BiasForward(q, rows * Outputs(), s_.out, Floats(y), bias, relu, Floats(y));
    }
  }

  void BackwardInput(Stream& stream, int64_t rows, const void* dy, void* dx,
                     void* scratch) override {
    const Queue& q = QueueOf(stream);
    if (kernels_ == Kernels::kPlain) {
      return ConvolutionBackwardInput(q, s_, rows, Floats(dy), weight_, Floats(dx));
    }
    if (kernels_ == Kernels::kTensor) {
      return TensorConvolutionBackwardInput(q, s_, rows, dy, packed_->data(), dx);
    }
    const Plans* const plans = Find(q, rows);
    if (plans == nullptr) return;
    plans->backward_input->Run(q, dy, weight_, Floats(dx), scratch);
  }

  bool BackwardInputInto(Stream& stream, int64_t rows, const void* dy, const void* more,
                         const uint8_t* above, void* g) override {
    return kernels_ == Kernels::kTensor &&
           TensorConvolutionBackwardInputInto(QueueOf(stream), s_, rows, dy, packed_->data(), more,
                                              above, g);
  }

  void BackwardWeight(Stream& stream, int64_t rows, const void* x, const void* dy, float* dw,
                      float* db, void* scratch) override {
    if (kernels_ != Kernels::kLibrary) {
      return BackwardWeights(stream, rows, x, dy, dw, db, 0, scratch);
    }
    const Queue& q = QueueOf(stream);
    const Plans* const plans = Find(q, rows);
    if (plans == nullptr) return;
    plans->backward_weight->Run(q, dy, x, dw, scratch);
    if (s_.bias) ColumnSums(q, Leaves(rows * Outputs() / s_.out), s_.out, dy, db, 0);
  }

  void BackwardWeights(Stream& stream, const Leaves& leaves, const void* x, const void* dy,
                       float* dw, float* db, int64_t stride, void* scratch) override {
    if (kernels_ == Kernels::kLibrary) {
      return Conv2d::BackwardWeights(stream, leaves, x, dy, dw, db, stride, scratch);
    }
    const Queue& q = QueueOf(stream);
    if (kernels_ == Kernels::kTensor) {
      TensorConvolutionBackwardWeight(q, s_, leaves, x, dy, dw, stride, scratch);
    } else {
      ConvolutionBackwardWeight(q, s_, leaves, Floats(x), Floats(dy), dw, stride);
    }
    if (!s_.bias) return;
    Leaves places = leaves;
    for (int64_t& begin : places.begin) begin *= Outputs() / s_.out;
    ColumnSums(q, places, s_.out, dy, db, stride, s_.y_type);
  }

 private:
  // kPlain: in fp32, and what of bf16 does not fit tensor cores.
  enum class Kernels { kPlain, kTensor, kLibrary };
  // Of one number of rows, for the library.
  struct Plans {
    std::unique_ptr<Convolution> forward, backward_input, backward_weight;
  };

  absl::Status Add(Dnn& dnn, int64_t rows) {
    Plans& plans = plans_[rows];
    if (plans.forward != nullptr) return absl::OkStatus();
    const auto make = [&](ConvolutionPass pass, std::unique_ptr<Convolution>* convolution) {
      ASSIGN_OR_RETURN(*convolution, dnn.MakeConvolution(pass, s_, rows, FactorsOf(s_.precision)));
      scratch_bytes_ = std::max(scratch_bytes_, (*convolution)->workspace_bytes());
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(make(ConvolutionPass::kForward, &plans.forward));
    RETURN_IF_ERROR(make(ConvolutionPass::kBackwardInput, &plans.backward_input));
    return make(ConvolutionPass::kBackwardWeight, &plans.backward_weight);
  }

  const Plans* Find(const Queue& queue, int64_t rows) const {
    const auto it = plans_.find(rows);
    if (it != plans_.end()) return &it->second;
    Fail(queue,
         absl::StrCat("a convolution was called with ", rows, " rows, for which it was not made"));
    return nullptr;
  }

  int64_t Outputs() const { return s_.out_height() * s_.out_width() * s_.out; }  // of a row

  const Conv2dShape s_;
  const Kernels kernels_;
  const float* weight_ = nullptr;
  std::unique_ptr<Memory> packed_;  // what tensor cores take in its place
  std::map<int64_t, Plans> plans_;
  size_t scratch_bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Conv2d>> MakeCudaConv2d(Device& device, Dnn& dnn,
                                                       const Conv2dShape& shape,
                                                       absl::Span<const int64_t> rows) {
  const Conv2dShape& s = shape;
  if (s.in < 1 || s.out < 1 || s.kernel < 1 || s.stride < 1 || s.padding < 0 || s.dilation < 1 ||
      s.groups < 1 || s.in % s.groups != 0 || s.out % s.groups != 0 ||
      s.height + 2 * s.padding < s.extent() || s.width + 2 * s.padding < s.extent()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "conv2d of ", s.height, "x", s.width, "x", s.in, " to ", s.out, " channels with kernel ",
        s.kernel, ", stride ", s.stride, ", padding ", s.padding, ", dilation ", s.dilation,
        ", groups ", s.groups,
        "; sizes must be positive, the window must fit into the padded input, and groups divide "
        "the channels"));
  }
  const bool stored = s.x_type == ElementType::kBf16 || s.y_type == ElementType::kBf16;
  if (stored && !(CanStoreBf16(s) && FitsTensorCores(s))) {
    return absl::InvalidArgumentError(
        "conv2d of tensors stored as bf16, in a precision or shape for which they are fp32");
  }
  constexpr int64_t kMostElements = int64_t{1} << 30;  // of a row or of the weights
  for (const int64_t elements : {s.height * s.width * s.in, s.out_height() * s.out_width() * s.out,
                                 s.out * s.kernel * s.kernel * (s.in / s.groups)}) {
    if (elements <= kMostElements) continue;
    return absl::InvalidArgumentError(absl::StrCat("conv2d of ", elements, " elements; at most ",
                                                   kMostElements, " are accepted"));
  }
  for (const int64_t count : rows) {
    if (count >= 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("conv2d was asked for ", count, " rows; at least 1 is accepted"));
  }
  return CudaConv2d::Make(device, dnn, shape, rows);
}

}  // namespace lockstep::device::cuda
