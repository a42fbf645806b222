// What a chunk of each phase does, and what is reported about a step that has run.
#include "cpu/program/step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu/program/pause.h"
#include "cpu/program/rows.h"

namespace dc {
namespace {

const RowKernels& row_kernels_here() { return DC_CHOSEN(row_kernels); }

size_t wide_bytes(const op::linear& op, int64_t rows) { return op.norm ? size_t(rows * op.x.columns) * sizeof(float) : 0; }

void copy_row(float* out, const float* x, int64_t columns) { std::memcpy(out, x, size_t(columns) * sizeof(float)); }

}  // namespace

// ---- x made ready, and what adapters make of it

// Makes rows [begin, end) of x ready, as rows `to` ... of `prepared`. `wide` has wide_bytes.
void Step::prepare_rows(const op::linear& op, int64_t begin, int64_t end, int64_t to, void* prepared, float* wide) const {
    const Tiles& w = op.tiles;
    const int64_t rows = end - begin, columns = op.x.columns;
    const bool adapted = op.adapted >= 0 && !token_adapters.empty();
    const bool apart = op.norm && (adapted || columns != w.columns);    // others read it as well, or it is of more columns than the product takes
    for (int64_t row = 0; apart && row < rows; row++)
        row_kernels_here().rms_norm(op.x.row(begin + row), op.norm_weight, op.eps, columns, wide + row * columns);
    const float* const x = apart ? wide : op.x.row(begin);
    if (adapted) shrink_rows(op, begin, end, x);
    prepare(w, x - to * columns, columns, to, to + rows, op.norm && !apart, op.norm_weight, op.eps, op.fine, prepared);
}

// Computes u of rows [begin, end). `normed` is their x after the norm. Rows of one adapter go together, wherever they are.
void Step::shrink_rows(const op::linear& op, int64_t begin, int64_t end, const float* normed) const {
    const auto& adapters = adapters_of(op);
    const float* x[SHRUNK_ROWS];
    float* u[SHRUNK_ROWS];
    for (int64_t first = begin; first < end; first++) {
        const AdapterMatrix* const own = adapters[size_t(first)];
        if (!own || !own[op.adapted].ranks) continue;
        int64_t before = 0, count = 0;          // those of the same adapter that were taken together with an earlier one
        for (int64_t row = begin; row < first; row++) before += adapters[size_t(row)] == own;
        if (before % SHRUNK_ROWS) continue;
        for (int64_t row = first; row < end && count < SHRUNK_ROWS; row++) {
            if (adapters[size_t(row)] != own) continue;
            x[count] = normed + (row - begin) * op.x.columns, u[count++] = shrunk.data() + row * most_ranks;
        }
        row_kernels_here().shrink(own[op.adapted], x, count, u);
    }
}

AdaptedRows Step::adapted_rows(const op::linear& op, int64_t first) const {
    if (op.adapted < 0 || token_adapters.empty()) return {};
    const auto& adapters = adapters_of(op);
    int64_t next = -1;                          // the adapted product that comes after this one
    for (size_t i = size_t(op.index) + 1; i < ops.size() && next < 0; i++)
        if (const auto* other = ops[i].as<op::linear>()) next = other->adapted;
    return {adapters.data() + first, op.adapted, shrunk.data() + first * most_ranks, most_ranks, next};
}

// The product of `rows` rows from `first` on; its outputs begin at `out`.
Product Step::product_of(const op::linear& op, const void* prepared, int64_t first, int64_t rows, float* out) const {
    return {op.tiles, prepared, rows, op.bias, op.residual.at ? op.residual.row(first) : nullptr, op.residual.columns, op.activation,
            out, op.out.columns, op.out.columns, adapted_rows(op, first)};
}

Step::Exchanged Step::exchanged_of(int index) const {
    if (index < 0 || index >= int(ops.size())) return {};
    if (const auto* op = ops[size_t(index)].as<op::all_reduce>()) return {op->ranks, true, op->x, op->residual, op->out};
    if (const auto* op = ops[size_t(index)].as<op::all_gather>()) return {op->ranks, false, op->x, {}, op->out};
    return {};
}

// Does the next op exchange what this product or embedding gives? Then it is written where the other ranks read it.
bool Step::is_offered(int index) const {
    const Exchanged next = exchanged_of(index + 1);
    if (index < 0 || !next.ranks) return false;
    const Op& op = ops[size_t(index)];
    const auto *product = op.as<op::linear>();
    const auto *embedding = op.as<op::embed>();
    if (!product && !embedding) return false;
    const Rows& out = product ? product->out : embedding->out;
    return ops[size_t(index) + 1].any().on_logit_rows == op.any().on_logit_rows && next.x.at == out.at && next.x.columns == out.columns &&
           next.residual.at != out.at;
}

float* Step::product_row(const AnyOp& op, const Rows& out, int64_t row) const {
    return is_offered(op.index) ? exchanged_of(op.index + 1).ranks->next() + row * out.columns : out.row(row);
}

void Step::resolve_ids(const std::vector<int32_t>& before) {
    const auto drawn_by = [&](int64_t row) {
        const int64_t id = before.at(size_t(row));
        if (id >= vocab) throw std::out_of_range("token " + std::to_string(id) + " was drawn, and the smallest table has " + std::to_string(vocab) + " rows");
        return id;
    };
    for (int64_t& id : input.token_ids)
        if (id < 0) id = drawn_by(-1 - id);
    for (int64_t& id : input.previous_ids)
        if (id < -1) id = drawn_by(-2 - id);
}

void Step::run(int width, const std::function<void()>& begun) {
    outcome = {phases.data(), int64_t(phases.size()), width, by_rows() ? 20 * SPIN_US : SPIN_US, stamps.data(), begun, false};
    run_phases(outcome);
}

void Step::do_rows(const Part& part, int64_t chunk) const {
    const int64_t begin = chunk * part.rows_per_chunk, end = std::min(begin + part.rows_per_chunk, part.rows);
    for (int i = part.first; i < part.end; i++) std::visit([&](const auto& op) { do_rows(op, begin, end); }, ops[size_t(i)].is);
    if (part.prepares < 0) return;
    const auto& op = *ops[size_t(part.prepares)].as<op::linear>();
    prepare_rows(op, begin, end, begin, memory.prepared, static_cast<float*>(scratch(wide_bytes(op, end - begin))));
}

// ---- ops of single rows

void Step::do_row(const op::embed& op, int64_t row) const {
    const auto& ids = op.by_position ? positions : op.previous_ids ? input.previous_ids : input.token_ids;
    const int64_t id = std::max<int64_t>(ids[size_t(token_of(op, row))], 0) - op.first_row;
    float* const out = product_row(op, op.out, row);
    if (id < 0 || id >= op.table_rows) return std::fill_n(out, op.out.columns, -0.0f), void();      // another rank has it
    if (op.file_row_bytes)
        return read_file_row(op.file_type, static_cast<const uint8_t*>(op.table) + id * op.file_row_bytes, op.out.columns, out);
    if (op.tiles.memory) return embed_row(op.tiles, id, out);
    const char* from = static_cast<const char*>(op.table) + id * op.out.columns * bytes_of(op.table_type);
    row_kernels_here().widen(op.table_type, from, op.out.columns, out);
}

void Step::do_row(const op::gather_rows& op, int64_t row) const { copy_row(op.out.row(row), op.x.row(gathered[size_t(row)]), op.out.columns); }
void Step::do_row(const op::copy& op, int64_t row) const { copy_row(op.out.row(row), op.x.row(row), op.out.columns); }

void Step::do_row(const op::clamp& op, int64_t row) const {
    const float* const x = op.x.row(row);
    float* const out = op.out.row(row);
    for (int64_t c = 0; c < op.out.columns; c++) {
        const float raised = x[c] < op.low[c] ? op.low[c] : x[c];
        out[c] = raised > op.high[c] ? op.high[c] : raised;
    }
}

void Step::do_row(const op::rms_norm& op, int64_t row) const {
    const int64_t size = op.out.columns / op.groups;
    for (int64_t c = 0; c < op.out.columns; c += size)
        row_kernels_here().rms_norm(op.x.row(row) + c, op.weight ? op.weight + c : nullptr, op.eps, size, op.out.row(row) + c);
}

void Step::do_row(const op::layer_norm& op, int64_t row) const {
    row_kernels_here().layer_norm(op.x.row(row), op.weight, op.bias, op.eps, op.count ? op.count : op.out.columns, op.out.columns, op.out.row(row));
}

void Step::do_row(const op::mix& op, int64_t row) const {
    row_kernels_here().mix(op.x.row(row), op.resid_lambda, op.x0.row(row), op.x0_lambda, op.out.columns, op.out.row(row));
}

void Step::do_row(const op::smear& op, int64_t row) const {
    const float* previous = input.previous_ids[size_t(token_of(op, row))] >= 0 ? op.previous.row(row) : nullptr;
    row_kernels_here().smear(op.x.row(row), previous, op.gate, op.channels, op.smear_lambda, op.out.columns, op.out.row(row));
}

void Step::do_row(const op::route& op, int64_t row) const {
    Routing& to = *op.routing;
    const size_t first = size_t(row * to.chosen);
    const Router router{op.bias, {op.groups, op.kept_groups, op.group_best}, to.sum_to_one, op.scale};
    if (op.sparse) row_kernels_here().route_sparse(op.logits.row(row), op.farthest, to.experts, to.chosen, &to.ids[first], &to.shares[first]);
    else if (to.sigmoids) row_kernels_here().route_sigmoids(op.logits.row(row), router, to.experts, to.chosen, &to.ids[first], &to.shares[first]);
    else row_kernels_here().route(op.logits.row(row), router, to.experts, to.chosen, &to.ids[first], &to.shares[first]);
    for (int64_t j = 0; !to.sigmoids && op.scale != 1.0f && j < to.chosen; j++) to.shares[first + size_t(j)] *= op.scale;
    for (int64_t j = 0; op.scales && j < to.chosen; j++) to.shares[first + size_t(j)] *= op.scales[to.ids[first + size_t(j)]];
}

void Step::do_row(const op::combine& op, int64_t row) const {
    const Routing& routing = *op.routing;
    const int64_t first = row * routing.chosen;
    const float* added[MAX_CHOSEN];
    for (int64_t j = 0; j < routing.chosen; j++) added[j] = memory.added + routing.pair_of[size_t(first + j)] * op.out.columns;
    row_kernels_here().combine(op.x.at ? op.x.row(row) : nullptr, added, &routing.shares[size_t(first)], routing.chosen, op.out.columns, op.out.row(row));
}

// x has for each head its columns and then those of its gate, and last all that has no gates.
void Step::do_row(const op::split_gates& op, int64_t row) const {
    const float* x = op.x.row(row);
    const int64_t size = op.gates.columns;
    for (int64_t c = 0; c < size; c += op.head_size) {
        copy_row(op.out.row(row) + c, x + 2 * c, op.head_size);
        copy_row(op.gates.row(row) + c, x + 2 * c + op.head_size, op.head_size);
    }
    copy_row(op.out.row(row) + size, x + 2 * size, op.out.columns - size);
}

void Step::do_row(const op::gate& op, int64_t row) const {
    const int64_t columns = op.out.columns, size = columns / op.gates.columns;      // of one gate
    const float *x = op.x.row(row), *gates = op.gates.row(row);
    if (size == 1) return row_kernels_here().gate(x, gates, op.softplus, columns, op.out.row(row));
    for (int64_t c = 0; c < columns; c += size) row_kernels_here().gate_head(x + c, gates[c / size], op.softplus, size, op.out.row(row) + c);
}

void Step::do_row(const op::gated_add& op, int64_t row) const {
    row_kernels_here().gated_add(op.x.row(row), op.added.row(row), *op.gate.row(row), op.out.columns, op.out.row(row));
}

// sqrt(1/2) (norm of each part + sqrt(P) rows)
void Step::do_row(const op::layer_inputs& op, int64_t row) const {
    float* const out = op.out.row(row);
    for (int64_t c = 0; c < op.out.columns; c += op.part)
        row_kernels_here().rms_norm(op.projected.row(row) + c, op.weight, op.eps, op.part, out + c);
    row_kernels_here().mix(out, __builtin_sqrtf(0.5f), op.rows.row(row), __builtin_sqrtf(0.5f * float(op.part)), op.out.columns, out);
}

void Step::do_row(const op::gate_input& op, int64_t row) const {
    row_kernels_here().gate_input(op.gate.row(row), op.inputs.row(row) + op.first, op.out.columns, op.out.row(row));
}

// What the heads of this rank add to the sum of each group.
void Step::do_row(const op::group_squares& op, int64_t row) const {
    const int64_t P = op.head_size;
    float* const out = op.out.row(row);
    std::fill_n(out, op.out.columns, 0.0f);
    for (int64_t head = 0; head < op.heads; head++)
        out[(op.first_head + head) / op.group_heads] += row_kernels_here().squares(op.x.row(row) + head * P, P);
}

void Step::do_row(const op::norm_groups& op, int64_t row) const {
    const int64_t P = op.head_size;
    for (int64_t head = 0; head < op.heads; head++) {
        const float mean = op.squares.row(row)[(op.first_head + head) / op.group_heads] / float(op.group_heads * P);
        row_kernels_here().scale(op.x.row(row) + head * P, 1.0f / __builtin_sqrtf(mean + op.eps), op.weight + head * P, P, op.out.row(row) + head * P);
    }
}

void Step::do_row(const op::mean_squares& op, int64_t row) const {
    const float* const q = op.x.row(row);
    float* const out = op.out.row(row);
    std::fill_n(out, op.out.columns, 0.0f);
    out[0] = row_kernels_here().squares(q, op.q_columns) / op.q_size;
    out[1] = row_kernels_here().squares(q + op.q_columns, op.k_columns) / op.k_size;
}

void Step::do_row(const op::norm_qk& op, int64_t row) const {
    const float *const q = op.x.row(row), *const means = op.means.row(row);
    float* const out = op.out.row(row);
    row_kernels_here().scale(q, 1.0f / __builtin_sqrtf(means[0] + op.eps), op.q_norm, op.q_columns, out);
    row_kernels_here().scale(q + op.q_columns, 1.0f / __builtin_sqrtf(means[1] + op.eps), op.k_norm, op.k_columns, out + op.q_columns);
    const int64_t both = op.q_columns + op.k_columns;
    if (out != q) copy_row(out + both, q + both, op.out.columns - both);
}

void Step::do_row(const op::norm_heads& op, int64_t row) const {
    const float* const x = op.x.row(row);
    float* const out = op.out.row(row);
    const int64_t both = op.q_columns + op.k_columns, size = op.head_size;
    for (int64_t c = 0; c < both; c += size) {
        const float* const weight = c < op.q_columns ? op.q_norm + c : op.k_norm + (c - op.q_columns);
        row_kernels_here().layer_norm(x + c, weight, nullptr, op.eps, op.count, size, out + c);
    }
    if (out != x) copy_row(out + both, x + both, op.out.columns - both);
}

void Step::do_row(const op::scale_rows& op, int64_t row) const {
    const int64_t position = std::min(positions[size_t(token_of(op, row))], op.max_positions - 1);
    row_kernels_here().scale(op.x.row(row), op.scales[position], nullptr, op.out.columns, op.out.row(row));
}

// ---- latent attention

void Step::do_row(const op::turn_queries& op, int64_t row) const {
    const int64_t at = turn_of(token_of(op, row)) * op.half, turned = 2 * op.half;
    const int64_t size = op.x.columns / op.heads, kept = op.out.columns / op.heads - turned;
    for (int64_t head = 0; head < op.heads; head++) {
        float* const q = op.out.row(row) + head * (kept + turned);
        row_kernels_here().scale(q, op.scale, nullptr, kept, q);
        row_kernels_here().turn(op.x.row(row) + (head + 1) * size - turned, op.cos + at, op.sin + at, op.half, op.adjacent, op.scale, q + kept);
        if (op.packed) attention_kernels_of(Element::q8_0).turn_latent(q, int(kept + turned), int(kept));
    }
}

void Step::do_row(const op::append_latents& op, int64_t row) const {
    const int64_t token = token_of(op, row), slot = slots[size_t(op.group)][size_t(token)];
    if (slot < 0) return;                       // padding
    const int64_t at = turn_of(token) * op.half, size = op.x.columns, kept = size - 2 * op.half;
    alignas(64) float key[MAX_LATENT_SIZE];
    row_kernels_here().rms_norm(op.x.row(row), op.weight, op.eps, kept, key);
    row_kernels_here().turn(op.x.row(row) + kept, op.cos + at, op.sin + at, op.half, op.adjacent, 1.0f, key + kept);
    char* const cache = const_cast<char*>(static_cast<const char*>(op.cache));
    if (op.cache_type == Element::q8_0) {
        uint8_t* const page = reinterpret_cast<uint8_t*>(cache) + page_of(slot) * op.page_stride;
        return attention_kernels_of(Element::q8_0).pack_latent(key, int(size), int(kept), page, place_of(slot));
    }
    const int64_t element = page_of(slot) * op.page_stride + place_of(slot) * size;
    row_kernels_here().narrow(op.cache_type, key, size, cache + element * bytes_of(op.cache_type));
}

void Step::do_by_head(const Part& part, int64_t chunk) const {
    const auto& op = op_of<op::by_head>(part);
    const int64_t pieces = part.chunks / op.heads, head = chunk / pieces, piece = chunk % pieces, rows = part.rows;
    const int64_t each = tile_count(op.tiles.rows) / op.heads, first = head * each, columns = first * TILE_ROWS;
    void* const prepared = scratch(prepared_bytes(op.tiles, rows));
    prepare(op.tiles, op.x.at + head * (op.x.columns / op.heads), op.x.columns, 0, rows, false, nullptr, 0.0f, op.fine, prepared);
    float* const out = op.out.at + head * (op.out.columns / op.heads);
    const Product product{op.tiles, prepared, rows, nullptr, nullptr, 0, Activation::none, out - columns, op.out.columns, columns + each * TILE_ROWS};
    multiply(product, first + each * piece / pieces, first + each * (piece + 1) / pieces, 0, group_count(rows));
}

// ---- ops of some rows

void Step::do_rows(const op::rope_append& op, int64_t begin, int64_t end) const {
    RopeJob job = op.job;
    const int64_t* const places = slots[size_t(op.group)].data();
    const int64_t* const turns = input.turns.empty() ? positions.data() : input.turns.data();
    job.rows = tokens, job.positions = turns, job.slots = places;
    if (!is_of_needed(op)) return attention_kernels_of(job.cache_type).rope_rows(job, begin, end);
    for (int64_t row = begin; row < end; row++) {
        const int64_t token = needed[size_t(row)];
        job.positions = turns + token - row, job.slots = places + token - row;
        attention_kernels_of(job.cache_type).rope_rows(job, row, row + 1);
    }
}

void Step::do_rows(const op::linear& op, int64_t begin, int64_t end) const {
    const size_t bytes = (prepared_bytes(op, end - begin) + 63) / 64 * 64;
    char* memory = static_cast<char*>(scratch(bytes + wide_bytes(op, end - begin)));
    prepare_rows(op, begin, end, 0, memory, reinterpret_cast<float*>(memory + bytes));
    multiply(product_of(op, memory, begin, end - begin, product_row(op, op.out, begin)), 0, tile_count(op.tiles.rows), 0, group_count(end - begin));
}

// Moves each needed row to its place among them. They ascend, so no row is overwritten before it has moved.
void Step::do_move_needed(const Part&, int64_t chunk) const {
    const Rows& rows = live[size_t(chunk)];
    for (size_t i = 0; i < needed.size(); i++)
        if (needed[i] != int64_t(i)) std::memcpy(rows.row(int64_t(i)), rows.row(needed[i]), size_t(rows.columns) * sizeof(float));
}

// Calls visit() with the rows of each sequence, and what they read and write.
template <class Visit>
void Step::each_sequence(Visit visit) const {
    size_t write = 0;
    for (size_t i = 0; i < input.lengths.size(); i++) {
        const int64_t begin = input.starts[i], end = input.starts[i + 1];
        const size_t from = write;
        while (write < input.write_rows.size() && input.write_rows[write] < end) write++;
        visit(StateRows{begin, end, input.lengths[i] > end - begin ? input.state_reads[i] : -1, input.write_rows.data() + from,
                        input.write_slots.data() + from, int64_t(write - from)});
    }
}

// All rows, in columns [first, last).
template <class T>
void Step::convolve(const T& op, int64_t first, int64_t last) const {
    const auto kernel = std::is_same_v<T, op::convolve> ? row_kernels_here().convolve : row_kernels_here().short_conv;
    each_sequence([&](const StateRows& rows) {
        kernel({op.x.at, op.x.columns, op.out.at, op.taps, op.bias, op.out.columns, op.size, op.states, rows}, first, last);
    });
}

void Step::do_rows(const op::short_conv& op, int64_t, int64_t) const { convolve(op, 0, op.out.columns); }      // all rows are here
void Step::do_rows(const op::convolve& op, int64_t, int64_t) const { convolve(op, 0, op.out.columns); }

template <class T>
void Step::do_convolution(const Part& part, int64_t chunk) const {
    const T& op = op_of<T>(part);
    const int64_t units = op.out.columns / 16;
    convolve(op, units * chunk / part.chunks * 16, units * (chunk + 1) / part.chunks * 16);
}
template void Step::do_convolution<op::short_conv>(const Part&, int64_t) const;
template void Step::do_convolution<op::convolve>(const Part&, int64_t) const;

void Step::do_delta_rule(const Part& part, int64_t chunk) const {
    const DeltaRule rule(op_of<op::delta_rule>(part));
    float* const memory = static_cast<float*>(scratch(size_t(rule.memory_floats()) * sizeof(float)));
    each_sequence([&](const StateRows& rows) { DC_CHOSEN(delta_rule)({&rule, rule.x.at, rule.out.at, rows, chunk, memory}); });
}

void Step::do_mamba2(const Part& part, int64_t chunk) const {
    const Mamba2 layer(op_of<op::mamba2>(part));
    float* const memory = static_cast<float*>(scratch(size_t(layer.head_values()) * sizeof(float)));
    for (int64_t head = layer.heads * chunk / part.chunks; head < layer.heads * (chunk + 1) / part.chunks; head++)
        each_sequence([&](const StateRows& rows) { DC_CHOSEN(mamba2)({&layer, layer.x.at, layer.u.at, layer.out.at, rows, head, memory}); });
}

int64_t DeltaRule::memory_floats() const {
    return heads_of_key() * (key_size * value_size + 2 * TILE) + (size - 1 + TILE) * head_columns();
}

// ---- experts

void Step::do_pause(const Part&, int64_t) const { pausing.wait(); }
void Step::do_group(const Part& part, int64_t) const { op_of<op::group>(part).routing->group(part.rows); }

Step::ExpertProduct Step::experts_of(const AnyOp& op) const {
    if (const auto* its = ops[size_t(op.index)].as<op::gate_up>())
        return {*its->routing, its->tiles, its->bias, its->activation, its->x, false, its->norm, its->norm_weight, its->eps, its->fine, memory.hidden};
    const auto& its = std::get<op::down>(ops[size_t(op.index)].is);
    return {*its.routing, its.tiles, its.bias, Activation::none, {memory.hidden, its.tiles.columns}, true, false, nullptr, 0, its.fine, memory.added};
}

void Step::do_gather(const Part& part, int64_t chunk) const {
    const ExpertProduct its = experts_of(ops[size_t(part.first)].any());
    const Routing& routing = its.routing;
    const int64_t begin = routing.pairs() * chunk / part.chunks, end = routing.pairs() * (chunk + 1) / part.chunks, K = its.tiles.columns;
    for (const Routing::Expert& expert : routing.active)
        for (int64_t i = std::max<int64_t>(begin, expert.first); i < std::min<int64_t>(end, expert.first + expert.count); i++) {
            const float* x = its.x.row(its.of_pairs ? i : routing.row_of[size_t(i)]);
            const int64_t to = expert.panel * int64_t(PANEL_ROWS) + i - expert.first;
            prepare(its.tiles, x - to * K, K, to, to + 1, its.norm, its.norm_weight, its.eps, its.fine, memory.panels);
        }
}

// The chunk's part of the tiles of all experts that were chosen.
template <class Visit>
void Step::each_piece(const Part& part, int64_t chunk, Visit visit) const {
    const ExpertProduct its = experts_of(ops[size_t(part.first)].any());
    const Routing& routing = its.routing;
    const int64_t unit = unit_of(its.activation), each = tile_count(its.tiles.rows) / unit / routing.experts;
    const int64_t all = each * int64_t(routing.active.size()), end = all * (chunk + 1) / part.chunks;
    for (int64_t at = all * chunk / part.chunks, next; at < end; at = next) {
        const Routing::Expert& expert = routing.active[size_t(at / each)];
        const int64_t before = at / each * each, first = expert.id * each;      // of its units in `all`, and in the matrix
        next = std::min(end, before + each);
        visit(Piece{expert, (first + at - before) * unit, (first + next - before) * unit, (at - before) * TILE_ROWS,
                    (next - before) * TILE_ROWS, each * TILE_ROWS});
    }
}

void Step::do_experts(const Part& part, int64_t chunk, float* staged) const {
    const ExpertProduct its = experts_of(ops[size_t(part.first)].any());
    const int64_t panel = panel_bytes(its.tiles.panels, its.tiles.columns);
    each_piece(part, chunk, [&](const Piece& piece) {
        const int64_t columns = piece.column_end - piece.column_begin, before = piece.expert.id * piece.width;  // other experts' columns
        Product product{its.tiles, static_cast<char*>(memory.panels) + piece.expert.panel * panel, piece.expert.count, its.bias,
                        nullptr, 0, its.activation, its.out + piece.expert.first * piece.width - before, piece.width, before + piece.width};
        if (staged) product.out = staged - before - piece.column_begin, product.out_stride = columns;
        multiply(product, piece.tile_begin, piece.tile_end, 0, group_count(piece.expert.count));
        if (staged) staged += columns * piece.expert.count;
    });
}

void Step::put_experts(const Part& part, int64_t chunk, const float* staged) const {
    float* const pairs = experts_of(ops[size_t(part.first)].any()).out;
    each_piece(part, chunk, [&](const Piece& piece) {
        const int64_t columns = piece.column_end - piece.column_begin;
        for (int64_t i = piece.expert.first; i < piece.expert.first + piece.expert.count; i++, staged += columns)
            std::memcpy(pairs + i * piece.width + piece.column_begin, staged, size_t(columns) * sizeof(float));
    });
}

// ---- products and attention

Step::Range Step::tiles_of(const Part& part, int64_t chunk) const {
    const auto& op = op_of<op::linear>(part);
    const int64_t unit = unit_of(op.activation), units = tile_count(op.tiles.rows) / unit;
    return {units * chunk / part.chunks * unit, units * (chunk + 1) / part.chunks * unit};
}

Step::Range Step::columns_of(const Part& part, int64_t chunk) const {
    const auto& op = op_of<op::linear>(part);
    const int64_t unit = unit_of(op.activation);
    const Range tiles = tiles_of(part, chunk);
    return {tiles.begin / unit * TILE_ROWS, std::min(tiles.end / unit * TILE_ROWS, op.out.columns)};
}

// `staged` is (rows, the chunk's columns), or null.
void Step::do_product(const Part& part, int64_t chunk, float* staged) const {
    const Range tiles = tiles_of(part, chunk), columns = columns_of(part, chunk);
    const auto& op = op_of<op::linear>(part);
    Product product = product_of(op, memory.prepared, 0, part.rows, product_row(op, op.out, 0));
    if (staged) product.out = staged - columns.begin, product.out_stride = columns.end - columns.begin;
    multiply(product, tiles.begin, tiles.end, 0, group_count(part.rows));
}

void Step::put_product(const Part& part, int64_t chunk, const float* staged) const {
    const Range columns = columns_of(part, chunk);
    const int64_t width = columns.end - columns.begin;
    const auto& op = op_of<op::linear>(part);
    for (int64_t row = 0; row < part.rows; row++) copy_row(product_row(op, op.out, row) + columns.begin, staged + row * width, width);
}

void Step::do_attention(const Part& part, int64_t chunk, float* staged) const {
    const auto& op = op_of<op::paged_attention>(part);
    attention.at(key_of(op)).run(job_of(op), chunk, staged);
}

void Step::put_attention(const Part& part, int64_t chunk, const float* staged) const {
    const auto& op = op_of<op::paged_attention>(part);
    attention.at(key_of(op)).put(job_of(op), chunk, staged);
}

void Step::do_softcap(const Part& part, int64_t chunk) const {
    const auto& op = op_of<op::softcap>(part);
    const int64_t segments = part.rows_per_chunk, all = part.rows * segments, end = all * (chunk + 1) / part.chunks;
    for (int64_t i = all * chunk / part.chunks; i < end; i++) {
        const int64_t row = i / segments, begin = i % segments * CAP_COLUMNS;
        const int64_t columns = std::min(CAP_COLUMNS, op.logits.columns - begin);
        row_kernels_here().soft_cap(op.logits.row(row) + begin, op.cap, columns, op.out.row(row) + begin);
    }
}

void Step::do_sample(const Part& part, int64_t row) const {
    const Rows& logits = op_of<op::sample>(part).logits;
    const SampleArgs args{logits.at, logit_rows, logits.columns, logits.columns, input.sample_rows.data(),
                          input.count_ids.data(), input.counts.data(), input.bias_ids.data(), input.bias_values.data(),
                          const_cast<int32_t*>(drawn.data())};
    DC_CHOSEN(sample_row)(args, row);
}

// ---- what ranks exchange

Exchange Step::exchange_of(const Part& part) const {
    const Exchanged its = exchanged_of(part.first);
    const float* x = is_offered(part.first - 1) ? its.ranks->next() : its.x.at;
    return {its.ranks, its.sums, part.rows, its.x.columns, x, its.residual.at, its.out.columns, its.out.at};
}

void Step::do_offer(const Part& part, int64_t chunk) const {
    offer(exchange_of(part), part.rows * chunk / part.chunks, part.rows * (chunk + 1) / part.chunks);
}

void Step::do_meet(const Part& part, int64_t) const {
    if (failed.load()) poison_ranks();          // then meet() throws, here and in the others
    meet(exchange_of(part));
}

void Step::do_join(const Part& part, int64_t chunk) const {
    join(exchange_of(part), part.rows * chunk / part.chunks, part.rows * (chunk + 1) / part.chunks);
}

void Step::do_exchange(const Part& part, int64_t) const {
    do_offer(part, 0), do_meet(part, 0), do_join(part, 0);
}

void Step::poison_ranks() const {
    for (int i = 0; i < int(ops.size()); i++)
        if (Ranks* const ranks = exchanged_of(i).ranks) return ranks->poison();
}

// ---- after it

StepTimes Step::times() const {
    StepTimes all{tokens, logit_rows, outcome.width, outcome.stalled, us, gap_us, {}};
    const double tick = us / double(std::max<uint64_t>(stamps.back() - stamps.front(), 1));
    for (size_t i = 0; i < phases.size(); i++) {
        std::string what;
        for (int j = parts[i].first; j < parts[i].end; j++) {
            const std::string name = name_of(ops[size_t(j)].kind());
            if (what.find(name) == std::string::npos) what += (what.empty() ? "" : "+") + name;
        }
        if (what == "linear") {
            const Tiles& tiles = op_of<op::linear>(parts[i]).tiles;
            what += " " + std::to_string(tiles.rows) + "x" + std::to_string(tiles.columns);
        }
        if (parts[i].prepares >= 0) what += what.empty() ? "prepare" : "+prepare";
        if (what.empty()) what = "move";
        all.phases.emplace_back(what, double(stamps[i + 1] - stamps[i]) * tick);
    }
    return all;
}

}  // namespace dc
