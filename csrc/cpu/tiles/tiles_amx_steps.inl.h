// Products through AMX's tile registers for types whose scales are whole numbers (WHOLE_SCALES). Two panels, which are 32 rows of x in steps
// (StepGroup), meet 16 x 64 bytes at a time. With Q2_K and Q3_K these come from two tiles whose codes were multiplied by their scales beforehand;
// with IQ2_*, IQ3_* and IQ1_* from one tile, where a code times its scale takes two bytes.
//
// layout   a wide group has a tile's 256 columns: f32 [16], what its scales share; then bytes.
//              Q3_K        [BLOCKS][8][64], as in a folded group (folded.inl.h)
//              Q2_K        f32 [16], what its minimums share; [24][64], which are 64 rows of 8 columns of zeros, its minimums and zeros again; then
//                          as Q3_K
//              i8_row     as its tiles have them
//              with a grid the upper bytes of code times scale [BLOCKS][8][64], all signed, then the lower bytes
// mapping  A = x [16][64], B = codes [16][64], C = sums int32 [16][16]. Each 64 columns take four products, and sums need no scale before the 256
//          columns end. Blocks in which x has high bytes go the same way again with these. Minimums are products too: a sum s of 16 columns
//          of x becomes the bytes l and 8 h, where s = l + 128 h, and its minimum m the bytes m and 16 m
// cost     256 columns take 16 products and as many loads of registers, of 16 cycles each. Then 64 registers of sums (32 with one tile) are stored,
//          loaded, converted, multiplied and added. So the sums of one lot are added while the next lot is multiplied
// numerics those of step_rows: integer sums are exact, and sums that pass 2^31 on the way come back
// A part of tiles_amx.inl.h.
#pragma once

#include <new>

#include "cpu/tiles/expanded.inl.h"
#include "cpu/tiles/folded.inl.h"
#include "cpu/tiles/steps.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int WIDE_PANELS = 2, HALVES = PANEL_ROWS / GROUP_ROWS;
constexpr int64_t STEP_PANELS_AT_ONCE = 8;              // 128 rows: their x in steps stays in the second cache
constexpr int64_t WIDE_TOGETHER = 2;                    // so many groups of 256 columns have their bytes in the first cache together

// ---- bytes of a tile

// Of two tiles.
template <class F>
struct WideFolded {
    static constexpr int64_t BLOCKS = F::BLOCKS, BYTES = 512;
    static constexpr int64_t ZEROS = 128, MINIMUMS = ZEROS + 512, SCALE_BYTES = F::HAS_MINIMUM ? MINIMUMS + 1024 : 64;
    static constexpr int64_t CODES[PAIR] = {SCALE_BYTES, SCALE_BYTES};
    static constexpr bool HAS_MINIMUM = F::HAS_MINIMUM, SPLIT = false;
    static constexpr int LESS = Folded<F>::LESS;
};

template <class F>
DC_INLINE void put_minimums(const uint8_t* group, int i, uint8_t* to) {          // each int16 m becomes the bytes m and 16 m
    const Whole minimums = F::minimum_factors(group, i);
#if defined(__AVX512F__)
    _mm512_store_si512(to, _mm512_mullo_epi16(minimums.v, _mm512_set1_epi16(0x1001)));
#else
    for (int r = 0; r < 16; r++) put_four(uint32_t(minimums.of[r]) * 0x1001u, to + 4 * r);
#endif
}

template <class F>
__attribute__((noinline)) void make_bytes(WideFolded<F>, const uint8_t* group, uint8_t* to) {
    using E = WideFolded<F>;
    store(reinterpret_cast<float*>(to), F::shared(group));
    if constexpr (F::HAS_MINIMUM) {
        store(reinterpret_cast<float*>(to) + 16, F::shared_minimum(group));
        std::memset(to + E::ZEROS, 0, 512), std::memset(to + E::MINIMUMS + 512, 0, 512);
    }
    for (int i = 0; i < F::BLOCKS; i++) {
        if constexpr (F::HAS_MINIMUM) put_minimums<F>(group, i, to + E::MINIMUMS + 64 * i);
        uint8_t* const codes = to + E::SCALE_BYTES + i * E::BYTES;
        fold_half<F, 0>(group, i, codes), fold_half<F, 1>(group, i, codes);
    }
}

