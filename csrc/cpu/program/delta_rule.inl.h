// op       delta_rule: a convolution over p, heads of length 1, the gated delta rule, a gated norm
// shapes   x [rows][p, z, b, a] -> out [rows][Hv * Dv]; states [slots][Hv][Dk][Dv] and the last size - 1 rows' p
// mapping  a chunk takes one key head with its value heads, for all rows of all sequences. Rows go by in tiles of 32. A tile has its
//          convolution, then its gates. Then 16 to 64 columns of a value head's state at a time meet all rows of the tile, while
//          these columns lie in the first cache. The norm comes last. A row that is alone reads its state from its slot and writes
//          it straight to its new one
// cost     4 Dk Dv multiply-adds for each row and value head, in registers. At 32 heads of 128 x 128 with AVX-512, on a thread of a
//          busy machine: 45 to 70 us a row of a prompt (9 % of a layer of Qwen3.5-4B in Q4_K), and 245 us for a row alone, which
//          reads and writes 2 MiB (2 %)
// numerics float32. r = S^T k and o = S^T q are sums over Dk in order, fused. d = sigmoid(b) (v - g r), each product and sum
//          rounded. S = fma(k, d, g S), where g is 0 if it is less than 4e-18. Lengths and norms: squares in 16 lanes, then a
//          fixed tree. The bits are the same on every instruction set, and however rows are cut
#include "cpu/program/convolve.inl.h"
#include "cpu/program/delta_rule.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int64_t TILE = DeltaRule::TILE;
constexpr int WIDE = REGISTERS >= 32 ? 4 : 1;   // so many lanes of the state's columns are in registers at once

// Where a chunk keeps what it computes between its steps.
struct Chunk {
    const DeltaRows& job;
    const DeltaRule& rule;
    float *states;              // a state [Dk][Dv] for each value head, in blocks of columns
    float *past;                // [size - 1][head_columns]: p of the rows before the tile
    float *u;                   // [TILE][head_columns]: q, k and the value heads' v
    float *gates, *betas;       // [heads_of_key][TILE]

    explicit Chunk(const DeltaRows& job) : job(job), rule(*job.rule) {
        const int64_t heads = rule.heads_of_key();
        states = job.memory;
        past = states + heads * rule.key_size * rule.value_size;
        u = past + (rule.size - 1) * rule.head_columns();
        gates = u + TILE * rule.head_columns();
        betas = gates + heads * TILE;
    }
    const float* x(int64_t row) const { return job.x + row * rule.columns(); }
    float* out(int64_t row, int64_t head) const { return job.out + row * rule.values() + head * rule.value_size; }
    float* q(int64_t i) const { return u + i * rule.head_columns(); }
    float* k(int64_t i) const { return q(i) + rule.key_size; }
    float* v(int64_t i, int64_t of) const { return k(i) + rule.key_size + of * rule.value_size; }
    float* state(int64_t slot, int64_t head) const {
        return rule.states + (slot * rule.value_heads + head) * rule.key_size * rule.value_size;
    }
};

// u = silu(the convolution), for `width` columns: x's from x_at on are p's from `channel` on, and become u's from u_at on.
void convolve_part(const Chunk& chunk, int64_t begin, int64_t end, int64_t x_at, int64_t channel, int64_t u_at, int64_t width) {
    const DeltaRule& rule = chunk.rule;
    const StateRows& rows = chunk.job.rows;
    const int64_t before = rule.size - 1, channels = rule.channels(), own_columns = rule.head_columns();
    for (int64_t c = 0; c < width; c += 16) {
        Lanes past[MAX_TAPS];
        float* const kept = chunk.past + u_at + c;
        const float* const slot = rows.read < 0 ? nullptr : rule.past + rows.read * before * channels + channel + c;
        for (int64_t j = 0; j < before; j++)
            past[j] = begin > rows.begin ? load(kept + j * own_columns) : slot ? load(slot + j * channels) : all(0.0f);
        int64_t written = 0;
        while (written < rows.writes && rows.write_rows[written] < begin) written++;
        const auto own = [&](int64_t row) { return load(chunk.x(row) + x_at + c); };
        convolve(rule.taps + channel + c, channels, rule.size, begin, end, past, own, [&](int64_t row, Lanes total) {
            store(chunk.q(row - begin) + u_at + c, silu(total));
            for (; written < rows.writes && rows.write_rows[written] == row; written++)
                for (int64_t j = 0; j < before; j++) store(rule.past + (rows.write_slots[written] * before + j) * channels + channel + c, past[j]);
        });
        for (int64_t j = 0; j < before; j++) store(kept + j * own_columns, past[j]);
    }
}

