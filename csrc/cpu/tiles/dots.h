// Integer dot products in sixteen lanes. The unit is a chunk: 16 rows x 4 columns of weights, one word a lane, times 4 bytes of x
// that all lanes share. A block of 32 columns has 8 chunks. Its sum is exact, so it is equal on every instruction set, however it
// is made.
//
// There are four dot products, by how many bits a weight's code has. Each sums (code - 2^SHIFT) * x:
//     NibbleDot       4 bits      FiveBitDot        5 bits      UnsignedDot       7 bits      SignedDot       8 bits, SHIFT 7
// It is used as begin<SHIFT>(minus), then dot(sum, weights(codes), x) for each chunk, then end<SHIFT>(sum, minus), where `minus` is
// minus the sum of x. With HALFWAY a sum can hold only half of a block's chunks; `add` adds the two halves after their `end`.
//
// Sums times integer scales:
//     factor<PART>(pairs), add_scaled<WIDE>(total, sum, factor)
//                              total += sum * factor. The factor has 16 bits. Without WIDE the sum has 16 bits too, and is that of
//                              4 chunks. With WIDE it is that of a block (of 4 chunks where the Dot is HALFWAY) and may be any
//                              whose product with the factor fits in 32 bits
//     dot_scaled(total, weights, x, factor)
//                              total += a chunk's sum * factor; it takes the place of dot and add_scaled where SCALES_PAIRS<Dot>
//     add_pairs(total, pairs, x)
//                              total += pairs[0] * x[0] + pairs[1] * x[1], of 16 bits each; all lanes share x
//     odd_pairs<LOW, HIGH>(bytes)
//                              of each lane's byte two numbers of 16 bits, each 2 * a nibble + 1. LOW says which nibble the lower
//                              number takes, HIGH which the upper one: 0 is the byte's lower nibble, 1 its upper
//     less_shifted<SHIFT>(a, b)
//                              a - 2^SHIFT * b
//
// How each instruction set makes them:
//     avx512 (VNNI)   u8 x i8 with x broadcast from memory; a sum begins with the number that takes the codes' offset back
//     avxvnni, evex   the same instruction in registers of 256 bits: avx512's definitions with avx2's registers
//     avx2            nibbles: pairs in int16, at most 8 * 2 * 15 * 127 = 30,480; five bits: as nibbles, at most
//                     4 * 2 * 31 * 127 = 31,496 halfway; unsigned: pairs at most 2 * 127 * 127 = 32,258, widened at once, or scaled, which is
//                     as fast; signed: |w| times x with w's sign, at most 2 * 128 * 127 = 32,512, widened at once (u8 x i8 with the offset
//                     still in would reach 64,770)
//     neon            as avx2's unsigned, but products take all of int8: pairs at most 2 * 128 * 127. Signed codes have their offset
//                     subtracted before
//     dotprod         sdot. Its weights are signed too, so signed codes have their offset subtracted before
//     i8mm            usdot, u8 x i8 like VNNI; for two rows of x and more usmmla, 2 x 8 times 8 x 2
//     portable        the definition
#pragma once

#include "cpu/lanes.h"

// The text of the dot product's instruction for the assembler, for files whose DC_ISA is avxvnni or evex. Such files are left out with
// compilers that may not know it.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11)
#define DC_KNOWS_AVXVNNI
#endif

namespace dc {
namespace DC_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512F__)

struct Words { __m512i v; };
using Sum = Words;
using Whole = Words;

DC_INLINE Words load_words_again(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }      // the compiler keeps what it has loaded
DC_INLINE Words load_words(const uint8_t* p) {
    __m512i words = _mm512_loadu_si512(p);
    asm("" : "+v"(words));              // loads are as scarce as multipliers, and GCC would load once for each half of the nibbles
    return {words};
}
DC_INLINE Words operator|(Words a, Words b) { return {_mm512_or_si512(a.v, b.v)}; }
DC_INLINE Words low_nibbles(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
DC_INLINE Words high_nibbles(Words w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }
template <int LEFT, int MASK>           // of each byte, shifted left (right where LEFT < 0), the bits of MASK
DC_INLINE Words take_bits(Words w) {
    __m512i shifted = w.v;
    if constexpr (LEFT > 0) shifted = _mm512_slli_epi16(w.v, LEFT);
    if constexpr (LEFT < 0) shifted = _mm512_srli_epi16(w.v, -LEFT);
    return {_mm512_and_si512(shifted, _mm512_set1_epi8(MASK))};
}

struct Four { int8_t of[4]; };

struct UnsignedDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(Words codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(const int32_t& minus) {      // GCC 12 would broadcast x, or minus, with an instruction of its own
        if constexpr (SHIFT < 0) return {_mm512_setzero_si512()};
        __m512i sum;
        asm("vpslld %2, %1%{1to16%}, %0" : "=v"(sum) : "m"(minus), "i"(SHIFT));
        return {sum};
    }
    DC_INLINE void dot(Sum& sum, Words w, const int8_t* x) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(w.v), "m"(*reinterpret_cast<const Four*>(x)));
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t) { return sum; }
    template <int PART>
    DC_INLINE Whole factor(Whole pairs) { return {PART ? _mm512_srli_epi32(pairs.v, 16) : _mm512_and_si512(pairs.v, _mm512_set1_epi32(0xffff))}; }
    template <bool WIDE>
    DC_INLINE void add_scaled(Whole& total, Sum sum, Whole factor) {
        if constexpr (WIDE) total.v = _mm512_add_epi32(total.v, _mm512_mullo_epi32(sum.v, factor.v));
        else total.v = _mm512_dpwssd_epi32(total.v, sum.v, factor.v);
    }
};
using NibbleDot = UnsignedDot;
using FiveBitDot = UnsignedDot;
using SignedDot = UnsignedDot;
DC_INLINE void add_madd(Whole& total, Words a, Words b) { total.v = _mm512_dpwssd_epi32(total.v, a.v, b.v); }

