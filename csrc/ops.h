// The ops. Eager calls reach them with a marshalled table (bindings.cpp), traced calls through the registered schema.
// mtlfast.ops has checked the arguments. The checks here are for direct calls of torch.ops.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "groups.h"
#include "task_table.h"

namespace mtlfast {

// [K, K] float64; with a split above 0 the products of the rows before it with those from it on, [split, K - split].
// exact: sums in float64. With groups, one of num_groups for each tensor, each group has a matrix of its own: [G, ...].
at::Tensor gram(const TaskTable& grads, bool exact, int64_t split, GroupOfTensors groups, int64_t num_groups);
at::Tensor norms(const TaskTable& grads, GroupOfTensors groups, int64_t num_groups);  // [K] or [G, K] float64
at::Tensor gram_plain(const TaskTable& grads);  // all products, by a plain slow CUDA kernel, for tests

// coefficients [K] give T tensors [*shape], and [R, K] give T tensors [R, *shape]; all are multiplied by `scale`. dtype
// is that of new outputs; without one they have the gradients' dtype. Given outputs may share another dtype. With
// groups, one for each tensor, coefficients are [G, K], weights for each group, and give T tensors [*shape].
std::vector<at::Tensor> combine(const TaskTable& grads, const at::Tensor& coefficients, double scale,
                                std::optional<at::ScalarType> dtype, GroupOfTensors groups);
void combine_(const TaskTable& grads, const at::Tensor& coefficients, at::TensorList out, bool accumulate, double scale,
              GroupOfTensors groups);

// What grad_drop takes besides the gradients and the outputs; form: drawn, given, expected or purity (dropping.h).
struct DropArguments {
  std::string_view form;
  bool round_each;
  const std::optional<at::Tensor>& seed;  // one int64 number, for drawn
  at::TensorList uniform, thresholds;     // float, or double for double gradients; empty: absent
  const std::optional<at::Tensor>& leak;  // [K]
};
std::vector<at::Tensor> grad_drop(const TaskTable& grads, const DropArguments& arguments);
void grad_drop_(const TaskTable& grads, const DropArguments& arguments, at::TensorList out);

// At most kMostSorted tasks; 2 trim_number < K.
std::vector<at::Tensor> trimmed_mean(const TaskTable& grads, int64_t trim_number);
void trimmed_mean_(const TaskTable& grads, int64_t trim_number, at::TensorList out);

at::Tensor flatten(const TaskTable& grads, at::ScalarType dtype);  // [K, P]
void scale_(const TaskTable& grads, const at::Tensor& factors);    // factors: [K]

// The state of K tasks in place, and T outputs [*shape]: mtlfast/ops/advance.py has the formula. coefficients: [4, K],
// keep, take, of_state and of_grads.
void advance_(const TaskTable& grads, const TaskTable& state, const at::Tensor& coefficients, bool square,
              at::TensorList out);
// [K] float64: mtlfast/ops/excess_risks.py has the formula. factors: [K].
at::Tensor excess_risks(const TaskTable& grads, const TaskTable& sums, double eps, const at::Tensor& factors);

// From gram [..., K, K] to weights [..., K], or to [..., K, K] for a method of coefficients. solve/solvers.h lists the
// methods. params and inputs come in the order in which the method names them. An absent input is nullopt, or is left
// out at the end. mask: [..., K] bool; a task whose entry is false is left out, and its result is 0.
at::Tensor solve(const at::Tensor& gram, std::string_view method, at::ArrayRef<double> params,
                 const c10::List<std::optional<at::Tensor>>& inputs, const std::optional<at::Tensor>& state,
                 at::OptionalIntArrayRef tasks, const std::optional<at::Tensor>& mask);

// A solver's names and sizes. The tests compare Python's table with them.
struct SolverFacts {
  std::string name, params, inputs;  // params and inputs: names, comma-separated
  std::vector<int64_t> input_sizes;  // for the number of tasks that was asked for, as is state_size
  int64_t state_size;
  bool square;
};
std::vector<SolverFacts> solver_facts(int64_t num_tasks);

// Reads all gradients, `streams` (1 or 4) rows side by side, and keeps nothing. The benchmark measures against it.
uint32_t read(const TaskTable& grads, int64_t streams);

}  // namespace mtlfast
