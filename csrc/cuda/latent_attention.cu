// op       paged_attention of decode rows over latents (MLA): softmax(q k) v over each row's own pages, where all query heads share a
//          position's key, and its value is the beginning of that key.
// shapes   q (B, H, D) f32, scaled already; pages (P, 16, D) f32, f16 or bf16, strides as arguments; block_table (B, W) i32; lengths
//          (B) i32, the row itself included, <= 0 = inactive -> out (B, H * Dv) f32 or bf16. D and Dv multiples of 16, up to 576
//          and 512.
// mapping  Block = (span, group of up to 16 heads, row), 128 threads; attention_spans.h says what a span is and how what its block
//          makes is merged. Heads are the 16 rows of multiply_bf16, so each key that a block reads serves all heads of its group.
//          Keys come to shared memory in bfloat16, 32 at a time; those of other types become two bfloat16 each, 16 keys at a time.
//          Scores: warp w takes every fourth 16 columns of q and k, and keeps q in registers; the warps' sums meet in shared memory.
//          Values: warp w makes every fourth 16 columns of all heads from the same keys, and keeps the sums in registers.
// cost     D * bytes per (position, group) read, from memory for the first group and mostly from the L2 cache for the others. For 16
//          heads, bfloat16 and sm_90, the tensor cores would take a quarter of the time that memory takes (reckoned, not measured).
// numerics q and the softmax's weights are split into two bfloat16, what they round to and what that leaves, so that 16 bits of them
//          count; so are keys that are not bfloat16. Products are exact, sums f32, in an order fixed by column, position and the
//          row's length: a row's bits depend on nothing but the row. A page id out of range is skipped like a masked one.

#include "launch.h"

#include "attention_spans.h"
#include "split_floats.h"

namespace {

using namespace dc_device;

constexpr int LATENT_WARPS = 4, LATENT_THREADS = 32 * LATENT_WARPS;
constexpr int GROUP_HEADS = 16;             // the rows of multiply_bf16
constexpr int MAX_KEY = 576, MAX_VALUE = 512;
constexpr int KEY_STEPS = MAX_KEY / 16 / LATENT_WARPS, VALUE_STEPS = MAX_VALUE / 16 / LATENT_WARPS;   // of a warp, 16 columns each
constexpr int KEY_WORDS = MAX_KEY / 2 + 4;  // pairs of columns; 4 more, so that neighbours in a column are in different banks

template <class Stored> constexpr int PLANES = 2;           // bfloat16 for each number of a key
template <> constexpr int PLANES<bf16> = 1;

template <class Stored> struct LatentShared {
    static constexpr int KEYS = 32 / PLANES<Stored>;        // at a time
    static constexpr int SCORES = KEYS + 8;                 // of a head; 8 more for the banks

    alignas(16) uint32_t keys[PLANES<Stored>][KEYS][KEY_WORDS];
    alignas(16) float scores[LATENT_WARPS][GROUP_HEADS][SCORES];      // each warp's part; then those of warp 0 are the weights
    float largest[GROUP_HEADS], sum[GROUP_HEADS], factor[GROUP_HEADS];
    bool last;
};

// The page of a position; -1 where the block does not see it, or where the id is out of range.
DC_DEVICE int page_of(const AttentionJob &job, const Range &range, int position) {
    if (position < range.begin || position >= range.end) return -1;
    const int page = job.block_table[blockIdx.z * job.table_stride + position / PAGE];
    return page < job.num_pages ? page : -1;
}

DC_DEVICE void put_key(LatentShared<bf16> &shared, int key, int piece, const bf16 *from, bool seen) {
    copy_to_shared(&shared.keys[0][key][4 * piece], from + 8 * piece, seen);
}

template <class Stored> DC_DEVICE void put_key(LatentShared<Stored> &shared, int key, int piece, const Stored *from, bool seen) {
    float x[8] = {};
    if (seen) {
        DC_UNROLL
        for (int i = 0; i < 8; i++) x[i] = to_float(from[8 * piece + i]);
    }
    const SplitEight split(x);
    DC_UNROLL
    for (int i = 0; i < 4; i++) {
        shared.keys[0][key][4 * piece + i] = split.high[i];
        shared.keys[1][key][4 * piece + i] = split.low[i];
    }
}

// The keys from position `first` on; zeros where none is seen. A warp takes a key at a time.
template <class Stored>
DC_DEVICE void load_keys(const AttentionJob &job, const Range &range, int first, const Stored *pages, LatentShared<Stored> &shared) {
    for (int key = threadIdx.x / 32; key < LatentShared<Stored>::KEYS; key += LATENT_WARPS) {
        const int position = first + key, page = page_of(job, range, position);
        const Stored *from = page < 0 ? pages : pages + page * job.page_stride + position % PAGE * job.slot_stride;
        for (int piece = threadIdx.x % 32; piece < job.head_size / 8; piece += 32) put_key(shared, key, piece, from, page >= 0);
    }
    wait_for_copies();
}

// The 16 columns of each of a warp's steps, of all heads, as multiply_bf16 takes them.
struct LatentQueries {
    uint32_t high[KEY_STEPS][4], low[KEY_STEPS][4];

