#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "device.h"
#include "ops.h"
#include "solve/group.h"
#include "solve/solvers.h"
#include "threads.h"

namespace mtlfast {

namespace {

// The arrays of a solve, all float64 and contiguous, one group after the other.
struct Call {
  int64_t K, groups;
  at::Tensor gram, out;
  at::ArrayRef<double> params;
  std::vector<at::Tensor> inputs;         // undefined: absent
  std::vector<const double*> input_data;  // nullptr: absent
  double* state;
  int64_t state_size;
  const int64_t* tasks;
  const bool* mask;
};

// One slot for each input that the method names. An input that is not float64 and contiguous is copied.
template <class Method>
void take_inputs(Call& call, const c10::List<std::optional<at::Tensor>>& inputs) {
  TORCH_CHECK_VALUE(inputs.size() <= Method::Input::count, "solve: ", Method::name, " got ", inputs.size(),
                    " inputs, expected at most ", static_cast<int>(Method::Input::count));
  call.inputs.resize(Method::Input::count);
  call.input_data.resize(Method::Input::count);
  for (int i = 0; i < Method::Input::count; ++i) {
    const std::optional<at::Tensor> input = i < static_cast<int>(inputs.size()) ? inputs.get(i) : std::nullopt;
    TORCH_CHECK_VALUE(input || !Method::needs_input(i, call.params.data()), "solve: ", Method::name, " got no input ",
                      i, ", expected one");
    if (!input) continue;
    const int64_t size = Method::input_size(i, static_cast<int>(call.K));
    TORCH_CHECK_VALUE(call.groups == 0 || input->numel() == call.groups * size, "solve: ", Method::name, " got input ",
                      i, " of ", input->numel(), " elements, expected ", size, " for each of ", call.groups, " groups");
    TORCH_CHECK_VALUE(input->device() == call.gram.device(), "solve: an input is on ", input->device(), ", expected ",
                      call.gram.device(), " as gram");
    call.inputs[i] = input->to(at::kDouble).contiguous();
    call.input_data[i] = call.inputs[i].const_data_ptr<double>();
  }
}

// Checks what a solver assumes of tasks and state, because it would otherwise read or write beyond them.
template <class Method>
void check_state(const Call& call) {
  int64_t known = call.K;
  for (int64_t k = 0; call.tasks && k < call.K; ++k) {
    TORCH_CHECK_VALUE(call.tasks[k] >= 0, "solve: task ", call.tasks[k], ", expected an index");
    TORCH_CHECK_VALUE(std::find(call.tasks, call.tasks + k, call.tasks[k]) == call.tasks + k, "solve: task ",
                      call.tasks[k], " is there twice, expected each once");
    known = std::max(known, call.tasks[k] + 1);
  }
  const int64_t least = Method::state_size(static_cast<int>(known));
  TORCH_CHECK_VALUE(call.groups == 0 || call.state_size >= least, "solve: ", Method::name, " got a state of ",
                    call.state_size, " elements a group, expected at least ", least);
}

template <class Method>
void solve_on_cpu(const Call& call) {
  constexpr int kInputs = Method::Input::count;
  const int64_t K = call.K, each = Method::square ? K * K : K;
  std::vector<int> sizes(kInputs);
  for (int i = 0; i < kInputs; ++i) sizes[i] = Method::input_size(i, static_cast<int>(K));
  at::parallel_for(0, call.groups, num_threads() > 1 ? 1 : call.groups, [&](int64_t first, int64_t last) {
    std::vector<double> workspace(solvers::workspace_size<Method>(K, call.mask));
    std::vector<const double*> inputs(kInputs);
    for (int64_t group = first; group < last; ++group) {
      for (int i = 0; i < kInputs; ++i)
        inputs[i] = call.input_data[i] ? call.input_data[i] + group * sizes[i] : nullptr;
      const double* matrix = call.gram.const_data_ptr<double>() + group * K * K;
      solvers::Problem problem{static_cast<int>(K), matrix, call.params.data(), inputs.data()};
      problem.state = call.state ? call.state + group * call.state_size : nullptr;
      problem.state_size = static_cast<int>(call.state_size);
      problem.tasks = call.tasks;
      problem.out = call.out.mutable_data_ptr<double>() + group * each;
      solvers::solve_group<Method>(solvers::SerialTeam{}, problem, sizes.data(),
                                   call.mask ? call.mask + group * K : nullptr,
                                   {workspace.data(), call.mask ? solvers::packed_size<Method>(K) : 0});
    }
  });
}

template <class Method>
void solve_on_gpu(const Call& call) {
  const int64_t size = call.groups * solvers::workspace_size<Method>(call.K, call.mask);
  const at::Tensor workspace = at::empty({size}, call.gram.options());
  on_gpu("solve", call.gram.device(), [&](void* stream) {
    return cuda::solve({Method::name, call.groups, call.K, call.gram.const_data_ptr<double>(), call.params.data(),
                        call.input_data.data(), call.state, call.state_size, call.tasks, call.mask,
                        workspace.mutable_data_ptr<double>(), call.out.mutable_data_ptr<double>()},
                       stream);
  });
}

}  // namespace

at::Tensor solve(const at::Tensor& gram, std::string_view method, at::ArrayRef<double> params,
                 const c10::List<std::optional<at::Tensor>>& inputs, const std::optional<at::Tensor>& state,
                 at::OptionalIntArrayRef tasks, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) == gram.size(-2) && gram.scalar_type() == at::kDouble,
                    "solve: gram has shape ", gram.sizes(), " and dtype ", gram.scalar_type(),
                    ", expected [..., K, K] float64");
  const int64_t most = gram.is_cuda() ? solvers::kMostTasks : solvers::kMostTasksOnCpu;
  TORCH_CHECK_VALUE(gram.size(-1) <= most, "solve: gram has ", gram.size(-1), " tasks, expected at most ", most);
  TORCH_CHECK_VALUE(
      !state || (state->scalar_type() == at::kDouble && state->is_contiguous() && state->device() == gram.device()),
      "solve: state must be contiguous float64 on gram's device");
  const int64_t K = gram.size(-1), groups = K == 0 ? 0 : gram.numel() / (K * K);
  Call call{K, groups, gram.contiguous(), {}, params, {}, {}, nullptr, 0, tasks ? tasks->data() : nullptr, nullptr};
  if (state) call.state = state->mutable_data_ptr<double>();
  if (state && groups) call.state_size = state->numel() / groups;
  TORCH_CHECK_VALUE(!state || call.state_size * groups == state->numel() || groups == 0, "solve: got a state of ",
                    state ? state->numel() : 0, " elements, expected as many for each of ", groups, " groups");
  TORCH_CHECK_VALUE(!tasks || static_cast<int64_t>(tasks->size()) == K, "solve: got ", tasks ? tasks->size() : 0,
                    " tasks, expected ", K, " as gram has");
  at::Tensor dense_mask;
  if (mask) {
    TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->device() == gram.device() &&
                          mask->sizes() == gram.sizes().slice(0, gram.dim() - 1),
                      "solve: mask is ", mask->sizes(), " ", mask->scalar_type(), " on ", mask->device(),
                      ", expected gram's shape without its last dimension, bool on ", gram.device());
    dense_mask = mask->contiguous();
    call.mask = dense_mask.const_data_ptr<bool>();
  }
  const bool found = solvers::Solvers::visit(std::string(method).c_str(), [&]<class Method>(Method) {
    TORCH_CHECK_VALUE(params.size() == Method::Param::count, "solve: ", method, " got ", params.size(),
                      " params, expected ", static_cast<int>(Method::Param::count));
    take_inputs<Method>(call, inputs);
    check_state<Method>(call);
    std::vector<int64_t> shape(gram.sizes().begin(), gram.sizes().end() - (Method::square ? 0 : 1));
    call.out = at::empty(shape, gram.options());
    if (gram.is_cpu())
      solve_on_cpu<Method>(call);
    else if (groups > 0)
      solve_on_gpu<Method>(call);
  });
  TORCH_CHECK_VALUE(found, "solve: no method is named ", method);
  return call.out;
}

std::vector<SolverFacts> solver_facts(int64_t num_tasks) {
  const int K = static_cast<int>(num_tasks);
  std::vector<SolverFacts> facts;
  solvers::Solvers::for_each([&]<class Method>(Method) {
    std::vector<int64_t> sizes;
    for (int i = 0; i < Method::Input::count; ++i) sizes.push_back(Method::input_size(i, K));
    facts.push_back(
        {Method::name, Method::Param::names, Method::Input::names, sizes, Method::state_size(K), Method::square});
  });
  return facts;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def(
      "solve(Tensor gram, str method, float[] params, Tensor?[] inputs, Tensor(a!)? state, int[]? tasks, "
      "Tensor? mask=None) -> Tensor");
}
MTLFAST_IMPL(m) { m.impl("solve", solve); }

}  // namespace mtlfast
