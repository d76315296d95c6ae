// GatherSamples against the definition, pixel by pixel, and the draws of augmentation.
#include <algorithm>
#include <array>
#include <vector>

#include "tests/device/device_test_fixture.h"
#include "worker/device/augment.h"

namespace lockstep::device {
namespace {

class GatherTest : public DeviceTest {};

constexpr int64_t kSamples = 6;

// As bytes, and as floats that are no bytes.
template <class T>
std::vector<T> MakeSamples(const SampleShape& shape) {
  std::vector<T> data(static_cast<size_t>(kSamples * shape.features()));
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<T>(i * 31 + i / 256) / static_cast<T>(sizeof(T) == 1 ? 1 : 7);
  }
  return data;
}

float ValueOf(uint8_t byte) { return static_cast<float>(byte) / 255.0f; }
float ValueOf(float value) { return value; }

// The definition of Augmentation, one pixel at a time.
template <class T>
std::vector<float> Reference(const SampleShape& shape, const std::vector<T>& data,
                             const std::vector<int64_t>& offsets, const std::vector<float>& mean,
                             const std::vector<float>& inv_std, const Augmentation& augmentation,
                             uint64_t step, uint64_t first_position) {
  std::vector<float> out;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const SampleChange change = DrawChange(augmentation, shape, step, first_position + i);
    for (int64_t y = 0; y < shape.height; ++y) {
      for (int64_t x = 0; x < shape.width; ++x) {
        const int64_t from_y = y + change.shift_y;
        const int64_t from_x = (change.flip ? shape.width - 1 - x : x) + change.shift_x;
        const bool inside =
            from_y >= 0 && from_y < shape.height && from_x >= 0 && from_x < shape.width;
        const bool cut = y >= change.cut_top && y < change.cut_bottom && x >= change.cut_left &&
                         x < change.cut_right;
        for (int64_t c = 0; c < shape.channels; ++c) {
          const int64_t at = offsets[i] + (from_y * shape.width + from_x) * shape.channels + c;
          out.push_back(inside && !cut ? (ValueOf(data[static_cast<size_t>(at)]) -
                                          mean[static_cast<size_t>(c)]) *
                                             inv_std[static_cast<size_t>(c)]
                                       : 0.0f);
        }
      }
    }
  }
  return out;
}

Augmentation Make(int64_t crop_padding, bool flip, int64_t cutout) {
  return {crop_padding,
          flip,
          cutout,
          MakePhiloxKey(5, "crop"),
          MakePhiloxKey(5, "flip"),
          MakePhiloxKey(5, "cutout")};
}

const std::array kAugmentations = {Make(0, false, 0), Make(0, true, 0), Make(2, false, 0),
                                   Make(0, false, 3), Make(1, true, 2), Make(4, true, 4)};

TEST_P(GatherTest, NormalizesAndChangesTheChosenSamples) {
  for (const int64_t channels : {1, 2, 3, 7, 16, 17, 40, 61}) {
    for (const auto& [height, width] : {std::pair{1, 1}, {1, 40}, {5, 4}, {4, 19}, {7, 33}}) {
      const SampleShape shape = {height, width, channels};
      const auto bytes = MakeSamples<uint8_t>(shape);
      const auto floats = MakeSamples<float>(shape);
      std::vector<int64_t> offsets;
      for (const int64_t sample : {5, 0, 3, 3}) offsets.push_back(sample * shape.features());
      const std::vector<float> mean = RandomFloats(static_cast<size_t>(channels), 66, 0, 1);
      const std::vector<float> inv_std = RandomFloats(static_cast<size_t>(channels), 67, 1, 5);
      const auto in_bytes = In(bytes);
      const auto in_floats = In(floats);
      const auto in_offsets = In(offsets);
      const auto in_mean = In(mean), in_inv_std = In(inv_std);
      for (const Augmentation& a : kAugmentations) {
        if (std::max(a.crop_padding, a.cutout) > std::min(height, width)) continue;
        for (const uint64_t step : {uint64_t{1}, uint64_t{1} << 40}) {
          for (const Guard guard : {Guard::kBehind, Guard::kBefore}) {
            const auto out = Out(offsets.size() * static_cast<size_t>(shape.features()), guard);
            device().GatherSamples(stream(), shape, 4, SampleType::kUint8, in_bytes, in_offsets,
                                   in_mean, in_inv_std, a, step, 90, out);
            EXPECT_TRUE(
                SameBits(out.Read(), Reference(shape, bytes, offsets, mean, inv_std, a, step, 90)))
                << height << " x " << width << " x " << channels << " bytes, crop "
                << a.crop_padding << ", flip " << a.flip << ", cutout " << a.cutout;
            device().GatherSamples(stream(), shape, 4, SampleType::kFloat32, in_floats, in_offsets,
                                   in_mean, in_inv_std, a, step, 90, out);
            EXPECT_TRUE(
                SameBits(out.Read(), Reference(shape, floats, offsets, mean, inv_std, a, step, 90)))
                << height << " x " << width << " x " << channels << " floats, crop "
                << a.crop_padding << ", flip " << a.flip << ", cutout " << a.cutout;
          }
        }
      }
    }
  }
}

