// op sample, NEON: the 16 lanes of sample_row.h are four registers. Everything else is described there.
#include <arm_neon.h>

#include "cpu/sample/sample_row.h"

namespace dc {
namespace {

struct CompressTable {                          // for each mask of 4 lanes: the bytes of its lanes, lowest first
    alignas(16) uint8_t bytes[16][16];
    constexpr CompressTable() : bytes() {
        for (int mask = 0; mask < 16; mask++)
            for (int lane = 0, to = 0; lane < 4; lane++)
                if (mask >> lane & 1)
                    for (int byte = 0; byte < 4; byte++) bytes[mask][to++] = uint8_t(4 * lane + byte);
    }
};
constexpr CompressTable COMPRESS;

struct Lanes {
    struct F {
        float32x4_t v[4];
    };
    struct U {
        uint32x4_t v[4];
    };
    struct W {
        uint64x2_t v[8];
    };

    template <class Result, class Register>
    static Result each(const Register& value) {
        Result result;
        for (int i = 0; i < 4; i++) result.v[i] = value(i);
        return result;
    }

    static F load(const float* p) { return each<F>([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static void store(float* p, F x) {
        for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
    }
    static F all(float x) { return each<F>([&](int) { return vdupq_n_f32(x); }); }
    static F sub(F a, F b) { return each<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
    static F mul(F a, F b) { return each<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
    static F add(F a, F b) { return each<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
    static F max(F x, F so_far) {               // so_far where x is not a number
        return each<F>([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], so_far.v[i]), x.v[i], so_far.v[i]); });
    }
    static float largest(F x) {
        float v[16], result;
        store(v, x);
        result = v[0];
        for (int i = 1; i < 16; i++) result = v[i] > result ? v[i] : result;
        return result;
    }
    static uint32_t mask(U holds) {             // all or none of the bits of each lane
        const uint16x8_t low = vcombine_u16(vmovn_u32(holds.v[0]), vmovn_u32(holds.v[1]));
        const uint16x8_t high = vcombine_u16(vmovn_u32(holds.v[2]), vmovn_u32(holds.v[3]));
        const uint16_t bits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
        const uint16x8_t lanes = vld1q_u16(bits);
        return vaddvq_u16(vandq_u16(low, lanes)) | uint32_t(vaddvq_u16(vandq_u16(high, lanes))) << 8;
    }
    static uint32_t at_least(F a, F b) { return mask(each<U>([&](int i) { return vcgeq_f32(a.v[i], b.v[i]); })); }
    static uint32_t above(F a, F b) { return mask(each<U>([&](int i) { return vcgtq_f32(a.v[i], b.v[i]); })); }

    static U none() { return each<U>([](int) { return vdupq_n_u32(0); }); }
    static U count(U found, F x, F t) {         // a true comparison is -1
        return each<U>([&](int i) { return vsubq_u32(found.v[i], vcgeq_f32(x.v[i], t.v[i])); });
    }
    static int64_t sum(U found) {
        int64_t result = 0;
        for (int i = 0; i < 4; i++) result += int64_t(vaddlvq_u32(found.v[i]));
        return result;
    }

    static U load_ids(const uint32_t* p) { return each<U>([&](int i) { return vld1q_u32(p + 4 * i); }); }
    static void store_ids(uint32_t* p, U x) {
        for (int i = 0; i < 4; i++) vst1q_u32(p + 4 * i, x.v[i]);
    }
    static uint8x16_t compressed(uint8x16_t x, uint32_t chosen) {               // 4 lanes
        return vqtbl1q_u8(x, vld1q_u8(COMPRESS.bytes[chosen]));
    }
    static void store_some_ids(uint32_t* p, uint32_t chosen, U x) {
        for (int i = 0; i < 4; p += __builtin_popcount(chosen >> 4 * i & 15), i++)
            vst1q_u32(p, vreinterpretq_u32_u8(compressed(vreinterpretq_u8_u32(x.v[i]), chosen >> 4 * i & 15)));
    }
    static void store_some(float* p, uint32_t chosen, F x) {
        for (int i = 0; i < 4; p += __builtin_popcount(chosen >> 4 * i & 15), i++)
            vst1q_f32(p, vreinterpretq_f32_u8(compressed(vreinterpretq_u8_f32(x.v[i]), chosen >> 4 * i & 15)));
    }
    static void store_lanes(uint32_t* p, uint32_t chosen, uint32_t first) {
        const uint32_t lanes[4] = {0, 1, 2, 3};
        store_some_ids(p, chosen, each<U>([&](int i) { return vaddq_u32(vld1q_u32(lanes), vdupq_n_u32(first + 4 * uint32_t(i))); }));
    }

    // --- weights (exp_weight) ---------------------------------------------------------------------------------------

    static W weigh(F z) {
        W w;
        for (int i = 0; i < 4; i++) weigh4(z.v[i], w.v + 2 * i);
        return w;
    }
    static void weigh4(float32x4_t z, uint64x2_t* out) {
        const auto all4 = [](float x) { return vdupq_n_f32(x); };
        const uint32x4_t alive = vcgeq_f32(z, all4(EXP_CUTOFF));
        z = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(z), alive));
        const float32x4_t n = vrndmq_f32(vaddq_f32(vmulq_f32(z, all4(LOG2_E)), all4(0.5f)));
        const float32x4_t r = vsubq_f32(vsubq_f32(z, vmulq_f32(n, all4(LN2_HIGH))), vmulq_f32(n, all4(LN2_LOW)));
        constexpr float terms[8] = DC_EXP_TERMS;
        float32x4_t series = all4(terms[0]);
        for (int i = 1; i < 8; i++) series = vaddq_f32(vmulq_f32(series, r), all4(terms[i]));
        const uint32x4_t mantissa = vandq_u32(vcvtq_u32_f32(vmulq_f32(series, all4(16777216.0f))), alive);
        const int32x4_t shift = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(16));       // of the mantissa; below 0 to the right
        out[0] = vshlq_u64(vmovl_u32(vget_low_u32(mantissa)), vmovl_s32(vget_low_s32(shift)));
        out[1] = vshlq_u64(vmovl_high_u32(mantissa), vmovl_high_s32(shift));
    }
    static W no_weight() {
        W w;
        for (uint64x2_t& v : w.v) v = vdupq_n_u64(0);
        return w;
    }
    static W plus(W a, W b) {
        for (int i = 0; i < 8; i++) a.v[i] = vaddq_u64(a.v[i], b.v[i]);
        return a;
    }
    static uint64_t total(W w) {
        uint64x2_t all = w.v[0];
        for (int i = 1; i < 8; i++) all = vaddq_u64(all, w.v[i]);
        return vaddvq_u64(all);
    }
    static void store_weights(uint64_t* p, W w) {
        for (int i = 0; i < 8; i++) vst1q_u64(p + 2 * i, w.v[i]);
    }
    static W load_weights(const uint64_t* p, uint32_t chosen) {
        W w;
        const uint64_t lanes[2] = {1, 2};
        for (int i = 0; i < 8; i++) w.v[i] = vandq_u64(vld1q_u64(p + 2 * i), vtstq_u64(vdupq_n_u64(chosen >> 2 * i), vld1q_u64(lanes)));
        return w;
    }
    static void store_some_weights(uint64_t* to, uint32_t chosen, const uint64_t* from) {      // `to` is not after `from`
        for (; chosen; chosen &= chosen - 1) *to++ = from[__builtin_ctz(chosen)];
    }