float squares(const float* x, int64_t columns) {
    Lanes total = all(0.0f);
    for (int64_t c = 0; c < columns; c += 16) total = fma(load(x + c), load(x + c), total);
    return sum(total);
}

void scale_by(float* x, int64_t columns, float scale) {
    for (int64_t c = 0; c < columns; c += 16) store(x + c, load(x + c) * all(scale));
}

void convolve_tile(const Chunk& chunk, int64_t begin, int64_t end) {
    const DeltaRule& rule = chunk.rule;
    const int64_t Dk = rule.key_size, Dv = rule.value_size, head = chunk.job.key_head, keys = rule.key_heads * Dk;
    convolve_part(chunk, begin, end, rule.q_at(head), head * Dk, 0, Dk);
    convolve_part(chunk, begin, end, rule.k_at(head), keys + head * Dk, Dk, Dk);
    for (int64_t of = 0; of < rule.heads_of_key(); of++) {
        const int64_t j = rule.head(head, of);
        convolve_part(chunk, begin, end, rule.v_at(j), 2 * keys + j * Dv, 2 * Dk + of * Dv, Dv);
    }
    const float one_over_root = 1.0f / __builtin_sqrtf(float(Dk));
    for (int64_t i = 0; i < end - begin; i++) {
        scale_by(chunk.q(i), Dk, 1.0f / __builtin_sqrtf(squares(chunk.q(i), Dk) + 1e-6f) * one_over_root);
        scale_by(chunk.k(i), Dk, 1.0f / __builtin_sqrtf(squares(chunk.k(i), Dk) + 1e-6f));
    }
}

// For each row: which part of the state is kept (gates), and which part of the new values goes into it (betas).
void find_gates(const Chunk& chunk, int64_t begin, int64_t end) {
    const DeltaRule& rule = chunk.rule;
    for (int64_t of = 0; of < rule.heads_of_key(); of++) {
        const int64_t j = rule.head(chunk.job.key_head, of);
        float a[TILE] = {}, b[TILE] = {};
        for (int64_t i = 0; i < end - begin; i++) a[i] = chunk.x(begin + i)[rule.a_at(j)] + rule.dt_bias[j], b[i] = chunk.x(begin + i)[rule.b_at(j)];
        for (int64_t i = 0; i < TILE; i += 16) {
            const Lanes power = all(rule.decay[j]) * softplus(load(a + i));
            // below 4e-18 it is 0. It would change nothing, but turn the state into subnormal numbers, which take 100 cycles each
            store(chunk.gates + of * TILE + i, zero_below(power, all(-40.0f), exp_negative(power)));
            store(chunk.betas + of * TILE + i, sigmoid(load(b + i)));
        }
    }
}

// Some columns of a state: [Dk] rows, `stride` floats apart.
struct Columns {
    float* at;
    int64_t stride;
};

template <int N>
void dots(Columns S, int64_t rows, const float* k, Lanes* r) {
    Lanes sums[N];
    for (int n = 0; n < N; n++) sums[n] = all(0.0f);
    for (int64_t i = 0; i < rows; i++)
        for (int n = 0; n < N; n++) sums[n] = fma(load(S.at + i * S.stride + 16 * n), all(k[i]), sums[n]);
    for (int n = 0; n < N; n++) r[n] = sums[n];
}

// to = g from + k d^T;  o = to^T q;  r = to^T next, where `next` is the k of the row that follows, if one does.
template <int N, bool FOLLOWED>
void update(Columns from, Columns to, int64_t rows, float g, const float* k, const Lanes* d, const float* q, const float* next, float* o, Lanes* r) {
    Lanes outs[N], sums[N], added[N];           // not o and r themselves: those might point into the state, so they would not stay in registers
    for (int n = 0; n < N; n++) outs[n] = sums[n] = all(0.0f), added[n] = d[n];
    const Lanes keeps = all(g);
    for (int64_t i = 0; i < rows; i++) {
        const Lanes key = all(k[i]), query = all(q[i]), next_key = FOLLOWED ? all(next[i]) : key;
        for (int n = 0; n < N; n++) {
            const Lanes s = fma(key, added[n], keeps * load(from.at + i * from.stride + 16 * n));
            store(to.at + i * to.stride + 16 * n, s);
            outs[n] = fma(s, query, outs[n]);
            if (FOLLOWED) sums[n] = fma(s, next_key, sums[n]);
        }
    }
    for (int n = 0; n < N; n++) store(o + 16 * n, outs[n]), r[n] = sums[n];
}

