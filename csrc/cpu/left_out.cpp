// What stands for the sources that setup.py left out, because the CPU that compiles chooses another instruction set (DECODE_CORE_SETS). DC_LEFT_OUT_X
// says that the sources with the ending _x are not there. dispatch.cpp offers no such set, so that nothing here is called.
#include "cpu/attention/attention.h"
#include "cpu/program/delta_rule.h"
#include "cpu/program/mamba2.h"
#include "cpu/program/rows.h"
#include "cpu/tiles/tiles.h"
#include "ops.h"

#define DC_NO_PRODUCTS(isa)                                                             \
    namespace isa {                                                                     \
    extern const TileKernels tile_kernels = {nullptr, nullptr};                         \
    extern const AttentionKernels packed_attention_kernels = {nullptr, nullptr, nullptr}; \
    }
#define DC_NOTHING_ELSE(isa)                                                            \
    namespace isa {                                                                     \
    extern const AttentionKernels attention_kernels = {nullptr, nullptr, nullptr};      \
    extern const RowKernels row_kernels = {};                                           \
    void sample_row(const SampleArgs&, int64_t) {}                                      \
    void delta_rule(const DeltaRows&) {}                                                \
    void mamba2(const Mamba2Rows&) {}                                                   \
    }

namespace dc {

#if defined(DC_LEFT_OUT_AVX2)
DC_NO_PRODUCTS(avx2)
DC_NOTHING_ELSE(avx2)
#endif
#if defined(DC_LEFT_OUT_AVXVNNI)
DC_NO_PRODUCTS(avxvnni)
#endif
#if defined(DC_LEFT_OUT_AVX512)
DC_NOTHING_ELSE(avx512)
#endif
#if defined(DC_LEFT_OUT_VNNI)
DC_NO_PRODUCTS(avx512)
#endif
#if defined(DC_LEFT_OUT_AMX)
namespace amx { extern const WideMultiply wide_multiply = nullptr; }
#endif

}  // namespace dc
