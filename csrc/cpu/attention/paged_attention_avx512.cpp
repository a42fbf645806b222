// The kernels of paged_attention and rope_append with the instructions of avx512.
#define DC_ISA avx512
#include "cpu/attention/paged_attention.inl.h"
#include "cpu/attention/latent_attention.inl.h"
#include "cpu/attention/rope_append.inl.h"

namespace dc {
namespace avx512 {
const AttentionKernels attention_kernels = {rope_rows, attend, merge, attend_latents};
}
}  // namespace dc
