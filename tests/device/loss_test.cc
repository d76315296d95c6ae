#include <cmath>
#include <limits>

#include "tests/device/device_test_fixture.h"

namespace lockstep::device {
namespace {

using LossTest = DeviceTest;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<int32_t> Labels(int64_t rows, int64_t classes) {
  std::vector<int32_t> labels(rows);
  for (int64_t r = 0; r < rows; ++r) labels[r] = static_cast<int32_t>(r * 7 % classes);
  return labels;
}

double SoftmaxLoss(int64_t classes, const std::vector<double>& x,
                   const std::vector<int32_t>& labels) {
  double loss = 0;
  for (size_t r = 0; r < labels.size(); ++r) {
    double largest = x[r * classes], sum = 0;
    for (int64_t i = 0; i < classes; ++i) largest = std::max(largest, x[r * classes + i]);
    for (int64_t i = 0; i < classes; ++i) sum += std::exp(x[r * classes + i] - largest);
    loss += std::log(sum) + largest - x[r * classes + labels[r]];
  }
  return loss;
}

int64_t CorrectRows(int64_t classes, const std::vector<float>& x,
                    const std::vector<int32_t>& labels) {
  int64_t correct = 0;
  for (size_t r = 0; r < labels.size(); ++r) {
    int64_t best = 0;
    for (int64_t i = 1; i < classes; ++i) {
      if (x[r * classes + i] > x[r * classes + best]) best = i;
    }
    correct += best == labels[r] ? 1 : 0;
  }
  return correct;
}

TEST_P(LossTest, SoftmaxMatchesTheReference) {
  for (int64_t classes :
       {1, 2, 3, 10, 15, 16, 17, 31, 33, 100, 200, 500, 700, 1000, 1100, 3000, 6000, 8000}) {
    for (int64_t rows : {1, 3, 16, 17}) {
      if (classes > 1000 && rows > 3) continue;
      const std::vector<float> x = RandomFloats(rows * classes, 50, -6, 6);
      const std::vector<int32_t> labels = Labels(rows, classes);
      const float scale = 1.0f / 64;
      const auto in = In(x), dx = Out(x.size());
      const auto in_labels = In(labels);
      const auto loss = OutOf<LeafResult>(1);
      device().SoftmaxCrossEntropy(stream(), rows, classes, in, in_labels, 0, scale, loss, dx);
      const double expected = SoftmaxLoss(classes, ToDoubles(x), labels);
      EXPECT_NEAR(loss.Read()[0].loss_sum, expected, 2e-7 * std::max(1.0, expected))
          << classes << " classes";
      EXPECT_EQ(loss.Read()[0].correct, CorrectRows(classes, x, labels)) << classes << " classes";
      std::vector<double> gradient(x.size());
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0;
        for (int64_t i = 0; i < classes; ++i) sum += std::exp(double{x[r * classes + i]});
        for (int64_t i = 0; i < classes; ++i) {
          gradient[r * classes + i] =
              (std::exp(double{x[r * classes + i]}) / sum - (i == labels[r] ? 1 : 0)) * scale;
        }
      }
      EXPECT_TRUE(Near(dx.Read(), gradient, 1e-8)) << classes << " classes";
      device().SoftmaxCrossEntropy(stream(), rows, classes, in, in_labels, 0, scale, loss, nullptr);
      EXPECT_NEAR(loss.Read()[0].loss_sum, expected, 2e-7 * std::max(1.0, expected))
          << "evaluation";
      device().CountCorrect(stream(), rows, classes, in, in_labels, loss);
      EXPECT_EQ(loss.Read()[0].correct, CorrectRows(classes, x, labels)) << "CountCorrect";
    }
  }
}

TEST_P(LossTest, SoftmaxGradientMatchesFiniteDifferences) {
  constexpr int64_t kRows = 4, kClasses = 17;
  const std::vector<float> x = RandomFloats(kRows * kClasses, 51, -3, 3);
  const std::vector<int32_t> labels = Labels(kRows, kClasses);
  const auto in = In(x), dx = Out(x.size());
  const auto in_labels = In(labels);
  const auto loss = OutOf<LeafResult>(1);
  device().SoftmaxCrossEntropy(stream(), kRows, kClasses, in, in_labels, 0, 1.0f, loss, dx);
  EXPECT_TRUE(MatchesFiniteDifferences(
      [&](const std::vector<double>& at) { return SoftmaxLoss(kClasses, at, labels); },
      ToDoubles(x), dx.Read()));
}

TEST_P(LossTest, SoftmaxSurvivesLargeLogitsAndShowsNan) {
  const std::vector<float> x = {1e30f, -1e30f, 0, 3e4f, 3e4f, 3e4f, -200, 200, 0};
  const std::vector<int32_t> labels = {0, 1, 0};
  const auto in = In(x), dx = Out(9);
  const auto in_labels = In(labels);
  const auto loss = OutOf<LeafResult>(1);
  device().SoftmaxCrossEntropy(stream(), 3, 3, in, in_labels, 0, 1.0f, loss, dx);
  EXPECT_NEAR(loss.Read()[0].loss_sum, std::log(3.0) + 400, 1e-5);
  EXPECT_EQ(loss.Read()[0].correct, 1);  // the first of equals wins, so row 1 is wrong
  for (float value : dx.Read()) EXPECT_TRUE(std::isfinite(value));
  for (int at = 0; at < 3; ++at) {
    std::vector<float> bad = {1, 2, 3};
    bad[at] = kNan;
    const auto in_bad = In(bad), dx_bad = Out(3);
    device().SoftmaxCrossEntropy(stream(), 1, 3, in_bad, in_labels, 0, 1.0f, loss, dx_bad);
    EXPECT_TRUE(std::isnan(loss.Read()[0].loss_sum)) << "NaN at " << at;
  }
}

TEST_P(LossTest, SoftmaxGradientMayAliasTheLogits) {
  constexpr int64_t kRows = 5;
  for (const int64_t classes : {33, 1100}) {  // those of more than one warp of a GPU
    SCOPED_TRACE(classes);
    const std::vector<float> x = RandomFloats(kRows * classes, 52, -3, 3);
    const auto in = In(x), apart = Out(x.size());
    const auto labels = In(Labels(kRows, classes));
    const auto loss = OutOf<LeafResult>(1), loss_aliased = OutOf<LeafResult>(1);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, in, labels, 0, 0.5f, loss, apart);
    device().SoftmaxCrossEntropy(stream(), kRows, classes, in, labels, 0, 0.5f, loss_aliased, in);
    EXPECT_TRUE(SameBits(in.Read(), apart.Read()));
    EXPECT_EQ(loss_aliased.Read()[0].loss_sum, loss.Read()[0].loss_sum);
  }
}

