#include "worker/train/checkpoint.h"

#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/synchronization/notification.h"
#include "common/sha256.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/common/simulated_disk.h"
#include "tests/common/temporary_folder.h"

namespace lockstep::train {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::UnorderedElementsAre;
using Loss = SimulatedDisk::Loss;

constexpr char kFolder[] = "/run/checkpoints";

// Every value says which step, and which writing of it, it belongs to.
CheckpointSnapshot SnapshotOf(int64_t step, int version = 0, size_t elements = 6) {
  CheckpointSnapshot snapshot;
  v1::CheckpointManifest& manifest = snapshot.manifest;
  manifest.set_job("job-1");
  manifest.mutable_spec()->set_name("fashion \"cnn\"\n");
  manifest.mutable_spec()->mutable_train()->set_steps(1000);
  manifest.set_step(step);
  manifest.set_state_digest(std::string(32, 'a'));
  manifest.set_epoch_loss_sum(0.1 + 1.0 / static_cast<double>(step + 3));
  manifest.set_epoch_samples(int64_t{1} << 60);
  v1::Evaluation* evaluation = manifest.mutable_last_evaluation();
  evaluation->mutable_validation()->set_accuracy(0);  // present, though 0
  const auto values = [&](size_t count, int which) {
    return std::vector<float>(count, static_cast<float>(step * 100 + version * 10 + which));
  };
  snapshot.tensors.push_back(
      {"fc1.weight", {2, static_cast<int64_t>(elements / 2)}, values(elements, 1)});
  snapshot.tensors.push_back({"momentum/fc1.weight", {2, 3}, values(6, 2)});
  snapshot.tensors.push_back({"bn1.running_mean", {1}, values(1, 3)});
  return snapshot;
}

const std::vector<CheckpointTensorSpec> kExpected = {
    {"bn1.running_mean", {1}}, {"fc1.weight", {2, 3}}, {"momentum/fc1.weight", {2, 3}}};

std::string StepFolder(int64_t step) { return absl::StrFormat("%s/step-%08d", kFolder, step); }

std::vector<std::string> Names(FileSystem& fs, const std::string& folder) {
  const auto entries = fs.List(folder);
  std::vector<std::string> names;
  for (const DirectoryEntry& entry : *entries) names.push_back(entry.name);
  return names;
}

// The newest checkpoint is sound to the last value; returns its step and version as step * 10 +
// version.
int64_t ExpectSound(FileSystem& fs, std::vector<std::string>* notes = nullptr) {
  const auto loaded = LoadNewestCheckpoint(fs, "/run", kExpected);
  EXPECT_EQ(loaded.status(), absl::OkStatus());
  if (!loaded.ok()) return -1;
  const auto which = static_cast<int64_t>(loaded->tensors[1][0]) / 10;
  EXPECT_EQ(which / 10, loaded->manifest.step());
  const CheckpointSnapshot expected = SnapshotOf(which / 10, static_cast<int>(which % 10));
  EXPECT_EQ(loaded->tensors[0], expected.tensors[2].values);
  EXPECT_EQ(loaded->tensors[1], expected.tensors[0].values);
  EXPECT_EQ(loaded->tensors[2], expected.tensors[1].values);
  if (notes != nullptr) *notes = loaded->notes;
  return which;
}

TEST(Checkpoint, ComesBackAsItWas) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  const CheckpointSnapshot snapshot = SnapshotOf(123);
  const auto info = store.Write(snapshot);
  ASSERT_EQ(info.status(), absl::OkStatus());
  EXPECT_EQ(info->step(), 123);
  EXPECT_EQ(info->path(), StepFolder(123));
  EXPECT_EQ(info->state_digest(), std::string(32, 'a'));
  EXPECT_THAT(Names(disk, StepFolder(123)), ElementsAre("manifest.json", "model.safetensors"));
  int64_t bytes = 0;
  for (const std::string& name : Names(disk, StepFolder(123))) {
    bytes += disk.Open(JoinPath(StepFolder(123), name)).value()->size();
  }
  EXPECT_EQ(info->bytes(), bytes);

