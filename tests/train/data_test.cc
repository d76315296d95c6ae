// Data sets of every format, and augmentation, through real members: the promise of DESIGN section
// 1 holds for them, and what is wrong with a file is one line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/fs.h"
#include "tests/data/cifar10_files.h"
#include "tests/data/npy_files.h"
#include "tests/train/members.h"

namespace lockstep::train {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// 130 training samples in batches of 40: 5 a shard; the last of an epoch has 10, two shards' worth.
constexpr char kRest[] = R"(
model:
  layers:
    - {name: conv, type: conv2d, filters: 8, kernel: 3, padding: 1, stride: 2}
    - {name: norm, type: batch_norm, sync: batch}
    - {name: act, type: relu}
    - {name: pool, type: global_average_pool}
    - {name: flat, type: flatten}
    - {name: out, type: dense, units: 10}
optimizer: {type: momentum, learning_rate: 0.05}
train: {batch: 40, steps: 10, shards: 8, seed: 7, evaluate: {every_steps: 4}}
checkpoint: {every_steps: 5}
)";

constexpr char kAugment[] = "augment: {crop_padding: 4, flip: true, cutout: 8}";

// The folder of a small CIFAR-10, of which the first samples are there.
const std::string& Cifar10Folder() {
  static const std::string& folder = *new std::string([] {
    std::string path = TemporaryFolder();
    EXPECT_TRUE(WriteFileAtomically(path + "/data_batch_1.bin", data::CifarBatch(0, 130)).ok());
    EXPECT_TRUE(
        WriteFileAtomically(path + "/test_batch.bin.xz", data::Xz(data::CifarBatch(200, 61))).ok());
    return path;
  }());
  return folder;
}

// Features as floats and as bytes, int64 labels for training, uint8 ones for validation.
const std::string& NpyFolder() {
  static const std::string& folder = *new std::string([] {
    std::string path = TemporaryFolder();
    std::vector<float> x;
    std::vector<uint8_t> bytes;
    std::vector<int64_t> y;
    std::vector<uint8_t> byte_labels;
    for (int i = 0; i < 130; ++i) {
      y.push_back(i * 7 % 10);
      byte_labels.push_back(static_cast<uint8_t>(i % 10));
      for (int k = 0; k < 72; ++k) {
        x.push_back(static_cast<float>((i * 31 + k * 17) % 101) / 50 + static_cast<float>(i % 10));
        bytes.push_back(static_cast<uint8_t>(i + k));
      }
    }
    const auto write = [&](const std::string& name, const std::string& content) {
      EXPECT_TRUE(WriteFileAtomically(path + "/" + name, content).ok());
    };
    write("train_features.npy",
          data::NpyHeader("<f4", "(130, 6, 6, 2)") + data::Raw(x.data(), x.size()));
    write("train_labels.npy", data::NpyHeader("<i8", "(130,)") + data::Raw(y.data(), y.size()));
    const std::string all_bytes =
        data::NpyHeader("|u1", "(130, 6, 6, 2)") + data::Raw(bytes.data(), bytes.size());
    write("validation_features.npy",
          data::NpyHeader("<f4", "(130, 6, 6, 2)") + data::Raw(x.data(), x.size()));
    write("train_bytes.npy", all_bytes);
    write("validation_bytes.npy", all_bytes);
    write("validation_labels.npy",
          data::NpyHeader("|u1", "(130, 1)") + data::Raw(byte_labels.data(), byte_labels.size()));
    return path;
  }());
  return folder;
}

// The spec of one row of the list.
std::string YamlOf(const std::string& row) {
  static const int own_cache = setenv("LOCKSTEP_CACHE", TemporaryFolder().c_str(), 1);
  EXPECT_EQ(own_cache, 0);
  if (row == "cifar10" || row == "augment") {
    return absl::StrCat("data: {format: cifar10, path: ", Cifar10Folder(),
                        ", train_samples: 130, validation_samples: 61, "
                        "normalize: {mean: [0.49, 0.48, 0.45], std: [0.25, 0.24, 0.26]}",
                        row == "augment" ? absl::StrCat(", ", kAugment) : "", "}", kRest);
  }
  if (row == "synthetic") {
    return absl::StrCat(
        "data: {format: synthetic, shape: [9, 7, 3], train_samples: 130, validation_samples: 61, ",
        "normalize: {compute: true}, ", "augment: {crop_padding: 2, flip: true}}", kRest);
  }
  if (row == "npy" || row == "npy_compute") {
    return absl::StrCat("data: {format: npy, shape: [6, 6, 2], path: ", NpyFolder(),
                        ", validation_samples: 61, augment: {cutout: 3}",
                        row == "npy" ? ""
                                     : ", train_features: train_bytes.npy, validation_features: "
                                       "validation_bytes.npy, normalize: {compute: true}",
                        "}", kRest);
  }
  ADD_FAILURE() << row;
  return "";
}

class DataExactness : public testing::TestWithParam<std::tuple<const char*, std::pair<int, int>>> {
};

