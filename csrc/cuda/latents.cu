// ops      append_latents: what a token keeps of latent attention (MLA) goes to its page. by_head: each head's part of x times its own
//          matrix. absorb: the same for queries, whose other numbers turn by the position.
// shapes   append_latents: x (B, kept + turned) f32 or bf16 -> pages of 16 slots, f32, f16 or bf16, strides as arguments: `kept` numbers
//          with an RMS norm, then `turned` that turn. by_head: x (B, H * width) f32, of each head the first K numbers; W (H * N, K) in
//          rows of blocks (blocks.h), N for each head -> out f32 or bf16, N for each head. absorb: out (B, H * (N + turned)) f32,
//          and all of it `scale` times larger; it may be asked for the turned numbers alone.
// mapping  append_latents: a warp a row. by_head: block = (16 outputs, head, 8 rows), a warp makes 4 outputs of all rows, a lane has 8
//          columns of each 256. With absorb, of each head and 8 rows one block more turns.
// cost     W is read once for 8 rows, from memory for the first and from the L2 cache for the others.
// numerics f32. An output is 32 sums of a lane, each in the order of the columns, and a butterfly: a row's bits do not depend on the
//          others. Of pairs that turn, the numbers are neighbours in x (`adjacent`) or turned / 2 apart, and always apart in what is
//          made. Slots or positions out of range write nothing.

#include "launch.h"

#include "products.h"

namespace {

using namespace dc_device;

constexpr int LATENT_ROWS = 4, SLOTS = 16;                      // rows of a block of append_latents; slots of a page
constexpr int HEAD_WARPS = 4, HEAD_OUTPUTS = HEAD_WARPS * OUTPUTS, HEAD_ROWS = 8;

struct Turning {
    const float *cos, *sin;                 // (max_positions, half)
    int64_t max_positions;
    int half;
    bool adjacent;
};

// Pair i of x, turned: the first number in `first`, the second in `second`.
template <class Input>
DC_DEVICE void turn_pair(const Turning &turning, const Input *x, int64_t position, int i, float &first, float &second) {
    const float a = to_float(x[turning.adjacent ? 2 * i : i]), b = to_float(x[turning.adjacent ? 2 * i + 1 : i + turning.half]);
    const float cos = turning.cos[position * turning.half + i], sin = turning.sin[position * turning.half + i];
    first = a * cos - b * sin;
    second = b * cos + a * sin;
}

// --- append_latents ------------------------------------------------------------------------------------------------------

struct AppendJob {
    int64_t row_stride, rows, kept;
    const float *weight;                    // (kept)
    float epsilon;
    Turning turning;
    const int64_t *positions, *slots;
    int64_t num_slots, page_stride, slot_stride;
};

template <class Input, class Stored>
DC_KERNEL(LATENT_ROWS * 32) append_latents_kernel(AppendJob job, const Input *inputs, Stored *pages) {
    after_previous();
    const unsigned lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LATENT_ROWS + threadIdx.x / 32;
    if (row >= job.rows) return;            // the whole warp, here and below
    const int64_t slot = job.slots[row], position = job.positions[row];
    if (slot < 0 || slot >= job.num_slots || position < 0 || position >= job.turning.max_positions) return;
    const Input *x = inputs + row * job.row_stride;
    Stored *key = pages + slot / SLOTS * job.page_stride + slot % SLOTS * job.slot_stride;
    float squares = 0.0f;
    for (int64_t d = lane; d < job.kept; d += 32) squares = fmaf(to_float(x[d]), to_float(x[d]), squares);
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(job.kept) + job.epsilon);
    for (int64_t d = lane; d < job.kept; d += 32) key[d] = from_float<Stored>(to_float(x[d]) * scale * job.weight[d]);
    for (int i = lane; i < job.turning.half; i += 32) {
        float first, second;
        turn_pair(job.turning, x + job.kept, position, i, first, second);
        key[job.kept + i] = from_float<Stored>(first);
        key[job.kept + job.turning.half + i] = from_float<Stored>(second);
    }
}

template <class Input, class Stored> const char *launch_append(const AppendJob &job, int64_t x, int64_t pages, int64_t stream) {
    const unsigned blocks = static_cast<unsigned>((job.rows + LATENT_ROWS - 1) / LATENT_ROWS);
    const auto kernel = append_latents_kernel<Input, Stored>;
    return DC_LAUNCH(kernel, dim3(blocks), LATENT_ROWS * 32, as_pointer<void>(stream), job, as_pointer<const Input>(x),
                     as_pointer<Stored>(pages));
}

