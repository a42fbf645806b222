// op       sample: one token per row, the same bits as chatlm's sample_reference on equal logits.
// shapes   logits (B, V) f32 or bf16 with a row stride, V <= 2^18; parameters, tokens per row (launch.h).
// mapping  One block per row, 1024 threads striding over the ids. An item is one u64 code, smaller is better:
//          (distance of its key below the largest key) << id_bits | id. So top-k and top-p are each one number, the
//          largest code that survives, found by radix selection in shared histograms (10 bits a pass). Before that the
//          row shrinks to a list in shared memory: top-k <= 1024 by the k-th best of the threads' own best, top-p
//          by the weight below which all ids together may be dropped. When the list overflows (thousands of ties,
//          flat rows, k > 1024) the same code walks the row itself.
// cost     Reads V logits 2 times (top-k, greedy 1, top-p 3, neither 2; the list's overflow up to 12), the later ones
//          from L2. Bound by one SM's L2 bandwidth, and by Philox and logarithms on unfiltered rows.
// numerics The bits of contract.h: f32 z, u64 integer weights, f64 noise. Integer atomics only, so neither the order of
//          threads nor their number changes a token. Lower ids win ties. Logprobs are not promised to the bit.

#include "launch.h"

#include "contract.h"
#include "device.h"

namespace {

using namespace dc_device;

constexpr int SAMPLE_THREADS = 1024;
constexpr int DIGIT_BITS = 10, BINS = 1 << DIGIT_BITS;
constexpr unsigned LIST_SIZE = 4096;
constexpr uint32_t NOBODY = 0xffffffffu;
constexpr uint64_t TOP_P_OFF = uint64_t(1) << 32;

struct SampleShared {
    uint64_t list[LIST_SIZE];               // codes, in any order
    uint32_t low[BINS], high[BINS];         // a histogram of 64-bit measures
    uint64_t partial[32];                   // one value of each warp
    uint64_t above, through;                // measure before the chosen bin, and with it
    uint32_t digit;
    uint32_t listed;
    uint32_t best_score;                    // rises during the draw: a lower bound of the best score, as an ordered key
};

// --- the block as one ----------------------------------------------------------------------------------------

struct Sum { DC_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; } };
struct Max { DC_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; } };
struct Min { DC_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? a : b; } };

// Every thread receives all threads' values combined (associative and commutative, so in any order).
template <class Combine> DC_DEVICE uint64_t block_reduce(uint64_t value, SampleShared &shared, Combine combine) {
    for (int distance = 16; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared.partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; warp++) value = combine(value, shared.partial[warp]);
    __syncthreads();                        // the next call writes `partial`
    return value;
}

// The sum of the values of all threads before this one. A barrier must come before `partial` is written again.
DC_DEVICE uint64_t block_sum_before(uint64_t value, SampleShared &shared) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t through = value;
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const uint64_t other = __shfl_up_sync(ALL_LANES, through, distance);
        if (lane >= distance) through += other;
    }
    if (lane == 31) shared.partial[warp] = through;
    __syncthreads();
    uint64_t before = through - value;
    for (unsigned i = 0; i < warp; i++) before += shared.partial[i];
    return before;
}

// bins[digit] += measure, by 32-bit atomics: the hardware has no 64-bit addition in shared memory.
DC_DEVICE void add_to_bin(SampleShared &shared, uint32_t digit, uint64_t measure) {
    const uint32_t low = static_cast<uint32_t>(measure);
    const uint32_t old = atomicAdd(&shared.low[digit], low);
    const uint32_t high = static_cast<uint32_t>(measure >> 32) + (old + low < old);
    if (high != 0) atomicAdd(&shared.high[digit], high);
}

DC_DEVICE uint32_t ordered(float logit) { return dc::key_of(dc::clean(logit)); }

