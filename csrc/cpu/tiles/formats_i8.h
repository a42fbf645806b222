// Format<i8_row>: bytes with one scale for a whole row. They come from folders whose config asks for weights and activations of 8 bits (W8A8).
//
//     block    d f32, 256 signed bytes; all blocks of a row have the same d
//     weight   d * byte
//
// A row of x has one scale too, as such a config says. So a product has nothing to scale before a row ends.
// Only formats.h includes this.
#pragma once

template <>
struct Format<Weight::i8_row> : FileBlock<Weight::i8_row>, Plain<8, 7, SignedDot> {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 64;      // d f32 [16]
    static constexpr int HALVES = 0, SINGLES = 16;
    static constexpr bool WHOLE_SCALES = true, ROW_SCALE = true;

    static void codes(const uint8_t* block, uint8_t* codes) {
        for (int k = 0; k < FILE_COLUMNS; k++) codes[k] = block[4 + k] ^ 0x80;
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) { std::memcpy(group + 4 * r, block, 4); }
    DC_INLINE Lanes shared(const uint8_t* group) { return load(reinterpret_cast<const float*>(group)); }
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return shared(group); }
};
