// op       prepare: rows of x [norm] -> panels of 16 rows, in the ways that tiles' types take x (tiles.h)
// mapping  16 lanes = 16 columns of a row
// cost     a row is read two or three times, from the first cache; 3 to 5 % of a prompt
// numerics tiles.h. The same operations on every instruction set
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

struct Row {
    const Preparation& job;
    const float *x, *weight;            // weight: null where none is to be multiplied by
    Lanes scale;                        // 1 without a norm: with a branch around it, GCC 12 copies the lanes through memory, slowly
};

DC_INLINE Lanes value_at(const Row& row, int64_t c) {       // 16 values from column c; beyond the last column 0
    const int64_t count = row.job.columns - c;
    const Lanes y = load_some(row.x + c, count) * row.scale;
    return row.weight ? y * load_some(row.weight + c, count) : y;
}

DC_INLINE Lanes rms_scale(const float* x, int64_t columns, float epsilon) {     // with rms_norm's bits
    Lanes squares = all(0.0f);
    for (int64_t c = 0; c < columns; c += 16) {
        const Lanes y = load_some(x + c, columns - c);
        squares = fma(y, y, squares);
    }
    return all(1.0f / __builtin_sqrtf(sum(squares) / float(columns) + epsilon));
}

DC_INLINE void quantize_row(const Row& row, PanelBlock* panel, int panel_row) {
    const int set = panel_row / SET_ROWS, r = panel_row % SET_ROWS;
    const int64_t blocks = row.job.columns / BLOCK;
    float scales = 0;
    for (int64_t b = 0; b < blocks; b++) {
        PanelSet& to = panel[b].sets[set];
        const Quantized q = quantize_block(value_at(row, b * BLOCK), value_at(row, b * BLOCK + 16), panel[b].x[panel_row]);
        to.scale[r] = q.scale;
        to.product[r] = q.scale * float(q.sum.low + q.sum.high);
        to.minus[r] = -(q.sum.low + q.sum.high);
        to.has_fine[r] = 0;
        to.half_minus[0][r] = -q.sum.low, to.half_minus[1][r] = -q.sum.high;
        for (int part = 0; part < 3; part++) to.fine_minus[part][r] = 0;
        std::memset(panel[b].fine[panel_row], 0, BLOCK);
        scales += q.scale;
    }
    const float limit = row.job.fine ? 0 : FINE_ABOVE * (scales / float(blocks));
    for (int64_t b = 0; b < blocks; b++) {
        PanelSet& to = panel[b].sets[set];
        if (!(to.scale[r] > limit)) continue;
        const HalfSums sum = quantize_rest(value_at(row, b * BLOCK), value_at(row, b * BLOCK + 16), panel[b].fine[panel_row]);
        to.has_fine[r] = 1;
        to.product[r] += to.scale[r] / 256 * float(sum.low + sum.high);
        to.fine_minus[0][r] = -(sum.low + sum.high), to.fine_minus[1][r] = -sum.low, to.fine_minus[2][r] = -sum.high;
    }
}

// ---- in steps

// The largest value's size in block b of a row; less than 1e-24 counts as nothing.
DC_INLINE float size_of_block(const Row& row, int64_t b) {
    const float amax = largest_magnitude(value_at(row, b * BLOCK), value_at(row, b * BLOCK + 16));
    return amax < 1e-24f ? 0 : amax;
}

// What is above the limit of some blocks of a group, and the size that its step comes from.
struct Reach {
    uint8_t has_high = 0;
    float size = 0;                     // 0: nothing but zeros; not a number: holds one that is not
};

DC_INLINE Reach reach_of(const Row& row, int64_t first_block, float limit) {
    Reach reach;
    float above = 0;
    bool good = true;
    for (int i = 0; i < STEP_BLOCKS; i++) {
        const float size = size_of_block(row, first_block + i);
        good = good && size <= 1e35f;
        if (size > limit) reach.has_high = uint8_t(reach.has_high | 1 << i), above = size > above ? size : above;
        else reach.size = size > reach.size ? size : reach.size;
    }
    if (above / 256 > reach.size) reach.size = above / 256 > 1e-24f ? above / 256 : 1e-24f;
    if (!good) reach.size = __builtin_nanf("");
    return reach;
}

// Integers next to 16 values, within +-127 * 257, as low + 256 * high; both + MAGIC. What needs a low of 128 gets 127, as signs of bytes do.
struct TwoBytes { Lanes low, high; };

DC_INLINE TwoBytes two_bytes(Lanes x, Lanes inverse) {
    const Lanes magic = all(MAGIC), zero = all(0.0f), least = all(-127.0f);
    const Lanes whole = (x * inverse + magic) - magic, high = (whole * all(1.0f / 256) + magic) - magic;
    const Lanes low = maximum(whole - high * all(256.0f), least);
    return {(zero - maximum(zero - low, least)) + magic, high + magic};
}

