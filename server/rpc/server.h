// The coordinator as one object: store, core, driver and gRPC server joined.
//
// Thread-compatible; its work is done on threads of its own. Destroying it shuts it down.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "server/core/core.h"

namespace lockstep::server {

struct ServerOptions {
  std::string listen = "127.0.0.1:7070";  // port 0: the system chooses
  std::string data_dir = "lockstep-data";
  CoreOptions core;
  absl::Duration store_patience = absl::Seconds(10);  // how long a failing store is tried again
  // Called once, on a thread of the server, when it cannot go on (the store failed for good). The
  // owner then destroys the server. From then on nothing is acknowledged.
  std::function<void(const absl::Status&)> on_failure = [](const absl::Status&) {};
};

class Server {
 public:
  // Serves when it returns. The clock must outlive the server.
  // Errors: those of Store::Open and ParseAddress; Unavailable: the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options, Clock& clock);
  virtual ~Server() = default;

  virtual std::string address() const = 0;  // "host:port" with the port that is listened on

  // Fails the jobs that run, tells workers and clients, and ends within a second or so. Idempotent.
  virtual void Shutdown() = 0;
};

}  // namespace lockstep::server
