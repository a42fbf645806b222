// The arithmetic that every backend repeats bit for bit; `sample_reference` in chatlm/worker/ops/sampling.py is its definition.
// Plain functions for C++ and CUDA. Products and sums are rounded one by one (no fma): on the device by __fmul_rn and its
// kin, on the host by -ffp-contract=off. Internal linkage throughout, because files with different instruction sets include it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DC_HD __host__ __device__ static inline
#else
#define DC_HD static inline __attribute__((unused))
#endif

namespace dc {

// --- one row's parameters, as csrc/decode_core/__init__.py prepares them: kernels never divide and take no logarithm of them -----

struct SampleRow {                  // an array of these, one a row, lies in host or device memory
    uint64_t seed;
    int64_t position;               // absolute index of the token being drawn; < 0: inactive row, its token becomes -1
    uint64_t top_p;                 // round(p * 2^32); >= 2^32: off
    float inverse_temperature;      // < 0: greedy
    float min_z;                    // ids with z below do not survive: max(ln min_p, EXP_CUTOFF)
    int32_t top_k;                  // < 1 or >= V: off
    uint32_t choice;
    float repetition, inverse_repetition, frequency, presence;
    int32_t count_begin, count_end; // this row's part of (count_ids, counts): unique ids, and how often the answer holds each
    int32_t bias_begin, bias_end;   // this row's part of (bias_ids, bias_values), by id; equal ids are added one after the other
};
static_assert(sizeof(SampleRow) == 72, "must match ROW in decode_core/__init__.py");

// --- separately rounded arithmetic ---------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
DC_HD float mul(float a, float b) { return __fmul_rn(a, b); }
DC_HD float add(float a, float b) { return __fadd_rn(a, b); }
DC_HD float sub(float a, float b) { return __fsub_rn(a, b); }
DC_HD double mul(double a, double b) { return __dmul_rn(a, b); }
DC_HD double add(double a, double b) { return __dadd_rn(a, b); }
DC_HD double sub(double a, double b) { return __dsub_rn(a, b); }
#else
DC_HD float mul(float a, float b) { return a * b; }
DC_HD float add(float a, float b) { return a + b; }
DC_HD float sub(float a, float b) { return a - b; }
DC_HD double mul(double a, double b) { return a * b; }
DC_HD double add(double a, double b) { return a + b; }
DC_HD double sub(double a, double b) { return a - b; }
#endif

template <class To, class From>
DC_HD To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

DC_HD float float_of_bf16(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

constexpr float FLOAT_MAX = 3.4028234663852886e38f;
#define DC_INFINITY (__builtin_huge_valf())

// --- logits: cleaning, order, penalties ----------------------------------------------------------------------------------

DC_HD float clean(float logit) {        // NaN -> -inf, +inf -> the largest float
    return logit != logit ? -DC_INFINITY : logit > FLOAT_MAX ? FLOAT_MAX : logit;
}

// A clean logit as an unsigned number of the same order; -0 counts as +0. Equal keys are ties, and the lower id wins.
DC_HD uint32_t key_of(float logit) {
    const uint32_t bits = bits_as<uint32_t>(logit == 0 ? 0.0f : logit);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DC_HD float float_of_key(uint32_t key) { return bits_as<float>(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

// Repetition, frequency and presence for an id of the context that the answer holds `count` times; cleaned after the bias.
DC_HD float penalize(float logit, const SampleRow& row, int32_t count) {
    logit = mul(logit, logit > 0 ? row.inverse_repetition : row.repetition);
    return count ? sub(sub(logit, mul(row.frequency, float(count))), row.presence) : logit;
}

DC_HD float z_of(float logit, float top, float inverse_temperature) { return mul(sub(logit, top), inverse_temperature); }

// --- weights: e^z as integers, 2^40 at the maximum -----------------------------------------------------------------------

constexpr float EXP_CUTOFF = float(-27.7);      // below, the weight is 0 and the id never survives
constexpr float LOG2_E = float(1.44269504088896341);
constexpr float LN2_HIGH = 0.693359375f;
constexpr float LN2_LOW = float(-2.12194440e-4);
#define DC_EXP_TERMS {float(1.0 / 5040), float(1.0 / 720), float(1.0 / 120), float(1.0 / 24), float(1.0 / 6), 0.5f, 1.0f, 1.0f}

DC_HD uint64_t exp_weight(float z) {            // z <= 0, or NaN
    if (!(z >= EXP_CUTOFF)) return 0;
    constexpr float terms[8] = DC_EXP_TERMS;
    const float scaled = add(mul(z, LOG2_E), 0.5f);
    int n = int(scaled);
    n -= float(n) > scaled;                     // floor: z = n ln 2 + r, n in -40..0
    const float r = sub(sub(z, mul(float(n), LN2_HIGH)), mul(float(n), LN2_LOW));
    float series = terms[0];
    for (int i = 1; i < 8; i++) series = add(mul(series, r), terms[i]);
    return uint64_t(mul(series, 16777216.0f)) << 16 >> -n;
}

// The weight that the kept prefix must reach: floor(total * P32 / 2^32), at least 1; total < 2^58, P32 < 2^32.
DC_HD uint64_t top_p_target(uint64_t total, uint64_t p32) {
    const uint64_t target = (total >> 32) * p32 + ((total & 0xFFFFFFFFu) * p32 >> 32);
    return target ? target : 1;
}

// --- noise ---------------------------------------------------------------------------------------------------------------

constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53, PHILOX_MULTIPLIER_1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_KEY_STEP_0 = 0x9E3779B9, PHILOX_KEY_STEP_1 = 0xBB67AE85;

struct PhiloxWords {
    uint32_t word[4];
};

DC_HD PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {    // 4x32, 10 rounds
    for (int round = 0; round < 10; round++, k0 += PHILOX_KEY_STEP_0, k1 += PHILOX_KEY_STEP_1) {
        const uint64_t product0 = uint64_t(c0) * PHILOX_MULTIPLIER_0, product1 = uint64_t(c2) * PHILOX_MULTIPLIER_1;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(product1);
        c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(product0);
    }
    return {{c0, c1, c2, c3}};
}

// The noise of ids 4 * group .. 4 * group + 3 is words 0 .. 3.
DC_HD PhiloxWords noise_words(uint32_t group, uint64_t seed, int64_t position, uint32_t choice) {
    return philox(group, uint32_t(position), uint32_t(uint64_t(position) >> 32), choice, uint32_t(seed), uint32_t(seed >> 32));
}

// Natural logarithm of a positive normal double, relative error below 1e-15.
DC_HD double log_contract(double x) {
    constexpr double terms[18] = {
        0.03081756372437806, -0.06618773009678613, 0.07000691047584312, -0.0630658816887405, 0.06495252735766224,
        -0.07112464720648483, 0.0770509701696896, -0.08336500776029371, 0.09090397053862845, -0.09999843911504927,
        0.111111220155228, -0.12500003956286007, 0.14285714172623884, -0.16666666618490816, 0.20000000000466495,
        -0.2500000000022147, 0.3333333333333285, -0.49999999999999833};
    const uint64_t bits = bits_as<uint64_t>(x);
    int exponent = int(bits >> 52) - 1022;
    double mantissa = bits_as<double>((bits & 0x000FFFFFFFFFFFFFull) | 0x3FE0000000000000ull);     // [1/2, 1)
    if (mantissa < 0.7071067811865476) {
        mantissa = add(mantissa, mantissa);
        exponent--;
    }
    const double t = sub(mantissa, 1.0);
    double series = terms[0];
    for (int i = 1; i < 18; i++) series = add(mul(series, t), terms[i]);
    return add(mul(double(exponent), 0.6931471805599453), add(t, mul(mul(t, t), series)));
}

// -log(-log(1 - u)) of u = (word + 1/2) / 2^32: at most 22.88, at least -3.14.
DC_HD double gumbel(uint32_t word) {
    const double u = mul(add(double(word), 0.5), 1.0 / 4294967296.0);
    return -log_contract(-log_contract(sub(1.0, u)));
}

// An id's score, whose largest (then lowest id) is the token.
DC_HD double score_of(float z, uint32_t word) { return add(double(z), gumbel(word)); }

// --- pages of the KV cache -----------------------------------------------------------------------------------------------

constexpr int PAGE_SIZE = 16;           // slots

DC_HD int64_t page_of(int64_t slot) { return slot / PAGE_SIZE; }
DC_HD int64_t place_of(int64_t slot) { return slot % PAGE_SIZE; }

}  // namespace dc
