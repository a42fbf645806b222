// op       rms_norm and its parts squares and scale, layer_norm, mix (backout is a mix), smear, soft_cap, widen, routes, combine, add_up, gate,
//          gated_add, shrink, turn, narrow: rows between two products;
//          short_conv, convolve: rows of one sequence, in some columns
// shapes   x [C] float32 -> out [C] float32; routes: logits [E] -> ids and shares [chosen]
// mapping  the caller's thread, one row; 16 lanes along it
// cost     every value read and written once, from L1 or L2: estimated 0.1 us a row at C = 576, soft_cap 10 us at V = 32768
// numerics float32, each product and sum rounded; sums (of squares) in 16 lanes, then a fixed tree; sigmoid and tanh by
//          exp_negative (absolute error of tanh below 2e-7); the same bits on every instruction set
#include "cpu/attention/attention.h"
#include "cpu/program/convolve.inl.h"
#include "cpu/program/rows.h"
#include "cpu/tiles/tiles.h"

namespace dc {
namespace DC_ISA {
namespace {

float squares(const float* x, int64_t columns) {
    Lanes total = all(0.0f);
    for (int64_t c = 0; c < columns; c += 16) total = fma(load(x + c), load(x + c), total);
    return sum(total);
}

void scale(const float* x, float scale, const float* weight, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) {
        const Lanes y = load(x + c) * all(scale);
        store(out + c, weight ? y * load(weight + c) : y);
    }
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t columns, float* out) {
    scale(x, 1.0f / __builtin_sqrtf(squares(x, columns) / float(columns) + epsilon), weight, columns, out);
}

// The mean first, then the squares of what is left: exact enough also where the mean is far larger than the rest.
// Columns from `count` on are zeros that only make a multiple of 16.
void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t count, int64_t columns, float* out) {
    Lanes total = all(0.0f), squares = all(0.0f);
    for (int64_t c = 0; c < columns; c += 16) total = total + load(x + c);
    const float average = sum(total) / float(count);
    const Lanes mean = all(average);
    int64_t done = 0;
    for (; done + 16 <= count; done += 16) {
        const Lanes centred = load(x + done) - mean;
        squares = fma(centred, centred, squares);
    }
    float rest[16] = {};
    for (int64_t c = done; c < count; c++) rest[c - done] = x[c] - average;
    squares = fma(load(rest), load(rest), squares);
    const Lanes scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(count) + epsilon));
    for (int64_t c = 0; c < columns; c += 16) {
        const Lanes normed = (load(x + c) - mean) * scale, y = weight ? normed * load(weight + c) : normed;
        store(out + c, bias ? y + load(bias + c) : y);
    }
    for (int64_t c = weight ? columns : count; c < columns; c++) out[c] = 0.0f;
}

void mix(const float* x, float a, const float* y, float b, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) store(out + c, load(x + c) * all(a) + load(y + c) * all(b));
}

void smear(const float* x, const float* previous, const float* gate, int64_t channels, float lambda, int64_t columns, float* out) {
    float strength = 0.0f;
    for (int64_t c = 0; c < channels; c++) strength = fma1(x[c], gate[c], strength);
    strength = previous ? lambda * sigmoid(strength) : 0.0f;
    for (int64_t c = 0; c < columns; c += 16) {
        const Lanes own = load(x + c);
        store(out + c, previous ? own + all(strength) * load(previous + c) : own);
    }
}

void soft_cap(const float* x, float cap, int64_t columns, float* out) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) store(out + c, capped(load(x + c), all(cap)));
    if (c == columns) return;
    float rest[16] = {};
    std::memcpy(rest, x + c, sizeof(float) * size_t(columns - c));
    store(rest, capped(load(rest), all(cap)));
    std::memcpy(out + c, rest, sizeof(float) * size_t(columns - c));
}

template <class Stored>
void widen_row(const void* from, int64_t columns, float* out) {
    const Stored* x = static_cast<const Stored*>(from);
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) store(out + c, load(x + c));
    for (; c < columns; c++) out[c] = widen(x[c]);
}

void widen_any(Element type, const void* from, int64_t columns, float* out) {
    if (type == Element::float32) widen_row<float>(from, columns, out);
    if (type == Element::float16) widen_row<Half>(from, columns, out);
    if (type == Element::bfloat16) widen_row<Bfloat>(from, columns, out);
}

