// Sixteen lanes of whole numbers, as sampling needs them, with one meaning on every instruction set. cpu/lanes.h has the floats and
// what a file must define that includes this.
//
//     Words       16 uint32: ids, or the noise of ids
//     Longs       16 uint64: weights
//     Counters    one of Philox's four words, of GROUPS_AT_ONCE groups: as many as a register multiplies at once. A group is 4 ids
//     Noise       all four words: word i of a group is the noise of its id i
//
// Sixteen ids that lie anywhere are in up to sixteen groups: PARTS of Counters.
// A function that stores some lanes packs them at the beginning, and may write whatever it likes in the lanes after them.
#pragma once

#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {

// --- AVX-512 ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

struct Words { __m512i v; };
DC_INLINE Words load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
DC_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
DC_INLINE Words all_words(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
DC_INLINE Words words_from(uint32_t first) {                        // first, first + 1, ...
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(lanes, _mm512_set1_epi32(int(first)))};
}
DC_INLINE Words add_one(Words a, Chosen lanes) {                    // where chosen
    return {_mm512_mask_sub_epi32(a.v, lanes.v, a.v, _mm512_set1_epi32(-1))};
}
DC_INLINE int64_t sum(Words a) { return _mm512_reduce_add_epi32(a.v); }         // below 2^31
DC_INLINE Words choose(Chosen lanes, Words a, Words b) { return {_mm512_mask_mov_epi32(b.v, lanes.v, a.v)}; }
DC_INLINE Words group_of(Words ids) { return {_mm512_srli_epi32(ids.v, 2)}; }
DC_INLINE Chosen in_place(Words ids, uint32_t place) {              // which are the place-th of their group
    return {_mm512_cmpeq_epi32_mask(_mm512_and_si512(ids.v, _mm512_set1_epi32(3)), _mm512_set1_epi32(int(place)))};
}
DC_INLINE void store_some(float* p, uint32_t mask, Lanes a) { _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(mask), a.v)); }
DC_INLINE void store_some(uint32_t* p, uint32_t mask, Words a) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), a.v));
}

struct Longs { __m512i low, high; };
DC_INLINE Longs no_longs() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
DC_INLINE Longs operator+(Longs a, Longs b) { return {_mm512_add_epi64(a.low, b.low), _mm512_add_epi64(a.high, b.high)}; }
DC_INLINE uint64_t sum(Longs a) { return uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(a.low, a.high))); }
DC_INLINE void store(uint64_t* p, Longs a) {
    _mm512_storeu_si512(p, a.low);
    _mm512_storeu_si512(p + 8, a.high);
}
DC_INLINE Longs load_some(const uint64_t* p, Chosen lanes) {        // 0 in the others
    return {_mm512_maskz_loadu_epi64(__mmask8(lanes.v), p), _mm512_maskz_loadu_epi64(__mmask8(lanes.v >> 8), p + 8)};
}
DC_INLINE void store_some(uint64_t* to, uint32_t mask, const uint64_t* from) {          // `to` is not after `from`
    const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 8);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(__mmask8(mask), low));
    _mm512_storeu_si512(to + __builtin_popcount(mask & 0xff), _mm512_maskz_compress_epi64(__mmask8(mask >> 8), high));
}

DC_INLINE Lanes round_down(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// trunc(x 2^24) 2^16 >> -n where chosen, else 0: x is of [1/2, 2), and n, which is whole, of [-40, 0].
DC_INLINE Longs scaled_down(Lanes x, Lanes n, Chosen lanes) {
    const __m512 scaled = _mm512_scalef_ps(x.v, _mm512_add_ps(n.v, _mm512_set1_ps(40.0f)));     // exact; the shift is a truncation
    return {_mm512_maskz_cvttps_epu64(__mmask8(lanes.v), _mm512_castps512_ps256(scaled)),
            _mm512_maskz_cvttps_epu64(__mmask8(lanes.v >> 8), _mm512_extractf32x8_ps(scaled, 1))};
}
// -log2(a / 2^32) or up to 0.1 more: a float's bits, as a number, bound its log2 from below.
DC_INLINE Lanes minus_log2(Words a) {
    const __m512 bits = _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_cvtepu32_ps(a.v)));
    return {_mm512_fnmadd_ps(bits, _mm512_set1_ps(0x1p-23f), _mm512_set1_ps(127 + 32))};
}

