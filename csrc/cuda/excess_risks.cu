#include "excess_risks.cuh"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

int64_t excess_risks_partials(const TaskView& grads) { return row_partials(grads); }

const char* excess_risks(const TaskView& grads, const TaskView& sums, double eps, const double* factors,
                         const Workspace& workspace, double* risks, void* stream) {
  return for_each_rows(grads.num_tasks, [&](int64_t first, int rows) {
    const auto launch_table = [&](const Table& table, bool starts, bool last) {
      const Sums of_rows{workspace.partials, workspace.counter, risks + first, rows, starts, last, 0, 0, 0};
      const dim3 grid(row_blocks(grads, rows), rows);
      return visit(grads.dtype, [&]<class T>(T) {
        return visit(sums.dtype, [&]<class H>(H) {
          return launch<excess_risks_kernel<T, H>>(grid, kThreads, 0, stream, table, of_rows, eps, factors + first);
        });
      });
    };
    Packer<decltype(launch_table)> packer(2 * rows, launch_table);
    for (int64_t t = 0; t < grads.num_tensors; ++t) {
      const void *const *g = grads.tensor(t) + first, *const *h = sums.tensor(t) + first;
      const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
      if (numel > 0)
        packer.add(numel, widest_access(g, rows) | widest_access(h, rows) << 8,
                   [&](int r) { return r < rows ? g[r] : h[r - rows]; });
    }
    return packer.finish();
  });
}

}  // namespace mtlfast::cuda