  // A run's folder, its checkpoints, or one checkpoint.
  for (const std::string& folder : {std::string("/run"), std::string("/run/"), std::string(kFolder),
                                    StepFolder(123), StepFolder(123) + "/"}) {
    const auto found = FindNewestCheckpoint(disk, folder);
    ASSERT_EQ(found.status(), absl::OkStatus()) << folder;
    EXPECT_EQ(ParentPath(found->path + "/x"), StepFolder(123));
    EXPECT_THAT(found->notes, IsEmpty());
    v1::CheckpointManifest manifest = found->manifest;
    EXPECT_EQ(manifest.format_version(), 1);
    ASSERT_EQ(manifest.files_size(), 1);
    EXPECT_EQ(manifest.files(0).name(), "model.safetensors");
    manifest.clear_files();
    manifest.clear_manifest_sha256();
    manifest.clear_format_version();
    EXPECT_EQ(manifest.SerializeAsString(), snapshot.manifest.SerializeAsString());
  }
  EXPECT_EQ(ExpectSound(disk), 1230);
}

TEST(Checkpoint, KeepsTheNewest) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 2);
  for (const int64_t step : {8, 9, 10, 11}) ASSERT_TRUE(store.Write(SnapshotOf(step)).ok());
  EXPECT_THAT(Names(disk, kFolder), ElementsAre("step-00000010", "step-00000011"));
  // A run that goes on from an earlier step never removes what it just wrote.
  CheckpointStore again(disk, kFolder, 1);
  ASSERT_TRUE(again.Write(SnapshotOf(5)).ok());
  EXPECT_THAT(Names(disk, kFolder), ElementsAre("step-00000005"));
  CheckpointStore none(disk, kFolder, 0);  // at least one
  ASSERT_TRUE(none.Write(SnapshotOf(6)).ok());
  EXPECT_EQ(ExpectSound(disk), 60);
}

TEST(Checkpoint, ReplacesOneOfTheSameStep) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(7, 0)).ok());
  ASSERT_TRUE(store.Write(SnapshotOf(7, 1)).ok());
  EXPECT_THAT(Names(disk, kFolder), ElementsAre("step-00000007"));
  EXPECT_EQ(ExpectSound(disk), 71);
}

// Any changed, missing or added byte, in either file: the previous one is used, and a note says
// why.
TEST(Checkpoint, DamageIsFoundAndThePreviousUsed) {
  for (const std::string file : {"model.safetensors", "manifest.json"}) {
    SimulatedDisk disk;
    CheckpointStore store(disk, kFolder, 3);
    ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
    ASSERT_TRUE(store.Write(SnapshotOf(2)).ok());
    const std::string path = JoinPath(StepFolder(2), file);
    const std::string good = ReadFile(disk, path, 1 << 20).value();
    const auto expect_previous = [&](const std::string& content) {
      disk.Damage(path, content);
      std::vector<std::string> notes;
      EXPECT_EQ(ExpectSound(disk, &notes), 10);
      ASSERT_EQ(notes.size(), 1u);
      EXPECT_THAT(notes[0], AllOf(HasSubstr("step-00000002 is not used"), HasSubstr(path),
                                  Not(HasSubstr("\n"))));
      const absl::Status alone = FindNewestCheckpoint(disk, StepFolder(2)).status();
      EXPECT_FALSE(alone.ok());
      EXPECT_THAT(alone.message(), HasSubstr(path));
    };
    for (size_t at = 0; at < good.size(); ++at) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << at % 8));
      expect_previous(bytes);
    }
    for (size_t size = 0; size < good.size(); size += 7) expect_previous(good.substr(0, size));
    expect_previous(good + "x");
    ASSERT_EQ(disk.RemoveFile(path), absl::OkStatus());
    std::vector<std::string> notes;
    EXPECT_EQ(ExpectSound(disk, &notes), 10);
    EXPECT_THAT(notes, ElementsAre(HasSubstr(file)));
  }
}

