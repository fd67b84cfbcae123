#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

void advance_(const TaskTable& grads, const TaskTable& state, const at::Tensor& coefficients, bool square,
              at::TensorList out) {
  const TaskView view = grads.view();
  const int64_t K = view.num_tasks;
  const at::Device device = grads.options().device();
  TORCH_CHECK_VALUE(grads.same_tensors(state),
                    "advance_: the state differs from the task gradients in tasks, tensors, device, shapes or strides");
  TORCH_CHECK_VALUE(coefficients.sizes() == at::IntArrayRef({4, K}) && coefficients.device() == device,
                    "advance_: coefficients have shape ", coefficients.sizes(), " on ", coefficients.device(),
                    ", expected [4, ", K, "] on ", device);
  const at::ScalarType dtype = grads.dtype_of_out(out);
  const DType out_dtype = dtype_of(dtype);
  const std::vector<void*> pointers = grads.pointers_of("advance_: out", out, std::nullopt, dtype);
  const at::Tensor wide = coefficients.to(at::kDouble).contiguous();
  const double* values = wide.const_data_ptr<double>();
  if (!device.is_cpu()) {
    TORCH_CHECK_VALUE(K <= cuda::kMostAdvanced, "advance_: got ", K, " tasks, expected at most ", cuda::kMostAdvanced,
                      " on a GPU");
    on_gpu("advance_", device, [&](void* stream) {
      return cuda::advance(view, state.view(), values, square, out_dtype, pointers.data(), stream);
    });
    return;
  }
  if (!std::all_of(values, values + 4 * K, [](double value) { return std::isfinite(value); })) {
    for (int64_t t = 0; t < view.num_tensors; ++t)
      if (view.offsets[t + 1] > view.offsets[t]) out[t].fill_(std::numeric_limits<double>::quiet_NaN());
    return;
  }
  Chunks(view.numel()).run(0, [&](int64_t, int64_t begin, int64_t end, void*) {
    kernels().advance(view, state.view(), begin, end, values, square, out_dtype, pointers.data());
  });
}

namespace {

// A tensor without elements in `state` stands for an absent one.
void advance_rows(const OptionalTensors& rows, int64_t num_tasks, at::TensorList state, const at::Tensor& coefficients,
                  bool square, at::TensorList out) {
  OptionalTensors present;
  for (const at::Tensor& entry : state) present.push_back(entry.numel() > 0 ? std::make_optional(entry) : std::nullopt);
  advance_(table_of("advance_", rows, num_tasks), table_of("advance_", present, num_tasks), coefficients, square, out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def(
      "advance_(Tensor?[] rows, int num_tasks, Tensor(a!)[] state, Tensor coefficients, bool square, "
      "Tensor(b!)[] out) -> ()");
}
MTLFAST_IMPL(m) { m.impl("advance_", advance_rows); }

}  // namespace mtlfast
