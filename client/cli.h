// The command line of `lockstep`: arguments to a command. Call it once, at the start of main.
#pragma once

#include <string>

namespace lockstep::client {

// The process's exit code.
int RunCli(int argc, char** argv, const std::string& version);

}  // namespace lockstep::client
