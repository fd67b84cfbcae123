#include <torch/library.h>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

void scale_(const TaskTable& grads, const at::Tensor& factors) {
  const TaskView view = grads.view();
  TORCH_CHECK_VALUE(
      factors.dim() == 1 && factors.size(0) == view.num_tasks && factors.device() == grads.options().device(),
      "scale_: factors have shape ", factors.sizes(), " on ", factors.device(), ", expected [", view.num_tasks, "] on ",
      grads.options().device());
  const at::Tensor wide = factors.to(at::kDouble).contiguous();
  const double* values = wide.const_data_ptr<double>();
  if (grads.options().device().is_cpu()) {
    Chunks(view.numel()).run(0, [&](int64_t, int64_t begin, int64_t end, void*) {
      kernels().scale(view, begin, end, values);
    });
    return;
  }
  on_gpu("scale_", grads.options().device(), [&](void* stream) { return cuda::scale(view, values, stream); });
}

namespace {

// tensors[i] is a gradient of task tasks[i]. The tensors may have any shapes.
void scale_tensors(at::TensorList tensors, at::IntArrayRef tasks, const at::Tensor& factors) {
  TORCH_CHECK_VALUE(tensors.size() == tasks.size(), "scale_: got ", tasks.size(), " task indices for ", tensors.size(),
                    " tensors");
  TaskTable table(factors.numel(), static_cast<int64_t>(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= tasks[i] && tasks[i] < factors.numel(), "scale_: task index ", tasks[i], " of tensor ", i,
                      " is not below ", factors.numel());
    TORCH_CHECK_VALUE(table.add(tasks[i], static_cast<int64_t>(i), tensors[i]), "scale_: tensor ", i,
                      " is not dense or differs from the others in dtype or device");
  }
  table.finish();
  scale_(table, factors);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtlfast, m) { m.def("scale_(Tensor(a!)[] tensors, int[] tasks, Tensor factors) -> ()"); }
MTLFAST_IMPL(m) { m.impl("scale_", scale_tensors); }

}  // namespace mtlfast
