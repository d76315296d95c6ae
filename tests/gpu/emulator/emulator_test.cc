#include "tests/gpu/emulator/emulator.h"
#include <gtest/gtest.h>
TEST(Emulator, Starts) {}
