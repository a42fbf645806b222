// What attention over any type of cache has in common: tiles of queries, softmax, states and their merging, what each row sees.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/attention/turn.inl.h"
#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int MAX_QUERIES = WANTED_QUERIES > MAX_GROUP ? WANTED_QUERIES : MAX_GROUP;
constexpr float LOWEST = -3.402823466e38f;

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }

// Half a chunk is fetched while the other half is used: V during the scores, the next chunk's K after them. The processor's
// own prefetching stops at each block: 65 % of the read bandwidth without this, 85 to 90 % with it (Zen 5, two threads).
DC_INLINE void prefetch(const void* line) { __builtin_prefetch(line); }             // into L1

// ---- any number of queries as tiles of 12, 6, 4, 3, 2 or 1 that fit the registers, or of 16 and 10: visit(tile, first query)

template <int Queries> struct Tile { static constexpr int queries = Queries; };

template <int most_queries, class Visit>
void each_tile_of(int queries, Visit visit) {
    for (int i = 0; i < queries;) {
        const int left = queries - i;
        if (most_queries >= 16 && left >= 16) visit(Tile<least(16, most_queries)>(), i), i += 16;
        else if (most_queries >= 12 && left >= 12) visit(Tile<least(12, most_queries)>(), i), i += 12;
        else if (most_queries >= 16 && left >= 10) visit(Tile<least(10, most_queries)>(), i), i += 10;
        else if (most_queries >= 6 && left >= 6) visit(Tile<least(6, most_queries)>(), i), i += 6;
        else if (most_queries >= 4 && left >= 4) visit(Tile<least(4, most_queries)>(), i), i += 4;
        else if (most_queries >= 3 && left >= 3) visit(Tile<least(3, most_queries)>(), i), i += 3;
        else if (left >= 2) visit(Tile<2>(), i), i += 2;
        else visit(Tile<1>(), i), i += 1;
    }
}

template <class Visit>
void each_tile(int queries, Visit visit) { each_tile_of<QUERIES_IN_REGISTERS>(queries, visit); }

// ---- states

// Scores [begin, end) of one query become exp(score - largest), the others of their pages 0; -> largest and sum.
// Meanwhile `lines` cache lines of each page `ahead` are fetched.
template <class Stored>
void softmax(float* s, int begin, int end, float* largest, float* total, const Stored* const* ahead, int from, int lines) {
    const int first = begin / PAGE_SIZE, last = (end + PAGE_SIZE - 1) / PAGE_SIZE;
    Lanes top = all(LOWEST);
    for (int p = first; p < last; p++) {
        Lanes x = load(s + p * PAGE_SIZE);
        if (begin > p * PAGE_SIZE || end < (p + 1) * PAGE_SIZE) {
            x = keep(x, most(begin - p * PAGE_SIZE, 0), least(end - p * PAGE_SIZE, PAGE_SIZE), -__builtin_inff());
            store(s + p * PAGE_SIZE, x);
        }
        top = maximum(top, x);
    }
    *largest = maximum(top);
    Lanes sums = all(0.0f);
    for (int p = first; p < last; p++) {
        Lanes e = exp_negative(load(s + p * PAGE_SIZE) - all(*largest));
        store(s + p * PAGE_SIZE, e);
        sums = sums + e;
        for (int line = from; line < from + lines; line++) prefetch(ahead[p] + line * (64 / sizeof(Stored)));
    }
    *total = sum(sums);
}

// (m, l, acc) takes in the state of the next positions; l == 0 is the empty state.
void merge_state(float* m, float* l, float* acc, float m2, float l2, const float* acc2, int D) {
    if (l2 == 0.0f) return;
    if (*l == 0.0f) {
        *m = m2, *l = l2;
        for (int d = 0; d < D; d += 16) store(acc + d, load(acc2 + d));
        return;
    }
    const float top = *m > m2 ? *m : m2;
    const float a = exp_negative(*m - top), b = exp_negative(m2 - top);
    *m = top, *l = fma1(*l, a, l2 * b);
    for (int d = 0; d < D; d += 16) store(acc + d, fma(load(acc + d), all(a), load(acc2 + d) * all(b)));
}

// What the values' sum is multiplied by: 1 / (the sum of exp, with the sink's). l is not 0.
float share_of(const AttentionJob& job, int64_t head, float m, float l) {
    if (!job.sinks) return 1.0f / l;
    const float sink = job.sinks[head], top = m > sink ? m : sink, own = exp_negative(m - top);
    return own / fma1(l, own, exp_negative(sink - top));
}

// Query i of the item.
void write_out(const AttentionJob& job, const AttentionItem& item, int i, float m, float l, const float* acc) {
    const int D = job.values(), G = job.heads / job.kv_heads;
    const int64_t head = int64_t(item.row + i / G) * job.heads + item.kv_head * G + i % G;
    float* out = job.out + head * D;
    if (l == 0.0f) {                        // it saw nothing, and its acc was never written
        for (int d = 0; d < D; d += 16) store(out + d, all(0.0f));
        return;
    }
    const Lanes scale = all(share_of(job, item.kv_head * G + i % G, m, l));
    for (int d = 0; d < D; d += 16) store(out + d, load(acc + d) * scale);
    if (job.cache_type == Element::q8_0) turn(out, D);
}

