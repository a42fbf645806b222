// Products through emulated tile registers, with what AMX's kernel uses in addition: AVX-512.
#define DC_ISA emulated_vnni
#define DC_EMULATED_TILES
#if defined(DC_TEST_SETS)
#include "cpu/tiles/tiles_amx.inl.h"
#else
#include "cpu/tiles/tiles.h"
namespace dc { namespace emulated_vnni { extern const WideMultiply wide_multiply = nullptr; } }
#endif
