#include "instances.h"
#include "launch.h"
#include "launchers.h"
#include "pack.h"
#include "trimmed_mean.cuh"

namespace mtlfast::cuda {

const char* trimmed_mean(const TaskView& grads, int64_t trim, void* const* out, void* stream) {
  const int64_t K = grads.num_tasks;
  const auto launch_table = [&](const Table& table, bool, bool) -> const char* {
    if (table.num_chunks == 0) return nullptr;
    return visit(grads.dtype, [&]<class T>(T) {
      return visit_rows(SortedRows{}, K, [&]<int Rows>() {
        return launch<trimmed_mean_kernel<T, Rows>>(dim3(blocks_to_fill(table.num_chunks)), kThreads, 0, stream, table,
                                                    static_cast<int>(K), static_cast<int>(trim));
      });
    });
  };
  Packer<decltype(launch_table)> packer(K + 1, launch_table);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void* const* rows = grads.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    const void* place = out[t];
    if (numel > 0)
      packer.add(numel, widest_access(rows, K) | widest_access(&place, 1) << 8,
                 [&](int r) { return r < K ? rows[r] : place; });
  }
  return packer.finish();
}

}  // namespace mtlfast::cuda