TEST_P(DataExactness, EveryNumberIsThatOfOneSlot) {
  const auto& [row, placement] = GetParam();
  const Training expected = RunMembers(YamlOf(row), {.workers = 1, .slots = 1});
  const Training actual =
      RunMembers(YamlOf(row), {.workers = placement.first, .slots = placement.second});
  ASSERT_EQ(AgreedDigest(actual), AgreedDigest(expected));
  ASSERT_EQ(expected.steps.size(), 10u);
  ASSERT_EQ(expected.evaluations.size(), 3u);
  EXPECT_EQ(Numbers(actual), Numbers(expected));
}

INSTANTIATE_TEST_SUITE_P(
    All, DataExactness,
    testing::Combine(testing::Values("cifar10", "augment", "synthetic", "npy", "npy_compute"),
                     testing::Values(std::pair(1, 1), std::pair(1, 2), std::pair(2, 1),
                                     std::pair(3, 1), std::pair(5, 1))),
    [](const auto& info) {
      return absl::StrCat(std::get<0>(info.param), "_", std::get<1>(info.param).first, "x",
                          std::get<1>(info.param).second);
    });

// How far the loader runs ahead changes nothing.
TEST(Prefetch, DoesNotChangeABit) {
  const std::string yaml = YamlOf("augment");
  const std::string digest = AgreedDigest(RunMembers(yaml, {.workers = 1, .slots = 2}));
  for (const char* depth : {"1", "7"}) {
    const std::string other = absl::StrReplaceAll(
        yaml, {{"train_samples", absl::StrCat("prefetch: ", depth, ", train_samples")}});
    EXPECT_EQ(AgreedDigest(RunMembers(other, {.workers = 2, .slots = 1})), digest) << depth;
  }
}

TEST(Augmentation, ChangesTrainingOnlyAndEachPartOfIt) {
  const std::string yaml = YamlOf("augment"),
                    parts[] = {"crop_padding: 4", "flip: true", "cutout: 8"};
  const Training whole = RunMembers(yaml, {.workers = 1, .slots = 2});
  std::vector<std::string> digests = {AgreedDigest(whole)};
  for (const std::string& part : parts) {
    const std::string off =
        absl::StrCat(part.substr(0, part.find(' ')), part == "flip: true" ? " false" : " 0");
    digests.push_back(AgreedDigest(
        RunMembers(absl::StrReplaceAll(yaml, {{part, off}}), {.workers = 1, .slots = 2})));
    EXPECT_NE(digests.back(), digests.front()) << off;
  }
  // Without a learning rate worth the name the model stays, and so does its score on the
  // validation set, which is not augmented.
  const auto still = [](const std::string& row) {
    return absl::StrReplaceAll(YamlOf(row), {{"learning_rate: 0.05", "learning_rate: 1e-30"},
                                             {"type: batch_norm, sync: batch", "type: tanh"}});
  };
  const Training with = RunMembers(still("augment"), {.workers = 1, .slots = 2});
  const Training without = RunMembers(still("cifar10"), {.workers = 1, .slots = 2});
  ASSERT_EQ(with.evaluations.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(with.evaluations[i].validation().loss(), without.evaluations[i].validation().loss());
  }
  EXPECT_NE(with.steps[0].train().loss(), without.steps[0].train().loss());
}

// In mid-epoch: the changes are a function of the step, not of a generator's state.
TEST(Augmentation, ResumesExactly) {
  const Cluster whole{.workers = 2, .slots = 1, .output_dir = TemporaryFolder()};
  const std::string digest = AgreedDigest(RunMembers(YamlOf("augment"), whole));
  Cluster rest{.workers = 1, .slots = 3};
  rest.resume_from = whole.output_dir + "/checkpoints/step-00000005";
  EXPECT_EQ(AgreedDigest(RunMembers(YamlOf("augment"), rest)), digest);
  const std::string other = absl::StrReplaceAll(YamlOf("augment"), {{"cutout: 8", "cutout: 9"}});
  EXPECT_THAT(RunMembers(other, rest).prepare_error, HasSubstr("data.augment"));
}

std::string PrepareError(const std::string& yaml) {
  const std::string error = RunMembers(yaml, {.workers = 1}).prepare_error;
  EXPECT_THAT(error, AllOf(Not(testing::IsEmpty()), Not(HasSubstr("\n"))));
  return error;
}

TEST(BadData, IsOneLineThatNamesFileAndRow) {
  const std::string yaml = YamlOf("cifar10"), file = Cifar10Folder() + "/data_batch_1.bin";
  EXPECT_THAT(
      PrepareError(absl::StrReplaceAll(yaml, {{"train_samples: 130", "train_samples: 131"}})),
      AllOf(HasSubstr(file), HasSubstr("truncated: it ends in row 130 of 10000")));
  EXPECT_THAT(PrepareError(absl::StrReplaceAll(YamlOf("npy"), {{"batch: 40", "batch: 131"}})),
              AllOf(HasSubstr(NpyFolder() + "/train_features.npy"),
                    HasSubstr("ends after row 129, smaller than one batch of 131")));
  const std::string folder = TemporaryFolder();
  std::string batch = data::CifarBatch(0, 130);
  batch[77 * data::kCifarRow] = 20;
  ASSERT_TRUE(WriteFileAtomically(folder + "/data_batch_1.bin", batch).ok());
  EXPECT_THAT(PrepareError(absl::StrReplaceAll(yaml, {{Cifar10Folder(), folder}})),
              AllOf(HasSubstr(folder + "/data_batch_1.bin"), HasSubstr("row 77 has label 20")));
}

