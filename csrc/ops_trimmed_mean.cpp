#include <torch/library.h>

#include <vector>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

void trimmed_mean_(const TaskTable& grads, int64_t trim_number, at::TensorList out) {
  const TaskView view = grads.view();
  const int64_t K = view.num_tasks;
  TORCH_CHECK_VALUE(K <= kMostSorted && trim_number >= 0 && 2 * trim_number < K, "trimmed_mean: trim_number is ",
                    trim_number, " for ", K, " tasks, expected less than half of at most ", kMostSorted, " tasks");
  const std::vector<void*> pointers = grads.pointers_of("trimmed_mean: out", out, std::nullopt, grads.dtype());
  if (!grads.options().device().is_cpu()) {
    on_gpu("trimmed_mean", grads.options().device(),
           [&](void* stream) { return cuda::trimmed_mean(view, trim_number, pointers.data(), stream); });
    return;
  }
  Chunks(view.numel()).run(kernels().trimmed_mean_scratch(K), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels().trimmed_mean(view, begin, end, trim_number, scratch, pointers.data());
  });
}

std::vector<at::Tensor> trimmed_mean(const TaskTable& grads, int64_t trim_number) {
  std::vector<at::Tensor> out = grads.make_out(std::nullopt, grads.dtype());
  trimmed_mean_(grads, trim_number, out);
  return out;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("trimmed_mean(Tensor?[] rows, int num_tasks, int trim_number) -> Tensor[]");
  m.def("trimmed_mean_(Tensor?[] rows, int num_tasks, int trim_number, Tensor(a!)[] out) -> ()");
}
MTLFAST_IMPL(m) {
  m.impl("trimmed_mean", [](const OptionalTensors& rows, int64_t num_tasks, int64_t trim_number) {
    return trimmed_mean(table_of("trimmed_mean", rows, num_tasks), trim_number);
  });
  m.impl("trimmed_mean_", [](const OptionalTensors& rows, int64_t num_tasks, int64_t trim_number, at::TensorList out) {
    trimmed_mean_(table_of("trimmed_mean", rows, num_tasks), trim_number, out);
  });
}

}  // namespace mtlfast
