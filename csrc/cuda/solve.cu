#include "../solve/solvers.h"
#include "launch.h"
#include "launchers.h"
#include "solve.cuh"

namespace mtlfast::cuda {

const char* solve(const SolveArguments& arguments, void* stream) {
  const SolveArguments& a = arguments;
  if (a.num_tasks > solvers::kMostTasks) return "more tasks than solvers take";
  if (a.num_params > kMostParams || a.num_inputs > kMostInputs) return "more params or inputs than the kernel takes";
  Groups groups{};
  groups.num_tasks = static_cast<int>(a.num_tasks);
  groups.num_inputs = static_cast<int>(a.num_inputs);
  groups.gram = a.gram;
  for (int64_t i = 0; i < a.num_params; ++i) groups.params[i] = a.params[i];
  for (int64_t i = 0; i < a.num_inputs; ++i) {
    groups.inputs[i] = a.inputs[i];
    groups.input_sizes[i] = static_cast<int>(a.input_sizes[i]);
  }
  groups.state = a.state;
  groups.state_size = static_cast<int>(a.state_size);
  groups.has_tasks = a.tasks != nullptr;
  for (int64_t k = 0; a.tasks && k < a.num_tasks; ++k) groups.tasks[k] = a.tasks[k];
  groups.scratch = a.scratch;
  groups.out = a.out;
  const char* error = "no method has that name";
  solvers::visit_solver(a.method, [&]<class Method>(Method) {
    groups.out_size = groups.num_tasks * (Method::square ? groups.num_tasks : 1);
    groups.scratch_size = static_cast<int>(Method::scratch_size(groups.num_tasks));
    error = launch<solve_kernel<Method>>(dim3(static_cast<unsigned>(a.groups)), kSolveThreads, 0, stream, groups);
  });
  return error;
}

}  // namespace mtlfast::cuda
