// The CUDA ops as C functions: what bindings.cpp exposes and tests/core/test_core_cuda.py calls in the host emulation.
//
// Every integer and every address is an int64_t and every real a double, so that pybind11 and ctypes pass the same Python
// numbers. Addresses are device addresses (host addresses in the emulation). An address may be 0 only where the text says "or 0".
// All work goes to `stream` (a cudaStream_t). The functions allocate nothing and read nothing back, and their grids depend on sizes
// alone. So a captured graph replays them on whatever the arrays then hold. They return nullptr, or a message. Arguments are not
// checked here: csrc/decode_core/cuda.py does that before it passes an address.
#pragma once

#include <cstdint>

extern "C" {

// Number of usable devices: 0 without a driver, with a driver that is too old, or without a device. Never fails.
int64_t dc_cuda_devices();

// Ten times a device's compute capability (90: an H100), or 0 where there is no such device. Never fails.
int64_t dc_cuda_capability(int64_t device);

// The current device's index, or -1.
int64_t dc_cuda_current_device();

// One token for each row of logits (rows, vocabulary), element type 0 = f32 or 2 = bf16, vocabulary <= 2^18. All is on the device.
//   params       dc::SampleRow[rows] of csrc/contract.h
//   count_ids, counts        its lists of penalties, count_size i32 each
//   bias_ids, bias_values    its lists of biases, bias_size i32 and f32
//   tokens       i32 (rows): -1 for a row with position < 0
//   threads      1024; tests also take powers of two from 32 to 512
// f32 rows with penalties or a bias are changed in place, bf16 rows never.
const char *dc_cuda_sample(int64_t logits, int64_t type, int64_t row_stride, int64_t rows, int64_t vocabulary,
                           int64_t params, int64_t count_ids, int64_t counts, int64_t count_size, int64_t bias_ids,
                           int64_t bias_values, int64_t bias_size, int64_t tokens, int64_t threads,
                           int64_t stream);

// qkv (rows, (heads + 2 kv_heads) * head_size) f32 or bf16 -> q_out (rows, heads, head_size) f32 and the pages. Strides count
// elements.
//   positions, slots     i64 (rows): slot = page * 16 + place. A row whose slot is outside [0, num_slots) is left alone (padding: -1)
//   cos, sin             f32 (max_positions, half_rotated)
//   norm                 0 none, 1 before rope, 2 after it; with q_norm, k_norm f32 (head_size) or 0
//   post_scale           multiplies q and k; q_scale multiplies q too
//   value_embed, gate    (rows, kv_heads * head_size) and (rows, kv_heads) in qkv's type, or 0: v += gate_scale * sigmoid(gate) * value_embed
//   cache_type           3 = q8: pages have codes, and k_scales and v_scales have f16 scales for each 32, in the same order. Strides are
//                        then multiples of 32, and q, k and v are turned by the Hadamard matrix. With floats the scales are 0
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

// Decode attention: q (rows, heads, head_size) f32, scaled already -> out (rows, heads * head_size), type 0 = f32 or 2 = bf16.
//   block_table  i32 (rows, table_width)
//   lengths      i32 (rows); <= 0: the row is inactive, and its output is left alone
//   window       0: a row sees every key
//   softcap      0: none
//   sinks        f32 (heads), or 0
//   max_chunks   chunks of 64 positions that a row can see
//   most_spans   up to 256: parts of each row that are computed side by side, whatever its length
//   states, tickets      the workspace. With S = min(max_chunks, most_spans) and G = S / 16 rounded up, states has rows * heads *
//                (S + G) * (2 + head_size) f32 with any content, and tickets has rows * kv_heads * (1 + G) i32. Tickets are zero
//                before the first launch, and every launch leaves them zero
// Pages of q8 are as in dc_cuda_rope_append: q must be turned, and out comes turned.
const char *dc_cuda_paged_attention(int64_t q, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size,
                                    int64_t k_pages, int64_t v_pages, int64_t k_scales, int64_t v_scales, int64_t cache_type, int64_t num_pages,
                                    int64_t page_stride, int64_t head_stride, int64_t slot_stride, int64_t block_table,
                                    int64_t table_stride, int64_t table_width, int64_t lengths, int64_t window, double softcap,
                                    int64_t sinks, int64_t max_chunks, int64_t most_spans, int64_t states, int64_t tickets, int64_t out, int64_t out_type,
                                    int64_t stream);

// Decode attention over latents: q (rows, heads, head_size) f32, scaled already -> out (rows, heads * value_size), type 0 or 2. All heads
// share the key of a slot of pages (pages, 16, head_size), and its first value_size numbers are the value. The workspace is that of
// dc_cuda_paged_attention, with value_size for head_size, and tickets for the heads divided by 16, rounded up, in place of kv_heads;
// so are the other arguments.
const char *dc_cuda_latent_attention(int64_t q, int64_t rows, int64_t heads, int64_t head_size, int64_t value_size, int64_t pages,
                                     int64_t cache_type, int64_t num_pages, int64_t page_stride, int64_t slot_stride, int64_t block_table,
                                     int64_t table_stride, int64_t table_width, int64_t lengths, int64_t window, int64_t max_chunks,
                                     int64_t most_spans, int64_t states, int64_t tickets, int64_t out, int64_t out_type, int64_t stream);

// x (rows, kept + 2 half) f32 or bf16 -> pages of latents: the first `kept` numbers get an RMS norm with weight f32 (kept), the others turn.
// Strides count elements; positions, slots, cos and sin are as in dc_cuda_rope_append.
//   adjacent     numbers that turn together are neighbours in x; else half apart, as they always are in pages
const char *dc_cuda_append_latents(int64_t x, int64_t x_type, int64_t row_stride, int64_t rows, int64_t kept, int64_t weight,
                                   double epsilon, int64_t cos, int64_t sin, int64_t half, int64_t adjacent, int64_t positions,
                                   int64_t slots, int64_t max_positions, int64_t num_slots, int64_t pages, int64_t cache_type,
                                   int64_t page_stride, int64_t slot_stride, int64_t stream);

// out (rows, heads * outputs), type 0 or 2: of each head, the first `columns` of its `width` numbers of x f32 times the transpose of its own
// W (outputs, columns), one head below the other in `blocks`. Rows and heads of x begin at multiples of 16 bytes; types of W and
// alignments as in dc_cuda_multiply.
const char *dc_cuda_by_head(int64_t x, int64_t x_stride, int64_t width, int64_t rows, int64_t heads, int64_t blocks, int64_t type,
                            int64_t outputs, int64_t columns, int64_t out, int64_t out_type, int64_t out_stride, int64_t stream);

// The same of queries x (rows, heads * (plain + 2 half)) f32 -> out (rows, heads * (kept + 2 half)) f32: of each head `kept` numbers that its
// W (kept, plain) makes, then those that turn; all of it times `scale`.
//   blocks       or 0: only what turns is written
const char *dc_cuda_absorb(int64_t x, int64_t x_stride, int64_t rows, int64_t heads, int64_t blocks, int64_t type, int64_t kept,
                           int64_t plain, double scale, int64_t cos, int64_t sin, int64_t half, int64_t adjacent, int64_t positions,
                           int64_t max_positions, int64_t out, int64_t stream);

// out (rows, outputs) = residual + activation(norm(x) times the transpose of W + bias), rows 1 .. 8. Strides count elements.
//   x            type 0 = f32 or 2 = bf16; rows begin at multiples of 16 bytes, and their first `columns` are multiplied
//   norm         1: x is divided by its root mean square over `width` columns (epsilon under the root), and multiplied by
//                norm_weight f32 (width) or 0
//   blocks       W: `outputs` rows (with a gate twice as many) of a `type` of blocks.h. Blocks are as in a GGUF file, begin at an
//                even address (those of MXFP4 and U4 at any), and `columns` is a multiple of the type's COLUMNS. Floats, which
//                blocks.h numbers after the other types, begin at a multiple of 16 bytes
//   activation   0 none; 4 relu2; 1 swiglu, 2 geglu, 3 clamped_swiglu, whose ups are `outputs` rows below their gates
//   bias         f32, one for each row of W, or 0
//   residual     f32 (rows, outputs), or 0
//   out          type 0 or 2
const char *dc_cuda_multiply(int64_t x, int64_t x_type, int64_t x_stride, int64_t rows, int64_t norm, int64_t width,
                             int64_t norm_weight, double epsilon, int64_t blocks, int64_t type, int64_t outputs, int64_t columns,
                             int64_t bias, int64_t activation, int64_t residual, int64_t residual_stride, int64_t out,
                             int64_t out_type, int64_t out_stride, int64_t stream);

// The rows of such a W as floats: out (rows, columns), type 0 = f32 or 2 = bf16, contiguous.
const char *dc_cuda_dequantize(int64_t blocks, int64_t type, int64_t rows, int64_t columns, int64_t out, int64_t out_type,
                               int64_t stream);

// logits (rows, experts) f32 -> ids i32 and shares f32 (rows, chosen): the `chosen` largest of each row, of equal ones the lower ids.
// Shares are the softmax over these, or over all unless sum_to_one. experts <= 1024, chosen <= experts. slots: i64 (rows), or 0; a
// row whose slot is < 0 is padding, and its ids are -1.
const char *dc_cuda_route(int64_t logits, int64_t slots, int64_t rows, int64_t experts, int64_t chosen, int64_t sum_to_one,
                          int64_t ids, int64_t shares, int64_t stream);

// Sorts pairs 0 .. pairs - 1 by their expert; ids[p] is that of pair p. -> order i32 (pairs), where the pairs of an expert are together,
// and items i32 (most_items, 3): an expert, its first place in `order`, and a number of pairs up to item_pairs (0: unused).
// most_items is as many as any ids can need.
const char *dc_cuda_group(int64_t ids, int64_t pairs, int64_t experts, int64_t item_pairs, int64_t order, int64_t items,
                          int64_t most_items, int64_t stream);

// For each pair p of each item: out[p] = x[p / pairs_per_row] times the transpose of its expert's W (outputs, columns).
//   x        f32 if item_pairs is 4, bf16 if it is 64; contiguous, rows begin at multiples of 16 bytes
//   blocks   W of expert e begins at row e * outputs; types as in dc_cuda_multiply, floats included
//   gate     0 none; 1 swiglu, 2 geglu, 3 clamped_swiglu, whose ups are experts * outputs rows below their gates
//   bias     one for each row of W, added before the gate, or 0
//   shares   out[p] is multiplied by shares[p] after the gate; or 0
//   out      type 0 = f32 or 2 = bf16, rows out_stride elements apart
const char *dc_cuda_multiply_experts(int64_t x, int64_t x_type, int64_t pairs_per_row, int64_t order, int64_t items,
                                     int64_t most_items, int64_t blocks, int64_t type, int64_t experts, int64_t outputs,
                                     int64_t columns, int64_t gate, int64_t bias, int64_t shares, int64_t out, int64_t out_type,
                                     int64_t out_stride, int64_t stream);

// What adapters add to products.
//   shrink   sums f32 (rows, most_ranks) = scales * (a times norm(x)); norm and x as in dc_cuda_multiply
//   expand   out (rows, outputs) = residual + activation(y + b times sums); y is f32, with 2 * outputs columns if there is a gate; the
//            rest as in dc_cuda_multiply
// adapters is i64 (rows): for each row 0, or the address of its adapter's table. A table begins with its number of matrices. Then come
// six numbers for each matrix: the addresses of a (ranks, columns), of b transposed (ranks, outputs) and of scales f32 (ranks); the
// ranks, at most most_ranks; the columns; and the type of a and b, 0 = f32, 1 = f16 or 2 = bf16. A matrix without ranks, or one that
// the table does not reach, adds nothing.
const char *dc_cuda_shrink(int64_t adapters, int64_t matrix, int64_t x, int64_t x_type, int64_t x_stride, int64_t rows,
                           int64_t norm, int64_t width, int64_t norm_weight, double epsilon, int64_t sums,
                           int64_t most_ranks, int64_t stream);
const char *dc_cuda_expand(int64_t adapters, int64_t matrix, int64_t rows, int64_t sums, int64_t most_ranks, int64_t y,
                           int64_t y_stride, int64_t outputs, int64_t activation, int64_t residual, int64_t residual_stride,
                           int64_t out, int64_t out_type, int64_t out_stride, int64_t stream);
}
