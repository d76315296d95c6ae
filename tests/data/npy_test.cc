#include "worker/data/npy.h"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/data/npy_files.h"

namespace lockstep::data {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kFeatures[] = "/set/x.npy";
constexpr char kLabels[] = "/set/y.npy";

class Npy : public testing::Test {
 protected:
  Npy() {
    EXPECT_EQ(MakeDirectories(disk_, "/set"), absl::OkStatus());
    for (int i = 0; i < 5 * 6; ++i) {
      bytes_.push_back(static_cast<uint8_t>(i * 7));
      floats_.push_back(static_cast<float>(i) * 0.25f - 1);
    }
    WriteGood();
  }
  void Write(const std::string& path, const std::string& content) {
    ASSERT_EQ(WriteFileAtomically(disk_, path, content), absl::OkStatus());
  }
  void WriteGood() {
    Write(kFeatures, NpyHeader("|u1", "(5, 2, 3)") + Raw(bytes_.data(), 30));
    Write(kLabels, NpyHeader("<i8", "(5,)") + Raw(labels_.data(), 5));
  }
  absl::StatusOr<std::shared_ptr<const Dataset>> Load() { return LoadNpy(disk_, options_); }
  void ExpectRefused(absl::StatusCode code, const std::string& file, const std::string& text) {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), AllOf(HasSubstr(file), HasSubstr(text), Not(HasSubstr("\n"))));
  }

  SimulatedDisk disk_;
  std::vector<uint8_t> bytes_;
  std::vector<float> floats_;
  std::vector<int64_t> labels_ = {0, 3, 1, 2, 0};
  NpyOptions options_ = {
      .features = kFeatures, .labels = kLabels, .shape = {2, 3, 1}, .classes = 4};
};

TEST_F(Npy, ReadsBytesAndFloatsOfEveryVersionAndShape) {
  for (const int version : {1, 2, 3}) {
    for (const char* shape : {"(5, 2, 3)", "(5, 2, 3, 1)", "(5,1,2,3)"}) {
      Write(kFeatures, NpyHeader("|u1", shape, "False", version) + Raw(bytes_.data(), 30));
      const auto set = Load();
      ASSERT_EQ(set.status(), absl::OkStatus());
      ASSERT_EQ((*set)->samples(), 5);
      EXPECT_EQ((*set)->type(), SampleType::kUint8);
      EXPECT_EQ(std::memcmp((*set)->data(), bytes_.data(), 30), 0);
      for (size_t i = 0; i < 5; ++i) EXPECT_EQ((*set)->labels()[i], labels_[i]);
      Write(kFeatures, NpyHeader("<f4", shape, "False", version) + Raw(floats_.data(), 30));
      const auto floats = Load();
      ASSERT_EQ(floats.status(), absl::OkStatus());
      EXPECT_EQ((*floats)->type(), SampleType::kFloat32);
      EXPECT_EQ(std::memcmp((*floats)->data(), floats_.data(), 120), 0);
      EXPECT_NE((*floats)->digest(), (*set)->digest());
    }
  }
  options_.max_samples = 3;
  EXPECT_EQ((*Load())->samples(), 3);
}

template <class T>
std::string LabelFile(const std::string& type, const std::vector<int64_t>& labels) {
  const std::vector<T> values(labels.begin(), labels.end());
  return NpyHeader(type, "(5,)") + Raw(values.data(), 5);
}

TEST_F(Npy, ReadsLabelsOfEveryIntegerType) {
  for (const std::string& file :
       {LabelFile<uint8_t>("|u1", labels_), LabelFile<int8_t>("|i1", labels_),
        LabelFile<uint16_t>("<u2", labels_), LabelFile<int16_t>("<i2", labels_),
        LabelFile<uint32_t>("<u4", labels_), LabelFile<int32_t>("<i4", labels_),
        LabelFile<uint64_t>("<u8", labels_), LabelFile<int64_t>("<i8", labels_)}) {
    Write(kLabels, file);
    const auto set = Load();
    ASSERT_EQ(set.status(), absl::OkStatus());
    for (size_t i = 0; i < 5; ++i) EXPECT_EQ((*set)->labels()[i], labels_[i]);
  }
  for (const int64_t bad : {int64_t{4}, int64_t{-1}, int64_t{1} << 32, -(int64_t{1} << 62)}) {
    labels_[3] = bad;
    Write(kLabels, LabelFile<int64_t>("<i8", labels_));
    ExpectRefused(absl::StatusCode::kDataLoss, kLabels, absl::StrCat("row 3 has label ", bad, ";"));
    if (bad >= 0) continue;
    Write(kLabels, LabelFile<uint64_t>("<u8", labels_));
    ExpectRefused(absl::StatusCode::kDataLoss, kLabels,
                  absl::StrCat("row 3 has label ", static_cast<uint64_t>(bad), ";"));
  }
}

