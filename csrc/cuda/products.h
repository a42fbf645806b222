// What the products of few rows share: a block of threads makes OUTPUTS outputs of each.
//
// Thread t of 128 takes columns 8 t .. 8 t + 7 of each 1,024, so that what it loads of x serves 4 rows of W. A sum is 128
// sums, each fused multiply-adds in the order of the columns, then a butterfly in each warp, then the warps in order: a row's
// bits do not depend on the other rows.
#pragma once

#include "blocks.h"
#include "device.h"

namespace dc_device {

constexpr int PRODUCT_WARPS = 4, OUTPUTS = 4;

enum Activation : int64_t { NO_ACTIVATION, SWIGLU, GEGLU, CLAMPED_SWIGLU, RELU2 };

// `up` is read with a gate alone.
DC_DEVICE float activated(int64_t activation, float g, float up) {
    if (activation == NO_ACTIVATION) return g;
    if (activation == RELU2) return g > 0.0f ? g * g : g != g ? g : 0.0f;
    if (activation == SWIGLU) return g / (1.0f + expf(-g)) * up;
    if (activation == GEGLU) return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g))) * up;
    g = g > 7.0f ? 7.0f : g;
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return g / (1.0f + expf(-1.702f * g)) * (up + 1.0f);
}

struct ProductJob {
    const void *x;
    int64_t x_type, x_stride, rows;
    bool norm;                              // divide x by its root mean square over `width` columns, times `norm_weight`, or null
    int64_t width;
    const float *norm_weight;
    float epsilon;
    const uint8_t *blocks;
    int64_t outputs, columns;
    const float *bias;                      // of each row of W, or null
    int64_t activation;
    int made;                               // outputs of a block; with a gate, half of its rows of W
    const float *residual;                  // or null
    int64_t residual_stride;
    void *out;
    int64_t out_type, out_stride;
};

// An output of a row, from its sums: of W's row, of the up's row if it has a gate, of the squares of x.
DC_DEVICE void write_product(const ProductJob &job, int64_t row, int64_t output, float y, float up, float squared) {
    const bool gated = job.activation >= SWIGLU && job.activation <= CLAMPED_SWIGLU;
    if (job.norm) {
        const float scale = 1.0f / sqrtf(squared / static_cast<float>(job.width) + job.epsilon);
        y *= scale;
        up *= scale;
    }
    if (job.bias != nullptr) {
        y += job.bias[output];
        if (gated) up += job.bias[job.outputs + output];
    }
    y = activated(job.activation, y, up);
    if (job.residual != nullptr) y = job.residual[row * job.residual_stride + output] + y;
    const int64_t at = row * job.out_stride + output;
    if (job.out_type == F32) static_cast<float *>(job.out)[at] = y;
    else static_cast<bf16 *>(job.out)[at] = from_float<bf16>(y);
}

template <int ROWS> struct ProductShared {         // or of fewer rows
    float sums[PRODUCT_WARPS][OUTPUTS * ROWS];
};

template <class B> DC_DEVICE const uint8_t *row_of(const uint8_t *blocks, int64_t row, int64_t columns) {
    return blocks + row * (columns / B::COLUMNS * B::BYTES);
}

template <class B> DC_DEVICE void unpack(const uint8_t *row, int64_t piece, float *w) {
    constexpr int PIECES = B::COLUMNS / 8;
    B::unpack(row + piece / PIECES * B::BYTES, static_cast<int>(piece % PIECES), w);
}

// Eight values at a multiple of 16 bytes.
DC_DEVICE void load_eight(const float *from, float (&to)[8]) {
    DC_UNROLL
    for (int half = 0; half < 2; half++) {
        const Bytes16 four = *reinterpret_cast<const Bytes16 *>(from + 4 * half);
        DC_UNROLL
        for (int i = 0; i < 4; i++) {
            union { uint32_t bits; float value; } one;
            one.bits = four.words[i];
            to[4 * half + i] = one.value;
        }
    }
}

DC_DEVICE void load_eight(const bf16 *from, float (&to)[8]) {
    union { Bytes16 bytes; bf16 values[8]; } eight;
    eight.bytes = *reinterpret_cast<const Bytes16 *>(from);
    DC_UNROLL
    for (int i = 0; i < 8; i++) to[i] = to_float(eight.values[i]);
}

// sums[r][b]: this thread's part of W's row w_row(r) times the row of x of which load_x(b, piece, x) gives columns 8 * piece
// on; a null row of W is not there.
template <class B, int ROWS, class LoadX, class WRow>
DC_DEVICE void add_products(LoadX load_x, WRow w_row, int64_t columns, float (&sums)[OUTPUTS][ROWS]) {
    for (int64_t piece = threadIdx.x; piece < columns / 8; piece += PRODUCT_WARPS * 32) {
        float x[ROWS][8];
        DC_UNROLL
        for (int b = 0; b < ROWS; b++) load_x(b, piece, x[b]);
        DC_UNROLL
        for (int r = 0; r < OUTPUTS; r++) {
            const uint8_t *row = w_row(r);
            if (row == nullptr) continue;
            float w[8];
            unpack<B>(row, piece, w);
            DC_UNROLL
            for (int b = 0; b < ROWS; b++) {
                DC_UNROLL
                for (int i = 0; i < 8; i++) sums[r][b] = fmaf(w[i], x[b][i], sums[r][b]);
            }
        }
    }
}

// The block's sums: shared.sums[0][b * OUTPUTS + r], for every thread.
template <int ROWS, class Shared> DC_DEVICE void join_products(const float (&sums)[OUTPUTS][ROWS], Shared &shared) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    DC_UNROLL
    for (int r = 0; r < OUTPUTS; r++) {
        DC_UNROLL
        for (int b = 0; b < ROWS; b++) {
            const float sum = warp_sum(sums[r][b]);
            if (lane == 0) shared.sums[warp][b * OUTPUTS + r] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < OUTPUTS * ROWS) {
        float sum = shared.sums[0][threadIdx.x];
        DC_UNROLL
        for (int w = 1; w < PRODUCT_WARPS; w++) sum += shared.sums[w][threadIdx.x];
        shared.sums[0][threadIdx.x] = sum;
    }
    __syncthreads();
}

}  // namespace dc_device
