// Walks the autograd graph to find the leaves that losses depend on.
#pragma once
#include <ATen/core/Tensor.h>

#include <set>
#include <string>
#include <vector>

namespace mtlfast {

struct Reached {
  std::vector<at::Tensor> leaves;   // those that a loss depends on and that require grad, each once
  std::set<std::string> functions;  // the names of the nodes that Python code made
};

// Visits each node of the graph once. The losses must require grad, and nothing may free the nodes meanwhile.
Reached reached_by(at::TensorList losses);

}  // namespace mtlfast
