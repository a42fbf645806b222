// Python's door to Program; decode_core/program.py checks the buffers, cpu/program/program.cpp what a step brings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/pool/pool.h"
#include "cpu/program/program.h"
#include "cpu/program/rows.h"
#include "cpu/program/width.h"
#include "python_lists.h"

namespace py = pybind11;

namespace {

using Gil = py::gil_scoped_release;
using Buffer = std::pair<uintptr_t, int64_t>;       // address, columns; (0, 0): none

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

dc::Rows rows_of(const Buffer& buffer) { return {at<float>(buffer.first), buffer.second}; }

dc::Op make_op(dc::OpKind kind, bool on_logit_rows, const Buffer& x, const Buffer& out) {
    dc::Op op;
    op.kind = kind, op.on_logit_rows = on_logit_rows, op.x = rows_of(x), op.out = rows_of(out);
    return op;
}

void embed(dc::Program& program, const py::object& tiles, uintptr_t table, int type, int64_t rows, int64_t first, int64_t vocabulary,
           bool previous, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::embed, false, {}, out);
    if (!tiles.is_none()) op.tiles = tiles.cast<const dc::Tiles&>();
    op.table = at<const void>(table), op.table_type = dc::Element(type), op.previous_ids = previous;
    op.table_rows = rows, op.first_row = first, op.vocabulary = vocabulary;
    program.record(op);
}

// A table in a file: rows of GGUF blocks.
void look_up(dc::Program& program, uintptr_t table, int type, int64_t rows, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::embed, false, {}, out);
    op.table = at<const void>(table), op.tiles.type = dc::Weight(type), op.file_row_bytes = dc::row_bytes(dc::Weight(type), out.second);
    op.table_rows = op.vocabulary = rows;
    program.record(op);
}

void layer_inputs(dc::Program& program, const Buffer& projected, const Buffer& rows, uintptr_t weight, int64_t part, float epsilon, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::layer_inputs, false, projected, out);
    op.other = rows_of(rows), op.weight = at<const float>(weight), op.channels = part, op.epsilon = epsilon;
    op.a = __builtin_sqrtf(0.5f), op.b = __builtin_sqrtf(0.5f * float(part));
    program.record(op);
}

void gate_input(dc::Program& program, const Buffer& gate, const Buffer& inputs, int64_t first, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::gate_input, false, gate, out);
    op.other = rows_of(inputs), op.channels = first;
    program.record(op);
}

void rms_norm(dc::Program& program, bool on_logit_rows, const Buffer& x, uintptr_t weight, float epsilon, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::rms_norm, on_logit_rows, x, out);
    op.weight = at<const float>(weight), op.epsilon = epsilon;
    program.record(op);
}

void linear(dc::Program& program, bool on_logit_rows, const Buffer& x, const dc::Tiles& tiles, const Buffer& out, bool norm, uintptr_t weight,
            float epsilon, uintptr_t bias, int activation, const Buffer& residual, int64_t adapted) {
    dc::Op op = make_op(dc::OpKind::linear, on_logit_rows, x, out);
    op.adapted = adapted;
    op.tiles = tiles, op.norm = norm, op.weight = at<const float>(weight), op.epsilon = epsilon;
    op.bias = at<const float>(bias), op.activation = dc::Activation(activation), op.other = rows_of(residual);
    program.record(op);
}

void mix(dc::Program& program, bool on_logit_rows, const Buffer& x, float a, const Buffer& y, float b, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::mix, on_logit_rows, x, out);
    op.other = rows_of(y), op.a = a, op.b = b;
    program.record(op);
}

void smear(dc::Program& program, const Buffer& x, const Buffer& previous, uintptr_t gate, int64_t channels, float lambda, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::smear, false, x, out);
    op.other = rows_of(previous), op.weight = at<const float>(gate), op.channels = channels, op.a = lambda;
    program.record(op);
}

void softcap(dc::Program& program, bool on_logit_rows, const Buffer& x, float cap, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::softcap, on_logit_rows, x, out);
    op.a = cap;
    program.record(op);
}

void rope_append(dc::Program& program, const dc::RopeJob& job, int64_t max_positions, int64_t num_pages, int group) {
    dc::Op op = make_op(dc::OpKind::rope_append, false, {}, {});
    op.x = {const_cast<float*>(job.qkv), job.row_stride}, op.out = {job.q_out, job.heads * int64_t(job.head_size)};
    op.rope = job, op.max_positions = max_positions, op.num_pages = num_pages, op.page_group = group;
    program.record(op);
}

void paged_attention(dc::Program& program, const Buffer& q, uintptr_t cache, int cache_type, int64_t num_pages, int heads, int kv_heads,
                     int head_size, int window, float softcap, uintptr_t sinks, const Buffer& out, int group, int64_t page_stride) {
    dc::Op op = make_op(dc::OpKind::paged_attention, false, q, out);
    op.attention = {at<const float>(q.first), at<const void>(cache), dc::Element(cache_type), at<float>(out.first),
                    heads, kv_heads, head_size, window, softcap, at<const float>(sinks), page_stride};
    op.num_pages = num_pages, op.page_group = group;
    program.record(op);
}

