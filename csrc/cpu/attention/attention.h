// rope_append and paged_attention on CPU: what their kernels receive, and which instruction sets have them.
//
// The KV cache of one layer on a CPU is [P][Hk][2][16 * D] elements of float32, float16 or bfloat16: P pages of 16 positions. Pages
// may be apart, with other layers' pages between them. A page has two blocks for each kv head. The first holds K transposed,
// [D][16], so that 16 scores are one vector without any horizontal sum. The second holds V, [16][D]. They lie side by side because
// attention reads both.
//
// Pages of the type q8_0 are [P][Hk][2][17 * D] bytes. K has unsigned codes, which are integers + 128, as [D / 4][16][4]. V has
// signed codes, [16][D]. After each come float16 scales, [D / 32][16], one for each 32 numbers of D. D is a power of two, and
// turn.inl.h turns q, K and V.
//
// A layer with latent attention (MLA) has [P][16 * D] elements: for each position of a page a key of D numbers, the first of which are
// its value. All query heads read it. Of the type q8_0 it has [P][17 * D] bytes: signed codes, [16][D], and after them float16 scales,
// [D / 32][16]. The value and what follows it are turned each by itself, both of a size that is a power of two.
#pragma once

#include <cstdint>

#include "contract.h"
#include "cpu/cpu.h"

