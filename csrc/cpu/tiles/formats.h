// Everything about each quantized type of weights: one struct Format<TYPE> per type. tiles.h describes the layout.
//
//     FILE_COLUMNS, FILE_BYTES the size of a block in GGUF, from its row in weights.def. `codes` reads its codes: unsigned, one a column
//     BITS                     bits of a code; 1: the codes are 0 and 2, so that OFFSET_SHIFT can be 0. `Quants<BITS>` says how the codes of 16 rows x 32 columns lie in a tile
//     BLOCKS, SCALE_BYTES      a group: so many blocks of 32 columns lie together in a tile, after the bytes of all their scales.
//                              `put_scales` writes the scales of one row
//     HALVES                   how many float16 numbers (scales and minimums) the scales begin with. 0: they are exponents, a byte each
//     SINGLES                  how many float32 numbers the scales begin with, in place of float16
//     PARTS                    1: a scale for 32 columns; 2: one for each 16
//     OFFSET_SHIFT             weight = scale * (code - 2^OFFSET_SHIFT); NO_OFFSET: weight = scale * code + minimum
//     TABLE                    where there is one: the tile's nibbles are places in it, and it holds the codes
//     MINIMUMS                 1: a minimum for 32 columns; 2: one for each 16
//     scale, minimum           functions: the scale and the minimum of block i of a group, lane r = row r. Exact products in float32
//     Dot                      which of the dot products in dots.h
//     WHOLE_SCALES             the scale of 16 or 32 columns is a whole number times `shared`. Then x comes in steps, and a group of blocks has
//                              one sum (steps.inl.h). `factors` are a block's whole numbers, two for each row; `minimum_factors` those of its
//                              minimums, where it has any
//     ROW_SCALE                (with WHOLE_SCALES) a whole row has one scale, which is the `shared` of each group. There are no whole numbers
//     HIGH_APART               (with WHOLE_SCALES) the high bytes of x have a sum of their own: 256 times it may not fit in 32 bits
//     FINE_APART               (without WHOLE_SCALES) see tiles.h, numerics
//     EXPANDS                  the codes are made just before a product (grids.h). `put_block` copies 32 columns of a row from the file; there
//                              is no `codes`
//
// csrc/README.md says what else a type needs.
// A file that includes this defines DC_ISA.
#pragma once

#include <cstdlib>

#include "cpu/tiles/dots.h"
#include "cpu/tiles/tiles.h"

namespace dc {
namespace DC_ISA {

constexpr int NO_OFFSET = -1;

// ---- how codes lie in a tile: 16 rows x 32 columns, lane r = row r. unpack<C>, C = 0 .. 3, gives two chunks: the 4 columns from
// NEXT * C on, and the 4 from SECOND + NEXT * C on

template <int BITS>
struct Quants;

struct BitPlace { int at, bit; };            // this bit of each of the 64 bytes that begin `at` bytes on

// Four codes at once, a byte each: shifts and masks of a word leave the bytes apart.
static inline uint32_t four(const uint8_t* codes) {
    uint32_t word;
    std::memcpy(&word, codes, 4);
    return word;
}
static inline void put_four(uint32_t word, uint8_t* to) { std::memcpy(to, &word, 4); }

struct NibbleOrder { static constexpr int NEXT = 4, SECOND = 16; };

template <>
struct Quants<4> : NibbleOrder {            // 4 chunks of 64 B: lane r = 4 bytes, low nibbles columns 4 c .., high ones 16 + 4 c ..
    static constexpr int64_t BYTES = 256;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        const Words both = load_words(quants + 64 * C);
        low = low_nibbles(both), high = high_nibbles(both);
    }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        for (int c = 0; c < 4; c++)
            put_four((four(codes + 4 * c) & 0x0f0f0f0f) | (four(codes + 16 + 4 * c) & 0x0f0f0f0f) << 4, quants + 64 * c + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) {
        const int both = quants[k % 16 / 4 * 64 + 4 * r + k % 4];
        return k < 16 ? both & 15 : both >> 4;
    }
};

template <>
struct Quants<5> : NibbleOrder {            // after the nibbles 64 B of fifth bits: of byte k % 4 of lane r, bit k / 4 is column k's
    static constexpr int64_t BYTES = 320;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        Quants<4>::unpack<C>(quants, low, high);
        const Words fifth = load_words_again(quants + 256);
        low = low | take_bits<4 - C, 0x10>(fifth), high = high | take_bits<-C, 0x10>(fifth);
    }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        Quants<4>::put(codes, quants, r);
        uint32_t fifth = 0;
        for (int c = 0; c < 8; c++) fifth |= (four(codes + 4 * c) >> 4 & 0x01010101) << c;
        put_four(fifth, quants + 256 + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) {
        return Quants<4>::code(quants, r, k) | (quants[256 + 4 * r + k % 4] >> k / 4 & 1) << 4;
    }
};

