// Python's door to Program; decode_core/program.py checks the buffers, cpu/program/program.cpp what a step brings.
// A part of bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <set>
#include <string>
#include <type_traits>

#include "cpu/pool/pool.h"
#include "cpu/program/pause.h"
#include "cpu/program/program.h"
#include "cpu/program/rows.h"
#include "cpu/program/width.h"
#include "python_lists.h"

namespace {

using Buffer = std::pair<uintptr_t, int64_t>;       // address, columns; (0, 0): none

dc::Rows rows_of(const Buffer& buffer) { return {at<float>(buffer.first), buffer.second}; }

// What Python gives for an op's fields, by their names in ops.def.
class Fields {
    const std::string op;
    const py::dict given;
    std::set<std::string> taken;

    [[noreturn]] void refuse(const std::string& why) const { throw py::type_error(op + ": " + why); }

    template <class T> static T read(py::handle value) {
        if constexpr (std::is_same_v<T, dc::Rows>) return rows_of(value.cast<Buffer>());
        else if constexpr (std::is_enum_v<T>) return T(value.cast<int>());
        else if constexpr (std::is_same_v<T, const void*> || std::is_same_v<T, const float*> || std::is_same_v<T, float*>)
            return reinterpret_cast<T>(value.cast<uintptr_t>());
        else return value.cast<T>();
    }

public:
    Fields(const std::string& op, const py::dict& given) : op(op), given(given) {}

    template <class T> bool take_if_given(const char* name, T& to) {
        if (!given.contains(name)) return false;
        taken.insert(name);
        try {
            to = read<T>(given[name]);
        } catch (const py::cast_error&) {
            refuse(std::string(name) + " is of another type");
        }
        return true;
    }

    template <class T> void take(const char* name, T& to) {
        if (!take_if_given(name, to)) refuse(std::string("no ") + name);
    }

