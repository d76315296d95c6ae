// `diff` on real files.
#include "client/diff.h"

#include <unistd.h>

#include "common/fs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using ::testing::HasSubstr;

std::string Hex(char digit) { return std::string(32, digit); }

std::string Line(int step, char state, char parameters, char weight, char bias) {
  nlohmann::ordered_json json;
  json["step"] = step;
  json["state"] = Hex(state);
  json["parameters"] = Hex(parameters);
  json["tensors"] = {{"dense_1.weight", Hex(weight)}, {"dense_1.bias", Hex(bias)}};
  return json.dump() + "\n";
}

class DiffTest : public ::testing::Test {
 protected:
  DiffTest() {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = ::testing::TempDir() + "/diff_" + std::to_string(getpid()) + "_" + info->name();
    EXPECT_TRUE(RemoveTree(folder_).ok());
  }
  ~DiffTest() override { RemoveTree(folder_).IgnoreError(); }

  // A run's folder with these digests.
  std::string Run(const std::string& name, const std::string& text) {
    const std::string run = JoinPath(folder_, name);
    EXPECT_TRUE(MakeDirectories(run).ok());
    EXPECT_TRUE(WriteFileAtomically(JoinPath(run, "digests.jsonl"), text).ok());
    return run;
  }

  std::string folder_;
};

TEST_F(DiffTest, EqualRuns) {
  const std::string text = Line(1, 'a', 'b', 'c', 'd') + Line(2, '1', '2', '3', '4');
  const auto result = CompareRuns(Run("a", text), Run("b", text));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->differ);
  EXPECT_EQ(result->steps_compared, 2);
  EXPECT_EQ(result->first_step, 1);
  EXPECT_EQ(result->last_step, 2);
  EXPECT_EQ(DifferenceJson(*result)["equal"], true);
}

TEST_F(DiffTest, NamesTheFirstStepAndTensor) {
  const std::string first = Line(1, 'a', 'b', 'c', 'd');
  const auto result =
      CompareRuns(Run("a", first + Line(2, '1', '2', '3', '4') + Line(3, '5', '6', '7', '8')),
                  Run("b", first + Line(2, '0', '0', '3', '0') + Line(3, '0', '0', '0', '0')));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->differ);
  EXPECT_EQ(result->step, 2);
  EXPECT_EQ(result->steps_compared, 2);
  ASSERT_EQ(result->tensors.size(), 1u);
  EXPECT_EQ(result->tensors[0].name, "dense_1.bias");
  EXPECT_EQ(result->tensors[0].a, Hex('4'));
  EXPECT_EQ(result->tensors[0].b, Hex('0'));
  const auto json = DifferenceJson(*result);
  EXPECT_EQ(json["equal"], false);
  EXPECT_EQ(json["step"], 2);
  EXPECT_EQ(json["tensors"][0]["name"], "dense_1.bias");
}

TEST_F(DiffTest, ADifferenceInTheStateAlone) {
  const auto result =
      CompareRuns(Run("a", Line(1, 'a', 'b', 'c', 'd')), Run("b", Line(1, 'e', 'b', 'c', 'd')));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->differ);
  EXPECT_EQ(result->step, 1);
  EXPECT_TRUE(result->tensors.empty());
}

TEST_F(DiffTest, ATensorThatOneRunLacks) {
  std::string other = Line(1, 'a', 'b', 'c', 'd');
  other.replace(other.find("dense_1.bias"), 12, "dense_9.bias");
  const auto result = CompareRuns(Run("a", Line(1, 'a', 'b', 'c', 'd')), Run("b", other));
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->tensors.size(), 2u);
  EXPECT_EQ(result->tensors[0].name, "dense_1.bias");
  EXPECT_EQ(result->tensors[0].b, "");
  EXPECT_EQ(result->tensors[1].name, "dense_9.bias");
  EXPECT_EQ(result->tensors[1].a, "");
}

TEST_F(DiffTest, ComparesTheStepsInCommon) {
  const auto result =
      CompareRuns(Run("a", Line(1, 'a', 'a', 'a', 'a') + Line(2, 'b', 'b', 'b', 'b')),
                  Run("b", Line(2, 'b', 'b', 'b', 'b') + Line(3, 'c', 'c', 'c', 'c') +
                               Line(4, 'c', 'c', 'c', 'c')));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->differ);
  EXPECT_EQ(result->steps_compared, 1);
  EXPECT_EQ(result->only_a, 1);
  EXPECT_EQ(result->only_b, 2);
}

TEST_F(DiffTest, NoStepInCommon) {
  const auto result =
      CompareRuns(Run("a", Line(1, 'a', 'a', 'a', 'a')), Run("b", Line(7, 'a', 'a', 'a', 'a')));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("no step in common"));
}

TEST_F(DiffTest, AMissingFileSaysWhatToGive) {
  const auto result = CompareRuns(folder_ + "/nothing", Run("b", Line(1, 'a', 'a', 'a', 'a')));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("nothing"));
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("lockstep run --out"));
}

TEST_F(DiffTest, MalformedLinesAreNamed) {
  const std::string good = Line(1, 'a', 'a', 'a', 'a');
  for (const std::string& bad :
       {std::string("not json\n"), std::string("[]\n"), std::string("{\"step\":2}\n"),
        Line(2, 'g', 'a', 'a', 'a'), Line(-1, 'a', 'a', 'a', 'a'),
        std::string("{\"step\":2,\"state\":7,\"parameters\":\"\",\"tensors\":{}}\n")}) {
    const auto result = CompareRuns(Run("a", good + bad), Run("b", good));
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(result.status().message()), HasSubstr("digests.jsonl:2:")) << bad;
  }
}

TEST_F(DiffTest, HalfALineAtTheEndIsAKilledRun) {
  const std::string good = Line(1, 'a', 'a', 'a', 'a');
  const auto result =
      CompareRuns(Run("a", good + Line(2, 'b', 'b', 'b', 'b').substr(0, 40)), Run("b", good));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->steps_compared, 1);
  EXPECT_EQ(CompareRuns(Run("c", "{\"st"), Run("b", good)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace lockstep::client
