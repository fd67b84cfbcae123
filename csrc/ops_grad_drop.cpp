#include <torch/library.h>

#include <vector>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

namespace {

// The dtype of uniform numbers, thresholds and purities.
at::ScalarType wide_dtype(const TaskTable& grads) { return grads.dtype() == at::kDouble ? at::kDouble : at::kFloat; }

Dropping::Form form_of(std::string_view form) {
  if (form == "drawn") return Dropping::Drawn;
  if (form == "given") return Dropping::Given;
  if (form == "expected") return Dropping::Expected;
  TORCH_CHECK_VALUE(form == "purity", "grad_drop: form is ", std::string(form),
                    ", expected drawn, given, expected or purity");
  return Dropping::Purity;
}

at::ScalarType out_dtype(const TaskTable& grads, const DropArguments& arguments) {
  return form_of(arguments.form) == Dropping::Purity ? wide_dtype(grads) : grads.dtype();
}

}  // namespace

void grad_drop_(const TaskTable& grads, const DropArguments& arguments, at::TensorList out) {
  const TaskView view = grads.view();
  const int64_t K = view.num_tasks;
  const at::Device device = grads.options().device();
  Dropping dropping{form_of(arguments.form), arguments.round_each, nullptr, nullptr, nullptr, nullptr};
  TORCH_CHECK_VALUE(!arguments.round_each || grads.dtype() == at::kFloat || grads.dtype() == at::kDouble,
                    "grad_drop: round_each is true for ", grads.dtype(), ", expected float32 or float64");
  at::Tensor leak;
  if (arguments.leak) {
    TORCH_CHECK_VALUE(arguments.leak->dim() == 1 && arguments.leak->size(0) == K && arguments.leak->device() == device,
                      "grad_drop: leak has shape ", arguments.leak->sizes(), " on ", arguments.leak->device(),
                      ", expected [", K, "] on ", device);
    leak = arguments.leak->to(at::kDouble).contiguous();
    dropping.leak = leak.const_data_ptr<double>();
  }
  if (dropping.form == Dropping::Drawn) {
    TORCH_CHECK_VALUE(arguments.seed && arguments.seed->numel() == 1 && arguments.seed->scalar_type() == at::kLong &&
                          arguments.seed->device() == device,
                      "grad_drop: expected a seed of one int64 number on ", device);
    dropping.seed = reinterpret_cast<const unsigned long long*>(arguments.seed->const_data_ptr<int64_t>());
  }
  std::vector<void*> uniform, thresholds;
  if (dropping.form == Dropping::Given) {
    uniform = grads.pointers_of("grad_drop: uniform", arguments.uniform, std::nullopt, wide_dtype(grads));
    dropping.uniform = uniform.data();
  }
  if (!arguments.thresholds.empty()) {
    thresholds = grads.pointers_of("grad_drop: thresholds", arguments.thresholds, std::nullopt, wide_dtype(grads));
    dropping.thresholds = thresholds.data();
  }
  const std::vector<void*> pointers =
      grads.pointers_of("grad_drop: out", out, std::nullopt, out_dtype(grads, arguments));
  if (!device.is_cpu()) {
    TORCH_CHECK_VALUE(K <= cuda::kMostDropped, "grad_drop: got ", K, " tasks, expected at most ", cuda::kMostDropped,
                      " on a GPU");
    on_gpu("grad_drop", device, [&](void* stream) { return cuda::grad_drop(view, dropping, pointers.data(), stream); });
    return;
  }
  Chunks(view.numel()).run(kernels().grad_drop_scratch(K), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels().grad_drop(view, begin, end, dropping, scratch, pointers.data());
  });
}

std::vector<at::Tensor> grad_drop(const TaskTable& grads, const DropArguments& arguments) {
  std::vector<at::Tensor> out = grads.make_out(std::nullopt, out_dtype(grads, arguments));
  grad_drop_(grads, arguments, out);
  return out;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def(
      "grad_drop(Tensor?[] rows, int num_tasks, str form, bool round_each, Tensor? seed, Tensor[] uniform, "
      "Tensor[] thresholds, Tensor? leak) -> Tensor[]");
  m.def(
      "grad_drop_(Tensor?[] rows, int num_tasks, str form, bool round_each, Tensor? seed, Tensor[] uniform, "
      "Tensor[] thresholds, Tensor? leak, Tensor(a!)[] out) -> ()");
}
MTLFAST_IMPL(m) {
  m.impl("grad_drop", [](const OptionalTensors& rows, int64_t num_tasks, std::string_view form, bool round_each,
                         const std::optional<at::Tensor>& seed, at::TensorList uniform, at::TensorList thresholds,
                         const std::optional<at::Tensor>& leak) {
    return grad_drop(table_of("grad_drop", rows, num_tasks), {form, round_each, seed, uniform, thresholds, leak});
  });
  m.impl("grad_drop_", [](const OptionalTensors& rows, int64_t num_tasks, std::string_view form, bool round_each,
                          const std::optional<at::Tensor>& seed, at::TensorList uniform, at::TensorList thresholds,
                          const std::optional<at::Tensor>& leak, at::TensorList out) {
    grad_drop_(table_of("grad_drop", rows, num_tasks), {form, round_each, seed, uniform, thresholds, leak}, out);
  });
}

}  // namespace mtlfast
