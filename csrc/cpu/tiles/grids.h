// Types whose weights are looked up in a grid (grids.def): IQ2_*, IQ3_*, IQ1_*. Their files store the numbers of the grid's entries, and
// so do their tiles, which are therefore about as large as the file. A product turns 256 columns of a tile into codes, a byte each, in
// the L1 cache, for all rows of x that meet them (`Expanded`, multiply_expanded in tiles.inl.h).
//
// layout   a block of 32 columns of a tile. An entry is EACH columns; n = 0 .. 32 / EACH - 1 counts them:
//              [n][16] u8: the low byte of each number
//              SIGNED: 64 B of signs. Bit k / 4 of byte k % 4 of lane r is the sign of column k
//              [HIGH][n] u16: the numbers' other bits; bit r is that of row r
//              IQ1_* instead: [n / 2][16] u8, two nibbles each, the upper one entry n | 1's. A nibble is three bits of the number, and
//              the sign of what is added to the entry's 8 columns
// mapping  one load from the grid for each entry; the 8 columns of 16 rows are then shuffled into words of 4 columns. With VBMI a grid lies
//          in registers, two bytes of digits an entry, and 64 entries are looked up at once. One row of x with AVX2 has
//          looked_up_row.inl.h; more than 8 rows with AVX-512 have tile_pairs.inl.h
// cost     32 columns: with VBMI 18 to 44 cycles on Zen 5; on Zen 4 45 to 47, and 85 to 100 for IQ1_*. With loads 46 to 90 on Zen 5, where
//          GCC took three instructions for an entry's number
// numerics a code is a weight's integer plus 2^OFFSET_SHIFT, as everywhere: here plus or minus the entry, by the weight's sign. A scale is an
//          odd number, 1 .. 31, times one float for 256 columns (OddScales), so x comes in steps (tiles.h). A group's integer sum is at most
//          256 * 62 * 31 * 127 < 2^26; the high bytes of x have another sum
// A part of formats.h, which includes it after what all types have in common.
#pragma once

namespace dc {

// Entries as bytes: the magnitudes of 8 columns or of 4. IQ1_* has codes instead, from which a sign takes 2 away.
template <int EACH, int COUNT>
struct alignas(64) Grid { uint64_t of[COUNT]; };

extern const Grid<8, 256> GRID_IQ2_XXS;
extern const Grid<8, 512> GRID_IQ2_XS;
extern const Grid<8, 1024> GRID_IQ2_S;
extern const Grid<4, 256> GRID_IQ3_XXS;
extern const Grid<4, 512> GRID_IQ3_S;
extern const Grid<8, 2048> GRID_IQ1;

// The same entries as digits. An entry is 16 or 12 bits: `low` has the lower 8, `high` the others. `magnitudes` has the magnitude of each
// digit, plus 2^OFFSET_SHIFT.
template <int COUNT>
struct alignas(64) Digits { uint8_t low[COUNT], high[COUNT], magnitudes[64]; };

extern const Digits<256> DIGITS_IQ2_XXS;
extern const Digits<512> DIGITS_IQ2_XS;
extern const Digits<1024> DIGITS_IQ2_S;
extern const Digits<256> DIGITS_IQ3_XXS;
extern const Digits<512> DIGITS_IQ3_S;
extern const Digits<2048> DIGITS_IQ1;

namespace DC_ISA {

// 32 signs from four times the 7 that a file stores in 28 bits: the eighth makes the number of minuses even.
static inline uint32_t with_eighths(uint32_t sevens) {
    uint32_t signs = 0;
    for (int n = 0; n < 4; n++) signs |= (sevens >> 7 * n & 127) << 8 * n;
    uint32_t odd = signs ^ signs >> 4;
    odd ^= odd >> 2, odd ^= odd >> 1;
    return signs | (odd & 0x01010101) << 7;
}

#if defined(__AVX2__)

// 16 bytes of nibbles -> the upper bits of the numbers of entry N, in their places, for 16 rows.
template <int N>
DC_INLINE __m256i upper_of_nibbles(const uint8_t* nibbles) {
    const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nibbles + N / 2 * 16)));
    return _mm256_slli_epi16(both, N % 2 ? 4 : 8);          // other bits remain above and below them
}

