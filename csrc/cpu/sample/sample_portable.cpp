// op sample, any CPU: the 16 lanes of sample_row.h are arrays and loops, which the compiler may turn into what vectors it has.
#include "cpu/sample/sample_row.h"

namespace dc {
namespace {

struct Lanes {
    static constexpr int N = sampling::LANES;
    struct F {
        float v[N];
    };
    struct U {
        uint32_t v[N];
    };
    struct W {
        uint64_t v[N];
    };

    template <class Result, class Lane>
    static Result each(const Lane& lane) {
        Result result;
        for (int i = 0; i < N; i++) result.v[i] = lane(i);
        return result;
    }
    template <class Holds>
    static uint32_t mask(const Holds& holds) {
        uint32_t bits = 0;
        for (int i = 0; i < N; i++) bits |= uint32_t(holds(i)) << i;
        return bits;
    }
    template <class Number, class Value>
    static void store_chosen(Number* p, uint32_t chosen, const Value& value) {
        for (; chosen; chosen &= chosen - 1) *p++ = value(__builtin_ctz(chosen));
    }

    static F load(const float* p) { F x; memcpy(x.v, p, sizeof x.v); return x; }
    static void store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
    static F all(float x) { return each<F>([&](int) { return x; }); }
    static F sub(F a, F b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
    static F mul(F a, F b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
    static F max(F x, F so_far) { return each<F>([&](int i) { return x.v[i] > so_far.v[i] ? x.v[i] : so_far.v[i]; }); }
    static float largest(F x) {
        float result = x.v[0];
        for (int i = 1; i < N; i++) result = x.v[i] > result ? x.v[i] : result;
        return result;
    }
    static uint32_t at_least(F a, F b) { return mask([&](int i) { return a.v[i] >= b.v[i]; }); }
    static uint32_t above(F a, F b) { return mask([&](int i) { return a.v[i] > b.v[i]; }); }

    static U none() { return each<U>([](int) { return 0u; }); }
    static U count(U found, F x, F t) { return each<U>([&](int i) { return found.v[i] + uint32_t(x.v[i] >= t.v[i]); }); }
    static int64_t sum(U found) {
        int64_t result = 0;
        for (int i = 0; i < N; i++) result += found.v[i];
        return result;
    }

    static void store_some(float* p, uint32_t chosen, F x) { store_chosen(p, chosen, [&](int i) { return x.v[i]; }); }
    static U load_ids(const uint32_t* p) { U x; memcpy(x.v, p, sizeof x.v); return x; }
    static void store_ids(uint32_t* p, U x) { memcpy(p, x.v, sizeof x.v); }
    static void store_some_ids(uint32_t* p, uint32_t chosen, U x) { store_chosen(p, chosen, [&](int i) { return x.v[i]; }); }
    static void store_lanes(uint32_t* p, uint32_t chosen, uint32_t first) {
        store_chosen(p, chosen, [&](int i) { return first + uint32_t(i); });
    }

    static W weigh(F z) { return each<W>([&](int i) { return exp_weight(z.v[i]); }); }
    static W no_weight() { return each<W>([](int) { return uint64_t(0); }); }
    static W plus(W a, W b) { return each<W>([&](int i) { return a.v[i] + b.v[i]; }); }
    static uint64_t total(W w) {
        uint64_t result = 0;
        for (int i = 0; i < N; i++) result += w.v[i];
        return result;
    }
    static void store_weights(uint64_t* p, W w) { memcpy(p, w.v, sizeof w.v); }
    static W load_weights(const uint64_t* p, uint32_t chosen) {
        return each<W>([&](int i) { return chosen >> i & 1 ? p[i] : 0; });
    }
    static void store_some_weights(uint64_t* to, uint32_t chosen, const uint64_t* from) {      // `to` is not after `from`
        store_chosen(to, chosen, [&](int i) { return from[i]; });
    }

    static U noise(U ids, const SampleRow& row) {
        return each<U>([&](int i) { return noise_words(ids.v[i] / 4, row.seed, row.position, row.choice).word[ids.v[i] % 4]; });
    }
    static void noise_of_64(uint32_t first_group, const SampleRow& row, U words[4]) {
        for (int group = 0; group < 16; group++) {
            const PhiloxWords four = noise_words(first_group + uint32_t(group), row.seed, row.position, row.choice);
            memcpy(words[group / 4].v + group % 4 * 4, four.word, sizeof four.word);
        }
    }

    // (z + noise) * log2 e or up to 0.1 more: noise <= -ln u, and a float's bits bound its log2 from below.
    static F rough_score(F z, U words) {
        return each<F>([&](int i) {
            const float half = float(int32_t(words.v[i] >> 1));
            return z.v[i] * LOG2_E + (127 + 31 - float(bits_as<int32_t>(half)) * 0x1p-23f);
        });
    }
    static F rough_bound(F z) { return each<F>([&](int i) { return z.v[i] * LOG2_E + 33.001f; }); }
};

}  // namespace

namespace portable {
void sample_row(const SampleArgs& args, int64_t row) { sampling::sample_row_with<Lanes>(args, row); }
}  // namespace portable

size_t sample_scratch_bytes(int64_t vocab) { return sampling::Row<Lanes>::scratch_bytes(vocab); }

void sample(const SampleArgs& args) {
    const auto row = DC_CHOSEN(sample_row);
    parallel_for(args.rows, [&](int64_t i) { row(args, i); });
}

}  // namespace dc