DC_INLINE Words look_up(Words codes, const uint8_t* table) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes.v)};
}

DC_INLINE Whole add_fine(Whole sum, Whole fine) { return {_mm512_add_epi32(_mm512_slli_epi32(sum.v, 8), fine.v)}; }
DC_INLINE Lanes to_floats(Whole sum) { return {_mm512_cvtepi32_ps(sum.v)}; }
DC_INLINE __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
DC_INLINE Lanes lanes_of_bytes(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(p)))}; }
DC_INLINE Lanes lanes_of_signed_bytes(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(p)))}; }
DC_INLINE Lanes powers_of_bytes(const uint8_t* p) {         // 2^(byte - 127), 0 for a byte of 0
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(sixteen(p)), 23))};
}
DC_INLINE Whole pairs_of_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
DC_INLINE Whole pairs_of_signed_bytes(const uint8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
DC_INLINE Whole low_nibbles_of_pairs(Whole pairs) { return {_mm512_and_si512(pairs.v, _mm512_set1_epi16(15))}; }
DC_INLINE Whole high_nibbles_of_pairs(Whole pairs) { return {_mm512_srli_epi16(pairs.v, 4)}; }
DC_INLINE void add_pairs(Whole& total, Whole pairs, const int16_t* x) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(total.v) : "v"(pairs.v), "m"(*reinterpret_cast<const Four*>(x)));
}
DC_INLINE Whole load_whole(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
DC_INLINE void store_whole(uint8_t* p, Whole whole) { _mm512_storeu_si512(p, whole.v); }
template <int LOW, int HIGH>
DC_INLINE Whole odd_pairs(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(p));
    const __m512i low = LOW ? _mm512_srli_epi32(bytes, 3) : _mm512_slli_epi32(bytes, 1), high = _mm512_slli_epi32(bytes, HIGH ? 13 : 17);
    return {_mm512_or_si512(_mm512_and_si512(_mm512_or_si512(low, high), _mm512_set1_epi16(30)), _mm512_set1_epi16(1))};
}
template <int SHIFT>
DC_INLINE Whole less_shifted(Whole a, Whole b) { return {_mm512_sub_epi32(a.v, _mm512_slli_epi32(b.v, SHIFT))}; }

#elif defined(__AVX2__)

struct Words { __m256i lo, hi; };
using Sum = Words;
using Whole = Words;

