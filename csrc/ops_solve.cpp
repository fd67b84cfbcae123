#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "device.h"
#include "ops.h"
#include "solve/solvers.h"

namespace mtlfast {

namespace {

// What a solve works on, all float64 and contiguous, group after group.
struct Call {
  int64_t K, groups;
  at::Tensor gram, out;
  std::vector<at::Tensor> inputs;
  std::vector<const double*> input_data;
  std::vector<int64_t> input_sizes;  // of one group
  at::ArrayRef<double> params;
  double* state;
  int64_t state_size;
  const int64_t* tasks;
};

bool all_finite(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double v) { return std::isfinite(v); });
}

// What a solver takes for granted, or it would read or write beyond its arguments.
template <class Method>
void check_arguments(const Call& call, std::string_view method) {
  TORCH_CHECK_VALUE(call.params.size() == Method::num_params, "solve: ", method, " got ", call.params.size(),
                    " params, expected ", Method::num_params);
  const int64_t size = Method::input_size(static_cast<int>(call.K));
  TORCH_CHECK_VALUE(call.inputs.size() <= (size > 0 ? 1u : 0u), "solve: ", method, " got ", call.inputs.size(),
                    " inputs, expected ", size > 0 ? "one" : "none");
  TORCH_CHECK_VALUE(!call.inputs.empty() || !Method::needs_input(call.params.data()), "solve: ", method,
                    " got no input, expected one");
  for (int64_t of_group : call.input_sizes)
    TORCH_CHECK_VALUE(call.groups == 0 || of_group == size, "solve: ", method, " got an input of ", of_group,
                      " elements a group, expected ", size);
  int64_t known = call.K;
  for (int64_t k = 0; call.tasks && k < call.K; ++k) {
    TORCH_CHECK_VALUE(call.tasks[k] >= 0, "solve: task ", call.tasks[k], ", expected an index");
    TORCH_CHECK_VALUE(std::find(call.tasks, call.tasks + k, call.tasks[k]) == call.tasks + k, "solve: task ",
                      call.tasks[k], " is there twice, expected each once");
    known = std::max(known, call.tasks[k] + 1);
  }
  const int64_t least = Method::state_size(static_cast<int>(known));
  TORCH_CHECK_VALUE(call.groups == 0 || call.state_size >= least, "solve: ", method, " got a state of ",
                    call.state_size, " elements a group, expected at least ", least);
}

template <class Method>
void solve_on_cpu(const Call& call) {
  const int64_t K = call.K, each = Method::square ? K * K : K;
  at::parallel_for(0, call.groups, 1, [&](int64_t first, int64_t last) {
    std::vector<double> scratch(Method::scratch_size(K));
    std::vector<const double*> inputs(call.inputs.size());
    for (int64_t group = first; group < last; ++group) {
      const double* matrix = call.gram.const_data_ptr<double>() + group * K * K;
      double* result = call.out.mutable_data_ptr<double>() + group * each;
      bool finite = all_finite(matrix, K * K);
      for (size_t i = 0; i < inputs.size(); ++i) {
        inputs[i] = call.input_data[i] + group * call.input_sizes[i];
        finite = finite && all_finite(inputs[i], call.input_sizes[i]);
      }
      if (!finite) {
        std::fill_n(result, each, std::numeric_limits<double>::quiet_NaN());
        continue;  // the state stays as it was
      }
      solvers::Problem problem{static_cast<int>(K), matrix, call.params.data(), inputs.data(),
                               static_cast<int>(inputs.size())};
      problem.state = call.state ? call.state + group * call.state_size : nullptr;
      problem.state_size = static_cast<int>(call.state_size);
      problem.tasks = call.tasks;
      problem.scratch = scratch.data();
      problem.out = result;
      Method::solve(solvers::SerialTeam{}, problem);
    }
  });
}

template <class Method>
void solve_on_gpu(const Call& call) {
  const at::Tensor scratch = at::empty({call.groups * Method::scratch_size(call.K)}, call.gram.options());
  on_gpu("solve", call.gram.device(), [&](void* stream) {
    return cuda::solve({Method::name, call.groups, call.K, call.gram.const_data_ptr<double>(), call.params.data(),
                        static_cast<int64_t>(call.params.size()), call.input_data.data(), call.input_sizes.data(),
                        static_cast<int64_t>(call.inputs.size()), call.state, call.state_size, call.tasks,
                        scratch.mutable_data_ptr<double>(), call.out.mutable_data_ptr<double>()},
                       stream);
  });
}

}  // namespace

at::Tensor solve(const at::Tensor& gram, std::string_view method, at::ArrayRef<double> params, at::TensorList inputs,
                 const std::optional<at::Tensor>& state, at::OptionalIntArrayRef tasks) {
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) == gram.size(-2) && gram.scalar_type() == at::kDouble,
                    "solve: gram has shape ", gram.sizes(), " and dtype ", gram.scalar_type(),
                    ", expected [..., K, K] float64");
  TORCH_CHECK_VALUE(gram.size(-1) <= solvers::kMostTasks, "solve: gram has ", gram.size(-1),
                    " tasks, expected at most ", solvers::kMostTasks);
  TORCH_CHECK_VALUE(
      !state || (state->scalar_type() == at::kDouble && state->is_contiguous() && state->device() == gram.device()),
      "solve: state must be contiguous float64 on gram's device");
  const int64_t K = gram.size(-1), groups = K == 0 ? 0 : gram.numel() / (K * K);
  Call call{K, groups, gram.contiguous(), {}, {}, {}, {}, params, nullptr, 0, tasks ? tasks->data() : nullptr};
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(groups == 0 || input.numel() % groups == 0, "solve: input of ", input.numel(), " elements for ",
                      groups, " groups");
    TORCH_CHECK_VALUE(input.device() == gram.device(), "solve: an input is on ", input.device(), ", expected ",
                      gram.device(), " as gram");
    call.inputs.push_back(input.to(at::kDouble).contiguous());
    call.input_data.push_back(call.inputs.back().const_data_ptr<double>());
    call.input_sizes.push_back(groups ? input.numel() / groups : 0);
  }
  if (state) call.state = state->mutable_data_ptr<double>();
  if (state && groups) call.state_size = state->numel() / groups;
  TORCH_CHECK_VALUE(!tasks || static_cast<int64_t>(tasks->size()) == K, "solve: got ", tasks ? tasks->size() : 0,
                    " tasks, expected ", K, " as gram has");
  const bool found = solvers::visit_solver(std::string(method).c_str(), [&]<class Method>(Method) {
    check_arguments<Method>(call, method);
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

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("solve(Tensor gram, str method, float[] params, Tensor[] inputs, Tensor(a!)? state, int[]? tasks) -> Tensor");
}
MTLFAST_IMPL(m) { m.impl("solve", solve); }

}  // namespace mtlfast
