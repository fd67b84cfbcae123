// The launchers of csrc/cuda behind plain C functions, for Python's ctypes. Each returns nullptr or an error's text.
#include "cuda/launchers.h"
#include "cuda/pack.h"
#include "cuda_emulator.h"
#include "solve/group.h"
#include "solve/solvers.h"

using namespace mtlfast;
using mtlfast::int64_t;

namespace {

// Partial sums start as NaN: whoever reads one that was not written shows it.
struct EmulatedWorkspace {
  explicit EmulatedWorkspace(int64_t partials)
      : memory(new double[partials]), counter(new unsigned[cuda::kCounters]()), workspace{memory.get(), counter.get()} {
    std::fill_n(memory.get(), partials, NAN);
  }
  const char* checked(const char* error) const {
    const bool zero = std::all_of(counter.get(), counter.get() + cuda::kCounters, [](unsigned c) { return c == 0; });
    return !error && !zero ? "a counter of finished blocks is not 0 again" : error;
  }
  std::unique_ptr<double[]> memory;
  std::unique_ptr<unsigned[]> counter;
  cuda::Workspace workspace;
};

const char* gram(const TaskView& grads, int64_t split, bool exact, double* out) {
  const EmulatedWorkspace memory(cuda::gram_partials(grads, split, exact));
  return memory.checked(cuda::gram(grads, split, exact, memory.workspace, out, nullptr));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void emulator_set(uint64_t seed, int most_blocks) {
  emulator::seed = seed;
  emulator::most_blocks = most_blocks;
}

// The kernels that were launched, in order, one a line; forgets them.
const char* emulator_launched() {
  static std::string lines;
  lines.clear();
  for (const std::string& kernel : std::exchange(emulator::launched, {})) lines += kernel + "\n";
  return lines.c_str();
}

const char* emulate_gram(const TaskView* grads, double* out) { return gram(*grads, 0, false, out); }
const char* emulate_gram_exact(const TaskView* grads, double* out) { return gram(*grads, 0, true, out); }
const char* emulate_cross_gram(const TaskView* grads, int64_t split, int exact, double* out) {
  return gram(*grads, split, exact, out);
}
const char* emulate_norms(const TaskView* grads, double* out) {
  const EmulatedWorkspace memory(cuda::norms_partials(*grads));
  return memory.checked(cuda::norms(*grads, memory.workspace, out, nullptr));
}
const char* emulate_gram_plain(const TaskView* grads, double* out) { return cuda::gram_plain(*grads, out, nullptr); }
const char* emulate_combine(const TaskView* grads, const double* coefficients, int64_t num_out, double scale,
                            int accumulate, int out_dtype, void* const* out) {
  return cuda::combine(*grads, coefficients, num_out, scale, accumulate, static_cast<DType>(out_dtype), out, nullptr);
}
const char* emulate_grad_drop(const TaskView* grads, int form, int round_each, const double* leak, const int64_t* seed,
                              const void* const* uniform, const void* const* thresholds, void* const* out) {
  const Dropping dropping{static_cast<Dropping::Form>(form),
                          round_each != 0,
                          leak,
                          reinterpret_cast<const unsigned long long*>(seed),
                          uniform,
                          thresholds};
  return cuda::grad_drop(*grads, dropping, out, nullptr);
}
const char* emulate_trimmed_mean(const TaskView* grads, int64_t trim, void* const* out) {
  return cuda::trimmed_mean(*grads, trim, out, nullptr);
}
const char* emulate_flatten(const TaskView* grads, int out_dtype, void* out) {
  return cuda::flatten(*grads, static_cast<DType>(out_dtype), out, nullptr);
}
const char* emulate_scale(const TaskView* grads, const double* factors) {
  return cuda::scale(*grads, factors, nullptr);
}
const char* emulate_advance(const TaskView* grads, const TaskView* state, const double* coefficients, int square,
                            int out_dtype, void* const* out) {
  return cuda::advance(*grads, *state, coefficients, square, static_cast<DType>(out_dtype), out, nullptr);
}
const char* emulate_excess_risks(const TaskView* grads, const TaskView* sums, double eps, const double* factors,
                                 double* out) {
  const EmulatedWorkspace memory(cuda::excess_risks_partials(*grads));
  return memory.checked(cuda::excess_risks(*grads, *sums, eps, factors, memory.workspace, out, nullptr));
}
int64_t emulator_workspace_size(const char* method, int64_t num_tasks, bool masked) {
  int64_t size = -1;
  solvers::Solvers::visit(method,
                          [&]<class Method>(Method) { size = solvers::workspace_size<Method>(num_tasks, masked); });
  return size;
}
const char* emulate_solve(const cuda::SolveArguments* arguments) { return cuda::solve(*arguments, nullptr); }

}  // extern "C"
#pragma GCC visibility pop
