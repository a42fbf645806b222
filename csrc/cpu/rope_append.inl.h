// op       rope_append: everything between the qkv product and attention, one pass over each row
// shapes   qkv [T, (Hq + 2 Hk) * D] float32 or bfloat16 -> q [T, Hq, D] float32, K and V into 16-position pages (attention.h)
// mapping  one item = a run of rows; a head's D values stay in a small buffer, 16 lanes at a time
// cost     reads 2 or 4 bytes per value, writes 4 per q value and 2 or 4 per k and v value; K goes to D half cache lines
//          per head, which is most of the time: about 0.1 us a row at Hq 9, Hk 3, D 64
// numerics float32; sum of squares in 16 lanes, then a fixed tree; the same bits on every instruction set; K and V are
//          rounded once, to the nearest, ties to even
#include "cpu/attention.h"
#include "lanes.h"

namespace dc {
namespace DC_ISA {
namespace {

void normalize(float* x, int size, const float* weight, float epsilon) {
    Lanes squares = all(0.0f);
    for (int d = 0; d < size; d += 16) squares = fma(load(x + d), load(x + d), squares);
    Lanes scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(size) + epsilon));
    for (int d = 0; d < size; d += 16) {
        Lanes y = load(x + d) * scale;
        store(x + d, weight ? y * load(weight + d) : y);
    }
}

void rotate_halves(float* x, const float* cos, const float* sin, int half, float direction) {
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        Lanes a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i) * all(direction);
        store(x + i, fma(a, c, all(-1.0f) * (b * s)));
        store(x + half + i, fma(b, c, a * s));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i], s = sin[i] * direction;
        x[i] = fma1(a, cos[i], -(b * s));
        x[half + i] = fma1(b, cos[i], a * s);
    }
}

void rotate_pairs(float* x, const float* cos, const float* sin, int half, float direction) {
    for (int i = 0; i < half; i++) {
        float a = x[2 * i], b = x[2 * i + 1], s = sin[i] * direction;
        x[2 * i] = fma1(a, cos[i], -(b * s));
        x[2 * i + 1] = fma1(b, cos[i], a * s);
    }
}

// One head of q or k: widen, norm, rotate, norm, scale -> x [D]
template <class Input>
void prepare_head(const RopeJob& job, const Input* head, const float* weight, int64_t position, float scale, float* x) {
    const int D = job.head_size;
    const float* cos = job.cos + position * job.half_rotated;
    const float* sin = job.sin + position * job.half_rotated;
    for (int d = 0; d < D; d += 16) store(x + d, load(head + d));
    if (job.norm == QkNorm::before_rope) normalize(x, D, weight, job.epsilon);
    (job.interleaved ? rotate_pairs : rotate_halves)(x, cos, sin, job.half_rotated, job.direction);
    if (job.norm == QkNorm::after_rope) normalize(x, D, weight, job.epsilon);
    if (scale != 1.0f)
        for (int d = 0; d < D; d += 16) store(x + d, load(x + d) * all(scale));
}

template <class Input>
void add_value_embedding(const RopeJob& job, int64_t row, int h, float* v) {
    const int D = job.head_size;
    float gate = widen(static_cast<const Input*>(job.gate)[row * job.gate_stride + h]);
    const Input* embed = static_cast<const Input*>(job.value_embed) + row * job.value_stride + int64_t(h) * D;
    float e = exp_negative(gate < 0 ? gate : -gate);                        // sigmoid without overflow
    Lanes strength = all(job.gate_scale * ((gate < 0 ? e : 1.0f) / (1.0f + e)));
    for (int d = 0; d < D; d += 16) store(v + d, fma(strength, load(embed + d), load(v + d)));
}

template <class Input, class Stored>
void rope_row(const RopeJob& job, int64_t row) {
    const int D = job.head_size;
    const int64_t position = job.positions[row], page = job.slots[row] / PAGE_SIZE, offset = job.slots[row] % PAGE_SIZE;
    const Input* head = static_cast<const Input*>(job.qkv) + row * job.row_stride;
    alignas(64) float x[MAX_HEAD_SIZE];
    alignas(64) Stored narrowed[MAX_HEAD_SIZE];

    float* q = job.q_out + row * job.heads * D;
    for (int h = 0; h < job.heads; h++, head += D, q += D) {
        prepare_head(job, head, job.q_norm, position, job.post_scale, x);
        for (int d = 0; d < D; d += 16) store(q + d, load(x + d) * all(job.q_scale));
    }
    Stored* block = static_cast<Stored*>(job.cache) + page * job.kv_heads * 2 * PAGE_SIZE * D;
    for (int h = 0; h < job.kv_heads; h++, head += D) {
        prepare_head(job, head, job.k_norm, position, job.post_scale, x);
        for (int d = 0; d < D; d += 16) store(narrowed + d, load(x + d));
        Stored* k = block + int64_t(2 * h) * PAGE_SIZE * D + offset;
        for (int d = 0; d < D; d++) k[d * PAGE_SIZE] = narrowed[d];
    }
    for (int h = 0; h < job.kv_heads; h++, head += D) {
        for (int d = 0; d < D; d += 16) store(x + d, load(head + d));
        if (job.value_embed) add_value_embedding<Input>(job, row, h, x);
        Stored* v = block + int64_t(2 * h + 1) * PAGE_SIZE * D + offset * D;
        for (int d = 0; d < D; d += 16) store(v + d, load(x + d));
    }
}

template <class Input, class Stored>
void rope_rows_of(const RopeJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        if (job.slots[row] >= 0) rope_row<Input, Stored>(job, row);
}

template <class Input>
void rope_rows_from(const RopeJob& job, int64_t begin, int64_t end) {
    if (job.cache_type == Element::float32) rope_rows_of<Input, float>(job, begin, end);
    if (job.cache_type == Element::float16) rope_rows_of<Input, Half>(job, begin, end);
    if (job.cache_type == Element::bfloat16) rope_rows_of<Input, Bfloat>(job, begin, end);
}

void rope_rows(const RopeJob& job, int64_t begin, int64_t end) {
    if (job.qkv_type == Element::float32) rope_rows_from<float>(job, begin, end);
    if (job.qkv_type == Element::bfloat16) rope_rows_from<Bfloat>(job, begin, end);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
