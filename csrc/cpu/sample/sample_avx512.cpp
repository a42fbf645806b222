// op sample, AVX-512 (F, BW, DQ, VL): the 16 lanes of sample_row.h are one register. Everything else is described there.
#include <immintrin.h>

#include "cpu/sample/sample_row.h"

namespace dc {
namespace {

struct Lanes {
    using F = __m512;
    using U = __m512i;                          // 16 u32
    struct W {
        __m512i low, high;                      // 16 u64
    };

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F all(float x) { return _mm512_set1_ps(x); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F max(F x, F so_far) { return _mm512_max_ps(x, so_far); }            // the second where x is NaN
    static float largest(F x) { return _mm512_reduce_max_ps(x); }
    static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static uint32_t above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

    static U none() { return _mm512_setzero_si512(); }
    static U count(U found, F x, F t) { return _mm512_mask_sub_epi32(found, at_least(x, t), found, _mm512_set1_epi32(-1)); }
    static int64_t sum(U found) { return _mm512_reduce_add_epi32(found); }

    static void store_some(float* p, uint32_t chosen, F x) { _mm512_storeu_ps(p, _mm512_maskz_compress_ps(chosen, x)); }
    static U load_ids(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static void store_ids(uint32_t* p, U x) { _mm512_storeu_si512(p, x); }
    static void store_some_ids(uint32_t* p, uint32_t chosen, U x) { _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(chosen, x)); }
    static void store_lanes(uint32_t* p, uint32_t chosen, uint32_t first) {
        const U lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        store_some_ids(p, chosen, _mm512_add_epi32(lanes, _mm512_set1_epi32(int(first))));
    }

    // --- weights (exp_weight) ---------------------------------------------------------------------------------------

    static W weigh(F z) {                       // what is computed for dead lanes is masked out at the end
        const __mmask16 alive = at_least(z, all(EXP_CUTOFF));
        const F n = _mm512_roundscale_ps(_mm512_add_ps(mul(z, all(LOG2_E)), all(0.5f)), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const F r = sub(sub(z, mul(n, all(LN2_HIGH))), mul(n, all(LN2_LOW)));
        constexpr float terms[8] = DC_EXP_TERMS;
        F series = all(terms[0]);
        for (int i = 1; i < 8; i++) series = _mm512_add_ps(mul(series, r), all(terms[i]));
        const F scaled = _mm512_scalef_ps(series, _mm512_add_ps(n, all(40)));           // exact; the shift is a truncation
        return {_mm512_maskz_cvttps_epu64(__mmask8(alive), _mm512_castps512_ps256(scaled)),
                _mm512_maskz_cvttps_epu64(__mmask8(alive >> 8), _mm512_extractf32x8_ps(scaled, 1))};
    }
    static W no_weight() { return {none(), none()}; }
    static W plus(W a, W b) { return {_mm512_add_epi64(a.low, b.low), _mm512_add_epi64(a.high, b.high)}; }
    static uint64_t total(W w) { return uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(w.low, w.high))); }
    static void store_weights(uint64_t* p, W w) {
        _mm512_storeu_si512(p, w.low);
        _mm512_storeu_si512(p + 8, w.high);
    }
    static W load_weights(const uint64_t* p, uint32_t chosen) {
        return {_mm512_maskz_loadu_epi64(__mmask8(chosen), p), _mm512_maskz_loadu_epi64(__mmask8(chosen >> 8), p + 8)};
    }
    static void store_some_weights(uint64_t* to, uint32_t chosen, const uint64_t* from) {
        const W w = load_weights(from, 0xFFFF);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(__mmask8(chosen), w.low));
        _mm512_storeu_si512(to + __builtin_popcount(chosen & 0xFF), _mm512_maskz_compress_epi64(__mmask8(chosen >> 8), w.high));
    }

    // --- noise ------------------------------------------------------------------------------------------------------

    struct Words {
        __m512i w0, w1, w2, w3;                 // in the low halves of u64; what the high halves hold is ignored
    };

    static Words philox_of(__m512i groups, const SampleRow& row) {              // 8 groups, as u64
        const __m512i m0 = _mm512_set1_epi64(PHILOX_MULTIPLIER_0), m1 = _mm512_set1_epi64(PHILOX_MULTIPLIER_1);
        __m512i c0 = groups, c1 = _mm512_set1_epi64(row.position), c2 = _mm512_srli_epi64(c1, 32), c3 = _mm512_set1_epi64(row.choice);
        uint32_t k0 = uint32_t(row.seed), k1 = uint32_t(row.seed >> 32);
        for (int round = 0; round < 10; round++, k0 += PHILOX_KEY_STEP_0, k1 += PHILOX_KEY_STEP_1) {
            const __m512i product0 = _mm512_mul_epu32(c0, m0), product1 = _mm512_mul_epu32(c2, m1);
            c0 = exclusive_or(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(k0));
            c1 = product1;
            c2 = exclusive_or(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(k1));
            c3 = product0;
        }
        return {c0, c1, c2, c3};
    }
    static __m512i exclusive_or(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

    static U noise(U ids, const SampleRow& row) {                               // any 16 ids
        const U groups = _mm512_srli_epi32(ids, 2), lanes = _mm512_and_si512(ids, _mm512_set1_epi32(3));
        const Words a = philox_of(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(groups)), row);
        const Words b = philox_of(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(groups, 1)), row);
        const auto is = [&](int lane) { return _mm512_cmpeq_epi32_mask(lanes, _mm512_set1_epi32(lane)); };
        U words = narrowed(a.w0, b.w0);
        words = _mm512_mask_mov_epi32(words, is(1), narrowed(a.w1, b.w1));
        words = _mm512_mask_mov_epi32(words, is(2), narrowed(a.w2, b.w2));
        return _mm512_mask_mov_epi32(words, is(3), narrowed(a.w3, b.w3));
    }
    static U narrowed(__m512i low, __m512i high) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
    }

    static void noise_of_64(uint32_t first_group, const SampleRow& row, U words[4]) {   // ids 4 * first_group ...
        // u64 lane 2q of the first half holds group q, lane 2q + 1 group 4 + q; so the unpacked words lie in the order of ids
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for (int half = 0; half < 2; half++) {
            const Words w = philox_of(_mm512_add_epi64(order, _mm512_set1_epi64(first_group + 8u * unsigned(half))), row);
            const __m512i w01 = _mm512_mask_shuffle_epi32(w.w0, 0xAAAA, w.w1, _MM_PERM_CCAA);
            const __m512i w23 = _mm512_mask_shuffle_epi32(w.w2, 0xAAAA, w.w3, _MM_PERM_CCAA);
            words[2 * half] = _mm512_unpacklo_epi64(w01, w23);
            words[2 * half + 1] = _mm512_unpackhi_epi64(w01, w23);
        }
    }

    // (z + noise) * log2 e or up to 0.1 more: noise <= -ln u, and a float's bits bound its log2 from below.
    static F rough_score(F z, U words) {
        const F bits = _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_cvtepu32_ps(words)));
        return _mm512_fmadd_ps(z, all(LOG2_E), _mm512_fnmadd_ps(bits, all(0x1p-23f), all(127 + 32)));
    }
    static F rough_bound(F z) { return _mm512_fmadd_ps(z, all(LOG2_E), all(33.001f)); }      // over every word
};

}  // namespace

namespace avx512 {
void sample_row(const SampleArgs& args, int64_t row) { sampling::sample_row_with<Lanes>(args, row); }
}  // namespace avx512
}  // namespace dc
