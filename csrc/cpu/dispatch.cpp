// The choice of an instruction set at run time. __builtin_cpu_supports asks cpuid for the feature and xgetbv whether the
// operating system saves its registers; the sets asked for here are those that setup.py's ISA_FLAGS let the compiler use.
#include "cpu/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dc {
namespace {

std::atomic<int> chosen{-1};

Isa best() { return offers(Isa::avx512) ? Isa::avx512 : offers(Isa::avx2) ? Isa::avx2 : Isa::portable; }

}  // namespace

bool offers(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == Isa::portable;
}

#if defined(__x86_64__)
const bool fetches_past_caches = [] { return __builtin_cpu_init(), bool(__builtin_cpu_is("amd")); }();
#else
const bool fetches_past_caches = true;      // as compilers' streaming prefetches; not measured
#endif

bool cpu_has(const char* feature) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(feature, "avx512_vnni")) return __builtin_cpu_supports("avx512vnni");
    if (!std::strcmp(feature, "avx512_bf16")) return __builtin_cpu_supports("avx512bf16");
#endif
    (void)feature;
    return false;
}

const char* name_of(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

Isa chosen_isa() {
    const int isa = chosen.load(std::memory_order_relaxed);
    return isa >= 0 ? static_cast<Isa>(isa) : best();
}

void set_isa(const char* name) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (std::strcmp(name, name_of(isa))) continue;
        if (!offers(isa)) throw std::invalid_argument(std::string("isa: this CPU does not offer ") + name);
        chosen.store(static_cast<int>(isa));
        return;
    }
    throw std::invalid_argument(std::string("isa: avx512, avx2 or portable, not ") + name);
}

void set_isa_from_environment() {
    const char* name = std::getenv("DECODE_CORE_ISA");
    if (name && *name) set_isa(name);
    else chosen.store(static_cast<int>(best()));
}

}  // namespace dc