float sum_of_exps(const float* x, int64_t count, float largest) {
    Lanes sums = all(0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        float some[16];
        for (int64_t j = 0; j < 16; j++) some[j] = i + j < count ? x[i + j] - largest : -__builtin_inff();
        sums = sums + exp_negative(load(some));
    }
    return sum(sums);
}

void choose(const float* scores, int64_t experts, int64_t chosen, int32_t* ids) {
    bool taken[MAX_EXPERTS] = {};
    for (int64_t j = 0; j < chosen; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (!taken[e] && (best < 0 || scores[e] > scores[best])) best = e;
        taken[best] = true, ids[j] = int32_t(best);
    }
}

// Takes the scores of all groups away but those that are kept. Of equal groups the first stays.
void keep_groups(float* scores, int64_t experts, const Groups& its) {
    float sums[MAX_EXPERTS];
    int32_t ids[MAX_EXPERTS];
    const int64_t each = experts / its.groups;
    for (int64_t g = 0; g < its.groups; g++) {
        choose(scores + g * each, each, its.best, ids);
        sums[g] = scores[g * each + ids[0]];
        for (int64_t j = 1; j < its.best; j++) sums[g] += scores[g * each + ids[j]];
    }
    choose(sums, its.groups, its.kept, ids);
    for (int64_t j = 0; j < its.kept; j++) sums[ids[j]] = __builtin_inff();
    for (int64_t e = 0; e < experts; e++)
        if (sums[e / each] < __builtin_inff()) scores[e] = -__builtin_inff();
}

float largest_of(const float* x, int64_t count) {
    float found = x[0];
    for (int64_t i = 1; i < count; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// Groups are compared by the numbers of the softmax before they are divided by their sum, since that has no effect on the choice. With a
// bias it has.
void route(const float* logits, const Router& router, int64_t experts, int64_t chosen, int32_t* ids, float* shares) {
    const bool in_groups = router.groups.kept < router.groups.groups;
    if (in_groups || router.bias) {
        float scores[MAX_EXPERTS];
        const float top = largest_of(logits, experts), total = router.bias ? sum_of_exps(logits, experts, top) : 1.0f;
        for (int64_t e = 0; e < experts; e++) scores[e] = exp_negative(logits[e] - top);
        for (int64_t e = 0; router.bias && e < experts; e++) scores[e] = scores[e] / total + router.bias[e];
        if (in_groups) keep_groups(scores, experts, router.groups);
        choose(scores, experts, chosen, ids);
    } else {
        choose(logits, experts, chosen, ids);
    }
    for (int64_t j = 0; j < chosen; j++) shares[j] = logits[ids[j]];
    const float largest = router.sum_to_one ? largest_of(shares, chosen) : largest_of(logits, experts);
    const float total = router.sum_to_one ? sum_of_exps(shares, chosen, largest) : sum_of_exps(logits, experts, largest);
    for (int64_t j = 0; j < chosen; j++) shares[j] = exp_negative(shares[j] - largest) / total;
}

// With sum_to_one, if all logits are below 0, each share is first divided by e^(the largest logit), so that not all of them vanish.
void route_sigmoids(const float* logits, const Router& router, int64_t experts, int64_t chosen, int32_t* ids, float* shares) {
    float scores[MAX_EXPERTS];
    for (int64_t e = 0; e < experts; e++) scores[e] = sigmoid(logits[e]) + (router.bias ? router.bias[e] : 0.0f);
    if (router.groups.kept < router.groups.groups) keep_groups(scores, experts, router.groups);
    choose(scores, experts, chosen, ids);
    if (!router.sum_to_one) {
        for (int64_t j = 0; j < chosen; j++) shares[j] = sigmoid(logits[ids[j]]) * router.scale;
        return;
    }
    float largest = -__builtin_inff(), total = 0.0f;
    for (int64_t j = 0; j < chosen; j++) largest = logits[ids[j]] > largest ? logits[ids[j]] : largest;
    largest = largest < 0.0f ? largest : 0.0f;
    for (int64_t j = 0; j < chosen; j++) {
        const float x = logits[ids[j]];
        shares[j] = exp_negative((x < 0.0f ? x : 0.0f) - largest) / (1.0f + exp_negative(x < 0.0f ? x : -x));
        total += shares[j];
    }
    for (int64_t j = 0; j < chosen; j++) shares[j] = shares[j] / total * router.scale;
}

// The experts above an expert are those that were chosen before it.
void route_sparse(const float* logits, float farthest, int64_t experts, int64_t chosen, int32_t* ids, float* shares) {
    choose(logits, experts, chosen, ids);
    float near[MAX_EXPERTS];
    bool above[MAX_EXPERTS] = {};
    for (int64_t j = 0; j < chosen; j++) {
        const float own = logits[ids[j]];
        for (int64_t e = 0; e < experts; e++) {
            const float size = logits[e] < 0.0f ? -logits[e] : logits[e];
            const bool far = (own - logits[e]) / (size < own ? own : size) > farthest;
            near[e] = far || above[e] ? -__builtin_inff() : logits[e];
        }
        shares[j] = 1.0f / sum_of_exps(near, experts, own);
        above[ids[j]] = true;
    }
}

void combine(const float* x, const float* const* added, const float* shares, int64_t chosen, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) {
        Lanes total = all(0.0f);
        for (int64_t j = 0; j < chosen; j++) total = fma(all(shares[j]), load(added[j] + c), total);
        store(out + c, x ? load(x + c) + total : total);
    }
}

void gate_input(const float* x, const float* y, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) store(out + c, gelu_tanh(load(x + c)) * load(y + c));
}

