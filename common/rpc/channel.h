// How every client side of our gRPC connects, and the limits that both sides share.
//
// Thread-safe: pure functions. A channel connects lazily and reconnects by itself, so that making
// one never fails; each call must carry a deadline or live on a stream with heartbeats.
#pragma once

#include <grpcpp/channel.h>

#include <memory>
#include <string>

namespace lockstep::rpc {

// No message on the wire is longer; a longer one is RESOURCE_EXHAUSTED. Streams cut their content
// into chunks well below it.
constexpr int kMaxMessageBytes = 4 << 20;

// A connection without traffic is probed this often, and given up without an answer after the
// timeout: finds a peer that vanished without closing (a power cut, a dropped route).
constexpr int kKeepaliveMs = 10000;
constexpr int kKeepaliveTimeoutMs = 5000;

// To "host:port", plaintext (see CheckPlaintext), past any HTTP proxy of the environment;
// reconnects after 100 ms, backing off to 1 s.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address);

}  // namespace lockstep::rpc
