// op       multiply: out (T, N) = residual + activation(norm(x) (T, K) W^T + bias), W in tiles (cpu/tiles/tiles.h)
// shapes   x in panels of 16 rows (panels.inl.h); W (N, K) of any type in formats.h, or floats; out f32
// mapping  16 lanes = the 16 rows of a tile; a kernel holds the sums of one tile (float types: two) and up to 8 rows of x in
//          registers, so a tile is unpacked once for 8 rows. The first group to meet a tile streams it from memory, prefetching;
//          then it stays in the L1 cache while as many groups pass by as a quarter of the L2 cache holds. Of float tiles that
//          are 128 columns at a time, widened to 32 bits
// cost     decoding: a tile's bytes are read once for up to 8 rows; up to 4 rows memory is the bound.
//          Prefill: the multipliers are the bound. A row and a 16 x 32 block of q4_1 take 11 of their instructions, and 8 more where
//          one of 4 rows has a fine plane: that is every third block, and a quarter of the time. (Lists of each row's fine blocks,
//          multiplied after the others, would take longer for Q8_0 and shorter with AVX2.)
//          bench/figures/kernels.json has the figures
// numerics cpu/tiles/tiles.h. Integer sums are exact and each scale and minimum is one fused multiply-add, so bits are equal
//          everywhere
#include "cpu/lanes.h"
#include "cpu/tiles/expanded.inl.h"
#include "cpu/tiles/finish.inl.h"
#include "cpu/tiles/folded.inl.h"
#include "cpu/tiles/formats.h"
#include "cpu/tiles/looked_up_row.inl.h"
#include "cpu/tiles/panels.inl.h"
#include "cpu/tiles/steps.inl.h"
#include "cpu/tiles/tile_pairs.inl.h"
#include "cpu/tiles/tiles.h"

namespace dc {
namespace DC_ISA {
namespace {

// ---- one q tile times R rows of a panel. Kernels are never inlined: in their caller GCC gives them half the registers.

// The x8 or the fine values of some rows of a block. More rows than a set holds begin with a set's first row.
struct Plane {
    const int8_t* x;
    const int32_t *minus, *other_minus;         // [PARTS][SET_ROWS], from the first row on; the same of the next set

