// The eager door, by Python's limited API and DLPack's C exchange table (torch.Tensor.__dlpack_c_exchange_api__): from
// a Python tensor to its pointer and sizes in one C call, with neither pybind11 nor at::Tensor.
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>  // plain C; it refuses to be included where TORCH_TARGET_VERSION is defined
#include <Python.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "norms.h"

namespace {

using mtlfast::DType;
using mtlfast::stable::Row;
using mtlfast::stable::Table;

const DLPackExchangeAPI* exchange = nullptr;

struct PythonError {};  // Python's own error is set

Row row_of(const DLTensor& tensor) {
  if (tensor.device.device_type != kDLCPU) throw std::invalid_argument("norms: expected tensors on the CPU");
  int64_t numel = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.strides[d] != numel)
      throw std::invalid_argument("norms: a row is not contiguous");
    numel *= tensor.shape[d];
  }
  DType dtype;
  if (tensor.dtype.code == kDLFloat && tensor.dtype.bits == 32)
    dtype = DType::Float32;
  else if (tensor.dtype.code == kDLFloat && tensor.dtype.bits == 64)
    dtype = DType::Float64;
  else if (tensor.dtype.code == kDLBfloat)
    dtype = DType::BFloat16;
  else if (tensor.dtype.code == kDLFloat && tensor.dtype.bits == 16)
    dtype = DType::Float16;
  else
    throw std::invalid_argument("norms: expected float32, float64, bfloat16 or float16");
  return {static_cast<const char*>(tensor.data) + tensor.byte_offset, numel, dtype};
}

// Borrowed: valid as long as the tensors keep their memory.
struct Borrowed {
  Row operator()(PyObject* tensor) {
    DLTensor borrowed;
    if (exchange->dltensor_from_py_object_no_sync(tensor, &borrowed) != 0) throw PythonError();
    return row_of(borrowed);
  }
};

// Owned: a DLManagedTensor for each row, until the table goes.
struct Owned {
  static void release(DLManagedTensorVersioned* tensor) { tensor->deleter(tensor); }
  std::vector<std::unique_ptr<DLManagedTensorVersioned, void (*)(DLManagedTensorVersioned*)>> held;
  Row operator()(PyObject* tensor) {
    DLManagedTensorVersioned* owned = nullptr;
    if (exchange->managed_tensor_from_py_object_no_sync(tensor, &owned) != 0) throw PythonError();
    held.emplace_back(owned, release);
    return row_of(owned->dl_tensor);
  }
};

// rows: a tuple of K tuples of T tensors or None. PyTuple_GetItem and PyTuple_Size are calls in the limited API.
template <class Door>
Table marshal(PyObject* rows, Door& door) {
  const Py_ssize_t K = PyTuple_Size(rows);
  if (K < 0) throw PythonError();
  if (K == 0) throw std::invalid_argument("norms: got no task");
  const Py_ssize_t T = PyTuple_Size(PyTuple_GetItem(rows, 0));
  if (T < 0) throw PythonError();
  Table table(K, T);
  for (Py_ssize_t k = 0; k < K; ++k) {
    PyObject* row = PyTuple_GetItem(rows, k);
    if (PyTuple_Size(row) != T) throw std::invalid_argument("norms: expected as many tensors for each task");
    for (Py_ssize_t t = 0; t < T; ++t)
      if (PyObject* tensor = PyTuple_GetItem(row, t); tensor != Py_None) table.add(k, t, door(tensor));
  }
  return table;
}

template <class Work>
PyObject* guarded(const Work& work) {
  try {
    return work();
  } catch (const PythonError&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "norms: expected a tuple of tuples of tensors or None");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

// The elements of one task's gradient, by a table that is made and thrown away: what marshalling costs.
template <class Door>
PyObject* marshal_alone(PyObject*, PyObject* rows) {
  return guarded([&] {
    Door door;
    Table table = marshal(rows, door);
    return PyLong_FromLongLong(table.finish().numel());
  });
}

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// A new float64 tensor of n elements, in DLPack's hands until `given` gives it to Python.
DLManagedTensorVersioned* new_output(int64_t n) {
  DLTensor prototype{nullptr, {kDLCPU, 0}, 1, {kDLFloat, 64, 1}, &n, nullptr, 0};
  DLManagedTensorVersioned* out = nullptr;
  if (exchange->managed_tensor_allocator(&prototype, &out, nullptr, set_error) != 0) throw PythonError();
  return out;
}

PyObject* given(DLManagedTensorVersioned* out) {
  void* result = nullptr;
  if (exchange->managed_tensor_to_py_object_no_sync(out, &result) != 0) throw PythonError();
  return static_cast<PyObject*>(result);
}

PyObject* norms(PyObject*, PyObject* rows) {
  return guarded([&] {
    Borrowed door;
    Table table = marshal(rows, door);
    const mtlfast::TaskView view = table.finish();
    DLManagedTensorVersioned* out = new_output(view.num_tasks);
    PyThreadState* without_gil = PyEval_SaveThread();
    mtlfast::stable::norms(view, static_cast<double*>(out->dl_tensor.data));
    PyEval_RestoreThread(without_gil);
    return given(out);
  });
}

// A list of so many new tensors: what outputs cost.
PyObject* outputs(PyObject*, PyObject* count) {
  return guarded([&] {
    const Py_ssize_t n = PyLong_AsSsize_t(count);
    PyObject* list = PyList_New(n);
    for (Py_ssize_t i = 0; i < n; ++i) PyList_SetItem(list, i, given(new_output(4)));
    return list;
  });
}

PyMethodDef functions[] = {{"norms", norms, METH_O, nullptr},
                           {"outputs", outputs, METH_O, nullptr},
                           {"marshal_borrowed", marshal_alone<Borrowed>, METH_O, nullptr},
                           {"marshal_owned", marshal_alone<Owned>, METH_O, nullptr},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "_skeleton", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__skeleton() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* type = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
  PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
  if (!capsule) return nullptr;
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    PyErr_SetString(PyExc_ImportError, "torch's DLPack table is of another major version");
    return nullptr;
  }
  return PyModule_Create(&definition);
}
