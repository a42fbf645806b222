// ops      A layer's experts: route (which of them each row goes to), group (the pairs of a row and an expert, by expert),
//          multiply_experts (each pair's x times its expert's W), for few pairs of an expert or for many.
// shapes   logits (T, E) f32 -> ids i32, shares f32 (T, n); pair p is row p / n with its expert ids[p]. order (P) i32: pairs,
//          those of an expert together; items (I, 3) i32: expert, first place in `order`, pairs, of which there are at most as
//          many as an item takes; what is left over has no pairs. x (T or P, K) f32, or bf16 for many; W (E * N, K) in rows of
//          blocks -> out (P, N) f32 or bf16. With gates, W is (2 * E * N, K), the ups of all experts below their gates.
// mapping  route: a warp per row. group: one block. Few: a block is 4 outputs (2 with gates) of an item of up to 4 pairs, see
//          products.h. Many: a block is 64 outputs (32 with gates) of an item of up to 64 pairs; it unpacks 64 x 64 weights
//          at a time to bf16 in shared memory, and each warp multiplies them by 16 of the pairs on the tensor cores. Items
//          are counted on the device, and grids cover the most there can be: nothing here waits for the routing.
// cost     Each item reads its expert's W once: few rows are bound by that memory, 64 rows by unpacking and the tensor cores.
// numerics Few: as packed.cu, f32. Many: x and W rounded to bf16, sums f32 in the order of the columns. A pair's bits do not depend
//          on the others, nor on its place in `order`, which atomic additions decide.

#include "launch.h"

#include "products.h"

