// The ops of decode_core, each with its contract. Pointers have been checked by the caller (csrc/decode_core/*.py, bindings.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract.h"
#include "cpu/attention/attention_plan.h"
#include "cpu/cpu.h"

namespace dc {

class Ranks;                    // cpu/ranks/ranks.h

// --- sample ----------------------------------------------------------------------------------------------------------
// One token for each row of logits: penalties and bias -> temperature -> top-k -> top-p over what top-k kept -> min-p -> the
// largest z + Gumbel noise. Token = function of (the row's logits bits, its SampleRow and lists) and of nothing else: not of
// its index, the batch, the threads or the instruction set. Ties: lower id. A row without a finite logit gives id 0.
//   logits        f32 [rows][vocab], `stride` elements from row to row; not changed
//   params        SampleRow[rows]; ids in the lists are in [0, vocab)
//   tokens        i32[rows]; -1 where the row is inactive
struct SampleArgs {
    const float* logits;
    int64_t rows, vocab, stride;
    const SampleRow* params;
    const int32_t* count_ids;
    const int32_t* counts;
    const int32_t* bias_ids;
    const float* bias_values;
    int32_t* tokens;
};

void sample(const SampleArgs& args);                            // rows are shared out over the pool
size_t sample_scratch_bytes(int64_t vocab);
DC_EACH_ISA(void sample_row(const SampleArgs& args, int64_t row))

// --- rope_append, paged_attention ------------------------------------------------------------------------------------

// Norm, rotation, value embedding and scale of each row's q, k and v, which may be made of k's product; k and v go into the
// pages (cpu/attention/attention.h says how one lies in memory). Its slots and positions have passed check_rope_indices, which throws std::invalid_argument.
void rope_append(const RopeJob& job);
void check_rope_indices(const RopeJob& job, int64_t max_positions, int64_t num_pages);

// softmax(q K^T) V of each row over its own pages, decode rows and prompt chunks alike; a row's bits depend on nothing else.
void paged_attention(const AttentionJob& job, const AttentionPlan::Work& work);

// --- all_reduce, all_gather ------------------------------------------------------------------------------------------
// What every rank of a model has becomes what all have: x, `rows` of `columns` float32, the same shape on every rank.
//   all_reduce    out = residual + (x of rank 0 + x of rank 1 + ...), added in this order; residual [rows][columns] or null, it
//                 and x may be out; rows * columns a multiple of 16. So the bits are fixed for a number of ranks.
//   all_gather    rank i's x becomes columns [i * columns, (i + 1) * columns) of out [rows][out_columns]; what is beyond its end
//                 is left out
// x may be ranks->next(), which saves the copy.
// All ranks run the same ones in the same order. run_exchange throws std::runtime_error if the others cannot come (ranks.h); a
// step shares offer and join out by rows, with one meet between them.
struct Exchange {
    Ranks* ranks;
    bool sums;                                                  // all_reduce
    int64_t rows, columns;
    const float* x;
    const float* residual;
    int64_t out_columns;
    float* out;
};

void offer(const Exchange& exchange, int64_t begin, int64_t end);      // rows of x to where the others read them
void meet(const Exchange& exchange);
void join(const Exchange& exchange, int64_t begin, int64_t end);       // rows of out
void run_exchange(const Exchange& exchange);

// --- benches ---------------------------------------------------------------------------------------------------------
// The sum of the memory's 64-bit words, on all threads: attention's reads without its arithmetic, for benches.
uint64_t read_memory(const void* memory, int64_t bytes);

}  // namespace dc
