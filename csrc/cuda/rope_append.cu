// op       rope_append: everything between the qkv product and attention; one pass over each row.
// shapes   qkv (B, (Hq + 2 Hk) * D) f32 or bf16 -> q (B, Hq, D) f32, K and V into pages of 16 slots, floats or q8; D a multiple
//          of 16 up to 256, for q8 a power of two from 32. A page's strides are arguments, so [page][Hk][16][D] and slot-major caches both work.
// mapping  One warp per (row, head): its D values lie in shared memory, a lane takes every 32nd dimension or pair.
// cost     Reads 2 or 4 bytes per value; writes 4 per q value and the cache's 2 or 4 per k and v value. At decode sizes
//          the launch dominates.
// numerics f32; the sum of squares is 32 lane sums, each in order, then a butterfly; no bit depends on the other
//          rows. K and V are rounded once, to nearest even. Slots or positions out of range write nothing. For q8, q, K and V
//          are multiplied by the Hadamard matrix; of K and V, each 32 then get a scale, f16(largest / 127), and what they are
//          of it as integers. turn: the same product alone, for what attention makes of such pages.

#include "launch.h"

#include "device.h"

namespace {

using namespace dc_device;

constexpr int ROPE_WARPS = 4, MAX_HEAD_SIZE = 256, PAGE_SLOTS = 16;
enum Norm : int64_t { NO_NORM, BEFORE_ROPE, AFTER_ROPE };

struct RopeShared {
    float x[ROPE_WARPS][MAX_HEAD_SIZE];
};

struct RopeJob {                            // by value into the kernel; lengths in elements
    int64_t row_stride;
    int heads, kv_heads, head_size;
    const int64_t *positions, *slots;
    int64_t max_positions, num_slots;
    const float *cos, *sin;                 // (max_positions, half_rotated)
    int half_rotated;
    int64_t norm;
    const float *q_norm, *k_norm;           // (D) or null
    float epsilon, post_scale, q_scale;
    int64_t value_stride, gate_stride;
    float gate_scale;
    float *q_out;
    int64_t page_stride, head_stride, slot_stride;
    f16 *k_scales, *v_scales;               // of q8: as many as pages have blocks, in the same order
};

DC_DEVICE void normalize(float *x, int size, const float *weight, float epsilon, unsigned lane) {
    float squares = 0;
    for (int d = lane; d < size; d += 32) squares += x[d] * x[d];
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(size) + epsilon);
    for (int d = lane; d < size; d += 32) x[d] = weight == nullptr ? x[d] * scale : x[d] * scale * weight[d];
}

DC_DEVICE void rotate(float *x, const RopeJob &job, int64_t position, unsigned lane) {
    const float *cos = job.cos + position * job.half_rotated, *sin = job.sin + position * job.half_rotated;
    for (int i = lane; i < job.half_rotated; i += 32) {
        const float a = x[i], b = x[i + job.half_rotated];
        x[i] = a * cos[i] - b * sin[i];
        x[i + job.half_rotated] = b * cos[i] + a * sin[i];
    }
}

