// What a chunk of each phase does, and what remains to be told of a step that has run.
#include "cpu/program/step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/program/rows.h"

namespace dc {
namespace {

const RowKernels& row_kernels_here() { return DC_CHOSEN(row_kernels); }

size_t wide_bytes(const Op& op, int64_t rows) { return op.norm ? size_t(rows * op.x.columns) * sizeof(float) : 0; }

// Of each head q and then its gate; then all that has no gates.
void split_gates(const Op& op, int64_t row) {
    const float* x = op.x.row(row);
    const int64_t size = op.gates.columns, bytes = op.channels * int64_t(sizeof(float));
    for (int64_t c = 0; c < size; c += op.channels) {
        std::memcpy(op.out.row(row) + c, x + 2 * c, size_t(bytes));
        std::memcpy(op.gates.row(row) + c, x + 2 * c + op.channels, size_t(bytes));
    }
    std::memcpy(op.out.row(row) + size, x + 2 * size, size_t(op.out.columns - size) * sizeof(float));
}

}  // namespace

// ---- x made ready, and what adapters make of it

// x's rows [begin, end) made ready as rows `to` ... of `prepared`; `wide` has wide_bytes.
void Step::prepare_rows(const Op& op, int64_t begin, int64_t end, int64_t to, void* prepared, float* wide) const {
    const Tiles& w = op.tiles;
    const int64_t rows = end - begin, columns = op.x.columns;
    const bool adapted = op.adapted >= 0 && !token_adapters.empty();
    const bool apart = op.norm && (adapted || columns != w.columns);    // others read it as well, or it is of more columns than the product takes
    for (int64_t row = 0; apart && row < rows; row++)
        row_kernels_here().rms_norm(op.x.row(begin + row), op.weight, op.epsilon, columns, wide + row * columns);
    const float* const x = apart ? wide : op.x.row(begin);
    if (adapted) shrink_rows(op, begin, end, x);
    prepare(w.type, x - to * columns, columns, w.columns, to, to + rows, op.norm && !apart, op.weight, op.epsilon, prepared);
}

// Rows [begin, end), whose x after the norm this is. Those of one adapter go together, wherever they are among these.
void Step::shrink_rows(const Op& op, int64_t begin, int64_t end, const float* normed) const {
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

AdaptedRows Step::adapted_rows(const Op& op, int64_t first) const {
    if (op.adapted < 0 || token_adapters.empty()) return {};
    const auto& adapters = adapters_of(op);
    const auto next = std::find_if(ops.begin() + index_of(op) + 1, ops.end(), [](const Op& other) { return other.adapted >= 0; });
    return {adapters.data() + first, op.adapted, shrunk.data() + first * most_ranks, most_ranks, next == ops.end() ? -1 : next->adapted};
}

// The product of `rows` rows, of which the first is `first`; its outputs begin at `out`.
Product Step::product_of(const Op& op, const void* prepared, int64_t first, int64_t rows, float* out) const {
    return {op.tiles, prepared, rows, op.bias, op.other.at ? op.other.row(first) : nullptr, op.other.columns, op.activation,
            out, op.out.columns, op.out.columns, adapted_rows(op, first)};
}

// Does the op after this one exchange the product or embedding that this one gives? Then it is written where the other ranks read it.
bool Step::is_offered(int64_t index) const {
    if (index < 0 || index + 1 >= int64_t(ops.size())) return false;
    if (ops[size_t(index)].kind != OpKind::linear && ops[size_t(index)].kind != OpKind::embed) return false;
    const Op &op = ops[size_t(index)], &next = ops[size_t(index + 1)];
    return next.ranks && next.on_logit_rows == op.on_logit_rows && next.x.at == op.out.at && next.x.columns == op.out.columns &&
           next.other.at != op.out.at;
}

float* Step::product_row(const Op& op, int64_t row) const {
    const int64_t index = &op - ops.data();
    return is_offered(index) ? ops[size_t(index + 1)].ranks->next() + row * op.out.columns : op.out.row(row);
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
    for (int i = part.first; i < part.end; i++) do_row_op(ops[size_t(i)], begin, end);
    if (part.prepares < 0) return;
    const Op& op = ops[size_t(part.prepares)];
    prepare_rows(op, begin, end, begin, memory.prepared, static_cast<float*>(scratch(wide_bytes(op, end - begin))));
}

void Step::do_row_op(const Op& op, int64_t begin, int64_t end) const {
    const RowKernels& use = row_kernels_here();
    if (op.kind == OpKind::linear) return linear_of_rows(op, begin, end);
    if (op.kind == OpKind::rope_append) return append(op, begin, end);
    if (is_convolution(op.kind)) return convolve(op, 0, op.out.columns);            // all rows are here
    for (int64_t row = begin; row < end; row++) {
        float* out = op.out.row(row);
        const int64_t columns = op.out.columns;
        switch (op.kind) {
            case OpKind::embed: embed(op, row); break;
            case OpKind::gather_rows: std::memcpy(out, op.x.row(gathered[size_t(row)]), size_t(columns) * sizeof(float)); break;
            case OpKind::copy: std::memcpy(out, op.x.row(row), size_t(columns) * sizeof(float)); break;
            case OpKind::rms_norm: rms_norm(op, row); break;
            case OpKind::mix: use.mix(op.x.row(row), op.a, op.other.row(row), op.b, columns, out); break;
            case OpKind::smear: {
                const float* previous = input.previous_ids[size_t(token_of(op, row))] >= 0 ? op.other.row(row) : nullptr;
                use.smear(op.x.row(row), previous, op.weight, op.channels, op.a, columns, out);
                break;
            }
            case OpKind::route: {
                Routing& to = *op.routing;
                const size_t first = size_t(row * to.chosen);
                if (to.sigmoids) use.route_sigmoids(op.x.row(row), op.bias, to.experts, to.chosen, &to.ids[first], &to.shares[first]);
                else use.route(op.x.row(row), to.experts, to.chosen, to.sum_to_one, &to.ids[first], &to.shares[first]);
                for (int64_t j = 0; op.weight && j < to.chosen; j++) to.shares[first + size_t(j)] *= op.weight[to.ids[first + size_t(j)]];
                break;
            }
            case OpKind::combine: combine(op, row); break;
            case OpKind::split_gates: split_gates(op, row); break;
            case OpKind::gate: use.gate(op.x.row(row), op.gates.row(row), columns, out); break;
            case OpKind::group_squares: group_squares(op, row); break;
            case OpKind::norm_groups: norm_groups(op, row); break;
            case OpKind::gated_add: use.gated_add(op.x.row(row), op.other.row(row), *op.gates.row(row), columns, out); break;
            case OpKind::layer_inputs: {                // sqrt(1/2) (norm of each part + sqrt(P) other)
                const int64_t part = op.channels;
                for (int64_t c = 0; c < columns; c += part) use.rms_norm(op.x.row(row) + c, op.weight, op.epsilon, part, out + c);
                use.mix(out, op.a, op.other.row(row), op.b, columns, out);
                break;
            }
            case OpKind::gate_input: use.gate_input(op.x.row(row), op.other.row(row) + op.channels, columns, out); break;
            default: break;
        }
    }
}

void Step::rms_norm(const Op& op, int64_t row) const {
    const int64_t size = op.out.columns / std::max<int64_t>(op.channels, 1);
    for (int64_t c = 0; c < op.out.columns; c += size)
        row_kernels_here().rms_norm(op.x.row(row) + c, op.weight ? op.weight + c : nullptr, op.epsilon, size, op.out.row(row) + c);
}

// Of each group what the heads here add to it.
void Step::group_squares(const Op& op, int64_t row) const {
    const int64_t P = op.mamba.head_size;
    float* const out = op.out.row(row);
    std::fill_n(out, op.out.columns, 0.0f);
    for (int64_t head = 0; head < op.mamba.heads; head++) out[op.mamba.group_of(head)] += row_kernels_here().squares(op.x.row(row) + head * P, P);
}

void Step::norm_groups(const Op& op, int64_t row) const {
    const int64_t P = op.mamba.head_size;
    for (int64_t head = 0; head < op.mamba.heads; head++) {
        const float mean = op.gates.row(row)[op.mamba.group_of(head)] / float(op.mamba.group_heads * P);
        row_kernels_here().scale(op.x.row(row) + head * P, 1.0f / __builtin_sqrtf(mean + op.epsilon), op.weight + head * P, P, op.out.row(row) + head * P);
    }
}

void Step::embed(const Op& op, int64_t row) const {
    const int64_t id = std::max<int64_t>((op.previous_ids ? input.previous_ids : input.token_ids)[size_t(token_of(op, row))], 0) - op.first_row;
    float* const out = product_row(op, row);
    if (id < 0 || id >= op.table_rows) return std::fill_n(out, op.out.columns, -0.0f), void();      // another rank has it
    if (op.file_row_bytes)
        return read_file_row(op.tiles.type, static_cast<const uint8_t*>(op.table) + id * op.file_row_bytes, op.out.columns, out);
    if (op.tiles.memory) return embed_row(op.tiles, id, out);
    const char* from = static_cast<const char*>(op.table) + id * op.out.columns * bytes_of(op.table_type);
    row_kernels_here().widen(op.table_type, from, op.out.columns, out);
}

void Step::append(const Op& op, int64_t begin, int64_t end) const {
    RopeJob job = op.rope;
    const int64_t* const places = slots[size_t(op.page_group)].data();
    job.rows = tokens, job.positions = positions.data(), job.slots = places;
    if (!is_of_needed(index_of(op))) return attention_kernels_of(job.cache_type).rope_rows(job, begin, end);
    for (int64_t row = begin; row < end; row++) {
        const int64_t token = needed[size_t(row)];
        job.positions = positions.data() + token - row, job.slots = places + token - row;
        attention_kernels_of(job.cache_type).rope_rows(job, row, row + 1);
    }
}

// Each needed row to its place among them; they ascend, so it overwrites none that has yet to move.
void Step::do_move_needed(const Part&, int64_t chunk) const {
    const Rows& rows = live[size_t(chunk)];
    for (size_t i = 0; i < needed.size(); i++)
        if (needed[i] != int64_t(i)) std::memcpy(rows.row(int64_t(i)), rows.row(needed[i]), size_t(rows.columns) * sizeof(float));
}

void Step::do_convolution(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const int64_t units = op.out.columns / 16;
    convolve(op, units * chunk / part.chunks * 16, units * (chunk + 1) / part.chunks * 16);
}

// visit() gets the rows of each sequence and what they read and write.
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
void Step::convolve(const Op& op, int64_t first, int64_t last) const {
    const auto kernel = op.kind == OpKind::convolve ? row_kernels_here().convolve : row_kernels_here().short_conv;
    each_sequence([&](const StateRows& rows) {
        kernel({op.x.at, op.x.columns, op.out.at, op.weight, op.bias, op.out.columns, op.channels, op.states, rows}, first, last);
    });
}

void Step::do_delta_rule(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    float* const memory = static_cast<float*>(scratch(size_t(op.delta->memory_floats()) * sizeof(float)));
    each_sequence([&](const StateRows& rows) { DC_CHOSEN(delta_rule)({op.delta.get(), op.x.at, op.out.at, rows, chunk, memory}); });
}

void Step::do_mamba2(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const Mamba2& layer = op.mamba;
    float* const memory = static_cast<float*>(scratch(size_t(layer.head_values()) * sizeof(float)));
    for (int64_t head = layer.heads * chunk / part.chunks; head < layer.heads * (chunk + 1) / part.chunks; head++)
        each_sequence([&](const StateRows& rows) { DC_CHOSEN(mamba2)({&layer, op.x.at, op.other.at, op.out.at, rows, head, memory}); });
}

int64_t DeltaRule::memory_floats() const {
    return heads_of_key() * (key_size * value_size + 2 * TILE) + (size - 1 + TILE) * head_columns();
}

void Step::linear_of_rows(const Op& op, int64_t begin, int64_t end) const {
    const size_t bytes = (prepared_bytes(op, end - begin) + 63) / 64 * 64;
    char* memory = static_cast<char*>(scratch(bytes + wide_bytes(op, end - begin)));
    prepare_rows(op, begin, end, 0, memory, reinterpret_cast<float*>(memory + bytes));
    multiply(product_of(op, memory, begin, end - begin, product_row(op, begin)), 0, tile_count(op.tiles.rows), 0, group_count(end - begin));
}

// ---- experts

void Step::do_group(const Part& part, int64_t) const {
    ops[size_t(part.first)].routing->group(part.rows);
}

void Step::do_gather(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const Routing& routing = *op.routing;
    const int64_t begin = routing.pairs() * chunk / part.chunks, end = routing.pairs() * (chunk + 1) / part.chunks, K = op.tiles.columns;
    for (const Routing::Expert& expert : routing.active)
        for (int64_t i = std::max<int64_t>(begin, expert.first); i < std::min<int64_t>(end, expert.first + expert.count); i++) {
            const float* x = op.kind == OpKind::down ? memory.hidden + i * K : op.x.row(routing.row_of[size_t(i)]);
            const int64_t to = expert.panel * int64_t(PANEL_ROWS) + i - expert.first;
            prepare(op.tiles.type, x - to * K, K, K, to, to + 1, op.norm, op.weight, op.epsilon, memory.panels);
        }
}

// The chunk's part of the tiles of all experts that were chosen.
template <class Visit>
void Step::each_piece(const Part& part, int64_t chunk, Visit visit) const {
    const Op& op = ops[size_t(part.first)];
    const Routing& routing = *op.routing;
    const int64_t unit = unit_of(op), each = tile_count(op.tiles.rows) / unit / routing.experts;
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
    const Op& op = ops[size_t(part.first)];
    float* const pairs = op.kind == OpKind::down ? memory.added : memory.hidden;
    const int64_t panel = panel_bytes(op.tiles.type, op.tiles.columns);
    each_piece(part, chunk, [&](const Piece& piece) {
        const int64_t columns = piece.column_end - piece.column_begin, before = piece.expert.id * piece.width;  // other experts' columns
        Product product{op.tiles, static_cast<char*>(memory.panels) + piece.expert.panel * panel, piece.expert.count, op.bias,
                        nullptr, 0, op.activation, pairs + piece.expert.first * piece.width - before, piece.width, before + piece.width};
        if (staged) product.out = staged - before - piece.column_begin, product.out_stride = columns;
        multiply(product, piece.tile_begin, piece.tile_end, 0, group_count(piece.expert.count));
        if (staged) staged += columns * piece.expert.count;
    });
}

void Step::put_experts(const Part& part, int64_t chunk, const float* staged) const {
    float* const pairs = ops[size_t(part.first)].kind == OpKind::down ? memory.added : memory.hidden;
    each_piece(part, chunk, [&](const Piece& piece) {
        const int64_t columns = piece.column_end - piece.column_begin;
        for (int64_t i = piece.expert.first; i < piece.expert.first + piece.expert.count; i++, staged += columns)
            std::memcpy(pairs + i * piece.width + piece.column_begin, staged, size_t(columns) * sizeof(float));
    });
}

void Step::combine(const Op& op, int64_t row) const {
    const Routing& routing = *op.routing;
    const int64_t first = row * routing.chosen;
    const float* added[MAX_CHOSEN];
    for (int64_t j = 0; j < routing.chosen; j++) added[j] = memory.added + routing.pair_of[size_t(first + j)] * op.out.columns;
    row_kernels_here().combine(op.x.at ? op.x.row(row) : nullptr, added, &routing.shares[size_t(first)], routing.chosen, op.out.columns, op.out.row(row));
}

// ---- products and attention

Step::Range Step::tiles_of(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const int64_t unit = unit_of(op), units = tile_count(op.tiles.rows) / unit;
    return {units * chunk / part.chunks * unit, units * (chunk + 1) / part.chunks * unit};
}

Step::Range Step::columns_of(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const Range tiles = tiles_of(part, chunk);
    return {tiles.begin / unit_of(op) * TILE_ROWS, std::min(tiles.end / unit_of(op) * TILE_ROWS, op.out.columns)};
}

// `staged` is (rows, the chunk's columns), or null.
void Step::do_product(const Part& part, int64_t chunk, float* staged) const {
    const Range tiles = tiles_of(part, chunk), columns = columns_of(part, chunk);
    const Op& op = ops[size_t(part.first)];
    Product product = product_of(op, memory.prepared, 0, part.rows, product_row(op, 0));
    if (staged) product.out = staged - columns.begin, product.out_stride = columns.end - columns.begin;
    multiply(product, tiles.begin, tiles.end, 0, group_count(part.rows));
}

void Step::put_product(const Part& part, int64_t chunk, const float* staged) const {
    const Range columns = columns_of(part, chunk);
    const int64_t width = columns.end - columns.begin;
    for (int64_t row = 0; row < part.rows; row++)
        std::memcpy(product_row(ops[size_t(part.first)], row) + columns.begin, staged + row * width, size_t(width) * sizeof(float));
}

const AttentionRun& Step::attention_of(const Part& part) const {
    return attention.at(key_of(ops[size_t(part.first)]));
}

void Step::do_attention(const Part& part, int64_t chunk, float* staged) const {
    attention_of(part).run(ops[size_t(part.first)].attention, chunk, staged);
}

void Step::put_attention(const Part& part, int64_t chunk, const float* staged) const {
    attention_of(part).put(ops[size_t(part.first)].attention, chunk, staged);
}

void Step::do_softcap(const Part& part, int64_t chunk) const {
    const Op& op = ops[size_t(part.first)];
    const int64_t segments = part.rows_per_chunk, all = part.rows * segments, end = all * (chunk + 1) / part.chunks;
    for (int64_t i = all * chunk / part.chunks; i < end; i++) {
        const int64_t row = i / segments, begin = i % segments * CAP_COLUMNS;
        const int64_t columns = std::min(CAP_COLUMNS, op.x.columns - begin);
        row_kernels_here().soft_cap(op.x.row(row) + begin, op.a, columns, op.out.row(row) + begin);
    }
}

void Step::do_sample(const Part& part, int64_t row) const {
    const Rows& logits = ops[size_t(part.first)].x;
    const SampleArgs args{logits.at, logit_rows, logits.columns, logits.columns, input.sample_rows.data(),
                          input.count_ids.data(), input.counts.data(), input.bias_ids.data(), input.bias_values.data(),
                          const_cast<int32_t*>(drawn.data())};
    DC_CHOSEN(sample_row)(args, row);
}

// ---- what ranks exchange

Exchange Step::exchange_of(const Part& part) const {
    const Op& op = ops[size_t(part.first)];
    const float* x = is_offered(part.first - 1) ? op.ranks->next() : op.x.at;
    return {op.ranks.get(), op.kind == OpKind::all_reduce, part.rows, op.x.columns, x, op.other.at, op.out.columns, op.out.at};
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
    for (const Op& op : ops)
        if (op.ranks) return op.ranks->poison();
}

// ---- after it

StepTimes Step::times() const {
    StepTimes all{tokens, logit_rows, outcome.width, outcome.stalled, us, gap_us, {}};
    const double tick = us / double(std::max<uint64_t>(stamps.back() - stamps.front(), 1));
    for (size_t i = 0; i < phases.size(); i++) {
        std::string what;
        for (int j = parts[i].first; j < parts[i].end; j++) {
            const std::string name = name_of(ops[size_t(j)].kind);
            if (what.find(name) == std::string::npos) what += (what.empty() ? "" : "+") + name;
        }
        if (const Op& op = ops[size_t(parts[i].first)]; what == "linear")
            what += " " + std::to_string(op.tiles.rows) + "x" + std::to_string(op.tiles.columns);
        if (parts[i].prepares >= 0) what += what.empty() ? "prepare" : "+prepare";
        if (what.empty()) what = "move";
        all.phases.emplace_back(what, double(stamps[i + 1] - stamps[i]) * tick);
    }
    return all;
}

}  // namespace dc
