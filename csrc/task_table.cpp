#include "task_table.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/COW.h>

#include <algorithm>

namespace mtlfast {

namespace {

bool known(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// The stride of a dimension with one element has no effect.
bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

bool plain_memory(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return tensor.layout() == at::kStrided && (tensor.is_cpu() || tensor.is_cuda()) &&
         !keys.has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                            c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Negative})) &&
         tensor.has_storage();
}

Span span_of(const void* data, int64_t bytes, int64_t t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + bytes, t};
}

// Sorts the spans by address: does none reach into the next?
bool sort_disjoint(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].begin < spans[i - 1].end) return false;
  return true;
}

// The span that reaches into [begin, end), or nullptr. The spans are disjoint, and sorted by address.
const Span* span_in(const std::vector<Span>& spans, uintptr_t begin, uintptr_t end) {
  // The last span that begins before `end`: as spans are disjoint, no other one can reach further.
  const auto after = std::lower_bound(spans.begin(), spans.end(), end,
                                      [](const Span& span, uintptr_t value) { return span.begin < value; });
  return after != spans.begin() && std::prev(after)->end > begin ? &*std::prev(after) : nullptr;
}

}  // namespace

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::Float32;
    case at::kDouble:
      return DType::Float64;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    default:
      TORCH_CHECK(false, "mtlfast: dtype is ", type, ", expected float32, float64, bfloat16 or float16");
  }
}

TaskTable::TaskTable(int64_t num_tasks, int64_t num_tensors)
    : num_tasks_(num_tasks),
      data_(num_tasks * num_tensors, nullptr),
      offsets_(num_tensors + 1, 0),
      first_dim_(num_tensors, -1),
      rank_(num_tensors, 0),
      options_(at::TensorOptions().dtype(at::kFloat).device(at::kCPU)) {
  held_.reserve(num_tasks * num_tensors);
  sizes_.reserve(num_tensors * 2);
  strides_.reserve(num_tensors * 2);
}

bool TaskTable::add(int64_t k, int64_t t, const at::Tensor& gradient) {
  if (!gradient.defined() || !plain_memory(gradient)) return false;
  const at::IntArrayRef sizes = gradient.sizes(), strides = gradient.strides();
  const int64_t numel = gradient.numel();
  if (!any_) {
    if (!known(gradient.scalar_type())) return false;
    options_ = at::TensorOptions().dtype(gradient.scalar_type()).device(gradient.device());
    any_ = true;
  } else if (gradient.scalar_type() != options_.dtype() || gradient.device() != options_.device()) {
    return false;
  }
  if (numel > 0 && !gradient.unsafeGetTensorImpl()->is_non_overlapping_and_dense()) return false;
  if (first_dim_[t] < 0) {
    first_dim_[t] = static_cast<int64_t>(sizes_.size());
    rank_[t] = static_cast<int64_t>(sizes.size());
    sizes_.insert(sizes_.end(), sizes.begin(), sizes.end());
    strides_.insert(strides_.end(), strides.begin(), strides.end());
    offsets_[t + 1] = numel;
    contiguous_ = contiguous_ && gradient.is_contiguous();
  } else if (sizes != this->sizes(t) || (numel > 0 && !same_strides(sizes, strides, this->strides(t)))) {
    return false;
  }
  if (numel == 0) return true;
  data_[t * num_tasks_ + k] = gradient.mutable_data_ptr();
  held_.push_back(gradient.storage());
  return true;
}

void TaskTable::finish() {
  for (size_t t = 1; t < offsets_.size(); ++t) offsets_[t] += offsets_[t - 1];
}

std::vector<Span> TaskTable::spans() const {
  const int64_t size = item_size(dtype_of(dtype()));
  std::vector<Span> spans;
  spans.reserve(held_.size());
  for (int64_t i = 0; i < static_cast<int64_t>(data_.size()); ++i)
    if (data_[i]) spans.push_back(span_of(data_[i], numel_of(i / num_tasks_) * size, i / num_tasks_));
  return spans;
}

bool TaskTable::separate() const {
  for (const c10::Storage& storage : held_)
    if (c10::impl::cow::is_cow_data_ptr(storage.data_ptr())) return false;
  std::vector<Span> entries = spans();
  return sort_disjoint(entries);
}

bool TaskTable::same_tensors(const TaskTable& other) const {
  if (num_tasks_ != other.num_tasks_ || num_tensors() != other.num_tensors()) return false;
  for (int64_t t = 0; t < num_tensors(); ++t) {
    if (first_dim_[t] < 0 || other.first_dim_[t] < 0) continue;
    if (options_.device() != other.options_.device() || sizes(t) != other.sizes(t)) return false;
    if (numel_of(t) > 0 && !same_strides(sizes(t), strides(t), other.strides(t))) return false;
  }
  return true;
}

TaskView TaskTable::view() const {
  return {num_tasks_, num_tensors(), data_.data(), offsets_.data(), dtype_of(dtype()), nullptr};
}

at::IntArrayRef TaskTable::sizes(int64_t t) const {
  return {sizes_.data() + first_dim_[t], static_cast<size_t>(rank_[t])};
}
at::IntArrayRef TaskTable::strides(int64_t t) const {
  return {strides_.data() + first_dim_[t], static_cast<size_t>(rank_[t])};
}

