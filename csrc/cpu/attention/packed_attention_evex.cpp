// The kernels of paged_attention and rope_append over pages of the type q8_0, with the instructions of avx2 and AVX-512's dot product in registers of 256 bits: AVX-VNNI's source, for tests on CPUs without it.
#define DC_ISA evex
#define DC_DOT_256 "%{evex%} vpdpbusd"
#include "cpu/tiles/dots.h"
#if defined(DC_KNOWS_AVXVNNI) && defined(DC_TEST_SETS)
#include "cpu/attention/packed_attention.inl.h"
#include "cpu/attention/packed_rope.inl.h"

namespace dc {
namespace evex {
const AttentionKernels packed_attention_kernels = {packed_rope_rows, attend_packed, merge, attend_packed_latents, turn_latent, pack_latent};
}
}  // namespace dc
#else
#include "cpu/attention/attention.h"
namespace dc { namespace evex { const AttentionKernels packed_attention_kernels = {nullptr, nullptr, nullptr}; } }
#endif
