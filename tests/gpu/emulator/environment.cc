// What the environment tells the emulator. Whatever it does not understand ends the process: a
// fault that is misspelt must not look like one that was survived.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "tests/gpu/emulator/emulator.h"
#include "tests/gpu/emulator/report.h"

namespace lockstep::emulator {
namespace {

constexpr char kGpus[] = "LOCKSTEP_EMULATED_GPUS";
constexpr char kFaults[] = "LOCKSTEP_EMULATOR_FAULTS";
constexpr char kOrder[] = "LOCKSTEP_EMULATOR_ORDER";
constexpr char kProtect[] = "LOCKSTEP_EMULATOR_PROTECT";
constexpr char kNcclVersion[] = "LOCKSTEP_EMULATED_NCCL_VERSION";  // emulated_nccl.cc
constexpr char kNcclLog[] = "LOCKSTEP_EMULATED_NCCL_LOG";          // as well
constexpr char kKnown[] =
    "driver=13000, memory=BYTES, architecture=9.0, multiprocessors=132, allocation=NTH (from 1, "
    "that fails), "
    "lost-at=LAUNCH (from 0), gpu=ORDINAL (that is "
    "lost), error=cudaErrorIllegalAddress (that it is lost with), sums=in-order, reversed or "
    "only-in-order, nccl=dies-connecting, hangs-connecting, hangs-exchanging or "
    "hangs-aborting";

[[noreturn]] void Refuse(const std::string& name, const std::string& value, const char* accepted) {
  Fatal(name + " is " + value + "; accepted: " + accepted);
}

int64_t Number(const std::string& name, const std::string& text, int64_t least) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || at != end || value < least) {
    Refuse(name, text, least > 0 ? "a number from 1 on" : "a number from 0 on");
  }
  return value;
}

std::string Variable(const char* name) {
  const char* const text = std::getenv(name);
  return text == nullptr ? "" : text;
}

cudaError_t ErrorNamed(const std::string& name) {
  for (int code = 1; code < 1000; ++code) {
    const auto error = static_cast<cudaError_t>(code);
    if (name == cudaGetErrorName(error)) return error;
  }
  Refuse("error in " + std::string(kFaults), name, "a name such as cudaErrorECCUncorrectable");
}

void TakeFault(const std::string& key, const std::string& value, Options* options) {
  const std::string name = key + " in " + kFaults;
  if (key == "driver") {
    options->driver_version = static_cast<int>(Number(name, value, 0));
  } else if (key == "memory") {
    options->memory = static_cast<size_t>(Number(name, value, 1));
  } else if (key == "architecture") {
    int length = 0;
    if (std::sscanf(value.c_str(), "%d.%d%n", &options->major, &options->minor, &length) != 2 ||
        static_cast<size_t>(length) != value.size()) {
      Refuse(name, value, "a compute capability such as 9.0");
    }
  } else if (key == "multiprocessors") {
    options->multiprocessors = static_cast<int>(Number(name, value, 1));
  } else if (key == "allocation") {
    options->fail_allocation = static_cast<int>(Number(name, value, 1));
  } else if (key == "lost-at") {
    options->lost_after = Number(name, value, 0);
  } else if (key == "gpu") {
    options->lost_gpu = static_cast<int>(Number(name, value, 0));
  } else if (key == "error") {
    options->lost_with = ErrorNamed(value);
  } else if (key == "sums") {
    if (value == "in-order") {
      options->sums = Sums::kInOrder;
    } else if (value == "reversed") {
      options->sums = Sums::kReversed;
    } else if (value == "only-in-order") {
      options->sums = Sums::kOnlyInOrder;
    } else {
      Refuse(name, value, "in-order, reversed, only-in-order");
    }
  } else if (key == "nccl") {
    if (value == "dies-connecting") {
      options->nccl = NcclFault::kDiesConnecting;
    } else if (value == "hangs-connecting") {
      options->nccl = NcclFault::kHangsConnecting;
    } else if (value == "hangs-exchanging") {
      options->nccl = NcclFault::kHangsExchanging;
    } else if (value == "hangs-aborting") {
      options->nccl = NcclFault::kHangsAborting;
    } else {
      Refuse(name, value, "dies-connecting, hangs-connecting, hangs-exchanging, hangs-aborting");
    }
  } else {
    Refuse(kFaults, key + "=" + value, kKnown);
  }
}

void TakeFaults(const std::string& text, Options* options) {
  constexpr char kBetween[] = ", ";
  for (size_t begin = text.find_first_not_of(kBetween); begin != std::string::npos;) {
    const size_t end = std::min(text.find_first_of(kBetween, begin), text.size());
    const std::string fault = text.substr(begin, end - begin);
    const size_t equals = fault.find('=');
    if (equals == std::string::npos) Refuse(kFaults, fault, kKnown);
    TakeFault(fault.substr(0, equals), fault.substr(equals + 1), options);
    begin = text.find_first_not_of(kBetween, end);
  }
}

void CheckNames() {
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable = *entry;
    if (!variable.starts_with("LOCKSTEP_EMULAT")) continue;
    const std::string name(variable.substr(0, variable.find('=')));
    std::string accepted;
    bool known = false;
    for (const char* one : {kGpus, kFaults, kOrder, kProtect, kNcclVersion, kNcclLog}) {
      known |= name == one;
      accepted += (accepted.empty() ? "" : ", ") + std::string(one);
    }
    if (!known) Fatal("the emulator knows no variable " + name + "; accepted: " + accepted);
  }
}

}  // namespace

Options OptionsOfEnvironment() {
  CheckNames();
  Options options;
  if (const std::string text = Variable(kGpus); !text.empty()) {
    options.devices = static_cast<int>(Number(kGpus, text, 0));
  }
  TakeFaults(Variable(kFaults), &options);
  if (const std::string text = Variable(kProtect); !text.empty()) {
    options.protect = Number(kProtect, text, 0) != 0;
  }
  const std::string order = Variable(kOrder);
  if (order == "reversed") {
    options.order.kind = Order::Kind::kReversed;
  } else if (!order.empty() && order != "natural") {
    options.order.kind = Order::Kind::kPermuted;
    options.order.seed = static_cast<uint64_t>(Number(kOrder, order, 0));
  }
  return options;
}

}  // namespace lockstep::emulator