struct Counters { __m512i v; };                 // in the low halves of 8 uint64; what the high halves hold is ignored
struct Noise { Counters word[4]; };
constexpr int GROUPS_AT_ONCE = 8, PARTS = 2;
DC_INLINE Counters all_counters(uint32_t x) { return {_mm512_set1_epi64(x)}; }
DC_INLINE void multiply(Counters a, uint32_t b, Counters& low, Counters& high) {
    low = {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))};
    high = {_mm512_srli_epi64(low.v, 32)};
}
DC_INLINE Counters exclusive_or(Counters a, Counters b, Counters c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
DC_INLINE void split(Words a, Counters (&parts)[PARTS]) {
    parts[0] = {_mm512_cvtepu32_epi64(_mm512_castsi512_si256(a.v))};
    parts[1] = {_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(a.v, 1))};
}
DC_INLINE Words join(const Noise (&parts)[PARTS], int word) {
    const __m256i low = _mm512_cvtepi64_epi32(parts[0].word[word].v), high = _mm512_cvtepi64_epi32(parts[1].word[word].v);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
// The numbers of GROUPS_AT_ONCE groups from `first` on, in the order that `by_ids` turns into that of their ids.
DC_INLINE Counters groups_from(uint32_t first) {
    return {_mm512_add_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_set1_epi64(first))};
}
DC_INLINE void by_ids(const Noise& noise, Words* to) {              // GROUPS_AT_ONCE / 4 Words
    const __m512i w01 = _mm512_mask_shuffle_epi32(noise.word[0].v, 0xAAAA, noise.word[1].v, _MM_PERM_CCAA);
    const __m512i w23 = _mm512_mask_shuffle_epi32(noise.word[2].v, 0xAAAA, noise.word[3].v, _MM_PERM_CCAA);
    to[0] = {_mm512_unpacklo_epi64(w01, w23)};
    to[1] = {_mm512_unpackhi_epi64(w01, w23)};
}

// --- AVX2 -------------------------------------------------------------------------------------------------------------

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Words { __m256i lo, hi; };
DC_INLINE __m256i load_32_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DC_INLINE void store_32_bytes(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
DC_INLINE Words load(const uint32_t* p) { return {load_32_bytes(p), load_32_bytes(p + 8)}; }
DC_INLINE void store(uint32_t* p, Words a) { store_32_bytes(p, a.lo), store_32_bytes(p + 8, a.hi); }
DC_INLINE Words all_words(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
DC_INLINE Words words_from(uint32_t first) {
    const __m256i low = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int(first)));
    return {low, _mm256_add_epi32(low, _mm256_set1_epi32(8))};
}
DC_INLINE Words add_one(Words a, Chosen lanes) {                    // a chosen lane is -1
    return {_mm256_sub_epi32(a.lo, _mm256_castps_si256(lanes.lo)), _mm256_sub_epi32(a.hi, _mm256_castps_si256(lanes.hi))};
}
DC_INLINE int64_t sum(Words a) {
    uint32_t lanes[16];
    store(lanes, a);
    int64_t total = 0;
    for (uint32_t lane : lanes) total += lane;
    return total;
}
DC_INLINE Words choose(Chosen lanes, Words a, Words b) {
    return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_castps_si256(lanes.lo)), _mm256_blendv_epi8(b.hi, a.hi, _mm256_castps_si256(lanes.hi))};
}
DC_INLINE Words group_of(Words ids) { return {_mm256_srli_epi32(ids.lo, 2), _mm256_srli_epi32(ids.hi, 2)}; }
DC_INLINE __m256 in_place8(__m256i ids, uint32_t place) {
    const __m256i places = _mm256_and_si256(ids, _mm256_set1_epi32(3));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(places, _mm256_set1_epi32(int(place))));
}
DC_INLINE Chosen in_place(Words ids, uint32_t place) { return {in_place8(ids.lo, place), in_place8(ids.hi, place)}; }

