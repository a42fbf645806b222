// Floats as two bfloat16 each, for products on the tensor cores: what they round to, and what that leaves, so that 16 bits count.
#pragma once

#include "device.h"

namespace dc_device {

// Two floats rounded to bfloat16, the first in the low half.
DC_DEVICE uint32_t bf16_pair(float first, float second) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return from_float<bf16>(first).bits | static_cast<uint32_t>(from_float<bf16>(second).bits) << 16;
#endif
}

// Two values as pairs of bfloat16: rounded, and what rounding left, rounded.
struct SplitPair {
    uint32_t high, low;

    DC_DEVICE SplitPair(float a, float b) {
        high = bf16_pair(a, b);
        const bf16 first{static_cast<uint16_t>(high)}, second{static_cast<uint16_t>(high >> 16)};
        low = bf16_pair(a - to_float(first), b - to_float(second));
    }
};

// The same of eight.
struct SplitEight {
    uint32_t high[4], low[4];

    DC_DEVICE explicit SplitEight(const float (&x)[8]) {
        DC_UNROLL
        for (int i = 0; i < 4; i++) {
            const SplitPair pair(x[2 * i], x[2 * i + 1]);
            high[i] = pair.high;
            low[i] = pair.low;
        }
    }
};

}  // namespace dc_device
