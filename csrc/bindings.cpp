// Python's door to the ops: pybind11 only. Pointers and streams come as integers, checked by csrc/decode_core/*.py; what is
// quicker to check here is checked here (checks.h). Every op releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "cpu/choices.h"
#include "cpu/pool/pool.h"
#include "ops.h"
#include "python_lists.h"

namespace py = pybind11;

namespace {

using Gil = py::gil_scoped_release;

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace

// In one source with these: pybind11's own functions take the compiler four seconds in each.
#include "bindings_program.inl.h"
#include "bindings_tiles.inl.h"

namespace {

// What arrays.py asks of a numpy array, by the buffer protocol, which takes a fifth of __array_interface__'s time:
// (address, format, item size, read-only, shape, strides in bytes); None if `array` has no buffer.
py::object look_at_buffer(const py::object& array) {
    Py_buffer view;
    if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT)) {
        PyErr_Clear();
        return py::none();
    }
    const auto numbers = [&](const Py_ssize_t* values) {
        py::tuple all(size_t(view.ndim));
        for (int i = 0; i < view.ndim; i++) all[size_t(i)] = py::int_(values[i]);
        return all;
    };
    py::tuple seen = py::make_tuple(reinterpret_cast<uintptr_t>(view.buf), view.format, view.itemsize, bool(view.readonly),
                                    numbers(view.shape), numbers(view.strides));
    PyBuffer_Release(&view);
    return std::move(seen);
}

// For tests: one staged phase on the pool.
//   chunk_us, slowdown    how long a chunk takes; how many times as long on the thread that begins first
//   held_us               so long every run of chunk 0 waits for a third thread to run it, too
//   throws                a chunk that throws, or -1
struct Trial {
    using Clock = std::chrono::steady_clock;
    using us = std::chrono::microseconds;
    int chunk_us, slowdown, held_us, throws;
    std::vector<std::atomic<int>> runs, puts;
    mutable std::atomic<size_t> slow_thread{0};

    static Trial& of(const void* context) { return *static_cast<Trial*>(const_cast<void*>(context)); }

    static void run(const void* context, int64_t chunk, void* staged) {
        Trial& its = of(context);
        const auto begin = Clock::now();
        its.runs[size_t(chunk)]++;
        const size_t me = std::hash<std::thread::id>()(std::this_thread::get_id());
        size_t nobody = 0;
        const bool slow = its.slow_thread.compare_exchange_strong(nobody, me) || its.slow_thread.load() == me;
        while (chunk == 0 && its.runs[0] < 3 && Clock::now() - begin < us(its.held_us)) dc::relax();
        while (Clock::now() - begin < us(slow ? its.chunk_us * its.slowdown : its.chunk_us)) dc::relax();
        if (chunk == its.throws) throw std::runtime_error("a chunk throws");
        if (staged) *static_cast<int64_t*>(staged) = chunk;
        else put(context, chunk, &chunk);
    }

    static void put(const void* context, int64_t chunk, const void* staged) {
        if (*static_cast<const int64_t*>(staged) == chunk) of(context).puts[size_t(chunk)]++;
    }
};

// -> how often each chunk was run, how often its output was put in its place, how long a thread would have waited at the end
py::tuple try_phase(int threads, int64_t chunks, int chunk_us, int slowdown, int held_us, int throws) {
    Trial trial{chunk_us, slowdown, held_us, throws, std::vector<std::atomic<int>>(size_t(chunks)), std::vector<std::atomic<int>>(size_t(chunks))};
    dc::Phase phase{&Trial::run, &trial, chunks};
    phase.put = &Trial::put, phase.staged_bytes = sizeof(int64_t);
    dc::Run run{&phase, 1, threads, 1'000'000, nullptr};
    int64_t patience = 0;
    {
        Gil released;
        dc::run_phases(run);
        patience = dc::patience_us();
    }
    const auto all = [](const std::vector<std::atomic<int>>& counts) { return py::cast(std::vector<int>(counts.begin(), counts.end())); };
    return py::make_tuple(all(trial.runs), all(trial.puts), patience);
}