DC_INLINE Words load_words(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
DC_INLINE Words load_words_again(const uint8_t* p) { return load_words(p); }
DC_INLINE Words operator|(Words a, Words b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
DC_INLINE Words masked(Words w, int mask) {
    const __m256i bits = _mm256_set1_epi8(char(mask));
    return {_mm256_and_si256(w.lo, bits), _mm256_and_si256(w.hi, bits)};
}
DC_INLINE Words low_nibbles(Words w) { return masked(w, 15); }
DC_INLINE Words high_nibbles(Words w) { return masked({_mm256_srli_epi16(w.lo, 4), _mm256_srli_epi16(w.hi, 4)}, 15); }
template <int LEFT, int MASK>
DC_INLINE Words take_bits(Words w) {
    if constexpr (LEFT > 0) return masked({_mm256_slli_epi16(w.lo, LEFT), _mm256_slli_epi16(w.hi, LEFT)}, MASK);
    else return masked({_mm256_srli_epi16(w.lo, -LEFT), _mm256_srli_epi16(w.hi, -LEFT)}, MASK);
}
DC_INLINE __m256i four(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}
// The compiler would add in another order, and keep all the products until then: twice what its 16 registers hold.
DC_INLINE void add_now(Sum& sum) { asm("" : "+x"(sum.lo), "+x"(sum.hi)); }
DC_INLINE __m256i widen_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
DC_INLINE void add_madd(Whole& total, Words a, Words b) {
    total = {_mm256_add_epi32(total.lo, _mm256_madd_epi16(a.lo, b.lo)), _mm256_add_epi32(total.hi, _mm256_madd_epi16(a.hi, b.hi))};
    add_now(total);
}
template <int SHIFT>
DC_INLINE __m256i offset_of(int32_t minus) {
    if constexpr (SHIFT < 0) return _mm256_setzero_si256();
    else return _mm256_set1_epi32(minus * (1 << SHIFT));
}

#if defined(DC_DOT_256)

struct UnsignedDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(Words codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t minus) { return {offset_of<SHIFT>(minus), offset_of<SHIFT>(minus)}; }
    DC_INLINE void dot(Sum& sum, Words w, const int8_t* x) {
        const __m256i shared = four(x);
        asm(DC_DOT_256 " %2, %1, %0" : "+x"(sum.lo) : "x"(w.lo), "x"(shared));
        asm(DC_DOT_256 " %2, %1, %0" : "+x"(sum.hi) : "x"(w.hi), "x"(shared));
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t) { return sum; }
    template <int PART>
    DC_INLINE Whole factor(Whole pairs) {
        if constexpr (PART) return {_mm256_srli_epi32(pairs.lo, 16), _mm256_srli_epi32(pairs.hi, 16)};
        const __m256i low = _mm256_set1_epi32(0xffff);
        return {_mm256_and_si256(pairs.lo, low), _mm256_and_si256(pairs.hi, low)};
    }
    template <bool WIDE>
    DC_INLINE void add_scaled(Whole& total, Sum sum, Whole factor) {
        if constexpr (WIDE) {
            total.lo = _mm256_add_epi32(total.lo, _mm256_mullo_epi32(sum.lo, factor.lo));
            total.hi = _mm256_add_epi32(total.hi, _mm256_mullo_epi32(sum.hi, factor.hi));
        } else add_madd(total, sum, factor);
    }
};
using NibbleDot = UnsignedDot;
using FiveBitDot = UnsignedDot;
using SignedDot = UnsignedDot;

#else

struct NibbleDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(Words codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    DC_INLINE void dot(Sum& sum, Words w, const int8_t* x) {
        const __m256i shared = four(x);
        sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, shared));
        sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, shared));
        add_now(sum);
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t minus) {
        const __m256i first = offset_of<SHIFT>(minus);
        return {_mm256_add_epi32(widen_pairs(sum.lo), first), _mm256_add_epi32(widen_pairs(sum.hi), first)};
    }
    template <int PART>                     // a lane's sum is two of 16 bits: each gets it
    DC_INLINE Whole factor(Whole pairs) {
        const __m256i both = PART ? _mm256_set1_epi64x(0x0706070603020302) : _mm256_set1_epi64x(0x0504050401000100);
        const __m256i places = _mm256_add_epi8(both, _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808));
        return {_mm256_shuffle_epi8(pairs.lo, places), _mm256_shuffle_epi8(pairs.hi, places)};
    }
    template <bool>
    DC_INLINE void add_scaled(Whole& total, Sum sum, Whole factor) { add_madd(total, sum, factor); }
};

struct FiveBitDot : NibbleDot {
    static constexpr bool HALFWAY = true;
    DC_INLINE Whole add(Whole a, Whole b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
};

struct UnsignedDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(Words codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t minus) { return {offset_of<SHIFT>(minus), offset_of<SHIFT>(minus)}; }
    DC_INLINE void dot(Sum& sum, Words w, const int8_t* x) {
        const __m256i shared = four(x);
        sum.lo = _mm256_add_epi32(sum.lo, widen_pairs(_mm256_maddubs_epi16(w.lo, shared)));
        sum.hi = _mm256_add_epi32(sum.hi, widen_pairs(_mm256_maddubs_epi16(w.hi, shared)));
        add_now(sum);
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t) { return sum; }
    template <int PART>
    DC_INLINE Whole factor(Whole pairs) { return NibbleDot::factor<PART>(pairs); }
    DC_INLINE void dot_scaled(Whole& total, Words w, const int8_t* x, Whole factor) {      // widens by the factor; codes of at most 7 bits
        const __m256i shared = four(x);
        add_madd(total, {_mm256_maddubs_epi16(w.lo, shared), _mm256_maddubs_epi16(w.hi, shared)}, factor);
    }
};
#define DC_SCALES_PAIRS

struct SignedDot {
    static constexpr bool HALFWAY = false;
    struct Weights { Words size, sign; };
    DC_INLINE Weights weights(Words codes) {         // which are the weights + 128
        const __m256i offset = _mm256_set1_epi8(-128);
        const Words w = {_mm256_xor_si256(codes.lo, offset), _mm256_xor_si256(codes.hi, offset)};
        return {{_mm256_abs_epi8(w.lo), _mm256_abs_epi8(w.hi)}, w};
    }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    DC_INLINE void dot(Sum& sum, const Weights& w, const int8_t* x) {
        const __m256i shared = four(x);
        sum.lo = _mm256_add_epi32(sum.lo, widen_pairs(_mm256_maddubs_epi16(w.size.lo, _mm256_sign_epi8(shared, w.sign.lo))));
        sum.hi = _mm256_add_epi32(sum.hi, widen_pairs(_mm256_maddubs_epi16(w.size.hi, _mm256_sign_epi8(shared, w.sign.hi))));
        add_now(sum);
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t) { return sum; }
};

#endif

DC_INLINE Words look_up(Words codes, const uint8_t* table) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(values, codes.lo), _mm256_shuffle_epi8(values, codes.hi)};
}