TEST(BadData, OfNpyIsOneLine) {
  const std::string folder = TemporaryFolder();
  for (const char* name : {"train_features.npy", "train_labels.npy", "validation_features.npy",
                           "validation_labels.npy"}) {
    const auto content = ReadFile(NpyFolder() + "/" + name, 1 << 20);
    ASSERT_TRUE(WriteFileAtomically(folder + "/" + name, *content).ok());
  }
  const std::string yaml = absl::StrReplaceAll(YamlOf("npy"), {{NpyFolder(), folder}});
  const std::string x = folder + "/train_features.npy";
  const std::string good = ReadFile(x, 1 << 20).value();
  const auto error = [&](const std::string& content) {
    EXPECT_TRUE(WriteFileAtomically(x, content).ok());
    return PrepareError(yaml);
  };
  EXPECT_THAT(error(good.substr(0, good.size() - 289)),
              HasSubstr(x + ": truncated: it ends in row 128 of 130"));
  EXPECT_THAT(error(absl::StrReplaceAll(good, {{"<f4", "<f2"}})), HasSubstr(x + ": its elements"));
  EXPECT_THAT(error(absl::StrReplaceAll(good, {{"False", "True "}})),
              HasSubstr(x + ": its elements are in Fortran order"));
  EXPECT_THAT(PrepareError(absl::StrReplaceAll(
                  YamlOf("npy_compute"), {{"validation_bytes.npy", "validation_features.npy"}})),
              HasSubstr("validation_features.npy: its features are float32"));
}

// What a model cannot take is found before the first step, in the validation set too.
TEST(BadData, ValuesThatTheModelCannotTakeAreNamed) {
  const auto embedding = [](int vocabulary) {
    return absl::StrCat("data: {format: npy, shape: [6, 6, 2], path: ", NpyFolder(),
                        ", train_features: train_bytes.npy, validation_features: "
                        "validation_bytes.npy, validation_samples: 61, normalize: {mean: [0], std: "
                        "[0.00392156862745098]}}\n"
                        "model:\n  layers:\n    - {name: flat, type: flatten}\n"
                        "    - {name: table, type: embedding, vocabulary: ",
                        vocabulary,
                        ", units: 2}\n    - {type: flatten}\n    - {type: dense, units: 10}\n"
                        "optimizer: {learning_rate: 0.1}\ntrain: {batch: 40, steps: 2}\n");
  };
  // Byte k of sample i is i + k: 72 values of 130 samples.
  EXPECT_THAT(PrepareError(embedding(150)), HasSubstr("train_bytes.npy: row 79 has the value 150"));
  EXPECT_EQ(RunMembers(embedding(201), {.workers = 1}).prepare_error, "");
  EXPECT_THAT(PrepareError(absl::StrReplaceAll(embedding(201),
                                               {{"std: [0.00392156862745098]", "std: [1]"}})),
              AllOf(HasSubstr("train_bytes.npy: row 0 has the value 1, normalized 0.00392157"),
                    HasSubstr("whole numbers from 0 to 200 for the embedding table")));
  std::string yaml = YamlOf("synthetic");
  yaml = absl::StrReplaceAll(
      yaml, {{"type: dense, units: 10", "type: dense, units: 189"},
             {"optimizer:", "loss: {type: sigmoid_cross_entropy, target: input}\noptimizer:"}});
  EXPECT_THAT(PrepareError(yaml), HasSubstr("numbers from 0 to 1 for sigmoid_cross_entropy"));
}

// Waiting is a share, and every format reports it.
TEST(Waiting, IsReported) {
  for (const char* row : {"augment", "synthetic"}) {
    const Training run = RunMembers(YamlOf(row), {.workers = 1, .slots = 2});
    AgreedDigest(run);
    EXPECT_GE(run.ended[0].result().data_wait_share(), 0);
    EXPECT_LE(run.ended[0].result().data_wait_share(), 1);
  }
}

// The official files, where they are: the same equality on real pixels.
TEST(Cifar10Official, TrainsToTheSameBits) {
  if (!data::HasOfficialCifar10()) {
    GTEST_SKIP() << "LOCKSTEP_DATA does not name a folder that holds cifar10/";
  }
  const std::string yaml = absl::StrReplaceAll(YamlOf("augment"), {{Cifar10Folder(), "cifar10"}});
  const Training one = RunMembers(yaml, {.workers = 1, .slots = 1});
  EXPECT_EQ(AgreedDigest(RunMembers(yaml, {.workers = 3, .slots = 1})), AgreedDigest(one));
}

}  // namespace
}  // namespace lockstep::train
