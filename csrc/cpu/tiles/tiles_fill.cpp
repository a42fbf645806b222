// op       fill_tiles, embed_row: rows of floats or GGUF blocks -> tiles (cpu/tiles/tiles.h has the layouts), and back to f32
// mapping  one item = a run of tiles; a tile is a transposition of 16 rows, a word (q types) or a value (floats) at a time
// cost     source read and tiles written once; quantizing adds some 2 ns a value
// numerics a block becomes d, m (f16, nearest) and integers as in ggml's reference, operation for operation, so equal to
//          gguf.quants.quantize; a value that is not finite gives some integer. Floats are rounded to nearest, ties to even
#include "cpu/tiles/tiles.h"

#include <algorithm>

#include "cpu/pool/pool.h"
#define DC_ISA portable
#include "cpu/lanes.h"

namespace dc {
namespace {

using portable::Bfloat;
using portable::Half;
using portable::narrow;
using portable::widen;

template <class T>
T read(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

float half_at(const uint8_t* p) { return widen(read<Half>(p)); }

// One block of 32 weights as GGUF has it.
struct GgufBlock {
    uint16_t d, m;
    uint8_t quants[32];                     // q8_0: 32 signed bytes; q4: 16 bytes, low nibbles first half
};

uint8_t clipped(float x, float high) { return x > 0 ? uint8_t(x < high ? x : high) : 0; }

uint16_t half_bits(float x) {
    Half half;
    narrow(x, &half);
    return half.bits;
}

void pack_nibbles(const uint8_t (&values)[32], GgufBlock& block) {
    for (int i = 0; i < 16; i++) block.quants[i] = uint8_t(values[i] | values[i + 16] << 4);
}

void quantize_q8_0(const float* x, GgufBlock& block) {
    float amax = 0;
    for (int i = 0; i < 32; i++) amax = std::max(amax, __builtin_fabsf(x[i]));
    const float d = amax / 127, inverse = d == 0 ? 0 : 1 / d;
    for (int i = 0; i < 32; i++) {          // nearest, halves away from zero
        const float scaled = __builtin_fabsf(x[i] * inverse);
        const int whole = scaled < 127 ? int(scaled) : 127;
        const int rounded = whole + (scaled - float(whole) >= 0.5f && whole < 127);
        block.quants[i] = uint8_t(x[i] < 0 ? -rounded : rounded);
    }
    block.d = half_bits(d);
}

void quantize_q4_0(const float* x, GgufBlock& block) {
    float largest = 0;
    for (int i = 0; i < 32; i++)
        if (__builtin_fabsf(x[i]) > __builtin_fabsf(largest)) largest = x[i];
    const float d = largest / -8, inverse = d == 0 ? 0 : 1 / d;
    uint8_t values[32];
    for (int i = 0; i < 32; i++) values[i] = clipped(x[i] * inverse + 8.5f, 15);
    pack_nibbles(values, block);
    block.d = half_bits(d);
}

void quantize_q4_1(const float* x, GgufBlock& block) {
    float low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float d = (high - low) / 15, inverse = d == 0 ? 0 : 1 / d;
    uint8_t values[32];
    for (int i = 0; i < 32; i++) values[i] = clipped((x[i] - low) * inverse + 0.5f, 15);
    pack_nibbles(values, block);
    block.d = half_bits(d), block.m = half_bits(low);
}

// ---- sources: a row's values or blocks, whatever they lie in

float value_at(const uint8_t* row, Weight type, int64_t column) {
    if (type == Weight::f32) return read<float>(row + 4 * column);
    return type == Weight::f16 ? half_at(row + 2 * column) : widen(read<Bfloat>(row + 2 * column));
}

GgufBlock block_at(const uint8_t* row, Weight source_type, int64_t b, Weight type) {
    GgufBlock block{};
    if (!is_float(source_type)) {
        const int scales = type == Weight::q4_1 ? 4 : 2, quants = type == Weight::q8_0 ? 32 : 16;
        const uint8_t* from = row + b * (scales + quants);
        std::memcpy(&block.d, from, 2);
        if (scales == 4) std::memcpy(&block.m, from + 2, 2);
        std::memcpy(block.quants, from + scales, size_t(quants));
        return block;
    }
    float x[32];
    for (int i = 0; i < 32; i++) x[i] = value_at(row, source_type, b * BLOCK + i);
    (type == Weight::q8_0 ? quantize_q8_0 : type == Weight::q4_0 ? quantize_q4_0 : quantize_q4_1)(x, block);
    return block;
}

// ---- tiles: where block b of a tile lies

struct Place { uint8_t *scales, *quants; };

Place place_of(Weight type, uint8_t* tile, int64_t b) {
    if (type == Weight::q8_0) return {tile + b / 2 * 1088 + b % 2 * 32, tile + b / 2 * 1088 + 64 + b % 2 * 512};
    const int64_t scales = type == Weight::q4_1 ? 64 : 32;
    return {tile + b * (scales + 256), tile + b * (scales + 256) + scales};
}

void put_block(Weight type, Place to, int r, const GgufBlock& block) {
    std::memcpy(to.scales + 2 * r, &block.d, 2);
    if (type == Weight::q4_1) std::memcpy(to.scales + 32 + 2 * r, &block.m, 2);
    const uint32_t offset = type == Weight::q8_0 ? 0x80808080 : 0;
    for (int c = 0; c < (type == Weight::q8_0 ? 8 : 4); c++) {
        const uint32_t word = read<uint32_t>(block.quants + 4 * c) ^ offset;
        std::memcpy(to.quants + 64 * c + 4 * r, &word, 4);
    }
}

void fill_q_tile(const Tiles& to, uint8_t* tile, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    const int64_t blocks = to.columns / BLOCK, padded = to.type == Weight::q8_0 ? (blocks + 1) / 2 * 2 : blocks;
    const GgufBlock zero{};
    for (int64_t b = 0; b < padded; b++)
        for (int r = 0; r < TILE_ROWS; r++) {
            const bool real = r < rows && b < blocks;
            put_block(to.type, place_of(to.type, tile, b), r,
                      real ? block_at(source + r * row_stride, source_type, b, to.type) : zero);
        }
}

template <class W>
void fill_float_tile(const Tiles& to, uint8_t* tile, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    constexpr int64_t AT_ONCE = 64;         // columns: what is written stays in the L1 cache until its lines are full
    W* out = reinterpret_cast<W*>(tile);
    for (int64_t begin = 0; begin < to.columns; begin += AT_ONCE)
        for (int r = 0; r < TILE_ROWS; r++)
            for (int64_t k = begin; k < std::min(begin + AT_ONCE, to.columns); k++)
                narrow(r < rows ? value_at(source + r * row_stride, source_type, k) : 0.0f, out + k * TILE_ROWS + r);
}

void fill_tile(const Tiles& to, uint8_t* tile, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    switch (to.type) {
        case Weight::f32: return fill_float_tile<float>(to, tile, source, source_type, row_stride, rows);
        case Weight::f16: return fill_float_tile<Half>(to, tile, source, source_type, row_stride, rows);
        case Weight::bf16: return fill_float_tile<Bfloat>(to, tile, source, source_type, row_stride, rows);
        default: return fill_q_tile(to, tile, source, source_type, row_stride, rows);
    }
}

template <class W>
void read_float_row(const uint8_t* tile, int64_t columns, int64_t r, float* out) {
    for (int64_t k = 0; k < columns; k++) out[k] = widen(reinterpret_cast<const W*>(tile)[k * TILE_ROWS + r]);
}

void read_q_block(Weight type, Place from, int64_t r, float* out) {
    const float d = half_at(from.scales + 2 * r), m = type == Weight::q4_1 ? half_at(from.scales + 32 + 2 * r) : 0;
    const int middle = type == Weight::q4_0 ? 8 : 0;
    for (int k = 0; k < BLOCK; k++) {
        if (type == Weight::q8_0) {
            out[k] = d * float(int(from.quants[k / 4 * 64 + 4 * r + k % 4]) - 128);
            continue;
        }
        const int both = from.quants[k % 16 / 4 * 64 + 4 * r + k % 4];
        const float scaled = d * float((k < 16 ? both & 15 : both >> 4) - middle);
        out[k] = type == Weight::q4_1 ? scaled + m : scaled;
    }
}

}  // namespace

void fill_tiles(const Tiles& to, const uint8_t* source, Weight source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                int64_t tile_step) {
    const int64_t bytes = tile_bytes(to.type, to.columns), tiles = tile_count(rows);
    const int64_t at_once = std::max<int64_t>(1, (256 << 10) / bytes);
    parallel_for((tiles + at_once - 1) / at_once, [&](int64_t item) {
        for (int64_t i = item * at_once; i < std::min((item + 1) * at_once, tiles); i++)
            fill_tile(to, to.memory + (first_tile + i * tile_step) * bytes, source + i * TILE_ROWS * row_stride, source_type, row_stride,
                      int(std::min<int64_t>(TILE_ROWS, rows - i * TILE_ROWS)));
    });
}

void embed_row(const Tiles& tiles, int64_t row, float* out) {
    uint8_t* tile = tiles.memory + row / TILE_ROWS * tile_bytes(tiles.type, tiles.columns);
    const int64_t r = row % TILE_ROWS;
    switch (tiles.type) {
        case Weight::f32: return read_float_row<float>(tile, tiles.columns, r, out);
        case Weight::f16: return read_float_row<Half>(tile, tiles.columns, r, out);
        case Weight::bf16: return read_float_row<Bfloat>(tile, tiles.columns, r, out);
        default:
            for (int64_t b = 0; b < tiles.columns / BLOCK; b++)
                read_q_block(tiles.type, place_of(tiles.type, tile, b), r, out + b * BLOCK);
    }
}

}  // namespace dc
