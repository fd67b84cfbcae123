#include "grad_drop.cuh"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

namespace {

template <class T>
const char* launch_drop(const Table& table, const Drop& drop, bool round_each, void* stream) {
  const dim3 grid(blocks_to_fill(table.num_chunks));
  if constexpr (sizeof(T) >= sizeof(float))
    if (round_each) return launch<grad_drop_rounding_kernel<T>>(grid, kThreads, 0, stream, table, drop);
  if (drop.leak) return launch<grad_drop_kernel<T, true>>(grid, kThreads, 0, stream, table, drop);
  return launch<grad_drop_kernel<T, false>>(grid, kThreads, 0, stream, table, drop);
}

static_assert(kMostDropped + Drop::kRows == kMostRows, "the tasks and what else an entry holds fit one entry");

}  // namespace

const char* grad_drop(const TaskView& grads, const Dropping& dropping, void* const* out, void* stream) {
  const int64_t K = grads.num_tasks;
  const Drop drop{dropping.leak, dropping.seed, dropping.form, static_cast<int>(K)};
  const auto launch_table = [&](const Table& table, bool, bool) -> const char* {
    if (table.num_chunks == 0) return nullptr;
    return visit(grads.dtype, [&]<class T>(T) { return launch_drop<T>(table, drop, dropping.round_each, stream); });
  };
  Packer<decltype(launch_table)> packer(K + Drop::kRows, launch_table);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void* const* rows = grads.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    if (numel == 0) continue;
    const void* others[] = {out[t], reinterpret_cast<const void*>(grads.offsets[t]),
                            dropping.uniform ? dropping.uniform[t] : nullptr,
                            dropping.thresholds ? dropping.thresholds[t] : nullptr};
    packer.add(numel, widest_access(rows, K) | widest_access(others, 1) << 8 | widest_access(others + 2, 2) << 16,
               [&](int r) { return r < K ? rows[r] : others[r - K]; });
  }
  return packer.finish();
}

}  // namespace mtlfast::cuda