template <class Input>
const char *launch_append_into(int64_t cache_type, const AppendJob &job, int64_t x, int64_t pages, int64_t stream) {
    if (cache_type == F32) return launch_append<Input, float>(job, x, pages, stream);
    if (cache_type == F16) return launch_append<Input, f16>(job, x, pages, stream);
    return launch_append<Input, bf16>(job, x, pages, stream);
}

// --- by_head and absorb --------------------------------------------------------------------------------------------------

struct HeadsJob {
    const float *x;
    int64_t x_stride, width, rows;          // width: numbers of x from head to head
    const uint8_t *blocks;                  // null: only what turns is made
    int64_t outputs, columns;               // of a head
    float scale;
    void *out;
    int64_t out_type, out_stride, out_width;        // out_width: numbers of out from head to head
    Turning turning;                        // half 0: nothing turns
    const int64_t *positions;
};

// A lane's sums of COUNT values -> the whole sum of value number `lane * COUNT / 32`. The additions are a butterfly for each value,
// whatever COUNT is; each step halves the values that a lane is responsible for.
template <int COUNT> DC_DEVICE float sum_of_lanes(float (&sums)[COUNT], unsigned lane) {
    int mine = COUNT;
    DC_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) {
        const bool upper = (lane & distance) != 0;
        if (mine > 1) {
            mine /= 2;
            DC_UNROLL
            for (int i = 0; i < COUNT / 2; i++) {
                if (i >= mine) continue;
                const float keep = upper ? sums[i + mine] : sums[i], give = upper ? sums[i] : sums[i + mine];
                sums[i] = keep + __shfl_xor_sync(ALL_LANES, give, distance);
            }
        } else {
            sums[0] = sums[0] + __shfl_xor_sync(ALL_LANES, sums[0], distance);
        }
    }
    return sums[0];
}

DC_DEVICE void write_number(const HeadsJob &job, int64_t row, int64_t at, float y) {
    const int64_t index = row * job.out_stride + blockIdx.y * job.out_width + at;
    if (job.out_type == F32) static_cast<float *>(job.out)[index] = y;
    else static_cast<bf16 *>(job.out)[index] = from_float<bf16>(y);
}

DC_DEVICE void turn_queries(const HeadsJob &job, int64_t first_row, int64_t rows) {
    for (int64_t n = threadIdx.x; n < rows * job.turning.half; n += HEAD_WARPS * 32) {
        const int64_t row = first_row + n / job.turning.half, position = job.positions[row];
        const int i = static_cast<int>(n % job.turning.half);
        if (position < 0 || position >= job.turning.max_positions) continue;
        float first, second;
        turn_pair(job.turning, job.x + row * job.x_stride + blockIdx.y * job.width + job.columns, position, i, first, second);
        write_number(job, row, job.outputs + i, job.scale * first);
        write_number(job, row, job.outputs + job.turning.half + i, job.scale * second);
    }
}

template <class B, int ROWS> DC_KERNEL(HEAD_WARPS * 32) by_head_kernel(HeadsJob job, unsigned tiles) {
    after_previous();
    const int64_t first_row = static_cast<int64_t>(blockIdx.z) * HEAD_ROWS, left = job.rows - first_row;
    const int64_t rows = left < HEAD_ROWS ? left : HEAD_ROWS;
    if (blockIdx.x == tiles) return turn_queries(job, first_row, rows);
    const unsigned lane = threadIdx.x % 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * HEAD_OUTPUTS + threadIdx.x / 32 * OUTPUTS;
    if (first >= job.outputs) return;       // the whole warp; there are no barriers
    const float *x = job.x + first_row * job.x_stride + blockIdx.y * job.width;
    float sums[OUTPUTS * ROWS] = {};        // value b * OUTPUTS + r
    for (int64_t piece = lane; piece < job.columns / 8; piece += 32) {
        float mine[ROWS][8];
        DC_UNROLL
        for (int b = 0; b < ROWS; b++) load_eight(x + (b < rows ? b : 0) * job.x_stride + 8 * piece, mine[b]);
        DC_UNROLL
        for (int r = 0; r < OUTPUTS; r++) {
            if (first + r >= job.outputs) continue;
            float w[8];
            unpack<B>(row_of<B>(job.blocks, blockIdx.y * job.outputs + first + r, job.columns), piece, w);
            DC_UNROLL
            for (int b = 0; b < ROWS; b++) {
                DC_UNROLL
                for (int i = 0; i < 8; i++) sums[b * OUTPUTS + r] = fmaf(w[i], mine[b][i], sums[b * OUTPUTS + r]);
            }
        }
    }
    constexpr int COUNT = OUTPUTS * ROWS, SHARE = 32 / COUNT;
    const float y = sum_of_lanes<COUNT>(sums, lane);
    const int64_t output = first + lane / SHARE % OUTPUTS, row = lane / SHARE / OUTPUTS;
    if (lane % SHARE == 0 && output < job.outputs && row < rows) write_number(job, first_row + row, output, job.scale * y);
}

