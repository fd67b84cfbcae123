// Marshals task gradients once: tensors become the pointers, sizes and strides that kernels and outputs need.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace mtlfast {

// The memory of an entry or output of tensor t.
struct Span {
  uintptr_t begin, end;
  int64_t t;
};

// It keeps the tensors' memory alive even if a tensor is given other memory (`tensor.data = other`). A copy-on-write
// tensor (torch._lazy_clone) gets memory of its own when it is entered: its address would change at its first write.
class TaskTable {
 public:
  TaskTable(int64_t num_tasks, int64_t num_tensors);

  // Enters task k's gradient of tensor t, and returns false if it is not regular. A regular gradient is dense and
  // strided, on the CPU or a GPU, of a dtype that kernels take, with the device and dtype of all others and the shape
  // and strides of the other tasks' gradients of its tensor. mtlfast.TaskGradients copies what is not, or raises.
  bool add(int64_t k, int64_t t, const at::Tensor& gradient);
  void finish();  // after the last add

  TaskView view() const;
  int64_t num_tasks() const { return num_tasks_; }
  int64_t num_tensors() const { return static_cast<int64_t>(first_dim_.size()); }
  int64_t numel() const { return offsets_.back(); }
  bool contiguous() const { return contiguous_; }  // every tensor is contiguous
  at::TensorOptions options() const { return options_; }

  at::ScalarType dtype() const { return c10::typeMetaToScalarType(options_.dtype()); }

  // Whether every entry can be written: no two share memory, and none has become copy-on-write since it was entered.
  bool separate() const;

  // A new tensor with tensor t's shape and strides, after a leading dimension if one is given.
  at::Tensor empty_like(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype) const;
  // Whether `out` could be the result of that.
  bool matches(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype, const at::Tensor& out) const;

  // Whether the other table has as many tasks and tensors and, of each tensor that both have, the device, shape and
  // strides.
  bool same_tensors(const TaskTable& other) const;
  // Whether every entry of `state` can be written: it shares memory with no other one, with none of this table's
  // entries and with no output.
  bool apart_from(const TaskTable& state, const std::vector<at::Tensor>& out) const;

  // New outputs for all tensors: empty_like of each.
  std::vector<at::Tensor> make_out(std::optional<int64_t> leading, at::ScalarType dtype) const;
  // The memory of given outputs, or of other tensors that an op takes for each tensor. Raises unless all match; `what`
  // is the op and the argument.
  std::vector<void*> pointers_of(const char* what, at::TensorList out, std::optional<int64_t> leading,
                                 at::ScalarType dtype) const;

  // The dtype of the first output whose tensor a task reaches, which all must share; the gradients' dtype without one.
  at::ScalarType dtype_of_out(at::TensorList out) const;

  // Whether each output fits. All have `dtype`, or any one dtype if none is given. Each has memory of its own; one in
  // the gradients' dtype without a leading dimension may also be a whole gradient of the same tensor. An undefined
  // output stands for a tensor that no task reaches.
  bool accepts(const std::vector<at::Tensor>& out, std::optional<int64_t> leading,
               std::optional<at::ScalarType> dtype) const;

 private:
  at::IntArrayRef sizes(int64_t t) const;
  at::IntArrayRef strides(int64_t t) const;
  std::vector<Span> spans() const;  // of all entries
  int64_t numel_of(int64_t t) const { return offsets_[t + 1] - offsets_[t]; }

  int64_t num_tasks_;
  std::vector<const void*> data_;   // [T, K]
  std::vector<c10::Storage> held_;  // keeps that memory alive
  std::vector<int64_t> offsets_;    // [T + 1]
  std::vector<int64_t> first_dim_;  // [T] where tensor t's dimensions begin in sizes_ and strides_; -1: no task yet
  std::vector<int64_t> rank_;       // [T]
  std::vector<int64_t> sizes_, strides_;
  at::TensorOptions options_;
  bool any_ = false, contiguous_ = true;
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// The table for a registered op's rows, where rows[k * T + t] is task k's. Raises where TaskTable::add returns false.
TaskTable table_of(const char* op, const OptionalTensors& rows, int64_t num_tasks);

DType dtype_of(at::ScalarType type);

}  // namespace mtlfast
