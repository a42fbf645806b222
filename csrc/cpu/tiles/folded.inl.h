// Products of a set (four rows of x in steps, StepGroup) with two tiles whose scales are whole numbers (WHOLE_SCALES), in registers of 512 bits.
// There are two forms of tiles. Folded, for Q2_K and Q3_K: each code was multiplied by its scale beforehand, and for i8_row, whose tiles are folded
// as they are. Expanded, for IQ2_*, IQ3_* and
// IQ1_*: codes are bytes, and their sums are multiplied by the scales.
//
// layout   Folded: f32 [16], what a group's scales share. Q2_K then has f32 [16], what its minimums share, and its minimums, i16 [BLOCKS][16][2].
//          The bytes follow, [BLOCKS][8][64]. Expanded: grids.h
// mapping  a lane of a register is 4 columns of a row.
//          Folding: two bits of a code choose from a table, and a third bit adds four times the scale to the chosen byte.
//          Folded: the sums of two tiles and four rows lie in eight registers, those with Q2_K's minimums in eight more, for 256 columns.
//          Expanded: eight registers have the sums of 32 (or 16) columns, and eight more add up these sums times their scales. The latter begin
//          with the scales times the sums of x, which takes the codes' centre back
// cost     32 columns on Zen 4: 64 cycles of dot products, and 8 more for Q2_K's minimums. In a product of 128 rows this kernel is four fifths of
//          the time, at 87 % of the dot products' peak; folding, shared by all rows of x that meet the tile, is a tenth
// numerics those of step_rows. Q2_K: code * scale is at most 45. Q3_K: (code - 4) * scale + 127 is in 3 .. 255. Sums that pass 2^31 on the way
//          come back
// A part of tiles.inl.h.
#pragma once

#include "cpu/tiles/tile_pairs.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

template <class F>
struct Folded {
    static constexpr int64_t BLOCKS = F::BLOCKS, BYTES = 512;
    static constexpr int64_t MINIMUMS = 128, SCALE_BYTES = F::HAS_MINIMUM ? MINIMUMS + F::BLOCKS * 64 : 64;
    static constexpr bool HAS_MINIMUM = F::HAS_MINIMUM, HIGH_APART = false;
    static constexpr int LESS = F::ROW_SCALE ? 128 : F::HAS_MINIMUM ? 0 : 127;         // what was added to each product
};

#if defined(__AVX512F__)

// A table of what codes 0 .. 3 become, for each row: sixteen bytes hold the tables of four rows. Byte PART of each pair is the scale.
template <class F, int PART>
struct FoldTable {
    __m512i products, four;             // scale times 4

    __attribute__((always_inline)) explicit FoldTable(const uint8_t* pairs) {
        const __m512i each = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)));
        constexpr int BOTH = 0x01010101 * PART;
        __m512i scale = _mm512_shuffle_epi8(each, _mm512_set4_epi32(0x0c0c0c0c + BOTH, 0x08080808 + BOTH, 0x04040404 + BOTH, BOTH));
        if constexpr (F::HAS_MINIMUM) scale = _mm512_and_si512(scale, _mm512_set1_epi8(15));
        const __m512i twice = _mm512_add_epi8(scale, scale);
        four = _mm512_add_epi8(twice, twice);
        products = _mm512_add_epi8(_mm512_and_si512(scale, _mm512_set1_epi32(int(0xff00ff00))), _mm512_and_si512(twice, _mm512_set1_epi32(int(0xffff0000))));
        if constexpr (!F::HAS_MINIMUM) products = _mm512_add_epi8(products, _mm512_sub_epi8(_mm512_set1_epi8(Folded<F>::LESS), four));
    }
};

// Columns 16 HALF .. 16 HALF + 15 of a block.
template <class F, int HALF>
DC_INLINE void fold_half(const uint8_t* group, int i, uint8_t* to) {
    const FoldTable<F, HALF> table(F::bytes_of(group, i));
    const uint8_t* const quants = quants_of<F>(group, i);
    const __m512i rows = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0), three = _mm512_set1_epi8(3);
    each_of<4>([&](auto c) __attribute__((always_inline)) {
        constexpr int C = 4 * HALF + decltype(c)::value;
        constexpr BitPlace low = F::low_two(C);
        const __m512i shifted = _mm512_srli_epi16(_mm512_loadu_si512(quants + low.at), low.bit);
        __m512i codes = _mm512_shuffle_epi8(table.products, _mm512_ternarylogic_epi32(shifted, three, rows, 0xea));     // shifted & three | rows
        if constexpr (!F::HAS_MINIMUM) {
            constexpr BitPlace third = F::third(C);
            const __mmask64 more = _mm512_test_epi8_mask(_mm512_loadu_si512(quants + third.at), _mm512_set1_epi8(char(1 << third.bit)));
            codes = _mm512_mask_add_epi8(codes, more, codes, table.four);
        }
        _mm512_store_si512(to + 64 * C, codes);
    });
}

