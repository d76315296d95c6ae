#include "worker/data/idx.h"

#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/data/idx_files.h"

namespace lockstep::data {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kFolder[] = "/set";
constexpr char kImages[] = "/set/train-images-idx3-ubyte";
constexpr char kLabels[] = "/set/train-labels-idx1-ubyte";

class Idx : public testing::Test {
 protected:
  Idx() { EXPECT_EQ(MakeDirectories(disk_, kFolder), absl::OkStatus()); }

  void Write(const std::string& path, const std::string& content) {
    ASSERT_EQ(WriteFileAtomically(disk_, path, content), absl::OkStatus());
  }
  void WriteGood() {
    Write(kImages, IdxImages(5, 2, 3));
    Write(kLabels, IdxLabels(5, 4));
  }
  absl::StatusOr<std::shared_ptr<const Dataset>> Load() { return LoadIdx(disk_, options_); }

  // Loading fails with the code, in one line that names the file.
  void ExpectRefused(absl::StatusCode code, const std::string& file, const std::string& text) {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), AllOf(HasSubstr(file), HasSubstr(text), Not(HasSubstr("\n"))));
  }

  SimulatedDisk disk_;
  IdxOptions options_ = {.folder = kFolder, .shape = {2, 3, 1}, .classes = 4};
};

void ExpectGood(const Dataset& set, int64_t samples) {
  ASSERT_EQ(set.samples(), samples);
  EXPECT_EQ(set.features(), 6);
  EXPECT_EQ(set.classes(), 4);
  for (int64_t i = 0; i < samples * 6; ++i)
    EXPECT_EQ(static_cast<const uint8_t*>(set.data())[i], (i * 7 + 3) % 256);
  for (int64_t i = 0; i < samples; ++i) EXPECT_EQ(set.labels()[i], i % 4);
}

TEST_F(Idx, ReadsEveryNameAndPacking) {
  for (const char* separator : {"-", "."}) {
    for (const bool gzip : {false, true}) {
      for (const Split split : {Split::kTrain, Split::kValidation}) {
        disk_.Recover(SimulatedDisk::Loss::kNothing);
        ASSERT_EQ(RemoveTree(disk_, kFolder), absl::OkStatus());
        ASSERT_EQ(MakeDirectories(disk_, kFolder), absl::OkStatus());
        options_.split = split;
        const std::string stem = std::string("/set/") + (split == Split::kTrain ? "train" : "t10k");
        const std::string suffix = std::string("-ubyte") + (gzip ? ".gz" : "");
        const std::string images = IdxImages(5, 2, 3), labels = IdxLabels(5, 4);
        Write(stem + "-images" + separator + "idx3" + suffix, gzip ? Gzip(images) : images);
        Write(stem + "-labels" + separator + "idx1" + suffix, gzip ? Gzip(labels) : labels);
        const auto set = Load();
        ASSERT_EQ(set.status(), absl::OkStatus());
        ExpectGood(**set, 5);
      }
    }
  }
}

TEST_F(Idx, ReadsGzipOfSeveralMembers) {
  const std::string images = IdxImages(5, 2, 3);
  Write(std::string(kImages) + ".gz",
        Gzip(images.substr(0, 11)) + Gzip("") + Gzip(images.substr(11)));
  Write(kLabels, IdxLabels(5, 4));
  const auto set = Load();
  ASSERT_EQ(set.status(), absl::OkStatus());
  ExpectGood(**set, 5);
}

TEST_F(Idx, ReadsColour) {
  options_.shape = {2, 3, 3};
  Write("/set/train-images-idx4-ubyte", IdxImages(5, 2, 3, 3));
  Write(kLabels, IdxLabels(5, 4));
  const auto set = Load();
  ASSERT_EQ(set.status(), absl::OkStatus());
  EXPECT_EQ((*set)->features(), 18);
}

TEST_F(Idx, UsesTheFirstSamples) {
  WriteGood();
  options_.max_samples = 3;
  const auto set = Load();
  ASSERT_EQ(set.status(), absl::OkStatus());
  ExpectGood(**set, 3);
  options_.max_samples = 6;
  ExpectRefused(absl::StatusCode::kInvalidArgument, kImages,
                "5 samples, but data.train_samples asks for 6");
}

TEST_F(Idx, DigestCoversShapeImagesAndLabels) {
  WriteGood();
  const std::string digest = (*Load())->digest();
  EXPECT_EQ(digest.size(), 64u);
  EXPECT_EQ((*Load())->digest(), digest);
  Write(std::string(kImages) + ".gz", Gzip(IdxImages(5, 2, 3)));
  disk_.RemoveFile(kImages).IgnoreError();
  EXPECT_EQ((*Load())->digest(), digest);  // packing is no part of it

  std::vector<std::string> digests = {digest};
  std::string images = IdxImages(5, 2, 3);
  images.back() ^= 1;
  Write(kImages, images);
  digests.push_back((*Load())->digest());
  Write(kImages, IdxImages(5, 2, 3));
  Write(kLabels, IdxLabels(std::string("\0\1\2\3\1", 5)));
  digests.push_back((*Load())->digest());
  Write(kLabels, IdxLabels(5, 4));
  Write(kImages, IdxImages(5, 3, 2));
  options_.shape = {3, 2, 1};
  digests.push_back((*Load())->digest());
  options_.max_samples = 4;
  digests.push_back((*Load())->digest());
  for (size_t i = 0; i < digests.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(digests[i], digests[j]) << i << " " << j;
  }
  EXPECT_NE(CombinedDigest(**Load(), **Load()), (*Load())->digest());
}