TEST(Checkpoint, SaysWhenThereIsNone) {
  SimulatedDisk disk;
  const auto expect = [&](const std::string& folder, absl::StatusCode code,
                          const std::string& text) {
    const absl::Status status = FindNewestCheckpoint(disk, folder).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), AllOf(HasSubstr(folder), HasSubstr(text), Not(HasSubstr("\n"))));
  };
  expect("/run", absl::StatusCode::kNotFound, "no such folder; accepted: a run's folder");
  ASSERT_EQ(MakeDirectories(disk, kFolder), absl::OkStatus());
  expect("/run", absl::StatusCode::kNotFound, "it holds none");
  expect(kFolder, absl::StatusCode::kNotFound, "it holds none");
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
  ASSERT_TRUE(store.Write(SnapshotOf(2)).ok());
  for (const int64_t step : {1, 2}) disk.Damage(StepFolder(step) + "/manifest.json", "{}");
  expect("/run", absl::StatusCode::kDataLoss, "step-00000002 is not used");
  expect("/run", absl::StatusCode::kDataLoss, "step-00000001 is not used");
}

TEST(Checkpoint, IgnoresNamesThatAreNoCheckpoints) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
  for (const char* name :
       {"step-", "step-12x", "step--3", "step-99999999999999999999", "notes", "."}) {
    disk.MakeDirectory(JoinPath(kFolder, name)).IgnoreError();
  }
  std::vector<std::string> notes;
  EXPECT_EQ(ExpectSound(disk, &notes), 10);
  EXPECT_THAT(notes, IsEmpty());
}

TEST(Checkpoint, RefusesAnotherModel) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
  const auto expect_refused = [&](std::vector<CheckpointTensorSpec> expected,
                                  const std::string& text) {
    const absl::Status status = LoadNewestCheckpoint(disk, "/run", expected).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(text));
  };
  std::vector<CheckpointTensorSpec> expected = kExpected;
  expected[1].shape = {3, 2};
  expect_refused(expected, "tensor fc1.weight has shape [2, 3], expected [3, 2]");
  expected = kExpected;
  expected.push_back({"adam_m/fc1.weight", {2, 3}});
  expect_refused(expected, "tensor adam_m/fc1.weight is missing");
  expected = kExpected;
  expected.pop_back();
  expect_refused(expected, "tensor momentum/fc1.weight is not expected");
}

// A manifest that vouches for itself but was made by someone else.
TEST(Checkpoint, RefusesOtherFormatsAndPathsOutside) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
  const std::string path = StepFolder(1) + "/manifest.json";
  const std::string good = ReadFile(disk, path, 1 << 20).value();
  const auto expect_refused = [&](const std::string& from, const std::string& to,
                                  const std::string& text) {
    ASSERT_TRUE(absl::StrContains(good, from)) << good;
    std::string forged = absl::StrReplaceAll(good, {{from, to}});
    const size_t digits = forged.rfind("\"manifest_sha256\": \"") + 20;
    forged.replace(digits, 64, std::string(64, '0'));
    forged.replace(digits, 64, Sha256Hex(forged));
    disk.Damage(path, forged);
    EXPECT_THAT(FindNewestCheckpoint(disk, "/run").status().message(), HasSubstr(text));
  };
  expect_refused("\"format_version\": 1", "\"format_version\": 2", "format_version 2; accepted: 1");
  expect_refused("model.safetensors", "../model.safetensors", "names a file outside of it");
  expect_refused("model.safetensors", "manifest.json", "bytes, its manifest says");
  expect_refused("\"step\": \"1\"", "\"step\": []", "is no manifest");
}

