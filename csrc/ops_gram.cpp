#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "sums.h"

namespace mtlfast {

namespace {

// The shape of a result: that of each group behind a dimension of groups, if there are any.
std::vector<int64_t> shape_of(GroupOfTensors groups, int64_t num_groups, std::vector<int64_t> of_each) {
  if (groups) of_each.insert(of_each.begin(), num_groups);
  return of_each;
}

}  // namespace

at::Tensor gram(const TaskTable& grads, bool exact, int64_t split, GroupOfTensors groups, int64_t num_groups) {
  const int64_t K = grads.num_tasks();
  TORCH_CHECK_VALUE(0 <= split && split < K, "gram: split is ", split, ", expected at least 0 and less than ", K,
                    ", the number of tasks");
  const SortedByGroup sorted("gram", grads, groups, num_groups);
  const std::vector<int64_t> shape =
      split > 0 ? shape_of(groups, num_groups, {split, K - split}) : shape_of(groups, num_groups, {K, K});
  if (!grads.options().device().is_cpu())
    return sum_on_gpu(
        "gram", grads, sorted, shape, [=](const TaskView& view) { return cuda::gram_partials(view, split, exact); },
        [=](const TaskView& view, auto... args) { return cuda::gram(view, split, exact, args...); });
  const int64_t count = split > 0 ? split * (K - split) : num_pairs(K);
  const std::vector<double> sums = sum_chunks(sorted.view(), sorted.borders(), count,
                                              [=](const TaskView& view, int64_t begin, int64_t end, auto... args) {
                                                kernels().gram(view, begin, end, split, exact, args...);
                                              });
  at::Tensor out = at::empty(shape, grads.options().dtype(at::kDouble));
  double* g = out.mutable_data_ptr<double>();
  if (split > 0) {
    std::copy(sums.begin(), sums.end(), g);
    return out;
  }
  for (int64_t group = 0; group < sorted.num_groups(); ++group, g += K * K)
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j <= i; ++j) g[i * K + j] = g[j * K + i] = sums[group * count + num_pairs(i) + j];
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

at::Tensor norms(const TaskTable& grads, GroupOfTensors groups, int64_t num_groups) {
  const int64_t K = grads.num_tasks();
  const SortedByGroup sorted("norms", grads, groups, num_groups);
  const std::vector<int64_t> shape = shape_of(groups, num_groups, {K});
  if (!grads.options().device().is_cpu()) {
    at::Tensor out = sum_on_gpu(
        "norms", grads, sorted, shape, [](const TaskView& view) { return cuda::norms_partials(view); },
        [](const TaskView& view, auto... args) { return cuda::norms(view, args...); });
    return groups ? out.sqrt_() : out;
  }
  const std::vector<double> sums = sum_chunks(sorted.view(), sorted.borders(), K, kernels().square_sums);
  at::Tensor out = at::empty(shape, grads.options().dtype(at::kDouble));
  std::transform(sums.begin(), sums.end(), out.mutable_data_ptr<double>(), [](double sum) { return std::sqrt(sum); });
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
  m.def("gram(Tensor?[] rows, int num_tasks, bool exact, int split=0, int[]? groups=None, int num_groups=1) -> Tensor");
  m.def("norms(Tensor?[] rows, int num_tasks, int[]? groups=None, int num_groups=1) -> Tensor");
}
MTLFAST_IMPL(m) {
  m.impl("gram",
         [](const OptionalTensors& rows, int64_t num_tasks, bool exact, int64_t split, GroupOfTensors groups,
            int64_t num_groups) { return gram(table_of("gram", rows, num_tasks), exact, split, groups, num_groups); });
  m.impl("norms", [](const OptionalTensors& rows, int64_t num_tasks, GroupOfTensors groups, int64_t num_groups) {
    return norms(table_of("norms", rows, num_tasks), groups, num_groups);
  });
}

}  // namespace mtlfast
