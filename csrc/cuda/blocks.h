// What a kernel knows of each quantized type of weights: one struct a type, over a row as a GGUF file has it.
//
//     COLUMNS, BYTES   of a block, from its row in weights.def; a row of K columns is K / COLUMNS blocks, one after another
//     unpack           8 weights of a block in f32, columns 8 * piece on: the bits that the gguf package gives
//
// Blocks lie as in the file, so that a matrix is copied to the device unchanged: of rows, most blocks begin at any even
// address (MXFP4's and U4's at any), therefore all loads are of two bytes. The lanes of a warp read pieces side by side.
// csrc/cpu/tiles/formats.h has the same blocks for the CPU's tiles.
#pragma once

#include "device.h"

namespace dc_device {

// As weights.def and cuda.py number the types; the last are floats, as a matrix that no file has packed.
enum BlockType : int64_t {
#define FILE_WEIGHTS(...)
#define QUANTIZED_WEIGHTS(name, NAME, ...) NAME,
#include "weights.def"
    FLOATS_BF16, FLOATS_F16, FLOATS_F32
};

DC_DEVICE uint32_t two_bytes(const uint8_t *even) { return *reinterpret_cast<const uint16_t *>(even); }
DC_DEVICE uint32_t four_bytes(const uint8_t *even) { return two_bytes(even) | two_bytes(even + 2) << 16; }
DC_DEVICE float half_at(const uint8_t *even) { return to_float(f16{static_cast<uint16_t>(two_bytes(even))}); }

struct Eight {                          // bytes, each for one column
    uint32_t low, high;
    DC_DEVICE uint32_t operator[](int i) const { return (i < 4 ? low : high) >> i % 4 * 8 & 255u; }
};

DC_DEVICE Eight eight_bytes(const uint8_t *even) { return Eight{four_bytes(even), four_bytes(even + 4)}; }

// Byte i of 16, held in two words: the tables of the types that have one.
DC_DEVICE float from_table(uint64_t first, uint64_t second, uint32_t i) {
    return static_cast<float>(static_cast<int8_t>((i & 8 ? second : first) >> (i & 7) * 8));
}

DC_DEVICE float iq4_value(uint32_t code) {         // -127 -104 -83 -65 -49 -35 -22 -10 | 1 13 25 38 53 69 89 113
    return from_table(0xF6EADDCFBFAD9881ull, 0x7159453526190D01ull, code);
}

DC_DEVICE float mxfp4_value(uint32_t code) {       // twice 0 .5 1 1.5 2 3 4 6 | the same below zero
    return from_table(0x0C08060403020100ull, 0xF4F8FAFCFDFEFF00ull, code);
}

// Of 32 columns in 16 bytes, the low nibbles are the first 16 columns.
DC_DEVICE Eight nibbles(const uint8_t *even, int piece) {
    const Eight both = eight_bytes(even + 8 * (piece & 1));
    const int shift = 4 * (piece >> 1);
    return Eight{both.low >> shift & 0x0F0F0F0Fu, both.high >> shift & 0x0F0F0F0Fu};
}

template <int TYPE> struct Block;
template <int TYPE> struct FileBlock;
#define FILE_WEIGHTS(...)
#define QUANTIZED_WEIGHTS(name, NAME, columns, bytes) \
    template <> struct FileBlock<NAME> { static constexpr int COLUMNS = columns, BYTES = bytes; };
#include "weights.def"

template <> struct Block<Q8_0> : FileBlock<Q8_0> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block);
        const Eight codes = eight_bytes(block + 2 + 8 * piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * static_cast<float>(static_cast<int8_t>(codes[i]));
    }
};

template <> struct Block<Q4_0> : FileBlock<Q4_0> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block);
        const Eight codes = nibbles(block + 2, piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * (static_cast<float>(codes[i]) - 8.0f);
    }
};

template <> struct Block<Q4_1> : FileBlock<Q4_1> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block), minimum = half_at(block + 2);
        const Eight codes = nibbles(block + 4, piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * static_cast<float>(codes[i]) + minimum;
    }
};

DC_DEVICE uint32_t five_bits(const Eight &codes, uint32_t fifth, int i) { return codes[i] | (fifth >> i & 1u) << 4; }