TEST_P(LossTest, RowsDoNotDependOnTheirNumber) {
  constexpr int64_t kRows = 17, kClasses = 21;
  const std::vector<float> x = RandomFloats(kRows * kClasses, 53, -3, 3);
  const std::vector<int32_t> labels = Labels(kRows, kClasses);
  const auto in = In(x), whole = Out(x.size()), alone = Out(x.size());
  const auto in_labels = In(labels);
  const auto loss = OutOf<LeafResult>(1), part = OutOf<LeafResult>(1);
  device().SoftmaxCrossEntropy(stream(), kRows, kClasses, in, in_labels, 0, 0.5f, loss, whole);
  double total = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    device().SoftmaxCrossEntropy(stream(), 1, kClasses, in + r * kClasses, in_labels + r, 0, 0.5f,
                                 part, alone + r * kClasses);
    total += part.Read()[0].loss_sum;
  }
  EXPECT_TRUE(SameBits(alone.Read(), whole.Read()));
  EXPECT_EQ(total, loss.Read()[0].loss_sum);
}

TEST_P(LossTest, MeanSquaredErrorMatchesTheReferenceAndFiniteDifferences) {
  for (int64_t features : kOddSizes) {
    for (int64_t rows : {1, 3, 16}) {
      const std::vector<float> y = RandomFloats(rows * features, 54),
                               t = RandomFloats(rows * features, 55);
      const auto in = In(y), target = In(t), dy = Out(y.size());
      const auto loss = OutOf<LeafResult>(1);
      device().MeanSquaredError(stream(), rows, features, in, target, 0.25f, loss, dy);
      const auto reference = [&](const std::vector<double>& at) {
        double sum = 0;
        for (size_t i = 0; i < at.size(); ++i) sum += (at[i] - t[i]) * (at[i] - t[i]);
        return sum / static_cast<double>(features);
      };
      EXPECT_NEAR(loss.Read()[0].loss_sum, reference(ToDoubles(y)), 1e-6 * rows);
      std::vector<float> unscaled = dy.Read();
      for (float& value : unscaled) value *= 4;
      if (rows * features < 300) {
        EXPECT_TRUE(MatchesFiniteDifferences(reference, ToDoubles(y), unscaled));
      }
      std::vector<double> expected(y.size());
      for (size_t i = 0; i < y.size(); ++i) {
        expected[i] = 2 * (static_cast<double>(y[i]) - t[i]) / static_cast<double>(features) * 0.25;
      }
      EXPECT_TRUE(Near(dy.Read(), expected, 1e-7));
      device().MeanSquaredError(stream(), rows, features, in, target, 0.25f, loss, nullptr);
      EXPECT_NEAR(loss.Read()[0].loss_sum, reference(ToDoubles(y)), 1e-6 * rows) << "evaluation";
    }
  }
}

TEST_P(LossTest, OneHotAndCountCorrect) {
  constexpr int64_t kRows = 9, kClasses = 7;
  const std::vector<int32_t> labels = Labels(kRows, kClasses);
  const auto in_labels = In(labels);
  const auto out = Out(kRows * kClasses);
  device().OneHot(stream(), kRows, kClasses, in_labels, out);
  std::vector<double> expected(kRows * kClasses, 0.0);
  for (int64_t r = 0; r < kRows; ++r) expected[r * kClasses + labels[r]] = 1;
  EXPECT_TRUE(Near(out.Read(), expected, 0));
  const auto correct = OutOf<LeafResult>(1);
  device().CountCorrect(stream(), kRows, kClasses, out, in_labels, correct);
  EXPECT_EQ(correct.Read()[0].correct, kRows);
  const auto nothing = In(std::vector<float>(kRows * kClasses, kNan));
  device().CountCorrect(stream(), kRows, kClasses, nothing, in_labels, correct);
  EXPECT_EQ(correct.Read()[0].correct, 0);
}

LOCKSTEP_DEVICE_TESTS(LossTest);

}  // namespace
}  // namespace lockstep::device
