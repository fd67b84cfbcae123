#include "launch.h"
#include "launchers.h"
#include "pack.h"
#include "scale.cuh"

namespace mtlfast::cuda {

const char* scale(const TaskView& grads, const double* factors, void* stream) {
  const auto launch_table = [&](const Table& table, bool, bool) -> const char* {
    if (table.num_chunks == 0) return nullptr;
    return visit(grads.dtype, [&]<class T>(T) {
      return launch<scale_kernel<T>>(dim3(blocks_to_fill(table.num_chunks)), kThreads, 0, stream, table, factors);
    });
  };
  Packer<decltype(launch_table)> packer(1, launch_table);
  for (int64_t t = 0; t < grads.num_tensors; ++t)
    for (int64_t k = 0; k < grads.num_tasks; ++k) {
      const void* data = grads.tensor(t)[k];
      if (data) packer.add(grads.offsets[t + 1] - grads.offsets[t], static_cast<int>(k), [&](int) { return data; });
    }
  return packer.finish();
}

// All kernels are compiled for the same architectures: whether one of the smallest can run holds for all.
const char* kernel_error() { return error_of<scale_kernel<float>>(); }

}  // namespace mtlfast::cuda
