// One row of x times a tile whose type is looked up in a grid (grids.h), with registers of 256 bits: with AVX2, and with AVX-512 where it is
// the faster way, of IQ1_* and without VBMI.
//
// mapping  a register has 8 columns of 4 rows of the tile: 0, 1, 4, 5 or 2, 3, 6, 7 of eight, as unpacking leaves their signs. Magnitudes go
//          from the grid to the dot product without codes in between, and x takes the signs
// cost     of 32 columns with AVX2 on Zen 4: 63 to 81 cycles of IQ2_*, 106 and 119 of IQ3_*, 69 and 80 of IQ1_*. Looking up alone takes 41 to 44 of
//          these, and 76 of IQ3_*, whose 8 columns are two entries: two and a half instructions for an entry, its number included
// numerics the exact integer sums of the other kernels, and as there two products for each scale of a block that has a fine plane
// A part of tiles.inl.h.
#pragma once

namespace dc {
namespace DC_ISA {
namespace {

#if defined(__AVX2__)

#if defined(__AVX512F__)
DC_INLINE Whole whole_of(__m256i low, __m256i high) { return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)}; }
DC_INLINE __m256i dot_256(__m256i sum, __m256i codes, __m256i x) { return _mm256_dpbusd_epi32(sum, codes, x); }
#else
DC_INLINE Whole whole_of(__m256i low, __m256i high) { return {low, high}; }
#if defined(DC_DOT_256)
DC_INLINE __m256i dot_256(__m256i sum, __m256i codes, __m256i x) {
    asm(DC_DOT_256 " %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
    return sum;
}
#endif
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

// What 8 columns add to the sums of 4 rows: pairs of at most 2 * 62 * 127 = 15,748, two of which fit in 16 bits. `part`: of its columns the
// first half, then the other; `sum` has the parts.
template <int N, int PARTS>
DC_INLINE void add_columns(__m256i magnitudes, __m256i x, __m256i& part, __m256i (&sum)[PARTS]) {
#if defined(DC_DOT_256) || defined(__AVX512F__)
    if (N == 0 || (PARTS == 2 && N == 2)) part = _mm256_setzero_si256();
    part = dot_256(part, magnitudes, x);
    if (N == 3 || (PARTS == 2 && N == 1)) sum[PARTS == 2 ? N / 2 : 0] = part;
#else
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, x);
    if (N % 2 == 0) part = pairs;
    else {
        part = widen_pairs(_mm256_add_epi16(part, pairs));
        sum[PARTS == 2 ? N / 2 : 0] = PARTS == 1 && N == 3 ? _mm256_add_epi32(sum[0], part) : part;
    }
    asm("" : "+x"(part));               // now: the compiler would look all entries up before
#endif
}

// IQ1_*: what the codes' offset takes from the sums of a part, and what each sign of 8 columns adds: the sum of their x, or minus it.
template <class F>
DC_INLINE void take_offsets(const uint8_t* quants, const int8_t* x, __m256i (&whole)[F::PARTS][2]) {
    const __m256i bytes = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi8(-128));
    alignas(32) int64_t sums[4];                                        // of 8 columns of x
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), _mm256_sub_epi64(_mm256_sad_epu8(bytes, _mm256_setzero_si256()), _mm256_set1_epi64x(1024)));
    const auto signed_sum = [&](auto n) __attribute__((always_inline)) {    // of 16 rows, at most 8 * 127
        constexpr int N = decltype(n)::value;
        const __m256i signs = _mm256_or_si256(_mm256_slli_epi16(upper_of_nibbles<N>(quants + F::PLANES), 4), _mm256_set1_epi16(1));
        return _mm256_sign_epi16(_mm256_set1_epi16(short(sums[N])), signs);
    };
    const __m256i first = _mm256_add_epi16(signed_sum(std::integral_constant<int, 0>()), signed_sum(std::integral_constant<int, 1>()));
    const __m256i second = _mm256_add_epi16(signed_sum(std::integral_constant<int, 2>()), signed_sum(std::integral_constant<int, 3>()));
    const auto add = [&](__m256i (&sum)[2], __m256i signed_sums, int64_t x_sum) __attribute__((always_inline)) {
        const __m256i offset = _mm256_set1_epi32(-((1 << F::OFFSET_SHIFT) + 1) * int(x_sum));
        sum[0] = _mm256_add_epi32(sum[0], _mm256_add_epi32(offset, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(signed_sums))));
        sum[1] = _mm256_add_epi32(sum[1], _mm256_add_epi32(offset, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(signed_sums, 1))));
    };
    if constexpr (F::PARTS == 1) add(whole[0], _mm256_add_epi16(first, second), sums[0] + sums[1] + sums[2] + sums[3]);
    else add(whole[0], first, sums[0] + sums[1]), add(whole[1], second, sums[2] + sums[3]);
}