// A lane has one of each block's 32 values.
DC_DEVICE void store_packed(const float *x, int size, q8 *codes, f16 *scales, unsigned lane) {
    for (int block = 0; block < size / Q8_BLOCK; block++) {
        const float mine = x[block * Q8_BLOCK + lane];
        float largest = fabsf(mine);
        for (int distance = 16; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        const f16 scale = from_float<f16>(largest / 127.0f);
        const float wide = to_float(scale), inverse = wide > 0.0f ? 1.0f / wide : 0.0f;
        const float code = fminf(fmaxf(rintf(mine * inverse), -127.0f), 127.0f);
        codes[block * Q8_BLOCK + lane] = q8{static_cast<int8_t>(code)};
        if (lane == 0) scales[block] = scale;
    }
}

template <class Input, class Stored>
DC_KERNEL(ROPE_WARPS * 32) rope_append_kernel(RopeJob job, const Input *qkv, const Input *value_embed, const Input *gate,
                                              Stored *k_pages, Stored *v_pages) {
    after_previous();
    DC_SHARED(RopeShared, shared);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = blockIdx.y, slot = job.slots[row], position = job.positions[row];
    const int D = job.head_size, head = static_cast<int>(blockIdx.x * ROPE_WARPS + warp);
    const int kind = head < job.heads ? 0 : head < job.heads + job.kv_heads ? 1 : 2;         // q, k, v
    // the whole warp leaves together; blocks never meet at a barrier
    if (head >= job.heads + 2 * job.kv_heads || slot < 0 || slot >= job.num_slots) return;
    if (position < 0 || position >= job.max_positions) return;

    float *x = shared.x[warp];
    const Input *source = qkv + row * job.row_stride + static_cast<int64_t>(head) * D;
    for (int d = lane; d < D; d += 32) x[d] = to_float(source[d]);
    if (kind < 2) {
        const float *weight = kind == 0 ? job.q_norm : job.k_norm;
        if (job.norm == BEFORE_ROPE) normalize(x, D, weight, job.epsilon, lane);
        __syncwarp();                       // a lane rotates what other lanes loaded and normalized
        rotate(x, job, position, lane);
        __syncwarp();
        if (job.norm == AFTER_ROPE) normalize(x, D, weight, job.epsilon, lane);
    }
    constexpr bool packed = sizeof(Stored) == 1;
    if (kind == 0) {
        if (packed) turn(x, D, lane);
        float *q = job.q_out + (row * job.heads + head) * D;
        for (int d = lane; d < D; d += 32) q[d] = x[d] * job.post_scale * job.q_scale;
        return;
    }
    const int h = (head - job.heads) % job.kv_heads;
    const int64_t place = slot / PAGE_SLOTS * job.page_stride + h * job.head_stride + slot % PAGE_SLOTS * job.slot_stride;
    Stored *stored = (kind == 1 ? k_pages : v_pages) + place;
    float strength = 0;
    const Input *embed = nullptr;
    if (kind == 2 && value_embed != nullptr) {
        strength = job.gate_scale / (1.0f + expf(-to_float(gate[row * job.gate_stride + h])));
        embed = value_embed + row * job.value_stride + h * D;
    }
    for (int d = lane; d < D; d += 32) {
        const float y = kind == 1 ? x[d] * job.post_scale : embed == nullptr ? x[d] : x[d] + strength * to_float(embed[d]);
        if constexpr (packed) x[d] = y;
        else stored[d] = from_float<Stored>(y);
    }
    if constexpr (packed) {
        turn(x, D, lane);
        store_packed(x, D, stored, (kind == 1 ? job.k_scales : job.v_scales) + place / Q8_BLOCK, lane);
    }
}

template <class Out> DC_KERNEL(ROPE_WARPS * 32) turn_kernel(const float *x, int64_t heads, int head_size, Out *out) {
    after_previous();
    DC_SHARED(RopeShared, shared);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t head = static_cast<int64_t>(blockIdx.x) * ROPE_WARPS + warp;
    if (head >= heads) return;              // the whole warp
    float *own = shared.x[warp];
    for (int d = lane; d < head_size; d += 32) own[d] = x[head * head_size + d];
    turn(own, head_size, lane);
    for (int d = lane; d < head_size; d += 32) out[head * head_size + d] = from_float<Out>(own[d]);
}

template <class Out> const char *launch_turn(int64_t x, int64_t heads, int64_t head_size, int64_t out, int64_t stream) {
    const auto kernel = turn_kernel<Out>;
    return DC_LAUNCH(kernel, dim3(static_cast<unsigned>((heads + ROPE_WARPS - 1) / ROPE_WARPS)), ROPE_WARPS * 32,
                     as_pointer<void>(stream), as_pointer<const float>(x), heads, static_cast<int>(head_size), as_pointer<Out>(out));
}

template <class Input, class Stored>
const char *launch_rope(const RopeJob &job, int64_t rows, int64_t qkv, int64_t value_embed, int64_t gate, int64_t k_pages,
                        int64_t v_pages, int64_t stream) {
    const unsigned blocks = (job.heads + 2 * job.kv_heads + ROPE_WARPS - 1) / ROPE_WARPS;
    const auto kernel = rope_append_kernel<Input, Stored>;
    return DC_LAUNCH(kernel, dim3(blocks, static_cast<unsigned>(rows)), ROPE_WARPS * 32, as_pointer<void>(stream), job,
                     as_pointer<const Input>(qkv), as_pointer<const Input>(value_embed), as_pointer<const Input>(gate),
                     as_pointer<Stored>(k_pages), as_pointer<Stored>(v_pages));
}

template <class Input>
const char *launch_rope_into(int64_t cache_type, const RopeJob &job, int64_t rows, int64_t qkv, int64_t value_embed,
                             int64_t gate, int64_t k_pages, int64_t v_pages, int64_t stream) {
    if (cache_type == F32) return launch_rope<Input, float>(job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
    if (cache_type == F16) return launch_rope<Input, f16>(job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
    if (cache_type == Q8) return launch_rope<Input, q8>(job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
    return launch_rope<Input, bf16>(job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
}

}  // namespace

const char *dc_cuda_rope_append(int64_t qkv, int64_t qkv_type, int64_t row_stride, int64_t rows, int64_t heads,
                                int64_t kv_heads, int64_t head_size, int64_t positions, int64_t slots,
                                int64_t max_positions, int64_t num_slots, int64_t cos, int64_t sin, int64_t half_rotated,
                                int64_t norm, int64_t q_norm, int64_t k_norm,
                                double epsilon, double post_scale, double q_scale, int64_t value_embed,
                                int64_t value_stride, int64_t gate, int64_t gate_stride, double gate_scale, int64_t q_out,
                                int64_t k_pages, int64_t v_pages, int64_t k_scales, int64_t v_scales, int64_t cache_type,
                                int64_t page_stride, int64_t head_stride, int64_t slot_stride, int64_t stream) {
    if (rows == 0) return nullptr;
    RopeJob job{};
    job.row_stride = row_stride;
    job.heads = static_cast<int>(heads);
    job.kv_heads = static_cast<int>(kv_heads);
    job.head_size = static_cast<int>(head_size);
    job.positions = as_pointer<const int64_t>(positions);
    job.slots = as_pointer<const int64_t>(slots);
    job.max_positions = max_positions;
    job.num_slots = num_slots;
    job.cos = as_pointer<const float>(cos);
    job.sin = as_pointer<const float>(sin);
    job.half_rotated = static_cast<int>(half_rotated);
    job.norm = norm;
    job.q_norm = as_pointer<const float>(q_norm);
    job.k_norm = as_pointer<const float>(k_norm);
    job.epsilon = static_cast<float>(epsilon);
    job.post_scale = static_cast<float>(post_scale);
    job.q_scale = static_cast<float>(q_scale);
    job.value_stride = value_stride;
    job.gate_stride = gate_stride;
    job.gate_scale = static_cast<float>(gate_scale);
    job.q_out = as_pointer<float>(q_out);
    job.page_stride = page_stride;
    job.head_stride = head_stride;
    job.slot_stride = slot_stride;
    job.k_scales = as_pointer<f16>(k_scales);
    job.v_scales = as_pointer<f16>(v_scales);
    if (qkv_type == F32)
        return launch_rope_into<float>(cache_type, job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
    return launch_rope_into<bf16>(cache_type, job, rows, qkv, value_embed, gate, k_pages, v_pages, stream);
}

const char *dc_cuda_turn(int64_t x, int64_t heads, int64_t head_size, int64_t out, int64_t out_type, int64_t stream) {
    if (heads == 0) return nullptr;
    if (out_type == F32) return launch_turn<float>(x, heads, head_size, out, stream);
    return launch_turn<bf16>(x, heads, head_size, out, stream);
}
