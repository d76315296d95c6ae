// GoogleTest's main, and that of the member processes which the tests start from the same binary.
#include <gtest/gtest.h>
#include <signal.h>
#include <string.h>

#include <cstdlib>

#include "tests/collective/scenario.h"

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  if (argc == 4 && strcmp(argv[1], "--member") == 0) {
    return lockstep::collective::MemberMain(argv[2], std::atoi(argv[3]));
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