#endif

// The numbers of 16 entries, from their low bytes and the planes of their other bits, which lie STEP bytes from each other.
template <int HIGH, int STEP>
DC_INLINE void numbers_of(const uint8_t* low, const uint8_t* high, uint16_t* to) {
#if defined(__AVX2__)
    __m256i numbers = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m256i bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    for (int h = 0; h < HIGH; h++) {
        uint16_t plane;
        std::memcpy(&plane, high + STEP * h, 2);
        const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(short(plane)), bits), bits);
        numbers = _mm256_or_si256(numbers, _mm256_and_si256(set, _mm256_set1_epi16(short(256 << h))));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), numbers);
#else
    for (int r = 0; r < 16; r++) {
        int number = low[r];
        for (int h = 0; h < HIGH; h++) {
            uint16_t plane;
            std::memcpy(&plane, high + STEP * h, 2);
            number |= (plane >> r & 1) << (8 + h);
        }
        to[r] = uint16_t(number);
    }
#endif
}

#if defined(__AVX2__)

// The entries of two or four numbers that lie side by side in memory. It is assembler because GCC takes three instructions for a number where
// one and a half suffice, and keeps many numbers in memory.
template <class Number>
struct TwoNumbers { Number of[2]; };
template <class Number>
DC_INLINE const TwoNumbers<Number>& two_numbers(const Number* p) { return *reinterpret_cast<const TwoNumbers<Number>*>(p); }
#define DC_SPLIT_1(from, low, high) "movzwl %" from ", %k" high "\n\tmovzbl %b" high ", %k" low "\n\tshr $8, %k" high "\n\t"
#define DC_SPLIT_2(from, low, high) "movl %" from ", %k" high "\n\tmovzwl %w" high ", %k" low "\n\tshr $16, %k" high "\n\t"

// Entries of 8 bytes of two rows.
template <class Number>
DC_INLINE __m128i look_up_two(const uint64_t* grid, const Number* numbers) {
    __m128i two;
    uint64_t i, j;
#define DC_LOOK_UP(split) asm(split("3", "1", "2") "vmovq (%4,%1,8), %0\n\tvmovhps (%4,%2,8), %0, %0" \
                              : "=&x"(two), "=&r"(i), "=&r"(j) : "m"(two_numbers(numbers)), "r"(grid))
    if constexpr (sizeof(Number) == 1) DC_LOOK_UP(DC_SPLIT_1);
    else DC_LOOK_UP(DC_SPLIT_2);
#undef DC_LOOK_UP
    return two;
}

// Entries of 4 bytes: first[0], second[0], first[1], second[1].
template <class Number>
DC_INLINE __m128i look_up_four(const uint64_t* grid, const Number* first, const Number* second) {
    __m128i four;
    uint64_t i, j, k, l;
#define DC_LOOK_UP(split) asm(split("5", "1", "2") split("6", "3", "4") "vmovd (%7,%1,8), %0\n\tvpinsrd $1, (%7,%3,8), %0, %0\n\t" \
                              "vpinsrd $2, (%7,%2,8), %0, %0\n\tvpinsrd $3, (%7,%4,8), %0, %0" \
                              : "=&x"(four), "=&r"(i), "=&r"(j), "=&r"(k), "=&r"(l) : "m"(two_numbers(first)), "m"(two_numbers(second)), "r"(grid))
    if constexpr (sizeof(Number) == 1) DC_LOOK_UP(DC_SPLIT_1);
    else DC_LOOK_UP(DC_SPLIT_2);
#undef DC_LOOK_UP
    return four;
}
#undef DC_SPLIT_1
#undef DC_SPLIT_2