TEST_F(Idx, RefusesMissingFolderAndFiles) {
  options_.folder = "/elsewhere";
  ExpectRefused(absl::StatusCode::kNotFound, "/elsewhere", "no such folder");
  options_.folder = kFolder;
  ExpectRefused(absl::StatusCode::kNotFound, kFolder, "no train-images-idx3-ubyte");
  Write(kImages, IdxImages(5, 2, 3));
  ExpectRefused(absl::StatusCode::kNotFound, kFolder, "no train-labels-idx1-ubyte");
}

TEST_F(Idx, RefusesWrongMagic) {
  WriteGood();
  Write(kImages, IdxLabels(5, 4) + std::string(100, 'x'));
  ExpectRefused(absl::StatusCode::kDataLoss, kImages,
                "magic number 0x00000801; accepted: 0x00000803");
  WriteGood();
  Write(kLabels, "<!DOCTYPE html>");
  ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "accepted: 0x00000801");
}

TEST_F(Idx, RefusesAnotherShape) {
  WriteGood();
  options_.shape = {28, 28, 1};
  ExpectRefused(absl::StatusCode::kInvalidArgument, kImages,
                "its images are 2 x 3 x 1, but data.shape is 28 x 28 x 1");
  options_.shape = {0, 3, 1};
  ExpectRefused(absl::StatusCode::kInvalidArgument, "", "data.shape 0 x 3 x 1");
}

TEST_F(Idx, RefusesEveryTruncation) {
  const std::string images = IdxImages(5, 2, 3), labels = IdxLabels(5, 4);
  for (const bool gzip : {false, true}) {
    const std::string suffix = gzip ? ".gz" : "";
    const std::string all_images = gzip ? Gzip(images) : images,
                      all_labels = gzip ? Gzip(labels) : labels;
    Write(kLabels + suffix, all_labels);
    for (size_t size = 0; size < all_images.size(); ++size) {
      Write(kImages + suffix, all_images.substr(0, size));
      ExpectRefused(absl::StatusCode::kDataLoss, kImages, "");
    }
    Write(kImages + suffix, all_images);
    for (size_t size = 0; size < all_labels.size(); ++size) {
      Write(kLabels + suffix, all_labels.substr(0, size));
      ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "");
    }
    disk_.RemoveFile(kImages + suffix).IgnoreError();
    disk_.RemoveFile(kLabels + suffix).IgnoreError();
  }
}

TEST_F(Idx, RefusesTrailingBytes) {
  WriteGood();
  Write(kImages, IdxImages(5, 2, 3) + "x");
  ExpectRefused(absl::StatusCode::kDataLoss, kImages, "bytes follow the 30 that its header says");
  disk_.RemoveFile(kImages).IgnoreError();
  const std::string packed = std::string(kImages) + ".gz";
  Write(packed, Gzip(IdxImages(5, 2, 3) + "x"));
  ExpectRefused(absl::StatusCode::kDataLoss, packed, "bytes follow the 30");
  Write(packed, Gzip(IdxImages(5, 2, 3)) + "garbage");
  ExpectRefused(absl::StatusCode::kDataLoss, packed, "bytes follow the end of the gzip data");
}

TEST_F(Idx, RefusesCorruptGzip) {
  WriteGood();
  disk_.RemoveFile(kImages).IgnoreError();
  const std::string path = std::string(kImages) + ".gz";
  const std::string packed = Gzip(IdxImages(5, 2, 3));
  std::string bytes = packed;
  bytes[bytes.size() - 6] ^= 1;  // in the CRC
  Write(path, bytes);
  ExpectRefused(absl::StatusCode::kDataLoss, path,
                "the gzip data is corrupt (incorrect data check)");
  Write(path, packed.substr(0, packed.size() - 3));  // all content, but not the whole trailer
  ExpectRefused(absl::StatusCode::kDataLoss, path, "the gzip data is truncated");
}

