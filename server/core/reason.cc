#include "server/core/reason.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace lockstep::server {
namespace {

constexpr size_t kLongest = 1000;

std::string When(bool running, int64_t step) {
  return running ? absl::StrCat(" at step ", step) : " while starting";
}

// Whether `word` is followed by a number, as in "slot 3".
bool NamesNumber(const std::string& text, const std::string& word) {
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
    size_t next = at + word.size();
    if (next < text.size() && text[next] == 's') ++next;
    if (next + 1 < text.size() && text[next] == ' ' && absl::ascii_isdigit(text[next + 1])) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::string OneLine(const std::string& text) {
  std::string line = text.substr(0, kLongest);
  for (char& c : line) {
    if (absl::ascii_iscntrl(c)) c = ' ';
  }
  if (text.size() > kLongest) line += "...";
  return line;
}

std::string WorkerLost(const MemberPlacement& member, bool running, int64_t step,
                       const std::string& cause) {
  return OneLine(absl::StrCat("worker ", member.worker, " (", DescribeSlots(member.slots), ") lost",
                              When(running, step), ": ", cause));
}

std::string WorkerFailed(const MemberPlacement& member, bool running, int64_t step,
                         const std::string& error) {
  std::string text = absl::StrCat("worker ", member.worker);
  if (!NamesNumber(error, "slot")) absl::StrAppend(&text, " (", DescribeSlots(member.slots), ")");
  absl::StrAppend(&text, " failed");
  if (!NamesNumber(error, "step")) absl::StrAppend(&text, When(running, step));
  return OneLine(absl::StrCat(text, ": ", error.empty() ? "it gave no reason" : error));
}

}  // namespace lockstep::server