// Of one tile: code times scale, within +-62 * 31, is 256 * upper + lower.
template <class F>
struct WideSplit {
    static constexpr int64_t BLOCKS = F::BLOCKS, BYTES = 1024, PLANE = BLOCKS * 512, SCALE_BYTES = 64;
    static constexpr int64_t CODES[PAIR] = {SCALE_BYTES, SCALE_BYTES + PLANE};
    static constexpr bool HAS_MINIMUM = false, SPLIT = true;
};

// Chunks 4 PART .. 4 PART + 3 of a block.
template <class F, int PART>
DC_INLINE void split_part(const uint8_t* codes, Whole factors, uint8_t* upper) {
    uint8_t* const lower = upper + WideSplit<F>::PLANE;
#if defined(__AVX512F__)
    // each factor twice, as int16: times the even bytes, and a byte further on times the odd ones
    const __m512i others = _mm512_rol_epi32(factors.v, 16);
    const __m512i even = PART ? _mm512_mask_blend_epi16(0x55555555, factors.v, others) : _mm512_mask_blend_epi16(0x55555555, others, factors.v);
    const __m512i odd = _mm512_slli_epi16(even, 8), centre = _mm512_sub_epi16(_mm512_slli_epi16(even, F::OFFSET_SHIFT), _mm512_set1_epi16(128));
    constexpr __mmask64 EVEN = 0x5555555555555555;
    for (int c = 4 * PART; c < 4 * PART + 4; c++) {
        const __m512i own = _mm512_load_si512(codes + 64 * c);
        const __m512i first = _mm512_sub_epi16(_mm512_maddubs_epi16(own, even), centre), second = _mm512_sub_epi16(_mm512_maddubs_epi16(own, odd), centre);
        _mm512_store_si512(upper + 64 * c, _mm512_mask_blend_epi8(EVEN, second, _mm512_srli_epi16(first, 8)));
        _mm512_store_si512(lower + 64 * c, _mm512_xor_si512(_mm512_mask_blend_epi8(EVEN, _mm512_slli_epi16(second, 8), first), _mm512_set1_epi8(-128)));
    }
#else
    for (int at = 256 * PART; at < 256 * PART + 256; at++) {
        const int factor = factors.of[at % 64 / 4] >> 16 * PART & 0xffff, product = (codes[at] - (1 << F::OFFSET_SHIFT)) * factor + 128;
        upper[at] = uint8_t(product >> 8), lower[at] = uint8_t(product ^ 0x80);
    }
#endif
}

template <class F>
__attribute__((noinline)) void make_bytes(WideSplit<F>, const uint8_t* group, uint8_t* to) {
    using E = Expanded<F>;
    alignas(64) uint8_t expanded[group_of_blocks_bytes<E>()];
    expander<F>()(group, expanded, 0);
    store(reinterpret_cast<float*>(to), E::shared(expanded));
    for (int i = 0; i < F::BLOCKS; i++) {
        const Whole factors = E::factors(expanded, i);
        const uint8_t* const codes = quants_of<E>(expanded, i);
        uint8_t* const upper = to + WideSplit<F>::SCALE_BYTES + 512 * i;
        split_part<F, 0>(codes, factors, upper), split_part<F, 1>(codes, factors, upper);
    }
}

// ---- sums of x as bytes

struct alignas(64) SumBytes { int8_t of[PANEL_ROWS][64]; };             // of a row: its low bytes' sums of 16 columns, two bytes each, and its high bytes'

DC_INLINE void put_sum_bytes(const SumsOfSet& sums, int8_t* to) {       // 64 from row to row
#if defined(__AVX512F__)
    for (int r = 0; r < SET_ROWS; r += 2) {
        const __m512i sum = _mm512_load_si512(sums[r]), minus = _mm512_and_si512(_mm512_srai_epi16(sum, 15), _mm512_set1_epi16(127));
        const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(sum, minus), 7), low = _mm512_sub_epi16(sum, _mm512_slli_epi16(high, 7));
        const __m512i both = _mm512_mask_blend_epi8(0x5555555555555555, _mm512_slli_epi16(high, 11), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * r), _mm512_castsi512_si256(both));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * r + 64), _mm512_extracti64x4_epi64(both, 1));
    }