DC_INLINE Whole add_fine(Whole sum, Whole fine) {
    return {_mm256_add_epi32(_mm256_slli_epi32(sum.lo, 8), fine.lo), _mm256_add_epi32(_mm256_slli_epi32(sum.hi, 8), fine.hi)};
}
DC_INLINE Lanes to_floats(Whole sum) { return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)}; }
DC_INLINE __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
DC_INLINE __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
DC_INLINE Lanes lanes_of_bytes(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p + 8)))};
}
DC_INLINE Lanes lanes_of_signed_bytes(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p + 8)))};
}
DC_INLINE __m256 powers_of_eight(const uint8_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(eight(p)), 23)); }
DC_INLINE Lanes powers_of_bytes(const uint8_t* p) { return {powers_of_eight(p), powers_of_eight(p + 8)}; }
DC_INLINE Whole pairs_of_bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi16(sixteen(p)), _mm256_cvtepu8_epi16(sixteen(p + 16))}; }
DC_INLINE Whole pairs_of_signed_bytes(const uint8_t* p) { return {_mm256_cvtepi8_epi16(sixteen(p)), _mm256_cvtepi8_epi16(sixteen(p + 16))}; }
DC_INLINE Whole low_nibbles_of_pairs(Whole pairs) {
    const __m256i low = _mm256_set1_epi16(15);
    return {_mm256_and_si256(pairs.lo, low), _mm256_and_si256(pairs.hi, low)};
}
DC_INLINE Whole high_nibbles_of_pairs(Whole pairs) { return {_mm256_srli_epi16(pairs.lo, 4), _mm256_srli_epi16(pairs.hi, 4)}; }
DC_INLINE void add_pairs(Whole& total, Whole pairs, const int16_t* x) {
    const __m256i shared = four(reinterpret_cast<const int8_t*>(x));
    add_madd(total, pairs, {shared, shared});
}
DC_INLINE Whole load_whole(const uint8_t* p) { return load_words(p); }
DC_INLINE void store_whole(uint8_t* p, Whole whole) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), whole.lo), _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), whole.hi);
}
template <int LOW, int HIGH>
DC_INLINE __m256i odd_pairs_of_eight(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(eight(p));
    const __m256i low = LOW ? _mm256_srli_epi32(bytes, 3) : _mm256_slli_epi32(bytes, 1), high = _mm256_slli_epi32(bytes, HIGH ? 13 : 17);
    return _mm256_or_si256(_mm256_and_si256(_mm256_or_si256(low, high), _mm256_set1_epi16(30)), _mm256_set1_epi16(1));
}
template <int LOW, int HIGH>
DC_INLINE Whole odd_pairs(const uint8_t* p) { return {odd_pairs_of_eight<LOW, HIGH>(p), odd_pairs_of_eight<LOW, HIGH>(p + 8)}; }
template <int SHIFT>
DC_INLINE Whole less_shifted(Whole a, Whole b) {
    return {_mm256_sub_epi32(a.lo, _mm256_slli_epi32(b.lo, SHIFT)), _mm256_sub_epi32(a.hi, _mm256_slli_epi32(b.hi, SHIFT))};
}

#elif defined(DC_NEON)

struct Words { uint8x16_t v[4]; };
struct Sum { int32x4_t v[4]; };
using Whole = Sum;

#define DC_EACH(Type, expression)                           \
    Type made;                                              \
    for (int i = 0; i < 4; i++) made.v[i] = (expression);   \
    return made
DC_INLINE Words load_words(const uint8_t* p) { DC_EACH(Words, vld1q_u8(p + 16 * i)); }
DC_INLINE Words load_words_again(const uint8_t* p) { return load_words(p); }
DC_INLINE Words operator|(Words a, Words b) { DC_EACH(Words, vorrq_u8(a.v[i], b.v[i])); }
DC_INLINE Words low_nibbles(Words w) { DC_EACH(Words, vandq_u8(w.v[i], vdupq_n_u8(15))); }
DC_INLINE Words high_nibbles(Words w) { DC_EACH(Words, vshrq_n_u8(w.v[i], 4)); }
template <int LEFT, int MASK>
DC_INLINE Words take_bits(Words w) {
    const int8x16_t left = vdupq_n_s8(LEFT);            // a number below 0 shifts right
    DC_EACH(Words, vandq_u8(LEFT ? vshlq_u8(w.v[i], left) : w.v[i], vdupq_n_u8(MASK)));
}

struct UnsignedDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(Words codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t minus) { DC_EACH(Sum, vdupq_n_s32(SHIFT < 0 ? 0 : minus * (1 << (SHIFT < 0 ? 0 : SHIFT)))); }
    DC_INLINE void dot(Sum& sum, Words w, const int8_t* x) {
        int32_t word;
        std::memcpy(&word, x, sizeof word);
        const int8x16_t shared = vreinterpretq_s8_s32(vdupq_n_s32(word));
        for (int i = 0; i < 4; i++) sum.v[i] = add_products(sum.v[i], w.v[i], shared);
    }
    template <int WORD>                                 // of the four in x
    DC_INLINE void dot(Sum& sum, Words w, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        for (int i = 0; i < 4; i++) sum.v[i] = vusdotq_laneq_s32(sum.v[i], w.v[i], x, WORD);
#elif defined(__ARM_FEATURE_DOTPROD)
        for (int i = 0; i < 4; i++) sum.v[i] = vdotq_laneq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), x, WORD);
