// op       mamba2: a state that decays, takes up dt v B^T, and is read by C; a gate
// shapes   x [rows][z, p, dt], u [rows][v, B, C] -> out [rows][H * P]; states [slots][H][N][P]
// mapping  a chunk takes some heads, each with all rows of all sequences. Between rows a state lies in the caller's memory. A row that
//          is alone reads it from its slot and writes it straight to its new one
// cost     2 N P multiply-adds and N P products for each row and head: by estimate 0.3 us at 64 x 128 and 2.6 GHz, with AVX-512. A row
//          that is alone reads and writes the states once: 3 MiB at 48 such heads
// numerics float32. S = fma(B, dt v, decay S). y = S C is a sum over N in order, fused. out = fma(skip, v, y) * silu(z). The bits are the
//          same on every instruction set, and however rows are cut
#include "cpu/program/mamba2.h"

#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int WIDE = REGISTERS >= 32 ? 4 : 2;   // so many lanes of the state's columns are in registers at once

// One row's step for 16 * COUNT columns of a state, and their part of out. The state goes from `from` to `to`, which may be the same.
template <int COUNT>
void advance(const Mamba2Rows& job, int64_t row, int64_t column, const float* from, float* to, float decay, float dt) {
    const Mamba2& layer = *job.layer;
    const int64_t P = layer.head_size, N = layer.state_size, at = job.head * P + column;
    const float *u = job.u + row * layer.channels(), *B = u + layer.b_at(job.head), *C = u + layer.c_at(job.head);
    Lanes added[COUNT], y[COUNT];
    for (int i = 0; i < COUNT; i++) added[i] = load(u + at + 16 * i) * all(dt), y[i] = all(0.0f);
    for (int64_t n = 0; n < N; n++) {
        const Lanes b = all(B[n]), c = all(C[n]);
        for (int i = 0; i < COUNT; i++) {
            const Lanes S = fma(b, added[i], all(decay) * load(from + n * P + column + 16 * i));
            store(to + n * P + column + 16 * i, S);
            y[i] = fma(S, c, y[i]);
        }
    }
    for (int i = 0; i < COUNT; i++) {
        const int64_t own = at + 16 * i;
        const Lanes sum = fma(all(layer.skip[job.head]), load(u + own), y[i]);
        store(job.out + row * layer.inner() + own, sum * silu(load(job.x + row * layer.columns() + own)));
    }
}

// Of 16 rows from `row` on: dt, and how much of the state is kept.
void find_decays(const Mamba2Rows& job, int64_t row, float* dts, float* decays) {
    const Mamba2& layer = *job.layer;
    float some[16] = {};
    for (int64_t i = 0; i < 16 && row + i < job.rows.end; i++)
        some[i] = job.x[(row + i) * layer.columns() + layer.inner() + layer.channels() + job.head] + layer.dt_bias[job.head];
    const Lanes dt = softplus(load(some));
    store(dts, dt), store(decays, exp_negative(all(layer.decay[job.head]) * dt));
}

}  // namespace

void mamba2(const Mamba2Rows& job) {
    const Mamba2& layer = *job.layer;
    const StateRows& rows = job.rows;
    const int64_t size = layer.head_values();
    const auto in_slot = [&](int64_t slot) { return layer.states + (slot * layer.heads + job.head) * size; };
    if (rows.read < 0) std::memset(job.memory, 0, size_t(size) * sizeof(float));
    const float* from = rows.read < 0 ? job.memory : in_slot(rows.read);
    float dts[16], decays[16];
    int64_t written = 0;
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const int64_t i = (row - rows.begin) % 16;
        if (i == 0) find_decays(job, row, dts, decays);
        const auto writes = [&] { return written < rows.writes && rows.write_rows[written] == row; };
        float* const to = writes() ? in_slot(rows.write_slots[written++]) : job.memory;
        int64_t column = 0;
        for (; column + 16 * WIDE <= layer.head_size; column += 16 * WIDE) advance<WIDE>(job, row, column, from, to, decays[i], dts[i]);
        for (; column < layer.head_size; column += 16) advance<1>(job, row, column, from, to, decays[i], dts[i]);
        for (; writes(); written++) std::memmove(in_slot(rows.write_slots[written]), to, size_t(size) * sizeof(float));
        from = to;
    }
}

}  // namespace DC_ISA
}  // namespace dc