namespace {

using namespace dc_device;

constexpr int ROUTE_WARPS = 4, GROUP_THREADS = 1024, MOST_EXPERTS = 1024;
constexpr int FEW = 4, MANY = 64;           // pairs of an item
constexpr int STEP = 64, STRIDE = STEP + 8; // columns at once; a row of them in shared memory, clear of bank conflicts
static_assert(GROUP_THREADS == MOST_EXPERTS, "a thread for each expert");

// --- which row goes where ----------------------------------------------------------------------------------------

// Larger for larger logits, and of equal ones for lower ids.
DC_DEVICE uint64_t rank_of(float logit, int id) {
    union { float value; uint32_t bits; } x;
    x.value = logit == 0 ? 0.0f : logit;
    const uint32_t key = x.bits >> 31 ? ~x.bits : x.bits | 0x80000000u;
    return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

DC_KERNEL(ROUTE_WARPS * 32)
route_kernel(const float *logits, const int64_t *slots, int64_t rows, int experts, int chosen, bool sum_to_one, int32_t *ids,
             float *shares) {
    after_previous();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * ROUTE_WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const int lane = threadIdx.x % 32;
    logits += row * experts;
    ids += row * chosen;
    shares += row * chosen;
    if (slots != nullptr && slots[row] < 0) {               // padding must not make anything read weights
        for (int j = lane; j < chosen; j += 32) ids[j] = -1;
        return;
    }
    uint64_t last = ~0ull;
    float largest = 0, sum = 0;
    for (int j = 0; j < chosen; j++) {
        uint64_t best = 0;
        for (int e = lane; e < experts; e += 32) {
            const uint64_t rank = rank_of(logits[e], e);
            if (rank < last && rank > best) best = rank;
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            const uint64_t other = __shfl_xor_sync(ALL_LANES, best, distance);
            if (other > best) best = other;
        }
        last = best;
        const int id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
        if (j == 0) largest = logits[id];
        const float weight = expf(logits[id] - largest);
        sum += weight;
        if (lane == 0) {
            ids[j] = id;
            shares[j] = weight;
        }
    }
    if (!sum_to_one) {
        sum = 0;
        for (int e = lane; e < experts; e += 32) sum += expf(logits[e] - largest);
        sum = warp_sum(sum);
    }
    __syncwarp();
    for (int j = lane; j < chosen; j += 32) shares[j] /= sum;
}

struct GroupShared {
    int32_t counts[MOST_EXPERTS];
    int32_t places[MOST_EXPERTS];       // then where the next pair of an expert goes
    int32_t items[MOST_EXPERTS];        // before an expert's first
};

DC_KERNEL(GROUP_THREADS)
group_kernel(const int32_t *ids, int64_t pairs, int experts, int item_pairs, int32_t *order, int32_t *items, int64_t most_items) {
    after_previous();
    DC_SHARED(GroupShared, shared);
    const int thread = threadIdx.x;
    shared.counts[thread] = 0;
    for (int64_t i = thread; i < most_items; i += GROUP_THREADS) items[3 * i + 2] = 0;
    __syncthreads();
    const auto known = [&](int64_t p) { return ids[p] >= 0 && ids[p] < experts; };
    for (int64_t p = thread; p < pairs; p += GROUP_THREADS)
        if (known(p)) atomicAdd(&shared.counts[ids[p]], 1);
    __syncthreads();
    if (thread < 32) {                  // sums over the experts before each, 32 at a time
        int32_t pairs_before = 0, items_before = 0;
        for (int first = 0; first < experts; first += 32) {
            const int32_t count = shared.counts[first + thread], own = (count + item_pairs - 1) / item_pairs;
            int32_t pair_sum = count, item_sum = own;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int32_t p = __shfl_up_sync(ALL_LANES, pair_sum, distance), i = __shfl_up_sync(ALL_LANES, item_sum, distance);
                if (thread >= distance) pair_sum += p, item_sum += i;
            }
            shared.places[first + thread] = pairs_before + pair_sum - count;
            shared.items[first + thread] = items_before + item_sum - own;
            pairs_before += __shfl_sync(ALL_LANES, pair_sum, 31);
            items_before += __shfl_sync(ALL_LANES, item_sum, 31);
        }
    }
    __syncthreads();
    if (thread < experts) {
        for (int32_t done = 0, i = shared.items[thread]; done < shared.counts[thread]; done += item_pairs, i++) {
            const int32_t left = shared.counts[thread] - done;
            items[3 * i] = thread;
            items[3 * i + 1] = shared.places[thread] + done;
            items[3 * i + 2] = left < item_pairs ? left : item_pairs;
        }
    }
    __syncthreads();
    for (int64_t p = thread; p < pairs; p += GROUP_THREADS)
        if (known(p)) order[atomicAdd(&shared.places[ids[p]], 1)] = static_cast<int32_t>(p);
}

// --- products ----------------------------------------------------------------------------------------------------

struct ExpertJob {
    const void *x;
    int64_t pairs_per_row;                  // of x
    const int32_t *order, *items;
    const uint8_t *blocks;
    int64_t experts, outputs, columns;
    int64_t gate;
    const float *bias, *shares;             // of each row of W, of each pair; or null
    void *out;
    int64_t out_type, out_stride;
};

struct Item {
    int64_t expert;
    int first, pairs;
};

DC_DEVICE Item item_of(const ExpertJob &job) {
    const int32_t *item = job.items + 3 * blockIdx.y;
    return Item{item[0], item[1], item[2]};
}

// W's row for an output of an expert, or for the up that belongs to a gate.
DC_DEVICE int64_t weight_row(const ExpertJob &job, int64_t expert, int64_t output, bool up) {
    return ((up ? job.experts : 0) + expert) * job.outputs + output;
}

// `up` is read with a gate alone.
DC_DEVICE void write_output(const ExpertJob &job, int64_t expert, int64_t pair, int64_t output, float y, float up) {
    const int64_t row = weight_row(job, expert, output, false);
    if (job.bias != nullptr) y += job.bias[row];
    if (job.gate != NO_ACTIVATION)
        y = activated(job.gate, y, job.bias != nullptr ? up + job.bias[weight_row(job, expert, output, true)] : up);
    if (job.shares != nullptr) y *= job.shares[pair];
    const int64_t at = pair * job.out_stride + output;
    if (job.out_type == F32) {
        static_cast<float *>(job.out)[at] = y;
    } else {
        static_cast<bf16 *>(job.out)[at] = from_float<bf16>(y);
    }
}

template <class B, int ROWS>
DC_DEVICE void multiply_few(const ExpertJob &job, const Item &item, ProductShared<FEW> &shared) {
    const int made = job.gate == NO_ACTIVATION ? OUTPUTS : OUTPUTS / 2;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * made;
    const float *x[ROWS];
    const uint8_t *w[OUTPUTS];
    DC_UNROLL
    for (int b = 0; b < ROWS; b++) {                            // past the last pair, the first
        const int64_t pair = job.order[item.first + (b < item.pairs ? b : 0)];
        x[b] = static_cast<const float *>(job.x) + pair / job.pairs_per_row * job.columns;
    }
    DC_UNROLL
    for (int r = 0; r < OUTPUTS; r++) {
        const bool up = r >= made;
        const int64_t output = first + (up ? r - made : r);
        w[r] = output < job.outputs ? row_of<B>(job.blocks, weight_row(job, item.expert, output, up), job.columns) : nullptr;
    }
    float sums[OUTPUTS][ROWS] = {};
    add_products<B, ROWS>([&](int b, int64_t piece, float (&eight)[8]) { load_eight(x[b] + 8 * piece, eight); },
                          [&](int r) { return w[r]; }, job.columns, sums);
    join_products(sums, shared);
    const int r = threadIdx.x % made, b = threadIdx.x / made;
    if (b >= item.pairs || first + r >= job.outputs) return;
    const float *found = shared.sums[0] + b * OUTPUTS + r;
    write_output(job, item.expert, job.order[item.first + b], first + r, found[0], job.gate == NO_ACTIVATION ? 0.0f : found[made]);
}

template <class B> DC_KERNEL(PRODUCT_WARPS * 32) few_kernel(ExpertJob job) {
    after_previous();
    DC_SHARED(ProductShared<FEW>, shared);
    const Item item = item_of(job);
    if (item.pairs == 0) return;
    if (item.pairs == 1) return multiply_few<B, 1>(job, item, shared);
    multiply_few<B, FEW>(job, item, shared);
}

union ManyRow {                             // of bf16
    Bytes16 packs[STRIDE / 8];
    uint32_t pairs[STRIDE / 2];
};

union ManyShared {
    struct {
        ManyRow x[MANY], w[MANY];           // w: rows of W; with gates, 32 of the gates and then their ups
    } step;
    float sums[MANY][MANY + 4];             // in the end
};

template <class B> DC_KERNEL(PRODUCT_WARPS * 32) many_kernel(ExpertJob job) {
    after_previous();
    DC_SHARED(ManyShared, shared);
    const Item item = item_of(job);
    if (item.pairs == 0) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, made = job.gate == NO_ACTIVATION ? MANY : MANY / 2;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * made;
    float sums[8][4] = {};                  // of 16 x 64 outputs, as the tensor cores lay out 8 parts of 16 x 8
    for (int64_t begin = 0; begin < job.columns; begin += STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < MANY * STEP / 8; i += PRODUCT_WARPS * 32) {
            const int r = i / (STEP / 8), pack = i % (STEP / 8);
            const int64_t output = first + r % made, column = begin + 8 * pack;
            union { Bytes16 bytes; bf16 values[8]; } x{}, w{};
            if (r < item.pairs && column < job.columns) {
                const int64_t row = job.order[item.first + r] / job.pairs_per_row;
                x.bytes = *reinterpret_cast<const Bytes16 *>(static_cast<const bf16 *>(job.x) + row * job.columns + column);
            }
            if (output < job.outputs && column < job.columns) {
                float values[8];
                unpack<B>(row_of<B>(job.blocks, weight_row(job, item.expert, output, r >= made), job.columns), column / 8, values);
                DC_UNROLL
                for (int e = 0; e < 8; e++) w.values[e] = from_float<bf16>(values[e]);
            }
            shared.step.x[r].packs[pack] = x.bytes;
            shared.step.w[r].packs[pack] = w.bytes;
        }
        __syncthreads();
        if (16 * warp >= item.pairs) continue;
        DC_UNROLL
        for (int k = lane % 4; k < STEP / 2; k += 8) {          // pairs of columns, as multiply_bf16 wants them
            const ManyRow *x = shared.step.x + 16 * warp + lane / 4;
            const uint32_t a[4] = {x[0].pairs[k], x[8].pairs[k], x[0].pairs[k + 4], x[8].pairs[k + 4]};
            DC_UNROLL
            for (int j = 0; j < 8; j++) {
                const ManyRow &w = shared.step.w[8 * j + lane / 4];
                const uint32_t b[2] = {w.pairs[k], w.pairs[k + 4]};
                multiply_bf16(sums[j], a, b);
            }
        }
    }
    __syncthreads();
    DC_UNROLL
    for (int j = 0; j < 8; j++) {
        DC_UNROLL
        for (int i = 0; i < 4; i++) shared.sums[16 * warp + lane / 4 + i / 2 * 8][8 * j + lane % 4 * 2 + i % 2] = sums[j][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < item.pairs * made; i += PRODUCT_WARPS * 32) {
        const int r = i / made, n = i % made;
        if (first + n >= job.outputs) continue;
        const float *found = &shared.sums[r][n];
        write_output(job, item.expert, job.order[item.first + r], first + n, found[0], job.gate == NO_ACTIVATION ? 0.0f : found[made]);
    }
}

}  // namespace