DC_INLINE void put_sums(int16_t* to, HalfSums sum) { to[0] = int16_t(sum.low), to[1] = int16_t(sum.high); }

DC_INLINE void quantize_group(const Row& row, int64_t first_block, const Reach& reach, StepGroup& to, int r) {
    StepSet& set = to.sets[r / SET_ROWS];
    const int s = r % SET_ROWS;
    const Lanes inverse = all(reach.size > 0 ? 127.0f / reach.size : 0.0f);
    int32_t total = 0;
    for (int i = 0; i < STEP_BLOCKS; i++) {
        const Lanes a = value_at(row, (first_block + i) * BLOCK), b = value_at(row, (first_block + i) * BLOCK + 16);
        HalfSums low, high{0, 0};
        if (reach.has_high >> i & 1) {
            const TwoBytes first = two_bytes(a, inverse), second = two_bytes(b, inverse);
            low = store_low_bytes(first.low, second.low, to.low[r] + BLOCK * i), high = store_low_bytes(first.high, second.high, to.high[r] + BLOCK * i);
        } else {
            low = store_rounded(a, b, inverse, to.low[r] + BLOCK * i);
            std::memset(to.high[r] + BLOCK * i, 0, BLOCK);
        }
        put_sums(set.low_sums[s][i], low), put_sums(set.high_sums[s][i], high);
        total += low.low + low.high + 256 * (high.low + high.high);
    }
    set.step[s] = reach.size / 127.0f, set.minus[s] = -total, set.has_high[s] = reach.has_high;
}

DC_INLINE void quantize_row_in_steps(const Row& row, StepGroup* panel, int r) {
    const int64_t blocks = row.job.columns / BLOCK;
    float sizes = 0;
    for (int64_t b = 0; b < blocks; b++) sizes += size_of_block(row, b);
    const float limit = row.job.fine ? 0 : FINE_ABOVE * (sizes / float(blocks));        // of a row with a NaN nothing is above it
    for (int64_t b = 0; b < blocks; b += STEP_BLOCKS) quantize_group(row, b, reach_of(row, b, limit), panel[b / STEP_BLOCKS], r);
}

// With one step for the row or, with `fine`, two bytes in every block, which tells the kernels that groups have steps of their own.
DC_INLINE void quantize_row_in_one_step(const Row& row, StepGroup* panel, int r) {
    const int64_t blocks = row.job.columns / BLOCK;
    Reach whole;
    for (int64_t b = 0; b < blocks && !row.job.fine; b += STEP_BLOCKS) {
        const Reach own = reach_of(row, b, __builtin_inff());
        whole.size = whole.size >= own.size ? whole.size : own.size;           // what is not a number stays
        if (own.size != own.size) break;
    }
    for (int64_t b = 0; b < blocks; b += STEP_BLOCKS) {
        Reach own = row.job.fine ? reach_of(row, b, 0) : whole;
        if (row.job.fine) own.has_high = 0xff;
        quantize_group(row, b, own, panel[b / STEP_BLOCKS], r);
    }
}

// ---- all ways

// Where a group's part of a panel of floats begins.
DC_INLINE int64_t float_group(int64_t columns, int64_t group) {
    return group % (PANEL_ROWS / GROUP_ROWS) * ((columns + 15) / 16) * GROUP_ROWS * 16;
}

void copy_row(const Row& row, float* panel, int r) {
    for (int64_t c = 0; c < row.job.columns; c += 16) store(panel + c * GROUP_ROWS + r * 16, value_at(row, c));
}

void prepare(const Preparation& job, int64_t row_begin, int64_t row_end) {
    for (int64_t i = row_begin; i < row_end; i++) {
        const float* x = job.x + i * job.stride;
        const Row row{job, x, job.norm ? job.norm_weight : nullptr, job.norm ? rms_scale(x, job.columns, job.epsilon) : all(1.0f)};
        uint8_t* panel = job.prepared + i / PANEL_ROWS * panel_bytes(job.panels, job.columns);
        const int r = int(i % PANEL_ROWS);
        if (job.panels & FLOAT_PANELS) copy_row(row, reinterpret_cast<float*>(panel) + float_group(job.columns, i / GROUP_ROWS), r % GROUP_ROWS);
        if (job.panels & BLOCK_PANELS) quantize_row(row, reinterpret_cast<PanelBlock*>(panel), r);
        if (!(job.panels & STEP_PANELS)) continue;
        StepGroup* const steps = const_cast<StepGroup*>(steps_of(panel, job.panels, job.columns));
        if (job.panels & HIGH_BYTES) quantize_row_in_steps(row, steps, r);
        else quantize_row_in_one_step(row, steps, r);
    }
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
