// Sixteen float lanes with one meaning on every instruction set.
//
// A file that includes this defines DC_ISA (avx512, avx2, neon or portable) and is compiled with the flags of that instruction
// set; aarch64 always has NEON, so there DC_NEON tells a file for it from a portable one. Every function rounds once, as
// IEEE 754 says, so a kernel written with these lanes gives the same bits everywhere: that is why even `portable` computes a
// true fused multiply-add. Nothing here may call an inline function of the standard library: the linker might then keep the
// copy that was compiled for the wider instruction set. Lanes of whole numbers are in cpu/sample/whole_lanes.h.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)      // GCC 12's AVX-512 header reads its own "undefined" registers (PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif defined(DC_NEON)
#include <arm_neon.h>
#endif

#define DC_INLINE static inline __attribute__((always_inline))

namespace dc {
namespace DC_ISA {

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

template <class To, class From>
DC_INLINE To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &x, sizeof to);
    return to;
}

// ---- one element: the storage types, widened exactly and narrowed to the nearest, ties to even

DC_INLINE float widen(float x) { return x; }
DC_INLINE float widen(Bfloat x) { return bits_of<float>(uint32_t(x.bits) << 16); }
DC_INLINE float widen(Half x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
    uint32_t special = (magnitude << 13) | 0x7f800000;
    uint32_t tiny = bits_of<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);   // never a subnormal float
    return bits_of<float>(sign | (magnitude < 0x0400 ? tiny : magnitude < 0x7c00 ? normal : special));
}

DC_INLINE void narrow(float x, float* to) { *to = x; }
DC_INLINE void narrow(float x, Bfloat* to) {
    uint32_t u = bits_of<uint32_t>(x);
    bool nan = (u & 0x7fffffff) > 0x7f800000;
    to->bits = uint16_t(nan ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
DC_INLINE void narrow(float x, Half* to) {
    uint32_t u = bits_of<uint32_t>(x), magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
    uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t tiny = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000;     // the sum rounds at 2^-24
    uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    to->bits = uint16_t(sign | (magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? tiny : normal));
}

// ---- one fused multiply-add

#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
DC_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Without the instruction: the product is exact in double, the sum is rounded to odd (Boldo and Melquiond, 2008), and
// rounding that to float gives what one rounding would have given.
DC_INLINE float fma1(float a, float b, float c) {
    double product = double(a) * double(b), sum = product + c;
    double back = sum - product, error = (product - (sum - back)) + (c - back);
    int64_t u = bits_of<int64_t>(sum);
    int64_t inexact = (error < 0) | (error > 0), even = ~u & 1;     // a NaN error (infinite sum) is neither
    int64_t outward = (error > 0) == (sum > 0);
    return float(bits_of<double>(u + (inexact & even) * (2 * outward - 1)));
}
#endif

// ---- sixteen lanes. maximum(a, b) is a > b ? a : b, so b where either is NaN, as x86 has it.
//
// A comparison gives a Chosen: the lanes where it holds, in the form that this instruction set selects by. No lane with a NaN
// is chosen. `bitmask` makes a number of it: bit i is lane i.

#if defined(__AVX512F__)

struct Lanes { __m512 v; };
DC_INLINE Lanes all(float x) { return {_mm512_set1_ps(x)}; }
DC_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
DC_INLINE Lanes load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DC_INLINE Lanes load(const Bfloat* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
DC_INLINE void load_pair(const Bfloat* p, Lanes& first, Lanes& second) {
    const __m512i both = _mm512_loadu_si512(p);
    first = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    second = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))};
}
DC_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
DC_INLINE void store(Half* p, Lanes a) {
    __m256i narrowed = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed);
}
DC_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DC_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
DC_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
DC_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
DC_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
DC_INLINE Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
DC_INLINE Lanes zero_below(Lanes x, Lanes limit, Lanes a) {         // x < limit ? 0 : a
    return {_mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), _mm512_setzero_ps())};
}
DC_INLINE Lanes add_exponent(Lanes a, Lanes n) {                    // integer a + (n << 23) on the bits
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v),
                                                 _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
