#include "server/store/store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "server/store/committer.h"
#include "tests/common/temporary_folder.h"

namespace lockstep::server {
namespace {

using testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// Job `number` at step `step`: its record, the event of that step, a log line.
Write MakeWrite(int64_t number, int64_t step, bool durable = true) {
  Write write;
  write.durable = durable;
  JobRecord& record = write.jobs.emplace_back();
  record.number = number;
  record.request_id = absl::StrCat("request-", number);
  record.job.set_id(absl::StrCat("job-", number));
  record.job.set_state(v1::RUNNING);
  record.job.set_step(step);
  EventRecord& event = write.events.emplace_back();
  event.job = number;
  event.event.set_sequence(step);
  event.event.mutable_step()->set_step(step);
  event.event.mutable_step()->mutable_train()->set_loss(0.5 * static_cast<double>(step));
  LogRecord& log = write.logs.emplace_back();
  log.job = number;
  log.line.set_text(absl::StrCat("line ", step));
  return write;
}

class StoreTest : public testing::Test {
 protected:
  std::unique_ptr<Store> OpenStore() {
    absl::StatusOr<std::unique_ptr<Store>> store = Store::Open(folder_.path());
    EXPECT_TRUE(store.ok()) << store.status();
    return store.ok() ? *std::move(store) : nullptr;
  }
  std::string DatabaseFile() const { return folder_ / "lockstep.db"; }
  void Execute(const std::string& sql) {
    sqlite3* connection = nullptr;
    ASSERT_EQ(sqlite3_open(DatabaseFile().c_str(), &connection), SQLITE_OK);
    EXPECT_EQ(sqlite3_exec(connection, sql.c_str(), nullptr, nullptr, nullptr), SQLITE_OK);
    sqlite3_close(connection);
  }

  TemporaryFolder folder_;
};

TEST_F(StoreTest, GivesBackWhatWasCommitted) {
  {
    auto store = OpenStore();
    EXPECT_TRUE(store->LoadJobs()->empty());
    ASSERT_EQ(store->Commit({MakeWrite(1, 1), MakeWrite(2, 1)}), absl::OkStatus());
    for (int step = 2; step <= 20; ++step) {
      ASSERT_EQ(store->Commit({MakeWrite(1, step, step % 2 == 0)}), absl::OkStatus());
    }
    Write write;
    write.events.push_back({1, {}});
    write.events[0].event.set_sequence(21);
    write.events[0].event.mutable_evaluation()->set_step(20);
    ASSERT_EQ(store->Commit({write}), absl::OkStatus());
  }
  auto store = OpenStore();
  const auto jobs = store->LoadJobs();
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  ASSERT_EQ(jobs->size(), 2u);
  EXPECT_EQ((*jobs)[0].record.number, 1);
  EXPECT_EQ((*jobs)[0].record.request_id, "request-1");
  EXPECT_EQ((*jobs)[0].record.job.step(), 20);
  EXPECT_EQ((*jobs)[0].last_sequence, 21);
  EXPECT_EQ((*jobs)[1].record.job.id(), "job-2");

  auto reader = StoreReader::Open(folder_.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto events = (*reader)->Events(1, 5, 10);
  ASSERT_EQ(events->size(), 10u);
  EXPECT_EQ(events->front().sequence(), 6);
  EXPECT_EQ(events->back().sequence(), 15);
  const auto steps = (*reader)->Steps(1, 3, 7, 100);
  ASSERT_EQ(steps->size(), 5u);
  EXPECT_EQ(steps->front().train().loss(), 1.5);
  EXPECT_EQ((*reader)->Steps(1, 1, 100, 4)->size(), 4u);
  EXPECT_EQ((*reader)->Evaluations(1, 0, 100)->size(), 1u);
  EXPECT_EQ((*reader)->Evaluations(1, 0, 19)->size(), 0u);
  int64_t cursor = 0;
  EXPECT_EQ((*reader)->Logs(1, &cursor, 15)->size(), 15u);
  const auto rest = (*reader)->Logs(1, &cursor, 15);
  ASSERT_EQ(rest->size(), 5u);
  EXPECT_EQ(rest->back().text(), "line 20");
}

TEST_F(StoreTest, ReadersSeeACommitWhileTheStoreIsOpen) {
  auto store = OpenStore();
  auto reader = StoreReader::Open(folder_.path());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->Events(1, 0, 10)->size(), 0u);
  ASSERT_EQ(store->Commit({MakeWrite(1, 1)}), absl::OkStatus());
  EXPECT_EQ((*reader)->Events(1, 0, 10)->size(), 1u);
}

TEST_F(StoreTest, ACommitIsAllOrNothing) {
  auto store = OpenStore();
  ASSERT_EQ(store->Commit({MakeWrite(1, 1)}), absl::OkStatus());
  EXPECT_FALSE(store->Commit({MakeWrite(2, 1), MakeWrite(1, 1)}).ok());  // an event twice
  EXPECT_EQ(store->LoadJobs()->size(), 1u);
  EXPECT_EQ(store->Commit({MakeWrite(2, 1)}), absl::OkStatus());
}

// A process that is killed at a random moment has lost nothing that it was told is stored.
TEST_F(StoreTest, WhatIsCommittedSurvivesSigkill) {
  int64_t known = 0;
  for (int round = 0; round < 5; ++round) {
    int pipe_ends[2];
    ASSERT_EQ(pipe(pipe_ends), 0);
    const pid_t child = fork();
    if (child == 0) {
      close(pipe_ends[0]);
      absl::StatusOr<std::unique_ptr<Store>> store = Store::Open(folder_.path());
      for (int64_t number = known + 1; store.ok(); ++number) {
        if (!(*store)->Commit({MakeWrite(number, 1, number % 3 == 0)}).ok()) break;
        if (write(pipe_ends[1], &number, sizeof(number)) != sizeof(number)) break;
      }
      _exit(1);
    }
    close(pipe_ends[1]);
    int64_t told = known;
    while (told < known + 20 + 7 * round &&
           read(pipe_ends[0], &told, sizeof(told)) == sizeof(told)) {
    }
    kill(child, SIGKILL);
    int64_t late;
    while (read(pipe_ends[0], &late, sizeof(late)) == sizeof(late)) told = late;
    close(pipe_ends[0]);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));