// A sample's bits depend on its position in the global batch, not on the call it is in.
TEST_P(GatherTest, GivesTheSameBitsHoweverCallsAreCut) {
  const SampleShape shape = {6, 9, 3};
  const auto in = In(MakeSamples<uint8_t>(shape));
  std::vector<int64_t> offsets;
  for (const int64_t sample : {2, 5, 1, 0, 4}) offsets.push_back(sample * shape.features());
  const auto in_offsets = In(offsets);
  const auto mean = In(RandomFloats(3, 68)), inv_std = In(RandomFloats(3, 69));
  const Augmentation a = Make(2, true, 3);
  const auto size = static_cast<size_t>(5 * shape.features());
  const auto whole = Out(size);
  device().GatherSamples(stream(), shape, 5, SampleType::kUint8, in, in_offsets, mean, inv_std, a,
                         3, 40, whole);
  for (int64_t at = 0; at <= 5; ++at) {
    const auto cut = Out(size);
    device().GatherSamples(stream(), shape, 5 - at, SampleType::kUint8, in, in_offsets + at, mean,
                           inv_std, a, 3, 40 + static_cast<uint64_t>(at),
                           cut + at * shape.features());
    device().GatherSamples(stream(), shape, at, SampleType::kUint8, in, in_offsets, mean, inv_std,
                           a, 3, 40, cut);
    ASSERT_TRUE(SameBits(cut.Read(), whole.Read())) << "cut at " << at;
  }
}

TEST_P(GatherTest, BringsLabelsAlong) {
  const SampleShape shape = {70, 70, 1};  // more than one block of threads
  const auto in = In(MakeSamples<uint8_t>(shape));
  const auto offsets = In(std::vector<int64_t>{0, shape.features(), 0});
  const std::vector<int32_t> labels = {7, 0, 9};
  const auto in_labels = In(labels), out_labels = In(std::vector<int32_t>{-1, -1, -1});
  const auto mean = In(RandomFloats(1, 68)), inv_std = In(RandomFloats(1, 69));
  const auto out = Out(static_cast<size_t>(3 * shape.features()));
  device().GatherSamples(stream(), shape, 3, SampleType::kUint8, in, offsets, mean, inv_std, {}, 1,
                         0, out, in_labels, out_labels);
  EXPECT_EQ(out_labels.Read(), labels);
}

LOCKSTEP_DEVICE_TESTS(GatherTest);

// Every place of the crop equally often, half of the samples flipped, cuts clipped at the borders.
TEST(DrawChange, IsUniform) {
  const SampleShape shape = {32, 32, 3};
  const Augmentation a = Make(4, true, 8);
  constexpr int kDraws = 81000;
  std::array<std::array<int, 9>, 9> places = {};
  std::array<int, 32> centres = {};
  int flips = 0, flips_at_zero = 0;
  for (int i = 0; i < kDraws; ++i) {
    const SampleChange change =
        DrawChange(a, shape, static_cast<uint64_t>(1 + i / 128), static_cast<uint64_t>(i % 128));
    ASSERT_LE(std::max(std::abs(change.shift_y), std::abs(change.shift_x)), 4);
    ++places[static_cast<size_t>(change.shift_y + 4)][static_cast<size_t>(change.shift_x + 4)];
    flips += change.flip;
    flips_at_zero += change.flip && change.shift_x == 0;
    ASSERT_TRUE(0 <= change.cut_top && change.cut_top < change.cut_bottom &&
                change.cut_bottom <= 32);
    ASSERT_TRUE(0 <= change.cut_left && change.cut_left < change.cut_right &&
                change.cut_right <= 32);
    const int64_t height = change.cut_bottom - change.cut_top;
    ASSERT_TRUE(height == 8 || change.cut_top == 0 || change.cut_bottom == 32);
    const int64_t centre = change.cut_top == 0 ? change.cut_bottom - 4 : change.cut_top + 4;
    ++centres[static_cast<size_t>(centre)];
  }
  // Within five standard deviations of a binomial distribution.
  for (const auto& row : places) {
    for (const int count : row) EXPECT_NEAR(count, 1000, 5 * 31.5);
  }
  for (const int count : centres) EXPECT_NEAR(count, kDraws / 32.0, 5 * 50);
  EXPECT_NEAR(flips, kDraws / 2, 5 * 142);
  EXPECT_NEAR(flips_at_zero, kDraws / 18, 5 * 66);  // flip and crop are independent
}

TEST(DrawChange, IsNothingWithoutAugmentation) {
  const SampleChange change = DrawChange(Make(0, false, 0), {8, 8, 1}, 3, 4);
  EXPECT_TRUE(change.shift_y == 0 && change.shift_x == 0 && !change.flip &&
              change.cut_top == change.cut_bottom && change.cut_left == change.cut_right);
}

}  // namespace
}  // namespace lockstep::device
