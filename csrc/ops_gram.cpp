#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "chunks.h"
#include "ops.h"

namespace mtlfast {

namespace {

// Runs a summing kernel over all chunks and adds their partial sums in chunk order: `count` sums.
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

}  // namespace

at::Tensor gram(const TaskTable& grads) {
  const TaskView view = grads.view();
  const int64_t K = view.num_tasks;
  const std::vector<double> sums = sum_chunks(view, num_pairs(K), kernels().gram);
  at::Tensor out = at::empty({K, K}, grads.options().dtype(at::kDouble));
  double* g = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j <= i; ++j) g[i * K + j] = g[j * K + i] = sums[num_pairs(i) + j];
  return out;
}

at::Tensor norms(const TaskTable& grads) {
  const TaskView view = grads.view();
  const std::vector<double> sums = sum_chunks(view, view.num_tasks, kernels().square_sums);
  at::Tensor out = at::empty({view.num_tasks}, grads.options().dtype(at::kDouble));
  for (int64_t k = 0; k < view.num_tasks; ++k) out.mutable_data_ptr<double>()[k] = std::sqrt(sums[k]);
  return out;
}

uint32_t read(const TaskTable& grads, int64_t streams) {
  const TaskView view = grads.view();
  std::atomic<uint32_t> sum{0};
  Chunks(view.numel()).run(64, [&](int64_t, int64_t begin, int64_t end, void*) {
    sum += kernels().read(view, begin, end, streams);
  });
  return sum;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("gram(Tensor?[] rows, int num_tasks) -> Tensor");
  m.def("norms(Tensor?[] rows, int num_tasks) -> Tensor");
}
TORCH_LIBRARY_IMPL(mtlfast, CPU, m) {
  m.impl("gram",
         [](const OptionalTensors& rows, int64_t num_tasks) { return gram(table_of("gram", rows, num_tasks)); });
  m.impl("norms",
         [](const OptionalTensors& rows, int64_t num_tasks) { return norms(table_of("norms", rows, num_tasks)); });
}

}  // namespace mtlfast
