// Types whose scales of 16 columns are small integers (WHOLE_SCALES: Q2_K, Q3_K), for tile_pairs.inl.h: a code times its scale is one byte.
//
// layout   a group of blocks: f32 [16], what its scales share; of Q2_K f32 [BLOCKS][2][16] minimums; the bytes [BLOCKS][8][64]
// mapping  a lane of a register is a row's 4 columns; each bit of their codes adds the scale, twice or four times the scale to its byte
// cost     of 32 columns on Zen 4: 31 cycles of Q2_K, 42 of Q3_K, shared by all rows of x that meet the tile
// numerics Q2_K: code * scale, at most 45. Q3_K: (code - 4) * scale + 127, 3 .. 255. So the dot product is what sum_of_products
//          makes of the two sums of 16 columns, exactly, and one multiplication and one conversion follow in place of two
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

template <class F>
struct Folded : F {
    static constexpr int64_t BYTES = 512, SCALE_BYTES = 64 + (F::HAS_MINIMUM ? F::BLOCKS * F::MINIMUMS * 64 : 0);
    static constexpr int PARTS = 1, LESS = F::HAS_MINIMUM ? 0 : 127;
    static constexpr bool WHOLE_SCALES = false;
    DC_INLINE Lanes scale(const uint8_t* group, int, int) { return load(reinterpret_cast<const float*>(group)); }
    DC_INLINE Lanes minimum(const uint8_t* group, int i, int p) { return load(reinterpret_cast<const float*>(group) + 16 * (1 + F::MINIMUMS * i + p)); }
};

#if defined(__AVX512F__)

// Of sixteen bytes each four times.
DC_INLINE __m512i four_times(__m128i bytes) {
    const __m512i each = _mm512_cvtepu8_epi32(bytes);
    return _mm512_shuffle_epi8(each, _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
}

DC_INLINE __m512i with_bit(__m512i sum, __m512i bits, int bit, __m512i more) {
    return _mm512_mask_add_epi8(sum, _mm512_test_epi8_mask(bits, _mm512_set1_epi8(char(1 << bit))), sum, more);
}

// Columns 16 HALF .. 16 HALF + 15 of a block.
template <class F, int HALF>
DC_INLINE void fold_half(const uint8_t* group, int i, const uint8_t* quants, uint8_t* to) {
    const __m512i pairs = _mm512_loadu_si512(quants + 64 * HALF), scale = four_times(_mm512_cvtepi32_epi8(F::factor(group, i, HALF).v));
    const __m512i twice = _mm512_add_epi8(scale, scale), four = _mm512_add_epi8(twice, twice);
    const __m512i least = F::HAS_MINIMUM ? _mm512_setzero_si512() : _mm512_sub_epi8(_mm512_set1_epi8(Folded<F>::LESS), four);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i codes = with_bit(with_bit(least, pairs, 2 * c, scale), pairs, 2 * c + 1, twice);
        if constexpr (!F::HAS_MINIMUM) codes = with_bit(codes, _mm512_loadu_si512(quants + 128), 4 * HALF + c, four);
        _mm512_store_si512(to + 256 * HALF + 64 * c, codes);
    }
}

// A group, as expand_group makes one of looked-up types.
template <class F>
__attribute__((noinline)) void fold_group(const uint8_t* group, uint8_t* to, int64_t ahead) {
    using E = Folded<F>;
    store(reinterpret_cast<float*>(to), F::shared(group));
    for (int i = 0; i < F::BLOCKS; i++) {
        if (ahead) prefetch_block<F>(group, i, ahead);
        if constexpr (F::HAS_MINIMUM)
            for (int p = 0; p < F::MINIMUMS; p++) store(reinterpret_cast<float*>(to) + 16 * (1 + F::MINIMUMS * i + p), F::minimum(group, i, p));
        uint8_t* const codes = to + E::SCALE_BYTES + i * E::BYTES;
        fold_half<F, 0>(group, i, quants_of<F>(group, i), codes), fold_half<F, 1>(group, i, quants_of<F>(group, i), codes);
    }
}

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