at::Tensor TaskTable::empty_like(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype) const {
  const at::TensorOptions options = options_.dtype(dtype);
  if (first_dim_[t] < 0) return at::empty_strided({0}, {1}, options);  // no task reaches it; mtlfast.ops returns None
  if (!leading) return at::empty_strided(sizes(t), strides(t), options);
  std::vector<int64_t> sizes{*leading}, strides{offsets_[t + 1] - offsets_[t]};
  sizes.insert(sizes.end(), this->sizes(t).begin(), this->sizes(t).end());
  strides.insert(strides.end(), this->strides(t).begin(), this->strides(t).end());
  return at::empty_strided(sizes, strides, options);
}

bool TaskTable::matches(int64_t t, std::optional<int64_t> leading, at::ScalarType dtype, const at::Tensor& out) const {
  if (first_dim_[t] < 0) return true;
  if (!plain_memory(out) || out.scalar_type() != dtype || out.device() != options_.device()) return false;
  const int64_t numel = offsets_[t + 1] - offsets_[t], lead = leading ? 1 : 0;
  if (out.dim() != rank_[t] + lead || (leading && out.size(0) != *leading)) return false;
  if (out.sizes().slice(lead) != sizes(t)) return false;
  if (numel == 0) return true;
  return same_strides(sizes(t), out.strides().slice(lead), strides(t)) &&
         (out.numel() <= numel || out.stride(0) == numel);
}

std::vector<at::Tensor> TaskTable::make_out(std::optional<int64_t> leading, at::ScalarType dtype) const {
  std::vector<at::Tensor> out;
  out.reserve(num_tensors());
  for (int64_t t = 0; t < num_tensors(); ++t) out.push_back(empty_like(t, leading, dtype));
  return out;
}

std::vector<void*> TaskTable::pointers_of(const char* what, at::TensorList out, std::optional<int64_t> leading,
                                          at::ScalarType dtype) const {
  TORCH_CHECK_VALUE(static_cast<int64_t>(out.size()) == num_tensors(), what, " has ", out.size(), " tensors, expected ",
                    num_tensors());
  std::vector<void*> pointers(out.size());
  for (int64_t t = 0; t < num_tensors(); ++t) {
    TORCH_CHECK_VALUE(matches(t, leading, dtype, out[t]), what, " ", t, " has shape ", out[t].sizes(), ", strides ",
                      out[t].strides(), ", dtype ", out[t].scalar_type(), " on ", out[t].device(),
                      ", expected those of the task gradients of tensor ", t, ", and dtype ", dtype);
    pointers[t] = out[t].mutable_data_ptr();
  }
  return pointers;
}

at::ScalarType TaskTable::dtype_of_out(at::TensorList out) const {
  for (size_t t = 0; t < out.size() && t < first_dim_.size(); ++t)
    if (first_dim_[t] >= 0 && out[t].defined()) return out[t].scalar_type();
  return dtype();
}

bool TaskTable::accepts(const std::vector<at::Tensor>& out, std::optional<int64_t> leading,
                        std::optional<at::ScalarType> dtype) const {
  if (static_cast<int64_t>(out.size()) != num_tensors()) return false;
  const at::ScalarType out_dtype = dtype ? *dtype : dtype_of_out(out);
  if (!known(out_dtype)) return false;
  const int64_t out_size = item_size(dtype_of(out_dtype));
  const bool in_place = !leading && out_dtype == this->dtype();
  std::vector<Span> spans;
  for (int64_t t = 0; t < num_tensors(); ++t) {
    if (first_dim_[t] < 0) continue;
    if (!out[t].defined() || !matches(t, leading, out_dtype, out[t])) return false;
    if (out[t].numel() == 0) continue;
    spans.push_back(span_of(out[t].mutable_data_ptr(), out[t].numel() * out_size, t));
  }
  if (!sort_disjoint(spans)) return false;
  for (const Span& entry : this->spans()) {
    const Span* span = span_in(spans, entry.begin, entry.end);
    if (span && !(in_place && span->t == entry.t && span->begin == entry.begin)) return false;
  }
  return true;
}

bool TaskTable::apart_from(const TaskTable& state, const std::vector<at::Tensor>& out) const {
  if (!state.separate()) return false;
  std::vector<Span> of_state = state.spans();
  sort_disjoint(of_state);
  for (const Span& entry : spans())
    if (span_in(of_state, entry.begin, entry.end)) return false;
  for (const at::Tensor& target : out) {
    if (!target.defined() || target.numel() == 0) continue;
    const Span entry = span_of(target.const_data_ptr(), target.numel() * target.element_size(), 0);
    if (span_in(of_state, entry.begin, entry.end)) return false;
  }
  return true;
}

TaskTable table_of(const char* op, const OptionalTensors& rows, int64_t num_tasks) {
  const int64_t total = static_cast<int64_t>(rows.size());
  TORCH_CHECK_VALUE(num_tasks > 0 && total % num_tasks == 0, op, ": got ", total, " rows for ", num_tasks,
                    " tasks, expected a multiple");
  const int64_t num_tensors = total / num_tasks;
  TaskTable table(num_tasks, num_tensors);
  for (int64_t i = 0; i < total; ++i) {
    const std::optional<at::Tensor> row = rows.get(i);
    if (!row || !row->defined()) continue;
    TORCH_CHECK_VALUE(table.add(i / num_tensors, i % num_tensors, *row), op, ": task ", i / num_tensors, ", tensor ",
                      i % num_tensors,
                      " is not dense or differs from the others in dtype, device, shape or strides; "
                      "mtlfast.TaskGradients makes the rows that this op takes");
  }
  table.finish();
  return table;
}

}  // namespace mtlfast
