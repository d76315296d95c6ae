#include "common/fs.h"

#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/common/temporary_folder.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using Loss = SimulatedDisk::Loss;

std::vector<std::string> Names(const std::string& folder) {
  std::vector<std::string> names;
  const absl::StatusOr<std::vector<DirectoryEntry>> entries = ListDirectory(folder);
  for (const DirectoryEntry& entry : *entries) {
    names.push_back(entry.name + (entry.is_directory ? "/" : ""));
  }
  return names;
}

TEST(FileSystem, WritesReadsAndReplaces) {
  TemporaryFolder folder;
  for (const std::string& content : {std::string("first"), std::string(), std::string("a\0b", 3)}) {
    ASSERT_EQ(WriteFileAtomically(folder / "file", content), absl::OkStatus());
    EXPECT_EQ(ReadFile(folder / "file", 100).value(), content);
  }
  EXPECT_THAT(Names(folder.path()), testing::ElementsAre("file"));
}

TEST(FileSystem, ReadRefusesLargeFilesMissingFilesAndFolders) {
  TemporaryFolder folder;
  ASSERT_EQ(WriteFileAtomically(folder / "file", "12345"), absl::OkStatus());
  EXPECT_TRUE(ReadFile(folder / "file", 5).ok());
  const absl::Status large = ReadFile(folder / "file", 4).status();
  EXPECT_TRUE(absl::IsInvalidArgument(large));
  EXPECT_THAT(large.message(), HasSubstr("file: it has 5 bytes; accepted: up to 4"));
  const absl::Status missing = ReadFile(folder / "none", 4).status();
  EXPECT_TRUE(absl::IsNotFound(missing));
  EXPECT_THAT(missing.message(), HasSubstr("/none: No such file or directory"));
  EXPECT_TRUE(absl::IsFailedPrecondition(ReadFile(folder.path(), 4).status()));
}

// Opening a pipe would wait for its writer for ever.
TEST(FileSystem, DoesNotHangOnAPipe) {
  TemporaryFolder folder;
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(ReadFile(folder / "pipe", 4).status()));
}

TEST(FileSystem, ReadAtIsExact) {
  TemporaryFolder folder;
  ASSERT_EQ(WriteFileAtomically(folder / "file", "0123456789"), absl::OkStatus());
  const auto file = RealFileSystem().Open(folder / "file");
  ASSERT_TRUE(file.ok());
  char bytes[4];
  ASSERT_EQ((*file)->ReadAt(6, bytes, 4), absl::OkStatus());
  EXPECT_EQ(std::string(bytes, 4), "6789");
  EXPECT_TRUE(absl::IsOutOfRange((*file)->ReadAt(7, bytes, 4)));
}

TEST(FileSystem, FailedWriteLeavesTheOldFileAndNothingElse) {
  TemporaryFolder folder;
  const absl::Status status = WriteFileAtomically(folder / "none/file", "x");
  EXPECT_TRUE(absl::IsNotFound(status));
  EXPECT_THAT(status.message(), HasSubstr("/none/file"));
  // A folder cannot be replaced by a file: the rename fails, the temporary file goes.
  ASSERT_EQ(MakeDirectories(folder / "taken"), absl::OkStatus());
  EXPECT_FALSE(WriteFileAtomically(folder / "taken", "x").ok());
  EXPECT_THAT(Names(folder.path()), testing::ElementsAre("taken/"));
}

TEST(FileSystem, MakesAndRemovesTrees) {
  TemporaryFolder folder;
  ASSERT_EQ(MakeDirectories(folder / "a/b/c"), absl::OkStatus());
  EXPECT_EQ(MakeDirectories(folder / "a/b/c/"), absl::OkStatus());
  ASSERT_EQ(WriteFileAtomically(folder / "a/b/file", "x"), absl::OkStatus());
  EXPECT_FALSE(MakeDirectories(folder / "a/b/file/d").ok());
  ASSERT_EQ(WriteFileAtomically(folder / "outside", "x"), absl::OkStatus());
  ASSERT_EQ(symlink((folder / "outside").c_str(), (folder / "a/link").c_str()), 0);
  ASSERT_EQ(symlink(folder.path().c_str(), (folder / "a/folder-link").c_str()), 0);
  EXPECT_EQ(RemoveTree(folder / "a"), absl::OkStatus());
  EXPECT_EQ(RemoveTree(folder / "a"), absl::OkStatus());
  EXPECT_THAT(Names(folder.path()), testing::ElementsAre("outside"));  // links were not followed
}