const char *dc_cuda_route(int64_t logits, int64_t slots, int64_t rows, int64_t experts, int64_t chosen, int64_t sum_to_one,
                          int64_t ids, int64_t shares, int64_t stream) {
    if (rows == 0) return nullptr;
    const unsigned blocks = static_cast<unsigned>((rows + ROUTE_WARPS - 1) / ROUTE_WARPS);
    return DC_LAUNCH(route_kernel, dim3(blocks), ROUTE_WARPS * 32, as_pointer<void>(stream), as_pointer<const float>(logits),
                     as_pointer<const int64_t>(slots), rows, static_cast<int>(experts), static_cast<int>(chosen), sum_to_one != 0,
                     as_pointer<int32_t>(ids), as_pointer<float>(shares));
}

const char *dc_cuda_group(int64_t ids, int64_t pairs, int64_t experts, int64_t item_pairs, int64_t order, int64_t items,
                          int64_t most_items, int64_t stream) {
    return DC_LAUNCH(group_kernel, dim3(1), GROUP_THREADS, as_pointer<void>(stream), as_pointer<const int32_t>(ids), pairs,
                     static_cast<int>(experts), static_cast<int>(item_pairs), as_pointer<int32_t>(order), as_pointer<int32_t>(items),
                     most_items);
}

