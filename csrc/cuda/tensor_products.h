// Products of up to 8 rows of x and weights of bfloat16 on the tensor cores, for `multiply` (packed.cu).
//
// mapping  A block makes 16 outputs of all rows of x, with a gate 8 and their ups. Its warps divide the columns and add their
//          sums in the end, through shared memory. A warp takes 32 columns at a time: a lane holds 8 of two rows of W and of
//          one row of x, which are the operands of two multiply_bf16. The columns of an operand may come in any order, as
//          long as both have the same, so each lane loads neighbours, 16 bytes at once.
// cost     W is read once. What a warp does for 32 columns does not depend on the rows of x, so 8 rows cost as much as one.
// numerics x is split into two bfloat16, what it rounds to and what that leaves, so that 16 bits of it count; products are exact, sums
//          f32, in an order that depends on the shape of W alone. A row's bits do not depend on the other rows.
#pragma once

#include "products.h"
#include "split_floats.h"

namespace dc_device {

constexpr int TILE_OUTPUTS = 16, TILE_ROWS = 8, TILE_COLUMNS = 32;
constexpr int TILES_AHEAD = 2;              // a warp loads so many before it multiplies the first

// The sums that a warp has for a tile: W's rows r and r + 8 times the rows of x, as multiply_bf16 lays them out.
struct TileSums {
    float products[4] = {};
    float squares = 0.0f;                   // of x's row r, the lane's columns
};

// Which rows of W a lane holds; past the last output, the last.
struct TileRows {
    int64_t upper, lower;

    DC_DEVICE TileRows(const ProductJob &job, int r) {
        const int64_t first = static_cast<int64_t>(blockIdx.x) * job.made, last = job.outputs - 1;
        const bool gated = job.made < TILE_OUTPUTS;
        const int64_t eighth = first + 8 + r < last ? first + 8 + r : last;
        upper = first + r < last ? first + r : last;
        lower = gated ? job.outputs + upper : eighth;
    }
};

// Eight columns of a row of x from `column` on, or zeros, and of the norm's weights.
struct TileX {
    float x[8], weights[8];

    DC_DEVICE void load(const ProductJob &job, int64_t row, int64_t column, int64_t columns) {
        DC_UNROLL
        for (int i = 0; i < 8; i++) x[i] = 0.0f, weights[i] = 1.0f;
        if (column >= columns) return;
        if (job.norm_weight != nullptr) load_eight(job.norm_weight + column, weights);
        if (row >= job.rows) return;
        const int64_t at = row * job.x_stride + column;
        if (job.x_type == F32) load_eight(static_cast<const float *>(job.x) + at, x);
        else load_eight(static_cast<const bf16 *>(job.x) + at, x);
    }

    DC_DEVICE void add_squares(float &squares) const {
        DC_UNROLL
        for (int i = 0; i < 8; i++) squares = fmaf(x[i], x[i], squares);
    }

