#include "client/cli.h"

int main(int argc, char** argv) { return lockstep::client::RunCli(argc, argv, LOCKSTEP_VERSION); }