    const int8_t* values(int r) const { return x + r * BLOCK; }
    const int32_t& minus_of(int part, int r) const {        // by r % SET_ROWS, GCC 12 with both sanitizers reads row 4's for 5, 6, 7
        return r < SET_ROWS ? minus[part * SET_ROWS + r] : other_minus[part * SET_ROWS + r - SET_ROWS];
    }
};

// x: of the first row; r: its place in the set.
template <int PARTS>
DC_INLINE Plane plane_of(const int8_t* x, const PanelSet* set, int r) {
    if constexpr (PARTS == 1) return {x, set->minus + r, set[1].minus};
    else return {x, set->half_minus[0] + r, set[1].half_minus[0]};
}
template <int PARTS>
DC_INLINE Plane fine_plane_of(const int8_t* x, const PanelSet* set, int r) {
    return {x + offsetof(PanelBlock, fine), set->fine_minus[PARTS - 1] + r, nullptr};
}

// sums [PARTS][R] += a block's codes times R rows of x.
template <class F, int R, int C>
DC_INLINE void sum_chunk(const uint8_t* quants, const Plane& plane, Sum* sum) {
    Words low, high;
    F::template unpack<C>(quants, low, high);
    const typename F::Dot::Weights first = F::weights(low);
    for (int r = 0; r < R; r++) dot_at<typename F::Dot, F::NEXT * C>(sum[r], first, plane.values(r));
    const typename F::Dot::Weights second = F::weights(high);
    for (int r = 0; r < R; r++) dot_at<typename F::Dot, F::SECOND + F::NEXT * C>(sum[(F::PARTS - 1) * R + r], second, plane.values(r));
}

#if defined(DC_PAIRS)

// Columns 8 K .. 8 K + 7:
template <class F, int R, int HALF, int K>
DC_INLINE void sum_columns(const uint8_t* quants, const Plane& plane, PairSum* sum) {
    Words low, high, next_low, next_high, codes;
    if constexpr (F::SECOND == 4) {
        F::template unpack<K>(quants, low, high);
        codes = joined<HALF>(F::weights(low), F::weights(high));
    } else {
        F::template unpack<K % 2 * 2>(quants, low, high), F::template unpack<K % 2 * 2 + 1>(quants, next_low, next_high);
        codes = K < 2 ? joined<HALF>(F::weights(low), F::weights(next_low)) : joined<HALF>(F::weights(high), F::weights(next_high));
    }
    for (int r = 0; r < R; r += 2) dot_pair(sum[r / 2], codes, pair_of(plane.values(r) + 8 * K, plane.values(second_of<R>(r)) + 8 * K));
}

template <class F, int R, int HALF, int PART>
DC_INLINE void sum_part(const uint8_t* quants, const Plane& plane, Whole* whole) {
    PairSum sum[(R + 1) / 2];
    for (int r = 0; r < R; r += 2) sum[r / 2] = begin_pair<F::OFFSET_SHIFT>(plane.minus_of(PART, r), plane.minus_of(PART, second_of<R>(r)));
    if constexpr (PART == 0) sum_columns<F, R, HALF, 0>(quants, plane, sum), sum_columns<F, R, HALF, 1>(quants, plane, sum);
    if constexpr (PART == F::PARTS - 1) sum_columns<F, R, HALF, 2>(quants, plane, sum), sum_columns<F, R, HALF, 3>(quants, plane, sum);
    for (int r = 0; r < R; r += 2) end_pair<HALF>(sum[r / 2], whole[PART * R + r], whole[PART * R + second_of<R>(r)]);
}

template <class F, int R, int HALF>
DC_INLINE void sum_half(const uint8_t* quants, const Plane& plane, Whole* whole) {
    sum_part<F, R, HALF, 0>(quants, plane, whole);
    if constexpr (F::PARTS > 1) sum_part<F, R, HALF, 1>(quants, plane, whole);
}

#endif

// whole [PARTS][R] = a block's sums with R rows of x.
template <class F, int R>
DC_INLINE void sum_block(const uint8_t* quants, const Plane& plane, Whole* whole) {
#if defined(DC_PAIRS)
    if constexpr (R > 1) {
        sum_half<F, R, 0>(quants, plane, whole), sum_half<F, R, 1>(quants, plane, whole);
        return;
    }
#endif
    Sum sum[F::PARTS * R];
    for (int p = 0; p < F::PARTS; p++)
        for (int r = 0; r < R; r++) sum[p * R + r] = F::Dot::template begin<F::OFFSET_SHIFT>(plane.minus_of(p, r));
    sum_chunk<F, R, 0>(quants, plane, sum), sum_chunk<F, R, 1>(quants, plane, sum);
    if constexpr (F::Dot::HALFWAY)
        for (int r = 0; r < R; r++) {
            whole[r] = F::Dot::template end<NO_OFFSET>(sum[r], 0);
            sum[r] = F::Dot::template begin<NO_OFFSET>(0);
        }
    sum_chunk<F, R, 2>(quants, plane, sum), sum_chunk<F, R, 3>(quants, plane, sum);
    for (int p = 0; p < F::PARTS; p++)
        for (int r = 0; r < R; r++) {
            const Whole last = F::Dot::template end<F::OFFSET_SHIFT>(sum[p * R + r], plane.minus_of(p, r));
            if constexpr (F::Dot::HALFWAY) whole[r] = F::Dot::add(whole[r], last);
            else whole[p * R + r] = last;
        }
}

template <int R>
DC_INLINE bool any_fine(const uint8_t* has_fine) {
    uint64_t flags = 0;
    std::memcpy(&flags, has_fine, R);
    return flags != 0;
}

// What a block's sums are multiplied by.
template <class F>
struct Scales { Lanes of[F::PARTS]; };

template <class F>
DC_INLINE Scales<F> scales_of(const uint8_t* group, int i) {
    Scales<F> d;
    for (int p = 0; p < F::PARTS; p++) d.of[p] = F::scale(group, i, p);
    return d;
}

// Adds a plane's sums of R rows to their totals. x_scales are the rows' scales of x; `apart` sums lie from one part to the next.
template <class F, int R, bool FINE>
DC_INLINE void add_sums(const Scales<F>& d, const float* x_scales, const Whole* whole, int apart, Lanes* total) {
    for (int p = 0; p < F::PARTS; p++) {
        const Lanes own = FINE ? d.of[p] * all(1.0f / 256) : d.of[p];
        for (int r = 0; r < R; r++) add_product(total[r], own * all(x_scales[r]), to_floats(whole[p * apart + r]));
    }
}

// Adds a block's sums of R rows of a set to the rows' totals, and those of the fine plane if one of these rows has it. `apart` sums
// lie from one part of `whole` to the next. A row without a fine plane gets the same bits whether or not another row has one: with
// FINE_APART its fine plane adds 0, and otherwise d * dx * sum is (d / 256) * dx * (256 * sum), to the bit.
template <class F, int R>
DC_INLINE void add_block(const uint8_t* quants, const int8_t* x, const PanelSet* set, int first, const Scales<F>& d, Whole* whole, int apart,
                         Lanes* total) {
    const bool fine = any_fine<R>(set->has_fine + first);
    Whole rest[F::PARTS * R];
    if (F::FINE_APART || !fine) add_sums<F, R, false>(d, set->scale + first, whole, apart, total);
    if (!fine) return;
#if !defined(__AVX512F__)
    asm("" : "+r"(quants));             // unpacked again: there are no registers to keep the first plane's weights in
#endif
    sum_block<F, R>(quants, fine_plane_of<F::PARTS>(x, set, first), rest);
    if constexpr (!F::FINE_APART)
        for (int p = 0; p < F::PARTS; p++)
            for (int r = 0; r < R; r++) rest[p * R + r] = add_fine(whole[p * apart + r], rest[p * R + r]);
    add_sums<F, R, true>(d, set->scale + first, rest, R, total);
}

// Rows row .. row + R - 1 of the panel -> y [R][16]. More rows than a set holds begin with a set's first row. `ahead`, unless 0:
// prefetch what lies that many bytes further on.
template <class F, int R>
__attribute__((noinline)) void q_rows(const uint8_t* tile, int64_t blocks, int64_t ahead, const PanelBlock* panel, int row,
                                      float* y) {
    constexpr int FIRST = R < SET_ROWS ? R : SET_ROWS, OTHERS = R - FIRST;
    const int first = Q_ROWS % SET_ROWS ? row % SET_ROWS : 0;
    const int8_t* x = panel->x[row];
    const PanelSet* set = panel->sets + row / SET_ROWS;
    Lanes total[R] = {};                            // zeroed by a loop, GCC 12 would keep it in memory
    for (int64_t b = 0; b < blocks; b++, x = next_block(x), set = next_block(set)) {
        const int64_t i = b % F::BLOCKS;
        const uint8_t* group = tile + b / F::BLOCKS * group_of_blocks_bytes<F>();
        const uint8_t* quants = quants_of<F>(group, i);
        if (ahead) prefetch_block<F>(group, i, ahead);
        Whole whole[F::PARTS * R];
        sum_block<F, R>(quants, plane_of<F::PARTS>(x, set, first), whole);
        const Scales<F> d = scales_of<F>(group, int(i));
        add_block<F, FIRST>(quants, x, set, first, d, whole, R, total);
        if constexpr (OTHERS) add_block<F, OTHERS>(quants, x + FIRST * BLOCK, set + 1, 0, d, whole + FIRST, R, total + FIRST);
        if (!F::HAS_MINIMUM) continue;
        const Lanes m = minimum_of<F>(group, int(i), 0);
        for (int r = 0; r < FIRST; r++) add_product(total[r], m, all(set->product[first + r]));
        for (int r = FIRST; r < R; r++) add_product(total[r], m, all(set[1].product[r - FIRST]));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + 16 * r, total[r]);
}

// ---- T float tiles, tile_bytes apart, times R rows of a panel

template <class W, int T, int R>
DC_INLINE void float_columns(const uint8_t* tile, int64_t tile_bytes, const float* x, int count, Lanes (&total)[T][R]) {
#pragma GCC unroll 16
    for (int k = 0; k < count; k++) {
        Lanes w[T];
        for (int t = 0; t < T; t++) w[t] = load(reinterpret_cast<const W*>(tile + t * tile_bytes) + 16 * k);
        for (int r = 0; r < R; r++) {
            const Lanes shared = all(x[16 * r + k]);
            for (int t = 0; t < T; t++) total[t][r] = fma(w[t], shared, total[t][r]);
        }
    }
}

// Some columns of tiles that lie tile_bytes apart, and of a group's panel. `ahead`, unless 0: prefetch what lies that many bytes further on.
struct FloatColumns {
    const uint8_t* tile;
    int64_t tile_bytes, count, ahead;
    const float* panel;
};

// T tiles times rows row .. row + R - 1 of the panel are added to y [T][R][16].
template <class W, int T, int R>
__attribute__((noinline)) void float_rows(const FloatColumns& columns, int row, float* y) {
    constexpr int64_t STEP = 256 * sizeof(W), PANEL_STEP = 16 * GROUP_ROWS;
    const int64_t bytes = columns.tile_bytes, ahead = columns.ahead;
    const uint8_t* tile = columns.tile;
    const float* x = columns.panel + 16 * row;
    Lanes total[T][R];
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) total[t][r] = load(y + (t * GROUP_ROWS + r) * 16);
    int64_t left = columns.count;
    for (; left >= 16; left -= 16, tile += STEP, x += PANEL_STEP) {
        if (ahead) {                                // within the tile, then within the one that follows these T
            const uint8_t* next = tile + ahead + (left * 16 * int64_t(sizeof(W)) > ahead ? 0 : (T - 1) * bytes);
            for (int t = 0; t < T; t++) fetch_once(next + t * bytes, STEP);
        }
        float_columns<W, T, R>(tile, bytes, x, 16, total);
    }
    for (int k = 0; k < left; k++) float_columns<W, T, R>(tile + k * (STEP / 16), bytes, x + k, 1, total);
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) store(y + (t * GROUP_ROWS + r) * 16, total[t][r]);
}

// ---- the kernels of a type, by rows of x

using FloatKernel = void (*)(const FloatColumns&, int, float*);

template <class W, int T, int R = FLOAT_ROWS>
FloatKernel pick_float(int rows) {
    if constexpr (R == 0) return nullptr;
    else return rows == R ? &float_rows<W, T, R> : pick_float<W, T, R - 1>(rows);
}

template <class W>
FloatKernel pick_float(int tiles, int rows) { return tiles == PAIR ? pick_float<W, PAIR>(rows) : pick_float<W, 1>(rows); }

template <class F, int R>
constexpr auto kernel_of() {
    if constexpr (F::ROW_SCALE) return &row_scale_rows<F, R>;
    else if constexpr (F::WHOLE_SCALES) return &step_rows<F, R>;
    else return &q_rows<F, R>;
}

template <class F, int... ROWS>
auto pick_q(int rows, std::integer_sequence<int, ROWS...>) {
    static constexpr decltype(kernel_of<F, 1>()) kernels[] = {kernel_of<F, rows_at_once(ROWS + 1)>()...};
    return kernels[rows - 1];
}

template <class F>
auto q_kernel(int rows) { return pick_q<F>(rows, std::make_integer_sequence<int, Q_ROWS>()); }

// A tile times n rows of a panel, from its row `row` on.
void multiply_tile(const Tiles& w, const TilePlace& tile, int64_t ahead, const uint8_t* panel, int row, int n, float* y) {
    with_format(tile.type, [&](auto format) {
        using F = decltype(format);
        if constexpr (F::EXPANDS) return;           // these go by multiply_expanded
        else if constexpr (F::WHOLE_SCALES)
            q_kernel<F>(n)(tile.memory, w.columns / STEP_COLUMNS, ahead, steps_of(panel, w.panels, w.columns), row, y);
        else
            q_kernel<F>(n)(tile.memory, w.columns / BLOCK, ahead, reinterpret_cast<const PanelBlock*>(panel), row, y);
    });
}

FloatKernel float_kernel(Weight type, int tiles, int rows) {
    return type == Weight::f32   ? pick_float<float>(tiles, rows)
           : type == Weight::f16 ? pick_float<Half>(tiles, rows)
                                 : pick_float<Bfloat>(tiles, rows);
}

// ---- multiply

// Some tiles, one after another, times the rows of one group.
struct Meeting {
    const Tiles& w;
    int64_t tile;
    int64_t tile_bytes;
    int tiles;
    const uint8_t* panel;
    int64_t group;
    int rows;
    int64_t ahead;
};

void multiply_blocks(const Meeting& m, Sums& out) {
    const int first = int(m.group % (PANEL_ROWS / GROUP_ROWS)) * GROUP_ROWS;
    for (int row = 0, n; row < m.rows; row += n) {
        n = rows_at_once(int(least(Q_ROWS, m.rows - row)));
        for (int t = 0; t < m.tiles; t++)
            multiply_tile(m.w, tile_of(m.w, m.tile + t, m.tile_bytes), row ? 0 : m.ahead, m.panel, first + row, n, out.y[t][row]);
    }
}

// ---- types whose codes are made just before the product: some columns of a tile at once, for all rows that meet the tile

// Some tiles, one after another, and the groups of rows [first, end) that meet them: at most EXPANDED_GROUPS.
struct Gathering {
    const Product& job;
    int64_t tile, tile_bytes;
    int tiles;
    int64_t first, end;

