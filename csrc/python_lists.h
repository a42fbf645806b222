// Python lists of integers as vectors; whatever else comes is a ValueError with `complaint`. An element's __index__ is the
// caller's code and may change the list while it is read, so its length is asked again for each element.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "checks.h"

namespace dc {

inline std::vector<int64_t> integers(const pybind11::handle& list, const char* complaint) {
    require(PyList_Check(list.ptr()), complaint);
    std::vector<int64_t> values;
    values.reserve(size_t(PyList_GET_SIZE(list.ptr())));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); i++) {
        const auto item = pybind11::reinterpret_borrow<pybind11::object>(PyList_GET_ITEM(list.ptr(), i));
        values.push_back(PyLong_AsLongLong(item.ptr()));
        if (values.back() == -1 && PyErr_Occurred()) PyErr_Clear(), throw std::invalid_argument(complaint);
    }
    return values;
}

// Page tables, one list a sequence -> all pages, and where each sequence's begin.
inline void read_tables(const pybind11::handle& tables, int64_t num_pages, std::vector<int32_t>& pages, std::vector<int64_t>& offsets) {
    require(PyList_Check(tables.ptr()), "tables: a list of lists of page numbers");
    offsets.assign(1, 0);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); i++) {
        const auto table = pybind11::reinterpret_borrow<pybind11::object>(PyList_GET_ITEM(tables.ptr(), i));
        for (const int64_t page : integers(table, "tables: lists of page numbers")) {
            require(page >= 0 && page < num_pages && page <= INT32_MAX, "tables: each page must lie in the cache");
            pages.push_back(int32_t(page));
        }
        offsets.push_back(int64_t(pages.size()));
    }
}

}  // namespace dc
