#include "flatten.cuh"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

const char* flatten(const TaskView& grads, DType out_dtype, void* out, void* stream) {
  const auto launch_table = [&](const Table& table, bool, bool) -> const char* {
    if (table.num_chunks == 0) return nullptr;
    return visit(grads.dtype, [&]<class T>(T) {
      return visit(out_dtype, [&]<class Out>(Out) {
        return launch<flatten_kernel<T, Out>>(dim3(blocks_to_fill(table.num_chunks)), kThreads, 0, stream, table);
      });
    });
  };
  Packer<decltype(launch_table)> packer(2, launch_table);
  for (int64_t k = 0; k < grads.num_tasks; ++k)
    for (int64_t t = 0; t < grads.num_tensors; ++t) {
      const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
      const void* row = grads.tensor(t)[k];
      const void* place = static_cast<char*>(out) + (k * grads.numel() + grads.offsets[t]) * item_size(out_dtype);
      if (numel > 0)
        packer.add(numel, widest_access(&row, 1) | widest_access(&place, 1) << 8,
                   [&](int r) { return r == 0 ? row : place; });
    }
  return packer.finish();
}

}  // namespace mtlfast::cuda
