// The eight tile registers of AMX: configure, zero, load, store, and dot (signed bytes times unsigned or signed bytes). If
// DC_EMULATED_TILES is defined they are plain C++, for tests on machines without AMX. A register has up to 16 rows of up to 64 bytes.
// Its number is a template argument.
//
// The instructions are our own assembler. GCC 12's intrinsics do not say which memory they read and write, so that stores before them
// vanish or move. This way they also need no compiler flag; tiles_amx.cpp checks that the compiler knows them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/tiles/dots.h"

namespace dc {
namespace DC_ISA {
namespace {

struct alignas(64) TileConfig {             // as ldtilecfg reads it
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};                // of a row
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "TileConfig");

#if defined(DC_EMULATED_TILES)

struct EmulatedTile {
    int rows, bytes;
    alignas(64) uint8_t at[16][64];
};
thread_local EmulatedTile emulated[8];

static __attribute__((noinline)) void tile_configure(const TileConfig& config) {
    for (int t = 0; t < 8; t++) emulated[t] = {config.rows[t], config.bytes[t], {}};
}
static __attribute__((noinline)) void tile_release() { tile_configure({}); }
template <int T>
__attribute__((noinline)) void tile_zero() { std::memset(emulated[T].at, 0, sizeof emulated[T].at); }
template <int T>
__attribute__((noinline)) void tile_load(const void* from, int64_t stride) {
    tile_zero<T>();
    for (int r = 0; r < emulated[T].rows; r++) std::memcpy(emulated[T].at[r], static_cast<const uint8_t*>(from) + r * stride, size_t(emulated[T].bytes));
}
template <int T>
__attribute__((noinline)) void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < emulated[T].rows; r++) std::memcpy(static_cast<uint8_t*>(to) + r * stride, emulated[T].at[r], size_t(emulated[T].bytes));
}
// c [m][n] += sum of a [m][4 k + i] * b [k][4 n + i], a signed, b unsigned: 16 n at a time
static __attribute__((noinline)) void tile_dot(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
    if (c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows) __builtin_trap();      // as the instruction would
    for (int m = 0; m < a.rows; m++) {
        Sum sum;
        std::memcpy(&sum, c.at[m], sizeof sum);
        for (int k = 0; k < b.rows; k++) UnsignedDot::dot(sum, load_words(b.at[k]), reinterpret_cast<const int8_t*>(a.at[m]) + 4 * k);
        std::memcpy(c.at[m], &sum, sizeof sum);
    }
}
template <int C, int A, int B>
void tile_dot() { tile_dot(emulated[C], emulated[A], emulated[B]); }
template <int C, int A, int B>
__attribute__((noinline)) void tile_dot_signed() {          // b signed too, as its distance from -128, which is taken back
    EmulatedTile &c = emulated[C], b = emulated[B];
    const EmulatedTile& a = emulated[A];
    for (int k = 0; k < b.rows; k++)
        for (int n = 0; n < b.bytes; n++) b.at[k][n] ^= 0x80;
    tile_dot(c, a, b);
    for (int m = 0; m < a.rows; m++) {
        int32_t sum = 0, lanes[16];
        for (int k = 0; k < a.bytes; k++) sum += int8_t(a.at[m][k]);
        std::memcpy(lanes, c.at[m], sizeof lanes);
        for (int n = 0; n < c.bytes / 4; n++) lanes[n] -= 128 * sum;
        std::memcpy(c.at[m], lanes, sizeof lanes);
    }
}

#else

DC_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
DC_INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
DC_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
DC_INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
DC_INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
DC_INLINE void tile_dot() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
DC_INLINE void tile_dot_signed() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }

#endif

}  // namespace
}  // namespace DC_ISA
}  // namespace dc
