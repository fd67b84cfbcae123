// Runs CUDA kernels on the CPU: the dialect of csrc/cuda, for a host compiler.
//
// A block's threads are fibers. The blocks of a launch run one after another in an order that the seed gives; between
// barriers its fibers run in turns, or warp after warp, in an order drawn anew for every turn. A barrier or a warp's
// shuffle waits for the threads that it needs; when none can go on, the launch fails and says who waits where. cp.async
// copies nothing before its wait. Everything is one OS thread, so the host's sanitizers see every access of a kernel.
//
// Not modelled: weak memory, threads in lockstep, uninitialised static shared memory.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__ &

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Never fused into one operation; the flags of the emulator's build fuse nothing.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// What the tests set, and what they read.
inline uint64_t seed = 0;                  // 0: blocks and threads in order
inline int most_blocks = 1 << 20;          // of launches whose grid is free
inline std::vector<std::string> launched;  // kernels

enum class State { Ready, AtBarrier, AtShuffle, Finished };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  void* context[5];  // for __builtin_setjmp
  bool started = false;
  State state = State::Finished;
  std::vector<std::vector<Copy>> copies;  // by commit; the last is open
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Warp {
  uint32_t arrived = 0, mask = 0;
  int turn = 0;
  uint64_t values[2][32];
};

// One launch at a time.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  void* scheduler[5];
  int current = 0, threads = 0, at_barrier = 0;
  bool any = false, any_result = false;  // of __syncthreads_or
  std::string kernel, error;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::vector<unsigned char> shared;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
};
inline Machine machine;

inline Fiber& self() { return *machine.fibers[machine.current]; }

// Between a fiber and the scheduler. AddressSanitizer wants to know which stack it is on; in these functions themselves
// it would clear its notes on the whole stack before each jump.
#define SWITCHES [[gnu::noinline, gnu::no_sanitize_address]]
SWITCHES inline void to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  Fiber& fiber = self();
  __sanitizer_start_switch_fiber(&fiber.fake_stack, machine.bottom, machine.size);
#endif
  if (__builtin_setjmp(self().context) == 0) __builtin_longjmp(machine.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self().fake_stack, &machine.bottom, &machine.size);
#endif
}

SWITCHES inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.bottom, &machine.size);
#endif
  for (;;) {
    machine.body(machine.arguments);
    self().state = State::Finished;
    to_scheduler();
  }
}

SWITCHES inline void enter(Fiber& fiber) {
  if (fiber.started) __builtin_longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

SWITCHES inline void resume(int thread) {
  machine.current = thread;
  threadIdx = dim3(thread, 0, 0);
  Fiber& fiber = *machine.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), Fiber::kStack);
#endif
  if (__builtin_setjmp(machine.scheduler) == 0) enter(fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

inline void fail(const std::string& what) {
  if (machine.error.empty())
    machine.error = machine.kernel + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                    "), thread " + std::to_string(machine.current) + ": " + what;
  to_scheduler();
}

inline bool barrier(bool predicate = false) {
  machine.any = machine.any || predicate;
  if (++machine.at_barrier < machine.threads) {
    self().state = State::AtBarrier;
    to_scheduler();
    return machine.any_result;
  }
  machine.at_barrier = 0;
  machine.any_result = std::exchange(machine.any, false);
  for (int thread = 0; thread < machine.threads; ++thread)
    if (machine.fibers[thread]->state == State::AtBarrier) machine.fibers[thread]->state = State::Ready;
  return machine.any_result;
}

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  const int lane = machine.current % 32;
  Warp& warp = machine.warps[machine.current / 32];
  if ((mask >> lane & 1) == 0) fail("shuffles with a mask that leaves it out");
  if ((mask >> source & 1) == 0) fail("shuffles from a lane that its mask leaves out");
  if (warp.arrived != 0 && warp.mask != mask) fail("shuffles with another mask than its warp");
  const int turn = warp.turn;
  warp.mask = mask;
  warp.arrived |= 1u << lane;
  std::memcpy(&warp.values[turn][lane], &value, sizeof(T));
  if (warp.arrived == mask) {
    warp.arrived = 0;
    warp.turn = 1 - turn;
    for (int other = 0; other < 32; ++other) {
      const int thread = machine.current - lane + other;
      if (thread < machine.threads && machine.fibers[thread]->state == State::AtShuffle)
        machine.fibers[thread]->state = State::Ready;
    }
  } else {
    self().state = State::AtShuffle;
    to_scheduler();
  }
  std::memcpy(&value, &warp.values[turn][source], sizeof(T));
  return value;
}

