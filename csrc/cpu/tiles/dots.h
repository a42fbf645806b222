// Integer dot products in sixteen lanes: a chunk = 16 rows x 4 columns of weights, a word per lane, times 4 bytes of x that all
// lanes share. Sums of a block of 32 columns are exact, so they are equal on every instruction set, however they are made:
//     avx512 (VNNI)   u8 x i8 with x broadcast from memory; a sum begins at `start`, which takes the weights' offset back
//     avx2            nibbles: pairs in int16, at most 8 * 2 * 15 * 127 = 30,480; bytes: |w| times x with w's sign, at most
//                     2 * 128 * 127 = 32,512, widened at once (u8 x i8 with the offset still in would reach 64,770)
//     portable        the definition
#pragma once

#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512F__)

struct Words { __m512i v; };
using Bytes = Words;                    // weights + 128
using Sum = Words;
using Whole = Words;

DC_INLINE Words load_words(const uint8_t* p) {
    __m512i words = _mm512_loadu_si512(p);
    asm("" : "+v"(words));              // loads are as scarce as multipliers, and GCC would load once for each half of the nibbles
    return {words};
}
DC_INLINE Words low_nibbles(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
DC_INLINE Words high_nibbles(Words w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }
DC_INLINE Bytes load_bytes(const uint8_t* p) { return load_words(p); }
DC_INLINE Sum begin_sum(int32_t start) { return {_mm512_set1_epi32(start)}; }
DC_INLINE Sum begin_sum() { return {_mm512_setzero_si512()}; }
DC_INLINE void dot_bytes(Sum& sum, Bytes w, const int8_t* x) {      // GCC 12 would broadcast x with an instruction of its own
    struct Four { int8_t of[4]; };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(w.v), "m"(*reinterpret_cast<const Four*>(x)));
}
DC_INLINE void dot_nibbles(Sum& sum, Words w, const int8_t* x) { dot_bytes(sum, w, x); }
DC_INLINE Whole end_bytes(Sum sum, int32_t) { return sum; }
DC_INLINE Whole end_nibbles(Sum sum, int32_t) { return sum; }
DC_INLINE Whole add_fine(Whole sum, Whole fine) { return {_mm512_add_epi32(_mm512_slli_epi32(sum.v, 8), fine.v)}; }
DC_INLINE Lanes to_floats(Whole sum) { return {_mm512_cvtepi32_ps(sum.v)}; }

#elif defined(__AVX2__)

struct Words { __m256i lo, hi; };
struct Bytes { Words size, sign; };
using Sum = Words;
using Whole = Words;

DC_INLINE Words load_words(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
DC_INLINE Words low_nibbles(Words w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)};
}
DC_INLINE Words high_nibbles(Words w) { return low_nibbles({_mm256_srli_epi16(w.lo, 4), _mm256_srli_epi16(w.hi, 4)}); }
DC_INLINE Bytes load_bytes(const uint8_t* p) {
    const __m256i offset = _mm256_set1_epi8(-128);
    const Words stored = load_words(p), w = {_mm256_xor_si256(stored.lo, offset), _mm256_xor_si256(stored.hi, offset)};
    return {{_mm256_abs_epi8(w.lo), _mm256_abs_epi8(w.hi)}, w};
}
DC_INLINE Sum begin_sum(int32_t = 0) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
DC_INLINE __m256i four(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}
DC_INLINE void dot_nibbles(Sum& sum, Words w, const int8_t* x) {
    const __m256i shared = four(x);
    sum.lo = _mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, shared));
    sum.hi = _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, shared));
}
DC_INLINE __m256i widen_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
DC_INLINE void dot_bytes(Sum& sum, const Bytes& w, const int8_t* x) {
    const __m256i shared = four(x);
    sum.lo = _mm256_add_epi32(sum.lo, widen_pairs(_mm256_maddubs_epi16(w.size.lo, _mm256_sign_epi8(shared, w.sign.lo))));
    sum.hi = _mm256_add_epi32(sum.hi, widen_pairs(_mm256_maddubs_epi16(w.size.hi, _mm256_sign_epi8(shared, w.sign.hi))));
}
DC_INLINE Whole end_bytes(Sum sum, int32_t) { return sum; }
DC_INLINE Whole end_nibbles(Sum sum, int32_t start) {
    const __m256i first = _mm256_set1_epi32(start);
    return {_mm256_add_epi32(widen_pairs(sum.lo), first), _mm256_add_epi32(widen_pairs(sum.hi), first)};
}
DC_INLINE Whole add_fine(Whole sum, Whole fine) {
    return {_mm256_add_epi32(_mm256_slli_epi32(sum.lo, 8), fine.lo), _mm256_add_epi32(_mm256_slli_epi32(sum.hi, 8), fine.hi)};
}
DC_INLINE Lanes to_floats(Whole sum) { return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)}; }

