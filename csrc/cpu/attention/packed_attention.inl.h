// op       paged_attention over pages of the type q8_0, whose queries, keys and values are turned (turn.inl.h); over latents too
// shapes   q [T, Hq, D] float32 (scaled, turned), pages [P][Hk][2][17 * D] bytes (attention.h) -> out [T, Hq * D] float32, turned back;
//          of latents [P][17 * D] bytes -> out [T, H * Dv]
// mapping  as paged_attention.inl.h; few queries share each load of K and V. Latents lie as V does: the keys of a page are transposed
//          once for all queries of an item
// cost     17 / 8 * D bytes of cache per (position, kv head), half of that of latents. Scores take D / 4 integer instructions of 16 lanes per (query, 16
//          positions), values D / 16 multiply-adds per (query, position)
// numerics a query is rounded to integers in blocks of 32, as rows of x are for products. A score is a chain in float32 over these blocks:
//          a block's sum of 32 products is exact, and is multiplied by both scales. A value's sum is one chain over the chunk's
//          positions; each weight times the position's scale is rounded once. All else as paged_attention.inl.h says
#include "cpu/attention/attention_states.inl.h"
#include "cpu/tiles/dots.h"

namespace dc {
namespace DC_ISA {
namespace {

constexpr int FEW_QUERIES = REGISTERS >= 32 ? 4 : 2;
constexpr int WIDE_BLOCKS = REGISTERS >= 32 ? 2 : 1;        // of 32 values whose sums stay in registers
constexpr int MAX_PACKED_SIZE = most(MAX_HEAD_SIZE, MAX_LATENT_SIZE);
constexpr int MAX_BLOCKS = MAX_PACKED_SIZE / PACKED_BLOCK;

const Half* scales_of(const uint8_t* block, int D) { return reinterpret_cast<const Half*>(block + PAGE_SIZE * D); }

struct PackedQueries {
    alignas(64) int8_t codes[MAX_QUERIES][MAX_PACKED_SIZE];
    float scales[MAX_QUERIES][MAX_BLOCKS];
    int32_t minus[MAX_QUERIES][MAX_BLOCKS];                 // minus the sum of a block's codes
};

// The scores of some queries, from `first` on, with the keys of a page; half a line of each `ahead` for each chunk.
template <int Queries>
DC_INLINE void score_page(const PackedQueries& q, int first, const uint8_t* k, const uint8_t* ahead, int D, float* s) {
    Lanes sums[Queries];
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++) sums[i] = all(0.0f);
    for (int b = 0; b < D / PACKED_BLOCK; b++) {
        Sum dots[Queries];
#pragma GCC unroll 16
        for (int i = 0; i < Queries; i++) dots[i] = SignedDot::begin<7>(q.minus[first + i][b]);
#pragma GCC unroll 8
        for (int c = 0; c < PACKED_BLOCK / 4; c++) {
            prefetch(ahead + (b * PACKED_BLOCK + 4 * c) * PAGE_SIZE);
            const auto keys = SignedDot::weights(load_words(k + (b * PACKED_BLOCK + 4 * c) * PAGE_SIZE));
#pragma GCC unroll 16
            for (int i = 0; i < Queries; i++) SignedDot::dot(dots[i], keys, q.codes[first + i] + b * PACKED_BLOCK + 4 * c);
        }
        const Lanes scales = load(scales_of(k, D) + b * PAGE_SIZE);
#pragma GCC unroll 16
        for (int i = 0; i < Queries; i++)
            sums[i] = fma(to_floats(SignedDot::end<7>(dots[i], q.minus[first + i][b])), scales * all(q.scales[first + i][b]), sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++) store(s + i * CHUNK_SIZE, sums[i]);
}

template <int Queries>
__attribute__((noinline)) void score_packed_pages(const PackedQueries& q, int first, const uint8_t* const* k,
                                                  const uint8_t* const* ahead, int pages, int D, float* s) {
    for (int p = 0; p < pages; p++) score_page<Queries>(q, first, k[p], ahead[p], D, s + p * PAGE_SIZE);
}

// The signed codes [16][D] of a page of latents -> unsigned ones, [D / 4][16][4].
void transpose_codes(const uint8_t* rows, int D, uint8_t* to) {
#if defined(__AVX2__)
    const __m256i offset = _mm256_set1_epi8(-128);
    for (int d = 0; d < D; d += 32)
        for (int half = 0; half < 2; half++) {              // 8 rows, of 8 words each
            __m256i row[8], pairs[8], fours[8];
            for (int i = 0; i < 8; i++) {
                const uint8_t* const from = rows + (8 * half + i) * D + d;
                row[i] = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), offset);
            }
            for (int i = 0; i < 8; i += 2) {
                pairs[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
                pairs[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
                    fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
                }
            uint8_t* const words = to + d * PAGE_SIZE + 32 * half;
            for (int i = 0; i < 4; i++) {
                const __m256i low = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
                const __m256i high = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 64 * i), low);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 64 * (i + 4)), high);
            }
        }
