#include "combine.cuh"
#include "instances.h"
#include "launch.h"
#include "launchers.h"
#include "pack.h"

namespace mtlfast::cuda {

namespace {

template <class T, class Out>
const char* launch_combine(const Table& table, const Outputs& outputs, void* stream) {
  if (table.num_chunks == 0) return nullptr;
  const int blocks = blocks_to_fill(table.num_chunks);
  const int shared_bytes = outputs.num_out * outputs.num_tasks * static_cast<int>(sizeof(double));
  if (outputs.num_out % kOutsAtOnce == 0)
    return launch<combine_kernel<T, Out, kOutsAtOnce>>(dim3(blocks), kThreads, shared_bytes, stream, table, outputs);
  return launch<combine_kernel<T, Out, 1>>(dim3(blocks), kThreads, shared_bytes, stream, table, outputs);
}

static_assert(kMostCombined + 1 == kMostRows, "the tasks and the output fit one entry");

// The task whose gradients are the outputs for every tensor, or -1. If there is one, tables need no place for outputs.
int64_t task_of_outputs(const TaskView& grads, void* const* out) {
  for (int64_t k = 0; k < grads.num_tasks; ++k) {
    bool all = true;
    for (int64_t t = 0; t < grads.num_tensors && all; ++t)
      all = grads.offsets[t + 1] == grads.offsets[t] || grads.tensor(t)[k] == out[t];
    if (all) return k;
  }
  return -1;
}

}  // namespace

const char* combine(const TaskView& grads, const double* coefficients, int64_t num_out, double scale, bool accumulate,
                    DType out_dtype, void* const* out, void* stream) {
  const int64_t K = grads.num_tasks, most = K < kMostWeights ? kMostWeights / K : 1;
  const int64_t own = num_out == 1 ? task_of_outputs(grads, out) : -1;
  Outputs outputs{coefficients, scale, static_cast<int>(K), static_cast<int>(own < 0 ? K : own), 0, 0, accumulate};
  const auto launch_outputs = [&](const Table& table, bool, bool) {
    const char* error = nullptr;
    // A launch computes as many outputs as shared memory has room for weights, if possible a multiple of four.
    for (int64_t r = 0, count; r < num_out && !error; r += count) {
      count = num_out - r < most ? num_out - r : most;
      if (count > kOutsAtOnce) count -= count % kOutsAtOnce;
      outputs.first_out = static_cast<int>(r);
      outputs.num_out = static_cast<int>(count);
      error = visit(grads.dtype, [&]<class T>(T) {
        return visit(out_dtype, [&]<class Out>(Out) { return launch_combine<T, Out>(table, outputs, stream); });
      });
    }
    return error;
  };
  Packer<decltype(launch_outputs)> packer(own < 0 ? K + 1 : K, launch_outputs);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void* const* rows = grads.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    if (numel == 0) continue;
    unsigned long long places = reinterpret_cast<unsigned long long>(out[t]);
    if (num_out > 1) places |= static_cast<unsigned long long>(numel * item_size(out_dtype));
    packer.add(numel, tag_of(grads, t, widest_access(rows, K) | widest_access(places) << 5),
               [&](int r) { return r < K ? rows[r] : out[t]; });
  }
  return packer.finish();
}

}  // namespace mtlfast::cuda
