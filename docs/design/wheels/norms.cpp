// The op and its registration, by torch's stable ABI alone: threads, checks, outputs, dispatcher.
#include "norms.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "cpu/kernels.h"

namespace mtlfast::stable {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Rows = std::vector<std::optional<Tensor>>;

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::Double:
      return DType::Float64;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      STD_TORCH_CHECK(false, "norms: expected float32, float64, bfloat16 or float16");
  }
}

Tensor norms_of_rows(const Rows& rows, int64_t num_tasks) {
  const int64_t total = static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(num_tasks > 0 && total % num_tasks == 0, "norms: got ", total, " rows for ", num_tasks,
                  " tasks, expected a multiple");
  const int64_t num_tensors = total / num_tasks;
  Table table(num_tasks, num_tensors);
  for (int64_t i = 0; i < total; ++i) {
    if (!rows[i]) continue;
    const Tensor& row = *rows[i];
    STD_TORCH_CHECK(row.is_cpu() && row.is_contiguous(), "norms: row ", i, " is not a contiguous tensor on the CPU");
    table.add(i / num_tensors, i % num_tensors, {row.const_data_ptr(), row.numel(), dtype_of(row.scalar_type())});
  }
  const int64_t shape[] = {num_tasks};
  Tensor out = torch::stable::empty({shape, 1}, ScalarType::Double);
  norms(table.finish(), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

// As mtlfast::norms does it: the same chunks (csrc/chunks.h), added in the same order.
void norms(const TaskView& grads, double* out) {
  const char* why = nullptr;
  const CpuKernels* kernels = cpu_kernels(&why);
  STD_TORCH_CHECK(kernels, why);
  const int64_t K = grads.num_tasks, numel = grads.numel();
  const int64_t size = std::max<int64_t>((numel / 256 + 1023) / 1024 * 1024, 8192), count = (numel + size - 1) / size;
  std::vector<double> partials(count * K);
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    struct alignas(64) Line {
      char bytes[64];
    };
    std::vector<Line> scratch(kernels->gram_scratch(K, grads.dtype) / 64 + 1);
    for (int64_t thread = first; thread < last; ++thread)
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        kernels->square_sums(grads, chunk * size, std::min(numel, (chunk + 1) * size), scratch.data(),
                             partials.data() + chunk * K);
  });
  std::fill(out, out + K, 0.0);
  for (int64_t i = 0; i < count * K; ++i) out[i % K] += partials[i];
  for (int64_t k = 0; k < K; ++k) out[k] = std::sqrt(out[k]);
}

STABLE_TORCH_LIBRARY(mtlfast_skeleton, m) { m.def("norms(Tensor?[] rows, int num_tasks) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(mtlfast_skeleton, CPU, m) { m.impl("norms", TORCH_BOX(&norms_of_rows)); }

}  // namespace mtlfast::stable