void experts(dc::Program& program, const Buffer& x, const Buffer& logits, const dc::Tiles& gate_up, const dc::Tiles& down, const Buffer& out,
             uintptr_t weight, float epsilon, uintptr_t up_bias, uintptr_t down_bias, int activation, int64_t chosen, bool sum_to_one,
             bool residual, bool sigmoids, uintptr_t choice_bias, uintptr_t scales) {
    const auto routing = std::make_shared<dc::Routing>(logits.second, chosen, sum_to_one, sigmoids, program.max_tokens);
    const auto record = [&](dc::OpKind kind, const Buffer& from, const Buffer& to, const dc::Tiles* tiles, uintptr_t bias) {
        dc::Op op = make_op(kind, false, from, to);
        op.routing = routing, op.bias = at<const float>(bias);
        if (tiles) op.tiles = *tiles;
        if (kind == dc::OpKind::gate_up)
            op.activation = dc::Activation(activation), op.norm = true, op.weight = at<const float>(weight), op.epsilon = epsilon;
        if (kind == dc::OpKind::route) op.weight = at<const float>(scales);
        program.record(op);
    };
    record(dc::OpKind::route, logits, {}, nullptr, choice_bias);
    record(dc::OpKind::group, {}, {}, nullptr, 0);
    record(dc::OpKind::gate_up, x, {0, down.columns}, &gate_up, up_bias);
    record(dc::OpKind::down, {0, down.columns}, {0, out.second}, &down, down_bias);
    record(dc::OpKind::combine, residual ? x : Buffer{0, x.second}, out, nullptr, 0);
}

void short_conv(dc::Program& program, const Buffer& x, uintptr_t taps, int64_t size, uintptr_t bias, uintptr_t states, int64_t num_slots,
                const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::short_conv, false, x, out);
    op.weight = at<const float>(taps), op.channels = size, op.bias = at<const float>(bias);
    op.states = at<float>(states), op.num_slots = num_slots;
    program.record(op);
}

// sizes: H, P, N, G, the first head, the heads of a group; weights: decay, dt_bias, skip, mix_norm or 0: without a norm; u has room
// for what the convolution makes of p
void mamba2(dc::Program& program, const Buffer& x, uintptr_t taps, int64_t size, uintptr_t taps_bias, const std::array<int64_t, 6>& sizes,
            const std::array<uintptr_t, 4>& weights, float epsilon, const std::array<uintptr_t, 2>& states, int64_t num_slots, const Buffer& u,
            const Buffer& out) {
    dc::Op convolve = make_op(dc::OpKind::convolve, false, {x.first + uintptr_t(out.second) * sizeof(float), x.second}, u);
    convolve.weight = at<const float>(taps), convolve.channels = size, convolve.bias = at<const float>(taps_bias);
    convolve.states = at<float>(states[0]), convolve.num_slots = num_slots;
    program.record(convolve);
    dc::Op op = make_op(dc::OpKind::mamba2, false, x, out);
    op.other = rows_of(u), op.num_slots = num_slots;
    op.mamba = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], at<const float>(weights[0]), at<const float>(weights[1]), at<const float>(weights[2]),
                at<float>(states[1])};
    program.record(op);
    if (!weights[3]) return;
    dc::Op norm = make_op(dc::OpKind::rms_norm, false, out, out);
    norm.weight = at<const float>(weights[3]), norm.epsilon = epsilon, norm.channels = sizes[3];
    program.record(norm);
}

// sizes: H, P, the first head, the heads of a group
dc::Op of_groups(dc::OpKind kind, const Buffer& x, const std::array<int64_t, 4>& sizes, const Buffer& out) {
    dc::Op op = make_op(kind, false, x, out);
    op.mamba.heads = sizes[0], op.mamba.head_size = sizes[1], op.mamba.first_head = sizes[2], op.mamba.group_heads = sizes[3];
    return op;
}

void group_squares(dc::Program& program, const Buffer& x, const std::array<int64_t, 4>& sizes, const Buffer& out) {
    program.record(of_groups(dc::OpKind::group_squares, x, sizes, out));
}

void norm_groups(dc::Program& program, const Buffer& x, uintptr_t weight, const Buffer& squares, const std::array<int64_t, 4>& sizes, float epsilon,
                 const Buffer& out) {
    dc::Op op = of_groups(dc::OpKind::norm_groups, x, sizes, out);
    op.weight = at<const float>(weight), op.gates = rows_of(squares), op.epsilon = epsilon;
    program.record(op);
}

