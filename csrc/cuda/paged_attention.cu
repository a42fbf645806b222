// op       paged_attention of decode rows: softmax(q k) v, the scores capped if the job says so, over each row's own pages.
//          With sinks, each query head has one more score, whose value is 0.
// shapes   q (B, Hq, D) f32, scaled already; K and V pages of 16 slots, f32, f16, bf16 or q8, strides as arguments; block_table
//          (B, W) i32; lengths (B) i32, the row itself included, <= 0 = inactive; sinks (Hq) f32 -> out (B, Hq * D) f32 or bf16.
//          D a multiple of 16 up to 256, Hq / Hk up to 64.
// mapping  Block = (span, kv head, row), 128 threads, all query heads of the group (8 at a time); attention_spans.h says what a span is
//          and how what its block makes is merged. Scores: 8 lanes share a key, so the block takes a page at once. Values: a thread
//          owns 16 bytes of columns and every n-th position.
// cost     2 * D * bytes per (position, kv head) read, once per group of up to 8 query heads; bound by memory bandwidth.
// numerics Scores, softmax and sums in f32; every sum has an order fixed by lane, position and the row's length, so a row's
//          bits depend on nothing but the row. Window W: a row at position i sees 0 <= i - j < W. Pages left of it are not
//          read. A page id out of range is skipped like a masked one. Numbers of q8 are their code times their block's scale; q
//          must be turned as K is, and the result is turned as V is (rope_append.cu).

#include "launch.h"

#include "attention_spans.h"

