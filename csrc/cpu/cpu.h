// Which instruction sets this CPU and its operating system offer, which one the kernels use, and how an op reaches its path.
//
// An op `f` with a path per instruction set is declared once in ops.h's style as
//     DC_EACH_ISA(void f(const FArgs& args))              // portable::f, and avx2::f, avx512::f on x86-64, neon::f on aarch64
// defined in f_portable.cpp, f_avx2.cpp, f_avx512.cpp and f_neon.cpp of its folder (the ending chooses the compiler flags, see
// setup.py), and called as  DC_CHOSEN(f)(args). Also: how weights are fetched.
#pragma once

namespace dc {

// Weights go by once in a step and are more than any cache holds: nothing that will be read again should make room
// for them. AMD's prefetchnta does that: compared with ordinary prefetches (Zen 5) 3 to 7 % more at 1 row, 4 % at 16, 3 % of a
// prompt. Intel's goes past the second cache, whose buffers alone hold enough lines under way: on a server of 2023 one
// thread then reads 6 GB/s instead of 15, and from the third cache 6 instead of 32. So there a line goes to that cache.
extern const bool fetches_past_caches;
__attribute__((always_inline)) static inline void fetch_once(const unsigned char* from, long bytes) {
    asm("" : "+r"(from));               // else GCC makes a pointer for each line, more than there are registers
    if (fetches_past_caches)
        for (long line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 0);
    else
        for (long line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

// To the second cache, for what is read once more while other things go through the first.
__attribute__((always_inline)) static inline void fetch_again(const unsigned char* from, long bytes) {
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

enum class Isa { portable, avx2, avx512, neon };

// What multiplies many rows in addition to the kernels of an Isa. measured: AMX, where it was measured to be faster; always: for any number of
// rows (tests); emulated: its kernels for any number of rows on emulated registers (tests), with AVX-512 or in portable code.
enum class Amx { none, measured, always, emulated, emulated_portable };

// The dot product of bytes in integer products. own: the Isa's, several instructions with avx2 and neon. With Isa::avx2 also vex: AVX-VNNI's,
// and evex: for tests on CPUs without AVX-VNNI, AVX-512's in registers of 256 bits. With Isa::neon also dotprod: sdot, and i8mm: usdot
// and usmmla.
enum class Dot { own, vex, evex, dotprod, i8mm };

Isa chosen_isa();                       // the best that the CPU offers, or what DECODE_CORE_ISA or set_isa names
Amx chosen_amx();
Dot chosen_dot();
bool uses_vbmi();
bool offers(Isa isa);
bool cpu_has(const char* feature);      // a name of choices.h's CPU_FEATURES

}  // namespace dc

#if defined(__aarch64__)
#define DC_EACH_ISA(declaration)          \
    namespace portable { declaration; }   \
    namespace neon { declaration; }
#else
#define DC_EACH_ISA(declaration)          \
    namespace portable { declaration; }   \
    namespace avx2 { declaration; }       \
    namespace avx512 { declaration; }
#endif

#if defined(__x86_64__)
#define DC_CHOSEN(op)                                              \
    (::dc::chosen_isa() == ::dc::Isa::avx512 ? ::dc::avx512::op    \
     : ::dc::chosen_isa() == ::dc::Isa::avx2 ? ::dc::avx2::op      \
                                             : ::dc::portable::op)
#elif defined(__aarch64__)
#define DC_CHOSEN(op) (::dc::chosen_isa() == ::dc::Isa::neon ? ::dc::neon::op : ::dc::portable::op)
#else
#define DC_CHOSEN(op) (::dc::portable::op)
#endif
