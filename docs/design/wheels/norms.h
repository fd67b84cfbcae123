// What the two doors of the skeleton share: a table of rows, and the op on it. No header of torch or Python.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace mtlfast::stable {

// One gradient, whichever way it came in.
struct Row {
  const void* data;
  int64_t numel;
  DType dtype;
};

class Table {
 public:
  Table(int64_t num_tasks, int64_t num_tensors)
      : num_tasks_(num_tasks), data_(num_tasks * num_tensors), offsets_(num_tensors + 1) {}

  void add(int64_t k, int64_t t, const Row& row) {
    if (offsets_[t + 1] == 0) offsets_[t + 1] = row.numel;
    if (!any_) dtype_ = row.dtype;
    any_ = true;
    if (row.dtype != dtype_ || row.numel != offsets_[t + 1])
      throw std::invalid_argument("norms: a row differs from the others in dtype or size");
    data_[t * num_tasks_ + k] = row.data;
  }

  TaskView finish() {
    for (size_t t = 1; t < offsets_.size(); ++t) offsets_[t] += offsets_[t - 1];
    return {num_tasks_, static_cast<int64_t>(offsets_.size()) - 1, data_.data(), offsets_.data(), dtype_};
  }

 private:
  int64_t num_tasks_;
  std::vector<const void*> data_;
  std::vector<int64_t> offsets_;
  DType dtype_ = DType::Float32;
  bool any_ = false;
};

// out[k]: the norm of task k's gradient. norms.cpp
void norms(const TaskView& grads, double* out);

}  // namespace mtlfast::stable
