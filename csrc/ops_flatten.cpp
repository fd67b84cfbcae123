#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "chunks.h"
#include "device.h"
#include "ops.h"

namespace mtlfast {

at::Tensor flatten(const TaskTable& grads, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(grads.contiguous(), "flatten: expected contiguous tensors");
  const TaskView view = grads.view();
  at::Tensor out = at::empty({view.num_tasks, view.numel()}, grads.options().dtype(dtype));
  const DType out_dtype = dtype_of(dtype);
  if (!out.is_cpu()) {
    on_gpu("flatten", out.device(),
           [&](void* stream) { return cuda::flatten(view, out_dtype, out.mutable_data_ptr(), stream); });
    return out;
  }
  Chunks(view.numel()).run(0, [&](int64_t, int64_t begin, int64_t end, void*) {
    kernels().flatten(view, begin, end, out_dtype, view.numel(), out.mutable_data_ptr());
  });
  return out;
}

namespace {

at::Tensor flatten_rows(const OptionalTensors& rows, int64_t num_tasks, at::ScalarType dtype) {
  OptionalTensors dense;
  dense.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::optional<at::Tensor> row = rows.get(i);
    dense.push_back(row ? std::make_optional(row->contiguous()) : std::nullopt);
  }
  return flatten(table_of("flatten", dense, num_tasks), dtype);
}

// Views of a [P] vector with the shapes of `like`. They are torch's own views, so that torch's transforms know them.
std::vector<at::Tensor> unflatten(const at::Tensor& vector, at::TensorList like) {
  std::vector<c10::SymInt> sizes;
  c10::SymInt total = 0;
  for (const at::Tensor& tensor : like) {
    sizes.push_back(tensor.sym_numel());
    total += sizes.back();
  }
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.sym_numel() == total, "unflatten: vector has shape ",
                    vector.sym_sizes(), ", expected [", total, "]");
  std::vector<at::Tensor> parts;
  if (!like.empty()) parts = vector.split_with_sizes_symint(sizes);
  for (size_t t = 0; t < like.size(); ++t) parts[t] = parts[t].view_symint(like[t].sym_sizes());
  return parts;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("flatten(Tensor?[] rows, int num_tasks, ScalarType dtype) -> Tensor");
  m.def("unflatten(Tensor(a) vector, Tensor[] like) -> Tensor(a)[]");
}
MTLFAST_IMPL(m) { m.impl("flatten", flatten_rows); }
TORCH_LIBRARY_IMPL(mtlfast, CompositeImplicitAutograd, m) { m.impl("unflatten", unflatten); }

}  // namespace mtlfast
