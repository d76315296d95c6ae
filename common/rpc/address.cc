#include "common/rpc/address.h"

#include <arpa/inet.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace lockstep::rpc {

std::string Address::ToString() const {
  if (host.find(':') != std::string::npos) return absl::StrCat("[", host, "]:", port);
  return absl::StrCat(host, ":", port);
}

absl::StatusOr<Address> ParseAddress(const std::string& text) {
  const auto error = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is no address; accepted: HOST:PORT, such as 127.0.0.1:7070"));
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return error();
  Address address;
  address.host = text.substr(0, colon);
  if (address.host.front() == '[') {
    if (address.host.size() < 3 || address.host.back() != ']') return error();
    address.host = address.host.substr(1, address.host.size() - 2);
  } else if (address.host.find(':') != std::string::npos) {
    return error();
  }
  const std::string port = text.substr(colon + 1);
  if (port.empty() || port.find_first_not_of("0123456789") != std::string::npos ||
      !absl::SimpleAtoi(port, &address.port) || address.port > 65535) {
    return error();
  }
  if (address.host.find_first_of(" \t\n/") != std::string::npos) return error();
  return address;
}

bool IsLoopback(const std::string& host) {
  if (host == "localhost") return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::StatusOr<std::string> CheckPlaintext(const std::string& address, bool insecure) {
  absl::StatusOr<Address> parsed = ParseAddress(address);
  if (!parsed.ok()) return parsed.status();
  if (IsLoopback(parsed->host)) return std::string();
  if (!insecure) {
    return absl::FailedPreconditionError(
        absl::StrCat(address,
                     " is not a loopback address and the connection would not be encrypted; "
                     "give --insecure to accept that on a network you trust"));
  }
  return absl::StrCat("--insecure: connections at ", address,
                      " are neither encrypted nor authenticated");
}

}  // namespace lockstep::rpc