// A double as an unsigned number of the same order, never 0.
DC_DEVICE uint64_t ordered_score(double score) {
    const uint64_t bits = dc::bits_as<uint64_t>(score == 0 ? 0.0 : score);
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// --- items: a row's codes, from memory or from the list ----------------------------------------------------------

// visit(id, logit) for every id of a row, 16 bytes at a time where the address allows.
template <class T, class Visit> DC_DEVICE void each_logit(const T *row, uint32_t vocabulary, Visit visit) {
    constexpr unsigned PACK = 16 / sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    const unsigned packed = aligned ? vocabulary / PACK * PACK : 0;
    for (uint32_t id = threadIdx.x * PACK; id < packed; id += blockDim.x * PACK) {
        union { Bytes16 bytes; T values[PACK]; } pack;
        pack.bytes = *reinterpret_cast<const Bytes16 *>(row + id);
        DC_UNROLL
        for (unsigned i = 0; i < PACK; i++) visit(id + i, to_float(pack.values[i]));
    }
    for (uint32_t id = packed + threadIdx.x; id < vocabulary; id += blockDim.x) visit(id, to_float(row[id]));
}

template <class T> struct Items {
    const T *row;
    uint32_t vocabulary;
    uint32_t top_key;
    int id_bits, bits;                      // of an id; of any code that can survive
    float inverse_temperature;
    SampleShared &shared;
    bool listed;                            // the list holds every code that can still survive

    DC_DEVICE uint64_t code(uint32_t id, float logit) const {
        return static_cast<uint64_t>(top_key - ordered(logit)) << id_bits | id;
    }
    DC_DEVICE uint32_t id(uint64_t code) const { return static_cast<uint32_t>(code) & ((1u << id_bits) - 1); }
    DC_DEVICE float z(uint64_t code) const {
        const float logit = dc::float_of_key(top_key - static_cast<uint32_t>(code >> id_bits));
        return dc::z_of(logit, dc::float_of_key(top_key), inverse_temperature);
    }
    DC_DEVICE uint64_t weight(uint64_t code) const { return dc::exp_weight(z(code)); }

    template <class Visit> DC_DEVICE void each(Visit visit) const {
        if (listed) {
            for (unsigned i = threadIdx.x; i < shared.listed; i += blockDim.x) visit(shared.list[i]);
        } else {
            each_logit(row, vocabulary, [&](uint32_t id, float logit) { visit(code(id, logit)); });
        }
    }

    // Shrinks the items to those that pass, if they fit.
    template <class Pass> DC_DEVICE void keep(Pass pass) {
        if (listed) return;
        if (threadIdx.x == 0) shared.listed = 0;
        __syncthreads();
        each([&](uint64_t code) {
            if (!pass(code)) return;
            const uint32_t place = atomicAdd(&shared.listed, 1u);
            if (place < LIST_SIZE) shared.list[place] = code;
        });
        __syncthreads();
        listed = shared.listed <= LIST_SIZE;
    }
};

struct Own {                                // one item per thread
    uint64_t code;
    template <class Visit> DC_DEVICE void each(Visit visit) const { visit(code); }
};

// The code at which the measures of the items, best first, reach `target` (1 .. their sum): the smallest such, or
// a larger one with no items in between. `bits`: of the longest code.
template <class Items, class Measure>
DC_DEVICE uint64_t find_cut(const Items &items, Measure measure, uint64_t target, int bits, SampleShared &shared) {
    uint64_t prefix = 0;
    for (int shift = bits; shift > 0;) {
        const int width = shift < DIGIT_BITS ? shift : DIGIT_BITS, above = shift;
        shift -= width;
        for (unsigned bin = threadIdx.x; bin < BINS; bin += blockDim.x) shared.low[bin] = shared.high[bin] = 0;
        __syncthreads();
        items.each([&](uint64_t code) {
            if (code >> above != prefix) return;
            const uint64_t amount = measure(code);
            if (amount != 0) add_to_bin(shared, static_cast<uint32_t>(code >> shift) & ((1u << width) - 1), amount);
        });
        __syncthreads();
        const unsigned share = BINS / blockDim.x, first = threadIdx.x * share;      // consecutive bins of a thread
        uint64_t own = 0;
        for (unsigned bin = first; bin < first + share; bin++)
            own += static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin];
        uint64_t before = block_sum_before(own, shared);
        for (unsigned bin = first; bin < first + share; bin++) {
            const uint64_t through = before + (static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin]);
            if (before < target && target <= through) {         // true in exactly one bin
                shared.digit = bin;
                shared.above = before;
                shared.through = through;
            }
            before = through;
        }
        __syncthreads();
        prefix = prefix << width | shared.digit;
        const bool whole = shared.through == target;
        target -= shared.above;
        if (whole) return ((prefix + 1) << shift) - 1;
    }
    return prefix;
}

// --- one row -----------------------------------------------------------------------------------------------------

DC_DEVICE int bits_of(uint32_t x) { return 32 - __clz(static_cast<int>(x)); }

// What top-k leaves: the largest surviving code.
template <class T>
DC_DEVICE uint64_t top_k_cut(Items<T> &items, unsigned k, uint32_t own_key, SampleShared &shared) {
    if (k <= blockDim.x) {
        // the k-th best of the threads' own best is no better than the k-th best of all
        const uint64_t own = items.top_key - own_key;
        const uint64_t worst = block_reduce(own, shared, Max());
        const int bits = bits_of(static_cast<uint32_t>(worst));
        const uint64_t bound = find_cut(Own{own}, [](uint64_t) { return uint64_t(1); }, k, bits, shared);
        items.bits = bits + items.id_bits;
        items.keep([&](uint64_t code) { return code >> items.id_bits <= bound; });
        if (!items.listed) items.bits = 32 + items.id_bits;
    }
    return find_cut(items, [](uint64_t) { return uint64_t(1); }, k, items.bits, shared);
}

