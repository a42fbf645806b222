// A tile whose scales are whole numbers (WHOLE_SCALES: Q2_K, Q3_K) times few rows of x in steps (StepGroup).
//
// mapping  of 256 columns the two bytes of x (StepGroup) and the scales are integers: each 16 columns' sum times its scale goes onto one
//          integer, and the sums of x times the minimums, or times the scales where a code has a centre, onto another
// cost     of 32 columns some 32 instructions with AVX-512, half of them unpacking, and twice as many with AVX2
// numerics tiles.h. All sums are below 2^31: a code times its scale is at most 45 or, with its centre, 7 * 32; x at most 127 * 257; 256 columns
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

// sum [R] = 16 columns' codes, those of part PART of a block, times R rows' bytes.
template <class F, int PART, int R, int C>
DC_INLINE void sum_words(const uint8_t* quants, const int8_t* x, Sum* sum) {
    const typename F::Dot::Weights w = F::weights(F::template chunk<4 * PART + C>(quants));
    for (int r = 0; r < R; r++) dot_at<typename F::Dot, 16 * PART + 4 * C>(sum[r], w, x + STEP_COLUMNS * r);
}

#if defined(DC_PAIRS)
template <class F, int PART, int R, int HALF>
DC_INLINE void sum_pairs(const uint8_t* quants, const int8_t* x, Sum* sum) {
    PairSum pairs[(R + 1) / 2];
    for (PairSum& pair : pairs) pair = begin_pair<NO_OFFSET>(0, 0);
    const auto columns = [&](auto k) __attribute__((always_inline)) {           // 8 of them
        constexpr int K = decltype(k)::value;
        const Words codes = joined<HALF>(F::template chunk<4 * PART + 2 * K>(quants), F::template chunk<4 * PART + 2 * K + 1>(quants));
        const int8_t* const from = x + 16 * PART + 8 * K;
        for (int r = 0; r < R; r += 2) dot_pair(pairs[r / 2], codes, pair_of(from + STEP_COLUMNS * r, from + STEP_COLUMNS * second_of<R>(r)));
    };
    columns(std::integral_constant<int, 0>()), columns(std::integral_constant<int, 1>());
    for (int r = 0; r < R; r += 2) end_pair<HALF>(pairs[r / 2], sum[r], sum[second_of<R>(r)]);
}
#endif

template <class F, int PART, int R>
DC_INLINE void add_part_of_steps(const uint8_t* quants, const int8_t* x, Whole factor, Whole* total) {
    Sum sum[R];
#if defined(DC_PAIRS)
    if constexpr (R > 1) sum_pairs<F, PART, R, 0>(quants, x, sum), sum_pairs<F, PART, R, 1>(quants, x, sum);
    else
#endif
    {
        for (int r = 0; r < R; r++) sum[r] = F::Dot::template begin<NO_OFFSET>(0);
        sum_words<F, PART, R, 0>(quants, x, sum), sum_words<F, PART, R, 1>(quants, x, sum);
        sum_words<F, PART, R, 2>(quants, x, sum), sum_words<F, PART, R, 3>(quants, x, sum);
    }
    for (int r = 0; r < R; r++) F::Dot::add_scaled(total[r], sum[r], factor);
}

// A block's two sums with some rows: of products times scales, and of x times what its minimums or centre are times.
template <int R>
struct StepSums {
    Whole products[R], x[R];

    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) products[r] = x[r] = UnsignedDot::begin<NO_OFFSET>(0);
    }
};

// What a block's sums of x are times: minimums, or scales, where codes have a centre.
template <class F>
DC_INLINE Whole factors_of_x(const uint8_t* group, int i) {
    if constexpr (F::HAS_MINIMUM) return F::minimum_factors(group, i);
    else return F::factors(group, i);
}

// Sums of 16 columns of a row's low or high bytes; r counts from row `first` of a set on, beyond its last into the next.
using SumsOfSet = int16_t[SET_ROWS][STEP_BLOCKS][2];
struct SumsOfRows {
    const SumsOfSet &own, &next;
    int first;

