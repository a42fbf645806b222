// op        sample, one row on one thread (ops.h has the contract); the steps, written once over vectors of 16 lanes.
//           sample_{avx512,avx2,portable}.cpp give the vectors (`S` below) and instantiate it.
// shapes    logits f32 [vocab] -> token i32
// mapping   Rows are items of the pool. A row is cut into groups of 256 ids = 16 vectors; lane j of a group's maxima is the
//           largest of its ids j, j + 16, ... (and of 4 groups' in the coarse maxima); a group whose
//           maxima rule it out is not read again.
// cost      Bytes: the row once (4 V; from L2 when the head has just written it) for greedy and top-k, twice otherwise. Then
//           instructions: an exponential an id for top-p, 1/4 Philox an id for unfiltered rows, logs for a handful of ids.
// numerics  contract.h, bit for bit: float32 z, integer weights, float64 noise; no fma. Bounds (what can be skipped) are
//           computed in any order and rounded towards keeping too much. Ties: lower id.
#pragma once

#include "contract.h"
#include "cpu/pool/pool.h"
#include "ops.h"

namespace dc {
namespace sampling {
namespace {                             // internal: each file compiles this for its own instructions

constexpr int LANES = 16, GROUP = 256, COARSE = 4;         // ids in a vector, in a group; groups of a coarse maximum
constexpr float NOT_A_NUMBER = __builtin_nanf("");

// What of the row can still win: the best score so far, and the same in the units and with the error of S::rough_score.
struct Best {
    double score = -DC_INFINITY;
    int64_t id = 0;
    float rough = -DC_INFINITY;

    void offer(float z, int64_t candidate, uint32_t word) {
        const double its = score_of(z, word);
        if (its < score || (its == score && candidate > id)) return;
        score = its;
        id = candidate;
        rough = float(its) * LOG2_E - 1e-3f;    // |score| < 64, so its rounding is below 1e-5
    }
};

template <class S>
class Row {
    using F = typename S::F;
    using U = typename S::U;
    using W = typename S::W;
    using Mask = uint32_t;                      // bit = lane

    const SampleArgs& args;
    const SampleRow& row;
    const int64_t vocab, groups;                // the last group may be `tail`, filled up with -inf
    const float* logits;
    float *copy, *maxima, *coarse, *tail, *kept;        // kept, ids, weights: the ids that may still survive, ascending
    uint32_t* ids;
    uint64_t* weights;
    int64_t count = 0;                          // of them
    float top = 0, lowest = 0;                  // of the row; a lower bound of those in `kept`

    F z_of(F l) const { return S::mul(S::sub(l, S::all(top)), S::all(row.inverse_temperature)); }
    const float* group(int64_t g) const { return (g + 1) * GROUP <= vocab ? logits + g * GROUP : tail; }

    // --- the row as it is sampled: clean, penalized -------------------------------------------------------------------

    void copy_clean() {
        for (int64_t i = 0; i < vocab; i++) copy[i] = clean(logits[i]);
        logits = copy;
    }

    void change_logits() {
        for (int32_t i = row.count_begin; i < row.count_end; i++) {
            float& logit = copy[args.count_ids[i]];
            logit = penalize(logit, row, args.counts[i]);
        }
        for (int32_t i = row.bias_begin; i < row.bias_end; i++) {
            float& logit = copy[args.bias_ids[i]];
            logit = add(logit, args.bias_values[i]);
        }
        for (int32_t i = row.count_begin; i < row.count_end; i++) copy[args.count_ids[i]] = clean(copy[args.count_ids[i]]);
        for (int32_t i = row.bias_begin; i < row.bias_end; i++) copy[args.bias_ids[i]] = clean(copy[args.bias_ids[i]]);
    }

    void find_top() {                           // NaN counts as -inf in every comparison from here on
        if (vocab % GROUP) {
            const int64_t whole = vocab / GROUP * GROUP;
            for (int64_t i = 0; i < GROUP; i++) tail[i] = whole + i < vocab ? logits[whole + i] : -DC_INFINITY;
        }
        F all = S::all(-DC_INFINITY), several = all;
        for (int64_t g = 0; g < groups; g++) {
            const float* from = group(g);
            F a = S::all(-DC_INFINITY), b = a, c = a, d = a;
            for (int i = 0; i < GROUP; i += 4 * LANES) {
                a = S::max(S::load(from + i), a);
                b = S::max(S::load(from + i + LANES), b);
                c = S::max(S::load(from + i + 2 * LANES), c);
                d = S::max(S::load(from + i + 3 * LANES), d);
            }
            a = S::max(S::max(a, b), S::max(c, d));
            S::store(maxima + g * LANES, a);
            several = S::max(a, several);
            if (g % COARSE != COARSE - 1 && g != groups - 1) continue;
            S::store(coarse + g / COARSE * LANES, several);
            all = S::max(several, all);
            several = S::all(-DC_INFINITY);
        }
        top = S::largest(all);
    }