    DC_DEVICE LatentQueries(const float *q, int heads, int size) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4 * 2;
        DC_UNROLL
        for (int step = 0; step < KEY_STEPS; step++) {
            const int d = (warp + LATENT_WARPS * step) * 16 + c;
            DC_UNROLL
            for (int i = 0; i < 4; i++) {
                const int head = r + i % 2 * 8, at = d + i / 2 * 8;
                const bool there = head < heads && at < size;
                const SplitPair pair(there ? q[head * size + at] : 0.0f, there ? q[head * size + at + 1] : 0.0f);
                high[step][i] = pair.high;
                low[step][i] = pair.low;
            }
        }
    }
};

// shared.scores[warp]: this warp's part of the scores of all heads and keys.
template <class Stored> DC_DEVICE void score_latents(const LatentQueries &queries, int size, LatentShared<Stored> &shared) {
    using S = LatentShared<Stored>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
    DC_UNROLL
    for (int tile = 0; tile < S::KEYS / 8; tile++) {
        float sums[4] = {};
        DC_UNROLL
        for (int step = 0; step < KEY_STEPS; step++) {
            const int word = (warp + LATENT_WARPS * step) * 8 + c;
            if (2 * word >= size) continue;                 // of all lanes together, as sizes are multiples of 16
            const uint32_t *key = &shared.keys[0][8 * tile + r][word];
            const uint32_t k[2] = {key[0], key[4]};
            multiply_bf16(sums, queries.high[step], k);
            multiply_bf16(sums, queries.low[step], k);
            if constexpr (PLANES<Stored> == 2) {
                const uint32_t *rest = &shared.keys[1][8 * tile + r][word];
                const uint32_t left[2] = {rest[0], rest[4]};
                multiply_bf16(sums, queries.high[step], left);
            }
        }
        DC_UNROLL
        for (int i = 0; i < 4; i++) shared.scores[warp][r + i / 2 * 8][8 * tile + 2 * c + i % 2] = sums[i];
    }
}

