// CUDA's execution model on the host: each thread of a block is a fibre.
//
// A thread runs until it meets a barrier (__syncthreads or a warp operation); then another one runs. In which order
// is chosen by `order`: ascending, descending, or at random, with extra switches at atomic operations and with three
// blocks that overtake each other. A kernel that forgets a barrier therefore computes something else in some order,
// and the tests compare orders bit for bit.
// Shared memory is filled with a pattern before each block. A launch fails, with a message, when threads of a block
// wait at different barriers, when some left while others wait, and when lanes of a warp meet at different calls.
//
// What it does not show: missing memory fences (memory is sequentially consistent here), races that need a switch in
// the middle of an interval, the cost of anything, and the last bits of CUDA's own exp, log and square root.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define DC_DEVICE inline
#define DC_KERNEL(threads) static void
#define DC_SHARED(Type, name) Type &name = *static_cast<Type *>(emulation::shared(sizeof(Type)))
#define DC_UNROLL
#define DC_UNROLL_4
#define DC_LAUNCH(kernel, grid, threads, stream, ...) \
    (static_cast<void>(stream), emulation::launch(grid, threads, [=] { kernel(__VA_ARGS__); }))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;     // of the fibre that runs

namespace emulation {

enum Order : int64_t { ASCENDING, DESCENDING, RANDOM };

// A kernel with its arguments. (Of each kernel std::function would compile as much again.)
struct Body {
    void (*run)(const void *);
    const void *arguments;
    void operator()() const { run(arguments); }
};

const char *launch(dim3 grid, unsigned threads, Body kernel);       // nullptr, or what went wrong
template <class Call> const char *launch(dim3 grid, unsigned threads, const Call &call) {
    return launch(grid, threads, Body{[](const void *arguments) { (*static_cast<const Call *>(arguments))(); }, &call});
}
void *shared(size_t bytes);                                 // the block's shared memory; one structure per kernel
void wait_for_block(const char *file, int line);
const uint64_t *exchange(uint64_t value, const char *file, int line);      // the 32 values of this warp's lanes
void maybe_switch();

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);

template <class T> uint64_t to_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> T shuffle(uint32_t mask, T value, unsigned lane, const char *file, int line) {
    return mask == 0xffffffffu ? from_bits<T>(exchange(to_bits(value), file, line)[lane & 31]) : throw "partial warp";
}

inline uint32_t ballot(int vote, const char *file, int line) {
    const uint64_t *votes = exchange(vote != 0, file, line);
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= static_cast<uint32_t>(votes[lane]) << lane;
    return bits;
}

// mma.m16n8k16: what device.h says of multiply_bf16. Each lane finds its rows and columns in the others' words.
inline void multiply_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char *file, int line) {
    uint64_t words[3][32];              // of every lane: A's first two, A's others, B's
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    for (int i = 0; i < 3; i++)
        std::memcpy(words[i], exchange(mine[2 * i] | uint64_t(mine[2 * i + 1]) << 32, file, line), sizeof words[i]);
    const auto value = [&](int pair, unsigned lane, int word, int half) {
        const uint32_t bits = static_cast<uint32_t>(words[pair][lane] >> 32 * word >> 16 * half & 0xffffu) << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        return wide;
    };
    for (int i = 0; i < 4; i++) {
        const unsigned row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++)
            sums[i] += value(k / 8, 4 * row + k % 8 / 2, i / 2, k % 2) * value(2, 4 * column + k % 8 / 2, k / 8, k % 2);
    }
}

}  // namespace emulation

#define __syncthreads() emulation::wait_for_block(__FILE__, __LINE__)
#define __syncwarp() static_cast<void>(emulation::exchange(0, __FILE__, __LINE__))
#define __shfl_sync(mask, value, lane) emulation::shuffle(mask, value, lane, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulation::shuffle(mask, value, threadIdx.x ^ (bits), __FILE__, __LINE__)
// Lanes whose source lies outside the warp keep their own value.
#define __shfl_up_sync(mask, value, distance)                                                             \
    emulation::shuffle(mask, value,                                                                       \
                       (threadIdx.x & 31) < unsigned(distance) ? threadIdx.x : threadIdx.x - (distance),  \
                       __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, distance)                                                           \
    emulation::shuffle(mask, value,                                                                       \
                       (threadIdx.x & 31) + (distance) > 31 ? threadIdx.x : threadIdx.x + (distance),     \
                       __FILE__, __LINE__)
#define __ballot_sync(mask, vote) emulation::ballot(vote, __FILE__, __LINE__)
#define __threadfence() static_cast<void>(0)

template <class T> T atomicAdd(T *address, T value) {
    emulation::maybe_switch();
    const T old = *address;
    *address = old + value;
    emulation::maybe_switch();
    return old;
}

template <class T> T atomicMax(T *address, T value) {
    emulation::maybe_switch();
    const T old = *address;
    *address = std::max(old, value);
    emulation::maybe_switch();
    return old;
}

template <class T> T atomicMin(T *address, T value) {
    emulation::maybe_switch();
    const T old = *address;
    *address = std::min(old, value);
    emulation::maybe_switch();
    return old;
}

using std::max;
using std::min;
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