    int64_t first_of_top() const {
        for (int64_t g = 0;; g++) {
            if (!S::at_least(S::load(maxima + g * LANES), S::all(top))) continue;
            for (int i = 0; i < GROUP; i += LANES)
                if (Mask hit = S::at_least(S::load(group(g) + i), S::all(top))) return g * GROUP + i + __builtin_ctz(hit);
        }
    }

    // --- thresholds: the largest t (or one soon below it) with at least k values >= t -----------------------------------

    static int64_t count_at_least(const float* values, int64_t n, float t) {        // n a multiple of LANES
        U found = S::none();
        for (int64_t i = 0; i < n; i += LANES) found = S::count(found, S::load(values + i), S::all(t));
        return S::sum(found);
    }

    int64_t count_in_row(float t) const {
        U found = S::none();
        for (int64_t g = 0; g < groups; g++)
            if (S::at_least(S::load(maxima + g * LANES), S::all(t)))
                for (int i = 0; i < GROUP; i += LANES) found = S::count(found, S::load(group(g) + i), S::all(t));
        return S::sum(found);
    }

    // A number between low and high, halving the distance of values or of keys by turns; false when there is none.
    static bool between(float low, float high, int turn, float& middle) {
        const uint32_t a = key_of(low), b = key_of(high);
        if (b - a < 2) return false;
        middle = low * 0.5f + high * 0.5f;
        if (turn % 2 || !(middle > low && middle < high)) middle = float_of_key(a + (b - a) / 2);
        return middle > low && middle < high;           // not between the greatest negative number and 0
    }

    // `counted(t)` = how many are >= t, known to be >= k at low. The result's count is >= k, and <= enough if it can be.
    template <class Counted>
    float threshold(float low, int64_t k, int64_t enough, const Counted& counted) const {
        if (counted(top) >= k) return top;
        float high = top, middle;
        for (int turn = 0; between(low, high, turn, middle); turn++) {
            const int64_t found = counted(middle);
            if (found < k) {
                high = middle;
                continue;
            }
            low = middle;
            if (found <= enough) break;
        }
        return low;
    }

    // A logit below which every z is below `min_z`: the hundredth is far more than float32 rounds away.
    float floor_of_survivors(double min_z) const {
        const double floor = row.inverse_temperature > 0 ? top + (min_z - 0.01) / double(row.inverse_temperature) : -DC_INFINITY;
        return floor > -FLOAT_MAX ? float_of_key(key_of(float(floor)) - 1) : -FLOAT_MAX;
    }

    // --- the list of ids that may survive ---------------------------------------------------------------------------------

    void list_from(float t) {                   // ids with logit >= t
        lowest = t;
        count = 0;
        for (int64_t g = 0; g < groups; g++) {
            if (!S::at_least(S::load(maxima + g * LANES), S::all(t))) continue;
            for (int i = 0; i < GROUP; i += LANES) {
                const F l = S::load(group(g) + i);
                if (Mask hit = S::at_least(l, S::all(t))) {
                    S::store_some(kept + count, hit, l);
                    S::store_lanes(ids + count, hit, uint32_t(g * GROUP + i));
                    count += __builtin_popcount(hit);
                }
            }
        }
        pad();
    }

    void pad() {                                // so that whole vectors of the list can be read
        for (int i = 0; i < LANES; i++) kept[count + i] = NOT_A_NUMBER;
    }

    int64_t padded() const { return (count + LANES - 1) / LANES * LANES; }

    // Keeps what is above `cut` and the `ties` lowest ids at it.
    void keep_from(float cut, int64_t ties) {
        int64_t n = 0;
        for (int64_t i = 0; i < count; i += LANES) {
            const F l = S::load(kept + i);
            const Mask above = S::above(l, S::all(cut));
            Mask tied = S::at_least(l, S::all(cut)) & ~above;
            while (__builtin_popcount(tied) > ties) tied &= ~(1u << (31 - __builtin_clz(tied)));
            ties -= __builtin_popcount(tied);
            n += move(n, i, above | tied, l);
        }
        count = n;
        pad();
    }

    int64_t move(int64_t to, int64_t from, Mask chosen, F l) {
        const U its = S::load_ids(ids + from);
        S::store_some(kept + to, chosen, l);
        S::store_some_ids(ids + to, chosen, its);
        return __builtin_popcount(chosen);
    }

