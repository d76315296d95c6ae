#include "worker/optim/gradient_norm.h"

#include <cmath>
#include <limits>

#include "common/philox.h"
#include "gtest/gtest.h"
#include "worker/device/cpu/cpu_device.h"

namespace lockstep::optim {
namespace {

device::Device& TestDevice() {
  static device::Device* device = device::MakeCpuDevice().value().release();
  return *device;
}

class GradientNormTest : public testing::Test {
 protected:
  GradientNormTest() {
    // Less than a block, whole blocks, several with a rest, one element.
    for (const int64_t size : {100, 8192, 50001, 1, 4097}) {
      TensorView view;
      view.offset = layout_.size;
      view.size = size;
      layout_.tensors.push_back(view);
      layout_.size += (size + 15) / 16 * 16;
    }
    // The padding is not looked at.
    gradient_.assign(layout_.size, std::numeric_limits<float>::quiet_NaN());
    const PhiloxKey key = MakePhiloxKey(1, "gradient");
    for (const TensorView& view : layout_.tensors) {
      for (int64_t i = view.offset; i < view.offset + view.size; ++i) {
        gradient_[i] = ToUniform(PhiloxAt(key, static_cast<uint64_t>(i), 0)) - 0.5f;
      }
    }
    norm_ = GradientNorm::Make(TestDevice(), layout_).value();
    stream_ = TestDevice().MakeStream().value();
  }

  double ValueIn(int parts) {
    for (int part = parts - 1; part >= 0; --part) {
      norm_->Sum(TestDevice(), *stream_, part, parts, gradient_.data());
    }
    return norm_->Value();
  }

  FlatLayout layout_;
  std::vector<float> gradient_;
  std::unique_ptr<GradientNorm> norm_;
  std::unique_ptr<device::Stream> stream_;
};

TEST_F(GradientNormTest, IsThatOfAllElements) {
  double sum = 0;
  for (const TensorView& view : layout_.tensors) {
    for (int64_t i = view.offset; i < view.offset + view.size; ++i) {
      sum += double{gradient_[i]} * gradient_[i];
    }
  }
  EXPECT_NEAR(ValueIn(1), std::sqrt(sum), 1e-12 * std::sqrt(sum));
}

TEST_F(GradientNormTest, HasTheSameBitsHoweverSlotsShareTheBlocks) {
  const double whole = ValueIn(1);
  for (const int parts : {2, 3, 5, 7, 64}) {
    norm_ = GradientNorm::Make(TestDevice(), layout_).value();
    EXPECT_EQ(ValueIn(parts), whole) << parts;
  }
}

// Every element, also a tensor's last, is in exactly one part's sums.
TEST_F(GradientNormTest, OnePartSeesAnElementThatIsNotFinite) {
  for (const TensorView& view : layout_.tensors) {
    for (const int64_t at :
         {view.offset, view.offset + view.size / 2, view.offset + view.size - 1}) {
      const float before = std::exchange(gradient_[at], -std::numeric_limits<float>::infinity());
      for (const int parts : {1, 3, 64}) {
        ValueIn(parts);
        int bad = 0;
        for (int part = 0; part < parts; ++part) bad += !norm_->IsFinite(part, parts);
        EXPECT_EQ(bad, 1) << at << " in " << parts;
      }
      gradient_[at] = before;
    }
  }
  ValueIn(3);
  for (int part = 0; part < 3; ++part) EXPECT_TRUE(norm_->IsFinite(part, 3));
}

TEST_F(GradientNormTest, OfNoTensorsIsZero) {
  norm_ = GradientNorm::Make(TestDevice(), FlatLayout()).value();
  EXPECT_EQ(ValueIn(2), 0);
  EXPECT_TRUE(norm_->IsFinite(0, 2));
}

// torch.nn.utils.clip_grad_norm_'s min(1, clip / (norm + 1e-6)).
TEST(ClipScaleTest, BringsLargeNormsDownAndLeavesSmallOnes) {
  EXPECT_EQ(ClipScale(100, 0), 1);
  EXPECT_EQ(ClipScale(0, 2), 1);
  EXPECT_EQ(ClipScale(1.9, 2), 1);
  EXPECT_DOUBLE_EQ(ClipScale(8, 2), 2 / 8.000001);
  EXPECT_DOUBLE_EQ(ClipScale(1e30, 1), 1e-30);
}

}  // namespace
}  // namespace lockstep::optim
