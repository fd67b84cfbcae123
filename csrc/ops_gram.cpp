#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "sums.h"

namespace mtlfast {

at::Tensor gram(const TaskTable& grads, bool exact, int64_t split) {
  const TaskView view = grads.view();
  const int64_t K = view.num_tasks;
  TORCH_CHECK_VALUE(0 <= split && split < K, "gram: split is ", split, ", expected at least 0 and less than ", K,
                    ", the number of tasks");
  const std::vector<int64_t> shape = split > 0 ? std::vector<int64_t>{split, K - split} : std::vector<int64_t>{K, K};
  if (!grads.options().device().is_cpu())
    return sum_on_gpu(
        "gram", grads, shape, [=](const TaskView& view) { return cuda::gram_partials(view, split, exact); },
        [=](const TaskView& view, auto... args) { return cuda::gram(view, split, exact, args...); });
  const int64_t count = split > 0 ? split * (K - split) : num_pairs(K);
  const std::vector<double> sums =
      sum_chunks(view, count, [=](const TaskView& view, int64_t begin, int64_t end, auto... args) {
        kernels().gram(view, begin, end, split, exact, args...);
      });
  at::Tensor out = at::empty(shape, grads.options().dtype(at::kDouble));
  double* g = out.mutable_data_ptr<double>();
  if (split > 0) {
    std::copy(sums.begin(), sums.end(), g);
    return out;
  }
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j <= i; ++j) g[i * K + j] = g[j * K + i] = sums[num_pairs(i) + j];
  return out;
}

at::Tensor gram_plain(const TaskTable& grads) {
  const int64_t K = grads.num_tasks();
  TORCH_CHECK_VALUE(!grads.options().device().is_cpu(), "gram_plain: expected tensors on a GPU");
  at::Tensor out = at::empty({K, K}, grads.options().dtype(at::kDouble));
  on_gpu("gram_plain", out.device(),
         [&](void* stream) { return cuda::gram_plain(grads.view(), out.mutable_data_ptr<double>(), stream); });
  return out;
}

at::Tensor norms(const TaskTable& grads) {
  const TaskView view = grads.view();
  if (!grads.options().device().is_cpu())
    return sum_on_gpu(
        "norms", grads, {view.num_tasks}, [](auto... args) { return cuda::norms_partials(args...); },
        [](auto... args) { return cuda::norms(args...); });
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
  m.def("gram(Tensor?[] rows, int num_tasks, bool exact, int split=0) -> Tensor");
  m.def("norms(Tensor?[] rows, int num_tasks) -> Tensor");
}
MTLFAST_IMPL(m) {
  m.impl("gram", [](const OptionalTensors& rows, int64_t num_tasks, bool exact, int64_t split) {
    return gram(table_of("gram", rows, num_tasks), exact, split);
  });
  m.impl("norms",
         [](const OptionalTensors& rows, int64_t num_tasks) { return norms(table_of("norms", rows, num_tasks)); });
}

}  // namespace mtlfast