TEST(FileSystem, PathsJoinAndSplit) {
  EXPECT_EQ(JoinPath("a", "b"), "a/b");
  EXPECT_EQ(JoinPath("a/", "b"), "a/b");
  EXPECT_EQ(JoinPath("", "b"), "b");
  EXPECT_EQ(ParentPath("/a/b"), "/a");
  EXPECT_EQ(ParentPath("/a/b//"), "/a");
  EXPECT_EQ(ParentPath("/a"), "/");
  EXPECT_EQ(ParentPath("/"), "/");
  EXPECT_EQ(ParentPath("a"), ".");
}

// A real full disk, where the machine lets us mount one.
TEST(FileSystem, FullDiskIsResourceExhausted) {
  TemporaryFolder folder;
  const std::string disk = folder / "disk";
  ASSERT_EQ(MakeDirectories(disk), absl::OkStatus());
  if (mount("none", disk.c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "this machine does not let us mount a tmpfs; the simulated disk covers it";
  }
  ASSERT_EQ(WriteFileAtomically(disk + "/file", "old"), absl::OkStatus());
  const absl::Status full = WriteFileAtomically(disk + "/file", std::string(1 << 20, 'x'));
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_THAT(full.message(), HasSubstr(disk + "/file"));
  EXPECT_THAT(full.message(), HasSubstr("No space left on device"));
  EXPECT_EQ(ReadFile(disk + "/file", 100).value(), "old");
  EXPECT_THAT(Names(disk), testing::ElementsAre("file"));
  EXPECT_EQ(umount(disk.c_str()), 0);
}

// The simulated disk has teeth: it loses a file whose folder, or bytes, were not synced.
TEST(SimulatedDisk, LosesWhatWasNotSynced) {
  SimulatedDisk disk;
  {
    auto file = disk.Create("/unsynced-bytes").value();
    ASSERT_EQ(file->Append("content"), absl::OkStatus());
    ASSERT_EQ(disk.SyncDirectory("/"), absl::OkStatus());
    file = disk.Create("/unsynced-entry").value();
    ASSERT_EQ(file->Append("content"), absl::OkStatus());
    ASSERT_EQ(file->Sync(), absl::OkStatus());
  }
  disk.Recover(Loss::kEverythingUnsynced);
  EXPECT_EQ(ReadFile(disk, "/unsynced-bytes", 100).value(), "");
  EXPECT_TRUE(absl::IsNotFound(ReadFile(disk, "/unsynced-entry", 100).status()));
}

// Crash at every operation, with every kind of loss: the old content or the new, whole.
TEST(WriteFileAtomically, SurvivesACrashAnywhere) {
  const std::string old_content = "old content", new_content = "the new content, longer";
  bool complete = false;
  for (int operation = 1; !complete; ++operation) {
    for (uint64_t seed = 0; seed < 40; ++seed) {
      SimulatedDisk disk;
      ASSERT_EQ(WriteFileAtomically(disk, "/file", old_content), absl::OkStatus());
      disk.CrashAt(disk.operations() + operation);
      complete = WriteFileAtomically(disk, "/file", new_content).ok();
      disk.Recover(seed == 0   ? Loss::kEverythingUnsynced
                   : seed == 1 ? Loss::kNothing
                               : Loss::kRandom,
                   seed);
      const std::string found = ReadFile(disk, "/file", 100).value();
      if (complete) {
        EXPECT_EQ(found, new_content) << operation << " " << seed;
      } else {
        EXPECT_TRUE(found == old_content || found == new_content) << operation << " " << seed;
      }
    }
  }
}

TEST(WriteFileAtomically, ReportsEveryFailureAndCleansUp) {
  SimulatedDisk disk;
  ASSERT_EQ(WriteFileAtomically(disk, "/file", "old"), absl::OkStatus());
  int failures = 0;
  for (int operation = 1;; ++operation) {
    disk.FailAt(disk.operations() + operation,
                absl::ResourceExhaustedError("No space left on device"));
    const absl::Status status = WriteFileAtomically(disk, "/file", "new content");
    if (status.ok()) break;
    ++failures;
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_EQ(disk.List("/").value().size(), 1u) << status;
  }
  EXPECT_EQ(failures, 6);  // create, append, sync, close, rename, sync of the folder
  EXPECT_EQ(ReadFile(disk, "/file", 100).value(), "new content");
}

}  // namespace
}  // namespace lockstep
