// Products of few rows of x with a tile whose scales are whole numbers (WHOLE_SCALES): Q2_K and Q3_K, and IQ2_*, IQ3_* and IQ1_*, whose codes
// are Expanded. x comes in steps (StepGroup). i8_row, whose rows have one scale (ROW_SCALE), has kernels of its own at the end.
//
// mapping  within 256 columns everything is an integer: x, as two bytes a column, and the scales. There are two sums. One is of the products: each
//          16 (or 32) columns' dot product times their scale. The other is of x: each 16 (or 32) columns of x times their minimum or, where codes
//          have a centre, times their scale.
//          Types that are looked up in a grid (HIGH_APART) take the low bytes of x first, for all 256 columns, and then the high bytes; their codes
//          lie in the cache as bytes
// cost     32 columns take some 32 instructions with AVX-512, half of them for unpacking, and twice as many with AVX2
// numerics tiles.h. All sums, of 256 columns, are below 2^31. A code times its scale is at most 45, or 7 * 32 where it has a centre, and x is at
//          most 127 * 257. With a grid a code times its scale is at most 126 * 31, and x at most 127, because each byte has a sum of its own
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

// Calls add(r, w, x, at) for each of a block's chunks FIRST .. FIRST + CHUNKS - 1 and each of R rows: w is the chunk's weights, and the row's bytes
// begin `at` after x.
template <class F, int FIRST, int CHUNKS, int R, class Add>
DC_INLINE void each_product(const uint8_t* quants, const int8_t* x, Add add) {
    each_of<CHUNKS>([&](auto c) __attribute__((always_inline)) {
        constexpr int C = FIRST + decltype(c)::value;
        const typename F::Dot::Weights w = F::weights(F::template chunk<C>(quants));
        for (int r = 0; r < R; r++) add(r, w, x + STEP_COLUMNS * r, std::integral_constant<int, 4 * C>());
    });
}

#if defined(DC_PAIRS)
template <class F, int FIRST, int CHUNKS, int R, int HALF>
DC_INLINE void add_pairs_of_block(const uint8_t* quants, const int8_t* x, PairSum* pairs) {
    each_of<CHUNKS / 2>([&](auto k) __attribute__((always_inline)) {           // 8 columns
        constexpr int C = FIRST + 2 * decltype(k)::value;
        const Words codes = joined<HALF>(F::template chunk<C>(quants), F::template chunk<C + 1>(quants));
        const int8_t* const from = x + 4 * C;
        for (int r = 0; r < R; r += 2) dot_pair(pairs[r / 2], codes, pair_of(from + STEP_COLUMNS * r, from + STEP_COLUMNS * second_of<R>(r)));
    });
}

template <class F, int FIRST, int CHUNKS, int R, int HALF>
DC_INLINE void sum_pairs(const uint8_t* quants, const int8_t* x, Sum* sum) {
    PairSum pairs[(R + 1) / 2];
    for (PairSum& pair : pairs) pair = begin_pair<NO_OFFSET>(0, 0);
    add_pairs_of_block<F, FIRST, CHUNKS, R, HALF>(quants, x, pairs);
    for (int r = 0; r < R; r += 2) end_pair<HALF>(pairs[r / 2], sum[r], sum[second_of<R>(r)]);
}
#endif

template <class F, int FIRST, int CHUNKS, int R>
DC_INLINE void add_part_of_steps(const uint8_t* quants, const int8_t* x, Whole factor, Whole* total) {
    using Dot = typename F::Dot;
    if constexpr (SCALES_PAIRS<Dot>)
        each_product<F, FIRST, CHUNKS, R>(quants, x, [&](int r, const auto& w, const int8_t* from, auto at) __attribute__((always_inline)) {
            Dot::dot_scaled(total[r], w, from + decltype(at)::value, factor);
        });
    else {
        Sum sum[R];
#if defined(DC_PAIRS)
        if constexpr (R > 1) sum_pairs<F, FIRST, CHUNKS, R, 0>(quants, x, sum), sum_pairs<F, FIRST, CHUNKS, R, 1>(quants, x, sum);
        else
#endif
        {
            for (int r = 0; r < R; r++) sum[r] = Dot::template begin<NO_OFFSET>(0);
            each_product<F, FIRST, CHUNKS, R>(quants, x, [&](int r, const auto& w, const int8_t* from, auto at) __attribute__((always_inline)) {
                dot_at<Dot, decltype(at)::value>(sum[r], w, from);
            });
        }
        for (int r = 0; r < R; r++) Dot::template add_scaled<F::HIGH_APART>(total[r], sum[r], factor);
    }
}