// sizes: taps, Hk, Hv, Dk, Dv; order: alternating, gates_by_key, heads_by_key; weights: taps, decay, dt_bias, norm
void delta_rule(dc::Program& program, const Buffer& x, const std::array<int64_t, 5>& sizes, const std::array<bool, 3>& order,
                const std::array<uintptr_t, 4>& weights, float epsilon, const std::array<uintptr_t, 2>& states, int64_t num_slots, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::delta_rule, false, x, out);
    op.delta = std::make_shared<const dc::DeltaRule>(dc::DeltaRule{
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], order[0], order[1], order[2], at<const float>(weights[0]), at<const float>(weights[1]),
        at<const float>(weights[2]), at<const float>(weights[3]), epsilon, at<float>(states[0]), at<float>(states[1])});
    op.num_slots = num_slots;
    program.record(op);
}

void split_gates(dc::Program& program, bool on_logit_rows, const Buffer& x, int64_t head_size, const Buffer& gates, const Buffer& out) {
    dc::Op op = make_op(dc::OpKind::split_gates, on_logit_rows, x, out);
    op.channels = head_size, op.gates = rows_of(gates);
    program.record(op);
}

// gate, or gated_add where something is added
void gated(dc::Program& program, bool on_logit_rows, const Buffer& x, const Buffer& gates, const Buffer& out, const Buffer& added) {
    dc::Op op = make_op(added.first ? dc::OpKind::gated_add : dc::OpKind::gate, on_logit_rows, x, out);
    op.gates = rows_of(gates), op.other = rows_of(added);
    program.record(op);
}

void exchange(dc::Program& program, dc::OpKind kind, bool on_logit_rows, const Buffer& x, const std::shared_ptr<dc::Ranks>& ranks,
              const Buffer& out, const Buffer& residual) {
    dc::Op op = make_op(kind, on_logit_rows, x, out);
    op.ranks = ranks, op.other = rows_of(residual);
    program.record(op);
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
              const py::object& state_reads, const py::object& write_rows, const py::object& write_slots, const py::list& adapters) {
    dc::StepInput in;
    in.adapters = adapters_of(adapters);
    in.all_rows = all_rows;
    in.token_ids = dc::integers(token_ids, "token_ids: a list of integers");
    in.previous_ids = dc::integers(previous, "previous: a list of integers");
    in.starts = dc::integers(starts, "starts: a list of integers");
    in.lengths = dc::integers(lengths, "lengths: a list of integers");
    in.logit_rows = dc::integers(logit_rows, "logit_rows: a list of integers");
    in.state_reads = dc::integers(state_reads, "state_reads: a list of integers");
    in.write_rows = dc::integers(write_rows, "write_rows: a list of integers");
    in.write_slots = dc::integers(write_slots, "write_slots: a list of integers");
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

}  // namespace

void bind_program(py::module_& m) {
    using dc::Program;
    using dc::OpKind;
    const auto simple = [](OpKind kind) {
        return [kind](Program& program, bool on_logit_rows, const Buffer& x, const Buffer& out) {
            program.record(make_op(kind, on_logit_rows, x, out));
        };
    };
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
    py::class_<dc::Adapter, std::shared_ptr<dc::Adapter>>(m, "Adapter")
        .def(py::init<int64_t>())
        .def("add", &add_to_adapter);
    py::class_<Program, std::unique_ptr<Program, Delete>>(m, "Program")
        .def(py::init([](int64_t max_tokens, int64_t max_rows) { return std::unique_ptr<Program, Delete>(new Program(max_tokens, max_rows)); }))
        .def("embed", &embed)
        .def("gather_rows", simple(OpKind::gather_rows))
        .def("copy", simple(OpKind::copy))
        .def("rms_norm", &rms_norm)
        .def("linear", &linear)
        .def("experts", &experts)
        .def("look_up", &look_up)
        .def("layer_inputs", &layer_inputs)
        .def("gate_input", &gate_input)
        .def("mix", &mix)
        .def("smear", &smear)
        .def("softcap", &softcap)
        .def("short_conv", &short_conv)
        .def("delta_rule", &delta_rule)
        .def("mamba2", &mamba2)
        .def("group_squares", &group_squares)
        .def("norm_groups", &norm_groups)
        .def("split_gates", &split_gates)
        .def("gated", &gated)
        .def("rope_append", &rope_append)
        .def("paged_attention", &paged_attention)
        .def("all_reduce", [](Program& p, bool logit_rows, const Buffer& x, const std::shared_ptr<dc::Ranks>& ranks, const Buffer& out,
                              const Buffer& residual) { exchange(p, OpKind::all_reduce, logit_rows, x, ranks, out, residual); })
        .def("all_gather", [](Program& p, bool logit_rows, const Buffer& x, const std::shared_ptr<dc::Ranks>& ranks,
                              const Buffer& out) { exchange(p, OpKind::all_gather, logit_rows, x, ranks, out, {}); })
        .def("sample", simple(OpKind::sample))
        .def("start", &start)
        .def("finish", &Program::finish, py::call_guard<Gil>())
        .def("times", &times)
        .def("describe", &Program::describe);
}
