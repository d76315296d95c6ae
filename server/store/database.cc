#include "server/store/database.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace lockstep::server {
namespace {

constexpr int kBusyTimeoutMs = 2000;

}  // namespace

Statement& Statement::Bind(int64_t value) {
  const int code = sqlite3_bind_int64(statement_.get(), ++bound_, value);
  if (code != SQLITE_OK) bind_error_ = code;
  return *this;
}

Statement& Statement::Bind(const std::string& text) {
  const int code = sqlite3_bind_text(statement_.get(), ++bound_, text.data(),
                                     static_cast<int>(text.size()), SQLITE_TRANSIENT);
  if (code != SQLITE_OK) bind_error_ = code;
  return *this;
}

Statement& Statement::Bind(const google::protobuf::MessageLite& message) {
  const std::string bytes = message.SerializeAsString();
  const int code = sqlite3_bind_blob(statement_.get(), ++bound_, bytes.data(),
                                     static_cast<int>(bytes.size()), SQLITE_TRANSIENT);
  if (code != SQLITE_OK) bind_error_ = code;
  return *this;
}

absl::StatusOr<bool> Statement::Next() {
  if (bind_error_ != SQLITE_OK) return database_->Error(bind_error_);
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  if (code != SQLITE_DONE) return database_->Error(code);
  return false;
}

absl::Status Statement::Run() {
  absl::StatusOr<bool> row = Next();
  sqlite3_reset(statement_.get());
  sqlite3_clear_bindings(statement_.get());
  bound_ = 0;
  return row.status();
}

int64_t Statement::Integer(int column) const {
  return sqlite3_column_int64(statement_.get(), column);
}

std::string Statement::Text(int column) const {
  const auto* text = reinterpret_cast<const char*>(sqlite3_column_text(statement_.get(), column));
  return std::string(text == nullptr ? "" : text, sqlite3_column_bytes(statement_.get(), column));
}

absl::Status Statement::Parse(int column, google::protobuf::MessageLite* message) const {
  const void* bytes = sqlite3_column_blob(statement_.get(), column);
  if (!message->ParseFromArray(bytes, sqlite3_column_bytes(statement_.get(), column))) {
    return absl::DataLossError(absl::StrCat(
        "database ", database_->path(), " is damaged: a record is no ", message->GetTypeName()));
  }
  return absl::OkStatus();
}

absl::StatusOr<Database> Database::Open(const std::string& path, Mode mode) {
  sqlite3* connection = nullptr;
  const int flags =
      mode == Mode::kReadOnly ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE;
  const int code = sqlite3_open_v2(path.c_str(), &connection, flags | SQLITE_OPEN_NOMUTEX, nullptr);
  Database database(path, connection);
  if (code != SQLITE_OK) return database.Error(code);
  sqlite3_extended_result_codes(connection, 1);
  sqlite3_busy_timeout(connection, kBusyTimeoutMs);
  return database;
}

absl::StatusOr<Statement> Database::Prepare(const char* sql) {
  sqlite3_stmt* statement = nullptr;
  const int code = sqlite3_prepare_v2(connection_.get(), sql, -1, &statement, nullptr);
  if (code != SQLITE_OK) return Error(code);
  return Statement(this, statement);
}

absl::Status Database::Execute(const std::string& sql) {
  const int code = sqlite3_exec(connection_.get(), sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : Error(code);
}

absl::StatusOr<int64_t> Database::QueryInteger(const char* sql) {
  ASSIGN_OR_RETURN(Statement statement, Prepare(sql));
  ASSIGN_OR_RETURN(const bool row, statement.Next());
  return row ? statement.Integer(0) : 0;
}

absl::Status Database::Error(int code) const {
  const std::string what =
      connection_ != nullptr ? sqlite3_errmsg(connection_.get()) : sqlite3_errstr(code);
  const auto line = [&](const char* advice) {
    return absl::StrCat("database ", path_, ": ", what, advice);
  };
  switch (code & 0xff) {
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(
          line("; move the data folder away to start with an empty one, or restore a copy of it"));
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return absl::FailedPreconditionError(line("; end the other program that uses it"));
    case SQLITE_FULL:
      return absl::ResourceExhaustedError(line("; free some space"));
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_CANTOPEN:
    case SQLITE_AUTH:
      return absl::PermissionDeniedError(line("; the data folder and its files must be writable"));
    default:
      return absl::UnavailableError(line(""));
  }
}

}  // namespace lockstep::server