template <> struct Block<Q5_0> : FileBlock<Q5_0> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block);
        const uint32_t fifth = four_bytes(block + 2) >> 8 * piece;
        const Eight codes = nibbles(block + 6, piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * (static_cast<float>(five_bits(codes, fifth, i)) - 16.0f);
    }
};

template <> struct Block<Q5_1> : FileBlock<Q5_1> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block), minimum = half_at(block + 2);
        const uint32_t fifth = four_bytes(block + 4) >> 8 * piece;
        const Eight codes = nibbles(block + 8, piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * static_cast<float>(five_bits(codes, fifth, i)) + minimum;
    }
};

// The scale and minimum of 32 columns, number j of 8: 6 bits each in 12 bytes, under two f16.
struct KScale {
    float scale, minimum;
    DC_DEVICE KScale(const uint8_t *block, int j) {
        const uint8_t *packed = block + 4;
        const uint32_t a = packed[j % 4], b = packed[4 + j % 4], c = packed[8 + j % 4];
        const uint32_t sc = j < 4 ? a & 63u : (c & 15u) | a >> 6 << 4;
        const uint32_t m = j < 4 ? b & 63u : c >> 4 | b >> 6 << 4;
        scale = half_at(block) * static_cast<float>(sc);
        minimum = half_at(block + 2) * static_cast<float>(m);
    }
};

template <> struct Block<Q4_K> : FileBlock<Q4_K> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int j = piece / 4;                // each 32 bytes hold the nibbles of two times 32 columns
        const KScale k(block, j);
        const Eight codes = eight_bytes(block + 16 + 32 * (j / 2) + 8 * (piece % 4));
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = k.scale * static_cast<float>(codes[i] >> 4 * (j & 1) & 15u) - k.minimum;
    }
};

template <> struct Block<Q5_K> : FileBlock<Q5_K> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int j = piece / 4;
        const KScale k(block, j);
        const Eight codes = eight_bytes(block + 48 + 32 * (j / 2) + 8 * (piece % 4));
        const Eight fifth = eight_bytes(block + 16 + 8 * (piece % 4));
        DC_UNROLL
        for (int i = 0; i < 8; i++) {
            const uint32_t code = (codes[i] >> 4 * (j & 1) & 15u) | (fifth[i] >> j & 1u) << 4;
            w[i] = k.scale * static_cast<float>(code) - k.minimum;
        }
    }
};

template <> struct Block<Q6_K> : FileBlock<Q6_K> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int half = piece / 16, column = 8 * (piece % 16);     // 128 columns: nibbles in 64 bytes, pairs of bits in 32
        const int8_t sub = static_cast<int8_t>(block[192 + piece / 2]);
        const float scale = half_at(block + 208) * static_cast<float>(sub);
        const Eight low = eight_bytes(block + 64 * half + column % 64);
        const Eight high = eight_bytes(block + 128 + 32 * half + column % 32);
        DC_UNROLL
        for (int i = 0; i < 8; i++) {
            const uint32_t code = (low[i] >> column / 64 * 4 & 15u) | (high[i] >> column / 32 * 2 & 3u) << 4;
            w[i] = scale * (static_cast<float>(code) - 32.0f);
        }
    }
};

template <> struct Block<IQ4_NL> : FileBlock<IQ4_NL> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = half_at(block);
        const Eight codes = nibbles(block + 2, piece);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * iq4_value(codes[i]);
    }
};

template <> struct Block<IQ4_XS> : FileBlock<IQ4_XS> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int j = piece / 4;                // a scale of 6 bits for 32 columns
        const uint32_t low = block[4 + j / 2] >> j % 2 * 4 & 15u, high = two_bytes(block + 2) >> 2 * j & 3u;
        const float scale = half_at(block) * (static_cast<float>(low | high << 4) - 32.0f);
        const Eight codes = nibbles(block + 8 + 16 * j, piece % 4);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * iq4_value(codes[i]);
    }
};