// Scores -> weights exp(score - largest), a warp a head, a lane a key; `largest` and `sum` are those of the span so far.
template <class Stored>
DC_DEVICE void soften_latents(const AttentionJob &job, const Range &range, int first, bool begins, LatentShared<Stored> &shared) {
    const int lane = threadIdx.x % 32;
    const bool seen = lane < LatentShared<Stored>::KEYS && page_of(job, range, first + lane) >= 0;
    for (int h = threadIdx.x / 32; h < GROUP_HEADS; h += LATENT_WARPS) {
        float score = -INFINITY;
        if (seen) {
            score = shared.scores[0][h][lane];
            DC_UNROLL
            for (int w = 1; w < LATENT_WARPS; w++) score += shared.scores[w][h][lane];
        }
        const float before = begins ? -INFINITY : shared.largest[h], sum_before = begins ? 0.0f : shared.sum[h];
        float largest = score;
        for (int distance = 16; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        largest = fmaxf(largest, before);
        const float weight = seen ? expf(score - largest) : 0.0f;
        const float sum = warp_sum(weight);
        if (lane < LatentShared<Stored>::KEYS) shared.scores[0][h][lane] = weight;
        if (lane == 0) {
            const float factor = before == -INFINITY ? 0.0f : expf(before - largest);
            shared.largest[h] = largest;
            shared.factor[h] = factor;
            shared.sum[h] = factor * sum_before + sum;
        }
    }
}

// A warp's columns of weighted latents. In each step, `even` has the even columns of 16, and `odd` their right neighbours.
struct WeightedLatents {
    float even[VALUE_STEPS][4], odd[VALUE_STEPS][4];

    DC_DEVICE void scale(const float *factors) {
        const int r = threadIdx.x % 32 / 4;
        DC_UNROLL
        for (int step = 0; step < VALUE_STEPS; step++) {
            DC_UNROLL
            for (int i = 0; i < 4; i++) {
                even[step][i] *= factors[r + i / 2 * 8];
                odd[step][i] *= factors[r + i / 2 * 8];
            }
        }
    }

    // sums += the weights of 16 keys, `high` and `low`, times these keys. A word of a key is two columns, and that of multiply_bf16 two
    // keys: so two steps of it, for the even and the odd columns, share what is loaded.
    template <class Key> DC_DEVICE void add(const uint32_t (&high)[4], const uint32_t (&low)[4], const Key &key, int size, bool rest) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
        DC_UNROLL
        for (int step = 0; step < VALUE_STEPS; step++) {
            const int word = (warp + LATENT_WARPS * step) * 8 + r;
            if ((warp + LATENT_WARPS * step) * 16 >= size) continue;
            const uint32_t first[2] = {key(0, word), key(8, word)}, second[2] = {key(1, word), key(9, word)};
            uint32_t left[2], right[2];
            DC_UNROLL
            for (int i = 0; i < 2; i++) {
                left[i] = (first[i] & 0xffffu) | second[i] << 16;
                right[i] = first[i] >> 16 | (second[i] & 0xffff0000u);
            }
            multiply_bf16(even[step], high, left);
            multiply_bf16(odd[step], high, right);
            if (rest) continue;
            multiply_bf16(even[step], low, left);
            multiply_bf16(odd[step], low, right);
        }
    }
};

template <class Stored> DC_DEVICE void weigh_latents(const LatentShared<Stored> &shared, int size, WeightedLatents &sums) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4 * 2;
    DC_UNROLL
    for (int first = 0; first < LatentShared<Stored>::KEYS; first += 16) {
        uint32_t high[4], low[4];
        DC_UNROLL
        for (int i = 0; i < 4; i++) {
            const float *weights = &shared.scores[0][r + i % 2 * 8][first + c + i / 2 * 8];
            const SplitPair pair(weights[0], weights[1]);
            high[i] = pair.high;
            low[i] = pair.low;
        }
        sums.add(high, low, [&](int key, int word) { return shared.keys[0][first + c + key][word]; }, size, false);
        if constexpr (PLANES<Stored> == 2)
            sums.add(high, low, [&](int key, int word) { return shared.keys[1][first + c + key][word]; }, size, true);
    }
}

