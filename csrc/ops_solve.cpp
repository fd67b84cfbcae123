#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops.h"
#include "solve/solvers.h"

namespace mtlfast {

namespace {

constexpr int64_t kMostTasks = 128;

template <class Method>
at::Tensor solve_with(const at::Tensor& gram, at::ArrayRef<double> params, at::TensorList inputs,
                      const std::optional<at::Tensor>& state, at::OptionalIntArrayRef tasks) {
  const int64_t K = gram.size(-1), groups = K == 0 ? 0 : gram.numel() / (K * K);
  std::vector<int64_t> shape(gram.sizes().begin(), gram.sizes().end() - (Method::square ? 0 : 1));
  at::Tensor out = at::empty(shape, gram.options());
  std::vector<at::Tensor> wide;
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(groups == 0 || input.numel() % groups == 0, "solve: input of ", input.numel(), " elements for ",
                      groups, " groups");
    wide.push_back(input.to(at::kDouble).contiguous());
  }
  const at::Tensor g = gram.contiguous();
  const int64_t each = Method::square ? K * K : K, state_size = state && groups ? state->numel() / groups : 0;
  at::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    std::vector<double> scratch(Method::scratch_size(K));
    std::vector<const double*> data(wide.size());
    for (int64_t group = first; group < last; ++group) {
      const double* matrix = g.const_data_ptr<double>() + group * K * K;
      double* result = out.mutable_data_ptr<double>() + group * each;
      if (!std::all_of(matrix, matrix + K * K, [](double v) { return std::isfinite(v); })) {
        std::fill_n(result, each, std::numeric_limits<double>::quiet_NaN());
        continue;  // the state stays as it was
      }
      for (size_t i = 0; i < wide.size(); ++i)
        data[i] = wide[i].const_data_ptr<double>() + group * (wide[i].numel() / groups);
      Method::solve(solvers::SerialTeam{},
                    solvers::Problem{K, matrix, params.data(), data.data(), static_cast<int64_t>(data.size()),
                                     state ? state->mutable_data_ptr<double>() + group * state_size : nullptr,
                                     tasks ? tasks->data() : nullptr, scratch.data(), result});
    }
  });
  return out;
}

}  // namespace

at::Tensor solve(const at::Tensor& gram, std::string_view method, at::ArrayRef<double> params, at::TensorList inputs,
                 const std::optional<at::Tensor>& state, at::OptionalIntArrayRef tasks) {
  TORCH_CHECK_VALUE(gram.dim() >= 2 && gram.size(-1) == gram.size(-2) && gram.scalar_type() == at::kDouble,
                    "solve: gram has shape ", gram.sizes(), " and dtype ", gram.scalar_type(),
                    ", expected [..., K, K] float64");
  TORCH_CHECK_VALUE(gram.size(-1) <= kMostTasks, "solve: gram has ", gram.size(-1), " tasks, expected at most ",
                    kMostTasks);
  TORCH_CHECK_VALUE(!state || (state->scalar_type() == at::kDouble && state->is_contiguous()),
                    "solve: state must be contiguous float64");
  at::Tensor out;
  const bool found = solvers::visit_solver(std::string(method).c_str(), [&]<class Method>(Method) {
    out = solve_with<Method>(gram, params, inputs, state, tasks);
  });
  TORCH_CHECK_VALUE(found, "solve: no method is named ", method);
  return out;
}

TORCH_LIBRARY_FRAGMENT(mtlfast, m) {
  m.def("solve(Tensor gram, str method, float[] params, Tensor[] inputs, Tensor(a!)? state, int[]? tasks) -> Tensor");
}
TORCH_LIBRARY_IMPL(mtlfast, CPU, m) { m.impl("solve", solve); }

}  // namespace mtlfast