// Columns [c, c + 16 N) of value head number `of`, all rows of a tile.
template <int N>
void recur(const Chunk& chunk, int64_t begin, int64_t end, int64_t of, int64_t c) {
    const DeltaRule& rule = chunk.rule;
    const StateRows& rows = chunk.job.rows;
    const int64_t Dk = rule.key_size, Dv = rule.value_size, j = rule.head(chunk.job.key_head, of), count = end - begin;
    const Columns kept{chunk.states + of * Dk * Dv + c * Dk, 16 * N};
    const auto in_slot = [&](int64_t slot) { return Columns{chunk.state(slot, j) + c, Dv}; };
    Columns from = kept;
    if (begin == rows.begin && rows.read >= 0) from = in_slot(rows.read);
    if (begin == rows.begin && rows.read < 0)
        for (int64_t i = 0; i < Dk * N; i++) store(kept.at + 16 * i, all(0.0f));
    int64_t written = 0;
    while (written < rows.writes && rows.write_rows[written] < begin) written++;
    Lanes r[N], d[N];
    dots<N>(from, Dk, chunk.k(0), r);
    for (int64_t i = 0; i < count; i++) {
        const int64_t row = begin + i;
        const float g = chunk.gates[of * TILE + i];
        for (int n = 0; n < N; n++) d[n] = all(chunk.betas[of * TILE + i]) * (load(chunk.v(i, of) + c + 16 * n) - all(g) * r[n]);
        const bool writes = written < rows.writes && rows.write_rows[written] == row;
        const Columns to = writes && row + 1 == rows.end ? in_slot(rows.write_slots[written++]) : kept;
        float* const o = chunk.out(row, j) + c;
        if (i + 1 < count) update<N, true>(from, to, Dk, g, chunk.k(i), d, chunk.q(i), chunk.k(i + 1), o, r);
        else update<N, false>(from, to, Dk, g, chunk.k(i), d, chunk.q(i), nullptr, o, r);
        for (; written < rows.writes && rows.write_rows[written] == row; written++) {
            const Columns copy = in_slot(rows.write_slots[written]);
            for (int64_t at = 0; at < Dk; at++)
                for (int n = 0; n < N; n++) store(copy.at + at * copy.stride + 16 * n, load(to.at + at * to.stride + 16 * n));
        }
        from = to;
    }
}

// norm * rms(o) * silu(z)
void gated_norm(const Chunk& chunk, int64_t row, int64_t head) {
    const DeltaRule& rule = chunk.rule;
    float* const o = chunk.out(row, head);
    const float* const z = chunk.x(row) + rule.z_at(head);
    const Lanes scale = all(1.0f / __builtin_sqrtf(squares(o, rule.value_size) / float(rule.value_size) + rule.epsilon));
    for (int64_t c = 0; c < rule.value_size; c += 16) store(o + c, load(rule.norm + c) * (load(o + c) * scale) * silu(load(z + c)));
}

}  // namespace

void delta_rule(const DeltaRows& job) {
    const Chunk chunk(job);
    const DeltaRule& rule = *job.rule;
    for (int64_t begin = job.rows.begin; begin < job.rows.end; begin += TILE) {
        const int64_t end = begin + TILE < job.rows.end ? begin + TILE : job.rows.end;
        convolve_tile(chunk, begin, end);
        find_gates(chunk, begin, end);
        for (int64_t of = 0; of < rule.heads_of_key(); of++) {
            int64_t c = 0;
            // A row that is alone reads its state from memory, so it takes pieces twice as wide: 245 us at 32 heads of 128 x 128, not
            // 320. A last row that is alone in its tile may not: the tile before has left the state in pieces of the usual width.
            for (; job.rows.end - job.rows.begin == 1 && c + 32 * WIDE <= rule.value_size; c += 32 * WIDE) recur<2 * WIDE>(chunk, begin, end, of, c);
            for (; c + 16 * WIDE <= rule.value_size; c += 16 * WIDE) recur<WIDE>(chunk, begin, end, of, c);
            for (; c < rule.value_size; c += 16) recur<1>(chunk, begin, end, of, c);
            for (int64_t row = begin; row < end; row++) gated_norm(chunk, row, rule.head(job.key_head, of));
        }
    }
}

}  // namespace DC_ISA
}  // namespace dc
