// op       rope_append into pages of the type q8_0 (attention.h); for latents, what append_latents and turn_queries do for such pages
// shapes   as rope_append.inl.h; q, k and v are turned (turn.inl.h) once all else is done to them
// mapping  one item = a run of rows
// cost     that of rope_append and of turning each head of q, k and v: about 0.6 us a row at Hq 9, Hk 3, D 64
// numerics scale = the largest of 32 / 127 as float16; a code is the nearest integer to x / scale, ties to even, of at most 127 steps.
//          What is not finite makes the scale so.
#include "cpu/attention/rope_heads.inl.h"
#include "cpu/attention/turn.inl.h"
#include "cpu/tiles/dots.h"

namespace dc {
namespace DC_ISA {
namespace {

// 32 values -> their codes, whose scale is returned.
Half pack_block(const float* x, int8_t* to) {
    const Lanes a = load(x), b = load(x + 16), magic = all(MAGIC), least = all(-127.0f);
    Half scale;
    narrow(largest_magnitude(a, b) / 127.0f, &scale);
    const float wide = widen(scale);
    const Lanes inverse = all(wide == 0.0f ? 0.0f : 1.0f / wide);
    store_low_bytes(maximum(at_most(a * inverse, 127.0f), least) + magic, maximum(at_most(b * inverse, 127.0f), least) + magic, to);
    return scale;
}

void packed_rope_row(const RopeJob& job, int64_t row) {
    const int D = job.head_size;
    const int64_t position = job.positions[row], offset = place_of(job.slots[row]);
    const float* head = job.qkv + row * job.row_stride;
    uint8_t* const page = static_cast<uint8_t*>(job.cache) + page_of(job.slots[row]) * job.page_stride;
    const int64_t block = block_bytes(Element::q8_0, D);
    alignas(64) float x[MAX_HEAD_SIZE];
    alignas(64) int8_t codes[PACKED_BLOCK];
    for (int n = 0; n < job.heads; n++, head += D) {
        float* q = job.q_out + (row * job.heads + n) * D;
        prepare_head(job, head, job.q_norm, position, job.post_scale, q);
        for (int d = 0; d < D; d += 16) store(q + d, load(q + d) * all(job.q_scale));
        turn(q, D);
    }
    for (int n = 0; n < job.kv_heads; n++, head += D) {
        uint8_t* const k = page + 2 * n * block;
        Half* const scales = reinterpret_cast<Half*>(k + PAGE_SIZE * D);
        prepare_head(job, head, job.k_norm, position, job.post_scale, x);
        turn(x, D);
        for (int d = 0; d < D; d += PACKED_BLOCK) {
            scales[d / PACKED_BLOCK * PAGE_SIZE + offset] = pack_block(x + d, codes);
            for (int i = 0; i < PACKED_BLOCK; i += 4) {
                uint32_t word;
                std::memcpy(&word, codes + i, 4);
                word ^= 0x80808080u;
                std::memcpy(k + (d + i) * PAGE_SIZE + offset * 4, &word, 4);
            }
        }
    }
    head = job.qkv + row * job.row_stride + int64_t(job.heads + (job.values_from_keys ? 0 : job.kv_heads)) * D;
    for (int n = 0; n < job.kv_heads; n++, head += D) {
        uint8_t* const v = page + (2 * n + 1) * block;
        Half* const scales = reinterpret_cast<Half*>(v + PAGE_SIZE * D);
        for (int d = 0; d < D; d += 16) store(x + d, load(head + d));
        if (job.value_norm) normalize(x, D, nullptr, job.epsilon);
        if (job.value_embed) add_value_embedding(job, row, n, x);
        turn(x, D);
        for (int d = 0; d < D; d += PACKED_BLOCK) {
            scales[d / PACKED_BLOCK * PAGE_SIZE + offset] = pack_block(x + d, codes);
            std::memcpy(v + offset * D + d, codes, PACKED_BLOCK);
        }
    }
}

void packed_rope_rows(const RopeJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        if (job.slots[row] >= 0) packed_rope_row(job, row);
}

void turn_latent(float* x, int head_size, int values) {
    turn(x, values);
    turn(x + values, head_size - values);
}

void pack_latent(float* key, int head_size, int values, uint8_t* page, int64_t offset) {
    Half* const scales = reinterpret_cast<Half*>(page + PAGE_SIZE * head_size);
    alignas(64) int8_t codes[PACKED_BLOCK];
    turn_latent(key, head_size, values);
    for (int d = 0; d < head_size; d += PACKED_BLOCK) {
        scales[d / PACKED_BLOCK * PAGE_SIZE + offset] = pack_block(key + d, codes);
        std::memcpy(page + offset * head_size + d, codes, PACKED_BLOCK);
    }
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
