// What comes between two products other than attention, one row at a time: norm, mixing, the logits' cap, the plain embedding, the
// choice of experts and the sum of what they give, and the sum over ranks.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

enum class Element : int;
constexpr int64_t MAX_EXPERTS = 4096, MAX_CHOSEN = 64;

// Rows of one sequence in an op that keeps a state of it in slots.
struct StateRows {
    int64_t begin, end;
    int64_t read;               // the slot with the state before row `begin`; -1: there is none
    const int64_t *write_rows, *write_slots;
    int64_t writes;             // after row write_rows[i], ascending and of these rows, the state goes to slot write_slots[i]
};

// A convolution, see RowKernels.
struct ConvRows {
    const float* x;             // rows of `stride`: short_conv: b, c, u of `columns` each, and s = b u; convolve: s
    int64_t stride;
    float* out;                 // [rows][columns]
    const float *taps, *bias;   // [size][columns], the oldest token's first; [columns] or null
    int64_t columns, size;
    float* states;              // [slots][size - 1][columns]: s of the tokens before, oldest first
    StateRows rows;
};
constexpr int64_t MAX_TAPS = 64;

// A choice by sigmoid(logit) + bias, among the experts of `kept` of the equally large `groups`: those whose two best have the largest sum.
struct SigmoidRouter {
    const float* bias;          // [experts] or null; not part of the shares
    int64_t groups, kept;       // 1: all experts are one
    bool sum_to_one;            // shares: the chosen experts' sigmoids, divided by their sum or not,
    float scale;                // times this
};

struct AdapterMatrix;
constexpr int64_t SHRUNK_ROWS = 4;

struct RowKernels {             // `columns` a multiple of 16 except for soft_cap and widen; out may be x
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t columns, float* out);     // weight or null
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int64_t count, int64_t columns, float* out);    // bias or null
    void (*mix)(const float* x, float a, const float* y, float b, int64_t columns, float* out);            // a x + b y
    // x + lambda * sigmoid(x[:channels] . gate) * previous; previous null: x
    void (*smear)(const float* x, const float* previous, const float* gate, int64_t channels, float lambda, int64_t columns, float* out);
    void (*soft_cap)(const float* x, float cap, int64_t columns, float* out);                               // cap tanh(x / cap)
    void (*widen)(Element type, const void* from, int64_t columns, float* out);                            // exactly
    // ids of the `chosen` largest logits, the larger first, of equal ones the lower id; shares: softmax over these, or over all
    void (*route)(const float* logits, int64_t experts, int64_t chosen, bool sum_to_one, int32_t* ids, float* shares);
    // the same by sigmoid(logit) + bias, see SigmoidRouter
    void (*route_sigmoids)(const float* logits, const SigmoidRouter& router, int64_t experts, int64_t chosen, int32_t* ids, float* shares);
    // the same by the logits; the share of each is by a softmax over it and those below it whose distance to it is at most `farthest`
    // of the larger of both's size
    void (*route_sparse)(const float* logits, float farthest, int64_t experts, int64_t chosen, int32_t* ids, float* shares);
    // x + shares[0] added[0] + ..., added up in this order
    void (*combine)(const float* x, const float* const* added, const float* shares, int64_t chosen, int64_t columns, float* out);
    // (parts[0] + parts[1] + ...), added up in this order; then x + that, unless x is null
    void (*add_up)(const float* const* parts, int64_t count, const float* x, int64_t columns, float* out);
    // c (taps[0] s of `size - 1` rows before + ... + taps[size - 1] s + bias), added up in this order, in columns [first, last)
    void (*short_conv)(const ConvRows& conv, int64_t first, int64_t last);
    void (*convolve)(const ConvRows& conv, int64_t first, int64_t last);                                    // the same with silu() for c ()
    void (*gate)(const float* x, const float* gates, int64_t columns, float* out);                          // x * sigmoid(gates)
    void (*gated_add)(const float* x, const float* added, float gate, int64_t columns, float* out);         // x + sigmoid(gate) * added
    void (*gate_input)(const float* x, const float* y, int64_t columns, float* out);                       // gelu(x) y
    // scales * (A x[r]) -> u[r] of 1 to SHRUNK_ROWS rows
    void (*shrink)(const AdapterMatrix& matrix, const float* const* x, int64_t rows, float* const* u);
    float (*squares)(const float* x, int64_t columns);                                                      // the sum of theirs
    void (*scale)(const float* x, float scale, const float* weight, int64_t columns, float* out);           // x * scale (* weight or null)
};

DC_EACH_ISA(extern const RowKernels row_kernels)

}  // namespace dc
