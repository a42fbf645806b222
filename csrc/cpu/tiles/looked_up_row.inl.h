// One row of x times a tile whose type is looked up in a grid (grids.h), in registers of 256 bits. It is for AVX2, and for AVX-512 where it is
// faster: for IQ1_*, and without VBMI.
//
// mapping  a register has 8 columns of 4 rows of the tile: of eight rows 0, 1, 4, 5 or 2, 3, 6, 7, as unpacking leaves their signs. Magnitudes go
//          from the grid straight to the dot product, and x takes the signs. Pairs of products are widened by the multiplication with their
//          scales. Sums stay in this order until the end of 256 columns
// cost     32 columns with AVX2 on Zen 4, measured while x came in blocks: 63 to 81 cycles for IQ2_*, 106 and 119 for IQ3_*, 69 and 80 for IQ1_*.
//          Of these the look-up takes 41 to 44, and 76 for IQ3_*, where 8 columns are two entries. An entry takes two and a half
//          instructions, its number included
// numerics the exact integer sums of the other kernels (step_rows)
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

#if defined(__AVX2__)

#if defined(__AVX512F__)
DC_INLINE Whole whole_of(__m256i low, __m256i high) { return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)}; }
template <int HALF>
DC_INLINE __m256i half_of(Whole whole) { return HALF ? _mm512_extracti64x4_epi64(whole.v, 1) : _mm512_castsi512_si256(whole.v); }
#else
DC_INLINE Whole whole_of(__m256i low, __m256i high) { return {low, high}; }
template <int HALF>
DC_INLINE __m256i half_of(Whole whole) { return HALF ? whole.hi : whole.lo; }
#endif

// 8 columns of rows 0, 1, 4 and 5 of these numbers; `others`: of the next entry, where it has 4 columns.
template <class F, class Number>
DC_INLINE __m256i look_up_columns(const Number* numbers, [[maybe_unused]] const Number* others) {
    const auto* const grid = F::grid().of;
    if constexpr (F::ENTRIES == 4) return _mm256_set_m128i(look_up_two(grid, numbers + 4), look_up_two(grid, numbers));
    else return _mm256_set_m128i(look_up_four(grid, numbers + 4, others + 4), look_up_four(grid, numbers, others));
}

DC_INLINE __m256i words_of_sums(__m256i a, __m256i b) {                 // of rows 0, 1, 4, 5 and 2, 3, 6, 7, two words each
    const __m256 first = _mm256_castsi256_ps(a), second = _mm256_castsi256_ps(b);
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)));
}

// The factors of part PART of eight rows, as their sums lie: of rows 0, 1, 4, 5, or 2, 3, 6, 7 (OTHERS), each four times.
template <int PART, int OTHERS>
DC_INLINE __m256i factor_of_sums(__m256i pairs) {
    constexpr int64_t FIRST = 0x0100010001000100 + PART * 0x0202020202020202 + OTHERS * 0x0808080808080808, SECOND = FIRST + 0x0404040404040404;
    return _mm256_shuffle_epi8(pairs, _mm256_setr_epi64x(FIRST, SECOND, FIRST, SECOND));
}

// sum += pairs of columns' products, of 4 rows, times their factor.
DC_INLINE void add_scaled_pairs(__m256i pairs, __m256i factor, __m256i& sum) {
#if defined(__AVX512F__)
    sum = _mm256_dpwssd_epi32(sum, pairs, factor);
#else
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, factor));
#endif
}

// A row's sums of 256 columns with one of its bytes.
struct LookedUpSums {
    __m256i products[4];                // of magnitudes: two words for each of rows 0, 1, 4, 5; 2, 3, 6, 7; 8 ..
    Whole signs, x;                     // IQ1_*: what the signs of 8 columns add, and what the codes' offset is multiplied by
};

// IQ1_*: each sign adds the sum of its 8 columns' x, or minus it. The sums of x are for taking the codes' offset back.
template <class F>
DC_INLINE void take_offsets(const uint8_t* quants, Whole factors, const int8_t* x, const int16_t* x_sums, LookedUpSums& to) {
    const __m256i bytes = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi8(-128));
    alignas(32) int64_t sums[4];                                        // a sum for each 8 columns of x
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), _mm256_sub_epi64(_mm256_sad_epu8(bytes, _mm256_setzero_si256()), _mm256_set1_epi64x(1024)));
    const auto signed_sum = [&](auto n) __attribute__((always_inline)) {    // of 16 rows, at most 8 * 127
        constexpr int N = decltype(n)::value;
        const __m256i signs = _mm256_or_si256(_mm256_slli_epi16(upper_of_nibbles<N>(quants + F::PLANES), 4), _mm256_set1_epi16(1));
        return _mm256_sign_epi16(_mm256_set1_epi16(short(sums[N])), signs);
    };
    const __m256i first = _mm256_add_epi16(signed_sum(std::integral_constant<int, 0>()), signed_sum(std::integral_constant<int, 1>()));
    const __m256i second = _mm256_add_epi16(signed_sum(std::integral_constant<int, 2>()), signed_sum(std::integral_constant<int, 3>()));
    const __m256i some = _mm256_unpacklo_epi16(first, second), others = _mm256_unpackhi_epi16(first, second);      // rows 0 .. 3, 8 .. 11; 4 ..
    add_madd(to.signs, factors, whole_of(_mm256_permute2x128_si256(some, others, 0x20), _mm256_permute2x128_si256(some, others, 0x31)));
    add_pairs(to.x, factors, x_sums);
}