struct Noise {                              // of one row; neighbouring ids share a Philox call
    const dc::SampleRow &p;
    uint32_t group;
    dc::PhiloxWords words;

    DC_DEVICE explicit Noise(const dc::SampleRow &p) : p(p), group(NOBODY), words() {}

    DC_DEVICE uint32_t word(uint32_t id) {
        if (id / 4 != group) {
            group = id / 4;
            words = dc::noise_words(group, p.seed, p.position, p.choice);
        }
        const uint32_t *w = words.word, lane = id % 4;      // selected, not indexed: the words stay in registers
        return lane < 2 ? (lane == 0 ? w[0] : w[1]) : (lane == 2 ? w[2] : w[3]);
    }
};

// argmax of z + Gumbel noise over the codes up to `cut` that weigh at least `least`; lower ids win ties.
template <class T>
DC_DEVICE uint32_t draw(const Items<T> &items, const dc::SampleRow &p, uint64_t cut, uint64_t least, SampleShared &shared) {
    Noise noise(p);
    uint64_t best = 0;
    uint32_t best_id = NOBODY;
    if (threadIdx.x == 0) shared.best_score = 0;
    __syncthreads();
    items.each([&](uint64_t code) {
        const float z = items.z(code);
        if (code > cut || !(z >= p.min_z)) return;
        const uint32_t id = items.id(code), word = noise.word(id);
        // -log(-log(1 - u)) < -log(u): most ids lose without an exact logarithm. 1e-3 covers all rounding here.
        const float bound = z - fast_log((static_cast<float>(word) + 0.5f) * 2.3283064e-10f) + 1e-3f;
        if (dc::key_of(bound) < *static_cast<volatile uint32_t *>(&shared.best_score)) return;
        if (items.weight(code) < least) return;
        const double exact = dc::score_of(z, word);
        const uint64_t score = ordered_score(exact);
        if (score < best || (score == best && id > best_id)) return;
        best = score;
        best_id = id;
        atomicMax(&shared.best_score, dc::key_of(static_cast<float>(exact) - 1e-3f));
    });
    const uint64_t winner = block_reduce(best, shared, Max());
    return static_cast<uint32_t>(block_reduce(best == winner ? best_id : NOBODY, shared, Min()));
}

// Temperature, top-k, top-p, min-p and the draw of a row whose largest logit is finite.
template <class T>
DC_DEVICE uint32_t choose(Items<T> &items, const dc::SampleRow &p, uint32_t own_key, SampleShared &shared) {
    uint64_t cut = ~uint64_t(0), least = 1, considered = items.vocabulary;
    if (p.top_k > 0 && static_cast<uint32_t>(p.top_k) < items.vocabulary) {
        considered = static_cast<uint64_t>(p.top_k);
        cut = top_k_cut(items, static_cast<uint32_t>(p.top_k), own_key, shared);
    }
    if (p.top_p < TOP_P_OFF) {
        uint64_t sum = 0;
        items.each([&](uint64_t code) { sum += code <= cut ? items.weight(code) : 0; });
        sum = block_reduce(sum, shared, Sum());
        const uint64_t target = dc::top_p_target(sum, p.top_p);
        // ids lighter than `least` sum to less than what may be dropped
        least = (sum - target + considered - 1) / considered;
        least = least > 0 ? least : 1;
        items.keep([&](uint64_t code) { return code <= cut && items.weight(code) >= least; });
        const uint64_t found = find_cut(items, [&](uint64_t code) {
            const uint64_t weight = code <= cut ? items.weight(code) : 0;
            return weight >= least ? weight : 0;
        }, target, items.bits, shared);
        cut = found < cut ? found : cut;
    }
    return draw(items, p, cut, least, shared);
}

struct Lists {                              // of all rows; a SampleRow says which part is its own
    const int32_t *count_ids, *counts;
    int count_size;
    const int32_t *bias_ids;
    const float *bias_values;
    int bias_size;
};

