// The kernels of paged_attention and rope_append with the instructions of neon.
#define DC_ISA neon
#include "cpu/attention/paged_attention.inl.h"
#include "cpu/attention/latent_attention.inl.h"
#include "cpu/attention/rope_append.inl.h"

namespace dc {
namespace neon {
const AttentionKernels attention_kernels = {rope_rows, attend, merge, attend_latents};
}
}  // namespace dc
