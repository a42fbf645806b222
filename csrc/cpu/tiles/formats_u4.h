// Format<u4_g32>, Format<u4_g128>: 4-bit codes with a zero point, as AWQ, GPTQ and compressed-tensors have them.
//
//     block    d f16, zero u8, 16 bytes of nibbles for each 32 columns (low nibbles are the first 16)
//     weight   d * code + -(d * zero): both products are exact in float32, so a tile holds the file's numbers, where a float16
//              minimum as Q4_1's would be off by up to 0.37 % of a step
//
// A group of 128 columns shares both numbers in a tile too: 4.25 bits a weight where u4_g32 takes 4.75.
// Only formats.h includes this.
#pragma once

// BLOCKS 4: of the blocks of 32 columns in a tile's group, so many (EACH) share d and zero.
template <int EACH>
struct ZeroPoints : Plain<4, NO_OFFSET, NibbleDot> {
    static constexpr int64_t BLOCKS = 4;
    static constexpr int HALVES = 16 * 4 / EACH;                                    // d f16 [4 / EACH][16]; u8 [4 / EACH][16]
    static constexpr int64_t SCALE_BYTES = (3 * HALVES + 63) / 64 * 64;
    static constexpr bool FINE_APART = false;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int i = 0; i < EACH; i++) nibble_codes(block + 3 + 16 * i, codes + 32 * i);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int i, int r) {
        copy_half(block, group + 32 * (i / EACH) + 2 * r);
        group[2 * HALVES + 16 * (i / EACH) + r] = block[2];
    }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int) { return halves(group + 32 * (i / EACH)); }
    DC_INLINE Lanes minimum(const uint8_t* group, int i) {
        return all(0.0f) - halves(group + 32 * (i / EACH)) * lanes_of_bytes(group + 2 * HALVES + 16 * (i / EACH));
    }
};

template <>
struct Format<Weight::u4_g32> : FileBlock<Weight::u4_g32>, ZeroPoints<1> {};

template <>
struct Format<Weight::u4_g128> : FileBlock<Weight::u4_g128>, ZeroPoints<4> {};
