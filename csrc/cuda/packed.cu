// ops      multiply: out = residual + activation(norm(x) W^T + bias) for up to 8 rows of x; dequantize: rows of W as floats.
// shapes   x (B, >= K) f32 or bf16; W (N, K) in rows of blocks (blocks.h), packed or floats; with a gate (2 N, K), the ups below
//          the gates -> out (B, N) f32 or bf16. dequantize, of packed ones: -> (N, K) f32 or bf16.
// mapping  multiply: bfloat16 by the tensor cores (tensor_products.h). For the other types a block makes 4 outputs (2 with a gate) of
//          each row of x (products.h). Few outputs a block put many blocks on every SM, which hides the latency of memory for
//          matrices of a few thousand rows. dequantize: a thread makes 8 values.
// cost     multiply reads W once, whatever B is, and x from the caches. bfloat16 is bound by the memory of W for all B. Of the
//          other types one row is, within a factor of 2 to 4; 8 rows take 3 to 5 times as long, since each block reads all of x
//          (H100, bench/figures/gpu.json). dequantize reads W and writes 2 or 4 bytes a weight.
// numerics f32: a weight has the bits that the gguf package gives; sums as in products.h, and that of the squares of x likewise. The
//          norm divides a row's finished sums, so x is read once. A row's bits do not depend on the other rows.

#include "launch.h"

#include "products.h"
#include "tensor_products.h"

namespace {

using namespace dc_device;

constexpr unsigned DEQUANTIZE_THREADS = 256;

template <int ROWS> struct MultiplyShared : ProductShared<ROWS> {
    float squares[PRODUCT_WARPS][ROWS];
};

template <class B, int ROWS> DC_KERNEL(PRODUCT_WARPS * 32) multiply_kernel(ProductJob job) {
    DC_SHARED(MultiplyShared<ROWS>, shared);
    after_previous();
    const int made = job.made;
    const bool gated = made < OUTPUTS;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * made;
    float sums[OUTPUTS][ROWS] = {}, squares[ROWS] = {};
    const auto load_x = [&](int b, int64_t piece, float (&x)[8]) {
        const int64_t at = (b < job.rows ? b : 0) * job.x_stride + 8 * piece;                   // past the last row, the first
        if (job.x_type == F32) load_eight(static_cast<const float *>(job.x) + at, x);
        else load_eight(static_cast<const bf16 *>(job.x) + at, x);
        if (!job.norm) return;
        DC_UNROLL
        for (int i = 0; i < 8; i++) squares[b] = fmaf(x[i], x[i], squares[b]);
        if (job.norm_weight == nullptr) return;
        DC_UNROLL
        for (int i = 0; i < 8; i++) x[i] *= job.norm_weight[8 * piece + i];
    };
    const auto w_row = [&](int r) {
        const bool up = r >= made;
        const int64_t output = first + (up ? r - made : r);
        return output < job.outputs ? row_of<B>(job.blocks, (up ? job.outputs : 0) + output, job.columns) : nullptr;
    };
    add_products<B, ROWS>(load_x, w_row, job.columns, sums);
    if (job.norm) {
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int64_t done = job.columns / 8 / (PRODUCT_WARPS * 32) * (PRODUCT_WARPS * 32) + threadIdx.x;      // mine of the last round
        for (int64_t piece = done < job.columns / 8 ? done + PRODUCT_WARPS * 32 : done; piece < job.width / 8; piece += PRODUCT_WARPS * 32) {
            float beyond[8];                // columns that only the norm has
            DC_UNROLL
            for (int b = 0; b < ROWS; b++) load_x(b, piece, beyond);
        }
        DC_UNROLL
        for (int b = 0; b < ROWS; b++) {
            const float sum = warp_sum(squares[b]);
            if (lane == 0) shared.squares[warp][b] = sum;
        }
    }
    join_products(sums, shared);            // whose barriers serve the squares too
    const int64_t output = first + threadIdx.x % made, row = threadIdx.x / made;
    if (output >= job.outputs || row >= job.rows) return;
    const float *found = shared.sums[0] + row * OUTPUTS + threadIdx.x % made;
    float squared = 0.0f;
    if (job.norm) {
        squared = shared.squares[0][row];
        DC_UNROLL
        for (int w = 1; w < PRODUCT_WARPS; w++) squared += shared.squares[w][row];
    }
    write_product(job, row, output, found[0], gated ? found[made] : 0.0f, squared);
}

template <class B, class Out>
DC_KERNEL(DEQUANTIZE_THREADS) dequantize_kernel(const uint8_t *blocks, int64_t rows, int64_t columns, Out *out) {
    after_previous();
    const int64_t pieces = columns / 8;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * DEQUANTIZE_THREADS + threadIdx.x;
    if (i >= rows * pieces) return;
    float w[8];
    unpack<B>(row_of<B>(blocks, i / pieces, columns), i % pieces, w);
    DC_UNROLL
    for (int k = 0; k < 8; k++) out[8 * i + k] = from_float<Out>(w[k]);
}

template <class B, int ROWS> const char *launch_multiply(const ProductJob &job, int64_t stream) {
    const unsigned blocks = static_cast<unsigned>((job.outputs + job.made - 1) / job.made);
    const auto kernel = multiply_kernel<B, ROWS>;
    return DC_LAUNCH(kernel, dim3(blocks), PRODUCT_WARPS * 32, as_pointer<void>(stream), job);
}

template <class B, class Out>
const char *launch_dequantize(int64_t blocks, int64_t rows, int64_t columns, int64_t out, int64_t stream) {
    const unsigned grid = static_cast<unsigned>((rows * (columns / 8) + DEQUANTIZE_THREADS - 1) / DEQUANTIZE_THREADS);
    const auto kernel = dequantize_kernel<B, Out>;
    return DC_LAUNCH(kernel, dim3(grid), DEQUANTIZE_THREADS, as_pointer<void>(stream), as_pointer<const uint8_t>(blocks),
                     rows, columns, as_pointer<Out>(out));
}

}  // namespace

