// Python's door to tiles; decode_core/tiles.py checks what comes in.
// A part of bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cpu/pool/pool.h"
#include "checks.h"
#include "cpu/tiles/least_rows.h"
#include "cpu/tiles/tiles.h"

namespace {

dc::Tiles allocate(dc::Arena& arena, int type, int64_t rows, int64_t columns) {
    const dc::Weight weight = dc::Weight(type);
    return {weight, rows, columns, arena.allocate(size_t(dc::tile_count(rows) * dc::tile_bytes(weight, columns))), dc::panels_of(weight)};
}

// Tiles of several q types, one each of `types`.
dc::Tiles allocate_mixed(dc::Arena& arena, const std::vector<int>& types, int64_t rows, int64_t columns) {
    const auto places = reinterpret_cast<dc::TilePlace*>(arena.allocate(types.size() * sizeof(dc::TilePlace)));
    int64_t bytes = 0;
    for (const int type : types) bytes += dc::tile_bytes(dc::Weight(type), columns);
    uint8_t* memory = arena.allocate(size_t(bytes));
    dc::Tiles tiles{dc::Weight(types[0]), rows, columns, memory, 0, places};
    for (size_t i = 0; i < types.size(); i++) {
        tiles.panels |= dc::panels_of(dc::Weight(types[i]));
        places[i] = {dc::Weight(types[i]), memory};
        memory += dc::tile_bytes(dc::Weight(types[i]), columns);
    }
    return tiles;
}

py::list types() {                          // [(name, columns of a block in a file)], by number
    py::list all;
    for (int i = 0; i < dc::WEIGHT_TYPES; i++) all.append(py::make_tuple(dc::name_of(dc::Weight(i)), dc::file_columns(dc::Weight(i))));
    return all;
}

py::list file_types() {                     // names of those that only files have
    py::list all;
#define QUANTIZED_WEIGHTS(...)
#define FILE_WEIGHTS(name, ...) all.append(#name);
#include "weights.def"
    return all;
}

py::list activations() {                    // [(name, gated)], by number from 1 on
    py::list all;
    for (size_t i = 1; i < std::size(dc::ACTIVATIONS); i++) all.append(py::make_tuple(dc::ACTIVATIONS[i].name, dc::ACTIVATIONS[i].gated));
    return all;
}

void embed(const dc::Tiles& tiles, uintptr_t ids, int64_t count, uintptr_t out, int64_t out_stride) {
    constexpr int64_t AT_ONCE = 32;
    dc::parallel_for((count + AT_ONCE - 1) / AT_ONCE, [&](int64_t item) {
        for (int64_t i = item * AT_ONCE; i < std::min((item + 1) * AT_ONCE, count); i++)
            dc::embed_row(tiles, at<const int64_t>(ids)[i], at<float>(out) + i * out_stride);
    });
}

// The whole product at once. Work is shared out in parts of `tiles_at_once` tiles by `groups_at_once` groups; 0: as suits.
void multiply(const dc::Tiles& tiles, uintptr_t x, int64_t rows, int64_t x_stride, bool norm, uintptr_t norm_weight, float epsilon,
              uintptr_t bias, uintptr_t residual, int64_t residual_stride, int activation, uintptr_t out, int64_t out_stride,
              int64_t out_columns, bool fine, int64_t tiles_at_once, int64_t groups_at_once) {
    void* prepared = dc::scratch(dc::prepared_bytes(tiles, rows));
    const dc::Product product{tiles, prepared, rows, at<const float>(bias), at<const float>(residual), residual_stride,
                              dc::Activation(activation), at<float>(out), out_stride, out_columns};
    const int64_t count = dc::tile_count(tiles.rows), groups = dc::group_count(rows);
    const int64_t tile_step = tiles_at_once ? tiles_at_once : groups < 16 ? 16 : count + count % 2;
    const int64_t group_step = groups_at_once ? groups_at_once : groups < 16 ? groups : 4;
    dc::parallel_for(groups, [&](int64_t g) {
        dc::prepare(tiles, at<const float>(x), x_stride, g * dc::GROUP_ROWS, std::min((g + 1) * dc::GROUP_ROWS, rows), norm,
                    at<const float>(norm_weight), epsilon, fine, prepared);
    });
    const int64_t parts = (count + tile_step - 1) / tile_step;
    dc::parallel_for(groups ? parts * ((groups + group_step - 1) / group_step) : 0, [&](int64_t item) {
        const int64_t tile = item % parts * tile_step, group = item / parts * group_step;
        dc::multiply(product, tile, std::min(tile + tile_step, count), group, std::min(group + group_step, groups));
    });
}

void bind_tiles(py::module_& m) {
    py::class_<dc::Arena>(m, "Arena")
        .def(py::init<size_t>())
        .def("allocate", &allocate, py::keep_alive<0, 1>())
        .def("allocate_mixed", &allocate_mixed, py::keep_alive<0, 1>())
        .def_property_readonly("used", &dc::Arena::used)
        .def_property_readonly("reserved", &dc::Arena::reserved);
    py::class_<dc::Tiles>(m, "Tiles")
        .def_property_readonly("count", [](const dc::Tiles& t) { return dc::tile_count(t.rows); })
        .def_property_readonly("bytes", [](const dc::Tiles& t) { return dc::bytes_of(t); })
        .def_property_readonly("address", [](const dc::Tiles& t) { return reinterpret_cast<uintptr_t>(t.memory); })
        .def("fill", [](const dc::Tiles& to, uintptr_t source, int source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                        int64_t tile_step) {
            return dc::fill_tiles(to, at<const uint8_t>(source), dc::Weight(source_type), row_stride, rows, first_tile, tile_step);
        }, py::call_guard<Gil>())
        .def("embed", &embed, py::call_guard<Gil>())
        .def("multiply", &multiply, py::call_guard<Gil>());
    m.def("weight_types", &types);
    m.def("file_types", &file_types);
    m.def("activations", &activations);
    m.def("amx_rows", [](int type, int64_t columns) -> int64_t {
        const dc::Amx amx = dc::chosen_amx();
        return amx == dc::Amx::measured ? dc::measured_rows(dc::Weight(type), columns) : amx != dc::Amx::none;
    }, py::arg("type"), py::arg("columns"), py::call_guard<Gil>());
    m.def("measure_amx_rows", [](int type, int64_t columns) {
        dc::require(dc::chosen_amx() != dc::Amx::none, "isa: must be one of the amx ones");
        return dc::measure_least_rows(dc::Weight(type), columns, dc::wide_kernel(dc::chosen_amx()), dc::narrow_kernels());
    }, py::arg("type"), py::arg("columns"), py::call_guard<Gil>());
    m.def("row_bytes", [](int type, int64_t columns) { return dc::row_bytes(dc::Weight(type), columns); });
}

}  // namespace