// A group; `multiply_expanded_pair` fetches what comes next.
template <class F>
__attribute__((noinline)) void fold_group(const uint8_t* group, uint8_t* to, int64_t) {
    using E = Folded<F>;
    store(reinterpret_cast<float*>(to), F::shared(group));
    if constexpr (F::HAS_MINIMUM) store(reinterpret_cast<float*>(to) + 16, F::shared_minimum(group));
    for (int i = 0; i < F::BLOCKS; i++) {
        if constexpr (F::HAS_MINIMUM) _mm512_store_si512(to + E::MINIMUMS + 64 * i, F::minimum_factors(group, i).v);
        uint8_t* const codes = to + E::SCALE_BYTES + i * E::BYTES;
        fold_half<F, 0>(group, i, codes), fold_half<F, 1>(group, i, codes);
    }
}

// A group that is folded as it is.
template <class F>
__attribute__((noinline)) void copy_group(const uint8_t* group, uint8_t* to, int64_t) {
    constexpr int64_t BYTES = group_of_blocks_bytes<F>();
    static_assert(group_of_blocks_bytes<Folded<F>>() == BYTES, "Folded");
    for (int64_t at = 0; at < BYTES; at += 64) _mm512_store_si512(to + at, _mm512_load_si512(group + at));
}

// Adds what row R's high bytes give, in the blocks that have any.
template <class E, int R>
DC_INLINE void add_high_folded(const uint8_t* const (&group)[PAIR], const int8_t* high, int blocks, __m512i (&sum)[PAIR][SET_ROWS]) {
    if (__builtin_expect(!blocks, 1)) return;
    __m512i own[PAIR] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; blocks; blocks &= blocks - 1) {
        const int i = __builtin_ctz(blocks);
        dot_row<0, 8>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), high + STEP_COLUMNS * R + BLOCK * i, own[0], own[1]);
    }
    for (int t = 0; t < PAIR; t++) sum[t][R] = _mm512_add_epi32(sum[t][R], _mm512_slli_epi32(own[t], 8));
}

using PairTotals = Lanes[PAIR][SET_ROWS];

DC_INLINE void add_sums_of_steps(const uint8_t* const (&group)[PAIR], int shared, const StepSet& set, const __m512i (&sum)[PAIR][SET_ROWS], PairTotals& total) {
    for (int t = 0; t < PAIR; t++) {
        const Lanes d = load(reinterpret_cast<const float*>(group[t]) + shared);
        for (int r = 0; r < SET_ROWS; r++) add_product(total[t][r], d * all(set.step[r]), Lanes{_mm512_cvtepi32_ps(sum[t][r])});
    }
}

// Adds block i's pairs of factors, which begin AT bytes after a group's begin, times the sums of four rows' low or high bytes.
template <int AT>
DC_INLINE void dot_factors(const uint8_t* const (&group)[PAIR], int i, const int16_t (&sums)[SET_ROWS][STEP_BLOCKS][2], __m512i (&sum)[PAIR][SET_ROWS]) {
    for (int t = 0; t < PAIR; t++) {
        const __m512i factors = _mm512_load_si512(group[t] + AT + 64 * i);
        for (int r = 0; r < SET_ROWS; r++) sum[t][r] = _mm512_dpwssd_epi32(sum[t][r], factors, word_of(sums[r][i]));
    }
}

// Adds what a group's minimums give, after its products. `high` has a bit for each block in which a row has high bytes.
template <class E>
DC_INLINE void add_minimums_of_steps(const uint8_t* const (&group)[PAIR], const StepSet& set, int high, PairTotals& total) {
    __m512i sum[PAIR][SET_ROWS] = {};
    if (high) {
        for (; high; high &= high - 1) dot_factors<E::MINIMUMS>(group, __builtin_ctz(high), set.high_sums, sum);
        for (int t = 0; t < PAIR; t++)
            for (int r = 0; r < SET_ROWS; r++) sum[t][r] = _mm512_slli_epi32(sum[t][r], 8);
    }
#pragma GCC unroll 2
    for (int i = 0; i < STEP_BLOCKS; i++) dot_factors<E::MINIMUMS>(group, i, set.low_sums, sum);
    add_sums_of_steps(group, 16, set, sum, total);
}

