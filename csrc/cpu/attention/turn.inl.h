// A head times the normalized Hadamard matrix of Sylvester, which is its own inverse: large numbers spread over all of it.
// cost     D fused multiply-adds of 16 lanes / 16 and as many additions for each doubling above 16: 40 ns at D 64
// numerics the order of additions is fixed, products by 1 and -1 are exact: the same bits on every instruction set
#pragma once

#include "cpu/lanes.h"

namespace dc {
namespace DC_ISA {
namespace {

struct Signs {
    float of[16][16];                           // -1 where the places have an odd number of bits in common
    constexpr Signs() : of() {
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                int common = i & j, odd = 0;
                for (; common; common &= common - 1) odd ^= 1;
                of[i][j] = odd ? -1.0f : 1.0f;
            }
    }
};
alignas(64) constexpr Signs SIGNS;

// x [D], D a power of two of at least 16
void turn(float* x, int D) {
    for (int d = 0; d < D; d += 16) {
        Lanes sums = all(0.0f);
        for (int i = 0; i < 16; i++) sums = sums + all(x[d + i]) * load(SIGNS.of[i]);
        store(x + d, sums);
    }
    for (int half = 16; half < D; half *= 2)
        for (int i = 0; i < D; i += 2 * half)
            for (int j = i; j < i + half; j += 16) {
                const Lanes a = load(x + j), b = load(x + half + j);
                store(x + j, a + b), store(x + half + j, a - b);
            }
    const Lanes scale = all(1.0f / __builtin_sqrtf(float(D)));
    for (int d = 0; d < D; d += 16) store(x + d, load(x + d) * scale);
}

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