// Penalties and bias of one row, in place. Ids in count_ids are distinct; equal ids in bias_ids are neighbours.
DC_DEVICE void change_row(float *row, uint32_t vocabulary, const dc::SampleRow &p, const Lists &lists) {
    const auto valid = [&](int32_t id) { return id >= 0 && static_cast<uint32_t>(id) < vocabulary; };
    const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
    const int counts = p.count_begin < 0 ? lists.count_size : p.count_begin, counts_end = min(p.count_end, lists.count_size);
    const int biases = p.bias_begin < 0 ? lists.bias_size : p.bias_begin, biases_end = min(p.bias_end, lists.bias_size);
    for (int i = biases + first; i < biases_end; i += step) {
        const int32_t id = lists.bias_ids[i];
        if (valid(id)) row[id] = dc::clean(row[id]);            // equal ids write equal values
    }
    __syncthreads();
    for (int i = counts + first; i < counts_end; i += step) {
        const int32_t id = lists.count_ids[i];
        if (valid(id)) row[id] = dc::penalize(dc::clean(row[id]), p, lists.counts[i]);
    }
    __syncthreads();
    for (int i = biases + first; i < biases_end; i += step) {
        const int32_t id = lists.bias_ids[i];
        if (!valid(id) || (i > biases && lists.bias_ids[i - 1] == id)) continue;       // the first of a run adds them all
        float logit = row[id];
        for (int j = i; j < biases_end && lists.bias_ids[j] == id; j++) logit = dc::add(logit, lists.bias_values[j]);
        row[id] = logit;
    }
    __syncthreads();
}

template <class T>
DC_KERNEL(SAMPLE_THREADS) sample_kernel(T *logits, int64_t row_stride, uint32_t vocabulary, const dc::SampleRow *params,
                                        Lists lists, int32_t *tokens) {
    after_previous();
    DC_SHARED(SampleShared, shared);
    const uint32_t r = blockIdx.x;
    const dc::SampleRow p = params[r];
    T *row = logits + r * row_stride;
    if (p.position < 0) {
        if (threadIdx.x == 0) tokens[r] = -1;
        return;
    }
    if constexpr (sizeof(T) == 4) {
        if (lists.count_size + lists.bias_size > 0) change_row(row, vocabulary, p, lists);
    }

    uint32_t own_key = 0, own_id = 0;       // this thread's best; no logit has key 0, and a thread's ids ascend
    each_logit(row, vocabulary, [&](uint32_t id, float logit) {
        const uint32_t key = ordered(logit);
        if (key > own_key) { own_key = key; own_id = id; }
    });
    // the best key with the lowest id: in the low half the id counts downwards
    const uint64_t top = block_reduce(static_cast<uint64_t>(own_key) << 32 | ~own_id, shared, Max());
    const uint32_t top_key = static_cast<uint32_t>(top >> 32);
    uint32_t token = ~static_cast<uint32_t>(top);
    const bool hopeless = top_key == dc::key_of(-DC_INFINITY);
    if (p.inverse_temperature >= 0 && !hopeless) {
        const int id_bits = bits_of(vocabulary - 1);
        Items<T> items{row, vocabulary, top_key, id_bits, 32 + id_bits, p.inverse_temperature, shared, false};
        const uint32_t drawn = choose(items, p, own_key, shared);
        token = drawn == NOBODY ? token : drawn;        // nobody: parameters that are not numbers
    }
    if (threadIdx.x == 0) tokens[r] = static_cast<int32_t>(token);
}

template <class T>
const char *launch_sample(int64_t logits, int64_t row_stride, int64_t rows, int64_t vocabulary, int64_t params,
                          const Lists &lists, int64_t tokens, int64_t threads, int64_t stream) {
    const auto kernel = sample_kernel<T>;
    return DC_LAUNCH(kernel, dim3(static_cast<unsigned>(rows)), static_cast<unsigned>(threads), as_pointer<void>(stream),
                     as_pointer<T>(logits), row_stride, static_cast<uint32_t>(vocabulary),
                     as_pointer<const dc::SampleRow>(params), lists, as_pointer<int32_t>(tokens));
}

}  // namespace

const char *dc_cuda_sample(int64_t logits, int64_t type, int64_t row_stride, int64_t rows, int64_t vocabulary,
                           int64_t params, int64_t count_ids, int64_t counts, int64_t count_size, int64_t bias_ids,
                           int64_t bias_values, int64_t bias_size, int64_t tokens, int64_t threads,
                           int64_t stream) {
    if (rows == 0) return nullptr;
    const Lists lists{as_pointer<const int32_t>(count_ids), as_pointer<const int32_t>(counts), static_cast<int>(count_size),
                      as_pointer<const int32_t>(bias_ids), as_pointer<const float>(bias_values), static_cast<int>(bias_size)};
    const auto launch = type == F32 ? launch_sample<float> : launch_sample<bf16>;
    return launch(logits, row_stride, rows, vocabulary, params, lists, tokens, threads, stream);
}
