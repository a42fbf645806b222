// op       fill_tiles, embed_row: rows of floats or GGUF blocks -> tiles (cpu/tiles/tiles.h has the layouts), and back to f32;
//          read_file_row: GGUF blocks to f32
// mapping  one item = a run of tiles; a tile is filled a GGUF block or a value (floats) of one row at a time
// cost     source read and tiles written once; what quantizing adds says quantize.cpp. NaN and infinity are looked for while a
//          tile is in the cache
// numerics a GGUF block's scales and codes are kept unchanged; floats are rounded to nearest, ties to even, or become GGUF blocks
//          first (quantize.cpp)
#include "cpu/tiles/tiles.h"

#include <algorithm>
#include <atomic>

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
auto with_element(Weight type, Visit visit) {
    if (type == Weight::f32) return visit(float());
    return type == Weight::f16 ? visit(Half()) : visit(Bfloat());
}

// ---- NaN and infinity: the values whose exponent has all bits set

constexpr uint32_t F32_INFINITE = 0x7f800000;
constexpr uint16_t F16_INFINITE = 0x7c00, BF16_INFINITE = 0x7f80;

template <class Bits>
constexpr Bits SIGN = Bits(1) << (8 * sizeof(Bits) - 1);

// What, added to such a value's magnitude, sets the sign, and to no other's.
template <class Bits>
constexpr Bits carries_of(Bits infinite) { return Bits(SIGN<Bits> - infinite); }

template <class Bits>
bool all_finite(const uint8_t* values, int64_t count, Bits infinite) {
    const Bits carries = carries_of(infinite);
    Bits seen = 0;
    for (int64_t i = 0; i < count; i++) {
        Bits bits;
        std::memcpy(&bits, values + i * int64_t(sizeof(Bits)), sizeof bits);
        seen |= Bits(Bits(bits & Bits(~SIGN<Bits>)) + carries);
    }
    return !(seen & SIGN<Bits>);
}

bool all_finite(Weight float_type, const uint8_t* values, int64_t count) {
    if (float_type == Weight::f32) return all_finite(values, count, F32_INFINITE);
    return all_finite(values, count, float_type == Weight::f16 ? F16_INFINITE : BF16_INFINITE);
}

template <class F>
bool scales_are_finite(const uint8_t* group) {
    if (F::SINGLES) return all_finite(Weight::f32, group, F::SINGLES);
    if (F::HALVES) return all_finite(Weight::f16, group, F::HALVES);
    uint8_t most = 0;                                   // 12 * 2^(253 - 128) is more than the largest float32
    for (int64_t i = 0; i < F::SCALE_BYTES; i++) most = std::max(most, group[i]);
    return most < 253;
}

// ---- filling. The functions that fill a tile return whether it holds neither.

// A file's block of a row into a group of a tile, from its block i of 32 columns on.
template <class F>
void put_file_block(const uint8_t* block, uint8_t* group, int i, int r) {
    F::put_scales(block, group, i, r);
    uint8_t codes[F::FILE_COLUMNS];
    if constexpr (!F::EXPANDS) F::codes(block, codes);
    for (int n = 0; n < F::FILE_COLUMNS / BLOCK; n++) {
        uint8_t* const quants = group + F::SCALE_BYTES + (i + n) * F::BYTES;
        if constexpr (F::EXPANDS) F::put_block(block, n, quants, r);
        else F::put(codes + n * BLOCK, quants, r);
    }
}

// Block j of a row of floats as a GGUF block of F's type, into `made`; returns whether these are all finite.
template <class F>
bool make_block(const uint8_t* row, Weight source_type, int64_t j, Weight type, uint8_t* made) {
    float x[F::FILE_COLUMNS];
    with_element(source_type, [&](auto element) {
        for (int64_t k = 0; k < F::FILE_COLUMNS; k++) x[k] = value_at<decltype(element)>(row, j * F::FILE_COLUMNS + k);
    });
    quantize_block(type, x, made);
    return all_finite(Weight::f32, reinterpret_cast<const uint8_t*>(x), F::FILE_COLUMNS);
}

