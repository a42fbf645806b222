// op       fill_tiles, embed_row: rows of floats or GGUF blocks -> tiles (cpu/tiles/tiles.h has the layouts), and back to f32
// mapping  one item = a run of tiles; a tile is filled a GGUF block or a value (floats) of one row at a time
// cost     source read and tiles written once; what quantizing adds says quantize.cpp
// numerics a GGUF block's scales and codes are kept as they are; floats are rounded to nearest, ties to even, or become GGUF blocks
//          first (quantize.cpp)
#include "cpu/tiles/tiles.h"

#include <algorithm>

#include "cpu/pool/pool.h"
#define DC_ISA portable
#include "cpu/tiles/formats.h"

namespace dc {
namespace {

using namespace portable;

template <class T>
T read(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class S>
float value_at(const uint8_t* row, int64_t column) { return widen(read<S>(row + column * int64_t(sizeof(S)))); }

// visit(S()) of a float type's element S.
template <class Visit>
void with_element(Weight type, Visit visit) {
    if (type == Weight::f32) return visit(float());
    return type == Weight::f16 ? visit(Half()) : visit(Bfloat());
}

// Block j of a row of floats as a GGUF block of F's type, into `made`.
template <class F>
void make_block(const uint8_t* row, Weight source_type, int64_t j, Weight type, uint8_t* made) {
    float x[F::FILE_COLUMNS];
    with_element(source_type, [&](auto element) {
        for (int64_t k = 0; k < F::FILE_COLUMNS; k++) x[k] = value_at<decltype(element)>(row, j * F::FILE_COLUMNS + k);
    });
    quantize_block(type, x, made);
}

template <class F>
void fill_q_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    constexpr int64_t EACH = F::FILE_COLUMNS / BLOCK;           // blocks of 32 columns in one of the file's
    const int64_t blocks = columns / BLOCK, padded = (blocks + F::BLOCKS - 1) / F::BLOCKS * F::BLOCKS;
    uint8_t nothing[F::FILE_BYTES] = {}, made[F::FILE_BYTES], codes[F::FILE_COLUMNS];
    for (int64_t b = 0; b < padded; b += EACH)
        for (int r = 0; r < TILE_ROWS; r++) {
            const bool real = r < rows && b < blocks, floats = real && is_float(source_type);
            const uint8_t *row = source + r * row_stride, *block = floats ? made : real ? row + b / EACH * F::FILE_BYTES : nothing;
            if (floats) make_block<F>(row, source_type, b / EACH, to.type, made);
            uint8_t* group = to.memory + b / F::BLOCKS * group_of_blocks_bytes<F>();
            F::codes(block, codes);
            F::put_scales(block, group, int(b % F::BLOCKS), r);
            for (int64_t i = 0; i < EACH; i++) F::put(codes + i * BLOCK, group + F::SCALE_BYTES + (b % F::BLOCKS + i) * F::BYTES, r);
        }
}

#if defined(__SSE2__)
// 8 columns of 8 rows, 16 bits each -> 8 rows' side of 8 lines of TILE_ROWS.
void turn_8_by_8(const uint8_t* source, int64_t row_stride, uint16_t* out) {
    __m128i a[8], b[8];
    for (int r = 0; r < 8; r++) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + r * row_stride));
    for (int i = 0; i < 4; i++) b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int i = 0; i < 4; i++) a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]), a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    for (int i = 0; i < 4; i++) b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int k = 0; k < 8; k++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k * TILE_ROWS), b[k]);
}
#endif

// Columns that need no conversion, as far as vectors of 16 bits take them; returns how many.
int64_t turn_columns(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    int64_t k = 0;
#if defined(__SSE2__)
    if (to.type == source_type && to.type != Weight::f32 && rows == TILE_ROWS)
        for (; k + 8 <= columns; k += 8)
            for (int r = 0; r < TILE_ROWS; r += 8)
                turn_8_by_8(source + r * row_stride + 2 * k, row_stride, reinterpret_cast<uint16_t*>(to.memory) + k * TILE_ROWS + r);
#endif
    return k;
}