// A group of Folded onto the totals.
template <class E>
DC_INLINE void add_folded(const uint8_t* const (&group)[PAIR], Fetching& fetching, const StepGroup& x, int row, PairTotals& total) {
    const StepSet& set = x.sets[row / SET_ROWS];
    __m512i sum[PAIR][SET_ROWS];
    for (int r = 0; r < SET_ROWS; r++) {
        const __m512i minus = _mm512_set1_epi32(set.minus[r]);
        const __m512i less = E::LESS ? _mm512_slli_epi32(minus, 7) : _mm512_setzero_si512();       // 128 times; if LESS is 127, once less
        sum[0][r] = sum[1][r] = E::LESS == 127 ? _mm512_sub_epi32(less, minus) : less;
    }
    for (int i = 0; i < STEP_BLOCKS; i++) {
        fetching.next();
        dot_rows<0, 8, STEP_COLUMNS>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), x.low[row] + BLOCK * i, sum);
    }
    const uint8_t* const has_high = set.has_high;
    const int flags = has_high[0] | has_high[1] | has_high[2] | has_high[3];
    if (flags) {
        const int8_t* const high = x.high[row];
        each_of<4>([&](auto r) __attribute__((always_inline)) { add_high_folded<E, decltype(r)::value>(group, high, has_high[r], sum); });
    }
    add_sums_of_steps(group, 0, set, sum, total);
    if constexpr (E::HAS_MINIMUM) add_minimums_of_steps<E>(group, set, flags, total);
}

// Part PART's factors of a block, one in each lane.
template <class E, int PART>
DC_INLINE __m512i factor_of(const uint8_t* group, int i) { return UnsignedDot::factor<PART>(E::factors(group, i)).v; }

// Part PART of a block's low bytes times its factors.
template <class E, int PART>
DC_INLINE void add_scaled_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* x, __m512i (&sum)[PAIR][SET_ROWS]) {
    __m512i own[PAIR][SET_ROWS];
    for (int r = 0; r < SET_ROWS; r++) own[0][r] = own[1][r] = _mm512_setzero_si512();
    dot_rows<FIRST_CHUNK<E, PART>, FIRST_CHUNK<E, PART + 1>, STEP_COLUMNS>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), x, own);
    for (int t = 0; t < PAIR; t++) {
        const __m512i factor = factor_of<E, PART>(group[t], i);
        for (int r = 0; r < SET_ROWS; r++) sum[t][r] = _mm512_add_epi32(sum[t][r], _mm512_mullo_epi32(own[t][r], factor));
    }
}

// The same of one row.
template <class E, int PART>
DC_INLINE void add_scaled_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* x, __m512i (&sum)[PAIR]) {
    __m512i own[PAIR] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    dot_row<FIRST_CHUNK<E, PART>, FIRST_CHUNK<E, PART + 1>>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), x, own[0], own[1]);
    for (int t = 0; t < PAIR; t++) sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(own[t], factor_of<E, PART>(group[t], i)));
}

// The number that a sum of products begins with, of a sum of x times factors.
template <class E>
DC_INLINE __m512i centre_of(__m512i sum) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, E::OFFSET_SHIFT)); }

// Adds what row R's high bytes give a group, in the blocks that have any, as add_high_apart does.
template <class E, int R>
DC_INLINE void add_high_expanded(const uint8_t* const (&group)[PAIR], const int8_t* high, const StepSet& set, PairTotals& total) {
    if (!set.has_high[R]) return;
    __m512i sum[PAIR] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, centre[PAIR] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (unsigned blocks = set.has_high[R]; blocks; blocks &= blocks - 1) {
        const int i = __builtin_ctz(blocks);
        const int8_t* const x = high + STEP_COLUMNS * R + BLOCK * i;
        add_scaled_part<E, 0>(group, i, x, sum);
        if constexpr (E::PARTS == 2) add_scaled_part<E, 1>(group, i, x, sum);
        for (int t = 0; t < PAIR; t++) centre[t] = _mm512_dpwssd_epi32(centre[t], E::factors(group[t], i).v, word_of(set.high_sums[R][i]));
    }
    for (int t = 0; t < PAIR; t++) {
        const Lanes whole{_mm512_cvtepi32_ps(_mm512_add_epi32(sum[t], centre_of<E>(centre[t])))};
        add_product(total[t][R], E::shared(group[t]) * all(set.step[R]), whole * all(256.0f));
    }
}

