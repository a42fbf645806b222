// Weight matrices (N, K) in tiles of 16 rows, and their product with rows of x: quantized and float weights alike.
//
//     prepare(type, x, ...)               x (T, K) f32 [-> RMS norm] -> int8 planes (q types) or f32 (float types), in panels
//     multiply(product, tiles, groups)    out = residual + activation(x W^T + bias), any part of it at a time
//
// A tile holds the weights of its 16 rows side by side, lane r = row r, so that 16 outputs grow in one register, k after k. Tiles of
// float types are [K][16]. Tiles of q types are groups of some blocks of 32 columns. A group has its scales first, and then the codes
// of each block (formats.h):
//
//     type      blocks   scales of a group                                                  codes of a block   bytes a weight, file's
//     q8_0           2   d f16 [2][16]                                                      8 bits             1.0625   1.0625
//     q4_0           1   d f16 [16]                                                         4                  0.5625   0.5625
//     q4_1           1   d, m f16 [16]                                                      4                  0.625    0.625
//     q5_0           2   d f16 [2][16]                                                      5                  0.6875   0.6875
//     q5_1           1   d, m f16 [16]                                                      5                  0.75     0.75
//     q4_k           8   d, dmin f16 [16]; u8 [8][16] scales; u8 [8][16] minimums           4                  0.578    0.5625
//     q5_k           8   as q4_k                                                            5                  0.703    0.6875
//     q6_k           8   d f16 [16], 32 B unused; i8 [16][16], one for 16 columns           6                  0.828    0.820
//     iq4_nl         2   d f16 [2][16]                                                      4, of a table      0.5625   0.5625
//     iq4_xs         8   d f16 [16], 32 B unused; i8 [8][16]                                4, of a table      0.547    0.531
//     mxfp4          4   u8 [4][16] exponents                                               4, of a table      0.53125  0.53125
//     u4_g32         4   d f16 [4][16]; u8 [4][16] zero points                              4                  0.594    0.594
//     u4_g128        4   d f16 [16]; u8 [16] zero points, 16 B unused                       4                  0.531    0.523
//     q2_k           8   d, dmin f16 [16]; u8 [8][16][2] nibbles: scale, minimum of 16 columns  2              0.328    0.328
//     q3_k           8   d f16 [16], 32 B unused; i8 [8][16][2], one for 16 columns         3                  0.453    0.430
//     iq3_s, iq3_xxs 8   d f16 [16]; u8 [4][16] nibbles, one for 32 columns                 see grids.h        0.430, 0.398   0.430, 0.383
//     iq2_s, iq2_xs  8   d f16 [16]; u8 [8][16] nibbles, one for 16 columns                 see grids.h        0.320, 0.305   0.320, 0.289
//     iq2_xxs        8   as iq3_xxs                                                         see grids.h        0.273    0.258
//     iq1_s, iq1_m   8   as iq3_xxs; as iq2_s                                               see grids.h        0.211, 0.227   0.195, 0.219
//     tq1_0, tq2_0   8   d f16 [16], 32 B unused                                            2                  0.266    0.211, 0.258
//     nvfp4          2   f16 [4][16], one for 16 columns                                    4, of a table      0.625    0.5625
//     q1_0           4   d f16 [16]                                                         1                  0.141    0.141
//     q2_0           2   d f16 [16]                                                         2                  0.281    0.281
//     q2_0_g128      4   d f16 [16]                                                         2                  0.266    0.266
//     i8_row        8   d f32 [16]                                                         8                  1.0156   1.0156
//
// Missing blocks of the last group and missing rows of the last tile are zeros. K is a multiple of the file's block: 32, 64, 128 or 256.
// Tiles of one matrix may have different q types (Tiles::places), because a matrix may be fused of parts that a file stores differently.
//
// x for q types: a block of 32 values of x is dx * x8, with x8 int8 and dx = max |x| / 127. If dx is more than FINE_ABOVE times the mean
// over the row's blocks, the block is dx * (x8 + fine / 256), which has about 16 bits. The outlier channels of a model lie in such
// blocks, a seventh of all, and they make most of the error: the KL against float32 products is 3.5e-3 without fine planes and 6e-4
// with them. With `fine` (--arithmetic fine) all blocks have 16 bits, and the KL is 5e-7.
//
// x for Q2_K, Q3_K, IQ2_*, IQ3_* and IQ1_*: the scales of these types are whole numbers times one scale of 256 columns, and so is x
// (StepGroup). 256 values of a row are whole numbers times a step. They have one byte, or two in a block with outliers as above. So
// these columns have one sum, of integers, and need one multiplication and conversion instead of eight or sixteen. Types that are
// looked up in a grid have larger sums, so the high bytes of a row have a sum of their own. The step is that of the largest block
// without outliers. A matrix with tiles of both kinds has x in both forms. The KL of rounding x alone, on the default model, is
// 1.4e-4 in blocks and 4.9e-4 in steps; with a scale for 256 columns and one byte, as in llama.cpp, it is 6.7e-3
// (bench/figures/kernels.json, "types-2-3-bits").
//
// x for i8_row: whole numbers of one byte, times one step for a whole row of x, that of its largest value, as files of this type ask for. With
// `fine` each has two bytes, and 256 columns have a step.
//
// numerics  q8_0, q4_0, q4_1, u4_*: y = fma(d * dx, float(int32 sum), y) block after block, or fma(d / 256 * dx, float(256 * int32 sum +
//           the fine one), y). The others (whose scales are products): y = fma(s * dx, float(int32 sum), y) for each scale s of the
//           block, and then, with a fine plane, y = fma(s / 256 * dx, float(int32 sum of the fine one), y) for each.
//           Then, with minimums, y = fma(m, dx * (sum of x8 + sum of fine / 256), y). Q2_K and Q3_K: y = fma(d * step, float(int32 sum of 256
//           columns), y), and then Q2_K's minimums, y = fma(-dmin * step, float(int32 sum), y). i8_row: y = d * step * float(int32 sum
//           of all columns), and with `fine` as Q3_K. IQ2_*, IQ3_*, IQ1_*: y = fma(d / OF * step,
//           float(int32 sum of low bytes), y), and then y = fma(d / OF * step, 256 * float(int32 sum of high bytes), y), with OF of grids.h.
//           Float types: y = fma(w, x, y), k after k. One accumulator for an output, starting at 0; then + bias, activation, + residual, each
//           rounded. So a row's bits depend on nothing but the row: not on T, ranges, threads, instruction set.
//           A block of x with |x| < 1e-24 counts as zero; one that holds a NaN, or more than 1e35, makes its row's outputs NaN:
//           between these neither d * dx nor d / 256 * dx leaves the normal floats, so that both forms above have the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

