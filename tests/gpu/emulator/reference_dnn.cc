// Convolutions in plain loops, in place of cuDNN. An element of a result is summed in a fixed
// order, in floats: forward over the window (or in reverse) and its channels, the input's gradient
// over the window and the output's channels, the weight's gradient over rows and places.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "tests/gpu/emulator/emulator.h"
#include "tests/gpu/emulator/reference_algorithms.h"
#include "tests/gpu/emulator/reference_factors.h"
#include "worker/device/cuda/dnn.h"

namespace lockstep::device::cuda {
namespace {

constexpr size_t kWorkspaceOfConvolution = 4096;  // only to see that it is there

class ReferenceConvolution : public Convolution {
 public:
  ReferenceConvolution(ConvolutionPass pass, const Conv2dShape& shape, int64_t rows,
                       Factors factors, bool reverse)
      : pass_(pass), s_(shape), rows_(rows), factors_(factors), reverse_(reverse) {}

  size_t workspace_bytes() const override { return kWorkspaceOfConvolution; }
  // Some do and some do not, so that callers must serve both.
  bool takes_floats() const override {
    return factors_ == Factors::kBf16 && (pass_ == ConvolutionPass::kBackwardInput) != IsGrouped();
  }

  void Run(const Queue& queue, const void* first, const void* second, float* result,
           void* workspace) override {
    emulator::CheckAlignment("the workspace of a convolution", workspace, 256);
    const cudaError_t error =
        emulator::Enqueue(queue.stream, [copy = *this, first, second, result, workspace] {
          emulator::UseWorkspace(workspace, kWorkspaceOfConvolution);
          copy.Compute(first, second, result);
        });
    if (error != cudaSuccess) Fail(queue, absl::StrCat("convolution: ", cudaGetErrorString(error)));
  }

  std::string algorithm() const override {
    return reverse_ ? emulator::kReverse : emulator::kInOrder;
  }

 private:
  bool IsGrouped() const { return s_.groups > 1; }
  int64_t In() const { return s_.in / s_.groups; }  // channels of a group
  int64_t Out() const { return s_.out / s_.groups; }

  void Compute(const void* first, const void* second, float* result) const {
    const int64_t x = rows_ * s_.height * s_.width * s_.in;
    const int64_t y = rows_ * s_.out_height() * s_.out_width() * s_.out;
    const int64_t w = s_.out * s_.kernel * s_.kernel * In();
    switch (pass_) {
      case ConvolutionPass::kForward:
        return Forward(Decoded(first, x), Decoded(second, w), result);
      case ConvolutionPass::kBackwardInput:
        return BackwardInput(Decoded(first, y), Decoded(second, w), result);
      case ConvolutionPass::kBackwardWeight:
        return BackwardWeight(Decoded(first, y), Decoded(second, x), result);
    }
  }

  std::vector<float> Decoded(const void* factors, int64_t n) const {
    const Factors type = takes_floats() ? Factors::kFp32 : factors_;
    std::vector<float> values(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const float value = emulator::FactorAt(factors, i, type);
      if (takes_floats() && (__builtin_bit_cast(uint32_t, value) & 0xFFFFu) != 0) {
        emulator::Refuse("a factor of a convolution of bf16 is a float that bf16 does not have");
      }
      values[static_cast<size_t>(i)] = value;
    }
    return values;
  }

  // Where a place of the output and one of the window meet the input; false: beyond it.
  bool Meets(int64_t out, int64_t k, int64_t size, int64_t* in) const {
    *in = out * s_.stride - s_.padding + k * s_.dilation;
    return *in >= 0 && *in < size;
  }

  void Forward(const std::vector<float>& x, const std::vector<float>& w, float* y) const {
    // {group, window, in, out}, so that output channels lie together.
    const int64_t window = s_.kernel * s_.kernel;
    std::vector<float> turned(w.size());
    for (int64_t o = 0; o < s_.out; ++o) {
      for (int64_t k = 0; k < window * In(); ++k) {
        turned[static_cast<size_t>(((o / Out()) * window * In() + k) * Out() + o % Out())] =
            w[static_cast<size_t>(o * window * In() + k)];
      }
    }
    ForEachPlace([&](int64_t row, int64_t oh, int64_t ow) {
      std::fill(y, y + s_.out, 0.0f);
      for (int64_t step = 0; step < window; ++step) {
        const int64_t k = reverse_ ? window - 1 - step : step;
        int64_t ih, iw;
        if (!Meets(oh, k / s_.kernel, s_.height, &ih)) continue;
        if (!Meets(ow, k % s_.kernel, s_.width, &iw)) continue;
        const float* const pixel = x.data() + Pixel(row, ih, iw);
        for (int64_t c = 0; c < s_.in; ++c) {
          const int64_t group = c / In();
          const float* const factors =
              turned.data() + ((group * window + k) * In() + c % In()) * Out();
          emulator::AddProduct(Out(), pixel[c], factors, y + group * Out());
        }
      }
      y += s_.out;
    });
  }