template <class B, int ROWS> const char *launch_by_head(const HeadsJob &job, int64_t heads, int64_t stream) {
    const unsigned tiles = job.blocks == nullptr ? 0 : static_cast<unsigned>((job.outputs + HEAD_OUTPUTS - 1) / HEAD_OUTPUTS);
    const unsigned turning = job.turning.half > 0 ? 1 : 0;
    if (tiles + turning == 0) return nullptr;
    const dim3 grid(tiles + turning, static_cast<unsigned>(heads), static_cast<unsigned>((job.rows + HEAD_ROWS - 1) / HEAD_ROWS));
    const auto kernel = by_head_kernel<B, ROWS>;
    return DC_LAUNCH(kernel, grid, HEAD_WARPS * 32, as_pointer<void>(stream), job, tiles);
}

const char *launch_heads_product(const HeadsJob &job, int64_t heads, int64_t type, int64_t stream) {
    return with_block_or_floats(type, [&](auto block) {
        using B = decltype(block);
        if (job.rows == 1) return launch_by_head<B, 1>(job, heads, stream);
        if (job.rows == 2) return launch_by_head<B, 2>(job, heads, stream);
        if (job.rows <= 4) return launch_by_head<B, 4>(job, heads, stream);
        return launch_by_head<B, 8>(job, heads, stream);
    });
}

}  // namespace

const char *dc_cuda_append_latents(int64_t x, int64_t x_type, int64_t row_stride, int64_t rows, int64_t kept, int64_t weight,
                                   double epsilon, int64_t cos, int64_t sin, int64_t half, int64_t adjacent, int64_t positions,
                                   int64_t slots, int64_t max_positions, int64_t num_slots, int64_t pages, int64_t cache_type,
                                   int64_t page_stride, int64_t slot_stride, int64_t stream) {
    if (rows == 0) return nullptr;
    AppendJob job{};
    job.row_stride = row_stride;
    job.rows = rows;
    job.kept = kept;
    job.weight = as_pointer<const float>(weight);
    job.epsilon = static_cast<float>(epsilon);
    job.turning = Turning{as_pointer<const float>(cos), as_pointer<const float>(sin), max_positions, static_cast<int>(half), adjacent != 0};
    job.positions = as_pointer<const int64_t>(positions);
    job.slots = as_pointer<const int64_t>(slots);
    job.num_slots = num_slots;
    job.page_stride = page_stride;
    job.slot_stride = slot_stride;
    if (x_type == F32) return launch_append_into<float>(cache_type, job, x, pages, stream);
    return launch_append_into<bf16>(cache_type, job, x, pages, stream);
}

const char *dc_cuda_by_head(int64_t x, int64_t x_stride, int64_t width, int64_t rows, int64_t heads, int64_t blocks, int64_t type,
                            int64_t outputs, int64_t columns, int64_t out, int64_t out_type, int64_t out_stride, int64_t stream) {
    if (rows == 0 || outputs == 0) return nullptr;
    HeadsJob job{};
    job.x = as_pointer<const float>(x);
    job.x_stride = x_stride;
    job.width = width;
    job.rows = rows;
    job.blocks = as_pointer<const uint8_t>(blocks);
    job.outputs = outputs;
    job.columns = columns;
    job.scale = 1.0f;
    job.out = as_pointer<void>(out);
    job.out_type = out_type;
    job.out_stride = out_stride;
    job.out_width = outputs;
    return launch_heads_product(job, heads, type, stream);
}

const char *dc_cuda_absorb(int64_t x, int64_t x_stride, int64_t rows, int64_t heads, int64_t blocks, int64_t type, int64_t kept,
                           int64_t plain, double scale, int64_t cos, int64_t sin, int64_t half, int64_t adjacent, int64_t positions,
                           int64_t max_positions, int64_t out, int64_t stream) {
    if (rows == 0) return nullptr;
    HeadsJob job{};
    job.x = as_pointer<const float>(x);
    job.x_stride = x_stride;
    job.width = plain + 2 * half;
    job.rows = rows;
    job.blocks = as_pointer<const uint8_t>(blocks);
    job.outputs = kept;
    job.columns = plain;
    job.scale = static_cast<float>(scale);
    job.out = as_pointer<void>(out);
    job.out_type = F32;
    job.out_width = kept + 2 * half;
    job.out_stride = heads * job.out_width;
    job.turning = Turning{as_pointer<const float>(cos), as_pointer<const float>(sin), max_positions, static_cast<int>(half), adjacent != 0};
    job.positions = as_pointer<const int64_t>(positions);
    return launch_heads_product(job, heads, type, stream);
}
