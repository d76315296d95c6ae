#include "worker/train/safetensors.h"

#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"

namespace lockstep::train {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kPath[] = "/model.safetensors";

std::string File(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + data;
}

class Safetensors : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& bytes) {
    EXPECT_EQ(WriteFileAtomically(disk_, kPath, bytes), absl::OkStatus());
    return SafetensorsFile::Open(disk_, kPath);
  }
  void ExpectRefused(const std::string& bytes, const std::string& text,
                     absl::StatusCode code = absl::StatusCode::kDataLoss) {
    const absl::Status status = Open(bytes).status();
    EXPECT_EQ(status.code(), code) << status << " for " << text;
    EXPECT_THAT(status.message(), AllOf(HasSubstr(kPath), HasSubstr(text), Not(HasSubstr("\n"))));
  }

  SimulatedDisk disk_;
};

TEST_F(Safetensors, ReadsWhatItWrote) {
  const std::vector<float> a = {1.5f,
                                -0.0f,
                                std::numeric_limits<float>::infinity(),
                                std::numeric_limits<float>::quiet_NaN(),
                                1e-42f,
                                3.0f};
  const std::vector<float> b = {7.0f};
  const std::vector<TensorToWrite> tensors = {{"momentum/conv1.weight", {2, 3}, a.data()},
                                              {"scalar", {}, b.data()},
                                              {"empty", {0, 4}, nullptr}};
  const auto written = WriteSafetensors(disk_, kPath, tensors, {{"step", "12"}});
  ASSERT_EQ(written.status(), absl::OkStatus());
  const std::string bytes = ReadFile(disk_, kPath, 1 << 20).value();
  EXPECT_EQ(written->bytes, static_cast<int64_t>(bytes.size()));
  EXPECT_EQ(written->sha256, Sha256Hex(bytes));

  const auto file = SafetensorsFile::Open(disk_, kPath);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ((*file)->metadata(), (std::map<std::string, std::string>{{"step", "12"}}));
  ASSERT_EQ((*file)->tensors().size(), 3u);
  const SafetensorsFile::Tensor* tensor = (*file)->Find("momentum/conv1.weight");
  ASSERT_NE(tensor, nullptr);
  EXPECT_THAT(tensor->shape, testing::ElementsAre(2, 3));
  EXPECT_EQ(tensor->offset % 8, 0);
  std::vector<float> back(6);
  ASSERT_EQ((*file)->Read(*tensor, back.data()), absl::OkStatus());
  EXPECT_EQ(std::memcmp(back.data(), a.data(), sizeof(float) * 6), 0);
  EXPECT_TRUE((*file)->Find("scalar")->shape.empty());
  EXPECT_EQ((*file)->Find("empty")->elements, 0);
  EXPECT_EQ((*file)->Find("none"), nullptr);
}

// The bytes as the format's documentation lays them out, written by hand.
TEST_F(Safetensors, IsTheFormat) {
  const float values[] = {1.0f, 2.0f};
  ASSERT_TRUE(WriteSafetensors(disk_, kPath, {{"w", {2}, values}}, {}).ok());
  std::string header = R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::string data("\x00\x00\x80\x3f\x00\x00\x00\x40", 8);
  EXPECT_EQ(ReadFile(disk_, kPath, 1000).value(), File(header, data));
}