void bind_runtime(py::module_& m) {
    m.def("look_at_buffer", &look_at_buffer);
    m.def("isa", &dc::chosen_name);
    m.def("set_isa", &dc::set_isa, py::arg("isa"));
    m.def("offered_isas", &dc::offered_names);
    m.def("isas_for_tests", &dc::names_for_tests);
    m.def("left_out_isas", &dc::left_out_names);
    m.def("missed_isa", &dc::missed_name);
    m.def("amx_refusal", &dc::amx_refusal);
    m.def("amx_refusal_of", &dc::amx_refusal_of, py::arg("edx"), py::arg("xcr0"), py::arg("error"));
    m.attr("CPU_FEATURES") = std::vector<std::string>(std::begin(dc::CPU_FEATURES), std::end(dc::CPU_FEATURES));
    m.def("cpu_has", [](const std::string& feature) { return dc::cpu_has(feature.c_str()); }, py::arg("feature"));
    m.def("set_threads", &dc::set_threads, py::arg("threads"), py::call_guard<Gil>());
    m.def("get_threads", &dc::get_threads);
    m.def("sleeping_threads", &dc::sleeping_threads);
    m.def("redone_chunks", &dc::redone_chunks);
    // For tests.
    m.attr("REDO_US") = dc::REDO_US;
    m.def("force_schedule", &dc::force_schedule, py::arg("width"), py::arg("steal_first"), py::arg("redo_us") = dc::MEASURED);
    m.def("refuse_memory", &dc::refuse_memory, py::arg("beyond"));
    m.def("try_phase", &try_phase, py::arg("threads"), py::arg("chunks"), py::arg("chunk_us") = 0, py::arg("slowdown") = 1,
          py::arg("held_us") = 0, py::arg("throws") = -1);
}

// --- sample -----------------------------------------------------------------------------------------------

// How often each row's answer holds each id of its context: [(tokens, prompt_tokens)] -> (ends of the rows, ids, counts).
py::tuple count_tokens(const py::list& rows, int64_t vocab) {
    static thread_local std::vector<int32_t> place;             // id -> its place in this row's list, or -1
    dc::require(vocab > 0 && vocab <= INT32_MAX, "vocab_size: must be positive");
    if (int64_t(place.size()) < vocab) place.assign(size_t(vocab), -1);
    std::vector<int32_t> ids, counts, ends;
    bool good = true;
    for (const py::handle& row : rows) {
        const auto pair = py::cast<py::tuple>(row);
        const int64_t prompt_tokens = py::cast<int64_t>(pair[1]);
        const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(pair[0].ptr(), "rows: tokens must be a list"));
        if (!list) throw py::error_already_set();
        const size_t begin = ids.size();
        for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(list.ptr()); i++) {        // an id's __index__ may shorten the list
            const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(list.ptr(), i));
            const int64_t id = PyLong_AsLongLong(item.ptr());
            good = id >= 0 && id < vocab;
            if (!good) break;
            if (place[size_t(id)] < 0) {
                place[size_t(id)] = int32_t(ids.size());
                ids.push_back(int32_t(id)), counts.push_back(0);
            }
            counts[size_t(place[size_t(id)])] += i >= prompt_tokens;
        }
        for (size_t i = begin; i < ids.size(); i++) place[size_t(ids[i])] = -1;
        ends.push_back(int32_t(ids.size()));
    }
    PyErr_Clear();                                              // of a token that is no integer
    dc::require(good, "rows: each of a row's tokens must be an id of the vocabulary");
    const auto bytes = [](const std::vector<int32_t>& v) { return py::bytes(reinterpret_cast<const char*>(v.data()), 4 * v.size()); };
    return py::make_tuple(py::cast(ends), bytes(ids), bytes(counts));
}

void sample(uintptr_t logits, int64_t rows, int64_t vocab, int64_t stride, uintptr_t params, uintptr_t count_ids,
            uintptr_t counts, uintptr_t bias_ids, uintptr_t bias_values, uintptr_t tokens) {
    const dc::SampleArgs args{
        reinterpret_cast<const float*>(logits), rows, vocab, stride, reinterpret_cast<const dc::SampleRow*>(params),
        reinterpret_cast<const int32_t*>(count_ids), reinterpret_cast<const int32_t*>(counts),
        reinterpret_cast<const int32_t*>(bias_ids), reinterpret_cast<const float*>(bias_values),
        reinterpret_cast<int32_t*>(tokens)};
    Gil released;
    dc::sample(args);
}

void bind_sample(py::module_& m) {
    m.def("count_tokens", &count_tokens, py::arg("rows"), py::arg("vocab_size"));
    m.def("sample", &sample);
    m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
        const dc::PhiloxWords words = dc::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
        return std::array<uint32_t, 4>{words.word[0], words.word[1], words.word[2], words.word[3]};
    });
}

// --- rope_append, paged_attention -------------------------------------------------------------------------