struct LanesOfMask {                            // for each mask of 8 lanes: its lanes, lowest first
    alignas(32) uint32_t lanes[256][8];
    constexpr LanesOfMask() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (uint32_t lane = 0, to = 0; lane < 8; lane++)
                if (mask >> lane & 1) lanes[mask][to++] = lane;
    }
};
constexpr LanesOfMask LANES_OF_MASK;
DC_INLINE void store_some8(void* p, uint32_t mask, __m256i a) {
    store_32_bytes(p, _mm256_permutevar8x32_epi32(a, load_32_bytes(LANES_OF_MASK.lanes[mask])));
}
DC_INLINE void store_some(uint32_t* p, uint32_t mask, Words a) {
    store_some8(p, mask & 0xff, a.lo);
    store_some8(p + __builtin_popcount(mask & 0xff), mask >> 8, a.hi);
}
DC_INLINE void store_some(float* p, uint32_t mask, Lanes a) {
    store_some8(p, mask & 0xff, _mm256_castps_si256(a.lo));
    store_some8(p + __builtin_popcount(mask & 0xff), mask >> 8, _mm256_castps_si256(a.hi));
}

struct Longs { __m256i v[4]; };
DC_INLINE Longs no_longs() {
    const __m256i zero = _mm256_setzero_si256();
    return {{zero, zero, zero, zero}};
}
DC_INLINE Longs operator+(Longs a, Longs b) {
    for (int i = 0; i < 4; i++) a.v[i] = _mm256_add_epi64(a.v[i], b.v[i]);
    return a;
}
DC_INLINE void store(uint64_t* p, Longs a) {
    for (int i = 0; i < 4; i++) store_32_bytes(p + 4 * i, a.v[i]);
}
DC_INLINE uint64_t sum(Longs a) {
    uint64_t lanes[16], total = 0;
    store(lanes, a);
    for (uint64_t lane : lanes) total += lane;
    return total;
}
DC_INLINE Longs load_some(const uint64_t* p, Chosen lanes) {
    const __m256i low = _mm256_castps_si256(lanes.lo), high = _mm256_castps_si256(lanes.hi);
    return {{_mm256_and_si256(load_32_bytes(p), _mm256_cvtepi32_epi64(_mm256_castsi256_si128(low))),
             _mm256_and_si256(load_32_bytes(p + 4), _mm256_cvtepi32_epi64(_mm256_extracti128_si256(low, 1))),
             _mm256_and_si256(load_32_bytes(p + 8), _mm256_cvtepi32_epi64(_mm256_castsi256_si128(high))),
             _mm256_and_si256(load_32_bytes(p + 12), _mm256_cvtepi32_epi64(_mm256_extracti128_si256(high, 1)))}};
}
DC_INLINE void store_some(uint64_t* to, uint32_t mask, const uint64_t* from) {
    for (; mask; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}

DC_INLINE Lanes round_down(Lanes a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
DC_INLINE __m256i shift_down(__m128i x, __m128i by) {
    return _mm256_srlv_epi64(_mm256_slli_epi64(_mm256_cvtepu32_epi64(x), 16), _mm256_cvtepu32_epi64(by));
}
DC_INLINE void scale_down8(__m256 x, __m256 n, __m256 lanes, __m256i* to) {
    const __m256i whole = _mm256_and_si256(_mm256_cvttps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(0x1p24f))), _mm256_castps_si256(lanes));
    const __m256i by = _mm256_cvttps_epi32(_mm256_sub_ps(_mm256_setzero_ps(), n));
    to[0] = shift_down(_mm256_castsi256_si128(whole), _mm256_castsi256_si128(by));
    to[1] = shift_down(_mm256_extracti128_si256(whole, 1), _mm256_extracti128_si256(by, 1));
}
DC_INLINE Longs scaled_down(Lanes x, Lanes n, Chosen lanes) {
    Longs result;
    scale_down8(x.lo, n.lo, lanes.lo, result.v);
    scale_down8(x.hi, n.hi, lanes.hi, result.v + 2);
    return result;
}
DC_INLINE __m256 minus_log2_8(__m256i a) {      // of half of it: only signed numbers are converted
    const __m256 half = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 1));
    return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(half)), _mm256_set1_ps(0x1p-23f), _mm256_set1_ps(127 + 31));
}
DC_INLINE Lanes minus_log2(Words a) { return {minus_log2_8(a.lo), minus_log2_8(a.hi)}; }

