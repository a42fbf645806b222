// The types of one, two and three bits: a part of formats.h, which includes it after what all types have in common.
#pragma once

#include "cpu/tiles/grids.h"

namespace dc {
namespace DC_ISA {

// 64 bytes: pairs of bits of 256 columns, 128 of them in 32 bytes.
static inline void codes_of_pairs(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 8; i++)
        for (int k = 0; k < 32; k++) codes[32 * i + k] = from[i / 4 * 32 + k] >> i % 4 * 2 & 3;
}

// Scales of 16 columns, bytes: u8 [8][16][2], the two of a block side by side, after what they are times and 64 bytes.
struct ByteScales {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 320;
    static constexpr int PARTS = 2;
    static constexpr bool WHOLE_SCALES = true;

    static void put_byte(uint8_t* group, int part, int r, int byte) { group[64 + 32 * (part / 2) + 2 * r + part % 2] = uint8_t(byte); }
    DC_INLINE const uint8_t* bytes_of(const uint8_t* group, int i) { return group + 64 + 32 * i; }
    template <class Read>                   // one of a block's two, as floats: read(byte)
    static inline Lanes lanes_of_part(const uint8_t* group, int i, int part, Read read) {
        float x[16];
        for (int r = 0; r < 16; r++) x[r] = float(read(bytes_of(group, i)[2 * r + part]));
        return load(x);
    }
    DC_INLINE Lanes shared(const uint8_t* group) { return halves(group); }
};

template <>
struct Format<Weight::q2_k> : FileBlock<Weight::q2_k>, Plain<2, NO_OFFSET, NibbleDot>, ByteScales {     // d, dmin f16 [16]
    using ByteScales::PARTS, ByteScales::WHOLE_SCALES;
    static constexpr int MINIMUMS = 2;                          // the upper nibbles; scales are the lower ones

    static void codes(const uint8_t* block, uint8_t* codes) { codes_of_pairs(block + 16, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block + 80, group + 2 * r), copy_half(block + 82, group + 32 + 2 * r);
        for (int part = 0; part < 16; part++) put_byte(group, part, r, block[part]);
    }
    static Lanes scale(const uint8_t* group, int i, int part) {
        return halves(group) * lanes_of_part(group, i, part, [](uint8_t byte) { return byte & 15; });
    }
    static Lanes minimum(const uint8_t* group, int i, int part) {
        return shared_minimum(group) * lanes_of_part(group, i, part, [](uint8_t byte) { return byte >> 4; });
    }
    DC_INLINE Lanes shared_minimum(const uint8_t* group) { return all(0.0f) - halves(group + 32); }
    DC_INLINE Whole factors(const uint8_t* group, int i) { return low_nibbles_of_pairs(pairs_of_bytes(bytes_of(group, i))); }
    DC_INLINE Whole minimum_factors(const uint8_t* group, int i) { return high_nibbles_of_pairs(pairs_of_bytes(bytes_of(group, i))); }
};

template <>
struct Format<Weight::q3_k> : FileBlock<Weight::q3_k>, Plain<3, 2, NibbleDot>, ByteScales {      // d f16 [16], 32 B; signed bytes
    using ByteScales::PARTS, ByteScales::WHOLE_SCALES;
    static constexpr int HALVES = 16;

    static void codes(const uint8_t* block, uint8_t* codes) {
        codes_of_pairs(block + 32, codes);
        for (int i = 0; i < 8; i++)
            for (int k = 0; k < 32; k++) codes[32 * i + k] = uint8_t(codes[32 * i + k] | (block[k] >> i & 1) << 2);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block + 108, group + 2 * r);
        for (int i = 0; i < 16; i++) {                          // 6 bits: nibbles in 8 bytes, pairs of bits in 4
            const int low = block[96 + i % 8] >> i / 8 * 4 & 15, high = block[104 + i % 4] >> i / 4 * 2 & 3;
            put_byte(group, i, r, (low | high << 4) - 32);
        }
    }
    static Lanes scale(const uint8_t* group, int i, int part) {
        return halves(group) * lanes_of_part(group, i, part, [](uint8_t byte) { return int8_t(byte); });
    }
    DC_INLINE Whole factors(const uint8_t* group, int i) { return pairs_of_signed_bytes(bytes_of(group, i)); }
};

