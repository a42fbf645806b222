// The choice of instructions by name. Apart from cpu.h, which files with their own instruction set include: they take nothing of the
// standard library.
#pragma once

#include <string>
#include <vector>

#include "cpu/cpu.h"

namespace dc {

constexpr const char* CPU_FEATURES[] = {"avx512_vnni", "avx512_vbmi", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm"};    // as Linux names them

const char* chosen_name();                          // of chosen_isa and chosen_amx together
std::vector<const char*> offered_names();           // the best first: amx, avx512, avxvnni, avx2, or i8mm, dotprod, neon; portable
std::vector<const char*> names_for_tests();         // amx-always where AMX is; amx-emulated, amx-emulated-portable; avxvnni-evex; avx512-without-vbmi
std::vector<const char*> left_out_names();          // of the same those that this library was compiled without, whatever this CPU offers
const char* missed_name();                          // the best of them, where this CPU would choose it; else ""
void set_isa(const std::string& name);              // std::invalid_argument for an unknown name, one this CPU lacks or one left out
void set_isa_from_environment();                    // DECODE_CORE_ISA: a name, or several by commas: the first that is offered

// "" where AMX may be used, else why not. It is asked once: the permission holds for the process, its threads and forks.
const std::string& amx_refusal();
void give_up_amx();                                 // its results were wrong
// The same of a machine: cpuid 7's EDX, the XCR0 register, and errno of the request for permission.
std::string amx_refusal_of(unsigned edx, unsigned long xcr0, int error);
// By the endings of their sources. What is not is in cpu/left_out.cpp, or the compiler did not know it.
extern const bool AMX_IS_COMPILED, VNNI_IS_COMPILED, AVX512_IS_COMPILED, AVXVNNI_IS_COMPILED, AVX2_IS_COMPILED, TEST_SETS_ARE_COMPILED;

}  // namespace dc