const char *dc_cuda_multiply_experts(int64_t x, int64_t x_type, int64_t pairs_per_row, int64_t order, int64_t items,
                                     int64_t most_items, int64_t blocks, int64_t type, int64_t experts, int64_t outputs,
                                     int64_t columns, int64_t gate, int64_t bias, int64_t shares, int64_t out, int64_t out_type,
                                     int64_t out_stride, int64_t stream) {
    if (most_items == 0) return nullptr;
    ExpertJob job{};
    job.x = as_pointer<const void>(x);
    job.pairs_per_row = pairs_per_row;
    job.order = as_pointer<const int32_t>(order);
    job.items = as_pointer<const int32_t>(items);
    job.blocks = as_pointer<const uint8_t>(blocks);
    job.experts = experts;
    job.outputs = outputs;
    job.columns = columns;
    job.gate = gate;
    job.bias = as_pointer<const float>(bias);
    job.shares = as_pointer<const float>(shares);
    job.out = as_pointer<void>(out);
    job.out_type = out_type;
    job.out_stride = out_stride;
    const bool many = x_type == BF16;
    const int64_t made = (many ? MANY : OUTPUTS) / (gate == NO_ACTIVATION ? 1 : 2);
    const dim3 grid(static_cast<unsigned>((outputs + made - 1) / made), static_cast<unsigned>(most_items));
    return with_block_or_floats(type, [&](auto block) {
        using B = decltype(block);
        const auto kernel = many ? many_kernel<B> : few_kernel<B>;
        return DC_LAUNCH(kernel, grid, PRODUCT_WARPS * 32, as_pointer<void>(stream), job);
    });
}