template <>
struct Quants<6> : NibbleOrder {            // after the nibbles two chunks of upper pairs of bits, of 16 columns each
    static constexpr int64_t BYTES = 384;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        Quants<4>::unpack<C>(quants, low, high);
        low = low | take_bits<4 - 2 * C, 0x30>(load_words_again(quants + 256));
        high = high | take_bits<4 - 2 * C, 0x30>(load_words_again(quants + 320));
    }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        Quants<4>::put(codes, quants, r);
        for (int half = 0; half < 2; half++) {
            uint32_t pairs = 0;
            for (int c = 0; c < 4; c++) pairs |= (four(codes + 16 * half + 4 * c) >> 4 & 0x03030303) << 2 * c;
            put_four(pairs, quants + 256 + 64 * half + 4 * r);
        }
    }
    static int code(const uint8_t* quants, int r, int k) {
        return Quants<4>::code(quants, r, k) | (quants[256 + k / 16 * 64 + 4 * r + k % 4] >> k % 16 / 4 * 2 & 3) << 4;
    }
};

template <>
struct Quants<2> : NibbleOrder {            // two chunks of pairs of bits, of 16 columns each: the upper pairs of six bits
    static constexpr int64_t BYTES = 128;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        low = chunk<C>(quants), high = chunk<C + 4>(quants);
    }
    static constexpr BitPlace low_two(int c) { return {c / 4 * 64, c % 4 * 2}; }     // of columns 4 c .. 4 c + 3
    template <int C>                        // these columns
    DC_INLINE Words chunk(const uint8_t* quants) { return take_bits<-low_two(C).bit, 3>(load_words_again(quants + low_two(C).at)); }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        for (int half = 0; half < 2; half++) {
            uint32_t pairs = 0;
            for (int c = 0; c < 4; c++) pairs |= (four(codes + 16 * half + 4 * c) & 0x03030303) << 2 * c;
            put_four(pairs, quants + 64 * half + 4 * r);
        }
    }
    static int code(const uint8_t* quants, int r, int k) { return quants[k / 16 * 64 + 4 * r + k % 4] >> k % 16 / 4 * 2 & 3; }
};

template <>
struct Quants<1> : NibbleOrder {            // codes 0 and 2, a bit each, as the fifth bits of five: of byte k % 4 of lane r, bit k / 4 is column k's
    static constexpr int64_t BYTES = 64;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        const Words bits = load_words_again(quants);
        low = take_bits<1 - C, 2>(bits), high = take_bits<-3 - C, 2>(bits);
    }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        uint32_t bits = 0;
        for (int c = 0; c < 8; c++) bits |= (four(codes + 4 * c) >> 1 & 0x01010101) << c;
        put_four(bits, quants + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) { return (quants[4 * r + k % 4] >> k / 4 & 1) << 1; }
};

template <>
struct Quants<3> {                          // three chunks of 64 B, a byte: 3 bits of columns 4 c .. for two c, and parts of the last ones
    static constexpr int64_t BYTES = 192;

    // Columns 4 c .. 4 c + 3: c = 0, 1; 2, 3; 4, 5 lie in the low bits of a chunk each, 6 and 7 in what is left: two bits in the first and the
    // last, their third in the middle one.
    static constexpr BitPlace low_two(int c) { return c < 6 ? BitPlace{c / 2 * 64, c % 2 * 3} : BitPlace{(c - 6) * 128, 6}; }
    static constexpr BitPlace third(int c) { return c < 6 ? BitPlace{c / 2 * 64, c % 2 * 3 + 2} : BitPlace{64, c}; }
    template <int C>
    DC_INLINE Words chunk(const uint8_t* quants) {
        const Words low = load_words_again(quants + low_two(C).at);
        if constexpr (C < 6) return take_bits<-low_two(C).bit, 7>(low);
        else return take_bits<-6, 3>(low) | take_bits<2 - third(C).bit, 4>(load_words_again(quants + third(C).at));
    }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        const auto chunk = [&](int c) { return four(codes + 4 * c) & 0x07070707; };
        const auto low = [&](int c) { return (chunk(c) & 0x03030303) << 6; };
        const auto third = [&](int c) { return (chunk(c) & 0x04040404) << (c - 2); };
        put_four(chunk(0) | chunk(1) << 3 | low(6), quants + 4 * r), put_four(chunk(4) | chunk(5) << 3 | low(7), quants + 128 + 4 * r);
        put_four(chunk(2) | chunk(3) << 3 | third(6) | third(7), quants + 64 + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) {
        const int c = k / 4, at = 4 * r + k % 4;
        return c < 6 ? quants[c / 2 * 64 + at] >> c % 2 * 3 & 7 : quants[(c - 6) * 128 + at] >> 6 | (quants[64 + at] >> c & 1) << 2;
    }
};

