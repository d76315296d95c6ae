// What the machine can do at best, to judge everything else by: the rate of matrix products
// of oneDNN with every instruction set the processor has, and of memory copies that no cache holds,
// on one core and on all of them at once. One JSON object per line:
//   {"what":"gemm","precision":"fp32","threads":2,"per_second":2.24e+11,"library":"oneDNN 2.6.3"}
// gemm: FLOP/s, a multiply-add as two. memcpy: bytes copied per second (each is read and written).
// The best of many short bursts, since whatever disturbs one can only make it slower.
// usage: machine_bench [threads, default all cores [seconds of each figure, default 0.3]]
#include <dlfcn.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "common/host.h"
#include "oneapi/dnnl/dnnl.hpp"

namespace lockstep {
namespace {

constexpr double kBurst = 0.01;  // seconds; shorter than what others leave of a busy core at a time

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;
using MakeWork = std::function<Work()>;  // what one thread repeats, with memory of its own

void UseOneThread() {
  const auto set_threads =
      reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set_threads != nullptr) set_threads(1);
}

// How often a second `threads` threads, all at work at the same time, finish their work: the sum of
// what each did in its best burst.
double Best(int threads, double seconds, const MakeWork& make) {
  const int bursts = std::max(1, static_cast<int>(seconds / kBurst));
  std::vector<double> best(threads);
  std::barrier together(threads);
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) {
    team.emplace_back([&, i] {
      UseOneThread();
      const Work work = make();
      work();
      for (int burst = 0; burst < bursts; ++burst) {
        together.arrive_and_wait();
        const auto start = Clock::now();
        std::chrono::duration<double> took{0};
        int64_t done = 0;
        while (took.count() < kBurst) {
          work();
          ++done;
          took = Clock::now() - start;
        }
        best[i] = std::max(best[i], static_cast<double>(done) / took.count());
      }
    });
  }
  for (std::thread& thread : team) thread.join();
  return std::accumulate(best.begin(), best.end(), 0.0);
}

// Square matrices that the second-level cache holds.
constexpr int64_t kOrder = 256;

MakeWork Gemm(const dnnl::engine& engine, dnnl::memory::data_type type) {
  using dnnl::memory;
  const memory::desc desc({kOrder, kOrder}, type, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(desc, desc, desc), engine);
  const dnnl::matmul product(description);
  return [=] {
    memory a(desc, engine), b(desc, engine), c(desc, engine);
    // 0x3c3c is 0.01 in bf16, and 0x3c3c3c3c in fp32.
    for (const memory& m : {a, b, c}) std::memset(m.get_data_handle(), 0x3c, desc.get_size());
    const dnnl::stream stream(engine);
    return [=]() mutable {
      product.execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
    };
  };
}

constexpr size_t kCopied = size_t{64} << 20;

MakeWork Copy() {
  return [] {
    auto from = std::make_shared<std::vector<char>>(kCopied, 1);
    auto to = std::make_shared<std::vector<char>>(kCopied, 2);
    return [from, to] { std::memcpy(to->data(), from->data(), kCopied); };
  };
}

void Measure(int cores, double seconds) {
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const dnnl_version_t* version = dnnl::version();
  const std::string library = "oneDNN " + std::to_string(version->major) + "." +
                              std::to_string(version->minor) + "." + std::to_string(version->patch);
  std::vector<int> counts = {1};
  if (cores > 1) counts.push_back(cores);
  for (const int threads : counts) {
    for (const bool bf16 : {false, true}) {
      const char* precision = bf16 ? "bf16" : "fp32";
      try {
        const MakeWork gemm =
            Gemm(engine, bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32);
        std::printf(
            "{\"what\":\"gemm\",\"precision\":\"%s\",\"threads\":%d,\"per_second\":%.4e,"
            "\"library\":\"%s\"}\n",
            precision, threads, Best(threads, seconds, gemm) * 2 * kOrder * kOrder * kOrder,
            library.c_str());
      } catch (const dnnl::error& e) {  // the processor may lack bf16
        std::fprintf(stderr, "machine_bench: no %s: %s\n", precision, e.what());
      }
    }
    std::printf("{\"what\":\"memcpy\",\"threads\":%d,\"per_second\":%.4e}\n", threads,
                Best(threads, seconds, Copy()) * kCopied);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const int cores = argc > 1 ? std::atoi(argv[1]) : lockstep::AvailableCores();
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.3;
  if (cores < 1 || seconds <= 0) {
    std::fprintf(stderr, "usage: machine_bench [threads [seconds of each figure]]\n");
    return 2;
  }
  lockstep::Measure(cores, seconds);
  return 0;
}
