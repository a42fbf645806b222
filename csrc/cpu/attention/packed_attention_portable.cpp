// The kernels of paged_attention and rope_append over pages of the type q8_0 with the instructions of portable.
#define DC_ISA portable
#include "cpu/attention/packed_attention.inl.h"
#include "cpu/attention/packed_rope.inl.h"

namespace dc {
namespace portable {
const AttentionKernels packed_attention_kernels = {packed_rope_rows, attend_packed, merge, attend_packed_latents, turn_latent, pack_latent};
}
}  // namespace dc