    auto store = OpenStore();
    const auto jobs = store->LoadJobs();
    ASSERT_TRUE(jobs.ok()) << jobs.status();
    ASSERT_GE(static_cast<int64_t>(jobs->size()), told);
    for (size_t i = 0; i < jobs->size(); ++i) {
      ASSERT_EQ((*jobs)[i].record.number, static_cast<int64_t>(i) + 1);
      ASSERT_EQ((*jobs)[i].last_sequence, 1);
    }
    known = static_cast<int64_t>(jobs->size());
  }
  EXPECT_GE(known, 100);
}

TEST_F(StoreTest, ASecondStoreOfTheFolderIsRefused) {
  auto store = OpenStore();
  const auto second = Store::Open(folder_.path());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(second.status()), HasSubstr(absl::StrCat("process ", getpid())));
  EXPECT_THAT(Message(second.status()), HasSubstr("--data-dir"));
  store.reset();
  EXPECT_TRUE(Store::Open(folder_.path()).ok());
}

TEST_F(StoreTest, MakesTheFolderAndItsParents) { EXPECT_TRUE(Store::Open(folder_ / "a/b/c").ok()); }

TEST_F(StoreTest, AFolderThatCannotBeMadeIsNamed) {
  std::ofstream(folder_ / "file") << "x";
  const auto store = Store::Open(folder_ / "file/data");
  EXPECT_FALSE(store.ok());
  EXPECT_THAT(Message(store.status()), HasSubstr("file"));
}

TEST_F(StoreTest, AFileThatIsNoDatabaseIsSaidToBeDamaged) {
  std::ofstream(DatabaseFile()) << std::string(8192, 'x');
  const auto store = Store::Open(folder_.path());
  EXPECT_EQ(store.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(store.status()), HasSubstr(DatabaseFile()));
  EXPECT_THAT(Message(store.status()), HasSubstr("move the data folder away"));
}

TEST_F(StoreTest, DamagedPagesAreSaidToBeDamaged) {
  {
    auto store = OpenStore();
    for (int number = 1; number <= 500; ++number) {
      ASSERT_EQ(store->Commit({MakeWrite(number, 1, false)}), absl::OkStatus());
    }
  }
  const auto size = std::filesystem::file_size(DatabaseFile());
  std::fstream file(DatabaseFile(), std::ios::in | std::ios::out | std::ios::binary);
  for (uintmax_t at = 8192; at + 16 < size; at += 4096) {
    file.seekp(static_cast<std::streamoff>(at));
    file << "sixteen bad byte";
  }
  file.close();
  auto store = Store::Open(folder_.path());
  const absl::Status status = store.ok() ? (*store)->LoadJobs().status() : store.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
}

TEST_F(StoreTest, ARecordThatIsNoMessageIsSaidToBeDamaged) {
  ASSERT_EQ(OpenStore()->Commit({MakeWrite(1, 1)}), absl::OkStatus());
  Execute("UPDATE jobs SET record = x'ffffffff'");
  const auto jobs = OpenStore()->LoadJobs();
  EXPECT_EQ(jobs.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(jobs.status()), HasSubstr("lockstep.v1.Job"));
}