void add_up(const float* const* parts, int64_t count, const float* x, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) {
        Lanes total = load(parts[0] + c);
        for (int64_t i = 1; i < count; i++) total = total + load(parts[i] + c);
        store(out + c, x ? load(x + c) + total : total);
    }
}

// The convolution of columns [first, last): own(x) of each row goes in, and use(x, total) is what comes out, where x is the row from that
// column on. Rows go by in tiles: they lie far apart, and so all columns of a tile find their pages in the cache.
template <class Own, class Use>
DC_INLINE void convolve_columns(const ConvRows& conv, int64_t first, int64_t last, Own own, Use use) {
    constexpr int64_t TILE = MAX_TAPS;          // no less: only the first tile may read a state, as a later one might find it overwritten
    const StateRows& rows = conv.rows;
    const int64_t columns = conv.columns, before = conv.size - 1;
    for (int64_t begin = rows.begin; begin < rows.end; begin += TILE) {
        const int64_t end = begin + TILE < rows.end ? begin + TILE : rows.end;
        int64_t first_write = 0;
        while (first_write < rows.writes && rows.write_rows[first_write] < begin) first_write++;
        for (int64_t c = first; c < last; c += 16) {
            Lanes past[MAX_TAPS];               // s of the rows before, oldest first
            const auto own_of = [&](int64_t row) { return own(conv.x + row * conv.stride + c); };
            for (int64_t j = 0; j < before; j++)
                past[j] = begin > rows.begin ? own_of(begin - before + j) : rows.read < 0 ? all(0.0f) : load(conv.states + (rows.read * before + j) * columns + c);
            int64_t written = first_write;
            convolve(conv.taps + c, columns, conv.size, begin, end, past, own_of, [&](int64_t row, Lanes total) {
                if (conv.bias) total = total + load(conv.bias + c);
                store(conv.out + row * columns + c, use(conv.x + row * conv.stride + c, total));
                for (; written < rows.writes && rows.write_rows[written] == row; written++)
                    for (int64_t j = 0; j < before; j++) store(conv.states + (rows.write_slots[written] * before + j) * columns + c, past[j]);
            });
        }
    }
}

void short_conv(const ConvRows& conv, int64_t first, int64_t last) {
    const int64_t columns = conv.columns;
    convolve_columns(conv, first, last, [=](const float* x) { return load(x) * load(x + 2 * columns); },
                     [=](const float* x, Lanes total) { return load(x + columns) * total; });
}

void plain_conv(const ConvRows& conv, int64_t first, int64_t last) {
    convolve_columns(conv, first, last, [](const float* x) { return load(x); }, [](const float*, Lanes total) { return silu(total); });
}

