// op        sample, one row on one thread (ops.h has the contract), over vectors of 16 lanes
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
#include "cpu/sample/scratch.h"
#include "cpu/sample/whole_lanes.h"
#include "ops.h"

namespace dc {
namespace DC_ISA {
namespace {

using sampling::LANES, sampling::GROUP, sampling::COARSE, sampling::Scratch;

constexpr float NOT_A_NUMBER = __builtin_nanf("");

// --- weights: exp_weight of contract.h ------------------------------------------------------------------------------------

#if defined(DC_LANES_ARE_ARRAYS)                // each lane's intermediate results stay in registers
DC_INLINE Longs weigh(Lanes z) {
    Longs weights;
    for (int i = 0; i < LANES; i++) weights.v[i] = exp_weight(z.v[i]);
    return weights;
}
#else
DC_INLINE Longs weigh(Lanes z) {                // what is computed where z is below the cutoff is not used
    const Chosen alive = at_least(z, all(EXP_CUTOFF));
    const Lanes n = round_down(z * all(LOG2_E) + all(0.5f));
    const Lanes r = (z - n * all(LN2_HIGH)) - n * all(LN2_LOW);
    constexpr float terms[8] = DC_EXP_TERMS;
    Lanes series = all(terms[0]);
    for (int i = 1; i < 8; i++) series = series * r + all(terms[i]);
    return scaled_down(series, n, alive);
}
#endif

// --- noise: noise_words of contract.h -------------------------------------------------------------------------------------

DC_INLINE Noise philox(Counters groups, const SampleRow& row) {
    const uint64_t position = uint64_t(row.position);
    Counters c0 = groups, c1 = all_counters(uint32_t(position)), c2 = all_counters(uint32_t(position >> 32)), c3 = all_counters(row.choice);
    uint32_t k0 = uint32_t(row.seed), k1 = uint32_t(row.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += PHILOX_KEY_STEP_0, k1 += PHILOX_KEY_STEP_1) {
        Counters low0, high0, low1, high1;
        multiply(c0, PHILOX_MULTIPLIER_0, low0, high0);
        multiply(c2, PHILOX_MULTIPLIER_1, low1, high1);
        c0 = exclusive_or(high1, c1, all_counters(k0));
        c1 = low1;
        c2 = exclusive_or(high0, c3, all_counters(k1));
        c3 = low0;
    }
    return {{c0, c1, c2, c3}};
}

DC_INLINE Words noise_of(Words ids, const SampleRow& row) {         // any 16 ids
    Counters groups[PARTS];
    split(group_of(ids), groups);
    Noise parts[PARTS];
    for (int i = 0; i < PARTS; i++) parts[i] = philox(groups[i], row);
    Words noise = join(parts, 0);
    for (int place = 1; place < 4; place++) noise = choose(in_place(ids, uint32_t(place)), join(parts, place), noise);
    return noise;
}

DC_INLINE void noise_of_64(uint32_t first_group, const SampleRow& row, Words (&noise)[4]) {         // ids 4 * first_group ...
    for (int done = 0; done < 16; done += GROUPS_AT_ONCE)
        by_ids(philox(groups_from(first_group + uint32_t(done)), row), noise + done / 4);
}

// --- bounds ---------------------------------------------------------------------------------------------------------------

// (z + noise) * log2 e or up to 0.1 more: noise <= -ln u.
DC_INLINE Lanes rough_score(Lanes z, Words noise) { return multiply_add(z, all(LOG2_E), minus_log2(noise)); }
DC_INLINE Lanes rough_bound(Lanes z) { return multiply_add(z, all(LOG2_E), all(33.001f)); }         // over every word of noise

// What of the row can still win: the best score so far, and the same in the units and with the error of rough_score.
struct Best {
    double score = -DC_INFINITY;
    int64_t id = 0;
    float rough = -DC_INFINITY;