// The two sums of R rows: products times scales, and x times what `factors_of_x` gives.
template <int R>
struct StepSums {
    Whole products[R], x[R];

    __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) products[r] = x[r] = UnsignedDot::begin<NO_OFFSET>(0);
    }
};

// What a block's sums of x are multiplied by: the minimums or, where codes have a centre, the scales.
template <class F>
DC_INLINE Whole factors_of_x(const uint8_t* group, int i) {
    if constexpr (F::HAS_MINIMUM) return F::minimum_factors(group, i);
    else return F::factors(group, i);
}

// Sums of x, of each row and 16 columns: of its low bytes or of its high bytes. In SumsOfRows row r is row `first` + r of a set and, beyond
// that set's last row, a row of the next set.
using SumsOfSet = int16_t[SET_ROWS][STEP_BLOCKS][2];
struct SumsOfRows {
    const SumsOfSet &own, &next;
    int first;

    const int16_t* of(int r, int i) const { return r + first < SET_ROWS ? own[r + first][i] : next[r + first - SET_ROWS][i]; }
};

template <class F, int R>
DC_INLINE void add_products(const uint8_t* group, int i, const int8_t* x, StepSums<R>& to) {
    const uint8_t* const quants = quants_of<F>(group, i);
    const Whole factors = F::factors(group, i), first = F::Dot::template factor<0>(factors);
    if constexpr (F::PARTS == 1 && !F::Dot::HALFWAY) add_part_of_steps<F, 0, 8, R>(quants, x, first, to.products);
    else {
        add_part_of_steps<F, 0, 4, R>(quants, x, first, to.products);
        add_part_of_steps<F, 4, 4, R>(quants, x, F::Dot::template factor<1>(factors), to.products);
    }
}

template <class F, int R>
DC_INLINE void add_x(const uint8_t* group, int i, const SumsOfRows& x, StepSums<R>& to) {
    const Whole factors = factors_of_x<F>(group, i);
    for (int r = 0; r < R; r++) add_pairs(to.x[r], factors, x.of(r, i));
}

// A bit for each block: does any of R rows of a set, from row `first` on, have high bytes there?
template <int R>
DC_INLINE int blocks_with_high_bytes(const StepSet& set, int first) {
    int flags = 0;
    for (int r = 0; r < R; r++) flags |= set.has_high[first + r];
    return flags;
}

// Adds the sums of the high bytes of block i: those of R rows of a set, from its row `first` on, to `to`, from row `at` on.
template <class F, int R, int ALL>
DC_INLINE void add_high_bytes(const uint8_t* group, int i, const int8_t* high, const StepSet& set, int first, int at, StepSums<ALL>& to) {
    if (__builtin_expect(!(blocks_with_high_bytes<R>(set, first) >> i & 1), 1)) return;
    StepSums<R> sums;
    sums.clear();
    add_products<F, R>(group, i, high, sums);
    add_x<F, R>(group, i, {set.high_sums, set.high_sums, first}, sums);
    for (int r = 0; r < R; r++)
        to.products[at + r] = add_fine(sums.products[r], to.products[at + r]), to.x[at + r] = add_fine(sums.x[r], to.x[at + r]);
}

// Adds to a group's totals all that the high bytes of R rows give, for types whose high bytes have a sum of their own (HIGH_APART). The sum is
// multiplied by 256, not the scale, which might become larger than any float32.
template <class F, int R>
DC_INLINE void add_high_apart(const uint8_t* group, const int8_t* high, const StepSet& set, int first, Lanes d, Lanes* total) {
    int flags = blocks_with_high_bytes<R>(set, first);
    if (__builtin_expect(!flags, 1)) return;
    StepSums<R> sums;
    sums.clear();
    for (; flags; flags &= flags - 1) {
        const int i = __builtin_ctz(unsigned(flags));
        add_products<F, R>(group, i, high + BLOCK * i, sums);
        add_x<F, R>(group, i, {set.high_sums, set.high_sums, first}, sums);
    }
    for (int r = 0; r < R; r++)
        add_product(total[r], d * all(set.step[first + r]), to_floats(less_shifted<F::OFFSET_SHIFT>(sums.products[r], sums.x[r])) * all(256.0f));
}

