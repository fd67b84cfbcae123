#include "graph.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <map>
#include <string_view>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>

namespace mtlfast {

namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::impl::gradient_edge;

// The mark of a place that more than one tensor reaches. Another mark is the number of the one tensor that does.
constexpr int64_t kSeveral = -1;

// torch does not export the type of the nodes that Python code makes, so they are recognised by their type's name. To
// ask each node for its own name would take longer than the rest of the walk.
bool made_by_python(const Node& node) { return std::string_view(typeid(node).name()) == "N5torch8autograd6PyNodeE"; }

// The leaf whose gradient the node accumulates; nullptr for any other node.
const at::Tensor* leaf_of(const Node* node) {
  return typeid(*node) == typeid(AccumulateGrad) ? &static_cast<const AccumulateGrad*>(node)->variable : nullptr;
}

// What a node is recognised by: itself, or its leaf, because several nodes may accumulate the gradient of one leaf.
const void* place_of(const Node* node) {
  const at::Tensor* leaf = leaf_of(node);
  return leaf ? static_cast<const void*>(leaf->unsafeGetTensorImpl()) : node;
}

}  // namespace

Reached reached_by(at::TensorList tensors, at::TensorList stop_at, bool behind) {
  Reached found;
  found.met_by.resize(stop_at.size());
  using Key = std::pair<const void*, uint32_t>;  // an edge: a place, and which of the node's outputs
  std::map<Key, std::vector<size_t>> stops;
  for (size_t i = 0; i < stop_at.size(); ++i)
    if (const Edge edge = gradient_edge(stop_at[i]); edge.function)
      stops[{place_of(edge.function.get()), edge.input_nr}].push_back(i);

  std::unordered_map<const void*, int64_t> marks;
  std::vector<std::pair<Node*, uint32_t>> waiting;
  const auto wait_for = [&](const Edge& edge) {
    if (edge.function) waiting.emplace_back(edge.function.get(), edge.input_nr);
  };
  for (size_t k = 0; k < tensors.size(); ++k) {
    const int64_t number = static_cast<int64_t>(k);
    const Edge start = gradient_edge(tensors[k]);  // keeps the node of a leaf alive
    if (!behind)
      wait_for(start);
    else if (start.function)
      for (const Edge& edge : start.function->next_edges()) wait_for(edge);
    while (!waiting.empty()) {
      const auto [node, output] = waiting.back();
      waiting.pop_back();
      const void* place = place_of(node);
      if (const auto stop = stops.find({place, output}); stop != stops.end()) {
        for (const size_t i : stop->second)
          if (!found.met_by[i]) found.met_by[i] = number;
        continue;
      }
      const auto [mark, fresh] = marks.try_emplace(place, number);
      if (!fresh) {
        if (mark->second == number || mark->second == kSeveral) continue;
        mark->second = kSeveral;
      }
      if (const at::Tensor* leaf = leaf_of(node)) {
        if (fresh && leaf->requires_grad()) found.leaves.push_back(*leaf);
        continue;
      }
      if (fresh && made_by_python(*node)) found.functions.emplace_back(node, number);
      for (const Edge& edge : node->next_edges()) wait_for(edge);
    }
  }
  for (const at::Tensor& leaf : found.leaves)
    found.by_several.push_back(marks.at(leaf.unsafeGetTensorImpl()) == kSeveral);
  return found;
}

std::vector<Node*> hooked(at::TensorList tensors) {
  std::vector<Node*> found;
  std::unordered_set<const Node*> seen;
  std::vector<Node*> waiting;
  const auto wait_for = [&](Node* node) {
    if (node && !leaf_of(node) && seen.insert(node).second) waiting.push_back(node);
  };
  for (const at::Tensor& tensor : tensors) wait_for(gradient_edge(tensor).function.get());
  while (!waiting.empty()) {
    Node* node = waiting.back();
    waiting.pop_back();
    if (!node->tensor_pre_hooks().empty() || !node->retains_grad_hooks().empty() || !node->pre_hooks().empty() ||
        !node->post_hooks().empty())
      found.push_back(node);
    for (const Edge& edge : node->next_edges()) wait_for(edge.function.get());
  }
  return found;
}

}  // namespace mtlfast
