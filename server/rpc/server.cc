#include "server/rpc/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/rpc/address.h"
#include "common/rpc/channel.h"
#include "common/status_macros.h"
#include "server/rpc/driver.h"
#include "server/rpc/job_service.h"
#include "server/rpc/published.h"
#include "server/rpc/worker_service.h"
#include "server/store/committer.h"
#include "server/store/store.h"

namespace lockstep::server {
namespace {

// Why the address cannot be listened on; gRPC does not say.
std::string ListenError(const rpc::Address& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const int code =
      getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
  if (code != 0) return gai_strerror(code);
  std::string error = "it cannot be bound";
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd >= 0) {
    const int reuse = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
    if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0) {
      error = std::strerror(errno);
    }
    close(fd);
  }
  freeaddrinfo(found);
  return error;
}

class GrpcServer : public Server {
 public:
  GrpcServer(const ServerOptions& options, Clock& clock, std::unique_ptr<Store> store,
             std::vector<StoredJob> jobs)
      : published_(jobs),
        driver_(std::make_unique<Core>(options.core, std::move(jobs)), clock, workers_,
                [this](Write write) { committer_.Enqueue(std::move(write)); }),
        committer_(
            std::move(store), options.store_patience,
            [this](const std::vector<Write>& writes) {
              published_.Apply(writes);
              driver_.Post(Persisted{writes.back().ticket});
            },
            options.on_failure),
        jobs_(options.data_dir, driver_, published_) {
    workers_.SetDriver(&driver_);
    driver_.Start();
    // What the restart means for the stored jobs is committed before anybody can ask about them.
    driver_.Read([](const Core&) {});
    committer_.Drain();
  }

  ~GrpcServer() override { Shutdown(); }

  absl::Status Listen(rpc::Address address) {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(rpc::kMaxMessageBytes);
    builder.SetMaxSendMessageSize(rpc::kMaxMessageBytes);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, rpc::kKeepaliveMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, rpc::kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               rpc::kKeepaliveMs / 2);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 2);
    int port = 0;
    builder.AddListeningPort(address.ToString(), grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&jobs_);
    builder.RegisterService(&workers_);
    grpc_ = builder.BuildAndStart();
    if (grpc_ == nullptr || port == 0) {
      return absl::UnavailableError(absl::StrCat("cannot listen on ", address.ToString(), ": ",
                                                 ListenError(address),
                                                 "; choose another --listen"));
    }
    address.port = port;
    address_ = address.ToString();
    return absl::OkStatus();
  }

  std::string address() const override { return address_; }

  void Shutdown() override {
    if (shut_down_) return;
    shut_down_ = true;
    driver_.Post(server::Shutdown());
    driver_.Read([](const Core&) {});
    committer_.Drain();
    published_.Stop();
    if (grpc_ != nullptr) {
      grpc_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
      grpc_->Wait();
    }
    driver_.Stop();
  }

 private:
  // The committer posts to the driver until it is destroyed, so the driver outlives it; the
  // driver's thread feeds the committer and ends in Shutdown.
  Published published_;
  WorkerService workers_;
  Driver driver_;
  Committer committer_;
  JobService jobs_;
  std::unique_ptr<grpc::Server> grpc_;
  std::string address_;
  bool shut_down_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options, Clock& clock) {
  ASSIGN_OR_RETURN(const rpc::Address address, rpc::ParseAddress(options.listen));
  ASSIGN_OR_RETURN(std::unique_ptr<Store> store, Store::Open(options.data_dir));
  ASSIGN_OR_RETURN(std::vector<StoredJob> jobs, store->LoadJobs());
  auto server = std::make_unique<GrpcServer>(options, clock, std::move(store), std::move(jobs));
  RETURN_IF_ERROR(server->Listen(address));
  return server;
}

}  // namespace lockstep::server