// Adds a group of Expanded to the totals.
template <class E>
DC_INLINE void add_expanded(const uint8_t* const (&group)[PAIR], Fetching& fetching, const StepGroup& x, int row, PairTotals& total) {
    const StepSet& set = x.sets[row / SET_ROWS];
    __m512i sum[PAIR][SET_ROWS] = {};
#pragma GCC unroll 2
    for (int i = 0; i < STEP_BLOCKS; i++) dot_factors<E::FACTORS>(group, i, set.low_sums, sum);
    for (int t = 0; t < PAIR; t++)
        for (int r = 0; r < SET_ROWS; r++) sum[t][r] = centre_of<E>(sum[t][r]);
    for (int i = 0; i < STEP_BLOCKS; i++) {
        fetching.next();
        const int8_t* const low = x.low[row] + BLOCK * i;
        add_scaled_part<E, 0>(group, i, low, sum);
        if constexpr (E::PARTS == 2) add_scaled_part<E, 1>(group, i, low, sum);
    }
    add_sums_of_steps(group, 0, set, sum, total);
    uint32_t flags;
    std::memcpy(&flags, set.has_high, sizeof flags);
    if (!flags) return;
    const int8_t* const high = x.high[row];
    each_of<4>([&](auto r) __attribute__((always_inline)) { add_high_expanded<E, decltype(r)::value>(group, high, set, total); });
}

// Adds rows row .. row + 3 of the panel, which are a set, to y [2][4][16], the sums so far.
template <class E>
__attribute__((noinline)) void pair_steps(const uint8_t* first, const uint8_t* second, int64_t groups, Fetching& fetching, const StepGroup* x, int row,
                                          float* y, float* other_y) {
    Fetching own = fetching;
    PairTotals total;
    for (int r = 0; r < SET_ROWS; r++) total[0][r] = load(y + 16 * r), total[1][r] = load(other_y + 16 * r);
    for (int64_t g = 0; g < groups; g++, x++, first += group_of_blocks_bytes<E>(), second += group_of_blocks_bytes<E>()) {
        const uint8_t* const group[PAIR] = {first, second};
        if constexpr (E::HIGH_APART) add_expanded<E>(group, own, *x, row, total);
        else add_folded<E>(group, own, *x, row, total);
    }
    for (int r = 0; r < SET_ROWS; r++) store(y + 16 * r, total[0][r]), store(other_y + 16 * r, total[1][r]);
    fetching = own;
}

// Adds rows row .. row + 3 of the panel, which are a set, to y [2][4][16], the sums so far: integers, and floats after the `last` groups of tiles whose
// rows have one scale.
template <class E>
__attribute__((noinline)) void pair_row_scale(const uint8_t* first, const uint8_t* second, int64_t groups, bool last, Fetching& fetching, const StepGroup* x,
                                              int row, float* y, float* other_y) {
    if (__builtin_expect(x->sets[row / SET_ROWS].has_high[0], 0)) return pair_steps<E>(first, second, groups, fetching, x, row, y, other_y);
    Fetching own = fetching;
    const Lanes d[PAIR] = {load(reinterpret_cast<const float*>(first)), load(reinterpret_cast<const float*>(second))};
    const StepSet& begin = x->sets[row / SET_ROWS];
    float* const to[PAIR] = {y, other_y};
    __m512i sum[PAIR][SET_ROWS];
    for (int t = 0; t < PAIR; t++)
        for (int r = 0; r < SET_ROWS; r++) sum[t][r] = _mm512_loadu_si512(to[t] + 16 * r);
    for (int64_t g = 0; g < groups; g++, x++, first += group_of_blocks_bytes<E>(), second += group_of_blocks_bytes<E>()) {
        for (int r = 0; r < SET_ROWS; r++) {
            const __m512i less = _mm512_slli_epi32(_mm512_set1_epi32(x->sets[row / SET_ROWS].minus[r]), 7);
            sum[0][r] = _mm512_add_epi32(sum[0][r], less), sum[1][r] = _mm512_add_epi32(sum[1][r], less);
        }
        for (int i = 0; i < STEP_BLOCKS; i++) {
            own.next();
            dot_rows<0, 8, STEP_COLUMNS>(quants_of<E>(first, i), quants_of<E>(second, i), x->low[row] + BLOCK * i, sum);
        }
    }
    for (int t = 0; t < PAIR; t++)
        for (int r = 0; r < SET_ROWS; r++) {
            if (last) store(to[t] + 16 * r, d[t] * all(begin.step[r]) * Lanes{_mm512_cvtepi32_ps(sum[t][r])});
            else _mm512_storeu_si512(to[t] + 16 * r, sum[t][r]);
        }
    fetching = own;
}

#else

template <class F, int HALF>
void fold_half(const uint8_t* group, int i, uint8_t* to) {
    int16_t factors[16][2];
    const Whole pairs = F::factors(group, i);
    std::memcpy(factors, &pairs, sizeof factors);
    for (int k = 16 * HALF; k < 16 * HALF + 16; k++)
        for (int r = 0; r < 16; r++)
            to[k / 4 * 64 + 4 * r + k % 4] = uint8_t(int(F::value(F::code(quants_of<F>(group, i), r, k))) * factors[r][HALF] + Folded<F>::LESS);
}

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