#else
    for (int r = 0; r < SET_ROWS; r++)
        for (int part = 0; part < 2 * STEP_BLOCKS; part++) {
            const int sum = sums[r][part / 2][part % 2];
            to[64 * r + 2 * part] = int8_t(sum % 128), to[64 * r + 2 * part + 1] = int8_t(sum / 128 * 8);
        }
#endif
}

void find_sum_bytes(const StepGroup& x, SumBytes& to) {
    for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++)
        put_sum_bytes(x.sets[s].low_sums, to.of[s * SET_ROWS]), put_sum_bytes(x.sets[s].high_sums, to.of[s * SET_ROWS] + 32);
}

// ---- 256 columns of two panels and two tiles, or two planes of one

struct Lot {
    const StepGroup* x[WIDE_PANELS];
    const SumBytes* sums[WIDE_PANELS];  // of types with minimums
    const uint8_t* group[PAIR];
    Sums* y[WIDE_PANELS];               // of a panel's two groups of rows
    int tile;                           // of split ones, its place in y
    bool high;                          // whether a row of these has high bytes
};

using TileSums = int32_t[WIDE_PANELS][PAIR][16 * 16];
struct ProductSums { alignas(64) TileSums low, high; };
struct LotSums { ProductSums products, minimums; };

int flags_of(const StepGroup& x) {
    int flags = 0;
    for (const StepSet& set : x.sets)
        for (const uint8_t each : set.has_high) flags |= each;
    return flags;
}

template <bool SIGNED, int C, int A, int B>
DC_INLINE void dot_tile() {
    if constexpr (SIGNED) tile_dot_signed<C, A, B>();
    else tile_dot<C, A, B>();
}

// C = A B of both panels and both tiles: registers 0 and 1 are A, 2 and 3 B, 4 to 7 C.
template <int PANELS>
DC_INLINE void zero_tiles() {
    tile_zero<4>(), tile_zero<5>();
    if constexpr (PANELS == 2) tile_zero<6>(), tile_zero<7>();
}
template <int PANELS, bool SIGNED = false>
DC_INLINE void dot_tiles(const int8_t* x, const int8_t* other_x, int64_t stride, const uint8_t* codes, const uint8_t* other_codes) {
    tile_load<0>(x, stride), tile_load<2>(codes, 64), dot_tile<SIGNED, 4, 0, 2>();
    tile_load<3>(other_codes, 64), dot_tile<SIGNED, 5, 0, 3>();
    if constexpr (PANELS == 2) tile_load<1>(other_x, stride), dot_tile<SIGNED, 6, 1, 2>(), dot_tile<SIGNED, 7, 1, 3>();
}
template <int PANELS>
DC_INLINE void put_tiles(TileSums& to) {
    tile_store<4>(to[0][0], 64), tile_store<5>(to[0][1], 64);
    if constexpr (PANELS == 2) tile_store<6>(to[1][0], 64), tile_store<7>(to[1][1], 64);
}

// ---- sums -> totals, of rows 4 s .. 4 s + 3 of each panel

// A panel's and a tile's products.
template <bool HIGH, int LESS>
DC_WIDE void add_set(const StepSet& set, Lanes d, const int32_t* low, const int32_t* high, Lanes (&total)[SET_ROWS]) {
    alignas(16) int32_t offset[SET_ROWS];
    if constexpr (LESS) put_offsets<7>(offset, set.minus, nullptr, HIGH ? 0 : MAGIC_BITS);      // 128 times, and if LESS is 127, once less:
    for (int r = 0; r < SET_ROWS; r++) {
        if constexpr (LESS == 127) offset[r] = int32_t(uint32_t(offset[r]) - uint32_t(set.minus[r]));      // of a row that x does not have, anything
        Whole sum;
        if constexpr (HIGH) {
            sum = add_fine(load_sums(high + 16 * r), load_sums(low + 16 * r));
            if constexpr (LESS) sum = plus(sum, offset[r]);
        } else sum = LESS ? load_plus(low + 16 * r, offset[r]) : load_plus_magic(low + 16 * r);
        add_product(total[r], d * all(set.step[r]), HIGH ? to_floats(sum) : to_floats_cheaply(sum));
    }
}

