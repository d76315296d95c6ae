#include "client/format.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

TEST(Format, Count) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
  EXPECT_EQ(FormatCount(-123456), "-123,456");
  EXPECT_EQ(FormatCount(std::numeric_limits<int64_t>::min()), "-9,223,372,036,854,775,808");
}

TEST(Format, ScaledGoesUpAtTheRoundedThousand) {
  EXPECT_EQ(FormatScaled(0), "0");
  EXPECT_EQ(FormatScaled(999), "999");
  EXPECT_EQ(FormatScaled(1000), "1.00 k");
  EXPECT_EQ(FormatScaled(3.4e6), "3.40 M");
  EXPECT_EQ(FormatScaled(999999), "1.00 M");
  EXPECT_EQ(FormatScaled(1.2e9), "1.20 G");
}

TEST(Format, Bytes) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(1024 * 1024 - 1), "1.0 MiB");
  EXPECT_EQ(FormatBytes(int64_t{5} << 40), "5.0 TiB");
}

TEST(Format, Duration) {
  EXPECT_EQ(FormatDuration(0.421), "0.42 s");
  EXPECT_EQ(FormatDuration(9.999), "10.0 s");
  EXPECT_EQ(FormatDuration(59.96), "1m 00s");
  EXPECT_EQ(FormatDuration(187), "3m 07s");
  EXPECT_EQ(FormatDuration(7500), "2h 05m");
  EXPECT_EQ(FormatDuration(3 * 86400 + 4 * 3600), "3d 04h");
  EXPECT_EQ(FormatDuration(-1), "-");
  EXPECT_EQ(FormatDuration(std::nan("")), "-");
}

TEST(Format, LossKeepsFourDigits) {
  EXPECT_EQ(FormatLoss(0.31239), "0.3124");
  EXPECT_EQ(FormatLoss(12.3456), "12.346");
  EXPECT_EQ(FormatLoss(1234.5), "1234.5");
  EXPECT_EQ(FormatLoss(0.000012), "1.200e-05");
  EXPECT_EQ(FormatLoss(0), "0.0000");
  EXPECT_EQ(FormatLoss(std::nan("")), "nan");
  EXPECT_EQ(FormatLoss(-INFINITY), "-inf");
}

TEST(Format, PercentOfAFraction) {
  EXPECT_EQ(FormatPercent(0.92514), "92.51%");
  EXPECT_EQ(FormatPercent(1), "100.00%");
}

TEST(Format, ScoreWithoutLabels) {
  v1::Score score;
  score.set_loss(0.5);
  EXPECT_EQ(FormatScore(score), "loss 0.5000");
  score.set_accuracy(0.25);
  EXPECT_EQ(FormatScore(score), "loss 0.5000, accuracy 25.00%");
}

TEST(Format, Shape) {
  EXPECT_EQ(FormatShape({28, 28, 1}), "28 x 28 x 1");
  EXPECT_EQ(FormatShape({10}), "10");
  EXPECT_EQ(FormatShape({}), "scalar");
}

TEST(Format, Times) {
  const absl::Time time = absl::FromUnixSeconds(1795491226);
  EXPECT_EQ(FormatStamp(time), "20261124T033346Z");
  EXPECT_EQ(FormatTime(0), "-");
  const int64_t ms = absl::ToUnixMillis(time);
  EXPECT_EQ(FormatAge(ms, time), "now");
  EXPECT_EQ(FormatAge(ms, time - absl::Seconds(5)), "now");
  EXPECT_EQ(FormatAge(ms, time + absl::Seconds(42)), "42 s ago");
  EXPECT_EQ(FormatAge(ms, time + absl::Seconds(120)), "2m 00s ago");
}

TEST(Format, States) {
  EXPECT_EQ(StateName(v1::RUNNING), "RUNNING");
  EXPECT_EQ(StateName(v1::JOB_STATE_UNSPECIFIED), "");
  for (const v1::JobState state : {v1::QUEUED, v1::STARTING, v1::RUNNING, v1::STOPPING}) {
    EXPECT_FALSE(IsFinal(state)) << StateName(state);
  }
  for (const v1::JobState state : {v1::SUCCEEDED, v1::FAILED, v1::CANCELLED}) {
    EXPECT_TRUE(IsFinal(state)) << StateName(state);
  }
}

TEST(Format, Devices) {
  v1::WorkerInfo worker;
  worker.set_device("cpu");
  EXPECT_EQ(FormatDevice(worker), "cpu");
  worker.set_device("cuda");
  worker.mutable_gpu()->set_name("NVIDIA H200");
  worker.mutable_gpu()->set_memory_bytes(150754820096);
  EXPECT_EQ(FormatDevice(worker), "cuda: NVIDIA H200, 140 GiB");
  worker.mutable_gpu_usage()->set_busy_percent(97);
  worker.mutable_gpu_usage()->set_used_bytes(uint64_t{12} << 30 | 5);
  EXPECT_EQ(FormatDevice(worker), "cuda: NVIDIA H200, 140 GiB, 12 used, 97% busy");
}

TEST(Format, NumberList) {
  EXPECT_EQ(*ParseNumberList("1,2,8"), (std::vector<int>{1, 2, 8}));
  EXPECT_EQ(*ParseNumberList("3"), std::vector<int>{3});
  for (const char* bad : {"", "0", "-1", "1,,2", "1,", "two", "1 2", "99999999999"}) {
    EXPECT_EQ(ParseNumberList(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Format, OneLineHasNoControlCharacters) {
  EXPECT_EQ(OneLine("a\nb\tc\x1b[31m\n"), "a b c [31m");
  EXPECT_EQ(OneLine("größer"), "größer");
}

}  // namespace
}  // namespace lockstep::client