    void keep_top_k(int64_t k) {
        if (count <= k) return;
        const float cut = threshold(lowest, k, k, [&](float t) { return count_at_least(kept, padded(), t); });
        const int64_t through = count_at_least(kept, padded(), cut);
        if (through == k) return keep_from(cut, k);
        keep_from(cut, k - count_at_least(kept, padded(), float_of_key(key_of(cut) + 1)));
    }

    // The shortest prefix by logit, then id, whose weight reaches the target: halve the undecided range of logits, of which
    // `undecided` and `weights` hold the rest, with `above` the weight of what is certainly kept.
    void keep_top_p(uint64_t target) {
        float* undecided = kept + capacity();
        for (int64_t i = 0; i < padded(); i += LANES) {
            const F l = S::load(kept + i);
            S::store(undecided + i, l);
            S::store_weights(weights + i, S::weigh(z_of(l)));
        }
        float low = lowest, high = float_of_key(key_of(top) + 1), middle;
        uint64_t above = 0;
        int64_t n = padded();
        for (int turn = 0; between(low, high, turn, middle); turn++) {
            W sum = S::no_weight();
            for (int64_t i = 0; i < n; i += LANES)
                sum = S::plus(sum, S::load_weights(weights + i, S::at_least(S::load(undecided + i), S::all(middle))));
            const uint64_t upper = S::total(sum);
            const bool cut_in_upper = above + upper >= target;
            if (cut_in_upper) low = middle;
            else high = middle, above += upper;
            n = keep_undecided(undecided, n, middle, cut_in_upper);
        }
        // what is undecided now are the ties at `low`
        const uint64_t weight = exp_weight(dc::z_of(low, top, row.inverse_temperature));
        keep_from(low, int64_t((target - above + weight - 1) / weight));
    }

    int64_t keep_undecided(float* undecided, int64_t n, float middle, bool upper) {
        int64_t left = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const F l = S::load(undecided + i);
            const Mask high = S::at_least(l, S::all(middle)), chosen = upper ? high : S::at_least(l, l) & ~high;
            S::store_some(undecided + left, chosen, l);
            S::store_some_weights(weights + left, chosen, weights + i);
            left += __builtin_popcount(chosen);
        }
        for (; left % LANES; left++) undecided[left] = NOT_A_NUMBER;
        return left;
    }

    int64_t capacity() const { return groups * GROUP + LANES; }

    uint64_t weight_of_list() const {
        W sum = S::no_weight();
        for (int64_t i = 0; i < padded(); i += LANES) sum = S::plus(sum, S::weigh(z_of(S::load(kept + i))));
        return S::total(sum);
    }

    uint64_t weight_of_row(float inverse_temperature) const {
        W sum = S::no_weight();
        for (int64_t g = 0; g < groups; g++) {
            const float* from = group(g);
            for (int i = 0; i < GROUP; i += LANES)
                sum = S::plus(sum, S::weigh(S::mul(S::sub(S::load(from + i), S::all(top)), S::all(inverse_temperature))));
        }
        return S::total(sum);
    }

    // --- the draw: the largest z + noise -------------------------------------------------------------------------------------

    void offer_all(Best& best, Mask open, F z, U words, int64_t first_id, const uint32_t* list) const {
        float rough[LANES], zs[LANES];
        uint32_t word[LANES];
        S::store(rough, S::rough_score(z, words));
        S::store(zs, z);
        S::store_ids(word, words);
        while (open) {                          // the most promising first: it closes most of the others
            int lane = __builtin_ctz(open);
            for (Mask rest = open; rest; rest &= rest - 1)
                if (rough[__builtin_ctz(rest)] > rough[lane]) lane = __builtin_ctz(rest);
            if (rough[lane] < best.rough) return;
            best.offer(zs[lane], list ? list[lane] : first_id + lane, word[lane]);
            open &= ~(1u << lane);
        }
    }

    int64_t draw_from_list() const {
        Best best;
        for (int64_t i = 0; i < count; i += LANES) {
            const F z = z_of(S::load(kept + i));
            const Mask alive = S::at_least(z, S::all(row.min_z));
            if (!alive) continue;
            const U words = S::noise(S::load_ids(ids + i), row);
            const Mask open = alive & S::at_least(S::rough_score(z, words), S::all(best.rough));
            if (open) offer_all(best, open, z, words, 0, ids + i);
        }
        return best.id;
    }

