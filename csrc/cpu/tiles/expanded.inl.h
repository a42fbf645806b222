// Codes of types that are looked up in a grid (EXPANDS: grids.h) made bytes, before rows of x meet them.
// A part of tiles.inl.h and tiles_amx.inl.h.
#pragma once

#include "cpu/tiles/finish.inl.h"
#include "cpu/tiles/formats.h"

namespace dc {
namespace DC_ISA {
namespace {

// A group's scales, and after them its codes; `ahead`: prefetch what lies that many bytes further on, unless 0.
template <class F>
__attribute__((noinline)) void expand_group(const uint8_t* group, uint8_t* to, int64_t ahead) {
    using E = Expanded<F>;
    expand_scales<F>(group, to);
    to += E::SCALE_BYTES;
    uint16_t numbers[F::MORE ? F::BLOCKS : 1][16 * F::ENTRIES];
    for (int i = 0; F::MORE && i < F::BLOCKS; i++) F::find_numbers(quants_of<F>(group, i), numbers[i]);
    for (int i = 0; i < F::BLOCKS; i++) {
        if (ahead) prefetch_block<F>(group, i, ahead);
        F::expand(quants_of<F>(group, i), numbers[F::MORE ? i : 0], to + i * E::BYTES);
    }
}

#if defined(__AVX512F__)
template <class F>
DC_VBMI __attribute__((noinline)) void expand_group_in_registers(const uint8_t* group, uint8_t* to, int64_t ahead) {
    using E = Expanded<F>;
    expand_scales<F>(group, to);
    for (int i = 0; i < F::BLOCKS; i++) {
        if (ahead) prefetch_block<F>(group, i, ahead);
        expand_in_registers<F>(quants_of<F>(group, i), to + E::SCALE_BYTES + i * E::BYTES);
    }
}
#endif

using Expander = void (*)(const uint8_t* group, uint8_t* to, int64_t ahead);

template <class F>
Expander expander() {
#if defined(__AVX512F__)
    if (uses_vbmi()) return expand_group_in_registers<F>;
#endif
    return expand_group<F>;
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