inline std::string who_waits() {
  int counts[4] = {};
  for (int thread = 0; thread < machine.threads; ++thread) ++counts[static_cast<int>(machine.fibers[thread]->state)];
  return "deadlock: " + std::to_string(counts[1]) + " threads wait at a barrier, " + std::to_string(counts[2]) +
         " at a shuffle, " + std::to_string(counts[3]) + " have returned";
}

inline void prepare_fibers(int threads) {
  while (static_cast<int>(machine.fibers.size()) < threads) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    // Stacks begin at different places of a page, or the fibers' frames would share a few sets of the caches.
    const size_t shift = machine.fibers.size() * 448 % 16384;
    fiber->start.uc_stack = {fiber->stack.get(), 0, Fiber::kStack - shift};
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    machine.fibers.push_back(std::move(fiber));
  }
}

// Runs the block that blockIdx names, to its end or to the first error.
inline void run_block(std::mt19937_64& random) {
  machine.at_barrier = 0;
  machine.any = false;
  machine.warps.assign((machine.threads + 31) / 32, Warp{});
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  for (int thread = 0; thread < machine.threads; ++thread) {
    machine.fibers[thread]->state = State::Ready;
    machine.fibers[thread]->copies.assign(1, {});
  }
  std::vector<int> order(machine.threads);
  std::iota(order.begin(), order.end(), 0);
  // Resumes once each of order[first .. last) that is ready; false if none was.
  const auto turn = [&](int first, int last) {
    bool ran = false;
    if (seed != 0) std::shuffle(order.begin() + first, order.begin() + last, random);
    for (int i = first; i < last && machine.error.empty(); ++i)
      if (machine.fibers[order[i]]->state == State::Ready) {
        resume(order[i]);
        ran = true;
      }
    return ran;
  };
  // All threads take turns, or one warp after another runs as far as it can.
  for (bool ran = true; ran && machine.error.empty();) {
    if (seed == 0 || random() % 2 == 0) {
      ran = turn(0, machine.threads);
      if (seed != 0) std::sort(order.begin(), order.end());
    } else {
      ran = false;
      std::vector<int> warps((machine.threads + 31) / 32);
      std::iota(warps.begin(), warps.end(), 0);
      std::shuffle(warps.begin(), warps.end(), random);
      for (int warp : warps)
        while (turn(warp * 32, std::min(machine.threads, warp * 32 + 32))) ran = true;
    }
  }
  if (!machine.error.empty()) return;
  for (int thread = 0; thread < machine.threads; ++thread)
    if (machine.fibers[thread]->state != State::Finished) {
      machine.current = thread;
      machine.error = machine.kernel + ", block " + std::to_string(blockIdx.x) + ": " + who_waits();
      return;
    }
}

// "... [with auto kernel = NAME; Args = ...]" -> NAME
inline std::string kernel_name(std::string pretty) {
  const size_t begin = pretty.find("kernel = ") + 9;
  pretty = pretty.substr(begin, pretty.find("; Args") - begin);
  pretty = pretty.substr(0, pretty.find('('));
  const std::string scope = "mtlfast::cuda::";
  return pretty.rfind(scope, 0) == 0 ? pretty.substr(scope.size()) : pretty;
}

// Returns nullptr, or what went wrong.
template <auto kernel, class... Args>
const char* launch(dim3 grid, int block, int shared_bytes, void*, const Args&... args) {
  const std::string name = kernel_name(__PRETTY_FUNCTION__);
  launched.push_back(name);
  const auto call = [&] { kernel(args...); };
  machine.kernel = name;
  machine.error.clear();
  machine.body = [](void* arguments) { (*static_cast<decltype(call)*>(arguments))(); };
  machine.arguments = const_cast<void*>(static_cast<const void*>(&call));
  machine.threads = block;
  machine.shared = std::vector<unsigned char>(shared_bytes);
  gridDim = grid;
  blockDim = dim3(block);
  prepare_fibers(block);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(blocks.begin(), blocks.end(), random);
  for (uint64_t number : blocks) {
    blockIdx = dim3(number % grid.x, number / grid.x);
    run_block(random);
    if (!machine.error.empty()) {
      machine.fibers.clear();  // they stand somewhere inside the kernel
      return machine.error.c_str();
    }
  }
  return nullptr;
}

template <auto kernel>
const char* error_of() {
  return nullptr;
}
inline int blocks_to_fill(int chunks) { return std::min(chunks, most_blocks); }
inline void* dynamic_shared() { return machine.shared.data(); }

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int predicate) { return emulator::barrier(predicate != 0); }
inline void __threadfence() {}
inline void __syncwarp() { emulator::shuffle(0xffffffffu, 0, emulator::machine.current % 32); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::shuffle(mask, value, (emulator::machine.current % 32) ^ lanes);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
using std::isfinite;
using std::sqrt;
