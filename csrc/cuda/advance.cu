#include "advance.cuh"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

static_assert(static_cast<int>(DType::Float32) == kOutFloat32 && static_cast<int>(DType::Float64) == kOutFloat64 &&
              static_cast<int>(DType::BFloat16) == kOutBFloat16 && static_cast<int>(DType::Float16) == kOutFloat16);
static_assert(2 * kMostAdvanced + 1 <= kMostRows, "the tasks, their state and the output fit one entry");

const char* advance(const TaskView& grads, const TaskView& state, const double* coefficients, bool square,
                    DType out_dtype, void* const* out, void* stream) {
  const int64_t K = grads.num_tasks;
  const Advance advance{coefficients, static_cast<int>(K), square, static_cast<int>(out_dtype)};
  const auto launch_table = [&](const Table& table, bool, bool) -> const char* {
    if (table.num_chunks == 0) return nullptr;
    const int shared_bytes = 4 * static_cast<int>(K) * static_cast<int>(sizeof(double));
    return visit(grads.dtype, [&]<class T>(T) {
      return visit(state.dtype, [&]<class S>(S) {
        return launch<advance_kernel<T, S>>(dim3(blocks_to_fill(table.num_chunks)), kThreads, shared_bytes, stream,
                                            table, advance);
      });
    });
  };
  Packer<decltype(launch_table)> packer(2 * K + 1, launch_table);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void *const *g = grads.tensor(t), *const *s = state.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    if (numel > 0)
      packer.add(numel, widest_access(g, K) | widest_access(s, K) << 8 | widest_access(&out[t], 1) << 16, [&](int r) {
        return r < K ? g[r] : r < 2 * K ? s[r - K] : out[t];
      });
  }
  return packer.finish();
}

}  // namespace mtlfast::cuda