// Crash at every operation of a write that also retires and replaces, losing what was not synced in
// every way: the old state or the new is there, whole; and the next run goes on and leaves no
// litter.
TEST(Checkpoint, SurvivesACrashAnywhere) {
  for (const bool same_step : {false, true}) {
    bool complete = false;
    int operations = 0;
    for (int operation = 1; !complete; ++operation, ++operations) {
      for (uint64_t seed = 0; seed < 30; ++seed) {
        SimulatedDisk disk;
        CheckpointStore before(disk, kFolder, 2);
        ASSERT_TRUE(before.Write(SnapshotOf(1)).ok());
        ASSERT_TRUE(before.Write(SnapshotOf(2)).ok());
        CheckpointStore store(disk, kFolder, 2);
        disk.CrashAt(disk.operations() + operation);
        complete = store.Write(same_step ? SnapshotOf(2, 1) : SnapshotOf(3)).ok();
        disk.Recover(seed == 0   ? Loss::kEverythingUnsynced
                     : seed == 1 ? Loss::kNothing
                                 : Loss::kRandom,
                     seed);
        const int64_t old_one = 20, new_one = same_step ? 21 : 30;
        const int64_t found = ExpectSound(disk);
        if (complete) {
          ASSERT_EQ(found, new_one) << operation << " " << seed;
        } else {
          ASSERT_TRUE(found == old_one || found == new_one)
              << found << " " << operation << " " << seed;
        }
        for (const std::string& name :
             Names(disk, kFolder)) {  // a step-N folder is never half there
          ASSERT_TRUE(name[0] == '.' || FindNewestCheckpoint(disk, JoinPath(kFolder, name)).ok())
              << name << " " << operation << " " << seed;
        }
        CheckpointStore after(disk, kFolder, 2);
        ASSERT_EQ(after.Write(SnapshotOf(4)).status(), absl::OkStatus())
            << operation << " " << seed;
        ASSERT_EQ(ExpectSound(disk), 40);
        const std::vector<std::string> names = Names(disk, kFolder);
        ASSERT_EQ(names.size(), 2u) << testing::PrintToString(names);
        ASSERT_EQ(names[1], "step-00000004");
        ASSERT_TRUE(FindNewestCheckpoint(disk, JoinPath(kFolder, names[0])).ok());
      }
    }
    EXPECT_GT(operations, 10);
  }
}

// One operation fails, the machine lives: the error is reported, the folder is as it was.
TEST(Checkpoint, AFailureLeavesTheOldOnes) {
  for (const bool same_step : {false, true}) {
    for (int operation = 1;; ++operation) {
      SimulatedDisk disk;
      CheckpointStore store(disk, kFolder, 2);
      ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
      ASSERT_TRUE(store.Write(SnapshotOf(2)).ok());
      disk.FailAt(disk.operations() + operation,
                  absl::ResourceExhaustedError("No space left on device"));
      const absl::Status status =
          store.Write(same_step ? SnapshotOf(2, 1) : SnapshotOf(3)).status();
      if (status.ok()) {
        EXPECT_GT(operation, 10);
        break;
      }
      EXPECT_TRUE(absl::IsResourceExhausted(status));
      EXPECT_THAT(status.message(),
                  AllOf(HasSubstr(same_step ? "checkpoint of step 2: " : "checkpoint of step 3: "),
                        HasSubstr(kFolder), HasSubstr("No space left on device; free some space"),
                        Not(HasSubstr("\n"))));
      const int64_t found = ExpectSound(disk);
      EXPECT_TRUE(found == 20 || found == (same_step ? 21 : 30)) << found << status;
      ASSERT_TRUE(store.Write(SnapshotOf(4)).ok());
      EXPECT_EQ(ExpectSound(disk), 40);
    }
  }
}

