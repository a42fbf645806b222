// What all kernels of products share: how they prefetch weights, and what is done to a row's sums (bias, activation, residual).
#pragma once

#include <utility>

#include "cpu/lanes.h"
#include "cpu/tiles/formats.h"
#include "cpu/tiles/tiles.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int PAIR = 2;                             // tiles at once: a gate and its up, or two of floats, where a single tile would wait for its sums
constexpr int64_t GROUPS_BYTES = 256 << 10;         // of panels that pass by one tile: a quarter of the L2 cache
constexpr int64_t AHEAD = 8 << 10;                  // bytes from what is read to what is prefetched; 4 KB cost 10 %, 16 KB nothing

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DC_INLINE int64_t bytes_of_float(Weight type) { return type == Weight::f32 ? 4 : 2; }

// Calls each(integral_constant 0), .. each(integral_constant COUNT - 1).
template <class Each, int... N>
DC_INLINE void each_in(std::integer_sequence<int, N...>, Each each) { (each(std::integral_constant<int, N>()), ...); }
template <int COUNT, class Each>
DC_INLINE void each_of(Each each) { each_in(std::make_integer_sequence<int, COUNT>(), each); }

// Rows of x that fit in the registers with one q tile, and with two float tiles.
#if defined(__AVX512F__)
constexpr int Q_ROWS = 8, FLOAT_ROWS = 8;
#elif defined(DC_PAIRS)
constexpr int Q_ROWS = 8, FLOAT_ROWS = 3;           // q: of half a tile
#elif defined(__AVX2__) || defined(DC_NEON)
constexpr int Q_ROWS = 4, FLOAT_ROWS = 3;
#else
constexpr int Q_ROWS = 2, FLOAT_ROWS = 4;           // q: with 4 the compiler takes more than a minute
#endif

// How many of so many rows of x (at most Q_ROWS) the next q kernel takes.
#if defined(DC_PAIRS)
constexpr int rows_at_once(int rows) { return rows < Q_ROWS && rows > SET_ROWS ? SET_ROWS : rows; }     // kernels of 5 to 7 would take the compiler long
#else
constexpr int rows_at_once(int rows) { return rows; }
#endif

#if defined(DC_PAIRS)
// Two rows of x at a time and half of the tile, so that the sums of 8 rows stay in registers. Where their number is odd, the last row is paired
// with itself.
template <int R>
constexpr int second_of(int r) { return r + 1 < R ? r + 1 : r; }
#endif

// `count` values, and 0 in the other lanes. 16 or more are a plain load.
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

// In the panel's next block, what p is in this one.
template <class T>
DC_INLINE const T* next_block(const T* p) { return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(p) + sizeof(PanelBlock)); }

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

// Prefetches the memory that some rows' outputs of two tiles are written to, and the residual that is added to them.
DC_INLINE void fetch_outputs(const Product& job, int64_t tile, int64_t row, int rows) {
    const int64_t column = (is_gate(job.activation) ? tile / 2 : tile) * TILE_ROWS;
    if (column >= job.out_columns) return;
    for (int r = 0; r < rows; r++) {
        const float* const to = job.out + (row + r) * job.out_stride + column;
        __builtin_prefetch(to, 1, 2), __builtin_prefetch(to + 16, 1, 2);
        if (!job.residual) continue;
        const float* const from = job.residual + (row + r) * job.residual_stride + column;
        __builtin_prefetch(from, 0, 2), __builtin_prefetch(from + 16, 0, 2);
    }
}

DC_INLINE Lanes activated(Activation activation, Lanes y) {
    switch (activation) {
#define ACTIVATION(name, ...) case Activation::name: return __VA_ARGS__;
#include "activations.def"
        default: return y;
    }
}

DC_INLINE Lanes gated(Activation activation, Lanes gate, Lanes up) {
    switch (activation) {
#define GATED(name, ...) case Activation::name: return __VA_ARGS__;
#include "activations.def"
        default: return up;
    }
}

void finish_row(const Product& job, int64_t tile, int tiles, int64_t row, int r, const Sums& in) {
    for (int t = 0; t < tiles; t++) {
        const Lanes y = biased(job, tile + t, in.y[t][r]);
        write(job, row, (tile + t) * TILE_ROWS, activated(job.activation, y));
    }
}