template <> struct Block<MXFP4> : FileBlock<MXFP4> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        union { uint32_t bits; float value; } scale;        // 2^(exponent - 128), which may be denormal
        scale.bits = block[0] < 2 ? 0x00200000u << block[0] : (block[0] - 1u) << 23;
        DC_UNROLL
        for (int i = 0; i < 8; i++)
            w[i] = scale.value * mxfp4_value(block[1 + 8 * (piece & 1) + i] >> 4 * (piece >> 1) & 15u);
    }
};

// Codes with a zero point; a block begins at any address.
template <int TYPE> struct ZeroPointBlock : FileBlock<TYPE> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const float scale = to_float(f16{static_cast<uint16_t>(block[0] | block[1] << 8)}), zero = static_cast<float>(block[2]);
        const uint8_t *codes = block + 3 + 16 * (piece / 4) + 8 * (piece & 1);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * (static_cast<float>(codes[i] >> 4 * (piece >> 1 & 1) & 15u) - zero);
    }
};
template <> struct Block<U4_G32> : ZeroPointBlock<U4_G32> {};
template <> struct Block<U4_G128> : ZeroPointBlock<U4_G128> {};

template <> struct Block<Q2_K> : FileBlock<Q2_K> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int j = piece / 2, column = 8 * (piece % 16);         // a scale and a minimum, 4 bits each, for 16 columns
        const uint32_t sub = block[j];
        const float scale = half_at(block + 80) * static_cast<float>(sub & 15u), minimum = half_at(block + 82) * static_cast<float>(sub >> 4);
        const Eight pairs = eight_bytes(block + 16 + piece / 16 * 32 + column % 32);
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = scale * static_cast<float>(pairs[i] >> column / 32 * 2 & 3u) - minimum;
    }
};

template <> struct Block<Q3_K> : FileBlock<Q3_K> {
    DC_DEVICE static void unpack(const uint8_t *block, int piece, float *w) {
        const int j = piece / 2, column = 8 * (piece % 16);         // a scale of 6 bits for 16 columns
        const uint32_t sub = (block[96 + j % 8] >> j / 8 * 4 & 15u) | (block[104 + j % 4] >> j / 4 * 2 & 3u) << 4;
        const float scale = half_at(block + 108) * (static_cast<float>(sub) - 32.0f);
        const Eight pairs = eight_bytes(block + 32 + piece / 16 * 32 + column % 32), third = eight_bytes(block + column % 32);
        DC_UNROLL
        for (int i = 0; i < 8; i++) {
            const uint32_t code = (pairs[i] >> column / 32 * 2 & 3u) | (third[i] >> piece / 4 & 1u) << 2;
            w[i] = scale * (static_cast<float>(code) - 4.0f);
        }
    }
};

template <class T> struct FloatBlock {              // at multiples of 16 bytes
    static constexpr int COLUMNS = 8, BYTES = 8 * sizeof(T);
    DC_DEVICE static void unpack(const uint8_t *block, int, float *w) {
        union { Bytes16 bytes[BYTES / 16]; T values[8]; } eight;
        DC_UNROLL
        for (int i = 0; i < BYTES / 16; i++) eight.bytes[i] = reinterpret_cast<const Bytes16 *>(block)[i];
        DC_UNROLL
        for (int i = 0; i < 8; i++) w[i] = to_float(eight.values[i]);
    }
};

template <> struct Block<FLOATS_BF16> : FloatBlock<bf16> {};
template <> struct Block<FLOATS_F16> : FloatBlock<f16> {};
template <> struct Block<FLOATS_F32> : FloatBlock<float> {};

// visit(Block<TYPE>()) of a packed type's number, on the host.
template <class Visit> const char *with_block(int64_t type, Visit visit) {
    switch (type) {
#define FILE_WEIGHTS(...)
#define QUANTIZED_WEIGHTS(name, NAME, ...) case NAME: return visit(Block<NAME>());
#include "weights.def"
        default: return "there is no such type of weights";
    }
}

template <class Visit> const char *with_block_or_floats(int64_t type, Visit visit) {
    if (type == FLOATS_BF16) return visit(Block<FLOATS_BF16>());
    if (type == FLOATS_F16) return visit(Block<FLOATS_F16>());
    return type == FLOATS_F32 ? visit(Block<FLOATS_F32>()) : with_block(type, visit);
}

}  // namespace dc_device
