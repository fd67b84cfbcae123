// What losses depend on: a walk of the autograd graph.
#pragma once
#include <ATen/core/Tensor.h>

#include <set>
#include <string>
#include <vector>

namespace mtlfast {

struct Reached {
  std::vector<at::Tensor> leaves;   // that any loss depends on and that want a gradient, each once, as they were found
  std::set<std::string> functions;  // the names of the nodes that Python code made
};

// A visit of each node of the graph of losses that require grad. The nodes must not be freed meanwhile.
Reached reached_by(at::TensorList losses);

}  // namespace mtlfast
