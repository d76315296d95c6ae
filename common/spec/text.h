// Text of error messages: quoting what a person wrote, and the nearest accepted word. Internal to
// common/spec. Thread-safe: pure functions.
#pragma once

#include <string>
#include <vector>

namespace lockstep::spec {

// One printable line of at most `limit` bytes and a "...": control characters and bytes
// that are not UTF-8 escaped.
std::string OneLine(const std::string& text, size_t limit = 60);
std::string Quoted(const std::string& text);  // OneLine in double quotes, inner ones escaped

// ` (did you mean "shards"?)`, or "" where no candidate is close.
std::string NearestHint(const std::string& found, const std::vector<std::string>& candidates);

// "a, b, c", the first 24 and "..." of many.
std::string JoinList(const std::vector<std::string>& items);

bool IsValidUtf8(const std::string& text);

}  // namespace lockstep::spec
