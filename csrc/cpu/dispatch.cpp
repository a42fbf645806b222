// The choice of an instruction set at run time: cpuid says what the CPU has, and xgetbv whether the operating system saves its
// registers. The sets asked for here are those that setup.py's ISA_FLAGS let the compiler use. __builtin_cpu_supports would tell
// the same, but not in what zig compiles: there it finds nothing.
#include "cpu/choices.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace dc {
namespace {

struct Choice {
    const char* name;
    Isa isa;
    Amx amx;
    bool for_tests;
    Dot dot = Dot::own;
    const char* feature = nullptr;      // of the CPU, that the dot product needs
    bool vbmi = true;                   // used where the CPU has it
};

constexpr Choice PORTABLE = {"portable", Isa::portable, Amx::none, false};
constexpr Choice CHOICES[] = {          // the best first; tests' own with the best Isa
    {"amx", Isa::avx512, Amx::measured, false}, {"avx512", Isa::avx512, Amx::none, false},
    {"avxvnni", Isa::avx2, Amx::none, false, Dot::vex, "avx_vnni"}, {"avx2", Isa::avx2, Amx::none, false},
    {"i8mm", Isa::neon, Amx::none, false, Dot::i8mm, "i8mm"}, {"dotprod", Isa::neon, Amx::none, false, Dot::dotprod, "asimddp"},
    {"neon", Isa::neon, Amx::none, false}, PORTABLE,
    {"amx-always", Isa::avx512, Amx::always, true}, {"amx-emulated", Isa::avx512, Amx::emulated, true},
    {"amx-emulated-portable", Isa::portable, Amx::emulated_portable, true},
    {"avxvnni-evex", Isa::avx2, Amx::none, true, Dot::evex, "avx512_vnni"},
    {"avx512-without-vbmi", Isa::avx512, Amx::none, true, Dot::own, "avx512_vnni", false}};

struct Cpu {
    bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_vbmi = false, avx512_bf16 = false, avx_vnni = false, amd = false;
};

[[maybe_unused]] bool bit(unsigned word, int number) { return word >> number & 1; }

Cpu asked() {
    Cpu cpu;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return cpu;
    cpu.amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return cpu;    // 27: there is xgetbv
    const bool with_avx = bit(c, 28) && bit(c, 12) && bit(c, 29);       // AVX, FMA, F16C
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    cpu.avx2 = with_avx && bit(b, 5) && (low & 0x6) == 0x6;             // XMM and YMM are saved
    cpu.avx512 = cpu.avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && (low & 0xe6) == 0xe6;     // F, DQ, BW, VL
    cpu.avx512_vnni = cpu.avx512 && bit(c, 11), cpu.avx512_vbmi = cpu.avx512 && bit(c, 1);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return cpu;
    cpu.avx_vnni = cpu.avx2 && bit(a, 4);
    cpu.avx512_bf16 = cpu.avx512 && bit(a, 5);
#endif
    return cpu;
}

const Cpu& cpu() {
    static const Cpu found = asked();
    return found;
}

std::atomic<const Choice*> chosen{nullptr};
std::atomic<bool> amx_is_wrong{false};

// Why this CPU or its operating system cannot run a choice; "" if they can.
std::string machine_refusal(const Choice& choice) {
    if (!offers(choice.isa) || (choice.feature && !cpu_has(choice.feature))) return std::string("this CPU does not offer ") + choice.name;
    if (choice.amx == Amx::none || choice.amx == Amx::emulated_portable) return "";
    if (!cpu_has("avx512_vnni")) return std::string(choice.name) + " needs AVX-512 VNNI, which this CPU does not offer";
    return choice.amx == Amx::emulated ? "" : amx_refusal();
}

bool is_compiled(const Choice& choice) {
    const bool amx = AMX_IS_COMPILED || (choice.amx != Amx::measured && choice.amx != Amx::always);
    if (choice.isa == Isa::avx512) return amx && AVX512_IS_COMPILED && (cpu_has("avx512_vnni") ? VNNI_IS_COMPILED : AVX2_IS_COMPILED);
    if (choice.isa == Isa::avx2) return AVX2_IS_COMPILED && (choice.dot == Dot::own || AVXVNNI_IS_COMPILED);
    return true;
}

// Why this library has not what a choice needs; "" if it has.
std::string library_refusal(const Choice& choice) {
    const bool compiled_for_tests = choice.dot == Dot::evex || choice.amx == Amx::emulated || choice.amx == Amx::emulated_portable;
    if (compiled_for_tests && !TEST_SETS_ARE_COMPILED) return std::string(choice.name) + " is compiled with DECODE_CORE_TEST_SETS=1 alone";
    if (is_compiled(choice)) return "";
    return std::string("decode_core was compiled without ") + choice.name + "; DECODE_CORE_SETS=all pip install . compiles all that the compiler knows";
}

// Why a choice cannot be taken; "" if it can.
std::string refusal_of(const Choice& choice) {
    const std::string refusal = machine_refusal(choice);
    return refusal.empty() ? library_refusal(choice) : refusal;
}

const Choice& best() {
    for (const Choice& choice : CHOICES)
        if (!choice.for_tests && refusal_of(choice).empty()) return choice;
    return PORTABLE;
}

const Choice& choice_now() {
    const Choice* choice = chosen.load(std::memory_order_relaxed);
    return choice ? *choice : best();
}

std::vector<const char*> names(bool for_tests) {
    std::vector<const char*> all;
    for (const Choice& choice : CHOICES)
        if (choice.for_tests == for_tests && refusal_of(choice).empty()) all.push_back(choice.name);
    return all;
}

const Choice& named(const std::string& name) {
    for (const Choice& choice : CHOICES)
        if (name == choice.name) return choice;
    throw std::invalid_argument("isa: amx, avx512, avxvnni, avx2, i8mm, dotprod, neon or portable, not " + name);
}

}  // namespace

