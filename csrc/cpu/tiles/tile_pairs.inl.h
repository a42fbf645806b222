// Products of many rows, in registers of 512 bits: a set (four rows of x) times two tiles whose codes were turned into bytes beforehand (Unpacked).
// It is for all types whose scales are not whole numbers; folded.inl.h has those.
//
// mapping  eight registers have the sums of two tiles and four rows, eight more their totals. So each word of x is broadcast once for two dot
//          products, and each register of codes is read once for four. With one tile and eight rows (q_rows) every dot product would read x, but
//          a core can do only two loads a cycle, as many as dot products
// cost     32 columns, which are 4096 multiply-adds, when all lies in the first cache. The second number is for types with two scales.
//              Zen 5                                     43 and 51 cycles (q_rows 47 and 57)
//              Zen 5, 8 % of x's blocks have fine planes 47 and 56 cycles (q_rows 56 and 67): here a plane costs time for its own row alone
//              Zen 4                                     84 and 99 cycles
//          The 64 dot products are 32 cycles on Zen 5 and 64 on Zen 4. There dot products, multiplications and fused multiply-adds share two pipes of
//          256 bits and take 80 and 96 cycles of them, and 8 more with minimums: nothing else costs time.
//          Whole products of 128 rows on Zen 4, the making of codes included and fine planes in 5 % of the blocks, against q_rows: Q4_K and Q4_1 9 %
//          faster, Q6_K 12 %, Q8_0 23 %. Products of 16 rows are as fast
// numerics those of q_rows. A row without a fine plane gets nothing from another row's
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

#if defined(__AVX512F__)

constexpr bool EXPANDED_PAIRS = true;
constexpr int64_t PAIR_BLOCKS = 16;                 // so many blocks of both tiles have their codes in the first cache together

// It is faster from so many rows on. Where codes are made beforehand in any case, 8 rows are as fast either way.
template <class F>
constexpr int64_t PAIR_LEAST_ROWS = F::EXPANDS ? 9 : F::WHOLE_SCALES ? 17 : 25;

// A group of blocks of any type: its scales and minimums as f32 [BLOCKS][PARTS + HAS_MINIMUM][16], then its codes as bytes [BLOCKS][8][64].
template <int64_t BLOCKS_, int PARTS_, int OFFSET_SHIFT_, bool HAS_MINIMUM_, bool FINE_APART_>
struct Unpacked {
    static constexpr int64_t BLOCKS = BLOCKS_, BYTES = 512, SCALE_BYTES = BLOCKS_ * (PARTS_ + HAS_MINIMUM_) * 64;
    static constexpr int PARTS = PARTS_, OFFSET_SHIFT = OFFSET_SHIFT_;
    static constexpr bool HAS_MINIMUM = HAS_MINIMUM_, FINE_APART = FINE_APART_;
    static_assert(FINE_APART || PARTS == 1, "add_fine_sums");

    static constexpr int place(int i, int part) { return 16 * ((PARTS + HAS_MINIMUM) * i + part); }
    DC_INLINE Lanes scale(const uint8_t* group, int i, int part) { return load(reinterpret_cast<const float*>(group) + place(i, part)); }
    DC_INLINE Lanes minimum(const uint8_t* group, int i) { return scale(group, i, PARTS); }

    template <class F>
    DC_INLINE void unpack_scales(const uint8_t* group, uint8_t* to) {
        float* const numbers = reinterpret_cast<float*>(to);
        for (int i = 0; i < BLOCKS; i++) {
            for (int part = 0; part < PARTS; part++) store(numbers + place(i, part), F::scale(group, i, part));
            if constexpr (HAS_MINIMUM) store(numbers + place(i, PARTS), F::minimum(group, i));
        }
    }
};
template <class F>
using UnpackedOf = Unpacked<F::BLOCKS, F::PARTS, F::OFFSET_SHIFT, F::HAS_MINIMUM, F::FINE_APART>;