// Two planes' products.
template <bool HIGH>
DC_WIDE void add_split_set(const StepSet& set, Lanes d, const TileSums& low, const TileSums& high, int p, int at, Lanes (&total)[SET_ROWS]) {
    for (int r = 0; r < SET_ROWS; r++, at += 16) {
        const Lanes scale = d * all(set.step[r]);
        add_product(total[r], scale, to_floats(add_fine(load_sums(low[p][0] + at), load_sums(low[p][1] + at))));
        if constexpr (HIGH) add_product(total[r], scale, to_floats(add_fine(load_sums(high[p][0] + at), load_sums(high[p][1] + at))) * all(256.0f));
    }
}

template <class E, int PANELS, bool HIGH>
DC_WIDE void add_sets(const Lot& lot, const LotSums& sums, int s) {
    const int at = 16 * SET_ROWS * s;
    const ProductSums &products = sums.products, &minimums = sums.minimums;
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < (E::SPLIT ? 1 : PAIR); t++) {
            const StepSet& set = lot.x[p]->sets[s];
            const float* const shared = reinterpret_cast<const float*>(lot.group[t]);
            float (*const y)[16] = lot.y[p][s / 2].y[E::SPLIT ? lot.tile : t] + s % 2 * SET_ROWS;
            Lanes total[SET_ROWS];
            for (int r = 0; r < SET_ROWS; r++) total[r] = load(y[r]);
            if constexpr (E::SPLIT) add_split_set<HIGH>(set, load(shared), products.low, products.high, p, at, total);
            else add_set<HIGH, E::LESS>(set, load(shared), products.low[p][t] + at, products.high[p][t] + at, total);
            if constexpr (E::HAS_MINIMUM) add_set<HIGH, 0>(set, load(shared + 16), minimums.low[p][t] + at, minimums.high[p][t] + at, total);
            for (int r = 0; r < SET_ROWS; r++) store(y[r], total[r]);
        }
}

template <class E, int PANELS>
DC_WIDE void add_quarter(const Lot& lot, const LotSums& sums, int s) {
    if (__builtin_expect(lot.high, 0)) add_sets<E, PANELS, true>(lot, sums, s);
    else add_sets<E, PANELS, false>(lot, sums, s);
}

// ---- lots one after another

// The sums of a lot; meanwhile those of the one before go onto its totals.
template <class E, int PANELS>
DC_WIDE void multiply_lot(Lot& lot, LotSums& to, const Lot* before, const LotSums& sums) {
    const StepGroup &x = *lot.x[0], &other = *lot.x[PANELS - 1];
    const uint8_t *const first = lot.group[0], *const second = lot.group[1];
    const auto dot_codes = [&](int k, const int8_t* values, const int8_t* other_values) __attribute__((always_inline)) {
        dot_tiles<PANELS, E::SPLIT>(values + 64 * k, other_values + 64 * k, STEP_COLUMNS, first + E::CODES[0] + 1024 * k, second + E::CODES[1] + 1024 * k);
    };
    const int flags = flags_of(x) | flags_of(other);
    lot.high = flags;
    if constexpr (E::HAS_MINIMUM) {
        const auto dot_minimums = [&](int64_t at, TileSums& sums_of_them) __attribute__((always_inline)) {
            zero_tiles<PANELS>(), dot_tiles<PANELS>(lot.sums[0]->of[0], lot.sums[PANELS - 1]->of[0], 64, first + at, second + at);
            put_tiles<PANELS>(sums_of_them);
        };
        dot_minimums(E::MINIMUMS, to.minimums.low);
        if (flags) dot_minimums(E::ZEROS, to.minimums.high);
    }
    if (flags) {
        zero_tiles<PANELS>();
        for (int k = 0; k < 4; k++)
            if (flags >> 2 * k & 3) dot_codes(k, x.high[0], other.high[0]);
        put_tiles<PANELS>(to.products.high);
    }
    zero_tiles<PANELS>();
    for (int k = 0; k < 4; k++) {
        dot_codes(k, x.low[0], other.low[0]);
        if (before) add_quarter<E, PANELS>(*before, sums, k);
    }
    put_tiles<PANELS>(to.products.low);
}

// Two tiles, or one, and the panels that pass by: groups [group, group + count), whose bytes were made.
struct Passing {
    const Product& job;
    int64_t first, end, group, count;
    const SumBytes* sums;               // [end - first][groups], of types with minimums
    const uint8_t* tiles[PAIR];
    int tile;                           // of split ones, which
    Sums* y;                            // [2 (end - first)]

