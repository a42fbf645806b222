// ops      shrink, expand: what adapters add to the products of some rows: out = residual + activation(y + b (scales * (a norm(x)))).
// shapes   x (B, >= K) f32 or bf16; of each row the address of its adapter, or 0, and of each adapter a table with its matrices (launch.h):
//          a (R, K) and b transposed (R, N), f32, f16 or bf16 -> sums (B, most ranks) f32; with y (B, N) f32 -> out (B, N or, with a
//          gate, N / 2) f32 or bf16. Rows without an adapter end the same way.
// mapping  shrink: a warp makes every 32nd sum of a row, a lane takes every 32nd column. expand: a thread makes an output, so that
//          neighbours read neighbours of b. Grids depend on the sizes of the step alone, and adapters are found on the device: a graph
//          serves whichever adapters its rows have.
// cost     Reads a and b once for each row: rows of one adapter share them in the caches. At decode sizes the launches dominate.
// numerics f32; a sum over columns is 32 lane sums, each in order, then a butterfly; one over ranks is in order. A row's bits do not
//          depend on the other rows, nor on how many adapters there are.

#include "launch.h"

#include "device.h"
#include "products.h"

namespace {

using namespace dc_device;

constexpr int SHRINK_WARPS = 4, SHRINK_BLOCKS = 8, EXPAND_THREADS = 128;

struct AdapterPart {                        // six numbers of an adapter's table
    int64_t a, b, scales, ranks, columns, type;
};

struct ShrinkJob {                          // by value into the kernel
    const int64_t *adapters;
    int64_t matrix, x_stride;
    bool norm;
    int64_t width;
    const float *norm_weight;
    float epsilon;
    float *sums;
    int64_t most_ranks;
};

// Whether a row's adapter has this matrix.
DC_DEVICE bool find_part(const int64_t *adapters, int64_t row, int64_t matrix, int64_t most_ranks, AdapterPart &part) {
    const int64_t *table = reinterpret_cast<const int64_t *>(static_cast<uintptr_t>(adapters[row]));
    if (table == nullptr || matrix >= table[0]) return false;
    const int64_t *its = table + 1 + 6 * matrix;
    part = AdapterPart{its[0], its[1], its[2], its[3], its[4], its[5]};
    return part.ranks > 0 && part.ranks <= most_ranks;
}

DC_DEVICE float load_float(int64_t from, int64_t type, int64_t at) {
    if (type == F32) return reinterpret_cast<const float *>(static_cast<uintptr_t>(from))[at];
    if (type == F16) return to_float(reinterpret_cast<const f16 *>(static_cast<uintptr_t>(from))[at]);
    return to_float(reinterpret_cast<const bf16 *>(static_cast<uintptr_t>(from))[at]);
}

template <class Input> DC_KERNEL(SHRINK_WARPS * 32) shrink_kernel(ShrinkJob job, const Input *all_x) {
    after_previous();
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t row = blockIdx.y;
    AdapterPart part;
    if (!find_part(job.adapters, row, job.matrix, job.most_ranks, part)) return;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * SHRINK_WARPS + warp;
    if (first >= part.ranks) return;        // the whole warp; blocks never meet at a barrier
    const Input *x = all_x + row * job.x_stride;
    float scale = 1.0f;
    if (job.norm) {
        float squares = 0;
        for (int64_t k = lane; k < job.width; k += 32) squares = fmaf(to_float(x[k]), to_float(x[k]), squares);
        scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(job.width) + job.epsilon);
    }
    for (int64_t rank = first; rank < part.ranks; rank += SHRINK_BLOCKS * SHRINK_WARPS) {
        float sum = 0;
        for (int64_t k = lane; k < part.columns; k += 32) {
            const float value = to_float(x[k]), weighed = job.norm_weight == nullptr ? value : value * job.norm_weight[k];
            sum = fmaf(load_float(part.a, part.type, rank * part.columns + k), weighed, sum);
        }
        sum = warp_sum(sum) * scale;
        if (lane == 0) job.sums[row * job.most_ranks + rank] = load_float(part.scales, F32, rank) * sum;
    }
}