// Rows row .. row + R - 1 of the panel -> y [R][16], as q_rows. Types that are expanded part by part find in y the sums so far.
template <class F, int R>
__attribute__((noinline)) void step_rows(const uint8_t* tile, int64_t groups, int64_t ahead, const StepGroup* panel, int row, float* y) {
    constexpr int FIRST = R < SET_ROWS ? R : SET_ROWS, OTHERS = R - FIRST;
    constexpr bool X_APART = R > 2;                 // else the sums of more rows do not fit in the registers
    const int first = Q_ROWS % SET_ROWS ? row % SET_ROWS : 0;
    Lanes total[R] = {};
    if constexpr (F::EXPANDS)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[r] = load(y + 16 * r);
    for (int64_t g = 0; g < groups; g++, tile += group_of_blocks_bytes<F>(), panel++) {
        const StepSet* const set = panel->sets + row / SET_ROWS;
        const SumsOfRows low_sums{set->low_sums, set[OTHERS ? 1 : 0].low_sums, first};
        StepSums<R> sums;
        sums.clear();
        for (int i = 0; i < STEP_BLOCKS; i++) {
            if (ahead) prefetch_block<F>(tile, i, ahead);
            add_products<F, R>(tile, i, panel->low[row] + BLOCK * i, sums);
            if constexpr (!X_APART) add_x<F, R>(tile, i, low_sums, sums);
            if constexpr (!F::HIGH_APART) add_high_bytes<F, FIRST, R>(tile, i, panel->high[row] + BLOCK * i, *set, first, 0, sums);
            if constexpr (!F::HIGH_APART && OTHERS) add_high_bytes<F, OTHERS, R>(tile, i, panel->high[row + FIRST] + BLOCK * i, set[1], 0, FIRST, sums);
        }
        for (int i = 0; X_APART && i < STEP_BLOCKS; i++) add_x<F, R>(tile, i, low_sums, sums);
        const Lanes d = F::shared(tile);
        for (int r = 0; r < R; r++) {
            const Lanes step = all(r < FIRST ? set->step[first + r] : set[1].step[r - FIRST]);
            if constexpr (F::HAS_MINIMUM) {
                add_product(total[r], d * step, to_floats(sums.products[r]));
                add_product(total[r], F::shared_minimum(tile) * step, to_floats(sums.x[r]));
            } else add_product(total[r], d * step, to_floats(less_shifted<F::OFFSET_SHIFT>(sums.products[r], sums.x[r])));
        }
        if constexpr (F::HIGH_APART) add_high_apart<F, FIRST>(tile, panel->high[row], *set, first, d, total);
        if constexpr (F::HIGH_APART && OTHERS) add_high_apart<F, OTHERS>(tile, panel->high[row + FIRST], set[1], 0, d, total + FIRST);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + 16 * r, total[r]);
}

// ---- one scale for a row

// Adds a group's codes times 256 bytes of each of R rows to their sums. `ahead`, unless 0: prefetch what lies that many bytes further on.
#if defined(DC_PAIRS)
template <class F, int R>
struct RowSums {                        // of two rows each, of the first 8 outputs and of the others
    PairSum first[(R + 1) / 2], others[(R + 1) / 2];

    __attribute__((always_inline)) explicit RowSums(const int32_t (&minus)[R]) {
        for (int r = 0; r < R; r += 2) first[r / 2] = others[r / 2] = begin_pair<F::OFFSET_SHIFT>(minus[r], minus[second_of<R>(r)]);
    }
    __attribute__((always_inline)) void add(const uint8_t* group, int64_t ahead, const int8_t* x) {
        for (int i = 0; i < STEP_BLOCKS; i++) {
            if (ahead) prefetch_block<F>(group, i, ahead);
            add_pairs_of_block<F, 0, 8, R, 0>(quants_of<F>(group, i), x + BLOCK * i, first);
            add_pairs_of_block<F, 0, 8, R, 1>(quants_of<F>(group, i), x + BLOCK * i, others);
        }
    }
    __attribute__((always_inline)) void end(const int32_t (&)[R], Whole* whole) {
        for (int r = 0; r < R; r += 2) {
            end_pair<0>(first[r / 2], whole[r], whole[second_of<R>(r)]);
            end_pair<1>(others[r / 2], whole[r], whole[second_of<R>(r)]);
        }
    }
};
#else
template <class F, int R>
struct RowSums {
    Sum sum[R];

