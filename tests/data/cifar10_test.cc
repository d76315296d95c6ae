#include "worker/data/cifar10.h"

#include <array>
#include <cstdlib>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/data/cifar10_files.h"
#include "tests/data/idx_files.h"

namespace lockstep::data {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kRows = 7;
constexpr char kSecond[] = "/set/data_batch_2.bin";

class Cifar10 : public testing::Test {
 protected:
  Cifar10() { EXPECT_EQ(MakeDirectories(disk_, "/set"), absl::OkStatus()); }

  void Write(const std::string& path, const std::string& content) {
    ASSERT_EQ(WriteFileAtomically(disk_, path, content), absl::OkStatus());
  }
  void WriteTrain() {
    for (int64_t file = 0; file < 5; ++file) {
      Write(absl::StrCat("/set/data_batch_", file + 1, ".bin"), CifarBatch(file * kRows, kRows));
    }
  }
  absl::StatusOr<std::shared_ptr<const Dataset>> Load() { return LoadCifar10(disk_, options_); }

  void ExpectRefused(absl::StatusCode code, const std::string& file, const std::string& text) {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), AllOf(HasSubstr(file), HasSubstr(text), Not(HasSubstr("\n"))));
  }

  SimulatedDisk disk_;
  Cifar10Options options_ = {.folder = "/set", .rows_per_file = kRows};
};

void ExpectGood(const Dataset& set, int64_t samples) {
  ASSERT_EQ(set.samples(), samples);
  EXPECT_EQ(set.shape(), (SampleShape{32, 32, 3}));
  EXPECT_EQ(set.classes(), 10);
  EXPECT_EQ(set.type(), SampleType::kUint8);
  const auto* bytes = static_cast<const uint8_t*>(set.data());
  for (int64_t i = 0; i < samples; ++i) {
    ASSERT_EQ(set.labels()[i], i * 3 % 10);
    for (int64_t p = 0; p < 1024; ++p) {
      for (int64_t c = 0; c < 3; ++c) {
        ASSERT_EQ(bytes[set.OffsetOf(i) + p * 3 + c], CifarPixel(i, c, p))
            << "sample " << i << " pixel " << p << " channel " << c;
      }
    }
  }
}

TEST_F(Cifar10, ReadsEveryPacking) {
  for (const char* suffix : {"", ".xz", ".gz"}) {
    const auto packed = [&](const std::string& content) {
      return *suffix == '\0' ? content : suffix[1] == 'x' ? Xz(content) : Gzip(content);
    };
    ASSERT_EQ(RemoveTree(disk_, "/set"), absl::OkStatus());
    ASSERT_EQ(MakeDirectories(disk_, "/set"), absl::OkStatus());
    for (int64_t file = 0; file < 5; ++file) {
      Write(absl::StrCat("/set/data_batch_", file + 1, ".bin", suffix),
            packed(CifarBatch(file * kRows, kRows)));
    }
    Write(absl::StrCat("/set/test_batch.bin", suffix), packed(CifarBatch(0, kRows)));
    options_.split = Split::kTrain;
    auto set = Load();
    ASSERT_EQ(set.status(), absl::OkStatus());
    ExpectGood(**set, 5 * kRows);
    options_.split = Split::kValidation;
    set = Load();
    ASSERT_EQ(set.status(), absl::OkStatus());
    ExpectGood(**set, kRows);
  }
}

TEST_F(Cifar10, ReadsXzOfSeveralStreams) {
  const std::string batch = CifarBatch(0, kRows);
  Write("/set/test_batch.bin.xz", Xz(batch.substr(0, 1000)) + Xz("") + Xz(batch.substr(1000)));
  options_.split = Split::kValidation;
  const auto set = Load();
  ASSERT_EQ(set.status(), absl::OkStatus());
  ExpectGood(**set, kRows);
}

// Only the files that are needed have to be there.
TEST_F(Cifar10, UsesTheFirstSamples) {
  Write("/set/data_batch_1.bin", CifarBatch(0, kRows));
  Write("/set/data_batch_2.bin.xz", Xz(CifarBatch(kRows, kRows)));
  for (const int64_t samples : {1, 6, 7, 8, 14}) {
    options_.max_samples = samples;
    const auto set = Load();
    ASSERT_EQ(set.status(), absl::OkStatus());
    ExpectGood(**set, samples);
  }
  options_.max_samples = 15;
  ExpectRefused(absl::StatusCode::kNotFound, "/set", "no data_batch_3.bin");
  options_.max_samples = 5 * kRows + 1;
  ExpectRefused(absl::StatusCode::kInvalidArgument, "/set",
                "35 samples, but data.train_samples asks for 36");
}

TEST_F(Cifar10, RefusesMissingFolderAndFiles) {
  options_.folder = "/elsewhere";
  ExpectRefused(absl::StatusCode::kNotFound, "/elsewhere", "no such folder");
  options_.folder = "/set";
  ExpectRefused(absl::StatusCode::kNotFound, "/set",
                "no data_batch_1.bin in this folder; accepted: data_batch_1.bin, "
                "data_batch_1.bin.xz, data_batch_1.bin.gz");
  options_.split = Split::kValidation;
  ExpectRefused(absl::StatusCode::kNotFound, "/set", "no test_batch.bin");
}

