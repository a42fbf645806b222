// op       paged_attention: softmax(q K^T) V over each row's own pages, for decode rows and for prompt chunks; a job may cap the scores
// shapes   q [T, Hq, D] float32 (scaled), pages [P][Hk][2][16 * D] (attention.h) -> out [T, Hq * D] float32
// mapping  one item = (rows of one sequence, kv head, chunks of 256 positions). The Hq / Hk heads of each row are the item's
//          queries; 12 of them share each load of K and V in registers. A chunk has all its scores first, then the softmax,
//          then the weighted values
// cost     decoding is bound by memory: 2 * D * element size bytes of cache per (position, kv head), read once per item.
//          Prefill is bound by 2 * D fused multiply-adds per (query, position)
// numerics float32. A score is one chain over d, a value's sum one chain over the chunk's positions, and the sum of exp 16 lanes
//          and a fixed tree. Chunks begin at multiples of 256 and merge in order. So the bits of a row depend only on its own
//          q, K, V and sinks, not on batch, threads, tiles or instruction set. Slots that a row does not see are never used,
//          whatever they hold
#include "cpu/attention/attention_states.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

// ---- scores: s[query][position] = sum over d of q[query][d] * K[d][position], one chain each, which goes on at `from`
// with what s has; `ahead` is fetched line by line

template <class Stored, int Queries, int Pages>
DC_INLINE void score_tile(const float* q, const Stored* const* k, const Stored* const* ahead, int from, int D, float* s) {
    Lanes sums[Queries][Pages];
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int p = 0; p < Pages; p++) sums[i][p] = all(0.0f);
    if (from > 0)