// whole [PLANES][PARTS] = a block's sums with a row's planes.
template <class F, int PLANES, class Number>
DC_INLINE void sum_looked_up(const uint8_t* quants, const Number* numbers, const int8_t* const (&x)[PLANES], Whole (&whole)[PLANES][F::PARTS]) {
    constexpr int STEP = 4 * F::ENTRIES, NEXT = F::ENTRIES == 8 ? 16 : 0;
    __m256i signs[4] = {}, half_sums[PLANES][4], sums[PLANES][4][F::PARTS];
    for (int half = 0; F::HAS_SIGNS && half < 2; half++) {
        const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + F::SIGNS + 32 * half));
        signs[2 * half] = _mm256_unpacklo_epi32(some, some), signs[2 * half + 1] = _mm256_unpackhi_epi32(some, some);
    }
    const auto columns = [&](auto n) __attribute__((always_inline)) {       // 8 n .. 8 n + 7
        constexpr int N = decltype(n)::value;
        __m256i plus[PLANES], minus[PLANES];
        for (int p = 0; p < PLANES; p++) {
            int64_t eight;
            std::memcpy(&eight, x[p] + 8 * N, 8);
            plus[p] = _mm256_set1_epi64x(eight), minus[p] = _mm256_sub_epi8(_mm256_setzero_si256(), plus[p]);
        }
        const __m256i places = _mm256_set1_epi64x((7 - 2 * N) | int64_t(6 - 2 * N) << 32);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const Number* const from = numbers + STEP * N + 8 * half;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const __m256i magnitudes = look_up_columns<F>(from + 2 * i, from + 2 * i + NEXT);
                for (int p = 0; p < PLANES; p++) {
                    __m256i signed_x = plus[p];
                    if constexpr (F::HAS_SIGNS) signed_x = _mm256_blendv_epi8(plus[p], minus[p], _mm256_sllv_epi32(signs[2 * half + i], places));
                    add_columns<N>(magnitudes, signed_x, half_sums[p][2 * half + i], sums[p][2 * half + i]);
                }
            }
        }
    };
    columns(std::integral_constant<int, 0>()), columns(std::integral_constant<int, 1>());
    columns(std::integral_constant<int, 2>()), columns(std::integral_constant<int, 3>());
    for (int p = 0; p < PLANES; p++) {
        __m256i halves[F::PARTS][2];
        for (int place = 0; place < F::PARTS; place++)
            for (int half = 0; half < 2; half++) halves[place][half] = words_of_sums(sums[p][2 * half][place], sums[p][2 * half + 1][place]);
        if constexpr (!F::HAS_SIGNS) take_offsets<F>(quants, x[p], halves);
        for (int place = 0; place < F::PARTS; place++) whole[p][place] = whole_of(halves[place][0], halves[place][1]);
    }
}

// One block onto the total, as add_block adds it.
template <class F, int PLANES, class Number>
DC_INLINE void add_looked_up(const uint8_t* group, int i, const Number* numbers, const int8_t* const (&x)[PLANES], float scale, Lanes& total) {
    static_assert(F::FINE_APART && !F::HAS_MINIMUM, "looked up");
    Whole whole[PLANES][F::PARTS];
    sum_looked_up<F>(quants_of<F>(group, i), numbers, x, whole);
    Lanes d[F::PARTS];
    for (int part = 0; part < F::PARTS; part++) d[part] = F::scale(group, i, part);
    for (int p = 0; p < PLANES; p++)
        for (int part = 0; part < F::PARTS; part++)
            add_product(total, (p ? d[part] * all(1.0f / 256) : d[part]) * all(scale), to_floats(whole[p][part]));
}

// Row `row` of the panel -> y [16].
template <class F>
__attribute__((noinline)) void looked_up_row(const uint8_t* tile, int64_t blocks, const PanelBlock* panel, int row, float* y) {
    uint16_t numbers[F::MORE ? F::BLOCKS : 1][16 * F::ENTRIES];
    Lanes total = all(0.0f);
    const int r = row % SET_ROWS;
    for (int64_t b = 0; b < blocks; b += F::BLOCKS, tile += group_of_blocks_bytes<F>()) {
        for (int i = 0; F::MORE && i < F::BLOCKS; i++) F::find_numbers(quants_of<F>(tile, i), numbers[i]);
        for (int i = 0; i < F::BLOCKS; i++, panel++) {
            prefetch_block<F>(tile, i, AHEAD);
            const PanelSet& set = panel->sets[row / SET_ROWS];
            const auto add = [&](const auto* own) __attribute__((always_inline)) {           // left to GCC, it would be called
                if (set.has_fine[r]) add_looked_up<F, 2>(tile, i, own, {panel->x[row], panel->fine[row]}, set.scale[r], total);
                else add_looked_up<F, 1>(tile, i, own, {panel->x[row]}, set.scale[r], total);
            };
            if constexpr (F::MORE) add(numbers[i]);
            else add(quants_of<F>(tile, i));
        }
    }
    store(y, total);
}

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
