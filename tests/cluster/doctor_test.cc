// `lockstep doctor` on the machine of the tests.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>

#include "tests/cluster/programs.h"

namespace lockstep {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class DoctorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (access("/dev/nvidiactl", F_OK) == 0) GTEST_SKIP() << "this machine has a GPU";
  }

  Programs programs_;
};

TEST_F(DoctorTest, WithoutAGpuTheCpuIsEnough) {
  const Programs::Result result = programs_.Lockstep({"doctor"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  EXPECT_THAT(result.out, StartsWith("CPU\n"));
  EXPECT_THAT(result.out, HasSubstr("GPUs: none\n"));
  EXPECT_THAT(result.out, HasSubstr("To use a GPU\n  - there is no NVIDIA driver"));
  EXPECT_THAT(result.out, EndsWith("Next\n  lockstep run deploy/jobs/mlp.yaml\n"));
}

TEST_F(DoctorTest, AMissingGpuThatIsAskedForIsAFailure) {
  const Programs::Result result = programs_.Lockstep({"doctor", "--device", "cuda"});
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_THAT(result.err, StartsWith("lockstep: no GPU can be used: there is no NVIDIA driver"));
  EXPECT_THAT(result.out, HasSubstr("To use a GPU\n"));
}

TEST_F(DoctorTest, PrintsJson) {
  const Programs::Result result = programs_.Lockstep({"doctor", "-o", "json"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 1);
  const nlohmann::json json = result.json();
  EXPECT_THAT(json["cpu"]["fingerprint"], StartsWith("cpu "));
  EXPECT_EQ(json["cuda"]["driver"], "");
  EXPECT_THAT(json["cuda"]["problems"][0]["problem"], StartsWith("there is no NVIDIA driver"));
  EXPECT_EQ(programs_.Lockstep({"doctor", "-o", "json", "--device", "cuda"}).code, 1);
}

}  // namespace
}  // namespace lockstep
