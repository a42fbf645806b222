// What attention of decode rows has in common: the spans of a row's keys, and how what they make of a head is merged.
//
// A row's keys are chunks of 64 positions at absolute borders; a span is one chunk, or as many as it takes to have no more than
// most_spans (8,192 keys are 128 spans of one). A block of threads takes a span of some heads. The grid covers the longest row the
// table allows; blocks beyond a row's length leave at once. Of each 16 spans, the block that arrives last at their ticket merges them,
// a warp a head; of these groups, the last one merges the groups. So no merge is longer than 16 states, and 8 may run at once. Order and
// borders depend on a row's length and window alone.
#pragma once

#include "device.h"

namespace dc_device {

constexpr int CHUNK = 64, PAGE = 16, CHUNK_PAGES = CHUNK / PAGE;
constexpr int MERGED = 16;                  // states in one merge

struct AttentionJob {                       // by value into the kernel; strides in elements
    const float *q;
    const int32_t *block_table, *lengths;
    int64_t table_stride, num_pages;
    int table_width, heads, kv_heads, head_size, value_size, window;
    int most_spans;                         // of any row
    int max_spans, max_groups;              // of a row of this table: the grid, and the states of a head
    float softcap;                          // scores become softcap * tanh(score / softcap); 0: they stay
    const float *sinks;                     // (Hq) or null; neither scaled nor capped
    int64_t page_stride, head_stride, slot_stride;
    void *out;
    int64_t out_type;
    float *states;                          // (B, Hq, spans and then groups, 2 + Dv): largest score, sum of weights, weighted values
    int32_t *tickets;                       // (B, Hk, 1 + max_groups): of the groups together, of each; zero between launches
};

struct Range {                              // of one block: absolute positions [begin, end) of one span
    int begin, end, span, spans;            // index among the spans that the row sees
};

DC_DEVICE bool find_range(const AttentionJob &job, Range &range) {
    int length = job.lengths[blockIdx.z];
    if (length > job.table_width * PAGE) length = job.table_width * PAGE;
    if (length <= 0) return false;
    const int first_key = job.window > 0 && length > job.window ? length - job.window : 0;
    const int first_chunk = first_key / CHUNK, chunks = (length + CHUNK - 1) / CHUNK - first_chunk;
    const int span_chunks = (chunks + job.most_spans - 1) / job.most_spans;
    range.span = static_cast<int>(blockIdx.x);
    range.spans = (chunks + span_chunks - 1) / span_chunks;
    if (range.span >= range.spans) return false;
    const int start = (first_chunk + range.span * span_chunks) * CHUNK, after = start + span_chunks * CHUNK;
    range.begin = start > first_key ? start : first_key;
    range.end = after < length ? after : length;
    return true;
}

// Sums of exp(score - largest) over the keys that a head sees, and of values times these -> an output.
DC_DEVICE void write_out(const AttentionJob &job, int64_t index, float largest, float sum, float value) {
    const bool sees = sum > 0;                                  // no key at all: 0
    // far above the largest score, a sink adds infinity, and the quotient is 0
    if (sees && job.sinks != nullptr) sum += expf(job.sinks[index / job.value_size % job.heads] - largest);
    const float y = sees ? value / sum : 0.0f;
    if (job.out_type == F32) {
        static_cast<float *>(job.out)[index] = y;
    } else {
        static_cast<bf16 *>(job.out)[index] = from_float<bf16>(y);
    }
}

// Up to MERGED states of a head, in order, become one: `into`, or the head's Dv outputs. By a warp.
template <int MAX_SIZE>
DC_DEVICE void merge(const AttentionJob &job, int64_t head, const float *states, int count, float *into) {
    const int lane = threadIdx.x % 32, size = job.value_size, stride = 2 + size;
    const float own = lane < count ? load_fresh(states + lane * stride) : -INFINITY;            // the largest score of a state
    float largest = own;
    for (int distance = 16; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
    const float own_factor = own == -INFINITY ? 0.0f : expf(own - largest);
    const float sum = warp_sum(lane < count ? own_factor * load_fresh(states + lane * stride + 1) : 0.0f);
    float factors[MERGED];
    DC_UNROLL
    for (int c = 0; c < MERGED; c++) factors[c] = __shfl_sync(ALL_LANES, own_factor, c);
    DC_UNROLL
    for (int i = 0; i < MAX_SIZE / 32; i++) {
        const int d = lane + 32 * i;
        if (d >= size) continue;
        float found[MERGED], value = 0.0f;                      // all of them asked for before the first is used
        DC_UNROLL
        for (int c = 0; c < MERGED; c++) found[c] = c < count ? load_fresh(states + c * stride + 2 + d) : 0.0f;
        DC_UNROLL
        for (int c = 0; c < MERGED; c++) value = fmaf(c < count ? factors[c] : 0.0f, found[c], value);
        if (into == nullptr) write_out(job, head * size + d, largest, sum, value);
        else into[2 + d] = value;
    }
    if (into != nullptr && lane == 0) {
        into[0] = largest;
        into[1] = sum;
    }
}

// Whether this block is the last of `count` at a ticket. What the others wrote before can be read then.
template <class Shared> DC_DEVICE bool arrives_last(int32_t *ticket, int count, Shared &shared) {
    __threadfence();                        // this block's states, before its ticket
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.last = atomicAdd(ticket, 1) == count - 1;
        if (shared.last) *ticket = 0;       // ready for the next launch
    }
    __syncthreads();
    if (!shared.last) return false;
    __threadfence();                        // the others' states, after their tickets
    return true;
}

// When a block has written what its span, one of several, makes of `heads` heads: the last block merges. By the whole block.
template <int MAX_SIZE, class Shared>
DC_DEVICE void merge_spans(const AttentionJob &job, const Range &range, int64_t first_head, int heads, int32_t *tickets, int warps,
                           Shared &shared) {
    const int stride = 2 + job.value_size, mine = range.span / MERGED, groups = (range.spans + MERGED - 1) / MERGED;
    const int left = range.spans - mine * MERGED, members = left < MERGED ? left : MERGED, warp = threadIdx.x / 32;
    const int64_t head_states = static_cast<int64_t>(job.max_spans + job.max_groups) * stride;
    if (!arrives_last(tickets + 1 + mine, members, shared)) return;
    for (int h = warp; h < heads; h += warps) {
        float *states = job.states + (first_head + h) * head_states;
        float *into = groups == 1 ? nullptr : states + (job.max_spans + mine) * stride;
        merge<MAX_SIZE>(job, first_head + h, states + mine * MERGED * stride, members, into);
    }
    if (groups == 1 || !arrives_last(tickets, groups, shared)) return;
    for (int h = warp; h < heads; h += warps)
        merge<MAX_SIZE>(job, first_head + h, job.states + (first_head + h) * head_states + job.max_spans * stride, groups, nullptr);
}

}  // namespace dc_device