struct Counters { __m256i v; };                 // in the low halves of 4 uint64; what the high halves hold is ignored
struct Noise { Counters word[4]; };
constexpr int GROUPS_AT_ONCE = 4, PARTS = 4;
DC_INLINE Counters all_counters(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
DC_INLINE void multiply(Counters a, uint32_t b, Counters& low, Counters& high) {
    low = {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(b))};
    high = {_mm256_srli_epi64(low.v, 32)};
}
DC_INLINE Counters exclusive_or(Counters a, Counters b, Counters c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
DC_INLINE void split(Words a, Counters (&parts)[PARTS]) {
    parts[0] = {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(a.lo))};
    parts[1] = {_mm256_cvtepu32_epi64(_mm256_extracti128_si256(a.lo, 1))};
    parts[2] = {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(a.hi))};
    parts[3] = {_mm256_cvtepu32_epi64(_mm256_extracti128_si256(a.hi, 1))};
}
DC_INLINE __m256i join8(Counters first, Counters second) {
    const __m256 low_halves = _mm256_shuffle_ps(_mm256_castsi256_ps(first.v), _mm256_castsi256_ps(second.v), _MM_SHUFFLE(2, 0, 2, 0));
    return _mm256_permute4x64_epi64(_mm256_castps_si256(low_halves), _MM_SHUFFLE(3, 1, 2, 0));
}
DC_INLINE Words join(const Noise (&parts)[PARTS], int word) {
    return {join8(parts[0].word[word], parts[1].word[word]), join8(parts[2].word[word], parts[3].word[word])};
}
DC_INLINE Counters groups_from(uint32_t first) { return {_mm256_add_epi64(_mm256_setr_epi64x(0, 2, 1, 3), _mm256_set1_epi64x(first))}; }
DC_INLINE __m256i pair(Counters even, Counters odd) { return _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA); }
DC_INLINE void by_ids(const Noise& noise, Words* to) {
    const __m256i w01 = pair(noise.word[0], noise.word[1]), w23 = pair(noise.word[2], noise.word[3]);
    *to = {_mm256_unpacklo_epi64(w01, w23), _mm256_unpackhi_epi64(w01, w23)};
}

// --- NEON -------------------------------------------------------------------------------------------------------------

#elif defined(DC_NEON)

struct Words { uint32x4_t v[4]; };
#define DC_WORDS(expression)                           \
    Words r;                                           \
    for (int i = 0; i < 4; i++) r.v[i] = (expression); \
    return r
