// What stands between two products besides attention: norm, residual, activation. Each row on its own.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace dc {

// Rows of `columns` values, a multiple of 16, row_stride elements apart; bf16 or float32 as the flags say.
struct RowsJob {
    const void* x;
    const void* y;                  // add: the second operand; rms_norm: weight [columns] float32 or null; else unused
    void* out;
    int64_t rows, columns;          // columns of out
    int64_t x_stride, y_stride, out_stride;
    bool x_bf16, y_bf16, out_bf16;
    float epsilon;                  // rms_norm
};

struct RowsKernels {
    void (*rms_norm)(const RowsJob&, int64_t begin, int64_t end);
    void (*add)(const RowsJob&, int64_t begin, int64_t end);
    void (*swiglu)(const RowsJob&, int64_t begin, int64_t end);
    void (*relu2)(const RowsJob&, int64_t begin, int64_t end);
};

DC_EACH_ISA(extern const RowsKernels rows_kernels)

}  // namespace dc
