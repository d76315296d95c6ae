#include "client/run_folder.h"

#include <unistd.h>

#include "common/fs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

using ::testing::HasSubstr;

class RunFolderTest : public ::testing::Test {
 protected:
  RunFolderTest() : root_("/tmp/run_folder_test_" + std::to_string(getpid())) {
    EXPECT_TRUE(RemoveTree(root_).ok());
    EXPECT_TRUE(MakeDirectories(root_).ok());
    EXPECT_EQ(chdir(root_.c_str()), 0);
  }
  ~RunFolderTest() override {
    EXPECT_EQ(chdir("/"), 0);
    RemoveTree(root_).IgnoreError();
  }
  static void Write(const std::string& path, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomically(path, text).ok());
  }

  const std::string root_;
  const absl::Time now_ = absl::FromUnixSeconds(1795491226);
};

TEST_F(RunFolderTest, ADefaultNameThatIsFree) {
  const auto first = RunFolder::Open("", "mlp", "", now_);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->path(), root_ + "/runs/mlp-20261124T033346Z");
  const auto second = RunFolder::Open("", "mlp", "", now_);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->path(), root_ + "/runs/mlp-20261124T033346Z-2");
}

TEST_F(RunFolderTest, AnEarlierRunIsMovedAsideAndKept) {
  for (int i = 0; i < 3; ++i) {
    const auto folder = RunFolder::Open("out", "mlp", "", now_);
    ASSERT_TRUE(folder.ok()) << folder.status();
    EXPECT_EQ(folder->moved(), i == 0 ? "" : root_ + "/out." + std::to_string(i));
    Write("out/spec.yaml", "run " + std::to_string(i));
  }
  EXPECT_EQ(*ReadFile("out/spec.yaml", 100), "run 2");
  EXPECT_EQ(*ReadFile("out.1/spec.yaml", 100), "run 0");
  EXPECT_EQ(*ReadFile("out.2/spec.yaml", 100), "run 1");
}

TEST_F(RunFolderTest, ARunThatIsGoneOnWithStays) {
  ASSERT_TRUE(MakeDirectories("out/checkpoints/step-00000010").ok());
  Write("out/spec.yaml", "first");
  for (const std::string resume : {"/out", "/out/checkpoints/step-00000010"}) {
    const auto folder = RunFolder::Open("out", "mlp", root_ + resume, now_);
    ASSERT_TRUE(folder.ok()) << folder.status();
    EXPECT_EQ(folder->moved(), "");
    EXPECT_EQ(*ReadFile("out/spec.yaml", 100), "first");
  }
  const auto folder = RunFolder::Open("out", "mlp", root_ + "/out-of-another", now_);
  ASSERT_TRUE(folder.ok()) << folder.status();
  EXPECT_EQ(folder->moved(), root_ + "/out.1");
}

TEST_F(RunFolderTest, AFolderWithOtherThingsIsUsedAsItIs) {
  ASSERT_TRUE(MakeDirectories("out").ok());
  Write("out/notes.txt", "mine");
  const auto folder = RunFolder::Open("out/", "mlp", "", now_);
  ASSERT_TRUE(folder.ok()) << folder.status();
  EXPECT_EQ(folder->path(), root_ + "/out");
  EXPECT_EQ(*ReadFile("out/notes.txt", 100), "mine");
}

TEST_F(RunFolderTest, OneProcessAtATime) {
  const auto folder = RunFolder::Open("out", "mlp", "", now_);
  ASSERT_TRUE(folder.ok()) << folder.status();
  const auto again = RunFolder::Open("out", "mlp", "", now_);
  EXPECT_EQ(again.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(again.status().message()), HasSubstr("another `lockstep run` uses"));
  Write("out/spec.yaml", "running");
  EXPECT_FALSE(RunFolder::Open("out", "mlp", "", now_).ok());
  EXPECT_EQ(*ReadFile("out/spec.yaml", 100), "running");
}

TEST_F(RunFolderTest, AFileInTheWay) {
  Write("out", "a file");
  const auto folder = RunFolder::Open("out/run", "mlp", "", now_);
  EXPECT_EQ(folder.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(folder.status().message()), HasSubstr("--out DIR"));
}

}  // namespace
}  // namespace lockstep::client