    // --- noise ------------------------------------------------------------------------------------------------------

    struct Words {
        uint32x4_t w[4];                        // of 4 groups
    };

    static Words philox_of(uint32x4_t groups, const SampleRow& row) {
        const uint64_t position = uint64_t(row.position);
        uint32x4_t c0 = groups, c1 = vdupq_n_u32(uint32_t(position)), c2 = vdupq_n_u32(uint32_t(position >> 32)), c3 = vdupq_n_u32(row.choice);
        uint32_t k0 = uint32_t(row.seed), k1 = uint32_t(row.seed >> 32);
        for (int round = 0; round < 10; round++, k0 += PHILOX_KEY_STEP_0, k1 += PHILOX_KEY_STEP_1) {
            const Product product0 = product_of(c0, PHILOX_MULTIPLIER_0), product1 = product_of(c2, PHILOX_MULTIPLIER_1);
            c0 = veorq_u32(veorq_u32(product1.high, c1), vdupq_n_u32(k0));
            c1 = product1.low;
            c2 = veorq_u32(veorq_u32(product0.high, c3), vdupq_n_u32(k1));
            c3 = product0.low;
        }
        return {{c0, c1, c2, c3}};
    }
    struct Product {
        uint32x4_t low, high;                   // halves of 4 u64
    };
    static Product product_of(uint32x4_t a, uint32_t b) {
        const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), b));
        const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_n_u32(a, b));
        return {vuzp1q_u32(first, second), vuzp2q_u32(first, second)};
    }

    static U noise(U ids, const SampleRow& row) {                               // any 16 ids
        return each<U>([&](int i) {
            const Words words = philox_of(vshrq_n_u32(ids.v[i], 2), row);
            const uint32x4_t lanes = vandq_u32(ids.v[i], vdupq_n_u32(3));
            uint32x4_t chosen = words.w[0];
            for (uint32_t lane = 1; lane < 4; lane++) chosen = vbslq_u32(vceqq_u32(lanes, vdupq_n_u32(lane)), words.w[lane], chosen);
            return chosen;
        });
    }

    static void noise_of_64(uint32_t first_group, const SampleRow& row, U words[4]) {   // ids 4 * first_group ...
        const uint32_t lanes[4] = {0, 1, 2, 3};
        for (int quarter = 0; quarter < 4; quarter++) {
            const Words w = philox_of(vaddq_u32(vld1q_u32(lanes), vdupq_n_u32(first_group + 4u * unsigned(quarter))), row);
            const uint64x2_t low01 = vreinterpretq_u64_u32(vzip1q_u32(w.w[0], w.w[1])), low23 = vreinterpretq_u64_u32(vzip1q_u32(w.w[2], w.w[3]));
            const uint64x2_t high01 = vreinterpretq_u64_u32(vzip2q_u32(w.w[0], w.w[1])), high23 = vreinterpretq_u64_u32(vzip2q_u32(w.w[2], w.w[3]));
            words[quarter] = {{vreinterpretq_u32_u64(vzip1q_u64(low01, low23)), vreinterpretq_u32_u64(vzip2q_u64(low01, low23)),
                               vreinterpretq_u32_u64(vzip1q_u64(high01, high23)), vreinterpretq_u32_u64(vzip2q_u64(high01, high23))}};
        }
    }

    // (z + noise) * log2 e or up to 0.1 more: noise <= -ln u, and a float's bits bound its log2 from below.
    static F rough_score(F z, U words) {
        const F bits = each<F>([&](int i) {     // of half of each word, which is never more than the word
            const float32x4_t half = vcvtq_f32_u32(vshrq_n_u32(words.v[i], 1));
            return vcvtq_f32_u32(vreinterpretq_u32_f32(half));
        });
        return add(mul(z, all(LOG2_E)), sub(all(127 + 31), mul(bits, all(0x1p-23f))));
    }
    static F rough_bound(F z) { return add(mul(z, all(LOG2_E)), all(33.001f)); }            // over every word
};

}  // namespace

namespace neon {
void sample_row(const SampleArgs& args, int64_t row) { sampling::sample_row_with<Lanes>(args, row); }
}  // namespace neon
}  // namespace dc
