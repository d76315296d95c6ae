#include "client/table.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace lockstep::client {
namespace {

Terminal Colored() {
  Terminal terminal;
  terminal.interactive = terminal.color = true;
  return terminal;
}

TEST(Table, AlignsColumns) {
  Table table({{"JOB"}, {"STEP", Table::Align::kRight}, {"STATE"}});
  table.AddRow({"mlp-1", "7", "RUNNING"});
  table.AddRow({"a", "1,234", ""});
  EXPECT_EQ(table.Render(Terminal()),
            "JOB     STEP  STATE\n"
            "mlp-1      7  RUNNING\n"
            "a      1,234\n");
}

TEST(Table, AlignsByWhatIsSeen) {
  Table table({{"A"}, {"B"}});
  table.AddRow({Colored().Paint(Color::kRed, "xy"), "1"});
  table.AddRow({"ü…", "2"});
  EXPECT_EQ(table.Render(Terminal(), "  "), "  A   B\n  \x1b[31mxy\x1b[0m  1\n  ü…  2\n");
}

TEST(Table, WithoutTitlesAndWithUnevenRows) {
  Table table({});
  EXPECT_TRUE(table.empty());
  table.AddRow({"loss", "1"});
  table.AddRow({"accuracy", "2", "more"});
  EXPECT_EQ(table.Render(Terminal()), "loss      1\naccuracy  2  more\n");
}

TEST(Terminal, PaintsOnlyWhereThereAreColors) {
  EXPECT_EQ(Terminal().Paint(Color::kRed, "x"), "x");
  EXPECT_EQ(Colored().Paint(Color::kGreen, "x"), "\x1b[32mx\x1b[0m");
  EXPECT_EQ(Colored().Paint(Color::kNone, "x"), "x");
  EXPECT_EQ(Colored().Paint(Color::kGreen, ""), "");
}

TEST(Terminal, DisplayWidthCountsCharacters) {
  EXPECT_EQ(DisplayWidth("abc"), 3);
  EXPECT_EQ(DisplayWidth("━━"), 2);
  EXPECT_EQ(DisplayWidth("\x1b[1mab\x1b[0m"), 2);
}

// A real pseudo-terminal of `columns` columns.
class PseudoTerminal {
 public:
  explicit PseudoTerminal(unsigned short columns) {
    master_ = posix_openpt(O_RDWR | O_NOCTTY);
    grantpt(master_);
    unlockpt(master_);
    slave_ = open(ptsname(master_), O_RDWR | O_NOCTTY);
    winsize size{25, columns, 0, 0};
    ioctl(slave_, TIOCSWINSZ, &size);
  }
  ~PseudoTerminal() {
    close(slave_);
    close(master_);
  }
  int fd() const { return slave_; }

 private:
  int master_, slave_;
};

TEST(Terminal, KnowsATerminalAndItsWidth) {
  const PseudoTerminal pty(123);
  setenv("TERM", "xterm", 1);
  unsetenv("NO_COLOR");
  const Terminal terminal = Terminal::Of(pty.fd());
  EXPECT_TRUE(terminal.interactive);
  EXPECT_TRUE(terminal.color);
  EXPECT_EQ(terminal.Width(), 123);
}

TEST(Terminal, NoColorAndDumbTerminals) {
  const PseudoTerminal pty(80);
  setenv("TERM", "xterm", 1);
  setenv("NO_COLOR", "1", 1);
  EXPECT_TRUE(Terminal::Of(pty.fd()).interactive);
  EXPECT_FALSE(Terminal::Of(pty.fd()).color);
  setenv("NO_COLOR", "", 1);  // empty: as if not set
  EXPECT_TRUE(Terminal::Of(pty.fd()).color);
  setenv("TERM", "dumb", 1);
  EXPECT_FALSE(Terminal::Of(pty.fd()).interactive);
  EXPECT_FALSE(Terminal::Of(pty.fd()).color);
}

TEST(Terminal, APipeIsNone) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  unsetenv("COLUMNS");
  const Terminal terminal = Terminal::Of(fds[1]);
  EXPECT_FALSE(terminal.interactive);
  EXPECT_FALSE(terminal.color);
  EXPECT_EQ(terminal.Width(), 80);
  close(fds[0]);
  close(fds[1]);
}

}  // namespace
}  // namespace lockstep::client