// Entries of 8 bytes of 8 rows -> words of their first 4 columns, and of the others.
template <class Number>
DC_INLINE void look_up_rows(const uint64_t* grid, const Number* numbers, __m256i& first, __m256i& second) {
    const auto rows = [&](int r) { return _mm256_set_m128i(look_up_two(grid, numbers + r + 4), look_up_two(grid, numbers + r)); };
    const __m256 even = _mm256_castsi256_ps(rows(0)), odd = _mm256_castsi256_ps(rows(2));
    first = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88)), second = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xdd));
}
template <class Number>
DC_INLINE __m256i look_up_rows(const uint64_t* grid, const Number* numbers) {
    const auto rows = [&](int r) { return _mm_shuffle_epi32(look_up_four(grid, numbers + r, numbers + r + 2), 0xd8); };
    return _mm256_set_m128i(rows(4), rows(0));
}

// Codes of 4 columns from magnitudes and signs; SHIFT: where these are, to the left.
template <int SHIFT, int OFFSET>
DC_INLINE __m256i with_signs(__m256i magnitudes, __m256i signs) {
    const __m256i offset = _mm256_set1_epi8(char(OFFSET));
    return _mm256_blendv_epi8(_mm256_add_epi8(offset, magnitudes), _mm256_sub_epi8(offset, magnitudes), _mm256_slli_epi16(signs, SHIFT));
}
DC_INLINE void store_codes(uint8_t* to, __m256i codes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), codes); }

#endif

template <int EACH, int COUNT, const Grid<EACH, COUNT>& GRID, const Digits<COUNT>& DIGITS, int HIGH, bool SIGNED, int SHIFT, class Dot>
struct Gridded : Plain<7, SHIFT, Dot> {
    static constexpr bool EXPANDS = true, HAS_SIGNS = SIGNED, NIBBLES = !SIGNED;
    static_assert(!NIBBLES || HIGH == 4, "a nibble of upper bits");
    static constexpr int HALVES = 16, ENTRIES = 32 / EACH, OFFSET = SIGNED ? 1 << SHIFT : 0, MORE = HIGH;
    static constexpr int64_t SIGNS = 16 * ENTRIES, PLANES = SIGNS + (SIGNED ? 64 : 0), BYTES = PLANES + 2 * HIGH * ENTRIES;
    static const Grid<EACH, COUNT>& grid() { return GRID; }
    static const Digits<COUNT>& digits() { return DIGITS; }

    static void put_number(int number, int n, uint8_t* quants, int r) {
        quants[16 * n + r] = uint8_t(number);
        if constexpr (NIBBLES) {
            uint8_t& both = quants[PLANES + 16 * (n / 2) + r];
            both = uint8_t((both & (n % 2 ? 15 : 240)) | (number >> 8 & 15) << n % 2 * 4);
        } else {
            for (int h = 0; h < HIGH; h++) {
                uint8_t& bits = quants[PLANES + 2 * (ENTRIES * h + n) + r / 8];
                bits = uint8_t((bits & ~(1 << r % 8)) | (number >> (8 + h) & 1) << r % 8);
            }
        }
    }
    static int nibble(const uint8_t* quants, int n, int r) { return quants[PLANES + 16 * (n / 2) + r] >> n % 2 * 4 & 15; }
    static void put_signs(uint32_t signs, uint8_t* quants, int r) {             // a bit a column
        uint32_t bits = 0;
        for (int c = 0; c < 8; c++) bits |= ((signs >> 4 * c & 15) * 0x00204081 & 0x01010101) << c;        // each of four bits into its own byte
        put_four(bits, quants + SIGNS + 4 * r);
    }
    static int code(const uint8_t* quants, int r, int k) {
        const int n = k / EACH;
        int number = quants[16 * n + r];
        if constexpr (NIBBLES) number |= nibble(quants, n, r) << 8;
        else
            for (int h = 0; h < HIGH; h++) number |= (quants[PLANES + 2 * (ENTRIES * h + n) + r / 8] >> r % 8 & 1) << (8 + h);
        const int entry = int(GRID.of[number % COUNT] >> 8 * (k % EACH) & 255);
        if (SIGNED) return quants[SIGNS + 4 * r + k % 4] >> k / 4 & 1 ? OFFSET - entry : OFFSET + entry;
        return entry - number / COUNT * 2;
    }

