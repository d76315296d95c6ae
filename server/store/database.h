// SQLite with absl::Status: a connection and its prepared statements.
//
// Thread-compatible. A Statement must not outlive its Database.
#pragma once

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "google/protobuf/message_lite.h"

namespace lockstep::server {

class Database;

// One execution of a statement. Parameters are bound in order.
class Statement {
 public:
  Statement& Bind(int64_t value);
  Statement& Bind(const std::string& text);
  Statement& Bind(const google::protobuf::MessageLite& message);  // as a blob

  // Runs to the next row; false at the end.
  absl::StatusOr<bool> Next();
  // Runs a statement that has no rows.
  absl::Status Run();

  int64_t Integer(int column) const;
  std::string Text(int column) const;
  // DataLoss: the blob is no such message.
  absl::Status Parse(int column, google::protobuf::MessageLite* message) const;

 private:
  friend class Database;
  Statement(Database* database, sqlite3_stmt* statement)
      : database_(database), statement_(statement, &sqlite3_finalize) {}

  Database* database_;
  std::unique_ptr<sqlite3_stmt, int (*)(sqlite3_stmt*)> statement_;
  int bound_ = 0;
  int bind_error_ = SQLITE_OK;
};

class Database {
 public:
  enum class Mode { kReadOnly, kCreate };
  static absl::StatusOr<Database> Open(const std::string& path, Mode mode);

  // `sql` is one statement, text of ours.
  absl::StatusOr<Statement> Prepare(const char* sql);
  // One or more statements without parameters or rows.
  absl::Status Execute(const std::string& sql);
  absl::StatusOr<int64_t> QueryInteger(const char* sql);

  // The last failure as one line that names the file.
  absl::Status Error(int code) const;
  const std::string& path() const { return path_; }

 private:
  Database(const std::string& path, sqlite3* connection)
      : path_(path), connection_(connection, &sqlite3_close_v2) {}

  std::string path_;
  std::unique_ptr<sqlite3, int (*)(sqlite3*)> connection_;
};

}  // namespace lockstep::server