TEST_F(StoreTest, KeepsAlgorithmsOfJobs) {
  Write write = MakeWrite(1, 1);
  v1::Algorithms& algorithms = write.algorithms.emplace_back(AlgorithmsRecord{1, {}}).algorithms;
  (*algorithms.mutable_by_problem())["a product"] = std::string("\0\xff", 2);
  ASSERT_EQ(OpenStore()->Commit({write, MakeWrite(2, 1)}), absl::OkStatus());
  (*algorithms.mutable_by_problem())["another"] = "7";
  Write later;
  later.algorithms = write.algorithms;
  ASSERT_EQ(OpenStore()->Commit({later}), absl::OkStatus());
  const auto jobs = OpenStore()->LoadJobs();
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  EXPECT_EQ((*jobs)[0].algorithms.by_problem_size(), 2);
  EXPECT_EQ((*jobs)[0].algorithms.by_problem().at("a product"), std::string("\0\xff", 2));
  EXPECT_EQ((*jobs)[1].algorithms.by_problem_size(), 0);
}

TEST_F(StoreTest, AnOlderSchemaIsBroughtUpToDate) {
  ASSERT_EQ(OpenStore()->Commit({MakeWrite(1, 7)}), absl::OkStatus());
  Execute("DROP TABLE algorithms; PRAGMA user_version = 1");
  Write write = MakeWrite(1, 8);
  write.algorithms.push_back({1, {}});
  (*write.algorithms[0].algorithms.mutable_by_problem())["a product"] = "7";
  auto store = OpenStore();
  EXPECT_EQ(store->LoadJobs()->at(0).record.job.step(), 7);
  ASSERT_EQ(store->Commit({write}), absl::OkStatus());
  EXPECT_EQ(store->LoadJobs()->at(0).algorithms.by_problem_size(), 1);
}

TEST_F(StoreTest, ANewerSchemaIsRefused) {
  OpenStore();
  Execute("PRAGMA user_version = 99");
  const auto store = Store::Open(folder_.path());
  EXPECT_EQ(store.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(store.status()), HasSubstr("schema version 99, this program reads 2"));
}

// A file limit stands in for the full disk.
TEST_F(StoreTest, AFullDiskIsAnErrorAndLosesNothing) {
  ASSERT_EQ(OpenStore()->Commit({MakeWrite(1, 1)}), absl::OkStatus());
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    auto store = Store::Open(folder_.path());
    const rlimit limit = {300'000, 300'000};
    setrlimit(RLIMIT_FSIZE, &limit);
    absl::Status status;
    for (int number = 2; store.ok() && status.ok() && number < 1000; ++number) {
      Write large = MakeWrite(number, 1);
      large.jobs[0].job.set_reason(std::string(10'000, 'x'));
      status = (*store)->Commit({large});
    }
    _exit(status.ok() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  auto store = OpenStore();
  const auto jobs = store->LoadJobs();
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  EXPECT_GE(jobs->size(), 1u);
  EXPECT_EQ(store->Commit({MakeWrite(1000, 1)}), absl::OkStatus());
}

TEST_F(StoreTest, TheCommitterStoresInOrderAndSaysSo) {
  absl::Mutex mutex;
  std::vector<Ticket> tickets;
  {
    Committer committer(
        OpenStore(), absl::Seconds(5),
        [&](const std::vector<Write>& writes) {
          absl::MutexLock lock(&mutex);
          for (const Write& write : writes) tickets.push_back(write.ticket);
        },
        [](const absl::Status& status) { ADD_FAILURE() << status; });
    for (int i = 1; i <= 100; ++i) {
      Write write = MakeWrite(i, 1);
      write.ticket = i;
      committer.Enqueue(write);
      if (i == 50) {
        committer.Drain();
        absl::MutexLock lock(&mutex);
        EXPECT_EQ(tickets.size(), 50u);
      }
    }
  }  // commits the rest
  ASSERT_EQ(tickets.size(), 100u);
  for (Ticket i = 1; i <= 100; ++i) EXPECT_EQ(tickets[i - 1], i);
  EXPECT_EQ(OpenStore()->LoadJobs()->size(), 100u);
}

TEST_F(StoreTest, TheCommitterGivesUpOnceAndAcknowledgesNothing) {
  absl::Notification failed;
  absl::Status why;
  auto store = OpenStore();
  ASSERT_EQ(store->Commit({MakeWrite(1, 1)}), absl::OkStatus());
  Execute("DROP TABLE logs");
  Committer committer(
      std::move(store), absl::ZeroDuration(),
      [](const std::vector<Write>&) { ADD_FAILURE() << "nothing was stored"; },
      [&](const absl::Status& status) {
        why = status;
        failed.Notify();
      });
  committer.Enqueue(MakeWrite(2, 1));
  failed.WaitForNotification();
  EXPECT_THAT(Message(why), HasSubstr(DatabaseFile()));
  committer.Enqueue(MakeWrite(3, 1));
  committer.Drain();
}

}  // namespace
}  // namespace lockstep::server