void gate(const float* x, const float* gates, bool by_softplus, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += 16) {
        const Lanes by = load(gates + c);
        store(out + c, load(x + c) * (by_softplus ? softplus(by) : sigmoid(by)));
    }
}

void gate_head(const float* x, float gate, bool by_softplus, int64_t columns, float* out) {
    const Lanes by = by_softplus ? softplus(all(gate)) : sigmoid(all(gate));
    for (int64_t c = 0; c < columns; c += 16) store(out + c, load(x + c) * by);
}

void gated_add(const float* x, const float* added, float gate, int64_t columns, float* out) {
    const Lanes share = all(sigmoid(gate));
    for (int64_t c = 0; c < columns; c += 16) store(out + c, load(x + c) + share * load(added + c));
}

void turn(const float* x, const float* cos, const float* sin, int64_t half, bool adjacent, float scale, float* out) {
    for (int64_t i = 0; i < half; i++) {
        const float a = adjacent ? x[2 * i] : x[i], b = adjacent ? x[2 * i + 1] : x[half + i];
        out[i] = scale * fma1(a, cos[i], -(b * sin[i]));
        out[half + i] = scale * fma1(b, cos[i], a * sin[i]);
    }
}

template <class Stored>
void narrow_row(const float* x, int64_t columns, void* to) {
    for (int64_t c = 0; c < columns; c += 16) store(static_cast<Stored*>(to) + c, load(x + c));
}

void narrow_any(Element type, const float* x, int64_t columns, void* to) {
    if (type == Element::float32) narrow_row<float>(x, columns, to);
    if (type == Element::float16) narrow_row<Half>(x, columns, to);
    if (type == Element::bfloat16) narrow_row<Bfloat>(x, columns, to);
}

// Four ranks of A and ROWS rows of x at a time, so that each number that is read is used in several products.
template <int ROWS, class T>
DC_INLINE void shrink_four(const T* a, int64_t columns, const float* const* x, const float* scales, float* const* u, int64_t rank) {
    Lanes sums[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 4; j++) sums[r][j] = all(0.0f);
    for (int64_t c = 0; c < columns; c += 16, a += 64) {
        Lanes weights[4];
        load_pair(a, weights[0], weights[1]), load_pair(a + 32, weights[2], weights[3]);
        for (int r = 0; r < ROWS; r++) {
            const Lanes own = load(x[r] + c);
            for (int j = 0; j < 4; j++) sums[r][j] = fma(weights[j], own, sums[r][j]);
        }
    }
    for (int r = 0; r < ROWS; r++) scaled_sums(sums[r], scales + rank, u[r] + rank);
}

template <int ROWS, class T>
void shrink_rows(const AdapterMatrix& m, const float* const* x, float* const* u) {
    const T* a = static_cast<const T*>(m.a);
    for (int64_t rank = 0; rank < m.ranks; rank += 4) shrink_four<ROWS>(a + rank * m.columns, m.columns, x, m.scales, u, rank);
}

template <class T>
void shrink_of(const AdapterMatrix& m, const float* const* x, int64_t rows, float* const* u) {
    if constexpr (REGISTERS >= 32)                  // elsewhere the sums of two fill them
        if (rows == 4) return shrink_rows<4, T>(m, x, u);
    for (; rows >= 2; rows -= 2, x += 2, u += 2) shrink_rows<2, T>(m, x, u);
    if (rows) shrink_rows<1, T>(m, x, u);
}

void shrink(const AdapterMatrix& m, const float* const* x, int64_t rows, float* const* u) {
    if (m.type == Weight::f32) shrink_of<float>(m, x, rows, u);
    if (m.type == Weight::f16) shrink_of<Half>(m, x, rows, u);
    if (m.type == Weight::bf16) shrink_of<Bfloat>(m, x, rows, u);
}

}  // namespace

extern const RowKernels row_kernels = {rms_norm, layer_norm, mix, smear, soft_cap, widen_any, route, route_sigmoids, route_sparse, combine, add_up, short_conv,
                                         plain_conv, gate, gate_head, gated_add, gate_input, shrink, squares, scale, turn, narrow_any};

}  // namespace DC_ISA
}  // namespace dc