    // The numbers of a block's entries [ENTRIES][16] where they have more than 8 bits, without the sign that IQ1_* have above them.
    // They are written some time before they are read one by one, which has to wait for a store of 32 bytes to reach the cache.
    DC_INLINE void find_numbers(const uint8_t* quants, uint16_t* to) {
        if constexpr (NIBBLES) find_numbers_of_nibbles(quants, to);
        else
            for (int n = 0; n < ENTRIES; n++) numbers_of<HIGH, 2 * ENTRIES>(quants + 16 * n, quants + PLANES + 2 * n, to + 16 * n);
    }

    // A block's codes [8][64], as Quants<7> has them.
    DC_INLINE void expand(const uint8_t* quants, const uint16_t* numbers, uint8_t* to) {
        if constexpr (HIGH == 0) expand_entries(quants, quants, to);
        else expand_entries(quants, numbers, to);
    }

private:
    DC_INLINE void find_numbers_of_nibbles(const uint8_t* quants, uint16_t* to) {
#if defined(__AVX2__)
        put_numbers<0>(quants, to), put_numbers<1>(quants, to), put_numbers<2>(quants, to), put_numbers<3>(quants, to);
#else
        for (int n = 0; n < ENTRIES; n++)
            for (int r = 0; r < 16; r++) to[16 * n + r] = uint16_t(quants[16 * n + r] | (nibble(quants, n, r) & 7) << 8);
#endif
    }
#if defined(__AVX2__)
    template <int N>
    DC_INLINE void put_numbers(const uint8_t* quants, uint16_t* to) {
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quants + 16 * N)));
        const __m256i upper = _mm256_and_si256(upper_of_nibbles<N>(quants + PLANES), _mm256_set1_epi16(0x700));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * N), _mm256_or_si256(low, upper));
    }
#endif
    template <class Number>
    DC_INLINE void expand_entries(const uint8_t* quants, const Number* numbers, uint8_t* to) {
#if defined(__AVX2__)
        put_rows<0>(quants, numbers, to), put_rows<1>(quants, numbers, to), put_rows<2>(quants, numbers, to), put_rows<3>(quants, numbers, to);
        if constexpr (ENTRIES == 8)
            put_rows<4>(quants, numbers, to), put_rows<5>(quants, numbers, to), put_rows<6>(quants, numbers, to), put_rows<7>(quants, numbers, to);
#else
        for (int n = 0; n < ENTRIES; n++) {
            for (int r = 0; r < 16; r++) {
                uint64_t entry = GRID.of[numbers[16 * n + r]];
                if (NIBBLES && nibble(quants, n, r) & 8) entry -= 0x0202020202020202;
                for (int i = 0; i < EACH / 4; i++) put_four(uint32_t(entry >> 32 * i), to + 64 * (EACH / 4 * n + i) + 4 * r);
            }
        }
        for (int c = 0; SIGNED && c < 8; c++)
            for (int j = 0; j < 64; j++) {
                const uint8_t entry = to[64 * c + j];
                to[64 * c + j] = uint8_t(quants[SIGNS + j] >> c & 1 ? OFFSET - entry : OFFSET + entry);
            }
#endif
    }

