// The ops behind both doors: the marshalled table (eager calls, bindings.cpp) and the registered schema (traced ones).
// Arguments were checked in mtlfast.ops; what is checked here is what a direct torch.ops call could get wrong.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "task_table.h"

namespace mtlfast {

at::Tensor gram(const TaskTable& grads, bool exact);  // [K, K] float64; exact: no float sums
at::Tensor norms(const TaskTable& grads);             // [K] float64
at::Tensor gram_plain(const TaskTable& grads);        // gram by the slow, obvious CUDA kernel, for tests

// coefficients: [K] -> T tensors [*shape]; [R, K] -> T tensors [R, *shape]; scaled by `scale`. dtype: of new outputs,
// the gradients' if none is given; given outputs share one of their own.
std::vector<at::Tensor> combine(const TaskTable& grads, const at::Tensor& coefficients, double scale,
                                std::optional<at::ScalarType> dtype);
void combine_(const TaskTable& grads, const at::Tensor& coefficients, at::TensorList out, bool accumulate,
              double scale);

at::Tensor flatten(const TaskTable& grads, at::ScalarType dtype);  // [K, P]
void scale_(const TaskTable& grads, const at::Tensor& factors);    // factors: [K]

// gram: [..., K, K] -> [..., K], or [..., K, K] for a method of coefficients. See solve/solvers.h for the methods:
// params and inputs come in the order in which the method names them, an absent input as nullopt or, at the end, not at
// all. mask: [..., K] bool, which tasks have a part; the others' results are zeros.
at::Tensor solve(const at::Tensor& gram, std::string_view method, at::ArrayRef<double> params,
                 const c10::List<std::optional<at::Tensor>>& inputs, const std::optional<at::Tensor>& state,
                 at::OptionalIntArrayRef tasks, const std::optional<at::Tensor>& mask);

// What a solver says about itself, for Python, whose own table is tested against it.
struct SolverFacts {
  std::string name, params, inputs;  // params and inputs: names, comma-separated
  std::vector<int64_t> input_sizes;  // for that number of tasks, likewise state_size
  int64_t state_size;
  bool square;
};
std::vector<SolverFacts> solver_facts(int64_t num_tasks);

// Reads all gradients and keeps nothing, `streams` (1 or 4) rows side by side: what the benchmark calls 100 %.
uint32_t read(const TaskTable& grads, int64_t streams);

}  // namespace mtlfast
