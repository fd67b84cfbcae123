// The pybind11 module mtlfast._C: the marshalled table and, on it, the ops that eager calls use.
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "chunks.h"
#include "cuda/launchers.h"
#include "graph.h"
#include "ops.h"

namespace py = pybind11;

namespace {

// The group of each tensor, as Python passes it.
using Groups = std::optional<std::vector<int64_t>>;
mtlfast::GroupOfTensors given(const Groups& groups) { return groups ? mtlfast::GroupOfTensors(*groups) : std::nullopt; }

// The items of a list or tuple as borrowed references, without a Python call for each.
class Items {
 public:
  explicit Items(py::handle sequence)
      : fast_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "expected a sequence"))) {
    if (!fast_) throw py::error_already_set();
  }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

 private:
  py::object fast_;
};

// The table of rows[k][t]; None if a row is not regular, which mtlfast.TaskGradients then copies or refuses.
std::optional<mtlfast::TaskTable> marshal(const py::handle& rows) {
  const Items tasks(rows);
  if (tasks.size() == 0) return std::nullopt;
  const Py_ssize_t num_tensors = Items(tasks[0]).size();
  mtlfast::TaskTable table(tasks.size(), num_tensors);
  for (Py_ssize_t k = 0; k < tasks.size(); ++k) {
    const Items row(tasks[k]);
    if (row.size() != num_tensors) return std::nullopt;
    for (Py_ssize_t t = 0; t < num_tensors; ++t) {
      if (row[t] == Py_None) continue;
      if (!THPVariable_Check(row[t]) || !table.add(k, t, THPVariable_Unpack(row[t]))) return std::nullopt;
    }
  }
  table.finish();
  return table;
}

// A list of tensors and None, which is an undefined tensor here; nothing if the list holds anything else.
std::optional<std::vector<at::Tensor>> tensors_of(const py::handle& list) {
  const Items items(list);
  std::vector<at::Tensor> tensors(items.size());
  for (Py_ssize_t t = 0; t < items.size(); ++t) {
    if (items[t] == Py_None) continue;
    if (!THPVariable_Check(items[t])) return std::nullopt;
    tensors[t] = THPVariable_Unpack(items[t]);
  }
  return tensors;
}

// TaskTable::accepts for a list of tensors and None; false if the list holds anything else.
bool accepts(const mtlfast::TaskTable& table, const py::handle& out, std::optional<int64_t> leading,
             std::optional<at::ScalarType> dtype) {
  const std::optional<std::vector<at::Tensor>> tensors = tensors_of(out);
  return tensors && table.accepts(*tensors, leading, dtype);
}

// TaskTable::apart_from for a list of tensors and None; false if the list holds anything else.
bool apart_from(const mtlfast::TaskTable& table, const mtlfast::TaskTable& state, const py::handle& out) {
  const std::optional<std::vector<at::Tensor>> tensors = tensors_of(out);
  return tensors && table.apart_from(state, *tensors);
}

// Whether nothing else holds this tensor's memory: it is the only tensor on its storage, or it is a view whose base
// only the view itself holds, as the gradient of a Linear's weight is.
bool owns_its_memory(const at::Tensor& tensor) {
  if (tensor.use_count() != 1 || !tensor.has_storage()) return false;
  const size_t owners = tensor.storage().use_count();
  return owners == 1 || (owners == 2 && tensor.is_view() && tensor._base().use_count() == 1);
}

// For each tensor t, whether nothing but this list of rows holds its gradients, so that they may be overwritten.
std::vector<bool> exclusive(const py::handle& rows) {
  const Items tasks(rows);
  std::vector<bool> alone;
  for (Py_ssize_t k = 0; k < tasks.size(); ++k) {
    const Items row(tasks[k]);
    alone.resize(row.size(), true);
    for (Py_ssize_t t = 0; t < row.size(); ++t) {
      if (row[t] == Py_None) continue;
      const at::Tensor& tensor = THPVariable_Unpack(row[t]);
      alone[t] = alone[t] && Py_REFCNT(row[t]) == 1 && owns_its_memory(tensor);
    }
  }
  return alone;
}

// The result of mtlfast::reached_by, with the types of the nodes that Python code made: a type holds no graph.
py::tuple reached_by(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& stop_at, bool behind) {
  const mtlfast::Reached found = mtlfast::reached_by(tensors, stop_at, behind);
  py::list leaves;
  for (const at::Tensor& leaf : found.leaves) leaves.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf)));
  py::dict functions;
  for (const auto& [node, number] : found.functions) {
    const auto object = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node->getptr()));
    const py::type type = py::type::of(object);
    if (!functions.contains(type)) functions[type] = number;
  }
  return py::make_tuple(leaves, found.by_several, found.met_by, functions);
}

// The result of mtlfast::hooked as the objects that Python code gets for these nodes.
py::list hooked(const std::vector<at::Tensor>& tensors) {
  py::list nodes;
  for (torch::autograd::Node* node : mtlfast::hooked(tensors))
    nodes.append(py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node->getptr())));
  return nodes;
}

