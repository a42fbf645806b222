// What stands between two products besides attention, one row at a time: norm, mixing, the logits' cap, the plain embedding.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

enum class Element : int;

struct RowKernels {             // `columns` a multiple of 16 except for soft_cap and widen; out may be x
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t columns, float* out);     // weight or null
    void (*mix)(const float* x, float a, const float* y, float b, int64_t columns, float* out);            // a x + b y
    // x + lambda * sigmoid(x[:channels] . gate) * previous; previous null: x
    void (*smear)(const float* x, const float* previous, const float* gate, int64_t channels, float lambda, int64_t columns, float* out);
    void (*soft_cap)(const float* x, float cap, int64_t columns, float* out);                               // cap tanh(x / cap)
    void (*widen)(Element type, const void* from, int64_t columns, float* out);                            // exactly
};

DC_EACH_ISA(extern const RowKernels row_kernels)

}  // namespace dc