#if defined(__AVX2__)
    template <int N, class Number>
    DC_INLINE void put_rows(const uint8_t* quants, const Number* numbers, uint8_t* to) {
        put_half<N, 0>(quants, numbers + 16 * N, to), put_half<N, 8>(quants, numbers + 16 * N, to);
    }
    template <int N, int FIRST, class Number>                               // rows FIRST .. FIRST + 7
    DC_INLINE void put_half(const uint8_t* quants, const Number* numbers, uint8_t* to) {
        to += 4 * FIRST, numbers += FIRST;
        if constexpr (EACH == 4) {
            const __m256i signs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + SIGNS + 4 * FIRST));
            store_codes(to + 64 * N, with_signs<7 - N, OFFSET>(look_up_rows(GRID.of, numbers), signs));
        } else {
            __m256i first, second;
            look_up_rows(GRID.of, numbers, first, second);
            if constexpr (SIGNED) {
                const __m256i signs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + SIGNS + 4 * FIRST));
                first = with_signs<7 - 2 * N, OFFSET>(first, signs), second = with_signs<6 - 2 * N, OFFSET>(second, signs);
            } else {
                const auto* const at = reinterpret_cast<const __m128i*>(quants + PLANES + 16 * (N / 2) + FIRST);
                const __m256i sign = _mm256_set1_epi32(N % 2 ? 128 : 8), nibbles = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
                const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(nibbles, sign), sign), less = _mm256_add_epi8(set, set);
                first = _mm256_add_epi8(first, less), second = _mm256_add_epi8(second, less);
            }
            store_codes(to + 128 * N, first), store_codes(to + 128 * N + 64, second);
        }
    }
#endif
};

#if defined(__AVX512F__)

#define DC_VBMI __attribute__((target("avx512vbmi")))
#define DC_VBMI_INLINE static inline __attribute__((always_inline, target("avx512vbmi")))

// The bytes of a table at 64 numbers. A number is a byte and, where it has more than 8 bits, a bit of each mask.
template <int COUNT>
DC_VBMI_INLINE __m512i bytes_of(const uint8_t* table, __m512i numbers, const __mmask64* bits) {
    if constexpr (COUNT == 128) return _mm512_permutex2var_epi8(_mm512_load_si512(table), numbers, _mm512_load_si512(table + 64));
    else {
        constexpr int BIT = COUNT == 256 ? 0 : COUNT == 512 ? 1 : COUNT == 1024 ? 2 : 3;
        return _mm512_mask_mov_epi8(bytes_of<COUNT / 2>(table, numbers, bits), bits[BIT], bytes_of<COUNT / 2>(table + COUNT / 2, numbers, bits));
    }
}

struct alignas(64) Places { uint8_t of[64]; };

// Puts entry N's digits of row r into lane r: the byte of `low` four times, or (`both`) the bytes of `low` and `high` twice.
constexpr Places places_of(int n, bool both) {
    Places places = {};
    for (int i = 0; i < 64; i++) places.of[i] = uint8_t(16 * n + i / 4 + (both && i % 2 ? 64 : 0));
    return places;
}
template <int N, bool BOTH>
inline constexpr Places PLACES = places_of(N, BOTH);

// Takes from each lane the bytes that begin at its bits 0, STEP, 2 STEP and 3 STEP.
constexpr Places shifts_of(int step) {
    Places shifts = {};
    for (int i = 0; i < 64; i++) shifts.of[i] = uint8_t(i / 4 % 2 * 32 + i % 4 * step);
    return shifts;
}
template <int STEP>
inline constexpr Places SHIFTS = shifts_of(STEP);

// Chunk C of a block from lanes of digits.
template <class F, int C>
DC_VBMI_INLINE void put_chunk(const uint8_t* quants, [[maybe_unused]] __mmask64 less, __m512i digits, uint8_t* to) {
    constexpr int STEP = F::ENTRIES == 8 ? 3 : 2;
    const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(SHIFTS<STEP>.of), digits);
    const __m512i codes = _mm512_permutexvar_epi8(shifted, _mm512_load_si512(F::digits().magnitudes));
    if constexpr (F::HAS_SIGNS) {
        const __mmask64 minus = _mm512_test_epi8_mask(_mm512_loadu_si512(quants + F::SIGNS), _mm512_set1_epi8(char(1 << C)));
        _mm512_store_si512(to + 64 * C, _mm512_mask_sub_epi8(codes, minus, _mm512_set1_epi8(char(2 * F::OFFSET)), codes));
    } else {
        const __mmask16 own = __mmask16(less >> C / 2 * 16);
        _mm512_store_si512(to + 64 * C, _mm512_mask_sub_epi8(codes, _mm512_movepi8_mask(_mm512_maskz_set1_epi32(own, -1)), codes, _mm512_set1_epi8(2)));
    }
}

