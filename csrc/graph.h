// Walks the autograd graph to find what losses depend on.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <optional>
#include <utility>
#include <vector>

namespace mtlfast {

// The fields of mtlfast.jacobian._graph.Reached, with the nodes that Python code made instead of their types.
struct Reached {
  std::vector<at::Tensor> leaves;              // those that a tensor depends on and that require grad, each once
  std::vector<bool> by_several;                // for each leaf, whether more than one of the tensors reaches it
  std::vector<std::optional<int64_t>> met_by;  // for each of stop_at, the first tensor that reaches it
  std::vector<std::pair<torch::autograd::Node*, int64_t>> functions;  // each with the first tensor that reaches it
};

// Walks from each tensor in turn, or from behind it, and does not look behind the tensors of stop_at. It visits each
// node at most twice. The tensors must require grad. Nothing may free the nodes meanwhile, or before the nodes in the
// result have been used.
Reached reached_by(at::TensorList tensors, at::TensorList stop_at, bool behind);

// The nodes behind the tensors that have a hook of any kind, but for those that accumulate the gradient of a leaf. The
// tensors must require grad, and nothing may free the nodes before the result has been used.
std::vector<torch::autograd::Node*> hooked(at::TensorList tensors);

}  // namespace mtlfast
