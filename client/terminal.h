// What the output stream can show: width, colors, line drawing, redrawing in place.
//
// Colors and redrawing are for terminals alone: never in a pipe or file, never with TERM=dumb;
// colors also never with a non-empty NO_COLOR (https://no-color.org). Thread-safe: values and pure
// functions.
#pragma once

#include <string>

namespace lockstep::client {

enum class Color { kNone, kBold, kDim, kRed, kGreen, kYellow, kCyan };

struct Terminal {
  int fd = -1;
  bool interactive = false;  // text can be redrawn in place
  bool color = false;
  bool utf8 = false;  // the locale shows characters beyond ASCII

  // Of an open file descriptor, by the process's environment.
  static Terminal Of(int fd);
  // Columns at this moment (a window may be resized); 80 where nobody knows.
  int Width() const;
  // `text` with the color's escape codes, or unchanged where there are no colors.
  std::string Paint(Color color, const std::string& text) const;
};

// Columns that `text` takes: characters of UTF-8, escape codes of colors not counted.
int DisplayWidth(const std::string& text);

}  // namespace lockstep::client