    const int16_t* of(int r, int i) const { return r + first < SET_ROWS ? own[r + first][i] : next[r + first - SET_ROWS][i]; }
};

template <class F, int R>
DC_INLINE void add_products(const uint8_t* group, int i, const int8_t* x, StepSums<R>& to) {
    const uint8_t* const quants = quants_of<F>(group, i);
    const Whole factors = F::factors(group, i);
    add_part_of_steps<F, 0, R>(quants, x, F::Dot::template factor<0>(factors), to.products);
    add_part_of_steps<F, 1, R>(quants, x, F::Dot::template factor<1>(factors), to.products);
}

template <class F, int R>
DC_INLINE void add_x(const uint8_t* group, int i, const SumsOfRows& x, StepSums<R>& to) {
    const Whole factors = factors_of_x<F>(group, i);
    for (int r = 0; r < R; r++) add_pairs(to.x[r], factors, x.of(r, i));
}

// The high bytes' sums of R rows of a set, from its row `first` on, onto those of all rows, from row `at` on.
template <class F, int R, int ALL>
DC_INLINE void add_high_bytes(const uint8_t* group, int i, const int8_t* high, const StepSet& set, int first, int at, StepSums<ALL>& to) {
    int flags = 0;
    for (int r = 0; r < R; r++) flags |= set.has_high[first + r];
    if (__builtin_expect(!(flags >> i & 1), 1)) return;
    StepSums<R> sums;
    sums.clear();
    add_products<F, R>(group, i, high, sums);
    add_x<F, R>(group, i, {set.high_sums, set.high_sums, first}, sums);
    for (int r = 0; r < R; r++)
        to.products[at + r] = add_fine(sums.products[r], to.products[at + r]), to.x[at + r] = add_fine(sums.x[r], to.x[at + r]);
}

// Rows row .. row + R - 1 of the panel -> y [R][16], as q_rows.
template <class F, int R>
__attribute__((noinline)) void step_rows(const uint8_t* tile, int64_t groups, int64_t ahead, const StepGroup* panel, int row, float* y) {
    constexpr int FIRST = R < SET_ROWS ? R : SET_ROWS, OTHERS = R - FIRST;
    static_assert(F::HAS_MINIMUM || F::OFFSET_SHIFT == 2, "less_four_times");
    constexpr bool X_APART = R > 2;                 // else the sums of more rows do not fit in the registers
    const int first = Q_ROWS % SET_ROWS ? row % SET_ROWS : 0;
    Lanes total[R] = {};
    for (int64_t g = 0; g < groups; g++, tile += group_of_blocks_bytes<F>(), panel++) {
        const StepSet* const set = panel->sets + row / SET_ROWS;
        const SumsOfRows low_sums{set->low_sums, set[OTHERS ? 1 : 0].low_sums, first};
        StepSums<R> sums;
        sums.clear();
        for (int i = 0; i < STEP_BLOCKS; i++) {
            if (ahead) prefetch_block<F>(tile, i, ahead);
            add_products<F, R>(tile, i, panel->low[row] + BLOCK * i, sums);
            if constexpr (!X_APART) add_x<F, R>(tile, i, low_sums, sums);
            add_high_bytes<F, FIRST, R>(tile, i, panel->high[row] + BLOCK * i, *set, first, 0, sums);
            if constexpr (OTHERS) add_high_bytes<F, OTHERS, R>(tile, i, panel->high[row + FIRST] + BLOCK * i, set[1], 0, FIRST, sums);
        }
        for (int i = 0; X_APART && i < STEP_BLOCKS; i++) add_x<F, R>(tile, i, low_sums, sums);
        const Lanes d = F::shared(tile);
        for (int r = 0; r < R; r++) {
            const Lanes step = all(r < FIRST ? set->step[first + r] : set[1].step[r - FIRST]);
            if constexpr (F::HAS_MINIMUM) {
                add_product(total[r], d * step, to_floats(sums.products[r]));
                add_product(total[r], F::shared_minimum(tile) * step, to_floats(sums.x[r]));
            } else add_product(total[r], d * step, to_floats(less_four_times(sums.products[r], sums.x[r])));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + 16 * r, total[r]);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
