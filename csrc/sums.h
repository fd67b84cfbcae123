// What ops share that sum over the Jacobian's columns: partial sums of chunks on the CPU, memory for them on a GPU.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "chunks.h"
#include "device.h"
#include "groups.h"
#include "task_table.h"

namespace mtlfast {

// Runs a kernel with `count` sums over all chunks, which are cut at the borders [G + 1] where the columns of a group
// begin. The partial sums of a group are added in the order of its columns. Returns [G, count].
template <class Kernel>
std::vector<double> sum_chunks(const TaskView& view, const std::vector<int64_t>& borders, int64_t count,
                               Kernel kernel) {
  constexpr int64_t kPartials = 1 << 16;  // doubles: half a MiB of partial sums, as far as 64 chunks allow
  const Chunks chunks(view.numel(), std::clamp<int64_t>(kPartials / count, 64, Chunks::kMost));
  const int64_t num_groups = static_cast<int64_t>(borders.size()) - 1;
  // From one part to the next the chunk or the group goes up, or both. So chunk + group is a place of its own.
  std::vector<double> partials((chunks.count + num_groups) * count), sums(num_groups * count, 0.0);
  const auto for_each_part = [&](int64_t begin, int64_t end, auto use) {
    int64_t group = std::upper_bound(borders.begin(), borders.end(), begin) - borders.begin() - 1;
    for (int64_t from = begin; from < end; ++group) {
      const int64_t to = std::min(end, borders[group + 1]);
      if (from < to) use(group, from, to);
      from = to;
    }
  };
  chunks.run(kernels().gram_scratch(view.num_tasks, view.dtype),
             [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
               for_each_part(begin, end, [&](int64_t group, int64_t from, int64_t to) {
                 kernel(view, from, to, scratch, partials.data() + (chunk + group) * count);
               });
             });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for_each_part(chunk * chunks.size, std::min(chunks.numel, (chunk + 1) * chunks.size),
                  [&](int64_t group, int64_t, int64_t) {
                    for (int64_t i = 0; i < count; ++i)
                      sums[group * count + i] += partials[(chunk + group) * count + i];
                  });
  return sums;
}

// Runs a launcher that sums on the gradients' GPU, with memory for its partial sums.
template <class NumPartials, class Launch>
at::Tensor sum_on_gpu(const char* op, const TaskTable& grads, const SortedByGroup& sorted, at::IntArrayRef shape,
                      NumPartials num_partials, Launch launch) {
  const at::TensorOptions options = grads.options();
  // Nothing is launched for a group without columns.
  at::Tensor out =
      sorted.any_empty() ? at::zeros(shape, options.dtype(at::kDouble)) : at::empty(shape, options.dtype(at::kDouble));
  on_gpu(op, options.device(), [&](void* stream) {
    at::Tensor partials = at::empty({num_partials(sorted.view())}, options.dtype(at::kDouble)), zero;
    unsigned* counter = cuda::counter_of(stream);
    if (!counter) {
      zero = at::zeros({cuda::kCounters}, options.dtype(at::kInt));
      counter = reinterpret_cast<unsigned*>(zero.mutable_data_ptr<int>());
    }
    const cuda::Workspace workspace{partials.mutable_data_ptr<double>(), counter};
    return launch(sorted.view(), workspace, out.mutable_data_ptr<double>(), stream);
  });
  return out;
}

}  // namespace mtlfast
