// Task gradients marshalled once: Tensors become the pointers, sizes and strides that kernels and outputs need.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace mtlfast {

// It keeps the tensors' memory alive, which they themselves may have exchanged for another (`tensor.data = other`).
class TaskTable {
 public:
  TaskTable(int64_t num_tasks, int64_t num_tensors);

  // Enters task k's gradient of tensor t. False if it is not regular: dense and strided, on the CPU or a GPU, of a
  // dtype that kernels take, with the device and dtype of all and the shape and strides of its tensor's other tasks.
  // mtlfast.TaskGradients says what was wrong, or makes the offending tensor dense.
  bool add(int64_t k, int64_t t, const at::Tensor& gradient);
  void finish();  // after the last add

  TaskView view() const;
  int64_t num_tasks() const { return num_tasks_; }
  int64_t num_tensors() const { return static_cast<int64_t>(first_dim_.size()); }
  int64_t numel() const { return offsets_.back(); }
  bool contiguous() const { return contiguous_; }  // every tensor lies in the order of its indices
  at::TensorOptions options() const { return options_; }

  at::ScalarType dtype() const { return c10::typeMetaToScalarType(options_.dtype()); }

  // A new tensor with tensor t's shape and strides, behind a leading dimension if one is given.
  at::Tensor empty_like(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype) const;
  // Could that have made it?
  bool matches(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype, const at::Tensor& out) const;

  // The dtype of the first output whose tensor a task reaches: all must share it. The gradients' if there is none.
  at::ScalarType dtype_of_out(at::TensorList out) const;

  // Does each output match (dtype: that of them all, if none is given), with memory of its own, or (of the gradients'
  // dtype, without a leading dimension) a task's whole gradient of the same tensor? An undefined output stands for a
  // tensor that no task reaches.
  bool accepts(const std::vector<at::Tensor>& out, std::optional<int64_t> leading,
               std::optional<at::ScalarType> dtype) const;

 private:
  at::IntArrayRef sizes(int64_t t) const;
  at::IntArrayRef strides(int64_t t) const;

  int64_t num_tasks_;
  std::vector<const void*> data_;   // [T, K]
  std::vector<c10::Storage> held_;  // whose memory that is
  std::vector<int64_t> offsets_;    // [T + 1]
  std::vector<int64_t> first_dim_;  // [T] where tensor t's dimensions begin in sizes_ and strides_; -1: no task yet
  std::vector<int64_t> rank_;       // [T]
  std::vector<int64_t> sizes_, strides_;
  at::TensorOptions options_;
  bool any_ = false, contiguous_ = true;
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// The table of a registered op's rows, task after task: rows[k * T + t]. Raises where TaskTable::add says false.
TaskTable table_of(const char* op, const OptionalTensors& rows, int64_t num_tasks);

DType dtype_of(at::ScalarType type);

}  // namespace mtlfast