struct ExpandJob {
    const int64_t *adapters;
    int64_t matrix;
    const float *sums;
    int64_t most_ranks;
    const float *y;                         // the product alone, with its bias
    int64_t y_stride, outputs;              // of `out`; with a gate, y and b have as many ups after the gates
    int64_t activation;
    const float *residual;                  // or null
    int64_t residual_stride;
    void *out;
    int64_t out_type, out_stride;
};

DC_KERNEL(EXPAND_THREADS) expand_kernel(ExpandJob job) {
    after_previous();
    const int64_t row = blockIdx.y, output = static_cast<int64_t>(blockIdx.x) * EXPAND_THREADS + threadIdx.x;
    if (output >= job.outputs) return;
    const bool gated = job.activation >= SWIGLU && job.activation <= CLAMPED_SWIGLU;
    const float *y = job.y + row * job.y_stride + output, *sums = job.sums + row * job.most_ranks;
    float value = y[0], up = gated ? y[job.outputs] : 0.0f;
    AdapterPart part;
    if (find_part(job.adapters, row, job.matrix, job.most_ranks, part)) {
        const int64_t width = gated ? 2 * job.outputs : job.outputs;
        float added = 0, up_added = 0;
        for (int64_t rank = 0; rank < part.ranks; rank++) {
            added = fmaf(load_float(part.b, part.type, rank * width + output), sums[rank], added);
            if (gated) up_added = fmaf(load_float(part.b, part.type, rank * width + job.outputs + output), sums[rank], up_added);
        }
        value += added;
        up += up_added;
    }
    value = activated(job.activation, value, up);
    if (job.residual != nullptr) value = job.residual[row * job.residual_stride + output] + value;
    const int64_t at = row * job.out_stride + output;
    if (job.out_type == F32) static_cast<float *>(job.out)[at] = value;
    else static_cast<bf16 *>(job.out)[at] = from_float<bf16>(value);
}

}  // namespace

const char *dc_cuda_shrink(int64_t adapters, int64_t matrix, int64_t x, int64_t x_type, int64_t x_stride, int64_t rows,
                           int64_t norm, int64_t width, int64_t norm_weight, double epsilon, int64_t sums,
                           int64_t most_ranks, int64_t stream) {
    if (rows == 0) return nullptr;
    ShrinkJob job{};
    job.adapters = as_pointer<const int64_t>(adapters);
    job.matrix = matrix;
    job.x_stride = x_stride;
    job.norm = norm != 0;
    job.width = width;
    job.norm_weight = as_pointer<const float>(norm_weight);
    job.epsilon = static_cast<float>(epsilon);
    job.sums = as_pointer<float>(sums);
    job.most_ranks = most_ranks;
    const dim3 grid(SHRINK_BLOCKS, static_cast<unsigned>(rows));
    if (x_type == F32)
        return DC_LAUNCH(shrink_kernel<float>, grid, SHRINK_WARPS * 32, as_pointer<void>(stream), job, as_pointer<const float>(x));
    return DC_LAUNCH(shrink_kernel<bf16>, grid, SHRINK_WARPS * 32, as_pointer<void>(stream), job, as_pointer<const bf16>(x));
}

const char *dc_cuda_expand(int64_t adapters, int64_t matrix, int64_t rows, int64_t sums, int64_t most_ranks, int64_t y,
                           int64_t y_stride, int64_t outputs, int64_t activation, int64_t residual, int64_t residual_stride,
                           int64_t out, int64_t out_type, int64_t out_stride, int64_t stream) {
    if (rows == 0 || outputs == 0) return nullptr;
    ExpandJob job{};
    job.adapters = as_pointer<const int64_t>(adapters);
    job.matrix = matrix;
    job.sums = as_pointer<const float>(sums);
    job.most_ranks = most_ranks;
    job.y = as_pointer<const float>(y);
    job.y_stride = y_stride;
    job.outputs = outputs;
    job.activation = activation;
    job.residual = as_pointer<const float>(residual);
    job.residual_stride = residual_stride;
    job.out = as_pointer<void>(out);
    job.out_type = out_type;
    job.out_stride = out_stride;
    const dim3 grid(static_cast<unsigned>((outputs + EXPAND_THREADS - 1) / EXPAND_THREADS), static_cast<unsigned>(rows));
    return DC_LAUNCH(expand_kernel, grid, EXPAND_THREADS, as_pointer<void>(stream), job);
}
