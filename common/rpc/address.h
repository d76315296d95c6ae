// Network addresses as people write them: "host:port", "[::1]:port".
//
// Thread-safe: pure functions, no name resolution.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lockstep::rpc {

struct Address {
  std::string host;  // a name, an IPv4 address, or an IPv6 address without its brackets
  int port = 0;      // 0 to 65535; 0 asks the system to choose, where one listens

  std::string ToString() const;  // "host:port", an IPv6 address in brackets
};

// InvalidArgument: no "host:port".
absl::StatusOr<Address> ParseAddress(const std::string& text);

// Whether only this machine can reach it: "localhost", 127.0.0.0/8, ::1. Any other name is not.
bool IsLoopback(const std::string& host);

// Whether `address` ("host:port") may be used without encryption. Returns a warning to show once,
// empty for a loopback address. InvalidArgument: no address. FailedPrecondition: not loopback, and
// `insecure` (the flag --insecure) was not given.
absl::StatusOr<std::string> CheckPlaintext(const std::string& address, bool insecure);

}  // namespace lockstep::rpc