DC_INLINE Lanes keep(Lanes a, int begin, int end, float other) {    // lanes outside [begin, end) become other
    __mmask16 mask = __mmask16(((1u << end) - 1) & ~((1u << begin) - 1));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), mask, a.v)};
}
struct Chosen { __mmask16 v; };
DC_INLINE Chosen at_least(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
DC_INLINE Chosen above(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
DC_INLINE uint32_t bitmask(Chosen lanes) { return lanes.v; }
constexpr int QUERIES_IN_REGISTERS = 12;
constexpr int REGISTERS = 32;

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct Lanes { __m256 lo, hi; };
DC_INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DC_INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DC_INLINE __m128i load8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
DC_INLINE Lanes load(const Half* p) {
    return {_mm256_cvtph_ps(load8(&p[0].bits)), _mm256_cvtph_ps(load8(&p[8].bits))};
}
DC_INLINE __m256 widen8(const Bfloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(&p->bits)), 16));
}
DC_INLINE Lanes load(const Bfloat* p) { return {widen8(p), widen8(p + 8)}; }
DC_INLINE void load_pair(const Bfloat* p, Lanes& first, Lanes& second) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)), upper = _mm256_set1_epi32(int(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
}
DC_INLINE void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
DC_INLINE void store8(Half* p, __m256 a) {
    __m128i narrowed = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed);
}
DC_INLINE void store(Half* p, Lanes a) { store8(p, a.lo); store8(p + 8, a.hi); }
DC_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
DC_INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
DC_INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
DC_INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
DC_INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
DC_INLINE Lanes maximum(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
DC_INLINE __m256 zero_below8(__m256 x, __m256 limit, __m256 a) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), a);
}
DC_INLINE Lanes zero_below(Lanes x, Lanes limit, Lanes a) {
    return {zero_below8(x.lo, limit.lo, a.lo), zero_below8(x.hi, limit.hi, a.hi)};
}
DC_INLINE __m256 add_exponent8(__m256 a, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
DC_INLINE Lanes add_exponent(Lanes a, Lanes n) { return {add_exponent8(a.lo, n.lo), add_exponent8(a.hi, n.hi)}; }
DC_INLINE Lanes keep(Lanes a, int begin, int end, float other) {
    alignas(32) float x[16];
    store(x, a);
    for (int i = 0; i < 16; i++) x[i] = i >= begin && i < end ? x[i] : other;
    return load(x);
}
struct Chosen { __m256 lo, hi; };
DC_INLINE Chosen at_least(Lanes a, Lanes b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}
DC_INLINE Chosen above(Lanes a, Lanes b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
DC_INLINE uint32_t bitmask(Chosen lanes) {
    return uint32_t(_mm256_movemask_ps(lanes.lo)) | uint32_t(_mm256_movemask_ps(lanes.hi)) << 8;
}
constexpr int QUERIES_IN_REGISTERS = 6;
constexpr int REGISTERS = 8;                    // pairs of ymm

#elif defined(DC_NEON)

struct Lanes { float32x4_t v[4]; };
#define DC_EACH(expression)                            \
    Lanes r;                                           \
    for (int i = 0; i < 4; i++) r.v[i] = (expression); \
    return r
DC_INLINE Lanes all(float x) { DC_EACH(vdupq_n_f32(x)); }
DC_INLINE Lanes load(const float* p) { DC_EACH(vld1q_f32(p + 4 * i)); }
DC_INLINE Lanes load(const Half* p) { DC_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * i].bits)))); }
DC_INLINE Lanes load(const Bfloat* p) { DC_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p[4 * i].bits), 16))); }
DC_INLINE void load_pair(const Bfloat* p, Lanes& first, Lanes& second) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(&p[8 * i].bits));
        first.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
        second.v[i] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
    }
}
DC_INLINE void store(float* p, Lanes a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
DC_INLINE void store(Half* p, Lanes a) {
    for (int i = 0; i < 4; i++) vst1_u16(&p[4 * i].bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
DC_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { DC_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
DC_INLINE Lanes operator+(Lanes a, Lanes b) { DC_EACH(vaddq_f32(a.v[i], b.v[i])); }
DC_INLINE Lanes operator-(Lanes a, Lanes b) { DC_EACH(vsubq_f32(a.v[i], b.v[i])); }
DC_INLINE Lanes operator*(Lanes a, Lanes b) { DC_EACH(vmulq_f32(a.v[i], b.v[i])); }
DC_INLINE Lanes operator/(Lanes a, Lanes b) { DC_EACH(vdivq_f32(a.v[i], b.v[i])); }
DC_INLINE float32x4_t maximum4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }     // fmax makes NaN of either
DC_INLINE Lanes maximum(Lanes a, Lanes b) { DC_EACH(maximum4(a.v[i], b.v[i])); }
DC_INLINE Lanes zero_below(Lanes x, Lanes limit, Lanes a) {
    DC_EACH(vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v[i]), vcltq_f32(x.v[i], limit.v[i]))));
}
DC_INLINE Lanes add_exponent(Lanes a, Lanes n) {
    DC_EACH(vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v[i]), vshlq_n_s32(vreinterpretq_s32_f32(n.v[i]), 23))));
}
DC_INLINE Lanes keep(Lanes a, int begin, int end, float other) {
    float x[16];
    store(x, a);
    for (int i = 0; i < 16; i++) x[i] = i >= begin && i < end ? x[i] : other;
    return load(x);
}
#undef DC_EACH
struct Chosen { uint32x4_t v[4]; };             // all bits of a lane, or none
DC_INLINE Chosen at_least(Lanes a, Lanes b) {
    Chosen lanes;
    for (int i = 0; i < 4; i++) lanes.v[i] = vcgeq_f32(a.v[i], b.v[i]);
    return lanes;
}
DC_INLINE Chosen above(Lanes a, Lanes b) {
    Chosen lanes;
    for (int i = 0; i < 4; i++) lanes.v[i] = vcgtq_f32(a.v[i], b.v[i]);
    return lanes;
}
DC_INLINE uint32_t bitmask(Chosen lanes) {
    const uint16_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t low = vcombine_u16(vmovn_u32(lanes.v[0]), vmovn_u32(lanes.v[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(lanes.v[2]), vmovn_u32(lanes.v[3]));
    return vaddvq_u16(vandq_u16(low, vld1q_u16(bits))) | uint32_t(vaddvq_u16(vandq_u16(high, vld1q_u16(bits)))) << 8;
}
constexpr int QUERIES_IN_REGISTERS = 6;
constexpr int REGISTERS = 8;                    // fours of q registers

#else

struct Lanes { float v[16]; };
#define DC_EACH(expression)                       \
    Lanes r;                                               \
    for (int i = 0; i < 16; i++) r.v[i] = (expression);    \
    return r
DC_INLINE Lanes all(float x) { DC_EACH(x); }
template <class T> DC_INLINE Lanes load(const T* p) { DC_EACH(widen(p[i])); }
DC_INLINE void load_pair(const Bfloat* p, Lanes& first, Lanes& second) {
    for (int i = 0; i < 16; i++) first.v[i] = widen(p[2 * i]), second.v[i] = widen(p[2 * i + 1]);
}
DC_INLINE void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
DC_INLINE void store(Half* p, Lanes a) { for (int i = 0; i < 16; i++) narrow(a.v[i], p + i); }
#if defined(__SSE2__) && !defined(__FMA__)
// Rounding the sum to double and then to float can only go wrong where the double lies in the middle of two floats (its
// low 29 bits say so) or where the float is subnormal: then, which is rare, all lanes take the exact way.
DC_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    Lanes r;
    __m128i doubtful = _mm_setzero_si128();
    for (int i = 0; i < 16; i += 4) {
        const __m128 x = _mm_loadu_ps(a.v + i), y = _mm_loadu_ps(b.v + i), z = _mm_loadu_ps(c.v + i);
        const __m128d low = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
        const __m128d high = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), _mm_cvtps_pd(_mm_movehl_ps(y, y))),
                                        _mm_cvtps_pd(_mm_movehl_ps(z, z)));
        _mm_storeu_ps(r.v + i, _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high)));
        const __m128 p = _mm_castpd_ps(low), q = _mm_castpd_ps(high);
        const __m128i fraction = _mm_and_si128(_mm_castps_si128(_mm_shuffle_ps(p, q, 0x88)), _mm_set1_epi32(0x1fffffff));
        const __m128i exponent = _mm_and_si128(_mm_castps_si128(_mm_shuffle_ps(p, q, 0xdd)), _mm_set1_epi32(0x7fffffff));
        doubtful = _mm_or_si128(doubtful, _mm_or_si128(_mm_cmpeq_epi32(fraction, _mm_set1_epi32(0x10000000)),
                                                       _mm_cmplt_epi32(exponent, _mm_set1_epi32(0x38100000))));
    }
    if (_mm_movemask_epi8(doubtful))
        for (int i = 0; i < 16; i++) r.v[i] = fma1(a.v[i], b.v[i], c.v[i]);
    return r;
}
#else
DC_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { DC_EACH(fma1(a.v[i], b.v[i], c.v[i])); }
#endif
DC_INLINE Lanes operator+(Lanes a, Lanes b) { DC_EACH(a.v[i] + b.v[i]); }
DC_INLINE Lanes operator-(Lanes a, Lanes b) { DC_EACH(a.v[i] - b.v[i]); }
DC_INLINE Lanes operator*(Lanes a, Lanes b) { DC_EACH(a.v[i] * b.v[i]); }
DC_INLINE Lanes operator/(Lanes a, Lanes b) { DC_EACH(a.v[i] / b.v[i]); }
DC_INLINE Lanes maximum(const Lanes& a, const Lanes& b) { DC_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
DC_INLINE Lanes zero_below(Lanes x, Lanes limit, Lanes a) {
    DC_EACH(x.v[i] < limit.v[i] ? 0.0f : a.v[i]);
}
DC_INLINE Lanes add_exponent(Lanes a, Lanes n) {
    DC_EACH(bits_of<float>(bits_of<uint32_t>(a.v[i]) + (bits_of<uint32_t>(n.v[i]) << 23)));
}
DC_INLINE Lanes keep(Lanes a, int begin, int end, float other) {
    DC_EACH(i >= begin && i < end ? a.v[i] : other);
}
#undef DC_EACH
struct Chosen { int32_t v[16]; };               // -1, or 0; taken by reference, as `maximum` does: GCC would copy the arrays
DC_INLINE Chosen at_least(const Lanes& a, const Lanes& b) {
    Chosen lanes;
    for (int i = 0; i < 16; i++) lanes.v[i] = -int32_t(a.v[i] >= b.v[i]);
    return lanes;
}
DC_INLINE Chosen above(const Lanes& a, const Lanes& b) {
    Chosen lanes;
    for (int i = 0; i < 16; i++) lanes.v[i] = -int32_t(a.v[i] > b.v[i]);
    return lanes;
}
DC_INLINE uint32_t bitmask(const Chosen& lanes) {
    constexpr uint32_t bits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(lanes.v[i]) & bits[i];
    return mask;
}
constexpr int QUERIES_IN_REGISTERS = 4;
constexpr int REGISTERS = 8;

#endif

#if defined(DC_NEON)
DC_INLINE void store(Bfloat* p, Lanes a) {          // as `narrow` does
    for (int i = 0; i < 4; i++) {
        const uint32x4_t u = vreinterpretq_u32_f32(a.v[i]), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
        vst1_u16(&p[4 * i].bits, vshrn_n_u32(vbslq_u32(vceqq_f32(a.v[i], a.v[i]), rounded, quiet), 16));
    }
}
#else
DC_INLINE void store(Bfloat* p, Lanes a) {
    float x[16];
    store(x, a);
    for (int i = 0; i < 16; i++) narrow(x[i], p + i);
}
#endif

// 16 numbers of a first and 16 of a second row; those of Bfloats alternate, so that they are widened by one instruction.
template <class T>
DC_INLINE void load_pair(const T* p, Lanes& first, Lanes& second) { first = load(p), second = load(p + 16); }

// ---- over the lanes, always as the same tree: i with i + 8, then i + 4, i + 2, i + 1
//
// store_sums(a, b, c, d, out [4]) sums four at once; scaled_sums(a [4], scales [4], out [4]) multiplies their sums by scales.

#if defined(DC_NEON)
DC_INLINE float sum(Lanes a) {
    const float32x4_t fours = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(fours), vget_high_f32(fours)));
}
#else
DC_INLINE float sum(Lanes a) {
    float x[16];
    store(x, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}
#endif
#if defined(__AVX512F__)
DC_INLINE __m128 four_sums(Lanes a, Lanes b, Lanes c, Lanes d) {
    const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
    const __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
    const __m512 fours = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
    const __m512 twos = _mm512_add_ps(fours, _mm512_permute_ps(fours, 0x4e)), ones = _mm512_add_ps(twos, _mm512_permute_ps(twos, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, ones));
}
DC_INLINE void store_sums(Lanes a, Lanes b, Lanes c, Lanes d, float* out) { _mm_storeu_ps(out, four_sums(a, b, c, d)); }
DC_INLINE void scaled_sums(const Lanes (&a)[4], const float* scales, float* out) {
    _mm_storeu_ps(out, _mm_mul_ps(_mm_loadu_ps(scales), four_sums(a[0], a[1], a[2], a[3])));
}
#elif defined(__AVX2__)
DC_INLINE void store_sums(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
    const __m256 eights[4] = {_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi), _mm256_add_ps(c.lo, c.hi), _mm256_add_ps(d.lo, d.hi)};
    const auto fours = [&](int i) {                     // of two, in a half each
        return _mm256_add_ps(_mm256_permute2f128_ps(eights[i], eights[i + 1], 0x20), _mm256_permute2f128_ps(eights[i], eights[i + 1], 0x31));
    };
    const __m256 first = fours(0), second = fours(2);
    const __m256 twos = _mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee));
    const __m256 ones = _mm256_hadd_ps(twos, twos);     // a and c, then b and d
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(ones), _mm256_extractf128_ps(ones, 1)));
}
DC_INLINE void scaled_sums(const Lanes (&a)[4], const float* scales, float* out) {
    for (int j = 0; j < 4; j++) out[j] = scales[j] * sum(a[j]);
}
#else
DC_INLINE void store_sums(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
DC_INLINE void scaled_sums(const Lanes (&a)[4], const float* scales, float* out) {
    for (int j = 0; j < 4; j++) out[j] = scales[j] * sum(a[j]);
}
#endif
#if defined(DC_NEON)
DC_INLINE float maximum(Lanes a) {
    const float32x4_t fours = maximum4(maximum4(a.v[0], a.v[2]), maximum4(a.v[1], a.v[3]));
    const float32x4_t twos = maximum4(fours, vextq_f32(fours, fours, 2));
    return vgetq_lane_f32(maximum4(twos, vextq_f32(twos, twos, 1)), 0);
}
#else
DC_INLINE float maximum(Lanes a) {
    float x[16];
    store(x, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}
#endif

// exp(x) for x <= 0, within 1.5 ulp; 0 below -87, where float would go subnormal; NaN stays NaN.
// exp(x) = 2^n * exp(r) with |r| <= ln(2)/2, the polynomial of Cephes' expf.
DC_INLINE Lanes exp_negative(Lanes x) {
    const Lanes limit = all(-87.0f), magic = all(12582912.0f);      // 1.5 * 2^23: adding it rounds to an integer
    Lanes y = maximum(limit, x);
    Lanes shifted = fma(y, all(1.44269504f), magic), n = shifted - magic;
    Lanes r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), y));
    Lanes p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + all(1.0f);
    return zero_below(x, limit, add_exponent(p, shifted));
}