#else
    for (int d = 0; d < D; d += 4)
        for (int i = 0; i < PAGE_SIZE; i++) {
            uint32_t word;
            std::memcpy(&word, rows + i * D + d, 4);
            word ^= 0x80808080u;
            std::memcpy(to + d * PAGE_SIZE + 4 * i, &word, 4);
        }
#endif
}

using Weights = float[MAX_QUERIES * CHUNK_SIZE];            // of positions, times their scales

// acc[query][d ..] += the sum over positions [begin, end) of weights[block][query][position] * code, for `Blocks` blocks of 32. The
// codes of positions are `apart` bytes apart
template <int Queries, int Blocks>
__attribute__((noinline)) void add_packed_values(const Weights* weights, int first, const uint8_t* const* v, const uint8_t* const* ahead,
                                                 int begin, int end, int apart, int D, int d, float* acc) {
    Lanes sums[Queries][2 * Blocks];
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * Blocks; j++) sums[i][j] = load(acc + i * D + d + 16 * j);
    while (begin < end) {
        const int page_end = least(end, (begin | (PAGE_SIZE - 1)) + 1);
        const uint8_t* row = v[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * apart + d;
        const uint8_t* row_ahead = ahead[begin / PAGE_SIZE] + (begin % PAGE_SIZE) * apart + d;
        for (; begin < page_end; begin++, row += apart, row_ahead += apart) {
            prefetch(row_ahead);
            Lanes values[2 * Blocks];
#pragma GCC unroll 16
            for (int j = 0; j < 2 * Blocks; j++) values[j] = lanes_of_signed_bytes(row + 16 * j);
#pragma GCC unroll 16
            for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
                for (int j = 0; j < 2 * Blocks; j++)
                    sums[i][j] = fma(all(weights[j / 2][(first + i) * CHUNK_SIZE + begin]), values[j], sums[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * Blocks; j++) store(acc + i * D + d + 16 * j, sums[i][j]);
}

// Some rows of an item, whose queries share each load.
template <bool of_latents>
struct PackedAttention {
    const AttentionJob& job;
    const AttentionItem item;
    const int D = job.head_size, Dv = job.values(), G = job.heads / job.kv_heads, queries = item.rows * G;
    PackedQueries q;
    alignas(64) float s[MAX_QUERIES * CHUNK_SIZE];          // scores, then weights
    alignas(64) Weights scaled[WIDE_BLOCKS];
    alignas(64) float acc[MAX_QUERIES * MAX_HEAD_SIZE];
    ChunkBlocks<uint8_t> at;

    PackedAttention(const AttentionJob& job, const AttentionItem& item) 
        : job(job), item(item), at(job, of_latents ? 0 : block_bytes(Element::q8_0, D)) {
        for (int i = 0; i < queries; i++) {
            const float* from = job.q + (int64_t(item.row + i / G) * job.heads + item.kv_head * G + i % G) * D;
            for (int b = 0; b < D / PACKED_BLOCK; b++) {
                const float* x = from + b * PACKED_BLOCK;
                const Quantized block = quantize_block(load(x), load(x + 16), q.codes[i] + b * PACKED_BLOCK);
                q.scales[i][b] = block.scale, q.minus[i][b] = -(block.sum.low + block.sum.high);
            }
        }
    }

    // As Attention's.
    void add_chunk(int chunk, const AttentionItem* following, int next_chunk, float* m, float* l, float* total, bool& empty) {
        const Visible see(item, chunk, job.window);
        if (see.first >= see.last) return;
        at.find(item, chunk, see.first, see.last, following, next_chunk);
        const int first = see.first / PAGE_SIZE, pages = (see.last + PAGE_SIZE - 1) / PAGE_SIZE - first;
        if constexpr (of_latents) score_latents(first, pages);
        else score(at.k + first, at.v + first, pages, s + first * PAGE_SIZE);
        if (job.softcap > 0.0f)
            for (int i = 0; i < queries; i++)
                for (int p = first; p < first + pages; p++) {
                    float* scores = s + i * CHUNK_SIZE + p * PAGE_SIZE;
                    store(scores, capped(load(scores), all(job.softcap)));
                }
        float largest[MAX_QUERIES], sums[MAX_QUERIES];
        const int lines = D / 4 / (2 * queries);            // half of the next keys
        for (int i = 0; i < queries; i++) {
            const int r = i / G;
            largest[i] = LOWEST, sums[i] = 0.0f;
            if (see.begin[r] < see.end[r])
                softmax(s + i * CHUNK_SIZE, see.begin[r], see.end[r], &largest[i], &sums[i], at.next, i * lines, lines);
        }
        add_all_values(see, first, pages, empty ? total : acc);
        for (int i = 0; i < queries; i++) {
            if (empty) m[i] = largest[i], l[i] = sums[i];
            else merge_state(m + i, l + i, total + i * Dv, largest[i], sums[i], acc + i * Dv, Dv);
        }
        empty = false;
    }

    void score(const uint8_t* const* k, const uint8_t* const* ahead, int pages, float* scores) {
        each_tile_of<FEW_QUERIES>(queries, [&](auto t, int i) {
            score_packed_pages<t.queries>(q, i, k, ahead, pages, D, scores + i * CHUNK_SIZE);
        });
    }

    void score_latents(int first, int pages) {
        alignas(64) uint8_t keys[(PAGE_SIZE + 1) * MAX_LATENT_SIZE];         // of a page, as score_page reads them
        const uint8_t* const k = keys;
        for (int p = first; p < first + pages; p++) {
            transpose_codes(at.k[p], D, keys);
            std::memcpy(keys + PAGE_SIZE * D, at.k[p] + PAGE_SIZE * D, size_t(D));
            score(&k, p + 1 < first + pages ? at.k + p + 1 : at.next + first, 1, s + p * PAGE_SIZE);
        }
    }

    void add_all_values(const Visible& see, int first, int pages, float* sums) {
        std::memset(sums, 0, sizeof(float) * queries * Dv);
        constexpr int wide = WIDE_BLOCKS * PACKED_BLOCK;
        int d = 0;
        for (; d + wide <= Dv; d += wide) add_values_of<WIDE_BLOCKS>(see, first, pages, d, sums);
        for (; d < Dv; d += PACKED_BLOCK) add_values_of<1>(see, first, pages, d, sums);
    }

    // Rows may see a few positions more than all of them do, before a window's start and after the diagonal.
    template <int Blocks>
    void add_values_of(const Visible& see, int first, int pages, int d, float* sums) {
        for (int b = 0; b < Blocks; b++)
            for (int p = first; p < first + pages; p++) {
                const Lanes scales = load(scales_of(at.v[p], D) + (d / PACKED_BLOCK + b) * PAGE_SIZE);
                for (int i = p * PAGE_SIZE; i < queries * CHUNK_SIZE; i += CHUNK_SIZE) store(scaled[b] + i, load(s + i) * scales);
            }
        const auto add = [&](int from, int count, int begin, int end) {
            if (begin < end)
                each_tile_of<FEW_QUERIES>(count, [&](auto t, int i) {
                    add_packed_values<t.queries, Blocks>(scaled, from + i, at.v, at.next, begin, end, D, Dv, d, sums + (from + i) * Dv);
                });
        };
        const int begin = see.common_begin, end = see.common_end;
        const bool shared = begin < end;
        for (int r = 0; r < item.rows; r++) add(r * G, G, see.begin[r], shared ? begin : see.end[r]);
        if (!shared) return;
        add(0, queries, begin, end);
        for (int r = 0; r < item.rows; r++) add(r * G, G, end, see.end[r]);
    }
};

void attend_packed(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    attend_to<PackedAttention<false>>(job, item, following, state);
}

void attend_packed_latents(const AttentionJob& job, const AttentionItem& item, const AttentionItem* following, float* state) {
    attend_to<PackedAttention<true>>(job, item, following, state);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
