#include "server/store/store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/fs.h"
#include "common/status_macros.h"

namespace lockstep::server {
namespace {

constexpr int64_t kSchemaVersion = 2;
constexpr char kSchema[] = R"sql(
CREATE TABLE jobs(
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  request_id TEXT NOT NULL,
  record BLOB NOT NULL);            -- v1.Job
CREATE TABLE events(
  job INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  kind INTEGER NOT NULL,            -- number of the field in v1.JobEvent
  step INTEGER NOT NULL,
  record BLOB NOT NULL,             -- v1.JobEvent
  PRIMARY KEY(job, sequence)) WITHOUT ROWID;
CREATE INDEX events_by_step ON events(job, kind, step);
CREATE TABLE logs(
  number INTEGER PRIMARY KEY,
  job INTEGER NOT NULL,
  record BLOB NOT NULL);            -- v1.LogLine
CREATE INDEX logs_by_job ON logs(job, number);
)sql";
constexpr char kSince2[] = R"sql(
CREATE TABLE algorithms(
  job INTEGER PRIMARY KEY,
  record BLOB NOT NULL);            -- v1.Algorithms
)sql";

std::string DatabasePath(const std::string& data_dir) { return JoinPath(data_dir, "lockstep.db"); }

// The descriptor that holds the folder until it is closed.
absl::StatusOr<int> LockFolder(const std::string& data_dir) {
  const std::string path = JoinPath(data_dir, "lock");
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (file < 0) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  }
  if (flock(file, LOCK_EX | LOCK_NB) != 0) {
    char holder[32] = {};
    const ssize_t length = read(file, holder, sizeof(holder) - 1);
    close(file);
    return absl::FailedPreconditionError(absl::StrCat(
        "data folder ", data_dir, " is in use by another lockstep-server",
        length > 0 ? absl::StrCat(" (process ", holder, ")") : "", "; give another --data-dir"));
  }
  const std::string process = absl::StrCat(getpid());
  if (ftruncate(file, 0) != 0 ||
      write(file, process.data(), process.size()) != static_cast<ssize_t>(process.size())) {
    const std::string why = std::strerror(errno);
    close(file);
    return absl::PermissionDeniedError(absl::StrCat("cannot write ", path, ": ", why));
  }
  return file;
}

absl::StatusOr<Database> OpenDatabase(const std::string& path) {
  ASSIGN_OR_RETURN(Database database, Database::Open(path, Database::Mode::kCreate));
  RETURN_IF_ERROR(database.Execute("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"));
  ASSIGN_OR_RETURN(const int64_t version, database.QueryInteger("PRAGMA user_version"));
  if (version == 0 || version == 1) {
    RETURN_IF_ERROR(
        database.Execute(absl::StrCat("BEGIN IMMEDIATE; ", version == 0 ? kSchema : "", kSince2,
                                      "PRAGMA user_version = ", kSchemaVersion, "; COMMIT;")));
  } else if (version != kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("database ", path, " has schema version ", version, ", this program reads ",
                     kSchemaVersion, "; use the version of Lockstep that wrote it"));
  }
  return database;
}