    __attribute__((always_inline)) explicit RowSums(const int32_t (&minus)[R]) {
        for (int r = 0; r < R; r++) sum[r] = F::Dot::template begin<F::OFFSET_SHIFT>(minus[r]);
    }
    __attribute__((always_inline)) void add(const uint8_t* group, int64_t ahead, const int8_t* x) {
        for (int i = 0; i < STEP_BLOCKS; i++) {
            if (ahead) prefetch_block<F>(group, i, ahead);
            each_product<F, 0, 8, R>(quants_of<F>(group, i), x + BLOCK * i, [&](int r, const auto& w, const int8_t* from, auto at) __attribute__((always_inline)) {
                dot_at<typename F::Dot, decltype(at)::value>(sum[r], w, from);
            });
        }
    }
    __attribute__((always_inline)) void end(const int32_t (&minus)[R], Whole* whole) {
        for (int r = 0; r < R; r++) whole[r] = F::Dot::template end<F::OFFSET_SHIFT>(sum[r], minus[r]);
    }
};
#endif

// R rows of a group, which may lie in two sets.
template <int R>
struct RowsOfGroup {
    static constexpr int FIRST = R < SET_ROWS ? R : SET_ROWS;
    const StepSet* set;
    int first;

    RowsOfGroup(const StepGroup* panel, int row) : set(panel->sets + row / SET_ROWS), first(Q_ROWS % SET_ROWS ? row % SET_ROWS : 0) {}
    const StepSet& of(int r) const { return r < FIRST ? set[0] : set[1]; }
    int place(int r) const { return r < FIRST ? first + r : r - FIRST; }
    float step(int r) const { return of(r).step[place(r)]; }
    int32_t minus(int r) const { return of(r).minus[place(r)]; }
    bool has_high(int r) const { return of(r).has_high[place(r)]; }
};

// One group after another, each with a step of its own and two bytes a column.
template <class F, int R>
__attribute__((noinline)) void fine_row_scale_rows(const uint8_t* tile, int64_t groups, int64_t ahead, const StepGroup* panel, int row, float* y) {
    Lanes total[R] = {};
    for (int64_t g = 0; g < groups; g++, tile += group_of_blocks_bytes<F>(), panel++) {
        const RowsOfGroup<R> rows(panel, row);
        int32_t minus[R];                           // of both bytes
        for (int r = 0; r < R; r++) minus[r] = rows.minus(r);
        const int32_t nothing[R] = {};
        Whole low[R], high[R];
        RowSums<F, R> sums(minus), more(nothing);
        sums.add(tile, ahead, panel->low[row]), sums.end(minus, low);
        more.add(tile, 0, panel->high[row]), more.end(nothing, high);
        const Lanes d = F::shared(tile);
        for (int r = 0; r < R; r++) add_product(total[r], d * all(rows.step(r)), to_floats(add_fine(high[r], low[r])));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + 16 * r, total[r]);
}

// Rows row .. row + R - 1 of the panel -> y [R][16], as q_rows.
template <class F, int R>
__attribute__((noinline)) void row_scale_rows(const uint8_t* tile, int64_t groups, int64_t ahead, const StepGroup* panel, int row, float* y) {
    if (__builtin_expect(RowsOfGroup<R>(panel, row).has_high(0), 0)) return fine_row_scale_rows<F, R>(tile, groups, ahead, panel, row, y);
    int32_t minus[R] = {};
    for (int64_t g = 0; g < groups; g++)
        for (int r = 0; r < R; r++) minus[r] += RowsOfGroup<R>(panel + g, row).minus(r);
    RowSums<F, R> sums(minus);
    for (int64_t g = 0; g < groups; g++) sums.add(tile + g * group_of_blocks_bytes<F>(), ahead, panel[g].low[row]);
    Whole whole[R];
    sums.end(minus, whole);
    const Lanes d = F::shared(tile);
    for (int r = 0; r < R; r++) store(y + 16 * r, d * all(RowsOfGroup<R>(panel, row).step(r)) * to_floats(whole[r]));
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