enum class Weight : int {
#define FLOAT_WEIGHTS(name) name,
#define QUANTIZED_WEIGHTS(name, ...) name,
#include "weights.def"
};
constexpr const char* WEIGHT_NAMES[] = {
#define FLOAT_WEIGHTS(name) #name,
#define QUANTIZED_WEIGHTS(name, ...) #name,
#include "weights.def"
};
constexpr int WEIGHT_TYPES = sizeof WEIGHT_NAMES / sizeof *WEIGHT_NAMES;
// With gates, tiles alternate gate and up: columns 16 i .. come from tiles 2 i and 2 i + 1. clamped_swiglu is g * sigmoid(1.702 g) *
// (u + 1), with g = min(gate, 7) and u = up within +-7.
enum class Activation : int {
    none,
#define ACTIVATION(name, ...) name,
#define GATED(name, ...) name,
#include "activations.def"
};
struct ActivationRow { const char* name; bool gated; };
constexpr ActivationRow ACTIVATIONS[] = {
    {"", false},
#define ACTIVATION(name, ...) {#name, false},
#define GATED(name, ...) {#name, true},
#include "activations.def"
};
static constexpr bool is_gate(Activation activation) { return ACTIVATIONS[int(activation)].gated; }

constexpr int TILE_ROWS = 16;
constexpr int BLOCK = 32;               // columns that share a scale of x
constexpr int GROUP_ROWS = 8;           // rows of x that meet each unpacked tile together
constexpr int PANEL_ROWS = 16;          // rows of x that lie side by side: two groups

static constexpr bool is_float(Weight type) { return type <= Weight::bf16; }

