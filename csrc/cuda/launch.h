// The CUDA ops as C functions: what bindings.cpp exposes and tests/core/test_core_cuda.py calls in the host emulation.
//
// Every integer and every address is an int64_t and every real a double, so that pybind11 and ctypes pass the same
// Python numbers. Addresses are device addresses (host addresses in the emulation); 0 only where "or 0" is said. All
// work goes to `stream` (a cudaStream_t). The functions allocate nothing, read nothing back and launch grids that depend
// on the sizes alone, so a captured graph replays them on whatever the arrays then hold. They return nullptr, or a
// message. Arguments are not checked here: csrc/decode_core/cuda.py does that before an address crosses.
#pragma once

#include <cstdint>

extern "C" {

// Number of usable devices: 0 without a driver, with one that is too old, or without a device. Never fails.
int64_t dc_cuda_devices();

// Ten times a device's compute capability (90: an H100), or 0 where there is no such device. Never fails.
int64_t dc_cuda_capability(int64_t device);

// The current device's index, or -1.
int64_t dc_cuda_current_device();

// One token for each row of logits (rows, vocabulary), element type 0 = f32 or 2 = bf16, vocabulary <= 2^18. `params`:
// dc::SampleRow[rows] of csrc/contract.h; its lists in count_ids, counts (count_size i32 each) and bias_ids, bias_values
// (bias_size i32, f32); all on the device. f32 rows that have penalties or bias are changed in place, bf16 rows never.
// tokens (i32): -1 for a row with position < 0. threads: 1024; tests also take 32 .. 512, powers of two.
const char *dc_cuda_sample(int64_t logits, int64_t type, int64_t row_stride, int64_t rows, int64_t vocabulary,
                           int64_t params, int64_t count_ids, int64_t counts, int64_t count_size, int64_t bias_ids,
                           int64_t bias_values, int64_t bias_size, int64_t tokens, int64_t threads,
                           int64_t stream);

// qkv (rows, (heads + 2 kv_heads) * head_size) f32 or bf16 -> q_out (rows, heads, head_size) f32 and the pages. positions,
// slots (rows) i64: slot = page * 16 + place; outside [0, num_slots) the row is left alone (padding: -1). cos, sin
// (max_positions, half_rotated) f32. norm: 0 none, 1 before rope, 2 after it; q_norm, k_norm (head_size) f32 or 0. q and k are
// multiplied by post_scale, q also by q_scale. cache_type 3 = q8: codes, and f16 scales of each 32 in k_scales and v_scales, in the
// same order, so that strides are multiples of 32; q, k and v are turned by the Hadamard matrix; 0 for floats. value_embed (rows, kv_heads * head_size), gate (rows, kv_heads) in
// qkv's type, or 0: v += gate_scale * sigmoid(gate) * value_embed. Strides count elements.
const char *dc_cuda_rope_append(int64_t qkv, int64_t qkv_type, int64_t row_stride, int64_t rows, int64_t heads,
                                int64_t kv_heads, int64_t head_size, int64_t positions, int64_t slots,
                                int64_t max_positions, int64_t num_slots, int64_t cos, int64_t sin, int64_t half_rotated,
                                int64_t norm, int64_t q_norm, int64_t k_norm,
                                double epsilon, double post_scale, double q_scale, int64_t value_embed,
                                int64_t value_stride, int64_t gate, int64_t gate_stride, double gate_scale, int64_t q_out,
                                int64_t k_pages, int64_t v_pages, int64_t k_scales, int64_t v_scales, int64_t cache_type,
                                int64_t page_stride, int64_t head_stride, int64_t slot_stride, int64_t stream);

// x (heads, head_size) f32 times the normalized Hadamard matrix -> out, type 0 = f32 or 2 = bf16. head_size a power of two, 32 .. 256.
const char *dc_cuda_turn(int64_t x, int64_t heads, int64_t head_size, int64_t out, int64_t out_type, int64_t stream);

// Decode attention: q (rows, heads, head_size) f32, scaled already; block_table (rows, table_width) i32; lengths (rows) i32,
// <= 0 = inactive: its output is left alone; window 0 = every key; softcap 0 = none; sinks (heads) f32 or 0. max_chunks: chunks
// of 64 positions that a row can see; most_spans, up to 256: the parts that are computed side by side, of each row, whatever its
// length. With S = min(max_chunks, most_spans) and G = S / 16 rounded up: states has rows * heads * (S + G) * (2 + head_size) f32,
// any content; tickets rows * kv_heads * (1 + G) i32, zero before the first launch and after every one. out (rows, heads *
// head_size), type 0 = f32 or 2 = bf16. Pages of q8 as dc_cuda_rope_append has them; q is turned then, and so is out.
const char *dc_cuda_paged_attention(int64_t q, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size,
                                    int64_t k_pages, int64_t v_pages, int64_t k_scales, int64_t v_scales, int64_t cache_type, int64_t num_pages,
                                    int64_t page_stride, int64_t head_stride, int64_t slot_stride, int64_t block_table,
                                    int64_t table_stride, int64_t table_width, int64_t lengths, int64_t window, double softcap,
                                    int64_t sinks, int64_t max_chunks, int64_t most_spans, int64_t states, int64_t tickets, int64_t out, int64_t out_type,
                                    int64_t stream);

// out (rows, outputs) = residual + activation(norm(x) times the transpose of W + bias), rows 1 .. 8. x: type 0 = f32 or 2 = bf16, rows
// at multiples of 16 bytes, of which the first `columns` are multiplied. norm 1: x is divided by its root mean square over `width`
// columns (epsilon under the root), times norm_weight (width) f32, or 0. W has `outputs` rows of blocks of a `type` of blocks.h, of
// whose COLUMNS `columns` is a multiple, as a GGUF file has them, beginning at an even address (MXFP4 and U4 at any), or floats, which
// blocks.h numbers after them, at a multiple of 16 bytes. activation: 0 none; 1 swiglu, 2 geglu, 3 clamped_swiglu of that and of
// `outputs` rows further down; 4 relu2. bias: f32 of each row of W, or 0. residual: f32 (rows, outputs), or 0. out: type 0 or 2.
// Strides count elements.
const char *dc_cuda_multiply(int64_t x, int64_t x_type, int64_t x_stride, int64_t rows, int64_t norm, int64_t width,
                             int64_t norm_weight, double epsilon, int64_t blocks, int64_t type, int64_t outputs, int64_t columns,
                             int64_t bias, int64_t activation, int64_t residual, int64_t residual_stride, int64_t out,
                             int64_t out_type, int64_t out_stride, int64_t stream);

// The rows of such a W as floats: out (rows, columns), type 0 = f32 or 2 = bf16, contiguous.
const char *dc_cuda_dequantize(int64_t blocks, int64_t type, int64_t rows, int64_t columns, int64_t out, int64_t out_type,
                               int64_t stream);

// logits (rows, experts) f32 -> ids i32 and shares f32 (rows, chosen): each row's `chosen` largest, of equal ones the lower ids, and
// the softmax over them, or over all unless sum_to_one. experts <= 1024, chosen <= experts. slots (rows) i64 or 0: a row whose slot
// is < 0 is padding, and its ids are -1.
const char *dc_cuda_route(int64_t logits, int64_t slots, int64_t rows, int64_t experts, int64_t chosen, int64_t sum_to_one,
                          int64_t ids, int64_t shares, int64_t stream);

// Pairs 0 .. pairs - 1, pair p with expert ids[p] -> order (pairs) i32, those of an expert together, and items (most_items, 3) i32:
// expert, first place in `order`, number of pairs up to item_pairs, 0 = unused. most_items: as many as any ids can need.
const char *dc_cuda_group(int64_t ids, int64_t pairs, int64_t experts, int64_t item_pairs, int64_t order, int64_t items,
                          int64_t most_items, int64_t stream);

// For each pair p of each item: out[p] = x[p / pairs_per_row] times the transpose of its expert's W (outputs, columns). x f32, item_pairs
// being 4, or bf16, item_pairs being 64; contiguous, rows at multiples of 16 bytes. Expert e's W: rows e * outputs on of `blocks`, as
// in dc_cuda_multiply, or floats of type 11 (bf16), 12 (f16) or 13 (f32). gate 0: none; 1 swiglu, 2 geglu, 3 clamped_swiglu of that and of
// experts * outputs rows further down. Before it, bias[row of W] is added, or 0; after it, out[p] is multiplied by shares[p], or 0.
// out type 0 = f32 or 2 = bf16, out_stride elements apart.
const char *dc_cuda_multiply_experts(int64_t x, int64_t x_type, int64_t pairs_per_row, int64_t order, int64_t items,
                                     int64_t most_items, int64_t blocks, int64_t type, int64_t experts, int64_t outputs,
                                     int64_t columns, int64_t gate, int64_t bias, int64_t shares, int64_t out, int64_t out_type,
                                     int64_t out_stride, int64_t stream);

// What adapters add to products. adapters (rows) i64: of each row 0, or the address of its adapter: a number of matrices, and then six
// numbers of each matrix: the addresses of a (ranks, columns), of b transposed (ranks, outputs) and of scales (ranks) f32, the ranks, at
// most most_ranks, the columns, and the type of a and b, 0 = f32, 1 = f16 or 2 = bf16. A matrix of no ranks, or beyond the number, adds nothing.
// shrink: sums (rows, most_ranks) f32 = scales * (a times norm(x)), norm and x as in dc_cuda_multiply; expand: out (rows, outputs) = residual +
// activation(y + b times sums), y f32, of 2 * outputs columns with a gate; the rest as in dc_cuda_multiply.
const char *dc_cuda_shrink(int64_t adapters, int64_t matrix, int64_t x, int64_t x_type, int64_t x_stride, int64_t rows,
                           int64_t norm, int64_t width, int64_t norm_weight, double epsilon, int64_t sums,
                           int64_t most_ranks, int64_t stream);
const char *dc_cuda_expand(int64_t adapters, int64_t matrix, int64_t rows, int64_t sums, int64_t most_ranks, int64_t y,
                           int64_t y_stride, int64_t outputs, int64_t activation, int64_t residual, int64_t residual_stride,
                           int64_t out, int64_t out_type, int64_t out_stride, int64_t stream);
}