DC_INLINE Words load(const uint32_t* p) { DC_WORDS(vld1q_u32(p + 4 * i)); }
DC_INLINE void store(uint32_t* p, Words a) {
    for (int i = 0; i < 4; i++) vst1q_u32(p + 4 * i, a.v[i]);
}
DC_INLINE Words all_words(uint32_t x) { DC_WORDS(vdupq_n_u32(x)); }
DC_INLINE uint32x4_t four_from(uint32_t first) {
    const uint32_t lanes[4] = {0, 1, 2, 3};
    return vaddq_u32(vld1q_u32(lanes), vdupq_n_u32(first));
}
DC_INLINE Words words_from(uint32_t first) { DC_WORDS(four_from(first + 4 * uint32_t(i))); }
DC_INLINE Words add_one(Words a, Chosen lanes) { DC_WORDS(vsubq_u32(a.v[i], lanes.v[i])); }         // a chosen lane is -1
DC_INLINE int64_t sum(Words a) {
    int64_t total = 0;
    for (int i = 0; i < 4; i++) total += int64_t(vaddlvq_u32(a.v[i]));
    return total;
}
DC_INLINE Words choose(Chosen lanes, Words a, Words b) { DC_WORDS(vbslq_u32(lanes.v[i], a.v[i], b.v[i])); }
DC_INLINE Words group_of(Words ids) { DC_WORDS(vshrq_n_u32(ids.v[i], 2)); }
#undef DC_WORDS
DC_INLINE Chosen in_place(Words ids, uint32_t place) {
    Chosen lanes;
    for (int i = 0; i < 4; i++) lanes.v[i] = vceqq_u32(vandq_u32(ids.v[i], vdupq_n_u32(3)), vdupq_n_u32(place));
    return lanes;
}

struct BytesOfMask {                            // for each mask of 4 lanes: the bytes of its lanes, lowest first
    alignas(16) uint8_t bytes[16][16];
    constexpr BytesOfMask() : bytes() {
        for (int mask = 0; mask < 16; mask++)
            for (int lane = 0, to = 0; lane < 4; lane++)
                if (mask >> lane & 1)
                    for (int byte = 0; byte < 4; byte++) bytes[mask][to++] = uint8_t(4 * lane + byte);
    }
};
constexpr BytesOfMask BYTES_OF_MASK;
DC_INLINE void store_some(uint32_t* p, uint32_t mask, Words a) {
    for (int i = 0; i < 4; i++, mask >>= 4) {
        vst1q_u32(p, vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(a.v[i]), vld1q_u8(BYTES_OF_MASK.bytes[mask & 15]))));
        p += __builtin_popcount(mask & 15);
    }
}
DC_INLINE void store_some(float* p, uint32_t mask, Lanes a) {
    for (int i = 0; i < 4; i++, mask >>= 4) {
        vst1q_f32(p, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(a.v[i]), vld1q_u8(BYTES_OF_MASK.bytes[mask & 15]))));
        p += __builtin_popcount(mask & 15);
    }
}

struct Longs { uint64x2_t v[8]; };
DC_INLINE Longs no_longs() {
    Longs zeros;
    for (uint64x2_t& v : zeros.v) v = vdupq_n_u64(0);
    return zeros;
}
DC_INLINE Longs operator+(Longs a, Longs b) {
    for (int i = 0; i < 8; i++) a.v[i] = vaddq_u64(a.v[i], b.v[i]);
    return a;
}
DC_INLINE void store(uint64_t* p, Longs a) {
    for (int i = 0; i < 8; i++) vst1q_u64(p + 2 * i, a.v[i]);
}
DC_INLINE uint64_t sum(Longs a) {
    uint64x2_t total = a.v[0];
    for (int i = 1; i < 8; i++) total = vaddq_u64(total, a.v[i]);
    return vaddvq_u64(total);
}
DC_INLINE Longs load_some(const uint64_t* p, Chosen lanes) {
    Longs result;
    for (int i = 0; i < 4; i++) {
        const int32x4_t four = vreinterpretq_s32_u32(lanes.v[i]);
        const uint64x2_t low = vreinterpretq_u64_s64(vmovl_s32(vget_low_s32(four))), high = vreinterpretq_u64_s64(vmovl_high_s32(four));
        result.v[2 * i] = vandq_u64(vld1q_u64(p + 4 * i), low);
        result.v[2 * i + 1] = vandq_u64(vld1q_u64(p + 4 * i + 2), high);
    }
    return result;
}
DC_INLINE void store_some(uint64_t* to, uint32_t mask, const uint64_t* from) {
    for (; mask; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}

DC_INLINE Lanes round_down(Lanes a) {
    for (int i = 0; i < 4; i++) a.v[i] = vrndmq_f32(a.v[i]);
    return a;
}
DC_INLINE Longs scaled_down(Lanes x, Lanes n, Chosen lanes) {
    Longs result;
    for (int i = 0; i < 4; i++) {
        const uint32x4_t whole = vandq_u32(vcvtq_u32_f32(vmulq_f32(x.v[i], vdupq_n_f32(0x1p24f))), lanes.v[i]);
        const int32x4_t by = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(16));         // below 0: to the right
        result.v[2 * i] = vshlq_u64(vmovl_u32(vget_low_u32(whole)), vmovl_s32(vget_low_s32(by)));
        result.v[2 * i + 1] = vshlq_u64(vmovl_high_u32(whole), vmovl_high_s32(by));
    }
    return result;
}
DC_INLINE Lanes minus_log2(Words a) {
    Lanes result;
    for (int i = 0; i < 4; i++) {               // of half of it, which a float never rounds to more than the word
        const float32x4_t half = vcvtq_f32_u32(vshrq_n_u32(a.v[i], 1)), bits = vcvtq_f32_u32(vreinterpretq_u32_f32(half));
        result.v[i] = vfmsq_f32(vdupq_n_f32(127 + 31), bits, vdupq_n_f32(0x1p-23f));
    }
    return result;
}