// ---- one scale for 256 columns, weights of -1, 0 and 1 times it

struct Ternary : Plain<2, 0, NibbleDot> {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 64;      // d f16 [16], 32 B
    static constexpr int HALVES = 16;
    static constexpr bool FINE_APART = true;
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return halves(group); }
};

template <>
struct Format<Weight::tq1_0> : FileBlock<Weight::tq1_0>, Ternary {
    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int n = 0, power = 1; n < 5; n++, power *= 3) {        // five in a byte: digits of a fraction in base 3
            digits<32>(block, power, codes + 32 * n), digits<16>(block + 32, power, codes + 160 + 16 * n);
            if (n < 4) digits<4>(block + 48, power, codes + 240 + 4 * n);
        }
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) { copy_half(block + 52, group + 2 * r); }

private:
    template <int COUNT>
    static void digits(const uint8_t* fractions, int power, uint8_t* to) {
        for (int k = 0; k < COUNT; k++) to[k] = uint8_t((fractions[k] * power & 255) * 3 >> 8);
    }
};

template <>
struct Format<Weight::tq2_0> : FileBlock<Weight::tq2_0>, Ternary {
    static void codes(const uint8_t* block, uint8_t* codes) { codes_of_pairs(block, codes); }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) { copy_half(block + 64, group + 2 * r); }
};

// ---- a scale for each block of the file, before its codes. In tiles they take the bytes of the file

template <Weight TYPE, int BITS>
struct FewBits : FileBlock<TYPE>, Plain<BITS, 0, NibbleDot> {
    static constexpr int64_t BLOCKS = FileBlock<TYPE>::FILE_COLUMNS / 32, SCALE_BYTES = 32;     // d f16 [16]
    static constexpr int HALVES = 16;
    static constexpr bool FINE_APART = true;

    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) { copy_half(block, group + 2 * r); }
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return halves(group); }
};

// A bit that is set is d, another -d.
template <>
struct Format<Weight::q1_0> : FewBits<Weight::q1_0, 1> {
    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < FILE_COLUMNS / 8; i++) {
            const uint64_t eight = bits_apart(block[2 + i]) << 1;
            std::memcpy(codes + 8 * i, &eight, 8);
        }
    }
};

// (q - 1) d. Four columns lie in a byte, the first in its low bits.
template <Weight TYPE>
struct PairsInOrder : FewBits<TYPE, 2> {
    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < FileBlock<TYPE>::FILE_COLUMNS / 4; i++) {
            const uint32_t byte = block[2 + i];
            put_four((byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303, codes + 4 * i);
        }
    }
};

template <>
struct Format<Weight::q2_0> : PairsInOrder<Weight::q2_0> {};

template <>
struct Format<Weight::q2_0_g128> : PairsInOrder<Weight::q2_0_g128> {};

// ---- as mxfp4, with a scale for 16 columns: 4 bits of exponent, 3 of mantissa, which a float16 has too

template <>
struct Format<Weight::nvfp4> : FileBlock<Weight::nvfp4>, Tabled<MXFP4_VALUES, 4, NibbleDot> {
    static constexpr int64_t BLOCKS = 2, SCALE_BYTES = 128;     // f16 [4][16]; a sum has half a block's products of five bits
    static constexpr int PARTS = 2, HALVES = 64;
    static constexpr bool FINE_APART = true;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 8; k++) codes[16 * i + k] = block[4 + 8 * i + k] & 15, codes[16 * i + 8 + k] = block[4 + 8 * i + k] >> 4;
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        for (int i = 0; i < 4; i++) {
            const int scale = block[i] == 0x7f ? 0 : (block[i] & 0x7f) << 7;        // 2^-8 of it; its NaN counts as 0
            group[32 * i + 2 * r] = uint8_t(scale), group[32 * i + 2 * r + 1] = uint8_t(scale >> 8);
        }
    }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int part) { return halves(group + 64 * i + 32 * part) * all(128.0f); }
};

}  // namespace DC_ISA
}  // namespace dc