TEST_F(Cifar10, RefusesTruncationsAndTrailingBytes) {
  WriteTrain();
  const std::string whole = CifarBatch(kRows, kRows);
  for (const int64_t size : {int64_t{0}, int64_t{1}, kCifarRow - 1, kCifarRow, 3 * kCifarRow + 40,
                             kRows * kCifarRow - 1}) {
    Write(kSecond, whole.substr(0, static_cast<size_t>(size)));
    ExpectRefused(absl::StatusCode::kDataLoss, kSecond,
                  absl::StrCat("truncated: it ends in row ", size / kCifarRow, " of 7"));
  }
  Write(kSecond, whole + "x");
  ExpectRefused(absl::StatusCode::kDataLoss, kSecond, "bytes follow row 6, the last of 7");
}

TEST_F(Cifar10, RefusesLabelsThatAreNone) {
  WriteTrain();
  std::string batch = CifarBatch(kRows, kRows);
  batch[5 * kCifarRow] = 10;
  Write(kSecond, batch);
  ExpectRefused(absl::StatusCode::kDataLoss, kSecond, "row 5 has label 10; accepted: 0 to 9");
  batch[5 * kCifarRow] = static_cast<char>(0xff);
  Write(kSecond, batch);
  ExpectRefused(absl::StatusCode::kDataLoss, kSecond, "row 5 has label 255; accepted: 0 to 9");
}

TEST_F(Cifar10, RefusesDamagedXz) {
  options_.split = Split::kValidation;
  const std::string path = "/set/test_batch.bin.xz", packed = Xz(CifarBatch(0, kRows));
  Write(path, packed.substr(0, packed.size() - 1));
  ExpectRefused(absl::StatusCode::kDataLoss, path, "the xz data is truncated");
  Write(path, packed.substr(0, packed.size() / 2));
  ExpectRefused(absl::StatusCode::kDataLoss, path, "the xz data is truncated");
  Write(path, packed + "bytes that follow");
  ExpectRefused(absl::StatusCode::kDataLoss, path, "the xz data is corrupt");
  std::string bytes = packed;
  bytes[bytes.size() / 2] ^= 1;
  Write(path, bytes);
  ExpectRefused(absl::StatusCode::kDataLoss, path, "the xz data is corrupt");
}

// Whatever the bytes, the reader refuses in one line that names the file, or returns a sound set.
TEST_F(Cifar10, FuzzedFilesAreRefusedOrSound) {
  std::mt19937 random(20240608);
  options_.split = Split::kValidation;
  const std::string plain = CifarBatch(0, kRows), packed = Xz(plain);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 2000; ++round) {
    const bool xz = round % 2 == 1;
    std::string bytes = xz ? packed : plain;
    for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
        case 2:
          bytes.insert(at, 1 + random() % 4, static_cast<char>(random()));
          break;
        case 3:
          bytes.erase(at, 1 + random() % 4);
          break;
      }
    }
    const std::string path = xz ? "/set/test_batch.bin.xz" : "/set/test_batch.bin";
    Write(path, bytes);
    const auto set = Load();
    if (set.ok()) {
      ++accepted;
      for (int64_t i = 0; i < kRows; ++i) {
        ASSERT_GE((*set)->labels()[i], 0);
        ASSERT_LT((*set)->labels()[i], 10);
      }
    } else {
      ++refused;
      ASSERT_THAT(set.status().message(), AllOf(HasSubstr(path), Not(HasSubstr("\n"))));
    }
    ASSERT_EQ(disk_.RemoveFile(path), absl::OkStatus());
  }
  EXPECT_GT(accepted, 100);  // changed pixels
  EXPECT_GT(refused, 1000);
}

// Krizhevsky 2009: each class has 5,000 training and 1,000 test images; the first ten labels of
// data_batch_1 and test_batch, and the training set's channel means, which are widely published.
TEST(Cifar10Official, IsReadWhole) {
  if (!HasOfficialCifar10()) {
    GTEST_SKIP() << "LOCKSTEP_DATA does not name a folder that holds cifar10/";
  }
  const char* root = std::getenv("LOCKSTEP_DATA");
  struct Expectation {
    Split split;
    int64_t samples;
    std::array<int32_t, 10> first_labels;
    std::array<double, 3> means;
  };
  const Expectation expectations[] = {
      {Split::kTrain, 50'000, {6, 9, 9, 4, 1, 1, 2, 7, 8, 3}, {0.4914, 0.4822, 0.4465}},
      {Split::kValidation, 10'000, {3, 8, 8, 0, 6, 6, 1, 6, 3, 1}, {0.4942, 0.4851, 0.4504}},
  };
  for (const Expectation& e : expectations) {
    const auto set =
        LoadCifar10(RealFileSystem(), {.folder = absl::StrCat(root, "/cifar10"), .split = e.split});
    ASSERT_EQ(set.status(), absl::OkStatus());
    ASSERT_EQ((*set)->samples(), e.samples);
    std::array<int64_t, 10> counts = {};
    for (int64_t i = 0; i < e.samples; ++i) ++counts[static_cast<size_t>((*set)->labels()[i])];
    EXPECT_THAT(counts, testing::Each(e.samples / 10));
    for (size_t i = 0; i < 10; ++i) EXPECT_EQ((*set)->labels()[i], e.first_labels[i]) << i;
    std::array<int64_t, 3> sums = {};
    const auto* bytes = static_cast<const uint8_t*>((*set)->data());
    for (int64_t i = 0; i < e.samples * 3072; ++i) sums[static_cast<size_t>(i % 3)] += bytes[i];
    for (size_t c = 0; c < 3; ++c) {
      EXPECT_NEAR(static_cast<double>(sums[c]) / (255.0 * 1024 * static_cast<double>(e.samples)),
                  e.means[c], 5e-5);
    }
  }
}

}  // namespace
}  // namespace lockstep::data
