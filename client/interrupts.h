// Ctrl-C, SIGTERM and SIGHUP as something to poll, so that a command ends in an orderly way:
// children stopped, the terminal's line finished, exit code 130.
//
// Make one at the start of main, before any thread: it blocks the signals in this thread and all
// that it starts, and they arrive here alone. SIGCHLD is delivered here too, so that one poll also
// wakes for children that ended. A SIGHUP that was ignored (nohup) stays ignored. Thread safety:
// Next from one thread at a time; Requested from any.
#pragma once

#include <atomic>
#include <functional>
#include <thread>

namespace lockstep::client {

constexpr int kExitOk = 0;
constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitInterrupted = 130;

class Interrupts {
 public:
  Interrupts();
  ~Interrupts();
  Interrupts(const Interrupts&) = delete;

  // Readable when Next has something to say.
  int fd() const { return fd_; }
  // Takes what has arrived, without waiting: the number of a signal that asks us to end, SIGCHLD
  // where a child ended, 0 for nothing.
  int Next();

 private:
  int fd_ = -1;
};

// While it lives, a thread calls `on_interrupt` once for the first signal that asks us to end, and
// ends the process at once, with 130, for the second: a command that does not come to its end can
// be left.
class InterruptWatch {
 public:
  InterruptWatch(Interrupts& interrupts, std::function<void()> on_interrupt);
  ~InterruptWatch();
  InterruptWatch(const InterruptWatch&) = delete;
  bool interrupted() const { return interrupted_; }

 private:
  void Work();

  Interrupts& interrupts_;
  const std::function<void()> on_interrupt_;
  std::atomic<bool> interrupted_{false};
  int stop_ = -1;  // eventfd
  std::thread thread_;
};

}  // namespace lockstep::client