DC_INLINE float exp_negative(float x) {
    float y[16];
    store(y, exp_negative(all(x)));
    return y[0];
}

// e^-|x| on either side of zero, so that nothing overflows
DC_INLINE Lanes sigmoid(Lanes x) {
    const Lanes zero = all(0.0f), one = all(1.0f), e = exp_negative(zero - maximum(x, zero - x));
    return (zero_below(x, zero, one) + (e - zero_below(x, zero, e))) / (one + e);       // x < 0: e, else 1
}
DC_INLINE float sigmoid(float x) {
    float y[16];
    store(y, sigmoid(all(x)));
    return y[0];
}

// log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x|, within 2e-7 of its size; log(1 + y) = 2 atanh(s) with s = y / (2 + y), at most 1/3
DC_INLINE Lanes softplus(Lanes x) {
    const Lanes zero = all(0.0f), y = exp_negative(zero - maximum(x, zero - x));
    const Lanes s = y / (all(2.0f) + y), t = s * s;
    Lanes p = fma(all(1.0f / 13), t, all(1.0f / 11));
    p = fma(p, t, all(1.0f / 9));
    p = fma(p, t, all(1.0f / 7));
    p = fma(p, t, all(1.0f / 5));
    p = fma(p, t, all(1.0f / 3));
    p = fma(p * t, s, s);
    return maximum(x, zero) + (p + p);
}