template <>
struct Quants<7> : NibbleOrder {            // a byte each, as they are multiplied: 8 chunks of 64 B
    static constexpr int64_t BYTES = 512;

    template <int C>
    DC_INLINE Words chunk(const uint8_t* quants) { return load_words(quants + 64 * C); }
};

template <>
struct Quants<8> {                          // 8 chunks of 64 B: lane r = columns 4 c .. 4 c + 3
    static constexpr int64_t BYTES = 512;
    static constexpr int NEXT = 8, SECOND = 4;

    template <int C>
    DC_INLINE void unpack(const uint8_t* quants, Words& low, Words& high) {
        low = load_words(quants + 128 * C), high = load_words(quants + 128 * C + 64);
    }
    template <int C>
    DC_INLINE Words chunk(const uint8_t* quants) { return load_words(quants + 64 * C); }
    static void put(const uint8_t* codes, uint8_t* quants, int r) {
        for (int c = 0; c < 8; c++) put_four(four(codes + 4 * c), quants + 64 * c + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) { return quants[k / 4 * 64 + 4 * r + k % 4]; }
};

// ---- what types have in common

DC_INLINE Lanes halves(const uint8_t* p) { return load(reinterpret_cast<const Half*>(p)); }

static inline void copy_half(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, 2); }

static inline void nibble_codes(const uint8_t* from, uint8_t* codes) {      // 16 bytes: low nibbles are the first 16 columns
    for (int k = 0; k < 16; k++) codes[k] = from[k] & 15, codes[k + 16] = from[k] >> 4;
}

// Each bit of a byte in the lowest bit of a byte of its own.
static inline uint64_t bits_apart(uint8_t byte) {
    const uint64_t alone = byte * uint64_t(0x0101010101010101) & 0x8040201008040201;
    return (alone + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
}

static inline void fifth_bits(const uint8_t* from, uint8_t* codes) {        // 4 bytes, a bit a column
    for (int i = 0; i < 4; i++, codes += 8) {
        uint64_t eight;
        std::memcpy(&eight, codes, 8);
        eight |= bits_apart(from[i]) << 4;
        std::memcpy(codes, &eight, 8);
    }
}

inline constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr int8_t MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};      // twice the values

// Codes without a table. Each Format has these three and adds its own.
template <int BITS_, int OFFSET_SHIFT_, class Dot_>
struct Plain : Quants<BITS_> {
    static constexpr int BITS = BITS_, OFFSET_SHIFT = OFFSET_SHIFT_, PARTS = 1, MINIMUMS = 1, HALVES = 32, SINGLES = 0;
    static constexpr bool HAS_MINIMUM = OFFSET_SHIFT_ == NO_OFFSET;
    static constexpr bool EXPANDS = false, WHOLE_SCALES = false, HIGH_APART = false, ROW_SCALE = false;
    using Dot = Dot_;
    DC_INLINE typename Dot::Weights weights(Words codes) { return Dot::weights(codes); }
    static float value(int code) { return float(code - (HAS_MINIMUM ? 0 : 1 << OFFSET_SHIFT_ % 32)); }
    DC_INLINE Lanes minimum(const uint8_t*, int) { return all(0.0f); }
};

struct Table { uint8_t codes[16]; };

constexpr Table plus(const int8_t (&values)[16], int offset) {
    Table table = {};
    for (int i = 0; i < 16; i++) table.codes[i] = uint8_t(values[i] + offset);
    return table;
}

// Nibbles that stand for values, which become codes of more bits, all positive.
template <const int8_t (&VALUES)[16], int OFFSET_SHIFT, class Dot>
struct Tabled : Plain<4, OFFSET_SHIFT, Dot> {
    static constexpr Table TABLE = plus(VALUES, 1 << OFFSET_SHIFT);
    DC_INLINE typename Dot::Weights weights(Words nibbles) { return Dot::weights(look_up(nibbles, TABLE.codes)); }
    static float value(int code) { return float(VALUES[code]); }
};

