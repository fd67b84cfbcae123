#include "graph.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>

namespace mtlfast {

namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// torch does not export the type of the nodes that Python code makes, so they are recognised by their type's name. To
// ask each node for its own name would take longer than the rest of the walk.
bool made_by_python(const Node& node) { return std::string_view(typeid(node).name()) == "N5torch8autograd6PyNodeE"; }

constexpr int64_t kSeveral = -1;

// Which loss has reached each node or leaf.
class Owners {
 public:
  // Whether the walk must go on behind it: this is the first loss that reaches it, or the second.
  bool reach(const void* what, int64_t loss) {
    const auto [it, first] = owner_.emplace(what, loss);
    if (first) return true;
    if (it->second == loss || it->second == kSeveral) return false;
    it->second = kSeveral;
    return true;
  }
  bool several(const void* what) const { return owner_.at(what) == kSeveral; }

 private:
  std::unordered_map<const void*, int64_t> owner_;
};

// The places where the walk stops: a node may have several outputs, of which only some are such places.
class Stops {
 public:
  explicit Stops(at::TensorList tensors) : met(tensors.size()) {
    for (size_t i = 0; i < tensors.size(); ++i)
      places_.emplace_back(tensors[i].grad_fn() ? static_cast<const void*>(tensors[i].grad_fn().get())
                                                : tensors[i].unsafeGetTensorImpl(),
                           tensors[i].grad_fn() ? tensors[i].output_nr() : 0, i);
    std::sort(places_.begin(), places_.end());
  }
  bool at(const void* what, uint32_t output) {
    auto it = std::lower_bound(places_.begin(), places_.end(), Place{what, output, 0});
    bool found = false;
    for (; it != places_.end() && std::get<0>(*it) == what && std::get<1>(*it) == output; ++it)
      found = met[std::get<2>(*it)] = true;
    return found;
  }
  std::vector<bool> met;

 private:
  using Place = std::tuple<const void*, uint32_t, size_t>;  // node or leaf, which of its outputs, which tensor
  std::vector<Place> places_;
};

}  // namespace

Reached reached_by(at::TensorList losses, at::TensorList stop_at, bool behind) {
  Reached found;
  Owners owners;
  Stops stops(stop_at);
  std::unordered_set<const void*> taken;
  std::vector<Node*> waiting;
  for (size_t i = 0; i < losses.size(); ++i) {
    const auto loss = static_cast<int64_t>(i);
    const auto take_leaf = [&](const at::Tensor& leaf, bool may_stop) {
      const void* key = leaf.unsafeGetTensorImpl();
      if (!leaf.requires_grad() || (may_stop && stops.at(key, 0))) return;
      owners.reach(key, loss);
      if (taken.insert(key).second) found.leaves.push_back(leaf);
    };
    const auto go_to = [&](Node* node, uint32_t output) {
      if (node == nullptr) return;
      if (typeid(*node) == typeid(AccumulateGrad))
        take_leaf(static_cast<AccumulateGrad*>(node)->variable, true);
      else if (!stops.at(node, output) && owners.reach(node, loss))
        waiting.push_back(node);
    };
    const auto go_behind = [&](const Node& node) {
      for (const auto& edge : node.next_edges()) go_to(edge.function.get(), edge.input_nr);
    };
    if (!losses[i].grad_fn())
      take_leaf(losses[i], !behind);
    else if (behind)
      go_behind(*losses[i].grad_fn());
    else
      go_to(losses[i].grad_fn().get(), losses[i].output_nr());
    while (!waiting.empty()) {
      const Node* node = waiting.back();
      waiting.pop_back();
      if (made_by_python(*node)) found.functions.insert(node->name());
      go_behind(*node);
    }
  }
  for (const at::Tensor& leaf : found.leaves) found.by_several.push_back(owners.several(leaf.unsafeGetTensorImpl()));
  found.met = stops.met;
  return found;
}

}  // namespace mtlfast