  void BackwardInput(const std::vector<float>& dy, const std::vector<float>& w, float* dx) const {
    const int64_t window = s_.kernel * s_.kernel;
    std::fill(dx, dx + rows_ * s_.height * s_.width * s_.in, 0.0f);
    std::vector<float> patch(static_cast<size_t>(window * In()));  // of a group
    const float* gradient = dy.data();
    ForEachPlace([&](int64_t row, int64_t oh, int64_t ow) {
      for (int64_t group = 0; group < s_.groups; ++group) {
        std::fill(patch.begin(), patch.end(), 0.0f);
        for (int64_t o = group * Out(); o < (group + 1) * Out(); ++o) {
          emulator::AddProduct(window * In(), gradient[o], w.data() + o * window * In(),
                               patch.data());
        }
        for (int64_t k = 0; k < window; ++k) {
          int64_t ih, iw;
          if (!Meets(oh, k / s_.kernel, s_.height, &ih)) continue;
          if (!Meets(ow, k % s_.kernel, s_.width, &iw)) continue;
          emulator::AddProduct(In(), 1.0f, patch.data() + k * In(),
                               dx + Pixel(row, ih, iw) + group * In());
        }
      }
      gradient += s_.out;
    });
  }

  void BackwardWeight(const std::vector<float>& dy, const std::vector<float>& x, float* dw) const {
    const int64_t window = s_.kernel * s_.kernel;
    std::fill(dw, dw + s_.out * window * In(), 0.0f);
    std::vector<float> patch(static_cast<size_t>(window * In()));  // of a group; 0 beyond the input
    const float* gradient = dy.data();
    ForEachPlace([&](int64_t row, int64_t oh, int64_t ow) {
      for (int64_t group = 0; group < s_.groups; ++group) {
        std::fill(patch.begin(), patch.end(), 0.0f);
        for (int64_t k = 0; k < window; ++k) {
          int64_t ih, iw;
          if (!Meets(oh, k / s_.kernel, s_.height, &ih)) continue;
          if (!Meets(ow, k % s_.kernel, s_.width, &iw)) continue;
          const float* const pixel = x.data() + Pixel(row, ih, iw) + group * In();
          std::copy(pixel, pixel + In(), patch.data() + k * In());
        }
        for (int64_t o = group * Out(); o < (group + 1) * Out(); ++o) {
          emulator::AddProduct(window * In(), gradient[o], patch.data(), dw + o * window * In());
        }
      }
      gradient += s_.out;
    });
  }

  // Calls body(row, y, x) for the places of the output, in order.
  template <class Body>
  void ForEachPlace(const Body& body) const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t oh = 0; oh < s_.out_height(); ++oh) {
        for (int64_t ow = 0; ow < s_.out_width(); ++ow) body(row, oh, ow);
      }
    }
  }
  // The first element of a pixel of the input.
  int64_t Pixel(int64_t row, int64_t h, int64_t w) const {
    return ((row * s_.height + h) * s_.width + w) * s_.in;
  }

  const ConvolutionPass pass_;
  const Conv2dShape s_;
  const int64_t rows_;
  const Factors factors_;
  const bool reverse_;
};

class ReferenceDnn : public Dnn {
 public:
  explicit ReferenceDnn(std::shared_ptr<AlgorithmBook> book) : book_(std::move(book)) {}

  std::string version() const override { return "reference convolutions"; }

  absl::StatusOr<std::unique_ptr<Convolution>> MakeConvolution(ConvolutionPass pass,
                                                               const Conv2dShape& shape,
                                                               int64_t rows,
                                                               Factors factors) override {
    bool reverse = false;  // of the gradients there is one algorithm
    if (pass == ConvolutionPass::kForward) {
      ASSIGN_OR_RETURN(
          reverse, emulator::IsReverse(*book_, absl::StrCat("convolution of ", shape.height, "x",
                                                            shape.width, "x", shape.in, " to ",
                                                            shape.out, ", kernel ", shape.kernel)));
    }
    return std::make_unique<ReferenceConvolution>(pass, shape, rows, factors, reverse);
  }

 private:
  const std::shared_ptr<AlgorithmBook> book_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Dnn>> MakeDnn(std::shared_ptr<AlgorithmBook> book) {
  if (book == nullptr) book = std::make_shared<AlgorithmBook>();
  return std::make_unique<ReferenceDnn>(std::move(book));
}

}  // namespace lockstep::device::cuda
