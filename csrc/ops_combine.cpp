#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

namespace {

// The leading dimension of the outputs: R for coefficients [R, K], none for weights [K] or for those of groups.
std::optional<int64_t> leading(const at::Tensor& coefficients, GroupOfTensors groups) {
  return coefficients.dim() == 2 && !groups ? std::make_optional(coefficients.size(0)) : std::nullopt;
}

}  // namespace

void combine_(const TaskTable& grads, const at::Tensor& coefficients, at::TensorList out, bool accumulate, double scale,
              GroupOfTensors groups) {
  TaskView view = grads.view();
  const int64_t K = view.num_tasks, given = coefficients.dim() == 2 ? coefficients.size(0) : 1;
  TORCH_CHECK_VALUE((coefficients.dim() == 1 || coefficients.dim() == 2) && coefficients.size(-1) == K &&
                        coefficients.device() == grads.options().device(),
                    "combine: weights have shape ", coefficients.sizes(), " on ", coefficients.device(), ", expected [",
                    K, "] or [R, ", K, "] on ", grads.options().device());
  if (groups) {
    TORCH_CHECK_VALUE(coefficients.dim() == 2, "combine: weights have shape ", coefficients.sizes(), ", expected [G, ",
                      K, "] as groups are given");
    check_groups("combine", grads, *groups, given);
    view.groups = groups->data();
  }
  const int64_t R = groups ? 1 : given;  // outputs
  const at::ScalarType dtype = grads.dtype_of_out(out);
  const DType out_dtype = dtype_of(dtype);
  const std::vector<void*> pointers = grads.pointers_of("combine: out", out, leading(coefficients, groups), dtype);
  if (R == 0) return;
  const at::Tensor wide = coefficients.to(at::kDouble).contiguous();
  if (!coefficients.is_cpu()) {
    TORCH_CHECK_VALUE(K <= cuda::kMostCombined, "combine: got ", K, " tasks, expected at most ", cuda::kMostCombined,
                      " on a GPU");
    on_gpu("combine", coefficients.device(), [&](void* stream) {
      return cuda::combine(view, wide.const_data_ptr<double>(), R, scale, accumulate, out_dtype, pointers.data(),
                           stream);
    });
    return;
  }
  std::vector<double> scaled(wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + given * K);
  for (double& value : scaled) value *= scale;
  Chunks(view.numel()).run(kernels().combine_scratch(K, R), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels().combine(view, begin, end, scaled.data(), R, out_dtype, accumulate, scratch, pointers.data());
  });
}

std::vector<at::Tensor> combine(const TaskTable& grads, const at::Tensor& coefficients, double scale,
                                std::optional<at::ScalarType> dtype, GroupOfTensors groups) {
  std::vector<at::Tensor> out = grads.make_out(leading(coefficients, groups), dtype.value_or(grads.dtype()));
  combine_(grads, coefficients, out, false, scale, groups);
  return out;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def(
      "combine(Tensor?[] rows, int num_tasks, Tensor coefficients, float scale, ScalarType? dtype=None, "
      "int[]? groups=None) -> Tensor[]");
  m.def(
      "combine_(Tensor?[] rows, int num_tasks, Tensor coefficients, Tensor(a!)[] out, bool accumulate, float scale, "
      "int[]? groups=None) -> ()");
}
MTLFAST_IMPL(m) {
  m.impl("combine", [](const OptionalTensors& rows, int64_t num_tasks, const at::Tensor& coefficients, double scale,
                       std::optional<at::ScalarType> dtype, GroupOfTensors groups) {
    return combine(table_of("combine", rows, num_tasks), coefficients, scale, dtype, groups);
  });
  m.impl("combine_", [](const OptionalTensors& rows, int64_t num_tasks, const at::Tensor& coefficients,
                        at::TensorList out, bool accumulate, double scale, GroupOfTensors groups) {
    combine_(table_of("combine", rows, num_tasks), coefficients, out, accumulate, scale, groups);
  });
}

}  // namespace mtlfast
