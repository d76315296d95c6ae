// What a process knows about the machine it runs on. Thread-safe.
#pragma once

#include <string>

namespace lockstep {

// 32 hex digits, equal for two processes exactly where each can open the other's memory through
// /proc/PID/fd: same boot of the same kernel, same pid, user, network and ipc namespaces, same host
// name and same user. Constant in the life of a process that does not change its namespaces.
std::string DefaultHostId();

// The kernel's host name; "localhost" where it has none.
std::string HostName();

// Cores this process may run on (sched_getaffinity), at least 1.
int AvailableCores();

}  // namespace lockstep