// g * sigmoid(t) without overflow, where g and t have the same sign: e^-|t| on either side of zero
DC_INLINE Lanes times_sigmoid(Lanes g, Lanes t) {
    const Lanes zero = all(0.0f), above = maximum(g, zero), below = g - above, positive = maximum(t, zero);
    const Lanes e = exp_negative((t - positive) - positive);
    return fma(below, e, above) / (all(1.0f) + e);
}

DC_INLINE Lanes silu(Lanes g) { return times_sigmoid(g, g); }
DC_INLINE Lanes gelu_quick(Lanes g) { return times_sigmoid(g, g * all(1.702f)); }

// g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))), as (1 + tanh u) / 2 = sigmoid(2 u)
DC_INLINE Lanes gelu_tanh(Lanes g) {
    return times_sigmoid(g, g * fma(g * g, all(1.59576912f * 0.044715f), all(1.59576912f)));
}

// g / 2 * (1 + erf(g / sqrt(2))) = max(g, 0) - |g| h, where h = erfc(|g| / sqrt(2)) / 2 within 7.5e-8 (Abramowitz and Stegun 7.1.26)
DC_INLINE Lanes gelu_erf(Lanes g) {
    const Lanes zero = all(0.0f), one = all(1.0f), size = maximum(g, zero - g);
    const Lanes t = one / fma(size, all(0.3275911f * 0.707106781f), one);
    Lanes p = fma(all(0.5f * 1.061405429f), t, all(0.5f * -1.453152027f));
    p = fma(p, t, all(0.5f * 1.421413741f));
    p = fma(p, t, all(0.5f * -0.284496736f));
    p = fma(p, t, all(0.5f * 0.254829592f)) * t;
    return maximum(g, zero) - size * (p * exp_negative(size * size * all(-0.5f)));
}

DC_INLINE Lanes relu2(Lanes y) {
    const Lanes above = maximum(y, all(0.0f));
    return above * above;
}

DC_INLINE Lanes at_most(Lanes a, float limit) { return all(0.0f) - maximum(all(-limit), all(0.0f) - a); }     // NaN stays NaN

DC_INLINE Lanes clamped_swiglu(Lanes gate, Lanes up) {
    const Lanes g = at_most(gate, 7.0f), u = maximum(all(-7.0f), at_most(up, 7.0f));
    return times_sigmoid(g, g * all(1.702f)) * (u + all(1.0f));
}

// cap tanh(x / cap), with tanh |x| = (1 - e) / (1 + e) and e = exp(-2 |x|)
DC_INLINE Lanes capped(Lanes x, Lanes cap) {
    const Lanes zero = all(0.0f), one = all(1.0f), t = x / cap;
    const Lanes e = exp_negative(maximum(t, zero - t) * all(-2.0f));
    const Lanes size = (one - e) / (one + e) * cap;
    return zero_below(t, zero, size) - zero_below(zero - t, zero, size);
}

}  // namespace DC_ISA
}  // namespace dc
