// The CUDA ops as functions of the module: integers and floats in, None or a message out; the GIL is released.
#include <pybind11/pybind11.h>

#include "launch.h"

void bind_cuda(pybind11::module_ &m) {
    using Gil = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("cuda_devices", &dc_cuda_devices, Gil());
    m.def("cuda_capability", &dc_cuda_capability, Gil());
    m.def("cuda_current_device", &dc_cuda_current_device, Gil());
    m.def("cuda_sample", &dc_cuda_sample, Gil());
    m.def("cuda_rope_append", &dc_cuda_rope_append, Gil());
    m.def("cuda_turn", &dc_cuda_turn, Gil());
    m.def("cuda_paged_attention", &dc_cuda_paged_attention, Gil());
    m.def("cuda_latent_attention", &dc_cuda_latent_attention, Gil());
    m.def("cuda_append_latents", &dc_cuda_append_latents, Gil());
    m.def("cuda_by_head", &dc_cuda_by_head, Gil());
    m.def("cuda_absorb", &dc_cuda_absorb, Gil());
    m.def("cuda_multiply", &dc_cuda_multiply, Gil());
    m.def("cuda_dequantize", &dc_cuda_dequantize, Gil());
    m.def("cuda_route", &dc_cuda_route, Gil());
    m.def("cuda_group", &dc_cuda_group, Gil());
    m.def("cuda_multiply_experts", &dc_cuda_multiply_experts, Gil());
    m.def("cuda_shrink", &dc_cuda_shrink, Gil());
    m.def("cuda_expand", &dc_cuda_expand, Gil());
}