struct Counters { uint32x4_t v; };
struct Noise { Counters word[4]; };
constexpr int GROUPS_AT_ONCE = 4, PARTS = 4;
DC_INLINE Counters all_counters(uint32_t x) { return {vdupq_n_u32(x)}; }
DC_INLINE void multiply(Counters a, uint32_t b, Counters& low, Counters& high) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.v), b));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_n_u32(a.v, b));
    low = {vuzp1q_u32(first, second)};
    high = {vuzp2q_u32(first, second)};
}
DC_INLINE Counters exclusive_or(Counters a, Counters b, Counters c) { return {veorq_u32(veorq_u32(a.v, b.v), c.v)}; }
DC_INLINE void split(Words a, Counters (&parts)[PARTS]) {
    for (int i = 0; i < PARTS; i++) parts[i] = {a.v[i]};
}
DC_INLINE Words join(const Noise (&parts)[PARTS], int word) {
    return {{parts[0].word[word].v, parts[1].word[word].v, parts[2].word[word].v, parts[3].word[word].v}};
}
DC_INLINE Counters groups_from(uint32_t first) { return {four_from(first)}; }
DC_INLINE void by_ids(const Noise& noise, Words* to) {
    const uint32x4_t w0 = noise.word[0].v, w1 = noise.word[1].v, w2 = noise.word[2].v, w3 = noise.word[3].v;
    const uint64x2_t low01 = vreinterpretq_u64_u32(vzip1q_u32(w0, w1)), low23 = vreinterpretq_u64_u32(vzip1q_u32(w2, w3));
    const uint64x2_t high01 = vreinterpretq_u64_u32(vzip2q_u32(w0, w1)), high23 = vreinterpretq_u64_u32(vzip2q_u32(w2, w3));
    *to = {{vreinterpretq_u32_u64(vzip1q_u64(low01, low23)), vreinterpretq_u32_u64(vzip2q_u64(low01, low23)),
            vreinterpretq_u32_u64(vzip1q_u64(high01, high23)), vreinterpretq_u32_u64(vzip2q_u64(high01, high23))}};
}

// --- any CPU: arrays and loops, which the compiler may turn into what vectors it has -------------------------------------

#else
#define DC_LANES_ARE_ARRAYS 1

struct Words { uint32_t v[16]; };
#define DC_WORDS(expression)                            \
    Words r;                                            \
    for (int i = 0; i < 16; i++) r.v[i] = (expression); \
    return r