template <class F>
bool fill_q_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    constexpr int64_t EACH = F::FILE_COLUMNS / BLOCK;           // blocks of 32 columns in one of the file's
    const int64_t blocks = columns / BLOCK, padded = (blocks + F::BLOCKS - 1) / F::BLOCKS * F::BLOCKS;
    uint8_t nothing[F::FILE_BYTES] = {}, made[F::FILE_BYTES];
    bool finite = true;
    for (int64_t b = 0; b < padded; b += EACH)
        for (int r = 0; r < TILE_ROWS; r++) {
            const bool real = r < rows && b < blocks, floats = real && is_float(source_type);
            const uint8_t *row = source + r * row_stride, *block = floats ? made : real ? row + b / EACH * F::FILE_BYTES : nothing;
            if (floats) finite &= make_block<F>(row, source_type, b / EACH, to.type, made);
            put_file_block<F>(block, to.memory + b / F::BLOCKS * group_of_blocks_bytes<F>(), int(b % F::BLOCKS), r);
        }
    for (int64_t b = 0; b < padded; b += F::BLOCKS) finite &= scales_are_finite<F>(to.memory + b / F::BLOCKS * group_of_blocks_bytes<F>());
    return finite;
}

struct Turned {
    int64_t columns = 0;
    bool finite = true;
};

#if defined(__SSE2__)
// 8 columns of 8 rows, 16 bits each -> 8 rows' side of 8 lines of TILE_ROWS. `seen` gets the sign of what all_finite looks for.
void turn_8_by_8(const uint8_t* source, int64_t row_stride, uint16_t* out, __m128i carries, __m128i& seen) {
    __m128i a[8], b[8];
    for (int r = 0; r < 8; r++) {
        a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + r * row_stride));
        seen = _mm_or_si128(seen, _mm_add_epi16(_mm_and_si128(a[r], _mm_set1_epi16(0x7fff)), carries));
    }
    for (int i = 0; i < 4; i++) b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int i = 0; i < 4; i++) a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]), a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    for (int i = 0; i < 4; i++) b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int k = 0; k < 8; k++) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k * TILE_ROWS), b[k]);
}

// Columns that need no conversion, as far as vectors of 16 bits take them.
Turned turn_columns(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    Turned done;
    if (to.type != source_type || to.type == Weight::f32 || rows != TILE_ROWS) return done;
    const __m128i carries = _mm_set1_epi16(short(to.type == Weight::f16 ? carries_of<uint16_t>(F16_INFINITE) : carries_of<uint16_t>(BF16_INFINITE)));
    __m128i seen = _mm_setzero_si128();
    for (int64_t& k = done.columns; k + 8 <= columns; k += 8)
        for (int r = 0; r < TILE_ROWS; r += 8)
            turn_8_by_8(source + r * row_stride + 2 * k, row_stride, reinterpret_cast<uint16_t*>(to.memory) + k * TILE_ROWS + r, carries, seen);
    done.finite = !(_mm_movemask_epi8(seen) & 0xaaaa);          // the signs of 16 bits
    return done;
}
#else
Turned turn_columns(TilePlace, int64_t, const uint8_t*, Weight, int64_t, int) { return {}; }
#endif

template <class W>
bool fill_float_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    constexpr int64_t AT_ONCE = 64;         // columns: what is written stays in the L1 cache until its lines are full
    W* out = reinterpret_cast<W*>(to.memory);
    const Turned turned = turn_columns(to, columns, source, source_type, row_stride, rows);
    with_element(source_type, [&](auto element) {
        for (int64_t begin = turned.columns; begin < columns; begin += AT_ONCE)
            for (int r = 0; r < TILE_ROWS; r++) {
                const int64_t count = std::min(AT_ONCE, columns - begin);
                W line[AT_ONCE] = {};
                for (int64_t k = 0; r < rows && k < count; k++)
                    narrow(value_at<decltype(element)>(source + r * row_stride, begin + k), line + k);
                for (int64_t k = 0; k < count; k++) out[(begin + k) * TILE_ROWS + r] = line[k];
            }
    });
    return turned.finite && all_finite(to.type, reinterpret_cast<uint8_t*>(out + turned.columns * TILE_ROWS), (columns - turned.columns) * TILE_ROWS);
}