template <class W>
void fill_float_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    constexpr int64_t AT_ONCE = 64;         // columns: what is written stays in the L1 cache until its lines are full
    W* out = reinterpret_cast<W*>(to.memory);
    with_element(source_type, [&](auto element) {
        for (int64_t begin = turn_columns(to, columns, source, source_type, row_stride, rows); begin < columns; begin += AT_ONCE)
            for (int r = 0; r < TILE_ROWS; r++) {
                const int64_t count = std::min(AT_ONCE, columns - begin);
                W line[AT_ONCE] = {};
                for (int64_t k = 0; r < rows && k < count; k++)
                    narrow(value_at<decltype(element)>(source + r * row_stride, begin + k), line + k);
                for (int64_t k = 0; k < count; k++) out[(begin + k) * TILE_ROWS + r] = line[k];
            }
    });
}

void fill_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    if (is_float(to.type))
        return with_element(to.type, [&](auto element) {
            fill_float_tile<decltype(element)>(to, columns, source, source_type, row_stride, rows);
        });
    with_format(to.type, [&](auto format) { fill_q_tile<decltype(format)>(to, columns, source, source_type, row_stride, rows); });
}

template <class W>
void read_float_row(const uint8_t* tile, int64_t columns, int64_t r, float* out) {
    for (int64_t k = 0; k < columns; k++) out[k] = widen(reinterpret_cast<const W*>(tile)[k * TILE_ROWS + r]);
}

template <class F>
void read_q_row(const uint8_t* tile, int64_t columns, int64_t r, float* out) {
    float scale[F::PARTS][16], minimum[16];
    for (int64_t b = 0; b < columns / BLOCK; b++, out += BLOCK) {
        const uint8_t* group = tile + b / F::BLOCKS * group_of_blocks_bytes<F>();
        const int i = int(b % F::BLOCKS);
        for (int p = 0; p < F::PARTS; p++) store(scale[p], F::scale(group, i, p));
        store(minimum, F::minimum(group, i));
        for (int k = 0; k < BLOCK; k++) {
            const float scaled = scale[k * F::PARTS / BLOCK][r] * F::value(F::code(quants_of<F>(group, i), int(r), k));
            out[k] = F::HAS_MINIMUM ? scaled + minimum[r] : scaled;
        }
    }
}

}  // namespace

void fill_tiles(const Tiles& to, const uint8_t* source, Weight source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                int64_t tile_step) {
    const int64_t bytes = tile_bytes(to.type, to.columns), tiles = tile_count(rows);
    const int64_t at_once = std::max<int64_t>(1, (256 << 10) / bytes);
    parallel_for((tiles + at_once - 1) / at_once, [&](int64_t item) {
        for (int64_t i = item * at_once; i < std::min((item + 1) * at_once, tiles); i++)
            fill_tile(tile_of(to, first_tile + i * tile_step, bytes), to.columns, source + i * TILE_ROWS * row_stride, source_type, row_stride,
                      int(std::min<int64_t>(TILE_ROWS, rows - i * TILE_ROWS)));
    });
}

void embed_row(const Tiles& tiles, int64_t row, float* out) {
    const TilePlace from = tile_of(tiles, row / TILE_ROWS, tile_bytes(tiles.type, tiles.columns));
    const int64_t r = row % TILE_ROWS;
    switch (from.type) {
        case Weight::f32: return read_float_row<float>(from.memory, tiles.columns, r, out);
        case Weight::f16: return read_float_row<Half>(from.memory, tiles.columns, r, out);
        case Weight::bf16: return read_float_row<Bfloat>(from.memory, tiles.columns, r, out);
        default: with_format(from.type, [&](auto format) { read_q_row<decltype(format)>(from.memory, tiles.columns, r, out); });
    }
}

}  // namespace dc
