// The quick look at a torch CPU tensor that is as it should be: a decode step asks for some 700 of them. Whatever else comes in
// gives None, and decode_core/attention.py finds out in Python what is wrong and says so.
#include <pybind11/pybind11.h>

#include <unordered_map>

namespace py = pybind11;

namespace {

std::unordered_map<PyObject*, int>& known_types() {         // torch's dtype objects (kept alive) -> attention.py's codes
    static auto* types = new std::unordered_map<PyObject*, int>;
    return *types;
}

// A new reference, or null where the attribute is missing or the call fails.
py::object read(const py::handle& array, PyObject* name, bool call) {
    PyObject* value = call ? PyObject_CallMethodNoArgs(array.ptr(), name) : PyObject_GetAttr(array.ptr(), name);
    if (!value) PyErr_Clear();
    return py::reinterpret_steal<py::object>(value);
}

bool holds(const py::tuple& codes, int code) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(codes.ptr()); i++)
        if (PyLong_AsLong(PyTuple_GET_ITEM(codes.ptr(), i)) == code) return true;
    return false;
}

// (address, code, shape, elements between rows) as attention.py's `_pointer` describes them, or None.
py::object look_at_tensor(const py::handle& array, const py::tuple& codes, bool rows_only) {
    static PyObject* const names[] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("is_cpu"),
                                      PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("shape"),
                                      PyUnicode_InternFromString("stride")};
    const py::object pointer = read(array, names[0], true);
    if (!pointer || read(array, names[1], false).ptr() != Py_True) return py::none();
    const py::object dtype = read(array, names[2], false), shape = read(array, names[3], false), strides = read(array, names[4], true);
    if (!dtype || !shape || !strides || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr())) return py::none();
    const auto known = known_types().find(dtype.ptr());
    if (known == known_types().end() || !holds(codes, known->second)) return py::none();
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    if (PyTuple_GET_SIZE(strides.ptr()) != dims || dims == 0) return py::none();
    const auto size = [&](Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i)); };
    const auto step = [&](Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i)); };
    bool contiguous = true;
    long long expected = 1;
    for (Py_ssize_t i = dims - 1; i >= 0; i--) {
        contiguous &= size(i) == 1 || step(i) == expected;
        expected *= size(i);
    }
    if (!contiguous && !(rows_only && dims == 2 && step(1) == 1 && step(0) >= size(1))) return py::none();
    const long long between = dims == 1 ? 1 : contiguous ? size(dims - 1) : step(0);
    const unsigned long long address = PyLong_AsUnsignedLongLong(pointer.ptr());
    const int width = known->second == 1 || known->second == 2 ? 2 : known->second == 3 ? 8 : 4;
    if (PyErr_Occurred()) return PyErr_Clear(), py::none();
    if (address % width) return py::none();
    return py::make_tuple(address, known->second, shape, between);
}

}  // namespace

void bind_arrays(py::module_& m) {
    m.def("look_at_tensor", &look_at_tensor);
    m.def("know_type", [](const py::object& dtype, int code) {
        dtype.inc_ref();
        known_types()[dtype.ptr()] = code;
    });
}
