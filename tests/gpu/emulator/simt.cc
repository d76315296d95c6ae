#include "tests/gpu/emulator/simt.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "tests/gpu/emulator/fiber.h"
#include "tests/gpu/emulator/report.h"
#include "tests/gpu/emulator/runtime.h"

#if defined(LOCKSTEP_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace lockstep::device::cuda {

// What SharedMemory() of launch.h declares; bytes beyond a block's own are guarded.
extern unsigned char shared_memory[];
alignas(1024) unsigned char shared_memory[lockstep::emulator::kMostSharedBytes + 1024];

}  // namespace lockstep::device::cuda

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace lockstep::emulator {
namespace {

using device::cuda::shared_memory;

constexpr unsigned kWarp = 32, kMostWarps = kMostThreads / kWarp;

enum class State : uint8_t { kUnstarted, kRunnable, kAtBarrier, kInExchange, kExited };

struct Thread {
  Fiber* fiber = nullptr;  // where it runs, once started
  State state = State::kUnstarted;
  Site site = {};      // where it waits
  uint64_t value = 0;  // that it brings to an exchange, then what it gets
  int source = 0, width = 0;
  bool waited = false;  // for the kernel before
  bool shows = false;   // to products what it has written, since the last barrier
  bool shown = false;   // before that barrier
  void (*perform)(void* const*) = nullptr;  // together with its warp
};

// That a thread has begun.
struct Copy {
  void* to;          // null: the end of a group
  const void* from;  // null: zeros
  size_t bytes;
};

// Lanes that wait in the same exchange.
struct Group {
  Exchange exchange;
  unsigned mask, arrived;
  Site site;
};

struct Warp {
  unsigned exist = 0;     // lanes
  unsigned exited = 0;    // lanes
  unsigned runnable = 0;  // positions in the order of lanes, unstarted ones included
  int groups = 0;
  Group group[kWarp];
};

bool SamePlace(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string ToString(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line) +
         " (" + site.function + ")";
}
std::string ToString(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string ToString(dim3 v) { return ToString(uint3{v.x, v.y, v.z}); }
std::string Hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

const char* NameOf(Exchange exchange) {
  switch (exchange) {
    case Exchange::kSyncWarp:
      return "__syncwarp";
    case Exchange::kShuffle:
      return "__shfl_sync";
    case Exchange::kShuffleUp:
      return "__shfl_up_sync";
    case Exchange::kShuffleDown:
      return "__shfl_down_sync";
    case Exchange::kShuffleXor:
      return "__shfl_xor_sync";
    case Exchange::kBallot:
      return "__ballot_sync";
    case Exchange::kAny:
      return "__any_sync";
    case Exchange::kAll:
      return "__all_sync";
    case Exchange::kTogether:
      return "an instruction of the whole warp";
  }
  return "?";
}

// SplitMix64 (Steele et al. 2014).
uint64_t NextRandom(uint64_t* state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
template <class T>
void Shuffle(T* values, uint64_t count, uint64_t* state) {
  for (uint64_t i = count; i > 1; --i) std::swap(values[i - 1], values[NextRandom(state) % i]);
}

class Engine {
 public:
  void Run(const KernelLaunch& launch, const Order& order, uint64_t number);

  void Barrier(const Site& site);
  void GridDependency(const Site& site);
  uint64_t Exchanged(Exchange exchange, unsigned mask, uint64_t value, int source, int width,
                     const Site& site);
  void Together(void* record, void (*perform)(void* const*), const Site& site);
  void CopyLater(const Copy& copy);
  void FinishCopies() { FinishCopies(copies_[current_].size()); }
  void FinishGroups(int but);
  void ShowToProducts() { threads_[current_].shows = true; }
  void MultiplyLater(std::function<void()> product);
  void FinishProducts(int but);

 private:
  static void FiberMain();

  void PrepareShared();
  void CheckShared();
  void RunBlock();
  // The thread to run now: the first runnable position of this warp, else of the next that has one.
  // -1: none.
  int Next();
  void FinishCopies(size_t count);
  static void Perform(const Copy& copy);
  // Lets others run until the calling thread is runnable.
  void Wait();
  void Exit(int thread);
  Fiber* IdleFiber();
  void Become(int thread) {
    current_ = thread;
    threadIdx = index_[thread];
  }
  void MakeRunnable(int thread) {
    threads_[thread].state = State::kRunnable;
    warps_[thread / kWarp].runnable |= 1u << position_of_lane_[thread % kWarp];
  }
  // Takes the calling thread away from those that may run.
  void Block(State state, const Site& site) {
    threads_[current_].state = state;
    threads_[current_].site = site;
    warps_[current_ / kWarp].runnable &= ~(1u << position_of_lane_[current_ % kWarp]);
  }
  void Complete(int first, const Group& group);  // `first`: the warp's first thread
  void CheckExited(const Warp& warp, const Group& group);

  [[noreturn]] void Report(const std::string& message, bool with_threads);
  std::string Threads();

  const KernelLaunch* launch_ = nullptr;
  Order order_;
  unsigned count_ = 0, warp_count_ = 0;  // threads and warps of a block
  uint3 index_[kMostThreads];
  Thread threads_[kMostThreads];
  Warp warps_[kMostWarps];
  std::vector<Copy> copies_[kMostThreads];
  std::vector<std::function<void()>> products_[kMostThreads];  // none: the end of a group
  unsigned warp_order_[kMostWarps], lane_order_[kWarp], position_of_lane_[kWarp];
  unsigned warp_at_ = 0;  // in the order of warps
  unsigned at_barrier_ = 0, exited_ = 0;
  bool running_ = false;
  bool shut_ = false;  // device memory, until the block has waited for the kernel before
  int current_ = -1;
  Fiber* main_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

Engine& TheEngine() {
  static Engine* const engine = new Engine;
  return *engine;
}

void Engine::Report(const std::string& message, bool with_threads) {
  std::string text = Describe(*launch_) + ", block " + ToString(blockIdx);
  if (current_ >= 0) text += ", thread " + ToString(index_[current_]);
  text += ": " + message;
  if (with_threads) text += Threads();
  Fatal(text);
}

// What each place holds.
std::string Engine::Threads() {
  std::map<std::string, std::pair<int, int>> places;  // how many threads, the first
  for (unsigned t = 0; t < count_; ++t) {
    std::string place;
    switch (threads_[t].state) {
      case State::kUnstarted:
      case State::kRunnable:
        place = "able to run";
        break;
      case State::kAtBarrier:
        place = "waiting in __syncthreads at " + ToString(threads_[t].site);
        break;
      case State::kInExchange: {
        place = "waiting in an exchange of a warp at " + ToString(threads_[t].site);
        const Warp& warp = warps_[t / kWarp];
        for (int g = 0; g < warp.groups; ++g) {
          if ((warp.group[g].arrived >> (t % kWarp) & 1) == 0) continue;
          place = std::string("waiting in ") + NameOf(warp.group[g].exchange) + " of mask " +
                  Hex(warp.group[g].mask) + " at " + ToString(threads_[t].site);
        }
        break;
      }
      case State::kExited:
        place = "returned";
        break;
    }
    auto [it, added] = places.try_emplace(place, 0, t);
    ++it->second.first;
  }
  std::string text;
  for (const auto& [place, threads] : places) {
    text += "\n  " + std::to_string(threads.first) +
            (threads.first == 1 ? " thread " : " threads ") + place + ", the first is " +
            ToString(index_[threads.second]);
  }
  return text;
}

void Engine::PrepareShared() {
  const size_t bytes = launch_->shared_bytes;
#if defined(LOCKSTEP_EMULATOR_ASAN)
  static size_t before = kMostSharedBytes + 1024;
  if (bytes == before) return;
  before = bytes;
  __asan_unpoison_memory_region(shared_memory, bytes);
  __asan_poison_memory_region(shared_memory + bytes, kMostSharedBytes + 1024 - bytes);
#else
  FillWithGarbage(shared_memory + bytes, 1024);
#endif
}

void Engine::CheckShared() {
#if !defined(LOCKSTEP_EMULATOR_ASAN)
  if (!IsGarbage(shared_memory + launch_->shared_bytes, 1024)) {
    current_ = -1;
    Report("wrote behind the block's shared memory", false);
  }
#endif
}

void Engine::Run(const KernelLaunch& launch, const Order& order, uint64_t number) {
  if (running_) Fatal("a kernel began inside of a kernel");
  running_ = true;
  launch_ = &launch;
  order_ = order;
  gridDim = launch.grid;
  blockDim = launch.block;
  count_ = launch.block.x * launch.block.y * launch.block.z;
  warp_count_ = (count_ + kWarp - 1) / kWarp;
  unsigned t = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x) index_[t++] = {x, y, z};
    }
  }
  const bool reversed = order.kind == Order::Kind::kReversed;
  for (unsigned w = 0; w < warp_count_; ++w) warp_order_[w] = reversed ? warp_count_ - 1 - w : w;
  for (unsigned p = 0; p < kWarp; ++p) lane_order_[p] = reversed ? kWarp - 1 - p : p;
  for (unsigned p = 0; p < kWarp; ++p) position_of_lane_[lane_order_[p]] = p;
  PrepareShared();

  Fiber main;
  main_ = &main;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  uint64_t random = order.seed ^ (number * 0xD1342543DE82EF95ull);
  std::vector<uint32_t> block_order;
  if (order.kind == Order::Kind::kPermuted) {
    block_order.resize(blocks);
    std::iota(block_order.begin(), block_order.end(), 0u);
    Shuffle(block_order.data(), blocks, &random);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t block = reversed ? blocks - 1 - i : i;
    if (order.kind == Order::Kind::kPermuted) {
      block = block_order[i];
      Shuffle(warp_order_, warp_count_, &random);
      Shuffle(lane_order_, kWarp, &random);
      for (unsigned p = 0; p < kWarp; ++p) position_of_lane_[lane_order_[p]] = p;
    }
    blockIdx.x = static_cast<unsigned>(block % gridDim.x);
    blockIdx.y = static_cast<unsigned>(block / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(block / gridDim.x / gridDim.y);
    if (launch.shared_bytes > 0) FillWithGarbage(shared_memory, launch.shared_bytes);
    shut_ = launch.early && i == 0;
    if (shut_) Running::Shut();
    RunBlock();
    CheckShared();
  }
  main_ = nullptr;
  current_ = -1;
  running_ = false;
}

void Engine::RunBlock() {
  for (unsigned w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    const unsigned lanes = std::min(kWarp, count_ - w * kWarp);
    warp.exist = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warp.exited = 0;
    warp.groups = 0;
    warp.runnable = 0;
    if (lanes == kWarp) {
      warp.runnable = ~0u;
    } else {
      for (unsigned l = 0; l < lanes; ++l) warp.runnable |= 1u << position_of_lane_[l];
    }
  }
  for (unsigned t = 0; t < count_; ++t) {
    threads_[t].fiber = nullptr;
    threads_[t].state = State::kUnstarted;
    threads_[t].waited = threads_[t].shows = threads_[t].shown = false;
  }
  warp_at_ = 0;
  at_barrier_ = exited_ = 0;
  Fiber* fiber = IdleFiber();
  fiber->thread = Next();
  Fiber::Switch(*main_, *fiber);
}

Fiber* Engine::IdleFiber() {
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(&FiberMain));
    return fibers_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

int Engine::Next() {
  for (unsigned i = 0; i < warp_count_; ++i) {
    const unsigned w = warp_order_[warp_at_];
    const unsigned runnable = warps_[w].runnable;
    if (runnable != 0) {
      return static_cast<int>(w * kWarp + lane_order_[std::countr_zero(runnable)]);
    }
    if (++warp_at_ == warp_count_) warp_at_ = 0;
  }
  return -1;
}

void Engine::FiberMain() {
  Engine& engine = TheEngine();
  Fiber* self = engine.fibers_.back().get();  // made a moment ago
  for (;;) {
    const int thread = self->thread;
    engine.threads_[thread].fiber = self;
    engine.threads_[thread].state = State::kRunnable;
    engine.Become(thread);
    engine.launch_->body();
    engine.Exit(thread);
    const int next = engine.Next();
    if (next >= 0 && engine.threads_[next].fiber == nullptr) {
      self->thread = next;
      continue;
    }
    engine.idle_.push_back(self);
    if (next >= 0) {
      Fiber::Switch(*self, *engine.threads_[next].fiber);
    } else if (engine.exited_ == engine.count_) {
      Fiber::Switch(*self, *engine.main_);
    } else {
      engine.Report("deadlock", true);
    }
  }
}

void Engine::Exit(int thread) {
  for (const Copy& copy : copies_[thread]) {
    if (copy.to != nullptr) Report("returned without waiting for its copies", false);
  }
  copies_[thread].clear();
  for (const auto& product : products_[thread]) {
    if (product) Report("returned without waiting for its products", false);
  }
  products_[thread].clear();
  if (launch_->early && !threads_[thread].waited) {
    Report("returned without waiting for the kernel before", false);
  }
  Warp& warp = warps_[thread / kWarp];
  threads_[thread].state = State::kExited;
  warp.runnable &= ~(1u << position_of_lane_[thread % kWarp]);
  warp.exited |= 1u << (thread % kWarp);
  ++exited_;
  if (at_barrier_ > 0) {
    Report("this thread has returned while others wait in __syncthreads", true);
  }
  for (int g = 0; g < warp.groups; ++g) CheckExited(warp, warp.group[g]);
}

void Engine::CheckExited(const Warp& warp, const Group& group) {
  if ((group.mask & warp.exited) == 0) return;
  Report(std::string(NameOf(group.exchange)) + " at " + ToString(group.site) +
             " waits for lanes that have returned (" + Hex(group.mask & warp.exited) + ")",
         true);
}

void Engine::Wait() {
  const int self = current_;
  const int next = Next();
  if (next < 0) Report("deadlock", true);
  if (next == self) return;
  Fiber* to = threads_[next].fiber;
  if (to == nullptr) {
    to = IdleFiber();
    to->thread = next;
  }
  Fiber::Switch(*threads_[self].fiber, *to);
  Become(self);
}

void Engine::Barrier(const Site& site) {
  if (exited_ > 0) {
    Report("__syncthreads at " + ToString(site) + " after threads have returned", true);
  }
  Block(State::kAtBarrier, site);
  if (++at_barrier_ == count_) {
    for (unsigned t = 0; t < count_; ++t) {
      if (!SamePlace(threads_[t].site, site)) {
        Report("the block's threads are in different calls of __syncthreads", true);
      }
    }
    at_barrier_ = 0;
    for (unsigned t = 0; t < count_; ++t) {
      threads_[t].shown = std::exchange(threads_[t].shows, false);
      MakeRunnable(static_cast<int>(t));
    }
    warp_at_ = 0;
  }
  Wait();
}

void Engine::GridDependency(const Site& site) {
  threads_[current_].waited = true;
  if (!shut_) return;
  Barrier(site);
  if (shut_) Running::Reopen();  // the first that goes on
  shut_ = false;
}

uint64_t Engine::Exchanged(Exchange exchange, unsigned mask, uint64_t value, int source, int width,
                           const Site& site) {
  const unsigned lane = static_cast<unsigned>(current_) % kWarp;
  Warp& warp = warps_[current_ / kWarp];
  if ((mask >> lane & 1) == 0) {
    Report(std::string(NameOf(exchange)) + " at " + ToString(site) + ": lane " +
               std::to_string(lane) + " is not in its mask " + Hex(mask),
           false);
  }
  if (width < 1 || width > static_cast<int>(kWarp) || (width & (width - 1)) != 0) {
    Report(std::string(NameOf(exchange)) + " at " + ToString(site) + ": a width of " +
               std::to_string(width),
           false);
  }
  mask &= warp.exist;
  Thread& self = threads_[current_];
  self.value = value;
  self.source = source;
  self.width = width;
  Block(State::kInExchange, site);
  int g = 0;
  while (g < warp.groups &&
         !(warp.group[g].exchange == exchange && warp.group[g].mask == mask &&
           (warp.group[g].arrived >> lane & 1) == 0 && SamePlace(warp.group[g].site, site))) {
    ++g;
  }
  if (g == warp.groups) warp.group[warp.groups++] = {exchange, mask, 0, site};
  Group& group = warp.group[g];
  group.arrived |= 1u << lane;
  CheckExited(warp, group);
  if (group.arrived == group.mask) {
    const Group complete = group;
    group = warp.group[--warp.groups];
    Complete(current_ - static_cast<int>(lane), complete);
  }
  Wait();
  return self.value;
}

void Engine::Together(void* record, void (*perform)(void* const*), const Site& site) {
  if (warps_[current_ / kWarp].exist != ~0u) {
    Report("an instruction of the whole warp at " + ToString(site) + ": this warp has fewer lanes",
           false);
  }
  threads_[current_].perform = perform;
  Exchanged(Exchange::kTogether, ~0u, reinterpret_cast<uintptr_t>(record), 0, kWarp, site);
}

// As late as it may be; in the reversed order at once, which it may be too.
void Engine::CopyLater(const Copy& copy) {
  copies_[current_].push_back(copy);
  if (order_.kind == Order::Kind::kReversed) Perform(copy);
}

void Engine::Perform(const Copy& copy) {
  if (copy.to == nullptr) return;
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

// The first `count`, ends of groups included.
void Engine::FinishCopies(size_t count) {
  std::vector<Copy>& copies = copies_[current_];
  for (size_t i = 0; i < count; ++i) {
    if (order_.kind != Order::Kind::kReversed) Perform(copies[i]);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
}

void Engine::FinishGroups(int but) {
  const std::vector<Copy>& copies = copies_[current_];
  size_t count = copies.size();
  for (int ends = 0; count > 0; --count) {
    if (copies[count - 1].to == nullptr && ends++ == but) break;
  }
  FinishCopies(count);
}

void Engine::MultiplyLater(std::function<void()> product) {
  if (product && !threads_[current_].shown) {
    Report("multiplies without having shown what is in shared memory before the barrier", false);
  }
  products_[current_].push_back(std::move(product));
}

void Engine::FinishProducts(int but) {
  auto& products = products_[current_];
  size_t count = products.size();
  for (int ends = 0; count > 0; --count) {
    if (!products[count - 1] && ends++ == but) break;
  }
  for (size_t i = 0; i < count; ++i) {
    if (products[i]) products[i]();
  }
  products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(count));
}

void Engine::Complete(int first, const Group& group) {
  if (group.exchange == Exchange::kTogether) {
    void* records[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) {
      records[l] = reinterpret_cast<void*>(threads_[first + l].value);
      MakeRunnable(first + static_cast<int>(l));
    }
    threads_[first].perform(records);
    return;
  }
  uint64_t values[kWarp], results[kWarp];
  unsigned votes = 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((group.mask >> l & 1) == 0) continue;
    values[l] = threads_[first + l].value;
    if (values[l] != 0) votes |= 1u << l;
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((group.mask >> l & 1) == 0) continue;
    const Thread& thread = threads_[first + l];
    const int lane = static_cast<int>(l), width = thread.width;
    const int segment = lane & ~(width - 1);
    int from = lane;
    switch (group.exchange) {
      case Exchange::kSyncWarp:
      case Exchange::kTogether:
        break;
      case Exchange::kBallot:
        results[l] = votes;
        break;
      case Exchange::kAny:
        results[l] = votes != 0;
        break;
      case Exchange::kAll:
        results[l] = votes == group.mask;
        break;
      case Exchange::kShuffle:
        from = segment + (thread.source & (width - 1));
        break;
      case Exchange::kShuffleUp:
        from = thread.source > lane - segment ? lane : lane - thread.source;
        break;
      case Exchange::kShuffleDown:
        from = thread.source >= segment + width - lane ? lane : lane + thread.source;
        break;
      case Exchange::kShuffleXor:
        from = lane ^ thread.source;
        if (from < 0 || from >= segment + width) from = lane;
        break;
    }
    if (group.exchange == Exchange::kBallot || group.exchange == Exchange::kAny ||
        group.exchange == Exchange::kAll) {
      continue;
    }
    if ((group.mask >> from & 1) == 0) {
      Report(std::string(NameOf(group.exchange)) + " at " + ToString(group.site) + ": lane " +
                 std::to_string(lane) + " reads lane " + std::to_string(from) +
                 ", which takes no part",
             true);
    }
    results[l] = values[from];
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((group.mask >> l & 1) == 0) continue;
    threads_[first + l].value = results[l];
    MakeRunnable(first + static_cast<int>(l));
  }
}

}  // namespace

void RunKernel(const KernelLaunch& launch, const Order& order, uint64_t number) {
  TheEngine().Run(launch, order, number);
}

std::string Describe(const KernelLaunch& launch) {
  std::string name = FunctionName(launch.function);
  const size_t parameters = name.rfind('(');
  if (parameters != std::string::npos && parameters > 0 && name.back() == ')') {
    name.resize(parameters);
  }
  return name + "<<<" + ToString(launch.grid) + ", " + ToString(launch.block) + ", " +
         std::to_string(launch.shared_bytes) + ">>>";
}

void FillWithGarbage(void* memory, size_t bytes) {
  auto* to = static_cast<unsigned char*>(memory);
  constexpr unsigned char kLow = kGarbage & 0xFF, kHigh = kGarbage >> 8;
  if (bytes > 0 && reinterpret_cast<uintptr_t>(to) % 2 != 0) {
    *to++ = kHigh;
    --bytes;
  }
  constexpr uint64_t kPattern = uint64_t{kGarbage} * 0x0001000100010001ull;
  for (; bytes >= 8; bytes -= 8, to += 8) std::memcpy(to, &kPattern, 8);
  for (size_t i = 0; i < bytes; ++i) to[i] = i % 2 == 0 ? kLow : kHigh;
}

bool IsGarbage(const void* memory, size_t bytes) {
  const auto* from = static_cast<const unsigned char*>(memory);
  constexpr unsigned char kLow = kGarbage & 0xFF, kHigh = kGarbage >> 8;
  for (size_t i = 0; i < bytes; ++i) {
    if (from[i] != (reinterpret_cast<uintptr_t>(from + i) % 2 == 0 ? kLow : kHigh)) return false;
  }
  return true;
}

void WarpTogether(void* record, void (*perform)(void* const*), Site site) {
  TheEngine().Together(record, perform, site);
}
void CopyLater(void* to, const void* from, size_t bytes) {
  TheEngine().CopyLater({to, from, bytes});
}
void CommitCopies() { TheEngine().CopyLater({nullptr, nullptr, 0}); }
void FinishCopies() { TheEngine().FinishCopies(); }
void FinishGroups(int but) { TheEngine().FinishGroups(but); }

void ShowToProducts() { TheEngine().ShowToProducts(); }
void MultiplyLater(std::function<void()> product) { TheEngine().MultiplyLater(std::move(product)); }
void CommitProducts() { TheEngine().MultiplyLater(nullptr); }
void FinishProducts(int but) { TheEngine().FinishProducts(but); }

void GridDependency(Site site) { TheEngine().GridDependency(site); }

void BlockBarrier(Site site) { TheEngine().Barrier(site); }

uint64_t WarpExchange(Exchange exchange, unsigned mask, uint64_t value, int source, int width,
                      Site site) {
  return TheEngine().Exchanged(exchange, mask, value, source, width, site);
}

}  // namespace lockstep::emulator
