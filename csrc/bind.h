// Shared by the <op>_bind.h files and who binds them: how a Python tensor arrives in C++.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "vkernels/check.h"
#include "vkernels/tensor.h"

namespace py = pybind11;

// vkernels.library.ref(tensor) -> (address, dtype code, sizes, strides, tensor); None -> an absent TensorRef.
namespace pybind11::detail {
template <>
struct type_caster<vk::TensorRef> {
  PYBIND11_TYPE_CASTER(vk::TensorRef, const_name("TensorRef"));

  bool load(handle source, bool) {
    value = vk::TensorRef{};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 5) return false;
    PyObject* sizes = PyTuple_GET_ITEM(source.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t rank = PyTuple_GET_SIZE(sizes);
    if (rank > vk::TensorRef::kMaxRank || PyTuple_GET_SIZE(strides) != rank) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<vk::Dtype>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    value.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
      value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    value.given = true;
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};
}  // namespace pybind11::detail

namespace vk {
using release_gil = py::call_guard<py::gil_scoped_release>;
}
