// Two hosts, as real as the machine allows (two_hosts.sh), give the digest of one slot on one host.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "tests/cluster/shell.h"

namespace lockstep {
namespace {

constexpr char kBin[] = LOCKSTEP_BIN_DIR;
constexpr char kSource[] = LOCKSTEP_SOURCE_DIR;

class TwoHosts : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "lockstep-hosts-XXXXXX";
    ASSERT_NE(mkdtemp(folder_.data()), nullptr);
    spec_ = folder_ + "/spec.yaml";
    std::ofstream(spec_) << R"(
name: hosts
data: {path: /usr/share/datasets/fashion-mnist, train_samples: 1030, validation_samples: 1003}
model: {preset: mlp, hidden: [100], sync: batch, dropout: 0.2}
optimizer: {type: adam, learning_rate: 0.001}
train: {batch: 100, steps: 30, shards: 8, evaluate: {every_steps: 10}}
)";
  }
  void TearDown() override { ASSERT_TRUE(RemoveTree(folder_).ok()); }

  std::string folder_, spec_;
};

TEST_F(TwoHosts, GiveTheDigestOfOne) {
  const nlohmann::json one =
      LastLine(OutputOf(absl::StrCat(kBin, "/lockstep run ", spec_, " --slots 1 --out ", folder_,
                                     "/one -o json 2>", folder_, "/log")));
  ASSERT_TRUE(one.is_object());
  const std::string kind = OutputOf(absl::StrCat("bash ", kSource, "/tests/cluster/two_hosts.sh ",
                                                 kBin, " ", spec_, " ", folder_, "/two"));
  std::printf("hosts are: %s", kind.c_str());
  const nlohmann::json two = LastLine(*ReadFile(folder_ + "/two/result.json", 1 << 20));
  ASSERT_TRUE(two.is_object());
  EXPECT_EQ(two["state"], "SUCCEEDED");
  EXPECT_EQ(two["state_digest"], one["state_digest"]);
  EXPECT_EQ(two["parameter_digest"], one["parameter_digest"]);
  EXPECT_EQ(two["validation"], one["validation"]);
  EXPECT_EQ(two["train"], one["train"]);
}

}  // namespace
}  // namespace lockstep