TEST_F(Safetensors, WriterRefusesImpossibleTensors) {
  const float value = 1;
  for (const std::vector<TensorToWrite>& tensors :
       {std::vector<TensorToWrite>{{"w", {1}, &value}, {"w", {1}, &value}},
        {{"", {1}, &value}},
        {{"__metadata__", {1}, &value}},
        {{"w", {-1}, &value}},
        {{"w", {int64_t{1} << 40, int64_t{1} << 40}, &value}},
        {{"\xff\xfe", {1}, &value}}}) {
    const absl::Status status = WriteSafetensors(disk_, kPath, tensors, {}).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
}

TEST_F(Safetensors, RefusesWhatTheFormatForbids) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                           R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})";
  const std::string data(12, 'd');
  ASSERT_EQ(Open(File(good, data)).status(), absl::OkStatus());
  const auto with = [&](const std::string& from, const std::string& to) {
    EXPECT_TRUE(absl::StrContains(good, from));
    return File(absl::StrReplaceAll(good, {{from, to}}), data);
  };
  ExpectRefused("", "0 bytes, shorter than its header's length");
  ExpectRefused("1234567", "7 bytes");
  ExpectRefused(std::string(8, '\xff') + data, "accepted: up to 12");
  ExpectRefused(std::string("\x00\xe1\xf5\x05\x01\x00\x00\x00", 8) + data,
                "a header of 4394967296 bytes");
  ExpectRefused(File("", data), "does not begin with '{'");
  ExpectRefused(File(" {}", ""), "does not begin with '{'");
  ExpectRefused(File("{", data), "no JSON object");
  ExpectRefused(File("{}x", ""), "no JSON object");
  ExpectRefused(File("{\"\xff\": 1}", ""), "no JSON object");
  ExpectRefused(File("{}", "x"), "1 bytes follow the last tensor");
  ExpectRefused(File("{" + std::string(100'000, '['), ""), "");
  ExpectRefused(File("{\"a\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}", ""),
                "nested too deeply");
  ExpectRefused(File(good, data + "x"), "1 bytes follow the last tensor");
  ExpectRefused(File(good, data.substr(1)),
                "\"b\" has data_offsets that are no range within the 11");
  ExpectRefused(with("\"b\"", "\"a\""), "\"a\" is there twice");
  ExpectRefused(with("\"F32\",\"shape\":[1]", "\"F32\",\"dtype\":\"F32\",\"shape\":[1]"),
                "\"dtype\" is there twice");
  ExpectRefused(with("[0,8]", "[4,12]"), "\"a\"");  // overlaps b, and leaves a hole
  ExpectRefused(with("[8,12]", "[4,8]"), "\"b\" overlaps the one before it");
  ExpectRefused(
      with("\"shape\":[2],\"data_offsets\":[0,8]", "\"shape\":[1],\"data_offsets\":[0,4]"),
      "\"b\" leaves a hole before it");
  ExpectRefused(with("[8,12]", "[8,16]"), "no range within the 12 bytes");
  ExpectRefused(with("[8,12]", "[12,8]"), "no range");
  ExpectRefused(with("[8,12]", "[-4,12]"), "no range");
  ExpectRefused(with("[8,12]", "[8,12,16]"), "no range");
  ExpectRefused(with("[8,12]", "[8,18446744073709551620]"), "no range");
  ExpectRefused(with("[8,12]", "8"), "no range");
  ExpectRefused(with("[2]", "[3]"), "\"a\" has 8 bytes, its shape needs 12");
  ExpectRefused(with("[2]", "[-2]"), "no list of sizes");
  ExpectRefused(with("[2]", "[2.0]"), "no list of sizes");
  ExpectRefused(with("[2]", "[\"2\"]"), "no list of sizes");
  ExpectRefused(with("[2]", "[4611686018427387904,4]"), "an impossible shape");  // 2^64 wraps to 0
  ExpectRefused(with("[2]", "null"), "no list of sizes");
  ExpectRefused(with("\"dtype\":\"F32\",\"shape\":[1]", "\"dtype\":1,\"shape\":[1]"), "no string");
  ExpectRefused(with("\"dtype\":\"F32\",\"shape\":[1]", "\"dtype\":\"BF16\",\"shape\":[1]"),
                "\"b\" has dtype \"BF16\"; accepted: F32", absl::StatusCode::kUnimplemented);
  ExpectRefused(with("\"shape\":[1],", ""), "exactly dtype, shape and data_offsets");
  ExpectRefused(with("\"shape\":[1]", "\"shape\":[1],\"more\":1"), "exactly dtype");
  ExpectRefused(File(R"({"a":[]})", ""), "exactly dtype");
  ExpectRefused(File(R"({"__metadata__":[]})", ""), "__metadata__ is no object");
  ExpectRefused(File(R"({"__metadata__":{"k":1}})", ""), "__metadata__ \"k\" is no string");
}

// Every edit of a valid file is refused in one line, or what is read stays within the file.
TEST_F(Safetensors, FuzzedFilesAreRefusedOrSound) {
  const std::vector<float> values(24, 1.0f);
  ASSERT_TRUE(WriteSafetensors(disk_, kPath,
                               {{"a.weight", {4, 3}, values.data()},
                                {"a.bias", {4}, values.data()},
                                {"b", {2, 2, 2}, values.data()}},
                               {{"format", "pt"}})
                  .ok());
  const std::string good = ReadFile(disk_, kPath, 1 << 20).value();
  const std::string alphabet = "0123456789{}[]\",:-.eE \\\"F32u";
  std::mt19937 random(20240608);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 30'000; ++round) {
    std::string bytes = good;
    for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % bytes.size();
      const char letter =
          random() % 2 == 0 ? alphabet[random() % alphabet.size()] : static_cast<char>(random());
      switch (random() % 4) {
        case 0:
          bytes[at] = letter;
          break;
        case 1:
          bytes.insert(at, 1, letter);
          break;
        case 2:
          bytes.erase(at, 1);
          break;
        case 3:
          bytes[random() % 8] = static_cast<char>(random());
          break;
      }
    }
    const auto file = Open(bytes);
    if (!file.ok()) {
      ++refused;
      ASSERT_THAT(file.status().message(), AllOf(HasSubstr(kPath), Not(HasSubstr("\n"))));
      continue;
    }
    ++accepted;
    for (const SafetensorsFile::Tensor& tensor : (*file)->tensors()) {
      ASSERT_LE(tensor.elements, static_cast<int64_t>(bytes.size()));
      std::vector<float> read(static_cast<size_t>(tensor.elements));
      ASSERT_EQ((*file)->Read(tensor, read.data()), absl::OkStatus());
    }
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_GT(refused, 10'000);
}

}  // namespace
}  // namespace lockstep::train