void finish_gated_row(const Product& job, int64_t tile, int, int64_t row, int r, const Sums& in) {
    const Lanes gate = biased(job, tile, in.y[0][r]), up = biased(job, tile + 1, in.y[1][r]);
    write(job, row, tile / 2 * TILE_ROWS, gated(job.activation, gate, up));
}

// ---- what adapters add to the sums

// Even and odd ranks have a sum each: in one sum of all, each product would wait for the one before.
template <int ROWS, class T>
DC_INLINE void grow_rows(const AdapterTile& tile, const T* ranks, const float* u, int64_t u_stride, float (*y)[16]) {
    Lanes even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; r++) even[r] = odd[r] = all(0.0f);
    for (int32_t j = 0; j < tile.count; j += 2, ranks += 32) {
        Lanes first, second;
        load_pair(ranks, first, second);
        for (int r = 0; r < ROWS; r++) {
            even[r] = fma(all(u[r * u_stride + j]), first, even[r]);
            odd[r] = fma(all(u[r * u_stride + j + 1]), second, odd[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) store(y[r], load(y[r]) + (even[r] + odd[r]));
}

template <class T>
void grow(const AdapterTile& tile, const void* b, const float* u, int64_t u_stride, int rows, float (*y)[16]) {
    const T* const ranks = static_cast<const T*>(b) + tile.offset;
    u += tile.first;
    if constexpr (REGISTERS >= 32)
        if (rows == GROUP_ROWS) return grow_rows<GROUP_ROWS>(tile, ranks, u, u_stride, y);
    for (; rows >= 4; rows -= 4, u += 4 * u_stride, y += 4) grow_rows<4>(tile, ranks, u, u_stride, y);
    if (rows >= 2) grow_rows<2>(tile, ranks, u, u_stride, y), rows -= 2, u += 2 * u_stride, y += 2;
    if (rows) grow_rows<1>(tile, ranks, u, u_stride, y);
}

DC_INLINE void fetch(const void* p, int64_t begin, int64_t end) {
    fetch_once(static_cast<const uint8_t*>(p) + begin, end - begin);
}

// Prefetches what an adapter's rows need after `tiles` tiles from `tile` on: B's part for the tiles that follow and, spread over the calls, the
// whole A of the next product.
DC_INLINE void fetch_next(const Product& job, const AdapterMatrix* own, int64_t tile, int tiles) {
    const AdapterMatrix& matrix = own[job.adapted.number];
    const int64_t first = tile + tiles, last = least(first + tiles, matrix.tile_count) - 1;
    if (first <= last) {
        const int64_t size = bytes_of_float(matrix.type);
        fetch(matrix.b, matrix.tiles[first].offset * size, (matrix.tiles[last].offset + matrix.tiles[last].count * TILE_ROWS) * size);
    }
    if (job.adapted.next < 0) return;
    const AdapterMatrix& next = own[job.adapted.next];
    const int64_t lines = next.ranks * next.columns * bytes_of_float(next.type) / 64;
    fetch(next.a, lines * tile / matrix.tile_count * 64, lines * first / matrix.tile_count * 64);
}

// Adds adapters to the sums of rows [row, row + rows) of the job. Neighbouring rows with the same adapter go together.
void add_adapters(const Product& job, int64_t tile, int tiles, int64_t row, int rows, Sums& sums) {
    const AdaptedRows& its = job.adapted;
    for (int r = 0, n; r < rows; r += n) {
        const AdapterMatrix* const own = its.adapters[row + r];
        for (n = 1; r + n < rows && its.adapters[row + r + n] == own;) n++;
        if (!own || !own[its.number].ranks) continue;
        const AdapterMatrix& matrix = own[its.number];
        const float* const u = its.u + (row + r) * its.u_stride;
        for (int t = 0; t < tiles; t++) {
            const AdapterTile& place = matrix.tiles[tile + t];
            float (*y)[16] = sums.y[t] + r;
            if (place.count == 0) continue;
            if (matrix.type == Weight::f32) grow<float>(place, matrix.b, u, its.u_stride, n, y);
            else if (matrix.type == Weight::f16) grow<Half>(place, matrix.b, u, its.u_stride, n, y);
            else grow<Bfloat>(place, matrix.b, u, its.u_stride, n, y);
        }
        fetch_next(job, own, tile, tiles);
    }
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