const char *dc_cuda_multiply(int64_t x, int64_t x_type, int64_t x_stride, int64_t rows, int64_t norm, int64_t width,
                             int64_t norm_weight, double epsilon, int64_t blocks, int64_t type, int64_t outputs, int64_t columns,
                             int64_t bias, int64_t activation, int64_t residual, int64_t residual_stride, int64_t out,
                             int64_t out_type, int64_t out_stride, int64_t stream) {
    if (rows == 0 || outputs == 0) return nullptr;
    ProductJob job{};
    job.x = as_pointer<const void>(x);
    job.x_type = x_type;
    job.x_stride = x_stride;
    job.rows = rows;
    job.norm = norm != 0;
    job.width = width;
    job.norm_weight = as_pointer<const float>(norm_weight);
    job.epsilon = static_cast<float>(epsilon);
    job.blocks = as_pointer<const uint8_t>(blocks);
    job.outputs = outputs;
    job.columns = columns;
    job.bias = as_pointer<const float>(bias);
    job.activation = activation;
    const bool gated = activation >= SWIGLU && activation <= CLAMPED_SWIGLU;
    job.made = gated ? OUTPUTS / 2 : OUTPUTS;
    job.residual = as_pointer<const float>(residual);
    job.residual_stride = residual_stride;
    job.out = as_pointer<void>(out);
    job.out_type = out_type;
    job.out_stride = out_stride;
    if (type == FLOATS_BF16) return launch_bf16_product(job, gated, stream);
    return with_block_or_floats(type, [&](auto block) {
        using B = decltype(block);
        if (rows == 1) return launch_multiply<B, 1>(job, stream);
        if (rows == 2) return launch_multiply<B, 2>(job, stream);
        if (rows <= 4) return launch_multiply<B, 4>(job, stream);
        return launch_multiply<B, 8>(job, stream);
    });
}

const char *dc_cuda_dequantize(int64_t blocks, int64_t type, int64_t rows, int64_t columns, int64_t out, int64_t out_type,
                               int64_t stream) {
    if (rows == 0 || columns == 0) return nullptr;
    return with_block(type, [&](auto block) {
        using B = decltype(block);
        if (out_type == F32) return launch_dequantize<B, float>(blocks, rows, columns, out, stream);
        return launch_dequantize<B, bf16>(blocks, rows, columns, out, stream);
    });
}
