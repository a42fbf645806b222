// Four rows of x, a set, times two tiles of looked-up types whose codes are bytes (WhollyExpanded), with registers of 512 bits.
//
// mapping  sums of two tiles and four rows in eight registers, their totals in eight more: each word of x is broadcast once for two dot products,
//          each register of codes read once for four. With one tile and eight rows (q_rows) every dot product reads x itself, and loads are what
//          there is too little of: two a cycle, as dot products
// cost     of 32 columns on Zen 5, 4096 multiply-adds, alone in the first cache: 43 cycles, of types with two scales 51 (q_rows 47 and 57); with fine
//          planes in 8 % of the blocks of x 47 and 56 (q_rows 56 and 67), as a plane costs its own row alone. 64 dot products are 32 cycles
//          there; on Zen 4, where they are 64 cycles, 84 and 99: dot products, multiplications and fused multiply-adds share two pipes of 256 bits,
//          80 and 96 cycles of them, so nothing else costs time
// numerics those of q_rows. A row without a fine plane gets nothing from another's
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

#if defined(__AVX512F__)

constexpr bool EXPANDED_PAIRS = true;
constexpr int64_t PAIR_LEAST_ROWS = 9, PAIR_LEAST_ROWS_FOLDED = 17, PAIR_TOGETHER = 2;      // 8 rows are as fast either way; groups of 256 columns that lie in the cache

DC_INLINE __m512i word_of(const void* p) {          // in all lanes
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
}

// low, high += chunks [FIRST, END) of both tiles' bytes times one row's values.
template <int FIRST, int END>
DC_INLINE void dot_row(const uint8_t* first, const uint8_t* second, const int8_t* x, __m512i& low, __m512i& high) {
#pragma GCC unroll 8
    for (int c = FIRST; c < END; c++) {
        const __m512i shared = word_of(x + 4 * c);
        low = _mm512_dpbusd_epi32(low, _mm512_load_si512(first + 64 * c), shared);
        high = _mm512_dpbusd_epi32(high, _mm512_load_si512(second + 64 * c), shared);
    }
}

// The same of the four rows of a set, STRIDE apart: sums [tile][row].
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

// Part PART of a block onto the totals.
template <class F, int PART>
DC_INLINE void add_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* x, const PanelSet* set, Lanes (&total)[PAIR][SET_ROWS]) {
    __m512i sum[PAIR][SET_ROWS];
    const int32_t* const minus = F::PARTS == 1 ? set->minus : set->half_minus[PART];
    for (int r = 0; r < SET_ROWS; r++) sum[0][r] = sum[1][r] = UnsignedDot::begin<F::OFFSET_SHIFT>(minus[r]).v;
    dot_rows<FIRST_CHUNK<F, PART>, FIRST_CHUNK<F, PART + 1>, BLOCK>(quants_of<F>(group[0], i), quants_of<F>(group[1], i), x, sum);
    for (int t = 0; t < PAIR; t++) {
        const Lanes d = F::scale(group[t], i, PART);
        for (int r = 0; r < SET_ROWS; r++) add_product(total[t][r], d * all(set->scale[r]), Lanes{_mm512_cvtepi32_ps(sum[t][r])});
    }
}

// What add_part adds, of row r's fine plane, onto that row's totals.
template <class F, int PART, int R>
DC_INLINE void add_fine_part(const uint8_t* const (&group)[PAIR], int i, const int8_t* fine, const PanelSet* set, Lanes (&total)[PAIR][SET_ROWS]) {
    __m512i sum[PAIR];
    sum[0] = sum[1] = UnsignedDot::begin<F::OFFSET_SHIFT>(set->fine_minus[F::PARTS - 1 + PART][R]).v;
    dot_row<FIRST_CHUNK<F, PART>, FIRST_CHUNK<F, PART + 1>>(quants_of<F>(group[0], i), quants_of<F>(group[1], i), fine + BLOCK * R, sum[0], sum[1]);
    for (int t = 0; t < PAIR; t++) {
        const Lanes small = F::scale(group[t], i, PART) * all(1.0f / 256) * all(set->scale[R]), whole = {_mm512_cvtepi32_ps(sum[t])};
        add_product(total[t][R], small, whole);
    }
}

// What comes to the second cache meanwhile: of each tile so many bytes with each block.
struct Fetching {
    const uint8_t* from[PAIR];
    int64_t bytes;

    __attribute__((always_inline)) void next() {
        for (const uint8_t*& at : from) fetch_again(at, bytes), at += bytes;
    }
};

// Rows row .. row + 3 of the panel, a set, onto y [2][4][16], the sums so far.
template <class F>
__attribute__((noinline)) void pair_rows(const uint8_t* first, const uint8_t* second, int64_t blocks, Fetching& fetching, const PanelBlock* panel, int row,
                                         float* y, float* other_y) {
    static_assert(F::FINE_APART && !F::HAS_MINIMUM && F::NEXT == 4 && F::SECOND == 16, "bytes");
    Lanes total[PAIR][SET_ROWS];
    for (int r = 0; r < SET_ROWS; r++) total[0][r] = load(y + 16 * r), total[1][r] = load(other_y + 16 * r);
    const int8_t* x = panel->x[row];
    const PanelSet* set = panel->sets + row / SET_ROWS;
    Fetching own = fetching;
    for (int64_t b = 0; b < blocks; b++, x = next_block(x), set = next_block(set)) {
        own.next();
        const int i = int(b % F::BLOCKS);
        const int64_t from = b / F::BLOCKS * group_of_blocks_bytes<F>();
        const uint8_t* const group[PAIR] = {first + from, second + from};
        add_part<F, 0>(group, i, x, set, total);
        if constexpr (F::PARTS == 2) add_part<F, 1>(group, i, x, set, total);
        uint32_t flags;
        std::memcpy(&flags, set->has_fine, sizeof flags);
        if (__builtin_expect(flags != 0, 0)) {
            const int8_t* const fine = x + offsetof(PanelBlock, fine);
            const auto row = [&](auto r) __attribute__((always_inline)) {
                constexpr int R = decltype(r)::value;
                if (!(flags >> 8 * R & 1)) return;
                add_fine_part<F, 0, R>(group, i, fine, set, total);
                if constexpr (F::PARTS == 2) add_fine_part<F, 1, R>(group, i, fine, set, total);
            };
            row(std::integral_constant<int, 0>()), row(std::integral_constant<int, 1>()), row(std::integral_constant<int, 2>()), row(std::integral_constant<int, 3>());
        }
    }
    fetching = own;
    for (int r = 0; r < SET_ROWS; r++) store(y + 16 * r, total[0][r]), store(other_y + 16 * r, total[1][r]);
}

#else

constexpr bool EXPANDED_PAIRS = false;
constexpr int64_t PAIR_LEAST_ROWS_FOLDED = 17;

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