bool offers(Isa isa) {
#if defined(__aarch64__)
    if (isa == Isa::neon) return true;          // every such CPU has it
#endif
    return isa == Isa::avx512 ? cpu().avx512 : isa == Isa::avx2 ? cpu().avx2 : isa == Isa::portable;
}

#if defined(__x86_64__)
const bool fetches_past_caches = cpu().amd;
#else
const bool fetches_past_caches = true;      // as compilers' streaming prefetches; not measured
#endif

bool cpu_has(const char* feature) {
#if defined(__x86_64__)
    if (!std::strcmp(feature, "avx512_vnni")) return cpu().avx512_vnni;
    if (!std::strcmp(feature, "avx512_vbmi")) return cpu().avx512_vbmi;
    if (!std::strcmp(feature, "avx512_bf16")) return cpu().avx512_bf16;
    if (!std::strcmp(feature, "avx_vnni")) return cpu().avx_vnni;
    if (!std::strcmp(feature, "amx_int8")) return amx_refusal().empty();
#elif defined(__aarch64__) && defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1ul << 20, MATRIX_PRODUCTS = 1ul << 13;      // HWCAP_ASIMDDP, HWCAP2_I8MM: old headers lack them
    const bool dotprod = getauxval(AT_HWCAP) & DOT_PRODUCTS;
    if (!std::strcmp(feature, "asimddp")) return dotprod;
    if (!std::strcmp(feature, "i8mm")) return dotprod && getauxval(AT_HWCAP2) & MATRIX_PRODUCTS;
#elif defined(__aarch64__) && defined(__APPLE__)
    const auto says = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    const bool dotprod = says("hw.optional.arm.FEAT_DotProd");
    if (!std::strcmp(feature, "asimddp")) return dotprod;
    if (!std::strcmp(feature, "i8mm")) return dotprod && says("hw.optional.arm.FEAT_I8MM");
#endif
    (void)feature;
    return false;
}

std::string amx_refusal_of(unsigned edx, unsigned long xcr0, int error) {
    if ((edx >> 24 & 3) != 3) return "this CPU does not offer amx";
    if ((xcr0 >> 17 & 3) != 3) return "the operating system does not keep AMX's registers, so it cannot be used";
    return error ? std::string("the operating system refuses AMX (") + std::strerror(error) + ")" : "";
}

const std::string& amx_refusal() {
    static const std::string wrong = "AMX gave wrong results here, so it is not used";
    static const std::string refusal = [] {
#if defined(__x86_64__) && defined(__linux__)
        unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
        int error = ENOSYS;
        if (!offers(Isa::avx512) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return amx_refusal_of(0, 0, 0);   // AVX-512: there is XGETBV
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        if (amx_refusal_of(d, low, 0).empty()) error = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? errno : 0;
        return amx_refusal_of(d, low, error);
#else
        return amx_refusal_of(0, 0, ENOSYS);
#endif
    }();
    return amx_is_wrong.load(std::memory_order_relaxed) ? wrong : refusal;
}

void give_up_amx() {
    amx_is_wrong.store(true);
    if (choice_now().amx == Amx::measured) chosen.store(&best());
}

Isa chosen_isa() { return choice_now().isa; }

Amx chosen_amx() { return choice_now().amx; }

Dot chosen_dot() { return choice_now().dot; }

bool uses_vbmi() { return choice_now().vbmi && cpu_has("avx512_vbmi"); }

const char* chosen_name() { return choice_now().name; }

std::vector<const char*> offered_names() { return names(false); }

std::vector<const char*> names_for_tests() { return names(true); }

std::vector<const char*> left_out_names() {
    std::vector<const char*> names;
#if defined(__x86_64__)
    for (const Choice& choice : CHOICES)
        if (!choice.for_tests && !is_compiled(choice)) names.push_back(choice.name);
#endif
    return names;
}

const char* missed_name() {
    const Choice& taken = best();
    for (const Choice& choice : CHOICES) {
        if (&choice == &taken || choice.for_tests) break;
        if (!is_compiled(choice) && machine_refusal(choice).empty()) return choice.name;
    }
    return "";
}

void set_isa(const std::string& name) {
    const Choice& choice = named(name);
    const std::string refusal = refusal_of(choice);
    if (!refusal.empty()) throw std::invalid_argument("isa: " + refusal);
    chosen.store(&choice);
}

void set_isa_from_environment() {
    const char* value = std::getenv("DECODE_CORE_ISA");
    chosen.store(&best());
    for (std::string names = value ? value : ""; !names.empty();) {
        const size_t comma = names.find(',');
        const std::string name = names.substr(0, comma);
        names = comma == std::string::npos ? "" : names.substr(comma + 1);
        if (names.empty() || refusal_of(named(name)).empty()) return set_isa(name);
    }
}

}  // namespace dc
