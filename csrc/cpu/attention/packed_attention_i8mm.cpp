// The kernels of paged_attention and rope_append over pages of the type q8_0 with the instructions of neon and its matrix products of bytes.
#define DC_ISA i8mm
#include "cpu/attention/packed_attention.inl.h"
#include "cpu/attention/packed_rope.inl.h"

namespace dc {
namespace i8mm {
const AttentionKernels packed_attention_kernels = {packed_rope_rows, attend_packed, merge, attend_packed_latents, turn_latent, pack_latent};
}
}  // namespace dc
