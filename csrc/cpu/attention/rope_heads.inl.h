// What rope_append does to one head, whatever the type of the cache.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/lanes.h"

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

void rotate_halves(float* x, const float* cos, const float* sin, int half) {
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        Lanes a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, fma(a, c, all(-1.0f) * (b * s)));
        store(x + half + i, fma(b, c, a * s));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i], s = sin[i];
        x[i] = fma1(a, cos[i], -(b * s));
        x[half + i] = fma1(b, cos[i], a * s);
    }
}

// One head of q or k: widen, norm, rotate, norm, scale -> x [D]
void prepare_head(const RopeJob& job, const float* head, const float* weight, int64_t position, float scale, float* x) {
    const int D = job.head_size;
    const float* cos = job.cos + position * job.half_rotated;
    const float* sin = job.sin + position * job.half_rotated;
    for (int d = 0; d < D; d += 16) store(x + d, load(head + d));
    if (job.norm == QkNorm::before_rope) normalize(x, D, weight, job.epsilon);
    rotate_halves(x, cos, sin, job.half_rotated);
    if (job.norm == QkNorm::after_rope) normalize(x, D, weight, job.epsilon);
    if (scale != 1.0f)
        for (int d = 0; d < D; d += 16) store(x + d, load(x + d) * all(scale));
}

void add_value_embedding(const RopeJob& job, int64_t row, int h, float* v) {
    const int D = job.head_size;
    float gate = job.gate[row * job.gate_stride + h];
    const float* embed = job.value_embed + row * job.value_stride + int64_t(h) * D;
    float e = exp_negative(gate < 0 ? gate : -gate);                        // sigmoid without overflow
    Lanes strength = all(job.gate_scale * ((gate < 0 ? e : 1.0f) / (1.0f + e)));
    for (int d = 0; d < D; d += 16) store(v + d, fma(strength, load(embed + d), load(v + d)));
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
