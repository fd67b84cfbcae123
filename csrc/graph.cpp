#include "graph.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <string_view>
#include <typeinfo>
#include <unordered_set>

namespace mtlfast {

namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// torch does not export the type of the nodes that Python code makes, so they are recognised by their type's name. To
// ask each node for its own name would take longer than the rest of the walk.
bool made_by_python(const Node& node) { return std::string_view(typeid(node).name()) == "N5torch8autograd6PyNodeE"; }

}  // namespace

Reached reached_by(at::TensorList losses) {
  Reached found;
  std::unordered_set<const void*> seen;  // nodes, and leaves
  std::vector<Node*> waiting;
  const auto take_leaf = [&](const at::Tensor& leaf) {
    if (leaf.requires_grad() && seen.insert(leaf.unsafeGetTensorImpl()).second) found.leaves.push_back(leaf);
  };
  for (const at::Tensor& loss : losses) {
    if (loss.grad_fn())
      waiting.push_back(loss.grad_fn().get());
    else
      take_leaf(loss);
  }
  while (!waiting.empty()) {
    Node* node = waiting.back();
    waiting.pop_back();
    if (!seen.insert(node).second) continue;
    if (typeid(*node) == typeid(AccumulateGrad)) {
      take_leaf(static_cast<AccumulateGrad*>(node)->variable);
      continue;
    }
    if (made_by_python(*node)) found.functions.insert(node->name());
    for (const auto& edge : node->next_edges())
      if (edge.function) waiting.push_back(edge.function.get());
  }
  return found;
}

}  // namespace mtlfast