TEST(Checkpoint, FullSimulatedDiskKeepsTheOldOnesAndFreesItsOwn) {
  SimulatedDisk disk;
  CheckpointStore store(disk, kFolder, 3);
  ASSERT_TRUE(store.Write(SnapshotOf(1)).ok());
  disk.SetCapacity(8000);
  const absl::Status status = store.Write(SnapshotOf(2, 0, 100'000)).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_THAT(Names(disk, kFolder), ElementsAre("step-00000001"));
  EXPECT_EQ(ExpectSound(disk), 10);
  EXPECT_TRUE(store.Write(SnapshotOf(3)).ok());  // there is room again
}

// On a real file system that is really full.
TEST(Checkpoint, FullDiskIsOneClearLine) {
  TemporaryFolder folder;
  const std::string disk = folder / "disk";
  ASSERT_EQ(MakeDirectories(disk), absl::OkStatus());
  if (mount("none", disk.c_str(), "tmpfs", 0, "size=256k") != 0) {
    GTEST_SKIP() << "this machine does not let us mount a tmpfs; the simulated disk covers it";
  }
  {
    CheckpointStore store(RealFileSystem(), disk + "/checkpoints", 3);
    ASSERT_EQ(store.Write(SnapshotOf(1)).status(), absl::OkStatus());
    const absl::Status status = store.Write(SnapshotOf(2, 0, 1'000'000)).status();
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_THAT(status.message(), AllOf(HasSubstr("checkpoint of step 2: "),
                                        HasSubstr("No space left on device; free some space")));
    EXPECT_THAT(Names(RealFileSystem(), disk + "/checkpoints"), ElementsAre("step-00000001"));
    const auto found = FindNewestCheckpoint(RealFileSystem(), disk);
    ASSERT_EQ(found.status(), absl::OkStatus());
    EXPECT_EQ(found->manifest.step(), 1);
  }
  EXPECT_EQ(umount(disk.c_str()), 0);
}

TEST(CheckpointWriter, WritesInTheBackgroundInOrder) {
  TemporaryFolder folder;
  std::vector<int64_t> steps;
  CheckpointWriter::Options options;
  options.folder = folder / "run/checkpoints";
  options.keep = 2;
  options.written = [&](const v1::CheckpointInfo& info) { steps.push_back(info.step()); };
  CheckpointWriter writer(RealFileSystem(), options);
  for (int64_t step = 1; step <= 5; ++step)
    ASSERT_EQ(writer.Start(SnapshotOf(step)), absl::OkStatus());
  ASSERT_EQ(writer.Finish(), absl::OkStatus());
  EXPECT_THAT(steps, ElementsAre(1, 2, 3, 4, 5));
  EXPECT_THAT(Names(RealFileSystem(), options.folder),
              ElementsAre("step-00000004", "step-00000005"));
  EXPECT_EQ(writer.Finish(), absl::OkStatus());
}

TEST(CheckpointWriter, StartReturnsWhileTheDiskWorks) {
  SimulatedDisk disk;
  absl::Notification go_on;
  std::vector<int64_t> steps;
  CheckpointWriter writer(disk, {.folder = kFolder, .keep = 3, .written = [&](const auto& info) {
                                   go_on.WaitForNotification();
                                   steps.push_back(info.step());
                                 }});
  ASSERT_EQ(writer.Start(SnapshotOf(1)), absl::OkStatus());  // returns before the writer is done
  go_on.Notify();
  ASSERT_EQ(writer.Start(SnapshotOf(2)), absl::OkStatus());
  ASSERT_EQ(writer.Finish(), absl::OkStatus());
  EXPECT_THAT(steps, ElementsAre(1, 2));
}

TEST(CheckpointWriter, AFailureIsReportedAndStays) {
  SimulatedDisk disk;
  disk.SetCapacity(100);
  int written = 0;
  CheckpointWriter writer(
      disk, {.folder = kFolder, .keep = 3, .written = [&](const auto&) { ++written; }});
  ASSERT_EQ(writer.Start(SnapshotOf(1)), absl::OkStatus());
  const absl::Status failure = writer.Finish();
  EXPECT_TRUE(absl::IsResourceExhausted(failure));
  EXPECT_EQ(writer.Start(SnapshotOf(2)), failure);
  EXPECT_EQ(writer.Finish(), failure);
  EXPECT_EQ(written, 0);
}

TEST(CheckpointWriter, FinishesWhatItBeganWhenDestroyed) {
  SimulatedDisk disk;
  {
    CheckpointWriter writer(disk, {.folder = kFolder, .keep = 3, .written = nullptr});
    ASSERT_EQ(writer.Start(SnapshotOf(6)), absl::OkStatus());
  }
  EXPECT_EQ(ExpectSound(disk), 60);
}

}  // namespace
}  // namespace lockstep::train