// A group's scales, and after them its codes.
template <class F>
__attribute__((noinline)) void unpack_group(const uint8_t* group, uint8_t* to, int64_t) {
    using E = UnpackedOf<F>;
    E::template unpack_scales<F>(group, to);
    to += E::SCALE_BYTES;
    for (int i = 0; i < F::BLOCKS; i++, to += E::BYTES) {
        const uint8_t* const quants = quants_of<F>(group, i);
        each_of<4>([&](auto c) __attribute__((always_inline)) {
            constexpr int C = decltype(c)::value;
            Words low, high;
            F::template unpack<C>(quants, low, high);
            _mm512_store_si512(to + 16 * F::NEXT * C, F::weights(low).v), _mm512_store_si512(to + 16 * (F::SECOND + F::NEXT * C), F::weights(high).v);
        });
    }
}

DC_INLINE __m512i word_of(const void* p) {          // in all lanes
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

// low += chunks [FIRST, END) of the first tile's bytes times one row's values; high += the same of the second tile's.
template <int FIRST, int END>
DC_INLINE void dot_row(const uint8_t* first, const uint8_t* second, const int8_t* x, __m512i& low, __m512i& high) {
#pragma GCC unroll 8
    for (int c = FIRST; c < END; c++) {
        const __m512i shared = word_of(x + 4 * c);
        low = _mm512_dpbusd_epi32(low, _mm512_load_si512(first + 64 * c), shared);
        high = _mm512_dpbusd_epi32(high, _mm512_load_si512(second + 64 * c), shared);
    }
}

// The same for the four rows of a set, which lie STRIDE apart.
template <int FIRST, int END, int STRIDE>
DC_INLINE void dot_rows(const uint8_t* first, const uint8_t* second, const int8_t* x, __m512i (&sum)[PAIR][SET_ROWS]) {
#pragma GCC unroll 8
    for (int c = FIRST; c < END; c++) {
        const __m512i low = _mm512_load_si512(first + 64 * c), high = _mm512_load_si512(second + 64 * c);
#pragma GCC unroll 4
        for (int r = 0; r < SET_ROWS; r++) {
            const __m512i shared = word_of(x + STRIDE * r + 4 * c);
            sum[0][r] = _mm512_dpbusd_epi32(sum[0][r], low, shared), sum[1][r] = _mm512_dpbusd_epi32(sum[1][r], high, shared);
        }
    }
}

// The chunks of part PART of a block.
template <class F, int PART>
constexpr int FIRST_CHUNK = 8 / F::PARTS * PART;

// The sums of a row's fine plane.
template <class E, int PART, int R>
DC_INLINE void dot_fine(const uint8_t* const (&group)[PAIR], int i, const int8_t* fine, const PanelSet* set, __m512i (&sum)[PAIR]) {
    const int32_t& minus = E::PARTS == 1 ? set->fine_minus[0][R] : set->fine_minus[1 + PART][R];
    sum[0] = sum[1] = UnsignedDot::begin<E::OFFSET_SHIFT>(minus).v;
    dot_row<FIRST_CHUNK<E, PART>, FIRST_CHUNK<E, PART + 1>>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), fine + BLOCK * R, sum[0], sum[1]);
}

// Those of four rows whose byte of `flags` is set.
template <class Each>
DC_INLINE void each_flagged(uint32_t flags, Each each) {
    each_of<4>([&](auto r) __attribute__((always_inline)) {
        if (flags >> 8 * decltype(r)::value & 0xff) each(r);
    });
}

// For types whose two planes make one sum (!FINE_APART). Rows with a fine plane get the sum 256 * the first plane's + the fine plane's, and the
// scale of x / 256.
template <class E>
DC_INLINE void add_fine_sums(const uint8_t* const (&group)[PAIR], int i, const int8_t* fine, const PanelSet* set, uint32_t flags, float (&scales)[SET_ROWS],
                             __m512i (&sum)[PAIR][SET_ROWS]) {
    std::memcpy(scales, set->scale, sizeof scales);
    each_flagged(flags, [&](auto r) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        __m512i own[PAIR];
        dot_fine<E, 0, R>(group, i, fine, set, own);
        scales[R] *= 1.0f / 256;
        for (int t = 0; t < PAIR; t++) sum[t][R] = add_fine({sum[t][R]}, {own[t]}).v;
    });
}