TEST_F(Npy, RefusesTheWrongTypeOrderAndShape) {
  const auto features = [&](const std::string& header) {
    Write(kFeatures, header + std::string(240, '\1'));
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  features(NpyHeader("<f8", "(5, 2, 3)"));
  ExpectRefused(invalid, kFeatures, "type '<f8'; accepted: uint8 ('|u1') and float32 ('<f4')");
  features(NpyHeader(">f4", "(5, 2, 3)"));
  ExpectRefused(invalid, kFeatures, "type '>f4'");
  features(NpyHeader("|u1", "(5, 2, 3)", "True"));
  ExpectRefused(invalid, kFeatures, "Fortran order; accepted: C order");
  Write(kFeatures, NpyHeader("|u1", "(5, 3, 2)") + std::string(30, '\1'));
  ExpectRefused(invalid, kFeatures, "its samples are 3 x 2, but data.shape is 2 x 3 x 1");
  WriteGood();
  Write(kLabels, NpyHeader("<f4", "(5,)") + std::string(20, '\0'));
  ExpectRefused(invalid, kLabels, "type '<f4'; accepted: little-endian integers");
  Write(kLabels, NpyHeader("|u1", "(5, 4)") + std::string(20, '\0'));
  ExpectRefused(invalid, kLabels, "its rows are 4; accepted: one label a row");
  Write(kLabels, NpyHeader("|u1", "(4,)") + std::string(4, '\0'));
  ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "has 5 samples, but");
  WriteGood();
  options_.max_samples = 6;
  ExpectRefused(invalid, kFeatures, "5 samples, but data.train_samples asks for 6");
}

TEST_F(Npy, RefusesEveryTruncationAndTrailingBytes) {
  const std::string whole = NpyHeader("|u1", "(5, 2, 3)") + Raw(bytes_.data(), 30);
  for (size_t size = 0; size < whole.size(); ++size) {
    Write(kFeatures, whole.substr(0, size));
    ExpectRefused(absl::StatusCode::kDataLoss, kFeatures, "");
  }
  Write(kFeatures, whole.substr(0, whole.size() - 7));
  ExpectRefused(absl::StatusCode::kDataLoss, kFeatures, "truncated: it ends in row 3 of 5");
  Write(kFeatures, whole + "x");
  ExpectRefused(absl::StatusCode::kDataLoss, kFeatures, "bytes follow row 4, the last of 5");
  for (const char* shape : {"(0, 2, 3)", "()", "(5, 0)", "(5, 99999999999999999)",
                            "(5, 9999999999, 9999999999, 9999999999)", "(-5, 2, 3)"}) {
    Write(kFeatures, NpyHeader("|u1", shape) + Raw(bytes_.data(), 30));
    ExpectRefused(absl::StatusCode::kDataLoss, kFeatures, "");
  }
}

// Whatever the header, the reader refuses in one line that names the file, or returns a sound set.
TEST_F(Npy, FuzzedFilesAreRefusedOrSound) {
  std::mt19937 random(20240609);
  const std::string whole = NpyHeader("|u1", "(5, 2, 3)") + Raw(bytes_.data(), 30);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string bytes = whole;
    for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t most = random() % 2 == 0 ? bytes.size() : 64;
      const size_t at = random() % most;
      if (random() % 2 == 0) {
        bytes[at] = static_cast<char>(random());
      } else {
        bytes.erase(at, 1);
      }
    }
    Write(kFeatures, bytes);
    const auto set = Load();
    if (set.ok()) {
      ++accepted;
      ASSERT_EQ((*set)->samples(), 5);
    } else {
      ++refused;
      ASSERT_THAT(set.status().message(), AllOf(HasSubstr("/set/"), Not(HasSubstr("\n"))));
    }
  }
  EXPECT_GT(accepted, 50);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace lockstep::data
