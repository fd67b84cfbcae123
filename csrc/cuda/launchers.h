// What the glue calls on a GPU. It includes neither a torch nor a CUDA header, so a stream is passed as a void pointer.
#pragma once
#include "../kernels.h"

namespace mtlfast::cuda {

// All but the last few return nullptr or an error text. Pointers, also those in a TaskView, point to memory of the
// current device unless a comment says otherwise; `stream` is a cudaStream_t.

// Memory for gram and norms: `partials` uninitialised doubles, and kCounters counters that are 0 before and after the
// call. So calls that one stream runs one after another can share them.
constexpr int kCounters = 1360;  // one for each entry of a table
struct Workspace {
  double* partials;
  unsigned* counter;
};
constexpr int64_t kMostGroups = 1 << 21;  // of tensors, for the ops that take groups
int64_t gram_partials(const TaskView& grads, int64_t split, bool exact);
int64_t norms_partials(const TaskView& grads);

// out: [K, K]; with a split above 0 the products of the tasks before it with those from it on, [split, K - split].
// exact: sums in float64 throughout. With groups out is [G, ...]; of a group without elements nothing is written.
const char* gram(const TaskView& grads, int64_t split, bool exact, const Workspace& workspace, double* out,
                 void* stream);
const char* norms(const TaskView& grads, const Workspace& workspace, double* out,
                  void* stream);  // out: [K]; with groups [G, K], the squares of the norms
const char* gram_plain(const TaskView& grads, double* out, void* stream);  // out: [K, K], by a plain slow kernel

constexpr int64_t kMostCombined = 4077;  // tasks that combine takes: one table has all their addresses in a row

// With groups coefficients are [G, K], num_out = 1. out[t]: [R, numel of t] of out_dtype, num_out = R; with R = 1 it
// may be one of tensor t's gradients of that dtype.
const char* combine(const TaskView& grads, const double* coefficients, int64_t num_out, double scale, bool accumulate,
                    DType out_dtype, void* const* out, void* stream);

// out[t]: of the gradients' dtype, or for purities float, and double for double gradients; it may be one of tensor t's
// gradients of that dtype. The pointers in `dropping` are those of tensors, in host memory.
const char* grad_drop(const TaskView& grads, const Dropping& dropping, void* const* out, void* stream);
constexpr int64_t kMostDropped = 4074;  // tasks that grad_drop takes: an entry holds four more words

// out[t] as above; K <= kMostSorted and 2 trim < K.
const char* trimmed_mean(const TaskView& grads, int64_t trim, void* const* out, void* stream);

const char* flatten(const TaskView& grads, DType out_dtype, void* out, void* stream);  // out: [K, P]
const char* scale(const TaskView& grads, const double* factors, void* stream);

constexpr int64_t kMostAdvanced = 1024;  // tasks that advance takes: shared memory holds four numbers of each

// As CpuKernels::advance, for the whole Jacobian. If a coefficient is not finite, the state stays and the outputs are
// NaN.
const char* advance(const TaskView& grads, const TaskView& state, const double* coefficients, bool square,
                    DType out_dtype, void* const* out, void* stream);

// As CpuKernels::excess_risks, for the whole Jacobian, with memory as for norms. risks: [K].
int64_t excess_risks_partials(const TaskView& grads);
const char* excess_risks(const TaskView& grads, const TaskView& sums, double eps, const double* factors,
                         const Workspace& workspace, double* risks, void* stream);

// One method of solve/solvers.h on `groups` Gram matrices. Arrays are those of solve::Problem, one group after another.
struct SolveArguments {
  const char* method;
  int64_t groups, num_tasks;
  const double* gram;           // [groups, K, K]
  const double* params;         // host memory, one for each name of the method
  const double* const* inputs;  // host memory: device pointers, nullptr for an absent input
  double* state;                // or nullptr
  int64_t state_size;
  const int64_t* tasks;  // host memory, or nullptr
  const bool* mask;      // [groups, K], which tasks take part; nullptr: all
  double* workspace;     // [groups, solvers::workspace_size]
  double* out;
};
const char* solve(const SolveArguments& arguments, void* stream);

// The counters for the Workspace of calls on this stream; nullptr: the caller must allocate them.
unsigned* counter_of(void* stream);

// Returns nullptr if kernels can run on the current device, or the name of the error. Nothing is launched, so the call
// may come inside a capture.
const char* kernel_error();

// Facts for `python -m mtlfast info`.
int runtime_version();                 // 13000 = CUDA 13.0
int driver_version();                  // the newest CUDA that the driver serves; 0 without one
const char* device_count(int* count);  // returns nullptr, or why no device can be used

}  // namespace mtlfast::cuda
