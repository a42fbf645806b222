// Python's door to rms_norm, add, swiglu and relu2; decode_core/elementwise.py checks what comes in.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "cpu/elementwise.h"
#include "cpu/pool.h"

namespace py = pybind11;

namespace {

constexpr int64_t VALUES_WORTH_SHARING = 1 << 15;       // below, waking the helpers takes as long as the work

using RowsKernel = void (*)(const dc::RowsJob&, int64_t begin, int64_t end);

void run(RowsKernel kernel, const dc::RowsJob& job) {
    py::gil_scoped_release unlocked;
    if (job.rows * job.columns < VALUES_WORTH_SHARING) return kernel(job, 0, job.rows);
    const int64_t step = std::max<int64_t>(1, VALUES_WORTH_SHARING / 2 / job.columns);
    dc::parallel_for((job.rows + step - 1) / step,
                     [&](int64_t i) { kernel(job, i * step, std::min((i + 1) * step, job.rows)); });
}

template <RowsKernel dc::RowsKernels::*Kernel>
void bind(py::module_& m, const char* name) {
    m.def(name, [](uintptr_t x, uintptr_t y, uintptr_t out, int64_t rows, int64_t columns, int64_t x_stride, int64_t y_stride,
                   int64_t out_stride, bool x_bf16, bool y_bf16, bool out_bf16, float epsilon) {
        const dc::RowsJob job{reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(y), reinterpret_cast<void*>(out),
                              rows, columns, x_stride, y_stride, out_stride, x_bf16, y_bf16, out_bf16, epsilon};
        run(DC_CHOSEN(rows_kernels).*Kernel, job);
    });
}

}  // namespace

void bind_elementwise(py::module_& m) {
    bind<&dc::RowsKernels::rms_norm>(m, "rms_norm");
    bind<&dc::RowsKernels::add>(m, "add");
    bind<&dc::RowsKernels::swiglu>(m, "swiglu");
    bind<&dc::RowsKernels::relu2>(m, "relu2");
}
