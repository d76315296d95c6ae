#include "common/host.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>

#include "common/clock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

// What `body` says in a child process of its own.
std::string InChild(const std::function<std::string()>& body) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const std::string text = body();
    const bool written =
        write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
    _exit(written ? 0 : 1);
  }
  close(ends[1]);
  std::string text;
  char bytes[256];
  for (ssize_t got; (got = read(ends[0], bytes, sizeof(bytes))) > 0;) text.append(bytes, got);
  close(ends[0]);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  return text;
}

TEST(Host, IdIsTheSameInEveryProcessOfTheHost) {
  const std::string id = DefaultHostId();
  EXPECT_EQ(id.size(), 32u);
  EXPECT_EQ(DefaultHostId(), id);
  EXPECT_EQ(InChild(DefaultHostId), id);
}

TEST(Host, IdDiffersInAnotherNamespace) {
  for (const int space : {CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUSER}) {
    const std::string other = InChild([&] {
      const int flags = space == CLONE_NEWUSER ? space : space | CLONE_NEWUSER;
      return unshare(flags) == 0 || unshare(space) == 0 ? DefaultHostId() : std::string("refused");
    });
    if (other == "refused") GTEST_SKIP() << "this machine refuses new namespaces";
    EXPECT_EQ(other.size(), 32u);
    EXPECT_NE(other, DefaultHostId()) << space;
  }
}

TEST(Host, NameIsTheKernels) {
  char name[256] = {};
  ASSERT_EQ(gethostname(name, sizeof(name) - 1), 0);
  EXPECT_EQ(HostName(), name);
}

TEST(Host, CoresFollowTheAffinity) {
  EXPECT_GE(AvailableCores(), 1);
  EXPECT_LE(AvailableCores(), static_cast<int>(sysconf(_SC_NPROCESSORS_CONF)));
  EXPECT_EQ(InChild([] {
              cpu_set_t all, one;
              sched_getaffinity(0, sizeof(all), &all);
              CPU_ZERO(&one);
              for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
                if (!CPU_ISSET(cpu, &all)) continue;
                CPU_SET(cpu, &one);
                break;
              }
              sched_setaffinity(0, sizeof(one), &one);
              return std::to_string(AvailableCores());
            }),
            "1");
}

TEST(Clock, RealOneFollowsTheWall) {
  const absl::Time before = absl::Now();
  const absl::Time now = RealClock().Now();
  EXPECT_LE(before, now);
  EXPECT_LE(now, absl::Now());
}

}  // namespace
}  // namespace lockstep