// Entries 4 PART .. 4 PART + 3.
template <class F, int PART>
DC_VBMI_INLINE void put_entries(const uint8_t* quants, uint8_t* to) {
    const __m512i numbers = _mm512_loadu_si512(quants + 64 * PART);
    __mmask64 bits[5] = {_mm512_movepi8_mask(numbers)};
    if constexpr (F::NIBBLES) {
        const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + F::PLANES)));
        const __m512i nibbles = _mm512_shuffle_i64x2(all, all, 0x50);       // of entries 0, 1, 2, 3: the first 16 bytes twice, then the others
        for (int h = 0; h < F::MORE; h++)
            bits[1 + h] = _mm512_test_epi8_mask(nibbles, _mm512_mask_mov_epi64(_mm512_set1_epi8(char(1 << h)), 0xcc, _mm512_set1_epi8(char(16 << h))));
    } else {
        for (int h = 0; h < F::MORE; h++) {
            uint64_t plane;
            std::memcpy(&plane, quants + F::PLANES + 2 * F::ENTRIES * h + 8 * PART, 8);
            bits[1 + h] = plane;
        }
    }
    const auto& digits = F::digits();
    const __m512i low = bytes_of<sizeof digits.low>(digits.low, numbers, bits), high = bytes_of<sizeof digits.low>(digits.high, numbers, bits);
#define DC_SPREAD(n, from) _mm512_permutexvar_epi8(_mm512_load_si512(PLACES<n, false>.of), from)
#define DC_SPREAD_BOTH(n) _mm512_permutex2var_epi8(low, _mm512_load_si512(PLACES<n, true>.of), high)
    if constexpr (F::ENTRIES == 8) {
        put_chunk<F, 4 * PART>(quants, bits[4], DC_SPREAD_BOTH(0), to), put_chunk<F, 4 * PART + 1>(quants, bits[4], DC_SPREAD_BOTH(1), to);
        put_chunk<F, 4 * PART + 2>(quants, bits[4], DC_SPREAD_BOTH(2), to), put_chunk<F, 4 * PART + 3>(quants, bits[4], DC_SPREAD_BOTH(3), to);
    } else {
        put_chunk<F, 0>(quants, bits[4], DC_SPREAD(0, low), to), put_chunk<F, 1>(quants, bits[4], DC_SPREAD(0, high), to);
        put_chunk<F, 2>(quants, bits[4], DC_SPREAD(1, low), to), put_chunk<F, 3>(quants, bits[4], DC_SPREAD(1, high), to);
        put_chunk<F, 4>(quants, bits[4], DC_SPREAD(2, low), to), put_chunk<F, 5>(quants, bits[4], DC_SPREAD(2, high), to);
        put_chunk<F, 6>(quants, bits[4], DC_SPREAD(3, low), to), put_chunk<F, 7>(quants, bits[4], DC_SPREAD(3, high), to);
    }
#undef DC_SPREAD
#undef DC_SPREAD_BOTH
}

template <class F>
DC_VBMI_INLINE void expand_in_registers(const uint8_t* quants, uint8_t* to) {
    put_entries<F, 0>(quants, to);
    if constexpr (F::ENTRIES == 8) put_entries<F, 1>(quants, to);
}

#endif

// A type as products take it, whose codes are bytes, and scales integer factors, and all is aligned. f32 [16], what the scales share; i16 [8][16][2],
// the factors, one for 16 columns; then the codes [8][8][64]. Types that agree in the arguments share the kernels.
template <int SHIFT, class Dot, int PARTS_>
struct CodesAsBytes : Plain<7, SHIFT, Dot> {
    static constexpr bool EXPANDS = true, WHOLE_SCALES = true, HIGH_APART = true;
    static constexpr int PARTS = PARTS_;
    static constexpr int64_t BLOCKS = 8, FACTORS = 64, SCALE_BYTES = FACTORS + 64 * BLOCKS, BYTES = 512;

