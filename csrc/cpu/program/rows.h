// The ops between two products, apart from attention. Each works on one row at a time: norms, mixing, the cap of the logits, the
// plain embedding, the choice of experts and the sum of what they give, convolutions, gates and the sum over ranks.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

enum class Element : int;
constexpr int64_t MAX_EXPERTS = 4096, MAX_CHOSEN = 64;

// The rows [begin, end) of one sequence, for an op that carries a state from row to row. States lie in slots: the op reads one
// before the first row, and writes one after each row that `write_rows` names.
struct StateRows {
    int64_t begin, end;
    int64_t read;               // the slot with the state before row `begin`; -1: there is no such state
    const int64_t *write_rows, *write_slots;
    int64_t writes;             // how many: the state after row write_rows[i] goes to slot write_slots[i]; the rows ascend
};

// What RowKernels' short_conv and convolve work on. In their formulas s is the number that the taps are multiplied by.
struct ConvRows {
    const float* x;             // short_conv: each row has b, c and u, of `columns` each, and s = b u. convolve: a row is s
    int64_t stride;             // from one row of x to the next
    float* out;                 // [rows][columns]
    const float *taps, *bias;   // [size][columns], the oldest token's first; [columns] or null
    int64_t columns, size;
    float* states;              // [slots][size - 1][columns]: s of the tokens before, oldest first
    StateRows rows;
};
constexpr int64_t MAX_TAPS = 64;

// Where there are `groups` of experts, all equally large, only `kept` of them stay in the choice: those in which the `best` best experts
// have the largest sum.
struct Groups {
    int64_t groups = 1, kept = 1, best = 2;         // kept = groups: every expert stays
};

// How route and route_sigmoids choose: by the part in a softmax, or by sigmoid(logit), + bias.
struct Router {
    const float* bias;          // [experts] or null; the shares are made without it
    Groups groups;
    bool sum_to_one;            // an expert's share is that number without bias, divided by the sum of the chosen experts' if this is true,
    float scale;                // and then multiplied by this
};

struct AdapterMatrix;
constexpr int64_t SHRUNK_ROWS = 4;

// `columns` is a multiple of 16, except in soft_cap and widen. `out` may be `x`.
struct RowKernels {
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t columns, float* out);     // weight or null
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int64_t count, int64_t columns, float* out);    // weight or null, bias or null
    void (*mix)(const float* x, float a, const float* y, float b, int64_t columns, float* out);            // a x + b y
    // x + lambda * sigmoid(x[:channels] . gate) * previous; previous null: x
    void (*smear)(const float* x, const float* previous, const float* gate, int64_t channels, float lambda, int64_t columns, float* out);
    void (*soft_cap)(const float* x, float cap, int64_t columns, float* out);                               // cap tanh(x / cap)
    void (*widen)(Element type, const void* from, int64_t columns, float* out);                            // exactly
    // The ids of the `chosen` largest logits, the largest first; of equal logits the lower id comes first. Their shares are a softmax
    // over the chosen logits (sum_to_one) or over all. Where groups are left out, or there is a bias, a softmax's numbers are compared
    // instead of logits.
    void (*route)(const float* logits, const Router& router, int64_t experts, int64_t chosen, int32_t* ids, float* shares);
    // The same by sigmoid(logit) + bias.
    void (*route_sigmoids)(const float* logits, const Router& router, int64_t experts, int64_t chosen, int32_t* ids, float* shares);
    // Chooses as `route`. The share of each is its part in a softmax over itself and the lower logits near it: those whose distance to
    // it is at most `farthest` times the larger size of the two.
    void (*route_sparse)(const float* logits, float farthest, int64_t experts, int64_t chosen, int32_t* ids, float* shares);
    // x + shares[0] added[0] + ..., added up in this order
    void (*combine)(const float* x, const float* const* added, const float* shares, int64_t chosen, int64_t columns, float* out);
    // (parts[0] + parts[1] + ...), added up in this order; then x + that, unless x is null
    void (*add_up)(const float* const* parts, int64_t count, const float* x, int64_t columns, float* out);
    // c * (taps[0] * s of `size - 1` rows before + ... + taps[size - 1] * s of this row + bias), added up in this order, for columns
    // first .. last - 1.
    void (*short_conv)(const ConvRows& conv, int64_t first, int64_t last);
    void (*convolve)(const ConvRows& conv, int64_t first, int64_t last);                                    // silu() of the same sum, without c
    void (*gate)(const float* x, const float* gates, bool by_softplus, int64_t columns, float* out);        // x * sigmoid(gates), or softplus(gates)
    void (*gate_head)(const float* x, float gate, bool by_softplus, int64_t columns, float* out);           // the same with one gate for all columns
    void (*gated_add)(const float* x, const float* added, float gate, int64_t columns, float* out);         // x + sigmoid(gate) * added
    void (*gate_input)(const float* x, const float* y, int64_t columns, float* out);                       // gelu(x) y
    // u[r] = scales * (A x[r]), for 1 to SHRUNK_ROWS rows.
    void (*shrink)(const AdapterMatrix& matrix, const float* const* x, int64_t rows, float* const* u);
    float (*squares)(const float* x, int64_t columns);                                                      // the sum of their squares
    void (*scale)(const float* x, float scale, const float* weight, int64_t columns, float* out);           // x * scale, times weight unless null
    // `half` pairs of numbers turned by cos and sin and times `scale`; in x a pair is adjacent, or half apart as in out, which is not x
    void (*turn)(const float* x, const float* cos, const float* sin, int64_t half, bool adjacent, float scale, float* out);
    void (*narrow)(Element type, const float* x, int64_t columns, void* to);                                // to the nearest, ties to even
};

DC_EACH_ISA(extern const RowKernels row_kernels)

}  // namespace dc
