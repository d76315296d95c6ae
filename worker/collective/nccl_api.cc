#include "worker/collective/nccl_api.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"

namespace lockstep::collective {
namespace {

absl::StatusOr<const NcclApi*> Load() {
  // worker/device/module has loaded it from where it was found, for all that come after.
  void* const library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    return absl::NotFoundError(
        "NCCL (libnccl.so.2) was not found, which jobs on several GPUs exchange gradients with; "
        "install it, or name its folder in LOCKSTEP_CUDA_LIBS (lockstep doctor shows where it was "
        "looked for)");
  }
  auto* api = new NcclApi;
  std::string missing;
  const auto find = [&](const char* name, auto* function) {
    void* const symbol = dlsym(library, name);
    if (symbol == nullptr) absl::StrAppend(&missing, " ", name);
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(symbol);
  };
  find("ncclGetVersion", &api->GetVersion);
  find("ncclGetUniqueId", &api->GetUniqueId);
  find("ncclCommInitRankConfig", &api->CommInitRankConfig);
  find("ncclCommGetAsyncError", &api->CommGetAsyncError);
  find("ncclCommFinalize", &api->CommFinalize);
  find("ncclCommDestroy", &api->CommDestroy);
  find("ncclCommAbort", &api->CommAbort);
  find("ncclGetErrorString", &api->GetErrorString);
  find("ncclGetLastError", &api->GetLastError);
  find("ncclGroupStart", &api->GroupStart);
  find("ncclGroupEnd", &api->GroupEnd);
  find("ncclSend", &api->Send);
  find("ncclRecv", &api->Recv);
  find("ncclAllGather", &api->AllGather);
  find("ncclAllReduce", &api->AllReduce);
  find("ncclBroadcast", &api->Broadcast);
  find("ncclMemAlloc", &api->MemAlloc);
  find("ncclMemFree", &api->MemFree);
  find("ncclCommRegister", &api->CommRegister);
  find("ncclCommDeregister", &api->CommDeregister);
  if (missing.empty()) return api;
  int version = 0;
  if (api->GetVersion != nullptr) api->GetVersion(&version);
  return absl::FailedPreconditionError(absl::StrCat("the NCCL found here (version ", version,
                                                    ") is too old: it has no", missing,
                                                    "; needed is 2.19 or later"));
}

}  // namespace

absl::StatusOr<const NcclApi*> FindNccl() {
  static const auto* found = new absl::StatusOr<const NcclApi*>(Load());
  return *found;
}

}  // namespace lockstep::collective