int64_t StepOf(const v1::JobEvent& event) {
  switch (event.event_case()) {
    case v1::JobEvent::kStep:
      return event.step().step();
    case v1::JobEvent::kEvaluation:
      return event.evaluation().step();
    case v1::JobEvent::kCheckpoint:
      return event.checkpoint().step();
    default:
      return event.job().step();
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> Store::Open(const std::string& data_dir) {
  const absl::Status made = MakeDirectories(data_dir);
  if (!made.ok()) {
    return absl::Status(made.code(),
                        absl::StrCat("cannot make the data folder: ", std::string(made.message())));
  }
  ASSIGN_OR_RETURN(const int lock, LockFolder(data_dir));
  absl::StatusOr<Database> database = OpenDatabase(DatabasePath(data_dir));
  if (!database.ok()) {
    close(lock);
    return database.status();
  }
  return std::unique_ptr<Store>(new Store(lock, *std::move(database)));
}

Store::~Store() { close(lock_); }

absl::StatusOr<std::vector<StoredJob>> Store::LoadJobs() {
  ASSIGN_OR_RETURN(
      Statement statement,
      database_.Prepare("SELECT number, request_id, jobs.record, "
                        "(SELECT COALESCE(MAX(sequence), 0) FROM events WHERE job = number), "
                        "COALESCE(algorithms.record, x'') "
                        "FROM jobs LEFT JOIN algorithms ON algorithms.job = number "
                        "ORDER BY number"));
  std::vector<StoredJob> jobs;
  while (true) {
    ASSIGN_OR_RETURN(const bool row, statement.Next());
    if (!row) return jobs;
    StoredJob& job = jobs.emplace_back();
    job.record.number = statement.Integer(0);
    job.record.request_id = statement.Text(1);
    RETURN_IF_ERROR(statement.Parse(2, &job.record.job));
    job.last_sequence = statement.Integer(3);
    RETURN_IF_ERROR(statement.Parse(4, &job.algorithms));
  }
}

absl::Status Store::Commit(const std::vector<Write>& writes) {
  bool durable = false;
  for (const Write& write : writes) durable = durable || write.durable;
  if (durable != syncs_fully_) {
    RETURN_IF_ERROR(
        database_.Execute(durable ? "PRAGMA synchronous = FULL" : "PRAGMA synchronous = NORMAL"));
    syncs_fully_ = durable;
  }
  RETURN_IF_ERROR(database_.Execute("BEGIN IMMEDIATE"));
  absl::Status status;
  for (size_t i = 0; i < writes.size() && status.ok(); ++i) status = Insert(writes[i]);
  if (status.ok()) status = database_.Execute("COMMIT");
  // After some errors SQLite has rolled back already; then this one's error means nothing.
  if (!status.ok()) (void)database_.Execute("ROLLBACK");
  return status;
}

absl::Status Store::Insert(const Write& write) {
  ASSIGN_OR_RETURN(Statement job, database_.Prepare("INSERT INTO jobs VALUES(?, ?, ?, ?) "
                                                    "ON CONFLICT(number) DO UPDATE SET "
                                                    "record = excluded.record"));
  for (const JobRecord& record : write.jobs) {
    RETURN_IF_ERROR(job.Bind(record.number)
                        .Bind(record.job.id())
                        .Bind(record.request_id)
                        .Bind(record.job)
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement algorithms,
                   database_.Prepare("INSERT OR REPLACE INTO algorithms VALUES(?, ?)"));
  for (const AlgorithmsRecord& record : write.algorithms) {
    RETURN_IF_ERROR(algorithms.Bind(record.job).Bind(record.algorithms).Run());
  }
  ASSIGN_OR_RETURN(Statement event, database_.Prepare("INSERT INTO events VALUES(?, ?, ?, ?, ?)"));
  for (const EventRecord& record : write.events) {
    RETURN_IF_ERROR(event.Bind(record.job)
                        .Bind(record.event.sequence())
                        .Bind(static_cast<int64_t>(record.event.event_case()))
                        .Bind(StepOf(record.event))
                        .Bind(record.event)
                        .Run());
  }
  ASSIGN_OR_RETURN(Statement log, database_.Prepare("INSERT INTO logs(job, record) VALUES(?, ?)"));
  for (const LogRecord& record : write.logs) {
    RETURN_IF_ERROR(log.Bind(record.job).Bind(record.line).Run());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<StoreReader>> StoreReader::Open(const std::string& data_dir) {
  ASSIGN_OR_RETURN(Database database,
                   Database::Open(DatabasePath(data_dir), Database::Mode::kReadOnly));
  return std::unique_ptr<StoreReader>(new StoreReader(std::move(database)));
}

absl::StatusOr<std::vector<v1::JobEvent>> StoreReader::Events(int64_t number, int64_t sequence,
                                                              int limit) {
  ASSIGN_OR_RETURN(Statement statement,
                   database_.Prepare("SELECT record FROM events WHERE job = ? AND sequence > ? "
                                     "ORDER BY sequence LIMIT ?"));
  statement.Bind(number).Bind(sequence).Bind(int64_t{limit});
  std::vector<v1::JobEvent> events;
  while (true) {
    ASSIGN_OR_RETURN(const bool row, statement.Next());
    if (!row) return events;
    RETURN_IF_ERROR(statement.Parse(0, &events.emplace_back()));
  }
}

absl::StatusOr<std::vector<v1::StepMetrics>> StoreReader::Steps(int64_t number, int64_t from,
                                                                int64_t to, int limit) {
  ASSIGN_OR_RETURN(Statement statement,
                   database_.Prepare("SELECT record FROM events WHERE job = ? AND kind = ? AND "
                                     "step BETWEEN ? AND ? ORDER BY step LIMIT ?"));
  statement.Bind(number)
      .Bind(static_cast<int64_t>(v1::JobEvent::kStep))
      .Bind(from)
      .Bind(to)
      .Bind(int64_t{limit});
  std::vector<v1::StepMetrics> steps;
  while (true) {
    ASSIGN_OR_RETURN(const bool row, statement.Next());
    if (!row) return steps;
    v1::JobEvent event;
    RETURN_IF_ERROR(statement.Parse(0, &event));
    steps.push_back(std::move(*event.mutable_step()));
  }
}

absl::StatusOr<std::vector<v1::Evaluation>> StoreReader::Evaluations(int64_t number, int64_t from,
                                                                     int64_t to) {
  ASSIGN_OR_RETURN(Statement statement,
                   database_.Prepare("SELECT record FROM events WHERE job = ? AND kind = ? AND "
                                     "step BETWEEN ? AND ? ORDER BY step"));
  statement.Bind(number).Bind(static_cast<int64_t>(v1::JobEvent::kEvaluation)).Bind(from).Bind(to);
  std::vector<v1::Evaluation> evaluations;
  while (true) {
    ASSIGN_OR_RETURN(const bool row, statement.Next());
    if (!row) return evaluations;
    v1::JobEvent event;
    RETURN_IF_ERROR(statement.Parse(0, &event));
    evaluations.push_back(std::move(*event.mutable_evaluation()));
  }
}

absl::StatusOr<std::vector<v1::LogLine>> StoreReader::Logs(int64_t number, int64_t* cursor,
                                                           int limit) {
  ASSIGN_OR_RETURN(Statement statement,
                   database_.Prepare("SELECT number, record FROM logs WHERE job = ? AND "
                                     "number > ? ORDER BY number LIMIT ?"));
  statement.Bind(number).Bind(*cursor).Bind(int64_t{limit});
  std::vector<v1::LogLine> lines;
  while (true) {
    ASSIGN_OR_RETURN(const bool row, statement.Next());
    if (!row) return lines;
    *cursor = statement.Integer(0);
    RETURN_IF_ERROR(statement.Parse(1, &lines.emplace_back()));
  }
}

}  // namespace lockstep::server