    void offer(float z, int64_t candidate, uint32_t word) {
        const double offered = score_of(z, word);
        if (offered < score || (offered == score && candidate > id)) return;
        score = offered;
        id = candidate;
        rough = float(offered) * LOG2_E - 1e-3f;    // |score| < 64, so its rounding is below 1e-5
    }
};

// Which lanes are at least t.
DC_INLINE uint32_t lanes_from(float t, Lanes a) { return bitmask(at_least(a, all(t))); }

class Row {
    using Mask = uint32_t;                      // bit = lane

    const SampleArgs& args;
    const SampleRow& row;
    const int64_t vocab, groups;                // the last group may be `tail`, filled up with -inf
    const Scratch at;
    const float* logits;
    int64_t count = 0;                          // of the list
    float top = 0, lowest = 0;                  // of the row; a lower bound of the list

    Lanes z_of(Lanes l) const { return (l - all(top)) * all(row.inverse_temperature); }
    const float* group(int64_t g) const { return (g + 1) * GROUP <= vocab ? logits + g * GROUP : at.tail; }

    // --- the row as it is sampled: clean, penalized -------------------------------------------------------------------

    void copy_clean() {
        for (int64_t i = 0; i < vocab; i++) at.copy[i] = clean(logits[i]);
        logits = at.copy;
    }

    void change_logits() {
        for (int32_t i = row.count_begin; i < row.count_end; i++) {
            float& logit = at.copy[args.count_ids[i]];
            logit = penalize(logit, row, args.counts[i]);
        }
        for (int32_t i = row.bias_begin; i < row.bias_end; i++) {
            float& logit = at.copy[args.bias_ids[i]];
            logit = add(logit, args.bias_values[i]);
        }
        for (int32_t i = row.count_begin; i < row.count_end; i++) at.copy[args.count_ids[i]] = clean(at.copy[args.count_ids[i]]);
        for (int32_t i = row.bias_begin; i < row.bias_end; i++) at.copy[args.bias_ids[i]] = clean(at.copy[args.bias_ids[i]]);
    }

    void find_top() {                           // NaN counts as -inf in every comparison from here on
        if (vocab % GROUP) {
            const int64_t whole = vocab / GROUP * GROUP;
            for (int64_t i = 0; i < GROUP; i++) at.tail[i] = whole + i < vocab ? logits[whole + i] : -DC_INFINITY;
        }
        const Lanes lowest_possible = all(-DC_INFINITY);
        Lanes of_row = lowest_possible, several = lowest_possible;
        for (int64_t g = 0; g < groups; g++) {
            const float* from = group(g);
            Lanes a = lowest_possible, b = a;
            for (int i = 0; i < GROUP; i += 2 * LANES) {
                a = maximum(load(from + i), a);
                b = maximum(load(from + i + LANES), b);
            }
            a = maximum(a, b);
            store(at.maxima + g * LANES, a);
            several = maximum(a, several);
            if (g % COARSE != COARSE - 1 && g != groups - 1) continue;
            store(at.coarse + g / COARSE * LANES, several);
            of_row = maximum(several, of_row);
            several = lowest_possible;
        }
        top = maximum(of_row);
    }

    int64_t first_of_top() const {
        for (int64_t g = 0;; g++) {
            if (!lanes_from(top, load(at.maxima + g * LANES))) continue;
            for (int i = 0; i < GROUP; i += LANES)
                if (Mask hit = lanes_from(top, load(group(g) + i))) return g * GROUP + i + __builtin_ctz(hit);
        }
    }

    // --- thresholds: the largest t (or one soon below it) with at least k values >= t -----------------------------------

    static int64_t count_at_least(const float* values, int64_t n, float t) {        // n a multiple of LANES
        Words found = all_words(0);
        for (int64_t i = 0; i < n; i += LANES) found = add_one(found, at_least(load(values + i), all(t)));
        return sum(found);
    }

    int64_t count_in_row(float t) const {
        Words found = all_words(0);
        for (int64_t g = 0; g < groups; g++)
            if (lanes_from(t, load(at.maxima + g * LANES)))
                for (int i = 0; i < GROUP; i += LANES) found = add_one(found, at_least(load(group(g) + i), all(t)));
        return sum(found);
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
            if (!lanes_from(t, load(at.maxima + g * LANES))) continue;
            for (int i = 0; i < GROUP; i += LANES) {
                const Lanes l = load(group(g) + i);
                if (Mask hit = lanes_from(t, l)) {
                    store_some(at.list_logits + count, hit, l);
                    store_some(at.list_ids + count, hit, words_from(uint32_t(g * GROUP + i)));
                    count += __builtin_popcount(hit);
                }
            }
        }
        pad();
    }