    DC_INLINE Lanes shared(const uint8_t* group) { return load(reinterpret_cast<const float*>(group)); }
    DC_INLINE Whole factors(const uint8_t* group, int i) { return load_whole(group + FACTORS + 64 * i); }
};

template <class F>
using Expanded = CodesAsBytes<F::OFFSET_SHIFT, typename F::Dot, F::PARTS>;

template <class F>
DC_INLINE void expand_scales(const uint8_t* group, uint8_t* to) {
    static_assert(F::WHOLE_SCALES && F::HIGH_APART && !F::HAS_MINIMUM && F::BLOCKS == Expanded<F>::BLOCKS, "CodesAsBytes");
    store(reinterpret_cast<float*>(to), F::shared(group));
    for (int i = 0; i < F::BLOCKS; i++) store_whole(to + Expanded<F>::FACTORS + 64 * i, F::factors(group, i));
}

// Scales of 4 bits s, which stand for odd numbers: d * (2 s + 1) / OF. Two lie in a byte: those of a block's two times 16 columns (PARTS_ = 2),
// or those of blocks i and i + 1, of 32 columns each.
template <int OF, int PARTS_>
struct OddScales {
    static constexpr int64_t BLOCKS = 8, SCALE_BYTES = 32 + 64 * PARTS_;     // d f16 [16]; u8 [4 PARTS][16]
    static constexpr int PARTS = PARTS_;
    static constexpr bool WHOLE_SCALES = true, HIGH_APART = true;

    static void put_scale(int s, int i, int part, uint8_t* group, int r) {
        const int place = i * PARTS_ + part, shift = place % 2 * 4;
        uint8_t& both = group[32 + 16 * (place / 2) + r];
        both = uint8_t((both & ~(15 << shift)) | s << shift);
    }
    DC_INLINE Lanes shared(const uint8_t* group) { return halves(group) * all(1.0f / OF); }
    DC_INLINE Whole factors(const uint8_t* group, int i) {                   // two equal ones where a scale is for 32 columns
        const uint8_t* const nibbles = group + 32 + 16 * (i * PARTS_ / 2);
        if constexpr (PARTS_ == 2) return odd_pairs<0, 1>(nibbles);
        else return i % 2 ? odd_pairs<1, 1>(nibbles) : odd_pairs<0, 0>(nibbles);
    }
    static Lanes scale(const uint8_t* group, int i, int part) {              // exact, as `shared` and the factors are short
        const Whole pairs = factors(group, i);
        return shared(group) * to_floats(part ? UnsignedDot::factor<1>(pairs) : UnsignedDot::factor<0>(pairs));
    }
};

// ---- the types. A file's block is read 32 columns at a time: put_block.

static inline int two_bytes(const uint8_t* p) { return p[0] | p[1] << 8; }
static inline uint32_t word_at(const uint8_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

template <>
struct Format<Weight::iq2_xxs> : FileBlock<Weight::iq2_xxs>, Gridded<8, 256, GRID_IQ2_XXS, DIGITS_IQ2_XXS, 0, true, 6, UnsignedDot>, OddScales<8, 1> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        const uint8_t* const from = block + 2 + 8 * i;
        for (int n = 0; n < 4; n++) put_number(from[n], n, quants, r);
        put_signs(with_eighths(word_at(from + 4)), quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 8; i++) put_scale(block[2 + 8 * i + 7] >> 4, i, 0, group, r);
    }
};

template <>
struct Format<Weight::iq2_xs> : FileBlock<Weight::iq2_xs>, Gridded<8, 512, GRID_IQ2_XS, DIGITS_IQ2_XS, 1, true, 6, UnsignedDot>, OddScales<8, 2> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        uint32_t sevens = 0;
        for (int n = 0; n < 4; n++) {
            const int both = two_bytes(block + 2 + 8 * i + 2 * n);
            put_number(both & 511, n, quants, r);
            sevens |= uint32_t(both >> 9) << 7 * n;
        }
        put_signs(with_eighths(sevens), quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 16; i++) put_scale(block[66 + i / 2] >> i % 2 * 4 & 15, i / 2, i % 2, group, r);
    }
};

