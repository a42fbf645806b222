// op       paged_attention over latents (MLA): softmax(q K^T) V, where a position's value is the beginning of its key, for all heads alike
// shapes   q [T, H, D] float32 (scaled), pages [P][16 * D] (attention.h) -> out [T, H * Dv] float32
// mapping  as paged_attention.inl.h, with groups of at most 16 heads in the place of kv heads. A score is a product of two rows of D, so
//          keys lie as values do, and nothing is stored twice
// cost     D * element size bytes of cache per position and group, from memory for the first group and then from the cache; D + Dv
//          fused multiply-adds per (query, position), and a sum of 16 lanes
// numerics float32. A score is 16 chains over d, one for each lane, and a fixed tree. All else as paged_attention.inl.h says
#include "cpu/attention/attention_states.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

// Queries whose sums stay in registers. Whole groups of 16 or 10 heads go together where there are 32 registers, as each tile widens the
// keys and values anew.
constexpr int SCORED_QUERIES = REGISTERS >= 32 ? 16 : 2, ADDED_QUERIES = REGISTERS >= 32 ? 16 : QUERIES_IN_REGISTERS;
constexpr int keys_at_once(int queries) { return REGISTERS < 32 ? 2 : queries > 12 ? 1 : queries > 6 ? 2 : 4; }

// s[query][position] = q[query] . k[position], for some queries and keys_at_once positions
template <class Stored, int Queries>
DC_INLINE void score_rows(const float* q, const Stored* k, int D, float* s) {
    constexpr int Keys = keys_at_once(Queries), count = Queries * Keys;
    Lanes sums[count];
#pragma GCC unroll 32
    for (int n = 0; n < count; n++) sums[n] = all(0.0f);
    for (int d = 0; d < D; d += 16) {
        Lanes keys[Keys];
#pragma GCC unroll 16
        for (int j = 0; j < Keys; j++) keys[j] = load(k + j * D + d);
#pragma GCC unroll 16
        for (int i = 0; i < Queries; i++) {
            const Lanes x = load(q + i * D + d);
#pragma GCC unroll 16
            for (int j = 0; j < Keys; j++) sums[i * Keys + j] = fma(x, keys[j], sums[i * Keys + j]);
        }
    }
    float scores[count];
    constexpr int fours = count / 4 * 4;
#pragma GCC unroll 8
    for (int n = 0; n < fours; n += 4) store_sums(sums[n], sums[n + 1], sums[n + 2], sums[n + 3], scores + n);
    for (int n = fours; n < count; n++) scores[n] = sum(sums[n]);
    for (int i = 0; i < Queries; i++)
        for (int j = 0; j < Keys; j++) s[i * CHUNK_SIZE + j] = scores[i * Keys + j];
}

template <class Stored, int Queries>
__attribute__((noinline)) void score_latents(const float* q, const Stored* const* k, int pages, int D, float* s) {
    for (int p = 0; p < pages; p++)
        for (int j = 0; j < PAGE_SIZE; j += keys_at_once(Queries)) score_rows<Stored, Queries>(q, k[p] + j * D, D, s + p * PAGE_SIZE + j);
}

// Some rows of an item, whose queries share each load.
template <class Stored>
struct LatentAttention {
    const AttentionJob& job;
    const AttentionItem item;
    const int D = job.head_size, Dv = job.value_size, G = job.heads / job.kv_heads, queries = item.rows * G;
    alignas(64) float q[MAX_QUERIES * MAX_LATENT_SIZE];
    alignas(64) float s[MAX_QUERIES * CHUNK_SIZE];          // scores, then weights
    alignas(64) float acc[MAX_QUERIES * MAX_LATENT_SIZE];
    ChunkBlocks<Stored> at;

    LatentAttention(const AttentionJob& job, const AttentionItem& item) : job(job), item(item), at(job, 0) {
        for (int i = 0; i < queries; i++) {
            const int64_t row = item.row + i / G, head = item.kv_head * G + i % G;
            std::memcpy(q + i * D, job.q + (row * job.heads + head) * D, sizeof(float) * size_t(D));
        }
    }

    // As that of Attention.
    void add_chunk(int chunk, const AttentionItem* following, int next_chunk, float* m, float* l, float* total, bool& empty) {
        const Visible see(item, chunk, job.window);
        if (see.first >= see.last) return;
        at.find(item, chunk, see.first, see.last, following, next_chunk);
        const int first = see.first / PAGE_SIZE, pages = (see.last + PAGE_SIZE - 1) / PAGE_SIZE - first;
        each_tile_of<SCORED_QUERIES>(queries, [&](auto t, int i) {
            score_latents<Stored, t.queries>(q + i * D, at.k + first, pages, D, s + i * CHUNK_SIZE + first * PAGE_SIZE);
        });
        float largest[MAX_QUERIES], sums[MAX_QUERIES];
        const int lines = D * PAGE_SIZE * int(sizeof(Stored)) / 64 / (2 * queries);
        for (int i = 0; i < queries; i++) {
            const int r = i / G;
            largest[i] = LOWEST, sums[i] = 0.0f;
            if (see.begin[r] < see.end[r])
                softmax(s + i * CHUNK_SIZE, see.begin[r], see.end[r], &largest[i], &sums[i], at.next, i * lines, lines);
        }
        add_all_values<ADDED_QUERIES>(see, item, G, s, at, D, Dv, empty ? total : acc);
        for (int i = 0; i < queries; i++) {
            if (empty) m[i] = largest[i], l[i] = sums[i];
            else merge_state(m + i, l + i, total + i * Dv, largest[i], sums[i], acc + i * Dv, Dv);
        }
        empty = false;
    }
};

void attend_latents(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    if (job.cache_type == Element::float32) attend_to<LatentAttention<float>>(job, item, following, state);
    if (job.cache_type == Element::float16) attend_to<LatentAttention<Half>>(job, item, following, state);
    if (job.cache_type == Element::bfloat16) attend_to<LatentAttention<Bfloat>>(job, item, following, state);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