py::dict cuda_facts() {
  py::dict facts;
#ifdef MTLFAST_WITH_CUDA
  int count = 0;
  const char* error = mtlfast::cuda::device_count(&count);
  facts["runtime"] = mtlfast::cuda::runtime_version();
  facts["driver"] = mtlfast::cuda::driver_version();
  facts["devices"] = count;
  facts["error"] = error ? py::object(py::str(error)) : py::none();
#endif
  return facts;
}

// Why kernels cannot run on a GPU: the name of a cudaError_t; None if they can.
std::optional<std::string> cuda_error([[maybe_unused]] int64_t index) {
#ifdef MTLFAST_WITH_CUDA
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
  const char* error = mtlfast::cuda::kernel_error();
  return error ? std::make_optional<std::string>(error) : std::nullopt;
#else
  return std::nullopt;
#endif
}

// From a method to: names of params, names of inputs, sizes of inputs, size of the state, whether it has coefficients.
py::dict solver_facts(int64_t num_tasks) {
  py::dict facts;
  for (const mtlfast::SolverFacts& solver : mtlfast::solver_facts(num_tasks))
    facts[py::str(solver.name)] =
        py::make_tuple(solver.params, solver.inputs, solver.input_sizes, solver.state_size, solver.square);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<mtlfast::TaskTable>(m, "TaskTable")
      .def_property_readonly("contiguous", &mtlfast::TaskTable::contiguous)
      .def_property_readonly("numel", &mtlfast::TaskTable::numel)
      .def_property_readonly("separate", &mtlfast::TaskTable::separate);
  m.def("marshal", &marshal);
  m.def("accepts", &accepts);
  m.def("exclusive", &exclusive);
  m.def("reached_by", &reached_by);
  m.def("hooked", &hooked);
  m.def(
      "gram",
      [](const mtlfast::TaskTable& grads, bool exact, int64_t split, const Groups& groups, int64_t num_groups) {
        return mtlfast::gram(grads, exact, split, given(groups), num_groups);
      },
      py::arg("grads"), py::arg("exact"), py::arg("split") = 0, py::arg("groups") = py::none(),
      py::arg("num_groups") = 1, NoGil());
  m.def(
      "norms",
      [](const mtlfast::TaskTable& grads, const Groups& groups, int64_t num_groups) {
        return mtlfast::norms(grads, given(groups), num_groups);
      },
      py::arg("grads"), py::arg("groups") = py::none(), py::arg("num_groups") = 1, NoGil());
  m.def("gram_plain", &mtlfast::gram_plain, NoGil());
  m.def(
      "combine",
      [](const mtlfast::TaskTable& grads, const at::Tensor& coefficients, double scale,
         std::optional<at::ScalarType> dtype,
         const Groups& groups) { return mtlfast::combine(grads, coefficients, scale, dtype, given(groups)); },
      NoGil());
  m.def(
      "combine_",
      [](const mtlfast::TaskTable& grads, const at::Tensor& coefficients, const std::vector<at::Tensor>& out,
         bool accumulate, double scale,
         const Groups& groups) { mtlfast::combine_(grads, coefficients, out, accumulate, scale, given(groups)); },
      NoGil());
  m.def(
      "grad_drop",
      [](const mtlfast::TaskTable& grads, const std::string& form, bool round_each,
         const std::optional<at::Tensor>& seed, const std::vector<at::Tensor>& uniform,
         const std::vector<at::Tensor>& thresholds, const std::optional<at::Tensor>& leak) {
        return mtlfast::grad_drop(grads, {form, round_each, seed, uniform, thresholds, leak});
      },
      NoGil());
  m.def(
      "grad_drop_",
      [](const mtlfast::TaskTable& grads, const std::string& form, bool round_each,
         const std::optional<at::Tensor>& seed, const std::vector<at::Tensor>& uniform,
         const std::vector<at::Tensor>& thresholds, const std::optional<at::Tensor>& leak,
         const std::vector<at::Tensor>& out) {
        mtlfast::grad_drop_(grads, {form, round_each, seed, uniform, thresholds, leak}, out);
      },
      NoGil());
  m.def("trimmed_mean", &mtlfast::trimmed_mean, NoGil());
  m.def(
      "trimmed_mean_",
      [](const mtlfast::TaskTable& grads, int64_t trim_number, const std::vector<at::Tensor>& out) {
        mtlfast::trimmed_mean_(grads, trim_number, out);
      },
      NoGil());
  m.def("flatten", &mtlfast::flatten, NoGil());
  m.def("scale_", &mtlfast::scale_, NoGil());
  m.def("same_tensors", &mtlfast::TaskTable::same_tensors);
  m.def("apart_from", &apart_from);
  m.def(
      "advance_",
      [](const mtlfast::TaskTable& grads, const mtlfast::TaskTable& state, const at::Tensor& coefficients, bool square,
         const std::vector<at::Tensor>& out) { mtlfast::advance_(grads, state, coefficients, square, out); },
      NoGil());
  m.def("excess_risks", &mtlfast::excess_risks, NoGil());
  m.def("read", &mtlfast::read, NoGil());
  m.def("isa", [] { return std::string(mtlfast::kernels().isa); });
  m.def("cuda_facts", &cuda_facts);
  m.def("cuda_error", &cuda_error);
  m.def("solver_facts", &solver_facts);
}