// How x is made ready for a type's tiles: blocks of 32 columns with a scale each, groups of 256 in steps, or floats. HIGH_BYTES: each group has a
// step of its own, and a second byte in blocks with outliers; without it a row has one step and one byte.
enum Panels : int { BLOCK_PANELS = 1, STEP_PANELS = 2, FLOAT_PANELS = 4, HIGH_BYTES = 8 };

struct TilePlace {
    Weight type;
    uint8_t* memory;                    // tile_bytes(type, columns), aligned to 64
};

struct Tiles {
    Weight type;                        // of all tiles; if places is set, some q type
    int64_t rows, columns;              // N, K
    uint8_t* memory;                    // one tile after another
    int panels;                         // the Panels of its tiles' types, or-ed
    const TilePlace* places = nullptr;  // [tile_count(rows)] if tiles have different types, all of them q types
};

const char* name_of(Weight type);
int64_t tile_count(int64_t rows);
int panels_of(Weight type);
int64_t file_columns(Weight type);                      // of a block in GGUF's layout; 1 for float types
int64_t tile_bytes(Weight type, int64_t columns);
int64_t row_bytes(Weight type, int64_t columns);        // of a row in GGUF's layout, or of float values
int64_t bytes_of(const Tiles& tiles);
bool wants_many_rows(const Tiles& tiles);               // does a product make codes (grids.h, folded.inl.h, tile_pairs.inl.h) or bring floats into the cache once for all its rows?

static inline TilePlace tile_of(const Tiles& tiles, int64_t tile, int64_t bytes) {      // bytes: tile_bytes of tiles.type
    return tiles.places ? tiles.places[tile] : TilePlace{tiles.type, tiles.memory + tile * bytes};
}

// ---- x made ready: panels of 16 rows, the rows of a panel side by side

size_t prepared_bytes(const Tiles& tiles, int64_t rows);

// Makes rows [row_begin, row_end) of x ready, which are `stride` floats apart. Any thread may do any part of the rows. norm: x / rms(x),
// times norm_weight [columns] unless that is null, with the bits of rms_norm. `prepared` is aligned to 64 and holds prepared_bytes for
// all rows. fine: every block of x gets 16 bits.
void prepare(const Tiles& tiles, const float* x, int64_t stride, int64_t row_begin, int64_t row_end, bool norm, const float* norm_weight,
             float epsilon, bool fine, void* prepared);

// ---- the product

// What an adapter adds to the products of some rows: B (scales * (A x)), with x after the norm.
//
// shapes   R is a multiple of 4. A is [R / 4][K / 16][2] pairs of ranks. B lies in the tiles of the matrix: for the 16 outputs of a tile,
//          the pairs of ranks that change any of them. A pair has 16 columns or outputs, as load_pair of lanes.h reads it
// mapping  The thread that prepares x computes u = scales * (A x), for up to 4 rows of one adapter together (RowKernels::shrink). The
//          thread that finishes a tile of a row computes B u
// cost     R (K + N) multiply-adds for a row with an adapter, nothing for any other. Each number of A is read once for 4 rows. With
//          many adapters each is read from memory: while a tile is multiplied, B of the next tile is fetched, and a part of the A that
//          is needed next
// numerics float32. A x is summed in 16 lanes, then in a fixed tree, and scaled. B u is summed over a tile's even ranks and over its odd
//          ranks, one after another, then the two are added. The result is added to the product, before the bias. So the bits of a
//          row depend on that row alone.
struct AdapterTile {
    int64_t offset;                     // in B, of the first rank's numbers
    int32_t first, count;               // its ranks, both even
};

struct AdapterMatrix {
    int64_t ranks = 0, columns = 0;     // R; K, a multiple of 16. No ranks: the adapter does not change this matrix
    Weight type{};                      // of A and B: a float type
    const void *a = nullptr, *b = nullptr;
    const float* scales = nullptr;      // [R]
    const AdapterTile* tiles = nullptr;
    int64_t tile_count = 0;
};

struct AdaptedRows {                    // the adapters of a product's rows
    const AdapterMatrix* const* adapters = nullptr;     // for each row its adapter's matrices, by number, or null; null: no row has any
    int64_t number = 0;                 // of the product's matrix
    const float* u = nullptr;           // of each row, u_stride apart
    int64_t u_stride = 0;
    int64_t next = -1;                  // number of the matrix whose A the rows need next; -1: there is none
};