    int64_t groups() const { return job.tiles.columns / STEP_COLUMNS; }
    const StepGroup* steps(int64_t panel) const { return steps_of(panel_of(job, panel), job.tiles.panels, job.tiles.columns) + group; }
    const SumBytes* sums_of(int64_t panel, int64_t g) const { return sums ? sums + (panel - first) * groups() + group + g : nullptr; }
};

// Its panels [first, end), PANELS at a time.
template <class E, int PANELS>
__attribute__((noinline)) void multiply_lots(const Passing& its, int64_t first, int64_t end, LotSums (&sums)[2]) {
    Lot lots[2];
    int64_t n = 0;
    for (int64_t panel = first; panel < end; panel += PANELS)
        for (int64_t g = 0; g < its.count; g++, n++) {
            const int64_t at = g * group_of_blocks_bytes<E>(), last = panel + PANELS - 1;
            Sums* const y = its.y + HALVES * (panel - its.first);
            lots[n % 2] = {{its.steps(panel) + g, its.steps(last) + g}, {its.sums_of(panel, g), its.sums_of(last, g)},
                           {its.tiles[0] + at, its.tiles[1] + at}, {y, y + HALVES}, its.tile, false};
            multiply_lot<E, PANELS>(lots[n % 2], sums[n % 2], n ? &lots[1 - n % 2] : nullptr, sums[1 - n % 2]);
        }
    for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++) add_quarter<E, PANELS>(lots[1 - n % 2], sums[1 - n % 2], s);
}

// The panels of groups whose bytes were made, two at a time and then one.
template <class E>
void multiply_all_lots(const Passing& its, LotSums (&scratch)[2]) {
    const int64_t pairs_end = its.end - (its.end - its.first) % WIDE_PANELS;
    if (its.first < pairs_end) multiply_lots<E, WIDE_PANELS>(its, its.first, pairs_end, scratch);
    if (pairs_end < its.end) multiply_lots<E, 1>(its, pairs_end, its.end, scratch);
}

// Two tiles whose bytes need not be made times all their panels, group by group, onto y. What comes next is fetched meanwhile.
template <class F>
void multiply_as_stored(Passing its) {
    constexpr int64_t BYTES = group_of_blocks_bytes<F>();
    static_assert(group_of_blocks_bytes<WideFolded<F>>() == BYTES, "WideFolded");
    LotSums scratch[2];
    const uint8_t* const tiles[PAIR] = {its.tiles[0], its.tiles[1]};
    for (its.group = 0; its.group < its.groups(); its.group += its.count) {
        its.count = least(WIDE_TOGETHER, its.groups() - its.group);
        for (int t = 0; t < PAIR; t++) {
            its.tiles[t] = tiles[t] + its.group * BYTES;
            fetch_once(its.tiles[t] + its.count * BYTES, its.count * BYTES);
        }
        multiply_all_lots<WideFolded<F>>(its, scratch);
    }
}

// ---- one scale for a row

// What some panels have for all tiles: the step of each row, and what the tiles' offset of their codes adds to its sums.
struct RowScales {
    alignas(64) int32_t offset[PANEL_ROWS];
    float step[PANEL_ROWS];
};

template <class F>
RowScales row_scales(const StepGroup* x, int64_t groups) {
    RowScales its;
    for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++) {
        alignas(16) int32_t minus[SET_ROWS];
        for (int r = 0; r < SET_ROWS; r++) {
            uint32_t sum = 0;                       // unsigned, since x may lack the row
            for (int64_t g = 0; g < groups; g++) sum += uint32_t(x[g].sets[s].minus[r]);
            minus[r] = int32_t(sum);
            its.step[SET_ROWS * s + r] = x->sets[s].step[r];
        }
        put_offsets<F::OFFSET_SHIFT>(its.offset + SET_ROWS * s, minus, nullptr, 0);
    }
    return its;
}

// Some groups of two tiles; and what is fetched meanwhile, `lines` of each tile for every four products of tile registers. All of it before the products, in their
// way, was a sixth of the time.
struct TileGroups {
    const uint8_t *tiles[PAIR], *next[PAIR];
    int64_t count, lines;
};