template <>
struct Format<Weight::iq2_s> : FileBlock<Weight::iq2_s>, Gridded<8, 1024, GRID_IQ2_S, DIGITS_IQ2_S, 2, true, 6, UnsignedDot>, OddScales<8, 2> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        for (int n = 0; n < 4; n++) put_number(block[2 + 4 * i + n] | (block[66 + i] >> 2 * n & 3) << 8, n, quants, r);
        put_signs(word_at(block + 34 + 4 * i), quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 16; i++) put_scale(block[74 + i / 2] >> i % 2 * 4 & 15, i / 2, i % 2, group, r);
    }
};

template <>
struct Format<Weight::iq3_xxs> : FileBlock<Weight::iq3_xxs>, Gridded<4, 256, GRID_IQ3_XXS, DIGITS_IQ3_XXS, 0, true, 6, UnsignedDot>, OddScales<4, 1> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        for (int n = 0; n < 8; n++) put_number(block[2 + 8 * i + n], n, quants, r);
        put_signs(with_eighths(word_at(block + 66 + 4 * i)), quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 8; i++) put_scale(block[66 + 4 * i + 3] >> 4, i, 0, group, r);
    }
};

template <>
struct Format<Weight::iq3_s> : FileBlock<Weight::iq3_s>, Gridded<4, 512, GRID_IQ3_S, DIGITS_IQ3_S, 1, true, 4, FiveBitDot>, OddScales<1, 1> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        for (int n = 0; n < 8; n++) put_number(block[2 + 8 * i + n] | (block[66 + i] >> n & 1) << 8, n, quants, r);
        put_signs(word_at(block + 74 + 4 * i), quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 8; i++) put_scale(block[106 + i / 2] >> i % 2 * 4 & 15, i, 0, group, r);
    }
};

template <>
struct Format<Weight::iq1_s> : FileBlock<Weight::iq1_s>, Gridded<8, 2048, GRID_IQ1, DIGITS_IQ1, 4, false, 4, FiveBitDot>, OddScales<8, 1> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        const int more = two_bytes(block + 34 + 2 * i);
        for (int n = 0; n < 4; n++) put_number(block[2 + 4 * i + n] | (more >> 3 * n & 7) << 8 | more >> 15 << 11, n, quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        copy_half(block, group + 2 * r);
        for (int i = 0; i < 8; i++) put_scale(two_bytes(block + 34 + 2 * i) >> 12 & 7, i, 0, group, r);
    }
};

template <>
struct Format<Weight::iq1_m> : FileBlock<Weight::iq1_m>, Gridded<8, 2048, GRID_IQ1, DIGITS_IQ1, 4, false, 4, FiveBitDot>, OddScales<8, 2> {
    using OddScales::PARTS, OddScales::WHOLE_SCALES, OddScales::HIGH_APART;
    static void put_block(const uint8_t* block, int i, uint8_t* quants, int r) {
        for (int n = 0; n < 4; n++) put_number(block[4 * i + n] | (block[32 + 2 * i + n / 2] >> n % 2 * 4 & 15) << 8, n, quants, r);
    }
    static void put_scales(const uint8_t* block, uint8_t* group, int, int r) {
        const uint8_t* const scales = block + 48;       // four times four of 3 bits, above each four a quarter of d
        for (int i = 0; i < 2; i++) group[2 * r + i] = uint8_t(scales[4 * i + 1] >> 4 | (scales[4 * i + 3] & 0xf0));
        for (int i = 0; i < 16; i++) put_scale(two_bytes(scales + 2 * (i / 4)) >> i % 4 * 3 & 7, i / 2, i % 2, group, r);
    }
};

}  // namespace DC_ISA
}  // namespace dc