struct Product {
    Tiles tiles;
    const void* prepared;
    int64_t rows;                       // T
    const float* bias;                  // [tiles.rows], in the order of the tiles' rows, or null
    const float* residual;              // (T, out_columns) or null; may be `out`
    int64_t residual_stride;
    Activation activation;
    float* out;                         // (T, out_columns); nothing beyond out_columns is written
    int64_t out_stride, out_columns;    // out_columns: at most tiles.rows; with gates at most 16 for each pair of tiles
    AdaptedRows adapted{};              // added before the activation
};

static inline int64_t group_count(int64_t rows) { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }
static inline int64_t panel_count(int64_t rows) { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }

// Multiplies tiles [tile_begin, tile_end) of tile_count (with gates both are even) by groups [group_begin, group_end) of group_count(rows).
void multiply(const Product& product, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end);

// ---- filling and reading tiles

// Puts `rows` rows of `source`, row_stride bytes apart, into tiles first_tile, first_tile + tile_step, ... Floats become any type. Blocks
// of a q type (GGUF's) go only into tiles of that type. Threads share the tiles. Returns whether there is no NaN and no infinity, in
// the floats and in what the tiles hold now.
bool fill_tiles(const Tiles& to, const uint8_t* source, Weight source_type, int64_t row_stride, int64_t rows, int64_t first_tile,
                int64_t tile_step);

void embed_row(const Tiles& tiles, int64_t row, float* out);    // a row of the matrix, as f32 [columns]
void read_file_row(Weight type, const uint8_t* row, int64_t columns, float* out);   // the same for a row of GGUF blocks

// file_columns(type) values as a GGUF block of a q type (quantize.cpp says how it is rounded).
void quantize_block(Weight type, const float* x, uint8_t* block);

// ---- per instruction set (DC_ISA avx512 needs VNNI as well; without it avx2 runs)

struct Preparation {
    int panels;
    const float* x;
    int64_t stride, columns;
    bool norm;
    const float* norm_weight;
    float epsilon;
    bool fine;
    uint8_t* prepared;
};

struct TileKernels {
    void (*prepare)(const Preparation&, int64_t row_begin, int64_t row_end);
    void (*multiply)(const Product&, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end);
};

DC_EACH_ISA(extern const TileKernels tile_kernels)
// avx2 and neon with another dot product (Dot); the first two are null where the compiler does not know AVX-VNNI, evex also unless it
// is compiled with DC_TEST_SETS
namespace avxvnni { extern const TileKernels tile_kernels; }
namespace evex { extern const TileKernels tile_kernels; }
namespace dotprod { extern const TileKernels tile_kernels; }
namespace i8mm { extern const TileKernels tile_kernels; }

// Kernels for 16 rows at a time (tiles_amx.inl.h). They leave to `narrow` the types that they have no kernel for, and ranges of fewer
// rows than `least_rows` says for the type and the number of columns (0: all ranges).
using LeastRows = int64_t (*)(Weight type, int64_t columns);
using WideMultiply = void (*)(const Product&, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end,
                              const TileKernels& narrow, LeastRows least_rows);

namespace amx { extern const WideMultiply wide_multiply; }      // null where the compiler does not know AMX
namespace emulated_vnni { extern const WideMultiply wide_multiply; }        // this and the next: null unless compiled with DC_TEST_SETS
namespace emulated_portable { extern const WideMultiply wide_multiply; }

// A panel of 16 rows is [K / 32] PanelBlock or [K / 256] StepGroup for q types, or the first and then the other. For float types it is
// f32 [K / 16, rounded up][8][16] for each of its two groups.
//
// One thread makes x of a decode step ready, and every cache line that other threads read moves to their caches and back. For up to 4
// rows these are 3 lines a block, and 3 more if a row of the set has a fine plane. A row writes only bytes of its own. x and fine lie
// as AMX's tiles load them. The sizes are odd numbers of lines, 29 and 149, so that what few rows read is spread over all sets of a
// cache.
constexpr int SET_ROWS = 4;                             // rows that take a fine plane together. Of 8 rows one has it too often; 2 gain nothing

