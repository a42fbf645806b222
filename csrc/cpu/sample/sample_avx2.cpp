// op sample, AVX2: the 16 lanes of sample_row.h are two registers. Everything else is described there.
#include <immintrin.h>

#include "cpu/sample/sample_row.h"

namespace dc {
namespace {

struct CompressTable {                          // for each mask of 8 lanes: its lanes, lowest first
    alignas(32) uint32_t lanes[256][8];
    constexpr CompressTable() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (uint32_t lane = 0, to = 0; lane < 8; lane++)
                if (mask >> lane & 1) lanes[mask][to++] = lane;
    }
};
constexpr CompressTable COMPRESS;

struct Lanes {
    struct F {
        __m256 low, high;
    };
    struct U {
        __m256i low, high;                      // 16 u32
    };
    struct W {
        __m256i v[4];                           // 16 u64
    };

    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
    static F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static F max(F x, F so_far) { return {_mm256_max_ps(x.low, so_far.low), _mm256_max_ps(x.high, so_far.high)}; }
    static float largest(F x) {
        float v[16], result;
        store(v, x);
        result = v[0];
        for (int i = 1; i < 16; i++) result = v[i] > result ? v[i] : result;
        return result;
    }
    template <int COMPARISON>
    static uint32_t compare(F a, F b) {
        return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, COMPARISON))) |
               uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, COMPARISON))) << 8;
    }
    static uint32_t at_least(F a, F b) { return compare<_CMP_GE_OQ>(a, b); }
    static uint32_t above(F a, F b) { return compare<_CMP_GT_OQ>(a, b); }

    static U none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static U count(U found, F x, F t) {         // a true comparison is -1
        return {_mm256_sub_epi32(found.low, _mm256_castps_si256(_mm256_cmp_ps(x.low, t.low, _CMP_GE_OQ))),
                _mm256_sub_epi32(found.high, _mm256_castps_si256(_mm256_cmp_ps(x.high, t.high, _CMP_GE_OQ)))};
    }
    static int64_t sum(U found) {
        uint32_t v[16];
        store_ids(v, found);
        int64_t result = 0;
        for (uint32_t x : v) result += x;
        return result;
    }

    static __m256i compressed(__m256i x, uint32_t chosen) {                     // 8 lanes
        return _mm256_permutevar8x32_epi32(x, _mm256_load_si256(reinterpret_cast<const __m256i*>(COMPRESS.lanes[chosen])));
    }
    static U load_ids(const uint32_t* p) { return {load8(p), load8(p + 8)}; }
    static __m256i load8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store8(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
    static void store_ids(uint32_t* p, U x) { store8(p, x.low), store8(p + 8, x.high); }
    static void store_some_ids(uint32_t* p, uint32_t chosen, U x) {
        store8(p, compressed(x.low, chosen & 0xFF));
        store8(p + __builtin_popcount(chosen & 0xFF), compressed(x.high, chosen >> 8));
    }
    static void store_some(float* p, uint32_t chosen, F x) {
        store8(p, compressed(_mm256_castps_si256(x.low), chosen & 0xFF));
        store8(p + __builtin_popcount(chosen & 0xFF), compressed(_mm256_castps_si256(x.high), chosen >> 8));
    }
    static void store_lanes(uint32_t* p, uint32_t chosen, uint32_t first) {
        const __m256i low = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int(first)));
        store_some_ids(p, chosen, {low, _mm256_add_epi32(low, _mm256_set1_epi32(8))});
    }

    // --- weights (exp_weight) ---------------------------------------------------------------------------------------

    static W weigh(F z) {
        W w;
        weigh8(z.low, w.v);
        weigh8(z.high, w.v + 2);
        return w;
    }
    static void weigh8(__m256 z, __m256i* out) {
        const auto all8 = [](float x) { return _mm256_set1_ps(x); };
        const __m256 alive = _mm256_cmp_ps(z, all8(EXP_CUTOFF), _CMP_GE_OQ);
        z = _mm256_and_ps(z, alive);
        const __m256 n = _mm256_floor_ps(_mm256_add_ps(_mm256_mul_ps(z, all8(LOG2_E)), all8(0.5f)));
        const __m256 r = _mm256_sub_ps(_mm256_sub_ps(z, _mm256_mul_ps(n, all8(LN2_HIGH))), _mm256_mul_ps(n, all8(LN2_LOW)));
        constexpr float terms[8] = DC_EXP_TERMS;
        __m256 series = all8(terms[0]);
        for (int i = 1; i < 8; i++) series = _mm256_add_ps(_mm256_mul_ps(series, r), all8(terms[i]));
        __m256i mantissa = _mm256_cvttps_epi32(_mm256_mul_ps(series, all8(16777216.0f)));
        mantissa = _mm256_and_si256(mantissa, _mm256_castps_si256(alive));
        const __m256i shift = _mm256_cvttps_epi32(_mm256_sub_ps(_mm256_setzero_ps(), n));
        out[0] = shifted(_mm256_castsi256_si128(mantissa), _mm256_castsi256_si128(shift));
        out[1] = shifted(_mm256_extracti128_si256(mantissa, 1), _mm256_extracti128_si256(shift, 1));
    }
    static __m256i shifted(__m128i mantissa, __m128i shift) {
        return _mm256_srlv_epi64(_mm256_slli_epi64(_mm256_cvtepu32_epi64(mantissa), 16), _mm256_cvtepu32_epi64(shift));
    }
    static W no_weight() {
        const __m256i zero = _mm256_setzero_si256();
        return {{zero, zero, zero, zero}};
    }
    static W plus(W a, W b) {
        for (int i = 0; i < 4; i++) a.v[i] = _mm256_add_epi64(a.v[i], b.v[i]);
        return a;
    }
    static uint64_t total(W w) {
        uint64_t v[16], result = 0;
        store_weights(v, w);
        for (uint64_t x : v) result += x;
        return result;
    }
    static void store_weights(uint64_t* p, W w) {
        for (int i = 0; i < 4; i++) store8(p + 4 * i, w.v[i]);
    }
    static W load_weights(const uint64_t* p, uint32_t chosen) {
        W w;
        const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
        for (int i = 0; i < 4; i++) {
            const __m256i mine = _mm256_and_si256(_mm256_set1_epi64x(int64_t(chosen >> 4 * i)), bit);
            w.v[i] = _mm256_and_si256(load8(p + 4 * i), _mm256_cmpeq_epi64(mine, bit));
        }
        return w;
    }
    static void store_some_weights(uint64_t* to, uint32_t chosen, const uint64_t* from) {      // `to` is not after `from`
        for (; chosen; chosen &= chosen - 1) *to++ = from[__builtin_ctz(chosen)];
    }

    // --- noise ------------------------------------------------------------------------------------------------------

    struct Words {
        __m256i w[4];                           // in the low halves of u64; what the high halves hold is ignored
    };

    static Words philox_of(__m256i groups, const SampleRow& row) {              // 4 groups, as u64
        const __m256i m0 = _mm256_set1_epi64x(PHILOX_MULTIPLIER_0), m1 = _mm256_set1_epi64x(PHILOX_MULTIPLIER_1);
        __m256i c0 = groups, c1 = _mm256_set1_epi64x(row.position), c2 = _mm256_srli_epi64(c1, 32), c3 = _mm256_set1_epi64x(row.choice);
        uint32_t k0 = uint32_t(row.seed), k1 = uint32_t(row.seed >> 32);
        for (int round = 0; round < 10; round++, k0 += PHILOX_KEY_STEP_0, k1 += PHILOX_KEY_STEP_1) {
            const __m256i product0 = _mm256_mul_epu32(c0, m0), product1 = _mm256_mul_epu32(c2, m1);
            c0 = exclusive_or(_mm256_srli_epi64(product1, 32), c1, _mm256_set1_epi64x(k0));
            c1 = product1;
            c2 = exclusive_or(_mm256_srli_epi64(product0, 32), c3, _mm256_set1_epi64x(k1));
            c3 = product0;
        }
        return {{c0, c1, c2, c3}};
    }
    static __m256i exclusive_or(__m256i a, __m256i b, __m256i c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

    static U noise(U ids, const SampleRow& row) { return {noise8(ids.low, row), noise8(ids.high, row)}; }
    static __m256i noise8(__m256i ids, const SampleRow& row) {                  // any 8 ids
        const __m256i groups = _mm256_srli_epi32(ids, 2), lanes = _mm256_and_si256(ids, _mm256_set1_epi32(3));
        const Words a = philox_of(_mm256_cvtepu32_epi64(_mm256_castsi256_si128(groups)), row);
        const Words b = philox_of(_mm256_cvtepu32_epi64(_mm256_extracti128_si256(groups, 1)), row);
        __m256i words = narrowed(a.w[0], b.w[0]);
        for (int lane = 1; lane < 4; lane++)
            words = _mm256_blendv_epi8(words, narrowed(a.w[lane], b.w[lane]), _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(lane)));
        return words;
    }
    static __m256i narrowed(__m256i low, __m256i high) {                        // the low halves of 2 x 4 u64
        const __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), _MM_SHUFFLE(2, 0, 2, 0));
        return _mm256_permute4x64_epi64(_mm256_castps_si256(even), _MM_SHUFFLE(3, 1, 2, 0));
    }

    static void noise_of_64(uint32_t first_group, const SampleRow& row, U words[4]) {   // ids 4 * first_group ...
        // u64 lanes 0 and 2 hold groups 0 and 1, lanes 1 and 3 groups 2 and 3; so the unpacked words lie in the order of ids
        const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
        for (int quarter = 0; quarter < 4; quarter++) {
            const Words w = philox_of(_mm256_add_epi64(order, _mm256_set1_epi64x(first_group + 4u * unsigned(quarter))), row);
            const __m256i w01 = paired(w.w[0], w.w[1]), w23 = paired(w.w[2], w.w[3]);
            words[quarter] = {_mm256_unpacklo_epi64(w01, w23), _mm256_unpackhi_epi64(w01, w23)};
        }
    }
    static __m256i paired(__m256i even, __m256i odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

    // (z + noise) * log2 e or up to 0.1 more: noise <= -ln u, and a float's bits bound its log2 from below.
    static F rough_score(F z, U words) {
        const auto log2_floor = [](__m256i x) {                                 // there is no unsigned conversion: half of it
            return _mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 1))));
        };
        const F bits = {log2_floor(words.low), log2_floor(words.high)};
        return add(mul(z, all(LOG2_E)), sub(all(127 + 31), mul(bits, all(0x1p-23f))));
    }
    static F rough_bound(F z) { return add(mul(z, all(LOG2_E)), all(33.001f)); }            // over every word
};

}  // namespace

namespace avx2 {
void sample_row(const SampleArgs& args, int64_t row) { sampling::sample_row_with<Lanes>(args, row); }
}  // namespace avx2
}  // namespace dc
