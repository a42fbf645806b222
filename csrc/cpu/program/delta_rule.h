// Linear attention that corrects what a key is bound to: see DeltaRule in chatlm/worker/model/blocks/mixers.py, and
// delta_rule_reference in chatlm/worker/ops/mixers.py.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/program/recorded.h"
#include "cpu/program/rows.h"

namespace dc {

// Its fields (ops.def):
//     size                        taps of the convolution
//     key_heads, value_heads      Hk, Hv, a multiple of Hk
//     key_size, value_size        Dk, Dv, multiples of 16
//     alternating                 value head j reads key head j % Hk; else it reads j / (Hv / Hk)
//     gates_by_key, heads_by_key  x has b and a side by side for each key head; the same for q, k, v and z
//     taps, decay, dt_bias, norm  [size][channels], [Hv], [Hv], [Dv]
//     past, states                [slots][size - 1][channels], the oldest token first; [slots][Hv][Dk][Dv]
struct DeltaRule : op::delta_rule {
    explicit DeltaRule(const op::delta_rule& recorded) : op::delta_rule(recorded) {}

    int64_t channels() const { return 2 * key_heads * key_size + values(); }
    int64_t values() const { return value_heads * value_size; }
    int64_t columns() const { return channels() + values() + 2 * value_heads; }    // of x: p, z, b, a
    int64_t heads_of_key() const { return value_heads / key_heads; }
    int64_t head_columns() const { return 2 * key_size + heads_of_key() * value_size; }    // of a key head: q, k and its values

    int64_t head(int64_t key_head, int64_t i) const { return alternating ? key_head + i * key_heads : key_head * heads_of_key() + i; }
    // Where a row of x has b, a and z of value head j, and q, k and v of p.
    int64_t b_at(int64_t j) const { return channels() + values() + (gates_by_key ? j / heads_of_key() * heads_of_key() + j : j); }
    int64_t a_at(int64_t j) const { return b_at(j) + (gates_by_key ? heads_of_key() : value_heads); }
    int64_t key_columns() const { return head_columns() + heads_of_key() * value_size; }   // by key head: q, k, its v's, its z's
    int64_t q_at(int64_t key_head) const { return key_head * (heads_by_key ? key_columns() : key_size); }
    int64_t k_at(int64_t key_head) const { return q_at(key_head) + (heads_by_key ? 1 : key_heads) * key_size; }
    int64_t v_at(int64_t j) const { return heads_by_key ? by_key(j) : 2 * key_heads * key_size + j * value_size; }
    int64_t z_at(int64_t j) const { return heads_by_key ? by_key(j) + heads_of_key() * value_size : channels() + j * value_size; }

    static constexpr int64_t TILE = 32;         // rows that go through all columns of a key head at once
    int64_t memory_floats() const;              // how many a chunk needs

private:
    int64_t by_key(int64_t j) const {
        return j / heads_of_key() * key_columns() + 2 * key_size + j % heads_of_key() * value_size;
    }
};

// The work of one key head and its value heads for rows of one sequence: x [rows][columns()] -> out [rows][Hv * Dv].
struct DeltaRows {
    const DeltaRule* rule;
    const float* x;
    float* out;
    StateRows rows;
    int64_t key_head;
    float* memory;
};

DC_EACH_ISA(void delta_rule(const DeltaRows& job))

}  // namespace dc
