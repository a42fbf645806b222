// op       rope_append: everything between the qkv product and attention, one pass over each row
// shapes   qkv [T, (Hq + 2 Hk) * D] float32 -> q [T, Hq, D] float32, K and V into 16-position pages (attention.h)
// mapping  one item = a run of rows; a head's D values stay in a small buffer, 16 lanes at a time
// cost     reads 4 bytes a value, writes 4 per q value and 2 or 4 per k and v value; K goes to D half cache lines
//          per head, which is most of the time: about 0.1 us a row at Hq 9, Hk 3, D 64
// numerics float32; sum of squares in 16 lanes, then a fixed tree; the same bits on every instruction set; K and V are
//          rounded once, to the nearest, ties to even
#include "cpu/attention/rope_heads.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

// The same for D = 16 * Vectors rotated as a whole by halves, as nearly every model has it: all in registers.
template <int Vectors>
struct HeadInRegisters {
    Lanes x[Vectors];

    void normalize(const float* weight, float epsilon) {
        Lanes squares = all(0.0f);
        for (int i = 0; i < Vectors; i++) squares = fma(x[i], x[i], squares);
        const Lanes scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(16 * Vectors) + epsilon));
        for (int i = 0; i < Vectors; i++) {
            x[i] = x[i] * scale;
            if (weight) x[i] = x[i] * load(weight + 16 * i);
        }
    }

    inline __attribute__((always_inline)) void prepare(const RopeJob& job, const float* head, const float* weight, const Lanes* cos, const Lanes* sin) {
        for (int i = 0; i < Vectors; i++) x[i] = load(head + 16 * i);
        if (job.norm == QkNorm::before_rope) normalize(weight, job.epsilon);
        for (int i = 0; i < Vectors / 2; i++) {
            const Lanes a = x[i], b = x[i + Vectors / 2];
            x[i] = fma(a, cos[i], all(-1.0f) * (b * sin[i]));
            x[i + Vectors / 2] = fma(b, cos[i], a * sin[i]);
        }
        if (job.norm == QkNorm::after_rope) normalize(weight, job.epsilon);
        if (job.post_scale != 1.0f)
            for (int i = 0; i < Vectors; i++) x[i] = x[i] * all(job.post_scale);
    }
};

// q and k of one row: q -> `q` [Hq][D] float32, k narrowed into column `offset` of the page's K blocks
template <class Stored, int Vectors>
void rope_heads_in_registers(const RopeJob& job, int64_t position, const float* head, float* q, Stored* block) {
    constexpr int D = 16 * Vectors;
    alignas(64) Stored narrowed[D];
    HeadInRegisters<Vectors> h;
    Lanes cos[Vectors / 2], sin[Vectors / 2];
    for (int i = 0; i < Vectors / 2; i++) {
        cos[i] = load(job.cos + position * job.half_rotated + 16 * i);
        sin[i] = load(job.sin + position * job.half_rotated + 16 * i);
    }
    for (int n = 0; n < job.heads; n++, head += D, q += D) {
        h.prepare(job, head, job.q_norm, cos, sin);
        for (int i = 0; i < Vectors; i++) store(q + 16 * i, h.x[i] * all(job.q_scale));
    }
    for (int n = 0; n < job.kv_heads; n++, head += D, block += 2 * PAGE_SIZE * D) {
        h.prepare(job, head, job.k_norm, cos, sin);
        for (int i = 0; i < Vectors; i++) store(narrowed + 16 * i, h.x[i]);
#pragma GCC unroll 16
        for (int d = 0; d < D; d++) block[d * PAGE_SIZE] = narrowed[d];
    }
}

template <class Stored>
void rope_heads(const RopeJob& job, int64_t position, const float* head, float* q, Stored* block) {
    const int D = job.head_size;
    alignas(64) float x[MAX_HEAD_SIZE];
    alignas(64) Stored narrowed[MAX_HEAD_SIZE];
    for (int n = 0; n < job.heads; n++, head += D, q += D) {
        prepare_head(job, head, job.q_norm, position, job.post_scale, x);
        for (int d = 0; d < D; d += 16) store(q + d, load(x + d) * all(job.q_scale));
    }
    for (int n = 0; n < job.kv_heads; n++, head += D, block += 2 * PAGE_SIZE * D) {
        prepare_head(job, head, job.k_norm, position, job.post_scale, x);
        for (int d = 0; d < D; d += 16) store(narrowed + d, load(x + d));
        for (int d = 0; d < D; d++) block[d * PAGE_SIZE] = narrowed[d];
    }
}

template <class Stored>
void rope_row(const RopeJob& job, int64_t row) {
    const int D = job.head_size;
    const int64_t position = job.positions[row], offset = place_of(job.slots[row]);
    const float* head = job.qkv + row * job.row_stride;
    float* q = job.q_out + row * job.heads * D;
    Stored* block = static_cast<Stored*>(job.cache) + page_of(job.slots[row]) * job.page_stride;

    const bool whole = 2 * job.half_rotated == D;
    if (whole && D == 64) rope_heads_in_registers<Stored, 4>(job, position, head, q, block + offset);
    else if (whole && D == 128) rope_heads_in_registers<Stored, 8>(job, position, head, q, block + offset);
    else rope_heads(job, position, head, q, block + offset);

    head += int64_t(job.heads + (job.values_from_keys ? 0 : job.kv_heads)) * D;
    alignas(64) float x[MAX_HEAD_SIZE];
    for (int n = 0; n < job.kv_heads; n++, head += D) {
        Stored* v = block + (2 * n + 1) * PAGE_SIZE * D + offset * D;
        if (!job.value_embed && !job.value_norm) {
            for (int d = 0; d < D; d += 16) store(v + d, load(head + d));
            continue;
        }
        for (int d = 0; d < D; d += 16) store(x + d, load(head + d));
        if (job.value_norm) normalize(x, D, nullptr, job.epsilon);
        if (job.value_embed) add_value_embedding(job, row, n, x);
        for (int d = 0; d < D; d += 16) store(v + d, load(x + d));
    }
}

template <class Stored>
void rope_rows_of(const RopeJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        if (job.slots[row] >= 0) rope_row<Stored>(job, row);
}

void rope_rows(const RopeJob& job, int64_t begin, int64_t end) {
    if (job.cache_type == Element::float32) rope_rows_of<float>(job, begin, end);
    if (job.cache_type == Element::float16) rope_rows_of<Half>(job, begin, end);
    if (job.cache_type == Element::bfloat16) rope_rows_of<Bfloat>(job, begin, end);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