// C += A B of one or two panels and these groups. `to` has C before and after.
template <class F, int PANELS>
DC_WIDE void add_groups(const StepGroup* x, const StepGroup* other, const TileGroups& its, bool begins, TileSums& to) {
    if (begins) zero_tiles<PANELS>();
    else {
        tile_load<4>(to[0][0], 64), tile_load<5>(to[0][1], 64);
        if constexpr (PANELS == 2) tile_load<6>(to[1][0], 64), tile_load<7>(to[1][1], 64);
    }
    const uint8_t *next = its.next[0], *other_next = its.next[1];
    for (int64_t g = 0; g < its.count; g++) {
        const int64_t at = g * group_of_blocks_bytes<F>() + F::SCALE_BYTES;
        for (int k = 0; k < 4; k++, next += 64 * its.lines, other_next += 64 * its.lines) {
            fetch_once(next, 64 * its.lines), fetch_once(other_next, 64 * its.lines);
            dot_tiles<PANELS>(x[g].low[0] + 64 * k, other[g].low[0] + 64 * k, STEP_COLUMNS, its.tiles[0] + at + 1024 * k, its.tiles[1] + at + 1024 * k);
        }
    }
    put_tiles<PANELS>(to);
}

// Two tiles times panels [first, end), and all that follows. The sums stay integers until the row ends; while other panels pass by they wait in memory.
template <class F>
void multiply_row_scale(const WideRange& range, int64_t tile, int64_t first, int64_t end, const RowScales* scales) {
    constexpr int64_t BYTES = group_of_blocks_bytes<F>();
    const Tiles& w = range.job.tiles;
    const int64_t groups = w.columns / STEP_COLUMNS, pairs = (end - first + 1) / WIDE_PANELS;
    const auto memory = [&](int64_t at) { return tile_of(w, at < range.tile_end ? at : tile, tile_bytes(w.type, w.columns)).memory; };
    const uint8_t *const tiles[PAIR] = {memory(tile), memory(tile + 1)}, *const following[PAIR] = {memory(tile + PAIR), memory(tile + PAIR + 1)};
    alignas(64) TileSums sums[STEP_PANELS_AT_ONCE / WIDE_PANELS];
    TileGroups its{};
    its.lines = (BYTES / 256 + pairs - 1) / pairs;
    for (int64_t g = 0; g < groups; g += its.count) {
        its.count = least(WIDE_TOGETHER, groups - g);
        for (int t = 0; t < PAIR; t++) {
            its.tiles[t] = tiles[t] + g * BYTES;
            its.next[t] = g + its.count < groups ? its.tiles[t] + its.count * BYTES : following[t];
        }
        for (int64_t n = 0; n < pairs; n++) {
            const int64_t panel = first + WIDE_PANELS * n, last = least(panel + 1, end - 1);
            const StepGroup* const x = steps_of(panel_of(range.job, panel), w.panels, w.columns) + g;
            const StepGroup* const other = steps_of(panel_of(range.job, last), w.panels, w.columns) + g;
            last > panel ? add_groups<F, WIDE_PANELS>(x, other, its, g == 0, sums[n]) : add_groups<F, 1>(x, other, its, g == 0, sums[n]);
            for (const uint8_t*& next : its.next) next += 256 * its.count * its.lines;
        }
    }
    const Lanes d[PAIR] = {F::shared(tiles[0]), F::shared(tiles[1])};
    for (int64_t panel = first; panel < end; panel++) {
        const RowScales& rows = scales[panel - first];
        const auto& of_panel = sums[(panel - first) / WIDE_PANELS][(panel - first) % WIDE_PANELS];
        Sums y[HALVES];
        for (int t = 0; t < PAIR; t++)
            for (int r = 0; r < PANEL_ROWS; r++)
                store(y[r / GROUP_ROWS].y[t][r % GROUP_ROWS], d[t] * all(rows.step[r]) * to_floats(plus(load_sums(of_panel[t] + 16 * r), rows.offset[r])));
        finish_panel(range.job, tile, PAIR, panel, range.rows_end, y);
    }
}