#else
        const int8x16_t shared = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), WORD));
        for (int i = 0; i < 4; i++) sum.v[i] = add_products(sum.v[i], w.v[i], shared);
#endif
    }
    template <int SHIFT>
    DC_INLINE Whole end(Sum sum, int32_t) { return sum; }
    template <int PART>
    DC_INLINE Whole factor(Whole pairs) { DC_EACH(Whole, vshrq_n_s32(PART ? pairs.v[i] : vshlq_n_s32(pairs.v[i], 16), 16)); }
    template <bool>
    DC_INLINE void add_scaled(Whole& total, Sum sum, Whole factor) {
        for (int i = 0; i < 4; i++) total.v[i] = vmlaq_s32(total.v[i], sum.v[i], factor.v[i]);
    }

private:
    DC_INLINE int32x4_t add_products(int32x4_t sum, uint8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        return vusdotq_s32(sum, w, x);
#elif defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, vreinterpretq_s8_u8(w), x);
#else
        const int8x16_t s = vreinterpretq_s8_u8(w);
        return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(s), vget_low_s8(x)), vmull_high_s8(s, x)));
#endif
    }
};
using NibbleDot = UnsignedDot;
using FiveBitDot = UnsignedDot;

#if defined(__ARM_FEATURE_MATMUL_INT8)

using SignedDot = UnsignedDot;

// Two rows of x at a time, of 8 of the tile's rows: of each two of these a register has their two sums with the first row of x and with the
// second, one after the other. Four instructions for 8 rows x 2 x 8 columns, where dot takes eight.
#define DC_PAIRS
struct PairSum { int32x4_t v[4]; };
template <int SHIFT>
DC_INLINE PairSum begin_pair(int32_t first, int32_t second) {
    if constexpr (SHIFT < 0) { DC_EACH(PairSum, vdupq_n_s32(0)); }
    const int32x4_t both = vdupq_n_s32(second * (1 << (SHIFT < 0 ? 0 : SHIFT)));
    const int32x4_t minus = vtrn1q_s32(vdupq_n_s32(first * (1 << (SHIFT < 0 ? 0 : SHIFT))), both);
    DC_EACH(PairSum, minus);
}
// Columns c .. c + 3 and c + 4 .. c + 7 of the tile's rows -> the 8 columns of each of rows 8 HALF .. 8 HALF + 7.
template <int HALF>
DC_INLINE Words joined(Words a, Words b) {
    Words both;
    for (int i = 0; i < 2; i++) {
        const uint32x4_t first = vreinterpretq_u32_u8(a.v[2 * HALF + i]), second = vreinterpretq_u32_u8(b.v[2 * HALF + i]);
        both.v[2 * i] = vreinterpretq_u8_u32(vzip1q_u32(first, second)), both.v[2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    }
    return both;
}
DC_INLINE int8x16_t pair_of(const int8_t* first, const int8_t* second) { return vcombine_s8(vld1_s8(first), vld1_s8(second)); }
DC_INLINE void dot_pair(PairSum& sum, Words joined, int8x16_t x) {
    for (int i = 0; i < 4; i++) sum.v[i] = vusmmlaq_s32(sum.v[i], joined.v[i], x);
}
template <int HALF>
DC_INLINE void end_pair(PairSum sum, Whole& first, Whole& second) {
    for (int i = 0; i < 2; i++) {
        first.v[2 * HALF + i] = vuzp1q_s32(sum.v[2 * i], sum.v[2 * i + 1]);
        second.v[2 * HALF + i] = vuzp2q_s32(sum.v[2 * i], sum.v[2 * i + 1]);
    }
}

#else

struct SignedDot : UnsignedDot {
    DC_INLINE Weights weights(Words codes) { DC_EACH(Words, veorq_u8(codes.v[i], vdupq_n_u8(0x80))); }     // which are the weights + 128
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t) { return UnsignedDot::begin<-1>(0); }
};

#endif

DC_INLINE Words look_up(Words codes, const uint8_t* table) {
    const uint8x16_t values = vld1q_u8(table);
    DC_EACH(Words, vqtbl1q_u8(values, codes.v[i]));
}