// Scales and minimums of Q4_K and Q5_K: 8 pairs of 6 bits in 12 bytes, which two float16 numbers multiply.
struct KScales {
    static constexpr int64_t SCALE_BYTES = 320;     // d, dmin f16 [16]; scales u8 [8][16]; minimums u8 [8][16]

    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r), copy_half(block + 2, group + 32 + 2 * r);
        const uint8_t* packed = block + 4;
        for (int i = 0; i < 8; i++) {
            const bool first = i < 4;
            const int scale = first ? packed[i] & 63 : (packed[i + 4] & 15) | packed[i - 4] >> 6 << 4;
            const int minimum = first ? packed[i + 4] & 63 : packed[i + 4] >> 4 | packed[i] >> 6 << 4;
            group[64 + 16 * i + r] = uint8_t(scale), group[192 + 16 * i + r] = uint8_t(minimum);
        }
    }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group) * lanes_of_bytes(group + 64 + 16 * i); }
    DC_INLINE Lanes minimum(const uint8_t* group, int i) {
        return all(0.0f) - halves(group + 32) * lanes_of_bytes(group + 192 + 16 * i);
    }
};

static inline void nibble_codes_of_pairs(const uint8_t* from, uint8_t* codes) {     // 128 bytes: each 32 hold two blocks of 32
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) codes[64 * i + k] = from[32 * i + k] & 15, codes[64 * i + 32 + k] = from[32 * i + k] >> 4;
}

// ---- the types

template <Weight TYPE>
struct Format;

template <Weight TYPE>
struct FileBlock;
#define QUANTIZED_WEIGHTS(name, NAME, columns, bytes) \
    template <> \
    struct FileBlock<Weight::name> { static constexpr int64_t FILE_COLUMNS = columns, FILE_BYTES = bytes; };
#include "weights.def"

template <>
struct Format<Weight::q8_0> : FileBlock<Weight::q8_0>, Plain<8, 7, SignedDot> {
    static constexpr int64_t BLOCKS = 2, SCALE_BYTES = 64;
    static constexpr bool FINE_APART = false;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int k = 0; k < 32; k++) codes[k] = block[2 + k] ^ 0x80;
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int i, int r) { copy_half(block, group + 32 * i + 2 * r); }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group + 32 * i); }
};

template <>
struct Format<Weight::q4_0> : FileBlock<Weight::q4_0>, Plain<4, 3, NibbleDot> {
    static constexpr int64_t BLOCKS = 1, SCALE_BYTES = 32;
    static constexpr int HALVES = 16;
    static constexpr bool FINE_APART = false;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 2, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) { copy_half(block, group + 2 * r); }
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return halves(group); }
};

template <>
struct Format<Weight::q4_1> : FileBlock<Weight::q4_1>, Plain<4, NO_OFFSET, NibbleDot> {
    static constexpr int64_t BLOCKS = 1, SCALE_BYTES = 64;
    static constexpr bool FINE_APART = false;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 4, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r), copy_half(block + 2, group + 32 + 2 * r);
    }
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return halves(group); }
    DC_INLINE Lanes minimum(const uint8_t* group, int) { return halves(group + 32); }
};

template <>
struct Format<Weight::q5_0> : FileBlock<Weight::q5_0>, Plain<5, 4, FiveBitDot> {
    static constexpr int64_t BLOCKS = 2, SCALE_BYTES = 64;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 6, codes), fifth_bits(block + 2, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int i, int r) { copy_half(block, group + 32 * i + 2 * r); }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group + 32 * i); }
};

template <>
struct Format<Weight::q5_1> : FileBlock<Weight::q5_1>, Plain<5, NO_OFFSET, FiveBitDot> {
    static constexpr int64_t BLOCKS = 1, SCALE_BYTES = 64;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 8, codes), fifth_bits(block + 4, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r), copy_half(block + 2, group + 32 + 2 * r);
    }
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return halves(group); }
    DC_INLINE Lanes minimum(const uint8_t* group, int) { return halves(group + 32); }
};

template <>
struct Format<Weight::q4_k> : FileBlock<Weight::q4_k>, Plain<4, NO_OFFSET, NibbleDot>, KScales {
    static constexpr int64_t BLOCKS = 8;
    static constexpr bool FINE_APART = true;
    using KScales::minimum;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes_of_pairs(block + 16, codes); }
};