    void pad() {                                // so that whole vectors of the list can be read
        for (int i = 0; i < LANES; i++) at.list_logits[count + i] = NOT_A_NUMBER;
    }

    int64_t padded() const { return (count + LANES - 1) / LANES * LANES; }

    // Keeps what is above `cut` and the `ties` lowest ids at it.
    void keep_from(float cut, int64_t ties) {
        int64_t n = 0;
        for (int64_t i = 0; i < count; i += LANES) {
            const Lanes l = load(at.list_logits + i);
            const Mask higher = bitmask(above(l, all(cut)));
            Mask tied = lanes_from(cut, l) & ~higher;
            while (__builtin_popcount(tied) > ties) tied &= ~(1u << (31 - __builtin_clz(tied)));
            ties -= __builtin_popcount(tied);
            n += move(n, i, higher | tied, l);
        }
        count = n;
        pad();
    }

    int64_t move(int64_t to, int64_t from, Mask chosen, Lanes l) {
        const Words ids = load(at.list_ids + from);
        store_some(at.list_logits + to, chosen, l);
        store_some(at.list_ids + to, chosen, ids);
        return __builtin_popcount(chosen);
    }

    void keep_top_k(int64_t k) {
        if (count <= k) return;
        const float cut = threshold(lowest, k, k, [&](float t) { return count_at_least(at.list_logits, padded(), t); });
        const int64_t through = count_at_least(at.list_logits, padded(), cut);
        if (through == k) return keep_from(cut, k);
        keep_from(cut, k - count_at_least(at.list_logits, padded(), float_of_key(key_of(cut) + 1)));
    }

    // The shortest prefix by logit, then id, whose weight reaches the target: halve the undecided range of logits, of which
    // `undecided` and `weights` hold the rest, with `above` the weight of what is certainly kept.
    void keep_top_p(uint64_t target) {
        for (int64_t i = 0; i < padded(); i += LANES) {
            const Lanes l = load(at.list_logits + i);
            store(at.undecided + i, l);
            store(at.weights + i, weigh(z_of(l)));
        }
        float low = lowest, high = float_of_key(key_of(top) + 1), middle;
        uint64_t above = 0;
        int64_t n = padded();
        for (int turn = 0; between(low, high, turn, middle); turn++) {
            Longs weights = no_longs();
            for (int64_t i = 0; i < n; i += LANES)
                weights = weights + load_some(at.weights + i, at_least(load(at.undecided + i), all(middle)));
            const uint64_t upper = sum(weights);
            const bool cut_in_upper = above + upper >= target;
            if (cut_in_upper) low = middle;
            else high = middle, above += upper;
            n = keep_undecided(n, middle, cut_in_upper);
        }
        // what is undecided now are the ties at `low`
        const uint64_t weight = exp_weight(dc::z_of(low, top, row.inverse_temperature));
        keep_from(low, int64_t((target - above + weight - 1) / weight));
    }

    int64_t keep_undecided(int64_t n, float middle, bool upper) {
        int64_t left = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const Lanes l = load(at.undecided + i);
            const Mask high = lanes_from(middle, l), chosen = upper ? high : bitmask(at_least(l, l)) & ~high;
            store_some(at.undecided + left, chosen, l);
            store_some(at.weights + left, chosen, at.weights + i);
            left += __builtin_popcount(chosen);
        }
        for (; left % LANES; left++) at.undecided[left] = NOT_A_NUMBER;
        return left;
    }

    uint64_t weight_of_list() const {
        Longs weights = no_longs();
        for (int64_t i = 0; i < padded(); i += LANES) weights = weights + weigh(z_of(load(at.list_logits + i)));
        return sum(weights);
    }

