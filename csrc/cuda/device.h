// What a kernel file may use, under nvcc and in the host emulation alike.
//
// The kernels of this folder are written once. nvcc compiles them for the GPU; g++ compiles the same text against
// emulation.h, where a block's threads are fibres, so that CI runs every kernel against its oracle without a GPU.
// Differences between the two compilers end in this header.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DC_DEVICE __device__ __forceinline__
#define DC_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define DC_SHARED(Type, name) __shared__ Type name
#define DC_UNROLL _Pragma("unroll")
#define DC_UNROLL_4 _Pragma("unroll 4")
// Returns nullptr, or why the launch was refused; errors of earlier asynchronous work surface here too.
#define DC_LAUNCH(kernel, grid, threads, stream, ...) dc_launch(kernel, grid, threads, static_cast<cudaStream_t>(stream), __VA_ARGS__)

inline const char *dc_last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether kernels on the current device may overlap their predecessors' ends: compute capability 9.0.
inline bool dc_may_overlap() {
    static int majors[64] = {};             // of each device; 0: not asked yet. Two threads would write the same
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (majors[device] == 0) cudaDeviceGetAttribute(&majors[device], cudaDevAttrComputeCapabilityMajor, device);
    return majors[device] >= 9;
}

template <class... Parameters, class... Arguments>
const char *dc_launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = dc_may_overlap() ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    return dc_last_error();
}

#else

#include "emulation.h"

#endif

namespace dc_device {

constexpr uint32_t ALL_LANES = 0xffffffffu;

// Element types as launchers receive them.
enum Type : int64_t { F32 = 0, F16 = 1, BF16 = 2, Q8 = 3 };     // Q8: of keys and values alone

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct q8 { int8_t code; };                             // of a head that a Hadamard matrix has turned; a scale for each Q8_BLOCK

constexpr int Q8_BLOCK = 32;

struct alignas(16) Bytes16 { uint32_t words[4]; };     // one 16-byte load

DC_DEVICE float to_float(float x) { return x; }

DC_DEVICE float to_float(bf16 x) {
    union { uint32_t bits; float value; } wide;
    wide.bits = static_cast<uint32_t>(x.bits) << 16;
    return wide.value;
}

DC_DEVICE float to_float(f16 x) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(x.bits));
#else
    return emulation::half_to_float(x.bits);
#endif
}

template <class T> DC_DEVICE T from_float(float x);

template <> DC_DEVICE float from_float<float>(float x) { return x; }

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
template <> DC_DEVICE bf16 from_float<bf16>(float x) {
    union { float value; uint32_t bits; } wide;
    wide.value = x;
    if (x != x) return bf16{static_cast<uint16_t>((wide.bits >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((wide.bits + 0x7fffu + ((wide.bits >> 16) & 1u)) >> 16)};
}

template <> DC_DEVICE f16 from_float<f16>(float x) {
#ifdef __CUDACC__
    return f16{__half_as_ushort(__float2half_rn(x))};
#else
    return f16{emulation::float_to_half(x)};
#endif
}

template <class T> T *as_pointer(int64_t address) {     // on the host
    return reinterpret_cast<T *>(static_cast<uintptr_t>(address));
}

// Every kernel calls this before it reads or writes memory, and before any thread returns. A kernel may be on the device while the
// one before it in the stream still runs: this waits until that one has ended and what it wrote can be read. From here on the
// next kernel may come, and wait in turn. So launches hide behind the work before them.
DC_DEVICE void after_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for a line of memory, which will be read by this SM or another one.
DC_DEVICE void prefetch(const void *at) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
    static_cast<void>(at);
#endif
}

// Sixteen bytes that this launch reads once.
DC_DEVICE Bytes16 load_once(const void *at) {
#ifdef __CUDACC__
    const uint4 words = __ldcs(static_cast<const uint4 *>(at));
    return Bytes16{{words.x, words.y, words.z, words.w}};
#else
    return *static_cast<const Bytes16 *>(at);
#endif
}

// Copies sixteen bytes into shared memory, or puts zeros there. They are there for this thread after `wait_for_copies`.
DC_DEVICE void copy_to_shared(void *to, const void *from, bool wanted) {
#ifdef __CUDACC__
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(wanted ? 16 : 0) : "memory");
#else
    *static_cast<Bytes16 *>(to) = wanted ? *static_cast<const Bytes16 *>(from) : Bytes16{};
#endif
}

DC_DEVICE void wait_for_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Reads what another block of this launch wrote (and announced), past this SM's own cache.
DC_DEVICE float load_fresh(const float *from) {
#ifdef __CUDACC__
    return __ldcg(from);
#else
    return *from;
#endif
}

// x of `size` values, a power of two from 32 on, becomes its product with the normalized Hadamard matrix. By a warp, which
// meets before and after; x is shared memory. The order of additions depends on the size alone.
DC_DEVICE void turn(float *x, int size, unsigned lane) {
    __syncwarp();
    for (int apart = 1; apart < size; apart *= 2) {
        for (int i = lane; i < size / 2; i += 32) {
            float *pair = x + i / apart * 2 * apart + i % apart;
            const float a = pair[0], b = pair[apart];
            pair[0] = a + b;
            pair[apart] = a - b;
        }
        __syncwarp();
    }
    const float scale = 1.0f / sqrtf(static_cast<float>(size));
    for (int d = lane; d < size; d += 32) x[d] *= scale;
    __syncwarp();
}

// ln x to 1e-5 or better, for bounds only.
DC_DEVICE float fast_log(float x) {
#ifdef __CUDACC__
    return __logf(x);
#else
    return std::log(x);
#endif
}

// All lanes receive the sum of a warp's values; the order of additions is fixed by the lane numbers.
DC_DEVICE float warp_sum(float x) {
    DC_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) x = x + __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// sums += A B on the tensor cores, by a whole warp: A (16, 16), B (16, 8). Lane l, with r = l / 4 and c = l % 4 * 2, holds two
// neighbours in each word: of A (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8); of B (c, r), (c + 8, r), neighbours in the
// same column; of the sums (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1).
DC_DEVICE void multiply_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulation::multiply_bf16(sums, a, b, __FILE__, __LINE__);
#endif
}

}  // namespace dc_device