DC_INLINE Whole add_fine(Whole sum, Whole fine) { DC_EACH(Whole, vaddq_s32(vshlq_n_s32(sum.v[i], 8), fine.v[i])); }
DC_INLINE Lanes to_floats(Whole sum) { DC_EACH(Lanes, vcvtq_f32_s32(sum.v[i])); }
struct WideBytes { uint32x4_t v[4]; };
DC_INLINE WideBytes widened(uint8x16_t bytes) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    return {{vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)}};
}
DC_INLINE Lanes lanes_of(uint8x16_t bytes) {
    const WideBytes wide = widened(bytes);
    DC_EACH(Lanes, vcvtq_f32_u32(wide.v[i]));
}
DC_INLINE Lanes lanes_of_bytes(const uint8_t* p) { return lanes_of(vld1q_u8(p)); }
DC_INLINE Lanes lanes_of_signed_bytes(const uint8_t* p) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
DC_INLINE Lanes powers_of_bytes(const uint8_t* p) {
    const WideBytes wide = widened(vld1q_u8(p));
    DC_EACH(Lanes, vreinterpretq_f32_u32(vshlq_n_u32(wide.v[i], 23)));
}
struct PairBytes { int16x8_t v[4]; };
DC_INLINE Whole whole_of(const PairBytes& pairs) { DC_EACH(Whole, vreinterpretq_s32_s16(pairs.v[i])); }
DC_INLINE Whole pairs_of_bytes(const uint8_t* p) {
    PairBytes pairs;
    for (int i = 0; i < 4; i++) pairs.v[i] = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p + 8 * i)));
    return whole_of(pairs);
}
DC_INLINE Whole pairs_of_signed_bytes(const uint8_t* p) {
    PairBytes pairs;
    for (int i = 0; i < 4; i++) pairs.v[i] = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p + 8 * i)));
    return whole_of(pairs);
}
DC_INLINE Whole low_nibbles_of_pairs(Whole pairs) { DC_EACH(Whole, vandq_s32(pairs.v[i], vdupq_n_s32(0x000f000f))); }
DC_INLINE Whole high_nibbles_of_pairs(Whole pairs) {
    DC_EACH(Whole, vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(pairs.v[i]), 4)));
}
DC_INLINE void add_pairs(Whole& total, Whole pairs, const int16_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    const int16x8_t shared = vreinterpretq_s16_s32(vdupq_n_s32(word));
    for (int i = 0; i < 4; i++) {
        const int16x8_t own = vreinterpretq_s16_s32(pairs.v[i]);
        total.v[i] = vaddq_s32(total.v[i], vpaddq_s32(vmull_s16(vget_low_s16(own), vget_low_s16(shared)), vmull_high_s16(own, shared)));
    }
}
DC_INLINE Whole load_whole(const uint8_t* p) { DC_EACH(Whole, vreinterpretq_s32_u8(vld1q_u8(p + 16 * i))); }
DC_INLINE void store_whole(uint8_t* p, Whole whole) {
    for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, vreinterpretq_u8_s32(whole.v[i]));
}
template <int LOW, int HIGH>
DC_INLINE Whole odd_pairs(const uint8_t* p) {
    const WideBytes bytes = widened(vld1q_u8(p));
    const int32x4_t to_low = vdupq_n_s32(LOW ? -3 : 1), to_high = vdupq_n_s32(HIGH ? 13 : 17);
    const uint32x4_t nibbles = vdupq_n_u32(0x001e001e), one = vdupq_n_u32(0x00010001);
    DC_EACH(Whole, vreinterpretq_s32_u32(vorrq_u32(vandq_u32(vorrq_u32(vshlq_u32(bytes.v[i], to_low), vshlq_u32(bytes.v[i], to_high)), nibbles), one)));
}
template <int SHIFT>
DC_INLINE Whole less_shifted(Whole a, Whole b) { DC_EACH(Whole, vmlsq_n_s32(a.v[i], b.v[i], 1 << SHIFT)); }
#undef DC_EACH

#else

struct Words { uint8_t of[16][4]; };
struct Sum { int32_t of[16]; };
using Whole = Sum;

DC_INLINE Words load_words(const uint8_t* p) {
    Words w;
    std::memcpy(w.of, p, sizeof w.of);
    return w;
}
DC_INLINE Words load_words_again(const uint8_t* p) { return load_words(p); }
DC_INLINE Words operator|(Words a, const Words& b) {
    for (int i = 0; i < 64; i++) a.of[i / 4][i % 4] |= b.of[i / 4][i % 4];
    return a;
}
template <int LEFT, int MASK>
DC_INLINE Words take_bits(Words w) {
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(&w);         // one loop, which becomes vectors
    for (int i = 0; i < 64; i++)
        bytes[i] = uint8_t((LEFT > 0 ? bytes[i] << (LEFT > 0 ? LEFT : 0) : bytes[i] >> (LEFT > 0 ? 0 : -LEFT)) & MASK);
    return w;
}
DC_INLINE Words low_nibbles(const Words& w) { return take_bits<0, 15>(w); }
DC_INLINE Words high_nibbles(const Words& w) { return take_bits<-4, 15>(w); }

struct UnsignedDot {
    static constexpr bool HALFWAY = false;
    using Weights = Words;
    DC_INLINE Weights weights(const Words& codes) { return codes; }
    template <int SHIFT>
    DC_INLINE Sum begin(int32_t minus) {
        Sum sum;
        for (int32_t& lane : sum.of) lane = SHIFT < 0 ? 0 : minus * (1 << (SHIFT < 0 ? 0 : SHIFT));
        return sum;
    }
    // one copy for all kernels: inlined, they take the compiler minutes
    static __attribute__((noinline, unused)) void dot(Sum& sum, const Words& w, const int8_t* x) {
        for (int i = 0; i < 16; i++)
            sum.of[i] += w.of[i][0] * x[0] + w.of[i][1] * x[1] + w.of[i][2] * x[2] + w.of[i][3] * x[3];
    }
    template <int SHIFT>
    DC_INLINE Whole end(const Sum& sum, int32_t) { return sum; }
    template <int PART>
    DC_INLINE Whole factor(Whole pairs) {
        for (int32_t& pair : pairs.of) pair = PART ? pair >> 16 : int16_t(pair);
        return pairs;
    }
    template <bool>
    static __attribute__((noinline, unused)) void add_scaled(Whole& total, const Sum& sum, const Whole& factor) {
        for (int i = 0; i < 16; i++) total.of[i] += sum.of[i] * factor.of[i];
    }
};
using NibbleDot = UnsignedDot;
using FiveBitDot = UnsignedDot;
using SignedDot = UnsignedDot;

