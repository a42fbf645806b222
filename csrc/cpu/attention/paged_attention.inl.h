// op       paged_attention: softmax(q K^T) V, the scores capped if the job says so, over each row's own pages, for decode rows and for prompt chunks
// shapes   q [T, Hq, D] float32 (scaled), pages [P][Hk][2][16 * D] (attention.h) -> out [T, Hq * D] float32
// mapping  one item = (rows of one sequence, kv head, chunks of 256 positions); the Hq / Hk heads of each row are the
//          item's queries, of which 12 share each load of K and V in registers; in a chunk: all scores, softmax, weighted values
// cost     2 * D * element size bytes of cache per (position, kv head), read once per item: the limit when decoding;
//          2 * D fused multiply-adds per (query, position): the limit in prefill
// numerics float32. A score is one chain over d; a value's sum one chain over the chunk's positions; exp's sum 16 lanes
//          and a fixed tree. Chunks begin at multiples of 256 and merge in order. So the bits of a row depend on its
//          own q, K, V and sinks alone: not on batch, threads, tiles or instruction set. Slots that a row does not see are
//          never used, whatever they hold.
#include "cpu/attention/attention.h"
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

// Pages of keys, or vectors of values, whose sums for so many queries stay in registers.
constexpr int in_registers(int queries) {
    return REGISTERS >= 32 ? (queries > 6 ? 2 : queries > 2 ? 4 : 8) : queries > 3 ? 1 : queries > 1 ? 2 : 4;
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

// ---- values: acc[query][d] += sum over positions [begin, end) of p[query][position] * V[position][d], one chain each

template <class Stored, int Queries, int Vectors>
DC_INLINE void value_tile(const float* p, const Stored* const* v, const Stored* const* ahead, int begin, int end, int D,
                          int d, float* acc) {
    Lanes sums[Queries][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; j++) sums[i][j] = load(acc + i * D + d + 16 * j);
    while (begin < end) {
        const int page_end = least(end, (begin | (PAGE_SIZE - 1)) + 1);
        const Stored* row = v[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * D + d;
        const Stored* row_ahead = ahead[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * D + d;
        for (; begin < page_end; begin++, row += D, row_ahead += D) {
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
                                          int end, int D, float* acc) {
    constexpr int together = in_registers(Queries);
    int d = 0;
    for (; d + 16 * together <= D; d += 16 * together)
        value_tile<Stored, Queries, together>(p, v, ahead, begin, end, D, d, acc);
    if constexpr (together > 4)
        for (; d + 64 <= D; d += 64) value_tile<Stored, Queries, 4>(p, v, ahead, begin, end, D, d, acc);
    for (; d < D; d += 16) value_tile<Stored, Queries, 1>(p, v, ahead, begin, end, D, d, acc);
}

// ---- any number of queries as tiles of 12, 6, 4, 3, 2 or 1 that fit the registers: visit(tile, first query)

template <int Queries> struct Tile { static constexpr int queries = Queries; };

template <class Visit>
void each_tile(int queries, Visit visit) {
    constexpr int most_queries = QUERIES_IN_REGISTERS;
    for (int i = 0; i < queries;) {
        const int left = queries - i;
        if (most_queries >= 12 && left >= 12) visit(Tile<least(12, most_queries)>(), i), i += 12;
        else if (most_queries >= 6 && left >= 6) visit(Tile<least(6, most_queries)>(), i), i += 6;
        else if (left >= 4) visit(Tile<4>(), i), i += 4;
        else if (left == 3) visit(Tile<3>(), i), i += 3;
        else if (left == 2) visit(Tile<2>(), i), i += 2;
        else visit(Tile<1>(), i), i += 1;
    }
}

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
    const int D = job.head_size, G = job.heads / job.kv_heads;
    const int64_t head = int64_t(item.row + i / G) * job.heads + item.kv_head * G + i % G;
    float* out = job.out + head * D;
    if (l == 0.0f) {                        // it saw nothing, and nobody wrote its acc
        for (int d = 0; d < D; d += 16) store(out + d, all(0.0f));
        return;
    }
    const Lanes scale = all(share_of(job, item.kv_head * G + i % G, m, l));
    for (int d = 0; d < D; d += 16) store(out + d, load(acc + d) * scale);
}

// ---- one item

// Which positions of a chunk each row sees, relative to the chunk; an empty row has begin == end == 0.
struct Visible {
    int begin[MAX_QUERIES], end[MAX_QUERIES];
    int first = CHUNK_SIZE, last = 0;               // of any row
    int common_begin = 0, common_end = CHUNK_SIZE;  // of every row

    Visible(const AttentionItem& item, int chunk, int window) {
        for (int r = 0; r < item.rows; r++) {
            const int stop = item.position + r + 1 - chunk * CHUNK_SIZE;
            begin[r] = window > 0 ? least(most(stop - window, 0), CHUNK_SIZE) : 0;
            end[r] = least(stop, CHUNK_SIZE);
            if (begin[r] >= end[r]) begin[r] = end[r] = 0;
            if (begin[r] < end[r]) first = least(first, begin[r]), last = most(last, end[r]);
            common_begin = most(common_begin, begin[r]), common_end = least(common_end, end[r]);
        }
        if (common_begin > common_end) common_begin = common_end = 0;
    }
};

// Some rows of an item, whose queries share each load.
template <class Stored>
struct Attention {
    const AttentionJob& job;
    const AttentionItem item;
    const int D = job.head_size, G = job.heads / job.kv_heads, queries = item.rows * G;
    alignas(64) float q[MAX_HEAD_SIZE / SCORE_SIZE][MAX_QUERIES][SCORE_SIZE];
    alignas(64) float s[MAX_QUERIES * CHUNK_SIZE];          // scores, then weights
    alignas(64) float acc[MAX_QUERIES * MAX_HEAD_SIZE];
    const Stored* k[CHUNK_PAGES];                           // [D][16]
    const Stored* v[CHUNK_PAGES];                           // [16][D]
    const Stored* next[CHUNK_PAGES];                        // k of what comes after this one, to be fetched meanwhile

    Attention(const AttentionJob& job, const AttentionItem& item) : job(job), item(item) {
        for (int i = 0; i < queries; i++) {
            const int64_t row = item.row + i / G, head = item.kv_head * G + i % G;
            for (int d = 0; d < D; d += 16)
                store(q[d / SCORE_SIZE][i] + d % SCORE_SIZE, load(job.q + (row * job.heads + head) * D + d));
        }
    }

    const Stored* block(const AttentionItem& of, int64_t page) const {
        return static_cast<const Stored*>(job.cache) + of.pages[page] * job.page_stride + int64_t(of.kv_head) * 2 * PAGE_SIZE * D;
    }

    void find_pages(int chunk, int first, int last, const AttentionItem* following, int next_chunk) {
        int next_pages = 0;
        if (following && next_chunk < following->chunk_end)             // a padding row has no pages
            next_pages = (following->position + following->rows - 1) / PAGE_SIZE + 1 - next_chunk * CHUNK_PAGES;
        for (int p = first / PAGE_SIZE; p * PAGE_SIZE < last; p++) {
            k[p] = block(item, int64_t(chunk) * CHUNK_PAGES + p);
            v[p] = k[p] + PAGE_SIZE * D;
            next[p] = p < next_pages ? block(*following, int64_t(next_chunk) * CHUNK_PAGES + p) : v[p];
        }
    }

    // The chunk's states are merged into m [queries], l [queries], total [queries][D], or, while these are `empty`, written there.
    // Chunk `next_chunk` of `following` (or null) is likely to be next.
    void add_chunk(int chunk, const AttentionItem* following, int next_chunk, float* m, float* l, float* total, bool& empty) {
        const Visible see(item, chunk, job.window);
        if (see.first >= see.last) return;
        find_pages(chunk, see.first, see.last, following, next_chunk);
        const int first = see.first / PAGE_SIZE, pages = (see.last + PAGE_SIZE - 1) / PAGE_SIZE - first;
        each_tile(queries, [&](auto t, int i) {
            for (int from = 0; from < D; from += SCORE_SIZE)
                score_pages<Stored, t.queries>(q[from / SCORE_SIZE][i], k + first, v + first, pages, from, least(from + SCORE_SIZE, D),
                                               s + i * CHUNK_SIZE + first * PAGE_SIZE);
        });
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
                softmax(s + i * CHUNK_SIZE, see.begin[r], see.end[r], &largest[i], &sums[i], next, i * lines, lines);
        }
        add_all_values(see, empty ? total : acc);
        for (int i = 0; i < queries; i++) {
            if (empty) m[i] = largest[i], l[i] = sums[i];
            else merge_state(m + i, l + i, total + i * D, largest[i], sums[i], acc + i * D, D);
        }
        empty = false;
    }

    // Rows may see a few positions more than all of them do, before a window's start and after the diagonal.
    void add_all_values(const Visible& see, float* sums) {
        std::memset(sums, 0, sizeof(float) * queries * D);
        const int begin = see.common_begin, end = see.common_end;
        if (begin >= end) {
            for (int r = 0; r < item.rows; r++) add_row_values(r, see.begin[r], see.end[r], sums);
            return;
        }
        for (int r = 0; r < item.rows; r++) add_row_values(r, see.begin[r], begin, sums);
        each_tile(queries, [&](auto t, int i) {
            add_values<Stored, t.queries>(s + i * CHUNK_SIZE, v, next, begin, end, D, sums + i * D);
        });
        for (int r = 0; r < item.rows; r++) add_row_values(r, end, see.end[r], sums);
    }

    void add_row_values(int row, int begin, int end, float* sums) {
        if (begin < end)
            each_tile(G, [&](auto t, int i) {
                i += row * G;
                add_values<Stored, t.queries>(s + i * CHUNK_SIZE, v, next, begin, end, D, sums + i * D);
            });
    }
};

template <class Stored>
void attend_to(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    const int D = job.head_size, G = job.heads / job.kv_heads, queries = item.rows * G, together = rows_together(job.heads, job.kv_heads);
    alignas(64) float own[MAX_PARTS * MAX_QUERIES * (2 + MAX_HEAD_SIZE)];
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
            Attention<Stored>(job, part).add_chunk(chunk, ends ? following : &item, next_chunk, m + i, l + i, total + i * D, empty[first / together]);
        }
    for (int i = 0; !state && i < queries; i++) write_out(job, item, i, m[i], l[i], total + i * D);
}

void attend(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    if (job.cache_type == Element::float32) attend_to<float>(job, item, following, state);
    if (job.cache_type == Element::float16) attend_to<Half>(job, item, following, state);
    if (job.cache_type == Element::bfloat16) attend_to<Bfloat>(job, item, following, state);
}

void merge(const AttentionJob& job, const AttentionItem& item, const float* states, int count) {
    const int D = job.head_size, queries = item.rows * (job.heads / job.kv_heads);
    const int64_t apart = state_floats(queries, D);
    alignas(64) float total[MAX_HEAD_SIZE];
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
