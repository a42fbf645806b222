// A state space that decays by the token: see Mamba2 in chatlm/worker/model/blocks/mixers.py, and mamba2_reference in
// chatlm/worker/ops/mixers.py.
//
//     convolve    (columns) u = silu of the convolution of p; step_run.cpp
//     mamba2      (heads) y = S C + skip * v, times silu(z)
//     rms_norm    (row by row) over each group; where ranks share groups, group_squares, all_reduce and norm_groups
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/program/recorded.h"
#include "cpu/program/rows.h"

namespace dc {

// Its fields (ops.def):
//     heads, head_size         H, P, a multiple of 16
//     state_size, groups       N, G
//     first_head, group_heads  head j is head first_head + j of the model, and group_heads of these form a group
//     decay, dt_bias, skip     [H]
//     states                   [slots][H][N][P]
struct Mamba2 : op::mamba2 {
    explicit Mamba2(const op::mamba2& recorded) : op::mamba2(recorded) {}

    int64_t inner() const { return heads * head_size; }
    int64_t channels() const { return inner() + 2 * groups * state_size; }          // of u: v, B, C
    int64_t columns() const { return inner() + channels() + heads; }                // of x: z, p, dt
    int64_t head_values() const { return state_size * head_size; }
    int64_t group_of(int64_t head) const { return (first_head + head) / group_heads; }
    int64_t b_at(int64_t head) const { return inner() + group_of(head) * state_size; }
    int64_t c_at(int64_t head) const { return b_at(head) + groups * state_size; }
};

// The work of one head for rows of one sequence: x [rows][columns()], u [rows][channels()] -> out [rows][inner()].
struct Mamba2Rows {
    const Mamba2* layer;
    const float *x, *u;
    float* out;
    StateRows rows;
    int64_t head;
    float* memory;                              // [N][P]
};

DC_EACH_ISA(void mamba2(const Mamba2Rows& job))

}  // namespace dc
