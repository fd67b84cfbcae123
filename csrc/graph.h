// Walks the autograd graph to find the leaves that losses depend on.
#pragma once
#include <ATen/core/Tensor.h>

#include <set>
#include <string>
#include <vector>

namespace mtlfast {

struct Reached {
  std::vector<at::Tensor> leaves;   // those that a loss depends on and that require grad, each once
  std::vector<bool> by_several;     // for each leaf: whether more than one loss depends on it
  std::vector<bool> met;            // for each tensor of stop_at: whether a loss depends on it
  std::set<std::string> functions;  // the names of the nodes that Python code made
};

// Walks the graph from each loss in turn. A node is visited once for the first loss that reaches it and once more for
// the second, however many there are. `behind`: start behind the node of each loss instead of at it. The walk does not
// go through the tensors of stop_at. All tensors must require grad, and nothing may free the nodes meanwhile.
Reached reached_by(at::TensorList losses, at::TensorList stop_at, bool behind);

}  // namespace mtlfast
