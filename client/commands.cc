#include "client/commands.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "client/format.h"
#include "client/terminal.h"

namespace lockstep::client {
namespace {

std::atomic<int> output_error = 0;  // errno of the first failed write to standard output

}  // namespace

void WriteAll(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      int none = 0;
      if (fd == STDOUT_FILENO && errno != EPIPE) output_error.compare_exchange_strong(none, errno);
      return;
    }
    done += n;
  }
}

int CheckOutput(int code) {
  if (output_error == 0) return code;
  Fail(absl::UnknownError(absl::StrCat("cannot write standard output: ", strerror(output_error))));
  return code == kExitOk ? kExitFailed : code;
}

int Fail(const absl::Status& status) {
  const Terminal terminal = Terminal::Of(STDERR_FILENO);
  WriteAll(STDERR_FILENO, terminal.Paint(Color::kRed, "lockstep:") + " " +
                              OneLine(std::string(status.message())) + "\n");
  return status.code() == absl::StatusCode::kInvalidArgument ? kExitUsage : kExitFailed;
}

void Warn(const std::string& text) {
  const Terminal terminal = Terminal::Of(STDERR_FILENO);
  WriteAll(STDERR_FILENO,
           terminal.Paint(Color::kYellow, "lockstep: warning:") + " " + OneLine(text) + "\n");
}

std::string AbsolutePath(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  std::string text = error ? path : absolute.lexically_normal().string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

std::string ShortPath(const std::string& path) {
  std::error_code error;
  const std::string here = std::filesystem::current_path(error).string() + "/";
  return !error && path.rfind(here, 0) == 0 ? path.substr(here.size()) : path;
}

}  // namespace lockstep::client
