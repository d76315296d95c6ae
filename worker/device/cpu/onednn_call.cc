#include "worker/device/cpu/onednn_call.h"

#include <dlfcn.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep::device {
namespace {

using SetThreads = void (*)(int);

// Of whichever OpenMP library oneDNN brought into the process.
SetThreads FindSetThreads() {
  return reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
}

}  // namespace

absl::Status UseOneThread() {
  thread_local bool done = false;
  if (done) return absl::OkStatus();
  static const SetThreads set_threads = FindSetThreads();
  if (set_threads == nullptr) {
    return absl::FailedPreconditionError(
        "oneDNN runs without an OpenMP library; use the distribution's libdnnl2 (OpenMP build)");
  }
  set_threads(1);
  done = true;
  return absl::OkStatus();
}

CallNumbers::Number CallNumbers::Take() {
  absl::MutexLock lock(&mutex_);
  Number number;
  if (free_.empty()) {
    number.index = next_index_++;
  } else {
    number.index = free_.back();
    free_.pop_back();
  }
  number.serial = next_serial_++;
  return number;
}

void CallNumbers::Return(Number number) {
  absl::MutexLock lock(&mutex_);
  free_.push_back(number.index);
}

Call::Call(std::shared_ptr<CallNumbers> numbers, const dnnl::engine& engine,
           dnnl::primitive primitive, std::vector<Argument> arguments)
    : numbers_(std::move(numbers)),
      number_(numbers_->Take()),
      engine_(engine),
      primitive_(std::move(primitive)),
      arguments_(std::move(arguments)) {}

Call::~Call() { numbers_->Return(number_); }

void Call::Run(CpuStream& stream, std::initializer_list<const void*> pointers) const {
  absl::Status status = UseOneThread();
  if (!status.ok()) return stream.Fail(std::move(status));
  try {
    std::vector<dnnl::memory>& memories = stream.MemoriesOf(*this);
    dnnl_exec_arg_t arguments[kMostArguments];
    const void* const* pointer = pointers.begin();
    const int count = static_cast<int>(arguments_.size());
    for (int i = 0; i < count; ++i) {
      memories[i].set_data_handle(const_cast<void*>(pointer[i]));
      arguments[i] = {arguments_[i].name, memories[i].get()};
    }
    const dnnl_status_t result =
        dnnl_primitive_execute(primitive_.get(), stream.stream_.get(), count, arguments);
    if (result != dnnl_success) {
      stream.Fail(
          absl::InternalError(absl::StrCat("oneDNN primitive failed with status ", result)));
    }
  } catch (const dnnl::error& e) {
    stream.Fail(absl::InternalError(absl::StrCat("oneDNN: ", e.what())));
  }
}

absl::Status CpuStream::Synchronize() { return std::exchange(status_, absl::OkStatus()); }

void CpuStream::Fail(absl::Status status) { status_.Update(std::move(status)); }

std::vector<dnnl::memory>& CpuStream::MemoriesOf(const Call& call) {
  if (handles_.size() <= call.number_.index) handles_.resize(call.number_.index + 1);
  Handles& handles = handles_[call.number_.index];
  if (handles.serial != call.number_.serial) {
    handles.memories.clear();
    for (const Call::Argument& argument : call.arguments_) {
      handles.memories.push_back(dnnl::memory(argument.layout, call.engine_, DNNL_MEMORY_NONE));
    }
    handles.serial = call.number_.serial;
  }
  return handles.memories;
}

}  // namespace lockstep::device