    const uint8_t* panel(int64_t group) const { return panel_of(job, group / (PANEL_ROWS / GROUP_ROWS)); }
    const StepGroup* steps(int64_t group) const { return steps_of(panel(group), job.tiles.panels, job.tiles.columns); }
    int rows(int64_t group) const { return int(least(GROUP_ROWS, job.rows - group * GROUP_ROWS)); }
    int64_t count() const { return (end - first - 1) * GROUP_ROWS + rows(end - 1); }
};

// How many groups of rows meet a tile's codes once these are made, and how many groups of the tile's blocks, of 256 columns each, have their codes
// in the cache together. With 4 and 1 a prompt's products took 2 to 8 % longer.
constexpr int64_t EXPANDED_GROUPS = 16, EXPANDED_TOGETHER = 4;
constexpr int64_t FLOAT_COLUMNS = 128;              // of two tiles in 32 bits: half of the L1 cache

#if defined(__AVX512F__)

// The form that two tiles are brought into before many rows meet them: Expanded, Folded, or Unpacked.
template <class F>
constexpr auto pair_form() {
    if constexpr (F::EXPANDS) return Expanded<F>();
    else if constexpr (F::WHOLE_SCALES) return Folded<F>();
    else return UnpackedOf<F>();
}

template <class F>
Expander pair_expander() {
    if constexpr (F::EXPANDS) return expander<F>();
    else if constexpr (F::ROW_SCALE) return copy_group<F>;
    else if constexpr (F::WHOLE_SCALES) return fold_group<F>;
    else return unpack_group<F>;
}

// Adds the products of two tiles to the sums of each group. It is for so many rows that q_rows would take longer.
template <class F>
void multiply_expanded_pair(const Gathering& g, const uint8_t* first, const uint8_t* second, Sums* sums) {
    using E = decltype(pair_form<F>());
    constexpr int64_t BYTES = group_of_blocks_bytes<F>(), EXPANDED_BYTES = group_of_blocks_bytes<E>(), TOGETHER = PAIR_BLOCKS / F::BLOCKS;
    alignas(64) uint8_t expanded[PAIR][TOGETHER * EXPANDED_BYTES];
    const Expander expand = pair_expander<F>();
    for (int64_t group = g.first; group < g.end; group++) std::memset(sums[group - g.first].y, 0, sizeof sums->y);
    const int64_t blocks = g.job.tiles.columns / BLOCK, tile_groups = (blocks + F::BLOCKS - 1) / F::BLOCKS, sets = (g.count() + SET_ROWS - 1) / SET_ROWS;
    for (int64_t at = 0, count; at < tile_groups; at += count) {
        count = least(TOGETHER, tile_groups - at);
        const int64_t b = at * F::BLOCKS, own_blocks = least(count * F::BLOCKS, blocks - b);
        const bool last = at + count == tile_groups;
        for (int64_t i = 0; i < count; i++, first += BYTES, second += BYTES)
            expand(first, expanded[0] + i * EXPANDED_BYTES, 0), expand(second, expanded[1] + i * EXPANDED_BYTES, 0);
        // All rows pass through the first cache before the next codes are made. So the bytes that those come from are fetched into the second
        // cache, a part with each set of rows.
        const int64_t next = last ? (PAIR - 1) * g.tile_bytes : 0, passes = sets * own_blocks;
        Fetching fetching{{first + next, second + next}, (TOGETHER * BYTES + passes - 1) / passes};
        for (int64_t group = g.first; group < g.end; group++) {
            const int place = int(group % (PANEL_ROWS / GROUP_ROWS)) * GROUP_ROWS;
            Sums& own = sums[group - g.first];
            for (int row = 0; row < g.rows(group); row += SET_ROWS) {
                if (last) fetch_outputs(g.job, g.tile, group * GROUP_ROWS + row, int(least(SET_ROWS, g.rows(group) - row)));
                if constexpr (F::ROW_SCALE)
                    pair_row_scale<E>(expanded[0], expanded[1], count, last, fetching, g.steps(group) + b / STEP_BLOCKS, place + row, own.y[0][row], own.y[1][row]);
                else if constexpr (F::WHOLE_SCALES)
                    pair_steps<E>(expanded[0], expanded[1], count, fetching, g.steps(group) + b / STEP_BLOCKS, place + row, own.y[0][row], own.y[1][row]);
                else
                    pair_rows<E>(expanded[0], expanded[1], own_blocks, fetching, reinterpret_cast<const PanelBlock*>(g.panel(group)) + b, place + row,
                                 own.y[0][row], own.y[1][row]);
            }
        }
    }
}

#endif

// Whether they went together.
template <class F>
bool multiplied_as_pair([[maybe_unused]] const Gathering& g, [[maybe_unused]] Weight first, [[maybe_unused]] Sums* sums) {
#if defined(__AVX512F__)
    if (g.tiles < PAIR || g.count() < PAIR_LEAST_ROWS<F>) return false;
    const TilePlace own = tile_of(g.job.tiles, g.tile, g.tile_bytes), other = tile_of(g.job.tiles, g.tile + 1, g.tile_bytes);
    if (other.type != first) return false;
    multiply_expanded_pair<F>(g, own.memory, other.memory, sums);
    return true;
#else
    return false;
#endif
}

// Tile t of these onto the sums of each group.
template <class F>
void multiply_expanded(const Gathering& g, int t, const uint8_t* tile, Sums* sums) {
    static_assert(F::WHOLE_SCALES && F::BLOCKS == STEP_BLOCKS, "step_rows");
    const int64_t groups = g.job.tiles.columns / STEP_COLUMNS;
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const bool by_row = F::NIBBLES || !uses_vbmi();
#else
    constexpr bool by_row = true;
#endif
    if (by_row && g.end == g.first + 1 && g.rows(g.first) == 1) {
        const int row = int(g.first % (PANEL_ROWS / GROUP_ROWS)) * GROUP_ROWS;
        return looked_up_row<F>(tile, groups, g.steps(g.first), row, sums->y[t][0]);
    }
#endif
    constexpr int64_t BYTES = group_of_blocks_bytes<F>(), EXPANDED_BYTES = group_of_blocks_bytes<Expanded<F>>();
    alignas(64) uint8_t expanded[EXPANDED_TOGETHER * EXPANDED_BYTES];
    const Expander expand = expander<F>();
    for (int64_t group = g.first; group < g.end; group++)
        for (int r = 0; r < GROUP_ROWS; r++) store(sums[group - g.first].y[t][r], all(0.0f));
    const int64_t together = g.end - g.first > 1 ? EXPANDED_TOGETHER : 1;
    for (int64_t at = 0, count; at < groups; at += count) {
        count = least(together, groups - at);
        for (int64_t i = 0; i < count; i++, tile += BYTES) expand(tile, expanded + i * EXPANDED_BYTES, AHEAD);
        for (int64_t group = g.first; group < g.end; group++) {
            const int first = int(group % (PANEL_ROWS / GROUP_ROWS)) * GROUP_ROWS, rows = g.rows(group);
            for (int row = 0, n; row < rows; row += n) {
                n = rows_at_once(int(least(Q_ROWS, rows - row)));
                q_kernel<Expanded<F>>(n)(expanded, count, 0, g.steps(group) + at, first + row, sums[group - g.first].y[t][row]);
            }
        }
    }
}

template <class W>
void widen_columns(const FloatColumns& columns, int tiles, float (&to)[PAIR][16 * FLOAT_COLUMNS]) {
    for (int t = 0; t < tiles; t++)
        for (int64_t k = 0; k < columns.count; k++)
            store(to[t] + 16 * k, load(reinterpret_cast<const W*>(columns.tile + t * columns.tile_bytes) + 16 * k));
}

// Several groups pass by some columns at a time, which the first cache holds; 16-bit floats are widened before rows pass by them more than once.
// A sum goes on where it was left, so its bits stay. Kernels that take a whole group (AVX-512) gain by it from 8 groups on; 2 took up to 1.24 of the time.
void multiply_floats(const Gathering& g, Sums* sums) {
    const Tiles& w = g.job.tiles;
    const bool gains = FLOAT_ROWS < GROUP_ROWS || g.end - g.first >= 8;
    const bool widens = gains && w.type != Weight::f32 && g.count() >= 2 * FLOAT_ROWS, parts = widens || (gains && g.end - g.first > 1);
    const int64_t column_bytes = 16 * bytes_of_float(w.type), together = parts ? FLOAT_COLUMNS : w.columns;
    alignas(64) float wide[PAIR][16 * FLOAT_COLUMNS];
    std::memset(sums, 0, size_t(g.end - g.first) * sizeof *sums);
    for (int64_t column = 0; column < w.columns; column += together) {
        FloatColumns columns{w.memory + g.tile * g.tile_bytes + column * column_bytes, g.tile_bytes, least(together, w.columns - column), parts ? 0 : AHEAD, nullptr};
        for (int t = 0; parts && t < g.tiles; t++) fetch_again(columns.tile + t * g.tile_bytes + AHEAD, columns.count * column_bytes);
        if (widens) {
            w.type == Weight::f16 ? widen_columns<Half>(columns, g.tiles, wide) : widen_columns<Bfloat>(columns, g.tiles, wide);
            columns.tile = reinterpret_cast<const uint8_t*>(wide), columns.tile_bytes = sizeof wide[0];
        }
        for (int64_t group = g.first; group < g.end; group++) {
            columns.panel = reinterpret_cast<const float*>(g.panel(group)) + float_group(w.columns, group) + column * GROUP_ROWS;
            for (int row = 0, n; row < g.rows(group); row += n, columns.ahead = 0) {
                n = int(least(FLOAT_ROWS, g.rows(group) - row));
                float_kernel(widens ? Weight::f32 : w.type, g.tiles, n)(columns, row, sums[group - g.first].y[0][row]);
            }
        }
    }
}

void multiply_types(const Gathering& g, Sums* sums) {
    bool pair = false;
    for (int t = 0; t < g.tiles && !pair; t++) {
        const TilePlace place = tile_of(g.job.tiles, g.tile + t, g.tile_bytes);
        with_format(place.type, [&](auto format) {
            using F = decltype(format);
            pair = t == 0 && multiplied_as_pair<F>(g, place.type, sums);
            if (pair) return;
            if constexpr (F::EXPANDS) multiply_expanded<F>(g, t, place.memory, sums);
            else
                for (int64_t group = g.first; group < g.end; group++) {
                    Sums alone;
                    multiply_blocks({g.job.tiles, g.tile + t, g.tile_bytes, 1, g.panel(group), group, g.rows(group), group == g.first ? AHEAD : 0}, alone);
                    std::memcpy(sums[group - g.first].y[t], alone.y[0], sizeof alone.y[0]);
                }
        });
    }
}

void multiply_gathered(const Gathering& g, void (*finish)(const Product&, int64_t, int, int64_t, int, const Sums&)) {
    Sums sums[EXPANDED_GROUPS];
    if (is_float(g.job.tiles.type)) multiply_floats(g, sums);
    else multiply_types(g, sums);
    for (int64_t group = g.first; group < g.end; group++) {
        Sums& own = sums[group - g.first];
        if (g.job.adapted.adapters) add_adapters(g.job, g.tile, g.tiles, group * GROUP_ROWS, g.rows(group), own);
        for (int r = 0; r < g.rows(group); r++) finish(g.job, g.tile, g.tiles, group * GROUP_ROWS + r, r, own);
    }
}

// Does a product of so many rows make the codes of any of these tiles beforehand?
bool any_expands(const Tiles& w, int64_t tile, int64_t end, int64_t rows) {
    const auto expands = [&](Weight type) {
        return with_format(type, [&](auto format) {
            using F = decltype(format);
            return F::EXPANDS || rows >= PAIR_LEAST_ROWS<F>;
        });
    };
    if (!w.places) return expands(w.type);
    for (; tile < end; tile++)
        if (expands(w.places[tile].type)) return true;
    return false;
}

// ---- all

void multiply(const Product& job, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end) {
    const Tiles& w = job.tiles;
    const bool gated = is_gate(job.activation);
    constexpr int64_t GROUPS = PANEL_ROWS / GROUP_ROWS;
    const int64_t bytes = tile_bytes(w.type, w.columns);
    const bool gathers = is_float(w.type) || any_expands(w, tile_begin, tile_end, least(group_end * GROUP_ROWS, job.rows) - group_begin * GROUP_ROWS);
    const int64_t fit = GROUPS_BYTES * GROUPS / panel_bytes(w.panels, w.columns);
    const int64_t groups = group_end - group_begin, passes = (groups - 1) / EXPANDED_GROUPS + 1;
    const int64_t at_once = gathers ? (groups + passes - 1) / passes : fit > 1 ? fit : 1;
    const int64_t step = is_float(w.type) || gated || (gathers && EXPANDED_PAIRS) ? PAIR : 1;
    const auto finish = gated ? finish_gated_row : finish_row;
    for (int64_t first = group_begin; first < group_end; first += at_once)
        for (int64_t tile = tile_begin; tile < tile_end; tile += step) {
            if (gathers) {
                multiply_gathered({job, tile, bytes, int(least(step, tile_end - tile)), first, least(first + at_once, group_end)}, finish);
                continue;
            }
            for (int64_t group = first; group < least(first + at_once, group_end); group++) {
                const int64_t row = group * GROUP_ROWS;
                const Meeting m{w, tile, bytes, int(least(step, tile_end - tile)),
                                panel_of(job, group / GROUPS), group, int(least(GROUP_ROWS, job.rows - row)), group == first ? AHEAD : 0};
                Sums sums;
                multiply_blocks(m, sums);
                if (job.adapted.adapters) add_adapters(job, tile, m.tiles, row, m.rows, sums);
                for (int r = 0; r < m.rows; r++) finish(job, tile, m.tiles, row + r, r, sums);
            }
        }
}

}  // namespace

extern const TileKernels tile_kernels = {prepare, multiply};

}  // namespace DC_ISA
}  // namespace dc
