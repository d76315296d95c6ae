#include "common/spec/text.h"

#include <algorithm>
#include <cctype>
#include <numeric>

#include "fmt/format.h"

namespace lockstep::spec {
namespace {

// Levenshtein distance with adjacent transpositions, letter case ignored.
size_t EditDistance(const std::string& a, const std::string& b) {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  std::iota(d[0].begin(), d[0].end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      const bool same = lower(a[i - 1]) == lower(b[j - 1]);
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) &&
          lower(a[i - 2]) == lower(b[j - 1]))
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

// Bytes of the UTF-8 character at `at`, or 0 where there is none.
size_t Utf8Length(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(at);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || at + length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
  }
  const unsigned char second = byte(at + 1);
  const bool overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool surrogate = first == 0xED && second > 0x9F;
  const bool beyond = first == 0xF4 && second > 0x8F;
  return overlong || surrogate || beyond ? 0 : length;
}

}  // namespace

std::string OneLine(const std::string& text, size_t limit) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    const auto byte = static_cast<unsigned char>(text[i]);
    std::string piece;
    if (length == 0 || byte < 0x20 || byte == 0x7F) {
      piece = byte == '\n' ? "\\n" : byte == '\t' ? "\\t" : fmt::format("\\x{:02x}", byte);
    } else {
      piece = text.substr(i, length);
    }
    // C1 controls and the Unicode line separators would break the line on some terminals.
    if (piece.size() == 2 && byte == 0xC2 && static_cast<unsigned char>(piece[1]) < 0xA0)
      piece = fmt::format("\\u00{:02x}", static_cast<unsigned char>(piece[1]));
    if (piece == "\xE2\x80\xA8" || piece == "\xE2\x80\xA9") piece = "\\u2028";
    if (out.size() + piece.size() > limit) return out + "...";
    out += piece;
    i += std::max<size_t>(length, 1);
  }
  return out;
}

std::string Quoted(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '"' || c == '\\') escaped += '\\';
    escaped += c;
  }
  return '"' + OneLine(escaped) + '"';
}

std::string NearestHint(const std::string& found, const std::vector<std::string>& candidates) {
  if (found.size() < 3 || found.size() > 64) return "";
  size_t best = std::max<size_t>(1, found.size() / 3) + 1;
  const std::string* nearest = nullptr;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(found, candidate);
    if (distance < best && distance < candidate.size()) {
      best = distance;
      nearest = &candidate;
    }
  }
  return nearest == nullptr ? "" : fmt::format(" (did you mean {}?)", Quoted(*nearest));
}

std::string JoinList(const std::vector<std::string>& items) {
  constexpr size_t kShown = 24;
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0) out += ", ";
    if (i == kShown) return out + "...";
    out += items[i];
  }
  return out;
}

bool IsValidUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    if (length == 0) return false;
    i += length;
  }
  return true;
}

}  // namespace lockstep::spec
