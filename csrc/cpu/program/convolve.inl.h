// A convolution over the tokens of one sequence, in 16 columns, for the ops that have one: short_conv, delta_rule.
#pragma once

#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {

// Calls use(row, taps[0] past[0] + ... + taps[size - 1] own(row)) for the rows [begin, end). The sum is made in this order, and each
// product and sum is rounded. `past` has what own() gave for the size - 1 rows before, the oldest first; it has moved on by a row when
// `use` is called. From one tap to the next are `stride` floats.
template <class Own, class Use>
DC_INLINE void convolve(const float* taps, int64_t stride, int64_t size, int64_t begin, int64_t end, Lanes* past, Own own, Use use) {
    const int64_t before = size - 1;
    for (int64_t row = begin; row < end; row++) {
        const Lanes s = own(row);
        Lanes total = load(taps) * past[0];
        for (int64_t j = 1; j < before; j++) total = total + load(taps + j * stride) * past[j];
        total = total + load(taps + before * stride) * s;
        for (int64_t j = 1; j < before; j++) past[j - 1] = past[j];
        past[before - 1] = s;
        use(row, total);
    }
}

}  // namespace DC_ISA
}  // namespace dc