// Adds part PART of a block to the totals.
template <class E, int PART>
DC_INLINE void add_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* x, const PanelSet* set, uint32_t flags, Lanes (&total)[PAIR][SET_ROWS]) {
    __m512i sum[PAIR][SET_ROWS];
    const int32_t* const minus = E::PARTS == 1 ? set->minus : set->half_minus[PART];
    for (int r = 0; r < SET_ROWS; r++) sum[0][r] = sum[1][r] = UnsignedDot::begin<E::OFFSET_SHIFT>(minus[r]).v;
    dot_rows<FIRST_CHUNK<E, PART>, FIRST_CHUNK<E, PART + 1>, BLOCK>(quants_of<E>(group[0], i), quants_of<E>(group[1], i), x, sum);
    const float* scales = set->scale;
    float own_scales[SET_ROWS];
    if constexpr (!E::FINE_APART)
        if (__builtin_expect(flags != 0, 0)) {
            add_fine_sums<E>(group, i, x + offsetof(PanelBlock, fine), set, flags, own_scales, sum);
            scales = own_scales;
        }
    for (int t = 0; t < PAIR; t++) {
        const Lanes d = E::scale(group[t], i, PART);
        for (int r = 0; r < SET_ROWS; r++) add_product(total[t][r], d * all(scales[r]), Lanes{_mm512_cvtepi32_ps(sum[t][r])});
    }
}

// Does for row R's fine plane what add_part does for the first plane.
template <class E, int PART, int R>
DC_INLINE void add_fine_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* fine, const PanelSet* set, Lanes (&total)[PAIR][SET_ROWS]) {
    __m512i sum[PAIR];
    dot_fine<E, PART, R>(group, i, fine, set, sum);
    for (int t = 0; t < PAIR; t++) {
        const Lanes small = E::scale(group[t], i, PART) * all(1.0f / 256) * all(set->scale[R]), whole = {_mm512_cvtepi32_ps(sum[t])};
        add_product(total[t][R], small, whole);
    }
}

// What is fetched into the second cache meanwhile: so many bytes of each tile with each block.
struct Fetching {
    const uint8_t* from[PAIR];
    int64_t bytes;

    __attribute__((always_inline)) void next() {
        for (const uint8_t*& at : from) fetch_again(at, bytes), at += bytes;
    }
};

// Adds rows row .. row + 3 of the panel, which are a set, to y [2][4][16], the sums so far.
template <class E>
__attribute__((noinline)) void pair_rows(const uint8_t* first, const uint8_t* second, int64_t blocks, Fetching& fetching, const PanelBlock* panel, int row,
                                         float* y, float* other_y) {
    Lanes total[PAIR][SET_ROWS];
    for (int r = 0; r < SET_ROWS; r++) total[0][r] = load(y + 16 * r), total[1][r] = load(other_y + 16 * r);
    const int8_t* x = panel->x[row];
    const PanelSet* set = panel->sets + row / SET_ROWS;
    Fetching own = fetching;
    for (int64_t b = 0; b < blocks; b++, x = next_block(x), set = next_block(set)) {
        own.next();
        const int i = int(b % E::BLOCKS);
        const int64_t from = b / E::BLOCKS * group_of_blocks_bytes<E>();
        const uint8_t* const group[PAIR] = {first + from, second + from};
        uint32_t flags;
        std::memcpy(&flags, set->has_fine, sizeof flags);
        add_part<E, 0>(group, i, x, set, flags, total);
        if constexpr (E::PARTS == 2) add_part<E, 1>(group, i, x, set, flags, total);
        if constexpr (E::FINE_APART)
            if (__builtin_expect(flags != 0, 0))
                each_flagged(flags, [&](auto r) __attribute__((always_inline)) {
                    constexpr int R = decltype(r)::value;
                    const int8_t* const fine = x + offsetof(PanelBlock, fine);
                    add_fine_part<E, 0, R>(group, i, fine, set, total);
                    if constexpr (E::PARTS == 2) add_fine_part<E, 1, R>(group, i, fine, set, total);
                });
        if constexpr (E::HAS_MINIMUM)
            for (int t = 0; t < PAIR; t++) {
                const Lanes m = E::minimum(group[t], i);
                for (int r = 0; r < SET_ROWS; r++) add_product(total[t][r], m, all(set->product[r]));
            }
    }
    fetching = own;
    for (int r = 0; r < SET_ROWS; r++) store(y + 16 * r, total[0][r]), store(other_y + 16 * r, total[1][r]);
}

#else

constexpr bool EXPANDED_PAIRS = false;
template <class F>
constexpr int64_t PAIR_LEAST_ROWS = INT64_MAX;

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
