#include "../solve/solvers.h"
#include "launch.h"
#include "launchers.h"
#include "solve.cuh"

namespace mtlfast::cuda {

const char* solve(const SolveArguments& arguments, void* stream) {
  const SolveArguments& a = arguments;
  if (a.num_tasks > solvers::kMostTasks) return "more tasks than solvers take";
  Groups groups{};
  groups.num_tasks = static_cast<int>(a.num_tasks);
  groups.gram = a.gram;
  groups.state = a.state;
  groups.state_size = static_cast<int>(a.state_size);
  groups.has_tasks = a.tasks != nullptr;
  for (int64_t k = 0; a.tasks && k < a.num_tasks; ++k) groups.tasks[k] = a.tasks[k];
  groups.mask = a.mask;
  groups.workspace = a.workspace;
  groups.out = a.out;
  const char* error = "no method has that name";
  solvers::Solvers::visit(a.method, [&]<class Method>(Method) {
    static_assert(Method::Param::count <= kMostParams && Method::Input::count <= kMostInputs);
    for (int i = 0; i < Method::Param::count; ++i) groups.params[i] = a.params[i];
    for (int i = 0; i < Method::Input::count; ++i) {
      groups.inputs[i] = a.inputs[i];
      groups.input_sizes[i] = Method::input_size(i, groups.num_tasks);
    }
    groups.out_size = groups.num_tasks * (Method::square ? groups.num_tasks : 1);
    groups.packed_size = a.mask ? static_cast<int>(solvers::packed_size<Method>(a.num_tasks)) : 0;
    groups.workspace_size = solvers::workspace_size<Method>(a.num_tasks, a.mask);
    error = launch<solve_kernel<Method>>(dim3(static_cast<unsigned>(a.groups)), kSolveThreads, 0, stream, groups);
  });
  return error;
}

}  // namespace mtlfast::cuda