namespace {

using namespace dc_device;

constexpr int ATTENTION_THREADS = 128, ATTENTION_WARPS = ATTENTION_THREADS / 32;
constexpr int KEY_LANES = 8;                // lanes that share a key
static_assert(ATTENTION_THREADS == KEY_LANES * PAGE, "a pass of the block scores one page");

template <class Stored> constexpr int PACKED = 16 / sizeof(Stored);         // elements of one load
template <> constexpr int PACKED<q8> = 8;                                   // so that 8 lanes have a load each of 64

// K or V pages from some head on. `load` and `unpack` are apart so that many loads can be under way before the first is used.
template <class Stored> struct Pages {
    const Stored *values;

    union Pack {
        Bytes16 bytes;
        Stored values[PACKED<Stored>];
    };
    static_assert(sizeof(Pack) == 16, "one load");

    DC_DEVICE void skip(int64_t elements) { values += elements; }

    DC_DEVICE static Pack none() { return Pack{Bytes16{}}; }
    DC_DEVICE Pack load(int64_t at) const { return Pack{*reinterpret_cast<const Bytes16 *>(values + at)}; }

    DC_DEVICE static void unpack(const Pack &pack, float (&to)[PACKED<Stored>]) {
        DC_UNROLL
        for (int i = 0; i < PACKED<Stored>; i++) to[i] = to_float(pack.values[i]);
    }
};

template <> struct Pages<q8> {
    const q8 *values;
    const f16 *scales;                      // as many as there are blocks, in the same order

    DC_DEVICE void skip(int64_t elements) {
        values += elements;
        scales += elements / Q8_BLOCK;
    }

    struct Pack {
        uint64_t bytes;
        f16 scale;
    };

    DC_DEVICE static Pack none() { return Pack{}; }
    DC_DEVICE Pack load(int64_t at) const { return Pack{*reinterpret_cast<const uint64_t *>(values + at), scales[at / Q8_BLOCK]}; }

    DC_DEVICE static void unpack(const Pack &pack, float (&to)[8]) {
        union { uint64_t bytes; q8 values[8]; } codes;
        codes.bytes = pack.bytes;
        const float scale = to_float(pack.scale);
        DC_UNROLL
        for (int i = 0; i < 8; i++) to[i] = static_cast<float>(codes.values[i].code) * scale;
    }
};

template <class Stored, int MAX_SIZE, int HEADS> struct Shape {
    static constexpr int PACK = PACKED<Stored>;
    static constexpr int KEY_PACKS = MAX_SIZE / (KEY_LANES * PACK);         // loads of a lane per key
    static constexpr int COLUMNS = MAX_SIZE / PACK;                         // threads that share a value row
    static constexpr int VALUE_ROWS = ATTENTION_THREADS / COLUMNS;
    static constexpr int VALUE_LOADS = CHUNK / VALUE_ROWS;                  // of a thread
    // Values are asked for before the scores are computed, where the registers suffice for keys, values and queries.
    static constexpr bool EARLY = HEADS * MAX_SIZE <= 512 && VALUE_LOADS <= 8;
    using Pack = typename Pages<Stored>::Pack;
    static constexpr int PARTS = ATTENTION_THREADS / (COLUMNS > 32 ? COLUMNS : 32);     // sums left after the warps'

    struct Shared {
        int32_t pages[CHUNK_PAGES];         // -1: masked
        float scores[HEADS][CHUNK];         // then the weights
        float largest[HEADS], sum[HEADS], factor[HEADS];        // factor: of what the chunks before have added up
        float values[PARTS][HEADS][MAX_SIZE];
        float totals[HEADS][MAX_SIZE];      // of the span
        bool last;
    };
};

// Sums over the 8 lanes of a key, for all heads at once: each step halves the heads a lane is responsible for. The
// tree of additions is the same for every head and every HEADS. Returns the sum for head `lane * HEADS / 8`.
template <int HEADS> DC_DEVICE float sum_over_lanes(float (&x)[HEADS], unsigned lane) {
    int mine = HEADS;
    DC_UNROLL
    for (int distance = KEY_LANES / 2; distance > 0; distance /= 2) {
        const bool upper = (lane & distance) != 0;
        if (mine > 1) {
            mine /= 2;
            DC_UNROLL
            for (int h = 0; h < HEADS / 2; h++) {
                if (h >= mine) continue;
                const float keep = upper ? x[h + mine] : x[h], give = upper ? x[h] : x[h + mine];
                x[h] = keep + __shfl_xor_sync(ALL_LANES, give, distance);
            }
        } else {
            x[0] = x[0] + __shfl_xor_sync(ALL_LANES, x[0], distance);
        }
    }
    return x[0];
}

// scores[h][p] = q_h k_p for the positions of the chunk that begins at `first`, -infinity where masked.
template <class Stored, int MAX_SIZE, int HEADS>
DC_DEVICE void score(const AttentionJob &job, const Range &range, int first, const Pages<Stored> &k_pages, const float *q, int heads,
                     typename Shape<Stored, MAX_SIZE, HEADS>::Shared &shared) {
    using S = Shape<Stored, MAX_SIZE, HEADS>;
    const unsigned lane = threadIdx.x % KEY_LANES;
    const int slot = threadIdx.x / KEY_LANES;
    float query[HEADS][S::KEY_PACKS][S::PACK];
    DC_UNROLL
    for (int h = 0; h < HEADS; h++) {
        DC_UNROLL
        for (int i = 0; i < S::KEY_PACKS; i++) {
            const int d = (i * KEY_LANES + lane) * S::PACK;
            DC_UNROLL
            for (int e = 0; e < S::PACK; e++)
                query[h][i][e] = h < heads && d < job.head_size ? q[h * job.head_size + d + e] : 0.0f;
        }
    }
    typename S::Pack keys[CHUNK_PAGES][S::KEY_PACKS];
    bool seen[CHUNK_PAGES];
    DC_UNROLL
    for (int page = 0; page < CHUNK_PAGES; page++) {
        const int position = first + page * PAGE + slot;
        seen[page] = position >= range.begin && position < range.end && shared.pages[page] >= 0;
        const int64_t key = shared.pages[page] * job.page_stride + slot * job.slot_stride;
        DC_UNROLL
        for (int i = 0; i < S::KEY_PACKS; i++) {
            const int d = (i * KEY_LANES + lane) * S::PACK;
            keys[page][i] = seen[page] && d < job.head_size ? k_pages.load(key + d) : k_pages.none();
        }
    }
    DC_UNROLL
    for (int page = 0; page < CHUNK_PAGES; page++) {
        const int p = page * PAGE + slot;
        float dot[HEADS] = {};
        DC_UNROLL
        for (int i = 0; i < S::KEY_PACKS; i++) {
            float k[S::PACK];
            k_pages.unpack(keys[page][i], k);
            DC_UNROLL
            for (int h = 0; h < HEADS; h++) {
                DC_UNROLL
                for (int e = 0; e < S::PACK; e++) dot[h] = fmaf(query[h][i][e], k[e], dot[h]);
            }
        }
        float total = sum_over_lanes<HEADS>(dot, lane);             // every lane takes part, seen or not
        if (job.softcap > 0) total = job.softcap * tanhf(total / job.softcap);
        if (lane % (KEY_LANES / HEADS) == 0) shared.scores[lane * HEADS / KEY_LANES][p] = seen[page] ? total : -INFINITY;
    }
}

// scores -> weights exp(score - largest), a warp per head; `largest` and `sum` are those of the span so far.
template <class Shared> DC_DEVICE void soften(Shared &shared, int heads, bool first) {
    const unsigned lane = threadIdx.x % 32;
    for (int h = threadIdx.x / 32; h < heads; h += ATTENTION_WARPS) {
        const float before = first ? -INFINITY : shared.largest[h], sum_before = first ? 0.0f : shared.sum[h];
        float largest = before;
        for (int p = lane; p < CHUNK; p += 32) largest = fmaxf(largest, shared.scores[h][p]);
        for (int distance = 16; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        float sum = 0;
        for (int p = lane; p < CHUNK; p += 32) {
            const float score = shared.scores[h][p];
            const float weight = score == -INFINITY ? 0.0f : expf(score - largest);
            shared.scores[h][p] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            const float factor = before == -INFINITY ? 0.0f : expf(before - largest);
            shared.largest[h] = largest;
            shared.factor[h] = factor;
            shared.sum[h] = factor * sum_before + sum;
        }
    }
}

// This thread's values of the chunk that begins at `first`; none where it sees none.
template <class Stored, int MAX_SIZE, int HEADS>
DC_DEVICE void load_values(const AttentionJob &job, const Range &range, int first, const Pages<Stored> &v_pages,
                           const typename Shape<Stored, MAX_SIZE, HEADS>::Shared &shared,
                           typename Pages<Stored>::Pack (&values)[Shape<Stored, MAX_SIZE, HEADS>::VALUE_LOADS]) {
    using S = Shape<Stored, MAX_SIZE, HEADS>;
    const int column = threadIdx.x % S::COLUMNS * S::PACK, row = threadIdx.x / S::COLUMNS;
    DC_UNROLL
    for (int i = 0; i < S::VALUE_LOADS; i++) {
        const int p = row + i * S::VALUE_ROWS, position = first + p, page = shared.pages[p / PAGE];
        const bool seen = position >= range.begin && position < range.end && page >= 0 && column < job.head_size;
        values[i] = seen ? v_pages.load(page * job.page_stride + p % PAGE * job.slot_stride + column) : v_pages.none();
    }
}

// values[part][h] = sums of weight * v over a part of the positions; the parts' own sum is left to the reader. What is not seen has
// weight 0, and v is 0 then.
template <class Stored, int MAX_SIZE, int HEADS>
DC_DEVICE void weigh(const Pages<Stored> &v_pages,
                     const typename Pages<Stored>::Pack (&values)[Shape<Stored, MAX_SIZE, HEADS>::VALUE_LOADS],
                     typename Shape<Stored, MAX_SIZE, HEADS>::Shared &shared) {
    using S = Shape<Stored, MAX_SIZE, HEADS>;
    const int column = threadIdx.x % S::COLUMNS * S::PACK, row = threadIdx.x / S::COLUMNS;
    float sums[HEADS][S::PACK] = {};
    DC_UNROLL
    for (int i = 0; i < S::VALUE_LOADS; i++) {
        const int p = row + i * S::VALUE_ROWS;
        float v[S::PACK];
        v_pages.unpack(values[i], v);
        DC_UNROLL
        for (int h = 0; h < HEADS; h++) {
            DC_UNROLL
            for (int e = 0; e < S::PACK; e++) sums[h][e] = fmaf(shared.scores[h][p], v[e], sums[h][e]);
        }
    }
    DC_UNROLL
    for (int h = 0; h < HEADS; h++) {
        DC_UNROLL
        for (int e = 0; e < S::PACK; e++) {
            float sum = sums[h][e];
            DC_UNROLL
            for (int distance = S::COLUMNS; distance < 32; distance *= 2)
                sum = sum + __shfl_xor_sync(ALL_LANES, sum, distance);
            const bool writes = S::COLUMNS >= 32 || threadIdx.x % 32 < S::COLUMNS;
            if (writes) shared.values[threadIdx.x / (S::COLUMNS > 32 ? S::COLUMNS : 32)][h][column + e] = sum;
        }
    }
}

template <class Stored, int MAX_SIZE, int HEADS>
DC_KERNEL(ATTENTION_THREADS) attention_kernel(AttentionJob job, Pages<Stored> k_pages, Pages<Stored> v_pages) {
    after_previous();
    using S = Shape<Stored, MAX_SIZE, HEADS>;
    DC_SHARED(typename S::Shared, shared);
    Range range;
    if (!find_range(job, range)) return;
    const int64_t row = blockIdx.z, kv_head = blockIdx.y;
    const int group = job.heads / job.kv_heads, D = job.head_size;
    const int64_t first_head = row * job.heads + kv_head * group;
    const int64_t head_states = static_cast<int64_t>(job.max_spans + job.max_groups) * (2 + D);
    k_pages.skip(kv_head * job.head_stride);
    v_pages.skip(kv_head * job.head_stride);

    for (int done = 0; done < group; done += HEADS) {
        const int heads = group - done < HEADS ? group - done : HEADS;
        const int begin = range.begin / CHUNK * CHUNK;
        for (int first = begin; first < range.end; first += CHUNK) {
            __syncthreads();                // the last chunk's weights and values are done with
            if (threadIdx.x < CHUNK_PAGES) {
                const int index = first / PAGE + threadIdx.x;
                const bool wanted = index >= range.begin / PAGE && index <= (range.end - 1) / PAGE;
                const int page = wanted ? job.block_table[row * job.table_stride + index] : -1;
                shared.pages[threadIdx.x] = page < job.num_pages ? page : -1;
            }
            __syncthreads();
            typename S::Pack values[S::VALUE_LOADS];
            if constexpr (S::EARLY) load_values<Stored, MAX_SIZE, HEADS>(job, range, first, v_pages, shared, values);
            score<Stored, MAX_SIZE, HEADS>(job, range, first, k_pages, job.q + (first_head + done) * D, heads, shared);
            __syncthreads();
            soften(shared, HEADS, first == begin);      // heads past the group have query 0: harmless, and no branch in `weigh`
            if constexpr (!S::EARLY) load_values<Stored, MAX_SIZE, HEADS>(job, range, first, v_pages, shared, values);
            __syncthreads();
            weigh<Stored, MAX_SIZE, HEADS>(v_pages, values, shared);
            __syncthreads();
            for (int i = threadIdx.x; i < heads * D; i += ATTENTION_THREADS) {      // each time by the same thread
                const int h = i / D, d = i % D;
                float value = shared.values[0][h][d];
                for (int part = 1; part < S::PARTS; part++) value += shared.values[part][h][d];
                shared.totals[h][d] = first == begin ? value : fmaf(shared.factor[h], shared.totals[h][d], value);
            }
        }
        for (int i = threadIdx.x; i < heads * D; i += ATTENTION_THREADS) {
            const int h = i / D, d = i % D;
            const int64_t head = first_head + done + h;
            if (range.spans == 1) {
                write_out(job, head * D + d, shared.largest[h], shared.sum[h], shared.totals[h][d]);
                continue;
            }
            float *state = job.states + head * head_states + range.span * (2 + D);
            state[2 + d] = shared.totals[h][d];
            if (d == 0) {
                state[0] = shared.largest[h];
                state[1] = shared.sum[h];
            }
        }
    }
    if (range.spans == 1) return;

    int32_t *tickets = job.tickets + (row * job.kv_heads + kv_head) * (1 + job.max_groups);
    merge_spans<MAX_SIZE>(job, range, first_head, group, tickets, ATTENTION_WARPS, shared);
}

// --- which instance ----------------------------------------------------------------------------------------------

struct AttentionLaunch {
    AttentionJob job;
    unsigned rows;
    int64_t k_pages, v_pages, k_scales, v_scales, stream;
};

template <class Stored> Pages<Stored> pages_at(int64_t values, int64_t) { return {as_pointer<const Stored>(values)}; }

template <> Pages<q8> pages_at<q8>(int64_t values, int64_t scales) { return {as_pointer<const q8>(values), as_pointer<const f16>(scales)}; }

template <class Stored, int MAX_SIZE, int HEADS> const char *launch_instance(const AttentionLaunch &l) {
    const dim3 grid(static_cast<unsigned>(l.job.max_spans), static_cast<unsigned>(l.job.kv_heads), l.rows);
    const auto kernel = attention_kernel<Stored, MAX_SIZE, HEADS>;
    return DC_LAUNCH(kernel, grid, ATTENTION_THREADS, as_pointer<void>(l.stream), l.job, pages_at<Stored>(l.k_pages, l.k_scales),
                     pages_at<Stored>(l.v_pages, l.v_scales));
}

template <class Stored, int MAX_SIZE> const char *launch_heads(const AttentionLaunch &l) {
    const int group = l.job.heads / l.job.kv_heads;
    if constexpr (sizeof(Stored) > 1) {     // of q8, fewer instances to compile: absent heads cost little compared with reading
        if (group == 1) return launch_instance<Stored, MAX_SIZE, 1>(l);
        if (group == 2) return launch_instance<Stored, MAX_SIZE, 2>(l);
    }
    if constexpr (MAX_SIZE <= 128) {        // more would not fit the registers
        if (group > 4) return launch_instance<Stored, MAX_SIZE, 8>(l);
    }
    return launch_instance<Stored, MAX_SIZE, 4>(l);
}

template <class Stored> const char *launch_size(const AttentionLaunch &l) {
    if (l.job.head_size <= 64) return launch_heads<Stored, 64>(l);
    if (l.job.head_size <= 128) return launch_heads<Stored, 128>(l);
    return launch_heads<Stored, 256>(l);
}

}  // namespace

const char *dc_cuda_paged_attention(int64_t q, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size,
                                    int64_t k_pages, int64_t v_pages, int64_t k_scales, int64_t v_scales, int64_t cache_type, int64_t num_pages,
                                    int64_t page_stride, int64_t head_stride, int64_t slot_stride, int64_t block_table,
                                    int64_t table_stride, int64_t table_width, int64_t lengths, int64_t window, double softcap,
                                    int64_t sinks, int64_t max_chunks, int64_t most_spans, int64_t states, int64_t tickets, int64_t out, int64_t out_type,
                                    int64_t stream) {
    if (rows == 0) return nullptr;
    AttentionLaunch l{};
    l.job.q = as_pointer<const float>(q);
    l.job.block_table = as_pointer<const int32_t>(block_table);
    l.job.lengths = as_pointer<const int32_t>(lengths);
    l.job.table_stride = table_stride;
    l.job.num_pages = num_pages;
    l.job.table_width = static_cast<int>(table_width);
    l.job.heads = static_cast<int>(heads);
    l.job.kv_heads = static_cast<int>(kv_heads);
    l.job.head_size = static_cast<int>(head_size);
    l.job.value_size = static_cast<int>(head_size);
    l.job.window = static_cast<int>(window);
    l.job.softcap = static_cast<float>(softcap);
    l.job.sinks = as_pointer<const float>(sinks);
    if (most_spans < 1 || most_spans > MERGED * MERGED) return "there must be 1 to 256 spans";
    l.job.most_spans = static_cast<int>(most_spans);
    l.job.max_spans = static_cast<int>(max_chunks < most_spans ? max_chunks : most_spans);
    l.job.max_groups = (l.job.max_spans + MERGED - 1) / MERGED;
    l.job.page_stride = page_stride;
    l.job.head_stride = head_stride;
    l.job.slot_stride = slot_stride;
    l.job.states = as_pointer<float>(states);
    l.job.tickets = as_pointer<int32_t>(tickets);
    l.job.out = as_pointer<void>(out);
    l.job.out_type = out_type;
    l.rows = static_cast<unsigned>(rows);
    l.k_pages = k_pages;
    l.v_pages = v_pages;
    l.k_scales = k_scales;
    l.v_scales = v_scales;
    l.stream = stream;
    if (cache_type == F32) return launch_size<float>(l);
    if (cache_type == F16) return launch_size<f16>(l);
    if (cache_type == Q8) return launch_size<q8>(l);
    return launch_size<bf16>(l);
}
