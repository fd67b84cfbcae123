// What ops share that sum over the Jacobian's columns: partial sums of chunks on the CPU, memory for them on a GPU.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "chunks.h"
#include "device.h"
#include "task_table.h"

namespace mtlfast {

// Runs a kernel with `count` sums over all chunks, and adds the chunks' partial sums in chunk order.
template <class Kernel>
std::vector<double> sum_chunks(const TaskView& view, int64_t count, Kernel kernel) {
  constexpr int64_t kPartials = 1 << 16;  // doubles: half a MiB of partial sums, as far as 64 chunks allow
  const Chunks chunks(view.numel(), std::clamp<int64_t>(kPartials / count, 64, Chunks::kMost));
  std::vector<double> partials(chunks.count * count), sums(count, 0.0);
  chunks.run(kernels().gram_scratch(view.num_tasks, view.dtype),
             [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
               kernel(view, begin, end, scratch, partials.data() + chunk * count);
             });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t i = 0; i < count; ++i) sums[i] += partials[chunk * count + i];
  return sums;
}

// Runs a launcher that sums on the gradients' GPU, with memory for its partial sums.
template <class NumPartials, class Launch>
at::Tensor sum_on_gpu(const char* op, const TaskTable& grads, at::IntArrayRef shape, NumPartials num_partials,
                      Launch launch) {
  const at::TensorOptions options = grads.options();
  at::Tensor out = at::empty(shape, options.dtype(at::kDouble));
  on_gpu(op, options.device(), [&](void* stream) {
    at::Tensor partials = at::empty({num_partials(grads.view())}, options.dtype(at::kDouble)), zero;
    unsigned* counter = cuda::counter_of(stream);
    if (!counter) {
      zero = at::zeros({1}, options.dtype(at::kInt));
      counter = reinterpret_cast<unsigned*>(zero.mutable_data_ptr<int>());
    }
    const cuda::Workspace workspace{partials.mutable_data_ptr<double>(), counter};
    return launch(grads.view(), workspace, out.mutable_data_ptr<double>(), stream);
  });
  return out;
}

}  // namespace mtlfast
