// What every kernel of products shares: how weights stream by, and what becomes of a row's sums (bias, activation, residual).
#pragma once

#include "cpu/lanes.h"
#include "cpu/tiles/formats.h"
#include "cpu/tiles/tiles.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int PAIR = 2;                             // tiles at once: gate and up, or floats, of which one tile would wait for its sums
constexpr int64_t GROUPS_BYTES = 256 << 10;         // of panels that pass by one tile: a quarter of the L2 cache
constexpr int64_t AHEAD = 8 << 10;                  // bytes from what is read to what is prefetched; 4 KB cost 10 %, 16 KB nothing

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` values, the other lanes 0; 16 or more: a plain load.
template <class T>
DC_INLINE Lanes load_some(const T* p, int64_t count) {
    if (count >= 16) return load(p);
    float x[16] = {};
    for (int64_t i = 0; i < count; i++) x[i] = widen(p[i]);
    return load(x);
}

DC_INLINE void store_some(float* p, Lanes a, int64_t count) {
    if (count >= 16) return store(p, a);
    float x[16];
    store(x, a);
    for (int64_t i = 0; i < count; i++) p[i] = x[i];
}

// Each line once, block after block.
template <class F>
DC_INLINE void prefetch_block(const uint8_t* group, int64_t i, int64_t ahead) {
    constexpr int64_t STEP = group_of_blocks_bytes<F>() / F::BLOCKS;
    fetch_once(group + i * STEP + ahead, STEP);
}

// ---- from sums to outputs

struct Sums { float y[PAIR][GROUP_ROWS][16]; };

DC_INLINE Lanes biased(const Product& job, int64_t tile, const float* y) {
    const int64_t first = tile * TILE_ROWS;
    return job.bias ? load(y) + load_some(job.bias + first, job.tiles.rows - first) : load(y);
}

DC_INLINE void write(const Product& job, int64_t row, int64_t column, Lanes y) {
    const int64_t count = job.out_columns - column;
    if (count <= 0) return;
    if (job.residual) y = load_some(job.residual + row * job.residual_stride + column, count) + y;
    store_some(job.out + row * job.out_stride + column, y, count);
}

void finish_row(const Product& job, int64_t tile, int tiles, int64_t row, int r, const Sums& in) {
    for (int t = 0; t < tiles; t++) {
        Lanes y = biased(job, tile + t, in.y[t][r]);
        if (job.activation == Activation::relu2) y = maximum(y, all(0.0f)), y = y * y;
        write(job, row, (tile + t) * TILE_ROWS, y);
    }
}

void finish_gated_row(const Product& job, int64_t tile, int, int64_t row, int r, const Sums& in) {
    const Lanes gate = biased(job, tile, in.y[0][r]), up = biased(job, tile + 1, in.y[1][r]);
    if (job.activation == Activation::clamped_swiglu) return write(job, row, tile / 2 * TILE_ROWS, clamped_swiglu(gate, up));
    write(job, row, tile / 2 * TILE_ROWS, (job.activation == Activation::geglu ? gelu_tanh(gate) : silu(gate)) * up);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