TEST_F(Idx, RefusesImpossibleSizesWithoutTakingMemory) {
  WriteGood();
  Write(kImages, IdxHeader(0x803, {0, 2, 3}));
  ExpectRefused(absl::StatusCode::kDataLoss, kImages, "no samples");
  Write(kImages, IdxHeader(0x803, {5, 0, 3}));
  ExpectRefused(absl::StatusCode::kDataLoss, kImages, "size 2 of its header is 0");
  Write(kImages, IdxHeader(0x803, {0xffffffffu, 0xffffffffu, 0xffffffffu}));
  ExpectRefused(absl::StatusCode::kResourceExhausted, kImages, "accepted: up to 64 GiB");
  Write(kImages, IdxHeader(0x803, {0xffffffffu, 2, 3}) + "abc");
  ExpectRefused(absl::StatusCode::kDataLoss, kImages, "more than the file can hold");
  disk_.RemoveFile(kImages).IgnoreError();
  Write(std::string(kImages) + ".gz", Gzip(IdxHeader(0x803, {0xffffffffu, 2, 3}) + "abc"));
  ExpectRefused(absl::StatusCode::kDataLoss, kImages, "more than the file can hold");
}

TEST_F(Idx, RefusesUnequalCountsAndLabelsOutOfRange) {
  WriteGood();
  Write(kLabels, IdxLabels(4, 4));
  ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "has 5 images, but");
  Write(kLabels, IdxLabels(std::string("\0\1\2\4\1", 5)));
  ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "row 3 has label 4; accepted: 0 to 3");
  Write(kLabels, IdxLabels(std::string("\0\1\2\1\xff", 5)));
  ExpectRefused(absl::StatusCode::kDataLoss, kLabels, "row 4 has label 255; accepted: 0 to 3");
}

// Whatever the bytes, the reader refuses in one line that names a file, or returns a sound data
// set.
TEST_F(Idx, FuzzedFilesAreRefusedOrSound) {
  std::mt19937 random(20240607);
  const std::string plain[2] = {IdxImages(5, 2, 3), IdxLabels(5, 4)};
  int accepted = 0, refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    const bool gzip = round % 2 == 1;
    const int victim = static_cast<int>(random() % 2);
    for (int i = 0; i < 2; ++i) {
      std::string bytes = gzip ? Gzip(plain[i]) : plain[i];
      if (i == victim) {
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
              if (bytes.empty()) bytes = "x";
              break;
          }
        }
      }
      Write((i == 0 ? kImages : kLabels) + std::string(gzip ? ".gz" : ""), bytes);
    }
    const auto set = Load();
    if (set.ok()) {
      ++accepted;
      ASSERT_EQ((*set)->samples(), 5);
      for (int64_t i = 0; i < 5; ++i) {
        ASSERT_GE((*set)->labels()[i], 0);
        ASSERT_LT((*set)->labels()[i], 4);
      }
    } else {
      ++refused;
      ASSERT_THAT(set.status().message(), AllOf(HasSubstr(kFolder), Not(HasSubstr("\n"))));
    }
    for (const char* path : {kImages, kLabels}) {
      disk_.RemoveFile(path + std::string(gzip ? ".gz" : "")).IgnoreError();
    }
  }
  EXPECT_GT(accepted, 1000);  // changed pixels
  EXPECT_GT(refused, 10'000);
}

constexpr char kFashionMnist[] = "/usr/share/datasets/fashion-mnist";

// Labels and moments as published with the data set (Xiao, Rasul & Vollgraf 2017; every class has
// the same number of samples; mean 0.2860 and standard deviation 0.3530 of the training pixels).
TEST(FashionMnist, IsReadWhole) {
  struct Expectation {
    Split split;
    int64_t samples;
    std::vector<int> first_labels;
  };
  const Expectation expectations[] = {
      {Split::kTrain, 60'000, {9, 0, 0, 3, 0, 2, 7, 2, 5, 5}},
      {Split::kValidation, 10'000, {9, 2, 1, 1, 6, 1, 4, 6, 5, 7}},
  };
  std::vector<std::string> digests;
  for (const Expectation& e : expectations) {
    const auto set = LoadIdx(RealFileSystem(),
                             {.folder = kFashionMnist, .shape = {28, 28, 1}, .split = e.split});
    ASSERT_EQ(set.status(), absl::OkStatus());
    ASSERT_EQ((*set)->samples(), e.samples);
    EXPECT_EQ((*set)->features(), 784);
    std::array<int64_t, 10> counts = {};
    for (int64_t i = 0; i < e.samples; ++i) ++counts[static_cast<size_t>((*set)->labels()[i])];
    EXPECT_THAT(counts, testing::Each(e.samples / 10));
    for (size_t i = 0; i < 10; ++i) EXPECT_EQ((*set)->labels()[i], e.first_labels[i]);
    digests.push_back((*set)->digest());
    if (e.split != Split::kTrain) continue;
    double sum = 0, squares = 0;
    const int64_t pixels = e.samples * 784;
    for (int64_t i = 0; i < pixels; ++i) {
      const double x = static_cast<const uint8_t*>((*set)->data())[i] / 255.0;
      sum += x;
      squares += x * x;
    }
    const double mean = sum / static_cast<double>(pixels);
    EXPECT_NEAR(mean, 0.2860, 5e-5);
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(pixels) - mean * mean), 0.3530, 5e-5);
  }
  EXPECT_NE(digests[0], digests[1]);
}

}  // namespace
}  // namespace lockstep::data