DC_INLINE Words load(const uint32_t* p) { DC_WORDS(p[i]); }
DC_INLINE void store(uint32_t* p, Words a) { std::memcpy(p, a.v, sizeof a.v); }
DC_INLINE Words all_words(uint32_t x) { DC_WORDS(x); }
DC_INLINE Words words_from(uint32_t first) { DC_WORDS(first + uint32_t(i)); }
DC_INLINE Words add_one(Words a, Chosen lanes) { DC_WORDS(a.v[i] - uint32_t(lanes.v[i])); }
DC_INLINE int64_t sum(Words a) {
    int64_t total = 0;
    for (uint32_t lane : a.v) total += lane;
    return total;
}
DC_INLINE Words choose(Chosen lanes, Words a, Words b) { DC_WORDS(lanes.v[i] ? a.v[i] : b.v[i]); }
DC_INLINE Words group_of(Words ids) { DC_WORDS(ids.v[i] / 4); }
#undef DC_WORDS
DC_INLINE Chosen in_place(Words ids, uint32_t place) {
    Chosen lanes;
    for (int i = 0; i < 16; i++) lanes.v[i] = -int32_t(ids.v[i] % 4 == place);
    return lanes;
}
DC_INLINE void store_some(float* p, uint32_t mask, Lanes a) {
    for (; mask; mask &= mask - 1) *p++ = a.v[__builtin_ctz(mask)];
}
DC_INLINE void store_some(uint32_t* p, uint32_t mask, Words a) {
    for (; mask; mask &= mask - 1) *p++ = a.v[__builtin_ctz(mask)];
}

struct Longs { uint64_t v[16]; };
DC_INLINE Longs no_longs() { return {}; }
DC_INLINE Longs operator+(Longs a, Longs b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}
DC_INLINE void store(uint64_t* p, Longs a) { std::memcpy(p, a.v, sizeof a.v); }
DC_INLINE uint64_t sum(Longs a) {
    uint64_t total = 0;
    for (uint64_t lane : a.v) total += lane;
    return total;
}
DC_INLINE Longs load_some(const uint64_t* p, Chosen lanes) {
    Longs result;
    for (int i = 0; i < 16; i++) result.v[i] = lanes.v[i] ? p[i] : 0;
    return result;
}
DC_INLINE void store_some(uint64_t* to, uint32_t mask, const uint64_t* from) {
    for (; mask; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}

DC_INLINE Lanes minus_log2(Words a) {
    Lanes result;
    for (int i = 0; i < 16; i++) {              // of half of it: signed numbers are converted faster
        const float half = float(int32_t(a.v[i] >> 1));
        result.v[i] = 127 + 31 - float(bits_of<int32_t>(half)) * 0x1p-23f;
    }
    return result;
}

struct Counters { uint32_t v[4]; };
struct Noise { Counters word[4]; };
constexpr int GROUPS_AT_ONCE = 4, PARTS = 4;
DC_INLINE Counters all_counters(uint32_t x) { return {{x, x, x, x}}; }
DC_INLINE void multiply(Counters a, uint32_t b, Counters& low, Counters& high) {
    for (int i = 0; i < 4; i++) {
        const uint64_t product = uint64_t(a.v[i]) * b;
        low.v[i] = uint32_t(product);
        high.v[i] = uint32_t(product >> 32);
    }
}
DC_INLINE Counters exclusive_or(Counters a, Counters b, Counters c) {
    for (int i = 0; i < 4; i++) a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
}
DC_INLINE void split(Words a, Counters (&parts)[PARTS]) { std::memcpy(parts, a.v, sizeof a.v); }
DC_INLINE Words join(const Noise (&parts)[PARTS], int word) {
    Words joined;
    for (int i = 0; i < 16; i++) joined.v[i] = parts[i / 4].word[word].v[i % 4];
    return joined;
}
DC_INLINE Counters groups_from(uint32_t first) { return {{first, first + 1, first + 2, first + 3}}; }
DC_INLINE void by_ids(const Noise& noise, Words* to) {
    for (int i = 0; i < 16; i++) to->v[i] = noise.word[i % 4].v[i / 4];
}

#endif

// --- from here on the same everywhere -----------------------------------------------------------------------------------

// a b + c, rounded once or twice, as is faster: for bounds, not for what the bits of a result depend on.
DC_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX2__) || defined(DC_NEON)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace DC_ISA
}  // namespace dc