    void check_no_more() const {
        for (const auto& [name, value] : given)
            if (!taken.count(name.cast<std::string>())) refuse("has no " + name.cast<std::string>());
    }
};

dc::Op op_of(const std::string& kind, bool on_logit_rows, const py::dict& given) {
    Fields fields(kind, given);
#define READS(name, columns) fields.take(#name, its.name);
#define WRITES(name, columns) fields.take(#name, its.name);
#define WEIGHTS(name, columns) fields.take(#name, its.name);
#define WEIGHTS_OR_NONE(name, columns) fields.take(#name, its.name);
#define STATES(name) fields.take(#name, its.name);
#define FIELD(type, name) fields.take(#name, its.name);
#define OPTION(type, name, value) fields.take_if_given(#name, its.name);
#define OP(name, runs, has, ...)            \
    if (kind == #name) {                    \
        dc::op::name its;                   \
        its.on_logit_rows = on_logit_rows;  \
        __VA_ARGS__                         \
        fields.check_no_more();             \
        return {std::move(its)};            \
    }
#include "ops.def"
    throw py::type_error("record: no op " + kind);
}

// One type for all texts: pybind11 makes templates anew for each of their lengths.
py::tuple three(const char* role, const char* field, const char* columns) { return py::make_tuple(role, field, columns); }

py::dict ops() {                            // what ops.def says: {name: (has, [(role, field, columns or type)])}
    py::dict all;
#define READS(name, columns) fields.append(three("reads", #name, #columns));
#define WRITES(name, columns) fields.append(three("writes", #name, #columns));
#define WEIGHTS(name, columns) fields.append(three("weights", #name, #columns));
#define WEIGHTS_OR_NONE(name, columns) fields.append(three("weights or none", #name, #columns));
#define STATES(name) fields.append(three("states", #name, ""));
#define FIELD(type, name) fields.append(three("field", #name, #type));
#define OPTION(type, name, value) fields.append(three("option", #name, #type));
#define OP(name, runs, has, ...)                    \
    {                                               \
        py::list fields;                            \
        __VA_ARGS__                                 \
        all[#name] = py::make_tuple(static_cast<const char*>(#has), fields);  \
    }
#include "ops.def"
    return all;
}

// At once, on the caller's thread.
void exchange_now(dc::Ranks& ranks, bool sums, int64_t rows, const Buffer& x, const Buffer& out, const Buffer& residual) {
    const dc::Exchange all{&ranks, sums, rows, x.second, at<const float>(x.first), at<const float>(residual.first), out.second, at<float>(out.first)};
    Gil released;
    const dc::DefaultFloatMode mode;
    dc::run_exchange(all);
}

template <class T>
std::vector<T> copied(uintptr_t address, size_t count) { return {at<const T>(address), at<const T>(address) + count}; }

std::vector<std::shared_ptr<const dc::Adapter>> adapters_of(const py::list& adapters) {
    std::vector<std::shared_ptr<const dc::Adapter>> all;
    for (const py::handle& adapter : adapters)
        all.push_back(adapter.is_none() ? nullptr : adapter.cast<std::shared_ptr<dc::Adapter>>());
    return all;
}

// tiles: (offset, first rank, ranks) of each
void add_to_adapter(dc::Adapter& adapter, int64_t number, int type, int64_t ranks, int64_t columns, uintptr_t a, uintptr_t scales, uintptr_t b,
                    int64_t b_bytes, const std::vector<std::array<int64_t, 3>>& tiles) {
    std::vector<dc::AdapterTile> own;
    for (const auto& [offset, first, count] : tiles) own.push_back({offset, int32_t(first), int32_t(count)});
    adapter.add(number, {ranks, columns, dc::Weight(type), at<const void>(a), at<const void>(b), at<const float>(scales), own.data(), int64_t(own.size())},
                b_bytes);
}

// `sampling`: None, or a SampleBatch's addresses and sizes as decode_core/program.py packs them.
int64_t start(dc::Program& program, const py::object& token_ids, const py::object& previous, const py::object& starts, const py::object& lengths,
              const py::object& tables, const py::object& logit_rows, const py::object& sampling, bool all_rows,
              const py::object& state_reads, const py::object& write_rows, const py::object& write_slots, const py::list& adapters,
              const py::object& ahead, const py::object& turns) {
    dc::StepInput in;
    in.adapters = adapters_of(adapters);
    in.all_rows = all_rows;
    in.token_ids = dc::integers(token_ids, "token_ids: a list of integers");
    in.previous_ids = dc::integers(previous, "previous: a list of integers");
    in.turns = dc::integers(turns, "turns: a list of integers");
    in.starts = dc::integers(starts, "starts: a list of integers");
    in.lengths = dc::integers(lengths, "lengths: a list of integers");
    in.logit_rows = dc::integers(logit_rows, "logit_rows: a list of integers");
    in.state_reads = dc::integers(state_reads, "state_reads: a list of integers");
    in.write_rows = dc::integers(write_rows, "write_rows: a list of integers");
    in.write_slots = dc::integers(write_slots, "write_slots: a list of integers");
    in.ahead = dc::integers(ahead, "ahead: a list of integers");
    dc::read_tables(tables, int64_t(INT32_MAX) + 1, in.pages, in.offsets);
    in.samples = !sampling.is_none();
    if (in.samples) {
        const auto [records, rows, count_ids, counts, counted, bias_ids, bias_values, biased] =
            sampling.cast<std::tuple<uintptr_t, size_t, uintptr_t, uintptr_t, size_t, uintptr_t, uintptr_t, size_t>>();
        in.sample_rows = copied<dc::SampleRow>(records, rows);
        in.count_ids = copied<int32_t>(count_ids, counted), in.counts = copied<int32_t>(counts, counted);
        in.bias_ids = copied<int32_t>(bias_ids, biased), in.bias_values = copied<float>(bias_values, biased);
    }
    Gil released;
    return program.start(std::move(in));
}

py::list times(const dc::Program& program) {
    py::list all;
    for (const dc::StepTimes& step : program.times()) {
        py::dict kinds;
        for (const auto& [what, us] : step.phases) {
            const py::str key(what);
            kinds[key] = py::float_(us + (kinds.contains(key) ? kinds[key].cast<double>() : 0.0));
        }
        py::dict one;
        one["tokens"] = step.tokens, one["logit_rows"] = step.logit_rows, one["width"] = step.width, one["stalled"] = step.stalled;
        one["gap_us"] = step.gap_us;
        one["us"] = step.us, one["phases"] = step.phases, one["kinds"] = kinds;
        all.append(one);
    }
    return all;
}

void bind_program(py::module_& m) {
    using dc::Program;
    struct Delete {                                 // waits for the step under way, so without the GIL
        void operator()(Program* program) const {
            Gil released;
            delete program;
        }
    };
    m.attr("MAX_TAPS") = dc::MAX_TAPS, m.attr("MAX_EXPERTS") = dc::MAX_EXPERTS, m.attr("MAX_CHOSEN") = dc::MAX_CHOSEN;
    py::class_<dc::Width>(m, "Width")               // for tests
        .def(py::init<int>())
        .def("choose", &dc::Width::choose)
        .def("learn", &dc::Width::learn);
    m.attr("LOOK_MS") = dc::LOOK_MS, m.attr("MAX_RANKS") = dc::MAX_RANKS;
    m.def("prepare_ranks", &dc::Ranks::prepare, py::arg("fd"), py::arg("count"), py::arg("part_bytes"));
    py::class_<dc::Ranks, std::shared_ptr<dc::Ranks>>(m, "Ranks")
        .def(py::init<int, int, double>())
        .def("exchange", &exchange_now)
        .def_property_readonly("next", [](const dc::Ranks& ranks) { return uintptr_t(ranks.next()); })
        .def("poison", [](dc::Ranks& ranks) { ranks.poison(); })
        .def("why", &dc::Ranks::why)
        .def_readonly("rank", &dc::Ranks::rank)
        .def_readonly("count", &dc::Ranks::count)
        .def_readonly("part_bytes", &dc::Ranks::part_bytes)
        .def_readonly("moves", &dc::Ranks::moves);
    m.def("pause_while", [](uintptr_t until, int64_t most_ns, int64_t slice_ns) {
        dc::pausing.most_ns.store(most_ns), dc::pausing.slice_ns.store(slice_ns), dc::pausing.sliced.store(0);
        dc::pausing.until.store(at<const int64_t>(until));
    });
    m.def("paused_ns", [] { return dc::pausing.waited_ns.load(); });
    m.attr("OPS") = ops();
    py::class_<dc::Routing>(m, "Routing")
        .def(py::init<int64_t, int64_t, bool, bool, int64_t>());
    py::class_<dc::Adapter, std::shared_ptr<dc::Adapter>>(m, "Adapter")
        .def(py::init<int64_t>())
        .def("add", &add_to_adapter);
    py::class_<Program, std::unique_ptr<Program, Delete>>(m, "Program")
        .def(py::init([](int64_t max_tokens, int64_t max_rows) { return std::unique_ptr<Program, Delete>(new Program(max_tokens, max_rows)); }))
        .def("record", [](Program& program, const std::string& op, bool on_logit_rows, const py::kwargs& fields) {
            program.record(op_of(op, on_logit_rows, fields));
        })
        .def("start", &start)
        .def("finish", &Program::finish, py::call_guard<Gil>())
        .def("times", &times)
        .def("describe", &Program::describe);
}

}  // namespace
