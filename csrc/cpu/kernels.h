// The CPU kernels of one instruction set, and the choice among those that this machine can run.
// Each kernel works on the columns [begin, end) of the Jacobian. The caller spreads such ranges over threads.
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace mtlfast {

struct CpuKernels {
  const char* isa;

  // sums[pair] = sum over the range of g_i * g_j, for all num_pairs(K) pairs; with a split above 0 for the pairs of a
  // row i < split and a row j >= split, [split, K - split]; exact: in float64 throughout. Scratch:
  // gram_scratch(K, dtype) bytes.
  void (*gram)(const TaskView& grads, int64_t begin, int64_t end, int64_t split, bool exact, void* scratch,
               double* sums);
  // sums[k] = sum over the range of g_k * g_k, exact as above. Scratch: gram_scratch(K, dtype) bytes.
  void (*square_sums)(const TaskView& grads, int64_t begin, int64_t end, void* scratch, double* sums);
  int64_t (*gram_scratch)(int64_t num_tasks, DType dtype);

  // out[t][r] (+)= sum_k coefficients[r, k] * g_k over the range; with groups, where R = 1, by the row of the tensor's
  // group. out[t]: [R, numel(t)], of out_dtype. If that is the gradients' dtype, out[t] may be a task's own tensor
  // (R = 1). Scratch: combine_scratch(K, R) bytes.
  void (*combine)(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t num_out,
                  DType out_dtype, bool accumulate, void* scratch, void* const* out);
  int64_t (*combine_scratch)(int64_t num_tasks, int64_t num_out);

  // out[t] = what dropping.h says over the range, in the gradients' dtype; for Purity in float, or double
  // for double gradients. out[t] may be a task's own tensor. Scratch: grad_drop_scratch(K) bytes.
  void (*grad_drop)(const TaskView& grads, int64_t begin, int64_t end, const Dropping& dropping, void* scratch,
                    void* const* out);
  int64_t (*grad_drop_scratch)(int64_t num_tasks);
  // out[t] = the mean of an element's gradients without the `trim` least and the `trim` largest, over the range, for
  // 2 trim < K <= kMostSorted. out[t] may be a task's own tensor. Scratch: trimmed_mean_scratch(K) bytes.
  void (*trimmed_mean)(const TaskView& grads, int64_t begin, int64_t end, int64_t trim, void* scratch,
                       void* const* out);
  int64_t (*trimmed_mean_scratch)(int64_t num_tasks);

  // out[k, c] = g_k[c] over the range, converted to out_dtype; row_stride elements from row to row.
  void (*flatten)(const TaskView& grads, int64_t begin, int64_t end, DType out_dtype, int64_t row_stride, void* out);
  // g_k[c] *= factors[k] over the range.
  void (*scale)(const TaskView& grads, int64_t begin, int64_t end, const double* factors);

  // s_k = keep_k * s_k + take_k * x over the range, in place, with x = g_k or, if `square`, g_k^2; then out[t] = sum_k
  // of_state_k * s_k + of_grads_k * g_k. coefficients: [4, K], in this order. state: K and T as of the gradients, whose
  // offsets it goes by, and any dtype. out[t] is of out_dtype, and may be one of tensor t's gradients of that dtype.
  void (*advance)(const TaskView& grads, const TaskView& state, int64_t begin, int64_t end, const double* coefficients,
                  bool square, DType out_dtype, void* const* out);
  // risks[k] = sum over the range of x / sqrt(h + x + eps), where x = (factors[k] * g_k)^2 and h is the element of
  // sums_k, which has K and T as the gradients, whose offsets it goes by, and any dtype.
  void (*excess_risks)(const TaskView& grads, const TaskView& sums, int64_t begin, int64_t end, double eps,
                       const double* factors, double* risks);

  // Reads the range, `streams` (1 or 4) rows side by side, and returns a checksum. For the benchmark.
  uint32_t (*read)(const TaskView& grads, int64_t begin, int64_t end, int64_t streams);
};

// The widest set of kernels that this build holds and this processor runs. MTLFAST_CPU_CAPABILITY=baseline|avx2|avx512
// chooses another. If it is not available, the result is nullptr and *why is the reason.
const CpuKernels* cpu_kernels(const char** why);

}  // namespace mtlfast