bool fill_tile(TilePlace to, int64_t columns, const uint8_t* source, Weight source_type, int64_t row_stride, int rows) {
    if (is_float(to.type))
        return with_element(to.type, [&](auto element) {
            return fill_float_tile<decltype(element)>(to, columns, source, source_type, row_stride, rows);
        });
    return with_format(to.type, [&](auto format) { return fill_q_tile<decltype(format)>(to, columns, source, source_type, row_stride, rows); });
}

template <class W>
void read_float_row(const uint8_t* tile, int64_t columns, int64_t r, float* out) {
    for (int64_t k = 0; k < columns; k++) out[k] = widen(reinterpret_cast<const W*>(tile)[k * TILE_ROWS + r]);
}

template <class F>
void read_q_row(const uint8_t* tile, int64_t columns, int64_t r, float* out) {
    float scale[F::PARTS][16], minimum[F::MINIMUMS][16];
    for (int64_t b = 0; b < columns / BLOCK; b++, out += BLOCK) {
        const uint8_t* group = tile + b / F::BLOCKS * group_of_blocks_bytes<F>();
        const int i = int(b % F::BLOCKS);
        for (int p = 0; p < F::PARTS; p++) store(scale[p], F::scale(group, i, p));
        for (int p = 0; p < F::MINIMUMS; p++) store(minimum[p], minimum_of<F>(group, i, p));
        for (int k = 0; k < BLOCK; k++) {
            const float scaled = scale[k * F::PARTS / BLOCK][r] * F::value(F::code(quants_of<F>(group, i), int(r), k));
            out[k] = F::HAS_MINIMUM ? scaled + minimum[k * F::MINIMUMS / BLOCK][r] : scaled;
        }
    }
}

// With the scales of one block of 32 columns at a time in a group of its own.
template <class F>
void read_block_row(const uint8_t* row, int64_t columns, float* out) {
    uint8_t group[F::SCALE_BYTES] = {}, codes[F::FILE_COLUMNS], quants[F::BYTES] = {};
    float scale[16], minimum[16];
    for (int64_t c = 0; c < columns; c += F::FILE_COLUMNS, row += F::FILE_BYTES) {
        F::put_scales(row, group, 0, 0);
        if constexpr (!F::EXPANDS) F::codes(row, codes);
        else
            for (int k = 0; k < F::FILE_COLUMNS; k++) {
                if (k % BLOCK == 0) F::put_block(row, k / BLOCK, quants, 0);
                codes[k] = uint8_t(F::code(quants, 0, k % BLOCK));
            }
        for (int64_t k = 0; k < F::FILE_COLUMNS; k += BLOCK / F::PARTS) {
            const int block = int(k / BLOCK);
            store(scale, F::scale(group, block, int(k % BLOCK * F::PARTS / BLOCK)));
            store(minimum, minimum_of<F>(group, block, int(k % BLOCK * F::MINIMUMS / BLOCK)));
            for (int64_t i = k; i < k + BLOCK / F::PARTS; i++) {
                const float scaled = scale[0] * F::value(codes[i]);
                out[c + i] = F::HAS_MINIMUM ? scaled + minimum[0] : scaled;
            }
        }
    }
}

}  // namespace

bool fill_tiles(const Tiles& to, const uint8_t* source, Weight source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                int64_t tile_step) {
    const int64_t bytes = tile_bytes(to.type, to.columns), tiles = tile_count(rows);
    const int64_t at_once = std::max<int64_t>(1, (256 << 10) / bytes);
    std::atomic<bool> finite{true};
    parallel_for((tiles + at_once - 1) / at_once, [&](int64_t item) {
        for (int64_t i = item * at_once; i < std::min((item + 1) * at_once, tiles); i++)
            if (!fill_tile(tile_of(to, first_tile + i * tile_step, bytes), to.columns, source + i * TILE_ROWS * row_stride, source_type,
                           row_stride, int(std::min<int64_t>(TILE_ROWS, rows - i * TILE_ROWS))))
                finite = false;
    });
    return finite;
}

void read_file_row(Weight type, const uint8_t* row, int64_t columns, float* out) {
    if (!is_float(type)) return with_format(type, [&](auto format) { read_block_row<decltype(format)>(row, columns, out); });
    with_element(type, [&](auto element) {
        for (int64_t k = 0; k < columns; k++) out[k] = value_at<decltype(element)>(row, k);
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