// ---- one item

// Which positions of a chunk each row sees, relative to the chunk; an empty row has begin == end == 0.
struct Visible {
    int begin[MAX_QUERIES], end[MAX_QUERIES];
    int first = CHUNK_SIZE, last = 0;               // of any row
    int common_begin = 0, common_end = CHUNK_SIZE;  // of every row

    Visible(const AttentionItem& item, int chunk, int window) {
        for (int r = 0; r < item.rows; r++) {
            const int next = item.position + r + 1 - chunk * CHUNK_SIZE, ahead = item.text - chunk * CHUNK_SIZE;
            const int stop = !item.text ? most(next, item.ahead - chunk * CHUNK_SIZE) : window > 0 ? least(next + window, ahead) : ahead, start = item.text ? next - 1 - window : next - window;
            begin[r] = window > 0 ? least(most(start, 0), CHUNK_SIZE) : 0;
            end[r] = least(stop, CHUNK_SIZE);
            if (begin[r] >= end[r]) begin[r] = end[r] = 0;
            if (begin[r] < end[r]) first = least(first, begin[r]), last = most(last, end[r]);
            common_begin = most(common_begin, begin[r]), common_end = least(common_end, end[r]);
        }
        if (common_begin > common_end) common_begin = common_end = 0;
    }
};

// Where a chunk's keys and values lie, and what is to be fetched meanwhile. `half`: elements from K to V of a page and kv head.
template <class Stored>
struct ChunkBlocks {
    const AttentionJob& job;
    const int64_t half;
    const Stored* k[CHUNK_PAGES];
    const Stored* v[CHUNK_PAGES];
    const Stored* next[CHUNK_PAGES];                        // k of what comes after this one

    ChunkBlocks(const AttentionJob& job, int64_t half) : job(job), half(half) {}

    const Stored* block(const AttentionItem& of, int64_t page) const {
        return static_cast<const Stored*>(job.cache) + of.pages[page] * job.page_stride + of.kv_head * 2 * half;
    }

    // The positions [first, last) of a chunk of `item`; chunk `next_chunk` of `following` (or null) is likely to be next.
    void find(const AttentionItem& item, int chunk, int first, int last, const AttentionItem* following, int next_chunk) {
        int next_pages = 0;
        if (following && next_chunk < following->chunk_end)             // a padding row has no pages
            next_pages = (following->end - 1) / PAGE_SIZE + 1 - next_chunk * CHUNK_PAGES;
        for (int p = first / PAGE_SIZE; p * PAGE_SIZE < last; p++) {
            k[p] = block(item, int64_t(chunk) * CHUNK_PAGES + p);
            v[p] = k[p] + half;
            next[p] = p < next_pages ? block(*following, int64_t(next_chunk) * CHUNK_PAGES + p) : v[p];
        }
    }
};

// Work: what has add_chunk for some rows of an item, of one type of cache
template <class Work>
void attend_to(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    const int D = job.values(), G = job.heads / job.kv_heads, queries = item.rows * G, together = rows_together(job.heads, job.kv_heads);
    alignas(64) float own[MAX_PARTS * MAX_QUERIES * (2 + MAX_LATENT_SIZE)];
    float* m = state ? state : own;
    float* l = m + queries;
    float* total = l + queries;
    bool empty[MAX_PARTS];
    for (int i = 0; i < queries; i++) m[i] = LOWEST, l[i] = 0.0f, empty[i / (together * G)] = true;
    for (int chunk = item.chunk_begin; chunk < item.chunk_end; chunk++)
        for (int first = 0; first < item.rows; first += together) {
            AttentionItem part = item;
            part.row += first, part.position += first, part.rows = least(together, item.rows - first);
            const bool is_last = first + together >= item.rows, ends = is_last && chunk + 1 == item.chunk_end;
            const int next_chunk = !ends ? chunk + is_last : following ? following->chunk_begin : 0, i = first * G;
            Work(job, part).add_chunk(chunk, ends ? following : &item, next_chunk, m + i, l + i, total + i * D, empty[first / together]);
        }
    for (int i = 0; !state && i < queries; i++) write_out(job, item, i, m[i], l[i], total + i * D);
}

void merge(const AttentionJob& job, const AttentionItem& item, const float* states, int count) {
    const int D = job.values(), queries = item.rows * (job.heads / job.kv_heads);
    const int64_t apart = state_floats(queries, D);
    alignas(64) float total[MAX_LATENT_SIZE];
    for (int i = 0; i < queries; i++) {
        float m = LOWEST, l = 0.0f;
        for (int c = 0; c < count; c++) {
            const float* state = states + c * apart;
            merge_state(&m, &l, total, state[i], state[queries + i], state + 2 * queries + i * D, D);
        }
        write_out(job, item, i, m, l, total);
    }
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