DC_INLINE Words look_up(Words codes, const uint8_t* table) {
    for (auto& word : codes.of)
        for (uint8_t& byte : word) byte = table[byte];
    return codes;
}

DC_INLINE Whole add_fine(Whole sum, const Whole& fine) {
    for (int i = 0; i < 16; i++) sum.of[i] = int32_t(uint32_t(sum.of[i]) * 256u + uint32_t(fine.of[i]));       // what passes 2^31 comes back later
    return sum;
}
DC_INLINE Lanes to_floats(const Whole& sum) {
    Lanes y;
    for (int i = 0; i < 16; i++) y.v[i] = float(sum.of[i]);
    return y;
}
DC_INLINE Lanes lanes_of_bytes(const uint8_t* p) {
    Lanes y;
    for (int i = 0; i < 16; i++) y.v[i] = float(p[i]);
    return y;
}
DC_INLINE Lanes lanes_of_signed_bytes(const uint8_t* p) {
    Lanes y;
    for (int i = 0; i < 16; i++) y.v[i] = float(int8_t(p[i]));
    return y;
}
DC_INLINE Lanes powers_of_bytes(const uint8_t* p) {
    Lanes y;
    for (int i = 0; i < 16; i++) y.v[i] = bits_of<float>(uint32_t(p[i]) << 23);
    return y;
}
DC_INLINE Whole pairs_of_bytes(const uint8_t* p) {
    Whole y;
    for (int i = 0; i < 16; i++) y.of[i] = p[2 * i] | p[2 * i + 1] << 16;
    return y;
}
DC_INLINE Whole pairs_of_signed_bytes(const uint8_t* p) {
    Whole y;
    for (int i = 0; i < 16; i++) y.of[i] = int32_t(uint32_t(uint16_t(int8_t(p[2 * i]))) | uint32_t(int8_t(p[2 * i + 1])) << 16);
    return y;
}
DC_INLINE Whole low_nibbles_of_pairs(Whole pairs) {
    for (int32_t& pair : pairs.of) pair &= 0x000f000f;
    return pairs;
}
DC_INLINE Whole high_nibbles_of_pairs(Whole pairs) {
    for (int32_t& pair : pairs.of) pair = pair >> 4 & 0x0fff0fff;
    return pairs;
}
static __attribute__((noinline, unused)) void add_pairs(Whole& total, const Whole& pairs, const int16_t* x) {
    for (int i = 0; i < 16; i++) total.of[i] += int16_t(pairs.of[i]) * x[0] + (pairs.of[i] >> 16) * x[1];
}
DC_INLINE Whole load_whole(const uint8_t* p) {
    Whole whole;
    std::memcpy(&whole, p, sizeof whole);
    return whole;
}
DC_INLINE void store_whole(uint8_t* p, const Whole& whole) { std::memcpy(p, &whole, sizeof whole); }
template <int LOW, int HIGH>
DC_INLINE Whole odd_pairs(const uint8_t* p) {
    Whole y;
    for (int i = 0; i < 16; i++) y.of[i] = (p[i] >> 4 * LOW & 15) * 2 + 1 + ((p[i] >> 4 * HIGH & 15) * 2 + 1) * 65536;
    return y;
}
template <int SHIFT>
DC_INLINE Whole less_shifted(Whole a, const Whole& b) {
    for (int i = 0; i < 16; i++) a.of[i] -= b.of[i] * (1 << SHIFT);
    return a;
}

#endif

template <class Dot>
inline constexpr bool SCALES_PAIRS = false;
#if defined(DC_SCALES_PAIRS)
template <>
inline constexpr bool SCALES_PAIRS<UnsignedDot> = true;
#endif

// Dot::dot with the four bytes that begin AT bytes after x.
template <class Dot, int AT>
DC_INLINE void dot_at(Sum& sum, const typename Dot::Weights& w, const int8_t* x) {
#if defined(DC_NEON)
    Dot::template dot<AT % 16 / 4>(sum, w, vld1q_s8(x + AT / 16 * 16));
#else
    Dot::dot(sum, w, x + AT);
#endif
}

// total += a * b, rounded once. Portable kernels share one copy of it too.
#if defined(__AVX2__) || defined(DC_NEON)
DC_INLINE void add_product(Lanes& total, Lanes a, Lanes b) { total = fma(a, b, total); }
#else
static __attribute__((noinline, unused)) void add_product(Lanes& total, const Lanes& a, const Lanes& b) { total = fma(a, b, total); }
#endif