// All tiles times panels [first, end), if each row of x has one step and one byte for each value.
template <class F>
bool multiply_row_scales(const WideRange& range, int64_t first, int64_t end) {
    const Tiles& w = range.job.tiles;
    const auto steps = [&](int64_t panel) { return steps_of(panel_of(range.job, panel), w.panels, w.columns); };
    if (steps(first)->sets[0].has_high[0]) return false;
    RowScales scales[STEP_PANELS_AT_ONCE];
    for (int64_t panel = first; panel < end; panel++) scales[panel - first] = row_scales<F>(steps(panel), w.columns / STEP_COLUMNS);
    for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += PAIR) multiply_row_scale<F>(range, tile, first, end, scales);
    return true;
}

// TILES tiles (1: a split one) times all its panels, onto y.
template <class F, class E, int TILES>
void multiply_passing(Passing its) {
    constexpr int64_t BYTES = group_of_blocks_bytes<F>(), WIDE_BYTES = group_of_blocks_bytes<E>();
    alignas(64) uint8_t bytes[TILES][WIDE_TOGETHER * WIDE_BYTES];
    LotSums scratch[2];
    const uint8_t* const tiles[PAIR] = {its.tiles[0], its.tiles[1]};
    for (int t = 0; t < PAIR; t++) its.tiles[t] = bytes[t % TILES];
    for (its.group = 0; its.group < its.groups(); its.group += its.count) {
        its.count = least(WIDE_TOGETHER, its.groups() - its.group);
        for (int t = 0; t < TILES; t++)
            for (int64_t i = 0; i < its.count; i++)
                make_bytes(E(), tiles[TILES == PAIR ? t : its.tile] + (its.group + i) * BYTES, bytes[t] + i * WIDE_BYTES);
        multiply_all_lots<E>(its, scratch);
    }
}

// Two tiles times panels [first, end), at most STEP_PANELS_AT_ONCE.
template <class F>
void multiply_tiles_in_steps(Passing its) {
    for (int64_t i = 0; i < HALVES * (its.end - its.first); i++) std::memset(its.y[i].y, 0, sizeof its.y->y);
    if constexpr (F::EXPANDS)
        for (its.tile = 0; its.tile < PAIR; its.tile++) multiply_passing<F, WideSplit<F>, 1>(its);
    else if constexpr (F::ROW_SCALE) multiply_as_stored<F>(its);
    else multiply_passing<F, WideFolded<F>, PAIR>(its);
}

// Pairs of tiles of one type times rows.
template <class F>
void multiply_in_steps(const WideRange& range) {
    static_assert(F::WHOLE_SCALES && F::BLOCKS == STEP_BLOCKS, "StepGroup");
    const Tiles& w = range.job.tiles;
    const int64_t bytes = tile_bytes(w.type, w.columns), all_panels = panel_count(range.rows_end), groups = w.columns / STEP_COLUMNS;
    SumBytes* const sum_bytes = F::HAS_MINIMUM ? new (std::nothrow) SumBytes[STEP_PANELS_AT_ONCE * groups] : nullptr;       // 256 KB of 8,192 columns
    if (F::HAS_MINIMUM && !sum_bytes) return range.multiply_narrow(range.tile_begin, range.tile_end - range.tile_begin, range.first_panel, all_panels);
    TileConfig config;
    for (int t = 0; t < 8; t++) config.rows[t] = 16, config.bytes[t] = 64;
    tile_configure(config);
    for (int64_t first = range.first_panel; first < all_panels; first += STEP_PANELS_AT_ONCE) {
        const int64_t end = least(first + STEP_PANELS_AT_ONCE, all_panels);
        if constexpr (F::ROW_SCALE)
            if (multiply_row_scales<F>(range, first, end)) continue;
        for (int64_t i = 0; F::HAS_MINIMUM && i < (end - first) * groups; i++)
            find_sum_bytes(steps_of(panel_of(range.job, first + i / groups), w.panels, w.columns)[i % groups], sum_bytes[i]);
        for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += PAIR) {
            Sums sums[STEP_PANELS_AT_ONCE][HALVES];
            const TilePlace one = tile_of(w, tile, bytes), other = tile_of(w, tile + 1, bytes);
            multiply_tiles_in_steps<F>({range.job, first, end, 0, 0, sum_bytes, {one.memory, other.memory}, 0, sums[0]});
            for (int64_t panel = first; panel < end; panel++) finish_panel(range.job, tile, PAIR, panel, range.rows_end, sums[panel - first]);
        }
    }
    delete[] sum_bytes;
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
