#include "client/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>

namespace lockstep::client {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool LocaleIsUtf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const std::string value = Environment(name);
    if (value.empty()) continue;
    return value.find("UTF-8") != std::string::npos || value.find("utf8") != std::string::npos;
  }
  return false;
}

}  // namespace

Terminal Terminal::Of(int fd) {
  Terminal terminal;
  terminal.fd = fd;
  terminal.interactive = isatty(fd) == 1 && Environment("TERM") != "dumb";
  terminal.color = terminal.interactive && Environment("NO_COLOR").empty();
  terminal.utf8 = LocaleIsUtf8();
  return terminal;
}

int Terminal::Width() const {
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  const int columns = std::atoi(Environment("COLUMNS").c_str());
  return columns > 0 ? columns : 80;
}

std::string Terminal::Paint(Color wanted, const std::string& text) const {
  if (!color || wanted == Color::kNone || text.empty()) return text;
  const char* code = "0";
  switch (wanted) {
    case Color::kNone:
      break;
    case Color::kBold:
      code = "1";
      break;
    case Color::kDim:
      code = "2";
      break;
    case Color::kRed:
      code = "31";
      break;
    case Color::kGreen:
      code = "32";
      break;
    case Color::kYellow:
      code = "33";
      break;
    case Color::kCyan:
      code = "36";
      break;
  }
  return std::string("\x1b[") + code + "m" + text + "\x1b[0m";
}

int DisplayWidth(const std::string& text) {
  int width = 0;
  bool escape = false;
  for (const char c : text) {
    if (escape) {
      escape = c != 'm';
    } else if (c == '\x1b') {
      escape = true;
    } else if ((static_cast<unsigned char>(c) & 0xC0) != 0x80) {
      ++width;
    }
  }
  return width;
}

}  // namespace lockstep::client