// A block's sums with a row's low bytes or, PLANES 2, with both.
template <class F, int PLANES, class Number>
DC_INLINE void add_looked_up(const uint8_t* quants, Whole factors, const Number* numbers, const int8_t* const (&x)[PLANES], LookedUpSums* to) {
    constexpr int STEP = 4 * F::ENTRIES, NEXT = F::ENTRIES == 8 ? 16 : 0;
    // How many times 8 columns fit in 16 bits: two pairs of at most 2 * 62 * 127 = 15,748, or four of 2 * 25 * 127. Then they are scaled
    constexpr int TOGETHER = F::PARTS == 1 && F::OFFSET_SHIFT == 4 ? 4 : 2;
    __m256i signs[4] = {}, pairs[PLANES][4] = {};
    for (int half = 0; F::HAS_SIGNS && half < 2; half++) {
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + F::SIGNS + 32 * half));
        signs[2 * half] = _mm256_unpacklo_epi32(some, some), signs[2 * half + 1] = _mm256_unpackhi_epi32(some, some);
    }
    each_of<4>([&](auto n) __attribute__((always_inline)) {                 // columns 8 n .. 8 n + 7
        constexpr int N = decltype(n)::value, PART = F::PARTS == 2 ? N / 2 : 0;
        __m256i plus[PLANES], minus[PLANES];
        for (int p = 0; p < PLANES; p++) {
            int64_t eight;
            std::memcpy(&eight, x[p] + 8 * N, 8);
            plus[p] = _mm256_set1_epi64x(eight), minus[p] = _mm256_sub_epi8(_mm256_setzero_si256(), plus[p]);
        }
        const __m256i places = _mm256_set1_epi64x((7 - 2 * N) | int64_t(6 - 2 * N) << 32);
        each_of<4>([&](auto q) __attribute__((always_inline)) {                 // of four rows each
            constexpr int Q = decltype(q)::value;
            const Number* const from = numbers + STEP * N + 8 * (Q / 2) + 2 * (Q % 2);
            const __m256i magnitudes = look_up_columns<F>(from, from + NEXT);
            for (int p = 0; p < PLANES; p++) {
                __m256i signed_x = plus[p];
                if constexpr (F::HAS_SIGNS) signed_x = _mm256_blendv_epi8(plus[p], minus[p], _mm256_sllv_epi32(signs[Q], places));
                const __m256i own = _mm256_maddubs_epi16(magnitudes, signed_x);
                __m256i& sum = pairs[p][Q];
                sum = N % TOGETHER == 0 ? own : _mm256_add_epi16(sum, own);
                asm("" : "+x"(sum));        // now: the compiler would look all entries up before
                if constexpr (N % TOGETHER == TOGETHER - 1)
                    add_scaled_pairs(sum, factor_of_sums<PART, Q % 2>(half_of<Q / 2>(factors)), to[p].products[Q]);
            }
        });
    });
}

// The 16 rows' sums.
template <class F>
DC_INLINE Lanes sums_of_rows(const LookedUpSums& sums) {
    const __m256i (&of)[4] = sums.products;
    Whole whole = whole_of(words_of_sums(of[0], of[1]), words_of_sums(of[2], of[3]));
    if constexpr (!F::HAS_SIGNS) whole = less_shifted<F::OFFSET_SHIFT>(less_shifted<0>(whole, less_shifted<0>(sums.x, sums.signs)), sums.x);
    return to_floats(whole);
}

// Row `row` of the panel -> y [16].
template <class F>
__attribute__((noinline)) void looked_up_row(const uint8_t* tile, int64_t groups, const StepGroup* panel, int row, float* y) {
    uint16_t numbers[F::MORE ? F::BLOCKS : 1][16 * F::ENTRIES];
    Lanes total = all(0.0f);
    const int r = row % SET_ROWS;
    for (int64_t g = 0; g < groups; g++, panel++, tile += group_of_blocks_bytes<F>()) {
        for (int i = 0; F::MORE && i < F::BLOCKS; i++) F::find_numbers(quants_of<F>(tile, i), numbers[i]);
        const StepSet& set = panel->sets[row / SET_ROWS];
        LookedUpSums sums[2] = {};
        for (int i = 0; i < F::BLOCKS; i++) {
            prefetch_block<F>(tile, i, AHEAD);
            const uint8_t* const quants = quants_of<F>(tile, i);
            const Whole factors = F::factors(tile, i);
            const int8_t *const low = panel->low[row] + BLOCK * i, *const high = panel->high[row] + BLOCK * i;
            const bool has_high = set.has_high[r] >> i & 1;
            const auto add = [&](const auto* own) __attribute__((always_inline)) {           // left to GCC, it would be called
                if (has_high) add_looked_up<F, 2>(quants, factors, own, {low, high}, sums);
                else add_looked_up<F, 1>(quants, factors, own, {low}, sums);
            };
            if constexpr (F::MORE) add(numbers[i]);
            else add(quants);
            if constexpr (!F::HAS_SIGNS) {
                take_offsets<F>(quants, factors, low, set.low_sums[r][i], sums[0]);
                if (has_high) take_offsets<F>(quants, factors, high, set.high_sums[r][i], sums[1]);
            }
        }
        const Lanes scale = F::shared(tile) * all(set.step[r]);
        add_product(total, scale, sums_of_rows<F>(sums[0]));
        if (set.has_high[r]) add_product(total, scale, sums_of_rows<F>(sums[1]) * all(256.0f));
    }
    store(y, total);
}

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