template <class Stored> DC_KERNEL(LATENT_THREADS) latent_attention_kernel(AttentionJob job, int group, const Stored *pages) {
    after_previous();
    using S = LatentShared<Stored>;
    DC_SHARED(S, shared);
    Range range;
    if (!find_range(job, range)) return;
    const int D = job.head_size, Dv = job.value_size, left = job.heads - static_cast<int>(blockIdx.y) * group;
    const int heads = left < group ? left : group;
    const int64_t row = blockIdx.z, first_head = row * job.heads + static_cast<int64_t>(blockIdx.y) * group;
    const LatentQueries queries(job.q + first_head * D, heads, D);
    WeightedLatents sums{};
    const int begin = range.begin / CHUNK * CHUNK;
    for (int first = begin; first < range.end; first += S::KEYS) {
        __syncthreads();                    // the keys and weights before are done with
        load_keys(job, range, first, pages, shared);
        __syncthreads();
        score_latents(queries, D, shared);
        __syncthreads();
        soften_latents(job, range, first, first == begin, shared);
        __syncthreads();
        if (first != begin) sums.scale(shared.factor);
        weigh_latents(shared, Dv, sums);
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4 * 4;
    const int64_t head_states = static_cast<int64_t>(job.max_spans + job.max_groups) * (2 + Dv);
    DC_UNROLL
    for (int step = 0; step < VALUE_STEPS; step++) {
        const int d = (warp + LATENT_WARPS * step) * 16 + c;
        DC_UNROLL
        for (int i = 0; i < 8; i++) {
            const int h = lane / 4 + i / 4 * 8, at = d + i % 4, pair = i / 4 * 2 + i % 4 / 2;
            const float value = i % 2 == 0 ? sums.even[step][pair] : sums.odd[step][pair];
            if (h >= heads || d >= Dv) continue;
            if (range.spans == 1) write_out(job, (first_head + h) * Dv + at, shared.largest[h], shared.sum[h], value);
            else job.states[(first_head + h) * head_states + range.span * (2 + Dv) + 2 + at] = value;
        }
    }
    if (range.spans == 1) return;
    if (threadIdx.x < static_cast<unsigned>(heads)) {
        float *state = job.states + (first_head + threadIdx.x) * head_states + range.span * (2 + Dv);
        state[0] = shared.largest[threadIdx.x];
        state[1] = shared.sum[threadIdx.x];
    }
    int32_t *tickets = job.tickets + (row * gridDim.y + blockIdx.y) * (1 + job.max_groups);
    merge_spans<MAX_VALUE>(job, range, first_head, heads, tickets, LATENT_WARPS, shared);
}

template <class Stored>
const char *launch_latents(const AttentionJob &job, int64_t rows, int64_t groups, int group, int64_t pages, int64_t stream) {
    const dim3 grid(static_cast<unsigned>(job.max_spans), static_cast<unsigned>(groups), static_cast<unsigned>(rows));
    const auto kernel = latent_attention_kernel<Stored>;
    return DC_LAUNCH(kernel, grid, LATENT_THREADS, as_pointer<void>(stream), job, group, as_pointer<const Stored>(pages));
}

}  // namespace

const char *dc_cuda_latent_attention(int64_t q, int64_t rows, int64_t heads, int64_t head_size, int64_t value_size, int64_t pages,
                                     int64_t cache_type, int64_t num_pages, int64_t page_stride, int64_t slot_stride, int64_t block_table,
                                     int64_t table_stride, int64_t table_width, int64_t lengths, int64_t window, int64_t max_chunks,
                                     int64_t most_spans, int64_t states, int64_t tickets, int64_t out, int64_t out_type, int64_t stream) {
    if (rows == 0) return nullptr;
    if (most_spans < 1 || most_spans > MERGED * MERGED) return "there must be 1 to 256 spans";
    AttentionJob job{};
    job.q = as_pointer<const float>(q);
    job.block_table = as_pointer<const int32_t>(block_table);
    job.lengths = as_pointer<const int32_t>(lengths);
    job.table_stride = table_stride;
    job.num_pages = num_pages;
    job.table_width = static_cast<int>(table_width);
    job.heads = static_cast<int>(heads);
    job.head_size = static_cast<int>(head_size);
    job.value_size = static_cast<int>(value_size);
    job.window = static_cast<int>(window);
    job.most_spans = static_cast<int>(most_spans);
    job.max_spans = static_cast<int>(max_chunks < most_spans ? max_chunks : most_spans);
    job.max_groups = (job.max_spans + MERGED - 1) / MERGED;
    job.page_stride = page_stride;
    job.slot_stride = slot_stride;
    job.states = as_pointer<float>(states);
    job.tickets = as_pointer<int32_t>(tickets);
    job.out = as_pointer<void>(out);
    job.out_type = out_type;
    const int64_t groups = (heads + GROUP_HEADS - 1) / GROUP_HEADS;
    const int group = static_cast<int>((heads + groups - 1) / groups);         // the fewest groups, about equal
    if (cache_type == F32) return launch_latents<float>(job, rows, groups, group, pages, stream);
    if (cache_type == F16) return launch_latents<f16>(job, rows, groups, group, pages, stream);
    return launch_latents<bf16>(job, rows, groups, group, pages, stream);
}