#else

struct Words { uint8_t of[16][4]; };
using Bytes = Words;
struct Sum { int32_t of[16]; };
using Whole = Sum;

DC_INLINE Words load_words(const uint8_t* p) {
    Words w;
    std::memcpy(w.of, p, sizeof w.of);
    return w;
}
DC_INLINE Words low_nibbles(Words w) {
    for (auto& word : w.of) for (uint8_t& byte : word) byte &= 15;
    return w;
}
DC_INLINE Words high_nibbles(Words w) {
    for (auto& word : w.of) for (uint8_t& byte : word) byte >>= 4;
    return w;
}
DC_INLINE Bytes load_bytes(const uint8_t* p) { return load_words(p); }
DC_INLINE Sum begin_sum(int32_t start = 0) {
    Sum sum;
    for (int32_t& lane : sum.of) lane = start;
    return sum;
}
DC_INLINE void dot_bytes(Sum& sum, const Bytes& w, const int8_t* x) {
    for (int i = 0; i < 16; i++)
        sum.of[i] += w.of[i][0] * x[0] + w.of[i][1] * x[1] + w.of[i][2] * x[2] + w.of[i][3] * x[3];
}
DC_INLINE void dot_nibbles(Sum& sum, const Words& w, const int8_t* x) { dot_bytes(sum, w, x); }
DC_INLINE Whole end_bytes(const Sum& sum, int32_t) { return sum; }
DC_INLINE Whole end_nibbles(const Sum& sum, int32_t) { return sum; }
DC_INLINE Whole add_fine(Whole sum, const Whole& fine) {
    for (int i = 0; i < 16; i++) sum.of[i] = sum.of[i] * 256 + fine.of[i];
    return sum;
}
DC_INLINE Lanes to_floats(const Whole& sum) {
    Lanes y;
    for (int i = 0; i < 16; i++) y.v[i] = float(sum.of[i]);
    return y;
}

#endif

// ---- 32 floats to bytes

struct Quantized { float scale; int32_t sum; };

#if defined(__AVX512F__)

DC_INLINE float largest_magnitude(Lanes a, Lanes b) {       // as bit patterns, so that a NaN is the largest of all
    const __m512i sign = _mm512_set1_epi32(INT32_MAX);
    const __m512i larger = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a.v), sign),
                                            _mm512_and_si512(_mm512_castps_si512(b.v), sign));
    return bits_of<float>(_mm512_reduce_max_epi32(larger));
}
DC_INLINE int32_t store_low_bytes(Lanes a, Lanes b, int8_t* to) {       // and their sum
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_castps_si512(a.v)), high = _mm512_cvtepi32_epi8(_mm512_castps_si512(b.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), high);
    return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_cvtepi8_epi32(low), _mm512_cvtepi8_epi32(high)));
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
DC_INLINE int32_t store_low_bytes(Lanes a, Lanes b, int8_t* to) {
    float x[32];
    store(x, a), store(x + 16, b);
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += to[i] = int8_t(bits_of<uint32_t>(x[i]));
    return sum;
}

#endif

constexpr float MAGIC = 12582912.0f;                // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits

// to = nearest, ties to even, of x / scale with scale = amax / 127; the scale of what is too large is not a number.
DC_INLINE Quantized quantize_block(Lanes a, Lanes b, int8_t* to) {
    const float amax = largest_magnitude(a, b);
    const bool zero = amax < 1e-24f;
    const Lanes inverse = all(zero ? 0.0f : 127.0f / amax), least = all(-127.0f), magic = all(MAGIC);
    const int32_t sum = store_low_bytes(maximum(a * inverse, least) + magic, maximum(b * inverse, least) + magic, to);
    return {zero ? 0.0f : amax <= 1e35f ? amax / 127.0f : __builtin_nanf(""), sum};
}

// What that rounding took from 16 values, in steps of scale / 256, + MAGIC. Half a step is 128 of them and counts as 127, which
// AVX2's signs need and its sums of pairs (30,480) as well.
DC_INLINE Lanes rest_of(Lanes x, Lanes inverse) {
    const Lanes least = all(-127.0f), magic = all(MAGIC), zero = all(0.0f), y = maximum(x * inverse, least);
    const Lanes rest = (y - ((y + magic) - magic)) * all(256.0f);
    return (zero - maximum(zero - maximum(rest, least), least)) + magic;
}

// to = that, of a block whose scale is a number and not 0; returns the sum.
DC_INLINE int32_t quantize_rest(Lanes a, Lanes b, int8_t* to) {
    const Lanes inverse = all(127.0f / largest_magnitude(a, b));
    return store_low_bytes(rest_of(a, inverse), rest_of(b, inverse), to);
}

}  // namespace DC_ISA
}  // namespace dc
