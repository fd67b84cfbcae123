// Spreads the Jacobian's columns over threads: the columns are cut into fixed chunks, and a free thread takes the next.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "threads.h"

namespace mtlfast {

// There are about `most` chunks, none shorter than 8192 columns, with borders at multiples of a block. They depend on
// sizes alone, so that the same elements are summed together for any number of threads.
struct Chunks {
  static constexpr int64_t kMost = 256;
  explicit Chunks(int64_t numel, int64_t most = kMost) : numel(numel) {
    constexpr int64_t kShortest = 8192;
    size = std::max<int64_t>((numel / most + 1023) / 1024 * 1024, kShortest);
    count = (numel + size - 1) / size;
  }
  int64_t numel, size, count;
  static constexpr std::align_val_t kAlignment{64};

  // Calls work(chunk, begin, end, scratch) once for each chunk. Each thread has `scratch_bytes` of scratch memory.
  template <class Work>
  void run(int64_t scratch_bytes, const Work& work) const {
    if (count == 0) return;
    const int64_t threads = std::min<int64_t>(num_threads(), count);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      const auto release = [](void* memory) { ::operator delete(memory, kAlignment); };
      const std::unique_ptr<void, decltype(release)> scratch(::operator new(scratch_bytes, kAlignment), release);
      for (int64_t thread = first; thread < last; ++thread)
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count;)
          work(chunk, chunk * size, std::min(numel, (chunk + 1) * size), scratch.get());
    });
  }
};

inline const CpuKernels& kernels() {
  const char* why = nullptr;
  const CpuKernels* chosen = cpu_kernels(&why);
  TORCH_CHECK_VALUE(chosen, why);
  return *chosen;
}

}  // namespace mtlfast