    int64_t draw_from_row() const {
        Best best;
        const int64_t greedy = first_of_top();
        best.offer(0, greedy, noise_words(uint32_t(greedy / 4), row.seed, row.position, row.choice).word[greedy % 4]);
        for (int64_t g = 0; g < groups; g++) {
            const F largest = z_of(S::load(maxima + g * LANES));
            if (!(S::at_least(largest, S::all(row.min_z)) & S::at_least(S::rough_bound(largest), S::all(best.rough))))
                continue;
            for (int i = 0; i < GROUP; i += 4 * LANES) {
                U words[4];
                S::noise_of_64(uint32_t(g * GROUP + i) / 4, row, words);
                F z[4];
                Mask open[4];
                for (int j = 0; j < 4; j++) {
                    z[j] = z_of(S::load(group(g) + i + j * LANES));
                    open[j] = S::at_least(S::rough_score(z[j], words[j]), S::all(best.rough));
                }
                if (!(open[0] | open[1] | open[2] | open[3])) continue;
                for (int j = 0; j < 4; j++)
                    if (Mask alive = open[j] & S::at_least(z[j], S::all(row.min_z)))
                        offer_all(best, alive, z[j], words[j], g * GROUP + i + j * LANES, nullptr);
            }
        }
        return best.id;
    }

    // --- top-k and top-p choose how the list comes about ------------------------------------------------------------------

    bool list_top_k(int64_t k) {                // false: no more than k can survive, so nothing is to be cut
        // what min-p will drop counts for top-p, so it only bounds the search where there is no top-p
        const float floor = floor_of_survivors(row.top_p < 1ull << 32 ? EXP_CUTOFF : row.min_z);
        const auto in_maxima = [&](float t) { return count_at_least(maxima, groups * LANES, t); };
        const auto in_coarse = [&](float t) { return count_at_least(coarse, (groups + COARSE - 1) / COARSE * LANES, t); };
        const auto in_row = [&](float t) { return count_in_row(t); };
        const int64_t enough = k + k / 4 + 8;
        if (in_coarse(floor) >= 4 * k) list_from(threshold(floor, k, enough, in_coarse));
        else if (in_maxima(floor) >= k) list_from(threshold(floor, k, enough, in_maxima));
        else if (in_row(floor) > k) list_from(threshold(floor, k, enough, in_row));
        else return false;
        keep_top_k(k);
        return true;
    }

    int64_t draw() {
        const bool top_p = row.top_p < 1ull << 32;
        const bool listed = row.top_k > 0 && row.top_k < vocab && list_top_k(row.top_k);
        if (listed && top_p) keep_top_p(top_p_target(weight_of_list(), row.top_p));
        if (!listed && top_p) {
            const uint64_t total = weight_of_row(row.inverse_temperature), target = top_p_target(total, row.top_p);
            // ids that weigh less than 1 / vocab of what may be dropped are dropped: together they weigh less than that
            const double light = double(total - target) / double(vocab);
            list_from(floor_of_survivors(light > 1 ? log_contract(light * 0x1p-40) : EXP_CUTOFF));
            keep_top_p(target);
        }
        return listed || top_p ? draw_from_list() : draw_from_row();
    }

public:
    // How scratch memory is cut up; every array may be read and written one vector beyond its end.
    static size_t scratch_bytes(int64_t vocab) {
        const size_t padded = size_t(vocab + GROUP - 1) / GROUP * GROUP;
        return 4 * (padded + 2 * (padded / LANES + LANES) + GROUP + 3 * (padded + LANES)) + 8 * (padded + LANES);
    }

    Row(const SampleArgs& a, int64_t index, float* memory)
        : args(a), row(a.params[index]), vocab(a.vocab), groups((vocab + GROUP - 1) / GROUP),
          logits(a.logits + index * a.stride) {
        const int64_t padded = groups * GROUP;
        copy = memory;
        maxima = copy + padded;
        coarse = maxima + groups * LANES;
        tail = coarse + (groups / COARSE + 1) * LANES;
        weights = reinterpret_cast<uint64_t*>(tail + GROUP);
        kept = reinterpret_cast<float*>(weights + padded + LANES);          // and as much again for keep_top_p
        ids = reinterpret_cast<uint32_t*>(kept + 2 * capacity());
    }

    int32_t token() {
        const bool changed = row.count_begin < row.count_end || row.bias_begin < row.bias_end;
        if (changed) copy_clean();
        if (changed) change_logits();
        find_top();
        if (top > FLOAT_MAX) {
            copy_clean();
            find_top();
        }
        if (top == -DC_INFINITY) return 0;
        return int32_t(row.inverse_temperature < 0 ? first_of_top() : draw());
    }
};

template <class S>
void sample_row_with(const SampleArgs& args, int64_t index) {
    const SampleRow& row = args.params[index];
    if (row.position < 0) {
        args.tokens[index] = -1;
        return;
    }
    Row<S> work(args, index, static_cast<float*>(scratch(Row<S>::scratch_bytes(args.vocab))));
    args.tokens[index] = work.token();
}

}  // namespace
}  // namespace sampling
}  // namespace dc
