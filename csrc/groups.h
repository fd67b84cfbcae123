// A partition of a table's tensors into groups, each of which has sums or weights of its own.
#pragma once
#include <ATen/core/ATen_fwd.h>
#include <c10/util/Exception.h>
#include <c10/util/OptionalArrayRef.h>

#include <algorithm>
#include <vector>

#include "cuda/launchers.h"
#include "task_table.h"

namespace mtlfast {

using GroupOfTensors = at::OptionalIntArrayRef;  // the group of each tensor; nullopt: no groups

inline void check_groups(const char* op, const TaskTable& grads, at::IntArrayRef groups, int64_t num_groups) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(groups.size()) == grads.num_tensors(), op, ": groups has ", groups.size(),
                    " entries, expected ", grads.num_tensors());
  for (const int64_t group : groups)
    TORCH_CHECK_VALUE(0 <= group && group < num_groups, op, ": got a tensor of group ", group, ", expected 0 to ",
                      num_groups - 1);
  TORCH_CHECK_VALUE(num_groups >= 0, op, ": num_groups is ", num_groups, ", expected at least 0");
  TORCH_CHECK_VALUE(grads.options().device().is_cpu() || num_groups <= cuda::kMostGroups, op, ": got ", num_groups,
                    " groups, expected at most ", cuda::kMostGroups, " on a GPU");
}

// The gradients with the tensors of each group one after another, for the ops that sum over columns. Only addresses
// and sizes are sorted. Without groups all tensors are one.
class SortedByGroup {
 public:
  SortedByGroup(const char* op, const TaskTable& grads, GroupOfTensors groups, int64_t num_groups)
      : view_(grads.view()), borders_{0, view_.numel()} {
    if (!groups) return;
    check_groups(op, grads, *groups, num_groups);
    groups_.reserve(groups->size() + 1);  // of no tensors, too, the address is not null
    groups_.assign(groups->begin(), groups->end());
    if (!std::is_sorted(groups_.begin(), groups_.end())) sort();
    view_.groups = groups_.data();
    borders_.assign(num_groups + 1, 0);
    for (int64_t t = 0; t < view_.num_tensors; ++t) borders_[groups_[t] + 1] = view_.offsets[t + 1];
    for (int64_t group = 0; group < num_groups; ++group)  // a group without tensors ends where it begins
      borders_[group + 1] = std::max(borders_[group], borders_[group + 1]);
  }
  SortedByGroup(const SortedByGroup&) = delete;

  const TaskView& view() const { return view_; }
  // [G + 1] where the columns of each group begin.
  const std::vector<int64_t>& borders() const { return borders_; }
  int64_t num_groups() const { return static_cast<int64_t>(borders_.size()) - 1; }
  // Whether there are groups and one of them has no columns.
  bool any_empty() const {
    return view_.groups && std::adjacent_find(borders_.begin(), borders_.end()) != borders_.end();
  }

 private:
  void sort() {
    const int64_t T = view_.num_tensors, K = view_.num_tasks;
    std::vector<int64_t> order(T), of_order(T);
    for (int64_t t = 0; t < T; ++t) order[t] = t;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return groups_[a] < groups_[b]; });
    data_.reserve(T * K);
    offsets_.assign(1, 0);
    for (int64_t place = 0; place < T; ++place) {
      const int64_t t = order[place];
      of_order[place] = groups_[t];
      data_.insert(data_.end(), view_.tensor(t), view_.tensor(t) + K);
      offsets_.push_back(offsets_.back() + view_.offsets[t + 1] - view_.offsets[t]);
    }
    groups_ = std::move(of_order);
    view_.data = data_.data();
    view_.offsets = offsets_.data();
  }

  TaskView view_;
  std::vector<int64_t> groups_, borders_;
  std::vector<const void*> data_;
  std::vector<int64_t> offsets_;
};

}  // namespace mtlfast
