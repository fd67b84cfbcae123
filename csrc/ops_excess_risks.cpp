#include <torch/library.h>

#include <vector>

#include "ops.h"
#include "sums.h"

namespace mtlfast {

at::Tensor excess_risks(const TaskTable& grads, const TaskTable& sums, double eps, const at::Tensor& factors) {
  const int64_t K = grads.num_tasks();
  const at::Device device = grads.options().device();
  TORCH_CHECK_VALUE(
      grads.same_tensors(sums),
      "excess_risks: the sums differ from the task gradients in tasks, tensors, device, shapes or strides");
  TORCH_CHECK_VALUE(factors.sizes() == at::IntArrayRef({K}) && factors.device() == device,
                    "excess_risks: factors have shape ", factors.sizes(), " on ", factors.device(), ", expected [", K,
                    "] on ", device);
  const at::Tensor wide = factors.to(at::kDouble).contiguous();
  const double* values = wide.const_data_ptr<double>();
  const TaskView before = sums.view();
  if (!device.is_cpu())
    return sum_on_gpu(
        "excess_risks", grads, SortedByGroup("excess_risks", grads, std::nullopt, 1), {K},
        [](const TaskView& view) { return cuda::excess_risks_partials(view); },
        [&](const TaskView& view, auto... args) { return cuda::excess_risks(view, before, eps, values, args...); });
  const std::vector<double> risks =
      sum_chunks(grads.view(), {0, grads.numel()}, K,
                 [&](const TaskView& view, int64_t begin, int64_t end, void*, double* of_range) {
                   kernels().excess_risks(view, before, begin, end, eps, values, of_range);
                 });
  at::Tensor out = at::empty({K}, grads.options().dtype(at::kDouble));
  std::copy(risks.begin(), risks.end(), out.mutable_data_ptr<double>());
  return out;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("excess_risks(Tensor?[] rows, int num_tasks, Tensor?[] sums, float eps, Tensor factors) -> Tensor");
}
MTLFAST_IMPL(m) {
  m.impl("excess_risks", [](const OptionalTensors& rows, int64_t num_tasks, const OptionalTensors& sums, double eps,
                            const at::Tensor& factors) {
    return excess_risks(table_of("excess_risks", rows, num_tasks), table_of("excess_risks", sums, num_tasks), eps,
                        factors);
  });
}

}  // namespace mtlfast