template <>
struct Format<Weight::q5_k> : FileBlock<Weight::q5_k>, Plain<5, NO_OFFSET, FiveBitDot>, KScales {
    static constexpr int64_t BLOCKS = 8;
    static constexpr bool FINE_APART = true;
    using KScales::minimum;

    static void codes(const uint8_t* block, uint8_t* codes) {
        nibble_codes_of_pairs(block + 48, codes);
        for (int i = 0; i < 8; i++)
            for (int k = 0; k < 32; k++) codes[32 * i + k] = uint8_t(codes[32 * i + k] | (block[16 + k] >> i & 1) << 4);
    }
};

template <>
struct Format<Weight::q6_k> : FileBlock<Weight::q6_k>, Plain<6, 5, UnsignedDot> {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 320;   // d f16 [16], 32 B, i8 [16][16]
    static constexpr int PARTS = 2, HALVES = 16;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < 8; i++) {               // 128 columns at a time: nibbles in 64 bytes, pairs of bits in 32
            const uint8_t* nibbles = block + i / 4 * 64 + i % 2 * 32;
            const uint8_t* pairs = block + 128 + i / 4 * 32;
            for (int k = 0; k < 32; k++)
                codes[32 * i + k] = uint8_t((nibbles[k] >> i % 4 / 2 * 4 & 15) | (pairs[k] >> i % 4 * 2 & 3) << 4);
        }
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block + 208, group + 2 * r);
        for (int i = 0; i < 16; i++) group[64 + 16 * i + r] = block[192 + i];
    }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int part) {
        return halves(group) * lanes_of_signed_bytes(group + 64 + 32 * i + 16 * part);
    }
};

template <>
struct Format<Weight::iq4_nl> : FileBlock<Weight::iq4_nl>, Tabled<IQ4_VALUES, 7, SignedDot> {
    static constexpr int64_t BLOCKS = 2, SCALE_BYTES = 64;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 2, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int i, int r) { copy_half(block, group + 32 * i + 2 * r); }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group + 32 * i); }
};

template <>
struct Format<Weight::iq4_xs> : FileBlock<Weight::iq4_xs>, Tabled<IQ4_VALUES, 7, SignedDot> {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 192;   // d f16 [16], 32 B, i8 [8][16]
    static constexpr int HALVES = 16;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < 8; i++) nibble_codes(block + 8 + 16 * i, codes + 32 * i);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 8; i++) {
            const int low = block[4 + i / 2] >> i % 2 * 4 & 15, high = block[2 + i / 4] >> i % 4 * 2 & 3;
            group[64 + 16 * i + r] = uint8_t((low | high << 4) - 32);
        }
    }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group) * lanes_of_signed_bytes(group + 64 + 16 * i); }
};

template <>
struct Format<Weight::mxfp4> : FileBlock<Weight::mxfp4>, Tabled<MXFP4_VALUES, 4, FiveBitDot> {
    static constexpr int64_t BLOCKS = 4, SCALE_BYTES = 64;
    static constexpr int HALVES = 0;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) { nibble_codes(block + 1, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int i, int r) { group[16 * i + r] = block[0]; }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) {        // 2^(e - 128), for e = 0 it is 0
        return powers_of_bytes(group + 16 * i) * all(0.5f);
    }
};

#include "cpu/tiles/formats_i8.h"
#include "cpu/tiles/formats_u4.h"
}  // namespace DC_ISA
}  // namespace dc

#include "cpu/tiles/formats_small.h"

namespace dc {
namespace DC_ISA {

// ---- all of them

// visit(Format<type>()) of a quantized type: the one place that turns a type's number into its struct.
template <class Visit>
static inline auto with_format(Weight type, Visit visit) {
    switch (type) {
#define QUANTIZED_WEIGHTS(name, ...) case Weight::name: return visit(Format<Weight::name>());
#include "weights.def"
        default: std::abort();              // of floats
    }
}

template <class F>
DC_INLINE Lanes minimum_of(const uint8_t* group, int i, int part) {
    if constexpr (F::MINIMUMS == 1) return F::minimum(group, i);
    else return F::minimum(group, i, part);
}

template <class F>
constexpr int64_t group_of_blocks_bytes() { return F::SCALE_BYTES + F::BLOCKS * F::BYTES; }

template <class F>
DC_INLINE const uint8_t* quants_of(const uint8_t* group, int64_t i) { return group + F::SCALE_BYTES + i * F::BYTES; }

}  // namespace DC_ISA
}  // namespace dc
