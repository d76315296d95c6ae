// Conversion between absl::Status, which our code speaks, and grpc::Status, which the wire speaks.
// This is the one place where it is done; the codes of both have equal numbers and meanings.
//
// Thread-safe: pure functions.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace lockstep::rpc {

// Line breaks in the message become spaces, so that every error stays one line.
grpc::Status ToGrpc(const absl::Status& status);

// A code that gRPC does not define becomes kUnknown.
absl::Status FromGrpc(const grpc::Status& status);

}  // namespace lockstep::rpc