    uint64_t weight_of_row() const {
        Longs weights = no_longs();
        for (int64_t g = 0; g < groups; g++) {
            const float* from = group(g);
            for (int i = 0; i < GROUP; i += LANES)
                weights = weights + weigh(z_of(load(from + i)));
        }
        return sum(weights);
    }

    // --- the draw: the largest z + noise -------------------------------------------------------------------------------------

    void offer_all(Best& best, Mask open, Lanes z, Words noise, int64_t first_id, const uint32_t* list) const {
        float rough[LANES], zs[LANES];
        uint32_t word[LANES];
        store(rough, rough_score(z, noise));
        store(zs, z);
        store(word, noise);
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
            const Lanes z = z_of(load(at.list_logits + i));
            const Mask alive = lanes_from(row.min_z, z);
            if (!alive) continue;
            const Words noise = noise_of(load(at.list_ids + i), row);
            const Mask open = alive & lanes_from(best.rough, rough_score(z, noise));
            if (open) offer_all(best, open, z, noise, 0, at.list_ids + i);
        }
        return best.id;
    }

    int64_t draw_from_row() const {
        Best best;
        const int64_t greedy = first_of_top();
        best.offer(0, greedy, noise_words(uint32_t(greedy / 4), row.seed, row.position, row.choice).word[greedy % 4]);
        for (int64_t g = 0; g < groups; g++) {
            const Lanes largest = z_of(load(at.maxima + g * LANES));
            if (!(lanes_from(row.min_z, largest) & lanes_from(best.rough, rough_bound(largest)))) continue;
            for (int i = 0; i < GROUP; i += 4 * LANES) {
                Words noise[4];
                noise_of_64(uint32_t(g * GROUP + i) / 4, row, noise);
                Lanes z[4];
                Mask open[4];
                for (int j = 0; j < 4; j++) {
                    z[j] = z_of(load(group(g) + i + j * LANES));
                    open[j] = lanes_from(best.rough, rough_score(z[j], noise[j]));
                }
                if (!(open[0] | open[1] | open[2] | open[3])) continue;
                for (int j = 0; j < 4; j++)
                    if (Mask alive = open[j] & lanes_from(row.min_z, z[j]))
                        offer_all(best, alive, z[j], noise[j], g * GROUP + i + j * LANES, nullptr);
            }
        }
        return best.id;
    }

    // --- top-k and top-p choose how the list comes about ------------------------------------------------------------------

    bool list_top_k(int64_t k) {                // false: no more than k can survive, so nothing is to be cut
        // what min-p will drop counts for top-p, so it only bounds the search where there is no top-p
        const float floor = floor_of_survivors(row.top_p < 1ull << 32 ? EXP_CUTOFF : row.min_z);
        const auto in_maxima = [&](float t) { return count_at_least(at.maxima, groups * LANES, t); };
        const auto in_coarse = [&](float t) { return count_at_least(at.coarse, (groups + COARSE - 1) / COARSE * LANES, t); };
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
            const uint64_t total = weight_of_row(), target = top_p_target(total, row.top_p);
            // ids that weigh less than 1 / vocab of what may be dropped are dropped: together they weigh less than that
            const double light = double(total - target) / double(vocab);
            list_from(floor_of_survivors(light > 1 ? log_contract(light * 0x1p-40) : EXP_CUTOFF));
            keep_top_p(target);
        }
        return listed || top_p ? draw_from_list() : draw_from_row();
    }

public:
    Row(const SampleArgs& a, int64_t index, float* memory)
        : args(a), row(a.params[index]), vocab(a.vocab), groups(Scratch::groups_of(vocab)), at(memory, vocab),
          logits(a.logits + index * a.stride) {}

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

}  // namespace

void sample_row(const SampleArgs& args, int64_t index) {
    const SampleRow& row = args.params[index];
    if (row.position < 0) {
        args.tokens[index] = -1;
        return;
    }
    Row work(args, index, static_cast<float*>(scratch(Scratch::bytes(args.vocab))));
    args.tokens[index] = work.token();
}

}  // namespace DC_ISA
}  // namespace dc