struct alignas(64) PanelSet {
    float scale[SET_ROWS];                              // dx = amax / 127
    float product[SET_ROWS];                            // the sum of x
    int32_t minus[SET_ROWS];                            // minus the sum of x8
    uint8_t has_fine[SET_ROWS];                         // 1 or 0
    alignas(64) int32_t half_minus[2][SET_ROWS];        // minus the sum of x8 of the first 16 columns, of the others
    alignas(64) int32_t fine_minus[3][SET_ROWS];        // minus the sum of fine: of all 32, of the first 16, of the others
};

struct alignas(64) PanelBlock {
    int8_t x[PANEL_ROWS][BLOCK];
    int8_t fine[PANEL_ROWS][BLOCK];                     // 0 without has_fine, at most +-127
    PanelSet sets[PANEL_ROWS / SET_ROWS];
    uint8_t unused[64];
};
static_assert(sizeof(PanelBlock) == 29 * 64, "PanelBlock");

constexpr int STEP_COLUMNS = 256;       // that share a step
constexpr int STEP_BLOCKS = STEP_COLUMNS / BLOCK;

struct alignas(64) StepSet {            // x = step * (low + 256 * high), exactly this integer
    float step[SET_ROWS];
    int32_t minus[SET_ROWS];            // minus the sum of the 256 integers
    uint8_t has_high[SET_ROWS];         // bit i: block i
    alignas(64) int16_t low_sums[SET_ROWS][STEP_BLOCKS][2], high_sums[SET_ROWS][STEP_BLOCKS][2];        // of 16 columns each
};

struct alignas(64) StepGroup {
    int8_t low[PANEL_ROWS][STEP_COLUMNS];
    StepSet sets[PANEL_ROWS / SET_ROWS];
    int8_t high[PANEL_ROWS][STEP_COLUMNS];              // 0 without has_high; both at most +-127
    uint8_t unused[64];
};
static_assert(sizeof(StepGroup) == 149 * 64, "StepGroup");

// Simulated on 510 positions: the KL, and the share of blocks that at least one row of 8 needs fine. 1.3: 4.5e-4, 45 %. 1.5: 5.3e-4,
// 36 %. 2: 8.0e-4, 22 %. To take a fixed number of each row's largest blocks is worse: 2 of 18, 7.9e-4, 32 %; 4 of 18, 4.4e-4, 57 %.
constexpr float FINE_ABOVE = 1.5f;

static inline int64_t block_panel_bytes(int64_t columns) { return columns / BLOCK * int64_t(sizeof(PanelBlock)); }

static inline int64_t panel_bytes(int panels, int64_t columns) {
    constexpr int64_t GROUPS = PANEL_ROWS / GROUP_ROWS;
    if (panels & FLOAT_PANELS) return GROUPS * ((columns + 15) / 16) * GROUP_ROWS * 16 * int64_t(sizeof(float));
    return (panels & BLOCK_PANELS ? block_panel_bytes(columns) : 0) + (panels & STEP_PANELS ? columns / STEP_COLUMNS * int64_t(sizeof(StepGroup)) : 0);
}

static inline const uint8_t* panel_of(const Product& job, int64_t panel) {
    return static_cast<const uint8_t*>(job.prepared) + panel * panel_bytes(job.tiles.panels, job.tiles.columns);
}

// Of a panel, its steps.
static inline const StepGroup* steps_of(const uint8_t* panel, int panels, int64_t columns) {
    return reinterpret_cast<const StepGroup*>(panel + (panels & BLOCK_PANELS ? block_panel_bytes(columns) : 0));
}

// ---- memory

// Memory in huge pages, handed out from front to back. A request that does not fit the current segment begins another one of at least
// SEGMENT bytes, whose pages take memory only once they are written: segments of one matrix each would waste up to a huge page for each
// matrix. All is freed together.
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
    static constexpr size_t SEGMENT = 64 << 20;
    struct Segment;
    Segment* segments = nullptr;
    size_t used_ = 0, reserved_ = 0;
    void add_segment(size_t bytes);
    void grow(size_t bytes);
};

}  // namespace dc