namespace dc {

constexpr int CHUNK_SIZE = 256;             // positions whose softmax is one state; states are merged in the order of positions
constexpr int CHUNK_PAGES = CHUNK_SIZE / PAGE_SIZE;
constexpr int MAX_HEAD_SIZE = 512;
constexpr int SCORE_SIZE = 256;             // numbers of D that scores take at once; larger heads take one such part after another
constexpr int MAX_LATENT_SIZE = 576;        // D of latent attention
constexpr int MAX_GROUP = 16;               // query heads of one kv head
constexpr int WANTED_QUERIES = 12;          // (row, head) pairs that share each load of K and V in a prompt's chunk
constexpr int MAX_PARTS = 8;                // so many times these pairs go through a chunk while it is in the second cache
static inline int rows_together(int heads, int kv_heads) { return heads / kv_heads < WANTED_QUERIES ? WANTED_QUERIES / (heads / kv_heads) : 1; }

constexpr int PACKED_BLOCK = 32;            // values of a head that share a scale in q8_0

enum class Element : int { float32 = 0, float16 = 1, bfloat16 = 2, q8_0 = 3 };      // only pages are q8_0
static inline int bytes_of(Element type) { return type == Element::float32 ? 4 : type == Element::q8_0 ? 1 : 2; }
static inline int64_t block_bytes(Element type, int head_size) {        // K or V of a page and kv head
    return int64_t(PAGE_SIZE + (type == Element::q8_0)) * head_size * bytes_of(type);
}
enum class QkNorm : int { none = 0, before_rope = 1, after_rope = 2 };

// ---- rope_append: rows of qkv [T, (Hq + 2 Hk) * D] -> q_out [T, Hq, D] float32 and the pages. Without v in qkv, v is what k is
// before its norm. With kv_heads 0 there is only q, and the cache is another layer's.

struct RopeJob {
    const float* qkv;                       // `row_stride` elements apart
    int64_t row_stride;
    int64_t rows;
    int heads, kv_heads, head_size;
    const int64_t* positions;               // [T]
    const int64_t* slots;                   // [T] page * 16 + offset; -1: a padding row, which is left alone
    const float* cos;                       // [max_positions, half_rotated]
    const float* sin;
    int half_rotated;                       // D / 2 or less: dims at and after 2 * half_rotated keep their values
    QkNorm norm;
    const float* q_norm;                    // [D] or null
    const float* k_norm;
    float epsilon;
    float post_scale;                       // of q and k, after norm and rotation
    float q_scale;                          // of q only: 1 / sqrt(D)
    const float* value_embed;               // [T, Hk * D], or null
    int64_t value_stride;
    const float* gate;                      // [T, Hk]
    int64_t gate_stride;
    float gate_scale;                       // v += gate_scale * sigmoid(gate) * value_embed
    float* q_out;                           // [T, Hq, D]
    void* cache;                            // one layer's
    Element cache_type;
    int64_t page_stride;                    // elements from page to page
    bool value_norm;                        // v is normalized first, without weights
    bool values_from_keys;
};

// ---- paged_attention: q [T, Hq, D] float32, scaled already -> out [T, Hq * D] float32

struct AttentionJob {
    const float* q;
    const void* cache;                      // one layer's
    Element cache_type;
    float* out;
    int heads, kv_heads, head_size;
    int window;                             // keys that a row sees, its own included; 0: all. In a text, on either side of itself
    float softcap;                          // scores become softcap * tanh(score / softcap); 0: they stay
    const float* sinks;                     // [Hq] one more score for each head, whose value is 0; or null
    int64_t page_stride;                    // elements from page to page
    const float* distances = nullptr;       // [Hq][2 * reach]: scores get the one at reach + (key's position - query's); or null
    int64_t reach = 0;                      // at least the length of any text, and a page more
    int value_size = 0;                     // > 0: of latents, whose first so many numbers are values. kv heads are then groups of heads
    int values() const { return value_size ? value_size : head_size; }      // of each head of `out`
};

// Some consecutive rows of one sequence, one kv head, and some of the chunks that these rows see.
struct AttentionItem {
    const int32_t* pages;                   // of the sequence
    int32_t row, rows;
    int32_t position;                       // of the first row
    int32_t text;                           // > 0: length of a text whose rows see both sides; 0: a row sees positions up to itself
    int32_t ahead;                          // rows also see later positions, if they are before this one; 0: they do not
    int32_t end;                            // after the last position that any of its rows sees
    int32_t kv_head;
    int32_t chunk_begin, chunk_end;
    int32_t merge;                          // number of a counter, whose last item merges all its states; -1: there is nothing to merge
    int32_t merge_count;                    // how many states the counter has, in the order of their chunks
    int64_t merge_begin, state;             // where the counter's states begin, and where this item's goes, in queries
};

// A state has m and l (largest score, sum of exp) of each of rows * Hq / Hk queries, and then acc [values] of each query.
static inline int64_t state_floats(int queries, int values) { return int64_t(queries) * (2 + values); }

struct AttentionKernels {
    void (*rope_rows)(const RopeJob&, int64_t begin, int64_t end);
    // state == nullptr: the item covers every chunk, so it writes out. `following` (or null) is probably this thread's next item.
    void (*attend)(const AttentionJob&, const AttentionItem&, const AttentionItem* following, float* state);
    // merge `count` consecutive states, in order, and write out
    void (*merge)(const AttentionJob&, const AttentionItem&, const float* states, int count);
    void (*attend_latents)(const AttentionJob&, const AttentionItem&, const AttentionItem* following, float* state) = nullptr;
    // Of q8_0 alone: turns a key or query of latents, `values` of whose D numbers are a value; writes a key, which it turns, to a page.
    void (*turn_latent)(float* x, int head_size, int values) = nullptr;
    void (*pack_latent)(float* key, int head_size, int values, uint8_t* page, int64_t offset) = nullptr;
};

DC_EACH_ISA(extern const AttentionKernels attention_kernels)
DC_EACH_ISA(extern const AttentionKernels packed_attention_kernels)     // of q8_0
// avx2 and neon with another dot product: see Dot
namespace avxvnni { extern const AttentionKernels packed_attention_kernels; }
namespace evex { extern const AttentionKernels packed_attention_kernels; }
namespace dotprod { extern const AttentionKernels packed_attention_kernels; }
namespace i8mm { extern const AttentionKernels packed_attention_kernels; }
const AttentionKernels& attention_kernels_of(Element cache_type);

}  // namespace dc
