// op       rms_norm, add, swiglu, relu2: rows between two products
// shapes   x [T, C] (swiglu: [T, 2 C], gates first) -> out [T, C], C a multiple of 16; float32 or bfloat16 each
// mapping  one item = a run of rows; 16 lanes along a row
// cost     every value read and written once: bound by the cache it lies in; 0.05 to 0.2 us a row at C = 576
// numerics float32; sum of squares in 16 lanes, then a fixed tree; one rounding to bfloat16, nearest, ties to even; the same
//          bits on every instruction set, and for a row whatever stands beside it
#include "cpu/elementwise.h"
#include "lanes.h"

namespace dc {
namespace DC_ISA {
namespace {

template <class X, class Out>
void rms_norm_rows(const RowsJob& job, int64_t begin, int64_t end) {
    const float* weight = static_cast<const float*>(job.y);
    for (int64_t row = begin; row < end; row++) {
        const X* x = static_cast<const X*>(job.x) + row * job.x_stride;
        Out* out = static_cast<Out*>(job.out) + row * job.out_stride;
        Lanes squares = all(0.0f);
        for (int64_t c = 0; c < job.columns; c += 16) squares = fma(load(x + c), load(x + c), squares);
        const Lanes scale = all(1.0f / __builtin_sqrtf(sum(squares) / float(job.columns) + job.epsilon));
        for (int64_t c = 0; c < job.columns; c += 16) {
            const Lanes y = load(x + c) * scale;
            store(out + c, weight ? y * load(weight + c) : y);
        }
    }
}

template <class Y>
void add_rows(const RowsJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float* x = static_cast<const float*>(job.x) + row * job.x_stride;
        const Y* y = static_cast<const Y*>(job.y) + row * job.y_stride;
        float* out = static_cast<float*>(job.out) + row * job.out_stride;
        for (int64_t c = 0; c < job.columns; c += 16) store(out + c, load(x + c) + load(y + c));
    }
}

template <class T>
void swiglu_rows(const RowsJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const T* gate = static_cast<const T*>(job.x) + row * job.x_stride;
        T* out = static_cast<T*>(job.out) + row * job.out_stride;
        for (int64_t c = 0; c < job.columns; c += 16)
            store(out + c, silu(load(gate + c)) * load(gate + job.columns + c));
    }
}

template <class T>
void relu2_rows(const RowsJob& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const T* x = static_cast<const T*>(job.x) + row * job.x_stride;
        T* out = static_cast<T*>(job.out) + row * job.out_stride;
        for (int64_t c = 0; c < job.columns; c += 16) {
            const Lanes positive = maximum(load(x + c), all(0.0f));
            store(out + c, positive * positive);
        }
    }
}

void rms_norm(const RowsJob& job, int64_t begin, int64_t end) {
    if (job.x_bf16) return (job.out_bf16 ? rms_norm_rows<Bfloat, Bfloat> : rms_norm_rows<Bfloat, float>)(job, begin, end);
    (job.out_bf16 ? rms_norm_rows<float, Bfloat> : rms_norm_rows<float, float>)(job, begin, end);
}
void add(const RowsJob& job, int64_t begin, int64_t end) {
    (job.y_bf16 ? add_rows<Bfloat> : add_rows<float>)(job, begin, end);
}
void swiglu(const RowsJob& job, int64_t begin, int64_t end) {
    (job.x_bf16 ? swiglu_rows<Bfloat> : swiglu_rows<float>)(job, begin, end);
}
void relu2(const RowsJob& job, int64_t begin, int64_t end) {
    (job.x_bf16 ? relu2_rows<Bfloat> : relu2_rows<float>)(job, begin, end);
}

}  // namespace

extern const RowsKernels rows_kernels = {rms_norm, add, swiglu, relu2};

}  // namespace DC_ISA
}  // namespace dc