#pragma GCC unroll 16
        for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
            for (int p = 0; p < Pages; p++) sums[i][p] = load(s + i * CHUNK_SIZE + p * PAGE_SIZE);
    constexpr int rows_in_line = 64 / (PAGE_SIZE * sizeof(Stored));
    for (int line = from; line < D; line += rows_in_line) {
#pragma GCC unroll 16
        for (int p = 0; p < Pages; p++) prefetch(ahead[p] + line * PAGE_SIZE);
#pragma GCC unroll 2
        for (int d = line; d < line + rows_in_line; d++) {
            Lanes keys[Pages];
#pragma GCC unroll 16
            for (int p = 0; p < Pages; p++) keys[p] = load(k[p] + d * PAGE_SIZE);
#pragma GCC unroll 16
            for (int i = 0; i < Queries; i++) {
                Lanes x = all(q[i * SCORE_SIZE + d - from]);
#pragma GCC unroll 16
                for (int p = 0; p < Pages; p++) sums[i][p] = fma(x, keys[p], sums[i][p]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int p = 0; p < Pages; p++) store(s + i * CHUNK_SIZE + p * PAGE_SIZE, sums[i][p]);
}

// Pages of keys, or vectors of values, whose sums for this many queries stay in registers.
constexpr int in_registers(int queries) {
    return REGISTERS >= 32 ? (queries > 12 ? 1 : queries > 6 ? 2 : queries > 2 ? 4 : 8) : queries > 3 ? 1 : queries > 1 ? 2 : 4;
}

template <class Stored, int Queries>
__attribute__((noinline)) void score_pages(const float* q, const Stored* const* k, const Stored* const* ahead, int pages,
                                           int from, int D, float* s) {
    constexpr int together = in_registers(Queries);
    int p = 0;
    for (; p + together <= pages; p += together)
        score_tile<Stored, Queries, together>(q, k + p, ahead + p, from, D, s + p * PAGE_SIZE);
    for (; p < pages; p++) score_tile<Stored, Queries, 1>(q, k + p, ahead + p, from, D, s + p * PAGE_SIZE);
}

// ---- values: acc[query][d] += sum over positions [begin, end) of p[query][position] * V[position][d], one chain each. The values of
// positions are `apart` numbers apart

template <class Stored, int Queries, int Vectors>
DC_INLINE void value_tile(const float* p, const Stored* const* v, const Stored* const* ahead, int begin, int end, int apart, int D,
                          int d, float* acc) {
    Lanes sums[Queries][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; j++) sums[i][j] = load(acc + i * D + d + 16 * j);
    while (begin < end) {
        const int page_end = least(end, (begin | (PAGE_SIZE - 1)) + 1);
        const Stored* row = v[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * apart + d;
        const Stored* row_ahead = ahead[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * apart + d;
        for (; begin < page_end; begin++, row += apart, row_ahead += apart) {
#pragma GCC unroll 16
            for (unsigned j = 0; j < 16 * Vectors; j += 64 / sizeof(Stored)) prefetch(row_ahead + j);
            Lanes values[Vectors];
#pragma GCC unroll 16
            for (int j = 0; j < Vectors; j++) values[j] = load(row + 16 * j);
#pragma GCC unroll 16
            for (int i = 0; i < Queries; i++) {
                Lanes x = all(p[i * CHUNK_SIZE + begin]);
#pragma GCC unroll 16
                for (int j = 0; j < Vectors; j++) sums[i][j] = fma(x, values[j], sums[i][j]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; j++) store(acc + i * D + d + 16 * j, sums[i][j]);
}

template <class Stored, int Queries>
__attribute__((noinline)) void add_values(const float* p, const Stored* const* v, const Stored* const* ahead, int begin,
                                          int end, int apart, int D, float* acc) {
    constexpr int together = in_registers(Queries);
    int d = 0;
    for (; d + 16 * together <= D; d += 16 * together)
        value_tile<Stored, Queries, together>(p, v, ahead, begin, end, apart, D, d, acc);
    if constexpr (together > 4)
        for (; d + 64 <= D; d += 64) value_tile<Stored, Queries, 4>(p, v, ahead, begin, end, apart, D, d, acc);
    for (; d < D; d += 16) value_tile<Stored, Queries, 1>(p, v, ahead, begin, end, apart, D, d, acc);
}

template <int most_queries, class Stored>
void add_row_values(int row, int G, int begin, int end, const float* s, const ChunkBlocks<Stored>& at, int apart, int D, float* sums) {
    if (begin < end)
        each_tile_of<most_queries>(G, [&](auto t, int i) {
            i += row * G;
            add_values<Stored, t.queries>(s + i * CHUNK_SIZE, at.v, at.next, begin, end, apart, D, sums + i * D);
        });
}

// The weighted values of an item's rows of G queries each -> sums [queries][D]. Rows may see a few positions more than all of them do,
// before a window's start and after the diagonal.
template <int most_queries, class Stored>
void add_all_values(const Visible& see, const AttentionItem& item, int G, const float* s, const ChunkBlocks<Stored>& at, int apart, int D,
                    float* sums) {
    const int queries = item.rows * G, begin = see.common_begin, end = see.common_end;
    std::memset(sums, 0, sizeof(float) * queries * D);
    if (begin >= end) {
        for (int r = 0; r < item.rows; r++) add_row_values<most_queries>(r, G, see.begin[r], see.end[r], s, at, apart, D, sums);
        return;
    }
    for (int r = 0; r < item.rows; r++) add_row_values<most_queries>(r, G, see.begin[r], begin, s, at, apart, D, sums);
    each_tile_of<most_queries>(queries, [&](auto t, int i) {
        add_values<Stored, t.queries>(s + i * CHUNK_SIZE, at.v, at.next, begin, end, apart, D, sums + i * D);
    });
    for (int r = 0; r < item.rows; r++) add_row_values<most_queries>(r, G, end, see.end[r], s, at, apart, D, sums);
}

// Some rows of an item, whose queries share each load.
template <class Stored>
struct Attention {
    const AttentionJob& job;
    const AttentionItem item;
    const int D = job.head_size, G = job.heads / job.kv_heads, queries = item.rows * G;
    alignas(64) float q[MAX_HEAD_SIZE / SCORE_SIZE][MAX_QUERIES][SCORE_SIZE];
    alignas(64) float s[MAX_QUERIES * CHUNK_SIZE];          // scores, then weights
    alignas(64) float acc[MAX_QUERIES * MAX_HEAD_SIZE];
    ChunkBlocks<Stored> at;

    Attention(const AttentionJob& job, const AttentionItem& item) : job(job), item(item), at(job, int64_t(PAGE_SIZE) * D) {
        for (int i = 0; i < queries; i++) {
            const int64_t row = item.row + i / G, head = item.kv_head * G + i % G;
            for (int d = 0; d < D; d += 16)
                store(q[d / SCORE_SIZE][i] + d % SCORE_SIZE, load(job.q + (row * job.heads + head) * D + d));
        }
    }

    // The chunk's states are merged into m [queries], l [queries], total [queries][D], or, while these are `empty`, written there.
    // Chunk `next_chunk` of `following` (or null) is likely to be next.
    void add_chunk(int chunk, const AttentionItem* following, int next_chunk, float* m, float* l, float* total, bool& empty) {
        const Visible see(item, chunk, job.window);
        if (see.first >= see.last) return;
        at.find(item, chunk, see.first, see.last, following, next_chunk);
        const int first = see.first / PAGE_SIZE, pages = (see.last + PAGE_SIZE - 1) / PAGE_SIZE - first;
        each_tile(queries, [&](auto t, int i) {
            for (int from = 0; from < D; from += SCORE_SIZE)
                score_pages<Stored, t.queries>(q[from / SCORE_SIZE][i], at.k + first, at.v + first, pages, from, least(from + SCORE_SIZE, D),
                                               s + i * CHUNK_SIZE + first * PAGE_SIZE);
        });
        if (job.distances)
            for (int i = 0; i < queries; i++) {
                const int64_t head = item.kv_head * G + i % G, from = job.reach + int64_t(chunk) * CHUNK_SIZE - (item.position + i / G);
                const float* const added = job.distances + head * 2 * job.reach + from;
                for (int p = first * PAGE_SIZE; p < (first + pages) * PAGE_SIZE; p += PAGE_SIZE)
                    store(s + i * CHUNK_SIZE + p, load(s + i * CHUNK_SIZE + p) + load(added + p));
            }
        if (job.softcap > 0.0f)
            for (int i = 0; i < queries; i++)
                for (int p = first; p < first + pages; p++) {
                    float* scores = s + i * CHUNK_SIZE + p * PAGE_SIZE;
                    store(scores, capped(load(scores), all(job.softcap)));
                }
        float largest[MAX_QUERIES], sums[MAX_QUERIES];
        const int lines = D * PAGE_SIZE * int(sizeof(Stored)) / 64 / (2 * queries);       // half of the next keys
        for (int i = 0; i < queries; i++) {
            const int r = i / G;
            largest[i] = LOWEST, sums[i] = 0.0f;
            if (see.begin[r] < see.end[r])
                softmax(s + i * CHUNK_SIZE, see.begin[r], see.end[r], &largest[i], &sums[i], at.next, i * lines, lines);
        }
        add_all_values<QUERIES_IN_REGISTERS>(see, item, G, s, at, D, D, empty ? total : acc);
        for (int i = 0; i < queries; i++) {
            if (empty) m[i] = largest[i], l[i] = sums[i];
            else merge_state(m + i, l + i, total + i * D, largest[i], sums[i], acc + i * D, D);
        }
        empty = false;
    }
};

void attend(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    if (job.cache_type == Element::float32) attend_to<Attention<float>>(job, item, following, state);
    if (job.cache_type == Element::float16) attend_to<Attention<Half>>(job, item, following, state);
    if (job.cache_type == Element::bfloat16) attend_to<Attention<Bfloat>>(job, item, following, state);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
