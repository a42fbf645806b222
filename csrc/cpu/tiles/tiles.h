// Weight matrices (N, K) in tiles of 16 rows, and their product with rows of x: quantized and float weights alike.
//
//     prepare(type, x, ...)               x (T, K) f32 [-> RMS norm] -> int8 planes (q types) or f32 (float types), in panels
//     multiply(product, tiles, groups)    out = residual + activation(x W^T + bias), any part of it at a time
//
// A tile holds its 16 rows' weights side by side, lane r = row r, so that 16 outputs grow in one register, k after k:
//     f32, f16, bf16   [K][16]
//     q8_0             two blocks of 32 columns at a time: d f16 [2][16], then [2][8] chunks of 64 B: lane r = columns 4 c .. 4 c + 3
//                      of row r, stored + 128 (unsigned); an odd last block has a zero partner                     1,088 B for two
//     q4_0             a block: d f16 [16], then 4 chunks: lane r = bytes 4 c .. 4 c + 3 of GGUF's row r             288 B
//     q4_1             a block: d f16 [16], m f16 [16], then 4 chunks                                               320 B
// The last tile's missing rows are zero. K is a multiple of 32 for q types.
//
// For q types a block of 32 values of x is dx * x8 with x8 int8 and dx = max |x| / 127. Where dx is more than FINE_ABOVE times the
// mean over the row's blocks, it is dx * (x8 + fine / 256), about 16 bits. A model's outlier channels lie in these blocks, a
// seventh of all; they make most of the error: KL against float32 products 3.5e-3 without fine planes, 6e-4 with them.
//
// numerics  q: y = fma(d * dx, float(int32 sum), y) block after block, or fma(d / 256 * dx, float(256 * int32 sum + the fine one), y);
//           then (q4_1) y = fma(m, dx * (sum of x8 + sum of fine / 256), y). Float types: y = fma(w, x, y), k after k. One
//           accumulator for an output, starting at 0; then + bias, activation, + residual, each rounded. So a row's bits depend
//           on nothing but the row: not on T, ranges, threads, instruction set.
//           A block of x with |x| < 1e-24 counts as zero; one that holds a NaN, or more than 1e35, makes its row's outputs NaN:
//           between these neither d * dx nor d / 256 * dx leaves the normal floats, so that both forms above have the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

enum class Weight : int { f32 = 0, f16 = 1, bf16 = 2, q8_0 = 3, q4_0 = 4, q4_1 = 5 };
enum class Activation : int { none, swiglu, relu2 };    // swiglu: tiles alternate gate, up; columns 16 i.. from tiles 2 i, 2 i + 1

constexpr int TILE_ROWS = 16;
constexpr int BLOCK = 32;               // columns that share a scale
constexpr int GROUP_ROWS = 8;           // rows of x that meet each unpacked tile together

static constexpr bool is_float(Weight type) { return type <= Weight::bf16; }

struct Tiles {
    Weight type;
    int64_t rows, columns;              // N, K
    uint8_t* memory;                    // tile_count(rows) * tile_bytes(type, columns), aligned to 64
};

int64_t tile_count(int64_t rows);
int64_t tile_bytes(Weight type, int64_t columns);
int64_t row_bytes(Weight type, int64_t columns);        // of a row in GGUF's layout, or of float values

// ---- x made ready: groups of 8 rows, the rows of a group side by side

size_t prepared_bytes(Weight type, int64_t columns, int64_t rows);

// Rows [row_begin, row_end) of x, `stride` floats apart; any sub-range at a time, by any thread. norm: x / rms(x) (* norm_weight
// [columns] unless null), the bits of rms_norm. `prepared` is aligned to 64 and holds prepared_bytes for all the rows.
void prepare(Weight type, const float* x, int64_t stride, int64_t columns, int64_t row_begin, int64_t row_end, bool norm,
             const float* norm_weight, float epsilon, void* prepared);

// ---- the product

struct Product {
    Tiles tiles;
    const void* prepared;
    int64_t rows;                       // T
    const float* bias;                  // [tiles.rows], in the order of the tiles' rows, or null
    const float* residual;              // (T, out_columns) or null; may be `out`
    int64_t residual_stride;
    Activation activation;
    float* out;                         // (T, out_columns); nothing beyond out_columns is written
    int64_t out_stride, out_columns;    // out_columns: at most tiles.rows, for swiglu at most 16 for each pair of tiles
};

static inline int64_t group_count(int64_t rows) { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }

// Tiles [tile_begin, tile_end) (swiglu: both even) of tile_count, groups [group_begin, group_end) of group_count(rows).
void multiply(const Product& product, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end);

// ---- filling and reading tiles

// `rows` rows of `source`, row_stride bytes apart, into tiles first_tile, first_tile + tile_step, ...: floats become any type,
// q blocks (GGUF's) their own type only. Rounding is ggml's reference (equal to gguf.quants.quantize). Threads share the tiles.
void fill_tiles(const Tiles& to, const uint8_t* source, Weight source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                int64_t tile_step);

void embed_row(const Tiles& tiles, int64_t row, float* out);    // row `row` of the matrix, as f32 [columns]

// ---- per instruction set (DC_ISA avx512 needs VNNI as well; without it avx2 runs)

struct Preparation {
    Weight type;
    const float* x;
    int64_t stride, columns;
    bool norm;
    const float* norm_weight;
    float epsilon;
    uint8_t* prepared;
};

struct TileKernels {
    void (*prepare)(const Preparation&, int64_t row_begin, int64_t row_end);
    void (*multiply)(const Product&, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end);
};

DC_EACH_ISA(extern const TileKernels tile_kernels)

// The panel of a group: for q types [K / 32] of these, for float types f32 [K / 16, rounded up][8][16].
struct PanelBlock {
    int8_t x[GROUP_ROWS][BLOCK];
    float scale[GROUP_ROWS];                            // dx = amax / 127
    union { float product; int32_t start; } offset[GROUP_ROWS];     // q4_1: the sum of x; q8_0, q4_0: -128, -8 times that of x8
    uint8_t has_fine[GROUP_ROWS];                       // 1 or 0
    int32_t fine_start[GROUP_ROWS];                     // q8_0, q4_0: -128, -8 times the sum of fine
    alignas(64) int8_t fine[GROUP_ROWS][BLOCK];         // 0 without has_fine, at most +-127
};

// Simulated on 510 positions: KL, and the share of the blocks that one row of 8 wants fine. 1.3: 4.5e-4, 45 %; 1.5: 5.3e-4, 36 %;
// 2: 8.0e-4, 22 %. So many of the largest for each row are worse: 2 of 18, 7.9e-4, 32 %; 4 of 18, 4.4e-4, 57 %.
constexpr float FINE_ABOVE = 1.5f;

static inline int64_t group_bytes(Weight type, int64_t columns) {
    return is_float(type) ? (columns + 15) / 16 * GROUP_ROWS * 16 * int64_t(sizeof(float))
                          : columns / BLOCK * int64_t(sizeof(PanelBlock));
}

// ---- memory

// Huge-page memory handed out from front to back; a request beyond the first segment gets one of its own size. Freed as a whole.
class Arena {
public:
    explicit Arena(size_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    uint8_t* allocate(size_t bytes);                    // zeroed, aligned to 64; std::bad_alloc
    size_t used() const { return used_; }
    size_t reserved() const { return reserved_; }

private:
    struct Segment;
    Segment* segments = nullptr;
    size_t used_ = 0, reserved_ = 0;
    void add_segment(size_t bytes);
};

}  // namespace dc