    DC_DEVICE SplitEight split() const {
        float weighted[8];
        DC_UNROLL
        for (int i = 0; i < 8; i++) weighted[i] = x[i] * weights[i];
        return SplitEight(weighted);
    }
};

// products += two rows of W, eight columns of each in this lane, times those of x.
DC_DEVICE void multiply_eight(float (&products)[4], const uint32_t (&upper)[4], const uint32_t (&lower)[4], const uint32_t (&x)[4]) {
    DC_UNROLL
    for (int k = 0; k < 4; k += 2) {
        const uint32_t a[4] = {upper[k], lower[k], upper[k + 1], lower[k + 1]}, b[2] = {x[k], x[k + 1]};
        multiply_bf16(products, a, b);
    }
}

template <int WARPS> struct TensorShared {
    float products[WARPS][TILE_ROWS * TILE_OUTPUTS];
    float squares[WARPS][TILE_ROWS];
};

// The warps' sums become outputs.
template <int WARPS> DC_DEVICE void end_product(const ProductJob &job, TileSums &sums, TensorShared<WARPS> &shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4 * 8;
    if (job.norm) {
        for (int64_t column = job.columns + TILE_COLUMNS * warp + c; column < job.width; column += TILE_COLUMNS * WARPS) {
            TileX beyond;                   // columns that only the norm has
            beyond.load(job, r, column, job.width);
            beyond.add_squares(sums.squares);
        }
        sums.squares = sums.squares + __shfl_xor_sync(ALL_LANES, sums.squares, 1);
        sums.squares = sums.squares + __shfl_xor_sync(ALL_LANES, sums.squares, 2);
        if (c == 0) shared.squares[warp][r] = sums.squares;
    }
    DC_UNROLL
    for (int i = 0; i < 4; i++) {
        const int row = lane % 4 * 2 + i % 2, output = r + i / 2 * 8;
        shared.products[warp][row * TILE_OUTPUTS + output] = sums.products[i];
    }
    __syncthreads();
    const int row = threadIdx.x / TILE_OUTPUTS, output = threadIdx.x % TILE_OUTPUTS;       // rows is at most 8: 128 threads suffice
    const int64_t at = static_cast<int64_t>(blockIdx.x) * job.made + output;
    if (row >= job.rows || output >= job.made || at >= job.outputs) return;
    const bool gated = job.made < TILE_OUTPUTS;
    float y = 0.0f, up = 0.0f, squared = 0.0f;
    DC_UNROLL
    for (int w = 0; w < WARPS; w++) {
        y += shared.products[w][threadIdx.x];
        if (gated) up += shared.products[w][threadIdx.x + 8];
        if (job.norm) squared += shared.squares[w][row];
    }
    write_product(job, row, at, y, up, squared);
}

// W in bfloat16, whose rows begin at multiples of 16 bytes: a lane loads its columns as they are.
template <int WARPS> DC_KERNEL(WARPS * 32) bf16_product_kernel(ProductJob job) {
    DC_SHARED(TensorShared<WARPS>, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4 * 8;
    const TileRows rows(job, r);
    const bf16 *weights = reinterpret_cast<const bf16 *>(job.blocks);
    const bf16 *w_upper = weights + rows.upper * job.columns, *w_lower = weights + rows.lower * job.columns;
    const int64_t step = TILES_AHEAD * TILE_COLUMNS, every = step * WARPS;
    if (lane % 4 == 0) {                    // weights do not change, so they can be on their way before x is there
        for (int64_t column = step * warp; column < job.columns && column < 2 * every; column += every) {
            prefetch(w_upper + column);
            prefetch(w_lower + column);
        }
    }
    after_previous();
    TileSums sums;
    for (int64_t begin = step * warp; begin < job.columns; begin += every) {
        Bytes16 upper[TILES_AHEAD], lower[TILES_AHEAD];
        TileX x[TILES_AHEAD];
        DC_UNROLL
        for (int tile = 0; tile < TILES_AHEAD; tile++) {
            const int64_t column = begin + TILE_COLUMNS * tile + c;
            upper[tile] = column < job.columns ? load_once(w_upper + column) : Bytes16{};
            lower[tile] = column < job.columns ? load_once(w_lower + column) : Bytes16{};
        }
        DC_UNROLL
        for (int tile = 0; tile < TILES_AHEAD; tile++) x[tile].load(job, r, begin + TILE_COLUMNS * tile + c, job.columns);
        DC_UNROLL
        for (int tile = 0; tile < TILES_AHEAD; tile++) {
            if (job.norm) x[tile].add_squares(sums.squares);
            const SplitEight split = x[tile].split();
            multiply_eight(sums.products, upper[tile].words, lower[tile].words, split.high);
            multiply_eight(sums.products, upper[tile].words, lower[tile].words, split.low);
        }
    }
    end_product(job, sums, shared);
}

template <class Kernel> const char *launch_tensor_product(Kernel kernel, const ProductJob &job, int64_t blocks, int warps, int64_t stream) {
    return DC_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), warps * 32, as_pointer<void>(stream), job);
}

// Few blocks need many warps to keep the memory busy; with many, fewer warps have longer runs of columns (measured on an H100). The
// choice depends on W alone, as a row's bits must.
inline const char *launch_bf16_product(ProductJob job, bool gated, int64_t stream) {
    job.made = gated ? TILE_OUTPUTS / 2 : TILE_OUTPUTS;
    const int64_t blocks = (job.outputs + job.made - 1) / job.made;
    if (blocks <= 192) return launch_tensor_product(bf16_product_kernel<16>, job, blocks, 16, stream);
    if (blocks <= 1024) return launch_tensor_product(bf16_product_kernel<8>, job, blocks, 8, stream);
    return launch_tensor_product(bf16_product_kernel<4>, job, blocks, 4, stream);
}

}  // namespace dc_device