dc::AttentionPlan plan_attention(const py::object& tables, const py::object& lengths, const py::object& starts, int heads,
                                 int kv_heads, int64_t num_pages) {
    std::vector<int32_t> pages;
    std::vector<int64_t> offsets;
    dc::read_tables(tables, num_pages, pages, offsets);
    return {std::move(pages), std::move(offsets), dc::integers(lengths, "lengths: a list of integers"),
            dc::integers(starts, "starts: a list of integers"), heads, kv_heads, num_pages};
}

void paged_attention(dc::AttentionPlan& plan, int window, uintptr_t q, uintptr_t cache, int cache_type, uintptr_t out,
                     int head_size, float softcap, uintptr_t sinks, int64_t page_stride) {
    const dc::AttentionJob job{at<const float>(q), at<const void>(cache), dc::Element(cache_type), at<float>(out),
                               plan.heads, plan.kv_heads, head_size, window, softcap, reinterpret_cast<const float*>(sinks), page_stride};
    const dc::AttentionPlan::Work& work = plan.work(window, head_size);
    Gil released;
    dc::paged_attention(job, work);
}

// Sizes and flags first, then the addresses, as attention.py packs them.
dc::RopeJob rope_job(int64_t rows, int64_t row_stride, int heads, int kv_heads, int head_size, int half_rotated,
                     int norm, float epsilon, float post_scale, float q_scale,
                     float gate_scale, int64_t value_stride, int64_t gate_stride, int cache_type, int64_t max_positions,
                     int64_t num_pages, uintptr_t qkv, uintptr_t positions, uintptr_t slots, uintptr_t cos, uintptr_t sin,
                     uintptr_t q_norm, uintptr_t k_norm, uintptr_t value_embed, uintptr_t gate, uintptr_t q_out,
                     uintptr_t cache, int64_t page_stride, bool value_norm, bool values_from_keys) {
    dc::RopeJob job{};
    job.page_stride = page_stride, job.value_norm = value_norm, job.values_from_keys = values_from_keys;
    job.rows = rows, job.row_stride = row_stride;
    job.heads = heads, job.kv_heads = kv_heads, job.head_size = head_size;
    job.half_rotated = half_rotated;
    job.norm = dc::QkNorm(norm), job.epsilon = epsilon, job.post_scale = post_scale, job.q_scale = q_scale;
    job.gate_scale = gate_scale, job.value_stride = value_stride, job.gate_stride = gate_stride;
    job.cache_type = dc::Element(cache_type);
    job.qkv = at<const float>(qkv), job.positions = at<const int64_t>(positions), job.slots = at<const int64_t>(slots);
    job.cos = at<const float>(cos), job.sin = at<const float>(sin);
    job.q_norm = at<const float>(q_norm), job.k_norm = at<const float>(k_norm);
    job.value_embed = at<const float>(value_embed), job.gate = at<const float>(gate);
    job.q_out = at<float>(q_out), job.cache = at<void>(cache);
    dc::check_rope_indices(job, max_positions, num_pages);
    return job;
}

void bind_attention(py::module_& m) {
    py::class_<dc::AttentionPlan>(m, "AttentionPlan")
        .def_property_readonly("rows", &dc::AttentionPlan::rows)
        .def_readonly("heads", &dc::AttentionPlan::heads)
        .def_readonly("kv_heads", &dc::AttentionPlan::kv_heads)
        .def_readonly("num_pages", &dc::AttentionPlan::num_pages);
    py::class_<dc::RopeJob>(m, "RopeJob");
    m.def("plan_attention", &plan_attention);
    m.def("paged_attention", &paged_attention);
    m.def("rope_job", &rope_job);
    m.def("rope_append", &dc::rope_append, py::call_guard<Gil>());
    m.def("read_memory", [](uintptr_t memory, int64_t bytes) { return dc::read_memory(at<const void>(memory), bytes); },
          py::call_guard<Gil>());
}

}  // namespace

#if defined(DECODE_CORE_CUDA)
void bind_cuda(py::module_& m);          // csrc/cuda/bindings.cpp
#endif

PYBIND11_MODULE(_core, m) {
    m.doc() = "decode_core's compiled kernels; use chatlm.worker.kernels, which checks what it passes here";
    m.attr("INTERFACE") = DECODE_CORE_INTERFACE;            // from setup.py
    dc::set_isa_from_environment();
    bind_runtime(m);
    bind_sample(m);
    bind_attention(m);
    bind_tiles(m);
    bind_program(m);
#if defined(DECODE_CORE_CUDA)
    m.attr("cuda_compiled") = true;
    bind_cuda(m);
#else
    m.attr("cuda_compiled") = false;
#endif
}