// ---- 32 floats to bytes

struct HalfSums { int32_t low, high; };             // of the first 16 bytes, of the others
struct Quantized { float scale; HalfSums sum; };

#if defined(__AVX512F__)

DC_INLINE float largest_magnitude(Lanes a, Lanes b) {       // as bit patterns, so that a NaN is the largest of all
    const __m512i sign = _mm512_set1_epi32(INT32_MAX);
    const __m512i larger = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a.v), sign),
                                            _mm512_and_si512(_mm512_castps_si512(b.v), sign));
    return bits_of<float>(_mm512_reduce_max_epi32(larger));
}
DC_INLINE HalfSums store_low_bytes(Lanes a, Lanes b, int8_t* to) {
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v)), high = _mm512_cvtepi32_epi8(_mm512_castps_si512(b.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), high);
    const __m512i both = _mm512_add_epi32(_mm512_cvtepi8_epi32(low), _mm512_slli_epi32(_mm512_cvtepi8_epi32(high), 16));
    const int32_t sum = _mm512_reduce_add_epi32(both), first = int16_t(sum);        // either is within 16 * 127
    return {first, (sum - first) >> 16};
}

#elif defined(DC_NEON)

DC_INLINE float largest_magnitude(Lanes a, Lanes b) {
    const int32x4_t sign = vdupq_n_s32(INT32_MAX);
    int32x4_t largest = vdupq_n_s32(0);
    for (int i = 0; i < 4; i++) {
        const int32x4_t larger = vmaxq_s32(vandq_s32(vreinterpretq_s32_f32(a.v[i]), sign), vandq_s32(vreinterpretq_s32_f32(b.v[i]), sign));
        largest = vmaxq_s32(largest, larger);
    }
    return bits_of<float>(vmaxvq_s32(largest));
}
DC_INLINE int8x16_t low_bytes(Lanes a) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_f32(a.v[0]), vreinterpretq_u16_f32(a.v[1]));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_f32(a.v[2]), vreinterpretq_u16_f32(a.v[3]));
    return vuzp1q_s8(vreinterpretq_s8_u16(low), vreinterpretq_s8_u16(high));
}
DC_INLINE HalfSums store_low_bytes(Lanes a, Lanes b, int8_t* to) {
    const int8x16_t low = low_bytes(a), high = low_bytes(b);
    vst1q_s8(to, low), vst1q_s8(to + 16, high);
    return {vaddlvq_s8(low), vaddlvq_s8(high)};
}

#else

DC_INLINE float largest_magnitude(Lanes a, Lanes b) {
    float x[32];
    store(x, a), store(x + 16, b);
    int32_t largest = 0;
    for (int i = 0; i < 32; i++) {
        const int32_t magnitude = bits_of<int32_t>(x[i]) & INT32_MAX;
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_of<float>(largest);
}
DC_INLINE HalfSums store_low_bytes(Lanes a, Lanes b, int8_t* to) {
    float x[32];
    store(x, a), store(x + 16, b);
    HalfSums sum{0, 0};
    for (int i = 0; i < 32; i++) (i < 16 ? sum.low : sum.high) += to[i] = int8_t(bits_of<uint32_t>(x[i]));
    return sum;
}

#endif

constexpr float MAGIC = 12582912.0f;                // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits

// to = nearest, ties to even, of x * inverse, within +-127.
DC_INLINE HalfSums store_rounded(Lanes a, Lanes b, Lanes inverse, int8_t* to) {
    const Lanes least = all(-127.0f), magic = all(MAGIC);
    return store_low_bytes(maximum(a * inverse, least) + magic, maximum(b * inverse, least) + magic, to);
}

// to = x / scale with scale = amax / 127; the scale of what is too large is not a number.
DC_INLINE Quantized quantize_block(Lanes a, Lanes b, int8_t* to) {
    const float amax = largest_magnitude(a, b);
    const bool zero = amax < 1e-24f;
    const HalfSums sum = store_rounded(a, b, all(zero ? 0.0f : 127.0f / amax), to);
    return {zero ? 0.0f : amax <= 1e35f ? amax / 127.0f : __builtin_nanf(""), sum};
}

// What that rounding took from 16 values, in steps of scale / 256, + MAGIC. Half a step is 128 of them and counts as 127, which
// AVX2's signs need and its sums of pairs (30,480) as well.
DC_INLINE Lanes rest_of(Lanes x, Lanes inverse) {
    const Lanes least = all(-127.0f), magic = all(MAGIC), zero = all(0.0f), y = maximum(x * inverse, least);
    const Lanes rest = (y - ((y + magic) - magic)) * all(256.0f);
    return (zero - maximum(zero - maximum(rest, least), least)) + magic;
}

// to = that, of a block whose scale is a number and not 0.
DC_INLINE HalfSums quantize_rest(Lanes a, Lanes b, int8_t* to) {
    const Lanes inverse = all(127.0f / largest_magnitude(a, b));
    return store_low_bytes(rest_of(a, inverse), rest_of(b, inverse), to);
}

}  // namespace DC_ISA
}  // namespace dc
