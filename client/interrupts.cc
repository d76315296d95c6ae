#include "client/interrupts.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

namespace lockstep::client {

Interrupts::Interrupts() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGCHLD);
  struct sigaction hangup;
  // A blocked signal is queued even where it is ignored: leave an ignored one alone.
  if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN) {
    sigaddset(&set, SIGHUP);
  }
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  fd_ = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

Interrupts::~Interrupts() { close(fd_); }

int Interrupts::Next() {
  signalfd_siginfo info;
  if (read(fd_, &info, sizeof(info)) != sizeof(info)) return 0;
  return static_cast<int>(info.ssi_signo);
}

InterruptWatch::InterruptWatch(Interrupts& interrupts, std::function<void()> on_interrupt)
    : interrupts_(interrupts),
      on_interrupt_(std::move(on_interrupt)),
      stop_(eventfd(0, EFD_CLOEXEC)),
      thread_([this] { Work(); }) {}

InterruptWatch::~InterruptWatch() {
  const uint64_t one = 1;
  if (write(stop_, &one, sizeof(one)) == sizeof(one)) thread_.join();
  close(stop_);
}

void InterruptWatch::Work() {
  pollfd fds[] = {{interrupts_.fd(), POLLIN, 0}, {stop_, POLLIN, 0}};
  while (true) {
    if (poll(fds, 2, -1) < 0) continue;
    if (fds[1].revents != 0) return;
    const int signal = interrupts_.Next();
    if (signal == 0 || signal == SIGCHLD) continue;
    if (interrupted_.exchange(true)) _exit(kExitInterrupted);
    on_interrupt_();
  }
}

}  // namespace lockstep::client
